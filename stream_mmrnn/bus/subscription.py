"""Subscription: the predictions of a running session in a program of yours, in order, as they come.

    for prediction in stream_mmrnn.subscribe():
        print(prediction.heads["turn_over"])

Each prediction is delivered once, with the meaning of its numbers; lost ones are counted by reason. The session never
waits for a reader.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn.bus import Subscriber
from stream_mmrnn.bus import registry as running
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.config import Policy
from stream_mmrnn.core.errors import NotRunning, TimedOut, UsageError, WireError
from stream_mmrnn.core.latency import stages
from stream_mmrnn.core.prediction_decoder import PredictionDecoder
from stream_mmrnn.core.types import Envelope, FloatArray, HeadSpec

_LOOK_MS = 100
_LIVES_NS = 1_000_000_000
"""After so long a silence it is looked whether the session's process is still there."""
_GONE_NS = 10_000_000_000
"""A bus from which nothing was heard for so long is gone: its processes say how they are twice a second."""
_MEANING_NS = 1_500_000_000
"""So long the first predictions wait for the engine to say what they mean, which it does twice a second."""
_LAST_NS = 1_000_000_000
"""After a session's end its last predictions come; later there are none."""
_ENGINE = topics.STATUS + "engine"


class Model(msgspec.Struct, frozen=True):
    """What the engine says of the model that predicts."""

    name: str
    sha256: str
    tick_ns: int
    heads: tuple[HeadSpec, ...]
    provider: str = ""


def model_of(spec: Any) -> Model:
    """The model in an engine's status; raises WireError where it is none."""
    try:
        return msgspec.convert(spec, Model)
    except msgspec.ValidationError as e:
        raise WireError(f"the engine's status names no model: {e}") from e


class PredictionView(msgspec.Struct, frozen=True, eq=False):
    """One prediction as a reader has it."""

    session: str
    tick: int
    event_ns: int
    """The tick's end, on the monotonic clock of the machine that predicts."""
    heads: dict[str, FloatArray]
    """By name, [size] float32; read-only. NaN where the model gave no number."""
    present: dict[str, bool]
    """By modality: whether there was data in this tick."""
    age_ns: dict[str, int]
    """By modality: the tick's end minus the newest sample's event time; -1 where there never was one."""
    stages_ns: dict[str, int]
    """Where the time went, one stage after another (`latency.STAGES`)."""
    missed: int
    """Ticks of the session between the prediction given before and this one: lost, or passed over by the policy."""
    model_sha256: str
    model: Model | None
    """None where the engine has not said yet what it serves."""

    @property
    def latency_ms(self) -> float:
        """From the tick's end until the prediction was sent."""
        return self.stages_ns["total"] / 1e6

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """By head, one name a number; heads without names are left out."""
        return MappingProxyType({h.name: h.labels for h in self._specs() if h.labels})

    @property
    def horizons_s(self) -> Mapping[str, tuple[tuple[float, float], ...]]:
        """By head, start and end of what each number speaks of, in seconds after the tick's end."""
        return MappingProxyType({h.name: h.horizons_s for h in self._specs() if h.horizons_s})

    @property
    def thresholds(self) -> Mapping[str, float]:
        """By head that says yes or no in one number: above it means yes."""
        return MappingProxyType(
            {h.name: h.threshold for h in self._specs() if h.kind == "classification" and h.size == 1}
        )

    def _specs(self) -> tuple[HeadSpec, ...]:
        return () if self.model is None else self.model.heads


def document(prediction: PredictionView) -> dict[str, Any]:
    """A prediction for JSON: what `stream-mmrnn predictions` prints and the page's WebSocket sends."""
    return {
        "session": prediction.session,
        "tick": prediction.tick,
        "event_ns": prediction.event_ns,
        "latency_ms": round(prediction.latency_ms, 3),
        "missed": prediction.missed,
        "heads": {
            # JSON has no NaN: null, as on the wire
            name: [v if math.isfinite(v) else None for v in values.tolist()]
            for name, values in prediction.heads.items()
        },
        "present": prediction.present,
        "age_ms": {name: None if ns < 0 else round(ns / 1e6, 3) for name, ns in prediction.age_ns.items()},
        "model": prediction.model_sha256,
    }


