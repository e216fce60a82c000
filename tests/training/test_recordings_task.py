"""Targets that are computed from recordings."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from small_recordings import BEGIN, envelopes, write

from stream_mmrnn.capture.encoders.audio import SPEECH
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import ConfigError, FileError
from stream_mmrnn.core.types import Envelope, ModalitySpec, Tick
from stream_mmrnn.offline.convert.unpack import inspect
from stream_mmrnn.offline.labels.attach import LabelOptions, attach
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.columns import Columns
from stream_mmrnn.predict.pipeline import NoEngine, predict
from stream_mmrnn.recording import column_reader
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.settings import settings_of
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training import tasks
from stream_mmrnn.training.own_recipe import recipe_for
from stream_mmrnn.training.tasks.recordings import TypedEvents, files_of, sequence, ticks_of


@pytest.mark.parametrize("encoder", ["", "mel@2"])
def test_future_speech_needs_the_encoder_that_has_it(tmp_path: Path, encoder: str) -> None:
    """Also where another encoder feeds audio: its numbers must not be taken for the probability of speech."""
    path = write(tmp_path / "a.mcap", envelopes(0, 40))
    recipe = recipes.parse(
        {
            "name": "x",
            "modalities": {"audio": {"size": 4, "encoder": encoder}},
            "heads": [{"name": "speaks", "kind": "activity_projection", "size": 1, "horizons_s": [[0, 0.2]]}],
            "data": {"kind": "recordings"},
            "fusion": {"kind": "concat", "width": 8},
            "cell": {"kind": "gru", "hidden": 8},
            "train": {"epochs": 1, "batch": 8, "length": 10, "learning_rate": 3e-3, "patience": 1},
            "quick": {"epochs": 1},
        }
    )
    with pytest.raises(
        ConfigError, match="'speaks' needs the probability of speech, which the modality audio has from"
    ):
        sequence(path, recipe, [ModalitySpec("audio", 4, encoder, "mean", 1)])


SPECS = [
    ModalitySpec("vision", 3, "", "last", 1),
    ModalitySpec("audio", 81, "", "mean", 1),
    ModalitySpec("text", 2, "", "sum", 1),
]
T = 40_000_000
HORIZONS = [[0.0, 0.2], [0.2, 0.5]]


def talk(seconds: float, seed: int = 0) -> list[Envelope]:
    """A session with pictures that stop, sound, words that come late, and labels."""
    rng, at, out = np.random.default_rng(seed), BEGIN, []
    seq = dict.fromkeys(("clock", "vision", "audio", "text", "label"), 0)

    def add(name: str, topic: str, event_ns: int, payload: object, session: str = "live") -> None:
        out.append(Envelope(topic, session, seq[name], event_ns, at, at, payload))  # type: ignore[arg-type]
        seq[name] += 1

    opened = wire.pack(wire.SessionMessage("open", at, ("vision", "audio", "text")))
    out.append(Envelope(topics.SESSION, "live", 0, at, at, at, opened))
    while at < BEGIN + seconds * 1e9:
        at += 10_000_000
        add("clock", topics.CLOCK, at, b"", topics.EVERYONE)
        if seq["clock"] % 2 == 0:
            add("audio", "feature/audio", at - 5_000_000, rng.random(81, np.float32))
        if seq["clock"] % 4 == 0 and seq["clock"] % 300 < 200:
            add("vision", "feature/vision", at - 9_000_000, rng.random(3, np.float32))
        if rng.random() < 0.05:
            add("text", "feature/text", at - int(rng.integers(0, 400)) * 1_000_000, rng.random(2, np.float32))
        if rng.random() < 0.02:
            label = str(rng.choice(["sits", "walks", "none", "else"]))
            add("label", topics.LABEL, at, label.encode())
    return out


def recipe_of_talk() -> recipes.Recipe:
    return recipes.parse(
        {
            "name": "x",
            "modalities": {m.name: {"size": m.size, "reduction": m.reduction} for m in SPECS},
            "heads": [
                {"name": "does", "kind": "classification", "size": 2, "labels": ["sits", "walks"]},
                {"name": "says", "kind": "hazard", "size": 2, "horizons_s": HORIZONS},
                {"name": "moves", "kind": "regression", "size": 2, "horizons_s": HORIZONS},
                {"name": "speaks", "kind": "activity_projection", "size": 2, "horizons_s": HORIZONS},
            ],
            "data": {"kind": "recordings"},
            "fusion": {"kind": "concat", "width": 8},
            "cell": {"kind": "gru", "hidden": 8},
            "train": {"epochs": 1, "batch": 8, "length": 10, "learning_rate": 3e-3, "patience": 1},
            "quick": {"epochs": 1},
        }
    )


def one_by_one(path: Path) -> list[Tick]:
    recording = Recording(path)
    return list(predict(recording.envelopes(), Aligner.of(SPECS, T, settings_of(recording)), NoEngine()))


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("block_bytes", [1 << 12, 4 << 20])
def test_training_data_are_what_the_engine_would_have_seen(
    tmp_path: Path, share: float, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a whole file and of one that was cut off, read in small pieces or at once."""
    monkeypatch.setattr(column_reader, "BLOCK_BYTES", block_bytes)
    path = write(tmp_path / "a.mcap", talk(12.0))
    content = path.read_bytes()
    path.write_bytes(content[: round(share * len(content))])
    expected, got = one_by_one(path), ticks_of(path, SPECS, T)
    assert len(expected) > 100
    assert got.indices.tolist() == [t.index for t in expected]
    assert got.event_ns.tolist() == [t.event_ns for t in expected]
    columns = Columns(SPECS, len(expected))
    features = [np.empty((len(expected), m.size), np.float32) for m in SPECS]
    present, age = (np.empty((len(expected), len(SPECS)), np.float32) for _ in range(2))
    columns.fill(columns.block(expected, range(len(expected))), slice(None), [0] * 3, features, present, age)
    assert got.present.tobytes() == (present > 0).tobytes()
    assert got.age_s.tobytes() == age.tobytes()
    assert [v.tobytes() for v in got.features.values()] == [v.tobytes() for v in features]
    labels = [e for e in Recording(path).envelopes() if e.topic == topics.LABEL]
    assert got.events.labels == sorted((e.event_ns, bytes(e.payload).decode()) for e in labels)
    words = [e.event_ns for e in Recording(path).envelopes() if e.topic == "feature/text"]
    assert got.events.texts_ns.tolist() == sorted(words)


