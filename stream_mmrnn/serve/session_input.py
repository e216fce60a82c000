"""SessionInput: the samples of one session -> its ticks, by the encoders and the aligner of a live session.

What a program pushes takes the place of the devices. Time comes with the samples, or from a clock that is passed in.
Knows nothing about engines, sockets or files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from stream_mmrnn.capture.derive import chain_of, encoders_from_root, root_of
from stream_mmrnn.capture.encoders import Encoder
from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import SnapshotError, UsageError, WireError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.streams import DERIVATIONS, Stream, feeding
from stream_mmrnn.core.types import Envelope, ModelSpec, Payload, Sample, Tick
from stream_mmrnn.predict.align import Aligner, AlignerState

Extra = Mapping[str, bytes | str]
"""What a snapshot holds beside an engine's tensors."""

_S = 1_000_000_000
_AT_ONCE_NS, _AT_ONCE_TICKS = 300 * _S, 7500
"""The aligner takes longer jumps of its clock for an error, and a longer silence makes thousands of ticks at once."""
_WAITS_NS = 2**60
"""Lateness of a dense stream when the caller gives the time: its ticks wait until it has come, or for `advance`."""
_ZERO_TICKS = 1000
_PIECE = 320
"""Samples of a block of sound in a live session: 20 ms."""


class _State(msgspec.Struct, frozen=True):
    aligner: AlignerState
    inputs: list[str]
    seq: dict[str, int]
    newest_ns: int
    zero_ns: int


class _Vector(msgspec.Struct, frozen=True, gc=False):
    topic: str
    sample: Sample
    origin: str


