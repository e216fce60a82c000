"""Peer of `stream-mmrnn bench sessions`: NVIDIA's Triton server over the same step, for sessions that call at a rate.

    triton_sessions.py backend|bind MODEL

Runs in a Python that has nvidia-pytriton, onnxruntime and nothing of ours. `backend` is the server alone with this
file as a model of its Python backend (`TritonPythonModel`, below); `bind` is pytriton's `Triton().bind(...)`, the same
callable one process further away. Both batch whatever is there and wait for no more. State stays with ORT, in arrays
with a row a session; a request is a session's number and its features.

This process is the client, by gRPC on loopback. Orders are lines of JSON on standard input, each answered by one line
on standard output; the first line, `{"versions": {...}}`, says that all is ready. At the end of its input it stops the
server and ends.

    {"do": "probe", "session": 7, "features": [[...], ...]}  ->  {"heads": [[...], ...]}: one after the other
    {"do": "run", "due_ns": [...], "features": [[...], ...], "tick_ns": T, "duration_s": D, "settle_s": S}  ->
        {"requests": n, "latency_ns": [...], "path_ns": [...], "errors": {why: n}}

`due_ns` has when in its tick each session calls, sorted. Latency counts from that intended time until the head is an
array in this process, the path from the beginning of the call; calls of the first S seconds are made, but not counted.
An unanswered call is in no list.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAME = "gru"
BATCH = 64
SLOTS = 4096
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 12.0
_LIBRARIES = "nvidia_pytriton.libs"
"""The folder beside the package, with what the server is linked with."""
_DRAIN_S = 10.0
"""How long after the last call answers are waited for."""

_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {batch}
input [
  {{ name: "SESSION" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "FEATURES" data_type: TYPE_FP32 dims: [ {features} ] }}
]
output [ {{ name: "HEAD" data_type: TYPE_FP32 dims: [ {head} ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
dynamic_batching {{ max_queue_delay_microseconds: 0 }}
parameters [ {{ key: "graph" value: {{ string_value: "{graph}" }} }} ]
"""


# ---- in the server ---------------------------------------------------------------------------------------------------


