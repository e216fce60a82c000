"""Addresses: where a bus's sockets are, over ipc or tcp, and the keys that belong to them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

import zmq

from stream_mmrnn.bus.socket_dir import private_folder, remove_folder
from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.core.settings import LOOPBACK, Policy

_LANES = ("publish", "subscribe", "bulk", "view")
_TRIES, _LAST_PORT = 50, 65_000
_ANY = {"0.0.0.0": LOOPBACK, "::": "::1"}  # noqa: S104 named, not bound
"""The address that local processes connect to if the broker binds all interfaces."""
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
    """A new (public, secret) key pair."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def public_of(secret: str) -> str:
    """The public key of a secret key; raises ValueError if it is not one."""
    try:
        return zmq.curve_public(secret.encode("ascii")).decode()
    except (zmq.ZMQError, UnicodeEncodeError) as e:
        raise ValueError("no CURVE secret key") from e


class Address:
    """The endpoints of the broker. The supervisor creates it and passes it to every process."""

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
        """`host`: the address that the broker binds; `keys`: those of our own processes. `bulk` and `view` default to
        `subscribe`. `journal` is only for processes of the session.
        """
        self.publish, self.subscribe, self.folder = publish, subscribe, folder
        self.bulk, self.view = bulk or subscribe, view or subscribe
        self.host, self.keys, self.journal = host, keys, journal

    @classmethod
    def create(cls, transport: str, host: str = LOOPBACK, port: int = 0, keys: Keys | None = None) -> Address:
        """New addresses: ipc in a private folder (0700), or tcp ports that are free now."""
        if transport == "ipc":
            folder = private_folder("stream-mmrnn-")
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
                except zmq.ZMQError:  # one of the ports is in use
                    for socket in sockets:
                        socket.close(0)
        except zmq.ZMQBindError:
            pass
        except zmq.ZMQError as e:
            raise ProcessError(f"the bus cannot bind {host}: {e}; give bus.host an address of this machine") from e
        finally:
            context.destroy(linger=0)
        raise ProcessError(f"the bus found no {len(_LANES)} free ports in a row on {host}; give bus.port")

    @classmethod
    def at(cls, host: str, port: int, keys: Keys | None = None) -> Address:
        """The address of a bus over tcp, from its host and `bus.port`."""
        reach = _bracketed(_ANY.get(host, host))
        publish, subscribe, bulk, view = (f"tcp://{reach}:{port + i}" for i in range(len(_LANES)))
        return cls(publish, subscribe, "", bulk, view, host, keys)

    def _with_journal(self) -> Address:
        """Add an endpoint for the journal: private to this user (ipc), on Windows tcp on loopback."""
        if sys.platform == "win32":
            self.journal = _free_on_loopback()
        else:
            self.folder = private_folder("stream-mmrnn-")
            self.journal = f"ipc://{self.folder}/journal"
        return self

    def bound(self, endpoint: str) -> str:
        """The form of an endpoint that the broker binds."""
        if self.host not in _ANY:
            return endpoint
        return f"tcp://{_bracketed(self.host)}:{endpoint.rpartition(':')[2]}"

    def lane(self, policy: Policy, wanted: list[str]) -> str:
        """The endpoint that a reader of these topics connects to."""
        if policy != "block":
            return self.view
        large = any(
            prefix.startswith(of) or of.startswith(prefix) for prefix in wanted for of in (topics.RAW, topics.PUSH)
        )
        return self.bulk if large else self.subscribe

    def remove(self) -> None:
        if self.folder:
            remove_folder(self.folder)


def _free_on_loopback() -> str:
    context = zmq.Context()
    socket = context.socket(zmq.PUB)
    try:
        return f"tcp://{LOOPBACK}:{socket.bind_to_random_port(f'tcp://{LOOPBACK}')}"
    finally:
        context.destroy(linger=0)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def secure(socket: zmq.Socket[bytes], keys: Keys | None) -> None:
    socket.setsockopt(zmq.IPV6, 1)
    if keys is not None:
        keys.put_on(socket)


def refuse_old_peers(socket: zmq.Socket[bytes]) -> None:
    """Accept only ZMTP 3 on a socket without keys; call it before the socket is bound.

    ZMTP 1.0 has no greeting: libzmq takes any bytes for its frames, also the HTTP request of a web page in a browser.
    With a ZAP domain it refuses the versions before 3; without a ZAP handler it admits everyone else.
    """
    socket.zap_domain = b"local"
