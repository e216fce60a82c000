"""The programs of the guides for Pipecat and LiveKit Agents, with these packages, which have their own onnxruntime: the
client beside a session of this environment, and the whole distribution in theirs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from agent_environment import agents_python, python_of, say
from fresh_environment import apart, build, install
from harness import Running
from places import ROOT

pytestmark = [pytest.mark.process, pytest.mark.slow]
GUIDES = ("pipecat", "livekit")
BESIDE = "SessionTurns(wait=60"
PAUSE_S = 4.0
_TURN = re.compile(r"^your turn, at ([\d.]+) s$", re.M)


@pytest.fixture(scope="module")
def python() -> str:
    return agents_python()


@pytest.fixture(scope="module")
def spoken(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Two sentences with a pause after each, and when the clip of each ends."""
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    return path, say(path, clips, ("bbaf2n.mpg", "lbax4n.mpg"), PAUSE_S)


def program(guide: str, **options: float) -> str:
    code = python_of(ROOT / "docs" / "guides" / f"{guide}.md")
    assert code.count(BESIDE) == 1
    return code.replace(BESIDE, BESIDE + "".join(f", {name}={value}" for name, value in options.items()))


def in_process(code: str) -> str:
    """The change that the guides describe for one environment."""
    code = code.replace("SessionTurns(wait=60", 'PredictorTurns(Predictor("turn_taking")')
    return code.replace("SessionTurns", "Predictor, PredictorTurns")


def turns(python: str, code: str, sound: Path, site: Path, env: dict[str, str]) -> list[float]:
    """When the agent was told that the user has finished, in seconds of the sound."""
    done = subprocess.run(
        [python, "-c", code, str(sound)],
        env=os.environ | env | {"PYTHONPATH": str(site)},
        cwd=site.parent, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [float(at_s) for at_s in _TURN.findall(done.stdout)]


@pytest.fixture(scope="module")
def whole(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As after `pip install --no-deps stream-mmrnn`."""
    folder = tmp_path_factory.mktemp("whole")
    install(build(ROOT, folder / "built"), folder / "site")
    return folder / "site"


@pytest.mark.shared_data
@pytest.mark.parametrize("guide", GUIDES)
def test_the_agent_beside_a_session_is_told_of_each_end(
    guide: str, python: str, spoken: tuple[Path, list[float]], tmp_path: Path
) -> None:
    install(build(ROOT / "packaging" / "client", tmp_path / "built"), tmp_path / "site")
    env = apart(tmp_path)
    session = Running("--audio", "push", "--vision", "none", "--text", "none", env=os.environ | env)
    try:
        said = turns(python, program(guide), spoken[0], tmp_path / "site", env)
        code, summary, _ = session.end()
    finally:
        session.close()
    assert (code, summary["balanced"]) == (0, True)
    assert summary["streams"]["audio"]["capture"]["produced"] > 300
    first, second = spoken[1]
    assert len(said) == 2
    # a sentence ends .5 to 1 s before its clip; the machine may be slow
    assert first - 1.5 < said[0] < first + PAUSE_S - 0.5
    assert second - 1.5 < said[1] < second + PAUSE_S


@pytest.mark.shared_data
@pytest.mark.parametrize("guide", GUIDES)
def test_the_predictor_in_the_agent_s_process_decides(
    guide: str, python: str, spoken: tuple[Path, list[float]], whole: Path, tmp_path: Path
) -> None:
    """With a threshold that no answer reaches, the same sentence ends by silence alone, and later."""
    env = apart(tmp_path)
    sooner = turns(python, in_process(program(guide)), spoken[0], whole, env)
    later = turns(python, in_process(program(guide, threshold=1.0)), spoken[0], whole, env)
    assert len(sooner) == 2
    assert len(later) >= 1
    assert sooner[1] < later[-1]


@pytest.mark.shared_data
def test_the_stop_strategy_needs_no_speech_detector_to_end_a_turn(
    python: str, spoken: tuple[Path, list[float]], whole: Path, tmp_path: Path
) -> None:
    code = in_process(program("pipecat"))
    own = "PipecatTurnStopStrategy(analyzer, wait_for_transcript=False)"
    for before, after in (
        ("TurnAnalyzerUserTurnStopStrategy(turn_analyzer=analyzer, wait_for_transcript=False)", own),
        ("PipecatTurnAnalyzer(PredictorTurns", "(PredictorTurns"),
        ("import PipecatTurnAnalyzer", "import PipecatTurnStopStrategy"),
    ):
        assert code.count(before) == 1
        code = code.replace(before, after)
    assert len(turns(python, code, spoken[0], whole, apart(tmp_path))) == 2
    waits = code.replace("wait_for_transcript=False", "wait_for_transcript=True")
    waits = waits.replace("UserTurnProcessor(user", "UserTurnProcessor(user_turn_stop_timeout=60, user")
    assert turns(python, waits, spoken[0], whole, apart(tmp_path)) == []  # no words ever come


def test_the_full_distribution_runs_with_their_onnxruntime(python: str, whole: Path, tmp_path: Path) -> None:
    env = os.environ | apart(tmp_path) | {"PYTHONPATH": str(whole)}

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
