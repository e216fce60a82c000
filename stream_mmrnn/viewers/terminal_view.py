"""The terminal view of a running session: streams, heads as bars over time, latency, losses.

It draws the result of `LiveState.snapshot`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stream_mmrnn.core import topics
from stream_mmrnn.core.durations import spoken
from stream_mmrnn.core.streams import Stream, text_topics

_BARS = " ▁▂▃▄▅▆▇█"
STATE_STYLE = {
    "open": "green",
    "ready": "green",
    "missing": "red",
    "failed": "red",
    "stale": "yellow",
    "starting": "yellow",
    "restarting": "yellow",
}


def watched(table: Iterable[Stream]) -> tuple[str, ...]:
    """The topics that the view reads beside statuses and predictions, for a session's streams."""
    return (topics.FEATURE, *text_topics(table), topics.CLOCK)


def spark(values: list[float | None], width: int) -> str:
    """Numbers in [0, 1] as a line of bars, the newest at the right."""
    out = ""
    for value in values[-width:]:
        out += " " if value is None else _BARS[max(1, min(8, round(value * 8)))]
    return out.rjust(width)


def _bar(value: float | None, width: int = 20) -> Text:
    if value is None:
        return Text("–")
    filled = max(0.0, min(1.0, value)) * width
    full = int(filled)
    text = "█" * full + ("▌" if filled - full >= 0.5 else "")
    style = "green" if value < 0.5 else "bold yellow"
    return Text(text.ljust(width, "·"), style=style)


