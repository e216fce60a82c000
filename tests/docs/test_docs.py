"""Tests of the documentation: commands run, names and links exist, generated pages are up to date, the site works.

Each fenced block of `sh`, `console` or `python` runs as it is written; each page has its own temporary folder. One
comment may stand above a block:

    <!-- not run: REASON -->          the block is skipped; the reason is printed
    <!-- in another terminal -->      the block runs in the background while the next blocks run, and must exit with 0;
                                      a block that names a recording of it begins when it has ended

A block whose first line is `# NAME.py` or `# NAME.toml` is written to that file for the commands after it. A page that
needs a recording contains `<!-- given: talk.mcap -->`, one that needs a table of vega_datasets `<!-- given: x.csv -->`,
one that needs a ROS 2 bag `<!-- given: walk -->`.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ros_bags
import typer
from harness import COMMAND
from places import ROOT
from vega_files import vega_file

from stream_mmrnn.cli import app as cli
from stream_mmrnn.core import config
from stream_mmrnn.core.settings import Settings
from tools import config_reference, docs_site

PAGES = [*(ROOT / name for name in docs_site.ROOT_PAGES), *sorted((ROOT / "docs").rglob("*.md"))]
VERBS_PAGE = ROOT / "docs" / "verbs.md"
RUN = ("sh", "console", "python")
SHOWN = ("", "text", "toml", "json", "yaml", "js")
"""Languages of blocks that are not run."""
LIMIT_S = 150
"""Timeout of one block; each takes less than a third of it."""

_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\S*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
_MARK = re.compile(r"<!-- (?P<words>not run: [^>]+|in another terminal) -->\s*\Z")
_FILE = re.compile(r"# (?P<name>[\w.-]+\.(?:py|toml))\n")
_GIVEN = re.compile(r"<!-- given: (?P<name>\S+) -->")
_RECORDING = re.compile(r"[\w./-]+\.mcap\b")


class Block(NamedTuple):
    page: Path
    line: int
    kind: str
    body: str
    mark: str
    """`not run: REASON`, `in another terminal`, or empty."""

    @property
    def file(self) -> str:
        found = _FILE.match(self.body)
        return found["name"] if found else ""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        mark = _MARK.search(text, 0, fence.start())
        body = re.sub(rf"^{fence['indent']}", "", fence["body"], flags=re.M)
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, fence["kind"], body, mark["words"].strip() if mark else ""))
    return found


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


BLOCKS = {page: blocks_of(page) for page in PAGES}
RUNNING = [
    page for page, blocks in BLOCKS.items() if any(b.kind in RUN and not b.mark.startswith("not run") for b in blocks)
]


class Terminal:
    """Runs the commands of one page: its own folder, this checkout's program on PATH, other sessions invisible."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._background = folder / "here", list[tuple[Block, subprocess.Popen[str]]]()
        bin_, self._run = folder / "bin", folder / "run"
        for made in (self.folder, bin_, self._run):
            made.mkdir(mode=0o700)
        for name, command in (("stream-mmrnn", COMMAND), ("python", [sys.executable])):
            (bin_ / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
            (bin_ / name).chmod(0o700)
        self._env = {
            **os.environ,
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            # without a place of its own, a session is registered in the temporary folder, and there seen by all
            "XDG_RUNTIME_DIR": str(self._run),
            "TMPDIR": str(self._run),
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "COLUMNS": "120",
        }

    def start(self, block: Block) -> subprocess.Popen[str]:
        if block.kind == "python":
            command = [sys.executable, "-c", block.body]
        else:
            body = block.body
            if block.kind == "console":
                body = "".join(f"{line[2:]}\n" for line in body.splitlines() if line.startswith("$ "))
            command = ["bash", "-euo", "pipefail", "-c", body]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, block: Block) -> None:
        if block.mark == "in another terminal":
            process = self.start(block)
            self._background.append((block, process))
            self._wait_for_session(process)
        else:
            self._wait_for_recordings(block)
            self._finish(block, self.start(block))

    def _wait_for_recordings(self, block: Block) -> None:
        """A recording can be read when its session has ended, as a person would see in the other terminal."""
        names = set(_RECORDING.findall(block.body))
        for other in [b for b in self._background if names & set(_RECORDING.findall(b[0].body))]:
            self._background.remove(other)
            self._finish(*other)

    def _wait_for_session(self, process: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 60
        while process.poll() is None and not [*self._run.glob("stream-mmrnn/*.json")] and time.monotonic() < end:
            time.sleep(0.05)

    @staticmethod
    def _finish(block: Block, process: subprocess.Popen[str]) -> None:
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            pytest.fail(f"{block.where} did not end in {LIMIT_S} s:\n{output[-4000:]}")
        code = process.returncode
        assert code == 0, f"{block.where} exited with {code}:\n{block.body}\n{output[-4000:]}"
        if block.kind == "console":
            for line in block.body.splitlines():
                assert line.startswith("$ ") or line in output, f"{block.where}: not printed: {line}\n{output[-4000:]}"

    def close(self) -> None:
        """Wait for the background processes; each must exit with 0."""
        while self._background:
            self._finish(*self._background.pop(0))

    def kill(self) -> None:
        for _, process in self._background:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recording for pages that need one: made once, by a command of the README."""
    path = tmp_path_factory.mktemp("docs") / "talk.mcap"
    command = [*COMMAND, "live", "--source", "synthetic", "--duration", "5", "--record", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.process
def test_a_recording_of_another_terminal_is_read_when_it_is_finished(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    session = 'mkdir "$TMPDIR/stream-mmrnn"; touch "$TMPDIR/stream-mmrnn/a.json"; sleep 0.3; touch a.mcap'
    try:
        terminal.run(Block(ROOT / "README.md", 1, "sh", session, "in another terminal"))
        terminal.run(Block(ROOT / "README.md", 2, "sh", "cat a.mcap", ""))
        terminal.close()
    finally:
        terminal.kill()


@pytest.mark.process
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", RUNNING, ids=named)
def test_the_commands_of_a_page_run(page: Path, talk: Path, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    try:
        for name in _GIVEN.findall(page.read_text(encoding="utf-8")):
            if name == "walk":
                ros_bags.write_walk(terminal.folder / name)
            else:
                shutil.copy(talk if name == talk.name else vega_file(name), terminal.folder)
        for block in BLOCKS[page]:
            if block.file:
                (terminal.folder / block.file).write_text(block.body, encoding="utf-8")
            elif block.kind in RUN and not block.mark.startswith("not run"):
                terminal.run(block)
        terminal.close()
    finally:
        terminal.kill()


def test_each_block_runs_or_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    run, not_run = 0, []
    for page, blocks in BLOCKS.items():
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(blocks), f"{named(page)}: a code fence is not closed, or of an unknown form"
        for i, block in enumerate(blocks):
            assert block.kind in (*RUN, *SHOWN), f"{block.where}: `{block.kind}` is not one of {RUN + SHOWN}"
            if block.kind not in RUN:
                assert not block.mark, f"{block.where}: this language is never run, so it needs no comment"
                assert not block.body.startswith(("$ ", "stream-mmrnn ")), f"{block.where}: use sh for commands"
            elif block.mark.startswith("not run"):
                not_run.append(f"{block.where}: {block.mark.removeprefix('not run: ')}")
            else:
                run += 1
            if block.file and block.kind == "python":
                later = [b.body for b in blocks[i + 1 :] if b.kind in RUN and not b.mark.startswith("not run")]
                assert any(f"python {block.file}" in body for body in later), f"{block.where}: no command runs it"
        comments = list(re.findall(r"<!-- (?:not run|in another)[^>]*-->", text))
        assert len(comments) == sum(bool(b.mark) for b in blocks), f"{named(page)}: a comment that is not above a block"
    with capsys.disabled():
        print(f"\ndocumentation: {run} blocks run, {len(not_run)} do not:")
        print("".join(f"  {line}\n" for line in not_run), end="")
    assert run > 20


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_toml_is_toml(page: Path) -> None:
    for block in BLOCKS[page]:
        if block.kind == "toml":
            table = tomllib.loads(block.body)
            if set(table) & set(Settings.__struct_fields__) and "modalities" not in table:
                config.parse(table)


# ---- commands in sentences and tables -------------------------------------------------------------------------------


def commands_of(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    yield from re.findall(r"`(stream-mmrnn [a-z][^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
    yield from re.findall(r"^(?:    )?(stream-mmrnn [a-z][^\n#|&]*)", text, re.M)


def check_command(words: list[str]) -> str:
    """The error in a command's verb or options; "" if there is none."""
    command: Any = typer.main.get_command(cli.app)
    known = {"--help", "-h"}
    for i, word in enumerate(words):
        if "|" in word:  # several verbs in one row of a table
            return next((f"no verb {verb}" for verb in word.split("|") if verb not in command.commands), "")
        if hasattr(command, "commands") and not word.startswith("-"):
            if word not in command.commands:
                return f"no verb {word}"
            command = command.commands[word]
        elif word.startswith("-") and word != "--" and not word[1:2].isdigit():
            known |= {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
            if word.split("=")[0] not in known:
                return f"no option {word} of {' '.join(words[:i])}"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_each_command_exists(page: Path) -> None:
    for written in commands_of(page):
        words = [w.rstrip(".,;:)") for w in shlex.split(written.replace("...", ""), comments=True)[1:]]
        assert check_command([w for w in words if w]) == "", f"{named(page)}: {written}"


def test_the_pages_name_each_verb() -> None:
    readme, page = (path.read_text(encoding="utf-8") for path in (ROOT / "README.md", VERBS_PAGE))
    verbs: Any = typer.main.get_command(cli.app)
    for name, verb in verbs.commands.items():
        assert verb.hidden or re.search(rf"^\| `{name}\b", page, re.M), f"docs/verbs.md has no row for {name}"
        assert verb.hidden or f"`{name}`" in readme, f"README.md does not list {name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_a_wrong_command_is_noticed() -> None:
    assert check_command(["life"]) == "no verb life"
    assert check_command(["replay", "a.mcap", "--verfy"]) == "no option --verfy of replay a.mcap"
    assert check_command(["bench", "step", "--json"]) == ""


# ---- names and links ------------------------------------------------------------------------------------------------


def test_the_configuration_page_is_up_to_date() -> None:
    page = config_reference.PAGE.read_text(encoding="utf-8")
    assert page == config_reference.render(), "run python -m tools.config_reference --write"


def _anchor(heading: str) -> str:
    """The anchor that GitHub and mkdocs make of a plain heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_exist(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{named(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.M)
            assert anchor in map(_anchor, headings), f"{named(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_open_pages_and_not_pictures(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?<!!)\[[^\]!]*\]\([^)]+\.(?:png|svg)\)", text)


def sentences() -> list[str]:
    """Every string in the package, with NUL in place of formatted values."""
    found = []
    for path in (ROOT / "stream_mmrnn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def contains(text: str, parts: list[str]) -> bool:
    """Whether the text contains all parts in this order."""
    at = 0
    for part in parts:
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


ENTRIES = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
"""Error messages; … stands for the part that differs."""


@pytest.mark.slow
def test_the_program_contains_each_message_of_troubleshooting() -> None:
    assert len(ENTRIES) > 20
    assert len(set(ENTRIES)) == len(ENTRIES)
    texts = sentences()
    for entry in ENTRIES:
        assert any(contains(text, entry.split("…")) for text in texts), f"no such message in the program: {entry}"


@pytest.mark.process
def test_troubleshooting_has_common_messages() -> None:
    for args in (
        ("live", "--model", "nothing"),
        ("live", "--vision", "webcam"),
        ("live", "--source", "none"),
        ("replay", "nowhere.mcap"),
    ):
        done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        printed = " ".join(done.stderr.split())
        assert any(contains(printed, entry.split("…")) for entry in ENTRIES), printed


# ---- the site -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the site needs mkdocs-material: pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="the site needs mkdocstrings: pip install '.[docs]'")
    out = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.process
def test_every_page_is_in_the_site(site: Path) -> None:
    for page in docs_site.pages():
        made = re.sub(r"README\.md$", "index.md", page)  # mkdocs does this for folders
        assert (site / made).with_suffix(".html").is_file(), page
    index = (site / "index.html").read_text(encoding="utf-8")
    assert "<h1" in index
    assert "docs/page.png" not in index
    assert (site / "page.png").is_file()
    api = (site / "api.html").read_text(encoding="utf-8")
    for name in ("subscribe", "StepEngine.step", "Publisher.publish", "Recording"):
        assert name in api


_LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?(?:src|data)=[\"']?((?:https?:)?//[^\"' >]+)"
    r"|<link\b[^>]*?href=[\"']?((?:https?:)?//[^\"' >]+)"
    r"|url\(\s*[\"']?((?:https?:)?//[^)\"']+)"
    r"|@import\s+[\"']((?:https?:)?//[^\"']+)",
    re.I,
)
_NEVER_REQUESTED = {
    "https://unpkg.com": "mermaid, only if a page has a mermaid diagram; none has",
    "https://api.github.com": "stars, only if repo_url is set; it is not",
    "https://gitlab.com": "the same",
}


@pytest.mark.process
def test_the_site_names_no_other_host(site: Path) -> None:
    """No script, style, font or picture is from another host; the theme's own optional requests are off."""
    for path in (*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")):
        text = path.read_text(encoding="utf-8")
        assert not _LOADED.search(text), f"{path.relative_to(site)}: {_LOADED.search(text)}"
        assert "mermaid" not in text or path.suffix != ".html"
        assert 'data-md-component="source"' not in text
    scripts = [path for path in site.rglob("*.js") if path.name != "search_index.js"]  # that one is the pages' text
    assert scripts
    for path in scripts:
        for host in re.findall(r"[\"'`](https?://[^/\"'`$]+)", path.read_text(encoding="utf-8")):
            assert host in _NEVER_REQUESTED or "w3.org" in host, f"{path.relative_to(site)}: {host}"


@pytest.fixture
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        chromium = own if Path(own).exists() else shutil.which("chromium")
        if chromium is None:
            pytest.skip("Chromium is not installed: playwright install chromium, or the system's package chromium")
        chrome = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield chrome
        chrome.close()


@pytest.mark.process
def test_a_browser_loads_nothing_from_other_hosts(site: Path, browser: Any) -> None:
    page = browser.new_page()
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    for name in ("index.html", "api.html", "guides/voice_agent.html"):
        page.goto((site / name).as_uri())
        page.wait_for_load_state("load")
    assert len(requested) > 5
    assert [url for url in requested if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.process
@pytest.mark.parametrize("start", ["index.html", "guides/study.html"])
def test_the_search_works_from_a_folder(site: Path, browser: Any, start: str) -> None:
    """Without a server and without flags that allow access to files."""
    page = browser.new_page()
    page.goto((site / start).as_uri())
    page.locator("input.md-search__input").focus()
    page.keyboard.type("the end of the turn, in 20 lines")
    found = page.locator(".md-search-result__item a").first
    found.wait_for(state="visible")
    found.click()
    page.wait_for_url("**/guides/voice_agent.html**")


def test_links_from_the_repository_become_links_of_the_site() -> None:
    for here, link, expected in (
        ("index.md", "docs/page.md", "page.md"),
        ("index.md", "CONTRIBUTING.md", "CONTRIBUTING.md"),
        ("index.md", "models/digits/card.md", "models/digits/card.md"),
        ("guides/study.md", "../../README.md", "../index.md"),
        ("guides/study.md", "../model.md", "../model.md"),
        ("limits.md", "../models/digits/card.md", "models/digits/card.md"),
        ("models/digits/card.md", "../../docs/study.md", "../../study.md"),
    ):
        assert docs_site.site_link(link, here) == expected
