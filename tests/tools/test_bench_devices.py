"""`python -m tools.bench devices`: which sessions it makes, whose CPU time it counts, and a short run of it all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from devices import needs_pulse
from recogniser import needs_recogniser

from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.stream_table import for_model, stream_table
from stream_mmrnn.core.types import ModalitySpec
from stream_mmrnn.live.managed_process import process_context
from tools.bench import devices

TAKES = [ModalitySpec("audio", 81), ModalitySpec("turn_end", 1)]


def test_each_session_has_more_streams_than_the_one_before() -> None:
    found = []
    for streams in devices.SESSIONS.values():
        settings = for_model(devices.settings_of(streams, None, "http://127.0.0.1:1/c"), TAKES)
        found.append({row.name: row.source for row in stream_table(settings).values() if row.source != "none"})
    audio = {"audio": "microphone:pulse"}
    turn_end = {**audio, "turn_end": "from:audio/turn_end"}
    words = {**turn_end, "text": "from:audio/speech"}
    assert found == [audio, turn_end, words, {**words, "vision": "camera:http://127.0.0.1:1/c"}]


def test_only_the_session_is_counted() -> None:
    settings = for_model(devices.settings_of(devices.SESSIONS["with_turn_end"], None, ""), TAKES)
    cpu = {"bench": 0.01, "engine": 0.1, "microphon": 0.2, "turn_end": 0.04, "dashboard": 0.05}
    others = {"pulseaudio": 1.0, "paplay": 1.0, "reader": 1.0, "python": 1.0}
    assert devices.cores_of(settings, cpu | others) == pytest.approx(0.4)
    assert devices.cores_of(settings, {}) is None


def test_a_ratio_is_the_median_of_those_of_the_rounds() -> None:
    rows = [
        {
            "modalities": name,
            "cores": cores,
            "other_cpu": 0.0,
            "to_prediction_ms": {"count": 9, "p50": p50, "p99": p50},
            "audio_to_prediction_ms": {"count": 0, "p50": 0.0, "p99": 0.0},
        }
        for name in devices.SESSIONS
        for each in [(2.0, 2.0, 12.0) if name == "with_camera" else (1.0, 2.0, 4.0)]
        for cores, p50 in zip((0.5, 0.9, 0.6), each, strict=True)
    ]
    found = devices._ratios(rows)
    assert found["with_camera_to_prediction_p50_over_microphone"]["value"] == 2.0
    assert (found["with_camera_cores"]["value"], found["with_camera_cores"]["held"]) == (0.6, True)
    assert found["with_words_to_prediction_p50_over_microphone"]["value"] == 1.0
    assert found["with_camera_audio_to_prediction_p50_ms"]["value"] is None
    assert "microphone_to_prediction_p50_over_microphone" not in found


def test_a_folder_without_the_clips_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dialogue\.wav; give the folder that holds"):
        devices.run(data=tmp_path)


@needs_pulse
@needs_recogniser
@pytest.mark.process
@pytest.mark.slow
@pytest.mark.devices
@pytest.mark.shared_data
def test_sessions_hear_and_see_the_virtual_devices(clips: Path) -> None:
    process_context()  # as an earlier session of this process: its fork server knows no virtual microphone
    before = dict(os.environ)
    document, _ = devices.run(data=clips.parent, duration_s=5.0, rounds=1)
    assert dict(os.environ) == before
    assert [row["modalities"] for row in document["rows"]] == list(devices.SESSIONS)
    for row in document["rows"]:
        assert row["predictions"] > 25
        assert row["to_prediction_ms"]["count"] > 0
        # on a busy machine, or with a picture after each block of sound, it may close none
        closed_by_sound = row["audio_to_prediction_ms"]["count"]
        assert row["to_prediction_ms"]["count"] >= closed_by_sound
        assert row["streams"]["audio"]["delivered"] > 0
        assert row["cores"] is None or row["cores"] > 0
    last = document["rows"][-1]["streams"]
    assert {"vision", "audio", "text", "turn_end"} <= last.keys()
    assert last["vision"]["delivered"] > 10
