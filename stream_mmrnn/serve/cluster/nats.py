"""Link: what engines and clients ask of NATS, in the words of `layout`. The only file that speaks NATS.

Knows nothing about sessions' messages or what is in a snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import nats
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js import api
from nats.js.errors import APIError, KeyNotFoundError, KeyWrongLastSequenceError, NotFoundError
from nats.js.kv import KeyValue

from stream_mmrnn.core.errors import NotRunning, ProcessError
from stream_mmrnn.serve.cluster.subjects import LOG_S, SAID_S, Fence, Names, Table, session_of, token_of

_WRONG_LAST_SEQUENCE = 10071
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_EXPECTED_OF = "Nats-Expected-Last-Subject-Sequence-Subject"
_REQUEST_S = 1.0
FAILURES = (NatsError, APIError, OSError, asyncio.TimeoutError)
"""What NATS's client raises where the server is away, slow or says no."""


class Refused(Exception):  # noqa: N818 told from failures by its name
    """The server says that another one has been there since."""


class _Error(msgspec.Struct):
    err_code: int = 0
    description: str = ""


class _Receipt(msgspec.Struct):
    """What the server says of a message for a stream."""

    error: _Error | None = None
    duplicate: bool = False


def _give_up(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


def _refuses(error: BaseException) -> bool:
    return isinstance(error, APIError) and error.err_code == _WRONG_LAST_SEQUENCE


async def connect(
    url: str,
    credentials: str = "",
    on_return: Callable[[], Awaitable[None]] | None = None,
    timeout_s: float = 5.0,
    on_loss: Callable[[], Awaitable[None]] | None = None,
) -> Nats:
    """A connection that comes back by itself for ever.

    Raises:
        NotRunning: nobody answers there, or not to these credentials.

    """
    options: dict[str, Any] = {"user_credentials": str(Path(credentials).expanduser())} if credentials else {}

    async def nothing(_: object = None) -> None:
        pass

    try:
        return await asyncio.wait_for(
            nats.connect(
                url,
                connect_timeout=2,
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.05,
                ping_interval=1,
                max_outstanding_pings=3,
                error_cb=nothing,
                reconnected_cb=on_return or nothing,
                disconnected_cb=on_loss or nothing,
                **options,
            ),
            timeout_s,
        )
    except (TimeoutError, NatsError, OSError, ValueError) as e:
        raise NotRunning(f"no NATS server answers at {url} ({e or type(e).__name__}); start one with JetStream") from e


class Logged(NamedTuple):
    """A message of the log."""

    session: str
    number: int
    nth: int
    """Of those that were given since it is followed, from 1; one that is left out leaves a gap."""
    client: str
    """Who says that it is of it; "" where nobody does."""
    content: bytes


class Followed(NamedTuple):
    """What is to be ended."""

    subscription: Subscription
    consumer: str


class Link:
    """A connection, and what is asked over it."""

    def __init__(self, connection: Nats, names: Names) -> None:
        self.nats, self.names = connection, names
        self.js = connection.jetstream(timeout=_REQUEST_S)
        self._inbox = ""
        self._owed: dict[str, asyncio.Future[bool]] = {}
        """Receipts that have not come, by their address."""
        self._receipts = 0
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
        """See that everything is there; who comes first makes it. `ttl_s`: of states; `disk_mb`: of each log, at most.

        Raises:
            ProcessError: the server has no JetStream, or what is there is of another kind.

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
                republish=api.RePublish(src=names.all_out, dest=names.all_said),
                # a fence has no time to live, what is said has one of its own
                allow_msg_ttl=True,
                allow_rollup_hdrs=True,
                max_bytes=disk_mb << 20,
                duplicate_window=SAID_S,
                **common,
            ),
        ]
        buckets = [
            # not `direct`: a replica that lags would be asked, too
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
                "JetStream (nats-server -js, 2.11 or newer), and what is there of that name must be a cluster of ours"
            ) from e

    async def find(self) -> bool:
        """What a client needs is there."""
        try:
            self._leases = await self.js.key_value(self.names.leases)
        except FAILURES:
            return False
        return True

    async def in_common(self, key: str, mine: bytes) -> bytes:
        """What the first of all engines said under this key; `mine` where that is this one."""
        try:
            await self.leases.create(key, mine)
        except KeyWrongLastSequenceError:
            entry = await self.leases.get(key)
            return entry.value or b""
        return mine

    async def common(self, key: str) -> bytes | None:
        try:
            return (await self.leases.get(key)).value
        except KeyNotFoundError:
            return None

    async def secret(self) -> bytes:
        """The cluster's, made by its first engine."""
        return await self.in_common("secret", secrets.token_bytes(32))

    # ---- leases --------------------------------------------------------------------------------------------------

    async def table(self) -> tuple[Table, int]:
        """Who has what, and its revision; 0 before there is one."""
        try:
            entry = await self.leases.get("table")
        except KeyNotFoundError:
            return Table(), 0
        return msgspec.json.decode(entry.value or b"{}", type=Table), entry.revision or 0

    async def replace_table(self, table: Table, revision: int) -> int:
        """Its new revision; raises Refused where it has changed since `revision`."""
        try:
            return await self.leases.update("table", msgspec.json.encode(table), last=revision)
        except KeyWrongLastSequenceError as e:
            raise Refused from e

    async def fence(self, partition: int, fence: Fence) -> int:
        """Make everybody before a stale owner of the partition; the number that its writers name from now on.

        Raises:
            Refused: a newer owner has been there.

        """
        subject = self.names.fence(partition)
        while True:
            try:
                found = await self.js.get_last_msg(self.names.stream_out, subject)
                last, was = found.seq or 0, msgspec.json.decode(found.data or b"{}", type=Fence)
                if was.epoch > fence.epoch:
                    raise Refused
            except NotFoundError:
                last = 0
            headers = {_EXPECTED: str(last), api.Header.ROLLUP.value: "sub"}
            try:
                return (await self.js.publish(subject, msgspec.json.encode(fence), headers=headers)).seq
            except APIError as e:
                if not _refuses(e):
                    raise

    # ---- the log -------------------------------------------------------------------------------------------------

    async def follow(self, partition: int, after: int, heard: Callable[[Logged | None], None]) -> Followed:
        """Give what is in a partition's log after a number, and what comes, until `leave`; None is a sign of life."""
        inbox = self.nats.new_inbox()

        async def take(message: Msg) -> None:
            headers = message.headers or {}
            if "Status" in headers:
                heard(None)
                return
            sequence = message.metadata.sequence
            session = session_of(message.subject.rpartition(".")[2])
            client = headers.get(api.Header.MSG_ID.value, "").partition(" ")[0]
            heard(Logged(session, sequence.stream, sequence.consumer, client, message.data))

        subscription = await self.nats.subscribe(inbox, cb=take, pending_msgs_limit=0, pending_bytes_limit=0)
        try:
            info = await self.js.add_consumer(
                self.names.stream_in,
                api.ConsumerConfig(
                    deliver_subject=inbox,
                    deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
                    opt_start_seq=after + 1,
                    ack_policy=api.AckPolicy.NONE,
                    filter_subject=self.names.log(partition),
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
        return Followed(subscription, info.name or "")

    async def leave(self, followed: Followed) -> None:
        """Follow no more; where the server is away, it finds out by itself."""
        with contextlib.suppress(*FAILURES):
            await followed.subscription.unsubscribe()
        with contextlib.suppress(*FAILURES):
            await self.js.delete_consumer(self.names.stream_in, followed.consumer)

    # ---- what is said --------------------------------------------------------------------------------------------

    async def send(
        self, partition: int, session: str, client: str, name: str, content: bytes, fence: int
    ) -> asyncio.Future[bool]:
        """Write what is said of a session to a client; a future of its being stored, and whether that was new.

        It fails by `Refused`, or by one of FAILURES, or is for ever not done where the server went away: then it is to
        be said again, under its name.
        """
        headers = {
            _EXPECTED: str(fence),
            _EXPECTED_OF: self.names.fence(partition),
            api.Header.MSG_ID.value: f"{session} {name}",
            api.Header.MSG_TTL.value: f"{SAID_S:.0f}s",
        }
        return await self._post(self.names.out(partition, session, client), content, headers)

    async def _post(self, subject: str, content: bytes, headers: dict[str, str]) -> asyncio.Future[bool]:
        """Send a message that a stream keeps; a future of its receipt."""
        if not self._inbox:
            self._inbox = self.nats.new_inbox()
            await self.nats.subscribe(f"{self._inbox}.*", cb=self._receive)
        self._receipts += 1
        address = f"{self._inbox}.{self._receipts}"
        future = self._owed[address] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: self._owed.pop(address, None))
        await self.nats.publish(subject, content, address, headers)
        return future

    def give_up(self) -> None:
        """The connection was lost and is back: receipts that were on their way do not come any more."""
        for future in list(self._owed.values()):
            _give_up(future)

    async def _receive(self, message: Msg) -> None:
        """A receipt. (The client's own `publish_async` lets a future wait for ever where the server says no.)"""
        future = self._owed.get(message.subject)
        if future is None or future.done():
            return
        try:
            receipt = msgspec.json.decode(message.data, type=_Receipt)
        except msgspec.MsgspecError:  # nobody keeps what is said there (yet)
            future.set_exception(NatsError("the log of answers is not there"))
            return
        if receipt.error is None:
            future.set_result(not receipt.duplicate)
        elif receipt.error.err_code == _WRONG_LAST_SEQUENCE:
            future.set_exception(Refused())
        else:
            future.set_exception(NatsError(receipt.error.description))

    async def newest(self) -> int:
        """The number of the newest thing that was said to anybody."""
        return (await self.js.stream_info(self.names.stream_out)).state.last_seq

    async def said_after(self, client: str, number: int) -> AsyncIterator[tuple[int, bytes]]:
        """What was said to a client after this number, each with its own."""
        subject = self.names.out_to(client)
        while True:
            try:
                found = await self.js.get_msg(self.names.stream_out, number + 1, subject, next=True)
            except NotFoundError:
                return
            number = found.seq or 0
            yield number, found.data or b""

    async def log(self, session: str, name: str, content: bytes) -> None:
        """Put a client's message into the log, once under this name; it is there when this returns."""
        future = await self._post(self.names.into(session), content, {api.Header.MSG_ID.value: name})
        timer = asyncio.get_running_loop().call_later(_REQUEST_S, _give_up, future)
        try:
            await future
        finally:
            timer.cancel()

    # ---- states --------------------------------------------------------------------------------------------------

    async def states_of(self, partition: int) -> list[tuple[bytes, int]]:
        """The newest snapshots of a partition's sessions, each with its revision."""
        prefix = f"$KV.{self.names.states}."
        info = await self.js.stream_info(f"KV_{self.names.states}", subjects_filter=f"{prefix}state.{partition}.*")
        keys = [subject.removeprefix(prefix) for subject in info.state.subjects or ()]
        found: list[tuple[bytes, int]] = []
        for at in range(0, len(keys), 64):
            entries = await asyncio.gather(
                *(self.states.get(key) for key in keys[at : at + 64]), return_exceptions=True
            )
            for entry in entries:
                if isinstance(entry, KeyNotFoundError):
                    continue
                if isinstance(entry, BaseException):
                    raise entry
                found.append((entry.value or b"", entry.revision or 0))
        return found

    async def save(self, partition: int, session: str, raw: bytes | None, revision: int) -> int:
        """In place of that of `revision` (0: there is none); the new revision. Raises Refused where it is another."""
        key = f"state.{partition}.{token_of(session)}"
        try:
            if raw is None:
                await self.states.delete(key, last=revision)
                return 0
            return await self.states.update(key, raw, last=revision)
        except KeyWrongLastSequenceError as e:
            raise Refused from e

    async def kept(self, partition: int, session: str) -> tuple[bytes, int]:
        """What is kept of a session, b"" where nothing is, and its revision."""
        try:
            entry = await self.states.get(f"state.{partition}.{token_of(session)}")
        except KeyNotFoundError as e:
            # one that was deleted has left its number behind
            deleted = getattr(e, "entry", None)
            return b"", (deleted.revision or 0) if deleted is not None else 0
        return entry.value or b"", entry.revision or 0

    async def low(self, partition: int) -> int:
        try:
            return int((await self.states.get(f"low.{partition}")).value or b"0")
        except KeyNotFoundError:
            return 0

    async def set_low(self, partition: int, low: int) -> None:
        await self.states.put(f"low.{partition}", str(low).encode())


def new_name() -> str:
    """Of one engine or client, unlike any other's."""
    return secrets.token_hex(6)
