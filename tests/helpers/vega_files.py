"""The tables of the package vega_datasets: real weather and prices."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def vega_file(name: str) -> Path:
    """A table of the package; skips the test where the package is not installed. Imports neither it nor pandas."""
    spec = find_spec("vega_datasets")
    if spec is None or spec.origin is None:
        pytest.skip("vega_datasets (extra dev) is not installed")
    return Path(spec.origin).parent / "_data" / name
