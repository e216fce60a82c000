"""The last known value of some inputs, as a state of the network: what a forecast of changes starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class LastValue(nn.Module):
    """Holds the newest value of each of N inputs while they are absent; zero before the first one."""

    def __init__(self, inputs: Sequence[tuple[str, int]], modalities: Sequence[str]) -> None:
        """`inputs`: (modality, index of the number); `modalities`: all of them, in the order of `present`."""
        super().__init__()
        self.inputs = list(inputs)
        self.places = [list(modalities).index(modality) for modality, _ in inputs]

    def _now(self, features: Mapping[str, Tensor], present: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs [..., N], and whether they are there."""
        here = present[..., self.places] > 0
        absent = torch.zeros_like(present[..., :1])
        values = [features[m][..., i : i + 1] if m in features else absent for m, i in self.inputs]
        return torch.cat(values, -1), here

    def step(self, features: Mapping[str, Tensor], present: Tensor, held: Tensor) -> Tensor:
        """One tick: [B, N], which is also the next state."""
        values, here = self._now(features, present)
        return torch.where(here, values, held)

    def forward(
        self, features: Mapping[str, Tensor], present: Tensor, held: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A sequence: [B, T, N], and the next state [B, N]; `reset` [B, T] before the tick."""
        values, here = self._now(features, present)
        if reset is not None:
            begun = reset.unsqueeze(-1) & ~here
            values, here = torch.where(begun, torch.zeros_like(values), values), here | begun
        places = torch.arange(1, here.shape[1] + 1, device=here.device).reshape(1, -1, 1)
        newest = torch.where(here, places, torch.zeros_like(places)).cummax(1).values
        found = torch.cat([held.unsqueeze(1), values], 1).gather(1, newest)
        return found, found[:, -1]
