"""Loaders of published data sets, on small complete and damaged files in each layout, and on the real data."""

from __future__ import annotations

import gzip
import itertools
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dataset_files import Tree, idx, riff, tar, write, zipped
from places import SHARED

from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.training.datasets import fsdd, hapt, imdb, mnist, polarity, switchboard, timit
from stream_mmrnn.training.datasets.audio import pcm, sphere_header
from stream_mmrnn.training.datasets.files import files


def refused(call: Callable[[], object]) -> str:
    """The message, checked to be one sentence that says what to do."""
    with pytest.raises(FileError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert not re.search(r"[.!?]\s+[A-Z]", message), message
    assert re.search(r"; (give|fetch|unpack|convert|keep|take)", message), message
    return message


@pytest.fixture(scope="module")
def data() -> Path:
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return folder


# files


def test_files_reads_a_folder_a_tar_and_a_zip_alike(tmp_path: Path) -> None:
    tree = {"a/1.txt": b"one", "a/2.bin": b"no", "b.txt": b"two"}
    places = [write(tmp_path / "f", tree), tar(tmp_path / "x.tar.xz", tree), zipped(tmp_path / "x.zip", tree)]
    for place in [*places, tar(tmp_path / "x.tgz", tree, "w:gz"), tar(tmp_path / "x.tar", tree, "w")]:
        assert dict(files(place, lambda name: name.endswith(".txt"))) == {"a/1.txt": b"one", "b.txt": b"two"}


def test_files_says_what_is_wrong_with_an_archive(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(100_000)

    def everything(path: Path) -> Callable[[], object]:
        return lambda: list(files(path, lambda _: True))

    assert "does not exist" in refused(everything(tmp_path / "none.tar"))
    (tmp_path / "noise.tar.xz").write_bytes(noise)
    assert "noise.tar.xz" in refused(everything(tmp_path / "noise.tar.xz"))
    for path in (
        tar(tmp_path / "x.tar.xz", {"a": noise}),
        tar(tmp_path / "x.tgz", {"a": noise}, "w:gz"),
        tar(tmp_path / "x.tar", {"a": noise}, "w"),
        zipped(tmp_path / "x.zip", {"a": noise}),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert path.name in refused(everything(path))
    changed = bytearray(zipped(tmp_path / "y.zip", {"a": noise}).read_bytes())
    changed[50_000] ^= 1
    (tmp_path / "y.zip").write_bytes(changed)
    assert "y.zip" in refused(everything(tmp_path / "y.zip"))


def test_files_leaves_links_alone(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert list(files(tmp_path / "x.tar", lambda _: True)) == []


# mnist


IMAGES = np.random.default_rng(1).integers(0, 256, (7, 28, 28), dtype=np.uint8)
LABELS = np.array([5, 0, 4, 1, 9, 2, 1], np.uint8)
MNIST = {
    "train-images-idx3-ubyte": idx(IMAGES),
    "train-labels-idx1-ubyte": idx(LABELS),
    "t10k-images-idx3-ubyte": idx(IMAGES[:3]),
    "t10k-labels-idx1-ubyte": idx(LABELS[:3]),
}


def test_mnist_reads_plain_gzipped_and_packed_files(tmp_path: Path) -> None:
    gz = {f"MNIST/raw/{name}.gz": gzip.compress(content) for name, content in MNIST.items()}
    packed = {f"package/data/{name}": content for name, content in MNIST.items()}
    dotted = {name.replace("-idx", ".idx"): content for name, content in MNIST.items()}
    places = [write(tmp_path / str(i), tree) for i, tree in enumerate((MNIST, gz, dotted))]
    for place in [*places, tar(tmp_path / "mnist.tgz", packed, "w:gz")]:
        for split, count in (("train", 7), ("test", 3)):
            images, labels = mnist.load(place, split)
            assert images.dtype == labels.dtype == np.uint8
            assert np.array_equal(images, IMAGES[:count])
            assert np.array_equal(labels, LABELS[:count])
    with pytest.raises(UsageError, match="train, test"):
        mnist.load(places[0], "val")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train-images-idx3-ubyte", idx(IMAGES)[:-1], "5487 values"),
        ("train-images-idx3-ubyte", idx(LABELS), "00000801"),
        ("train-images-idx3-ubyte", b"", "expected idx 00000803"),
        ("train-images-idx3-ubyte", idx(IMAGES[:, :, 1:]), "28 x 28"),
        ("train-images-idx3-ubyte", gzip.compress(idx(IMAGES))[:-20], "gzip"),
        ("train-labels-idx1-ubyte", idx(LABELS[:-1]), "6 labels for 7 images"),
        ("train-labels-idx1-ubyte", idx(LABELS + 1), "label 10"),
        ("train-labels-idx1-ubyte", b"<html>", "3c68746d"),
    ],
)
def test_mnist_refuses(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    folder = write(tmp_path, {**MNIST, name: content})
    message = refused(lambda: mnist.load(folder, "train"))
    assert says in message
    assert name in message
    assert len(mnist.load(folder, "test")[0]) == 3


def test_mnist_without_a_file(tmp_path: Path) -> None:
    folder = write(tmp_path, {k: v for k, v in MNIST.items() if k != "t10k-labels-idx1-ubyte"})
    assert "t10k-labels-idx1-ubyte" in refused(lambda: mnist.load(folder, "test"))


# sound


def sphere(samples: np.ndarray, order: str = "01", **changes: str) -> bytes:
    """A header as the LDC writes it; a change of "" removes the field."""
    fields = {
        "database_id": "-s5 TIMIT",
        "utterance_id": "-s8 cjf0_sa1",
        "channel_count": f"-i {1 if samples.ndim == 1 else samples.shape[1]}",
        "sample_count": f"-i {len(samples)}",
        "sample_rate": "-i 16000",
        "sample_n_bytes": "-i 2",
        "sample_byte_format": f"-s2 {order}",
        "sample_sig_bits": "-i 16",
    } | changes
    lines = "".join(f"{name} {value}\n" for name, value in fields.items() if value)
    header = f"NIST_1A\n   1024\n{lines}end_head\n".encode().ljust(1024)
    return header + samples.astype({"01": "<i2", "10": ">i2"}[order]).tobytes()


TONE = (10_000 * np.sin(np.arange(400) / 5)).astype(np.int16)


def test_sound_of_every_kind_is_the_same() -> None:
    for raw in (
        riff(TONE, 16_000),
        sphere(TONE),
        sphere(TONE, "10"),
        sphere(TONE) + b"\0\0\0",
        sphere(TONE, sample_coding="-s3 pcm"),
    ):
        rate, samples = pcm("x", raw)
        assert rate == 16_000
        assert samples.dtype == np.int16
        assert samples.dtype.isnative
        assert np.array_equal(samples, TONE)
    both = np.stack((TONE, -TONE), axis=1)
    assert np.array_equal(pcm("x", sphere(both)).samples, both)
    assert np.array_equal(pcm("x", riff(both)).samples, both)


def test_sphere_header_fields() -> None:
    raw = sphere(TONE, note="-s14 two\nlines, ok  ", gain="-r 0.5")
    size, fields = sphere_header("x", raw.replace(b"database_id", b"; a comment\ndatabase_id"))
    assert size == 1024
    assert fields["utterance_id"] == "cjf0_sa1"
    assert fields["note"] == "two\nlines, ok"
    assert fields["gain"] == "0.5"
    assert fields["sample_count"] == "400"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not a sound file"),
        (b"ID3 something", "not a sound file"),
        (riff(TONE)[:-10], "395 samples of 400"),
        (riff(TONE)[:20], "WAV"),
        (riff(TONE, width=1), "8 bits"),
        (riff(TONE)[:20] + b"\x07\0" + riff(TONE)[22:], "plain PCM"),
        (sphere(TONE)[:-10], "395 samples of 400"),
        (sphere(TONE)[:500], "cut off in its SPHERE header"),
        (sphere(TONE)[:10], "cut off in its SPHERE header"),
        (sphere(TONE).replace(b"end_head", b"end_haed"), "a wrong line"),
        (sphere(TONE).replace(b"end_head\n", b""), "end_head"),
        (sphere(TONE, note="-s5000 x"), "end_head"),
        (sphere(TONE, sample_count=""), "sample_count"),
        (sphere(TONE, sample_rate="-i x"), "sample_rate"),
        (sphere(TONE, sample_n_bytes="-i 1"), "1 bytes"),
        (sphere(TONE, sample_byte_format="-s1 1"), "`1`"),
        (sphere(TONE, sample_coding="-s26 pcm,embedded-shorten-v2.00"), "compressed with shorten"),
        (sphere(TONE, sample_byte_format="-s12 shortpack-v0"), "compressed with shortpack"),
        (sphere(TONE, sample_coding="-s4 ulaw"), "coded as ulaw"),
    ],
)
def test_sound_refuses(raw: bytes, says: str) -> None:
    message = refused(lambda: pcm("some/SA1.WAV", raw))
    assert says in message
    assert "some/SA1.WAV" in message


# fsdd

FSDD = {
    f"recordings/{d}_{s}_{i}.wav": riff(TONE[: 100 + i]) for d in (0, 7) for s in ("theo", "lucas") for i in range(12)
}


def test_fsdd_folder_and_archive(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", FSDD | {"README.md": b"", "metadata.py": b""})
    for place in (folder, tar(tmp_path / "fsdd.tar.xz", dict(reversed(FSDD.items())))):
        found = fsdd.load(place)
        assert [(r.speaker, r.digit, r.index) for r in found] == [
            (s, d, i) for s in ("lucas", "theo") for d in (0, 7) for i in range(12)
        ]
        assert all(np.array_equal(r.samples, TONE[: 100 + r.index]) for r in found)
    train, test = fsdd.official_split(found)
    assert {r.index for r in test} == set(range(5))
    assert {r.index for r in train} == set(range(5, 12))
    train, test = fsdd.speaker_split(found, ["theo"])
    assert {r.speaker for r in train} == {"lucas"}
    assert {r.speaker for r in test} == {"theo"}
    with pytest.raises(UsageError, match="lucas, theo"):
        fsdd.speaker_split(found, ["nobody"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recordings/7_theo_3.wav": b""}, "7_theo_3.wav"),
        ({"recordings/7_theo_3.wav": riff(TONE)[:-2]}, "399 samples of 400"),
        ({"recordings/7_theo_3.wav": riff(TONE, 16_000)}, "16000 Hz"),
        ({"recordings/7_theo_3.wav": riff(TONE[:0])}, "(0,)"),
        ({"recordings/seven.wav": riff(TONE)}, "DIGIT_SPEAKER_INDEX"),
        ({"recordings/7_theo_13.wav": riff(TONE)}, "7_theo recording 13 but not 12"),
        ({"copy/7_theo_3.wav": riff(TONE)}, "7_theo recording 3 twice"),
    ],
)
def test_fsdd_refuses(tmp_path: Path, changes: Tree, says: str) -> None:
    folder = write(tmp_path, FSDD | changes)
    assert says in refused(lambda: fsdd.load(folder))


def test_fsdd_needs_recordings(tmp_path: Path) -> None:
    assert "recordings/" in refused(lambda: fsdd.load(tmp_path))


# hapt


def motion(experiment: int, count: int = 60) -> np.ndarray:
    return np.random.default_rng(experiment).standard_normal((count, 6)).round(6)


def rows(values: np.ndarray) -> bytes:
    return "".join(" ".join(f"{v:.17g}" for v in row) + "\n" for row in values).encode()


def hapt_folder() -> Tree:
    tree = {
        "RawData/labels.txt": b"1 1 5 3 9\n1 1 7 10 20\n2 1 1 0 59\n3 2 12 58 59\n",
        "activity_labels.txt": b"1 WALKING\n",
    }
    for experiment, subject in ((1, 1), (2, 1), (3, 2)):
        what = f"exp{experiment:02}_user{subject:02}.txt"
        tree[f"RawData/acc_{what}"] = rows(motion(experiment)[:, :3])
        tree[f"RawData/gyro_{what}"] = rows(motion(experiment)[:, 3:])
    return tree


def hapt_arrays() -> dict[str, np.ndarray]:
    arrays = {}
    for name, experiment in (("u01_e0", 1), ("u01_e1", 2), ("u02_e0", 3)):
        labels = np.full(60, -1)
        for first, last, activity in {1: [(3, 9, 5), (10, 20, 7)], 2: [(0, 59, 1)], 3: [(58, 59, 12)]}[experiment]:
            labels[first : last + 1] = activity
        arrays[name] = np.column_stack((motion(experiment), np.arange(60), labels)).astype(np.float32)
    return arrays


def test_hapt_folder_zip_and_npz_are_the_same(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "hapt.npz", **hapt_arrays())
    packed = hapt.load(tmp_path / "hapt.npz")
    assert [(r.subject, r.index) for r in packed] == [(1, 0), (1, 1), (2, 0)]
    assert packed[0].labels.tolist() == [-1] * 3 + [5] * 7 + [7] * 11 + [-1] * 39
    assert packed[0].signals.shape == (60, 6)
    folder = write(tmp_path / "HAPT", hapt_folder())
    for place in (folder, zipped(tmp_path / "HAPT.zip", {f"HAPT/{k}": v for k, v in hapt_folder().items()})):
        for a, b in zip(packed, hapt.load(place), strict=True):
            assert (a.subject, a.index) == (b.subject, b.index)
            assert a.signals.dtype == b.signals.dtype == np.float32
            assert a.signals.tobytes() == b.signals.tobytes()
            assert a.labels.tobytes() == b.labels.tobytes()
    train, test = hapt.official_split(packed)
    assert {r.subject for r in train} == {1}
    assert {r.subject for r in test} == {2}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("labels.txt", None, "labels.txt"),
        ("labels.txt", b"", "empty"),
        ("labels.txt", b"1 1 5 3 9\n", "no label for exp02_user01"),
        ("labels.txt", b"1 1 13 3 9\n", "activity 13"),
        ("labels.txt", b"1 1 5 3 60\n", "line 1, expected 1 to 12 within 60 samples"),
        ("labels.txt", b"9 1 5 3 9\n", "exp09_user01"),
        ("labels.txt", b"1 1 5 3\n", "5 numbers"),
        ("acc_exp01_user01.txt", b"", "acc_exp01_user01.txt is empty"),
        ("acc_exp01_user01.txt", rows(motion(1)[:-1, :3]), "missing or of different lengths"),
        ("acc_exp01_user01.txt", rows(motion(1)[:, :3])[:-30], "acc_exp01_user01.txt"),
        ("acc_exp01_user01.txt", b"1 2 nan\n", "3 numbers"),
        ("acc_exp01_user01.txt", b"1 2 x\n", "3 numbers"),
        ("acc_exp01_user01.txt", b"\xff\xfe", "UTF-8"),
        ("gyro_exp01_user01.txt", None, "gyro_exp01_user01.txt"),
    ],
)
def test_hapt_refuses_a_folder(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    folder = write(tmp_path, hapt_folder())
    if content is None:
        (folder / "RawData" / name).unlink()
    else:
        (folder / "RawData" / name).write_bytes(content)
    assert says in refused(lambda: hapt.load(folder))


def test_hapt_refuses_arrays(tmp_path: Path) -> None:
    path = tmp_path / "hapt.npz"

    def saved(**changes: np.ndarray) -> str:
        np.savez(path, **(hapt_arrays() | changes))
        return refused(lambda: hapt.load(path))

    good = hapt_arrays()["u01_e0"]
    for column, value, says in (
        (0, np.nan, "finite"),
        (6, 7, "gaps"),
        (7, 13, "labels other than"),
        (7, 0, "labels other"),
    ):
        bad = good.copy()
        bad[5, column] = value
        assert says in saved(u01_e0=bad)
    silent = good.copy()
    silent[:, 7] = -1
    assert "no labels" in saved(u01_e0=silent)
    assert "u01_e0" in saved(u01_e0=good[:, :7])
    assert "u01_e0" in saved(u01_e0=good.astype("U8"))
    assert "uSS_eN" in saved(more=good)
    assert "u01_e0" in saved(u01_e0=np.array([{}]))  # pickled objects are refused
    assert "subject 1's recording 3 but not 2" in saved(u01_e3=good)
    path.write_bytes(path.read_bytes()[:-200])
    assert "hapt.npz" in refused(lambda: hapt.load(path))
    path.write_bytes(b"\x80\x04K\x01.")
    assert "hapt.npz" in refused(lambda: hapt.load(path))
    with path.open("wb") as file:
        np.save(file, good)
    assert "hapt.npz" in refused(lambda: hapt.load(path))
    np.savez(path)
    assert "empty" in refused(lambda: hapt.load(path))


# switchboard


def words(number: str, side: str, lines: list[tuple[float, float, str]]) -> tuple[str, bytes]:
    name = f"corpus/swb_ms98_transcriptions/{number[:2]}/{number}/sw{number}{side}-ms98-a-word.text"
    return name, "".join(f"sw{number}{side}-ms98-a-0001 {a:f} {b:f} {w}\n" for a, b, w in lines).encode()


A = [
    (0, 1, "[silence]"),
    (1, 1.5, "hi"),
    (1.5, 2, "thi[s]-"),
    (2.04, 3, "[laughter-is]"),
    (3, 3.5, "[laughter]"),
    (3.5, 4, "me"),
]
B = [(0, 2, "[noise]"), (2, 2, "<b_aside>"), (2, 2, "uh"), (2.5, 3, "[vocalized-noise]"), (3, 5.25, "okay_1")]
SWB = dict(
    [
        words("2001", "A", A),
        words("2001", "B", B),
        words("3946", "B", [(0, 2, "[silence]")]),
        words("3946", "A", [(0, 2, "yes")]),
        ("corpus/splits/train.txt", b"2001"),
        ("corpus/splits/val.txt", b"3946\n"),
        ("corpus/splits/test.txt", b"4642\n4644"),
        ("corpus/swb_ms98_transcriptions/20/2001/sw2001A-ms98-a-trans.text", b"sw2001A-ms98-a-0001 0 5 hi\n"),
    ]
)


def test_switchboard_folder_and_archive(tmp_path: Path) -> None:
    for place in (write(tmp_path / "f", SWB), tar(tmp_path / "swb.tar.xz", SWB)):
        corpus = switchboard.Switchboard(place)
        first, second = corpus.dialogues()
        assert (first.id, second.id, first.end_s) == ("2001", "3946", 5.25)
        assert first.a.words.token == ("hi", "thi[s]-", "[laughter-is]", "me")
        assert first.a.marks.token == ("[silence]", "[laughter]")
        assert first.a.words.start_s.tolist() == [1, 1.5, 2.04, 3.5]
        assert first.a.words.end_s.tolist() == [1.5, 2, 3, 4]
        assert first.b.marks.token == ("[noise]", "<b_aside>", "[vocalized-noise]")
        assert switchboard.voice(first.a).tolist() == [[1, 3], [3.5, 4]]
        assert switchboard.voice(first.a, join_s=0.01).tolist() == [[1, 2], [2.04, 3], [3.5, 4]]
        assert switchboard.voice(first.b).tolist() == [[3, 5.25]]  # a word without duration is not speech
        assert switchboard.voice(second.b).shape == (0, 2)
        assert corpus.splits() == {"train": ("2001",), "val": ("3946",), "test": ("4642", "4644")}
        assert [d.id for d in corpus.dialogues(corpus.splits()["val"])] == ["3946"]
        assert "4642" in refused(lambda corpus=corpus: list(corpus.dialogues(corpus.splits()["test"])))


def test_switchboard_is_lazy(tmp_path: Path) -> None:
    """The first dialogue is returned before a damaged one is read."""
    name, _ = words("3946", "A", [])
    stream = switchboard.Switchboard(tar(tmp_path / "swb.tar", SWB | {name: b"x"}, "w")).dialogues()
    assert next(stream).id == "2001"
    assert "sw3946A" in refused(lambda: next(stream))


@pytest.mark.parametrize(
    ("token", "word"),
    [
        ("hi", "hi"),
        ("um-hum", "um-hum"),
        ("thi[s]-", "thi"),
        ("w[ell]-", "w"),
        ("-[y]eah", "yeah"),
        ("-[a]noth[er]-", "anoth"),
        ("rinky[-dink]-", "rinky"),
        ("[laughter-yeah]", "yeah"),
        ("[laughter-w[ell]-]", "w"),
        ("[laughter-ba[ck]]-", "ba"),
        ("ammu[n]it[ion]-", "ammuit"),
        ("them_1", "them"),
        ("them_1's", "them's"),
        ("{antidrugs}", "antidrugs"),
        ("[famuel/family]", "family"),
        ("[Fo[me]-/Home]", "Fo"),
        ("[toof/two]-", "toof"),
        ("AT&T's", "AT&T's"),
        ("20/20", "20/20"),
        ("401K", "401K"),
    ],
)
def test_switchboard_spoken(token: str, word: str) -> None:
    assert switchboard.spoken(token) == word


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "damaged"),
        (words("2001", "A", A)[1][:-10], "damaged"),
        (words("2001", "B", A)[1], "sw2001A-..."),
        (words("2001", "A", A)[1].replace(b" hi", b""), "damaged"),
        (words("2001", "A", A)[1].replace(b"1.500000", b"1.x"), "not a number"),
        (words("2001", "A", A)[1].replace(b"1.500000", b"nan"), "back in time"),
        (words("2001", "A", [(0, 2, "a"), (1, 3, "b")])[1], "overlap"),
        (words("2001", "A", [(2, 1, "a")])[1], "back in time"),
        (b"\xff", "UTF-8"),
    ],
)
def test_switchboard_refuses(tmp_path: Path, content: bytes, says: str) -> None:
    name, _ = words("2001", "A", [])
    corpus = switchboard.Switchboard(write(tmp_path, SWB | {name: content}))
    message = refused(lambda: list(corpus.dialogues()))
    assert says in message
    assert "sw2001A-ms98-a-word.text" in message


