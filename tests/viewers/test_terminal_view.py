"""What the terminal view leaves out where lines are few: never predictions and words."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from stream_mmrnn.viewers.terminal_view import render

STAGES = ("capture", "encode", "bus", "align", "queue", "step", "publish", "total")


def state(heads: dict[str, int], streams: int = 8, words: tuple[str, ...] = ("hello", "there")) -> dict[str, Any]:
    def head(name: str, size: int) -> dict[str, Any]:
        return {
            "values": [(i + 1) / (size + 1) for i in range(size)],
            "labels": [f"{name}-{i}" for i in range(size)],
            "history": {"series": [[0.1, 0.9]] * size},
            "threshold": None,
            "kind": "activity_projection",
        }

    return {
        "ticks": 750,
        "predictions_per_s": 25.0,
        "streams": {
            f"feature/s{i}": {"modality": f"s{i}", "state": "open", "rate_hz": 25.0, "age_ms": 12.0, "present": True}
            for i in range(streams)
        },
        "heads": {name: head(name, size) for name, size in heads.items()},
        "latency": {stage: {"p50": 1.0, "p99": 2.0} for stage in STAGES},
        "texts": [{"text": word} for word in reversed(words)],
        "other_texts": [],
        "losses": [{"node": "engine", "what": "late", "count": 3}],
    }


def drawn(of: dict[str, Any], height: int | None, notes: tuple[str, ...] = ()) -> str:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(render(of, 80, "live", list(notes), height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_stages_go_first_at_80_by_24() -> None:
    of = state({"activity": 8, "turn_over": 1})
    whole, small = drawn(of, None), drawn(of, 24)
    assert "latency, ms" in whole
    assert "losses" in whole
    assert len(whole.splitlines()) > 24
    assert len(small.splitlines()) <= 24
    assert "latency, ms" not in small
    assert "hello  there" in small
    for i in range(8):
        assert f"activity-{i}" in small
    assert "turn_over-0" in small
    one_more = drawn(of, len(whole.splitlines()) - 1)
    assert "latency, ms" not in one_more
    assert "losses" in one_more
    assert drawn(of, 200) == whole


@settings(max_examples=40)
@given(
    height=st.integers(1, 60),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    streams=st.integers(0, 12),
    notes=st.lists(st.just("a note of the session"), max_size=5),
)
def test_predictions_and_words_are_always_there(height: int, sizes: list[int], streams: int, notes: list[str]) -> None:
    heads = {f"head{i}": size for i, size in enumerate(sizes)}
    shown = drawn(state(heads, streams), height, tuple(notes))
    for name, size in heads.items():
        assert f"{name}-{size - 1}" in shown, "the greatest number of each head"
    assert "hello  there" in shown
    assert len(shown.splitlines()) <= max(height, 2 + len(heads))


@pytest.mark.parametrize("height", [None, 10])
def test_a_head_without_numbers_is_no_error(height: int | None) -> None:
    of = state({"activity": 2})
    of["heads"]["activity"]["values"] = [None, None]
    assert "activity-0" in drawn(of, height)
