"""Predictor: the product as an object in your program, without processes, sockets or files.

The same encoders, aligner and engine as in a live session; what is pushed takes the place of the devices.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.resampler import SoundInput
from stream_mmrnn.core import config
from stream_mmrnn.core.durations import spoken
from stream_mmrnn.core.errors import SessionError, SnapshotError, UsageError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.sound import mono
from stream_mmrnn.core.stream_table import for_model
from stream_mmrnn.core.types import Prediction, Tick
from stream_mmrnn.graph.runtime import Provider
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.snapshots import NEVER, Snapshot, from_bytes, to_bytes
from stream_mmrnn.serve.session_input import SessionInput, bytes_of

_SESSION = "predictor"
_S = 1_000_000_000
_MAX_GAP_NS = 3600 * _S
_PAUSE_NS = _S
"""By the clock, sound that comes so long after the end of the sound before it does not follow it."""
_BEHIND_NS, _WINDOW_NS = 100_000_000, 300_000_000
"""Nor does sound that stays so far behind the clock for a window: a program that stood still catches up sooner."""
_JPEG_QUALITY = 90


class _CallTimes:
    """Tells, by the times of the calls that give sound, whether it follows the sound before it."""

    def __init__(self) -> None:
        self._least_ns, self._heard_ns = _MAX_GAP_NS, 0

    def end_ns(self, called_ns: int, follows_ns: int, length_ns: int) -> int | None:
        """When the sound of this call ends, if there was a pause before it; `follows_ns`: when it would end otherwise.

        Calls tremble and samples do not, so their time counts after a pause alone. One that is shorter than `_PAUSE_NS`
        cannot be told at once from a program that stood still and gives what it kept.
        """
        behind_ns = called_ns - follows_ns
        self._least_ns, self._heard_ns = min(self._least_ns, behind_ns), self._heard_ns + length_ns
        stays = self._heard_ns >= _WINDOW_NS and self._least_ns > _BEHIND_NS
        paused = behind_ns > _PAUSE_NS or stays
        if paused or self._heard_ns >= _WINDOW_NS:
            self._least_ns, self._heard_ns = _MAX_GAP_NS, 0
        return called_ns if paused else None


class Predictor:
    """One session: push what was seen, heard, said or measured; get the predictions of the ticks that are complete.

    Times are seconds of the session, from 0. They come from the caller (`at_s`), or with `clock` from the clock. A tick
    is complete when every dense input has reached its end; text never holds a tick back. Not for several threads.
    """

    def __init__(
        self,
        model: str | Path = "turn_taking",
        *,
        inputs: Collection[str] | None = None,
        settings: Settings | None = None,
        provider: Provider = "cpu",
        clock: Callable[[], float] | None = None,
        zero_ns: int | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: the name of an included model, or the path of an ONNX file.
            inputs: the streams that will be pushed. Unless given, a stream counts from its first push on; give them
                where they do not begin together.
            settings: streams (`[streams.NAME]`), lateness and queues as in a live session.
            provider: `cpu`, `cuda` or `auto`.
            clock: seconds that never go back, such as `time.monotonic`. With it, pushes without `at_s` have the time of
                the call, and a tick waits for a late input no longer than in a live session.
            zero_ns: where 0 s lies on the grid of ticks, in nanoseconds; the `event_ns` of a recording's first session
                message gives the ticks of that recording.

        Raises:
            UsageError: there is no such model or stream, or an input feeds nothing in the model.

        """
        self._engine = StepEngine(config.find_model(str(model)), 1, provider)
        self.spec = self._engine.spec
        self._settings = for_model(settings or Settings(), self.spec.modalities, pushed=True)
        self._clock = clock
        self._input = SessionInput(
            self.spec,
            self._settings,
            _SESSION,
            inputs=inputs,
            clock_ns=None if clock is None else lambda: self._at_ns(None),
            zero_ns=zero_ns,
        )
        self.warnings: list[str] = []
        """Of the last `file`: sentences about damage, an early end, or sound that is no sound."""
        self.ended_early = False
        """Whether the last `file` was cut off."""
        self._begin()

    def _begin(self) -> None:
        self._sound: dict[str, SoundInput] = {}
        self._calls: dict[str, _CallTimes] = {}
        self._started_s = self._clock() if self._clock is not None else 0.0
        self._engine.open(_SESSION)

    def reset(self) -> None:
        """Begin anew at 0 s, as if nothing had been pushed."""
        self._engine.close(_SESSION)
        self._input.reset()
        self._begin()

    # ---- pushes --------------------------------------------------------------------------------------------------

    def push_audio(
        self, pcm: npt.NDArray[Any], at_s: float | None = None, *, rate_hz: int = 16_000, stream: str = "audio"
    ) -> list[Prediction]:
        """Sound of any length: int16, or float in -1 to 1, of shape [samples] or [samples, channels].

        `at_s`: when its last sample was taken; unless given, it follows the sound before it, and the first begins at
        0 s. With a clock, the first and what comes after a pause end now; after a pause of less than a second, that is
        seen after 0.3 s. Another rate than 16 kHz, and several channels, are converted.

        Raises:
            UsageError: not sound, or nothing in the model hears this stream.

        """
        row = self._input.stream(stream, "audio")
        pieces = self._sound.setdefault(stream, SoundInput(self._input.zero_ns))
        samples = mono(pcm)
        end_ns = None if at_s is None and self._clock is None else self._at_ns(at_s)
        if at_s is None and end_ns is not None and pieces.begun:
            length_ns = round(len(samples) / rate_hz * 1e9)
            calls = self._calls.setdefault(stream, _CallTimes())
            end_ns = calls.end_ns(end_ns, pieces.end_ns + length_ns, length_ns)
        sound = pieces.feed(samples, rate_hz, end_ns)
        return self._step(self._input.push(row, sound, pieces.end_ns)) if len(sound) else []

    def push_frame(
        self, frame: bytes | npt.NDArray[np.uint8], at_s: float | None = None, *, stream: str = "vision"
    ) -> list[Prediction]:
        """A picture: JPEG bytes, or uint8 of shape [height, width, 3] in the order blue, green, red (as of OpenCV).

        Raises:
            UsageError: no picture, or nothing in the model sees this stream.

        """
        row = self._input.stream(stream, "vision")
        data = bytes(frame) if isinstance(frame, bytes | bytearray | memoryview) else _jpeg(frame)
        return self._step(self._input.push(row, data, self._at_ns(at_s)))

    def push_text(self, text: str, at_s: float | None = None, *, stream: str = "text") -> list[Prediction]:
        """A word or a line, at the time when it was said.

        Raises:
            UsageError: nothing in the model reads this stream.

        """
        row = self._input.stream(stream, "text")
        return self._step(self._input.push(row, text.encode(), self._at_ns(at_s)))

    def push(self, name: str, vector: npt.ArrayLike, at_s: float | None = None) -> list[Prediction]:
        """Numbers: a sample of the signal `name`, or a feature vector of the stream `name` as its encoder makes them.

        Raises:
            UsageError: the model takes no such stream, or vectors of another length.

        """
        return self._step(self._input.push_vector(name, vector, self._at_ns(at_s)))

    def advance(self, to_s: float | None = None) -> list[Prediction]:
        """Say that the time is `to_s` (with a clock: now) and that nothing older comes: ticks up to there are closed.

        With a clock they wait as long for late inputs as in a live session, and the time of the clock is the only one.
        """
        return self._step(self._input.advance(self._at_ns(to_s)))

    # ---- state ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """The whole state: another Predictor of the same model continues from it with the same bits.

        Raises:
            SnapshotError: sound of another rate than 16 kHz is under way (push 16 kHz, or take the snapshot at a
                `reset`), or an encoder of a plug-in cannot save its state.

        """
        resampling = [name for name, pieces in self._sound.items() if pieces.resampling]
        if resampling:
            raise SnapshotError(
                f"the sound of {', '.join(resampling)} is being resampled, and the resampler's state cannot be "
                "saved; push sound at 16 kHz"
            )
        ends_ns = {name: pieces.end_ns for name, pieces in self._sound.items()}
        extra = {**self._input.snapshot(), "sound": msgspec.msgpack.encode(ends_ns)}
        return to_bytes(Snapshot(_SESSION, self.spec.sha256, NEVER, self._engine.snapshot(_SESSION), extra))

    def restore(self, snapshot: bytes) -> None:
        """Continue from a snapshot; the present state is dropped. A clock goes on from the snapshot's time.

        Raises:
            SnapshotError: it is damaged, or of another model or other streams; the present state is kept.

        """
        read = from_bytes(snapshot)
        if read.model_sha256 != self.spec.sha256:
            raise SnapshotError(f"the snapshot is of another model than {self.spec.name}; load that one")
        try:
            ends_ns = msgspec.msgpack.decode(bytes_of(read.extra, "sound"), type=dict[str, int])
        except msgspec.MsgspecError as e:
            raise SnapshotError(f"the snapshot is damaged: {e}; take another one") from e
        before = self._input.snapshot()
        self._input.restore(read.extra)
        try:
            self._engine.restore(_SESSION, read.state)
        except SessionError as e:
            self._input.restore(before)
            raise SnapshotError(f"the snapshot does not fit this predictor: {e}") from e
        self._sound = {}
        for name, end_ns in ends_ns.items():
            self._sound[name] = SoundInput(end_ns)
            self._sound[name].begun = True
        if self._clock is not None:
            self._started_s = self._clock() - self.at_s(self._input.newest_ns)

    # ---- files ---------------------------------------------------------------------------------------------------

    def file(self, path: str | Path, progress: Callable[[float], None] = lambda _: None) -> Iterator[Prediction]:
        """The predictions of a media file, from its beginning to its end, as fast as they can be computed.

        What was pushed before is forgotten. `progress` is called with the seconds that are done. Afterwards `warnings`
        has what a person should know of the file, and `ended_early` says whether it was cut off.

        Raises:
            FileError: it is missing, or holds no picture and no sound.

        """
        from stream_mmrnn.capture.sources import ENDS_EARLY, WARNINGS, create_source
        from stream_mmrnn.capture.sources.file import streams_of

        self.reset()
        has = streams_of(Path(path))
        rows = [row for row in self._input.streams.values() if row.name in has]
        if not rows:
            takes = ", ".join(self._input.streams)
            raise UsageError(f"{path} has {', '.join(sorted(has))}, and the model {self.spec.name} takes {takes}")
        self._input.expect([row.name for row in rows])
        with_source = [msgspec.structs.replace(row, source=f"file:{path}") for row in rows]
        sources = [create_source(row, self._settings, paced=False) for row in with_source]
        try:
            for source in sources:
                source.open()
            pieces = [
                zip(itertools.repeat(i), s.samples(lambda: True, self._input.zero_ns)) for i, s in enumerate(sources)
            ]
            for i, sample in heapq.merge(*pieces, key=lambda piece: (piece[1].event_ns, piece[0])):
                yield from self._step(self._input.push(rows[i], sample.data, sample.event_ns))
                progress(self.at_s(sample.event_ns))
            yield from self.advance(self.at_s(self._input.newest_ns))
        finally:
            for source in sources:
                source.close()
            self.warnings = list(dict.fromkeys(text for s in sources for text in s.info.get(WARNINGS, ())))
            self.ended_early = any(s.info.get(ENDS_EARLY, False) for s in sources)

    def at_s(self, at: Prediction | int) -> float:
        """Session time in seconds of a prediction (the end of its tick), or of an `event_ns`."""
        event_ns = at if isinstance(at, int) else at.tick.event_ns
        return (event_ns - self._input.zero_ns) / _S

    @property
    def counts(self) -> dict[str, Any]:
        """By modality, what became of the feature vectors: `StreamCounts`."""
        return self._input.counts

    # ---- inside --------------------------------------------------------------------------------------------------

    def _step(self, ticks: Iterator[Tick]) -> list[Prediction]:
        return [prediction for tick in ticks for prediction in self._engine.step([tick])]

    def _at_ns(self, at_s: float | None) -> int:
        if at_s is None:
            if self._clock is None:
                return self._input.newest_ns
            at_s = self._clock() - self._started_s
        if not 0 <= at_s < 2**32:
            raise UsageError(f"at_s is {at_s!r}: expected seconds since the session's start, 0 or more")
        at_ns = self._input.zero_ns + round(at_s * 1e9)
        if at_ns - self._input.newest_ns > (most_ns := max(_MAX_GAP_NS, self._input.at_once_ns)):
            raise UsageError(
                f"at_s is {at_s:g}, more than {spoken(most_ns / 1e9)} after what was pushed before; call reset(), or "
                "advance() in steps"
            )
        return at_ns


def _jpeg(frame: npt.NDArray[np.uint8]) -> bytes:
    import cv2

    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise UsageError(
            f"a picture is JPEG bytes, or uint8 of shape [height, width, 3]; this is {frame.dtype} {list(frame.shape)}"
        )
    done, jpeg = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not done:
        raise UsageError(f"a picture of shape {list(frame.shape)} cannot be encoded as JPEG")
    return bytes(jpeg.tobytes())
