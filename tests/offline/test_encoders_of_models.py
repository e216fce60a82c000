"""The encoders that a model asks for, in `Predictor`, in replay and in what trains on a recording."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
import toy_model

from stream_mmrnn.capture import derive
from stream_mmrnn.capture.encoders import create_encoder
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import for_model
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Envelope, ModalitySpec, Prediction, Sample
from stream_mmrnn.offline.predictor import Predictor
from stream_mmrnn.offline.replay import _has_other_times, replay
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.report import info
from stream_mmrnn.training.own_recipe import recipe_for

TICK_NS = toy_model.TICK_NS
BEGIN_NS = 1000 * TICK_NS
FACE, IMAGE, TEXT, TOKENS = (create_encoder(name) for name in ("face", "vision", "text", "tokens"))
BY_FACE = (
    ModalitySpec("vision", FACE.size, FACE.origin),
    ModalitySpec("text", TEXT.size, TEXT.origin),
    ModalitySpec("text.tokens", 2 * TOKENS.size, TOKENS.origin, "stack", 2),
)
BY_IMAGE = (ModalitySpec("vision", IMAGE.size, IMAGE.origin), ModalitySpec("text", TEXT.size, TEXT.origin))


@pytest.fixture(scope="module")
def by_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model.make(tmp_path_factory.mktemp("m") / "face.onnx", BY_FACE)


@pytest.fixture(scope="module")
def by_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model.make(tmp_path_factory.mktemp("m") / "image.onnx", BY_IMAGE)


def jpeg(seed: int) -> bytes:
    picture = cv2.resize(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8), (160, 120))
    return cv2.imencode(".jpg", picture)[1].tobytes()


PICTURES = [jpeg(k) for k in range(10)]
WORDS = [(2, "hello"), (4, "one"), (4, "two"), (4, "three"), (7, "unbelievably")]
"""The tick, from 1, and the word."""


def record(
    path: Path,
    model: Path,
    specs: tuple[ModalitySpec, ...],
    labels: bool = False,
    streams: dict[str, dict[str, Any]] | None = None,
) -> None:
    """What a session with a model records, of ten pictures and some words."""
    settings = for_model(config.load(None, {"engine.model": str(model)}, streams), specs)
    about = {"config": msgspec.json.encode(settings).decode(), "raw": "true"}
    recorder = Recorder(path, "live", about)
    seq: dict[str, int] = {}
    wanted = settings.engine.encoders

    def send(topic: str, at_ns: int, payload: Any, origin: str = "") -> None:
        seq[topic] = seq.get(topic, -1) + 1
        session = topics.EVERYONE if topic == topics.CLOCK else "live"
        recorder.write(Envelope(topic, session, seq[topic], at_ns, at_ns, at_ns, payload, origin))

    def sample(stream: str, at_ns: int, data: bytes) -> None:
        names = wanted.get(stream, (stream,))
        for k, name in enumerate(names):
            encoder = encoders[name]
            (vector,) = encoder.encode(Sample(at_ns, at_ns, data))
            send(topics.feature(stream + (f".{name}" if k else "")), at_ns, vector.data, encoder.origin)
        send(topics.raw(stream), at_ns, data, "source")

    encoders = {"vision": IMAGE, "face": FACE, "text": TEXT, "tokens": TOKENS}
    FACE.reset()
    send(topics.CLOCK, BEGIN_NS, b"")
    opened = wire.pack(wire.SessionMessage("open", BEGIN_NS, ("vision", "text")))
    send(topics.SESSION, BEGIN_NS, opened)
    for k, picture in enumerate(PICTURES, 1):
        at_ns = BEGIN_NS + k * TICK_NS
        if labels:
            send(topics.LABEL, at_ns, b"a" if k % 2 else b"b")
        for i, word in enumerate(w for tick, w in WORDS if tick == k):
            sample("text", at_ns - TICK_NS // 2 + i, word.encode())
        sample("vision", at_ns, picture)
        send(topics.CLOCK, at_ns, b"")
    send(topics.CLOCK, BEGIN_NS + 20 * TICK_NS, b"")
    recorder.close({"ended": "clean", "lost": "{}"})


def bits(made: list[Prediction]) -> list[tuple[int, bytes, tuple[bool, ...]]]:
    return [
        (p.tick.event_ns, p.heads["next"].tobytes(), tuple(p.tick.present.values()))
        for p in made
        if p.tick.event_ns <= BEGIN_NS + len(PICTURES) * TICK_NS
    ]


def replayed(path: Path, **options: Any) -> tuple[list[tuple[int, bytes, tuple[bool, ...]]], dict[str, Any]]:
    made: list[Prediction] = []
    result = replay(path, on_prediction=made.append, **options)
    return bits(made), result


def test_a_predictor_and_replays_give_a_model_the_features_that_it_asks_for(tmp_path: Path, by_face: Path) -> None:
    path = tmp_path / "a.mcap"
    record(path, by_face, BY_FACE)
    from_features, result = replayed(path)
    assert result["streams"]["vision"]["delivered"] == 10
    # the oldest word of three in one tick has no place
    tokens = result["streams"]["text.tokens"]
    assert (tokens["received"], tokens["delivered"], tokens["dropped"]) == (5, 4, {"superseded": 1})
    assert len(from_features) == 10
    assert len({heads for _, heads, _ in from_features}) > 5
    from_raw, _ = replayed(path, source="raw")
    assert from_raw == from_features
    predictor = Predictor(by_face, inputs=["vision", "text"], zero_ns=BEGIN_NS)
    made = []
    for k, picture in enumerate(PICTURES, 1):
        for i, word in enumerate(w for tick, w in WORDS if tick == k):
            made += predictor.push_text(word, ((k - 0.5) * TICK_NS + i) / 1e9)
        made += predictor.push_frame(picture, k * TICK_NS / 1e9)
    assert bits(made) == from_features
    assert info(path)["encoders"] == {
        "vision": {"encoders": ("face",), "why": "the model's choice"},
        "text": {"encoders": ("text", "tokens"), "why": "the model's choice"},
    }


def test_a_recording_of_another_model_is_encoded_anew_from_raw(tmp_path: Path, by_face: Path, by_image: Path) -> None:
    path, other = tmp_path / "a.mcap", tmp_path / "b.mcap"
    record(path, by_image, BY_IMAGE)
    record(other, by_face, BY_FACE)
    masked, result = replayed(path, model=str(by_face))
    assert result["streams"]["vision"]["dropped"] == {"quarantined": 10}
    assert [present for _, _, present in masked] == [(False, k in (2, 4, 7), False) for k in range(1, 11)]
    whole, _ = replayed(other)
    anew, result = replayed(path, model=str(by_face), source="raw")
    assert anew == whole
    assert result["streams"]["vision"]["dropped"] == {}
    # and the other way round
    assert replayed(other, model=str(by_image), source="raw")[0] == replayed(path)[0]


@pytest.mark.parametrize(
    ("then", "now", "other"),
    [
        ((), ("face",), False),
        (("face",), ("vision",), False),
        (("slope",), ("slope",), False),
        ((), ("slope",), True),
        (("slope",), ("face",), True),
    ],
)
def test_vectors_of_a_plug_in_have_times_of_their_own(then: tuple[str, ...], now: tuple[str, ...], other: bool) -> None:
    """Those of another encoder take the places of the recorded ones only where both are the package's own."""
    cam = Stream.of("vision", source="push")
    before, after = (msgspec.structs.replace(cam, encoders=names) for names in (then, now))
    assert _has_other_times("vision", after, {"vision": before}) == other
    assert _has_other_times("vision", after, {})


