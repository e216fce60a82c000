"""How the numbers of a signal move: step, sequence and exported graph agree, and the figures mean what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import network

from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.export import export
from stream_mmrnn.training.movement import Movement

TICK_S = 0.04


def recipe_of(**window: object) -> recipes.Recipe:
    return recipes.parse(
        {
            "name": "moves",
            "modalities": {"room.imu": {"size": 6, "window_s": 1.0, **window}, "audio": {"size": 3}},
            "heads": [{"name": "does", "kind": "classification", "size": 2}],
            "data": {"kind": "recordings"},
            "fusion": {"kind": "attention", "width": 8},
            "cell": {"kind": "gru", "hidden": 8},
        }
    )


def samples(stack: int, ticks: int, generator: torch.Generator) -> torch.Tensor:
    """Three rows of ticks with two channels; some ticks have fewer samples than places."""
    x = 5 + torch.randn((3, ticks, 2 * stack), generator=generator)
    if stack > 1:
        x[:, ::3, :2] = 0
    return x


@pytest.mark.parametrize("stack", [1, 3])
def test_a_sequence_in_parts_and_single_steps_give_the_same(stack: int) -> None:
    g = torch.Generator().manual_seed(0)
    movement = Movement(2 * stack, stack, 1.0, TICK_S).eval()
    x = samples(stack, 60, g)
    movement.set_scale(x.reshape(-1, 2 * stack))
    present = (torch.rand((3, 60), generator=g) < 0.7).float()
    reset = torch.rand((3, 60), generator=g) < 0.05
    start = torch.zeros(3, *movement.state)
    whole, after = movement(x, present, start, reset)
    parts, state = [], start
    for at in (slice(0, 7), slice(7, 8), slice(8, 60)):
        out, state = movement(x[:, at], present[:, at], state, reset[:, at])
        parts.append(out)
    stepped, last = [], start
    for t in range(60):
        last = torch.where(reset[:, t, None], torch.zeros_like(last), last)
        out, last = movement.step(x[:, t], present[:, t], last)
        stepped.append(out)
    here = present.unsqueeze(-1)
    for other in (torch.cat(parts, 1), torch.stack(stepped, 1)):
        torch.testing.assert_close(other * here, whole * here, atol=1e-5, rtol=1e-5)
    for other in (state, last):
        torch.testing.assert_close(other, after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"reduction": "stack", "stack": 3}])
def test_the_exported_step_has_it_and_passes_the_gate(tmp_path: Path, fields: dict[str, Any]) -> None:
    predictor = network(recipe_of(**fields))
    assert "moved.room.imu" in predictor.states
    worst = export(predictor, tmp_path / "step.onnx", {})
    assert max(worst.values()) <= 1e-5


def figures(hz: float, size: float, rate_hz: float = 50.0, axis: int = 0) -> np.ndarray:
    """Size, speed and frequency of all channels together, in the longest window, after three seconds of a swing."""
    stack = round(rate_hz * TICK_S)
    movement = Movement(3 * stack, stack, 1.0, TICK_S).eval()
    movement.std.fill_(0.3)
    at = torch.arange(round(3 * rate_hz)) / rate_hz
    x = torch.tensor([0.0, 0.6, 0.8]).repeat(len(at), 1)
    x[:, axis] += size * torch.sin(2 * torch.pi * hz * at)
    rows = x.reshape(1, -1, 3 * stack)
    out, _ = movement(rows, torch.ones(1, rows.shape[1]), torch.zeros(1, *movement.state), None)
    return out[0, -1, -3:].numpy()


def test_size_and_frequency_are_told_apart_and_the_direction_is_not() -> None:
    still, slow, fast, small = (figures(*what) for what in ((0.0, 0.0), (3.0, 0.5), (6.0, 0.5), (3.0, 0.1)))
    assert still[0] < 0.01 < small[0] < 0.6 * slow[0]
    assert slow[0] == pytest.approx(fast[0], abs=0.05)
    assert fast[2] > 1.5 * slow[2]
    assert small[2] == pytest.approx(slow[2], abs=0.03)
    np.testing.assert_allclose(figures(3.0, 0.5, axis=1), slow, atol=0.02)


def test_a_swing_as_fast_as_the_ticks_is_seen_where_all_samples_are_given() -> None:
    """25 Hz at 100 Hz: the mean of each tick is the same number."""
    assert figures(25.0, 0.5, 100.0)[0] > 0.3


@pytest.mark.parametrize("fields", [{"select": [1]}, {"energy": 0.9}])
def test_a_window_goes_with_no_other_reduction(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'room\.imu' has `window_s`, and `select` or `energy`; use one of them"):
        recipe_of(**fields)
