"""Settings from one TOML file, checked as a whole, and the folders and models that they name.

Strict: an unknown key is an error that names the nearest known one. The keys themselves are in `settings`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tempfile
from pathlib import Path
from typing import Any, get_type_hints

from stream_mmrnn.core import strict_toml
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.settings import LOOPBACK, Settings, StateSettings, StreamSettings
from stream_mmrnn.core.streams import SHORT_FORMS, is_sensor
from stream_mmrnn.core.strict_toml import convert, read_toml


def faults(table: dict[str, Any]) -> list[tuple[str, str]]:
    """All faults in a table of settings as (key, one sentence); `parse` stops at the first."""
    found = strict_toml.faults(table, Settings)
    if not found:
        try:
            parse(table)
        except ConfigError as e:
            text = str(e)
            key = re.search(r"`([^`]*)`", text)
            found.append((key.group(1) if key else "", text))
    return found


def is_loopback(host: str) -> bool:
    """Whether an address is reachable only from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_access(settings: Settings) -> None:
    """Refuse addresses that others could reach without a key or a token."""
    bus, page = settings.bus, settings.dashboard
    try:
        ipaddress.ip_address(bus.host)
    except ValueError:
        raise ConfigError(f"`bus.host` is an IP address such as {LOOPBACK}, not {bus.host!r}") from None
    if bus.transport == "ipc" and (bus.host != LOOPBACK or bus.port or bus.keys):
        raise ConfigError("`bus.host`, `bus.port` and `bus.keys` are for tcp; set bus.transport to tcp, or leave them")
    if not is_loopback(bus.host) and not bus.keys:
        raise ConfigError(
            f"`bus.host` {bus.host} can be reached by others: make keys (stream-mmrnn keys new FOLDER) and name the "
            f"folder in bus.keys, or bind {LOOPBACK}"
        )
    if not is_loopback(settings.serve.host) and not settings.serve.keys:
        raise ConfigError(
            f"`serve.host` {settings.serve.host} can be reached by others: make keys (stream-mmrnn keys new FOLDER) "
            f"and name the folder in serve.keys, or bind {LOOPBACK}"
        )
    for url in settings.cluster.url.split(",") if not settings.cluster.credentials else ():
        login, _, address = url.rpartition("//")[2].rpartition("@")
        host = re.sub(r":[0-9]*\Z", "", address.partition("/")[0]).strip("[] ")
        if host and not login and not is_loopback(host):
            raise ConfigError(
                f"`cluster.url` {host} can be reached by others: give a user and a password in it, or a credentials "
                f"file in cluster.credentials, or use a NATS server on {LOOPBACK}"
            )
    if not is_loopback(page.host) and not page.token_file:
        raise ConfigError(
            f"`dashboard.host` {page.host} can be reached by others: name a file for its token in "
            f"dashboard.token_file, or bind {LOOPBACK}"
        )
    if bool(page.cert) != bool(page.key):
        raise ConfigError("`dashboard.cert` and `dashboard.key` go together: name both files, or neither")
    named = [
        (name, row.source, row.kind or SHORT_FORMS.get(name, ("", ""))[0]) for name, row in settings.streams.items()
    ]
    named += [(name, getattr(settings.sources, name), kind) for name, (kind, _) in SHORT_FORMS.items()]
    sensor = next((name for name, source, kind in named if is_sensor(source, kind)), "")
    if sensor and not is_loopback(page.host) and not page.cert:
        raise ConfigError(
            f"`dashboard.cert` is missing: browsers on other machines give {sensor} only to a page with TLS; name a "
            f"certificate and its key in dashboard.cert and dashboard.key, or bind {LOOPBACK}"
        )


def parse(table: dict[str, Any]) -> Settings:
    """The settings of a table; raises ConfigError."""
    named, sources = table.get("streams"), table.get("sources", {})
    if named and isinstance(named, dict) and isinstance(sources, dict):
        both = [name for name in named if name in sources]
        if both:
            raise ConfigError(
                f"two streams are named `{both[0]}`: sources.{both[0]} and streams.{both[0]}; remove one of them"
            )
        table = {**table, "sources": {**dict.fromkeys(SHORT_FORMS, "none"), **sources}}
    settings = convert(table, Settings)
    if settings.engine.encoders:
        raise ConfigError(
            "`engine.encoders` is filled in from the model's contract; name encoders in streams.NAME.encoders instead"
        )
    _check_access(settings)
    return settings


