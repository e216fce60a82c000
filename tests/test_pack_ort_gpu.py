"""Packing onnxruntime-gpu: the walk through fat binaries on made-up ones, what goes into a pack, what is refused."""

from __future__ import annotations

import io
import lzma
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

sys.path.append(str(Path(__file__).parent.parent / "tools"))

import fatbin
import pack_ort_gpu
from fatbin import CUBIN, PTX, FatbinError
from pack_ort_gpu import File, PackError

CUDA = "onnxruntime/capi/libonnxruntime_providers_cuda.so"


def entry(kind: int, arch: int, payload: bytes, header: int = 64) -> bytes:
    head = struct.pack("<HHIQIIHHI", kind, 0x101, header, len(payload), len(payload), 0, 8, 1, arch)
    return head + bytes(header - len(head)) + payload


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def elf(code: bytes, name: str = fatbin.SECTION) -> bytes:
    """An ELF file with one section of this name and content."""
    strings = b"\0.shstrtab\0" + name.encode() + b"\0"
    table = 64 + len(code) + len(strings)
    head = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 1)
    )

    def row(at: int, begin: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", at, 1, 0, 0, begin, size, 0, 0, 8, 0)

    rows = row(0, 0, 0) + row(1, 64 + len(code), len(strings)) + row(11, 64, len(code))
    return head + code + strings + rows


A75, A90, B90, A120 = (bytes([n]) * 8 * n for n in (3, 5, 7, 9))
LIBRARY = elf(
    container(entry(CUBIN, 75, A75), entry(CUBIN, 90, A90), entry(PTX, 90, A75))
    + bytes(24)
    + container(entry(CUBIN, 90, B90, header=112))
    + container(entry(CUBIN, 120, A120))
    + bytes(8)
)


def test_the_walk_finds_every_entry() -> None:
    found = list(fatbin.containers(LIBRARY, *fatbin.section(LIBRARY)))
    assert [[(e.kind, e.arch) for e in c.entries] for c in found] == [
        [(CUBIN, 75), (CUBIN, 90), (PTX, 90)],
        [(CUBIN, 90)],
        [(CUBIN, 120)],
    ]
    sizes = fatbin.bytes_by_arch(LIBRARY)
    assert sizes[CUBIN, 90] == 64 + len(A90) + 112 + len(B90)
    assert sizes[CUBIN, 120] == 64 + len(A120)


def test_one_architecture_is_kept_and_nothing_moves() -> None:
    data = bytearray(LIBRARY)
    done = fatbin.keep_one(data, 90)
    assert (done.containers, done.untouched) == (3, 1)
    assert done.zeroed_bytes == 64 + len(A75) + 64 + len(A75)
    assert len(data) == len(LIBRARY)
    before = list(fatbin.containers(LIBRARY, *fatbin.section(LIBRARY)))
    after = list(fatbin.containers(data, *fatbin.section(data)))
    assert [c.begin for c in after] == [c.begin for c in before]
    assert [[(e.kind, e.arch) for e in c.entries] for c in after] == [[(CUBIN, 90)], [(CUBIN, 90)], [(CUBIN, 120)]]
    assert bytes(data[after[0].entries[0].end - len(A90) : after[0].entries[0].end]) == A90
    assert not any(data[after[0].end : before[0].end])
    # what is not in the section, and a container of that architecture alone, are as they were
    begin, end = fatbin.section(LIBRARY)
    assert data[:begin] == LIBRARY[:begin]
    assert data[end:] == LIBRARY[end:]
    assert data[before[1].begin : before[2].end] == LIBRARY[before[1].begin : before[2].end]
    assert fatbin.keep_one(data, 90).zeroed_bytes == 0


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"not a library" * 9, "no ELF file"),
        (b"\x7fELF\x02\x01", "no ELF file"),
        (elf(b"", ".text"), "no section .nv_fatbin"),
        (elf(b"something else!!" * 4), "no fat binary"),
        (elf(container(entry(CUBIN, 90, A90))[:-8]), "no fat binary"),
        (elf(container(entry(CUBIN, 90, A90)[:40])), "no entry"),
        (elf(container(entry(CUBIN, 90, A90), b"\1" * 8)), "cut off"),
        (LIBRARY[:-100], "cut off"),
        (elf(container(entry(CUBIN, 80, A90))), "no code for sm_90; it has sm_80"),
    ],
)
def test_what_is_no_cuda_library_is_one_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(FatbinError, match=sentence):
        fatbin.keep_one(bytearray(data), 90)


def test_what_goes_into_a_pack() -> None:
    for name in ("__init__.py", "LICENSE", "capi/_pybind_state.py", "capi/onnxruntime_pybind11_state.cpython-311.so"):
        assert pack_ort_gpu.wanted(f"onnxruntime/{name}")
    assert pack_ort_gpu.wanted(CUDA)
    assert pack_ort_gpu.wanted("onnxruntime/capi/libonnxruntime_providers_shared.so")
    assert pack_ort_gpu.wanted("onnxruntime_gpu-1.31.1.dist-info/METADATA")
    for name in (
        "onnxruntime/capi/libonnxruntime_providers_tensorrt.so",
        "onnxruntime/capi/libonnxruntime.so.1.31.1",
        "onnxruntime/tools/check.py",
        "onnxruntime/transformers/models/x.py",
        "onnxruntime/capi/__pycache__/x.pyc",
        "onnxruntime_gpu-1.31.1.dist-info/RECORD",
        "bin/onnxruntime_test",
    ):
        assert not pack_ort_gpu.wanted(name), name


