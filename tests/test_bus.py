from __future__ import annotations

import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from stream_mmrnn import topics
from stream_mmrnn.bus import Address, Caller, Gaps, Publisher, Subscriber, Tap, run_broker
from stream_mmrnn.errors import ProcessError
from stream_mmrnn.types import Envelope


@pytest.fixture(params=["ipc", "tcp"])
def address(request: pytest.FixtureRequest) -> Iterator[Address]:
    made = Address.create(request.param)
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=run_broker, args=(made, 1000, ready.set, lambda: not stop.wait(0.02)))
    thread.start()
    assert ready.wait(5)
    yield made
    stop.set()
    thread.join(5)
    assert not thread.is_alive()
    made.remove()
    assert not made.folder or not Path(made.folder).exists()


def drain(subscriber: Subscriber, count: int) -> list[Envelope]:
    got = []
    while len(got) < count:
        envelope = subscriber.receive(5000)
        assert envelope is not None, f"only {len(got)} of {count} came"
        got.append(envelope)
    return got


def test_all_readers_see_one_order(address: Address) -> None:
    readers = [Subscriber(address, ["feature/"], 10_000) for _ in range(3)]
    publishers = [Publisher(address, 10_000) for _ in range(3)]
    names = ("vision", "audio", "text")
    for p, name in zip(publishers, names, strict=True):
        assert p.wait_for_reader(f"feature/{name}", 5)
    # a reader is sure to be heard of once something reaches it
    for p in publishers:
        p.publish("feature/text", "warm", 0, 0, b"")
    for r in readers:
        drain(r, 3)

    def send(p: Publisher, name: str) -> None:
        for i in range(300):
            p.publish(f"feature/{name}", "s", i, i, np.full(4, i, np.float32), "o")

    threads = [threading.Thread(target=send, args=x) for x in zip(publishers, names, strict=True)]
    for t in threads:
        t.start()
    got = [[(e.topic, e.seq) for e in drain(r, 900)] for r in readers]
    for t in threads:
        t.join()
    assert got[0] == got[1] == got[2]
    for r in readers:
        assert not any(r.gaps.lost.values())
        assert sum(r.gaps.received.values()) == 903
        r.close()
    for p in publishers:
        p.close()


def test_what_is_waiting_is_received_at_once_and_garbage_is_not_waiting(address: Address) -> None:
    reader, publisher = Subscriber(address, [""], 100), Publisher(address, 100)
    assert publisher.wait_for_reader("feature/audio", 5)
    publisher.publish("feature/audio", "s", 0, 0, b"")
    drain(reader, 1)
    assert not reader.waiting()
    publisher._socket.send_multipart([b"feature/audio", b"no header", b""])
    publisher.publish("feature/audio", "s", 1, 1, b"")
    deadline = time.monotonic() + 5
    while not reader.waiting():
        assert time.monotonic() < deadline
    assert reader.waiting()
    envelope = reader.receive(0)
    assert envelope is not None
    assert (envelope.seq, reader.garbage) == (1, 1)
    assert not reader.waiting()
    assert reader.receive(0) is None
    reader.close()
    publisher.close()


def test_garbage_is_counted_and_dropped(address: Address) -> None:
    reader = Subscriber(address, [""], 100)
    publisher = Publisher(address, 100)
    context = zmq.Context()
    stranger = context.socket(zmq.PUB)
    stranger.connect(address.publish)
    assert publisher.wait_for_reader("clock", 5)
    for _ in range(200):
        stranger.send_multipart([b"clock", b"\xff\xfe", b""])
        stranger.send(b"hello")
        if reader.receive(20) is None and reader.garbage:
            break
    assert reader.garbage
    publisher.publish(topics.CLOCK, topics.EVERYONE, 1, 1, b"")
    while (envelope := reader.receive(5000)) is None:
        pass
    assert envelope.event_ns == 1
    stranger.close(0)
    context.term()
    reader.close()
    publisher.close()


def test_the_folder_of_the_sockets_is_private() -> None:
    address = Address.create("ipc")
    assert stat.S_IMODE(Path(address.folder).stat().st_mode) == 0o700
    address.remove()


def test_nobody_listens(tmp_path: Path) -> None:
    publisher = Publisher(Address(f"ipc://{tmp_path}/a", f"ipc://{tmp_path}/b"), 10)
    assert not publisher.wait_for_reader("clock", 0.05)
    for i in range(30):
        publisher.publish("clock", "s", i, i, b"")
    publisher.close(0)


def test_a_place_that_is_taken() -> None:
    address = Address.create("tcp")
    context = zmq.Context()
    squatter = context.socket(zmq.PUB)
    squatter.bind(address.publish)
    with pytest.raises(ProcessError, match="cannot bind"):
        run_broker(address, 10, lambda: None, lambda: False)
    squatter.close(0)
    context.term()


