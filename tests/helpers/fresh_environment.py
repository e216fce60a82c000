"""A wheel, and a fresh virtual environment that has it. Nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest


def build(project: Path, out: Path) -> Path:
    for needed in ("build", "hatchling"):
        pytest.importorskip(needed, reason=f"building the wheel needs {needed}: pip install '.[dev]'")
    # the build backend is installed already, so nothing is downloaded
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check"]
    command += ["--outdir", str(out), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("*.whl")
    return made


def install(wheel: Path, site: Path) -> None:
    """Install a wheel into a folder, without its dependencies."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    pip += ["--disable-pip-version-check", "--no-warn-script-location", "--target", str(site), str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def apart(folder: Path) -> dict[str, str]:
    """Variables for programs that see each other's sessions, registered in `folder`, and none else of this machine."""
    folder.chmod(0o700)
    return {"XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder)}


class Installed:
    """A virtual environment with the wheel; its dependencies come from the environment of the tests."""

    def __init__(self, folder: Path, wheel: Path, packages: Iterable[str] = ()) -> None:
        """`packages`: all that it has beside the wheel; without them all that the environment of the tests has."""
        self.folder = folder
        self.cwd = folder / "elsewhere"
        self.cwd.mkdir()
        place = folder / "venv"
        venv.create(place, with_pip=False, symlinks=True)
        self.bin = place / ("Scripts" if sys.platform == "win32" else "bin")
        (site,) = place.glob("**/site-packages")
        self.site = site
        self.install(wheel)
        for package in packages:
            self.link(package)
        if not packages:
            # a path in a .pth file comes after the environment's own packages, and .pth files in it are ignored, so an
            # editable install of the checkout has no effect
            (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self.env |= apart(folder)

    def install(self, wheel: Path) -> None:
        install(wheel, self.site)

    def link(self, package: str) -> None:
        """Add a package of the environment of the tests."""
        distribution = metadata.distribution(package)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (self.site / top).symlink_to(str(distribution.locate_file(top)))

    def python(self, code: str) -> str:
        done = subprocess.run(
            [self.bin / "python", "-c", code], cwd=self.cwd, env=self.env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def run(self, *args: str) -> tuple[int, dict[str, Any], str]:
        # the console script names the interpreter that ran pip, so run the module instead
        done = subprocess.run(
            [self.bin / "python", "-m", "stream_mmrnn", *args, "--json"],
            cwd=self.cwd,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        lines = done.stdout.splitlines()
        return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr
