"""Coverage-guided fuzzing of what reads bytes, where atheris is installed: more than a seed finds.

    python -m tools.fuzz wire -max_total_time=60 [other options of libFuzzer]

An input that raises anything but an error of ours stops the run and is kept as `crash-...`. The test suite does not
need it: `python -m tools.faults --only hostile` feeds generated messages without it.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from stream_mmrnn.core import config, wire
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.graph import model_file as onnx_bytes
from stream_mmrnn.predict.snapshots import from_bytes
from stream_mmrnn.recording.mcap_file import Recording


def _wire(data: bytes) -> None:
    """Three frames, cut where the first two bytes say."""
    if len(data) > 2:
        head, body = data[0], data[1]
        rest = data[2:]
        wire.decode([rest[:head], rest[head : head + body], rest[head + body :]])


def _json(data: bytes) -> None:
    for kind in (wire.SessionMessage, wire.TickMessage, wire.PredictionMessage, wire.StatusMessage):
        try:
            wire.unpack(data, kind)
        except StreamError:
            continue


def _file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    path = Path(tempfile.mkdtemp(prefix="fuzz-")) / name

    def feed(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return feed


TARGETS: dict[str, Callable[[], Callable[[bytes], object]]] = {
    "wire": lambda: _wire,
    "json": lambda: _json,
    "snapshot": lambda: from_bytes,
    "onnx": lambda: onnx_bytes.check,
    "recording": lambda: _file("x.mcap", lambda path: list(Recording(path).envelopes())),
    "settings": lambda: _file("x.toml", config.load),
}


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[1] not in TARGETS:
        print(f"which of {', '.join(TARGETS)}?", file=sys.stderr)
        return 2
    if find_spec("atheris") is None:
        print("atheris is not installed; `pip install atheris` where its wheels are", file=sys.stderr)
        return 2
    import atheris

    feed = TARGETS[arguments[1]]()

    def one(data: bytes) -> None:
        with contextlib.suppress(StreamError):
            feed(data)

    atheris.instrument_all()
    atheris.Setup([arguments[0], *arguments[2:]], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
