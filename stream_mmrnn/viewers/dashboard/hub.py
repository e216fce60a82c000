"""The views that a page has beside its own: other sessions of this user, recordings that are replayed.

A view is made when somebody opens it, and ends when nobody has looked at it for a while. Knows nothing about HTTP.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from stream_mmrnn.bus import registry
from stream_mmrnn.bus.registry import Entry
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.viewers.dashboard.board import Board, View
from stream_mmrnn.viewers.dashboard.session_view import SessionView
from stream_mmrnn.viewers.dashboard.state import LiveState

_PERIOD_S = 1.0
_MAX_VIEWS = 16
_NOT_OPEN = "no such session or recording is open; go back to the page"

Extra = Callable[[str, LiveState | None, bool], dict[str, Any]]
"""What is added to the state of a view: by its key, what is known of its session, and whether that is over."""


class RunningView(View, Protocol):
    """A view that works until it is closed, or ends itself."""

    @property
    def running(self) -> bool: ...
    @property
    def error(self) -> str:
        """Why it ended, if it was not to end; "" else."""

    def close(self) -> None: ...


def key_of(entry: Entry) -> str:
    """The name of a session in the page's addresses."""
    return entry.file_name.removesuffix(".json")


class Hub:
    """All views but the page's own. Its methods may be called from any thread."""

    def __init__(
        self,
        show: Callable[[Board, bytes], None],
        extra: Extra,
        max_line_bytes: int,
        changed: Callable[[], None] = lambda: None,
        find: Callable[[], Sequence[Entry]] = registry.everything,
        reopen: Callable[[str], RunningView | None] = lambda _: None,
    ) -> None:
        """`changed` is called once a second, and when sessions have come or gone. `reopen` makes a view of another kind
        once more, by its key; None if there is none.
        """
        self._show, self._extra, self._max_line_bytes = show, extra, max_line_bytes
        self._changed, self._find, self._reopen = changed, find, reopen
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._views: dict[str, RunningView] = {}
        self._closed = threading.Event()
        self._again = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def refresh(self) -> None:
        """Look for sessions at once."""
        self._again.set()

    @property
    def sessions(self) -> list[Entry]:
        """Those that run, newest first."""
        return list(self._entries.values())

    def view(self, key: str, again: bool = False) -> RunningView | str:
        """An open view, or a new one of a session that runs; one sentence if there is none. `again`: a view of another
        kind that ended because nobody looked is made once more.
        """
        with self._lock:
            known = self._views.get(key)
            if known is not None and known.running:
                return known
            if known is not None and known.error:
                return known.error
            entry = self._entries.get(key)
            if (entry is None and not again) or not self._has_room():
                return _NOT_OPEN
            made: RunningView | None
            try:
                made = self._session(key, entry) if entry is not None else self._reopen(key)
            except StreamError as e:
                return str(e)
            if made is None:
                return _NOT_OPEN
            self._views[key] = made
            return made

    def _session(self, key: str, entry: Entry) -> SessionView:
        return SessionView(entry, self._show, lambda live, over: self._extra(key, live, over), self._max_line_bytes)

    def _has_room(self) -> bool:
        """Whether there is room for one view more; ends the oldest one at which nobody looks, if there is none."""
        running = [view for view in self._views.values() if view.running]
        if len(running) >= _MAX_VIEWS:
            unseen = next((view for view in running if not view.board.clients), None)
            if unseen is None:
                return False
            self._views = {key: view for key, view in self._views.items() if view is not unseen}
            # a replay may take seconds to end
            threading.Thread(target=unseen.close, name="close-view", daemon=True).start()
        return not self._closed.is_set()

    def open(self, key: str, make: Callable[[], RunningView]) -> str:
        """Have a view of another kind under this key; why not, or ""."""
        with self._lock:
            known = self._views.get(key)
            if known is not None and known.running:
                return ""
            if not self._has_room():
                return f"{_MAX_VIEWS} sessions and recordings are open; close one of their pages, and wait a moment"
            try:
                self._views[key] = make()
            except StreamError as e:
                return str(e)
            return ""

    def ask(self, key: str, op: Any) -> str:
        """Ask a session's supervisor for something; why that cannot be, or ""."""
        view = self.view(key)
        if not isinstance(view, SessionView):
            return "no such session is running"
        if view.over:
            return "this session has ended"
        recording = view.live.recording()["on"]
        if op == "record" and recording:
            return "this session is being recorded already"
        view.ask(op)
        return ""

    def close(self) -> None:
        self._closed.set()
        self._again.set()
        if self._thread.is_alive():
            self._thread.join(3.0)
        for view in list(self._views.values()):
            view.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(StreamError, OSError):
                self._entries = {key_of(entry): entry for entry in self._find()}
            with self._lock:
                self._views = {key: view for key, view in self._views.items() if view.running or view.error}
            self._changed()
            self._again.wait(_PERIOD_S)
            self._again.clear()
