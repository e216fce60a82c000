"""The processes: each joins a generator to the bus, says how it is, and ends when told or when its parent is gone.

A node is a function of a `Context`; `run` is what a new process executes. Knows nothing about the order in which
nodes start or what happens when one dies: that is the supervisor's.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from stream_mmrnn import config, signals, topics, wire
from stream_mmrnn.bus import Address, Caller, Publisher, Subscriber, Tap, run_broker
from stream_mmrnn.clock import Sparingly, WallClock, now_ns
from stream_mmrnn.disk import part
from stream_mmrnn.errors import SessionError, SourceError, StreamError, WireError
from stream_mmrnn.repeats import Repeats
from stream_mmrnn.types import Envelope

if TYPE_CHECKING:
    from stream_mmrnn.pipeline import Pump

_STATUS_PERIOD_NS = 500_000_000
_CALM_MS = 4
"""So long after a message its prediction is out, and the next one is still to come."""
_UNHURRIED = ("recorder", "dashboard", "journal")
"""What may come later: files and pages, and what is for a bad day."""
_JOURNAL_MS = 50
"""The journal takes what has come this often: woken for each message it would take a core from who is in haste."""
_PREWARM_PERIOD_NS = 200_000_000
"""What comes less often than this is not expected at a time that could be named."""
_JOURNAL_NICE = 5
_MAX_TYPED = 64
"""Lines typed on the page that wait for the bus."""
_MAX_NODES = 64
"""Processes whose last status a recording keeps."""


class Context:
    """What a process is given at its birth. Picklable: it crosses to a fresh interpreter."""

    def __init__(
        self,
        name: str,
        settings: config.Settings,
        address: Address,
        ready: Event,
        stop: Event,
        epoch: Synchronized[int],
        restarts: int = 0,
    ) -> None:
        self.name, self.settings, self.address = name, settings, address
        self.ready, self.stop, self.epoch, self.restarts = ready, stop, epoch, restarts
        self.note = ""
        """What is to be said of the process that runs this node."""
        self.stdin: Any = None
        """The terminal's input on its way to the text worker: `detach()` gives the file descriptor."""

    def alive(self) -> bool:
        """False once this process shall end: it was told, or nobody is left who could tell it."""
        parent = multiprocessing.parent_process()
        return not self.stop.is_set() and (parent is None or parent.is_alive())


class Reporter:
    """Publishes a node's status twice a second and at once when its state changes."""

    def __init__(self, context: Context, publisher: Publisher, modality: str = "") -> None:
        self._publisher, self._name, self._modality = publisher, context.name, modality
        self._next_ns = 0
        self._state: Any = "starting"
        self._reason = ""
        self.counts: Callable[[], dict[str, int]] = dict
        self.detail: Callable[[], dict[str, Any]] = dict

    def say(self, state: str, reason: str = "") -> None:
        self._state, self._reason = state, reason
        self._send()

    def say_if_new(self, state: str, reason: str) -> None:
        """Say it where it was not the last thing said."""
        if (state, reason) != (self._state, self._reason):
            self.say(state, reason)

    def wait_ms(self, most_ms: int) -> int:
        """How long to wait for a message at most: a status that is due goes out in the calm after one."""
        return min(most_ms, _CALM_MS) if now_ns() >= self._next_ns else most_ms

    def keep(self, calm: bool = True) -> None:
        """Say it again where it is time; not in the middle of messages, unless they leave no calm."""
        late_ns = now_ns() - self._next_ns
        if late_ns >= (0 if calm else _STATUS_PERIOD_NS):
            self._send()

    def _send(self) -> None:
        at_ns = now_ns()
        self._next_ns = at_ns + _STATUS_PERIOD_NS
        message = wire.StatusMessage(
            self._name, self._state, os.getpid(), self._modality, self._reason, self.counts(), self.detail()
        )
        self._publisher.publish(
            topics.STATUS + self._name, topics.EVERYONE, at_ns, at_ns, wire.pack(message), self._name
        )


def _hear_clock(context: Context, subscriber: Subscriber) -> Envelope | None:
    """Wait for the first clock message: the proof that the bus reaches us."""
    for envelope in subscriber.stream(context.alive):
        if envelope.topic == topics.CLOCK:
            return envelope
    return None


