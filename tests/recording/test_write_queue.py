from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn.bus import Address, Publisher
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live import nodes
from stream_mmrnn.recording.append_file import Disk
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.message_counts import CLOSING, LOST, REFUSED, SLOW, UNWRITABLE, MessageCounts
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.report import verify
from stream_mmrnn.recording.write_queue import WriteQueue

BEGIN = 5_000_000_000_123_456
NAMES = ("raw/vision", "raw/audio", "feature/audio", "clock", "session")


def message(topic: str, seq: int, size: int = 100) -> Envelope:
    payload: Any = bytes(size)
    session = topics.EVERYONE if topic == topics.CLOCK else "live"
    at_ns = BEGIN + seq * 1_000_000
    if topic == topics.SESSION:
        payload = wire.pack(wire.SessionMessage("streams", at_ns, ()))
    elif topic.startswith(topics.FEATURE):
        payload = np.zeros(size // 4, np.float32)
    elif topic == "raw/audio":
        payload = np.zeros(size // 2, np.int16)
    elif topic == topics.CLOCK:
        payload = b""
    return Envelope(topic, session, seq, at_ns, at_ns, at_ns, payload, "origin")


class Gate(Disk):
    """A disk whose writes block while it is shut, and fail half-way while it is full."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Event()
        self.full = False
        self.sync_open = threading.Event()
        self.sync_open.set()
        self.sync_error = 0
        self.syncs = 0

    def write(self, at: int, data: bytes) -> None:
        if not self.open.is_set():
            self.waiting.set()
            assert self.open.wait(30)
        if self.full:
            super().write(at, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(at, data)

    def sync(self) -> None:
        self.syncs += 1
        assert self.sync_open.wait(30)
        if self.sync_error:
            raise OSError(self.sync_error, "Input/output error")
        super().sync()


class Made:
    def __init__(self, path: Path, limit: int = 10_000_000, policy: Any = "drop_oldest", **more: Any) -> None:
        disks: list[Gate] = []

        def make(path: Path) -> Disk:
            disks.append(Gate(path))
            return disks[0]

        self.path = path
        recorder = Recorder(path, "live", {"config": "{}"}, chunk_ms=20, open_disk=make)
        self.write_queue = WriteQueue(recorder, limit, policy, **more)
        self.disk = disks[0]

    def put(self, topic: str, count: int, size: int = 100, first: int = 0) -> None:
        for i in range(count):
            assert self.write_queue.put(message(topic, first + i, size))

    def close(self, timeout_s: float = 20) -> bool:
        return self.write_queue.close({"ended": "clean"}, timeout_s)

    @property
    def message_counts(self) -> MessageCounts:
        return MessageCounts.of(Recording(self.path).end or list_end(self.path))


def list_end(path: Path) -> dict[str, str]:
    recording = Recording(path)
    for _ in recording.envelopes():
        pass
    return recording.end


def wait_for(what: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    made = Made(tmp_path / "a.mcap", 100_000)
    yield made
    made.disk.open.set()
    made.disk.sync_open.set()
    made.write_queue._finished.set()


def check(made: Made, produced: dict[str, int]) -> MessageCounts:
    """Check that the counts are consistent, and match the file and the messages that were put."""
    counts = made.message_counts
    assert counts.off == {}
    assert counts.waiting == {}
    assert counts.produced == produced
    there = Counter(e.topic for e in Recording(made.path).envelopes())
    assert counts.recorded == dict(there)
    result = verify(made.path)
    assert result["whole"], result
    assert result["dropped"] == counts.dropped
    return counts


def test_messages_are_written_in_order(tmp_path: Path) -> None:
    made = Made(tmp_path / "a.mcap")
    for i in range(100):
        for name in NAMES:
            made.put(name, 1, first=i)
    assert made.close()
    check(made, dict.fromkeys(NAMES, 100))
    read = [(e.topic, e.seq) for e in Recording(made.path).envelopes()]
    assert read == [(name, i) for i in range(100) for name in NAMES]
    assert made.write_queue.trouble == ""


def test_a_hanging_disk_does_not_block_the_bus(made: Made) -> None:
    made.put("session", 1)
    made.disk.open.clear()
    wait_for(made.disk.waiting.is_set)
    # the writer blocks in `write`; meanwhile a hundred times the queue's limit arrives
    for i in range(200):
        made.put("raw/vision", 1, 50_000, i)
        made.put("feature/audio", 1, 400, i)
        made.put("session", 1, first=1 + i)
    assert made.write_queue._bytes <= 100_000
    assert "did not keep up" in made.write_queue.trouble
    made.disk.open.set()
    assert made.close()
    counts = check(made, {"raw/vision": 200, "feature/audio": 200, "session": 201})
    # raw pictures were dropped first, session messages never
    assert counts.dropped.keys() == {"raw/vision", "feature/audio"}
    assert counts.dropped["raw/vision"][SLOW] >= 198
    assert counts.recorded["session"] == 201


def test_raw_messages_are_dropped_first(made: Made) -> None:
    made.disk.open.clear()
    made.put("clock", 1)
    wait_for(made.disk.waiting.is_set)
    made.put("feature/audio", 60, 400)
    made.put("raw/audio", 300, 640)
    made.disk.open.set()
    assert made.close()
    counts = check(made, {"clock": 1, "feature/audio": 60, "raw/audio": 300})
    assert counts.dropped.keys() == {"raw/audio"}
    kept = [e.seq for e in Recording(made.path).envelopes({"raw/audio"})]
    assert kept == list(range(300 - len(kept), 300)), "the newest are kept"


def test_block_drops_nothing(tmp_path: Path) -> None:
    made = Made(tmp_path / "a.mcap", 50_000, "block")
    made.put("clock", 1)
    made.disk.open.clear()
    wait_for(made.disk.waiting.is_set)
    taken = 0
    while made.write_queue.put(message("raw/audio", taken, 640)):
        taken += 1
    assert 0 < taken < 100
    made.disk.open.set()
    wait_for(lambda: made.write_queue.put(message("raw/audio", taken, 640)))
    assert made.close()
    assert check(made, {"clock": 1, "raw/audio": taken + 1}).dropped == {}


def test_recording_continues_after_a_full_disk(made: Made) -> None:
    made.put("feature/audio", 50, 400)
    wait_for(lambda: len(list(Recording(made.path).envelopes())) == 50)
    made.disk.full = True
    made.put("feature/audio", 1, 400, 50)
    wait_for(lambda: "No space left on device" in made.write_queue.trouble)
    made.put("feature/audio", 500, 400, 51)
    # the file is readable to its end, without a partial write
    made.disk.open.clear()
    wait_for(made.disk.waiting.is_set)
    size = made.path.stat().st_size
    recording = Recording(made.path)
    assert len(list(recording.envelopes())) == 50
    assert f"damaged at byte {size} of {size}" in recording.damage
    assert verify(made.path)["state"] == "being recorded"
    made.disk.full = False
    made.disk.open.set()
    wait_for(lambda: "No space" not in made.write_queue.trouble)
    made.put("feature/audio", 10, 400, 551)
    assert made.close()
    counts = check(made, {"feature/audio": 561})
    assert counts.dropped["feature/audio"].keys() <= {REFUSED, SLOW}
    assert counts.dropped["feature/audio"][REFUSED] > 300


def test_a_disk_that_stays_full_leaves_a_readable_file(made: Made) -> None:
    made.put("feature/audio", 50, 400)
    wait_for(lambda: len(list(Recording(made.path).envelopes())) == 50)
    made.disk.full = True
    made.put("feature/audio", 50, 400, 50)
    assert made.close(0.3) is False
    result = verify(made.path)
    assert result["state"] == "cut off"
    assert result["messages"] == {"feature/audio": 50}
    assert made.write_queue.counts["dropped"] + made.write_queue.counts["messages"] == 100


def test_messages_not_written_by_the_deadline_are_counted(made: Made) -> None:
    made.put("clock", 1)
    made.disk.open.clear()
    wait_for(made.disk.waiting.is_set)
    made.put("clock", 50, first=1)
    threading.Timer(0.3, made.disk.open.set).start()
    assert made.close(0.05)
    counts = check(made, {"clock": 51})
    assert sum(counts.dropped.get("clock", {}).values()) in (0, 50)
    assert counts.dropped.get("clock", {}).keys() <= {CLOSING}


def test_a_hanging_sync_blocks_nothing(tmp_path: Path) -> None:
    made = Made(tmp_path / "a.mcap", fsync_ms=1)
    made.disk.sync_open.clear()
    wait_for(lambda: made.disk.syncs)
    made.put("feature/audio", 500, 400)
    wait_for(lambda: len(list(Recording(made.path).envelopes())) == 500)
    made.disk.sync_open.set()
    assert made.close()
    check(made, {"feature/audio": 500})


def test_a_failed_sync_is_reported(tmp_path: Path) -> None:
    made = Made(tmp_path / "a.mcap", fsync_ms=1)
    made.disk.sync_error = errno.EIO
    wait_for(lambda: "Input/output error" in made.write_queue.trouble)
    made.disk.sync_error = 0
    wait_for(lambda: made.write_queue.trouble == "")
    assert made.close()


def test_the_file_of_a_killed_recorder_has_drop_counts(made: Made, tmp_path: Path) -> None:
    made.put("clock", 1)
    made.disk.open.clear()
    wait_for(made.disk.waiting.is_set)
    made.put("raw/vision", 20, 50_000)
    made.disk.open.set()
    wait_for(lambda: verify(made.path)["dropped"])
    copy = tmp_path / "killed.mcap"
    copy.write_bytes(made.path.read_bytes())
    made.close()
    result = verify(copy)
    assert result["state"] == "cut off"
    assert result["dropped"]["raw/vision"][SLOW] >= 18
    assert result["adds_up"]


def test_lost_and_unwritable_messages_are_counted(made: Made) -> None:
    made.put("clock", 2, first=70)  # the clock began before the recorder
    made.put("clock", 2, first=75)
    made.put("feature/audio", 3, first=2)  # a session's streams begin at 0
    bad = Envelope("feature/audio", "live", 5, 0, 0, -(2**62), np.zeros(1, np.float32))
    assert made.write_queue.put(bad)
    made.put("feature/audio", 2)  # a worker that was restarted
    assert made.close()
    counts = check(made, {"clock": 7, "feature/audio": 8})
    assert counts.dropped == {"clock": {LOST: 3}, "feature/audio": {LOST: 2, UNWRITABLE: 1}}


def test_a_later_part_does_not_count_earlier_messages_as_lost(tmp_path: Path) -> None:
    made = Made(tmp_path / "a.mcap", later_part=True)
    made.put("feature/audio", 3, first=100)
    assert made.close()
    assert check(made, {"feature/audio": 3}).dropped == {}


def test_an_exception_of_the_writer_is_raised(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise AssertionError("a fault of ours")

    monkeypatch.setattr(made.write_queue.recorder, "write", fail)
    made.put("clock", 1)
    with pytest.raises(AssertionError, match="a fault of ours"):
        made.close()
    with pytest.raises(AssertionError, match="a fault of ours"):
        made.put("clock", 1)
    made.disk.close()


@settings(max_examples=25)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(NAMES), st.integers(1, 40), st.sampled_from([4, 400, 20_000])),
            st.sampled_from(["hang", "go", "full", "free"]),
        ),
        max_size=25,
    ),
    st.sampled_from([3_000, 60_000]),
)
def test_counts_are_consistent_whatever_the_disk_does(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any], limit: int
) -> None:
    made = Made(tmp_path_factory.mktemp("a") / "a.mcap", limit)
    produced: Counter[str] = Counter()
    for step in steps:
        if step == "hang":
            made.disk.open.clear()
        elif step == "go":
            made.disk.open.set()
        elif isinstance(step, str):
            made.disk.full = step == "full"
        else:
            topic, count, size = step
            made.put(topic, count, size, produced[topic])
            produced[topic] += count
    made.disk.full = False
    made.disk.open.set()
    assert made.close()
    check(made, dict(produced))


def test_a_prediction_is_recorded_after_a_full_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder's node on a real bus, with a queue that is full at the first try: the retry is not a duplicate."""
    path = tmp_path / "a.mcap"
    asked = config.parse({"record": {"path": str(path), "policy": "block"}, "session": {"name": "s"}})
    address = Address.create("ipc")
    contexts = {
        n: nodes.Context(n, asked, address, threading.Event(), threading.Event(), None)  # type: ignore[arg-type]
        for n in ("broker", "clock", "recorder")
    }
    put, tried = WriteQueue.put, set[tuple[str, int]]()

    def full_at_first(self: WriteQueue, envelope: Envelope) -> bool:
        key = (envelope.topic, envelope.seq)
        if key in tried:
            return put(self, envelope)
        tried.add(key)
        return False

    monkeypatch.setattr(WriteQueue, "put", full_at_first)
    running = {n: threading.Thread(target=nodes.create(c).run) for n, c in contexts.items()}
    for name, thread in running.items():
        thread.start()
        assert contexts[name].ready.wait(20)
    publisher = Publisher(address, 100)
    assert publisher.wait_for_reader(topics.SESSION, 20)
    publisher.publish(topics.SESSION, "s", 1, 1, wire.pack(wire.SessionMessage("open", 1)))
    for k in range(5):
        publisher.publish(topics.PREDICTION, "s", k, k, msgspec.json.encode({"event_ns": k, "tick": k}))
    publisher.publish(topics.CONTROL, "s", 0, 0, b"stop")
    running["recorder"].join(20)
    for name in ("clock", "broker"):
        contexts[name].stop.set()
        running[name].join(20)
    publisher.close(0)
    address.remove()
    recording = Recording(path)
    assert [e.seq for e in recording.envelopes({topics.PREDICTION})] == list(range(5))
    assert recording.end["repeated"] == "{}"
