"""What a bench says: a document with rows, ratios and verdicts; and two documents compared.

A ratio has a stable name, so that a document of today stands beside one of last month. A verdict is withheld where
other processes were busy. Knows nothing about what is measured or how it looks: that is `show` and `plots`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from stream_mmrnn.bench.machine import machine
from stream_mmrnn.core.errors import FileError

Better = Literal["less", "more"]
Ratio = dict[str, Any]
Document = dict[str, Any]

OTHERS_AT_MOST = 0.15
"""Of one core: what other processes may use before a verdict is withheld."""


def ratio(
    value: float | None,
    bound: float | None = None,
    better: Better = "less",
    other_cpu: float | None = 0.0,
    why: str = "",
) -> Ratio:
    """One figure and, where it has a bound, whether that holds: null where it cannot be judged, and `why`.

    `other_cpu` is the share of a core that other processes used meanwhile; `why` explains a value that is None.
    """
    held: bool | None = None
    why = f"not measured: {why or 'nothing came'}" if value is None else ""
    if value is not None and bound is not None:
        if other_cpu is None:
            why = "no verdict: this system does not tell what other processes use"
        elif other_cpu > OTHERS_AT_MOST:
            why = f"no verdict: others used {100 * other_cpu:.0f} % of a core"
        else:
            held = value <= bound if better == "less" else value >= bound
    rounded = None if value is None else float(f"{value:.5g}")
    return {"value": rounded, "bound": bound, "better": better, "held": held, "why": why}


def document(
    bench: str,
    settings: Mapping[str, Any],
    rows: list[dict[str, Any]],
    ratios: Mapping[str, Ratio],
    **more: Any,
) -> Document:
    """What a bench returns and `--json` prints; `more` is what that bench alone has to say."""
    return {
        "bench": bench,
        "machine": machine(),
        "settings": dict(settings),
        "rows": rows,
        "ratios": dict(ratios),
        **more,
    }


def load(path: Path, bench: str) -> Document:
    """The document in a file that holds it alone, or in the last line of a log.

    Raises:
        FileError: there is none, or it is another bench's.

    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise FileError(f"the base {path} cannot be read: {e}; give the output of `bench {bench} --json`") from e
    for candidate in (text, text.strip().rpartition("\n")[2]):
        try:
            found = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(found, dict) and _is_whole(found):
            if found["bench"] != bench:
                raise FileError(f"the base {path} is of bench {found['bench']!r}; give one of `bench {bench} --json`")
            return found
    raise FileError(f"the base {path} holds no document of a bench; give the output of `bench {bench} --json`")


def _is_whole(found: Document) -> bool:
    ratios = found.get("ratios")
    return isinstance(found.get("bench"), str) and isinstance(ratios, dict) and all(map(_is_ratio, ratios.values()))


def _is_ratio(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.get("better") in ("less", "more")
        and type(entry.get("value", "")) in (int, float, type(None))
    )


def compare(base: Document, now: Document) -> list[dict[str, Any]]:
    """By stable name: what it was, what it is, now over base, and whether that is better; what only one has, too."""
    rows = []
    for name in {**base["ratios"], **now["ratios"]}:
        before, after = base["ratios"].get(name), now["ratios"].get(name)
        was, is_ = before and before["value"], after and after["value"]
        times = round(is_ / was, 4) if was and is_ is not None else None
        better = (after or before)["better"]
        verdict = None if times is None or times == 1 else (times < 1) == (better == "less")
        rows.append({"name": name, "base": was, "now": is_, "ratio": times, "improved": verdict})
    return rows


def cautions(base: Document, now: Document) -> list[str]:
    """Why a comparison of the two may say more about the machines than about the program."""
    found = []
    for name, it in (("the base", base), ("this run", now)):
        shares = [r.get("other_cpu") for r in it.get("rows", ()) if isinstance(r, dict)]
        most = max((x for x in shares if isinstance(x, int | float)), default=0.0)
        if most > OTHERS_AT_MOST:
            found.append(f"{name} was measured while others used {100 * most:.0f} % of a core")
    for key in ("machine", "settings"):
        before, after = base.get(key), now[key]
        differ = [k for k in after if isinstance(before, dict) and before.get(k) != after[k]]
        if told := ", ".join(k for k in differ if k not in ("date", "load")):
            found.append(f"the base has another {key}: {told}")
    return found
