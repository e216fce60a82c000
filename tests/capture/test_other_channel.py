"""The second person: in the synthetic dialogue, on the bus, in recordings and as inputs of a model."""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import toy_model
from harness import Running, check_summary, recording_grows, run, ticks_of, verify
from mcap.reader import make_reader
from mcap_protobuf.decoder import DecoderFactory
from rich.console import Console

from stream_mmrnn.capture import encoders
from stream_mmrnn.capture.encoders.audio import SPEECH
from stream_mmrnn.capture.pipeline import capture
from stream_mmrnn.capture.sources.synthetic import Synthetic
from stream_mmrnn.capture.sources.talker import Turn, answers, turns
from stream_mmrnn.core import topics
from stream_mmrnn.core.settings import SyntheticSettings
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Envelope, ModalitySpec, Sample
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.viewers.dashboard.state import LiveState
from stream_mmrnn.viewers.terminal_view import render

pytestmark = pytest.mark.process

TALK = ("audio", "text", "other_audio", "other_text")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with sound and text of two persons, and no vision."""
    specs = tuple(ModalitySpec(m, e.size, e.origin) for m in TALK for e in [encoders.create_encoder(m)])
    return toy_model.make(tmp_path_factory.mktemp("both") / "toy.onnx", specs)


def until(seconds: float, story: Iterator[Turn]) -> list[Turn]:
    return list(itertools.takewhile(lambda t: t.start_s < seconds, story))


def spoken(turn: Turn) -> str:
    return " ".join(w.text for w in turn.words)


# -- the dialogue


def test_the_dialogue_of_a_seed_does_not_change() -> None:
    first, second = itertools.islice(turns(0), 2)
    assert spoken(first) == "we had a long day at work have you seen the new film"
    assert spoken(second).startswith("it was a little too loud maybe we can meet")
    assert [first.start_s, first.end_s, second.start_s] == pytest.approx([1.73761954, 5.05361270, 7.32206416])


@pytest.mark.parametrize("seed", range(5))
def test_the_second_person_speaks_in_the_pauses(seed: int) -> None:
    said, answered = until(120, turns(seed)), until(120, answers(seed))
    assert answered == until(120, answers(seed))
    assert len(answered) >= 8
    for a in answered:
        assert all(a.end_s + 0.2 <= t.start_s or t.end_s + 0.2 <= a.start_s for t in said)
    pitch = [np.median([p.pitch_hz for t in who for w in t.words for p in w.phones]) for who in (said, answered)]
    assert pitch[1] > 1.4 * pitch[0]
    assert [spoken(a) for a in answered] != [spoken(a) for a in until(120, answers(seed + 1))]


def test_the_second_person_has_sound_and_text() -> None:
    """The detector finds speech in each channel when its person speaks, and silence when the other does."""
    seconds = 25
    heard = {}
    for modality in ("audio", "other_audio"):
        encoder = encoders.create_encoder(modality)
        source = Synthetic(Stream.of(modality), SyntheticSettings(), paced=False)
        samples = itertools.islice(source.samples(lambda: True, 0), 50 * seconds)
        heard[modality] = np.array([s.data[SPEECH] for sample in samples for s in encoder.encode(sample)])
    at = np.arange(len(heard["audio"])) * 0.02
    mine, others = (speaking(at, story(0)) for story in (turns, answers))
    assert heard["other_audio"][others].mean() > 0.7
    assert heard["audio"][others].mean() < 0.1
    assert heard["audio"][mine].mean() > 0.7
    assert heard["other_audio"][mine].mean() < 0.1

    words = [w for a in until(seconds, answers(0)) for w in a.words]
    source = Synthetic(Stream.of("other_text"), SyntheticSettings(), paced=False)
    lines = list(itertools.islice(source.samples(lambda: True, 0), len(words)))
    assert [(s.event_ns, s.data.decode()) for s in lines] == [(round(w.end_s * 1e9), w.text) for w in words]


def speaking(at_s: np.ndarray, story: Iterator[Turn]) -> np.ndarray:
    """Where a person has been speaking for a moment, which a detector needs."""
    return np.any([(at_s > t.start_s + 0.15) & (at_s < t.end_s) for t in until(at_s[-1], story)], axis=0)


# -- live


def test_two_persons_live_and_replayed(both: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    code, summary, err = run(
        "live", "--source", "synthetic", "--vision", "none", "--duration", "4", "--model", both, "--record", path
    )
    assert code == 0, err
    check_summary(summary)
    assert tuple(summary["streams"]) == TALK
    assert all(s["delivered"] > 0 for s in summary["streams"].values())
    assert summary["recording"]["lost"] == 0
    verify(path, summary["predictions"])
    code, raw, err = run("replay", path, "--from", "raw")
    assert code == 0, err
    assert raw["predictions"] == summary["predictions"]
    assert raw["missing"] == raw["extra"] == 0
    assert raw["max_abs_difference"] <= 1e-4

    recording = Recording(path)
    began_ns = next(e.event_ns for e in recording.envelopes({topics.SESSION}))
    words = [bytes(e.payload).decode() for e in recording.envelopes({"raw/other_text"})]
    assert words == [w.text for a in until(60, answers(0)) for w in a.words][: len(words)]
    heard = {}
    for modality in ("audio", "other_audio"):
        features = list(recording.envelopes({topics.feature(modality)}))
        heard[modality] = np.array([(e.event_ns, e.payload[SPEECH]) for e in features])
    at_s = (heard["other_audio"][:, 0] - began_ns) / 1e9
    others = heard["other_audio"][speaking(at_s, answers(0)), 1]
    assert len(others) > 20
    assert others.mean() > 0.6
    at_s = (heard["audio"][:, 0] - began_ns) / 1e9
    assert heard["audio"][speaking(at_s, answers(0)), 1].mean() < 0.2
    assert heard["audio"][speaking(at_s, turns(0)), 1].mean() > 0.6
    voices = [dict(heard[m]) for m in heard]
    assert np.mean([min(v, voices[1].get(t, 0.0)) > 0.5 for t, v in voices[0].items()]) < 0.05
    assert any(t.present["other_text"] for t in ticks_of(path))

    with path.open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        schema, _, _, sound = next(reader.iter_decoded_messages(topics=["raw/other_audio"]))
    assert (schema.name, sound.format, sound.sample_rate, len(sound.data)) == (
        "foxglove.RawAudio", "pcm-s16", 16000, 640,
    )  # fmt: skip


def test_a_model_without_the_second_person_does_not_wait_for_it(model: Path, tmp_path: Path) -> None:
    """`--source` starts what the model uses; a source with its own option always runs and is recorded."""
    path = tmp_path / "a.mcap"
    args = ("--source", "synthetic", "--vision", "none", "--duration", "2", "--model", model, "--record", path)
    code, summary, err = run("live", *args, "--other-audio", "synthetic")
    assert code == 0, err
    check_summary(summary)
    assert tuple(summary["streams"]) == ("audio", "text", "other_audio")
    assert summary["streams"]["other_audio"]["delivered"] > 80
    assert all(set(t.present) == {"vision", "audio", "text"} for t in ticks_of(path))
    assert sum(1 for _ in Recording(path).envelopes({"raw/other_audio"})) > 80
    verify(path, summary["predictions"])


def test_labels_come_with_two_streams_of_text(both: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    read, write = os.pipe()
    args = ("--vision", "none", "--audio", "none", "--text", "stdin", "--other-text", "synthetic")
    with closing(Running(*args, "--model", both, "--record", path, stdin=read)) as live:
        os.close(read)
        live.wait_for(lambda: recording_grows(path, 5_000))
        for line in (b"hello\n", b"/label sitting\n", b"there\n"):
            os.write(write, line)
            time.sleep(0.1)
        live.wait_for(lambda: said(path, "raw/other_text"))
        os.close(write)
        code, summary, _ = live.end()
    assert code == 0
    check_summary(summary)
    assert said(path, topics.LABEL) == ["sitting"]
    assert said(path, "raw/text") == ["hello", "there"]
    words = said(path, "raw/other_text")
    assert words == [w.text for a in until(60, answers(0)) for w in a.words][: len(words)]
    verify(path, summary["predictions"])


def said(path: Path, topic: str) -> list[str]:
    return [bytes(e.payload).decode() for e in Recording(path).envelopes({topic})]


def test_record_keeps_both_persons(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    code, summary, err = run("record", path, "--source", "synthetic", "--vision", "none", "--duration", "2.5")
    assert code == 0, err
    assert tuple(summary["streams"]) == TALK
    code, info, _ = run("info", path)
    assert code == 0
    assert {topics.raw(m) for m in TALK} | {topics.feature(m) for m in TALK} <= set(info["channels"])


# -- what is shared with the first person, and what is not


def test_other_text_is_never_a_label() -> None:
    encoder = encoders.create_encoder("other_text")
    sample = Sample(1, 1, b"/label sitting")
    out = list(capture([sample], Stream.of("other_text"), "tcp", {"other_text": encoder}, lambda _: None))
    assert [o.topic for o in out] == ["feature/other_text", "raw/other_text"]
    out = list(capture([sample], Stream.of("text"), "tcp", {"text": encoder}, lambda _: None, labels=True))
    assert [o.topic for o in out] == [topics.LABEL]


def test_views_show_which_person_spoke() -> None:
    view = LiveState()
    at = 10**15
    for i, (topic, word) in enumerate((("raw/text", b"well"), ("raw/other_text", b"yes"), ("raw/text", b"then"))):
        view.observe(Envelope(topic, "live", i // 2, at + i, at + i, at + i, word))
    view.observe(Envelope("feature/other_audio", "live", 0, at, at, at, np.zeros(81, np.float32)))
    state = view.snapshot(at + 1_000_000)
    assert [t["text"] for t in state["texts"]] == ["then", "well"]
    assert [t["text"] for t in state["other_texts"]] == ["yes"]
    assert state["streams"]["feature/other_audio"]["modality"] == "other_audio"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(state, 100, "", []))
    shown = console.export_text()
    assert "text  well  then" in shown
    assert "other yes" in shown
    assert "other_audio" in shown
