"""The bus: one broker, so that all readers see one order; publishers and subscribers that count.

The broker binds the socket of the readers three times, with a queue for each kind of reader: `subscribe` for those who
must lose nothing, `bulk` for those of them that read pictures and sound, and `view` for those who want the newest. A
reader that stops fills its own short queue and nobody else's; on its return it passes over what is old.

The only file that speaks ZeroMQ. Knows nothing about what messages mean, beyond a clock that says we are heard, nor
where keys are kept: who may come in is asked of a function.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from stream_mmrnn import config, topics, wire
from stream_mmrnn.backlog import Backlog
from stream_mmrnn.clock import now_ns
from stream_mmrnn.config import LOOPBACK, Policy
from stream_mmrnn.errors import ProcessError, WireError
from stream_mmrnn.types import Envelope, Payload

_STOP = b"TERMINATE"
_LANES = ("publish", "subscribe", "bulk", "view")
_TRIES, _LAST_PORT = 50, 65_000
_VIEW_BUFFER_BYTES = 256 * 1024
"""Of the kernel, where a viewer reads over tcp: left alone it grows to megabytes of what nobody will look at."""
_ANY = {"0.0.0.0": LOOPBACK, "::": "::1"}  # noqa: S104 named, not bound
"""What a process of this machine connects to where all interfaces are bound."""

Right = Literal["read", "write"]


@dataclass(frozen=True, slots=True)
class Keys:
    """A CURVE key pair and the broker's public key, each as 40 characters of Z85."""

    public: str
    secret: str = field(repr=False)
    server: str

    def put_on(self, socket: zmq.Socket[bytes]) -> None:
        socket.curve_publickey = self.public.encode()
        socket.curve_secretkey = self.secret.encode()
        socket.curve_serverkey = self.server.encode()


def new_pair() -> tuple[str, str]:
    """A fresh public and secret key."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def public_of(secret: str) -> str:
    """The public key that belongs to a secret one; raises ValueError where it is none."""
    try:
        return zmq.curve_public(secret.encode("ascii")).decode()
    except (zmq.ZMQError, UnicodeEncodeError) as e:
        raise ValueError("no CURVE secret key") from e


class Address:
    """Where the broker's sockets are. Made once by the supervisor, given to every process."""

    def __init__(
        self,
        publish: str,
        subscribe: str,
        folder: str = "",
        bulk: str = "",
        view: str = "",
        host: str = LOOPBACK,
        keys: Keys | None = None,
        journal: str = "",
    ) -> None:
        """`host` is what the broker binds; `keys` those of our own processes. Without `bulk` or `view` it is
        `subscribe`. `journal` is for processes of ours alone.
        """
        self.publish, self.subscribe, self.folder = publish, subscribe, folder
        self.bulk, self.view = bulk or subscribe, view or subscribe
        self.host, self.keys, self.journal = host, keys, journal

    @classmethod
    def create(cls, transport: str, host: str = LOOPBACK, port: int = 0, keys: Keys | None = None) -> Address:
        """Fresh addresses: ipc in a private folder (0700), or tcp ports that were free just now."""
        if transport == "ipc":
            folder = tempfile.mkdtemp(prefix="stream-mmrnn-")
            publish, subscribe, bulk, view = (f"ipc://{folder}/{lane}" for lane in _LANES)
            return cls(publish, subscribe, folder, bulk, view, journal=f"ipc://{folder}/journal")
        if port:
            return cls.at(host, port, keys)._with_journal()
        context = zmq.Context()
        context.setsockopt(zmq.IPV6, 1)
        try:
            for _ in range(_TRIES):
                sockets = [context.socket(zmq.PUB) for _ in _LANES]
                first = sockets[0].bind_to_random_port(f"tcp://{_bracketed(host)}", max_port=_LAST_PORT)
                try:
                    for i, socket in enumerate(sockets[1:], 1):
                        socket.bind(f"tcp://{_bracketed(host)}:{first + i}")
                    return cls.at(host, first, keys)._with_journal()
                except zmq.ZMQError:  # one of them is taken
                    for socket in sockets:
                        socket.close(0)
        except zmq.ZMQError as e:
            raise ProcessError(f"the bus cannot bind {host}: {e}; give bus.host an address of this machine") from e
        finally:
            context.destroy(linger=0)
        raise ProcessError(f"the bus found no {len(_LANES)} free ports in a row on {host}; give bus.port")

    @classmethod
    def at(cls, host: str, port: int, keys: Keys | None = None) -> Address:
        """A bus over tcp whose `bus.port` is known: how a program on another machine finds it."""
        reach = _bracketed(_ANY.get(host, host))
        publish, subscribe, bulk, view = (f"tcp://{reach}:{port + i}" for i in range(len(_LANES)))
        return cls(publish, subscribe, "", bulk, view, host, keys)

    def _with_journal(self) -> Address:
        """A place for the journal that this user's processes alone can reach, where the system has such places."""
        if sys.platform == "win32":
            self.journal = _free_on_loopback()
        else:
            self.folder = tempfile.mkdtemp(prefix="stream-mmrnn-")
            self.journal = f"ipc://{self.folder}/journal"
        return self

    def bound(self, endpoint: str) -> str:
        """An endpoint as the broker binds it."""
        if self.host not in _ANY:
            return endpoint
        return f"tcp://{_bracketed(self.host)}:{endpoint.rpartition(':')[2]}"

    def lane(self, policy: Policy, wanted: list[str]) -> str:
        """Where a reader of these topics connects."""
        if policy != "block":
            return self.view
        return self.bulk if any(large.startswith(prefix) for prefix in wanted for large in _LARGE) else self.subscribe

    def remove(self) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


