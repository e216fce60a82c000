"""The checks of `doctor`, one function per subject, each yielding findings.

Calls that may hang or crash are made in a process that can be killed (`probes`). Knows nothing about terminals.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec

from stream_mmrnn.cli import probes
from stream_mmrnn.core import config, distribution, plugins
from stream_mmrnn.core.errors import SourceError, StreamError, UsageError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import chosen_encoders, for_model
from stream_mmrnn.core.streams import FURTHER_ENCODERS
from stream_mmrnn.core.types import ModalitySpec

State = Literal["ok", "absent", "warning", "fault"]


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result of one check."""

    name: str
    state: State
    """absent: missing, but not needed; warning: a session runs, but less well; fault: fix it first."""
    says: str
    """One sentence."""
    do: str = ""
    """What to do about it; "" for nothing."""
    facts: dict[str, Any] = {}


class Request(msgspec.Struct, frozen=True):
    """What to check for."""

    settings: Settings
    timeout_s: float = 10.0
    """Of each probe."""


_LOW_DISK_BYTES = 5_000_000_000
_LATE_SLEEP_MS = 1.0
_CUDA_TIMES = 6
"""Factor of the timeout for CUDA, which takes long to load from a cold disk."""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _needed() -> list[str]:
    """What the installed program depends on, without extras and ONNX Runtime, which has a check of its own."""
    try:
        requirements = metadata.requires(distribution.FULL) or []
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return ["numpy", "msgspec", "pyzmq"]
    names = [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in requirements if "extra ==" not in r]
    return [name for name in names if not name.startswith("onnxruntime")]


def versions(_: Request) -> Iterator[Finding]:
    needed = _needed()
    found = {name: v for name in (distribution.FULL, *needed) if (v := _version(name))}
    facts = {"python": platform.python_version(), "system": platform.platform(), **found}
    if missing := [name for name in needed if name not in found]:
        # not the program again with all that it depends on: that may overwrite another onnxruntime
        do = f"pip install {' '.join(missing)}"
        yield Finding("versions", "fault", f"not installed: {', '.join(missing)}", do, facts)
    else:
        yield Finding("versions", "ok", f"Python {platform.python_version()}, {len(found)} packages", facts=facts)
    if _version(distribution.FULL) and _version(distribution.CLIENT):
        yield Finding("distributions", "fault", distribution.BOTH, distribution.REMEDY)


def onnxruntime(request: Request) -> Iterator[Finding]:
    """The package that runs graphs; several distributions install it, and only one may be installed."""
    names = sorted(set(metadata.packages_distributions().get("onnxruntime", ())))
    from_ = " and ".join(f"{name} {_version(name)}" for name in names)
    if len(names) > 1:
        yield Finding(
            "onnxruntime",
            "fault",
            f"{from_} are installed together, and each has overwritten files of the other",
            f"pip uninstall -y {' '.join(names)}, then install the one that you want",
        )
        return
    reinstall = f"pip install --force-reinstall --no-deps {names[0] if names else 'onnxruntime'}"
    try:
        facts = probes.ask("onnxruntime", timeout_s=request.timeout_s)
    except StreamError as e:
        yield Finding("onnxruntime", "fault", f"onnxruntime cannot be loaded: {e}", reinstall)
        return
    says = from_ or f"version {facts['version']}, of no distribution that pip knows"
    yield Finding("onnxruntime", "ok", says, facts={"distribution": "".join(names), **facts})
    yield from _providers(request, facts)


def _providers(request: Request, facts: dict[str, Any]) -> Iterator[Finding]:
    """Run the session's model on each provider."""
    engine = request.settings.engine
    try:
        path = config.find_model(engine.model)
    except UsageError as e:
        yield Finding("model", "fault", str(e), "name another in engine.model, or with --model")
        return
    try:
        ran = probes.ask("model", {"path": str(path), "provider": "cpu"}, request.timeout_s)
        asked = ran.pop("modalities")
        yield Finding("model", "ok", f"the model {ran['model']} runs", facts={"path": str(path)})
        says = f"active: a step of {ran['model']} takes {ran['step_ms']:g} ms"
        yield Finding("provider cpu", "ok", says, facts=ran)
        yield _stream_encoders(request.settings, msgspec.convert(asked, list[ModalitySpec]))
    except StreamError as e:
        yield Finding("model", "fault", f"the model does not run: {e}", "export it again, or name another with --model")
        return
    wanted = engine.provider == "cuda"
    if not facts["gpu"]:
        state: State = "fault" if wanted else "absent"
        do = "set engine.provider to auto or cpu" if wanted else ""
        yield Finding("provider cuda", state, "this machine has no NVIDIA GPU", do)
        return
    do = "pip install onnxruntime-gpu 'onnxruntime-gpu[cuda,cudnn]', or check the NVIDIA driver"
    try:
        ran = probes.ask("model", {"path": str(path), "provider": "cuda"}, request.timeout_s * _CUDA_TIMES)
        del ran["modalities"]
        says = f"active: a step of {ran['model']} takes {ran['step_ms']:g} ms"
        yield Finding("provider cuda", "ok", says, facts=ran)
    except StreamError as e:
        yield Finding(
            "provider cuda", "fault" if wanted else "warning", f"there is a GPU, but it cannot be used: {e}", do
        )


