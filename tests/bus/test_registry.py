from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.bus import Address
from stream_mmrnn.bus import registry as running
from stream_mmrnn.bus.keys import KeyFolder
from stream_mmrnn.bus.registry import Entry, Registration, SessionSearch
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import FileError, NotRunning, UsageError
from stream_mmrnn.core.streams import Stream

pytestmark = pytest.mark.process

ADDRESS = Address("ipc:///x/publish", "ipc:///x/subscribe", "/x", "ipc:///x/bulk", "ipc:///x/view")
posix = pytest.mark.skipif(os.name != "posix", reason="file rights are those of POSIX")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private run folder, isolated from other sessions of this machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "stream-mmrnn"


def entry(session: str = "anna") -> Entry:
    return running.entry_of(session, True, ADDRESS)


def test_a_registered_session_is_found_until_it_ends(folder: Path) -> None:
    with pytest.raises(NotRunning, match="no session is running"):
        running.find()
    said = Registration(entry())
    found = running.find()
    assert (found.session, found.pid, found.engine, found.page) == ("anna", os.getpid(), True, "")
    assert found.address().view == ADDRESS.view
    said.update(page="http://127.0.0.1:1/", restarts={"camera": 2})
    assert (running.find().page, running.find().restarts) == ("http://127.0.0.1:1/", {"camera": 2})
    [file] = folder.iterdir()
    if os.name == "posix":
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    said.remove()
    said.remove()
    assert list(folder.iterdir()) == []
    assert running.everything() == []


def test_the_streams_of_a_session_are_there_without_the_arguments_of_their_sources(folder: Path) -> None:
    rows = [Stream.of("door", "vision", source="camera:rtsp://user:secret@host/x"), Stream.of("ana", "text", "ana")]
    said = Registration(running.entry_of("anna", True, ADDRESS, streams=rows))
    assert [(row.name, row.kind, row.person, row.source) for row in running.find().streams] == [
        ("door", "vision", "self", "camera"),
        ("ana", "text", "ana", "none"),
    ]
    assert "secret" not in next(folder.iterdir()).read_text()
    said.remove()


def test_one_of_several_is_selected_by_session_or_process(folder: Path) -> None:
    Registration(entry("anna"))
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        began = running.began(other.pid)
        assert began is not None
        Registration(msgspec.structs.replace(entry("bert"), pid=other.pid, started=began, began_unix_ns=1))
        assert [e.session for e in running.everything()] == ["anna", "bert"]
        assert running.find("bert").pid == other.pid
        assert running.find(str(other.pid)).session == "bert"
        with pytest.raises(UsageError, match=r"several .* 'anna' \(process \d+\), 'bert' \(process \d+\); say which"):
            running.find()
        with pytest.raises(NotRunning, match="no session 'carl' is running, but 'anna'"):
            running.find("carl")
    finally:
        other.communicate(b"\n")
    # its process was killed
    assert [e.session for e in running.everything()] == ["anna"]
    assert len(list(folder.iterdir())) == 1