_LARGE = (*topics.raws("vision"), *topics.raws("audio"))


def _free_on_loopback() -> str:
    context = zmq.Context()
    socket = context.socket(zmq.PUB)
    try:
        return f"tcp://{LOOPBACK}:{socket.bind_to_random_port(f'tcp://{LOOPBACK}')}"
    finally:
        context.destroy(linger=0)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


_REFUSALS = {
    zmq.Event.HANDSHAKE_FAILED_AUTH: "key_not_allowed",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "no_key",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "unfinished",
}
_WRONG_SERVER_KEY = 0x11000001  # ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC, which pyzmq does not name
_ZAP = "inproc://zeromq.zap.01"


class Door:
    """Who may come in, where the broker asks for keys; counts who may not.

    `allowed(right, public_key)` is asked at every new connection, from a thread of the broker.
    """

    def __init__(self, secret: str, allowed: Callable[[Right, str], bool]) -> None:
        """`secret` is the server's."""
        self._secret, self._allowed = secret, allowed
        self._monitors: list[zmq.Socket[bytes]] = []
        self.admitted = 0
        self.refused: dict[str, int] = {}
        """Connections by reason: `key_not_allowed` (unknown, or removed since), `no_key` (a client without CURVE),
        `wrong_server_key`, `unfinished` (it left in the middle). A client that goes on trying counts each time."""

    def guard(self, socket: zmq.Socket[bytes], right: Right) -> None:
        """Before it is bound: only keys with this right may connect."""
        socket.curve_server = True
        socket.curve_secretkey = self._secret.encode()
        socket.zap_domain = right.encode()
        monitor: Any = socket.get_monitor_socket(sum(_REFUSALS) | zmq.Event.HANDSHAKE_SUCCEEDED)
        self._monitors.append(monitor)

    def open(self, context: zmq.Context[zmq.Socket[bytes]], stop: threading.Event) -> threading.Thread:
        """Begin to answer; before the sockets are bound, so that nobody slips in."""
        asked = context.socket(zmq.REP)
        asked.setsockopt(zmq.LINGER, 0)
        asked.bind(_ZAP)
        thread = threading.Thread(target=self._serve, args=(asked, stop), name="door", daemon=True)
        thread.start()
        return thread

    def _serve(self, asked: zmq.Socket[bytes], stop: threading.Event) -> None:
        poller = zmq.Poller()
        for socket in (asked, *self._monitors):
            poller.register(socket, zmq.POLLIN)
        while not stop.is_set():
            for socket, _ in poller.poll(50):
                if socket is asked:
                    self._answer(asked)
                else:
                    self._see(socket)
        for socket in (asked, *self._monitors):
            socket.close(0)

    def _answer(self, asked: zmq.Socket[bytes]) -> None:
        """One request of ZeroMQ's authentication protocol (RFC 27)."""
        version, request, domain, _, _, mechanism, *credentials = asked.recv_multipart()
        let_in = False
        if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            right: Right = "write" if domain == b"write" else "read"
            let_in = self._allowed(right, z85.encode(credentials[0]).decode())
        code, text = (b"200", b"OK") if let_in else (b"400", b"this key is not allowed here")
        asked.send_multipart([version, request, code, text, b"", b""])

    def _see(self, monitor: zmq.Socket[bytes]) -> None:
        said = parse_monitor_message(monitor.recv_multipart())
        event = zmq.Event(said["event"])
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self.admitted += 1
            return
        reason = "wrong_server_key" if said["value"] == _WRONG_SERVER_KEY else _REFUSALS[event]
        self.refused[reason] = self.refused.get(reason, 0) + 1


