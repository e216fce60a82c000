"""Runs every command and snippet of docs/use.md unchanged, while a session runs as the page says."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import COMMAND
from places import ROOT

pytestmark = pytest.mark.process

TEXT = (ROOT / "docs" / "use.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


LIVE, *COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of the page: it has a trained model, and later the recording."""
    folder = tmp_path_factory.mktemp("use")
    mine = folder / "trained" / "mine"
    mine.mkdir(parents=True)
    zoo = ROOT / "models" / "turn_taking" / "step.onnx"
    (mine / "step.onnx").write_bytes(zoo.read_bytes())
    (folder / "run").mkdir(mode=0o700)
    return folder


def env(place: Path) -> dict[str, str]:
    root = str(ROOT)
    # sessions of others on this machine are registered in other folders
    return {**os.environ, "XDG_RUNTIME_DIR": str(place / "run"), "TMPDIR": str(place), "PYTHONPATH": root}


def words(line: str) -> list[str]:
    first, *rest = line.split()
    assert first == "stream-mmrnn"
    return [*COMMAND, *rest]


@pytest.fixture(scope="module")
def session(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The session that runs during the page's commands; a label is typed into it for `diff --labels`."""
    pipe = place / "words"
    os.mkfifo(pipe)
    extra = ["--port", "8765", "--text", f"pipe:{pipe}"]
    process = subprocess.Popen([*words(LIVE), *extra], cwd=place, env=env(place), stdout=subprocess.DEVNULL)
    writer = pipe.open("w")
    end = time.monotonic() + 60
    while subprocess.run([*COMMAND, "top", "--once"], env=env(place), capture_output=True, check=False).returncode:
        assert time.monotonic() < end
        assert process.poll() is None
    writer.write("/label turn_over\n")
    writer.flush()
    yield process
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    writer.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a named pipe and signals")
def test_the_commands_of_the_page_run(place: Path, session: subprocess.Popen[bytes]) -> None:
    watching = [c for c in COMMANDS if " diff " not in c]
    started = {}
    # what is pushed needs a session with such a stream: tests/live/test_derived_and_pushed.py
    for snippet in (of for of in blocks("python") if "push(" not in of):
        started[snippet] = subprocess.Popen([sys.executable, "-W", "error", "-u", "-c", snippet], **pipes(place))
    for line in watching:
        started[line] = subprocess.Popen(words(line), **pipes(place))
    node = shutil.which("node")
    for snippet in blocks("js") if node and has_websocket(node) else []:
        started[snippet] = subprocess.Popen([node, "--experimental-websocket", "-e", snippet], **pipes(place))  # type: ignore[list-item]
    for what, process in started.items():
        assert process.stdout is not None
        assert process.stdout.readline(), f"no output: {what}"
    session.send_signal(signal.SIGINT)
    for what, process in started.items():
        out, err = process.communicate(timeout=60)
        warned = "ExperimentalWarning" in err and "WebSocket" in what
        assert process.returncode == 0, f"{what}\n{err}"
        assert warned or not err or "not printed" in err, f"{what}\n{out}\n{err}"
    assert session.wait(60) == 0
    diffs = [c for c in COMMANDS if " diff " in c]
    assert len(diffs) == 5
    for line in diffs:
        done = subprocess.run(words(line), cwd=place, env=env(place), capture_output=True, text=True, check=False)
        # the `trained` model is a copy of turn_taking: nothing differs
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (place / "diff.png").stat().st_size > 10_000


def pipes(place: Path) -> dict[str, object]:
    return {"cwd": place, "env": env(place), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def has_websocket(node: str) -> bool:
    code = "process.exit(typeof WebSocket == 'function' ? 0 : 3)"
    return not subprocess.run(
        [node, "--experimental-websocket", "-e", code], capture_output=True, check=False
    ).returncode
