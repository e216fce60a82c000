"""The JavaScript client docs/clients/stream_mmrnn.mjs against a server: the bits of an engine alone."""

from __future__ import annotations

import importlib.util
import json
import os
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
from serving import alone, running, settings_for, start, tick

from stream_mmrnn.bus.keys import KeyFolder
from stream_mmrnn.bus.request_reply import Router
from stream_mmrnn.core import config
from stream_mmrnn.core.types import Tick
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.server import Server

CLIENT = ROOT / "docs" / "clients" / "stream_mmrnn.mjs"
PACKAGES = ROOT / ".setup" / "javascript" / "node_modules"
"""Made by tools/setup.sh test, from docs/clients/package.json."""


def node() -> str:
    """Node itself, or the one of playwright."""
    found = importlib.util.find_spec("playwright")
    beside = Path(found.origin).parent / "driver" / "node" if found is not None and found.origin else None
    return shutil.which("node") or (str(beside) if beside is not None and beside.is_file() else "")


def missing() -> str:
    """Why the client cannot run on this machine; "" where it can."""
    if not node():
        return "Node is not installed"
    for name, version in json.loads((CLIENT.parent / "package.json").read_text())["dependencies"].items():
        package = PACKAGES / name / "package.json"
        if not package.is_file() or json.loads(package.read_text())["version"] != version:
            return f"npm's {name} {version} is not installed in {PACKAGES}; run tools/setup.sh test"
    return ""


pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.process]


@pytest.fixture
def server(toy: Path, tmp_path: Path) -> Iterator[Server]:
    with running(settings_for(toy, tmp_path / "states", slots=2)) as found:
        yield found


def install(folder: Path) -> Path:
    """Copy the client beside a program, as its page says."""
    shutil.copy(CLIENT, folder)
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(PACKAGES)
    return folder


def source(body: str, given: dict[str, Any]) -> str:
    imports = 'import { connect, ServeError } from "./stream_mmrnn.mjs";'
    return f"{imports}\nconst given = {json.dumps(given)};\n{body}\n"


