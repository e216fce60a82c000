"""A Python with pipecat-ai and livekit-agents, which do not go into the environment of the tests, and speech for it."""

from __future__ import annotations

import os
import re
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from places import ROOT

PYTHON = "STREAM_MMRNN_AGENTS_PYTHON"
MADE = ROOT / ".setup" / "agents" / "bin" / "python"
"""What `tools/setup.sh test` makes, where it can."""
RATE_HZ = 16_000


def agents_python() -> str:
    """Skips the test where there is none."""
    if named := os.environ.get(PYTHON):
        return named
    if MADE.exists():
        return str(MADE)
    pytest.skip(
        f"no Python has pipecat-ai and livekit-agents: tools/setup.sh test makes {MADE.relative_to(ROOT)}, or name one "
        f"in {PYTHON}"
    )


def say(path: Path, clips: Path, names: tuple[str, ...], quiet_s: float = 2.0) -> list[float]:
    """Write the sentences of GRID's clips as a WAV file, with quiet after each; returns when each one's clip ends."""
    noise = np.random.default_rng(0)
    ends_s, pieces, count = list[float](), list[Any](), 0
    for name in names:
        sound, quiet = sound_of(clips / name), noise.normal(0, 8, round(quiet_s * RATE_HZ))
        ends_s.append((count + len(sound)) / RATE_HZ)
        count += len(sound) + len(quiet)
        pieces += [sound, quiet]
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE_HZ, 0, "NONE", ""))
        file.writeframes(np.concatenate(pieces).astype("<i2").tobytes())
    return ends_s


def sound_of(path: Path) -> Any:
    """The sound of a media file, int16 at 16 kHz."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE_HZ)
    with av.open(str(path)) as file:
        frames = [out for frame in file.decode(audio=0) for out in resampler.resample(frame)]
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


def python_of(page: Path) -> str:
    """The program of a guide that such an environment runs."""
    (found,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return str(found)
