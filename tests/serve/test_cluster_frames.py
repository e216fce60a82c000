"""Batches and frames: whatever sessions say, and over how many lanes, the messages of each keep their order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn.core.errors import BadTick, WireError
from stream_mmrnn.serve.cluster.batch import Batch, Chunk, one_tick
from stream_mmrnn.serve.cluster.frames import (
    MOST_BYTES,
    NO_PROOF,
    PROOF,
    Columns,
    Control,
    digest_of,
    proof,
    read_frame,
)
from stream_mmrnn.serve.cluster.gateway import Gateway
from stream_mmrnn.serve.cluster.subjects import LANES, lane_of, partition_of

CLIENT, PARTITIONS = "any.c", 40
SIZES = [2, 1]
NAMES = [f"s{i}" for i in range(9)]


def ticks(rows: dict[str, int], half: bool = False, present: int = 3) -> Chunk:
    """A tick of each of some sessions; `present`: bits of the modalities."""
    here = [bool(present >> m & 1) for m in range(2)]
    kind = "<f2" if half else "<f4"
    count = len(rows)
    indices = np.array(list(rows.values()), "<i8")
    features = tuple(
        np.repeat(indices, size).astype(kind).tobytes() if on else b"" for size, on in zip(SIZES, here, strict=True)
    )
    return Chunk(
        list(rows),
        [name.encode() for name in rows],
        indices.tobytes(),
        (indices * 7).tobytes(),
        (indices - 1).tobytes(),
        (indices - 2).tobytes(),
        bytes(here) * count,
        np.tile(np.array(here, "<i8") - 1, count).tobytes(),
        half,
        features,
    )


_acts = st.lists(
    st.tuples(
        st.sampled_from(["tick", "tick", "block", "control", "take", "divide"]),
        st.sets(st.sampled_from(NAMES), min_size=1),
        st.booleans(),
        st.integers(0, 3),
        st.sampled_from(LANES),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(_acts)
def test_each_sessions_messages_keep_their_order_whatever_the_lanes(
    acts: list[tuple[str, set[str], bool, int, int]],
) -> None:
    batch = Batch(CLIENT, PARTITIONS)
    said: dict[str, list[tuple[str, int]]] = {name: [] for name in NAMES}
    read: dict[str, list[tuple[str, int]]] = {name: [] for name in NAMES}

    def take() -> None:
        for lane, content in batch.take():
            frame = read_frame(CLIENT, content)
            for of, at in frame.with_proofs():
                here = [control.session for control in of.controls]
                here += of.columns.sessions if of.columns is not None else []
                assert len(here) == len(set(here)), "a session occurs once in a round"
                for i, name in enumerate(here):
                    assert lane_of(partition_of(name, PARTITIONS), batch.lanes, PARTITIONS) == lane
                    given = frame.proofs[at + PROOF * i : at + PROOF * (i + 1)]
                    assert given == proof(name.encode(), frame.digest) != NO_PROOF
                for control in of.controls:
                    read[control.session].append(("control", control.number))
                if of.columns is not None:
                    check(of.columns)

    def check(columns: Columns) -> None:
        block = columns.to_block(SIZES)
        before, answered = columns.order()
        for i, name in enumerate(columns.sessions):
            index = int(block.indices[i])
            read[name].append(("tick", index))
            assert (int(block.event_ns[i]), before[i], answered[i]) == (7 * index, index - 1, index - 2)
            assert (block.age_ns[i] == block.present[i].astype(np.int64) - 1).all()
        for vectors, here in zip(block.features, block.present.T, strict=True):
            assert (vectors == block.indices[here][:, None]).all(), "each vector is of its own tick"

    for count, (act, some, half, present, lanes) in enumerate(acts):
        if act == "take":
            take()
        elif act == "divide":
            batch.divide(lanes)
        elif act == "control":
            name = min(some)
            batch.control(Control(name, count, b"x"), name.encode())
            said[name].append(("control", count))
        else:
            by_lane: dict[int, dict[str, int]] = {}
            for name in sorted(some)[: 1 if act == "tick" else None]:
                by_lane.setdefault(batch.lane(name), {})[name] = count
                said[name].append(("tick", count))
            for rows in by_lane.values():
                batch.ticks(ticks(rows, half, present))
    while batch:
        take()
    assert read == said


def test_a_frame_is_not_longer_than_a_server_takes() -> None:
    batch = Batch(CLIENT, PARTITIONS)
    vector = np.zeros(20_000, "<f4").tobytes()
    for i in range(100):
        batch.ticks(one_tick("s", "t", i, 0, i - 1, -1, (vector,), ()))
    frames = []
    while batch:
        [(_, content)] = batch.take()
        frames.append(content)
    assert max(map(len, frames)) <= MOST_BYTES
    assert len(frames) > 10
    gateway = Gateway("any", lambda _: None, lambda _: None)
    with pytest.raises(BadTick, match="a tick has at most"):
        gateway.ticks(one_tick("s", "t", 0, 0, -1, -1, (bytes(MOST_BYTES),), ()))


@pytest.mark.parametrize(
    "changed",
    [
        {"indices": b""},
        {"before": bytes(8)},
        {"present": b"\1"},
        {"age_ns": bytes(8)},
        {"features": (b"",)},
        {"features": (bytes(12), b"")},
        {"indices": (-1).to_bytes(8, "little", signed=True) * 2},
        {"half": True},
    ],
)
def test_columns_of_other_lengths_are_refused(changed: dict[str, object]) -> None:
    batch = Batch(CLIENT, 1)
    batch.ticks(ticks({"a": 3, "b": 4}))
    [(_, content)] = batch.take()
    columns = read_frame(CLIENT, content).rounds[0].columns
    assert columns is not None
    assert len(columns.to_block(SIZES)) == 2
    with pytest.raises(WireError, match="expected"):
        Columns(**{f: changed.get(f, getattr(columns, f)) for f in columns.__struct_fields__}).to_block(SIZES)


def test_a_proof_is_of_the_whole_frame_and_its_client() -> None:
    batch = Batch(CLIENT, 1)
    batch.ticks(ticks({"a": 3}))
    [(_, content)] = batch.take()
    mine = read_frame(CLIENT, content)
    assert mine.proofs == proof(b"a", mine.digest)
    assert read_frame("other.c", content).digest != mine.digest
    assert digest_of(CLIENT, b"body") != digest_of(CLIENT, b"Body")
