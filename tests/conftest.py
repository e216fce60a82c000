from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy_model
from hypothesis import HealthCheck, settings
from places import SHARED

from stream_mmrnn.capture import encoders, sources
from stream_mmrnn.core.types import ModalitySpec

# how long an example takes says nothing on a machine that others use too
settings.register_profile("shared_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared_machine")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the sizes of toy_model.MODALITIES."""
    return toy_model.make(tmp_path_factory.mktemp("models") / "toy.onnx")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the sizes and origins of the real encoders."""
    specs = tuple(ModalitySpec(m, e.size, e.origin) for m in sources.MODALITIES for e in [encoders.create_encoder(m)])
    return toy_model.make(tmp_path_factory.mktemp("live") / "toy.onnx", specs)


@pytest.fixture(scope="session")
def clips() -> Path:
    folder = SHARED / "data" / "clips"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return folder


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for that of a socket in it, however deep the system's temporary folder is."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)
