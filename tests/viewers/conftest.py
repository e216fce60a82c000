"""A browser and a session, for the tests of a module that look at the live page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from chromium import running_chromium
from harness import Running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def live() -> Iterator[Running]:
    with closing(Running("--source", "synthetic")) as session:
        yield session
