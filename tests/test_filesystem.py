"""`VFSFilesystem` as pyftpdlib sees it: paths, listings that stat nothing twice, and files for any data channel."""

from __future__ import annotations

import errno
import os
import stat
import time
from typing import Any

import pytest
from pyftpdlib.exceptions import FilesystemError
from pyftpdlib.filesystems import AbstractedFS
from pyftpdlib.handlers import DTPHandler

from ftpvfs import VFSDTPHandler, VFSFilesystem
from ftpvfs.vfs.handle import WriteHandle
from tests.conftest import Store


class Session:
    """What a filesystem uses of a control connection."""

    use_gmt_times = True
    encoding = "utf8"
    unicode_errors = "surrogateescape"
    data_channel = None
    server = None
    failure: OSError | None = None

    def __init__(self, dtp_handler: type = VFSDTPHandler) -> None:
        self.dtp_handler = dtp_handler


@pytest.fixture
def store(memory_store: Store) -> Store:
    return memory_store


@pytest.fixture
def make(store: Store, make_vfs: Any) -> Any:
    """make(root="/", session=None) -> a filesystem over the store."""
    filesystem = type("Filesystem", (VFSFilesystem,), {"vfs": make_vfs(store)})
    return lambda root="/", session=None: filesystem(root, session or Session())


def test_every_method_of_pyftpdlibs_has_one_of_ours() -> None:
    theirs = {name for name, value in vars(AbstractedFS).items() if callable(value) and not name.startswith("_")}
    assert theirs <= set(vars(VFSFilesystem))


@pytest.mark.parametrize(
    ("root", "cwd", "path", "expected"),
    [
        ("/", "/", "a", "/a"),
        ("/", "/a/b", "../c", "/a/c"),
        ("/", "/", "../../etc/passwd", "/etc/passwd"),
        ("/home", "/", "/", "/home"),
        ("/home", "/", "../../etc", "/home/etc"),
        ("/home", "/x", "a//b/./c/", "/home/x/a/b/c"),
        ("/home", "/x", "", "/home/x"),
        ("/home", "/", "//a", "/home/a"),
    ],
)
def test_ftp_paths_stay_in_the_home(make: Any, root: str, cwd: str, path: str, expected: str) -> None:
    filesystem = make(root)
    filesystem.cwd = cwd
    real = filesystem.ftp2fs(path)
    assert real == expected
    assert filesystem.validpath(real)
    assert filesystem.fs2ftp(real) == filesystem.ftpnorm(path)


def test_paths_outside_the_home_are_not_valid(make: Any) -> None:
    filesystem = make("/home")
    for path in ("/", "/homes", "/other", "/home/../other"):
        assert not filesystem.validpath(os.path.normpath(path)), path
        assert filesystem.fs2ftp(path) == "/"


def test_nothing_touches_this_machines_disk(make: Any, tmp_path: Any) -> None:
    (tmp_path / "here").mkdir()
    filesystem = make()
    assert not filesystem.lexists(str(tmp_path))
    assert not filesystem.isdir(str(tmp_path / "here"))
    assert filesystem.realpath("/a/../b") == "/a/../b"
    cwd = os.getcwd()
    filesystem.mkdir("/folder")
    filesystem.chdir("/folder")
    assert filesystem.cwd == "/folder"
    assert os.getcwd() == cwd


def test_failures_are_told_with_their_errno(make: Any) -> None:
    session = Session()
    filesystem = make(session=session)
    with pytest.raises(FilesystemError) as caught:
        filesystem.open("/missing", "rb")
    assert caught.value.errno == errno.ENOENT
    assert session.failure is not None
    assert session.failure.filename == "missing"
    with pytest.raises(FilesystemError):
        filesystem.chmod("/missing", 0o644)
    with pytest.raises(FilesystemError):
        filesystem.readlink("/missing")


