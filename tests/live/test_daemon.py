"""The service and the container: what they name exists, what they run runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from harness import COMMAND
from places import ROOT

from stream_mmrnn.cli.config_effective import faults

pytestmark = pytest.mark.process

PACKAGING = ROOT / "packaging"
UNIT = (PACKAGING / "stream-mmrnn.service").read_text()
SETTINGS = "/etc/stream-mmrnn/settings.toml"

Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    text = re.sub(r"\\\n\s*", "", (PACKAGING / "Containerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found = [line.partition(" ") for line in lines]
    return [(name, rest.strip()) for name, _, rest in found]


def only(name: str) -> str:
    (rest,) = [rest for n, rest in instructions() if n == name]
    return rest


def copied() -> dict[str, str]:
    """By name in the checkout, where it is in the image."""
    found = {}
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            found |= {source: target + source if target.endswith("/") else target for source in sources}
    return found


def test_the_settings_are_sound() -> None:
    assert faults(PACKAGING / "settings.toml") == []


def test_what_is_copied_is_there_and_is_all_that_a_wheel_is_made_of() -> None:
    where = copied()
    assert all((ROOT / source).exists() for source in where)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {*wheel["packages"], *wheel["force-include"]}
    assert needed <= set(where)
    assert {source: where[source] for source in needed} == {source: f"/src/{source}" for source in needed}
    assert where["packaging/settings.toml"] == SETTINGS


def test_the_image_has_a_python_that_we_work_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.fullmatch(r"python:(3\.\d+)-slim", only("FROM"))
    assert found is not None
    assert f"Programming Language :: Python :: {found.group(1)}" in project["classifiers"]


def test_what_the_image_runs_is_shell() -> None:
    shell = shutil.which("sh")
    if shell is None:
        pytest.skip("this machine has no sh")
    for name, rest in instructions():
        if name == "RUN":
            assert subprocess.run([shell, "-nc", rest], capture_output=True, timeout=10).returncode == 0, rest
    order = [name for name, _ in instructions()]
    assert order.index("USER") > max(
        i for i, name in enumerate(order) if name == "RUN"
    )  # no step runs as root after it


def test_service_and_container_run_the_same(tmp_path: Path) -> None:
    """And it runs: with a source that needs no hardware, until the container's own check says that it is ready."""
    program, *arguments = shlex.split(re.findall(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)[0])
    assert Path(program).name == json.loads(only("ENTRYPOINT"))[0] == "stream-mmrnn"
    assert arguments == json.loads(only("CMD"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mine = [str(PACKAGING / "settings.toml") if a == SETTINGS else a for a in arguments]
    _, python, flag, check = json.loads('["CMD", ' + only("HEALTHCHECK").partition("CMD [")[2])
    assert (python, flag) == ("python", "-c")
    assert "8787" in check
    assert tomllib.loads((PACKAGING / "settings.toml").read_text())["dashboard"]["port"] == 8787
    check = check.replace("8787", str(port))
    daemon = subprocess.Popen(
        [*COMMAND, *mine, "--source", "synthetic", "--port", str(port)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while subprocess.run([sys.executable, "-c", check], capture_output=True, timeout=30).returncode:
            assert daemon.poll() is None
            assert time.monotonic() < end
            time.sleep(0.3)
    finally:
        daemon.send_signal(signal.SIGTERM)
        out, err = daemon.communicate(timeout=60)
    assert daemon.returncode == 0, err
    assert out == ""
    said = [json.loads(line) for line in err.splitlines()]
    assert said[-1]["event"] == "summary"
    assert said[-1]["fields"]["balanced"]


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("this machine has no systemd-analyze")
    # it looks whether the program is there; here it is another one
    unit = tmp_path / "stream-mmrnn.service"
    unit.write_text(UNIT.replace("/usr/bin/stream-mmrnn", sys.executable))
    done = subprocess.run([program, "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    secure = [program, "security", "--offline=true", "--threshold=25", "--no-pager", str(unit)]
    done = subprocess.run(secure, capture_output=True, text=True, timeout=60)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd judges no files (before 250)")
    assert done.returncode == 0, done.stdout.splitlines()[-1]
