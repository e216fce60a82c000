from __future__ import annotations

import random
from collections.abc import Mapping

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import SessionError
from stream_mmrnn.core.types import Envelope, ModalitySpec, Tick
from stream_mmrnn.predict.align import Aligner, AlignerState, stamps_of
from stream_mmrnn.predict.align_session import AlignedSession, SessionState
from stream_mmrnn.predict.align_stream import AlignedStream, StreamState

T = 40
LATE = {"vision": 80, "audio": 60, "text": 50}
SPECS = (ModalitySpec("vision", 2), ModalitySpec("audio", 1), ModalitySpec("text", 1))


def feature(modality: str, seq: int, event: int, value: float | None = None, session: str = "s") -> Envelope:
    size = 2 if modality == "vision" else 1
    payload = np.full(size, event if value is None else value, np.float32)
    return Envelope(topics.feature(modality), session, seq, event, event, event, payload)


def clock(at: int) -> Envelope:
    return Envelope(topics.CLOCK, topics.EVERYONE, 0, at, at, at, b"")


def aligner(**options: object) -> Aligner:
    options = {"lateness_ns": LATE, "max_ahead_ns": 500, "max_behind_ns": 5000, **options}
    return Aligner(options.pop("specs", SPECS), T, **options)


def run(a: Aligner, envelopes: list[Envelope]) -> list[Tick]:
    return [tick for e in envelopes for tick in a.push(e)]


def facts(ticks: list[Tick]) -> list[tuple]:
    return [(t.index, t.event_ns, t.present, t.age_ns, {k: v.tobytes() for k, v in t.features.items()}) for t in ticks]


def test_a_tick_covers_its_interval_and_reduces_each_stream() -> None:
    a = aligner(lateness_ns={"vision": 80, "audio": 80, "text": 0})
    a.open("s", 0)
    ticks = run(
        a,
        [
            clock(1),
            feature("vision", 0, 10),
            feature("vision", 1, 40),  # the end belongs to the tick
            feature("audio", 0, 20, 1.0),
            feature("audio", 1, 40, 3.0),
            feature("text", 0, 30, 5.0),
            feature("text", 1, 35, 7.0),
            feature("vision", 2, 41),
            feature("audio", 2, 60, 9.0),
        ],
    )
    assert [t.index for t in ticks] == [1]
    tick = ticks[0]
    assert tick.event_ns == 40
    assert tick.features["vision"].tolist() == [40, 40]  # last
    assert tick.features["audio"].tolist() == [2.0]  # mean
    # late text (the dense streams had closed its tick already) joins the next tick
    assert tick.present == {"vision": True, "audio": True, "text": False}
    ticks = run(a, [feature("vision", 3, 80), feature("audio", 3, 80, 11.0)])
    assert ticks[0].features["text"].tolist() == [12.0]  # sum
    assert ticks[0].age_ns == {"vision": 0, "audio": 0, "text": 45}
    assert a.counts["text"].late_joined == 2
    assert a.counts["vision"].superseded == 2


def test_without_data_the_clock_closes_masked_ticks() -> None:
    a = aligner()
    a.open("s", 0)
    ticks = run(a, [clock(1), feature("audio", 0, 30), *(clock(t) for t in range(10, 300, 10))])
    assert [t.index for t in ticks] == [1, 2, 3, 4, 5]
    assert [t.present["audio"] for t in ticks] == [True, False, False, False, False]
    assert [t.age_ns["audio"] for t in ticks] == [10, 50, 90, 130, 170]
    assert {t.age_ns["vision"] for t in ticks} == {-1}
    assert all(not t.features["vision"].any() for t in ticks)
    assert {t.closed.by for t in ticks} == {topics.CLOCK}


def test_the_watermark_ignores_streams_that_are_not_expected() -> None:
    a = aligner(lateness_ns={"vision": 80, "audio": 80, "text": 0})
    a.open("s", 0, ["audio"])
    assert [t.index for t in run(a, [clock(1), feature("audio", 0, 20), feature("audio", 1, 41)])] == [1]
    a.expect("s", ["audio", "vision"])
    assert run(a, [feature("audio", 2, 90)]) == []
    assert [t.index for t in run(a, [feature("vision", 0, 85)])] == [2]


