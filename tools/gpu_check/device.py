"""The GPU machine: finding CUDA's libraries, and what a reader must know of GPU, driver and versions.

Knows nothing about models or what is measured.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort

from stream_mmrnn.bench.machine import machine


def load_libraries() -> None:
    """Have CUDA's libraries in the process, wherever they were installed, before a session asks for them.

    onnxruntime looks beside itself and in the system; unpacked in a folder of its own it would miss those that came
    as packages, with torch or alone. A library that is loaded is found by its name, so loading it first is enough.
    """
    if importlib.util.find_spec("torch") is not None:
        with contextlib.suppress(Exception):  # a broken torch is no reason not to try what follows
            import torch  # noqa: F401
    for folder in library_folders():
        ort.preload_dlls(directory=str(folder))


def library_folders() -> list[Path]:
    """Where packages have put the libraries of onnxruntime's CUDA."""
    major = str(getattr(ort, "cuda_version", "")).split(".")[0]
    folders = (Path(entry or ".").resolve() / "nvidia" / f"cu{major}" / "lib" for entry in sys.path)
    return [folder for folder in folders if major and folder.is_dir()]


def gpu() -> dict[str, str]:
    """Name, driver and memory of the first GPU, as nvidia-smi says them; empty where it is not there."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    asked = ("name", "driver_version", "memory.total")
    ran = subprocess.run(
        [program, f"--query-gpu={','.join(asked)}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = ran.stdout.splitlines()
    if ran.returncode != 0 or not lines:
        return {}
    return dict(zip(("gpu", "driver", "gpu_memory"), (part.strip() for part in lines[0].split(",")), strict=False))


def facts() -> dict[str, Any]:
    """For the head of the report: the machine, the GPU, the versions."""
    said = {**gpu(), **machine(), "onnxruntime_cuda": str(getattr(ort, "cuda_version", "") or "none")}
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        said |= {"torch": torch.__version__, "torch_cuda": str(torch.version.cuda or "none")}
    return said
