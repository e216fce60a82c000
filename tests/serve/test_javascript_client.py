"""The client in JavaScript, docs/clients/stream_mmrnn.mjs, against a server of ours: the bits of an engine alone."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from places import ROOT
from serving import alone, running, settings_for, tick

from stream_mmrnn.bus.request_reply import Router
from stream_mmrnn.core import config
from stream_mmrnn.core.types import Tick
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.server import Server

CLIENT = ROOT / "docs" / "clients" / "stream_mmrnn.mjs"


def node() -> str:
    """Node itself, or the one that playwright brings."""
    found = importlib.util.find_spec("playwright")
    beside = Path(found.origin).parent / "driver" / "node" if found is not None and found.origin else None
    return shutil.which("node") or (str(beside) if beside is not None and beside.is_file() else "")


pytestmark = pytest.mark.skipif(not node(), reason="there is no Node here")


@pytest.fixture
def server(toy: Path, tmp_path: Path) -> Iterator[Server]:
    with running(settings_for(toy, tmp_path / "states", slots=2)) as found:
        yield found


def run(tmp_path: Path, body: str, **given: Any) -> Any:
    """What a module that has the client, and `given`, prints as JSON."""
    script = tmp_path / "script.mjs"
    names = "import { connect, decode, encode, ServeError } from " + json.dumps(CLIENT.as_uri())
    script.write_text(f"{names};\nconst given = {json.dumps(given)};\n{body}\n")
    said = subprocess.run([node(), str(script)], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def plain(of: Tick) -> dict[str, Any]:
    """A tick as a script is given it."""
    features = {m: vector.tolist() for m, vector in of.features.items() if of.present[m]}
    return {"event_ns": of.event_ns, "age_ns": of.age_ns, "features": features}


CODES = """
    const codes = {};
    const code = async (name, ask) => {
        const long = new Promise((resolve) => setTimeout(resolve, 8000, { code: "hangs" }).unref());
        const said = await Promise.race([(async () => ask())().then(() => ({ code: "none" }), (error) => error), long]);
        codes[name] = said.code ?? String(said);
        return said;
    };
"""
"""What a call fails with, by a name; `hangs` where it neither fails nor comes to an end."""


def test_a_session_is_the_one_of_an_engine_alone(server: Server, toy: Path, tmp_path: Path) -> None:
    ticks = [tick("js", i) for i in range(50)]
    said = run(
        tmp_path,
        """
        const client = await connect(given.address);
        const session = await client.open("js");
        const got = [];
        const bits = (answer) => Buffer.from(answer.heads.next.buffer).toString("hex");
        const send = (t) => session.step(t.features, { eventNs: t.event_ns, ageNs: t.age_ns });
        for (const t of given.ticks.slice(0, 20)) got.push(await send(t));
        got.push(...(await Promise.all(given.ticks.slice(20, 40).map(send))));
        const flushed = await session.flush();
        await session.reset();
        for (const t of given.ticks.slice(40)) got.push(await send(t));
        const again = await session.step({}, { tick: 3 });
        await session.close();
        client.close();
        console.log(JSON.stringify({
            flushed, again, model: client.model.model, ticks: got.map((a) => a.tick), bits: got.map(bits),
            present: got.map((a) => a.present), events: got.map((a) => a.eventNs), trip: got[0].roundTripMs,
        }));
        """,
        address=server.address,
        ticks=[plain(of) for of in ticks],
    )
    assert said["ticks"] == list(range(50))
    assert [bytes.fromhex(bits) for bits in said["bits"]] == alone(toy, ticks[:40]) + alone(toy, ticks[40:])
    assert (said["flushed"], said["again"]) == (40, None)
    assert said["present"] == [t.present for t in ticks]
    assert said["events"] == [t.event_ns for t in ticks]
    assert said["model"] == server.engine.spec.sha256
    assert said["trip"] > 0
    assert len(server.sessions) == 0


def test_refusals_have_codes_and_tokens_bring_sessions_back(server: Server, toy: Path, tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
        const codes = {};
        const code = async (name, promise) => {
            try { await promise; codes[name] = "none"; }
            catch (error) { codes[name] = error instanceof ServeError ? error.code : String(error); return error; }
        };
        const first = await connect(given.address), second = await connect(given.address);
        const session = await first.open("s");
        await session.step({});
        await code("duplicate", second.open("s"));
        await code("unknown", second.open("never", { token: "x" }));
        const name = first.model.modalities[0].name;
        await code("width", session.step({ [name]: [1, 2, 3] }));
        await code("modality", session.step({ smell: [1] }));
        const other = await second.open("other");
        const busy = await code("busy", second.open("more"));
        await other.close();
        const waits = code("taken", (async () => { for (;;) await session.step({}); })());
        const again = await second.open("s", { token: session.token });
        await waits;
        const answer = await again.step({});
        await code("after", session.step({}));
        first.close();
        await code("closed", first.open("t"));
        await again.close();
        second.close();
        await code("nobody", connect("tcp://127.0.0.1:9"));
        await code("address", connect("nonsense"));
        console.log(JSON.stringify({ codes, retry: busy.retryS, resumed: again.resumed, tick: answer.tick }));
        """,
        address=server.address,
    )
    assert said["codes"] == {
        "duplicate": "duplicate",
        "unknown": "unknown",
        "width": "bad_tick",
        "modality": "bad_tick",
        "busy": "busy",
        "taken": "evicted",
        "after": "evicted",
        "closed": "closed",
        "nobody": "closed",
        "address": "closed",
    }
    assert said["retry"] > 0
    assert said["resumed"] is True
    assert said["tick"] >= 1


