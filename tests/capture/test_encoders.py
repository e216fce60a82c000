from __future__ import annotations

import importlib.util
import io
import itertools
import json
import logging
import wave
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import SHARED
from tokenizers import Tokenizer

from stream_mmrnn.capture import encoders
from stream_mmrnn.capture.encoders import tokens
from stream_mmrnn.capture.encoders.audio import SPEECH, AudioEncoder
from stream_mmrnn.capture.encoders.hops import HOP
from stream_mmrnn.capture.encoders.image import ImageEncoder, jpeg_size, shrink
from stream_mmrnn.capture.encoders.text import TextEncoder
from stream_mmrnn.capture.encoders.tokens import TokenEncoder
from stream_mmrnn.core.errors import ModelError, WireError
from stream_mmrnn.core.types import Sample

MS = 1_000_000
START = 5_000_000_000
DIALOGUE = SHARED / "data" / "clips" / "dialogue.wav"


@pytest.fixture(scope="module")
def audio() -> AudioEncoder:
    return AudioEncoder()


@pytest.fixture(scope="module")
def image() -> ImageEncoder:
    return ImageEncoder()


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return TextEncoder()


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 3000).astype(np.int16)


def blocks_of(sound: np.ndarray, cuts: list[int], start_ns: int = START) -> list[Sample]:
    edges = [0, *sorted(c for c in cuts if c < len(sound)), len(sound)]
    return [Sample(start_ns + b * 62_500, start_ns + b * 62_500, sound[a:b]) for a, b in itertools.pairwise(edges)]


def encode_all(encoder: encoders.Encoder, samples: list[Sample]) -> list[Sample]:
    encoder.reset()
    return [out for sample in samples for out in encoder.encode(sample)]


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    picture = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (width, height))
    return cv2.imencode(".jpg", picture)[1].tobytes()


@pytest.mark.slow
def test_every_encoder_has_an_origin_and_a_size() -> None:
    for modality, size in {"vision": 1280, "audio": 81, "text": 256}.items():
        encoder = encoders.create_encoder(modality)
        name, _, digest = encoder.origin.partition("@")
        assert encoder.size == size
        assert name
        assert len(digest) == 64


# --- sound


def test_hops_are_stamped_with_their_end(audio: AudioEncoder) -> None:
    out = encode_all(audio, blocks_of(noise(1000), [333, 700]))
    assert [s.event_ns for s in out] == [START + k * 20 * MS for k in (1, 2, 3)]
    assert out[0].capture_ns == START + 333 * 62_500
    assert all(s.data.dtype == np.float32 and s.data.shape == (81,) for s in out)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3200), max_size=12), st.integers(1, 3200))
def test_vectors_do_not_depend_on_the_block_length(cuts: list[int], length: int) -> None:
    encoder = _shared_audio()
    sound = noise(length)
    whole = encode_all(encoder, blocks_of(sound, []))
    parts = encode_all(encoder, blocks_of(sound, cuts))
    assert [s.event_ns for s in parts] == [s.event_ns for s in whole]
    assert len(whole) == length // HOP
    for a, b in zip(whole, parts, strict=True):
        assert a.data.tobytes() == b.data.tobytes()


_kept: list[AudioEncoder] = []


def _shared_audio() -> AudioEncoder:
    if not _kept:
        _kept.append(AudioEncoder())
    return _kept[0]


def test_after_a_gap_hops_start_at_the_next_sample(audio: AudioEncoder) -> None:
    sound = noise(960)
    audio.reset()
    audio.encode(Sample(START + 15 * MS, START, sound[:240]))
    late = START + 15 * MS + 35 * MS  # 20 ms are missing before this block
    out = audio.encode(Sample(late + 5 * MS, START, sound[:320]))
    assert [s.event_ns for s in out] == [late + 5 * MS]
    alone = encode_all(audio, [Sample(late + 5 * MS, START, sound[:320])])
    assert out[0].data.tobytes() == alone[0].data.tobytes()


