"""State of a client's group: many sessions that are stepped by blocks, without sockets and clocks.

As `client_state` for one session: the newest blocks are kept, and what a server has not seen is sent again. Knows
nothing about transports or waiting calls.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.block import Flags, Integers
from stream_mmrnn.core.errors import BadTick, Busy, Evicted, SessionError, WireError
from stream_mmrnn.core.types import MAX_TICK
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.block_codec import StepsReader, integers, read_heads, rows_of, to_steps
from stream_mmrnn.serve.client_errors import ERRORS
from stream_mmrnn.serve.client_requests import Asked, Outstanding, SessionReply, SessionRequest
from stream_mmrnn.serve.group_columns import GroupColumns

KEPT_TICKS = 256
"""Of each session: more than a server steps between two snapshots."""
ASK_AGAIN_NS = 1_000_000_000
"""After so long without an answer sessions are opened again: a server that was restarted never had the tick."""


class GroupAnswer(msgspec.Struct, frozen=True, eq=False):
    """The answer to one block of N ticks, in its order."""

    block: int
    """The number that `send` returned."""
    rows: Integers
    """[N] rows of the group: positions in its names."""
    ticks: Integers
    """[N]"""
    event_ns: Integers
    """[N] as they were given."""
    heads: dict[str, npt.NDArray[np.float32]]
    """By head [N, size]; NaN where a tick was not stepped."""
    stepped: Flags
    """[N] The others were refused, or the server had them already."""
    errors: dict[int, SessionError]
    """By position, why a tick was refused."""
    waited_ns: int
    """In the server's queue."""
    step_ns: int
    round_trip_ns: int
    """From the first `send` until it was received."""
    model: str
    """sha256 of the model file."""


class _Sent(msgspec.Struct, eq=False):
    content: bytes
    rows: Integers
    ticks: Integers
    event_ns: Integers
    at_ns: int
    open: Flags
    """Ticks without an answer."""
    stepped: Flags
    at_server: Integers | None = None
    """The positions that were sent the last time; None for all."""
    heads: dict[str, npt.NDArray[np.float32]] | None = None
    errors: dict[int, SessionError] = msgspec.field(default_factory=dict)
    waited_ns: int = 0
    step_ns: int = 0
    model: str = ""