def _stream_encoders(settings: Settings, modalities: list[ModalitySpec]) -> Finding:
    """Which encoders the session's streams have, and why."""
    name = "stream encoders"
    try:
        chosen = chosen_encoders(for_model(settings, modalities))
    except StreamError as e:
        return Finding(name, "fault", str(e), "correct the configuration: stream-mmrnn config check FILE")
    says = "; ".join(f"{stream}: {', '.join(c.encoders)} ({c.why})" for stream, c in chosen.items())
    return Finding(name, "ok", says or "no stream has a source", facts=msgspec.to_builtins(chosen))


def encoders(request: Request) -> Iterator[Finding]:
    """Run each of the package's encoders on synthetic samples."""
    for encoder in ("vision", "audio", "text", *FURTHER_ENCODERS):
        name = f"encoder {encoder}"
        try:
            made = probes.ask("encoder", encoder, request.timeout_s)
        except StreamError as e:
            yield Finding(name, "fault", str(e), "reinstall the package: its models are part of it")
            continue
        yield Finding(name, "ok", f"{made['origin'].split('@')[0]}: {made['size']} features", facts=made)


def plug_ins(request: Request) -> Iterator[Finding]:
    """Load each source, encoder, cell, fusion and task of other packages."""
    found = [plugin for group in plugins.GROUPS for plugin in plugins.installed(group)]
    if not found:
        yield Finding("plug-ins", "ok", "no package adds sources, encoders, cells, fusions or tasks")
    for plugin in found:
        name, facts = f"{plugin.group[:-1]} {plugin.name}", msgspec.to_builtins(plugin)
        try:
            probes.ask("plugin", facts, request.timeout_s)
        except StreamError as e:
            yield Finding(
                name, "fault", str(e), f"pip uninstall {plugin.package}, or install a version that works", facts
            )
            continue
        yield Finding(name, "ok", f"{plugin.package} {plugin.version}", facts=facts)


def bus(request: Request) -> Iterator[Finding]:
    try:
        took_ms = probes.ask("bus", timeout_s=request.timeout_s)
    except StreamError as e:
        do = "check the folder for temporary files (TMPDIR), or set bus.transport to tcp"
        yield Finding("bus", "fault", f"no message passes the broker: {e}", do)
        return
    yield Finding("bus", "ok", f"a message passes the broker in {took_ms:g} ms", facts={"took_ms": took_ms})


def cameras(request: Request) -> Iterator[Finding]:
    closed = [str(p) for p in sorted(Path("/dev").glob("video*")) if not os.access(p, os.R_OK | os.W_OK)]
    if closed:
        yield Finding("camera rights", "warning", f"no permission to open {', '.join(closed)}", _join("video"))
    try:
        found = probes.ask("cameras", timeout_s=request.timeout_s)
    except StreamError as e:
        yield Finding(
            "cameras",
            "warning",
            f"the cameras did not answer: {e}",
            "unplug them one by one to find the one that hangs",
        )
        return
    if found:
        do = "stream-mmrnn devices --look shows their pictures"
        yield Finding("cameras", "ok", ", ".join(s for s, _ in found), do, {"found": dict(found)})
    else:
        yield Finding(
            "cameras", "absent", "this machine has no camera that can be opened", "use --vision none, or a URL"
        )


def sound(request: Request) -> Iterator[Finding]:
    """PortAudio and its microphones."""
    try:
        version = probes.ask("portaudio", timeout_s=request.timeout_s)
    except SourceError:
        do = "install PortAudio, on Debian and Ubuntu: apt-get install libportaudio2"
        yield Finding("portaudio", "absent", "PortAudio is not installed", do)
        yield Finding("microphones", "absent", "microphones need PortAudio", "use --audio none")
        return
    except StreamError as e:
        yield Finding("portaudio", "warning", f"PortAudio cannot be loaded: {e}", "reinstall libportaudio2")
        return
    yield Finding("portaudio", "ok", version)
    closed = [str(p) for p in sorted(Path("/dev/snd").glob("pcm*c")) if not os.access(p, os.R_OK | os.W_OK)]
    if closed:
        yield Finding("microphone rights", "warning", f"no permission to open {', '.join(closed)}", _join("audio"))
    try:
        found = probes.ask("microphones", timeout_s=request.timeout_s)
    except StreamError as e:
        do = "check the sound server (PipeWire, PulseAudio) and try again"
        yield Finding("microphones", "warning", f"the microphones did not answer: {e}", do)
        return
    if found:
        do = "stream-mmrnn devices --look shows how loud each is"
        yield Finding("microphones", "ok", ", ".join(s for s, _ in found), do, {"found": dict(found)})
    else:
        yield Finding("microphones", "absent", "this machine has no input device for sound", "use --audio none")


def _join(group: str) -> str:
    return f"sudo usermod -aG {group} $USER, then log in again"


