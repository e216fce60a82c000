"""The user's recordings as training data, with typed labels or targets computed from the recording.

Computed targets are future speech, words and motion. The ticks come from the same generator, aligner, encoders and
settings as live, so a model is trained on what it will be served.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders.audio import NAME, SPEECH
from stream_mmrnn.core import topics
from stream_mmrnn.core.durations import spoken
from stream_mmrnn.core.errors import ConfigError, FileError
from stream_mmrnn.core.message_columns import Integers, MessageColumns
from stream_mmrnn.core.types import FloatArray, ModalitySpec
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.align_columns import ColumnAligner
from stream_mmrnn.predict.columns import seconds
from stream_mmrnn.recording.append_file import later_parts
from stream_mmrnn.recording.label_file import NOTHING
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.settings import settings_of
from stream_mmrnn.training.data import Array, Task, Ticks, cut
from stream_mmrnn.training.recipe import HeadRecipe, Recipe
from stream_mmrnn.training.tasks import forecast
from stream_mmrnn.training.tasks.common import few_examples, pieces

SOURCES = {"classification": "label", "activity_projection": "speech", "hazard": "text", "regression": "motion"}
"""Default source of a head's targets; the recipe's `data.options.targets` overrides it."""
FORECAST = "forecast"
"""Source of a head that forecasts columns: see `forecast`."""
WARM_UP = 10
"""How much of the ticks before a held-out forecast the model sees first, in lengths of its training chunks."""
LEAST_STEPS = 30
"""Steps of an epoch: short recordings are read so often, cut at other places."""


class TypedEvents:
    """Labels and words of a recording with their times, and the names of its signals' columns."""

    topics = frozenset({topics.LABEL, topics.feature("text")})
    """What must be read to collect them."""

    def __init__(self, recording: Recording) -> None:
        self.columns = columns_of(recording)
        self.tiers: dict[str, list[tuple[int, str]]] = {topics.LABEL: []}
        """By tier the labels by time; the first tier is that of typed ones."""
        self._texts: list[Integers] = []

    @property
    def labels(self) -> list[tuple[int, str]]:
        """Those of the tier of typed ones, by time."""
        return self.tiers[topics.LABEL]

    @classmethod
    def of(cls, recording: Recording) -> TypedEvents:
        """Those of a whole recording, which is read for it."""
        events = cls(recording)
        for messages in recording.columns(cls.topics):
            events.collect(messages)
        return events

    def collect(self, messages: MessageColumns) -> None:
        """Add those among the messages."""
        for channel in messages.channels:
            if channel.topic == topics.feature("text"):
                self._texts.append(channel.event_ns)
        for _, e in messages.others:
            if e.topic == topics.LABEL:
                tier = self.tiers.setdefault(topics.tier_of(e.origin), [])
                insort(tier, (e.event_ns, bytes(e.payload).decode("utf-8", "replace")))
            elif e.topic == topics.feature("text"):
                self._texts.append(np.array([e.event_ns], np.int64))

    @property
    def texts_ns(self) -> Integers:
        """The words' times, ascending."""
        return np.sort(np.concatenate([np.zeros(0, np.int64), *self._texts]))

    def labels_at(self, event_ns: Integers, tier: str) -> list[str]:
        """A tier's label at each time: the last one given before it."""
        labels = self.tiers.get(tier, [])
        held = ["", *("" if name in NOTHING else name for _, name in labels)]
        times = np.array([at_ns for at_ns, _ in labels], np.int64)
        return [held[i] for i in np.searchsorted(times, event_ns, "right").tolist()]


class RecordedTicks(NamedTuple):
    """T ticks of a recording for M modalities, and what was typed meanwhile."""

    indices: Integers
    """[T] places on the grid of ticks."""
    event_ns: Integers
    """[T] the ends of the ticks."""
    features: dict[str, FloatArray]
    """By modality [T, size]; zeros where absent."""
    present: npt.NDArray[np.bool_]
    """[T, M]"""
    age_s: FloatArray
    """[T, M], as the engine gives them to the model."""
    events: TypedEvents

    def has(self, modality: str) -> npt.NDArray[np.bool_]:
        """[T] where a modality is present."""
        return self.present[:, list(self.features).index(modality)]

    def labels(self, tier: str) -> set[str]:
        """The labels of a tier that are true at the end of a tick: no other can be learned."""
        return set(self.events.labels_at(self.event_ns, tier)) - set(NOTHING)


