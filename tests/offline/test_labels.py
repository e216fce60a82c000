"""Labels given to recordings afterwards: where they are read, what is refused, what is written for other programs."""

from __future__ import annotations

import errno
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from labelled import GIVEN, NOTES, ZERO, S, notes, tiers_of
from small_recordings import BEGIN, envelopes, keys, write

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.offline.labels.attach import LabelOptions, attach
from stream_mmrnn.offline.labels.export import to_labels
from stream_mmrnn.offline.labels.while_replaying import ReplayLabels
from stream_mmrnn.recording import label_file
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.report import info, verify
from stream_mmrnn.training.own_recipe import recipe_for
from stream_mmrnn.training.tasks.recordings import TypedEvents

END = BEGIN + 199 * 50_000_000
"""Of ten seconds of `small_recordings`."""


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    return write(tmp_path / "talk.mcap", envelopes(0, 200), offset_ns=1_700_000_000 * S - BEGIN)


def test_labels_are_beside_the_recording_which_stays_as_it_is(talk: Path, tmp_path: Path) -> None:
    before = talk.read_bytes()
    result = attach(talk, [notes(tmp_path)], LabelOptions())
    assert talk.read_bytes() == before
    assert tiers_of(talk) == GIVEN
    assert result["tiers"]["posture"]["walking"] == {"count": 1, "seconds": 2.5}
    assert result["tiers"]["gaze"]["left"]["seconds"] == pytest.approx((END - ZERO) / S - 1, abs=1e-3)
    about = info(talk)["labels_beside"]
    assert about["tiers"] == {"posture": 2, "gaze": 1}
    assert about["from"] == ["notes.csv"]
    assert verify(talk)["state"] == "whole"
    assert tiers_of(shutil.copy(talk, tmp_path / "alone.mcap")) == {}
    assert info(tmp_path / "alone.mcap")["labels_beside"] is None


@given(st.lists(st.tuples(st.integers(ZERO, END + S), st.sampled_from("abc")), max_size=30), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_labels_are_read_in_their_place(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, str]], everything: bool
) -> None:
    """The other messages are as they were, in their order; every label is after what was published before it."""
    path = tmp_path_factory.mktemp("merge") / "talk.mcap"
    write(path, envelopes(0, 200))
    alone = keys(path)
    recording = Recording(path)
    label_file.write(path, label_file.made_for(recording.metadata, [], {"x": sorted(changes)}), False)
    assert [key for key in keys(path) if key[0] != topics.LABEL] == alone
    wanted = None if everything else {topics.LABEL, "feature/audio"}
    read = list(Recording(path).envelopes(wanted))
    times = [e.publish_ns for e in read]
    assert times == sorted(times)
    found = [(e.event_ns, bytes(e.payload).decode()) for e in read if e.topic == topics.LABEL]
    assert found == sorted(changes)


def typed_in(path: Path, *labels: tuple[float, str]) -> Path:
    made = envelopes(0, 200)
    for seq, (at_s, name) in enumerate(labels):
        at_ns = ZERO + round(at_s * S)
        made.append(Envelope(topics.LABEL, "live", seq, at_ns, at_ns, at_ns, name.encode(), "stdin"))
    return write(path, sorted(made, key=lambda e: e.publish_ns))


def test_a_tier_takes_the_place_of_typed_labels_and_others_stay(tmp_path: Path) -> None:
    path = typed_in(tmp_path / "talk.mcap", (1.0, "a"), (3.0, "b"))
    attach(path, [notes(tmp_path)], LabelOptions())
    assert tiers_of(path) == {"label": [(1.0, "a"), (3.0, "b")], **GIVEN}
    result = attach(path, [notes(tmp_path, "begin_s,label\n2,c\n")], LabelOptions(), force=True)
    assert result["replaced"] == {"label": 2}
    assert tiers_of(path) == {"label": [(2.0, "c")]}
    label_file.place_of(path).unlink()
    assert tiers_of(path) == {"label": [(1.0, "a"), (3.0, "b")]}


