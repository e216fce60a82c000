"""A layout of Foxglove's panels for a recording: picture, sound, text, and a plot for each head.

The file format is that of Foxglove's export and import. The package's `foxglove_layout.json` is for the default model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from stream_mmrnn.viewers.columns import Column

_FILE = "foxglove_layout.json"
_IN_A_PATH = re.compile(r"[A-Za-z0-9_]+\Z")
"""The characters that a name in a message path may have."""
_MAX_PLOTS = 4
_MAX_LINES = 16

Layout = dict[str, Any]


def shipped() -> Layout:
    """The layout in the package."""
    layout: Layout = json.loads(resources.files(__package__).joinpath(_FILE).read_text(encoding="utf-8"))
    return layout


def for_heads(columns: Sequence[Column]) -> Layout:
    """The same with plots for another model's heads: the first few whose names are valid in a message path."""
    layout = shipped()
    panels = {name: config for name, config in layout["configById"].items() if not name.startswith("Plot!")}
    names = [n for n in dict.fromkeys(c.head for c in columns) if _IN_A_PATH.match(n)][:_MAX_PLOTS]
    plots = {f"Plot!{name}": _plot(name, [c for c in columns if c.head == name][:_MAX_LINES]) for name in names}
    layout["configById"] = panels | plots
    layout["layout"] = _side_by_side("row", [layout["layout"]["first"], _side_by_side("column", list(plots))], 40)
    return layout


def _plot(head: str, columns: Sequence[Column]) -> dict[str, Any]:
    paths = [
        {
            "value": f"prediction.heads.{head}[{column.index}]",
            "label": _line(column),
            "enabled": True,
            "timestampMethod": "publishTime",
        }
        for column in columns
    ]
    return {
        "foxglovePanelTitle": head,
        "paths": paths,
        "showLegend": True,
        "legendDisplay": "floating",
        "showXAxisLabels": True,
        "showYAxisLabels": True,
        "isSynced": True,
        "xAxisVal": "timestamp",
        "followingViewWidth": 30,
    }


def _line(column: Column) -> str:
    name = column.label.removeprefix(f"{column.head}.")
    return name if column.horizon_s is None else f"{name}: {column.horizon_s[0]:g} to {column.horizon_s[1]:g} s"


def _side_by_side(direction: str, items: list[Any], percent: float = 0) -> Any:
    """Panels in one direction, with equal shares, or with `percent` for the first."""
    if not items or not items[-1]:
        return items[0] if items else None
    if len(items) == 1:
        return items[0]
    share = percent or round(100 / len(items), 2)
    return {
        "direction": direction,
        "first": items[0],
        "second": _side_by_side(direction, items[1:]),
        "splitPercentage": share,
    }
