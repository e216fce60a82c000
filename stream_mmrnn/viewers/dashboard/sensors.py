"""The browser as camera and microphone: which browser may send which stream, what it sent, and when that happened.

Everything that a browser sends comes from outside: it is checked, bounded and counted here. Knows nothing about HTTP,
sockets or the bus.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec

from stream_mmrnn.capture.remote_clock import RemoteClock
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.streams import Stream, is_sensor
from stream_mmrnn.core.types import Sample

HEADER = struct.Struct("<BBHIdd")
"""Of a sample: version, index of the stream in the welcome, zero, number of the sample, the browser's clock in ms
(`performance.now()`) and the device's own in seconds, both at the end of what the sample covers."""
VERSION = 1
MAX_PICTURE_BYTES = 1024 * 1024 - HEADER.size
MAX_SOUND_BYTES = 64 * 1024
MAX_CONTROL_BYTES = 1024
LOST_NS = 5_000_000_000
"""A browser that answers no ping for this long has lost its connection."""
_MAX_MS = 1e13
_MAX_AGE_NS = 10_000_000_000
_PINGS = 16
"""Pings whose answers are awaited at the same time."""
_MIN_SOUND_S = 0.005
"""A shorter block counts as one of this length."""
_START_JPEG = b"\xff\xd8\xff"

Why = Literal["stopped", "refused", "none", "busy", "insecure", "hidden", "ended"]

_DEVICE = {"vision": "camera", "audio": "microphone"}
_SENTENCES: dict[str, str] = {
    "": "no browser gives its {device} yet; open the live page and press the button of the {device}",
    "stopped": "the {device} was stopped on the page; press its button there to start it again",
    "refused": "the browser was not allowed to use the {device}; allow it in the browser's settings for this page, and "
    "press the button of the {device} again",
    "none": "the browser has no {device}; connect one, or open the page on a phone",
    "busy": "the browser cannot read its {device}, which another program may use; close that, and press the button of "
    "the {device} again",
    "insecure": "browsers give their {device} only to https pages and to pages of their own machine; set "
    "dashboard.cert and dashboard.key",
    "hidden": "the page is in the background, where browsers make no pictures; bring it to the front",
    "ended": "the {device} was taken from the browser; connect it, or allow it again, and press its button",
    "lost": "the browser with the {device} closed the page or lost its connection; open the page again",
}
"""Why no browser gives a stream, by what the browser said of it."""


class SensorSpec(msgspec.Struct, frozen=True):
    """A stream that a browser can give, and what it is asked for."""

    name: str
    kind: Literal["vision", "audio"]
    width: int = 0
    height: int = 0
    rate_hz: float = 0.0
    """Pictures per second."""
    quality: float = 0.0
    """Of the JPEG, up to 1."""
    block_ms: float = 0.0
    """Of sound."""


def sensor_specs(table: Iterable[Stream], settings: Settings) -> list[SensorSpec]:
    """The streams that browsers give, and what each is asked for."""
    camera, microphone = settings.camera, settings.microphone
    return [
        SensorSpec(
            row.name,
            "vision",
            width=camera.width,
            height=camera.height,
            rate_hz=camera.rate_hz,
            quality=camera.jpeg_quality / 100,
        )
        if row.kind == "vision"
        else SensorSpec(row.name, "audio", block_ms=microphone.block_ms)
        for row in table
        if is_sensor(row.source, row.kind)
    ]


class Reading(msgspec.Struct, frozen=True):
    """A sample of a stream, with the sample rate of its sound."""

    stream: str
    sample: Sample
    rate_hz: int


class Start(msgspec.Struct, frozen=True, tag_field="op", tag="start", forbid_unknown_fields=True):
    """A browser wants to give a stream. `tab` names its page: one that has reconnected gets its stream back at once."""

    stream: Annotated[str, msgspec.Meta(max_length=32)]
    tab: Annotated[str, msgspec.Meta(min_length=8, max_length=64)]
    rate_hz: Annotated[int, msgspec.Meta(ge=8000, le=192_000)] = 16_000


class Stop(msgspec.Struct, frozen=True, tag_field="op", tag="stop", forbid_unknown_fields=True):
    """A browser gives a stream no more, or cannot give it."""

    stream: Annotated[str, msgspec.Meta(max_length=32)]
    why: Why


class Pong(msgspec.Struct, frozen=True, tag_field="op", tag="pong", forbid_unknown_fields=True):
    """The answer to a ping: when it came and when this went, by the browser's clock."""

    number: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    received_ms: Annotated[float, msgspec.Meta(ge=0, lt=_MAX_MS)]
    replied_ms: Annotated[float, msgspec.Meta(ge=0, lt=_MAX_MS)]


_read_control: Callable[[str], Start | Stop | Pong] = msgspec.json.Decoder(Start | Stop | Pong).decode


class Frame(msgspec.Struct, frozen=True):
    """A sample as a browser sent it."""

    stream: int
    number: int
    clock_ns: int
    device_ns: int
    data: bytes


