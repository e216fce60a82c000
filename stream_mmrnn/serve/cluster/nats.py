"""Link: all requests of engines and clients to NATS, with the names of `subjects`.

Knows nothing about what is in frames and pieces.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js import api
from nats.js.errors import APIError, KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.serve.cluster.receipts import Receipts, WriteRefused
from stream_mmrnn.serve.cluster.subjects import LOG_S, Names, Table, read_table

REQUEST_S = 1.0
FAILURES = (NatsError, APIError, OSError, asyncio.TimeoutError)
"""What NATS's client raises where the server is away, slow or refuses."""
_PART_BYTES = 512 << 10
"""Longer values of pieces are stored in parts: a server takes messages of 1 MiB unless it is told otherwise."""
_NO_STREAM = 10059
"""JetStream's error code where a stream does not exist."""
_WHOLE, _IN_PARTS = b"\0", b"\1"


class Logged(NamedTuple):
    """A message of the log."""

    subject: str
    number: int
    nth: int
    """Its number since the subscription began, from 1; a gap means a lost message."""
    content: bytes


class Heartbeat(NamedTuple):
    """The server has nothing new for a subscription."""

    delivered: int
    """The number (`Logged.nth`) of the last message that it has sent; not received means lost."""


class Followed(NamedTuple):
    """A subscription to stored messages, to be ended by `leave`."""

    subscription: Subscription
    stream: str
    consumer: str


