from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.core import config
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.settings import EngineSettings, QueuesSettings, Settings
from stream_mmrnn.core.stream_table import stream_table


def write(path: Path, text: str) -> Path:
    file = path / "settings.toml"
    file.write_text(text)
    return file


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert config.load(write(tmp_path, "")) == Settings() == config.load(None)


def test_values_and_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, "[engine]\nslots = 4\n[sources]\nvision = 'none'\n")
    settings = config.load(file, {"engine.slots": 8, "engine.model": None, "session.name": "a"})
    assert (settings.engine.slots, settings.sources.vision, settings.session.name) == (8, "none", "a")
    assert settings.engine.model == EngineSettings().model


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[engine]\nslot = 4", "unknown key `engine.slot`: the nearest is `slots`"),
        ("[enginee]\nslots = 4", "unknown key `enginee`: the nearest is `engine`"),
        ("[engine]\nzzzzzz = 4", "the keys there are model, provider, slots, batch"),
        ("[engine]\nslots = 0", "`engine.slots` has a wrong value: expected `int` >= 1"),
        ("[engine]\nslots = 'a'", "`engine.slots` has a wrong value"),
        ("[engine]\nprovider = 'tpu'", "`engine.provider` has a wrong value"),
        ("[dashboard]\nhost = '0.0.0.0'", "`dashboard.host` 0.0.0.0 can be reached by others"),
        ("[dashboard]\nhost = 'page.example.org'", "`dashboard.host` page.example.org can be reached by others"),
        ("[bus]\ntransport = 'tcp'\nhost = '0.0.0.0'", "`bus.host` 0.0.0.0 can be reached by others: make keys"),
        ("[bus]\ntransport = 'tcp'\nhost = '::'", "`bus.host` :: can be reached by others"),
        ("[bus]\ntransport = 'tcp'\nhost = 'example.org'", "`bus.host` is an IP address"),
        ("[bus]\nhost = '192.0.2.1'", "are for tcp"),
        ("[bus]\nkeys = 'folder'", "are for tcp"),
        ("[session]\nname = '../up'", "`session.name` has a wrong value"),
        ("engine = 3", "`engine` has a wrong value"),
        ("[engine\n", "is not valid TOML"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as e:
        config.load(write(tmp_path, text))
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        config.load(tmp_path / "no.toml")


values = st.none() | st.integers() | st.text()


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=8), values | st.dictionaries(st.text(max_size=8), values)))
def test_any_table_is_settings_or_an_error_of_ours(table: dict[str, object]) -> None:
    with contextlib.suppress(ConfigError):
        config.parse(table)


def test_the_second_person_is_not_there_unless_named_and_its_settings_are_its_kind_s() -> None:
    sources = Settings().sources
    assert (sources.other_audio, sources.other_text) == ("none", "none")
    settings = config.parse(
        {"align": {"audio_lateness_ms": 33.0, "text_lateness_ms": 5.0}, "queues": {"text": "latest"}}
    )
    table = stream_table(settings)
    assert table["audio"].lateness_ns == table["other_audio"].lateness_ns == 33_000_000
    assert table["text"].lateness_ns == table["other_text"].lateness_ns == 5_000_000
    assert table["other_text"].policy == table["text"].policy == "latest"
    assert table["other_audio"].policy == table["audio"].policy == "drop_oldest"


def test_an_unknown_model_names_the_zoo() -> None:
    with pytest.raises(ConfigError, match="no model 'nix'; give an ONNX file's path"):
        config.find_model("nix")
    assert config.find_model("./x.onnx") == Path("x.onnx")


def test_a_recording_of_another_release_is_read() -> None:
    table = msgspec.to_builtins(Settings())
    table["align"]["vision_lateness_ms"] = 33.0
    table["align"]["gone_since"] = 1
    table["gone"] = {"a": 1}
    del table["queues"], table["sources"]["other_audio"]
    settings = config.recorded(table)
    assert settings.align.vision_lateness_ms == 33.0
    assert settings.queues == QueuesSettings()
    assert settings.sources.other_audio == "none"
    with pytest.raises(ConfigError, match=r"`align\.vision_lateness_ms` has a wrong value"):
        config.recorded({"align": {"vision_lateness_ms": -1}})
