"""Questions: what a client asks the engines before it begins: which model the cluster serves, over how many partitions.

Any engine answers. Knows nothing about sessions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from stream_mmrnn.serve.cluster.nats import REQUEST_S, Link
from stream_mmrnn.serve.cluster.subjects import CLIENT


class Reply(msgspec.Struct, frozen=True):
    """The reply to a question, which has no content."""

    welcome: bytes
    """`serve.protocol`."""
    partitions: int
    engines: int
    """How many there are just now."""


class Questions:
    """Answers questions, as one of the engines."""

    def __init__(self, link: Link, reply: Callable[[], Reply], counts: Counter[str]) -> None:
        """`garbage` is counted."""
        self._link, self._reply, self._counts = link, reply, counts

    async def begin(self) -> None:
        """Take questions from now on. Raises one of FAILURES."""
        await self._link.nats.subscribe(self._link.names.all_questions, "engines", cb=self._receive)

    async def _receive(self, message: Any) -> None:
        client = self._link.names.asker(message.subject)
        if message.data or not message.reply or not CLIENT.fullmatch(client):
            self._counts["garbage"] += 1
            return
        await self._link.nats.publish(message.reply, msgspec.msgpack.encode(self._reply()))


async def ask(link: Link, client: str) -> Reply:
    """What an engine says of the cluster. Raises one of FAILURES."""
    message = await link.nats.request(link.names.questions_of(client), b"", timeout=REQUEST_S)
    try:
        return msgspec.msgpack.decode(message.data, type=Reply)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise TimeoutError("no engine replied") from None  # the server says so, by an empty message
