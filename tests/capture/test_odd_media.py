"""Media files of others: cut off, empty, with samples that are no numbers, with channels that cancel each other."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from stream_mmrnn.capture import sources
from stream_mmrnn.capture.sources.file import FilePicture, FileSound, streams_of
from stream_mmrnn.capture.sources.media_end import missing_bytes
from stream_mmrnn.core.errors import FileError, SourceSpecError
from stream_mmrnn.core.settings import CameraSettings, MicrophoneSettings, Settings, StreamSettings
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Sample
from stream_mmrnn.offline.predictor import Predictor

RATE_HZ = 16_000
PCM, FLOAT = 1, 3


def tone(seconds: float, hz: float = 440, rate_hz: int = RATE_HZ) -> npt.NDArray[np.float64]:
    return 0.3 * np.sin(2 * np.pi * hz * np.arange(int(rate_hz * seconds)) / rate_hz)


def wav(path: Path, data: npt.NDArray[np.generic], form: int = PCM, stated: int | None = None) -> Path:
    """`data`: [samples, channels]; `stated`: what the header says of the size of the data."""
    bits, channels = 8 * data.itemsize, data.shape[1]
    head = struct.pack("<HHIIHH", form, channels, RATE_HZ, RATE_HZ * channels * bits // 8, channels * bits // 8, bits)
    size = data.nbytes if stated is None else stated
    total = min(36 + size, 2**32 - 1)
    body = struct.pack("<4sI4s4sI", b"RIFF", total, b"WAVE", b"fmt ", len(head)) + head
    path.write_bytes(body + struct.pack("<4sI", b"data", size) + data.tobytes())
    return path


def int16(sound: npt.NDArray[np.float64]) -> npt.NDArray[np.int16]:
    return (sound * 32767).astype("<i2")


def movie(path: Path, codec: str, pts_ms: list[int], form: str | None = None) -> Path:
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", format=form, options=options) as out:
        video = out.add_stream(codec, rate=20)
        video.width, video.height, video.pix_fmt = 64, 48, pixels
        video.codec_context.time_base = Fraction(1, 1000) if codec != "mjpeg" else Fraction(1, 20)
        noise = np.random.default_rng(0)
        for i, at_ms in enumerate(pts_ms):
            frame = av.VideoFrame.from_ndarray(noise.integers(0, 255, (48, 64, 3), np.uint8), format="rgb24")
            frame.pts = at_ms if codec != "mjpeg" else i
            frame.time_base = video.codec_context.time_base
            out.mux(video.encode(frame.reformat(format=pixels)))
        out.mux(video.encode(None))
    return path


def heard(path: Path, channel: int = 0) -> tuple[npt.NDArray[np.int16], FileSound]:
    with closing(FileSound(path, MicrophoneSettings(), channel=channel, paced=False)) as source:
        source.open()
        return np.concatenate([np.asarray(s.data) for s in source.samples(lambda: True, 0)]), source


def seen(path: Path) -> tuple[list[Sample], FilePicture]:
    with closing(FilePicture(path, CameraSettings(), paced=False)) as source:
        source.open()
        return list(source.samples(lambda: True, 0)), source


def test_a_file_whose_header_is_all_has_nothing_in_it(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav", np.zeros((0, 1), "<i2"))
    with pytest.raises(FileError, match=r"a\.wav has no sound in it"):
        streams_of(path)
    with pytest.raises(FileError, match="no sound in it"):
        sources.check(f"file:{path}", "audio", "audio")


def test_a_stream_without_data_is_none_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        video, audio = out.add_stream("mjpeg", rate=20), out.add_stream("pcm_s16le", rate=RATE_HZ, layout="mono")
        video.width, video.height, video.pix_fmt = 64, 48, "yuvj420p"
        frame = av.AudioFrame.from_ndarray(np.ones((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = RATE_HZ
        out.mux(audio.encode(frame))
    assert streams_of(path) == {"audio"}
    with pytest.raises(FileError, match="has no picture in it"):
        sources.check(f"file:{path}", "vision", "vision")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize(("channels", "dtype"), [(1, "<f4"), (2, "<f4"), (1, "<f8")])
def test_samples_that_are_no_numbers_become_silence_and_are_counted(
    tmp_path: Path, bad: float, channels: int, dtype: str
) -> None:
    sound = np.repeat(tone(1.0)[:, None], channels, 1).astype(dtype)
    clean, source = heard(wav(tmp_path / "clean.wav", sound, FLOAT))
    assert (source.info["bad_samples"], source.info["warnings"]) == (0, [])
    sound[8000:8010, 0] = bad
    got, source = heard(wav(tmp_path / "bad.wav", sound, FLOAT))
    assert source.info["bad_samples"] == 10
    assert "samples that are no numbers" in source.info["warnings"][0]
    assert len(got) == len(clean)
    assert np.array_equal(np.delete(got, np.s_[8000:8010]), np.delete(clean, np.s_[8000:8010]))
    assert np.abs(got[8000:8010]).max() <= (0 if channels == 1 else 5000)


def test_channels_that_cancel_each_other_are_told_and_one_can_be_chosen(tmp_path: Path) -> None:
    both = wav(tmp_path / "both.wav", int16(np.stack([tone(1.0), -tone(1.0)], 1)))
    got, source = heard(both)
    assert not got.any()
    assert "cancel each other" in source.info["warnings"][0]
    assert "channel = 1" in source.info["warnings"][0]
    for channel, sign in ((1, 1), (2, -1)):
        got, source = heard(both, channel)
        assert np.array_equal(got, int16(sign * tone(1.0)))
        assert not source.info["warnings"]
    with pytest.raises(FileError, match="has 2 channels, and no channel 3"):
        heard(both, 3)


@pytest.mark.parametrize(
    "sound",
    [
        np.stack([tone(1.0), tone(1.0)], 1),
        np.stack([tone(1.0), tone(1.0, 500)], 1),
        np.stack([tone(1.0), 0 * tone(1.0)], 1),
        np.zeros((RATE_HZ, 2)),
        np.stack([tone(1.0), -0.9 * tone(1.0)], 1),
    ],
)
def test_other_sound_gets_no_warning(tmp_path: Path, sound: npt.NDArray[np.float64]) -> None:
    assert not heard(wav(tmp_path / "a.wav", int16(sound)))[1].info["warnings"]


def test_the_channel_is_a_setting_of_the_stream(tmp_path: Path) -> None:
    path = wav(tmp_path / "call.wav", int16(np.stack([tone(0.5), -tone(0.5)], 1)))
    rows = {
        "audio": StreamSettings(f"file:{path}", channel=1),
        "other_audio": StreamSettings(f"file:{path}", channel=2, person="other"),
    }
    settings = Settings(streams=rows)
    table = stream_table(settings)
    sounds = []
    for name in rows:
        with closing(sources.create_source(table[name], settings, paced=False)) as source:
            source.open()
            sounds.append(np.concatenate([np.asarray(s.data) for s in source.samples(lambda: True, 0)]))
    assert np.array_equal(sounds[0], -sounds[1])
    wrong = stream_table(Settings(streams={"audio": StreamSettings("synthetic", channel=1)}))["audio"]
    with pytest.raises(SourceSpecError, match=r"streams\.audio\.channel"):
        sources.check_all([wrong])


def test_pictures_follow_the_stamps_of_the_file(tmp_path: Path) -> None:
    """Thirty at 50 Hz, ten at 5 Hz."""
    pts_ms = [*range(0, 600, 20), *range(600, 2600, 200)]
    got, source = seen(movie(tmp_path / "vfr.mkv", "mpeg4", pts_ms))
    assert [s.event_ns for s in got] == [ms * 1_000_000 for ms in pts_ms]
    assert (source.info["damaged"], source.info["ends_early"]) == (0, False)


MOVIES: dict[str, Callable[[Path], Path]] = {
    "avi": lambda folder: movie(folder / "a.avi", "mjpeg", list(range(0, 2000, 50))),
    "mp4": lambda folder: movie(folder / "a.mp4", "mpeg4", list(range(0, 2000, 50))),
    "mkv": lambda folder: movie(folder / "a.mkv", "mpeg4", list(range(0, 2000, 50))),
    "wav": lambda folder: wav(folder / "a.wav", int16(tone(2.0)[:, None])),
}


@pytest.mark.parametrize("kind", MOVIES)
def test_a_file_that_was_cut_off_plays_and_says_so(tmp_path: Path, kind: str) -> None:
    path = MOVIES[kind](tmp_path)
    play = (lambda p: heard(p)) if kind == "wav" else (lambda p: seen(p))
    assert missing_bytes(path) == 0
    whole, source = play(path)
    assert (source.info["ends_early"], source.info["warnings"]) == (False, [])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    got, source = play(path)
    assert 0 < len(got) < len(whole)
    assert source.info["ends_early"] is True
    assert f"{path.name} ends early" in source.info["warnings"][0]
    predictor = Predictor(settings=Settings())
    assert len(list(predictor.file(path))) > 0
    assert predictor.ended_early
    assert "ends early" in predictor.warnings[0]


@pytest.mark.parametrize("stated", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_a_size_that_its_writer_did_not_know_is_no_cut(tmp_path: Path, stated: int) -> None:
    path = wav(tmp_path / "piped.wav", int16(tone(1.0)[:, None]), stated=stated)
    got, source = heard(path)
    assert len(got) == RATE_HZ
    assert (source.info["ends_early"], source.info["warnings"], source.info["damaged"]) == (False, [], 0)


def test_damage_in_the_middle_is_counted_and_told(tmp_path: Path) -> None:
    path = MOVIES["avi"](tmp_path)
    data = bytearray(path.read_bytes())
    at = data.index(b"00dc", len(data) // 2)
    size = int.from_bytes(data[at + 4 : at + 8], "little")
    data[at + 8 : at + 8 + size] = bytes(size)  # a picture that is none
    path.write_bytes(data)
    got, source = seen(path)
    assert 30 < len(got) < 40
    assert source.info["damaged"] > 0
    assert "a.avi is damaged" in source.info["warnings"][0]
    assert source.info["ends_early"] is False


def test_what_is_no_media_file_lacks_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x1a\x45\xdf\xa3" + bytes(20))
    (tmp_path / "b").write_bytes(b"RIFF")
    (tmp_path / "c").write_bytes(b"")
    (tmp_path / "d").write_bytes(b"\0\0\0\0ftyp")
    for name in ("a", "b", "c", "d", "nothing"):
        assert missing_bytes(tmp_path / name) == 0
    assert missing_bytes(tmp_path) == 0


def test_a_name_that_is_no_utf_8_can_be_the_origin_of_messages(tmp_path: Path) -> None:
    path = wav(Path(f"{tmp_path}/bad\udcff.wav"), int16(tone(0.1)[:, None]))
    source = sources.create_source(Stream.of("audio", source=f"file:{path}"), Settings(), paced=False)
    assert source.origin.encode() == "file:bad\ufffd.wav".encode()