class SessionInput:
    """Push samples, get the ticks that are complete. A tick is complete when every dense input has reached its end;
    text never holds a tick back. With a clock it waits for a late input no longer than in a live session.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: Settings,
        session: str,
        *,
        inputs: Collection[str] | None = None,
        clock_ns: Callable[[], int] | None = None,
        zero_ns: int | None = None,
        must_save: bool = False,
    ) -> None:
        """`settings`: with what the model asks for (`for_model`). `inputs`: the streams that will be pushed; unless
        given, a stream counts from its first push on. `clock_ns`: the present, on the session's time line. `zero_ns`:
        where the session begins on it and on the grid of ticks. `must_save`: of a server, where streams are refused
        whose state cannot be saved or that take long to derive.

        Raises:
            UsageError: there is no such stream, or an input feeds nothing in the model.
            ConfigError: those of `stream_table`.

        """
        self.spec, self._session, self._clock_ns, self._must_save = spec, session, clock_ns, must_save
        self._settings, self._table = settings, stream_table(settings)
        self.zero_ns = spec.tick_ns * _ZERO_TICKS if zero_ns is None else zero_ns
        """When the session begins."""
        self.at_once_ns = max(_AT_ONCE_NS, _AT_ONCE_TICKS * spec.tick_ns)
        """How far the aligner's clock moves at once."""
        self._aligner = self._make_aligner()
        fed = [row for _, row in self._aligner.feeding.values()]
        self.streams = {row.name: row for of in fed for row in (of, root_of(of, self._table))}
        """Those that can be pushed, by name."""
        self._derived: dict[str, list[Stream]] = {}
        """By the stream that is pushed, those that are made of it."""
        for row in {of.name: of for of in fed if of.parent}.values():
            self._derived.setdefault(root_of(row, self._table).name, []).append(row)
        self._features = {name: modality for modality, (name, _) in self._aligner.feeding.items()}
        for name in inputs or ():
            self.stream(name)
        self._given = None if inputs is None else sorted(inputs)
        self._encoders: dict[str, dict[str, Encoder]] = {}
        self._begin()

    def _make_aligner(self) -> Aligner:
        spec, table = self.spec, self._table
        lateness_ns = {}
        for m in spec.modalities:
            row = feeding(m.name, m.encoder, table)[1]
            lateness_ns[m.name] = row.lateness_ns if self._clock_ns is not None else _WAITS_NS if row.dense else 0
        # the caller's times are taken as they are, however far ahead or behind
        return Aligner(spec.modalities, spec.tick_ns, lateness_ns, _WAITS_NS, _WAITS_NS, table)

    def _begin(self) -> None:
        self._inputs: list[str] = list(self._given or ())
        self._seq: dict[str, int] = {}
        self.newest_ns = self.zero_ns
        """How far the session's time is."""
        self._aligner.open(self._session, self.zero_ns, self._inputs)

    def reset(self) -> None:
        """Begin anew, as if nothing had been pushed."""
        self._aligner = self._make_aligner()
        self._reset_encoders()
        self._begin()

    def _reset_encoders(self) -> None:
        for made in self._encoders.values():
            for encoder in made.values():
                encoder.reset()

    @property
    def counts(self) -> dict[str, Any]:
        """By modality, what became of the feature vectors: `StreamCounts`."""
        return dict(self._aligner.counts)

    # ---- pushes --------------------------------------------------------------------------------------------------

    def stream(self, name: str, kind: str = "") -> Stream:
        """A stream that can be pushed. Raises UsageError where nothing takes it, or it is of another kind."""
        row = self.streams.get(name.partition(".")[0])
        if row is None:
            takes = ", ".join(self.streams)
            raise UsageError(f"the model {self.spec.name} takes {takes}; nothing in it is fed by {name!r}")
        if kind and row.kind != kind:
            raise UsageError(f"the stream {name!r} is {row.kind}, not {kind}; push it as what it is")
        return row

    def expect(self, names: Collection[str]) -> None:
        """These streams are the inputs from now on."""
        self._inputs = [of.name for name in names for of in (self.streams[name], *self._derived.get(name, ()))]
        self._aligner.expect(self._session, self._inputs)

    def push(self, row: Stream, data: Payload, at_ns: int) -> Iterator[Tick]:
        """One sample of a stream, for its encoders. The caller must take all ticks.

        Raises:
            UsageError: it cannot be decoded, or does not fit the model; ticks that were complete come before.

        """
        derived = self._derived.get(row.name, ())
        for piece in _pieces(row, Sample(at_ns, at_ns, data)) if derived else (Sample(at_ns, at_ns, data),):
            # what was derived belongs to ticks that the sample itself may complete
            vectors = [v for of in (*derived, row) for v in self._encode(of, piece)]
            yield from self._send(vectors, row, piece.event_ns)

    def push_vector(self, name: str, values: npt.ArrayLike, at_ns: int) -> Iterator[Tick]:
        """Numbers, float32 [size]: a sample of the signal `name`, or a feature vector of that stream.

        Raises:
            UsageError: the model takes no such stream, or vectors of another length.

        """
        row = self.stream(name)
        if row.kind != "signal" and name not in self._features:
            takes = ", ".join(self._features)
            raise UsageError(f"the model {self.spec.name} takes no vectors {name!r}; it takes {takes}")
        vector = np.ascontiguousarray(values, np.float32)
        if row.kind == "signal" and (row.encoders or name not in self._features):
            yield from self.push(row, vector, at_ns)
            return
        spec = next(m for m in self.spec.modalities if m.name == self._features[name])
        sample = Sample(at_ns, at_ns, vector)
        vectors = [_Vector(topics.FEATURE + name, sample, spec.encoder or name)]
        # of other kinds a vector is no sample: nothing can be derived of it
        for derived in self._derived.get(name, ()) if row.kind == "signal" else ():
            vectors += self._encode(derived, sample)
        yield from self._send(vectors, row, at_ns)

    def advance(self, to_ns: int) -> Iterator[Tick]:
        """The time is `to_ns`, and nothing older comes: the ticks up to there are complete. With a clock, those that
        have waited for as long as in a live session.
        """
        if self._clock_ns is not None:
            yield from self._tick(to_ns)
            return
        self._aligner.expect(self._session, ())
        yield from self._tick(to_ns)
        self._aligner.expect(self._session, self._inputs)

    def _encoders_of(self, row: Stream) -> dict[str, Encoder]:
        if row.name not in self._encoders:
            made = encoders_from_root(row, self._table, self._settings)
            if self._must_save:
                for slow in {of.derivation for of in chain_of(row, self._table)} & DERIVATIONS.keys():
                    raise UsageError(
                        f"{row.name} cannot be served: {slow} would hold up other sessions; derive it in the client, "
                        "and push what it gives"
                    )
                try:
                    for encoder in made.values():
                        _state_of(encoder)
                except SnapshotError as e:
                    raise UsageError(f"{row.name} cannot be served: {e}") from e
            self._encoders[row.name] = made
        return self._encoders[row.name]

    def _encode(self, row: Stream, sample: Sample) -> list[_Vector]:
        """What the model takes of a stream; `sample` is of the stream that is pushed."""
        if not self._features.keys() & set(row.features()):
            return []
        vectors: list[_Vector] = []
        for features, encoder in self._encoders_of(row).items():
            if features in self._features:
                try:
                    vectors += [_Vector(topics.FEATURE + features, v, encoder.origin) for v in encoder.encode(sample)]
                except WireError as e:
                    raise UsageError(f"{row.name}: {e}") from e
        return vectors

    def _send(self, vectors: list[_Vector], row: Stream, at_ns: int) -> Iterator[Tick]:
        """Give feature vectors to the aligner, then move its clock on."""
        if self._given is None:
            new = [of.name for of in (row, *self._derived.get(row.name, ())) if of.name not in self._inputs]
            if new:
                self._inputs += new
                self._aligner.expect(self._session, self._inputs)
        for v in vectors:
            seq = self._seq[v.topic] = self._seq.get(v.topic, -1) + 1
            modality = self._features[v.topic.removeprefix(topics.FEATURE)]
            refused = self._aligner.counts[modality].quarantined
            at = (v.sample.event_ns,) * 3
            ticks = self._aligner.push(Envelope(v.topic, self._session, seq, *at, v.sample.data, v.origin))
            if self._aligner.counts[modality].quarantined > refused:
                why = self._aligner.misfits.pop(modality, "it does not fit")
                raise UsageError(f"a vector of {row.name} was refused: {why}")
            yield from ticks
        yield from self._tick(at_ns if self._clock_ns is None else self._clock_ns())

    def _tick(self, to_ns: int) -> Iterator[Tick]:
        """Move the clock on, in steps that the aligner takes."""
        while True:
            self.newest_ns = max(self.newest_ns, min(to_ns, self.newest_ns + self.at_once_ns))
            at = (self.newest_ns,) * 3
            seq = self._seq[topics.CLOCK] = self._seq.get(topics.CLOCK, -1) + 1
            yield from self._aligner.push(Envelope(topics.CLOCK, topics.EVERYONE, seq, *at, b""))
            if self.newest_ns >= to_ns:
                return

    # ---- state ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, bytes | str]:
        """The whole state of encoders and aligner.

        Raises:
            SnapshotError: an encoder of a plug-in cannot save its state.

        """
        state = _State(self._aligner.snapshot(), self._inputs, self._seq, self.newest_ns, self.zero_ns)
        extra: dict[str, bytes | str] = {"input": msgspec.msgpack.encode(state)}
        for name, made in self._encoders.items():
            for features, encoder in made.items():
                extra[f"encoder {name} {features}"] = to_safetensors(_state_of(encoder))
        return extra

    def restore(self, extra: Extra) -> None:
        """Continue from a snapshot.

        Raises:
            SnapshotError: it is damaged, or of other streams; the present state is kept.

        """
        try:
            state = msgspec.msgpack.decode(bytes_of(extra, "input"), type=_State)
            encoders = {}
            for key in extra:
                if key.startswith("encoder "):
                    _, name, features = key.split(" ")
                    encoders[name, features] = from_safetensors(bytes_of(extra, key))
        except (msgspec.MsgspecError, SafetensorError, ValueError) as e:
            raise SnapshotError(f"the snapshot is damaged: {e}; take another one") from e
        if any(
            name not in self.streams or features not in self._encoders_of(self.streams[name])
            for name, features in encoders
        ):
            raise SnapshotError("the snapshot has streams or encoders that this session has not; use its settings")
        aligner = self._make_aligner()
        before = {encoder: _state_of(encoder) for made in self._encoders.values() for encoder in made.values()}
        try:
            aligner.restore(state.aligner)
            self._reset_encoders()  # what the snapshot does not name had not been pushed
            for (name, features), tensors in encoders.items():
                self._encoders[name][features].restore(tensors)
        except SnapshotError:
            for encoder, tensors in before.items():
                encoder.restore(tensors)
            raise
        self._aligner = aligner
        self._inputs, self._seq = state.inputs, state.seq
        self.newest_ns, self.zero_ns = state.newest_ns, state.zero_ns


def _pieces(row: Stream, sample: Sample) -> Iterator[Sample]:
    """A sound in pieces as short as those of a live session: what is derived of it is known as early as there."""
    sound = sample.data
    if row.kind != "audio" or isinstance(sound, bytes) or sound.ndim != 1:
        yield sample
        return
    for end in range(len(sound) % _PIECE or _PIECE, len(sound) + 1, _PIECE):
        at_ns = sample.event_ns - (len(sound) - end) * 1_000_000_000 // topics.AUDIO_RATE_HZ
        yield Sample(at_ns, at_ns, sound[max(end - _PIECE, 0) : end])


def _state_of(encoder: Encoder) -> dict[str, npt.NDArray[Any]]:
    if not hasattr(encoder, "snapshot"):  # a plug-in's
        raise SnapshotError(f"the encoder {encoder.origin} has no `snapshot`; its state cannot be saved")
    return encoder.snapshot()


def bytes_of(extra: Extra, key: str) -> bytes:
    """The value of a key as bytes; b"" where it is missing."""
    value = extra.get(key, b"")
    return value.encode() if isinstance(value, str) else value
