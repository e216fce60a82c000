"""One TOML file -> typed settings: the only home of defaults.

Strict: an unknown key is an error that names the nearest one that exists. Knows nothing about what the settings do.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.topics import MODALITIES, SESSION_NAME, Kind

_MAX_TOML_BYTES = 2**20
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]

Policy = Literal["latest", "drop_oldest", "block"]


LOOPBACK = "127.0.0.1"


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Session(_Section, frozen=True):
    name: Annotated[str, msgspec.Meta(pattern=SESSION_NAME)] = "live"


class Sources(_Section, frozen=True):
    """Where each modality comes from: `camera:0`, `camera:URL`, `microphone`, `microphone:NAME`, `file:PATH`,
    `synthetic`, `stdin`, `pipe:PATH`, `tcp:PORT`, `zmq:PORT`, `lsl:NAME`, `page` (what is typed on the live page, which
    joins every other source of text, too) or `none`. The first three are of the person that a session is about,
    `other_*` of a second one: a voice agent, the other party of a call. `signal` is a sensor.
    """

    vision: str = "camera:0"
    audio: str = "microphone"
    text: str = "stdin"
    other_audio: str = "none"
    other_text: str = "none"
    signal: str = "none"


class Camera(_Section, frozen=True):
    width: Annotated[int, msgspec.Meta(ge=16, le=8192)] = 640
    height: Annotated[int, msgspec.Meta(ge=16, le=8192)] = 480
    rate_hz: _Positive = 30.0
    jpeg_quality: Annotated[int, msgspec.Meta(ge=1, le=100)] = 90


class Microphone(_Section, frozen=True):
    block_ms: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 20.0
    latency_ms: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 20.0
    """What PortAudio is asked for; at 100 ms blocks come in pairs on some systems."""
    drift_bandwidth_hz: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.1


class Text(_Section, frozen=True):
    max_line_bytes: Annotated[int, msgspec.Meta(ge=16, le=65536)] = 4096


class Synthetic(_Section, frozen=True):
    """The seeded source that needs no hardware: a person who talks in turns, seen, heard and read."""

    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    width: Annotated[int, msgspec.Meta(ge=16, le=4096)] = 320
    height: Annotated[int, msgspec.Meta(ge=16, le=4096)] = 240
    rate_hz: _Positive = 25.0
    jitter_ms: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.0
    """Standard deviation of how late a sample comes; its event time is right."""
    drop: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Share of samples that never come."""
    freeze_every_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    """0: never. Else each stream stops this often, for `freeze_s`."""
    freeze_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 1.0


class Align(_Section, frozen=True):
    """The lateness of a kind holds for all modalities of it: `audio` for `other_audio`, too."""

    vision_lateness_ms: Annotated[float, msgspec.Meta(ge=0, le=60_000)] = 80.0
    audio_lateness_ms: Annotated[float, msgspec.Meta(ge=0, le=60_000)] = 80.0
    text_lateness_ms: Annotated[float, msgspec.Meta(ge=0, le=60_000)] = 0.0
    signal_lateness_ms: Annotated[float, msgspec.Meta(ge=0, le=60_000)] = 80.0
    max_ahead_ms: Annotated[float, msgspec.Meta(gt=0, le=3_600_000)] = 500.0
    """A stamp further ahead of the clock is quarantined."""
    max_behind_ms: Annotated[float, msgspec.Meta(gt=0, le=3_600_000)] = 10_000.0

    def lateness_ns(self) -> dict[str, int]:
        """By modality."""
        by_kind: dict[Kind, float] = {
            "vision": self.vision_lateness_ms,
            "audio": self.audio_lateness_ms,
            "text": self.text_lateness_ms,
            "signal": self.signal_lateness_ms,
        }
        return {name: round(by_kind[m.kind] * 1e6) for name, m in MODALITIES.items()}