def run_broker(
    address: Address,
    queue: int,
    ready: Callable[[], None],
    alive: Callable[[], bool],
    *,
    bulk_queue: int = 0,
    view_queue: int = 0,
    door: Door | None = None,
) -> None:
    """Forward every message from publishers to subscribers in one order until told to stop.

    The loop is ZeroMQ's own (`zmq_proxy_steerable`), in C and without the GIL. It never waits for a reader: one whose
    queue is full loses the newest, and counts it. Queues of 0 are as `queue`.

    Raises:
        ProcessError: a place is taken, or others could reach it and there is no door.

    """
    if door is None and address.publish.startswith("tcp:") and not config.is_loopback(address.host):
        raise ProcessError(f"the broker does not bind {address.host} without keys: others could reach it; set bus.keys")
    context = zmq.Context()
    context.setsockopt(zmq.IPV6, 1)
    front, back, control = context.socket(zmq.XSUB), context.socket(zmq.XPUB), context.socket(zmq.PAIR)
    steer = context.socket(zmq.PAIR)
    over = threading.Event()
    for socket in (front, back):
        socket.set_hwm(queue)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
    doorkeeper = None
    if door is not None:
        door.guard(front, "write")
        door.guard(back, "read")
        doorkeeper = door.open(context, over)
    try:
        front.bind(address.bound(address.publish))
        # a queue's length is taken over when a place is bound: one socket, one order, three lengths
        lanes = {address.subscribe: queue, address.bulk: bulk_queue or queue, address.view: view_queue or queue}
        for endpoint, length in lanes.items():
            back.set_hwm(length)
            back.setsockopt(zmq.SNDBUF, _VIEW_BUFFER_BYTES if endpoint == address.view else -1)
            back.bind(address.bound(endpoint))
    except zmq.ZMQError as e:
        over.set()
        if doorkeeper is not None:
            doorkeeper.join()
        context.destroy(linger=0)
        raise ProcessError(f"the broker cannot bind {address.publish} or {address.subscribe}: {e}") from e
    control.bind("inproc://control")
    steer.connect("inproc://control")

    def watch() -> None:
        while alive():
            pass
        steer.send(_STOP)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    ready()
    zmq.proxy_steerable(front, back, None, control)
    watcher.join()
    over.set()
    if doorkeeper is not None:
        doorkeeper.join()
    context.destroy(linger=0)


_LOOK_EVERY_NS = 50_000_000
_MAX_STREAMS = 65_536
"""Streams, each a topic of a session, whose numbers a reader remembers before it forgets those long silent."""
_MAX_ENDED = 1024
"""The same of sessions that have ended: a message of theirs may still be on its way."""
_NOBODY = b"nobody"
"""A topic that nobody reads."""

Numbers = list[tuple[str, str, int]]
"""Topic, session, the next sequence number."""


def _secure(socket: zmq.Socket[bytes], keys: Keys | None) -> None:
    socket.setsockopt(zmq.IPV6, 1)
    if keys is not None:
        keys.put_on(socket)