def ticks_of(path: Path, specs: Sequence[ModalitySpec], tick_ns: int) -> RecordedTicks:
    """The ticks of a recording as the engine would have seen them. The file is read once.

    Raises:
        FileError: not a recording, or it has no features of these modalities.

    """
    recording = Recording(path)
    aligner = Aligner.of(specs, tick_ns, settings_of(recording))
    wanted = {topics.CLOCK, topics.SESSION, *(topics.FEATURE + name for name, _ in aligner.feeding.values())}
    events, columns = TypedEvents(recording), ColumnAligner(aligner)
    parts = []
    for messages in recording.columns(wanted | events.topics):
        events.collect(messages)
        parts += columns.push(messages)
    if not parts:
        raise FileError(f"{path} has no ticks; was anything recorded?")
    quarantined = {n: c.quarantined for n, c in aligner.counts.items() if c.quarantined and not c.used}
    if quarantined:
        raise FileError(f"{path}: the features of {', '.join(quarantined)} are another encoder's; encode them again")
    features = {}
    for i, s in enumerate(specs):
        features[s.name] = np.zeros((sum(map(len, parts)), s.size), np.float32)
        begin = 0
        for part in parts:
            features[s.name][begin : begin + len(part)][part.present[:, i]] = part.features[i]
            begin += len(part)
    indices, event_ns, present, age_ns = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("indices", "event_ns", "present", "age_ns")
    )
    return RecordedTicks(indices, event_ns, features, present, seconds(age_ns).astype(np.float32), events)


def sequence(path: Path, recipe: Recipe, specs: Sequence[ModalitySpec]) -> Ticks:
    """A recording as one training sequence."""
    return _sequence(path.name, ticks_of(path, specs, recipe.tick_ns), recipe)


def _sequence(name: str, ticks: RecordedTicks, recipe: Recipe) -> Ticks:
    present = ticks.present.astype(np.float32)
    chosen: dict[str, Any] = recipe.data.options.get("targets", {})
    targets: dict[str, Array] = {}
    weights: dict[str, FloatArray] = {}
    for head in recipe.heads:
        source = chosen.get(head.name, SOURCES[head.kind])
        if source == FORECAST:
            columns = ticks.events.columns
            made, weights[head.name] = forecast.targets(head, ticks.indices, ticks.features, present, columns, recipe)
            targets |= made
            continue
        kind, _, tier = source.partition("/")
        if kind == topics.LABEL and tier:
            targets[head.name], weights[head.name] = _label(head, ticks, recipe, tier)
            continue
        if source not in _TARGETS:
            raise ConfigError(
                f"data.options.targets.{head.name} is {source!r}; use one of "
                f"{', '.join([*_TARGETS, 'label/TIER', FORECAST])}"
            )
        targets[head.name], weights[head.name] = _TARGETS[source](head, ticks, recipe)
    return Ticks(ticks.features, present, ticks.age_s, targets, weights, name)


def _label(
    head: HeadRecipe, ticks: RecordedTicks, recipe: Recipe, tier: str = topics.LABEL
) -> tuple[Array, FloatArray]:
    """The class at the tick's end, or later by the end of the head's first horizon."""
    return classes_at(head.labels, ahead_ns_of(head.horizons_s), ticks.event_ns, ticks.events, tier)


def ahead_ns_of(horizons_s: Sequence[tuple[float, float]]) -> int:
    """How much later than the tick's end the label is looked up; 0 without a horizon."""
    return round(horizons_s[0][1] * 1e9) if horizons_s else 0


