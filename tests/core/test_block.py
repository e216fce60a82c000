"""The columns' own checks against plain Python, row by row."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stream_mmrnn.core.block import Block, BlockPredictions, StateBlock
from stream_mmrnn.core.types import FEATURE_BOUND

SIZES = (3, 1, 2)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    count = draw(st.integers(0, 6))
    present = draw(hnp.arrays(np.bool_, (count, len(SIZES))))
    features = []
    for i, size in enumerate(SIZES):
        kind, width = draw(st.sampled_from(((np.float32, 32), (np.float16, 16))))
        features.append(draw(hnp.arrays(kind, (int(present[:, i].sum()), size), elements=st.floats(width=width))))
    numbers = hnp.arrays(np.int64, count, elements=st.integers(-3, 2**62))
    handles = draw(hnp.arrays(np.int64, count, elements=st.integers(0, 4)))
    ages = draw(hnp.arrays(np.int64, (count, len(SIZES))))
    return Block(handles, draw(numbers), draw(numbers), present, ages, tuple(features))


def rows(block: Block) -> list[tuple[object, ...]]:
    """Each tick by itself: all its numbers, its vectors as bytes, None where absent."""
    at = [0] * len(SIZES)
    out = []
    for n in range(len(block)):
        vectors = []
        for i, here in enumerate(block.present[n]):
            vectors.append(block.features[i][at[i]].tobytes() if here else None)
            at[i] += bool(here)
        out.append((block.handles[n], block.indices[n], block.event_ns[n], block.age_ns[n].tobytes(), *vectors))
    return out


@given(blocks(), st.data())
def test_some_ticks_of_a_block_are_a_block(block: Block, data: st.DataObject) -> None:
    chosen = data.draw(hnp.arrays(np.bool_, len(block)))
    part = block.take(chosen)
    assert part.fits(SIZES) == ""
    assert rows(part) == [row for row, taken in zip(rows(block), chosen, strict=True) if taken]


@given(blocks())
def test_finite_and_first_are_what_a_loop_would_find(block: Block) -> None:
    at = [0] * len(SIZES)
    seen: set[int] = set()
    for n in range(len(block)):
        good = True
        for i, here in enumerate(block.present[n]):
            if here:
                numbers = block.features[i][at[i]].tolist()
                good &= all(math.isfinite(x) and abs(x) < FEATURE_BOUND for x in numbers)
                at[i] += 1
        assert block.finite()[n] == good
        assert block.first_of_each()[n] == (block.handles[n] not in seen)
        seen.add(int(block.handles[n]))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_every_number_that_is_none_is_found(kind: type[np.floating]) -> None:
    bad = [np.inf, -np.inf, np.nan] + ([FEATURE_BOUND, -FEATURE_BOUND] if kind is np.float32 else [])
    good = [0.0, np.finfo(kind).tiny, -65504.0] + ([-9.9e11] if kind is np.float32 else [])
    vectors = np.array([*bad, *good], kind)[:, None]
    count = len(vectors)
    block = Block(*[np.arange(count)] * 3, np.ones((count, 1), np.bool_), np.zeros((count, 1), np.int64), (vectors,))
    assert block.fits([1]) == ""
    assert block.finite().tolist() == [False] * len(bad) + [True] * len(good)


def whole() -> Block:
    numbers = np.arange(2)
    features = tuple(np.zeros((2, size), np.float32) for size in SIZES)
    return Block(numbers, numbers, numbers, np.ones((2, 3), np.bool_), np.zeros((2, 3), np.int64), features)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"handles": np.zeros((1, 2), np.int64)}, "`handles` as int64"),
        ({"handles": np.zeros(2, np.uint32)}, "`handles` as int64"),
        ({"handles": np.zeros((), np.int64)}, "`handles` as int64"),
        ({"indices": np.zeros(3, np.int64)}, "`indices` as int64"),
        ({"event_ns": np.zeros(2)}, "`event_ns` as int64"),
        ({"age_ns": np.zeros((3, 2), np.int64)}, "`age_ns` as int64"),
        ({"present": np.ones((2, 3), np.int8)}, "`present` as bool"),
        ({"present": np.ones((2, 2), np.bool_)}, "`present` as bool"),
        ({"present": np.zeros((2, 3), np.bool_)}, "0 vectors of 3 numbers of modality 0"),
        ({"features": whole().features[:2]}, "features of 3 modalities, got 2"),
        ({"features": (*whole().features[:2], np.zeros((2, 3), np.float32))}, "2 vectors of 2 numbers of modality 2"),
        ({"features": (*whole().features[:2], np.zeros((2, 2)))}, "float32 or float16, got float64"),
        ({"features": (*whole().features[:2], np.zeros((2, 2), ">f4"))}, "float32 or float16, got >f4"),
    ],
)
def test_columns_that_do_not_fit_are_named(change: dict[str, object], words: str) -> None:
    assert whole().fits(SIZES) == ""
    assert words in msgspec.structs.replace(whole(), **change).fits(SIZES)


def test_predictions_and_states_are_taken_by_row() -> None:
    numbers = np.arange(3)
    done = BlockPredictions(numbers, numbers * 2, numbers * 3, {"a": np.eye(3, dtype=np.float32)}, "m", 1, 2)
    part = done.take(np.array([True, False, True]))
    assert (len(part), part.handles.tolist(), part.indices.tolist()) == (2, [0, 2], [0, 4])
    assert part.event_ns.tolist() == [0, 6]
    assert part.heads["a"].tolist() == [[1, 0, 0], [0, 0, 1]]
    states = StateBlock(np.array([True, False]), {"h": np.ones((2, 4)), "scalar": np.arange(2)})
    assert len(states) == 2
    assert states.row(0) == {}
    assert {name: (a.shape, a.tolist()) for name, a in states.row(1).items()} == {
        "h": ((4,), [1, 1, 1, 1]),
        "scalar": ((), 1),
    }
