from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.reader import NonSeekingReader, make_reader
from msgspec.structs import replace
from small_recordings import BEGIN, Key, envelopes, extents, keys, write

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError, RecordingError
from stream_mmrnn.recording import label_file
from stream_mmrnn.recording.append_file import later_parts, part
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.message_counts import MISSING, MessageCounts
from stream_mmrnn.recording.pieces import BEGINNING, MetadataRecord, pieces
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.repair import repair
from stream_mmrnn.recording.report import summarise, verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "a.mcap", envelopes(0, 40))


def read_by_a_stranger(path: Path) -> int:
    """The number of messages that the `mcap` package reads to the file's end, with checksums verified."""
    with path.open("rb") as file:
        seeking = sum(1 for _ in make_reader(file, validate_crcs=True).iter_messages())
    with path.open("rb") as file:
        reader = NonSeekingReader(file, validate_crcs=True)
        assert sum(1 for _ in reader.iter_messages(log_time_order=False)) == seeking
    return seeking


def test_a_whole_file_is_copied(whole: Path, tmp_path: Path) -> None:
    before = whole.read_bytes()
    done = repair(whole, tmp_path / "out.mcap")
    assert done["was"] == "whole"
    assert (tmp_path / "out.mcap").read_bytes() == before == whole.read_bytes()


