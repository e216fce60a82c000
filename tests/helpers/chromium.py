"""The live page in Debian's Chromium: an open page with its complaints, screenshots that are kept, and axe-core."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import pytest
from harness import Running
from places import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium here: `make test` installs it as root"
)
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
READY = "document.getElementById('k-tick').textContent !== '–'"


@contextmanager
def running_chromium(*more: str) -> Iterator[Any]:
    """A browser; `more`: further arguments of its command line."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGS, *more])
        yield chromium
        chromium.close()


class Tab:
    """An open page, with all hosts that it requested and all its console errors."""

    def __init__(self, browser: Any, address: str, width: int = 1280, ready: str = READY, **more: Any) -> None:
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
        self.until(ready)

    def until(self, condition: str) -> None:
        # playwright's own wait_for_function needs eval in the page, which its policy forbids
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, f"timeout: {condition}"
            self.page.wait_for_timeout(50)

    def text(self, selector: str) -> str:
        return str(self.page.text_content(selector)).strip()

    def sees(self, selector: str) -> bool:
        """Whether it is on the screen without scrolling."""
        box = self.page.locator(selector).bounding_box()
        height, top = self.page.viewport_size["height"], self.page.evaluate("scrollY")
        return bool(box) and top == 0 and box["y"] >= 0 and box["y"] + box["height"] <= height

    def photograph(self, name: str, full_page: bool = True) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{name}.png", full_page=full_page)

    def serious(self) -> list[str]:
        """What axe-core calls serious or critical: the rule, and the first element that breaks it."""
        pytest.importorskip("axe_playwright_python", reason="axe-core is not installed: pip install '.[dev]'")
        self.page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text("utf-8"))
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        return [
            f"{v['id']}: {v['help']}: {v['nodes'][0]['html'][:200]}: {v['nodes'][0].get('failureSummary', '')[:300]}"
            for v in found
            if v["impact"] in ("serious", "critical")
        ]

    def close(self, lost: bool = False) -> None:
        """`lost`: the server has ended, so that requests failed."""
        self.context.close()
        assert lost or self.complaints == [], self.complaints
        assert self.hosts <= {urlsplit(self.address).netloc, "data", "blob"}


def address_of(running: Running) -> str:
    line = running.wait_for(lambda: next((x for x in running.lines if x.startswith("dashboard: ")), ""), 60)
    return str(line.removeprefix("dashboard: ").strip())
