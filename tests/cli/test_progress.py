"""The progress of a training: step, loss and time left are there from the first step on."""

from __future__ import annotations

import io

from stream_mmrnn.cli.progress import TrainingBar
from stream_mmrnn.cli.terminal import Console

STEP = {"event": "step", "epoch": 0, "epochs": 12, "step": 3, "of": 30, "loss": 0.5123, "share": 3 / 360}
EPOCH = {"event": "epoch", "epoch": 1, "train_loss": 0.4, "validation_loss": 0.3, "best": 1, "seconds": 2.0}


def shown(terminal: bool, *events: dict[str, object]) -> str:
    written = io.StringIO()
    with TrainingBar(Console(file=written, width=120, force_terminal=terminal, color_system=None)) as bar:
        for event in events:
            bar.observe(event)
    return written.getvalue()


def test_the_first_step_shows_step_loss_and_time_left() -> None:
    text = shown(True, {"event": "data"}, STEP)
    assert "epoch 1 of 12, step 3 of 30, loss 0.512" in text
    assert "at most" in text
    assert "--:--" in text, "no speed is known after one step"


def test_an_epoch_of_unknown_length_shows_its_steps() -> None:
    assert "epoch 1 of 12, step 3, loss 0.512" in shown(True, {**STEP, "of": None})


def test_without_a_terminal_there_is_a_line_an_epoch() -> None:
    assert shown(False, STEP, EPOCH) == "epoch   1  loss 0.4000, validation 0.3000 (best)  2.0 s\n"
