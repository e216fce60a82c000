"""The verb `page`: sessions as processes of their own, which it survives, and which end with it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from chromium import address_of
from harness import Running, descendants, run

from stream_mmrnn.bus.registry import Entry
from stream_mmrnn.cli.page import Launcher
from stream_mmrnn.core import config
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.live.child import ChildSession
from stream_mmrnn.viewers.dashboard.controls import Choice
from stream_mmrnn.viewers.dashboard.hub import Hub, key_of

START = {"name": "anna", "vision": "synthetic", "audio": "synthetic", "text": "page"}
process = pytest.mark.process
slow = pytest.mark.slow


class Page:
    """A running page, as a program uses it."""

    def __init__(self, settings: Path, runtime: Path) -> None:
        env = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "TMPDIR": str(runtime)}
        self.running = Running("--config", settings, verb=("page",), env=env)
        self.host = address_of(self.running).removeprefix("http://").rstrip("/")

    def post(self, path: str, body: Any) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.host, timeout=20)
        with closing(connection):
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode().strip()

    def state(self, view: str = "") -> dict[str, Any]:
        connection = http.client.HTTPConnection(self.host, timeout=20)
        with closing(connection):
            connection.request("GET", f"{view}/events")
            answer = connection.getresponse()
            assert answer.status == 200
            for line in answer:
                if line.startswith(b"data: "):
                    found: dict[str, Any] = json.loads(line[6:])
                    return found
        raise AssertionError("no state came")

    def started(self) -> dict[str, Any]:
        """The newest session that was started here."""
        rows = self.state()["controls"]["started"]
        return dict(rows[-1]) if rows else {}

    def await_state(self, state: str) -> dict[str, Any]:
        found: dict[str, Any] = self.running.wait_for(lambda: (row := self.started()).get("state") == state and row, 60)
        return found

    def close(self) -> None:
        self.running.close()


@pytest.fixture
def page(tmp_path: Path, model: Path, short_path: Path) -> Iterator[Page]:
    settings = tmp_path / "page.toml"
    settings.write_text(
        f'[record]\nfolder = "{tmp_path / "made"}"\n[engine]\nmodel = "{model}"\n[page]\nsessions = 2\n'
    )
    with closing(Page(settings, short_path)) as made:
        yield made


@process
@slow
def test_two_starts_at_once_and_a_stop_that_comes_twice(page: Page) -> None:
    answers: list[tuple[int, str]] = []
    threads = [threading.Thread(target=lambda: answers.append(page.post("/controls/start", START))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(code for code, _ in answers) == [200, 409, 409, 409]
    assert {why for code, why in answers if code == 409} == {"a session 'anna' is running; choose another name"}
    assert page.post("/controls/start", {**START, "name": "ben", "vision": "none"})[0] == 200
    code, why = page.post("/controls/start", {**START, "name": "cleo"})
    assert (code, why) == (409, "2 sessions are running, the most that page.sessions allows; stop one of them")
    rows = page.running.wait_for(
        lambda: (found := page.state()["controls"]["started"]) and all(r["key"] for r in found) and found, 60
    )
    for row in rows:
        assert page.post("/controls/stop", {"session": row["key"]})[0] == 200
    page.running.wait_for(lambda: {r["state"] for r in page.state()["controls"]["started"]} == {"ended"}, 60)
    for row in rows:
        code, why = page.post("/controls/stop", {"session": row["key"]})
        assert (code, why) in ((409, "this session has ended"), (409, "no such session is running"))
    assert page.running.end()[0] == 0


@process
@slow
def test_a_session_that_dies_by_itself_is_named_and_the_page_goes_on(page: Page) -> None:
    assert page.post("/controls/start", START)[0] == 200
    row = page.await_state("running")
    view = f"/view/{row['key']}"
    page.running.wait_for(lambda: page.state(view)["tick"] > 0, 60)
    os.kill(int(row["key"].partition("-")[0]), signal.SIGKILL)
    ended = page.running.wait_for(lambda: page.state(view).get("ended"), 30)
    assert ended["why"] == "the session's process died"
    assert page.await_state("failed")["why"] == "the session's process ended with exit code -9"
    assert page.post("/controls/start", START)[0] == 200
    page.await_state("running")
    assert page.running.end()[0] == 0


@process
@slow
def test_a_model_that_does_not_load_is_a_sentence(page: Page, model: Path) -> None:
    good = model.read_bytes()
    try:
        model.write_bytes(b"no model")
        assert page.post("/controls/start", START)[0] == 200
        assert model.name in page.await_state("failed")["why"]
    finally:
        model.write_bytes(good)
    assert page.running.end()[0] == 0


@process
@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_sessions_end_with_their_page(page: Page, tmp_path: Path, number: int) -> None:
    assert page.post("/controls/start", {**START, "record": True})[0] == 200
    row = page.await_state("running")
    view = f"/view/{row['key']}"
    page.running.wait_for(lambda: page.state(view)["tick"] > 0, 60)
    code, why = page.post("/controls/record", {"session": row["key"], "on": True})
    assert (code, why) == (409, "this session is being recorded already")
    processes = descendants(page.running.process.pid)
    assert len(processes) > 5
    page.running.process.send_signal(number)
    page.running.process.wait(30)
    page.running.wait_for(lambda: not any(Path(f"/proc/{pid}/stat").exists() for pid in processes), 30)
    [path] = (tmp_path / "made").glob("*.mcap")
    assert run("verify", path)[1]["ends"]["how"] == "clean"
    code, result, err = run("replay", path, "--verify")
    assert (code, result["identical"]) == (0, True), err


# ---- without processes


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launcher:
    def refuse(_: Any) -> ChildSession:
        raise AssertionError("a process was started")

    monkeypatch.setattr("stream_mmrnn.live.child.ChildSession", refuse)
    monkeypatch.setattr(
        "stream_mmrnn.cli.device_preview.found",
        lambda: {"cameras": [{"source": "camera:7", "is": "a camera"}], "microphones": [], "problem": "no PortAudio"},
    )
    made = Launcher(None, config.parse({"record": {"folder": str(tmp_path)}}))
    made.hub = Hub(lambda *_: None, lambda *_: {}, 4096, find=list)
    return made


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        (
            Choice("a", vision="camera:99"),
            "'camera:99' is no source of vision that this page offers; look for devices again",
        ),
        (Choice("a", vision="file:/etc/passwd"), "'file:/etc/passwd' is no source of vision"),
        (Choice("a", audio="file:/etc/passwd"), "is no source of audio"),
        (Choice("a", text="pipe:/tmp/x"), "is no source of text"),
        (Choice("a", vision="synthetic", model="/tmp/evil.onnx"), "there is no model '/tmp/evil.onnx' here"),
        (Choice("a", text="none"), "nothing is chosen: choose a camera, a microphone or a text source"),
    ],
)
def test_only_what_is_offered_can_be_started(launcher: Launcher, choice: Choice, why: str) -> None:
    assert why in launcher.start(choice)
    assert launcher.started() == []


class Child:
    """A session whose process does not run."""

    pid, summary, ended, was_seen = 7, None, False, False

    def __init__(self, settings: Settings) -> None:
        self.settings, self.name = settings, settings.session.name

    def why(self) -> str:
        return ""


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, launcher: Launcher) -> list[Any]:
    monkeypatch.setattr("stream_mmrnn.live.child.ChildSession", Child)
    return launcher._children


def test_a_session_is_recorded_only_if_it_was_chosen(launcher: Launcher, children: list[Any], tmp_path: Path) -> None:
    config_file = tmp_path / "page.toml"
    config_file.write_text(f'[record]\npath = "{tmp_path / "always.mcap"}"\nfolder = "{tmp_path}"\n')
    launcher._config_file = config_file
    for name, record in (("a", False), ("b", True)):
        assert launcher.start(Choice(name, vision="synthetic", record=record)) == ""
    paths = [child.settings.record.path for child in children]
    assert paths[0] == ""
    assert Path(paths[1]).parent == tmp_path
    assert "always" not in paths[1]


def test_a_session_that_ends_does_not_start(launcher: Launcher, children: list[Any]) -> None:
    assert launcher.start(Choice("a", vision="synthetic")) == ""
    entry = Entry(7, 1, "a", True, 0, "", "", "", "")
    states = []
    for running in ([], [entry], []):
        launcher.hub._entries = {key_of(of): of for of in running}
        [row] = launcher.started()
        states.append((row["number"], row["state"], row["key"]))
    assert states == [(7, "starting", ""), (7, "running", "7-1"), (7, "ending", "")]


def test_a_browser_is_no_device_of_a_session_without_a_page() -> None:
    launcher = Launcher(None, config.parse({"sources": {"vision": "page", "audio": "page", "text": "page"}}))
    offers = launcher.offers()
    values = {name: "page" in [row["value"] for row in offers[name]] for name in ("vision", "audio", "text")}
    assert values == {"vision": False, "audio": False, "text": True}


def test_devices_that_were_found_are_offered(launcher: Launcher) -> None:
    assert launcher.look() == ""
    assert launcher._looking is not None
    launcher._looking.join(10)
    offers = launcher.offers()
    assert {"value": "camera:7", "is": "a camera"} in offers["vision"]
    assert (offers["looking"], offers["problem"]) == (False, "no PortAudio")
    assert "turn_taking" in [row["value"] for row in offers["models"]]
