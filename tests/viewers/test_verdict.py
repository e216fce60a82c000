"""What the page says of a session in words: its inputs, its engine, what a prediction is worth, and what comes next."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.predict.contract import read_contract
from stream_mmrnn.viewers.dashboard.heads import HeadMeaning, Silence
from stream_mmrnn.viewers.dashboard.sayings import cumulative, lines
from stream_mmrnn.viewers.dashboard.state import LiveState
from stream_mmrnn.viewers.dashboard.verdict import Doubts

S, MS = 1_000_000_000, 1_000_000
T0 = 1_700_000_000 * S
TICK = 40 * MS
SPEECH = HeadMeaning(
    "activity",
    "activity_projection",
    ["self_200ms", "other_200ms", "self_2000ms", "other_2000ms"],
    [(0, 0.2), (0, 0.2), (0.2, 2), (0.2, 2)],
)
OVER = HeadMeaning("turn_over", "classification", threshold=0.25, readable="silence")
CAPTURED = {
    "vision": Stream.of("vision", source="camera:0"),
    "audio": Stream.of("audio", source="microphone"),
    "text": Stream.of("text", source="page"),
    "wrist": Stream.of("wrist", source="push"),
}
MODEL = ["vision", "audio", "text", "other_audio"]


def status(node: str, at_ns: int, state: str, **more: Any) -> Envelope:
    payload = json.dumps({"node": node, "state": state, **more}).encode()
    return Envelope("status/" + node, "*", 0, at_ns, at_ns, at_ns, payload)


def engine(at_ns: int, state: str = "ready", misfits: dict[str, str] | None = None, **more: Any) -> Envelope:
    heads = msgspec.to_builtins([SPEECH, OVER])
    spec = {"name": "m", "tick_ns": TICK, "heads": heads, "modalities": MODEL}
    rows = {name: {"quarantined": 1} for name in misfits or {}}
    detail = {"spec": spec, "misfits": misfits or {}, "streams": rows}
    return status("engine", at_ns, state, detail=detail, **more)


def predicted(at_ns: int, heads: dict[str, list[float]], **gone: int) -> Envelope:
    """`gone`: the age of an input that the tick had to do without; -1: it never came."""
    stamps = {"event_ns": at_ns, "capture_ns": at_ns, "publish_ns": at_ns, "received_ns": at_ns, "by": "feature/audio"}
    payload = {
        "tick": at_ns // TICK,
        "event_ns": at_ns,
        "heads": heads,
        "present": {name: name not in gone for name in MODEL},
        "age_ns": {name: gone.get(name, 0) for name in MODEL},
        "closed": stamps,
        "step_start_ns": at_ns,
        "step_end_ns": at_ns,
        "model": "ab" * 32,
    }
    return Envelope("prediction", "a", at_ns // TICK, at_ns, at_ns, at_ns, json.dumps(payload).encode())


def well(at_ns: int = T0) -> LiveState:
    """A session of which everything works, at this time."""
    live = LiveState(table=CAPTURED)
    live.began_ns = T0
    live.observe(engine(at_ns))
    for node, stream in (("camera", "vision"), ("microphone", "audio"), ("text", "text"), ("wrist", "wrist")):
        live.observe(status(node, at_ns, "open", modality=stream, pid=1))
    for stream in ("vision", "audio", "wrist"):
        live.observe(Envelope("feature/" + stream, "a", 0, at_ns, at_ns, at_ns, np.zeros(3, np.float32)))
    live.observe(predicted(at_ns, {"activity": [0.9, 0.1, 0.92, 0.2], "turn_over": [0.8]}))
    return live


def inputs_of(live: LiveState, at_ns: int) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in live.snapshot(at_ns)["inputs"]}


# --- inputs and the worst of all


def test_a_session_that_works_says_so_and_what_it_does_not_use() -> None:
    live = well()
    snap = live.snapshot(T0 + 100 * MS)
    assert snap["overall"] == {"tone": "good", "what": ""}
    assert snap["forecast"] == {"state": "good", "why": ""}
    rows = inputs_of(live, T0 + 100 * MS)
    assert [(r["label"], r["word"]) for r in rows.values()] == [
        ("Camera", "working"),
        ("Microphone", "working"),
        ("Words", "working"),
        ("Wrist", "not used"),
        ("The other's sound", "not connected"),
    ]
    assert rows["wrist"]["why"] == "this model does not take it"
    assert not rows["wrist"]["used"]


@pytest.mark.parametrize(
    ("state", "tone", "word"),
    [
        ("missing", "bad", "not there (missing)"),
        ("restarting", "bad", "died, starts again"),
        ("failed", "bad", "given up"),
        ("stale", "warn", "late (stale)"),
        ("starting", "warn", "starts"),
    ],
)
def test_a_camera_with_problems_is_the_headline(state: str, tone: str, word: str) -> None:
    live = well()
    live.observe(status("camera", T0 + MS, state, modality="vision", reason="was unplugged"))
    snap = live.snapshot(T0 + 100 * MS)
    assert snap["overall"] == {"tone": tone, "what": f"Camera: {word}, was unplugged"}
    expected = "doubtful" if tone == "bad" else "good"
    assert snap["forecast"]["state"] == expected
    if tone == "bad":
        assert snap["forecast"]["why"] == f"camera: {word}"


def test_a_silent_and_an_ended_input_make_the_forecast_doubtful() -> None:
    live = well()
    live.observe(engine(T0 + 4 * S))
    live.observe(predicted(T0 + 4 * S, {"activity": [0.9] * 4}))
    for stream in ("vision", "wrist"):
        live.observe(Envelope("feature/" + stream, "a", 1, T0 + 4 * S, T0, T0 + 4 * S, np.zeros(3, np.float32)))
    assert inputs_of(live, T0 + 4 * S)["audio"]["why"] == "no data for 4 s"
    assert live.snapshot(T0 + 4 * S)["forecast"] == {"state": "doubtful", "why": "microphone: silent"}
    live.observe(status("microphone", T0 + 4 * S, "ended", modality="audio"))
    live.observe(status("camera", T0 + 4 * S, "ended", modality="vision"))
    for node, stream in (("text", "text"), ("wrist", "wrist")):
        live.observe(status(node, T0 + 4 * S, "open", modality=stream, pid=1))
    snap = live.snapshot(T0 + 4 * S)
    assert snap["forecast"]["why"] == "camera, microphone: ended"
    assert snap["overall"]["tone"] == "warn"
    assert "camera, microphone: ended" in snap["overall"]["what"]


def test_a_quarantined_input_is_named_with_the_reason_while_it_lasts() -> None:
    live = well()
    live.observe(engine(T0 + MS, misfits={"audio": "its size is 3, the model takes 81"}))
    row = inputs_of(live, T0 + 2 * MS)["audio"]
    assert (row["tone"], row["word"]) == ("bad", "refused (quarantined)")
    assert row["why"] == "its size is 3, the model takes 81"
    assert live.snapshot(T0 + 2 * MS)["forecast"]["why"] == "microphone: refused (quarantined)"
    live.observe(engine(T0 + 5 * S, misfits={"audio": "its size is 3, the model takes 81"}))
    assert "quarantined" not in inputs_of(live, T0 + 5 * S)["audio"]["word"], "no sample was refused since"


@pytest.mark.parametrize("state", ["restarting", "failed"])
def test_a_dead_engine_makes_the_forecast_old_at_once(state: str) -> None:
    live = well()
    live.observe(status("engine", T0 + MS, state, reason="was killed by SIGKILL"))
    snap = live.snapshot(T0 + 2 * MS)
    assert snap["forecast"]["state"] == "old"
    assert snap["overall"]["tone"] == "bad"
    assert snap["overall"]["what"].startswith("the engine ")
    assert "was killed by SIGKILL" in snap["overall"]["what"]


def test_a_late_engine_is_worse_than_a_late_camera() -> None:
    live = well()
    live.observe(engine(T0 + 1400 * MS))
    live.observe(status("camera", T0 + 1400 * MS, "stale", modality="vision"))
    snap = live.snapshot(T0 + 1500 * MS)
    assert snap["forecast"] == {"state": "old", "why": "no new prediction for 2 s"}
    assert snap["overall"] == {"tone": "bad", "what": "no new prediction for 2 s"}
    assert "has said nothing for 4 s" in live.snapshot(T0 + 5 * S)["overall"]["what"]


def test_a_restart_is_said_for_a_while() -> None:
    live = well()
    live.observe(status("camera", T0 + MS, "restarting", modality="vision", reason="was killed by SIGKILL"))
    again = T0 + S
    live.observe(status("camera", again, "open", modality="vision", pid=2))
    live.observe(engine(again))
    live.observe(predicted(again, {}))
    what = live.snapshot(again)["overall"]
    assert what == {"tone": "warn", "what": "Camera died 1 s ago and runs again: it was killed by SIGKILL"}
    assert "runs again" not in live.snapshot(T0 + 12 * S)["overall"]["what"]


def test_other_processes_count_too() -> None:
    live = well()
    live.observe(status("recorder", T0, "failed", reason="the disk is full"))
    assert live.snapshot(T0 + MS)["overall"] == {"tone": "bad", "what": "recorder: given up, the disk is full"}


def test_a_recording_is_judged_by_its_data_and_not_by_its_processes() -> None:
    live = well()
    live.recorded = True
    live.observe(status("engine", T0, "closed"))
    live.observe(status("camera", T0, "failed", modality="vision"))
    snap = live.snapshot(T0 + 100 * MS)
    assert (snap["overall"]["tone"], snap["forecast"]["state"]) == ("good", "good")
    assert live.snapshot(T0 + 5 * S)["forecast"]["why"].startswith("camera, microphone: silent")


# --- spans without an input


def test_predictions_without_an_input_are_marked_with_the_reason() -> None:
    live = well()
    for i in range(1, 51):
        live.observe(predicted(T0 + i * TICK, {"activity": [0.9] * 4}, **({"vision": 2 * S} if i > 25 else {})))
    (span,) = live.snapshot(T0 + 50 * TICK)["doubts"]
    assert span == {"from_ms": 24 * 40.0, "to_ms": 0.0, "why": "without camera"}
    assert live.snapshot(T0 + 40 * S)["doubts"] == [], "only the last 30 s"


def test_an_input_that_is_merely_between_two_samples_is_no_doubt() -> None:
    live = well()
    live.observe(predicted(T0 + TICK, {}, vision=80 * MS, text=60 * S, other_audio=-1))
    assert live.snapshot(T0 + TICK)["doubts"] == []
    live.observe(predicted(T0 + 2 * TICK, {}, vision=-1))
    assert [d["why"] for d in live.snapshot(T0 + 2 * TICK)["doubts"]] == ["without camera"]


@given(st.lists(st.tuples(st.integers(0, 10**12), st.sampled_from(["", "a", "b"])), max_size=300))
def test_doubts_are_bounded(ticks: list[tuple[int, str]]) -> None:
    doubts = Doubts()
    for at_ns, why in ticks:
        doubts.observe(at_ns, why)
    found = doubts.snapshot(10**12)
    assert len(found) <= 64
    assert all(d["from_ms"] >= d["to_ms"] for d in found)


# --- when a head may be read


def test_the_included_model_says_that_turn_over_is_read_in_silence() -> None:
    heads = {h.name: h.readable for h in read_contract(Graph(ROOT / "models/turn_taking/step.onnx")).heads}
    assert heads == {"activity": "always", "turn_over": "silence"}


def test_a_head_is_shown_only_when_it_may_be_read() -> None:
    live = well()
    said = {line["head"]: line for line in live.snapshot(T0)["next"]}
    assert said["turn_over"]["text"] == "Turn over?"
    assert (said["turn_over"]["p"], said["turn_over"]["why"]) == (None, "you are speaking")
    assert live.snapshot(T0)["heads"]["turn_over"]["values"] == [None]
    quiet = [0.1, 0.2, 0.3, 0.4]
    for i in range(1, 11):
        live.observe(predicted(T0 + i * TICK, {"activity": quiet, "turn_over": [0.8]}))
        line = live.snapshot(T0 + i * TICK)["next"][-1]
        assert line["text"] == ("Turn over?" if i < 8 else "Turn over? Yes")
    assert (line["p"], line["why"]) == (0.8, "yes above 25 %")
    series = live.snapshot(T0 + 10 * TICK)["heads"]["turn_over"]["history"]["series"]
    assert series[0][:4] == [None] * 4, "history has no value that could not be read"
    assert series[0][-1] == 0.8
    live.observe(predicted(T0 + 11 * TICK, {"activity": [0.1, 0.7, 0.3, 0.4], "turn_over": [0.8]}))
    assert live.snapshot(T0 + 11 * TICK)["next"][-1]["why"] == "the other is speaking"


def test_a_head_that_is_always_readable_needs_no_silence() -> None:
    silence = Silence()
    silence.observe(0, {"activity": [0.9] * 4}, [SPEECH], {})
    assert silence.why_not(HeadMeaning("walking", "classification")) == ""
    assert silence.why_not(OVER) == "you are speaking"


def test_a_person_who_is_not_heard_neither_speaks_nor_is_silent() -> None:
    live = well()
    talking = {"activity": [0.1, 0.9, 0.1, 0.9], "turn_over": [0.8]}
    for i in range(1, 11):
        live.observe(predicted(T0 + i * TICK, talking, other_audio=-1))
    said = live.snapshot(T0 + 10 * TICK)["next"]
    assert (said[1]["text"], said[1]["why"]) == ("The other keeps talking", "not heard: as usual")
    assert said[2]["text"] == "Turn over? Yes", "what is usual of the other is no speech"
    live.observe(predicted(T0 + 11 * TICK, talking, other_audio=-1, audio=400 * MS))
    assert live.snapshot(T0 + 11 * TICK)["next"][2]["why"] == "no sound comes"


def test_the_end_of_a_turn_needs_a_turn() -> None:
    silence = Silence()
    for i in range(20):
        silence.observe(i * TICK, {"activity": [0.1] * 4}, [SPEECH], {"audio": 0})
    assert silence.why_not(OVER) == "nobody has spoken yet"


# --- sentences


@pytest.mark.parametrize(
    ("now", "later", "text", "p"),
    [
        (0.9, 0.92, "You keep talking", 0.92),
        (0.9, 0.2, "You stop talking", 0.8),
        (0.1, 0.7, "You start talking", 0.7),
        (0.1, 0.2, "You stay silent", 0.8),
    ],
)
def test_projected_speech_in_words(now: float, later: float, text: str, p: float) -> None:
    you, other = lines(SPEECH, [now, 0.1, later, 0.3])
    assert (you["text"], you["p"]) == (text, pytest.approx(p))
    assert you["steps"] == [{"end_s": 0.2, "p": now}, {"end_s": 2.0, "p": later}]
    assert (other["text"], other["p"]) == ("The other stays silent", 0.7)


def test_other_heads_in_words() -> None:
    classes = HeadMeaning("activity", "classification", ["standing_up", "laying"])
    assert lines(classes, [0.7, 0.3])[0] == {
        "head": "activity",
        "text": "Activity: standing up",
        "p": 0.7,
        "why": "else laying 30 %",
        "steps": [],
    }
    ahead = HeadMeaning("next_label", "classification", ["a", "b"], [(0, 2), (0, 2)])
    assert lines(ahead, [0.2, 0.8])[0]["text"] == "Next label in 2 s: b"
    hazard = HeadMeaning("next_word", "hazard", [], [(0, 0.5), (0.5, 1)])
    assert cumulative([0.5, 0.5]) == [0.5, 0.75]
    (line,) = lines(hazard, [0.5, 0.5])
    assert (line["text"], line["p"], len(line["steps"])) == ("Next word within 1 s", 0.75, 2)
    labels, horizons_s = ["x_200ms", "y_200ms", "x_1000ms", "y_1000ms"], [(0, 0.2)] * 2 + [(0.2, 1)] * 2
    motion = HeadMeaning("motion", "regression", labels, horizons_s, "g")
    assert lines(motion, [1.0, 2.0, 3.0, 4.0])[0]["text"] == "Motion in 1 s: x 3.00, y 4.00"
    level = HeadMeaning("level", "regression", [], [], "dB")
    assert lines(level, [-12.345])[0]["text"] == "Level: -12.35"
    assert lines(level, [None])[0]["text"] == "Level: no prediction"
    assert lines(HeadMeaning("x", ""), [1.0] * 9)[0]["text"] == "X: 1.00, 1.00, 1.00 and 6 more"


def test_outputs_with_one_horizon_are_different_targets() -> None:
    assert [(t.name, t.outputs) for t in SPEECH.targets()] == [("self", [0, 2]), ("other", [1, 3])]
    unnamed = HeadMeaning("m", "regression", [], [(0, 1), (0, 1)])
    assert [t.name for t in unnamed.targets()] == ["m 1", "m 2"]


@given(
    st.builds(
        HeadMeaning,
        st.text(max_size=9),
        st.sampled_from(["activity_projection", "hazard", "classification", "regression", "other"]),
        st.lists(st.text(max_size=9), max_size=6),
        st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.floats(-1e9, 1e9)), max_size=6),
        st.text(max_size=5),
        st.floats(-1e9, 1e9),
    ),
    st.lists(st.none() | st.floats(-1e30, 1e30), max_size=6),
)
def test_every_head_from_the_bus_is_said(meaning: HeadMeaning, values: list[float | None]) -> None:
    for line in lines(meaning, values):
        assert set(line) == {"head", "text", "p", "why", "steps"}
        json.dumps(line)


# --- time


def test_times_and_ticks_count_from_the_sessions_start() -> None:
    live = well()
    assert live.snapshot(T0)["ticks"] == 0
    for i in range(1, 101):
        live.observe(predicted(T0 + i * TICK, {}))
    # an engine that was restarted counts its own ticks anew
    live.observe(engine(T0 + 100 * TICK, counts={"ticks": 3}))
    snap = live.snapshot(T0 + 100 * TICK)
    assert (snap["ticks"], snap["seconds"]) == (100, 4.0)


def test_the_end_names_the_recording_or_what_failed() -> None:
    live = well()
    assert live.ending() == {"recording": "", "why": ""}
    live.observe(status("recorder", T0, "ready", detail={"path": "/tmp/a b.mcap"}))
    live.observe(status("engine", T0, "failed", reason="was killed"))
    assert live.ending() == {"recording": "/tmp/a b.mcap", "why": "engine: was killed"}
