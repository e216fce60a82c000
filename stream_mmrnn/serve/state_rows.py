"""StateRows: the states of many sessions of one model as columns, and as the bytes of one file.

The file is safetensors: `state.NAME` [N, *shape], `fresh`, `tick_index`, `saved_ns`, `token_sha256`, and `gone`: keys
of sessions that were closed; as JSON in its metadata the names and a sha256 over everything: a damaged file is refused.
Knows nothing about folders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from stream_mmrnn.core.block import Integers, StateBlock
from stream_mmrnn.core.errors import SnapshotError
from stream_mmrnn.predict.snapshots import Snapshot

_KEY, _VERSION = "stream_mmrnn_rows", 1
_STATE = "state."
TOKEN_SHA256 = "token_sha256"  # noqa: S105 a name, not a secret
Keys: TypeAlias = npt.NDArray[np.uint64]


class StateRows(msgspec.Struct, frozen=True, eq=False):
    """The states of N sessions."""

    model_sha256: str
    sessions: list[str]
    token_sha256: list[str]
    """Of each session's token."""
    tick_index: Integers
    """[N] the last tick that was stepped; -1 before the first."""
    saved_ns: Integers
    """[N] Unix time."""
    states: StateBlock

    def __len__(self) -> int:
        return len(self.sessions)

    def snapshot(self, row: int) -> Snapshot:
        """One of them."""
        extra: dict[str, bytes | str] = {TOKEN_SHA256: self.token_sha256[row]}
        return Snapshot(self.sessions[row], self.model_sha256, int(self.tick_index[row]), self.states.row(row), extra)

    def take(self, rows: Sequence[int]) -> StateRows:
        at = np.array(rows, np.int64)
        return StateRows(
            self.model_sha256,
            [self.sessions[i] for i in rows],
            [self.token_sha256[i] for i in rows],
            self.tick_index[at],
            self.saved_ns[at],
            StateBlock(self.states.fresh[at], {name: of[at] for name, of in self.states.states.items()}),
        )


def joined_rows(parts: Sequence[StateRows]) -> StateRows:
    """Rows of one model, one after another; those without a state take the shapes of others."""
    shapes: dict[str, npt.NDArray[Any]] = {}
    for part in parts:
        shapes |= {name: of[:0] for name, of in part.states.states.items()}

    def of(part: StateRows, name: str) -> npt.NDArray[Any]:
        like = shapes[name]
        return part.states.states.get(name, np.zeros((len(part), *like.shape[1:]), like.dtype))

    return StateRows(
        parts[0].model_sha256,
        [name for part in parts for name in part.sessions],
        [token for part in parts for token in part.token_sha256],
        np.concatenate([part.tick_index for part in parts]),
        np.concatenate([part.saved_ns for part in parts]),
        StateBlock(
            np.concatenate([part.states.fresh for part in parts]),
            {name: np.concatenate([of(part, name) for part in parts]) for name in shapes},
        ),
    )


class _About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    model_sha256: Annotated[str, msgspec.Meta(max_length=128)]
    sessions: list[Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]]
    sha256: str = ""


def to_bytes(rows: StateRows, gone: Keys) -> bytes:
    """The bytes of a file; `gone`: keys of sessions of which older files hold states that do not count any more.

    Raises:
        SnapshotError: a type or size that the format cannot hold.

    """
    tensors: dict[str, npt.NDArray[Any]] = {
        _STATE + name: np.ascontiguousarray(of, of.dtype.newbyteorder("<")) for name, of in rows.states.states.items()
    }
    tensors["fresh"] = rows.states.fresh.astype(np.uint8)
    tensors["tick_index"], tensors["saved_ns"] = rows.tick_index.astype("<i8"), rows.saved_ns.astype("<i8")
    digests = np.frombuffer(bytes.fromhex("".join(rows.token_sha256)), np.uint8)
    tensors[TOKEN_SHA256] = digests.reshape(len(rows), 32)
    about = _About(_VERSION, rows.model_sha256, rows.sessions)
    tensors["gone"] = gone.astype("<u8")
    try:
        about = msgspec.structs.replace(about, sha256=_digest(about, tensors))
        return to_safetensors(tensors, {_KEY: msgspec.json.encode(about).decode()})
    except (msgspec.MsgspecError, SafetensorError, KeyError, ValueError, OverflowError) as e:
        raise SnapshotError(f"the states of {len(rows)} sessions cannot be saved: {e}") from e


def from_bytes(raw: bytes) -> tuple[StateRows, Keys]:
    """The rows in the bytes of a file, and the keys of sessions that are gone; arrays are read-only.

    Raises:
        SnapshotError: they are damaged, or no such file.

    """
    try:
        return _unpack(raw)
    except (msgspec.MsgspecError, SafetensorError, KeyError, ValueError, OverflowError, RecursionError) as e:
        raise SnapshotError(f"these {len(raw)} bytes are no states of sessions, or damaged ones: {e}") from e


def _unpack(raw: bytes) -> tuple[StateRows, Keys]:
    header = int.from_bytes(raw[:8], "little")
    if not 8 + header <= len(raw):
        raise ValueError("it is cut off")
    metadata = msgspec.json.decode(raw[8 : 8 + header], type=dict[str, msgspec.Raw])["__metadata__"]
    about = msgspec.json.decode(msgspec.json.decode(metadata, type=dict[str, str])[_KEY], type=_About)
    if about.version != _VERSION:
        raise ValueError(f"expected version {_VERSION}, got {about.version}")
    tensors = from_safetensors(raw)
    if _digest(about, tensors) != about.sha256:
        raise ValueError("the sha256 does not match the content")
    count = len(about.sessions)
    fresh, tokens = tensors["fresh"], tensors[TOKEN_SHA256]
    states = {name.removeprefix(_STATE): of for name, of in tensors.items() if name.startswith(_STATE)}
    columns = (fresh, tokens, tensors["tick_index"], tensors["saved_ns"], *states.values())
    if any(len(of) != count for of in columns) or tokens.shape != (count, 32) or tokens.dtype != np.uint8:
        raise ValueError(f"its columns are not of {count} sessions")
    return (
        StateRows(
            about.model_sha256,
            about.sessions,
            [token.tobytes().hex() for token in tokens],
            tensors["tick_index"],
            tensors["saved_ns"],
            StateBlock(fresh != 0, states),
        ),
        tensors["gone"],
    )


def _digest(about: _About, tensors: dict[str, npt.NDArray[Any]]) -> str:
    found = hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(about, sha256="")))
    for name in sorted(tensors):
        of = tensors[name]
        found.update(msgspec.json.encode((name, of.dtype.str, of.shape)))
        found.update(np.ascontiguousarray(of).data)
    return found.hexdigest()
