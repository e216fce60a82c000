from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from stream_mmrnn.training.cells import CELLS, GRU, LSTM, RGLRU, Cell, LinearCell, MinGRU, ReluRNN, State, create
from stream_mmrnn.training.scan import linear_loop, linear_scan
from stream_mmrnn.training.stack import Stack

I, H = 5, 7  # noqa: E741
NAMES = sorted(CELLS)
LINEAR = ["min_gru", "rg_lru"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shake(cell: Cell, scale: float = 0.6) -> Cell:
    """Weights large enough to reveal a wrong formula, and a learned initial state that is not zero."""
    count = sum(p.numel() for p in cell.parameters())
    vector_to_parameters(scale * noise(count, seed=7).to(next(cell.parameters()).dtype), cell.parameters())
    return cell


def make(name: str, dtype: torch.dtype = torch.float64, **options: object) -> Cell:
    return shake(create(name, I, H, learned_initial=True, **options).to(dtype))


def stepped(cell: Cell, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
    """The reference: a loop of steps with explicit initial states."""
    state = cell.initial(x.shape[0]) if state is None else state
    out = []
    for t in range(x.shape[1]):
        if reset is not None:
            begin = cell.initial(x.shape[0])
            state = {k: torch.where(reset[:, t, None], begin[k], v) for k, v in state.items()}
        y, state = cell.step(x[:, t], state)
        out.append(y)
    return torch.stack(out, 1), state


def same(a: tuple[Tensor, State], b: tuple[Tensor, State], tolerance: float) -> None:
    torch.testing.assert_close(a[0], b[0], atol=tolerance, rtol=0)
    assert a[1].keys() == b[1].keys()
    for name, value in a[1].items():
        torch.testing.assert_close(value, b[1][name], atol=tolerance, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NAMES)
def test_forward_is_a_loop_of_steps(name: str, dtype: torch.dtype, tolerance: float) -> None:
    cell = make(name, dtype).eval()
    if name == "rnn_relu":
        shake(cell, 0.2)  # otherwise values explode, and rounding errors with them
    x = noise(3, 40, I, dtype=dtype)
    state = {k: noise(3, *shape, dtype=dtype) for k, shape in cell.states.items()}
    same(cell(x), stepped(cell, x), tolerance)
    for share in (0.1, 0.5):  # few resets, and many
        reset = torch.rand(3, 40) < share
        assert reset[:, 1:].any()
        same(cell(x, state, reset), stepped(cell, x, state, reset), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("above", [None, 1.5, 0.0], ids=["no resets", "few", "many"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_loop(name: str, above: float | None) -> None:
    cell, restarts = make(name), above is not None
    reset = noise(2, 45) > (above or 0.0)
    reset[0, 0] = True
    found = []
    for run in (cell, lambda *a: stepped(cell, *a)):
        x = noise(2, 45, I).requires_grad_()
        state = {k: noise(2, *s, seed=3).requires_grad_() for k, s in cell.states.items()}
        y, after = run(x, state, reset if restarts else None)
        loss = y.square().sum() + sum(v.sum() for v in after.values())
        leaves = [x, *state.values(), *cell.parameters()]
        # without restarts nothing depends on the initial state, because a state was given
        found.append(torch.autograd.grad(loss, leaves, allow_unused=not restarts, materialize_grads=not restarts))
    for ours, loop in zip(*found, strict=True):
        torch.testing.assert_close(ours, loop, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_splits_and_restarts_give_the_same_result(name: str, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 40))
    cuts = sorted(data.draw(st.sets(st.integers(1, steps), max_size=4)) | {0, steps})
    flags = data.draw(st.lists(st.booleans(), min_size=2 * steps, max_size=2 * steps))
    reset = torch.tensor(flags).view(2, steps)
    stack = shake(Stack(name, I, H, 2, residual=True, norm="layer", learned_initial=True).double(), 0.3)
    x = noise(2, steps, I)
    with torch.no_grad():
        y, after = stack(x, None, reset)
        state: State | None = None
        parts = []
        for start, end in pairwise(cuts):
            part, state = stack(x[:, start:end], state, reset[:, start:end])
            parts.append(part)
        assert state is not None
        same((torch.cat(parts, 1), state), (y, after), 1e-6)
        # the steps after a restart are an independent sequence
        for row in range(2):
            starts = [0, *(t for t in range(1, steps) if reset[row, t])]
            for start, end in zip(starts, [*starts[1:], steps], strict=True):
                alone, _ = stack(x[row : row + 1, start:end])
                torch.testing.assert_close(y[row : row + 1, start:end], alone, atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 70), seed=st.integers(0, 99), kind=st.sampled_from(["gate", "any", "zeros"]))
def test_the_scan_is_the_loop(steps: int, seed: int, kind: str) -> None:
    b, h = noise(2, steps, 3, seed=seed), noise(2, 3, seed=seed + 1)
    a = noise(2, steps, 3, seed=seed + 2)
    a = {"gate": torch.sigmoid(4 * a), "any": a, "zeros": torch.sigmoid(a) * (a > 0)}[kind]
    weight = noise(2, steps, 3, seed=seed + 3)
    results = []
    for run in (linear_scan, linear_loop):
        inputs = [v.clone().requires_grad_() for v in (a, b, h)]
        out = run(*inputs)
        (out * weight).sum().backward()
        results.append([out, *(v.grad for v in inputs)])
    for ours, loop in zip(*results, strict=True):
        torch.testing.assert_close(ours, loop, atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 5, 23])
def test_the_scan_has_the_gradient_of_its_values(steps: int) -> None:
    inputs = (torch.sigmoid(noise(2, steps, 3)).requires_grad_(), noise(2, steps, 3).requires_grad_())
    assert torch.autograd.gradcheck(linear_scan, (*inputs, noise(2, 3).requires_grad_()))


def test_the_scan_takes_strided_and_expanded_tensors() -> None:
    pair, grads = noise(2, 30, 8).requires_grad_(), []
    for run in (linear_scan, linear_loop):
        pair.grad = None
        out = run(*pair.chunk(2, -1), noise(1, 4).expand(2, 4))
        out.sum().backward()  # the incoming gradient is an expanded scalar
        assert pair.grad is not None
        grads.append(pair.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", LINEAR)
def test_the_gates_have_the_gradient_of_their_values(name: str) -> None:
    cell = make(name)
    assert isinstance(cell, LinearCell)
    reset = noise(2, 9) > 0.8
    x, h = noise(2, 9, I).requires_grad_(), noise(2, H).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, h, *_: cell(x, {"h": h}, reset)[0], (x, h, *cell.parameters()))


@pytest.mark.parametrize("name", LINEAR)
def test_the_piece_size_does_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = make(name)
    found = []
    for piece in (1, 40, 1 << 20):
        monkeypatch.setattr("stream_mmrnn.training.scan.PIECE", piece)
        cell.zero_grad()
        y, _ = cell(noise(2, 30, I), None, noise(2, 30) > 1)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in cell.parameters())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("ours", "torchs"), [(GRU, nn.GRU), (LSTM, nn.LSTM)])
def test_a_step_is_torchs_step_with_torchs_weights(ours: type[Cell], torchs: type[nn.RNNBase]) -> None:
    theirs = torchs(I, H, batch_first=True).double()
    cell = ours(I, H).double()
    cell.load_state_dict({f"core.{k}": v for k, v in theirs.state_dict().items()})
    x = noise(3, 20, I)
    torch.testing.assert_close(stepped(cell, x)[0], theirs(x)[0], atol=1e-12, rtol=0)


def test_weights_are_initialised_as_in_the_papers() -> None:
    lstm, relu, rglru = LSTM(I, H), ReluRNN(I, H), RGLRU(I, H)
    assert (lstm.core.bias_ih_l0 + lstm.core.bias_hh_l0)[H : 2 * H].tolist() == [1.0] * H
    assert torch.equal(relu.core.weight_hh_l0, torch.eye(H))
    slowest = torch.exp(-rglru.gate_parameters()[0])
    assert slowest.min() >= 0.8999
    assert slowest.max() <= 0.9991
    for name in NAMES:
        for value in create(name, I, H).initial(2).values():
            assert value.shape == (2, H)
            assert not value.any()


def test_rg_lru_keeps_the_variance_of_its_input() -> None:
    cell = RGLRU(I, H)
    a, b = cell.coefficients((noise(500, H, seed=2), torch.full((500, H), 99.0), torch.ones(500, H)), (torch.ones(H),))
    torch.testing.assert_close(a.square() + b.square(), torch.ones_like(a), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_closed_and_open_gates_stay_finite(name: str, size: float) -> None:
    cell = create(name, I, H)
    x = (size * noise(2, 200, I, dtype=torch.float32)).requires_grad_()
    y, _ = cell(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    for value in [x, *cell.parameters()]:
        assert value.grad is not None
        assert torch.isfinite(value.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_restart_clears_nan(name: str) -> None:
    cell = create(name, I, H)
    broken = {k: torch.full((1, *s), float("nan")) for k, s in cell.states.items()}
    y, after = cell(noise(1, 3, I, dtype=torch.float32), broken, torch.tensor([[True, False, False]]))
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(v).all() for v in after.values())


@pytest.mark.parametrize("name", LINEAR)
def test_mixed_precision_keeps_the_state_in_float32(name: str) -> None:
    cell = create(name, I, H)
    x = noise(2, 50, I, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, after = cell(x)
    y.sum().backward()
    assert y.dtype == after["h"].dtype == torch.float32
    torch.testing.assert_close(y, cell(x)[0], atol=0.05, rtol=0)


def test_min_gru_lies_between_its_past_and_its_candidate() -> None:
    cell = MinGRU(I, H)
    y, _ = cell(noise(2, 300, I, dtype=torch.float32))
    k, v = cell.input(noise(2, 300, I, dtype=torch.float32)).chunk(2, -1)
    candidate = torch.where(v >= 0, v + 0.5, torch.sigmoid(v))
    torch.testing.assert_close(y[:, 0], torch.sigmoid(k[:, 0]) * candidate[:, 0], atol=1e-6, rtol=0)
    assert (y >= 0).all()
    assert (y <= candidate.amax(1, keepdim=True)).all()


def test_the_options_of_a_stack() -> None:
    x = noise(2, 9, I, dtype=torch.float32)
    plain = Stack("gru", I, H, 2)
    assert plain.states == {"0.h": (H,), "1.h": (H,)}
    first, second = plain.layers
    torch.testing.assert_close(plain(x)[0], second(first(x)[0])[0])
    residual = Stack("gru", I, H, 2, residual=True)
    first, second = residual.layers
    y = first(x)[0]
    torch.testing.assert_close(residual(x)[0], y + second(y)[0])
    for norm in ("layer", "rms"):
        y = Stack("gru", I, H, 2, residual=True, norm=norm)(x)[0]
        torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 9), atol=1e-2, rtol=0)
    dropped = Stack("gru", I, H, 2, dropout=0.5)
    assert not torch.equal(dropped(x)[0], dropped(x)[0])
    dropped.eval()
    assert torch.equal(dropped(x)[0], dropped(x)[0])


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: create("grru", I, H), "there is no cell 'grru'; known are rnn_tanh"),
        (lambda: Stack("gru", I, H, 2, norm="batch"), "there is no norm 'batch'"),
        (lambda: Stack("gru", I, H, 0), "1 layer or more"),
    ],
)
def test_unknown_names_are_errors(make_it: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_it()  # type: ignore[operator]


class _Step(nn.Module):
    """The step with its state as positional tensors, and a restart, in the form for the exporter."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor, reset: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.stack.states, state, strict=True))
        y, after = self.stack.step(x, self.stack.restart(named, reset))
        return y, *after.values()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_exported_step_is_the_step(name: str, tmp_path: Path) -> None:
    norm = "rms" if name in LINEAR else "layer"
    stack = Stack(name, I, H, 2, residual=True, norm=norm, learned_initial=True)
    shake(stack, 0.3).eval()
    names = list(stack.states)
    batch = torch.export.Dim("batch", min=1, max=1024)
    inputs = (torch.zeros(2, I), torch.zeros(2, dtype=torch.bool), *(torch.zeros(2, *s) for s in stack.states.values()))
    path = tmp_path / "step.onnx"
    with warnings.catch_warnings():
        # these warnings are about the exporter's internals (copyreg, pytree), not about the model
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Step(stack),
            inputs,
            dynamo=True,
            verbose=False,
            input_names=["x", "reset", *(f"state.{n}" for n in names)],
            output_names=["y", *(f"next.{n}" for n in names)],
            dynamic_shapes=({0: batch}, {0: batch}, tuple({0: batch} for _ in names)),
        )
    assert program is not None
    program.save(path)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert not kinds & {"GRU", "LSTM", "RNN", "Loop", "Scan", "If"}
    assert "Gemm" in kinds
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (1, 3):
        x = noise(rows, 50, I, dtype=torch.float32)
        reset = noise(rows, 50) > 1.5
        with torch.no_grad():
            sequence, after = stack(x, None, reset)
        with torch.no_grad():
            state = {f"state.{n}": np.ascontiguousarray(v.numpy()) for n, v in stack.initial(rows).items()}
        for t in range(50):
            y, *following = session.run(None, {"x": x[:, t].numpy(), "reset": reset[:, t].numpy(), **state})
            state = dict(zip(state, following, strict=True))
            np.testing.assert_allclose(y, sequence[:, t].numpy(), atol=1e-5, rtol=0)
        for n, value in after.items():
            np.testing.assert_allclose(state[f"state.{n}"], value.numpy(), atol=1e-5, rtol=0)
