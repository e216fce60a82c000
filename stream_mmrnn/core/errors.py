"""Every exception of the package, as one tree. Errors of other libraries are translated where they occur.

StreamError                 the root: one sentence that says what, what was expected, what to do
├── UsageError              the caller can fix it: exit code 2
│   ├── ConfigError         a wrong key or value in the configuration
│   ├── SourceSpecError     an invalid source specification
│   ├── ModelError          a model file that is missing, damaged or breaks its contract
│   ├── PluginError         a source, encoder, cell, fusion or task of another package that does not load
│   ├── ProviderError       a requested execution provider that is not active
│   └── FileError           a file that is missing or invalid
├── SourceError             a device or stream that is not available (yet): the session continues
├── WireError               bytes from outside that are not a message: counted and dropped
├── RecordingError          a recording that is damaged or incomplete: exit code 3
├── SnapshotError           a session's state that cannot be saved, or is damaged: exit code 3
├── ProcessError            a process of the session that did not start or died
│   └── ShardDied           a process of a sharded engine died; names the sessions that lost their state
├── NotRunning              no such session is running, or its bus does not answer
├── TimedOut                no message within the timeout
└── SessionError            a session's request cannot be fulfilled
    ├── Busy                no free slot, or no capacity; says when to retry: exit code 4
    ├── UnknownSession      it is not open, and has no saved state
    ├── DuplicateSession    it is open already
    ├── Evicted             it is not open, but its state is saved: resume it with its token
    └── BadTick             features that do not fit the model: not stepped, so the state is unchanged
"""

from __future__ import annotations

from typing import Any


class StreamError(Exception):
    """The root of all errors that this package raises on purpose."""

    exit_code = 1


class UsageError(StreamError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class SourceSpecError(UsageError):
    pass


class ModelError(UsageError):
    pass


class PluginError(UsageError):
    pass


class ProviderError(UsageError):
    pass


class FileError(UsageError):
    pass


class SourceError(StreamError):
    pass


class WireError(StreamError):
    pass


class RecordingError(StreamError):
    exit_code = 3


class SnapshotError(StreamError):
    exit_code = 3


class ProcessError(StreamError):
    pass


class ShardDied(ProcessError):  # noqa: N818
    """The engine has already replaced the process and continues."""

    sessions: tuple[str, ...] = ()
    """Sessions that lost their state: still open, at the model's initial state. Restore their snapshots if needed."""
    predictions: tuple[Any, ...] = ()
    """The predictions of the ticks that were stepped, in order; all other ticks were not stepped."""
    block: Any = None
    """The same of `step_block`: a `BlockPredictions` of the ticks that were stepped, in order; else None."""


class NotRunning(StreamError):  # noqa: N818
    pass


class TimedOut(StreamError, TimeoutError):  # noqa: N818
    pass


class SessionError(StreamError):
    pass


class Busy(SessionError):  # noqa: N818 the field's word
    """`retry_after_s`: when to ask again; 0 if unknown."""

    exit_code = 4

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownSession(SessionError):  # noqa: N818
    pass


class DuplicateSession(SessionError):  # noqa: N818
    pass


class Evicted(SessionError):  # noqa: N818
    pass


class BadTick(SessionError):  # noqa: N818
    pass
