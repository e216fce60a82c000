"""Checkpoints: a network with its recipe, and optionally the state of its training, as one safetensors file.

A file is written to a temporary name and renamed, so a crash never destroys the last good one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file, save_file
from torch import Tensor

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.training.predictor import PredictorNetwork
from stream_mmrnn.training.recipe import Recipe
from stream_mmrnn.training.recipe import parse as parse_recipe


def save(predictor: PredictorNetwork, path: Path, origins: dict[str, str]) -> None:
    """Write the network and its recipe."""
    write({f"model.{k}": v for k, v in predictor.state_dict().items()}, path, predictor.recipe, origins, {})


def load(path: Path) -> tuple[PredictorNetwork, dict[str, str]]:
    """The network of a checkpoint, on the CPU, and the encoders it was trained with.

    Raises:
        FileError: the file is missing, damaged or not a checkpoint.

    """
    tensors, about = read(path)
    recipe = parse_recipe(about["recipe"])
    state = part(tensors, "model.")
    reduced = {k.removeprefix("tokens.basis_"): v.shape[1] for k, v in state.items() if k.startswith("tokens.basis_")}
    predictor = PredictorNetwork(recipe, reduced)
    try:
        predictor.load_state_dict(state)
    except RuntimeError as e:
        raise FileError(f"{path} does not contain the network that its recipe describes; was it changed?") from e
    return predictor.eval(), about["origins"]


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names have this prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def write(
    tensors: dict[str, Tensor], path: Path, recipe: Recipe, origins: dict[str, str], facts: dict[str, Any]
) -> None:
    """Write a checkpoint; `facts` is what a resumed training needs beside tensors."""
    about = json.dumps({"recipe": json.loads(msgspec.json.encode(recipe)), "origins": origins, "facts": facts})
    beside = path.with_suffix(".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, beside, {"stream_mmrnn": about})
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint, and its `recipe`, `origins` and `facts`; raises FileError."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileError(f"there is no checkpoint {path}; train first, or give another path")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["stream_mmrnn"])
        return load_file(path), about
    except (SafetensorError, KeyError, ValueError, OSError) as e:
        raise FileError(f"{path} is not a checkpoint of this program, or is damaged ({type(e).__name__})") from e
