"""The registry of running systems, as files: how a program of this user finds a session without an address.

    FOLDER/                   0700 and owned by this user, or it is not used (places: `config.run_folders`)
      PID-STARTED.json        one running system; 0600, replaced atomically, removed when it ends

The process id alone is not enough, because the operating system reuses it; the start time makes it unique. Stale files
are skipped and removed. Files hold no secrets, only the path of the folder with the keys.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from stream_mmrnn.bus import Address
from stream_mmrnn.bus.keys import KeyFolder
from stream_mmrnn.core import config
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError, NotRunning, UsageError
from stream_mmrnn.core.numbers import whole_number
from stream_mmrnn.core.streams import Stream

_MAX_BYTES = 65_536
_MAX_PORT = 65_532
"""The bus takes four ports from `bus.port` on."""


class Entry(msgspec.Struct, frozen=True):
    """One running system."""

    pid: int
    """Process id of its supervisor, the parent of all its processes."""
    started: int
    """Start time of that process in a unit of the operating system; only for equality."""
    session: str
    engine: bool
    """False if the session only records."""
    began_unix_ns: int
    publish: str
    subscribe: str
    bulk: str
    view: str
    keys: str = ""
    """The folder of keys for the bus; "" if it needs none."""
    page: str = ""
    """URL of the live page; "" if there is none yet."""
    restarts: dict[str, int] = {}
    """Number of restarts, by process."""
    streams: tuple[Stream, ...] = ()
    """Its table of streams, without the arguments of sources: a camera's URL may hold a password."""
    given_up: dict[str, str] = {}
    """The reason why a process is not restarted any more, by process."""

    @property
    def file_name(self) -> str:
        return f"{self.pid}-{self.started}.json"

    def address(self) -> Address:
        """The address of its bus; raises FileError if its keys cannot be read."""
        own = KeyFolder(Path(self.keys)).keys() if self.keys else None
        return Address(self.publish, self.subscribe, "", self.bulk, self.view, keys=own)

    def is_listed(self) -> bool:
        """Whether its file is there. A session removes it when it begins to end in order; others remove it once the
        process is gone.
        """
        return any((folder / self.file_name).exists() for folder in config.run_folders())

    def alive(self) -> bool:
        """Whether the process that wrote this entry still runs."""
        return began(self.pid) == self.started


def entry_of(session: str, engine: bool, address: Address, keys: str = "", streams: Iterable[Stream] = ()) -> Entry:
    """The entry of this process."""
    pid = os.getpid()
    return Entry(
        pid,
        began(pid) or 0,
        session,
        engine,
        time.time_ns(),
        address.publish,
        address.subscribe,
        address.bulk,
        address.view,
        str(Path(keys).absolute()) if keys else "",
        streams=tuple(replace(row, source=row.source.partition(":")[0]) for row in streams),
    )


def began(pid: int) -> int | None:
    """Start time of a process, constant while it lives (unit of the operating system); None if it does not run."""
    if sys.platform == "linux":
        # not psutil's `create_time`, which changes when the wall clock is set
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else int(fields[19])
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time() * 100)
    except (psutil.Error, ValueError):
        return None


class Registration:
    """The file of this process, until `remove`."""

    def __init__(self, entry: Entry) -> None:
        """Write the file.

        Raises:
            FileError: there is no private folder for it.

        """
        self._entry = entry
        self._path = _own_folder() / entry.file_name
        self._write()

    def update(self, **changes: Any) -> None:
        """Change fields of the entry; a write error is ignored."""
        self._entry = replace(self._entry, **changes)
        with contextlib.suppress(FileError):
            self._write()

    def _write(self) -> None:
        # atomic: write a temporary file and rename it
        beside = self._path.with_suffix(".new")
        try:
            fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(self._entry))
            beside.replace(self._path)
        except OSError as e:
            raise FileError(f"{self._path} cannot be written: {e.strerror}; see who may write there") from e

    def remove(self) -> None:
        """Remove the file. Idempotent; safe to call at any time."""
        for path in (self._path, self._path.with_suffix(".new")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _check(folder: Path) -> None:
    """Refuse a folder that another user could write to. Raises FileError, or OSError if it does not exist."""
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode):
        raise FileError(f"{folder} is no folder; remove it, or set XDG_RUNTIME_DIR to a folder of your own")
    if sys.platform == "win32":
        return
    if about.st_uid != os.getuid():
        raise FileError(f"{folder} belongs to another user; remove it, or set XDG_RUNTIME_DIR to a folder of your own")
    if about.st_mode & 0o077:
        raise FileError(f"{folder} is open to others; take their rights away (chmod 700)")


