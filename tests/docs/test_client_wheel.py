"""The distribution stream-mmrnn-client: complete, small, and used beside a session and a server of the full one."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import serving
from fresh_environment import Installed, apart, build
from harness import Running
from places import ROOT

PROJECT = ROOT / "packaging" / "client"
PACKAGES = ("msgspec", "numpy", "pyzmq")
"""What it needs on Linux."""
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", (PROJECT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    for needed in ("grimp", "hatchling"):
        pytest.importorskip(needed, reason=f"building the client needs {needed}: pip install '.[dev]'")
    spec = importlib.util.spec_from_file_location("client_hatch_build", PROJECT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def project(folder: Path) -> dict[str, Any]:
    with (folder / "pyproject.toml").open("rb") as file:
        found: dict[str, Any] = tomllib.load(file)["project"]
    return found


def test_its_modules_need_no_other_packages_than_it_names(hook: ModuleType) -> None:
    tops = {module.partition(".")[0] for module in hook.needed_modules()} - set(sys.stdlib_module_names)
    # av converts sound of another rate than 16 kHz, the others are extras; else a sentence names them
    optional = {"av", "livekit", "pipecat"}
    assert tops - optional == {"stream_mmrnn", "msgspec", "numpy", "psutil", "zmq"}
    named = project(PROJECT)["dependencies"]
    assert [re.split(r"[^\w-]", d)[0] for d in named] == ["msgspec", "numpy", "psutil", "pyzmq"]
    assert {d.partition(";")[0] for d in named} <= set(project(ROOT)["dependencies"])
    assert project(PROJECT)["optional-dependencies"]["livekit"] == project(ROOT)["optional-dependencies"]["livekit"]
    for key in ("license", "requires-python"):
        assert project(PROJECT)[key] == project(ROOT)[key]


@pytest.fixture(scope="module")
def wheel(hook: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(PROJECT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def client(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("client"), wheel, PACKAGES)


@pytest.mark.process
@pytest.mark.slow
def test_the_wheel_is_small_and_has_the_sources_of_the_checkout(wheel: Path) -> None:
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        contents = {name: file.read(name) for name in names}
    info = f"stream_mmrnn_client-{project(ROOT)['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"stream_mmrnn", info}
    assert {"stream_mmrnn/py.typed", f"{info}/licenses/LICENSE"} < set(names)
    assert contents[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    for name in names:
        if name.startswith("stream_mmrnn/"):
            assert contents[name] == (ROOT / name).read_bytes()
    metadata = Parser().parsestr(contents[f"{info}/METADATA"].decode())
    assert (metadata["Name"], metadata["License-Expression"]) == ("stream-mmrnn-client", "Apache-2.0")


@pytest.mark.process
@pytest.mark.slow
def test_the_public_names(client: Installed, hook: ModuleType) -> None:
    assert {"subscribe", "push", "Client", "AsyncClient", "PipecatTurnAnalyzer"} <= set(hook.NAMES)
    code = f"""
import stream_mmrnn, sys
from stream_mmrnn import *
from stream_mmrnn import {", ".join(hook.NAMES)}
assert set(stream_mmrnn.__all__) <= set(dir(stream_mmrnn)) & set(globals())
assert "StepEngine" not in dir(stream_mmrnn)
assert "onnxruntime" not in sys.modules
print(stream_mmrnn.__version__)
"""
    assert client.python(code) == project(ROOT)["version"]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("name", ["StepEngine", "Predictor", "predict", "capture", "ClusterClient"])
def test_a_name_that_only_the_full_distribution_has(client: Installed, name: str) -> None:
    code = f"try:\n    from stream_mmrnn import {name}\nexcept ImportError as e:\n    print(e)"
    said = client.python(code)
    assert said.startswith(f"{name} is not part of stream-mmrnn-client: install stream-mmrnn for it")


@pytest.mark.process
@pytest.mark.slow
def test_type_checkers_see_the_types(client: Installed) -> None:
    (client.cwd / "typed.py").write_text("from stream_mmrnn import AsyncClient, subscribe\nreveal_type(subscribe)\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(client.bin / "python"), "typed.py"]
    done = subprocess.run(command, cwd=client.cwd, env=client.env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout
    assert "stream_mmrnn.bus.subscription.Subscription" in done.stdout


@pytest.mark.process
@pytest.mark.slow
def test_both_in_one_environment_is_a_warning(wheel: Path, tmp_path: Path) -> None:
    env = Installed(tmp_path, wheel, PACKAGES)
    assert env.python("import warnings; warnings.simplefilter('error'); from stream_mmrnn import Client") == ""
    (env.site / "stream_mmrnn-9.9.dist-info").mkdir()
    code = "import warnings; warnings.simplefilter('error'); import stream_mmrnn\n"
    code += "try:\n    stream_mmrnn.Client\nexcept RuntimeWarning as e:\n    print(e)"
    assert "stream-mmrnn and stream-mmrnn-client are both installed" in env.python(code)


@pytest.mark.process
@pytest.mark.slow
def test_it_reads_a_session_and_uses_a_server_of_another_environment(client: Installed, tmp_path: Path) -> None:
    read, send, step = EXAMPLES
    without = "\nimport sys; assert 'onnxruntime' not in sys.modules"
    env = os.environ | apart(client.folder)
    session = Running("--source", "synthetic", "--audio", "push", "--duration", "8", env=env)
    try:
        client.python(send + without)
        said = client.python(read + without)
        code, summary = session.finish()
    finally:
        session.close()
    assert (code, summary["balanced"]) == (0, True)
    assert len(said.splitlines()) > 10
    assert summary["streams"]["audio"]["capture"]["produced"] == 1
    server, address = serving.start(Path("turn_taking"), tmp_path, 0)
    try:
        said = client.python(step.replace("tcp://127.0.0.1:7701", address) + without)
        assert len(said.splitlines()) == 1
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.communicate()