def test_stale_files_are_skipped_and_removed(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(mode=0o700)
    good = entry()
    dead = msgspec.structs.replace(good, pid=2**22 + 5)
    reused = msgspec.structs.replace(good, started=good.started - 1)
    for e in (dead, reused):
        (folder / e.file_name).write_bytes(msgspec.json.encode(e))
    (folder / "1-1.json").write_bytes(msgspec.json.encode(good))  # the file name does not match
    (folder / "garbage.json").write_bytes(b"\xff")
    outside = tmp_path / "outside.json"
    outside.write_bytes(msgspec.json.encode(good))
    (folder / good.file_name).symlink_to(outside)
    assert running.everything() == []
    assert list(folder.iterdir()) == []
    assert outside.exists()


def test_a_file_that_cannot_be_read_or_understood_now_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    good = entry()
    path = folder / good.file_name
    path.write_bytes(b'{"of": "another release"}')
    assert running.everything() == []
    assert path.exists(), "its process runs"
    path.write_bytes(msgspec.json.encode(good))

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert running.everything() == []
    assert [e.session for e in running.everything()] == ["anna"]


@given(content=st.binary(max_size=200) | st.builds(msgspec.json.encode, st.dictionaries(st.text(), st.integers())))
def test_any_file_content_is_ignored_without_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", place)
        patch.setattr(tempfile, "tempdir", place)
        folder = Path(place) / "stream-mmrnn"
        folder.mkdir(0o700)
        (folder / "1-1.json").write_bytes(content)
        assert running.everything() == []
        assert list(folder.iterdir()) == []


def test_a_search_looks_until_its_time_is_over(folder: Path) -> None:
    now_ns = 0
    search = SessionSearch(lambda: running.reach("anna"), 2.5, lambda: now_ns)
    assert search.poll() is None
    now_ns = 2_499_999_999
    assert search.poll() is None
    now_ns = 2_500_000_000
    with pytest.raises(NotRunning, match=r"^no session is running; start one by `stream-mmrnn live` \(waited 2.5 s\)$"):
        search.poll()
    Registration(entry())
    found = search.poll()
    assert found is not None
    assert found[1] == running.find()
    with pytest.raises(NotRunning, match=r"^no session 'bert' is running, but 'anna' \(process \d+\)$"):
        SessionSearch(lambda: running.reach("bert"), 0).poll()
    with pytest.raises(UsageError, match="no address of a bus"):
        SessionSearch(lambda: running.reach(address="nix"), 2.5).poll()


@posix
def test_a_folder_that_is_not_private_is_refused(folder: Path, tmp_path: Path) -> None:
    second = config.run_folders()[1]
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(FileError, match="open to others"):
        running.everything()
    # the next folder is used
    said = Registration(entry())
    assert [e.session for e in running.everything()] == ["anna"]
    assert len(list(second.iterdir())) == 1
    said.remove()
    second.rmdir()
    second.symlink_to(tmp_path)
    with pytest.raises(FileError, match="is no folder"):
        Registration(entry())


@posix
@pytest.mark.skipif(os.name == "posix" and os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    for place in config.run_folders():
        place.mkdir(mode=0o700)
        os.chown(place, 12345, -1)
    with pytest.raises(FileError, match="belongs to another user"):
        Registration(entry())
    with pytest.raises(FileError, match="belongs to another user"):
        running.find()


def test_without_a_run_folder_the_temporary_one_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "relative/folder", "/no/such/folder"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        said = Registration(entry())
        assert running.find().session == "anna"
        said.remove()


def test_a_bus_is_found_by_its_address_and_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    made = KeyFolder.new(keys)
    for text in ("127.0.0.1:5000", "tcp://127.0.0.1:5000"):
        address, found = running.reach(address=text)
        assert (address.publish, address.view, address.keys, found) == (
            "tcp://127.0.0.1:5000", "tcp://127.0.0.1:5003", None, None,
        )  # fmt: skip
    assert running.reach(address="[::1]:5000")[0].subscribe == "tcp://[::1]:5001"
    guarded, _ = running.reach(address="host.example:5000", keys=keys)
    assert guarded.keys is not None
    assert guarded.keys.server == made.server
    elsewhere, _ = running.reach(address="host.example:5000", keys=keys, server_key="x" * 40)
    assert elsewhere.keys is not None
    assert elsewhere.keys.server == "x" * 40
    for wrong in ("nix", ":5000", "host:", "host:0", "host:70000", "host:1e3", "tcp://"):
        with pytest.raises(UsageError, match="no address of a bus"):
            running.reach(address=wrong)
    with pytest.raises(UsageError, match="give the folder of keys"):
        running.reach(address="host:5000", server_key="x" * 40)
    with pytest.raises(FileError, match="there is no folder of keys"):
        running.reach(address="host:5000", keys=tmp_path / "nix")
