"""UCI HAPT: accelerometer and gyroscope of a phone at the waist, 50 Hz, with activities and postural transitions.

Reyes-Ortiz, Oneto, Sama, Parra and Anguita, "Transition-aware human activity recognition using smartphones", 2016
(UCI 341). The published folder or zip (RawData/acc_expXX_userYY.txt, gyro_expXX_userYY.txt, labels.txt) and a packed
.npz (one array `uSS_eN` [samples, 8] a recording: six signals, sample number, label) give the same result.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.types import FloatArray
from stream_mmrnn.training.datasets.files import complete, files, reason, table

LabelArray = npt.NDArray[np.int8]

RATE_HZ = 50
SIGNALS = ("acc x", "acc y", "acc z", "gyro x", "gyro y", "gyro z")
"""In g and rad/s."""
ACTIVITIES = {
    1: "walking",
    2: "walking upstairs",
    3: "walking downstairs",
    4: "sitting",
    5: "standing",
    6: "laying",
    7: "stand to sit",
    8: "sit to stand",
    9: "sit to lie",
    10: "lie to sit",
    11: "stand to lie",
    12: "lie to stand",
}
NONE = -1
"""The label of unlabelled samples."""
TEST_SUBJECTS = frozenset((2, 4, 9, 10, 12, 13, 18, 20, 24))
"""The official test subjects, the same as in UCI HAR (Anguita et al., 2013). With this split, windows of 128 samples,
overlapping by half, inside each labelled segment give the 7,767 + 3,162 rows of the published features."""

_ARRAY = re.compile(r"u(\d+)_e(\d+)")
_SIGNAL = re.compile(r"(?:^|/)(acc|gyro)_exp(\d+)_user(\d+)\.txt$")
_LABELS = re.compile(r"(?:^|/)labels\.txt$")


class HaptRecording(msgspec.Struct, frozen=True, gc=False, eq=False):
    subject: int
    index: int
    """Index among the recordings of the subject, from 0."""
    signals: FloatArray
    """[N, 6], as in SIGNALS."""
    labels: LabelArray
    """[N]: 1 to 12, or NONE."""


def load(path: Path) -> list[HaptRecording]:
    """All recordings, by subject and index.

    Raises:
        FileError: a file is missing or damaged, or a label does not fit the signals.

    """
    recordings = _packed(path) if path.is_file() and path.suffix == ".npz" else _published(path)
    indices: dict[int, list[int]] = defaultdict(list)
    for recording in recordings:
        indices[recording.subject].append(recording.index)
    for subject, numbers in indices.items():
        complete(str(path), f"subject {subject}'s recording", numbers)
    return sorted(recordings, key=lambda r: (r.subject, r.index))


def official_split(recordings: Iterable[HaptRecording]) -> tuple[list[HaptRecording], list[HaptRecording]]:
    """Train and test; no subject is in both."""
    both: tuple[list[HaptRecording], list[HaptRecording]] = [], []
    for recording in recordings:
        both[recording.subject in TEST_SUBJECTS].append(recording)
    return both


def _packed(path: Path) -> list[HaptRecording]:
    recordings = []
    for file, raw in files(path, lambda name: name.endswith(".npy")):
        name = file.removesuffix(".npy")
        try:
            array = np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
        except ValueError as e:
            raise FileError(f"the array {path}/{name} cannot be read ({reason(e)}); fetch it again") from e
        recordings.append(_unpacked(f"{path}/{name}", name, array))
    if not recordings:
        raise FileError(f"the file {path} is empty, expected arrays `uSS_eN`; fetch it again")
    return recordings


def _unpacked(where: str, name: str, rows: npt.NDArray[np.float32]) -> HaptRecording:
    match = _ARRAY.fullmatch(name)
    if match is None or rows.ndim != 2 or rows.shape[1] != 8 or rows.dtype.kind != "f" or not np.isfinite(rows).all():
        raise FileError(
            f"the array {where} is {rows.dtype} {rows.shape}, expected finite `uSS_eN` [samples, 8]; fetch it again"
        )
    if not np.array_equal(rows[:, 6], np.arange(len(rows))):
        raise FileError(f"the array {where} has gaps in its sample numbers; fetch it again")
    if not np.isin(rows[:, 7], (NONE, *ACTIVITIES)).all():
        raise FileError(f"the array {where} has labels other than -1 and 1 to 12; fetch it again")
    labels = rows[:, 7].astype(np.int8)
    if (labels == NONE).all():
        raise FileError(f"the array {where} has no labels; fetch it again")
    return HaptRecording(int(match[1]), int(match[2]), np.ascontiguousarray(rows[:, :6], np.float32), labels)


def _published(path: Path) -> list[HaptRecording]:
    signals: dict[tuple[int, int], dict[str, FloatArray]] = defaultdict(dict)
    rows: npt.NDArray[np.float64] | None = None
    for name, raw in files(path, lambda name: bool(_SIGNAL.search(name) or _LABELS.search(name))):
        where = f"{path}/{name}"
        if match := _SIGNAL.search(name):
            signals[int(match[3]), int(match[2])][match[1]] = table(where, raw, 3).astype(np.float32)
        else:
            rows = table(where, raw, 5)
    if rows is None or not signals:
        raise FileError(
            f"{path} holds no RawData with acc_expXX_userYY.txt and labels.txt; give the unpacked HAPT folder"
        )
    counts: dict[int, int] = defaultdict(int)
    recordings = {}
    for subject, experiment in sorted(signals):  # experiment numbers are unique across subjects
        what = f"exp{experiment:02}_user{subject:02}"
        both = signals[subject, experiment]
        if both.keys() != {"acc", "gyro"} or len(both["acc"]) != len(both["gyro"]):
            raise FileError(
                f"{path} has acc_{what}.txt and gyro_{what}.txt missing or of different lengths; fetch them again"
            )
        joined = np.hstack((both["acc"], both["gyro"]))
        labels = np.full(len(joined), NONE, np.int8)
        recordings[experiment, subject] = HaptRecording(subject, counts[subject], joined, labels)
        counts[subject] += 1
    _label(f"{path}: labels.txt", recordings, rows)
    return list(recordings.values())


def _label(where: str, recordings: dict[tuple[int, int], HaptRecording], rows: npt.NDArray[np.float64]) -> None:
    """Rows of experiment, subject, activity, first sample, last sample (inclusive)."""
    for line, row in enumerate(rows, start=1):
        experiment, subject, activity, first, last = (int(v) for v in row)
        recording = recordings.get((experiment, subject))
        if recording is None:
            raise FileError(
                f"{where} labels exp{experiment:02}_user{subject:02} in line {line}, whose signals are not there; "
                "fetch them again"
            )
        if activity not in ACTIVITIES or not 0 <= first <= last < len(recording.labels):
            raise FileError(
                f"{where} has activity {activity} from sample {first} to {last} in line {line}, expected 1 to 12 "
                f"within {len(recording.labels)} samples; fetch it again"
            )
        recording.labels[first : last + 1] = activity
    for (experiment, subject), recording in recordings.items():
        if (recording.labels == NONE).all():
            raise FileError(f"{where} has no label for exp{experiment:02}_user{subject:02}; fetch it again")
