"""The recurrence h_t = a_t * h_{t-1} + b_t over a whole sequence, forward and backward, without a call for each step.

The sequence is cut into blocks, and all blocks move together: once from zero, to learn what each does to the state that
enters it; then the states at the borders are carried from block to block; then once more from those. That is two passes
over the data with three times block + blocks calls instead of one call a step, and the second pass does the arithmetic
of the plain loop. Nothing is divided and no logarithm is taken, so any coefficient is allowed: 0, negative, above 1.
The gradient of the recurrence is the same recurrence backwards in time, so it runs through the same code.

`gated_scan` also makes a and b, from what a layer's one matrix product left. On a CPU such elementwise work is bound by
memory, so it goes through the sequence in pieces that stay in the cache, and the gates are kept where the
pre-activations were, instead of the dozen arrays that autograd would keep.
Knows nothing about cells or what a gate computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Tensors: TypeAlias = Sequence[Tensor]

PIECE = 1 << 17
"""Numbers of a or b in a piece: a dozen such arrays of float32 fit the second-level cache."""


class Gates(Protocol):
    """Elementwise work that makes a and b of pre-activations, and its gradient, both by hand."""

    @staticmethod
    def fill(pre: Tensors, parameters: Tensors, a: Tensor, b: Tensor) -> None:
        """Write a and b [..., H], made of the columns of pre-activations [..., H] and the parameters [H].

        May overwrite the columns with what `gradient` wants to find there.
        """

    @staticmethod
    def gradient(kept: Tensors, parameters: Tensors, before: Tensor, d: Tensor, out: Tensors) -> Tensors:
        """Write the columns' gradients into `out`, return the parameters'.

        `d` is the gradient of h_t, so that of b; `before` is h_{t-1}, so that of a is d * before.
        """


def linear_scan(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """All h_t = a_t * h_{t-1} + b_t of `a`, `b` [B, T, H], from h_{-1} = `initial` [B, H].

    Runs in the widest of the three types: a state in float32 keeps it so under mixed precision.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), initial.dtype)
    return cast(Tensor, _LinearScan.apply(a.to(dtype), b.to(dtype), initial.to(dtype)))