class Engine(_Section, frozen=True):
    model: str = "turn_taking"
    """A name in the zoo, or the path of an ONNX file."""
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    slots: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 1
    batch: Annotated[int, msgspec.Meta(ge=0, le=16384)] = 0
    """The most sessions of one run; 0: 64 on the CPU, 4096 on a GPU, and less where a run would take too long."""
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Over how many processes the slots are spread, where one core is not enough."""
    prewarm: bool = True
    """Run the graph (and the sound's encoder) on dummy data just before it is due, so that caches are warm."""


class State(_Section, frozen=True):
    """What is kept of sessions on disk, so that they can go on after a pause, a crash or on another engine."""

    folder: str = ""
    """"" is a folder of this user's own: `state_folder`."""
    ttl_s: _Positive = 86_400.0
    """How long a state waits for its session to come back."""
    idle_s: _Positive = 300.0
    """A session without a tick for so long gives its slot to others; a resume token brings it back."""
    snapshot_every: Annotated[int, msgspec.Meta(ge=0)] = 25
    """Ticks of a session from one snapshot to the next; 0: none but on leaving."""
    journal_s: _Positive = 30.0
    """How much of the bus is remembered for an engine that has to go on after a crash."""
    journal_mb: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64


class Admission(_Section, frozen=True):
    """When one session more is refused, though there is a slot."""

    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    """Share of the tick that the p99 of a prediction may take with one more session. Half, because shared machines were
    seen to step at half their speed for seconds."""
    retry_s: _Positive = 1.0
    """The soonest that one who was refused is told to ask again, ..."""
    retry_max_s: _Positive = 30.0
    """... and the latest."""


class Serve(_Section, frozen=True):
    """A server of sessions for other programs: `stream-mmrnn serve`."""

    host: str = LOOPBACK
    """The address that it binds; one that others can reach needs `keys`."""
    port: _Port = 7701
    """0: any free one."""
    keys: str = ""
    """A folder made by `stream-mmrnn keys new`: with it, only clients whose key may write can connect."""
    slots: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 1024
    """Sessions at most; `admission` lets in no more than can be served in time."""
    queue: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 256
    """Ticks of one session that may wait for their step. A client may leave as many messages unread, and two more for
    each of `slots`."""


class Cluster(_Section, frozen=True):
    """Engines of many machines over NATS with JetStream: `stream-mmrnn serve --cluster URL` (extra `cluster`)."""

    url: str = ""
    """nats://HOST:PORT, several separated by commas; "" serves alone."""
    prefix: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{1,32}\Z")] = "mmrnn"
    """Of all that the cluster has on that server; another prefix is another cluster."""
    credentials: str = ""
    """A credentials file of NATS's, where the server asks for one."""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1
    """Of logs and states, over the servers of NATS's own cluster."""
    disk_mb: Annotated[int, msgspec.Meta(ge=16, le=1_048_576)] = 1024
    """Of each of the two logs, at most; the oldest goes first."""


class Record(_Section, frozen=True):
    path: str = ""
    """"" records nothing."""
    raw: bool = True
    """false: features, ticks and predictions only, no picture, sound or words."""
    chunk_ms: Annotated[float, msgspec.Meta(gt=0, le=10_000)] = 250.0
    fsync_ms: Annotated[float, msgspec.Meta(gt=0, le=60_000)] = 1000.0
    queue_mb: Annotated[float, msgspec.Meta(gt=0, le=65_536)] = 64.0
    """Memory for what waits while the disk is slow or full."""
    policy: Literal["drop_oldest", "block"] = "drop_oldest"
    """When that is used up. drop_oldest: raw pictures, sound and words go first, so that the rest still replays; what
    goes is counted in the file. block: nothing goes here, but the bus's queue overflows after `bus.queue` messages."""


class Bus(_Section, frozen=True):
    transport: Literal["ipc", "tcp"] = "ipc"
    """ipc: sockets in a private folder; tcp: for systems without ipc, and for readers on other machines."""
    host: str = LOOPBACK
    """The address that tcp binds; one that others can reach needs `keys`."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65_532)] = 0
    """The first of the four ports that tcp takes, one after the other; 0: any free ones."""
    keys: str = ""
    """A folder made by `stream-mmrnn keys new`: with it, only clients with an allowed key can connect over tcp."""
    clock_hz: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 100.0
    queue: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] = 20_000
    """Messages a reader may fall behind before ZeroMQ drops; a reader counts every gap."""
    bulk_queue: Annotated[int, msgspec.Meta(ge=1)] = 2048
    """The same for a reader (or sender) of pictures and sound, whose messages are large."""
    view_queue: Annotated[int, msgspec.Meta(ge=1)] = 256
    """The same for one that wants the newest: a page, a reader from outside."""


class Queues(_Section, frozen=True):
    """Between a device and its encoder, by kind; `latest` keeps one, `drop_oldest` keeps the newest `length`."""

    vision: Policy = "latest"
    audio: Policy = "drop_oldest"
    text: Policy = "block"
    signal: Policy = "block"
    """The library of Lab Streaming Layer keeps what waits, for a minute."""
    length: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 64

    def policy(self, modality: str) -> Policy:
        by_kind: dict[Kind, Policy] = {
            "vision": self.vision,
            "audio": self.audio,
            "text": self.text,
            "signal": self.signal,
        }
        return by_kind[MODALITIES[modality].kind]


class Dashboard(_Section, frozen=True):
    enabled: bool = True
    host: str = LOOPBACK
    """The address that the page binds; one that others can reach needs a token."""
    port: _Port = 0
    """0: any free one."""
    token_file: str = ""
    """Where the page's token is; made, and shown once, where there is none. With it, the page asks for the token."""


class Foxglove(_Section, frozen=True):
    """A server of what is on the bus for Foxglove, on loopback."""

    enabled: bool = False
    port: _Port = 8765
    """0: any free one."""


class Lsl(_Section, frozen=True):
    """Lab Streaming Layer: `lsl:NAME` as a source, predictions as a stream."""

    outlet: bool = False
    """Give the predictions out as a stream. Its library listens on all addresses of this machine and asks for no
    key; only whom it lets find the stream is a matter of `config`."""
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] = "stream_mmrnn"
    """Of that stream."""
    config: str = ""
    """The library's configuration file (lsl_api.cfg); "": streams are found on this machine alone."""


