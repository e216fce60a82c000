"""Targets that read files: recordings, models, snapshots, contracts and settings."""

from __future__ import annotations

import struct
import time
import zlib
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import zstandard

from stream_mmrnn.bench.models import gru_step
from stream_mmrnn.capture import sources
from stream_mmrnn.core import config, processes, topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.contract import beside
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.snapshots import Snapshot, StateStore, from_bytes, to_bytes
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.repair import repair
from stream_mmrnn.recording.report import info, verify
from stream_mmrnn.recording.settings import settings_of
from tools.hostile import mutate
from tools.hostile.messages import EVERY_TOPIC, KINDS, said
from tools.hostile.target import TICK_NS

# ---- files -------------------------------------------------------------------------------------------------------


def write_recording(path: Path) -> bytes:
    """A recording of all topics, as the recorder writes it."""
    settings = msgspec.json.encode(Settings()).decode()
    recorder = Recorder(path, "live", {"raw": "true", "slots": "1", "model": "turn_taking", "config": settings}, 1.0)
    rng, base_ns = Random(1), now_ns()
    for seq in range(60):
        for topic in EVERY_TOPIC:
            if topic == topics.CONTROL:
                continue
            at_ns = base_ns + seq * TICK_NS
            payload: Any = b""
            if topic.startswith(topics.FEATURE):
                payload = np.ones(8, np.float32)
            elif topic in KINDS:
                payload = said(topic, rng)
            elif topic in (topics.raw("audio"), topics.raw("other_audio")):
                payload = np.arange(320, dtype=np.int16)
            elif topic != topics.CLOCK:
                payload = b"some bytes"
            recorder.write(Envelope(topic, "live", seq, at_ns, at_ns, at_ns, payload, "x@0"))
        recorder.flush_due(base_ns + seq * 2_000_000)
    recorder.close({"ended": "clean", "lost": "{}", "statuses": "{}"})
    return path.read_bytes()


_RECORD = struct.Struct("<BQ")
_CHUNK = struct.Struct("<16xQII")


def records_of(data: bytes) -> list[tuple[int, bytes]]:
    """(opcode, content) of the top-level records of an MCAP file."""
    out, at = [], 8
    while at + 9 <= len(data) - 8:
        opcode, length = _RECORD.unpack_from(data, at)
        out.append((opcode, data[at + 9 : at + 9 + length]))
        at += 9 + length
    return out


def bad_chunk(content: bytes, rng: Random) -> bytes:
    """A chunk whose records, sizes or compression lie, with a checksum that does not give it away."""
    name_size = _CHUNK.unpack_from(content)[2]
    head, at = bytearray(content[: 16 + 8 + 4 + 4 + name_size]), 16 + 8 + 4 + 4 + name_size + 8
    data = zstandard.ZstdDecompressor().decompress(content[at:])
    kind = rng.randrange(6)
    if kind < 3:
        data = mutate.flipped(data, rng, 4)
    size = len(data)
    packed = zstandard.ZstdCompressor().compress(data)
    if kind == 3:  # a bomb, that says what it is or does not
        bomb = bytes(rng.choice((2**20, 2**27)))
        packed, size = zstandard.ZstdCompressor().compress(bomb), rng.choice((size, len(bomb)))
    elif kind == 4:  # a frame that asks for as much as there is
        packed, size = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", rng.choice((2**30, 2**45))) + b"\x01\0\0", 2**20
    elif kind == 5:
        size = rng.choice(mutate.NASTY_NUMBERS) % 2**64
    struct.pack_into("<QI", head, 16, size, rng.choice((0, zlib.crc32(data))))
    return bytes(head) + struct.pack("<Q", rng.choice((len(packed), len(packed), 2**63))) + packed


