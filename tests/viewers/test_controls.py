"""What can be done on a page, by HTTP: who may, what is refused and how it is said; without processes."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream_mmrnn.bus.registry import Entry
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.settings import PageSettings
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.viewers.dashboard.board import Board
from stream_mmrnn.viewers.dashboard.controls import Choice, Controls
from stream_mmrnn.viewers.dashboard.hub import Hub, key_of
from stream_mmrnn.viewers.dashboard.server import Dashboard
from stream_mmrnn.viewers.dashboard.session_view import SessionView


class Launcher:
    def __init__(self) -> None:
        self.choices: list[Choice] = []
        self.looked = 0

    def offers(self) -> dict[str, Any]:
        return {"vision": [], "audio": [], "text": [], "models": [], "looking": False, "problem": ""}

    def started(self) -> list[dict[str, Any]]:
        return []

    def start(self, choice: Choice) -> str:
        self.choices.append(choice)
        return ""

    def look(self) -> str:
        self.looked += 1
        return ""


class Replay:
    """A view of a recording that the test plays."""

    def __init__(self, path: Path) -> None:
        self.path, self.board, self.running, self.error = path, Board(), True, ""
        self.bodies: list[bytes] = []
        self.posts = {"/replay": self._take}

    def _take(self, body: bytes) -> str:
        self.bodies.append(body)
        return ""

    def close(self) -> None:
        self.running = False


class Page:
    """A page with controls."""

    def __init__(self, folder: Path, token: str = "", entries: tuple[Entry, ...] = ()) -> None:
        self.launcher, self.opened = Launcher(), dict[str, Replay]()
        self.asked: list[Any] = []
        self.controls = Controls(PageSettings(), folder, self.launcher, self.play, ("own", self.asked.append))
        self.board = Dashboard(
            token=token,
            posts=self.controls.posts,
            features=("controls",),
            views=lambda *of: self.controls.hub.view(*of),
        )
        self.hub = self.controls.hub = Hub(
            self.board.show, self.controls.state, 4096, find=lambda: list(entries), reopen=self.controls.reopen
        )
        self.hub._entries = {key_of(entry): entry for entry in entries}
        self.controls.refresh()
        self.board.start()

    def play(self, key: str, path: Path) -> Replay:
        self.opened[key] = Replay(path)
        return self.opened[key]

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str]:
        address = self.board.address.removeprefix("http://").rstrip("/")
        connection = http.client.HTTPConnection(address, timeout=10)
        try:
            more = {"Content-Type": "application/json"} if method == "POST" else {}
            connection.request(
                method, path, body or None, {**more, **{k.replace("_", "-"): v for k, v in headers.items()}}
            )
            answer = connection.getresponse()
            return answer.status, answer.read().decode().strip()
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, str]:
        return self.request("POST", path, json.dumps(body).encode(), **headers)

    def close(self) -> None:
        self.hub.close()
        self.board.close()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    made = Page(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    made = Page(tmp_path_factory.mktemp("recordings"))
    yield made
    made.close()


START = {"name": "anna", "vision": "synthetic"}
PATHS = ("/controls/start", "/controls/stop", "/controls/record", "/controls/open", "/controls/look")


@pytest.mark.parametrize("path", PATHS)
def test_a_change_needs_the_token_and_the_page_itself(tmp_path: Path, path: str) -> None:
    page = Page(tmp_path, token="secret")
    try:
        assert page.post(path, {})[0] == 401
        assert page.post(path, {}, Authorization="Bearer wrong")[0] == 401
        bearer = {"Authorization": "Bearer secret"}
        foreign = page.post(path, {}, Origin="https://example.org", **bearer)
        assert foreign == (403, "requests from other sites are refused")
        assert page.post(path, {}, Sec_Fetch_Site="cross-site", **bearer)[0] == 403
        assert page.post(path, {}, Host="example.org", **bearer)[0] == 403
        assert page.request("GET", path, **bearer)[0] == 405
        assert page.request("POST", path, b"{}", **{**bearer, "Content_Type": "text/plain"})[0] == 415
        assert page.launcher.choices == page.asked == []
        assert page.launcher.looked == 0
        assert page.post("/controls/look", {}, **bearer) == (200, "done")
    finally:
        page.close()


def test_a_session_is_started_by_a_choice(page: Page) -> None:
    assert page.post("/controls/start", {**START, "record": True}) == (200, "done")
    assert page.launcher.choices == [Choice("anna", vision="synthetic", record=True)]
    for wrong in ({}, {"name": "../x"}, {"name": ""}, {**START, "path": "/etc/passwd"}, {**START, "record": "yes"}, []):
        code, why = page.post("/controls/start", wrong)
        assert code == 409
        assert why.startswith("the request cannot be read: ")
    assert len(page.launcher.choices) == 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS), st.binary(max_size=200) | st.text(max_size=100).map(lambda t: json.dumps(t).encode()))
def test_any_bytes_are_an_answer_and_no_change(shared: Page, path: str, body: bytes) -> None:
    before = len(shared.launcher.choices), len(shared.asked), shared.launcher.looked, len(shared.opened)
    code, why = shared.request("POST", path, body)
    assert code in (409, 411) or (path == "/controls/look" and json.loads(body) == {})
    assert why
    if code != 200:
        after = len(shared.launcher.choices), len(shared.asked), shared.launcher.looked, len(shared.opened)
        assert after == before


def test_the_own_session_is_asked_and_unknown_ones_are_refused(page: Page) -> None:
    assert page.post("/controls/record", {"session": "own", "on": True})[0] == 200
    assert page.post("/controls/record", {"session": "own", "on": False})[0] == 200
    assert page.post("/controls/stop", {"session": "own"})[0] == 200
    assert page.asked == ["record", "end_recording", "stop"]
    for body in ({"session": "1-2"}, {"session": ""}, {"session": "../x"}):
        assert page.post("/controls/stop", body) == (409, "no such session is running")
    assert page.request("GET", "/view/1-2/events") == (
        404,
        "no such session or recording is open; go back to the page",
    )


@pytest.mark.parametrize("how", ["died", "closed", "ended unseen"])
def test_a_session_that_died_is_not_shown_as_one_that_ended(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    alive, listed = [True], [True]
    monkeypatch.setattr(Entry, "alive", lambda _: alive[0])
    monkeypatch.setattr(Entry, "is_listed", lambda _: listed[0])
    monkeypatch.setattr(SessionView, "_run", lambda _: None)
    entry, shown = Entry(1, 2, "anna", True, 0, "", "", "", ""), list[bytes]()
    view = SessionView(entry, lambda _, state: shown.append(state), lambda *_: {}, 4096)
    view._look()
    if how == "closed":
        close = wire.pack(wire.SessionMessage("close", 1))
        view._observe(Envelope(topics.SESSION, "anna", 0, 1, 1, 1, close, "", 1))
    listed[0] = False
    if how == "ended unseen":  # its last message was lost, but it left in order
        view._look()
    alive[0] = False
    view._look()
    view._update()
    why = "the session's process died" if how == "died" else ""
    assert json.loads(shown[-1])["ended"] == {"recording": "", "why": why}


def test_a_name_that_runs_already_is_refused(tmp_path: Path) -> None:
    entry = Entry(1, 2, "anna", True, 0, "ipc:///x", "ipc:///x", "ipc:///x", "ipc:///x")
    page = Page(tmp_path, entries=(entry,))
    try:
        assert page.post("/controls/start", START) == (409, "a session 'anna' is running; choose another name")
        [row] = page.controls.state("", None)["controls"]["sessions"]
        assert (row["key"], row["name"], row["home"]) == ("1-2", "anna", False)
    finally:
        page.close()


def test_only_recordings_of_the_folder_can_be_opened(tmp_path: Path) -> None:
    folder, outside = tmp_path / "made", tmp_path / "secret.mcap"
    folder.mkdir()
    outside.write_bytes(b"secret")
    (folder / "link.mcap").symlink_to(outside)
    (folder / "folder.mcap").mkdir()
    os.mkfifo(folder / "pipe.mcap")
    for name in ("a.mcap", "a.part2.mcap", "notes.txt", "b <i>.mcap"):
        (folder / name).write_bytes(b"x")
    page = Page(folder)
    try:
        rows = page.controls.state("", None)["controls"]["recordings"]
        assert {row["name"] for row in rows} == {"a.mcap", "b <i>.mcap"}
        for name in (str(outside), "../secret.mcap", "link.mcap", "a.mcap", "", "recording-0000000000000000"):
            code, why = page.post("/controls/open", {"recording": name})
            assert code == 409
            assert "only recordings of this folder can be opened" in why
        key = next(row["key"] for row in rows if row["name"] == "a.mcap")
        assert page.post("/controls/open", {"recording": key}) == (200, "done")
        assert page.post("/controls/open", {"recording": key}) == (200, "done")
        assert [replay.path for replay in page.opened.values()] == [folder / "a.mcap"]
        assert page.post(f"/view/{key}/replay", {"paused": True})[0] == 200
        assert page.opened[key].bodies == [b'{"paused": true}']
        assert page.request("GET", f"/view/{key}/picture.jpg")[0] == 204
        assert page.request("GET", f"/view/{key}/")[0] == 200
        assert page.request("GET", f"/view/{key}/main.js")[0] == 200
        assert page.post(f"/view/{key}/controls/stop", {"session": "own"})[0] == 405, "controls are the page's own"
        page.opened[key].running = False
        assert page.post(f"/view/{key}/replay", {"paused": True})[0] == 404
    finally:
        page.close()


def test_a_recording_that_ended_unseen_is_played_again_and_one_that_failed_says_why(page: Page, tmp_path: Path) -> None:
    (tmp_path / "a.mcap").write_bytes(b"x")
    page.controls.refresh()
    [row] = page.controls.state("", None)["controls"]["recordings"]
    key, view = row["key"], f"/view/{row['key']}"
    assert page.post("/controls/open", {"recording": key}) == (200, "done")
    first = page.opened[key]
    first.running = False
    page.hub._views.clear()  # the hub forgets it within a second
    not_open = "no such session or recording is open; go back to the page"
    assert page.post(f"{view}/replay", {"label": "walking"}) == (404, not_open), "it would be given at another place"
    assert page.request("GET", f"{view}/healthz")[0] == 200
    second = page.opened[key]
    assert second is not first
    assert page.post(f"{view}/replay", {"paused": True})[0] == 200
    second.running, second.error = False, "the replay's process ended"
    for method in ("GET", "POST"):
        assert page.request(method, f"{view}/healthz", b"{}" * (method == "POST")) == (
            404,
            "the replay's process ended",
        )
    assert page.opened[key] is second
    assert page.post("/controls/open", {"recording": key}) == (200, "done")
    assert page.request("GET", f"{view}/healthz")[0] == 200
    (tmp_path / "a.mcap").unlink()
    page.controls.refresh()
    page.opened[key].running = False
    assert page.request("GET", f"{view}/healthz") == (404, not_open)


def test_the_oldest_view_that_nobody_sees_makes_room(page: Page, tmp_path: Path) -> None:
    replays = [Replay(tmp_path / str(n)) for n in range(18)]
    for replay in replays[1:16]:
        replay.board.seen[replay] = 1
    for n, replay in enumerate(replays[:17]):
        assert page.hub.open(f"recording-{n}", lambda replay=replay: replay) == ""  # type: ignore[misc]
    replays[16].board.seen[replays[16]] = 1
    assert "16 sessions and recordings are open" in page.hub.open("recording-17", lambda: replays[17])
    for thread in threading.enumerate():
        if thread.name == "close-view":
            thread.join(10)
    page.hub.close()
    assert [replay.running for replay in replays] == [False] * 17 + [True]


def test_a_file_that_vanishes_hides_no_recording(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mcap").write_bytes(b"x")
    files = [tmp_path / name for name in ("gone.tmp", "gone.mcap", "a.mcap")]
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(files))
    page.controls.refresh()
    assert [row["name"] for row in page.controls.state("", None)["controls"]["recordings"]] == ["a.mcap"]


def test_a_folder_that_is_not_there_has_no_recordings(tmp_path: Path) -> None:
    page = Page(tmp_path / "nothing")
    try:
        assert page.controls.state("", None)["controls"]["recordings"] == []
    finally:
        page.close()
