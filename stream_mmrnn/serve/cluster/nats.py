"""Link: all requests of engines and clients to NATS, with the names of `subjects`.

Knows nothing about the content of messages and snapshots.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js import api
from nats.js.errors import APIError, KeyNotFoundError, KeyWrongLastSequenceError, NotFoundError
from nats.js.kv import KeyValue

from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.serve.cluster.receipts import WRONG_LAST_SEQUENCE, Receipts, WriteRefused
from stream_mmrnn.serve.cluster.subjects import (
    ANSWERS_S,
    LOG_S,
    PARTITIONS,
    Fence,
    Lease,
    Names,
    Table,
    read_low,
    read_stored,
    session_of,
    token_of,
)

_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_EXPECTED_OF = "Nats-Expected-Last-Subject-Sequence-Subject"
REQUEST_S = 1.0
FAILURES = (NatsError, APIError, OSError, asyncio.TimeoutError)
"""What NATS's client raises where the server is away, slow or refuses."""


def _refuses(error: BaseException) -> bool:
    return isinstance(error, APIError) and error.err_code == WRONG_LAST_SEQUENCE


class Logged(NamedTuple):
    """A message of the log of requests."""

    session: str
    number: int
    nth: int
    """Its number since the subscription began, from 1; a gap means a lost message."""
    name: str
    """Its ID, which its sender made: `subjects` says what is in it."""
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
        """Create streams and buckets that do not exist. `ttl_s`: of states; `disk_mb`: limit of each log.

        Raises:
            ProcessError: the server has no JetStream, or a stream of that name has another configuration.

        """
        names = self.names
        common: dict[str, Any] = {"num_replicas": replicas, "storage": api.StorageType.FILE}
        streams = [
            api.StreamConfig(
                name=names.stream_in,
                subjects=[names.all_in],
                subject_transform=api.SubjectTransform(src=names.all_in, dest=names.log_of_all),
                max_age=LOG_S,
                max_bytes=disk_mb << 20,
                duplicate_window=LOG_S,
                **common,
            ),
            api.StreamConfig(
                name=names.stream_out,
                subjects=[names.all_out],
                republish=api.RePublish(src=names.all_out, dest=names.all_answers),
                # answers have a TTL each; a fence has none
                allow_msg_ttl=True,
                allow_rollup_hdrs=True,
                max_bytes=disk_mb << 20,
                duplicate_window=ANSWERS_S,
                **common,
            ),
        ]
        buckets = [
            # not `direct`: a lagging replica could answer
            api.KeyValueConfig(bucket=names.leases, history=1, replicas=replicas),
            api.KeyValueConfig(bucket=names.states, history=1, replicas=replicas, ttl=ttl_s),
        ]
        try:
            for stream in streams:
                await self.js.add_stream(stream)
            self._leases, self._states = [await self.js.create_key_value(bucket) for bucket in buckets]
        except FAILURES as e:
            raise ProcessError(
                f"the NATS server cannot keep the logs {names.stream_in} and {names.stream_out} ({e}); it needs "
                "JetStream (nats-server -js, 2.11 or newer), and existing streams of these names must be of a cluster"
            ) from e

    async def find(self) -> bool:
        """Whether the cluster's buckets exist."""
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

    # ---- leases --------------------------------------------------------------------------------------------------

    async def table(self) -> tuple[Table | None, int]:
        """The table of leases, None where there is none or it cannot be read, and its revision."""
        try:
            entry = await self.leases.get("table")
        except KeyNotFoundError as e:
            return None, _revision_of_deleted(e)
        return read_stored(entry.value or b"", Table), entry.revision or 0

    async def fenced_table(self) -> Table:
        """The table of leases as the fences say: each owner has fenced off the one before it."""
        fences = await asyncio.gather(*(self._last_fence(number) for number in range(PARTITIONS)))
        return Table({n: Lease(of.engine, of.epoch) for n, (_, of) in enumerate(fences) if of is not None})

    async def replace_table(self, table: Table, revision: int) -> int:
        """Write the table; returns its new revision. Raises WriteRefused where it has changed since `revision`."""
        try:
            return await self.leases.update("table", msgspec.json.encode(table), last=revision)
        except KeyWrongLastSequenceError as e:
            raise WriteRefused from e

    async def _last_fence(self, partition: int) -> tuple[int, Fence | None]:
        """The sequence number of a partition's fence, 0 for none, and the fence; None where it cannot be read."""
        try:
            found = await self.js.get_last_msg(self.names.stream_out, self.names.fence(partition))
        except NotFoundError:
            return 0, None
        return found.seq or 0, read_stored(found.data or b"", Fence)

    async def fence(self, partition: int, fence: Fence) -> int:
        """Fence off all earlier owners of the partition; returns the sequence number that writes must name from now on.

        Raises:
            WriteRefused: there is a newer owner.

        """
        subject = self.names.fence(partition)
        while True:
            last, was = await self._last_fence(partition)
            if was is not None and was.epoch > fence.epoch:
                raise WriteRefused
            headers = {_EXPECTED: str(last), api.Header.ROLLUP.value: "sub"}
            try:
                return (await self.js.publish(subject, msgspec.json.encode(fence), headers=headers)).seq
            except APIError as e:
                if not _refuses(e):
                    raise

    # ---- the log -------------------------------------------------------------------------------------------------

    async def follow(self, partition: int, after: int, handler: Callable[[Logged | Heartbeat], None]) -> Followed:
        """Call `handler` with each message of a partition after a number, and each heartbeat, until `leave`."""
        inbox = self.nats.new_inbox()

        async def receive(message: Msg) -> None:
            headers = message.headers or {}
            if "Status" in headers:
                delivered = headers.get(api.Header.LAST_CONSUMER.value, "")
                handler(Heartbeat(int(delivered) if delivered.isdigit() else 0))
                return
            sequence = message.metadata.sequence
            session = session_of(message.subject.rpartition(".")[2])
            name = headers.get(api.Header.MSG_ID.value, "")
            handler(Logged(session, sequence.stream, sequence.consumer, name, message.data))

        followed, _ = await self._subscribe(
            self.names.stream_in, self.names.log(partition), after, inbox, receive, heartbeat_s=1.0
        )
        return followed

    async def _subscribe(
        self,
        stream: str,
        subject: str,
        after: int,
        inbox: str,
        receive: Callable[[Msg], Awaitable[None]],
        heartbeat_s: float | None = None,
    ) -> tuple[Followed, int]:
        """Let the server send the stored messages of a subject after a number to `inbox`; also how many there were."""
        subscription = await self.nats.subscribe(inbox, cb=receive, pending_msgs_limit=0, pending_bytes_limit=0)
        try:
            info = await self.js.add_consumer(
                stream,
                api.ConsumerConfig(
                    deliver_subject=inbox,
                    deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
                    opt_start_seq=after + 1,
                    ack_policy=api.AckPolicy.NONE,
                    filter_subject=subject,
                    idle_heartbeat=heartbeat_s,
                    inactive_threshold=10.0,
                    mem_storage=True,
                    num_replicas=1,
                ),
            )
        except BaseException:
            with contextlib.suppress(*FAILURES):
                await subscription.unsubscribe()
            raise
        sent = info.delivered.consumer_seq if info.delivered is not None else 0
        return Followed(subscription, stream, info.name or ""), sent + (info.num_pending or 0)

    async def leave(self, followed: Followed) -> None:
        """End a subscription; if the server is away, it removes the consumer by itself."""
        with contextlib.suppress(*FAILURES):
            await followed.subscription.unsubscribe()
        with contextlib.suppress(*FAILURES):
            await self.js.delete_consumer(followed.stream, followed.consumer)

    # ---- answers -------------------------------------------------------------------------------------------------

    async def send(
        self, partition: int, session: str, client: str, name: str, content: bytes, fence: int
    ) -> asyncio.Future[bool]:
        """Write an answer to a client; the future is true where it was not stored before.

        The future fails with `WriteRefused` or one of FAILURES: then send the answer again under the same name. One
        that is lost on a connection that stands stays pending. Raises one of FAILURES.
        """
        headers = {
            _EXPECTED: str(fence),
            _EXPECTED_OF: self.names.fence(partition),
            api.Header.MSG_ID.value: f"{session} {name}",
            api.Header.MSG_TTL.value: f"{ANSWERS_S:.0f}s",
        }
        return await self._receipts.publish(self.names.out(partition, session, client), content, headers)

    def connection_lost(self) -> None:
        """The connection was lost: receipts that were under way do not arrive any more."""
        self._receipts.fail_all()

    async def receive_answers(self, client: str, handler: Callable[[int, bytes], None]) -> None:
        """Call `handler` with each answer to a client, when it is stored: its sequence number and content."""

        async def receive(message: Msg) -> None:
            number = (message.headers or {}).get("Nats-Sequence", "")
            if number.isdigit():  # else it is not of the log
                handler(int(number), message.data)

        await self.nats.subscribe(self.names.answers_to(client), cb=receive)

    async def newest(self) -> int:
        """The newest sequence number of the log of answers."""
        return (await self.js.stream_info(self.names.stream_out)).state.last_seq

    async def answers_between(self, client: str, after: int, last: int) -> AsyncIterator[tuple[int, bytes]]:
        """Stored answers to a client with the sequence numbers after + 1 to last, in order, each with its number.

        Raises one of FAILURES where some did not arrive.
        """
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = self.nats.new_inbox()
        followed, left = await self._subscribe(
            self.names.stream_out, self.names.out_to(client), after, inbox, arrived.put
        )
        expected = 1
        try:
            while left:
                message = await asyncio.wait_for(arrived.get(), REQUEST_S)
                at = message.metadata
                if at.sequence.consumer != expected:
                    raise TimeoutError(f"answer {expected} of those missed did not arrive")
                if at.sequence.stream > last:
                    break
                yield at.sequence.stream, message.data
                expected += 1
                left = at.num_pending
        finally:
            await self.leave(followed)

    async def log(self, session: str, name: str, content: bytes) -> None:
        """Write a client's message to the log, deduplicated by its name; returns when it is stored."""
        future = await self._receipts.publish(self.names.into(session), content, {api.Header.MSG_ID.value: name})
        await self._receipts.wait(future, REQUEST_S)

    # ---- states --------------------------------------------------------------------------------------------------

    async def states_of(self, partition: int) -> list[tuple[str, bytes, int]]:
        """The newest snapshots of a partition's sessions: session, bytes and revision."""
        prefix = f"$KV.{self.names.states}."
        info = await self.js.stream_info(f"KV_{self.names.states}", subjects_filter=f"{prefix}state.{partition}.*")
        keys = [subject.removeprefix(prefix) for subject in info.state.subjects or ()]
        found: list[tuple[str, bytes, int]] = []
        for at in range(0, len(keys), 64):
            some = keys[at : at + 64]
            entries = await asyncio.gather(*(self.states.get(key) for key in some), return_exceptions=True)
            for key, entry in zip(some, entries, strict=True):
                if isinstance(entry, KeyNotFoundError):
                    continue
                if isinstance(entry, BaseException):
                    raise entry
                found.append((session_of(key.rpartition(".")[2]), entry.value or b"", entry.revision or 0))
        return found

    async def save(self, partition: int, session: str, raw: bytes | None, revision: int) -> int:
        """Replace the snapshot of `revision` (0: none); returns the new one. Raises WriteRefused if it has changed."""
        key = f"state.{partition}.{token_of(session)}"
        try:
            if raw is None:
                await self.states.delete(key, last=revision)
                return 0
            return await self.states.update(key, raw, last=revision)
        except KeyWrongLastSequenceError as e:
            raise WriteRefused from e

    async def saved(self, partition: int, session: str) -> tuple[bytes, int]:
        """The snapshot of a session, b"" for none, and its revision."""
        try:
            entry = await self.states.get(f"state.{partition}.{token_of(session)}")
        except KeyNotFoundError as e:
            return b"", _revision_of_deleted(e)
        return entry.value or b"", entry.revision or 0

    async def low(self, partition: int) -> int:
        try:
            return read_low((await self.states.get(f"low.{partition}")).value or b"")
        except KeyNotFoundError:
            return 0

    async def set_low(self, partition: int, low: int) -> None:
        await self.states.put(f"low.{partition}", str(low).encode())


def _revision_of_deleted(error: KeyNotFoundError) -> int:
    """A deleted key still has a revision; one that never was has 0."""
    deleted = getattr(error, "entry", None)
    return (deleted.revision or 0) if deleted is not None else 0


def new_name() -> str:
    """A unique name for an engine or client."""
    return secrets.token_hex(6)
