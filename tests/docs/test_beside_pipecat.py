"""Beside pipecat-ai, which has its own onnxruntime: the client in one program with it, and the full distribution in its
environment. pipecat-ai does not go into this project's environment.

`STREAM_MMRNN_PIPECAT_PYTHON` names a Python that has pipecat-ai and, except for ONNX Runtime, what stream-mmrnn depends
on (docs/install.md says how to install that).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fresh_environment import apart, build, install
from harness import Running
from places import ROOT

PYTHON = "STREAM_MMRNN_PIPECAT_PYTHON"
PROGRAM = """
import asyncio, json, sys, wave
from importlib import metadata

import numpy as np
from pipecat.audio.turn.smart_turn.local_smart_turn_v3 import LocalSmartTurnAnalyzerV3
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.audio.vad.vad_analyzer import VADState

import stream_mmrnn

RATE_HZ = 16_000


async def listen(sound, heard):
    session = stream_mmrnn.push("audio")
    vad, turn = SileroVADAnalyzer(sample_rate=RATE_HZ), LocalSmartTurnAnalyzerV3(sample_rate=RATE_HZ)
    for analyzer in (vad, turn):
        analyzer.set_sample_rate(RATE_HZ)
    for at in range(0, len(sound), 640):  # 20 ms of 16 bits
        block = sound[at : at + 640]
        session.send(np.frombuffer(block, np.int16))
        state = await vad.analyze_audio(block)
        heard["speaking"] += state == VADState.SPEAKING
        turn.append_audio(block, state == VADState.SPEAKING)
        if state == VADState.STOPPING or at + 640 >= len(sound):
            await turn.analyze_end_of_turn()
            heard["turns"] += 1
        await asyncio.sleep(0.015)
    session.close()
    heard["sent"] = session.sent


async def main():
    predictions, heard = [], {"speaking": 0, "turns": 0}
    with wave.open(sys.argv[1]) as file:
        sound = file.readframes(12 * RATE_HZ)
    listening = None
    async for prediction in stream_mmrnn.subscribe(wait=60):
        listening = listening or asyncio.create_task(listen(sound, heard))  # beside the predictions
        predictions.append((prediction.tick, listening.done()))
    await listening
    names = ("pipecat-ai", "onnxruntime", "stream-mmrnn-client", "numpy", "pyzmq", "msgspec", "protobuf")
    versions = {name: metadata.version(name) for name in names}
    print(json.dumps({"predictions": predictions, "loaded": "onnxruntime" in sys.modules, **heard, **versions}))


asyncio.run(main())
"""


pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture(scope="module")
def python() -> str:
    if named := os.environ.get(PYTHON):
        return named
    pytest.skip(f"name a Python that has pipecat-ai and what stream-mmrnn depends on in {PYTHON}")


@pytest.mark.shared_data
def test_the_client_works_in_one_program_with_it(python: str, tmp_path: Path, clips: Path) -> None:
    """pipecat-ai runs its speech and turn models with its own onnxruntime; the same sound goes into a session of
    another environment, whose predictions arrive meanwhile.
    """
    install(build(ROOT / "packaging" / "client", tmp_path / "built"), tmp_path / "site")
    env = os.environ | apart(tmp_path)
    beside = subprocess.Popen(
        [python, "-c", PROGRAM, clips / "dialogue.wav"],
        env=env | {"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    session = Running("--audio", "push", "--vision", "none", "--text", "none", "--duration", "30", env=env)
    try:
        code, summary = session.finish()
        out, err = beside.communicate(timeout=60)
    finally:
        session.close()
        beside.kill()
        beside.communicate()
    assert (code, summary["balanced"]) == (0, True)
    assert beside.returncode == 0, err[-4000:]
    said = json.loads(out.splitlines()[-1])
    meanwhile = [tick for tick, done in said.pop("predictions") if not done]
    print({"predictions": len(meanwhile), **said})
    assert len(meanwhile) > 10
    assert meanwhile == sorted(set(meanwhile))
    assert 0 < said["sent"] == summary["streams"]["audio"]["capture"]["produced"]
    assert said["speaking"]
    assert said["turns"]
    assert said["loaded"]


def test_the_full_distribution_runs_with_its_onnxruntime(python: str, tmp_path: Path) -> None:
    """As after `pip install --no-deps stream-mmrnn`."""
    install(build(ROOT, tmp_path / "built"), tmp_path / "site")
    env = os.environ | apart(tmp_path) | {"PYTHONPATH": str(tmp_path / "site")}

    def run(code: list[str]) -> str:
        done = subprocess.run([python, *code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=150)
        return done.stdout.splitlines()[-1]

    def verb(*words: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(run(["-m", "stream_mmrnn", *words, "--json"]))
        return document

    version = run(["-c", "from importlib.metadata import version as v; print(v('pipecat-ai') and v('onnxruntime'))"])
    found = {finding["name"]: finding for finding in verb("doctor", "--timeout", "60")["findings"]}
    assert found["onnxruntime"]["says"] == f"onnxruntime {version}"
    for name in ("versions", "onnxruntime", "model", "encoder vision", "encoder audio", "encoder text", "bus"):
        assert found[name]["state"] == "ok", found[name]
    live = verb("live", "--source", "synthetic", "--duration", "5", "--record", "talk.mcap")
    assert live["balanced"]
    replayed = verb("replay", "talk.mcap", "--verify")
    assert replayed["identical"]
    assert replayed["predictions"] == live["predictions"] > 0
