"""ClusterClient: sessions on a cluster, with the calls of `AsyncClient`.

    async with ClusterClient("nats://127.0.0.1:4222") as client, await client.open("alice") as session:
        answer = await session.step({"audio": vector})

All its sessions share one gateway. What was missed while the connection was lost is asked for. Knows nothing about
leases.
"""

from __future__ import annotations

import asyncio
import re

from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.async_client import AsyncClient, Receive, Transport, end_tasks
from stream_mmrnn.serve.cluster.batch import one_tick
from stream_mmrnn.serve.cluster.client_groups import Group, Groups
from stream_mmrnn.serve.cluster.connection import without_secrets
from stream_mmrnn.serve.cluster.frames import Control, PredColumns, Said
from stream_mmrnn.serve.cluster.gateway import STARTING, Gateway
from stream_mmrnn.serve.cluster.subjects import PREFIX, USER

_ASK_AGAIN_S, _MOST_S = 1.0, 8.0
"""A control message without a reply for so long is sent again; each time after twice as long, up to so long."""


class _Sent:
    """What one session has sent, as far as it has no answer."""

    def __init__(self) -> None:
        self.token = b""
        self.ticks: dict[int, None] = {}
        self.newest = -1
        """The newest tick that was sent, or that the engine has had."""
        self.controls: dict[int, _Asked] = {}

    @property
    def answered(self) -> int:
        """All ticks up to this one have their answers."""
        return next(iter(self.ticks)) - 1 if self.ticks else self.newest


class _Asked:
    def __init__(self, content: bytes, now_s: float) -> None:
        self.content, self._wait_s = content, _ASK_AGAIN_S
        self.at_s = now_s + _ASK_AGAIN_S
        """When it is sent again."""
        self.again = False
        """It was sent more than once."""

    def put_off(self, now_s: float) -> None:
        """It is sent again; the next time after twice as long: the cluster may have too much to do."""
        self.again, self._wait_s = True, min(2 * self._wait_s, _MOST_S)
        self.at_s = now_s + self._wait_s


