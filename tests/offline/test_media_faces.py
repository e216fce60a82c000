"""`evaluate --media --measure faces`: what the picture adds before speech begins, as served."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy_model
from places import ROOT, SHARED
from typer.testing import CliRunner

from stream_mmrnn.cli.app import app
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.offline.media import faces

MODEL = ROOT / "models" / "turn_taking"
CLIPS = SHARED / "data" / "clips"


def test_files_without_picture_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    with pytest.raises(UsageError, match="holds no film with picture and sound"):
        faces.evaluate(MODEL / "step.onnx", [tmp_path])


def test_a_model_that_does_not_see_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not take `vision` and say `activity`"):
        faces.evaluate(toy_model.make(tmp_path / "step.onnx"), [tmp_path])


@pytest.mark.slow
@pytest.mark.shared_data
def test_the_picture_tells_of_other_speakers_that_speech_begins() -> None:
    """The aim is .08 more; the late fusion was fitted to another speaker."""
    clips = [CLIPS / f"{name}.mpg" for name in ("brbk7n", "lbax4n", "lbbc2a", "lwbsza", "sbwe5n")]
    if not all(c.exists() for c in clips):
        pytest.skip("the clips of ../shared are not there")
    result = faces.evaluate(MODEL / "step.onnx", clips)
    assert len(result["files"]) == 5
    assert result["with_face"] == 1.0
    soon, later = result["labels"]["self_200ms"], result["labels"]["self_2000ms"]
    assert soon["with_picture"] > max(soon["without"], 0.72) + 0.08
    assert later["with_picture"] == later["without"]
    run = CliRunner().invoke(app, ["evaluate", str(MODEL), "--media", str(clips[0]), "--measure", "faces"])
    assert run.exit_code == 0
    assert "with a face in 100%" in run.output
