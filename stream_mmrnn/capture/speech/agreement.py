"""LocalAgreement-2: which words of successive hypotheses are stable.

D. Macháček, R. Dabre and O. Bojar, "Turning Whisper into Real-Time Transcription System", 2023: a word is committed
when two hypotheses in a row agree on it and on all words before it. Knows nothing about sound.
"""

from __future__ import annotations

from itertools import takewhile

import msgspec


class Word(msgspec.Struct, frozen=True, gc=False):
    """A word of a hypothesis."""

    text: str
    """In lower case, without punctuation at its ends."""
    start_s: float
    end_s: float
    """From the beginning of the sound."""
    tokens: tuple[int, ...] = ()
    """Without the punctuation after it."""


class LocalAgreement:
    """The words of one utterance that no later hypothesis can change, and the last hypothesis of what follows them."""

    def __init__(self) -> None:
        self.said: tuple[int, ...] = ()
        """Tokens of the committed words, for the recogniser to continue."""
        self.end_s = 0.0
        """End of the last committed word."""
        self.pending: list[Word] = []
        """The words of the last hypothesis that are not committed."""

    def agree(self, words: list[Word]) -> list[Word]:
        """The words that are now committed, of a hypothesis of what follows the committed ones."""
        pairs = zip(self.pending, words, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0].text == pair[1].text, pairs))
        if same and same == len(words):  # the end of the last word is often put at the end of the sound
            end_s = min(self.pending[same - 1].end_s, words[-1].end_s)
            words = [*words[:-1], msgspec.structs.replace(words[-1], end_s=end_s)]
        self.pending = words
        return self.commit(same)

    def commit(self, count: int | None = None) -> list[Word]:
        """Commit the first pending words, or all, without waiting for a second hypothesis."""
        words, self.pending = self.pending[:count], [] if count is None else self.pending[count:]
        for word in words:
            self.said += word.tokens
            self.end_s = max(self.end_s, word.end_s)
        return words

    def cut(self, seconds: float) -> None:
        """The sound up to there, with all committed words, is gone."""
        self.said, self.end_s = (), max(self.end_s - seconds, 0.0)