class _NatsTransport:
    """The messages of an `AsyncClient`, by a gateway."""

    def __init__(self, receive: Receive, user: str) -> None:
        self._deliver = receive
        self.gateway = Gateway(user, self._answers, self._said)
        self.gateway.on_return = self._returned
        self._sessions: dict[str, _Sent] = {}
        self._count = 0
        self._repeated = 0
        self._heads: list[int] = []
        self._width = 0
        self._model = ""
        self._asking: asyncio.Task[None] | None = None
        self._of_groups: Groups | None = None

    @property
    def groups(self) -> Groups:
        assert self._of_groups is not None
        return self._of_groups

    @property
    def repeated(self) -> int:
        """Answers that came a second time, and were dropped."""
        return self._repeated + self.groups.repeated

    async def begin(self, url: str, prefix: str, credentials: str, timeout_s: float) -> None:
        await self.gateway.begin(url, prefix, credentials, timeout_s)
        welcome = protocol.read_reply(self.gateway.welcome)
        assert isinstance(welcome, protocol.Welcome)
        self._heads = [4 * head.size for head in welcome.heads]
        self._width, self._model = len(welcome.modalities), welcome.model
        batch = self.gateway.batch
        self._of_groups = Groups(welcome, batch.lane, self.gateway.ticks, self._ask_of_group, self._deliver)
        self._asking = asyncio.create_task(self._ask_again())

    # ---- sending -------------------------------------------------------------------------------------------------

    def post(self, session: str, content: bytes, token: str | None = None) -> None:
        request = protocol.read_request(content)
        if isinstance(request, protocol.Hello):
            self._deliver(self.gateway.welcome)
        elif isinstance(request, protocol.OpenGroup):
            self.groups.open(request)
        elif isinstance(request, protocol.Steps):
            self.groups.step(request)
        elif isinstance(request, protocol.Step):
            sent = self._sent(session, token)
            order = sent.newest, sent.answered
            sent.ticks[request.tick] = None
            sent.newest = max(sent.newest, request.tick)
            self.gateway.ticks(
                one_tick(session, token or "", request.tick, request.event_ns, *order, request.features, request.age_ns)
            )
        else:
            if isinstance(request, protocol.Open):
                self.groups.forget(session)  # it was in a group that was left
            elif (group := self.groups.of.get(session)) is not None:
                token = group.tokens[group.row[session]].decode()
            self._ask(session, content, token, isinstance(request, protocol.Open))

    def _sent(self, session: str, token: str | None) -> _Sent:
        sent = self._sessions.get(session)
        if sent is None:
            sent = self._sessions[session] = _Sent()
        if token:
            sent.token = token.encode()
        return sent

    def _ask(self, session: str, content: bytes, token: str | None, opens: bool = False) -> int:
        """Send a control message, until it has a reply; returns its number. `opens`: it is an `open`."""
        sent = self._sent(session, token)
        for number, asked in sent.controls.items() if opens else ():
            if asked.content == content:
                return number  # it has no reply yet: one is enough
        self._count += 1
        sent.controls[self._count] = _Asked(content, _now_s())
        self._control(session, sent, self._count)
        return self._count

    def _ask_of_group(self, session: str, content: bytes, row: int) -> int:
        group = self.groups.of[session]
        sent = self._sent(session, group.tokens[row].decode())
        # as for a session of its own: what it waits for is in the group
        sent.newest = int(group.answered()[row])
        return self._ask(session, content, None, opens=True)

    def _control(self, session: str, sent: _Sent, number: int) -> None:
        asked = sent.controls[number]
        self.gateway.control(Control(session, number, asked.content, sent.answered), sent.token)

    async def _ask_again(self) -> None:
        while True:
            await asyncio.sleep(_ASK_AGAIN_S / 4)
            if self.is_idle:
                self._repeat()

    @property
    def is_idle(self) -> bool:
        """Whether the log has everything that was sent: then what has no answer for long may be lost."""
        return self.gateway.is_idle

    def _repeat(self, everything: bool = False) -> None:
        """Send control messages again that have had no reply for long."""
        at_s = _now_s()
        for session, sent in self._sessions.items():
            for number, asked in sent.controls.items():
                if everything or at_s > asked.at_s:
                    asked.put_off(at_s)
                    self._control(session, sent, number)

    def _returned(self) -> None:
        """What was on its way to us is lost: ask for it."""
        self._repeat(everything=True)
        for session, sent in self._sessions.items():
            if sent.ticks:
                self.gateway.control(Control(session, 0, b"", sent.answered), sent.token)
        for _, control, token in self.groups.missed():
            self.gateway.control(control, token)

    async def again(self, session: str) -> None:
        pass  # `open`, which follows, brings the answers that were missed

    # ---- receiving -----------------------------------------------------------------------------------------------

    def _answers(self, preds: PredColumns) -> None:
        width, count = self._width, len(preds.sessions)
        indices = memoryview(preds.indices).cast("q")
        event_ns = memoryview(preds.event_ns).cast("q")
        age_ns = memoryview(preds.age_ns).cast("q")
        if len(indices) != count or len(preds.heads) != len(self._heads):
            return
        of_groups = self.groups.of
        found: dict[int, tuple[Group, list[str], list[int]]] = {}
        for i, name in enumerate(preds.sessions):
            if (group := of_groups.get(name)) is not None:
                _, names, at_rows = found.setdefault(group.number, (group, [], []))
                names.append(name)
                at_rows.append(i)
                continue
            sent, index = self._sessions.get(name), indices[i]
            if sent is None or sent.ticks.pop(index, 0) == 0:
                continue  # it was answered before
            at = i * width
            pred = protocol.Pred(
                session=name,
                tick=index,
                event_ns=event_ns[i],
                heads=tuple(
                    [raw[size * i : size * (i + 1)] for raw, size in zip(preds.heads, self._heads, strict=True)]
                ),
                present=tuple(map(bool, preds.present[at : at + width])),
                age_ns=tuple(age_ns[at : at + width]),
                waited_ns=preds.waited_ns,
                step_ns=preds.step_ns,
                model=self._model,
            )
            self._deliver(protocol.encode(pred))
        for group, names, at_rows in found.values():
            self.groups.preds(group, names, preds, at_rows)

    def _said(self, said: Said) -> None:
        sent = self._sessions.get(said.session)
        if sent is None:
            return
        content = said.content
        group = self.groups.of.get(said.session)
        if group is not None and said.tick >= 0:
            self.groups.said(group, said)
            return
        if said.number >= 0:
            asked = sent.controls.pop(said.number, None)
            if asked is None:
                return  # it was answered before
            reply = protocol.read_reply(content)
            if group is not None and (row := group.asked.pop(said.number, None)) is not None:
                self.groups.ready(group, row, reply)
                return
            if isinstance(reply, protocol.Ready):
                sent.ticks = {tick: None for tick in sent.ticks if tick >= reply.next}
                sent.newest = reply.next - 1
            elif asked.again and _is_gone(asked.content, reply):
                content = protocol.encode(protocol.Done(session=said.session))
            if group is not None and isinstance(protocol.read_request(asked.content), protocol.Close):
                self._forget(said.session)
        if said.tick >= 0:
            sent.ticks.pop(said.tick, None)
        self._deliver(content)

    async def end(self, session: str) -> None:
        self._forget(session)

    def _forget(self, session: str) -> None:
        self._sessions.pop(session, None)
        self.groups.forget(session)
        self.gateway.batch.forget(session)

    async def close(self) -> None:
        if self._asking is not None:
            await end_tasks(self._asking)
        await self.gateway.close()


def _is_gone(request: bytes, reply: protocol.Reply) -> bool:
    """Whether a `close` that was sent twice found nothing at the second time."""
    gone = isinstance(reply, protocol.Refused) and reply.error == "unknown"
    return gone and isinstance(protocol.read_request(request), protocol.Close)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


class ClusterClient(AsyncClient):
    """A client of a cluster: `async with ClusterClient(url) as client`."""

    starting = STARTING

    def __init__(
        self, url: str, *, prefix: str = PREFIX, credentials: str = "", user: str = "", timeout_s: float = 5.0
    ) -> None:
        """`url`: nats://HOST:PORT or nats://USER:PASSWORD@HOST:PORT, several separated by commas; `prefix`: the
        cluster's name on that server; `credentials`: a NATS credentials file; `user`: the name under which the server
        lets this client write and read, by default the URL's.

        Raises:
            UsageError: `user` is not a name.

        """
        super().__init__(without_secrets(url), timeout_s=timeout_s)
        self._url, self._prefix, self._credentials = url, prefix, credentials
        named = re.match(r"(?:.*?//)?([^:@/]*)(?::[^@/]*)?@", url)
        self._user = user or (named[1] if named else "") or "any"
        if not USER.fullmatch(self._user):
            raise UsageError(
                f"{self._user!r} cannot be the user of a cluster: expected letters, digits, _ and -, 32 at most; give "
                "another one as `user`"
            )

    def _open_late(self) -> None:
        # a cluster that has much to do loses nothing: asking again would only be more to do
        if isinstance(self._transport, _NatsTransport) and self._transport.is_idle:
            super()._open_late()

    async def _connect(self, receive: Receive) -> Transport:
        transport = _NatsTransport(receive, self._user)
        await transport.begin(self._url, self._prefix, self._credentials, self._timeout_s)
        return transport
