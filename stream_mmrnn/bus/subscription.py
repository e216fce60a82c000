"""Subscription: the predictions of a running session in a program of yours, in order, as they come.

    for prediction in stream_mmrnn.subscribe():
        print(prediction.heads["turn_over"])

Each prediction is delivered once, with its labels, horizons and thresholds; lost ones are counted by reason. The
session never waits for a reader.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Collection
from functools import partial
from pathlib import Path

import msgspec

from stream_mmrnn.bus import Subscriber
from stream_mmrnn.bus import registry as running
from stream_mmrnn.bus.prediction_reader import ENGINE, Model, PredictionReader, PredictionView
from stream_mmrnn.core import topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import NotRunning, TimedOut, UsageError
from stream_mmrnn.core.settings import Policy

_LOOK_MS = 100
_LIVES_NS = 1_000_000_000
"""Time without messages after which we check whether the session's process is alive."""
_GONE_NS = 10_000_000_000
"""Time without messages after which the bus counts as gone: its processes send a status twice a second."""
_MEANING_NS = 1_500_000_000
"""The first predictions wait at most this long for the engine's status (sent twice a second), which has the model."""
_LAST_NS = 2_000_000_000
"""Time after a session's close in which its last predictions may arrive."""


TOPICS = [topics.PREDICTION, topics.SESSION, topics.CONTROL, ENGINE]
"""The topics that a `PredictionReader` needs."""


