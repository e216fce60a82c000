"""Snapshots: the state of one session as safetensors bytes, and a folder that keeps them with a time to live (TTL).

A file holds the state tensors as `state.NAME`, other bytes as `extra.NAME` (8-bit tensors), and the rest as JSON in its
metadata, with a sha256 over everything: a damaged snapshot is refused. Writes are atomic (temporary file, fsync,
rename, fsync of the folder): if the process is killed, either the old or the new snapshot is there. The caller passes
the time, in Unix nanoseconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import stat
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as to_safetensors

from stream_mmrnn.core.errors import FileError, SnapshotError

Array: TypeAlias = npt.NDArray[Any]

MAX_BYTES = 64 << 20
"""Larger snapshots are neither written nor read."""
MAX_HEADER_BYTES = 1 << 20
NEVER = -1
"""`tick_index` of a session that has not stepped."""

_KEY, _VERSION = "stream_mmrnn", 1
_STATE, _EXTRA = "state.", "extra."
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_SUFFIX, _TEMPORARY = ".safetensors", ".tmp"
_STALE_NS = 60_000_000_000
"""A temporary file older than this was left by a process that was killed."""
_counter = itertools.count()


class Snapshot(msgspec.Struct, frozen=True):
    """The state of a session: any engine of the same model continues from it with bit-identical results."""

    session: str
    model_sha256: str
    """Hash of the model file: the state fits no other model."""
    tick_index: int
    """The last tick that was stepped; `NEVER` before the first."""
    state: dict[str, Array]
    """Tensors by name, without the slot axis; empty before the first step."""
    extra: dict[str, bytes | str] = {}
    """Additional data of the caller, by name."""


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON metadata of a snapshot file."""

    version: int
    session: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    model_sha256: Annotated[str, msgspec.Meta(max_length=128)]
    tick_index: Annotated[int, msgspec.Meta(ge=NEVER, le=(1 << 63) - 1)]
    texts: dict[str, str]
    sha256: str = ""
    """Hash of everything else."""


def digest(about: About, tensors: dict[str, Array]) -> str:
    """The sha256 over the metadata and every tensor's name, type, shape and bytes."""
    found = hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(about, sha256="")))
    for name in sorted(tensors):
        array = tensors[name]
        found.update(msgspec.json.encode((name, array.dtype.str, array.shape)))
        found.update(array.tobytes())
    return found.hexdigest()


def to_bytes(snapshot: Snapshot) -> bytes:
    """Encode a snapshot as a safetensors file; the same snapshot gives the same bytes.

    Raises:
        SnapshotError: a type, size or name that the format cannot hold.

    """
    tensors = {_STATE + name: np.array(array, array.dtype.newbyteorder("<")) for name, array in snapshot.state.items()}
    texts: dict[str, str] = {}
    for name, value in snapshot.extra.items():
        if isinstance(value, str):
            texts[name] = value
        else:
            tensors[_EXTRA + name] = np.frombuffer(value, np.uint8)
    about = About(_VERSION, snapshot.session, snapshot.model_sha256, snapshot.tick_index, texts)
    try:
        about = msgspec.structs.replace(about, sha256=digest(about, tensors))
        raw = to_safetensors(tensors, {_KEY: msgspec.json.encode(about).decode()})
        _unpack(raw)
    except (msgspec.MsgspecError, SafetensorError, KeyError, ValueError, OverflowError) as e:
        raise SnapshotError(f"the state of session {snapshot.session!r} cannot be saved as a snapshot: {e}") from e
    return raw


def from_bytes(raw: bytes) -> Snapshot:
    """The snapshot in the bytes of a file; its arrays are read-only.

    Raises:
        SnapshotError: they are damaged, or not a snapshot.

    """
    try:
        return _unpack(raw)
    except (msgspec.MsgspecError, SafetensorError, KeyError, ValueError, OverflowError, RecursionError) as e:
        raise SnapshotError(f"these {len(raw)} bytes are no snapshot of a session, or a damaged one: {e}") from e


def _unpack(raw: bytes) -> Snapshot:
    if len(raw) > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES} bytes")
    header = int.from_bytes(raw[:8], "little")
    if not 8 + header <= len(raw) or header > MAX_HEADER_BYTES:
        raise ValueError(f"expected a header of at most {MAX_HEADER_BYTES} bytes, and all of it")
    # `deserialize` checks that the tensors are contiguous, without gaps or overlaps
    found = deserialize(raw)  # type: ignore[no-untyped-call]
    metadata = msgspec.json.decode(raw[8 : 8 + header], type=dict[str, msgspec.Raw])["__metadata__"]
    about = msgspec.json.decode(msgspec.json.decode(metadata, type=dict[str, str])[_KEY], type=About)
    if about.version != _VERSION:
        raise ValueError(f"expected version {_VERSION}, got {about.version}")
    tensors: dict[str, Array] = {}
    for name, tensor in found:
        kind = _DTYPES[tensor["dtype"]]
        data = bytes(tensor["data"])
        if kind == np.bool_ and data.strip(b"\0\1"):
            raise ValueError(f"tensor {name!r} holds booleans that are neither 0 nor 1")
        tensors[name] = np.frombuffer(data, kind).reshape(tensor["shape"])
    if digest(about, tensors) != about.sha256:
        raise ValueError("the sha256 does not match the content")
    state: dict[str, Array] = {}
    extra: dict[str, bytes | str] = dict(about.texts)
    for name, array in tensors.items():
        if name.startswith(_STATE):
            state[name.removeprefix(_STATE)] = array
        elif name.startswith(_EXTRA) and array.dtype == np.uint8 and array.ndim == 1:
            extra[name.removeprefix(_EXTRA)] = array.tobytes()
        else:
            raise ValueError(f"tensor {name!r} is neither of a state nor an extra")
    return Snapshot(about.session, about.model_sha256, about.tick_index, state, extra)