def read_control(text: str) -> Start | Stop | Pong:
    """Decode a text message of a browser; raises WireError if it is none of these."""
    if len(text) > MAX_CONTROL_BYTES:
        raise WireError(f"a message of a browser has at most {MAX_CONTROL_BYTES} characters, this one has {len(text)}")
    try:
        return _read_control(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
        raise WireError(f"a message of a browser is not valid: {e}") from e


def read_frame(data: bytes) -> Frame:
    """Decode a binary message of a browser; raises WireError if it is no sample."""
    if len(data) <= HEADER.size:
        raise WireError(f"a sample has a header of {HEADER.size} bytes and content, this one has {len(data)} bytes")
    version, stream, zero, number, clock_ms, device_s = HEADER.unpack_from(data)
    if version != VERSION or zero:
        raise WireError(f"version {version} of a sample is not {VERSION}; reload the page")
    if not (0 <= clock_ms < _MAX_MS and 0 <= device_s < _MAX_MS / 1000):
        raise WireError(f"a sample's times are {clock_ms} ms and {device_s} s; expected finite ones from 0 on")
    return Frame(stream, number, round(clock_ms * 1e6), round(device_s * 1e9), data[HEADER.size :])


class _Budget:
    """A token bucket: `per_s` on average, `burst` at once."""

    def __init__(self, per_s: float, burst: float, at_ns: int) -> None:
        self._per_s, self._burst = per_s, burst
        self._left, self._at_ns = burst, at_ns

    def spend(self, cost: float, at_ns: int) -> bool:
        self._left = min(self._burst, self._left + self._per_s * (at_ns - self._at_ns) / 1e9)
        self._at_ns = at_ns
        if cost > self._left:
            return False
        self._left -= cost
        return True


class _Sensor:
    """A stream, its owner and its counts."""

    def __init__(self, spec: SensorSpec) -> None:
        self.spec = spec
        self.owner: Browser | None = None
        self.tab, self.next = "", -1
        """The page that gave it last, and the number of its next sample if none is dropped, -1 if that is unknown."""
        self.why = ""
        """Key of `_SENTENCES` while it has no owner."""
        self.counts = dict.fromkeys(("received", "browser_dropped", "too_fast_dropped", "garbage", "queue_dropped"), 0)

    def sentence(self) -> str:
        """Why no browser gives it; "" if one does."""
        if self.owner is not None:
            return ""
        return _SENTENCES[self.why].format(device=_DEVICE[self.spec.kind])


class _Sending:
    """What is known of a stream that a browser gives, from its start on."""

    def __init__(self, spec: SensorSpec, rate_hz: int, at_ns: int) -> None:
        self.rate_hz = rate_hz
        # a browser that was held up sends what has waited at once
        self.budget = (
            _Budget(2 * spec.rate_hz, 4 * spec.rate_hz, at_ns) if spec.kind == "vision" else _Budget(1.5, 5.0, at_ns)
        )
        self.device = RemoteClock()
        """From the device's count of its sound to the local clock; what it takes until it is read only makes it late.
        """


class Browser:
    """One open page, from its connection to its end. Not for several threads."""

    def __init__(self, sensors: Sensors) -> None:
        self._sensors = sensors
        self._sending: dict[str, _Sending] = {}
        self._clocks = {name: RemoteClock() for name in sensors.names}
        """From the browser's clock to the local one; one per stream, because the times of each increase."""
        self._pings: dict[int, int] = {}
        self._number = 0
        self.tab = ""
        self.pongs = 0
        self._heard_ns = sensors.clock()

    def welcome(self) -> dict[str, Any]:
        """The first message to the browser: the streams that it can give."""
        return {"op": "welcome", "streams": [msgspec.to_builtins(spec) for spec in self._sensors.specs]}

    def ping(self) -> dict[str, Any]:
        """The next ping to send, at once."""
        self._number += 1
        while len(self._pings) >= _PINGS:
            del self._pings[next(iter(self._pings))]
        self._pings[self._number] = self._sensors.clock()
        return {"op": "ping", "number": self._number}

    @property
    def lost(self) -> bool:
        """Whether it answered no ping for a while."""
        return self._sensors.clock() - self._heard_ns > LOST_NS

    def receive(self, message: str | bytes) -> dict[str, Any] | None:
        """Take a message; the answer, if there is one. A wrong message is counted, and changes nothing."""
        try:
            if isinstance(message, bytes):
                self._receive_sample(read_frame(message))
                return None
            control = read_control(message)
        except WireError:
            self._sensors.garbage += 1
            return None
        if isinstance(control, Start):
            return self._start(control)
        if isinstance(control, Stop):
            self._sensors.release(control.stream, self, control.why)
        else:
            self._receive_pong(control)
        return None

    def _receive_pong(self, pong: Pong) -> None:
        at_ns = self._sensors.clock()
        sent_ns = self._pings.pop(pong.number, None)
        if sent_ns is None or pong.replied_ms < pong.received_ms:
            self._sensors.garbage += 1
            return
        self._heard_ns = at_ns
        self.pongs += 1
        for clock in self._clocks.values():
            clock.exchange(sent_ns, round(pong.received_ms * 1e6), at_ns, round(pong.replied_ms * 1e6))

    def _start(self, start: Start) -> dict[str, Any]:
        self.tab = start.tab
        why = self._sensors.claim(start.stream, self)
        if why:
            return {"op": "refused", "stream": start.stream, "why": why}
        spec = self._sensors.of(start.stream).spec
        self._sending[start.stream] = _Sending(spec, start.rate_hz, self._sensors.clock())
        return {"op": "started", "stream": start.stream}

    def _receive_sample(self, frame: Frame) -> None:
        names = self._sensors.names
        if frame.stream >= len(names):
            raise WireError(f"a sample of stream {frame.stream}; there are {len(names)}")
        name, at_ns = names[frame.stream], self._sensors.clock()
        sensor, sending = self._sensors.of(name), self._sending.get(name)
        if sensor.owner is not self or sending is None or not self.pongs:
            return  # it was on its way when this ended
        counts = sensor.counts
        counts["browser_dropped"] += max(0, frame.number - sensor.next) if sensor.next >= 0 else 0
        sensor.next = frame.number + 1
        counts["received"] += 1
        is_sound = sensor.spec.kind == "audio"
        if not _is_well_formed(frame.data, is_sound):
            counts["garbage"] += 1
            return
        cost = max(len(frame.data) / 2 / sending.rate_hz, _MIN_SOUND_S) if is_sound else 1.0
        if not sending.budget.spend(cost, at_ns):
            counts["too_fast_dropped"] += 1
            return
        event_ns = self._clocks[name].stamp(frame.clock_ns)
        device_ns = frame.clock_ns
        if is_sound:
            event_ns, device_ns = sending.device.arrived(frame.device_ns, event_ns), frame.device_ns
        if not at_ns - _MAX_AGE_NS < event_ns:
            counts["garbage"] += 1
            return
        sample = Sample(min(event_ns, at_ns), at_ns, frame.data, device_ns)
        counts["queue_dropped"] += not self._sensors.forward(Reading(name, sample, sending.rate_hz))

    def close(self) -> None:
        """The connection has ended."""
        for name in self._sensors.names:
            self._sensors.release(name, self, "lost")


def _is_well_formed(data: bytes, is_sound: bool) -> bool:
    if is_sound:
        return len(data) % 2 == 0 and len(data) <= MAX_SOUND_BYTES
    return data.startswith(_START_JPEG) and len(data) <= MAX_PICTURE_BYTES


class Sensors:
    """The streams of a session that browsers give, and who gives them: one browser a stream at a time."""

    def __init__(
        self, specs: Sequence[SensorSpec], forward: Callable[[Reading], bool], clock: Callable[[], int] = now_ns
    ) -> None:
        """`forward` takes a sample and never waits; whether it had room."""
        self.specs, self.forward, self.clock = tuple(specs), forward, clock
        self.names = [spec.name for spec in specs]
        self._sensors = {spec.name: _Sensor(spec) for spec in specs}
        self.garbage = 0
        """Messages that could not be read."""

    def of(self, name: str) -> _Sensor:
        return self._sensors[name]

    def claim(self, name: str, browser: Browser) -> str:
        """Make a browser the owner of a stream; why not, or ""."""
        sensor = self._sensors.get(name)
        if sensor is None:
            return f"this session takes no stream {name!r} from a browser; reload the page"
        if sensor.owner is not None and sensor.owner.tab != browser.tab:
            device = _DEVICE[sensor.spec.kind]
            return f"another browser is the {device} of this session; stop it there first"
        if sensor.tab != browser.tab:
            sensor.tab, sensor.next = browser.tab, -1
        sensor.owner = browser
        return ""

    def release(self, name: str, browser: Browser, why: str) -> None:
        """A browser gives a stream no more, or could not; another browser's stream stays."""
        sensor = self._sensors.get(name)
        if sensor is None or (sensor.owner is not None and sensor.owner is not browser):
            return
        # a closed page was in the background before; one that gave nothing is no loss
        if why != "lost" or sensor.owner is browser or (sensor.why == "hidden" and sensor.tab == browser.tab):
            sensor.owner, sensor.why = None, why

    def status(self) -> dict[str, dict[str, Any]]:
        """By stream, why no browser gives it ("" if one does), and its counts."""
        return {name: {"why": sensor.sentence(), **sensor.counts} for name, sensor in self._sensors.items()}

    def losses(self) -> dict[str, int]:
        """Counts of what was lost, of all streams together."""
        kinds = ("browser_dropped", "too_fast_dropped", "queue_dropped")
        found = {kind: sum(sensor.counts[kind] for sensor in self._sensors.values()) for kind in kinds}
        return {**found, "garbage": self.garbage + sum(sensor.counts["garbage"] for sensor in self._sensors.values())}
