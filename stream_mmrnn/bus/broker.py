"""The broker, which gives all messages one order, and the authenticator, which decides who may connect.

It does not read what messages mean.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from stream_mmrnn.bus.address import Address, Right, refuse_old_peers
from stream_mmrnn.core import config, wire
from stream_mmrnn.core.errors import ProcessError

_STOP = b"TERMINATE"
VIEW_BUFFER_BYTES = 256 * 1024
"""Kernel buffer per viewer over tcp: by default it grows to megabytes of outdated messages."""
_REFUSALS = {
    zmq.Event.HANDSHAKE_FAILED_AUTH: "key_not_allowed",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "no_key",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "unfinished",
}
_WRONG_SERVER_KEY = 0x11000001  # ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC, which pyzmq does not name
_ZAP = "inproc://zeromq.zap.01"


class Authenticator:
    """Admits or refuses connections by their public keys (CURVE and ZAP), and counts refusals.

    `allowed(right, public_key)` is called for every new connection, in a thread of the broker.
    """

    def __init__(self, secret: str, allowed: Callable[[Right, str], bool]) -> None:
        """`secret`: the server's secret key."""
        self._secret, self._allowed = secret, allowed
        self._monitors: list[zmq.Socket[bytes]] = []
        self.admitted = self.disconnected = 0
        self.refused: dict[str, int] = {}
        """Refused connections by reason: `key_not_allowed` (unknown or removed), `no_key` (a client without CURVE),
        `wrong_server_key`, `unfinished` (the handshake was aborted). Each retry of a client counts."""

    def guard(self, socket: zmq.Socket[bytes], right: Right) -> None:
        """Require keys with this right on a socket; call it before the socket is bound."""
        socket.curve_server = True
        socket.curve_secretkey = self._secret.encode()
        socket.zap_domain = right.encode()
        # a socket has one monitor
        events = sum(_REFUSALS) | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
        monitor: Any = socket.get_monitor_socket(events)
        self._monitors.append(monitor)

    def open(self, context: zmq.Context[zmq.Socket[bytes]], stop: threading.Event) -> threading.Thread:
        """Start the thread; call it before the sockets are bound, so that every connection is checked."""
        requests = context.socket(zmq.REP)
        requests.setsockopt(zmq.LINGER, 0)
        requests.bind(_ZAP)
        thread = threading.Thread(target=self._serve, args=(requests, stop), name="authenticator", daemon=True)
        thread.start()
        return thread

    def _serve(self, requests: zmq.Socket[bytes], stop: threading.Event) -> None:
        poller = zmq.Poller()
        for socket in (requests, *self._monitors):
            poller.register(socket, zmq.POLLIN)
        while not stop.is_set():
            for socket, _ in poller.poll(50):
                if socket is requests:
                    self._answer(requests)
                else:
                    self._observe(socket)
        for socket in (requests, *self._monitors):
            socket.close(0)

    def _answer(self, requests: zmq.Socket[bytes]) -> None:
        """Answer one request of the ZeroMQ Authentication Protocol (ZAP, RFC 27)."""
        version, request, domain, _, _, mechanism, *credentials = requests.recv_multipart()
        admitted = False
        if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            right: Right = "write" if domain == b"write" else "read"
            admitted = self._allowed(right, z85.encode(credentials[0]).decode())
        code, text = (b"200", b"OK") if admitted else (b"400", b"this key is not allowed here")
        requests.send_multipart([version, request, code, text, b"", b""])

    def _observe(self, monitor: zmq.Socket[bytes]) -> None:
        message = parse_monitor_message(monitor.recv_multipart())
        event = zmq.Event(message["event"])
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self.admitted += 1
            return
        if event == zmq.Event.DISCONNECTED:
            self.disconnected += 1
            return
        reason = "wrong_server_key" if message["value"] == _WRONG_SERVER_KEY else _REFUSALS[event]
        self.refused[reason] = self.refused.get(reason, 0) + 1


def run_broker(
    address: Address,
    queue: int,
    ready: Callable[[], None],
    alive: Callable[[], bool],
    *,
    bulk_queue: int = 0,
    view_queue: int = 0,
    authenticator: Authenticator | None = None,
) -> None:
    """Forward every message from publishers to subscribers in one order, until `alive()` returns False.

    The loop is ZeroMQ's own (`zmq_proxy_steerable`), in C and without the GIL. It never waits for a reader: a reader
    whose queue is full loses the newest messages and counts them as a gap. A queue of 0 means the same as `queue`.

    Raises:
        ProcessError: an address is in use, or others could reach it and there is no authenticator.

    """
    if authenticator is None and address.publish.startswith("tcp:") and not config.is_loopback(address.host):
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
    authenticating = None
    if authenticator is None:
        refuse_old_peers(front)
        refuse_old_peers(back)
    else:
        authenticator.guard(front, "write")
        authenticator.guard(back, "read")
        authenticating = authenticator.open(context, over)
    try:
        front.bind(address.bound(address.publish))
        # a bind uses the high-water mark set before it: one socket (one order of messages), three queue lengths
        lanes = {address.subscribe: queue, address.bulk: bulk_queue or queue, address.view: view_queue or queue}
        for endpoint, length in lanes.items():
            back.set_hwm(length)
            back.setsockopt(zmq.SNDBUF, VIEW_BUFFER_BYTES if endpoint == address.view else -1)
            back.bind(address.bound(endpoint))
    except zmq.ZMQError as e:
        over.set()
        if authenticating is not None:
            authenticating.join()
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
    if authenticating is not None:
        authenticating.join()
    context.destroy(linger=0)
