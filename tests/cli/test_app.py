from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import pytest
import small_recordings
import typer

import stream_mmrnn
from stream_mmrnn.cli.app import PANELS, app
from stream_mmrnn.cli.live import keep_old

pytestmark = pytest.mark.process

COMMAND = [sys.executable, "-m", "stream_mmrnn"]


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["live", "--source", "nix"], "'nix' is no source"),
        (["live", "--source", "file:/no/such.wav"], "/no/such.wav"),
        (["live", "--vision", "microphone"], "no source of vision"),
        (["live", "--text", "tcp:abc"], "needs a port"),
        (["live", "--vision", "none", "--audio", "none", "--text", "none"], "every source is `none`"),
        (["live", "--source", "synthetic", "--model", "/no/such.onnx"], "/no/such.onnx cannot be read"),
        (["live", "--source", "synthetic", "--model", "nix"], "no model 'nix'"),
        (["live", "--config", "/no/such.toml"], "/no/such.toml cannot be read"),
        (["live", "--nix"], "No such option"),
        (["replay", "/no/such.mcap"], "/no/such.mcap cannot be read"),
        (["replay", "/no/a.mcap", "/no/b.mcap"], "/no/a.mcap cannot be read"),
        (["replay", "a.mcap", "b.mcap", "--speed", "1"], "--from raw take one recording"),
        (["replay", "a.mcap", "b.mcap", "--from", "raw"], "--from raw take one recording"),
        (["info", "/no/such.mcap"], "/no/such.mcap cannot be read"),
        (["bench", "engine", "--model", "/no/such.onnx"], "/no/such.onnx cannot be read"),
        (["bench", "engine", "--sessions", "0"], "Invalid value"),
        (["bench", "end-to-end", "--model", "/no/such.onnx"], "/no/such.onnx cannot be read"),
        (["bench", "replay", "--recording", "/no/such.mcap"], "/no/such.mcap cannot be read"),
        (["bench", "engine", "--compare", "/no/such.json"], "/no/such.json cannot be read"),
        (["bench", "nix"], "No such command"),
    ],
)
def test_usage_errors_are_one_sentence_and_exit_code_2(args: list[str], words: str) -> None:
    done = run(*args)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_wrong_key_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text("[engine]\nmodle = 'x'\n")
    done = run("live", "--config", tmp_path / "s.toml")
    assert done.returncode == 2
    assert "unknown key `engine.modle`: the nearest is `model`" in done.stderr


def test_an_old_recording_keeps_its_parts(tmp_path: Path) -> None:
    """Otherwise they would be taken for parts of the next session's recording."""
    for name in ("a.mcap", "a.part2.mcap", "a.part3.mcap", "a.old1.mcap", "ab.part2.mcap"):
        (tmp_path / name).write_text(name)
    notes: list[str] = []
    keep_old(tmp_path / "a.mcap", notes.append)
    found = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert found == {
        "a.old1.mcap": "a.old1.mcap",
        "a.old2.mcap": "a.mcap",
        "a.old2.part2.mcap": "a.part2.mcap",
        "a.old2.part3.mcap": "a.part3.mcap",
        "ab.part2.mcap": "ab.part2.mcap",
    }
    assert "and its parts likewise" in notes[0]


@pytest.mark.skipif(sys.platform == "win32", reason="makes a named pipe")
@pytest.mark.parametrize("what", ["pipe", "folder", "link to a pipe", "link to nothing"])
def test_only_a_regular_file_is_renamed_for_a_recording(tmp_path: Path, what: str) -> None:
    """A device node, of which a named pipe stands for all, would be lost for every program of the machine."""
    path, pipe = tmp_path / "a.mcap", tmp_path / "pipe"
    os.mkfifo(pipe)
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        path = pipe
    else:
        path.symlink_to(pipe if what == "link to a pipe" else tmp_path / "nothing")
    before = sorted(p.name for p in tmp_path.iterdir())
    done = run("live", "--source", "synthetic", "--duration", "1", "--record", path)
    assert done.returncode == 2
    assert "is no regular file" in " ".join(done.stderr.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert pipe.is_fifo()


@pytest.mark.skipif(sys.platform == "win32", reason="makes a named pipe")
def test_force_replaces_only_regular_files(tmp_path: Path) -> None:
    clip, out = tmp_path / "a.wav", tmp_path / "a.wav.predictions.csv"
    with wave.open(str(clip), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(32_000))
    done = run("predict", clip, clip, "--out", tmp_path)
    assert (done.returncode, "two files would become" in " ".join(done.stderr.split())) == (2, True)
    assert not out.exists()
    os.mkfifo(out)
    done = run("predict", clip, "--out", tmp_path, "--force")
    assert (done.returncode, "is no regular file" in " ".join(done.stderr.split())) == (2, True)
    recording = small_recordings.write(tmp_path / "a.mcap", small_recordings.envelopes(0, 20))
    (tmp_path / "u").mkdir()
    os.mkfifo(tmp_path / "u" / "manifest.json")
    done = run("unpack", recording, tmp_path / "u", "--force", "--to", "csv")
    assert (done.returncode, "is no regular file" in " ".join(done.stderr.split())) == (2, True)
    assert out.is_fifo()
    assert (tmp_path / "u" / "manifest.json").is_fifo()


def test_devices_answers_everywhere() -> None:
    done = run("devices", "--json")
    assert done.returncode == 0
    assert set(json.loads(done.stdout)) == {"cameras", "microphones", "problem"}


def test_the_command_imports_nothing_heavy() -> None:
    """The command's own process needs no torch, cv2, sounddevice or av. The package alone: docs/test_public_names."""
    heavy = ("torch", "cv2", "sounddevice", "av")
    code = "import sys, stream_mmrnn.cli.app, stream_mmrnn.live.session; "
    code += f"print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout == f"stream-mmrnn {stream_mmrnn.__version__}\n"


def test_help_groups_every_verb_in_a_panel() -> None:
    command: Any = typer.main.get_command(app)
    assert {verb.rich_help_panel for verb in command.commands.values()} == set(PANELS)
    done = run("--help")
    assert done.returncode == 0
    titles = re.findall(r"^\W+ (\w+) \W+$", done.stdout, re.M)
    assert titles == ["Options", *PANELS]
    for name in command.commands:
        assert re.search(rf"^\W+{name} ", done.stdout, re.M), name


def test_measuring_a_model_file_needs_no_torch(tmp_path: Path) -> None:
    """`evaluate` runs where the extra is not installed; `train` says in one sentence that it is missing."""
    blocked = (
        "import importlib.util, sys; sys.modules['torch'] = None; find = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a);"
        "from stream_mmrnn.cli.app import run; sys.argv = ['stream-mmrnn', *sys.argv[1:]]; run()"
    )
    done = subprocess.run([sys.executable, "-c", blocked, "train"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "this needs the extra `train` (torch missing)" in done.stderr
    args = [sys.executable, "-c", blocked, "evaluate", str(tmp_path)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "has no recipe.toml" in done.stderr
