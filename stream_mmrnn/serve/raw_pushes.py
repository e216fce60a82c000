"""RawPushes: the pushes of a raw session on the client's side: sound, pictures, words and numbers as requests.

`RawServedSession` sends them and waits, `AsyncRawServedSession` awaits. Knows nothing about connections.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.resampler import SoundInput
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.sound import mono
from stream_mmrnn.serve.client_session import ClientSession

Result = TypeVar("Result")


class RawPushes(ABC, Generic[Result]):
    """The calls of `Predictor` for a served session. Times are seconds of the session, from 0.

    Each returns the answers of the ticks that it completed; an answer's `tick` counts from 1, and `event_ns` from the
    session's start.
    """

    def __init__(self, session: ClientSession) -> None:
        self._session = session
        self._sound: dict[str, SoundInput] = {}

    def push_audio(
        self, pcm: npt.ArrayLike, at_s: float | None = None, *, rate_hz: int = 16_000, stream: str = "audio"
    ) -> Result:
        """Sound: int16, or float in -1 to 1, of shape [samples] or [samples, channels].

        `at_s`: when its last sample was taken; unless given, it follows the sound before it. Another rate than 16 kHz
        is converted here, which needs the package av.

        Raises:
            UsageError: this is no sound.
            BadTick: nothing in the model hears this stream, or its time is not possible.

        """
        # sound that goes on after a resume follows what the server has
        pieces = self._sound.setdefault(stream, SoundInput(self._session.begin_ns))
        sound = pieces.feed(mono(pcm), rate_hz, None if at_s is None else _ns(at_s))
        return self._push(stream, sound.astype("<i2").tobytes(), pieces.end_ns, False)

    def push_frame(self, jpeg: bytes, at_s: float | None = None, *, stream: str = "vision") -> Result:
        """A picture as JPEG. Raises BadTick where it is damaged, or nothing in the model sees this stream."""
        return self._push(stream, bytes(jpeg), None if at_s is None else _ns(at_s), False)

    def push_text(self, text: str, at_s: float | None = None, *, stream: str = "text") -> Result:
        """A word or a line, at the time when it was said. Raises BadTick where nothing in the model reads it."""
        return self._push(stream, text.encode(), None if at_s is None else _ns(at_s), False)

    def push(self, name: str, vector: npt.ArrayLike, at_s: float | None = None) -> Result:
        """Numbers: a sample of the signal `name`, or a feature vector of that stream as its encoder makes them.

        Raises BadTick where the model takes no such stream, or vectors of another length.
        """
        values = np.ascontiguousarray(vector, "<f4")
        return self._push(name, values.tobytes(), None if at_s is None else _ns(at_s), True)

    def advance(self, to_s: float) -> Result:
        """The time is `to_s`, and nothing older comes: ticks up to there are complete."""
        return self._push("", b"", _ns(to_s), False)

    @abstractmethod
    def _push(self, stream: str, data: bytes, at_ns: int | None, vector: bool) -> Result: ...


def _ns(at_s: float) -> int:
    if not 0 <= at_s < 2**32:
        raise UsageError(f"at_s is {at_s!r}: expected seconds since the session's start, 0 or more")
    return round(at_s * 1e9)
