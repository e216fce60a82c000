"""When the dead are started again and when no more, by a clock of the test's own; the processes are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.processes import worker
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live.managed_process import ManagedProcess
from stream_mmrnn.live.supervisor import Supervisor

S = 1_000_000_000


class Process:
    exitcode: int | None = None
    pid = 4242


class Publisher:
    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []

    def publish(
        self, topic: str, session: str, event_ns: int, capture_ns: int, payload: bytes, origin: str = ""
    ) -> None:
        kind = wire.SessionMessage if topic == topics.SESSION else wire.StatusMessage
        self.sent.append((topic, wire.unpack(payload, kind)))


class Epoch:
    value = 0


class World:
    """A running session whose processes die when the test says so; it is the supervisor's clock and spawner."""

    epoch = Epoch()

    def __init__(self, with_engine: bool = True, **settings: Any) -> None:
        table = {
            "sources": {"vision": "synthetic", "audio": "synthetic", "text": "none"},
            "dashboard": {"enabled": False},
            "record": {"path": "x.mcap"},
            "supervisor": settings,
        }
        self.said: list[str] = []
        self.now_ns = 1000 * S
        self.started: list[tuple[str, int]] = []
        self.it = Supervisor(
            config.parse(table), with_engine, self.said.append, clock=lambda: self.now_ns, spawner=lambda _: self
        )
        self.publisher = Publisher()
        self.it.publisher = self.publisher  # type: ignore[assignment]
        self.it.opened_ns = self.now_ns
        for node in self.it.nodes:
            node.started_ns = self.now_ns
            self(node, self.it.settings)
        self.started.clear()

    def __call__(self, node: ManagedProcess, settings: Settings) -> None:
        class Ready:
            def wait(self, _: float) -> bool:
                return True

            is_set = wait

        node.process, node.ready = Process(), Ready()  # type: ignore[assignment]
        self.started.append((node.name, self.now_ns))

    def die(self, name: str, code: int = -9) -> None:
        self.node(name).process.exitcode = code  # type: ignore[union-attr, misc]
        self.it.check()

    def tell(self, topic: str, status: wire.StatusMessage) -> None:
        """A status that comes over the bus."""
        self.it.observe(Envelope(topic, "live", 0, self.now_ns, self.now_ns, self.now_ns, wire.pack(status)))

    def node(self, name: str) -> ManagedProcess:
        return next(n for n in self.it.nodes if n.name == name)

    def back(self, name: str, at_most_s: float = 5) -> float:
        """Seconds until it is started again."""
        began_ns, before = self.now_ns, len(self.started)
        while len(self.started) == before and self.now_ns - began_ns < at_most_s * S:
            self.now_ns += S // 100
            self.it.check()
        assert self.started[before:] == [(name, self.now_ns)]
        return (self.now_ns - began_ns) / S


@pytest.fixture
def world() -> Iterator[Any]:
    made: list[World] = []

    def make(*args: Any, **settings: Any) -> World:
        made.append(World(*args, **settings))
        return made[-1]

    yield make
    for w in made:
        w.it.address.remove()


def test_back_off_doubles_up_to_its_most_and_begins_anew_after_a_good_run(world: Any) -> None:
    w = world(backoff_s=0.25, backoff_max_s=1.0)
    waits = []
    for _ in range(5):
        w.die("camera")
        waits.append(w.back("camera"))
    assert waits == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert w.node("camera").restarts == 5
    w.now_ns += 11 * S
    w.die("camera")
    assert w.back("camera") == 0.25
    # of another process it knows nothing
    w.die("microphone")
    assert w.back("microphone") == 0.25


def test_a_dead_worker_is_restarting_and_not_waited_for(world: Any) -> None:
    w = world()
    w.die("camera")
    topic, status = w.publisher.sent[0]
    assert (topic, status.state, status.modality) == ("status/camera", "restarting", "vision")
    assert status.reason == "was killed by SIGKILL"
    assert w.publisher.sent[-1][1].streams == ("audio",)
    w.back("camera")


def test_a_source_is_back_after_its_death_and_after_its_device_was_away(world: Any) -> None:
    w = world()

    def tell(state: Any) -> list[str]:
        status = wire.StatusMessage("camera", state, reason="unplugged" if state == "missing" else "", pid=Process.pid)
        before = len(w.said)
        w.tell("status/camera", status)
        w.now_ns += 20 * S
        return w.said[before:]

    assert tell("open") == []
    w.die("camera")
    w.back("camera")
    assert tell("open") == ["camera: is back"]
    assert tell("open") == []
    assert tell("missing") == ["camera: unplugged"]
    assert tell("open") == ["camera: is back"]


def test_one_that_dies_once_too_often_is_given_up_and_the_session_goes_on(world: Any) -> None:
    w = world(max_restarts=3, restart_window_s=60.0)
    for _ in range(3):
        w.die("camera", 1)
        w.back("camera")
    w.die("camera", 1)
    assert w.node("camera").given_up == "ended with exit code 1, for 4 times in 60 s, and was given up"
    assert w.said[-1] == f"camera: {w.node('camera').given_up}; the session goes on without it"
    assert [s for t, s in w.publisher.sent if t == "status/camera"][-1].state == "failed"
    assert w.it._expected == ("audio",)
    w.now_ns += 100 * S
    before = list(w.started)
    w.it.check()
    assert w.started == before
    assert w.it.failed == ""
    assert not w.it.sources_done
    w.die("microphone")
    assert w.it.failed == ""
    for _ in range(3):
        w.back("microphone")
        w.die("microphone")
    assert w.it.failed.startswith("the microphone was killed by SIGKILL, for 4 times")


@pytest.mark.parametrize(
    ("name", "with_engine", "vital"),
    [
        ("broker", True, True),
        ("clock", True, True),
        ("engine", True, True),
        ("recorder", True, False),
        ("recorder", False, True),
    ],
)
def test_without_some_there_is_no_session(world: Any, name: str, with_engine: bool, vital: bool) -> None:
    w = world(with_engine, max_restarts=0)
    w.die(name)
    assert bool(w.it.failed) is vital
    assert w.said == [w.it.failed or f"{name}: {w.node(name).given_up}; the session goes on without it"]
    assert "for the first time, and was given up" in w.said[0]


def test_what_the_dead_had_counted_is_kept(world: Any) -> None:
    w = world()
    for stale in (2, 3):
        w.node("camera").status = wire.StatusMessage(
            "camera", "open", counts={"published": 10, "stale": stale, "stale_ms": 7}
        )
        w.die("camera")
        w.back("camera")
    assert w.node("camera").published_before["published"] == 20
    assert w.node("camera").stale_before == {"stale": 5, "stale_ms": 14}


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(0, 6))
def test_given_up_at_the_first_window_with_more_deaths_than_restarts(gaps_s: list[int], most: int) -> None:
    it = Supervisor.__new__(Supervisor)
    it.settings = config.parse({"supervisor": {"max_restarts": most, "restart_window_s": 60.0}})
    node, at_ns, deaths = ManagedProcess(worker("vision")), 0, []
    for gap in gaps_s:
        at_ns += gap * S
        deaths.append(at_ns)
        recent = sum(at_ns - d <= 60 * S for d in deaths)
        assert it._too_often(node, at_ns) == (recent > most)
