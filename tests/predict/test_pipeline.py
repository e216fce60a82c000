from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn.bench.engine import synthetic
from stream_mmrnn.capture.pipeline import Pump, capture, reencode
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import Busy, SessionError, SourceError, WireError
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Envelope, Prediction, Sample, Tick
from stream_mmrnn.offline.pacing import pace
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.pipeline import predict

BEGIN = 10**15
LATE = {"vision": 80_000_000, "audio": 80_000_000, "text": 0}


def aligner(engine: StepEngine) -> Aligner:
    return Aligner(engine.spec.modalities, engine.spec.tick_ns, LATE)


def results(predictions: Iterator[Prediction]) -> dict[str, list[tuple[int, bytes]]]:
    out: dict[str, list[tuple[int, bytes]]] = {}
    for p in predictions:
        out.setdefault(p.tick.session, []).append((p.tick.index, p.heads["next"].tobytes()))
    return out


def test_interleaved_sessions_equal_single_ones(toy: Path) -> None:
    engine = StepEngine(toy, 4)
    envelopes = list(synthetic(engine.spec, 4, 3.0, BEGIN, 7))
    together = results(predict(envelopes, aligner(engine), engine))
    assert set(together) == {f"bench-{i}" for i in range(4)}
    assert all(len(v) == 75 for v in together.values())
    assert len(engine.arena) == 0
    for name, expected in together.items():
        one = StepEngine(toy, 4)
        only = [e for e in envelopes if e.session in (name, topics.EVERYONE)]
        assert results(predict(only, aligner(one), one)) == {name: expected}


@settings(max_examples=25)
@given(st.lists(st.booleans(), max_size=600), st.integers(1, 9))
def test_collected_ticks_give_the_same_predictions(toy: Path, there: list[bool], batch: int) -> None:
    engine = StepEngine(toy, 3)
    envelopes = list(synthetic(engine.spec, 3, 0.6, BEGIN, 7))
    reopened = [*envelopes, *synthetic(engine.spec, 3, 0.4, BEGIN + 10**9, 8)]
    expected = results(predict(reopened, aligner(engine), engine))
    other = StepEngine(toy, 3)
    answers = iter(there)
    gathered = predict(reopened, aligner(other), other, more=lambda: next(answers, False), batch=batch)
    assert results(gathered) == expected
    assert len(other) == 0


def test_available_ticks_are_stepped_in_one_call(toy: Path) -> None:
    """Ticks that close while messages are available are stepped together, at the latest after the last message."""
    engine = StepEngine(toy, 3)
    envelopes = list(synthetic(engine.spec, 3, 0.6, BEGIN, 7))
    calls: list[int] = []

    class Counting:
        open, reset, close = engine.open, engine.reset, engine.close

        def __contains__(self, session: str) -> bool:
            return session in engine

        def step(self, ticks: Sequence[Tick]) -> list[Prediction]:
            calls.append(len(ticks))
            return engine.step(ticks)

    got = list(predict(envelopes, aligner(engine), Counting(), more=lambda: True, batch=5))
    assert len(got) == sum(calls) == 45
    assert max(calls) >= 5
    assert len(calls) < 15


def test_a_session_without_a_slot_is_refused_and_others_continue(toy: Path) -> None:
    engine = StepEngine(toy, 2)
    envelopes = list(synthetic(engine.spec, 3, 1.0, BEGIN, 7))
    refused: list[tuple[str, SessionError]] = []
    a = aligner(engine)
    got = results(predict(envelopes, a, engine, lambda s, e: refused.append((s, e))))
    assert set(got) == {"bench-0", "bench-1"}
    assert [s for s, _ in refused] == ["bench-2"]
    assert isinstance(refused[0][1], Busy)
    assert a.counts["audio"].outside > 0
    with pytest.raises(Busy):
        list(predict(envelopes, aligner(engine), StepEngine(toy, 2)))


def test_a_session_opened_again_starts_over(toy: Path) -> None:
    engine = StepEngine(toy, 1)
    one = [e for e in synthetic(engine.spec, 1, 1.0, BEGIN, 7) if wire_op(e) != "close"]
    later = list(synthetic(engine.spec, 1, 1.0, BEGIN + 2_000_000_000, 7))
    got = results(predict(one + later, aligner(engine), engine))["bench-0"]
    fresh = StepEngine(toy, 1)
    assert got[-25:] == results(predict(later, aligner(fresh), fresh))["bench-0"]


