"""Membership: which engines are alive by their heartbeats, and which leases an engine takes or gives back.

Pure: all engines decide by the same table, so that their decisions converge. Times are seconds of the caller's clock.
"""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from stream_mmrnn.serve.cluster.subjects import Beat, Lease, Table

DEAD_AFTER_S = 0.45
"""Without a heartbeat for so long an engine counts as dead. If it is not, its writes are refused."""
_FORGOTTEN_S = 60.0


class Members:
    """The other engines, as one engine sees them."""

    def __init__(self, me: str) -> None:
        self._me = me
        self._beats: dict[str, tuple[float, Beat]] = {}
        self._ready_at_s = float("inf")

    def begin(self, at_s: float) -> None:
        """We have just started, reconnected or been suspended: collect heartbeats anew before judging others."""
        self._beats.clear()
        self._ready_at_s = at_s + DEAD_AFTER_S

    def observe(self, beat: Beat, at_s: float) -> None:
        if beat.gone:
            self._beats.pop(beat.engine, None)
        else:
            self._beats[beat.engine] = at_s, beat

    def alive(self, at_s: float) -> dict[str, Beat]:
        """Live engines, in the same order on every engine. None while we cannot tell: we have not received heartbeats
        for long enough, or do not receive our own.
        """
        self._beats = {name: of for name, of in self._beats.items() if at_s - of[0] < _FORGOTTEN_S}
        alive = {name: of[1] for name, of in sorted(self._beats.items()) if at_s - of[0] < DEAD_AFTER_S}
        return alive if self._me in alive and at_s > self._ready_at_s else {}


class Plan(NamedTuple):
    """The next steps of one engine."""

    take: dict[int, Lease]
    """Leases to write into the table."""
    give: list[int]
    """Partitions to give back."""
    release: list[int]
    """Leases of ours to clear in the table: of partitions that we do not serve, and have no room for."""


def is_lost(table: Table, number: int, me: str, epoch: int) -> bool:
    """Whether a lease that we had is no longer in the table."""
    lease = table.leases.get(number)
    return lease is None or (lease.engine, lease.epoch) != (me, epoch)


def plan(
    table: Table, me: str, alive: dict[str, Beat], parts: set[int], taking: set[int], giving: set[int], partitions: int
) -> Plan:
    """`parts`: partitions that we serve; `taking`: being acquired; `giving`, a part of `parts`: being given back."""
    nothing = Plan({}, [], [])
    if me not in alive:
        return nothing
    if alive[me].leaving:
        return Plan({}, sorted(parts - giving), [])
    takers = [name for name, beat in alive.items() if not beat.leaving]
    fair = -(-partitions // len(takers))
    # a lease of ours without a partition is left from an attempt that failed
    mine = {n for n, lease in table.leases.items() if lease.engine == me and (n in parts or n in taking)}
    free = {n for n in range(partitions) if n not in mine and not _is_held(table, n, me, alive)}
    staying = mine - giving
    if len(staying) > fair:
        return Plan({}, sorted(staying & parts)[fair - len(staying) :], [])
    # each engine starts at another partition, to avoid conflicts
    first = takers.index(me) * partitions // len(takers)
    chosen = sorted(free, key=lambda n: (n - first) % partitions)[: fair - len(staying)]
    take = {n: _taken(table.leases.get(n), me) for n in chosen}
    left = [n for n in sorted(free - take.keys()) if n in table.leases and table.leases[n].engine == me]
    return Plan(take, [], left)


def _taken(lease: Lease | None, me: str) -> Lease:
    return Lease(me, 1) if lease is None else replace(lease, engine=me, epoch=lease.epoch + 1)


def _is_held(table: Table, number: int, me: str, alive: dict[str, Beat]) -> bool:
    """Whether another live engine has the lease."""
    lease = table.leases.get(number)
    return lease is not None and lease.engine in alive and lease.engine != me
