"""Who is asked for predictions by `servers`: ours in process, ours over the bus, and Triton in processes of its own.

`Ours` is a call in the client's process (what the way costs nothing); `OverBus` is publisher, broker, engine's process
and subscriber, as a live session has them; `Peer` is `tools/bench/peers/triton_sessions.py` in a Python of its own.
Knows nothing about how Triton is served, nor what is made of the answers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stream_mmrnn.bench import models
from stream_mmrnn.bench.sessions import SETTLE_S, TICK_NS, Load, phases
from stream_mmrnn.bus import Address, Publisher, Subscriber
from stream_mmrnn.core import config, processes, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import ProcessError, WireError
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.types import FloatArray, Stamps, Tick
from stream_mmrnn.live import nodes
from stream_mmrnn.live.managed_process import process_context
from stream_mmrnn.predict.engine import StepEngine
from tools.bench.load import OpenLoop, SessionRecord, Transport, Turn

PEER = Path(__file__).parent / "peers" / "triton_sessions.py"
PYTHON = "STREAM_MMRNN_TRITON_PYTHON"
"""The environment variable that names a Python which has nvidia-pytriton."""
INSTALL = f"make an environment with nvidia-pytriton and onnxruntime, and name its Python in {PYTHON}"

_DRAIN_S = 10.0
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
_PROBES = 4
_TOLERANCE = 1e-4
_LATENESS_MS = 5000.0
"""A request that is late is answered late, as a server does: the clock shall not close its tick before."""


class Contender(Protocol):
    name: str
    versions: dict[str, str]

    def turn(self, sessions: int, duration_s: float) -> Turn:
        """So many sessions for so long, after `SETTLE_S` that are not counted."""

    def close(self) -> None: ...


def vectors(size: int) -> FloatArray:
    """What sessions say, a row each; the 65th says the same as the first."""
    return np.random.default_rng(0).standard_normal((64, size)).astype(np.float32) * np.float32(0.5)


class Ours:
    """The engine, called in this process."""

    name = "ours"

    def __init__(self, path: Path, seed: int) -> None:
        self.versions: dict[str, str] = {}
        self._path, self._seed = path, seed
        self._loads: dict[int, Load] = {}

    def turn(self, sessions: int, duration_s: float) -> Turn:
        if sessions not in self._loads:
            self._loads[sessions] = Load(StepEngine(self._path, sessions), sessions, "spread", self._seed)
        load = self._loads[sessions]
        load.latency = _Kept()
        load.run(duration_s + SETTLE_S, lambda: True)
        return Turn(load.latency.count, load.latency.values, [], {})

    def close(self) -> None:
        self._loads.clear()


class _Kept(Histogram):
    """With each value, beside the counts."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[int] = []

    def add(self, value_ns: int) -> None:
        super().add(value_ns)
        self.values.append(value_ns)


