"""A stream of Lab Streaming Layer as a source: numbers for `signal`, strings for `text`, sound for `audio`.

Event times are the stream's own stamps converted to the local clock, by an offset that is measured while it runs; the
original stamp is kept in `device_ns`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture import lsl_runtime as lsl
from stream_mmrnn.core.clock import DeviceClock, now_ns
from stream_mmrnn.core.errors import SourceError, SourceSpecError
from stream_mmrnn.core.settings import LslSettings, MicrophoneSettings, TextSettings
from stream_mmrnn.core.streams import Kind
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import Sample

_KEYS = ("name", "type", "source_id", "hostname")
_RESOLVE_S = 0.4
"""How long `open` waits; the search itself continues between calls."""
_FORGET_S = 3.0
"""A stream that has not answered for this long is gone."""
_REPLY_S = 3.0
_PULL_S, _POLL_S = 0.05, 0.02
_BUFFER_S = 60
"""How much the library buffers for a slow reader."""
_VALUES_AT_ONCE = 65_536
_MAX_CHANNELS = 4096
_MIN_AUDIO_HZ = 4_000
_GAP_PERIODS, _JITTER_NS = 1.5, 100_000_000

Rows = npt.NDArray[Any]
"""[samples, channels]: numbers of the stream's own type, or bytes."""


def query(rest: str) -> tuple[str, str]:
    """`EEG-1` -> ("name", "EEG-1"); `type=EEG` -> ("type", "EEG"); raises SourceSpecError."""
    key, equals, value = rest.partition("=")
    if not equals:
        key, value = "name", rest
    if key not in _KEYS or not value:
        raise SourceSpecError(
            f"'lsl:{rest}' names no stream; use lsl:NAME, or lsl:KEY=VALUE with one of {', '.join(_KEYS)}"
        )
    return key, value