def test_an_encoder_that_a_recording_s_settings_do_not_name_is_masked(tmp_path: Path, by_image: Path) -> None:
    path = tmp_path / "a.mcap"
    rows = {"vision": {"source": "push", "kind": "vision", "encoders": ["vision"]}, "text": {"source": "page"}}
    record(path, by_image, BY_IMAGE, streams=rows)
    further = (*BY_IMAGE, ModalitySpec("vision.face", FACE.size, FACE.origin))
    model = toy_model.make(tmp_path / "further.onnx", further)
    for source in ("features", "raw"):
        made, _ = replayed(path, model=str(model), source=source)
        assert [present for _, _, present in made] == [(True, k in (2, 4, 7), False) for k in range(1, 11)]


def test_encoders_that_settings_name_stay(by_face: Path) -> None:
    rows = {"vision": {"source": "push", "kind": "vision", "encoders": ["vision"]}}
    predictor = Predictor(by_face, settings=config.parse({"streams": rows}))
    with pytest.raises(UsageError, match="its features have 1280 numbers, the model takes 99"):
        predictor.push_frame(PICTURES[0], 0.04)


def test_a_vector_of_a_stream_that_the_model_takes_otherwise_is_one_sentence(tmp_path: Path) -> None:
    predictor = Predictor(toy_model.make(tmp_path / "m.onnx", (BY_FACE[2],)))
    with pytest.raises(UsageError, match=r"takes no vectors 'text'; it takes text\.tokens"):
        predictor.push("text", np.zeros(256), 0.04)
    made = predictor.push("text.tokens", [5, *[0] * 7], 0.02) + predictor.advance(0.04)
    assert made[-1].tick.features["text.tokens"].tolist() == [*[0] * 8, 5, *[0] * 7]


