"""What the system refuses a process: open files, memory, space in /dev/shm or on a disk, and rights to files.

Knows nothing about what it is needed for.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

from stream_mmrnn.core.errors import UsageError

_MOST_FILES = 65_536
_ADVICE = {
    errno.EMFILE: "this process may open no more files; raise the limit (ulimit -n), or close other programs",
    errno.ENFILE: "the system opens no more files; close other programs",
    errno.ENOSPC: "no space is left on the disk, or in /dev/shm; free some",
    errno.EDQUOT: "this user's share of the disk is used up; free some",
    errno.EACCES: "you may not use it, or a folder on the way to it; ask for the right to, or name another",
    errno.EPERM: "you may not do this; ask for the right to, or name another",
    errno.EROFS: "nothing can be written there; name another place",
    errno.ENAMETOOLONG: "the name is longer than a file's can be; name another",
    errno.ENOTDIR: "a part of it is no folder; name another",
    errno.ELOOP: "its links lead in a circle; name another",
}


def raise_file_limit() -> int:
    """Let this process, and those that it starts, open as many files as the system allows; how many."""
    if os.name == "nt":
        return _MOST_FILES
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    aim = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= aim:
        return _MOST_FILES if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (aim, hard))
    except (ValueError, OSError):  # not allowed here
        return soft
    return aim


def need_files(count: int, needed_by: str) -> int:
    """Raise the limit of open files, and return it. Raises UsageError where it is below `count`."""
    files = raise_file_limit()
    if files < count:
        raise UsageError(f"this process may open {files} files, and {needed_by}; raise the limit (ulimit -n)")
    return files


def explain_os_error(error: OSError) -> str:
    """One sentence for an error that its user can mend, such as a full disk or a missing right; "" for any other."""
    advice = _ADVICE.get(error.errno or 0, "")
    return f"{error.filename}: {advice}" if advice and error.filename else advice


def return_free_memory() -> None:
    """Give memory that was freed back to the system: glibc keeps what lies between blocks that are still in use.

    It takes up to a millisecond for each megabyte that is given back. With another C library it does nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
