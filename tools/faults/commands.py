"""Sessions of the real command for the modules beside this one: started, watched and signalled from outside.

Each has a temporary folder and a process session of its own, so that what it leaves behind can be counted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
_T = TypeVar("_T")


def wait_for(what: Callable[[], _T], seconds: float = 120) -> _T:
    """The first answer that is not false; raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if got := what():
            return got
        time.sleep(0.005)
    raise TimeoutError(f"it did not happen in {seconds} s")


class Command:
    """`stream-mmrnn VERB ...` as a process of its own; leave it with `end` or `kill`."""

    def __init__(self, folder: Path, *args: object, env: dict[str, str] | None = None) -> None:
        self.temp = folder / "tmp"
        self.temp.mkdir(parents=True)
        self._runtime = folder / "run"
        self._runtime.mkdir(mode=0o700)
        self._out = (folder / "out").open("w+b")
        self._err = (folder / "err").open("w+b")
        search = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))).rstrip(os.pathsep)
        self.began_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stream_mmrnn", *map(str, args), "--json"],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            env={
                **os.environ,
                **(env or {}),
                "TMPDIR": str(self.temp),
                "XDG_RUNTIME_DIR": str(self._runtime),
                "PYTHONPATH": search,
            },
            start_new_session=True,
        )

    @property
    def out(self) -> str:
        self._out.seek(0)
        return self._out.read().decode(errors="replace")

    @property
    def err(self) -> str:
        self._err.seek(0)
        return self._err.read().decode(errors="replace")

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.out.splitlines()
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return found

    @property
    def watched(self) -> bool:
        """Whether the program has taken SIGTERM: before, Python itself has not come to its first line."""
        with suppress(OSError, StopIteration):
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
            return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
        return False

    def processes(self) -> list[tuple[int, str]]:
        """(pid, name) of everyone that it started, wherever their parent is by now; zombies are none."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.process.pid:
                continue
            with suppress(OSError, IndexError, ValueError):
                name, rest = (entry / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
                fields = rest.split()
                if int(fields[3]) == self.process.pid and fields[0] not in "ZX":
                    found.append((int(entry.name), name))
        return found

    def node(self, name: str) -> int:
        """The process of a node; 0 where there is none."""
        return next((pid for pid, comm in self.processes() if comm == f"mmrnn-{name}"[:15]), 0)

    def send(self, number: signal.Signals, to_group: bool = False) -> None:
        with suppress(ProcessLookupError):
            (os.killpg if to_group else os.kill)(self.process.pid, number)

    def left_behind(self, grace_s: float = 1.0) -> tuple[list[str], list[str]]:
        """Processes that are still there `grace_s` after the command's end; what is in its temporary folder, and what
        it says of itself where running systems are looked for.
        """
        end = time.monotonic() + grace_s
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.01)
        # onnxruntime leaves a file of its own in any temporary folder, as soon as it is imported
        said = [p.name for p in self._runtime.rglob("*") if p.is_file()]
        return [name for _, name in left], sorted([p.name for p in self.temp.iterdir() if p.name != ".ses"] + said)

    def kill(self) -> None:
        for pid in (self.process.pid, *(pid for pid, _ in self.processes())):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._out.close()
        self._err.close()


@contextmanager
def command(*args: object, env: dict[str, str] | None = None, settings: str = "") -> Iterator[tuple[Command, Path]]:
    """A running command and a folder that goes with it; `FOLDER` in `args` stands for that folder.

    `settings` are in its `settings.toml`.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        (folder / "settings.toml").write_text(settings, encoding="utf-8")
        running = Command(folder, *(str(a).replace("FOLDER", name) for a in args), env=env)
        try:
            yield running, folder
        finally:
            running.kill()
