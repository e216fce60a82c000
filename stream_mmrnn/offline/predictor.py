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
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from stream_mmrnn.capture.encoders import Encoder, encoders_of
from stream_mmrnn.capture.resampler import Resampler
from stream_mmrnn.core import config, topics
from stream_mmrnn.core.durations import spoken
from stream_mmrnn.core.errors import SessionError, SnapshotError, UsageError, WireError
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.streams import Stream, feeding
from stream_mmrnn.core.types import Envelope, Payload, Prediction, Sample
from stream_mmrnn.graph.runtime import Provider
from stream_mmrnn.predict.align import Aligner, AlignerState
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.snapshots import NEVER, Snapshot, from_bytes, to_bytes

_SESSION = "predictor"
_S = 1_000_000_000
_AT_ONCE_NS, _AT_ONCE_TICKS = 300 * _S, 7500
"""The aligner takes longer jumps of its clock for an error, and a longer silence makes thousands of ticks at once."""
_MAX_GAP_NS = 3600 * _S
_WAITS_NS = 2**60
"""Lateness of a dense stream when the caller gives the time: its ticks wait until it has come, or for `advance`."""
_ZERO_TICKS = 1000
_AUDIO_NS = _S // topics.AUDIO_RATE_HZ
_JPEG_QUALITY = 90


