"""Evidence: log-odds that come ready made in a sparse input, held while nobody speaks.

What no training data have together with the other inputs cannot be learnt; as independent evidence it is added to the
log-odds of a head (naive Bayes). Knows nothing about what the numbers mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stream_mmrnn.capture.encoders.speech_detector import VOICE
from stream_mmrnn.training.recipe import EvidenceRecipe


class Evidence(nn.Module):
    """e_t = sum of the inputs of this tick where there is one; else 0 if somebody speaks; else e_{t-1}."""

    def __init__(self, recipe: EvidenceRecipe, names: list[str]) -> None:
        """`names`: all modalities, in the order of `present`."""
        super().__init__()
        self.inputs = [(name, names.index(name)) for name in recipe.modalities]
        self.voices = [(name, index, names.index(name)) for name, index in recipe.voices]
        self.weight = recipe.weight

    def _now(self, features: dict[str, Tensor], present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of features [..., size] and `present` [..., M], all [..., 1]: the sum of the inputs, whether there is one,
        and whether the evidence before it ends.
        """
        none = present[..., :1] * 0
        value, count, speech = none, none, none
        for name, place in self.inputs:
            if name in features:
                here = present[..., place : place + 1]
                value, count = value + features[name] * here, count + here
        for name, index, place in self.voices:
            if name in features:
                spoken = features[name][..., index : index + 1] * present[..., place : place + 1]
                speech = torch.maximum(speech, spoken)
        return value, count > 0, speech > VOICE

    def step(self, features: dict[str, Tensor], present: Tensor, before: Tensor) -> Tensor:
        """One tick: `before` [B, 1] -> [B, 1]."""
        value, here, ends = self._now(features, present)
        return torch.where(here, value, torch.where(ends, torch.zeros_like(before), before))

    def forward(
        self, features: dict[str, Tensor], present: Tensor, before: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A sequence: `present` [B, T, M], `before` [B, 1], `reset` [B, T] -> [B, T, 1], and the last one [B, 1]."""
        value, here, ends = (x.squeeze(-1) for x in self._now(features, present))
        batch, length = value.shape
        ticks = torch.arange(1, length + 1, device=value.device).expand(batch, length)
        if reset is not None:
            ends = ends | reset
        none = torch.zeros_like(ticks)
        newest = torch.where(here, ticks, none).cummax(1).values  # 0: the one before this sequence
        ended = torch.where(ends & ~here, ticks, none).cummax(1).values
        if reset is not None:  # an input in the tick of a reset comes after it; the ones before are gone
            ended = torch.maximum(ended, torch.where(reset, ticks - 1, none).cummax(1).values)
            begun = reset.cumsum(1) > 0
        else:
            begun = torch.zeros_like(here)
        values = torch.cat([before, value], 1).gather(1, newest)
        kept = (newest > ended) | ((newest == 0) & (ended == 0) & ~begun)
        held = torch.where(kept, values, torch.zeros_like(values)).unsqueeze(-1)
        return held, held[:, -1]
