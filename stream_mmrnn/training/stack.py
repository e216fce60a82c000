"""A stack of layers of one recurrent cell, with the interface of a cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from stream_mmrnn.training.cells import Cell, State, create

NORMS: dict[str, type[nn.Module]] = {"none": nn.Identity, "layer": nn.LayerNorm, "rms": nn.RMSNorm}


class Stack(Cell):
    """Layers of one cell, with the interface of a cell; states are named `LAYER.NAME`.

    Each layer reads norm(s); its output y replaces s, or is added to it with `residual`. The first layer reads the
    input without a norm, and has a residual only if the input is as wide as the layer. The final output is normalised
    again, because the sum of pre-norm residual layers has no fixed scale (Xiong et al., "On layer normalization in the
    transformer architecture", 2020). Dropout is applied between layers, in training only.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        layers: int = 1,
        *,
        residual: bool = False,
        norm: str = "none",
        dropout: float = 0.0,
        learned_initial: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(input_size, hidden_size, states=(), learned_initial=learned_initial)
        if layers < 1:
            raise ValueError(f"a stack has 1 layer or more, not {layers}")
        if norm not in NORMS:
            raise ValueError(f"there is no norm {norm!r}; known are {', '.join(NORMS)}")
        self.residual = residual
        self.layers = nn.ModuleList(
            create(cell, hidden_size if i else input_size, hidden_size, learned_initial=learned_initial, **options)
            for i in range(layers)
        )
        self.norms = nn.ModuleList(NORMS[norm](hidden_size) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.states = {f"{i}.{name}": shape for i, c in enumerate(self._cells()) for name, shape in c.states.items()}

    def initial(self, batch: int) -> State:
        return {f"{i}.{name}": v for i, c in enumerate(self._cells()) for name, v in c.initial(batch).items()}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        following: State = {}
        for i, cell in enumerate(self._cells()):
            y, after = cell.step(self._enter(i, x), _of_layer(i, cell, state))
            x = self._leave(x, y)
            following |= {f"{i}.{name}": value for name, value in after.items()}
        return self._finish(x), following

    def forward(self, x: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        state = self.initial(x.shape[0]) if state is None else state
        following: State = {}
        for i, cell in enumerate(self._cells()):
            y, after = cell(self._enter(i, x), _of_layer(i, cell, state), reset)
            x = self._leave(x, y)
            following |= {f"{i}.{name}": value for name, value in after.items()}
        return self._finish(x), following

    def _cells(self) -> Iterator[Cell]:
        for cell in self.layers:
            assert isinstance(cell, Cell)
            yield cell

    def _enter(self, layer: int, x: Tensor) -> Tensor:
        """The input of a layer: `norms[layer - 1]` is before it; the last norm is after the stack."""
        if layer == 0:
            return x
        entering: Tensor = self.dropout(self.norms[layer - 1](x))
        return entering

    def _leave(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.residual and x.shape[-1] == y.shape[-1] else y

    def _finish(self, x: Tensor) -> Tensor:
        y: Tensor = self.norms[-1](x)
        return y


def _of_layer(layer: int, cell: Cell, state: State) -> State:
    return {name: state[f"{layer}.{name}"] for name in cell.states}