class StateStore:
    """The newest snapshot of each session, in a folder that only this user can access, with a time to live.

    A file's name is the sha256 of the session's name: no name can point outside the folder or reveal the session.
    """

    def __init__(self, folder: Path, ttl_s: float) -> None:
        """Create the folder and restrict its permissions; raises FileError if that fails."""
        self.folder, self.ttl_ns = folder, round(ttl_s * 1e9)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as e:
            raise FileError(
                f"{folder} cannot be the folder of states: {e.strerror}; give another as state.folder"
            ) from e

    def path(self, session: str) -> Path:
        """The path of a session's snapshot, which may not exist."""
        return self.folder / (hashlib.sha256(session.encode("utf-8", "surrogatepass")).hexdigest() + _SUFFIX)

    def save(self, snapshot: Snapshot, unix_ns: int) -> Path:
        """Write a snapshot and replace the session's older one; it is on the disk when this returns.

        Its time to live starts at `unix_ns`.

        Raises:
            SnapshotError: it cannot be written; the older one, if any, is still there.

        """
        path = self.path(snapshot.session)
        self.write(path, to_bytes(snapshot), unix_ns, f"the state of session {snapshot.session!r}")
        return path

    def write(self, path: Path, raw: bytes, unix_ns: int, what: str) -> None:
        """Write a file of the folder; it is on the disk when this returns. Raises SnapshotError, which names `what`."""
        if len(raw) > MAX_BYTES:
            raise SnapshotError(
                f"{what} cannot be written: {len(raw)} bytes, expected at most {MAX_BYTES}; use a smaller model"
            )
        beside = path.with_name(f"{path.stem}.{os.getpid()}.{next(_counter)}{_TEMPORARY}")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it may have been removed
            try:
                # O_EXCL: never follow a link or overwrite a file
                descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(raw)
                    file.flush()
                    os.utime(descriptor if os.utime in os.supports_fd else beside, ns=(unix_ns, unix_ns))
                    os.fsync(descriptor)
                beside.replace(path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            self._sync_folder()
        except OSError as e:
            raise SnapshotError(f"{what} cannot be written to {self.folder}: {e.strerror}") from e

    def _sync_folder(self) -> None:
        """Fsync the folder, so that the renamed entry is on the disk."""
        if os.name == "nt":  # folders have no descriptors there
            return
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def load(self, session: str, unix_ns: int) -> Snapshot | None:
        """The session's newest snapshot; None if there is none, or if it has expired at `unix_ns`.

        Raises:
            SnapshotError: the file is damaged, too large, or holds another session.

        """
        path = self.path(session)
        raw = self.read(path, f"the state of session {session!r}", unix_ns)
        if raw is None:
            return None
        try:
            snapshot = from_bytes(raw)
        except SnapshotError as e:
            raise SnapshotError(f"{path} is damaged, remove it to begin session {session!r} anew: {e}") from e
        if snapshot.session != session:
            raise SnapshotError(f"{path} is not of session {session!r} but of {snapshot.session!r}; remove it")
        return snapshot

    def read(self, path: Path, what: str, unix_ns: int) -> bytes | None:
        """The bytes of a file of the folder; None where there is none, or it has expired. Raises SnapshotError."""
        flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            with os.fdopen(os.open(path, os.O_RDONLY | flags), "rb") as file:
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_BYTES:
                    raise SnapshotError(f"{path} is no file of at most {MAX_BYTES} bytes; remove it")
                return None if self._expired(about.st_mtime_ns, unix_ns) else file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise SnapshotError(f"{what} cannot be read from {path}: {e.strerror}") from e

    def holds(self, session: str, unix_ns: int) -> bool:
        """Whether the session has a snapshot that has not expired, without reading it."""
        try:
            return not self._expired(self.path(session).lstat().st_mtime_ns, unix_ns)
        except OSError:
            return False

    def _expired(self, saved_ns: int, unix_ns: int) -> bool:
        return unix_ns - saved_ns > self.ttl_ns

    def forget(self, session: str) -> None:
        """Remove the session's snapshot, if there is one."""
        with contextlib.suppress(OSError):
            self.path(session).unlink(missing_ok=True)

    def sweep(self, unix_ns: int) -> int:
        """Remove expired snapshots and stale temporary files; returns how many files.

        Raises:
            SnapshotError: the folder cannot be read.

        """
        removed = 0
        try:
            entries = list(os.scandir(self.folder))
        except OSError as e:
            raise SnapshotError(
                f"expired states cannot be removed: the folder {self.folder} cannot be read: {e.strerror}"
            ) from e
        for entry in entries:
            with contextlib.suppress(OSError):  # another process may have removed it already
                mtime_ns = entry.stat(follow_symlinks=False).st_mtime_ns
                expired = entry.name.endswith(_SUFFIX) and self._expired(mtime_ns, unix_ns)
                stale = entry.name.endswith(_TEMPORARY) and unix_ns - mtime_ns > _STALE_NS
                if expired or stale:
                    Path(entry.path).unlink()
                    removed += 1
        return removed
