"""Node: one engine of a cluster. It says that it is alive, takes its share of the partitions, serves them by a replica
of their log, and gives them back when it ends.

Who is alive is heard; who has what is decided by the table alone, which one at a time can change; who may write is
judged by the server. An engine that stood still has lost its partitions without knowing: what it writes is refused, and
it forgets them. Knows nothing about terminals or signals.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from msgspec.structs import replace

from stream_mmrnn.core import config
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import ProcessError, SnapshotError
from stream_mmrnn.predict.sharded_engine import create
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.async_client import end_tasks
from stream_mmrnn.serve.cluster.log_reader import LogReader
from stream_mmrnn.serve.cluster.membership import DEAD_AFTER_S, Members, is_lost, plan
from stream_mmrnn.serve.cluster.nats import FAILURES, Link, Refused, connect, new_name
from stream_mmrnn.serve.cluster.replica import Kept, Replica, Said
from stream_mmrnn.serve.cluster.subjects import STATE_EVERY_S, Beat, Fence, Lease, Names, Table

BEAT_S = 0.05
_AT_ONCE = 512
"""Messages of the log that are heard before what is ready is stepped."""
_WAIT_S = 0.02
_SAY_AGAIN_S = 1.0
_LOW_EVERY_S = 1.0
_RELEASE_S = 5.0


class _Part:
    """A partition that is ours."""

    def __init__(self, number: int, epoch: int, fence: int) -> None:
        self.number, self.epoch, self.fence = number, epoch, fence
        self.reader: LogReader | None = None
        self.unstored: OrderedDict[str, tuple[Said, asyncio.Future[bool], float]] = OrderedDict()
        """What was said and is not stored yet, by session and name, in order; since when."""
        self.revisions: dict[str, int] = {}
        self.keeping: dict[str, asyncio.Task[None]] = {}
        """The newest state of each session that is being kept."""
        self.low = -1
        self.ours = True


class ClusterNode:
    """One engine; `run` serves until it is told to stop."""

    def __init__(self, settings: config.Settings, say: Callable[[str], None] = lambda _: None) -> None:
        """Raises ModelError, ProviderError, ConfigError."""
        self.settings, self._say = settings, say
        self.name = new_name()
        """Unlike any other engine's."""
        self.engine = create(replace(settings.engine, slots=settings.serve.slots))
        self.counts: Counter[str] = Counter()
        """`taken`, `given_back`, `fenced` partitions; `stored`, `repeated` (what was stored before) and `refused` of
        what was said; `kept` states."""
        self.parts: dict[int, _Part] = {}
        self.replica: Replica | None = None
        self._inbox: deque[tuple[_Part, str, int, str, bytes]] = deque()
        self._something = asyncio.Event()
        self._link: Link | None = None
        self._members = Members(self.name)
        self._taking: set[int] = set()
        self._giving: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False

    @property
    def link(self) -> Link:
        assert self._link is not None
        return self._link

    # ---- coming and going ----------------------------------------------------------------------------------------

    async def run(self, alive: Callable[[], bool], often: Callable[[], None] = lambda: None) -> None:
        """Join, serve until `alive()` says no, give everything back and leave.

        Raises:
            NotRunning: no NATS server answers.
            ProcessError: it cannot keep our logs, or the cluster serves another model.

        """
        cluster = self.settings.cluster
        connection = await connect(cluster.url, cluster.credentials, self._returned)
        try:
            self._link = Link(connection, Names(cluster.prefix))
            await self._join()
            await connection.subscribe(self.link.names.beat, cb=self._hear_beat)
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
        secret = await self.link.secret()
        self.replica = Replica(self.engine, settings.state, settings.admission, secret, settings.serve.queue)
        mine = protocol.encode(self.replica.host.welcome)
        theirs = await self.link.in_common("model", mine)
        if (welcome := protocol.read_reply(theirs)) != self.replica.host.welcome:
            assert isinstance(welcome, protocol.Welcome)
            raise ProcessError(
                f"the cluster at {settings.cluster.url} serves {welcome.name} ({welcome.model[:12]}) with a queue of "
                f"{welcome.queue}, not {self.engine.spec.name} ({self.engine.spec.sha256[:12]}) with "
                f"{settings.serve.queue}; serve that, or give this one another cluster.prefix"
            )

    async def _leave(self) -> None:
        """Give everything back, so that others go on at once."""
        self._leaving = True
        end_s = _now_s() + _RELEASE_S
        while self.parts and _now_s() < end_s:
            await asyncio.sleep(0.01)
        await self._tell(gone=True)
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

    async def _returned(self) -> None:
        """The connection is back: what was on its way is not."""
        self._members.begin(_now_s())
        for part in list(self.parts.values()):
            if part.reader is not None:
                with contextlib.suppress(*FAILURES):
                    await part.reader.begin()
            await self._say_again(part, 0.0)

    # ---- who is alive, who has what ------------------------------------------------------------------------------

    async def _hear_beat(self, message: Any) -> None:
        try:
            self._members.observe(msgspec.msgpack.decode(message.data, type=Beat), _now_s())
        except msgspec.MsgspecError:
            self.counts["garbage"] += 1

    async def _tell(self, gone: bool = False) -> None:
        assert self.replica is not None
        beat = Beat(self.name, len(self.replica.sessions), self._leaving, gone)
        with contextlib.suppress(*FAILURES):
            await self.link.nats.publish(self.link.names.beat, msgspec.msgpack.encode(beat))

    async def _beat(self) -> None:
        self._members.begin(_now_s())
        beaten_s = _now_s()
        while True:
            await self._tell()
            if _now_s() - beaten_s > DEAD_AFTER_S:
                self._members.begin(_now_s())  # what we heard is as old as we stood
            beaten_s = _now_s()
            with contextlib.suppress(*FAILURES):
                await self._share()
            await asyncio.sleep(BEAT_S)

    async def _share(self) -> None:
        """Look who has what; take, give back, notice what is another one's."""
        table, revision = await self.link.table()
        for part in list(self.parts.values()):
            # one that is being given back: it may be we who have just done so
            if part.number not in self._giving and is_lost(table, part.number, self.name, part.epoch):
                self._lose(part.number)
        alive = self._members.alive(_now_s())
        take, give = plan(table, self.name, alive, set(self.parts), self._taking, self._giving)
        if take:
            try:
                await self.link.replace_table(Table({**table.leases, **take}), revision)
            except Refused:
                return  # somebody was quicker; the next look is soon
        for number, lease in take.items():
            self._taking.add(number)
            self._start(self._acquire(number, lease.epoch))
        for number in give:
            self._giving.add(number)
            self._start(self._give_back(number))

    async def _acquire(self, number: int, epoch: int) -> None:
        """A partition whose lease is ours: nobody else writes any more, its sessions go on from what is kept."""
        assert self.replica is not None
        try:
            fence = await self.link.fence(number, Fence(self.name, epoch))
            part = _Part(number, epoch, fence)
            states, low = await asyncio.gather(self.link.states_of(number), self.link.low(number))
            for raw, revision in states:
                try:
                    part.revisions[self.replica.adopt(number, raw, now_ns())] = revision
                except SnapshotError as e:
                    self.counts["damaged"] += 1
                    self._say(str(e))
            part.low = low
            part.reader = LogReader(self.link, number, low, lambda *message: self._receive(part, *message))
            self.parts[number] = part
            await part.reader.begin()
            self.counts["taken"] += 1
        except Refused:
            self.counts["fenced"] += 1
        except FAILURES as e:
            self._lose(number)
            self.replica.drop(number)  # what was adopted before it was a part of ours
            self._say(f"partition {number} could not be taken ({e or type(e).__name__}); it is tried again")
        finally:
            self._taking.discard(number)

    def _lose(self, number: int) -> None:
        """It is another engine's: nothing more is written of it."""
        assert self.replica is not None
        part = self.parts.pop(number, None)
        self._giving.discard(number)
        if part is None:
            return
        part.ours = False
        self.counts["fenced"] += 1
        for task in part.keeping.values():
            task.cancel()
        self.replica.drop(number)
        if part.reader is not None:
            self._start(part.reader.end())

    async def _give_back(self, number: int) -> None:
        """Let another engine take the partition; where that fails it is served on, and tried again."""
        part = self.parts.get(number)
        try:
            if part is not None:
                await self._give(part, number)
        finally:
            self._giving.discard(number)
            if part is not None and part.ours and part.reader is not None:
                await part.reader.begin()

    async def _give(self, part: _Part, number: int) -> None:
        """Step what was read, keep every session, and write down that it is nobody's."""
        assert self.replica is not None
        assert part.reader is not None
        await part.reader.end()
        while part.ours and (self.replica.waits(number) or any(of[0] is part for of in self._inbox)):
            await asyncio.sleep(0.001)
        if not part.ours:
            return
        self.replica.save_all(number, now_ns())
        await self._hand_on()
        while part.ours and (part.unstored or part.keeping):
            await asyncio.sleep(0.001)
            await self._say_again(part, _SAY_AGAIN_S)
        if not part.ours:
            return
        await self.link.set_low(number, self.replica.low(number, part.reader.read))
        while part.ours:
            table, revision = await self.link.table()
            if is_lost(table, number, self.name, part.epoch):
                break
            try:
                await self.link.replace_table(Table({**table.leases, number: Lease("", part.epoch)}), revision)
                break
            except Refused:
                continue
        if self.parts.pop(number, None) is not None:
            part.ours = False
            self.replica.drop(number)
            self.counts["given_back"] += 1

    # ---- serving -------------------------------------------------------------------------------------------------

    def _receive(self, part: _Part, session: str, seq: int, client: str, content: bytes) -> None:
        # with the part, not its number: what was read before a partition was lost and taken again is not of its new
        # beginning, and would be stepped out of its order
        self._inbox.append((part, session, seq, client, content))
        self._something.set()

    async def _serve(self) -> None:
        replica = self.replica
        assert replica is not None
        looked_s = 0.0
        loop = asyncio.get_running_loop()
        while True:
            if not self._inbox and not replica.ready:
                self._something.clear()
                timer = loop.call_later(_WAIT_S, self._something.set)
                await self._something.wait()
                timer.cancel()
            at_ns = now_ns()
            for _ in range(min(len(self._inbox), _AT_ONCE)):
                part, session, seq, client, content = self._inbox.popleft()
                if self.parts.get(part.number) is part:
                    replica.receive(part.number, session, seq, client, content, at_ns)
            if replica.ready:
                replica.step(at_ns)
            replica.look_after(at_ns)
            await self._hand_on()
            if _now_s() - looked_s > _LOW_EVERY_S:
                looked_s = _now_s()
                replica.save_silent(round(STATE_EVERY_S * 1e9), at_ns)
                await self._look_after_parts()
            await asyncio.sleep(0)

    async def _hand_on(self) -> None:
        """What the replica says and wants kept, to the server."""
        assert self.replica is not None
        said, kept = self.replica.pop()
        newest = {state.session: state for state in kept}
        promised: dict[str, list[Said]] = {}
        for of in said:
            if of.after_kept and of.session in newest:
                promised.setdefault(of.session, []).append(of)
            else:
                await self._say_one(of)
        for state in kept:
            part = self.parts.get(state.partition)
            if part is None:
                continue
            before = part.keeping.get(state.session)
            after = promised.pop(state.session, []) if state is newest[state.session] else []
            part.keeping[state.session] = self._start(self._save(part, state, before, after))

    async def _say_one(self, said: Said) -> None:
        part = self.parts.get(said.partition)
        if part is None:
            return
        try:
            future = await self.link.send(
                said.partition, said.session, said.client, said.name, said.content, part.fence
            )
        except FAILURES:
            future = asyncio.get_running_loop().create_future()  # it is said again
        key = f"{said.session} {said.name}"
        part.unstored[key] = said, future, _now_s()
        future.add_done_callback(lambda done: self._stored(part, key, done))

    def _stored(self, part: _Part, key: str, done: asyncio.Future[bool]) -> None:
        if done.cancelled() or (done.exception() and part.unstored.get(key, (None, None))[1] is not done):
            return
        try:
            self.counts["stored" if done.result() else "repeated"] += 1
        except Refused:
            self.counts["refused"] += 1
            if part.ours and self.parts.get(part.number) is part:
                self._lose(part.number)
            return
        except FAILURES:
            return  # it is said again
        part.unstored.pop(key, None)

    async def _say_again(self, part: _Part, after_s: float) -> None:
        """What has not been stored for so long, in order, under its name: the server has it once."""
        at_s = _now_s()
        for said in [said for said, _, since_s in part.unstored.values() if at_s - since_s >= after_s]:
            await self._say_one(said)

    async def _save(self, part: _Part, state: Kept, before: asyncio.Task[None] | None, promised: list[Said]) -> None:
        """Keep a state when what was said before is stored, and the state before it; then say what was promised."""
        assert self.replica is not None
        me = asyncio.current_task()
        while part.ours and self._owes(part, state):
            await asyncio.sleep(0.002)  # what failed is said again by others
        if before is not None:
            await asyncio.wait((before,))
        while part.ours:
            try:
                revision = part.revisions.get(state.session, 0)
                part.revisions[state.session] = await self.link.save(part.number, state.session, state.raw, revision)
                break
            except Refused:
                # an owner before us was still writing. What it kept is a state as good as ours, and by what it kept it
                # may have said from where on the log is to be read: a newer one stays
                with contextlib.suppress(*FAILURES):
                    raw, part.revisions[state.session] = await self.link.kept(part.number, state.session)
                    if state.raw is not None and self.replica.seq_of(raw) >= state.seq:
                        break
            except FAILURES:
                await asyncio.sleep(0.05)
        if not part.ours:
            return
        if state.raw is None:
            with contextlib.suppress(*FAILURES):
                _, part.revisions[state.session] = await self.link.kept(part.number, state.session)
        self.counts["kept"] += 1
        self.replica.kept(state)
        for said in promised:
            await self._say_one(said)
        if part.keeping.get(state.session) is me:
            del part.keeping[state.session]

    def _owes(self, part: _Part, state: Kept) -> bool:
        """Whether something that was said of what is in this state is not stored yet."""
        return any(
            said.session == state.session and int(said.name.partition(".")[0]) <= state.seq
            for said, _, _ in part.unstored.values()
        )

    async def _look_after_parts(self) -> None:
        assert self.replica is not None
        for part in list(self.parts.values()):
            await self._say_again(part, _SAY_AGAIN_S)
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
        """What was done so far, as a JSON document."""
        assert self.replica is not None
        replica = self.replica
        return {
            "engine": self.name,
            "cluster": self.settings.cluster.url,
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


def _now_s() -> float:
    return asyncio.get_running_loop().time()