class Reading:
    """Envelopes of a bus in, predictions out: each once, with its meaning and what is missing before it. Pure."""

    def __init__(
        self,
        session: str | None = None,
        heads: Collection[str] | None = None,
        decoder: PredictionDecoder | None = None,
    ) -> None:
        """`session`: only of this session; `heads`: only these; `decoder`: one to share with other consumers."""
        self._session, self._heads = session, None if heads is None else frozenset(heads)
        self._decoder = decoder or PredictionDecoder()
        self._before: dict[str, int] = {}
        """By session the tick that was given last."""
        self.model: Model | None = None
        self.unreadable = 0
        self.closed_ns = 0
        """When the one session that is meant was said to be at its end; its last predictions come after that."""
        self.over = ""
        """Why no prediction comes any more."""

    @property
    def repeated(self) -> int:
        """Predictions that an engine said again after a crash; not given again."""
        return self._decoder.repeated

    def skip(self) -> None:
        """There was no listener for a while: messages of that time do not count as missed."""
        self._before.clear()

    def observe(self, envelope: Envelope) -> PredictionView | None:
        """The prediction of an envelope, if it holds a new one.

        Raises:
            UsageError: there is no such head.

        """
        try:
            if envelope.topic == topics.PREDICTION:
                return self._prediction(envelope)
            if envelope.topic == _ENGINE:
                self._status(wire.unpack(envelope.payload, wire.StatusMessage))
            elif envelope.topic == topics.SESSION and self._is_meant(envelope):
                op = wire.unpack(envelope.payload, wire.SessionMessage).op
                if op == "open":
                    self._before.pop(envelope.session, None)
                if self._session is not None and op != "streams":
                    self.closed_ns = envelope.received_ns if op == "close" else 0
            elif envelope.topic == topics.CONTROL:
                self.over = "the session was closed"
        except WireError:
            self.unreadable += 1
        return None

    def _is_meant(self, envelope: Envelope) -> bool:
        return self._session in (None, envelope.session)

    def _status(self, message: wire.StatusMessage) -> None:
        if message.state == "closed" and not message.counts.get("sessions"):
            self.over = "the session was closed"
        said = message.detail.get("spec")
        if said is not None:
            model = model_of(said)
            if self.model is None or model.sha256 != self.model.sha256:
                self.model = model

    def _prediction(self, envelope: Envelope) -> PredictionView | None:
        if not self._is_meant(envelope):
            return None
        p = self._decoder.decode(envelope)
        if p is None:
            return None
        before = self._before.get(envelope.session, p.tick - 1)
        self._before[envelope.session] = p.tick
        if self._heads is not None and (unknown := self._heads - p.heads.keys()):
            raise UsageError(f"there is no head {min(unknown)!r}; the model's are {', '.join(sorted(p.heads))}")
        heads = {}
        for name, values in p.heads.items():
            if self._heads is None or name in self._heads:
                heads[name] = np.array([np.nan if v is None else v for v in values], np.float32)
                heads[name].setflags(write=False)
        return PredictionView(
            envelope.session,
            p.tick,
            p.event_ns,
            heads,
            p.present,
            p.age_ns,
            stages(p.event_ns, p.closed, p.step_start_ns, p.step_end_ns, envelope.publish_ns),
            max(0, p.tick - before - 1),
            p.model,
            self.model,
        )


TOPICS = [topics.PREDICTION, topics.SESSION, topics.CONTROL, _ENGINE]
"""What a `Reading` wants of the bus."""


