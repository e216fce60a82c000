"""A recording that is played in a process of its own, as a view of a page."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness import run
from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.offline.player import command_of
from stream_mmrnn.offline.replay_child import ReplayView
from stream_mmrnn.viewers.dashboard.board import Board


class Shown:
    """What a page is told."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def __call__(self, board: Board, state: bytes) -> None:
        board.put(state)
        self.state = msgspec.json.decode(state)

    def wait_for(self, what: Callable[[dict[str, Any]], Any], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not (self.state and what(self.state)):
            assert time.monotonic() < end, {k: self.state.get(k) for k in ("replay", "tick")}
            time.sleep(0.02)


def note(state: dict[str, Any]) -> str:
    return str(state["replay"]["note"])


@pytest.mark.process
@pytest.mark.slow
def test_it_is_shown_and_obeys(model: Path, tmp_path: Path) -> None:
    path, shown = tmp_path / "a.mcap", Shown()
    args = ("live", "--source", "synthetic", "--duration", "3", "--model", model, "--record", path, "--no-dashboard")
    assert run(*args)[0] == 0
    with closing(ReplayView(path, shown, lambda: {"controls": {"added": "ä}"}})) as view:
        shown.wait_for(lambda s: s["tick"] > 0)
        assert shown.state["controls"] == {"added": "ä}"}
        assert {mark["kind"] for mark in shown.state["replay"]["marks"]} == {"text"}
        take = view.posts["/replay"]
        assert take(b'{"speed": 4, "paused": true}') == ""
        shown.wait_for(lambda s: s["replay"]["paused"] and s["replay"]["speed"] == 4)
        for wrong in (b"", b"[]", b'{"speed": 0}', b'{"seek_s": -1}', b'{"path": "/etc/passwd"}', b"\xff"):
            assert take(wrong).startswith("not a command of a replay")
        assert take(b'{"seek_s": 2.5, "paused": false}') == ""
        shown.wait_for(lambda s: note(s).startswith("the end"))
        assert take(b'{"seek_s": 0.5}') == ""
        shown.wait_for(lambda s: s["replay"]["position_s"] < 2.5)
        shown.wait_for(lambda s: note(s).startswith("the end"))
        assert view.board.picture.startswith(b"\xff\xd8")
        assert view.board.sound[1]
    assert not view.running
    assert view.error == ""
    assert take(b'{"paused": true}') == "this replay has ended; open the recording again"


@pytest.mark.process
@pytest.mark.slow
def test_a_damaged_file_is_a_sentence_and_a_killed_player_an_end(tmp_path: Path) -> None:
    path, shown = tmp_path / "a.mcap", Shown()
    path.write_bytes(b"\x89MCAP0\r\n" + bytes(200))
    with closing(ReplayView(path, shown, lambda: {"controls": {}})) as view:
        shown.wait_for(lambda s: "a.mcap" in note(s))
        os.kill(view._process.pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while view.running:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert view.error == "the replay's process ended with exit code -9; open the recording again"
        assert view.posts["/replay"](b'{"paused": true}') == view.error


@given(st.binary(max_size=300))
def test_any_body_is_a_command_or_a_sentence(body: bytes) -> None:
    command = command_of(body)
    assert not isinstance(command, str) or command.startswith("not a command of a replay")
