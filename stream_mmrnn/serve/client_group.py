"""Group and AsyncGroup: many sessions of a client that are stepped by blocks, in one call and as arrays.

Knows nothing about connections: it is given one of `client` or `async_client`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from stream_mmrnn.core.block import Flags, Integers
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import SessionError
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.client_base import AsyncClosing, Closing, Figures
from stream_mmrnn.serve.client_groups import ClientGroup, GroupAnswer
from stream_mmrnn.serve.client_requests import Asked, SessionRequest
from stream_mmrnn.serve.client_state import ClientState, group_key

if TYPE_CHECKING:
    from stream_mmrnn.serve.async_client import AsyncClient
    from stream_mmrnn.serve.client import Client

TIMEOUT_S = 5.0
_NOT_OPENED = "{} of {} sessions were not opened; the first one: {}"


class GroupProperties(Figures):
    """What both kinds of group know without a request. Arrays have a row for each session, in the order of `names`."""

    def __init__(self, client_state: ClientState, group: ClientGroup) -> None:
        super().__init__(group)
        self._client_state, self._group = client_state, group

    def __len__(self) -> int:
        return len(self._group.names)

    @property
    def names(self) -> list[str]:
        return list(self._group.names)

    @property
    def tokens(self) -> list[str]:
        """Secret: with them the sessions can be opened from another client, or later."""
        return [token or "" for token in self._group.tokens]

    @property
    def resumed(self) -> Flags:
        """[N] whether a session continues from a saved state."""
        return self._group.resumed.copy()

    @property
    def next_ticks(self) -> Integers:
        """[N] index of the next tick, where none is given."""
        return self._group.next_ticks.copy()

    @property
    def errors(self) -> dict[int, SessionError]:
        """By row, sessions that are over here, and why. The others go on."""
        return dict(self._group.errors)

    def send(
        self,
        features: Mapping[str, Any],
        *,
        rows: npt.ArrayLike | None = None,
        ticks: npt.ArrayLike | None = None,
        event_ns: npt.ArrayLike | None = None,
        present: Mapping[str, npt.ArrayLike] | None = None,
        age_ns: npt.ArrayLike | None = None,
    ) -> int:
        """Send one tick of each of N sessions and do not wait; returns the number of the block.

        `features`: float32 or float16 [N, size] by modality; one that is missing is absent. `rows` [N]: which sessions,
        none twice; all if not given. `ticks` [N]: their indices, the next ones if not given. `event_ns`: the ends of
        the ticks by your clock, [N] or one for all. `present` [N] by modality: which ticks have it; `features` then has
        the vectors of those only. `age_ns` [N, modalities], in the model's order: how old the newest samples are.

        Raises:
            BadTick: it does not fit the model; nothing was sent.
            Evicted: one of the sessions was taken over by another client, or cannot continue.

        """
        number = self._group.put(features, rows, ticks, event_ns, present, age_ns, now_ns())
        self._post()
        return number

    def _ask(self, what: str) -> list[Asked]:
        """Ask for every session that is not over here."""
        asked = self._group.ask(self._requests()[what])
        self._post()
        return asked

    def _all_replied(self, asked: list[Asked]) -> Callable[[], bool]:
        left = list(asked)

        def over() -> bool:
            while left and self._group.replied(left[-1]) is not None:
                left.pop()
            return not left

        return over

    def _replies(self, asked: list[Asked]) -> Integers:
        """[N] indices of the next ticks; raises the first error. After a `reset`, older blocks are forgotten."""
        following = self._group.next_ticks.copy()
        for of in asked:
            reply = self._group.replied(of)
            if isinstance(reply, SessionError):
                raise reply
            if isinstance(reply, protocol.Flushed):
                following[self._group.row[reply.session]] = reply.next
        if asked and isinstance(asked[0].request, protocol.Reset):
            self._group.forget_before(asked[0].before)
        return following

    def _requests(self) -> dict[str, Callable[[int], SessionRequest]]:
        names, tokens = self._group.names, self._group.tokens
        return {
            "flush": lambda row: protocol.Flush(session=names[row]),
            "reset": lambda row: protocol.Reset(session=names[row]),
            "close": lambda row: protocol.Close(session=names[row], token=tokens[row]),
        }

    def _late(self, what: str) -> str:
        return f"the {len(self)} sessions of a group got no {what}"

    def leave(self) -> None:
        """Stop using the sessions without ending them: their tokens open them again."""
        self._client_state.leave_group(self._group)


def opened(client_state: ClientState, group: ClientGroup) -> None:
    """Check the replies to a `group`; where one is a refusal, closes what is new and raises it."""
    if not group.errors:
        return
    row, error = next(iter(sorted(group.errors.items())))
    client_state.close_new(group, [row for row in range(len(group.names)) if row not in group.errors])
    client_state.leave_group(group)
    why = _NOT_OPENED.format(len(group.errors), len(group.names), f"{group.names[row]!r}, {error}")
    raise error if len(group.names) == 1 else _like(error, why)


def _like(error: SessionError, why: str) -> SessionError:
    again: SessionError = type(error)(why)
    if hasattr(error, "retry_after_s"):
        again.retry_after_s = error.retry_after_s  # type: ignore[attr-defined]
    return again


class Group(GroupProperties, Closing):
    """Sessions of a `Client`; as a context manager they are closed at the end."""

    def __init__(self, client: Client, group: ClientGroup) -> None:
        super().__init__(client.client_state, group)
        self._client = client

    def _post(self) -> None:
        self._client.post()

    def _wait(self, over: Callable[[], bool], timeout_s: float, late: str) -> None:
        self._client.wait(over, now_ns() + round(timeout_s * 1e9), late)

    def _all(self, what: str, timeout_s: float) -> Integers:
        asked = self._ask(what)
        try:
            self._wait(self._all_replied(asked), timeout_s, self._late("reply"))
        finally:
            self._group.take_back(asked)
            self._post()
        return self._replies(asked)

    def step(self, features: Mapping[str, Any], *, timeout_s: float = TIMEOUT_S, **more: Any) -> GroupAnswer:
        """Send one tick of each of N sessions and wait for the answer, as `send` and `receive`; takes what `send`
        takes. Answers to earlier blocks are skipped.
        """
        number = self.send(features, **more)
        group = self._group
        self._wait(lambda: number not in group.unanswered, timeout_s, self._late("answer"))
        return group.answer_of(number)

    def receive(self, timeout_s: float = TIMEOUT_S) -> GroupAnswer | None:
        """The next answer; None where every block has one. Raises TimedOut."""
        group = self._group
        self._wait(lambda: bool(group.answers) or not group.unanswered, timeout_s, self._late("answer"))
        return group.answers.popleft() if group.answers else None

    def answers(self, timeout_s: float = TIMEOUT_S) -> Iterator[GroupAnswer]:
        """Answers as they arrive, until every block has one."""
        while (answer := self.receive(timeout_s)) is not None:
            yield answer

    def flush(self, timeout_s: float = TIMEOUT_S) -> Integers:
        """Wait until all that was sent is answered and the states are on disk; [N] indices of the next ticks."""
        return self._all("flush", timeout_s)

    def reset(self, timeout_s: float = TIMEOUT_S) -> None:
        """Start the states anew; tick indices continue."""
        self._all("reset", timeout_s)

    def close(self, timeout_s: float = TIMEOUT_S) -> None:
        """End the sessions; the server deletes their states."""
        try:
            self._all("close", timeout_s)
        finally:
            self.leave()


class AsyncGroup(GroupProperties, AsyncClosing):
    """Sessions of an `AsyncClient`; as an async context manager they are closed at the end."""

    def __init__(self, client: AsyncClient, group: ClientGroup) -> None:
        super().__init__(client.client_state, group)
        self._client = client

    def _post(self) -> None:
        self._client.post()

    async def _wait(self, over: Callable[[], bool], timeout_s: float, late: str) -> None:
        await self._client.wait(group_key(self._group.number), over, timeout_s, late)

    async def _all(self, what: str, timeout_s: float) -> Integers:
        asked = self._ask(what)
        try:
            await self._wait(self._all_replied(asked), timeout_s, self._late("reply"))
        finally:
            self._group.take_back(asked)
            self._client.post_last()
        return self._replies(asked)

    async def step(self, features: Mapping[str, Any], *, timeout_s: float = TIMEOUT_S, **more: Any) -> GroupAnswer:
        """As `Group.step`."""
        number = self.send(features, **more)
        group = self._group
        await self._wait(lambda: number not in group.unanswered, timeout_s, self._late("answer"))
        return group.answer_of(number)

    async def receive(self, timeout_s: float = TIMEOUT_S) -> GroupAnswer | None:
        """As `Group.receive`."""
        group = self._group
        await self._wait(lambda: bool(group.answers) or not group.unanswered, timeout_s, self._late("answer"))
        return group.answers.popleft() if group.answers else None

    async def answers(self, timeout_s: float = TIMEOUT_S) -> AsyncIterator[GroupAnswer]:
        """As `Group.answers`."""
        while (answer := await self.receive(timeout_s)) is not None:
            yield answer

    async def flush(self, timeout_s: float = TIMEOUT_S) -> Integers:
        """As `Group.flush`."""
        return await self._all("flush", timeout_s)

    async def reset(self, timeout_s: float = TIMEOUT_S) -> None:
        """As `Group.reset`."""
        await self._all("reset", timeout_s)

    async def close(self, timeout_s: float = TIMEOUT_S) -> None:
        """As `Group.close`."""
        try:
            await self._all("close", timeout_s)
        finally:
            self.leave()
