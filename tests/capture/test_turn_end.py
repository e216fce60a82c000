"""Whether a turn ends: the network against pipecat's numbers, the pauses, the derivation, and who gets the stream."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import toy_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stream_mmrnn.capture import encoders
from stream_mmrnn.capture.derive import DerivationChain, DerivedEncoder, derivation_of
from stream_mmrnn.capture.encoders.speech_detector import CHUNK, MIN_CHUNKS, SILENCE, VOICE, SpeechDetector
from stream_mmrnn.capture.sources.bus_source import DerivedSource
from stream_mmrnn.capture.sources.file import FileSound
from stream_mmrnn.capture.speech import turn_end as turn_end_module
from stream_mmrnn.capture.speech.turn_end import NAME, PAUSE_CHUNKS, PauseDetector, SmartTurn, TurnEnd
from stream_mmrnn.core import config, topics
from stream_mmrnn.core.errors import ConfigError, SnapshotError, SourceSpecError, UsageError, WireError
from stream_mmrnn.core.settings import MicrophoneSettings, Settings
from stream_mmrnn.core.stream_table import stream_table, with_derived
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Envelope, ModalitySpec, Sample
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.offline.predictor import Predictor
from stream_mmrnn.predict.contract import read_contract
from stream_mmrnn.serve.session_input import SessionInput

RATE = 16_000
EPOCH_NS = 10**12
CHUNK_NS = 32_000_000
BOTH = ("turn_end", "other_turn_end")

Logits = list[tuple[int, float]]

# ---- the network -----------------------------------------------------------------------------------------------------


def hum(seconds: float, pitch_hz: float, glide: float, level: float = 0.2, syllables_hz: float = 4.0) -> np.ndarray:
    """Like a voice: harmonics of a gliding pitch under three formants, in syllables, a little noise, then a pause."""
    t = np.arange(round(seconds * RATE)) / RATE
    pitch = pitch_hz * (1 + glide * t / seconds)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    sound = np.zeros_like(t)
    for k in range(1, 25):
        formants = ((500, 80, 1.0), (1500, 120, 0.5), (2500, 160, 0.3))
        shift = [80 * np.sin(2 * np.pi * 1.3 * t + f) for f, _, _ in formants]
        gain = sum(a / (1 + ((k * pitch - f - s) / b) ** 2) for s, (f, b, a) in zip(shift, formants, strict=True))
        sound += gain * np.sin(k * phase) / k**0.5
    sound *= level * np.sin(np.pi * syllables_hz * t) ** 2
    noise = np.random.default_rng(0).integers(-100, 100, len(t)) / 32768
    voiced = (np.clip(sound + noise, -1, 1) * 32767).astype(np.int16)
    return np.concatenate([voiced, np.zeros(3600, np.int16)]).astype(np.float32) / 32768


# features (mean, deviation, [5, 700], [40, 798], [70, 300]) and logit of pipecat-ai 1.14.0
PIPECAT = {
    (2, 140, -0.4): ((0.161890477, 0.462843746, 0.853135884, -0.08537586, -0.08537586), 2.402618),
    (3, 180, 0.5): ((0.250133127, 0.468875617, 0.947053492, -0.077113196, -0.077113196), -0.748357),
    (9, 110, 0.0): ((0.728229344, 0.390600950, 0.666643798, -0.252767295, 0.418519914), -2.205682),
    (6, 120, -0.3, 0.3, 2.0): ((0.496638358, 0.537985206, 1.201035738, -0.220940784, 0.352290273), -3.584234),
}


@pytest.fixture(scope="module")
def network() -> SmartTurn:
    return SmartTurn()


@pytest.mark.parametrize("voice", list(PIPECAT))
def test_features_and_logits_are_those_of_pipecat(network: SmartTurn, voice: tuple[float, ...]) -> None:
    expected, logit = PIPECAT[voice]
    sound = hum(*voice)[-8 * RATE :]
    made = network.features(np.pad(sound, (8 * RATE - len(sound), 0)))
    assert (made.shape, made.dtype) == ((80, 800), np.float32)
    some = (made.mean(), made.std(), made[5, 700], made[40, 798], made[70, 300])
    assert some == pytest.approx(expected, abs=2e-6)
    # the weights are quantised in steps of .04, and kernels of other CPUs round otherwise
    assert network.logit(sound) == pytest.approx(logit, abs=0.15)


def test_the_logit_is_finite_and_clipped() -> None:
    network = SmartTurn()
    for probability, logit in ((0.0, -8.0), (1.0, 8.0), (0.5, 0.0), (0.75, np.log(3))):
        outputs = {"logits": np.array([[probability]], np.float32)}
        network._binding = SimpleNamespace(inputs=network._binding.inputs, outputs=outputs, run=lambda: None)
        assert network.logit(np.zeros(100, np.float32)) == pytest.approx(logit)


# ---- pauses ----------------------------------------------------------------------------------------------------------

_levels = st.sampled_from([0.0, 0.2, SILENCE, 0.45, VOICE, 0.99])


@given(st.lists(st.tuples(_levels, st.integers(1, 12)), max_size=30))
@example([(0.9, MIN_CHUNKS), (0.0, PAUSE_CHUNKS)])
@example([(0.9, MIN_CHUNKS - 1), (0.0, PAUSE_CHUNKS)])
@example([(0.9, 9), (0.0, PAUSE_CHUNKS - 1), (0.9, 1), (0.0, 30)])
def test_a_pause_is_judged_once_and_at_one_age(runs: list[tuple[float, int]]) -> None:
    probabilities = [p for p, count in runs for _ in range(count)]
    pauses = PauseDetector()
    judged = [i for i, p in enumerate(probabilities) if pauses.feed(p)]
    start = 0
    for i in judged:
        silence, before = probabilities[i - PAUSE_CHUNKS + 1 : i + 1], probabilities[start : i - PAUSE_CHUNKS + 1]
        assert all(p < VOICE for p in silence)
        assert max(silence) < SILENCE
        assert before[-1] >= SILENCE, "the pause is exactly so old"
        assert sum(p >= SILENCE for p in before) >= MIN_CHUNKS, "there was voice since the pause before"
        assert max(before) >= VOICE
        start = i + 1
    # and none is missed: from a clear voice that is long enough, through any pause
    pauses.reset()
    assert [pauses.feed(p) for p in [0.9] * MIN_CHUNKS + [0.1] * 20].index(True) == MIN_CHUNKS + PAUSE_CHUNKS - 1


class Loudness:
    """In place of the detector, because it is fast: what is loud is voice."""

    def __init__(self) -> None:
        self.chunk, self.state = np.zeros(1, np.float32), np.zeros(1, np.float32)

    def reset(self) -> None:
        pass

    def feed(self, chunk: np.ndarray) -> list[np.float32]:
        return [np.float32(np.abs(chunk).mean() > 0.1)]


def judge(sound: np.ndarray) -> np.float32:
    """In place of the network: a number of exactly this sound."""
    return np.float32(np.dot(sound.astype(np.float64), np.arange(len(sound))) % 8)


def simple(clock_ns: Any = None) -> TurnEnd:
    made = TurnEnd("audio", clock_ns, judge)
    made._detector = Loudness()  # type: ignore[assignment]
    return made


def feed(turn_end: TurnEnd, sound: np.ndarray, blocks: list[int], start: int = 0) -> Logits:
    """Times and logits, from a sound in blocks of these lengths, over and over."""
    made: Logits = []
    at = 0
    for length in itertools.cycle(blocks):
        block = sound[at : at + length]
        at += len(block)
        event_ns = EPOCH_NS + (start + at) * 62_500
        for sample in turn_end.derive(Sample(event_ns, event_ns, block)):
            assert sample.data.shape == (1,)
            assert sample.data.dtype == np.float32
            assert sample.event_ns <= event_ns
            made.append((sample.event_ns, float(sample.data[0])))
        if at >= len(sound):
            return made
    return made


def loud(runs: list[tuple[bool, int]]) -> np.ndarray:
    rng = np.random.default_rng(0)
    pieces = [rng.integers(-16000, 16000, n * CHUNK) if is_loud else np.zeros(n * CHUNK) for is_loud, n in runs]
    return np.concatenate([np.zeros(0), *pieces]).astype(np.int16)


_runs = st.lists(st.tuples(st.booleans(), st.integers(1, 12)), min_size=1, max_size=25)
_blocks = st.lists(st.integers(1, 4000), min_size=1, max_size=5)


@pytest.mark.slow
@settings(max_examples=40)
@given(_runs, _blocks, st.integers(0, CHUNK - 1))
@example([(True, 9), (False, 9)], [100_000], 0)
@example([(True, 9), (False, 9)] * 20, [511, 513], 17)
def test_any_blocks_of_the_same_sound_give_the_same(runs: list[tuple[bool, int]], blocks: list[int], cut: int) -> None:
    sound = loud(runs)[cut:]
    expected = feed(simple(), sound, [320])
    assert feed(simple(), sound, blocks) == expected
    assert all((at_ns - EPOCH_NS) % CHUNK_NS == 0 for at_ns, _ in expected), "the end of a chunk, not of a block"
    # and a snapshot continues with the same
    half = len(sound) // 2
    first, second = simple(), simple()
    made = feed(first, sound[:half], blocks) if half else []
    second.restore(first.snapshot())
    assert made + feed(second, sound[half:], blocks, half) == expected


def test_it_hears_the_last_eight_seconds_up_to_the_end_of_its_time() -> None:
    heard: list[np.ndarray] = []

    def keep(sound: np.ndarray) -> np.float32:
        heard.append(sound)
        return np.float32(0)

    turn_end = simple()
    turn_end._given = keep
    sound = loud([(True, 10), (False, 20), (True, 300), (False, 20)])
    (first_ns, _), (last_ns, _) = feed(turn_end, sound, [320])
    ends = [(at_ns - EPOCH_NS) // 62_500 for at_ns in (first_ns, last_ns)]
    assert ends == [(10 + PAUSE_CHUNKS) * CHUNK, (330 + PAUSE_CHUNKS) * CHUNK]
    assert 0.2e9 <= PAUSE_CHUNKS * CHUNK_NS <= 0.25e9
    assert [len(x) for x in heard] == [17 * CHUNK, 8 * RATE]
    assert np.array_equal(heard[1], sound[ends[1] - 8 * RATE : ends[1]].astype(np.float32) / 32768)


def test_gaps_and_time_that_runs_backwards() -> None:
    voice, turn_end = loud([(True, 10)]), simple()
    assert feed(turn_end, voice, [CHUNK]) == []
    # a short gap is silence, and may be the pause itself
    silence = np.zeros(CHUNK, np.int16)
    assert len(feed(turn_end, silence, [CHUNK], len(voice) + 10 * CHUNK)) == 1
    # after a long one, or back in time, nothing is known of the voice before
    for start in (10**6, 0):
        assert feed(turn_end, voice, [CHUNK], start) == []
        later = start + len(voice) + (RATE * 2 if start else -10 * RATE)
        assert feed(turn_end, np.zeros(RATE, np.int16), [320], later) == []
    assert turn_end.finish() == []


def test_when_it_is_late_pauses_are_left_out_and_counted() -> None:
    sound = loud([(True, 9), (False, 9)] * 5)
    in_time, late = simple(lambda: EPOCH_NS + 3 * 10**9), simple(lambda: EPOCH_NS + 60 * 10**9)
    assert len(feed(in_time, sound, [320])) == 5
    assert in_time.info == {"pauses": 5, "skipped": 0}
    assert feed(late, sound, [320]) == []
    assert late.info == {"pauses": 0, "skipped": 5}


@pytest.mark.parametrize("part", ["sound", "context", "detector", "counts"])
def test_a_snapshot_that_does_not_fit_is_refused(part: str) -> None:
    turn_end = TurnEnd("audio", judge=judge)
    feed(turn_end, loud([(True, 3)]), [320])
    good = turn_end.snapshot()
    for bad in ({k: v for k, v in good.items() if k != part}, good | {part: good[part][:-1].astype(np.float64)}):
        with pytest.raises(SnapshotError):
            turn_end.restore(bad)
    with pytest.raises(SnapshotError, match="disagree"):
        turn_end.restore(good | {"sound": np.zeros(5 * CHUNK, np.int16)})
    turn_end.restore(good)


def test_a_restored_one_goes_on_with_the_same_state() -> None:
    one, other = TurnEnd("audio", judge=judge), TurnEnd("audio", judge=judge)
    sound = loud([(True, 40)])
    feed(one, sound, [700])
    other.restore(one.snapshot())
    for turn_end in (one, other):
        feed(turn_end, sound, [320], len(sound))
    expected = one.snapshot()
    assert np.any(expected["detector"])
    assert all(np.array_equal(array, expected[name]) for name, array in other.snapshot().items())


@cache
def spoken(clips: Path, *names: str) -> np.ndarray:
    """Clips, with a second of silence after each."""
    pieces: list[np.ndarray] = []
    for name in names:
        source = FileSound(clips / name, MicrophoneSettings(), paced=False)
        source.open()
        pieces += [np.asarray(sample.data) for sample in source.samples(lambda: True, 0)]
        source.close()
        pieces.append(np.zeros(RATE, np.int16))
    return np.concatenate(pieces)


@pytest.mark.slow
@pytest.mark.shared_data
def test_real_speech_once_a_pause_at_224_ms_in_any_blocks(clips: Path) -> None:
    sound = spoken(clips, "lwbsza.mpg", "sbwe5n.mpg", "dialogue.wav")
    turn_end = TurnEnd("audio")
    turn_end.reset()
    made = feed(turn_end, sound, [320])
    assert len(made) == turn_end.info["pauses"] == 4
    probabilities = np.array(SpeechDetector().feed(sound.astype(np.float32) / 32768))
    for at_ns, _ in made:
        chunk = (at_ns - EPOCH_NS) // CHUNK_NS
        assert np.flatnonzero(probabilities[:chunk] >= SILENCE)[-1] == chunk - PAUSE_CHUNKS - 1
    network = SmartTurn()
    for at_ns, logit in made:
        end = (at_ns - EPOCH_NS) // 62_500
        assert network.logit(sound[max(end - 8 * RATE, 0) : end].astype(np.float32) / 32768) == np.float32(logit)
    # whole sentences end
    assert all(logit > 0 for at_ns, logit in made if at_ns - EPOCH_NS < 8 * 10**9)
    for blocks in ([511, 513], [100_000], [7, 4000]):
        turn_end.reset()
        assert feed(turn_end, sound, blocks) == made


# ---- names, settings, wrong uses -------------------------------------------------------------------------------------


def test_the_stream_is_sparse_and_its_features_are_named_after_the_network() -> None:
    streams = {"mic": {"source": "microphone"}, "ends": {"source": "turn_end"}}
    table = stream_table(config.parse({"streams": streams}))
    row = table["ends"]
    assert (row.source, row.kind, row.dense, row.reduction, row.raw) == (
        "from:mic/turn_end",
        "signal",
        False,
        "last",
        False,
    )
    [encoder] = encoders.encoders_of(row).values()
    assert encoder.origin.startswith(f"{NAME}@")
    assert len(encoder.origin) == len(NAME) + 65
    assert encoder.size == 1
    assert encoders.create_encoder("turn_end").origin == encoder.origin
    vector = Sample(5, 5, np.array([1.5], np.float32))
    assert encoder.encode(vector) == [vector]
    encoders.check_all(table.values())


def test_wrong_uses_are_one_sentence() -> None:
    with pytest.raises(SourceSpecError, match="gives signal"):
        derivation_of(Stream.of("a", "audio", source="from:audio/turn_end"), Settings())
    with pytest.raises(WireError, match="16-bit"):
        TurnEnd("audio").derive(Sample(0, 0, b"ab"))
    with pytest.raises(ConfigError, match="which is made of audio, and `vision` is vision"):
        stream_table(
            config.parse({"sources": {"vision": "camera:0"}, "streams": {"a": {"source": "from:vision/turn_end"}}})
        )


def derived(table: dict[str, Any], modalities: tuple[str, ...] = BOTH, *, pushed: bool = False) -> dict[str, str]:
    """The derived streams by name, and what they are made of, with these settings and a model of these inputs."""
    made = stream_table(with_derived(config.parse(table), modalities, pushed))
    return {name: row.parent for name, row in made.items() if row.derivation == "turn_end" and row.modality in BOTH}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({}, {"turn_end": "audio"}),
        ({"sources": {"audio": "none"}}, {}),
        ({"sources": {"other_audio": "push"}}, {"turn_end": "audio", "other_turn_end": "other_audio"}),
        ({"streams": {"desk": {"source": "microphone", "feeds": "audio"}}}, {"turn_end": "desk"}),
        ({"streams": {"call": {"source": "microphone:x", "person": "other"}}}, {"other_turn_end": "call"}),
        ({"streams": {"audio": {"source": "microphone", "raw": False}}}, {}),
        ({"streams": {"mic": {"source": "microphone"}, "turn_end": {"source": "none", "kind": "signal"}}}, {}),
        ({"streams": {"mic": {"source": "microphone"}, "mine": {"source": "lsl:X", "feeds": "turn_end"}}}, {}),
        ({"streams": {"eeg": {"source": "lsl:type=EEG", "feeds": "audio"}}}, {}),
    ],
)
def test_a_model_that_takes_it_gets_it_where_there_is_a_sound(table: dict[str, Any], expected: dict[str, str]) -> None:
    assert derived(table) == expected
    assert derived(table, ("audio", "text")) == {}


def test_what_is_pushed_needs_no_source() -> None:
    assert derived({}, pushed=True) == {"turn_end": "audio", "other_turn_end": "other_audio"}
    assert derived({"streams": {"mic": {"source": "push", "kind": "audio"}}}, pushed=True)["turn_end"] == "mic"


def test_a_stream_that_is_not_there_does_not_hold_ticks_back() -> None:
    for name, person in zip(BOTH, ("self", "other"), strict=True):
        row = Stream.of(name)
        assert (row.kind, row.dense, row.reduction, row.person) == ("signal", False, "last", person)


def test_samples_that_are_no_sound_are_counted() -> None:
    table = stream_table(config.parse({"streams": {"mic": {"source": "microphone"}, "t": {"source": "turn_end"}}}))
    source = DerivedSource(table["t"], table["mic"], Settings(), None)  # type: ignore[arg-type]
    source._subscriber = SimpleNamespace(gaps=SimpleNamespace(lost={}))  # type: ignore[assignment]
    assert source._read(Envelope(topics.raw("mic"), "live", 0, 1, 1, 1, np.zeros(3, np.float32))) == []
    assert (source.info["garbage"], source.info["pauses"], source.info["skipped"]) == (1, 0, 0)


# ---- Predictor and served sessions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that takes sound and the ends of turns."""
    audio, turn_end = encoders.create_encoder("audio"), encoders.create_encoder("turn_end")
    specs = [ModalitySpec("audio", audio.size, audio.origin)]
    specs += [ModalitySpec(name, 1, turn_end.origin) for name in BOTH]
    return toy_model.make(tmp_path_factory.mktemp("models") / "toy.onnx", tuple(specs))


