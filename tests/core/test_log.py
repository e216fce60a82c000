"""What a session says, as lines of JSON."""

from __future__ import annotations

import json
import os
import signal
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from harness import Running
from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.core.log import JsonLines, Note, at_least, report
from stream_mmrnn.core.settings import LogSettings

pytestmark = pytest.mark.process

_KEYS = {"ts", "level", "node", "event", "fields"}


def read(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


def test_a_session_s_standard_error_is_json_and_names_who_died(tmp_path: Path) -> None:
    settings = tmp_path / "s.toml"
    settings.write_text("[log]\nformat = 'json'\n[dashboard]\nenabled = false\n")
    options = ("--source", "synthetic", "--other-audio", "none", "--other-text", "none", "--config", settings)
    live = Running(*options, "--record", tmp_path / "a.mcap")
    with closing(live):
        [camera] = live.wait_for(lambda: live.children("camera"), 60)
        live.wait_for(lambda: (tmp_path / "a.mcap").exists(), 60)
        os.kill(camera, signal.SIGKILL)
        live.wait_for(lambda: any('"died"' in line for line in live.lines), 60)
        code, summary, _ = live.end()
    assert (code, summary["failed"]) == (0, "")
    lines = read(live.lines)
    assert all(set(line) >= _KEYS for line in lines)
    (died,) = [line for line in lines if line["event"] == "died"]
    assert (died["node"], died["level"]) == ("camera", "warning")
    assert died["fields"]["death"] == "was killed by SIGKILL"
    assert died["message"].startswith("camera: was killed by SIGKILL; started again")
    assert datetime.fromisoformat(died["ts"]).utcoffset() is not None


def test_a_level_and_text_are_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    say = at_least("warning", said.append)
    for note in ("plain", Note("fine", "a"), Note("bad", "a", "x", "warning"), Note("worse", "a", "x", "error")):
        say(note)
    assert said == ["bad", "worse"]
    report(LogSettings(), "engine", "no model")
    report(LogSettings(format="json"), "engine", "no model", traceback="...")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "stream-mmrnn engine: no model"
    line = json.loads(second)
    assert (line["level"], line["node"], line["message"], line["fields"]) == (
        "error",
        "engine",
        "no model",
        {"traceback": "..."},
    )


def test_private_notes_are_not_in_the_log() -> None:
    lines: list[str] = []
    JsonLines(write=lines.append)(Note("the token is abc", "dashboard", "token", private=True, token_file="t"))
    assert "abc" not in lines[0]
    assert read(lines)[0]["fields"] == {"token_file": "t"}


_notes = st.builds(
    Note,
    st.text(max_size=20),
    st.sampled_from(["camera", "engine", ""]),
    st.sampled_from(["died", "status"]),
    st.sampled_from(["debug", "info", "warning", "error"]),
    n=st.integers(),
)


@given(st.lists(_notes | st.text(max_size=10), max_size=20), st.sampled_from(["debug", "warning"]))
def test_every_note_is_one_line_or_counted_in_the_next_of_its_cause(notes: list[str], level: str) -> None:
    lines: list[str] = []
    write = JsonLines(level, lines.append)
    for note in notes:
        write(note)
    assert all("\n" not in line for line in lines)
    said = read(lines)
    wanted = [n for n in notes if level == "debug" or getattr(n, "level", "info") in ("warning", "error")]
    # within a second: of the same words one line
    assert len(said) <= len(wanted)
    assert {line["message"] for line in said} == {str(n) for n in wanted}
    assert len(said) + sum(line.get("unsaid", 0) for line in said) <= len(wanted)