class Recordings:
    """`Recording`, whoever wrote the file, and what the verbs do with it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "x.mcap"
        self._whole = write_recording(folder / "whole.mcap")
        self._other = write_recording(folder / "other.mcap")
        self._records = records_of(self._whole)
        self._specs = StepEngine(write_model(folder)).spec

    def _case(self, rng: Random, number: int) -> bytes:
        kind = rng.randrange(6)
        if kind == 0:
            return mutate.flipped(self._whole, rng)
        if kind == 1:
            return mutate.spliced(self._whole, self._other, rng)
        if kind == 2:
            return self._whole[: rng.randrange(len(self._whole))]
        records = list(self._records)
        i = rng.randrange(len(records))
        opcode, content = records[i]
        if kind == 3:
            chunks = [k for k, (o, _) in enumerate(records) if o == 0x06]
            i = rng.choice(chunks)
            records[i] = (0x06, bad_chunk(records[i][1], rng))
        elif kind == 4:
            records[i] = (opcode, mutate.flipped(content, rng, 4))
        else:
            records.insert(i, rng.choice(records))
            rng.shuffle(records) if rng.randrange(3) == 0 else None
        out = self._whole[:8] + b"".join(_RECORD.pack(o, len(c)) + c for o, c in records) + self._whole[:8]
        if rng.randrange(8) == 0:
            at = 8 + 1
            out = out[:at] + struct.pack("<Q", rng.choice(mutate.NASTY_NUMBERS) % 2**64) + out[at + 8 :]
        return out

    def case(self, rng: Random, number: int) -> None:
        self._path.write_bytes(self._case(rng, number))
        recording = Recording(self._path)
        aligner = Aligner(self._specs.modalities, self._specs.tick_ns, {})
        for envelope in recording.envelopes():
            if envelope.topic == topics.SESSION:
                aligner.open(envelope.session, envelope.event_ns)
            aligner.push(envelope)
        msgspec.json.encode(info(self._path))
        settings_of(recording)
        for _ in recording.predictions():
            pass
        if number % 4 == 0:
            self._mend()

    def _mend(self) -> None:
        """What can be read of it can be read of what `repair` makes of it."""
        mended = self._path.with_name("mended.mcap")
        mended.unlink(missing_ok=True)
        msgspec.json.encode(verify(self._path))
        repair(self._path, mended)
        for _ in Recording(mended).envelopes():
            pass

    def close(self) -> dict[str, int]:
        return {}


def write_model(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(gru_step(8))
    return path


class Models:
    """The model loader, up to a step: our checks, onnxruntime, the contract, the rows."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "bad.onnx"
        self._good = gru_step(8)
        self._small = gru_step(8, kind="int8")

    def case(self, rng: Random, number: int) -> None:
        good = rng.choice((self._good, self._small))
        data = mutate.protobuf(good, rng) if rng.randrange(4) else mutate.flipped(good, rng)
        for _ in range(rng.randrange(3)):
            data = mutate.protobuf(data, rng)
        self._path.write_bytes(data)
        StepEngine(self._path, 2)

    def close(self) -> dict[str, int]:
        return {}


CONTRACT = """
name = "x"
tick_ms = 40.0
active = "active"
reset = "reset"
present = "present"
age = "age"
modalities = [{name = "signal", size = 256, input = "input.signal", reduction = "mean", stack = 1}]
heads = [{name = "next", kind = "classification", size = 8, output = "head.next", labels = ["a", "b"]}]
states = [
  {input = "state.cell.0.h", output = "next.cell.0.h", batch_axis = 0},
  {input = "state.cell.1.h", output = "next.cell.1.h"},
]
"""
NASTY_TOML = (
    *(str(n) for n in mutate.NASTY_NUMBERS), "9" * 5000, "nan", "inf", "-inf", "1e400", "true", '""', "[]", "{}",
    "[" * 5000, "[[[[]]]]", "1979-05-27", "07:32:00", '"\\uD800"', '"../../x"', "'''\n'''", '"' + "x" * 100_000 + '"',
    "{a={a={a=1}}}", "0x7fffffffffffffff", "-1",
)  # fmt: skip