def _own_folder() -> Path:
    """A private folder for registry files, created if needed; raises FileError if none is possible."""
    why: FileError | None = None
    for folder in config.run_folders():
        try:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(0o700)
            _check(folder)
            return folder
        except FileError as e:
            why = e
        except OSError as e:
            why = FileError(f"{folder} cannot be made: {e.strerror}; set XDG_RUNTIME_DIR to a folder of your own")
    raise why or FileError("there is no folder for the registry of sessions; set XDG_RUNTIME_DIR to one of your own")


def _read(path: Path) -> Entry | None:
    """The entry in a file; None if it is invalid. Raises OSError if it cannot be read."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return None
        try:
            entry = msgspec.json.decode(file.read(_MAX_BYTES), type=Entry)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None
    return entry if entry.file_name == path.name else None


def _is_of_a_running_process(file_name: str) -> bool:
    """Whether the process that a file of another release is named after runs."""
    pid, _, started = file_name.removesuffix(".json").partition("-")
    return pid.isdecimal() and len(pid) < 10 and str(began(int(pid))) == started


def everything() -> list[Entry]:
    """All running systems of this user, newest first; stale files are removed.

    Raises:
        FileError: none was found, and a registry folder is not private.

    """
    found: list[Entry] = []
    why: FileError | None = None
    for folder in config.run_folders():
        try:
            _check(folder)
            paths = sorted(folder.glob("*.json"))
        except FileError as e:
            why = e
            continue
        except OSError:
            continue
        for path in paths:
            entry, is_ours = None, True
            try:
                entry = _read(path)
            except OSError as e:
                is_ours = e.errno != errno.ELOOP  # a link
                if is_ours:
                    continue  # the session may run: this process may open no more files, for example
            if entry is not None and entry.alive():
                found.append(entry)
            elif entry is not None or not (is_ours and _is_of_a_running_process(path.name)):
                with contextlib.suppress(OSError):
                    path.unlink()
    if why is not None and not found:
        raise why
    return sorted(found, key=lambda e: -e.began_unix_ns)


def find(session: str | None = None) -> Entry:
    """The running system with this session name or process id; None means the only one.

    Raises:
        NotRunning: there is none.
        UsageError: there are several.

    """
    there = everything()
    matching = [e for e in there if session in (None, e.session, str(e.pid))]
    if len(matching) == 1:
        return matching[0]
    names = ", ".join(f"{e.session!r} (process {e.pid})" for e in matching or there)
    if matching:
        raise UsageError(f"several sessions are running: {names}; say which, by its name or the number of its process")
    if there:
        raise NotRunning(f"no session {session!r} is running, but {names}")
    raise NotRunning("no session is running; start one by `stream-mmrnn live`")


def reach(
    session: str | None = None, address: str = "", keys: Path | None = None, server_key: str = ""
) -> tuple[Address, Entry | None]:
    """The address of a bus: of a running system of this user, or at `HOST:PORT` (its `bus.port`).

    `keys`: the folder with our own key pair, if that bus needs keys; `server_key`: the bus's public key, by default
    that of the folder. The entry is None for an address, because its processes may be on another machine.

    Raises:
        NotRunning, UsageError, FileError: no such session, an invalid address, or unreadable keys.

    """
    if not address:
        entry = find(session)
        return entry.address(), entry
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    number = whole_number(port, 1, _MAX_PORT)
    if not host or number is None:
        raise UsageError(f"{address!r} is no address of a bus: give HOST:PORT, as `live` prints it (bus.port)")
    if server_key and keys is None:
        raise UsageError("a server key is of use only with a pair of your own: give the folder of keys, too")
    return Address.at(host, number, KeyFolder(keys).keys(server_key) if keys else None), None


class SessionSearch:
    """Looks for a session until it runs, for a limited time; the caller pauses between two calls."""

    def __init__(
        self, find: Callable[[], tuple[Address, Entry | None]], wait_s: float, clock: Callable[[], int] = now_ns
    ) -> None:
        """`find`: such as `reach`; `wait_s`: 0 means that it must run already; `clock`: nanoseconds."""
        self._find, self._wait_s, self._clock = find, wait_s, clock
        self._until_ns = clock() + round(wait_s * 1e9)

    def poll(self) -> tuple[Address, Entry | None] | None:
        """Look once: the session, or None while it may still appear.

        Raises:
            NotRunning: the time is over.
            UsageError, FileError: those of `find`, at once.

        """
        try:
            return self._find()
        except NotRunning as e:
            if not self._wait_s:
                raise
            if self._clock() < self._until_ns:
                return None
            raise NotRunning(f"{e} (waited {self._wait_s:g} s)") from None
