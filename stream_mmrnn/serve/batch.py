"""Batch: one step of what waits. Large blocks are stepped as they came, all else together; each gets its reply.

Knows nothing about peers' rights and budgets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from stream_mmrnn.core.block import Block, Flags, Integers
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.block_codec import joined, row_bytes, with_handles
from stream_mmrnn.serve.groups import TickQueues, WaitingBlock, WaitingTick
from stream_mmrnn.serve.push_handler import PushHandler
from stream_mmrnn.serve.replies import pred_of, preds_of, preds_to
from stream_mmrnn.serve.sessions import Sessions, Stepped
from stream_mmrnn.serve.step_reader import StepReader
from stream_mmrnn.serve.turns import Peer

_ALONE = 32
"""A block of so many ticks is stepped without others: joining them would cost more than it saves."""
_TOGETHER = 256
"""Single ticks that are stepped at once; the first ones are answered while the others are stepped."""


class StepDone(NamedTuple):
    step_ns: int
    waited_ns: list[int]
    """Of each single tick and each block."""


class _Part(msgspec.Struct, eq=False):
    """Ticks that came together."""

    block: Block
    """With the engine's handles."""
    ticks: Sequence[WaitingTick] = ()
    """Either these, one for each row,"""
    waiting: WaitingBlock | None = None
    """or this,"""
    rows: Integers = msgspec.field(default_factory=lambda: np.zeros(0, np.int64))
    """and the row of the group for each row."""


