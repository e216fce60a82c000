"""The registry of running systems, as files: how a program of this user finds a session without an address.

    FOLDER/                   0700 and this user's, or it is not used (`config.run_folders` says where it may be)
      PID-STARTED.json        one running system; 0600, replaced whole, removed when it ends

A process number alone is not enough, because the system reuses it: the start time of the process tells two apart. A
file that was left over is skipped and removed. Files hold no secret: of keys they name the folder, which only this user
can read.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from stream_mmrnn.bus import Address
from stream_mmrnn.bus.keys import KeyFolder
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import FileError, NotRunning, UsageError

_MAX_BYTES = 65_536
_MAX_PORT = 65_532
"""The bus takes four ports from `bus.port` on."""


class Entry(msgspec.Struct, frozen=True):
    """One running system, as it says itself."""

    pid: int
    """Of its supervisor, the parent of all its processes."""
    started: int
    """What the operating system says of that process's beginning; compares with nothing but itself."""
    session: str
    engine: bool
    """False in a session that only records."""
    began_unix_ns: int
    publish: str
    subscribe: str
    bulk: str
    view: str
    keys: str = ""
    """The folder of keys that the bus asks for; "" where it asks for none."""
    page: str = ""
    """The live page's address; "" where there is none, or not yet."""
    restarts: dict[str, int] = {}
    """By process: how often it was started again."""
    given_up: dict[str, str] = {}
    """By process: why it is not started again."""

    @property
    def file_name(self) -> str:
        return f"{self.pid}-{self.started}.json"

    def address(self) -> Address:
        """Where its bus is; raises FileError where its keys cannot be read."""
        own = KeyFolder(Path(self.keys)).keys() if self.keys else None
        return Address(self.publish, self.subscribe, "", self.bulk, self.view, keys=own)

    def alive(self) -> bool:
        """Whether its process is there, and is the one that wrote this."""
        return began(self.pid) == self.started


def entry_of(session: str, engine: bool, address: Address, keys: str = "") -> Entry:
    """What this process says of itself."""
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
    )


def began(pid: int) -> int | None:
    """A number for the time at which a process began, the same as long as it lives; None where there is none."""
    if sys.platform == "linux":
        # not psutil's `create_time`: that moves when the wall clock is set
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
    """The file of this process, from the first `write` until `remove`."""

    def __init__(self, entry: Entry) -> None:
        """Write it, so that others find us.

        Raises:
            FileError: there is no folder for it that is ours alone.

        """
        self._entry = entry
        self._path = _own_folder() / entry.file_name
        self._write()

    def update(self, **changes: Any) -> None:
        """Say something else of us than before; what cannot be written stays as it was."""
        self._entry = replace(self._entry, **changes)
        with contextlib.suppress(FileError):
            self._write()

    def _write(self) -> None:
        # a temporary file, renamed when it is complete: a reader never sees half of it
        beside = self._path.with_suffix(".new")
        try:
            fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(self._entry))
            beside.replace(self._path)
        except OSError as e:
            raise FileError(f"{self._path} cannot be written: {e.strerror}; see who may write there") from e

    def remove(self) -> None:
        """Harmless when called twice, and in the middle of anything."""
        for path in (self._path, self._path.with_suffix(".new")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _check(folder: Path) -> None:
    """Refuse a folder that another user could have filled. Raises FileError, or OSError where it is not there."""
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
    """A folder that is ours alone, made where there is none; raises FileError with the last reason against one."""
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
    raise why or FileError("there is no folder to say in what is running; set XDG_RUNTIME_DIR to one of your own")


def _read(path: Path) -> Entry | None:
    """The entry in a file; None if the file is no entry."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return None
        try:
            entry = msgspec.json.decode(file.read(_MAX_BYTES), type=Entry)
        except (msgspec.MsgspecError, ValueError, RecursionError, OSError):
            return None
    return entry if entry.file_name == path.name else None


def everything() -> list[Entry]:
    """All running systems of this user, the newest first; files of processes that ended are removed.

    Raises:
        FileError: none was found, and a folder where one could have been is not ours alone.

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
            entry = _read(path)
            if entry is not None and entry.alive():
                found.append(entry)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
    if why is not None and not found:
        raise why
    return sorted(found, key=lambda e: -e.began_unix_ns)


def find(session: str | None = None) -> Entry:
    """The running system whose session has this name, or whose process this number; without one the only one.

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
    """Where a bus is: of a running system of this user, or at `HOST:PORT` (its `bus.port`).

    `keys`: the folder with our own pair, where that bus asks for keys; `server_key` is its public key, which is that of
    the folder where none is given. The entry is None for an address: its processes may be on another machine.

    Raises:
        NotRunning, UsageError, FileError: it cannot be found, or is no address, or there are no such keys.

    """
    if not address:
        entry = find(session)
        return entry.address(), entry
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port[:6]) <= _MAX_PORT):
        raise UsageError(f"{address!r} is no address of a bus: give HOST:PORT, as `live` prints it (bus.port)")
    if server_key and keys is None:
        raise UsageError("a server key is of use only with a pair of your own: give the folder of keys, too")
    return Address.at(host, int(port), KeyFolder(keys).keys(server_key) if keys else None), None
