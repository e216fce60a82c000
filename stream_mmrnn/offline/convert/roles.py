"""Roles: what a stream of another program's file becomes. Knows nothing about files.

A role is a usual stream's name (`audio`), `label`, `none`, or a name and a kind of its own (`wrist:signal`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import cast

from stream_mmrnn.core import topics
from stream_mmrnn.core.streams import SHORT_FORMS, Kind, Stream


def kind_of(role: str) -> str:
    name, is_named, kind = role.partition(":")
    return kind if is_named else SHORT_FORMS[name][0] if name in SHORT_FORMS else name


def is_role(role: str, roles: Collection[str], kinds: Collection[str]) -> bool:
    """Whether it is one of `roles`, or a name with one of `kinds`."""
    name, is_named, kind = role.partition(":")
    return role in roles if not is_named else re.match(topics.STREAM_NAME, name) is not None and kind in kinds


def stream_of(role: str) -> Stream:
    name, is_named, _ = role.partition(":")
    return Stream.of(name, cast(Kind, kind_of(role))) if is_named else Stream.of(name)


def own_name(name: str, number: int, taken: Collection[str], kind: str) -> str:
    """A role for one of several of a kind: its name in its file, as far as a stream may have it."""
    made = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-")[:28] or kind
    return f"{made if made not in taken else f'{made}_{number}'}:{kind}"
