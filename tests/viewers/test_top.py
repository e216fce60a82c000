"""`top` and `predictions` with real sessions, in a terminal and in pipes; the page's WebSocket with real clients."""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from harness import COMMAND, Running

from stream_mmrnn.bus import Address
from stream_mmrnn.bus import registry as running
from stream_mmrnn.core.errors import NotRunning
from stream_mmrnn.viewers.top.processes import ProcessUsage
from stream_mmrnn.viewers.top.system import Systems

pytestmark = pytest.mark.process

NAME = f"watched-{os.getpid()}"


@pytest.fixture(scope="module")
def live(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One session for all tests that only read."""
    with closing(Running("--source", "synthetic", "--model", model, "--session", NAME)) as session:
        session.wait_for(lambda: runs(NAME))
        yield session
        code, summary, _ = session.end()
    assert code == 0
    assert summary["balanced"]


def runs(name: str) -> bool:
    with suppress(NotRunning):
        return bool(running.find(name).page)
    return False


def run(*args: object) -> tuple[int, str, str]:
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def system() -> dict[str, Any]:
    code, out, err = run("top", "--session", NAME, "--json")
    assert (code, err) == (0, "")
    [found] = json.loads(out.splitlines()[-1])["systems"]
    return found  # type: ignore[no-any-return]


# --- top


@pytest.mark.usefixtures("live")
def test_top_shows_the_running_session() -> None:
    found = system()
    assert (found["session"], found["engine"], found["sessions"]["names"]) == (NAME, True, [NAME])
    assert found["page"].startswith("http://127.0.0.1:")
    assert found["tick"] > 0
    assert found["predictions_per_s"] > 0
    assert "step" in found["latency_ms"]
    assert found["heads"]["next"]["labels"] == ["yes", "no"]
    assert {"feature/vision", "feature/audio", "feature/text"} <= set(found["streams"])
    processes = {p["node"]: p for p in found["processes"]}
    if Path("/proc/self/comm").exists():
        assert {"supervisor", "broker", "clock", "engine", "camera", "microphone", "text", "dashboard"} <= set(
            processes
        )
    assert processes["supervisor"]["pid"] == found["pid"]
    assert processes["engine"]["state"] == "ready"
    assert all(p["rss_bytes"] > 1_000_000 for p in processes.values() if p["node"] != "helper")
    assert found["cpu_percent"] > 0
    assert found["rss_bytes"] == sum(p["rss_bytes"] for p in found["processes"])
    assert (found["restarts"], found["given_up"]) == ({}, {})


@pytest.mark.usefixtures("live")
def test_top_without_a_terminal_prints_once() -> None:
    code, out, err = run("top", "--session", NAME)
    assert (code, err) == (0, "")
    for words in (f"session {NAME}", "supervisor", "engine", "cpu", "MB", "latency, ms", "losses", "next"):
        assert words in out, out


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.usefixtures("live")
def test_top_in_a_terminal_redraws_until_it_is_interrupted() -> None:
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 110, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color"}
    env.pop("COLUMNS", None)
    process = subprocess.Popen([*COMMAND, "top", "--session", NAME, "--every", "0.3"], stdout=theirs, env=env)
    os.close(theirs)
    screen = ""
    try:
        ticks: set[str] = set()
        end = time.monotonic() + 30
        while len(ticks) < 3:
            assert time.monotonic() < end, screen
            screen += read(ours)
            ticks = set(re.findall(r"(\d+) ticks", screen))
        assert f"session {NAME}" in screen
        assert "\x1b[?1049h" in screen, "it uses the alternate screen"
        process.send_signal(signal.SIGINT)
        while process.poll() is None:
            screen += read(ours)
        assert process.returncode == 0
        screen += read(ours)
        assert "\x1b[?1049l" in screen, "the terminal is restored"
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read(fd: int) -> str:
    if not select.select([fd], [], [], 0.2)[0]:
        return ""
    with suppress(OSError):  # the other end is closed
        return os.read(fd, 65536).decode("utf-8", "replace")
    return ""


def test_a_session_that_was_killed_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as a session, nor as a note that it cannot be watched."""
    monkeypatch.setattr(running.config, "run_folders", lambda: [tmp_path / "run"])
    address = Address.at("127.0.0.1", 5599)
    sleepers = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(3)]
    try:
        for i, sleeper in enumerate(sleepers):
            # the second one's keys cannot be read, so it is a note
            keys = str(tmp_path / "nowhere") if i == 1 else ""
            entry = running.entry_of(f"s{i}", True, address, keys)
            started = running.began(sleeper.pid)
            assert started is not None
            running.Registration(msgspec.structs.replace(entry, pid=sleeper.pid, started=started))
        with closing(Systems()) as systems:
            assert len(systems.systems) == 2
            assert len(systems.notes) == 1
            for sleeper in sleepers[:2]:
                sleeper.kill()
                sleeper.wait()
            systems.poll()
            assert [found["session"] for found in systems.document()["systems"]] == ["s2"]
            assert systems.notes == {}
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.communicate()


