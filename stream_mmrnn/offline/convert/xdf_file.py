"""Read the streams of an XDF file with pyxdf, all of them on one clock."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.extras import need

_PACKED = (".xdfz", ".gz")
_MAX_S = 2**62 / 1e9


class XdfStream(msgspec.Struct, frozen=True, eq=False):
    """One stream of an XDF file."""

    number: int
    name: str
    kind: str
    """The type that it declares: EEG, Markers, Audio."""
    rate_hz: float
    """0: events at no fixed rate."""
    channels: int
    values: Any
    """[samples, channels] of numbers, or lists of strings."""
    times_s: npt.NDArray[np.float64]
    """[samples], ascending, on the clock of all streams."""
    segments: list[tuple[int, int]]
    """First and last sample of each stretch without a gap."""
    offsets: list[tuple[float, float]]
    """Measurements of its clock's offset: when, and the offset, in seconds."""

    @property
    def is_text(self) -> bool:
        return isinstance(self.values, list)


def read(path: Path) -> tuple[list[XdfStream], str, str]:
    """The streams of a file, its date ("" where it has none), and what is damaged ("" for nothing).

    Raises:
        UsageError: pyxdf is not installed.
        FileError: the file is missing, or no XDF.

    """
    need("XDF", "lsl", "pyxdf")
    import pyxdf

    errors = _ErrorLog()
    logger = logging.getLogger("pyxdf")
    logger.addHandler(errors)
    logger.propagate = False
    try:
        # opened here, because pyxdf never closes a file that it opened
        with gzip.open(path) if path.suffix in _PACKED else path.open("rb") as file:
            found, header = pyxdf.load_xdf(file)
        streams = [_stream(row) for row in found]
        date = str(header["info"]["datetime"][0]) if header and header["info"].get("datetime") else ""
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror or e}; expected an XDF file") from e
    except Exception as e:  # a parser of untrusted bytes whose errors share no base class
        raise FileError(f"{path} is no XDF file that pyxdf can read: {type(e).__name__}: {e}") from e
    finally:
        logger.removeHandler(errors)
        logger.propagate = True
    return streams, date, "; ".join(errors.messages[:3])


class _ErrorLog(logging.Handler):
    """Collects what pyxdf logs about a damaged file, of which it returns what it can read."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().strip())


def _stream(row: dict[str, Any]) -> XdfStream:
    info = row["info"]
    times_s = np.asarray(row["time_stamps"], np.float64)
    if not np.isfinite(times_s).all() or (np.abs(times_s) > _MAX_S).any():
        raise ValueError("a time stamp is not a time")
    values = row["time_series"]
    segments = [(int(a), int(b)) for a, b in info.get("segments") or []]
    if (np.diff(times_s) < 0).any():  # a clock was set back
        order = np.argsort(times_s, kind="stable")
        times_s = times_s[order]
        values = [values[i] for i in order] if isinstance(values, list) else values[order]
        segments = [(0, len(times_s) - 1)] if len(times_s) else []
    return XdfStream(
        int(info["stream_id"]),
        str(info["name"][0] or ""),
        str(info["type"][0] or ""),
        float(info["nominal_srate"][0]),
        int(info["channel_count"][0]),
        values,
        times_s,
        segments,
        list(zip(map(float, row["clock_times"]), map(float, row["clock_values"]), strict=True)),
    )
