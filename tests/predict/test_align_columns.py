"""The column aligner equals the incremental one, message by message: ticks, counts and the whole state."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_ticks import columns_of

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Envelope, ModalitySpec, Tick
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.align_columns import ColumnAligner
from stream_mmrnn.predict.align_stream import MAX_PENDING
from stream_mmrnn.predict.pipeline import NoEngine, predict
from stream_mmrnn.predict.tick_columns import TickColumns, joined

MS = 1_000_000
T = 40 * MS
SPECS = (
    ModalitySpec("vision", 2),
    ModalitySpec("audio", 1, "mel@1"),
    ModalitySpec("text", 1),
    ModalitySpec("imu", 4, "", "stack", 2),
    ModalitySpec("pulse", 1, "", "sum"),
)
SIZES = {"vision": 2, "audio": 1, "text": 1, "imu": 2, "pulse": 1}
TABLE = {name: Stream.of(name, None, "", "push") for name in SIZES}
LATE = {"vision": 80 * MS, "audio": 60 * MS, "text": 0, "imu": 40 * MS, "pulse": 70 * MS}


def aligner() -> Aligner:
    return Aligner(SPECS, T, LATE, max_ahead_ns=500 * MS, max_behind_ns=5000 * MS, table=TABLE)


def facts(ticks: Sequence[Tick]) -> list[tuple[object, ...]]:
    names = [m.name for m in SPECS]
    return [
        (
            t.session,
            t.index,
            t.event_ns,
            [t.present[n] for n in names],
            [t.age_ns[n] for n in names],
            [t.features[n].tobytes() for n in names if t.present[n]],
        )
        for t in ticks
    ]


def facts_of(parts: Sequence[TickColumns]) -> list[tuple[object, ...]]:
    out: list[tuple[object, ...]] = []
    for part in parts:
        vectors = [iter(v) for v in part.features]
        for i in range(len(part)):
            present = part.present[i].tolist()
            numbers = [next(v).tobytes() for v, here in zip(vectors, present, strict=True) if here]
            out.append(
                (part.session, int(part.indices[i]), int(part.event_ns[i]), present, part.age_ns[i].tolist(), numbers)
            )
        assert all(next(v, None) is None for v in vectors)
        for v, m in zip(part.features, SPECS, strict=True):
            assert v.shape[1:] == (m.size,)
            assert v.dtype == np.float32
    return out


def state(a: Aligner) -> object:
    """All that a snapshot holds, but when the watermark is looked at next, and numbers that are refused anyway."""
    snapshot = a.snapshot()
    for session in snapshot.sessions.values():
        for name, stream in session.streams.items():
            seen = [seq for seq in stream.seen if seq >= stream.next_seq - MAX_PENDING]
            session.streams[name] = msgspec.structs.replace(stream, seen=seen)
    sessions = {k: msgspec.structs.replace(s, due_ns=0) for k, s in snapshot.sessions.items()}
    return msgspec.to_builtins(msgspec.structs.replace(snapshot, sessions=sessions))


class Orders:
    """Draws the messages of a conversation with everything that can go wrong."""

    def __init__(self, seed: int, count: int, trouble: float, sessions: Sequence[str]) -> None:
        self.rng = np.random.default_rng(seed)
        self.trouble, self.sessions = trouble, sessions
        self.now = 1000 * MS
        self.seq: dict[tuple[str, str], int] = {}
        self.event: dict[tuple[str, str], int] = {}
        self.messages: list[Envelope] = [self.session(s, "open") for s in sessions]
        for _ in range(count):
            self.messages += self.some()

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def session(self, name: str, op: str) -> Envelope:
        expected = tuple(n for n in SIZES if self.chance(0.8))
        return Envelope(
            topics.SESSION,
            name,
            0,
            self.now,
            self.now,
            self.now,
            wire.pack(wire.SessionMessage(op, self.now, expected)),  # type: ignore[arg-type]
        )

    def some(self) -> list[Envelope]:
        rng, session = self.rng, str(self.rng.choice(self.sessions))
        if self.chance(0.3):
            step = int(rng.integers(0, 30 * MS))
            if self.chance(self.trouble * 0.2):
                step = int(rng.choice([-50 * MS, 700 * MS, 2**62] + [700_000 * MS] * self.chance(0.05)))
            at = self.now + step
            self.now = max(self.now, at) if step < 1000 * MS else self.now
            return [Envelope(topics.CLOCK, topics.EVERYONE, 0, at, at, at, b"")]
        if self.chance(self.trouble * 0.1):
            return [self.session(session, str(rng.choice(["open", "close", "streams", "streams"])))]
        if self.chance(self.trouble * 0.05):
            return [Envelope(topics.SESSION, session, 0, 0, 0, 0, b"{")]
        name = str(rng.choice(list(SIZES)))
        key = (session, name)
        seq = self.seq.get(key, 0)
        oldest = self.now - (150 if self.chance(0.1) else 60) * MS
        event = max(self.event.get(key, self.now - 30 * MS) + int(rng.integers(1, 25 * MS)), oldest)
        self.seq[key], self.event[key] = seq + 1, event
        size, origin = SIZES[name], "mel@1"
        bad = self.trouble * 0.3
        if self.chance(bad):
            kind = int(rng.integers(0, 10))
            if kind == 0:
                seq += int(rng.integers(1, 4))
                self.seq[key] = seq + 1
            elif kind == 1:
                seq = max(0, seq - int(rng.integers(0, 4)))
            elif kind == 2:
                event -= int(rng.integers(0, 200 * MS))
            elif kind == 3:
                event = int(rng.choice([event + 600 * MS, 10**15, -(10**15), 2**62, -(2**62), 2**63 - 1, -(2**63)]))
            elif kind == 4:
                size += 1
            elif kind == 5:
                origin = "mel@2"
            elif kind == 6:
                self.seq[key] = 1
                seq = 0  # the publisher restarted
            elif kind == 7:
                session = "nobody"
        payload = rng.standard_normal(size).astype(np.float32)
        if self.chance(bad * 0.1):
            payload[0] = rng.choice([np.nan, np.inf, -np.inf, 1e13, -1e13])
        out = [Envelope(topics.feature(name), session, seq, event, event, event, payload, origin)]
        if self.chance(bad * 0.2):
            out.append(Envelope(topics.feature(name), session, seq, event, event, event, b"bytes", origin))
        return out


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 400),
    st.sampled_from([0.0, 0.02, 0.2, 1.0]),
    st.sampled_from([("s",), ("s", "t"), ("s", "t", "u")]),
    st.lists(st.integers(0, 400), max_size=12),
    st.booleans(),
)
def test_it_equals_the_incremental_aligner(
    seed: int, count: int, trouble: float, sessions: tuple[str, ...], cuts: list[int], alone: bool
) -> None:
    """At every cut both have made the same ticks, and have the same state."""
    messages = Orders(seed, count, trouble, sessions).messages
    one, many = aligner(), ColumnAligner(aligner())
    engine = NoEngine()
    begin = 0
    for end in sorted({*cuts, len(messages)}):
        some = messages[begin:end]
        expected = list(predict(some, one, engine))
        got = many.push(columns_of(some, 0.1 if alone else 0.0, seed))
        for session in (*sessions, "nobody"):
            assert facts_of([p for p in got if p.session == session]) == [f for f in facts(expected) if f[0] == session]
        assert state(many.aligner) == state(one)
        begin = max(begin, end)


def steady(count: int, sessions: Sequence[str] = ("s",)) -> list[Envelope]:
    """Messages without trouble: all that may happen to a session on a good day, late ones too."""
    return Orders(3, count, 0.0, sessions).messages


def test_messages_without_trouble_are_not_pushed_one_by_one() -> None:
    messages = steady(3000, ("s", "t"))
    many = ColumnAligner(aligner())
    ticks = sum(map(len, many.push(columns_of(messages))))
    assert ticks > 100
    assert many.pushed < 50  # until the sessions, which have just opened, have settled
    late = [c.late + c.late_joined for c in many.aligner.counts.values()]
    assert sum(late) > 50


@pytest.mark.parametrize(
    ("changed", "counted"),
    [
        ({"seq": 10**6}, None),
        ({"seq": 0}, None),  # the publisher restarted
        ({"event_ns": 0}, "quarantined"),
        ({"event_ns": 2**62}, "quarantined"),
        ({"payload": np.array([np.nan, 1], np.float32)}, "quarantined"),
        ({"payload": np.array([1e13, 1], np.float32)}, "quarantined"),
        ({"payload": b"bytes"}, "quarantined"),
    ],
)
def test_only_messages_near_trouble_are_pushed_one_by_one(changed: dict[str, object], counted: str | None) -> None:
    messages = steady(6000)
    at = next(i for i, e in enumerate(messages) if i > 3000 and e.topic == "feature/vision")
    messages[at] = msgspec.structs.replace(messages[at], **changed)
    one, many = aligner(), ColumnAligner(aligner())
    expected = list(predict(messages, one, NoEngine()))
    assert facts_of(many.push(columns_of(messages))) == facts(expected)
    assert state(many.aligner) == state(one)
    assert counted is None or getattr(one.counts["vision"], counted) == 1
    assert 0 < many.pushed < 1500


def test_a_stream_of_another_encoder_or_size_costs_the_others_nothing() -> None:
    messages = [
        msgspec.structs.replace(e, origin="mel@2")
        if e.topic == "feature/audio"
        else msgspec.structs.replace(e, payload=np.zeros(7, np.float32))
        if e.topic == "feature/pulse"
        else e
        for e in steady(3000)
    ]
    one, many = aligner(), ColumnAligner(aligner())
    assert facts_of(many.push(columns_of(messages))) == facts(list(predict(messages, one, NoEngine())))
    assert state(many.aligner) == state(one)
    assert many.aligner.misfits.keys() == {"audio", "pulse"}
    assert "mel@2" in many.aligner.misfits["audio"]
    assert many.pushed < 50


def test_two_producers_of_one_stream_are_pushed_one_by_one() -> None:
    """By columns alone it could not be told which of their numbers follow each other."""
    messages = [
        msgspec.structs.replace(e, origin=f"net@{i % 2}") if e.topic == "feature/vision" else e
        for i, e in enumerate(steady(800))
    ]
    one, many = aligner(), ColumnAligner(aligner())
    assert facts_of(many.push(columns_of(messages))) == facts(list(predict(messages, one, NoEngine())))
    assert state(many.aligner) == state(one)
    assert many.pushed > 700


def test_too_many_samples_of_a_tick_are_refused_as_by_the_incremental_aligner() -> None:
    opened = wire.pack(wire.SessionMessage("open", T, ("vision",)))
    messages = [Envelope(topics.SESSION, "s", 0, T, T, T, opened), Envelope(topics.CLOCK, "", 0, T, T, T, b"")]
    for name, step in (("pulse", 5000), ("text", 1)):
        for i in range(5000):
            at = T + 1 + i * step
            messages.append(Envelope(topics.feature(name), "s", i, at, at, at, np.ones(1, np.float32)))
    messages += [Envelope(topics.CLOCK, "", 0, T + at, T, T, b"") for at in (T, 3 * T, 6 * T)]
    one, many = aligner(), ColumnAligner(aligner())
    assert facts_of(many.push(columns_of(messages))) == facts(list(predict(messages, one, NoEngine())))
    assert state(many.aligner) == state(one)
    assert one.counts["pulse"].quarantined == one.counts["text"].quarantined == 5000 - 4096


def test_a_session_that_is_opened_again_has_fresh_ticks() -> None:
    messages = steady(400) + Orders(4, 400, 0.0, ("s",)).messages
    parts = ColumnAligner(aligner()).push(columns_of(messages))
    assert [part.fresh for part in parts].count(True) == 2
    assert parts[0].fresh


def test_ticks_are_split_and_joined() -> None:
    parts = ColumnAligner(aligner()).push(columns_of(steady(1500)))
    whole = joined(parts)
    assert facts_of([whole]) == facts_of(parts)
    for count in (0, 1, len(whole) // 2, len(whole)):
        head, rest = whole.split(count)
        assert (len(head), len(rest), head.fresh, rest.fresh) == (count, len(whole) - count, True, False)
        assert facts_of([head, rest]) == facts_of([whole])


def test_stamps_that_go_back_within_a_tick_are_put_in_order() -> None:
    """The numbers follow each other, so they go together with the others; the newest stamp is the last sample."""
    messages = steady(200)
    now, seqs = max(e.event_ns for e in messages), {}
    for e in messages:
        seqs[e.topic] = max(seqs.get(e.topic, -1), e.seq)
    begin = -(-now // T) * T
    clock = Envelope(topics.CLOCK, topics.EVERYONE, 0, begin, begin, begin, b"")
    messages.append(clock)
    for name in SIZES:
        for i, step in enumerate((10, 30, 20, 30)):
            at, seq = begin + step * MS, seqs[topics.feature(name)] + 1 + i
            payload = np.full(SIZES[name], 1 + i / 3, np.float32)
            messages.append(Envelope(topics.feature(name), "s", seq, at, at, at, payload, "mel@1"))
    messages += [msgspec.structs.replace(clock, event_ns=begin + ms * MS) for ms in (50, 100, 150, 200)]
    one, many = aligner(), ColumnAligner(aligner())
    expected = facts(list(predict(messages, one, NoEngine())))
    assert facts_of(many.push(columns_of(messages))) == expected
    assert state(many.aligner) == state(one)
    assert all(counts.non_monotonic == 2 for counts in one.counts.values())
    assert many.pushed < 50