def clocks(request: Request) -> Iterator[Finding]:
    resolution_ns = time.get_clock_info("monotonic").resolution * 1e9
    says = f"the monotonic clock has a resolution of {resolution_ns:g} ns"
    fine = resolution_ns <= 1_000_000
    do = "" if fine else "shorter latencies are shown as 0 or as one step"
    yield Finding("clock", "ok" if fine else "warning", says, do, {"resolution_ns": resolution_ns})
    try:
        over = probes.ask("sleep", timeout_s=request.timeout_s)
        says = f"sleeps end {over['p50_ms']:g} ms late (median), {over['p99_ms']:g} ms late (p99)"
        late = over["p50_ms"] > _LATE_SLEEP_MS
        do = "stop other programs that use the CPU, or set supervisor.priority" if late else ""
        yield Finding("sleep", "warning" if late else "ok", says, do, over)
    except StreamError as e:
        yield Finding(
            "sleep", "warning", f"sleeps could not be measured: {e}", "try again when the machine is less busy"
        )
    yield _wall_clock()


class _Timex(ctypes.Structure):
    """The first fields of the kernel's `struct timex`; `rest` only has to be large enough."""

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
    """Whether the wall clock is synchronised (NTP, PTP); only dates in recordings depend on it."""
    name, unknown = "wall clock", "this system does not tell whether the wall clock is synchronised"
    if sys.platform != "linux":
        return Finding(name, "absent", unknown)
    timex = _Timex()  # modes 0: nothing is set
    try:
        failed = ctypes.CDLL(None).adjtimex(ctypes.byref(timex)) < 0
    except (OSError, AttributeError):
        failed = True
    if failed:
        return Finding(name, "absent", unknown)
    facts = {"max_error_us": timex.maxerror}
    if timex.status & _STA_UNSYNC:
        do = "start an NTP client (systemd-timesyncd, chrony) to compare dates of recordings between machines"
        return Finding(
            name, "warning", "the wall clock is not synchronised; dates of recordings may be wrong", do, facts
        )
    return Finding(name, "ok", f"synchronised, at most {timex.maxerror / 1000:g} ms off", facts=facts)


def disk(request: Request) -> Iterator[Finding]:
    """The folders for recordings and for saved states."""
    record = Path(request.settings.record.path) if request.settings.record.path else None
    yield _folder("recordings", record.parent if record else Path())
    yield _folder("state folder", config.state_folder(request.settings.state))


def _folder(name: str, folder: Path) -> Finding:
    existing = folder.expanduser().absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent  # missing folders are created when they are needed
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"?")
        free = shutil.disk_usage(existing).free
    except OSError as e:
        do = "get permission to write there, or name another folder"
        return Finding(name, "fault", f"{existing} cannot be written: {e.strerror or e}", do)
    says, facts = f"{existing} has {free / 1e9:.1f} GB free", {"folder": str(existing), "free_bytes": free}
    if free < _LOW_DISK_BYTES:
        do = "free some space: on a full disk a recording loses messages"
        return Finding(name, "warning", f"only {says}", do, facts)
    return Finding(name, "ok", says, facts=facts)


def scheduling(request: Request) -> Iterator[Finding]:
    """Whether this user may set `supervisor.priority`."""
    wanted = request.settings.supervisor.priority
    try:
        may = probes.ask("scheduling", timeout_s=request.timeout_s)
    except StreamError as e:
        yield Finding("scheduling", "warning", f"the permissions for priorities could not be checked: {e}")
        return
    given = [name for name in ("nice", "fifo") if may[name]]
    do = "" if len(given) == 2 else "for fifo: `@realtime - rtprio 20` and `- nice -10` in /etc/security/limits.conf"
    if wanted in may and not may[wanted]:
        says = f"no permission for supervisor.priority {wanted!r}; the session would run at normal priority"
        yield Finding("scheduling", "warning", says, do, may)
    elif given:
        yield Finding("scheduling", "ok", f"supervisor.priority may be {' or '.join(given)}", facts=may)
    else:
        yield Finding("scheduling", "absent", "this user may not raise priorities (nice, fifo)", do, may)


CHECKS: dict[str, Callable[[Request], Iterator[Finding]]] = {
    "versions": versions,
    "onnxruntime": onnxruntime,
    "encoders": encoders,
    "plug-ins": plug_ins,
    "bus": bus,
    "cameras": cameras,
    "sound": sound,
    "clocks": clocks,
    "disk": disk,
    "scheduling": scheduling,
}
"""In display order."""


def run(request: Request, begin: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Run all checks one after the other, so that none disturbs a measurement; `begin` is called with each name."""
    found: list[Finding] = []
    for name, check in CHECKS.items():
        begin(name)
        found += check(request)
    return found


def document(found: list[Finding]) -> dict[str, Any]:
    """The document for `--json`: the findings, and their number by state."""
    states = {s: sum(f.state == s for f in found) for s in ("ok", "absent", "warning", "fault")}
    return {"findings": [msgspec.to_builtins(f) for f in found], **states}
