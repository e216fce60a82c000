"""`devices --look` with a camera on loopback and a virtual microphone."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import needs_pulse, virtual_devices
from rich.console import Console

from stream_mmrnn.cli.devices import half_blocks, meter

pytestmark = pytest.mark.process

COMMAND = [sys.executable, "-m", "stream_mmrnn", "devices"]


def run(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **(env or {})}
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=120, env=env)


def test_a_camera_s_picture_is_shown_and_saved(tmp_path: Path) -> None:
    import cv2

    with virtual_devices.mjpeg_camera(rate_hz=50) as camera:
        spec = f"camera:{camera.url}"
        done = run(spec, "--look", "--pictures", tmp_path / "seen", "--timeout", 30, "--json")
        seen: dict[str, Any] = next(c for c in json.loads(done.stdout)["cameras"] if c["source"] == spec)
        plain = run(spec, "--look", "--timeout", 30)
    assert done.returncode == plain.returncode == 0, done.stderr + plain.stderr
    assert (seen["width"], seen["height"]) == (320, 240)
    picture = cv2.imread(seen["picture"])
    assert picture is not None
    assert picture.shape == (240, 320, 3)
    assert virtual_devices.read_number(picture) > 0
    assert "320x240" in plain.stdout
    # the bars of the number, white and black, in greys because this is no terminal
    rows = [line for line in plain.stdout.splitlines() if line.startswith("  ") and "@" in line]
    assert len(rows) == 12
    assert len(set(rows)) == 1


def test_a_missing_camera_is_reported_for_itself_only() -> None:
    with virtual_devices.mjpeg_camera(rate_hz=50) as camera:
        gone = "camera:http://127.0.0.1:9/none.mjpg"
        done = run(gone, f"camera:{camera.url}", "--look", "--timeout", 30, "--json")
    found = {c["source"]: c for c in json.loads(done.stdout)["cameras"]}
    assert done.returncode == 0
    assert "cannot be opened" in found[gone]["problem"]
    assert found[f"camera:{camera.url}"]["width"] == 320


def test_other_names_than_devices_are_usage_errors() -> None:
    done = run("tcp:5555", "--look")
    assert done.returncode == 2
    assert "'tcp:5555' is no device" in done.stderr


@needs_pulse
@pytest.mark.devices
def test_a_loud_microphone_differs_from_a_silent_one(tmp_path: Path) -> None:
    assert ctypes.util.find_library("portaudio")
    tone = (16384 * np.sin(2 * np.pi * 440 * np.arange(160_000) / 16_000)).astype(np.int16)
    path = tmp_path / "tone.wav"
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(tone.tobytes())
    with virtual_devices.virtual_microphone() as microphone:
        silent = run("--look", "--timeout", 30, "--json", env=microphone.env)
        microphone.play(path, wait=False)
        loud = run("--look", "--timeout", 30, "--json", env=microphone.env)
        microphone.play(path, wait=False)
        plain = run("--look", "--timeout", 30, env=microphone.env)
    before, after = (
        next(m for m in json.loads(done.stdout)["microphones"] if m["source"] == "microphone:pulse")
        for done in (silent, loud)
    )
    assert before["peak_dbfs"] == before["rms_dbfs"] == -96.0
    # half of full scale is -6 dBFS, and a sine's rms 3 dB less
    assert abs(after["peak_dbfs"] + 6.0) < 1.5
    assert abs(after["rms_dbfs"] + 9.0) < 1.5
    assert "█" in plain.stdout
    assert "dBFS, peak" in plain.stdout


def test_a_character_shows_two_rows_of_a_picture() -> None:
    red, blue = bytes((255, 0, 0)), bytes((0, 0, 255))
    text = half_blocks(red * 4 + blue * 4, 4, 2, coloured=True)
    assert text.plain == "  ▀▀▀▀"
    console = Console(force_terminal=True, color_system="truecolor", width=40)
    with console.capture() as capture:
        console.print(text)
    assert "38;2;255;0;0;48;2;0;0;255" in capture.get()
    greys = half_blocks(bytes(12) + b"\xff" * 12, 2, 4, coloured=False).plain.splitlines()
    assert [line[2:] for line in greys] == ["  ", "@@"]


@pytest.mark.parametrize(
    ("rms", "peak", "full"), [(0.0, 0.0, 40), (-30.0, -30.0, 20), (-60.0, -60.0, 0), (-80, -70, 0)]
)
def test_a_meter_is_as_long_as_the_sound_is_loud(rms: float, peak: float, full: int) -> None:
    bar = meter(rms, peak).plain
    assert bar.count("█") == full
    assert bar.count("█") + bar.count("▒") + bar.count("·") == 40
    assert "silence" in meter(-96.0, -96.0).plain
