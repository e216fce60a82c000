"""Streams that come over the bus: made of other streams, or pushed by other programs. Live, recorded, replayed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import wave
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import plugin_packages
import pytest
from harness import Running, check_summary, run, ticks_of, verify

import stream_mmrnn
from stream_mmrnn.bus import registry
from stream_mmrnn.core.errors import NotRunning, UsageError
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.viewers.top.system import System

pytestmark = pytest.mark.process

QUIET = "[dashboard]\nenabled = false\n"
DERIVED = """
[streams.mic]
source = "synthetic"
kind = "audio"

[streams.audio]
source = "from:mic"

[streams.loudness]
source = "from:mic/loudness"
kind = "signal"
encoders = ["signal"]

[streams.louder]
source = "from:loudness"
"""


@pytest.fixture
def loudness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = plugin_packages.install_loudness(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", "")))))
    monkeypatch.syspath_prepend(str(site))


def raw_of(path: Path, stream: str) -> list[Any]:
    return list(Recording(path).envelopes({f"raw/{stream}"}))


@pytest.mark.slow
def test_derived_streams_feed_a_model_and_are_made_again_in_replay(tmp_path: Path, model: Path, loudness: None) -> None:
    file, path = tmp_path / "s.toml", tmp_path / "a.mcap"
    file.write_text(QUIET + DERIVED)
    code, summary, err = run("live", "--config", file, "--duration", 5, "--model", model, "--record", path)
    assert code == 0, err
    check_summary(summary)
    assert set(summary["streams"]) == {"mic", "audio", "loudness", "louder"}
    assert sum(tick.present["audio"] for tick in ticks_of(path)) > 80
    verify(path, summary["predictions"])
    # a copy has no samples of its own; a derivation has, at the times of what it was made of
    assert not raw_of(path, "audio")
    heard = {e.event_ns: float(np.sqrt(np.mean(np.square(e.payload.astype(float))))) for e in raw_of(path, "mic")}
    made = raw_of(path, "loudness")
    assert len(made) >= len(heard) - 5
    assert all(e.payload[0] == np.float32(heard[e.event_ns]) for e in made)
    assert all(e.origin == "loudness@1" for e in made)
    code, again, err = run("replay", path, "--from", "raw")
    assert (code, again["identical"], again["predictions"]) == (0, True, summary["predictions"]), err


@pytest.mark.slow
def test_a_derived_stream_ends_with_a_file_and_its_last_samples_count(tmp_path: Path, loudness: None) -> None:
    clip, file, path = tmp_path / "a.wav", tmp_path / "s.toml", tmp_path / "a.mcap"
    with wave.open(str(clip), "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes(np.random.default_rng(0).integers(-9000, 9000, 16_000 * 2, np.int16).tobytes())
    file.write_text(QUIET + DERIVED.replace('"synthetic"', f'"file:{clip}"'))
    code, summary, err = run(
        "record",
        path,
        "--config",
        file,
    )
    assert code == 0, err
    assert {row["state"] for row in summary["streams"].values()} == {"ended"}
    assert summary["streams"]["audio"]["produced"] == summary["streams"]["mic"]["produced"] == 100
    # it keeps the first block back until the second, and the last one until the end
    assert len(raw_of(path, "loudness")) == len(raw_of(path, "mic")) == 100


@pytest.mark.slow
def test_a_killed_worker_of_a_derived_stream_goes_on(tmp_path: Path, model: Path, loudness: None) -> None:
    file, path = tmp_path / "s.toml", tmp_path / "a.mcap"
    file.write_text(QUIET + DERIVED)
    with closing(
        Running(
            "--config",
            file,
            "--model",
            model,
            "--record",
            path,
        )
    ) as live:
        live.wait_for(lambda: path.exists() and len(raw_of_growing(path)) > 20, 40)
        before = len(raw_of_growing(path))
        [pid] = live.children("microphone")
        os.kill(pid, signal.SIGKILL)
        live.wait_for(lambda: len(raw_of_growing(path)) > before + 150, 40)
        code, summary, _ = live.end()
    assert code == 0
    assert summary["restarts"] == {"microphone": ["was killed by SIGKILL"]}
    verify(path, summary["predictions"])
    present = [tick.present["audio"] for tick in ticks_of(path)]
    assert sum(present[-30:]) > 15  # the last ticks end with the session


def raw_of_growing(path: Path) -> list[Any]:
    try:
        return raw_of(path, "mic")
    except stream_mmrnn.StreamError:
        return []


@pytest.mark.slow
def test_pushed_samples_are_recorded_counted_and_predicted_from(tmp_path: Path, model: Path) -> None:
    path, name = tmp_path / "a.mcap", "pushed"
    sound = (8000 * np.sin(np.arange(48_000) * 0.05)).astype(np.int16)
    file = tmp_path / "s.toml"
    kinds = {"audio": "audio", "text": "text", "imu": "signal", "cam": "vision", "ana": "text"}
    rows = [f'[streams.{of}]\nsource = "push"\nkind = "{kind}"\n' for of, kind in kinds.items()]
    file.write_text(QUIET + "".join(rows))
    with closing(Running("--config", file, "--model", model, "--record", path, "--session", name)) as live:
        with (
            stream_mmrnn.push("audio", name, wait=30) as audio,
            stream_mmrnn.push("text", name) as text,
            stream_mmrnn.push("imu", name) as imu,
            stream_mmrnn.push("cam", name) as camera,
        ):
            began_ns = stream_mmrnn.now_ns()
            for i in range(50):
                at_ns = began_ns + (i + 1) * 20_000_000
                time.sleep(max(at_ns - stream_mmrnn.now_ns(), 0) / 1e9)
                assert audio.send(sound[i * 960 : (i + 1) * 960], at_ns, rate_hz=48_000)
                assert imu.send([i, 2.0, 3.0], at_ns)
                if i % 10 == 0:
                    assert text.send(f"word {i}", at_ns)
            camera.send(b"no picture")
            text.send("two\nlines")
            imu.send(np.ones(3), at_ns + 1)
            watched = System(registry.find(name))
            with closing(watched), stream_mmrnn.push("ana", name) as ana:
                live.wait_for(lambda: shows(watched, ana), 20)
            assert (audio.sent, audio.refused) == (50, 0)
            with pytest.raises(UsageError, match="a sample is text, JPEG bytes, int16 sound or numbers"):
                imu.send(np.ones((2, 2)))
            with pytest.raises(UsageError, match="rate_hz is 5"):
                audio.send(sound, rate_hz=5)
        with pytest.raises(NotRunning, match="was closed"):
            audio.send(sound)
        with pytest.raises(NotRunning, match="has no stream 'vision' that takes samples"):
            stream_mmrnn.push("vision", name)
        code, summary, _ = live.end()
    assert code == 0
    check_summary(summary)
    rows = summary["streams"]
    assert rows["audio"]["source"] | {"senders": 1, "lost": 0, "garbage": 0} == rows["audio"]["source"]
    assert rows["text"]["source"]["garbage"] == 1
    assert rows["cam"]["capture"]["dropped"] == {"undecodable": 1}
    assert [e.payload for e in raw_of(path, "text")] == [f"word {i}".encode() for i in range(0, 50, 10)]
    # sound is converted, and its times are those that were given, less what the resampler holds back
    heard = raw_of(path, "audio")
    assert abs(sum(len(e.payload) for e in heard) - 16_000) < 200
    assert all(0 <= began_ns + (i + 1) * 20_000_000 - e.event_ns < 5_000_000 for i, e in enumerate(heard[-10:], 40))
    measured = list(Recording(path).envelopes({"feature/imu"}))
    assert [e.payload.tolist() for e in measured][:3] == [[0.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.0, 2.0, 3.0]]
    verify(path, summary["predictions"])
    assert sum(tick.present["audio"] for tick in ticks_of(path)) > 5  # on a busy machine more of it is late
    code, again, err = run("replay", path, "--from", "raw")
    assert (code, again["identical"]) == (0, True), err


def shows(watched: System, ana: stream_mmrnn.Push) -> bool:
    """Whether `top` shows what is said on a stream with a name of its own."""
    ana.send("hello from ana")
    watched.receive()
    return "hello from ana" in str(watched.live())


@pytest.mark.slow
def test_a_browser_pushes_over_the_page(tmp_path: Path) -> None:
    from websockets.exceptions import ConnectionClosed, InvalidStatus
    from websockets.sync.client import connect

    path, name = tmp_path / "a.mcap", "page-pushed"
    with closing(
        Running(path, "--vision", "none", "--audio", "push", "--text", "push", "--session", name, verb=("record",))
    ) as live:
        page = live.wait_for(lambda: page_of(name), 30)
        place = page.replace("http://", "ws://")
        with connect(f"{place}push/audio?rate_hz=8000") as sound, connect(f"{place}push/text") as words:
            for _ in range(20):
                sound.send(np.ones(160, np.int16).tobytes())
                time.sleep(0.02)
            words.send("hello")
            live.wait_for(lambda: raw_in(path, "text"), 20)
        for bad, why in (
            ("push/vision", "no stream"),
            ("push/audio?rate_hz=1", "rate_hz"),
            ("push/audio?rate_hz=0016000999", "rate_hz"),
            ("push/", ""),
        ):
            with pytest.raises(InvalidStatus) as e:
                connect(place + bad)
            assert why in e.value.response.body.decode()
        with pytest.raises(InvalidStatus):
            connect(f"{place}push/text", origin="http://example.com")  # type: ignore[arg-type]
        with connect(f"{place}push/text") as words:
            with contextlib.suppress(ConnectionClosed):  # the page may close it while this is still being sent
                words.send(b"x" * (2 << 20))
            with pytest.raises(ConnectionClosed):
                words.recv(10)
        code, summary, _ = live.end()
    assert code == 0
    assert summary["streams"]["audio"]["capture"]["produced"] == 20
    assert [e.payload for e in raw_of(path, "text")] == [b"hello"]
    assert abs(sum(len(e.payload) for e in raw_of(path, "audio")) - 20 * 320) < 100


def page_of(session: str) -> str:
    return next((e.page for e in registry.everything() if e.session == session), "")


def raw_in(path: Path, stream: str) -> list[Any]:
    try:
        return raw_of(path, stream)
    except stream_mmrnn.StreamError:
        return []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stream", "a=from:b", "--stream", "b=from:a"], "the derived streams `a`, `b` are made of each other"),
        (["--stream", "a=from:nix"], "`streams.a` is made of 'nix', which this session has not"),
        (["--stream", "a=from:signal"], "`streams.a` is made of 'signal', which this session has not"),
        (
            ["--stream", "a:text=from:audio/nix"],
            "names no derivation; use from:audio, from:audio/speech, from:audio/turn_end, or a plug-in's",
        ),
        (["--stream", "a=push"], "`streams.a.kind` is missing"),
        (["--stream", "a:text=push:5555"], "push takes no argument"),
        (["--stream", "a:text=from:"], "`streams.a` is made of '', which this session has not"),
    ],
)
def test_wrong_ones_are_one_sentence(args: list[str], words: str) -> None:
    code, _, err = run("live", "--audio", "synthetic", *args, "--duration", 1)
    assert code == 2
    assert words in " ".join(err.split())


def test_a_push_to_no_session_says_so() -> None:
    with pytest.raises(NotRunning, match="no session "):
        stream_mmrnn.push("audio", "there is none")
    with pytest.raises(UsageError, match="is no name of a stream"):
        stream_mmrnn.push("a/b")
    with pytest.raises(UsageError, match="say which session"):
        stream_mmrnn.push("audio", address="127.0.0.1:9")
