from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.types import Envelope, Mark
from stream_mmrnn.live.journal import Ask, Frames, Journal, JournalAnswer, Keep, request

S = 1_000_000_000


def message(n: int, topic: str = topics.CLOCK, size: int = 0) -> Frames:
    """The n-th of the bus, at n ms; numbers begin anew with every tenth."""
    a, b, c = wire.encode(Envelope(topic, "s", n % 10, n, n, n * 1_000_000, bytes(size)))
    return bytes(a), bytes(b), bytes(c)


def mark(n: int, topic: str = topics.CLOCK) -> Mark:
    return Mark(topic, "s", n % 10, n * 1_000_000)


def filled(count: int, *, complete: bool = True, keep_s: float = 1000, keep_bytes: int = 1 << 30) -> Journal:
    journal = Journal(keep_s, keep_bytes, complete)
    for n in range(count):
        journal.add(message(n), n * 1_000_000)
    return journal


@given(st.integers(1, 60), st.data())
def test_what_follows_a_checkpoint_is_given_once_and_in_order(count: int, data: st.DataObject) -> None:
    journal = filled(count)
    at = data.draw(st.integers(0, count - 1))
    until = data.draw(st.integers(at, count - 1))
    journal.save(Keep(mark(at), None, b"x"))
    answer = journal.answer(Ask(mark(until)))
    assert (answer.refused, answer.content) == ("", b"x")
    assert answer.messages == [message(n) for n in range(at + 1, until + 1)]


def test_without_a_checkpoint_the_beginning_is_as_good() -> None:
    assert filled(30).answer(Ask(mark(20))) == JournalAnswer(b"", [message(n) for n in range(21)])
    refused = filled(30, complete=False).answer(Ask(mark(20)))
    assert refused.messages == []
    assert "does not reach back" in refused.refused


def test_a_checkpoint_of_what_never_reached_the_bus_is_passed_over() -> None:
    journal = filled(10)
    journal.add(message(100, topics.PREDICTION), 0)
    for n in range(10, 20):
        journal.add(message(n), 0)
    journal.save(Keep(mark(5), None, b"old"))
    journal.save(Keep(mark(12), mark(100, topics.PREDICTION), b"sent"))
    journal.save(Keep(mark(15), mark(101, topics.PREDICTION), b"not sent"))
    answer = journal.answer(Ask(mark(19)))
    assert answer.content == b"sent"
    assert answer.messages == [message(n) for n in range(13, 20)]
    # ticks are there to know what was sent; an engine does not read them
    assert Journal.answer(_with_old_only(journal), Ask(mark(19))).messages == [message(n) for n in range(6, 20)]


def _with_old_only(journal: Journal) -> Journal:
    journal._checkpoints.pop()
    journal._checkpoints.pop()
    return journal


def test_it_is_bounded_in_time_and_bytes() -> None:
    journal = filled(5000, keep_s=1)
    assert 1000 <= len(journal) <= 1002
    assert "does not reach back" in journal.answer(Ask(mark(4999))).refused
    journal.save(Keep(mark(100), None, b"too old"))
    assert "does not reach back" in journal.answer(Ask(mark(4999))).refused
    journal.save(Keep(mark(4500), None, b"x"))
    assert len(journal.answer(Ask(mark(4999))).messages) == 499

    small = Journal(1000, 100_000, complete=True)
    for n in range(1000):
        small.add(message(n, size=1000), n)
        assert small.bytes <= 100_000
    assert 50 < len(small) < 100
    small.add(message(1000, size=200_000), 1000)
    assert (len(small), small.bytes) == (0, 0)
    small.add(message(1001), 1001)
    assert len(small) == 1


def test_what_it_has_not_heard_is_no_end() -> None:
    journal = filled(30)
    assert not journal.heard(mark(31))
    assert "has not received" in journal.answer(Ask(mark(31))).refused
    # the same number from another publisher is another message
    assert not journal.heard(Mark(topics.CLOCK, "s", 3, 3_000_001))
    assert not journal.heard(Mark(topics.SESSION, "s", 3, 3_000_000))


def test_a_place_that_ends_every_engine_is_given_up() -> None:
    journal = filled(100)
    journal.save(Keep(mark(10), None, b"a"))
    for _ in range(3):
        assert journal.answer(Ask(mark(99))).content == b"a"
        journal.save(Keep(mark(10), None, b"a"))  # on its way to the same end it passes the same places
    assert "3 engines in a row" in journal.answer(Ask(mark(99))).refused
    assert "does not reach back" in journal.answer(Ask(mark(99))).refused
    # what begins anew can go on again
    journal.save(Keep(mark(90), None, b"b"))
    assert journal.answer(Ask(mark(99))).content == b"b"


def test_progress_is_a_checkpoint_that_is_new() -> None:
    journal = filled(100)
    for n in range(10):
        journal.save(Keep(mark(n), None, b"%d" % n))
        for _ in range(2):
            assert journal.answer(Ask(mark(99))).content == b"%d" % n


@given(st.binary(max_size=200))
def test_garbage_on_the_bus_is_stepped_over(garbage: bytes) -> None:
    journal = filled(10)
    journal.add((b"clock", garbage, garbage), 0)
    journal.add((garbage, garbage, b""), 0)
    journal.add(message(10), 0)
    assert journal.heard(mark(3))
    assert len(journal.answer(Ask(mark(10))).messages) in (12, 13)


@given(st.binary(max_size=100))
def test_a_request_that_is_none_is_an_error_of_one_kind(garbage: bytes) -> None:
    for made in (Keep(mark(1), mark(2), b"x"), Keep(mark(1), None, b""), Ask(mark(1))):
        assert request.decode(msgspec.msgpack.encode(made)) == made
    with pytest.raises(msgspec.MsgspecError):
        request.decode(garbage + b"\xc1")
