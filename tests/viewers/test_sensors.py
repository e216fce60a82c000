"""A browser as camera and microphone, without one: the bytes, the owners, the bounds, the clock, the way in."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import certificates
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.core import config
from stream_mmrnn.core.errors import ConfigError, WireError
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.viewers.dashboard import sensors
from stream_mmrnn.viewers.dashboard.sensors import (
    HEADER,
    Browser,
    Reading,
    Sensors,
    SensorSpec,
    read_control,
    read_frame,
    sensor_specs,
)
from stream_mmrnn.viewers.dashboard.server import Dashboard

CAMERA = SensorSpec("vision", "vision", width=640, height=480, rate_hz=30.0, quality=0.9)
MICROPHONE = SensorSpec("audio", "audio", block_ms=20.0)
JPEG = b"\xff\xd8\xff\xe0 picture"
SECOND = 1_000_000_000
OFFSET = 7_000 * SECOND
"""The local clock at the browser's 0."""


class Bench:
    """Sensors with a clock that is set by hand, and what they forwarded."""

    def __init__(self, room: int = 10_000) -> None:
        self.at_ns = OFFSET
        self.readings: list[Reading] = []
        self.room = room
        self.sensors = Sensors([CAMERA, MICROPHONE], self._forward, lambda: self.at_ns)

    def _forward(self, reading: Reading) -> bool:
        if len(self.readings) >= self.room:
            return False
        self.readings.append(reading)
        return True

    @property
    def browser_ms(self) -> float:
        return (self.at_ns - OFFSET) / 1e6

    def browser(self, there_ms: float = 1.0, back_ms: float = 1.0, pings: int = 8) -> Browser:
        browser = Browser(self.sensors)
        for _ in range(pings):
            self.exchange(browser, there_ms, back_ms)
        return browser

    def exchange(self, browser: Browser, there_ms: float = 1.0, back_ms: float = 1.0) -> None:
        number = browser.ping()["number"]
        self.at_ns += round(there_ms * 1e6)
        received_ms = self.browser_ms
        self.at_ns += round(back_ms * 1e6)
        tell(browser, op="pong", number=number, received_ms=received_ms, replied_ms=received_ms)

    def owner(self, stream: str = "vision", tab: str = "a" * 8) -> Browser:
        browser = self.browser()
        assert tell(browser, op="start", stream=stream, tab=tab) == {"op": "started", "stream": stream}
        return browser

    def counts(self, stream: str) -> dict[str, Any]:
        return self.sensors.status()[stream]


def tell(browser: Browser, **message: Any) -> dict[str, Any] | None:
    return browser.receive(json.dumps(message))


def picture(number: int, clock_ms: float, data: bytes = JPEG, stream: int = 0) -> bytes:
    return HEADER.pack(1, stream, 0, number, clock_ms, 0.0) + data


def sound(number: int, clock_ms: float, device_s: float, samples: int = 320) -> bytes:
    return HEADER.pack(1, 1, 0, number, clock_ms, device_s) + bytes(2 * samples)


# ---- bytes


@given(st.binary(max_size=200))
def test_bytes_are_a_sample_or_an_error(data: bytes) -> None:
    try:
        frame = read_frame(data)
    except WireError:
        return
    assert data[0] == 1
    assert frame.data
    assert 0 <= frame.clock_ns < 10**19


@given(
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    st.floats(),
    st.floats(),
    st.binary(min_size=1, max_size=50),
)
def test_a_sample_is_read_as_it_was_written(
    stream: int, number: int, clock_ms: float, device_s: float, data: bytes
) -> None:
    message = HEADER.pack(1, stream, 0, number, clock_ms, device_s) + data
    if 0 <= clock_ms < 1e13 and 0 <= device_s < 1e10:
        frame = read_frame(message)
        assert (frame.stream, frame.number, frame.data) == (stream, number, data)
        assert frame.clock_ns == round(clock_ms * 1e6)
    else:
        with pytest.raises(WireError, match="expected finite ones from 0 on"):
            read_frame(message)


@given(st.text(max_size=300) | st.binary(max_size=100).map(lambda b: b.decode("latin-1")))
def test_texts_are_a_message_or_an_error(text: str) -> None:
    with pytest.raises(WireError):
        read_control(text)


