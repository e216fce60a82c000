"""A real PortAudio stream on a private PulseAudio server: a microphone that records what the test plays."""

import itertools
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import needs_pulse, virtual_devices
from places import ROOT

from stream_mmrnn.capture.sources.microphone import Microphone, list_devices
from stream_mmrnn.core.errors import SourceError
from stream_mmrnn.core.settings import MicrophoneSettings
from stream_mmrnn.core.types import Sample

pytestmark = [pytest.mark.devices, pytest.mark.process]


@pytest.fixture
def microphone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with virtual_devices.virtual_microphone() as virtual:
        for name, value in virtual.env.items():
            monkeypatch.setenv(name, value)
        yield virtual


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    """2 s of noise in bursts, different everywhere: it correlates with itself in one place only."""
    rng = np.random.default_rng(0)
    noise = np.convolve(rng.standard_normal(32_000), np.ones(8) / 8, "same")
    sound = 12_000 * noise * np.repeat(rng.uniform(0.2, 1.0, 100), 320)
    path = tmp_path / "noise.wav"
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(np.clip(sound, -32768, 32767).astype(np.int16).tobytes())
    return path


def record(source: Microphone, seconds: float) -> list[Sample]:
    end = time.monotonic() + seconds
    return list(source.samples(lambda: time.monotonic() < end, 0))


def found_in(samples: list[Sample], path: Path) -> float:
    """The best correlation of a file with the recorded samples."""
    with wave.open(str(path)) as plain:
        wanted = np.frombuffer(plain.readframes(24_000), np.int16).astype(float)[4_000:20_000]
    sound = np.concatenate([s.data for s in samples]).astype(float)
    fit = np.correlate(sound, wanted, "valid")
    at = int(fit.argmax())
    return float(np.corrcoef(sound[at : at + len(wanted)], wanted)[0, 1])


@needs_pulse
def test_a_microphone_hears_what_is_played(microphone: Any, wav: Path) -> None:
    assert "microphone:pulse" in [spec for spec, _ in list_devices()]
    with pytest.raises(SourceError, match=r"input devices are .*pulse"):
        Microphone("no such thing", MicrophoneSettings()).open()
    with closing(Microphone("pulse", MicrophoneSettings())) as source:
        source.open()
        assert source.info["got"]["rate_hz"] == 16_000
        assert not source.info["got"]["resampled"]
        microphone.play(wav, wait=False)
        samples = record(source, 3.0)
    assert {len(s.data) for s in samples} == {320}
    assert 120 <= len(samples) <= 170
    assert found_in(samples, wav) > 0.8
    steps = np.diff([s.event_ns for s in samples])
    assert steps.min() > 0
    assert abs(np.median(steps) - 20e6) < 1e6
    # event times are not in the future, and not long ago
    age = np.array([s.capture_ns - s.event_ns for s in samples])
    assert age.min() >= 0
    assert np.median(age) < 100e6


@needs_pulse
def test_a_device_that_refuses_16_khz_is_resampled(microphone: Any, wav: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sounddevice

    opened = sounddevice.RawInputStream

    def refuse(**asked: Any) -> Any:
        if asked["samplerate"] == 16_000:
            raise sounddevice.PortAudioError("Invalid sample rate", -9997)
        return opened(**asked)

    monkeypatch.setattr(sounddevice, "RawInputStream", refuse)
    with closing(Microphone("", MicrophoneSettings())) as source:
        source.open()
        assert source.info["got"]["resampled"]
        assert source.info["got"]["rate_hz"] > 16_000
        microphone.play(wav, wait=False)
        samples = record(source, 3.0)
    assert {len(s.data) for s in samples} == {320}
    assert found_in(samples, wav) > 0.8


@needs_pulse
def test_a_microphone_that_is_unplugged_is_lost_and_found(microphone: Any) -> None:
    with closing(Microphone("pulse", MicrophoneSettings())) as source:
        source.open()
        assert len(record(source, 0.5)) > 5
        threading.Timer(0.2, microphone.stop).start()
        began = time.monotonic()
        with pytest.raises(SourceError, match="lost"):
            record(source, 15)
        assert time.monotonic() - began < 5
        with pytest.raises(SourceError, match="not there"):
            source.open()
        microphone.start()
        source.open()
        assert len(record(source, 1.0)) > 10


@needs_pulse
def test_lost_blocks_are_counted_and_leave_a_gap_in_time(microphone: Any) -> None:
    with closing(Microphone("pulse", MicrophoneSettings(), max_queued=5)) as source:
        source.open()
        samples = source.samples(lambda: True, 0)
        next(samples)
        time.sleep(0.6)  # the reader stalls; all but 5 blocks are lost
        late = list(itertools.islice(samples, 15))
    assert source.info["dropped"] > 5
    assert source.info["overflows"] >= 1
    assert np.diff([s.event_ns for s in late]).max() > 200e6


def test_without_portaudio_the_error_names_it() -> None:
    code = (
        "import sys; sys.modules['sounddevice'] = None\n"
        "import stream_mmrnn.capture.sources.microphone as m\n"
        "def gone(*a, **k): raise OSError('PortAudio library not found')\n"
        "import builtins; real = builtins.__import__\n"
        "builtins.__import__ = lambda n, *a, **k: gone() if n == 'sounddevice' else real(n, *a, **k)\n"
        "from stream_mmrnn.core.settings import MicrophoneSettings as S\n"
        "from stream_mmrnn.core.errors import SourceError\n"
        "try: m.Microphone('', S()).open()\n"
        "except SourceError as e: print(e)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "libportaudio2" in ran.stdout


def test_the_tool_has_help() -> None:
    tool = str(ROOT / "tools" / "virtual_devices.py")
    ran = subprocess.run([sys.executable, tool, "--help"], capture_output=True, text=True, check=True)
    assert "--wav" in ran.stdout
    nothing = subprocess.run([sys.executable, tool], capture_output=True, text=True, check=False)
    assert nothing.returncode == 2
