"""A file that grows on a disk which may be slow, full or failing, with the data that waits for it in memory."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path


def part(path: Path, number: int) -> Path:
    """`x.mcap` -> `x.part2.mcap`: where a recorder goes on after a crash, so that nothing is overwritten."""
    return path if not number else path.with_name(f"{path.stem}.part{number + 1}{path.suffix}")


def later_parts(path: Path) -> dict[int, Path]:
    """The parts beside `x.mcap`, from 2 on, in their order."""
    name = re.compile(re.escape(path.stem) + r"\.part([0-9]{1,6})" + re.escape(path.suffix))
    try:
        found = {int(m[1]): entry for entry in path.parent.iterdir() if (m := name.fullmatch(entry.name))}
    except OSError:
        return {}
    return dict(sorted(found.items()))


class Disk:
    """A new file. A test gives one that is slow, or full."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it cannot be made, or is there already."""
        self._file = path.open("xb", buffering=0)
        self._folder: Path | None = path.parent

    def write(self, at: int, data: bytes) -> None:
        """All of `data` from byte `at` on; raises OSError where the disk does not take it."""
        self._file.seek(at)
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def sync(self) -> None:
        """Wait until what was written is on the disk, and at first the file's name, too. May be called beside
        `write`; raises OSError where the disk says that it lost something.
        """
        os.fsync(self._file.fileno())
        folder, self._folder = self._folder, None
        if folder is not None:
            with contextlib.suppress(OSError):  # not every system can
                number = os.open(folder, os.O_RDONLY)
                try:
                    os.fsync(number)
                finally:
                    os.close(number)

    def close(self) -> None:
        self._file.close()


class Tail:
    """What was written and the disk has not taken yet; to who writes, it is a file."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._pieces: list[bytes] = []
        self._end = 0
        """How far the disk has it."""
        self.size = 0
        """Of the file, once the disk has taken all."""
        self.trouble = ""
        """Why the disk takes nothing now, or ""."""

    def write(self, data: bytes) -> int:
        if data:
            self._pieces.append(data)
            self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Files have it; `drain` does it."""

    def drain(self) -> bool:
        """Give the disk what waits. What it refuses stays for the next time, and the file ends where it ended before,
        so that no half of a piece is left in it. True: nothing waits any more.
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
