"""When an answer may be read, and what it is then; the queue, the gaps and the faults of what feeds the model."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stream_mmrnn
from stream_mmrnn import PredictorTurns, Turn, TurnReader, UsageError
from stream_mmrnn.adapters import turns as module
from stream_mmrnn.core.types import HeadSpec

_TICK_NS = 40_000_000
LABELS = ("self_200ms", "self_600ms", "other_200ms", "other_600ms")
HEADS = (
    HeadSpec("activity", "activity_projection", 4, LABELS),
    HeadSpec("turn_over", "classification", 1, threshold=0.25),
)


class Ticks:
    """Predictions one after another, of a person who is heard; `other`: of a second one, too."""

    def __init__(self, reader: TurnReader, other: bool = False) -> None:
        self.reader, self._k, self._other = reader, 0, other

    def next(self, own: float, other: float = 0.0, over: float = 0.5, age_ns: int = 0, present: bool = True) -> Turn:
        self._k += 1
        ages = {"audio": age_ns} | ({"other_audio": 0} if self._other else {"other_audio": -1})
        at: Any = SimpleNamespace(event_ns=self._k * _TICK_NS, age_ns=ages, present={"audio": present})
        heads = {"activity": np.float32([own, own, other, other]), "turn_over": np.float32([over])}
        return self.reader.observe(at, heads)

    def silence(self, count: int, **what: Any) -> list[Turn]:
        return [self.next(0.1, **what) for _ in range(count)]


@pytest.fixture
def reader() -> TurnReader:
    return TurnReader(HEADS)


def test_it_is_read_a_quarter_of_a_second_into_a_silence_and_no_earlier(reader: TurnReader) -> None:
    ticks = Ticks(reader)
    assert ticks.next(0.9) == Turn(_TICK_NS, "self", "self", 0.0, None, "somebody speaks")
    early = ticks.silence(6)
    assert {turn.over for turn in early} == {None}
    assert early[-1].why == "the silence is shorter than 0.25 s"
    (turn,) = ticks.silence(1)
    assert (turn.over, turn.holder, turn.speaker, turn.silence_s) == (0.5, "self", "", pytest.approx(0.28))
    assert reader.is_over(turn)
    assert not reader.is_over(ticks.next(0.1, over=0.2))
    assert not reader.is_over(ticks.next(0.9, over=0.9))
    assert not reader.is_over(None)


def test_before_anybody_spoke_nothing_is_over(reader: TurnReader) -> None:
    assert {(turn.over, turn.why) for turn in Ticks(reader).silence(50)} == {(None, "nobody has spoken yet")}


def test_without_sound_a_silence_is_no_silence(reader: TurnReader) -> None:
    ticks = Ticks(reader)
    ticks.next(0.9)
    ticks.silence(20)
    assert ticks.next(0.1, age_ns=500_000_000).why == "no sound comes"
    assert ticks.next(0.1, age_ns=-1).why == "no sound comes"
    assert ticks.silence(20)[-1].why == "nobody has spoken yet"


def test_a_tick_without_sound_is_not_read_and_ends_no_silence(reader: TurnReader) -> None:
    ticks = Ticks(reader)
    ticks.next(0.9)
    ticks.silence(10)
    assert ticks.next(0.1, present=False, age_ns=50_000_000).why == "this tick has no sound"
    assert ticks.next(0.1).over == 0.5


def test_of_a_person_who_is_not_heard_nothing_is_believed() -> None:
    alone = Ticks(TurnReader(HEADS))
    alone.next(0.9)
    assert alone.silence(8, other=0.9)[-1].over == 0.5
    both = Ticks(TurnReader(HEADS), other=True)
    both.next(0.9)
    assert {turn.speaker for turn in both.silence(8, other=0.9)} == {"other"}
    after = both.silence(8)[-1]
    assert (after.holder, after.over) == ("other", 0.5)
    assert not both.reader.is_over(after)  # the agent's turn is, not the user's


@given(
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32), st.integers(-1, 10**9), st.booleans()), max_size=60)
)
def test_whatever_comes_an_answer_is_a_number_in_a_silence(rows: list[tuple[float, float, int, bool]]) -> None:
    ticks = Ticks(TurnReader(HEADS))
    for own, over, age_ns, present in rows:
        turn = ticks.next(own, over=over, age_ns=age_ns, present=present)
        assert (turn.over is None) == bool(turn.why)
        if turn.over is not None:
            assert np.isfinite(turn.over)
            assert not turn.speaker
            assert turn.silence_s >= 0.25


@pytest.mark.parametrize(
    ("heads", "options", "says"),
    [
        (HEADS[:1], {}, "no 'turn_over', which tells the end of a turn; use turn_taking"),
        ((HEADS[1], HeadSpec("activity", "classification", 2, ("a", "b"))), {}, "no 'self_200ms'"),
        (HEADS, {"threshold": 1.5}, r"threshold is 1\.5: expected a probability"),
        (HEADS, {"after_s": 0.1}, r"after_s is 0\.1: expected 0\.25 to 10 seconds"),
    ],
)
def test_what_cannot_be_read_is_refused(heads: Any, options: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TurnReader(heads, **options)


class FakePredictor:
    """Predicts for each piece of sound that somebody speaks where it is loud, and otherwise that the turn is over."""

    def __init__(self) -> None:
        self.spec: Any = SimpleNamespace(heads=HEADS)
        self.may_go_on, self.given, self.error = threading.Event(), list[float | None](), ""
        self.may_go_on.set()
        self.reset()

    def reset(self) -> None:
        self.end_s = 0.0

    def push_audio(self, pcm: Any, at_s: float | None = None, *, rate_hz: int = 16_000, stream: str = "audio") -> Any:
        assert self.may_go_on.wait(20)
        if self.error:
            raise UsageError(self.error)
        self.given.append(at_s)
        self.end_s = self.end_s + len(pcm) / rate_hz if at_s is None else at_s
        own = 0.9 if abs(pcm).max() > 100 else 0.1
        tick = SimpleNamespace(event_ns=round(self.end_s * 1e9), age_ns={"audio": 0}, present={"audio": True})
        heads = {"activity": np.float32([own, own, 0, 0]), "turn_over": np.float32([0.7])}
        return [SimpleNamespace(tick=tick, heads=heads)]

    def at_s(self, at: Any) -> float:
        return float(at.tick.event_ns / 1e9)


LOUD, QUIET = np.full(640, 5000, np.int16), np.zeros(640, np.int16)


def until(found: Callable[[], Any]) -> Any:
    end_s = time.monotonic() + 20
    while not (it := found()) and time.monotonic() < end_s:
        time.sleep(0.002)
    return it


def test_the_thread_answers_about_the_newest_sound() -> None:
    with PredictorTurns(FakePredictor()) as turns:  # type: ignore[arg-type]
        assert turns.poll() is None
        for sound in (LOUD, LOUD, *[QUIET] * 10):
            turns.push(sound, 16_000)
        assert until(lambda: turns.is_over(turns.poll()))
        assert turns.threshold == 0.25
        turns.reset()
        assert turns.poll() is None
        turns.push(QUIET, 16_000)
        assert until(lambda: (turn := turns.poll()) and turn.why == "nobody has spoken yet")
    with pytest.raises(UsageError, match="was closed"):
        turns.push(QUIET, 16_000)


def test_an_answer_about_old_sound_is_none_and_lost_sound_is_a_gap() -> None:
    predictor = FakePredictor()
    with PredictorTurns(predictor) as turns:  # type: ignore[arg-type]
        turns.push(LOUD, 16_000)
        assert until(turns.poll)
        predictor.may_go_on.clear()
        turns.push(QUIET, 16_000)
        assert until(turns._waiting.empty)  # the thread holds it, and takes nothing of what comes now
        for _ in range(299):  # twelve seconds: more than the queue holds
            turns.push(QUIET, 16_000)
        assert turns.dropped >= 300 - module._QUEUE - 1
        assert turns.poll() is None
        predictor.may_go_on.set()
        assert until(lambda: len(predictor.given) >= 300 - turns.dropped)
        turns.push(QUIET, 16_000)
        assert until(turns.poll)
        assert [at_s for at_s in predictor.given if at_s is not None] == [pytest.approx(302 * 0.04)]


UNCLOSED = """
import time
from stream_mmrnn.adapters.turns import PredictorTurns
from test_turn_reader import LOUD, FakePredictor

