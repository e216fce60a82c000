from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap_protobuf.decoder import DecoderFactory

from stream_mmrnn import topics, wire
from stream_mmrnn.errors import FileError
from stream_mmrnn.recording import Recorder, Recording
from stream_mmrnn.types import Envelope, Stamps

BEGIN = 5_000_000_000_123_456


def session_of(count: int) -> list[Envelope]:
    """A second or so of everything that a recording can hold."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        at = BEGIN + i * 40_000_000

        def add(topic: str, payload: object, origin: str = "", at: int = at, seq: int = i) -> None:
            session = topics.EVERYONE if topic == topics.CLOCK else "live"
            out.append(Envelope(topic, session, seq, at, at + 1, at + 2, payload, origin))

        add(topics.CLOCK, b"")
        if i == 0:
            add(topics.SESSION, wire.pack(wire.SessionMessage("open", at, ("audio",))))
        add("raw/vision", b"\xff\xd8 jpeg", "camera:0")
        add("raw/audio", rng.integers(-(2**15), 2**15, 320).astype("<i2"), "microphone")
        add("raw/text", "grüß dich".encode(), "stdin")
        add("raw/other_audio", rng.integers(-(2**15), 2**15, 160).astype("<i2"), "microphone:call")
        add("raw/other_text", b"yes of course", "tcp:5555")
        add("feature/vision", rng.standard_normal(1280).astype("<f4"), "net@1")
        add("feature/audio", rng.standard_normal(81).astype("<f4"), "mel@2")
        add("feature/other_audio", rng.standard_normal(81).astype("<f4"), "mel@2")
        closed = Stamps(at, at, at, at, "clock")
        tick = wire.TickMessage(i, at, {"audio": True}, {"audio": 0}, closed)
        add(topics.TICK, wire.pack(tick))
        heads = {"h": [0.1, None]}
        prediction = wire.PredictionMessage(i, at, heads, {"audio": True}, {"audio": 0}, closed, at, at, "sha")
        add(topics.PREDICTION, wire.pack(prediction))
    return out


def same(a: Envelope, b: Envelope) -> bool:
    fields = ["topic", "session", "seq", "event_ns", "publish_ns", "origin"]
    if a.topic.startswith(topics.FEATURE):
        fields.append("capture_ns")
    payload = (
        a.payload == b.payload
        if isinstance(a.payload, bytes)
        else a.payload.dtype == b.payload.dtype and a.payload.tobytes() == b.payload.tobytes()
    )
    return payload and all(getattr(a, f) == getattr(b, f) for f in fields)


def write(path: Path, envelopes: list[Envelope], close: bool = True) -> Path:
    recorder = Recorder(path, "live", {"config": "{}", "raw": "true"})
    for e in envelopes:
        recorder.write(e)
        recorder.keep(e.publish_ns)
    if close:
        recorder.close({"ended": "clean", "lost": "{}"})
    else:
        recorder.sync()
        recorder._file.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("recording") / "whole.mcap", session_of(40))


def test_what_is_read_is_what_was_written(whole: Path) -> None:
    recording = Recording(whole)
    read = list(recording.envelopes())
    written = session_of(40)
    assert len(read) == len(written)
    assert all(same(a, b) for a, b in zip(written, read, strict=True))
    assert recording.damage == ""
    assert recording.end["ended"] == "clean"
    assert recording.metadata["raw"] == "true"
    assert [p.heads["h"] for p in recording.predictions()] == [[0.1, None]] * 40
    chosen = list(recording.envelopes({"feature/audio", "clock"}))
    assert {e.topic for e in chosen} == {"feature/audio", "clock"}
    assert len(chosen) == 80


def test_a_stranger_reads_foxglove_messages(whole: Path) -> None:
    """The plain reader of the format and its protobuf support, which know nothing of us."""
    seen: dict[str, object] = {}
    last = 0
    with whole.open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        wanted = [t for t in topics.TOPICS if t.startswith(("raw/", "feature/", "clock"))]
        for schema, channel, message, decoded in reader.iter_decoded_messages(topics=wanted):
            assert message.log_time >= last
            last = message.log_time
            seen.setdefault(channel.topic, (schema.name, decoded))
        assert reader.get_summary().statistics.message_count == len(session_of(40))
    name, image = seen["raw/vision"]
    assert (name, image.format, image.data) == ("foxglove.CompressedImage", "jpeg", b"\xff\xd8 jpeg")
    name, audio = seen["raw/audio"]
    assert (name, audio.format, audio.sample_rate) == ("foxglove.RawAudio", "pcm-s16", 16000)
    assert (audio.number_of_channels, len(audio.data)) == (1, 640)
    name, log = seen["raw/text"]
    assert (name, log.message, log.level, log.name) == ("foxglove.Log", "grüß dich", 2, "text")
    name, audio = seen["raw/other_audio"]
    assert (name, audio.format, audio.sample_rate) == ("foxglove.RawAudio", "pcm-s16", 16000)
    assert (audio.number_of_channels, len(audio.data)) == (1, 320)
    name, log = seen["raw/other_text"]
    assert (name, log.message, log.name) == ("foxglove.Log", "yes of course", "other_text")
    assert seen["feature/other_audio"][0] == "stream_mmrnn.Features"
    name, features = seen["feature/audio"]
    assert (name, features.event_ns, len(features.values)) == ("stream_mmrnn.Features", BEGIN, 81)
    assert seen["clock"][1].event_ns == BEGIN


def test_a_file_that_is_there_is_not_overwritten(whole: Path) -> None:
    before = whole.read_bytes()
    with pytest.raises(FileError, match="cannot be made: File exists"):
        Recorder(whole, "live", {})
    assert whole.read_bytes() == before


def test_files_that_are_no_recordings(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read: No such file"):
        Recording(tmp_path / "no.mcap")
    (tmp_path / "text.mcap").write_text("hello there, this is text")
    with pytest.raises(FileError, match="is no MCAP file"):
        Recording(tmp_path / "text.mcap")
    from mcap.writer import Writer

    with (tmp_path / "other.mcap").open("wb") as f:
        writer = Writer(f)
        writer.start()
        writer.finish()
    with pytest.raises(FileError, match="no recording of this program"):
        Recording(tmp_path / "other.mcap")


def test_an_unfinished_file_yields_its_chunks(tmp_path: Path) -> None:
    recording = Recording(write(tmp_path / "cut.mcap", session_of(40), close=False))
    read = list(recording.envelopes())
    written = session_of(40)
    # the last chunk, at most 250 ms of it, was never closed
    assert len(written) - 9 * 11 <= len(read) < len(written)
    assert all(same(a, b) for a, b in zip(written, read, strict=False))
    assert "cut off" in recording.damage
    assert recording.end == {}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_cut_anywhere_loses_only_the_tail(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = whole.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    path = tmp_path / "cut.mcap"
    path.write_bytes(content[:cut])
    try:
        recording = Recording(path)
    except FileError:
        assert cut < 1000
        return
    read = list(recording.envelopes())
    assert recording.damage
    assert all(same(a, b) for a, b in zip(session_of(40), read, strict=False))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_anywhere_is_noticed_or_harmless(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "damaged.mcap"
    path.write_bytes(content)
    try:
        recording = Recording(path)
        read = list(recording.envelopes())
    except FileError:
        return
    # chunks carry a checksum: what comes out is what went in, or nothing
    assert len(read) <= len(session_of(40))


def test_what_no_file_can_hold_is_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    good = session_of(3)
    bad = [
        Envelope("raw/audio", "live", 0, 2**62, 0, BEGIN, np.zeros(3, "<i2")),
        Envelope("raw/audio", "live", 0, -(2**62), 0, BEGIN, np.zeros(3, "<i2")),
        Envelope("feature/audio", "live", 0, BEGIN, 0, -(2**62), np.zeros(3, "<f4")),
        Envelope("feature/audio", "live", 0, BEGIN, 0, BEGIN, b"bytes"),
        Envelope("prediction", "live", 0, BEGIN, 0, BEGIN, b"{"),
        Envelope("session", "live", 0, BEGIN, 0, BEGIN, np.zeros(3, "<f4")),
    ]
    recorder = Recorder(tmp_path / "a.mcap", "live", {})
    for e in [*bad, *good, *bad]:
        recorder.write(e)
    recorder.close({})
    assert recorder.unwritable == 2 * len(bad)
    recording = Recording(tmp_path / "a.mcap")
    assert all(same(a, b) for a, b in zip(good, recording.envelopes(), strict=True))
    assert recording.end["unwritable"] == str(2 * len(bad))