def said(predictor: Predictor, predictions: list[Any]) -> list[tuple[float, float]]:
    """When a turn's end was there, and its number."""
    return [
        (round(predictor.at_s(p), 3), float(p.tick.features["turn_end"][0]))
        for p in predictions
        if p.tick.present["turn_end"]
    ]


@pytest.mark.slow
@pytest.mark.shared_data
def test_predictor_derives_it_in_any_chunks_and_goes_on_from_a_snapshot(taker: Path, clips: Path) -> None:
    sound = spoken(clips, "lwbsza.mpg", "sbwe5n.mpg")
    predictor = Predictor(str(taker))
    whole = predictor.push_audio(sound)
    logits = feed(TurnEnd("audio"), sound, [320])
    # in the tick of its own time
    assert said(predictor, whole) == [(-(-(ns - EPOCH_NS) // 40_000_000) * 0.04, logit) for ns, logit in logits]
    bits = [(p.tick.event_ns, p.tick.age_ns, [v.tobytes() for v in p.heads.values()]) for p in whole]
    half = len(sound) // 2 - 77
    predictor.reset()
    again = predictor.push_audio(sound[:1000]) + predictor.push_audio(sound[1000:half])
    other = Predictor(str(taker))
    other.restore(predictor.snapshot())
    for at in range(half, len(sound), 777):
        again += other.push_audio(sound[at : at + 777])
    assert [(p.tick.event_ns, p.tick.age_ns, [v.tobytes() for v in p.heads.values()]) for p in again] == bits
    assert not any(p.tick.present["other_turn_end"] for p in whole)
    assert other.push_audio(sound, stream="other_audio") == []
    assert other.counts["other_turn_end"].received == 2


def test_what_is_known_later_than_its_time_is_in_no_earlier_tick(taker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TurnEnd.derive

    def a_second_old(self: TurnEnd, sample: Sample) -> list[Sample]:
        return [msgspec.structs.replace(made, event_ns=made.event_ns - 10**9) for made in real(self, sample)]

    monkeypatch.setattr(turn_end_module, "SpeechDetector", Loudness)
    monkeypatch.setattr(turn_end_module, "SmartTurn", lambda: SimpleNamespace(logit=judge))
    monkeypatch.setattr(TurnEnd, "derive", a_second_old)
    sound = loud([(False, 50), (True, 10), (False, 50)])
    known_s = (60 + PAUSE_CHUNKS) * CHUNK / RATE
    predictor = Predictor(str(taker))
    [(at_s, _)] = said(predictor, predictor.push_audio(sound))
    assert known_s <= at_s <= known_s + 0.1


def test_predictor_takes_the_number_itself(taker: Path) -> None:
    predictor = Predictor(
        str(taker),
        settings=config.parse(
            {"streams": {"audio": {"source": "push", "kind": "audio"}, "turn_end": {"source": "push"}}}
        ),
    )
    predictor.push("turn_end", [2.5], 0.03)
    made = predictor.push_audio(np.zeros(RATE, np.int16))
    assert said(predictor, made) == [(0.04, 2.5)]
    assert made[4].tick.age_ns["turn_end"] == 170_000_000


def test_a_server_derives_nothing_unasked_and_refuses_what_takes_long(taker: Path) -> None:
    spec = read_contract(Graph(taker))
    quiet = SessionInput(spec, Settings(), "s", must_save=True)
    ticks = list(quiet.push(quiet.stream("audio"), np.zeros(RATE, np.int16), quiet.zero_ns + 10**9))
    assert not any(tick.present["turn_end"] for tick in ticks)
    assert [tick.present["audio"] for tick in ticks].count(True) >= 24
    assert len(quiet.snapshot()["encoder audio audio"]) < 10_000
    asked = config.parse(
        {"streams": {"audio": {"source": "push", "kind": "audio"}, "turn_end": {"source": "turn_end"}}}
    )
    loud_one = SessionInput(spec, asked, "s", must_save=True)
    with pytest.raises(UsageError, match="turn_end cannot be served: turn_end would hold up other sessions"):
        list(loud_one.push(loud_one.stream("audio"), np.zeros(RATE, np.int16), loud_one.zero_ns + 10**9))


def test_a_chain_saves_each_part_under_a_name_of_its_own() -> None:
    encoder = DerivedEncoder(DerivationChain([simple(), simple()]), encoders.create_encoder("turn_end"))
    assert {name.partition(".")[0] for name in encoder.snapshot()} == {"derivation0", "derivation1"}
    encoder.restore(encoder.snapshot())


def test_no_tick_waits_for_it() -> None:
    """A stream that holds ticks back for its lateness would delay every prediction."""
    from stream_mmrnn.core.config import parse
    from stream_mmrnn.core.stream_table import stream_table, with_derived
    from stream_mmrnn.core.types import ModalitySpec
    from stream_mmrnn.predict.align import Aligner

    spec = (ModalitySpec("audio", 81), ModalitySpec("turn_end", 1), ModalitySpec("other_turn_end", 1))
    settings = with_derived(parse({"sources": {"audio": "synthetic"}}), [m.name for m in spec])
    row = stream_table(settings)["turn_end"]
    assert (row.dense, row.lateness_ns) == (False, 0)
    lateness_ns = Aligner.of(spec, 40_000_000, settings)._lateness_ns
    assert lateness_ns["audio"] > 0
    assert (lateness_ns["turn_end"], lateness_ns["other_turn_end"]) == (0, 0)
