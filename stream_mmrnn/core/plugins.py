"""Plug-ins: sources, encoders, cells, fusions and tasks that other packages register as entry points.

A package names them in its `pyproject.toml` (`[project.entry-points."stream_mmrnn.encoders"]`). They are loaded when a
setting or a recipe names them, and not before.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any, Literal

import msgspec

from stream_mmrnn.core.errors import PluginError

Group = Literal["sources", "encoders", "cells", "fusions", "tasks"]
GROUPS: tuple[Group, ...] = ("sources", "encoders", "cells", "fusions", "tasks")


class Plugin(msgspec.Struct, frozen=True):
    """One entry point of an installed package."""

    group: Group
    name: str
    package: str
    version: str
    target: str
    """`module:object`."""


def installed(group: Group) -> list[Plugin]:
    """The plug-ins of a group, sorted by name; none of them is loaded."""
    found = []
    for point in metadata.entry_points(group=f"stream_mmrnn.{group}"):
        package = point.dist
        name, version = (package.name, package.version) if package is not None else ("an unknown package", "")
        found.append(Plugin(group, point.name, name, version, point.value))
    return sorted(found, key=lambda plugin: (plugin.name, plugin.package))


def names(group: Group) -> list[str]:
    return [plugin.name for plugin in installed(group)]


def find(group: Group, name: str) -> Plugin | None:
    """The plug-in of this name.

    Raises:
        PluginError: two packages register the same name.

    """
    found = [plugin for plugin in installed(group) if plugin.name == name]
    if len(found) > 1:
        packages = " and ".join(plugin.package for plugin in found)
        raise PluginError(f"{packages} both register {group[:-1]} {name!r}; uninstall one of them")
    return found[0] if found else None


def load(plugin: Plugin) -> Any:
    """The object that a plug-in names.

    Raises:
        PluginError: its module cannot be imported, or has no such object.

    """
    point = metadata.EntryPoint(plugin.name, plugin.target, f"stream_mmrnn.{plugin.group}")
    try:
        return point.load()
    except Exception as e:  # code of another package
        raise _broken(plugin, e) from e


def call(plugin: Plugin, *arguments: Any, **options: Any) -> Any:
    """Load a plug-in and call it; raises PluginError also if it fails, except with an error of this package."""
    made = load(plugin)
    try:
        return made(*arguments, **options)
    except PluginError:
        raise
    except Exception as e:  # code of another package
        raise _broken(plugin, e) from e


def _broken(plugin: Plugin, error: Exception) -> PluginError:
    kind = plugin.group[:-1]
    reason = " ".join(str(error).split())[:200]
    return PluginError(
        f"the {kind} {plugin.name!r} of the package {plugin.package} {plugin.version} does not load: "
        f"{type(error).__name__}: {reason}; repair or uninstall the package"
    )
