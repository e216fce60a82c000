"""A recording in other viewers: Foxglove's schemas and layout, Rerun's own program."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from harness import COMMAND, run
from mcap.reader import make_reader
from mcap_protobuf.decoder import DecoderFactory

from stream_mmrnn.core import config
from stream_mmrnn.core.errors import ProcessError, UsageError
from stream_mmrnn.core.settings import EngineSettings
from stream_mmrnn.core.types import HeadSpec
from stream_mmrnn.offline.convert import foxglove_layout
from stream_mmrnn.offline.convert import rerun as rerun_viewer
from stream_mmrnn.predict.engine import check_model
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.viewers.columns import Column, columns

pytestmark = pytest.mark.process

RERUN = Path(sys.executable).parent / "rerun"
needs_rerun = pytest.mark.skipif(not RERUN.exists(), reason="rerun-sdk (extra rerun) is not installed")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real session with the default model, with labels."""
    path = tmp_path_factory.mktemp("recording") / "a.mcap"
    folder = path.parent
    os.mkfifo(folder / "pipe") if hasattr(os, "mkfifo") else pytest.skip("needs a named pipe")
    args = ("--source", "synthetic", "--text", f"pipe:{folder / 'pipe'}", "--duration", "3", "--record", path)
    end = os.open(folder / "pipe", os.O_RDWR)
    try:
        os.write(end, b"good morning\n/label sitting\n")
        code, _, err = run("live", *args)
    finally:
        os.close(end)
    assert code == 0, err
    return path


def decoded(path: Path) -> Iterator[tuple[Any, Any, Any, Any]]:
    """All messages, by MCAP's own reader and protobuf support."""
    with path.open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        for schema, channel, message in reader.iter_messages():
            decode = DecoderFactory().decoder_for(channel.message_encoding, schema)
            yield schema, channel, message, decode(message.data) if decode else json.loads(message.data)


@pytest.fixture(scope="module")
def first(recording: Path) -> dict[str, Any]:
    """The first message of each topic, decoded."""
    found: dict[str, Any] = {}
    for _, channel, _, message in decoded(recording):
        found.setdefault(channel.topic, message)
    return found


def test_every_message_follows_its_schema(recording: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    seen: Counter[str] = Counter()
    validators: dict[int, Any] = {}
    for schema, channel, _, message in decoded(recording):
        seen[channel.topic] += 1
        if schema.encoding == "protobuf":
            assert channel.message_encoding == "protobuf"
            descriptor_pb2.FileDescriptorSet.FromString(schema.data)
            assert message.DESCRIPTOR.full_name == schema.name
            continue
        assert (channel.message_encoding, schema.encoding) == ("json", "jsonschema")
        if schema.id not in validators:
            document = json.loads(schema.data)
            jsonschema.Draft202012Validator.check_schema(document)
            assert document["type"] == "object", "Foxglove reads only objects"
            assert "$ref" not in schema.data.decode(), "Foxglove resolves no references"
            validators[schema.id] = jsonschema.Draft202012Validator(document)
        validators[schema.id].validate(message)
    assert {"raw/vision", "raw/audio", "raw/text", "label", "prediction", "session", "clock"} <= set(seen)


def value_at(message: Any, path: str) -> Any:
    """The value at a Foxglove message path (without the topic)."""
    for name, index in re.findall(r"\.([A-Za-z0-9_]+)|\[(\d+)\]", path):
        if index:
            message = message[int(index)]
        else:
            message = message[name] if isinstance(message, dict) else getattr(message, name)
    return message


def check_layout(layout: dict[str, Any], first: dict[str, Any]) -> None:
    """Every panel is placed once, every topic exists, and every path leads to a number."""
    placed: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, str):
            placed.append(node)
        else:
            assert node["direction"] in ("row", "column")
            walk(node["first"])
            walk(node["second"])

    walk(layout["layout"])
    assert sorted(placed) == sorted(layout["configById"])
    wanted = {"Image": "CompressedImage", "Audio": "RawAudio", "RosOut": "Log"}
    kinds = Counter(name.split("!")[0] for name in placed)
    assert set(kinds) == {*wanted, "Plot"}
    for name, panel in layout["configById"].items():
        kind = name.split("!")[0]
        if kind == "Plot":
            for line in panel["paths"]:
                topic, dot, path = line["value"].partition(".")
                assert isinstance(value_at(first[topic], dot + path), float), line
        else:
            topic = panel.get("topic") or panel.get("topicToRender") or panel["imageMode"]["imageTopic"]
            assert first[topic].DESCRIPTOR.full_name == f"foxglove.{wanted[kind]}"


def test_the_shipped_layout_fits_a_real_recording(first: dict[str, Any]) -> None:
    check_layout(foxglove_layout.shipped(), first)
    # the shipped layout is the one that is generated for the default model
    spec = check_model(config.find_model(EngineSettings().model), "cpu")
    assert foxglove_layout.for_heads(columns(spec.heads)) == foxglove_layout.shipped()


