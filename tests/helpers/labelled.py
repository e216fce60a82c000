"""Recordings of ten seconds with labels given afterwards, for the tests of these."""

from __future__ import annotations

from pathlib import Path

from small_recordings import BEGIN

from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.training.tasks.recordings import TypedEvents

S = 1_000_000_000
ZERO = BEGIN - 1_000_000  # the first sound of 16 samples begins a millisecond before its stamp
NOTES = "tier,begin_s,end_s,label\nposture,0.5,2,sitting\nposture,2,4.5,walking\ngaze,1,,left\n"
GIVEN = {
    "posture": [(0.5, "sitting"), (2.0, "walking"), (4.5, "none")],
    "gaze": [(1.0, "left")],
}
"""What `tiers_of` says after NOTES were given."""


def notes(folder: Path, text: str = NOTES, name: str = "notes.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def tiers_of(path: Path) -> dict[str, list[tuple[float, str]]]:
    """By tier the labels with their seconds."""
    tiers = TypedEvents.of(Recording(path)).tiers
    return {tier: [((at_ns - ZERO) / S, name) for at_ns, name in changes] for tier, changes in tiers.items() if changes}
