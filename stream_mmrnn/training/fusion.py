"""Fusion: all modalities of one tick -> one vector, for any set of present modalities.

The inputs are those of the aligner: one vector per modality, which modalities are present, and the age of each. An
absent modality contributes nothing; its absence and age are inputs, so the network can compensate. The same function
runs over a sequence [B, T, ...] and over one step [B, ...]; only `Memory` has a state. `Attention` may be conditioned
on a context, the cell's output of the step before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stream_mmrnn.core import plugins
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.training.recipe import FUSIONS

AGE_SCALE_S = 1.0
State = dict[str, Tensor]


def key(prefix: str, modality: str) -> str:
    """The name of a tensor for a modality: torch takes no dot, and `room.slope` has one."""
    return prefix + modality.replace(".", ":")


class TokenLayer(nn.Module):
    """The vector of each modality, normalised and projected to one width, plus an embedding of its age and of itself.

    x_m -> tanh(W_m (x_m - mean_m) / std_m + b_m + u_m age_m / (1 s + age_m)), or 0 where absent. `mean` and `std` are
    buffers, set from the training data; a projection narrower than its input is the learned reduction of the
    features, and `set_reduction` puts a fixed one (PCA) before it. There is no logarithm of the age: in ONNX
    Runtime its last bits depend on the row, and a session's results must not depend on its slot. `selected`: indices of
    the features that are used, if not all. The modalities in `apart` are only normalised here; they get no token.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        width: int,
        reduced: dict[str, int] | None = None,
        selected: dict[str, tuple[int, ...]] | None = None,
        apart: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.names = tuple(m for m in sizes if m not in apart)
        self.width = width
        self.reduced = dict(reduced or {})
        self.selected = {m: s for m, s in (selected or {}).items() if s}
        sizes = {m: len(self.selected.get(m, ())) or size for m, size in sizes.items()}
        for m, size in sizes.items():
            self.register_buffer(key("mean_", m), torch.zeros(size))
            self.register_buffer(key("std_", m), torch.ones(size))
            if m in self.reduced:
                self.register_buffer(key("basis_", m), torch.zeros(size, self.reduced[m]))
        self.sizes = {m: self.reduced.get(m, size) for m, size in sizes.items()}
        """Size of the output of `normal`."""
        self.project = nn.ModuleDict({key("", m): nn.Linear(self.sizes[m], width) for m in self.names})
        self.age = nn.Parameter(torch.zeros(len(self.names), width))

    def set_scale(self, modality: str, mean: Tensor, std: Tensor) -> None:
        """Set the normalisation of a modality; a constant feature is not scaled."""
        mean, std = self._select(modality, mean), self._select(modality, std)
        getattr(self, key("mean_", modality)).copy_(mean)
        getattr(self, key("std_", modality)).copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def _select(self, modality: str, x: Tensor) -> Tensor:
        if modality not in self.selected:
            return x
        return torch.cat([x[..., i : i + 1] for i in self.selected[modality]], -1)

    def set_reduction(self, modality: str, basis: Tensor) -> None:
        """The principal axes [size, reduced] of the normalised features."""
        getattr(self, key("basis_", modality)).copy_(basis)

    def normal(self, modality: str, x: Tensor) -> Tensor:
        """The selected features of a modality, normalised and reduced."""
        x = (self._select(modality, x) - getattr(self, key("mean_", modality))) / getattr(self, key("std_", modality))
        return x @ getattr(self, key("basis_", modality)) if modality in self.reduced else x

    def typical(self, modality: str, noise: Tensor) -> Tensor:
        """Random features [..., size] on the scale of the training data, from standard normal noise of that shape."""
        mean, std = getattr(self, key("mean_", modality)), getattr(self, key("std_", modality))
        chosen = list(self.selected.get(modality, range(noise.shape[-1])))
        out = noise.clone()
        out[..., chosen] = mean + std * noise[..., chosen]
        return out

    def forward(self, features: dict[str, Tensor], present: Tensor, age: Tensor) -> Tensor:
        """[..., M, width] from M vectors [..., size], `present` [..., M] of 0 and 1, `age` [..., M] in seconds.

        A modality without features is absent.
        """
        ages = (age / (AGE_SCALE_S + age)).unsqueeze(-1) * self.age
        tokens = []
        for i, m in enumerate(self.names):
            if m not in features:
                tokens.append(ages.new_zeros(()).expand(ages[..., i, :].shape))
                continue
            tokens.append(torch.tanh(self.project[key("", m)](self.normal(m, features[m])) + ages[..., i, :]))
        return torch.stack(tokens, -2) * present.unsqueeze(-1)


