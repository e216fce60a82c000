"""Targets with sockets and processes: the bus, the request channel, and the text sources over TCP, pipe and ZeroMQ."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import zmq

from stream_mmrnn.bus import Address, Publisher, Subscriber, run_broker
from stream_mmrnn.capture.sources import text
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.settings import TextSettings
from stream_mmrnn.core.types import Mark
from stream_mmrnn.live import journal
from tools.hostile import mutate
from tools.hostile.messages import bad_frames, honest
from tools.hostile.target import WAIT_S, MissedError


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
        assert ready.wait(WAIT_S)
        self._reader = Subscriber(self._address, [""], 100_000)
        self._honest = Publisher(self._address, 100_000)
        assert self._honest.wait_for_reader(topics.LABEL, WAIT_S)
        self._context = zmq.Context()
        self._hostile = self._context.socket(zmq.XPUB)
        self._hostile.setsockopt(zmq.LINGER, 0)
        self._hostile.set_hwm(100_000)
        self._hostile.connect(self._address.publish)
        self._listener = self._context.socket(zmq.XSUB)
        self._listener.setsockopt(zmq.LINGER, 0)
        self._listener.connect(self._address.subscribe)
        assert self._hostile.poll(int(WAIT_S * 1000))
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
        with socket.create_connection((host, int(port)), WAIT_S) as raw:
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
        deadline_ns, seen = now_ns() + int(WAIT_S * 1e9), False
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
        self._broker.join(WAIT_S)
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
        if not self._came.wait(WAIT_S) or self._error is not None:
            raise MissedError(f"the honest line {number} did not come ({self._error!r})")
        self._honest += 1

    def send(self, data: bytes, rng: Random) -> None:
        raise NotImplementedError

    def say(self, data: bytes) -> None:
        raise NotImplementedError

    def close(self) -> dict[str, int]:
        self._alive = False
        self._thread.join(WAIT_S)
        self._source.close()
        found = self._source.info
        return {
            "garbage": found["garbage"], "too_long": found["too_long"], "honest": self._honest,
            "over_long_lines": int(self._longest > 4096),
        }  # fmt: skip


class Tcp(_Text):
    def __init__(self, folder: Path) -> None:
        super().__init__(text.Tcp(0, TextSettings()))
        self._clients: list[socket.socket] = []

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._source.info["port"]), WAIT_S)

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
        super().__init__(text.Pipe(path, TextSettings()))
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
        super().__init__(text.Zmq(self._port, TextSettings()))
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