def test_a_session_message_that_cannot_be_read_is_counted(toy: Path) -> None:
    engine = StepEngine(toy, 1)
    a = aligner(engine)
    good = list(synthetic(engine.spec, 1, 1.0, BEGIN, 7))
    bad = Envelope(topics.SESSION, "bench-0", 9, BEGIN, BEGIN, BEGIN, b'{"op": "explode"}')
    got = results(predict([bad, *good[:50], bad, *good[50:]], a, engine))
    assert len(got["bench-0"]) == 25
    assert a.malformed == 2


def wire_op(e: Envelope) -> str:
    return wire.unpack(e.payload, wire.SessionMessage).op if e.topic == topics.SESSION else ""


class Doubler:
    """An encoder: the sum of a block, twice; refuses an empty block."""

    origin, size = "doubler@1", 1

    def __init__(self) -> None:
        self.resets = 0

    def encode(self, sample: Sample) -> list[Sample]:
        if not len(sample.data):
            raise WireError("an empty block")
        value = np.array([2.0 * np.sum(sample.data)], np.float32)
        return [Sample(sample.event_ns, sample.capture_ns, value)]

    def reset(self) -> None:
        self.resets += 1


def blocks(count: int, empty: int = -1) -> list[Sample]:
    return [
        Sample(i * 20, i * 20 + 1, np.zeros(0, np.int16) if i == empty else np.full(3, i, np.int16))
        for i in range(count)
    ]


def test_capture_yields_features_and_then_the_sample_that_they_are_of() -> None:
    bad: list[WireError] = []
    out = list(capture(blocks(3, empty=1), Stream.of("audio"), "mic", {"audio": Doubler()}, bad.append))
    assert [(o.topic, o.origin) for o in out] == [
        ("feature/audio", "doubler@1"), ("raw/audio", "mic"), ("raw/audio", "mic"),
        ("feature/audio", "doubler@1"), ("raw/audio", "mic"),
    ]  # fmt: skip
    assert [o.sample.data.tolist() for o in out if o.topic == "feature/audio"] == [[0.0], [12.0]]
    assert len(bad) == 1


def as_envelopes(samples: list[Sample], with_features: bool) -> list[Envelope]:
    out = []
    for o in capture(samples, Stream.of("audio"), "mic", {"audio": Doubler()}, lambda _: None):
        s = o.sample
        if with_features or o.topic == "raw/audio":
            out.append(Envelope(o.topic, "s", len(out), s.event_ns, s.capture_ns, 0, s.data, o.origin))
    return out


@given(st.data())
def test_encoding_again_keeps_place_and_number(data: st.DataObject) -> None:
    """A vector may be recorded before or after its sample, with other messages in between."""
    clock = [Envelope("clock", "host", i, 0, 0, 0, b"") for i in range(3)]
    recorded = data.draw(st.permutations([*as_envelopes(blocks(5), True), *clock]))
    raws = sorted((e for e in recorded if e.topic == "raw/audio"), key=lambda e: e.event_ns)
    vectors = sorted((e for e in recorded if e.topic == "feature/audio"), key=lambda e: e.event_ns)
    in_order = {"raw/audio": iter(raws), "feature/audio": iter(vectors), "clock": iter(clock)}
    recorded = [next(in_order[e.topic]) for e in recorded]  # streams interleaved as drawn, each in its order
    again = list(reencode(recorded, {"audio": Doubler()}))
    assert [(e.topic, e.seq, e.event_ns) for e in again] == [
        (e.topic, e.seq, e.event_ns) for e in recorded if e.topic != "raw/audio"
    ]
    made = [e.payload.tolist() for e in again if e.topic == "feature/audio"]
    assert made == [[6.0 * i] for i in range(5)]