def classes_at(
    labels: Sequence[str], ahead_ns: int, event_ns: Integers, events: TypedEvents, tier: str = topics.LABEL
) -> tuple[Array, FloatArray]:
    """For the ends of T ticks: the class [T] at `ahead_ns` later, and whether it is known [T] (1 or 0)."""
    classes = {name: i for i, name in enumerate(labels)}
    at_ns = event_ns + ahead_ns
    held = [classes.get(name, -1) for name in events.labels_at(at_ns, tier)]
    found = np.array(held, np.int64)
    known = (found >= 0) & (at_ns <= event_ns[-1])
    return np.maximum(found, 0), known.astype(np.float32)


def _speech(head: HeadRecipe, ticks: RecordedTicks, recipe: Recipe) -> tuple[Array, FloatArray]:
    """Speech in each of the head's intervals: 1 if at least half of its ticks are speech (0.5 and more)."""
    if "audio" not in ticks.features:
        raise ConfigError(f"the head {head.name!r} needs speech, and the recipe has no modality audio")
    encoder = recipe.modalities["audio"].encoder.partition("@")[0]
    if ticks.features["audio"].shape[1] <= SPEECH or encoder not in ("", NAME):
        raise ConfigError(
            f"the head {head.name!r} needs the probability of speech, which the modality audio has from the encoder "
            f"audio ({NAME}) alone; name that encoder first in the stream's encoders"
        )
    count = len(ticks.indices)
    loud = (ticks.has("audio") & (ticks.features["audio"][:, SPEECH] >= 0.5)).astype(np.float64)
    total = np.concatenate([[0.0], np.cumsum(loud)])
    target = np.zeros((count, head.size), np.float32)
    known = np.ones(count, np.float32)
    for j, (begin_s, end_s) in enumerate(_horizons(head)):
        begin = np.arange(count) + 1 + round(begin_s * 1e9 / recipe.tick_ns)
        end = np.arange(count) + 1 + round(end_s * 1e9 / recipe.tick_ns)
        inside = end <= count
        b, e = np.minimum(begin, count), np.minimum(end, count)
        target[:, j] = (total[e] - total[b]) >= 0.5 * np.maximum(e - b, 1)
        known *= inside
    return target, known


def _text(head: HeadRecipe, ticks: RecordedTicks, recipe: Recipe) -> tuple[Array, FloatArray]:
    """The interval of the next word; `head.size` if it is in none; unknown if the recording ends before."""
    horizons = _horizons(head)
    until_ns = round(horizons[-1][1] * 1e9)
    times = np.append(ticks.events.texts_ns, 0)
    next_word = np.searchsorted(times[:-1], ticks.event_ns, "right")
    wait_s = (times[next_word] - ticks.event_ns) / 1e9
    wait_s[next_word == len(times) - 1] = np.inf
    target = np.full(len(wait_s), head.size, np.int64)
    for j, (begin_s, end_s) in reversed(list(enumerate(horizons))):  # the first interval that has it counts
        target[(begin_s < wait_s) & (wait_s <= end_s)] = j
    known = (wait_s <= horizons[-1][1]) | (ticks.event_ns + until_ns <= ticks.event_ns[-1])
    return target, known.astype(np.float32)


def _motion(head: HeadRecipe, ticks: RecordedTicks, recipe: Recipe) -> tuple[Array, FloatArray]:
    """Future change of the picture: the root mean square difference of its features between ticks."""
    if "vision" not in ticks.features:
        raise ConfigError(f"the head {head.name!r} needs motion, and the recipe has no modality vision")
    seen, vectors, count = ticks.has("vision"), ticks.features["vision"], len(ticks.indices)
    change = np.zeros(count, np.float32)
    both = seen[1:] & seen[:-1]
    change[1:][both] = np.sqrt(np.mean((vectors[1:] - vectors[:-1])[both] ** 2, axis=1))
    valid = np.concatenate([[False], both])
    target = np.zeros((count, head.size), np.float32)
    known = np.ones(count, np.float32)
    for j, (_, end_s) in enumerate(_horizons(head)):
        ahead = min(round(end_s * 1e9 / recipe.tick_ns), count)
        target[: count - ahead, j] = change[ahead:]
        known[: count - ahead] *= valid[ahead:]
        known[count - ahead :] = 0
    return target, known


