"""Predictions as readers use them: each message decoded once per process, each tick returned once."""

from __future__ import annotations

from stream_mmrnn.core import wire
from stream_mmrnn.core.dedup import TickDeduplicator
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import Envelope


class PredictionDecoder:
    """Decodes prediction messages and drops ticks that an engine published again after a crash.

    Consumers that are given the same envelopes share one decoder: it keeps the result of the last envelope, so only
    the first consumer pays for the decoding.
    """

    def __init__(self, sessions: int = 1024) -> None:
        """`sessions`: maximum number of sessions whose duplicates are recognised."""
        self._deduplicator = TickDeduplicator(sessions)
        self._envelope: Envelope | None = None
        self._result: wire.PredictionMessage | None = None
        self._error = ""
        self.unreadable = 0
        """Messages that could not be decoded."""

    @property
    def repeated(self) -> int:
        """Predictions whose tick had been published before."""
        return self._deduplicator.count

    def decode(self, envelope: Envelope) -> wire.PredictionMessage | None:
        """The prediction, or None if its tick was published before.

        Raises:
            WireError: the payload is not a prediction.

        """
        if envelope is not self._envelope:
            self._envelope = envelope
            self._result, self._error = self._decode(envelope)
        if self._error:
            raise WireError(self._error)
        return self._result

    def _decode(self, envelope: Envelope) -> tuple[wire.PredictionMessage | None, str]:
        try:
            prediction = wire.unpack(envelope.payload, wire.PredictionMessage)
        except WireError as e:
            self.unreadable += 1
            return None, str(e)
        return (prediction if self._deduplicator.first(envelope.session, prediction.tick) else None), ""
