"""All targets by name: each takes a case made from a seed and raises StreamError if it refuses it.

Any other exception is a defect. A target also checks that valid input still comes through, and counts what it could
not account for. Processes and timeouts are in `watch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tools.hostile.doors import Bus, Pipe, Requests, Tcp, Zmq
from tools.hostile.files import Contracts, Models, Recordings, Snapshots, Toml
from tools.hostile.messages import Json, Wire
from tools.hostile.readers import Names, Page, Readers
from tools.hostile.target import Target

TARGETS: dict[str, Callable[[Path], Target]] = {
    "wire": Wire,
    "json": Json,
    "bus": Bus,
    "journal": Requests,
    "tcp": Tcp,
    "pipe": Pipe,
    "zmq": Zmq,
    "recordings": Recordings,
    "models": Models,
    "contracts": Contracts,
    "snapshots": Snapshots,
    "settings": Toml,
    "readers": Readers,
    "page": Page,
    "names": Names,
}


def numbered(target: str, folder: Path, first: int, count: int) -> Iterator[tuple[int, BaseException | None]]:
    """Feed a target here, in this process: what each case raised."""
    fed = TARGETS[target](folder)
    try:
        for number in range(first, count):
            try:
                fed.case(Random(f"{target}{number}"), number)
                yield number, None
            except Exception as e:
                yield number, e
    finally:
        fed.close()
