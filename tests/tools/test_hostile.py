"""What a hostile peer or file may send: the single faults that were found, and the decoders fed with hypothesis."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard
from places import ROOT
from rich.console import Console

from stream_mmrnn.bench.models import gru_step
from stream_mmrnn.bus import Gaps
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.clock import RateLimiter
from stream_mmrnn.core.errors import ConfigError, FileError, ModelError, StreamError, WireError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.types import Envelope, ModalitySpec, Stamps
from stream_mmrnn.graph import model_file as onnx_bytes
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.pipeline import predict
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.report import info
from stream_mmrnn.viewers.dashboard.state import LiveState
from stream_mmrnn.viewers.terminal_view import render
from tools import fuzz
from tools.faults.hostile import unsafe_loads
from tools.hostile import mutate, watch
from tools.hostile.decoders import PROPERTIES
from tools.hostile.files import records_of, write_recording
from tools.hostile.targets import numbered

DEEP = b"[" * 100_000 + b"]" * 100_000
TICK_NS = 40_000_000


# ---- the wire ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [wire.SessionMessage, wire.TickMessage, wire.PredictionMessage, wire.StatusMessage])
@pytest.mark.parametrize("nasty", mutate.NASTY_JSON, ids=lambda text: text[:12])
def test_a_nasty_value_is_refused_by_a_typed_error(kind: type, nasty: str) -> None:
    body = f'{{"op":"open","node":"n","state":"ready","event_ns":{nasty},"detail":{{"a":{nasty}}}}}'
    try:
        wire.unpack(body.encode("utf-8", "surrogatepass"), kind)
    except WireError:
        return
    assert kind in (wire.SessionMessage, wire.StatusMessage)


def test_a_header_nested_without_end_is_refused() -> None:
    head = msgspec.msgpack.encode([wire.VERSION, "a", 0, 0, 0, 0, "", "", [0]])
    with pytest.raises(WireError):
        wire.decode([b"clock", b"\x9a" + head[1:] + b"\x91" * 100_000 + b"\xc0", b""])


@pytest.mark.parametrize("name", [n for n in mutate.NASTY_NAMES if n.isascii()])
def test_no_name_of_a_session_leads_out_of_a_folder(name: str) -> None:
    with pytest.raises(WireError):
        wire.decode([b"clock", msgspec.msgpack.encode([wire.VERSION, name, 0, 0, 0, 0, "", "", [0]]), b""])
    with pytest.raises(ConfigError):
        config.parse({"session": {"name": name}})


def test_json_beyond_the_cap_is_not_read() -> None:
    with pytest.raises(WireError, match="at most"):
        wire.unpack(b" " * wire.MAX_JSON_BYTES + b"{}", wire.SessionMessage)


# ---- the aligner -------------------------------------------------------------------------------------------------


def clock(at_ns: int) -> Envelope:
    return Envelope(topics.CLOCK, topics.EVERYONE, 0, at_ns, at_ns, at_ns, b"")


def feature(seq: int, at_ns: int) -> Envelope:
    return Envelope(topics.feature("text"), "s", seq, at_ns, at_ns, at_ns, np.ones(2, np.float32))


def aligner() -> Aligner:
    made = Aligner((ModalitySpec("text", 2),), TICK_NS, {})
    made.open("s", 0)
    return made


def test_a_clock_out_of_nowhere_makes_no_ticks_and_the_real_one_goes_on() -> None:
    a = aligner()
    assert a.push(clock(2**63 - 1)) == []
    assert a.malformed == 1
    assert [t.index for t in a.push(clock(3 * TICK_NS))] == [1, 2, 3]


def test_a_clock_that_stood_still_for_a_day_is_believed_at_its_second_word() -> None:
    a, day_ns = aligner(), 86_400_000_000_000
    a.push(feature(0, 10))
    assert a.push(clock(day_ns)) == []
    ticks = a.push(clock(day_ns + 10_000_000))
    assert 0 < len(ticks) <= 15_001
    assert ticks[-1].index == (day_ns + 10_000_000) // TICK_NS
    assert [t.index for t in ticks if t.present["text"]] == [ticks[0].index]  # what had waited is not lost
    counts = a.counts["text"]
    assert (counts.received, counts.used) == (1, 1)


def test_a_session_that_closes_at_the_end_of_time_closes_what_there_is() -> None:
    a = aligner()
    a.push(clock(TICK_NS))
    stamps = Stamps(0, 0, 0, 0, topics.SESSION)
    assert len(a.close("s", 2**63 - 1, stamps)) <= 15_001
    a.open("s", -(2**63))
    a.push(clock(2**60))
    assert len(a.push(clock(2**60 + 1))) <= 15_001


@pytest.mark.slow
def test_samples_of_one_tick_are_bounded_and_counted() -> None:
    a = aligner()
    for seq in range(5000):
        a.push(feature(seq, 100))
    counts = a.counts["text"]
    assert counts.quarantined == 5000 - 4096
    assert "4096" in a.misfits["text"]
    a.push(clock(TICK_NS))
    assert counts.received == counts.used + sum(counts.dropped().values()) == 5000


@pytest.mark.parametrize("number", [3e38, -3e38, 1e13, float("nan"), float("inf"), float("-inf")])
def test_one_huge_number_does_not_poison_a_session_for_good(number: float, toy: Path) -> None:
    engine = StepEngine(toy)
    a = Aligner.of(engine.spec.modalities, engine.spec.tick_ns, Settings())
    payload = wire.pack(wire.SessionMessage("open", 0, ("audio",)))
    messages = [Envelope(topics.SESSION, "s", 0, 0, 0, 0, payload)]
    for seq in range(6):
        at_ns = (seq + 1) * TICK_NS
        row = np.array([0.1, number if seq == 2 else 0.2, 0.3], np.float32)
        messages.append(Envelope(topics.feature("audio"), "s", seq, at_ns, at_ns, at_ns, row))
        messages.append(clock(at_ns))
    messages.append(clock(7 * TICK_NS))
    said = list(predict(messages, a, engine))
    assert all(np.isfinite(values).all() for p in said for values in p.heads.values())
    assert [p.tick.present["audio"] for p in said] == [True, True, False, True, True, True]
    assert a.counts["audio"].quarantined == 1
    assert "number" in a.misfits["audio"]


# ---- what shrinks again ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sessions_opened_and_closed_thousands_of_times_leave_no_state(toy: Path) -> None:
    import gc
    import tracemalloc

    engine = StepEngine(toy, 2)
    a = Aligner.of(engine.spec.modalities, engine.spec.tick_ns, Settings())
    gaps, view = Gaps(), LiveState()

    def life(number: int) -> None:
        name, at_ns = f"s{number}", number * 10 * TICK_NS
        for op, when_ns in (("open", at_ns), ("close", at_ns + 5 * TICK_NS)):
            payload = wire.pack(wire.SessionMessage(op, when_ns, ("audio",)))  # type: ignore[arg-type]
            messages = [Envelope(topics.SESSION, name, 0, when_ns, when_ns, when_ns, payload, "", when_ns)]
            if op == "open":
                messages += [
                    Envelope(topics.feature("audio"), name, k, t, t, t, np.ones(3, np.float32), "", t)
                    for k in range(4)
                    for t in [at_ns + k * TICK_NS + 1]
                ]
            for e in messages:
                gaps.observe(e)
                view.observe(e)
            for p in predict(messages, a, engine):
                body = wire.pack(wire.prediction_message(p))
                view.observe(Envelope(topics.PREDICTION, name, 0, p.tick.event_ns, 0, 0, body, "", p.tick.event_ns))

    tracemalloc.start()
    for number in range(2000):  # until every bounded table is full
        life(number)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(2000, 4000):
        life(number)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(engine) == 0
    assert grown < 100_000, f"{grown} bytes grew over 2000 sessions"


def told(op: str, session: str, seq: int) -> Envelope:
    payload = wire.pack(wire.SessionMessage(op, 0, ()))  # type: ignore[arg-type]
    return Envelope(topics.SESSION, session, seq, 0, 0, 0, payload)


def test_numbers_of_streams_are_bounded_and_an_ended_session_is_not_called_lost() -> None:
    gaps = Gaps()
    for seq in range(5):
        gaps.observe(Envelope(topics.TICK, "a", seq, 0, 0, 0, b""))
    gaps.observe(told("close", "a", 0))
    gaps.observe(Envelope(topics.TICK, "a", 5, 0, 0, 0, b""))
    assert gaps.lost == {}
    for n in range(200_000):
        gaps.observe(Envelope(topics.STATUS + str(n), topics.EVERYONE, 7, 0, 0, 0, b""))
    assert len(gaps.snapshot()[0]) <= 2 * 65_536
    assert set(gaps.received) == {topics.TICK, topics.STATUS, topics.SESSION}
    assert gaps.lost == {}


def test_a_reader_remembers_few_of_the_sessions_that_have_ended() -> None:
    """Messages after the end of a session do not count as a new session."""
    gaps = Gaps()
    for n in range(3000):
        gaps.observe(told("open", f"s{n}", 0))
        for topic in (topics.feature("audio"), topics.TICK, topics.PREDICTION):
            gaps.observe(Envelope(topic, f"s{n}", 0, 0, 0, 0, b""))
        gaps.observe(told("close", f"s{n}", 1))
        gaps.observe(Envelope(topics.PREDICTION, f"s{n}", 1, 0, 0, 0, b""))
        gaps.observe(Envelope(topics.LABEL, f"s{n}", 0, 0, 0, 0, b""))
    numbers, ended, _, _ = gaps.snapshot()
    assert (len(numbers), len(ended)) == (0, 256)
    assert gaps.lost == {}
    gaps.observe(Envelope(topics.PREDICTION, "s2999", 4, 0, 0, 0, b""))
    assert gaps.lost == {topics.PREDICTION: 2}
    # one that goes on under its old name is counted on, and no longer forgotten
    gaps.observe(told("open", "s2999", 2))
    gaps.observe(Envelope(topics.PREDICTION, "s2999", 6, 0, 0, 0, b""))
    assert gaps.lost == {topics.PREDICTION: 3}
    assert {(topic, session) for topic, session, _ in gaps.snapshot()[0]} == {
        (t, "s2999") for t in (topics.SESSION, topics.feature("audio"), topics.TICK, topics.PREDICTION, topics.LABEL)
    }
    gaps.observe(Envelope(topics.SESSION, "s2999", 3, 0, 0, 0, b"garbage"))  # says nothing, and is counted
    assert gaps.received[topics.SESSION] == 3000 * 2 + 2


def test_what_is_said_of_one_is_said_once_a_second() -> None:
    rate_limiter = RateLimiter()
    said = [at for at in range(0, 5_000_000_000, 1_000_000) if rate_limiter("camera", at)]
    assert said == [0, 1_000_000_000, 2_000_000_000, 3_000_000_000, 4_000_000_000]
    assert rate_limiter("engine", 5_000_000)
    for n in range(1000):
        rate_limiter(str(n), 0)
    assert len(rate_limiter._next_ns) <= 257


# ---- the page and the terminal -----------------------------------------------------------------------------------


def test_words_from_outside_are_drawn_as_words() -> None:
    view = LiveState()
    evil = "[/red]\x1b[2J[link=file:///etc]"
    stamps = Stamps(1, 1, 1, 1, topics.CLOCK)
    message = wire.PredictionMessage(1, 1, {evil: [0.5]}, {evil: True}, {}, stamps, 1, 1, evil)
    view.observe(Envelope(topics.PREDICTION, "a", 0, 2**63 - 1, 1, -(2**63), wire.pack(message), "", 1))
    status = wire.StatusMessage("engine", "ready", 1, evil, evil, {evil: 1})
    view.observe(Envelope(topics.STATUS + "engine", topics.EVERYONE, 0, 1, 1, 1, wire.pack(status), "", 1))
    state = view.snapshot(2)
    console = Console(width=80, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(render(state, 80, "x", [evil]))
    console.file.close()
    assert "\x1b[2J" not in msgspec.json.encode(state).decode()
    assert "[/red]" in console.export_text()


# ---- files -------------------------------------------------------------------------------------------------------


def _with_chunk(data: bytes, change: object) -> bytes:
    """The recording with its first chunk's (size, packed) replaced."""
    out = [data[:8]]
    changed = False
    for opcode, content in records_of(data):
        if opcode == 0x06 and not changed:
            changed = True
            size, _, name_size = struct.unpack_from("<16xQII", content)
            at = 32 + name_size
            size, packed = change(size, content[at + 8 :])  # type: ignore[operator]
            head = bytearray(content[:at])
            struct.pack_into("<QI", head, 16, size, 0)
            content = bytes(head) + struct.pack("<Q", len(packed)) + packed
        out.append(struct.pack("<BQ", opcode, len(content)) + content)
    return b"".join(out) + data[:8]


