"""The page's web server, as its caller sees it: it is given states, pictures and sound, and never blocks the caller.

Only the newest of each is kept, so a slow browser delays nothing; one that stops reading is disconnected. The port is
bound at once. The application (`app`) is imported and run in a thread of its own from `start` on; requests before that
wait. Knows nothing about the bus, predictions or what a state holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from stream_mmrnn.core.errors import ConfigError, ProcessError
from stream_mmrnn.core.settings import LOOPBACK
from stream_mmrnn.viewers.dashboard.access import Access
from stream_mmrnn.viewers.dashboard.board import Board, OwnView, View

if TYPE_CHECKING:
    from stream_mmrnn.viewers.dashboard.app import Application
    from stream_mmrnn.viewers.dashboard.sensors import Sensors

IDLE_S = 5.0
"""The longest time between requests of a connection, and for a request to arrive."""
_CLOSE_S = 2.0
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def _page(features: Collection[str]) -> dict[str, tuple[bytes, str]]:
    """By path, the content and media type of the page, its style and its modules."""
    folder = Path(__file__).with_name("page")
    files = {"/" + f.name: (f.read_bytes(), _TYPES[f.suffix]) for f in folder.iterdir() if f.suffix in _TYPES}
    page, kind = files.pop("/page.html")
    on = " ".join(sorted(features)).encode()
    return {"/": (page.replace(b'data-features=""', b'data-features="%b"' % on), kind), **files}


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises OSError."""
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # on Windows the option would let another program bind a port that is in use
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(os.name != "nt"))
        s.bind((LOOPBACK if host == "localhost" else host, port))
        s.listen(32)
    except OSError:
        s.close()
        raise
    return s


def _check_tls(cert: str, key: str) -> None:
    """Raise ConfigError unless the files are a certificate and its key."""
    try:
        # a key with a password would ask for it in the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise ConfigError(
            f"dashboard.cert {cert} and dashboard.key {key} cannot be used ({why}); name a certificate and its key, as "
            "PEM files without a password"
        ) from e