def test_late_duplicate_and_bad_event_times_are_counted() -> None:
    a = aligner()
    a.open("s", 0)
    run(a, [clock(200)])  # closes until 120
    run(a, [feature("vision", 0, 100)])
    assert a.counts["vision"].late == 1
    run(a, [feature("audio", 0, 170, 1.0), feature("audio", 0, 170, 1.0)])
    assert a.counts["audio"].duplicate == 1
    run(a, [feature("audio", 1, 165, 3.0)])
    assert a.counts["audio"].non_monotonic == 1
    wrong = [
        feature("audio", 2, 200 + 501),
        feature("audio", 2, 200 - 5001),
        feature("audio", 2, 190, float("nan")),
        feature("audio", 2, 190, float("inf")),
        Envelope("feature/audio", "s", 2, 190, 0, 0, np.zeros(7, np.float32)),
        Envelope("feature/audio", "s", 2, 190, 0, 0, np.zeros(1, np.int16)),
        Envelope("feature/audio", "s", 2, 190, 0, 0, b"1234"),
    ]
    assert run(a, wrong) == []
    assert a.counts["audio"].quarantined == len(wrong)
    run(a, [feature("audio", 0, 190, session="other")])
    assert a.counts["audio"].outside == 1
    ticks = run(a, [clock(300)])
    assert [t.index for t in ticks] == [4, 5]
    assert ticks[1].features["audio"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (feature("audio", 0, 2000), "s from the clock"),
        (feature("audio", 0, 20, float("nan")), "not finite"),
        (Envelope("feature/audio", "s", 0, 20, 0, 0, np.zeros(7, np.float32)), "have 7 numbers, the model takes 1"),
        (Envelope("feature/audio", "s", 0, 20, 0, 0, np.zeros(1, np.int16)), "no vector of float32"),
        (Envelope("feature/audio", "s", 0, 20, 0, 0, b"1234"), "no vector of float32"),
    ],
)
def test_the_reason_of_a_quarantine_is_reported(message: Envelope, says: str) -> None:
    a = aligner()
    a.open("s", 0)
    run(a, [clock(1), feature("audio", 0, 1)])
    assert a.misfits == {}
    run(a, [message])
    assert says in a.misfits["audio"]
    assert set(a.misfits) == {"audio"}


def test_features_of_another_encoder_are_quarantined() -> None:
    a = aligner(specs=(ModalitySpec("audio", 1, "mel@1"),))
    a.open("s", 0)
    good = Envelope("feature/audio", "s", 0, 20, 20, 20, np.ones(1, np.float32), "mel@1")
    run(a, [clock(1), good, Envelope("feature/audio", "s", 1, 30, 30, 30, np.ones(1, np.float32), "mel@2")])
    assert a.counts["audio"].quarantined == 1
    assert a.misfits["audio"] == "its encoder is mel@2, the model was trained with mel@1"
    assert [t.index for t in run(a, [clock(100)])] == [1]


def test_stack_keeps_the_newest_in_order() -> None:
    a = aligner(specs=(ModalitySpec("audio", 3, reduction="stack", stack=3),))
    a.open("s", 0)
    ticks = run(a, [clock(1), *(feature("audio", i, 10 * (i + 1)) for i in range(5)), feature("audio", 5, 90)])
    assert [t.features["audio"].tolist() for t in ticks] == [[20, 30, 40], [0, 0, 50]]
    assert a.counts["audio"].superseded == 1


def test_stack_of_a_sparse_stream_keeps_the_newest_events_of_a_tick() -> None:
    """Words as ids: two events of two ids each; what a tick has not is zeros, before what it has."""
    a = aligner(specs=(ModalitySpec("text.tokens", 4, reduction="stack", stack=2), ModalitySpec("audio", 1)))
    a.open("s", 0)

    def word(seq: int, event: int, *ids: int) -> Envelope:
        return Envelope("feature/text.tokens", "s", seq, event, event, event, np.array(ids, np.float32))

    words = [word(0, 10, 1, 2), word(1, 20, 3, 0), word(2, 30, 4, 0), word(3, 50, 5, 6)]
    ticks = run(a, [clock(1), *words, word(5, 130, 8, 0), word(4, 125, 7, 0), *(clock(t) for t in range(40, 240, 20))])
    assert [t.features["text.tokens"].tolist() for t in ticks] == [
        [3, 0, 4, 0],
        [0, 0, 5, 6],
        [0, 0, 0, 0],
        [7, 0, 8, 0],
    ]
    assert [t.present["text.tokens"] for t in ticks] == [True, True, False, True]
    assert [t.age_ns["text.tokens"] for t in ticks] == [10, 30, 70, 30]
    # one that comes late joins the next open tick, before the newer one
    ticks = run(a, [word(6, 185, 9, 9), word(7, 150, 1, 1), clock(260), clock(280)])
    assert ticks[0].features["text.tokens"].tolist() == [1, 1, 9, 9]
    counts = a.counts["text.tokens"]
    assert (counts.used, counts.superseded, counts.late, counts.late_joined) == (7, 1, 0, 1)


