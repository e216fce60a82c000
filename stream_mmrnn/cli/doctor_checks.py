"""What is looked at, one function a subject, each giving findings.

What may hang or crash is asked in a process that can be killed (`probes`). Knows nothing about terminals.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec

from stream_mmrnn.capture import sources
from stream_mmrnn.cli import probes
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import SourceError, StreamError, UsageError

State = Literal["ok", "absent", "warning", "fault"]


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that was looked at."""

    name: str
    state: State
    """absent: not here, and not needed; warning: a session runs, but less well; fault: mend it first."""
    says: str
    """One sentence."""
    do: str = ""
    """What to do about it; "" where there is nothing to do."""
    facts: dict[str, Any] = {}


class Asked(msgspec.Struct, frozen=True):
    """What the checks are for."""

    settings: config.Settings
    timeout_s: float = 10.0
    """Of one probe."""


_LOW_DISK_BYTES = 5_000_000_000
_LATE_SLEEP_MS = 1.0
_ONNXRUNTIMES = ("onnxruntime-gpu", "onnxruntime")
_VERSIONS = (
    "stream-mmrnn",
    *_ONNXRUNTIMES,
    "numpy",
    "pyzmq",
    "opencv-python-headless",
    "av",
    "sounddevice",
    "mcap",
    "msgspec",
)
_CUDA_TIMES = 6
"""Loading CUDA from a cold disk takes that much longer than other probes."""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def versions(_: Asked) -> Iterator[Finding]:
    found = {name: v for name in _VERSIONS if (v := _version(name))}
    facts = {"python": platform.python_version(), "system": platform.platform(), **found}
    missing = [n for n in _VERSIONS if n not in found and n not in (*_ONNXRUNTIMES, "stream-mmrnn")]
    if missing:
        do = "install the package anew: pip install --force-reinstall stream-mmrnn"
        yield Finding("versions", "fault", f"{', '.join(missing)} is not installed", do, facts)
    else:
        yield Finding("versions", "ok", f"Python {platform.python_version()}, {len(found)} packages", facts=facts)


def onnxruntime(asked: Asked) -> Iterator[Finding]:
    """The package that runs graphs: one of two, never both."""
    both = [name for name in _ONNXRUNTIMES if _version(name)]
    if len(both) > 1:
        yield Finding(
            "onnxruntime",
            "fault",
            f"{' and '.join(both)} are installed beside each other, and each has overwritten files of the other",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one that you want",
        )
        return
    reinstall = f"pip install --force-reinstall {both[0] if both else 'onnxruntime'}"
    try:
        facts = probes.ask("onnxruntime", timeout_s=asked.timeout_s)
    except StreamError as e:
        yield Finding("onnxruntime", "fault", f"onnxruntime cannot be loaded: {e}", reinstall)
        return
    yield Finding("onnxruntime", "ok", f"onnxruntime {facts['version']}", facts=facts)
    yield from _providers(asked, facts)


def _providers(asked: Asked, facts: dict[str, Any]) -> Iterator[Finding]:
    """The session's model really run on each provider."""
    engine = asked.settings.engine
    try:
        path = config.find_model(engine.model)
    except UsageError as e:
        yield Finding("model", "fault", str(e), "name another in engine.model, or by --model")
        return
    try:
        ran = probes.ask("model", {"path": str(path), "provider": "cpu"}, asked.timeout_s)
        yield Finding("model", "ok", f"the model {ran['model']} is sound", facts={"path": str(path)})
        says = f"active: a step of {ran['model']} takes {ran['step_ms']:g} ms"
        yield Finding("provider cpu", "ok", says, facts=ran)
    except StreamError as e:
        yield Finding("model", "fault", f"the model does not run: {e}", "export it anew, or name another by --model")
        return
    wanted = engine.provider == "cuda"
    if not facts["gpu"]:
        state: State = "fault" if wanted else "absent"
        do = "set engine.provider to auto or cpu" if wanted else ""
        yield Finding("provider cuda", state, "this machine shows no NVIDIA GPU", do)
        return
    do = "pip install onnxruntime-gpu 'onnxruntime-gpu[cuda,cudnn]', or see to the NVIDIA driver"
    try:
        ran = probes.ask("model", {"path": str(path), "provider": "cuda"}, asked.timeout_s * _CUDA_TIMES)
        says = f"active: a step of {ran['model']} takes {ran['step_ms']:g} ms"
        yield Finding("provider cuda", "ok", says, facts=ran)
    except StreamError as e:
        yield Finding("provider cuda", "fault" if wanted else "warning", f"there is a GPU, and it is not used: {e}", do)


