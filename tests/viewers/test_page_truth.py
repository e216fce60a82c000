"""What the live page shows when something is wrong, at the end, and for each kind of head; seen in Chromium.

Screenshots are kept in test-results/page/.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from chromium import Tab, address_of, needs_chromium
from harness import Running

from stream_mmrnn.core.types import Envelope
from stream_mmrnn.viewers.dashboard.server import Dashboard
from stream_mmrnn.viewers.dashboard.state import LiveState

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
pytestmark = [needs_chromium, pytest.mark.process]
LINK, PROBLEM = "document.getElementById('link').textContent", "document.getElementById('problem').textContent"
NEXT = "document.getElementById('next').dataset.state"


# --- what comes first


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1280, "light"), (768, "dark"), (400, "dark")])
def test_what_happens_next_comes_first_and_in_words(browser: Any, live: Running, width: int, scheme: str) -> None:
    with closing(Tab(browser, address_of(live), width, color_scheme=scheme)) as tab:
        tab.until("document.querySelectorAll('#l-next li').length === 3")
        for selector in ("#link", "#elapsed", "#l-next", "#camera"):
            assert tab.sees(selector), selector
        said = [tab.page.locator("#l-next li").nth(i).inner_text() for i in range(3)]
        assert said[0].startswith("You ")
        assert said[1].startswith("The other ")
        assert said[2].startswith("Turn over?")
        tops = [tab.page.locator(s).bounding_box()["y"] for s in ("#next", "#timeline", "#health")]
        assert tops == sorted(tops)
        assert not tab.page.locator("#key").is_visible(), "engineering figures are folded"
        assert "predictions/s" in tab.text("#health-line")
        tab.page.click("#health summary")
        assert tab.page.locator("#t-delays").is_visible()
        assert tab.page.evaluate("document.documentElement.scrollWidth") == width
        assert tab.serious() == []


def test_the_session_says_how_long_it_runs_and_what_each_input_does(browser: Any, live: Running) -> None:
    with closing(Tab(browser, address_of(live))) as tab:
        tab.until("/^[0-9]+:[0-9]{2}$/.test(document.getElementById('elapsed').textContent)")
        tab.until("document.querySelectorAll('#l-inputs li').length >= 5")
        tab.until("/^Camera.*working/.test(document.querySelector('#l-inputs li').textContent)")
        # words of one person without a pause are one turn, with its time since the session's start
        tab.until("document.querySelectorAll('#l-words li').length > 1")
        turn = tab.page.locator("#l-words li").last.inner_text()
        assert turn.split()[0] in ("You", "Other")
        assert len(turn.split()) > 3
        assert turn.split()[-1].count(":") == 1


def test_the_borders_of_inputs_and_buttons_are_seen(browser: Any, live: Running) -> None:
    """WCAG 1.4.11: 3:1 against what is around them."""
    contrast = """() => {
      const rgb = text => text.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
      const light = text => { const [r, g, b] = rgb(text); return .2126 * r + .7152 * g + .0722 * b; };
      const ratio = (a, b) => {
        const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
        return (x + .05) / (y + .05);
      };
      const colour = (el, name) => getComputedStyle(el)[name];
      return [...document.querySelectorAll('input[type=text], button')].filter(el => el.offsetParent).map(el => [el.id,
        Math.min(ratio(colour(el, 'borderTopColor'), colour(el.closest('section, body'), 'backgroundColor')),
          ratio(colour(el, 'borderTopColor'), colour(el, 'backgroundColor')))]);
    }"""
    for scheme in ("light", "dark"):
        with closing(Tab(browser, address_of(live), color_scheme=scheme)) as tab:
            found = tab.page.evaluate(contrast)
            assert len(found) >= 5
            assert [(name, ratio) for name, ratio in found if ratio < 3] == []


# --- what is wrong


@pytest.mark.parametrize("width", [1280, 400])
def test_a_camera_that_was_killed_is_seen_without_scrolling(
    browser: Any, model: Path, tmp_path: Path, width: int
) -> None:
    # the first death ends it: it stays away
    (tmp_path / "c.toml").write_text("[supervisor]\nmax_restarts = 0\n")
    args = ("--source", "synthetic", "--model", model, "--config", tmp_path / "c.toml")
    with closing(Running(*args)) as session, closing(Tab(browser, address_of(session), width)) as tab:
        tab.until(f"{LINK} === 'Live' && {NEXT} === 'good'")
        [pid] = session.wait_for(lambda: session.children("camera"))
        os.kill(pid, signal.SIGKILL)
        tab.until(f"{LINK} === 'Trouble' && {PROBLEM}.startsWith('Camera: given up')")
        given_up = "document.getElementById('next-why').textContent.includes('camera: given up')"
        tab.until(f"{NEXT} === 'doubtful' && {given_up}")
        assert tab.sees("#problem")
        assert tab.sees("#camera-why")
        tab.until("document.getElementById('doubts').textContent.includes('without camera')")
        assert tab.serious() == []
        tab.photograph(f"camera-killed-{width}", full_page=False)


def test_a_dead_or_late_engine_greys_the_forecast_at_once(browser: Any) -> None:
    with closing(Running("--source", "synthetic")) as session, closing(Tab(browser, address_of(session))) as tab:
        tab.until(f"{LINK} === 'Live' && {NEXT} === 'good'")
        # late: it is stopped, so that nobody sees it die
        [pid] = session.wait_for(lambda: session.children("engine"))
        os.kill(pid, signal.SIGSTOP)
        tab.until(f"{LINK} === 'Trouble' && {NEXT} === 'old' && /prediction|engine/.test({PROBLEM})")
        assert tab.text("#next-why").startswith("Old prediction: ")
        tab.photograph("engine-late-1280", full_page=False)
        assert tab.serious() == []
        os.kill(pid, signal.SIGCONT)
        tab.until(f"{NEXT} === 'good'")
        # dead
        tab.page.evaluate(
            "window.seen = []; const next = document.getElementById('next'); new MutationObserver(() => "
            "window.seen.push(next.dataset.state)).observe(next, {attributes: true})"
        )
        os.kill(pid, signal.SIGKILL)
        tab.until("window.seen.includes('old')")
        tab.until(f"{PROBLEM}.includes('runs again')")
        assert "the engine died" in tab.text("#problem").lower()
        tab.until(f"{NEXT} === 'good'")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_normal_end_is_no_lost_connection(browser: Any, model: Path, tmp_path: Path, recorded: bool) -> None:
    path = tmp_path / "the end.mcap"
    more = ("--record", path) if recorded else ()
    with closing(Running("--source", "synthetic", "--model", model, *more)) as session:
        tab = Tab(browser, address_of(session))
        code, summary, _ = session.end()
        assert code == 0
        assert not [line for line in session.lines if "was killed" in line]
        tab.until(f"{LINK} === 'Ended'")
        tab.page.wait_for_timeout(3000)  # longer than a connection may be silent
        assert tab.text("#link") == "Ended"
        assert not tab.page.is_visible("#problem")
        text = tab.page.locator("#ended").inner_text()
        if recorded:
            assert str(summary["recording"]["path"]) in text
            assert f"stream-mmrnn replay '{path}' --speed 1" in text
        else:
            assert "It was not recorded." in text
            assert "stream-mmrnn replay" not in text
        assert tab.text("#next-why") == "Old prediction: the session has ended"
        assert tab.serious() == []
        tab.photograph(f"ended-{'recorded' if recorded else 'plain'}-1280", full_page=False)
        tab.close(lost=True)


def test_a_killed_session_is_a_lost_connection(browser: Any, model: Path) -> None:
    with closing(Running("--source", "synthetic", "--model", model)) as session:
        tab = Tab(browser, address_of(session))
        [page] = session.wait_for(lambda: session.children("dashboard"))
        os.kill(session.process.pid, signal.SIGSTOP)  # it starts no other page
        os.kill(page, signal.SIGKILL)
        tab.until(f"{LINK} === 'Lost' && /Connection lost.* s old/.test({PROBLEM})")
        assert tab.sees("#problem")
        os.kill(session.process.pid, signal.SIGCONT)
        # the page that is started again has the same address
        tab.until(f"{LINK} !== 'Lost'")
        tab.close(lost=True)


# --- a picture for each kind of head

S, MS = 1_000_000_000, 1_000_000
T0 = 1_700_000_000 * S
AHEAD = [[0, 0.25], [0.25, 0.5], [0.5, 1]]
HEADS = [
    {"name": "activity", "kind": "classification", "labels": ["walking", "sitting", "standing_up", "laying"]},
    {
        "name": "motion",
        "kind": "regression",
        "unit": "g",
        "labels": [f"acc_{axis}_{ms}ms" for ms in (250, 500, 1000) for axis in "xyz"],
        "horizons_s": [span for span in AHEAD for _ in range(3)],
    },
    {"name": "next_word", "kind": "hazard", "horizons_s": AHEAD},
    {"name": "level", "kind": "regression", "unit": "dB", "labels": ["left", "right"]},
]


def _values(x: float) -> dict[str, list[float]]:
    odds = [math.exp(2 * math.sin(x + k)) for k in range(4)]
    return {
        "activity": [v / sum(odds) for v in odds],
        "motion": [math.sin(x * (k + 1) + 0.3 * j) * (k + 1) for j in range(3) for k in range(3)],
        "next_word": [0.2 + 0.1 * math.sin(x), 0.3, 0.5],
        "level": [20 * math.sin(x), 3 * math.cos(x)],
    }


def _state() -> dict[str, Any]:
    """20 s of a model that has one head of each kind, and no camera, microphone or text."""
    live, tick = LiveState(table={}), 40 * MS
    live.began_ns = T0
    spec = {"name": "kinds", "tick_ns": tick, "heads": HEADS, "modalities": ["wrist"]}
    for i in range(1, 501):
        at = T0 + i * tick
        stamps = {"event_ns": at, "capture_ns": at, "publish_ns": at, "received_ns": at, "by": "feature/wrist"}
        payload = {
            "tick": at // tick,
            "event_ns": at,
            "heads": _values(i / 40),
            "present": {},
            "age_ns": {},
            "closed": stamps,
            "step_start_ns": at,
            "step_end_ns": at,
            "model": "ab" * 32,
        }
        if i % 10 == 0:
            status = {"node": "engine", "state": "ready", "detail": {"spec": spec}, "counts": {"ticks": i}}
            live.observe(Envelope("status/engine", "*", i, at, at, at, json.dumps(status).encode()))
        live.observe(Envelope("prediction", "a", i, at, at, at, json.dumps(payload).encode()))
    return live.snapshot(at + 20 * MS)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_each_kind_of_head_has_a_fitting_picture(browser: Any, width: int, scheme: str) -> None:
    board, state, over = Dashboard(), _state(), threading.Event()
    board.start()

    def repeat() -> None:
        while not over.wait(0.2):
            board.update(state)

    repeating = threading.Thread(target=repeat)
    repeating.start()
    try:
        with closing(Tab(browser, board.address, width, color_scheme=scheme)) as tab:
            tab.until("document.querySelectorAll('.head-lane').length === 4")
            said = [tab.page.locator("#l-next li").nth(i).inner_text() for i in range(4)]
            assert said[0].startswith("Activity: ")
            assert said[1].startswith("Motion in 1 s: acc x ")
            assert said[2].startswith("Next word within 1 s")
            assert said[3].startswith("Level: left ")
            headings = tab.page.locator(".head-lane h3").all_inner_texts()
            assert "0 to 100 %" in headings[0], "the colours of the classes have a legend"
            assert "chance that it comes within 1 s" in headings[2]
            # nothing stands for what the session does not have
            for absent in ("#camera", "#lane-sound", "#lane-words", "#say", "#l-words"):
                assert not tab.page.is_visible(absent), absent
            # each picture has something on both sides of "now"
            inked = """() => [...document.querySelectorAll('.plot canvas')].map(c => {
              const now = document.getElementById('past').clientWidth * c.width / c.clientWidth;
              const g = new OffscreenCanvas(c.width, c.height).getContext('2d', {willReadFrequently: true});
              g.drawImage(c, 0, 0);
              return [[now * .5, now - 4], [now + 4, c.width]].map(([from, to]) => {
                const d = g.getImageData(from, 0, to - from, c.height).data, seen = new Set();
                for (let i = 0; i < d.length; i += 4) seen.add(d[i] + ',' + d[i + 1] + ',' + d[i + 2] + ',' + d[i + 3]);
                return seen.size;
              });
            })"""
            for past, ahead in tab.page.evaluate(inked):
                assert past > 8
                assert ahead > 8
            assert tab.serious() == []
            tab.photograph(f"kinds-{scheme}-{width}")
    finally:
        over.set()
        repeating.join()
        board.close()