def broker(context: Context) -> None:
    """The bus itself; where it asks for keys it says who was refused, through itself like everyone else."""
    settings = context.settings.bus
    door = None
    if settings.keys:
        from stream_mmrnn.keys import Folder

        door = Folder(Path(settings.keys)).door()
    reporter: Reporter | None = None
    publisher: Publisher | None = None

    def alive() -> bool:
        """Asked again and again by one thread, which is the one that reports."""
        nonlocal reporter, publisher
        going = not context.stop.wait(0.1) and context.alive()
        if door is not None:
            if publisher is None or reporter is None:
                publisher = Publisher(context.address, settings.queue)
                reporter = Reporter(context, publisher)
                reporter.counts = lambda: {"admitted": door.admitted, "denied": sum(door.refused.values())}
                reporter.detail = lambda: {"denied": dict(door.refused)}
                reporter.say("ready")
            # a new reason is said at once, a further number of an old one in its turn
            reporter.say_if_new("ready", _denials(door.refused))
            reporter.keep()
            if not going:
                publisher.close(0)
        return going

    run_broker(
        context.address,
        settings.queue,
        context.ready.set,
        alive,
        bulk_queue=settings.bulk_queue,
        view_queue=settings.view_queue,
        door=door,
    )


_DENIED = {
    "key_not_allowed": "with a key that is not allowed",
    "no_key": "without a key",
    "wrong_server_key": "with another server's key",
    "unfinished": "that broke off before it had shown a key",
}


def _denials(refused: dict[str, int]) -> str:
    """One sentence, which changes with the reasons and not with every number."""
    reasons = [words for reason, words in _DENIED.items() if refused.get(reason)]
    return f"refused connections {', '.join(reasons)}" if reasons else ""


def clock(context: Context) -> None:
    publisher = Publisher(context.address, context.settings.bus.queue)
    period_ns = int(1e9 / context.settings.bus.clock_hz)
    context.ready.set()
    due_ns = now_ns()
    while context.alive():
        due_ns = max(due_ns + period_ns, now_ns() - period_ns)  # after a stall: no burst of old ticks
        time.sleep(max(due_ns - now_ns(), 0) / 1e9)
        at_ns = now_ns()
        publisher.publish(topics.CLOCK, topics.EVERYONE, at_ns, at_ns, b"")
    publisher.close()


def journal(context: Context) -> None:
    """What an engine needs that has to go on after a crash: the last of the bus, and checkpoints."""
    from stream_mmrnn.journal import Ask, Journal, Keep, read_request

    settings = context.settings
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_JOURNAL_NICE)  # before the sockets' threads are there: it wakes often, and nobody shall wait for it
    publisher = Publisher(context.address, settings.bus.queue)
    tap = Tap(context.address, [topics.FEATURE, topics.SESSION, topics.TICK, topics.CLOCK], settings.bus.queue)
    kept = Journal(settings.state.journal_s, settings.state.journal_mb << 20, complete=not context.restarts)
    reporter = Reporter(context, publisher)
    reporter.counts = lambda: {"messages": len(kept), "bytes": kept.bytes, "checkpoints": kept.kept}
    asked: tuple[bytes, Ask, int] | None = None
    garbage = 0

    def take() -> None:
        nonlocal garbage
        for frames in tap.messages():
            if len(frames) == 3:
                kept.add((frames[0], frames[1], frames[2]), now_ns())
            else:
                garbage += 1

    while context.alive():
        came = tap.request(5 if asked else _JOURNAL_MS)
        take()
        if came is not None:
            try:
                message = read_request(came[1])
            except WireError:
                garbage += 1
                continue
            if isinstance(message, Keep):
                kept.keep(message)
            else:
                asked = (came[0], message, now_ns() + 1_000_000_000)
        if asked is not None:
            who, ask, until_ns = asked
            if kept.heard(ask.until) or now_ns() > until_ns:
                tap.answer(who, msgspec.msgpack.encode(kept.answer(ask)))
                asked = None
        if len(kept) and not context.ready.is_set():
            # the clock is asked for last: all else is heard, too
            reporter.say("ready")
            context.ready.set()
        reporter.keep()
    tap.close()
    publisher.close()


