"""LiveKit Agents: the end of the user's turn, for `AgentSession(turn_handling={"turn_detection": ...})`.

`AgentSession` asks when its speech detector hears a silence of .2 s; the answer is given as soon as the model may be
read. Then the session waits for its `min_delay`, or, if the probability is below the threshold, for `max_delay`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from stream_mmrnn.adapters.turns import Turns, samples_of
from stream_mmrnn.core.distribution import CLIENT, FULL, installed
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.extras import need

if TYPE_CHECKING:
    from livekit.agents.voice.turn import TurnDetectionEvent
    from livekit.rtc import AudioFrame

TIMEOUT_S = 1.0
"""How long the session waits for an answer, before it goes on without one."""


class LiveKitTurnDetector:
    """A streaming turn detector, as LiveKit's own `inference.TurnDetector`. It needs a speech detector in the session.

    One stream at a time: the sound goes into `turns`.
    """

    model = "turn_taking"
    provider = "stream-mmrnn"

    def __init__(self, turns: Turns, *, languages: Collection[str] = ("en",), timeout_s: float = TIMEOUT_S) -> None:
        """`turns`: a `PredictorTurns` or `SessionTurns`, of this detector alone; the session leaves it open.
        `languages`: for others, the session goes on without an answer; the included model learnt English.

        Raises:
            UsageError: livekit-agents is not installed, or `timeout_s` is not positive.

        """
        of = CLIENT if CLIENT in installed() else FULL
        need("LiveKitTurnDetector", "livekit", "livekit.agents", of=of)
        if not timeout_s > 0:
            raise UsageError(f"timeout_s is {timeout_s!r}: expected seconds, more than 0")
        self._turns, self._languages, self._timeout_s = turns, frozenset(languages), timeout_s

    def stream(self, *, conn_options: Any = None) -> LiveKitTurnStream:
        """A stream of sound for one agent. `conn_options`: there is no connection that they could be of."""
        return LiveKitTurnStream(self._turns, self._languages, self._timeout_s)


class LiveKitTurnStream:
    """What `AgentSession` calls: sound in, one future for each question."""

    model, provider = LiveKitTurnDetector.model, LiveKitTurnDetector.provider
    is_fallback = False

    def __init__(self, turns: Turns, languages: frozenset[str], timeout_s: float) -> None:
        self._turns, self._languages = turns, languages
        self.prediction_timeout = timeout_s
        self._asked: asyncio.Future[TurnDetectionEvent] | None = None
        self._ended = False

    async def unlikely_threshold(self, language: str | None) -> float | None:
        return self._turns.threshold

    async def backchannel_threshold(self, language: str | None) -> float | None:
        return None  # the model does not tell

    async def supports_language(self, language: str | None) -> bool:
        return language is None or str(language).lower().partition("-")[0] in self._languages

    def predict(self) -> asyncio.Future[TurnDetectionEvent]:
        """Ask whether the turn is over; the answer comes with the sound that follows."""
        self.cancel_inference()
        asked = self._asked = asyncio.get_running_loop().create_future()
        if self._ended:
            self._answer(1.0)  # as LiveKit's own: nothing more comes, so the session need not wait
        return asked

    def push_audio(self, frame: AudioFrame) -> None:
        if self._ended:
            return
        sound = samples_of(frame.data.cast("B"))
        channels = frame.num_channels
        self._turns.push(sound if channels == 1 else sound.reshape(-1, channels), frame.sample_rate)
        turn = self._turns.poll()
        if turn is not None and turn.over is not None and turn.holder == "self":
            self._answer(turn.over)

    def cancel_inference(self, *, timed_out: bool = False) -> None:
        """The user goes on speaking, or the turn is done: nothing is over."""
        self._answer(0.0)

    def _answer(self, probability: float) -> None:
        from livekit.agents.voice.turn import TurnDetectionEvent

        asked, self._asked = self._asked, None
        if asked is not None and not asked.done():
            event = TurnDetectionEvent("eot_prediction", probability, last_speaking_time=time.time())
            asked.set_result(event)

    def flush(self, reason: str | None = None) -> None:
        self.cancel_inference()

    def end_input(self) -> None:
        self.flush()
        self._ended = True

    async def aclose(self) -> None:
        self.end_input()
