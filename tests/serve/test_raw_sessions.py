"""Raw sessions: the client sends samples. As served they have the bits of `Predictor`, whoever dies in between."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import toy_model
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import running, settings_for, start

from stream_mmrnn import AsyncClient, Client, Predictor
from stream_mmrnn.capture.encoders import create_encoder
from stream_mmrnn.capture.sources.synthetic import Synthetic
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import BadTick, SessionError, StreamError, UsageError
from stream_mmrnn.core.settings import SyntheticSettings
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import ModalitySpec
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.client_session import Answer
from stream_mmrnn.serve.server import Server
from stream_mmrnn.serve.session_host import Host
from stream_mmrnn.serve.sessions import Sessions

PUSHES = 60
"""Of 20 ms each."""
Push = tuple[str, tuple[Any, ...], dict[str, Any]]
"""A method of `Predictor` and of a raw session, and its arguments."""


def jpeg(shade: int) -> bytes:
    picture = np.full((48, 64, 3), shade, np.uint8)
    picture[8:24, 8:40] = 255 - shade
    return bytes(cv2.imencode(".jpg", picture)[1].tobytes())


@pytest.fixture(scope="module")
def pushes() -> list[Push]:
    """Sound of a person who speaks, with words and pictures in between."""
    source = Synthetic(Stream.of("audio"), SyntheticSettings(seed=3), paced=False)
    made: list[Push] = []
    for i, block in enumerate(itertools.islice(source.samples(lambda: True, 0), PUSHES)):
        at_s = (i + 1) * 0.02
        made.append(("push_audio", (block.data, at_s), {}))
        if i % 10 == 3:
            made.append(("push_text", (f"word {i}", at_s), {}))
        if i % 4 == 0:
            made.append(("push_frame", (jpeg(i), at_s), {}))
    made.append(("advance", (PUSHES * 0.02 + 0.2,), {}))
    return made


def play(session: Any, pushes: list[Push]) -> list[tuple[int, int, bytes]]:
    """Number, end and bits of every answer."""
    made = [answer for name, args, more in pushes for answer in getattr(session, name)(*args, **more)]
    return list(map(bits, made))


def bits(of: Answer) -> tuple[int, int, bytes]:
    return of.tick, of.event_ns, b"".join(values.tobytes() for values in of.heads.values())


@pytest.fixture(scope="module")
def expected(model: Path, pushes: list[Push]) -> list[tuple[int, int, bytes]]:
    predictor = Predictor(model)
    made = [p for name, args, more in pushes for p in getattr(predictor, name)(*args, **more)]
    return [
        (
            round(predictor.at_s(p) * 1e9) // predictor.spec.tick_ns,
            round(predictor.at_s(p) * 1e9),
            b"".join(values.tobytes() for values in p.heads.values()),
        )
        for p in made
    ]


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[Server]:
    with running(settings_for(model, tmp_path / "states")) as made:
        yield made


def test_a_raw_session_has_the_bits_of_predictor(
    server: Server, model: Path, pushes: list[Push], expected: list[tuple[int, int, bytes]]
) -> None:
    with Client(server.address) as client, client.open_raw("a") as session, client.open_raw("b") as other:
        assert play(session, pushes[:40]) + play(session, pushes[40:]) == expected
        assert len(expected) == 35
        # another one beside it, in other pieces: without a time, sound follows the sound before it
        sound = np.concatenate([args[0] for name, args, _ in pushes if name == "push_audio"])
        pieces = [("push_audio", (piece,), {}) for piece in np.array_split(sound, 7)]
        alone = Predictor(model)
        assert [b[2] for b in play(other, pieces)] == [
            b"".join(v.tobytes() for v in p.heads.values())
            for _, (piece,), _ in pieces
            for p in alone.push_audio(piece)
        ]
        assert session.flush() == len(pushes)
    assert server.host.counts["refused"] == 0


def test_a_raw_session_has_the_encoders_that_the_model_asks_for(pushes: list[Push], tmp_path: Path) -> None:
    face, tokens = create_encoder("face"), create_encoder("tokens")
    asked = (
        ModalitySpec("vision", face.size, face.origin),
        ModalitySpec("text.tokens", 2 * tokens.size, tokens.origin, "stack", 2),
    )
    model = toy_model.make(tmp_path / "toy.onnx", asked)
    some = [push for push in pushes if push[0] != "push_audio"]
    predictor = Predictor(model)
    alone = [p for name, args, more in some for p in getattr(predictor, name)(*args, **more)]
    assert any(p.tick.present["text.tokens"] for p in alone)
    assert any(p.tick.present["vision"] for p in alone)
    with running(settings_for(model, tmp_path / "states")) as server, Client(server.address) as client:
        with client.open_raw("a") as session:
            served = play(session, some)
        assert server.host.counts["refused"] == 0
    assert [b[2] for b in served] == [b"".join(v.tobytes() for v in p.heads.values()) for p in alone]


def test_what_does_not_fit_is_said_and_the_session_goes_on(
    server: Server, pushes: list[Push], expected: list[tuple[int, int, bytes]]
) -> None:
    with Client(server.address) as client, client.open_raw("a") as session:
        made = play(session, pushes[:20])
        for bad, why in (
            (lambda: session.push_frame(b"no picture"), "a picture is not a JPEG"),
            (lambda: session.push_audio(np.zeros(320, np.int16), stream="nose"), "nothing in it is fed by 'nose'"),
            (lambda: session.push_text("x", stream="audio"), "sound is int16|audio"),
            (lambda: session.push("audio", [1.0, 2.0]), "was refused"),
            (lambda: session.push_text("x", at_s=500.0), "at most .* after what was pushed before"),
        ):
            with pytest.raises(BadTick, match=why):
                bad()
        with pytest.raises(UsageError, match="at_s is -1"):
            session.advance(-1)
        with pytest.raises(UsageError, match="at most 4194304 bytes"):
            session.push_frame(b"x" * (5 << 20))
        assert made + play(session, pushes[20:]) == expected
        # a session is for samples or for ticks
        with pytest.raises(SessionError, match="of the other kind"), Client(server.address) as second:
            second.open("a", session.token)
        ticks, second = client.open("ticks"), Client(server.address)
        with second, ticks, pytest.raises(SessionError, match="of the other kind"):
            second.open_raw("ticks", ticks.token)


def test_sound_of_another_rate_is_converted_by_the_client(server: Server, model: Path) -> None:
    sound = (8000 * np.sin(np.arange(48_000) * 0.05)).astype(np.int16)
    predictor = Predictor(model)
    with Client(server.address) as client, client.open_raw("a") as session:
        for piece in np.array_split(sound, 9):
            mine = [bits(a)[2] for a in session.push_audio(piece, rate_hz=48_000)]
            theirs = predictor.push_audio(piece, rate_hz=48_000)
            assert mine == [b"".join(v.tobytes() for v in p.heads.values()) for p in theirs]
        assert session.push_audio(np.stack([sound, sound], 1) / 32768, rate_hz=48_000)


def test_a_session_continues_from_its_token(
    server: Server, pushes: list[Push], expected: list[tuple[int, int, bytes]]
) -> None:
    with Client(server.address) as client:
        session = client.open_raw("a")
        made, token = play(session, pushes[:33]), session.token
    # the client is gone: the session is saved and evicted, with the sound that was half a tick
    with Client(server.address) as client, client.open_raw("a", token) as session:
        assert session.resumed
        assert made + play(session, pushes[33:]) == expected


def test_two_tasks_push_to_one_session(
    server: Server, pushes: list[Push], expected: list[tuple[int, int, bytes]]
) -> None:
    async def main() -> list[tuple[int, int, bytes]]:
        async with AsyncClient(server.address) as client, await client.open_raw("a") as session:
            asked = [getattr(session, name)(*args, **more) for name, args, more in pushes]
            answers = [answer for of in await asyncio.gather(*asked) for answer in of]
            with pytest.raises(BadTick, match="a picture is not a JPEG"):
                await session.push_frame(b"nothing")
            return list(map(bits, answers))

    assert asyncio.run(main()) == expected


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_server_comes_back_and_nothing_differs(
    model: Path, tmp_path: Path, pushes: list[Push], expected: list[tuple[int, int, bytes]]
) -> None:
    process, address = start(model, tmp_path, 0)
    port = int(address.rpartition(":")[2])
    try:
        with Client(address, timeout_s=30) as client, client.open_raw("a", timeout_s=30) as session:
            made = play(session, pushes[:50])
            process.send_signal(signal.SIGKILL)
            process.communicate()
            process, _ = start(model, tmp_path, port)
            assert made + play(session, pushes[50:]) == expected
            assert session.skipped == 0
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
        assert json.loads(out)["counts"]["resumed"] == 1
    finally:
        process.kill()
        process.wait()


class _Memory:
    """A store of states in this process."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def save(self, snapshot: Any, unix_ns: int) -> None:
        self.kept[snapshot.session] = snapshot

    def load(self, session: str, unix_ns: int) -> Any:
        return self.kept.get(session)

    def holds(self, session: str, unix_ns: int) -> bool:
        return session in self.kept

    def forget(self, session: str) -> None:
        self.kept.pop(session, None)

    def sweep(self, unix_ns: int) -> int:
        return 0


