"""Measures the source `speech`: word error rate, delay and CPU time, on clips with transcripts.

    python -m tools.speech_report ../shared/data             # a table of Markdown
    python -m tools.speech_report ../shared/data --write     # into docs/speech.md
    python -m tools.speech_report ../shared/data --json --set step_s=0.3

Sound goes through the derivation block by block, as in a live session, and its clock is simulated: a block comes when
it ends, and is worked on for as long as the CPU took, one block after the other: the delays are those of one free core.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import wave
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.resampler import Resampler
from stream_mmrnn.capture.sources.file import FileSound
from stream_mmrnn.capture.speech.derivation import Speech
from stream_mmrnn.core.settings import MicrophoneSettings, SpeechSettings
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import Sample

PAGE = Path(__file__).parent.parent / "docs" / "speech.md"
_BLOCK = 320
_AFTER_S = 1.0
"""Silence after a clip, so that its last words are found by the pause, as in a session that goes on."""
_CALL_S = 120.0
"""Of each call."""
_GRID_EVERY = 4
"""Of the 240 clips of GRID's speaker 1."""
_EPOCH_NS = 1_000_000_000_000

_VERBS = {"b": "bin", "l": "lay", "p": "place", "s": "set"}
_COLOURS = {"b": "blue", "g": "green", "r": "red", "w": "white"}
_PREPOSITIONS = {"a": "at", "b": "by", "i": "in", "w": "with"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGITS = dict(zip("z123456789", _NUMBERS, strict=True))
_ADVERBS = {"a": "again", "n": "now", "p": "please", "s": "soon"}

Sound = npt.NDArray[np.int16]


class Said(msgspec.Struct, frozen=True):
    """A word of a transcript, or of the recogniser."""

    text: str
    end_s: float | None = None
    """None where it is not known."""
    known_s: float = 0.0
    """When the recogniser had it."""


class Item(msgspec.Struct, frozen=True):
    sound: Sound
    words: list[Said]


def grid_sentence(stem: str) -> list[str]:
    """The six words that the name of a GRID clip stands for: `bbaf2n` is "bin blue at f two now"."""
    verb, colour, preposition, letter, digit, adverb = list(stem)
    return [_VERBS[verb], _COLOURS[colour], _PREPOSITIONS[preposition], letter, _DIGITS[digit], _ADVERBS[adverb]]


def _aligned(path: Path) -> list[Said]:
    rows = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    return [Said(word, int(end) / 25_000) for _, end, word in rows if word not in ("sil", "sp")]


def _sound(path: Path) -> Sound:
    source = FileSound(path, MicrophoneSettings(), paced=False)
    source.open()
    blocks = [np.asarray(sample.data, np.int16) for sample in source.samples(lambda: True, 0)]
    source.close()
    return np.concatenate(blocks)


def _grid_others(data: Path) -> Iterator[Item]:
    for clip in sorted((data / "clips").glob("*.mpg")):
        yield Item(_sound(clip), [Said(word) for word in grid_sentence(clip.stem)])


def _grid_one(data: Path) -> Iterator[Item]:
    for clip in sorted((data / "grid_s1").glob("*.mpg"))[::_GRID_EVERY]:
        yield Item(_sound(clip), _aligned(clip.with_suffix(".align")))


def _calls(data: Path) -> Iterator[Item]:
    """Each channel by itself; which speaker it has is told by the loudness while that one speaks."""
    for path in sorted((data / "calls").glob("*.wav")):
        with wave.open(str(path), "rb") as file:
            rate_hz = file.getframerate()
            both = np.frombuffer(file.readframes(round(_CALL_S * rate_hz)), "<i2").reshape(-1, 2)
        rows = [row for row in json.loads(path.with_suffix(".json").read_text()) if row["end"] < _CALL_S]
        channels = [Resampler(rate_hz).feed(np.ascontiguousarray(both[:, i])) for i in (0, 1)]
        words = [[row for row in rows if row["speaker"] == speaker] for speaker in "AB"]
        loud = [[_loud(sound, said) for said in words] for sound in channels]
        if loud[1][0] * loud[0][1] > loud[0][0] * loud[1][1]:
            words.reverse()
        for sound, said in zip(channels, words, strict=True):
            yield Item(sound, [Said(word) for row in said for word in _plain(row["word"])])


def _plain(text: str) -> list[str]:
    return re.sub(r"[^a-z' ]", " ", text.lower()).split()


def _loud(sound: Sound, rows: list[dict[str, Any]]) -> float:
    spans = [(round(row["start"] * AUDIO_RATE_HZ), round(row["end"] * AUDIO_RATE_HZ)) for row in rows]
    return float(np.mean([np.square(sound[a:b].astype(float)).mean() for a, b in spans if b <= len(sound)]))


SETS = {
    "GRID, six speakers (`clips`)": _grid_others,
    "GRID, speaker 1 (`grid_s1`)": _grid_one,
    "telephone calls (`calls`)": _calls,
}


def recognise(speech: Speech, sound: Sound) -> tuple[list[Said], float]:
    """The words, and the CPU seconds that they took."""
    speech.reset()
    sound = np.concatenate([sound, np.zeros(round(_AFTER_S * AUDIO_RATE_HZ), np.int16)])
    words: list[Said] = []
    free_s = cpu_s = 0.0
    for at in range(0, len(sound), _BLOCK):
        block = sound[at : at + _BLOCK]
        come_s = (at + len(block)) / AUDIO_RATE_HZ
        event_ns = _EPOCH_NS + round(come_s * 1e9)
        began_s = time.process_time()
        made = speech.derive(Sample(event_ns, event_ns, block))
        took_s = time.process_time() - began_s
        free_s, cpu_s = max(free_s, come_s) + took_s, cpu_s + took_s
        words += [Said(bytes(w.data).decode(), (w.event_ns - _EPOCH_NS) / 1e9, free_s) for w in made]
    return words, cpu_s


def errors(expected: list[str], words: list[str]) -> int:
    """Words to replace, insert or remove: the edit distance (V. Levenshtein, 1966)."""
    row = list(range(len(words) + 1))
    for i, wanted in enumerate(expected, 1):
        before, row[0] = row[0], i
        for j, word in enumerate(words, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (wanted != word))
    return row[-1]


def measure(items: Iterator[Item], speech: Speech) -> dict[str, Any]:
    """The figures of a set."""
    wrong = count = 0
    seconds = cpu_s = 0.0
    delays: list[float] = []
    shifts: list[float] = []
    for item in items:
        words, took_s = recognise(speech, item.sound)
        texts, expected = [word.text for word in words], [word.text for word in item.words]
        wrong, count = wrong + errors(expected, texts), count + len(expected)
        seconds, cpu_s = seconds + len(item.sound) / AUDIO_RATE_HZ, cpu_s + took_s
        delays += [word.known_s - word.end_s for word in words if word.end_s is not None]
        for a, b, size in SequenceMatcher(None, expected, texts, autojunk=False).get_matching_blocks():
            pairs = zip(item.words[a : a + size], words[b : b + size], strict=True)
            shifts += [w.end_s - e.end_s for e, w in pairs if e.end_s is not None and w.end_s is not None]
    return {
        "seconds": round(seconds, 1),
        "words": count,
        "word_error_rate": round(wrong / count, 3),
        "delay_p50_s": _percentile(delays, 50),
        "delay_p90_s": _percentile(delays, 90),
        "end_error_p50_s": _percentile(np.abs(shifts), 50),
        "cpu_per_second": round(cpu_s / seconds, 3),
    }


def _percentile(values: npt.ArrayLike, q: float) -> float | None:
    values = np.asarray(values)
    return round(float(np.percentile(values, q)), 2) if len(values) else None


_COLUMNS = {
    "seconds": "sound, s",
    "words": "words",
    "word_error_rate": "word error rate",
    "delay_p50_s": "delay p50, s",
    "delay_p90_s": "delay p90, s",
    "end_error_p50_s": "error of a word's end p50, s",
    "cpu_per_second": "CPU s per s of sound",
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    lines = [f"| clips | {' | '.join(_COLUMNS.values())} |", "| --- |" + " --- |" * len(_COLUMNS)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join("-" if row[c] is None else f"{row[c]}" for c in _COLUMNS) + " |")
    return "\n".join(lines)


def _settings(given: list[str]) -> SpeechSettings:
    pairs = dict(pair.split("=", 1) for pair in given)
    return msgspec.convert(pairs, SpeechSettings, strict=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.speech_report", description="Measure the source `speech`.")
    parser.add_argument("data", type=Path, help="folder with clips/, grid_s1/ and calls/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of [speech]")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--write", action="store_true", help="put the table into docs/speech.md")
    asked = parser.parse_args()
    speech = Speech("audio", _settings(asked.set))
    rows = {name: measure(items(asked.data), speech) for name, items in SETS.items()}
    if asked.write:
        text = PAGE.read_text(encoding="utf-8")
        begin, end = (text.index(f"<!-- {mark} -->") for mark in ("measured", "end of measured"))
        begin += len("<!-- measured -->")
        PAGE.write_text(f"{text[:begin]}\n\n{table(rows)}\n\n{text[end:]}", encoding="utf-8")
    print(json.dumps(rows) if asked.json else table(rows))


if __name__ == "__main__":
    main()