@pytest.mark.parametrize("queue", [1, 256])
def test_what_is_sent_at_once_is_answered_in_order_and_nothing_is_refused(
    toy: Path, tmp_path: Path, queue: int
) -> None:
    ticks = [tick("js", i) for i in range(200)]
    with running(settings_for(toy, tmp_path / "states", queue=queue)) as server:
        said = run(
            tmp_path,
            """
            const client = await connect(given.address);
            const session = await client.open("js");
            const bits = (answer) => Buffer.from(answer.heads.next.buffer).toString("hex");
            const sent = given.ticks.map((t) => session.send(t.features, { eventNs: t.event_ns, ageNs: t.age_ns }));
            const flushed = await session.flush(); // comes after all of them
            const got = [];
            for await (const answer of session.answers()) got.push(answer);
            for await (const answer of session.answers()) got.push(answer); // none is awaited: it ends at once
            session.send({}, { tick: 7 }); // seen already
            for await (const answer of session.answers()) got.push(answer);
            await session.close();
            client.close();
            console.log(JSON.stringify({
                sent, flushed, ticks: got.map((a) => a.tick), bits: got.map(bits), skipped: session.skipped,
            }));
            """,
            address=server.address,
            ticks=[plain(of) for of in ticks],
        )
        counts = dict(server.host.counts)
    assert said["sent"] == said["ticks"] == list(range(200))
    assert [bytes.fromhex(bits) for bits in said["bits"]] == alone(toy, ticks)
    assert (said["flushed"], said["skipped"]) == (200, 1)
    assert "overrun" not in counts
    assert "refused" not in counts


def test_a_session_goes_on_from_where_another_connection_had_it(server: Server, toy: Path, tmp_path: Path) -> None:
    ticks = [tick("s", i) for i in range(20)]
    said = run(
        tmp_path,
        """
        const first = await connect(given.address), second = await connect(given.address);
        const got = [];
        const send = async (session, t) => {
            const answer = await session.step(t.features, { eventNs: t.event_ns, ageNs: t.age_ns });
            got.push(Buffer.from(answer.heads.next.buffer).toString("hex"));
        };
        const session = await first.open("s");
        for (const t of given.ticks.slice(0, 10)) await send(session, t);
        const again = await second.open("s", { token: session.token });
        for (const t of given.ticks.slice(10)) await send(again, t);
        const { code, reason, token } = session.error; // heard without asking
        first.close();
        second.close();
        console.log(JSON.stringify({ got, heard: [code, reason, token], next: again.nextTick }));
        """,
        address=server.address,
        ticks=[plain(of) for of in ticks],
    )
    assert [bytes.fromhex(bits) for bits in said["got"]] == alone(toy, ticks)
    assert said["heard"] == ["evicted", "taken", ""]
    assert said["next"] == 20


