"""Turns: sound in, the newest `Turn` out, for an agent's event loop: neither waits.

`PredictorTurns` steps a `Predictor` in a thread of this process; `SessionTurns` sends the sound to a session beside it
and reads that session's predictions. Knows nothing about frameworks.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from stream_mmrnn.adapters.turn_reader import AFTER_S, Turn, TurnReader
from stream_mmrnn.bus.prediction_reader import PredictionView
from stream_mmrnn.bus.push import Push
from stream_mmrnn.bus.subscription import Subscription
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import NotRunning, UsageError
from stream_mmrnn.core.sound import mono
from stream_mmrnn.core.types import ModelSpec, Prediction

Sound = npt.NDArray[Any]
LAG_S = 0.5
"""What the model says of sound that is further behind the newest is not used: the person may have gone on."""
_QUEUE = 256
"""Pieces of sound that may wait for the thread: 2.5 to 5 s of what frameworks give."""
_JOIN_S = 5.0


class Turns(Protocol):
    """The interface of what the adapters ask."""

    fault: str
    """Why there are no answers any more; "" while all is well."""

    def push(self, pcm: Sound, rate_hz: int) -> None:
        """The person's sound, in order: int16 or floats, [samples] or [samples, channels]. Does not wait."""

    def poll(self) -> Turn | None:
        """What the newest prediction says; None without one, or if it lags behind the sound. Does not wait."""

    def is_over(self, turn: Turn | None) -> bool:
        """Whether the person's turn is over."""

    @property
    def threshold(self) -> float | None:
        """Above it the turn counts as over; None until the model is known."""

    def reset(self) -> None:
        """Another person or call begins: forget what was heard, and a fault of it."""

    def close(self) -> None: ...


class _Predicts(Protocol):
    """What is used of a `Predictor`."""

    spec: ModelSpec

    def push_audio(
        self, pcm: Sound, at_s: float | None = None, *, rate_hz: int = 16_000, stream: str = "audio"
    ) -> Sequence[Prediction]: ...

    def at_s(self, at: Prediction | int) -> float: ...

    def reset(self) -> None: ...