def test_switchboard_without_a_file(tmp_path: Path) -> None:
    def without(name: str, **changes: bytes) -> switchboard.Switchboard:
        tree = {k: v for k, v in SWB.items() if name not in k} | changes
        return switchboard.Switchboard(tar(tmp_path / "swb.tar", tree, "w"))

    assert "sw2001B" in refused(lambda: list(without("2001B").dialogues()))
    assert "splits/val.txt" in refused(without("val.txt").splits)
    assert "ISIP" in refused(lambda: list(without("word").dialogues()))
    bad = switchboard.Switchboard(write(tmp_path / "a", SWB | {"corpus/splits/val.txt": b"<html>"}))
    assert "val.txt" in refused(bad.splits)
    twice = switchboard.Switchboard(write(tmp_path / "b", SWB | {"corpus/splits/val.txt": b"2001"}))
    assert "2001 twice" in refused(twice.splits)
    copied = {name.replace("corpus", "copy"): content for name, content in SWB.items()}
    assert "twice" in refused(lambda: list(switchboard.Switchboard(write(tmp_path / "c", SWB | copied)).dialogues()))


# timit


def timit_tree(sound: bytes | None = None) -> Tree:
    stems = ("TRAIN/DR1/FCJF0/SA1", "TRAIN/DR1/FCJF0/SX37", "TEST/DR4/MLLL0/SI648")
    tree = {"README.DOC": b"TIMIT"}
    for stem in stems:
        tree |= {
            f"TIMIT/{stem}.WAV": sound or sphere(TONE),
            f"TIMIT/{stem}.PHN": b"0 100 h#\n100 250 sh\n250 400 iy\n",
            f"TIMIT/{stem}.WRD": b"100 400 she\n",
            f"TIMIT/{stem}.TXT": b"0 410 She had your dark suit.\n",
        }
    return tree


