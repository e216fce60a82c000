"""Snapshots of a session as bytes and in a folder: damage is refused, and no name points outside the folder."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load as plain_load
from safetensors.numpy import save as plain_save

from stream_mmrnn.core.errors import FileError, SnapshotError
from stream_mmrnn.predict import snapshots
from stream_mmrnn.predict.snapshots import NEVER, Snapshot, StateStore, from_bytes, to_bytes

S = 1_000_000_000
NOW = 1_800_000_000 * S

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
arrays = st.one_of(
    *(
        hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
        for kind in (np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_, np.dtype(">f4"))
    )
)
any_snapshot = st.builds(
    Snapshot,
    text.filter(bool),
    st.just("0" * 64),
    st.integers(NEVER, (1 << 63) - 1),
    st.dictionaries(text, arrays, max_size=3),
    st.dictionaries(text, st.binary(max_size=20) | text, max_size=3),
)


def one(session: str = "a", value: float = 1.0, tick_index: int = 7) -> Snapshot:
    state = {"cell.h": np.full((2, 3), value, np.float32), "cell.n": np.array(5, np.int64)}
    return Snapshot(session, "m" * 64, tick_index, state, {"token": "t", "align": b"\0\1\2"})


def same(a: Snapshot, b: Snapshot) -> bool:
    def wide(s: Snapshot) -> object:
        tensors = {
            n: (x.dtype.newbyteorder("<").str, x.shape, x.astype(x.dtype.newbyteorder("<")).tobytes())
            for n, x in s.state.items()
        }
        return s.session, s.model_sha256, s.tick_index, tensors, s.extra

    return wide(a) == wide(b)


@given(any_snapshot)
def test_a_snapshot_survives_the_round_trip_through_bytes(snapshot: Snapshot) -> None:
    raw = to_bytes(snapshot)
    back = from_bytes(raw)
    assert same(snapshot, back)
    assert to_bytes(back) == raw
    assert not any(array.flags.writeable for array in back.state.values())


def test_other_safetensors_readers_can_read_it(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(to_bytes(one()))
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert set(file.keys()) == {"state.cell.h", "state.cell.n", "extra.align"}
        np.testing.assert_array_equal(file.get_tensor("state.cell.h"), one().state["cell.h"])
        assert msgspec.json.decode(file.metadata()["stream_mmrnn"])["session"] == "a"


@settings(max_examples=300)
@given(st.data())
def test_any_changed_byte_is_an_error(data: st.DataObject) -> None:
    raw = bytearray(to_bytes(one()))
    at = data.draw(st.integers(0, len(raw) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda b: b != raw[at]))
    raw[at] = new
    with contextlib.suppress(SnapshotError):
        assert same(from_bytes(bytes(raw)), one())  # only whitespace in the header may change


def test_every_truncation_is_an_error() -> None:
    raw = to_bytes(one())
    for length in range(len(raw)):
        with pytest.raises(SnapshotError):
            from_bytes(raw[:length])
    with pytest.raises(SnapshotError):
        from_bytes(raw + b"\0")


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_error(raw: bytes) -> None:
    with pytest.raises(SnapshotError):
        from_bytes(raw)
    with pytest.raises(SnapshotError):
        from_bytes(len(raw).to_bytes(8, "little") + raw)


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BOOL", "F8_E4M3", "C64", "U8", "x"]) | json,
        "shape": st.lists(st.integers(-1, 1 << 65), max_size=3) | st.just([1] * 100) | json,
        "data_offsets": st.lists(st.integers(-1, 1 << 65), max_size=3) | json,
    }
)


@pytest.mark.slow
@settings(max_examples=500)
@given(
    st.dictionaries(st.sampled_from(["state.a", "extra.b", "c"]), entry | json, max_size=3),
    st.fixed_dictionaries({"stream_mmrnn": st.text(max_size=20)}) | json,
    st.binary(max_size=16),
)
def test_any_header_is_an_error(tensors: dict[str, object], metadata: object, rest: bytes) -> None:
    header = msgspec.json.encode(repr_safe({**tensors, "__metadata__": metadata}))
    with pytest.raises(SnapshotError):
        from_bytes(len(header).to_bytes(8, "little") + header + rest)


def repr_safe(value: object) -> object:
    """msgspec cannot encode integers beyond 64 bits or lone surrogates."""
    if isinstance(value, dict):
        return {repr_safe(k): repr_safe(v) for k, v in value.items()}
    if isinstance(value, list):
        return [repr_safe(v) for v in value]
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        return msgspec.Raw(str(value).encode())
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def signed(tensors: dict[str, np.ndarray], **about: object) -> bytes:
    """A file with a correct sha256 over any content."""
    given = {"version": 1, "session": "a", "model_sha256": "m", "tick_index": 0, "texts": {}, **about}
    fields = msgspec.convert(given, snapshots.About)
    fields = msgspec.structs.replace(fields, sha256=snapshots.digest(fields, tensors))
    return plain_save(tensors, {"stream_mmrnn": msgspec.json.encode(fields).decode()})


def test_a_correct_sha256_alone_is_not_enough() -> None:
    assert from_bytes(signed({})) == Snapshot("a", "m", 0, {})
    with pytest.raises(SnapshotError, match="neither of a state nor an extra"):
        from_bytes(signed({"other": np.zeros(2, np.float32)}))
    with pytest.raises(SnapshotError, match="neither of a state nor an extra"):
        from_bytes(signed({"extra.x": np.zeros(2, np.float32)}))
    with pytest.raises(SnapshotError, match="expected version 1, got 2"):
        from_bytes(signed({}, version=2))
    truths = signed({"state.x": np.array([2], np.uint8).view(np.bool_)})
    with pytest.raises(SnapshotError, match="neither 0 nor 1"):
        from_bytes(truths)


def test_deep_and_large_headers_are_refused_before_parsing() -> None:
    deep = b'{"__metadata__":' + b"[" * 5000
    with pytest.raises(SnapshotError):
        from_bytes(len(deep).to_bytes(8, "little") + deep)
    wide = b" " * (snapshots.MAX_HEADER_BYTES + 1)
    with pytest.raises(SnapshotError, match="expected a header of at most"):
        from_bytes(len(wide).to_bytes(8, "little") + wide)


def test_values_that_the_format_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for session in ("", "\ud800", "x" * 2000):
        with pytest.raises(SnapshotError, match="cannot be saved as a snapshot"):
            to_bytes(one(session))
    with pytest.raises(SnapshotError):
        to_bytes(one(tick_index=-2))
    with pytest.raises(SnapshotError):
        to_bytes(Snapshot("a", "m", 0, {"x": np.array(["text"])}))
    monkeypatch.setattr(snapshots, "MAX_BYTES", 100)
    with pytest.raises(SnapshotError, match="at most 100 bytes"):
        to_bytes(one())


def test_a_store_keeps_the_newest_snapshot_until_it_expires(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "a" / "b", 10)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert store.load("a", NOW) is None
    store.save(one("a", 1), NOW)
    store.save(one("b", 2), NOW + 5 * S)
    path = store.save(one("a", 3), NOW + 1 * S)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(list(store.folder.iterdir())) == 2
    found = store.load("a", NOW + 11 * S)
    assert found is not None
    assert same(found, one("a", 3))
    assert store.load("a", NOW + 11 * S + 1) is None  # expired, swept or not
    assert store.sweep(NOW + 12 * S) == 1
    assert [p.name for p in store.folder.iterdir()] == [store.path("b").name]
    store.forget("b")
    store.forget("b")
    assert not list(store.folder.iterdir())


@given(
    st.text(max_size=30) | st.sampled_from(["../x", "/etc/passwd", "a/../../b", "..", ".", "a\0b", "C:\\x", "x" * 900])
)
def test_no_name_points_outside_the_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    store = StateStore(tmp_path_factory.getbasetemp() / "names" / "inner", 10)
    path = store.path(name)
    assert path.parent == store.folder
    assert path.name.removesuffix(".safetensors").isalnum()
    try:
        written = store.save(one(name), NOW)
    except SnapshotError:
        assert not path.exists()
        return
    assert written == path
    found = store.load(name, NOW)
    assert found is not None
    assert found.session == name
    assert [p.name for p in store.folder.parent.iterdir()] == ["inner"]
    store.forget(name)


def test_a_file_of_another_session_is_refused(tmp_path: Path) -> None:
    store = StateStore(tmp_path, 10)
    store.save(one("a"), NOW).replace(store.path("b"))
    with pytest.raises(SnapshotError, match="is not of session 'b' but of 'a'"):
        store.load("b", NOW)


def test_links_pipes_and_huge_files_are_refused(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "s", 1e9)
    real = store.save(one("a"), NOW)
    store.path("link").symlink_to(real)
    os.mkfifo(store.path("pipe"))
    with store.path("giant").open("wb") as file:
        file.truncate(snapshots.MAX_BYTES + 1)
    store.path("cut").write_bytes(real.read_bytes()[:-1])
    for name in ("link", "pipe", "giant", "cut"):
        with pytest.raises(SnapshotError):
            store.load(name, NOW)


def test_stale_temporary_files_are_swept_but_not_new_ones(tmp_path: Path) -> None:
    store = StateStore(tmp_path, 1000)
    store.save(one("a"), NOW)
    old, new = tmp_path / "x.1.0.tmp", tmp_path / "x.1.1.tmp"
    for path, age_s in ((old, 61), (new, 59)):
        path.write_bytes(b"half")
        os.utime(path, ns=(NOW - age_s * S, NOW - age_s * S))
    assert store.sweep(NOW) == 1
    assert new.exists()
    assert not old.exists()
    assert store.load("a", NOW) is not None


def test_a_failed_save_leaves_only_the_old_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(tmp_path, 10)
    store.save(one("a", 1), NOW)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SnapshotError, match=r"cannot be written to .*: No space left on device"):
        store.save(one("a", 2), NOW)
    found = store.load("a", NOW)
    assert found is not None
    assert same(found, one("a", 1))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"give another as state\.folder"):
        StateStore(tmp_path / "file" / "x", 10)


def test_plain_loaders_read_the_same_numbers() -> None:
    plain = plain_load(to_bytes(one()))
    assert plain["state.cell.h"].tobytes() == one().state["cell.h"].tobytes()
    assert plain["extra.align"].tobytes() == b"\0\1\2"
