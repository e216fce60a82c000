"""EventsCell: a GRU that steps only in ticks with an event, such as a word, and holds its output in between.

Words come in about every eighth tick. A cell that steps at every tick has to carry a sentence through the empty ticks;
this one reads only the words and the time between them, and training runs over the words only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stream_mmrnn.training.cells import GRU

State = dict[str, Tensor]

_SCALES_S = (0.25, 2.0)
"""Time scales of the two inputs that encode the time since the last event: about a word, about a pause."""
_IDS = 32_000
"""Ids of WordLlama's tokenizer; an encoder's number is the id + 1."""
_LIMIT = 256
"""Ticks; longer times count as this one."""


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """Of `x` [B, T, N] the ticks [B, K] of each row."""
    return x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class TokenTable(nn.Module):
    """Token ids -> the sum of their trained vectors. Ids without a vector of their own, and 0, add nothing.

    The frozen vector of the text goes in beside it, so this learns what the task needs to know beyond it; it starts
    from zero.
    """

    row: Tensor

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.register_buffer("row", torch.zeros(_IDS + 1, dtype=torch.long))
        """By id: which row of `vectors`; 0 for none."""
        self.vectors = nn.Parameter(torch.zeros(vocabulary + 1, width))

    def choose(self, ids: Tensor) -> None:
        """The ids [N] that have a vector, the most common first."""
        self.row.zero_()
        self.row[ids] = torch.arange(1, len(ids) + 1, device=self.row.device)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of ids, as floats as an encoder gives them; what is no id has row 0."""
        ids = ids.clamp(min=0)
        whole = torch.where(ids <= _IDS, ids, torch.zeros_like(ids)).long()  # not a number is no id
        return self.row[whole]

    def typical(self, noise: Tensor) -> Tensor:
        """Ids from standard normal noise: half of them none, the others any that have a vector."""
        known = (self.row > 0).nonzero().squeeze(-1)
        if not len(known):
            return torch.zeros_like(noise)
        ids = known[(noise.abs() * 1e4).long() % len(known)].to(noise.dtype)
        return torch.where(noise > 0, ids, torch.zeros_like(ids))

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` [..., K] -> [..., width]."""
        vectors = F.embedding(self.rows(ids), self.vectors, padding_idx=0)  # row 0 stays zero
        # a matrix product, not a sum: see `fusion.total`
        ones = vectors.new_ones((1, vectors.shape[-2]))
        return (ones @ vectors).squeeze(-2)


class NextToken(nn.Module):
    """A helper in training: which token comes next, from the output of the event cell (adaptive softmax of Grave et
    al. 2017). The served step does not have it.
    """

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.project = nn.Linear(hidden, 256)
        cuts = [n for n in (200, 1000, 4000) if n < vocabulary] or [max(1, vocabulary // 2)]
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(256, vocabulary + 1, cuts)

    def loss(self, heard: Tensor, rows: Tensor, reset: Tensor) -> Tensor:
        """`heard` [B, T, hidden]; `rows` [B, T]: of the first token said in each tick, 0 for none; `reset` [B, T].

        At each tick with a token, the next tick with one in the same chunk and the same sequence is the target.
        """
        said = rows > 0
        lives = reset.cumsum(1)
        lane, at = said.nonzero(as_tuple=True)
        same = (lane[1:] == lane[:-1]) & (lives[lane[1:], at[1:]] == lives[lane[:-1], at[:-1]])
        if not bool(same.any()):
            return heard.sum() * 0.0
        before, after = (lane[:-1][same], at[:-1][same]), (lane[1:][same], at[1:][same])
        value: Tensor = self.softmax(self.project(F.dropout(heard[before], 0.3, self.training)), rows[after]).loss
        return value


class EventsCell(nn.Module):
    """h_k = GRU(W [x_k; d / (s + d) for s of two scales] + b, h_{k-1}) over the ticks k where `here` is true, d seconds
    after the previous event; in all other ticks h does not change. The output is h.

    Like Koutnik et al., "A clockwork RNN", 2014, it has two rates; here the data set the second one.
    """

    def __init__(self, input_size: int, width: int, hidden_size: int, tick_s: float, vocabulary: int = 0) -> None:
        """`vocabulary`: how many tokens have a vector of their own, which is added to the projected input."""
        super().__init__()
        self.embed = nn.Linear(input_size + len(_SCALES_S), width)
        self.table = TokenTable(vocabulary, width) if vocabulary else None
        self.cell = GRU(width, hidden_size)
        self.tick_s = tick_s
        self.states: dict[str, tuple[int, ...]] = {**self.cell.states, "since": (1,)}

    def _enter(self, x: Tensor, ticks: Tensor, ids: Tensor | None) -> Tensor:
        """`x` [..., I], the ticks since the previous event [..., 1], and token ids [..., K]."""
        passed_s = ticks.clamp(max=_LIMIT) * self.tick_s
        entered: Tensor = self.embed(torch.cat([x, *(passed_s / (s + passed_s) for s in _SCALES_S)], -1))
        return entered if ids is None or self.table is None else entered + self.table(ids)

    def step(self, x: Tensor, here: Tensor, state: State, ids: Tensor | None = None) -> tuple[Tensor, State]:
        """One tick: `x` [B, I], `here` [B] of bool, `ids` [B, K] of tokens."""
        since = state["since"] + 1
        after, _ = self.cell.step(self._enter(x, since, ids), {"h": state["h"]})
        h = torch.where(here.unsqueeze(-1), after, state["h"])
        since = torch.where(here.unsqueeze(-1), torch.zeros_like(since), since.clamp(max=_LIMIT))
        return h, {"h": h, "since": since}

    def forward(
        self, x: Tensor, here: Tensor, state: State, reset: Tensor | None, ids: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """A sequence: `x` [B, T, I], `here` and `reset` [B, T] of bool, `ids` [B, T, K] -> [B, T, H]."""
        batch, length = here.shape
        counts = here.sum(1)
        most = max(int(counts.max()), 1)
        # the events of each row, moved to its front; the values after them are computed but not used
        order = torch.sort((~here).to(torch.uint8), dim=1, stable=True).indices[:, :most]
        events = _rows(x, order)
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
            self._enter(
                events,
                ago.clamp(min=0).unsqueeze(-1).to(x.dtype),
                None if ids is None else _rows(ids, order),
            ),
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
