"""The processes of a session as the supervisor holds them: started, watched, killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from stream_mmrnn.bus import Address
from stream_mmrnn.bus.socket_dir import private_folder, remove_folder
from stream_mmrnn.core import signals, wire
from stream_mmrnn.core.processes import ProcessSpec
from stream_mmrnn.core.resources import raise_file_limit
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.live import nodes

_QUIET = "ignore::UserWarning:multiprocessing.resource_tracker"
"""A process that is killed cleans nothing up; the resource tracker does, and need not warn about it."""
_PRELOAD = [
    *(f"stream_mmrnn.live.nodes.{name}" for name in ("worker", "engine", "infrastructure", "viewers")),
    "stream_mmrnn.predict.engine",
    "stream_mmrnn.predict.pipeline",
]
"""What the fork server imports once, so that the processes need not. Not the recorder: MCAP would delay all others."""


def process_context() -> BaseContext:
    """Processes are forked from a clean server that has done the slow imports, or started afresh (Windows).

    The server and all its processes start with the signals of `signals` blocked: a terminal sends them to every
    process, and the supervisor decides which ends when.
    """
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, process, util

    kept = vars(process.current_process())["_config"]
    if "tempdir" not in kept:  # else the server makes one wherever TMPDIR is, and fails where that is deep
        kept["tempdir"] = private_folder("pymp-")
        util.Finalize(None, remove_folder, (kept["tempdir"],), exitpriority=-100)
    # a pool of BLAS threads in every process is of no use here, and forking one is not safe
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    raise_file_limit()  # the broker and the page have a file for each reader
    sys.warnoptions.append(_QUIET)
    signals.start_resource_tracker()  # first: it lets go of signals that are held
    sys.warnoptions.remove(_QUIET)
    with signals.held():
        forkserver.ensure_running()  # it imports beside this process: called early, it is ready sooner
    return context


def kill_forkserver() -> None:
    """Kill the fork server of `process_context` and remove its folder: while it imports, it reads no request to end."""
    if sys.platform == "win32":
        return
    from multiprocessing import forkserver, util

    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    remove_folder(util.get_temp_dir())


def end_forkserver() -> None:
    """Let the next process start with the environment as it is now: the fork server has that of its own start.

    It waits until the server's processes have ended.
    """
    if sys.platform == "win32":
        return
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]


class ManagedProcess:
    """One row of the process table, its running process, and what became of the ones before."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec, self.name, self.stream = spec, spec.name, spec.stream
        self.late = False
        """It was started in the middle of the session."""
        self.told = False
        """And was told to begin."""
        self.process: BaseProcess | None = None
        self.ready: Any = None
        self.stop: Any = None
        self.restarts = 0
        self.deaths: list[str] = []
        self.died_ns: deque[int] = deque()
        """Times of death inside the window of the restart budget."""
        self.given_up = ""
        """Why it is not restarted any more, as one sentence without its name; "" while it is."""
        self.again_ns = 0
        """When a dead process is restarted; 0: none is due."""
        self.done = False
        """It ended by itself, or was given up, and is not restarted."""
        self.status: wire.StatusMessage | None = None
        self.published_before: Counter[str] = Counter()
        """By name of the count, the feature vectors that earlier processes of this row reported as published."""
        self.stale_before = {"stale": 0, "stale_ms": 0}
        """Stalls of the device that they reported."""
        self.started_ns = 0
        self.reported = ""
        """The reason of its status that was shown to a person last."""
        self.away = False
        """It is a source that was lost, with its device or by its death, and has not been open since."""
        self.came_back = False
        """It is open again, which a person was not told yet."""

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.exitcode is None

    @property
    def is_source(self) -> bool:
        return bool(self.stream)

    def kill(self) -> None:
        if self.process is not None and self.running:
            self.process.kill()
            self.process.join(0.5)


class Spawner:
    """Starts the process of a row."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._context = process_context()
        self.epoch: Any = self._context.Value("q", 0)
        """The time of the session's start, in ns; 0 before it: workers wait for it."""

    def __call__(self, row: ManagedProcess, settings: Settings) -> None:
        row.ready, row.stop = nodes.Flag(self._context), nodes.Flag(self._context)
        context = nodes.Context(
            row.name, settings, self.address, row.ready, row.stop, self.epoch, row.restarts, row.stream, row.late
        )
        if row.is_source and stream_table(settings)[row.stream].source == "stdin":
            context.stdin = _Stdin()
        process = self._context.Process(  # type: ignore[attr-defined]
            target=nodes.run, args=(row.spec.target, context), name=f"stream-mmrnn-{row.name}", daemon=True
        )
        process.start()
        row.process = process


def how_it_ended(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"ended with exit code {code}"


class _Stdin:
    """Standard input, on its way to the text worker."""

    def __getstate__(self) -> dict[str, Any]:
        from multiprocessing.reduction import DupFd

        # without a standard input, descriptor 0 is some other file of this process
        return {"handle": None if sys.stdin is None else DupFd(0)}

    def detach(self) -> int:
        """The file descriptor in this process; -1 where there is no standard input."""
        handle = self.__dict__["handle"]
        return -1 if handle is None else int(handle.detach())