def gated_scan(
    gates: Gates,
    pre: Tensor,
    initial: Tensor,
    parameters: tuple[Tensor, ...] = (),
    reset: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """The scan of what `gates` makes of `pre` [B, T, columns * H]; where `reset` [B, T], h_{t-1} is `start` [H] or 0.

    `pre` is used up: hand over the output of a linear layer that nothing else reads.
    Gates and recurrence run in the type of `initial`: float32 under mixed precision, or an a near 1 would become 1.
    """
    out = _GatedScan.apply(gates, pre.to(initial.dtype), initial, reset, start, *parameters)
    return cast(Tensor, out)


def linear_loop(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """The same by its definition, one step after the other: what tests and benchmarks compare with."""
    h, out = initial, []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_t * h + b_t
        out.append(h)
    return torch.stack(out, 1)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
        out = torch.empty_like(b, memory_format=torch.contiguous_format)
        _scan(a, b, initial, out)
        ctx.save_for_backward(a, initial, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, initial, out = ctx.saved_tensors
        d = _adjoint(a, grad)
        return d * _before(out, initial, slice(0, out.shape[1])), d, d[:, 0] * a[:, 0]


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gates: Gates,
        pre: Tensor,
        initial: Tensor,
        reset: Tensor | None,
        start: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        width = initial.shape[-1]
        a, out = initial.new_empty((*pre.shape[:2], width)), initial.new_empty((*pre.shape[:2], width))
        for piece in _pieces(out):
            gates.fill(pre[:, piece].split(width, -1), parameters, a[:, piece], out[:, piece])
        begun = None
        if reset is not None:  # a restart is a step that forgets everything and finds `start` in its input
            anew = reset.unsqueeze(-1)
            if start is not None:
                begun = a * anew
                out.addcmul_(begun, start)
            a.masked_fill_(anew, 0.0)
        _scan(a, out, initial, out)  # in place: every b_t is read before h_t is written over it
        ctx.gates = gates
        ctx.save_for_backward(pre, initial, reset, start, begun, a, out, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, initial, reset, start, begun, a, out, *parameters = ctx.saved_tensors
        d = _adjoint(a, grad)
        grad_pre = torch.empty_like(pre)
        totals = [torch.zeros_like(x) for x in parameters]
        width = out.shape[-1]
        for piece in _pieces(out):
            before, d_piece = _before(out, initial, piece), d[:, piece]
            if reset is not None:
                anew = reset[:, piece, None]
                before = before.masked_fill(anew, 0.0) if start is None else torch.where(anew, start, before)
            columns = pre[:, piece].split(width, -1)
            parts = ctx.gates.gradient(columns, parameters, before, d_piece, grad_pre[:, piece].split(width, -1))
            for total, part in zip(totals, parts, strict=True):
                total += part
        grad_start = None if begun is None else (d * begun).sum((0, 1))
        return None, grad_pre, d[:, 0] * a[:, 0], None, grad_start, *totals


def _pieces(out: Tensor) -> Iterator[slice]:
    """Stretches of time that fit the cache; all of it where the memory is not a CPU's."""
    batch, steps, width = out.shape
    size = max(1, PIECE // max(1, batch * width)) if out.device.type == "cpu" else steps
    return (slice(i, min(i + size, steps)) for i in range(0, steps, size))


def _before(out: Tensor, initial: Tensor, piece: slice) -> Tensor:
    """h_{t-1} for the steps of the piece."""
    if piece.start:
        return out[:, piece.start - 1 : piece.stop - 1]
    return torch.cat([initial.unsqueeze(1), out[:, : piece.stop - 1]], 1)


def _adjoint(a: Tensor, grad: Tensor) -> Tensor:
    """d_t = grad_t + a_{t+1} * d_{t+1}: what the loss feels of h_t, directly and through all that follows."""
    d = torch.empty_like(grad, memory_format=torch.contiguous_format)
    d[:, -1] = grad[:, -1]
    _scan(a[:, 1:], grad[:, :-1], d[:, -1], d[:, :-1], reverse=True)
    return d


def _scan(a: Tensor, b: Tensor, h: Tensor, out: Tensor, reverse: bool = False) -> None:
    """Write the recurrence from `h` into `out`, which may be `b`; from the last step to the first where `reverse`."""
    steps = a.shape[1]
    size = max(4, math.isqrt(steps))  # as many steps in a block as blocks: close to the fewest calls
    blocks = steps // size
    if blocks < 2:
        _loop(a, b, h, out, reverse)
        return
    rest = steps - blocks * size
    # what is left over comes last in the order of the scan
    body, tail = (slice(rest, None), slice(rest)) if reverse else (slice(blocks * size), slice(blocks * size, None))
    a_steps, b_steps, out_steps = (_in_order(x[:, body].unflatten(1, (blocks, size)), 2, reverse) for x in (a, b, out))
    # what a block does to the state that enters it: h -> product * h + end
    end = b_steps[0].clone(memory_format=torch.contiguous_format)
    product = a_steps[0].clone(memory_format=torch.contiguous_format)
    for a_t, b_t in zip(a_steps[1:], b_steps[1:], strict=True):
        torch.addcmul(b_t, a_t, end, out=end)
        product.mul_(a_t)
    entering = torch.empty_like(end)
    for j in range(blocks - 1, -1, -1) if reverse else range(blocks):
        entering[:, j] = h
        h = torch.addcmul(end[:, j], product[:, j], h)
    h = entering
    for a_t, b_t, out_t in zip(a_steps, b_steps, out_steps, strict=True):
        h = torch.addcmul(b_t, a_t, h, out=out_t)
    if rest:
        last = h[:, 0] if reverse else h[:, -1]
        _loop(a[:, tail], b[:, tail], last, out[:, tail], reverse)


def _loop(a: Tensor, b: Tensor, h: Tensor, out: Tensor, reverse: bool) -> None:
    for a_t, b_t, out_t in zip(*(_in_order(x, 1, reverse) for x in (a, b, out)), strict=True):
        h = torch.addcmul(b_t, a_t, h, out=out_t)


def _in_order(x: Tensor, axis: int, reverse: bool) -> tuple[Tensor, ...]:
    steps = x.unbind(axis)
    return steps[::-1] if reverse else steps
