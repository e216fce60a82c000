"""A session as a process of its own, for a program that starts and ends sessions and must survive them.

The child is this module as a program: the first line of its input is the settings as JSON, and the end of its input
ends the session, so that it ends when its parent is gone, however that ended. Each line of its output is an object:
`say`, a sentence for a person, and last `summary`, or `error`. Knows nothing about pages.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from typing import Any

import msgspec

from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.core.settings import Settings

_END_S = 10.0
"""A session ends within two seconds; a child that takes longer is killed."""


class _Line(msgspec.Struct):
    say: str = ""
    error: str = ""
    summary: dict[str, Any] | None = None


class ChildSession:
    """The parent's side."""

    def __init__(self, settings: Settings) -> None:
        self.name = settings.session.name
        self.error = ""
        """Why it did not start, or could not go on."""
        self.summary: dict[str, Any] | None = None
        self.was_seen = False
        """Whether it was among the running sessions, once; for the parent."""
        # signals of the terminal go to the parent only: it ends the session in order
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stream_mmrnn.live.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="child-session", daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has died already; `ended` says so
            self._process.stdin.write(msgspec.json.encode(settings) + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None and not self._reader.is_alive()

    def why(self) -> str:
        """Why it failed, as one sentence; "" if it ended in order, or runs."""
        if not self.ended or (self.summary is not None and not self.summary.get("failed")):
            return ""
        failed = str(self.summary.get("failed", "")) if self.summary else ""
        return failed or self.error or f"the session's process ended with exit code {self._process.returncode}"

    def end(self) -> None:
        """Let it end in order; returns at once."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """End it, and wait until it has; kill it if it does not."""
        self.end()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(2.0)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for raw in self._process.stdout:
                with contextlib.suppress(msgspec.MsgspecError):
                    line = msgspec.json.decode(raw, type=_Line)
                    self.error = line.error or self.error
                    self.summary = line.summary or self.summary


def main() -> int:
    """The child's side."""
    from stream_mmrnn.core.signals import ENDING, held
    from stream_mmrnn.live.managed_process import kill_forkserver, process_context
    from stream_mmrnn.live.session import LiveSession, for_its_model

    def put(**line: Any) -> None:
        with contextlib.suppress(OSError):  # the parent is gone; the session ends by its input
            sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
            sys.stdout.flush()

    gone = threading.Event()
    ENDING.at_once = kill_forkserver
    ENDING.watch()
    try:
        settings = msgspec.json.decode(_first_line(), type=Settings)
        threading.Thread(target=_wait_for_end, args=(gone,), daemon=True).start()
        process_context()
        settings = for_its_model(settings)
        with held():
            session = LiveSession(settings, True, lambda: ENDING.alive() and not gone.is_set(), lambda t: put(say=t))
            supervisor = session.supervisor
            ENDING.at_once, ENDING.in_order = supervisor.end_at_once, lambda: supervisor.begun
        summary = session.run(None)
    except (StreamError, msgspec.MsgspecError) as e:
        put(error=str(e))
        return 1
    put(summary=summary)
    return 1 if summary["failed"] else 0


def _wait_for_end(gone: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    gone.set()


def _first_line() -> bytes:
    """Read without Python's buffer: a thread that waits in it would not let the program end."""
    line = b""
    while not line.endswith(b"\n") and (piece := os.read(0, 1)):
        line += piece
    return line


if __name__ == "__main__":
    raise SystemExit(main())
