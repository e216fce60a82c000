from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_recordings import BEGIN, recorded, write

from stream_mmrnn.bench.engine import synthetic
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.types import Prediction, Stamps, Tick
from stream_mmrnn.offline import replay as replay_module
from stream_mmrnn.offline.replay import Comparison, replay
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.recording.recorder import Recorder

NOWHERE = Stamps(0, 0, 0, 0, "clock")


def prediction(index: int, values: Sequence[float], age: int = 0) -> Prediction:
    tick = Tick("s", index, index * 40, {}, {"audio": True}, {"audio": age}, NOWHERE)
    return Prediction(tick, {"h": np.array(values, np.float32)}, "sha", 1, 2)


def compared(now: list[Prediction], then: list[bytes]) -> dict[str, object]:
    comparison = Comparison()
    for payload in then:
        comparison.see_recorded(payload)
    for p in now:
        comparison.observe(p)
    return comparison.summary()


NAN = float("nan")


@given(st.lists(st.lists(st.floats(width=32), min_size=1, max_size=4), min_size=1, max_size=8), st.data())
def test_equal_predictions_are_identical_in_any_order(numbers: list[list[float]], data: st.DataObject) -> None:
    predictions = [prediction(i, [NAN if np.isinf(x) else x for x in n]) for i, n in enumerate(numbers)]
    comparison = Comparison()
    steps = [(comparison.observe, p) for p in predictions] + [
        (comparison.see_recorded, recorded(p)) for p in predictions
    ]
    for see, what in data.draw(st.permutations(steps)):
        see(what)
    summary = comparison.summary()
    assert summary["identical"], summary
    assert summary["recorded_predictions"] == len(numbers)


@pytest.mark.parametrize("see", ["observe", "see_recorded"])
def test_a_side_without_the_other_needs_no_memory(monkeypatch: pytest.MonkeyPatch, see: str) -> None:
    monkeypatch.setattr(replay_module, "_FURTHEST", 10)
    comparison = Comparison()
    for i in range(100):
        p = prediction(i, [0.5])
        getattr(comparison, see)(p if see == "observe" else recorded(p))
        assert len(comparison._now) + len(comparison._then) <= 11
    summary = comparison.summary()
    assert (summary["extra"], summary["missing"]) == ((100, 0) if see == "observe" else (0, 100))
    assert summary["first_difference"] == (
        "tick 1 has no recorded prediction" if see == "observe" else "100 recorded predictions were not made again"
    )


def test_each_kind_of_difference_is_named() -> None:
    then = [recorded(prediction(i, [0.5, 0.25])) for i in range(3)]
    same = [prediction(i, [0.5, 0.25]) for i in range(3)]
    assert compared(same, then)["identical"]
    assert not compared(same, [])["identical"]

    one = compared([prediction(0, [0.5, 0.75]), *same[1:]], then)
    assert (one["identical"], one["different"], one["max_abs_difference"]) == (False, 1, 0.5)
    assert one["first_difference"] == "tick 1, head 'h': 0.75 now, 0.25 recorded"
    nan = compared([prediction(0, [0.5, NAN]), *same[1:]], then)
    assert (nan["identical"], nan["different"], nan["max_abs_difference"]) == (False, 1, 0.0)
    shorter = compared([prediction(0, [0.5]), *same[1:]], then)
    assert (shorter["identical"], shorter["different"]) == (False, 1)
    other = compared([*same[:2], prediction(2, [0.5, 0.25], age=1)], then)
    assert (other["identical"], other["different"]) == (False, 1)
    assert other["first_difference"] == "tick 3 saw other inputs than when it was recorded"

    fewer = compared(same[:1], then)
    assert (fewer["identical"], fewer["missing"], fewer["extra"], fewer["different"]) == (False, 2, 0, 0)
    assert fewer["first_difference"] == "2 recorded predictions were not made again"
    more = compared(same, then[:1])
    assert (more["identical"], more["missing"], more["extra"], more["different"]) == (False, 0, 2, 0)
    assert more["first_difference"] == "tick 2 has no recorded prediction"
    twice = compared([*same, same[1]], [*then, then[2]])
    assert (twice["identical"], twice["missing"], twice["extra"], twice["recorded_predictions"]) == (False, 0, 1, 4)
    assert twice["repeated"] == 1
    # republished by an engine that was restored after a crash: equal numbers are one prediction, others a difference
    again = compared(same, [*then, then[1], then[2]])
    assert (again["identical"], again["repeated"], again["different"]) == (True, 2, 0)
    otherwise = compared(same, [*then, recorded(prediction(1, [0.5, 0.75]))])
    assert (otherwise["identical"], otherwise["repeated"], otherwise["different"]) == (False, 0, 1)
    assert otherwise["first_difference"] == "tick 2 was recorded twice, with other numbers"
    unreadable = compared(same, [*then, b'{"event_ns": 1}'])
    assert (unreadable["identical"], unreadable["missing"], unreadable["different"]) == (False, 1, 0)
    assert "cannot be read" in str(unreadable["first_difference"])


def test_a_recording_gives_the_same_predictions_again(toy: Path, tmp_path: Path) -> None:
    count = write(tmp_path / "a.mcap", toy, 4.0)
    seen: list[Prediction] = []
    result = replay(tmp_path / "a.mcap", verify=True, on_prediction=seen.append)
    assert result["identical"], result
    assert result["predictions"] == result["ticks"] == result["recorded_predictions"] == len(seen) == count == 100
    assert result["damage"] == ""
    assert result["latency_ms"]["step"]["count"] == count
    # without --verify it is compared, too
    assert replay(tmp_path / "a.mcap")["identical"]
    write(tmp_path / "b.mcap", toy, 1.0, head="other")
    other = replay(tmp_path / "b.mcap", verify=True)
    assert (other["identical"], other["different"]) == (False, 25)


def test_a_comparison_that_cannot_be_made_is_an_error(toy: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.mcap", toy, 1.0, metadata={"model_sha256": "another"})
    assert replay(tmp_path / "a.mcap")["identical"]
    with pytest.raises(UsageError, match="another version of the model"):
        replay(tmp_path / "a.mcap", verify=True)
    settings = config.load(None, {"engine.model": str(toy)})
    recorder = Recorder(tmp_path / "b.mcap", "bench-0", {"config": msgspec.json.encode(settings).decode()})
    for e in synthetic(StepEngine(toy).spec, 1, 1.0, BEGIN, 3):
        recorder.write(e)
    recorder.close({})
    result = replay(tmp_path / "b.mcap")
    assert (result["predictions"], result["extra"], result["identical"]) == (25, 25, False)
    with pytest.raises(FileError, match="no predictions to compare with"):
        replay(tmp_path / "b.mcap", verify=True)


def test_a_cut_recording_is_replayed_up_to_the_cut(toy: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.mcap", toy, 4.0)
    content = (tmp_path / "a.mcap").read_bytes()
    (tmp_path / "cut.mcap").write_bytes(content[: len(content) // 2])
    result = replay(tmp_path / "cut.mcap", verify=True)
    assert 10 < result["predictions"] < 100
    assert "cut off" in result["damage"]
    assert (result["different"], result["missing"]) == (0, 0)


def test_it_stops_when_alive_is_false(toy: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.mcap", toy, 4.0)
    seen: list[Prediction] = []
    result = replay(tmp_path / "a.mcap", on_prediction=seen.append, alive=lambda: len(seen) < 7)
    assert result["predictions"] == len(seen) == 7
    assert not result["identical"]
