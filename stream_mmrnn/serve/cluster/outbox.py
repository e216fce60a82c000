"""Outbox: writes answers and states of our partitions to NATS, in order, and again until they are stored.

An answer is deduplicated by its name, so that a retry is stored once. A state is written after the answers to the
messages that it contains. Knows nothing about leases or who is alive.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from stream_mmrnn.serve.cluster.log_reader import LogReader
from stream_mmrnn.serve.cluster.nats import FAILURES, Link
from stream_mmrnn.serve.cluster.receipts import Refused
from stream_mmrnn.serve.cluster.replica import Outgoing, Replica, SavedState

RETRY_S = 1.0
"""After so long without a receipt an answer is written again."""
Start: TypeAlias = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Partition:
    """A partition that this engine serves."""

    def __init__(self, number: int, epoch: int, fence: int) -> None:
        self.number, self.epoch, self.fence = number, epoch, fence
        self.reader: LogReader | None = None
        self.unstored: OrderedDict[str, tuple[Outgoing, asyncio.Future[bool], float]] = OrderedDict()
        """Answers without a receipt, by session and name, in order, each with the time it was sent."""
        self.revisions: dict[str, int] = {}
        self.saving: dict[str, asyncio.Task[None]] = {}
        """The task that writes the newest state of each session."""
        self.low = -1
        self.ours = True


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
        promised: dict[str, list[Outgoing]] = {}
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

    async def _send(self, answer: Outgoing) -> None:
        part = self._parts.get(answer.partition)
        if part is None:
            return
        try:
            future = await self._link.send(
                answer.partition, answer.session, answer.client, answer.name, answer.content, part.fence
            )
        except FAILURES:
            future = asyncio.get_running_loop().create_future()  # `retry` sends it again
        key = f"{answer.session} {answer.name}"
        part.unstored[key] = answer, future, _now_s()
        future.add_done_callback(lambda done: self._stored(part, key, done))

    def _stored(self, part: Partition, key: str, done: asyncio.Future[bool]) -> None:
        if done.cancelled() or (done.exception() and part.unstored.get(key, (None, None))[1] is not done):
            return
        try:
            self._counts["stored" if done.result() else "repeated"] += 1
        except Refused:
            self._counts["refused"] += 1
            if part.ours and self._parts.get(part.number) is part:
                self._lose(part.number)
            return
        except FAILURES:
            return  # `retry` sends it again
        part.unstored.pop(key, None)

    async def retry(self, part: Partition, after_s: float) -> None:
        """Send answers again that have had no receipt for so long, in order; the server deduplicates them by name."""
        at_s = _now_s()
        for answer in [answer for answer, _, since_s in part.unstored.values() if at_s - since_s >= after_s]:
            await self._send(answer)

    async def _save(
        self, part: Partition, state: SavedState, before: asyncio.Task[None] | None, promised: list[Outgoing]
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
            except Refused:
                # a former owner was still writing. Its state is as valid as ours, and the low watermark may depend on
                # it: a newer one stays
                with contextlib.suppress(*FAILURES):
                    raw, part.revisions[state.session] = await self._link.saved(part.number, state.session)
                    if state.raw is not None and self._replica.seq_of(raw) >= state.seq:
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
        return any(
            answer.session == state.session and int(answer.name.partition(".")[0]) <= state.seq
            for answer, _, _ in part.unstored.values()
        )


def _now_s() -> float:
    return asyncio.get_running_loop().time()
