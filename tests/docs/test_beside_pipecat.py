"""The client beside pipecat-ai in one program. pipecat-ai does not go into this project's environment.

`STREAM_MMRNN_PIPECAT_PYTHON` names a Python that has pipecat-ai and what the client depends on: pyzmq and msgspec.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

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


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.shared_data
def test_both_work_in_one_program(tmp_path: Path, clips: Path) -> None:
    """pipecat-ai runs its speech and turn models with its own onnxruntime; the same sound goes into a session of
    another environment, whose predictions arrive meanwhile.
    """
    if not (python := os.environ.get(PYTHON)):
        pytest.skip(f"name a Python that has pipecat-ai, pyzmq and msgspec in {PYTHON}")
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
