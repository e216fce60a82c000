"""A replay as a process of its own, shown as a view of another program's page.

The child is this module as a program. It writes frames: a letter (`s` the state as JSON, `p` a picture, `a` columns of
the spectrogram), the length, the content. Each line of its input is a command of the player; the end of its input ends
it. So a model that is stuck, or a damaged file, stops no page.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.viewers.dashboard.board import Board

_FRAME = struct.Struct(">cI")
_FIRST = struct.Struct(">q")
_IDLE_NS = 600_000_000_000
"""A replay at which nobody looks for so long ends; a page that is hidden looks no more."""
_MAX_COMMAND_BYTES = 4096


class ReplayView:
    """The page's side: a view with the post `/replay`."""

    def __init__(self, path: Path, show: Callable[[Board, bytes], None], extra: Callable[[], dict[str, Any]]) -> None:
        """`show` replaces a board's state; `extra` is added to each state."""
        self._path, self._show, self._extra = path, show, extra
        self.board = Board()
        self.posts: Mapping[str, Callable[[bytes], str]] = {"/replay": self._take}
        self.error = ""
        """Why it ended, if it was not to end."""
        self._closed = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stream_mmrnn.offline.replay_child", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # the terminal's signals are for the page
        )
        self._looked_ns = now_ns()
        self._thread = threading.Thread(target=self._read, name="replay-view", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self._closed = self.board.closing = True
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()  # a step of the model does not end
            self._process.wait()
        if threading.current_thread() is not self._thread:
            self._thread.join(2.0)

    def _take(self, body: bytes) -> str:
        from stream_mmrnn.offline.player import command_of

        command = command_of(body)
        if isinstance(command, str):
            return command
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(command) + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            return self.error or "this replay has ended; open the recording again"
        return ""

    def _read(self) -> None:
        idle = False
        assert self._process.stdout is not None
        pipe = self._process.stdout
        with contextlib.suppress(OSError, ValueError):
            while len(head := pipe.read(_FRAME.size)) == _FRAME.size:
                kind, size = _FRAME.unpack(head)
                content = pipe.read(size)
                if kind == b"s":
                    # the state is one object of JSON: what is added goes before its last brace
                    added = msgspec.json.encode(self._extra())
                    self._show(self.board, content[:-1] + b"," + added[1:])
                elif kind == b"p":
                    self.board.picture = content
                elif kind == b"a":
                    self.board.sound = (_FIRST.unpack_from(content)[0], content[_FIRST.size :])
                if self.board.clients:
                    self._looked_ns = now_ns()
                elif now_ns() - self._looked_ns > _IDLE_NS:
                    idle = True
                    break
        pipe.close()
        if not self._closed:
            self.close()
            if not idle:
                code = self._process.returncode
                self.error = f"the replay's process ended with exit code {code}; open the recording again"


class _Pipe:
    """The child's screen."""

    clients = 1  # whether anybody looks is the page's business

    def __init__(self) -> None:
        self._fd = os.dup(1)
        os.dup2(2, 1)  # what a library prints is no frame

    def update(self, state: dict[str, Any]) -> None:
        self._write(b"s", msgspec.json.encode(state))

    def picture(self, jpeg: bytes) -> None:
        self._write(b"p", jpeg)

    def sound(self, first: int, columns: bytes) -> None:
        self._write(b"a", _FIRST.pack(first) + columns)

    def _write(self, kind: bytes, content: bytes) -> None:
        data = memoryview(_FRAME.pack(kind, len(content)) + content)
        with contextlib.suppress(OSError):  # the page is gone; the replay ends by its input
            while data:
                data = data[os.write(self._fd, data) :]


def main() -> int:
    """The child's side."""
    from stream_mmrnn.offline.player import Player
    from stream_mmrnn.offline.replay import replay

    gone = threading.Event()
    screen = _Pipe()
    player = Player(1.0, lambda: not gone.is_set(), screen=screen)
    threading.Thread(target=_commands, args=(player.handle, gone), daemon=True).start()
    try:
        replay(Path(sys.argv[1]), alive=lambda: not gone.is_set(), player=player)
    except StreamError as e:
        player.fail(str(e))
        while not gone.wait(0.5):
            player.fail(str(e))  # a page that gets no states calls the connection lost
        return 1
    return 0


def _commands(handle: Callable[[bytes], str], gone: threading.Event) -> None:
    rest = b""
    while piece := os.read(0, _MAX_COMMAND_BYTES):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            handle(line)
    gone.set()


if __name__ == "__main__":
    raise SystemExit(main())