def test_a_session_that_was_silent_is_opened_again_by_its_token(toy: Path, tmp_path: Path) -> None:
    asked = settings_for(toy, tmp_path / "states")
    with running(msgspec.structs.replace(asked, state=msgspec.structs.replace(asked.state, idle_s=1.0))) as server:
        said = run(
            tmp_path,
            """
            const client = await connect(given.address);
            const session = await client.open("s");
            await session.step({});
            await new Promise((resolve) => setTimeout(resolve, 2000));
            const { code, reason, token } = session.error;
            const again = await client.open("s", { token });
            await session.close(); // is over here: the new one of the same name stays
            const answer = await again.step({});
            client.close();
            console.log(JSON.stringify([code, reason, token === session.token, again.resumed, answer.tick]));
            """,
            address=server.address,
        )
    assert said == ["evicted", "idle", True, True, 1]


def test_what_cannot_be_sent_is_refused_here_and_leaves_the_session_as_it_was(server: Server, tmp_path: Path) -> None:
    said = run(
        tmp_path,
        CODES
        + """
        const client = await connect(given.address);
        const session = await client.open("s");
        await code("fraction", () => session.step({}, { eventNs: 1.5 }));
        await code("long", () => session.step({}, { eventNs: 2n ** 63n }));
        await code("nan", () => session.step({}, { ageNs: { audio: NaN } }));
        await code("negative", () => session.step({}, { tick: -1 }));
        await code("big", () => session.step({ audio: new Float32Array(2 ** 18) }));
        const sent = session.step({});
        await code("twice", () => session.step({}, { tick: 0 }));
        await sent;
        await code("name", () => client.open("no spaces"));
        await code("token", () => client.open("t", { token: "x".repeat(129) }));
        await code("port", () => connect("tcp://127.0.0.1:99999"));
        await code("flood", async () => { for (let i = 0; i < 257; i++) session.send({}); });
        for await (const answer of session.answers());
        const ns = Date.now() * 1e6; // whole, and more than 2^53
        const events = [];
        for (const eventNs of [ns, BigInt(ns), -(2n ** 63n), 5]) {
            const answer = await session.step({}, { eventNs });
            events.push(String(answer.eventNs));
        }
        const next = session.nextTick;
        await session.close();
        await code("closed", () => session.step({}));
        await code("closed flush", () => session.flush());
        await code("closed close", () => session.close());
        client.close();
        console.log(JSON.stringify({ codes, events, ns: String(BigInt(ns)), next }));
        """,
        address=server.address,
    )
    assert said["codes"] == {
        "fraction": "bad_tick",
        "long": "bad_tick",
        "nan": "bad_tick",
        "negative": "bad_tick",
        "big": "bad_tick",
        "twice": "bad_tick",
        "name": "failed",
        "token": "unknown",
        "port": "closed",
        "flood": "overrun",
        "closed": "closed",
        "closed flush": "closed",
        "closed close": "none",
    }
    assert said["events"] == [said["ns"], said["ns"], str(-(2**63)), "5"]
    assert said["next"] == 1 + 256 + 4