class _State(msgspec.Struct, frozen=True):
    """What a snapshot holds beside the engine's tensors."""

    aligner: AlignerState
    inputs: list[str]
    seq: dict[str, int]
    newest_ns: int
    zero_ns: int
    sound_ns: dict[str, int]


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
        settings: config.Settings | None = None,
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
        self._settings = settings or config.Settings()
        self._engine = StepEngine(config.find_model(str(model)), 1, provider)
        spec = self.spec = self._engine.spec
        self._clock = clock
        self._at_once_ns = max(_AT_ONCE_NS, _AT_ONCE_TICKS * spec.tick_ns)
        self._zero_ns = spec.tick_ns * _ZERO_TICKS if zero_ns is None else zero_ns
        self._aligner = self._make_aligner()
        self._streams: dict[str, Stream] = {row.name: row for _, row in self._aligner.feeding.values()}
        self._features = {name: modality for modality, (name, _) in self._aligner.feeding.items()}
        for name in inputs or ():
            self._stream(name)
        self._given = None if inputs is None else sorted(inputs)
        self._encoders: dict[str, dict[str, Encoder]] = {}
        self._begin()

    def _make_aligner(self) -> Aligner:
        spec, table = self.spec, stream_table(self._settings)
        lateness_ns = {}
        for m in spec.modalities:
            row = feeding(m.name, m.encoder, table)[1]
            lateness_ns[m.name] = row.lateness_ns if self._clock is not None else _WAITS_NS if row.dense else 0
        # the caller's times are taken as they are, however far ahead or behind
        return Aligner(spec.modalities, spec.tick_ns, lateness_ns, _WAITS_NS, _WAITS_NS, table)

    def _begin(self) -> None:
        self._inputs: list[str] = list(self._given or ())
        self._seq: dict[str, int] = {}
        self._newest_ns = self._zero_ns
        self._sound_ns: dict[str, int] = {}
        """By stream, where its sound ends."""
        self._resamplers: dict[str, Resampler] = {}
        self._started_s = self._clock() if self._clock is not None else 0.0
        self._engine.open(_SESSION)
        self._aligner.open(_SESSION, self._zero_ns, self._inputs)

    def reset(self) -> None:
        """Begin anew at 0 s, as if nothing had been pushed."""
        self._engine.close(_SESSION)
        self._aligner = self._make_aligner()
        for made in self._encoders.values():
            for encoder in made.values():
                encoder.reset()
        self._begin()

    # ---- pushes --------------------------------------------------------------------------------------------------

    def push_audio(
        self, pcm: npt.NDArray[Any], at_s: float | None = None, *, rate_hz: int = 16_000, stream: str = "audio"
    ) -> list[Prediction]:
        """Sound of any length: int16, or float in -1 to 1, of shape [samples] or [samples, channels].

        `at_s`: when its last sample was taken; unless given, it follows the sound before it, and the first begins at
        0 s (with a clock: it ends now). Another rate than 16 kHz, and several channels, are converted.

        Raises:
            UsageError: not sound, or nothing in the model hears this stream.

        """
        row = self._stream(stream, "audio")
        sound = _mono(pcm)
        end_ns: int | None = None
        if at_s is not None or (self._clock is not None and stream not in self._sound_ns):
            end_ns = self._at_ns(at_s)
        if rate_hz != topics.AUDIO_RATE_HZ:
            resampler = self._resamplers.get(stream)
            if resampler is None or resampler.rate_hz != rate_hz:
                resampler = self._resamplers[stream] = Resampler(rate_hz)
            sound = resampler.feed(sound)
            if end_ns is not None:
                end_ns -= round(resampler.held_s * 1e9)
        if end_ns is None:
            end_ns = self._sound_ns.get(stream, self._zero_ns) + len(sound) * _AUDIO_NS
        self._sound_ns[stream] = end_ns
        return self._encode(row, sound, end_ns) if len(sound) else []

    def push_frame(
        self, frame: bytes | npt.NDArray[np.uint8], at_s: float | None = None, *, stream: str = "vision"
    ) -> list[Prediction]:
        """A picture: JPEG bytes, or uint8 of shape [height, width, 3] in the order blue, green, red (as of OpenCV).

        Raises:
            UsageError: no picture, or nothing in the model sees this stream.

        """
        row = self._stream(stream, "vision")
        data = bytes(frame) if isinstance(frame, bytes | bytearray | memoryview) else _jpeg(frame)
        return self._encode(row, data, self._at_ns(at_s))

    def push_text(self, text: str, at_s: float | None = None, *, stream: str = "text") -> list[Prediction]:
        """A word or a line, at the time when it was said.

        Raises:
            UsageError: nothing in the model reads this stream.

        """
        return self._encode(self._stream(stream, "text"), text.encode(), self._at_ns(at_s))

    def push(self, name: str, vector: npt.ArrayLike, at_s: float | None = None) -> list[Prediction]:
        """Numbers: a sample of the signal `name`, or a feature vector of the stream `name` as its encoder makes them.

        Raises:
            UsageError: the model takes no such stream, or vectors of another length.

        """
        row = self._stream(name)
        values = np.ascontiguousarray(vector, np.float32)
        at_ns = self._at_ns(at_s)
        if row.kind == "signal" and row.encoders:
            return self._encode(row, values, at_ns)
        spec = next(m for m in self.spec.modalities if m.name == self._features[name])
        origin = spec.encoder or name
        return self._send([(topics.FEATURE + name, Sample(at_ns, at_ns, values), origin)], row, at_ns)

    def advance(self, to_s: float | None = None) -> list[Prediction]:
        """Say that the time is `to_s` (with a clock: now) and that nothing older comes: ticks up to there are closed.

        With a clock they wait as long for late inputs as in a live session, and the time of the clock is the only one.
        """
        to_ns = self._at_ns(to_s)
        if self._clock is not None:
            return self._tick(to_ns)
        self._aligner.expect(_SESSION, ())
        made = self._tick(to_ns)
        self._aligner.expect(_SESSION, self._inputs)
        return made

    # ---- state ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """The whole state: another Predictor of the same model continues from it with the same bits.

        Raises:
            SnapshotError: sound of another rate than 16 kHz is under way (push 16 kHz, or take the snapshot at a
                `reset`), or an encoder of a plug-in cannot save its state.

        """
        if self._resamplers:
            raise SnapshotError(
                f"the sound of {', '.join(self._resamplers)} is being resampled, and the resampler's state cannot be "
                "saved; push sound at 16 kHz"
            )
        state = _State(
            self._aligner.snapshot(), self._inputs, self._seq, self._newest_ns, self._zero_ns, self._sound_ns
        )
        extra: dict[str, bytes | str] = {"predictor": msgspec.msgpack.encode(state)}
        for name, made in self._encoders.items():
            for features, encoder in made.items():
                extra[f"encoder {name} {features}"] = to_safetensors(_state_of(encoder))
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
            state = msgspec.msgpack.decode(_bytes(read, "predictor"), type=_State)
            encoders = {}
            for key in read.extra:
                if key.startswith("encoder "):
                    _, name, features = key.split(" ")
                    encoders[name, features] = from_safetensors(_bytes(read, key))
        except (msgspec.MsgspecError, SafetensorError, ValueError) as e:
            raise SnapshotError(f"the snapshot is damaged: {e}; take another one") from e
        if any(
            name not in self._streams or features not in self._encoders_of(self._streams[name])
            for name, features in encoders
        ):
            raise SnapshotError("the snapshot has streams or encoders that this predictor has not; use its settings")
        aligner = self._make_aligner()
        before = {encoder: _state_of(encoder) for made in self._encoders.values() for encoder in made.values()}
        try:
            aligner.restore(state.aligner)
            for made in self._encoders.values():
                for encoder in made.values():
                    encoder.reset()  # what the snapshot does not name had not been pushed
            for (name, features), tensors in encoders.items():
                self._encoders[name][features].restore(tensors)
            self._engine.restore(_SESSION, read.state)
        except (SnapshotError, SessionError) as e:
            for encoder, tensors in before.items():
                encoder.restore(tensors)
            raise SnapshotError(f"the snapshot does not fit this predictor: {e}") from e
        self._aligner = aligner
        self._inputs, self._seq, self._newest_ns = state.inputs, state.seq, state.newest_ns
        self._zero_ns, self._sound_ns, self._resamplers = state.zero_ns, state.sound_ns, {}
        if self._clock is not None:
            self._started_s = self._clock() - self.at_s(self._newest_ns)

    # ---- files ---------------------------------------------------------------------------------------------------

    def file(self, path: str | Path, progress: Callable[[float], None] = lambda _: None) -> Iterator[Prediction]:
        """The predictions of a media file, from its beginning to its end, as fast as they can be computed.

        What was pushed before is forgotten. `progress` is called with the seconds that are done.

        Raises:
            FileError: it is missing, or holds no picture and no sound.

        """
        from stream_mmrnn.capture.sources import create_source
        from stream_mmrnn.capture.sources.file import streams_of

        self.reset()
        has = streams_of(Path(path))
        rows = [row for row in self._streams.values() if row.name in has]
        if not rows:
            takes = ", ".join(self._streams)
            raise UsageError(f"{path} has {', '.join(sorted(has))}, and the model {self.spec.name} takes {takes}")
        self._inputs = [row.name for row in rows]
        self._aligner.expect(_SESSION, self._inputs)
        with_source = [msgspec.structs.replace(row, source=f"file:{path}") for row in rows]
        sources = [create_source(row, self._settings, paced=False) for row in with_source]
        try:
            for source in sources:
                source.open()
            pieces = [zip(itertools.repeat(i), s.samples(lambda: True, self._zero_ns)) for i, s in enumerate(sources)]
            for i, sample in heapq.merge(*pieces, key=lambda piece: (piece[1].event_ns, piece[0])):
                yield from self._encode(rows[i], sample.data, sample.event_ns)
                progress(self.at_s(sample.event_ns))
            yield from self.advance(self.at_s(self._newest_ns))
        finally:
            for source in sources:
                source.close()

    def at_s(self, at: Prediction | int) -> float:
        """Session time in seconds of a prediction (the end of its tick), or of an `event_ns`."""
        event_ns = at if isinstance(at, int) else at.tick.event_ns
        return (event_ns - self._zero_ns) / _S

    @property
    def counts(self) -> dict[str, Any]:
        """By modality, what became of the feature vectors: `StreamCounts`."""
        return dict(self._aligner.counts)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _stream(self, name: str, kind: str = "") -> Stream:
        row = self._streams.get(name.partition(".")[0])
        if row is None:
            takes = ", ".join(self._streams)
            raise UsageError(f"the model {self.spec.name} takes {takes}; nothing in it is fed by {name!r}")
        if kind and row.kind != kind:
            raise UsageError(f"the stream {name!r} is {row.kind}, not {kind}; push it as what it is")
        return row

    def _at_ns(self, at_s: float | None) -> int:
        if at_s is None:
            if self._clock is None:
                return self._newest_ns
            at_s = self._clock() - self._started_s
        if not 0 <= at_s < 2**32:
            raise UsageError(f"at_s is {at_s!r}: expected seconds since the session's start, 0 or more")
        at_ns = self._zero_ns + round(at_s * 1e9)
        if at_ns - self._newest_ns > (most_ns := max(_MAX_GAP_NS, self._at_once_ns)):
            raise UsageError(
                f"at_s is {at_s:g}, more than {spoken(most_ns / 1e9)} after what was pushed before; call reset(), or "
                "advance() in steps"
            )
        return at_ns

    def _encoders_of(self, row: Stream) -> dict[str, Encoder]:
        if row.name not in self._encoders:
            self._encoders[row.name] = encoders_of(row)
        return self._encoders[row.name]

    def _encode(self, row: Stream, data: Payload, at_ns: int) -> list[Prediction]:
        sample = Sample(at_ns, at_ns, data)
        vectors: list[tuple[str, Sample, str]] = []
        for features, encoder in self._encoders_of(row).items():
            if features in self._features:
                try:
                    vectors += [(topics.FEATURE + features, v, encoder.origin) for v in encoder.encode(sample)]
                except WireError as e:
                    raise UsageError(f"{row.name}: {e}") from e
        return self._send(vectors, row, at_ns)

    def _send(self, vectors: list[tuple[str, Sample, str]], row: Stream, at_ns: int) -> list[Prediction]:
        """Give feature vectors to the aligner, and step the ticks that are complete then."""
        if self._given is None and row.name not in self._inputs:
            self._inputs.append(row.name)
            self._aligner.expect(_SESSION, self._inputs)
        made: list[Prediction] = []
        for topic, sample, origin in vectors:
            seq = self._seq[topic] = self._seq.get(topic, -1) + 1
            counts = self._aligner.counts[self._features[topic.removeprefix(topics.FEATURE)]]
            refused = counts.quarantined
            at = (sample.event_ns, sample.event_ns, sample.event_ns)
            ticks = self._aligner.push(Envelope(topic, _SESSION, seq, *at, sample.data, origin))
            if counts.quarantined > refused:
                modality = self._features[topic.removeprefix(topics.FEATURE)]
                why = self._aligner.misfits.pop(modality, "it does not fit")
                raise UsageError(f"a vector of {row.name} was refused: {why}")
            for tick in ticks:
                made += self._engine.step([tick])
        return made + self._tick(at_ns if self._clock is None else self._at_ns(None))

    def _tick(self, to_ns: int) -> list[Prediction]:
        """Move the clock on, in steps that the aligner takes."""
        made: list[Prediction] = []
        while True:
            self._newest_ns = max(self._newest_ns, min(to_ns, self._newest_ns + self._at_once_ns))
            at = (self._newest_ns,) * 3
            seq = self._seq[topics.CLOCK] = self._seq.get(topics.CLOCK, -1) + 1
            for tick in self._aligner.push(Envelope(topics.CLOCK, topics.EVERYONE, seq, *at, b"")):
                made += self._engine.step([tick])
            if self._newest_ns >= to_ns:
                return made


def _state_of(encoder: Encoder) -> dict[str, npt.NDArray[Any]]:
    if not hasattr(encoder, "snapshot"):  # a plug-in's
        raise SnapshotError(f"the encoder {encoder.origin} has no `snapshot`; its state cannot be saved")
    return encoder.snapshot()


def _bytes(snapshot: Snapshot, key: str) -> bytes:
    value = snapshot.extra.get(key, b"")
    return value.encode() if isinstance(value, str) else value


def _mono(pcm: npt.NDArray[Any]) -> npt.NDArray[np.int16]:
    """Sound of shape [samples]: the mean of the channels."""
    sound = np.asarray(pcm)
    if sound.ndim not in (1, 2) or not 1 <= (sound.shape[1] if sound.ndim == 2 else 1) <= 64:
        raise UsageError(f"sound has shape [samples] or [samples, channels], this has {list(np.shape(pcm))}")
    if np.issubdtype(sound.dtype, np.floating) and np.isfinite(sound).all():
        sound = sound * 32767.0
    elif sound.dtype != np.int16:
        raise UsageError(f"sound is int16, or finite floats from -1 to 1; this is {sound.dtype}")
    if sound.ndim == 2:
        sound = sound[:, 0] if sound.shape[1] == 1 else sound.astype(np.float64).mean(1)
    return sound if sound.dtype == np.int16 else np.clip(np.rint(sound), -32768, 32767).astype(np.int16)


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
