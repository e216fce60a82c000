"""Folders for sockets: private, with a path short enough for sockets."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from stream_mmrnn.bus.socket_dir import private_folder, remove_folder
from stream_mmrnn.core.errors import ProcessError

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="paths of sockets are capped on POSIX"),
    pytest.mark.process,
]


@pytest.mark.parametrize("length", [20, 60, 70, 80, 90, 200])
def test_socket_paths_fit_with_any_temporary_folder(
    short_path: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = short_path / ("x" * (length - len(str(short_path)) - 1) or "x")
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = Path(private_folder("stream-mmrnn-"))
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(folder / ("s" * 19)))
        assert (folder.parent == deep) == (length <= 60)
        assert folder.parent == deep or list(deep.iterdir()) == [], "nothing is left of what did not do"
    finally:
        remove_folder(str(folder))
        assert not folder.exists()


def test_no_usable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    with pytest.raises(ProcessError, match=r"no folder for sockets can be made in .*nothing: set TMPDIR to one"):
        private_folder("a-", str(tmp_path / "nothing either"))


MAKES_ONE = """
import sys
from stream_mmrnn.bus.socket_dir import private_folder, remove_folder
print(private_folder(sys.argv[1]), flush=True)
sys.stdin.readline()
"""


def test_the_next_start_removes_what_killed_processes_left(short_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(short_path)}

    def start(prefix: str) -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", MAKES_ONE, prefix],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout
        return process, Path(process.stdout.readline().strip())

    running = [start(prefix) for prefix in ("stream-mmrnn-", "pymp-", "stream-mmrnn-", "pymp-")]
    try:
        for process, folder in running[:2]:
            (folder / "socket").touch()
            process.kill()
            process.wait()
        foreign = short_path / "pymp-of_another_program"
        foreign.mkdir()
        lives = {folder for _, folder in running[2:]}
        assert {folder for _, folder in running} | {foreign} == set(short_path.iterdir())
        running.append(start("stream-mmrnn-"))
        assert lives | {foreign, running[-1][1]} == set(short_path.iterdir())
    finally:
        for process, _ in running:
            process.kill()
            process.communicate()


def test_a_removed_folder_leaves_no_open_file(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    before = sorted(Path("/dev/fd").iterdir())
    for _ in range(3):
        remove_folder(private_folder("stream-mmrnn-"))
    assert sorted(Path("/dev/fd").iterdir()) == before
    assert list(short_path.iterdir()) == []


def test_a_session_runs_with_a_deep_temporary_folder(model: Path, short_path: Path) -> None:
    deep = short_path / ("y" * 120)
    deep.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "stream_mmrnn",
            "live",
            "--model",
            str(model),
            "--source",
            "synthetic",
            "--duration",
            "1",
        ],
        env={**os.environ, "TMPDIR": str(deep)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [
        p.name for p in deep.iterdir() if p.name.startswith(("pymp-", "stream-mmrnn-")) and "-run-" not in p.name
    ] == []