def _join_typed(context: Context, pump: Pump) -> None:
    """What is typed on the page, joined to the lines of the source: from there on it is a line like any other."""
    from stream_mmrnn.sources.text import typed

    settings = context.settings

    def going() -> bool:
        return context.alive() and not pump.ended

    for sample in typed(context.address, settings.session.name, settings.text, going):
        pump.put(sample)


def worker(context: Context, modality: str, spec: str) -> None:
    """A source and its encoder. A device that is not there is asked for again; the session does not wait for it."""
    from stream_mmrnn import encoders, sources
    from stream_mmrnn.pipeline import Outgoing, Pump, capture
    from stream_mmrnn.prewarm import Prewarmer
    from stream_mmrnn.rhythm import Rhythm

    settings = context.settings
    publisher = Publisher(context.address, settings.bus.bulk_queue)
    reporter = Reporter(context, publisher, modality)
    rhythm = Rhythm(topics.MODALITIES[modality].dense)
    encoder = encoders.create(modality)
    stdin_fd = context.stdin.detach() if context.stdin is not None else -1
    source = sources.create(spec, modality, settings, stdin_fd)
    counts = dict.fromkeys(("captured", "queue_dropped", "undecodable", "published"), 0)
    session, feature = settings.session.name, topics.feature(modality)
    state: dict[str, Any] = {"pump": None, "before": (0, 0)}

    def tally() -> dict[str, int]:
        pump: Pump | None = state["pump"]
        produced, dropped = state["before"]
        if pump is not None:
            produced, dropped = produced + pump.produced, dropped + pump.dropped
        refused = publisher.refused.get(feature, 0)
        stale = {"stale": rhythm.silences, "stale_ms": rhythm.stale_ns(now_ns()) // 1_000_000}
        return {**counts, "captured": produced, "queue_dropped": dropped, "refused": refused, **stale}

    def bad(_: WireError) -> None:
        counts["undecodable"] += 1

    reporter.counts = tally
    reporter.detail = lambda: {"source": source.origin, "encoder": encoder.origin, **source.info}
    # a publisher hears the clock by being heard: the broker tells it who listens
    publisher.wait_for_reader(topics.STATUS, 2.0)
    gc.collect()
    gc.freeze()
    context.ready.set()
    while not context.epoch.value and context.alive():
        time.sleep(0.002)
    publisher.wait_for_reader(feature, 2.0)

    def send(out: Outgoing) -> None:
        sample = out.sample
        publisher.publish(
            out.topic, session, sample.event_ns, sample.capture_ns, sample.data, out.origin, sample.device_ns
        )
        if out.topic == feature:
            counts["published"] += 1

    def run_once() -> None:
        encoder.reset()
        source.open()
        reporter.say("open")
        pump = state["pump"] = Pump(
            source.samples(context.alive, context.epoch.value),
            settings.queues.policy(modality),
            settings.queues.length,
            context.alive,
        )
        pump.start()
        typing = threading.Thread(target=_join_typed, args=(context, pump), name="typed", daemon=True)
        if modality == "text" and settings.dashboard.enabled:
            typing.start()

        def warm() -> None:
            encoder.prewarm()
            publisher.prewarm()

        prewarmer, newest_ns = Prewarmer(warm, 0), 0

        def arriving() -> Iterator[Any]:
            nonlocal newest_ns
            while context.alive() and not pump.ended:
                at_ns = now_ns()
                wait_ms = prewarmer.wait_ms(at_ns, reporter.wait_ms(100))
                sample = pump.read(rhythm.wait_s(at_ns, wait_ms / 1000))
                if sample is None:
                    if rhythm.fall_silent(now_ns()):
                        reporter.say("stale")
                    if not prewarmer.run_if_due(now_ns()):
                        reporter.keep()
                    continue
                if rhythm.hear(sample.capture_ns):
                    reporter.say("open")
                # the next is expected as long after this one as this one came after its predecessor
                prewarmer.period_ns, newest_ns = sample.event_ns - newest_ns, sample.event_ns
                if settings.engine.prewarm and 0 < prewarmer.period_ns < _PREWARM_PERIOD_NS:
                    prewarmer.stepped(sample.event_ns)
                yield sample
                reporter.keep(calm=False)

        try:
            for out in capture(arriving(), modality, source.origin, encoder, bad):
                send(out)
        finally:
            rhythm.stop(now_ns())
            pump.discard()
            pump.join(0.5)
            if typing.ident is not None:
                typing.join(0.5)
            pump.discard()
            produced, dropped = state["before"]
            state.update(pump=None, before=(produced + pump.produced, dropped + pump.dropped))

    final, reason = "closed", ""
    while context.alive():
        try:
            run_once()
            final, reason = "ended" if context.alive() else "closed", ""
            break
        except SourceError as e:
            reason = str(e)
            reporter.say("missing", reason)
            context.stop.wait(settings.supervisor.reopen_s)
        finally:
            source.close()
    reporter.say(final, reason)
    publisher.close()


def engine(context: Context) -> None:
    """Ticks and predictions from features: the aligner and the step engine over a bus subscriber."""
    from stream_mmrnn.align import Aligner
    from stream_mmrnn.pipeline import predict
    from stream_mmrnn.prewarm import Prewarmer
    from stream_mmrnn.resume import Checkpoints
    from stream_mmrnn.shards import create

    settings = context.settings
    step_engine = create(settings.engine)
    spec = step_engine.spec
    aligner = Aligner.of(spec.modalities, spec.tick_ns, settings.align)
    publisher = Publisher(context.address, settings.bus.queue)
    subscriber = Subscriber(context.address, [topics.FEATURE, topics.CLOCK, topics.SESSION], settings.bus.queue)
    reporter = Reporter(context, publisher)
    counts = {"ticks": 0, "predictions": 0, "refused": 0}
    sparingly = Sparingly()

    def warm() -> None:
        step_engine.prewarm()
        publisher.prewarm()
        subscriber.prewarm()

    prewarmer = Prewarmer(warm, spec.tick_ns)
    contract = {
        "name": spec.name,
        "sha256": spec.sha256,
        "provider": step_engine.provider,
        "tick_ns": spec.tick_ns,
        **msgspec.to_builtins({"modalities": spec.modalities, "heads": spec.heads}),
    }
    reporter.counts = lambda: {
        **counts,
        "sessions": len(step_engine),
        "prewarmed": prewarmer.runs,
        "garbage": subscriber.garbage + aligner.malformed,
    }
    every = settings.state.snapshot_every
    caller = Caller(context.address) if every else None
    checkpoints = (
        Checkpoints(caller, every, step_engine, aligner, subscriber, publisher, counts) if caller is not None else None
    )
    missed: deque[Envelope] = deque()
    anew = ""
    reporter.detail = lambda: {
        "spec": contract,
        "anew": anew,
        "streams": {
            name: {
                **msgspec.to_builtins(c),
                "lost": subscriber.gaps.lost.get(topics.feature(name), 0),
                "arrived": subscriber.gaps.received.get(topics.feature(name), 0),
            }
            for name, c in aligner.counts.items()
        },
        "misfits": aligner.misfits,
    }
    heard = _hear_clock(context, subscriber)
    publisher.wait_for_reader(topics.PREDICTION, 2.0)
    if context.restarts and heard is not None:
        try:
            if checkpoints is None:
                raise SessionError("state.snapshot_every is 0")
            missed.extend(checkpoints.resume(heard))
        except StreamError as e:
            anew = f"the session begins anew: {e}"
    reporter.say("ready", "; ".join(filter(None, (context.note, anew))))
    gc.collect()
    gc.freeze()  # what is there now stays: a collection need not look at it in the middle of a step
    context.ready.set()

    def refused(session: str, error: SessionError) -> None:
        counts["refused"] += 1
        if sparingly("refused", now_ns()):
            reporter.say("ready", f"session {session!r} was refused: {error}")

    def messages() -> Iterator[Envelope]:
        told = 0
        while context.alive():
            envelope: Envelope | None
            if missed:
                subscriber.gaps.see(envelope := missed.popleft())
            elif (envelope := subscriber.receive(prewarmer.wait_ms(now_ns(), reporter.wait_ms(100)))) is None:
                if not prewarmer.run_if_due(now_ns()):
                    reporter.keep()
                continue
            yield envelope
            # back here, the message and all its predictions are dealt with
            if len(aligner.misfits) > told:
                told = len(aligner.misfits)
                name, why = list(aligner.misfits.items())[-1]
                reporter.say("ready", f"{name} is quarantined, {why}")
            if envelope.topic == topics.SESSION:
                if envelope.session not in step_engine:
                    subscriber.gaps.end(envelope.session)
                    publisher.end(envelope.session)
                if not len(step_engine):
                    reporter.say("closed")
            if checkpoints is not None:
                checkpoints.keep_if_due(envelope)
            reporter.keep(calm=False)

    more = subscriber.waiting if settings.engine.slots > 1 else None
    for prediction in predict(messages(), aligner, step_engine, refused, more):
        tick = prediction.tick
        publisher.publish(
            topics.PREDICTION,
            tick.session,
            tick.event_ns,
            prediction.step_end_ns,
            wire.pack(wire.prediction_message(prediction)),
        )
        sent = publisher.publish(
            topics.TICK,
            tick.session,
            tick.event_ns,
            prediction.step_start_ns,
            wire.pack(wire.tick_message(tick)),
        )
        counts["ticks"] += 1
        counts["predictions"] += 1
        if checkpoints is not None:
            checkpoints.stepped(sent, tick.index)
        if settings.engine.prewarm:
            prewarmer.stepped(prediction.step_start_ns)
    step_engine.stop()
    if caller is not None:
        caller.close()
    subscriber.close()
    publisher.close()


_CLOSE_S = 0.4
"""How long what waits for the disk is still written at the end: the supervisor waits a little longer."""


def recorder(context: Context) -> None:
    """Everything of the session, as it comes, into a file. Reading the bus never waits for the disk."""
    from stream_mmrnn.recording import Recorder, Recording
    from stream_mmrnn.spool import Spool

    settings = context.settings
    publisher = Publisher(context.address, settings.bus.queue)
    wanted = [topics.FEATURE, topics.CLOCK, topics.SESSION, topics.TICK, topics.PREDICTION, topics.STATUS]
    wanted += [topics.CONTROL, topics.LABEL, *([topics.RAW] if settings.record.raw else [])]
    subscriber = Subscriber(context.address, wanted, settings.bus.queue)
    reporter = Reporter(context, publisher)
    if not context.alive():
        return  # told to end before it began: no file is better than an empty one
    path, wall_offset_ns = Path(settings.record.path), None
    if context.restarts:
        with contextlib.suppress(StreamError):  # one that died at once has left no head
            wall_offset_ns = int(Recording(path).metadata["wall_offset_ns"])
    file = Recorder(
        part(path, context.restarts),
        settings.session.name,
        {
            "part": str(context.restarts + 1),
            "raw": str(settings.record.raw).lower(),
            "slots": str(settings.engine.slots),
            "model": settings.engine.model,
            "model_sha256": _model_sha256(settings.engine.model),
            "config": msgspec.json.encode(settings).decode(),
            "platform": sys.platform,
        },
        settings.record.chunk_ms,
        wall_offset_ns,
    )
    spool = Spool(
        file,
        int(settings.record.queue_mb * 1e6),
        settings.record.policy,
        settings.record.fsync_ms,
        later_part=context.restarts > 0,
    )
    statuses: dict[str, Any] = {}
    # an engine that went on after a crash says again what is in the file already
    repeats = {topic: Repeats() for topic in (topics.TICK, topics.PREDICTION)}

    def again(envelope: Envelope) -> bool:
        if envelope.topic not in repeats:
            return False
        try:
            return not repeats[envelope.topic].first(envelope.session, wire.tick_index(envelope.payload))
        except WireError:
            return False  # the file says what was sent

    wall = WallClock()
    reporter.counts = lambda: {
        **spool.counts,
        "wall_steps": wall.steps,
        "repeated": sum(r.count for r in repeats.values()),
        "garbage": subscriber.garbage,
    }
    reporter.detail = lambda: {"path": str(file.path), "messages": file.counts.copy()}
    if _hear_clock(context, subscriber) is not None:
        reporter.say("ready")
    context.ready.set()
    opened = context.restarts > 0
    how, trouble = "the recorder was ended before the session", ""
    while context.alive():
        envelope = subscriber.receive(50)
        at_ns = now_ns()
        if step_ns := wall.look(at_ns):
            spool.note_wall_step(at_ns, step_ns)
            reporter.say(
                "ready",
                f"the wall clock was set by {step_ns / 1e9:+.3f} s; the recording's dates count on from its beginning",
            )
        reporter.keep()
        if trouble != spool.trouble:
            trouble = spool.trouble
            reporter.say("ready", trouble)
        if envelope is None:
            continue
        if envelope.topic.startswith(topics.STATUS):
            with contextlib.suppress(WireError):
                if envelope.topic not in statuses and len(statuses) >= _MAX_NODES:
                    continue
                statuses[envelope.topic] = wire.unpack(envelope.payload, wire.StatusMessage)
        elif envelope.topic == topics.CONTROL:
            how = "clean"
            break
        elif envelope.session in (file.session, topics.EVERYONE):
            opened = opened or envelope.topic == topics.SESSION
            if opened and not again(envelope):  # asked once: whoever waits for room is no repetition of itself
                while not spool.put(envelope) and context.alive():
                    reporter.keep()
                    time.sleep(0.005)
    end = {
        "ended": how,
        "repeated": msgspec.json.encode({t: r.count for t, r in repeats.items() if r.count}).decode(),
        "statuses": msgspec.json.encode(statuses).decode(),
    }
    if not spool.close(end, _CLOSE_S):
        reporter.say("ready", f"{file.path.name} has no end, because the disk did not take it")
    reporter.say("closed")
    subscriber.close()
    publisher.close()


def _model_sha256(name: str) -> str:
    """Of the model that predicts in this session; "" where there is none (a recording may be made without one)."""
    with contextlib.suppress(StreamError, OSError):
        return hashlib.sha256(config.find_model(name).read_bytes()).hexdigest()
    return ""


def dashboard(context: Context) -> None:
    """The live page's server, over a view of the bus that it owns alone."""
    from stream_mmrnn import keys
    from stream_mmrnn.dashboard.server import Dashboard
    from stream_mmrnn.dashboard.state import LiveState

    settings = context.settings
    publisher = Publisher(context.address, settings.bus.queue)
    subscriber = Subscriber(
        context.address,
        [topics.FEATURE, *topics.raws("text"), topics.LABEL, topics.CLOCK, topics.PREDICTION, topics.STATUS],
        settings.bus.view_queue,
        "drop_oldest",
    )
    looking = _Looking(context)
    view = LiveState()
    typed: deque[bytes] = deque()

    def take_line(body: bytes) -> str:
        """In the server's thread: the bus is ours."""
        if why := view.typing()["why"]:
            return str(why)
        try:
            line = msgspec.json.decode(body, type=str).strip().encode()
        except (msgspec.MsgspecError, UnicodeError):
            return "a line is a JSON string"
        if not line or len(line) > settings.text.max_line_bytes:
            return f"a line has 1 to {settings.text.max_line_bytes} bytes, this one has {len(line)}"
        if len(typed) >= _MAX_TYPED:
            return "more was typed than could be sent; wait a moment"
        typed.append(line)
        return ""

    shown = settings.dashboard
    token = keys.token(Path(shown.token_file))[0] if shown.token_file else ""
    page = Dashboard(shown.host, shown.port, token=token, posts={"/text": take_line})
    reporter = Reporter(context, publisher)
    reporter.counts = lambda: {
        **_totals(subscriber.tally(), looking.tally()),
        "denied": sum(page.access.denied.values()),
    }
    reporter.detail = lambda: {"address": page.address, "denied": dict(page.access.denied)}
    _hear_clock(context, subscriber)
    reporter.say("ready")
    context.ready.set()
    next_ns = 0
    while context.alive():
        envelope = subscriber.receive(100)
        reporter.keep()
        if context.epoch.value:
            page.start()  # not before: what it imports would keep the cores from those who are waited for
        if missed := subscriber.report():
            reporter.say("ready", missed)
        while typed:
            at_ns = now_ns()
            publisher.publish(topics.TYPED, settings.session.name, at_ns, at_ns, typed.popleft(), "page")
        if envelope is not None:
            view.see(envelope)
        for heavy in looking.read(page.clients > 0):
            view.see(heavy)
            if heavy.topic == topics.raw("vision") and isinstance(heavy.payload, bytes):
                page.picture(heavy.payload)
        if not page.clients:
            view.skip(_Looking.TOPICS)
        elif now_ns() >= next_ns:
            next_ns = now_ns() + 100_000_000
            page.sound(view.sound.first, view.sound.columns)
            page.update(view.snapshot(now_ns()))
    page.close()
    looking.close()
    subscriber.close()
    publisher.close()


class _Looking:
    """Pictures and sound for the page, which are on the way to it only while a browser looks."""

    TOPICS = (topics.raw("vision"), topics.raw("audio"))

    def __init__(self, context: Context) -> None:
        self._address, self._queue = context.address, context.settings.bus.view_queue
        self._subscriber: Subscriber | None = None
        self._before: dict[str, dict[str, int]] = {}

    def read(self, somebody: bool) -> Iterator[Envelope]:
        """What has come, without waiting; nothing where nobody looks."""
        if not somebody:
            self.close()
            return
        if self._subscriber is None:
            self._subscriber = Subscriber(self._address, list(self.TOPICS), self._queue, "drop_oldest", since_now=True)
        for _ in range(self._queue):
            envelope = self._subscriber.receive(0)
            if envelope is None:
                return
            yield envelope

    def tally(self) -> dict[str, dict[str, int]]:
        """As `Subscriber.tally`, of all the times that somebody looked."""
        found = {topic: dict(counts) for topic, counts in self._before.items()}
        for topic, counts in (self._subscriber.tally() if self._subscriber else {}).items():
            before = found.setdefault(topic, {})
            for name, count in counts.items():
                before[name] = before.get(name, 0) + count
        return found

    def close(self) -> None:
        if self._subscriber is None:
            return
        while self._subscriber.receive(0) is not None:
            pass  # what waits was delivered, to nobody
        self._before = self.tally()
        self._subscriber.close()
        self._subscriber = None


def _totals(*tallies: dict[str, dict[str, int]]) -> dict[str, int]:
    """What a viewer had of all topics together: produced = delivered + waiting + the others."""
    totals = dict.fromkeys(("produced", "delivered", "waiting", "lost", "oldest", "superseded", "stale"), 0)
    for counts in (counts for tally in tallies for counts in tally.values()):
        for name, count in counts.items():
            totals[name] += count
    return totals


def _prioritise(priority: str) -> str:
    """Give this process the priority that is asked for; why it could not be, or ""."""
    try:
        if priority == "nice":
            os.nice(-10)
        elif priority == "fifo":
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    except (OSError, AttributeError) as e:
        return f"supervisor.priority {priority!r} was not given ({e}); the session runs as any other program"
    return ""


def run(target: Callable[..., None], context: Context, *args: Any) -> None:
    """What a new process executes: signals, then the node; an error ends it with one sentence and exit code 1."""
    with contextlib.suppress(OSError):  # so that `ps` and `top` name us; Linux alone has it
        Path("/proc/self/comm").write_text(f"mmrnn-{context.name}"[:15])
        # else the kernel may end every sleep 50 us late, to save wake-ups
        Path("/proc/self/timerslack_ns").write_text("1")
    if context.name not in _UNHURRIED:
        context.note = _prioritise(context.settings.supervisor.priority)
    signals.ignore()  # they are for the supervisor, who tells us
    try:
        target(context, *args)
    except StreamError as e:
        print(f"stream-mmrnn {context.name}: {e}", file=sys.stderr, flush=True)
        raise SystemExit(e.exit_code) from None