class Rows:
    """The step for any sessions: their state's rows are gathered, run and put back."""

    def __init__(self, graph: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._run = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run
        self.shape_of = {i.name: i.shape[1:] for i in _edges(graph)}
        self._input = next(n for n in self.shape_of if n.startswith("input."))
        self._head = next(n for n in self.shape_of if n.startswith("head."))
        states = [n for n in self.shape_of if n.startswith("state.")]
        self._states = {n: np.zeros((SLOTS, *self.shape_of[n]), np.float32) for n in states}
        self._outputs = [self._head, *("next." + n.removeprefix("state.") for n in states)]
        self._slots: dict[int, int] = {}
        self.features, self.head = self.shape_of[self._input][0], self.shape_of[self._head][0]

    def step(self, sessions: list[int], features: np.ndarray) -> np.ndarray:
        """The heads, in the order of the sessions; one that is there twice is stepped twice, in turn."""
        if len(set(sessions)) == len(sessions):
            return self._step(sessions, features)
        heads = np.empty((len(sessions), self.head), np.float32)
        left = list(range(len(sessions)))
        while left:
            taken: dict[int, int] = {}
            for i in left:
                taken.setdefault(sessions[i], i)
            now = list(taken.values())
            heads[now] = self._step([sessions[i] for i in now], features[now])
            left = [i for i in left if i not in now]
        return heads

    def _step(self, sessions: list[int], features: np.ndarray) -> np.ndarray:
        count = len(sessions)
        new = np.array([s not in self._slots for s in sessions])
        slots = [self._slots.setdefault(s, len(self._slots)) for s in sessions]
        feed = {n: held[slots] for n, held in self._states.items()}
        feed |= {
            self._input: features,
            "present": np.ones((count, 1), np.float32),
            "age": np.zeros((count, 1), np.float32),
            "active": np.ones(count, np.bool_),
            "reset": new,
        }
        head, *following = self._run(self._outputs, feed)
        for held, value in zip(self._states.values(), following, strict=True):
            held[slots] = value
        return head


def _edges(graph: str) -> list[Any]:
    import onnxruntime as ort

    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return [*session.get_inputs(), *session.get_outputs()]


class TritonPythonModel:
    """What the Python backend asks for; this file lies in its model repository as `model.py`."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self._rows = Rows(parameters["graph"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        import triton_python_backend_utils as pb

        sessions = [pb.get_input_tensor_by_name(r, "SESSION").as_numpy() for r in requests]
        features = [pb.get_input_tensor_by_name(r, "FEATURES").as_numpy() for r in requests]
        flat = sessions[0] if len(requests) == 1 else np.concatenate(sessions)
        heads = self._rows.step(flat[:, 0].tolist(), features[0] if len(requests) == 1 else np.concatenate(features))
        answers, at = [], 0
        for of in sessions:
            answers.append(pb.InferenceResponse([pb.Tensor("HEAD", heads[at : at + len(of)])]))
            at += len(of)
        return answers


def serve_bound(graph: str, http: str, grpc: str, folder: str) -> None:
    """The way of pytriton: a callable in this process, the server and a proxy in others."""
    from pytriton.decorators import batch
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    rows = Rows(graph)

    @batch
    def step(SESSION: np.ndarray, FEATURES: np.ndarray) -> dict[str, np.ndarray]:  # noqa: N803 the tensors' names
        return {"HEAD": rows.step(SESSION[:, 0].tolist(), FEATURES)}

    config = TritonConfig(
        http_address="127.0.0.1",
        grpc_address="127.0.0.1",
        http_port=int(http),
        grpc_port=int(grpc),
        allow_metrics=False,
    )
    triton = Triton(config=config, workspace=folder)
    triton.bind(
        NAME,
        step,
        [Tensor(name="SESSION", dtype=np.int64, shape=(1,)), Tensor(name="FEATURES", dtype=np.float32, shape=(-1,))],
        [Tensor(name="HEAD", dtype=np.float32, shape=(-1,))],
        config=ModelConfig(max_batch_size=BATCH, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
    )
    triton.run()
    sys.stdin.read()  # as long as whoever started it
    triton.stop()


# ---- the server's process, seen from here ----------------------------------------------------------------------------


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


def _backend_command(graph: str, folder: Path, port: int) -> list[str]:
    """A model repository that holds this file, and the server that reads it."""
    import pytriton

    dist = Path(pytriton.__file__).parent / "tritonserver"
    rows, home = Rows(graph), folder / "models" / NAME
    (home / "1").mkdir(parents=True)
    shutil.copy(__file__, home / "1" / "model.py")
    # the backend's process of this Python's version lies beside the backend, not in the wheel's folder of it
    shutil.copytree(dist / "backends", folder / "backends")
    stub = f"{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copy(dist / "python_backend_stubs" / stub / "triton_python_backend_stub", folder / "backends" / "python")
    config = _CONFIG.format(name=NAME, batch=BATCH, features=rows.features, head=rows.head, graph=graph)
    (home / "config.pbtxt").write_text(config)
    return [
        str(dist / "bin" / "tritonserver"),
        *("--model-repository", str(folder / "models")),
        *("--backend-directory", str(folder / "backends")),
        *("--backend-config", f"python,shm-region-prefix-name={_shared(folder)}"),
        *("--backend-config", "python,shm-default-byte-size=4194304"),
        *("--grpc-address", "127.0.0.1", "--grpc-port", str(port)),
        *("--allow-http", "false", "--allow-metrics", "false"),
    ]


def _shared(folder: Path) -> str:
    """How the server's blocks of shared memory begin: no other block begins so."""
    return folder.name


@contextlib.contextmanager
def _server(kind: str, graph: str) -> Iterator[str]:
    """The address of a server that runs until the end; a graceful end, for it leaves shared memory behind else."""
    import pytriton

    with tempfile.TemporaryDirectory(prefix="stream-mmrnn-triton-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        http, grpc = _free_ports(2)
        if kind == "backend":
            command = _backend_command(graph, folder, grpc)
        else:
            command = [sys.executable, __file__, "serve", graph, str(http), str(grpc), str(folder / "workspace")]
        libraries = [os.environ.get("LD_LIBRARY_PATH", ""), str(Path(pytriton.__file__).parent.parent / _LIBRARIES)]
        # the backend's interpreter is the first python3 of PATH
        path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        env = {**os.environ, "PATH": path, "LD_LIBRARY_PATH": os.pathsep.join(p for p in libraries if p)}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, env=env)
        try:
            yield _wait(process, f"127.0.0.1:{grpc}")
        finally:
            process.stdin.close()
            if kind == "backend":
                process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _end_strays(folder)
            for left in Path("/dev/shm").glob(f"{_shared(folder)}*"):  # noqa: S108 where such blocks are
                left.unlink(missing_ok=True)


def _end_strays(folder: Path) -> None:
    """A server that ended in a hurry leaves its backend's process, whose program lies in our own folder."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(os.fsencode(folder) + b"/"):
                os.kill(int(process.name), signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], address: str) -> str:
    import tritonclient.grpc as grpc

    client = grpc.InferenceServerClient(address)
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with code {process.returncode} before it was ready")
        with contextlib.suppress(grpc.InferenceServerException):
            if client.is_model_ready(NAME):
                client.close()
                return address
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready after {_START_TIMEOUT_S:g} s")


# ---- the client ------------------------------------------------------------------------------------------------------


class Client:
    """Calls at their times, over one stream, which is faster than a call each; `tools.bench.load` is not here."""

    def __init__(self, address: str) -> None:
        import tritonclient.grpc as grpc

        self._grpc = grpc
        self._client = grpc.InferenceServerClient(address)
        self._outputs = [grpc.InferRequestedOutput("HEAD")]
        self._sent = 0
        self._waiting: dict[str, Callable[[], None]] = {}
        self._errors: dict[str, int] = {}
        self._client.start_stream(self._answered)

    @property
    def server(self) -> str:
        """Its version."""
        return self._client.get_server_metadata().version

    def _answered(self, result: Any, error: Any) -> None:
        if error is not None:
            self._errors[str(error)] = self._errors.get(str(error), 0) + 1
            return
        result.as_numpy("HEAD")
        take = self._waiting.pop(result.get_response().id, None)
        if take is not None:
            take()

    def _inputs(self, session: int, features: np.ndarray) -> list[Any]:
        who = self._grpc.InferInput("SESSION", [1, 1], "INT64")
        who.set_data_from_numpy(np.array([[session]], np.int64))
        what = self._grpc.InferInput("FEATURES", [1, len(features)], "FP32")
        what.set_data_from_numpy(features[None])
        return [who, what]

    def probe(self, order: dict[str, Any]) -> dict[str, Any]:
        heads = []
        for vector in order["features"]:
            inputs = self._inputs(order["session"], np.array(vector, np.float32))
            heads.append(self._client.infer(NAME, inputs, outputs=self._outputs).as_numpy("HEAD")[0].tolist())
        return {"heads": heads}

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        due_ns, features = order["due_ns"], np.array(order["features"], np.float32)
        # what a session says is the same each time, as it is for the others
        said = [self._inputs(i, features[i % len(features)]) for i in range(len(due_ns))]
        self._waiting.clear()
        self._errors.clear()
        answers: list[tuple[int, int]] = []

        def take(intended_ns: int, began_ns: int, counted: bool) -> None:
            read_ns = time.monotonic_ns()
            if counted:
                answers.append((read_ns - intended_ns, read_ns - began_ns))

        base_ns = time.monotonic_ns() + 50_000_000
        settled_ns, end_ns = base_ns + int(order["settle_s"] * 1e9), base_ns + int(order["duration_s"] * 1e9)
        requests = 0
        for intended_ns, session in _calls(due_ns, order["tick_ns"], base_ns, end_ns):
            counted = intended_ns >= settled_ns
            while (left_ns := intended_ns - time.monotonic_ns()) > 0:
                time.sleep(left_ns / 1e9)
            self._sent += 1
            number = str(self._sent)
            self._waiting[number] = functools.partial(take, intended_ns, time.monotonic_ns(), counted)
            self._client.async_stream_infer(NAME, said[session], request_id=number, outputs=self._outputs)
            requests += counted
        deadline_s = time.monotonic() + _DRAIN_S
        while self._waiting and not self._errors and time.monotonic() < deadline_s:
            time.sleep(0.01)
        found = list(answers)  # what comes later than this is lost
        return {
            "requests": requests,
            "latency_ns": [latency_ns for latency_ns, _ in found],
            "path_ns": [path_ns for _, path_ns in found],
            "errors": dict(self._errors),
        }

    def close(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


def _calls(due_ns: list[int], tick_ns: int, base_ns: int, end_ns: int) -> Iterator[tuple[int, int]]:
    """When and whose, in order, until the end."""
    while True:
        for session, offset_ns in enumerate(due_ns):
            if base_ns + offset_ns >= end_ns:
                return
            yield base_ns + offset_ns, session
        base_ns += tick_ns


def _versions() -> dict[str, str]:
    found = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for package in ("nvidia-pytriton", "tritonclient", "onnxruntime-gpu", "onnxruntime", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _with_libraries() -> None:
    """Begin again where the loader would not find libpython: the backend's process is linked with it."""
    folder = sysconfig.get_config_var("LIBDIR") or ""
    known = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    if folder and folder not in known:
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([folder, *(p for p in known if p)])
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 this program


def main(kind: str, *options: str) -> None:
    if kind == "serve":
        serve_bound(*options)
        return
    _with_libraries()
    # libraries print to standard output, where only answers belong
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    with _server(kind, options[0]) as address, contextlib.closing(Client(address)) as client:
        orders: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"probe": client.probe, "run": client.run}
        say({"versions": {"triton": client.server, **_versions()}})
        for line in sys.stdin:
            order = json.loads(line)
            say(orders[order["do"]](order))


if __name__ == "__main__":
    main(*sys.argv[1:])