class Fusion(nn.Module):
    """Base class: tokens [..., M, D] and masks -> [..., D]. `states` is as in `cells.Cell`."""

    conditioned = False
    """Whether it reads the cell's output of the step before; if so, a sequence is a loop of steps."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count, self.width = count, width
        self.states: dict[str, tuple[int, ...]] = {}

    def fuse(self, tokens: Tensor, present: Tensor, context: Tensor | None) -> Tensor:
        """One vector from the tokens of each tick; stateless."""
        raise AssertionError("each kind of fusion has its own")

    def step(self, tokens: Tensor, present: Tensor, context: Tensor | None, state: State) -> tuple[Tensor, State]:
        """One tick: tokens [B, M, D]."""
        return self.fuse(tokens, present, context), {}

    def forward(self, tokens: Tensor, present: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        """A sequence: tokens [B, T, M, D], `reset` [B, T]."""
        return self.fuse(tokens, present, None), {}


class Nothing(Fusion):
    """Zeros: every modality is in `apart`."""

    def fuse(self, tokens: Tensor, present: Tensor, context: Tensor | None) -> Tensor:
        return present.new_zeros((*present.shape[:-1], self.width))


class Add(Fusion):
    """The sum of the present tokens, divided by the square root of their number, plus a bias for the set of them.

    It has no interaction between modalities; the cell has to learn it.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.which = nn.Linear(count, width)

    def fuse(self, tokens: Tensor, present: Tensor, context: Tensor | None) -> Tensor:
        scale = torch.rsqrt(total(present).clamp(min=1.0))
        return tokens.sum(-2) * scale + self.which(present)


class Concat(Fusion):
    """W [t_1; ...; t_M; present]."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.mix = nn.Linear(count * width + count, width)

    def fuse(self, tokens: Tensor, present: Tensor, context: Tensor | None) -> Tensor:
        return torch.tanh(self.mix(torch.cat([tokens.flatten(-2), present], -1)))


class Gated(Fusion):
    """sum_m g_m * t_m with g = sigmoid(W [t_1; ...; t_M; present]): one gate per modality and feature.

    The gated multimodal unit of Arevalo et al. 2017 for more than two modalities.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.gate = nn.Linear(count * width + count, count * width)

    def fuse(self, tokens: Tensor, present: Tensor, context: Tensor | None) -> Tensor:
        gates = torch.sigmoid(self.gate(torch.cat([tokens.flatten(-2), present], -1)))
        return (gates.reshape(tokens.shape) * tokens).sum(-2)