def test_listings_ask_the_vfs_once(make: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a", "c"):
        store.write(name, name.encode())
    filesystem = make()
    names = filesystem.listdir("/")
    names.sort()
    for question in ("stat", "lstat", "lookup", "listing"):
        monkeypatch.setattr(filesystem.vfs, question, None)
    assert b"".join(filesystem.format_list("/", names)).count(b"\r\n") == 3
    first = b"".join(filesystem.format_mlsx("/", names, "elr", ["type", "size"]))
    assert first == b"size=1;type=file; a\r\nsize=1;type=file; b\r\nsize=1;type=file; c\r\n"


def test_names_that_somebody_chose_are_formatted_alone(make: Any, store: Store) -> None:
    for name in ("a", "b"):
        store.write(name, name.encode())
    filesystem = make()
    for chosen in (["b"], filesystem.listdir("/")[1:], ["b", "missing"]):
        assert b"".join(filesystem.format_mlsx("/", chosen, "elr", ["size"])) == b"size=1; b\r\n"
    with pytest.raises(FilesystemError):
        list(filesystem.format_mlsx("/", ["missing"], "elr", ["size"], ignore_err=False))


def test_permissions_in_mlsx_are_those_of_the_kind(make: Any, store: Store) -> None:
    store.write("folder/a", b"")
    filesystem = make()
    lines = b"".join(filesystem.format_mlsx("/folder", ["a"], "elradfmwMT", ["perm"]))
    assert lines == b"perm=radfwMT; a\r\n"
    lines = b"".join(filesystem.format_mlsx("/", ["folder"], "elradfmwMT", ["perm"]))
    assert lines == b"perm=eldfmMTcp; folder\r\n"


DAY = 86400


@pytest.mark.parametrize(
    ("age", "shape"),
    [
        (0, "%b %d %H:%M"),
        (100 * DAY, "%b %d %H:%M"),
        (200 * DAY, "%b %d  %Y"),
        (-10, "%b %d %H:%M"),
        (-9 * DAY, "%b %d  %Y"),
    ],
)
def test_old_and_future_files_show_their_year(make: Any, store: Store, age: float, shape: str) -> None:
    store.write("a", b"")
    filesystem = make()
    moment = time.time() - age
    filesystem.utime("/a", moment)
    line = b"".join(filesystem.format_list("/", filesystem.listdir("/"))).decode()
    assert line.endswith(f" {time.strftime(shape, time.gmtime(moment))} a\r\n")


def test_a_home_that_is_missing_is_an_empty_folder(make: Any) -> None:
    filesystem = make("/home/alice")
    assert filesystem.isdir("/home/alice")
    assert filesystem.listdir("/home/alice") == []
    assert stat.S_ISDIR(filesystem.stat("/home/alice").st_mode)
    with pytest.raises(FilesystemError):
        filesystem.listdir("/home/alice/sub")


class Channel(DTPHandler):
    """A stock data channel that has not been connected, for what a file does with it."""

    def __init__(self) -> None:
        self.transfer_finished = False
        self._resp: Any = ()
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_a_file_for_our_channel_is_the_vfss_own(make: Any) -> None:
    file = make().open("/a", "wb")
    assert isinstance(file, WriteHandle)
    file.close()


@pytest.mark.parametrize("finished", [True, False])
def test_a_file_for_a_stock_channel_is_published_by_close_when_it_is_finished(
    make: Any, store: Store, finished: bool
) -> None:
    session: Any = Session(DTPHandler)
    file = make(session=session).open("/a", "wb")
    session.data_channel = Channel()
    file.write(b"content")
    session.data_channel.transfer_finished = finished
    file.close()
    assert file.closed
    assert store.list() == ({"a"} if finished else set())


def test_new_names_are_new(make: Any, store: Store) -> None:
    filesystem = make()
    seen = set()
    for _ in range(20):
        file = filesystem.mkstemp(prefix="p.", suffix=".s", dir="/")
        assert file.name.startswith("/p.")
        assert file.name.endswith(".s")
        seen.add(file.name)
        file.close()
    assert len(seen) == 20
    assert store.list() == set()
