"""The settings' schema, their check, and the completion of shells, each against a real reader of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from stream_mmrnn.cli.config_effective import as_toml, effective, faults
from stream_mmrnn.core import config, strict_toml
from stream_mmrnn.core.config_schema import schema
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.settings import Settings, StreamSettings

COMMAND = [sys.executable, "-m", "stream_mmrnn"]


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=60)


validator = jsonschema.Draft7Validator(schema())


@pytest.mark.process
def test_the_schema_is_valid_and_so_are_the_defaults() -> None:
    jsonschema.Draft7Validator.check_schema(schema())
    validator.validate(msgspec.json.decode(msgspec.json.encode(Settings())))
    printed = json.loads(run("config", "schema").stdout)
    assert printed == schema() == json.loads(run("config", "schema", "--json").stdout.splitlines()[-1])
    assert "$ref" not in json.dumps(printed)


def test_the_schema_holds_every_setting_with_its_default_and_its_docstring() -> None:
    made = msgspec.json.decode(msgspec.json.encode(Settings()))
    assert made.pop("streams") == {}
    for section, values in made.items():
        part = schema()["properties"][section]
        assert {k: p["default"] for k, p in part["properties"].items()} == values
    properties = schema()["properties"]
    row = properties["streams"]["additionalProperties"]
    assert row["required"] == ["source"]
    assert set(row["properties"]) == set(StreamSettings.__struct_fields__)
    assert all(p["description"] for p in row["properties"].values())
    assert (
        properties["engine"]["properties"]["model"]["description"]
        == "The name of an included model, or the path of an ONNX file."
    )
    assert properties["synthetic"]["description"].startswith("A seeded source without hardware")
    assert properties["session"]["properties"]["name"]["pattern"].startswith("^")


_SECTIONS = [section for section in Settings.__struct_fields__ if section != "streams"]
_STREAM = list(StreamSettings.__struct_fields__)
_KEYS = {s: list(type(getattr(Settings(), s)).__struct_fields__) for s in _SECTIONS}
_values = (
    st.booleans()
    | st.integers(-10, 10**7)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["live", "a b", "cuda", "fifo", "latest", "block", "tcp", "", "x" * 70])
)


@pytest.mark.slow
@given(st.data())
def test_schema_check_and_parse_agree_on_any_values(data: st.DataObject) -> None:
    """Except what the schema cannot express: which settings exclude each other."""
    table: dict[str, dict[str, Any]] = {}
    for section in data.draw(st.sets(st.sampled_from(_SECTIONS), max_size=3)):
        keys = st.sampled_from([*_KEYS[section], "nix"])
        table[section] = data.draw(st.dictionaries(keys, _values, max_size=3))
    if data.draw(st.booleans()):
        row = st.dictionaries(st.sampled_from([*_STREAM, "source", "nix"]), _values, max_size=4)
        table["streams"] = data.draw(st.dictionaries(st.sampled_from(["a", "b"]), row | _values, max_size=2))
    fits = validator.is_valid(table)
    try:
        strict_toml.convert(table, Settings)
        converts = True
    except ConfigError:
        converts = False
    assert fits == converts
    found = config.faults(table)
    assert bool(found) >= (not converts)
    said = [""]
    try:
        config.parse(table)
    except ConfigError as e:
        said = [str(e)]
    assert set(said) <= {says for _, says in found} if found else said == [""]


@pytest.mark.process
def test_every_fault_is_one_sentence_with_its_key(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text("dashbord = 1\n[engine]\nmodle = 'x'\nslots = 0\nprovider = 'tpu'\n[camera]\nwidth = 'wide'\n")
    done = run("config", "check", file, "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 2
    assert document["ok"] is False
    said = {f["key"]: f["says"] for f in document["faults"]}
    assert set(said) == {"dashbord", "engine.modle", "engine.slots", "engine.provider", "camera.width"}
    assert said["engine.modle"] == "unknown key `engine.modle`: the nearest is `model`"
    assert "the nearest is `dashboard`" in said["dashbord"]
    assert all("\n" not in says and f"`{key}`" in says for key, says in said.items())
    plain = run("config", "check", file)
    assert plain.returncode == 2
    assert plain.stdout == ""
    assert len(plain.stderr.splitlines()) == 5


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("[dashboard]\nhost = '0.0.0.0'\n", "dashboard.host", "can be reached by others"),
        ("[engine]\nmodel = 'nix'\n", "engine.model", "there is no model 'nix'"),
        ("[sources]\nvision = 'microphone'\n", "sources", "no source of vision"),
        ("[sources]\ntext = 'tcp:1'\nother_text = 'tcp:1'\n", "sources", "cannot both be"),
        ("engine = 3\n", "engine", "expected a table"),
    ],
)
def test_errors_beyond_the_schema_are_found(tmp_path: Path, text: str, key: str, words: str) -> None:
    file = tmp_path / "s.toml"
    file.write_text(text)
    (fault,) = faults(file)
    assert fault["key"] == key
    assert words in fault["says"]


@pytest.mark.process
def test_a_valid_file_is_exit_code_0_and_no_toml_is_2(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text("[engine]\nslots = 2\n")
    done = run("config", "check", file, "--json")
    assert (done.returncode, json.loads(done.stdout)["faults"]) == (0, [])
    file.write_text("[engine\n")
    done = run("config", "check", file)
    assert done.returncode == 2
    assert "is not valid TOML" in done.stderr


@pytest.mark.process
def test_shown_settings_are_in_effect_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('[engine]\nslots = 2\n[record]\npath = "a\\\\b \\"c\\" \\u007f é"\n', encoding="utf-8")
    document = json.loads(run("config", "show", "--config", file, "--json").stdout)
    assert document["engine"]["slots"] == {"value": 2, "from": str(file)}
    assert document["engine"]["batch"]["from"] == "default"
    shown = run("config", "show", "--config", file).stdout
    assert config.parse(tomllib.loads(shown)) == config.load(file)


@pytest.mark.slow
@given(st.text(max_size=20))
def test_any_text_reads_back(text: str) -> None:
    if any("\ud800" <= c <= "\udfff" for c in text):
        return
    values = effective(None)
    values["record"]["path"]["value"] = text
    assert tomllib.loads(as_toml(values))["record"]["path"] == text


# ---- completion --------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`stream-mmrnn` on the path, as an installation puts it there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "stream-mmrnn"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m stream_mmrnn "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def shell(name: str, *args: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"this machine has no {name}")
    done = subprocess.run([path, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
@pytest.mark.usefixtures("command")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stream-mmrnn", "li"], {"live"}),
        (["stream-mmrnn", "config", ""], {"schema", "check", "show"}),
        (["stream-mmrnn", "live", "--model", "turn"], {"turn_taking"}),
        (["stream-mmrnn", "live", "--rec"], {"--record"}),
    ],
)
def test_bash_completes_verbs_options_and_models(words: list[str], expected: set[str]) -> None:
    line = " ".join(f"'{w}'" for w in words)
    code = (
        'eval "$(stream-mmrnn completion bash)"; '
        "how=$(complete -p stream-mmrnn); how=${how#*-F }; "
        f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; ${{how%% *}} stream-mmrnn; "
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    assert set(shell("bash", "--norc", "-c", code).split()) == expected


@pytest.mark.usefixtures("command")
def test_fish_completes_verbs_and_models() -> None:
    lines = ("live --model turn", "doc")
    code = "stream-mmrnn completion fish | source; " + "; ".join(f"complete -C 'stream-mmrnn {x}'" for x in lines)
    said = shell("fish", "--no-config", "-c", code).split()
    assert "turn_taking" in said
    assert "doctor" in said


@pytest.mark.usefixtures("command")
def test_zsh_loads_the_script_and_completes() -> None:
    """A completion of zsh runs only in its line editor, so the script is loaded there."""
    code = (
        "autoload -U compinit; compinit -u -D; source <(stream-mmrnn completion zsh); "
        "print ${_comps[stream-mmrnn]}; "
        "_TYPER_COMPLETE_ARGS='stream-mmrnn live --model turn' _STREAM_MMRNN_COMPLETE=complete_zsh stream-mmrnn"
    )
    said = shell("zsh", "-f", "-c", code)
    assert "_stream_mmrnn_completion" in said
    assert "turn_taking" in said


@pytest.mark.process
@pytest.mark.usefixtures("command")
def test_completion_is_installed_where_the_shell_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    said = shell("bash", "--norc", "-c", "stream-mmrnn --install-completion; true")
    assert "completion installed" in said
    assert any("_STREAM_MMRNN_COMPLETE" in p.read_text() for p in tmp_path.rglob("*.sh"))


@pytest.mark.process
def test_the_script_is_part_of_the_document() -> None:
    document = json.loads(run("completion", "bash", "--json").stdout)
    assert document["shell"] == "bash"
    assert "_STREAM_MMRNN_COMPLETE=complete_bash" in document["script"]
    assert run("completion", "tcsh").returncode == 2
