"""StepEngine: ticks in, predictions out, one run of the graph for all sessions that have a tick.

The graph states its own contract (inputs `input.MODALITY`, `present`, `age`, `active`, `reset`, pairs `state.X` and
`next.X`, outputs `head.NAME`, and the rest as JSON in the file's metadata under `stream_mmrnn`); what does not fit is
said in one sentence. Knows nothing about topics, time or where ticks come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from stream_mmrnn.arena import Arena
from stream_mmrnn.clock import now_ns
from stream_mmrnn.errors import ModelError
from stream_mmrnn.runtime import Graph, Provider
from stream_mmrnn.topics import MODALITIES
from stream_mmrnn.types import HeadSpec, ModalitySpec, ModelSpec, Prediction, StateSpec, Tick

METADATA_KEY = "stream_mmrnn"
MAX_AGE_S = 10.0
"""Ages are clipped here; a stream that never was has this age too."""


class _Contract(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    tick_ns: int
    modalities: tuple[ModalitySpec, ...]
    heads: tuple[HeadSpec, ...]


def write_contract(name: str, tick_ns: int, modalities: Sequence[ModalitySpec], heads: Sequence[HeadSpec]) -> str:
    """The metadata value that `read_contract` reads: what an exporter puts into the file."""
    return msgspec.json.encode(_Contract(name, tick_ns, tuple(modalities), tuple(heads))).decode()


def read_contract(graph: Graph) -> ModelSpec:
    """What the graph promises.

    Raises:
        ModelError: it promises nothing, or its inputs and outputs are not what it promises.

    """
    where = graph.path
    if METADATA_KEY not in graph.metadata:
        raise ModelError(f"{where} has no `{METADATA_KEY}` metadata, so its contract is unknown; export it again")
    try:
        contract = msgspec.json.decode(graph.metadata[METADATA_KEY], type=_Contract)
    except msgspec.MsgspecError as e:
        raise ModelError(f"{where} has a contract that cannot be read: {e}") from e
    if contract.tick_ns <= 0:
        raise ModelError(f"{where} has a tick of {contract.tick_ns} ns; it must be longer than 0")
    states = []
    for name, spec in graph.inputs.items():
        if name.startswith("state."):
            following = "next." + name.removeprefix("state.")
            if following not in graph.outputs:
                raise ModelError(f"{where} has the input `{name}` but no output `{following}` that carries it on")
            if None in spec.shape[1:] or graph.outputs[following].shape[1:] != spec.shape[1:]:
                raise ModelError(f"{where}: `{name}` {spec.shape} and `{following}` must have one fixed shape per row")
            states.append(StateSpec(name.removeprefix("state."), tuple(n or 0 for n in spec.shape[1:])))
    count = len(contract.modalities)
    expected: dict[str, tuple[int | None, ...]] = {
        "active": (None,),
        "reset": (None,),
        "present": (None, count),
        "age": (None, count),
    }
    for modality in contract.modalities:
        if modality.name not in MODALITIES:
            raise ModelError(f"{where} wants the modality {modality.name!r}; known are {', '.join(MODALITIES)}")
        if modality.stack < 1 or modality.size % modality.stack:
            raise ModelError(f"{where}: the size {modality.size} of {modality.name} is not {modality.stack} samples")
        expected[f"input.{modality.name}"] = (None, modality.size)
    for name, shape in expected.items():
        if name not in graph.inputs:
            raise ModelError(f"{where} has no input `{name}`, which its contract needs")
        got = graph.inputs[name].shape
        if len(got) != len(shape) or got[1:] != shape[1:]:
            raise ModelError(f"{where}: input `{name}` has shape {got}, the contract says {shape}")
    for name in graph.inputs:
        if name not in expected and not name.startswith("state."):
            raise ModelError(f"{where} has the input `{name}`, which is neither state nor in its contract")
    for head in contract.heads:
        output = graph.outputs.get(f"head.{head.name}")
        if output is None or output.shape[1:] != (head.size,):
            raise ModelError(f"{where} has no output `head.{head.name}` of {head.size} numbers a row")
    return ModelSpec(contract.name, graph.sha256, contract.tick_ns, contract.modalities, contract.heads, tuple(states))


def check_model(path: Path, provider: Provider) -> ModelSpec:
    """Load and check a model before anything else starts; raises ModelError or ProviderError."""
    return read_contract(Graph(path, provider))


class StepEngine:
    """A recurrent model with a fixed number of slots; its state stays where the graph runs.

    Every run computes all slots: one shape, one address, so a session's numbers do not depend on who runs beside it.
    """

    def __init__(self, path: Path, slots: int = 1, provider: Provider = "cpu") -> None:
        self._graph = Graph(path, provider)
        self.spec = read_contract(self._graph)
        self.provider = self._graph.provider
        inputs: dict[str, tuple[int, ...]] = {
            "active": (slots,),
            "reset": (slots,),
            "present": (slots, len(self.spec.modalities)),
            "age": (slots, len(self.spec.modalities)),
        }
        for m in self.spec.modalities:
            inputs[f"input.{m.name}"] = (slots, m.size)
        self._binding = self._graph.bind(
            inputs,
            {f"head.{h.name}": (slots, h.size) for h in self.spec.heads},
            {f"state.{s.name}": (f"next.{s.name}", (slots, *s.shape)) for s in self.spec.states},
        )
        self.arena = Arena(self._binding, slots)
        arrays = self._binding.inputs
        self._active, self._reset = arrays["active"], arrays["reset"]
        self._present, self._age = arrays["present"], arrays["age"]
        self._features = [(m.name, arrays[f"input.{m.name}"]) for m in self.spec.modalities]
        self._names = [m.name for m in self.spec.modalities]
        self._heads = [(h.name, self._binding.outputs[f"head.{h.name}"]) for h in self.spec.heads]
        self._binding.run()  # the first run allocates; no row is active, so no state moves

    def open(self, session: str) -> None:
        """Give a session a slot; raises Busy or DuplicateSession at once."""
        self.arena.acquire(session)

    def __contains__(self, session: str) -> bool:
        return session in self.arena

    def reset(self, session: str) -> None:
        """Start a session's state anew."""
        self.arena.reset(session)

    def close(self, session: str) -> None:
        self.arena.release(session)

    def step(self, ticks: Sequence[Tick]) -> list[Prediction]:
        """Predictions for the ticks, in their order; one run for all sessions, as many as a session has ticks.

        Raises:
            UnknownSession: a tick of a session that is not open; nothing was stepped.

        """
        slots = [self.arena.slot(tick.session) for tick in ticks]
        out: list[Prediction] = []
        start = 0
        while start < len(ticks):
            end, taken = start, set()
            while end < len(ticks) and slots[end] not in taken:
                taken.add(slots[end])
                end += 1
            out += self._run(ticks[start:end], slots[start:end])
            start = end
        return out

    def _run(self, ticks: Sequence[Tick], slots: Sequence[int]) -> list[Prediction]:
        start_ns = now_ns()
        self._active[:] = 0
        self._reset[:] = 0
        for tick, slot in zip(ticks, slots, strict=True):
            self._active[slot] = 1
            if self.arena.fresh[slot]:
                self._reset[slot] = 1
                self.arena.fresh[slot] = False
            for name, array in self._features:
                array[slot] = tick.features[name]
            self._present[slot] = [tick.present[name] for name in self._names]
            ages_ns = [tick.age_ns[name] for name in self._names]
            self._age[slot] = [MAX_AGE_S if age < 0 else min(age / 1e9, MAX_AGE_S) for age in ages_ns]
        self._binding.run()
        end_ns = now_ns()
        return [
            Prediction(
                tick,
                {name: array[slot].copy() for name, array in self._heads},
                self.spec.sha256,
                start_ns,
                end_ns,
            )
            for tick, slot in zip(ticks, slots, strict=True)
        ]
