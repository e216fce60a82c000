"""The ends of turns in a session: derived because the model takes them, recorded, replayed, killed, left out."""

from __future__ import annotations

import os
import signal
import wave
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_model
from harness import Running, check_summary, recorded, run, ticks_of, verify

from stream_mmrnn.capture import encoders
from stream_mmrnn.capture.sources.file import FileSound
from stream_mmrnn.capture.speech.turn_end import TurnEnd
from stream_mmrnn.core.settings import MicrophoneSettings
from stream_mmrnn.core.types import ModalitySpec, Sample
from stream_mmrnn.offline.replay import replay

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.shared_data]

FEATURE = "feature/turn_end"


@pytest.fixture(scope="module")
def taker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that takes sound and the ends of turns."""
    audio, turn_end = encoders.create_encoder("audio"), encoders.create_encoder("turn_end")
    specs = [ModalitySpec("audio", audio.size, audio.origin)]
    specs += [ModalitySpec(name, 1, turn_end.origin) for name in ("turn_end", "other_turn_end")]
    return toy_model.make(tmp_path_factory.mktemp("models") / "toy.onnx", tuple(specs))


@pytest.fixture(scope="module")
def talk(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sentences, with a pause after each."""
    pieces: list[Any] = []
    for name in ("lwbsza.mpg", "sbwe5n.mpg"):
        source = FileSound(clips / name, MicrophoneSettings(), paced=False)
        source.open()
        pieces += [*(sample.data for sample in source.samples(lambda: True, 0)), np.zeros(8000, np.int16)]
        source.close()
    return written(tmp_path_factory.mktemp("sound") / "talk.wav", np.concatenate(pieces))


def written(path: Path, sound: Any) -> Path:
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(sound.tobytes())
    return path


@pytest.fixture
def quiet(tmp_path: Path) -> Path:
    file = tmp_path / "quiet.toml"
    file.write_text("[dashboard]\nenabled = false\n")
    return file


def test_a_model_gets_it_unasked_and_replay_from_raw_derives_the_same(
    tmp_path: Path, quiet: Path, taker: Path, talk: Path
) -> None:
    path = tmp_path / "a.mcap"
    code, summary, err = run(
        *("live", "--config", quiet, "--model", taker, "--record", path),
        *("--vision", "none", "--audio", f"file:{talk}", "--text", "none"),
    )
    assert code == 0, err
    check_summary(summary)
    assert set(summary["streams"]) == {"audio", "turn_end"}
    about = summary["streams"]["turn_end"]["source"]
    assert (about["source"], about["from"]) == ("from:audio/turn_end (smart-turn-v3.2)", "audio")
    # on a machine that is too busy, pauses are left out
    assert (about["lost"], about["garbage"], about["pauses"] + about["skipped"]) == (0, 0, 2)
    made, sound = recorded(path, FEATURE), recorded(path, "raw/audio")
    assert {e.origin for e in made} <= {encoders.create_encoder("turn_end").origin}
    # what was heard, derived again by itself, has the same times and numbers
    alone = TurnEnd("audio")
    again = [made for e in sound for made in alone.derive(Sample(e.event_ns, e.capture_ns, e.payload))]
    known = {s.event_ns: float(s.data[0]) for s in again}
    assert len(known) == 2
    assert len(made) == about["pauses"]
    assert all(known[e.event_ns] == float(e.payload[0]) for e in made)
    assert all(e.publish_ns > e.event_ns for e in made)
    ticks = ticks_of(path)
    assert [tick.present["turn_end"] for tick in ticks].count(True) == len(made)
    assert (ticks[-1].age_ns["turn_end"] > 0) == (len(made) > 0)
    assert {(tick.present["other_turn_end"], tick.age_ns["other_turn_end"]) for tick in ticks} == {(False, -1)}
    verify(path, summary["predictions"])
    code, replayed, err = run("replay", path, "--from", "raw")
    assert (code, replayed["identical"], replayed["predictions"]) == (0, True, summary["predictions"]), err


def test_a_recording_without_it_gets_it_in_a_replay_from_raw(
    tmp_path: Path, quiet: Path, taker: Path, talk: Path
) -> None:
    path = tmp_path / "a.mcap"
    code, summary, err = run(
        *("record", path, "--config", quiet, "--vision", "none", "--audio", f"file:{talk}", "--text", "none"),
    )
    assert code == 0, err
    assert set(summary["streams"]) == {"audio"}
    for source, count in (("features", 0), ("raw", 2)):
        seen: list[float] = []
        result = replay(
            path,
            source=source,  # type: ignore[arg-type]
            model=str(taker),
            on_prediction=lambda p: seen.append(p.tick.present["turn_end"]),  # noqa: B023
        )
        assert seen.count(True) == count
        assert result["streams"]["turn_end"]["delivered"] == count


@pytest.mark.parametrize("options", [("--stream", "turn_end=none"), ("--audio", "none", "--stream", "mic:audio=push")])
def test_it_is_masked_where_it_is_not_wanted_or_no_sound_comes(
    tmp_path: Path, quiet: Path, taker: Path, talk: Path, options: tuple[str, ...]
) -> None:
    path = tmp_path / "a.mcap"
    code, summary, err = run(
        *("live", "--config", quiet, "--model", taker, "--record", path, "--duration", 2),
        *("--vision", "none", "--text", "none", "--audio", f"file:{talk}", *options),
    )
    assert code == 0, err
    check_summary(summary)
    asked = "turn_end" in summary["streams"]
    assert asked == ("mic" in summary["streams"])
    assert not any(tick.present["turn_end"] for tick in ticks_of(path))
    verify(path, summary["predictions"])


def test_the_session_goes_on_when_it_is_killed(tmp_path: Path, quiet: Path, taker: Path, talk: Path) -> None:
    path = tmp_path / "a.mcap"
    with wave.open(str(talk)) as once:
        long = written(tmp_path / "long.wav", np.tile(np.frombuffer(once.readframes(once.getnframes()), "<i2"), 8))
    options = ("--vision", "none", "--audio", f"file:{long}", "--text", "none")
    with closing(Running("--config", quiet, "--model", taker, "--record", path, *options)) as live:
        live.wait_for(lambda: len(recorded(path, FEATURE)) > 0, 60)
        [pid] = live.children("turn_end")
        os.kill(pid, signal.SIGKILL)
        before = len(recorded(path, FEATURE))
        live.wait_for(lambda: len(recorded(path, FEATURE)) > before, 60)
        code, summary, _ = live.end()
    assert code == 0
    check_summary(summary)
    assert summary["restarts"] == {"turn_end": ["was killed by SIGKILL"]}
    verify(path, summary["predictions"])