def test_the_pages_as_they_stand(tmp_path: Path) -> None:
    """On the real model, at another port than the usual one."""
    docs = CLIENT.parent.parent
    pages = {docs / "serve.md": 1, docs / "clients" / "README.md": 26}  # answers that each prints
    model = config.models_folder() / "turn_taking" / "step.onnx"
    with running(settings_for(model, tmp_path / "states")) as server:
        for page, answers in pages.items():
            [snippet] = re.findall(r"```js\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
            assert "tcp://127.0.0.1:7701" in snippet
            script = tmp_path / "page.mjs"
            script.write_text(
                snippet.replace("./stream_mmrnn.mjs", CLIENT.as_uri()).replace("tcp://127.0.0.1:7701", server.address)
            )
            said = subprocess.run([node(), str(script)], capture_output=True, text=True, timeout=60)
            assert said.returncode == 0, said.stderr
            assert len(re.findall(r"^\d+ Float32Array", said.stdout, re.MULTILINE)) == answers
            assert "undefined" not in said.stdout
        assert server.host.counts["predictions"] == sum(pages.values())


# ---- a server that does not do what it should ------------------------------------------------------------------------

WELCOME = protocol.Welcome(
    version=1, name="m", model="0" * 64, tick_ns=1, queue=4, modalities=(protocol.Modality("audio", 1),), heads=()
)


@contextmanager
def lying(answers: Callable[[protocol.Request], list[protocol.Reply | bytes]]) -> Iterator[str]:
    """The address of who answers as it is told; it hangs up after b"bye"."""
    router = Router("127.0.0.1", 0, 4096, protocol.MAX_BYTES)
    over = threading.Event()

    def play() -> None:
        while not over.is_set():
            if (heard := router.receive(50)) is None:
                continue
            for said in answers(protocol.read_request(heard[1])):
                if said == b"bye":
                    over.set()
                else:
                    router.send(heard[0], said if isinstance(said, bytes) else protocol.encode(said))
        router.close(100)

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield router.address
    finally:
        over.set()
        thread.join(20)
        assert not thread.is_alive()


def pred(tick: int) -> protocol.Pred:
    return protocol.Pred(
        session="s", tick=tick, event_ns=0, heads=(), present=(False,), age_ns=(-1,), waited_ns=0, step_ns=0, model=""
    )  # fmt: skip


def test_garbage_between_messages_is_passed_over(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    garbage: list[protocol.Reply | bytes] = [rng.bytes(rng.integers(1, 300)) for _ in range(200)]
    whole = protocol.encode(pred(0))
    garbage += [whole[:end] for end in range(1, len(whole))]
    garbage += [msgspec.msgpack.encode(v) for v in (None, 7, "pred", [], {"op": "pred", "session": "t", "tick": 0})]

    def answers(request: protocol.Request) -> list[protocol.Reply | bytes]:
        match request:
            case protocol.Hello():
                return [*garbage, WELCOME]
            case protocol.Open():
                return [*garbage, protocol.Ready(session="s", token="t", next=0, resumed=False)]
            case protocol.Step(tick=tick):
                return [*garbage, pred(tick), *garbage]
        return []

    body = """
        const client = await connect(given.address);
        const session = await client.open("s");
        const ticks = [(await session.step({})).tick, (await session.step({})).tick];
        client.close();
        console.log(JSON.stringify(ticks));
    """
    with lying(answers) as address:
        assert run(tmp_path, body, address=address) == [0, 1]


def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    """What is not answered, not answered any more or hung up on ends with an error that says which."""

    def answers(request: protocol.Request) -> list[protocol.Reply | bytes]:
        match request:
            case protocol.Hello():
                return [WELCOME]
            case protocol.Open(session=session) if session != "never":
                return [protocol.Ready(session=session, token="t", next=0, resumed=False)]
            case protocol.Step(session="s", tick=1):
                return [pred(1)]  # and tick 0 never
            case protocol.Step(session="bye"):
                return [b"bye"]
        return []

    body = (
        CODES
        + """
        const client = await connect(given.address, { timeoutMs: 500 });
        const session = await client.open("s");
        const dropped = code("dropped", () => session.step({}, { timeoutMs: 60_000 }));
        await session.step({});
        await dropped; // by the answer to what was sent later
        await code("late", () => session.step({}));
        session.send({});
        await code("late answers", async () => { for await (const answer of session.answers()); });
        await code("flush", () => session.flush());
        await code("over", () => session.step({}));
        await code("open", () => client.open("never"));
        const bye = await client.open("bye");
        bye.send({});
        await Promise.all([
            code("step at the end", () => bye.step({})),
            code("answers at the end", async () => { for await (const answer of bye.answers()); }),
            code("flush at the end", () => bye.flush()),
        ]);
        await code("afterwards", () => client.open("t"));
        console.log(JSON.stringify(codes));
        """
    )
    with lying(answers) as address:
        assert run(tmp_path, body, address=address) == {
            "dropped": "timed_out",
            "late": "timed_out",
            "late answers": "timed_out",
            "flush": "timed_out",
            "over": "timed_out",
            "open": "timed_out",
            "step at the end": "closed",
            "answers at the end": "closed",
            "flush at the end": "closed",
            "afterwards": "closed",
        }


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (msgspec.structs.replace(WELCOME, version=2), "closed"),
        (msgspec.msgpack.encode({"op": "welcome", "version": 1}), "closed"),
        (protocol.Refused(error="bad_message", why="no"), "bad_message"),
    ],
)
def test_a_server_that_speaks_otherwise_is_left(tmp_path: Path, first: protocol.Reply | bytes, code: str) -> None:
    with lying(lambda _: [first]) as address:
        body = CODES + 'await code("said", () => connect(given.address)); console.log(JSON.stringify(codes));'
        assert run(tmp_path, body, address=address) == {"said": code}