@pytest.fixture(scope="module")
def make(model: Path) -> Callable[[_Memory], Host]:
    from stream_mmrnn.predict.engine import StepEngine
    from stream_mmrnn.serve.session_input import SessionInput

    asked = settings_for(model, Path("unused"))
    engine = StepEngine(config.find_model(str(model)), 4)

    def made(store: _Memory) -> Host:
        for name in ("a", "b"):
            with contextlib.suppress(StreamError):
                engine.close(name)
        sessions = Sessions(engine, store, asked.state)
        return Host(sessions, 64, make_input=lambda name: SessionInput(engine.spec, asked, name, must_save=True))

    return made


NOW = 10**15


@pytest.mark.slow
@settings(max_examples=15)
@given(acts=st.lists(st.sampled_from(["push", "step", "save", "gone", "die", "flush"]), max_size=60))
def test_any_order_of_steps_saves_and_deaths_gives_the_same_answers(
    make: Callable[[_Memory], Host],
    pushes: list[Push],
    expected: list[tuple[int, int, bytes]],
    acts: list[str],
) -> None:
    """The part of the client is played here: after each death it opens the session again and sends what is missing."""
    wire = list(requests(pushes))
    store = _Memory()
    host = make(store)
    token: str | None = None
    found: dict[int, list[protocol.Pred]] = {}
    sent = 0

    def read() -> None:
        nonlocal sent, token
        out, host.out = host.out, []
        for _, reply in out:
            if isinstance(reply, protocol.Ready):
                token, sent = reply.token, reply.next
            elif isinstance(reply, protocol.Pushed):
                assert not reply.error
                again = found.setdefault(reply.push, list(reply.predictions))
                assert [p.heads for p in again] == [p.heads for p in reply.predictions]
            elif isinstance(reply, protocol.Refused):
                assert reply.error in ("unknown", "evicted")

    def opened() -> None:
        nonlocal token
        host.handle(
            b"c",
            protocol.Open(session="a", token=token if "a" in store.kept or "a" in host.sessions else None, raw=True),
            NOW,
        )
        read()

    opened()
    for act in acts:
        if act == "push" and sent < len(wire):
            host.handle(b"c", wire[sent], NOW)
            sent += 1
        elif act == "step" and host.ready:
            host.step(NOW)
        elif act == "save" and not host.ready:
            host.housekeeping(NOW)
        elif act == "flush":
            host.handle(b"c", protocol.Flush(session="a"), NOW)
        elif act == "gone":
            host.gone(b"c", NOW)
            read()
            opened()
        elif act == "die":
            host = make(store)
            opened()
        read()
    while sent < len(wire) or host.ready:
        if sent < len(wire):
            host.handle(b"c", wire[sent], NOW)
            sent += 1
        while host.ready:
            host.step(NOW)
        read()
    assert "a" in host.sessions
    made = [(p.tick, p.event_ns, b"".join(p.heads)) for number in sorted(found) for p in found[number]]
    # an answer may be lost with the server that had saved the state behind it; none may be wrong
    right = {tick: (event_ns, values) for tick, event_ns, values in expected}
    assert all(right[tick] == (event_ns, values) for tick, event_ns, values in made)
    if "die" not in acts:
        assert made == expected


