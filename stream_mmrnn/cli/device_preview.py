"""List cameras and microphones, with a picture or a level of each to tell them apart.

Every device is opened in a process that can be killed (`probes`). Knows nothing about terminals.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from stream_mmrnn.capture import sources
from stream_mmrnn.cli import probes
from stream_mmrnn.core.errors import FileError, StreamError, UsageError

LISTEN_S = 1.0
_KINDS = {"camera": "cameras", "microphone": "microphones"}


def found(named: Collection[str] = (), timeout_s: float = 10.0) -> dict[str, Any]:
    """`cameras` and `microphones`, each with `source` and `is`; `problem`: why the lists may be incomplete.

    The devices in `named` (such as `camera:URL`) are added to the lists.

    Raises:
        UsageError: `named` has something that is neither.

    """
    devices: dict[str, Any] = {}
    problems = []
    for kind, many in _KINDS.items():
        devices[many] = []
        try:
            devices[many] = [{"source": s, "is": what} for s, what in probes.ask(many, timeout_s=timeout_s)]
        except StreamError as e:
            problems.append(str(e))
        listed = {device["source"] for device in devices[many]}
        for source in dict.fromkeys(named):
            if sources.split(source)[0] == kind and source not in listed:
                devices[many].append({"source": source, "is": "named"})
    for source in named:
        if sources.split(source)[0] not in _KINDS:
            raise UsageError(f"{source!r} is no device; name a camera:... or microphone:...")
    return {**devices, "problem": "; ".join(problems)}


def picture(device: dict[str, Any], timeout_s: float = 10.0) -> bytes:
    """A camera's picture as JPEG; adds `width`, `height` and a thumbnail `rgb` to `device`, or `problem`."""
    try:
        picture = probes.ask("look", device["source"], timeout_s)
    except StreamError as e:
        device["problem"] = str(e)
        return b""
    device.update(width=picture["width"], height=picture["height"], rgb=base64.b64decode(picture["rgb"]))
    return base64.b64decode(picture["jpeg"])


def level(device: dict[str, Any], timeout_s: float = 10.0, each: Callable[[float], None] = lambda _: None) -> None:
    """A microphone's level over `LISTEN_S`; adds `rms_dbfs` and `peak_dbfs` to `device`, or `problem`.

    `each` is called with the level of every block.
    """
    try:
        argument = {"source": device["source"], "seconds": LISTEN_S}
        measured = probes.ask("listen", argument, timeout_s, each)
    except StreamError as e:
        device["problem"] = str(e)
        return
    device.update(rms_dbfs=measured["rms_dbfs"], peak_dbfs=measured["peak_dbfs"])


def save(jpeg: bytes, source: str, folder: Path) -> Path:
    """Write the picture to a file named after its camera.

    Raises:
        FileError: it cannot be written.

    """
    path = folder / (re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[:100] + ".jpg")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)
    except OSError as e:
        raise FileError(f"{path} cannot be written: {e.strerror}; name another folder") from e
    return path