@pytest.mark.parametrize(
    "change",
    [
        lambda size, packed: (size, zstandard.ZstdCompressor().compress(bytes(300 << 20))),
        lambda size, packed: (300 << 20, zstandard.ZstdCompressor().compress(bytes(300 << 20))),
        lambda size, packed: (size, b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**45) + b"\x01\0\0"),
    ],
    ids=["bomb", "honest bomb", "forged size"],
)
def test_a_decompression_bomb_is_a_damaged_record(tmp_path: Path, change: object) -> None:
    import resource

    path = tmp_path / "x.mcap"
    path.write_bytes(_with_chunk(write_recording(tmp_path / "good.mcap"), change))
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recording = Recording(path)
    assert list(recording.envelopes()) == []
    assert "damaged record" in recording.damage
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 100_000


def test_the_recorder_writes_nothing_that_cannot_be_read_back(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "x.mcap", "a", {})
    bad = [
        Envelope(topics.CONTROL, "a", 0, 1, 1, 1, b"stop"),
        Envelope(topics.raw("audio"), "a", 0, 1, 1, 1, b"odd"),
        Envelope(topics.raw("audio"), "a", 0, 1, 1, 1, np.zeros(3, np.float32)),
        Envelope(topics.SESSION, "a", 0, 1, 1, 1, b'{"event_ns":1,"x":' + DEEP + b"}"),
        *(Envelope(topics.raw("text"), "a", 0, 1, 1, 1, b"x", f"origin {k}") for k in range(2000)),
    ]
    for envelope in bad:
        recorder.write(envelope)
    assert recorder.unwritable == 4 + 2000 - 1024
    recorder.write(Envelope(topics.raw("text"), "a", 1, 1, 1, 1, b"last", "origin 3"))
    recorder.close({})
    recording = Recording(tmp_path / "x.mcap")
    read = list(recording.envelopes())
    assert (len(read), read[-1].payload, recording.damage) == (1025, b"last", "")


