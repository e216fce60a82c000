from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap_protobuf.decoder import DecoderFactory

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import FileError, RecordingError
from stream_mmrnn.core.streams import usual
from stream_mmrnn.core.types import Envelope, Stamps
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.schemas import decode_clock, decode_features, encode_features, own_schema

BEGIN = 5_000_000_000_123_456


def session_of(count: int) -> list[Envelope]:
    """About a second of every kind of message."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        at = BEGIN + i * 40_000_000

        def add(topic: str, payload: object, origin: str = "", at: int = at, seq: int = i) -> None:
            session = topics.EVERYONE if topic == topics.CLOCK else "live"
            # the microphone's own clock is years off
            device_ns = 77 * at + seq if topic.startswith("feature/") and "audio" in topic else 0
            out.append(Envelope(topic, session, seq, at, at + 1, at + 2, payload, origin, 0, device_ns))

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
    fields = ["topic", "session", "seq", "event_ns", "publish_ns", "origin", "device_ns"]
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
        recorder.flush_due(e.publish_ns)
    if close:
        recorder.close({"ended": "clean", "lost": "{}"})
    else:
        recorder.sync()
        recorder._disk.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("recording") / "whole.mcap", session_of(40))


def test_reading_returns_what_was_written(whole: Path) -> None:
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


def test_other_programs_read_foxglove_messages(whole: Path) -> None:
    """The `mcap` package's reader with its protobuf support can decode the file."""
    seen: dict[str, object] = {}
    last = 0
    with whole.open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        wanted = [*(f(m) for m in usual() for f in (topics.raw, topics.feature)), topics.CLOCK]
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


def test_an_existing_file_is_not_overwritten(whole: Path) -> None:
    before = whole.read_bytes()
    with pytest.raises(FileError, match="cannot be made: File exists"):
        Recorder(whole, "live", {})
    assert whole.read_bytes() == before


def test_files_that_are_not_recordings_are_refused(tmp_path: Path) -> None:
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


@pytest.mark.slow
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


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_anywhere_is_detected_or_harmless(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
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
    # chunks have a checksum: messages are returned unchanged or not at all
    assert len(read) <= len(session_of(40))


def test_unwritable_messages_are_counted_and_the_rest_is_written(tmp_path: Path) -> None:
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


def protobuf(name: str) -> object:
    """The protobuf decoder of our messages, built from the schema in the file."""
    files = descriptor_pb2.FileDescriptorSet.FromString(own_schema(name)).file
    pool = descriptor_pool.DescriptorPool()
    pool.Add(files[0])
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"stream_mmrnn.{name}"))


FEATURES, CLOCK = protobuf("Features"), protobuf("Clock")
STAMPS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def near_messages(draw: st.DrawFn) -> bytes:
    """Messages in our layout and in other layouts, intact and damaged."""
    numbers = draw(st.lists(st.floats(width=32), max_size=draw(st.sampled_from([4, 40]))))
    event, capture, device = draw(STAMPS), draw(STAMPS), draw(st.one_of(st.just(0), STAMPS))
    if draw(st.booleans()):
        values = np.array(numbers, np.float32)
        made = encode_features(Envelope("feature/audio", "s", 0, event, capture, 0, values, "", 0, device))
    else:
        made = FEATURES(event_ns=event, capture_ns=capture, values=numbers, device_ns=device).SerializeToString()
    if draw(st.booleans()):
        made = made[: draw(st.sampled_from([9, 18, 27, len(made)]))]
    content = bytearray(made)
    for _ in range(draw(st.integers(0, 2))):
        if content:
            content[draw(st.integers(0, min(len(content) - 1, 24)))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


ANYTHING = st.one_of(st.binary(max_size=60), near_messages())


@pytest.mark.slow
@settings(max_examples=500)
@given(ANYTHING, st.binary(max_size=3), st.binary(max_size=30))
def test_features_are_decoded_as_by_protobuf(message: bytes, before: bytes, after: bytes) -> None:
    at, end = len(before), len(before) + len(message)
    try:
        expected = FEATURES.FromString(message)
    except DecodeError:
        with pytest.raises(RecordingError, match="no Features"):
            decode_features(before + message + after, at, end)
        return
    event_ns, capture_ns, values, device_ns = decode_features(before + message + after, at, end)
    assert (event_ns, capture_ns, values.dtype) == (expected.event_ns, expected.capture_ns, np.float32)
    assert device_ns == expected.device_ns
    np.testing.assert_array_equal(values, np.array(expected.values, np.float32))


@pytest.mark.slow
@settings(max_examples=500)
@given(ANYTHING, st.binary(max_size=3), st.binary(max_size=30))
def test_the_clock_is_decoded_as_by_protobuf(message: bytes, before: bytes, after: bytes) -> None:
    at, end = len(before), len(before) + len(message)
    try:
        expected = CLOCK.FromString(message)
    except DecodeError:
        with pytest.raises(RecordingError, match="no Clock"):
            decode_clock(before + message + after, at, end)
        return
    assert decode_clock(before + message + after, at, end) == (expected.event_ns, None, b"", 0)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 4095, 4096, 600_000])
def test_features_of_any_length_are_decoded_without_protobuf(count: int) -> None:
    """Without protobuf, for any size of the length prefix."""
    numbers = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    numbers[::7] = np.nan
    for device in (0, 7, -(2**63)):
        message = encode_features(Envelope("feature/audio", "s", 0, 5, 6, 0, numbers, "", 0, device))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stream_mmrnn.recording.schemas._by_protobuf", None)
            event_ns, capture_ns, values, device_ns = decode_features(b"x" + message, 1, 1 + len(message))
        assert (event_ns, capture_ns, device_ns, values.tobytes()) == (5, 6, device, numbers.tobytes())
        assert FEATURES.FromString(message).event_ns == 5
        assert FEATURES.FromString(message).device_ns == device