def wheel(path: Path, library: bytes = LIBRARY) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("onnxruntime/__init__.py", "__version__ = '9.9'\n")
        z.writestr("onnxruntime/tools/x.py", "")
        z.writestr(CUDA, library)
        z.writestr("onnxruntime_gpu-9.9.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: cp312-cp312-linux_x86_64\n")
        z.writestr("onnxruntime_gpu-9.9.dist-info/METADATA", "Name: onnxruntime-gpu\nVersion: 9.9\n")
    return path


def test_a_wheel_is_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "out" / "onnxruntime-gpu-9.9-cp312-sm90.tar.xz"
    arguments = ["--wheel", str(wheel(tmp_path / "x.whl")), "--out", str(made.parent)]
    assert pack_ort_gpu.main(arguments) == 0
    said = capsys.readouterr().out
    assert str(made) in said
    assert "sha256 " in said
    assert f"tar -xJf {made.name} -C ort-gpu" in said
    assert "PYTHONPATH=ort-gpu:." in said
    assert sorted(p.name for p in made.parent.iterdir()) == [made.name]
    with tarfile.open(made, "r:xz") as tar:
        about = [n for n in tar.getnames() if "dist-info" not in n]
        assert about == ["onnxruntime/__init__.py", CUDA]
        packed = tar.extractfile(CUDA)
        assert packed is not None
        assert (CUBIN, 75) not in fatbin.bytes_by_arch(packed.read())
        assert tar.getmember(CUDA).mode == 0o755
    first = made.read_bytes()
    assert pack_ort_gpu.main(arguments) == 0
    assert made.read_bytes() == first


@pytest.mark.parametrize(
    ("library", "sentence"), [(b"text" * 50, "no ELF file"), (elf(container(entry(CUBIN, 80, A90))), "sm_90")]
)
def test_a_library_that_is_none_is_one_sentence(
    library: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = wheel(tmp_path / "x.whl", library)
    assert pack_ort_gpu.main(["--wheel", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert sentence in said[0]


def test_what_is_no_wheel_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.whl").write_bytes(b"text")
    assert pack_ort_gpu.main(["--wheel", str(tmp_path / "x.whl")]) == 2
    assert "no wheel that can be read" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "y.whl", "w") as z:
        z.writestr("other/__init__.py", "")
    assert pack_ort_gpu.main(["--wheel", str(tmp_path / "y.whl")]) == 2
    assert "no wheel of onnxruntime-gpu" in capsys.readouterr().err


def test_a_pack_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack_ort_gpu._Counted, "write", full)
    with Progress(console=Console(file=io.StringIO())) as progress, pytest.raises(OSError, match="No space"):
        pack_ort_gpu.pack([File("a", b"x", False)], tmp_path / "a.tar.xz", progress)
    assert not list(tmp_path.iterdir())


def test_check_imports_from_the_pack_and_computes(tmp_path: Path) -> None:
    """With a package that stands in for onnxruntime, which would take minutes to pack."""
    session = "class InferenceSession:\n    def __init__(self, model, providers): self.model = model\n"
    session += "    def run(self, names, feed): return [feed['x'] * {factor}]\n"
    head = "__version__, cuda_version = '9.9', '13.0'\ndef get_available_providers(): return ['CPUExecutionProvider']\n"

    def made(factor: int) -> Path:
        path = tmp_path / f"{factor}.tar.xz"
        code = (head + session.replace("{factor}", str(factor))).encode()
        with Progress(console=Console(file=io.StringIO())) as progress:
            files = [File("onnxruntime/__init__.py", code, False), File(CUDA, LIBRARY, True)]
            pack_ort_gpu.pack(files, path, progress)
        return path

    said = pack_ort_gpu.check(made(2))
    assert said["version"] == "9.9"
    assert said["gpu_code"].startswith("sm_90 ")
    with pytest.raises(PackError, match="computed wrongly"):
        pack_ort_gpu.check(made(3))


def test_check_of_what_is_no_pack_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.tar.xz"
    for content in (b"text", lzma.compress(b"text")):
        path.write_bytes(content)
        assert pack_ort_gpu.main(["--check", str(path)]) == 2
        assert "no pack that can be unpacked" in capsys.readouterr().err
    assert pack_ort_gpu.main(["--check", str(tmp_path / "none")]) == 2
    assert "no pack that can be unpacked" in capsys.readouterr().err


def test_the_graph_of_the_check_is_onnx() -> None:
    onnx = pytest.importorskip("onnx")
    scope: dict[str, object] = {}
    before_the_session = pack_ort_gpu._GRAPH.split("session =")[0].replace("import onnxruntime\n", "")
    exec(before_the_session, scope)
    onnx.checker.check_model(onnx.ModelProto.FromString(scope["model"]), full_check=True)