@pytest.mark.parametrize("name", ["../x", "", "a/b", "a\n"])
def test_a_recording_of_a_session_without_a_name_is_refused(tmp_path: Path, name: str) -> None:
    recorder = Recorder(tmp_path / "x.mcap", name, {})
    recorder.close({})
    with pytest.raises(FileError):
        Recording(tmp_path / "x.mcap")


def test_the_end_of_a_recording_may_say_anything(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "x.mcap", "a", {})
    recorder.close({"lost": "[" * 100_000})
    found = info(tmp_path / "x.mcap")
    assert (found["whole"], found["lost"]) == (False, {})
    assert "damaged end" in found["damage"]


# ---- models and settings -----------------------------------------------------------------------------------------


def _refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=words):
        StepEngine(path)


def test_what_leads_out_of_a_model_file_is_refused_before_anything_native_reads_it(tmp_path: Path) -> None:
    good = gru_step(8)
    location = onnx_bytes.string(1, "location") + onnx_bytes.string(2, "../../etc/passwd")
    weights = onnx_bytes.integer(1, 4) + onnx_bytes.integer(2, 1) + onnx_bytes.string(8, "w")
    outside = weights + onnx_bytes.message(13, location) + onnx_bytes.integer(14, 1)
    graph = onnx_bytes.message(onnx_bytes.MODEL_GRAPH, onnx_bytes.message(onnx_bytes.GRAPH_INITIALIZER, outside))
    _refused(tmp_path, graph, "another file")
    custom = onnx_bytes.message(onnx_bytes.MODEL_GRAPH, onnx_bytes.node("X", ["a"], ["b"], "n", domain="evil.so"))
    _refused(tmp_path, custom, "evil.so")
    deep = b""
    for _ in range(20):
        deep = onnx_bytes.message(1, onnx_bytes.message(5, onnx_bytes.string(1, "body") + onnx_bytes.message(6, deep)))
    _refused(tmp_path, onnx_bytes.message(onnx_bytes.MODEL_GRAPH, deep), "deep")
    _refused(tmp_path, good + good, "2 graphs")
    _refused(tmp_path, good[:-3], "cut off")
    _refused(tmp_path, b"", "0 graphs")


