"""What `bench` can compare with when it runs from a checkout: contenders that other packages and programs provide.

The benchmarks here take a `Peers` and run without it; `python -m tools.bench` passes one in. Knows nothing about which
contenders there are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from stream_mmrnn.bench.report import Ratio
    from stream_mmrnn.bench.step import Bench
    from stream_mmrnn.core.latency import Histogram


class StepPeer(Protocol):
    """A contender in another process."""

    def sample(self, calls: int) -> list[int]:
        """Make so many calls; the nanoseconds of each."""

    def close(self) -> None: ...


class StepPeers(Protocol):
    """Contenders of `bench step`."""

    def missing(self, *packages: str) -> str:
        """Why peers that need these packages cannot run, or an empty string."""

    def start(self, *arguments: str) -> StepPeer: ...

    def measure_more(self, bench: Bench) -> None:
        """Comparisons that only peers have, after all others."""


class Servers(Protocol):
    """Model servers of others, for `bench sessions`: rows and ratios of one model."""

    def __call__(
        self,
        path: Path,
        *,
        duration_s: float,
        seed: int,
        say: Callable[[str], None],
        alive: Callable[[], bool],
    ) -> tuple[list[dict[str, Any]], dict[str, Ratio]]: ...


BareHop: TypeAlias = "Callable[[int, float, int], tuple[Histogram, str]]"
"""(message size in bytes, rate in Hz, number of messages) -> latencies over a proxy without our code, or why none."""


class Peers(NamedTuple):
    step: StepPeers
    servers: Servers
    bare_hop: BareHop
