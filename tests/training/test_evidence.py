"""Evidence: it holds from its event until somebody speaks, over a sequence as step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.evidence import Evidence
from stream_mmrnn.training.predictor import PredictorNetwork

NAMES = ["end", "voice", "other_end"]
RECIPE = recipes.EvidenceRecipe(head="over", modalities=("end", "other_end"), voices=(("voice", 1),), weight=0.5)


def table(**evidence: object) -> dict[str, object]:
    given: dict[str, object] = {"head": "over", "modalities": ["end", "other_end"], "voices": [["voice", 1]]}
    return {
        "name": "toy",
        "modalities": {"end": {"size": 1}, "voice": {"size": 2}, "other_end": {"size": 1}},
        "heads": [
            {"name": "over", "kind": "classification", "size": 1},
            {"name": "many", "kind": "classification", "size": 3},
        ],
        "evidence": given | evidence,
        "data": {"kind": "none"},
    }


def ticks(*rows: tuple[float | None, float | None, float | None]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of one lane: (end, speech, other_end) a tick; None is absent."""
    present = torch.tensor([[[float(x is not None) for x in row] for row in rows]])
    column = [torch.tensor([[[row[i] or 0.0] for row in rows]]) for i in range(3)]
    features = {"end": column[0], "voice": torch.cat([torch.zeros_like(column[1]), column[1]], -1)}
    return features | {"other_end": column[2]}, present


def held(*rows: tuple[float | None, float | None, float | None], before: float = 0.0) -> list[float]:
    features, present = ticks(*rows)
    out, last = Evidence(RECIPE, NAMES)(features, present, torch.tensor([[before]]), None)
    assert last.item() == out[0, -1].item()
    values: list[float] = out[0, :, 0].tolist()
    return values


def test_it_holds_until_somebody_speaks() -> None:
    assert held((None, 0.9, None), (2.0, 0.1, None), (None, 0.2, None), (None, 0.6, None), (None, 0.0, None)) == [
        0.0,
        2.0,
        2.0,
        0.0,
        0.0,
    ]


def test_a_newer_one_takes_its_place() -> None:
    assert held((2.0, 0.0, None), (None, 0.0, -1.5), (None, 0.0, None)) == [2.0, -1.5, -1.5]


def test_a_voice_that_is_not_there_ends_nothing() -> None:
    assert held((None, None, None), (None, 0.9, None), before=3.0) == [3.0, 0.0]


row = st.tuples(
    st.none() | st.floats(-4, 4, width=32),
    st.none() | st.floats(0, 1, width=32),
    st.none() | st.floats(-4, 4, width=32),
)


@given(st.lists(st.tuples(row, st.booleans()), min_size=1, max_size=12), st.floats(-4, 4, width=32), st.integers(0, 11))
def test_a_sequence_in_any_two_parts_equals_its_steps(
    given_rows: list[tuple[tuple[float | None, ...], bool]], before: float, cut: int
) -> None:
    evidence = Evidence(RECIPE, NAMES)
    features, present = ticks(*(r for r, _ in given_rows))  # type: ignore[arg-type]
    reset = torch.tensor([[r for _, r in given_rows]])
    state = torch.tensor([[before]])
    steps = []
    for t in range(len(given_rows)):
        if reset[0, t]:
            state = torch.zeros_like(state)
        state = evidence.step({n: x[:, t] for n, x in features.items()}, present[:, t], state)
        steps.append(state.item())
    parts, following = [], torch.tensor([[before]])
    for part in (slice(0, cut), slice(cut, None)):
        if present[:, part].shape[1]:
            out, following = evidence(
                {n: x[:, part] for n, x in features.items()}, present[:, part], following, reset[:, part]
            )
            parts += out[0, :, 0].tolist()
    assert parts == steps
    assert following.item() == steps[-1]


def test_its_weight_is_not_changed_by_the_temperature() -> None:
    torch.manual_seed(0)
    p = PredictorNetwork(recipes.parse(table(weight=0.5))).eval()
    p.heads.temperature("over").fill_(3.0)
    features, present = ticks((2.0, 0.0, None))
    absent = present.clone()
    absent[..., 0] = 0
    age = torch.zeros_like(present)
    with torch.no_grad():
        one, other = (p.heads.activate(p(features, here, age)[0]) for here in (present, absent))
    assert torch.logit(one["over"]) - torch.logit(other["over"]) == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(one["many"], other["many"])


@pytest.mark.parametrize(
    ("evidence", "says"),
    [
        ({"head": "many"}, "evidence.head is 'many'"),
        ({"head": "none"}, "evidence.head is 'none'"),
        ({"modalities": ["voice"]}, "must have a size of 1"),
        ({"modalities": ["sight"]}, "evidence.modalities names 'sight'"),
        ({"voices": [["voice", 2]]}, "number 2 of 'voice'"),
        ({"voices": [["noise", 0]]}, "evidence.voices names 'noise'"),
        ({"modalities": ["end", "end"]}, "named twice"),
        ({"modalities": ["end", "voice", "other_end"]}, "name every modality"),
    ],
)
def test_what_does_not_fit_the_recipe_is_refused(evidence: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recipes.parse(table(**evidence))