_TARGETS = {"label": _label, "speech": _speech, "text": _text, "motion": _motion}


def _horizons(head: HeadRecipe) -> tuple[tuple[float, float], ...]:
    if not head.horizons_s:
        raise ConfigError(f"the head {head.name!r} predicts the future: give its horizons_s")
    return head.horizons_s


def _specs(recipe: Recipe) -> list[ModalitySpec]:
    return [ModalitySpec(name, m.size, m.encoder, m.reduction, m.stack) for name, m in recipe.modalities.items()]


def columns_of(recording: Recording) -> dict[str, list[str]]:
    """By stream, the names of a signal's numbers, if the recording has them (an imported table)."""
    try:
        return msgspec.json.decode(recording.metadata.get("columns", "{}"), type=dict[str, list[str]])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}


def files_of(places: Sequence[Path]) -> list[Path]:
    """The recordings among files and folders, sorted by name.

    Raises:
        FileError: a folder has none, or a recording goes on in later parts.

    """
    found = []
    for place in places:
        inside = list(place.glob("*.mcap")) if place.is_dir() else [place]
        if not inside:
            raise FileError(f"{place} has no recording (*.mcap)")
        found += inside
    for path in sorted(found):
        if later := later_parts(path):
            raise FileError(
                f"{path} is the first of {1 + len(later)} parts; join them by stream-mmrnn repair {path} OUT.mcap, and "
                "move the parts away"
            )
    return sorted(found)


