"""A browser's camera or microphone as a source: what the page's process forwards, and what it says of the browser."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest

from stream_mmrnn.bus import Address
from stream_mmrnn.capture import sources
from stream_mmrnn.capture.sources.bus_source import PageSource
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import SourceError, SourceSpecError
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.types import Envelope


class Bus:
    """A subscriber that gives what it was given, then nothing."""

    def __init__(self) -> None:
        self.envelopes: deque[Envelope] = deque()

    def receive(self, timeout_ms: int) -> Envelope | None:
        return self.envelopes.popleft() if self.envelopes else None

    def close(self) -> None:
        pass

    def put(self, topic: str, payload: bytes, device_ns: int = 0) -> None:
        at_ns = now_ns()
        self.envelopes.append(
            Envelope(topic, "live", len(self.envelopes), at_ns, at_ns, at_ns, payload, "page", 0, device_ns)
        )

    def say(self, why: str | None, state: Any = "ready", **counts: int) -> None:
        """A status of the page's process."""
        detail = {} if why is None else {"sensors": {"audio": {"why": why, **counts}}}
        message = wire.StatusMessage("dashboard", state, reason="was killed by SIGKILL", detail=detail)
        self.put("status/dashboard", wire.pack(message))

    def send(self, sound: Any, rate_hz: int = 16_000, device_ns: int = 0) -> None:
        data = np.asarray(sound, "<i2").tobytes()
        self.put(topics.push("audio"), wire.pack_push(wire.PushMessage(data, rate_hz)), device_ns)


def page() -> tuple[PageSource, Bus]:
    settings = config.parse({"sources": {"audio": "page", "vision": "none", "text": "none"}})
    source = sources.create_source(stream_table(settings)["audio"], settings, address=Address("ipc:///a", "ipc:///b"))
    assert isinstance(source, PageSource)
    bus: Any = Bus()
    source._subscriber = bus
    return source, bus


def read(source: PageSource, bus: Bus) -> list[Any]:
    return list(source.samples(lambda: bool(bus.envelopes), 0))


def test_it_is_missing_with_a_reason_until_a_browser_gives_it() -> None:
    source, bus = page()
    with pytest.raises(SourceError, match="the page has not started"):
        source.open()
    bus.say("no browser gives its microphone yet")
    with pytest.raises(SourceError, match="no browser gives its microphone yet"):
        source.open()
    with pytest.raises(SourceError, match="no browser gives its microphone yet"):
        source.open()
    bus.say("")
    bus.send([1, 2, 3], device_ns=7)
    source.open()
    [sample] = read(source, bus)
    assert sample.data.tolist() == [1, 2, 3]
    assert sample.device_ns == 7


def test_it_is_lost_with_the_browser_and_comes_back_with_it() -> None:
    source, bus = page()
    bus.say("", browser_dropped=0)
    source.open()
    bus.send([1])
    bus.say("the browser with the microphone closed the page or lost its connection", browser_dropped=3)
    bus.send([2])
    with pytest.raises(SourceError, match="closed the page or lost its connection"):
        read(source, bus)
    source.close()
    assert source.info["browser_dropped"] == 3
    bus.say("")
    bus.send([3])
    source.open()
    assert [sample.data.tolist() for sample in read(source, bus)] == [[3]]


@pytest.mark.parametrize("state", ["restarting", "failed"])
def test_it_is_missing_while_the_pages_process_is_down(state: str) -> None:
    source, bus = page()
    bus.say("")
    source.open()
    bus.say(None, state)
    with pytest.raises(SourceError, match=r"the page's process was killed by SIGKILL; .* connects to it again"):
        read(source, bus)
    bus.say("")
    source.open()


def test_what_is_no_status_and_no_sound_is_counted_or_left_out() -> None:
    source, bus = page()
    bus.say("")
    source.open()
    bus.put("status/dashboard", b"{")
    bus.put("status/dashboard", b'{"node": "x", "state": "ready", "detail": {"sensors": 3}}')
    bus.put("status/dashboard_2", b"{}")
    bus.put(topics.push("audio"), b"no message")
    bus.put(topics.push("audio"), wire.pack_push(wire.PushMessage(b"odd")))
    bus.send(np.zeros(480), rate_hz=48_000)
    bus.send(np.zeros(480), rate_hz=48_000)
    assert read(source, bus)
    assert source.info["garbage"] == 2


def test_which_streams_may_come_from_the_page() -> None:
    everything = config.parse(
        {
            "sources": {"vision": "page", "audio": "page", "text": "page", "other_audio": "page"},
            "streams": {"left": {"source": "page", "kind": "vision"}},
        }
    )
    sources.check_all(stream_table(everything).values(), everything)
    for table, words in (
        ({"sources": {"vision": "page:0"}}, "page takes no argument"),
        ({"sources": {"other_text": "page"}}, "is the first person's"),
        ({"sources": {"vision": "page"}, "dashboard": {"enabled": False}}, "leave out --no-dashboard"),
        ({"sources": {"signal": "page"}}, "is no source of signal"),
    ):
        settings = config.parse(table)
        with pytest.raises(SourceSpecError, match=words):
            sources.check_all(stream_table(settings).values(), settings)
