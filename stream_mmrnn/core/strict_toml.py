"""Strict conversion of TOML tables to typed values: an unknown key is an error that names the nearest one.

Knows nothing about which settings there are; settings, recipes and contracts of models are read by it.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from stream_mmrnn.core.errors import ConfigError

_MAX_TOML_BYTES = 2**20


def _nearest(unknown: str, known: list[str]) -> str:
    close = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    return f"the nearest is `{close[0]}`" if close else f"the keys there are {', '.join(known)}"


def _unknown_keys(value: Any, kind: Any, where: str) -> Iterator[tuple[str, str]]:
    """(key, error message) of each unknown key, also in nested tables and lists of tables."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if not isinstance(value, dict):
            return
        hints, fields = get_type_hints(kind), list(kind.__struct_fields__)
        for key, inner in value.items():
            full = f"{where}.{key}" if where else key
            if key not in fields:
                yield full, f"unknown key `{full}`: {_nearest(key, fields)}"
            else:
                yield from _unknown_keys(inner, hints[key], full)
    elif get_origin(kind) is dict and isinstance(value, dict):
        for key, inner in value.items():
            yield from _unknown_keys(inner, get_args(kind)[1], f"{where}.{key}")
    elif get_origin(kind) is tuple and isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _unknown_keys(inner, get_args(kind)[0], f"{where}[{i}]")


def _required(kind: type[msgspec.Struct]) -> list[str]:
    return [f.name for f in msgspec.structs.fields(kind) if f.required]


def _wrong_values(value: Any, kind: Any, where: str) -> Iterator[tuple[str, str]]:
    """(key, error message) of each invalid value; unknown keys are skipped."""
    if where and isinstance(kind, type) and issubclass(kind, msgspec.Struct) and not isinstance(value, dict):
        yield where, f"`{where}` has a wrong value: expected a table, got {value!r}"
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = get_type_hints(kind, include_extras=True)
        for key, inner in value.items():
            if key in kind.__struct_fields__:
                yield from _wrong_values(inner, hints[key], f"{where}.{key}" if where else key)
        missing = [k for k in _required(kind) if k not in value]
        if where and missing:
            yield f"{where}.{missing[0]}", f"`{where}.{missing[0]}` is missing; give it"
    elif get_origin(kind) is dict and isinstance(value, dict):
        for key, inner in value.items():
            yield from _wrong_values(inner, get_args(kind)[1], f"{where}.{key}")
    else:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as e:
            yield where, _wrong(e, where)


def faults(table: dict[str, Any], kind: type[msgspec.Struct]) -> list[tuple[str, str]]:
    """All faults in a table of this kind as (key, one sentence); `convert` stops at the first."""
    return [*_unknown_keys(table, kind, ""), *_wrong_values(table, kind, "")]


_Kind = TypeVar("_Kind", bound=msgspec.Struct)


def convert(table: dict[str, Any], kind: type[_Kind]) -> _Kind:
    """Convert a TOML table to a typed value.

    Raises:
        ConfigError: an unknown key (with the nearest known one) or an invalid value.

    """
    for _, says in _unknown_keys(table, kind, ""):
        raise ConfigError(says)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as e:
        for _, says in _wrong_values(table, kind, ""):  # it knows the names in tables of tables
            raise ConfigError(says) from e
        raise ConfigError(_wrong(e)) from e


def _wrong(error: msgspec.ValidationError, where: str = "") -> str:
    """The error as one sentence with the key's path; `where` is the path of the converted value."""
    text = str(error)
    inside = re.search(r"`\$\.?([^`]*)`", text)
    key = (where + (inside.group(1) if inside else "")) or "the file"
    reason = text.split(" - at")[0].replace("Expected", "expected")
    return f"`{key}` has a wrong value: {reason}"


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a TOML file.

    Raises:
        OSError: it cannot be read.
        ValueError, RecursionError: it is not valid TOML, too long, or nested too deep.

    """
    with path.open("rb") as file:
        text = file.read(_MAX_TOML_BYTES + 1)
    if len(text) > _MAX_TOML_BYTES:
        raise ValueError(f"it has more than {_MAX_TOML_BYTES} bytes")
    return tomllib.loads(text.decode())
