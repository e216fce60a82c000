"""Supervisor: starts processes in order, opens the session, restarts what dies, gives up on what dies too often, stops.

It owns the processes and the session's start and end, and follows the statuses on the bus. What the processes do, and
how it is shown, is the business of others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from stream_mmrnn.bus import Address, Publisher, Subscriber
from stream_mmrnn.bus import keys as keys
from stream_mmrnn.bus import registry as running
from stream_mmrnn.core import processes, topics, wire
from stream_mmrnn.core.clock import RateLimiter, now_ns
from stream_mmrnn.core.errors import FileError, ProcessError, WireError
from stream_mmrnn.core.log import Note
from stream_mmrnn.core.numbers import whole_number
from stream_mmrnn.core.resources import need_files
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live.managed_process import ManagedProcess, Spawner, how_it_ended, kill_forkserver
from stream_mmrnn.live.requests import Requests

_AT_ONCE_NS = 1_000_000_000
"""An engine that lived this long is restarted without back-off."""
_FILES, _FILES_PER_PROCESS = 40, 2
"""Open files that the supervisor needs, and the broker (measured: 50 with twelve processes)."""


class Spawn(Protocol):
    """What starts processes: `Spawner`, or a test's own."""

    epoch: Any

    def __call__(self, row: ManagedProcess, settings: Settings) -> None: ...


