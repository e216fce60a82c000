"""Play a recording on the live page, in real time or at another speed, with pause and seek.

A seek forward runs the messages up to the target as fast as possible. A seek back ends this pass over the recording,
and the next pass runs from the beginning to the target. So the model's state is always exact. All stamps that are shown
are the recording's; only the duration of a prediction's step is new. Knows nothing about engines, files or the bus.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Protocol

import msgspec

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.durations import spoken
from stream_mmrnn.core.settings import LOOPBACK
from stream_mmrnn.core.streams import Stream, text_topics, usual
from stream_mmrnn.core.types import Envelope, ModelSpec, Prediction
from stream_mmrnn.viewers.dashboard.heads import HISTORY_NS
from stream_mmrnn.viewers.dashboard.server import Dashboard
from stream_mmrnn.viewers.dashboard.state import LiveState

_SHOW_NS = 100_000_000
_POLL_S = 0.02
_GONE_NS = 5_000_000_000
"""So long after the last browser has left, a replay at its end ends: a page that is loaded again is away shortly."""
_NO_TYPING = "this is a recording: it can be labelled, but text cannot be added to it"
_MOST_NAMES, _MOST_SHOWN = 32, 64
"""Labels that are offered to be pressed, and letters of one."""


class Mark(msgspec.Struct, frozen=True, order=True):
    """Something that was said or labelled in a recording."""

    at_s: float
    kind: str
    text: str


class Command(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The body of a POST to /replay."""

    paused: bool | None = None
    seek_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None
    seek_id: Annotated[str, msgspec.Meta(max_length=32)] = ""
    """Any name of this seek: the state names the newest one, so that its sender knows when it is done."""
    speed: Annotated[float, msgspec.Meta(ge=0.1, le=16)] | None = None
    label: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None
    """True from here on, until the next one; `none` ends one."""
    undo: bool = False
    """Take the newest label of this replay back."""


class Labels(Protocol):
    """Where labels of the recording are kept; times are the recording's, ns."""

    @property
    def names(self) -> list[str]:
        """Those that were given."""

    @property
    def changes(self) -> Sequence[tuple[int, str]]:
        """From when on which is true."""

    def mark(self, at_ns: int, name: str) -> str:
        """Why a label cannot be given, or ""."""

    def undo(self) -> str:
        """Why the newest one cannot be taken back, or ""."""


def command_of(body: bytes) -> Command | str:
    """The body of a POST to /replay; one sentence if it is none."""
    try:
        return msgspec.json.decode(body, type=Command)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
        return f"not a command of a replay: {e}"


class Screen(Protocol):
    """What a player shows the recording on: a page of its own, or a view of another program's page."""

    @property
    def clients(self) -> int:
        """Browsers that show it."""

    def update(self, state: dict[str, Any]) -> None: ...
    def picture(self, jpeg: bytes) -> None: ...
    def sound(self, first: int, columns: bytes) -> None: ...


