"""Who is alive, and what each does about it: pure, for all who decide by the same table come to rest together.

Times are seconds of whatever clock the caller has. Knows nothing about NATS, or what a partition holds.
"""

from __future__ import annotations

from typing import NamedTuple

from stream_mmrnn.serve.cluster.subjects import PARTITIONS, Beat, Lease, Table

DEAD_AFTER_S = 0.45
"""An engine that has not been heard for so long is taken for dead. Where it was not, what it writes is refused."""
_FORGOTTEN_S = 60.0


class Members:
    """Engines as one of them hears them."""

    def __init__(self, me: str) -> None:
        self._me = me
        self._heard: dict[str, tuple[float, Beat]] = {}
        self._judges_from_s = float("inf")

    def begin(self, at_s: float) -> None:
        """We have just come, or come back, or stood still: whoever is alive is to be heard again first."""
        self._heard.clear()
        self._judges_from_s = at_s + DEAD_AFTER_S

    def observe(self, beat: Beat, at_s: float) -> None:
        if beat.gone:
            self._heard.pop(beat.engine, None)
        else:
            self._heard[beat.engine] = at_s, beat

    def alive(self, at_s: float) -> dict[str, Beat]:
        """Engines that are heard, in the same order for everybody; none where nobody can be judged: we have not
        listened for long enough, or do not hear even ourselves.
        """
        self._heard = {name: of for name, of in self._heard.items() if at_s - of[0] < _FORGOTTEN_S}
        heard = {name: of[1] for name, of in sorted(self._heard.items()) if at_s - of[0] < DEAD_AFTER_S}
        return heard if self._me in heard and at_s > self._judges_from_s else {}


class Plan(NamedTuple):
    """What one engine does next."""

    take: dict[int, Lease]
    """Leases to be put into the table."""
    give: list[int]
    """Partitions to be given back."""


def is_lost(table: Table, number: int, me: str, epoch: int) -> bool:
    """Whether a lease that we had is another one's, or another one of ours."""
    return table.leases.get(number) != Lease(me, epoch)


def plan(table: Table, me: str, alive: dict[str, Beat], parts: set[int], taking: set[int], giving: set[int]) -> Plan:
    """`parts` are ours and served, `taking` on their way to that, `giving` (of `parts`) on their way back."""
    nothing = Plan({}, [])
    if me not in alive:
        return nothing
    if alive[me].leaving:
        return Plan({}, sorted(parts - giving))
    takers = [name for name, beat in alive.items() if not beat.leaving]
    fair = -(-PARTITIONS // len(takers))
    # a lease of ours that we know nothing of is of a start that failed
    mine = {n for n, lease in table.leases.items() if lease.engine == me and (n in parts or n in taking)}
    free = {n for n in range(PARTITIONS) if n not in mine and not _is_held(table, n, me, alive)}
    kept = mine - giving
    if len(kept) > fair:
        return Plan({}, sorted(kept & parts)[fair - len(kept) :])
    # everybody begins elsewhere: fewer want the same
    first = takers.index(me) * PARTITIONS // len(takers)
    chosen = sorted(free, key=lambda n: (n - first) % PARTITIONS)[: fair - len(kept)]
    return Plan({n: Lease(me, table.leases[n].epoch + 1 if n in table.leases else 1) for n in chosen}, [])


def _is_held(table: Table, number: int, me: str, alive: dict[str, Beat]) -> bool:
    """Whether somebody else has it who is alive."""
    lease = table.leases.get(number)
    return lease is not None and lease.engine in alive and lease.engine != me