class PredictorTurns:
    """By a `Predictor` in this process: `PredictorTurns(Predictor("turn_taking"))`.

    Its thread runs the encoders and the network; smart-turn alone takes 50 ms once a pause, and some .5 s more in the
    first one, where it is loaded. Sound that finds the queue full is dropped and counted: the model sees a gap there.
    """

    def __init__(self, predictor: _Predicts, *, threshold: float | None = None, after_s: float = AFTER_S) -> None:
        """`threshold`, `after_s`: as for `TurnReader`. The predictor has no clock, and is used by nothing else.

        Raises:
            UsageError: its model does not tell the end of a turn.

        """
        self._predictor = predictor
        self._reader = TurnReader(predictor.spec.heads, threshold=threshold, after_s=after_s)
        self.fault = ""
        self.dropped = 0
        """Pieces of sound that found the queue full."""
        self._pushed_s = 0.0
        self._resets = 0
        self._newest: tuple[Turn, float, int] | None = None
        """The last turn, the end of its tick on the time line of the sound, and how often there was a reset before."""
        self._waiting: queue.Queue[tuple[Sound, int, float] | int | None] = queue.Queue(_QUEUE)
        """Sound with its rate and end; the number of a reset; None ends the thread."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="stream-mmrnn turns", daemon=True)
        self._thread.start()
        # a thread that is inside a library while the interpreter ends would abort the program
        atexit.register(self.close)

    @property
    def threshold(self) -> float | None:
        return self._reader.threshold

    def push(self, pcm: Sound, rate_hz: int) -> None:
        if self._closed:
            raise UsageError("this was closed; make another PredictorTurns")
        sound = mono(pcm)
        self._pushed_s += len(sound) / rate_hz
        try:
            self._waiting.put_nowait((sound, rate_hz, self._pushed_s))
        except queue.Full:
            self.dropped += 1

    def poll(self) -> Turn | None:
        if self._newest is None:
            return None
        turn, end_s, resets = self._newest
        return turn if resets == self._resets and self._pushed_s - end_s <= LAG_S else None

    def is_over(self, turn: Turn | None) -> bool:
        return self._reader.is_over(turn)

    def reset(self) -> None:
        while True:  # what waits is of the person before
            try:
                self._waiting.get_nowait()
            except queue.Empty:
                break
        self._pushed_s, self._resets = 0.0, self._resets + 1
        self._waiting.put(self._resets)  # the thread owns the predictor

    def close(self) -> None:
        """End the thread; sound that waits is not used."""
        if not self._closed:
            self.reset()
            self._closed = True
            self._waiting.put(None)
            self._thread.join(_JOIN_S)
            atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        resets, end_s = 0, 0.0
        while (found := self._waiting.get()) is not None:
            if isinstance(found, int):
                resets, end_s, self.fault = found, 0.0, ""
                self._predictor.reset()
                self._reader.reset()
                continue
            sound, rate_hz, at_s = found
            # a time is given after a gap alone: without one, pieces follow each other to the sample
            gap = at_s - len(sound) / rate_hz - end_s > 1 / rate_hz
            end_s = at_s
            if self.fault:
                continue
            try:
                for p in self._predictor.push_audio(sound, at_s if gap else None, rate_hz=rate_hz):
                    self._newest = self._reader.observe(p.tick, p.heads), self._predictor.at_s(p), resets
            except Exception as e:  # the agent goes on without answers, and `fault` says why
                self.fault = str(e) or type(e).__name__
                self._newest = None


class SessionTurns:
    """By a session beside this program, whose stream has the source `push`: `stream-mmrnn live --audio push`.

    A session that ends is no error of the agent's: `fault` has the reason, and there are no answers.
    """

    def __init__(
        self,
        session: str | None = None,
        *,
        stream: str = "audio",
        address: str = "",
        keys: Path | str | None = None,
        server_key: str = "",
        wait: float | None = None,
        threshold: float | None = None,
        after_s: float = AFTER_S,
    ) -> None:
        """Connect; this waits up to `wait` seconds for the session. The first parameters are those of `push`;
        `threshold`, `after_s`: as for `TurnReader`.

        Raises:
            NotRunning, UsageError, FileError: those of `push`.

        """
        self._push = Push(stream, session, address=address, keys=keys, server_key=server_key, wait=wait)
        try:
            self._subscription = Subscription(self._push.session, address=address, keys=keys, server_key=server_key)
        except BaseException:
            self._push.close()
            raise
        self._wants = (threshold, after_s)
        self._same_clock = not address
        self._reader: TurnReader | None = None
        self._newest: tuple[Turn, int] | None = None
        """The last turn, and when it came."""
        self.fault = ""

    @property
    def threshold(self) -> float | None:
        return self._reader.threshold if self._reader is not None else self._wants[0]

    def push(self, pcm: Sound, rate_hz: int) -> None:
        if self.fault:
            return
        try:
            self._push.send(mono(pcm), rate_hz=rate_hz)
        except NotRunning as e:
            self.fault = str(e)

    def poll(self) -> Turn | None:
        try:
            while not self.fault and (view := self._subscription.receive(0)) is not None:
                self._observe(view)
        except (NotRunning, UsageError) as e:
            self.fault = str(e)
        self.fault = self.fault or self._subscription.ended
        if self.fault or self._newest is None:
            return None
        turn, came_ns = self._newest
        # on another machine event times are of that machine's clock
        since_ns = now_ns() - (turn.event_ns if self._same_clock else came_ns)
        return turn if since_ns <= LAG_S * 1e9 else None

    def _observe(self, view: PredictionView) -> None:
        if view.model is None:
            return  # what its numbers mean is not known yet
        if self._reader is None:
            threshold, after_s = self._wants
            self._reader = TurnReader(view.model.heads, threshold=threshold, after_s=after_s)
        self._newest = self._reader.observe(view, view.heads), now_ns()

    def is_over(self, turn: Turn | None) -> bool:
        return self._reader is not None and self._reader.is_over(turn)

    def reset(self) -> None:
        """Forget who spoke. The session's own state goes on: it is one conversation."""
        if self._reader is not None:
            self._reader.reset()
        self._newest = None

    def close(self) -> None:
        self.fault = self.fault or "it was closed here"
        self._push.close()
        self._subscription.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def samples_of(pcm: bytes | memoryview) -> npt.NDArray[np.int16]:
    """Bytes of 16-bit sound as numbers; half a sample at the end is left out."""
    return np.frombuffer(pcm, np.dtype("<i2"), count=len(pcm) // 2)
