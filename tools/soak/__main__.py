"""`python -m tools.soak [--minutes 10] [--speed 20] [--json] [--write]`: hours of sessions in minutes, their cost."""

from __future__ import annotations

import argparse
import json
import sys
import time

from stream_mmrnn.bench.machine import Processes, machine
from tools.faults.__main__ import keep, line, write
from tools.faults.soak import figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--speed", type=float, default=20.0, help="times real time")
    parser.add_argument("--json", action="store_true", help="the JSON document alone")
    parser.add_argument("--write", action="store_true", help="keep the figures and write docs/reliability.md")
    given = parser.parse_args()

    def say(text: str) -> None:
        if not given.json:
            print(f"  {text}", file=sys.stderr, flush=True)

    # of a long run the first hour of event time may pass before it is judged: what fills once has filled
    warm_up_s = min(max(30.0, given.minutes * 18.0), 3600.0 / given.speed)
    about = {"when": time.strftime("%Y-%m-%d"), "machine": machine(), "minutes": given.minutes, "speed": given.speed}
    held, rows, start_s, processes = True, [], time.monotonic(), Processes()
    for figure in figures(given.minutes * 60, given.speed, say, warm_up_s=warm_up_s):
        held &= figure.held
        rows.append({**figure._asdict(), "held": figure.held})
        if not given.json:
            print(line(figure), flush=True)
    spent = {"seconds": round(time.monotonic() - start_s, 1), "other_cpu": processes.used().other_cpu}
    if given.write:
        command = f"python -m tools.soak --minutes {given.minutes:g} --speed {given.speed:g}"
        keep("soak", about, {"figures": rows, "command": command, **spent})
        write()
    print(json.dumps({**about, "figures": rows, "held": held, **spent}))
    return 0 if held else 3


if __name__ == "__main__":
    sys.exit(main())