def test_jitter_of_the_stamps_is_no_gap(audio: AudioEncoder) -> None:
    sound = noise(640)
    audio.reset()
    assert audio.encode(Sample(START, START, sound[:240])) == []
    out = audio.encode(Sample(START + 28 * MS, START, sound[240:640]))  # 3 ms late by its stamp
    assert [s.event_ns for s in out] == [START + 8 * MS, START + 28 * MS]


def test_time_that_goes_back_resets_the_state(audio: AudioEncoder) -> None:
    sound = noise(16_000)
    fresh = encode_all(audio, blocks_of(sound, []))
    audio.encode(Sample(START + 20_000 * MS, START, sound[:100]))
    again = [out for s in blocks_of(sound, []) for out in audio.encode(s)]
    assert [a.data.tobytes() for a in again] == [f.data.tobytes() for f in fresh]


def test_silence_and_full_scale_stay_in_range(audio: AudioEncoder) -> None:
    tone = (32767 * np.sin(np.arange(3200) * 2 * np.pi * 440 / 16_000)).astype(np.int16)
    for sound in (np.zeros(3200, np.int16), tone, np.full(3200, -32768, np.int16)):
        out = np.array([s.data for s in encode_all(audio, blocks_of(sound, []))])
        assert np.isfinite(out).all()
        assert out[:, :80].min() >= -1
        assert out[:, :80].max() <= 1.01
        assert out[:, SPEECH].max() < 0.5


@pytest.mark.parametrize("data", [b"xx", np.zeros(10, np.float32), np.zeros((10, 2), np.int16)])
def test_sound_of_another_type_is_rejected(audio: AudioEncoder, data: object) -> None:
    with pytest.raises(WireError):
        audio.encode(Sample(0, 0, data))  # type: ignore[arg-type]


@pytest.mark.shared_data
@pytest.mark.skipif(not DIALOGUE.exists(), reason="needs the data folder beside the checkout")
def test_speech_is_detected(audio: AudioEncoder) -> None:
    with wave.open(io.BytesIO(DIALOGUE.read_bytes())) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    out = encode_all(audio, blocks_of(sound, list(range(0, len(sound), 320))))
    speech = np.array([s.data[SPEECH] for s in out])
    assert speech[:300].mean() < 0.2  # no speech before 6.7 s
    assert speech[450:1200].mean() > 0.7


# --- pictures


def test_a_picture_keeps_its_times(image: ImageEncoder) -> None:
    (out,) = image.encode(Sample(7, 9, jpeg(320, 240)))
    assert (out.event_ns, out.capture_ns) == (7, 9)
    assert out.data.shape == (1280,)
    assert np.isfinite(out.data).all()
    assert out.data.min() >= 0
    assert out.data.max() <= 6


@pytest.mark.parametrize(("width", "height"), [(64, 48), (320, 240), (640, 480), (1280, 720), (1920, 1080)])
def test_reduced_decoding_sees_the_same_picture(image: ImageEncoder, width: int, height: int) -> None:
    data = jpeg(width, height)
    assert jpeg_size(data) == (width, height)
    (out,) = image.encode(Sample(0, 0, data))
    (again,) = image.encode(Sample(0, 0, data))
    assert out.data.tobytes() == again.data.tobytes()
    full = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    expected = cv2.resize(full, (128, 128), interpolation=cv2.INTER_AREA)
    assert np.abs(shrink(data).astype(int) - expected).mean() < 3


