"""Recordings that are begun and ended while the session runs: they verify, and replay bit for bit from their start."""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
from harness import Running, check_summary, recorded, run

import stream_mmrnn
from stream_mmrnn.bus import Publisher, registry
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import NotRunning
from stream_mmrnn.core.types import Envelope, Mark
from stream_mmrnn.live.checkpoint import Newest
from stream_mmrnn.live.late_recording import LateBeginning


def ask(name: str, *ops: str) -> None:
    """Ask a session's supervisor, as a page does."""
    publisher = Publisher(registry.find(name).address(), 16)
    publisher.wait_for_reader(topics.REQUEST, 5.0)
    for op in ops:
        at_ns = now_ns()
        publisher.publish(topics.REQUEST, name, at_ns, at_ns, wire.pack(wire.RequestMessage(op)))  # type: ignore[arg-type]
    publisher.close()


def started(name: str, model: Path, tmp_path: Path, *more: object, verb: str = "live") -> Running:
    settings = tmp_path / f"{name}.toml"
    settings.write_text(f'[record]\nfolder = "{tmp_path / "made"}"\n')
    args = ("--config", settings, "--source", "synthetic", "--session", name, *more)
    session = Running(*args, *(("--model", model) if verb == "live" else ()), verb=(verb,))
    session.wait_for(lambda: _runs(name), 60)
    return session


def _runs(name: str) -> bool:
    try:
        return bool(registry.find(name))
    except NotRunning:
        return False


@pytest.mark.process
@pytest.mark.slow
def test_a_recording_that_begins_late_replays_bit_for_bit(model: Path, tmp_path: Path) -> None:
    with closing(started("late", model, tmp_path, "--no-dashboard")) as session:
        time.sleep(3)  # the model's state is no longer its first one
        ask("late", "record", "record")  # the second changes nothing
        [first] = session.wait_for(lambda: list((tmp_path / "made").glob("*.mcap")), 30)
        session.wait_for(lambda: len(recorded(first, topics.PREDICTION)) > 60, 60)
        predictions = stream_mmrnn.subscribe("late", timeout=60)
        # an engine that has not caught up: its last predictions belong to the file, too
        [engine] = session.children("engine")
        os.kill(engine, signal.SIGSTOP)
        time.sleep(0.3)
        ask("late", "end_recording", "end_recording")
        time.sleep(0.3)
        os.kill(engine, signal.SIGCONT)
        began_ns = now_ns()
        # the end of a recording is not the end of the session for those who read its predictions
        assert any(p.event_ns > began_ns + 1_000_000_000 for p in predictions)
        predictions.close()
        session.wait_for(lambda: run("verify", first)[1].get("ends", {}).get("how") == "clean", 60)
        ask("late", "record")
        second = session.wait_for(lambda: next((p for p in (tmp_path / "made").iterdir() if p != first), None), 30)
        session.wait_for(lambda: len(recorded(second, topics.PREDICTION)) > 30, 60)
        ask("late", "stop")
        code, summary = session.finish()
    assert code == 0
    check_summary(summary)
    assert (summary["recording"]["path"], summary["recording"]["finished"]) == (str(second), True)
    assert summary["restarts"] == {}
    for path in (first, second):
        code, about, err = run("verify", path)
        assert (code, about["whole"], about["messages"][topics.CHECKPOINT]) == (0, True, 1), (about, err)
        assert 0 < about["predictions"] < summary["predictions"]
        code, result, err = run("replay", path, "--verify")
        assert (code, result["identical"], result["predictions"]) == (0, True, about["predictions"]), (result, err)
        assert run("info", path)[1]["lost"] == {}
        assert run("repair", path, path.with_suffix(".repaired.mcap"))[0] == 0
        assert run("replay", path.with_suffix(".repaired.mcap"), "--verify")[0] == 0
    code, _, err = run("replay", first, second)
    assert code == 2
    assert "replay it by itself" in err
    # without the state at its beginning, the model begins anew
    other = run("replay", first, "--model", "turn_taking")[1]
    assert other["predictions"] > 0
    assert not other["identical"]


