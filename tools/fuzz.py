"""Coverage-guided fuzzing of the pure decoders, if atheris is installed: it finds more than a seed does.

    python -m tools.fuzz wire -max_total_time=60 [other options of libFuzzer]

It runs the hypothesis properties of `tools.hostile.decoders`, which the tests run too. An input that raises anything
but an error of ours stops the run and is kept as `crash-...`. Sockets and processes are tried by `python -m
tools.faults --only hostile`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from tools.hostile.decoders import PROPERTIES


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[1] not in PROPERTIES:
        print(f"usage: python -m tools.fuzz DECODER; decoders are {', '.join(PROPERTIES)}", file=sys.stderr)
        return 2
    if find_spec("atheris") is None:
        print("atheris is not installed; `pip install atheris` where it has wheels", file=sys.stderr)
        return 2
    import atheris

    prop: Any = PROPERTIES[arguments[1]]
    atheris.instrument_all()
    atheris.Setup([arguments[0], *arguments[2:]], prop.hypothesis.fuzz_one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
