"""What is fed: each target takes a case made from a seed and raises StreamError where it refuses it.

Anything else that it raises is a fault of ours. A target also sees to it that what is honest still comes through, and
counts what it could not account for. Knows nothing about processes or time-outs.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Protocol

import msgspec
import numpy as np
import zmq
import zstandard

from stream_mmrnn.bench.models import gru_step
from stream_mmrnn.bus import Address, Publisher, Subscriber, run_broker
from stream_mmrnn.capture import sources
from stream_mmrnn.capture.sources import text
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import StreamError, WireError
from stream_mmrnn.core.types import Envelope, Mark, Stamps
from stream_mmrnn.live import journal
from stream_mmrnn.live.session import LiveSession
from stream_mmrnn.offline.replay import info
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.contract import beside
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.pipeline import predict
from stream_mmrnn.predict.snapshots import Snapshot, StateStore, from_bytes, to_bytes
from stream_mmrnn.recording.mcap_file import Recorder, Recording
from stream_mmrnn.recording.repair import repair, verify
from stream_mmrnn.recording.settings import settings_of
from stream_mmrnn.viewers.dashboard.server import Dashboard
from stream_mmrnn.viewers.dashboard.state import LiveState
from stream_mmrnn.viewers.terminal_view import render, summary_table
from tools.hostile import mutate

_WAIT_S = 20.0
_TICK_NS = 40_000_000
_PUBLISHED = tuple(name for name in topics.TOPICS if name != topics.TICK)
"""`tick` is only in recordings up to 0.1.0."""


class Target(Protocol):
    """Made once in a process of its own, with a folder; then fed."""

    def case(self, rng: Random, number: int) -> None: ...

    def close(self) -> dict[str, int]:
        """What it counted, by name."""


class MissedError(Exception):
    """What is honest did not come through, or a count is wrong."""


# ---- messages ----------------------------------------------------------------------------------------------------


def honest(rng: Random) -> Envelope:
    """A message as our own processes send them."""
    at_ns = rng.randrange(10**15)
    topic = rng.choice((*_PUBLISHED, topics.STATUS + "engine"))
    payload: Any = b""
    if topic.startswith(topics.FEATURE):
        payload = np.frombuffer(rng.randbytes(4 * rng.choice((1, 8, 80))), np.uint8).view("<i2").astype(np.float32)
    elif topic == topics.raw("audio"):
        payload = np.zeros(320, np.int16)
    elif topic in (topics.SESSION, topics.PREDICTION) or topic.startswith(topics.STATUS):
        payload = said(topic, rng)
    else:
        payload = rng.randbytes(rng.randrange(200))
    return Envelope(topic, rng.choice("abcd"), rng.randrange(1000), at_ns, at_ns, at_ns, payload, "x@0")


def said(topic: str, rng: Random) -> bytes:
    """The JSON of a topic, honest."""
    at_ns = rng.randrange(10**15)
    here = {"vision": True, "audio": False}
    stamps = Stamps(at_ns, at_ns, at_ns, at_ns, topics.CLOCK)
    if topic == topics.SESSION:
        return wire.pack(wire.SessionMessage(rng.choice(("open", "close", "streams")), at_ns, ("audio",)))
    if topic == topics.TICK:
        return wire.pack(wire.TickMessage(3, at_ns, here, {"audio": 5}, stamps))
    if topic == topics.PREDICTION:
        heads: dict[str, list[float | None]] = {"next": [0.25, None], "other": [1.0]}
        return wire.pack(wire.PredictionMessage(3, at_ns, heads, here, {"audio": 5}, stamps, at_ns, at_ns, "sha"))
    node = rng.choice(("engine", "recorder", "dashboard", "camera", "nobody"))
    detail = {
        "spec": {"name": "m", "sha256": "0", "provider": "cpu", "heads": [{"name": "next"}], "modalities": ["audio"]},
        "streams": {"vision": {"arrived": 1, "lost": 0, "used": 1, "late_joined": 0}},
        "misfits": {"vision": "why"},
        "address": "http://127.0.0.1:80/",
        "path": "x.mcap",
    }
    counts = {"ticks": 1, "predictions": 1, "messages": 1, "bytes": 1, "lost": 0}
    state: Any = rng.choice(("ready", "open", "missing", "closed"))
    return wire.pack(wire.StatusMessage(node, state, 1, "vision", rng.choice(("", "why")), counts, detail))


KINDS: dict[str, Any] = {
    topics.SESSION: wire.SessionMessage,
    topics.TICK: wire.TickMessage,
    topics.PREDICTION: wire.PredictionMessage,
    topics.STATUS: wire.StatusMessage,
}


def bad_header(rng: Random) -> bytes:
    """A header of the right form with a wrong thing in it."""
    values: list[Any] = [wire.VERSION, "a", 0, 0, 0, 0, "", "", (0,)]
    nasty: list[Any] = [n for n in mutate.NASTY_NUMBERS if -(2**63) <= n < 2**64]
    nasty += [
        None,
        True,
        1.5,
        float("nan"),
        "",
        "x" * 300,
        b"\xff" * 10,
        [],
        {},
        [[]],
        (2**24,) * 4,
        (1,) * 5,
        "|O",
        "<c8",
    ]
    nasty += [n for n in mutate.NASTY_NAMES if n.isprintable()]
    values[rng.randrange(9)] = rng.choice(nasty)
    if rng.randrange(8) == 0:
        return b"\x9a" + msgspec.msgpack.encode(values)[1:] + b"\x91" * rng.choice((10, 100_000)) + b"\xc0"
    return msgspec.msgpack.encode(values)


def bad_frames(rng: Random) -> list[bytes]:
    """Frames that are a message no more, or hardly."""
    frames = [bytes(f) for f in wire.encode(honest(rng))]
    kind = rng.randrange(8)
    if kind < 3:
        frames[kind] = mutate.flipped(frames[kind], rng)
    elif kind == 3:
        frames[1] = bad_header(rng)
    elif kind == 4:
        frames = [rng.randbytes(rng.randrange(100)) for _ in range(rng.randrange(1, 8))]
    elif kind == 5:
        rng.shuffle(frames)
    elif kind == 6:
        frames = (frames * rng.choice((2, 100)))[: rng.choice((1, 2, 4, 300))]
    else:
        topic = rng.choice(tuple(KINDS))
        frames[0] = (topic + "engine" if topic == topics.STATUS else topic).encode()
        body = mutate.json(said(topic, rng), rng)
        frames[1] = wire.encode(Envelope("clock", "a", 0, 0, 0, 0, body))[1]  # type: ignore[assignment]
        frames[2] = body
    return frames


class Wire:
    """`wire.decode`, and `wire.unpack` of what it lets through."""

    def __init__(self, folder: Path) -> None:
        self._corpus = [bad_frames(Random(i)) for i in range(50)]
        self._corpus += [[n.encode("utf-8", "surrogatepass"), b"", b""] for n in mutate.NASTY_NAMES]

    def case(self, rng: Random, number: int) -> None:
        frames = self._corpus[number] if number < len(self._corpus) else bad_frames(rng)
        envelope = wire.decode(frames)
        kind = topics.STATUS if envelope.topic.startswith(topics.STATUS) else envelope.topic
        if kind in KINDS:
            wire.unpack(envelope.payload, KINDS[kind])

    def close(self) -> dict[str, int]:
        return {}


class Json:
    """`wire.unpack` alone."""

    def __init__(self, folder: Path) -> None:
        self._nasty = [n.encode("utf-8", "surrogatepass") for n in mutate.NASTY_JSON]

    def case(self, rng: Random, number: int) -> None:
        topic = tuple(KINDS)[number % 4]
        body = self._nasty[number // 4] if number < 4 * len(self._nasty) else mutate.json(said(topic, rng), rng)
        message = wire.unpack(body, KINDS[topic])
        wire.pack(message)

    def close(self) -> dict[str, int]:
        return {}


class Bus:
    """A subscriber behind a broker that anyone may write to, honest messages between the others."""

    EVERY = 50

    def __init__(self, folder: Path) -> None:
        self._stop = threading.Event()
        self._address = Address.create("tcp")
        ready = threading.Event()
        alive: Callable[[], bool] = lambda: not self._stop.wait(0.05)  # noqa: E731
        self._broker = threading.Thread(target=run_broker, args=(self._address, 100_000, ready.set, alive))
        self._broker.start()
        assert ready.wait(_WAIT_S)
        self._reader = Subscriber(self._address, [""], 100_000)
        self._honest = Publisher(self._address, 100_000)
        assert self._honest.wait_for_reader(topics.LABEL, _WAIT_S)
        self._context = zmq.Context()
        self._hostile = self._context.socket(zmq.XPUB)
        self._hostile.setsockopt(zmq.LINGER, 0)
        self._hostile.set_hwm(100_000)
        self._hostile.connect(self._address.publish)
        self._listener = self._context.socket(zmq.XSUB)
        self._listener.setsockopt(zmq.LINGER, 0)
        self._listener.connect(self._address.subscribe)
        assert self._hostile.poll(int(_WAIT_S * 1000))
        self._sent = self._bad = self._good = self._uncounted = 0

    def case(self, rng: Random, number: int) -> None:
        frames = bad_frames(rng)
        try:
            wire.decode(frames)
        except WireError:
            self._bad += 1
        self._hostile.send_multipart(frames)
        self._sent += 1
        if number % 7 == 0:
            self._listener.send(rng.choice((b"\x01", b"\x00", b"\x02", b"")) + rng.randbytes(rng.randrange(40)))
        if number % 11 == 0:
            self._knock(rng)
        if number % self.EVERY == self.EVERY - 1:
            self._check(number)
        if frames and self._bad and number % self.EVERY:
            return
        raise WireError("seen")

    def _knock(self, rng: Random) -> None:
        """Bytes that are no ZeroMQ at all, at its door."""
        host, port = rng.choice((self._address.publish, self._address.subscribe)).removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), _WAIT_S) as raw:
            greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
            # a first byte of another kind would be a peer of ZeroMQ 2, and what follows it a message
            raw.sendall(
                b"\xff" + rng.choice((rng.randbytes(200), mutate.flipped(greeting, rng), greeting + bytes(9)))[1:]
            )

    def _check(self, number: int) -> None:
        """The honest message comes, and everything hostile before it was counted."""
        want = f"honest {number}".encode()
        self._honest.publish(topics.LABEL, "honest", number, number, want)
        self._good += 1
        deadline_ns, seen = now_ns() + int(_WAIT_S * 1e9), False
        while now_ns() < deadline_ns and not (seen and self._arrived() >= self._sent + self._good):
            envelope = self._reader.receive(50)
            seen = seen or (envelope is not None and envelope.topic == topics.LABEL and envelope.payload == want)
        if not seen:
            raise MissedError(f"the honest message {number} did not come")
        self._uncounted = max(self._uncounted, abs(self._reader.garbage - self._bad))

    def _arrived(self) -> int:
        return sum(self._reader.gaps.received.values()) + self._reader.garbage

    def close(self) -> dict[str, int]:
        self._context.destroy(linger=0)
        self._honest.close(0)
        self._reader.close()
        self._stop.set()
        self._broker.join(_WAIT_S)
        return {"bad": self._bad, "counted": self._reader.garbage, "uncounted": self._uncounted, "honest": self._good}


class Requests:
    """The journal: what an engine asks of it, and what came by the bus meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._kept = journal.Journal(1.0, 1 << 20, True)
        self._at_ns = 0

    def case(self, rng: Random, number: int) -> None:
        self._at_ns += 10_000_000
        for _ in range(3):
            frames = bad_frames(rng) if rng.randrange(2) else [bytes(f) for f in wire.encode(honest(rng))]
            if len(frames) == 3:
                self._kept.add((frames[0], frames[1], frames[2]), self._at_ns)
        mark = Mark("clock", rng.choice("abc"), rng.randrange(1000), rng.choice((0, 2**62)))
        made = rng.choice((journal.Keep(mark, rng.choice((None, mark)), rng.randbytes(50)), journal.Ask(mark)))
        raw = msgspec.msgpack.encode(made)
        asked = journal.read_request(mutate.flipped(raw, rng, 4) if rng.randrange(3) else raw)
        if isinstance(asked, journal.Keep):
            self._kept.save(asked)
        else:
            msgspec.msgpack.encode(self._kept.answer(asked))

    def close(self) -> dict[str, int]:
        return {"journal_kb": self._kept.bytes // 1024}


# ---- text --------------------------------------------------------------------------------------------------------


class _Text:
    """A source of text that anyone may write to, an honest line now and then."""

    EVERY = 50

    def __init__(self, source: Any) -> None:
        self._source = source
        self._source.open()
        self._alive = True
        self._wanted = b""
        self._came = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        self._honest = self._longest = 0

    def _read(self) -> None:
        try:
            for sample in self._source.samples(lambda: self._alive, 0):
                assert isinstance(sample.data, bytes)
                self._longest = max(self._longest, len(sample.data))
                if sample.data == self._wanted:
                    self._came.set()
        except BaseException as e:
            self._error = e

    def case(self, rng: Random, number: int) -> None:
        kind = rng.randrange(6)
        data = rng.randbytes(rng.choice((1, 10, 100)))
        if kind == 0:
            data = b"\n" * rng.choice((1, 1000))
        elif kind == 1:
            data = rng.choice((b"x", b"\xc3", b"\0", b"\xf0\x9f")) * rng.choice((4095, 4096, 4097, 70_000))
        elif kind == 2:
            data = mutate.flipped("héllo wörld 🙂\n/label x\n".encode(), rng)
        elif kind == 3:
            data = rng.choice(mutate.NASTY_JSON)[:5000].encode("utf-8", "surrogatepass") + b"\r\n"
        try:
            self.send(data, rng)
        except OSError as e:
            raise WireError(str(e)) from e
        finally:
            if number % self.EVERY == self.EVERY - 1:
                self._check(number)

    def _check(self, number: int) -> None:
        self._came.clear()
        self._wanted = f"honest {number}".encode()
        self.say(b"\n" + self._wanted + b"\n")
        if not self._came.wait(_WAIT_S) or self._error is not None:
            raise MissedError(f"the honest line {number} did not come ({self._error!r})")
        self._honest += 1

    def send(self, data: bytes, rng: Random) -> None:
        raise NotImplementedError

    def say(self, data: bytes) -> None:
        raise NotImplementedError

    def close(self) -> dict[str, int]:
        self._alive = False
        self._thread.join(_WAIT_S)
        self._source.close()
        found = self._source.info
        return {
            "garbage": found["garbage"], "too_long": found["too_long"], "honest": self._honest,
            "over_long_lines": int(self._longest > 4096),
        }  # fmt: skip


class Tcp(_Text):
    def __init__(self, folder: Path) -> None:
        super().__init__(text.Tcp(0, config.Text()))
        self._clients: list[socket.socket] = []

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._source.info["port"]), _WAIT_S)

    def send(self, data: bytes, rng: Random) -> None:
        if not self._clients or rng.randrange(4) == 0:
            self._clients.append(self._connect())
        client = rng.choice(self._clients)
        try:
            for part in mutate.cut_anywhere([data], rng)[:50]:
                client.sendall(part)
        except OSError:
            self._clients.remove(client)
            client.close()
            raise
        if rng.randrange(5) == 0:
            if rng.randrange(2):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            self._clients.remove(client)
            client.close()

    def say(self, data: bytes) -> None:
        with self._connect() as client:
            client.sendall(data)

    def close(self) -> dict[str, int]:
        for client in self._clients:
            client.close()
        return super().close()


