"""An engine's process ends anywhere and another goes on: without processes here, with them in test_live."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import toy_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stream_mmrnn.bench.engine import synthetic
from stream_mmrnn.bus import Gaps
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import ProcessError, SessionError, SnapshotError, WireError
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live import journal
from stream_mmrnn.live.checkpoint import Checkpoint, Checkpoints, begin, mark
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.pipeline import predict
from stream_mmrnn.predict.snapshots import Snapshot, to_bytes

LATE = {"vision": 80_000_000, "audio": 80_000_000, "text": 0}
BEGIN = 10**15


class Wires:
    """What stands between an engine's process and the journal's, in this process."""

    def __init__(self) -> None:
        self.journal = journal.Journal(1000, 1 << 30, complete=True)
        self.deaf = False

    def send(self, content: bytes) -> bool:
        made = journal.request.decode(content)
        assert isinstance(made, journal.Keep)
        self.journal.save(made)
        return not self.deaf

    def ask(self, content: bytes, timeout_ms: int) -> bytes | None:
        made = journal.request.decode(content)
        assert isinstance(made, journal.Ask)
        return None if self.deaf else msgspec.msgpack.encode(self.journal.answer(made))


class Publisher:
    """Numbers ticks and puts them on the journal's bus, as the real one does by way of the broker."""

    def __init__(self, wires: Wires, lose: int = 0) -> None:
        self._wires, self._numbers = wires, {}
        self.queue: list[Envelope] = []
        self._lose = lose
        """How many of the newest are still in the process when it ends."""

    def publish(self, session: str, index: int) -> Envelope:
        seq = self._numbers.get(session, 0)
        self._numbers[session] = seq + 1
        envelope = Envelope(topics.PREDICTION, session, seq, index, index, BEGIN + index, b"")
        self.queue.append(envelope)
        while len(self.queue) > self._lose:
            hear(self._wires, self.queue.pop(0))
        return envelope

    def numbers(self) -> list[tuple[str, str, int]]:
        return [(topics.PREDICTION, session, seq) for session, seq in self._numbers.items()]

    def restore(self, numbers: list[tuple[str, str, int]]) -> None:
        self._numbers = {session: seq for _, session, seq in numbers}


class Subscriber:
    def __init__(self) -> None:
        self.gaps = Gaps()
        self.ahead = False


def hear(wires: Wires, envelope: Envelope) -> None:
    a, b, c = map(bytes, wire.encode(envelope))
    wires.journal.add((a, b, c), envelope.publish_ns)


class Process:
    """An engine's process."""

    def __init__(self, model: Path, wires: Wires, every: int, lose: int = 0) -> None:
        self.engine = StepEngine(model, 4)
        self.aligner = Aligner(self.engine.spec.modalities, self.engine.spec.tick_ns, LATE)
        self.subscriber, self.publisher = Subscriber(), Publisher(wires, lose)
        self.counts = {"predictions": 0}
        self.checkpoints = Checkpoints(
            wires, every, self.engine, self.aligner, self.subscriber, self.publisher, self.counts  # type: ignore[arg-type]
        )  # fmt: skip

    def run(self, envelopes: Sequence[Envelope]) -> Iterator[tuple[str, int, int, bytes]]:
        """Session, tick, the prediction's number, its bytes."""

        def messages() -> Iterator[Envelope]:
            for envelope in envelopes:
                self.subscriber.gaps.observe(envelope)
                yield envelope
                self.checkpoints.keep_if_due(envelope)

        for p in predict(messages(), self.aligner, self.engine):
            sent = self.publisher.publish(p.tick.session, p.tick.index)
            self.counts["predictions"] += 1
            self.checkpoints.stepped(sent, p.tick.index)
            yield p.tick.session, p.tick.index, sent.seq, p.heads["next"].tobytes()


class Bus(list[Envelope]):
    def __repr__(self) -> str:
        return f"{len(self)} messages"


@pytest.fixture(scope="module")
def bus(toy: Path) -> Bus:
    """Three sessions of 4 s, with every message as the bus would have it: each with its own time of publishing."""
    found = list(synthetic(StepEngine(toy).spec, 3, 4.0, BEGIN, 3))
    return Bus(msgspec.structs.replace(e, publish_ns=BEGIN + i) for i, e in enumerate(found))


