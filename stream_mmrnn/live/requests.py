"""What people ask of a running session on a page: to record, to stop recording, to end.

The session goes on while a recorder is started or ended. Knows nothing about pages, and not what a recorder does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from msgspec.structs import replace

from stream_mmrnn.bus import Publisher
from stream_mmrnn.core import processes, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError, WireError
from stream_mmrnn.core.log import Note
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live.managed_process import ManagedProcess, how_it_ended

_RECORDER = "recorder"


class Host(Protocol):
    """The supervisor, as far as it is needed here."""

    publisher: Publisher | None
    say: Callable[[str], None]

    def start_process(self, node: ManagedProcess) -> None: ...
    def publish_session(self, op: Any) -> int: ...
    def publish_status(self, node: ManagedProcess, state: Any, reason: str) -> None: ...
    def replace_node(self, node: ManagedProcess) -> None: ...


class Requests:
    """Handles them; what cannot be done, or is done already, changes nothing."""

    def __init__(self, settings: Settings, recorder: ManagedProcess | None, has_engine: bool, host: Host) -> None:
        self._settings, self._recorder, self._has_engine, self._host = settings, recorder, has_engine, host
        self.record = settings.record
        """With the path of the newest recording."""
        self.asked_to_end = False
        self._wanted = False
        """A recording was asked for while the one before still ended."""

    def observe(self, envelope: Envelope) -> None:
        """A message of the topic `request`."""
        try:
            op = wire.unpack(envelope.payload, wire.RequestMessage).op
        except WireError:
            return
        session, recorder = self._settings.session.name, self._recorder
        if envelope.session != session:
            return
        on = recorder is not None and not recorder.done
        if op == "stop" or (op == "end_recording" and on and not self._has_engine):
            self.asked_to_end = True  # without engine and recorder nothing is left to go on with
        elif op == "end_recording" and self._wanted:
            self._wanted = False
        elif op == "end_recording" and on and recorder is not None:
            recorder.done, recorder.again_ns = True, 0
            if not recorder.running:  # it died, and was about to be started again
                self._host.publish_status(recorder, "closed", "")
                return
            if not recorder.ready.is_set() or (recorder.late and not recorder.told):
                recorder.stop.set()  # it hears nothing yet
                self._host.publish_status(recorder, "closed", "")
                return
            at_ns = now_ns()
            assert self._host.publisher is not None
            self._host.publisher.publish(topics.CONTROL, session, at_ns, at_ns, topics.END_RECORDING)
            # the engine says when it has come to this message
            self._host.publish_session("streams")
        elif op == "record" and not on:
            self._wanted = True
            self.poll()

    def poll(self) -> None:
        """Begin a recording that was asked for, as soon as the one before is finished; say so if that one failed at its
        end. Call it now and then.
        """
        recorder = self._recorder
        if recorder is not None and recorder.running:
            return
        code = recorder.process.exitcode if recorder is not None and recorder.process is not None else None
        if recorder is not None and recorder.done and not recorder.given_up and code:
            self._give_up(recorder, f"it {how_it_ended(code)} before its file was finished")
        if self._wanted:
            self._wanted = False
            self._begin()

    def _begin(self) -> None:
        """Start a recorder; it begins when it is told that it hears everything (`check`)."""
        self._recorder = node = ManagedProcess(processes.by_name(_RECORDER))
        node.late = True
        self._host.replace_node(node)
        try:
            path = new_path(Path(self.record.folder), self._settings.session.name)
            self.record = replace(self.record, path=str(path))
        except FileError as e:
            self._give_up(node, str(e))
            return
        self._host.start_process(node)

    def check(self, node: ManagedProcess) -> None:
        """Tell a recorder that was started in the middle of the session to begin, once it hears the bus."""
        if node.late and not node.told and node.ready.is_set():
            node.told = True
            self._host.publish_session("streams")

    def died_early(self, node: ManagedProcess) -> bool:
        """Whether it is such a recorder and died before it began: it is not started again."""
        if not node.late or node.told or node.process is None or node.process.exitcode is None:
            return False
        self._give_up(node, f"it {how_it_ended(node.process.exitcode)} before it had begun")
        return True

    def _give_up(self, node: ManagedProcess, why: str) -> None:
        node.done, node.given_up = True, why
        text = f"recorder: {why}; the session goes on without it"
        self._host.say(Note(text, _RECORDER, "given_up", "error"))
        self._host.publish_status(node, "failed", why)


def new_path(folder: Path, session: str) -> Path:
    """A free name for a recording that begins now, in a folder that is made if need be; raises FileError."""
    folder = folder.expanduser()
    name = f"{session}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = {path.name for path in folder.iterdir()}
    except OSError as e:
        raise FileError(f"the folder {folder} cannot be used ({e.strerror}); set record.folder to another") from e
    names = (f"{name}.mcap" if n == 1 else f"{name}-{n}.mcap" for n in count(1))
    return folder / next(n for n in names if n not in taken)