@pytest.mark.process
@pytest.mark.slow
def test_without_a_journal_the_file_says_that_it_lacks_the_state(model: Path, tmp_path: Path) -> None:
    settings = tmp_path / "s.toml"
    settings.write_text(f'[record]\nfolder = "{tmp_path / "made"}"\n[state]\nsnapshot_every = 0\n')
    args = ("--config", settings, "--source", "synthetic", "--session", "bare", "--model", model, "--no-dashboard")
    with closing(Running(*args)) as session:
        session.wait_for(lambda: _runs("bare"), 60)
        ask("bare", "record")
        [path] = session.wait_for(lambda: list((tmp_path / "made").glob("*.mcap")), 30)
        session.wait_for(lambda: len(recorded(path, topics.PREDICTION)) > 20, 60)
        ask("bare", "stop")
        assert session.finish()[0] == 0
    assert run("verify", path)[0] == 0
    assert run("replay", path)[1]["predictions"] > 0
    code, _, err = run("replay", path, "--verify")
    assert code != 0
    assert "begins in the middle of a session without the model's state" in err


@pytest.mark.process
@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_said_and_the_session_goes_on(model: Path, tmp_path: Path) -> None:
    (tmp_path / "made").write_text("a file")
    with closing(started("blocked", model, tmp_path, "--no-dashboard")) as session:
        ask("blocked", "record")
        session.wait_for(lambda: any("cannot be used" in line for line in session.lines), 30)
        ask("blocked", "stop")
        code, summary = session.finish()
    assert (code, summary["predictions"] > 0) == (0, True)


@pytest.mark.process
@pytest.mark.slow
def test_a_session_that_only_records_ends_with_its_recording(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    with closing(started("only", model, tmp_path, path, verb="record")) as session:
        session.wait_for(lambda: len(recorded(path, topics.CLOCK)) > 20, 60)
        ask("only", "end_recording")
        assert session.finish()[0] == 0
    assert run("verify", path)[0] == 0


# ---- which messages it begins with, without processes


def message(topic: str, seq: int, payload: bytes = b"", session: str = "live") -> Envelope:
    return Envelope(topic, session, seq, seq, seq, seq, payload)


def prediction(seq: int, tick: int) -> Envelope:
    return message(topics.PREDICTION, seq, b'{"tick": %d}' % tick)


STREAMS = message(topics.SESSION, 3, wire.pack(wire.SessionMessage("streams", 3, ("audio",))))
FEATURES = [message("feature/audio", n) for n in range(10, 14)]


def newest(of: Envelope, closed: int = 7) -> Newest:
    return Newest(Mark(of.topic, of.session, of.seq, of.publish_ns), closed, 320, ("audio", "text"), b"state")


def test_it_begins_after_the_last_message_that_the_state_has_seen() -> None:
    start = LateBeginning("live")
    for e in (message("feature/audio", 9), STREAMS, FEATURES[0], prediction(5, 7), FEATURES[1], prediction(6, 7),
              prediction(7, 8), message("feature/audio", 12, session="other"), FEATURES[2]):  # fmt: skip
        start.add(e)
    assert start.at(None) is None
    assert start.at(newest(message("feature/audio", 9))) is None, "what came before is not there"
    opening, state, *rest = start.at(newest(FEATURES[1])) or []
    said = wire.unpack(opening.payload, wire.SessionMessage)
    assert (opening.seq, said.op, said.event_ns, said.streams) == (3, "open", 319, ("audio", "text"))
    assert wire.unpack(state.payload, wire.CheckpointMessage) == wire.CheckpointMessage(320, b"state")
    assert rest == [prediction(7, 8), FEATURES[2]], "tick 7 was stepped before the checkpoint"


def test_a_state_that_is_too_large_for_a_message_is_left_out() -> None:
    start = LateBeginning("live")
    for e in (STREAMS, *FEATURES):
        start.add(e)
    assert start.at(newest(FEATURES[0])._replace(content=bytes(wire.MAX_JSON_BYTES))) is None
    opening, *rest = start.without_state()
    assert wire.unpack(opening.payload, wire.SessionMessage).streams == ("audio",)
    assert rest == FEATURES


def test_nothing_is_kept_before_the_session_says_its_streams() -> None:
    start = LateBeginning("live")
    start.add(FEATURES[0])
    assert (len(start), start.without_state()) == (0, [])
