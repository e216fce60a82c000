"""BlockRunner: runs of a graph for blocks of ticks, in as few runs as the largest bucket allows.

Knows slots, not sessions: the engine and each process of a sharded one step blocks with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stream_mmrnn.core.block import Block, Flags
from stream_mmrnn.core.types import Prediction, Tick
from stream_mmrnn.graph.runtime import Array
from stream_mmrnn.predict.columns import Columns, Row
from stream_mmrnn.predict.contract import Contract
from stream_mmrnn.predict.cpu_batches import Rows


class BlockRunner:
    """Steps blocks whose handles are slots of `rows`."""

    def __init__(self, rows: Rows, contract: Contract) -> None:
        wiring, spec = contract.wiring, contract.spec
        self._rows = rows
        self.columns = Columns(spec.modalities, rows.batch)
        self._inputs = tuple(wiring.inputs[m.name] for m in spec.modalities)
        self._present, self._age = wiring.present, wiring.age
        self._heads = tuple((h.name, wiring.heads[h.name]) for h in spec.heads)
        self.single = rows.bucket(1)
        self.row: Row = (
            [(m.name, self.single.inputs[wiring.inputs[m.name]][0]) for m in spec.modalities],
            self.single.inputs[wiring.present][0] if wiring.present else None,
            self.single.inputs[wiring.age][0] if wiring.age else None,
        )
        """The first row of `single`, and the heads of it."""
        self.row_heads = [(name, self.single.outputs[output][0]) for name, output in self._heads]

    def run(self, block: Block, fresh: Flags, heads: Mapping[str, Array]) -> None:
        """Step N ticks; slots with `fresh` [N] start from the initial state. Writes `heads`, by name [N, size]."""
        if len(block) == 1:
            self.columns.fill_only(block, self.row)
            self.single.run_one(block.handles.item(), fresh.item())
            for name, values in self.row_heads:
                heads[name][0] = values
            return
        taken = [0] * len(self._inputs)
        for start in range(0, len(block), self._rows.batch):
            rows = slice(start, min(start + self._rows.batch, len(block)))
            count = rows.stop - start
            bucket = self._rows.bucket(count)
            inputs = bucket.inputs
            self.columns.fill(
                block,
                rows,
                taken,
                [inputs[name] for name in self._inputs],
                inputs[self._present] if self._present else None,
                inputs[self._age] if self._age else None,
            )
            bucket.run(block.handles[rows], fresh[rows], count)
            for name, output in self._heads:
                heads[name][rows] = bucket.outputs[output][:count]


def predictions_of(
    ticks: Sequence[Tick], heads: Mapping[str, Array], model: str, start_ns: int, end_ns: int
) -> list[Prediction]:
    """What ticks became, as objects: `heads` by name [N, size], of which theirs are views."""
    names = list(heads)
    return [
        Prediction(tick, dict(zip(names, rows, strict=True)), model, start_ns, end_ns)
        for tick, rows in zip(ticks, zip(*heads.values(), strict=True), strict=True)
    ]
