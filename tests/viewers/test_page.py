"""The live page in a real browser, Debian's Chromium, with real sessions in real processes.

Screenshots are kept in test-results/page/. The pictures of the documentation:
`PYTHONPATH=tests/helpers python tests/viewers/test_page.py docs`.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from chromium import Tab, address_of, needs_chromium, running_chromium
from harness import Running, check_summary, recording_grows, run, verify

from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.training.tasks.recordings import TypedEvents

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
pytestmark = [needs_chromium, pytest.mark.process]
SEEKING = "document.querySelector('[data-seeking]')"


@pytest.fixture
def tab(browser: Any, live: Running) -> Iterator[Tab]:
    with closing(Tab(browser, address_of(live))) as opened:
        yield opened


def test_values_change(tab: Tab) -> None:
    watched = ("#k-tick", "#level-db", "#t-delays", "#t-processes", "#l-words")
    before = {selector: tab.text(selector) for selector in watched}
    for selector in watched:
        tab.until(f"document.querySelector('{selector}').textContent.trim() !== {before[selector]!r}")
    # the picture and the spectrogram are redrawn
    for canvas in ("picture", "spectrogram"):
        drawn = f"document.getElementById('{canvas}').toDataURL()"
        first = tab.page.evaluate(drawn)
        tab.until(f"{drawn}.length > 2000 && {drawn} !== {first!r}")
    assert re.fullmatch(r"\d+ ms old|\d+\.\d s old", tab.text("#camera-age"))
    assert tab.page.get_by_role("img", name=re.compile("what is expected")).count() == 1
    assert tab.page.get_by_role("img", name=re.compile("^turn_over: last 30 seconds; now")).count() == 1


def test_a_killed_worker_is_shown_until_it_runs_again(tab: Tab, live: Running) -> None:
    [pid] = live.wait_for(lambda: live.children("microphone"))
    tab.until("document.getElementById('t-processes').textContent.includes('microphone')")
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    tab.until(
        "/microphone.*1×: (was killed by|started again)/.test(document.getElementById('t-processes').textContent)"
    )
    print(f"a killed worker was on the page after {time.monotonic() - began:.2f} s")
    tab.until(
        "[...document.querySelectorAll('#t-processes tr')].some(r => /^microphone/.test(r.textContent) && "
        "r.querySelector('.state').textContent === 'working')"
    )


def test_the_page_works_by_keyboard(tab: Tab) -> None:
    page = tab.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    tab.until("document.getElementById('c-stop')?.hidden === false")
    tab.until("document.getElementById('c-menu')?.hidden === false")
    reached = []
    while "pause" not in reached and len(reached) < 10:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached == ["SUMMARY", "c-record", "c-stop", "theme", "pause"]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    tab.until("document.getElementById('link').textContent === 'Paused'")
    assert page.get_attribute("#pause", "aria-pressed") == "true"
    held = tab.text("#k-tick")
    page.wait_for_timeout(500)
    assert tab.text("#k-tick") == held
    page.keyboard.press("Space")
    tab.until(f"document.getElementById('k-tick').textContent !== {held!r}")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "line"
    page.keyboard.type("t a b")  # in the text box these are characters, not shortcuts
    assert page.input_value("#line") == "t a b"
    assert tab.text("#link") == "Live"
    page.fill("#line", "")
    page.keyboard.press("Escape")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, button')].filter(e => !e.labels?.length && !e.ariaLabel && "
        "!e.textContent.trim()).length"
    )
    assert unnamed == 0


def test_the_theme_follows_the_system_or_the_choice(browser: Any, live: Running) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with closing(Tab(browser, address_of(live), color_scheme="dark")) as tab:
        dark = tab.page.evaluate(ground)
        tab.page.emulate_media(color_scheme="light")
        light = tab.page.evaluate(ground)
        assert dark != light
        tab.page.click("#theme")
        tab.page.click("#theme")
        assert (tab.text("#theme"), tab.page.evaluate(ground)) == ("Theme: dark", dark)
        tab.page.reload()
        tab.until("document.getElementById('k-tick').textContent !== '–'")
        assert tab.page.evaluate(ground) == dark, "the choice is stored"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_and_has_no_layout_shift(browser: Any, live: Running, scheme: str, width: int) -> None:
    with closing(Tab(browser, address_of(live), width, color_scheme=scheme)) as tab:
        tab.until("document.querySelectorAll('.head-lane').length === 2 && !document.getElementById('picture').hidden")
        tab.page.evaluate(
            "window.moved = 0; window.what = []; new PerformanceObserver(list => { for (const e of list.getEntries()) "
            "{ window.moved += e.value; window.what.push(...e.sources.map(x => x.node?.id || x.node?.className)); } })"
            ".observe({type: 'layout-shift'})"
        )
        tab.page.wait_for_timeout(1500)
        assert tab.page.evaluate("window.moved") < 0.01, tab.page.evaluate("window.what")
        assert tab.page.evaluate("document.documentElement.scrollWidth") == width
        tab.photograph(f"live-{scheme}-{width}")
        assert tab.serious() == []


def test_a_typed_line_becomes_a_text_event_and_is_recorded(browser: Any, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    args = ("--vision", "none", "--audio", "synthetic", "--text", "page", "--model", model, "--record", path)
    with closing(Running(*args)) as session:
        with closing(Tab(browser, address_of(session))) as tab:
            assert not tab.page.is_visible("#camera"), "there is no camera in this session"
            tab.until("!document.getElementById('line').disabled")
            tab.page.fill("#line", "hello <b>wörld</b>")
            tab.page.keyboard.press("Enter")
            tab.until("document.querySelector('#l-words li')?.textContent.includes('hello <b>wörld</b>')")
            assert tab.text("#typing") == "sent: hello <b>wörld</b>"
            tab.page.fill("#label", "listening")
            tab.page.keyboard.press("Enter")
            tab.until("document.querySelector('#l-words li.label')?.textContent.includes('listening')")
            tab.page.fill("#line", "/label speaking")
            tab.page.click("text=Send")
            tab.until("document.querySelectorAll('#l-words li.label').length === 2")
        code, summary, _ = session.end()
    assert code == 0
    check_summary(summary)
    recorded = {topic: [bytes(e.payload).decode() for e in Recording(path).envelopes({topic})] for topic in TEXTS}
    assert recorded == {"raw/text": ["hello <b>wörld</b>"], "label": ["listening", "speaking"]}
    assert len(list(Recording(path).envelopes({"feature/text"}))) == 1
    assert summary["streams"]["text"]["delivered"] == 1
    verify(path, summary["predictions"])


TEXTS = ("raw/text", "label")


def test_a_replay_is_paused_and_scrubbed(browser: Any, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    code, summary, err = run(
        *("live", "--source", "synthetic", "--duration", "8", "--model", model, "--record", path, "--no-dashboard")
    )
    assert code == 0, err
    assert recording_grows(path, 10_000)
    # slow, so that the page is there before the end
    with closing(Running(path, "--speed", "0.25", verb=("replay",))) as replay:
        with closing(Tab(browser, address_of(replay))) as tab:
            position = "Number(document.getElementById('seek').value)"
            assert tab.page.is_disabled("#line")
            assert "this is a recording" in tab.text("#typing")
            tab.until("document.getElementById('link').textContent === 'Replay'")
            tab.page.keyboard.press("Space")
            tab.until("document.getElementById('link').textContent === 'Paused'")
            held = tab.page.evaluate(position)
            tab.page.wait_for_timeout(400)
            assert tab.page.evaluate(position) == held
            tab.page.select_option("#speed", "1")
            tab.page.keyboard.press("/")
            tab.page.keyboard.type("walking")
            tab.page.keyboard.press("Enter")
            tab.page.keyboard.press("Escape")
            tab.until("document.querySelector('#given [aria-pressed=true]')?.textContent === '1walking'")
            # a label is given where the seek goes, however soon it is pressed and however long the seek is on its way
            on_its_way: list[Any] = []
            for number, label in ((2, "0"), (3, "/sitting\n")):
                tab.page.route("**/replay", lambda route: on_its_way.append(route), times=1)
                tab.page.keyboard.press("ArrowRight")
                deadline = time.monotonic() + 30
                while len(on_its_way) < number - 1:
                    assert time.monotonic() < deadline
                    tab.page.wait_for_timeout(20)
                for key in label:
                    tab.page.keyboard.press(key)
                tab.page.wait_for_timeout(300)
                on_its_way[-1].continue_()
                tab.page.evaluate("document.activeElement.blur()")
                tab.until(f"!{SEEKING} && {position} >= {held} + {number - 1.1}")
                tab.until(f"document.querySelectorAll('#marks .label').length === {number}")
            tab.photograph("replay-labelled-1280")
            assert tab.serious() == []
            tab.page.keyboard.press("Shift+ArrowRight")
            tab.until(f"!{SEEKING} && {position} >= Number(document.getElementById('seek').max) - .2")
            tab.photograph("replay-light-1280")
            ticks = int(tab.text("#k-tick"))
            assert 50 < ticks <= summary["predictions"], "it counts from the session's start"
            for _ in range(3):
                tab.page.keyboard.press("ArrowLeft")
            tab.until(f"!{SEEKING} && Number(document.getElementById('k-tick').textContent) < {ticks}")
            tab.page.keyboard.press("Space")
            tab.until("document.getElementById('replay-note').textContent.startsWith('the end')")
        # without a browser the replay ends; its last pass gave the recorded predictions, bit for bit
        code, result = replay.finish()
    assert (code, result["identical"], result["predictions"]) == (0, True, summary["predictions"])
    assert [name for _, name in TypedEvents.of(Recording(path)).labels] == ["walking", "none", "sitting"]


PARTS = ("header", "#next", "#camera", "#inputs", "#timeline", "#words", "#health")
"""The parts of the page that its documentation explains, in its order."""
NUMBER = (
    "([selector, n]) => { const el = document.createElement('b'); el.textContent = n;"
    "const at = document.querySelector(selector).getBoundingClientRect();"
    "Object.assign(el.style, {position: 'absolute', zIndex: 9, left: at.left + at.width / 2 - 14 + 'px',"
    "top: at.top + scrollY + 4 + 'px', width: '28px', font: '600 16px/28px system-ui', textAlign: 'center',"
    "borderRadius: '50%', background: '#b3261e', color: '#fff'}); document.body.append(el); }"
)


def main(folder: Path) -> None:
    """Make the pictures of the documentation from a live session: the page after half a minute, with a typed line and a
    label; the same with numbered parts; and ten seconds of it.
    """
    from PIL import Image

    frames = []
    with (
        running_chromium() as chromium,
        closing(Running("--source", "synthetic")) as session,
        closing(Tab(chromium, address_of(session), device_scale_factor=1.5)) as tab,
    ):
        tab.page.wait_for_timeout(24_000)
        tab.page.fill("#label", "listening")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_timeout(6_000)
        tab.page.fill("#line", "and what do you think")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_timeout(700)
        tab.page.evaluate("document.activeElement.blur()")
        tab.page.screenshot(path=folder / "page.png", full_page=True)
        began = time.monotonic()
        while (at_s := time.monotonic() - began) < 10:
            frames.append((at_s, Image.open(io.BytesIO(tab.page.screenshot()))))
            tab.page.wait_for_timeout(max(0, 250 * len(frames) - 1000 * (time.monotonic() - began)))
        for number, selector in enumerate(PARTS, 1):
            tab.page.evaluate(NUMBER, [selector, number])
        tab.page.screenshot(path=folder / "page-parts.png", full_page=True)
    small = [of.convert("RGB").resize((800, 562)).quantize(160, dither=Image.Dither.NONE) for _, of in frames]
    ends = [at_s for at_s, _ in frames[1:]] + [10.0]
    lasts = [round(1000 * (end_s - at_s)) for end_s, (at_s, _) in zip(ends, frames, strict=True)]
    small[0].save(folder / "live.gif", save_all=True, append_images=small[1:], duration=lasts, loop=0, optimize=True)
    for name in ("page.png", "page-parts.png"):
        Image.open(folder / name).convert("RGB").quantize(256).save(folder / name, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
