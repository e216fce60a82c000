"""StepReader: `step` messages checked against the model, and many of them as one block.

Knows nothing about sessions or peers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stream_mmrnn.core.block import LARGEST, Block, Features, Integers
from stream_mmrnn.core.errors import BadTick
from stream_mmrnn.core.types import FEATURE_BOUND, MAX_TICK, ModelSpec, Stamps, Tick
from stream_mmrnn.serve import protocol

_F4 = np.dtype("<f4")


class StepReader:
    def __init__(self, spec: ModelSpec) -> None:
        self.names = [m.name for m in spec.modalities]
        """In the order of the messages."""
        self.sizes = [m.size for m in spec.modalities]
        self._bytes = [4 * size for size in self.sizes]
        self._width = len(self.sizes)
        self._zeros = [np.zeros(size, np.float32) for size in self.sizes]
        self._nothing = [np.zeros((0, size), np.float32) for size in self.sizes]

    def check(self, request: protocol.Step) -> None:
        """Raises BadTick where a tick does not fit the model. Whether its numbers are finite is seen in its block."""
        expected, features = self._width, request.features
        if len(features) != expected or len(request.age_ns) not in (0, expected):
            raise BadTick(
                f"tick {request.tick} of session {request.session!r}: expected {expected} vectors and as many ages or "
                f"none, got {len(features)} and {len(request.age_ns)}"
            )
        for content, size in zip(features, self._bytes, strict=True):
            if content is not None and len(content) != size:
                name = self.names[[c is content for c in features].index(True)]
                raise BadTick(
                    f"tick {request.tick} of session {request.session!r}: expected {size // 4} float32 ({size} bytes) "
                    f"as {name}, got {len(content)} bytes"
                )

    def block(self, steps: Sequence[protocol.Step], handles: Integers) -> Block:
        """Messages that were checked, each of another session, as a block."""
        count, width = len(steps), self._width
        present = np.zeros((count, width), np.bool_)
        features: list[Features] = []
        for i, column in enumerate(zip(*[s.features for s in steps], strict=True)):
            contents = [content for content in column if content is not None]
            some = len(contents)
            if not some:
                features.append(self._nothing[i])
                continue
            present[:, i] = True if some == count else [content is not None for content in column]
            raw = contents[0] if some == 1 else b"".join(contents)
            features.append(np.frombuffer(raw, _F4).reshape(some, self.sizes[i]))
        ages = [s.age_ns for s in steps]
        if all(ages):
            age_ns = np.array(ages, np.int64)
        else:
            age_ns = present.astype(np.int64) - 1
            if any(ages):
                for row, of in enumerate(ages):
                    if of:
                        age_ns[row] = of
        return Block(
            handles,
            np.array([s.tick for s in steps], np.int64),
            np.array([s.event_ns for s in steps], np.int64),
            present,
            age_ns,
            tuple(features),
        )

    def tick(self, step: protocol.Step, received_ns: int) -> Tick | None:
        """A message that was checked, as a tick; None where it is not finite."""
        features, present, age_ns = {}, {}, {}
        ages = step.age_ns
        for i, (name, content) in enumerate(zip(self.names, step.features, strict=True)):
            if content is None:
                features[name], present[name] = self._zeros[i], False
                age_ns[name] = ages[i] if ages else -1
                continue
            vector = np.frombuffer(content, _F4)
            if not float(np.absolute(vector).max()) < LARGEST:
                return None
            features[name], present[name] = vector, True
            age_ns[name] = ages[i] if ages else 0
        closed = Stamps(step.event_ns, step.event_ns, step.event_ns, received_ns, "serve")
        return Tick(step.session, step.tick, step.event_ns, features, present, age_ns, closed)

    def to_step(self, tick: Tick) -> protocol.Step:
        """A tick that was made here, as a message."""
        return protocol.Step(
            session=tick.session,
            tick=tick.index,
            event_ns=tick.event_ns,
            features=tuple(tick.features[name].tobytes() if tick.present[name] else None for name in self.names),
            age_ns=tuple(tick.age_ns[name] for name in self.names),
        )

    def why(self, block: Block, row: int) -> str:
        """What is wrong with a tick that was not stepped."""
        if not 0 <= block.indices[row] <= MAX_TICK:
            return "expected an index from 0 to 2^53 - 1; number the session's ticks from 0"
        one = np.zeros(len(block), np.bool_)
        one[row] = True
        for name, vectors in zip(self.names, block.take(one).features, strict=True):
            if not (np.absolute(vectors.astype(np.float32)) < FEATURE_BOUND).all():
                return (
                    f"{name} holds a number that is not finite or not below {FEATURE_BOUND:g}; send it without this "
                    f"value, or without {name}"
                )
        return "it was not stepped"
