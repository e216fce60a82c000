"""PredictionReader: envelopes of a bus in, predictions with the meaning of their numbers out, each once. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import UsageError, WireError
from stream_mmrnn.core.latency import stages
from stream_mmrnn.core.prediction_decoder import PredictionDecoder
from stream_mmrnn.core.types import Envelope, FloatArray, HeadSpec

ENGINE = topics.STATUS + "engine"
"""The topic of the engine's status, which has the model's contract."""


class Model(msgspec.Struct, frozen=True):
    """The model that predicts, from the engine's status."""

    name: str
    sha256: str
    tick_ns: int
    heads: tuple[HeadSpec, ...]
    provider: str = ""


def model_of(spec: Any) -> Model:
    """The model in an engine's status; raises WireError if it is invalid."""
    try:
        return msgspec.convert(spec, Model)
    except msgspec.ValidationError as e:
        raise WireError(f"the engine's status names no model: {e}") from e


class PredictionView(msgspec.Struct, frozen=True, eq=False):
    """One prediction, as a reader receives it."""

    session: str
    tick: int
    event_ns: int
    """The tick's end, on the monotonic clock of the machine that predicts."""
    heads: dict[str, FloatArray]
    """Outputs by head, [size] float32; read-only. NaN for a value that is not finite."""
    present: dict[str, bool]
    """By modality: whether there was data in this tick."""
    age_ns: dict[str, int]
    """By modality: the tick's end minus the newest sample's event time; -1 without any sample yet."""
    stages_ns: dict[str, int]
    """Latency by stage, in order (`latency.STAGES`)."""
    missed: int
    """Ticks of the session between the previous prediction and this one: lost, or dropped by the policy."""
    model_sha256: str
    model: Model | None
    """None if the engine's status has not arrived yet."""

    @property
    def latency_ms(self) -> float:
        """Time from the tick's end until the prediction was sent."""
        return self.stages_ns["total"] / 1e6

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """One label per number, by head; without heads that have no labels."""
        return MappingProxyType({h.name: h.labels for h in self._specs() if h.labels})

    @property
    def horizons_s(self) -> Mapping[str, tuple[tuple[float, float], ...]]:
        """By head, the interval that each number predicts: (start, end) in seconds after the tick's end."""
        return MappingProxyType({h.name: h.horizons_s for h in self._specs() if h.horizons_s})

    @property
    def thresholds(self) -> Mapping[str, float]:
        """Decision thresholds of the binary heads: a number above it means yes."""
        return MappingProxyType(
            {h.name: h.threshold for h in self._specs() if h.kind == "classification" and h.size == 1}
        )

    def _specs(self) -> tuple[HeadSpec, ...]:
        return () if self.model is None else self.model.heads


def document(prediction: PredictionView) -> dict[str, Any]:
    """A prediction as a JSON document: `stream-mmrnn predictions` prints it, the page's WebSocket sends it."""
    return {
        "session": prediction.session,
        "tick": prediction.tick,
        "event_ns": prediction.event_ns,
        "latency_ms": round(prediction.latency_ms, 3),
        "missed": prediction.missed,
        "heads": {
            # JSON has no NaN: null, as on the wire
            name: [v if math.isfinite(v) else None for v in values.tolist()]
            for name, values in prediction.heads.items()
        },
        "present": prediction.present,
        "age_ms": {name: None if ns < 0 else round(ns / 1e6, 3) for name, ns in prediction.age_ns.items()},
        "model": prediction.model_sha256,
    }


class PredictionReader:
    """Envelopes in, predictions out: deduplicated, with the model and the number of missed ticks. Pure."""

    def __init__(
        self,
        session: str | None = None,
        heads: Collection[str] | None = None,
        decoder: PredictionDecoder | None = None,
    ) -> None:
        """`session`: only this session; `heads`: only these; `decoder`: shared with other consumers, if given."""
        self._session, self._heads = session, None if heads is None else frozenset(heads)
        self._decoder = decoder or PredictionDecoder()
        self._before: dict[str, int] = {}
        """The last tick returned, by session."""
        self.model: Model | None = None
        self.unreadable = 0
        self.closed_ns = 0
        """Receive time of the session's close; its last predictions may follow. 0 while it is open."""
        self.closed_sent_ns = 0
        """When the close was sent: what was sent so much later is no last prediction, however late it is read."""
        self.over = ""
        """The reason why there are no more predictions."""

    @property
    def repeated(self) -> int:
        """Duplicates: predictions that an engine sent again after a crash."""
        return self._decoder.repeated

    def skip(self) -> None:
        """Do not count ticks up to the next prediction as missed (there was no consumer meanwhile)."""
        self._before.clear()

    def observe(self, envelope: Envelope) -> PredictionView | None:
        """Process an envelope; returns its prediction if it has a new one.

        Raises:
            UsageError: a selected head does not exist.

        """
        try:
            if envelope.topic == topics.PREDICTION:
                return self._prediction(envelope)
            if envelope.topic == ENGINE:
                self._status(wire.unpack(envelope.payload, wire.StatusMessage))
            elif envelope.topic == topics.SESSION and self._is_meant(envelope):
                op = wire.unpack(envelope.payload, wire.SessionMessage).op
                if op == "open":
                    self._before.pop(envelope.session, None)
                if self._session is not None and op != "streams":
                    self._close(envelope if op == "close" else None)
            elif envelope.topic == topics.CONTROL and envelope.payload == topics.STOP and self._is_meant(envelope):
                self._close(envelope)  # the last predictions may be on their way
        except WireError:
            self.unreadable += 1
        return None

    def _close(self, envelope: Envelope | None) -> None:
        """The session is closed, or open again (None); the first message that says so counts."""
        if envelope is None:
            self.closed_ns = self.closed_sent_ns = 0
        elif not self.closed_ns:
            self.closed_ns, self.closed_sent_ns = envelope.received_ns, envelope.publish_ns

    def _is_meant(self, envelope: Envelope) -> bool:
        return self._session in (None, envelope.session)

    def _status(self, message: wire.StatusMessage) -> None:
        if message.state == "closed" and not message.counts.get("sessions"):
            self.over = "the session was closed"
        spec = message.detail.get("spec")
        if spec is not None:
            model = model_of(spec)
            if self.model is None or model.sha256 != self.model.sha256:
                self.model = model

    def _prediction(self, envelope: Envelope) -> PredictionView | None:
        if not self._is_meant(envelope):
            return None
        p = self._decoder.decode(envelope)
        if p is None:
            return None
        before = self._before.get(envelope.session, p.tick - 1)
        self._before[envelope.session] = p.tick
        if self._heads is not None and (unknown := self._heads - p.heads.keys()):
            raise UsageError(f"there is no head {min(unknown)!r}; the model's are {', '.join(sorted(p.heads))}")
        heads = {}
        for name, values in p.heads.items():
            if self._heads is None or name in self._heads:
                heads[name] = np.array([np.nan if v is None else v for v in values], np.float32)
                heads[name].setflags(write=False)
        return PredictionView(
            envelope.session,
            p.tick,
            p.event_ns,
            heads,
            p.present,
            p.age_ns,
            stages(p.event_ns, p.closed, p.step_start_ns, p.step_end_ns, envelope.publish_ns),
            max(0, p.tick - before - 1),
            p.model,
            self.model,
        )
