"""Whole sessions on the nearest thing to real devices: a microphone under PulseAudio, a camera on loopback, a pipe."""

from __future__ import annotations

import ctypes.util
import importlib
import os
import signal
import time
import wave
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Running, check_summary, recording_grows, run, ticks_of, verify

from stream_mmrnn.capture.encoders.audio import SPEECH
from stream_mmrnn.capture.sources.synthetic import Synthetic
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.settings import SyntheticSettings
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.recording.mcap_file import Recording

pytestmark = pytest.mark.process

virtual_devices: Any = importlib.import_module("tools.virtual_devices")

missing = virtual_devices.missing_programs()
needs_pulse = pytest.mark.skipif(
    bool(missing) or ctypes.util.find_library("portaudio") is None,
    reason=f"a virtual microphone needs PulseAudio and PortAudio (missing: {', '.join(missing) or 'libportaudio2'})",
)


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 s of the synthetic talker, from where it talks."""
    source = Synthetic(Stream.of("audio"), SyntheticSettings(seed=1), paced=False)
    blocks = []
    for sample in source.samples(lambda: True, 0):
        blocks.append(sample.data)
        if len(blocks) == 200:
            break
    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(np.concatenate(blocks).tobytes())
    return path


@pytest.fixture
def camera() -> Iterator[Any]:
    with virtual_devices.mjpeg_camera(rate_hz=25) as made:
        yield made


@needs_pulse
@pytest.mark.devices
def test_microphone_camera_and_typed_words_together(model: Path, tmp_path: Path, talk: Path, camera: Any) -> None:
    path, fifo = tmp_path / "a.mcap", tmp_path / "words"
    os.mkfifo(fifo)
    with virtual_devices.virtual_microphone() as microphone:
        args = ("--vision", f"camera:{camera.url}", "--audio", "microphone:pulse", "--text", f"pipe:{fifo}")
        env = {**os.environ, **microphone.env}
        with closing(Running(*args, "--model", model, "--record", path, env=env)) as live:
            live.wait_for(lambda: recording_grows(path, 150_000))
            time.sleep(1.0)
            spoken_from_ns = now_ns()
            microphone.play(talk, wait=False)
            with fifo.open("w") as words:
                # a word is of one tick, and a busy machine does not encode the picture of each tick in time
                while now_ns() - spoken_from_ns < 4_200_000_000:
                    print("morning", file=words, flush=True)
                    time.sleep(0.1)
            spoken_to_ns = now_ns()
            time.sleep(1.0)
            code, summary, _ = live.end()
    assert code == 0
    check_summary(summary)
    verify(path, summary["predictions"])
    assert summary["streams"]["audio"]["source"]["source"] == "microphone:pulse"
    assert all(s["delivered"] > 0 for s in summary["streams"].values())
    ticks = ticks_of(path)
    assert any(all(t.present.values()) for t in ticks), "no tick had all three modalities"
    for modality in ("vision", "audio"):
        # a machine that others use, too, does not encode every picture in time; that it did is not for a test to say
        assert np.mean([t.present[modality] for t in ticks[25:]]) > 0.3, modality
    speech = [
        (e.event_ns, float(e.payload[SPEECH]))
        for e in Recording(path).envelopes({"feature/audio"})
        if not isinstance(e.payload, bytes)
    ]
    silent = [p for at, p in speech if at < spoken_from_ns]
    loud = [p for at, p in speech if spoken_from_ns + 500_000_000 < at < spoken_to_ns]
    assert max(silent) < 0.5
    assert np.mean([p > 0.5 for p in loud]) > 0.3, "no speech was seen while speech was played"
    code, raw, _ = run("replay", path, "--from", "raw")
    assert (code, raw["predictions"]) == (0, summary["predictions"])
    assert raw["max_abs_difference"] <= 1e-4


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="needs /proc")
def test_a_camera_that_is_unplugged_and_a_worker_that_is_killed(model: Path, tmp_path: Path, camera: Any) -> None:
    path = tmp_path / "a.mcap"
    args = ("--vision", f"camera:{camera.url}", "--audio", "synthetic", "--text", "none")
    with closing(Running(*args, "--model", model, "--record", path)) as live:
        live.wait_for(lambda: recording_grows(path, 150_000))
        camera.stop()
        gone_ns = now_ns()
        live.wait_for(lambda: any(line.startswith("! camera:") for line in live.lines))
        time.sleep(1.0)
        [worker] = live.children("camera")
        os.kill(worker, signal.SIGKILL)
        time.sleep(1.0)
        camera.start()
        back_ns = now_ns()
        live.wait_for(lambda: any("camera: is back" in line for line in live.lines))
        time.sleep(1.0)
        code, summary, _ = live.end()
    assert code == 0
    assert summary["restarts"]["camera"][0] == "was killed by SIGKILL"
    check_summary(summary)
    verify(path, summary["predictions"])
    ticks = ticks_of(path)
    assert [t.tick for t in ticks] == list(range(ticks[0].tick, ticks[0].tick + len(ticks)))
    between = [t.present["vision"] for t in ticks if gone_ns + 200_000_000 < t.event_ns < back_ns]
    assert between
    assert not any(between)
    first = next(t.event_ns for t in ticks if t.event_ns > back_ns and t.present["vision"])
    assert first - back_ns < 2_000_000_000