class Slow(FakePredictor):
    def push_audio(self, *sound, **more):
        time.sleep(0.5)
        print("stepped")
        return super().push_audio(*sound, **more)

turns = PredictorTurns(Slow())
turns.push(LOUD, 16_000)
while not turns._waiting.empty():
    time.sleep(0.001)
"""


@pytest.mark.process
def test_a_program_that_ends_without_closing_waits_for_the_step_under_way() -> None:
    """A thread inside onnxruntime would abort it."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", UNCLOSED],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "stepped\n"), done.stderr


def test_a_fault_is_said_and_ends_with_a_reset() -> None:
    predictor = FakePredictor()
    with PredictorTurns(predictor) as turns:  # type: ignore[arg-type]
        predictor.error = "the model takes no sound"
        turns.push(LOUD, 16_000)
        assert until(lambda: turns.fault) == "the model takes no sound"
        assert turns.poll() is None
        predictor.error = ""
        turns.reset()
        turns.push(LOUD, 16_000)
        assert until(turns.poll)
        assert turns.fault == ""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("PipecatTurnAnalyzer", r"needs pipecat-ai: .* pip install 'stream-mmrnn-client\[pipecat\]'"),
        ("PipecatTurnStopStrategy", "needs pipecat-ai"),
        ("LiveKitTurnDetector", r"needs the extra `livekit` \(livekit.agents missing\).*'stream-mmrnn\[livekit\]'"),
    ],
)
def test_without_its_package_an_adapter_names_the_extra(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_mmrnn.core.extras.missing", lambda packages: list(packages))
    with pytest.raises(UsageError, match=says):
        getattr(stream_mmrnn, name)(PredictorTurns(FakePredictor()))  # type: ignore[arg-type]


def test_sound_of_one_channel_of_several_is_taken() -> None:
    """A view of every second sample has gaps in memory."""
    predictor = stream_mmrnn.Predictor("turn_taking")
    both = np.zeros((16_000, 2), np.int16)
    assert len(predictor.push_audio(both[:, 0], rate_hz=8_000)) > 40
