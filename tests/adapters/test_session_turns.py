"""`SessionTurns` without a session: a bus that says what the test wants. With one: test_in_agents.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stream_mmrnn import NotRunning, SessionTurns, now_ns
from stream_mmrnn.adapters import turns as module
from stream_mmrnn.bus.prediction_reader import Model, PredictionView
from stream_mmrnn.core.types import HeadSpec

HEADS = (
    HeadSpec("activity", "activity_projection", 2, ("self_200ms", "other_200ms")),
    HeadSpec("turn_over", "classification", 1, threshold=0.25),
)
MODEL = Model("turn_taking", "0" * 64, 40_000_000, HEADS)
SOUND = np.zeros(320, np.int16)


class Bus:
    """In place of the push and of the subscription."""

    def __init__(self, *given: Any, **options: Any) -> None:
        self.session, self.ended, self.closed = "live", "", False
        self.sent: list[Any] = []
        self.views: list[PredictionView] = []
        self.error: NotRunning | None = None

    def send(self, data: Any, *, rate_hz: int) -> bool:
        if self.error:
            raise self.error
        self.sent.append((data, rate_hz))
        return True

    def receive(self, timeout: float) -> PredictionView | None:
        return self.views.pop(0) if self.views else None

    def close(self) -> None:
        self.closed = True

    def says(self, ago_s: float, own: float, model: Model | None = MODEL) -> None:
        heads = {"activity": np.float32([own, 0.9]), "turn_over": np.float32([0.8])}
        at_ns = now_ns() - round(ago_s * 1e9)
        view = PredictionView(
            "live", 1, at_ns, heads, {"audio": True}, {"audio": 0, "other_audio": -1}, {}, 0, "0" * 64, model
        )
        self.views.append(view)


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Bus:
    found = Bus()
    monkeypatch.setattr(module, "Push", lambda *given, **options: found)
    monkeypatch.setattr(module, "Subscription", lambda *given, **options: found)
    return found


def test_sound_goes_out_and_the_newest_answer_comes_back(bus: Bus) -> None:
    with SessionTurns() as turns:
        turns.push(np.zeros((320, 2), np.int16), 48_000)
        ((sound, rate_hz),) = bus.sent
        assert (sound.shape, rate_hz) == ((320,), 48_000)
        assert (turns.poll(), turns.threshold) == (None, None)
        bus.says(0.4, 0.9, model=None)  # the engine has not said yet what its numbers mean
        assert turns.poll() is None
        bus.says(0.4, 0.9)
        bus.says(0.0, 0.1)
        turn = turns.poll()
        assert turn is not None
        assert turn.over == pytest.approx(0.8)
        assert turns.is_over(turn)
        assert turns.threshold == 0.25
        turns.reset()
        assert turns.poll() is None
    assert bus.closed


def test_a_late_engine_has_no_answer(bus: Bus) -> None:
    turns = SessionTurns(threshold=0.9)
    assert turns.threshold == 0.9
    bus.says(3.0, 0.9)
    bus.says(2.0, 0.1)
    assert turns.poll() is None


def test_of_another_machine_the_time_of_arrival_counts(bus: Bus) -> None:
    turns = SessionTurns("live", address="10.0.0.1:5570")
    bus.says(10_000.4, 0.9)
    bus.says(10_000.0, 0.1)
    assert turns.is_over(turns.poll())


@pytest.mark.parametrize("where", ["push", "subscription"])
def test_a_session_that_ends_is_a_fault_and_no_error(bus: Bus, where: str) -> None:
    turns = SessionTurns()
    bus.says(0.4, 0.9)
    bus.says(0.0, 0.1)
    if where == "push":
        bus.error = NotRunning("the session 'live' has ended")
        turns.push(SOUND, 16_000)
    else:
        bus.ended = "the session 'live' has ended"
    assert turns.poll() is None
    assert turns.fault == "the session 'live' has ended"
    turns.push(SOUND, 16_000)  # the agent goes on
    assert turns.poll() is None


def test_a_model_that_does_not_tell_turns_is_a_fault(bus: Bus) -> None:
    turns = SessionTurns()
    bus.says(0.0, 0.1, model=Model("other", "1" * 64, 40_000_000, HEADS[:1]))
    assert turns.poll() is None
    assert "no 'turn_over', which tells the end of a turn" in turns.fault
