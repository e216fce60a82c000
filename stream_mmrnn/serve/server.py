"""Server: a session host behind a socket, in one process and one thread; ticks are stepped as soon as they arrive.

More threads write states to disk; the first does not wait for them while the server runs. Knows nothing about
terminals or signals.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from msgspec.structs import replace

from stream_mmrnn.bus.keys import KeyFolder
from stream_mmrnn.bus.request_reply import Router
from stream_mmrnn.core import config
from stream_mmrnn.core.clock import RateLimiter, now_ns, wall_offset_ns
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.resources import need_files, return_free_memory
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import for_model
from stream_mmrnn.predict.sharded_engine import create
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.save_queue import WRITERS
from stream_mmrnn.serve.session_host import SHARE, Host
from stream_mmrnn.serve.session_input import SessionInput
from stream_mmrnn.serve.sessions import Sessions
from stream_mmrnn.serve.state_store import StateBlockStore

_IDLE_MS = 5
"""After so long without a message, due states are saved and idle sessions evicted."""
_WRITING_MS = 1
"""The same, while somebody waits for a state to be written."""
_AT_ONCE = 512
"""Messages that are read at most before a step."""
_LAST = 65_536
"""Messages that are read at most when the server ends."""
_REPORT_EVERY_NS = 1_000_000_000
_PROBE_EVERY_NS = 500_000_000
"""How often it is looked whether a client has disconnected. The socket says of which one when something is sent to it:
then all that have sessions and were sent nothing for so long are sent `alive`."""
_PROBES = 2
"""After a client has disconnected: one that was sent something just before that is silent only the second time."""
_TRIM_EVERY_NS = 60_000_000_000
_TRIM_AFTER = 1000
"""Memory that clients have left behind is given back to the system at most so often, while no tick waits, and only
after so many sessions: it delays what comes in that moment."""
_OTHER_FILES = 64
"""Open files that are no connections: the model, libraries, sockets, states that are being written."""


def _lock(folder: Path) -> IO[str]:
    """Lock a folder of states for one server; raises UsageError where another one has it. Closing the file unlocks."""
    file = (folder / "lock").open("a+")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UsageError(
            f"another server keeps its sessions in {folder}; stop it, or give this one another state.folder"
        ) from None
    return file


def _slots(asked: int, say: Callable[[str], None]) -> int:
    """How many sessions there are files for. Raises UsageError where there are none for any."""
    files = need_files(_OTHER_FILES + 1, f"serve needs {_OTHER_FILES} and one for each client")
    slots = min(asked, files - _OTHER_FILES)
    if slots < asked:
        say(f"at most {slots} sessions, not {asked}: this process may open {files} files (ulimit -n)")
    return slots


def _percentiles(histogram: Histogram) -> dict[str, float]:
    return {f"p{p}_ms": round(histogram.percentile(p) / 1e6, 3) for p in (50, 99)} if histogram.count else {}


class Server:
    """Binds `address` at once; `run` serves until it is told to stop, `close` frees everything."""

    def __init__(self, settings: Settings, say: Callable[[str], None] = lambda _: None) -> None:
        """Raises ModelError, ProviderError, ConfigError, FileError, ProcessError, UsageError."""
        serve = settings.serve
        self._say, self._rate_limiter = say, RateLimiter()
        self._slots = slots = _slots(serve.slots, say)
        self.unsaved = 0
        """Sessions whose state could not be written when the server ended."""
        self._failures = self._saved = 0
        """Counts of states that could not be written, and of those that were, when that was last reported."""
        self._failing = False
        self._answered: set[bytes] = set()
        """Clients that were sent something since the last probe."""
        self._probed_ns = self._probes = 0
        with ExitStack() as stack:
            authenticator = KeyFolder(Path(serve.keys).expanduser()).authenticator() if serve.keys else None
            self.authenticator = authenticator
            store = StateBlockStore(config.state_folder(settings.state) / "sessions", settings.state.ttl_s)
            stack.enter_context(_lock(store.folder))
            for problem in store.damaged:
                say(problem)
            self.engine = create(replace(settings.engine, slots=slots))
            stack.callback(self.engine.stop)
            writer = stack.enter_context(ThreadPoolExecutor(WRITERS, "states"))
            self.sessions = Sessions(
                self.engine,
                store,
                settings.state,
                admission=settings.admission,
                wall_offset_ns=wall_offset_ns(),
                now_ns=now_ns(),
                writer=writer,
            )
            spec = self.engine.spec
            settings = for_model(settings, spec.modalities, derived=False)  # deriving would hold up others
            self.host = Host(
                self.sessions,
                serve.queue,
                peer_sessions=serve.client_slots,
                slots=slots,
                make_input=lambda session: SessionInput(spec, settings, session, must_save=True),
                groups=True,
            )
            self.host.send_now = self._send
            # a client may have every slot: then it gets all answers of two batches
            unread = serve.queue + 2 * slots
            self._router = Router(serve.host, serve.port, serve.queue, protocol.MAX_BYTES, authenticator, unread=unread)
            stack.callback(self._router.close)
            self._stack = stack.pop_all()
        self.address = self._router.address
        self._began_ns = now_ns()

    @property
    def capacity(self) -> int:
        """The most sessions that are admitted, as measured so far."""
        found = self.sessions.admission.capacity(now_ns()) if self.sessions.admission is not None else None
        return min(self._slots, max(found, 1)) if found is not None else self._slots

    def run(self, alive: Callable[[], bool], often: Callable[[], None] = lambda: None) -> None:
        """Serve until `alive()` is false; then every session is saved to disk and its client is told.

        `often` is called about once a second.
        """
        host, router = self.host, self._router
        reported_ns, trimmed_ns, trimmed_at = 0, now_ns(), 0
        while alive():
            self._receive(0 if host.ready else _WRITING_MS if self.sessions.is_awaited else _IDLE_MS)
            at_ns = now_ns()
            if host.ready:
                host.step(at_ns)
                self._send()
            host.housekeeping(at_ns)
            self._send()
            self._report_states()
            if at_ns - self._probed_ns > _PROBE_EVERY_NS:
                self._probed_ns = at_ns
                self._probe()
            if at_ns - trimmed_ns > _TRIM_EVERY_NS and not host.ready:
                opened = self.sessions.counts["opened"] + self.sessions.counts["resumed"]
                if opened - trimmed_at >= _TRIM_AFTER:
                    trimmed_ns, trimmed_at = at_ns, opened
                    return_free_memory()
            if at_ns - reported_ns > _REPORT_EVERY_NS:
                reported_ns = at_ns
                often()
        for _ in range(_LAST):
            if (received := router.receive(0)) is None:
                break
            host.receive(*received, now_ns())
        host.leave(now_ns())
        self.unsaved = len(self.sessions)
        self._report_states()
        self._send()

    def _probe(self) -> None:
        """Notice which clients have disconnected, where some have."""
        if self._router.any_gone():
            self._probes = _PROBES
        if not self._probes:
            self._answered.clear()
            return
        self._probes -= 1
        silent = [peer for peer in self.host.peers if peer not in self._answered]
        self._answered.clear()
        self.host.out += [(peer, protocol.Alive()) for peer in silent]
        self._send()

    def _report_states(self) -> None:
        """Say at once when states cannot be written any more, and when they can again."""
        counts = self.sessions.counts
        failures, saved = counts["unsaved"] + counts["unswept"], counts["saved"]
        if failures > self._failures and not self._failing:
            self._failing = True
            self._say(f"{self.sessions.last_problem}; sessions stay open, and it is tried again")
        elif failures == self._failures and saved > self._saved and self._failing:
            self._failing = False
            self._say(f"states are written again; {failures} times that was not possible")
        self._failures, self._saved = failures, saved

    def _receive(self, timeout_ms: int) -> None:
        """Read up to `_AT_ONCE` messages; waits for the first one.

        The socket gives those of its peers in turns: when one has had its share, all others that sent as much have.
        """
        host, router = self.host, self._router
        garbage = host.counts["garbage"]
        read: Counter[bytes] = Counter()
        for _ in range(_AT_ONCE):
            received = router.receive(timeout_ms)
            if received is None:
                break
            timeout_ms = 0
            read[received[0]] += host.receive(*received, now_ns())
            if host.counts["garbage"] != garbage:
                garbage = host.counts["garbage"]
                if self._rate_limiter(received[0].hex(), now_ns()):
                    self._say(f"the client {received[0].hex()} sent an invalid message ({garbage} by all so far)")
            if read[received[0]] >= SHARE and read[received[0]] >= host.share(received[0]):
                break
        self._send()

    def _send(self) -> None:
        host, router, answered = self.host, self._router, self._answered
        while host.out:
            out, host.out = host.out, []
            gone = set()
            for peer, reply in out:
                if peer in gone:
                    continue
                fate = router.send(peer, protocol.encode(reply))
                answered.add(peer)
                if fate == "sent":
                    continue
                if fate == "slow":
                    # it notices the missing answer, since ticks are numbered
                    host.counts["unread"] += 1
                    if self._rate_limiter(peer.hex(), now_ns()):
                        self._say(
                            f"the client {peer.hex()} does not read fast enough; some of its messages are dropped"
                        )
                else:
                    gone.add(peer)
                    host.gone(peer, now_ns())

    def summary(self) -> dict[str, Any]:
        """Figures of this run so far, as a JSON document."""
        host, seconds = self.host, (now_ns() - self._began_ns) / 1e9
        return {
            "address": self.address,
            "model": self.engine.spec.name,
            "model_sha256": self.engine.spec.sha256,
            "provider": self.engine.provider,
            "seconds": round(seconds, 3),
            "sessions": len(self.sessions),
            "unsaved_sessions": self.unsaved,
            "capacity": self.capacity,
            "waited": _percentiles(host.waited),
            "step": _percentiles(host.stepped),
            "counts": {**self.sessions.counts, **{f"host_{k}": v for k, v in sorted(host.counts.items())}},
            "refused_connections": self.authenticator.refused if self.authenticator is not None else {},
            "last_problem": self.sessions.last_problem,
        }

    def close(self) -> None:
        self._stack.close()
