"""Keys as files: the broker's key pair, this user's own pair, the keys that are allowed, and tokens.

    FOLDER/             0700, created atomically
      server.key        the broker's pair: every client must know its public key
      client.key        the pair of this user's processes, which may read and write
      read/NAME         the public key of a client that may subscribe
      write/NAME        the public key of a client that may also publish

Files are 0600; a file that others could read is refused.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from stream_mmrnn.bus import Authenticator, Keys, Right, new_pair, public_of
from stream_mmrnn.core.errors import FileError, UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_PUBLIC = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}", re.ASCII)
_RIGHTS: tuple[Right, ...] = ("read", "write")
_MIN_TOKEN = 16
_MAX_BYTES = 4096
"""Longer files are refused."""


def _write_new(path: Path, text: str) -> None:
    """Create a file that only this user can read; raises FileExistsError if it exists."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(text)


def _write_whole(path: Path, text: str) -> None:
    """As `_write_new`, for a file that several processes create: none of them finds it without its text."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    _write_new(beside, text)
    try:
        os.link(beside, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system
        _write_new(path, text)
    finally:
        beside.unlink()


def _read(path: Path, what: str, private: bool = True) -> str:
    """Read a small key file. Raises FileError if it is missing, too long or, with `private`, readable by others."""
    try:
        with path.open("rb") as file:
            mode, data = os.fstat(file.fileno()).st_mode, file.read(_MAX_BYTES + 1)
        text = data.decode("ascii")
    except OSError as e:
        raise FileError(f"{what} {path} cannot be read: {e.strerror}; give its path, and see who may read it") from e
    except UnicodeDecodeError as e:
        raise FileError(f"{what} {path} is no text; make a new one") from e
    if len(data) > _MAX_BYTES:
        raise FileError(f"{what} {path} is too long for a key file; make a new one")
    if private and mode & 0o077 and sys.platform != "win32":
        raise FileError(f"{what} {path} can be read by others; take their rights away (chmod 600) or make a new one")
    return text


def _pair(path: Path) -> tuple[str, str]:
    """The public and secret key in a .key file."""
    try:
        table = tomllib.loads(_read(path, "the key"))
        secret = str(table["secret"])
        return public_of(secret), secret
    except (tomllib.TOMLDecodeError, KeyError, ValueError) as e:
        raise FileError(f"{path} holds no key pair; make a new one by stream-mmrnn keys new") from e


def _public_key(key_or_file: str) -> str:
    """A public key, from its text or from a file (a .key file, or a file with only the key)."""
    text = key_or_file.strip()
    if not _PUBLIC.fullmatch(text) and Path(key_or_file).is_file():
        text = _read(Path(key_or_file), "the public key", private=False).strip()
        if found := re.search(r'^public = "([^"]*)"$', text, re.MULTILINE):
            text = found.group(1)
    if not _PUBLIC.fullmatch(text):
        raise UsageError(f"{key_or_file!r} is no public key (40 characters) nor a file that holds one")
    return text


def _checked(name: str) -> str:
    """The name, if it cannot point outside its folder; else raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a key: use letters, digits, . _ and -, 64 at most, no . in front")
    return name


