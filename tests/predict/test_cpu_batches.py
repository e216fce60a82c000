"""Rows of an arena: every bucket, in place or copied, on the host or gathered by the graph, is bit-identical."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import toy_model
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn.core.config import find_model, models_folder
from stream_mmrnn.core.errors import ModelError
from stream_mmrnn.graph import gather_scatter as onnx_rows
from stream_mmrnn.graph.gather_scatter import Carried, Scatter, with_arena
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.predict.contract import contract_of
from stream_mmrnn.predict.cpu_batches import SIZES, HostRows, Rows, sizes_for
from stream_mmrnn.predict.device_batches import DeviceRows

HOUR_NS = 3_600_000_000_000
SILERO = models_folder() / "encoders" / "silero_vad.onnx"


def host(path: Path, slots: int, batch: int = 64) -> HostRows:
    graph = Graph(path)
    return HostRows(graph, contract_of(graph), slots, batch, HOUR_NS)


def device(path: Path, slots: int, batch: int = 64, scatter: Scatter = "rows") -> DeviceRows:
    """The GPU's code path on the CPU: the graph gathers from and scatters to the arena."""
    graph = Graph(path)
    return DeviceRows(graph, contract_of(graph), slots, batch, scatter=scatter)


def fill(rows: Rows, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bucket = rows.bucket(count)
    for array in bucket.inputs.values():
        if array.dtype == np.float32 and array.ndim == 2:
            array[:count] = rng.standard_normal((count, *array.shape[1:]))


def stepped(rows: Rows, slots: list[int], fresh: list[bool], seed: int) -> list[bytes]:
    count = len(slots)
    fill(rows, count, seed)
    bucket = rows.bucket(count)
    bucket.run(np.array(slots), np.array(fresh), count)
    return [b"".join(a[i].tobytes() for a in bucket.outputs.values()) for i in range(count)]


@pytest.mark.parametrize("scatter", ["rows", "elements"])
@pytest.mark.parametrize("name", ["toy", "turn_taking", "digits", "silero"])
def test_a_graph_with_its_arena_equals_the_host_rows(name: str, scatter: Scatter, toy: Path) -> None:
    path = {"toy": toy, "silero": SILERO}.get(name) or find_model(name)
    slots = 40
    a, b = host(path, slots), device(path, slots, scatter=scatter)
    begun: set[int] = set()
    rng = np.random.default_rng(1)
    for k in range(30):
        some = [int(s) for s in rng.permutation(slots)[: rng.integers(1, slots + 1)]]
        fresh = [s not in begun or bool(rng.random() < 0.05) for s in some]
        begun |= set(some)
        assert stepped(a, some, fresh, k) == stepped(b, some, fresh, k), k
    for slot in begun:
        one, other = a.read(slot), b.read(slot)
        assert all(one[n].tobytes() == other[n].tobytes() for n in one)
    assert a.shapes == b.shapes


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=20, unique=True), min_size=1, max_size=8))
def test_a_row_is_bit_identical_in_any_batch(toy: Path, runs: list[list[int]]) -> None:
    together = host(toy, 20)
    alone = {s: host(toy, 1) for s in {s for run in runs for s in run}}
    begun: set[int] = set()
    for k, run in enumerate(runs):
        fresh = [s not in begun for s in run]
        begun |= set(run)
        fill(together, len(run), k)
        inputs = {n: a[: len(run)].copy() for n, a in together.bucket(len(run)).inputs.items()}
        got = stepped(together, run, fresh, k)
        for i, slot in enumerate(run):
            bucket = alone[slot].bucket(1)
            for n, array in inputs.items():
                bucket.inputs[n][0] = array[i]
            bucket.run_one(0, fresh[i])
            assert b"".join(a[0].tobytes() for a in bucket.outputs.values()) == got[i]


def test_prewarming_changes_no_state(toy: Path) -> None:
    for rows in (host(toy, 3), device(toy, 3)):
        stepped(rows, [0, 1, 2], [True] * 3, 0)
        before = [rows.read(s) for s in range(3)]
        rows.prewarm()
        after = [rows.read(s) for s in range(3)]
        assert all(a[n].tobytes() == b[n].tobytes() for a, b in zip(before, after, strict=True) for n in a)


def test_written_states_are_read_back(toy: Path) -> None:
    for rows in (host(toy, 3), device(toy, 3)):
        state = {n: np.full(shape, 0.25, dtype) for n, (shape, dtype) in rows.shapes.items()}
        rows.write(1, state)
        assert all((rows.read(1)[n] == state[n]).all() for n in state)
        assert all((rows.read(0)[n] == 0).all() for n in state)


def test_only_needed_buckets_exist() -> None:
    assert sizes_for(1) == [1]
    assert sizes_for(9)[-1] == 12
    assert sizes_for(10**6) == list(SIZES)


def test_a_bucket_over_the_budget_is_not_used(toy: Path) -> None:
    graph = Graph(toy)
    rows = HostRows(graph, contract_of(graph), 64, 64, 0)
    assert rows.batch == 1
    assert len(rows.buckets) == 1


def test_buckets_with_different_bits_are_not_used(tmp_path: Path) -> None:
    """A graph whose rows depend on the batch size: only the largest bucket is used."""
    path = toy_model.make(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    h = onnx.helper
    for node in model.graph.node:
        node.output[:] = ["first" if o == "z" else o for o in node.output]
    extra = [
        h.make_node("Shape", ["active"], ["n"]),
        h.make_node("Cast", ["n"], ["many"], to=onnx.TensorProto.FLOAT),
        h.make_node("Div", ["first", "many"], ["z"]),
    ]
    at = next(i for i, n in enumerate(model.graph.node) if "z" in n.input)
    nodes = list(model.graph.node)
    nodes[at:at] = extra
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(path))
    assert [b.size for b in host(path, 3).buckets] == [8]
    assert [b.size for b in host(path, 16).buckets] == [16]


def states_of(path: Path) -> dict[str, Carried]:
    contract = contract_of(Graph(path))
    wires = contract.wiring.states
    return {
        wires[s.name].input: Carried(wires[s.name].output, s.shape, wires[s.name].batch_axis)
        for s in contract.spec.states
    }


@pytest.mark.parametrize("scatter", ["rows", "elements"])
@pytest.mark.parametrize("name", ["toy", "turn_taking"])
def test_the_edited_file_is_a_valid_model(name: str, scatter: Scatter, toy: Path) -> None:
    path = toy if name == "toy" else find_model(name)
    model = onnx.load_from_string(with_arena(path.read_bytes(), states_of(path), scatter))
    onnx.checker.check_model(model, full_check=True)
    inputs = {i.name for i in model.graph.input}
    for state in states_of(path):
        assert state not in inputs
        assert onnx_rows.arena_name(state) in inputs
    assert onnx_rows.SLOTS in inputs
    original = onnx.load(str(path))
    assert {i.name for i in original.graph.initializer} < {i.name for i in model.graph.initializer}


def test_a_missing_state_is_named(toy: Path) -> None:
    with pytest.raises(ModelError, match=r"no `state\.missing`"):
        with_arena(toy.read_bytes(), {"state.missing": Carried("next.missing", (3,))})


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_raise_only_model_errors(toy: Path, data: st.DataObject) -> None:
    good = toy.read_bytes()
    states = states_of(toy)
    cut = data.draw(st.integers(0, len(good)))
    noise = data.draw(st.binary(max_size=40))
    for bad in (good[:cut], good[:cut] + noise + good[cut:], noise):
        with contextlib.suppress(ModelError):
            assert with_arena(bad, states)
