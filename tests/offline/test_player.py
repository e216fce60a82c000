"""A replay on the page: the model's state after a seek, and what the page shows."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import run

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.core.streams import usual
from stream_mmrnn.core.types import Envelope, ModelSpec, Prediction
from stream_mmrnn.offline import player as module
from stream_mmrnn.offline.player import Player
from stream_mmrnn.offline.replay import replay
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.training.tasks.recordings import TypedEvents

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay ends as soon as its browser has left."""
    monkeypatch.setattr(module, "_GONE_NS", 0)


@pytest.fixture(scope="module")
def recording(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("player") / "a.mcap"
    live = ("live", "--source", "synthetic", "--duration", "3", "--model", model, "--record", path, "--no-dashboard")
    code, _, err = run(*live)
    assert code == 0, err
    return path


class Browser:
    """Follows the states, and sends commands."""

    def __init__(self, address: str) -> None:
        self._port = int(address.rstrip("/").rsplit(":", 1)[1])
        self._events = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        self._events.request("GET", "/events")
        self._answer = self._events.getresponse()

    def states(self) -> Iterator[dict[str, Any]]:
        while line := self._answer.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    def press(self, **command: object) -> int:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)) as c:
            c.request("POST", "/replay", json.dumps(command), {"Content-Type": "application/json"})
            return c.getresponse().status

    def close(self) -> None:
        self._answer.close()
        self._events.close()


def play(path: Path, player: Player) -> tuple[threading.Thread, list[Prediction], list[dict[str, Any]]]:
    seen: list[Prediction] = []
    results: list[dict[str, Any]] = []
    options = {"speed": 1.0, "on_prediction": seen.append, "alive": lambda: True, "player": player}
    thread = threading.Thread(target=lambda: results.append(replay(path, **options)))
    thread.start()
    return thread, seen, results


def test_the_state_after_a_seek_is_exact(recording: Path) -> None:
    straight: list[Prediction] = []
    replay(recording, on_prediction=straight.append)
    then = {p.tick.index: p for p in straight}
    with closing(Player(1.0, lambda: True)) as player:
        browser = Browser(player.address)
        thread, seen, results = play(recording, player)
        states = browser.states()
        # forward, back, while paused and while playing, and from the end
        assert browser.press(paused=True) == 200
        state = next(s for s in states if s["replay"]["paused"])
        for to_s in (2.0, 0.5, 2.5, 0.0):
            assert browser.press(seek_s=to_s) == 200
            state = next(s for s in states if s["replay"]["position_s"] == pytest.approx(to_s, abs=0.05))
            assert state["replay"]["paused"]
        assert browser.press(paused=False) == 200
        assert browser.press(seek_s=99) == 200
        state = next(s for s in states if s["replay"]["note"].startswith("the end"))
        assert browser.press(seek_s=1.0) == 200
        state = next(s for s in states if s["replay"]["note"].startswith("at 1 times"))
        assert state["heads"]
        assert state["model"]["name"]
        assert state["texts"] is not None
        assert not state["typing"]["possible"]
        browser.close()
        thread.join(60)
    assert len(seen) > len(straight)
    for p in seen:
        for name, values in p.heads.items():
            assert values.tolist() == then[p.tick.index].heads[name].tolist()
    [result] = results
    assert result["identical"]
    assert result["predictions"] == len(straight)


def test_a_recording_is_labelled_while_it_is_replayed(recording: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(recording, tmp_path / "a.mcap"))
    with closing(Player(1.0, lambda: True)) as player:
        browser = Browser(player.address)
        thread, _, results = play(path, player)
        states = browser.states()
        browser.press(paused=True)
        for to_s, name in ((1.0, "walking"), (2.0, "sitting"), (0.5, "lying")):
            browser.press(seek_s=to_s)
            next(s for s in states if s["replay"]["position_s"] == pytest.approx(to_s, abs=0.05))
            assert browser.press(label=name) == 200
            state = next(s for s in states if s["replay"]["note"].startswith(name))
            assert state["labels"][0]["text"] == name
        assert state["replay"]["labels"] == ["lying", "sitting", "walking"]
        marks = [(m["at_s"], m["text"]) for m in state["replay"]["marks"] if m["kind"] == "label"]
        assert [text for _, text in marks] == ["lying", "walking", "sitting"]
        assert [at_s for at_s, _ in marks] == pytest.approx([0.5, 1.0, 2.0], abs=0.05)
        assert browser.press(undo=True) == 200
        state = next(s for s in states if s["replay"]["note"] == "the newest label was taken back")
        state = next(s for s in states if not s["labels"])
        assert state["replay"]["labels"] == ["sitting", "walking"]
        # a label that comes while the model still runs to the target is given there
        for to_s in (1.5, 2.25):
            browser.press(seek_s=to_s, seek_id=f"to {to_s}")
            browser.press(label="standing")
            state = next(s for s in states if s["replay"]["seek"] == {"id": f"to {to_s}", "done": True})
            assert state["replay"]["position_s"] == pytest.approx(to_s, abs=0.05)
            assert to_s in [pytest.approx(m["at_s"], abs=0.01) for m in state["replay"]["marks"]]
            browser.press(undo=True)
            next(s for s in states if s["replay"]["labels"] == ["sitting", "walking"])
        # a later pass has them from the recording
        browser.press(seek_s=2.5)
        state = next(s for s in states if s["labels"])
        assert [label["text"] for label in state["labels"]] == ["sitting", "walking"]
        browser.press(paused=False)
        browser.close()
        thread.join(60)
    assert results[0]["identical"]
    assert [name for _, name in TypedEvents.of(Recording(path)).labels] == ["walking", "sitting"]