def test_a_connection_that_says_nothing_stays(server: Server, tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
        const client = await connect(given.address);
        const session = await client.open("s");
        await session.step({});
        // the server asks after 2 s for the first time, and hangs up 6 s after that
        await new Promise((resolve) => setTimeout(resolve, 9000));
        const answer = await session.step({});
        client.close();
        console.log(JSON.stringify(answer.tick));
        """,
        address=server.address,
    )
    assert said == 1


def test_what_is_no_server_of_ours_is_noticed(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
        import net from "node:net";
        const answer = (socket) => { socket.on("error", () => {}); socket.end(Buffer.alloc(100, 7)); };
        const garbage = net.createServer(answer);
        await new Promise((resolve) => garbage.listen(0, "127.0.0.1", resolve));
        const said = [];
        for (const address of [`tcp://127.0.0.1:${garbage.address().port}`]) {
            try { await connect(address); said.push("connected"); } catch (error) { said.push(error.code); }
        }
        garbage.close();
        console.log(JSON.stringify(said));
        """,
    )
    assert said == ["closed"]


def test_msgpack_is_read_back_and_no_bytes_are_taken_for_more_than_they_are(tmp_path: Path) -> None:
    values = [
        0,
        1,
        127,
        128,
        255,
        65_536,
        2**40,
        -1,
        -32,
        -33,
        -(2**40),
        1.5,
        "",
        "ä" * 40,
        [1, [2]],
        {"a": {"b": None}},
    ]
    values += [True, False, list(range(20)), {f"k{i}": i for i in range(20)}, "x" * 70_000]
    rng = np.random.default_rng(0)
    said = run(
        tmp_path,
        """
        const same = given.values.map((v) => JSON.stringify(decode(encode(v))) === JSON.stringify(v));
        const big = decode(encode(2n ** 62n)) === 2n ** 62n && decode(encode(-(2n ** 62n))) === -(2n ** 62n);
        let ended = 0;
        for (const v of given.values) {
            const raw = encode(v);
            for (let end = 0; end < Math.min(raw.length, 300); end++) {
                try { decode(raw.subarray(0, end)); } catch (error) { ended += error instanceof RangeError; continue; }
                ended = NaN;
            }
        }
        let other = 0;
        for (const hex of given.noise) {
            try { decode(Buffer.from(hex, "hex")); } catch (error) { other += !(error instanceof RangeError); }
        }
        console.log(JSON.stringify({ same, big, ended, other }));
        """,
        values=values,
        noise=[rng.bytes(rng.integers(0, 60)).hex() for _ in range(3000)],
    )
    assert all(said["same"])
    assert said["big"] is True
    assert said["ended"] > 500
    assert said["other"] == 0