def test_a_vector_whose_sample_was_lost_is_skipped_after_a_timeout() -> None:
    second = 1_000_000_000
    a, b = (
        Envelope("feature/audio", "s", i, i * 20, 0, i * second // 100, np.zeros(1, np.float32), "x") for i in (0, 1)
    )
    raw = Envelope("raw/audio", "s", 1, 20, 0, second // 100, np.full(3, 1, np.int16), "mic")
    ticks = [Envelope("clock", "host", i, 0, 0, i * second // 10, b"") for i in range(13)]
    followed = list(reencode([a, b, raw, *ticks], {"audio": Doubler()}))
    assert [e.seq for e in followed if e.topic == "feature/audio"] == [1]
    # no message after it, but time passes
    out = reencode(iter([a, *ticks]), {"audio": Doubler()})
    assert [e.seq for e in out] == list(range(13))
    assert next(reencode(iter([a, *ticks[:12]]), {"audio": Doubler()})).publish_ns == 0


def test_encoding_again_without_recorded_features() -> None:
    without = list(reencode(as_envelopes(blocks(5), False), {"audio": Doubler()}, {"audio"}))
    assert [(e.seq, e.payload.tolist()) for e in without] == [(i, [6.0 * i]) for i in range(5)]


def test_a_source_yields_the_interpreter_to_its_reader() -> None:
    """The source waits, for a bounded time, until the reader asks for the next sample."""
    working = threading.Event()
    overlapped: list[bool] = []

    def samples() -> Iterator[Sample]:
        for i in range(20):
            overlapped.append(working.is_set())  # the source runs here
            time.sleep(0.003)  # the reader waits for this sample
            yield Sample(i, i, b"")

    pump = Pump(samples(), "block", 4, lambda: True)
    pump.start()
    read = 0
    while read < 20:
        sample = pump.read(1.0)
        working.set()
        time.sleep(0.001)
        working.clear()
        read += sample is not None
    assert pump.read(0.1) is None
    assert sum(overlapped) < 10  # normally only the first; a stalled machine may add a few


def test_a_source_that_still_waits_for_its_device_is_not_ready_to_be_closed() -> None:
    device = threading.Event()

    def samples() -> Iterator[Sample]:
        device.wait(30)
        yield from ()

    pump = Pump(samples(), "latest", 4, lambda: True)
    pump.start()
    assert not pump.join(0.01)
    device.set()
    assert pump.join(30)


def test_pace_keeps_the_intervals() -> None:
    envelopes = [Envelope("clock", "host", i, 0, 0, BEGIN + i * 100_000_000, b"") for i in range(6)]
    began = time.monotonic()
    paced = list(pace(envelopes, 2.0))
    assert time.monotonic() - began >= 0.25
    assert [e.seq for e in paced] == list(range(6))
    gaps = np.diff([e.received_ns for e in paced])
    assert gaps.min() > 0
    assert list(pace(envelopes, 0.001, lambda: False)) == []


@pytest.mark.parametrize(("policy", "expected"), [("latest", [9]), ("drop_oldest", [6, 7, 8, 9])])
def test_a_full_queue_drops_the_oldest_and_counts(policy: str, expected: list[int]) -> None:
    pump = Pump(iter(Sample(i, i, b"") for i in range(10)), policy, 4, lambda: True)  # type: ignore[arg-type]
    pump.start()
    pump.join(5)
    got = []
    while not pump.ended:
        got.append(pump.read(1).event_ns)
    assert got == expected
    assert pump.produced == pump.delivered + pump.dropped == 10


def test_a_full_queue_that_blocks_loses_nothing() -> None:
    pump = Pump(iter(Sample(i, i, b"") for i in range(10)), "block", 2, lambda: True)
    pump.start()
    got = []
    while not pump.ended:
        sample = pump.read(1)
        if sample is not None:
            got.append(sample.event_ns)
    assert got == list(range(10))
    assert (pump.produced, pump.delivered, pump.dropped) == (10, 10, 0)


def test_a_source_that_fails_fails_its_reader() -> None:
    def failing() -> Iterator[Sample]:
        yield Sample(0, 0, b"")
        raise SourceError("the camera is gone")

    pump = Pump(failing(), "block", 4, lambda: True)
    pump.start()
    assert pump.read(5) is not None
    pump.join(5)
    assert not pump.ended, "a reader that was busy when it failed still gets the error"
    with pytest.raises(SourceError, match="the camera is gone"):
        pump.read(5)
    assert pump.ended