class Player:
    """Plays on a screen; without one it serves a page of its own, on loopback until `close`.

    Raises:
        ProcessError: the port is not free.

    """

    def __init__(self, speed: float, alive: Callable[[], bool], port: int = 0, screen: Screen | None = None) -> None:
        self._speed, self._alive = speed, alive
        self._commands: deque[Command] = deque(maxlen=64)
        self._own = None if screen is not None else Dashboard(LOOPBACK, port, posts={"/replay": self.handle})
        if self._own is not None:
            self._own.start()
            screen = self._own
        assert screen is not None
        self._page: Screen = screen
        self._marks: Sequence[Mark] = ()
        self._labels: Labels | None = None
        self._labelled = ""
        """What the newest command about a label did."""
        self._name = self._failed = ""
        self._contract: dict[str, Any] = {}
        self._first_ns = self._last_ns = self._position_ns = 0
        self._paused = self._ended = self._back = False
        self._until_ns = 0
        """The target of a seek: messages before it are not paced."""
        self._seek_id = ""
        self._base = (0, 0)
        """A local time, and the recording's time at that moment."""
        self._shown_ns = self._watched_ns = 0
        """When the page was updated last, and when a browser was there last; 0: never."""
        self._lines: set[str] = set()
        """Topics of labels and words, which are shown however old they are."""
        self._table: Mapping[str, Stream] = usual()
        self._view = self._new_view()
        self._predictions = self._ticks = 0
        self._statuses: Collection[wire.StatusMessage] = ()

    @property
    def address(self) -> str:
        """Of the page of its own; "" without one."""
        return self._own.address if self._own is not None else ""

    def load(
        self,
        name: str,
        spec: ModelSpec,
        table: Mapping[str, Stream],
        first_ns: int,
        last_ns: int,
        statuses: Collection[wire.StatusMessage] = (),
        marks: Sequence[tuple[int, str, str]] = (),
        labels: Labels | None = None,
    ) -> set[str]:
        """Set what is played: `table` are the recording's streams, `first_ns` and `last_ns` the publish times of its
        first and its last message, `statuses` the last status of each process of the recorded session,
        `marks` its words and labels: when they were published, `label` or `text`, and what they say; `labels` has
        the labels that can be changed on the page.

        Returns the topics that the page shows in addition to the model's inputs.
        """
        self._statuses, self._table = statuses, table
        self._name, self._first_ns, self._last_ns = name, first_ns, max(first_ns, last_ns)
        heads = msgspec.to_builtins({"modalities": spec.modalities, "heads": spec.heads})
        self._contract = {"name": spec.name, "sha256": spec.sha256, **heads}
        self._labels = labels
        self._marks = [self._mark(*of) for of in marks]
        self._view = self._new_view()
        self._lines = {topics.LABEL, *text_topics(table.values())}
        return {self._view.picture_topic, self._view.sound_topic, *self._lines} - {""}

    def play(self, envelopes: Iterable[Envelope]) -> Iterator[Envelope]:
        """One pass over the messages, each when it is due. Ends early at a seek back; `again` is true then."""
        self._view, self._predictions, self._ticks = self._new_view(), 0, 0
        self._back = self._ended = False
        self._position_ns = self._first_ns
        self._rebase()
        for status in self._statuses:
            self._report(status)
        skipped: set[str] = set()
        for envelope in envelopes:
            if not self._wait_for(envelope.publish_ns):
                return
            there = msgspec.structs.replace(envelope, received_ns=envelope.publish_ns)
            # messages longer before a seek's target than the page's history need not be shown, but a label may hold
            is_near = envelope.publish_ns >= self._until_ns - HISTORY_NS
            if is_near and skipped:
                self._view.skip(skipped)  # they are no loss
                skipped = set()
            if not is_near and envelope.topic not in self._lines:
                skipped.add(envelope.topic)
            else:
                self._view.observe(there)
                if there.topic == self._view.picture_topic and isinstance(there.payload, bytes):
                    self._page.picture(there.payload)
            yield there
        self._ended, self._until_ns = True, 0
        # a viewer may still seek back
        while self._alive() and self._is_watched() and not self._back:
            self._run_commands()
            self._show()
            time.sleep(_POLL_S)

    def again(self) -> bool:
        """Whether another pass is needed, because of a seek back."""
        return self._back and self._alive()

    def observe(self, prediction: Prediction) -> None:
        """Show a prediction with the recording's stamps and the new step's duration, and no time on a bus."""
        self._ticks += 1
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
        if self._own is None:
            return
        if self._own.clients:
            ended = {"recording": self._name, "why": ""}
            self._own.update({**self._view.snapshot(self._position_ns), "ended": ended})
            self._own.flush()
        self._own.close()

    def _new_view(self) -> LiveState:
        view = LiveState(table=self._table)
        view.began_ns, view.recorded = self._first_ns, True
        return view

    def handle(self, body: bytes) -> str:
        """Take the body of a POST to /replay: why it is refused, or "". May be called from another thread."""
        command = command_of(body)
        if isinstance(command, str):
            return command
        self._commands.append(command)
        return ""

    def fail(self, why: str) -> None:
        """Show why the recording cannot be played."""
        self._failed = why
        self._show()

    def _run_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            if command.paused is not None:
                self._paused = command.paused
                self._rebase()
            if command.speed is not None:
                self._speed = command.speed
                self._rebase()
            if command.label is not None:
                self._give(command.label.strip())
            if command.undo:
                self._take_back()
            if command.seek_s is not None:
                self._labelled, self._seek_id = "", command.seek_id
                self._until_ns = min(self._first_ns + round(command.seek_s * 1e9), self._last_ns)
                self._back = self._ended or self._until_ns < self._position_ns

    def _mark(self, at_ns: int, kind: str, text: str) -> Mark:
        return Mark(round((at_ns - self._first_ns) / 1e9, 2), kind, text[:_MOST_SHOWN])

    def _all_marks(self) -> list[Mark]:
        given = self._labels.changes if self._labels is not None else ()
        return sorted([*self._marks, *(self._mark(*of) for of in ((at, topics.LABEL, name) for at, name in given))])

    @property
    def _there_ns(self) -> int:
        """Where the recording is for who looks at it: during a seek, at its target."""
        return self._until_ns or self._position_ns

    def _give(self, name: str) -> None:
        at_ns = self._there_ns
        why = self._labels.mark(at_ns, name) if self._labels is not None else _NO_TYPING
        self._labelled = why or f"{name} from {spoken((at_ns - self._first_ns) / 1e9)} on"
        if not why:  # a later pass has it from the recording
            payload, origin = name.encode(), topics.TIER + topics.LABEL
            self._view.observe(Envelope(topics.LABEL, "", 0, at_ns, at_ns, at_ns, payload, origin, at_ns))

    def _take_back(self) -> None:
        why = self._labels.undo() if self._labels is not None else _NO_TYPING
        self._labelled = why or "the newest label was taken back"
        if not why:  # this pass has shown it: another one has not
            self._until_ns, self._back = self._there_ns, True

    def _rebase(self) -> None:
        self._base = (now_ns(), self._position_ns)

    def _wait_for(self, due_ns: int) -> bool:
        """Wait until the recording's time is `due_ns`; False if this pass has ended."""
        while self._alive():
            if self._commands:
                self._run_commands()
            if self._back:
                return False
            at_ns = now_ns()
            if at_ns - self._shown_ns >= _SHOW_NS:
                self._show()
            if due_ns < self._until_ns:
                self._position_ns = due_ns
                return True
            if self._until_ns:  # the seek's target is reached
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

    def _is_watched(self) -> bool:
        """Whether a browser is there, or was there a moment ago."""
        at_ns = now_ns()
        if self._page.clients:
            self._watched_ns = at_ns
        return self._watched_ns > 0 and at_ns - self._watched_ns <= _GONE_NS

    def _show(self) -> None:
        self._shown_ns, at_ns = now_ns(), self._position_ns
        self._is_watched()
        # last, so that the page shows this model's contract, not the recorded one
        counts = {"predictions": self._predictions}
        self._report(wire.StatusMessage("replay", "ready", counts=counts, detail={"spec": self._contract}))
        sound = self._view.sound
        self._page.sound(sound.first, sound.columns)
        self._page.update(
            {
                **self._view.snapshot(at_ns),
                "ticks": self._ticks,
                "typing": {"possible": False, "why": _NO_TYPING},
                "replay": {
                    "recording": self._name,
                    "position_s": round((at_ns - self._first_ns) / 1e9, 2),
                    "duration_s": round((self._last_ns - self._first_ns) / 1e9, 2),
                    "paused": self._paused,
                    "speed": self._speed,
                    "seek": {"id": self._seek_id, "done": not self._until_ns},
                    "marks": self._all_marks(),
                    "labels": self._labels.names[:_MOST_NAMES] if self._labels is not None else None,
                    "note": self._note(),
                },
            }
        )

    def _note(self) -> str:
        if self._failed:
            return self._failed
        if self._until_ns > self._position_ns:
            place_s = (self._until_ns - self._first_ns) / 1e9
            return f"seeking to {spoken(place_s)}: the model runs over everything before it"
        if self._labelled:
            return self._labelled
        if self._ended:
            return "the end; seek back to see it again, or close this page to end the replay"
        return f"at {self._speed:g} times real time" + (", paused" if self._paused else "")
