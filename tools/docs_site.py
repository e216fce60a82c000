"""What mkdocs.yml cannot say: the order of the pages, and the pages that lie outside docs/.

README.md is the site's first page, and the cards of the zoo are pages of it, so that each is written once. A page that
is not in the order below comes at its end: nobody has to change two files to add one. Knows nothing about what a page
says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

ORDER: dict[str, tuple[str, ...]] = {
    "Begin": ("index.md", "quickstart.md"),
    "Guides": ("guides/voice_agent.md", "guides/robot.md", "guides/study.md"),
    "Use": ("page.md", "observe.md", "use.md", "serve.md", "interchange.md", "robustness.md", "troubleshooting.md"),
    "Reference": ("how.md", "formats.md", "model.md", "configuration.md", "api.md", "install.md"),
    "Measured": ("performance.md", "gpu.md", "reliability.md", "scale.md", "study.md"),
}
"""By section; what is not there is passed over."""

_MODELS = "models"
_REPOSITORY_LINK = re.compile(r"(?<=\]\()(?:\.\./)*(docs|models)/")


def pages() -> list[str]:
    """All pages in docs/, as mkdocs names them."""
    docs = ROOT / "docs"
    return sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the navigation of what there is."""
    there = {*pages(), "index.md"}
    nav: list[dict[str, Any]] = [
        {section: [page for page in order if page in there]} for section, order in ORDER.items()
    ]
    listed = {page for order in ORDER.values() for page in order}
    if unlisted := sorted(there - listed):
        nav.append({"More": unlisted})
    nav.append({"The zoo": [f"{_MODELS}/{card.relative_to(ROOT / _MODELS).as_posix()}" for card in _cards()]})
    config.nav = nav
    return config


def _cards() -> list[Path]:
    return sorted((ROOT / _MODELS).glob("*/*card.md"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for card in _cards():
        files.append(File.generated(config, card.relative_to(ROOT).as_posix(), abs_src_path=str(card)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links as the repository has them into links of the site."""
    up = "../" * page.file.src_uri.count("/")
    return _REPOSITORY_LINK.sub(lambda found: up + ("" if found[1] == "docs" else "models/"), markdown)