def test_repair_refuses_to_overwrite(whole: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_bytes(b"precious")
    before = whole.read_bytes()
    for out in (there, whole):
        with pytest.raises(FileError, match="cannot be made: File exists"):
            repair(whole, out)
    assert there.read_bytes() == b"precious"
    assert whole.read_bytes() == before


def test_files_that_are_not_recordings_are_refused(tmp_path: Path) -> None:
    from mcap.writer import Writer

    with (tmp_path / "other.mcap").open("wb") as f:
        writer = Writer(f)
        writer.start()
        writer.finish()
    (tmp_path / "empty.mcap").write_bytes(b"")
    (tmp_path / "text.mcap").write_bytes(b"some text that is long enough " * 9)
    (tmp_path / "folder.mcap").mkdir()
    for name in ("other", "empty", "text", "folder", "missing"):
        with pytest.raises(FileError):
            verify(tmp_path / f"{name}.mcap")
        with pytest.raises(FileError):
            repair(tmp_path / f"{name}.mcap", tmp_path / "out.mcap")
        assert not (tmp_path / "out.mcap").exists()


@pytest.mark.slow
def test_a_cut_at_every_byte_of_the_tail(tmp_path: Path) -> None:
    """Reading never raises and returns all messages of all whole chunks; `verify` and `repair` agree."""
    whole = write(tmp_path / "whole.mcap", [e for e in envelopes(0, 12) if e.topic != "raw/audio"])
    content, chunks = whole.read_bytes(), extents(whole)
    head_end = next(p for p in pieces(whole) if isinstance(p, MetadataRecord)).at
    path, out = tmp_path / "cut.mcap", tmp_path / "out.mcap"
    repaired: set[tuple[int, bool]] = set()
    for cut in range(1, len(content)):
        path.write_bytes(content[:cut])
        expected = [key for _, end, messages in chunks if end <= cut for key in messages]
        result = verify(path)
        assert result["state"] == "cut off", (cut, result)
        assert sum(result["messages"].values()) == len(expected), cut
        assert result["adds_up"], cut
        assert result["ends"]["at_byte"] <= cut
        try:
            assert keys(path) == expected, cut
        except FileError:
            assert not expected, cut
        # many cuts leave the same pieces
        sound = (len(expected), bool(result["ends"]["how"] == "clean"))
        if sound in repaired and cut % 211:
            continue
        out.unlink(missing_ok=True)
        if not expected:
            assert cut < head_end or not result["messages"]
            with pytest.raises(RecordingError, match="holds no message that could be saved"):
                repair(path, out)
            assert not out.exists()
            continue
        repaired.add(sound)
        done = repair(path, out)
        assert keys(out) == expected
        assert read_by_a_stranger(out) == len(expected)
        assert path.read_bytes() == content[:cut]
        assert done["result"]["state"] == ("whole" if result["ends"]["how"] == "clean" else "partial")
        assert Recording(out).metadata["session"] == "live"
    assert len(repaired) == len(chunks) + 1


def check_saved(path: Path, out: Path, must: list[Key], written: list[Key]) -> None:
    """Check that the repaired file holds exactly the intact messages, in order."""
    result = verify(path)
    done = repair(path, out)
    saved = keys(out)
    assert not Counter(must) - Counter(saved), result
    order = iter(written)
    assert all(key in order for key in saved), "an order of its own"
    assert read_by_a_stranger(out) == len(saved)
    assert done["result"]["state"] in ("whole", "partial")
    end = MessageCounts.of({**Recording(out).end, **_end(out)})
    assert end.off == {}
    assert end.recorded == dict(Counter(topic for topic, _, _ in saved))


def _end(path: Path) -> dict[str, str]:
    recording = Recording(path)
    for _ in recording.batches():
        pass
    return recording.end


@pytest.mark.slow
@settings(max_examples=120)
@given(data=st.data())
def test_damage_costs_only_the_chunks_that_it_hits(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content, chunks = bytearray(whole.read_bytes()), extents(whole)
    hits: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        size = data.draw(st.sampled_from([1, 1, 1, 8, 200, 4096]))
        size = min(size, len(content) - at)
        how = data.draw(st.sampled_from(["flip", "zero", "random"]))
        if how == "flip":
            content[at] ^= data.draw(st.integers(1, 255))
            size = 1
        else:
            content[at : at + size] = bytes(size) if how == "zero" else np.random.default_rng(at).bytes(size)
        hits.append((at, at + size))
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "damaged.mcap"
    path.write_bytes(content)
    must = [k for at, end, ks in chunks if not any(a < end and at < b for a, b in hits) for k in ks]
    try:
        damaged = summarise(path).file
    except FileError:
        # every place that identifies the program was hit
        assert any(a < len(BEGINNING) for a, _ in hits)
        return
    if not damaged.names:
        return  # every place that defines the channels was hit
    named = {topic for topic, _ in damaged.names.values()}
    if named != {"clock", "session", "raw/audio", "feature/audio"}:
        must = [k for k in must if k[0] in named]
    check_saved(path, folder / "out.mcap", must, keys(whole))


@pytest.mark.slow
def test_a_chunk_with_a_wrong_length_costs_no_other(whole: Path, tmp_path: Path) -> None:
    content, chunks = bytearray(whole.read_bytes()), extents(whole)
    for number, (begin, _, _) in enumerate(chunks):
        for bit in range(8):
            changed = bytearray(content)
            changed[begin + 2] ^= 1 << bit  # of its length
            path = tmp_path / f"{number}.{bit}.mcap"
            path.write_bytes(changed)
            must = [k for n, (_, _, ks) in enumerate(chunks) if n != number for k in ks]
            check_saved(path, path.with_suffix(".out.mcap"), must, keys(whole))


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_lost_or_extra_bytes_cost_only_their_chunk(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content, chunks = whole.read_bytes(), extents(whole)
    # after the first periodic metadata, so that the channels are known
    begin = chunks[1][0]
    at = data.draw(st.integers(begin, len(content) - 1))
    end = data.draw(st.integers(at, min(at + 3000, len(content))))
    extra = data.draw(st.binary(max_size=300))
    folder = tmp_path_factory.mktemp("shifted")
    path = folder / "shifted.mcap"
    path.write_bytes(content[:at] + extra + content[end:])
    must = [k for a, b, ks in chunks if b <= at or a >= end for k in ks]
    check_saved(path, folder / "out.mcap", must, keys(whole))


@pytest.mark.parametrize("close", [True, False])
def test_each_chunk_damaged_in_turn(tmp_path: Path, close: bool) -> None:
    """All others are saved, even if the file has no index, or if the first chunk defined the channels."""
    written = envelopes(0, 40)
    path = write(tmp_path / "a.mcap", written, close)
    content, chunks, all_keys = path.read_bytes(), extents(path), keys(path)
    assert len(chunks) >= 7
    for i, (at, end, _) in enumerate(chunks):
        damaged = bytearray(content)
        damaged[(at + end) // 2] ^= 0x55
        path.write_bytes(damaged)
        must = [k for j, (_, _, ks) in enumerate(chunks) if j != i for k in ks]
        result = verify(path)
        assert result["state"] == "damaged"
        assert sum(result["messages"].values()) == len(must)
        [hole] = [h for h in result["holes"] if h["to_byte"] < len(content)]
        assert (hole["from_byte"], hole["to_byte"] > end - 1) == (at, True)
        if i:
            lost = Counter(topic for topic, _, _ in chunks[i][2])
            following = Counter(topic for _, _, ks in chunks[i + 1 :] for topic, _, _ in ks)
            assert hole["missing"] == {topic: n for topic, n in lost.items() if following[topic]}
        out = tmp_path / f"out{i}.mcap"
        check_saved(path, out, must, all_keys)
        assert Recording(out).metadata["config"] == "{}"


def test_a_channel_is_saved_although_its_schema_is_lost(tmp_path: Path) -> None:
    """A later channel uses the schema that the first chunk defined."""
    messages = envelopes(0, 40)
    messages[60:] = [replace(e, origin="later@1") for e in messages[60:]]
    path = write(tmp_path / "a.mcap", messages, close=False)
    content, chunks = bytearray(path.read_bytes()), extents(path)
    all_keys = keys(path)
    content[chunks[0][0] + 60] ^= 1
    path.write_bytes(content)
    check_saved(path, tmp_path / "out.mcap", [k for _, _, ks in chunks[1:] for k in ks], all_keys)


def test_a_lost_head_is_restored_from_its_copy(whole: Path, tmp_path: Path) -> None:
    content = bytearray(whole.read_bytes())
    head = next(p for p in pieces(whole) if isinstance(p, MetadataRecord))
    content[head.at + 60] ^= 1
    path, out = tmp_path / "a.mcap", tmp_path / "out.mcap"
    path.write_bytes(content)
    with pytest.raises(FileError, match="damaged head"):
        Recording(path)
    assert verify(path)["state"] == "damaged"
    repair(path, out)
    assert keys(out) == keys(whole)
    read, was = Recording(out), Recording(whole)
    assert [e.event_ns for e in read.envelopes()] == [e.event_ns for e in was.envelopes()]
    assert {**was.metadata, "checksum": ""} == {"part": "1", **read.metadata, "checksum": ""}


@pytest.mark.parametrize("word", [b"session", b"checksum", b"wall_offset_ns", b"format"])
def test_a_head_that_lost_a_key_and_its_checksum_is_rejected(whole: Path, tmp_path: Path, word: bytes) -> None:
    content = whole.read_bytes()
    end = extents(whole)[0][0]
    head = content[:end].replace(b"checksum", bytes(8)).replace(word, bytes(len(word)))
    path, out = tmp_path / "a.mcap", tmp_path / "out.mcap"
    path.write_bytes(head + content[end:])
    assert verify(path)["state"] == "damaged"
    assert verify(path)["session"] == "live"
    repair(path, out)
    assert keys(out) == keys(whole)
    assert Recording(out).metadata["wall_offset_ns"] == "7"


def test_a_wrong_index_is_detected_and_repaired(whole: Path, tmp_path: Path) -> None:
    """Our reader does not use the index, but others do."""
    content = bytearray(whole.read_bytes())
    _, end, _ = extents(whole)[2]
    content[end + 9 + 6 + 3] ^= 0x40  # in a time of the message index
    path, out = tmp_path / "a.mcap", tmp_path / "out.mcap"
    path.write_bytes(content)
    assert verify(path)["state"] == "damaged"
    assert keys(path) == keys(whole)
    assert repair(path, out)["result"]["state"] == "whole"
    assert keys(out) == keys(whole)


def test_parts_become_one_file(tmp_path: Path) -> None:
    first, second, third = envelopes(0, 20), envelopes(26, 20), envelopes(50, 9)
    path = write(tmp_path / "a.mcap", first, close=False)
    kept = keys(path)
    assert part(path, 0) == path
    parts = [
        write(part(path, 1), second, close=False, number=2),
        write(part(path, 3), third, number=4),  # the process of the second part died before it created a file
    ]
    write(part(path, 8), envelopes(0, 9), number=9, offset_ns=8)  # of another recording
    assert list(later_parts(path)) == [2, 4, 9]
    result = verify(path)
    assert result["state"] == "cut off"
    assert [(r["part"], r["state"]) for r in result["parts"]] == [(2, "cut off"), (4, "partial")]
    assert verify(parts[1])["state"] == "partial"
    done = repair(path, tmp_path / "out.mcap")
    assert done["of"] == [str(p) for p in (path, *parts)]
    assert keys(tmp_path / "out.mcap") == [*kept, *keys(parts[0]), *keys(parts[1])]
    assert read_by_a_stranger(tmp_path / "out.mcap") == len(keys(tmp_path / "out.mcap"))
    result = done["result"]
    assert result["state"] == "partial"
    for topic in ("clock", "feature/audio", "raw/audio"):
        last = [max(seq for name, seq, _ in keys(p) if name == topic) for p in (path, parts[0])]
        assert result["dropped"][topic] == {MISSING: 26 - last[0] - 1 + 50 - last[1] - 1}
    assert [h["why"] for h in result["repaired"]["holes"]] == [
        "the file was cut off there; a.part2.mcap goes on",
        "the file was cut off there; a.part4.mcap goes on",
    ]
    # a later part is repaired by itself
    repair(parts[0], tmp_path / "part.mcap")
    assert keys(tmp_path / "part.mcap") == keys(parts[0])


def test_a_recording_in_two_whole_parts_is_partial(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mcap", envelopes(0, 20))
    assert verify(path)["whole"]
    write(part(path, 1), envelopes(26, 20), number=2)
    result = verify(path)
    assert (result["state"], result["whole"]) == ("partial", False)
    assert "first of 2 parts" in result["why"]
    done = repair(path, tmp_path / "out.mcap")
    assert done["result"]["dropped"]["clock"] == {MISSING: 6}
    assert keys(tmp_path / "out.mcap") == keys(path) + keys(part(path, 1))


def test_files_of_older_releases_are_verified_and_repaired(whole: Path, tmp_path: Path) -> None:
    """No periodic metadata, no metadata checksums, and the end before the last chunk."""
    from mcap.writer import CompressionType, IndexType, Writer

    def write_old(path: Path) -> None:
        recorder = Recorder(tmp_path / f"{path.stem}.new.mcap", "live", {"config": "{}"})
        with path.open("wb") as file:
            writer = Writer(file, compression=CompressionType.ZSTD, index_types=IndexType.ALL)
            writer.start(profile="", library="stream_mmrnn")
            writer.add_metadata("stream_mmrnn", {k: v for k, v in recorder._head.items() if k != "checksum"})
            recorder._writer = writer
            for i, e in enumerate(envelopes(0, 40)):
                recorder.write(e)
                if i % 20 == 19 and i < 110:
                    writer.flush()
            writer.add_metadata("stream_mmrnn.end", {"ended": "clean", "lost": "{}"})
            writer.finish()
        recorder._disk.close()

    old = tmp_path / "old.mcap"
    write_old(old)
    assert verify(old)["whole"], verify(old)
    assert keys(old) == keys(whole)
    content, chunks = bytearray(old.read_bytes()), extents(old)
    content[chunks[2][0] + 60] ^= 1
    damaged = tmp_path / "damaged.mcap"
    damaged.write_bytes(content)
    must = [k for i, (_, _, ks) in enumerate(chunks) if i != 2 for k in ks]
    check_saved(damaged, tmp_path / "out.mcap", must, keys(whole))


def test_labels_that_were_given_afterwards_go_with_it(whole: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.mcap"
    cut.write_bytes(whole.read_bytes()[: extents(whole)[3][1]])
    assert repair(cut, tmp_path / "none.mcap")["labels"] == {"out": "", "why": ""}
    given = label_file.made_for(Recording(cut).metadata, ["a.csv"], {"label": [(BEGIN, "walking")]})
    label_file.write(cut, given, force=False)
    out = tmp_path / "out.mcap"
    assert repair(cut, out)["labels"] == {"out": str(tmp_path / "out.labels.json"), "why": ""}
    assert [bytes(e.payload) for e in Recording(out).envelopes({topics.LABEL})] == [b"walking"]
    label_file.place_of(cut).write_text("{")
    other = repair(cut, tmp_path / "other.mcap")
    assert "holds no labels" in other["labels"]["why"]
    assert other["result"]["messages"] == repair(cut, tmp_path / "again.mcap")["result"]["messages"]


def test_a_failed_repair_leaves_no_file(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = tmp_path / "cut.mcap"
    cut.write_bytes(whole.read_bytes()[:4000])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match="cannot be written: No space left on device"):
        repair(cut, tmp_path / "out.mcap")
    assert not (tmp_path / "out.mcap").exists()


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stream_mmrnn", *map(str, args)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.process
def test_the_commands(whole: Path, tmp_path: Path) -> None:
    cut, out = tmp_path / "cut.mcap", tmp_path / "out.mcap"
    cut.write_bytes(whole.read_bytes()[: extents(whole)[3][1]])
    done = run("verify", whole, "--json")
    assert (done.returncode, json.loads(done.stdout)["state"]) == (0, "whole")
    assert done.stderr == ""
    done = run("verify", cut, "--json")
    assert (done.returncode, json.loads(done.stdout)["state"]) == (3, "cut off")
    assert "cut.mcap was cut off at byte" in done.stderr
    done = run("verify", cut)
    assert done.returncode == 3
    assert "cut off" in done.stdout
    assert "feature/audio" in done.stdout
    done = run("repair", cut, out, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["was"], document["result"]["state"]) == ("cut off", "partial")
    done = run("repair", cut, out)
    assert done.returncode == 2
    assert "cannot be made: File exists" in done.stderr
    done = run("verify", out)
    assert done.returncode == 3
    assert "repaired: after" in done.stdout
    named = tmp_path / "talk [final] [b].mcap"
    named.write_bytes(whole.read_bytes())
    for args in (("info", named), ("repair", named, tmp_path / "again [c].mcap")):
        assert "talk [final] [b].mcap" in run(*args).stdout
    (tmp_path / "head.mcap").write_bytes(BEGINNING)
    done = run("repair", tmp_path / "head.mcap", tmp_path / "no.mcap")
    assert done.returncode == 3
    assert "holds no message" in done.stderr
    for verb in (["verify"], ["repair"]):
        done = run(*verb, "/no/such.mcap", *([tmp_path / "x"] if verb == ["repair"] else []))
        assert done.returncode == 2
        assert "/no/such.mcap cannot be read" in done.stderr
