"""Recordings in lock step: each as it is alone, bit for bit, and what is wrong with one is said of that one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import toy_model
from toy_recordings import BEGIN, write

from stream_mmrnn.bench.engine import synthetic
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.types import Envelope, Prediction
from stream_mmrnn.offline.lockstep import interleaved, lockstep
from stream_mmrnn.offline.replay import replay
from stream_mmrnn.offline.replay_many import Track, replay_many
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.tick_columns import TickColumns
from stream_mmrnn.recording import column_reader
from stream_mmrnn.recording.recorder import Recorder


def alone(path: Path, toy: Path) -> list[tuple[int, bytes]]:
    seen: list[Prediction] = []
    replay(path, model=str(toy), on_prediction=seen.append)
    return [(p.tick.index, p.heads["next"].tobytes()) for p in seen]


def together(paths: list[Path], toy: Path) -> dict[str, list[tuple[int, bytes]]]:
    engine = StepEngine(toy, len(paths))
    out: dict[str, list[tuple[int, bytes]]] = {str(path): [] for path in paths}
    for step in lockstep({name: Track(Path(name), engine.spec).columns() for name in out}, engine):
        for name, index, row in zip(step.names, step.block.indices, step.predictions.heads["next"], strict=True):
            out[name].append((int(index), row.tobytes()))
    assert len(engine) == 0  # every session was closed
    return out


@pytest.mark.parametrize("block_bytes", [1 << 11, 4 << 20])
def test_each_recording_is_as_alone(
    toy: Path, tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of different lengths, and read in small pieces or as a whole."""
    monkeypatch.setattr(column_reader, "BLOCK_BYTES", block_bytes)
    paths = [tmp_path / f"{i}.mcap" for i in range(4)]
    for path, seconds in zip(paths, (1.0, 7.0, 4.0, 4.0), strict=True):
        write(path, toy, seconds)
    assert together(paths, toy) == {str(path): alone(path, toy) for path in paths}
    result = replay_many(paths, verify=True)
    assert result["identical"], result
    assert [row["predictions"] for row in result["recordings"]] == [25, 175, 100, 100]
    assert [row["streams"] for row in result["recordings"]] == [replay(path)["streams"] for path in paths]


def test_a_session_that_was_opened_again_starts_over(toy: Path, tmp_path: Path) -> None:
    """Its process was restarted in the middle: the state begins anew there, and nobody else's does."""
    for name, restart in (("a", True), ("b", False)):
        settings = config.load(None, {"engine.model": str(toy)})
        recorder = Recorder(tmp_path / name, "bench-0", {"config": msgspec.json.encode(settings).decode()})
        for i, e in enumerate(synthetic(StepEngine(toy).spec, 1, 4.0, BEGIN, 3)):
            recorder.write(e)
            recorder.flush_due(e.publish_ns)
            if restart and i in (150, 300, 301):
                opened = wire.pack(wire.SessionMessage("open", e.event_ns, tuple(m.name for m in toy_model.MODALITIES)))
                at_ns = e.event_ns
                recorder.write(Envelope(topics.SESSION, "bench-0", i, at_ns, at_ns, at_ns, opened))
        recorder.close({})
    paths = [tmp_path / "a", tmp_path / "b"]
    found = together(paths, toy)
    assert found == {str(path): alone(path, toy) for path in paths}
    assert found[str(paths[0])] != found[str(paths[1])]


def test_damage_of_one_recording_is_said_of_that_one(toy: Path, tmp_path: Path) -> None:
    whole, cut, damaged = (tmp_path / f"{name}.mcap" for name in ("whole", "cut", "damaged"))
    write(whole, toy, 4.0)
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    middle = len(content) // 2
    damaged.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    result = replay_many([cut, whole, damaged])
    rows = {Path(row["recording"]).stem: row for row in result["recordings"]}
    for path in (cut, whole, damaged):
        by_itself = replay(path)
        same = (
            "predictions",
            "damage",
            "identical",
            "different",
            "missing",
            "extra",
            "recorded_predictions",
            "streams",
        )
        assert {k: rows[path.stem][k] for k in same} == {k: by_itself[k] for k in same}
    assert "cut off" in rows["cut"]["damage"]
    assert rows["damaged"]["damage"]
    assert 10 < rows["cut"]["predictions"] < 100
    assert rows["whole"]["damage"] == ""
    assert rows["whole"]["identical"]


