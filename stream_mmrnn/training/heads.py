"""Heads: the outputs of the network, their losses, and their activation in the served model.

The layer of a head gives logits (or plain numbers); `loss` compares them with targets, `activate` turns them into the
outputs of the served model. Targets are aligned with ticks. A tick with weight 0 does not count in the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stream_mmrnn.training.recipe import HeadRecipe


def activate(head: HeadRecipe, raw: Tensor, temperature: Tensor) -> Tensor:
    """The served output from the layer's output [..., size]; logits are divided by a temperature to calibrate them."""
    if head.kind == "regression":
        return raw
    if head.kind == "classification" and head.size > 1:
        return torch.softmax(raw / temperature, -1)
    return torch.sigmoid(raw / temperature)


def loss(head: HeadRecipe, raw: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The mean over ticks of weight * loss; `raw` [..., size], `weight` [...].

    classification: cross-entropy, `target` [...] a class number (or one logit against 0 and 1, where size is 1).
    activity_projection: binary cross-entropy of each bin, `target` [..., size] of 0 and 1 (Ekstedt and Skantze 2022
    predict the joint state of the bins; here each bin has its own probability).
    regression: squared error, or Huber's with delta 1, `target` [..., size]; a number that is NaN does not count.
    hazard: discrete-time survival (Gensheimer and Narasimhan 2019): sigmoid(raw_j) is the probability that the event
    comes in interval j, given that it did not come before; `target` [...] is the interval in which it came, or `size`
    if it came in none of them.
    """
    if head.kind == "classification" and head.size > 1:
        each = F.cross_entropy(raw.flatten(0, -2), target.flatten().long(), reduction="none").reshape(weight.shape)
    elif head.kind in ("classification", "activity_projection"):
        each = F.binary_cross_entropy_with_logits(raw, target.to(raw.dtype).reshape(raw.shape), reduction="none")
        each = each.mean(-1)
    elif head.kind == "regression":
        kind = F.huber_loss if head.loss == "huber" else F.mse_loss
        target = target.to(raw.dtype)
        known = ~torch.isnan(target)
        errors = kind(raw, torch.where(known, target, raw.detach()), reduction="none")
        each = errors.sum(-1) / known.sum(-1).clamp(min=1)
    else:
        interval = torch.arange(head.size, device=raw.device)
        came = target.long().unsqueeze(-1)
        happened = (interval == came).to(raw.dtype)
        at_risk = (interval <= came).to(raw.dtype)
        each = (F.binary_cross_entropy_with_logits(raw, happened, reduction="none") * at_risk).sum(-1)
    return (each * weight).sum() / weight.sum().clamp(min=1.0)


class Heads(nn.Module):
    """One linear layer per head, its temperature (1 until calibrated) and, for a binary head, its threshold."""

    def __init__(self, heads: tuple[HeadRecipe, ...], width: int) -> None:
        super().__init__()
        self.specs = heads
        self.layers = nn.ModuleDict({h.name: nn.Linear(width, h.size) for h in heads})
        for h in heads:
            self.register_buffer(f"temperature_{h.name}", torch.ones(()))
            self.register_buffer(f"threshold_{h.name}", torch.full((), 0.5))
            if h.standardise:
                self.register_buffer(f"mean_{h.name}", torch.zeros(h.size))
                self.register_buffer(f"std_{h.name}", torch.ones(h.size))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Raw outputs by head, [..., size]."""
        return {h.name: self.layers[h.name](x) for h in self.specs}

    def temperature(self, name: str) -> Tensor:
        return getattr(self, f"temperature_{name}")

    def threshold(self, name: str) -> Tensor:
        return getattr(self, f"threshold_{name}")

    def set_scale(self, name: str, mean: Tensor, std: Tensor) -> None:
        """Set the mean and the deviation [size] of a head's targets; a constant one is not scaled."""
        getattr(self, f"mean_{name}").copy_(mean)
        getattr(self, f"std_{name}").copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def from_last(self, raw: dict[str, Tensor], last: Tensor, columns: dict[str, list[int]]) -> dict[str, Tensor]:
        """Raw outputs with the last known values added. `last` [..., N]; `columns`: by head, that of each number."""
        found = dict(raw)
        for name, places in columns.items():
            found[name] = raw[name] + last[..., places] / getattr(self, f"std_{name}")
        return found

    def standardised(self, head: HeadRecipe, target: Tensor) -> Tensor:
        """The target on the scale of the layer's output."""
        if not head.standardise:
            return target
        mean, std = getattr(self, f"mean_{head.name}"), getattr(self, f"std_{head.name}")
        scaled: Tensor = (target - mean) / std
        return scaled

    def served(self, head: HeadRecipe, raw: Tensor) -> Tensor:
        """The served output of one head."""
        out = activate(head, raw, self.temperature(head.name))
        if not head.standardise:
            return out
        scaled: Tensor = out * getattr(self, f"std_{head.name}") + getattr(self, f"mean_{head.name}")
        return scaled

    def activate(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """The served outputs by head."""
        return {h.name: self.served(h, raw[h.name]) for h in self.specs}
