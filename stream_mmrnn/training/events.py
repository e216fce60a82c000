"""EventsCell: a GRU that steps only in ticks with an event, such as a word, and holds its output in between.

Words come in about every eighth tick. A cell that steps at every tick has to carry a sentence through the empty ticks;
this one reads only the words and the time between them, and training runs over the words only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stream_mmrnn.training.cells import GRU

State = dict[str, Tensor]

_SCALES_S = (0.25, 2.0)
"""Time scales of the two inputs that encode the time since the last event: about a word, about a pause."""
_LIMIT = 256
"""Ticks; longer times count as this one."""


class EventsCell(nn.Module):
    """h_k = GRU(W [x_k; d / (s + d) for s of two scales] + b, h_{k-1}) over the ticks k where `here` is true, d seconds
    after the previous event; in all other ticks h does not change. The output is h.

    Like Koutnik et al., "A clockwork RNN", 2014, it has two rates; here the data set the second one.
    """

    def __init__(self, input_size: int, width: int, hidden_size: int, tick_s: float) -> None:
        super().__init__()
        self.embed = nn.Linear(input_size + len(_SCALES_S), width)
        self.cell = GRU(width, hidden_size)
        self.tick_s = tick_s
        self.states: dict[str, tuple[int, ...]] = {**self.cell.states, "since": (1,)}

    def _enter(self, x: Tensor, ticks: Tensor) -> Tensor:
        """`x` [..., I] and the ticks since the previous event [..., 1]."""
        passed_s = ticks.clamp(max=_LIMIT) * self.tick_s
        entered: Tensor = self.embed(torch.cat([x, *(passed_s / (s + passed_s) for s in _SCALES_S)], -1))
        return entered

    def step(self, x: Tensor, here: Tensor, state: State) -> tuple[Tensor, State]:
        """One tick: `x` [B, I], `here` [B] of bool."""
        since = state["since"] + 1
        after, _ = self.cell.step(self._enter(x, since), {"h": state["h"]})
        h = torch.where(here.unsqueeze(-1), after, state["h"])
        since = torch.where(here.unsqueeze(-1), torch.zeros_like(since), since.clamp(max=_LIMIT))
        return h, {"h": h, "since": since}

    def forward(self, x: Tensor, here: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        """A sequence: `x` [B, T, I], `here` and `reset` [B, T] of bool -> [B, T, H]."""
        batch, length = here.shape
        counts = here.sum(1)
        most = max(int(counts.max()), 1)
        # the events of each row, moved to its front; the values after them are computed but not used
        order = torch.sort((~here).to(torch.uint8), dim=1, stable=True).indices[:, :most]
        events = x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        # the tick of the previous event, and of the last restart; negative if it was before this sequence
        ticks = torch.arange(length, device=x.device).expand(batch, length)
        begun = torch.full_like(ticks, -_LIMIT - 2)
        if reset is not None:
            begun = torch.where(reset, ticks, begun).cummax(1).values
        first = -1 - state["since"].long()
        places = torch.cat([first, order], 1)
        restarted = begun.gather(1, order)
        ago = torch.where(restarted > places[:, :-1], order - restarted + 1, order - places[:, :-1])
        restart = (restarted > places[:, :-1]) & (restarted >= 0)
        restart &= torch.arange(most, device=x.device) < counts.unsqueeze(1)
        y, _ = self.cell(
            self._enter(events, ago.clamp(min=0).unsqueeze(-1).to(x.dtype)),
            {"h": state["h"]},
            restart if bool(restart.any()) else None,
        )
        # entry 0 is the state before the first event
        newest = here.cumsum(1)
        last = places.gather(1, newest)
        y = torch.cat([state["h"].unsqueeze(1), y], 1)
        h = y.gather(1, newest.unsqueeze(-1).expand(batch, length, y.shape[-1]))
        anew = (begun > last) & (begun >= 0)
        if reset is not None:
            h = torch.where(anew.unsqueeze(-1), torch.zeros_like(h), h)
        since = torch.where(anew[:, -1], length - begun[:, -1], length - 1 - last[:, -1]).clamp(max=_LIMIT)
        return h, {"h": h[:, -1], "since": since.unsqueeze(1).to(x.dtype)}