class Supervisor(_Section, frozen=True):
    priority: Literal["normal", "nice", "fifo"] = "normal"
    """Of the processes between a sample and its prediction (not recorder and page): nice is -10, fifo the real-time
    class SCHED_FIFO. Both want the right to it; without it the session runs as usual, and says so."""
    backoff_s: _Positive = 0.25
    """Before the first restart; doubles up to `backoff_max_s`."""
    backoff_max_s: _Positive = 1.0
    max_restarts: Annotated[int, msgspec.Meta(ge=0)] = 20
    """Of one process in `restart_window_s`; one that dies once more is given up, and the session goes on without it,
    or ends where it cannot (broker, clock, engine)."""
    restart_window_s: _Positive = 60.0
    reopen_s: _Positive = 0.5
    """How often a device that is not there is asked for again."""
    start_timeout_s: _Positive = 20.0


class Log(_Section, frozen=True):
    """What a session says while it runs, on standard error."""

    format: Literal["text", "json"] = "text"
    """json: one object a line, for programs; there is no view in the terminal then."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """What is less bad is not said."""


class Trace(_Section, frozen=True):
    """Predictions as OpenTelemetry traces (extra `otel`)."""

    ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """The share of predictions that become traces; 0: none, and no process for it."""
    endpoint: str = f"http://{LOOPBACK}:4318/v1/traces"
    """Where a collector takes OTLP over HTTP. Elsewhere than here the spans, with names of sessions, go over the
    network."""


class Settings(_Section, frozen=True):
    """Everything that can be set; each section is a table of the TOML file."""

    session: Session = Session()
    sources: Sources = Sources()
    camera: Camera = Camera()
    microphone: Microphone = Microphone()
    text: Text = Text()
    synthetic: Synthetic = Synthetic()
    align: Align = Align()
    engine: Engine = Engine()
    state: State = State()
    admission: Admission = Admission()
    serve: Serve = Serve()
    cluster: Cluster = Cluster()
    record: Record = Record()
    bus: Bus = Bus()
    queues: Queues = Queues()
    dashboard: Dashboard = Dashboard()
    foxglove: Foxglove = Foxglove()
    lsl: Lsl = Lsl()
    supervisor: Supervisor = Supervisor()
    log: Log = Log()
    trace: Trace = Trace()


def _nearest(unknown: str, known: list[str]) -> str:
    close = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    return f"the nearest is `{close[0]}`" if close else f"the keys there are {', '.join(known)}"


def _unknown_keys(value: Any, kind: Any, where: str) -> Iterator[tuple[str, str]]:
    """Each unknown key and what is to be said of it, however deep: in tables, tables of tables and lists of tables."""
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


def _wrong_values(value: Any, kind: Any, where: str) -> Iterator[tuple[str, str]]:
    """Each value that its key does not take and what is to be said of it; unknown keys are passed over."""
    if where and isinstance(kind, type) and issubclass(kind, msgspec.Struct) and not isinstance(value, dict):
        yield where, f"`{where}` has a wrong value: expected a table, got {value!r}"
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = get_type_hints(kind, include_extras=True)
        for key, inner in value.items():
            if key in kind.__struct_fields__:
                yield from _wrong_values(inner, hints[key], f"{where}.{key}" if where else key)
    else:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as e:
            yield where, _wrong(e, where)


def faults(table: dict[str, Any]) -> list[tuple[str, str]]:
    """All that is wrong with a table of settings, where `parse` stops at the first: (key, one sentence) each."""
    found = [*_unknown_keys(table, Settings, ""), *_wrong_values(table, Settings, "")]
    if not found:
        try:
            parse(table)
        except ConfigError as e:
            text = str(e)
            key = re.search(r"`([^`]*)`", text)
            found.append((key.group(1) if key else "", text))
    return found


_Kind = TypeVar("_Kind", bound=msgspec.Struct)


def convert(table: dict[str, Any], kind: type[_Kind]) -> _Kind:
    """A typed value of a table as TOML gives it.

    Raises:
        ConfigError: an unknown key (with the nearest known one) or a value out of its range.

    """
    for _, says in _unknown_keys(table, kind, ""):
        raise ConfigError(says)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as e:
        raise ConfigError(_wrong(e)) from e


def _wrong(error: msgspec.ValidationError, where: str = "") -> str:
    """One sentence, with the key's path; `where` is the path of what was converted."""
    text = str(error)
    inside = re.search(r"`\$\.?([^`]*)`", text)
    key = (where + (inside.group(1) if inside else "")) or "the file"
    reason = text.split(" - at")[0].replace("Expected", "expected")
    return f"`{key}` has a wrong value: {reason}"


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a TOML file.

    Raises:
        OSError: it cannot be read.
        ValueError, RecursionError: it is no TOML, or too long or too deep to be a file that a person wrote.

    """
    with path.open("rb") as file:
        text = file.read(_MAX_TOML_BYTES + 1)
    if len(text) > _MAX_TOML_BYTES:
        raise ValueError(f"it has more than {_MAX_TOML_BYTES} bytes")
    return tomllib.loads(text.decode())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_access(settings: Settings) -> None:
    """Refuse what others could reach without a key or a token."""
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
    if not is_loopback(page.host) and not page.token_file:
        raise ConfigError(
            f"`dashboard.host` {page.host} can be reached by others: name a file for its token in "
            f"dashboard.token_file, or bind {LOOPBACK}"
        )


def parse(table: dict[str, Any]) -> Settings:
    """The settings of a table; raises ConfigError."""
    settings = convert(table, Settings)
    _check_access(settings)
    return settings


def recorded(table: dict[str, Any]) -> Settings:
    """The settings in a recording, which another release may have made: keys that are gone since are passed over.

    A recording holds every setting with its value, so a default that has changed since does not matter.

    Raises:
        ConfigError: a value out of its range.

    """
    hints = get_type_hints(Settings)
    known = {
        section: {key: value for key, value in values.items() if key in hints[section].__struct_fields__}
        for section, values in table.items()
        if section in hints and isinstance(values, dict)
    }
    return convert(known, Settings)


def read(path: Path) -> dict[str, Any]:
    """The table of a configuration, whatever is in it; raises ConfigError where it is no TOML."""
    try:
        return read_toml(path)
    except OSError as e:
        raise ConfigError(f"the configuration {path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"the configuration {path} is not valid TOML: {e}") from e


def load(path: Path | None, overrides: dict[str, Any] | None = None) -> Settings:
    """The settings of a TOML file, with dotted-key overrides (`{"engine.model": ...}`) on top."""
    table: dict[str, Any] = {} if path is None else read(path)
    for dotted, value in (overrides or {}).items():
        if value is None:
            continue
        section, key = dotted.split(".")
        table.setdefault(section, {})
        if not isinstance(table[section], dict):
            raise ConfigError(f"`{section}` has a wrong value: expected a table, got {table[section]!r}")
        table[section][key] = value
    return parse(table)


def state_folder(settings: State) -> Path:
    """Where states are kept: as asked, or where this user's programs keep theirs."""
    if settings.folder:
        return Path(settings.folder).expanduser()
    home = os.environ.get("XDG_STATE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "state") / "stream-mmrnn"


def run_folders() -> list[Path]:
    """Where it may be said what is running, the best first: this user's run folder, and one in the temporary folder
    for who has none (a service, a shell without a login). Whether one is fit for it is the caller's to see.
    """
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    own = Path(tempfile.gettempdir()) / f"stream-mmrnn-run-{user}"
    given = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    return [given / "stream-mmrnn", own] if given.is_absolute() else [own]


def keys_folder() -> Path:
    """Where `stream-mmrnn keys` works unless it is told otherwise."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "stream-mmrnn" / "keys"


def models_folder() -> Path:
    """The zoo: beside the package in a checkout, inside it in an installed wheel."""
    inside = Path(__file__).parents[1] / "_models"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "models"


def zoo_names() -> list[str]:
    """The models that have a name of their own."""
    return sorted(p.parent.name for p in models_folder().glob("*/step.onnx"))


def find_model(name: str) -> Path:
    """The ONNX file of a zoo name or a path; whether it can be read is the loader's to say."""
    in_zoo = models_folder() / name / "step.onnx"
    if in_zoo.is_file():
        return in_zoo
    if "/" in name or "\\" in name or name.endswith(".onnx"):
        return Path(name)
    zoo = ", ".join(zoo_names()) or "none"
    raise ConfigError(f"there is no model {name!r}; give an ONNX file's path, or one of {zoo}")
