"""The controls of the page in a real browser: start, record, label, stop, replay, two sessions at once.

Screenshots are kept in test-results/page/.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from chromium import PICTURES, Tab, address_of, needs_chromium
from harness import Running, descendants, run

from stream_mmrnn.core import topics
from stream_mmrnn.recording.mcap_file import Recording

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
pytestmark = [needs_chromium, pytest.mark.process]


@pytest.fixture
def runtime(short_path: Path) -> dict[str, str]:
    """A registry of its own, so that the menu has no sessions of other tests."""
    return {**os.environ, "XDG_RUNTIME_DIR": str(short_path), "TMPDIR": str(short_path)}


@pytest.fixture
def page(tmp_path: Path, model: Path, runtime: dict[str, str]) -> Iterator[Running]:
    settings = tmp_path / "page.toml"
    settings.write_text(
        f'[record]\nfolder = "{tmp_path / "made"}"\n[engine]\nmodel = "{model}"\n'
        '[page]\nlabels = ["sitting", "walking"]\n'
    )
    with closing(Running("--config", settings, verb=("page",), env=runtime)) as running:
        yield running


def start(tab: Tab, name: str, **choices: str) -> str:
    """Start a session by the form; the path of its view."""
    tab.page.fill("#c-name", name)
    for choice, value in choices.items():
        tab.page.select_option(f"#c-{choice}", value)
    tab.page.click("#c-begin")
    tab.page.wait_for_url("**/view/**")
    tab.until("document.getElementById('k-tick')?.textContent > '0'")
    return str(tab.page.evaluate("location.pathname"))


SYNTHETIC = {"vision": "synthetic", "audio": "synthetic", "text": "page"}
IDLE = "document.documentElement.classList.contains('idle')"


def picture(tab: Tab, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    for width in (1280, 400):
        tab.page.set_viewport_size({"width": width, "height": 900})
        tab.page.wait_for_timeout(300)
        assert tab.page.evaluate("document.documentElement.scrollWidth") == width
        tab.page.screenshot(path=PICTURES / f"{name}-{width}.png", full_page=True)
        assert tab.serious() == []
    tab.page.set_viewport_size({"width": 1280, "height": 900})


@pytest.mark.slow
def test_a_session_from_start_to_replay(browser: Any, page: Running, tmp_path: Path) -> None:
    address = address_of(page)
    with ExitStack() as stack:
        tab = stack.enter_context(closing(Tab(browser, address, ready=IDLE)))
        assert not tab.page.is_visible("#main")
        tab.until("document.getElementById('link').textContent === 'No session'")
        picture(tab, "idle")
        view = start(tab, "anna", **SYNTHETIC)
        other = stack.enter_context(closing(Tab(browser, address.rstrip("/") + view)))  # a second viewer
        tab.until("!document.getElementById('c-record').disabled && !document.getElementById('line').disabled")
        tab.page.click("#c-record")
        for viewer in (tab, other):
            viewer.until("document.getElementById('c-record').getAttribute('aria-pressed') === 'true'")
        tab.page.wait_for_timeout(2500)
        tab.page.click("#c-labels button:text-is('walking')")
        other.until("document.querySelector('#c-labels [aria-pressed=true]')?.textContent === 'walking'")
        picture(tab, "session")
        tab.page.wait_for_timeout(1000)
        other.page.click("#c-record")
        tab.until("document.getElementById('c-record').getAttribute('aria-pressed') === 'false'")
        other.page.click("#c-stop")
        for viewer in (tab, other):
            viewer.until("document.getElementById('link').textContent === 'Ended'")
        tab.until("!document.querySelector('#ended-actions button').hidden")
        tab.page.goto(address)
        tab.until("document.querySelector('#c-files button')?.disabled === false")
        tab.until("document.getElementById('c-running').textContent.includes('ended')")
        # the next one of this name is not yet in the states: the one that ended is not it
        tab.page.route("**/controls/start", lambda route: route.fulfill(status=200), times=1)
        tab.page.fill("#c-name", "anna")
        tab.page.click("#c-begin")
        tab.page.wait_for_timeout(2500)
        assert tab.text("#c-answer") == "starting anna …"
        tab.page.click("#c-files button")
        tab.page.wait_for_url("**/view/recording-*/")
        tab.until("document.getElementById('link').textContent === 'Replay'")
        tab.until("document.querySelectorAll('#marks .label').length === 1")
        tab.page.select_option("#speed", "4")
        tab.until("document.getElementById('replay-note').textContent.startsWith('at 4 times')")
        tab.page.click("#marks .label")
        tab.until("document.querySelector('#l-words li.label')?.textContent.includes('walking')")
        picture(tab, "recording")
    [path] = (tmp_path / "made").glob("*.mcap")
    assert [bytes(e.payload) for e in Recording(path).envelopes({topics.LABEL})] == [b"walking"]
    assert run("verify", path)[0] == 0
    code, result, err = run("replay", path, "--verify")
    assert (code, result["identical"]) == (0, True), err
    code, _, _ = page.end()
    assert code == 0


@pytest.mark.slow
def test_a_replay_that_dies_says_so(browser: Any, page: Running, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "made" / "a.mcap"
    path.parent.mkdir()
    args = ("live", "--source", "synthetic", "--duration", "2", "--model", model, "--record", path, "--no-dashboard")
    assert run(*args)[0] == 0
    tab = Tab(browser, address_of(page), ready=IDLE)
    tab.until("document.querySelector('#c-files button')?.disabled === false")
    tab.page.click("#c-files button")
    tab.page.wait_for_url("**/view/recording-*/")
    tab.until("document.getElementById('link').textContent === 'Replay'")
    [child] = [
        pid for pid in descendants(page.process.pid) if b"replay_child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(child, signal.SIGKILL)
    tab.until("document.getElementById('link').textContent === 'Ended'")
    assert tab.text("#problem") == "The replay's process ended with exit code -9; open the recording again"
    tab.close(lost=True)
    assert page.end()[0] == 0


@pytest.mark.slow
def test_two_live_sessions_find_each_other(browser: Any, model: Path, tmp_path: Path, runtime: dict[str, str]) -> None:
    args = ("--source", "synthetic", "--model", model, "--session")
    with ExitStack() as stack:
        anna, ben = (stack.enter_context(closing(Running(*args, n, env=runtime))) for n in ("anna", "ben"))
        address = address_of(anna)
        address_of(ben)
        tab = Tab(browser, address)
        stack.callback(tab.close, True)  # the server of this page ends
        tab.until("document.getElementById('c-menu')?.firstChild.textContent === '2 sessions'")
        tab.page.click("#c-menu summary")
        tab.page.click("#c-sessions a:text-is('ben')")
        tab.page.wait_for_url("**/view/**")
        tab.until("document.getElementById('about')?.textContent.includes('session ben')")
        tab.page.click("#c-menu summary")
        tab.page.click("#c-compare")
        tab.page.wait_for_url("**/compare.html*")
        for name, frame in (("ben", "a"), ("anna", "b")):
            inside = tab.page.frame_locator(f"#{frame}")
            inside.locator(f"#about:has-text('session {name}')").wait_for()
        picture(tab, "compare")
        assert tab.complaints == []
        tab.page.goto(address)
        tab.until("!!document.getElementById('c-stop') && !document.getElementById('c-stop').hidden")
        tab.page.click("#c-stop")  # of its own session
        code, summary = anna.finish()
        assert (code, summary["session"], summary["failed"]) == (0, "anna", "")
        assert ben.end()[0] == 0
