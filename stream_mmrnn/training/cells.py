"""Recurrent cells with one interface: a whole sequence at once, or one step with explicit state.

Training calls `forward`; export traces `step`. Every cell writes `step` in plain operations, so the graph has no GRU or
LSTM operator. Both give the same result, wherever a sequence is split. Masks of inactive rows are not handled here: the
caller keeps the state of rows without data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream_mmrnn.core import plugins
from stream_mmrnn.training.scan import gated_scan

State: TypeAlias = dict[str, Tensor]

_sigmoid_backward = torch.ops.aten.sigmoid_backward  # grad * y * (1 - y) in one pass
_threshold_backward = torch.ops.aten.threshold_backward  # grad where x > the threshold


class Cell(nn.Module, ABC):
    """Base class: named states, their initial values, resets, and a sequence as a loop of steps."""

    def __init__(
        self, input_size: int, hidden_size: int, *, states: tuple[str, ...] = ("h",), learned_initial: bool = False
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.states: dict[str, tuple[int, ...]] = dict.fromkeys(states, (hidden_size,))
        """Shapes without batch axis."""
        self.learned_initial = learned_initial
        for name, shape in self.states.items():
            value = torch.zeros(shape)
            if learned_initial:
                self.register_parameter(f"initial_{name}", nn.Parameter(value))
            else:
                self.register_buffer(f"initial_{name}", value, persistent=False)

    def initial(self, batch: int) -> State:
        """The state before the first step; `initial(1)` broadcasts against any batch."""
        return {name: self._start(name).expand(batch, *shape) for name, shape in self.states.items()}

    def _start(self, name: str) -> Tensor:
        value = getattr(self, f"initial_{name}")
        assert isinstance(value, Tensor)
        return value

    @abstractmethod
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: `x` [B, I] -> output [B, H] and the state after it."""

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """A sequence: `x` [B, T, I] -> outputs [B, T, H] and the state after the last step.

        `state` is the state before the first step; where `reset` [B, T] is true, the row restarts before that step.
        """
        state = self.initial(x.shape[0]) if state is None else state
        if reset is None:
            return self.run(x, state)
        outputs = []
        for start, end in _cuts(reset):
            state = self.restart(state, reset[:, start])
            y, state = self.run(x[:, start:end], state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    def restart(self, state: State, reset: Tensor) -> State:
        """`state`, replaced by the initial state in the rows where `reset` [B] is true."""
        initial = self.initial(1)
        return {
            name: torch.where(reset.view(-1, *[1] * (value.dim() - 1)), initial[name], value)
            for name, value in state.items()
        }

    def run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """A sequence without resets. Cells with a faster implementation than a loop of steps override this."""
        outputs = []
        for x_t in x.unbind(1):
            y, state = self.step(x_t, state)
            outputs.append(y)
        return torch.stack(outputs, 1), state


_FEW_CUTS = 16
"""With more resets than this in a chunk, the rows' parts are run side by side, not one range of steps after another."""


def _cuts(reset: Tensor) -> list[tuple[int, int]]:
    """Split at the resets [B, T]: ranges of steps in which rows restart at the first step only.

    Resets are rare, so the ranges are long enough for fast kernels.
    """
    steps = reset.shape[1]
    starts = sorted({0, *reset.any(0).nonzero().flatten().tolist()})
    return list(zip(starts, [*starts[1:], steps], strict=True))


class TorchCell(Cell):
    """A cell that torch also implements: its module has the weights and runs sequences (cuDNN); `step` is ours."""

    core: nn.RNNBase

    def products(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """W x + b and U h + d of all gates, concatenated."""
        w, u, b, d = self.core.all_weights[0]
        return F.linear(x, w, b), F.linear(h, u, d)

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        if reset is None or set(self.states) != {"h"} or len(_cuts(reset)) <= _FEW_CUTS:
            return super().forward(x, state, reset)
        return self._by_parts(x, self.initial(x.shape[0]) if state is None else state, reset)

    def _by_parts(self, x: Tensor, state: State, reset: Tensor) -> tuple[Tensor, State]:
        """The parts of the rows between resets, side by side and padded: one call where a loop would be short calls.

        Only for cells whose output is their whole state: that after a part is the output at its last step.
        """
        batch, length = reset.shape
        begins = reset.clone()
        begins[:, 0] = True
        row, first = begins.nonzero(as_tuple=True)
        after = torch.cat([first[1:], first.new_tensor([length])])
        count = torch.where(after > first, after, torch.full_like(after, length)) - first
        step = torch.arange(int(count.max()), device=x.device)
        at = (first.unsqueeze(1) + step).clamp(max=length - 1)
        before = self.restart({"h": state["h"][row]}, reset[row, first])
        padded, _ = self.run(x[row.unsqueeze(1), at], before)
        inside = step < count.unsqueeze(1)
        y = padded[inside].reshape(batch, length, -1)  # the parts are in the order of rows and steps
        return y, {"h": y[:, -1]}

    def run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, h = self.core(x, state["h"].unsqueeze(0).contiguous())
        return y, {"h": h[0]}


class RNN(TorchCell):
    """Elman's network (Elman, "Finding structure in time", 1990).

    h_t = tanh(W x_t + b + U h_{t-1} + d); the output is h_t.
    """

    def __init__(self, input_size: int, hidden_size: int, *, learned_initial: bool = False) -> None:
        super().__init__(input_size, hidden_size, learned_initial=learned_initial)
        self.core = nn.RNN(input_size, hidden_size, batch_first=True)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        of_x, of_h = self.products(x, state["h"])
        h = torch.tanh(of_x + of_h)
        return h, {"h": h}


class ReluRNN(TorchCell):
    """Elman's network with a rectifier; U is initialised to the identity.

    h_t = max(0, W x_t + b + U h_{t-1} + d); the output is h_t. With a random U it vanishes or explodes (Le,
    Jaitly, Hinton, "A simple way to initialize recurrent networks of rectified linear units", 2015).
    """

    def __init__(self, input_size: int, hidden_size: int, *, learned_initial: bool = False) -> None:
        super().__init__(input_size, hidden_size, learned_initial=learned_initial)
        self.core = nn.RNN(input_size, hidden_size, nonlinearity="relu", batch_first=True)
        nn.init.eye_(self.core.all_weights[0][1])

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        of_x, of_h = self.products(x, state["h"])
        h = torch.relu(of_x + of_h)
        return h, {"h": h}


class LSTM(TorchCell):
    """Long short-term memory with a forget gate (Hochreiter and Schmidhuber 1997; Gers, Schmidhuber, Cummins 2000).

    i, f, g, o = split(W x_t + b + U h_{t-1} + d)
    c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
    h_t = sigmoid(o) * tanh(c_t); the output is h_t.
    The forget gate's bias starts at 1 (Jozefowicz, Zaremba, Sutskever, "An empirical exploration of recurrent network
    architectures", 2015).
    """

    def __init__(self, input_size: int, hidden_size: int, *, learned_initial: bool = False) -> None:
        super().__init__(input_size, hidden_size, states=("h", "c"), learned_initial=learned_initial)
        self.core = nn.LSTM(input_size, hidden_size, batch_first=True)
        _, _, b, d = self.core.all_weights[0]
        with torch.no_grad():  # torch adds two biases: one is set to 1, the other to 0
            b[hidden_size : 2 * hidden_size] = 1.0
            d[hidden_size : 2 * hidden_size] = 0.0

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        of_x, of_h = self.products(x, state["h"])
        i, f, g, o = (of_x + of_h).chunk(4, -1)
        c = torch.sigmoid(f) * state["c"] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, {"h": h, "c": c}

    def run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        start = (state["h"].unsqueeze(0).contiguous(), state["c"].unsqueeze(0).contiguous())
        y, (h, c) = self.core(x, start)
        return y, {"h": h[0], "c": c[0]}


class GRU(TorchCell):
    """Gated recurrent unit (Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014).

    In the form of torch and cuDNN, where the reset gate is applied after the matrix product:
    r = sigmoid(W_r x_t + b_r + U_r h_{t-1} + d_r), z = sigmoid(W_z x_t + b_z + U_z h_{t-1} + d_z)
    n = tanh(W_n x_t + b_n + r * (U_n h_{t-1} + d_n))
    h_t = (1 - z) * n + z * h_{t-1}; the output is h_t.
    """

    def __init__(self, input_size: int, hidden_size: int, *, learned_initial: bool = False) -> None:
        super().__init__(input_size, hidden_size, learned_initial=learned_initial)
        self.core = nn.GRU(input_size, hidden_size, batch_first=True)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h = state["h"]
        of_x, of_h = self.products(x, h)
        r_x, z_x, n_x = of_x.chunk(3, -1)
        r_h, z_h, n_h = of_h.chunk(3, -1)
        z = torch.sigmoid(z_x + z_h)
        n = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
        h = n + z * (h - n)
        return h, {"h": h}


class LinearCell(Cell):
    """A cell whose gates depend on the input only: h_t = a_t * h_{t-1} + b_t, trained with a parallel scan."""

    def __init__(self, input_size: int, hidden_size: int, *, columns: int, learned_initial: bool = False) -> None:
        super().__init__(input_size, hidden_size, learned_initial=learned_initial)
        self.input = nn.Linear(input_size, columns * hidden_size)

    @staticmethod
    @abstractmethod
    def coefficients(pre: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute a and b [..., H] elementwise from the columns of W x + b and from `gate_parameters()`."""

    @staticmethod
    @abstractmethod
    def fill(pre: Sequence[Tensor], parameters: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
        """The same for training, see `scan.Gates`."""

    @staticmethod
    @abstractmethod
    def gradient(
        kept: Sequence[Tensor], parameters: Sequence[Tensor], before: Tensor, d: Tensor, out: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The gradient of `fill`, see `scan.Gates`."""

    def gate_parameters(self) -> tuple[Tensor, ...]:
        """Parameters that `coefficients` needs in addition to the input, each [H]."""
        return ()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        a, b = self.coefficients(self.input(x).split(self.hidden_size, -1), self.gate_parameters())
        h = a * state["h"] + b
        return h, {"h": h}

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        state = self.initial(x.shape[0]) if state is None else state
        if reset is not None:
            state = self.restart(state, reset[:, 0])  # multiplying by 0 would not remove a NaN in the old state
        start = self._start("h") if self.learned_initial else None
        y = gated_scan(self, self.input(x), state["h"], self.gate_parameters(), reset, start)
        return y, {"h": y[:, -1]}


class MinGRU(LinearCell):
    """minGRU (Feng et al., "Were RNNs all we needed?", 2024), in the linear-space form with g.

    z_t = sigmoid(W_z x_t + b_z), h_t = (1 - z_t) * h_{t-1} + z_t * g(W_h x_t + b_h); the output is h_t.
    g(v) = v + 0.5 where v >= 0, sigmoid(v) elsewhere; written here as relu(v) + sigmoid(min(v, 0)).
    The paper trains in log space because its scan divides by products that underflow. Ours does not divide, and h_t
    lies between h_{t-1} and g, so the plain form is equally stable, allows any initial state, and equals `step` and the
    exported graph.
    """

    def __init__(self, input_size: int, hidden_size: int, *, learned_initial: bool = False) -> None:
        super().__init__(input_size, hidden_size, columns=2, learned_initial=learned_initial)

    @staticmethod
    def coefficients(pre: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        k, v = pre
        z = torch.sigmoid(k)
        return 1 - z, z * (torch.relu(v) + torch.sigmoid(torch.clamp(v, max=0.0)))

    @staticmethod
    def fill(pre: Sequence[Tensor], parameters: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
        k, v = pre
        z = k.sigmoid_()
        torch.sub(1, z, out=a)
        low = torch.clamp_max(v, 0.0).sigmoid_()
        g = v.relu_().add_(low)
        torch.mul(z, g, out=b)

    @staticmethod
    def gradient(
        kept: Sequence[Tensor], parameters: Sequence[Tensor], before: Tensor, d: Tensor, out: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        z, g = kept
        _sigmoid_backward((g - before).mul_(d), z, grad_input=out[0])
        d_g = z * d
        # g' = g * (1 - g), or 1 where v > 0; with g clamped to 1/2 the first form gives 1/4 there, so 3/4 are added
        above = _threshold_backward(d_g, g, 0.5)
        below = _sigmoid_backward(d_g, torch.clamp_max(g, 0.5))
        torch.add(below, above, alpha=0.75, out=out[1])
        return ()


class RGLRU(LinearCell):
    """Real-gated linear recurrent unit, a gated diagonal linear network (De et al., "Griffin", 2024).

    r_t = sigmoid(W_r x_t + b_r), i_t = sigmoid(W_i x_t + b_i), u_t = W_u x_t + b_u
    s_t = c * softplus(L) * r_t, a_t = exp(-s_t), c = 8
    h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * u_t); the output is h_t.
    a_t is in (0, 1) for any L and x, so the state cannot explode. L is initialised so that exp(-c * softplus(L)) is
    uniform in [0.9, 0.999].
    Unlike in the paper, the gates read x_t directly, through one dense matrix, without a convolution before.
    1 - a^2 loses precision where a is near 1, that is, for long memory. 2 tanh(s) / (1 + tanh(s)) is the same value
    without that loss; torch and the exported graph both compute it.
    """

    SCALE = 8.0
    OPEN = 30.0
    """From here on a gate is 1 in float32, and its exponential is still finite."""
    SMALLEST = 1e-12
    """Minimum of s: the slope of the square root at 0 is infinite, and infinity times a closed gate (0) is NaN."""

    def __init__(self, input_size: int, hidden_size: int, *, learned_initial: bool = False) -> None:
        super().__init__(input_size, hidden_size, columns=3, learned_initial=learned_initial)
        decay = -torch.log(torch.empty(hidden_size).uniform_(0.9, 0.999)) / self.SCALE
        self.rate = nn.Parameter(torch.log(torch.expm1(decay)))  # the inverse of softplus

    def gate_parameters(self) -> tuple[Tensor, ...]:
        return (self.SCALE * F.softplus(self.rate),)

    @staticmethod
    def coefficients(pre: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        r, i, u = pre
        (rate,) = parameters
        # the sigmoid of r by exp: onnxruntime's Sigmoid has an absolute error of 6e-8 for small values, which the
        # square root below amplifies to 1e-3
        e = torch.exp(torch.clamp(r, max=RGLRU.OPEN))
        s = torch.clamp(rate * (e / (1 + e)), min=RGLRU.SMALLEST)
        t = torch.tanh(s)
        return torch.exp(-s), torch.sqrt(2 * t / (1 + t)) * (torch.sigmoid(i) * u)

    @staticmethod
    def fill(pre: Sequence[Tensor], parameters: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
        r, i, u = pre
        minus_s = torch.clamp_max_(r.sigmoid_() * -parameters[0], -RGLRU.SMALLEST)
        torch.exp(minus_s, out=a)
        root = torch.expm1(minus_s.mul_(2.0)).neg_().sqrt_()
        torch.mul(root.mul_(i.sigmoid_()), u, out=b)

    @staticmethod
    def gradient(
        kept: Sequence[Tensor], parameters: Sequence[Tensor], before: Tensor, d: Tensor, out: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        r, i, u = kept
        (rate,) = parameters
        minus_s = torch.clamp_max_(r * -rate, -RGLRU.SMALLEST)
        a = torch.exp(minus_s)
        root = torch.expm1(minus_s.mul_(2.0)).neg_().sqrt_()
        d_s = (i * u).mul_(a).div_(root).sub_(before).mul_(d).mul_(a)  # gradient of s: root' = a^2 / root, a' = -a
        d_rate = (d_s * r).sum((0, 1))
        _sigmoid_backward(d_s.mul_(rate), r, grad_input=out[0])
        d_v = root.mul_(d)  # gradient of v = i * u
        torch.mul(d_v, i, out=out[2])
        _sigmoid_backward(d_v.mul_(u), i, grad_input=out[1])
        return (d_rate,)


CELLS: dict[str, type[Cell]] = {
    "rnn_tanh": RNN,
    "rnn_relu": ReluRNN,
    "lstm": LSTM,
    "gru": GRU,
    "min_gru": MinGRU,
    "rg_lru": RGLRU,
}


def create(name: str, input_size: int, hidden_size: int, **options: Any) -> Cell:
    """Create a cell by name; raises ValueError if the name is unknown."""
    if name in CELLS:
        return CELLS[name](input_size, hidden_size, **options)
    plugin = plugins.find("cells", name)
    if plugin is None:
        raise ValueError(f"there is no cell {name!r}; known are {', '.join([*CELLS, *plugins.names('cells')])}")
    made: Cell = plugins.call(plugin, input_size, hidden_size, **options)
    return made
