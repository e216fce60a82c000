"""Packages of plug-ins as an installer would leave them in a folder, without running one."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

from places import ROOT

THERMOMETER = ROOT / "docs" / "examples" / "thermometer"


def describe(folder: Path, name: str, version: str, points: dict[str, dict[str, str]]) -> None:
    """The metadata of an installed package: `points` are its entry points by group."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in rows.items()) for group, rows in points.items()]
    (info / "entry_points.txt").write_text("\n".join(groups))


def install_thermometer(folder: Path) -> Path:
    """The package of docs/examples in a folder for `sys.path`."""
    project = tomllib.loads((THERMOMETER / "pyproject.toml").read_text())["project"]
    describe(folder, project["name"], project["version"], project["entry-points"])
    shutil.copy(THERMOMETER / "mmrnn_thermometer.py", folder)
    return folder


_LOUDNESS = '''
import numpy as np

from stream_mmrnn import Sample


class Loudness:
    """The loudness of each block, one block later."""

    origin = "loudness@1"

    def __init__(self, parent, stream):
        self.held = []

    def derive(self, sample):
        out, self.held = self.held, [self.of(sample)]
        return out

    def of(self, sample):
        rms = np.sqrt(np.mean(np.square(sample.data.astype(float))))
        return Sample(sample.event_ns, sample.capture_ns, np.array([rms], np.float32))

    def finish(self):
        out, self.held = self.held, []
        return out

    def reset(self):
        self.held = []
'''


def install_loudness(folder: Path) -> Path:
    """A package with a derivation: sound -> a signal of one number, which is held back for a block."""
    describe(folder, "mmrnn-loudness", "1.0", {"stream_mmrnn.sources": {"loudness": "mmrnn_loudness:Loudness"}})
    (folder / "mmrnn_loudness.py").write_text(_LOUDNESS)
    return folder