def requests(pushes: list[Push]) -> Iterator[protocol.PushSample]:
    for number, (name, args, _) in enumerate(pushes):
        if name == "advance":
            yield protocol.PushSample(session="a", push=number, stream="", at_ns=round(args[0] * 1e9))
            continue
        data = args[0].tobytes() if name == "push_audio" else args[0].encode() if name == "push_text" else args[0]
        stream = {"push_audio": "audio", "push_text": "text", "push_frame": "vision"}[name]
        yield protocol.PushSample(session="a", push=number, stream=stream, data=data, at_ns=round(args[1] * 1e9))


def test_pushes_out_of_order_are_refused_and_repeated_ones_skipped(
    make: Callable[[_Memory], Host], pushes: list[Push]
) -> None:
    host, wire = make(_Memory()), list(requests(pushes))
    host.handle(b"c", protocol.Open(session="a", raw=True), NOW)
    host.handle(b"c", wire[0], NOW)
    host.handle(b"c", wire[0], NOW)
    host.handle(b"c", wire[5], NOW)
    host.handle(b"c", protocol.Reset(session="a"), NOW)
    host.handle(b"other", wire[1], NOW)
    kinds = [(peer, type(reply).__name__, getattr(reply, "error", "")) for peer, reply in host.out]
    assert kinds == [
        (b"c", "Ready", ""),
        (b"c", "Pushed", ""),
        (b"c", "Skipped", ""),
        (b"c", "Refused", "bad_tick"),
        (b"c", "Refused", "failed"),
        (b"other", "Refused", "unknown"),
    ]


