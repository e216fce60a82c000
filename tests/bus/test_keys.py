"""Keys and tokens as files, the commands that create them, and a session that requires them."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from harness import COMMAND, Running

from stream_mmrnn.bus import Address, Publisher, Subscriber, keys, new_pair
from stream_mmrnn.bus.keys import KeyFolder, token
from stream_mmrnn.core.errors import FileError, UsageError

modes = pytest.mark.skipif(sys.platform == "win32", reason="needs the rights of POSIX files")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def folder(tmp_path: Path) -> KeyFolder:
    return KeyFolder.new(tmp_path / "deep" / "keys")


@modes
def test_keys_are_private_and_never_overwritten(folder: KeyFolder, tmp_path: Path) -> None:
    assert mode(folder.path) == 0o700
    files = [p for p in folder.path.rglob("*") if p.is_file()]
    assert {p.name for p in files} == {"server.key", "client.key"}
    before = {p: p.read_bytes() for p in files}
    for p in files:
        assert mode(p) == 0o600
    with pytest.raises(FileError, match="nothing was changed"):
        KeyFolder.new(folder.path)
    assert {p: p.read_bytes() for p in files} == before
    assert sorted(p.name for p in folder.path.parent.iterdir()) == ["keys"], "nothing half-made is left"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError):
        KeyFolder.new(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_two_folders_share_nothing(tmp_path: Path) -> None:
    a, b = KeyFolder.new(tmp_path / "a"), KeyFolder.new(tmp_path / "b")
    assert len({a.server, a.client, b.server, b.client}) == 4
    assert a.keys().server == a.server
    assert a.keys(b.server).server == b.server
    assert a.keys().public == a.client
    assert a.keys().secret not in repr(a.list())
    assert KeyFolder(a.path).keys() == a.keys()


def test_rights_are_granted_listed_and_removed(folder: KeyFolder, tmp_path: Path) -> None:
    (viewer, _), (robot, _) = new_pair(), new_pair()
    assert folder.allow("viewer", viewer) == {"name": "viewer", "public": viewer, "rights": ["read"]}
    other = KeyFolder.new(tmp_path / "other")
    folder.allow("other", str(other.path / "client.key"), write=True)
    (tmp_path / "robot.txt").write_text(robot + "\n")
    folder.allow("robot", str(tmp_path / "robot.txt"))
    listed = {row["name"]: row for row in folder.list()["allowed"]}
    assert {n: r["rights"] for n, r in listed.items()} == {
        "viewer": ["read"],
        "other": ["read", "write"],
        "robot": ["read"],
    }
    assert listed["other"]["public"] == other.client
    for right, expected in (("read", (True, True, True)), ("write", (False, True, False))):
        assert tuple(folder.allows(right, k) for k in (viewer, other.client, robot)) == expected  # type: ignore[arg-type]
        assert folder.allows(right, folder.client)  # type: ignore[arg-type]
        assert not folder.allows(right, folder.server)  # type: ignore[arg-type]
        assert not folder.allows(right, new_pair()[0])  # type: ignore[arg-type]
    assert folder.remove("other") == {"name": "other", "rights": ["read", "write"]}
    assert not folder.allows("read", other.client)
    assert not folder.allows("write", other.client)
    with pytest.raises(UsageError, match="no key 'other'; there are robot, viewer"):
        folder.remove("other")
    with pytest.raises(UsageError, match="already"):
        folder.allow("viewer", new_pair()[0])
    with pytest.raises(UsageError, match="already"):
        folder.allow("again", viewer)


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "../server", "a\x00b", "x" * 65, "ä", "a b"])
def test_names_cannot_point_outside_their_folder(folder: KeyFolder, name: str) -> None:
    before = sorted(p for p in folder.path.parent.parent.rglob("*"))
    with pytest.raises(UsageError, match="is no name for a key"):
        folder.allow(name, new_pair()[0])
    with pytest.raises(UsageError):
        folder.remove(name)
    assert sorted(p for p in folder.path.parent.parent.rglob("*")) == before


@pytest.mark.parametrize("key", ["", "short", "x" * 41, "é" * 40, "/nothing/there", '"' * 40])
def test_invalid_keys_are_refused(folder: KeyFolder, key: str) -> None:
    with pytest.raises(UsageError, match="no public key"):
        folder.allow("name", key)
    assert folder.list()["allowed"] == []


def test_a_damaged_key_file_gives_no_right(folder: KeyFolder) -> None:
    (folder.path / "read" / "junk").write_bytes(b"\xff" * 100)
    (folder.path / "read" / ".hidden").write_text(new_pair()[0])
    (folder.path / "read" / "folder").mkdir()
    assert folder.list()["allowed"] == []
    (folder.path / "write").rmdir()
    assert not folder.allows("write", new_pair()[0])
    folder.allow("late", new_pair()[0], write=True)
    assert folder.list()["allowed"][0]["rights"] == ["read", "write"]


@modes
def test_files_that_others_can_read_are_not_used(folder: KeyFolder, tmp_path: Path) -> None:
    (folder.path / "server.key").chmod(0o640)
    with pytest.raises(FileError, match="can be read by others"):
        KeyFolder(folder.path)
    (folder.path / "server.key").chmod(0o600)
    folder.path.chmod(0o755)
    with pytest.raises(FileError, match="is open to others"):
        KeyFolder(folder.path)
    folder.path.chmod(0o700)
    (folder.path / "client.key").write_text('public = "x"\nsecret = "y"\n')
    with pytest.raises(FileError, match="no key pair"):
        KeyFolder(folder.path)
    with pytest.raises(FileError, match="there is no folder of keys"):
        KeyFolder(tmp_path / "nowhere")


@modes
def test_a_token_is_the_same_for_all_who_create_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process asks whenever the file has just been opened, or is about to appear."""
    path, others = tmp_path / "token", list[str]()
    open_file, link = os.open, os.link

    def opened(at: object, *args: int) -> int:
        found = open_file(at, *args)  # type: ignore[call-overload]
        if at == path:
            others.append(token(path)[0])
        return found

    def linked(*args: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        others.append(token(path)[0])
        link(*args)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "link", linked)
    text, fresh = token(path)
    assert not fresh
    assert others == [text]
    assert [of.name for of in tmp_path.iterdir()] == ["token"]


