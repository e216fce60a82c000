"""Outbox: writes answers and states of our partitions to NATS, in order, and again until they are stored.

The log has the answers of a session in order, also where writes failed. What is the last word on older ticks (the reply
to `open`) is not even sent before all earlier answers of its session are stored: the server may refuse one of two that
are under way. An answer is deduplicated by its name, so that a retry is stored once. A state is written after the
answers to the messages that it contains. Knows nothing about leases or who is alive.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable

import msgspec

from stream_mmrnn.serve.cluster.log_reader import LogReader
from stream_mmrnn.serve.cluster.nats import FAILURES, Link
from stream_mmrnn.serve.cluster.questions import Start
from stream_mmrnn.serve.cluster.receipts import WriteRefused
from stream_mmrnn.serve.cluster.replica import OutgoingAnswer, Replica, SavedState

RETRY_S = 1.0
"""After so long without a receipt an answer is written again."""


class _Unstored(msgspec.Struct):
    """An answer without a receipt."""

    answer: OutgoingAnswer
    receipt: asyncio.Future[bool] | None = None
    """None: it has not been sent, or is to be sent again."""
    sent_s: float = float("-inf")


class Partition:
    """A partition that this engine serves."""

    def __init__(self, number: int, epoch: int, fence: int) -> None:
        self.number, self.epoch, self.fence = number, epoch, fence
        self.reader: LogReader | None = None
        self.unstored: dict[str, dict[str, _Unstored]] = {}
        """Answers without a receipt, by session and name, in order."""
        self.held: set[str] = set()
        """Sessions whose answers are being sent, or with one whose write failed (it waits for `retry`): others wait."""
        self.revisions: dict[str, int] = {}
        self.saving: dict[str, asyncio.Task[None]] = {}
        """The task that writes the newest state of each session."""
        self.low = -1
        self.ours = True

    def next_unsent(self, session: str) -> _Unstored | None:
        """The oldest answer of a session that can be sent now."""
        for nth, unstored in enumerate(self.unstored.get(session, {}).values()):
            if unstored.receipt is None:
                return None if nth and unstored.answer.after_stored else unstored
        return None


class Outbox:
    """What the replica has produced, on its way to NATS."""

    def __init__(
        self,
        replica: Replica,
        link: Link,
        partitions: dict[int, Partition],
        counts: Counter[str],
        start: Start,
        lose: Callable[[int], None],
    ) -> None:
        """`partitions`: ours, kept up to date by the node. `start` runs a task; `lose` is called with a partition whose
        writes the server refuses.
        """
        self._replica, self._link, self._parts, self._counts = replica, link, partitions, counts
        self._start, self._lose = start, lose

    async def flush(self) -> None:
        """Send new answers and states of the replica."""
        answers, states = self._replica.pop()
        newest = {state.session: state for state in states}
        promised: dict[str, list[OutgoingAnswer]] = {}
        for answer in answers:
            if answer.after_saved and answer.session in newest:
                promised.setdefault(answer.session, []).append(answer)
            else:
                await self._send(answer)
        for state in states:
            part = self._parts.get(state.partition)
            if part is None:
                continue
            before = part.saving.get(state.session)
            after = promised.pop(state.session, []) if state is newest[state.session] else []
            part.saving[state.session] = self._start(self._save(part, state, before, after))

    async def _send(self, answer: OutgoingAnswer) -> None:
        part = self._parts.get(answer.partition)
        if part is None:
            return
        part.unstored.setdefault(answer.session, {})[answer.name] = _Unstored(answer)
        if answer.session not in part.held:
            await self._send_unsent(part, answer.session)

    async def _send_unsent(self, part: Partition, session: str) -> None:
        """Send all answers that have not been sent, or whose write failed, in order."""
        part.held.add(session)  # answers that come meanwhile are sent after these
        while (unsent := part.next_unsent(session)) is not None:
            if not await self._write(part, unsent):
                return
        part.held.discard(session)

    async def _write(self, part: Partition, unstored: _Unstored) -> bool:
        """Send an answer; returns whether that was possible."""
        answer = unstored.answer
        try:
            receipt = await self._link.send(
                answer.partition, answer.session, answer.client, answer.name, answer.content, part.fence
            )
        except FAILURES:
            return False
        unstored.receipt, unstored.sent_s = receipt, _now_s()
        receipt.add_done_callback(lambda done: self._stored(part, unstored, done))
        return True

    def _stored(self, part: Partition, unstored: _Unstored, done: asyncio.Future[bool]) -> None:
        session, name = unstored.answer.session, unstored.answer.name
        if done.cancelled() or (done.exception() and unstored.receipt is not done):
            return
        try:
            self._counts["stored" if done.result() else "repeated"] += 1
        except WriteRefused:
            self._counts["refused"] += 1
            if part.ours and self._parts.get(part.number) is part:
                self._lose(part.number)
            return
        except FAILURES:
            unstored.receipt = None
            part.held.add(session)
            return
        waiting = part.unstored.get(session, {})
        waiting.pop(name, None)
        if not waiting:
            part.unstored.pop(session, None)
        elif session not in part.held and part.next_unsent(session) is not None:
            self._start(self._send_unsent(part, session))  # it has waited for this one

    async def retry(self, part: Partition, after_s: float) -> None:
        """Send answers again whose write failed, or that have had no receipt for so long, with all later ones of their
        session, in order; the server deduplicates them by name.
        """
        at_s = _now_s()
        for session in list(part.unstored):
            waiting = part.unstored.get(session)
            if waiting and (session in part.held or at_s - next(iter(waiting.values())).sent_s >= after_s):
                for unstored in waiting.values():
                    unstored.receipt = None
                await self._send_unsent(part, session)

    async def _save(
        self, part: Partition, state: SavedState, before: asyncio.Task[None] | None, promised: list[OutgoingAnswer]
    ) -> None:
        """Write a state after the answers and the state before it; then send the answers that confirm it."""
        me = asyncio.current_task()
        while part.ours and self._owes(part, state):
            await asyncio.sleep(0.002)  # failed answers are sent again by `retry`
        if before is not None:
            await asyncio.wait((before,))
        while part.ours:
            try:
                revision = part.revisions.get(state.session, 0)
                part.revisions[state.session] = await self._link.save(part.number, state.session, state.raw, revision)
                break
            except WriteRefused:
                # a former owner was still writing. Its state is as valid as ours, and the low watermark may depend on
                # it: a newer one stays
                with contextlib.suppress(*FAILURES):
                    raw, part.revisions[state.session] = await self._link.saved(part.number, state.session)
                    if state.raw is not None and self._replica.seq_of(state.session, raw) >= state.seq:
                        break
            except FAILURES:
                await asyncio.sleep(0.05)
        if not part.ours:
            return
        if state.raw is None:
            with contextlib.suppress(*FAILURES):
                _, part.revisions[state.session] = await self._link.saved(part.number, state.session)
        self._counts["kept"] += 1
        self._replica.on_saved(state)
        for answer in promised:
            await self._send(answer)
        if part.saving.get(state.session) is me:
            del part.saving[state.session]

    def _owes(self, part: Partition, state: SavedState) -> bool:
        """Whether an answer to a message that is in this state has no receipt yet."""
        return any(int(name.partition(".")[0]) <= state.seq for name in part.unstored.get(state.session, ()))


def _now_s() -> float:
    return asyncio.get_running_loop().time()