@pytest.mark.parametrize(
    "message",
    [
        {"op": "start", "stream": "vision", "tab": "short"},
        {"op": "start", "stream": "vision", "tab": "a" * 8, "rate_hz": 10},
        {"op": "start", "stream": "vision", "tab": "a" * 8, "more": 1},
        {"op": "start", "stream": "v" * 33, "tab": "a" * 8},
        {"op": "stop", "stream": "vision", "why": "<b>because</b>"},
        {"op": "pong", "number": 1, "received_ms": -1.0, "replied_ms": 2.0},
        {"op": "pong", "number": 1, "received_ms": 1e14, "replied_ms": 1e14},
        {"op": "nothing"},
        {"op": "stop", "stream": "vision", "why": "stopped", "x": "y" * 2000},
    ],
)
def test_wrong_messages_are_counted_and_change_nothing(message: dict[str, Any]) -> None:
    bench = Bench()
    browser = bench.owner()
    assert tell(browser, **message) is None
    assert bench.sensors.garbage == 1
    assert bench.counts("vision")["why"] == ""


MESSAGES = st.one_of(
    st.binary(max_size=80),
    st.text(max_size=80),
    st.builds(
        HEADER.pack, st.just(1), st.integers(0, 3), st.just(0), st.integers(0, 2**32 - 1), st.floats(), st.floats()
    ).flatmap(lambda head: st.sampled_from([b"", b"x", JPEG, bytes(640), bytes(70_000)]).map(lambda d: head + d)),
    st.builds(
        lambda op, stream, tab, why: json.dumps(
            {"op": op, "stream": stream} | ({"tab": tab} if op == "start" else {"why": why})
        ),
        st.sampled_from(["start", "stop"]),
        st.sampled_from(["vision", "audio", "other"]),
        st.sampled_from(["a" * 8, "b" * 8]),
        st.sampled_from(["stopped", "refused", "hidden", "lost"]),
    ),
)


@given(st.lists(st.tuples(st.integers(0, 1), MESSAGES), max_size=40))
def test_whatever_browsers_send_only_an_owners_samples_pass(sent: list[tuple[int, str | bytes]]) -> None:
    bench = Bench(room=3)
    browsers = [bench.browser(pings=1), bench.browser(pings=1)]
    for which, message in sent:
        bench.at_ns += 1_000_000
        owned = {n: bench.sensors.of(n).owner is browsers[which] for n in bench.sensors.names}
        before = len(bench.readings)
        browsers[which].receive(message)
        for reading in bench.readings[before:]:
            assert owned[reading.stream]
            assert reading.sample.event_ns <= bench.at_ns
    for browser in browsers:
        browser.close()
    assert all(bench.sensors.of(n).owner is None for n in bench.sensors.names)
    assert all(about["why"] for about in bench.sensors.status().values())


# ---- owners


def test_one_browser_gives_a_stream_at_a_time() -> None:
    bench = Bench()
    assert bench.counts("vision")["why"].startswith("no browser gives its camera yet")
    first, second = bench.owner(), bench.browser()
    answer = tell(second, op="start", stream="vision", tab="b" * 8)
    assert answer is not None
    assert answer["why"] == "another browser is the camera of this session; stop it there first"
    second.receive(picture(0, bench.browser_ms))
    assert not bench.readings
    # what another browser says of a stream that it does not give, and its end, change nothing
    tell(second, op="stop", stream="vision", why="refused")
    second.close()
    assert bench.counts("vision")["why"] == ""
    # the other stream is free
    assert tell(bench.browser(), op="start", stream="audio", tab="b" * 8) == {"op": "started", "stream": "audio"}
    first.close()
    assert "closed the page or lost its connection" in bench.counts("vision")["why"]
    bench.owner(tab="b" * 8)
    assert bench.counts("vision")["why"] == ""