def test_timit_sphere_and_riff_in_any_case(tmp_path: Path) -> None:
    lower = {name.lower(): content for name, content in timit_tree(riff(TONE, 16_000)).items()}
    copies = timit_tree() | {f"{n}.wav": riff(TONE, 16_000) for n in timit_tree() if n.endswith(".WAV")}
    only_copies = {n: c for n, c in copies.items() if not n.endswith(".WAV")}
    for i, tree in enumerate((timit_tree(), timit_tree(sphere(TONE, "10")), lower, copies, only_copies)):
        folder = write(tmp_path / str(i), tree)
        first, second = timit.utterances(folder, "train")
        assert (first.dialect, first.speaker, first.sentence, second.sentence) == (1, "fcjf0", "sa1", "sx37")
        assert np.array_equal(first.samples, TONE)
        assert first.phones[1] == timit.Segment(100, 250, "sh")
        assert first.words == (timit.Segment(100, 400, "she"),)
        assert first.text == "She had your dark suit."
        assert [u.speaker for u in timit.utterances(folder, "test")] == ["mlll0"]
    assert "mlll0" in timit.CORE_TEST
    assert (len(timit.CORE_TEST), len(timit.PHONES)) == (24, 61)


@pytest.mark.parametrize(
    ("ending", "content", "says"),
    [
        ("WAV", sphere(TONE)[:-2], "399 samples of 400"),
        ("WAV", sphere(TONE, sample_coding="-s26 pcm,embedded-shorten-v2.00"), "shorten"),
        ("WAV", sphere(TONE, sample_rate="-i 8000"), "8000 Hz"),
        ("PHN", None, "no .PHN"),
        ("WRD", None, "no .WRD"),
        ("TXT", None, "no .TXT"),
        ("PHN", b"", "empty"),
        ("PHN", b"0 100 h#\n100", "line 2"),
        ("PHN", b"0 100 h#\n100 90 sh\n", "line 2"),
        ("PHN", b"0 100 h#\n400 500 sh\n", "400 samples in line 2"),
        ("PHN", b"100 200 h#\n0 100 sh\n", "line 2"),
        ("PHN", b"0 100 xx\n", "`xx`"),
    ],
)
def test_timit_refuses(tmp_path: Path, ending: str, content: bytes | None, says: str) -> None:
    folder = write(tmp_path, timit_tree())
    path = folder / f"TIMIT/TRAIN/DR1/FCJF0/SA1.{ending}"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    message = refused(lambda: list(timit.utterances(folder, "train")))
    assert says in message
    assert "SA1" in message