def test_a_flush_saves_a_push_of_which_no_tick_came(make: Callable[[_Memory], Host], pushes: list[Push]) -> None:
    store = _Memory()
    host, wire = make(store), list(requests(pushes))
    host.handle(b"c", protocol.Open(session="a", raw=True), NOW)
    [(_, ready)] = host.out
    assert isinstance(ready, protocol.Ready)
    for number in range(3):
        host.handle(b"c", wire[number], NOW)
        host.handle(b"c", protocol.Flush(session="a"), NOW)
        assert host.out[-1][1] == protocol.Flushed(session="a", next=number + 1)
        saved = store.kept["a"]
        host.handle(b"c", protocol.Flush(session="a"), NOW)
        assert store.kept["a"] is saved, "nothing is new"
        again = make(store)  # the server was killed
        again.handle(b"c", protocol.Open(session="a", token=ready.token, raw=True), NOW)
        host, [(_, opened)] = again, again.out
        assert isinstance(opened, protocol.Ready)
        assert opened.next == number + 1


def test_a_client_that_does_not_read_is_told(make: Callable[[_Memory], Host]) -> None:
    host = make(_Memory())
    host.handle(b"c", protocol.Open(session="a", raw=True), NOW)
    for number in range(80):
        sound = np.zeros(640 * 4, np.int16).tobytes()
        host.handle(
            b"c",
            protocol.PushSample(session="a", push=number, stream="audio", data=sound, at_ns=(number + 1) * 160_000_000),
            NOW,
        )
    assert [r.error for _, r in host.out if isinstance(r, protocol.Refused)].count("overrun") > 50
    assert host.gone(b"c", NOW) == 1
