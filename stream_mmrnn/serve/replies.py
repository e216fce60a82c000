"""Replies to ticks: a `pred` to each single one, one `preds` to a block; and the names of errors.

Knows nothing about queues and engines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stream_mmrnn.core.block import Block, BlockPredictions, Flags, Integers
from stream_mmrnn.core.errors import BadTick, Busy, DuplicateSession, Evicted, StreamError, UnknownSession
from stream_mmrnn.core.types import Prediction
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.block_codec import column, row_bytes
from stream_mmrnn.serve.groups import WaitingBlock, WaitingTick

_ERRORS: tuple[tuple[type[StreamError], protocol.ErrorName], ...] = (
    (UnknownSession, "unknown"),
    (DuplicateSession, "duplicate"),
    (Evicted, "evicted"),
    (BadTick, "bad_tick"),
)


def error_name(error: StreamError) -> protocol.ErrorName:
    return next((name for kind, name in _ERRORS if isinstance(error, kind)), "failed")


def preds_of(waiting: Sequence[WaitingTick], block: Block, done: BlockPredictions, first: int) -> list[protocol.Pred]:
    """The predictions of `waiting`, whose ticks are `block`, and rows of `done` from `first` on."""
    count = len(waiting)
    heads = []
    for values in done.heads.values():
        raw, width = values[first : first + count].astype("<f4", copy=False).tobytes(), 4 * values.shape[1]
        heads.append([raw[at : at + width] for at in range(0, width * count, width)])
    start_ns, step_ns, model = done.step_start_ns, done.step_end_ns - done.step_start_ns, done.model
    present, age_ns = block.present.tolist(), block.age_ns.tolist()
    return [
        protocol.Pred(
            session=of.step.session,
            tick=of.step.tick,
            event_ns=of.step.event_ns,
            heads=raws,
            present=tuple(here),
            age_ns=tuple(ages),
            waited_ns=start_ns - of.received_ns if start_ns > of.received_ns else 0,
            step_ns=step_ns,
            model=model,
        )
        for of, raws, here, ages in zip(waiting, zip(*heads, strict=True), present, age_ns, strict=True)
    ]


def pred_of(of: WaitingTick, prediction: Prediction) -> protocol.Pred:
    """The prediction of a single tick."""
    tick, start_ns = prediction.tick, prediction.step_start_ns
    return protocol.Pred(
        session=tick.session,
        tick=tick.index,
        event_ns=tick.event_ns,
        heads=tuple([values.astype("<f4", copy=False).tobytes() for values in prediction.heads.values()]),
        present=tuple(tick.present.values()),
        age_ns=tuple(tick.age_ns.values()),
        waited_ns=start_ns - of.received_ns if start_ns > of.received_ns else 0,
        step_ns=prediction.step_end_ns - start_ns,
        model=prediction.model,
    )


def preds_to(
    waiting: WaitingBlock,
    rows: Integers,
    stepped: Flags,
    late: Flags,
    following: Integers,
    refused: Sequence[protocol.RowsRefused],
    done: BlockPredictions | None,
    first: int,
) -> protocol.Preds:
    """The answer to a block of which `rows` [N] were stepped or were `late`; `following` [late]: their next indices."""
    count = int(np.count_nonzero(stepped))
    heads: tuple[bytes, ...] = ()
    waited_ns = step_ns = 0
    if done is not None and count:
        heads = tuple(v[first : first + count].astype("<f4", copy=False).tobytes() for v in done.heads.values())
        waited_ns, step_ns = max(done.step_start_ns - waiting.received_ns, 0), done.step_end_ns - done.step_start_ns
    whole = waiting.whole and count == len(waiting.block)
    some_late = bool(late.any())
    return protocol.Preds(
        group=waiting.group.number,
        block=waiting.number,
        heads=heads,
        waited_ns=waited_ns,
        step_ns=step_ns,
        model=done.model if done is not None else "",
        rows=b"" if whole else row_bytes(rows[stepped]),
        skipped=row_bytes(rows[late]) if some_late else b"",
        next=column(following) if some_late else b"",
        refused=tuple(refused),
    )


def refusal(steps: protocol.Steps, error: protocol.ErrorName, why: str) -> protocol.Preds:
    """The answer to a block of which no row can be stepped."""
    return protocol.Preds(
        group=steps.group,
        block=steps.block,
        heads=(),
        waited_ns=0,
        step_ns=0,
        model="",
        refused=(protocol.RowsRefused(error, why),),
    )


def grouped(request: protocol.OpenGroup, found: Sequence[protocol.Ready | StreamError]) -> protocol.Grouped:
    """The answer to a `group`, of which `found` came."""
    refused = [
        protocol.RowRefused(
            row,
            "busy" if isinstance(of, Busy) else error_name(of),
            str(of),
            of.retry_after_s if isinstance(of, Busy) else 0.0,
        )
        for row, of in enumerate(found, request.first)
        if isinstance(of, StreamError)
    ]
    ready = [of if isinstance(of, protocol.Ready) else None for of in found]
    return protocol.Grouped(
        group=request.group,
        first=request.first,
        tokens=tuple(of.token if of is not None else "" for of in ready),
        next=column([of.next if of is not None else 0 for of in ready]),
        resumed=bytes(of is not None and of.resumed for of in ready),
        refused=tuple(refused),
    )