def encoders(asked: Asked) -> Iterator[Finding]:
    """Each modality's encoder, on one synthetic sample."""
    for modality in sources.MODALITIES:
        name = f"encoder {modality}"
        try:
            made = probes.ask("encoder", modality, asked.timeout_s)
        except StreamError as e:
            yield Finding(name, "fault", str(e), "install the package anew: its models are part of it")
            continue
        yield Finding(name, "ok", f"{made['origin'].split('@')[0]}: {made['size']} features", facts=made)


def bus(asked: Asked) -> Iterator[Finding]:
    try:
        took_ms = probes.ask("bus", timeout_s=asked.timeout_s)
    except StreamError as e:
        do = "see to the folder for temporary files (TMPDIR), or set bus.transport to tcp"
        yield Finding("bus", "fault", f"no message comes through a broker: {e}", do)
        return
    yield Finding("bus", "ok", f"a message comes through a broker in {took_ms:g} ms", facts={"took_ms": took_ms})


def cameras(asked: Asked) -> Iterator[Finding]:
    closed = [str(p) for p in sorted(Path("/dev").glob("video*")) if not os.access(p, os.R_OK | os.W_OK)]
    if closed:
        yield Finding("camera rights", "warning", f"{', '.join(closed)} may not be opened", _join("video"))
    try:
        found = probes.ask("cameras", timeout_s=asked.timeout_s)
    except StreamError as e:
        yield Finding("cameras", "warning", f"the cameras did not answer: {e}", "unplug them one by one")
        return
    if found:
        does = "stream-mmrnn devices --look shows their pictures"
        yield Finding("cameras", "ok", ", ".join(s for s, _ in found), does, {"found": dict(found)})
    else:
        yield Finding("cameras", "absent", "this machine has no camera that can be opened", "--vision none, or a URL")


def sound(asked: Asked) -> Iterator[Finding]:
    """PortAudio, and the microphones that it finds."""
    try:
        version = probes.ask("portaudio", timeout_s=asked.timeout_s)
    except SourceError:
        do = "apt-get install libportaudio2 (Debian, Ubuntu), or what other systems call PortAudio"
        yield Finding("portaudio", "absent", "PortAudio is not installed", do)
        yield Finding("microphones", "absent", "without PortAudio there is no microphone", "--audio none")
        return
    except StreamError as e:
        yield Finding("portaudio", "warning", f"PortAudio cannot be loaded: {e}", "install libportaudio2 anew")
        return
    yield Finding("portaudio", "ok", version)
    closed = [str(p) for p in sorted(Path("/dev/snd").glob("pcm*c")) if not os.access(p, os.R_OK | os.W_OK)]
    if closed:
        yield Finding("microphone rights", "warning", f"{', '.join(closed)} may not be opened", _join("audio"))
    try:
        found = probes.ask("microphones", timeout_s=asked.timeout_s)
    except StreamError as e:
        do = "see to the sound server (PipeWire, PulseAudio) and ask again"
        yield Finding("microphones", "warning", f"the microphones did not answer: {e}", do)
        return
    if found:
        does = "stream-mmrnn devices --look shows how loud each is"
        yield Finding("microphones", "ok", ", ".join(s for s, _ in found), does, {"found": dict(found)})
    else:
        yield Finding("microphones", "absent", "this machine has no input device for sound", "--audio none")


def _join(group: str) -> str:
    return f"sudo usermod -aG {group} $USER, then log in anew"


def clocks(asked: Asked) -> Iterator[Finding]:
    resolution_ns = time.get_clock_info("monotonic").resolution * 1e9
    says = f"the monotonic clock counts in steps of {resolution_ns:g} ns"
    fine = resolution_ns <= 1_000_000
    do = "" if fine else "stages of less than that read as 0 or one step"
    yield Finding("clock", "ok" if fine else "warning", says, do, {"resolution_ns": resolution_ns})
    try:
        over = probes.ask("sleep", timeout_s=asked.timeout_s)
        says = f"sleeps end {over['p50_ms']:g} ms late, the slowest hundredth {over['p99_ms']:g} ms"
        late = over["p50_ms"] > _LATE_SLEEP_MS
        do = "end what else uses the processor, or set supervisor.priority" if late else ""
        yield Finding("sleep", "warning" if late else "ok", says, do, over)
    except StreamError as e:
        yield Finding("sleep", "warning", f"sleeping could not be measured: {e}", "ask again on a quieter machine")
    yield _wall_clock()


