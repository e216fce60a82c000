"""Receipts: messages to a JetStream stream, and the server's confirmation that each is stored.

nats-py's own `publish_async` leaves a future pending for ever where the server refuses the message.
"""

from __future__ import annotations

import asyncio

import msgspec
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.errors import ConnectionReconnectingError
from nats.errors import Error as NatsError

WRONG_LAST_SEQUENCE = 10071
"""JetStream's error code where another writer was faster."""


class WriteRefused(Exception):  # noqa: N818 not a failure: another engine is the owner
    """The server refused a write because another one has written since."""


class _Error(msgspec.Struct):
    err_code: int = 0
    description: str = ""


class _Receipt(msgspec.Struct):
    """The server's reply to a message for a stream."""

    error: _Error | None = None
    duplicate: bool = False


def _time_out(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


class Receipts:
    """Publishes with a reply address for each message, and resolves a future when its receipt arrives."""

    def __init__(self, connection: Nats) -> None:
        self._nats = connection
        self._inbox = ""
        self._pending: dict[str, asyncio.Future[bool]] = {}
        """By reply address."""
        self._count = 0

    async def publish(self, subject: str, content: bytes, headers: dict[str, str]) -> asyncio.Future[bool]:
        """Send a message that a stream stores; the future is true where it was not stored before.

        Raises ConnectionReconnectingError while there is no connection: it would be sent at the return, before what was
        lost with the old one.
        """
        if not self._nats.is_connected:
            raise ConnectionReconnectingError
        if not self._inbox:
            self._inbox = self._nats.new_inbox()
            await self._nats.subscribe(f"{self._inbox}.*", cb=self._receive)
        self._count += 1
        address = f"{self._inbox}.{self._count}"
        future = self._pending[address] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: self._pending.pop(address, None))
        await self._nats.publish(subject, content, address, headers)
        return future

    async def wait(self, future: asyncio.Future[bool], timeout_s: float) -> bool:
        """Wait for a receipt; raises TimeoutError."""
        timer = asyncio.get_running_loop().call_later(timeout_s, _time_out, future)
        try:
            return await future
        finally:
            timer.cancel()

    def fail_all(self) -> None:
        """Let all pending futures fail with TimeoutError."""
        for future in list(self._pending.values()):
            _time_out(future)

    async def _receive(self, message: Msg) -> None:
        future = self._pending.get(message.subject)
        if future is None or future.done():
            return
        try:
            receipt = msgspec.json.decode(message.data, type=_Receipt)
        except msgspec.MsgspecError:  # no stream stores this subject (yet)
            future.set_exception(NatsError("the stream does not exist"))
            return
        if receipt.error is None:
            future.set_result(not receipt.duplicate)
        elif receipt.error.err_code == WRONG_LAST_SEQUENCE:
            future.set_exception(WriteRefused())
        else:
            future.set_exception(NatsError(receipt.error.description))
