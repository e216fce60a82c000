"""The client in JavaScript, docs/clients/stream_mmrnn.mjs, against a server of ours: the bits of an engine alone."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_serve import alone, running, settings_for, tick

from stream_mmrnn.serve.server import Server

CLIENT = Path(__file__).parent.parent / "docs" / "clients" / "stream_mmrnn.mjs"


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
        ticks=[
            {
                "event_ns": t.event_ns,
                "age_ns": t.age_ns,
                "features": {m: v.tolist() for m, v in t.features.items() if t.present[m]},
            }
            for t in ticks
        ],
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


def test_a_connection_that_says_nothing_stays(server: Server, tmp_path: Path) -> None:
    said = run(
        tmp_path,
        """
        const client = await connect(given.address);
        const session = await client.open("s");
        await session.step({});
        await new Promise((resolve) => setTimeout(resolve, 8000)); // longer than the server waits for a sign of life
        const answer = await session.step({});
        client.close();
        console.log(JSON.stringify(answer.tick));
        """,
        address=server.address,
    )
    assert said == 1


def test_a_server_that_dies_is_noticed_by_all_who_wait(server: Server, tmp_path: Path) -> None:
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