class Publisher:
    """Sends envelopes of one process; numbers them per topic and session."""

    def __init__(self, address: Address, queue: int, keys: Keys | None = None) -> None:
        """`keys`: others than those of the address, if any."""
        self._context = zmq.Context()
        # XPUB instead of PUB: the subscriptions that reach us say when somebody listens
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_NODROP, 1)  # a full queue is an error we count, not a silent loss
        self._socket.set_hwm(queue)
        _secure(self._socket, keys or address.keys)
        self._socket.connect(address.publish)
        self._seq: dict[tuple[str, str], int] = {}
        self._wanted: list[bytes] = []
        self._looked_ns = 0
        self._newest: Envelope | None = None
        self.refused: dict[str, int] = {}
        """Messages per topic that the full queue to the broker did not take."""

    def _read_subscriptions(self, timeout_ms: int) -> None:
        while self._socket.poll(timeout_ms, zmq.POLLIN):
            note = self._socket.recv()
            if note[:1] == b"\x01":
                self._wanted.append(note[1:])
            elif note[:1] == b"\x00" and note[1:] in self._wanted:
                self._wanted.remove(note[1:])
            timeout_ms = 0

    def wait_for_reader(self, topic: str, timeout_s: float) -> bool:
        """True as soon as the broker forwards `topic` to somebody: what is sent from now on arrives."""
        deadline = now_ns() + int(timeout_s * 1e9)
        while not any(topic.encode().startswith(prefix) for prefix in self._wanted):
            left_ms = (deadline - now_ns()) // 1_000_000
            if left_ms <= 0:
                return False
            self._read_subscriptions(int(left_ms))
        return True

    def publish(
        self,
        topic: str,
        session: str,
        event_ns: int,
        capture_ns: int,
        payload: Payload,
        origin: str = "",
        device_ns: int = 0,
    ) -> Envelope:
        """Stamp, number and send one message; the envelope as sent."""
        key = (topic, session)
        seq = self._seq.get(key, 0)
        self._seq[key] = seq + 1
        at_ns = now_ns()
        envelope = Envelope(topic, session, seq, event_ns, capture_ns, at_ns, payload, origin, 0, device_ns)
        self._newest = envelope
        try:
            self._socket.send_multipart(wire.encode(envelope), zmq.DONTWAIT)
        except zmq.Again:
            self.refused[topic] = self.refused.get(topic, 0) + 1
        if at_ns - self._looked_ns > _LOOK_EVERY_NS:
            # who subscribes is of no haste here, and looking costs as much as sending
            self._looked_ns = at_ns
            self._read_subscriptions(0)
        return envelope

    def end(self, session: str) -> None:
        """Forget the numbers of a session that has ended; one that begins again begins at 0."""
        for topic in topics.TOPICS:
            self._seq.pop((topic, session), None)

    def prewarm(self) -> None:
        """Send the newest message once more, to nobody: code and buffers are in the caches for the next one."""
        if self._newest is not None and not any(_NOBODY.startswith(prefix) for prefix in self._wanted):
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart([_NOBODY, *wire.encode(self._newest)[1:]], zmq.DONTWAIT)

    def numbers(self) -> Numbers:
        """The next number of each stream."""
        return [(topic, session, seq) for (topic, session), seq in self._seq.items()]

    def go_on(self, numbers: Numbers) -> None:
        """Number as the publisher did that said `numbers`."""
        self._seq = {(topic, session): seq for topic, session, seq in numbers}

    def close(self, linger_ms: int = 500) -> None:
        self._socket.close(linger=linger_ms)
        self._context.term()


