"""The engine as a process: envelopes in, ticks and predictions out, and snapshots from which it goes on.

Knows nothing about sources or recordings.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator

import msgspec

from stream_mmrnn.bus import Caller, Publisher, Subscriber
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import RateLimiter, now_ns
from stream_mmrnn.core.errors import SessionError, StreamError
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live.nodes.process import Context, Reporter, hear_clock


def engine(context: Context) -> None:
    """Ticks and predictions from features: the aligner and the step engine over a bus subscriber."""
    from stream_mmrnn.live.checkpoint import Checkpoints
    from stream_mmrnn.live.prewarm import Prewarmer
    from stream_mmrnn.predict.align import Aligner
    from stream_mmrnn.predict.pipeline import predict
    from stream_mmrnn.predict.sharded_engine import create

    settings = context.settings
    step_engine = create(settings.engine)
    spec = step_engine.spec
    aligner = Aligner.of(spec.modalities, spec.tick_ns, settings.align)
    publisher = Publisher(context.address, settings.bus.queue)
    subscriber = Subscriber(context.address, [topics.FEATURE, topics.CLOCK, topics.SESSION], settings.bus.queue)
    reporter = Reporter(context, publisher)
    counts = {"ticks": 0, "predictions": 0, "refused": 0}
    rate_limiter = RateLimiter()

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
    heard = hear_clock(context, subscriber)
    publisher.wait_for_reader(topics.PREDICTION, 2.0)
    if context.restarts and heard is not None:
        try:
            if checkpoints is None:
                raise SessionError("state.snapshot_every is 0")
            missed.extend(checkpoints.resume(heard))
        except StreamError as e:
            anew = f"the session begins anew: {e}"
    reporter.report("ready", "; ".join(filter(None, (context.note, anew))))
    gc.collect()
    gc.freeze()  # what is there now stays: a collection need not look at it in the middle of a step
    context.ready.set()

    def refused(session: str, error: SessionError) -> None:
        counts["refused"] += 1
        if rate_limiter("refused", now_ns()):
            reporter.report("ready", f"session {session!r} was refused: {error}")

    def messages() -> Iterator[Envelope]:
        told = 0
        while context.alive():
            envelope: Envelope | None
            if missed:
                subscriber.gaps.observe(envelope := missed.popleft())
            elif (envelope := subscriber.receive(prewarmer.wait_ms(now_ns(), reporter.wait_ms(100)))) is None:
                if not prewarmer.run_if_due(now_ns()):
                    reporter.report_due()
                continue
            yield envelope
            # back here, the message and all its predictions are dealt with
            if len(aligner.misfits) > told:
                told = len(aligner.misfits)
                name, why = list(aligner.misfits.items())[-1]
                reporter.report("ready", f"{name} is quarantined, {why}")
            if envelope.topic == topics.SESSION:
                if envelope.session not in step_engine:
                    publisher.end(envelope.session)
                if not len(step_engine):
                    reporter.report("closed")
            if checkpoints is not None:
                checkpoints.keep_if_due(envelope)
            reporter.report_due(housekeeping=False)

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
