"""Targets that are computed from recordings."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_recordings import envelopes, write

from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.types import ModalitySpec
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.tasks.recordings import sequence


@pytest.mark.parametrize("encoder", ["", "mel@2"])
def test_future_speech_needs_the_encoder_that_has_it(tmp_path: Path, encoder: str) -> None:
    """Also where another encoder feeds audio: its numbers must not be taken for the probability of speech."""
    path = write(tmp_path / "a.mcap", envelopes(0, 40))
    recipe = recipes.parse(
        {
            "name": "x",
            "modalities": {"audio": {"size": 4, "encoder": encoder}},
            "heads": [{"name": "speaks", "kind": "activity_projection", "size": 1, "horizons_s": [[0, 0.2]]}],
            "data": {"kind": "recordings"},
            "fusion": {"kind": "concat", "width": 8},
            "cell": {"kind": "gru", "hidden": 8},
            "train": {"epochs": 1, "batch": 8, "length": 10, "learning_rate": 3e-3, "patience": 1},
            "quick": {"epochs": 1},
        }
    )
    with pytest.raises(
        ConfigError, match="'speaks' needs the probability of speech, which the modality audio has from"
    ):
        sequence(path, recipe, [ModalitySpec("audio", 4, encoder, "mean", 1)])