class Gaps:
    """Counts, per stream, what a reader got and what its sequence numbers say is missing. Bounded."""

    def __init__(self) -> None:
        self._next: dict[tuple[str, str], int] = {}
        self._before: dict[tuple[str, str], int] = {}
        """Of streams that were silent since the others filled `_next`, or whose sessions have ended."""
        self.received: dict[str, int] = {}
        """By topic; all statuses are one."""
        self.lost: dict[str, int] = {}

    def see(self, envelope: Envelope) -> None:
        topic, seq = envelope.topic, envelope.seq
        key = (topic, envelope.session)
        expected = self._next.get(key)
        if expected is None:
            expected = self._unseen(key, seq)
        topic = topics.counted_as(topic)
        self.received[topic] = self.received.get(topic, 0) + 1
        if seq > expected:
            self.lost[topic] = self.lost.get(topic, 0) + seq - expected
        # a seq below the expected one is a publisher that began anew
        self._next[key] = seq + 1

    def _unseen(self, key: tuple[str, str], seq: int) -> int:
        """The number that is expected of a stream that is not among those heard of late."""
        if len(self._next) >= _MAX_STREAMS:
            self._before, self._next = self._next, {}
        return self._before.pop(key, self._begins_at(key[1], seq))

    def _begins_at(self, session: str, seq: int) -> int:
        """What belongs to no session has begun before we listened; a session's streams begin with it, at 0."""
        return seq if session == topics.EVERYONE else 0

    def end(self, session: str) -> None:
        """A session has ended: its numbers are kept a while, for what is still on its way."""
        for key in ((topic, session) for topic in topics.TOPICS):
            if key in self._next:
                self._before[key] = self._next.pop(key)
        while len(self._before) > _MAX_ENDED:
            del self._before[next(iter(self._before))]

    def snapshot(self) -> tuple[Numbers, dict[str, int], dict[str, int]]:
        """All of it as a value: the next number of each stream; received; lost."""
        numbers = [(topic, session, seq) for (topic, session), seq in (self._before | self._next).items()]
        return numbers, self.received, self.lost

    def restore(self, numbers: Numbers, received: dict[str, int], lost: dict[str, int]) -> None:
        self._next, self._before = {(topic, session): seq for topic, session, seq in numbers}, {}
        self.received, self.lost = dict(received), dict(lost)


class GapsSinceNow(Gaps):
    """Of a reader that comes in the middle of sessions: what was before the first message it sees is not missing."""

    def _begins_at(self, session: str, seq: int) -> int:
        return seq


_AWAY_NS = 1_000_000_000
"""A reader that did not look for so long was away."""
_OLD_NS = 200_000_000
"""On its return what has been on the way for longer is passed over."""
_CATCH_UP_NS = 2_000_000_000
"""At the latest then it takes what comes, however old it says it is: its stamps make no sense."""
_TOLD_AFTER_NS = 1_000_000_000
"""By then every stream but the rarest has said what it is at, so that what is missing can be counted."""
_SLOWDOWN = 1000
"""The clock of another machine may be slower than ours by one part in so many."""