class _Timex(ctypes.Structure):
    """The beginning of the kernel's `struct timex`; the rest only has to be large enough."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_long * 40),
    )


_STA_UNSYNC = 0x40


def _wall_clock() -> Finding:
    """Whether the kernel is told the time by anyone (NTP, PTP); only dates in recordings depend on it."""
    name, nobody = "wall clock", "whether the wall clock is synchronised cannot be told here"
    if sys.platform != "linux":
        return Finding(name, "absent", nobody)
    timex = _Timex()  # modes 0: nothing is set
    try:
        failed = ctypes.CDLL(None).adjtimex(ctypes.byref(timex)) < 0
    except (OSError, AttributeError):
        failed = True
    if failed:
        return Finding(name, "absent", nobody)
    facts = {"max_error_us": timex.maxerror}
    if timex.status & _STA_UNSYNC:
        do = "start an NTP client (systemd-timesyncd, chrony) if dates of recordings shall compare between machines"
        return Finding(name, "warning", "the wall clock is not synchronised; dates of recordings may be off", do, facts)
    return Finding(name, "ok", f"synchronised, at most {timex.maxerror / 1000:g} ms off", facts=facts)


def disk(asked: Asked) -> Iterator[Finding]:
    """Where recordings go, and where states are kept."""
    record = Path(asked.settings.record.path) if asked.settings.record.path else None
    yield _folder("recordings", record.parent if record else Path())
    yield _folder("state folder", config.state_folder(asked.settings.state))


def _folder(name: str, folder: Path) -> Finding:
    there = folder.expanduser().absolute()
    while not there.exists() and there != there.parent:
        there = there.parent  # it is made when it is first needed
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"?")
        free = shutil.disk_usage(there).free
    except OSError as e:
        do = "give yourself the right to write there, or name another folder"
        return Finding(name, "fault", f"{there} cannot be written: {e.strerror or e}", do)
    says, facts = f"{there} has {free / 1e9:.1f} GB free", {"folder": str(there), "free_bytes": free}
    if free < _LOW_DISK_BYTES:
        do = "make room: a full disk costs a recording what does not fit"
        return Finding(name, "warning", f"{says}, which is little", do, facts)
    return Finding(name, "ok", says, facts=facts)


def scheduling(asked: Asked) -> Iterator[Finding]:
    """Whether `supervisor.priority` would be given."""
    wanted = asked.settings.supervisor.priority
    try:
        may = probes.ask("scheduling", timeout_s=asked.timeout_s)
    except StreamError as e:
        yield Finding("scheduling", "warning", f"the rights could not be asked for: {e}")
        return
    given = [name for name in ("nice", "fifo") if may[name]]
    do = "" if len(given) == 2 else "for fifo: `@realtime - rtprio 20` and `- nice -10` in /etc/security/limits.conf"
    if wanted in may and not may[wanted]:
        says = f"supervisor.priority {wanted!r} would not be given, and the session runs as any other program"
        yield Finding("scheduling", "warning", says, do, may)
    elif given:
        yield Finding("scheduling", "ok", f"supervisor.priority may be {' or '.join(given)}", facts=may)
    else:
        yield Finding("scheduling", "absent", "this user may ask for no priority (nice, fifo)", do, may)


CHECKS: dict[str, Callable[[Asked], Iterator[Finding]]] = {
    "versions": versions,
    "onnxruntime": onnxruntime,
    "encoders": encoders,
    "bus": bus,
    "cameras": cameras,
    "sound": sound,
    "clocks": clocks,
    "disk": disk,
    "scheduling": scheduling,
}
"""In the order in which they are shown."""


def run(asked: Asked, begin: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """All checks, one after the other: what is measured is not disturbed. `begin` is told the name of each."""
    found: list[Finding] = []
    for name, check in CHECKS.items():
        begin(name)
        found += check(asked)
    return found


def document(found: list[Finding]) -> dict[str, Any]:
    """For `--json`: the findings, and how many there are in each state."""
    states = {s: sum(f.state == s for f in found) for s in ("ok", "absent", "warning", "fault")}
    return {"findings": [msgspec.to_builtins(f) for f in found], **states}