def recorded(table: dict[str, Any]) -> Settings:
    """The settings in a recording, possibly of another release: keys that were removed since are ignored.

    A recording holds every setting with its value, so changed defaults do not matter.

    Raises:
        ConfigError: a value out of its range.

    """
    hints = get_type_hints(Settings)
    known = {
        section: {key: value for key, value in values.items() if key in hints[section].__struct_fields__}
        for section, values in table.items()
        if section in hints and section != "streams" and isinstance(values, dict)
    }
    streams = table.get("streams")
    known["streams"] = {
        name: {key: value for key, value in values.items() if key in StreamSettings.__struct_fields__}
        for name, values in (streams.items() if isinstance(streams, dict) else ())
        if isinstance(values, dict)
    }
    return convert(known, Settings)


def read(path: Path) -> dict[str, Any]:
    """The unchecked table of a configuration file; raises ConfigError if it is not valid TOML."""
    try:
        return read_toml(path)
    except OSError as e:
        raise ConfigError(f"the configuration {path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"the configuration {path} is not valid TOML: {e}") from e


def load(
    path: Path | None, overrides: dict[str, Any] | None = None, streams: dict[str, dict[str, Any]] | None = None
) -> Settings:
    """The settings of a TOML file, with dotted-key overrides (`{"engine.model": ...}`) on top.

    `streams`: rows that are added to its table `[streams]`.
    """
    table: dict[str, Any] = {} if path is None else read(path)
    if streams:
        table.setdefault("streams", {})
        if isinstance(table["streams"], dict):
            table["streams"] |= {name: {**table["streams"].get(name, {}), **row} for name, row in streams.items()}
    for dotted, value in (overrides or {}).items():
        if value is None:
            continue
        section, key = dotted.split(".")
        named = table.get("streams")
        if section == "sources" and isinstance(named, dict) and isinstance(named.get(key), dict):
            named[key]["source"] = value  # the option names the source of the stream that the file describes
            continue
        table.setdefault(section, {})
        if not isinstance(table[section], dict):
            raise ConfigError(f"`{section}` has a wrong value: expected a table, got {table[section]!r}")
        table[section][key] = value
    return parse(table)


def state_folder(settings: StateSettings) -> Path:
    """The folder of snapshots: from the settings, or this user's XDG state folder."""
    if settings.folder:
        return Path(settings.folder).expanduser()
    home = os.environ.get("XDG_STATE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "state") / "stream-mmrnn"


def cluster_key(settings: Settings) -> Path:
    """The file of the cluster's key."""
    cluster = settings.cluster
    return (
        Path(cluster.key).expanduser()
        if cluster.key
        else state_folder(settings.state) / f"cluster-{cluster.prefix}.key"
    )


def run_folders() -> list[Path]:
    """Possible folders for the registry of running sessions, best first: this user's run folder, and one in the
    temporary folder for users without one (services). The caller must check permissions.
    """
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    own = Path(tempfile.gettempdir()) / f"stream-mmrnn-run-{user}"
    given = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    return [given / "stream-mmrnn", own] if given.is_absolute() else [own]


def keys_folder() -> Path:
    """The default folder of `stream-mmrnn keys`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "stream-mmrnn" / "keys"


def models_folder() -> Path:
    """The zoo: beside the package in a checkout, inside it in an installed wheel."""
    inside = Path(__file__).parents[1] / "_models"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "models"


def zoo_names() -> list[str]:
    """The names of the included models."""
    return sorted(p.parent.name for p in models_folder().glob("*/step.onnx"))


def find_model(name: str) -> Path:
    """The ONNX file for the name of an included model or a path; does not check that the file is readable."""
    in_zoo = models_folder() / name / "step.onnx"
    if in_zoo.is_file():
        return in_zoo
    if "/" in name or "\\" in name or name.endswith(".onnx"):
        return Path(name)
    zoo = ", ".join(zoo_names()) or "none"
    raise ConfigError(f"there is no model {name!r}; give an ONNX file's path, or one of {zoo}")