def test_a_restarted_publisher_is_accepted() -> None:
    a = aligner()
    a.open("s", 0, ["audio"])
    run(a, [clock(1), *(feature("audio", i, 20 * i + 20) for i in range(5))])
    ticks = run(a, [feature("audio", 0, 120), feature("audio", 1, 141)])
    assert [t.index for t in ticks] == [3]
    assert a.counts["audio"].duplicate == 0
    assert a.counts["audio"].late == 0


def test_a_gap_is_given_up_after_the_lateness() -> None:
    a = aligner(lateness_ns={"vision": 80, "audio": 60, "text": 0})
    a.open("s", 0, ["audio"])
    assert run(a, [clock(1), feature("audio", 0, 20), feature("audio", 2, 60)]) == []  # 1 is missing
    assert run(a, [clock(99)]) == []
    assert [t.index for t in run(a, [clock(100)])] == [1]
    assert [t.index for t in run(a, [clock(120), feature("audio", 3, 80)])] == [2]


def test_close_flushes_ticks_and_counts_unclosed_samples() -> None:
    a = aligner()
    a.open("s", 0)
    run(a, [clock(1), feature("audio", 0, 20), feature("audio", 1, 60), feature("audio", 2, 110)])
    ticks = a.close("s", 100, stamps_of(clock(100)))
    assert [t.index for t in ticks] == [1, 2]
    assert a.counts["audio"].unclosed == 1
    assert "s" not in a
    assert a.close("s", 200, stamps_of(clock(200))) == []


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[tuple[int, Envelope]], int]:
    """Messages with their arrival times, each within its stream's lateness."""
    arriving: list[tuple[int, Envelope]] = []
    end = 400
    for modality, late in LATE.items():
        events = sorted(draw(st.sets(st.integers(1, end), max_size=25)))
        for seq, event in enumerate(events):
            # one clock period less than the lateness: the clock message of the same moment may arrive first
            arriving.append((event + draw(st.integers(0, late - 1)), feature(modality, seq, event)))
    return arriving, end


@pytest.mark.slow
@settings(max_examples=200)
@given(conversations(), st.randoms(use_true_random=False))
def test_any_arrival_order_within_lateness_gives_the_same_ticks(
    made: tuple[list[tuple[int, Envelope]], int], random: object
) -> None:
    arriving, end = made

    def ticks_of(order: list[tuple[int, Envelope]]) -> list[tuple]:
        a = aligner()
        a.open("s", 0)
        out: list[Tick] = []
        queue = list(order)
        for now in range(end + 200):
            while queue and queue[0][0] <= now:
                out += a.push(queue.pop(0)[1])
            out += a.push(clock(now))
        for counts in a.counts.values():
            assert counts.late == counts.duplicate == counts.quarantined == counts.late_joined == 0
            assert counts.received == counts.used + sum(counts.dropped().values())
        return facts(out)

    shuffled = list(arriving)
    random.shuffle(shuffled)  # type: ignore[attr-defined] # ties in a different order
    shuffled.sort(key=lambda x: x[0])
    in_event_order = sorted(((e.event_ns, e) for _, e in arriving), key=lambda x: x[0])
    reference = ticks_of(in_event_order)
    assert [t[0] for t in reference] == list(range(1, len(reference) + 1))
    assert ticks_of(shuffled) == reference


