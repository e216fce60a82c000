"""A live session whose model asks for faces, words and their tokens: recorded, replayed, and encoded anew."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

import pytest
import toy_model
from harness import Running, check_summary, recording_grows, run, ticks_of, verify

from stream_mmrnn.capture.encoders import create_encoder
from stream_mmrnn.capture.encoders.face import CONFIDENCE
from stream_mmrnn.core.types import ModalitySpec
from stream_mmrnn.recording.mcap_file import Recording

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.shared_data]


def model_of(path: Path, vision: str) -> Path:
    seen, text, tokens = (create_encoder(name) for name in (vision, "text", "tokens"))
    specs = (
        ModalitySpec("vision", seen.size, seen.origin),
        ModalitySpec("text", text.size, text.origin),
        ModalitySpec("text.tokens", 2 * tokens.size, tokens.origin, "stack", 2),
    )
    return toy_model.make(path, specs)


def test_live_and_replay_give_a_model_what_it_asks_for(tmp_path: Path, clips: Path) -> None:
    by_face, by_image = model_of(tmp_path / "face.onnx", "face"), model_of(tmp_path / "image.onnx", "vision")
    file, path, words = tmp_path / "s.toml", tmp_path / "a.mcap", tmp_path / "words"
    file.write_text("[dashboard]\nenabled = false\n[align]\nvision_lateness_ms = 3000\n")
    os.mkfifo(words)
    streams = ("--vision", f"file:{clips / 'speech.mp4'}", "--audio", "none", "--text", f"pipe:{words}")
    with closing(Running("--config", file, "--model", by_face, "--record", path, *streams)) as live:
        live.wait_for(lambda: recording_grows(path, 50_000), 40)
        with words.open("w") as out:
            for k in range(12):
                # in every third tick or so there are three words, for which the model has two places
                out.write("hello there\n" if k % 3 else "one\ntwo\nthree\n")
                out.flush()
                time.sleep(0.15)
        code, summary, _ = live.end()
    assert code == 0
    check_summary(summary)
    assert set(summary["streams"]) == {"vision", "text", "text.tokens"}
    assert summary["streams"]["vision"]["source"]["encoders"] == [create_encoder("face").origin]
    ticks = ticks_of(path)
    assert sum(tick.present["vision"] for tick in ticks) > 5
    assert sum(tick.present["text.tokens"] for tick in ticks) >= 8
    assert all(tick.present["text"] == tick.present["text.tokens"] for tick in ticks)
    assert summary["streams"]["text.tokens"]["dropped"].keys() <= {"superseded", "unclosed"}
    faces = [e.payload[CONFIDENCE] for e in Recording(path).envelopes({"feature/vision"})]
    assert max(faces) > 0.9
    verify(path, summary["predictions"])
    code, raw, err = run("replay", path, "--from", "raw")
    assert (code, raw["predictions"], raw["identical"]) == (0, summary["predictions"], True), (err, raw)
    code, about, err = run("info", path)
    assert about["encoders"]["vision"] == {"encoders": ["face"], "why": "the model's choice"}, err
    # a model that asks for pictures as wholes finds no such features, and makes them from the pictures
    code, masked, err = run("replay", path, "--model", by_image)
    assert (code, masked["streams"]["vision"]["delivered"]) == (0, 0), err
    assert set(masked["streams"]["vision"]["dropped"]) == {"quarantined"}
    code, anew, err = run("replay", path, "--model", by_image, "--from", "raw")
    assert code == 0, err
    assert anew["streams"]["vision"] == raw["streams"]["vision"]


@pytest.mark.parametrize("named", [True, False])
def test_record_has_the_features_of_a_model_that_is_named(tmp_path: Path, clips: Path, named: bool) -> None:
    model, path = model_of(tmp_path / "face.onnx", "face"), tmp_path / "a.mcap"
    options = ("--model", model) if named else ()
    streams = ("--vision", f"file:{clips / 'speech.mp4'}", "--audio", "none", "--text", "none", "--duration", 1.5)
    code, _, err = run("record", path, *options, *streams)
    assert code == 0, err
    made = {e.origin for e in Recording(path).envelopes({"feature/vision"})}
    assert made == {create_encoder("face" if named else "vision").origin}
