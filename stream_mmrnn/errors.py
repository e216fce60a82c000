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
    ├── ProcessError            a process of ours that did not start or died
    └── SessionError            what a session asked for cannot be done now
        ├── Busy                no free slot: exit code 4
        ├── UnknownSession
        └── DuplicateSession

Knows nothing about who catches what.
"""


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


class SessionError(StreamError):
    pass


class Busy(SessionError):  # noqa: N818 the field's word
    exit_code = 4


class UnknownSession(SessionError):  # noqa: N818
    pass


class DuplicateSession(SessionError):  # noqa: N818
    pass
