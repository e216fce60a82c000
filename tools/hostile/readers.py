"""Targets that read envelopes or requests: aligner, engine, viewers, the live page, and names of sessions."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn.capture import sources
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import StreamError, WireError
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live.session import LiveSession
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.pipeline import predict
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.viewers.dashboard.server import Dashboard
from stream_mmrnn.viewers.dashboard.state import LiveState
from stream_mmrnn.viewers.terminal_view import render, summary_table
from tools.hostile import mutate
from tools.hostile.files import write_model
from tools.hostile.messages import EVERY_TOPIC, KINDS, said
from tools.hostile.target import WAIT_S, MissedError

# ---- who reads envelopes -----------------------------------------------------------------------------------------


class Readers:
    """Aligner, engine, recorder, page and supervisor, given envelopes that are well-formed and mean ill."""

    SLOTS = 4

    def __init__(self, folder: Path) -> None:
        self._engine = StepEngine(write_model(folder), self.SLOTS)
        spec = self._engine.spec
        self._aligner = Aligner(spec.modalities, spec.tick_ns, {"signal": 80_000_000})
        self._view = LiveState()
        self._recorder = Recorder(folder / "r.mcap", "a", {})
        off = dict.fromkeys(sources.SYNTHETIC, "none") | {"vision": "synthetic", "audio": "synthetic"}
        self._said = 0
        self._session = LiveSession(config.parse({"sources": off}), True, lambda: True, self._say)
        self._began_ns = self._time_ns = now_ns()
        self._predictions = 0
        self._most = 0

    def _say(self, line: str) -> None:
        self._said += 1
        assert len(line) < 2**21

    def _envelope(self, rng: Random) -> Envelope:
        topic = rng.choice((*EVERY_TOPIC, topics.FEATURE + "signal", topics.CLOCK, topics.SESSION))
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
        self._session.supervisor.observe(envelope)
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
        client = socket.create_connection(("127.0.0.1", self._port), WAIT_S)
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
        deadline_ns = now_ns() + int(WAIT_S * 1e9)
        while now_ns() < deadline_ns:
            try:
                with socket.create_connection(("127.0.0.1", self._port), WAIT_S) as client:
                    client.settimeout(WAIT_S)
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