def test_a_page_that_has_reconnected_takes_its_stream_from_its_dead_connection() -> None:
    bench = Bench()
    old = bench.owner()
    for number in range(3):
        old.receive(picture(number, bench.browser_ms))
    new = bench.owner()
    old.receive(picture(3, bench.browser_ms))
    old.close()
    assert bench.counts("vision")["why"] == ""
    new.receive(picture(8, bench.browser_ms))
    assert len(bench.readings) == 4
    assert bench.counts("vision")["browser_dropped"] == 5  # what it could not send meanwhile


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("refused", "was not allowed to use the microphone"),
        ("none", "has no microphone"),
        ("busy", "another program may use"),
        ("insecure", "set dashboard.cert and dashboard.key"),
        ("ended", "was taken from the browser"),
        ("stopped", "was stopped on the page"),
    ],
)
def test_why_a_browser_cannot_give_a_stream_is_a_sentence(why: str, words: str) -> None:
    bench = Bench()
    tell(bench.browser(), op="stop", stream="audio", why=why)
    assert words in bench.counts("audio")["why"]
    assert "camera" in bench.counts("vision")["why"]


def test_a_page_in_the_background_that_is_then_closed_is_closed() -> None:
    bench = Bench()
    browser = bench.owner()
    tell(browser, op="stop", stream="vision", why="hidden")
    assert "in the background" in bench.counts("vision")["why"]
    bench.browser().close()
    assert "in the background" in bench.counts("vision")["why"]
    browser.close()
    assert "closed the page" in bench.counts("vision")["why"]


def test_a_stream_that_the_session_does_not_take_is_refused() -> None:
    answer = tell(Bench().browser(), op="start", stream="wrist", tab="a" * 8)
    assert answer is not None
    assert "takes no stream 'wrist' from a browser" in answer["why"]


# ---- bounds


def test_what_is_too_fast_too_large_or_no_picture_is_dropped_and_counted() -> None:
    bench = Bench()
    browser = bench.owner()
    for number in range(200):
        browser.receive(picture(number, bench.browser_ms))
    assert len(bench.readings) == 120  # four seconds of pictures at once
    assert bench.counts("vision")["too_fast_dropped"] == 80
    bench.at_ns += 10 * SECOND
    bench.exchange(browser)
    for number, data in enumerate([b"GIF89a", b"x", JPEG + bytes(sensors.MAX_PICTURE_BYTES), JPEG], 200):
        browser.receive(picture(number, bench.browser_ms, data))
    assert bench.counts("vision")["garbage"] == 3
    assert bench.counts("vision")["browser_dropped"] == 0
    assert len(bench.readings) == 121


def test_sound_may_be_no_longer_than_the_time_that_passes() -> None:
    bench = Bench()
    browser = bench.owner("audio")
    for number in range(400):
        browser.receive(sound(number, bench.browser_ms, number * 0.02))
    assert len(bench.readings) == 250  # five seconds that had to wait
    browser.receive(sound(400, bench.browser_ms, 8.0)[:-1])
    browser.receive(sound(401, bench.browser_ms, 8.0, samples=40_000))
    assert bench.counts("audio") | {"too_fast_dropped": 150, "garbage": 2} == bench.counts("audio")


def test_a_full_queue_and_a_gap_are_counted() -> None:
    bench = Bench(room=2)
    browser = bench.owner()
    for number in (5, 6, 9, 10):
        browser.receive(picture(number, bench.browser_ms))
    assert bench.counts("vision") | {"received": 4, "browser_dropped": 2, "queue_dropped": 2} == bench.counts("vision")
    assert bench.sensors.losses() == {"browser_dropped": 2, "too_fast_dropped": 0, "queue_dropped": 2, "garbage": 0}


def test_a_browser_that_answers_no_ping_is_lost() -> None:
    bench = Bench()
    browser = bench.owner()
    bench.at_ns += 4 * SECOND
    assert not browser.lost
    browser.receive(picture(0, bench.browser_ms))  # what was on its way proves nothing
    bench.at_ns += 2 * SECOND
    assert browser.lost
    bench.exchange(browser)
    assert not browser.lost


# ---- time


def test_event_times_are_the_browsers_by_the_local_clock() -> None:
    bench = Bench()
    rng = np.random.default_rng(0)
    browser = bench.owner()
    truth = []
    for number in range(300):
        if number % 7 == 0:
            bench.exchange(browser, 1 + rng.exponential(10), 1 + rng.exponential(10))
        bench.at_ns += 30_000_000
        taken_ns = bench.at_ns - round(rng.uniform(5e6, 25e6))
        truth.append(taken_ns)
        browser.receive(picture(number, (taken_ns - OFFSET) / 1e6))
    off = np.array([reading.sample.event_ns for reading in bench.readings]) - truth
    assert np.abs(off).max() < 10e6  # half the asymmetry of the best exchange of some seconds
    assert np.median(np.abs(off)) < 3e6
    assert bench.readings[0].sample.device_ns == pytest.approx(truth[0] - OFFSET, abs=1000)


