"""What can be done on a page: start and stop sessions, record, open a recording. And what of that it shows to everyone.

A change is a POST with JSON; the server has checked who sends it before it comes here. Who starts a process or plays a
recording is passed in. Knows nothing about HTTP, processes or files' contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import msgspec

from stream_mmrnn.core.settings import PageSettings
from stream_mmrnn.core.topics import SESSION_NAME
from stream_mmrnn.recording.append_file import is_being_written
from stream_mmrnn.viewers.dashboard.hub import Hub, RunningView, key_of
from stream_mmrnn.viewers.dashboard.limits import clean
from stream_mmrnn.viewers.dashboard.state import LiveState

_MAX_RECORDINGS = 100
_LATER_PART = re.compile(r"\.part[0-9]{1,6}\.mcap\Z")


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a POST to /controls/start: a session. Each source and the model is one that the page offers."""

    name: Annotated[str, msgspec.Meta(pattern=SESSION_NAME)]
    vision: str = "none"
    audio: str = "none"
    text: str = "page"
    model: str = ""
    """ "" is the one of the settings."""
    record: bool = False


class _Session(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    session: str


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    session: str
    on: bool


class _Recording(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    recording: str


class _Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Launcher(Protocol):
    """What starts sessions as processes."""

    def offers(self) -> dict[str, Any]:
        """What may be chosen: `vision`, `audio`, `text` and `models`, each a list of `value` and `is`; `looking`:
        whether devices are being looked for.
        """

    def started(self) -> list[dict[str, Any]]:
        """The sessions of this page: `number` (no other one's), `name`, `state` (starting, running, ending, ended,
        failed), `why`, `key`.
        """

    def start(self, choice: Choice) -> str: ...
    def look(self) -> str: ...


_Body = TypeVar("_Body", Choice, _Session, _Record, _Recording, _Nothing)


def _decoded(body: bytes, kind: type[_Body]) -> _Body | str:
    """The body of a POST, or one sentence."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
        return f"the request cannot be read: {clean(str(e), 200)}"


class Controls:
    """The controls of a page; `hub` is set once, before the page is served."""

    hub: Hub

    def __init__(
        self,
        settings: PageSettings,
        folder: Path | None = None,
        launcher: Launcher | None = None,
        play: Callable[[str, Path], RunningView] | None = None,
        own: tuple[str, Callable[[Any], None]] | None = None,
    ) -> None:
        """`folder`: the recordings that may be opened, by `play`, which takes a key and the file. `own`: the key of the
        page's own session, and what asks its supervisor for something.
        """
        self._settings, self._folder, self._launcher, self._play, self._own = settings, folder, launcher, play, own
        self._recordings: list[dict[str, Any]] = []
        self._paths: dict[str, Path] = {}
        self._own_live: LiveState | None = None
        self.posts: Mapping[str, Callable[[bytes], str]] = {
            "/controls/stop": self._stop,
            "/controls/record": self._record,
            **({"/controls/start": self._start, "/controls/look": self._look} if launcher else {}),
            **({"/controls/open": self._open} if play else {}),
        }

    def observe_own(self, live: LiveState) -> None:
        """What is known of the page's own session."""
        self._own_live = live

    def refresh(self) -> None:
        """List the recordings anew; call it about once a second."""
        if self._folder is None:
            return
        found = _recordings(self._folder.expanduser())
        self._paths = {row["key"]: path for row, path in found}
        self._recordings = [row for row, _ in found]

    def state(self, key: str, live: LiveState | None, over: bool = False) -> dict[str, Any]:
        """What is added to the state of a view. `key`: of its session; "" is the page's own view."""
        own = self._own[0] if self._own else ""
        now_unix_ns = time.time_ns()
        return {
            "controls": {
                "session": key or own,
                "over": over,
                "idle": not (key or own),
                "labels": self._settings.labels,
                "recording": live.recording() if live is not None else None,
                "sessions": [
                    {
                        "key": key_of(entry),
                        "name": clean(entry.session),
                        "seconds": round((now_unix_ns - entry.began_unix_ns) / 1e9),
                        "home": key_of(entry) == own,
                    }
                    for entry in self.hub.sessions[:32]
                ],
                "started": self._launcher.started() if self._launcher else [],
                "offers": self._launcher.offers() if self._launcher else None,
                "recordings": self._recordings if self._play else None,
            }
        }

    def reopen(self, key: str) -> RunningView | None:
        """Play a recording once more; None if there is no such recording."""
        path = self._paths.get(key)
        return self._play(key, path) if self._play is not None and path is not None else None

    # ---- called in the server's thread ---------------------------------------------------------------------------

    def _start(self, body: bytes) -> str:
        assert self._launcher is not None
        choice = _decoded(body, Choice)
        if isinstance(choice, str):
            return choice
        if any(entry.session == choice.name for entry in self.hub.sessions):
            return f"a session {choice.name!r} is running; choose another name"
        why = self._launcher.start(choice)
        self.hub.refresh()
        return why

    def _look(self, body: bytes) -> str:
        assert self._launcher is not None
        asked = _decoded(body, _Nothing)
        return asked if isinstance(asked, str) else self._launcher.look()

    def _stop(self, body: bytes) -> str:
        asked = _decoded(body, _Session)
        return asked if isinstance(asked, str) else self._ask(asked.session, "stop")

    def _record(self, body: bytes) -> str:
        asked = _decoded(body, _Record)
        return asked if isinstance(asked, str) else self._ask(asked.session, "record" if asked.on else "end_recording")

    def _ask(self, key: str, op: str) -> str:
        if self._own and key == self._own[0]:
            on = self._own_live is not None and self._own_live.recording()["on"]
            if on and op == "record":
                return "this session is being recorded already"
            self._own[1](op)
            return ""
        return self.hub.ask(key, op)

    def _open(self, body: bytes) -> str:
        asked = _decoded(body, _Recording)
        if isinstance(asked, str):
            return asked
        path, play = self._paths.get(asked.recording), self._play
        assert play is not None
        if path is None:
            return f"there is no such recording in {self._folder}; only recordings of this folder can be opened"
        return self.hub.open(asked.recording, lambda: play(asked.recording, path))


def _recordings(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """The recordings of a folder, the newest first, without links: nothing outside it can be opened."""
    found = []
    try:
        for path in folder.iterdir():
            if path.suffix != ".mcap" or _LATER_PART.search(path.name):
                continue
            with contextlib.suppress(OSError):  # it was removed meanwhile
                about = path.lstat()
                if stat.S_ISREG(about.st_mode):
                    found.append((about.st_mtime_ns, about.st_size, path))
    except OSError:
        return []
    found.sort(key=lambda row: -row[0])
    return [
        (
            {
                "key": "recording-" + hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:16],
                "name": clean(path.name, 200),
                "path": clean(str(path), 4096),
                "bytes": size,
                "age_s": max(0, round((time.time_ns() - at_ns) / 1e9)),
                "being_written": is_being_written(path),
            },
            path,
        )
        for at_ns, size, path in found[:_MAX_RECORDINGS]
    ]
