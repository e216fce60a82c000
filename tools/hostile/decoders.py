"""The pure decoders as hypothesis properties: whatever the bytes, they decode or raise an error of ours.

The tests run them with hypothesis; `python -m tools.fuzz` runs the same properties under atheris, guided by coverage.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream_mmrnn.core import config, wire
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.graph import model_file
from stream_mmrnn.predict.snapshots import from_bytes
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.serve import protocol, state_rows
from stream_mmrnn.serve.block_codec import StepsReader
from tools.hostile.target import Target
from tools.hostile.targets import TARGETS

MUTATED = ("wire", "json", "recordings", "contracts", "settings", "snapshots", "names")
"""Targets without a process: their cases are valid inputs with mutations."""


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="stream-mmrnn-fuzz-"))


@cache
def _target(name: str) -> Target:
    folder = _folder() / name
    folder.mkdir()
    return TARGETS[name](folder)


def mutated(name: str) -> Callable[[], None]:
    """The property of a target: a case made from drawn random numbers."""

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rng=st.randoms(use_true_random=False), number=st.integers(10_000, 2**31))
    def refuses_by_errors_of_ours(rng: Random, number: int) -> None:
        with contextlib.suppress(StreamError):
            _target(name).case(rng, number)

    return refuses_by_errors_of_ours


def _recording(data: bytes) -> None:
    path = _folder() / "bytes.mcap"
    path.write_bytes(b"\x89MCAP0\r\n" + data)
    list(Recording(path).envelopes())


def _settings(data: bytes) -> None:
    path = _folder() / "bytes.toml"
    path.write_bytes(data)
    config.load(path)


def _steps(data: bytes) -> None:
    """The columns of a block, cut by the first bytes."""
    cuts, rest = data[:6].ljust(6, b"\0"), data[6:]
    columns = []
    for cut in cuts:
        columns.append(rest[: cut % 33])
        rest = rest[cut % 33 :]
    ticks, rows, event_ns, age_ns, present, vectors = columns
    request = protocol.Steps(
        group=0, block=0, ticks=ticks, rows=rows, event_ns=event_ns, age_ns=age_ns,
        features=(vectors, rest or None), present=(present or None, None) if cuts[0] % 2 else (), half=cuts[1] % 2 > 0,
    )  # fmt: skip
    block = StepsReader(("a", "b"), (2, 3)).read(request, 4)
    if why := block.fits((2, 3)):
        raise AssertionError(why)


def _request(data: bytes) -> None:
    protocol.read_request(data)
    protocol.read_reply(data)


READERS: dict[str, Callable[[bytes], object]] = {
    "bytes-recording": _recording,
    "bytes-snapshot": from_bytes,
    "bytes-states": state_rows.from_bytes,
    "bytes-steps": _steps,
    "bytes-request": _request,
    "bytes-onnx": model_file.check,
    "bytes-settings": _settings,
    "bytes-push": wire.read_push,
    "bytes-prediction": lambda data: wire.unpack(data, wire.PredictionMessage),
}


def raw(name: str) -> Callable[[], None]:
    """The property of a reader: any bytes."""
    read = READERS[name]

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.binary(max_size=400))
    def refuses_by_errors_of_ours(data: bytes) -> None:
        with contextlib.suppress(StreamError):
            read(data)

    return refuses_by_errors_of_ours


PROPERTIES: dict[str, Callable[[], None]] = {
    **{name: mutated(name) for name in MUTATED},
    **{name: raw(name) for name in READERS},
}