def test_numbers_of_words_are_no_input_of_a_default_recipe(tmp_path: Path, by_face: Path) -> None:
    path = tmp_path / "a.mcap"
    record(path, by_face, BY_FACE, labels=True)
    found = recipe_for([path], "mine").modalities
    assert {name: m.encoder for name, m in found.items()} == {"vision": FACE.origin, "text": TEXT.origin}


@pytest.mark.slow
@pytest.mark.process
def test_only_the_encoders_that_are_asked_for_are_imported(by_image: Path) -> None:
    code = (
        "import sys\n"
        "from stream_mmrnn.offline.predictor import Predictor\n"
        f"p = Predictor({str(by_image)!r})\n"
        f"p.push_frame({PICTURES[0]!r}, 0.04)\n"
        "p.push_text('hello', 0.05)\n"
        "names = [m for m in sys.modules if m.startswith('stream_mmrnn.capture.encoders.')]\n"
        "print(sorted(name.rpartition('.')[2] for name in names))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['image', 'text', 'tokens']"  # the text's own needs the tokenizer


class _Echo:
    """A derivation with a state: the number of samples so far, and at the end one more."""

    origin = "echo@1"

    def __init__(self) -> None:
        self.reset()

    def derive(self, sample: Sample) -> list[Sample]:
        self.count += 1
        return [msgspec.structs.replace(sample, data=str(self.count).encode())]

    def finish(self) -> list[Sample]:
        return self.derive(Sample(9, 9, b""))

    def reset(self) -> None:
        self.count = 0


def test_a_derivation_runs_once_for_all_encoders_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[_Echo] = []

    def derivation_of(*_: object) -> _Echo:
        made.append(_Echo())
        return made[-1]

    monkeypatch.setattr(derive, "derivation_of", derivation_of)
    table = {
        "audio": Stream.of("audio", source="push"),
        "text": msgspec.structs.replace(Stream.of("text", source="from:audio/echo"), encoders=("text", "tokens")),
    }
    text, tokens = derive.encoders_from_root(table["text"], table, Settings()).values()
    assert isinstance(text, derive.DerivedEncoder)
    assert isinstance(tokens, derive.DerivedEncoder)
    for _ in range(2):
        seen = []
        for at in range(3):
            sample = Sample(at, at, np.zeros(1, np.int16))
            seen += [of.encode(sample)[0].data.tobytes() for of in (text, tokens)]
        seen += [of.finish()[0].data.tobytes() for of in (text, tokens)]
        words = [Sample(0, 0, str(k).encode()) for k in range(1, 5)]
        assert seen == [of.encode(w)[0].data.tobytes() for w in words for of in (TEXT, TOKENS)]
        for of in (text, tokens):
            of.reset()
    assert len(made) == 1
