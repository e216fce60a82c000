from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.bus.reader_queue import ReaderQueue
from stream_mmrnn.core.types import Envelope

TOPICS = ("feature/audio", "feature/vision", "prediction")
# put a message of a topic and session, pop one, or clear after a pause
actions = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(TOPICS), st.sampled_from(("a", "b"))),
        st.just("take"),
        st.just("take"),
        st.just("away"),
    ),
    max_size=200,
)


def run(backlog: ReaderQueue, todo: list[object], keep: object) -> tuple[list[Envelope], list[Envelope]]:
    """Run operations on a queue and on a list as the model; returns the messages put and popped."""
    put: list[Envelope] = []
    taken: list[Envelope] = []
    model: list[Envelope] = []
    for action in todo:
        if isinstance(action, tuple):
            envelope = Envelope(action[0], action[1], len(put), 0, 0, 0, b"")
            put.append(envelope)
            backlog.put(envelope)
            model = keep([*model, envelope])  # type: ignore[operator]
        elif action == "take":
            got = backlog.pop()
            assert got == (model.pop(0) if model else None)
            taken += [got] if got else []
        else:
            backlog.clear()
            model = []
        assert len(backlog) == len(model)
    return put, taken


def check_sums(backlog: ReaderQueue, put: list[Envelope], taken: list[Envelope]) -> None:
    waiting = backlog.waiting()
    for topic in TOPICS:
        dropped = sum(backlog.dropped.get(topic, {}).values())
        assert sum(e.topic == topic for e in put) == backlog.delivered[topic] + waiting[topic] + dropped
        assert backlog.delivered[topic] == sum(e.topic == topic for e in taken)
    assert [e.seq for e in taken] == sorted(e.seq for e in taken), "a backlog keeps the order"


@given(actions, st.integers(1, 8))
def test_drop_oldest_keeps_the_newest_of_all(todo: list[object], length: int) -> None:
    backlog = ReaderQueue("drop_oldest", length)
    put, taken = run(backlog, todo, lambda waiting: waiting[-length:])
    check_sums(backlog, put, taken)
    assert {r for reasons in backlog.dropped.values() for r in reasons} <= {"oldest", "stale"}


@given(actions, st.integers(1, 8))
def test_latest_keeps_the_newest_of_each_stream(todo: list[object], length: int) -> None:
    def newest(waiting: list[Envelope]) -> list[Envelope]:
        new = waiting[-1]
        others = [e for e in waiting[:-1] if (e.topic, e.session) != (new.topic, new.session)]
        return [*others, new][-length:]

    backlog = ReaderQueue("latest", length)
    put, taken = run(backlog, todo, newest)
    check_sums(backlog, put, taken)
