"""States of many sessions in one file: what was saved last counts, also after a restart, and files stay few."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stream_mmrnn.core.block import StateBlock
from stream_mmrnn.core.errors import SnapshotError
from stream_mmrnn.predict import snapshots
from stream_mmrnn.predict.snapshots import Snapshot, StateStore
from stream_mmrnn.serve import state_store
from stream_mmrnn.serve.state_rows import StateRows, from_bytes, to_bytes
from stream_mmrnn.serve.state_store import _MOST_FILES, StateBlockStore, _File

S = 1_000_000_000
NOW = 10**18
NAMES = [f"s{i}" for i in range(8)]
NO_KEYS = np.zeros(0, np.uint64)


def rows_of(names: list[str], value: int, model: str = "m", at_ns: int = NOW) -> StateRows:
    count = len(names)
    states = {"h": np.full((count, 3), value, np.float32), "n": np.arange(count, dtype=np.int64) + value}
    fresh = np.zeros(count, np.bool_)
    times = np.full(count, at_ns)
    return StateRows(model, names, ["ab" * 32] * count, np.full(count, value), times, StateBlock(fresh, states))


def value_of(store: StateBlockStore, name: str, at_ns: int = NOW) -> int | None:
    found = store.load(name, at_ns)
    assert store.holds(name, at_ns) == (found is not None)
    if found is None:
        return None
    assert found.session == name
    if found.state:
        assert (found.state["h"] == found.tick_index).all()
    return found.tick_index


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.states"))


SOME = st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True)


@pytest.mark.slow
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("rows"), SOME),
            st.tuples(st.just("other model"), SOME),
            st.tuples(st.just("forget"), SOME),
            st.tuples(st.just("alone"), SOME),
            st.tuples(st.just("restart"), st.just([])),
        ),
        max_size=60,
    )
)
@example([("rows", NAMES[:6]), ("rows", NAMES[1:2]), ("forget", NAMES[1:2]), ("restart", []), ("rows", NAMES[:1])])
@example([("rows", [name]) for name in NAMES] * 4 + [("forget", NAMES[:4]), ("restart", [])])
@example(
    [("rows", NAMES[:2]), *[("other model", [name]) for name in NAMES] * 3, ("forget", NAMES[:1]), ("restart", [])]
)
def test_what_was_saved_last_counts(actions: list[tuple[str, list[str]]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        store, expected = StateBlockStore(folder, 100), dict[str, int]()
        for i, (what, names) in enumerate(actions, 1):
            if what == "restart":
                store = StateBlockStore(folder, 100)
                assert not store.damaged
            elif what == "forget":
                store.forget_all(names)
                for name in names:
                    expected.pop(name, None)
            elif what == "alone":
                for name in names:
                    state = {"h": np.full(3, i, np.float32)}
                    store.save(Snapshot(name, "m", i, state, {"token_sha256": "", "more": b"x"}), NOW)
                    expected[name] = i
            else:
                store.save_rows(rows_of(names, i, "m" if what == "rows" else "other"), NOW)
                expected |= dict.fromkeys(names, i)
            assert {name: v for name in NAMES if (v := value_of(store, name)) is not None} == expected
        store = StateBlockStore(folder, 100)
        assert {name: v for name in NAMES if (v := value_of(store, name)) is not None} == expected
        assert len(files(folder)) <= _MOST_FILES + 1
        if not expected:
            assert sum(path.stat().st_size for path in files(folder)) < 20_000


def test_a_crash_between_rewriting_and_removing_changes_nothing(tmp_path: Path) -> None:
    """Old files are there beside the one that replaces them."""
    store = StateBlockStore(tmp_path, 100)
    old: dict[Path, bytes] = {}
    for i, name in enumerate(NAMES * 3):
        store.save_rows(rows_of([name, f"only{i}"], i), NOW)
        old |= {path: path.read_bytes() for path in files(tmp_path)}
    store.forget_all(["only0", "only1"])
    for path, content in old.items():
        path.write_bytes(content)
    again = StateBlockStore(tmp_path, 100)
    assert [value_of(again, name) for name in NAMES] == list(range(16, 24))
    assert value_of(again, "only0") is value_of(again, "only1") is None
    assert [value_of(again, f"only{i}") for i in range(2, 24)] == list(range(2, 24))


def test_files_of_an_older_release_are_read(tmp_path: Path) -> None:
    old = StateStore(tmp_path, 100)
    old.save(Snapshot("s0", "m", 7, {"h": np.full(3, 7, np.float32)}, {"token_sha256": "x"}), NOW)
    store = StateBlockStore(tmp_path, 100)
    assert value_of(store, "s0") == 7
    store.save_rows(rows_of(["s0"], 8), NOW)
    assert not list(tmp_path.glob("*.safetensors"))
    assert value_of(StateBlockStore(tmp_path, 100), "s0") == 8


def test_a_damaged_file_is_said_and_left_there(tmp_path: Path) -> None:
    store = StateBlockStore(tmp_path, 100)
    store.save_rows(rows_of(["s0"], 1), NOW)
    store.save_rows(rows_of(["s1"], 1), NOW)
    path = files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match="is damaged, remove it to begin its sessions anew"):
        store.load("s0", NOW)
    again = StateBlockStore(tmp_path, 100)
    assert "is damaged, and its states do not count; remove it" in again.damaged[0]
    assert (value_of(again, "s0"), value_of(again, "s1")) == (None, 1)
    again.save_rows(rows_of(["s2"], 2), NOW)
    assert path.exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_file_that_cannot_be_rewritten_does_not_stop_saving(tmp_path: Path, is_there: bool) -> None:
    store = StateBlockStore(tmp_path, 100)
    for i in range(_MOST_FILES):
        store.save_rows(rows_of([f"old{i}"], i), NOW)
    for path in files(tmp_path)[:2]:
        if is_there:
            path.write_bytes(b"damaged")
        else:
            path.unlink()
    for i in range(40):
        store.save_rows(rows_of([f"new{i}"], i), NOW)
    assert len(store.damaged) == 2
    assert [value_of(store, f"new{i}") for i in range(40)] == list(range(40))
    assert [value_of(store, f"old{i}") for i in range(2, _MOST_FILES)] == list(range(2, _MOST_FILES))
    assert len(files(tmp_path)) <= _MOST_FILES + 3
    with pytest.raises(SnapshotError, match="is damaged" if is_there else "was removed by another program"):
        store.load("old0", NOW)
    store.save_rows(rows_of(["old0", "old1"], 7), NOW)
    assert value_of(store, "old0") == value_of(StateBlockStore(tmp_path, 100), "old1") == 7


def test_what_is_rewritten_may_fail_and_is_saved_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateBlockStore(tmp_path, 100)
    write = store.write

    def write_small(path: Path, raw: bytes, unix_ns: int, what: str) -> None:
        if "of 1 sessions" not in what:
            raise SnapshotError("no space")
        write(path, raw, unix_ns, what)

    monkeypatch.setattr(store, "write", write_small)
    for i in range(_MOST_FILES + 4):
        store.save_rows(rows_of([f"s{i}"], i), NOW)
    assert [value_of(store, f"s{i}") for i in range(_MOST_FILES + 4)] == list(range(_MOST_FILES + 4))


def test_a_session_is_found_while_its_next_state_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread writes while another one reads: here the reader looks at each moment."""
    store = StateBlockStore(tmp_path, 100)
    store.save_rows(rows_of(["s0"], 1), NOW)
    store.save_rows(rows_of(["s1"], 1), NOW)
    isin, find, seen, going = np.isin, _File.find, list[bool](), False

    def isin_and_look(*args: Any) -> Any:
        seen.append(store.holds("s0", NOW))
        return isin(*args)

    monkeypatch.setattr(state_store.np, "isin", isin_and_look)
    store.save_rows(rows_of(["s0"], 2), NOW)

    def find_late(file: _File, key: int) -> int:
        """The writer is done after the reader has begun."""
        nonlocal going
        if not going:
            going = True
            store.save_rows(rows_of(["s0"], 3), NOW)
        return find(file, key)

    monkeypatch.setattr(_File, "find", find_late)
    seen.append(store.holds("s0", NOW))
    assert len(seen) > 4
    assert all(seen)


