"""A hook of mkdocs: the order of the pages, and the pages that lie outside docs/.

README.md is the first page of the site. The other pages of the repository's root and the model cards are pages, too, so
each text exists once. A page that is missing in `ORDER` is listed at the end, under "More".
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

ORDER: dict[str, tuple[str, ...]] = {
    "Start": ("index.md", "quickstart.md", "install.md"),
    "Guides": (
        "guides/voice_agent.md",
        "guides/pipecat.md",
        "guides/livekit.md",
        "guides/robot.md",
        "guides/ros.md",
        "guides/study.md",
        "guides/labels.md",
        "guides/browser.md",
        "guides/forecast.md",
    ),
    "Use": ("verbs.md", "page.md", "observe.md", "use.md", "serve.md", "clients/README.md", "interchange.md"),
    "When something fails": ("troubleshooting.md", "robustness.md", "limits.md"),
    "Reference": ("configuration.md", "how.md", "model.md", "formats.md", "api.md"),
    "Internals": (
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "performance.md",
        "avx2/performance.md",
        "reliability.md",
        "scale.md",
        "gpu.md",
        "speech.md",
        "study.md",
    ),
}
"""By section. Pages that do not exist are skipped."""

ROOT_PAGES = {"README.md": "index.md"} | {name: name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")}
"""From a page's path in the repository to its path in the site."""

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)(?P<path>[^)#\s]+)")


def pages() -> list[str]:
    """All pages in docs/, as mkdocs names them."""
    docs = ROOT / "docs"
    return sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the navigation from the pages that exist."""
    existing = {*pages(), *ROOT_PAGES.values()}
    nav: list[dict[str, Any]] = [
        {section: [page for page in order if page in existing]} for section, order in ORDER.items()
    ]
    listed = {page for order in ORDER.values() for page in order}
    if unlisted := sorted(existing - listed):
        nav.append({"More": unlisted})
    nav.append({"Model cards": [card.relative_to(ROOT).as_posix() for card in _cards()]})
    config.nav = nav
    return config


def _cards() -> list[Path]:
    return sorted((ROOT / "models").glob("*/*card.md"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/."""
    from mkdocs.structure.files import File

    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for card in _cards():
        files.append(File.generated(config, card.relative_to(ROOT).as_posix(), abs_src_path=str(card)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    return _LINK.sub(lambda link: site_link(link["path"], here), markdown)


def site_link(link: str, here: str) -> str:
    """A link from the page `here` (as the site names it), from the repository's paths to the site's."""
    source = _source_of(here)
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return posixpath.relpath(_page_of(target), posixpath.dirname(here) or ".")


def _source_of(page: str) -> str:
    """The file of a page, in the repository."""
    for source, name in ROOT_PAGES.items():
        if name == page:
            return source
    return page if page.startswith("models/") else f"docs/{page}"


def _page_of(source: str) -> str:
    return ROOT_PAGES.get(source, source.removeprefix("docs/"))
