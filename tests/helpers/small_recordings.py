"""Small recordings for the tests of their readers, and what is in a recording."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.message_counts import MessageCounts
from stream_mmrnn.recording.pieces import Chunk, pieces
from stream_mmrnn.recording.recorder import Recorder

BEGIN = 5_000_000_000_123_456


def envelopes(first: int, count: int) -> list[Envelope]:
    """Four streams at 20 Hz; small, so that a test can damage every byte of the recording."""
    out = []
    for i in range(first, first + count):
        at = BEGIN + i * 50_000_000
        rng = np.random.default_rng(i)
        out.append(Envelope(topics.CLOCK, topics.EVERYONE, i, at, at, at, b""))
        if i == first == 0:
            opened = wire.pack(wire.SessionMessage("open", at, ("audio",)))
            out.append(Envelope(topics.SESSION, "live", 0, at, at, at, opened))
        out.append(Envelope("raw/audio", "live", i, at, at, at, rng.integers(-99, 99, 16).astype("<i2"), "microphone"))
        out.append(Envelope("feature/audio", "live", i, at, at, at, rng.standard_normal(4).astype("<f4"), "mel@2"))
    return out


def write(path: Path, messages: list[Envelope], close: bool = True, number: int = 1, offset_ns: int = 7) -> Path:
    """Write a recording as the recorder's process does, with the messages' times as the clock."""
    recorder = Recorder(path, "live", {"config": "{}", "raw": "true", "part": str(number)}, wall_offset_ns=offset_ns)

    def so_far() -> dict[str, str]:
        return MessageCounts(recorder.counts, recorder.counts, {}, {}).as_metadata()

    for e in messages:
        recorder.write(e)
        if recorder.flush_due(e.publish_ns):
            recorder.note(so_far(), e.publish_ns)
    if close:
        recorder.close({"ended": "clean", **so_far()})
    else:
        recorder.sync()
        recorder._disk.close()
    return path


Key = tuple[str, int, str]


def keys(path: Path) -> list[Key]:
    """The identity and content of a message."""

    def digest(e: Envelope) -> str:
        data = e.payload if isinstance(e.payload, bytes) else e.payload.tobytes()
        return hashlib.sha256(data).hexdigest()

    return [(e.topic, e.seq, digest(e)) for e in Recording(path).envelopes()]


def extents(path: Path) -> list[tuple[int, int, list[Key]]]:
    """Begin and end of each chunk, and the keys of its messages."""
    found, all_keys = list(pieces(path)), keys(path)
    out, taken = [], 0
    for piece in found:
        if isinstance(piece, Chunk):
            at = piece.at
            length = 9 + int.from_bytes(path.read_bytes()[at + 1 : at + 9], "little")
            count = len(piece.messages)
            out.append((at, at + length, all_keys[taken : taken + count]))
            taken += count
    assert taken == len(all_keys)
    return out