def test_many_large_states_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_store, "_MERGED_BYTES", 40)  # two of 20 bytes
    store = StateBlockStore(tmp_path, 100)
    store.save_rows(rows_of(NAMES[:5], 1), NOW)
    assert len(files(tmp_path)) == 3
    for found in (store, StateBlockStore(tmp_path, 100)):
        assert [value_of(found, name) for name in NAMES[:5]] == [1] * 5


def test_a_file_that_could_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateBlockStore(tmp_path, 100)
    store.save_rows(rows_of(["s0"], 1), NOW)
    monkeypatch.setattr(snapshots, "MAX_BYTES", 500)
    with pytest.raises(SnapshotError, match=r"of 8 sessions cannot be written: \d+ bytes, expected at most 500"):
        store.save_rows(rows_of(NAMES, 2), NOW)
    assert len(files(tmp_path)) == 1


def test_states_expire_one_by_one_and_are_swept(tmp_path: Path) -> None:
    store = StateBlockStore(tmp_path, 100)
    store.save_rows(rows_of(["s0", "s1"], 1), NOW)
    store.save_rows(rows_of(["s1"], 2, at_ns=NOW + 60 * S), NOW + 60 * S)
    assert value_of(store, "s0", NOW + 101 * S) is None
    assert value_of(store, "s1", NOW + 101 * S) == 2
    assert store.sweep(NOW + 101 * S) == 1
    assert store.sweep(NOW + 161 * S) == 1
    assert not files(tmp_path)


@given(st.binary(max_size=300), st.integers(0, 10_000), st.integers(1, 255))
def test_no_bytes_are_taken_for_states(content: bytes, place: int, bit: int) -> None:
    whole = bytearray(to_bytes(rows_of(NAMES[:2], 3), NO_KEYS))
    whole[place % len(whole)] ^= bit
    for raw in (content, bytes(whole), bytes(whole[: place % len(whole)])):
        with pytest.raises(SnapshotError):
            from_bytes(raw)


def test_rows_and_sessions_before_their_first_step_come_back(tmp_path: Path) -> None:
    rows = rows_of(NAMES[:3], 5)
    rows.states.fresh[1] = True
    found, gone = from_bytes(to_bytes(rows, np.array([2**63 + 5], np.uint64)))
    assert (found.sessions, found.token_sha256, found.model_sha256) == (rows.sessions, rows.token_sha256, "m")
    assert found.states.row(1) == {}
    assert (found.states.row(2)["n"], gone.tolist()) == (7, [2**63 + 5])
