"""MNIST: handwritten digits in the four idx files, plain or gzipped, in a folder or inside an archive.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998; CC BY-SA 3.0.
An idx file: 0, 0, a byte for the type (8 is uint8), a byte for the number of axes, each axis as a big-endian
uint32, then the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.training.datasets.files import choose, files, reason

ByteArray = npt.NDArray[np.uint8]

COUNTS = {"train": 60_000, "test": 10_000}
"""As published."""
CLASSES = tuple("0123456789")

_STEMS = {"train": "train", "test": "t10k"}


def load(path: Path, split: str) -> tuple[ByteArray, ByteArray]:
    """Images uint8 [N, 28, 28] and labels uint8 [N] of `train` or `test`, from a folder, a tar or a zip.

    Raises:
        FileError: a file is missing or truncated, or its content does not fit its name.

    """
    choose("the MNIST split", split, _STEMS)
    names = {f"{_STEMS[split]}-images-idx3-ubyte": 3, f"{_STEMS[split]}-labels-idx1-ubyte": 1}
    found: dict[int, tuple[str, ByteArray]] = {}
    for name, raw in files(path, lambda name: _plain(name) in names):
        axes = names[_plain(name)]
        if axes not in found:  # the same file often exists twice, plain and gzipped
            found[axes] = name, _idx(f"{path}/{name}", raw, axes)
        if len(found) == 2:
            break
    for name, axes in names.items():
        if axes not in found:
            raise FileError(f"{path} holds no {name} (nor {name}.gz); give the place with the four MNIST files")
    (images_name, images), (labels_name, labels) = found[3], found[1]
    if images.shape[1:] != (28, 28):
        raise FileError(
            f"the file {path}/{images_name} has images of {images.shape[1:]}, expected 28 x 28; fetch it again"
        )
    if len(labels) != len(images):
        raise FileError(
            f"the file {path}/{labels_name} has {len(labels)} labels for {len(images)} images; fetch both again"
        )
    if len(labels) and labels.max() > 9:
        raise FileError(f"the file {path}/{labels_name} has the label {labels.max()}, expected 0 to 9; fetch it again")
    return images, labels


def _plain(name: str) -> str:
    """The published name; some copies are called train-images.idx3-ubyte."""
    return name.rpartition("/")[2].removesuffix(".gz").replace(".idx", "-idx")


def _idx(where: str, raw: bytes, axes: int) -> ByteArray:
    if raw.startswith(b"\x1f\x8b"):
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as e:
            raise FileError(f"the file {where} is damaged gzip ({reason(e)}); fetch it again") from e
    magic = bytes((0, 0, 8, axes))
    start = 4 + 4 * axes
    if raw[:4] != magic or len(raw) < start:
        raise FileError(f"the file {where} begins with `{raw[:4].hex()}`, expected idx {magic.hex()}; fetch it again")
    shape = struct.unpack_from(f">{axes}I", raw, 4)
    if len(raw) - start != math.prod(shape):
        raise FileError(
            f"the file {where} holds {len(raw) - start} values where its header says {math.prod(shape)}; fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()  # torch needs writable arrays
