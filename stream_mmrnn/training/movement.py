"""How the numbers of a signal move: running statistics as a state of the network, from one tick to the next.

The mean of a swing says nothing; its size and speed do. For windows of several lengths the layer keeps the energy
about a slow mean and the energy of the change from sample to sample. Their ratio rises with the frequency. Only its
scales are fitted; it is causal, and part of the exported graph, so that live, replay and training have the same
numbers. Knows nothing about fusion and cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stream_mmrnn.training.scan import linear_scan

_SHARES = (0.1, 0.35, 1.0)
"""The lengths of the windows, as shares of the longest."""
_TINY = 1e-3
_LEAST_SPREAD = 0.05


def _squashed(x: Tensor) -> Tensor:
    """Into -1 to 1 by exact operations: a row has the same bits in every batch."""
    return x / (1 + x.abs())


class Movement(nn.Module):
    """From the samples of a tick, `stack` times C numbers, to `size` numbers on one scale."""

    mean: Tensor
    std: Tensor
    share: Tensor
    centre: Tensor
    spread: Tensor
    used: Tensor

    def __init__(self, size: int, stack: int, window_s: float, tick_s: float) -> None:
        super().__init__()
        self.stack, self.channels = stack, size // stack
        self.rates = [min(1.0, tick_s / (share * window_s)) for share in _SHARES]
        """By window, the weight of a tick."""
        c, k = self.channels, len(self.rates)
        self.size = c * (3 + 3 * k) + 3 * k
        self.state = (1 + 2 * c + 2 * k * c,)
        """Ticks so far, slow mean, last sample, energies and energies of change."""
        self.register_buffer("mean", torch.zeros(c))
        self.register_buffer("std", torch.ones(c))
        self.register_buffer("share", torch.full((c,), 1 / c))
        # of the output; `used` is 0 where each channel by itself misled on the validation data
        self.register_buffer("centre", torch.zeros(self.size))
        self.register_buffer("spread", torch.ones(self.size))
        self.register_buffer("used", torch.ones(self.size))

    def set_scale(self, samples: Tensor) -> None:
        """Fit mean and deviation of each channel on rows [N, stack * C] of the training data."""
        rows = samples.reshape(-1, self.stack, self.channels)
        values = rows[self._there(rows) > 0]
        std = values.std(0, correction=0) if len(values) else torch.ones_like(self.std)
        self.mean.copy_(values.mean(0) if len(values) else torch.zeros_like(self.mean))
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))
        power = torch.where(std > 1e-6, std, torch.zeros_like(std)) ** 2
        if float(power.sum()) > 0:
            self.share.copy_(power / power.sum())

    def set_output_scale(self, outputs: Tensor) -> None:
        """Fit the scale of the output on rows [N, size]. They lie between -1 and 1: a small deviation is no scale."""
        self.centre.copy_(outputs.mean(0))
        self.spread.copy_(outputs.std(0, correction=0).clamp(min=_LEAST_SPREAD))

    def use_channels(self, use: bool) -> None:
        """Whether the output says something of each channel by itself, or only of all together.

        A sensor that is held another way has its movement in other channels, and the same in all together.
        """
        self.used[: -3 * len(self.rates)] = float(use)

    def typical(self, noise: Tensor) -> Tensor:
        """Random samples [..., stack * C] on the scale of the training data, from standard normal noise."""
        return self.mean.repeat(self.stack) + self.std.repeat(self.stack) * noise

    def _there(self, rows: Tensor) -> Tensor:
        """[..., stack] of 0 and 1: which samples of rows [..., stack, C] are some. Zeros stand before too few."""
        if self.stack == 1:
            return torch.ones_like(rows[..., 0])
        some = (rows.abs().amax(-1) > 0).to(rows.dtype)
        some = torch.cat([some[..., :-1], torch.ones_like(some[..., :1])], -1)  # a tick has one sample at least
        return torch.cat([some[..., : i + 1].amax(-1, keepdim=True) for i in range(self.stack)], -1)

    def _samples(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scaled samples [..., stack, C], which of them there are, and their mean [..., C]."""
        rows = x.unflatten(-1, (self.stack, self.channels))
        there = self._there(rows).unsqueeze(-1)
        z = (rows - self.mean) / self.std
        return z, there, (z * there).sum(-2) / there.sum(-2)

    def _energies(self, z: Tensor, there: Tensor, slow: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Of the samples of a tick about the slow mean, and of their changes: the means of the squares [..., C]."""
        count, last = there.sum(-2), last.unsqueeze(-2)
        about = (((z - slow.unsqueeze(-2)) ** 2) * there).sum(-2) / count
        held = torch.where(there > 0, z, last)
        steps = held - torch.cat([last, held[..., :-1, :]], -2)
        return about, (steps**2).sum(-2) / count

    def _weights(self, seen: Tensor) -> list[Tensor]:
        """By window, the weight of a tick [..., 1] after so many: at the beginning all ticks weigh the same."""
        return [(1 / (1 + seen)).clamp(min=rate) for rate in self.rates]

    def _shown(self, level: Tensor, drift: Tensor, step: Tensor, energy: Tensor, change: Tensor) -> Tensor:
        """The output [..., size] of a tick; energies as [..., windows * C]."""
        parts, ratios, pooled = [level, drift, step], [], []
        for e, d in zip(energy.split(self.channels, -1), change.split(self.channels, -1), strict=True):
            e, d = torch.relu(e), torch.relu(d)
            size, speed = torch.sqrt(e), torch.sqrt(d)
            parts += [size, speed]
            ratios.append(speed / (size + speed + _TINY))
            size, speed = (torch.sqrt((x * self.share).sum(-1, keepdim=True)) for x in (e, d))
            pooled += [size / (1 + size), speed / (1 + speed), speed / (size + speed + _TINY)]
        out = torch.cat([*(_squashed(p) for p in parts), *ratios, *pooled], -1)
        return (out - self.centre) / self.spread * self.used

    def step(self, x: Tensor, present: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One tick: x [B, stack * C], `present` [B] of 0 and 1, `state` [B, ...]."""
        c, k = self.channels, len(self.rates)
        z, there, level = self._samples(x)
        seen, slow, last, energy, change = state.split([1, c, c, k * c, k * c], 1)
        seen = torch.relu(seen)
        slow, last = torch.where(seen < 0.5, level, slow), torch.where(seen < 0.5, level, last)
        about, moved = self._energies(z, there, slow, last)
        weights = self._weights(seen)
        weight = torch.cat([w.expand(-1, c) for w in weights], 1)
        energy = energy + weight * (about.repeat(1, k) - energy)
        change = change + weight * (moved.repeat(1, k) - change)
        newest, drift = z[:, -1], level - slow
        out = self._shown(level, drift, newest - last, energy, change)
        following = torch.cat([(seen + 1).clamp(max=1e6), slow + weights[-1] * drift, newest, energy, change], 1)
        return out, torch.where(present.unsqueeze(1) > 0, following, state)

    def forward(self, x: Tensor, present: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """A sequence: x [B, T, stack * C], `present` [B, T], `reset` [B, T] before the tick.

        The same as one step after another, where the modality is present; only the recurrences go tick by tick.
        """
        c, k = self.channels, len(self.rates)
        z, there, level = self._samples(x)
        here = (present > 0).to(z.dtype).unsqueeze(-1)
        kept = torch.ones_like(here) if reset is None else (~reset).to(z.dtype).unsqueeze(-1)

        def before(after: Tensor, initial: Tensor) -> Tensor:
            return torch.cat([initial.unsqueeze(1), after[:, :-1]], 1) * kept

        initial = state.split([1, 2 * c, 2 * k * c], 1)
        seen_after = linear_scan(kept, here, initial[0])
        seen = before(seen_after, initial[0])
        weights = self._weights(seen)
        a = torch.cat([1 - here * weights[-1].expand_as(level), (1 - here).expand_as(level)], -1)
        newest = z[..., -1, :]
        held_after = linear_scan(a * kept, torch.cat([here * weights[-1] * level, here * newest], -1), initial[1])
        slow, last = before(held_after, initial[1]).split(c, -1)
        slow, last = torch.where(seen < 0.5, level, slow), torch.where(seen < 0.5, level, last)
        about, moved = self._energies(z, there, slow, last)
        weight = here * torch.cat([w.expand_as(level) for w in weights], -1)
        values = torch.cat([weight * about.repeat(1, 1, k), weight * moved.repeat(1, 1, k)], -1)
        powers = linear_scan((1 - weight).repeat(1, 1, 2) * kept, values, initial[2])
        out = self._shown(level, level - slow, newest - last, *powers.split(k * c, -1))
        if self.training:  # it learns to do without each channel by itself
            some = (torch.rand(out.shape[0], 1, 1, device=out.device) < 0.5).to(out.dtype)
            out = torch.cat([out[..., : -3 * k] * some, out[..., -3 * k :]], -1)
        return out, torch.cat([seen_after[:, -1], held_after[:, -1], powers[:, -1]], 1)
