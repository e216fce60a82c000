"""Subscriptions on real buses and real sessions."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from harness import Running
from hypothesis import given
from hypothesis import strategies as st

import stream_mmrnn
from stream_mmrnn.bus import Address, Authenticator, Publisher, run_broker
from stream_mmrnn.bus.keys import KeyFolder
from stream_mmrnn.bus.prediction_reader import PredictionReader, PredictionView, document
from stream_mmrnn.bus.subscription import Subscription
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import NotRunning, TimedOut, UsageError
from stream_mmrnn.core.settings import Policy
from stream_mmrnn.core.types import Envelope, HeadSpec, Prediction, Stamps, Tick

pytestmark = pytest.mark.process

MS = 1_000_000
HEADS = (HeadSpec("next", "classification", 1), HeadSpec("ahead", "activity_projection", 2, ("a", "b"), ((0, 1),) * 2))
SPEC = {"name": "m", "sha256": "ab" * 32, "tick_ns": 40 * MS, **msgspec.to_builtins({"heads": HEADS, "modalities": ()})}


def prediction(index: int, session: str = "anna", value: float = 0.25) -> bytes:
    end_ns = index * 40 * MS
    stamps = Stamps(end_ns + MS, end_ns + 2 * MS, end_ns + 3 * MS, end_ns + 4 * MS, "feature/audio")
    tick = Tick(session, index, end_ns, {}, {"audio": True}, {"audio": MS, "text": -1}, stamps)
    heads = {"next": np.array([value], np.float32), "ahead": np.array([0.5, np.nan], np.float32)}
    return wire.pack(wire.prediction_message(Prediction(tick, heads, "ab" * 32, end_ns + 5 * MS, end_ns + 6 * MS)))


def status(state: str = "ready", sessions: int = 1, spec: object = SPEC) -> bytes:
    return wire.pack(wire.StatusMessage("engine", state, 1, counts={"sessions": sessions}, detail={"spec": spec}))  # type: ignore[arg-type]


def envelope(topic: str, payload: bytes, session: str = "anna", seq: int = 0, event_ns: int = 0) -> Envelope:
    return Envelope(topic, session, seq, event_ns, 0, event_ns + 7 * MS, payload)


# --- reading, without a bus


def test_importing_the_package_imports_nothing() -> None:
    code = "import sys, stream_mmrnn; print(sorted({'numpy', 'zmq', 'msgspec', 'torch', 'cv2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
    assert stream_mmrnn.subscribe.__module__ == "stream_mmrnn.bus.subscription"
    with pytest.raises(AttributeError, match="no attribute 'nix'"):
        stream_mmrnn.nix  # noqa: B018


def test_a_prediction_has_labels_and_horizons() -> None:
    reading = PredictionReader()
    assert reading.observe(envelope("status/engine", status())) is None
    p = reading.observe(envelope("prediction", prediction(5), event_ns=200 * MS))
    assert p is not None
    assert (p.session, p.tick, p.event_ns, p.missed) == ("anna", 5, 200 * MS, 0)
    assert p.heads["next"].tolist() == [0.25]
    assert p.heads["next"].dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        p.heads["next"][0] = 1
    assert np.isnan(p.heads["ahead"][1])
    assert p.labels == {"ahead": ("a", "b")}
    assert p.horizons_s == {"ahead": ((0.0, 1.0), (0.0, 1.0))}
    assert p.thresholds == {"next": 0.5}
    assert p.latency_ms == 7
    assert sum(ns for stage, ns in p.stages_ns.items() if stage != "total") == 7 * MS
    assert document(p) == {
        "session": "anna", "tick": 5, "event_ns": 200 * MS, "latency_ms": 7.0, "missed": 0,
        "heads": {"next": [0.25], "ahead": [0.5, None]},
        "present": {"audio": True}, "age_ms": {"audio": 1.0, "text": None}, "model": "ab" * 32,
    }  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["sent", "lost", "again"])), max_size=80),
)
def test_each_tick_is_delivered_once_and_losses_are_counted(script: list[tuple[int, str]]) -> None:
    """An engine counts ticks up, and after a crash sends some again; the bus may lose any message."""
    reading, given_ticks, missed, newest = PredictionReader(), [], 0, -1
    sent: set[int] = set()
    for back, what in script:
        tick = max(0, newest - back % 5) if what == "again" else newest + 1
        newest = max(newest, tick)
        if what == "lost":
            continue
        found = reading.observe(envelope("prediction", prediction(tick)))
        assert (found is None) == (tick in sent)
        sent.add(tick)
        if found is not None:
            given_ticks.append(found.tick)
            missed += found.missed
    assert len(given_ticks) == len(set(given_ticks)) == len(sent)
    if given_ticks and given_ticks == sorted(given_ticks):
        assert missed + len(given_ticks) == given_ticks[-1] - given_ticks[0] + 1


@given(
    topic=st.sampled_from(["prediction", "status/engine", "session", "control", "status/camera", "clock"]),
    payload=st.binary(max_size=64)
    | st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)).map(
        msgspec.json.encode
    )
    | st.builds(lambda s: status(spec=s), st.none() | st.integers() | st.lists(st.text())),
)
def test_any_payload_on_the_bus_is_no_error(topic: str, payload: bytes) -> None:
    reading = PredictionReader()
    assert reading.observe(envelope(topic, payload)) is None
    assert reading.observe(envelope("prediction", prediction(1))) is not None


def test_heads_and_sessions_are_filtered() -> None:
    reading = PredictionReader("anna", ["next"])
    assert reading.observe(envelope("prediction", prediction(1, "bert"), "bert")) is None
    p = reading.observe(envelope("prediction", prediction(1)))
    assert p is not None
    assert list(p.heads) == ["next"]
    with pytest.raises(UsageError, match="no head 'nix'; the model's are ahead, next"):
        PredictionReader(heads=["nix"]).observe(envelope("prediction", prediction(1)))


# --- a real bus; the test acts as the engine


class Bus:
    def __init__(self, address: Address, authenticator: Authenticator | None = None) -> None:
        self.address, self._stop = address, threading.Event()
        ready = threading.Event()
        self._thread = threading.Thread(
            target=run_broker,
            args=(address, 5000, ready.set, lambda: not self._stop.wait(0.02)),
            kwargs={"authenticator": authenticator},
        )
        self._thread.start()
        assert ready.wait(5)
        self.engine = Publisher(address, 5000)
        self.tick = 0

    def report(self, state: str = "ready", sessions: int = 1) -> None:
        self.engine.publish("status/engine", topics.EVERYONE, 0, 0, status(state, sessions))

    def predict(self, count: int, session: str = "anna") -> None:
        for _ in range(count):
            self.tick += 1
            self.engine.publish("prediction", session, self.tick * 40 * MS, 0, prediction(self.tick, session))

    def meet(self, subscription: Subscription) -> PredictionView:
        """Publish predictions until the reader receives one; returns it."""
        self.engine.wait_for_reader("prediction", 10)
        for _ in range(200):
            self.report()
            self.predict(1)
            if found := subscription.receive(0.05):
                return found
        raise AssertionError("the reader never heard the engine")

    def close(self) -> None:
        self.engine.close()
        self._stop.set()
        self._thread.join(5)
        self.address.remove()


@pytest.fixture
def bus() -> Iterator[Bus]:
    with closing(Bus(Address.create("tcp"))) as made:
        yield made


def where(bus: Bus) -> str:
    return bus.address.publish.removeprefix("tcp://")


def test_a_late_reader_counts_no_losses(bus: Bus) -> None:
    bus.predict(500)
    with stream_mmrnn.subscribe("anna", address=where(bus), policy="block", timeout=10) as subscription:
        first = bus.meet(subscription)
        assert first.model is not None
        assert first.model.name == "m"
        bus.predict(100)
        got = [first] + [next(subscription) for _ in range(bus.tick - first.tick)]
        bus.report("closed", 0)
        assert list(subscription) == []
        assert subscription.ended == "the session was closed"
    assert [p.tick for p in got] == list(range(first.tick, bus.tick + 1))
    assert sum(p.missed for p in got) == 0
    assert (subscription.lost, subscription.repeated, subscription.unreadable) == ({}, 0, 0)


@pytest.mark.slow
def test_a_reader_that_is_behind_at_the_end_gets_all_that_was_sent(bus: Bus) -> None:
    with stream_mmrnn.subscribe("anna", address=where(bus), policy="block", timeout=30) as subscription:
        first = bus.meet(subscription)
        bus.engine.publish("session", "anna", 0, now_ns(), wire.pack(wire.SessionMessage("close", 0)))
        bus.predict(8)
        got = []
        for p in subscription:
            got.append(p.tick)
            time.sleep(0.4)
        assert got == list(range(first.tick + 1, bus.tick + 1))
        assert (subscription.ended, subscription.lost) == ("the session was closed", {})


def test_a_reader_may_look_without_waiting(bus: Bus) -> None:
    with Subscription(address=where(bus)) as subscription:
        before = bus.meet(subscription)
        bus.predict(1)
        found = None
        for _ in range(3000):
            found = subscription.receive(0)
            if found is not None and found.tick == bus.tick:
                break
            time.sleep(0.01)
        assert found is not None
        assert found.tick > before.tick


@pytest.mark.slow
def test_a_session_that_is_closed_ends_although_others_go_on(bus: Bus) -> None:
    with stream_mmrnn.subscribe("anna", address=where(bus), policy="block", timeout=30) as subscription:
        bus.meet(subscription)
        closed = wire.pack(wire.SessionMessage("close", 0))
        bus.engine.publish("session", "anna", 0, 0, closed)
        bus.predict(1)
        stop = threading.Event()

        def others() -> None:
            while not stop.wait(0.02):
                bus.predict(1, "bert")

        talking = threading.Thread(target=others)
        talking.start()
        try:
            assert [p.session for p in subscription] == ["anna"], "its last prediction"
        finally:
            stop.set()
            talking.join()
        assert subscription.ended == "the session was closed"


def test_the_end_of_a_session_is_not_the_end_of_its_last_predictions() -> None:
    reading = PredictionReader("anna")
    reading.observe(envelope("control", b"end_recording"))
    reading.observe(envelope("control", b"stop", "bert"))
    assert (reading.closed_ns, reading.over) == (0, "")
    reading.observe(msgspec.structs.replace(envelope("control", b"stop"), received_ns=5))
    assert (reading.closed_ns, reading.over) == (5, "")
    assert reading.observe(envelope("prediction", prediction(1))) is not None


@pytest.mark.parametrize(("policy", "reason"), [("drop_oldest", "oldest"), ("latest", "superseded")])
def test_a_slow_reader_gets_the_newest_and_counts_losses(bus: Bus, policy: Policy, reason: str) -> None:
    with Subscription(address=where(bus), policy=policy, queue=8, timeout=10) as subscription:
        before = bus.meet(subscription)
        while (found := subscription.receive(0.2)) is not None:
            before = found
        lost = sum(subscription.lost.values())
        bus.predict(60)
        time.sleep(0.3)  # more messages than the queue holds
        got = []
        end_ns = now_ns() + 60_000_000_000
        while not got or got[-1].tick < bus.tick:
            assert now_ns() < end_ns, "the newest never came"
            found = subscription.receive(1)
            if found is None:
                bus.predict(1)  # on a busy machine all were too old
            else:
                got.append(found)
        assert before.tick + sum(p.missed + 1 for p in got) == bus.tick
        assert sum(subscription.lost.values()) - lost == sum(p.missed for p in got) > 0
        assert subscription.lost.keys() & {reason, "stale"}


def test_iteration_times_out_and_a_wrong_head_is_named(bus: Bus) -> None:
    with Subscription(address=where(bus), timeout=0.3) as subscription, pytest.raises(TimeoutError, match="came from"):
        next(subscription)
    with Subscription(address=where(bus), heads="nix") as subscription, pytest.raises(UsageError, match="head 'nix'"):
        bus.meet(subscription)
    for wrong in ({"policy": "newest"}, {"queue": 0}, {"timeout": -1}, {"wait": -1}):
        with pytest.raises(UsageError):
            Subscription(address=where(bus), **wrong)  # type: ignore[arg-type]


def test_two_readers_in_one_event_loop(bus: Bus) -> None:
    ticks: dict[str, list[int]] = {"a": [], "b": []}

    async def read(name: str) -> str:
        subscription = Subscription(address=where(bus), policy="block", timeout=20)
        async for p in subscription:
            ticks[name].append(p.tick)
        return subscription.ended

    async def cancelled() -> None:
        with Subscription(address=where(bus)) as subscription:
            task = asyncio.ensure_future(subscription.__anext__())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert subscription.receive(0) is None or subscription.ended == ""

    async def engine() -> None:
        while not all(ticks.values()):
            bus.report()
            bus.predict(1)
            await asyncio.sleep(0.01)
        bus.predict(50)
        bus.report("closed", 0)

    async def main() -> list[object]:
        await cancelled()
        return await asyncio.gather(read("a"), read("b"), engine())

    assert asyncio.run(main())[:2] == ["the session was closed"] * 2
    for seen in ticks.values():
        assert seen == list(range(seen[0], bus.tick + 1))


def test_a_bus_with_keys_is_readable_with_an_allowed_key(tmp_path: Path) -> None:
    ours, theirs = KeyFolder.new(tmp_path / "ours"), KeyFolder.new(tmp_path / "theirs")
    address = Address.create("tcp", keys=ours.keys())
    with closing(Bus(address, ours.authenticator())) as bus:
        with Subscription(address=where(bus), keys=tmp_path / "ours") as own:
            assert bus.meet(own).tick > 0
        stranger = Subscription(address=where(bus), keys=tmp_path / "theirs", server_key=ours.server, timeout=0.5)
        with closing(stranger), pytest.raises(TimedOut):
            next(stranger)
        ours.allow("reader", theirs.client)
        with Subscription(address=where(bus), keys=tmp_path / "theirs", server_key=ours.server) as reader:
            assert bus.meet(reader).tick > 0


def test_a_missing_bus_is_reported() -> None:
    with (
        Subscription(address="127.0.0.1:1", wait=0.2) as subscription,
        pytest.raises(NotRunning, match=r"127.0.0.1:1 in 0.2 s: is it run"),
    ):
        next(subscription)


def test_a_missing_session_is_waited_for() -> None:
    name = named("missing")
    with pytest.raises(NotRunning):
        stream_mmrnn.subscribe(name, wait=0)
    subscription = stream_mmrnn.subscribe(name, wait=0.5, timeout=0.1)
    assert (subscription.session, subscription.model, subscription.lost) == (name, None, {})
    assert subscription.receive(0) is None
    with pytest.raises(NotRunning, match=r"\(waited 0.5 s\)$"):
        next(subscription)
    with stream_mmrnn.subscribe(name, wait=60) as closed:
        pass
    assert list(closed) == []
    assert closed.ended == "it was closed here"

    async def main() -> int:
        async def read() -> None:
            with pytest.raises(NotRunning, match=r"\(waited 0.5 s\)$"):
                await anext(stream_mmrnn.subscribe(name, wait=0.5))

        task, turns = asyncio.ensure_future(read()), 0
        while not task.done():
            await asyncio.sleep(0.01)
            turns += 1
        await task
        return turns

    assert asyncio.run(main()) > 10, "the event loop is free meanwhile"


# --- real sessions


def named(base: str) -> str:
    """A session name that is unique on this machine."""
    return f"{base}-{os.getpid()}"


def running(model: Path, name: str, *more: object) -> Running:
    return Running("--source", "synthetic", "--model", model, "--session", name, *more)


def subscribed(live: Running, name: str) -> Subscription:
    def found() -> Subscription | None:
        try:
            return stream_mmrnn.subscribe(name, policy="block", timeout=20)
        except NotRunning:
            return None

    return live.wait_for(found)  # type: ignore[no-any-return]


def test_a_session_is_found_and_read_until_it_ends(model: Path) -> None:
    name = named("ends")
    with closing(running(model, name, "--duration", "3")) as live:
        got = list(subscribed(live, name))
        code, summary = live.finish()
    assert code == 0
    assert len(got) >= 20
    assert [p.tick for p in got] == list(range(got[0].tick, got[0].tick + len(got)))
    assert all(p.labels == {"next": ("yes", "no")} and p.session == name for p in got)
    assert summary["predictions"] >= len(got)
    with pytest.raises(NotRunning):
        stream_mmrnn.subscribe(name)


def test_a_program_that_starts_first_waits_for_the_session(model: Path) -> None:
    name = named("later")
    subscription = stream_mmrnn.subscribe(name, policy="block", wait=120, timeout=20)
    assert subscription.receive(0.2) is None
    ticks: list[int] = []
    waits = threading.Event()

    async def read() -> None:
        other = stream_mmrnn.subscribe(name, policy="block", wait=120, timeout=20)
        waits.set()
        ticks.extend([p.tick async for p in other])

    thread = threading.Thread(target=asyncio.run, args=(read(),))
    thread.start()
    assert waits.wait(20)
    with closing(running(model, name, "--duration", "3")) as live:
        got = list(subscription)
        code, summary = live.finish()
    thread.join(60)
    assert (code, subscription.ended) == (0, "the session was closed")
    last = got[-1].tick
    assert [p.tick for p in got] == list(range(got[0].tick, last + 1))
    assert ticks == list(range(ticks[0], last + 1))
    assert min(len(got), len(ticks)) >= 20
    assert summary["predictions"] >= len(got)
    assert all(p.model is not None for p in got)


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="needs /proc")
def test_a_killed_engine_loses_and_repeats_nothing(model: Path) -> None:
    name = named("killed")
    with closing(running(model, name)) as live, subscribed(live, name) as subscription:
        got = [next(subscription) for _ in range(15)]
        [engine] = live.wait_for(lambda: live.children("engine"))
        os.kill(engine, signal.SIGKILL)
        got += [next(subscription) for _ in range(60)]
        live.process.send_signal(signal.SIGINT)
        got += list(subscription)
        code, summary = live.finish()
    assert (code, summary["restarts"]) == (0, {"engine": ["was killed by SIGKILL"]})
    assert [p.tick for p in got] == list(range(got[0].tick, got[0].tick + len(got)))
    assert subscription.lost == {}


def test_a_killed_session_ends_and_a_recording_only_one_is_refused(model: Path, tmp_path: Path) -> None:
    name = named("gone")
    with closing(running(model, name)) as live, subscribed(live, name) as subscription:
        next(subscription)
        live.process.kill()
        live.process.wait()
        list(subscription)
        assert subscription.ended == "the session's process is gone"
    name = named("records")
    args = (str(tmp_path / "a.mcap"), "--source", "synthetic", "--session", name)
    with closing(Running(*args, verb=("record",))) as record:
        with pytest.raises(UsageError, match="only records"):
            record.wait_for(lambda: subscribed(record, name))
        record.end()