def test_a_token_can_be_created_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    made, fresh = token(tmp_path / "token")
    assert fresh
    assert token(tmp_path / "token") == (made, False)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_token_is_created_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    path = tmp_path / "new" / "token"
    made, fresh = token(path)
    assert fresh
    assert len(made) >= 40
    assert mode(path) == 0o600
    assert token(path) == (made, False)
    with monkeypatch.context() as patch:  # a folder in which nothing can be made
        patch.setattr(keys, "_write_whole", refuse)
        assert token(path) == (made, False)
        with pytest.raises(FileError, match="cannot be made: Permission denied"):
            token(tmp_path / "none")
    path.chmod(0o644)
    with pytest.raises(FileError, match="can be read by others"):
        token(path)
    for text in ("short", "", "with spaces in between", "semi;colon-semi;colon"):
        path.chmod(0o600)
        path.write_text(text)
        with pytest.raises(FileError, match="is not 16 characters"):
            token(path)


def cli(*args: object) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}, done.stderr


@pytest.mark.process
def test_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    code, made, _ = cli("keys", "new", path, "--json")
    assert (code, made["allowed"]) == (0, [])
    assert "secret" not in json.dumps(made)
    code, _, err = cli("keys", "new", path)
    assert code == 2
    assert "nothing was changed" in err
    key = "-" + new_pair()[0][1:]  # looks like an option
    code, allowed, err = cli("keys", "allow", "--folder", path, "--json", "--", "viewer", key)
    assert (code, allowed["rights"]) == (0, ["read"]), err
    code, listed, _ = cli("keys", "list", "--folder", path, "--json")
    assert (code, listed["allowed"]) == (0, [{"name": "viewer", "public": key, "rights": ["read"]}])
    code, _, _ = cli("keys", "remove", "viewer", "--folder", path, "--json")
    assert code == 0
    code, _, err = cli("keys", "remove", "viewer", "--folder", path, "--json")
    assert code == 2
    assert "there are none" in err
    code, _, err = cli("keys", "list", "--folder", tmp_path / "nowhere")
    assert code == 2
    assert "there is no folder of keys" in err


