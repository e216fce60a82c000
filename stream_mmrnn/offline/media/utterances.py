"""Ends of utterances against cuts inside them, with one microphone, as served.

An item is what a microphone heard up to a place, and then the quiet of that file: either the utterance ends there, or
it was cut short, as with the complete and incomplete utterances that smart-turn is made of. `turn_over` is read in the
silence that follows. Knows nothing about training.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.offline.media.served import HEAD, Array, Seconds, Served, Trace, scores
from stream_mmrnn.offline.media.sound import channels, heard, rttm_turns
from stream_mmrnn.training import metrics
from stream_mmrnn.training.tasks.turn_taking import SILENCE_S

READ_S = (SILENCE_S, 2 * SILENCE_S)
"""When the heads are read, as an agent does: by the first prediction that comes so long after the speech detector heard
the voice last. The first is what a model is calibrated for; by the second, what is derived of a pause has come live,
too, where it takes some 50 ms."""
PAUSE_S = 1.0
"""An utterance goes on after a shorter silence, unless somebody else speaks in it."""
FROM_START_S, TO_END_S, IN_SPEECH_S = 1.0, 0.3, 0.1
"""Where words have no times, a cut lies at least so far from both ends of the utterance, and before the next pause; an
utterance without such a place does not count."""
OVERLAP_S = 0.25
"""An utterance whose end is spoken over for longer does not count."""
MOST = 40
"""Utterances of each place."""
_BEFORE_S = 10.0
"""Of the sound before a cut, which the session hears, too."""
_RELEASE_S = 0.5
"""So much longer is the silence: the detector hears a voice a little longer than it is there."""
_STEP_S = 0.01
_FADE = 160
_GRID_HZ = 25_000
_MEDIA = (".wav", ".mp3", ".flac", ".ogg", ".mp4", ".mpg", ".mkv", ".webm", ".avi", ".mov")


class Utterance(NamedTuple):
    begin_s: float
    end_s: float
    cuts_s: tuple[float, ...]
    """The places where it can be cut, in seconds of the file; at least one."""


class Item(NamedTuple):
    sound: Array
    """16 kHz, int16: what was heard, and then silence."""
    silence_s: float
    """When the silence begins for the speech detector."""
    ends: bool
    """The utterance ends there; else it was cut short."""


def spoken(own: Seconds, others: Seconds, *, one_channel: bool, end_s: float) -> list[Utterance]:
    """The utterances of a person who speaks in the spans `own` [K, 2], in a file of `end_s`.

    If there are `others`, only those count after which another person is the next to speak. `one_channel`: the others
    are heard in the same channel.
    """
    joined: list[list[float]] = []
    for begin, end in own.tolist():
        goes_on = joined and begin - joined[-1][1] < PAUSE_S
        if goes_on and not np.any((others[:, 0] >= joined[-1][1]) & (others[:, 0] < begin)):
            joined[-1][1] = max(end, joined[-1][1])
        else:
            joined.append([begin, end])
    found = []
    for begin, end in joined:
        over = others[(others[:, 0] > begin) & (others[:, 0] < end) & (others[:, 1] > end), 0]
        from_s = float(over.min(initial=end))
        if end - from_s > OVERLAP_S or end >= end_s - IN_SPEECH_S:
            continue
        if len(others):
            following = own[own[:, 0] > end, 0].min(initial=np.inf)
            if not others[others[:, 0] >= from_s, 0].min(initial=np.inf) < following:
                continue
        place = from_s if one_channel else end
        cuts = _inside(own, others if one_channel else others[:0], begin + FROM_START_S, place - TO_END_S)
        if cuts:
            found.append(Utterance(begin, place, cuts))
    return found


def _inside(own: Seconds, others: Seconds, begin_s: float, end_s: float) -> tuple[float, ...]:
    """Where the person speaks, not just before a pause, and nobody else does."""
    places = np.arange(begin_s, end_s, _STEP_S)
    fits = ((own[:, :1] <= places) & (places < own[:, 1:] - IN_SPEECH_S)).any(0)
    fits &= ~((others[:, :1] <= places) & (places < others[:, 1:])).any(0)
    return tuple(places[fits].tolist())


def aligned(path: Path) -> list[Utterance]:
    """The utterance of a word alignment of GRID: lines `begin end word`, in 1/25,000 s. It can be cut between two
    words, but not after the first. Raises FileError.
    """
    try:
        rows = [line.split() for line in path.read_text(encoding="ascii").splitlines() if line.strip()]
        words = [(int(begin) / _GRID_HZ, int(end) / _GRID_HZ) for begin, end, word in rows if word not in ("sil", "sp")]
    except ValueError as e:
        raise FileError(f"{path} is no word alignment of GRID: expected lines `begin end word`") from e
    return [Utterance(words[0][0], words[-1][1], tuple(end for _, end in words[1:-1]))] if len(words) > 2 else []


def read(path: Path) -> list[tuple[Array, list[Utterance]]]:
    """For each channel of a file its sound and the utterances in it, from the best that there is beside it: word times
    (`NAME.align`), who speaks when (`NAME.rttm`), or else what the speech detector hears.

    Raises:
        FileError: a file cannot be read.

    """
    sounds = channels(path)
    align, rttm = path.with_suffix(".align"), path.with_suffix(".rttm")
    if align.is_file():
        return [(sounds[0], aligned(align))]
    people: dict[tuple[int, str], list[tuple[float, float]]] = {}
    if rttm.is_file():
        for turn in rttm_turns(rttm):
            people.setdefault((turn.channel - 1, turn.speaker), []).append((turn.begin_s, turn.end_s))
    else:
        people = {(i, ""): heard(sound).tolist() for i, sound in enumerate(sounds)}
    found = []
    for i, sound in enumerate(sounds):
        said: list[Utterance] = []
        for (channel, name), spans in people.items():
            if channel == i:
                others = [span for key, those in people.items() if key != (channel, name) for span in those]
                one_channel = any(c == i and n != name for c, n in people)
                own, rest = (np.array(sorted(those), np.float64).reshape(-1, 2) for those in (spans, others))
                said += spoken(own, rest, one_channel=one_channel, end_s=len(sound) / AUDIO_RATE_HZ)
        found.append((sound, sorted(said)))
    return found


def quiet(sound: Array, count: int) -> Array:
    """So many samples as the file sounds where nobody speaks: its half second of middle loudness, forth and back again;
    zeros where somebody speaks all the time.
    """
    frame, guard, frames = AUDIO_RATE_HZ // 100, 10, 50
    total = len(sound) // frame
    free = np.ones(total, bool)
    for begin, end in (heard(sound) * 100).astype(int):
        free[max(begin - guard, 0) : end + guard] = False
    power = np.square(sound[: total * frame].astype(np.float64)).reshape(-1, frame).mean(1)
    sums, frees = (np.concatenate([[0], np.cumsum(x)]) for x in (power, free))
    starts = np.flatnonzero(frees[frames:] - frees[:-frames] == frames) if total >= frames else np.zeros(0, int)
    if not len(starts):
        return np.zeros(count, np.int16)
    loudness = sums[starts + frames] - sums[starts]
    start = int(starts[np.argsort(loudness, kind="stable")[len(starts) // 2]]) * frame
    piece = sound[start : start + frames * frame]
    return np.resize(np.concatenate([piece, piece[::-1]]), count)


def items(name: str, sound: Array, said: Sequence[Utterance], seed: int = 0) -> list[Item]:
    """Two of each utterance: its end, and a cut at a place that `seed` and `name` draw."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    silence = quiet(sound, round((READ_S[-1] + _RELEASE_S) * AUDIO_RATE_HZ))
    found = []
    for utterance in said:
        cut_s = float(rng.choice(utterance.cuts_s))
        for place_s, ends in ((utterance.end_s, True), (cut_s, False)):
            place = round(place_s * AUDIO_RATE_HZ)
            before = sound[max(0, place - round(_BEFORE_S * AUDIO_RATE_HZ)) : place].copy()
            fade = min(_FADE, len(before))  # a step in the sound would be heard as a click
            before[len(before) - fade :] = before[len(before) - fade :] * np.linspace(1, 0, fade)
            whole = np.concatenate([before, silence])
            voice = heard(whole)
            begun = voice[voice[:, 0] < len(before) / AUDIO_RATE_HZ, 1]
            silence_s = float(begun[-1]) if len(begun) else len(before) / AUDIO_RATE_HZ
            found.append(Item(whole, silence_s, ends))
    return found


