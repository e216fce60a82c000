"""Supervisor: start in order, wait for ready, open the session, restart with back-off, name who died, give up on who
dies too often, stop cleanly.

Owns the processes and the session's beginning and end; watches through the bus what everyone says. Knows nothing
about what the processes do, nor how it is shown.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec

from stream_mmrnn.bus import Address, Publisher, Subscriber
from stream_mmrnn.bus import keys as keys
from stream_mmrnn.bus import registry as running
from stream_mmrnn.bus.socket_dir import private_folder
from stream_mmrnn.capture import sources
from stream_mmrnn.core import config, signals, topics, wire
from stream_mmrnn.core.clock import RateLimiter, now_ns
from stream_mmrnn.core.errors import FileError, ProcessError, WireError
from stream_mmrnn.core.log import Note
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live import nodes

_AT_ONCE_NS = 1_000_000_000
"""An engine that lived so long is started again at once."""
_WORKERS = {"vision": "camera", "audio": "microphone"}
"""What the worker of a modality is called, where that is not the modality's name."""
_VITAL = ("broker", "clock", "engine")
"""Without one of these there is no session; without any other it goes on."""
_QUIET = "ignore::UserWarning:multiprocessing.resource_tracker"
"""Who is ended at once cleans nothing up: the tracker does it, and need not say so."""


def process_context() -> BaseContext:
    """Processes are forked from a clean server that has done the slow imports, or started afresh (Windows).

    The server and all its processes are born with SIGINT and SIGTERM held back: a terminal sends them to everyone, and
    who ends when is for the supervisor to say.
    """
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, process, resource_tracker, util

    kept = vars(process.current_process())["_config"]
    if "tempdir" not in kept:  # else the server makes one wherever TMPDIR is, and fails where that is deep
        kept["tempdir"] = private_folder("pymp-")
        util.Finalize(None, shutil.rmtree, (kept["tempdir"], True), exitpriority=-100)
    # a pool of BLAS threads in every process is of no use here, and forking one is not safe
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["stream_mmrnn.live.nodes", "stream_mmrnn.predict.engine", "stream_mmrnn.predict.pipeline"]
    )
    sys.warnoptions.append(_QUIET)
    resource_tracker.ensure_running()  # first: it lets go of signals that are held
    sys.warnoptions.remove(_QUIET)
    with signals.held():
        forkserver.ensure_running()  # its imports go on beside ours: whoever calls early waits less later
    return context


def kill_forkserver() -> None:
    """End the server of `process_context` and remove its folder, at once: it would look at nothing while it imports."""
    if sys.platform == "win32":
        return
    from multiprocessing import forkserver, util

    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(util.get_temp_dir(), ignore_errors=True)


class Node:
    """One row of the process table, and its process."""

    def __init__(self, name: str, target: Callable[..., None], *args: Any, modality: str = "") -> None:
        self.name, self.target, self.args, self.modality = name, target, args, modality
        self.process: BaseProcess | None = None
        self.ready: Any = None
        self.stop: Any = None
        self.restarts = 0
        self.deaths: list[str] = []
        self.died_ns: deque[int] = deque()
        """When, as far back as the restart budget looks."""
        self.given_up = ""
        """Why it is not started again, as one sentence without its name."""
        self.again_ns = 0
        """When a dead one is started again."""
        self.done = False
        """It ended by itself and shall not be started again."""
        self.status: wire.StatusMessage | None = None
        self.published_before = 0
        """What earlier processes of this node said they had published."""
        self.stale_before = {"stale": 0, "stale_ms": 0}
        """What they said of the silences of their device."""
        self.started_ns = 0
        self.said = ""
        """The reason of its status that a person was told last."""

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.exitcode is None

    @property
    def is_source(self) -> bool:
        return bool(self.modality)