def test_a_difference_is_named(toy: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.mcap", toy, 1.0)
    write(tmp_path / "b.mcap", toy, 1.0, head="other")
    result = replay_many([tmp_path / "a.mcap", tmp_path / "b.mcap"])
    assert not result["identical"]
    assert [row["different"] for row in result["recordings"]] == [0, 25]


def test_what_cannot_be_compared_is_an_error(toy: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.mcap", toy, 1.0)
    write(tmp_path / "b.mcap", toy, 1.0, metadata={"model_sha256": "another"})
    paths = [tmp_path / "a.mcap", tmp_path / "b.mcap"]
    assert replay_many(paths)["identical"]
    with pytest.raises(UsageError, match=r"b\.mcap was predicted by another version"):
        replay_many(paths, verify=True)
    with pytest.raises(FileError, match=r"gone\.mcap"):
        replay_many([*paths, tmp_path / "gone.mcap"])


def test_recordings_of_two_models_need_one_named(toy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(toy.read_bytes())
    write(tmp_path / "a.mcap", toy, 1.0)
    write(tmp_path / "b.mcap", other, 1.0)
    paths = [tmp_path / "a.mcap", tmp_path / "b.mcap"]
    with pytest.raises(UsageError, match="name one model by --model"):
        replay_many(paths)
    assert replay_many(paths, model=str(toy))["identical"]


def test_it_stops_when_alive_is_false(toy: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.mcap", toy, 4.0)
    write(tmp_path / "b.mcap", toy, 4.0)
    seen: list[int] = []
    result = replay_many(
        [tmp_path / "a.mcap", tmp_path / "b.mcap"], on_predictions=seen.append, alive=lambda: len(seen) < 7
    )
    assert seen == [2] * 7
    assert result["predictions"] == 14
    assert not result["identical"]


def test_blocks_hold_the_kth_ticks_of_all() -> None:
    rng = np.random.default_rng(0)

    def part(count: int, seed: int) -> TickColumns:
        present = rng.random((count, 2)) < [0.7, 0.2]
        features = tuple(
            (np.arange(here.sum() * size) + 1000 * seed).reshape(-1, size).astype(np.float32)
            for here, size in zip(present.T, (3, 1), strict=True)
        )
        index = np.arange(count, dtype=np.int64) + seed
        return TickColumns(str(seed), False, index, index * 40, present, index[:, None] + np.arange(2), features)

    parts = [part(20, seed) for seed in range(3)]
    taken = [[iter(v) for v in p.features] for p in parts]

    def expected(k: int, modality: int) -> Iterator[list[float]]:
        for p, vectors in zip(parts, taken, strict=True):
            if p.present[k, modality]:
                yield next(vectors[modality]).tolist()

    for k, block in enumerate(interleaved(parts, np.array([7, 8, 9]))):
        assert block.fits((3, 1)) == ""
        assert block.indices.tolist() == [k, k + 1, k + 2]
        assert block.event_ns.tolist() == [40 * k, 40 * k + 40, 40 * k + 80]
        assert block.age_ns.tolist() == [[k + s, k + s + 1] for s in range(3)]
        assert [v.tolist() for v in block.features] == [list(expected(k, m)) for m in range(2)]


@pytest.mark.process
def test_the_verb_says_how_each_went(toy: Path, tmp_path: Path) -> None:
    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "stream_mmrnn", "replay", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    paths = [tmp_path / "a.mcap", tmp_path / "b.mcap"]
    for path in paths:
        write(path, toy, 1.0)
    done = run(*paths, "--verify", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["identical"] for row in json.loads(done.stdout)["recordings"]] == [True, True]
    write(tmp_path / "other.mcap", toy, 1.0, head="other")
    done = run(*paths, tmp_path / "other.mcap", "--verify")
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("identical, bit for bit") == 2
    assert "3 recordings: 75 predictions of 3.0 s" in done.stdout
    paths[1].write_bytes(paths[1].read_bytes()[:-2000])
    done = run(*paths)
    assert done.returncode == 3
    assert "b.mcap was cut off or damaged" in done.stderr
