"""What is used up is one sentence, whichever verb runs out of it, and leaves nothing."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from stream_mmrnn.core.resources import explain_os_error

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX"),
]
COMMAND = shlex.join([sys.executable, "-m", "stream_mmrnn"])
SESSION = "--source synthetic --duration 1"


def shell(command: str, folder: Path, *wrapped: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder), "TMPDIR": str(folder)}
    return subprocess.run(
        [*wrapped, "sh", "-c", command], env=env, cwd=folder, capture_output=True, text=True, timeout=120
    )


def left(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(("pymp-", "stream-mmrnn-")) and "-run-" not in p.name]


@pytest.mark.parametrize("files", [32, 40])
@pytest.mark.parametrize("verb", [f"live {SESSION} --no-dashboard", f"record a.mcap {SESSION}", "serve --port 0"])
def test_too_few_open_files_is_one_sentence(short_path: Path, files: int, verb: str) -> None:
    done = shell(f"ulimit -n {files}; exec {COMMAND} {verb}", short_path)
    assert done.returncode == 2, done.stderr
    assert f"error: this process may open {files} files, and" in done.stderr
    assert "(ulimit -n)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert left(short_path) == []


@pytest.mark.skipif(
    sys.platform != "linux" or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="another /dev/shm needs a mount name space",
)
@pytest.mark.parametrize("size", ["16k", "64k; head -c 1M /dev/zero > /dev/shm/fill 2> /dev/null"])
@pytest.mark.parametrize(
    ("verb", "code", "sentence"),
    [
        (f"live {SESSION} --no-dashboard", 2, "no space is left on the disk, or in /dev/shm; free some"),
        ("serve --port 0 --config two.toml", 1, "MB of shared memory for an engine of several processes cannot be"),
    ],
)
def test_a_full_or_small_dev_shm_is_one_sentence(
    short_path: Path, size: str, verb: str, code: int, sentence: str
) -> None:
    (short_path / "two.toml").write_text("[engine]\nprocesses = 2\n")
    mount = f"mount -t tmpfs tmpfs /dev/shm -o size={size}"
    done = shell(f"{mount}; exec {COMMAND} {verb}", short_path, "unshare", "-m")
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert left(short_path) == []


FREES = """
import os
import numpy as np
from pathlib import Path
from stream_mmrnn.core.resources import return_free_memory

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

before = resident_mb()
blocks = [np.ones(400) for _ in range(30_000)]
kept = blocks[::200]
del blocks
freed = resident_mb()
return_free_memory()
print(round(freed - before), round(resident_mb() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", FREES], capture_output=True, text=True, check=True, cwd=ROOT)
    held_mb, left_mb = map(int, done.stdout.split())
    assert held_mb > 60, "freed blocks between blocks in use: this C library keeps them, and the test means something"
    assert left_mb < 20


def test_only_what_a_user_can_mend_is_a_sentence() -> None:
    assert explain_os_error(OSError(errno.ENOENT, "x")) == ""
    assert explain_os_error(OSError(errno.ENOSPC, "x", "/a/file")).startswith("/a/file: no space is left")
    assert explain_os_error(PermissionError(errno.EACCES, "x", "/a")).startswith("/a: you may not use it")


def test_a_name_that_is_too_long_is_a_sentence() -> None:
    for args in (["info", "x" * 300], ["live", "--model", "x" * 300], ["predict", "a.wav", "--out", "x" * 300]):
        done = subprocess.run([*shlex.split(COMMAND), *args], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "name" in done.stderr
