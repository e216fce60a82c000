"""Open a recording in Rerun's viewer, if it is installed; Rerun reads our files directly.

Rerun sends usage statistics to its makers. Started from here it does not, because it runs with its own settings folder
in which they are switched off.
"""

from __future__ import annotations

import os
import shutil
import subprocess  # it starts the program that the user asked for
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from stream_mmrnn.core.errors import FileError, ProcessError, UsageError
from stream_mmrnn.core.settings import LOOPBACK

_TIMEOUT_S = 60


class Rerun(NamedTuple):
    """The program, and an environment in which its statistics are off."""

    program: str
    env: dict[str, str]


def find(folder: Path) -> Rerun:
    """Rerun, installed beside this Python or on the path, with its settings in `folder`, which is created if needed.

    Raises:
        UsageError: it is not installed.
        FileError: the folder cannot be created.
        ProcessError: it does not use the folder and would send statistics; the user's own settings are not changed.

    """
    env = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config"), "XDG_DATA_HOME": str(folder / "data")}
    env.pop("CI", None)  # with CI set, Rerun does not print the path of settings that do not exist yet
    try:
        for name in ("config", "data"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FileError(f"{folder} cannot be made: {e.strerror}; set XDG_STATE_HOME to a folder that can") from e
    beside = shutil.which("rerun", path=str(Path(sys.executable).parent))
    for program in filter(None, (beside, shutil.which("rerun"))):
        # another package installs a command of the same name
        if "rerun-cli" in _output([program, "--version"], env):
            break
    else:
        raise UsageError(
            "Rerun is not installed: pip install 'stream-mmrnn[rerun]'; or open the file in Foxglove, with the layout "
            "that stream-mmrnn view --layout FILE.json writes"
        )
    silence(program, env, folder)
    return Rerun(program, env)


def silence(program: str, env: dict[str, str], folder: Path) -> None:
    """Switch the statistics off in `folder`; raises ProcessError if they are on elsewhere."""
    settings = _settings(program, env)
    if settings.enabled and Path(settings.path).is_relative_to(folder):
        _output([program, "analytics", "disable"], env)
        settings = _settings(program, env)
    if settings.enabled:
        raise ProcessError("Rerun would send usage statistics; switch them off first: rerun analytics disable")


def _output(command: list[str], env: dict[str, str]) -> str:
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


class _Settings(msgspec.Struct, frozen=True):
    """The output of `rerun analytics config`."""

    enabled: bool = msgspec.field(default=True, name="analytics_enabled")
    path: str = msgspec.field(default="", name="config_file_path")


def _settings(program: str, env: dict[str, str]) -> _Settings:
    try:
        return msgspec.json.decode(_output([program, "analytics", "config"], env), type=_Settings)
    except msgspec.MsgspecError:
        return _Settings()


def show(path: Path, rerun: Rerun) -> int:
    """Open the viewer with a file and wait until it is closed; returns its exit code."""
    command = [rerun.program, str(path), "--hide-welcome-screen", "--bind", LOOPBACK]
    return subprocess.run(command, env=rerun.env).returncode  # noqa: S603


def convert(path: Path, out: Path, rerun: Rerun) -> None:
    """Write a recording as Rerun's own file.

    Raises:
        ProcessError: Rerun failed; the message has its reason.

    """
    command = [rerun.program, "mcap", "convert", str(path), "-o", str(out)]
    done = subprocess.run(command, env=rerun.env, capture_output=True, text=True)  # noqa: S603
    if done.returncode or not out.exists():
        why = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ProcessError(f"Rerun cannot convert {path}: {why}")
