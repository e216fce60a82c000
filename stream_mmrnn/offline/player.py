"""The page of a replay: the recording's messages at their pace, held where it is paused, and found again after a seek.

Forward, a seek lets the messages run until there as fast as they go. Back, it ends this pass over the recording, and
the next one runs from the beginning to the place: so the model's state is always the one that it has there, never a
guess. All stamps shown are the recording's own; of a prediction only the step is of now. Knows nothing about engines,
files or the bus.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Annotated, Any

import msgspec

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.config import LOOPBACK
from stream_mmrnn.core.types import Envelope, ModelSpec, Prediction
from stream_mmrnn.viewers.dashboard.heads import HISTORY_NS
from stream_mmrnn.viewers.dashboard.server import Dashboard
from stream_mmrnn.viewers.dashboard.state import LiveState

_SHOW_NS = 100_000_000
_POLL_S = 0.02
_NO_TYPING = "a recording is played here: what is typed would change nothing"


class _Command(msgspec.Struct, forbid_unknown_fields=True):
    """What the page posts to /replay."""

    paused: bool | None = None
    seek_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None


class Player:
    """Serves the page on loopback; `close` gives the port back.

    Raises:
        ProcessError: the port cannot be had.

    """

    WANTED = frozenset({topics.LABEL, topics.raw("vision"), topics.raw("audio"), *topics.raws("text")})
    """What the page shows of a recording beside what the model is given."""

    def __init__(self, speed: float, alive: Callable[[], bool], port: int = 0) -> None:
        self._speed, self._alive = speed, alive
        self._commands: deque[_Command] = deque(maxlen=64)
        self._page = Dashboard(LOOPBACK, port, posts={"/replay": self._handle})
        self._page.start()
        self._name = ""
        self._contract: dict[str, Any] = {}
        self._first_ns = self._last_ns = self._position_ns = 0
        self._paused = self._ended = self._back = False
        self._until_ns = 0
        """Where a seek goes: before it nothing is waited for."""
        self._base = (0, 0)
        """Now, and the recording's time that belongs to it."""
        self._shown_ns = 0
        self._view = LiveState()
        self._predictions = 0
        self._statuses: Collection[wire.StatusMessage] = ()

    @property
    def address(self) -> str:
        return self._page.address

    def load(
        self, name: str, spec: ModelSpec, first_ns: int, last_ns: int, statuses: Collection[wire.StatusMessage] = ()
    ) -> None:
        """Say what is played: `first_ns` and `last_ns` are when its first and its last message were published,
        `statuses` what the processes said last when it was recorded.
        """
        self._statuses = statuses
        self._name, self._first_ns, self._last_ns = name, first_ns, max(first_ns, last_ns)
        heads = msgspec.to_builtins({"modalities": spec.modalities, "heads": spec.heads})
        self._contract = {"name": spec.name, "sha256": spec.sha256, **heads}

    def play(self, envelopes: Iterable[Envelope]) -> Iterator[Envelope]:
        """One pass: the messages, each when it is due. Ends early where a seek goes back; `again` says so."""
        self._view, self._predictions = LiveState(), 0
        self._back = self._ended = False
        self._position_ns = self._first_ns
        self._rebase()
        for status in self._statuses:
            self._report(status)
        for envelope in envelopes:
            if not self._wait_for(envelope.publish_ns):
                return
            there = msgspec.structs.replace(envelope, received_ns=envelope.publish_ns)
            # long before the place of a seek nothing is shown that would still be seen there
            if envelope.publish_ns >= self._until_ns - HISTORY_NS:
                self._view.observe(there)
                if there.topic == topics.raw("vision") and isinstance(there.payload, bytes):
                    self._page.picture(there.payload)
            yield there
        self._ended, self._until_ns = True, 0
        # one who looks may still want to go back
        while self._alive() and self._page.clients and not self._back:
            self._obey()
            self._show()
            time.sleep(_POLL_S)

    def again(self) -> bool:
        """Whether a further pass is wanted, because a seek went back."""
        return self._back and self._alive()

    def observe(self, prediction: Prediction) -> None:
        """Show a prediction, with the recording's stamps until its step and none of a bus that is not there."""
        if prediction.tick.event_ns < self._until_ns - HISTORY_NS:
            return
        took_ns = prediction.step_end_ns - prediction.step_start_ns
        start_ns = prediction.tick.closed.received_ns
        message = msgspec.structs.replace(
            wire.prediction_message(prediction), step_start_ns=start_ns, step_end_ns=start_ns + took_ns
        )
        tick, at_ns = prediction.tick, start_ns + took_ns
        payload = wire.pack(message)
        self._view.observe(
            Envelope(
                topics.PREDICTION, tick.session, self._predictions, tick.event_ns, at_ns, at_ns, payload, "", at_ns
            )
        )
        self._predictions += 1

    def close(self) -> None:
        self._page.close()

    def _handle(self, body: bytes) -> str:
        """In the server's thread."""
        try:
            self._commands.append(msgspec.json.decode(body, type=_Command))
        except msgspec.MsgspecError as e:
            return f"that is no command of a replay: {e}"
        return ""

    def _obey(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            if command.paused is not None:
                self._paused = command.paused
                self._rebase()
            if command.seek_s is not None:
                self._until_ns = min(self._first_ns + round(command.seek_s * 1e9), self._last_ns)
                self._back = self._ended or self._until_ns < self._position_ns

    def _rebase(self) -> None:
        self._base = (now_ns(), self._position_ns)

    def _wait_for(self, due_ns: int) -> bool:
        """Until the recording's time is `due_ns`; False where this pass is over."""
        while self._alive():
            if self._commands:
                self._obey()
            if self._back:
                return False
            at_ns = now_ns()
            if at_ns - self._shown_ns >= _SHOW_NS:
                self._show()
            if due_ns < self._until_ns:
                self._position_ns = due_ns
                return True
            if self._until_ns:  # arrived
                self._position_ns = max(self._position_ns, self._until_ns)
                self._until_ns = 0
                self._rebase()
            if self._paused:
                time.sleep(_POLL_S)
                continue
            began_ns, from_ns = self._base
            self._position_ns = min(due_ns, from_ns + int((at_ns - began_ns) * self._speed))
            if self._position_ns >= due_ns:
                return True
            time.sleep(min((due_ns - self._position_ns) / self._speed / 1e9, _POLL_S))
        return False

    def _report(self, status: wire.StatusMessage) -> None:
        topic, at_ns = topics.STATUS + status.node, self._position_ns
        self._view.observe(Envelope(topic, topics.EVERYONE, 0, at_ns, at_ns, at_ns, wire.pack(status), "", at_ns))

    def _show(self) -> None:
        self._shown_ns, at_ns = now_ns(), self._position_ns
        # last, so that it is this model's contract that is shown
        counts = {"predictions": self._predictions}
        self._report(wire.StatusMessage("replay", "ready", counts=counts, detail={"spec": self._contract}))
        sound = self._view.sound
        self._page.sound(sound.first, sound.columns)
        self._page.update(
            {
                **self._view.snapshot(at_ns),
                "typing": {"possible": False, "why": _NO_TYPING},
                "replay": {
                    "recording": self._name,
                    "position_s": round((at_ns - self._first_ns) / 1e9, 2),
                    "duration_s": round((self._last_ns - self._first_ns) / 1e9, 2),
                    "paused": self._paused,
                    "note": self._note(),
                },
            }
        )

    def _note(self) -> str:
        if self._until_ns > self._position_ns:
            place_s = (self._until_ns - self._first_ns) / 1e9
            return f"on the way to {place_s:.1f} s: the model runs over all that is before, as it did then"
        if self._ended:
            return "the end; go back to see it again, or close this page to end the replay"
        return f"at {self._speed:g} times its speed" + (", paused" if self._paused else "")
