"""Files written by release 0.1.0 still open: a recording, the state of a served session, a folder of keys."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from harness import run
from places import TESTS
from serving import features_of, running, settings_for, tick

from stream_mmrnn import Client
from stream_mmrnn.bus.keys import KeyFolder

pytestmark = pytest.mark.process

OLD = TESTS / "data" / "release_0_1_0"
RECORDING = OLD / "session.mcap"


def test_the_recording_is_whole() -> None:
    code, found, err = run("verify", RECORDING)
    assert code == 0, err
    code, about, err = run("info", RECORDING)
    assert (code, about["whole"], about["ended"]) == (0, True, "clean"), err
    channels = about["channels"]
    assert channels["prediction"]["messages"] == channels["tick"]["messages"] == 67
    assert found["messages"] == {name: channel["messages"] for name, channel in channels.items()}


@pytest.mark.parametrize("source", ["features", "raw"])
def test_the_recording_replays_to_the_same_predictions(source: str) -> None:
    """Within rounding: results are bit-identical only on the kind of CPU that made the recording."""
    _, result, err = run("replay", RECORDING, "--model", OLD / "recorded.onnx", "--from", source)
    assert result["recorded_predictions"] == result["predictions"] == 67, err
    assert (result["missing"], result["extra"]) == (0, 0)
    assert result["max_abs_difference"] < (1e-5 if source == "features" else 1e-3)


def test_a_served_session_continues_from_its_state(tmp_path: Path) -> None:
    states = shutil.copytree(OLD / "states", tmp_path / "states", copy_function=shutil.copyfile)
    expected = np.load(OLD / "answers.npy")
    ticks = [tick("before", i, 7) for i in range(len(expected))]
    with (
        running(settings_for(OLD / "served.onnx", states)) as server,
        Client(server.address) as client,
        client.open("before", (OLD / "token.txt").read_text().strip()) as session,
    ):
        assert session.next_tick == 30
        for of, want in zip(ticks[30:], expected[30:], strict=True):
            answer = session.step(features_of(of), event_ns=of.event_ns, age_ns=of.age_ns)
            assert answer is not None
            np.testing.assert_allclose(answer.heads["next"], want, atol=1e-6)


def test_a_folder_of_keys_opens(tmp_path: Path) -> None:
    path = shutil.copytree(OLD / "keys", tmp_path / "keys")
    for each in (path, *path.rglob("*")):
        each.chmod(stat.S_IRWXU if each.is_dir() else stat.S_IRUSR | stat.S_IWUSR)  # git does not store these modes
    folder = KeyFolder(path)
    assert folder.keys().secret is not None
    assert {row["name"]: row["rights"] for row in folder.list()["allowed"]} == {"viewer": ["read"]}
