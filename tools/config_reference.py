"""Writes docs/configuration.md from the types in stream_mmrnn/core/settings.py: keys, ranges, defaults and meanings.

    python -m tools.config_reference            # prints the page
    python -m tools.config_reference --write    # into docs/configuration.md

Knows nothing about what a setting does: the words are those beside the field.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

from msgspec import NODEFAULT
from msgspec import inspect as kinds

from stream_mmrnn.core.settings import Settings

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

_HEAD = """\
# Configuration

<!-- Written by `python -m tools.config_reference --write` from stream_mmrnn/core/settings.py: change it there. -->

All settings are one TOML file, named by `--config FILE` (`live`, `record`). A file holds only what differs from the
defaults below. Options of the command line win over the file. An unknown key, or a value out of its range, is an error
that names the key, and the nearest one that exists. A recording keeps every setting it was made with.

```toml
[sources]
vision = "camera:0"
text = "tcp:5555"

[align]
vision_lateness_ms = 60     # how long a tick waits for a slow frame

[record]
path = "today.mcap"
raw = false                 # features and predictions only: no picture, sound or words on disk
```
"""


def _words(text: str) -> str:
    """A docstring as one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _docs(section: type) -> dict[str, str]:
    """By field, the string under it."""
    (body,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[field.target.id] = _words(after.value.value)
    return found


def _number(value: float) -> str:
    """As it stands in TOML; a number that one would not type as a power."""
    if value == 2**63 - 1:
        return "2^63 − 1"
    return str(int(value)) if value == int(value) else f"{value:g}"


def _range(kind: kinds.IntType | kinds.FloatType) -> str:
    """`2 to 8`, or `more than 0, at most 5`."""
    most = f"at most {_number(kind.le)}" if kind.le is not None else ""
    if kind.gt is not None:
        words = f"more than {_number(kind.gt)}" + (f", {most}" if most else "")
    elif kind.ge is not None:
        words = f"{_number(kind.ge)} to {_number(kind.le)}" if kind.le is not None else f"{_number(kind.ge)} or more"
    else:
        words = most or "any"
    return words + ("" if isinstance(kind, kinds.FloatType) else ", whole")


def _kind(kind: kinds.Type, hint: Any) -> str:
    if isinstance(kind, kinds.IntType | kinds.FloatType):
        return _range(kind)
    if isinstance(kind, kinds.LiteralType):
        return ", ".join(f"`{value}`" for value in get_args(hint))  # in their own order: msgspec sorts them
    if isinstance(kind, kinds.BoolType):
        return "`true`, `false`"
    if isinstance(kind, kinds.UnionType):
        inner = [k for k in kind.types if not isinstance(k, kinds.NoneType)]
        return _kind(inner[0], hint)
    if isinstance(kind, kinds.VarTupleType):
        return f"a list of {_kind(kind.item_type, hint)}"
    if isinstance(kind, kinds.DictType):
        return f"a table, each value {_kind(kind.value_type, hint)}"
    if isinstance(kind, kinds.StrType):
        return f"text like `{kind.pattern}`" if kind.pattern else "text"
    raise TypeError(f"no words for {kind}; add them to {__name__}")


def _default(field: kinds.Field) -> str:
    if field.required:
        return "must be given"
    default = field.default if field.default_factory is NODEFAULT else field.default_factory()
    return "" if default is None else f"`{json.dumps(default)}`"


def render() -> str:
    """The page."""
    parts = [_HEAD]
    whole = kinds.type_info(Settings)
    assert isinstance(whole, kinds.StructType)
    for section in whole.fields:
        struct, name = section.type, section.encode_name
        if isinstance(struct, kinds.DictType):
            struct, name = struct.value_type, f"{name}.NAME"
        assert isinstance(struct, kinds.StructType)
        cls = struct.cls
        parts.append(f"\n## `[{name}]`\n")
        if cls.__doc__:
            parts.append(f"\n{_words(cls.__doc__)}\n")
        docs, hints = _docs(cls), get_type_hints(cls)
        parts.append("\n| key | value | default | what it does |\n| --- | --- | --- | --- |\n")
        for field in struct.fields:
            kind, default = _kind(field.type, hints[field.name]), _default(field)
            row = (f"`{field.encode_name}`", kind, default, docs.get(field.name, ""))
            parts.append(f"| {' | '.join(row)} |\n".replace("|  |", "| |"))
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(PAGE.parent.parent)}")
    page = render()
    if parser.parse_args().write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
