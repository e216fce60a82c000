"""The study's words and tables, from its kept results: every figure in them is one of these results.

Knows nothing about how they were made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .plan import CELLS, CONTENDERS, DISTANCES, FUSIONS, HEADS, LOOPS, REMEMBERED, Plan
from .runs import Result

SCANS = CELLS[len(LOOPS) :]
NONE = "–"


@dataclass(frozen=True)
class Found:
    """The results that are there, by the plan's names."""

    plan: Plan
    results: Mapping[str, Result]
    """By key."""

    def of(self, part: str, group: str) -> dict[str, list[Result]]:
        """A group's results by name, each seed's in its order; a name with none is absent."""
        out: dict[str, list[Result]] = {}
        for run in self.plan.runs:
            if (run.part, run.group) == (part, group) and run.key in self.results:
                out.setdefault(run.name, []).append(self.results[run.key])
        return out


def values(results: Sequence[Result], head: str, what: str = "primary") -> list[float]:
    """A figure of each; a run whose loss became no number has none."""
    found = [r.figures.get(head, {}).get(what) for r in results]
    return [float(v) for v in found if v is not None]


def mean(results: Sequence[Result], head: str, what: str = "primary") -> float:
    got = values(results, head, what)
    return fmean(got) if got else math.nan


def short(value: float) -> str:
    """Three digits, without the zero before the point."""
    if math.isnan(value):
        return NONE
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def figure(results: Sequence[Result], head: str, what: str = "primary") -> str:
    """The mean, and of several seeds the least and the greatest."""
    got = values(results, head, what)
    if not got:
        return "diverged" if any(r.diverged for r in results) else NONE
    spread = f" ({short(min(got))} to {short(max(got))})" if len(got) > 1 else ""
    return short(fmean(got)) + spread


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(header)
    lines = [head, ["---"] * len(head), *([str(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(found: Found, about: Mapping[str, Any]) -> str:
    """The whole study as Markdown."""
    parts = [
        _opening(about),
        _cells(found),
        _fusions(found),
        _grid(found),
        _memory(found),
        _speed(found),
        _size(found),
        _advice(found),
        _claims(found),
        _published(),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _opening(about: Mapping[str, Any]) -> str:
    missing = "".join(f"\n\nNot in it: {m}." for m in about["missing"])
    return f"""# Cells and fusions: a study

    {about["command"]}

{about["runs"]} runs, {about["minutes"]:.0f} minutes of processor time, one thread each; made on {about["date"]} with
{about["versions"]}. Every figure below is written by that command, and so is every sentence that holds one. Kept
results are used again: what was broken off goes on where it was.

The runs are small, so that there can be many: a few minutes of data, a few epochs. Compare within a table; the cards
of `models/` hold what the full recipes reach. A figure is of the test split, on the epoch that was best in validation;
with three seeds it is the mean, with the least and the greatest. **Where two figures differ by less than such a spread,
this study does not know which is better.**{missing}"""


_PARTS = {
    "digits": ("digits", "digit now, accuracy"),
    "turn_taking": ("turn_taking", "turn over, balanced accuracy"),
    "activity": ("activity", "accuracy"),
    "mnist_rows": ("MNIST by rows", "accuracy"),
    "polarity": ("sentence polarity", "accuracy"),
}


def head_of(part: str) -> str:
    return HEADS.get(part, "digit")


def _by_cell(found: Found, part: str) -> dict[str, list[Result]]:
    if part == "digits":
        grid = found.of("digits", "grid")
        return {c: grid[f"{c} concat"] for c in CELLS if f"{c} concat" in grid}
    return found.of(part, "cells")


def _cells(found: Found) -> str:
    by = {part: _by_cell(found, part) for part in _PARTS}
    parts = [p for p in _PARTS if by[p]]
    if not parts:
        return ""
    rows = [[f"`{c}`", *(figure(by[p].get(c, []), head_of(p)) for p in parts)] for c in CELLS]
    said = "; ".join(f"{_PARTS[p][0]}: {_PARTS[p][1]}" for p in parts)
    return f"## Cells\n\n{table(['cell', *(_PARTS[p][0] for p in parts)], rows)}\n\n{said}."


def _alone(results: Sequence[Result], head: str) -> list[tuple[str, float]]:
    """By the set of modalities present, in the order of the first result."""
    if not results or not results[0].alone:
        return []
    return [(s, fmean(r.alone[s][head] for r in results)) for s in results[0].alone]


def _fusions(found: Found) -> str:
    digits, turns = found.of("digits", "larger"), found.of("turn_taking", "fusions")
    out = []
    if digits:
        rows = [
            [f"`{f}`", figure(digits.get(f, []), "digit"), figure(digits.get(f, []), "next_digit")] for f in CONTENDERS
        ]
        out.append(
            "`digits` with a GRU, twice the data and more epochs than in the grid below, three seeds:\n\n"
            + table(["fusion", "digit now", "next digit"], rows)
        )
        sets = _alone(digits.get("attention", []), "digit")
        if sets:
            there = ", ".join(f"{s} {short(v)}" for s, v in sets)
            out.append(f"What is present, with `attention` (digit now): {there}.")
    if turns:
        rows = [
            [f"`{f}`", figure(turns.get(f, []), "turn_over"), figure(turns.get(f, []), "turn_over", "auc")]
            for f in FUSIONS
        ]
        out.append(
            "`turn_taking` with a GRU, words and voices fused, decisions 250 ms into mutual silences:\n\n"
            + table(["fusion", "balanced accuracy", "AUC"], rows)
        )
        sets = _alone(turns.get("concat", []), "turn_over")
        if sets:
            there = ", ".join(f"{s.replace('+', ' + ')} {short(v)}" for s, v in sets)
            out.append(f"What is present, with `concat`: {there}.")
    return "## Fusions\n\n" + "\n\n".join(out) if out else ""


def _grid(found: Found) -> str:
    grid = found.of("digits", "grid")
    if not grid:
        return ""

    def rows(head: str) -> list[list[str]]:
        return [[f"`{c}`", *(figure(grid.get(f"{c} {f}", []), head) for f in FUSIONS)] for c in CELLS]

    header = ["cell", *(f"`{f}`" for f in FUSIONS)]
    return f"""## Cells × fusions

`digits`, small, one seed. Digit now:

{table(header, rows("digit"))}

The next digit:

{table(header, rows("next_digit"))}

![Accuracy by cell and fusion](study/digits_grid.png)"""


def _memory(found: Found) -> str:
    recalled, looked = found.of("recall", "distance"), found.of("recall", "look back")
    gradient = found.of("recall", "gradient")
    if not (recalled and gradient):
        return ""
    rows = [[f"`{c}`", *(figure(recalled.get(f"{c} {d}", []), "symbol") for d in DISTANCES)] for c in CELLS]
    if looked:
        cells = (figure(looked.get(f"rnn_tanh {d}", []), "symbol") if d in REMEMBERED else NONE for d in DISTANCES)
        rows.append(["`rnn_tanh` with `memory`", *cells])

    def reach(cell: str, ticks: int) -> str:
        return f"{fmean(r.figures['ratio'][ticks] for r in gradient[cell]):.1e}"

    shares = [[f"`{c}`", *(reach(c, k) for k in (10, 50, 100, 200))] for c in CELLS if c in gradient]
    return f"""## Long dependencies

Made data: the first of N symbols, marked, is asked for at the last tick, in training at every tick; 3,200 sequences an
epoch, five epochs, three seeds. Chance is .125; a figure between is often one seed that found it and one that did not.

{table(["cell", *(f"{d} ticks" for d in DISTANCES)], rows)}

`memory` attends to the last N states, whatever the cell: what is recalled then is looked up and not carried.

How much the last output of an untrained cell depends on the input k ticks back, against the last input (norm of the
gradient, mean of five seeds):

{table(["cell", "10", "50", "100", "200"], shares)}

![Gradients and recall over distance](study/long_dependencies.png)"""


def _speed(found: Found) -> str:
    bench = found.of("speed", "bench")
    if not bench:
        return ""
    lengths = sorted(bench, key=int)
    rows = []
    for cell in ("nn.GRU", *CELLS):
        of = [bench[n][0].figures[cell] for n in lengths]
        rows.append([f"`{cell}`", *(f"{v['tokens_per_s']:,} ({v['times_nn_gru']:.2f})" for v in of)])
    return f"""## Training speed

Ticks a second, forward and backward, 128 wide, batch 8, one thread (`tools/bench/cells.py`, interleaved rounds); in
brackets against torch's `nn.GRU` in the same run.

{table(["cell", *(f"{n} ticks" for n in lengths)], rows)}

![Training speed by length](study/training_speed.png)"""


def _size(found: Found) -> str:
    steps = found.of("speed", "step")
    if not steps:
        return ""
    rows = []
    for cell in CELLS:
        if cell in steps:
            (r,) = steps[cell][:1]
            f = r.figures
            rows.append([f"`{cell}`", f"{f['cell_weights']:,}", f"{f['bytes'] / 1024:,.0f}", f"{f['us']:.0f}"])
    return f"""## Size and the time of a step

The exported step graph of a `digits` model, 128 wide, `concat`; one session, inputs bound once, the median of seven
rounds of 500 steps. With one session the time is mostly that of calling the graph's operators, not of their arithmetic.

{table(["cell", "weights of the cell", "file, KiB", "step, µs"], rows)}"""


def _moves(found: Found) -> list[tuple[str, str, list[Result], list[Result], float]]:
    """Part, what was changed, the results with and without it, and the difference of their means."""
    out = []
    for part in _PARTS:
        base = found.of(part, "cells").get("gru", [])
        for name, results in found.of(part, "advice").items():
            head = head_of(part)
            out.append((part, name, results, base, mean(results, head) - mean(base, head)))
    return out


def _signed(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:+.3f}".replace("0.", ".", 1)


def _advice(found: Found) -> str:
    rows = [
        [_PARTS[part][0], name, figure(results, head_of(part)), figure(base, head_of(part)), _signed(differs)]
        for part, name, results, base, differs in _moves(found)
    ]
    if not rows:
        return ""
    return f"""## Reduction, regularisation, rates, data

A GRU with one thing changed, one seed, beside the same without the change, three seeds.

{table(["task", "changed", "then", "without", "difference"], rows)}"""


# ---- the seeds' claims -------------------------------------------------------------------------------------------


def _verdict(better: Sequence[Result], than: Sequence[Result], head: str) -> str:
    """Whether seeds of one lie all above, all below or among those of the other."""
    a, b = values(better, head), values(than, head)
    if not a or not b:
        return "not measured"
    if min(a) > max(b):
        return "better"
    return "worse" if max(a) < min(b) else "no difference beyond the seeds'"


def _claims(found: Found) -> str:
    out = []
    recalled, looked = found.of("recall", "distance"), found.of("recall", "look back")
    if recalled:

        def at(cell: str, distance: int) -> str:
            return figure(recalled.get(f"{cell} {distance}", []), "symbol")

        near, far = DISTANCES[0], REMEMBERED[-1]
        others = ", ".join(f"`{c}` {at(c, far)}" for c in CELLS if c not in ("rnn_tanh", "lstm"))
        out.append(
            "**A plain RNN has trouble with long dependencies; the gates of an LSTM mend it.** With the same small"
            f" training tanh recalls {at('rnn_tanh', near)} over {near} ticks and the LSTM {at('lstm', near)}; over"
            f" {far} ticks {at('rnn_tanh', far)} and {at('lstm', far)}, the others {others}. A gate can learn to hold,"
            " which is not the same as holding from the start: how far a gradient reaches in an untrained cell is in"
            " the table."
        )
    if looked:
        far = REMEMBERED[-1]
        with_it = figure(looked.get(f"rnn_tanh {far}", []), "symbol")
        without = figure(recalled.get(f"rnn_tanh {far}", []), "symbol")
        out.append(
            "**Attention to certain time steps helps with long dependencies.** The plain RNN that may look back"
            f" recalls {with_it} over {far} ticks, without {without}. The price is a ring of past steps in the state,"
            " and a bound: what fell out of the ring is gone."
        )
    bench = found.of("speed", "bench")
    if bench:
        longest = max(bench, key=int)
        of = bench[longest][0].figures
        scans = " and ".join(f"{of[c]['times_nn_gru']:.1f} times (`{c}`)" for c in SCANS)
        out.append(
            f"**Training is slow.** True of what must go step by step. At {longest} ticks the cells that are a scan"
            f" train {scans} as fast as `nn.GRU`, on one core of a CPU."
        )
    steps = found.of("speed", "step")
    if steps:
        f = {c: steps[c][0].figures for c in steps}
        out.append(
            "**The models are complex and need much computing.** Not at these sizes: a step takes"
            f" {min(v['us'] for v in f.values()):.0f} to {max(v['us'] for v in f.values()):.0f} µs. An LSTM has"
            f" {f['lstm']['cell_weights'] / f['rnn_tanh']['cell_weights']:.1f} times the weights of a plain RNN,"
            f" `min_gru` {f['min_gru']['cell_weights'] / f['rnn_tanh']['cell_weights']:.1f} times."
        )
    larger = found.of("digits", "larger")
    if larger:
        simple = larger.get("concat", [])
        said = "; ".join(
            f"`{k}` against `concat`: digit {_verdict(larger.get(k, []), simple, 'digit')}, next digit"
            f" {_verdict(larger.get(k, []), simple, 'next_digit')}"
            for k in ("attention", "gated", "add")
        )
        out.append(
            "**Adding or concatenating features is simple, but ignores how modalities interact; attention fuses"
            f" better.** By the seeds' spread on `digits`: {said}. The cell sees what was fused, and its gates are"
            " products of it: an interaction does not have to be in the fusion."
        )
    grid = found.of("digits", "grid")
    if grid:
        average = {f: fmean(mean(grid[f"{c} {f}"], "digit") for c in CELLS if f"{c} {f}" in grid) for f in FUSIONS}
        order = ", ".join(f"`{f}` {short(v)}" for f, v in sorted(average.items(), key=lambda p: -p[1]))
        out.append(
            f"**Self-attention captures more complex dependencies.** Mean over all cells of the small grid: {order}."
            " `cross` is self-attention among the modalities of a tick."
        )
    moves = sorted((m for m in _moves(found) if not math.isnan(m[4])), key=lambda m: -abs(m[4]))
    if moves:
        most = "; ".join(f"{name} ({_PARTS[part][0]}, {_signed(differs)})" for part, name, *_, differs in moves[:3])
        out.append(
            "**More data, more complex structures, learning rates, feature selection and reduction, regularisation.**"
            f" The table above has one try of each. What moved most: {most}."
        )
    out.append(
        "**Figures about data that do not hold.** The seeds give IMDB more than 100,000 training texts and TIMIT"
        " dialogues with emotions; IMDB's release has 25,000 labelled training texts and 25,000 for the test (Maas et"
        " al. 2011), and TIMIT 6,300 read sentences of 630 speakers (Garofolo et al. 1993). Their example code keeps"
        " no state from step to step; here the parity of the carried step with the sequence is a test."
    )
    return "## What the seeds' claims turned out to be\n\n" + "\n".join(f"- {c}" for c in out)


_SOURCES = (
    (
        "sentence polarity (MR)",
        (
            "CNN on word vectors that are trained on 81.5 %, on vectors learned from the sentences alone 76.1 % (Kim"
            " 2014, arXiv:1408.5882)"
        ),
        "ten-fold cross-validation; reads the whole sentence, changes the vectors; ours is causal, here on frozen ones",
    ),
    (
        "human activity, windows of 2.56 s",
        "96 %, support vector machine on 561 features (Anguita et al. 2013, ESANN)",
        "six activities, and windows that hold one of them; ours says a label every tick, transitions included",
    ),
    (
        "hold or shift from sound and sight",
        (
            "audio alone 79 %, with facial expression, head and gaze 84 % (O'Connor Russell and Harte 2025,"
            " arXiv:2505.21043)"
        ),
        "video meetings, with prosody and sight; ours hears whether a person speaks, and reads words",
    ),
    (
        "`min_gru`'s training speed",
        "175 times a GRU's at 512 ticks (Feng et al. 2024, arXiv:2410.01201)",
        "on a GPU, where a loop step by step leaves it idle; ours is one core",
    ),
)


def _published() -> str:
    rows = table(["what", "published", "why it is not ours"], _SOURCES)
    return f"""## Published figures

None of these is from the same data, split or budget as a table above; the cards say what the full recipes reach.

{rows}"""