class Supervisor:
    """A session from its first process to its last."""

    def __init__(
        self,
        settings: Settings,
        with_engine: bool = True,
        say: Callable[[str], None] = lambda _: None,
        watch: Collection[str] = (),
        clock: Callable[[], int] = now_ns,
        spawner: Callable[[Address], Spawn] = Spawner,
    ) -> None:
        """`say` gets what a person should know while the session runs, in one sentence each (a `log.Note`); `messages`
        also yields the topics of `watch`.
        """
        self.settings = settings
        self.say, self._watch, self._now_ns = say, watch, clock
        self.nodes = [ManagedProcess(spec) for spec in processes.table(settings, with_engine)]
        files = _FILES + _FILES_PER_PROCESS * len(self.nodes)
        need_files(files, f"a session of {len(self.nodes)} processes needs {files}")
        bus = settings.bus
        own = keys.KeyFolder(Path(bus.keys)).keys() if bus.keys else None
        self.address = Address.create(bus.transport, bus.host, bus.port, own)
        try:
            self._spawn = spawner(self.address)
        except BaseException:
            self.address.remove()
            raise
        self._by_name = {n.name: n for n in self.nodes}
        self._expected: tuple[str, ...] = tuple(n.stream for n in self.nodes if n.is_source)
        self.publisher: Publisher | None = None
        self._monitor: Subscriber | None = None
        self.opened_ns = self.closed_ns = 0
        self.first_prediction_ns = 0
        self.requests = Requests(settings, self._by_name.get("recorder"), "engine" in self._by_name, self)
        self._page_port = 0
        self.begun = False
        """True once a process has started that has something to finish: a file, a session."""
        self.failed = ""
        """Why the session cannot go on, as one sentence; "" while it can."""
        self._rate_limiter = RateLimiter()
        self._registration: running.Registration | None = None

    # ---- start ---------------------------------------------------------------------------------------------------

    def start_process(self, node: ManagedProcess) -> None:
        settings = self.settings
        if node.name == "dashboard" and self._page_port:
            # a page that is open in a browser finds the server again
            page = msgspec.structs.replace(settings.dashboard, port=self._page_port)
            settings = msgspec.structs.replace(settings, dashboard=page)
        if node.name == "recorder":
            settings = msgspec.structs.replace(settings, record=self.requests.record)
        node.started_ns = self._now_ns()
        self._spawn(node, settings)

    def _wait_ready(self, waiting: list[ManagedProcess], alive: Callable[[], bool]) -> None:
        deadline = self._now_ns() + int(self.settings.supervisor.start_timeout_s * 1e9)
        for node in waiting:
            while alive() and not node.ready.wait(0.02):
                assert node.process is not None
                if node.process.exitcode is not None:
                    if node.is_source:
                        return
                    raise ProcessError(f"the {node.name} did not start: it {how_it_ended(node.process.exitcode)}")
                if self._now_ns() > deadline:
                    raise ProcessError(
                        f"the {node.name} was not ready in {self.settings.supervisor.start_timeout_s:g} s"
                    )

    def start(self, alive: Callable[[], bool]) -> None:
        """All processes up, the session open, the sources going; as far as it came where `alive` says no."""
        self._show_access()
        for node in self.nodes:
            if not alive():
                return
            self.begun = node.name != "broker"
            self.start_process(node)
            if node.name == "broker":
                self._wait_ready([node], alive)
                self.publisher = Publisher(self.address, self.settings.bus.queue)
                self._monitor = Subscriber(
                    self.address,
                    [*dict.fromkeys((topics.STATUS, topics.PREDICTION, topics.SESSION, topics.REQUEST, *self._watch))],
                    self.settings.bus.queue,
                )
        self._wait_ready([n for n in self.nodes if not n.is_source], alive)
        self._wait_ready([n for n in self.nodes if n.is_source], alive)
        if not alive() or self.publisher is None:
            return
        self.publisher.wait_for_reader(topics.SESSION, 2.0)
        self.publish_session("open")
        self._spawn.epoch.value = self._now_ns()
        self._register()

    def _register(self) -> None:
        """Let other programs of this user find the session; a failure does not stop the session."""
        bus, name = self.settings.bus, self.settings.session.name
        try:
            table = stream_table(self.settings).values()
            entry = running.entry_of(name, "engine" in self._by_name, self.address, bus.keys, table)
            self._registration = running.Registration(entry)
        except FileError as e:
            self.say(f"other programs cannot find this session by its name: {e}")

    def _update_registration(self) -> None:
        if self._registration is not None:
            self._registration.update(
                restarts={n.name: n.restarts for n in self.nodes if n.restarts},
                given_up={n.name: n.given_up for n in self.nodes if n.given_up},
            )

    def _show_access(self) -> None:
        """Show once what a person on another machine needs to connect."""
        bus, page = self.settings.bus, self.settings.dashboard
        if self.address.keys is not None:
            port = int(self.address.publish.rpartition(":")[2])
            server = self.address.keys.server
            text = f"bus: {bus.host}, port {port}, server key {server}"
            self.say(Note(text, "broker", "address", host=bus.host, port=port, server_key=server))
        if page.enabled and page.token_file:
            token, made = keys.token(Path(page.token_file))
            if made:
                text = f"the page's token, shown this once: {token} (it is in {page.token_file})"
                self.say(Note(text, "dashboard", "token", private=True, token_file=page.token_file))

    def publish_session(self, op: Any) -> int:
        at_ns = self._now_ns()
        message = wire.SessionMessage(op, at_ns, self._expected)
        assert self.publisher is not None
        self.publisher.publish(topics.SESSION, self.settings.session.name, at_ns, at_ns, wire.pack(message))
        if op == "open" and not self.opened_ns:
            self.opened_ns = at_ns
        return at_ns

    # ---- while it runs -------------------------------------------------------------------------------------------

    def messages(self, timeout_ms: int) -> Iterator[Envelope]:
        """The messages that come, until none came for `timeout_ms`; remembers the statuses."""
        assert self._monitor is not None
        while (envelope := self._monitor.receive(timeout_ms)) is not None:
            self.observe(envelope)
            yield envelope
            timeout_ms = 0

    def observe(self, envelope: Envelope) -> None:
        """What a message says of the processes: remembered, and said aloud where a person should know."""
        if envelope.topic == topics.PREDICTION and not self.first_prediction_ns:
            self.first_prediction_ns = envelope.publish_ns
        if envelope.topic == topics.REQUEST and self.opened_ns and not self.closed_ns:
            self.requests.observe(envelope)
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
        if node.is_source and message.state in ("missing", "open"):
            # said with a later status, if there was one like it just now
            node.came_back = (node.came_back or node.away) and message.state == "open"
            node.away = message.state == "missing"
        if not message.reason:
            node.reported = ""
        if message.reason not in ("", node.reported) and message.state != "closed":
            # a reason that is not shown now is shown with a later status, if it still holds
            if self._rate_limiter(node.name, self._now_ns()):
                node.reported = message.reason
                text = f"{node.name}: {message.reason}"
                self.say(Note(text, node.name, "status", "warning", state=message.state))
        elif node.came_back and message.state == "open" and self._rate_limiter(f"{node.name} back", self._now_ns()):
            node.came_back = False
            self.say(Note(f"{node.name}: is back", node.name, "back"))
        if node.is_source:
            self._expect()
        if node.name == "engine" and before is None and message.detail.get("anew") and not self.closed_ns:
            self.publish_session("open")
        if node.name == "dashboard":
            port = str(message.detail.get("address", "")).rstrip("/").rpartition(":")[2]
            number = whole_number(port, 1, 65535)
            if number is not None and number != self._page_port:
                self._page_port = number
                if self._registration is not None:
                    self._registration.update(page=str(message.detail["address"])[:256])

    def replace_node(self, node: ManagedProcess) -> None:
        """Have this row in place of the one with its name, which has ended."""
        self.nodes = [*(n for n in self.nodes if n.name != node.name), node]
        self._by_name[node.name] = node

    def _expect(self) -> None:
        """Tell the aligner which streams there are, where that has changed."""
        here = tuple(
            n.stream
            for n in self.nodes
            if n.is_source
            and not n.done
            and not n.again_ns
            and (n.status is None or n.status.state not in ("missing", "ended", "closed"))
        )
        if self.opened_ns and here != self._expected:
            self._expected = here
            self.publish_session("streams")

    def check(self) -> None:
        """Report and restart processes that died; call it about ten times a second."""
        at_ns = self._now_ns()
        settings = self.settings.supervisor
        self.requests.poll()
        for node in self.nodes:
            if node.done or node.process is None:
                continue
            if node.again_ns:
                if at_ns >= node.again_ns:
                    node.again_ns = 0
                    self.start_process(node)
                continue
            code = node.process.exitcode
            if code is None:
                self.requests.check(node)
                continue
            if self.requests.died_early(node):
                continue
            if code == 0 and node.is_source:
                node.done = True
                self._expect()
                continue
            death = how_it_ended(code)
            # after a good run the back-off starts anew
            recent = 0 if at_ns - node.started_ns > 10_000_000_000 else min(node.restarts, 8)
            wait_s = min(settings.backoff_s * 2**recent, settings.backoff_max_s)
            if node.name == "engine" and at_ns - node.started_ns > _AT_ONCE_NS:
                wait_s = 0.0  # ticks wait for it; back-off is for a process that dies at its start
            node.deaths.append(death)
            if node.status is not None:
                counts = node.status.counts
                node.published_before.update({k: n for k, n in counts.items() if k.startswith("published")})
                node.stale_before = {k: n + counts.get(k, 0) for k, n in node.stale_before.items()}
            node.status = None
            node.away = node.is_source
            if self._too_often(node, at_ns):
                self._give_up(node, death)
                continue
            node.restarts += 1
            node.again_ns = at_ns + int(wait_s * 1e9)
            text = f"{node.name}: {death}; started again {f'in {wait_s:g} s' if wait_s else 'at once'}"
            self.say(Note(text, node.name, "died", "warning", death=death, again_s=wait_s, restarts=node.restarts))
            self.publish_status(node, "restarting", death)
            self._update_registration()
            if node.is_source:
                self._expect()

    def _too_often(self, node: ManagedProcess, at_ns: int) -> bool:
        """Count a death; True when the restart budget is used up."""
        settings = self.settings.supervisor
        node.died_ns.append(at_ns)
        while at_ns - node.died_ns[0] > settings.restart_window_s * 1e9:
            node.died_ns.popleft()
        return len(node.died_ns) > settings.max_restarts

    def _give_up(self, node: ManagedProcess, death: str) -> None:
        settings = self.settings.supervisor
        node.done = True
        times = f"{len(node.died_ns)} times in {settings.restart_window_s:g} s"
        node.given_up = f"{death}, for {times if settings.max_restarts else 'the first time'}, and was given up"
        everyone = all(n.given_up for n in self.nodes if n.is_source)
        # a session that only records has nothing left without its recorder
        vital = node.spec.vital
        vital_here = vital == "session" or (vital == "recording" and "engine" not in self._by_name)
        if vital_here or (node.is_source and everyone):
            self.failed = f"the {node.name} {node.given_up}; nothing is left to go on with"
        text = self.failed or f"{node.name}: {node.given_up}; the session goes on without it"
        self.say(Note(text, node.name, "given_up", "error", death=death, deaths=len(node.died_ns)))
        self.publish_status(node, "failed", node.given_up)
        self._update_registration()
        if node.is_source:
            self._expect()

    def publish_status(self, node: ManagedProcess, state: Any, reason: str) -> None:
        """Publish the status of a process that cannot publish it itself."""
        assert self.publisher is not None
        at_ns = self._now_ns()
        message = wire.StatusMessage(node.name, state, 0, node.stream, reason)
        self.publisher.publish(topics.STATUS + node.name, topics.EVERYONE, at_ns, at_ns, wire.pack(message), node.name)

    @property
    def sources_done(self) -> bool:
        """True once every source came to its end by itself."""
        return all(n.done for n in self.nodes if n.is_source)

    # ---- stop ----------------------------------------------------------------------------------------------------

    def stop(self, observe: Callable[[Envelope], None] = lambda _: None) -> None:
        """End in order, within 2 s, on a busy machine 3: sources, session, engine, recorder, the rest."""
        if self._registration is not None:
            self._registration.remove()
        deadline_ns = self._now_ns() + 1_500_000_000
        if not self.opened_ns:
            # only the recorder has something to finish; processes that still import read no request to end
            for node in (n for n in self.nodes if n.name != "recorder"):
                node.kill()
        self._end([n for n in self.nodes if n.is_source], self._now_ns() + 600_000_000, observe)
        if self.opened_ns and self.publisher is not None:
            self.closed_ns = self.publish_session("close")
            self._await_closed("engine", max(self._now_ns() + 500_000_000, deadline_ns - 300_000_000), observe)
            at_ns = self._now_ns()
            self.publisher.publish(topics.CONTROL, self.settings.session.name, at_ns, at_ns, topics.STOP)
            self._await_closed("recorder", self._now_ns() + 500_000_000, observe)
        for last in (False, True):
            ending = [n for n in self.nodes if not n.is_source and (n.name == "broker") == last]
            # the page has to show how the session ended, however long the others took
            least_ns = 100_000_000 if last else 1_000_000_000
            self._end(ending, max(deadline_ns, self._now_ns() + least_ns), observe)
        if self.publisher is not None:
            self.publisher.close(0)
        if self._monitor is not None:
            self._monitor.close()
        self.address.remove()

    def _await_closed(self, name: str, deadline_ns: int, observe: Callable[[Envelope], None]) -> None:
        node = self._by_name.get(name)
        if node is None or not (node.running and self._by_name["broker"].running):
            return
        while self._now_ns() < deadline_ns and not (node.status and node.status.state == "closed"):
            for envelope in self.messages(20):
                observe(envelope)

    def _end(self, ending: list[ManagedProcess], deadline_ns: int, observe: Callable[[Envelope], None]) -> None:
        running = [n for n in ending if n.running]
        for node in running:
            node.stop.set()
        while running and self._now_ns() < deadline_ns:
            for envelope in self.messages(5) if self._monitor else ():
                observe(envelope)
            running = [n for n in running if n.running]
            time.sleep(0.002)
        for node in running:
            self.say(Note(f"{node.name}: did not end in time and was killed", node.name, "killed", "warning"))
            node.kill()
        if self._monitor:
            for envelope in self.messages(5):
                observe(envelope)

    def end_at_once(self) -> None:
        """Kill every process and remove its files; safe at any moment, also during `stop`.

        A file that is being written ends where it is. A process that is just starting has no known number yet: it ends
        itself when it finds its parent gone.
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