class OverBus(Transport):
    """Features from here to an engine's process and predictions back, by a broker, as in a live session.

    A request is a feature vector whose event time is its tick's end, so that it closes its tick when it comes; a
    prediction for that tick of that session which has seen the vector is its answer. Between turns no session is open,
    or the engine would step them all by the clock while others are measured.
    """

    name = "ours_bus"

    def __init__(self, path: Path, most: int, seed: int) -> None:
        self.versions: dict[str, str] = {}
        self._seed, self._turn = seed, 0
        settings = config.load(
            None,
            {
                "engine.model": str(path),
                "engine.slots": most,
                "engine.provider": "cpu",
                "align.signal_lateness_ms": _LATENESS_MS,
                "session.name": "bench",
            },
        )
        self._queue = settings.bus.queue
        self._stack = contextlib.ExitStack()
        try:
            self._start(settings)
        except BaseException:
            self.close()
            raise

    def _start(self, settings: Settings) -> None:
        address = Address.create(settings.bus.transport if sys.platform != "win32" else "tcp")
        self._stack.callback(address.remove)
        new: Any = process_context()
        epoch = new.Value("q", 0)
        self._subscriber: Subscriber | None = None
        for name in ("broker", "clock", "engine"):
            context = nodes.Context(name, settings, address, nodes.Flag(new), nodes.Flag(new), epoch)
            process = new.Process(target=nodes.run, args=(processes.by_name(name).target, context), daemon=True)
            process.start()
            self._stack.callback(_end, process, context)
            if name == "engine":
                # it waits for a reader of predictions before it is ready
                self._subscriber = Subscriber(address, [topics.PREDICTION], self._queue)
                self._stack.callback(self._subscriber.close)
            if not context.ready.wait(settings.supervisor.start_timeout_s):
                raise ProcessError(f"the {name} of the bench's bus did not start")
        self._publisher = Publisher(address, self._queue)
        self._stack.callback(self._publisher.close, 0)
        if not self._publisher.wait_for_reader(topics.FEATURE, settings.supervisor.start_timeout_s):
            raise ProcessError("the engine of the bench's bus does not listen")
        self._said = vectors(models.INPUT)

    def turn(self, sessions: int, duration_s: float) -> Turn:
        self._turn += 1
        # new names: a publisher's numbers of a session begin with it
        names = [f"bench-{self._turn}-{i}" for i in range(sessions)]
        self._first = -(-(now_ns() + 100_000_000) // TICK_NS)
        load = OpenLoop(names, self._seed, duration_s + SETTLE_S, begin_ns=self._first * TICK_NS)
        for name in names:
            self._session(name, "open", load.begin_ns - TICK_NS)
        over = threading.Event()
        reader = threading.Thread(target=self._read, args=(load, over), daemon=True)
        reader.start()
        for wait_s in load.play(self):
            time.sleep(wait_s)
        over.set()
        reader.join()
        for name in names:
            self._session(name, "close", load.begin_ns - TICK_NS)
        return load.turn(SETTLE_S)

    def send(self, record: SessionRecord, tick: int, due_ns: int) -> None:
        said = self._said[record.who % len(self._said)]
        event_ns = (self._first + tick) * TICK_NS
        self._publisher.publish(topics.feature(models.MODALITY), record.name, event_ns, due_ns, said)

    def _session(self, name: str, op: Any, event_ns: int) -> None:
        message = wire.SessionMessage(op, event_ns, (models.MODALITY,))
        self._publisher.publish(topics.SESSION, name, event_ns, event_ns, wire.pack(message))

    def _read(self, load: OpenLoop, over: threading.Event) -> None:
        """In a thread of its own, as the other client's answers are: an answer is not kept waiting by a call."""
        assert self._subscriber is not None
        records = {record.name: record for record in load.records}
        while not over.is_set():
            envelope = self._subscriber.receive(50)
            if envelope is None or envelope.session not in records:
                continue
            with contextlib.suppress(WireError):
                said = wire.unpack(envelope.payload, wire.PredictionMessage)
                if said.present[models.MODALITY]:
                    load.answered(records[envelope.session], said.tick - self._first)

    def close(self) -> None:
        self._stack.close()


def _end(process: Any, context: nodes.Context) -> None:
    context.stop.set()
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()


class Peer:
    """A server and its client in processes of their own, on orders (`tools/bench/peers/triton_sessions.py`)."""

    def __init__(self, name: str, python: str, kind: str, path: Path, seed: int) -> None:
        self.name, self._seed, self._features = name, seed, vectors(models.INPUT)
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 closed below
        try:
            self._process = subprocess.Popen(
                [python, str(PEER), kind, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                start_new_session=True,  # Ctrl-C is for us, who tell it
            )
        except OSError as e:
            self._said.close()
            raise ProcessError(f"it did not start: {e}") from e
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        try:
            ready = self._answer(START_TIMEOUT_S)
            versions = ready.get("versions")
            self.versions = {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {}
            self._prove(path)
        except BaseException:
            self.close()
            raise

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line; raises ProcessError, with the last thing that it said where it has ended."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise ProcessError(f"it said nothing for {timeout_s:g} s") from None
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
            self._said.seek(0)
            raise ProcessError(f"it ended: {self._said.read().strip().rpartition(chr(10))[2] or 'it said nothing'}")
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                return answer
        raise ProcessError(f"it answered {line.strip()[:80]!r}, which is no object of JSON")

    def _ask(self, timeout_s: float, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone: the missing answer says why
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        return self._answer(timeout_s)

    def _prove(self, path: Path) -> None:
        """What it answers is what the model says: a server that is fast by doing something else is no peer."""
        engine = StepEngine(path)
        engine.open("probe")
        features = self._features[:_PROBES]
        nowhere, of = Stamps(0, 0, 0, 0, ""), models.MODALITY
        heads = [
            engine.step([Tick("probe", k, 0, {of: x}, {of: True}, {of: 0}, nowhere)])[0].heads[models.HEAD].copy()
            for k, x in enumerate(features)
        ]
        said = self._ask(START_TIMEOUT_S, do="probe", session=2**31, features=features.tolist())
        try:
            wrong = float(np.abs(np.array(said["heads"], np.float32) - np.stack(heads)).max())
        except (KeyError, TypeError, ValueError) as e:
            raise ProcessError(f"its answer to a probe cannot be read: {e}") from e
        if not wrong <= _TOLERANCE:
            raise ProcessError(f"its answers differ from the model's by {wrong:g}; it serves something else")

    def turn(self, sessions: int, duration_s: float) -> Turn:
        said = self._ask(
            duration_s + SETTLE_S + _DRAIN_S + START_TIMEOUT_S,
            do="run",
            due_ns=phases(sessions, "spread", self._seed).tolist(),
            features=self._features[:sessions].tolist(),
            tick_ns=TICK_NS,
            duration_s=duration_s + SETTLE_S,
            settle_s=SETTLE_S,
        )
        try:
            requests = int(said["requests"])
            latency_ns, path_ns = ([int(x) for x in said[name]] for name in ("latency_ns", "path_ns"))
            errors = {str(why): int(n) for why, n in said.get("errors", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ProcessError(f"its account of a turn cannot be read: {e}") from e
        if len(latency_ns) > requests:
            raise ProcessError(f"it has {len(latency_ns)} answers to {requests} requests")
        return Turn(requests, latency_ns, path_ns, errors)

    def close(self) -> None:
        """Let it end its server by itself, which leaves shared memory behind else; then kill what is left."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
            self._process.wait()
        self._reader.join(STOP_TIMEOUT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._said.close()


def interpreter() -> tuple[str, str]:
    """A Python that has nvidia-pytriton, and "" or why there is none."""
    named = os.environ.get(PYTHON, "")
    if named:
        found = shutil.which(named)
        return (found, "") if found else ("", f"{PYTHON} names {named!r}, which is no program; {INSTALL}")
    if importlib.util.find_spec("pytriton") is None:
        return "", f"pytriton is not installed; {INSTALL}"
    return sys.executable, ""
