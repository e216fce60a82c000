"""A real Chromium as camera and microphone of a real session. Its devices are fake: a clip of a face, and of speech."""

from __future__ import annotations

import os
import signal
import wave
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import certificates
import numpy as np
import pytest
from chromium import Tab, address_of, needs_chromium, running_chromium
from harness import Running, check_summary, recorded, ticks_of, verify
from recogniser import needs_recogniser

from stream_mmrnn.capture.encoders.face import PRESENT
from stream_mmrnn.capture.sources.file import FilePicture, FileSound
from stream_mmrnn.core.settings import CameraSettings, MicrophoneSettings

pytestmark = [needs_chromium, pytest.mark.process, pytest.mark.slow]
FAKE = ["--use-fake-device-for-media-stream"]
GRANTED = [*FAKE, "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def devices(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Chromium's options for a camera that shows a face and a microphone that hears speech, both in a loop."""
    folder = tmp_path_factory.mktemp("devices")
    picture = FilePicture(clips / "bbaf2n.mpg", CameraSettings(), paced=False)
    sound = FileSound(clips / "speech.mp4", MicrophoneSettings(), paced=False)
    picture.open()
    (folder / "face.mjpeg").write_bytes(b"".join(bytes(s.data) for s in picture.samples(lambda: True, 0)))
    sound.open()
    with wave.open(str(folder / "speech.wav"), "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes(b"".join(np.asarray(s.data).tobytes() for s in sound.samples(lambda: True, 0)))
    picture.close()
    sound.close()
    return [
        *GRANTED,
        f"--use-file-for-fake-video-capture={folder / 'face.mjpeg'}",
        f"--use-file-for-fake-audio-capture={folder / 'speech.wav'}",
    ]


def press(tab: Tab, stream: str, then: str) -> None:
    """Press the button of a stream, and wait until its sentence has these words."""
    tab.page.click(f"#sensors div:has(#sensor-{stream}) button")
    says(tab, stream, then)


def says(tab: Tab, stream: str, words: str) -> None:
    tab.until(f"document.getElementById('sensor-{stream}')?.textContent.includes({words!r})")


def noted(live: Running, node: str, words: str) -> None:
    live.wait_for(lambda: any(f"{node}: " in line and words in line for line in live.lines))


@pytest.mark.shared_data
@needs_recogniser
def test_a_face_and_speech_in_the_browser_become_words_and_predictions(devices: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    sources = ("--vision", "page", "--audio", "page", "--text", "speech")
    with (
        closing(Running(*sources, "--record", path, "--session", "phone")) as live,
        running_chromium(*devices) as browser,
    ):
        tab = Tab(browser, address_of(live))
        noted(live, "camera", "no browser gives its camera yet")
        says(tab, "vision", "no browser gives its camera yet")
        press(tab, "vision", "this browser is the camera")
        press(tab, "audio", "this browser is the microphone")
        noted(live, "camera", "is back")
        live.wait_for(lambda: len(recorded(path, "raw/text")) > 12, 120)
        tab.until("document.getElementById('picture').toDataURL().length > 2000")
        for width in (1280, 400):
            tab.page.set_viewport_size({"width": width, "height": 900})
            tab.photograph(f"sensors-{width}")
            assert tab.page.evaluate("document.documentElement.scrollWidth") == width
            assert tab.serious() == []
        # the connection takes nothing for a while: the oldest pictures are dropped here, and the server counts the gap
        tab.page.evaluate(
            "Object.defineProperty(WebSocket.prototype, 'bufferedAmount', {get: () => 1e9, configurable: true})"
        )
        says(tab, "vision", "dropped here")
        pictures = len(recorded(path, "raw/vision"))
        tab.page.evaluate("Object.defineProperty(WebSocket.prototype, 'bufferedAmount', {get: () => 0})")
        live.wait_for(lambda: len(recorded(path, "raw/vision")) > pictures + 5, 40)
        tab.close()
        code, summary, _ = live.end()
    assert code == 0
    check_summary(summary)
    words = {bytes(e.payload).decode().lower().strip(".,") for e in recorded(path, "raw/text")}
    assert words & {"negotiations", "international", "achieved"}, words
    about = {name: summary["streams"][name]["source"] for name in ("vision", "audio")}
    print(about, {name: summary["streams"][name]["dropped"] for name in about}, summary["latency_ms"])
    assert about["vision"]["source"] == about["audio"]["source"] == "page"
    assert about["audio"]["received"] > 200
    assert about["vision"]["browser_dropped"] > 0
    assert about["vision"]["garbage"] == about["audio"]["garbage"] == 0
    # event times are those of the browser's devices: in order, before they were received, sound at an even pace
    for stream in ("raw/vision", "raw/audio"):
        sent = recorded(path, stream)
        late_ns = [e.capture_ns - e.event_ns for e in sent]
        assert min(late_ns) >= 0
        assert np.median(late_ns) < 1e9
        assert all(np.diff([e.event_ns for e in sent]) > 0)
    assert np.median(np.diff([e.event_ns for e in recorded(path, "raw/audio")])) == pytest.approx(20e6, rel=0.01)
    faces = [e.payload[PRESENT] for e in recorded(path, "feature/vision")]
    assert np.mean(faces) > 0.5
    ticks = ticks_of(path)
    used = [t for t in ticks if t.present["audio"] and t.present["vision"]]
    assert len(used) > 50
    [projected] = [head for head in ticks[0].heads if head != "turn_over"]
    moved = np.array([t.heads[projected] for t in used], dtype=float)
    assert np.ptp(moved, axis=0).max() > 0.1
    verify(path, summary["predictions"])


@pytest.fixture(scope="module")
def session(model: Path) -> Iterator[Running]:
    with closing(Running("--model", model, "--vision", "page", "--audio", "page", "--text", "page")) as live:
        yield live


def test_one_browser_at_a_time_and_a_closed_tab_is_no_outage(session: Running) -> None:
    with running_chromium(*GRANTED) as browser:
        first, second = Tab(browser, address_of(session)), Tab(browser, address_of(session))
        press(first, "vision", "this browser is the camera")
        press(first, "audio", "this browser is the microphone")
        says(second, "vision", "another browser gives it")
        assert second.page.is_disabled("#sensors div:has(#sensor-vision) button")
        before = len(session.lines)
        first.close()
        noted(session, "camera", "closed the page or lost its connection")
        says(second, "vision", "closed the page or lost its connection")
        press(second, "vision", "this browser is the camera")
        session.wait_for(lambda: any("camera: is back" in line for line in session.lines[before:]))
        press(second, "vision", "the camera was stopped on the page")
        tick = second.text("#k-tick")
        second.until(f"document.getElementById('k-tick').textContent !== {tick!r}")
        second.close()


def test_a_refused_permission_is_a_sentence(session: Running) -> None:
    with running_chromium(*FAKE) as browser, closing(Tab(browser, address_of(session))) as tab:
        tab.context.grant_permissions([])  # playwright's contexts refuse what is not granted
        press(tab, "audio", "not allowed to use the microphone")
        noted(session, "microphone", "not allowed to use the microphone")
        tab.page.click("#sensors div:has(#sensor-audio) button")
        says(tab, "audio", "not allowed to use the microphone")
        tick = tab.text("#k-tick")
        tab.until(f"document.getElementById('k-tick').textContent !== {tick!r}")


def test_a_browser_without_devices_says_so(session: Running) -> None:
    if Path("/dev/video0").exists():
        pytest.skip("this machine has a camera")
    with (
        running_chromium("--use-fake-ui-for-media-stream") as browser,
        closing(Tab(browser, address_of(session))) as tab,
    ):
        press(tab, "vision", "the browser has no camera")


def test_the_page_finds_its_session_again_after_its_process_was_killed(session: Running) -> None:
    with running_chromium(*GRANTED) as browser, closing(Tab(browser, address_of(session))) as tab:
        press(tab, "audio", "this browser is the microphone")
        before = len(session.lines)
        [pid] = session.children("dashboard")
        os.kill(pid, signal.SIGKILL)
        session.wait_for(lambda: any("microphone: is back" in line for line in session.lines[before:]), 40)
        says(tab, "audio", "this browser is the microphone")
        tab.complaints.clear()  # the browser reports the requests that failed meanwhile


def test_a_phone_on_the_network_by_tls_and_token(model: Path, tmp_path: Path) -> None:
    cert, key = certificates.made(tmp_path)
    token = tmp_path / "token"
    reachable = ("--host", "0.0.0.0", "--token-file", token, "--cert", cert, "--key", key)
    path = tmp_path / "a.mcap"
    args = ("--model", model, "--vision", "page", "--audio", "none", "--text", "none", "--record", path)
    with closing(Running(*args, *reachable)) as live, running_chromium(*GRANTED) as browser:
        address = address_of(live).replace("0.0.0.0", "127.0.0.1")
        assert address.startswith("https://")
        tab = Tab(browser, f"{address}?token={token.read_text().strip()}", ignore_https_errors=True)
        assert "token" not in tab.page.url
        press(tab, "vision", "this browser is the camera")
        live.wait_for(lambda: len(recorded(path, "raw/vision")) > 10, 40)
        tab.close()
        code, summary, _ = live.end()
    assert code == 0
    check_summary(summary)
    verify(path, summary["predictions"])