class Subscriber:
    """Reads envelopes of some topics in the broker's order; counts gaps and garbage.

    What happens to a reader that is too slow is its policy:

    - `block` takes everything in order: what it has not read waits here (`queue` messages), then in the broker
      (`bus.queue`, or `bus.bulk_queue` where pictures or sound are among it). What comes when both are full is lost,
      and counted as a gap. Nobody waits for it.
    - `drop_oldest` keeps the newest `queue` messages, `latest` the newest one of each stream; the broker holds
      `bus.view_queue` more. Where it was away for longer than a second, what is from before its return is dropped, so
      that the newest comes first, and `report` says what it missed.
    """

    def __init__(
        self,
        address: Address,
        topics: list[str],
        queue: int,
        policy: Policy = "block",
        keys: Keys | None = None,
        since_now: bool = False,
    ) -> None:
        """`keys`: others than those of the address, if any. `since_now`: a reader that comes in the middle of sessions
        has not lost what was before.
        """
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(queue)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
        self._backlog = Backlog(policy, queue) if policy != "block" else None
        if self._backlog is not None:
            self._socket.setsockopt(zmq.RCVBUF, _VIEW_BUFFER_BYTES)
        _secure(self._socket, keys or address.keys)
        _subscribe(self._socket, address.lane(policy, topics), topics)
        self._timeout_ms = -1
        self._newest: list[bytes] = []
        self.gaps = GapsSinceNow() if since_now else Gaps()
        self.garbage = 0
        self._next: Envelope | None = None
        self._queue = queue
        self._looked_ns = now_ns()
        self._way_ns: int | None = None
        """How long a message takes at best, and by how much the sender's clock is off."""
        self._way_at_ns = 0
        self._away_ns = self._returned_ns = 0
        self._catching_up = self._untold = False
        self._before = (0, 0)
        self.absences = 0

    def receive(self, timeout_ms: int) -> Envelope | None:
        """The next envelope, or None after `timeout_ms` without one."""
        if self._backlog is not None:
            self._fetch(self._backlog, 0 if len(self._backlog) else timeout_ms)
            return self._backlog.take()
        if self._next is not None:
            envelope, self._next = self._next, None
            return envelope
        if timeout_ms != self._timeout_ms:
            self._timeout_ms = self._socket.rcvtimeo = timeout_ms
        # to wait in the call that reads spares a poll between a message and its reader
        return self._read(0)

    def _read(self, flags: int) -> Envelope | None:
        try:
            frames = self._socket.recv_multipart(flags)
        except zmq.Again:
            return None
        self._newest = frames
        try:
            envelope = wire.decode(frames, now_ns())
        except WireError:
            self.garbage += 1
            return None
        self.gaps.see(envelope)
        return envelope

    def prewarm(self) -> None:
        """Read the newest message once more, for nobody: code and what is known of streams are in the caches."""
        with contextlib.suppress(WireError):
            wire.decode(self._newest, now_ns())

    def _fetch(self, backlog: Backlog, timeout_ms: int) -> None:
        """Put what waits into the backlog, and notice where we were away."""
        there = self._socket.poll(timeout_ms, zmq.POLLIN)
        at_ns = now_ns()
        away_ns = at_ns - self._looked_ns
        # who has not had anything yet is starting, not away
        if away_ns > _AWAY_NS + timeout_ms * 1_000_000 and self._way_ns is not None:
            self._return(backlog, at_ns, away_ns)
        # twice what can be in the queue: more is more than we could ever catch up with
        for _ in range(2 * self._queue):
            if not there:
                break
            envelope = self._read(zmq.DONTWAIT)
            if envelope is not None:
                if self._catching_up and self._is_old(envelope):
                    backlog.drop(envelope, "stale")
                else:
                    self._catching_up = False
                    backlog.put(envelope)
                self._measure_way(envelope)
            there = self._socket.poll(0, zmq.POLLIN)
        self._looked_ns = now_ns()
        if self._looked_ns - at_ns > _AWAY_NS and self._way_ns is not None:
            self._return(backlog, self._looked_ns, self._looked_ns - at_ns)  # stopped in the middle of it

    def _return(self, backlog: Backlog, at_ns: int, away_ns: int) -> None:
        if not self._untold:
            self._before = (self._lost(), self._stale())
            self._away_ns = 0
        self._away_ns += away_ns
        self._returned_ns = at_ns
        self._catching_up = self._untold = True
        self.absences += 1
        backlog.clear()

    def _is_old(self, envelope: Envelope) -> bool:
        age_ns = envelope.received_ns - envelope.publish_ns - (self._way_ns or 0)
        return age_ns > _OLD_NS and envelope.received_ns - self._returned_ns < _CATCH_UP_NS

    def _measure_way(self, envelope: Envelope) -> None:
        """The shortest so far; it grows slowly, so that a sender's slow clock does not make all it sends old."""
        took_ns, at_ns = envelope.received_ns - envelope.publish_ns, envelope.received_ns
        if self._way_ns is None:
            self._way_ns = took_ns
        else:
            self._way_ns = min(took_ns, self._way_ns + (at_ns - self._way_at_ns) // _SLOWDOWN)
        self._way_at_ns = at_ns

    def _lost(self) -> int:
        return sum(self.gaps.lost.values())

    def _stale(self) -> int:
        return sum(reasons["stale"] for reasons in self._backlog.dropped.values()) if self._backlog is not None else 0

    def report(self) -> str:
        """Once after each absence, a second after the return: how long it was and what it cost; else ""."""
        if not self._untold or now_ns() - self._returned_ns < _TOLD_AFTER_NS:
            return ""
        self._untold = False
        lost, stale = self._lost() - self._before[0], self._stale() - self._before[1]
        return (
            f"was away for {self._away_ns / 1e9:.1f} s and missed {lost + stale} messages: {lost} were no longer kept "
            f"for it, {stale} old ones it passed over"
        )

    def tally(self) -> dict[str, dict[str, int]]:
        """By topic, in messages: produced = delivered + waiting + each reason for which one was dropped.

        `produced` is what the sequence numbers say was sent; `lost` what never reached us.
        """
        backlog = self._backlog
        waiting: Mapping[str, int] = {}
        if backlog is not None:
            waiting = backlog.waiting()
        elif self._next is not None:
            waiting = {topics.counted_as(self._next.topic): 1}
        found: dict[str, dict[str, int]] = {}
        for topic, received in self.gaps.received.items():
            lost, waits = self.gaps.lost.get(topic, 0), waiting.get(topic, 0)
            found[topic] = {
                "produced": received + lost,
                "delivered": backlog.delivered[topic] if backlog is not None else received - waits,
                "waiting": waits,
                "lost": lost,
                **(backlog.dropped.get(topic, {}) if backlog is not None else {}),
            }
        return found

    def waiting(self) -> bool:
        """Whether an envelope is there already: the next `receive` gives it at once."""
        if self._backlog is not None:
            if not len(self._backlog):
                self._fetch(self._backlog, 0)
            return bool(len(self._backlog))
        while self._next is None and self._socket.poll(0, zmq.POLLIN):
            self._next = self._read(zmq.DONTWAIT)
        return self._next is not None

    @property
    def ahead(self) -> bool:
        """Whether `gaps` has seen an envelope that `receive` has not given yet."""
        return self._next is not None

    def stream(self, alive: Callable[[], bool], timeout_ms: int = 100) -> Iterator[Envelope]:
        """Envelopes as they come, until `alive()` says no."""
        while alive():
            envelope = self.receive(timeout_ms)
            if envelope is not None:
                yield envelope

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


def _subscribe(socket: zmq.Socket[bytes], endpoint: str, wanted: list[str]) -> None:
    """Connect, and ask for `wanted`; for the clock last, so that hearing it proves that the others are heard, too."""
    first = [topic for topic in wanted if topic != topics.CLOCK]
    for topic in first:
        socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
    socket.connect(endpoint)
    if len(first) < len(wanted):
        socket.setsockopt(zmq.SUBSCRIBE, topics.CLOCK.encode())


class Tap:
    """The journal's side: messages of some topics as they are on the wire, and requests of an engine."""

    def __init__(self, address: Address, wanted: list[str], queue: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(queue)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
        _secure(self._socket, address.keys)
        _subscribe(self._socket, address.lane("block", wanted), wanted)
        self._requests = self._context.socket(zmq.ROUTER)
        try:
            self._requests.bind(address.journal)
        except zmq.ZMQError as e:
            self.close()
            raise ProcessError(f"the journal cannot bind {address.journal}: {e}") from e

    def messages(self) -> Iterator[list[bytes]]:
        """What has come, without waiting."""
        while self._socket.poll(0, zmq.POLLIN):
            yield self._socket.recv_multipart()

    def request(self, timeout_ms: int) -> tuple[bytes, bytes] | None:
        """Who asks, and what; None after `timeout_ms` without."""
        if not self._requests.poll(timeout_ms, zmq.POLLIN):
            return None
        who, *frames = self._requests.recv_multipart()
        return who, b"".join(frames)

    def answer(self, who: bytes, content: bytes) -> None:
        """To one that is gone meanwhile it is dropped."""
        self._requests.send_multipart([who, content])

    def close(self) -> None:
        for socket in (self._socket, self._requests):
            socket.close(linger=0)
        self._context.term()


class Caller:
    """The engine's side of the journal's requests."""

    def __init__(self, address: Address) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(2)
        self._socket.connect(address.journal)

    def send(self, content: bytes) -> bool:
        """At once; False where the one before it has not been taken yet, or nobody is there."""
        try:
            self._socket.send(content, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def ask(self, content: bytes, timeout_ms: int) -> bytes | None:
        """The answer; None after `timeout_ms` without."""
        if not self.send(content) or not self._socket.poll(timeout_ms, zmq.POLLIN):
            return None
        return self._socket.recv()

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


class LineSocket:
    """A PULL socket on loopback whose every message is a line of text, for the text source."""

    def __init__(self, port: int, max_bytes: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        try:
            self._socket.bind(f"tcp://127.0.0.1:{port}")
        except zmq.ZMQError as e:
            self.close()
            raise OSError(str(e)) from e

    def receive(self, timeout_ms: int) -> bytes | None:
        return self._socket.recv() if self._socket.poll(timeout_ms, zmq.POLLIN) else None

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