def test_a_new_recording_has_them_inside(tmp_path: Path) -> None:
    path, out = typed_in(tmp_path / "talk.mcap", (1.0, "a"), (3.0, "b")), tmp_path / "new" / "labelled.mcap"
    text = NOTES.replace("posture", "label")
    attach(path, [notes(tmp_path, text)], LabelOptions(), out)
    assert not label_file.place_of(path).exists()
    assert tiers_of(out) == {"label": GIVEN["posture"], "gaze": GIVEN["gaze"]}
    assert tiers_of(path) == {"label": [(1.0, "a"), (3.0, "b")]}
    assert verify(out)["state"] == "whole"
    others = [key for key in keys(path) if key[0] != topics.LABEL]
    assert [key for key in keys(out) if key[0] != topics.LABEL] == others
    times = [[(e.topic, e.event_ns, e.publish_ns, e.origin) for e in Recording(p).envelopes()] for p in (path, out)]
    assert [t for t in times[0] if t[0] != topics.LABEL] == [t for t in times[1] if t[0] != topics.LABEL]
    with pytest.raises(FileError, match="cannot be made: File exists"):
        attach(path, [notes(tmp_path)], LabelOptions(), out)
    assert verify(out)["state"] == "whole"
    cut = tmp_path / "cut.mcap"
    cut.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(FileError, match="repair makes a whole one of it"):
        attach(cut, [notes(tmp_path)], LabelOptions(), tmp_path / "other.mcap")
    assert not (tmp_path / "other.mcap").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            "12,13,a",
            r"line 2 \('a'\) begins at 12.000 s and ends at 13.000 s, outside of the recording, which is from 0.000",
        ),
        ("12,13,a", r"which is from 0.000 s to 9.951 s; nothing was written: are the labels of this recording, and of"),
        ("12,,a", r"line 2 \('a'\) begins at 12.000 s, outside of the recording"),
        (
            "1,2,a\n-0.5,1,b",
            r"line 3 \('b'\) begins at -0.500 s; expected times from 0 on, so correct it, or move all by",
        ),
        ("3,2,a", r"line 2 \('a'\) begins at 3.000 s and ends at 2.000 s; expected an end after the begin, so correct"),
        ("2,2,a", r"line 2 \('a'\) begins at 2.000 s and ends at 2.000 s; expected an end after the begin"),
        (
            "1,3,a\n2,4,b",
            r"line 2 \('a', from 1.000 s to 3.000 s\) overlaps line 3 \('b', from 2.000 s\); expected one",
        ),
        (
            "1,3,a\n2,4,b",
            r"expected one label at a time in a tier, so correct one, or give each label a tier of its own",
        ),
        ("1,,a\n1,,b", r"line 2 \('a', from 1.000 s\) overlaps line 3 \('b', from 1.000 s\)"),
        ("4,6,a\n1,5,b", r"line 3 \('b', from 1.000 s to 5.000 s\) overlaps line 2 \('a', from 4.000 s\)"),
    ],
)
def test_wrong_times_are_one_sentence_and_nothing_is_written(talk: Path, tmp_path: Path, rows: str, words: str) -> None:
    attach(talk, [notes(tmp_path)], LabelOptions())
    path = notes(tmp_path, f"begin_s,end_s,label\n{rows}\n", "wrong.csv")
    with pytest.raises(FileError, match=words):
        attach(talk, [path], LabelOptions(), force=True)
    assert tiers_of(talk) == GIVEN
    with pytest.raises(FileError, match=words):
        attach(talk, [path], LabelOptions(), tmp_path / "new.mcap")
    assert not (tmp_path / "new.mcap").exists()


def test_what_is_partly_outside_is_cut_and_counted(talk: Path, tmp_path: Path) -> None:
    result = attach(talk, [notes(tmp_path, "begin_s,end_s,label\n0,1,a\n8,20,b\n")], LabelOptions())
    assert result["clipped"] == 1
    assert tiers_of(talk) == {"label": [(0.0, "a"), (1.0, "none"), (8.0, "b")]}
    assert result["tiers"]["label"]["b"]["seconds"] == pytest.approx(1.951)


