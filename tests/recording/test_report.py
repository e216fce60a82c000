from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from small_recordings import BEGIN, envelopes, extents, write

from stream_mmrnn.core import topics
from stream_mmrnn.recording.append_file import part
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.pieces import MetadataRecord, pieces
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.report import info, verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "a.mcap", envelopes(0, 40))


def test_a_whole_file_is_reported_whole(whole: Path) -> None:
    result = verify(whole)
    assert result["whole"]
    assert (result["state"], result["why"], result["holes"]) == ("whole", "", [])
    assert result["messages"] == {"clock": 40, "feature/audio": 40, "raw/audio": 40, "session": 1}
    assert result["seconds"] == 1.95
    assert result["ends"]["how"] == "clean"
    assert result["adds_up"]
    assert result["parts"] == []


def test_the_contents_of_a_whole_file(whole: Path) -> None:
    assert info(whole) == {
        "recording": str(whole),
        "bytes": whole.stat().st_size,
        "session": "live",
        "seconds": 1.95,
        "started_unix_ns": Recording(whole).started_unix_ns,
        "model": {"name": "", "sha256": ""},
        "raw": True,
        "encoders": {"audio": {"encoders": ("audio",), "why": "its kind's own"}},
        "wall_steps": [],
        "channels": {
            "clock": {"messages": 40, "origin": "", "gaps": 0, "rate_hz": 20.51},
            "feature/audio": {"messages": 40, "origin": "mel@2", "gaps": 0, "rate_hz": 20.51},
            "raw/audio": {"messages": 40, "origin": "microphone", "gaps": 0, "rate_hz": 20.51},
            "session": {"messages": 1, "origin": "", "gaps": 0, "rate_hz": 0.51},
        },
        "labels_beside": None,
        "lost": {},
        "dropped": {},
        "ended": "clean",
        "whole": True,
        "damage": "",
    }


def test_gaps_are_counted_between_messages_only(tmp_path: Path) -> None:
    """What is missing before the first message of a stream is no gap: the recorder may have begun later."""
    messages = [e for e in envelopes(5, 20) if e.seq not in (9, 10, 17)]
    channels = info(write(tmp_path / "a.mcap", messages))["channels"]
    assert {topic: channel["gaps"] for topic, channel in channels.items()} == {
        "clock": 3,
        "feature/audio": 3,
        "raw/audio": 3,
    }


def test_each_damaged_chunk_costs_info_only_its_messages(whole: Path, tmp_path: Path) -> None:
    """`info` counts what `verify` counts, and says the same about the damage."""
    content, chunks = whole.read_bytes(), extents(whole)
    path = tmp_path / "a.mcap"
    for begin, end, lost in chunks:
        damaged = bytearray(content)
        damaged[(begin + end) // 2] ^= 0x55
        path.write_bytes(damaged)
        found, checked = info(path), verify(path)
        counts = {topic: channel["messages"] for topic, channel in found["channels"].items()}
        assert counts == checked["messages"]
        assert Counter(counts) + Counter(topic for topic, _, _ in lost) == Counter(verify(whole)["messages"])
        assert (found["whole"], found["damage"]) == (False, checked["why"])
        assert f"is damaged at byte {begin} of" in found["damage"]


def test_a_file_that_was_cut_off_is_not_finished(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    path.write_bytes(whole.read_bytes()[: extents(whole)[3][1]])
    found = info(path)
    assert (found["whole"], found["ended"], found["session"]) == (False, "not finished", "live")
    assert f"was cut off at byte {path.stat().st_size}" in found["damage"]


def test_the_contents_are_known_if_the_head_is_lost(whole: Path, tmp_path: Path) -> None:
    content = bytearray(whole.read_bytes())
    content[next(p for p in pieces(whole) if isinstance(p, MetadataRecord)).at + 60] ^= 1
    path = tmp_path / "a.mcap"
    path.write_bytes(content)
    found = info(path)
    assert not found["whole"]
    for key in ("session", "seconds", "started_unix_ns", "raw", "channels", "ended"):
        assert found[key] == info(whole)[key]


def test_a_later_part_is_no_damage(tmp_path: Path) -> None:
    write(tmp_path / "a.mcap", envelopes(0, 20))
    later = write(part(tmp_path / "a.mcap", 1), envelopes(26, 20), number=2)
    assert verify(later)["state"] == "partial"
    assert (info(later)["whole"], info(later)["damage"]) == (True, "")


@pytest.mark.parametrize("data", [b"\x09\x01", b"\xff\xff\xff"])
def test_a_message_that_no_replay_could_decode_is_damage(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every checksum matches (another program's file)."""
    monkeypatch.setattr("stream_mmrnn.recording.recorder.encoded", lambda *_: data)
    path = write(tmp_path / "a.mcap", [e for e in envelopes(0, 4) if e.topic == topics.CLOCK])
    replayed = Recording(path)
    assert list(replayed.envelopes()) == []
    assert "damaged record" in replayed.damage
    assert (verify(path)["state"], verify(path)["why"]) == ("damaged", replayed.damage)
    assert info(path)["damage"] == replayed.damage


def test_steps_of_the_wall_clock_are_listed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.mcap", "live", {})
    recorder.note_wall_step(BEGIN, -7)
    recorder.close({"ended": "clean"})
    assert info(tmp_path / "a.mcap")["wall_steps"] == [{"at_ns": BEGIN, "step_ns": -7}]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")
def test_a_file_whose_recorder_still_runs_is_being_recorded(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    recorder = Recorder(path, "live", {"config": "{}", "raw": "true", "part": "1"})
    for e in envelopes(0, 30):
        recorder.write(e)
        recorder.flush_due(e.publish_ns)
    recorder.sync()
    found = info(path)
    assert (found["ended"], found["whole"], found["damage"]) == ("being recorded", True, "")
    assert found["channels"]["raw/audio"]["messages"] > 0
    checked = verify(path)
    assert (checked["state"], checked["whole"]) == ("being recorded", False)
    assert "a.mcap is being recorded" in checked["why"]
    # a copy of it, and the file itself once its recorder is gone, are cut off
    copy = tmp_path / "copy.mcap"
    copy.write_bytes(path.read_bytes())
    assert verify(copy)["state"] == "cut off"
    recorder._disk.close()
    assert verify(path)["state"] == "cut off"