def make(recipe: Recipe, places: list[Path]) -> Task:
    """Hold out whole recordings: the last by name for the test, the one before for validation. With fewer than three,
    hold out the last quarter of each for both; for a forecast, the ends of each, in time order.
    """
    paths = files_of(places)
    specs = _specs(recipe)
    _check_columns(paths)
    recorded = [ticks_of(p, specs, recipe.tick_ns) for p in paths]
    sequences = [_sequence(p.name, ticks, recipe) for p, ticks in zip(paths, recorded, strict=True)]
    _check_targets(recipe, sequences)
    warnings = _never_true(recipe, paths, recorded)
    chosen = recipe.data.options.get("targets", {})
    steps = {
        head.name: head.size // len(forecast.options_of(recipe).columns)
        for head in recipe.heads
        if chosen.get(head.name) == FORECAST
    }
    held = "whole recordings"
    if len(sequences) >= 3:
        train, validation, test = sequences[:-2], [sequences[-2]], [sequences[-1]]
        if steps:
            train = [forecast.for_training(s, steps) for s in train]
            validation, test = ([forecast.for_test(s, steps) for s in part] for part in (validation, test))
    elif steps:
        parts = [forecast.split(s, steps, WARM_UP * recipe.train.length) for s in sequences]
        train, validation, test = (list(part) for part in zip(*parts, strict=True))
        held = "in time order, the last quarter for the test and the 15 % before it for validation"
    else:
        train = [_part(s, 0.0, 0.75) for s in sequences]
        validation = test = [_part(s, 0.75, 1.0) for s in sequences]
        held = "the last quarter of each recording"
        warnings += (
            "the same ticks chose the model and measured it: the figures are too good; give three recordings or more",
        )

    # few recordings fill as many lanes as there are, down to two chunks of each
    t, total = recipe.train, sum(map(len, train))
    longest = min(10 * t.length, max(2 * t.length, total // t.batch))
    # and fill the steps of an epoch, because a schedule and a patience of some epochs need steps to learn in
    times = 1 if steps else -(-LEAST_STEPS * t.batch * t.length // max(total, 1)) or 1

    def epoch(rng: np.random.Generator) -> list[Ticks]:
        found = [p for _ in range(times) for s in train for p in pieces(s, longest, rng)]
        return [found[i] for i in rng.permutation(len(found))]

    for head in recipe.heads:
        if head.name in steps:
            enough = all(forecast.is_known(part, head.name) for part in (train, validation, test))
        else:
            enough = all(any(t.weights[head.name].any() for t in part) for part in (validation, test))
        if not enough:
            raise FileError(_nothing_to_measure(recipe, head, held, head.name in steps))
    covered = spoken(sum(map(len, sequences)) * recipe.tick_ns / 1e9)
    return Task(
        epoch,
        validation,
        test,
        {s.name: s.encoder for s in specs},
        f"{len(sequences)} own recordings, {covered} in ticks of {spoken(recipe.tick_ns / 1e9)}; held out: {held}.",
        times * total,
        warnings=(*few_examples(recipe, train, validation, test), *warnings),
    )


def _check_columns(paths: Sequence[Path]) -> None:
    """Refuse tables whose columns differ: their numbers would be mixed up."""
    named = [(path, columns) for path in paths if (columns := columns_of(Recording(path)))]
    for path, columns in named[1:]:
        for stream in columns.keys() & named[0][1].keys():
            if columns[stream] != named[0][1][stream]:
                raise FileError(
                    f"the stream {stream!r} of {path.name} has the columns {', '.join(columns[stream])}, that of "
                    f"{named[0][0].name} has {', '.join(named[0][1][stream])}; import them with the same --stream"
                )


def _check_targets(recipe: Recipe, sequences: Sequence[Ticks]) -> None:
    for head in recipe.heads:
        if not any(s.weights[head.name].any() for s in sequences):
            wanted = f" ({', '.join(head.labels)})" if head.labels else ""
            raise FileError(
                f"no tick of the {len(sequences)} recordings has a target for the head {head.name!r}{wanted}"
            )
        if head.kind == "classification" and head.labels:
            seen = {int(c) for s in sequences for c in np.unique(s.targets[head.name][s.weights[head.name] > 0])}
            absent = [label for i, label in enumerate(head.labels) if i not in seen]
            if absent:
                raise FileError(
                    f"the head {head.name!r} has labels that never occur: {', '.join(absent)}; take them out of the "
                    "recipe, or give each for a tick or longer"
                )


def _never_true(recipe: Recipe, paths: Sequence[Path], recorded: Sequence[RecordedTicks]) -> tuple[str, ...]:
    """A sentence for each label that was given, but is true in no tick: it ended at once, or came after the last."""
    found = []
    for tier in dict.fromkeys(filter(None, (_tier_of(head, recipe) for head in recipe.heads))):
        true = set().union(*(ticks.labels(tier) for ticks in recorded))
        for path, ticks in zip(paths, recorded, strict=True):
            given = dict.fromkeys(name for _, name in ticks.events.tiers.get(tier, []))
            found += [
                f"the label {name!r} of {path.name} is true in no tick, and cannot be learned: give it for a tick or "
                "longer, and before the recording ends"
                for name in given
                if name not in true and name not in NOTHING
            ]
    return tuple(found)


def _tier_of(head: HeadRecipe, recipe: Recipe) -> str:
    """The tier whose labels are the head's targets; "" if they are not labels."""
    kind, _, tier = recipe.data.options.get("targets", {}).get(head.name, SOURCES[head.kind]).partition("/")
    return tier or topics.LABEL if kind == topics.LABEL else ""


def _nothing_to_measure(recipe: Recipe, head: HeadRecipe, held: str, forecasts: bool) -> str:
    if forecasts:
        season = forecast.options_of(recipe).season
        return (
            f"the recordings are too short for the head {head.name!r} (held out: {held}): nothing could be learnt or "
            f"measured; forecast fewer steps{f', use a season shorter than {season} ticks' if season else ''}, or give "
            "longer recordings"
        )
    return (
        f"no tick that is held out ({held}) has a target for the head {head.name!r}: nothing could be "
        "measured; label every recording to its end, or give three or more"
    )


def _part(s: Ticks, begin: float, end: float) -> Ticks:
    a, b = round(begin * len(s)), round(end * len(s))
    return cut(s, a, b)