def test_invalid_commands_are_rejected(recording: Path) -> None:
    with closing(Player(50.0, lambda: True)) as player:
        browser = Browser(player.address)
        for wrong in ({"seek_s": -1}, {"seek_s": "x"}, {"speed": 300}, {"paused": 1}, {"label": ""}, {"undo": 1}):
            assert browser.press(**wrong) == 409
        browser.close()


def test_stamps_are_recorded_and_the_step_is_new(recording: Path) -> None:
    with closing(Player(1.0, lambda: True)) as player:
        browser = Browser(player.address)
        thread, _, _ = play(recording, player)
        browser.press(seek_s=2.9)
        state = next(s for s in browser.states() if s["replay"]["position_s"] >= 2.9 and s["latency"])
        assert {stage: state["latency"][stage]["p99"] for stage in ("transport", "queue", "emit")} == {
            "transport": 0,
            "queue": 0,
            "emit": 0,
        }
        assert state["latency"]["step"]["p50"] > 0
        assert state["latency"]["encode"]["p50"] > 0
        # the recording's own processes, as they ended, and this one
        assert {"replay", "engine", "camera"} <= state["nodes"].keys()
        browser.close()
        thread.join(60)


S = 1_000_000_000
SPEC = ModelSpec("a", "0" * 64, 40_000_000, (), (), ())


class Screen:
    """What a page without a server is told."""

    def __init__(self) -> None:
        self.clients = 0
        self.state: dict[str, Any] = {}

    def update(self, state: dict[str, Any]) -> None:
        self.state = state

    def picture(self, jpeg: bytes) -> None: ...
    def sound(self, first: int, columns: bytes) -> None: ...


def message(topic: str, at_s: int, payload: bytes = b"") -> Envelope:
    return Envelope(topic, "a", at_s, at_s * S, at_s * S, at_s * S, payload)


@pytest.mark.parametrize("from_s", [1, 11])
def test_after_a_seek_the_label_holds_that_was_given_long_before(from_s: int) -> None:
    screen = Screen()
    player = Player(1.0, lambda: True, screen=screen)
    player.load("a.mcap", SPEC, usual(), S, 120 * S)
    clock = [message(topics.CLOCK, at_s) for at_s in range(1, 121)]
    given = [
        message(topics.LABEL, 5, b"sitting"),
        message("raw/text", 6, b"hello"),
        message(topics.LABEL, 40, b"walking"),
    ]
    for envelope in player.play(sorted([*clock, *given], key=lambda e: e.publish_ns)):
        at_s = envelope.publish_ns // S
        if at_s == 1 and from_s > 1:
            player.handle(b'{"seek_s": 10}')
        if at_s == from_s:
            player.handle(b'{"seek_s": 100}')
        if at_s == 101:
            break
    player.fail("")  # it shows what is known
    assert [label["text"] for label in screen.state["labels"]] == ["walking", "sitting"]
    assert [line["text"] for line in screen.state["texts"]] == ["hello"]
    assert "lost.clock" not in [row["what"] for row in screen.state["losses"]], "what a seek leaves out is no loss"


@pytest.mark.parametrize(
    ("there", "seconds"),
    [
        pytest.param(range(0), range(3), id="nobody ever looked"),
        pytest.param([*range(1, 10), *range(13, 20)], range(20, 30), id="a page that is loaded again"),
    ],
)
def test_a_replay_waits_at_its_end_for_a_browser_that_comes_back(
    monkeypatch: pytest.MonkeyPatch, there: list[int], seconds: range
) -> None:
    screen, at_ns = Screen(), [S]

    def sleep(_: float) -> None:
        at_ns[0] += S
        screen.clients = int(at_ns[0] // S in there)

    monkeypatch.setattr(module, "now_ns", lambda: at_ns[0])
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(module, "_GONE_NS", 5 * S)
    player = Player(1.0, lambda: True, screen=screen)
    player.load("a.mcap", SPEC, usual(), S, 2 * S)
    assert len(list(player.play([message(topics.CLOCK, 1), message(topics.CLOCK, 2)]))) == 2
    assert at_ns[0] // S - 1 in seconds


def test_a_port_in_use_is_an_error() -> None:
    with closing(Player(1.0, lambda: True)) as player:
        port = int(player.address.rstrip("/").rsplit(":", 1)[1])
        with pytest.raises(ProcessError, match="cannot bind"):
            Player(1.0, lambda: True, port)
