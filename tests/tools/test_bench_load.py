"""The load generator: when it sends, what it counts as answered, late to the clock or lost."""

from __future__ import annotations

from collections.abc import Iterator

from stream_mmrnn.bench.sessions import TICK_NS, phases
from stream_mmrnn.core.errors import Evicted
from tools.bench.load import DRAIN_S, OpenLoop, SessionRecord, Transport, Turn, times

BEGIN_NS = 1_000_000_000
FIRST_NS, SECOND_NS = (BEGIN_NS + int(offset_ns) for offset_ns in phases(2, "spread", 0))


class Recorded(Transport):
    def __init__(self) -> None:
        self.sent: list[tuple[int, int, int]] = []
        self.full: set[int] = set()

    def accepts(self, record: SessionRecord) -> bool:
        return record.who not in self.full

    def send(self, record: SessionRecord, tick: int, due_ns: int) -> None:
        self.sent.append((due_ns, record.who, tick))


class Clock:
    def __init__(self) -> None:
        self.now_ns = BEGIN_NS - 1_000_000

    def __call__(self) -> int:
        return self.now_ns

    def passed(self, load: OpenLoop, transport: Transport) -> Iterator[None]:
        """Between the load's waits."""
        for wait_s in load.play(transport):
            yield
            self.now_ns += max(round(wait_s * 1e9), 1)


def make(clock: Clock, ticks: int) -> OpenLoop:
    return OpenLoop(["a", "b"], 0, ticks * TICK_NS / 1e9, begin_ns=BEGIN_NS, clock_ns=clock)


def test_ticks_are_sent_in_order_until_the_end() -> None:
    clock, transport = Clock(), Recorded()
    load = make(clock, 2)
    for _ in clock.passed(load, transport):
        for _, who, tick in transport.sent:
            load.answered(load.records[who], tick)
    assert not load.due
    assert transport.sent == [
        (FIRST_NS, 0, 0),
        (SECOND_NS, 1, 0),
        (FIRST_NS + TICK_NS, 0, 1),
        (SECOND_NS + TICK_NS, 1, 1),
    ]


def test_an_answer_counts_once_and_from_the_due_time() -> None:
    clock, transport = Clock(), Recorded()
    load = make(clock, 3)
    for _ in clock.passed(load, transport):
        if not load.due:
            break
    clock.now_ns = load.records[0].due_ns[2] + 5_000_000
    for _ in range(2):
        load.answered(load.records[0], 2)
    load.answered(load.records[0], 3)  # it was never sent
    turn = load.turn(2 * TICK_NS / 1e9)
    assert (turn.requests, turn.latency_ns) == (2, [5_000_000])
    assert 0 < turn.path_ns[0] <= 5_000_000
    assert [record.missing for record in load.records] == [2, 3]
    assert [record.repeated for record in load.records] == [1, 0]


def test_a_lost_answer_is_waited_for_until_the_timeout() -> None:
    clock, transport = Clock(), Recorded()
    load = make(clock, 1)
    for _ in clock.passed(load, transport):
        pass
    assert clock.now_ns - SECOND_NS >= DRAIN_S * 1e9
    assert load.turn(0.0) == Turn(2, [], [], {})


def test_a_full_session_waits_alone_and_keeps_its_due_times() -> None:
    clock, transport = Clock(), Recorded()
    load = make(clock, 2)
    transport.full.add(0)
    for _ in clock.passed(load, transport):
        if clock.now_ns > BEGIN_NS + 3 * TICK_NS:
            transport.full.clear()
        for _, who, tick in transport.sent:
            load.answered(load.records[who], tick)
    assert [who for _, who, _ in transport.sent] == [1, 1, 0, 0]
    assert load.records[0].due_ns == [FIRST_NS, FIRST_NS + TICK_NS]


def test_the_error_of_a_session_ends_it() -> None:
    class Evicting(Recorded):
        def send(self, record: SessionRecord, tick: int, due_ns: int) -> None:
            super().send(record, tick, due_ns)
            if record.who == 0:
                raise Evicted("another client has it")

    clock, transport = Clock(), Evicting()
    load = make(clock, 2)
    for _ in clock.passed(load, transport):
        pass
    assert [(who, tick) for _, who, tick in transport.sent] == [(0, 0), (1, 0), (1, 1)]
    assert load.turn(0.0).errors == {"Evicted": 1}


def test_ticks_go_on_while_the_load_is_extended() -> None:
    clock, transport = Clock(), Recorded()
    extended = lambda: clock.now_ns < BEGIN_NS + 3 * TICK_NS  # noqa: E731
    load = OpenLoop(["a"], 0, TICK_NS / 1e9, begin_ns=BEGIN_NS, extended=extended, clock_ns=clock)
    for _ in clock.passed(load, transport):
        if not load.due:
            break
    assert len(transport.sent) > 2


def test_rounds_are_compared_pair_by_pair() -> None:
    nan = float("nan")
    assert times([2.0, 9.0, nan, 4.0], [1.0, 3.0, 1.0]) == 2.5
    assert times([], [1.0]) is None