@pytest.mark.slow
@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["vision", "audio", "text", "clock"]),
            st.integers(0, 30),
            st.integers(-8000, 8000),
            st.sampled_from([1.0, float("nan")]),
        ),
        max_size=120,
    )
)
def test_every_message_is_accounted_for(messages: list[tuple[str, int, int, float]]) -> None:
    """For any sequence of messages: ticks without gaps, no exception, received = used + dropped."""
    a = aligner()
    a.open("s", 0)
    out: list[Tick] = []
    received = dict.fromkeys(LATE, 0)
    for kind, seq, event, value in messages:
        if kind == "clock":
            out += a.push(clock(event))
        else:
            received[kind] += 1
            out += a.push(feature(kind, seq, event, value))
    out += a.close("s", 8000, stamps_of(clock(8000)))
    assert [t.index for t in out] == list(range(1, len(out) + 1))
    for name, counts in a.counts.items():
        assert counts.received == received[name]
        assert counts.received == counts.used + sum(counts.dropped().values())
    for tick in out:
        for name, present in tick.present.items():
            assert present or not tick.features[name].any()
            assert np.isfinite(tick.features[name]).all()


def push_thoroughly(a: Aligner, envelope: Envelope, soonest: int) -> list[Tick]:
    """Reference without the cached condition: computes the watermark over all streams for the message.

    `soonest`: the smallest lateness.
    """
    state = a.snapshot()
    session = state.sessions["s"]
    session = msgspec.structs.replace(session, unsettled=True, due_ns=session.end_ns + soonest)
    a.restore(msgspec.structs.replace(state, sessions={"s": session}))
    return a.push(envelope)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.integers(0, 2**32))
def test_the_cached_condition_changes_no_tick(seed: int) -> None:
    """With gaps, restarts, late messages and changing streams: the same ticks as the reference."""
    chance = random.Random(seed)
    lateness_ns = {name: chance.choice([0, 20, 60, 80]) for name in LATE}
    quick, thorough = Aligner(SPECS, T, lateness_ns, 500, 5000), Aligner(SPECS, T, lateness_ns, 500, 5000)
    for a in (quick, thorough):
        a.open("s", 0)
    now, seq = 0, dict.fromkeys(LATE, 0)
    trouble, jitter = chance.choice([0, 0.05, 0.3]), chance.choice([0, 10, 60])
    for _ in range(200):
        now += chance.choice([0, 1, 2, 5, 10])
        kind = chance.choice(["clock", "clock", *LATE])
        if chance.random() < 0.05:
            expected = chance.sample(sorted(LATE), chance.randint(0, 3))
            quick.expect("s", expected)
            thorough.expect("s", expected)
        if kind == "clock":
            message = clock(now)
        else:
            number = seq[kind]
            if chance.random() < trouble:
                number = max(0, chance.choice([0, number - 2, number - 1, number + 1, number + 3]))
            seq[kind] = number + 1 if chance.random() < 0.7 else max(number + 1, seq[kind])
            message = feature(kind, number, now - chance.randint(0, jitter) + chance.choice([0, 0, 0, 50]))
        expected_ticks = push_thoroughly(thorough, message, min(lateness_ns.values()))
        assert facts(quick.push(message)) == facts(expected_ticks)
    assert quick.counts == thorough.counts


def test_opening_again_starts_over() -> None:
    a = aligner()
    a.open("s", 0)
    run(a, [clock(1), feature("audio", 0, 20)])
    a.open("s", 1000)
    assert a.counts["audio"].unclosed == 1
    assert [t.index for t in run(a, [clock(1125)])] == [26]


@pytest.mark.parametrize("count", [1, 3])
def test_one_clock_message_closes_the_ticks_of_all_sessions(count: int) -> None:
    a = aligner()
    for i in range(count):
        a.open(f"s{i}", 0)
    assert [(t.session, t.index) for t in a.push(clock(120))] == [(f"s{i}", 1) for i in range(count)]


def resumed(a: Aligner, specs: tuple[ModalitySpec, ...], lateness_ns: Mapping[str, int]) -> Aligner:
    """A new aligner restored from this one's snapshot, through its bytes."""
    content = msgspec.msgpack.encode(a.snapshot())
    b = Aligner(specs, T, lateness_ns, 500, 5000)
    b.restore(msgspec.msgpack.decode(content, type=AlignerState))
    assert msgspec.msgpack.encode(b.snapshot()) == content
    return b