def test_timit_needs_its_folders(tmp_path: Path) -> None:
    assert "TRAIN/DRn" in refused(lambda: list(timit.utterances(write(tmp_path, {"a.wav": b""}), "train")))
    assert "not a folder" in refused(lambda: list(timit.utterances(tmp_path / "a.wav", "train")))
    with pytest.raises(UsageError, match="train, test"):
        next(timit.utterances(tmp_path, "dev"))


# texts


def imdb_tree() -> Tree:
    tree = {"aclImdb/README": b"", "aclImdb/train/urls_pos.txt": b"http"}
    for split in ("train", "test"):
        for i in range(11):
            tree[f"aclImdb/{split}/pos/{i}_{7 + i % 4}.txt"] = f"fine<br />film {i}, caf\xe9".encode()
            tree[f"aclImdb/{split}/neg/{i}_{1 + i % 4}.txt"] = f"bad film {i}".encode()
    return tree | {f"aclImdb/train/unsup/{i}_0.txt": b"a film" for i in range(3)}


def test_imdb_folder_and_archive(tmp_path: Path) -> None:
    for place in (write(tmp_path, imdb_tree()), tar(tmp_path / "aclImdb_v1.tar.gz", imdb_tree(), "w:gz")):
        train = imdb.load(place, "train")
        assert [(r.positive, r.id) for r in train] == [(p, i) for p in (False, True) for i in range(11)]
        assert (train[-1].text, train[-1].rating) == ("fine<br />film 10, caf\xe9", 9)
        assert len(imdb.load(place, "test")) == 22
        assert [(r.positive, r.rating) for r in imdb.load(place, "unsup")] == [(None, 0)] * 3


