"""The wheel is small, complete, and runs outside the checkout."""

from __future__ import annotations

import shutil
import subprocess
import time
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from fresh_environment import Installed, build
from places import ROOT

from stream_mmrnn.core.settings import EngineSettings

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as by `pip wheel . --no-deps`."""
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_files_in_the_wheel(wheel: Path) -> None:
    assert wheel.stat().st_size < 39_000_000
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    model = EngineSettings().model
    for name in (
        "py.typed",
        *(f"viewers/dashboard/page/{f.name}" for f in (ROOT / "stream_mmrnn/viewers/dashboard/page").iterdir()),
        f"_models/{model}/step.onnx",
        f"_models/{model}/card.md",
        "_models/encoders/silero_vad.onnx",
        "_models/encoders/smart_turn.onnx",
        "_models/encoders/silero_vad.contract.toml",
    ):
        assert f"stream_mmrnn/{name}" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"stream_mmrnn", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    assert not [n for n in names if "test" in Path(n).name or n.endswith((".pyc", ".mcap")) or "__pycache__" in n]
    inside = {n.removeprefix("stream_mmrnn/_models/") for n in names if n.startswith("stream_mmrnn/_models/")}
    there = subprocess.run(["git", "ls-files", "models"], cwd=ROOT, capture_output=True, text=True, check=False)
    if there.returncode == 0:
        assert inside == {name.removeprefix("models/") for name in there.stdout.split()}


def test_the_metadata_of_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (name,) = [n for n in file.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(file.read(name).decode())
    assert metadata["Name"] == "stream-mmrnn"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.13"} <= set(metadata.get_all("Classifier") or [])
    installed = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    for extra in metadata.get_all("Provides-Extra") or []:
        assert f"| `{extra}` |" in installed, f"docs/install.md does not describe the extra {extra}"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


def test_the_wheel_is_imported(installed: Installed) -> None:
    where = Path(installed.python("import stream_mmrnn; print(stream_mmrnn.__file__)"))
    assert ROOT not in where.parents
    assert installed.bin.parent in where.parents
    models = Path(installed.python("from stream_mmrnn.core.config import models_folder; print(models_folder())"))
    assert models == where.parent / "_models"
    scripts = installed.python(
        "from importlib.metadata import entry_points as e; print(*(x.value for x in e(name='stream-mmrnn')))"
    )
    assert "stream_mmrnn.__main__:main" in scripts


def test_it_runs_live_and_replays_outside_the_checkout(installed: Installed) -> None:
    code, live, err = installed.run("live", "--source", "synthetic", "--duration", "5", "--record", "talk.mcap")
    assert code == 0, err
    assert live["model"]["name"] == EngineSettings().model
    assert live["predictions"] > 50
    assert live["balanced"], live["streams"]
    code, replayed, err = installed.run("replay", "talk.mcap", "--verify")
    assert (code, replayed["identical"]) == (0, True), err
    assert replayed["predictions"] == live["predictions"]


def test_a_package_with_a_source_and_an_encoder_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """The example of the documentation: listed, recorded, replayed from raw, trained on, live."""
    project = tmp_path / "thermometer"
    shutil.copytree(ROOT / "docs" / "examples" / "thermometer", project)
    (tmp_path / "home").mkdir()
    env = Installed(tmp_path / "home", wheel)
    env.install(build(project, tmp_path / "built"))
    code, found, _ = env.run("doctor", "--timeout", "20")
    rows = {f["name"]: f for f in found["findings"]}
    for name in ("source thermometer", "encoder mean_slope"):
        assert (rows[name]["state"], rows[name]["says"]) == ("ok", "stream-mmrnn-thermometer 0.1.0")
    (env.cwd / "room.toml").write_text(
        '[streams.room]\nsource = "thermometer:demo"\nencoders = ["mean_slope"]\n'
        '[sources]\ntext = "stdin"\n[dashboard]\nenabled = false\n'
    )
    command = [env.bin / "python", "-m", "stream_mmrnn", "record", "room.mcap", "--config", "room.toml", "--plain"]
    recording = subprocess.Popen([*command, "--duration", "14"], cwd=env.cwd, env=env.env, stdin=subprocess.PIPE)
    assert recording.stdin is not None
    time.sleep(3)
    for k in range(10):
        recording.stdin.write(f"/label {'warm' if k % 2 else 'cold'}\n".encode())
        recording.stdin.flush()
        time.sleep(1)
    recording.stdin.close()
    assert recording.wait(60) == 0
    code, info, err = env.run("info", "room.mcap")
    assert code == 0, err
    assert info["channels"]["feature/room"]["messages"] > 80
    assert info["channels"]["raw/room"]["origin"] == "thermometer:demo"
    code, _, err = env.run("train", "--data", "room.mcap", "--out", "mine", "--name", "mine", "--quick")
    assert code == 0, err
    args = ("--model", "mine/step.onnx", "--duration", "4", "--record", "live.mcap")
    code, live, err = env.run("live", "--config", "room.toml", "--text", "none", *args)
    assert code == 0, err
    assert live["streams"]["room"]["delivered"] > 20
    code, replayed, err = env.run("replay", "live.mcap", "--from", "raw")
    assert (code, replayed["identical"]) == (0, True), err


def test_a_missing_extra_is_named(installed: Installed) -> None:
    """All verbs exist without torch; a verb that needs torch names the extra."""
    hidden = "import sys; sys.modules['torch'] = None\n"
    run = "sys.argv = ['stream-mmrnn', 'train', '--data', 'x']; from stream_mmrnn.cli.app import run; run()"
    done = subprocess.run(
        [installed.bin / "python", "-c", hidden + run],
        cwd=installed.cwd, env=installed.env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "pip install 'stream-mmrnn[train]'" in done.stderr