class Subscription:
    """The predictions of a running session: iterate over it, with `for` or `async for`, or ask by `receive`.

    Iteration ends when the session does. Not to be shared by threads.
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
    ) -> None:
        """Listen to the predictions of a running session; what comes from now on is given.

        `session`: its name, or the number of its process; without one the only session of this user that is running.
        `address`: HOST:PORT of a bus over tcp (its `bus.port`) instead, on this or another machine; `session` then says
        which of its sessions, without one all. `keys`: the folder with our key pair where that bus asks for keys, and
        `server_key` its public key (without one that of the folder). `heads`: only these.
        `policy`: what becomes of predictions that we are too slow for. `drop_oldest` keeps the newest `queue` of them,
        `latest` the newest one of each session, `block` all, up to `bus.queue` of them. The session never waits for us.
        `timeout`: seconds without a prediction after which iterating raises; without it only the session's end ends it.

        Raises:
            NotRunning: no such session is running, or its bus does not answer.
            TimedOut: while iterating, after `timeout`.
            UsageError: several sessions are running, or there is no such head, policy or address.
            FileError: there is no such folder of keys.

        """
        if isinstance(heads, str):
            heads = [heads]
        if policy not in ("latest", "drop_oldest", "block"):
            raise UsageError(f"there is no policy {policy!r}; use latest, drop_oldest or block")
        if queue < 1 or (timeout is not None and timeout < 0):
            raise UsageError("a queue holds one prediction at least, and a timeout is not negative")
        place, self._entry = running.reach(session, address, Path(keys) if keys else None, server_key)
        if self._entry is not None and not self._entry.engine:
            raise UsageError(f"the session {self._entry.session!r} only records: it has no predictions")
        self.session = self._entry.session if self._entry is not None else session
        """Its name; None at an address without a name: all sessions of that bus."""
        self._where = address or f"the session {self.session!r}"
        self._reading = Reading(self.session, heads)
        self._subscriber: Subscriber | None = Subscriber(place, TOPICS, queue, policy, midway=True)
        self._fileno = self._subscriber.fileno()
        self._held: deque[PredictionView] = deque(maxlen=1 if policy == "latest" else queue)
        """The first ones, until it is known what they mean."""
        self._overflow = "superseded" if policy == "latest" else "oldest"
        self._lost: Counter[str] = Counter()
        self._timeout_ns = None if timeout is None else round(timeout * 1e9)
        self._began_ns = self._asked_ns = now_ns()
        self._heard_ns = self._looked_ns = 0
        self.ended = ""
        """Why there are no more predictions; "" while some may come."""

    # ---- what it says of itself ------------------------------------------------------------------------------------

    @property
    def model(self) -> Model | None:
        """What predicts, as soon as the engine has said it."""
        return self._reading.model

    @property
    def lost(self) -> dict[str, int]:
        """Predictions since we listen that were not given, by reason: `lost` (they never reached us), and by policy
        `oldest`, `superseded` or `stale` (from before we looked again after a second or more).
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
        """Predictions that came again after an engine's crash, and were given once."""
        return self._reading.repeated

    @property
    def unreadable(self) -> int:
        """Messages that could not be read."""
        return self._reading.unreadable + (self._subscriber.garbage if self._subscriber is not None else 0)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> PredictionView | None:
        """The next prediction; None after `timeout` seconds without one, and at the end (`ended` says why).

        Raises:
            NotRunning: the bus did not answer in 10 s.
            UsageError: there is no such head.

        """
        until_ns = None if timeout is None else now_ns() + round(timeout * 1e9)
        while True:
            found = self._ready()
            if found is not None or self.ended:
                return found
            left_ms = _LOOK_MS if until_ns is None else min(_LOOK_MS, (until_ns - now_ns()) // 1_000_000)
            if left_ms < 0:
                return None
            self._receive(max(left_ms, 0))
            if left_ms == 0 and not self._held:
                return None

    def _ready(self) -> PredictionView | None:
        """A prediction that is here and whose meaning is known, or is waited for no longer."""
        waits = self.model is None and not self.ended and now_ns() - self._began_ns < _MEANING_NS
        if not self._held or waits:
            return None
        found = self._held.popleft()
        return found if found.model is not None else msgspec.structs.replace(found, model=self.model)

    def _receive(self, wait_ms: int) -> bool:
        """Read one message; whether one came. Without one, see whether any still can."""
        if self._subscriber is None:
            self.ended = self.ended or "it was closed here"
            return False
        envelope = self._subscriber.receive(wait_ms)
        at_ns = now_ns()
        if envelope is None:
            self._poll(at_ns)
            return False
        self._heard_ns = at_ns
        found = self._reading.observe(envelope)
        if found is not None:
            if len(self._held) == self._held.maxlen:
                self._lost[self._overflow] += 1
            self._held.append(found)
        self.ended = self.ended or self._reading.over
        return True

    def _poll(self, at_ns: int) -> None:
        """Nothing came: is anybody there?"""
        silent_ns = at_ns - max(self._heard_ns, self._began_ns)
        if self._reading.closed_ns and at_ns - self._reading.closed_ns > _LAST_NS:
            self.ended = "the session was closed"
        elif silent_ns > _LIVES_NS and at_ns - self._looked_ns > _LIVES_NS and self._entry is not None:
            self._looked_ns = at_ns
            if not self._entry.alive():
                self.ended = "the session's process is gone"
        if not self.ended and silent_ns > _GONE_NS:
            if not self._heard_ns:
                raise NotRunning(
                    f"nothing was heard from {self._where}: is it running, does it ask for keys, and is ours allowed?"
                )
            self.ended = "nothing was heard of it any more"

    def _check_time(self) -> None:
        if self._timeout_ns is not None and now_ns() - self._asked_ns > self._timeout_ns:
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
        await asyncio.sleep(0)  # others have their turn, however many predictions wait here
        while (found := self._ready()) is None:
            if self.ended:
                self.close()
                raise StopAsyncIteration
            if not self._receive(0):
                self._check_time()
                await self._readable()
        return found

    async def _readable(self) -> None:
        """Until something may have come, a while at most. Cancelled at any moment it leaves nothing behind."""
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        try:
            loop.add_reader(self._fileno, came.set)
        except NotImplementedError:  # Windows's own loop watches no file descriptors
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
        """Listen no more; what was counted stays."""
        subscriber, self._subscriber = self._subscriber, None
        if subscriber is None:
            return
        self._lost.update(self._counted(subscriber))
        self._reading.unreadable += subscriber.garbage
        subscriber.close()
        self.ended = self.ended or "it was closed here"

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_subscriber"):  # else it failed before it listened
            self.close()


subscribe = Subscription
"""How a program asks for it: `for prediction in stream_mmrnn.subscribe(): ...`."""
