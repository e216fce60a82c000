"""Cameras and microphones, and a picture or a level of each to tell them apart.

Every device is asked in a process that can be killed (`probes`). Knows nothing about terminals.
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
    """`cameras` and `microphones`, each with `source` and `is`, those of `named` (`camera:URL`) with them; `problem`
    says why there may be more.

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
    """A camera's picture, as JPEG; writes `width`, `height` and a small picture, `rgb`, into `device`, or `problem`."""
    try:
        seen = probes.ask("look", device["source"], timeout_s)
    except StreamError as e:
        device["problem"] = str(e)
        return b""
    device.update(width=seen["width"], height=seen["height"], rgb=base64.b64decode(seen["rgb"]))
    return base64.b64decode(seen["jpeg"])


def level(device: dict[str, Any], timeout_s: float = 10.0, each: Callable[[float], None] = lambda _: None) -> None:
    """How loud it is over `LISTEN_S`, in dBFS; writes `rms_dbfs` and `peak_dbfs` into `device`, or `problem`.

    `each` is told the level of every block.
    """
    try:
        asked = {"source": device["source"], "seconds": LISTEN_S}
        heard = probes.ask("listen", asked, timeout_s, each)
    except StreamError as e:
        device["problem"] = str(e)
        return
    device.update(rms_dbfs=heard["rms_dbfs"], peak_dbfs=heard["peak_dbfs"])


def save(jpeg: bytes, source: str, folder: Path) -> Path:
    """The picture as a file that is named after its camera.

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
