"""The recurrence h_t = a_t * h_{t-1} + b_t over a whole sequence, forward and backward, without one call per step.

The sequence is split into blocks, and all blocks advance together. The first pass starts each block from zero, and
gives the block's effect on its incoming state. Then the states at the block borders are computed one after another. The
second pass runs the blocks again from these states. This takes about three times block + blocks calls instead of one
call per step, and the second pass does the same arithmetic as a plain loop. There is no division and no logarithm, so
every coefficient is allowed: 0, negative, above 1. The gradient is the same recurrence backwards in time and uses the
same code.

`gated_scan` also computes a and b from the pre-activations of a layer. Such elementwise work is memory-bound on a CPU,
so it is done in pieces that fit the cache, and the gates overwrite the pre-activations; autograd would keep a dozen
arrays.
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
"""Elements of a or b per piece: a dozen such float32 arrays fit the L2 cache."""


class Gates(Protocol):
    """Computes a and b from pre-activations elementwise; the gradient is written by hand."""

    @staticmethod
    def fill(pre: Tensors, parameters: Tensors, a: Tensor, b: Tensor) -> None:
        """Write a and b [..., H], computed from the columns of pre-activations [..., H] and the parameters [H].

        May overwrite the columns with the values that `gradient` needs.
        """

    @staticmethod
    def gradient(kept: Tensors, parameters: Tensors, before: Tensor, d: Tensor, out: Tensors) -> Tensors:
        """Write the gradients of the columns into `out`; return those of the parameters.

        `d` is the gradient of h_t, and so of b; `before` is h_{t-1}, so the gradient of a is d * before.
        """


def linear_scan(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """All h_t = a_t * h_{t-1} + b_t of `a`, `b` [B, T, H], from h_{-1} = `initial` [B, H].

    Runs in the widest of the three types: a float32 state stays float32 under mixed precision.
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
    """The scan of the a and b that `gates` computes from `pre` [B, T, columns * H].

    Where `reset` [B, T] is true, h_{t-1} is `start` [H] or 0. `pre` is overwritten: nothing else may read it.
    Gates and recurrence use the type of `initial`: float32 under mixed precision, otherwise an a near 1 becomes 1.
    """
    out = _GatedScan.apply(gates, pre.to(initial.dtype), initial, reset, start, *parameters)
    return cast(Tensor, out)


def linear_loop(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """The same step by step, as it is defined: the reference for tests and benchmarks."""
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
        if reset is not None:  # a restart is a step with a = 0 and `start` in its input
            anew = reset.unsqueeze(-1)
            if start is not None:
                begun = a * anew
                out.addcmul_(begun, start)
            a.masked_fill_(anew, 0.0)
        _scan(a, out, initial, out)  # in place: every b_t is read before h_t overwrites it
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
    """Ranges of steps that fit the cache; one range for everything if the device is not a CPU."""
    batch, steps, width = out.shape
    size = max(1, PIECE // max(1, batch * width)) if out.device.type == "cpu" else steps
    return (slice(i, min(i + size, steps)) for i in range(0, steps, size))


def _before(out: Tensor, initial: Tensor, piece: slice) -> Tensor:
    """h_{t-1} for the steps of the piece."""
    if piece.start:
        return out[:, piece.start - 1 : piece.stop - 1]
    return torch.cat([initial.unsqueeze(1), out[:, : piece.stop - 1]], 1)


def _adjoint(a: Tensor, grad: Tensor) -> Tensor:
    """d_t = grad_t + a_{t+1} * d_{t+1}: the gradient of h_t, direct and through all later steps."""
    d = torch.empty_like(grad, memory_format=torch.contiguous_format)
    d[:, -1] = grad[:, -1]
    _scan(a[:, 1:], grad[:, :-1], d[:, -1], d[:, :-1], reverse=True)
    return d


def _scan(a: Tensor, b: Tensor, h: Tensor, out: Tensor, reverse: bool = False) -> None:
    """Write the recurrence from `h` into `out`, which may be `b`; with `reverse` from the last step to the first."""
    steps = a.shape[1]
    size = max(4, math.isqrt(steps))  # as many steps per block as blocks: close to the minimum of calls
    blocks = steps // size
    if blocks < 2:
        _loop(a, b, h, out, reverse)
        return
    rest = steps - blocks * size
    # the remainder comes last in the order of the scan
    body, tail = (slice(rest, None), slice(rest)) if reverse else (slice(blocks * size), slice(blocks * size, None))
    a_steps, b_steps, out_steps = (_in_order(x[:, body].unflatten(1, (blocks, size)), 2, reverse) for x in (a, b, out))
    # the effect of a block on its incoming state: h -> product * h + end
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
