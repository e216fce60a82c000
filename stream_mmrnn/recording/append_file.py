"""An append-only file on a disk that may be slow, full or failing; data that is not written yet stays in memory."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import IO, Literal


def part(path: Path, number: int) -> Path:
    """`x.mcap` -> `x.part2.mcap`: a recorder that restarts after a crash writes a new part and overwrites nothing."""
    return path if not number else path.with_name(f"{path.stem}.part{number + 1}{path.suffix}")


def later_parts(path: Path) -> dict[int, Path]:
    """The files of later parts beside `x.mcap`, by number, in order."""
    name = re.compile(re.escape(path.stem) + r"\.part([0-9]{1,6})" + re.escape(path.suffix))
    try:
        found = {int(m[1]): entry for entry in path.parent.iterdir() if (m := name.fullmatch(entry.name))}
    except OSError:
        return {}
    return dict(sorted(found.items()))


def _lock(file: IO[bytes], kind: Literal["write", "read"]) -> bool:
    """Lock a whole file for its writer, or for any number of readers; False where that is not possible now.

    The lock is advisory (flock): it only says that somebody writes. Windows and some network disks have none.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_EX if kind == "write" else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_being_written(path: Path) -> bool:
    """Whether a recorder of this machine has the file open."""
    try:
        with path.open("rb") as file:
            return not _lock(file, "read")
    except OSError:
        return False


class Disk:
    """A new file. Tests inject one that is slow or full."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if it cannot be created or exists already."""
        self._file = path.open("xb", buffering=0)
        _lock(self._file, "write")
        self._folder: Path | None = path.parent

    def write(self, at: int, data: bytes) -> None:
        """Write all of `data` at byte `at`; raises OSError if that fails."""
        self._file.seek(at)
        remaining = memoryview(data)
        while remaining:
            remaining = remaining[self._file.write(remaining) :]

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def sync(self) -> None:
        """Fsync the file and, the first time, its folder. Thread-safe beside `write`; raises OSError if the disk
        reports lost data.
        """
        os.fsync(self._file.fileno())
        folder, self._folder = self._folder, None
        if folder is not None:
            with contextlib.suppress(OSError):  # not every system supports it
                number = os.open(folder, os.O_RDONLY)
                try:
                    os.fsync(number)
                finally:
                    os.close(number)

    def close(self) -> None:
        self._file.close()


class Tail:
    """File object with a buffer of the data that is not on the disk yet; `drain` writes it."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._pieces: list[bytes] = []
        self._end = 0
        """Bytes written to the disk."""
        self.size = 0
        """Size of the file including the buffer."""
        self.trouble = ""
        """The last write error, while writing fails; else ""."""

    def write(self, data: bytes) -> int:
        if data:
            self._pieces.append(data)
            self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Part of the file interface; does nothing, `drain` writes."""

    def drain(self) -> bool:
        """Write the buffer to the disk; True if it is empty now.

        If that fails, the data stays buffered for the next attempt, and the file is truncated to its old end, so that
        it holds no partial write.
        """
        if not self._pieces:
            return True
        data = b"".join(self._pieces)
        self._pieces = [data]
        try:
            self._disk.write(self._end, data)
        except OSError as e:
            self.trouble = e.strerror or str(e)
            with contextlib.suppress(OSError):
                self._disk.truncate(self._end)
            return False
        self._end += len(data)
        self._pieces = []
        self.trouble = ""
        return True
