from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stream_mmrnn.core import wire
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import Envelope, Stamps

stamps = st.integers(-(2**63), 2**63 - 1)
arrays = st.sampled_from(["<f4", "<i2", "|u1"]).flatmap(
    lambda d: hnp.arrays(np.dtype(d), hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5))
)
envelopes = st.builds(
    Envelope,
    topic=st.sampled_from(["clock", "feature/audio", "raw/vision"]),
    session=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    seq=st.integers(0, 2**32 - 1),
    event_ns=stamps,
    capture_ns=stamps,
    publish_ns=stamps,
    payload=st.binary(max_size=64) | arrays,
    origin=st.text(max_size=32),
    device_ns=st.just(0) | stamps,
)


@given(envelopes)
def test_round_trip(envelope: Envelope) -> None:
    frames = [bytes(f) for f in wire.encode(envelope)]
    back = wire.decode(frames)
    for field in ("topic", "session", "seq", "event_ns", "capture_ns", "publish_ns", "origin", "device_ns"):
        assert getattr(back, field) == getattr(envelope, field)
    if isinstance(envelope.payload, bytes):
        assert back.payload == envelope.payload
    else:
        assert back.payload.dtype == envelope.payload.dtype
        assert back.payload.shape == envelope.payload.shape
        assert back.payload.tobytes() == envelope.payload.tobytes()


@given(st.lists(st.binary(max_size=80), max_size=5))
def test_garbage_raises_only_wire_errors(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        wire.decode(frames)


@pytest.mark.slow
@given(envelopes, st.data())
def test_a_changed_message_is_read_or_refused(envelope: Envelope, data: st.DataObject) -> None:
    frames = [bytearray(f) for f in wire.encode(envelope)]
    which = data.draw(st.integers(0, 2))
    if frames[which]:
        frames[which][data.draw(st.integers(0, len(frames[which]) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        frames[which] += b"x"
    with contextlib.suppress(WireError):
        wire.decode([bytes(f) for f in frames])


def read(decode: Callable[..., Envelope], frames: list[bytes]) -> tuple[object, ...] | str:
    """What it makes of them, as something that compares."""
    try:
        e = decode(*frames)
    except WireError as error:
        return str(error)
    payload = e.payload if isinstance(e.payload, bytes) else (e.payload.tobytes(), e.payload.dtype, e.payload.shape)
    return (e.topic, e.session, e.seq, e.event_ns, e.capture_ns, e.publish_ns, e.origin, payload, e.device_ns)


@pytest.mark.slow
@given(st.lists(envelopes, max_size=4), envelopes, st.data())
def test_a_message_of_a_known_stream_is_read_as_one_of_an_unknown_stream(
    before: list[Envelope], envelope: Envelope, data: st.DataObject
) -> None:
    """However the same frames were changed, what was read before them makes no difference."""
    frames = [bytearray(f) for f in wire.encode(envelope)]
    for _ in range(data.draw(st.integers(0, 3))):
        frame = frames[data.draw(st.integers(0, 2))]
        if frame:
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    changed = [bytes(f) for f in frames]
    for e in (*before, envelope):
        wire.decode([bytes(f) for f in wire.encode(e)])
    known = read(lambda *f: wire.decode(f), changed)
    assert known == read(lambda *f: wire.decode_any(*f, 0), changed)


def test_the_cache_of_streams_is_bounded() -> None:
    for i in range(3000):
        wire.decode([bytes(f) for f in wire.encode(Envelope("clock", f"s{i}", 0, 0, 0, 0, b"", f"o{i}"))])
    assert max(len(wire.known_read), len(wire.known_written)) <= wire.MAX_KNOWN


def header(**change: object) -> bytes:
    fields = {
        "version": wire.VERSION, "session": "a", "seq": 0, "event_ns": 0, "capture_ns": 0, "publish_ns": 0,
        "origin": "", "dtype": "<f4", "shape": (2,),
    }  # fmt: skip
    return msgspec.msgpack.encode(list({**fields, **change}.values()))


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([b"clock", header(), b"1234567"], "does not fit 7 bytes"),
        ([b"clock", header(version=9), bytes(8)], "wire version 9"),
        ([b"clock", header(dtype="<c8"), bytes(16)], "payload type '<c8'"),
        ([b"clock", header(dtype="|O"), bytes(16)], "payload type '|O'"),
        ([b"clock", header(session="../etc"), bytes(8)], "header is not valid"),
        ([b"clock", header(shape=(2**30, 2**30)), b""], "header is not valid"),
        ([b"clock", header(seq=-1), bytes(8)], "header is not valid"),
        ([b"status/" + b"c" * 65, header(), bytes(8)], "at most 64 bytes"),
        ([b"\xff", header(), bytes(8)], "header is not valid"),
        ([b"clock", header(), bytes(wire.MAX_PAYLOAD_BYTES + 1)], "at most"),
        ([b"clock", header()], "3 frames"),
        ([b"feature/no name", header(), bytes(8)], "'feature/no name' is no known topic"),
    ],
)
def test_errors_name_the_fault(frames: list[bytes], words: str) -> None:
    with pytest.raises(WireError, match=words.replace("|", r"\|")):
        wire.decode(frames)


def test_an_object_array_cannot_be_sent() -> None:
    with pytest.raises(WireError, match="cannot be sent"):
        wire.encode(Envelope("clock", "a", 0, 0, 0, 0, np.array([object()])))


@given(st.lists(st.floats(width=32), max_size=8))
def test_predictions_survive_json_bit_for_bit(values: list[float]) -> None:
    message = wire.PredictionMessage(
        3, 4, {"h": np.array(values, np.float32).tolist()}, {"audio": True}, {"audio": -1},
        Stamps(1, 2, 3, 4, "clock"), 5, 6, "sha",
    )  # fmt: skip
    back = wire.unpack(wire.pack(message), wire.PredictionMessage)
    expected = [v if np.isfinite(v) else None for v in message.heads["h"]]
    assert back.heads["h"] == expected
    assert [np.float32(v) for v in back.heads["h"] if v is not None] == [v for v in values if np.isfinite(v)]


@given(st.binary(max_size=60))
def test_payloads_that_are_no_json_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.unpack(data, wire.StatusMessage)


def test_the_devices_stamp_travels_and_a_message_without_one_is_read() -> None:
    """The header has grown by one number: a release that knows nothing of it sends none and reads past it."""
    stamped = Envelope("raw/audio", "a", 1, 2, 3, 4, b"x", "o", 0, -(2**63))
    topic, head, body = wire.encode(stamped)
    assert wire.decode([topic, head, body]) == stamped
    fields = msgspec.msgpack.decode(head)
    assert len(fields) == 10
    first = wire.decode([topic, msgspec.msgpack.encode(fields[:9]), body])
    assert first == msgspec.structs.replace(stamped, device_ns=0)
    assert wire.decode([topic, msgspec.msgpack.encode([*fields, "later"]), body]) == stamped
