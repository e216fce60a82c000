"""Groups of a client (`serve.client_groups`) over a cluster: blocks become rows of frames, and answers become `preds`.

Every session of a group is one of the cluster's own; a group is known to its client only. Knows nothing about NATS.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stream_mmrnn.core.block import Block, Integers
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.block_codec import StepsReader, column, row_bytes
from stream_mmrnn.serve.cluster.batch import Chunk
from stream_mmrnn.serve.cluster.frames import MOST_BYTES, MOST_ROWS, Control, PredColumns, Said

_F4 = np.dtype("<f4")


class Group:
    """One group. Arrays have a row for each session."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.names: list[str] = []
        self.tokens: list[bytes] = []
        self.row: dict[str, int] = {}
        self.newest: Integers = np.zeros(0, np.int64)
        """Of each session, the newest tick that was sent, or that the engine has had."""
        self.open: dict[int, tuple[Integers, Integers]] = {}
        """By block that has ticks without an answer: the tick of each row, -1 where there is none; and how many."""
        self.asked: dict[int, int] = {}
        """By number of a control message that opens a session, its row."""

    def grow(self, first: int, names: tuple[str, ...]) -> None:
        missing = first + len(names) - len(self.names)
        if missing > 0:
            self.names += [""] * missing
            self.tokens += [b""] * missing
            self.newest = np.concatenate([self.newest, np.full(missing, -1)])
        for row, name in enumerate(names, first):
            self.names[row] = name
            self.row[name] = row

    def answered(self) -> Integers:
        """By row, the tick up to which all have their answers."""
        found = self.newest.copy()
        for ticks, _ in reversed(self.open.values()):
            np.copyto(found, ticks - 1, where=ticks >= 0)
        return found