def run(tmp_path: Path, body: str, **given: Any) -> Any:
    """What a module that has the client, and `given`, prints as JSON."""
    script = install(tmp_path) / "script.mjs"
    script.write_text(source(body, given))
    done = subprocess.run([node(), str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def plain(of: Tick) -> dict[str, Any]:
    """A tick as JSON for a script."""
    features = {m: vector.tolist() for m, vector in of.features.items() if of.present[m]}
    return {"event_ns": of.event_ns, "age_ns": of.age_ns, "features": features}


CODES = """
    const codes = {};
    const code = async (name, ask) => {
        const long = new Promise((resolve) => setTimeout(resolve, 8000, { code: "hangs" }).unref());
        const done = (async () => ask())().then(() => ({ code: "none" }), (error) => error);
        const outcome = await Promise.race([done, long]);
        codes[name] = outcome.code ?? String(outcome);
        return outcome;
    };
"""
"""Collects the error code of each call by a name; `hangs` where the call does not end."""


def test_a_session_has_the_same_bits_as_an_engine_alone(server: Server, toy: Path, tmp_path: Path) -> None:
    ticks = [tick("js", i) for i in range(50)]
    found = run(
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
    assert found["ticks"] == list(range(50))
    assert [bytes.fromhex(bits) for bits in found["bits"]] == alone(toy, ticks[:40]) + alone(toy, ticks[40:])
    assert (found["flushed"], found["again"]) == (40, None)
    assert found["present"] == [t.present for t in ticks]
    assert found["events"] == [t.event_ns for t in ticks]
    assert found["model"] == server.engine.spec.sha256
    assert found["trip"] > 0
    assert len(server.sessions) == 0


def test_refusals_have_codes_and_tokens_bring_sessions_back(server: Server, toy: Path, tmp_path: Path) -> None:
    found = run(
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
        await code("no server", connect("tcp://127.0.0.1:9"));
        await code("address", connect("nonsense"));
        console.log(JSON.stringify({ codes, retry: busy.retryS, resumed: again.resumed, tick: answer.tick }));
        """,
        address=server.address,
    )
    assert found["codes"] == {
        "duplicate": "duplicate",
        "unknown": "unknown",
        "width": "bad_tick",
        "modality": "bad_tick",
        "busy": "busy",
        "taken": "evicted",
        "after": "evicted",
        "closed": "closed",
        "no server": "closed",
        "address": "closed",
    }
    assert found["retry"] > 0
    assert found["resumed"] is True
    assert found["tick"] >= 1


@pytest.mark.parametrize("queue", [1, 256])
def test_ticks_sent_ahead_are_answered_in_order_and_none_is_refused(toy: Path, tmp_path: Path, queue: int) -> None:
    ticks = [tick("js", i) for i in range(200)]
    with running(settings_for(toy, tmp_path / "states", queue=queue)) as server:
        found = run(
            tmp_path,
            """
            const client = await connect(given.address);
            const session = await client.open("js");
            const bits = (answer) => Buffer.from(answer.heads.next.buffer).toString("hex");
            const sent = given.ticks.map((t) => session.send(t.features, { eventNs: t.event_ns, ageNs: t.age_ns }));
            const flushed = await session.flush(); // after all of them
            const got = [];
            for await (const answer of session.answers()) got.push(answer);
            for await (const answer of session.answers()) got.push(answer); // all have an answer: it ends at once
            session.send({}, { tick: 7 }); // a duplicate
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
    assert found["sent"] == found["ticks"] == list(range(200))
    assert [bytes.fromhex(bits) for bits in found["bits"]] == alone(toy, ticks)
    assert (found["flushed"], found["skipped"]) == (200, 1)
    assert "overrun" not in counts
    assert "refused" not in counts


def test_a_token_continues_the_session_of_another_connection(server: Server, toy: Path, tmp_path: Path) -> None:
    ticks = [tick("s", i) for i in range(20)]
    found = run(
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
        const { code, reason, token } = session.error; // pushed by the server
        first.close();
        second.close();
        console.log(JSON.stringify({ got, heard: [code, reason, token], next: again.nextTick }));
        """,
        address=server.address,
        ticks=[plain(of) for of in ticks],
    )
    assert [bytes.fromhex(bits) for bits in found["got"]] == alone(toy, ticks)
    assert found["heard"] == ["evicted", "taken", ""]
    assert found["next"] == 20


def test_a_session_that_was_evicted_when_idle_comes_back_with_its_next_tick(toy: Path, tmp_path: Path) -> None:
    ticks = [tick("s", i) for i in range(2)]
    asked = settings_for(toy, tmp_path / "states")
    with running(msgspec.structs.replace(asked, state=msgspec.structs.replace(asked.state, idle_s=1.0))) as server:
        got = run(
            tmp_path,
            """
            const client = await connect(given.address);
            const session = await client.open("s");
            const got = [];
            for (const t of given.ticks) {
                const answer = await session.step(t.features, { eventNs: t.event_ns, ageNs: t.age_ns });
                got.push(Buffer.from(answer.heads.next.buffer).toString("hex"));
                await new Promise((resolve) => setTimeout(resolve, 2000));
            }
            client.close();
            console.log(JSON.stringify(got));
            """,
            address=server.address,
            ticks=[plain(of) for of in ticks],
        )
        assert server.sessions.counts["evicted"] == 2
    assert [bytes.fromhex(bits) for bits in got] == alone(toy, ticks)


def test_an_invalid_argument_is_an_error_and_does_not_change_the_session(server: Server, tmp_path: Path) -> None:
    found = run(
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
    assert found["codes"] == {
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
    assert found["events"] == [found["ns"], found["ns"], str(-(2**63)), "5"]
    assert found["next"] == 1 + 256 + 4


def test_the_pages_run_as_written(tmp_path: Path) -> None:
    """On the real model, at another port than the usual one."""
    docs = CLIENT.parent.parent
    pages = {docs / "serve.md": 1, docs / "clients" / "README.md": 26}  # answers that each prints
    model = config.models_folder() / "turn_taking" / "step.onnx"
    with running(settings_for(model, tmp_path / "states")) as server:
        for page, answers in pages.items():
            snippet, *_ = re.findall(r"```js\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
            assert "tcp://127.0.0.1:7701" in snippet
            script = install(tmp_path) / "page.mjs"
            script.write_text(snippet.replace("tcp://127.0.0.1:7701", server.address))
            done = subprocess.run([node(), str(script)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            assert len(re.findall(r"^\d+ Float32Array", done.stdout, re.MULTILINE)) == answers
            assert "undefined" not in done.stdout
        assert server.host.counts["predictions"] == sum(pages.values())


# ---- a faulty server -------------------------------------------------------------------------------------------------

WELCOME = protocol.Welcome(
    version=1, name="m", model="0" * 64, tick_ns=1, queue=4, modalities=(protocol.Modality("audio", 1),), heads=()
)


@contextmanager
def lying(answers: Callable[[protocol.Request], list[protocol.Reply | bytes]]) -> Iterator[str]:
    """The address of a server that sends `answers(request)`; it closes its socket after b"bye"."""
    router = Router("127.0.0.1", 0, 4096, protocol.MAX_BYTES)
    over = threading.Event()

    def play() -> None:
        while not over.is_set():
            if (received := router.receive(50)) is None:
                continue
            for reply in answers(protocol.read_request(received[1])):
                if reply == b"bye":
                    over.set()
                else:
                    router.send(received[0], reply if isinstance(reply, bytes) else protocol.encode(reply))
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


def test_garbage_between_messages_is_ignored(tmp_path: Path) -> None:
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


def test_every_call_ends_with_an_error_where_the_server_does_not_answer(tmp_path: Path) -> None:
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
        const dropped = code("dropped", () => session.step({}, { timeoutMs: 2000 }));
        await session.step({});
        await dropped;
        await code("late", () => session.step({}));
        session.send({});
        await code("late answers", async () => { for await (const answer of session.answers()); });
        await code("flush", () => session.flush());
        await code("over", () => session.step({}));
        await code("open", () => client.open("never"));
        const bye = await client.open("bye");
        bye.send({});
        await Promise.all([
            code("step without a server", () => bye.step({})),
            code("answers without a server", async () => { for await (const answer of bye.answers()); }),
            code("flush without a server", () => bye.flush()),
        ]);
        client.close();
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
            "step without a server": "timed_out",
            "answers without a server": "timed_out",
            "flush without a server": "timed_out",
            "afterwards": "closed",
        }


def test_what_the_server_has_lost_and_the_client_does_not_keep_is_an_error(tmp_path: Path) -> None:
    """A server that comes back without any state, after more ticks than the client keeps."""
    opened = 0

    def answers(request: protocol.Request) -> list[protocol.Reply | bytes]:
        nonlocal opened
        match request:
            case protocol.Hello():
                return [WELCOME]
            case protocol.Open():
                opened += 1
                return [protocol.Ready(session="s", token="t", next=0, resumed=opened > 1)]
            case protocol.Step(tick=tick) if tick < 300:
                return [pred(tick)]
        return [protocol.Refused(error="unknown", why="not open", session="s", tick=300)]

    body = """
        const client = await connect(given.address);
        const session = await client.open("s");
        for (let i = 0; i < 300; i++) await session.step({});
        const error = await session.step({}).catch((error) => error);
        client.close();
        console.log(JSON.stringify([error.code, error.message]));
    """
    with lying(answers) as address:
        code, message = run(tmp_path, body, address=address)
    assert code == "evicted"
    assert "as of tick 0, and ticks before 45 are not kept here" in message


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (msgspec.structs.replace(WELCOME, version=2), "closed"),
        (msgspec.msgpack.encode({"op": "welcome", "version": 1}), "closed"),
        (protocol.Refused(error="bad_message", why="no"), "bad_message"),
    ],
)
def test_a_server_of_another_version_is_an_error(tmp_path: Path, first: protocol.Reply | bytes, code: str) -> None:
    with lying(lambda _: [first]) as address:
        body = CODES + 'await code("connect", () => connect(given.address)); console.log(JSON.stringify(codes));'
        assert run(tmp_path, body, address=address) == {"connect": code}


def test_another_kind_of_server_is_an_error(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        """
        import net from "node:net";
        const answer = (socket) => { socket.on("error", () => {}); socket.end(Buffer.alloc(100, 7)); };
        const garbage = net.createServer(answer);
        await new Promise((resolve) => garbage.listen(0, "127.0.0.1", resolve));
        const codes = [];
        for (const address of [`tcp://127.0.0.1:${garbage.address().port}`]) {
            const options = { timeoutMs: 1000 };
            try { await connect(address, options); codes.push("connected"); } catch (error) { codes.push(error.code); }
        }
        garbage.close();
        console.log(JSON.stringify(codes));
        """,
    )
    assert found == ["closed"]


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_a_server_with_keys_serves_a_client_whose_key_may_write(toy: Path, tmp_path: Path) -> None:
    keys, stranger = KeyFolder.new(tmp_path / "keys"), KeyFolder.new(tmp_path / "stranger")
    other = KeyFolder.new(tmp_path / "other")
    keys.allow("stranger", stranger.client, write=True)
    ticks = [tick("s", i) for i in range(5)]
    body = (
        CODES
        + """
        const timeoutMs = 1000;
        const stranger = { keys: given.stranger, serverKey: given.server };
        const client = await connect(given.address, stranger);
        const session = await client.open("s");
        const got = [];
        for (const t of given.ticks) {
            const answer = await session.step(t.features, { eventNs: t.event_ns, ageNs: t.age_ns });
            got.push(Buffer.from(answer.heads.next.buffer).toString("hex"));
        }
        await session.close();
        client.close();
        const own = await connect(given.address, { keys: given.keys });
        own.close();
        await code("no key", () => connect(given.address, { timeoutMs }));
        await code("not allowed", () => connect(given.address, { ...stranger, keys: given.other, timeoutMs }));
        await code("wrong server", () => connect(given.address, { keys: given.stranger, timeoutMs }));
        await code("no folder", () => connect(given.address, { keys: given.keys + "/nothing" }));
        await code("no public key", () => connect(given.address, { keys: given.keys, serverKey: "short" }));
        console.log(JSON.stringify({ got, codes }));
        """
    )
    with running(settings_for(toy, tmp_path / "states", keys=str(keys.path))) as server:
        found = run(
            tmp_path,
            body,
            address=server.address,
            server=keys.server,
            ticks=[plain(of) for of in ticks],
            **{name: str(folder.path) for name, folder in (("keys", keys), ("stranger", stranger), ("other", other))},
        )
        assert server.authenticator is not None
        assert server.authenticator.refused.get("key_not_allowed", 0) >= 1
    assert [bytes.fromhex(bits) for bits in found["got"]] == alone(toy, ticks)
    assert found["codes"] == {
        "no key": "closed",
        "not allowed": "closed",
        "wrong server": "closed",
        "no folder": "keys",
        "no public key": "keys",
    }


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file modes")
def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    keys = KeyFolder.new(tmp_path / "keys")
    (keys.path / "client.key").chmod(0o644)
    body = (
        CODES
        + """
        const error = await code("open", () => connect("tcp://127.0.0.1:9", { keys: given.keys }));
        console.log(JSON.stringify([codes.open, error.message]));
    """
    )
    code, message = run(tmp_path, body, keys=str(keys.path))
    assert code == "keys"
    assert "others can read it" in message


# ---- reconnect -------------------------------------------------------------------------------------------------------


def test_a_killed_server_comes_back_and_no_tick_is_lost_or_differs(toy: Path, tmp_path: Path) -> None:
    ticks = [tick("s", i) for i in range(90)]
    server, address = start(toy, tmp_path, 0)
    script = install(tmp_path) / "script.mjs"
    script.write_text(
        source(
            """
            import { once } from "node:events";
            const client = await connect(given.address, { timeoutMs: 30000 });
            const session = await client.open("s");
            const answers = new Map();
            const keep = (answer) => answers.set(answer.tick, Buffer.from(answer.heads.next.buffer).toString("hex"));
            const options = (t) => ({ eventNs: t.event_ns, ageNs: t.age_ns });
            for (const t of given.ticks.slice(0, 40)) keep(await session.step(t.features, options(t)));
            await session.flush();
            for (const t of given.ticks.slice(40, 60)) session.send(t.features, options(t));
            console.log("sent");
            await once(process.stdin, "data"); // the server is another process now
            for await (const answer of session.answers()) keep(answer);
            for (const t of given.ticks.slice(60)) keep(await session.step(t.features, options(t)));
            await session.close();
            client.close();
            process.stdin.destroy();
            console.log(JSON.stringify({ answers: [...answers], skipped: session.skipped }));
            """,
            {"address": address, "ticks": [plain(of) for of in ticks]},
        )
    )
    client = subprocess.Popen([node(), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stdout.readline() == "sent\n"
        server.kill()
        server.communicate()
        server, _ = start(toy, tmp_path, int(address.rpartition(":")[2]))
        out, _ = client.communicate("go\n", timeout=60)
    finally:
        for process in (server, client):
            process.kill()
            process.communicate()
    found = json.loads(out)
    got = {index: bytes.fromhex(bits) for index, bits in found["answers"]}
    expected = alone(toy, ticks)
    assert got == {index: expected[index] for index in got}
    # a tick that was stepped and saved, but whose answer died with the server, is counted
    assert len(got) + found["skipped"] == len(ticks)
    assert set(got) >= {*range(40), *range(60, 90)}
