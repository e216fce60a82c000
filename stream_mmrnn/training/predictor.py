"""PredictorNetwork: tokens, fusion, cells and heads as one network, over a sequence or one step at a time.

`forward` and `step` compute the same function, so the served model is the trained one. `StepModule` is the module that
becomes the ONNX graph, with `active` and `reset` inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from stream_mmrnn.training import fusion
from stream_mmrnn.training.events import EventsCell, NextToken, TokenTable
from stream_mmrnn.training.evidence import Evidence
from stream_mmrnn.training.heads import Heads
from stream_mmrnn.training.last_value import LastValue
from stream_mmrnn.training.late_fusion import LateFusion
from stream_mmrnn.training.movement import Movement
from stream_mmrnn.training.recipe import Recipe
from stream_mmrnn.training.stack import Stack

State = dict[str, Tensor]
_CONTEXT, _LAST, _EVIDENCE, _MOVED = "context", "last", "evidence", "moved."
HEARD = "events.h"
"""In training: the event cell's output beside the heads' raw outputs, for the helper loss."""


def _under(prefix: str, state: State) -> State:
    """The state entries with this prefix, without the prefix."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _named(prefix: str, state: State) -> State:
    return {prefix + k: v for k, v in state.items()}


class PredictorNetwork(nn.Module):
    """The network from tick to heads. `states` are named `cell.*`, `fusion.*`, `events.*`, `moved.*`, `context`,
    `last`, `evidence`.
    """

    known: Tensor

    def __init__(self, recipe: Recipe, reduced: dict[str, int] | None = None) -> None:
        """`reduced`: how many principal axes a modality keeps (see `Tokens`)."""
        super().__init__()
        self.recipe = recipe
        f, c = recipe.fusion, recipe.cell
        sizes = {name: m.size for name, m in recipe.modalities.items()}
        selected = {name: m.select for name, m in recipe.modalities.items()}
        e = recipe.events
        self.rare = [name for name in sizes if name in e.modalities]
        places = {name: i for i, name in enumerate(sizes)}
        apart = [*self.rare, *e.tokens, *recipe.evidence.modalities, recipe.late_fusion.modality]
        # columns of `present` for the modalities of the fusion, and for those of the event cell
        self.common_at = [i for name, i in places.items() if name not in apart]
        self.rare_at = [places[name] for name in self.rare]
        self.token_at = [(name, places[name]) for name in e.tokens]
        self.moved_at = [(name, places[name]) for name, m in recipe.modalities.items() if m.window_s]
        self.moved = nn.ModuleDict(
            {
                fusion.key("", name): Movement(m.size, m.stack, m.window_s, recipe.tick_ns / 1e9)
                for name, m in recipe.modalities.items()
                if m.window_s
            }
        )
        shown = sizes | {name: self.movement(name).size for name, _ in self.moved_at}
        self.tokens = fusion.TokenLayer(shown, f.width, reduced, selected, apart)
        # 0 for a modality that was absent in training: its random weights must not influence served predictions
        self.register_buffer("known", torch.ones(len(sizes)))
        self.fusion = fusion.create(f.kind, len(self.common_at), f.width, c.hidden, heads=f.heads, memory=f.memory)
        if self.rare:
            count = sum(self.tokens.sizes[name] + 1 for name in self.rare)
            self.events = EventsCell(count, e.width, e.hidden, recipe.tick_ns / 1e9, e.vocabulary if e.tokens else 0)
            self.recall = nn.Sequential(nn.Dropout(e.dropout), nn.Linear(e.hidden, f.width))
        self.next_token = NextToken(e.hidden, e.vocabulary) if e.tokens and e.next_token else None
        self.cells = Stack(
            c.kind,
            f.width,
            c.hidden,
            c.layers,
            residual=c.residual,
            norm=c.norm,
            dropout=c.dropout,
            learned_initial=c.learned_initial,
        )
        self.heads = Heads(recipe.heads, c.hidden)
        self.states: dict[str, tuple[int, ...]] = {
            **{f"cell.{k}": v for k, v in self.cells.states.items()},
            **{f"fusion.{k}": v for k, v in self.fusion.states.items()},
            **({f"events.{k}": v for k, v in self.events.states.items()} if self.rare else {}),
            **{_MOVED + name: self.movement(name).state for name, _ in self.moved_at},
        }
        if self.fusion.conditioned:
            self.states[_CONTEXT] = (c.hidden,)
        starts = list(dict.fromkeys(start for h in recipe.heads for start in h.from_last))
        self.changes = {
            h.name: [starts.index(h.from_last[j % len(h.from_last)]) for j in range(h.size)]
            for h in recipe.heads
            if h.from_last
        }
        """By head that forecasts changes, the place in the state `last` of each of its numbers."""
        if starts:
            self.last = LastValue(starts, list(sizes))
            self.states[_LAST] = (len(starts),)
        self.evidence = Evidence(recipe.evidence, list(sizes)) if recipe.evidence.modalities else None
        if self.evidence is not None:
            self.states[_EVIDENCE] = (1,)
        late = recipe.late_fusion.modality
        self.late_fusion = LateFusion(recipe, self.tokens.sizes[late]) if late else None

    def movement(self, modality: str) -> Movement:
        """The running statistics of a modality that has a window."""
        found = self.moved[fusion.key("", modality)]
        assert isinstance(found, Movement)
        return found

    def ignore(self, modalities: Collection[str], ignored: bool = True) -> None:
        """Do not use these modalities, present or not; with `ignored` false, use them again."""
        for i, name in enumerate(self.recipe.modalities):
            if name in modalities:
                self.known[i] = float(not ignored)

    def use_channels(self, use: bool) -> None:
        """Whether movements are used of each channel by itself, too."""
        for name, _ in self.moved_at:
            self.movement(name).use_channels(use)

    @contextlib.contextmanager
    def using(self, modalities: Collection[str]) -> Iterator[None]:
        """Meanwhile use these modalities, which are ignored otherwise."""
        self.ignore(modalities, ignored=False)
        try:
            yield
        finally:
            self.ignore(modalities)

    @property
    def events_table(self) -> TokenTable | None:
        """The vectors of tokens, if the network reads tokens."""
        return self.events.table if self.rare else None

    def initial(self, batch: int) -> State:
        """The state before the first tick, [batch, ...]."""
        like = next(self.parameters())
        state = _named("cell.", self.cells.initial(batch))
        for name, shape in self.states.items():
            if not name.startswith("cell."):
                state[name] = like.new_zeros((batch, *shape))
        return state

    def step(
        self, features: dict[str, Tensor], present: Tensor, age: Tensor, state: State
    ) -> tuple[dict[str, Tensor], State]:
        """One tick: features [B, size], `present` and `age` [B, M]; the heads' raw outputs [B, size]."""
        present = present * self.known
        given, moved = dict(features), {}
        for name, place in self.moved_at:
            given[name], moved[_MOVED + name] = self.movement(name).step(
                features[name], present[:, place], state[_MOVED + name]
            )
        here, tokens = self._common(given, present, age)
        x, fused = self.fusion.step(tokens, here, state.get(_CONTEXT), _under("fusion.", state))
        following = _named("fusion.", fused) | moved
        if self.rare:
            x_rare, there, ids = self._rare(features, present)
            h, after = self.events.step(x_rare, there, _under("events.", state), ids)
            x = x + self.recall(h)
            following |= _named("events.", after)
        y, cells = self.cells.step(x, _under("cell.", state))
        following |= _named("cell.", cells)
        if self.fusion.conditioned:
            following[_CONTEXT] = y
        raw = self.heads(y)
        if self.changes:
            following[_LAST] = self.last.step(features, present, state[_LAST])
            raw = self.heads.from_last(raw, following[_LAST], self.changes)
        if self.evidence is not None:
            following[_EVIDENCE] = self.evidence.step(features, present, state[_EVIDENCE])
            raw = self._with_evidence(raw, following[_EVIDENCE], self.evidence)
        return self._with_late(raw, features, present), following

    def _with_late(self, raw: dict[str, Tensor], features: dict[str, Tensor], present: Tensor) -> dict[str, Tensor]:
        """Raw outputs with the late fusion added to one head; the head's temperature does not apply to it."""
        late = self.late_fusion
        if late is None or late.modality not in features:
            return raw
        name = self.recipe.late_fusion.head
        added = late(self.tokens.normal(late.modality, features[late.modality]), features, present)
        return raw | {name: raw[name] + added * self.heads.temperature(name)}

    def _with_evidence(self, raw: dict[str, Tensor], held: Tensor, evidence: Evidence) -> dict[str, Tensor]:
        """Raw outputs with the evidence added to one head; the head's temperature does not apply to it."""
        name = self.recipe.evidence.head
        return raw | {name: raw[name] + held * (evidence.weight * self.heads.temperature(name))}

    def _common(self, features: dict[str, Tensor], present: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of `present` that the fusion uses, and its tokens."""
        if not self.common_at:
            return present[..., :0], present.new_zeros((*present.shape[:-1], 0, self.tokens.width))
        if len(self.common_at) < present.shape[-1]:
            present, age = present[..., self.common_at], age[..., self.common_at]
        return present, self.tokens(features, present, age)

    def _rare(self, features: dict[str, Tensor], present: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The input of the event cell, in which ticks there is an event, and the ids of its tokens."""
        here = present[..., self.rare_at]
        parts = [here]
        for i, name in enumerate(self.rare):
            if name in features:
                parts.append(self.tokens.normal(name, features[name]) * here[..., i : i + 1])
            else:
                parts.append(here.new_zeros((*here.shape[:-1], self.tokens.sizes[name])))
        some = here.amax(-1) > 0
        ids = []
        for name, place in self.token_at:
            if name in features:
                there = present[..., place : place + 1]
                ids.append(features[name] * there)
                some = some | (there[..., 0] > 0)
        return torch.cat(parts, -1), some, torch.cat(ids, -1) if ids else None

    def typical(self, modality: str, noise: Tensor) -> Tensor:
        """Random features [..., size] like those of the training data, from standard normal noise of that shape."""
        if self.events_table is not None and modality in self.recipe.events.tokens:
            return self.events_table.typical(noise)
        if self.recipe.modalities[modality].window_s:
            return self.movement(modality).typical(noise)
        return self.tokens.typical(modality, noise)

    def said(self, features: dict[str, Tensor], present: Tensor) -> Tensor:
        """Per tick of features [B, T, ...] the row in the table of the first known token, whoever said it; 0: none."""
        assert self.events_table is not None
        found = torch.zeros(present.shape[:2], dtype=torch.long, device=present.device)
        for name, place in self.token_at:
            if name in features:
                rows = self.events_table.rows(features[name] * present[..., place : place + 1])
                first = rows.gather(-1, (rows > 0).to(torch.uint8).argmax(-1, keepdim=True)).squeeze(-1)
                found = torch.where(found > 0, found, first)
        return found

    def forward(
        self,
        features: dict[str, Tensor],
        present: Tensor,
        age: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        """A sequence of ticks: features [B, T, size], `present` and `age` [B, T, M], `reset` [B, T] before the tick."""
        present = present * self.known
        if state is None:
            state = self.initial(present.shape[0])
        given, moved = dict(features), {}
        for name, place in self.moved_at:
            before = state[_MOVED + name]
            if name in features:
                with torch.no_grad():  # there is nothing to learn, and a chunk is a loop over its ticks
                    given[name], after = self.movement(name)(features[name], present[..., place], before, reset)
            else:
                after = before if reset is None else torch.where(reset.any(1, keepdim=True), 0 * before, before)
            moved[_MOVED + name] = after
        sequence = self._loop if self.fusion.conditioned else self._scan
        raw, following = sequence(given, present, age, state, reset)
        following |= moved
        if self.changes:
            last, following[_LAST] = self.last(features, present, state[_LAST], reset)
            raw = self.heads.from_last(raw, last, self.changes)
        if self.evidence is not None:
            held, following[_EVIDENCE] = self.evidence(features, present, state[_EVIDENCE], reset)
            raw = self._with_evidence(raw, held, self.evidence)
        return self._with_late(raw, features, present), following

    def _scan(
        self, features: dict[str, Tensor], present: Tensor, age: Tensor, state: State, reset: Tensor | None
    ) -> tuple[dict[str, Tensor], State]:
        here, tokens = self._common(features, present, age)
        x, fused = self.fusion(tokens, here, _under("fusion.", state), reset)
        following = _named("fusion.", fused)
        if self.rare:
            h, after = self._hear(features, present, state, reset)
            x = x + self.recall(h)
            following |= _named("events.", after)
        y, cells = self.cells(x, _under("cell.", state), reset)
        raw = self.heads(y)
        if self.training and self.next_token is not None:
            raw[HEARD] = h
        return raw, following | _named("cell.", cells)

    def _hear(
        self, features: dict[str, Tensor], present: Tensor, state: State, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        """The event cell over a sequence."""
        x, there, ids = self._rare(features, present)
        heard: tuple[Tensor, State] = self.events(x, there, _under("events.", state), reset, ids)
        return heard

    def _loop(
        self, features: dict[str, Tensor], present: Tensor, age: Tensor, state: State, reset: Tensor | None
    ) -> tuple[dict[str, Tensor], State]:
        """A fusion that reads the cell's last output needs a loop over the ticks."""
        here, tokens = self._common(features, present, age)
        initial = self.initial(present.shape[0])
        recalled, last = None, {}
        if self.rare:
            h, after = self._hear(features, present, state, reset)
            recalled, last = self.recall(h), _named("events.", after)
        outputs = []
        for t in range(present.shape[1]):
            if reset is not None:
                state = choose(reset[:, t], initial, state)
            x, fused = self.fusion.step(tokens[:, t], here[:, t], state[_CONTEXT], _under("fusion.", state))
            if recalled is not None:
                x = x + recalled[:, t]
            y, cells = self.cells.step(x, _under("cell.", state))
            state = {**_named("cell.", cells), **_named("fusion.", fused), **last, _CONTEXT: y}
            outputs.append(y)
        return self.heads(torch.stack(outputs, 1)), state


def choose(rows: Tensor, one: State, other: State) -> State:
    """Select rows: `one` where `rows` [B] is true, else `other`; without arithmetic, so all bits are preserved."""
    return {k: torch.where(rows.reshape(-1, *([1] * (v.dim() - 1))), one[k].expand_as(v), v) for k, v in other.items()}


class StepModule(nn.Module):
    """The graph to export: from the inputs of the model contract to activated heads and next states."""

    def __init__(self, predictor: PredictorNetwork) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(
        self,
        features: dict[str, Tensor],
        present: Tensor,
        age: Tensor,
        active: Tensor,
        reset: Tensor,
        state: State,
    ) -> tuple[dict[str, Tensor], State]:
        """`active` and `reset` [B] of bool. Inactive rows keep their state bit for bit."""
        initial = self.predictor.initial(1)
        begun = choose(reset, initial, state)
        raw, following = self.predictor.step(features, present, age, begun)
        return self.predictor.heads.activate(raw), choose(active, following, state)
