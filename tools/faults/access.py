"""Who gets in: a bus with keys and a page with a token, asked by those who have none, a wrong one or one no more.

Real processes of this machine, over loopback. Every attempt is made, and what the broker and the page counted must be
what was tried.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mcap.reader import make_reader

from stream_mmrnn.bus import Address, Keys, Publisher, Subscriber, run_broker
from stream_mmrnn.bus.keys import KeyFolder
from stream_mmrnn.core import config, topics
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.core.settings import LOOPBACK
from stream_mmrnn.viewers.dashboard.server import Dashboard
from tools.faults.promise import Figure, Say

TITLE = "Access"
NOT_PROMISED = (
    (
        "A key that is removed gets no new connection; one that is open lasts until its owner leaves or the session "
        "ends, since ZeroMQ has no way to cut one peer off."
    ),
    "A key that may write may publish anything, the end of the session included: give it only to your own programs.",
    (
        "Without dashboard.cert and dashboard.key the page speaks plain HTTP: beyond loopback its token can be read on "
        "the way. Name both, or use an SSH tunnel, where the network is not yours."
    ),
    (
        "A recording without raw streams holds no words, pictures or sound, but vectors made from them, from which "
        "a reader who has the encoder may guess what was said; a typed `/label` is kept as it is."
    ),
)
_SENTENCE = "the heron waits beside quicksilver marshes until Wednesday"
_WAIT_S = 20.0
_EVERYWHERE = ("0.0.0.0", "::", "192.0.2.1")  # noqa: S104 what must not be bound without keys


class _Bus:
    """A broker with keys, in a thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = KeyFolder.new(folder)
        self.authenticator = self.folder.authenticator()
        self.address = Address.create("tcp", keys=self.folder.keys())
        ready, self._stop = threading.Event(), threading.Event()

        def alive() -> bool:
            return not self._stop.wait(0.02)

        self._thread = threading.Thread(
            target=run_broker, args=(self.address, 1000, ready.set, alive), kwargs={"authenticator": self.authenticator}
        )
        self._thread.start()
        ready.wait(_WAIT_S)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def _until(what: Callable[[], bool]) -> bool:
    end = time.monotonic() + _WAIT_S
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    return what()


def _tried(bus: _Bus, publisher: Publisher, keys: Keys | None, count: int) -> tuple[int, int]:
    """`count` readers and as many publishers with these keys: messages that got through, and refusals counted."""
    before = sum(bus.authenticator.refused.values())
    plain = Address.at(LOOPBACK, int(bus.address.publish.rpartition(":")[2]))
    readers = [Subscriber(plain, [""], 100, ("block", "latest", "drop_oldest")[i % 3], keys) for i in range(count)]
    writers = [Publisher(plain, 10, keys) for _ in range(count)]
    _until(lambda: sum(bus.authenticator.refused.values()) - before >= 2 * count)
    witness = Subscriber(bus.address, [topics.LABEL], 1000)
    for _ in range(20):
        publisher.publish(topics.CLOCK, topics.EVERYONE, 0, 0, b"")
        for writer in writers:
            writer.publish(topics.LABEL, "intruder", 0, 0, b"")
        time.sleep(0.01)
    through = sum(reader.receive(20) is not None for reader in readers) + (witness.receive(100) is not None)
    refused = sum(bus.authenticator.refused.values()) - before
    for reader in (*readers, witness):
        reader.close()
    for writer in writers:
        writer.close(0)
    return through, refused


def _keys(folder: Path, count: int, say: Say) -> Iterator[Figure]:
    bus = _Bus(folder / "keys")
    publisher = Publisher(bus.address, 1000)
    try:
        own = Subscriber(bus.address, [topics.CLOCK], 1000)
        publisher.wait_for_reader(topics.CLOCK, _WAIT_S)
        removed, viewer, stranger = (KeyFolder.new(folder / name) for name in ("removed", "viewer", "stranger"))
        server = bus.folder.server
        bus.folder.allow("removed", removed.client, write=True)
        bus.folder.remove("removed")
        bus.folder.allow("viewer", viewer.client)
        through = short = 0
        for name, keys, gives_up in (
            ("a key that is not allowed", stranger.keys(server), True),
            ("a key that was removed", removed.keys(server), True),
            ("no key", None, False),
            ("another server's key", viewer.keys(), False),
        ):
            got, refused = _tried(bus, publisher, keys, count)
            say(f"{name}: {2 * count} connections tried, {refused} refusals counted, {got} got something through")
            # a client that is refused for its key gives up; one that did not understand the server goes on trying
            enough = refused == 2 * count if gives_up else refused >= 2 * count
            through, short = through + got, short + (not enough)
        yield Figure(
            "access_let_in_connections",
            f"{8 * count} connections with a wrong, a removed or no key, or to another server; read or published",
            through,
            "",
            0,
            "==",
        )
        yield Figure(
            "access_uncounted_kinds", "of these four kinds, those whose refusals were not counted", short, "", 0, "=="
        )
        reads = Subscriber(bus.address, [topics.CLOCK], 1000, "drop_oldest", viewer.keys(server))
        writes = Publisher(bus.address, 10, viewer.keys(server))
        label = Subscriber(bus.address, [topics.LABEL], 1000)
        read, wrote = False, 0
        for _ in range(200):
            publisher.publish(topics.CLOCK, topics.EVERYONE, 0, 0, b"")
            writes.publish(topics.LABEL, "viewer", 0, 0, b"")
            read |= reads.receive(10) is not None
            wrote += label.receive(0) is not None
            if read and own.gaps.received.get(topics.CLOCK, 0) >= 20:
                break
            own.receive(0)
        yield Figure("access_viewer_kept_out", "a key that may read, and did not get a message", not read, "", 0, "==")
        yield Figure("access_viewer_published", "messages that it published all the same", wrote, "", 0, "==")
        for socket in (own, reads, label):
            socket.close()
        writes.close(0)
    finally:
        publisher.close(0)
        bus.close()


