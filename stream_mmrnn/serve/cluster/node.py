"""ClusterNode: one engine of a cluster. It sends heartbeats, takes its share of the partitions, serves them from the
log, and gives them back when it ends.

Heartbeats say which engines are alive; an engine that was suspended does not notice that others have its partitions
before the server refuses its next write, and until then it makes the same answers as they. Knows nothing about
terminals or signals.
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
from stream_mmrnn.core.clock import now_ns, wall_offset_ns
from stream_mmrnn.core.errors import ConfigError, NotRunning, ProcessError, WireError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.predict.sharded_engine import create
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.async_client import end_tasks
from stream_mmrnn.serve.cluster.connection import connect, is_exposed, without_secrets
from stream_mmrnn.serve.cluster.holdings import Holdings
from stream_mmrnn.serve.cluster.log_reader import LogReader
from stream_mmrnn.serve.cluster.membership import DEAD_AFTER_S, Members
from stream_mmrnn.serve.cluster.nats import FAILURES, Link, new_name
from stream_mmrnn.serve.cluster.questions import Questions, Reply
from stream_mmrnn.serve.cluster.replica import Replica
from stream_mmrnn.serve.cluster.subjects import Beat, Names

BEAT_S = 0.05
_AT_ONCE_NS = 8_000_000
"""For so long frames are read and stepped before answers are sent, and heartbeats."""
_WAIT_S = 0.02
_CHECK_S = 1.0
_LOOK_S = 2.0
"""The table is read so often, too, for it may be that what is watched was missed."""
_RELEASE_S = 5.0


class ClusterNode:
    """One engine; `run` serves until it is told to stop."""

    def __init__(self, settings: Settings, say: Callable[[str], None] = lambda _: None) -> None:
        """Raises ModelError, ProviderError, ConfigError."""
        self.settings, self._say = settings, say
        self._address = without_secrets(settings.cluster.url)
        self.name = new_name()
        """Unique."""
        self.engine = create(replace(settings.engine, slots=settings.serve.slots))
        self.counts: Counter[str] = Counter()
        """Of `Holdings`, and `garbage`."""
        self.replica: Replica | None = None
        self._inbox: deque[tuple[int, str, int, bytes]] = deque()
        """Frames of the log: `LogReader.changes`, subject, sequence number, content."""
        self._wake = asyncio.Event()
        self._decide = asyncio.Event()
        self._link: Link | None = None
        self._reader: LogReader | None = None
        self._holdings: Holdings | None = None
        self._members = Members(self.name)
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._wall_offset_ns = wall_offset_ns()

    @property
    def link(self) -> Link:
        assert self._link is not None
        return self._link

    @property
    def holdings(self) -> Holdings:
        assert self._holdings is not None
        return self._holdings

    @property
    def reader(self) -> LogReader:
        assert self._reader is not None
        return self._reader

    @property
    def parts(self) -> set[int]:
        """Partitions that it serves."""
        return self._holdings.parts if self._holdings is not None else set()

    @property
    def figures(self) -> tuple[int, int]:
        """Open sessions, and predictions so far."""
        return (len(self.engine), self.replica.counts["stepped"]) if self.replica is not None else (0, 0)

    # ---- start and stop ------------------------------------------------------------------------------------------

    async def run(self, alive: Callable[[], bool], often: Callable[[], None] = lambda: None) -> None:
        """Join, serve until `alive()` is false, give all partitions back and leave.

        Raises:
            NotRunning: no NATS server answers.
            ConfigError: others can reach the server, and it asks nobody who they are.
            ProcessError: the server cannot keep the log, the cluster has another model, key or number of partitions, or
                the engine has failed.
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
        settings, link = self.settings, self.link
        await link.settle(settings.state.ttl_s, settings.cluster.replicas, settings.cluster.disk_mb)
        key = await self._read_key()
        partitions = settings.cluster.partitions
        replica = self.replica = Replica(
            self.engine, settings.state, settings.admission, key, settings.serve.queue, partitions, self.name, now_ns()
        )
        mine = protocol.encode(replica.welcome)
        theirs = await link.set_shared("model", mine)
        welcome = _read_welcome(theirs)
        if welcome is None:
            raise ProcessError(
                f"which model the cluster at {self._address} serves cannot be read; delete the key `model` of its "
                f"bucket {link.names.leases}, and start the engines again"
            )
        if welcome != replica.welcome:
            raise ProcessError(
                f"the cluster at {self._address} serves {welcome.name} ({welcome.model[:12]}) with a queue of "
                f"{welcome.queue}, not {self.engine.spec.name} ({self.engine.spec.sha256[:12]}) with "
                f"{settings.serve.queue}; serve that, or give this one another cluster.prefix"
            )
        asked = await link.set_shared("partitions", str(partitions).encode())
        if asked != str(partitions).encode():
            raise ProcessError(
                f"the cluster at {self._address} has {asked.decode(errors='replace')[:20]} partitions, not "
                f"{partitions}: set cluster.partitions as its engines have it, or give this one another cluster.prefix"
            )
        self._reader = LogReader(link, self.receive)
        self._holdings = Holdings(
            link,
            replica,
            self._reader,
            self.name,
            self.counts,
            self._start,
            self._say,
            self._wake.set,
            self._send_answers,
        )
        await link.nats.subscribe(link.names.beat, cb=self._on_beat)
        await link.watch_table(self._on_table)
        await Questions(link, lambda: Reply(mine, partitions, replica.out.engines), self.counts).begin()

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
        self._decide.set()
        end_s = _now_s() + _RELEASE_S
        while self.holdings.is_busy and _now_s() < end_s:
            await asyncio.sleep(0.01)
        await self._send_beat(gone=True)
        await self._send_answers()
        with contextlib.suppress(*FAILURES):
            await asyncio.wait_for(self.link.nats.flush(), 1.0)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._decide.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._say(f"{type(error).__name__}: {error}")

    async def _lost(self) -> None:
        if self._link is not None:
            self._link.connection_lost()

    async def _returned(self) -> None:
        """The connection is back: what was under way was lost, in both directions."""
        if self._holdings is None or self.replica is None:
            return
        self._members.begin(_now_s())
        self.replica.kept_again()
        self._wake.set()
        with contextlib.suppress(*FAILURES):
            await self.reader.begin()

    # ---- membership and leases -----------------------------------------------------------------------------------

    async def _on_beat(self, message: Any) -> None:
        try:
            self._members.observe(msgspec.msgpack.decode(message.data, type=Beat), _now_s())
        except msgspec.MsgspecError:
            self.counts["garbage"] += 1

    def _on_table(self, raw: bytes, revision: int) -> None:
        self.holdings.saw_table(raw, revision)
        self._decide.set()

    async def _send_beat(self, gone: bool = False) -> None:
        beat = Beat(self.name, len(self.engine), self._leaving, gone)
        with contextlib.suppress(*FAILURES):
            await self.link.nats.publish(self.link.names.beat, msgspec.msgpack.encode(beat))

    async def _beat(self) -> None:
        self._members.begin(_now_s())
        beaten_s = looked_s = _now_s()
        while True:
            self._decide.clear()
            if _now_s() - beaten_s > DEAD_AFTER_S:
                self._members.begin(_now_s())  # we were suspended: all heartbeats are old
            if _now_s() - beaten_s > 0.9 * BEAT_S:
                await self._send_beat()
                beaten_s = _now_s()
            if _now_s() - looked_s > _LOOK_S:
                looked_s = _now_s()
                self.holdings.look_again()
            with contextlib.suppress(*FAILURES):
                await self._share()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._decide.wait(), max(beaten_s + BEAT_S - _now_s(), 0.001))

    async def _share(self) -> None:
        """Take and give back partitions, and notice lost ones."""
        assert self.replica is not None
        alive = self._members.alive(_now_s())
        self.replica.out.engines = max(sum(not beat.leaving for beat in alive.values()), 1)
        await self.holdings.share(alive)

    # ---- serving -------------------------------------------------------------------------------------------------

    def receive(self, subject: str, seq: int, content: bytes) -> None:
        """Queue a frame of the log."""
        self._inbox.append((self.reader.changes, subject, seq, content))
        self._wake.set()

    async def _serve(self) -> None:
        replica, names = self.replica, self.link.names
        assert replica is not None
        checked_s = 0.0
        loop = asyncio.get_running_loop()
        while True:
            if not self._inbox:
                timer = loop.call_later(_WAIT_S, self._wake.set)
                await self._wake.wait()
                timer.cancel()
            self._wake.clear()
            at_ns = now_ns()
            while self._inbox and now_ns() - at_ns < _AT_ONCE_NS:
                changes, subject, seq, content = self._inbox.popleft()
                if changes == self.reader.changes:  # else it is read again, for other partitions
                    replica.receive(seq, names.writer(subject), content, at_ns)
            replica.step(now_ns())
            replica.housekeeping(at_ns, at_ns + self._wall_offset_ns)
            await self._send_answers()
            self.holdings.save_due(_now_s())
            if _now_s() - checked_s > _CHECK_S:
                checked_s = _now_s()
                if self.reader.silent:
                    with contextlib.suppress(*FAILURES):
                        await self.reader.begin()
            if self._inbox:
                await asyncio.sleep(0)

    async def _send_answers(self) -> None:
        assert self.replica is not None
        for client, content in self.replica.out.pop():
            with contextlib.suppress(*FAILURES):  # it is kept, and the client asks for it
                await self.link.answer(client, content)

    def summary(self) -> dict[str, Any]:
        """Figures of this run so far, as a JSON document."""
        assert self.replica is not None
        return {
            "engine": self.name,
            "cluster": self._address,
            "model": self.engine.spec.name,
            "model_sha256": self.engine.spec.sha256,
            "provider": self.engine.provider,
            "partitions": len(self.parts),
            "sessions": len(self.engine),
            "counts": {
                **dict(sorted(self.replica.counts.items())),
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
