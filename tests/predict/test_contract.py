"""Contract files: any stateful graph can be served. Contracts in a graph's metadata are tested in test_engine.py."""

from __future__ import annotations

import shutil
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from places import SHARED

from stream_mmrnn.core.config import models_folder
from stream_mmrnn.core.errors import ModelError
from stream_mmrnn.core.types import FloatArray, Stamps, Tick
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.predict.contract import beside, contract_of
from stream_mmrnn.predict.engine import StepEngine, check_model

SILERO = models_folder() / "encoders" / "silero_vad.onnx"
NOWHERE = Stamps(0, 0, 0, 0, "")
CHUNK, CONTEXT = 512, 64


def silero_ticks(session: str, sound: FloatArray) -> Iterator[Tick]:
    """The detector's inputs: 64 samples of the previous chunk, and 512 new ones."""
    before = np.zeros(CONTEXT, np.float32)
    for k in range(len(sound) // CHUNK):
        chunk = sound[k * CHUNK : (k + 1) * CHUNK]
        yield Tick(session, k, k, {"audio": np.concatenate([before, chunk])}, {"audio": True}, {"audio": 0}, NOWHERE)
        before = chunk[-CONTEXT:]


def test_silero_is_served_with_a_contract_file() -> None:
    contract = contract_of(Graph(SILERO))
    assert contract.spec.tick_ns == 32_000_000
    assert [(s.name, s.shape) for s in contract.spec.states] == [("state", (2, 128))]
    assert contract.wiring.constants == {"sr": 16000}
    assert (contract.wiring.active, contract.wiring.reset) == ("", "")


def test_batched_streams_of_silero_equal_single_ones_in_reused_slots() -> None:
    rng = np.random.default_rng(0)
    sounds = [rng.standard_normal(CHUNK * 12).astype(np.float32) * 0.1 * (i + 1) for i in range(5)]
    alone = []
    for sound in sounds:
        engine = StepEngine(SILERO)
        engine.open("x")
        alone.append([engine.step([t])[0].heads["speech"].tobytes() for t in silero_ticks("x", sound)])
    engine = StepEngine(SILERO, 5)
    for _ in range(2):  # the second time in reused slots
        for i in range(5):
            engine.open(str(i))
        together: list[list[bytes]] = [[] for _ in sounds]
        for ticks in zip(*(silero_ticks(str(i), s) for i, s in enumerate(sounds)), strict=True):
            for p in engine.step(ticks):
                together[int(p.tick.session)].append(p.heads["speech"].tobytes())
        assert together == alone
        for i in range(5):
            engine.close(str(i))


def ten_minutes() -> FloatArray:
    """Ten minutes of sound: speech if that data is installed, and always silence, noise and tones."""
    rng = np.random.default_rng(7)
    t = np.arange(16000 * 10, dtype=np.float32) / 16000
    parts = [
        np.zeros(16000 * 5, np.float32),
        rng.standard_normal(16000 * 10).astype(np.float32) * 0.05,
        0.3 * np.sin(2 * np.pi * 180 * t) * (np.sin(2 * np.pi * 3 * t) > 0).astype(np.float32),
    ]
    clip = SHARED / "data" / "clips" / "dialogue.wav"
    if clip.is_file():
        with wave.open(str(clip)) as f:
            parts.append(np.frombuffer(f.readframes(f.getnframes()), np.int16).astype(np.float32) / 32768)
    piece = np.concatenate([p.astype(np.float32) for p in parts])
    return np.tile(piece, -(-16000 * 600 // len(piece)))[: 16000 * 600]


@pytest.mark.slow
def test_silero_equals_its_package_over_ten_minutes() -> None:
    silero_vad = pytest.importorskip("silero_vad", reason="the package silero-vad is not installed")
    torch = pytest.importorskip("torch", reason="silero's wrapper wants torch")
    streams = 6
    sound = ten_minutes().reshape(streams, -1)
    steps = sound.shape[1] // CHUNK
    wrapper = silero_vad.load_silero_vad(onnx=True)
    expected = np.zeros((streams, steps), np.float32)
    for i, stream in enumerate(sound):
        wrapper.reset_states()
        for k in range(steps):
            chunk = torch.from_numpy(stream[k * CHUNK : (k + 1) * CHUNK].copy())
            expected[i, k] = float(wrapper(chunk, 16000))
    engine = StepEngine(SILERO, streams)
    for i in range(streams):
        engine.open(str(i))
    got = np.zeros_like(expected)
    for k, ticks in enumerate(zip(*(silero_ticks(str(i), s) for i, s in enumerate(sound)), strict=True)):
        for p in engine.step(ticks):
            got[int(p.tick.session), k] = p.heads["speech"][0]
    worst = float(np.abs(got - expected).max())
    print(f"silero, {streams} streams, {streams * steps} steps: the largest difference is {worst:.1e}")
    assert worst <= 1e-6


GOOD = beside(SILERO).read_text(encoding="utf-8") if beside(SILERO).is_file() else ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("tick_ms = 32.0", "tick_ms = 0"), "tick of 0 ns"),
        (("tick_ms = 32.0", 'tick_ms = "a"'), "cannot be read: `tick_ms` has a wrong value"),
        (("tick_ms = 32.0", "tick_ms ="), "cannot be read: "),
        (("batch_axis = 1", "batch_axes = 1"), "unknown key `states\\[0\\].batch_axes`: the nearest is `batch_axis`"),
        (("batch_axis = 1", "batch_axis = 0"), "must have one fixed shape per row"),
        (("batch_axis = 1", "batch_axis = -7"), "the batch axis of the state `state` is counted from 0"),
        (("batch_axis = 1", "batch_axis = 7"), "must have one fixed shape per row"),
        (('output = "stateN"', 'output = "state_N"'), "has no `state_N`, which .* names; it has output, stateN"),
        (('input = "input"', 'input = "in"'), "has no input `in`"),
        (('output = "output"', 'output = "out"'), "has no output `out` of 1 numbers"),
        (("sr = 16000", ""), "has the input `sr`, which is neither state nor in its contract"),
        (("sr = 16000", "sr = 16000\nrate = 1"), "no input `rate` of a fixed shape"),
        (("size = 576", "size = 576\nstack = 5"), "the size 576 of audio is not 5 samples"),
        (('name = "audio"', 'name = "no name"'), "has a modality 'no name'"),
        (("", 'reset = "restart"\n'), "has no input `restart`"),
    ],
)
def test_a_wrong_contract_file_is_reported_in_one_sentence(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    path = tmp_path / "vad.onnx"
    shutil.copy(SILERO, path)
    text = GOOD.replace(*change) if change[0] else change[1] + GOOD
    assert text != GOOD
    beside(path).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=words) as e:
        check_model(path, "cpu")
    assert "\n" not in str(e.value)


def test_a_graph_without_contract_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "vad.onnx"
    shutil.copy(SILERO, path)
    with pytest.raises(ModelError, match=r"write vad\.contract\.toml beside it"):
        check_model(path, "cpu")