@pytest.mark.slow
@settings(max_examples=60)
@given(deaths=st.lists(st.floats(0.01, 0.99), max_size=4), every=st.integers(1, 40), lose=st.integers(0, 5))
@example(deaths=[0.9375, 0.9375, 0.9375], every=1, lose=0)  # after one session has ended, before the others have
def test_whoever_ends_nothing_is_missing_and_nothing_differs(
    toy: Path, bus: list[Envelope], deaths: list[float], every: int, lose: int
) -> None:
    whole = Process(toy, Wires(), every)
    expected = list(whole.run(bus))
    assert len(expected) >= 297
    assert len(bus) > 1200

    wires = Wires()
    process = Process(toy, wires, every, lose)
    got: list[tuple[str, int, int, bytes]] = []
    mine: list[tuple[str, int, int, bytes]] = []  # of the process that runs
    at, kept, in_vain = 0, -1, 0
    for death in sorted(deaths):
        end = max(at, round(death * len(bus)))
        for e in bus[at:end]:
            hear(wires, e)
        mine += process.run(bus[at:end])
        if not end:
            continue
        # it ends here; what it had not sent is gone with it. The bus goes on, and another one hears it
        unsent = {(e.session, e.seq) for e in process.publisher.queue}
        got += [g for g in mine if (g[0], g[2]) not in unsent]
        at = min(end + 50, len(bus))
        for e in bus[end:at]:
            hear(wires, e)
        process = Process(toy, wires, every, lose)
        # whoever ends again and again without coming further is not helped for ever
        in_vain = in_vain + 1 if wires.journal.kept == kept else 1
        kept = wires.journal.kept
        if in_vain > 3:
            with pytest.raises(SessionError, match="3 engines in a row ended on the same messages"):
                process.checkpoints.resume(bus[at - 1])
            return
        mine = list(process.run(process.checkpoints.resume(bus[at - 1])))
    got += mine
    process.publisher._lose = 0
    for e in bus[at:]:
        hear(wires, e)
    got += list(process.run(bus[at:]))
    seen: dict[tuple[str, int], tuple[int, bytes]] = {}
    for session, index, seq, said in got:
        assert seen.setdefault((session, index), (seq, said)) == (seq, said), "a republished tick differs"
    assert [(*k, *v) for k, v in sorted(seen.items())] == sorted(expected)
    assert process.aligner.counts == whole.aligner.counts
    assert process.subscriber.gaps.snapshot() == whole.subscriber.gaps.snapshot()
    assert process.counts == whole.counts


def test_it_waits_where_ticks_or_messages_are_on_their_way(toy: Path, bus: list[Envelope]) -> None:
    """Gathered ticks that are not stepped yet are in no snapshot, nor is a message that was read ahead."""
    wires = Wires()
    process = Process(toy, wires, 1)
    process.subscriber.ahead = True
    for e in bus[:400]:
        hear(wires, e)
    assert list(process.run(bus[:400]))
    assert wires.journal.kept == 0
    process.subscriber.ahead = False
    process.checkpoints.keep_if_due(bus[399])
    process.checkpoints.keep_if_due(bus[399])
    assert wires.journal.kept == 0, "the step before this was some messages ago"
    for e in bus[400:500]:
        hear(wires, e)
    assert list(process.run(bus[400:500]))
    assert wires.journal.kept > 0


def prepared(toy: Path, bus: list[Envelope], count: int = 800) -> tuple[Wires, Process]:
    wires = Wires()
    process = Process(toy, wires, 5)
    for e in bus[:count]:
        hear(wires, e)
    assert list(process.run(bus[:count]))
    assert wires.journal.kept
    return wires, process


def test_a_checkpoint_of_another_model_is_refused_and_nothing_has_changed(
    toy: Path, bus: list[Envelope], tmp_path: Path
) -> None:
    wires, _ = prepared(toy, bus)
    other = Process(toy_model.make(tmp_path / "b.onnx", seed=1), wires, 5)
    with pytest.raises(SessionError, match="another than before"):
        other.checkpoints.resume(bus[799])
    assert len(other.engine) == 0
    assert other.aligner.snapshot().sessions == {}


def test_too_few_slots_and_damage_are_refused_and_nothing_has_changed(toy: Path, bus: list[Envelope]) -> None:
    wires, _ = prepared(toy, bus)
    late = Process(toy, wires, 5)
    late.engine = late.checkpoints._engine = StepEngine(toy, 2)  # there are three sessions
    with pytest.raises(SessionError, match="all 2 slots"):
        late.checkpoints.resume(bus[799])
    assert len(late.engine) == 0
    assert late.aligner.snapshot().sessions == {}

    kept = wires.journal._checkpoints.pop()
    whole = msgspec.msgpack.decode(kept.content, type=Checkpoint)
    name = next(iter(whole.sessions))
    damaged = msgspec.structs.replace(whole, sessions={**whole.sessions, name: whole.sessions[name][:-1]})
    for content in (msgspec.msgpack.encode(damaged), kept.content[:-3], b"\xc1"):
        wires.journal._checkpoints.append(msgspec.structs.replace(kept, content=content))
        fresh = Process(toy, wires, 5)
        with pytest.raises((WireError, SnapshotError)):
            fresh.checkpoints.resume(bus[799])
        assert len(fresh.engine) == 0
        wires.journal._checkpoints.pop()
        wires.journal._attempts = 0


def test_a_journal_that_is_silent_is_said(toy: Path, bus: list[Envelope]) -> None:
    wires, process = prepared(toy, bus)
    wires.deaf = True
    before = process.checkpoints.skipped
    for _ in process.run(bus[800:1200]):
        pass
    assert process.checkpoints.skipped > before
    with pytest.raises(ProcessError, match="does not answer"):
        Process(toy, wires, 5).checkpoints.resume(bus[799])
    assert mark(bus[799]).seq == bus[799].seq


def test_a_beginning_of_several_sessions_or_none_is_refused(toy: Path, bus: list[Envelope]) -> None:
    _, process = prepared(toy, bus)
    aligner, sha256 = process.aligner.snapshot(), process.engine.spec.sha256
    state = to_bytes(Snapshot("s", sha256, 0, process.engine.snapshot(next(iter(aligner.sessions)))))
    assert len(aligner.sessions) > 1
    for several in (aligner, msgspec.structs.replace(aligner, sessions={})):
        content = msgspec.msgpack.encode({"model_sha256": sha256, "state": state, "aligner": several})
        with pytest.raises(WireError, match="is not of one session"):
            begin(content, process.engine, process.aligner)