class ClientGroup:
    """A group as the client sees it; N sessions."""

    def __init__(
        self,
        number: int,
        names: Sequence[str],
        tokens: Sequence[str | None],
        welcome: protocol.Welcome,
        send: Callable[[protocol.Request | bytes], None],
    ) -> None:
        """`send`: a request, or one that is encoded."""
        self.number, self.names, self.tokens = number, list(names), list(tokens)
        self._welcome, self._send = welcome, send
        self._columns = GroupColumns([m.name for m in welcome.modalities], [m.size for m in welcome.modalities])
        self._heads = [h.name for h in welcome.heads]
        self._head_sizes = [h.size for h in welcome.heads]
        self.row = {name: i for i, name in enumerate(names)}
        count = len(names)
        self.next_ticks: Integers = np.zeros(count, np.int64)
        self.resumed: Flags = np.zeros(count, np.bool_)
        self._had_token = [token is not None for token in tokens]
        self._begun: Flags = np.zeros(count, np.bool_)
        """Rows that have been opened once."""
        self._following: Integers = np.zeros(count, np.int64)
        self._asked_to_open: Flags = np.zeros(count, np.bool_)
        """Rows without a reply to the newest request to open them."""
        self.errors: dict[int, SessionError] = {}
        """Rows whose session is over here, or was not opened, and why."""
        self.sent: OrderedDict[int, _Sent] = OrderedDict()
        """The newest blocks, answered or not: they may have to be sent again."""
        self.unanswered: OrderedDict[int, int] = OrderedDict()
        """By block: when it was sent, or the group last opened again because of it."""
        self.answers: deque[GroupAnswer] = deque()
        self._outstanding: defaultdict[int, Outstanding] = defaultdict(Outstanding)
        """By row."""
        self.skipped = 0
        """Ticks that the server had seen already, and whose answers were lost when it died."""
        self._to_send: deque[int | list[Asked]] = deque()
        """Blocks that wait until the server's queue has room, and requests that come after them."""
        self._on_the_way: set[int] = set()
        self._reopening = False
        self._blocks = 0

    # ---- opening -------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Ask for all sessions that are not over here."""
        rows = [i for i in range(len(self.names)) if i not in self.errors]
        self._asked_to_open[:] = False
        self._asked_to_open[rows] = True
        begin = 0
        for end in range(1, len(rows) + 1):  # runs of rows that follow each other
            if end == len(rows) or rows[end] != rows[end - 1] + 1:
                some = rows[begin:end]
                self._send(
                    protocol.OpenGroup(
                        group=self.number,
                        first=some[0],
                        sessions=tuple(self.names[i] for i in some),
                        tokens=tuple(self.tokens[i] for i in some),
                    )
                )
                begin = end

    @property
    def is_open(self) -> bool:
        """Whether each session has been opened or refused."""
        return not self._asked_to_open.any()

    def is_new(self, row: int) -> bool:
        """Whether this group has begun the session, and not continued it."""
        return bool(self._begun[row]) and not self._had_token[row]

    def reopen(self) -> None:
        if not self._reopening:
            self._reopening = True
            self.open()

    def _grouped(self, reply: protocol.Grouped, now_ns: int) -> None:
        count = len(reply.tokens)
        following = integers(reply.next, count, "next")
        if len(reply.resumed) != count or reply.first + count > len(self.names):
            raise WireError(f"a `grouped` of {count} sessions from {reply.first} on does not fit this group")
        refused = {of.row: of for of in reply.refused}
        for i in range(count):
            row = reply.first + i
            self._asked_to_open[row] = False
            if row in refused:
                of = refused[row]
                if of.error != "busy":
                    self._end(row, ERRORS.get(of.error, SessionError)(of.why))
                elif not self._begun[row]:  # else a later `poll` asks again
                    self.errors[row] = Busy(of.why, of.retry_s)
                else:
                    self._following[row] = -1
                continue
            self.tokens[row] = reply.tokens[i]
            self._following[row] = following[i]
            if not self._begun[row]:
                self._begun[row] = True
                self.next_ticks[row], self.resumed[row] = following[i], reply.resumed[i] != 0
        if self._reopening and self.is_open:
            self._reopening = False
            self._send_again(now_ns)

    def _end(self, row: int, error: SessionError) -> None:
        """A session is over here: its ticks get this error."""
        self.errors[row] = error
        for number, of in list(self.sent.items()):
            for i in np.flatnonzero(of.open & (of.rows == row)).tolist():
                of.errors[i] = error
                of.open[i] = False
            self._finish(number, of, 0)

    def _send_again(self, now_ns: int) -> None:
        """Send again what the server has not seen, in order. What it has, without an answer, is counted as skipped."""
        requests = deque(of for of in self._to_send if isinstance(of, list))
        self._to_send.clear()
        self._on_the_way.clear()
        for outstanding in self._outstanding.values():
            outstanding.reopened()
        busy = self._following < 0
        oldest = self._oldest()
        for row in np.flatnonzero((oldest > self._following) & (self._following < self.next_ticks) & ~busy).tolist():
            if row not in self.errors:
                self._end(
                    row,
                    Evicted(
                        f"the server has session {self.names[row]!r} as it was at tick {self._following[row]}, and the "
                        f"ticks from there to {oldest[row]} are not kept here; close it, or open it again and send them"
                    ),
                )
        over = np.zeros(len(self.names), np.bool_)
        over[list(self.errors)] = True
        for number, of in list(self.sent.items()):
            seen = of.ticks < self._following[of.rows]
            lost = of.open & seen & ~busy[of.rows]
            self.skipped += int(np.count_nonzero(lost))
            of.open &= ~lost
            # not those that the server has no room for: they have no answer, so that a later `poll` asks again
            again = np.flatnonzero(~seen & ~over[of.rows] & ~busy[of.rows])
            if number in self.unanswered:
                self.unanswered[number] = now_ns
            while requests and requests[0][0].before <= number:
                self._to_send.append(requests.popleft())
            if len(again):
                of.at_server = None if len(again) == len(of.rows) else again
                self._to_send.append(number)
            self._finish(number, of, now_ns)
        self._to_send.extend(requests)
        self._pump()

    def _oldest(self) -> Integers:
        """By row, the oldest tick that is kept; a large number where none is."""
        oldest = np.full(len(self.names), MAX_TICK + 2)
        for of in reversed(self.sent.values()):
            oldest[of.rows] = of.ticks
        return oldest

    # ---- sending -------------------------------------------------------------------------------------------------

    def put(
        self,
        features: Mapping[str, Any],
        rows: npt.ArrayLike | None,
        ticks: npt.ArrayLike | None,
        event_ns: npt.ArrayLike | None,
        present: Mapping[str, npt.ArrayLike] | None,
        age_ns: npt.ArrayLike | None,
        now_ns: int,
    ) -> int:
        """Queue one block; returns its number. Raises BadTick where it does not fit the model."""
        if len(self.unanswered) >= KEPT_TICKS:
            raise SessionError(
                f"{KEPT_TICKS} blocks of this group wait for an answer; read answers, and send no faster than the "
                "model's tick"
            )
        whole = rows is None and not self.errors
        block = self._columns.block(rows, features, ticks, event_ns, present, age_ns, self.next_ticks, self.errors)
        number, self._blocks = self._blocks, self._blocks + 1
        content = protocol.encode(to_steps(self.number, number, block, whole))
        if len(content) > protocol.MAX_BYTES:
            raise BadTick(f"a block has at most {protocol.MAX_BYTES} bytes, this one has {len(content)}; make groups")
        everything = np.ones(len(block), np.bool_)
        self.sent[number] = _Sent(
            content, block.handles, block.indices, block.event_ns, now_ns, everything, np.zeros(len(block), np.bool_)
        )
        self.unanswered[number] = now_ns
        self.next_ticks[block.handles] = np.maximum(self.next_ticks[block.handles], block.indices + 1)
        self._to_send.append(number)
        if len(self.sent) > KEPT_TICKS:
            waits = next(of for of in self._to_send if not isinstance(of, list))
            while len(self.sent) > KEPT_TICKS and next(iter(self.sent)) < waits:
                self.sent.popitem(last=False)
        self._pump()
        return number

    def ask(self, make: Callable[[int], SessionRequest]) -> list[Asked]:
        """Queue a request for each session that is not over here, after the blocks before it; `take_back` them at the
        end. `make`: the request for a row.
        """
        asked = [Asked(make(row), self._blocks) for row in range(len(self.names)) if row not in self.errors]
        if self._reopening and asked and isinstance(asked[0].request, protocol.Close):
            # a server without room for the sessions can close them; ticks that it has not seen are given up
            self._reopening = False
            self._to_send.clear()
            self.sent.clear()
            self.unanswered.clear()
        if asked:
            self._to_send.append(asked)
            self._pump()
        return asked

    def take_back(self, asked: list[Asked]) -> None:
        """Nobody waits for requests any more: they are not sent, if they were not yet, and replies are skipped."""
        if asked and asked in self._to_send:
            self._to_send.remove(asked)
            for of in asked:
                if isinstance(of.request, protocol.Close):
                    self._send(of.request)  # the group ends here: what waits before it is not sent any more
        for of in asked:
            self._outstanding[self.row[of.request.session]].give_up(of)

    def replied(self, asked: Asked) -> SessionReply | SessionError | None:
        """The reply to a request, or why the session is over here; None where there is neither yet."""
        return asked.reply if asked.reply is not None else self.errors.get(self.row[asked.request.session])

    def forget_before(self, block: int) -> None:
        """The states were reset before this block: no server has an older one any more."""
        for number in [n for n in self.sent if n < block and n not in self.unanswered and n not in self._to_send]:
            del self.sent[number]

    def _pump(self) -> None:
        """Send as many blocks as the server's queue takes, and the requests after them."""
        while self._to_send and not self._reopening:
            number = self._to_send[0]
            if isinstance(number, list):
                for asked in number:
                    self._outstanding[self.row[asked.request.session]].add(asked)
                    self._send(asked.request)
                self._to_send.popleft()
                continue
            if len(self._on_the_way) >= self._welcome.queue:
                return
            self._to_send.popleft()
            of = self.sent[number]
            self._on_the_way.add(number)
            if of.at_server is None:
                self._send(of.content)
                continue
            request = protocol.read_request(of.content)
            assert isinstance(request, protocol.Steps)
            block = StepsReader(self._columns.names, self._columns.sizes).read(request, len(self.names))
            mask = np.zeros(len(block), np.bool_)
            mask[of.at_server] = True
            self._send(to_steps(self.number, number, block.take(mask)))

    # ---- receiving -----------------------------------------------------------------------------------------------

    def receive(self, reply: protocol.Grouped | protocol.Preds, now_ns: int) -> None:
        """Handle a reply to this group. Raises WireError where it is not valid."""
        if isinstance(reply, protocol.Grouped):
            self._grouped(reply, now_ns)
        elif (of := self.sent.get(reply.block)) is not None:
            self._preds(of, reply, now_ns)

    def _preds(self, of: _Sent, reply: protocol.Preds, now_ns: int) -> None:
        self._on_the_way.discard(reply.block)
        at_server = np.arange(len(of.rows)) if of.at_server is None else of.at_server
        place = np.full(len(self.names), -1)
        place[of.rows[at_server]] = at_server

        def places(column: bytes) -> Integers:
            rows = rows_of(column)
            if len(rows) and int(rows.max()) >= len(place):
                raise WireError("a reply names rows that this group does not have")
            found: Integers = place[rows]
            return found[found >= 0]

        if reply.heads:
            at = places(reply.rows) if reply.rows else at_server
            heads = read_heads(reply.heads, self._head_sizes, len(at))
            if len(at) == len(of.rows) and of.heads is None:
                of.heads = dict(zip(self._heads, heads, strict=True))
                of.stepped = of.open.copy()
            else:
                if of.heads is None or not next(iter(of.heads.values())).flags.writeable:
                    old = of.heads or {}
                    of.heads = {
                        name: old[name].copy() if name in old else np.full((len(of.rows), size), np.nan, np.float32)
                        for name, size in zip(self._heads, self._head_sizes, strict=True)
                    }
                new = of.open[at]
                for name, values in zip(self._heads, heads, strict=True):
                    of.heads[name][at[new]] = values[new]
                of.stepped[at[new]] = True
            of.open[at] = False
            of.waited_ns, of.step_ns, of.model = reply.waited_ns, reply.step_ns, reply.model
        if reply.skipped:
            at = places(reply.skipped)
            self.skipped += int(np.count_nonzero(of.open[at]))
            of.open[at] = False
        gone = False
        for refused in reply.refused:
            at = places(refused.rows) if refused.rows else at_server
            if refused.error in ("evicted", "unknown"):
                gone |= bool(of.open[at].any())
                continue
            error = ERRORS.get(refused.error, SessionError)(refused.why)
            for i in at[of.open[at]].tolist():
                of.errors[i] = error
            of.open[at] = False
        self._finish(reply.block, of, now_ns)
        if gone:
            self.reopen()
        self._pump()

    def _finish(self, number: int, of: _Sent, now_ns: int) -> None:
        """Hand an answer on when every tick of its block has one."""
        if of.open.any() or self.unanswered.pop(number, None) is None:
            return
        heads = of.heads or {
            name: np.full((len(of.rows), size), np.nan, np.float32)
            for name, size in zip(self._heads, self._head_sizes, strict=True)
        }
        of.heads = None
        took_ns = max(now_ns - of.at_ns, 0)
        self.answers.append(
            GroupAnswer(
                number,
                of.rows,
                of.ticks,
                of.event_ns,
                heads,
                of.stepped,
                of.errors,
                of.waited_ns,
                of.step_ns,
                took_ns,
                of.model,
            )
        )

    def answer_of(self, number: int) -> GroupAnswer:
        """The answer to a block that has one; those of earlier blocks are skipped."""
        found = next(answer for answer in self.answers if answer.block == number)
        self.answers = deque(answer for answer in self.answers if answer.block > number)
        return found

    def receive_of_session(self, reply: Any) -> None:
        """Handle a reply that names one of the sessions."""
        row = self.row[reply.session]
        match reply:
            case protocol.Done() | protocol.Flushed():
                self._outstanding[row].reply(reply)
            case protocol.Refused():
                self._outstanding[row].refuse(reply.error, ERRORS.get(reply.error, SessionError)(reply.why))
            case protocol.EvictedNow(reason="taken"):
                why = f"session {reply.session!r} has been taken over by another client that has its token"
                self._end(row, Evicted(why))
            case protocol.EvictedNow():
                if self.unanswered:
                    self.reopen()
                # else the next block is refused, and opens it again

    def poll(self, now_ns: int) -> bool:
        """Open the group again where a block has had no answer for `ASK_AGAIN_NS`; whether it did."""
        if not self.unanswered or now_ns - self.unanswered[first := next(iter(self.unanswered))] <= ASK_AGAIN_NS:
            return False
        self.unanswered[first] = now_ns
        self._reopening = True
        self.open()
        return True
