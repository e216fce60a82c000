"""The virtual devices, and the mark of tests that need PulseAudio."""

from __future__ import annotations

import ctypes.util
import importlib
from typing import Any

import pytest

virtual_devices: Any = importlib.import_module("tools.virtual_devices")


missing = virtual_devices.missing_programs()


needs_pulse = pytest.mark.skipif(
    bool(missing) or ctypes.util.find_library("portaudio") is None,
    reason=f"a virtual microphone needs PulseAudio and PortAudio (missing: {', '.join(missing) or 'libportaudio2'})",
)