class Dashboard:
    """Serves the live page; `update` and `picture` never wait for a browser.

    `metrics` returns the response of /metrics, in Prometheus' text format. `ready` returns why the system is not
    ready, or "": /readyz answers 503 or 200; /healthz is 200 while the server runs. Both are called in the server's
    thread and must be quick.

    `posts`: by path, a function that takes the JSON body of a POST and returns "" or, as one sentence, why it is
    refused. They are called in the server's thread, too.

    `push`: takes the samples that WebSocket clients send to /push/STREAM (see `push_socket.Push`); in the server's
    thread, too.

    `sensors`: takes what browsers give as cameras and microphones over /sensors; in the server's thread, too.

    `cert`, `key`: files of a TLS certificate and its key; with them the page is served over https.

    `features`: parts of the page that are on: each has an element and a module of this name (`page/NAME.js`).

    `views`: other views by key, or why there is none, which are served under `/view/KEY/`; its second argument lets a
    view be made that ended because nobody looked. Called in the server's thread, too.

    `client_timeout_s`: a client that does not read for so long is disconnected. `idle_timeout_s`: so is one that sends
    no request for so long.

    Raises:
        ConfigError: the host can be reached from other machines, and there is no token; or the certificate or its key
            is none.
        ProcessError: the port cannot be bound.

    """

    def __init__(
        self,
        host: str = LOOPBACK,
        port: int = 0,
        client_timeout_s: float = 2.0,
        token: str = "",
        metrics: Callable[[], bytes] | None = None,
        ready: Callable[[], str] = lambda: "",
        posts: Mapping[str, Callable[[bytes], str]] = MappingProxyType({}),
        idle_timeout_s: float = IDLE_S,
        push: Callable[[str, bytes, str], str] | None = None,
        sensors: Sensors | None = None,
        cert: str = "",
        key: str = "",
        features: Collection[str] = (),
        views: Callable[[str, bool], View | str] = lambda *_: "this page has no other views",
    ) -> None:
        name = socket.gethostname()
        self.access = Access(host, token, (name, f"{name}.local"), tls=bool(cert))
        if cert:
            _check_tls(cert, key)
        self._own, self._views = OwnView(posts), views
        self._board = self._own.board
        try:
            self._socket = _bind(host, port)
        except OSError as e:
            raise ProcessError(f"the dashboard cannot bind {host} port {port}: {e.strerror or e}") from e
        self._port = int(self._socket.getsockname()[1])
        self._host = f"[{host}]" if ":" in host else host
        self._metrics, self._ready, self._push = metrics, ready, push
        self._sensors, self._cert, self._key = sensors, cert, key
        self._features = features
        self._client_timeout_s, self._idle_timeout_s = client_timeout_s, idle_timeout_s
        self._application: Application | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        return f"http{'s' if self._cert else ''}://{self._host}:{self._port}/"

    @property
    def clients(self) -> int:
        """Open event streams: browsers that show the page."""
        return self._board.clients

    @property
    def listeners(self) -> int:
        """WebSocket clients that are sent predictions."""
        return self._application.feed.listeners if self._application else 0

    @property
    def connections(self) -> int:
        """All open connections."""
        return self._application.connections if self._application else 0

    def update(self, state: dict[str, Any]) -> None:
        """Replace the state; NaN and infinity become null, as JSON requires."""
        self.show(self._board, msgspec.json.encode(state))

    def show(self, board: Board, state: bytes) -> None:
        """Replace the state of any view."""
        board.put(state)
        self._call(board.wake)

    def predict(self, prediction: dict[str, Any]) -> None:
        """Send a prediction to the WebSocket clients; its `missed` is the number of predictions missing before it."""
        self._call(lambda: self._running().feed.put(prediction))

    def explain(self, model: dict[str, Any]) -> None:
        """Describe the model of the predictions that follow."""
        self._call(lambda: self._running().feed.put_model(model))

    def picture(self, jpeg: bytes) -> None:
        self._board.picture = jpeg

    def sound(self, first: int, columns: bytes) -> None:
        """Replace the spectrogram: `BANDS` bytes per column, and the number of the first column."""
        self._board.sound = (first, columns)

    def flush(self, most_s: float = 0.8) -> None:
        """Wait until the browsers that read were sent the newest state, at most so long; the supervisor of a session
        waits for its page a little longer.
        """
        deadline = time.monotonic() + most_s
        while not self._board.delivered and time.monotonic() < deadline:
            time.sleep(0.01)

    def start(self) -> None:
        if self._thread is None:
            self._loop = asyncio.new_event_loop()
            if self._cert:
                # a client that begins no handshake is no connection yet, and would be kept for a minute
                serve = partial(self._loop.create_server, ssl_handshake_timeout=self._idle_timeout_s)
                self._loop.create_server = serve  # type: ignore[method-assign]
            self._thread = threading.Thread(target=self._run, args=(self._loop,), name="dashboard", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Close every connection and release the port, within some tenths of a second."""
        self._call(self._end)
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
            self._thread = None
        self._socket.close()

    def _call(self, function: Callable[[], None]) -> None:
        """Call it in the server's thread, if that runs."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(function)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        from stream_mmrnn.viewers.dashboard.app import Application, AppSettings

        self._application = Application(
            AppSettings(
                self.access,
                _page(self._features),
                self._metrics,
                self._ready,
                self._own,
                self._views,
                self._push,
                self._sensors,
                self._port,
                self._client_timeout_s,
                self._idle_timeout_s,
                self._cert,
                self._key,
            )
        )
        try:
            loop.run_until_complete(self._application.serve(self._socket))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def _running(self) -> Application:
        # called in the loop, which runs only after the application was made
        assert self._application is not None
        return self._application

    def _end(self) -> None:
        self._running().end()
