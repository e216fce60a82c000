"""TickColumns: successive ticks of one session as columns. Knows nothing about engines, and not how ticks are made."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from stream_mmrnn.core.block import Flags, Integers
from stream_mmrnn.core.types import FloatArray, ModalitySpec, Tick


class TickColumns(msgspec.Struct, frozen=True, gc=False, eq=False):
    """N successive ticks of a session; M modalities in the order of the model."""

    session: str
    fresh: bool
    """Whether the session was opened, or opened again, before the first of these ticks."""
    indices: Integers
    """[N]"""
    event_ns: Integers
    """[N] the ends of the ticks."""
    present: Flags
    """[N, M]"""
    age_ns: Integers
    """[N, M] the tick's end minus the time of the newest sample; -1 where there is none yet."""
    features: tuple[FloatArray, ...]
    """By modality [P, size]: the vectors of the P ticks that have it, in the order of the ticks."""

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def of(cls, ticks: Sequence[Tick], fresh: bool, specs: Sequence[ModalitySpec]) -> TickColumns:
        """Ticks of one session, at least one, for a model with these modalities."""
        features = tuple(
            np.array([t.features[m.name] for t in ticks if t.present[m.name]], np.float32).reshape(-1, m.size)
            for m in specs
        )
        return cls(
            ticks[0].session,
            fresh,
            np.array([t.index for t in ticks], np.int64),
            np.array([t.event_ns for t in ticks], np.int64),
            np.array([[t.present[m.name] for m in specs] for t in ticks], np.bool_),
            np.array([[t.age_ns[m.name] for m in specs] for t in ticks], np.int64),
            features,
        )

    def split(self, count: int) -> tuple[TickColumns, TickColumns]:
        """The first `count` ticks, and the rest."""
        at = [int(n) for n in self.present[:count].sum(axis=0)]
        head = TickColumns(
            self.session,
            self.fresh,
            self.indices[:count],
            self.event_ns[:count],
            self.present[:count],
            self.age_ns[:count],
            tuple(v[:n] for v, n in zip(self.features, at, strict=True)),
        )
        rest = TickColumns(
            self.session,
            False,
            self.indices[count:],
            self.event_ns[count:],
            self.present[count:],
            self.age_ns[count:],
            tuple(v[n:] for v, n in zip(self.features, at, strict=True)),
        )
        return head, rest


def joined(parts: Sequence[TickColumns]) -> TickColumns:
    """Successive parts of one session, at least one, none but the first of them fresh."""
    if len(parts) == 1:
        return parts[0]
    return TickColumns(
        parts[0].session,
        parts[0].fresh,
        np.concatenate([p.indices for p in parts]),
        np.concatenate([p.event_ns for p in parts]),
        np.concatenate([p.present for p in parts]),
        np.concatenate([p.age_ns for p in parts]),
        tuple(np.concatenate(vectors) for vectors in zip(*(p.features for p in parts), strict=True)),
    )
