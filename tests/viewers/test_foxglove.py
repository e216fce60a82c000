"""The live Foxglove server, read by a WebSocket client that only uses Foxglove's protocol."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from harness import Running, check_summary

from stream_mmrnn.core import topics
from stream_mmrnn.core.clock import now_ns, wall_offset_ns
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.core.streams import usual
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.viewers.foxglove import FoxgloveServer, shown

pytestmark = pytest.mark.process

client = pytest.importorskip("websockets.sync.client", reason="websockets is not installed")

_MESSAGE = struct.Struct("<BIQ")
MESSAGE_DATA = 1


class Reader:
    """A client of the protocol `foxglove.sdk.v1`: it subscribes to topics and decodes by the advertised schemas."""

    def __init__(self, address: str, wanted: set[str]) -> None:
        self._open = client.connect(
            address, subprotocols=["foxglove.sdk.v1"], max_size=None, proxy=None, close_timeout=0.1
        )
        self._socket = self._open.__enter__()
        assert self._socket.subprotocol == "foxglove.sdk.v1"
        self.channels: dict[int, dict[str, Any]] = {}
        self._classes: dict[int, Any] = {}
        while wanted - {c["topic"] for c in self.channels.values()}:
            message = json.loads(self._socket.recv(10))
            if message["op"] == "advertise":
                self.channels |= {c["id"]: c for c in message["channels"]}
        chosen = [{"id": c, "channelId": c} for c, row in self.channels.items() if row["topic"] in wanted]
        self._socket.send(json.dumps({"op": "subscribe", "subscriptions": chosen}))

    def read(self) -> tuple[str, int, Any]:
        """Topic, time and decoded message of the next one."""
        while isinstance(data := self._socket.recv(20), str):
            pass
        opcode, channel, log_ns = _MESSAGE.unpack_from(data)
        assert opcode == MESSAGE_DATA
        row, body = self.channels[channel], data[_MESSAGE.size :]
        return row["topic"], log_ns, json.loads(body) if row["encoding"] == "json" else self._protobuf(row, body)

    def _protobuf(self, row: dict[str, Any], body: bytes) -> Any:
        if row["id"] not in self._classes:
            pool = descriptor_pool.DescriptorPool()
            for file in descriptor_pb2.FileDescriptorSet.FromString(base64.b64decode(row["schema"])).file:
                pool.Add(file)
            found = message_factory.GetMessageClass(pool.FindMessageTypeByName(row["schemaName"]))
            self._classes[row["id"]] = found
        return self._classes[row["id"]].FromString(body)

    def close(self) -> None:
        self._open.__exit__(None, None, None)


def test_a_client_gets_the_recorded_messages_and_a_stalled_one_does_not_slow_it(model: Path, tmp_path: Path) -> None:
    path, settings = tmp_path / "a.mcap", tmp_path / "s.toml"
    settings.write_text("[dashboard]\nenabled = false\n[foxglove]\nport = 0\n")
    wanted = {"raw/vision", "raw/audio", "raw/text", "feature/audio", "prediction"}
    got: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    args = ("--config", settings, "--source", "synthetic", "--model", model, "--record", path, "--foxglove")
    with closing(Running(*args)) as live:
        found = live.wait_for(lambda: next((m for line in live.lines if (m := re.search(r"ws://\S+", line))), None))
        assert found[0].startswith("ws://127.0.0.1:")
        with closing(Reader(found[0], set(shown(usual().values())))), closing(Reader(found[0], wanted)) as reader:
            # the first client never reads
            while min(len(got[t]) for t in wanted) < 4 or len(got["prediction"]) < 60:
                topic, log_ns, message = reader.read()
                got[topic].append((log_ns, message))
        code, summary, _ = live.end()
    assert code == 0
    assert not any("was killed" in line for line in live.lines)
    check_summary(summary)
    assert summary["viewers"]["foxglove"]["balanced"]
    assert set(got) == wanted

    recording = Recording(path)
    sent = defaultdict(dict)
    for e in recording.envelopes(wanted):
        sent[e.topic][e.publish_ns + recording._offset_ns] = e
    # the server and the recorder measured the offset of the wall clock separately
    shift_ns = min((log - got["prediction"][0][0] for log in sent["prediction"]), key=abs)
    assert abs(shift_ns) < 100_000_000
    for log_ns, message in got["prediction"]:
        assert json.loads(sent["prediction"][log_ns + shift_ns].payload) == message
    for log_ns, message in got["raw/vision"]:
        assert message.data == sent["raw/vision"][log_ns + shift_ns].payload
        assert message.format == "jpeg"
    for log_ns, message in got["raw/text"]:
        assert message.message.encode() == sent["raw/text"][log_ns + shift_ns].payload
    for log_ns, message in got["feature/audio"]:
        assert np.array_equal(np.float32(message.values), sent["feature/audio"][log_ns + shift_ns].payload)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_the_queue_of_a_client_that_does_not_read_is_bounded() -> None:
    server = FoxgloveServer(0, 32, usual())
    frame = np.random.default_rng(0).bytes(250_000)
    at_ns = now_ns()

    def show(k: int) -> None:
        server.show(Envelope("raw/vision", "live", k, at_ns + k, at_ns + k, at_ns + k, frame))

    with closing(Reader(server.address, {"raw/vision"})) as stalled:
        show(0)
        while not server._channels["raw/vision"].has_sinks():
            pass
        for k in range(200):
            show(k)
        before = resident_bytes()
        for k in range(200, 4200):  # a gigabyte
            show(k)
        assert resident_bytes() - before < 100_000_000
        stalled_at = stalled.read()
        assert stalled_at[2].data == frame
    server.show(Envelope("raw/vision", "live", 0, 0, 0, -(2**62), frame))
    server.close()


def test_unreadable_messages_are_counted_and_nothing_is_encoded_without_subscribers() -> None:
    server = FoxgloveServer(0, 8, usual())
    bad = Envelope("raw/audio", "live", 0, 0, 0, 0, b"odd")
    server.show(bad)
    assert server.garbage == 0  # there is no subscriber: it was not encoded
    with closing(Reader(server.address, {"raw/audio", "label"})) as reader:
        while not server._channels["raw/audio"].has_sinks():
            pass
        server.show(bad)
        server.show(Envelope("raw/audio", "live", 0, 0, 0, -(2**63), b"even"))
        server.show(Envelope("status/engine", "host", 0, 0, 0, 0, b"{}"))
        at_ns = now_ns()
        server.show(Envelope(topics.LABEL, "live", 0, at_ns, at_ns, at_ns, b"sitting"))
        topic, log_ns, message = reader.read()
        assert (topic, message.message, message.name) == ("label", "sitting", "label")
        assert abs(log_ns - at_ns - wall_offset_ns()) < 1_000_000_000
    assert server.garbage == 2
    taken = int(server.address.rpartition(":")[2])
    with pytest.raises(StreamError, match=f"port {taken}"):
        FoxgloveServer(taken, 8, usual())
    server.close()