class Pipe(_Text):
    def __init__(self, folder: Path) -> None:
        path = folder / "pipe"
        os.mkfifo(path)
        super().__init__(text.Pipe(path, config.Text()))
        self._path = path
        self._fd = os.open(path, os.O_WRONLY)

    def send(self, data: bytes, rng: Random) -> None:
        if rng.randrange(20) == 0:
            os.close(self._fd)
            self._fd = os.open(self._path, os.O_WRONLY)
        self.say(data)

    def say(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def close(self) -> dict[str, int]:
        os.close(self._fd)
        return super().close()


class Zmq(_Text):
    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        super().__init__(text.Zmq(self._port, config.Text()))
        self._context = zmq.Context()
        self._push = self._socket()

    def _socket(self) -> Any:
        push = self._context.socket(zmq.PUSH)
        push.setsockopt(zmq.LINGER, 0)
        push.connect(f"tcp://127.0.0.1:{self._port}")
        return push

    def send(self, data: bytes, rng: Random) -> None:
        if len(data) > 4096:  # shuts its sender out: that is another one
            with self._socket() as other:
                other.setsockopt(zmq.LINGER, 100)
                other.send(data)
            return
        self._push.send_multipart([data] * rng.choice((1, 1, 3)))

    def say(self, data: bytes) -> None:
        self._push.send(data.strip())

    def close(self) -> dict[str, int]:
        counts = super().close()
        self._context.destroy(linger=0)
        return counts


# ---- files -------------------------------------------------------------------------------------------------------


def write_recording(path: Path) -> bytes:
    """A recording of all topics, as the recorder writes it."""
    settings = msgspec.json.encode(config.Settings()).decode()
    recorder = Recorder(path, "live", {"raw": "true", "slots": "1", "model": "turn_taking", "config": settings}, 1.0)
    rng, base_ns = Random(1), now_ns()
    for seq in range(60):
        for topic in topics.TOPICS:
            if topic == topics.CONTROL:
                continue
            at_ns = base_ns + seq * _TICK_NS
            payload: Any = b""
            if topic.startswith(topics.FEATURE):
                payload = np.ones(8, np.float32)
            elif topic in KINDS:
                payload = said(topic, rng)
            elif topics.kind_of(topic) == "audio":
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
        self._specs = StepEngine(_write_model(folder)).spec

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


def _write_model(folder: Path) -> Path:
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
        self._engine = StepEngine(_write_model(folder), 1)
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
    for section, values in msgspec.to_builtins(config.Settings()).items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            lines.append(f"{key} = {msgspec.json.encode(value).decode()}")
    return "\n".join(lines)


class Toml:
    """The configuration: what is taken must be such that a session can be made of it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "x.toml"
        self._good = settings_toml()
        self._specs = StepEngine(_write_model(folder)).spec

    def case(self, rng: Random, number: int) -> None:
        self._path.write_bytes(bad_toml(self._good, rng))
        settings = config.load(self._path)
        sources.check_all(settings.sources)
        Aligner.of(self._specs.modalities, self._specs.tick_ns, settings.align)
        int(1e9 / settings.bus.clock_hz)
        for modality in sources.EVERY:
            sources.create_source("synthetic", modality, settings, -1)
        msgspec.json.encode(settings)

    def close(self) -> dict[str, int]:
        return {}


# ---- who reads envelopes -----------------------------------------------------------------------------------------


class Readers:
    """Aligner, engine, recorder, page and supervisor, given envelopes that are well-formed and mean ill."""

    SLOTS = 4

    def __init__(self, folder: Path) -> None:
        self._engine = StepEngine(_write_model(folder), self.SLOTS)
        spec = self._engine.spec
        self._aligner = Aligner(spec.modalities, spec.tick_ns, {"signal": 80_000_000})
        self._view = LiveState()
        self._recorder = Recorder(folder / "r.mcap", "a", {})
        off = dict.fromkeys(sources.EVERY, "none") | {"vision": "synthetic", "audio": "synthetic"}
        self._said = 0
        self._session = LiveSession(config.parse({"sources": off}), True, lambda: True, self._say)
        self._began_ns = self._time_ns = now_ns()
        self._predictions = 0
        self._most = 0

    def _say(self, line: str) -> None:
        self._said += 1
        assert len(line) < 2**21

    def _envelope(self, rng: Random) -> Envelope:
        topic = rng.choice((*topics.TOPICS, topics.FEATURE + "signal", topics.CLOCK, topics.SESSION))
        if rng.randrange(6) == 0:
            topic = topics.STATUS + rng.choice(("engine", "camera", str(rng.randrange(10**6))))
        self._time_ns += rng.choice((0, 1_000_000, 10_000_000))
        stamps = [self._time_ns] * 3
        if rng.randrange(8) == 0:
            fits = [n for n in mutate.NASTY_NUMBERS if -(2**63) <= n < 2**63]
            stamps[rng.randrange(3)] = rng.choice((*fits, self._time_ns + 10**12, self._time_ns - 10**12))
        seq = rng.choice((rng.randrange(100), rng.randrange(2**32), 0, 2**32 - 1))
        payload: Any
        kind = topics.STATUS if topic.startswith(topics.STATUS) else topic
        if kind in KINDS:
            payload = mutate.json(said(kind, rng), rng) if rng.randrange(2) else said(kind, rng)
            if kind == topics.SESSION and rng.randrange(2):
                at_ns = rng.choice((self._time_ns, *stamps))
                payload = wire.pack(wire.SessionMessage(rng.choice(("open", "open", "close")), at_ns, ("signal",)))
        else:
            shape = rng.choice(((256,), (256,), (0,), (1,), (2, 128), (1, 1, 1, 1)))
            payload = np.zeros(shape, rng.choice(("<f4", "<f4", "<i2", "|u1")))
            if payload.size and payload.dtype == np.float32 and rng.randrange(3) == 0:
                payload.flat[0] = rng.choice((float("nan"), float("inf"), 3e38, -3e38))
            payload = rng.choice((payload, payload, rng.randbytes(rng.randrange(50))))
        origin = rng.choice(("", "x@0", str(rng.randrange(10**6)), "\x1b[2J[/red]"))
        return Envelope(topic, rng.choice("aaabcdef"), seq, *stamps, payload, origin, self._time_ns)

    def case(self, rng: Random, number: int) -> None:
        # what the wire lets through, and nothing else
        envelope = wire.decode([bytes(f) for f in wire.encode(self._envelope(rng))], self._time_ns)
        self._view.observe(envelope)
        self._session._observe(envelope)
        self._session.supervisor._observe(envelope)
        self._recorder.write(envelope)
        self._recorder.flush_due(self._time_ns)
        made = 0
        for p in predict([envelope], self._aligner, self._engine, lambda *_: None):
            made += 1
            wire.pack(wire.prediction_message(p))
            wire.encode(Envelope(topics.PREDICTION, p.tick.session, 0, p.tick.event_ns, 0, 0, b""))
        self._predictions += made
        self._most = max(self._most, made)
        if number % 50 == 0:
            state = self._view.snapshot(self._time_ns)
            msgspec.json.encode(state)
            _drawn(render(state, 80, "x", []))
            self._session.supervisor.opened_ns = 0
            _drawn(summary_table(self._session._summary(self._began_ns)))

    def close(self) -> dict[str, int]:
        seconds = (now_ns() - self._began_ns) / 1e9
        self._recorder.close({})
        self._session.supervisor.address.remove()
        _checked(self._recorder.path)
        over = max(0, self._said - 2 * len(self._session.supervisor.nodes) * (int(seconds) + 2))
        return {
            "predictions": self._predictions,
            "said": self._said,
            "said_too_often": over,
            "most_at_once": self._most,
        }


def _drawn(what: Any) -> None:
    from rich.console import Console

    with Path(os.devnull).open("w") as nowhere:
        Console(file=nowhere, width=80).print(what)


def _checked(path: Path) -> None:
    """What was recorded of it can be read."""
    recording = Recording(path)
    for _ in recording.envelopes():
        pass
    if recording.damage:
        raise MissedError(f"the recording of it is damaged: {recording.damage}")


class Page:
    """The page's server, an honest browser between the others."""

    EVERY = 25

    def __init__(self, folder: Path) -> None:
        self._page = Dashboard(metrics=lambda: b"", posts={"/text": lambda body: "" if body == b'"a"' else "no"})
        self._page.start()
        self._page.update({"x": 1})
        self._page.sound(0, bytes(64))
        self._port = int(self._page.address.rstrip("/").rsplit(":", 1)[1])
        self._honest = 0
        self._open: list[socket.socket] = []

    def _requests(self, rng: Random) -> bytes:
        path = rng.choice(
            (
                "/", "/events", "/picture.jpg", "/healthz", "/readyz", "/metrics", "/text", "/predictions", "/sound",
                f"/sound?since={rng.choice(('0', '-1', '9' * 40, '%00', 'x'))}", "/../../etc/passwd", "/%00", "*",
                "x" * 70_000,
            )
        )  # fmt: skip
        method = rng.choice(("GET", "GET", "HEAD", "POST", "OPTIONS", "TRACE", "PRI", "\0", "G" * 1000))
        lines = [
            f"{method} {path} HTTP/{rng.choice(('1.1', '1.0', '0.9', '2.0', '9' * 9))}",
            f"Host: 127.0.0.1:{self._port}",
        ]
        extra = (
            "Content-Length: 5", "Content-Length: -1", "Content-Length: " + "9" * 30, "Transfer-Encoding: chunked",
            "Host: evil.example", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: " + "A" * rng.choice((0, 22, 24, 4000)), "Content-Type: application/json",
            "X: " + "y" * 70_000, ":", " folded", "Range: bytes=0-",
        )  # fmt: skip
        lines += rng.sample(extra, rng.randrange(4)) + ["A: b"] * rng.choice((0, 0, 200))
        data = "\r\n".join(lines).encode() + b"\r\n\r\n"
        return mutate.flipped(data, rng, 4) if rng.randrange(2) else data

    def case(self, rng: Random, number: int) -> None:
        client = socket.create_connection(("127.0.0.1", self._port), _WAIT_S)
        try:
            client.settimeout(0.05)
            client.sendall(rng.choice((self._requests(rng), rng.randbytes(rng.randrange(1, 400)), b"")))
            if rng.randrange(3) == 0:
                client.recv(4096)
            if rng.randrange(10) == 0:
                self._open.append(client)  # says no more, and stays
        except OSError as e:
            raise WireError(str(e)) from e
        finally:
            if client not in self._open:
                if rng.randrange(2):
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
            if len(self._open) > 30:
                self._open.pop(0).close()
            if number % self.EVERY == self.EVERY - 1:
                self._check()

    def _check(self) -> None:
        deadline_ns = now_ns() + int(_WAIT_S * 1e9)
        while now_ns() < deadline_ns:
            try:
                with socket.create_connection(("127.0.0.1", self._port), _WAIT_S) as client:
                    client.settimeout(_WAIT_S)
                    client.sendall(f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n\r\n".encode())
                    if client.recv(64).startswith(b"HTTP/1.1 200"):
                        self._honest += 1
                        return
            except OSError:
                continue
        raise MissedError("the page does not answer an honest browser")

    def close(self) -> dict[str, int]:
        for client in self._open:
            client.close()
        self._page.close()
        return {"honest": self._honest}


class Names:
    """Names of sessions wherever they come in: none that leads out of a folder is taken."""

    def __init__(self, folder: Path) -> None:
        self._escaped = 0

    def case(self, rng: Random, number: int) -> None:
        name = mutate.NASTY_NAMES[number % len(mutate.NASTY_NAMES)]
        if number >= len(mutate.NASTY_NAMES):
            name = mutate.flipped(rng.choice((name, "../../a", "live")).encode("utf-8", "replace"), rng, 4).decode(
                "latin1"
            )
        takers: tuple[Callable[[], object], ...] = (
            lambda: config.parse({"session": {"name": name}}).session.name,
            lambda: wire.decode([b"clock", msgspec.msgpack.encode([1, name, 0, 0, 0, 0, "", "", [0]]), b""]).session,
        )
        refused = 0
        for taker in takers:
            try:
                taken = str(taker())
            except (StreamError, UnicodeEncodeError):
                refused += 1
                continue
            inside = (Path("/folder") / taken).parent == Path("/folder") and taken not in (".", "..")
            if not inside or not taken.isascii() or not taken.isprintable() or len(taken) > 64:
                self._escaped += 1
                raise MissedError(f"{name!r} was taken as the name of a session")
        if refused:
            raise WireError("refused")

    def close(self) -> dict[str, int]:
        return {"escaped": self._escaped}


TARGETS: dict[str, Callable[[Path], Target]] = {
    "wire": Wire,
    "json": Json,
    "bus": Bus,
    "journal": Requests,
    "tcp": Tcp,
    "pipe": Pipe,
    "zmq": Zmq,
    "recordings": Recordings,
    "models": Models,
    "contracts": Contracts,
    "snapshots": Snapshots,
    "settings": Toml,
    "readers": Readers,
    "page": Page,
    "names": Names,
}


def numbered(target: str, folder: Path, first: int, count: int) -> Iterator[tuple[int, BaseException | None]]:
    """Feed a target here, in this process: what each case raised."""
    fed = TARGETS[target](folder)
    try:
        for number in range(first, count):
            try:
                fed.case(Random(f"{target}{number}"), number)
                yield number, None
            except Exception as e:
                yield number, e
    finally:
        fed.close()
