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

from stream_mmrnn.bus.socket_dir import private_folder
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
        (folder / ("s" * 19)).unlink(missing_ok=True)
        folder.rmdir()


def test_no_usable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    with pytest.raises(ProcessError, match=r"no folder for sockets can be made in .*nothing: set TMPDIR to one"):
        private_folder("a-", str(tmp_path / "nothing either"))


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