def test_nothing_running_is_exit_code_1_and_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for args in (["top", "--json"], ["predictions"]):
        code, out, err = run(*args)
        assert (code, out) == (1, ""), args
        assert err.splitlines() == ["error: no session is running; start one by `stream-mmrnn live`"]


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="needs /proc")
def test_a_process_that_died_is_counted(model: Path) -> None:
    name = f"{NAME}-dies"
    with closing(Running("--source", "synthetic", "--model", model, "--session", name)) as session:
        [camera] = session.wait_for(lambda: session.children("camera"))
        session.wait_for(lambda: runs(name))
        os.kill(camera, signal.SIGKILL)
        session.wait_for(lambda: [p for p in session.children("camera") if p != camera])
        _, out, _ = run("top", "--session", name, "--json")
        [found] = json.loads(out)["systems"]
        assert found["restarts"] == {"camera": 1}
        session.end()


def test_usage_is_measured_per_process() -> None:
    code = (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(30,), daemon=True).start()\nwhile True: pass"
    )
    busy = subprocess.Popen([sys.executable, "-c", code])
    try:
        usage = ProcessUsage(os.getpid())
        for _ in range(200):
            rows = {r["pid"]: r for r in usage.read({busy.pid: "busy"})}
            if rows[busy.pid]["cpu_percent"] > 0 and rows[busy.pid]["threads"] == 2:
                break
            time.sleep(0.05)
        assert rows[os.getpid()]["node"] == "supervisor"
        assert rows[busy.pid]["node"] == "busy"
        assert rows[busy.pid]["cpu_percent"] > 0
        assert rows[busy.pid]["rss_bytes"] == pytest.approx(psutil.Process(busy.pid).memory_info().rss, rel=0.2)
    finally:
        busy.kill()
        busy.wait()
    assert busy.pid not in {r["pid"] for r in usage.read({})}
    assert ProcessUsage(2**22 + 5).read({}) == []


# --- predictions


@pytest.mark.usefixtures("live")
def test_predictions_are_json_lines() -> None:
    code, out, err = run("predictions", "--session", NAME, "--head", "next", "--count", 5, "--json")
    assert (code, err) == (0, "")
    *lines, summary = map(json.loads, out.splitlines())
    assert summary == {"predictions": 5, "lost": {}, "repeated": 0, "ended": ""}
    assert [p["tick"] for p in lines] == list(range(lines[0]["tick"], lines[0]["tick"] + 5))
    for p in lines:
        assert (p["session"], p["missed"], list(p["heads"])) == (NAME, 0, ["next"])
        assert len(p["heads"]["next"]) == 2
        assert p["latency_ms"] > 0
    code, out, _ = run("predictions", "--session", NAME, "--every", 0.2, "--count", 3, "--policy", "block", "--json")
    *lines, summary = map(json.loads, out.splitlines())
    assert [b["event_ns"] - a["event_ns"] for a, b in itertools.pairwise(lines)] == [200_000_000] * 2
    assert summary["lost"] == {"passed_over": 8}


