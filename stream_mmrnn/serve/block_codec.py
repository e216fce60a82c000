"""Blocks as messages: `steps` to columns and back, and the columns of `preds`. Every length is checked.

Numbers are little-endian; reading copies nothing. Knows nothing about groups, sessions or sockets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.block import Block, Features, Integers
from stream_mmrnn.core.errors import BadTick, WireError
from stream_mmrnn.serve import protocol

_U4, _I8, _F4, _F2 = np.dtype("<u4"), np.dtype("<i8"), np.dtype("<f4"), np.dtype("<f2")


def row_bytes(rows: Integers) -> bytes:
    """Rows of a group as a column."""
    return rows.astype(_U4).tobytes()


def rows_of(column: bytes) -> Integers:
    """Rows of a group from a column. Raises WireError."""
    if len(column) % 4:
        raise WireError(f"expected rows as uint32, got {len(column)} bytes")
    return np.frombuffer(column, _U4).astype(np.int64)


def integers(column: bytes, count: int, what: str) -> Integers:
    """`count` int64 of a column. Raises WireError."""
    if len(column) != 8 * count:
        raise WireError(f"expected {count} int64 ({8 * count} bytes) as {what}, got {len(column)} bytes")
    return np.frombuffer(column, _I8)


class StepsReader:
    """Reads the blocks of a model whose modalities have these names and sizes."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        self._names, self._sizes = tuple(names), tuple(sizes)
        self._nothing = [np.zeros((0, size), np.float32) for size in sizes]

    def read(self, request: protocol.Steps, most: int) -> Block:
        """The block, whose handles are rows below `most`. Raises BadTick where its columns do not fit.

        A row that occurs twice, and numbers that are not finite, are for the caller to check.
        """
        try:
            return self._read(request, most)
        except WireError as e:
            raise BadTick(f"block {request.block} of group {request.group}: {e}") from e

    def _read(self, request: protocol.Steps, most: int) -> Block:
        width = len(self._sizes)
        rows = rows_of(request.rows) if request.rows else np.arange(most)
        count = len(rows)
        if not count or int(rows.max()) >= most:
            raise WireError(f"expected at least one row and all below {most}, the sessions of the group")
        indices = integers(request.ticks, count, "ticks")
        event_ns = integers(request.event_ns, count, "event_ns") if request.event_ns else np.zeros(count, np.int64)
        if len(request.features) != width or len(request.present) not in (0, width):
            raise WireError(
                f"expected the vectors of {width} modalities and as many `present` or none, got "
                f"{len(request.features)} and {len(request.present)}"
            )
        present = np.zeros((count, width), np.bool_)
        features: list[Features] = []
        kind = _F2 if request.half else _F4
        for i, (name, size) in enumerate(zip(self._names, self._sizes, strict=True)):
            content = request.features[i]
            mask = request.present[i] if request.present else None
            if mask is None:
                if content is None:
                    features.append(self._nothing[i])
                    continue
                present[:, i] = True
                here = count
            else:
                if len(mask) != count:
                    raise WireError(f"expected {count} bytes as `present` of {name}, got {len(mask)}")
                present[:, i] = np.frombuffer(mask, np.uint8) != 0
                here = int(np.count_nonzero(present[:, i]))
            content = content or b""
            if len(content) != here * size * kind.itemsize:
                raise WireError(
                    f"expected {here} vectors of {size} {'float16' if request.half else 'float32'} "
                    f"({here * size * kind.itemsize} bytes) as {name}, got {len(content)} bytes"
                )
            features.append(np.frombuffer(content, kind).reshape(here, size))
        if request.age_ns:
            age_ns = integers(request.age_ns, count * width, "age_ns").reshape(count, width)
        else:
            age_ns = present.astype(np.int64) - 1
        return Block(rows, indices, event_ns, present, age_ns, tuple(features))


def to_steps(group: int, number: int, block: Block, whole: bool = False) -> protocol.Steps:
    """A block as a message; its handles are rows of the group. `whole`: they are all rows in order."""
    count = len(block)
    here = [len(vectors) for vectors in block.features]
    half = all(vectors.dtype == np.float16 for vectors in block.features if vectors.size)
    kind = _F2 if half and any(vectors.size for vectors in block.features) else _F4
    plain_ages = np.array_equal(block.age_ns, block.present.astype(np.int64) - 1)
    return protocol.Steps(
        group=group,
        block=number,
        rows=b"" if whole else row_bytes(block.handles),
        ticks=column(block.indices),
        event_ns=column(block.event_ns) if block.event_ns.any() else b"",
        features=tuple(v.astype(kind, copy=False).tobytes() if len(v) else None for v in block.features),
        present=()
        if all(some in (0, count) for some in here)
        else tuple(
            None if some in (0, count) else mask.astype(np.uint8).tobytes()
            for some, mask in zip(here, block.present.T, strict=True)
        ),
        age_ns=b"" if plain_ages else column(block.age_ns),
        half=kind is _F2,
    )


def column(values: npt.NDArray[np.int64] | Sequence[int]) -> bytes:
    return np.asarray(values, _I8).tobytes()


def read_heads(content: Sequence[bytes], sizes: Sequence[int], count: int) -> list[npt.NDArray[np.float32]]:
    """The heads of `count` rows, each [count, size]. Raises WireError."""
    if len(content) != len(sizes) or any(len(raw) != 4 * n * count for raw, n in zip(content, sizes, strict=True)):
        raise WireError(f"expected {len(sizes)} heads of {count} rows, got {[len(raw) for raw in content]} bytes")
    return [np.frombuffer(raw, _F4).reshape(count, n) for raw, n in zip(content, sizes, strict=True)]


def joined(blocks: Sequence[Block]) -> Block:
    """The ticks of several blocks as one, in order."""
    if len(blocks) == 1:
        return blocks[0]
    return Block(
        np.concatenate([b.handles for b in blocks]),
        np.concatenate([b.indices for b in blocks]),
        np.concatenate([b.event_ns for b in blocks]),
        np.concatenate([b.present for b in blocks]),
        np.concatenate([b.age_ns for b in blocks]),
        tuple(np.concatenate(vectors) for vectors in zip(*(b.features for b in blocks), strict=True)),
    )


def with_handles(block: Block, handles: Integers) -> Block:
    """The same ticks under other numbers."""
    return Block(handles, block.indices, block.event_ns, block.present, block.age_ns, block.features)
