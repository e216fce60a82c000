"""Events: a GRU that steps only in ticks that bring something, such as a word, and holds its output in between.

Words come every eighth tick or so. A cell that steps at every tick has to carry a sentence through all the empty ones;
this one reads word after word, and training runs it over the words alone. Knows nothing about what its inputs mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stream_mmrnn.training.cells import GRU

State = dict[str, Tensor]


class Events(nn.Module):
    """h_k = GRU(x_k, h_{k-1}) over the ticks k where `here` is true; at all others h stays. The output is h.

    A network of two rates, as in Koutnik et al., "A clockwork RNN", 2014; the clock here is the data.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.cell = GRU(input_size, hidden_size)
        self.states: dict[str, tuple[int, ...]] = dict(self.cell.states)

    def step(self, x: Tensor, here: Tensor, state: State) -> tuple[Tensor, State]:
        """One tick: `x` [B, I], `here` [B] of bool."""
        after, _ = self.cell.step(x, state)
        h = torch.where(here.unsqueeze(-1), after, state["h"])
        return h, {"h": h}

    def forward(self, x: Tensor, here: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        """A sequence: `x` [B, T, I], `here` and `reset` [B, T] of bool -> [B, T, H]."""
        batch, length = here.shape
        counts = here.sum(1)
        most = max(int(counts.max()), 1)
        # the events of each row, moved to its front; what follows them is computed and never read
        order = torch.sort((~here).to(torch.uint8), dim=1, stable=True).indices[:, :most]
        events = x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        # which life a tick is in: 0 goes on from `state`, the others began anew
        lives = torch.zeros_like(order) if reset is None else reset.cumsum(1).gather(1, order)
        before = torch.cat([torch.zeros_like(lives[:, :1]), lives[:, :-1]], 1)
        restart = (lives != before) & (torch.arange(most, device=x.device) < counts.unsqueeze(1))
        y, _ = self.cell(events, state, restart if bool(restart.any()) else None)
        # y_0 is what was there before the first event
        y = torch.cat([state["h"].unsqueeze(1), y], 1)
        newest = here.cumsum(1)
        held = y.gather(1, newest.unsqueeze(-1).expand(batch, length, y.shape[-1]))
        if reset is not None:
            life = torch.cat([torch.zeros_like(lives[:, :1]), lives], 1).gather(1, newest)
            held = torch.where((life == reset.cumsum(1)).unsqueeze(-1), held, torch.zeros_like(held))
        return held, {"h": held[:, -1]}

    def initial(self, batch: int) -> State:
        return self.cell.initial(batch)
