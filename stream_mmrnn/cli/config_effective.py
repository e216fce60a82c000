"""The settings in effect with the origin of each, and all errors in a file of settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from stream_mmrnn.capture import sources
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.core.processes import captured


def faults(path: Path) -> list[dict[str, str]]:
    """All errors in a file: `key`, and in `says` one sentence about it.

    Raises:
        ConfigError: the file cannot be read, or is not TOML.

    """
    table = config.read(path)
    found = [{"key": key, "says": says} for key, says in config.faults(table)]
    if found:
        return found
    settings = config.parse(table)
    for key, check in (
        ("sources", lambda: sources.check_all(captured(settings).values(), settings)),
        ("engine.model", lambda: config.find_model(settings.engine.model)),
    ):
        try:
            check()
        except StreamError as e:
            found.append({"key": key, "says": f"`{key}`: {e}"})
    return found


def effective(path: Path | None) -> dict[str, dict[str, dict[str, Any]]]:
    """By section and key: `value`, and `from`: the file's name or `default`."""
    table = config.read(path) if path is not None else {}
    settings: dict[str, dict[str, Any]] = msgspec.to_builtins(config.parse(table))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in settings.pop("streams").items():
        found[f"streams.{name}"] = _values(row, table["streams"][name], path)
    return {section: _values(values, table.get(section, {}), path) for section, values in settings.items()} | found


def _values(values: dict[str, Any], given: dict[str, Any], path: Path | None) -> dict[str, dict[str, Any]]:
    """What is not set (None) is left out: TOML has no word for it."""
    return {
        key: {"value": value, "from": str(path) if key in given else "default"}
        for key, value in values.items()
        if value is not None
    }


def as_toml(values: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The same as a TOML file, with a comment for the origin of each value."""
    lines = []
    for section, keys in values.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(v['value'])}  # {_printable(v['from'])}" for key, v in keys.items()]
        lines.append("")
    return "\n".join(lines)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _toml(value: Any) -> str:
    # JSON writes numbers, booleans and strings like TOML, except one control character
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
