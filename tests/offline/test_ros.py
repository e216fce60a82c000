"""Bags of ROS 2: what becomes of each message, what is wrong with a bag, and the predictions as a bag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ros_bags import ZERO_NS, BagWriter, write_walk
from typer.testing import CliRunner

from stream_mmrnn.cli.app import app
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.offline.convert import ros, ros_messages
from stream_mmrnn.offline.replay import replay
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.report import verify
from stream_mmrnn.recording.settings import streams_of

pytest.importorskip("mcap_ros2", reason="pip install '.[ros]'")
_20MS = 20_000_000


@pytest.fixture
def bag(tmp_path: Path) -> BagWriter:
    return BagWriter(tmp_path / "bag")


def add_undecodable(bag: BagWriter, topic: str, at_ns: int) -> None:
    """A message of a known topic that was cut off."""
    bag._writer.write(bag._connections[topic], at_ns, b"\x00\x01\x00\x00\x01")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.mcap"


def payloads(path: Path, topic: str) -> list[tuple[int, Any]]:
    recording = Recording(path)
    offset_ns = int(recording.metadata["wall_offset_ns"])
    return [(e.event_ns + offset_ns, e.payload) for e in recording.envelopes({topic})]


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stream["name"]: stream for stream in result["streams"]}


def test_an_imu_is_six_numbers_in_g_and_radians_at_the_time_of_its_header(bag: BagWriter, out: Path) -> None:
    bag.imu(ZERO_NS, (9.80665, 0.0, -9.80665), (0.1, 0.2, 0.3), log_ns=ZERO_NS + 7_000_000)
    bag.imu(ZERO_NS + _20MS, (0.0, 19.6133, 0.0), (0.0, 0.0, -1.0))
    result = ros.convert(bag.close(), out)
    (first, numbers), (second, _) = payloads(out, "feature/signal")
    assert (first, second) == (ZERO_NS, ZERO_NS + _20MS)
    assert numbers.tolist() == pytest.approx([1, 0, -1, 0.1, 0.2, 0.3])
    assert verify(out)["state"] == "whole"
    assert by_name(result)["/imu"]["role"] == "signal"
    assert Recording(out).metadata["imported_from"] == "bag"


def test_a_stamp_of_another_clock_gives_way_to_the_time_of_the_recording(bag: BagWriter, out: Path) -> None:
    bag.imu(5_000_000_000, (0, 0, 1), (0, 0, 0), log_ns=ZERO_NS)  # the time of a simulation
    bag.imu(0, (0, 0, 1), (0, 0, 0), log_ns=ZERO_NS + _20MS)  # never set
    bag.imu(ZERO_NS + 3 * _20MS, (0, 0, 1), (0, 0, 0), log_ns=ZERO_NS + 2 * _20MS)  # after it was recorded
    result = ros.convert(bag.close(), out)
    assert [at for at, _ in payloads(out, "feature/signal")] == [ZERO_NS, ZERO_NS + _20MS, ZERO_NS + 2 * _20MS]
    assert by_name(result)["/imu"]["restamped"] == 2


@pytest.mark.parametrize(
    ("encoding", "pixel", "bgr"),
    [
        ("rgb8", (250, 10, 20), (20, 10, 250)),
        ("bgr8", (250, 10, 20), (250, 10, 20)),
        ("rgba8", (250, 10, 20, 0), (20, 10, 250)),
        ("bgra8", (250, 10, 20, 0), (250, 10, 20)),
        ("mono8", (90,), (90, 90, 90)),
    ],
)
def test_images_become_jpeg(bag: BagWriter, out: Path, encoding: str, pixel: tuple[int, ...], bgr: Any) -> None:
    bag.image("/cam", ZERO_NS, np.full((32, 48, len(pixel)), pixel, np.uint8), encoding)
    ros.convert(bag.close(), out)
    ((_, jpeg),) = payloads(out, "raw/vision")
    pixels = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert pixels.shape == (32, 48, 3)
    assert pixels.reshape(-1, 3).mean(0) == pytest.approx(np.array(bgr), abs=6)


def test_compressed_images_keep_their_bytes_if_they_are_jpeg(bag: BagWriter, out: Path) -> None:
    picture = np.full((16, 16, 3), 77, np.uint8)
    jpeg, png = (cv2.imencode(suffix, picture)[1].tobytes() for suffix in (".jpg", ".png"))
    bag.jpeg("/cam", ZERO_NS, jpeg)
    bag.jpeg("/cam", ZERO_NS + _20MS, png, "png")
    bag.jpeg("/cam", ZERO_NS + 2 * _20MS, b"\x89PNG broken", "png")
    bag.jpeg("/cam", ZERO_NS + 3 * _20MS, b"")
    result = ros.convert(bag.close(), out)
    (_, first), (_, second) = payloads(out, "raw/vision")
    assert first == jpeg
    assert second[:3] == b"\xff\xd8\xff"
    assert result["undecodable"] == 2
    assert all("cannot be decoded" in why for why in result["refused"])


def test_images_that_cannot_be_read_are_counted_and_cost_nothing_else(bag: BagWriter, out: Path) -> None:
    good = np.zeros((8, 8, 3), np.uint8)
    bag.image("/cam", ZERO_NS, good, "bayer_rggb8")
    bag.image("/cam", ZERO_NS + _20MS, good, "rgb8")
    result = ros.convert(bag.close(), out)
    assert len(payloads(out, "raw/vision")) == 1
    (why,) = result["refused"]
    assert "'bayer_rggb8' are not supported" in why


def test_sound_keeps_its_samples_and_gaps(bag: BagWriter, out: Path) -> None:
    wave = (8000 * np.sin(np.arange(16_000) / 7)).astype(np.int16)
    tremble = np.random.default_rng(0).integers(0, 15_000_000, 100)
    for k in range(50):
        end_ns = ZERO_NS + (k + 1) * _20MS
        late_ns = 0 if k < 25 else 1_000_000_000
        bag.audio("/mic/audio", end_ns + late_ns + int(tremble[k]), wave[k * 320 : (k + 1) * 320])
    ros.convert(bag.close(), out)
    blocks = payloads(out, "raw/audio")
    assert np.array_equal(np.concatenate([b for _, b in blocks]), wave)
    steps = np.diff([at for at, _ in blocks])
    assert sorted(set((steps[steps < 100_000_000] / 1e6).round().tolist())) == [
        20
    ]  # a message's tremble is not the sound's
    assert (steps > 900_000_000).sum() == 1


def test_sound_of_another_rate_with_channels_by_its_info(bag: BagWriter, out: Path) -> None:
    bag.add(
        "/mic/info", "audio_common_msgs/msg/AudioInfo", ZERO_NS,
        channels=2, sample_rate=48_000, sample_format="S16LE", bitrate=0, coding_format="wave",
    )  # fmt: skip
    for k in range(50):
        bag.audio("/mic/audio", ZERO_NS + (k + 1) * _20MS, np.tile(np.int16([500, 1500]), 960))
    result = ros.convert(bag.close(), out)
    sound = np.concatenate([b for _, b in payloads(out, "raw/audio")])
    assert len(sound) == pytest.approx(16_000, abs=640)
    assert sound[4000:8000].mean() == pytest.approx(1000, abs=2)
    assert by_name(result)["/mic/info"]["why"] == "audio_common_msgs/AudioInfo is no stream of a session"


def test_compressed_sound_is_left_out_with_the_reason(bag: BagWriter, out: Path) -> None:
    bag.audio("/mic/audio", ZERO_NS, np.frombuffer(b"ID3\x04" + bytes(60), np.int16))
    bag.imu(ZERO_NS, (0, 0, 1), (0, 0, 0))
    result = ros.convert(bag.close(), out)
    about = by_name(result)["/mic/audio"]
    assert about["role"] == "none"
    assert "looks like MP3" in about["why"]


def test_further_topics_of_a_kind_have_their_own_names(bag: BagWriter, out: Path) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    for topic in ("/cam/left", "/cam/right"):
        bag.image(topic, ZERO_NS, picture, "bgr8")
    result = ros.convert(bag.close(), out)
    assert {s["name"]: s["role"] for s in result["streams"]} == {
        "/cam/left": "vision",
        "/cam/right": "cam_right:vision",
    }
    table = streams_of(Recording(out).metadata)
    assert table["cam_right"].source == "ros:/cam/right"
    assert len(payloads(out, "raw/cam_right")) == 1


@pytest.mark.slow
def test_strings_become_words_or_labels_when_asked(bag: BagWriter, out: Path) -> None:
    for k, word in enumerate(("hello", "there", " ")):
        bag.add("/said", "std_msgs/msg/String", ZERO_NS + k * _20MS, data=word)
    bag.add("/state", "std_msgs/msg/String", ZERO_NS, data="walking")
    path = bag.close()
    with pytest.raises(FileError, match="no messages that can be imported"):
        ros.convert(path, out)
    ros.convert(path, out, chosen={"/said": "text", "/state": "label"})
    assert [bytes(p) for _, p in payloads(out, "raw/text")] == [b"hello", b"there"]
    assert [bytes(p) for _, p in payloads(out, "label")] == [b"walking"]


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"/no": "signal"}, "has no topic '/no'"),
        ({"/imu": "smell"}, "'smell' is not a role"),
        ({"/imu": "audio"}, "/imu is sensor_msgs/Imu, which is signal, and audio is not"),
        ({"/imu": "signal", "/more": "signal"}, "several topics are the signal: /imu, /more"),
    ],
)
def test_roles_that_do_not_fit_are_refused(bag: BagWriter, out: Path, chosen: dict[str, str], says: str) -> None:
    bag.imu(ZERO_NS, (0, 0, 1), (0, 0, 0))
    layout = bag.of("std_msgs/msg/MultiArrayLayout", dim=[], data_offset=0)
    bag.add("/more", "std_msgs/msg/Float32MultiArray", ZERO_NS, layout=layout, data=np.array([1, 2], np.float32))
    with pytest.raises(UsageError, match=says):
        ros.convert(bag.close(), out, chosen=chosen)
    assert not out.exists()


@pytest.mark.slow
def test_a_message_that_cannot_be_decoded_costs_no_other(bag: BagWriter, out: Path) -> None:
    for k in range(100):
        bag.imu(ZERO_NS + k * _20MS, (0.0, 0.0, 9.8), (0.0, 0.0, 0.0))
        if k == 9:
            add_undecodable(bag, "/imu", ZERO_NS + k * _20MS + 1)
    result = ros.convert(bag.close(), out)
    assert by_name(result)["/imu"]["samples"] == len(payloads(out, "feature/signal")) == 100
    assert "a message of /imu cannot be decoded" in result["damage"]


def test_a_bag_that_was_cut_off_is_read_up_to_the_cut(bag: BagWriter, out: Path) -> None:
    noise = np.random.default_rng(0)
    for k in range(60):  # several chunks: rosbags compresses none of the pictures away
        bag.image("/cam", ZERO_NS + k * _20MS, noise.integers(0, 255, (200, 200, 3), dtype=np.uint8), "bgr8")
    (file,) = bag.close().glob("*.mcap")
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    result = ros.convert(file, out)
    assert "bag.mcap is damaged" in result["damage"]
    assert 5 < len(payloads(out, "raw/vision")) < 60
    assert verify(out)["state"] == "whole"


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), value=st.integers(1, 255))
@example(at=1548, value=80)  # an acceleration beyond float32
def test_a_changed_byte_never_is_another_error(tmp_path_factory: pytest.TempPathFactory, at: int, value: int) -> None:
    folder = tmp_path_factory.mktemp("changed")
    (file,) = write_walk(folder / "walk").glob("*.mcap")
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= value
    file.write_bytes(content)
    out = folder / "out.mcap"
    try:
        ros.convert(file, out)
    except (FileError, UsageError):
        assert not out.exists()
    else:
        assert verify(out)["state"] == "whole"


def test_what_is_no_bag_says_so(tmp_path: Path, out: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old_0.db3").write_bytes(b"SQLite")
    (tmp_path / "text.mcap").write_text("no")
    cases = {"none": "there is no", "old": r"it has old_0.db3\); ros2 bag convert", "text.mcap": "is no MCAP file"}
    for name, says in cases.items():
        with pytest.raises(FileError, match=says):
            ros.convert(tmp_path / name, out)
    ros.convert(write_walk(tmp_path / "walk"), out)
    with pytest.raises(UsageError, match="is a recording of this program already; replay it"):
        ros.convert(out, tmp_path / "again.mcap")
    with pytest.raises(FileError, match=r"out\.mcap"):
        ros.convert(tmp_path / "walk", out)  # never overwritten


def test_without_the_extra_it_is_named(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_mmrnn.core.extras.missing", lambda packages: list(packages))
    with pytest.raises(UsageError, match=r"needs the extra `ros` .*pip install 'stream-mmrnn\[ros\]'"):
        ros.convert(tmp_path / "bag", out)


def test_predictions_as_a_bag_are_those_of_the_replay(tmp_path: Path, out: Path) -> None:
    reader = pytest.importorskip("rosbags.highlevel")
    ros.convert(write_walk(tmp_path / "walk"), out)
    made: list[Any] = []
    replay(out, model="activity", on_prediction=made.append, ros_out=tmp_path / "predicted")
    offset_ns = int(Recording(out).metadata["wall_offset_ns"])
    with reader.AnyReader([tmp_path / "predicted"]) as bag:
        kinds = {c.topic: c.msgtype for c in bag.connections}
        array = "std_msgs/msg/Float32MultiArray"
        assert kinds == {
            "/stream_mmrnn/activity": array,
            "/stream_mmrnn/forecast": array,
            "/diagnostics": "diagnostic_msgs/msg/DiagnosticArray",
        }
        assert bag.start_time == made[0].tick.event_ns + offset_ns
        read = [(c.topic, t, bag.deserialize(raw, c.msgtype)) for c, t, raw in bag.messages()]
    heads = [(t, m) for topic, t, m in read if topic == "/stream_mmrnn/activity"]
    assert len(heads) == len(made) > 70
    for (at_ns, message), prediction in zip(heads, made, strict=True):
        assert at_ns == prediction.tick.event_ns + offset_ns
        assert np.array_equal(message.data, prediction.heads["activity"])
    assert heads[0][1].layout.dim[0].label.split(",")[0] == "walking"
    levels = [m.status[0].level for topic, _, m in read if topic == "/diagnostics"]
    assert levels == [0, 3]  # the Imu begins, and ends half a second before the recording does


def test_nothing_is_left_of_a_bag_after_an_error(tmp_path: Path, out: Path) -> None:
    ros.convert(write_walk(tmp_path / "walk"), out)

    def fails(_: Any) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        replay(out, model="activity", on_prediction=fails, ros_out=tmp_path / "predicted")
    assert {p.name for p in tmp_path.iterdir()} == {"walk", "out.mcap"}
    (tmp_path / "predicted").mkdir()
    with pytest.raises(FileError, match="is there already"):
        replay(out, model="activity", ros_out=tmp_path / "predicted")


def test_the_verbs(tmp_path: Path, out: Path) -> None:
    write_walk(tmp_path / "walk")
    done = CliRunner().invoke(app, ["import", str(tmp_path / "walk"), str(out), "--as", "/imu=waist:signal"])
    assert done.exit_code == 0, done.output
    assert "/imu (sensor_msgs/Imu): 150 messages, as waist:signal" in done.output
    refused = CliRunner().invoke(app, ["replay", str(out), "--ros-out", str(tmp_path / "p"), "--speed", "1"])
    assert (
        "--ros-out is for a replay without" in refused.output.replace("\n", " ").replace("│", "") or refused.exception
    )


def test_audio_of_ros2_audio_common() -> None:
    class Of:
        def __init__(self, **fields: Any) -> None:
            self.__dict__ |= fields

    info = Of(format=8, channels=1, rate=16_000)
    message = Of(audio=Of(info=info, audio_data=Of(int16_data=[1, -2, 3], float32_data=[])))
    form = ros_messages.sound_format(message, None)
    assert form == ros_messages.Sound(16_000, 1)
    assert ros_messages.sound(message, form).ravel().tolist() == [1, -2, 3]
    info.format, message.audio.audio_data.float32_data = 1, [0.5]
    assert ros_messages.sound(message, form).dtype == np.float32
    info.format = 16
    assert "PortAudio's format 16" in str(ros_messages.sound_format(message, None))
