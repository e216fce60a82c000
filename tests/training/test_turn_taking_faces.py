"""Clips of faces: what counts of them, and that they come as a live session sees them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from stream_mmrnn.capture.encoders.audio import SPEECH
from stream_mmrnn.capture.encoders.face import PRESENT
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.offline.predictor import Predictor
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.datasets import grid
from stream_mmrnn.training.tasks import turn_taking_faces
from tests.helpers.places import ROOT, SHARED

RECIPE = ROOT / "models" / "turn_taking" / "recipe.toml"
CLIPS = SHARED / "data" / "clips"


def test_the_target_is_what_the_detector_hears_afterwards() -> None:
    head = recipes.load(RECIPE).heads[0]
    heard = np.zeros(40, bool)
    heard[20:30] = True
    target = turn_taking_faces.own_voice(head, heard, 0.04)
    assert target.shape == (40, 8)
    assert np.flatnonzero(target[:, 0]).tolist() == list(range(17, 27))  # at least 2.5 of the next 5 ticks
    assert np.flatnonzero(target[:, 1]).tolist() == list(range(9, 20))  # at least 5 of the ten after them
    assert not target[:, 4:].any()
    assert turn_taking_faces.before_speech(heard) == slice(4, 20)
    assert turn_taking_faces.before_speech(np.zeros(40, bool)) == slice(4, 0)


def test_a_folder_without_clips_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"holds no clip \(\.mpg, \.mp4\)"):
        turn_taking_faces.sequences(recipes.load(RECIPE), tmp_path)


@pytest.mark.slow
@pytest.mark.shared_data
def test_clips_are_as_a_session_sees_them(tmp_path: Path) -> None:
    clip = CLIPS / "brbk7n.mpg"
    if not clip.exists():
        pytest.skip("the clips of ../shared are not there")
    recipe = recipes.load(RECIPE)
    (tmp_path / "grid").mkdir()
    for name in ("a.mpg", "b.mpg"):
        shutil.copy(clip, tmp_path / "grid" / name)
    (fitted,), (held_out,) = turn_taking_faces.sequences(recipe, tmp_path / "grid")
    assert (fitted.name, held_out.name) == ("b", "a")
    assert fitted.weights["activity"].sum() >= 5
    assert not fitted.weights["turn_over"].any()
    served = list(Predictor("turn_taking").file(clip))
    names = list(recipe.modalities)
    for name in ("vision", "audio"):
        made = np.stack([p.tick.features[name] for p in served])
        assert made.tobytes() == fitted.features[name][: len(made)].tobytes()
        there = [p.tick.present[name] for p in served]
        assert fitted.present[: len(made), names.index(name)].tolist() == there
    assert fitted.features["vision"][:, PRESENT].mean() > 0.9
    assert (fitted.features["audio"][:, SPEECH] > 0.5).any()


def test_the_clips_of_a_folder_are_found(tmp_path: Path) -> None:
    for name in ("b.mpg", "a.mp4", "a.align"):
        (tmp_path / name).touch()
    assert [c.name for c in grid.clips(tmp_path)] == ["a.mp4", "b.mpg"]
