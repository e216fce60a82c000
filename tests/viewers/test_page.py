"""The live page in a real browser, Debian's Chromium, with real sessions in real processes.

Screenshots are kept in test-results/page/. The screenshot of the documentation: `python tests/viewers/test_page.py
FILE.png`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from harness import Running, check_summary, recording_grows, run, verify
from places import ROOT

from stream_mmrnn.recording.mcap_file import Recording

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: `make test` installs it as root"),
    pytest.mark.process,
]
PICTURES = ROOT / "test-results" / "page"
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield chromium
        chromium.close()


class Tab:
    """An open page, with all hosts that it requested and all its console errors."""

    def __init__(self, browser: Any, address: str, width: int = 1280, **more: Any) -> None:
        self.address = address
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **more)
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT_MS)
        self.hosts: set[str] = set()
        self.complaints: list[str] = []
        self.page.on("request", lambda r: self.hosts.add(urlsplit(r.url).netloc or urlsplit(r.url).scheme))
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error(`policy: ${e.violatedDirective}`))"
        )
        self.page.goto(address)
        self.until("document.getElementById('k-tick').textContent !== '–'")

    def until(self, condition: str) -> None:
        # playwright's own wait_for_function needs eval in the page, which its policy forbids
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, f"timeout: {condition}"
            self.page.wait_for_timeout(50)

    def text(self, selector: str) -> str:
        return str(self.page.text_content(selector)).strip()

    def close(self) -> None:
        self.context.close()
        assert self.complaints == []
        assert self.hosts <= {urlsplit(self.address).netloc, "data", "blob"}


def address_of(running: Running) -> str:
    line = running.wait_for(lambda: next((x for x in running.lines if x.startswith("dashboard: ")), ""), 60)
    return str(line.removeprefix("dashboard: ").strip())


@pytest.fixture(scope="module")
def live() -> Iterator[Running]:
    with closing(Running("--source", "synthetic")) as session:
        yield session


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
        "r.querySelector('.state').textContent === 'open')"
    )


def test_the_page_works_by_keyboard(tab: Tab) -> None:
    page = tab.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "pause"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    tab.until("document.getElementById('link').textContent === 'paused'")
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
    assert tab.text("#link") == "live"
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
            "window.moved = 0; new PerformanceObserver(list => { for (const e of list.getEntries()) window.moved += "
            "e.value; }).observe({type: 'layout-shift'})"
        )
        tab.page.wait_for_timeout(1500)
        assert tab.page.evaluate("window.moved") < 0.01
        assert tab.page.evaluate("document.documentElement.scrollWidth") == width
        PICTURES.mkdir(parents=True, exist_ok=True)
        tab.page.screenshot(path=PICTURES / f"live-{scheme}-{width}.png", full_page=True)


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
    with closing(Running(path, "--speed", "1", verb=("replay",))) as replay:
        with closing(Tab(browser, address_of(replay))) as tab:
            position = "Number(document.getElementById('seek').value)"
            assert tab.page.is_disabled("#line")
            assert "this is a recording" in tab.text("#typing")
            tab.until("document.getElementById('link').textContent === 'replay'")
            tab.page.keyboard.press("Space")
            tab.until("document.getElementById('link').textContent === 'paused'")
            held = tab.page.evaluate(position)
            tab.page.wait_for_timeout(400)
            assert tab.page.evaluate(position) == held
            tab.page.keyboard.press("Shift+ArrowRight")
            tab.until(
                f"!document.querySelector('[data-seeking]') && {position} >= Number(document.getElementById('seek').max) - .2"
            )
            PICTURES.mkdir(parents=True, exist_ok=True)
            tab.page.screenshot(path=PICTURES / "replay-light-1280.png", full_page=True)
            ticks = int(tab.text("#k-tick"))
            assert 50 < ticks <= summary["predictions"], "it counts from the session's start"
            for _ in range(3):
                tab.page.keyboard.press("ArrowLeft")
            tab.until(
                f"!document.querySelector('[data-seeking]') && Number(document.getElementById('k-tick').textContent) < {ticks}"
            )
            tab.page.keyboard.press("Space")
            tab.until("document.getElementById('replay-note').textContent.startsWith('the end')")
        # without a browser the replay ends; its last pass gave the recorded predictions, bit for bit
        code, result = replay.finish()
    assert (code, result["identical"], result["predictions"]) == (0, True, summary["predictions"])


def main(path: Path) -> None:
    """Take a screenshot after half a minute of a live session, with a typed line and a label."""
    with sync_api.sync_playwright() as playwright, closing(Running("--source", "synthetic")) as session:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        with closing(Tab(chromium, address_of(session), device_scale_factor=1.5)) as tab:
            tab.page.wait_for_timeout(24_000)
            tab.page.fill("#label", "listening")
            tab.page.keyboard.press("Enter")
            tab.page.wait_for_timeout(6_000)
            tab.page.fill("#line", "and what do you think")
            tab.page.keyboard.press("Enter")
            tab.page.wait_for_timeout(700)
            tab.page.evaluate("document.activeElement.blur()")
            tab.page.screenshot(path=path, full_page=True)
        chromium.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