def test_sound_has_an_even_pace_however_late_the_browser_read_it() -> None:
    bench = Bench()
    rng = np.random.default_rng(1)
    browser = bench.owner("audio")
    began_ns = bench.at_ns
    for number in range(500):
        bench.at_ns = began_ns + (number + 1) * 20_000_000 + round(rng.exponential(8e6))
        if number % 50 == 0:
            bench.exchange(browser, 0.1, 0.1)
        browser.receive(sound(number, bench.browser_ms, (number + 1) * 0.02))
    events = np.array([reading.sample.event_ns for reading in bench.readings])
    off = events - (began_ns + np.arange(1, 501) * 20_000_000)
    assert np.abs(off[50:]).max() < 3e6
    assert np.abs(np.diff(events)[50:] - 20e6).max() < 2e6


def test_samples_before_the_first_pong_are_not_taken() -> None:
    bench = Bench()
    browser = Browser(bench.sensors)
    tell(browser, op="start", stream="vision", tab="a" * 8)
    browser.receive(picture(0, 1.0))
    assert not bench.readings
    tell(browser, op="pong", number=77, received_ms=1.0, replied_ms=1.0)  # it was never asked
    assert bench.sensors.garbage == 1
    browser.receive(picture(1, 1.0))
    assert not bench.readings


def test_a_browser_whose_clock_makes_no_sense_gives_nothing() -> None:
    bench = Bench()
    browser = bench.owner()
    bench.at_ns += 100 * SECOND
    browser.receive(picture(0, 1.0))
    assert not bench.readings
    assert bench.counts("vision")["garbage"] == 1


# ---- settings


def test_the_page_gives_any_camera_and_microphone_and_waits_longer_for_it() -> None:
    settings = config.parse(
        {
            "sources": {"vision": "page", "audio": "page", "text": "page"},
            "camera": {"width": 320, "jpeg_quality": 80},
            "streams": {"left": {"source": "page", "kind": "vision"}, "notes": {"source": "page"}},
        }
    )
    table = stream_table(settings)
    assert table["notes"].kind == "text"
    assert table["vision"].lateness_ns == table["left"].lateness_ns == 250_000_000
    assert stream_table(config.parse({}))["vision"].lateness_ns == 80_000_000
    specs = {spec.name: spec for spec in sensor_specs(table.values(), settings)}
    assert list(specs) == ["vision", "audio", "left"]
    assert (specs["left"].width, specs["left"].quality, specs["audio"].block_ms) == (320, 0.8, 20.0)


@pytest.mark.parametrize("sources", [{"audio": "page"}, {"text": "page", "vision": "page"}])
def test_a_camera_over_the_network_needs_tls(sources: dict[str, str], tmp_path: Path) -> None:
    page = {"host": "0.0.0.0", "token_file": str(tmp_path / "token")}
    with pytest.raises(ConfigError, match=r"`dashboard.cert` is missing: browsers on other machines give"):
        config.parse({"sources": sources, "dashboard": page})
    with pytest.raises(ConfigError, match="go together"):
        config.parse({"sources": sources, "dashboard": {**page, "cert": "a.pem"}})
    with pytest.raises(ConfigError, match=r"dashboard\.token_file"):
        config.parse({"dashboard": {"host": "0.0.0.0", "cert": "a.pem", "key": "b.pem"}})
    config.parse({"sources": sources, "dashboard": {**page, "cert": "a.pem", "key": "b.pem"}})
    config.parse({"sources": {"text": "page"}, "dashboard": page})


# ---- the way in


@pytest.fixture
def board() -> Iterator[Dashboard]:
    bench = Bench()
    with closing(Dashboard(sensors=Sensors([CAMERA], bench._forward), token="secret")) as made:
        made.start()
        yield made


def connection(board: Dashboard, **more: Any) -> Any:
    from websockets.sync.client import connect

    return connect(board.address.replace("http", "ws") + "sensors", **more)


LOGIN = {"Authorization": "Bearer secret"}