def bad_toml(good: str, rng: Random) -> bytes:
    """A value exchanged, a line doubled or dropped, or bytes changed."""
    kind = rng.randrange(5)
    if kind == 0:
        return mutate.flipped(good.encode(), rng, 4)
    if kind == 1:
        lines = good.splitlines()
        i = rng.randrange(len(lines))
        lines[i : i + 1] = rng.choice(([], [lines[i]] * 2, [lines[i], rng.choice(lines)], ["[" + "a." * 2000 + "b]"]))
        return "\n".join(lines).encode()
    marks = [i for i, c in enumerate(good) if c == "="]
    at = rng.choice(marks) + 1
    end = min((e for e in (good.find(c, at) for c in ",\n}]") if e >= 0), default=len(good))
    return (good[:at] + " " + rng.choice(NASTY_TOML) + good[end:]).encode("utf-8", "surrogatepass")


class Snapshots:
    """Snapshots of states: read whole or not at all, and put into an engine only where they fit."""

    def __init__(self, folder: Path) -> None:
        self._engine = StepEngine(write_model(folder), 1)
        self._engine.open("a")
        state = {s.name: np.zeros(s.shape, np.float32) for s in self._engine.spec.states}
        extra: dict[str, bytes | str] = {"token": "t", "clock": b"123"}
        self._good = to_bytes(Snapshot("a", self._engine.spec.sha256, 3, state, extra))
        self._store = StateStore(folder / "states", 3600)
        self._path = self._store.save(from_bytes(self._good), time.time_ns())

    def case(self, rng: Random, number: int) -> None:
        size = int.from_bytes(self._good[:8], "little")
        header, body = self._good[8 : 8 + size], self._good[8 + size :]
        kind = rng.randrange(4)
        if kind == 0:
            raw = mutate.flipped(self._good, rng)
        elif kind == 1:
            raw = (rng.choice(mutate.NASTY_NUMBERS) % 2**64).to_bytes(8, "little") + header + body
        elif kind == 2:
            header = mutate.json(header, rng)
            raw = len(header).to_bytes(8, "little") + header + body
        else:  # by one who knows how it is sealed
            state: dict[str, Any] = dict(from_bytes(self._good).state)
            shape = rng.choice(((8,), (0,), (2, 4), (1000,), ()))
            kind_of = rng.choice(("<f4", "<f8", "|u1", "?", "<i8"))
            state[rng.choice((*state, "x", "", "../x"))] = np.zeros(shape, kind_of)
            session, tick = rng.choice(("a", "a", "b", "../a", "x" * 300, "\n")), rng.choice((0, -1, 2**62))
            raw = to_bytes(Snapshot(session, "0", tick, state, {"e": rng.randbytes(9)}))
        self._path.write_bytes(raw)
        found = self._store.load("a", time.time_ns())
        if found is not None:
            self._engine.arena.restore("a", dict(found.state))

    def close(self) -> dict[str, int]:
        return {}


class Contracts:
    """A contract by names, beside a graph that states none."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "named.onnx"
        self._path.write_bytes(gru_step(8).replace(b"stream_mmrnn", b"stream_other"))

    def case(self, rng: Random, number: int) -> None:
        beside(self._path).write_bytes(bad_toml(CONTRACT, rng))
        StepEngine(self._path, 2)

    def close(self) -> dict[str, int]:
        return {}


def settings_toml() -> str:
    """All settings with their values, as a file."""
    lines = []
    for section, values in msgspec.to_builtins(Settings()).items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            lines.append(f"{key} = {msgspec.json.encode(value).decode()}")
    return "\n".join(lines)


class Toml:
    """The configuration: what is taken must be such that a session can be made of it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "x.toml"
        self._good = settings_toml()
        self._specs = StepEngine(write_model(folder)).spec

    def case(self, rng: Random, number: int) -> None:
        self._path.write_bytes(bad_toml(self._good, rng))
        settings = config.load(self._path)
        sources.check_all(processes.captured(settings).values())
        Aligner.of(self._specs.modalities, self._specs.tick_ns, settings)
        int(1e9 / settings.bus.clock_hz)
        for name in sources.SYNTHETIC:
            sources.create_source(Stream.of(name, source="synthetic"), settings)
        msgspec.json.encode(settings)

    def close(self) -> dict[str, int]:
        return {}