def test_times_of_the_wall_clock(talk: Path, tmp_path: Path) -> None:
    start = datetime.fromtimestamp(1_700_000_000, UTC) - timedelta(milliseconds=1)
    local = [(start + timedelta(seconds=s)).replace(tzinfo=None) + timedelta(hours=1) for s in (-1, 2, 3)]
    text = f"begin_s,end_s,label\n{local[0]},{local[1]},a\n{start.timestamp() + 2:.6f},{local[2]},b\n"
    options = LabelOptions(clock="wall", timezone="Europe/Berlin")
    result = attach(talk, [notes(tmp_path, text)], options)
    assert result["clipped"] == 1
    assert tiers_of(talk) == {"label": [(0.0, "a"), (2.0, "b"), (3.0, "none")]}
    with pytest.raises(
        FileError, match=r"begins at 2023-11-14T23:13:18.*, outside of the recording, which is from 2023-"
    ):
        attach(talk, [notes(tmp_path, text)], LabelOptions(clock="wall"), force=True)
    with pytest.raises(UsageError, match="--timezone 'Mars' is not known; use a name such as Europe/Berlin"):
        attach(talk, [notes(tmp_path, text)], LabelOptions(timezone="Mars"), force=True)
    to_labels([talk], tmp_path / "back.csv", clock="wall")
    attach(talk, [tmp_path / "back.csv"], LabelOptions(clock="wall"), force=True)
    assert tiers_of(talk) == {"label": [(0.0, "a"), (2.0, "b"), (3.0, "none")]}
    # a log that began before the session: the label that is true when it begins counts from there
    log = "".join(f"{start + timedelta(seconds=s)},{name}\n" for s, name in ((-9, "x"), (-2, "y"), (4, "z")))
    early = notes(tmp_path, f"begin_s,label\n{log}", "early.csv")
    with pytest.raises(FileError, match=r"line 2 \('x'\) begins at .*, outside of the recording"):
        attach(talk, [early], LabelOptions(clock="wall"), force=True)
    early = notes(tmp_path, "begin_s,label\n" + log.split("\n", 1)[1])
    assert attach(talk, [early], LabelOptions(clock="wall"), force=True)["clipped"] == 1
    assert tiers_of(talk) == {"label": [(0.0, "y"), (4.0, "z")]}
    shifted = notes(tmp_path, "begin_s,end_s,label\n-1,1,a\n")
    with pytest.raises(FileError, match="move all by --shift"):
        attach(talk, [shifted], LabelOptions(shift_ns=S // 2), force=True)
    attach(talk, [shifted], LabelOptions(shift_ns=S), force=True)
    assert tiers_of(talk) == {"label": [(0.0, "a"), (2.0, "none")]}
    attach(talk, [notes(tmp_path, "begin_s,label\n1,a\n")], LabelOptions(shift_ns=S // 2), force=True)
    assert tiers_of(talk) == {"label": [(1.5, "a")]}


def test_a_wall_clock_that_was_set_is_named(tmp_path: Path) -> None:
    path = tmp_path / "talk.mcap"
    recorder = Recorder(path, "live", {"config": "{}", "started_ns": str(BEGIN)}, wall_offset_ns=10**18)
    for e in envelopes(0, 100):
        recorder.write(e)
    recorder.note_wall_step(ZERO + 2 * S, -3 * S)
    recorder.close({"ended": "clean"})
    text = f"begin_s,label\n{(10**18 + ZERO) / S + 1:.6f},a\n"
    result = attach(path, [notes(tmp_path, text)], LabelOptions(clock="wall"))
    assert result["notes"] == [
        "the wall clock was set by -3.000 s at 2.0 s: times are those of the clock as it was before"
    ]
    assert tiers_of(path)["label"][0][0] == pytest.approx(1, abs=1e-5)


def test_speakers_that_overlap_get_tiers(talk: Path, tmp_path: Path) -> None:
    lines = [("1.00", "1.51", "anna b"), ("2.00", "1.00", "bert"), ("2.99", "1", "anna b"), ("0", "1.001", "bert")]
    text = "".join(f"SPEAKER talk 1 {b} {d} <NA> <NA> {n.replace(' ', '_')} <NA> <NA>\n" for b, d, n in lines)
    path = notes(tmp_path, text, "talk.rttm")
    with pytest.raises(FileError, match=r"line 1 .* overlaps .*line 2 .* with --apart"):
        attach(talk, [path], LabelOptions())
    result = attach(talk, [path], LabelOptions(apart=True, fill="silent"))
    assert tiers_of(talk) == {
        "anna_b": [(0.0, "silent"), (1.0, "anna_b"), (2.51, "silent"), (2.99, "anna_b"), (3.99, "silent")],
        "bert": [(0.0, "bert"), (1.001, "silent"), (2.0, "bert"), (3.0, "silent")],
    }
    assert result["notes"] == ["talk.rttm: line 4 begins before line 3; the labels were sorted by time"]
    recipe = recipe_for([talk], "own")
    assert {h.name: list(h.labels) for h in recipe.heads} == {
        "anna_b": ["anna_b", "silent"],
        "bert": ["bert", "silent"],
    }
    assert recipe.data.options["targets"] == {"anna_b": "label/anna_b", "bert": "label/bert"}
    point = notes(tmp_path, "begin_s,label\n1,a\n")
    with pytest.raises(FileError, match="line 2 has no end, which --apart needs; give one, or leave --apart out"):
        attach(talk, [point], LabelOptions(apart=True), force=True)
    # rounding to hundredths of a second is no overlap
    near = notes(tmp_path, "begin_s,end_s,label\n1,2.01,a\n2,3,b\n")
    attach(talk, [near], LabelOptions(), force=True)
    assert tiers_of(talk) == {"label": [(1.0, "a"), (2.0, "b"), (3.0, "none")]}


def test_tiers_are_chosen_and_named(talk: Path, tmp_path: Path) -> None:
    path = notes(tmp_path, NOTES.replace("gaze", "P1 Gaze (left)"))
    result = attach(talk, [path], LabelOptions())
    assert list(result["tiers"]) == ["posture", "P1_Gaze_left"]
    assert result["notes"] == ["notes.csv: the tier 'P1 Gaze (left)' is called P1_Gaze_left here"]
    attach(talk, [path], LabelOptions(tiers={"posture": "label"}), force=True)
    assert tiers_of(talk) == {"label": GIVEN["posture"]}
    for tiers, words in (
        ({"mood": ""}, "has no tier 'mood'; it has 'posture', 'P1 Gaze .left.'"),
        ({"posture": "a b"}, "--tier names 'a b': expected 1 to 32 letters"),
        ({"posture": "x", "P1 Gaze (left)": "x"}, "two tiers of .* would have one name; give them others with --tier"),
    ):
        with pytest.raises(UsageError, match=words):
            attach(talk, [path], LabelOptions(tiers=tiers), force=True)
    with pytest.raises(FileError, match="there is no label to give: every one is empty"):
        attach(talk, [notes(tmp_path, "begin_s,label\n")], LabelOptions(), force=True)
    assert tiers_of(talk) == {"label": GIVEN["posture"]}


def test_labels_of_another_recording_are_refused_where_labels_are_needed(talk: Path, tmp_path: Path) -> None:
    attach(talk, [notes(tmp_path)], LabelOptions())
    other = write(tmp_path / "other.mcap", envelopes(0, 20))
    shutil.copy(label_file.place_of(talk), label_file.place_of(other))
    with pytest.raises(FileError, match="holds labels of another recording, of the session 'live'; move it away, or"):
        TypedEvents.of(Recording(other))
    assert list(Recording(other).envelopes({"feature/audio"}))  # what needs no labels goes on
    assert "holds labels of another recording" in info(other)["labels_beside"]["damage"]
    with pytest.raises(FileError, match="is there already; use --force to give the recording other labels"):
        attach(other, [notes(tmp_path)], LabelOptions())
    attach(other, [notes(tmp_path, "begin_s,label\n0.5,a\n")], LabelOptions(), force=True)
    assert tiers_of(other) == {"label": [(0.5, "a")]}


@pytest.mark.slow
@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_beside_is_read_or_is_one_sentence(talk: Path, tmp_path: Path, data: st.DataObject) -> None:
    place = label_file.place_of(talk)
    if not (tmp_path / "whole").exists():
        attach(talk, [notes(tmp_path)], LabelOptions())
        place.rename(tmp_path / "whole")
    content = bytearray((tmp_path / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 60))] = data.draw(st.binary(max_size=8))
    place.write_bytes(bytes(content))
    refused, tiers = "", {}
    try:
        tiers = TypedEvents.of(Recording(talk)).tiers
    except FileError as e:
        refused = str(e)
    assert not refused or str(place) in refused
    assert all(isinstance(at_ns, int) for changes in tiers.values() for at_ns, _ in changes)
    beside = info(talk)["labels_beside"]
    assert beside["damage"] == refused


def labels_of(path: Path) -> ReplayLabels:
    recording = Recording(path)
    return ReplayLabels(recording, TypedEvents.of(recording).labels)


def test_labels_that_are_given_while_it_is_replayed(talk: Path, tmp_path: Path) -> None:
    before = talk.read_bytes()
    attach(talk, [notes(tmp_path)], LabelOptions())
    labels = labels_of(talk)
    assert labels.names == []
    assert labels.undo() == "nothing was labelled in this replay"
    for at_s, name in ((2, "walking"), (1, "sitting"), (5, "none"), (5.01, "lying"), (3, " walking ")):
        assert labels.mark(ZERO + int(at_s * S), name) == ""
    for wrong in ("", "  ", "x" * 201):
        assert "1 to 200 bytes" in labels.mark(ZERO, wrong)
    expected = [(1.0, "sitting"), (2.0, "walking"), (3.0, "walking"), (5.01, "lying")]
    assert tiers_of(talk) == {**GIVEN, "label": expected}, "other tiers stay"
    assert labels.names == ["lying", "sitting", "walking"]
    assert labels.undo() == ""
    assert labels.undo() == ""
    assert tiers_of(talk)["label"] == [(1.0, "sitting"), (2.0, "walking"), (5.0, "none")]
    assert talk.read_bytes() == before
    assert info(talk)["labels_beside"]["from"] == ["notes.csv", "replay"]
    # another look goes on from there
    again = labels_of(talk)
    assert again.changes == labels.changes
    assert again.undo() == "nothing was labelled in this replay"


def test_a_place_that_cannot_be_written_is_one_sentence(talk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    labels = labels_of(talk)
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert "cannot be written: Read-only file system" in labels.mark(ZERO, "a")


def test_no_more_tiers_are_written_than_are_read(talk: Path) -> None:
    full: dict[str, list[label_file.Change]] = {f"t{i}": [(ZERO, "a")] for i in range(label_file.MAX_TIERS)}
    label_file.write(talk, label_file.made_for(Recording(talk).metadata, ["x"], full), force=True)
    labels = labels_of(talk)
    assert "would have 65 tiers; expected at most 64" in labels.mark(ZERO, "a")
    assert len(tiers_of(talk)) == label_file.MAX_TIERS


def test_labels_that_cannot_be_written_leave_what_was_there(talk: Path) -> None:
    labels = labels_of(talk)
    assert labels.mark(ZERO, "a") == ""
    label_file.place_of(talk).write_text("{")
    assert "holds no labels" in labels.mark(ZERO + S, "b")
    assert label_file.place_of(talk).read_text() == "{"
    assert [name for _, name in labels.changes] == ["a"]
