"""`doctor` on this machine, and with libraries that are really broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stream_mmrnn.cli import doctor_checks as checks
from stream_mmrnn.cli import probes
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.graph import runtime

pytestmark = pytest.mark.process

COMMAND = [sys.executable, "-m", "stream_mmrnn", "doctor"]
Shadow = Callable[..., None]


@pytest.fixture
def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shadow:
    """Put other modules before the installed ones, for child processes."""

    def put(**content: str) -> None:
        for name, text in content.items():
            (tmp_path / f"{name}.py").write_text(text)
        before = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), before))))

    return put


def request(timeout_s: float = 30, **overrides: Any) -> checks.Request:
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return checks.Request(config.load(None, dotted), timeout_s)


def states(found: list[checks.Finding]) -> dict[str, str]:
    return {f.name: f.state for f in found}


def test_this_machine_has_no_fault() -> None:
    done = subprocess.run([*COMMAND, "--json", "--timeout", "60"], capture_output=True, text=True, timeout=200)
    document = json.loads(done.stdout)
    found = {f["name"]: f for f in document["findings"]}
    assert done.returncode == 0, found
    assert document["fault"] == 0
    assert sum(document[s] for s in ("ok", "absent", "warning")) == len(found)
    for finding in found.values():
        assert finding["says"]
        assert "\n" not in finding["says"] + finding.get("do", "")
        assert finding["state"] in ("ok", "absent") or finding["do"]
    assert found["provider cpu"]["facts"]["provider"] == "cpu"
    for name in (
        "model",
        "encoder vision",
        "encoder audio",
        "encoder text",
        "encoder face",
        "encoder prosody",
        "encoder tokens",
        "stream encoders",
        "bus",
        "clock",
        "recordings",
    ):
        assert found[name]["state"] in ("ok", "warning")
    assert "audio: audio" in found["stream encoders"]["says"]
    if not runtime.gpu_in_sight():
        assert found["provider cuda"]["state"] == "absent"
        assert "no NVIDIA GPU" in found["provider cuda"]["says"]
    if not list(Path("/dev").glob("video*")):
        assert found["cameras"]["state"] == "absent"
    if found["portaudio"]["state"] == "ok" and not Path("/dev/snd").exists():
        assert found["microphones"]["state"] in ("ok", "absent")  # ok: a sound server on the network


def test_a_broken_onnxruntime_is_a_fault(shadow: Shadow) -> None:
    shadow(onnxruntime="raise ImportError('libonnxruntime.so: cannot open shared object file')")
    found = list(checks.onnxruntime(request()))
    assert states(found) == {"onnxruntime": "fault"}
    assert "cannot open shared object file" in found[0].says
    assert "pip install --force-reinstall" in found[0].do


def test_an_onnxruntime_that_crashes_is_a_fault(shadow: Shadow) -> None:
    shadow(onnxruntime="import os; os.abort()")
    (found,) = checks.onnxruntime(request())
    assert found.state == "fault"
    assert "SIGABRT" in found.says or "exit code" in found.says


def distribution(folder: Path, name: str, version: str = "9.9", *, package: str = "") -> None:
    """What pip leaves of an installed distribution; `package`: the package that it installs."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text(f"{package}\n")


def test_both_packages_beside_each_other_are_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        distribution(tmp_path, name, package="onnxruntime")
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = checks.onnxruntime(request())
    assert found.state == "fault"
    assert found.says.startswith("onnxruntime 9.9 and onnxruntime-gpu 9.9 are installed together")
    assert found.do.startswith("pip uninstall -y onnxruntime onnxruntime-gpu, then")


def test_the_distribution_of_onnxruntime_is_named() -> None:
    (name,) = set(metadata.packages_distributions()["onnxruntime"])
    found = {f.name: f for f in checks.onnxruntime(request())}["onnxruntime"]
    assert (found.state, found.says) == ("ok", f"{name} {metadata.version(name)}")
    assert found.facts["distribution"] == name


def test_the_client_beside_the_full_distribution_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stream-mmrnn", "stream-mmrnn-client"):
        distribution(tmp_path, name, package="stream_mmrnn")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {f.name: f for f in checks.versions(request())}
    assert found["versions"].state == "ok"
    assert found["distributions"].state == "fault"
    assert "stream-mmrnn and stream-mmrnn-client are both installed" in found["distributions"].says


def test_a_missing_dependency_is_named_with_what_installs_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `pip install --no-deps` leaves it."""
    distribution(tmp_path, "stream-mmrnn", package="stream_mmrnn")
    with (tmp_path / "stream_mmrnn-9.9.dist-info" / "METADATA").open("a") as file:
        for needed in ("numpy>=1.26", "no-such-package>=2", "onnxruntime-gpu>=1.22", "other; extra == 'x'"):
            file.write(f"Requires-Dist: {needed}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = checks.versions(request())
    assert (found.state, found.says) == ("fault", "not installed: no-such-package")
    assert found.do == "pip install no-such-package"


def test_a_fault_ends_with_exit_code_1(shadow: Shadow) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc, a folder where nothing can be written")
    shadow(tokenizers="raise ImportError('gone')")
    options = ["--model", "nix", "--record", "/proc/nix/talk.mcap"]
    done = subprocess.run([*COMMAND, *options, "--json"], capture_output=True, text=True, timeout=200)
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    faults = {name for name, f in found.items() if f["state"] == "fault"}
    assert faults == {"model", "recordings", "encoder text", "encoder tokens"}
    assert "there is no model 'nix'" in found["model"]["says"]
    assert "cannot be written" in found["recordings"]["says"]
    assert "gone" in found["encoder text"]["says"]


def test_a_driver_that_hangs_is_a_warning(shadow: Shadow, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    shadow(sounddevice=f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(1000)")
    began = time.monotonic()
    (found,) = checks.sound(request(timeout_s=3))
    assert time.monotonic() - began < 60
    assert found.state == "warning"
    assert "no answer in 3 s" in found.says
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_without_portaudio_sound_is_absent_and_the_package_is_named(shadow: Shadow) -> None:
    shadow(sounddevice="raise OSError('PortAudio library not found')")
    found = list(checks.sound(request()))
    assert states(found) == {"portaudio": "absent", "microphones": "absent"}
    assert "libportaudio2" in found[0].do


def test_a_requested_gpu_that_is_missing_is_a_fault() -> None:
    if runtime.gpu_in_sight():
        pytest.skip("this machine has a GPU")
    found = states(list(checks.onnxruntime(request(engine__provider="cuda"))))
    assert found["provider cuda"] == "fault"
    assert found["provider cpu"] == "ok"


def test_errors_of_a_probe_are_raised() -> None:
    with pytest.raises(StreamError, match=r"/no/such\.onnx cannot be read"):
        probes.ask("model", {"path": "/no/such.onnx", "provider": "cpu"}, 30)


def test_findings_are_one_document() -> None:
    found = [checks.Finding("a", "ok", "fine"), checks.Finding("b", "warning", "less so", "fix it", {"n": 1})]
    document = checks.document(found)
    assert document["ok"] == document["warning"] == 1
    assert msgspec.json.decode(msgspec.json.encode(document)) == document