@pytest.mark.parametrize(
    ("headers", "origin", "code"),
    [
        ({}, None, 401),
        ({"Authorization": "Bearer wrong"}, None, 401),
        (LOGIN, "http://evil.example", 403),
        (LOGIN, "null", 403),
    ],
)
def test_a_foreign_page_or_one_without_the_token_gives_nothing(
    board: Dashboard, headers: dict[str, str], origin: Any, code: int
) -> None:
    from websockets.exceptions import InvalidStatus

    with pytest.raises(InvalidStatus) as refused, connection(board, additional_headers=headers, origin=origin):
        pass
    assert refused.value.response.status_code == code


def answered(client: Any, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Answer pings until a message comes that is wanted."""
    while not wanted(message := json.loads(client.recv(timeout=20))):
        if message["op"] == "ping":
            client.send(json.dumps({"op": "pong", "number": message["number"], "received_ms": 5.0, "replied_ms": 5.0}))
    return message


def test_the_pages_own_browser_is_measured_welcomed_and_may_send_no_more_than_a_megabyte(board: Dashboard) -> None:
    from websockets.exceptions import ConnectionClosed

    own = board.address.rstrip("/")
    with connection(board, additional_headers=LOGIN, origin=own) as client:
        welcome = answered(client, lambda m: m["op"] == "welcome")
        assert [spec["name"] for spec in welcome["streams"]] == ["vision"]
        client.send(json.dumps({"op": "start", "stream": "vision", "tab": "a" * 8}))
        assert answered(client, lambda m: m["op"] == "started")["stream"] == "vision"
        with connection(board, additional_headers=LOGIN, origin=own) as other:
            other.send(json.dumps({"op": "start", "stream": "vision", "tab": "b" * 8}))
            assert "another browser is the camera" in answered(other, lambda m: m["op"] == "refused")["why"]
        client.send("no message")
        client.send(json.dumps({"op": "start", "stream": "vision", "tab": "a" * 8}))
        assert answered(client, lambda m: m["op"] == "started")  # a wrong message costs nothing else
        client.send(bytes(2 * 1024 * 1024))
        with pytest.raises(ConnectionClosed) as closed:
            answered(client, lambda m: False)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


def test_there_is_no_way_in_where_no_stream_is_a_browsers() -> None:
    from websockets.exceptions import InvalidStatus

    with closing(Dashboard()) as board:
        board.start()
        with pytest.raises(InvalidStatus), connection(board):
            pass


# ---- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return certificates.made(tmp_path_factory.mktemp("tls"))


@pytest.mark.process
@pytest.mark.slow
def test_the_page_over_tls(certificate: tuple[str, str]) -> None:
    from websockets.sync.client import connect

    cert, key = certificate
    bench = Bench()
    seen = Sensors([CAMERA], bench._forward)
    with closing(Dashboard(token="secret", cert=cert, key=key, sensors=seen, idle_timeout_s=1.0)) as board:
        board.start()
        assert board.address.startswith("https://127.0.0.1:")
        port = int(board.address.rstrip("/").rpartition(":")[2])
        trusted = ssl.create_default_context(cafile=cert)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
            # who begins no handshake is disconnected
            plain.settimeout(30)
            reached = socket.create_connection(("127.0.0.1", port), timeout=10)
            with trusted.wrap_socket(reached, server_hostname="localhost") as client:
                client.sendall(b"GET /?token=secret HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                answer = b""
                while data := client.recv(4096):
                    answer += data
            assert b"303" in answer
            assert b"HttpOnly; SameSite=Lax; Path=/; Secure" in answer
            assert plain.recv(1) == b""
        address = board.address.replace("https", "wss") + "sensors"
        with connect(address, ssl=trusted, additional_headers=LOGIN, origin=board.address.rstrip("/")) as websocket:
            assert answered(websocket, lambda m: m["op"] == "welcome")["streams"]


@pytest.mark.process
def test_files_that_are_no_certificate_are_refused(certificate: tuple[str, str], tmp_path: Path) -> None:
    cert, key = certificate
    other = tmp_path / "other.pem"
    other.write_text("no key")
    for wrong in ((cert, str(other)), (cert, cert), (str(tmp_path / "none.pem"), key)):
        with pytest.raises(ConfigError, match="name a certificate and its key, as PEM files without a password"):
            Dashboard(cert=wrong[0], key=wrong[1])
