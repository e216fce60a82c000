"""Servers in this process or another one, their settings, and ticks as they see them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import toy_ticks

from stream_mmrnn.core import config
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.types import Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.client_session import ClientSession
from stream_mmrnn.serve.client_state import ClientState
from stream_mmrnn.serve.server import Server
from stream_mmrnn.serve.session_host import Host

NOW = 10**15
"""Of a `Line`."""


def tick(session: str, index: int, seed: int = 0) -> Tick:
    """What is absent is zeros, as a server has it."""
    of = toy_ticks.tick(session, index, seed)
    features = {m: vector if of.present[m] else np.zeros_like(vector) for m, vector in of.features.items()}
    return msgspec.structs.replace(of, features=features)


def step_of(of: Tick) -> protocol.Step:
    return protocol.Step(
        session=of.session,
        tick=of.index,
        event_ns=of.event_ns,
        features=tuple(of.features[m].tobytes() if of.present[m] else None for m in of.features),
        age_ns=tuple(of.age_ns.values()),
    )


def alone(model: Path, ticks: list[Tick]) -> list[bytes]:
    engine = StepEngine(model)
    engine.open(ticks[0].session)
    return [engine.step([of])[0].heads["next"].tobytes() for of in ticks]


class Line:
    """The state of a client and a host, connected without sockets; the host may be restarted."""

    def __init__(self, make: Callable[[], Host]) -> None:
        self._make = make
        self.host = make()
        self.client = ClientState()
        self.at_ns = NOW
        self.client.send(protocol.Hello())

    def open(self, name: str) -> ClientSession:
        session = self.client.new_session(name)
        self.client.send(protocol.Open(session=name))
        self.carry()
        return session

    def put(self, session: ClientSession, of: Tick) -> None:
        self.client.put(session, features_of(of), None, of.event_ns, of.age_ns, self.at_ns)

    def carry(self, answers: bool = True) -> None:
        """Deliver messages both ways until none is left; without `answers` the host's replies are lost."""
        while self.client.out or self.host.ready or self.host.out:
            self.say()
            while self.host.ready:
                self.host.step(self.at_ns)
            self.hear(answers)

    def say(self) -> None:
        """Deliver the client's messages."""
        while self.client.out:
            self.host.receive(b"c", self.client.out.popleft()[1], self.at_ns)

    def hear(self, answers: bool = True) -> None:
        """Deliver the host's replies."""
        out, self.host.out = self.host.out, []
        for peer, reply in out:
            if answers and peer == b"c":
                self.client.receive(protocol.encode(reply), self.at_ns)

    def die(self) -> None:
        self.host = self._make()

    def wait(self, seconds: int = 2) -> None:
        """Time passes: the client asks for what it misses."""
        self.at_ns += seconds * 10**9
        self.client.poll(self.at_ns)


def settings_for(model: Path, states: Path, **serve: object) -> Settings:
    return config.parse(
        {
            "engine": {"model": str(model)},
            "state": {"folder": str(states), "snapshot_every": 5},
            "admission": {"share": 1.0},
            "serve": {"port": 0, "slots": 8, "client_slots": serve.get("slots", 8), **serve},
        }
    )


@contextmanager
def running(asked: Settings, say: Callable[[str], None] = lambda _: None) -> Iterator[Server]:
    server = Server(asked, say)
    going = threading.Event()
    thread = threading.Thread(target=server.run, args=(lambda: not going.is_set(),))
    thread.start()
    try:
        yield server
    finally:
        going.set()
        thread.join(20)
        server.close()
        assert not thread.is_alive()


def features_of(of: Tick) -> dict[str, object]:
    return {m: of.features[m] for m in of.features if of.present[m]}


def start(model: Path, states: Path, port: int, processes: int = 1) -> tuple[subprocess.Popen[str], str]:
    """A server as a process, in a process group of its own, and its address. `processes`: of its engine."""
    settings = states / "serve.toml"
    settings.write_text(f"[engine]\nprocesses = {processes}\n")
    options = ["--model", str(model), "--port", str(port), "--config", str(settings), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "stream_mmrnn", "serve", *options],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XDG_STATE_HOME": str(states)},
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "serving" in line, line
    return process, line.split(" at ")[1].split(":  ")[0].split(": up")[0]
