"""TurnReader: predictions in, what may be said of the speaker's turn out.

`turn_over` means something in a silence only, and was calibrated a quarter of a second into it. While somebody speaks,
earlier in a silence, or without sound, there is no answer, and the reason is given instead. Pure; knows nothing about
frameworks, sockets or clocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.types import HeadSpec, Tick, Vectors

AFTER_S = 0.25
"""The time into a silence for which `turn_over` was calibrated; before it, the head is not read."""
GAP_NS = 300_000_000
"""An older newest sample of sound means that there is none: a microphone that was pulled out is no silence."""
_OVER, _ACTIVITY = "turn_over", "activity"
_SOUNDS = {"self": "audio", "other": "other_audio"}
_SOUND = _SOUNDS["self"]
_SOON = {"self": "self_200ms", "other": "other_200ms"}
"""By speaker, the label of the next 200 ms: above the threshold, that person speaks."""


class Predicted(Protocol):
    """What is read of a prediction: a `Tick` with its heads, or a `PredictionView`."""

    @property
    def event_ns(self) -> int: ...
    @property
    def present(self) -> dict[str, bool]: ...
    @property
    def age_ns(self) -> dict[str, int]: ...


class Turn(msgspec.Struct, frozen=True, gc=False):
    """What one prediction says of the turn."""

    event_ns: int
    """The end of its tick."""
    speaker: str
    """Who speaks: `self`, `other`, or "" in a silence."""
    holder: str
    """Who spoke last, or speaks."""
    silence_s: float
    over: float | None
    """How likely the holder's turn is over; None while the model cannot say."""
    why: str = ""
    """Why `over` is None."""


class TurnReader:
    """One session's predictions, in order -> a `Turn` for each."""

    def __init__(self, heads: Iterable[HeadSpec], *, threshold: float | None = None, after_s: float = AFTER_S) -> None:
        """`heads`: of the model's contract. `threshold`: above it the turn counts as over, by default the contract's;
        `after_s`: not read earlier in a silence.

        Raises:
            UsageError: the model has no such heads, or a number is out of range.

        """
        by_name = {head.name: head for head in heads}
        missing = [name for name in (_OVER, _ACTIVITY) if name not in by_name]
        labels = by_name[_ACTIVITY].labels if not missing else ()
        missing += [label for label in _SOON.values() if not missing and label not in labels]
        if missing:
            raise UsageError(
                f"the model has no {missing[0]!r}, which tells the end of a turn; use turn_taking, or a model with the "
                f"heads {_OVER} and {_ACTIVITY} ({', '.join(_SOON.values())})"
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise UsageError(f"threshold is {threshold!r}: expected a probability, 0 to 1")
        if not AFTER_S <= after_s <= 10:
            raise UsageError(f"after_s is {after_s!r}: expected {AFTER_S:g} to 10 seconds into a silence")
        self.threshold = by_name[_OVER].threshold if threshold is None else threshold
        self._after_s = after_s
        self._speaks = by_name[_ACTIVITY].threshold
        self._index = {who: labels.index(label) for who, label in _SOON.items()}
        self.reset()

    def reset(self) -> None:
        """Forget who spoke."""
        self._holder = ""
        self._spoke_ns: int | None = None
        """The end of the last tick in which somebody spoke, or before which nothing is known."""

    def observe(self, at: Predicted | Tick, heads: Vectors) -> Turn:
        """Read the next prediction: its tick (or `PredictionView`) and its heads."""
        if not _is_new(at, _SOUND):
            self.reset()
            return Turn(at.event_ns, "", "", 0.0, None, "no sound comes")
        speaker = self._speaker(at, heads[_ACTIVITY])
        if speaker is None:
            return self._silent(at, None, "the model's answer is no number")
        if speaker:
            self._holder, self._spoke_ns = speaker, at.event_ns
            return Turn(at.event_ns, speaker, speaker, 0.0, None, "somebody speaks")
        if not self._holder:
            return Turn(at.event_ns, "", "", 0.0, None, "nobody has spoken yet")
        over = float(heads[_OVER][0])
        if not np.isfinite(over):
            return self._silent(at, None, "the model's answer is no number")
        if not at.present.get(_SOUND, False):
            return self._silent(at, None, "this tick has no sound")
        return self._silent(at, over, "")

    def _speaker(self, at: Predicted | Tick, activity: npt.NDArray[np.float32]) -> str | None:
        """Who speaks; the first person, if both do. None where a number is not finite."""
        # of a person whose voice is not heard, the head tells what is usual in conversations, not what happens
        heard = [who for who, sound in _SOUNDS.items() if _is_new(at, sound)]
        values = {who: float(activity[self._index[who]]) for who in heard}
        if not all(map(np.isfinite, values.values())):
            return None
        return next((who for who, value in values.items() if value >= self._speaks), "")

    def _silent(self, at: Predicted | Tick, over: float | None, why: str) -> Turn:
        silence_s = 0.0 if self._spoke_ns is None else (at.event_ns - self._spoke_ns) / 1e9
        if over is not None and silence_s < self._after_s - 1e-9:
            over, why = None, f"the silence is shorter than {self._after_s:g} s"
        return Turn(at.event_ns, "", self._holder, silence_s, over, why)

    def is_over(self, turn: Turn | None) -> bool:
        """Whether the first person's turn is over."""
        return turn is not None and turn.holder == "self" and turn.over is not None and turn.over > self.threshold


def _is_new(at: Predicted | Tick, sound: str) -> bool:
    """Whether that sound comes."""
    return 0 <= at.age_ns.get(sound, -1) <= GAP_NS