@pytest.mark.parametrize(
    ("name", "new", "content", "says"),
    [
        ("pos/4_7.txt", None, b"", "review 5 but not 4"),
        ("pos/10_9.txt", None, b"", "11 negative and 10 positive"),
        ("pos/4_7.txt", "pos/4_2.txt", b"x", "7 to 10"),
        ("neg/4_1.txt", "neg/four.txt", b"x", "ID_RATING"),
        ("neg/4_1.txt", "neg/4_1.txt", b"\xe9 x", "UTF-8 at byte 0"),
        ("neg/4_1.txt", "neg/5_3.txt", b"x", "review 5 but not 4"),
        ("neg/urls", "neg/5_3.txt", b"x", "review 5 twice"),
    ],
)
def test_imdb_refuses(tmp_path: Path, name: str, new: str | None, content: bytes, says: str) -> None:
    tree = imdb_tree()
    tree.pop(f"aclImdb/train/{name}", None)
    if new:
        tree[f"aclImdb/train/{new}"] = content
    folder = write(tmp_path, tree)
    assert says in refused(lambda: imdb.load(folder, "train"))


def test_imdb_needs_both_classes(tmp_path: Path) -> None:
    tree = {name: content for name, content in imdb_tree().items() if "/neg/" not in name}
    assert "train/neg" in refused(lambda: imdb.load(write(tmp_path, tree), "train"))
    with pytest.raises(UsageError, match="unsup"):
        imdb.load(tmp_path, "val")


