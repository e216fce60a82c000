"""What people ask of a running session: recordings are begun and ended while recorders die and end. No processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from stream_mmrnn.core import config, processes, topics, wire
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live.managed_process import ManagedProcess
from stream_mmrnn.live.requests import Requests
from stream_mmrnn.live.session import _incomplete, stream_summary


class Switch:
    def __init__(self, on: bool = False) -> None:
        self.on = on

    def set(self) -> None:
        self.on = True

    def is_set(self) -> bool:
        return self.on


def runs(node: ManagedProcess, hears: bool = True) -> ManagedProcess:
    node.process = SimpleNamespace(exitcode=None, pid=7)  # type: ignore[assignment]
    node.ready, node.stop = Switch(hears), Switch()
    return node


def ends(node: ManagedProcess, code: int = 0) -> None:
    node.process = SimpleNamespace(exitcode=code, pid=7)  # type: ignore[assignment]


class House:
    """The supervisor, as far as `Requests` needs it."""

    def __init__(self) -> None:
        self.publisher: Any = self
        self.sent: list[tuple[str, bytes]] = []
        self.said: list[str] = []
        self.states: list[str] = []
        self.recorders: list[ManagedProcess] = []

    def publish(self, topic: str, _session: str, _event_ns: int, _capture_ns: int, payload: bytes) -> None:
        self.sent.append((topic, payload))

    def say(self, note: str) -> None:
        self.said.append(str(note))

    def start_process(self, node: ManagedProcess) -> None:
        self.recorders.append(runs(node, hears=False))

    def publish_session(self, op: str) -> int:
        self.sent.append((topics.SESSION, op.encode()))
        return 0

    def publish_status(self, _node: ManagedProcess, state: str, _reason: str) -> None:
        self.states.append(state)

    def replace_node(self, node: ManagedProcess) -> None: ...


@pytest.fixture
def house() -> House:
    return House()


END = [(topics.CONTROL, topics.END_RECORDING), (topics.SESSION, b"streams")]


def recorder() -> ManagedProcess:
    return runs(ManagedProcess(processes.by_name("recorder")))


def asked(house: House, node: ManagedProcess | None, folder: Path) -> tuple[Requests, Any]:
    requests = Requests(config.parse({"record": {"folder": str(folder)}}), node, True, house)  # type: ignore[arg-type]

    def ask(op: Any) -> None:
        requests.observe(Envelope(topics.REQUEST, "live", 0, 0, 0, 0, wire.pack(wire.RequestMessage(op))))

    return requests, ask


def test_the_end_of_a_recording_is_marked_for_recorder_and_engine(house: House, tmp_path: Path) -> None:
    node = recorder()
    _, ask = asked(house, node, tmp_path)
    ask("end_recording")
    ask("end_recording")
    assert (house.sent, node.done) == (END, True)


def test_a_recording_that_is_asked_for_while_one_still_ends_begins_after_it(house: House, tmp_path: Path) -> None:
    node = recorder()
    requests, ask = asked(house, node, tmp_path)
    ask("end_recording")
    ask("record")
    requests.poll()
    assert house.recorders == [], "the one before still writes"
    ends(node)
    requests.poll()
    requests.poll()
    assert len(house.recorders) == 1
    # pressed off again before it could begin
    ends(house.recorders[0])
    ask("end_recording")
    assert house.states == ["closed"]


def test_a_recording_that_was_only_wanted_is_not_begun(house: House, tmp_path: Path) -> None:
    node = recorder()
    requests, ask = asked(house, node, tmp_path)
    for op in ("end_recording", "record", "end_recording"):
        ask(op)
    ends(node)
    requests.poll()
    assert house.recorders == []
    ask("record")
    assert len(house.recorders) == 1


def test_a_recorder_that_is_dead_when_its_recording_ends_is_not_started_again(house: House, tmp_path: Path) -> None:
    node = recorder()
    _, ask = asked(house, node, tmp_path)
    ends(node, -9)
    node.again_ns = 99
    ask("end_recording")
    assert (node.done, node.again_ns, house.sent, house.states) == (True, 0, [], ["closed"])
    ask("record")
    assert len(house.recorders) == 1


@pytest.mark.parametrize("late", [True, False])
def test_a_recorder_that_hears_nothing_yet_is_told_by_its_flag(house: House, tmp_path: Path, late: bool) -> None:
    node = recorder()
    node.late, node.ready = late, Switch(late)  # one that came late hears, and was not told to begin
    _, ask = asked(house, node, tmp_path)
    ask("end_recording")
    assert (node.stop.is_set(), house.sent, house.states) == (True, [], ["closed"])


def test_a_recorder_that_dies_while_it_ends_is_said(house: House, tmp_path: Path) -> None:
    node = recorder()
    requests, ask = asked(house, node, tmp_path)
    ask("end_recording")
    ends(node, -9)
    requests.poll()
    requests.poll()
    assert house.states == ["failed"]
    assert house.said == [
        "recorder: it was killed by SIGKILL before its file was finished; the session goes on without it"
    ]


# ---- what the summary says of it


def closed(detail: dict[str, Any], **counts: int) -> wire.StatusMessage:
    return wire.StatusMessage("recorder", "closed", 7, counts=counts, detail=detail)


@pytest.mark.parametrize(
    ("detail", "sentence"),
    [
        ({}, ""),
        ({"path": "a.mcap", "finished": True}, ""),
        ({"path": "a.mcap", "finished": False, "refusal": "no space"}, "a.mcap has no end, because of the disk (no sp"),
        ({"path": "a.mcap", "finished": None}, "a.mcap has no end"),
    ],
)
def test_a_recording_without_an_end_is_partial(detail: dict[str, Any], sentence: str) -> None:
    node = recorder()
    node.status = closed(detail)
    assert "".join(_incomplete(node)).startswith(sentence)
    assert bool(_incomplete(node)) == bool(sentence)
    assert _incomplete(None) == []
    ends(node)
    if detail.get("finished") is None:
        assert _incomplete(node) == [], "it ended in order, and nobody was there to hear of it"


def test_a_recorder_that_was_given_up_is_partial() -> None:
    node = recorder()
    node.deaths, node.given_up = ["was killed"], "was killed, for 6 times in 60 s, and was given up"
    assert _incomplete(node) == [f"the recording is not whole: the recorder {node.given_up}"]


@pytest.mark.parametrize(("state", "produced"), [("open", 112), ("closed", 100), ("ended", 100)])
def test_a_worker_that_was_killed_at_the_end_could_not_say_what_it_had_sent(state: Any, produced: int) -> None:
    node = runs(ManagedProcess(processes.worker("audio")))
    node.status = msgspec.structs.replace(closed({}, published=100), state=state)
    summary = stream_summary(node, {"arrived": 112, "used": 112})
    assert (summary["produced"], summary["balanced"]) == (produced, produced == 112)