class Link:
    """A connection, and the requests over it."""

    def __init__(self, connection: Nats, names: Names) -> None:
        self.nats, self.names = connection, names
        self.js = connection.jetstream(timeout=REQUEST_S)
        self._receipts = Receipts(connection)
        self._leases: KeyValue | None = None
        self._states: KeyValue | None = None

    @property
    def leases(self) -> KeyValue:
        assert self._leases is not None
        return self._leases

    @property
    def states(self) -> KeyValue:
        assert self._states is not None
        return self._states

    async def settle(self, ttl_s: float, replicas: int, disk_mb: int) -> None:
        """Create the stream and the buckets, where they do not exist. `ttl_s`: of states; `disk_mb`: limit of the log.

        Raises:
            ProcessError: the server has no JetStream, or a stream of that name has another configuration.

        """
        names = self.names
        stream = api.StreamConfig(
            name=names.stream_in,
            subjects=[names.all_in],
            max_age=LOG_S,
            max_bytes=disk_mb << 20,
            duplicate_window=LOG_S,
            num_replicas=replicas,
            storage=api.StorageType.FILE,
        )
        buckets = [
            # not `direct`: a lagging replica could answer
            api.KeyValueConfig(
                bucket=names.leases,
                history=1,
                replicas=replicas,
                republish=api.RePublish(src=f"$KV.{names.leases}.table", dest=names.table),
            ),
            api.KeyValueConfig(bucket=names.states, history=1, replicas=replicas, ttl=max(ttl_s, LOG_S)),
        ]
        try:
            await self.js.add_stream(stream)
            self._leases, self._states = [await self.js.create_key_value(bucket) for bucket in buckets]
        except FAILURES as e:
            raise ProcessError(
                f"the NATS server cannot keep the log {names.stream_in} ({e}); it needs JetStream (nats-server -js, "
                "2.11 or newer), and existing streams of these names must be of a cluster"
            ) from e

    async def find(self) -> bool:
        """Whether the cluster's table exists."""
        try:
            self._leases = await self.js.key_value(self.names.leases)
        except FAILURES:
            return False
        return True

    async def set_shared(self, key: str, mine: bytes) -> bytes:
        """The shared value of this key: the first engine's; `mine` if we are the first."""
        try:
            await self.leases.create(key, mine)
        except KeyWrongLastSequenceError:
            entry = await self.leases.get(key)
            return entry.value or b""
        return mine

    def connection_lost(self) -> None:
        """The connection was lost: receipts that were under way do not arrive any more."""
        self._receipts.fail_all()

    # ---- leases --------------------------------------------------------------------------------------------------

    async def table(self, partitions: int) -> tuple[Table | None, int]:
        """The table of leases, None where there is none or it cannot be read, and its revision."""
        try:
            entry = await self.leases.get("table")
        except KeyNotFoundError as e:
            _check_absent(e)
            return None, _revision_of_deleted(e)
        return read_table(entry.value or b"", partitions), entry.revision or 0

    async def watch_table(self, handler: Callable[[bytes, int], None]) -> None:
        """Call `handler` with the table and its revision whenever one has been stored; b"": it was deleted."""

        async def receive(message: Msg) -> None:
            headers = message.headers or {}
            number = headers.get("Nats-Sequence", "")
            if number.isdigit():  # else it is not of the bucket
                handler(b"" if "KV-Operation" in headers else message.data, int(number))

        await self.nats.subscribe(self.names.table, cb=receive)

    async def replace_table(self, table: Table, revision: int) -> int:
        """Write the table; returns its new revision. Raises WriteRefused where it has changed since `revision`."""
        try:
            return await self.leases.update("table", table.to_bytes(), last=revision)
        except KeyWrongLastSequenceError as e:
            raise WriteRefused from e

    # ---- the log -------------------------------------------------------------------------------------------------

    async def follow(self, subjects: list[str], after: int, handler: Callable[[Logged | Heartbeat], None]) -> Followed:
        """Call `handler` with each message of these subjects after a number, and each heartbeat, until `leave`."""
        inbox = self.nats.new_inbox()

        async def receive(message: Msg) -> None:
            headers = message.headers or {}
            if "Status" in headers:
                delivered = headers.get(api.Header.LAST_CONSUMER.value, "")
                handler(Heartbeat(int(delivered) if delivered.isdigit() else 0))
                return
            sequence = message.metadata.sequence
            handler(Logged(message.subject, sequence.stream, sequence.consumer, message.data))

        subscription = await self.nats.subscribe(inbox, cb=receive, pending_msgs_limit=0, pending_bytes_limit=0)
        try:
            info = await self.js.add_consumer(
                self.names.stream_in,
                api.ConsumerConfig(
                    deliver_subject=inbox,
                    deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
                    opt_start_seq=after + 1,
                    ack_policy=api.AckPolicy.NONE,
                    filter_subjects=subjects,
                    idle_heartbeat=1.0,
                    inactive_threshold=10.0,
                    mem_storage=True,
                    num_replicas=1,
                ),
            )
        except BaseException:
            with contextlib.suppress(*FAILURES):
                await subscription.unsubscribe()
            raise
        return Followed(subscription, self.names.stream_in, info.name or "")

    async def leave(self, followed: Followed) -> None:
        """End a subscription; if the server is away, it removes the consumer by itself."""
        with contextlib.suppress(*FAILURES):
            await followed.subscription.unsubscribe()
        with contextlib.suppress(*FAILURES):
            await self.js.delete_consumer(followed.stream, followed.consumer)

    async def log(self, subject: str, name: str, content: bytes) -> asyncio.Future[bool]:
        """Send a message to the log, which keeps the first one of a name. The future is done when it is stored.

        It fails with one of FAILURES: then send it again under the same name.
        """
        return await self._receipts.publish(subject, content, {api.Header.MSG_ID.value: name})

    async def stored(self, future: asyncio.Future[bool]) -> None:
        """Wait for a message that was sent to the log. Raises one of FAILURES."""
        await self._receipts.wait(future, REQUEST_S)

    # ---- states --------------------------------------------------------------------------------------------------

    async def piece_names(self) -> list[str]:
        """The names of all pieces in the bucket."""
        prefix = f"$KV.{self.names.states}.piece."
        info = await self.js.stream_info(f"KV_{self.names.states}", subjects_filter=f"{prefix}>")
        return [subject.removeprefix(prefix) for subject in info.state.subjects or ()]

    async def piece(self, name: str) -> tuple[bytes, int]:
        """The value of a piece, b"" for none, and its revision."""
        while True:
            try:
                entry = await self.states.get(f"piece.{name}")
            except KeyNotFoundError as e:
                _check_absent(e)
                return b"", _revision_of_deleted(e)
            head = entry.value or b""
            if head[:1] != _IN_PARTS:
                return head[1:], entry.revision or 0
            first, keys = msgspec.msgpack.decode(head[1:], type=tuple[bytes, list[str]])
            try:
                parts = [(await self.states.get(key)).value or b"" for key in keys]
            except KeyNotFoundError:
                continue  # a newer value has taken its place
            return first + b"".join(parts), entry.revision or 0

    async def save_piece(self, name: str, raw: bytes, revision: int) -> int:
        """Replace the value of `revision` (0: none); returns the new one. Raises WriteRefused if it has changed."""
        value, keys = _WHOLE + raw, list[str]()
        if len(raw) > _PART_BYTES:
            serial = secrets.token_hex(4)
            for at in range(1, len(raw), _PART_BYTES):
                keys.append(f"part.{name}.{serial}.{at}")
                await self.states.put(keys[-1], raw[at : at + _PART_BYTES])
            value = _IN_PARTS + msgspec.msgpack.encode((raw[:1], keys))
        try:
            written = await self.states.update(f"piece.{name}", value, last=revision)
        except KeyWrongLastSequenceError as e:
            await self._remove(keys)
            raise WriteRefused from e
        if keys:
            await self._remove(await self._parts_of(name, keys))
        return written

    async def _parts_of(self, name: str, but: list[str]) -> list[str]:
        prefix = f"$KV.{self.names.states}."
        info = await self.js.stream_info(f"KV_{self.names.states}", subjects_filter=f"{prefix}part.{name}.>")
        found = [subject.removeprefix(prefix) for subject in info.state.subjects or ()]
        return [key for key in found if key not in but]

    async def _remove(self, keys: list[str]) -> None:
        for key in keys:
            with contextlib.suppress(*FAILURES):
                # not by the bucket's own `purge`, which leaves a marker for each
                await self.js.purge_stream(f"KV_{self.names.states}", subject=f"$KV.{self.names.states}.{key}")

    async def remove_piece(self, name: str) -> None:
        """Remove a piece that no lease names. Raises one of FAILURES."""
        await self._remove([f"piece.{name}", *await self._parts_of(name, [])])

    # ---- answers -------------------------------------------------------------------------------------------------

    async def answer(self, client: str, content: bytes) -> None:
        """Send answers to a client. Raises one of FAILURES."""
        await self.nats.publish(self.names.answers_to(client), content)

    async def receive_answers(self, client: str, handler: Callable[[bytes], Awaitable[None]]) -> None:
        """Call `handler` with each answer to a client."""

        async def receive(message: Any) -> None:
            await handler(message.data)

        await self.nats.subscribe(
            self.names.answers_to(client), cb=receive, pending_msgs_limit=0, pending_bytes_limit=0
        )


def _check_absent(error: KeyNotFoundError) -> None:
    """Raise NatsError where not the key is absent but its whole bucket: a server that begins may not have it yet."""
    # errors of the client's own, such as that of a deleted key, have no code
    if getattr(error.__context__, "err_code", None) == _NO_STREAM:
        raise NatsError("the server does not have the bucket (yet)") from error


def _revision_of_deleted(error: KeyNotFoundError) -> int:
    """A deleted key still has a revision; one that never was has 0."""
    deleted = getattr(error, "entry", None)
    return (deleted.revision or 0) if deleted is not None else 0


def new_name() -> str:
    """A unique name for an engine or client."""
    return secrets.token_hex(6)
