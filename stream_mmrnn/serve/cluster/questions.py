"""Questions: what a client asks the engines, because it cannot read the cluster's streams and buckets itself.

Which model the cluster serves, and which stored answers the client has missed. Any engine answers; one that does not is
asked again, or another one is. Knows nothing about sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from itertools import count
from typing import Any, TypeAlias

import msgspec

from stream_mmrnn.serve.cluster.nats import FAILURES, REQUEST_S, Link
from stream_mmrnn.serve.cluster.subjects import CLIENT

_AT_ONCE = 4
"""Clients whose missed answers are read at the same time; others ask again."""
Start: TypeAlias = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Question(msgspec.Struct, frozen=True):
    """A question of a client."""

    after: int = -1
    """The newest answer that it has: which ones came after that? -1: which model is served?"""


class Reply(msgspec.Struct, frozen=True):
    """A reply to a question, or one of several."""

    nth: int
    """From 0: a gap means a lost reply."""
    number: int
    """Of a stored answer: its sequence number. Of the model and of the last reply: the newest one in the log."""
    content: bytes = b""
    """The stored answer, or the model."""
    over: bool = False
    """It is the last one, and holds no answer."""


_encode = msgspec.msgpack.Encoder().encode
_read_question = msgspec.msgpack.Decoder(Question).decode
_read_reply = msgspec.msgpack.Decoder(Reply).decode


class Questions:
    """Answers questions, as one of the engines."""

    def __init__(self, link: Link, welcome: bytes, start: Start, counts: Counter[str]) -> None:
        """`start` runs a task; `garbage` is counted."""
        self._link, self._welcome, self._start, self._counts = link, welcome, start, counts
        self._reading = 0

    async def begin(self) -> None:
        """Take questions from now on. Raises one of FAILURES."""
        await self._link.nats.subscribe(self._link.names.all_questions, "engines", cb=self._receive)

    async def _receive(self, message: Any) -> None:
        client = self._link.names.asker(message.subject)
        try:
            question = _read_question(message.data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            question = None
        if question is None or not message.reply or not CLIENT.fullmatch(client):
            self._counts["garbage"] += 1
        elif question.after < 0:
            self._start(self._say_model(message.reply))
        elif self._reading < _AT_ONCE:
            self._reading += 1
            self._start(self._say_missed(client, question.after, message.reply))

    async def _say_model(self, to: str) -> None:
        with contextlib.suppress(*FAILURES):
            newest = await self._link.newest()
            await self._link.nats.publish(to, _encode(Reply(0, newest, self._welcome, over=True)))

    async def _say_missed(self, client: str, after: int, to: str) -> None:
        try:
            nth, newest = 0, await self._link.newest()
            if after < newest:
                async for number, content in self._link.answers_between(client, after, newest):
                    await self._link.nats.publish(to, _encode(Reply(nth, number, content)))
                    nth += 1
            await self._link.nats.publish(to, _encode(Reply(nth, newest, over=True)))
        except FAILURES:
            pass  # the client asks again
        finally:
            self._reading -= 1


async def ask_model(link: Link, client: str) -> tuple[bytes, int]:
    """The `welcome` of the cluster, and the newest sequence number of the log of answers. Raises one of FAILURES."""
    reply = _read(await link.nats.request(link.names.questions_of(client), _encode(Question()), timeout=REQUEST_S))
    return reply.content, reply.number


async def ask_missed(link: Link, client: str, after: int) -> AsyncIterator[tuple[int, bytes]]:
    """Stored answers to a client that came after one, in order, each with its sequence number.

    Raises one of FAILURES where some did not arrive, or no engine replied.
    """
    arrived: asyncio.Queue[Any] = asyncio.Queue()
    inbox = link.nats.new_inbox()
    subscription = await link.nats.subscribe(inbox, cb=arrived.put, pending_msgs_limit=0, pending_bytes_limit=0)
    try:
        await link.nats.publish(link.names.questions_of(client), _encode(Question(after)), inbox)
        for nth in count():
            reply = _read(await asyncio.wait_for(arrived.get(), REQUEST_S))
            if reply.nth != nth:
                raise TimeoutError(f"answer {nth} of those missed did not arrive")
            if reply.over:
                return
            yield reply.number, reply.content
    finally:
        with contextlib.suppress(*FAILURES):
            await subscription.unsubscribe()


def _read(message: Any) -> Reply:
    try:
        return _read_reply(message.data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise TimeoutError("no engine replied") from None  # the server says so, by an empty message
