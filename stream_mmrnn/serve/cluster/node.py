"""ClusterNode: one engine of a cluster. It sends heartbeats, takes its share of the partitions, serves them from their
log, and gives them back when it ends.

Heartbeats say which engines are alive. Leases are in one table, updated by compare-and-swap. The server rejects writes
of former owners: an engine that was suspended loses its partitions without noticing, until a write is rejected. Knows
nothing about terminals or signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from msgspec.structs import replace

from stream_mmrnn.bus.keys import token
from stream_mmrnn.core import config
from stream_mmrnn.core.clock import RateLimiter, now_ns
from stream_mmrnn.core.errors import ConfigError, NotRunning, ProcessError, SnapshotError, WireError
from stream_mmrnn.predict.sharded_engine import create
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.async_client import end_tasks
from stream_mmrnn.serve.cluster.connection import connect, is_exposed, without_secrets
from stream_mmrnn.serve.cluster.log_reader import LogReader
from stream_mmrnn.serve.cluster.membership import DEAD_AFTER_S, Members, is_lost, plan
from stream_mmrnn.serve.cluster.nats import FAILURES, Link, new_name
from stream_mmrnn.serve.cluster.outbox import RETRY_S, Outbox, Partition
from stream_mmrnn.serve.cluster.questions import Questions
from stream_mmrnn.serve.cluster.receipts import WriteRefused
from stream_mmrnn.serve.cluster.replica import Replica
from stream_mmrnn.serve.cluster.subjects import STATE_EVERY_S, Beat, Fence, Lease, Names, Table

BEAT_S = 0.05
_AT_ONCE = 512
"""Messages that are read at most before a step."""
_WAIT_S = 0.02
_LOW_EVERY_S = 1.0
_RELEASE_S = 5.0


class ClusterNode:
    """One engine; `run` serves until it is told to stop."""

    def __init__(self, settings: config.Settings, say: Callable[[str], None] = lambda _: None) -> None:
        """Raises ModelError, ProviderError, ConfigError."""
        self.settings, self._say = settings, say
        self._rate_limiter = RateLimiter()
        self._address = without_secrets(settings.cluster.url)
        self.name = new_name()
        """Unique."""
        self.engine = create(replace(settings.engine, slots=settings.serve.slots))
        self.counts: Counter[str] = Counter()
        """`taken`, `given_back`, `fenced` partitions; `stored`, `repeated` (stored before) and `refused` answers;
        `kept` states; `damaged` ones; `tables` that were written anew, because nobody could read them; `garbage`."""
        self.parts: dict[int, Partition] = {}
        self.replica: Replica | None = None
        self._inbox: deque[tuple[Partition, str, int, str, bytes]] = deque()
        """Messages of the log: partition, session, sequence number, ID, content."""
        self._wake = asyncio.Event()
        self._link: Link | None = None
        self._outbox: Outbox | None = None
        self._members = Members(self.name)
        self._taking: set[int] = set()
        self._giving: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False

    @property
    def outbox(self) -> Outbox:
        assert self._outbox is not None
        return self._outbox

    @property
    def link(self) -> Link:
        assert self._link is not None
        return self._link

    # ---- start and stop ------------------------------------------------------------------------------------------

    async def run(self, alive: Callable[[], bool], often: Callable[[], None] = lambda: None) -> None:
        """Join, serve until `alive()` is false, give all partitions back and leave.

        Raises:
            NotRunning: no NATS server answers.
            ConfigError: others can reach the server, and it asks nobody who they are.
            ProcessError: the server cannot keep the logs, or the cluster has another model or key.
            FileError: the key cannot be read.

        """
        cluster = self.settings.cluster
        connection = await connect(cluster.url, cluster.credentials, self._returned, on_loss=self._lost)
        try:
            if host := is_exposed(connection):
                raise ConfigError(
                    f"the NATS server at {self._address} listens on {host} and asks nobody for credentials: start it "
                    "with `-a 127.0.0.1`, or with accounts as in packaging/nats.conf"
                )
            self._link = Link(connection, Names(cluster.prefix))
            try:
                await self._join()
            except FAILURES as e:
                why = str(e) or type(e).__name__
                raise NotRunning(f"the NATS server at {self._address} did not answer ({why}); try again") from e
            await connection.subscribe(self.link.names.beat, cb=self._on_beat)
            beating = asyncio.create_task(self._beat())
            serving = asyncio.create_task(self._serve())
            try:
                while alive():
                    for task in (beating, serving):
                        if task.done():
                            task.result()
                    often()
                    await asyncio.sleep(0.1)
                await self._leave()
            finally:
                await end_tasks(beating, serving, *self._tasks)
        finally:
            with contextlib.suppress(*FAILURES):
                await asyncio.wait_for(connection.close(), 2.0)
            self.engine.stop()

    async def _join(self) -> None:
        settings = self.settings
        await self.link.settle(settings.state.ttl_s, settings.cluster.replicas, settings.cluster.disk_mb)
        key = await self._read_key()
        self.replica = Replica(self.engine, settings.state, settings.admission, key, settings.serve.queue)
        self._outbox = Outbox(self.replica, self.link, self.parts, self.counts, self._start, self.lose)
        mine = protocol.encode(self.replica.host.welcome)
        theirs = await self.link.set_shared("model", mine)
        welcome = _read_welcome(theirs)
        if welcome is None:
            raise ProcessError(
                f"which model the cluster at {self._address} serves cannot be read; delete the key `model` of its "
                f"bucket {self.link.names.leases}, and start the engines again"
            )
        if welcome != self.replica.host.welcome:
            raise ProcessError(
                f"the cluster at {self._address} serves {welcome.name} ({welcome.model[:12]}) with a queue of "
                f"{welcome.queue}, not {self.engine.spec.name} ({self.engine.spec.sha256[:12]}) with "
                f"{settings.serve.queue}; serve that, or give this one another cluster.prefix"
            )
        await Questions(self.link, mine, self._start, self.counts).begin()

    async def _read_key(self) -> bytes:
        """The key of the cluster, from its file; raises ProcessError where other engines have another one."""
        cluster = self.settings.cluster
        path = config.cluster_key(self.settings)
        key = token(path, "cluster.key")[0].encode()
        mine = hmac.new(key, cluster.prefix.encode(), hashlib.sha256).hexdigest().encode()
        if await self.link.set_shared("key", mine) != mine:
            raise ProcessError(
                f"the engines of the cluster at {self._address} have another key than {path}: copy theirs to this "
                f"machine and name it in cluster.key, or, if it is lost, delete the key `key` of the bucket "
                f"{self.link.names.leases}"
            )
        return key

    async def _leave(self) -> None:
        """Give all partitions back, so that other engines continue at once."""
        self._leaving = True
        end_s = _now_s() + _RELEASE_S
        while self.parts and _now_s() < end_s:
            await asyncio.sleep(0.01)
        await self._send_beat(gone=True)
        with contextlib.suppress(*FAILURES):
            await asyncio.wait_for(self.link.nats.flush(), 1.0)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._say(f"{type(error).__name__}: {error}")

    async def _lost(self) -> None:
        if self._link is not None:
            self._link.connection_lost()

    async def _returned(self) -> None:
        """The connection is back: what was under way was lost, in both directions."""
        if self._outbox is None:
            return
        self._members.begin(_now_s())
        for part in list(self.parts.values()):
            await self.outbox.retry(part, 0.0)
        for part in list(self.parts.values()):
            if part.reader is not None:
                with contextlib.suppress(*FAILURES):
                    await part.reader.begin()

    # ---- membership and leases -----------------------------------------------------------------------------------

    async def _on_beat(self, message: Any) -> None:
        try:
            self._members.observe(msgspec.msgpack.decode(message.data, type=Beat), _now_s())
        except msgspec.MsgspecError:
            self.counts["garbage"] += 1

    async def _send_beat(self, gone: bool = False) -> None:
        assert self.replica is not None
        beat = Beat(self.name, len(self.replica.sessions), self._leaving, gone)
        with contextlib.suppress(*FAILURES):
            await self.link.nats.publish(self.link.names.beat, msgspec.msgpack.encode(beat))

    async def _beat(self) -> None:
        self._members.begin(_now_s())
        beaten_s = _now_s()
        while True:
            await self._send_beat()
            if _now_s() - beaten_s > DEAD_AFTER_S:
                self._members.begin(_now_s())  # we were suspended: all heartbeats are old
            beaten_s = _now_s()
            with contextlib.suppress(*FAILURES):
                await self._share()
            await asyncio.sleep(BEAT_S)

    async def _share(self) -> None:
        """Read the table; take and give back leases, and notice lost ones."""
        try:
            await self._share_by(*await self._read_table())
        except WriteRefused:
            return  # another engine was faster; the next beat tries again

    async def _read_table(self) -> tuple[Table, int]:
        """The table and its revision; where it cannot be read, it is written anew. Raises WriteRefused."""
        table, revision = await self.link.table()
        if table is None:
            # each owner's fence has the epoch of its lease, so that they lose nothing
            table = await self.link.fenced_table()
            if table.leases:
                revision = await self.link.replace_table(table, revision)
                self.counts["tables"] += 1
                if self._rate_limiter("table", now_ns()):
                    self._say("the cluster's table of leases could not be read; it was written anew")
        return table, revision

    async def _share_by(self, table: Table, revision: int) -> None:
        for part in list(self.parts.values()):
            # not one that is being given back: we may have just done that
            if part.number not in self._giving and is_lost(table, part.number, self.name, part.epoch):
                self.lose(part.number)
        alive = self._members.alive(_now_s())
        take, give, release = plan(table, self.name, alive, set(self.parts), self._taking, self._giving)
        if take or release:
            cleared = {number: replace(table.leases[number], engine="") for number in release}
            await self.link.replace_table(Table({**table.leases, **take, **cleared}), revision)
        for number, lease in take.items():
            self._taking.add(number)
            self._start(self._acquire(number, lease.epoch))
        for number in give:
            self._giving.add(number)
            self._start(self._give_back(number))

    async def _acquire(self, number: int, epoch: int) -> None:
        """Start to serve a partition whose lease is ours: fence off earlier owners, and continue its sessions."""
        assert self.replica is not None
        try:
            fence = await self.link.fence(number, Fence(self.name, epoch))
            part = Partition(number, epoch, fence)
            # in this order: a former owner that is still writing moves the low watermark after the states
            low = await self.link.low(number)
            states = await self.link.states_of(number)
            for session, raw, revision in states:
                part.revisions[session] = revision
                try:
                    self.replica.adopt(number, session, raw, now_ns())
                except SnapshotError as e:
                    self.counts["damaged"] += 1
                    if self._rate_limiter("damaged", now_ns()):
                        self._say(f"a state in the bucket counts as none: {e}")
            part.low = low
            part.reader = LogReader(self.link, number, low, lambda *message: self.receive(part, *message))
            self.parts[number] = part
            await part.reader.begin()
            self.counts["taken"] += 1
        except WriteRefused:
            self.counts["fenced"] += 1
        except FAILURES as e:
            self.lose(number)
            self.replica.drop(number)  # sessions that were adopted before the failure
            self._say(f"partition {number} could not be taken ({e or type(e).__name__}); it is tried again")
        finally:
            self._taking.discard(number)

    def lose(self, number: int) -> None:
        """Another engine has the partition: drop it without writing."""
        assert self.replica is not None
        part = self.parts.pop(number, None)
        self._giving.discard(number)
        if part is None:
            return
        part.ours = False
        self.counts["fenced"] += 1
        for task in part.saving.values():
            task.cancel()
        self.replica.drop(number)
        if part.reader is not None:
            self._start(part.reader.end())

    async def _give_back(self, number: int) -> None:
        """Give a partition to other engines; if that fails, it is served on and tried again."""
        part = self.parts.get(number)
        try:
            if part is not None:
                await self._give(part, number)
        finally:
            self._giving.discard(number)
            if part is not None and part.ours and part.reader is not None:
                await part.reader.begin()

    async def _give(self, part: Partition, number: int) -> None:
        """Step what was read, save every session, and clear the lease."""
        assert self.replica is not None
        assert part.reader is not None
        await part.reader.end()
        while part.ours and (self.replica.waits(number) or any(of[0] is part for of in self._inbox)):
            await asyncio.sleep(0.001)
        if not part.ours:
            return
        self.replica.save_all(number, now_ns())
        await self.outbox.flush()
        while part.ours and (part.unstored or part.saving):
            await asyncio.sleep(0.001)
            await self.outbox.retry(part, RETRY_S)
        if not part.ours:
            return
        await self.link.set_low(number, self.replica.low(number, part.reader.read))
        while part.ours:
            try:
                table, revision = await self._read_table()
                if is_lost(table, number, self.name, part.epoch):
                    break
                await self.link.replace_table(Table({**table.leases, number: Lease("", part.epoch)}), revision)
                break
            except WriteRefused:
                continue
        if self.parts.pop(number, None) is not None:
            part.ours = False
            self.replica.drop(number)
            self.counts["given_back"] += 1

    # ---- serving -------------------------------------------------------------------------------------------------

    def receive(self, part: Partition, session: str, seq: int, name: str, content: bytes) -> None:
        """Queue a message of the log."""
        # with the object, not its number: a message that was read before the partition was lost and taken again would
        # be stepped out of order
        self._inbox.append((part, session, seq, name, content))
        self._wake.set()

    async def _serve(self) -> None:
        replica = self.replica
        assert replica is not None
        checked_s = 0.0
        loop = asyncio.get_running_loop()
        while True:
            if not self._inbox and not replica.ready:
                self._wake.clear()
                timer = loop.call_later(_WAIT_S, self._wake.set)
                await self._wake.wait()
                timer.cancel()
            at_ns = now_ns()
            for _ in range(min(len(self._inbox), _AT_ONCE)):
                part, session, seq, name, content = self._inbox.popleft()
                if self.parts.get(part.number) is part:
                    replica.receive(part.number, session, seq, name, content, at_ns)
            if replica.ready:
                replica.step(at_ns)
            replica.housekeeping(at_ns)
            await self.outbox.flush()
            if _now_s() - checked_s > _LOW_EVERY_S:
                checked_s = _now_s()
                replica.save_idle(round(STATE_EVERY_S * 1e9), at_ns)
                await self._maintain_parts()
            await asyncio.sleep(0)

    async def _maintain_parts(self) -> None:
        assert self.replica is not None
        for part in list(self.parts.values()):
            await self.outbox.retry(part, RETRY_S)
            if part.reader is None or part.number in self._giving:
                continue
            with contextlib.suppress(*FAILURES):
                if part.reader.silent:
                    await part.reader.begin()
                queued = any(of[0] is part for of in self._inbox)
                low = self.replica.low(part.number, part.low if queued else part.reader.read)
                if low > part.low:
                    await self.link.set_low(part.number, low)
                    part.low = low

    def summary(self) -> dict[str, Any]:
        """Figures of this run so far, as a JSON document."""
        assert self.replica is not None
        replica = self.replica
        return {
            "engine": self.name,
            "cluster": self._address,
            "model": self.engine.spec.name,
            "model_sha256": self.engine.spec.sha256,
            "provider": self.engine.provider,
            "partitions": len(self.parts),
            "sessions": len(replica.sessions),
            "counts": {
                **replica.sessions.counts,
                **{f"host_{k}": v for k, v in sorted(replica.host.counts.items())},
                **{f"log_{k}": v for k, v in sorted(replica.counts.items())},
                **{f"cluster_{k}": v for k, v in sorted(self.counts.items())},
            },
        }


def _read_welcome(content: bytes) -> protocol.Welcome | None:
    try:
        reply = protocol.read_reply(content)
    except WireError:
        return None
    return reply if isinstance(reply, protocol.Welcome) else None


def _now_s() -> float:
    return asyncio.get_running_loop().time()