def test_a_model_that_is_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    for path in (tmp_path / "pipe.onnx", Path("/dev/zero"), tmp_path):
        with pytest.raises(ModelError, match="is no file"):
            Graph(path)
    with pytest.raises(ModelError):
        Graph(Path("a\0b"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * 5000, "not valid TOML"),
        ("a = " + "9" * 5000, "not valid TOML"),
        ("# " + "x" * 2**20, "more than"),
        ("[align]\nmax_ahead_ms = inf", "max_ahead_ms"),
        ("[supervisor]\nbackoff_s = inf", "backoff_s"),
        ("[session]\nname = 'a\\n'", "name"),
    ],
)
def test_settings_that_no_person_wrote_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        config.load(tmp_path / "x.toml")


# ---- generated ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("decoder", PROPERTIES)
def test_a_decoder_refuses_by_errors_of_ours(decoder: str) -> None:
    PROPERTIES[decoder]()


def test_the_same_properties_take_bytes_of_a_fuzzer() -> None:
    prop: Any = PROPERTIES["wire"]
    prop.hypothesis.fuzz_one_input(bytes(range(256)) * 4)
    assert fuzz.main(["fuzz", "nothing"]) == 2


@pytest.mark.slow
def test_the_decoders_tell_what_is_bad_from_what_is_not(tmp_path: Path) -> None:
    """Mutants that nothing refuses, or everything, would prove nothing."""
    for decoder in ("wire", "json", "recordings", "models", "contracts", "settings", "snapshots"):
        raised = [e for _, e in numbered(decoder, tmp_path, 200, 400)]
        assert all(e is None or isinstance(e, StreamError) for e in raised)
        assert 0 < sum(e is not None for e in raised) < 200, decoder


# ---- the watch ---------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_crash_a_hang_and_a_foreign_error_are_seen_and_cost_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HANG_S", 5.0)  # a child starts in less, on a busy machine, too
    monkeypatch.setattr(watch, "MODULE", "hostile_target")
    found = watch.run("bad", 10, print)
    assert (found.cases, found.native, found.hangs) == (10, [3], [5])
    assert [c.split(":")[0] for c in found.crashes] == ["7"]
    assert found.refused == 1


@pytest.mark.slow
def test_the_sources_hold_no_way_to_run_bytes(tmp_path: Path) -> None:
    root = ROOT
    assert unsafe_loads((root / "stream_mmrnn", root / "tools")) == []
    (tmp_path / "bad.py").write_text(
        "import pickle\nfrom marshal import loads\neval('1')\nnp.load(f, allow_pickle=True)\ntorch.load(f)\n"
        "torch.load(f, weights_only=True)\nmodel.eval()\nnp.load(f, allow_pickle=False)\nre.compile('x')\n"
    )
    assert [f.split(":")[1].split()[0] for f in unsafe_loads((tmp_path,))] == ["1", "2", "3", "4", "5"]