class KeyFolder:
    """A folder of keys."""

    def __init__(self, path: Path) -> None:
        """Open an existing folder. Raises FileError if it is missing, or other users have access."""
        self.path = path
        try:
            mode = path.stat().st_mode
        except OSError as e:
            raise FileError(f"there is no folder of keys {path}; make one by stream-mmrnn keys new {path}") from e
        if mode & 0o077 and sys.platform != "win32":
            raise FileError(f"the folder of keys {path} is open to others; take their rights away (chmod 700)")
        self.server, self._server_secret = _pair(path / "server.key")
        self.client, self._client_secret = _pair(path / "client.key")

    @classmethod
    def new(cls, path: Path) -> KeyFolder:
        """Create the folder with new key pairs; raises FileError if it exists and is not empty."""
        made = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # atomic: create a temporary folder and rename it; an existing folder that is not empty is not replaced
            made = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            for name in ("server", "client"):
                public, secret = new_pair()
                while public.startswith("-"):  # a command line would parse it as an option
                    public, secret = new_pair()
                _write_new(made / f"{name}.key", f'public = "{public}"\nsecret = "{secret}"\n')
            for right in _RIGHTS:
                (made / right).mkdir(0o700)
            made.rename(path)
        except OSError as e:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            raise FileError(f"{path} is there already or cannot be made ({e.strerror}); nothing was changed") from e
        return cls(path)

    def keys(self, server: str = "") -> Keys:
        """The keys of our own processes. For another machine's bus, `server` is the public key of its server."""
        return Keys(self.client, self._client_secret, server or self.server)

    def authenticator(self) -> Authenticator:
        return Authenticator(self._server_secret, self.allows)

    def allows(self, right: Right, public: str) -> bool:
        """Whether a key has a right. Reads the files each time, so that a removal takes effect immediately."""
        if hmac.compare_digest(public, self.client):
            return True
        return any(hmac.compare_digest(public, known) for known in self._listed(right).values())

    def _listed(self, right: Right) -> dict[str, str]:
        """Public keys by name; files without a valid key are ignored."""
        found = {}
        try:
            for path in sorted((self.path / right).iterdir()):
                if _NAME.fullmatch(path.name) and path.is_file():
                    with path.open("rb") as file:
                        text = file.read(64).decode("ascii", "replace").strip()
                    if _PUBLIC.fullmatch(text):
                        found[path.name] = text
        except OSError:
            return {}
        return found

    def allow(self, name: str, key_or_file: str, write: bool = False) -> dict[str, Any]:
        """Allow a public key to read, or to read and write; raises UsageError if name or key are taken or invalid."""
        public = _public_key(key_or_file)
        if _checked(name) in self._listed("read"):
            raise UsageError(f"there is a key {name!r} already; remove it first, or take another name")
        if public in self._listed("read").values():
            raise UsageError("this key is allowed already, under another name")
        rights: tuple[Right, ...] = _RIGHTS if write else ("read",)
        try:
            for right in reversed(rights):  # `read` last: the key is listed once that file exists
                folder = self.path / right
                folder.mkdir(0o700, exist_ok=True)
                (folder / name).unlink(missing_ok=True)  # left by an earlier `allow` that was interrupted
                _write_new(folder / name, public + "\n")
        except OSError as e:
            raise FileError(f"the key {name!r} cannot be written to {self.path}: {e.strerror}") from e
        return {"name": name, "public": public, "rights": list(rights)}

    def remove(self, name: str) -> dict[str, Any]:
        """Remove a key's rights. Raises UsageError if there is no key of this name."""
        gone = [right for right in _RIGHTS if name in self._listed(right)]
        if not gone:
            known = ", ".join(self._listed("read")) or "none"
            raise UsageError(f"there is no key {_checked(name)!r}; there are {known}")
        for right in gone:
            (self.path / right / name).unlink()
        return {"name": name, "rights": gone}

    def list(self) -> dict[str, Any]:
        """The public keys and rights, without secrets."""
        read, write = self._listed("read"), self._listed("write")
        return {
            "folder": str(self.path),
            "server": self.server,
            "client": self.client,
            "allowed": [
                {"name": n, "public": read.get(n) or write[n], "rights": [r for r in _RIGHTS if n in self._listed(r)]}
                for n in sorted({*read, *write})
            ],
        }


def token(path: Path, setting: str = "dashboard.token_file") -> tuple[str, bool]:
    """The token in a file, and whether it is new: if there is no file, one is created. `setting` names the file.

    Raises:
        FileError: others can read the file, or it holds no token of at least 16 characters.

    """
    fresh = secrets.token_urlsafe(32)
    if not os.path.lexists(path):  # where nothing can be written, a token may lie all the same
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, fresh + "\n")
            return fresh, True
        except FileExistsError:
            pass
        except OSError as e:
            raise FileError(f"the token {path} cannot be made: {e.strerror}; name another {setting}") from e
    text = _read(path, "the token").strip()
    if not re.fullmatch(rf"[A-Za-z0-9._~-]{{{_MIN_TOKEN},}}", text):
        raise FileError(
            f"the token {path} is not {_MIN_TOKEN} characters or more of letters, digits, - . _ and ~; remove the file "
            "and a new one is made"
        )
    return text, False