class Subscription:
    """The predictions of a running session: iterate with `for` or `async for`, or call `receive`.

    Iteration ends when the session ends. Not thread-safe.
    """

    def __init__(
        self,
        session: str | None = None,
        *,
        address: str = "",
        keys: Path | str | None = None,
        server_key: str = "",
        heads: Collection[str] | None = None,
        policy: Policy = "drop_oldest",
        queue: int = 256,
        timeout: float | None = None,
        wait: float | None = None,
    ) -> None:
        """Subscribe to a running session, from now on.

        `session`: its name or process id; None means this user's only running session.
        `address`: instead, HOST:PORT of a bus over tcp (its `bus.port`), on this or another machine; `session` then
        selects one of its sessions, None means all. `keys`: the folder with our key pair, if that bus needs keys;
        `server_key`: its public key, by default that of the folder. `heads`: only these.
        `policy`: what happens if this reader is too slow. `drop_oldest` keeps the newest `queue` predictions, `latest`
        the newest one of each session, `block` all, up to `bus.queue`. The session never waits for a reader.
        `timeout`: seconds without a prediction after which iteration raises; None means no timeout.
        `wait`: seconds that iteration and `receive` wait for the session to appear; of an `address`, for its first
        message. They raise the errors then, and `session` is the name that was asked for until it is found. None or 0
        raises at once (of an address: after 10 s).

        Raises:
            NotRunning: no such session is running, or its bus does not answer.
            TimedOut: while iterating, after `timeout`.
            UsageError: several sessions are running, or the head, policy or address does not exist.
            FileError: the folder of keys does not exist.

        """
        if isinstance(heads, str):
            heads = [heads]
        if policy not in ("latest", "drop_oldest", "block"):
            raise UsageError(f"there is no policy {policy!r}; use latest, drop_oldest or block")
        if queue < 1 or (timeout or 0) < 0 or (wait or 0) < 0:
            raise UsageError("a queue holds one prediction at least, and timeout and wait are not negative")
        self.session = session
        """The session's name; None means all sessions at an address."""
        self.ended = ""
        """The reason why there are no more predictions; "" while more may come."""
        self._heads, self._queue, self._policy = heads, queue, policy
        self._reading = PredictionReader(session, heads)
        self._subscriber: Subscriber | None = None
        self._entry: running.Entry | None = None
        self._held: deque[PredictionView] = deque(maxlen=1 if policy == "latest" else queue)
        """The first predictions, until the model is known."""
        self._overflow = "superseded" if policy == "latest" else "oldest"
        self._lost: Counter[str] = Counter()
        self._timeout_ns = None if timeout is None else round(timeout * 1e9)
        self._began_ns = self._asked_ns = now_ns()
        self._heard_ns = self._looked_ns = 0
        self._where = address or f"the session {session!r}"
        self._unheard_ns = round(wait * 1e9) if wait and address else _GONE_NS
        """Time without a first message after which the bus counts as absent."""
        find = partial(running.reach, session, address, Path(keys) if keys else None, server_key)
        self._search = running.SessionSearch(find, wait or 0)
        self._connect()

    def _connect(self) -> bool:
        """Look for the session, and subscribe to it if it is there; False while it may still appear."""
        found = self._search.poll()
        if found is None:
            return False
        place, entry = found
        if entry is not None:
            if not entry.engine:
                raise UsageError(f"the session {entry.session!r} only records: it has no predictions")
            self._entry, self.session = entry, entry.session
            self._where = f"the session {entry.session!r}"
        self._reading = PredictionReader(self.session, self._heads)
        self._subscriber = Subscriber(place, TOPICS, self._queue, self._policy, midway=True)
        self._fileno = self._subscriber.fileno()
        self._began_ns = self._asked_ns = now_ns()
        return True

    # ---- properties ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Model | None:
        """The model that predicts; None until the engine's status has arrived."""
        return self._reading.model

    @property
    def lost(self) -> dict[str, int]:
        """Predictions not delivered since the subscription began, by reason: `lost` (never arrived), and by policy
        `oldest`, `superseded` or `stale` (too old after this reader paused for a second or more).
        """
        counts = Counter(self._lost)
        if self._subscriber is not None:
            counts.update(self._counted(self._subscriber))
        return {reason: n for reason, n in counts.items() if n}

    @staticmethod
    def _counted(subscriber: Subscriber) -> dict[str, int]:
        tally = subscriber.tally().get(topics.PREDICTION, {})
        return {k: n for k, n in tally.items() if k not in ("produced", "delivered", "waiting")}

    @property
    def repeated(self) -> int:
        """Duplicates after an engine's crash; each prediction was delivered once."""
        return self._reading.repeated

    @property
    def unreadable(self) -> int:
        """Messages that could not be decoded."""
        return self._reading.unreadable + (self._subscriber.garbage if self._subscriber is not None else 0)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> PredictionView | None:
        """The next prediction; None on timeout (in seconds) and at the session's end (`ended` has the reason).

        Raises:
            NotRunning: the session did not appear within `wait`, or its bus did not answer within 10 s.
            UsageError: several sessions are running, or a selected head does not exist.

        """
        until_ns = None if timeout is None else now_ns() + round(timeout * 1e9)
        while True:
            found = self._ready()
            if found is not None or self.ended:
                return found
            left_ms = _LOOK_MS if until_ns is None else min(_LOOK_MS, max(0, (until_ns - now_ns()) // 1_000_000))
            self._receive(left_ms)
            if left_ms == 0 and not self._held:
                return None

    def _ready(self) -> PredictionView | None:
        """The first held prediction, once the model is known or the wait for it is over."""
        waits = self.model is None and not self.ended and now_ns() - self._began_ns < _MEANING_NS
        if not self._held or waits:
            return None
        found = self._held.popleft()
        return found if found.model is not None else msgspec.structs.replace(found, model=self.model)

    def _receive(self, wait_ms: int) -> bool:
        """Read one message; returns whether one arrived. If not, check whether the session is alive."""
        if self._subscriber is None:
            if not self.ended and not self._connect():
                time.sleep(wait_ms / 1000)
            return False
        envelope = self._subscriber.receive(wait_ms)
        at_ns = now_ns()
        if envelope is None:
            self._poll(at_ns)
            return False
        if not self._heard_ns:
            self._began_ns = at_ns  # the engine may start long after this reader
        self._heard_ns = at_ns
        found = self._reading.observe(envelope)
        if found is not None:
            if len(self._held) == self._held.maxlen:
                self._lost[self._overflow] += 1
            self._held.append(found)
        self.ended = self.ended or self._reading.over
        closed_ns = self._reading.closed_sent_ns
        if not self.ended and closed_ns and envelope.publish_ns - closed_ns > _LAST_NS:
            self.ended = "the session was closed"  # others on the same bus go on
        return True

    def _poll(self, at_ns: int) -> None:
        """Without a message: check whether the session has ended or is gone."""
        silent_ns = at_ns - max(self._heard_ns, self._began_ns)
        if self._reading.closed_ns and at_ns - self._reading.closed_ns > _LAST_NS:
            self.ended = "the session was closed"
        elif silent_ns > _LIVES_NS and at_ns - self._looked_ns > _LIVES_NS and self._entry is not None:
            self._looked_ns = at_ns
            if not self._entry.alive():
                self.ended = "the session's process is gone"
        if not self.ended and silent_ns > (_GONE_NS if self._heard_ns else self._unheard_ns):
            if not self._heard_ns:
                raise NotRunning(
                    f"nothing was heard from {self._where} in {self._unheard_ns / 1e9:g} s: is it running, does it "
                    "ask for keys, and is ours allowed?"
                )
            self.ended = "nothing was heard of it any more"

    def _check_time(self) -> None:
        waits = self._subscriber is None  # for the session
        if self._timeout_ns is not None and not waits and now_ns() - self._asked_ns > self._timeout_ns:
            raise TimedOut(f"no prediction came from {self._where} in {self._timeout_ns / 1e9:g} s")

    def __iter__(self) -> Subscription:
        return self

    def __next__(self) -> PredictionView:
        self._asked_ns = now_ns()
        while (found := self.receive(_LOOK_MS / 1000)) is None:
            if self.ended:
                self.close()
                raise StopIteration
            self._check_time()
        return found

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> PredictionView:
        self._asked_ns = now_ns()
        await asyncio.sleep(0)  # let other tasks run, even if many predictions are available
        while (found := self._ready()) is None:
            if self.ended:
                self.close()
                raise StopAsyncIteration
            if not self._receive(0):
                self._check_time()
                await self._readable()
        return found

    async def _readable(self) -> None:
        """Wait until a message may have arrived, for a bounded time. Safe to cancel."""
        if self._subscriber is None:
            await asyncio.sleep(_LOOK_MS / 1000)
            return
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        try:
            loop.add_reader(self._fileno, came.set)
        except NotImplementedError:  # the default event loop of Windows cannot watch file descriptors
            await asyncio.sleep(0.005)
            return
        try:
            async with asyncio.timeout(_LOOK_MS / 1000):
                await came.wait()
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(self._fileno)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the subscription; its counts stay available."""
        self.ended = self.ended or "it was closed here"
        subscriber, self._subscriber = self._subscriber, None
        if subscriber is None:
            return
        self._lost.update(self._counted(subscriber))
        self._reading.unreadable += subscriber.garbage
        subscriber.close()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_subscriber"):  # else __init__ failed before
            self.close()


subscribe = Subscription
"""For programs: `for prediction in stream_mmrnn.subscribe(): ...`."""
