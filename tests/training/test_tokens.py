"""Token ids as inputs: trained vectors, looked up in the network, over a sequence as step by step and in the export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_networks import network

from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.events import NextToken, TokenTable
from stream_mmrnn.training.export import TOLERANCE, export
from stream_mmrnn.training.predictor import HEARD, PredictorNetwork
from stream_mmrnn.training.tasks.common import Words, common_tokens

IDS = (7, 12, 450, 32_000)


def table(**events: object) -> dict[str, object]:
    given: dict[str, object] = {"modalities": ["text"], "tokens": ["text.tokens"], "vocabulary": 4, "width": 8}
    return {
        "name": "toy",
        "modalities": {"audio": {"size": 4}, "text": {"size": 3}, "text.tokens": {"size": 6}},
        "heads": [{"name": "now", "kind": "classification", "size": 3}],
        "fusion": {"width": 8},
        "events": given | {"hidden": 8} | events,
        "cell": {"hidden": 8},
        "data": {"kind": "none"},
    }


def made(**events: object) -> PredictorNetwork:
    p = network(recipes.parse(table(**events)))
    assert p.events_table is not None
    p.events_table.choose(torch.tensor(IDS))
    return p


def inputs(length: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    present = (torch.rand((2, length, 3), generator=g) < 0.6).float()
    ids = torch.tensor([0, *IDS, 99])[torch.randint(6, (2, length, 6), generator=g)].float()
    features = {
        "audio": torch.randn((2, length, 4), generator=g) * present[..., :1],
        "text": torch.randn((2, length, 3), generator=g) * present[..., 1:2],
        "text.tokens": ids * present[..., 2:],
    }
    return features, present, torch.rand((2, length, 3), generator=g)


@pytest.mark.parametrize("read", [["text"], ["text", "audio"]], ids=["beside a fusion", "without a fusion"])
def test_a_sequence_equals_its_steps(read: list[str]) -> None:
    p = made(modalities=read)
    features, present, age = inputs(15)
    with torch.no_grad():
        whole, last = p(features, present, age)
        state = p.initial(2)
        for t in range(15):
            raw, state = p.step({m: x[:, t] for m, x in features.items()}, present[:, t], age[:, t], state)
            torch.testing.assert_close(raw["now"], whole["now"][:, t], atol=2e-6, rtol=1e-5)
    for name, expected in last.items():
        torch.testing.assert_close(state[name], expected, atol=2e-6, rtol=1e-5)


def test_tokens_alone_are_an_event_and_change_the_state() -> None:
    p = made()
    nothing = {"audio": torch.zeros(1, 4), "text": torch.zeros(1, 3), "text.tokens": torch.zeros(1, 6)}
    said = nothing | {"text.tokens": torch.tensor([[7.0, 0, 0, 0, 0, 0]])}
    age, state = torch.zeros(1, 3), p.initial(1)
    with torch.no_grad():
        one, _ = p.step(said, torch.tensor([[1.0, 0, 1]]), age, state)
        other, _ = p.step(said, torch.tensor([[1.0, 0, 0]]), age, state)
        none, _ = p.step(nothing, torch.tensor([[1.0, 0, 0]]), age, state)
    assert torch.equal(other["now"], none["now"])  # what is not present has no effect
    assert not torch.equal(one["now"], none["now"])


def test_what_has_no_vector_adds_nothing() -> None:
    t = TokenTable(4, 2)
    with torch.no_grad():
        t.vectors[1:].normal_()
    t.choose(torch.tensor(IDS))
    for ids in ([0.0, 0.0], [99.0, 0.0], [-5.0, 1e9], [float("nan"), 32_001.0]):
        assert t(torch.tensor([ids])).tolist() == [[0.0, 0.0]]
    both = t(torch.tensor([[7.0, 450.0]]))
    torch.testing.assert_close(both[0], t.vectors[1] + t.vectors[3])


@pytest.mark.slow
@pytest.mark.parametrize("read", [["text"], ["text", "audio"]], ids=["beside a fusion", "without a fusion"])
def test_the_export_looks_up_the_same_vectors(read: list[str], tmp_path: Path) -> None:
    assert max(export(made(next_token=0.2, modalities=read), tmp_path / "step.onnx", {}).values()) <= TOLERANCE


def test_next_tokens_are_learnt_within_a_sequence_only() -> None:
    torch.manual_seed(0)
    helper = NextToken(4, 4)
    heard = torch.randn(1, 6, 4)
    rows = torch.tensor([[1, 0, 2, 0, 0, 3]])
    quiet = torch.zeros(1, 6, dtype=torch.bool)
    helper.eval()
    expected = helper.softmax(helper.project(heard[0, [0, 2]]), torch.tensor([2, 3])).loss
    torch.testing.assert_close(helper.loss(heard, rows, quiet), expected)
    begins = quiet.clone()
    begins[0, 5] = True  # token 3 is of the next sequence
    expected = helper.softmax(helper.project(heard[0, [0]]), torch.tensor([2])).loss
    torch.testing.assert_close(helper.loss(heard, rows, begins), expected)
    assert helper.loss(heard, torch.zeros_like(rows), quiet).item() == 0


def test_the_helper_is_in_training_only() -> None:
    p = made(next_token=0.5)
    features, present, age = inputs(6)
    assert HEARD not in p.eval()(features, present, age)[0]
    raw, _ = p.train()(features, present, age)
    assert raw[HEARD].shape == (2, 6, 8)


def test_common_tokens_are_counted_by_word() -> None:
    class Spelt:
        origin, size = "spelt@1", 2

        def encode(self, sample: object) -> list[object]:
            import numpy as np

            from stream_mmrnn.core.types import Sample

            assert isinstance(sample, Sample)
            assert isinstance(sample.data, bytes)
            letters = [float(c) for c in sample.data][-2:]
            return [Sample(0, 0, np.array(letters + [0.0] * (2 - len(letters)), np.float32))]

    words = Words(Spelt())  # type: ignore[arg-type]
    assert common_tokens(["ab", "b", "b", "cb"], words) == (98, 97, 99)


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ({"tokens": ["words"]}, "events.tokens names 'words'"),
        ({"tokens": ["text"]}, "'text' is named twice"),
        ({"modalities": []}, "events.tokens needs events.modalities"),
    ],
)
def test_what_does_not_fit_the_recipe_is_refused(events: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recipes.parse(table(**events))
