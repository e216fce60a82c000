from __future__ import annotations

import multiprocessing.process
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_model
from hypothesis import HealthCheck, settings
from places import SHARED

from stream_mmrnn.capture import encoders
from stream_mmrnn.core.types import ModalitySpec

# how long an example takes says nothing on a machine that others use too
settings.register_profile("shared_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared_machine")

if hasattr(signal, "SIGHUP"):  # programs that tests start must react to it, also where the tests run under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn")
"""Audit events of a process that starts."""
_TOOLS = ("ldconfig", "gcc", "cc", "ld")
"""What `ctypes.util.find_library` runs: no process of a test."""
_started: list[str] = []


def _note_start(event: str, args: tuple[Any, ...]) -> None:
    if event in _STARTS and Path(str(args[0] if args else "")).name not in _TOOLS:
        _started.append(event)


def _note_multiprocessing() -> None:
    """A fork server starts processes without an audit event here."""
    start = multiprocessing.process.BaseProcess.start

    def noted(self: multiprocessing.process.BaseProcess) -> None:
        _started.append("multiprocessing")
        start(self)

    multiprocessing.process.BaseProcess.start = noted  # type: ignore[method-assign]


sys.addaudithook(_note_start)
_note_multiprocessing()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _started.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """`make quick` leaves out what is marked `process`; so a test that starts one must say so."""
    result = yield
    if _started and item.get_closest_marker("process") is None:
        pytest.fail(f"the test starts a process ({_started[0]}); mark it with @pytest.mark.process", pytrace=False)
    return result


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the sizes of toy_model.MODALITIES."""
    return toy_model.make(tmp_path_factory.mktemp("models") / "toy.onnx")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the sizes and origins of the real encoders."""
    specs = tuple(
        ModalitySpec(m, e.size, e.origin) for m in ("vision", "audio", "text") for e in [encoders.create_encoder(m)]
    )
    return toy_model.make(tmp_path_factory.mktemp("live") / "toy.onnx", specs)


@pytest.fixture(scope="session")
def clips() -> Path:
    folder = SHARED / "data" / "clips"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return folder


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for that of a socket in it, however deep the system's temporary folder is."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)
