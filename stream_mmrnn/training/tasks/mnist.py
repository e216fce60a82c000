"""MNIST as a sequence: one row per tick, 28 ticks of 28 numbers. The digit is scored at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.strict_toml import convert
from stream_mmrnn.core.types import FloatArray
from stream_mmrnn.training.data import Task, Ticks
from stream_mmrnn.training.datasets import mnist
from stream_mmrnn.training.datasets.mnist import ByteArray
from stream_mmrnn.training.recipe import Recipe
from stream_mmrnn.training.tasks.common import find, require

_CHUNK = 1000
_ROWS, _COLUMNS = 28, 28

_Count = Annotated[int, msgspec.Meta(ge=0)]


class MnistOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`data.options`."""

    sequences: _Count = 0
    """Images per training epoch, drawn again for each epoch; 0 means all."""
    validation: Annotated[int, msgspec.Meta(ge=1)] = 5000
    """Number of images for validation: the last ones of the training set."""
    test: _Count = 0
    """Number of test images, the first ones; 0 means all."""
    shift: Annotated[int, msgspec.Meta(ge=0, le=6)] = 0
    """Augmentation: maximum shift in pixels, new in every epoch."""
    turn: Annotated[float, msgspec.Meta(ge=0, le=45)] = 0.0
    """Augmentation: maximum rotation in degrees."""
    stretch: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.0
    """Augmentation: maximum relative change of height, width and shear, each independent."""


def shifted(images: ByteArray, by: int, rng: np.random.Generator) -> ByteArray:
    """Images [N, 28, 28], each shifted by up to `by` pixels in both directions, padded with zeros."""
    count, height, width = images.shape
    padded = np.pad(images, ((0, 0), (by, by), (by, by)))
    y, x = rng.integers(0, 2 * by + 1, (2, count, 1))
    rows, columns = y + np.arange(height), x + np.arange(width)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def warped(images: ByteArray, turn: float, stretch: float, rng: np.random.Generator) -> ByteArray:
    """Images [N, H, W], each rotated by up to `turn` degrees, scaled and sheared by up to `stretch`; bilinear."""
    count, height, width = images.shape
    angle = np.radians(rng.uniform(-turn, turn, count))
    tall, wide, slant = rng.uniform(-stretch, stretch, (3, count))
    # source position of each pixel: rotation after scaling with shear, about the centre
    sin, cos = np.sin(angle), np.cos(angle)
    stretching = np.stack([1 + tall, np.zeros(count), slant, 1 + wide], -1).reshape(count, 2, 2)
    turning = np.stack([cos, -sin, sin, cos], -1).reshape(count, 2, 2)
    middle = np.array([[(height - 1) / 2], [(width - 1) / 2]])
    grid = np.indices((height, width)).reshape(2, -1) - middle
    place = (turning @ stretching @ grid + middle).astype(np.float32) + 1  # a border of zeros is added below
    place = place.clip(0, np.array([[height], [width]], np.float32) + 0.999)
    corner = place.astype(np.int32)
    down, right = np.moveaxis(place - corner, 1, 0)
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2))).reshape(count, -1)
    at = corner[:, 0] * (width + 3) + corner[:, 1]

    def pixels(offset: int) -> FloatArray:
        return np.take_along_axis(padded, at + offset, 1).astype(np.float32)

    above = pixels(0) * (1 - right) + pixels(1) * right
    below = pixels(width + 3) * (1 - right) + pixels(width + 4) * right
    out = (above * (1 - down) + below * down).round().astype(np.uint8)
    return out.reshape(images.shape)


def make(recipe: Recipe, places: list[Path]) -> Task:
    """Official split; the last images of the training set are used for validation."""
    options = convert(recipe.data.options, MnistOptions)
    require(recipe, {"vision": _COLUMNS}, {"digit": mnist.CLASSES})
    place = find(places, "mnist")
    images, labels = mnist.load(place, "train")
    if options.validation >= len(images):
        raise FileError(f"{place} has {len(images)} training images, {options.validation} are held out; give all of it")
    # the same for all images, so they share one copy
    present, age_s = np.ones((_ROWS, 1), np.float32), np.zeros((_ROWS, 1), np.float32)
    last = np.zeros(_ROWS, np.float32)
    last[-1] = 1

    def sequences(pictures: ByteArray, digits: ByteArray, name: str) -> Iterator[Ticks]:
        vectors: FloatArray = (pictures.reshape(-1, _ROWS, _COLUMNS) / np.float32(255)).astype(np.float32)
        targets = np.repeat(digits.astype(np.int64)[:, None], _ROWS, 1)
        for i, (x, y) in enumerate(zip(vectors, targets, strict=True)):
            yield Ticks({"vision": x}, present, age_s, {"digit": y}, {"digit": last}, f"{name} {i}")

    train, held = len(images) - options.validation, slice(len(images) - options.validation, None)

    def epoch(rng: np.random.Generator) -> Iterator[Ticks]:
        order = rng.permutation(train)[: options.sequences or None]
        for begin in range(0, len(order), _CHUNK):
            chosen = order[begin : begin + _CHUNK]
            pictures = images[chosen]
            if options.turn or options.stretch:
                pictures = warped(pictures, options.turn, options.stretch, rng)
            if options.shift:
                pictures = shifted(pictures, options.shift, rng)
            yield from sequences(pictures, labels[chosen], "train")

    test_images, test_labels = (x[: options.test or None] for x in mnist.load(place, "test"))
    changes = [f"turned by up to {options.turn:g} degrees"] * (options.turn > 0)
    changes += [f"stretched and slanted by up to {options.stretch:.0%}"] * (options.stretch > 0)
    changes += [f"moved by up to {options.shift} pixels"] * (options.shift > 0)
    return Task(
        epoch,
        list(sequences(images[held], labels[held], "validation")),
        list(sequences(test_images, test_labels, "test")),
        about=f"MNIST (LeCun, Bottou, Bengio and Haffner 1998; CC BY-SA 3.0), a row a tick in reading "
        f"order, pixels in [0, 1], scored at the last tick alone. Official split: {len(test_images)} test images; of "
        f"the training images {train} are trained on and the last {options.validation} are the validation"
        + (f"; training images are {' and '.join(changes)}, anew in every epoch." if changes else "."),
        epoch_ticks=(min(options.sequences, train) or train) * _ROWS,
    )
