"""Pipecat: the end of the user's turn, as a turn analyser and as a user turn stop strategy.

`PipecatTurnAnalyzer` goes where pipecat's own smart-turn analyser goes, and leaves it to pipecat's speech detector when
the user speaks. `PipecatTurnStopStrategy` needs no speech detector to end a turn: the heads say who speaks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stream_mmrnn.adapters.turns import Turns, samples_of
from stream_mmrnn.core import extras
from stream_mmrnn.core.distribution import CLIENT, FULL
from stream_mmrnn.core.errors import UsageError

if TYPE_CHECKING:
    from pipecat.audio.turn.base_turn_analyzer import BaseTurnAnalyzer, BaseTurnParams, EndOfTurnState
    from pipecat.metrics.metrics import TurnMetricsData
    from pipecat.turns.user_stop.base_user_turn_stop_strategy import BaseUserTurnStopStrategy
else:
    try:
        from pipecat.audio.turn.base_turn_analyzer import BaseTurnAnalyzer, BaseTurnParams, EndOfTurnState
        from pipecat.metrics.metrics import TurnMetricsData
        from pipecat.turns.user_stop.base_user_turn_stop_strategy import BaseUserTurnStopStrategy
    except ModuleNotFoundError:  # an object of these classes says so
        BaseTurnAnalyzer = BaseTurnParams = BaseUserTurnStopStrategy = object

STOP_S = 3.0
"""Unless the model says so before, a silence of this length ends the turn: as in pipecat's own analyser."""


def _need(what: str) -> None:
    """Raises UsageError if pipecat-ai is missing. It brings its own ONNX Runtime, so it is an extra of the client."""
    if extras.missing(["pipecat"]):
        raise UsageError(
            f"{what} needs pipecat-ai: in the agent's environment pip install '{CLIENT}[pipecat]' in place of {FULL}, "
            "or have both there as docs/install.md says"
        )


class StopParams(BaseTurnParams):
    """What pipecat is told of the analyser, and tells others."""

    stop_secs: float = STOP_S


class PipecatTurnAnalyzer(BaseTurnAnalyzer):
    """For `TurnAnalyzerUserTurnStopStrategy(turn_analyzer=PipecatTurnAnalyzer(turns))`.

    The answer is read with each piece of sound, from a quarter of a second into the silence on. When pipecat asks at
    the beginning of a silence (`analyze_end_of_turn`), it usually is too early; then the turn goes on until the model
    says that it is over, or `stop_s` have passed.
    """

    def __init__(self, turns: Turns, *, stop_s: float = STOP_S, sample_rate: int | None = None) -> None:
        """`turns`: a `PredictorTurns` or `SessionTurns`, of this analyser alone; `cleanup` leaves it open.

        Raises:
            UsageError: pipecat-ai is not installed, or `stop_s` is not positive.

        """
        _need("PipecatTurnAnalyzer")
        if not stop_s > 0:
            raise UsageError(f"stop_s is {stop_s!r}: expected seconds of silence, more than 0")
        super().__init__(sample_rate=sample_rate)
        self._turns = turns
        self._params = StopParams(stop_secs=stop_s)
        self._said: TurnMetricsData | None = None
        """Of the end that was found and not asked for yet."""
        self.clear()

    @property
    def speech_triggered(self) -> bool:
        return self._spoke

    @property
    def params(self) -> StopParams:
        return self._params

    def append_audio(self, buffer: bytes, is_speech: bool) -> EndOfTurnState:
        sound = samples_of(buffer)
        self._turns.push(sound, self.sample_rate)
        if is_speech:
            self._spoke, self._silence_s, self._said = True, 0.0, None
            return EndOfTurnState.INCOMPLETE
        if self._spoke:
            self._silence_s += len(sound) / self.sample_rate
        return self._judge()

    async def analyze_end_of_turn(self) -> tuple[EndOfTurnState, TurnMetricsData | None]:
        # after `append_audio` has found the end, pipecat asks once more, for the figures
        state = EndOfTurnState.COMPLETE if self._said is not None else self._judge()
        said, self._said = self._said, None
        return state, said

    def clear(self) -> None:
        self._spoke, self._silence_s = False, 0.0
        self._said = None

    def _judge(self) -> EndOfTurnState:
        if not self._spoke:
            return EndOfTurnState.INCOMPLETE
        turn = self._turns.poll()
        over = self._turns.is_over(turn)
        if not over and self._silence_s < self._params.stop_secs:
            return EndOfTurnState.INCOMPLETE
        self.clear()
        if over and turn is not None and turn.over is not None:
            self._said = TurnMetricsData(
                processor=type(self).__name__,
                model="stream_mmrnn",
                is_complete=True,
                probability=turn.over,
                e2e_processing_time_ms=turn.silence_s * 1000,
            )
        return EndOfTurnState.COMPLETE


class PipecatTurnStopStrategy(BaseUserTurnStopStrategy):
    """For `UserTurnStrategies(stop=[PipecatTurnStopStrategy(turns)])`: ends the turn by the model's heads alone.

    With `wait_for_transcript` a turn ends when it has words, too: what an agent needs whose language model reads a
    transcript. If the model never says that the turn is over, pipecat's `user_turn_stop_timeout` ends it.
    """

    def __init__(self, turns: Turns, *, wait_for_transcript: bool = True, **others: Any) -> None:
        """`turns`: a `PredictorTurns` or `SessionTurns`, of this strategy alone; `others`: of the base class.

        Raises:
            UsageError: pipecat-ai is not installed.

        """
        _need("PipecatTurnStopStrategy")
        super().__init__(**others)
        self._turns = turns
        self.wait_for_transcript = wait_for_transcript
        self._begin()

    def _begin(self) -> None:
        self._over = self._has_words = self._spoke = False

    async def handle_user_turn_started(self) -> None:
        self._begin()

    async def handle_user_turn_stopped(self) -> None:
        self._begin()

    async def process_frame(self, frame: Any) -> Any:
        from pipecat.frames.frames import InputAudioRawFrame, TranscriptionFrame, VADUserStartedSpeakingFrame
        from pipecat.turns.types import ProcessFrameResult

        if isinstance(frame, InputAudioRawFrame):
            sound = samples_of(frame.audio)
            channels = frame.num_channels
            self._turns.push(sound if channels == 1 else sound.reshape(-1, channels), frame.sample_rate)
            turn = self._turns.poll()
            if turn is not None:
                # an answer that was true before somebody went on speaking is none
                self._over = self._turns.is_over(turn) or (self._over and not turn.speaker)
                await self._end()
        elif isinstance(frame, VADUserStartedSpeakingFrame):
            self._over = False
        elif isinstance(frame, TranscriptionFrame):
            self._has_words = self._has_words or bool(frame.text.strip())
            await self._end()
        return ProcessFrameResult.CONTINUE

    async def _end(self) -> None:
        if self._over and (self._has_words or not self.wait_for_transcript):
            self._begin()
            await self.trigger_user_turn_stopped()
