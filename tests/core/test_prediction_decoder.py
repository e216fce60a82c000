"""Predictions decoded once per process, however many consumers share the decoder."""

from __future__ import annotations

import pytest

from stream_mmrnn.bus.prediction_reader import PredictionReader
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.prediction_decoder import PredictionDecoder
from stream_mmrnn.core.types import Envelope, Stamps
from stream_mmrnn.viewers.dashboard.state import LiveState
from stream_mmrnn.viewers.prometheus import Metrics


def prediction(tick: int, session: str = "a") -> Envelope:
    at_ns = tick * 40_000_000
    message = wire.PredictionMessage(tick, at_ns, {"next": [0.5]}, {}, {}, Stamps(0, 0, 0, 0, "clock"), 0, 0, "m")
    return Envelope(topics.PREDICTION, session, tick, at_ns, at_ns, at_ns, wire.pack(message))


def test_a_tick_is_returned_once_to_each_consumer() -> None:
    decoder = PredictionDecoder()
    for envelope in map(prediction, (1, 2)):
        first, second = decoder.decode(envelope), decoder.decode(envelope)
        assert first is not None
        assert first is second
    assert decoder.decode(prediction(1)) is None, "republished"
    assert decoder.decode(prediction(1, "b")) is not None
    assert decoder.repeated == 1


def test_an_unreadable_message_is_counted_once_and_raised_for_each_consumer() -> None:
    decoder = PredictionDecoder()
    garbage = Envelope(topics.PREDICTION, "a", 0, 0, 0, 0, b"{")
    for _ in range(2):
        with pytest.raises(WireError, match="PredictionMessage"):
            decoder.decode(garbage)
    assert decoder.unreadable == 1
    assert decoder.decode(prediction(1)) is not None


def test_page_metrics_and_websocket_decode_a_prediction_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []
    unpack = wire.unpack
    monkeypatch.setattr(wire, "unpack", lambda payload, kind: decoded.append(payload) or unpack(payload, kind))
    decoder = PredictionDecoder()
    view, metrics, reading = LiveState(decoder), Metrics(decoder), PredictionReader(decoder=decoder)
    for tick in range(1, 6):
        envelope = prediction(tick)
        view.observe(envelope)
        metrics.observe(envelope)
        given = reading.observe(envelope)
        assert given is not None
        assert given.tick == tick == view.snapshot(0)["tick"]
    assert len(decoded) == 5
    assert b'stream_mmrnn_prediction_stage_seconds_count{stage="total"} 5.0' in metrics.text(0)