def test_gaps_are_counted_per_stream() -> None:
    gaps = Gaps()

    def see(topic: str, seq: int, session: str = "s") -> None:
        gaps.see(Envelope(topic, session, seq, 0, 0, 0, b""))

    for seq in (0, 1, 4, 5):
        see("feature/audio", seq)
    see("feature/vision", 2)  # a session's stream begins at 0
    see("feature/audio", 0)  # the publisher began anew
    see("feature/audio", 2)
    see("clock", 900, topics.EVERYONE)  # the clock began before we listened
    see("clock", 902, topics.EVERYONE)
    assert gaps.lost == {"feature/audio": 3, "feature/vision": 2, "clock": 1}
    assert gaps.received == {"feature/audio": 6, "feature/vision": 1, "clock": 2}


def test_a_publisher_and_a_count_of_gaps_go_on_where_another_was(address: Address) -> None:
    reader = Subscriber(address, ["feature/"], 100)
    first, second = Publisher(address, 100), Publisher(address, 100)
    for p in (first, second):
        assert p.wait_for_reader("feature/text", 5)
    for i in range(3):
        first.publish("feature/text", "s", i, i, b"")
    drain(reader, 3)
    second.go_on(first.numbers())
    second.publish("feature/text", "s", 3, 3, b"")
    assert drain(reader, 1)[0].seq == 3
    assert reader.gaps.lost == {}
    gaps = Gaps()
    gaps.restore(*reader.gaps.snapshot())
    assert vars(gaps) == vars(reader.gaps)
    assert set(vars(gaps)) == {"_next", "received", "lost"}, "is what came new part of its snapshot?"
    gaps.see(Envelope("feature/text", "s", 6, 0, 0, 0, b""))
    assert gaps.lost == {"feature/text": 2}
    assert reader.gaps.lost == {}
    for p in (first, second):
        p.close()
    reader.close()


def test_who_hears_the_clock_hears_everything_else(address: Address) -> None:
    """A reader subscribes to the clock last: what is sent after a clock that it heard cannot pass it by."""
    publisher = Publisher(address, 10_000)
    early = Subscriber(address, ["clock", "feature/", "session"], 10_000)
    assert publisher.wait_for_reader("session", 5)
    for _ in range(10):
        reader = Subscriber(address, ["feature/", "clock", "session"], 10_000)
        heard = None
        while heard is None:
            publisher.publish("session", "s", 0, 0, b"")
            publisher.publish("clock", "host", 0, 0, b"")
            while heard is None and (e := reader.receive(5)) is not None:
                heard = e if e.topic == "clock" else None
        sent = publisher.publish("session", "s", 1, 1, b"").seq
        got = []
        while (e := reader.receive(200)) is not None:
            got.append((e.topic, e.seq))
        assert ("session", sent) in got
        reader.close()
    early.close()
    publisher.close()


def test_the_journal_hears_raw_messages_and_answers_requests(address: Address) -> None:
    tap = Tap(address, ["feature/", "clock"], 1000)
    publisher = Publisher(address, 1000)
    assert publisher.wait_for_reader("clock", 5)
    sent = [publisher.publish("feature/text", "s", i, i, b"x") for i in range(5)]
    got: list[list[bytes]] = []
    end = time.monotonic() + 5
    while len(got) < 5 and time.monotonic() < end:
        got += tap.messages()
    assert [f[0] for f in got] == [b"feature/text"] * 5
    assert len({f[1] for f in got}) == len(sent)

    assert tap.request(0) is None
    caller = Caller(address)
    assert caller.send(b"keep this")
    request = tap.request(5000)
    assert request is not None
    assert request[1] == b"keep this"
    answers: list[bytes | None] = []
    asking = threading.Thread(target=lambda: answers.append(caller.ask(b"what?", 5000)))
    asking.start()
    request = tap.request(5000)
    assert request is not None
    tap.answer(request[0], b"a" * 1_000_000)
    asking.join(5)
    assert answers == [b"a" * 1_000_000]
    if address.journal.startswith("tcp:"):  # over ipc a new one takes the place of a dead one
        with pytest.raises(ProcessError, match="cannot bind"):
            Tap(address, ["clock"], 10)
    tap.answer(b"nobody", b"")
    caller.close()
    tap.close()
    publisher.close()


def test_nobody_waits_for_a_journal_that_stands_still(tmp_path: Path) -> None:
    caller = Caller(Address("", "", journal=f"ipc://{tmp_path}/journal"))
    began = time.monotonic()
    taken = [caller.send(b"x" * 1000) for _ in range(10)]
    assert not all(taken)
    assert caller.ask(b"?", 20) is None
    assert time.monotonic() - began < 5
    caller.close()