def test_bytes_that_are_no_picture_are_rejected(image: ImageEncoder) -> None:
    png = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    huge = bytearray(jpeg(64, 64))
    at = huge.index(b"\xff\xc0")
    huge[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    for data in (
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xff\xff",
        jpeg(64, 64)[:180],
        png,
        bytes(huge),
        np.zeros(4),
    ):
        with pytest.raises(WireError):
            image.encode(Sample(0, 0, data))


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_have_a_size_or_none(data: bytes) -> None:
    for candidate in (data, b"\xff\xd8" + data, b"\xff\xd8\xff" + data):
        size = jpeg_size(candidate)
        assert size is None or min(size) >= 0


# --- text


@pytest.mark.slow
def test_text_is_the_mean_of_wordllamas_vectors(text: TextEncoder) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    wordllama = pytest.importorskip("wordllama")  # its import sets up logging: put it back
    root.handlers[:], root.level = handlers, level
    model = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
    for line in ("hello there", "seven", "Antidisestablishmentarianism, zxqv!", "日本 😀", "a b " * 500):
        (out,) = text.encode(Sample(3, 4, line.encode()))
        assert (out.event_ns, out.capture_ns) == (3, 4)
        np.testing.assert_allclose(out.data, model.embed(line)[0], rtol=0, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_have_a_vector(data: bytes) -> None:
    encoder = _shared_text()
    (out,) = encoder.encode(Sample(0, 0, data))
    assert out.data.shape == (256,)
    assert out.data.dtype == np.float32
    assert np.isfinite(out.data).all()
    assert out.data.any() or not data


_kept_text: list[TextEncoder] = []


def _shared_text() -> TextEncoder:
    if not _kept_text:
        _kept_text.append(TextEncoder())
    return _kept_text[0]


def test_no_text_is_zeros(text: TextEncoder) -> None:
    assert not text.encode(Sample(0, 0, b""))[0].data.any()
    with pytest.raises(WireError):
        text.encode(Sample(0, 0, np.zeros(3)))


def test_damaged_word_vectors_are_one_sentence() -> None:
    for damaged in (b"", b"{}", bytes(100)):
        with pytest.raises(ModelError, match="install it again"):
            TextEncoder(read=lambda _, data=damaged: data)


# --- tokens


@pytest.fixture(scope="module")
def token_encoder() -> TokenEncoder:
    return TokenEncoder()


def test_tokens_are_the_numbers_of_wordllamas_tokenizer(token_encoder: TokenEncoder) -> None:
    spec = importlib.util.find_spec("wordllama")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    table = Tokenizer.from_file(str(Path(spec.submodule_search_locations[0]) / tokens.TABLE))
    for line in ("hello", "Hello there", "unbelievably good", "日本 😀", "", "we saw a fox"):
        (out,) = token_encoder.encode(Sample(3, 4, line.encode()))
        assert (out.event_ns, out.capture_ns, out.data.dtype) == (3, 4, np.float32)
        ids = [i + 1 for i in table.encode(line, add_special_tokens=False).ids]
        assert out.data.tolist() == [*ids, *[0] * (8 - len(ids))]


def test_of_a_long_text_the_last_tokens_are_kept(token_encoder: TokenEncoder) -> None:
    words = "one two three four five six seven eight nine ten"
    (whole,) = token_encoder.encode(Sample(0, 0, words.encode()))
    (end,) = token_encoder.encode(Sample(0, 0, b"three four five six seven eight nine ten"))
    assert whole.data.tolist() == end.data.tolist()
    assert end.data.all()


def test_tokens_need_the_table_and_not_the_vectors(token_encoder: TokenEncoder) -> None:
    read: list[Path] = []

    def reading(file: Path) -> bytes:
        read.append(file)
        return tokens.read(file)

    assert TokenEncoder(reading).origin == token_encoder.origin
    assert read == [tokens.TABLE]
    name, _, digest = token_encoder.origin.partition("@")
    assert (name, len(digest), token_encoder.size) == ("tokens-l2-supercat", 64, 8)
    pretty = json.dumps(json.loads(tokens.read(tokens.TABLE)), indent=3).encode()
    assert TokenEncoder(lambda _: pretty).origin == token_encoder.origin, "the layout of the table does not matter"
    with pytest.raises(ModelError, match="install it again"):
        TokenEncoder(lambda _: b"{}")
    with pytest.raises(WireError):
        token_encoder.encode(Sample(0, 0, np.zeros(3)))


def test_a_missing_package_or_file_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for encoder in (TextEncoder, TokenEncoder):
        with pytest.raises(ModelError, match="install wordllama"):
            encoder()
    with pytest.raises(ModelError):
        AudioEncoder(tmp_path)
