"""Load the Lab Streaming Layer library with this session's settings, and convert its time stamps to the local clock.

A stream is stamped by the clock of the machine that sends it; `Offsets` measures that clock's offset periodically.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from stream_mmrnn.capture.remote_clock import RemoteClock
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.extras import need
from stream_mmrnn.core.settings import LslSettings

_THIS_MACHINE = """\
[ports]
IPv6 = disable
[multicast]
ResolveScope = machine
ListenAddress = 127.0.0.1
AddressesOverride = {127.0.0.1}
[lab]
KnownPeers = {127.0.0.1}
[tuning]
MulticastMinRTT = 0.05
MulticastMaxRTT = 0.2
UnicastMinRTT = 0.05
UnicastMaxRTT = 0.2
ContinuousResolveInterval = 0.2
[log]
level = -3
"""
"""Find streams of this machine only, which answer quickly, and log nothing to the terminal."""
_PROBE_NS = 1_000_000_000
_HISTORY = 16


def require(settings: LslSettings) -> None:
    """Check that Lab Streaming Layer can be used, before any process starts.

    Raises:
        UsageError: pylsl is not installed.
        FileError: the configuration file is missing; the library would ignore that and use all networks.

    """
    need("Lab Streaming Layer", "lsl", "pylsl")
    if settings.config and not Path(settings.config).is_file():
        raise FileError(f"lsl.config names {settings.config}, which is no file; name liblsl's lsl_api.cfg, or leave it")


def load(settings: LslSettings) -> Any:
    """The module pylsl with the session's settings. Call it once per process, before any other use of pylsl.

    Raises:
        UsageError: pylsl or its library is not installed, or too old.
        FileError: see `require`.

    """
    require(settings)
    try:
        import pylsl
    except (ImportError, RuntimeError, OSError) as e:  # RuntimeError: the package without its library
        raise UsageError(f"pylsl cannot be loaded: {e}; reinstall it: pip install --force-reinstall pylsl") from e
    try:
        if settings.config:
            pylsl.set_config_filename(settings.config)
        else:
            pylsl.set_config_content(_THIS_MACHINE)
    except NotImplementedError as e:
        raise UsageError(f"{e} Install a newer one: pip install -U 'stream-mmrnn[lsl]'") from e
    return pylsl


def clock_offset_ns(pylsl: Any) -> int:
    """Nanoseconds to add to the library's clock to get the local clock; the best of five readings."""
    best: tuple[int, int] | None = None
    for _ in range(5):
        before = now_ns()
        theirs = round(float(pylsl.local_clock()) * 1e9)
        after = now_ns()
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) // 2 - theirs)
    assert best is not None
    return best[1]


class Offsets:
    """Converts a stream's time stamps to local time."""

    def __init__(self, pylsl: Any, inlet: Any) -> None:
        self._pylsl, self._inlet = pylsl, inlet
        self._correct = pylsl.lib.lib.lsl_time_correction_ex  # pylsl has no name for it
        self._correct.restype = ctypes.c_double
        self._clock = RemoteClock()
        self._next_ns = 0
        self._last_remote_s = 0.0
        self.info: dict[str, Any] = {"offset_ns": 0, "round_trip_ns": 0, "rate_ppm": 0.0, "jumps": 0, "probes": 0}
        """The newest measurement; `history` has the newest pairs of local time and offset."""
        self.info["history"] = []

    def probe(self, timeout_s: float = 0.0) -> None:
        """Measure the offset if a measurement is due; the first one waits `timeout_s` for the answer.

        Raises what pylsl raises: TimeoutError, LostError.
        """
        at_ns = now_ns()
        if at_ns < self._next_ns:
            return
        self._next_ns = at_ns + _PROBE_NS
        remote_s, round_trip_s, error = ctypes.c_double(), ctypes.c_double(), ctypes.c_int()
        offset_s = self._correct(
            self._inlet.obj,
            ctypes.byref(remote_s),
            ctypes.byref(round_trip_s),
            ctypes.c_double(timeout_s),
            ctypes.byref(error),
        )
        self._pylsl.util.handle_error(error)
        if remote_s.value == self._last_remote_s:
            return  # the library measures by itself every few seconds: nothing new yet
        self._last_remote_s = remote_s.value
        remote_ns, half_ns = round(remote_s.value * 1e9), round(round_trip_s.value * 5e8)
        offset_ns = round(offset_s * 1e9) + clock_offset_ns(self._pylsl)
        ours_ns = remote_ns + offset_ns
        self._clock.exchange(ours_ns - half_ns, remote_ns, ours_ns + half_ns)
        history = [*self.info["history"], [ours_ns, offset_ns]][-_HISTORY:]
        self.info.update(
            offset_ns=offset_ns,
            round_trip_ns=2 * half_ns,
            rate_ppm=round(self._clock.rate_ppm, 3),
            jumps=self._clock.jumps,
            probes=self.info["probes"] + 1,
            history=history,
        )

    def stamp(self, remote_ns: int) -> int:
        """The local time of a stamp of the stream, later than any time returned before."""
        return self._clock.stamp(remote_ns)
