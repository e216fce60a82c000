"""Lab Streaming Layer against pylsl in separate processes, on this machine only."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import toy_model
from harness import Running, check_summary, run, verify
from places import TESTS

from stream_mmrnn.capture import encoders, sources
from stream_mmrnn.capture.encoders.signal import SignalEncoder
from stream_mmrnn.capture.lsl_runtime import clock_offset_ns, require
from stream_mmrnn.capture.sources.lsl import LostSamples, int16_of
from stream_mmrnn.core import config, topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError, SourceError, SourceSpecError, WireError
from stream_mmrnn.core.settings import LslSettings, Settings
from stream_mmrnn.core.streams import SHORT_FORMS, Stream
from stream_mmrnn.core.types import HeadSpec, ModalitySpec, Sample, Stamps
from stream_mmrnn.core.wire import PredictionMessage
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.viewers.lsl_outlet import Outlet

pytestmark = pytest.mark.process

pylsl = pytest.importorskip("pylsl", reason="pylsl (extra lsl) is not installed")

PEER = TESTS / "helpers" / "lsl_peer.py"
LABELS = ("yes", "no")


def unique(name: str) -> str:
    """A name that no stream of another test or run has."""
    return f"{name}-{uuid.uuid4().hex[:8]}"


class Peer:
    """The other program, and its output."""

    def __init__(self, *args: object, before: tuple[str, ...] = ()) -> None:
        command = [*before, sys.executable, str(PEER), *map(str, args)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.said: list[Any] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.said.extend(json.loads(line) for line in self.process.stdout)

    def finish(self) -> list[Any]:
        """Its whole output, after it has ended by itself."""
        assert self.process.wait(60) == 0, self.process.stderr and self.process.stderr.read()
        self.close()
        return self.said

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@contextmanager
def opened(spec: str, modality: str, settings: Settings | None = None) -> Iterator[Any]:
    source = sources.create_source(Stream.of(modality, source=spec), settings or Settings())
    end_ns = now_ns() + 20_000_000_000
    while True:
        try:
            source.open()
            break
        except SourceError:
            assert now_ns() < end_ns
    yield source
    source.close()


def read(source: Any, enough: Callable[[list[Sample]], bool]) -> list[Sample]:
    got: list[Sample] = []
    end_ns = now_ns() + 30_000_000_000
    for sample in source.samples(lambda: not enough(got) and now_ns() < end_ns, 0):
        got.append(sample)
    return got


def test_a_signal_comes_in_order_with_its_own_times() -> None:
    name = unique("eeg")
    with closing(Peer("send", name, "EEG", "float32", 4, 200, 120)) as peer, opened(f"lsl:{name}", "signal") as source:
        got = read(source, lambda got: len(got) >= 120)
        sent = peer.finish()
    assert [s.data.tolist() for s in got] == [values for _, _, values in sent]
    assert all(s.data.dtype == np.float32 for s in got)
    # the stamp is unchanged; the event time is the same moment on the local clock
    assert [s.device_ns for s in got] == [round(stamp * 1e9) for stamp, _, _ in sent]
    assert all(abs(s.event_ns - at_ns) < 20_000_000 for s, (_, at_ns, _) in zip(got, sent, strict=True))
    assert all(a.event_ns <= b.event_ns <= b.capture_ns for a, b in itertools.pairwise(got))
    assert source.info["stream"]["labels"] == ["c0", "c1", "c2", "c3"]
    assert source.info["clock"]["probes"] >= 1
    assert source.info["clock"]["history"]


def test_a_gap_in_the_stamps_of_a_fixed_rate_is_counted() -> None:
    samples = LostSamples(100.0)
    assert samples.count([10_000_000, 20_000_000, 90_000_000, 1_090_000_000]) == 99
    assert samples.count([1_100_000_000, 1_300_000_000]) == 19
    assert LostSamples(0.0).count([10_000_000, 9_000_000_000]) == 0, "events have no fixed rate"


def test_the_clock_of_another_machine_is_mapped_to_ours() -> None:
    """A sender in a time namespace: its clock is 5000 s ahead, as that of another machine would be."""
    ahead = ("unshare", "--time", "--monotonic", "5000", "--boottime", "5000", "--fork")
    try:
        able = subprocess.run([*ahead, "true"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        able = False
    if not able:
        pytest.skip("this system makes no time namespaces for this user (unshare --time)")
    name = unique("far")
    with (
        closing(Peer("send", name, "EEG", "float32", 1, 100, 60, before=ahead)) as peer,
        opened(f"lsl:name={name}", "signal") as source,
    ):
        got = read(source, lambda got: len(got) >= 60)
        sent = peer.finish()
    assert [s.data[0] for s in got] == [values[0] for _, _, values in sent]
    for sample, (_, their_ns, _) in zip(got, sent, strict=True):
        assert abs(sample.event_ns - (their_ns - 5000 * 10**9)) < 20_000_000
        assert abs(sample.device_ns - sample.event_ns - 5000 * 10**9) < 20_000_000
    assert abs(source.info["clock"]["offset_ns"] + 5000 * 10**9) < 20_000_000


def test_strings_are_text_and_fast_numbers_are_sound() -> None:
    name = unique("words")
    settings = config.parse({"text": {"max_line_bytes": 16}})
    with (
        closing(Peer("send", name, "Markers", "string", 1, 0, 12, "grüß ")) as peer,
        opened(f"lsl:type=Markers", "text", settings) as source,  # noqa: F541 the type, whatever the name
    ):
        got = read(source, lambda got: len(got) >= 12)
        sent = peer.finish()
    assert [s.data.decode() for s in got] == [values[0] for _, _, values in sent]

    name = unique("sound")
    with closing(Peer("send", name, "Audio", "int16", 1, 8000, 4000)), opened(f"lsl:{name}", "audio") as source:
        got = read(source, lambda got: len(got) >= 10)
    assert all(s.data.dtype == np.int16 and s.data.shape == (320,) for s in got)
    assert all(a.event_ns < b.event_ns for a, b in itertools.pairwise(got))
    assert max(int(s.data.max()) for s in got) > 5000


def test_an_invalid_source_is_an_error() -> None:
    for spec, modality in (
        ("lsl:", "signal"),
        ("lsl:color=red", "signal"),
        ("lsl:x", "vision"),
        ("synthetic", "signal"),
    ):
        with pytest.raises(SourceSpecError):
            sources.check(spec, modality, SHORT_FORMS[modality][0])
    sources.check("lsl:type=EEG", "signal", "signal")
    name = unique("words")
    source = sources.create_source(Stream.of("signal", source=f"lsl:{name}"), Settings())
    with pytest.raises(SourceError, match="no stream has that name on this machine"):
        source.open()
    with pytest.raises(SourceError, match="call open"):
        next(source.samples(lambda: True, 0))
    outlet = pylsl.StreamOutlet(pylsl.StreamInfo(name, "Markers", 1, 0, "string", name))
    with pytest.raises(SourceError, match="signal needs at most"):
        source.open()
    source.close()
    del outlet


def test_a_missing_package_is_an_error_with_the_command_to_install_it() -> None:
    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'pylsl' else find(name, *a)\n"
        "from stream_mmrnn.cli.app import run; sys.argv = ['stream-mmrnn', *sys.argv[1:]]; run()"
    )
    for asked in (("--signal", "lsl:x"), ("--lsl-out",)):
        command = [sys.executable, "-c", code, "live", "--source", "synthetic", *asked]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert "needs the extra `lsl` (pylsl missing): pip install 'stream-mmrnn[lsl]'" in done.stderr
    # without its file the library would use all networks
    with pytest.raises(FileError, match="which is no file"):
        require(LslSettings(config="/no/such.cfg"))


def test_sound_of_any_type_is_16_bits() -> None:
    assert int16_of(np.array([0.0, 1.0, -1.0, 2.0, np.nan], np.float32)).tolist() == [0, 32767, -32767, 32767, 0]
    assert int16_of(np.array([-(2**15), 2**15 - 1], np.int16)).tolist() == [-(2**15), 2**15 - 1]
    assert int16_of(np.array([-(2**31), 2**31 - 1], np.int32)).tolist() == [-(2**15), 2**15 - 1]
    assert int16_of(np.array([-128, 127], np.int8)).tolist() == [-(2**15), 127 * 256]


def test_a_signal_is_encoded_as_it_is() -> None:
    encoder = SignalEncoder()
    sample = Sample(1, 2, np.array([1.0, -2.5], np.float32), 3)
    assert encoder.encode(sample) == [sample]
    for bad in (b"1.0", np.zeros(2), np.zeros((2, 2), np.float32), np.array([np.nan], np.float32)):
        with pytest.raises(WireError):
            encoder.encode(Sample(1, 2, bad))
    assert encoders.create_encoder("signal").origin == encoder.origin


HEADS = (
    HeadSpec("next", "classification", 2, LABELS),
    HeadSpec("ahead", "activity_projection", 2, horizons_s=((0.0, 0.2), (0.2, 0.4))),
)


def predictions(count: int) -> list[PredictionMessage]:
    at_ns = now_ns()
    out = []
    for k in range(count):
        event_ns = at_ns + k * 40_000_000
        heads = {"next": [k / 7, None], "ahead": [float(k), -1.5]}
        closed = Stamps(event_ns, event_ns, event_ns, event_ns, "clock")
        out.append(PredictionMessage(k, event_ns, heads, {}, {}, closed, event_ns, event_ns, "sha"))
    return out


def test_a_reader_of_our_outlet_gets_every_prediction() -> None:
    name = unique("out")
    settings = LslSettings(name=name)
    spec = msgspec.to_builtins({"name": "toy", "sha256": "ab", "tick_ns": 40_000_000, "heads": HEADS})
    with pytest.raises(WireError, match="names no model"):
        Outlet(settings, "live", {"name": 3})
    outlet = Outlet(settings, "live", spec)
    with closing(Peer("read", name)) as reader:
        assert outlet._outlet.wait_for_consumers(30)
        while not reader.said:
            assert reader.process.poll() is None
        sent = predictions(100)
        for prediction in sent:
            outlet.push(prediction)
        with pytest.raises(WireError, match="other heads"):
            outlet.push(msgspec.structs.replace(sent[0], heads={"next": [0.1, 0.2]}))
        outlet.close()
        head, *rows = reader.finish()
    assert head["ready"] == ["next.yes", "next.no", "ahead.0", "ahead.1"]
    assert head["rate_hz"] == 25.0
    assert "<from_s>0.2</from_s>" in head["xml"]
    assert "<model_sha256>ab</model_sha256>" in head["xml"]
    assert outlet.pushed == len(rows) == 100
    offset_ns = clock_offset_ns(pylsl)
    for (stamp, values), prediction in zip(rows, sent, strict=True):
        said = [np.nan if v is None else v for h in prediction.heads.values() for v in h]
        assert np.array_equal(np.array(values, np.float32), np.array(said, np.float32), equal_nan=True)
        assert abs(stamp * 1e9 + offset_ns - prediction.event_ns) < 1_000_000


@pytest.fixture(scope="module")
def signal_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = encoders.create_encoder("text")
    specs = (ModalitySpec("signal", 2, SignalEncoder.origin), ModalitySpec("text", text.size, text.origin))
    return toy_model.make(tmp_path_factory.mktemp("models") / "signal.onnx", specs)


def test_a_session_on_streams_that_disappear_and_return(signal_model: Path, tmp_path: Path) -> None:
    """Two streams in, the predictions out, all of it recorded."""
    path, out, eeg, words = tmp_path / "a.mcap", unique("out"), unique("eeg"), unique("words")
    settings = tmp_path / "s.toml"
    settings.write_text(f'[lsl]\nname = "{out}"\n[dashboard]\nenabled = false\n[supervisor]\nreopen_s = 0.1\n')
    with (
        closing(Peer("send", eeg, "EEG", "float32", 2, 100, 100_000)) as first,
        closing(Peer("send", words, "Markers", "string", 1, 10, 100_000, "word ")),
        closing(
            Running(
                *("--config", settings, "--vision", "none", "--audio", "none", "--text", f"lsl:{words}"),
                *("--signal", f"lsl:{eeg}", "--model", signal_model, "--record", path, "--lsl-out"),
            )
        ) as live,
        closing(Peer("read", out)) as reader,
    ):
        live.wait_for(lambda: len(reader.said) > 25)
        live.wait_for(lambda: len(first.said) > 50)
        first.close()
        live.wait_for(lambda: any("signal: " in line and "is lost" in line for line in live.lines))
        with closing(Peer("send", eeg, "EEG", "float32", 2, 100, 100_000)) as again:
            live.wait_for(lambda: any("signal: is back" in line for line in live.lines))
            live.wait_for(lambda: len(again.said) > 50)
            code, summary, _ = live.end()
        reader.finish()
    assert code == 0
    check_summary(summary)
    assert summary["viewers"]["lsl"]["balanced"]
    assert set(summary["streams"]) == {"signal", "text"}
    verify(path, summary["predictions"])

    recording = Recording(path)
    signal = list(recording.envelopes({topics.feature("signal")}))
    counts = [e.payload[0] for e in signal]
    [restart] = [i for i in range(1, len(counts)) if counts[i] < counts[i - 1]]
    for part in (counts[:restart], counts[restart:]):
        assert np.array_equal(np.diff(part), np.ones(len(part) - 1)), "every sample, in order"
    assert all(a.event_ns <= b.event_ns for a, b in itertools.pairwise(signal))
    assert all(e.device_ns for e in signal)
    detail = json.loads(recording.end["statuses"])["status/signal"]["detail"]
    assert detail["stream"]["name"] == eeg
    assert detail["clock"]["probes"] >= 1
    texts = [bytes(e.payload).decode() for e in recording.envelopes({"raw/text"})]
    assert texts == [f"word {k}" for k in range(len(texts))]
    assert len(texts) > 5

    head, *rows = reader.said
    assert head["ready"] == ["next.yes", "next.no"]
    assert head["rate_hz"] == 25.0
    recorded = list(recording.predictions())
    late = recorded[len(recorded) - len(rows) :]  # the reader connected while it was running, and has every one since
    assert len(rows) > 25
    offset_ns = clock_offset_ns(pylsl)
    for (stamp, values), prediction in zip(rows, late, strict=True):
        assert np.array_equal(np.float32(values), np.float32(prediction.heads["next"]))
        assert abs(stamp * 1e9 + offset_ns - prediction.event_ns) < 1_000_000


def test_usage(tmp_path: Path) -> None:
    code, _, err = run("live", "--source", "synthetic", "--signal", "lsl:color=red")
    assert code == 2
    assert "names no stream" in err
