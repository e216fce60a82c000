"""`python -m tools.soak [--minutes 10] [--speed 20] [--json]`: hours of sessions in minutes, and what they cost."""

from __future__ import annotations

import argparse
import json
import sys

from tools.faults.__main__ import line
from tools.faults.soak import figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--speed", type=float, default=20.0, help="times real time")
    parser.add_argument("--json", action="store_true", help="the JSON document alone")
    given = parser.parse_args()

    def say(text: str) -> None:
        if not given.json:
            print(f"  {text}", file=sys.stderr, flush=True)

    held, rows = True, []
    # of a long run the first hour of event time may pass before it is judged: what fills once has filled
    warm_up_s = min(max(30.0, given.minutes * 18.0), 3600.0 / given.speed)
    for figure in figures(given.minutes * 60, given.speed, say, warm_up_s=warm_up_s):
        held &= figure.held
        rows.append({**figure._asdict(), "held": figure.held})
        if not given.json:
            print(line(figure), flush=True)
    print(json.dumps({"minutes": given.minutes, "speed": given.speed, "figures": rows, "held": held}))
    return 0 if held else 3


if __name__ == "__main__":
    sys.exit(main())