@pytest.mark.usefixtures("live")
def test_a_closed_pipe_ends_it_without_an_error() -> None:
    process = subprocess.Popen(
        [*COMMAND, "predictions", "--session", NAME], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["session"] == NAME
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == b""


@pytest.mark.usefixtures("live")
def test_a_signal_ends_it_after_a_complete_line() -> None:
    process = subprocess.Popen(
        [*COMMAND, "predictions", "--session", NAME, "--json"], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        rest = [json.loads(line) for line in process.stdout]
        assert process.wait(30) == 0
    assert rest[-1]["predictions"] == len(rest)


def test_predictions_end_with_the_session(model: Path) -> None:
    name = f"{NAME}-ends"
    with closing(Running("--source", "synthetic", "--model", model, "--session", name)) as session:
        session.wait_for(lambda: runs(name))
        command = [*COMMAND, "predictions", "--session", name, "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["session"] == name
            session.end()
            *lines, summary = map(json.loads, process.stdout)
    assert process.returncode == 0
    assert summary["ended"] == "the session was closed"
    assert summary["predictions"] == len(lines) + 1


@pytest.mark.usefixtures("live")
def test_wrong_usage_is_an_error_message() -> None:
    code, out, err = run("predictions", "--session", NAME, "--head", "nix")
    assert (code, out) == (2, "")
    assert "there is no head 'nix'; the model's are next" in err
    code, _, err = run("predictions", "--address", "nix")
    assert (code, "no address of a bus" in err) == (2, True)


# --- the page's WebSocket


def socket_address() -> str:
    return str(system()["page"]).replace("http:", "ws:") + "predictions"


@pytest.mark.usefixtures("live")
def test_a_websocket_gets_the_model_and_then_predictions() -> None:
    from websockets.sync.client import connect

    with connect(socket_address()) as websocket:
        model = json.loads(websocket.recv(10))["model"]
        assert model["heads"][0]["labels"] == ["yes", "no"]
        got = [json.loads(websocket.recv(10)) for _ in range(20)]
        websocket.send("this is ignored")
        got += [json.loads(websocket.recv(10)) for _ in range(5)]
    assert got[0]["missed"] == 0
    assert [b["tick"] - a["tick"] for a, b in itertools.pairwise(got)] == [p["missed"] + 1 for p in got[1:]]
    assert {p["session"] for p in got} == {NAME}
    assert set(got[0]) == {"session", "tick", "event_ns", "latency_ms", "missed", "heads", "present", "age_ms", "model"}


@pytest.mark.usefixtures("live")
def test_another_site_gets_no_websocket() -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    address = socket_address()
    for headers in ({"Origin": "http://example.org"}, {"Origin": "null"}):
        with pytest.raises(InvalidStatus) as refused, connect(address, additional_headers=headers):
            pass
        assert refused.value.response.status_code == 403
    with pytest.raises(InvalidStatus) as refused, connect(address + "/nothing"):
        pass
    assert refused.value.response.status_code == 404
    own = address.replace("ws:", "http:").removesuffix("/predictions")
    with connect(address, additional_headers={"Origin": own}) as websocket:
        assert "model" in json.loads(websocket.recv(10))


NODE = """
const socket = new WebSocket(process.argv[1]);
let received = 0;
socket.onmessage = (event) => {
  const message = JSON.parse(event.data);
  if (message.heads) console.log(message.heads.next.length);
  if (++received == 4) socket.close();
};
socket.onerror = (event) => { console.log("error", event.message); process.exit(1); };
"""


@pytest.mark.usefixtures("live")
def test_node_reads_the_websocket() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    flag = ["--experimental-websocket"]
    probe = [node, *flag, "-e", "process.exit(typeof WebSocket == 'function' ? 0 : 3)"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this node has no WebSocket of its own")
    done = subprocess.run(
        [node, *flag, "-e", NODE, socket_address()], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["2", "2", "2"]), done.stderr
