"""Every exception of the package, as one tree. Foreign errors are translated where they enter.

    StreamError                 the root: one sentence that says what, what was expected, what to do
    ├── UsageError              the caller can mend it: exit code 2
    │   ├── ConfigError         a wrong key or value in the configuration
    │   ├── SourceSpecError     a source that cannot be named so
    │   ├── ModelError          a model file that is missing, damaged or breaks its contract
    │   ├── ProviderError       an asked-for execution provider that is not active
    │   └── FileError           a file that is missing or not what it should be
    ├── SourceError             a device or stream that is not there (yet): the session goes on
    ├── WireError               bytes from outside that are not a message: counted and dropped
    ├── RecordingError          a recording that is damaged or incomplete: exit code 3
    ├── SnapshotError           a session's state that cannot be kept, or is damaged: exit code 3
    ├── ProcessError            a process of the session that did not start or died
    │   └── ShardDied           a part of an engine, and whose states went with it
    ├── NotRunning              no such session is running, or its bus does not answer
    ├── TimedOut                nothing came in the time that was given
    └── SessionError            what a session asked for cannot be done now
        ├── Busy                no free slot, or no time for one more; says when to ask again: exit code 4
        ├── UnknownSession      it is not open, and nothing of it is kept
        ├── DuplicateSession    it is open already
        ├── Evicted             it is not open, but its state is kept: its resume token brings it back
        └── BadTick             features that do not fit the model: not stepped, so no state has seen them

Knows nothing about who catches what.
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
    """Names the lost sessions. The engine has replaced the process and goes on."""

    sessions: tuple[str, ...] = ()
    """Still open, but at the model's initial state: restore their snapshots, or let them begin anew."""
    predictions: tuple[Any, ...] = ()
    """What was stepped before it was known, in the order of the ticks. A tick that has none here was not stepped."""


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