class LslSource:
    """An inlet of one stream. A stream that disappears raises SourceError, and the worker retries."""

    def __init__(
        self, rest: str, kind: Kind, settings: LslSettings, microphone: MicrophoneSettings, text: TextSettings
    ) -> None:
        self.origin = f"lsl:{rest}"
        self._key, self._value = query(rest)
        self._kind, self._settings = kind, settings
        self._block = round(microphone.block_ms * AUDIO_RATE_HZ / 1000)
        self._max_bytes = text.max_line_bytes
        self._pylsl: Any = None
        self._search: Any = None
        self._uid = ""
        self._lost = ("", 0)
        """The stream that was lost last, and until when the search may still find it."""
        self._inlet: Any = None
        self._offsets: lsl.Offsets | None = None
        self.info: dict[str, Any] = {"missing": 0, "too_long": 0, "garbage": 0}
        """`missing`: lost samples, counted by the stamps of a stream with a fixed rate."""

    def open(self) -> None:
        """Find the stream and connect to it.

        Raises:
            UsageError: pylsl is not installed.
            SourceError: there is no such stream (yet), or it is of another kind.

        """
        self.close()
        if self._pylsl is None:
            self._pylsl = lsl.load(self._settings)
            self._search = self._pylsl.ContinuousResolver(self._key, self._value, forget_after=_FORGET_S)
        pylsl = self._pylsl
        chosen = self._find()
        if chosen is None:
            where = "" if self._settings.config else " on this machine (lsl.config names a file for wider networks)"
            raise SourceError(f"{self.origin} is not there: no stream has that {self._key}{where}")
        self._check(chosen)
        inlet = pylsl.StreamInlet(chosen, _BUFFER_S, recover=False, as_numpy=True)
        offsets = lsl.Offsets(pylsl, inlet)
        try:
            full = inlet.info(_REPLY_S)
            offsets.probe(_REPLY_S)
            inlet.open_stream(_REPLY_S)
        except (TimeoutError, RuntimeError) as e:
            raise SourceError(f"{self.origin} was found but does not answer: {e}") from e
        self._inlet, self._offsets, self._uid = inlet, offsets, chosen.uid()
        self.info |= {
            "stream": {
                "name": full.name(),
                "type": full.type(),
                "source_id": full.source_id(),
                "hostname": full.hostname(),
                "channels": full.channel_count(),
                "labels": (full.get_channel_labels() or [])[:64],
                "rate_hz": full.nominal_srate(),
            },
            "clock": offsets.info,
        }

    def _find(self) -> Any:
        """The stream, or None if it is not found in time."""
        until_ns = now_ns() + round(_RESOLVE_S * 1e9)
        while True:
            lost = self._lost[0] if now_ns() < self._lost[1] else ""
            found = [s for s in self._search.results() if s.uid() != lost]
            if found or now_ns() > until_ns:
                return found[0] if found else None
            time.sleep(_POLL_S)

    def _check(self, stream: Any) -> None:
        is_text = stream.channel_format() == self._pylsl.cf_string
        channels, rate_hz = stream.channel_count(), stream.nominal_srate()
        if self._kind == "text":
            fits, wanted = is_text and channels == 1, "one channel of strings"
        elif self._kind == "audio":
            fits = not is_text and channels <= 2 and rate_hz >= _MIN_AUDIO_HZ
            wanted = f"one or two channels of numbers at a fixed rate of {_MIN_AUDIO_HZ} Hz or more"
        else:
            fits, wanted = not is_text and channels <= _MAX_CHANNELS, f"at most {_MAX_CHANNELS} channels of numbers"
        if not fits:
            raise SourceError(
                f"{self.origin} has {channels} channels of {'strings' if is_text else 'numbers'} at {rate_hz:g} Hz: "
                f"{self._kind} needs {wanted}"
            )

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        """Samples in the stream's order, from now on.

        Raises:
            SourceError: the stream has disappeared.

        """
        if self._inlet is None or self._offsets is None:
            raise SourceError(f"{self.origin} is not open: call open() before samples()")
        make = {"text": self._lines, "audio": self._sound}.get(self._kind, self._vectors)
        gaps = LostSamples(self.info["stream"]["rate_hz"])
        if self._kind == "audio":
            self._begin_sound()
        while alive():
            try:
                self._offsets.probe()
                rows, stamps_ns = self._pull(self._inlet)
            except (TimeoutError, RuntimeError) as e:
                self._lost = (self._uid, now_ns() + round(_FORGET_S * 1e9))
                raise SourceError(f"{self.origin} is lost: {str(e).rstrip('.')}; start its program again") from e
            if stamps_ns:
                self.info["missing"] += gaps.count(stamps_ns)
                yield from make(rows, stamps_ns, self._offsets, now_ns())

    def _pull(self, inlet: Any) -> tuple[Rows, list[int]]:
        """The samples that have arrived and their stamps by the stream's clock; empty after a timeout."""
        first, at_s = inlet.pull_sample(_PULL_S)
        if first is None:
            return np.empty((0, 0)), []
        rows, stamps_s = inlet.pull_chunk(0.0, max(_VALUES_AT_ONCE // len(first), 1))
        rows = np.concatenate([first[None], rows]) if len(stamps_s) else first[None]
        return rows, [round(s * 1e9) for s in (at_s, *stamps_s)]

    def _vectors(self, rows: Rows, stamps_ns: list[int], offsets: lsl.Offsets, at_ns: int) -> Iterator[Sample]:
        for values, remote_ns in zip(rows.astype(np.float32), stamps_ns, strict=True):
            yield Sample(min(offsets.stamp(remote_ns), at_ns), at_ns, values, remote_ns)

    def _lines(self, rows: Rows, stamps_ns: list[int], offsets: lsl.Offsets, at_ns: int) -> Iterator[Sample]:
        for (line,), remote_ns in zip(rows, stamps_ns, strict=True):
            if len(line) > self._max_bytes:
                self.info["too_long"] += 1
                continue
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError:
                self.info["garbage"] += 1
                continue
            if text:
                yield Sample(min(offsets.stamp(remote_ns), at_ns), at_ns, text.encode(), remote_ns)

    def _begin_sound(self) -> None:
        from stream_mmrnn.capture.resampler import BlockResampler

        stream = self.info["stream"]
        self._rate_hz = round(stream["rate_hz"])
        self._resampler = BlockResampler(self._rate_hz, stream["channels"], self._block)
        self._smooth = DeviceClock(self._rate_hz)

    def _sound(self, rows: Rows, stamps_ns: list[int], offsets: lsl.Offsets, at_ns: int) -> Iterator[Sample]:
        # LSL stamps the start of a sample, event time is its end
        device_ns = stamps_ns[-1] + round(1e9 / self._rate_hz)
        end_ns = min(self._smooth.stamp(len(rows), offsets.stamp(device_ns)), at_ns)
        for sound, event_ns in self._resampler.feed(int16_of(rows).reshape(-1), end_ns):
            yield Sample(event_ns, at_ns, sound, device_ns)

    def close(self) -> None:
        inlet, self._inlet, self._offsets = self._inlet, None, None
        if inlet is not None:
            inlet.close_stream()


class LostSamples:
    """Counts the lost samples of a stream with a fixed rate (0: none) by the gaps between stamps.

    Short gaps are ignored, because stamps jitter and samples come in chunks.
    """

    def __init__(self, rate_hz: float) -> None:
        self._period_ns = 1e9 / rate_hz if rate_hz else 0.0
        self._last_ns = 0

    def count(self, stamps_ns: list[int]) -> int:
        """The number of samples that are missing before and between these."""
        lost = 0
        for at_ns in stamps_ns if self._period_ns else ():
            gap_ns = at_ns - (self._last_ns or at_ns)
            if gap_ns > max(_GAP_PERIODS * self._period_ns, _JITTER_NS):
                lost += round(gap_ns / self._period_ns) - 1
            self._last_ns = at_ns
        return lost


def int16_of(data: npt.NDArray[Any]) -> npt.NDArray[np.int16]:
    """Sound as 16-bit numbers: floats range from -1 to 1, integers over the whole range of their type."""
    whole: npt.NDArray[Any]
    if np.issubdtype(data.dtype, np.floating):
        whole = np.clip(np.nan_to_num(data), -1.0, 1.0) * 32767
    else:
        bits, whole = 8 * data.dtype.itemsize, data.astype(np.int64)
        whole = whole >> (bits - 16) if bits > 16 else whole << (16 - bits)
    return whole.astype(np.int16)