def _streams(state: dict[str, Any]) -> Table:
    table = Table(title="streams", title_justify="left", expand=True, box=None, header_style="dim")
    for name, justify in (
        ("stream", "left"),
        ("state", "left"),
        ("rate", "right"),
        ("age", "right"),
        ("tick", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, s in state["streams"].items():
        if not name.startswith("feature/"):
            continue
        age = "–" if s["age_ms"] is None else f"{s['age_ms']:.0f} ms" if s["age_ms"] < 10_000 else "> 10 s"
        used = {True: Text("● present", "green"), False: Text("○ absent", "dim"), None: Text("")}[s["present"]]
        what = s["state"] or "–"
        table.add_row(s["modality"], Text(what, STATE_STYLE.get(what, "")), f"{s['rate_hz']:.1f} Hz", age, used)
    return table


def _head(name: str, head: dict[str, Any], width: int) -> Panel:
    table = Table(box=None, show_header=False, expand=True, padding=(0, 1))
    values, series = head["values"], head["history"]["series"]
    for i, value in enumerate(values):
        label = head["labels"][i] if i < len(head["labels"]) else f"{name}[{i}]" if len(values) > 1 else name
        line = spark(series[i], width) if i < len(series) else ""
        number = "–" if value is None else f"{value:.2f}"
        if value is not None and head["threshold"] is not None:
            number += " yes" if value > head["threshold"] else " no "
        table.add_row(Text(label, "bold"), number, _bar(value), Text(line, "cyan"))
    return Panel(table, title=Text(f"{name} · {head['kind'] or 'values'}"), title_align="left", border_style="dim")


def _latency(state: dict[str, Any]) -> Table:
    table = Table(title="latency, ms", title_justify="left", box=None, header_style="dim", expand=True)
    table.add_column("")
    stages = list(state["latency"])
    for stage in stages:
        table.add_column(stage, justify="right")
    for p in ("p50", "p99"):
        table.add_row(p, *(f"{state['latency'][stage][p]:.2f}" for stage in stages))
    return table


def _streams_in_words(state: dict[str, Any]) -> Text:
    """The streams in one line."""
    line = Text.assemble(("streams  ", "dim"))
    for name, s in state["streams"].items():
        if name.startswith("feature/"):
            line.append(f"{s['modality']} ").append(f"{s['state'] or '–'}  ", STATE_STYLE.get(s["state"], ""))
    return line


def _head_lines(name: str, head: dict[str, Any], most: int) -> Table:
    """A head without a frame: its greatest numbers, in the head's order."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    values = head["values"]
    ranked = sorted(range(len(values)), key=lambda i: -1.0 if values[i] is None else -values[i])
    for i in sorted(ranked[:most]):
        label = head["labels"][i] if i < len(head["labels"]) else f"{name}[{i}]" if len(values) > 1 else name
        number = "–" if values[i] is None else f"{values[i]:.2f}"
        table.add_row(Text(name, "dim"), Text(label, "bold"), number, _bar(values[i]))
    return table


def _words(state: dict[str, Any], width: int) -> list[Text]:
    found = []
    for title, texts in (("text  ", state["texts"]), ("other ", state["other_texts"])):
        words = "  ".join(t["text"] for t in reversed(texts))
        if texts or title == "text  ":
            found.append(Text.assemble((title, "dim"), words[-(width - 8) :]))
    return found


def lines(parts: Iterable[RenderableType], width: int) -> int:
    """How many lines these take."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    return sum(len(console.render_lines(part, pad=False)) for part in parts)


def render(
    state: dict[str, Any], width: int, headline: str, notes: list[str], height: int | None = None
) -> RenderableType:
    """The whole view for a terminal of `width` columns.

    `height`: so many lines are there. What does not fit goes in this order: stages of the latency, losses, the table
    of streams (one line is left), older notes, frames of the heads, small numbers of the heads. Predictions and words
    stay.
    """
    ticks = "" if state["ticks"] is None else f"   {state['ticks']} ticks"
    top = Text.assemble(
        ("stream-mmrnn ", "bold"),
        headline,
        ticks and f"{ticks}   {state['predictions_per_s']:.0f} predictions/s",
    )
    losses = ", ".join(f"{r['node']} {r['what']} {r['count']}" for r in state["losses"]) or "none"
    parts: dict[str, list[RenderableType]] = {
        "top": [top],
        "gap": [Text()],
        "streams": [_streams(state)],
        "heads": [_head(name, head, max(10, width - 62)) for name, head in state["heads"].items()],
        "stages": [_latency(state)],
        "words": list(_words(state, width)),
        "losses": [Text.assemble(("losses  ", "dim"), losses)],
        "notes": [Text(f"! {note}", "yellow") for note in notes[-3:]],
    }

    smaller: list[tuple[str, list[RenderableType]]] = [
        ("stages", []),
        ("losses", []),
        ("gap", []),
        ("streams", [_streams_in_words(state)]),
        ("notes", parts["notes"][-1:]),
    ]
    most = max((len(head["values"]) for head in state["heads"].values()), default=0)
    smaller += [
        ("heads", [_head_lines(name, head, n) for name, head in state["heads"].items()]) for n in range(most, 0, -1)
    ]
    if height is not None:
        taken = {name: lines(some, width) for name, some in parts.items()}
        for name, less in [*smaller, ("notes", []), ("streams", [])]:
            if sum(taken.values()) <= height:
                break
            parts[name], taken[name] = less, lines(less, width)
    return Group(*(part for some in parts.values() for part in some))


def summary_table(summary: dict[str, Any]) -> RenderableType:
    """What `live` and `record` print when they end."""
    table = Table(title="where every message went", title_justify="left", header_style="dim")
    for name in ("stream", "produced", "delivered", "dropped", "by reason", ""):
        table.add_column(name, justify="right" if name in ("produced", "delivered", "dropped") else "left")
    for name, s in summary["streams"].items():
        reasons = ", ".join(f"{k} {v}" for k, v in s["dropped"].items()) or "–"
        sign = "=" if s["balanced"] else "≠"
        table.add_row(
            name,
            str(s["produced"]),
            str(s["delivered"]),
            str(sum(s["dropped"].values())),
            reasons,
            Text(sign, "green" if s["balanced"] else "red"),
        )
    parts: list[RenderableType] = []
    made = f"{summary['ticks']} ticks, {summary['predictions']} predictions in " if summary["model"] else ""
    parts.append(
        Text.assemble(
            (f"{made}{summary['seconds']:.1f} s", "bold"),
            f"; the first after {summary['first_prediction_s']:.2f} s" if summary["first_prediction_s"] else "",
        )
    )
    parts.append(table)
    parts += [Text(f"{name}: {s['reason']}", "yellow") for name, s in summary["streams"].items() if s["reason"]]
    parts += [
        Text(f"{name}: stale {s['stale']['count']} times (no data for twice its period), {s['stale']['seconds']:.1f} s")
        for name, s in summary["streams"].items()
        if s["stale"]["count"]
    ]
    if summary["latency_ms"]:
        parts.append(stage_table(summary["latency_ms"]))
    if summary["recording"]:
        r = summary["recording"]
        parts.append(
            Text(
                f"recorded {r['messages']} messages, {r['bytes'] / 1e6:.1f} MB, {r['lost']} lost, "
                f"{r['dropped']} dropped: {r['path']}"
            )
        )
    for name, v in summary["viewers"].items():
        if v["dropped"]:
            reasons = ", ".join(f"{k} {n}" for k, n in v["dropped"].items())
            parts.append(Text(f"{name}: {v['delivered']} of {v['produced']} messages; {reasons}", "yellow"))
    for name, denied in summary["denied"].items():
        reasons = ", ".join(f"{k} {n}" for k, n in denied.items())
        parts.append(Text(f"{name} refused connections or requests: {reasons}", "yellow"))
    for name, deaths in summary["restarts"].items():
        parts.append(Text(f"{name} {', '.join(deaths)}", "yellow"))
    if summary["repeated"]:
        parts.append(
            Text(
                f"{summary['repeated']} predictions were published again after a restart, and are counted once",
                "yellow",
            )
        )
    parts += [Text(text, "red") for text in (*summary["partial"], summary["failed"]) if text]
    return Group(*parts)


def verified(result: dict[str, Any]) -> RenderableType:
    """What `verify` prints of a recording."""
    ends, holes = result["ends"], result["holes"]
    parts: list[RenderableType] = [
        Text.assemble(
            (f"{result['recording']}: {result['state']}", "bold green" if result["whole"] else "bold yellow"),
            f", {spoken(result['seconds'])}, {sum(result['messages'].values())} messages"
            + (f", {result['predictions']} predictions" if result["predictions"] else "")
            + f"; ends at {spoken(ends['at_s'])}, byte {ends['at_byte']} of "
            f"{result['bytes']}: {ends['how']}",
        )
    ]
    table = Table(header_style="dim")
    for name in ("topic", "messages", "dropped", "by reason"):
        table.add_column(name, justify="left" if name in ("topic", "by reason") else "right")
    for topic in sorted(result["messages"].keys() | result["dropped"].keys()):
        dropped = result["dropped"].get(topic, {})
        reasons = ", ".join(f"{reason} {n}" for reason, n in dropped.items()) or "–"
        table.add_row(topic, str(result["messages"].get(topic, 0)), str(sum(dropped.values())), reasons)
    parts.append(table)
    if result["counted_until_s"] is not None:
        parts.append(Text(f"dropped messages are counted until {result['counted_until_s']:.1f} s", "dim"))
    for hole in holes:
        missing = ", ".join(f"{topic} {n}" for topic, n in hole["missing"].items())
        parts.append(
            Text(
                f"{hole['file']}: damaged from byte {hole['from_byte']} to {hole['to_byte']}, "
                f"after {hole['after_s']:.1f} s ({hole['why']})" + (f"; missing: {missing}" if missing else ""),
                "yellow",
            )
        )
    if result["repaired"]:
        for hole in result["repaired"].get("holes", []):
            missing = ", ".join(f"{topic} {n}" for topic, n in hole["missing"].items()) or "the rest"
            parts.append(
                Text(f"repaired: after {hole['after_s']:.1f} s of {hole['file']} missing: {missing}", "yellow")
            )
    for row in result["parts"]:
        parts.append(
            Text(
                f"part {row['part']}: {row['recording']}, {row['state']}, {row['seconds']:.1f} s, "
                f"{row['messages']} messages"
            )
        )
    return Group(*parts)


def stage_table(latency_ms: dict[str, dict[str, float]]) -> Table:
    table = Table(title="latency, ms", title_justify="left", header_style="dim")
    table.add_column("stage")
    for name in ("p50", "p95", "p99", "max"):
        table.add_column(name, justify="right")
    for stage, row in latency_ms.items():
        table.add_row(stage, *(f"{row[p]:.3f}" for p in ("p50", "p95", "p99", "max")))
    return table