class Supervisor:
    """A session from its first process to its last."""

    def __init__(
        self,
        settings: config.Settings,
        with_engine: bool = True,
        say: Callable[[str], None] = lambda _: None,
        watch: Collection[str] = (),
    ) -> None:
        """`say` is told, in one sentence each (a `log.Note`), what a person should know while it runs; `messages` gives
        the topics of `watch`, too.
        """
        self.settings = settings
        self._say, self._watch = say, watch
        self._context = process_context()
        bus = settings.bus
        own = keys.Folder(Path(bus.keys)).keys() if bus.keys else None
        self.address = Address.create(bus.transport, bus.host, bus.port, own)
        self._epoch: Any = self._context.Value("q", 0)
        self.nodes = list(self._table(with_engine))
        self._by_name = {n.name: n for n in self.nodes}
        self._expected: tuple[str, ...] = tuple(n.modality for n in self.nodes if n.is_source)
        self._publisher: Publisher | None = None
        self._monitor: Subscriber | None = None
        self.opened_ns = self.closed_ns = 0
        self.first_prediction_ns = 0
        self._page_port = 0
        self.begun = False
        """True from the first process on that has something to bring to an end: a file, a session."""
        self.failed = ""
        """Why the session cannot go on, as one sentence."""
        self._rate_limiter = RateLimiter()
        self._registration: running.Registration | None = None

    def _table(self, with_engine: bool) -> Iterator[Node]:
        """Every process; the order is the start order."""
        settings = self.settings
        yield Node("broker", nodes.broker)
        yield Node("clock", nodes.clock)
        if with_engine and settings.state.snapshot_every:
            yield Node("journal", nodes.journal)
        if settings.record.path:
            yield Node("recorder", nodes.recorder)
        if with_engine:
            yield Node("engine", nodes.engine)
        if settings.dashboard.enabled:
            yield Node("dashboard", nodes.dashboard)
        if with_engine and settings.trace.ratio:
            yield Node("tracer", nodes.tracer)
        if settings.foxglove.enabled:
            yield Node("foxglove", nodes.foxglove)
        if with_engine and settings.lsl.outlet:
            yield Node("lsl", nodes.lsl)
        for modality in sources.NAMED:
            spec = getattr(settings.sources, modality)
            if spec != "none":
                yield Node(_WORKERS.get(modality, modality), nodes.worker, modality, spec, modality=modality)

    # ---- start ---------------------------------------------------------------------------------------------------

    def _spawn(self, node: Node) -> None:
        node.ready, node.stop = self._context.Event(), self._context.Event()
        settings = self.settings
        if node.name == "dashboard" and self._page_port:
            # the page that is open in a browser finds its server again
            page = msgspec.structs.replace(settings.dashboard, port=self._page_port)
            settings = msgspec.structs.replace(settings, dashboard=page)
        context = nodes.Context(node.name, settings, self.address, node.ready, node.stop, self._epoch, node.restarts)
        if node.is_source and node.args[1] == "stdin":
            context.stdin = _Stdin()
        process = self._context.Process(  # type: ignore[attr-defined]
            target=nodes.run,
            args=(node.target, context, *node.args),
            name=f"stream-mmrnn-{node.name}",
            daemon=True,
        )
        node.started_ns = now_ns()
        process.start()
        node.process = process

    def _wait_ready(self, waiting: list[Node], alive: Callable[[], bool]) -> None:
        deadline = now_ns() + int(self.settings.supervisor.start_timeout_s * 1e9)
        for node in waiting:
            while alive() and not node.ready.wait(0.02):
                assert node.process is not None
                if node.process.exitcode is not None:
                    if node.is_source:
                        return
                    raise ProcessError(f"the {node.name} did not start: it {_death(node.process.exitcode)}")
                if now_ns() > deadline:
                    raise ProcessError(
                        f"the {node.name} was not ready in {self.settings.supervisor.start_timeout_s:g} s"
                    )

    def start(self, alive: Callable[[], bool]) -> None:
        """All processes up, the session open, the sources going; as far as it came where `alive` says no."""
        self._say_how_to_get_in()
        for node in self.nodes:
            if not alive():
                return
            self.begun = node.name != "broker"
            self._spawn(node)
            if node.name == "broker":
                self._wait_ready([node], alive)
                self._publisher = Publisher(self.address, self.settings.bus.queue)
                self._monitor = Subscriber(
                    self.address,
                    [*dict.fromkeys((topics.STATUS, topics.PREDICTION, topics.SESSION, *self._watch))],
                    self.settings.bus.queue,
                )
        self._wait_ready([n for n in self.nodes if not n.is_source], alive)
        self._wait_ready([n for n in self.nodes if n.is_source], alive)
        if not alive() or self._publisher is None:
            return
        self._publisher.wait_for_reader(topics.SESSION, 2.0)
        self._publish_session("open")
        self._epoch.value = now_ns()
        self._register()

    def _register(self) -> None:
        """Let other programs of this user find the session; it goes on where they cannot."""
        bus, name = self.settings.bus, self.settings.session.name
        try:
            entry = running.entry_of(name, "engine" in self._by_name, self.address, bus.keys)
            self._registration = running.Registration(entry)
        except FileError as e:
            self._say(f"other programs cannot find this session by its name: {e}")

    def _tell_of_nodes(self) -> None:
        if self._registration is not None:
            self._registration.update(
                restarts={n.name: n.restarts for n in self.nodes if n.restarts},
                given_up={n.name: n.given_up for n in self.nodes if n.given_up},
            )

    def _say_how_to_get_in(self) -> None:
        """What a person on another machine needs, once."""
        bus, page = self.settings.bus, self.settings.dashboard
        if self.address.keys is not None:
            port = int(self.address.publish.rpartition(":")[2])
            server = self.address.keys.server
            text = f"bus: {bus.host}, port {port}, server key {server}"
            self._say(Note(text, "broker", "address", host=bus.host, port=port, server_key=server))
        if page.enabled and page.token_file:
            token, made = keys.token(Path(page.token_file))
            if made:
                text = f"the page's token, shown this once: {token} (it is in {page.token_file})"
                self._say(Note(text, "dashboard", "token", private=True, token_file=page.token_file))

    def _publish_session(self, op: Any) -> int:
        at_ns = now_ns()
        message = wire.SessionMessage(op, at_ns, self._expected)
        assert self._publisher is not None
        self._publisher.publish(topics.SESSION, self.settings.session.name, at_ns, at_ns, wire.pack(message))
        if op == "open" and not self.opened_ns:
            self.opened_ns = at_ns
        return at_ns

    # ---- while it runs -------------------------------------------------------------------------------------------

    def messages(self, timeout_ms: int) -> Iterator[Envelope]:
        """What everyone says, until nothing came for `timeout_ms`; keeps the statuses."""
        assert self._monitor is not None
        while (envelope := self._monitor.receive(timeout_ms)) is not None:
            self._observe(envelope)
            yield envelope
            timeout_ms = 0

    def _observe(self, envelope: Envelope) -> None:
        if envelope.topic == topics.PREDICTION and not self.first_prediction_ns:
            self.first_prediction_ns = envelope.publish_ns
        if not envelope.topic.startswith(topics.STATUS):
            return
        try:
            message = wire.unpack(envelope.payload, wire.StatusMessage)
        except WireError:
            return
        node = self._by_name.get(message.node)
        if node is None or (node.process is not None and message.pid != node.process.pid):
            return
        before, node.status = node.status, message
        if not message.reason:
            node.said = ""
        if message.reason not in ("", node.said) and message.state != "closed":
            # a reason that is not said now is said with a later status, if it still holds
            if self._rate_limiter(node.name, now_ns()):
                node.said = message.reason
                text = f"{node.name}: {message.reason}"
                self._say(Note(text, node.name, "status", "warning", state=message.state))
        elif (
            before is not None
            and before.state == "missing"
            and message.state == "open"
            and self._rate_limiter(f"{node.name} back", now_ns())
        ):
            self._say(Note(f"{node.name}: is back", node.name, "back"))
        if node.is_source:
            self._expect()
        if node.name == "engine" and before is None and message.detail.get("anew") and not self.closed_ns:
            self._publish_session("open")
        if node.name == "dashboard":
            port = str(message.detail.get("address", "")).rstrip("/").rpartition(":")[2]
            if port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536 and int(port) != self._page_port:
                self._page_port = int(port)
                if self._registration is not None:
                    self._registration.update(page=str(message.detail["address"])[:256])

    def _expect(self) -> None:
        """Tell the aligner which streams there are, where that has changed."""
        here = tuple(
            n.modality
            for n in self.nodes
            if n.is_source
            and not n.done
            and not n.again_ns
            and (n.status is None or n.status.state not in ("missing", "ended", "closed"))
        )
        if self.opened_ns and here != self._expected:
            self._expected = here
            self._publish_session("streams")

    def check(self) -> None:
        """Name and restart who died; call it some ten times a second."""
        at_ns = now_ns()
        settings = self.settings.supervisor
        for node in self.nodes:
            if node.done or node.process is None:
                continue
            if node.again_ns:
                if at_ns >= node.again_ns:
                    node.again_ns = 0
                    self._spawn(node)
                continue
            code = node.process.exitcode
            if code is None:
                continue
            if code == 0 and node.is_source:
                node.done = True
                self._expect()
                continue
            death = _death(code)
            # one that ran well for a while starts again as if for the first time
            recent = 0 if at_ns - node.started_ns > 10_000_000_000 else min(node.restarts, 8)
            wait_s = min(settings.backoff_s * 2**recent, settings.backoff_max_s)
            if node.name == "engine" and at_ns - node.started_ns > _AT_ONCE_NS:
                wait_s = 0.0  # ticks wait for it: back-off is for one that cannot live
            node.deaths.append(death)
            if node.status is not None:
                counts = node.status.counts
                node.published_before += counts.get("published", 0)
                node.stale_before = {k: n + counts.get(k, 0) for k, n in node.stale_before.items()}
            node.status = None
            if self._too_often(node, at_ns):
                self._give_up(node, death)
                continue
            node.restarts += 1
            node.again_ns = at_ns + int(wait_s * 1e9)
            text = f"{node.name}: {death}; started again {f'in {wait_s:g} s' if wait_s else 'at once'}"
            self._say(Note(text, node.name, "died", "warning", death=death, again_s=wait_s, restarts=node.restarts))
            self._tell(node, "restarting", death)
            self._tell_of_nodes()
            if node.is_source:
                self._expect()

    def _too_often(self, node: Node, at_ns: int) -> bool:
        """Take note of a death; whether it is one more than the restart budget has restarts for."""
        settings = self.settings.supervisor
        node.died_ns.append(at_ns)
        while at_ns - node.died_ns[0] > settings.restart_window_s * 1e9:
            node.died_ns.popleft()
        return len(node.died_ns) > settings.max_restarts

    def _give_up(self, node: Node, death: str) -> None:
        settings = self.settings.supervisor
        node.done = True
        times = f"{len(node.died_ns)} times in {settings.restart_window_s:g} s"
        node.given_up = f"{death}, for {times if settings.max_restarts else 'the first time'}, and was given up"
        everyone = all(n.given_up for n in self.nodes if n.is_source)
        # who only records has nothing left without its recorder
        vital = node.name in _VITAL or (node.name == "recorder" and "engine" not in self._by_name)
        if vital or (node.is_source and everyone):
            self.failed = f"the {node.name} {node.given_up}; nothing is left to go on with"
        text = self.failed or f"{node.name}: {node.given_up}; the session goes on without it"
        self._say(Note(text, node.name, "given_up", "error", death=death, deaths=len(node.died_ns)))
        self._tell(node, "failed", node.given_up)
        self._tell_of_nodes()
        if node.is_source:
            self._expect()

    def _tell(self, node: Node, state: Any, reason: str) -> None:
        """Say for a process how it is where it cannot say so itself."""
        assert self._publisher is not None
        at_ns = now_ns()
        message = wire.StatusMessage(node.name, state, 0, node.modality, reason)
        self._publisher.publish(topics.STATUS + node.name, topics.EVERYONE, at_ns, at_ns, wire.pack(message), node.name)

    @property
    def sources_done(self) -> bool:
        """True once every source came to its end by itself."""
        return all(n.done for n in self.nodes if n.is_source)

    # ---- stop ----------------------------------------------------------------------------------------------------

    def stop(self, see: Callable[[Envelope], None] = lambda _: None) -> None:
        """End in order, within 2 s: sources, session, engine, recorder, the rest."""
        if self._registration is not None:
            self._registration.remove()
        deadline_ns = now_ns() + 1_500_000_000
        if not self.opened_ns:
            # nobody has anything to bring to an end but the recorder its file; some still import, and hear nothing
            self._kill([n for n in self.nodes if n.name != "recorder"])
        self._end([n for n in self.nodes if n.is_source], now_ns() + 600_000_000, see)
        if self.opened_ns and self._publisher is not None:
            self.closed_ns = self._publish_session("close")
            self._await_closed("engine", now_ns() + 500_000_000, see)
            at_ns = now_ns()
            self._publisher.publish(topics.CONTROL, self.settings.session.name, at_ns, at_ns, b"stop")
            self._await_closed("recorder", now_ns() + 500_000_000, see)
        for last in (False, True):
            ending = [n for n in self.nodes if not n.is_source and (n.name == "broker") == last]
            self._end(ending, max(deadline_ns, now_ns() + 100_000_000), see)
        if self._publisher is not None:
            self._publisher.close(0)
        if self._monitor is not None:
            self._monitor.close()
        self.address.remove()

    def _await_closed(self, name: str, deadline_ns: int, see: Callable[[Envelope], None]) -> None:
        node = self._by_name.get(name)
        if node is None or not (node.running and self._by_name["broker"].running):
            return
        while now_ns() < deadline_ns and not (node.status and node.status.state == "closed"):
            for envelope in self.messages(20):
                see(envelope)

    def _end(self, ending: list[Node], deadline_ns: int, see: Callable[[Envelope], None]) -> None:
        running = [n for n in ending if n.running]
        for node in running:
            node.stop.set()
        while running and now_ns() < deadline_ns:
            for envelope in self.messages(5) if self._monitor else ():
                see(envelope)
            running = [n for n in running if n.running]
            time.sleep(0.002)
        for node in running:
            assert node.process is not None
            self._say(Note(f"{node.name}: did not end in time and was killed", node.name, "killed", "warning"))
            node.process.kill()
            node.process.join(0.5)
        if self._monitor:
            for envelope in self.messages(5):
                see(envelope)

    @staticmethod
    def _kill(ending: list[Node]) -> None:
        for node in ending:
            if node.running:
                assert node.process is not None
                node.process.kill()
                node.process.join(0.5)

    def end_at_once(self) -> None:
        """Kill every process and remove what is theirs; harmless in the middle of anything, and of `stop`, too.

        A file that was being written ends where it is. Of a process that is just being born nobody knows the number: it
        ends itself when it finds that we are gone.
        """
        for node in self.nodes:
            pid = node.process.pid if node.process is not None else None
            if pid is not None:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        kill_forkserver()
        self.address.remove()
        if self._registration is not None:
            self._registration.remove()


def _death(code: int) -> str:
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"ended with exit code {code}"


class _Stdin:
    """Our standard input, on its way to the text worker."""

    def __getstate__(self) -> dict[str, Any]:
        from multiprocessing.reduction import DupFd

        # without one, number 0 is some other file of ours
        return {"handle": None if sys.stdin is None else DupFd(0)}

    def detach(self) -> int:
        """The file descriptor in this process; -1 where there is no standard input."""
        handle = self.__dict__["handle"]
        return -1 if handle is None else int(handle.detach())