@pytest.mark.slow
@settings(max_examples=300)
@given(st.integers(0, 2**32), st.sets(st.integers(0, 250), max_size=6))
def test_restoring_a_snapshot_changes_no_tick(seed: int, cuts: set[int]) -> None:
    """Sessions that open and close, gaps, restarts, late and bad messages: a restore at any point changes nothing."""
    chance = random.Random(seed)
    specs = (ModalitySpec("vision", 2), ModalitySpec("audio", 2, reduction="stack", stack=2), ModalitySpec("text", 1))
    lateness_ns = {name: chance.choice([0, 20, 60, 80]) for name in LATE}
    whole = Aligner(specs, T, lateness_ns, 500, 5000)
    pieces = Aligner(specs, T, lateness_ns, 500, 5000)
    now, seq = 0, {(s, name): 0 for s in "ab" for name in LATE}
    trouble, jitter = chance.choice([0, 0.05, 0.3]), chance.choice([0, 10, 60])
    for i in range(250):
        if i in cuts:
            pieces = resumed(pieces, specs, lateness_ns)
        now += chance.choice([0, 1, 2, 5, 10])
        kind, session = chance.choice(["clock", "clock", *LATE]), chance.choice("ab")
        roll = chance.random()
        if roll < 0.03 or i == 0:
            for a in (whole, pieces):
                a.open(session, now, ["audio", "text"] if seed % 2 else None)
        elif roll < 0.05:
            ends = [facts(a.close(session, now, stamps_of(clock(now)))) for a in (whole, pieces)]
            assert ends[0] == ends[1]
        elif roll < 0.1:
            expected = chance.sample(sorted(LATE), chance.randint(0, 3))
            whole.expect(session, expected)
            pieces.expect(session, expected)
        if kind == "clock":
            message = clock(now)
        else:
            number = seq[session, kind]
            if chance.random() < trouble:
                number = max(0, chance.choice([0, number - 2, number - 1, number + 1, number + 3]))
            seq[session, kind] = number + 1
            value = chance.choice([None] * 20 + [float("nan")])
            at = now - chance.randint(0, jitter) + chance.choice([0, 0, 0, 50, 50, 2000 if trouble else 0])
            message = feature(kind, number, at, value, session)
        assert facts(whole.push(message)) == facts(pieces.push(message))
    assert whole.counts == pieces.counts
    assert whole.misfits == pieces.misfits
    assert whole.snapshot() == pieces.snapshot()


def test_a_snapshot_covers_every_attribute() -> None:
    """A new attribute of a stream or session must be added to the snapshot or to this list."""
    made = {"all_true", "counts", "dense", "encoder", "expected", "in_range", "lateness_ns", "name", "reduction"}
    made |= {"magnitudes", "shape", "source", "spec", "topic", "zeros"}
    assert set(AlignedStream.__slots__) == made | set(StreamState.__struct_fields__)
    derived = {"bounds", "by_topic", "name", "soonest_ns"}
    assert set(AlignedSession.__slots__) == derived | set(SessionState.__struct_fields__)
    settings_ = {
        "tick_ns",
        "modalities",
        "_specs",
        "_lateness_ns",
        "max_ahead_ns",
        "max_behind_ns",
        "feature_topics",
        "_zeros",
    }
    settings_ |= {"feeding", "max_jump_ns", "max_per_tick"}
    assert set(vars(aligner())) == settings_ | {"counts", "malformed", "misfits", "sessions"}


def test_a_snapshot_detects_duplicates_as_far_back_as_the_aligner() -> None:
    a = aligner(specs=(ModalitySpec("audio", 1),))
    a.open("s", 0)
    run(a, [clock(1), *(e for i in range(5000) for e in (clock(i), feature("audio", i, i)))])
    b = resumed(a, (ModalitySpec("audio", 1),), LATE)
    for seq in (0, 3000, 3970, 4999):
        for each in (a, b):
            assert run(each, [feature("audio", seq, 4900)]) == []
    assert a.counts == b.counts
    assert b.counts["audio"].duplicate == 4


def test_a_snapshot_of_other_modalities_is_refused_and_changes_nothing() -> None:
    a = aligner()
    a.open("s", 0)
    run(a, [clock(1), feature("audio", 0, 20)])
    before = a.snapshot()
    for other in ((ModalitySpec("audio", 1),), (*SPECS[:2], ModalitySpec("text", 3))):
        b = aligner(specs=other)
        b.open("t", 0)
        b.push(feature("text", 0, 20, session="t")) if len(other) == 1 else b.push(
            Envelope("feature/text", "t", 0, 20, 20, 20, np.ones(3, np.float32))
        )
        with pytest.raises(SessionError):
            a.restore(b.snapshot())
        assert a.snapshot() == before