def test_view_writes_the_layout_of_a_recording(recording: Path, first: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "layout.json"
    code, document, err = run("view", recording, "--layout", out)
    assert code == 0, err
    assert document["layout"] == str(out)
    layout = json.loads(out.read_text())
    check_layout(layout, first)
    assert layout == foxglove_layout.shipped()
    lines = [line for panel in layout["configById"].values() for line in panel.get("paths", [])]
    assert sum(len(v) for v in first["prediction"]["heads"].values()) == len(lines)
    out.write_text("mine")
    code, _, err = run("view", "--layout", out)
    assert code == 2
    assert "is there already" in err
    assert out.read_text() == "mine"
    code, _, err = run("view", "--layout", out, "--force")
    assert code == 0, err
    assert json.loads(out.read_text()) == foxglove_layout.shipped()


def test_a_layout_of_other_heads() -> None:
    heads = [HeadSpec(f"h{i}", "regression", 20) for i in range(6)]
    layout = foxglove_layout.for_heads(columns(tuple(heads)))
    plots = {name: panel for name, panel in layout["configById"].items() if name.startswith("Plot!")}
    assert list(plots) == ["Plot!h0", "Plot!h1", "Plot!h2", "Plot!h3"]
    assert plots["Plot!h2"]["paths"][7]["value"] == "prediction.heads.h2[7]"
    assert all(len(panel["paths"]) == 16 for panel in plots.values())
    odd = foxglove_layout.for_heads([Column("a b", 0, "a b.0")])
    assert not any(name.startswith("Plot!") for name in odd["configById"])
    assert odd["layout"] == foxglove_layout.shipped()["layout"]["first"]


def test_usage(tmp_path: Path) -> None:
    assert run("view", tmp_path / "nix.mcap")[0] == 2
    code, _, err = run("view", "--rrd", tmp_path / "a.rrd")
    assert code == 2
    assert "name a recording" in err


def test_without_rerun_the_error_has_advice(recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # there is another program of that name
    other = tmp_path / "rerun"
    other.write_text("#!/bin/sh\necho rerun 1.0.31\n")
    other.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}")
    with pytest.raises(UsageError, match=r"pip install 'stream-mmrnn\[rerun\]'; or open the file in Foxglove"):
        rerun_viewer.find(tmp_path / "settings")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the settings of programs, so that the user's own are not changed."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "state"


@needs_rerun
@pytest.mark.parametrize("ci", ["", "true"])
def test_rerun_analytics_are_disabled_everywhere(tmp_path: Path, ci: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    if ci:
        monkeypatch.setenv("CI", ci)
    rerun_viewer.find(tmp_path)
    [settings] = (tmp_path / "config").rglob("analytics.json")
    assert json.loads(settings.read_text())["analytics_enabled"] is False


@needs_rerun
def test_rerun_reads_every_message(recording: Path, tmp_path: Path, state: Path) -> None:
    chunk = pytest.importorskip("rerun.chunk", reason="this rerun-sdk has no reader of its own files")
    out = tmp_path / "a.rrd"
    code, document, err = run("view", recording, "--rrd", out)
    assert code == 0, err
    assert document["rrd"] == str(out)
    # analytics are off, and the user's own settings were not changed
    assert not (tmp_path / "home").exists()
    [settings] = (state / "stream-mmrnn" / "rerun" / "config").rglob("analytics.json")
    assert json.loads(settings.read_text())["analytics_enabled"] is False

    rows: Counter[str] = Counter()
    names: dict[str, set[str]] = {}
    for piece in chunk.RrdReader(str(out)).stream().to_chunks():
        entity = str(piece.entity_path)
        found = piece.to_record_batch()
        rows[entity] += piece.num_rows
        names.setdefault(entity, set()).update(found.schema.names)
    sent = Counter(e.topic for e in Recording(recording).envelopes())
    for topic, count in sent.items():
        assert rows[f"/{topic}"] == count + 1, "every message, and one row about the channel"
    assert "EncodedImage:blob" in names["/raw/vision"]
    assert "TextLog:text" in names["/raw/text"]

    code, _, err = run("view", recording, "--rrd", out)
    assert code == 2
    assert "is there already" in err


@needs_rerun
@pytest.mark.skipif(bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")), reason="would open a window")
def test_rerun_is_started_on_loopback(recording: Path, state: Path) -> None:
    """Without a display its viewer ends at once, which is reported; it must not listen beyond loopback."""
    done = subprocess.run([*COMMAND, "view", str(recording)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Rerun ended with exit code" in done.stderr
    assert "0.0.0.0" not in done.stderr


def test_a_rerun_that_would_send_analytics_is_not_started(tmp_path: Path) -> None:
    """It ignores the settings folder that it is given, as on other systems."""
    stubborn = tmp_path / "rerun"
    answer = '{"analytics_enabled": true, "config_file_path": "/elsewhere/analytics.json"}'
    stubborn.write_text(f"#!/bin/sh\n[ \"$2\" = disable ] && touch '{tmp_path}/changed'\necho '{answer}'\n")
    stubborn.chmod(0o755)
    assert shutil.which(str(stubborn))
    with pytest.raises(ProcessError, match="rerun analytics disable"):
        rerun_viewer.silence(str(stubborn), dict(os.environ), tmp_path / "ours")
    assert not (tmp_path / "changed").exists()