class Batch:
    """At most one tick of each session."""

    def __init__(
        self,
        sessions: Sessions,
        reader: StepReader,
        pushes: PushHandler,
        queues: TickQueues,
        send: Callable[[Peer, protocol.Reply], None],
        counts: Counter[str],
    ) -> None:
        self._sessions, self._reader, self._pushes, self._send = sessions, reader, pushes, send
        self._queues, self._counts = queues, counts
        self.count = 0
        """Ticks that were stepped."""
        self.lost: list[str] = []
        """Sessions whose state died with a shard."""

    def step(self, now_ns: int) -> Iterator[StepDone]:
        """Step what is first in each queue, in several runs; each is over, and its replies sent, when it is yielded."""
        ticks, blocks = self._queues.take()
        if len(ticks) == 1 and not blocks:
            yield self._step_alone(ticks[0], now_ns)
            return
        parts: list[_Part] = []
        for waiting in blocks:
            part = self._part_of(waiting)
            if len(part.block) >= _ALONE:
                yield self._run([part], now_ns)
            else:
                parts.append(part)
        for at in range(0, len(ticks), _TOGETHER):
            some = ticks[at : at + _TOGETHER]
            handles = np.array([of.served.handle for of in some], np.int64)
            parts.append(_Part(self._reader.block([of.step for of in some], handles), some))
            if at + _TOGETHER < len(ticks):
                yield self._run(parts, now_ns)
                parts = []
        if parts:
            yield self._run(parts, now_ns)

    def _step_alone(self, of: WaitingTick, now_ns: int) -> StepDone:
        """One tick, without columns."""
        tick = self._reader.tick(of.step, of.received_ns)
        if tick is None:
            self._sessions.counts["bad_ticks"] += 1
            one = np.zeros(1, np.int64)
            self._refuse_tick(of, self._reader.why(self._reader.block([of.step], one), 0))
            return StepDone(0, [])
        prediction, late, lost = self._sessions.step_one(tick, of.served.handle, now_ns=now_ns)
        self.lost += lost
        if prediction is None:
            if late:
                self._skip_tick(of)
            return StepDone(0, [])
        self.count += 1
        pred = pred_of(of, prediction)
        if of.push is None:
            self._send(of.peer, pred)
        else:
            self._pushes.stepped(of.push, of.served.name, pred)
        return StepDone(pred.step_ns, [pred.waited_ns])

    def _part_of(self, waiting: WaitingBlock) -> _Part:
        """The ticks of a block whose sessions are still open; the others are refused with it."""
        rows = waiting.block.handles
        handles = waiting.group.handles[rows]
        here = handles >= 0
        if here.all():
            return _Part(with_handles(waiting.block, handles), waiting=waiting, rows=rows)
        for name, mine in self._by_reason(waiting, rows[~here]).items():
            waiting.refused.append(protocol.RowsRefused(*name, row_bytes(np.array(mine, np.int64))))
        self._counts["refused"] += int(np.count_nonzero(~here))
        waiting.whole = False
        left = waiting.block.take(here)
        return _Part(with_handles(left, handles[here]), waiting=waiting, rows=rows[here])

    def _by_reason(self, waiting: WaitingBlock, rows: Integers) -> dict[tuple[protocol.ErrorName, str], list[int]]:
        """Why there is no open session of these rows."""
        found: dict[tuple[protocol.ErrorName, str], list[int]] = {}
        for row in rows.tolist():
            kept = self._sessions.is_kept(waiting.group.names[row], waiting.received_ns)
            reason: tuple[protocol.ErrorName, str] = (
                ("evicted", "the session is not open here, but its state is kept; open it with its resume token")
                if kept
                else ("unknown", "the session is not open in this group; open it first")
            )
            found.setdefault(reason, []).append(row)
        return found

    def _run(self, parts: Sequence[_Part], now_ns: int) -> StepDone:
        block = joined([part.block for part in parts])
        if not len(block):
            stepped = Stepped(None, (none := np.zeros(0, np.bool_)), none)
        else:
            stepped = self._sessions.step_block(block, now_ns=now_ns)
        self.lost += stepped.lost
        done = stepped.predictions
        count = len(done) if done is not None else 0
        self.count += count
        start_ns = done.step_start_ns if done is not None else now_ns
        received: list[int] = []
        at = first = 0
        for part in parts:
            to = at + len(part.block)
            was, late = stepped.stepped[at:to], stepped.late[at:to]
            if part.waiting is not None:
                received.append(part.waiting.received_ns)
                self._reply_to_block(part, was, late, stepped, first)
            else:
                received += [of.received_ns for of in part.ticks]
                self._reply_to_ticks(part, was, late, stepped, first)
            at = to
            first += int(np.count_nonzero(was))
        return StepDone(
            done.step_end_ns - start_ns if done is not None else 0,
            [max(start_ns - at_ns, 0) for at_ns in received] if done is not None else [],
        )

    def _reply_to_block(self, part: _Part, was: Flags, late: Flags, stepped: Stepped, first: int) -> None:
        waiting = part.waiting
        assert waiting is not None
        following = np.zeros(0, np.int64)
        if not was.all():
            following = self._sessions.next_indices(part.block.handles[late])
            self._counts["skipped"] += len(following)
            lost = set(stepped.lost)
            for row in np.flatnonzero(~was & ~late).tolist():
                at = part.rows[row : row + 1]
                self._counts["refused"] += 1
                if waiting.group.names[int(at[0])] in lost:
                    waiting.refused.append(protocol.RowsRefused("evicted", "its engine's process died", row_bytes(at)))
                else:
                    why = self._reader.why(part.block, row)
                    waiting.refused.append(protocol.RowsRefused("bad_tick", why, row_bytes(at)))
        group = waiting.group
        self._send(
            group.peer,
            preds_to(waiting, part.rows, was, late, following, waiting.refused, stepped.predictions, first),
        )
        self._queues.forget_empty(group)

    def _reply_to_ticks(self, part: _Part, was: Flags, late: Flags, stepped: Stepped, first: int) -> None:
        whole = bool(was.all())
        done = stepped.predictions
        ticks = part.ticks if whole else [of for of, here in zip(part.ticks, was.tolist(), strict=True) if here]
        if done is not None and ticks:
            block = part.block if whole else part.block.take(was)
            for of, pred in zip(ticks, preds_of(ticks, block, done, first), strict=True):
                if of.push is None:
                    self._send(of.peer, pred)
                else:
                    self._pushes.stepped(of.push, of.served.name, pred)
        if whole:
            return
        lost = set(stepped.lost)
        for row in np.flatnonzero(~was).tolist():
            of = part.ticks[row]
            if late[row]:
                self._skip_tick(of)
            elif of.step.session not in lost:
                self._refuse_tick(of, self._reader.why(part.block, row))

    def _skip_tick(self, of: WaitingTick) -> None:
        """The session had the tick already."""
        self._counts["skipped"] += 1
        session = of.step.session
        if of.push is not None:
            self._pushes.stepped(of.push, session)
        else:
            following = self._sessions.next_index(session)
            self._send(of.peer, protocol.Skipped(session=session, tick=of.step.tick, next=following))

    def _refuse_tick(self, of: WaitingTick, reason: str) -> None:
        session, tick = of.step.session, of.step.tick
        why = f"tick {tick} of session {session!r}: {reason}"
        if of.push is not None:
            self._pushes.stepped(of.push, session, error=why)
        else:
            self._counts["refused"] += 1
            self._send(of.peer, protocol.Refused(error="bad_tick", why=why, session=session, tick=tick))