def test_targets_are_what_their_definition_says(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mcap", talk(20.0))
    made, ticks, events = sequence(path, recipe_of_talk(), SPECS), one_by_one(path), TypedEvents.of(Recording(path))
    last_ns = ticks[-1].event_ns
    for k, tick in enumerate(ticks):
        label = next((name for at_ns, name in reversed(events.labels) if at_ns <= tick.event_ns), "")
        known = label in ("sits", "walks")
        assert made.weights["does"][k] == known
        assert made.targets["does"][k] == (label == "walks")
        waits_s = [(at_ns - tick.event_ns) / 1e9 for at_ns in events.texts_ns.tolist() if at_ns > tick.event_ns]
        word = next((j for j, (a, b) in enumerate(HORIZONS) if waits_s and a < waits_s[0] <= b), 2)
        assert made.targets["says"][k] == word
        assert made.weights["says"][k] == (word < 2 or tick.event_ns + 500_000_000 <= last_ns)
        for j, (begin, end) in enumerate(((1, 6), (6, 13))):
            ahead = ticks[k + begin : k + end]
            if len(ahead) == end - begin:
                loud = sum(t.present["audio"] and t.features["audio"][SPEECH] >= 0.5 for t in ahead)
                assert made.targets["speaks"][k, j] == (loud >= 0.5 * len(ahead))
        assert made.weights["speaks"][k] == (k + 13 <= len(ticks))
    assert {0.0, 1.0} == set(made.weights["does"].tolist())
    assert {0, 1, 2} == set(made.targets["says"].tolist())
    assert made.weights["moves"].any()


def test_labels_given_afterwards_train_as_typed_ones(tmp_path: Path) -> None:
    """The same targets and weights, tick by tick; a tier of its own is the source of the head that names it."""
    messages = talk(12.0)
    typed = write(tmp_path / "typed.mcap", messages)
    bare = write(tmp_path / "bare.mcap", [e for e in messages if e.topic != topics.LABEL])
    zero_ns = inspect(bare).zero_ns
    rows = ["tier,begin_s,label"]
    for e in messages:
        if e.topic == topics.LABEL:
            rows += [
                f"{tier},{(e.event_ns - zero_ns) / 1e9:.9f},{bytes(e.payload).decode()}" for tier in ("label", "x")
            ]
    (tmp_path / "notes.csv").write_text("\n".join(rows))
    attach(bare, [tmp_path / "notes.csv"], LabelOptions())
    recipe = recipe_of_talk()
    a, b = (sequence(path, recipe, SPECS) for path in (typed, bare))
    assert 0 < a.weights["does"].sum() < len(a)
    recipe.data.options["targets"] = {"does": "label/x"}
    for other in (b, sequence(bare, recipe, SPECS)):
        assert a.targets["does"].tolist() == other.targets["does"].tolist()
        assert a.weights["does"].tolist() == other.weights["does"].tolist()
    recipe.data.options["targets"] = {"does": "label/y"}
    assert not sequence(bare, recipe, SPECS).weights["does"].any()


def test_a_recording_without_ticks_or_with_other_features_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mcap", [e for e in talk(1.0) if e.topic != topics.SESSION])
    with pytest.raises(FileError, match="has no ticks; was anything recorded"):
        ticks_of(path, SPECS, T)
    path = write(tmp_path / "b.mcap", talk(2.0))
    with pytest.raises(FileError, match="the features of audio are another encoder's"):
        ticks_of(path, [ModalitySpec("audio", 81, "mel@3", "mean", 1)], T)


def label(name: str, at_ns: int) -> Envelope:
    return Envelope(topics.LABEL, "live", 10_000, at_ns, at_ns, at_ns, name.encode())


def test_a_label_that_is_true_in_no_tick_is_no_class_and_named(tmp_path: Path) -> None:
    """One ends before a tick does, another comes after the last tick."""
    messages = talk(12.0)
    inside = (BEGIN // T + 50) * T + 1_000_000
    late = [label("blink", inside), label("sits", inside + 1_000_000), label("stop", messages[-1].publish_ns)]
    paths = [write(tmp_path / "a.mcap", messages + late), write(tmp_path / "b.mcap", talk(12.0, 1))]
    recipe = recipe_for(paths, "mine")
    assert recipe.heads[0].labels == ("else", "sits", "walks")
    found = [text for text in tasks.create(recipe, paths).warnings if "true in no tick" in text]
    assert [text.partition(" is true")[0] for text in found] == [
        "the label 'blink' of a.mcap",
        "the label 'stop' of a.mcap",
    ]
    assert "give it for a tick or longer, and before the recording ends" in found[0]
    head = msgspec.structs.replace(recipe.heads[0], size=4, labels=("else", "sits", "stop", "walks"))
    with pytest.raises(FileError, match="never occur: stop; take them out of the recipe, or give each for a tick or"):
        tasks.create(msgspec.structs.replace(recipe, heads=(head,)), paths)


@pytest.mark.parametrize(("count", "says"), [(1, True), (2, True), (3, False)])
def test_a_test_on_the_ticks_that_chose_the_model_is_named(tmp_path: Path, count: int, says: bool) -> None:
    paths = [write(tmp_path / f"{i}.mcap", talk(12.0, i)) for i in range(count)]
    warnings = tasks.create(recipe_for(paths, "mine"), paths).warnings
    assert any("the same ticks chose the model and measured it" in text for text in warnings) == says


def test_a_recording_shorter_than_a_horizon_has_no_motion_to_learn(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mcap", talk(0.4))
    made = sequence(path, recipe_of_talk(), SPECS)
    assert 0 < len(made) < 13
    assert not made.weights["moves"].any()


def test_the_parts_of_a_recording_are_no_recordings_of_their_own(tmp_path: Path) -> None:
    first = write(tmp_path / "anna.mcap", envelopes(0, 20))
    bert = write(tmp_path / "bert.mcap", envelopes(0, 20))
    parts = [write(tmp_path / f"anna.part{n}.mcap", envelopes(n, 20), number=n) for n in (2, 3)]
    with pytest.raises(FileError, match=r"anna\.mcap is the first of 3 parts; join them by stream-mmrnn repair .*anna"):
        files_of([tmp_path])
    for part in parts:
        part.unlink()
    assert files_of([tmp_path]) == [first, bert]
