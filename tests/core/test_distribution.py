from __future__ import annotations

from pathlib import Path

import pytest

import stream_mmrnn
from stream_mmrnn.core import distribution


def test_what_is_installed_in_a_folder(tmp_path: Path) -> None:
    assert distribution.installed(tmp_path) == set()
    assert distribution.installed(tmp_path / "missing") == set()
    (tmp_path / "stream_mmrnn_client-0.1.0.dist-info").mkdir()
    (tmp_path / "stream_mmrnn_other-0.1.0.dist-info").mkdir()
    assert distribution.installed(tmp_path) == {distribution.CLIENT}
    (tmp_path / "stream_mmrnn-0.1.0.dist-info").mkdir()
    assert distribution.installed(tmp_path) == {distribution.FULL, distribution.CLIENT}


def test_a_checkout_has_every_public_name_and_no_warning() -> None:
    assert set(stream_mmrnn.__all__) == set(stream_mmrnn._HOMES)
    distribution.warn_of_both()
    with pytest.raises(AttributeError, match="has no attribute 'nix'"):
        _ = stream_mmrnn.nix
