"""Replay: a recording through the same generator as live, and a comparison with the recorded predictions.

Knows nothing about the bus or processes: a recording is an iterable of envelopes.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from stream_mmrnn.capture.derive import encoders_from_root, heard_topic, root_of
from stream_mmrnn.capture.encoders import Encoder
from stream_mmrnn.capture.pipeline import reencode
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.dedup import WINDOW
from stream_mmrnn.core.errors import FileError, SessionError, SnapshotError, UsageError, WireError
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import for_model, stream_table
from stream_mmrnn.core.streams import Stream, text_topics
from stream_mmrnn.core.types import Envelope, ModelSpec, Prediction
from stream_mmrnn.graph.runtime import Provider
from stream_mmrnn.live.checkpoint import begin
from stream_mmrnn.offline.convert.ros_predictions import PredictionBag
from stream_mmrnn.offline.labels.while_replaying import ReplayLabels
from stream_mmrnn.offline.pacing import pace
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.pipeline import predict
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.mcap_format import LATE
from stream_mmrnn.recording.settings import settings_of

if TYPE_CHECKING:
    from stream_mmrnn.offline.player import Player

From = Literal["features", "raw"]
_FURTHEST = 16_384
"""How many predictions of a tick's one kind, recorded or made now, may come before its other one: 11 minutes at 25 a
second."""
_MAX_MARKS = 200
"""Labels and words that a player is given."""


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """The part of a prediction that is compared, recorded or made now.

    Decoding only this part of a recorded one takes half the time; keeping only this part of a new one frees its
    features.
    """

    tick: int
    heads: dict[str, list[float | None]]
    """In a recorded prediction, null stands for a number that is not finite."""
    present: dict[str, bool]
    age_ns: dict[str, int]


_recorded = msgspec.json.Decoder(Outcome)


class Comparison:
    """Compares new predictions with the recorded ones, tick by tick.

    Both come in one pass, in any order; a pair is dropped once it is compared. One whose other half is `_FURTHEST`
    predictions away has none, so that a recording without predictions needs no memory.
    """

    def __init__(self) -> None:
        self._then: dict[int, Outcome] = {}
        self._now: dict[int, Outcome] = {}
        self._recent: OrderedDict[int, Outcome] = OrderedDict()
        """The newest recorded ones, compared or not: an engine that was restored after a crash republishes some."""
        self.recorded = 0
        self.different = 0
        self.extra = 0
        self.missing = 0
        self.repeated = 0
        """Recorded twice, the same both times."""
        self.max_abs_difference = 0.0
        self.first = ""
        """One sentence about the first difference."""
        self._first_tick = 2**63

    def split_off(self, batches: Iterable[Sequence[Envelope]]) -> Iterator[Envelope]:
        """The messages one by one, without the recorded predictions, which are compared here."""

        def without(batch: Sequence[Envelope]) -> Sequence[Envelope]:
            for envelope in batch:
                if envelope.topic == topics.PREDICTION:
                    self.see_recorded(envelope.payload)
            return [e for e in batch if e.topic != topics.PREDICTION]

        return chain.from_iterable(map(without, batches))

    def see_recorded(self, payload: Any) -> None:
        self.recorded += 1
        try:
            then = _recorded.decode(payload)
        except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as e:
            self.missing += 1
            self._note(f"a recorded prediction cannot be read: {e}")
            return
        self._first_tick = min(self._first_tick, then.tick)
        before = self._recent.get(then.tick)
        if before is not None:
            self.repeated += before == then
            if before != then:
                self.different += 1
                self._note(f"{self._name(then.tick)} was recorded twice, with other numbers")
            return
        self._recent[then.tick] = then
        if len(self._recent) > WINDOW:
            self._recent.popitem(last=False)
        now = self._now.pop(then.tick, None)
        if now is not None:
            self._compare(then, now)
        elif self._then.setdefault(then.tick, then) is not then:
            self.missing += 1
        elif len(self._then) > _FURTHEST:
            del self._then[next(iter(self._then))]
            self.missing += 1

    def observe(self, prediction: Prediction) -> None:
        tick = prediction.tick
        heads = {name: values.tolist() for name, values in prediction.heads.items()}
        self.observe_outcome(Outcome(tick.index, heads, tick.present, tick.age_ns))

    def observe_outcome(self, now: Outcome) -> None:
        self._first_tick = min(self._first_tick, now.tick)
        then = self._then.pop(now.tick, None)
        if then is not None:
            self._compare(then, now)
        elif self._now.setdefault(now.tick, now) is not now:
            self.extra += 1
        elif len(self._now) > _FURTHEST:
            tick = next(iter(self._now))
            del self._now[tick]
            self.extra += 1
            self._note(f"{self._name(tick)} has no recorded prediction")

    def _compare(self, then: Outcome, now: Outcome) -> None:
        same = then.present == now.present and then.age_ns == now.age_ns
        if same and then.heads == now.heads:
            return
        same = same and then.heads.keys() == now.heads.keys()
        if not same:
            self._note(f"{self._name(then.tick)} saw other inputs than when it was recorded")
        for name, values in now.heads.items():
            before = then.heads.get(name, [])
            for new, old in zip(values, before, strict=False):
                if old is None or new is None or math.isnan(new):
                    same = same and old is None and (new is None or math.isnan(new))
                elif new != old:
                    same = False
                    self.max_abs_difference = max(self.max_abs_difference, abs(new - old))
                    self._note(f"{self._name(then.tick)}, head {name!r}: {new!r} now, {old!r} recorded")
            same = same and len(values) == len(before)
        self.different += not same

    def _name(self, tick: int) -> str:
        """A tick as a person reads it: counted from the recording's first one, not from the machine's boot."""
        return f"tick {tick - self._first_tick + 1}"

    def _note(self, sentence: str) -> None:
        self.first = self.first or sentence

    def summary(self, whole: bool = True) -> dict[str, Any]:
        """The counts, after both have ended. `whole`: they were not stopped before; else nothing is identical."""
        extra, missing = self.extra + len(self._now), self.missing + len(self._then)
        if extra and self._now:
            self._note(f"{self._name(next(iter(self._now)))} has no recorded prediction")
        if missing:
            self._note(f"{missing} recorded predictions were not made again")
        if not whole:
            self._note("the replay was stopped before the recording's end")
        return {
            "identical": whole and not (self.different or extra or missing) and self.recorded > 0,
            "recorded_predictions": self.recorded,
            "different": self.different,
            "missing": missing,
            "extra": extra,
            "repeated": self.repeated,
            "max_abs_difference": self.max_abs_difference,
            "first_difference": self.first,
        }


def check_comparable(recording: Recording, model: str, spec: ModelSpec) -> None:
    """Whether predictions of `model` must equal the recorded ones.

    Raises:
        FileError: the recording has none.
        UsageError: they are another version's.

    """
    path = recording.path
    if next(recording.predictions(), None) is None:
        raise FileError(f"{path} holds no predictions to compare with; it was made by `record`, or cut off early")
    if recording.metadata.get(LATE) and next(recording.envelopes({topics.CHECKPOINT}), None) is None:
        raise FileError(
            f"{path} begins in the middle of a session without the model's state there, so that its predictions "
            "cannot be made again; replay it without --verify, or record from the session's start"
        )
    if spec.sha256 != recording.metadata.get("model_sha256"):
        raise UsageError(f"{path} was predicted by another version of the model {model!r}; give that one by --model")


def resumed(envelopes: Iterable[Envelope], aligner: Aligner, engine: StepEngine) -> Iterator[Envelope]:
    """The messages without the state at the beginning of a recording that began in the middle of a session, which is
    put into aligner and engine; another model begins anew.

    Raises:
        FileError: the state cannot be read, or does not fit the model.

    """
    for envelope in envelopes:
        if envelope.topic != topics.CHECKPOINT:
            yield envelope
            continue
        try:
            begin(wire.unpack(envelope.payload, wire.CheckpointMessage).content, engine, aligner)
        except (WireError, SessionError, SnapshotError) as e:
            raise FileError(f"the recording begins in the middle of a session, and cannot be replayed: {e}") from e


def stream_counts(aligner: Aligner) -> dict[str, Any]:
    """By modality, what became of its feature vectors."""
    return {
        name: {
            "received": c.received,
            "delivered": c.used,
            "dropped": c.dropped(),
            "late_joined": c.late_joined,
        }
        for name, c in aligner.counts.items()
    }


def replay(
    path: Path,
    *,
    speed: float | None = None,
    source: From = "features",
    model: str | None = None,
    provider: Provider = "cpu",
    verify: bool = False,
    on_prediction: Callable[[Prediction], None] = lambda _: None,
    alive: Callable[[], bool] = lambda: True,
    player: Player | None = None,
    ros_out: Path | None = None,
) -> dict[str, Any]:
    """Run a recording through aligner and engine again.

    `speed` paces it (1 is real time); None is as fast as possible. `source` selects recorded feature vectors, or
    vectors that are encoded again from the raw samples. Recorded predictions, if there are any, are always compared;
    with `verify` it is an error if they cannot be. A `player` shows the replay on the live page and paces it instead of
    `speed`; the returned document is then about the last pass. `ros_out`: the folder of a ROS 2 bag for the
    predictions, not with a player.

    Raises:
        UsageError: the file, its model or its raw streams are missing, or the extra `ros`.
        FileError: `ros_out` is there already or cannot be written; nothing is left of it then.

    """
    recording = Recording(path)
    settings = settings_of(recording)
    name = model or settings.engine.model
    engine = StepEngine(config.find_model(name), settings.engine.slots, provider)
    if verify:
        check_comparable(recording, name, engine.spec)
    recorded = stream_table(settings)
    if source == "raw":
        settings = for_model(settings, engine.spec.modalities)
    table = stream_table(settings)
    aligner = Aligner.of(engine.spec.modalities, engine.spec.tick_ns, settings)
    features = dict(aligner.feeding.values())
    """What the model takes: the names of feature vectors, and whose they are."""
    wanted = {topics.CLOCK, topics.SESSION, topics.CHECKPOINT, *(topics.FEATURE + name for name in features)}
    if source == "raw":
        if recording.metadata.get("raw") == "false":
            raise UsageError(f"{path} was recorded without raw streams (record.raw = false); replay it from features")
        again = _encoders(features, table, settings)
        read = {name: heard_topic(root_of(features[name], table)) for name in again}
        anew = [name for name in again if _has_other_times(name, features[name], recorded)]
        wanted = (wanted - {topics.FEATURE + name for name in anew}) | set(read.values())
    if player is not None:
        wanted |= player.load(path.name, engine.spec, table, *_overview(recording, table))
    with contextlib.ExitStack() as stack:
        bag = None
        if ros_out is not None:
            offset_ns = recording.started_unix_ns - int(recording.metadata["started_ns"])
            bag = stack.enter_context(PredictionBag(ros_out, engine.spec, recording.session, offset_ns))
        while True:
            aligner = Aligner.of(engine.spec.modalities, engine.spec.tick_ns, settings)
            comparison = Comparison()
            envelopes = comparison.split_off(recording.batches(wanted | {topics.PREDICTION}))
            if player is not None:
                envelopes = player.play(envelopes)
            if source == "raw":
                for encoder in again.values():
                    encoder.reset()
                envelopes = reencode(envelopes, again, anew, read)
            if speed is not None and player is None:
                envelopes = pace(envelopes, speed, alive)
            steps = Histogram()
            count, first_ns, last_ns = 0, 0, 0
            began_ns = now_ns()
            for prediction in predict(resumed(envelopes, aligner, engine), aligner, engine):
                count += 1
                first_ns = first_ns or prediction.tick.event_ns
                last_ns = prediction.tick.event_ns
                steps.add(prediction.step_end_ns - prediction.step_start_ns)
                comparison.observe(prediction)
                if player is not None:
                    player.observe(prediction)
                on_prediction(prediction)
                if bag is not None:
                    bag.add(prediction)
                if not alive():
                    break
            if player is None or not player.again():
                break
    seconds = (now_ns() - began_ns) / 1e9
    covered_s = (last_ns - first_ns + engine.spec.tick_ns) / 1e9 if count else 0.0
    return {
        "recording": str(path),
        "session": recording.session,
        "source": source,
        "model": {"name": engine.spec.name, "sha256": engine.spec.sha256, "provider": engine.provider},
        "ticks": count,
        "predictions": count,
        **comparison.summary(whole=alive()),
        "streams": stream_counts(aligner),
        "covered_s": round(covered_s, 3),
        "seconds": round(seconds, 4),
        "times_real_time": round(covered_s / seconds, 1) if seconds else 0.0,
        "latency_ms": {"step": steps.row()} if count else {},
        "damage": recording.damage,
        **({"ros_out": str(ros_out)} if ros_out is not None else {}),
    }


def _encoders(features: Mapping[str, Stream], table: Mapping[str, Stream], settings: Settings) -> dict[str, Encoder]:
    """What makes these features again from raw samples. `features`: their names, and whose they are.

    What has no raw messages has features that are the raw values, or come from other programs.
    """
    made: dict[str, dict[str, Encoder]] = {}
    for name, row in features.items():
        if (row.raw or row.parent) and name in row.features() and row.name not in made:
            made[row.name] = encoders_from_root(row, table, settings)
    return {name: made[row.name][name] for name, row in features.items() if name in made.get(row.name, {})}


def _has_other_times(features: str, stream: Stream, recorded: Mapping[str, Stream]) -> bool:
    """Whether vectors that are made again cannot have the places of recorded ones: these are not there, or of another
    encoder. The package's own encoders of a kind have vectors at the same times.
    """
    before = recorded.get(stream.name)
    if before is None or features not in before.features():
        return True
    then, now = before.encoder_of(features), stream.encoder_of(features)
    return then != now and not {then, now} <= {*stream.own_encoders}


def _statuses(recording: Recording) -> list[wire.StatusMessage]:
    """The last status of each process, if the recording was finished."""
    try:
        statuses = msgspec.json.decode(recording.end.get("statuses", "{}"), type=dict[str, wire.StatusMessage])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return []
    return list(statuses.values())


def _overview(
    recording: Recording, table: Mapping[str, Stream]
) -> tuple[int, int, list[wire.StatusMessage], list[tuple[int, str, str]], ReplayLabels]:
    """When the first and the last clock message were published, the last statuses, words and labels of tiers, and the
    labels that can be changed.
    """
    texts = set(text_topics(table.values()))
    stamps: list[int] = []
    marks: dict[str, list[tuple[int, str, str]]] = {"label": [], "text": []}
    typed: list[tuple[int, str]] = []
    for e in recording.envelopes({topics.CLOCK, topics.LABEL, *texts}):
        if e.topic == topics.CLOCK:
            stamps = [stamps[0] if stamps else e.publish_ns, e.publish_ns]
        elif e.topic == topics.LABEL and topics.tier_of(e.origin) == topics.LABEL:
            typed.append((e.event_ns, bytes(e.payload).decode("utf-8", "replace")))
        elif isinstance(e.payload, bytes):
            kind = "label" if e.topic == topics.LABEL else "text"
            marks[kind].append((e.publish_ns, kind, e.payload.decode("utf-8", "replace")))
    first_ns, last_ns = stamps or (0, 0)
    labels, words = marks["label"][:_MAX_MARKS], marks["text"]
    # evenly thinned, so that a long recording has marks from its beginning to its end
    every = max(1, -(-len(words) // max(1, _MAX_MARKS - len(labels))))
    shown = sorted(labels + words[::every])
    return first_ns, last_ns, _statuses(recording), shown, ReplayLabels(recording, typed)
