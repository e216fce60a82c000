"""The settings as JSON Schema, for editors and programs; generated from the types and docstrings in `settings`."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import msgspec

from stream_mmrnn.core import settings
from stream_mmrnn.core.settings import Settings

DIALECT = "http://json-schema.org/draft-07/schema#"
"""The dialect with the best support in TOML editors. Only an identifier; it is never fetched."""


def schema() -> dict[str, Any]:
    """JSON Schema of the TOML file, with defaults and descriptions."""
    (_,), parts = msgspec.json.schema_components([Settings], ref_template="{name}")
    described = _docstrings(inspect.getsource(settings))
    sections = {name: _section(part, described.get(name, {})) for name, part in parts.items()}
    top = sections.pop("Settings")
    tables = {key: _table(kind, sections) for key, kind in top["properties"].items()}
    return {"$schema": DIALECT, **top, "title": "stream-mmrnn settings", "properties": tables}


def _table(kind: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """A section, or a table of sections by name; msgspec writes references with or without `allOf`."""
    if "additionalProperties" in kind:
        return {"type": "object", "additionalProperties": _table(kind["additionalProperties"], sections)}
    found: dict[str, Any] = sections[kind["allOf"][0]["$ref"] if "allOf" in kind else kind["$ref"]]
    return found


def _section(part: dict[str, Any], described: dict[str, str]) -> dict[str, Any]:
    properties = {key: _portable(value) for key, value in part["properties"].items()}
    for key, text in described.items():
        if key in properties:
            properties[key]["description"] = text
    clean = {k: v for k, v in part.items() if v or k != "required"}
    if "description" in clean:
        clean["description"] = " ".join(clean["description"].split())
    return {**clean, "properties": properties, "additionalProperties": False}


def _portable(value: dict[str, Any]) -> dict[str, Any]:
    """Replace Python's regex anchors by the portable ones."""
    if "items" in value:
        return {**value, "items": _portable(value["items"]), "default": list(value["default"])}
    if "pattern" in value:
        return {**value, "pattern": value["pattern"].replace("\\A", "^").replace("\\Z", "$")}
    return dict(value)


def _docstrings(source: str) -> dict[str, dict[str, str]]:
    """Docstrings under fields, by class and field, each in one line."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        field = ""
        for line in node.body:
            text = _text(line)
            if text and field:
                found.setdefault(node.name, {})[field] = " ".join(text.split())
            is_field = isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            field = line.target.id if is_field else ""  # type: ignore[attr-defined]
    return found


def _text(line: ast.stmt) -> str:
    if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str):
        return line.value.value
    return ""
