"""Plug-ins are found by their entry points, loaded when they are named, and a broken one is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import plugin_packages
import pytest

from stream_mmrnn.capture import encoders, sources
from stream_mmrnn.core import config, plugins
from stream_mmrnn.core.errors import PluginError, SourceError, SourceSpecError, UsageError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Sample
from stream_mmrnn.training import cells, fusion
from stream_mmrnn.training import recipe as recipes


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def a_package(site: Path, code: str, *points: tuple[str, str, str], name: str = "added") -> None:
    groups: dict[str, dict[str, str]] = {}
    for group, point, target in points:
        groups.setdefault(f"stream_mmrnn.{group}", {})[point] = target
    plugin_packages.describe(site, name, "1.2", groups)
    (site / f"{name}.py").write_text(code)


def test_the_example_is_a_source_and_an_encoder(site: Path) -> None:
    plugin_packages.install_thermometer(site)
    [source] = plugins.installed("sources")
    assert (source.name, source.package, source.version) == ("thermometer", "stream-mmrnn-thermometer", "0.1.0")
    settings = config.parse({"streams": {"room": {"source": "thermometer:demo", "encoders": ["mean_slope"]}}})
    room = stream_table(settings)["room"]
    assert (room.kind, room.raw) == ("signal", True)
    sources.check_all([room])
    encoders.check_all([room])
    made = sources.create_source(room, settings)
    made.open()
    sample = next(made.samples(lambda: True, 0))
    assert 18 < sample.data[0] < 22
    [(name, encoder)] = encoders.encoders_of(room).items()
    assert name == "room"
    assert encoder.origin.startswith("mean_slope@")
    # a signal that rises by 2 a second, on two channels of which one stands still
    got = [encoder.encode(Sample(k * 10**8, k * 10**8, np.array([0.2 * k, 5], np.float32))) for k in range(30)]
    [vector] = got[-1]
    assert vector.data == pytest.approx([0.2 * 24.5, 5, 2, 0], abs=1e-4)
    encoder.reset()
    [first] = encoder.encode(Sample(0, 0, np.array([3, 4], np.float32)))
    assert first.data.tolist() == [3, 4, 0, 0]


def test_a_missing_thermometer_is_a_missing_device(site: Path) -> None:
    plugin_packages.install_thermometer(site)
    made = sources.create_source(Stream.of("room", source="thermometer:/no/such"), Settings())
    with pytest.raises(SourceError, match="thermometer:/no/such cannot be read"):
        made.open()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nothing_of_that_name", "does not load: ModuleNotFoundError"),
        ("", "does not load: AttributeError"),
        ("def Made(): raise ValueError('two\\nlines')", "does not load: ValueError: two lines"),
        ("class Made: pass", "has no `origin`"),
    ],
)
def test_a_broken_plug_in_is_one_sentence(site: Path, code: str, words: str) -> None:
    name = f"broken_{abs(hash(code))}"
    a_package(site, code, ("encoders", "odd", f"{name}:Made"), name=name)
    with pytest.raises(PluginError) as e:
        encoders.encoders_of(_with_encoder("odd"))
    assert words in str(e.value)
    assert f"'odd' of the package {name}" in str(e.value)
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 2


def _with_encoder(name: str) -> Stream:
    table = stream_table(config.parse({"streams": {"a": {"source": "lsl:x", "encoders": [name]}}}))
    return table["a"]


def test_two_packages_with_one_name_are_refused(site: Path) -> None:
    a_package(site, "", ("encoders", "same", "one:X"), name="one")
    a_package(site, "", ("encoders", "same", "two:X"), name="two")
    with pytest.raises(PluginError, match="one and two both register encoder 'same'"):
        plugins.find("encoders", "same")


def test_what_no_package_registers_is_unknown(site: Path) -> None:
    a_package(site, "", ("encoders", "mine", "added:X"))
    with pytest.raises(UsageError, match="an encoder 'nix', which is not known; use one of signal, mine"):
        encoders.check_all([_with_encoder("nix")])
    with pytest.raises(SourceSpecError, match="'barometer:1' is no source of a"):
        sources.check_all([Stream.of("a", source="barometer:1")])


def test_a_cell_and_a_fusion_of_another_package_train(site: Path) -> None:
    code = (
        "from stream_mmrnn.training.cells import GRU\n"
        "from stream_mmrnn.training.fusion import Add\n"
        "class MyCell(GRU): pass\n"
        "class MyFusion(Add): pass\n"
    )
    points = ("cells", "my_gru", "trainable:MyCell"), ("fusions", "my_add", "trainable:MyFusion")
    a_package(site, code, *points, name="trainable")
    assert type(cells.create("my_gru", 3, 4)).__name__ == "MyCell"
    assert type(fusion.create("my_add", 2, 4, 4)).__name__ == "MyFusion"
    table: dict[str, Any] = {
        "name": "x",
        "modalities": {"a": {"size": 3}},
        "heads": [{"name": "h", "kind": "regression", "size": 1}],
        "data": {"kind": "recordings"},
        "cell": {"kind": "my_gru"},
        "fusion": {"kind": "my_add"},
    }
    assert recipes.parse(table).cell.kind == "my_gru"
    table["cell"]["kind"] = "nix"
    with pytest.raises(
        UsageError, match=r"`cell\.kind` has a wrong value: there is no 'nix'; use one of rnn_tanh.*my_gru"
    ):
        recipes.parse(table)
