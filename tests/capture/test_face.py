"""The encoder of faces: what it says of real faces, whom it follows, and what it says where there is none."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import av
import cv2
import msgspec
import numpy as np
import pytest
import toy_model
from hypothesis import given, settings
from hypothesis import strategies as st
from places import SHARED

from stream_mmrnn.capture import encoders
from stream_mmrnn.capture.encoders import face_measures
from stream_mmrnn.capture.encoders.face import (
    CONFIDENCE,
    EYES_CLOSED,
    LIPS,
    MOUTH,
    MOUTH_CHANGE,
    POSE,
    PRESENT,
    SIZE,
    FaceEncoder,
)
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import SnapshotError, UsageError, WireError
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import FloatArray, ModalitySpec, Sample
from stream_mmrnn.offline.predictor import Predictor

FRAME_NS = 40_000_000
START_NS = 7_000_000_000
GRID = SHARED / "data" / "grid_s1"


@pytest.fixture(scope="module")
def encoder() -> FaceEncoder:
    return FaceEncoder()


def jpeg(picture: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


@cache
def pictures(clip: Path) -> list[np.ndarray]:
    with av.open(str(clip)) as container:
        return [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]


def encode(encoder: FaceEncoder, shown: Iterable[bytes | np.ndarray], start_ns: int = START_NS) -> FloatArray:
    """The vectors of pictures at 25 a second, [pictures, SIZE]."""
    found = []
    for k, picture in enumerate(shown):
        data = picture if isinstance(picture, bytes) else jpeg(picture)
        (made,) = encoder.encode(Sample(start_ns + k * FRAME_NS, start_ns, data))
        found.append(made.data)
    vectors = np.array(found)
    assert vectors.dtype == np.float32
    assert vectors.shape[1] == SIZE
    assert np.isfinite(vectors).all()
    return vectors


def fresh(encoder: FaceEncoder, shown: Iterable[bytes | np.ndarray]) -> FloatArray:
    encoder.reset()
    return encode(encoder, shown)


def drawn() -> np.ndarray:
    """A room: a wall, a window, a box; no face."""
    room = np.full((240, 320, 3), (150, 170, 180), np.uint8)
    cv2.rectangle(room, (40, 30), (130, 110), (240, 220, 190), -1)
    cv2.rectangle(room, (200, 140), (290, 230), (60, 80, 120), -1)
    return room


# ---- where there is no face ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "picture",
    [
        drawn(),
        np.zeros((480, 640, 3), np.uint8),
        np.random.default_rng(0).integers(0, 256, (360, 288, 3)).astype(np.uint8),
        np.full((1, 1, 3), 200, np.uint8),
        np.full((3, 1000, 3), 90, np.uint8),
    ],
    ids=["room", "black", "noise", "one pixel", "a line"],
)
def test_without_a_face_the_vector_is_zero_and_each_picture_is_searched(
    encoder: FaceEncoder, picture: np.ndarray
) -> None:
    before = encoder.detections
    assert not fresh(encoder, [picture] * 3).any()
    assert encoder.detections == before + 3


def test_a_picture_keeps_its_times(encoder: FaceEncoder) -> None:
    (made,) = encoder.encode(Sample(7, 9, jpeg(drawn()), 5))
    assert (made.event_ns, made.capture_ns, made.device_ns) == (7, 9, 5)


def test_what_is_no_picture_is_rejected(encoder: FaceEncoder) -> None:
    whole = jpeg(drawn())
    for data in (b"", b"\xff\xd8", b"GIF89a" + bytes(100), whole[:200], np.zeros(3, np.int16)):
        with pytest.raises(WireError, match="picture"):
            encoder.encode(Sample(0, 0, data))


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=40))
def test_damaged_bytes_are_a_vector_or_one_kind_of_error(at: int, junk: bytes) -> None:
    data = bytearray(jpeg(drawn()))
    at %= len(data)
    data[at : at + len(junk)] = junk
    try:
        (made,) = _shared().encode(Sample(START_NS, START_NS, bytes(data)))
    except WireError:
        return
    assert np.isfinite(made.data).all()


@cache
def _shared() -> FaceEncoder:
    return FaceEncoder()


def test_it_is_an_encoder_of_pictures_alone() -> None:
    made = encoders.create_encoder("face")
    assert made.origin.startswith("face@")
    assert made.size == SIZE
    table = {"cam": {"source": "camera:0", "encoders": ["vision", "face"]}}
    row = stream_table(config.parse({"streams": table}))["cam"]
    encoders.check_all([row])
    assert set(encoders.encoders_of(row)) == {"cam", "cam.face"}
    sound = msgspec.structs.replace(Stream.of("audio", source="microphone"), encoders=("face",))
    with pytest.raises(UsageError, match="'face', which is not known; use one of audio"):
        encoders.check_all([sound])


# ---- the state -------------------------------------------------------------------------------------------------------


def test_a_snapshot_that_does_not_fit_is_refused(encoder: FaceEncoder) -> None:
    encoder.reset()
    good = encoder.snapshot()
    wrong = [
        {},
        {**good, "more": np.zeros(1)},
        {**good, "mouth": np.zeros(5, np.float32)},
        {**good, "mouth": np.full(4, np.nan, np.float32)},
        {**good, "known": good["known"].astype(np.int32)},
        {**good, "known": np.array([1, 0, 640, 480])},  # a face without a region
        {**good, "known": np.array([1, 0, 640, 480]), "region": np.array([9.0, 9.0, np.inf, 0.0])},
    ]
    for state in wrong:
        with pytest.raises(SnapshotError):
            encoder.restore(state)
    encoder.restore(good)


@pytest.mark.slow
@settings(max_examples=6)
@given(at=st.integers(0, 30))
def test_another_encoder_continues_from_a_snapshot_with_the_same_bits(at: int) -> None:
    shown = _with_a_gap()
    whole = fresh(_shared(), shown)
    first, other = FaceEncoder(), FaceEncoder()
    before = encode(first, shown[:at]) if at else np.empty((0, SIZE), np.float32)
    encode(other, shown[20:23])
    other.restore(first.snapshot())
    after = encode(other, shown[at:], START_NS + at * FRAME_NS)
    assert np.concatenate([before, after]).tobytes() == whole.tobytes()


def _with_a_gap() -> list[bytes]:
    """31 pictures: a person, nobody for three pictures, then the same person."""
    clip = SHARED / "data" / "clips" / "sbwe5n.mpg"
    if not clip.exists():
        pytest.skip("the shared data folder is not beside this checkout")
    shown = [jpeg(picture) for picture in pictures(clip)[20:51]]
    shown[12:15] = [jpeg(np.zeros((288, 360, 3), np.uint8))] * 3
    return shown


@pytest.mark.slow
def test_a_predictor_continues_from_a_snapshot_with_the_same_bits(tmp_path: Path) -> None:
    shown = _with_a_gap()
    model = toy_model.make(tmp_path / "toy.onnx", (ModalitySpec("vision", SIZE, _shared().origin),))
    table = {"vision": {"source": "push", "kind": "vision", "encoders": ["face"]}}

    def predictor() -> Predictor:
        return Predictor(model, settings=config.parse({"streams": table}), inputs=["vision"])

    def push(to: Predictor, first: int, last: int) -> list[bytes]:
        made = [q for k in range(first, last) for q in to.push_frame(shown[k], (k + 1) * 0.04)]
        return [q.heads["next"].tobytes() for q in made]

    whole = push(predictor(), 0, 31)
    one, other = predictor(), predictor()
    before = push(one, 0, 8)
    other.restore(one.snapshot())
    assert len(set(whole)) > 20
    assert before + push(other, 8, 31) == whole


@pytest.mark.slow
def test_the_detector_runs_only_where_there_is_no_face_to_follow(encoder: FaceEncoder) -> None:
    shown = _with_a_gap()
    before = encoder.detections
    vectors = fresh(encoder, shown)
    assert vectors[:, PRESENT].tolist() == [1] * 12 + [0] * 3 + [1] * 16
    assert encoder.detections - before == 1 + 3 + 1
    assert not vectors[[0, 15], MOUTH_CHANGE].any(), "the picture before showed no face"
    change = (vectors[16, MOUTH] - vectors[15, MOUTH]) * 25
    assert vectors[16, MOUTH_CHANGE] == pytest.approx(change, abs=1e-3)
    # a second in which nothing came: the face of before may be anywhere
    encode(encoder, shown[:1], START_NS + 10**11)
    assert encoder.detections - before == 6


# ---- what is said of a face ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bbaf2n", "brbk7n", "lbax4n", "lbbc2a", "lwbsza", "sbwe5n", "speech"])
def test_the_face_of_a_real_clip_is_found_and_its_mouth_moves(encoder: FaceEncoder, clips: Path, name: str) -> None:
    vectors = fresh(encoder, pictures(clips / f"{name}.{'mp4' if name == 'speech' else 'mpg'}"))
    assert vectors[:, PRESENT].mean() >= 0.98
    assert vectors[:, CONFIDENCE].mean() > 0.9
    mouth = vectors[:, MOUTH]
    opening, width = mouth[:, 0], mouth[:, 1]
    assert np.percentile(opening, 95) > opening.min() + 0.04
    assert (width > 0.3).all()
    assert (width < 0.8).all()
    assert (mouth[:, 2:] > mouth[:, :2]).all(), "the outer line is outside the inner one"
    assert (np.abs(vectors[:, POSE]) < 0.7).all(), "they look into the camera"
    assert (vectors[:, EYES_CLOSED].mean(0) < 0.5).all()


@pytest.mark.slow
@pytest.mark.shared_data
def test_mouths_are_wider_open_and_move_more_in_speech(encoder: FaceEncoder) -> None:
    clips = sorted(GRID.glob("*.mpg"))[:4]
    if not clips:
        pytest.skip("the shared data folder is not beside this checkout")
    opening: dict[bool, list[float]] = {False: [], True: []}
    motion: dict[bool, list[float]] = {False: [], True: []}
    for clip in clips:
        vectors = fresh(encoder, pictures(clip))
        words = [line.split() for line in clip.with_suffix(".align").read_text().splitlines()]
        spoken = [(int(a) / 1000, int(b) / 1000) for a, b, word in words if word not in ("sil", "sp")]
        for k, vector in enumerate(vectors):
            speaks = any(a <= k + 0.5 < b for a, b in spoken)
            opening[speaks].append(vector[MOUTH][0])
            motion[speaks].append(np.abs(vector[MOUTH_CHANGE]).sum())
    assert np.mean(opening[True]) > 1.5 * np.mean(opening[False])
    assert np.mean(motion[True]) > 1.5 * np.mean(motion[False])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "roll", "x", "y"),
    [(1.0, 0.0, 25, -12), (1.5, 0.0, 0, 0), (0.8, 0.0, 10, 0), (1.0, 0.35, 0, 0), (1.3, -0.5, -20, 10)],
)
def test_shift_scale_and_roll_of_the_picture_are_removed(
    encoder: FaceEncoder, clips: Path, scale: float, roll: float, x: int, y: int
) -> None:
    picture = pictures(clips / "lbax4n.mpg")[40]
    height, width = picture.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), -np.degrees(roll), scale)
    turn[:, 2] += (x, y)
    other = cv2.warpAffine(picture, turn, (width, height), borderMode=cv2.BORDER_REPLICATE)
    plain, moved = fresh(encoder, [picture] * 3)[-1], fresh(encoder, [other] * 3)[-1]
    assert moved[PRESENT] == 1
    for part, tolerance in ((LIPS, 0.03), (MOUTH, 0.03), (EYES_CLOSED, 0.12)):
        assert moved[part] == pytest.approx(plain[part], abs=tolerance)
    assert moved[POSE] == pytest.approx(plain[POSE] + [0, 0, roll], abs=0.08)


@pytest.mark.slow
def test_a_picture_decoded_at_a_reduced_size_says_the_same(encoder: FaceEncoder, clips: Path) -> None:
    picture = pictures(clips / "lbax4n.mpg")[40]
    plain = fresh(encoder, [picture] * 2)[-1]
    for times in (2, 4):
        large = cv2.resize(picture, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)
        assert fresh(encoder, [large] * 2)[-1][LIPS] == pytest.approx(plain[LIPS], abs=0.03)


turns = st.floats(-0.6, 0.6)


@given(turns, turns, turns, st.floats(5, 500), st.floats(-1000, 1000))
def test_the_pose_of_the_canonical_face_is_the_rotation_that_it_was_given(
    yaw: float, pitch: float, roll: float, scale: float, shift: float
) -> None:
    """Rotations in the order roll, yaw, pitch; x to the right, y up, z to the camera."""
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch, roll))
    lean = np.array([[cr, sr, 0], [-sr, cr, 0], [0, 0, 1]])
    side = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    up = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    face = face_measures._CANONICAL
    points = np.zeros((468, 3))
    for turn, expected in ((side, (yaw, 0, 0)), (up, (0, pitch, 0)), (lean, (0, 0, roll))):
        points[face_measures._RIGID_POINTS] = (face @ turn.T) * [1, -1, -1] * scale + shift
        assert face_measures.head_pose(points) == pytest.approx(expected, abs=1e-4)
    points[face_measures._RIGID_POINTS] = (face @ (lean @ side @ up).T) * [1, -1, -1] * scale + shift
    assert np.isfinite(face_measures.head_pose(points)).all()


@given(st.floats(-3, 3), st.floats(0.1, 10), st.floats(-500, 500))
def test_measures_of_points_do_not_depend_on_shift_scale_and_roll(roll: float, scale: float, shift: float) -> None:
    points = np.random.default_rng(3).normal(size=(468, 3)) * 100
    turn = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    moved = (points @ turn.T) * scale + [shift, -shift, 0]
    for measure in (face_measures.lips, face_measures.mouth, face_measures.eyes_closed):
        assert measure(moved) == pytest.approx(measure(points), rel=1e-3, abs=1e-3)
