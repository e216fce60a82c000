"""Rerun's viewer for a recording, where it is installed: it reads our files as they are.

Rerun counts how it is used and sends that to its makers. Started from here it does not: its settings are a folder of
our own, in which that is switched off. Knows nothing about what is in a recording.
"""

from __future__ import annotations

import os
import shutil
import subprocess  # a program that the user asked for
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from stream_mmrnn.core.config import LOOPBACK
from stream_mmrnn.core.errors import FileError, ProcessError, UsageError

_ANSWER_S = 60


class Rerun(NamedTuple):
    """The program, and the environment in which it sends nothing."""

    program: str
    env: dict[str, str]


def find(folder: Path) -> Rerun:
    """Rerun, beside our own Python or on the path, with its settings in `folder`, which is made where it is not there.

    Raises:
        UsageError: it is not installed.
        FileError: the folder cannot be made.
        ProcessError: it does not keep to the folder, and would send something: what a person has set stays so.

    """
    env = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config"), "XDG_DATA_HOME": str(folder / "data")}
    env.pop("CI", None)  # where it is set, Rerun does not say where its settings are before there are any
    try:
        for name in ("config", "data"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FileError(f"{folder} cannot be made: {e.strerror}; set XDG_STATE_HOME to a folder that can") from e
    beside = shutil.which("rerun", path=str(Path(sys.executable).parent))
    for program in filter(None, (beside, shutil.which("rerun"))):
        # another package has a command of that name, which runs commands again
        if "rerun-cli" in _said([program, "--version"], env):
            break
    else:
        raise UsageError(
            "Rerun is not installed: pip install 'stream-mmrnn[rerun]'; or open the file in Foxglove, with the layout "
            "that stream-mmrnn view --layout FILE.json writes"
        )
    silence(program, env, folder)
    return Rerun(program, env)


def silence(program: str, env: dict[str, str], folder: Path) -> None:
    """Switch the statistics off in `folder`; raises ProcessError where they are on elsewhere."""
    settings = _settings(program, env)
    if settings.enabled and Path(settings.path).is_relative_to(folder):
        _said([program, "analytics", "disable"], env)
        settings = _settings(program, env)
    if settings.enabled:
        raise ProcessError("Rerun would send usage statistics; switch that off first: rerun analytics disable")


def _said(command: list[str], env: dict[str, str]) -> str:
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_ANSWER_S)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


class _Settings(msgspec.Struct, frozen=True):
    """What `rerun analytics config` says."""

    enabled: bool = msgspec.field(default=True, name="analytics_enabled")
    path: str = msgspec.field(default="", name="config_file_path")


def _settings(program: str, env: dict[str, str]) -> _Settings:
    try:
        return msgspec.json.decode(_said([program, "analytics", "config"], env), type=_Settings)
    except msgspec.MsgspecError:
        return _Settings()


def show(path: Path, rerun: Rerun) -> int:
    """Open the viewer on a file, and wait until it is closed; its exit code."""
    command = [rerun.program, str(path), "--hide-welcome-screen", "--bind", LOOPBACK]
    return subprocess.run(command, env=rerun.env).returncode  # noqa: S603


def convert(path: Path, out: Path, rerun: Rerun) -> None:
    """Write a recording as Rerun's own file.

    Raises:
        ProcessError: Rerun cannot; it says why.

    """
    command = [rerun.program, "mcap", "convert", str(path), "-o", str(out)]
    done = subprocess.run(command, env=rerun.env, capture_output=True, text=True)  # noqa: S603
    if done.returncode or not out.exists():
        why = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ProcessError(f"Rerun cannot convert {path}: {why}")
