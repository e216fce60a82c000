"""The engine as a process: envelopes in, predictions out, and checkpoints from which the next process goes on."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec

from stream_mmrnn.bus import JournalClient
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import RateLimiter, now_ns
from stream_mmrnn.core.errors import SessionError, StreamError
from stream_mmrnn.core.types import Envelope, Prediction
from stream_mmrnn.live.checkpoint import Checkpoints
from stream_mmrnn.live.nodes.process import HEARD, Context, Node, wait_for_clock
from stream_mmrnn.live.prewarm import Prewarmer
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.pipeline import predict
from stream_mmrnn.predict.sharded_engine import create


class EngineNode(Node):
    """The aligner and the step engine over a bus subscriber. A prediction's message carries its tick."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        settings = self.settings
        self.engine = create(settings.engine)
        spec = self.engine.spec
        self.aligner = Aligner.of(spec.modalities, spec.tick_ns, settings)
        self.subscriber = self.subscribe([topics.FEATURE, topics.CLOCK, topics.SESSION])
        self.counts = {"ticks": 0, "predictions": 0, "refused": 0}
        self.prewarmer = Prewarmer(self._warm, spec.tick_ns)
        every = settings.state.snapshot_every
        self.caller = JournalClient(context.address) if every else None
        self.checkpoints = (
            Checkpoints(self.caller, every, self.engine, self.aligner, self.subscriber, self.publisher, self.counts)
            if self.caller is not None
            else None
        )
        self._missed: deque[Envelope] = deque()
        """After a restart: messages that the process before did not deal with."""
        self._anew = ""
        self._heard = -1
        self._misfits_reported = 0
        self._rate_limiter = RateLimiter()
        self._contract = {
            "name": spec.name,
            "sha256": spec.sha256,
            "provider": self.engine.provider,
            "tick_ns": spec.tick_ns,
            **msgspec.to_builtins({"modalities": spec.modalities, "heads": spec.heads}),
        }
        self.reporter.counts = self._counts
        self.reporter.detail = self._detail

    def _counts(self) -> dict[str, int]:
        return {
            **self.counts,
            "sessions": len(self.engine),
            "prewarmed": self.prewarmer.runs,
            "garbage": self.subscriber.garbage + self.aligner.malformed,
        }

    def _detail(self) -> dict[str, Any]:
        gaps = self.subscriber.gaps
        return {
            "spec": self._contract,
            "anew": self._anew,
            HEARD: self._heard,
            "streams": {
                name: {
                    **msgspec.to_builtins(c),
                    "features": features,
                    "lost": gaps.lost.get(topics.FEATURE + features, 0),
                    "arrived": gaps.received.get(topics.FEATURE + features, 0),
                }
                for name, c in self.aligner.counts.items()
                for features in [self.aligner.feeding[name][0]]
            },
            "misfits": self.aligner.misfits,
        }

    def run(self) -> None:
        self._start()
        more = self.subscriber.waiting if self.settings.engine.slots > 1 else None
        for prediction in predict(self._messages(), self.aligner, self.engine, self._refused, more):
            self._publish(prediction)
        self.engine.stop()
        if self.caller is not None:
            self.caller.close()
        self.subscriber.close()
        self.publisher.close()

    def _start(self) -> None:
        first = wait_for_clock(self.context, self.subscriber)
        self.publisher.wait_for_reader(topics.PREDICTION, 2.0)
        if self.context.restarts and first is not None:
            try:
                if self.checkpoints is None:
                    raise SessionError("state.snapshot_every is 0")
                self._missed.extend(self.checkpoints.resume(first))
            except StreamError as e:
                self._anew = f"the session begins anew: {e}"
        self.reporter.report("ready", "; ".join(filter(None, (self.context.note, self._anew))))
        gc.collect()
        gc.freeze()  # what exists now stays: no collection looks at it in the middle of a step
        self.context.ready.set()

    def _messages(self) -> Iterator[Envelope]:
        while self.context.alive():
            envelope = self._receive()
            if envelope is None:
                if not self.prewarmer.run_if_due(now_ns()):
                    self.reporter.report_due()
                continue
            yield envelope
            # back here, the message and all its predictions are dealt with
            self._report_misfits()
            if envelope.topic == topics.SESSION:
                if envelope.session == self.settings.session.name:
                    self._heard = envelope.seq
                self._session_changed(envelope.session)
            if self.checkpoints is not None:
                self.checkpoints.keep_if_due(envelope)
            self.reporter.report_due(between_messages=False)

    def _receive(self) -> Envelope | None:
        if self._missed:
            envelope = self._missed.popleft()
            self.subscriber.gaps.observe(envelope)
            return envelope
        return self.subscriber.receive(self.prewarmer.wait_ms(now_ns(), self.reporter.wait_ms(100)))

    def _report_misfits(self) -> None:
        misfits = self.aligner.misfits
        if len(misfits) > self._misfits_reported:
            self._misfits_reported = len(misfits)
            name, why = list(misfits.items())[-1]
            self.reporter.report("ready", f"{name} is quarantined, {why}")

    def _session_changed(self, session: str) -> None:
        if session not in self.engine:
            self.publisher.end(session)
        if not len(self.engine):
            self.reporter.report("closed")
        elif session == self.settings.session.name:
            self.reporter.repeat()  # a recording that ends waits for it

    def _refused(self, session: str, error: SessionError) -> None:
        self.counts["refused"] += 1
        if self._rate_limiter("refused", now_ns()):
            self.reporter.report("ready", f"session {session!r} was refused: {error}")

    def _publish(self, prediction: Prediction) -> None:
        tick = prediction.tick
        sent = self.publisher.publish(
            topics.PREDICTION,
            tick.session,
            tick.event_ns,
            prediction.step_end_ns,
            wire.pack(wire.prediction_message(prediction)),
        )
        self.counts["ticks"] += 1
        self.counts["predictions"] += 1
        if self.checkpoints is not None:
            self.checkpoints.stepped(sent, tick.index)
        if self.settings.engine.prewarm:
            self.prewarmer.stepped(prediction.step_start_ns)

    def _warm(self) -> None:
        self.engine.prewarm()
        self.publisher.prewarm()
        self.subscriber.prewarm()
