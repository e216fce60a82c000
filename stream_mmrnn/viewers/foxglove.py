"""Serves the messages of the bus to Foxglove: the same channels and schemas as in a recording.

A slow client loses the oldest messages of the SDK's bounded queue and blocks nothing. Always on loopback, behind a gate
that refuses web pages of other sites. Knows nothing about the bus or processes.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from stream_mmrnn.core import topics
from stream_mmrnn.core.clock import wall_offset_ns
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.core.settings import LOOPBACK
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording.mcap_format import UNWRITABLE, encoded, scheme
from stream_mmrnn.viewers.origin_gate import OriginGate


def shown(table: Iterable[Stream]) -> list[str]:
    """The topics that a client can subscribe to. `tick` is only in recordings up to 0.1.0."""
    found = [t.name for t in topics.TOPICS.values() if t.recorded and t.name != topics.TICK]
    return found + [topic for row in table for topic in row.topics()]


class FoxgloveServer:
    """A WebSocket server (subprotocol `foxglove.sdk.v1`) with one channel per topic."""

    def __init__(self, port: int, queue: int, table: Mapping[str, Stream], origins: Collection[str] = ()) -> None:
        """Listen on `port`, 0 for any free one; up to `queue` messages are queued per client. `table`: the session's
        streams by name. `origins`: web pages that may connect, beside those of this machine.

        Raises:
            StreamError: the port is taken.

        """
        import foxglove

        self._context = context = foxglove.Context()  # of its channels and its server
        self._offset_ns = wall_offset_ns()
        self._channels: dict[str, Any] = {}
        self._kinds = {topics.raw(row.name): row.kind for row in table.values()}
        for topic in shown(table.values()):
            encoding, (name, schema_encoding, data) = scheme(topic, self._kinds.get(topic))
            schema = foxglove.Schema(name=name, encoding=schema_encoding, data=data)
            self._channels[topic] = foxglove.Channel(topic, message_encoding=encoding, schema=schema, context=context)
        self.garbage = 0
        """Messages that could not be encoded."""
        hidden = _hidden_host()
        try:
            self._server = foxglove.start_server(
                name="stream_mmrnn", host=hidden, port=0, context=context, message_backlog_size=queue
            )
            self.gate = OriginGate(port, (hidden, self._server.port), origins)
        except (OSError, RuntimeError) as e:
            raise StreamError(
                f"the Foxglove server cannot listen on port {port}: {e}; set foxglove.port to a free one"
            ) from e
        self.address = f"ws://{LOOPBACK}:{self.gate.port}"

    def show(self, envelope: Envelope) -> None:
        """Send a message to the clients that subscribed to its topic; it is not encoded if there are none."""
        channel = self._channels.get(envelope.topic)
        if channel is None or not channel.has_sinks():
            return
        try:
            data = encoded(envelope, self._offset_ns, self._kinds.get(envelope.topic))
            channel.log(data, log_time=envelope.publish_ns + self._offset_ns)
        except UNWRITABLE:
            self.garbage += 1

    def close(self) -> None:
        self.gate.close()
        self._server.stop()
        for channel in self._channels.values():
            channel.close()


def _hidden_host() -> str:
    """An address of loopback that a web page cannot guess: Linux and Windows have 2^24 of them, others only one."""
    if sys.platform not in ("linux", "win32"):
        return LOOPBACK
    a, b, c = (1 + secrets.randbelow(254) for _ in range(3))
    return f"127.{a}.{b}.{c}"
