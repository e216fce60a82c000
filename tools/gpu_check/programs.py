"""The whole programs on the device, as processes: a live session, and a server with sessions of clients.

What a client gets is compared with the CPU's engine in this process. Knows nothing about graphs or device memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.bench import models
from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.core.extras import missing
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.graph.runtime import Provider
from stream_mmrnn.predict.engine import StepEngine
from tools.gpu_check import device
from tools.gpu_check.checks import BOUND, Result, ticks_of

_ROOT = Path(__file__).parent.parent.parent
_SPARE_S = 120.0
"""How much longer than its duration a live session may take: CUDA's libraries take seconds to load."""


def missing_packages() -> str:
    """What these programs need and is not there; "" where all is."""
    return ", ".join(missing(("zmq", "typer", "rich")))


def _environment(folder: Path) -> Mapping[str, str]:
    paths = [str(_ROOT), *(str(Path(entry or ".").resolve()) for entry in sys.path)]
    libraries = [*map(str, device.library_folders()), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "XDG_STATE_HOME": str(folder),
    }


def live_session(provider: Provider, seconds: float, folder: Path) -> dict[str, Any]:
    """The default model in a live session with synthetic sound: milliseconds from the event to its reader.

    Raises:
        ProcessError: it did not run.

    """
    command = [sys.executable, "-m", "stream_mmrnn", "bench", "end-to-end", "--modalities", "audio", "--json"]
    try:
        ran = subprocess.run(
            [*command, "--provider", provider, "--duration", f"{seconds:g}"],
            env=_environment(folder),
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds + _SPARE_S,
        )
    except subprocess.TimeoutExpired as e:
        raise ProcessError(f"a live session of {seconds:g} s did not end within {_SPARE_S:g} s after it") from e
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ProcessError(f"a live session on {provider} did not run: {last}")
    row = json.loads(ran.stdout.splitlines()[-1])["rows"][0]
    return {"program": "live session", "sessions": 1, "ticks": row["predictions"], "ms": row["event_to_reader_ms"]}


@contextlib.contextmanager
def _server(path: Path, provider: Provider, slots: int, folder: Path) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "stream_mmrnn", "serve", "--model", str(path), "--provider", provider]
    process = subprocess.Popen(
        [*command, "--slots", str(slots), "--port", "0", "--json"],
        env=_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        if " at tcp://" not in line:
            raise ProcessError(f"the server did not start on {provider}: {line}{process.stderr.read()}".strip())
        yield line.split(" at ")[1].split(": up")[0]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stderr.close()


def served(
    path: Path, provider: Provider, sessions: int, seconds: float, folder: Path
) -> tuple[dict[str, Any], Result]:
    """A round of steps of all sessions after the other, each waiting for its answers; and whether they are the CPU's.

    Raises:
        ProcessError: the server did not start.

    """
    from stream_mmrnn.serve.client import Client

    rng = np.random.default_rng(8)
    names = [f"session-{i}" for i in range(sessions)]
    host = StepEngine(path, sessions)
    for name in names:
        host.open(name)
    took, worst, k = Histogram(), 0.0, 0
    with _server(path, provider, 4 * sessions, folder) as address, Client(address) as client:
        opened = [client.open(name) for name in names]
        end_ns = time.perf_counter_ns() + round(seconds * 1e9)
        while not k or time.perf_counter_ns() < end_ns:
            features = rng.standard_normal((sessions, models.INPUT)).astype(np.float32)
            ticks = ticks_of(names, k, features)
            began_ns = time.perf_counter_ns()
            for session, tick in zip(opened, ticks, strict=True):
                given = {name: vector for name, vector in tick.features.items() if tick.present[name]}
                session.send(given, tick=k, event_ns=tick.event_ns, age_ns=tick.age_ns)
            answers = [session.receive() for session in opened]
            took.add(time.perf_counter_ns() - began_ns)
            for answer, right in zip(answers, host.step(ticks), strict=True):
                assert answer is not None
                worst = max(worst, float(np.abs(answer.heads[models.HEAD] - right.heads[models.HEAD]).max()))
            k += 1
    row = {"program": "serve", "sessions": sessions, "ticks": k * sessions, "ms": took.row()}
    check = {"check": f"serve, {sessions} sessions: as the CPU", "ticks": k * sessions, "worst_output": worst}
    return row, {**check, "bound": BOUND, "ok": worst <= BOUND}
