"""Text from outside cannot control the terminal, and an output of any encoding ends no verb, whatever prints it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import small_recordings
from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.printable import visible
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording.recorder import Recorder

EVIL = "\x1b]0;evil\x07\x1b[31m\x9b2J\x08\r\x7f[bold]\u202e evil"
"""Sets a title, colours, clears the screen, and goes back over what was printed."""
ALLOWED = {"\n"}
VERBS = ("info", "verify", "repair", "replay", "diff", "unpack", "train", "predict", "evaluate")
"""Those that read files of others."""
ENCODINGS = [
    ({"PYTHONIOENCODING": "latin-1"}, "latin-1"),
    ({"PYTHONIOENCODING": "ascii"}, "ascii"),
    ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "utf-8"),
]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Escapes in every field of a recording that is text, and one byte of damage."""
    path = tmp_path_factory.mktemp("evil") / "evil.mcap"
    about = dict.fromkeys(("model", "model_sha256", "platform", "imported_from", EVIL), EVIL)
    recorder = Recorder(path, "live", {**about, "config": "{}", "raw": "true", "part": "1"})
    at = small_recordings.BEGIN
    recorder.write(
        Envelope(topics.SESSION, "live", 0, at, at, at, wire.pack(wire.SessionMessage("open", at, ("audio",))))
    )
    for i in range(40):
        at += 20_000_000
        recorder.write(Envelope(topics.CLOCK, topics.EVERYONE, i, at, at, at, b""))
        recorder.write(Envelope("raw/text", "live", i, at, at, at, EVIL.encode(), EVIL))
        recorder.write(Envelope(topics.LABEL, "live", i, at, at, at, EVIL.encode(), EVIL))
        recorder.write(Envelope("feature/text", "live", i, at, at, at, small_recordings.np.zeros(4, "<f4"), EVIL))
    status = wire.StatusMessage("engine", "ready", 1, "", EVIL, {}, {"source": EVIL})
    recorder.close({"ended": EVIL, "statuses": json.dumps({f"status/{EVIL}": wire.pack(status).decode()}), EVIL: EVIL})
    return path


@pytest.fixture(scope="module")
def damaged(recording: Path) -> Path:
    path = recording.with_name("damaged.mcap")
    content = bytearray(recording.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return path


def run(*args: object, **environment: str) -> tuple[int, bytes]:
    done = subprocess.run(
        [sys.executable, "-m", "stream_mmrnn", *map(str, args)],
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    "verb", ["info", "verify", "repair", "replay", "diff", "unpack", "train", "predict", "evaluate"]
)
def test_no_verb_prints_what_controls_a_terminal(verb: str, recording: Path, damaged: Path, tmp_path: Path) -> None:
    more: dict[str, list[object]] = {
        "repair": [tmp_path / "out.mcap"],
        "unpack": [tmp_path / "out"],
        "diff": [recording],
        "train": ["--out", tmp_path / "model"],
        "evaluate": [],
    }
    for path in (recording, damaged):
        argument = ["--data", path] if verb == "train" else [path]
        for as_json in ((), ("--json",)):
            code, out = run(verb, *argument, *more.get(verb, []), *as_json)
            assert code in (0, 1, 2, 3), out
            assert b"Traceback" not in out
            text = out.decode()
            assert not [c for c in text if not c.isprintable() and c not in ALLOWED], text
            for folder in ("out", "model"):
                if (tmp_path / folder).is_dir():
                    (tmp_path / folder).rename(tmp_path / f"{folder}.{path.stem}.{len(as_json)}")
            (tmp_path / "out.mcap").unlink(missing_ok=True)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(("environment", "encoding"), ENCODINGS)
def test_an_output_of_any_encoding_ends_no_verb(environment: dict[str, str], encoding: str, tmp_path: Path) -> None:
    path = small_recordings.write(tmp_path / "grüße-語-😀.mcap", small_recordings.envelopes(0, 20))
    missing = tmp_path / "語.mcap"
    (tmp_path / "größe.csv").write_text(
        "time,größe\n2020-01-01T00:00:00Z,1\n2020-01-01T00:00:01Z,2\n", encoding="utf-8"
    )
    (tmp_path / "ü.toml").write_text('[record]\npath = "grüße-語.mcap"\n', encoding="utf-8")
    clip = tmp_path / "ä 🎤.wav"
    with wave.open(str(clip), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(16_000))
    quiet = ("--vision", "none", "--text", "none", "--no-dashboard", "--duration", "1")
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.mcap")
    cases: tuple[tuple[tuple[object, ...], int], ...] = (
        *((("info", path), 0), (("verify", path), 0), (("info", path, "--json"), 0), (("info", missing), 2)),
        *(((), 2), (("live", "--help"), 0), (("livé",), 2), (("config", "show", "--config", tmp_path / "ü.toml"), 0)),
        (("import", tmp_path / "größe.csv", tmp_path / "größe.mcap", "--time", "time"), 0),
        (("unpack", path, tmp_path / "語"), 0),
        (("predict", clip, "--out", tmp_path, "--format", "parquet"), 0),
        (("live", "--audio", f"file:{clip}", *quiet, "--record", bad, "--plain"), 0),
        (("verify", bad), 0),
    )
    for args, expected in cases:
        code, out = run(*args, **environment)
        assert code == expected, out
        assert b"Traceback" not in out, out
        if "--json" in args:
            assert json.loads(out.decode(encoding).splitlines()[-1])["session"] == "live"


@given(st.text())
def test_what_is_visible_is_printable_and_keeps_its_length(text: str) -> None:
    seen = visible(text)
    assert len(seen) == len(text)
    assert all(c.isprintable() or c == "\n" for c in seen)
    assert visible(seen) == seen