def _binds(folder: Path) -> Iterator[Figure]:
    """Everything that asks to be bound where others reach it, without a key or a token."""
    started = tried = 0
    for host in _EVERYWHERE:
        for table in (
            {"bus": {"transport": "tcp", "host": host}},
            {"bus": {"transport": "tcp", "host": host, "port": 5555}},
            {"dashboard": {"host": host}},
        ):
            tried += 1
            try:
                config.parse(table)
                started += 1
            except StreamError:
                pass
        for start in (
            lambda host=host: run_broker(Address.at(host, 5555), 10, lambda: None, lambda: False),
            lambda host=host: Dashboard(host),
        ):
            tried += 1
            try:
                start()
                started += 1
            except StreamError:
                pass
    settings = folder / "settings.toml"
    for text in ("[bus]\ntransport='tcp'\nhost='0.0.0.0'\n", "[dashboard]\nhost='0.0.0.0'\n"):
        settings.write_text(text)
        tried += 1
        done = _command("live", "-c", settings, "--source", "synthetic", "--duration", "0.5")
        started += done.returncode != 2
    what = f"{tried} ways to start where others reach it, without keys or a token"
    yield Figure("access_open_binds_started", what, started, "", 0, "==")


def _command(*args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stream_mmrnn", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2], **more)


def _page() -> Iterator[Figure]:
    token = "t" * 20
    page = Dashboard(_EVERYWHERE[0], token=token)
    page.update({"secret": 1})
    page.picture(b"secret")
    page.start()
    port = int(page.address.rstrip("/").rpartition(":")[2])

    def ask(path: str, method: str, headers: dict[str, str]) -> int:
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=10)
        try:
            connection.request(method, path, headers=headers)
            return connection.getresponse().status
        finally:
            connection.close()

    wrong = (
        {},
        {"Authorization": "Bearer " + "t" * 19},
        {"Cookie": f"stream_mmrnn_{port}=tt"},
        {"Authorization": token},
    )
    asked = [
        (p, m, h) for p in ("/", "/events", "/picture.jpg", "/healthz") for m in ("GET", "POST", "HEAD") for h in wrong
    ]
    bearer = {"Authorization": f"Bearer {token}"}
    foreign = [{**bearer, "Host": "example.org"}, {**bearer, "Origin": "http://example.org"}]
    asked += [(p, m, h) for p in ("/", "/events", "/picture.jpg") for m in ("GET", "POST") for h in foreign]
    try:
        answered = sum(ask(*a) not in (401, 403) for a in asked)
        opened = ask("/", "GET", bearer)
    finally:
        page.close()
    counted = sum(page.access.denied.values())
    what = f"{len(asked)} requests without the token, or from another site; answered"
    yield Figure("access_page_answered_requests", what, answered, "", 0, "==")
    yield Figure("access_page_uncounted_requests", "of these, not counted", len(asked) - counted, "", 0, "==")
    yield Figure("access_page_with_token_status", "the answer to who has the token", opened, "", 200, "==")


def _bytes_of(path: Path) -> bytes:
    """Everything a recording holds, unpacked: messages, channels, schemas and metadata."""
    with path.open("rb") as file:
        reader = make_reader(file)
        summary = reader.get_summary()
        parts = [repr(summary).encode()] if summary else []
        parts += [message.data for _, _, message in reader.iter_messages()]
        parts += [json.dumps(record.metadata).encode() for record in reader.iter_metadata()]
    return b"\n".join([*parts, path.read_bytes()]).lower()


def _words(folder: Path, say: Say) -> Iterator[Figure]:
    """One typed sentence, recorded with raw streams and without."""
    words = [w.encode() for w in re.findall(r"\w{5,}", _SENTENCE.lower())]
    found: dict[bool, int] = {}
    features = 0
    for raw in (True, False):
        path, settings = folder / f"raw_{raw}.mcap", folder / "settings.toml"
        settings.write_text(
            f"[record]\npath = '{path}'\nraw = {str(raw).lower()}\n[sources]\nvision = 'none'\naudio = 'synthetic'\n"
            f"text = 'stdin'\n[dashboard]\nenabled = false\n"
        )
        done = _command("live", "-c", settings, "--duration", "2", "--json", input=_SENTENCE + "\n")
        if done.returncode:
            say(f"the session ended with {done.returncode}: {done.stderr[-300:]}")
        data = _bytes_of(path)
        found[raw] = sum(word in data for word in words)
        info = json.loads(_command("info", path, "--json").stdout.splitlines()[-1])
        if not raw:
            features = info["channels"].get("feature/text", {}).get("messages", 0)
            said_raw = info["raw"]
    say(f"of {len(words)} words {found[True]} are in the file with raw streams, {found[False]} in the one without")
    what = "words of a typed sentence found in a whole recording"
    yield Figure("access_words_with_raw", what, found[True], "", len(words), "==")
    yield Figure("access_words_features_only", "the same, with record.raw = false", found[False], "", 0, "==")
    yield Figure("access_text_features", "its text was recorded as vectors", features, "messages", 1, ">=")
    yield Figure("access_info_says_raw", "`info` says raw of the file without", said_raw, "", 0, "==")


def run(quick: bool, say: Say) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="stream-mmrnn-faults-") as name:
        folder = Path(name)
        yield from _keys(folder, 3 if quick else 25, say)
        yield from _binds(folder)
        yield from _page()
        yield from _words(folder, say)