class Groups:
    """All groups of a client."""

    def __init__(
        self,
        welcome: protocol.Welcome,
        lane: Callable[[str], int],
        ticks: Callable[[Chunk], None],
        ask: Callable[[str, bytes, int], int],
        deliver: Callable[[bytes], None],
    ) -> None:
        """`lane`: of a session; `ticks` sends rows of one lane; `ask` sends a control message of a session, and returns
        its number; `deliver` takes messages for the client.
        """
        self._lane, self._ticks, self._ask, self._deliver = lane, ticks, ask, deliver
        self._heads = [head.size for head in welcome.heads]
        self._model = welcome.model
        self._reader = StepsReader([m.name for m in welcome.modalities], [m.size for m in welcome.modalities])
        self.repeated = 0
        """Answers that came a second time, and were dropped."""
        self._groups: dict[int, Group] = {}
        self.of: dict[str, Group] = {}
        """By session."""

    # ---- sending -------------------------------------------------------------------------------------------------

    def open(self, request: protocol.OpenGroup) -> None:
        group = self._groups.setdefault(request.group, Group(request.group))
        group.grow(request.first, request.sessions)
        for i, name in enumerate(request.sessions):
            row, token = request.first + i, request.tokens[i] if request.tokens else None
            self.of[name] = group
            group.tokens[row] = (token or "").encode()
            number = self._ask(name, protocol.encode(protocol.Open(session=name, token=token)), row)
            group.asked[number] = row

    def step(self, request: protocol.Steps) -> None:
        group = self._groups[request.group]
        block = self._reader.read(request, len(group.names))
        ticks = np.full(len(group.names), -1)
        ticks[block.handles] = block.indices
        order = group.newest[block.handles], group.answered()[block.handles]
        group.newest[block.handles] = np.maximum(group.newest[block.handles], block.indices)
        group.open[request.block] = ticks, np.array([len(block)])
        names = [group.names[row] for row in block.handles.tolist()]
        lanes = np.array([self._lane(name) for name in names])
        row_size = sum(vectors.nbytes for vectors in block.features) // len(block) + 1
        most = max(min(MOST_ROWS, MOST_BYTES // 4 // row_size), 1)
        for lane in np.unique(lanes).tolist():
            mine = np.flatnonzero(lanes == lane)
            for at in range(0, len(mine), most):
                some = np.zeros(len(block), np.bool_)
                some[mine[at : at + most]] = True
                mine_order = order[0][some], order[1][some]
                self._ticks(_chunk(group, block if some.all() else block.take(some), mine_order, request.half))

    # ---- receiving -----------------------------------------------------------------------------------------------

    def ready(self, group: Group, row: int, reply: protocol.Reply) -> None:
        """The reply to the request to open a session of a group."""
        match reply:
            case protocol.Ready():
                group.tokens[row] = reply.token.encode()
                group.newest[row] = reply.next - 1
                for ticks, left in group.open.values():
                    if 0 <= ticks[row] < reply.next:  # the client waits for it no more
                        ticks[row] = -1
                        left -= 1
                self._clean(group)
                said = protocol.Grouped(
                    group=group.number,
                    first=row,
                    tokens=(reply.token,),
                    next=column(np.array([reply.next])),
                    resumed=bytes([reply.resumed]),
                )
            case protocol.BusyNow():
                said = _not_opened(group, row, protocol.RowRefused(row, "busy", reply.why, reply.retry_s))
            case protocol.Refused():
                said = _not_opened(group, row, protocol.RowRefused(row, reply.error, reply.why))
            case _:
                return
        self._deliver(protocol.encode(said))

    @staticmethod
    def _clean(group: Group) -> None:
        for block in [block for block, (_, left) in group.open.items() if left[0] <= 0]:
            del group.open[block]

    def preds(self, group: Group, names: list[str], preds: PredColumns, at: list[int]) -> None:
        """Answers to ticks of a group: rows `at` of `preds`, of these sessions."""
        rows = np.array([group.row[name] for name in names])
        ticks = np.frombuffer(preds.indices, "<i8")[at]
        heads = [
            np.frombuffer(raw, _F4).reshape(-1, size)[at] for raw, size in zip(preds.heads, self._heads, strict=True)
        ]
        unmatched = len(rows)
        for block, (sent, left) in list(group.open.items()):
            mine = sent[rows] == ticks
            count = int(np.count_nonzero(mine))
            if not count:
                continue
            unmatched -= count
            sent[rows[mine]] = -1
            left -= count
            if left[0] <= 0:
                del group.open[block]
            reply = protocol.Preds(
                group=group.number,
                block=block,
                heads=tuple(values[mine].tobytes() for values in heads),
                waited_ns=preds.waited_ns,
                step_ns=preds.step_ns,
                model=self._model,
                rows=row_bytes(rows[mine]),
            )
            self._deliver(protocol.encode(reply))
            if not unmatched:
                return
        self.repeated += unmatched

    def said(self, group: Group, said: Said) -> None:
        """A reply to a tick of a group."""
        row, reply = group.row[said.session], protocol.read_reply(said.content)
        for block, (sent, left) in list(group.open.items()):
            if sent[row] != said.tick:
                continue
            rows = row_bytes(np.array([row]))
            found = {"skipped": rows, "next": column(np.array([said.tick + 1]))}
            if isinstance(reply, protocol.Refused):
                found = {"refused": (protocol.RowsRefused(reply.error, reply.why, rows),)}  # type: ignore[dict-item]
                if reply.error not in ("evicted", "unknown"):  # else it is sent again
                    sent[row] = -1
                    left -= 1
            else:
                sent[row] = -1
                left -= 1
            if left[0] <= 0:
                del group.open[block]
            self._deliver(
                protocol.encode(
                    protocol.Preds(
                        group=group.number, block=block, heads=(), waited_ns=0, step_ns=0, model=self._model,
                        **found,  # type: ignore[arg-type]
                    )
                )
            )  # fmt: skip

    def missed(self) -> list[tuple[str, Control, bytes]]:
        """Of each session with ticks that have no answer: the message that asks for them, and its token."""
        found = []
        for group in self._groups.values():
            answered = group.answered()
            for row in np.flatnonzero(answered < group.newest).tolist():
                name = group.names[row]
                found.append((name, Control(name, 0, b"", int(answered[row])), group.tokens[row]))
        return found

    def forget(self, session: str) -> None:
        group = self.of.pop(session, None)
        if group is None:
            return
        del group.row[session]
        if not group.row:
            self._groups.pop(group.number, None)


def _not_opened(group: Group, row: int, refused: protocol.RowRefused) -> protocol.Grouped:
    return protocol.Grouped(
        group=group.number, first=row, tokens=("",), next=column(np.array([0])), resumed=b"\0", refused=(refused,)
    )


def _chunk(group: Group, block: Block, order: tuple[Integers, Integers], half: bool) -> Chunk:
    rows = block.handles.tolist()
    return Chunk(
        [group.names[row] for row in rows],
        [group.tokens[row] for row in rows],
        column(block.indices),
        column(block.event_ns),
        column(order[0]),
        column(order[1]),
        block.present.astype(np.uint8).tobytes(),
        column(block.age_ns),
        half,
        tuple(vectors.tobytes() for vectors in block.features),
    )
