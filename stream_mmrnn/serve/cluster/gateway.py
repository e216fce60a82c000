"""Gateway: puts what many sessions send into the cluster's log as frames, and takes frames of answers.

What comes within a few milliseconds goes into one frame for each lane, and the next frame follows when that is stored:
the busier the cluster, the larger the frames. Knows nothing about what is in messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable

from stream_mmrnn.core.errors import BadTick, NotRunning, WireError
from stream_mmrnn.serve.async_client import end_tasks
from stream_mmrnn.serve.cluster.batch import Batch, Chunk
from stream_mmrnn.serve.cluster.connection import connect, without_secrets
from stream_mmrnn.serve.cluster.frames import MOST_BYTES, Control, PredColumns, Said, read_answers
from stream_mmrnn.serve.cluster.nats import FAILURES, Link, new_name
from stream_mmrnn.serve.cluster.questions import ask
from stream_mmrnn.serve.cluster.subjects import Names, lanes_for

GATHER_S = 0.004
"""Between two frames of a lane; what comes meanwhile goes into one."""
STARTING = "start some by stream-mmrnn serve --cluster URL"
"""What to do where no engine answers."""


class Gateway:
    """Puts messages of many sessions into the log as frames, each until it is stored, and takes frames of answers."""

    def __init__(self, user: str, on_answers: Callable[[PredColumns], None], on_said: Callable[[Said], None]) -> None:
        self.name = f"{user}.{new_name()}"
        """CLIENT of the subjects."""
        self._on_answers, self._on_said = on_answers, on_said
        self.on_return: Callable[[], None] = lambda: None
        """Called when a lost connection is back."""
        self._link: Link | None = None
        self._batch: Batch | None = None
        self._due = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._written_s = float("-inf")
        self._storing = False
        self.welcome = b""

    @property
    def link(self) -> Link:
        assert self._link is not None
        return self._link

    @property
    def batch(self) -> Batch:
        assert self._batch is not None
        return self._batch

    async def begin(self, url: str, prefix: str, credentials: str, timeout_s: float) -> None:
        """Connect, and ask for the cluster's model; raises NotRunning where no server or engine is there in time."""
        end_s = _now_s() + timeout_s
        connection = await connect(url, credentials, self._returned, timeout_s, self._lost)
        self._link = Link(connection, Names(prefix))
        while True:
            with contextlib.suppress(*FAILURES):
                reply = await ask(self.link, self.name)
                self._batch = Batch(self.name, reply.partitions)
                self._batch.divide(lanes_for(reply.engines))
                self.welcome = reply.welcome
                await self.link.receive_answers(self.name, self._receive)
                await connection.flush()
                break
            if _now_s() > end_s:
                await connection.close()
                raise NotRunning(
                    f"no engine of a cluster answers {self.name.partition('.')[0]!r} at {without_secrets(url)}: "
                    f"{STARTING}"
                )
            await asyncio.sleep(0.1)
        self._writing = asyncio.create_task(self._write())

    @property
    def is_idle(self) -> bool:
        """Whether the log has everything."""
        return not self.batch and not self._storing

    def control(self, control: Control, token: bytes) -> None:
        self.batch.control(control, token)
        self._due.set()

    def ticks(self, chunk: Chunk) -> None:
        """Raises BadTick where they are more than a frame may have."""
        if chunk.size > MOST_BYTES // 2:
            raise BadTick(f"a tick has at most {MOST_BYTES // 2} bytes in a cluster, not {chunk.size}")
        self.batch.ticks(chunk)
        self._due.set()

    async def _write(self) -> None:
        while True:
            await self._due.wait()
            if (early_s := self._written_s + GATHER_S - _now_s()) > 0:
                await asyncio.sleep(early_s)
            self._due.clear()
            self._written_s = _now_s()
            lanes, self._storing = self.batch.lanes, True
            into = self.link.names.into
            await self._store(
                [
                    (into(lanes, lane, self.name), f"{self.name} {secrets.token_hex(12)}", content)
                    for lane, content in self.batch.take()
                ]
            )
            self._storing = False
            if self.batch:
                self._due.set()

    async def _store(self, frames: list[tuple[str, str, bytes]]) -> None:
        """Write frames of different lanes; each again, under the same name, until it is stored."""
        while frames:
            sent: list[tuple[tuple[str, str, bytes], asyncio.Future[bool] | None]] = []
            for frame in frames:
                try:
                    sent.append((frame, await self.link.log(*frame)))
                except FAILURES:
                    sent.append((frame, None))
            frames = []
            for frame, future in sent:
                try:
                    if future is None:
                        raise TimeoutError
                    await self.link.stored(future)
                except FAILURES:
                    frames.append(frame)
            if frames:
                await asyncio.sleep(0.02)

    async def _receive(self, content: bytes) -> None:
        try:
            answers = read_answers(content)
        except WireError:
            return
        self.batch.divide(lanes_for(answers.engines))
        for preds in answers.preds:
            self._on_answers(preds)
        for said in answers.said:
            self._on_said(said)

    async def _lost(self) -> None:
        if self._link is not None:
            self._link.connection_lost()

    async def _returned(self) -> None:
        self.on_return()

    async def close(self) -> None:
        if self._writing is not None:
            await end_tasks(self._writing)
        if self._link is not None:
            with contextlib.suppress(*FAILURES):
                await self._link.nats.close()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
