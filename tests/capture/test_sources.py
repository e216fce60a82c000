import contextlib
import importlib
import itertools
import os
import pty
import socket
import threading
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import zmq
from places import SHARED

from stream_mmrnn.capture import sources
from stream_mmrnn.capture.resampler import BlockResampler
from stream_mmrnn.capture.sources.camera import Camera, list_cameras
from stream_mmrnn.capture.sources.file import FilePicture, FileSound, streams_of
from stream_mmrnn.capture.sources.pacing import ScheduledSample, pace
from stream_mmrnn.capture.sources.synthetic import Synthetic
from stream_mmrnn.capture.sources.talker import turns
from stream_mmrnn.capture.sources.text import create as create_text
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError, SourceError, SourceSpecError
from stream_mmrnn.core.settings import CameraSettings, MicrophoneSettings, Settings, SyntheticSettings, TextSettings
from stream_mmrnn.core.streams import SHORT_FORMS, Stream
from stream_mmrnn.core.types import Sample

CLIPS = SHARED / "data" / "clips"

virtual_devices: Any = importlib.import_module("tools.virtual_devices")


def always() -> bool:
    return True


def for_seconds(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end


def clip(name: str) -> Path:
    path = CLIPS / name
    if not path.is_file():
        pytest.skip("the shared data folder is not beside this checkout")
    return path


# -- pacing


def test_pace_waits_for_the_time_and_not_for_the_past() -> None:
    start = now_ns()
    made: list[int] = []

    def make(i: int) -> bytes:
        made.append(i)
        return b"%d" % i

    times = [start - 2_000_000_000, start - 600_000_000, start - 100_000_000, start + 60_000_000, start + 90_000_000]
    readings = [ScheduledSample(t, lambda i=i: make(i)) for i, t in enumerate(times)]
    got = list(pace(readings, always, paced=True))
    assert [s.data for s in got] == [b"2", b"3", b"4"]
    assert made == [2, 3, 4]  # skipped samples are not made
    assert all(s.capture_ns >= s.event_ns for s in got)
    assert now_ns() >= times[-1]


def test_pace_stops_while_it_waits() -> None:
    began = time.monotonic()
    assert list(pace([ScheduledSample(now_ns() + 30_000_000_000, bytes)], for_seconds(0.1), paced=True)) == []
    assert time.monotonic() - began < 2


# -- synthetic


def synthetic(modality: str, count: int, **kw: Any) -> list[Sample]:
    source = Synthetic(Stream.of(modality), SyntheticSettings(**kw), paced=False)
    source.open()
    return list(itertools.islice(source.samples(always, 1_000), count))


@pytest.mark.parametrize(
    ("modality", "count"), [("vision", 60), ("audio", 200), ("text", 60), ("other_audio", 200), ("other_text", 20)]
)
def test_the_same_seed_gives_the_same_samples(modality: str, count: int) -> None:
    one, two = synthetic(modality, count, seed=3), synthetic(modality, count, seed=3)
    other = synthetic(modality, count, seed=4)
    for a, b in zip(one, two, strict=True):
        assert (a.event_ns, a.capture_ns) == (b.event_ns, b.capture_ns)
        assert a.event_ns == a.capture_ns
        assert np.array_equal(a.data, b.data)
    differs = [x.event_ns != y.event_ns or not np.array_equal(x.data, y.data) for x, y in zip(one, other, strict=True)]
    assert any(differs)


@pytest.mark.slow
def test_the_three_modalities_agree() -> None:
    """Sound is loud in turns and silent between, words end where the turns say, and the mouth moves with them."""
    spoken = list(itertools.islice(turns(0), 4))
    end = spoken[-1].end_s
    audio = synthetic("audio", int(end * 50))
    loud = np.array([np.abs(s.data.astype(float)).mean() for s in audio])
    at = np.array([(s.event_ns - 1_000) / 1e9 - 0.01 for s in audio])
    inside = np.zeros(len(at), bool)
    around = np.zeros(len(at), bool)
    for turn in spoken:
        inside |= (at > turn.start_s + 0.05) & (at < turn.end_s - 0.05)
        around |= (at > turn.start_s - 0.02) & (at < turn.end_s + 0.1)
    assert np.median(loud[inside]) > 500
    assert loud[~around].max() < 20
    assert all(s.data.dtype == np.int16 and len(s.data) == 320 for s in audio)

    words = [w for t in spoken for w in t.words]
    text = synthetic("text", len(words))
    assert [s.data.decode() for s in text] == [w.text for w in words]
    assert [s.event_ns - 1_000 for s in text] == [round(w.end_s * 1e9) for w in words]
    pauses = [b.start_s - a.end_s for a, b in itertools.pairwise(spoken)]
    assert all(0.4 <= p <= 2.5 for p in pauses)

    frames = synthetic("vision", int(end * 25))
    red = []
    for s in frames:
        picture = cv2.imdecode(np.frombuffer(s.data, np.uint8), cv2.IMREAD_COLOR).astype(int)
        assert picture.shape == (240, 320, 3)
        red.append(((picture[..., 2] > 110) & (picture[..., 1] < 90)).sum())  # of the mouth
    seconds = np.array([(s.event_ns - 1_000) / 1e9 for s in frames])
    talking = np.any([(seconds > t.start_s) & (seconds < t.end_s) for t in spoken], axis=0)
    assert np.mean(np.array(red)[talking]) > 2 * np.mean(np.array(red)[~talking])


def test_faults_are_the_configured_ones() -> None:
    source = Synthetic(Stream.of("audio"), SyntheticSettings(drop=0.2), paced=False)
    got = list(itertools.islice(source.samples(always, 0), 400))
    sent = got[-1].event_ns // 20_000_000
    assert source.info["dropped"] == sent - 400
    assert 0.1 < source.info["dropped"] / sent < 0.3

    source = Synthetic(Stream.of("vision"), SyntheticSettings(freeze_every_s=2, freeze_s=0.5), paced=False)
    times = [s.event_ns / 1e9 for s in itertools.islice(source.samples(always, 0), 150)]
    gaps = [(a, b) for a, b in itertools.pairwise(times) if b - a > 0.05]
    assert [(round(a, 2), round(b, 2)) for a, b in gaps[:2]] == [(1.96, 2.52), (3.96, 4.52)]
    # outside a freeze the samples are the same as without it
    whole = {s.event_ns: s.data for s in synthetic("vision", 60)}
    kept = Synthetic(Stream.of("vision"), SyntheticSettings(freeze_every_s=2, freeze_s=0.5), paced=False)
    for s in itertools.islice(kept.samples(always, 1_000), 40):
        assert whole[s.event_ns] == s.data


@pytest.mark.slow
def test_late_delivery_keeps_order_and_event_times() -> None:
    source = Synthetic(Stream.of("audio"), SyntheticSettings(jitter_ms=20))
    epoch = now_ns()
    got = list(source.samples(for_seconds(1.0), epoch))
    assert [s.event_ns for s in got] == [epoch + (k + 1) * 20_000_000 for k in range(len(got))]
    late = [s.capture_ns - s.event_ns for s in got]
    assert min(late) >= 0
    assert np.mean(late) > 10e6


def test_a_frozen_stream_can_be_stopped() -> None:
    for lost in (SyntheticSettings(drop=1.0), SyntheticSettings(freeze_every_s=1, freeze_s=2)):
        began = time.monotonic()
        assert len(list(Synthetic(Stream.of("text"), lost).samples(for_seconds(0.2), now_ns()))) == 0
        assert time.monotonic() - began < 2


def test_a_worker_that_starts_late_skips_old_samples() -> None:
    epoch = now_ns() - 20_000_000_000
    source = Synthetic(Stream.of("audio"), SyntheticSettings())
    first = next(source.samples(always, epoch))
    assert first.capture_ns - first.event_ns < 1_000_000_000
    k = (first.event_ns - epoch) // 20_000_000 - 1
    unpaced = Synthetic(Stream.of("audio"), SyntheticSettings(), paced=False)
    same = next(itertools.islice(unpaced.samples(always, epoch), k, None))
    assert same.event_ns == first.event_ns
    assert np.array_equal(same.data, first.data)


# -- files


@pytest.fixture(scope="module")
def movie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.5 s: 15 numbered frames at 10 Hz; a 440 Hz tone at 48 kHz stereo, silent but for [0.5, 1.0) s."""
    path = tmp_path_factory.mktemp("media") / "movie.mkv"
    with av.open(str(path), "w") as out:
        video = out.add_stream("mjpeg", rate=10)
        video.width, video.height, video.pix_fmt = 320, 240, "yuvj420p"
        audio = out.add_stream("pcm_s16le", rate=48_000, layout="stereo")
        pictures = virtual_devices.numbered_frames()()
        for i in range(15):
            bgr = cv2.imdecode(np.frombuffer(next(pictures), np.uint8), cv2.IMREAD_COLOR)
            frame = av.VideoFrame.from_ndarray(bgr, format="bgr24")
            frame.pts = i
            out.mux(video.encode(frame))
            t = (np.arange(4800) + 4800 * i) / 48_000
            tone = 8000 * np.sin(2 * np.pi * 440 * t) * ((t >= 0.5) & (t < 1.0))
            sound = np.repeat(tone.astype(np.int16), 2)[None]
            block = av.AudioFrame.from_ndarray(sound, format="s16", layout="stereo")
            block.sample_rate, block.pts = 48_000, 4800 * i
            out.mux(audio.encode(block))
        out.mux(video.encode(None))
        out.mux(audio.encode(None))
    return path


@pytest.fixture
def tone_wav(tmp_path: Path) -> Path:
    path = tmp_path / "tone.wav"
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(np.arange(1_000, dtype=np.int16).tobytes())
    return path


def numbers(samples: list[Sample]) -> list[int]:
    pictures = [cv2.imdecode(np.frombuffer(s.data, np.uint8), cv2.IMREAD_COLOR) for s in samples]
    return [virtual_devices.read_number(p) for p in pictures]


def test_a_file_gives_its_frames_at_its_own_times(movie: Path) -> None:
    assert streams_of(movie) == {"vision", "audio"}
    with closing(FilePicture(movie, CameraSettings(), paced=False)) as source:
        source.open()
        got = list(source.samples(always, 7_000))
        assert source.info["got"]["rate_hz"] == 10
    assert [s.event_ns for s in got] == [7_000 + i * 100_000_000 for i in range(15)]
    assert numbers(got) == list(range(15))


def test_a_file_gives_its_sound_at_16_khz_mono(movie: Path) -> None:
    with closing(FileSound(movie, MicrophoneSettings(), paced=False)) as source:
        source.open()
        got = list(source.samples(always, 0))
    assert {len(s.data) for s in got[:-1]} == {320}
    sound = np.concatenate([s.data for s in got]).astype(float)
    assert abs(len(sound) - 24_000) <= 32
    assert got[-1].event_ns == round(len(sound) * 1e9 / 16_000)
    loud = np.flatnonzero(np.abs(sound) > 2000)
    assert abs(loud[0] - 8_000) < 32
    assert abs(loud[-1] - 16_000) < 32
    hz = np.abs(np.fft.rfft(sound[8_100:15_900])).argmax() * 16_000 / 7_800
    assert abs(hz - 440) < 3


def test_the_last_part_of_a_block_is_kept(tone_wav: Path) -> None:
    assert streams_of(tone_wav) == {"audio"}
    with closing(FileSound(tone_wav, MicrophoneSettings(), paced=False)) as source:
        source.open()
        got = list(source.samples(always, 0))
    assert [len(s.data) for s in got] == [320, 320, 320, 40]
    assert [s.event_ns for s in got] == [20_000_000, 40_000_000, 60_000_000, 62_500_000]
    assert np.array_equal(np.concatenate([s.data for s in got]), np.arange(1_000, dtype=np.int16))


def test_sound_that_was_not_recorded_is_silence(tmp_path: Path) -> None:
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as out:
        audio = out.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for start in (0, 1_600, 8_000):  # nothing between 0.2 s and 0.5 s
            block = av.AudioFrame.from_ndarray(np.full((1, 1_600), 1_000, np.int16), format="s16", layout="mono")
            block.sample_rate, block.pts = 16_000, start
            out.mux(audio.encode(block))
        out.mux(audio.encode(None))
    with closing(FileSound(path, MicrophoneSettings(), paced=False)) as source:
        source.open()
        sound = np.concatenate([s.data for s in source.samples(always, 0)])
    assert len(sound) == 9_600
    assert np.all(sound[:3_200] == 1_000)
    assert np.all(sound[3_200:8_000] == 0)
    assert np.all(sound[8_000:] == 1_000)


def test_a_file_plays_in_real_time_and_a_late_worker_skips_old_samples(movie: Path) -> None:
    with closing(FilePicture(movie, CameraSettings())) as source:
        source.open()
        epoch = now_ns() - 1_000_000_000
        got = list(source.samples(always, epoch))
    assert numbers(got)[-1] == 14
    assert 5 <= numbers(got)[0] <= 10
    assert all(s.capture_ns >= s.event_ns for s in got)
    assert now_ns() >= epoch + 1_400_000_000
    with closing(FileSound(movie, MicrophoneSettings())) as source:
        source.open()
        epoch = now_ns()
        got = list(source.samples(for_seconds(0.3), epoch))
    assert 5 <= len(got) <= 16


def test_files_that_cannot_be_a_source(tmp_path: Path, tone_wav: Path, movie: Path) -> None:
    with pytest.raises(FileError, match=r"nothing\.mp4"):
        streams_of(tmp_path / "nothing.mp4")
    text = tmp_path / "words.txt"
    text.write_text("not a film\n" * 50)
    with pytest.raises(FileError, match=r"words\.txt"):
        streams_of(text)
    with pytest.raises(FileError):
        streams_of(tmp_path)
    with pytest.raises(FileError, match="no picture"):
        FilePicture(tone_wav, CameraSettings()).open()
    # cut short: what is there is delivered, and the stream ends
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(movie.read_bytes()[: movie.stat().st_size // 2])
    with closing(FilePicture(cut, CameraSettings(), paced=False)) as source:
        source.open()
        assert 1 <= len(list(source.samples(always, 0))) < 15


@pytest.mark.shared_data
@pytest.mark.parametrize(("name", "frames", "seconds"), [("speech.mp4", 104, 8.7), ("bbaf2n.mpg", 75, 3.0)])
def test_real_clips(name: str, frames: int, seconds: float) -> None:
    path = clip(name)
    assert streams_of(path) == {"vision", "audio"}
    with closing(FilePicture(path, CameraSettings(), paced=False)) as source:
        source.open()
        pictures = list(source.samples(always, 0))
    assert abs(len(pictures) - frames) <= 2
    assert all(a.event_ns < b.event_ns for a, b in itertools.pairwise(pictures))
    assert abs(pictures[-1].event_ns / 1e9 - seconds) < 0.2
    with closing(FileSound(path, MicrophoneSettings(), paced=False)) as source:
        source.open()
        sound = list(source.samples(always, 0))
    assert abs(sound[-1].event_ns / 1e9 - seconds) < 0.2
    assert np.concatenate([s.data for s in sound]).std() > 100


@pytest.mark.shared_data
def test_a_real_wav_is_given_bit_for_bit() -> None:
    path = clip("dialogue.wav")
    with closing(FileSound(path, MicrophoneSettings(), paced=False)) as source:
        source.open()
        sound = np.concatenate([s.data for s in source.samples(always, 0)])
    with wave.open(str(path)) as plain:
        assert np.array_equal(sound, np.frombuffer(plain.readframes(plain.getnframes()), np.int16))


# -- text


class Reader:
    """Runs a text source in a thread."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.lines: list[str] = []
        self.samples: list[Sample] = []
        self.error: Exception | None = None
        self._stop = threading.Event()
        source.open()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for sample in self.source.samples(lambda: not self._stop.is_set(), 0):
                self.samples.append(sample)
                self.lines.append(sample.data.decode())
        except SourceError as e:
            self.error = e

    def wait(self, count: int) -> list[str]:
        end = time.monotonic() + 5
        while len(self.lines) < count and time.monotonic() < end:
            time.sleep(0.01)
        return self.lines

    def join(self) -> None:
        self._thread.join(5)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self._stop.set()
        self.join()
        self.source.close()


def text(spec: str, fd: int = -1, **kw: Any) -> Any:
    kind, rest = sources.split(spec)
    return create_text(kind, rest, TextSettings(**kw), fd)


def test_stdin_gives_lines_until_its_end() -> None:
    read, write = os.pipe()
    with closing(Reader(text("stdin", read))) as reader:
        before = now_ns()
        os.write(write, "hello\n\n  grüß dich \nbad \xff\n".encode().replace(b"\xc3\xbf", b"\xff") + b"no newl")
        assert reader.wait(2) == ["hello", "grüß dich"]
        os.write(write, b"ine")
        os.close(write)
        reader.join()
        assert reader.lines == ["hello", "grüß dich", "no newline"]
        assert reader.source.info["garbage"] == 1
        assert all(before <= s.event_ns == s.capture_ns <= now_ns() for s in reader.samples)
    os.close(read)


def test_a_terminal_is_read_by_lines() -> None:
    ours, theirs = pty.openpty()
    with closing(Reader(text("stdin", theirs))) as reader:
        os.write(ours, b"one\ntwo\n")
        assert reader.wait(2) == ["one", "two"]
    os.close(ours)
    os.close(theirs)


def test_an_idle_source_stops_and_uses_no_cpu() -> None:
    read, write = os.pipe()
    used = time.process_time()
    reader = Reader(text("stdin", read))
    time.sleep(0.5)
    reader.close()
    assert time.process_time() - used < 0.25
    os.close(read)
    os.close(write)


def test_stdin_that_is_not_there() -> None:
    with pytest.raises(SourceError, match="stdin"):
        text("stdin", -1).open()


def test_a_fifo_outlives_its_writers(tmp_path: Path) -> None:
    path = tmp_path / "words"
    os.mkfifo(path)
    with closing(Reader(text(f"pipe:{path}"))) as reader:
        for i in range(3):
            with path.open("w") as out:
                out.write(f"line {i}\nrest {i}")
            reader.wait(2 * i + 2)
        assert reader.lines == [f"{w} {i}" for i in range(3) for w in ("line", "rest")]
        used = time.process_time()
        time.sleep(0.4)  # without a writer it must not be a busy loop
        assert time.process_time() - used < 0.2


def test_a_pipe_may_be_a_plain_file_or_missing(tmp_path: Path) -> None:
    plain = tmp_path / "lines.txt"
    plain.write_text("a\nb\nc")
    source = text(f"pipe:{plain}")
    source.open()
    assert [s.data for s in source.samples(always, 0)] == [b"a", b"b", b"c"]
    source.close()
    with pytest.raises(SourceError, match="mkfifo"):
        text(f"pipe:{tmp_path}/missing").open()
    with pytest.raises(SourceError, match="neither"):
        text(f"pipe:{tmp_path}").open()


def test_a_fifo_that_is_removed_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "words"
    os.mkfifo(path)
    with closing(Reader(text(f"pipe:{path}"))) as reader:
        with path.open("w") as out:
            out.write("last\n")
            path.unlink()
        reader.join()
        assert reader.lines == ["last"]
        assert isinstance(reader.error, SourceError)


def test_tcp_serves_several_clients_and_survives_bad_ones() -> None:
    with closing(Reader(text("tcp:0", max_line_bytes=32))) as reader:
        port = reader.source.info["port"]
        one, two = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
        one.sendall(b"from o")
        two.sendall(b"from two\r\n")
        assert reader.wait(1) == ["from two"]
        one.sendall(b"ne\n")
        assert reader.wait(2)[1] == "from one"
        one.sendall(b"x" * 33 + b"\n" + b"y" * 200_000)
        one.sendall(b"\nstill here\n\xff\xfe\nand here\n")
        assert reader.wait(4)[2:] == ["still here", "and here"]
        assert reader.source.info["too_long"] == 2
        assert reader.source.info["garbage"] == 1
        two.sendall(b"bye")
        two.close()
        assert reader.wait(5)[4] == "bye"
        assert reader.source.info["clients"] == 1
        # a second server on the port is an error
        with pytest.raises(SourceError, match="port"):
            text(f"tcp:{port}").open()
        one.close()


@pytest.mark.parametrize(
    "request_line", ["POST / HTTP/1.1\r\n", "GET /x HTTP/1.0\n", "POST /" + "x" * 9000 + " HTTP/1.1\r\n"]
)
def test_a_web_page_cannot_type_over_tcp(request_line: str) -> None:
    content = f"{request_line}Host: 127.0.0.1\r\nContent-Length: 20\r\n\r\n/label hacked\nwords\n".encode()
    with closing(Reader(text("tcp:0", max_line_bytes=4096))) as reader:
        port = reader.source.info["port"]
        for pieces in ([content], [content[:3], content[3:40], content[40:]], [bytes([b]) for b in content]):
            with socket.create_connection(("127.0.0.1", port), 10) as page:
                with contextlib.suppress(OSError):  # it is disconnected in the middle
                    for piece in pieces:
                        page.sendall(piece)
                with contextlib.suppress(OSError):
                    assert page.recv(10) == b""
        with socket.create_connection(("127.0.0.1", port)) as person:
            person.sendall(b"POST is a word\nGET / HTTP/1.1\n")
            assert reader.wait(2) == ["POST is a word", "GET / HTTP/1.1"]
        assert reader.source.info["http"] == 3


def test_zmq_messages_are_lines() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with closing(Reader(text(f"zmq:{port}"))) as reader:
        context = zmq.Context()
        push = context.socket(zmq.PUSH)
        push.connect(f"tcp://127.0.0.1:{port}")
        for message in (b"hello", b"", b"\xff", b"two\nlines"):
            push.send(message)
        assert reader.wait(3) == ["hello", "two", "lines"]
        assert reader.source.info["garbage"] == 1
        with pytest.raises(SourceError, match="port"):
            text(f"zmq:{port}").open()
        context.destroy(linger=0)


# -- the camera, and the rest of the microphone that needs no device


@pytest.fixture
def mjpeg() -> Iterator[Any]:
    with virtual_devices.mjpeg_camera(rate_hz=50) as camera:
        yield camera


@pytest.mark.slow
def test_a_camera_on_loopback_gives_every_frame_in_time(mjpeg: Any) -> None:
    with closing(Camera(mjpeg.url, CameraSettings())) as camera:
        camera.open()
        assert camera.info["got"]["width"] == 320
        assert camera.info["asked"]["width"] == 640
        got = list(itertools.islice(camera.samples(always, 0), 50))
    seen = numbers(got)
    assert seen == list(range(seen[0], seen[0] + 50))
    late = [s.event_ns - mjpeg.sent[n] for s, n in zip(got, seen, strict=True)]
    assert min(late) > 0
    assert np.median(late) < 15e6
    assert all(s.capture_ns >= s.event_ns for s in got)


def test_a_camera_that_is_unplugged_is_lost_and_found(mjpeg: Any) -> None:
    with closing(Camera(mjpeg.url, CameraSettings())) as camera:
        camera.open()
        samples = camera.samples(always, 0)
        next(samples)
        mjpeg.stop()
        began = time.monotonic()
        with pytest.raises(SourceError, match="lost"):
            list(samples)
        assert time.monotonic() - began < 5
        with pytest.raises(SourceError, match="cannot be opened"):
            camera.open()
        mjpeg.start()
        camera.open()
        assert len(list(itertools.islice(camera.samples(always, 0), 5))) == 5
        assert list(camera.samples(lambda: False, 0)) == []


@pytest.mark.slow
def test_a_camera_may_be_a_file(movie: Path) -> None:
    with closing(Camera(str(movie), CameraSettings())) as camera:
        camera.open()
        began = time.monotonic()
        got = list(camera.samples(always, 0))
    assert numbers(got) == list(range(15))
    assert time.monotonic() - began > 1.2


@pytest.mark.parametrize("device", ["99", "http://127.0.0.1:9/none", "/no/such/film.mp4"])
def test_a_camera_that_is_not_there(device: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SourceError, match=f"camera:{device}"):
        Camera(device, CameraSettings()).open()
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_device_that_accepts_and_sends_nothing_does_not_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        with pytest.raises(SourceError):
            Camera(f"http://127.0.0.1:{server.getsockname()[1]}/x", CameraSettings()).open()
        assert time.monotonic() - began < 10


def test_cameras_can_be_listed() -> None:
    assert all(spec.startswith("camera:") for spec, _ in list_cameras())


@pytest.mark.parametrize(("rate", "channels"), [(48_000, 1), (44_100, 2), (8_000, 1)])
def test_resampled_blocks_keep_their_times(rate: int, channels: int) -> None:
    """A step at a known time comes out at that time, in blocks of one length."""
    resampler = BlockResampler(rate, channels, 320)
    frames = rate // 50
    step_at = 0.5
    blocks = []
    for k in range(50):
        t = (np.arange(frames) + k * frames) / rate
        data = np.repeat((8_000 * (t >= step_at)).astype(np.int16), channels)
        end_ns = 1_000 + round((k + 1) * frames / rate * 1e9)
        blocks += resampler.feed(data, end_ns)
    assert {len(b) for b, _ in blocks} == {320}
    assert {b.dtype for b, _ in blocks} == {np.dtype(np.int16)}
    ends = np.array([e for _, e in blocks])
    assert np.abs(np.diff(ends) - 20e6).max() < 200_000
    block, end_ns = next((b, e) for b, e in blocks if b.max() > 4_000)
    crossed = int(np.argmax(block > 4_000))
    assert abs((end_ns - 1_000) / 1e9 - (320 - crossed) / 16_000 - step_at) < 0.001


# -- names


def test_sources_by_name(tmp_path: Path) -> None:
    for spec, modality in (
        ("camera", "vision"),
        ("camera:0", "vision"),
        ("camera:http://127.0.0.1:9/x", "vision"),
        ("microphone", "audio"),
        ("microphone:pulse", "audio"),
        ("synthetic", "vision"),
        ("synthetic", "text"),
        ("synthetic", "other_audio"),
        ("microphone:pulse", "other_audio"),
        ("stdin", "other_text"),
        ("stdin", "text"),
        ("tcp:5555", "text"),
        ("zmq:5555", "text"),
        (f"pipe:{tmp_path}/p", "text"),
    ):
        sources.check(spec, modality, SHORT_FORMS[modality][0])
        source = sources.create_source(Stream.of(modality, source=spec), Settings())
        assert source.origin
        assert isinstance(source.info, dict)
        source.close()  # does nothing when it is not open


@pytest.mark.parametrize(
    ("spec", "modality"),
    [
        ("camera", "audio"),
        ("tcp:", "text"),
        ("tcp:x", "text"),
        ("zmq:70000", "text"),
        ("pipe:", "text"),
        ("tv", "vision"),
        ("tcp:5555", "other_audio"),
        ("microphone", "other_text"),
    ],
)
def test_names_that_are_wrong(spec: str, modality: str) -> None:
    with pytest.raises(SourceSpecError):
        sources.check(spec, modality, SHORT_FORMS[modality][0])


def test_text_and_other_text_cannot_share_a_source() -> None:
    for spec in ("stdin", "tcp:5555", "pipe:p"):
        with pytest.raises(SourceSpecError, match=f"text and other_text cannot both be '{spec}'"):
            sources.check_all([Stream.of("text", source=spec), Stream.of("other_text", source=spec)])
    for spec in ("synthetic", "none", "tcp:0"):
        sources.check_all([Stream.of("text", source=spec), Stream.of("other_text", source=spec)])
    sources.check_all([Stream.of("text"), Stream.of("other_text", source="stdin")])


def test_devices_have_one_person_and_the_synthetic_source_has_two() -> None:
    devices = sources.everything_from("devices")
    assert {devices[m] for m in ("other_audio", "other_text")} == {"none"}
    assert set(sources.everything_from("synthetic")) == set(devices) == set(sources.SYNTHETIC)
    assert set(sources.everything_from("synthetic").values()) == {"synthetic"}


def test_one_file_for_everything(movie: Path, tone_wav: Path) -> None:
    assert sources.everything_from(f"file:{movie}") == {
        "vision": f"file:{movie}",
        "audio": f"file:{movie}",
        "text": "none",
        "other_audio": "none",
        "other_text": "none",
    }
    sound = sources.create_source(Stream.of("other_audio", source=f"file:{movie}"), Settings())
    assert isinstance(sound, FileSound)
    assert sources.everything_from(f"file:{tone_wav}")["vision"] == "none"
