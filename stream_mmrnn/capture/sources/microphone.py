"""A microphone through PortAudio: mono int16 blocks at 16 kHz, stamped by the device's own sample count.

PortAudio's thread only copies and stamps; everything else happens in the reading thread.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.resampler import BlockResampler
from stream_mmrnn.capture.sources import RATE_HZ
from stream_mmrnn.core.clock import DeviceClock, now_ns
from stream_mmrnn.core.errors import SourceError
from stream_mmrnn.core.settings import MicrophoneSettings
from stream_mmrnn.core.types import Sample

_POLL_S = 0.05
_LOST_NS = 2_000_000_000
_FIRST_NS = 5_000_000_000
"""Extra time for the first block, because some sound servers are slow to resume."""
_MAX_QUEUED_BLOCKS = 500
"""Blocks that are queued for a stalled reader; further ones are dropped and counted, and the clock is told."""

Int16Array = npt.NDArray[np.int16]


def portaudio() -> Any:
    """The module sounddevice; imported late, because its import fails if PortAudio is missing."""
    try:
        import sounddevice
    except OSError as e:
        raise SourceError(
            "a microphone needs PortAudio, and it is not installed: install libportaudio2 (Debian, Ubuntu: "
            "`apt-get install libportaudio2`)"
        ) from e
    return sounddevice


def _restarted_portaudio() -> Any:
    """PortAudio lists devices only when it starts: a restart finds those that were plugged in since."""
    sd = portaudio()
    with contextlib.suppress(sd.PortAudioError):  # it may not be running
        sd._terminate()
    try:
        sd._initialize()
    except sd.PortAudioError as e:
        raise SourceError(f"PortAudio does not start: {e}; check the system's sound server") from e
    return sd


def _inputs(sd: Any) -> list[dict[str, Any]]:
    return [d for d in sd.query_devices() if d["max_input_channels"] > 0]


def list_devices() -> list[tuple[str, str]]:
    """The microphones, as (source, description), for the `devices` verb.

    Do not call it while this process has a microphone open: the restart would end its stream.
    """
    sd = _restarted_portaudio()
    default = sd.default.device[0]
    result = []
    for device in _inputs(sd):
        note = ", default" if device["index"] == default else ""
        what = f"{device['max_input_channels']} channels, {device['default_samplerate']:g} Hz{note}"
        result.append((f"microphone:{device['name']}", what))
    return result


class _Block:
    __slots__ = ("data", "lost", "now_ns", "offset_s")

    def __init__(self, data: bytes, at_ns: int, offset_s: float, lost: bool) -> None:
        self.data, self.now_ns, self.offset_s, self.lost = data, at_ns, offset_s, lost


class Microphone:
    """Blocks of sound; `name` is a device's name or number, or "" for the system's default."""

    def __init__(self, name: str, settings: MicrophoneSettings, max_queued: int = _MAX_QUEUED_BLOCKS) -> None:
        self.origin = f"microphone:{name}" if name else "microphone"
        self.info: dict[str, Any] = {
            "asked": {"rate_hz": RATE_HZ, "channels": 1, "block_ms": settings.block_ms},
            "overflows": 0,
            "dropped": 0,
            "jumps": 0,
        }
        self._name = name
        self._settings, self._max_queued = settings, max_queued
        self._stream: Any = None
        self._queue: queue.SimpleQueue[_Block] = queue.SimpleQueue()

    def open(self) -> None:
        """Open the device at 16 kHz mono or, if it refuses that, at its own rate.

        Raises:
            SourceError: PortAudio or the device is missing, or it cannot be opened.

        """
        self.close()
        sd = _restarted_portaudio()
        device = self._find(sd)
        own_rate = round(device["default_samplerate"])
        tries = [(RATE_HZ, 1), (own_rate, 1), (own_rate, 2)]
        for rate, channels in tries:
            try:
                self._start(sd, device["index"], rate, channels)
                break
            except sd.PortAudioError as e:
                error = e
        else:
            reason = error.args[0] if error.args else error
            raise SourceError(
                f"{self.origin} cannot be opened: {reason}; is it in use, or its sound server down?"
            ) from error
        self._rate, self._channels = rate, channels
        self.info["got"] = {
            "device": device["name"],
            "rate_hz": rate,
            "channels": channels,
            "resampled": (rate, channels) != (RATE_HZ, 1),
            "latency_ms": round(self._stream.latency * 1000, 1),
        }

    def _find(self, sd: Any) -> Any:
        names = [d["name"] for d in _inputs(sd)]
        if not names:
            raise SourceError(f"{self.origin} is not there: this machine has no input device; connect a microphone")
        wanted: int | str | None = int(self._name) if self._name.isdigit() else (self._name or None)
        try:
            return sd.query_devices(wanted, "input")
        except (ValueError, sd.PortAudioError) as e:
            raise SourceError(f"{self.origin} is not there; the input devices are {', '.join(names)}") from e

    def _start(self, sd: Any, index: int, rate: int, channels: int) -> None:
        # a new queue for each stream: blocks of an earlier one must not be read as new
        waiting: queue.SimpleQueue[_Block] = queue.SimpleQueue()
        dropped = False

        def callback(data: Any, frames: int, time: Any, status: Any) -> None:
            nonlocal dropped
            at_ns = now_ns()
            if waiting.qsize() >= self._max_queued:
                dropped = True
                self.info["dropped"] += 1
                return
            # times of PortAudio's own clock, which may not be ours: only their difference can be used
            offset_s = time.inputBufferAdcTime - time.currentTime
            waiting.put(_Block(bytes(data), at_ns, offset_s, bool(status.input_overflow) or dropped))
            dropped = False

        stream = sd.RawInputStream(
            device=index,
            samplerate=rate,
            channels=channels,
            dtype="int16",
            blocksize=round(self._settings.block_ms * rate / 1000),
            latency=self._settings.latency_ms / 1000,
            callback=callback,
        )
        try:
            stream.start()
        except sd.PortAudioError:
            stream.close(ignore_errors=True)
            raise
        self._stream, self._queue = stream, waiting

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        """Blocks as they come.

        Raises:
            SourceError: the device is lost: it gave nothing for two seconds, or PortAudio ended the stream.

        """
        stream, waiting = self._stream, self._queue
        if stream is None:
            raise SourceError(f"{self.origin} is not open: call open() before samples()")
        clock = DeviceClock(self._rate, bandwidth_hz=self._settings.drift_bandwidth_hz)
        resampler: BlockResampler | None = None
        if self.info["got"]["resampled"]:
            resampler = BlockResampler(self._rate, self._channels, round(self._settings.block_ms * RATE_HZ / 1000))
        last_ns = now_ns() + _FIRST_NS - _LOST_NS
        while alive():
            try:
                block = waiting.get(timeout=_POLL_S)
            except queue.Empty:
                if now_ns() - last_ns > _LOST_NS or not stream.active:
                    raise SourceError(f"{self.origin} is lost: it gives no more sound; check its connection") from None
                continue
            last_ns = block.now_ns
            data = np.frombuffer(block.data, np.int16)
            frames = len(data) // self._channels
            if block.lost:
                self.info["overflows"] += 1
                clock.lost()
            device_ns = block.now_ns + self._end_after_callback_ns(block.offset_s, frames)
            smooth_ns = clock.stamp(frames, device_ns)
            event_ns = min(smooth_ns, block.now_ns)  # the smoothed time must not be later than the block's arrival
            self.info["jumps"] = clock.jumps
            if resampler is None:
                yield Sample(event_ns, block.now_ns, data, device_ns)
            else:
                for sound, end_ns in resampler.feed(data, event_ns):
                    yield Sample(end_ns, block.now_ns, sound, device_ns)

    def _end_after_callback_ns(self, offset_s: float, frames: int) -> int:
        """When the block ended, relative to the callback: the (negative) time of its first sample plus its length."""
        length_s: float = frames / self._rate
        # some drivers give no time or a wrong one: then assume that the block ended just now
        if not -3.0 < offset_s < 0.0:
            return 0
        return min(0, round((offset_s + length_s) * 1e9))

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.abort(ignore_errors=True)
            stream.close(ignore_errors=True)