@pytest.mark.process
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[bus]\ntransport='tcp'\nhost='0.0.0.0'\n", "can be reached by others: make keys"),
        ("[bus]\ntransport='tcp'\nhost='0.0.0.0'\nkeys='{nowhere}'\n", "there is no folder of keys"),
        ("[bus]\ntransport='tcp'\nkeys='{nowhere}'\n", "there is no folder of keys"),
        ("[dashboard]\nhost='0.0.0.0'\n", "name a file for its token"),
        ("[dashboard]\nhost='0.0.0.0'\ntoken_file='{bad}'\n", "is not 16 characters"),
    ],
)
def test_public_addresses_without_keys_do_not_start(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "bad").write_text("x")
    (tmp_path / "bad").chmod(0o600)
    settings = tmp_path / "settings.toml"
    settings.write_text(text.replace("{nowhere}", str(tmp_path / "nowhere")).replace("{bad}", str(tmp_path / "bad")))
    code, _, err = cli("live", "-c", settings, "--source", "synthetic", "--duration", "1")
    assert code == 2, err
    assert words in " ".join(err.split())


@pytest.mark.process
def test_a_session_with_keys(model: Path, tmp_path: Path) -> None:
    """Our own processes connect; a viewer with a key reads; all others are refused and counted in the summary."""
    ours, theirs, stranger = (KeyFolder.new(tmp_path / name) for name in ("ours", "theirs", "stranger"))
    ours.allow("viewer", theirs.client)
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f"[bus]\ntransport='tcp'\nkeys='{ours.path}'\n[dashboard]\nhost='0.0.0.0'\ntoken_file='{tmp_path / 'token'}'\n"
    )
    path = tmp_path / "a.mcap"
    with closing(Running("-c", settings, "--source", "synthetic", "--model", model, "--record", path)) as live:
        found = live.wait_for(lambda: re.search(r"bus: (\S+), port (\d+), server key (\S{40})", "".join(live.lines)))
        host, port, server = found.group(1), int(found.group(2)), found.group(3)
        assert server == ours.server
        live.wait_for(lambda: any("shown this once" in line for line in live.lines))
        secret = (tmp_path / "token").read_text().strip()
        assert any(secret in line for line in live.lines), "a new token is shown"
        address = Address.at(host, port, theirs.keys(server))
        good = Subscriber(address, ["prediction"], 100, "drop_oldest")
        live.wait_for(lambda: good.receive(100))
        bad = [
            Subscriber(address, ["prediction"], 100, "latest", stranger.keys(server)),
            Subscriber(Address.at(host, port), ["prediction"], 100),
        ]
        publisher = Publisher(address, 10)  # a viewer must not publish
        assert not publisher.wait_for_reader("clock", 1.0)
        assert [b.receive(300) for b in bad] == [None, None]
        live.wait_for(lambda: any("broker: refused connections" in line for line in live.lines))
        ours.remove("viewer")
        time.sleep(0.1)
        late = Subscriber(address, ["prediction"], 100, "latest")
        assert late.receive(500) is None
        assert good.receive(2000) is not None, "a connection that is open lasts"
        time.sleep(0.7)
        code, summary, _ = live.end()
        publisher.close(0)
        for r in (good, late, *bad):
            r.close()
    assert code == 0
    assert summary["balanced"], summary["streams"]
    denied = summary["denied"]["broker"]
    # refused: the stranger, the viewer that publishes, the removed key; the client without a key retries
    assert denied["key_not_allowed"] == 3
    # a connection may fail before the handshake shows the reason
    assert denied.get("no_key", 0) + denied.get("unfinished", 0) >= 1
    assert set(denied) <= {"key_not_allowed", "no_key", "unfinished"}
    data = path.read_bytes() + json.dumps(summary).encode() + "".join(live.lines).encode()
    assert ours.keys().secret.encode() not in data
    assert os.fsencode(secret) not in path.read_bytes()