def total(x: Tensor) -> Tensor:
    """The sum over the last axis (keepdim), as a matrix product.

    The order of additions in ONNX Runtime's ReduceSum depends on the alignment of a row's address, so a session's last
    bits would depend on its slot. Those of its matrix products do not (`export.gate` checks that).
    """
    return x @ x.new_ones((x.shape[-1], 1))


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis where `mask` is 1; all zeros if the mask is empty. Never NaN."""
    floor = torch.where(mask > 0, scores, torch.full_like(scores, -1e9))
    weights = torch.exp(floor - floor.amax(-1, keepdim=True)) * mask
    return weights / total(weights).clamp(min=1e-9)


class Attention(Fusion):
    """sum_m a_m t_m with a = softmax over the present modalities of v . tanh(W t_m + U c) (Bahdanau et al. 2015).

    With `conditioned`, c is the cell's output of the step before, so attention depends on the past; without, c = 0
    and a sequence is computed in parallel.
    """

    def __init__(self, count: int, width: int, conditioned: bool = False, context: int = 0) -> None:
        super().__init__(count, width)
        self.conditioned = conditioned
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(context, width, bias=False) if conditioned else None
        self.score = nn.Linear(width, 1, bias=False)
        self.which = nn.Linear(count, width)

    def weights(self, tokens: Tensor, present: Tensor, context: Tensor | None) -> Tensor:
        """The attention weight of each modality, [..., M]; 0 if it is absent."""
        hidden = self.key(tokens)
        if self.query is not None and context is not None:
            hidden = hidden + self.query(context).unsqueeze(-2)
        return masked_softmax(self.score(torch.tanh(hidden)).squeeze(-1), present)

    def fuse(self, tokens: Tensor, present: Tensor, context: Tensor | None) -> Tensor:
        weights = self.weights(tokens, present, context)
        return (weights.unsqueeze(-1) * tokens).sum(-2) + self.which(present)


class Cross(Fusion):
    """Self-attention between the modalities of a tick, then the mean over the present ones.

    One residual block of multi-head scaled dot-product attention (Vaswani et al. 2017), without a norm.
    """

    def __init__(self, count: int, width: int, heads: int = 4) -> None:
        super().__init__(count, width)
        if width % heads:
            raise ConfigError(f"fusion.width {width} must be a multiple of fusion.heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.which = nn.Linear(count, width)

    def fuse(self, tokens: Tensor, present: Tensor, context: Tensor | None) -> Tensor:
        lead, (m, d) = tokens.shape[:-2], tokens.shape[-2:]
        q, k, v = self.qkv(tokens).reshape(*lead, m, 3, self.heads, d // self.heads).unbind(-3)
        q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5
        mixed = masked_softmax(scores, present[..., None, None, :].expand_as(scores)) @ v
        mixed = tokens + self.out(mixed.transpose(-2, -3).reshape(*lead, m, d))
        share = present / total(present).clamp(min=1.0)
        return (share.unsqueeze(-1) * mixed).sum(-2) + self.which(present)


class Memory(Fusion):
    """Concat, then attention from this tick over the last `memory` ticks, including itself.

    The buffer is explicit state: `keys` holds the vectors of past ticks, newest last; `filled` marks the valid ones.
    It is read with masked dot-product attention; a reset empties it.
    """

    def __init__(self, count: int, width: int, memory: int = 16) -> None:
        super().__init__(count, width)
        self.memory = memory
        self.inner = Concat(count, width)
        self.query = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.states = {"past": (memory, width), "filled": (memory,)}

    def _read(self, now: Tensor, past: Tensor, filled: Tensor) -> Tensor:
        """Now [..., D], past [..., K, D] (its last is now), filled [..., K]."""
        scores = (past @ self.query(now).unsqueeze(-1)).squeeze(-1) * self.width**-0.5
        return now + self.out((masked_softmax(scores, filled).unsqueeze(-2) @ past).squeeze(-2))

    def step(self, tokens: Tensor, present: Tensor, context: Tensor | None, state: State) -> tuple[Tensor, State]:
        now = self.inner.fuse(tokens, present, None)
        past = torch.cat([state["past"][:, 1:], now.unsqueeze(1)], 1)
        filled = torch.cat([state["filled"][:, 1:], torch.ones_like(state["filled"][:, :1])], 1)
        return self._read(now, past, filled), {"past": past, "filled": filled}

    def forward(self, tokens: Tensor, present: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        now = self.inner.fuse(tokens, present, None)
        length, k = now.shape[1], self.memory
        whole = torch.cat([state["past"], now], 1)
        filled = torch.cat([state["filled"], torch.ones_like(now[..., 0])], 1)
        windows = whole.unfold(1, k, 1)[:, 1:].transpose(-1, -2)  # [B, T, K, D], the last of each is now
        masks = filled.unfold(1, k, 1)[:, 1:]
        if reset is not None:
            # the number of resets before each tick; ticks with another number are masked
            lives = torch.cat([torch.zeros_like(state["filled"]), reset.cumsum(1).to(now.dtype)], 1)
            same = lives.unfold(1, k, 1)[:, 1:] == lives[:, k:].unsqueeze(-1)
            masks = masks * same.to(now.dtype)
        read = self._read(now, windows, masks)
        last = windows[:, length - 1] * masks[:, length - 1].unsqueeze(-1)
        return read, {"past": last, "filled": masks[:, length - 1]}


def create(kind: str, count: int, width: int, context: int, *, heads: int = 4, memory: int = 16) -> Fusion:
    """Create a fusion by its name in a recipe; `context` is the width of the cell's output."""
    if not count:
        return Nothing(0, width)
    if kind == "attention":
        return Attention(count, width)
    if kind == "attention_state":
        return Attention(count, width, conditioned=True, context=context)
    if kind == "cross":
        return Cross(count, width, heads)
    if kind == "memory":
        return Memory(count, width, memory)
    simple: dict[str, type[Fusion]] = {"add": Add, "concat": Concat, "gated": Gated}
    if kind not in simple:
        plugin = plugins.find("fusions", kind)
        if plugin is not None:
            made: Fusion = plugins.call(plugin, count, width)
            return made
        known = ", ".join([*FUSIONS, *plugins.names("fusions")])
        raise ConfigError(f"there is no fusion {kind!r}; use one of {known}")
    return simple[kind](count, width)
