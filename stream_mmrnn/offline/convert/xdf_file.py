"""Read the streams of an XDF file with pyxdf, all of them on one clock."""

from __future__ import annotations

import io
import logging
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.extras import need
from stream_mmrnn.offline.convert.xdf_chunks import View

_PACKED = (".xdfz", ".gz")
_GZIP = 16 + zlib.MAX_WBITS
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
        with path.open("rb") as file:
            notes: list[str] = []
            view = View(_unpacked(file, notes) if path.suffix in _PACKED else file)
            times = _Times(view)
            found, header = pyxdf.load_xdf(view.file, on_chunk=times.on_chunk)
        streams = [_stream(row, times) for row in found]
        date = str(header["info"]["datetime"][0]) if header and header["info"].get("datetime") else ""
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror or e}; expected an XDF file") from e
    except Exception as e:  # a parser of untrusted bytes whose errors share no base class
        raise FileError(f"{path} is no XDF file that pyxdf can read: {type(e).__name__}: {e}") from e
    finally:
        logger.removeHandler(errors)
        logger.propagate = True
    damage = [*notes, *view.notes, *errors.messages[:3], *(note for s in found if (note := times.note(s)))]
    return streams, date, "; ".join(damage)


def _unpacked(file: BinaryIO, notes: list[str]) -> BinaryIO:
    """What a compressed file holds, as far as it goes."""
    data = io.BytesIO()
    inflate = zlib.decompressobj(_GZIP)
    try:
        while piece := file.read(1 << 20):
            while piece:
                if inflate.eof:
                    inflate = zlib.decompressobj(_GZIP)
                data.write(inflate.decompress(piece))
                piece = inflate.unused_data.lstrip(b"\0")  # zeros may follow the end
        whole = inflate.eof
    except zlib.error as e:
        if not data.tell():
            raise OSError(str(e)) from e
        whole = False
    if not whole:
        notes.append("its compressed data was cut off or is damaged")
    return data


class _Times:
    """Repairs the stamps of samples that are no times, before pyxdf computes with them: one would spoil all."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._seen: dict[int, tuple[int, float]] = {}
        """By stream, how many samples came, and the time of the last."""
        self.unusable: dict[int, list[int]] = {}
        """By stream, the samples that have no time, counted from 0: they are left out."""

    def on_chunk(self, values: Any, times_s: Any, header: dict[str, Any], number: int) -> tuple[Any, Any, Any]:
        """Called by pyxdf for each chunk of samples."""
        count, last_s = self._seen.get(number, (0, 0.0))
        bad = ~(np.abs(times_s) <= _MAX_S)
        if bad.any():
            rate_hz = float(header["info"]["nominal_srate"][0])
            step_s = 1 / rate_hz if rate_hz > 0 else 0.0
            good = np.flatnonzero(~bad)
            # a sample without a stamp of its own follows the one before it, and is as good as that one's place in time
            own = self._view.stamped()
            if not count and len(good):
                last_s = float(times_s[good[0]]) - (good[0] + 1) * step_s
            for i in np.flatnonzero(bad):
                if not step_s or i >= len(own) or own[i] or not (count or len(good)):
                    self.unusable.setdefault(number, []).append(count + int(i))
                times_s[i] = (times_s[i - 1] if i else last_s) + step_s
        self._seen[number] = (count + len(times_s), float(times_s[-1]) if len(times_s) else last_s)
        return values, times_s, header

    def note(self, row: dict[str, Any]) -> str:
        """What was left out of a stream, in words."""
        numbers = self.unusable.get(int(row["info"]["stream_id"]), [])
        if not numbers:
            return ""
        some = ", ".join(str(n + 1) for n in numbers[:3]) + (", ..." if len(numbers) > 3 else "")
        which = f"sample {some} was" if len(numbers) == 1 else f"{len(numbers)} samples ({some}) were"
        name, stream = str(row["info"]["name"][0] or ""), row["info"]["stream_id"]
        return f"{which} left out of the stream {name!r} (number {stream}), because the stamp is no time"


class _ErrorLog(logging.Handler):
    """Collects what pyxdf logs about a damaged file, of which it returns what it can read."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().strip())


def _stream(row: dict[str, Any], times: _Times) -> XdfStream:
    info = row["info"]
    times_s = np.asarray(row["time_stamps"], np.float64)
    values = row["time_series"]
    segments = [(int(a), int(b)) for a, b in info.get("segments") or []]
    usable = np.abs(times_s) <= _MAX_S
    usable[[n for n in times.unusable.get(int(info["stream_id"]), ()) if n < len(usable)]] = False
    if not usable.all():
        kept = np.flatnonzero(usable)
        times_s, values = times_s[kept], _chosen(values, kept)
        bounds = [(np.searchsorted(kept, a), np.searchsorted(kept, b, "right") - 1) for a, b in segments]
        segments = [(int(a), int(b)) for a, b in bounds if a <= b]
    if (np.diff(times_s) < 0).any():  # a clock was set back
        order = np.argsort(times_s, kind="stable")
        times_s, values = times_s[order], _chosen(values, order)
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


def _chosen(values: Any, rows: npt.NDArray[np.intp]) -> Any:
    return [values[i] for i in rows] if isinstance(values, list) else values[rows]