RT = {
    "sentence_polarity/rt-polarity.neg": b"simplistic , silly and tedious . \nit's so laddish \n",
    "sentence_polarity/rt-polarity.pos": "the rock is caf\xe9 \neffective but\x85 \n".encode(),
}


def test_sentence_polarity_folder_and_zip(tmp_path: Path) -> None:
    for place in (write(tmp_path, RT), zipped(tmp_path / "sentence_polarity.zip", RT)):
        found = polarity.sentences(place)
        assert [s.positive for s in found] == [False, False, True, True]
        assert found[0].text == "simplistic , silly and tedious ."
        assert found[2].text == "the rock is caf\xe9"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "complete line"),
        (b"one \ntw", "complete line"),
        (b"one \n\ntwo \n", "line 2"),
        (b"one \n", "2 negative and 1 positive"),
        (b"caf\xe9 \ntwo \n", "UTF-8 at byte 3"),
        (None, "rt-polarity.pos"),
    ],
)
def test_sentence_polarity_refuses(tmp_path: Path, content: bytes | None, says: str) -> None:
    tree = {k: v for k, v in RT.items() if k.endswith("neg")}
    if content is not None:
        tree["sentence_polarity/rt-polarity.pos"] = content
    assert says in refused(lambda: polarity.sentences(write(tmp_path, tree)))


