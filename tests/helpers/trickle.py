"""Clients that send their request one byte now and then, as one who wants to keep others out of a server does."""

from __future__ import annotations

import socket
import threading
import time


class Trickle:
    """`count` connections inside the `with` block; one that the server closes is opened again."""

    def __init__(self, port: int, begun: bytes, count: int = 100) -> None:
        """`begun`: what each sends at once."""
        self.rounds = 0
        """How often each connection was sent a byte."""
        self._port, self._begun = port, begun
        self._over = threading.Event()
        self._clients = [self._connect() for _ in range(count)]
        self._thread = threading.Thread(target=self._run)

    def _connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self._port), timeout=5)
        client.sendall(self._begun)
        return client

    def _run(self) -> None:
        while not self._over.is_set():
            for i, client in enumerate(self._clients):
                try:
                    client.sendall(b"x")
                except OSError:
                    client.close()
                    self._clients[i] = self._connect()
            self.rounds += 1
            time.sleep(0.2)

    def __enter__(self) -> Trickle:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for client in self._clients:
            client.close()
