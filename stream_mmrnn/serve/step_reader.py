"""StepReader: the tick of a `step` message, checked against the model. Knows nothing about sessions or peers."""

from __future__ import annotations

import numpy as np

from stream_mmrnn.core.errors import BadTick
from stream_mmrnn.core.types import FEATURE_BOUND, FloatArray, ModelSpec, Stamps, Tick
from stream_mmrnn.serve import protocol


class StepReader:
    def __init__(self, spec: ModelSpec) -> None:
        self.names = [m.name for m in spec.modalities]
        """In the order of the messages."""
        self._sizes = [(m.name, m.size) for m in spec.modalities]
        self._zeros: dict[str, FloatArray] = {name: np.zeros(size, np.float32) for name, size in self._sizes}

    def read(self, request: protocol.Step, now_ns: int) -> Tick:
        """The tick of a message that came at `now_ns`; raises BadTick where it does not fit the model."""
        expected = len(self._sizes)
        if len(request.features) != expected or len(request.age_ns) not in (0, expected):
            raise BadTick(
                f"tick {request.tick} of session {request.session!r}: expected {expected} vectors and as many ages or "
                f"none, got {len(request.features)} and {len(request.age_ns)}"
            )
        features, present, age_ns = {}, {}, {}
        for i, (name, size) in enumerate(self._sizes):
            content = request.features[i]
            if content is not None and len(content) != 4 * size:
                raise BadTick(
                    f"tick {request.tick} of session {request.session!r}: expected {size} float32 ({4 * size} bytes) "
                    f"as {name}, got {len(content)} bytes"
                )
            here = content is not None
            vector = np.frombuffer(content, "<f4") if content is not None else self._zeros[name]
            if here and not (np.absolute(vector) < FEATURE_BOUND).all():
                raise BadTick(
                    f"tick {request.tick} of session {request.session!r}: {name} holds a number that is not finite or "
                    f"not below {FEATURE_BOUND:g}; send it without this value, or without {name}"
                )
            features[name], present[name] = vector, here
            age_ns[name] = request.age_ns[i] if request.age_ns else (0 if here else -1)
        closed = Stamps(request.event_ns, request.event_ns, request.event_ns, now_ns, "serve")
        return Tick(request.session, request.tick, request.event_ns, features, present, age_ns, closed)