def test_unwanted_topics_are_not_decoded(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr("mcap_protobuf.decoder.DecoderFactory.decoder_for", refuse)
    wanted = {"feature/audio", "feature/vision", "clock", "session"}
    read = list(Recording(whole).envelopes(wanted))
    assert len(read) == 3 * 40 + 1
    monkeypatch.setattr("stream_mmrnn.recording.column_reader.feature_columns", refuse)
    assert len(list(Recording(whole).envelopes({"clock"}))) == 40


@pytest.mark.parametrize("opened", [b"\x09\x01", b"\xff\xff\xff"])
def test_a_chunk_is_read_up_to_an_invalid_message(
    tmp_path: Path, opened: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk's checksum matches, but a message is invalid (another program's file)."""
    good = [e for e in session_of(4) if e.topic == topics.CLOCK]
    recorder = Recorder(tmp_path / "a.mcap", "live", {})
    for e in good[:2]:
        recorder.write(e)
    with monkeypatch.context() as patched:
        patched.setattr("stream_mmrnn.recording.recorder.encoded", lambda *_: opened)
        recorder.write(good[2])
    recorder.write(good[3])
    recorder.close({})
    recording = Recording(tmp_path / "a.mcap")
    read = list(recording.envelopes())
    assert len(read) == 2
    assert all(same(a, b) for a, b in zip(good, read, strict=False))
    assert "damaged record" in recording.damage


@pytest.mark.slow
def test_a_wall_clock_step_is_recorded_and_changes_no_time(tmp_path: Path) -> None:
    """The recorder's node runs in a thread on a real bus while the wall clock is set."""
    import threading
    import time

    from stream_mmrnn.bus import Address, Publisher
    from stream_mmrnn.core import config
    from stream_mmrnn.core.clock import now_ns
    from stream_mmrnn.live import nodes

    path = tmp_path / "a.mcap"
    settings = config.parse({"record": {"path": str(path)}, "session": {"name": "s"}})
    address = Address.create("ipc")
    contexts = {
        n: nodes.Context(n, settings, address, threading.Event(), threading.Event(), None)  # type: ignore[arg-type]
        for n in ("broker", "clock", "recorder")
    }
    running = {n: threading.Thread(target=nodes.create(c).run) for n, c in contexts.items()}
    true, by = time.time_ns, [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: true() + by[0])
        for name, thread in running.items():
            thread.start()
            assert contexts[name].ready.wait(20)
        publisher = Publisher(address, 100)
        assert publisher.wait_for_reader(topics.SESSION, 20)
        at_ns = now_ns()
        publisher.publish(topics.SESSION, "s", at_ns, at_ns, wire.pack(wire.SessionMessage("open", at_ns)))
        sent = []
        for k in range(60):
            by[0] = 0 if k < 20 else 7_200_000_000_000
            payload = np.zeros(81, "<f4")
            sent.append(publisher.publish("feature/audio", "s", now_ns(), now_ns(), payload, "mel", 9**18 + k))
            time.sleep(0.05)
        publisher.publish(topics.CONTROL, "s", 0, 0, b"stop")
        running["recorder"].join(20)
        for name in ("clock", "broker"):
            contexts[name].stop.set()
            running[name].join(20)
        publisher.close(0)
        address.remove()
    recording = Recording(path)
    read = list(recording.envelopes({"feature/audio"}))
    # all times are as sent, the device's own included, although the wall clock jumped by two hours
    assert all(same(a, b) for a, b in zip(sent, read, strict=True))
    [(stepped_ns, step_ns)] = recording.wall_steps
    assert abs(step_ns - 7_200_000_000_000) < 50_000_000
    assert sent[19].publish_ns < stepped_ns < sent[59].publish_ns
    assert recording.end["ended"] == "clean"
    assert recording.started_unix_ns == pytest.approx(true(), abs=120e9)
    with path.open("rb") as file:
        times = [m.publish_time for _, _, m in make_reader(file).iter_messages(topics=["feature/audio"])]
    assert [b - a for a, b in itertools.pairwise(times)] == [
        b.publish_ns - a.publish_ns for a, b in itertools.pairwise(sent)
    ]


def test_the_chunk_index_is_kept_on_disk_and_written_completely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mcap.reader import make_reader

    from stream_mmrnn.recording import recorder as module

    def write(name: str) -> bytes:
        recorder = module.Recorder(tmp_path / name, "a", {"x": "y"}, chunk_ms=0.0)
        recorder._offset_ns = 0
        for n in range(700):
            recorder.write(Envelope(topics.CLOCK, topics.EVERYONE, n, n + 1, n + 1, n + 1, b"", "", n + 1))
            recorder.flush_due(2**61 + n)
        recorder.close({})
        with (tmp_path / name).open("rb") as file:
            summary = make_reader(file).get_summary()
            assert summary is not None
            assert [c.message_start_time for c in summary.chunk_indexes] == list(range(1, 701))
            file.seek(0)
            assert len(list(make_reader(file).iter_messages())) == 700
        return (tmp_path / name).read_bytes()

    spooled = write("a.mcap")

    def no_folder(dir: Path) -> None:
        raise OSError

    monkeypatch.setattr(module.tempfile, "TemporaryFile", no_folder)
    assert len(write("b.mcap")) == len(spooled)
