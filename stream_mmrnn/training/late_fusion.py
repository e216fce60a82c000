"""LateFusion: log-odds from one modality that few training data have, added to some numbers of one head.

The rest of the network is trained without it and stays as it is; this part is fitted afterwards (`fit`), on other data.
It has no state and no memory, so it cannot learn when in a recording something comes. Knows nothing about what the
numbers mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stream_mmrnn.capture.encoders.speech_detector import VOICE
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.training.data import Ticks
from stream_mmrnn.training.recipe import Recipe

if TYPE_CHECKING:
    from stream_mmrnn.training.predictor import PredictorNetwork

_LIMIT = 3.0
"""Log-odds: no input that was not in the training data can say more."""
_EPOCHS, _PATIENCE = 300, 40
_DROPOUT = 0.1


class LateFusion(nn.Module):
    """e = 3 tanh(W_2 tanh(W_1 x) / 3) where the modality is there and the voices are silent, else 0."""

    place: Tensor

    def __init__(self, recipe: Recipe, size: int) -> None:
        """`size`: how many numbers of the modality are used."""
        super().__init__()
        mine, names = recipe.late_fusion, list(recipe.modalities)
        head = next(h for h in recipe.heads if h.name == mine.head)
        self.modality, self.at = mine.modality, names.index(mine.modality)
        self.present = mine.present
        self.silent = [(name, index, names.index(name)) for name, index in mine.silent]
        self.enter = nn.Linear(size, mine.hidden)
        self.dropout = nn.Dropout(_DROPOUT)
        self.leave = nn.Linear(mine.hidden, len(mine.labels), bias=False)
        nn.init.zeros_(self.leave.weight)  # until it is fitted it says nothing
        self.register_buffer("place", torch.zeros(len(mine.labels), head.size), persistent=False)
        for row, label in enumerate(mine.labels):
            self.place[row, head.labels.index(label)] = 1

    def counts(self, features: dict[str, Tensor], present: Tensor) -> Tensor:
        """[..., 1] of bool: the ticks in which it says something."""
        here = present[..., self.at : self.at + 1] > 0
        for index in self.present:
            here = here & (features[self.modality][..., index : index + 1] > 0)
        for name, index, place in self.silent:
            if name in features:
                speech = features[name][..., index : index + 1] * present[..., place : place + 1]
                here = here & (speech <= VOICE)
        return here

    def said(self, x: Tensor) -> Tensor:
        """Log-odds [..., K] of the normalised numbers [..., size]."""
        hidden = self.dropout(torch.tanh(self.enter(x)))
        return _LIMIT * torch.tanh(self.leave(hidden) / _LIMIT)

    def forward(self, x: Tensor, features: dict[str, Tensor], present: Tensor) -> Tensor:
        """What is added to the head's log-odds, [..., size of the head]."""
        log_odds = self.said(x)
        kept = torch.where(self.counts(features, present), log_odds, torch.zeros_like(log_odds))
        return kept @ self.place


class Rows:
    """The ticks of sequences that count, with what the rest of the network says of them."""

    def __init__(self, predictor: PredictorNetwork, sequences: Iterable[Ticks]) -> None:
        late, recipe = predictor.late_fusion, predictor.recipe
        assert late is not None
        mine = recipe.late_fusion
        head = next(h for h in recipe.heads if h.name == mine.head)
        columns = [head.labels.index(label) for label in mine.labels]
        inputs, base, target = [], [], []
        for ticks in sequences:
            features = {name: torch.from_numpy(x).unsqueeze(0) for name, x in ticks.features.items()}
            if mine.modality not in features:
                continue
            present, age_s = (torch.from_numpy(x).unsqueeze(0) for x in (ticks.present, ticks.age_s))
            raw, _ = predictor(features, present, age_s)
            weight = torch.from_numpy(ticks.weights[head.name]) > 0
            rows = late.counts(features, present)[0, :, 0] & weight
            inputs.append(features[mine.modality][0, rows])
            base.append(raw[head.name][0, rows][:, columns] / predictor.heads.temperature(head.name))
            target.append(torch.from_numpy(ticks.targets[head.name])[rows][:, columns].float())
        if not inputs or not sum(map(len, inputs)):
            raise FileError(f"no tick of the data for late_fusion has {mine.modality!r} while nobody speaks")
        self.inputs, self.base, self.target = torch.cat(inputs), torch.cat(base), torch.cat(target)


def _prior(rows: Rows) -> Tensor:
    """[K] how much more often, in log-odds, the targets of these data come than the rest of the network says.

    That is a property of the data and not of the modality, so it is taken out before fitting and not served.
    """
    shift = torch.zeros(rows.base.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([shift], max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(rows.base + shift, rows.target)
        value.backward()
        return value

    optimizer.step(closure)
    return shift.detach()


def fit(predictor: PredictorNetwork, training: Sequence[Ticks], validation: Sequence[Ticks], seed: int) -> float:
    """Fit the late fusion of a trained network; nothing else in it changes. Returns the log loss per number of the
    validation data over that without it.

    Raises:
        FileError: the data hold no tick to fit on.

    """
    late = predictor.late_fusion
    assert late is not None
    predictor.eval()
    predictor.known[late.at] = 1
    name = predictor.recipe.late_fusion.modality
    with torch.no_grad():
        late.leave.weight.zero_()
        rows, held_out = Rows(predictor, training), Rows(predictor, validation)
        predictor.tokens.set_scale(name, rows.inputs.mean(0), rows.inputs.std(0))
        x, x_held_out = (predictor.tokens.normal(name, r.inputs) for r in (rows, held_out))
    base, base_held_out = rows.base + _prior(rows), held_out.base + _prior(held_out)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(late.parameters(), lr=0.01, weight_decay=0.02)

    def held_out_loss() -> float:
        late.eval()
        with torch.no_grad():
            said = base_held_out + late.said(x_held_out)
            return float(F.binary_cross_entropy_with_logits(said, held_out.target))

    without = held_out_loss()
    best, kept, since = without, {k: v.clone() for k, v in late.state_dict().items()}, 0
    for _ in range(_EPOCHS):
        late.train()
        for part in torch.randperm(len(x)).split(512):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(base[part] + late.said(x[part]), rows.target[part]).backward()
            optimizer.step()
        since += 1
        if (now := held_out_loss()) < best:
            best, kept, since = now, {k: v.clone() for k, v in late.state_dict().items()}, 0
        if since >= _PATIENCE:
            break
    late.load_state_dict(kept)
    late.eval()
    return best / without
