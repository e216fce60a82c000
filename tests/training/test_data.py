from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn.core.errors import ConfigError, FileError
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.data import Ticks, batches, check

TABLE = {
    "name": "toy",
    "modalities": {"audio": {"size": 2}, "text": {"size": 1}},
    "heads": [
        {"name": "now", "kind": "classification", "size": 3},
        {"name": "later", "kind": "regression", "size": 2},
    ],
    "data": {"kind": "none"},
}
RECIPE = recipes.parse(TABLE)


def ticks(length: int, start: int, name: str = "") -> Ticks:
    count = np.arange(start, start + length, dtype=np.float32)
    return Ticks(
        {"audio": np.stack([count, -count], 1), "text": count[:, None] * 10},
        np.ones((length, 2), np.float32),
        np.stack([count, count], 1) / 100,
        {"now": (count % 3).astype(np.int64), "later": np.stack([count, count + 1], 1)},
        {"now": np.ones(length, np.float32), "later": np.full(length, 2, np.float32)},
        name,
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=12), st.integers(1, 5), st.integers(1, 9))
def test_lanes_read_every_tick_once_and_in_order(lengths: list[int], batch: int, length: int) -> None:
    starts = np.concatenate([[1], 1 + np.cumsum(lengths)]).astype(int)
    sequences = [ticks(n, s) for n, s in zip(lengths, starts, strict=False)]
    lanes: list[list[tuple[float, bool]]] = [[] for _ in range(batch)]
    for b in batches(sequences, RECIPE, batch, length):
        assert b.present.shape == (batch, length, 2)
        for row in range(batch):
            for t in range(length):
                if b.weights["now"][row, t]:
                    value = float(b.features["audio"][row, t, 0])
                    lanes[row].append((value, bool(b.reset[row, t])))
                    assert b.features["audio"][row, t, 1] == -value
                    assert b.features["text"][row, t, 0] == 10 * value
                    assert b.targets["now"][row, t] == value % 3
                    assert b.targets["later"][row, t].tolist() == [value, value + 1]
                    assert b.weights["later"][row, t] == 2
                else:
                    assert not b.present[row, t].any()
    read = [v for lane in lanes for v, _ in lane]
    assert sorted(read) == list(range(1, 1 + sum(lengths)))
    begins = {float(s) for s, n in zip(starts, lengths, strict=False) if n}
    for lane in lanes:
        for i, (value, reset) in enumerate(lane):
            assert reset == (value in begins)
            assert reset or value == lane[i - 1][0] + 1


def test_a_sequence_that_does_not_fit_is_named() -> None:
    good = ticks(4, 0, "a.mcap")
    check(good, RECIPE)
    wrong = Ticks(
        {**good.features, "text": np.zeros((4, 3), np.float32)}, good.present, good.age_s, good.targets, {}, "b"
    )
    with pytest.raises(FileError, match=r"b: text has shape \(4, 3\)"):
        check(wrong, RECIPE)
    nan = Ticks(
        {**good.features, "text": np.full((4, 1), np.nan, np.float32)}, good.present, good.age_s, good.targets, {}
    )
    with pytest.raises(FileError, match="not finite"):
        check(nan, RECIPE)
    with pytest.raises(FileError, match=r"no target .* 'later'"):
        check(Ticks(good.features, good.present, good.age_s, {"now": good.targets["now"]}, {}), RECIPE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cel": {}}, "unknown key `cel`: the nearest is `cell`"),
        ({"cell": {"knd": "gru"}}, "unknown key `cell.knd`: the nearest is `kind`"),
        ({"modalities": {"audio": {"sise": 3}}}, "unknown key `modalities.audio.sise`"),
        ({"heads": [{"name": "a", "kind": "classification", "size": 1, "lable": []}]}, "unknown key `heads[0].lable`"),
        ({"cell": {"kind": "gruu"}}, "`cell.kind` has a wrong value"),
        ({"heads": [{"name": "a", "kind": "classification", "size": 2, "labels": ["x"]}]}, "1 labels for 2 numbers"),
        ({"modalities": {"audio": {"size": 3, "stack": 2}}}, "not a multiple of stack = 2"),
    ],
)
def test_a_wrong_recipe_is_an_error_of_one_sentence(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as e:
        recipes.parse({**TABLE, **change})
    assert words in str(e.value)


def test_quick_changes_only_the_training() -> None:
    quick = recipes.quick(recipes.parse({**TABLE, "quick": {"epochs": 2}}))
    assert (quick.train.epochs, quick.cell, quick.quick) == (2, RECIPE.cell, {})
    with pytest.raises(ConfigError, match=r"unknown key `train\.epoch`"):
        recipes.quick(recipes.parse({**TABLE, "quick": {"epoch": 2}}))
