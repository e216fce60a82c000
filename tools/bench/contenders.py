"""The contenders of `transport`: pairs of processes that send and read messages, over our bus and other transports.

The other transports are scripts in `peers/`; one whose package is missing is skipped with a reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from stream_mmrnn.bus import Address
from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.core.latency import Histogram
from tools.bench.load import Turn

ROOT = Path(__file__).parent.parent.parent
PEERS = Path(__file__).parent / "peers"
PEERS_MODULE = "tools.bench.peers"

_START_TIMEOUT_S = 20.0
_ROLES = ("send", "read")
_TRANSPORTS = ("tcp",) if sys.platform == "win32" else ("ipc", "tcp")


Start: TypeAlias = Callable[[], contextlib.AbstractContextManager["Contender"]]


class _Connection:
    """One process of a contender, and the connection over which it takes orders."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(120.0)
        self._socket = connection
        self._lines = connection.makefile("rw")
        self.role: str = self.answer()["role"]

    def tell(self, **order: Any) -> None:
        self._lines.write(json.dumps(order) + "\n")
        self._lines.flush()

    def answer(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise OSError("the process has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._lines.close()
        self._socket.close()


class Contender:
    """A sender and a reader, which wait for orders."""

    def __init__(self, name: str, sender: _Connection, reader: _Connection, pids: list[int]) -> None:
        self.name, self._sender, self._reader = name, sender, reader
        self.pids = pids
        """Of its processes, or of the processes that started them."""
        self.largest_bytes: int | None = None
        """The largest message that it carries; None: no limit."""

    def round(self, size_bytes: int, rate_hz: float, count: int) -> Turn:
        """`count` messages, one after the other at `rate_hz`; the reader gives up after 2 s without a message."""
        try:
            self._reader.tell(do="read", count=count, timeout_ms=2000)
            self._sender.tell(do="send", bytes=size_bytes, rate_hz=rate_hz, count=count)
            sent, got = self._sender.answer(), self._reader.answer()
            self._reader.tell(do="drain")
            self._reader.answer()
        except (OSError, ValueError) as e:
            raise ProcessError(f"a process of the contender {self.name} has ended: {e}") from e
        return Turn(sent["sent"], got["latency_ns"], got["path_ns"], {})

    def warm(self, size_bytes: int) -> bool:
        """Send until something arrives: subscriptions take a moment."""
        return any(self.round(size_bytes, 50.0, 5).latency_ns for _ in range(4))


@contextlib.contextmanager
def _pair(name: str, commands: Callable[[str], Sequence[Sequence[str]]]) -> Iterator[Contender]:
    """Both ends, started by `commands(port)`; raises ProcessError if they do not connect."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.settimeout(0.1)
        processes = [_start(stack, command) for command in commands(str(server.getsockname()[1]))]
        ends: dict[str, _Connection] = {}
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while len(ends) < 2:
            died = [said for process, said in processes if process.poll() is not None]
            if died or time.monotonic() > deadline_s:
                raise ProcessError(f"it did not start: {_last_line(died[0]) if died else 'no answer'}")
            with contextlib.suppress(TimeoutError):
                end = _Connection(server.accept()[0])
                stack.callback(end.close)
                ends[end.role] = end
        yield Contender(name, ends["send"], ends["read"], [process.pid for process, _ in processes])


def _last_line(said: TextIO) -> str:
    said.seek(0)
    return said.read().strip().rpartition("\n")[2] or "it printed nothing"


def _start(stack: contextlib.ExitStack, command: Sequence[str], **options: Any) -> tuple[subprocess.Popen[str], TextIO]:
    """A process that ends with the stack, and the file with its stderr."""
    said = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 the stack closes it
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": said, "text": True, "env": os.environ | {"PYTHONPATH": path}}
    process = subprocess.Popen(command, **{**quiet, **options})

    def end() -> None:
        process.kill()
        process.communicate()

    stack.callback(end)
    return process, said


@contextlib.contextmanager
def _brokered(name: str, transport: str, program: Sequence[str]) -> Iterator[Contender]:
    """A sender and a reader with a broker between them: three processes of one program."""
    address = Address.create(transport)
    with contextlib.ExitStack() as stack:
        stack.callback(address.remove)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        broker, _ = _start(stack, [*program, "broker", "0", address.publish, address.subscribe], **pipes)
        if broker.stdout is None or not broker.stdout.readline():
            raise ProcessError(f"the broker of the contender {name} did not start")
        ends = (address.publish, address.subscribe)
        pair = stack.enter_context(_pair(name, lambda port: [[*program, role, port, *ends] for role in _ROLES]))
        pair.pids.append(broker.pid)
        yield pair


def ours(transport: str) -> contextlib.AbstractContextManager[Contender]:
    """Publisher, broker and Subscriber."""
    return _brokered(f"ours_{transport}", transport, [sys.executable, "-m", "tools.bench.peer"])


def zmq_proxy(transport: str) -> contextlib.AbstractContextManager[Contender]:
    """Plain PUB/SUB through ZeroMQ's own proxy: a broker without our code."""
    return _brokered(f"zmq_proxy_{transport}", transport, [sys.executable, "-m", f"{PEERS_MODULE}.pyzmq_pubsub"])


@contextlib.contextmanager
def zmq(transport: str) -> Iterator[Contender]:
    """Plain PUB/SUB, one to the other."""
    address = Address.create(transport)
    program = [sys.executable, "-m", f"{PEERS_MODULE}.pyzmq_pubsub"]
    try:
        with _pair(f"pyzmq_{transport}", lambda port: [[*program, r, port, address.publish] for r in _ROLES]) as pair:
            yield pair
    finally:
        address.remove()


@contextlib.contextmanager
def lsl() -> Iterator[Contender]:
    """An outlet and an inlet, which find each other by a unique name."""
    program = [sys.executable, "-m", f"{PEERS_MODULE}.pylsl_stream"]
    name = f"stream-mmrnn-{os.getpid()}"
    with _pair("lsl", lambda port: [[*program, role, port, name] for role in _ROLES]) as pair:
        # a sample is a list of numbers, one per channel: not a way to send a picture
        pair.largest_bytes = 4096
        yield pair


_DORA_FLOW = """\
nodes:
  - id: sender
    path: {python}
    args: {script} send {port}
    outputs: [data]
  - id: reader
    path: {python}
    args: {script} read {port}
    inputs:
      data: {{source: sender/data, queue_size: 1000}}
"""


@contextlib.contextmanager
def dora() -> Iterator[Contender]:
    """Two nodes of a dataflow, started by dora's own command."""
    with tempfile.TemporaryDirectory(prefix="stream-mmrnn-dora-") as folder:

        def commands(port: str) -> list[list[str]]:
            flow = Path(folder) / "flow.yml"
            flow.write_text(_DORA_FLOW.format(python=sys.executable, script=PEERS / "dora_nodes.py", port=port))
            return [[_dora_command() or "dora", "run", "--log-level", "error", str(flow)]]

        with _pair("dora", commands) as pair:
            yield pair


def _dora_command() -> str | None:
    return shutil.which("dora", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def available() -> tuple[dict[str, Start], dict[str, str]]:
    """The contenders that can run here, ours first; and for the others why they cannot."""
    found: dict[str, Start] = {f"ours_{t}": partial(ours, t) for t in _TRANSPORTS}
    why: dict[str, str] = {}
    others: dict[str, tuple[str, Start]] = {f"pyzmq_{t}": ("zmq", partial(zmq, t)) for t in _TRANSPORTS}
    others |= {f"zmq_proxy_{t}": ("zmq", partial(zmq_proxy, t)) for t in _TRANSPORTS}
    others |= {"dora": ("dora", dora), "lsl": ("pylsl", lsl)}
    for name, (package, start) in others.items():
        if reason := _missing(package):
            why[name] = reason
        else:
            found[name] = start
    return found, why


def _missing(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if package == "dora" and _dora_command() is None:
        return "the command `dora` is not installed (package dora-rs-cli)"
    return ""


def bare_hop(size_bytes: int, rate_hz: float, count: int) -> tuple[Histogram, str]:
    """Latencies of two hops over ZeroMQ's own proxy, without our code; or none, and why.

    Two hops are counted as one latency from the intended time and one path of the same message, so the percentiles are
    a little above those of two different hops.
    """
    found = Histogram()
    starts, why = available()
    name = next((n for n in starts if n.startswith("zmq_proxy_")), None)
    if name is None:
        return found, next((reason for n, reason in why.items() if n.startswith("zmq_proxy_")), "no peer")
    with starts[name]() as contender:
        contender.warm(size_bytes)
        done = contender.round(size_bytes, rate_hz, count)
    for latency_ns, path_ns in zip(done.latency_ns, done.path_ns, strict=True):
        found.add(latency_ns + path_ns)
    return found, "" if found.count else "no message arrived"