def review_tree() -> Tree:
    tree = {"movie_reviews/README": b"readme"}
    for i in range(101):
        tree[f"movie_reviews/neg/cv{i:03}_{i * 7}.txt"] = b"bad .\nvery bad .\n"
        tree[f"movie_reviews/pos/cv{i:03}_{i * 9}.txt"] = b"good .\n"
    return tree


def test_movie_reviews_folder_and_zip(tmp_path: Path) -> None:
    for place in (write(tmp_path, review_tree()), zipped(tmp_path / "movie_reviews.zip", review_tree())):
        found = polarity.reviews(place)
        assert [(r.positive, r.index) for r in found] == [(p, i) for p in (False, True) for i in range(101)]
        assert found[0].text == "bad .\nvery bad ."
        assert [found[i].fold for i in (0, 99, 100)] == [0, 0, 1]


def test_movie_reviews_refuse(tmp_path: Path) -> None:
    def changed(remove: str, **_: object) -> str:
        tree = {k: v for k, v in review_tree().items() if remove not in k}
        path = zipped(tmp_path / "movie_reviews.zip", tree)
        return refused(lambda: polarity.reviews(path))

    assert "review 6 but not 5" in changed("pos/cv005")
    assert "101 negative and 100 positive" in changed("pos/cv100")
    assert "movie_reviews.zip" in changed("/cv")
    tree = review_tree() | {"movie_reviews/pos/cv003_27.txt": b"\n"}
    assert "cv003_27.txt is empty" in refused(lambda: polarity.reviews(write(tmp_path / "f", tree)))