def _spread(count: int, most: int) -> list[int]:
    """At most so many numbers below `count`, at equal distances."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []


def _of_place(place: Path, most: int, progress: Callable[[str], None]) -> tuple[list[str], list[Item]]:
    """The names of the files, and the items."""
    files = [place]
    if place.is_dir():
        files = sorted(f for f in place.iterdir() if f.suffix.lower() in _MEDIA)
    files = [files[i] for i in _spread(len(files), most)]
    found: list[tuple[str, Array, Utterance]] = []
    for file in files:
        progress(file.name)
        for i, (sound, said) in enumerate(read(file)):
            found += [(f"{file.name} {i}", sound, utterance) for utterance in said]
    chosen = [found[i] for i in _spread(len(found), most)]
    made: list[Item] = []
    for name, sound, utterance in chosen:
        made += items(f"{name} {utterance.begin_s:.3f}", sound, [utterance])
    return [f.name for f in files], made


def first_after(trace: Trace, when_s: float) -> int:
    """The first tick that ends at this time or later; the last one where there is none."""
    return min(int(np.searchsorted(trace.at_s, when_s - 1e-9)), len(trace.at_s) - 1)


def evaluate(
    model: Path,
    media: Sequence[Path],
    *,
    words: bool = True,
    most: int = MOST,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The figures of a model on utterances of the files, or folders of them: over all, and by place.

    `words`: by the recogniser (extra `speech`). `most`: utterances of each place, evenly spread over what is there.

    Raises:
        UsageError: there is no utterance, or the model has no head `turn_over`.
        FileError: a file cannot be read.

    """
    served = Served(model, microphones=1, words=words)
    files: list[str] = []
    ends: list[bool] = []
    places: list[int] = []
    values: dict[tuple[str, float], list[float]] = {(name, s): [] for name in (HEAD, "turn_end") for s in READ_S}
    sound_s = 0.0
    for number, place in enumerate(media):
        names, made = _of_place(place, most, progress)
        files += names
        for k, item in enumerate(made):
            progress(f"{place.name}: {k} of {len(made)}")
            trace = served.trace(item.sound)
            for s in READ_S:
                tick = first_after(trace, item.silence_s + s)
                values[HEAD, s].append(float(trace.turn_over[tick]))
                values["turn_end", s].append(float(trace.turn_end[tick]))
            ends.append(item.ends)
            places.append(number)
            sound_s += len(item.sound) / AUDIO_RATE_HZ
    if not ends:
        raise UsageError(
            f"{', '.join(map(str, media))} holds no utterance that is long enough to be cut; give recordings of speech"
        )
    true, where = np.array(ends), np.array(places)

    def figures(chosen: Array) -> dict[str, Any]:
        return {
            "utterances": int(true[chosen].sum()),
            **{
                name: {
                    f"after_{round(s * 1000)}_ms": scores(true[chosen], np.array(values[name, s])[chosen], threshold)
                    for s in READ_S
                }
                for name, threshold in ((HEAD, served.head.threshold), ("turn_end", 0.0))
            },
        }

    document: dict[str, Any] = metrics.clean(
        {
            "name": served.name,
            "model": str(model),
            "files": files,
            "sound_s": sound_s,
            "words": words,
            "microphones": 1,
            **figures(np.ones(len(true), bool)),
            "places": {str(place): figures(where == i) for i, place in enumerate(media)},
        }
    )
    return document