@pytest.mark.process
def test_the_loaders_need_no_torch() -> None:
    code = "import sys, stream_mmrnn.training.datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# the real data sets, compared with their published figures


@pytest.mark.shared_data
def test_mnist_as_published(data: Path) -> None:
    for split, first in (("train", [5, 0, 4, 1, 9]), ("test", [7, 2, 1, 0, 4])):
        images, labels = mnist.load(data / "mnist.tgz", split)
        assert len(images) == len(labels) == mnist.COUNTS[split]
        assert labels[:5].tolist() == first
        assert set(labels.tolist()) == set(range(10))


@pytest.mark.slow
@pytest.mark.shared_data
def test_fsdd_as_published(data: Path) -> None:
    found = fsdd.load(data / "fsdd.tar.xz")
    assert len(found) == 3000
    assert {r.speaker for r in found} == {"george", "jackson", "lucas", "nicolas", "theo", "yweweler"}
    train, test = fsdd.official_split(found)
    assert (len(train), len(test)) == (2700, 300)
    assert [len(part) for part in fsdd.speaker_split(found, ["theo"])] == [2500, 500]


@pytest.mark.shared_data
def test_hapt_as_published(data: Path) -> None:
    found = hapt.load(data / "hapt.npz")
    assert len({r.subject for r in found}) == 30
    assert len(found) == 61
    assert sum(len(r.labels) for r in found) == 1_122_772
    stretches, windows = 0, []
    for part in hapt.official_split(found):
        count = 0
        for recording in part:
            edges = np.flatnonzero(np.diff(recording.labels, prepend=hapt.NONE, append=hapt.NONE))
            for start, end in itertools.pairwise(edges):
                if recording.labels[start] != hapt.NONE:
                    stretches += 1
                    count += max(0, (end - start - 128) // 64 + 1)
        windows.append(count)
    assert stretches == 1214  # lines of labels.txt
    assert windows == [7767, 3162]  # rows of X_train.txt and X_test.txt


@pytest.mark.slow
@pytest.mark.shared_data
def test_switchboard_as_published(data: Path) -> None:
    corpus = switchboard.Switchboard(data / "switchboard_words.tar.xz")
    ids, hours, speech, counts = [], 0.0, 0.0, Counter()
    for dialogue in corpus.dialogues():
        ids.append(dialogue.id)
        hours += dialogue.end_s / 3600
        for channel in (dialogue.a, dialogue.b):
            counts["words"] += len(channel.words.token)
            counts["said laughing"] += sum(w.startswith("[laughter-") for w in channel.words.token)
            counts["laughter"] += channel.marks.token.count("[laughter]")
            stretches = switchboard.voice(channel)
            assert (stretches[:, 1] > stretches[:, 0]).all()
            assert (stretches[1:, 0] > stretches[:-1, 1]).all()
            speech += float((stretches[:, 1] - stretches[:, 0]).sum()) / 3600
    assert len(ids) == len(set(ids)) == 2438
    assert round(hours) == 259
    assert counts == {"words": 3_085_832, "said laughing": 13_504, "laughter": 22_209}  # 3.07 M without marks
    assert 0.8 * hours < speech < hours
    splits = corpus.splits()  # the same pass read them
    assert {name: len(of) for name, of in splits.items()} == {"train": 1283, "val": 578, "test": 577}
    assert set().union(*splits.values()) == set(ids)


@pytest.mark.shared_data
def test_polarity_as_published(data: Path) -> None:
    sentences = polarity.sentences(data / "sentence_polarity.zip")
    assert len(sentences) == polarity.SENTENCES == 10_662
    assert sum(s.positive for s in sentences) == 5331
    reviews = polarity.reviews(data / "movie_reviews.zip")
    assert len(reviews) == polarity.REVIEWS == 2000
    assert [sum(r.fold == fold for r in reviews) for fold in range(10)] == [200] * 10
