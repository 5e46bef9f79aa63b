"""VFS calls on every store: results, errno and path of every failure, and what the store has afterwards."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftpvfs import VFS
from ftpvfs.clock import Clock
from ftpvfs.config import vfs_options
from tests.conftest import Store, program_environment
from tests.servers import FaultProxy

MakeProxy = Callable[[Any], FaultProxy]
OBJECT_STORES = ["s3", "gs"]
WHEN = 1_600_000_000.0


class MovedClock(Clock):
    """A clock that stands still until a test moves it; its waits end when the test says so."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self.turns = threading.Semaphore(0)
        self.waits = threading.Semaphore(0)

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.waits.release()
        while not event.is_set() and not self.turns.acquire(timeout=0.05):
            pass
        return event.is_set()


@pytest.fixture
def clock() -> MovedClock:
    return MovedClock()


@pytest.fixture
def vfs_of(make_vfs: Callable[..., VFS], tmp_path: Path) -> Callable[..., VFS]:
    """vfs_of(store, **options) -> VFS that polls nothing; all of one test share an index, as processes would."""

    def make(store: Store, **options: Any) -> VFS:
        return make_vfs(store, **{"cache_dir": str(tmp_path / "cache"), "poll_interval": None, **options})

    return make


@pytest.fixture
def vfs(store: Store, vfs_of: Callable[..., VFS]) -> VFS:
    """A VFS over each kind of store in turn."""
    return vfs_of(store)


def put(vfs: VFS, path: str, data: bytes = b"x") -> None:
    with vfs.open(path, "wb") as handle:
        handle.write(data)


def get(vfs: VFS, path: str) -> bytes:
    with vfs.open(path) as handle:
        return bytes(handle.read())


def fails(code: int, path: str, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
    """The call raises an OSError with this errno that names this path."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its message is the system's
        call(*arguments, **keywords)
    assert (caught.value.errno, caught.value.filename) == (code, path), repr(caught.value)


# --- looking


def test_looking_at_files_and_folders(store: Store, vfs: VFS) -> None:
    store.write("d/sub/deep.txt", b"deep")
    store.write("d/a.txt", b"12345")
    store.write("top.txt", b"")
    assert vfs.listdir() == vfs.listdir("/") == ["d", "top.txt"]
    assert vfs.listdir("d") == vfs.listdir("//d/./sub/..//") == ["a.txt", "sub"]
    assert [(entry.name, entry.path, entry.is_dir(), entry.is_file()) for entry in vfs.scandir("d")] == [
        ("a.txt", "d/a.txt", False, True),
        ("sub", "d/sub", True, False),
    ]
    assert vfs.stat("d/a.txt").st_size == next(vfs.scandir("d")).stat().st_size == 5
    assert stat.S_ISREG(vfs.stat("d/a.txt").st_mode)
    assert stat.S_ISDIR(vfs.lstat("d/sub").st_mode)
    assert stat.S_ISDIR(vfs.stat("").st_mode)
    assert (vfs.exists("d"), vfs.isdir("d"), vfs.isfile("d")) == (True, True, False)
    assert (vfs.exists("d/a.txt"), vfs.isdir("d/a.txt"), vfs.isfile("d/a.txt")) == (True, False, True)
    for nothing in ("nothing", "nothing/at/all", "d/a.txt/below", "d/sub/nothing"):
        assert (vfs.exists(nothing), vfs.isdir(nothing), vfs.isfile(nothing)) == (False, False, False)
    assert vfs.exists("") is vfs.isdir("/") is True


def test_the_same_path_has_the_same_inode_in_every_process(store: Store, vfs_of: Callable[..., VFS]) -> None:
    store.write("a")
    store.write("b")
    inodes = {vfs_of(store).stat("a").st_ino for _ in range(2)}
    assert len(inodes) == 1
    assert vfs_of(store).stat("b").st_ino not in inodes


def test_scandir_fails_when_it_is_called_and_not_later(vfs: VFS) -> None:
    fails(errno.ENOENT, "nothing", vfs.scandir, "nothing")


def test_owner_and_rights_come_from_the_options(store: Store, vfs_of: Callable[..., VFS]) -> None:
    store.write("d/f", b"x")
    plain = vfs_of(store)
    assert stat.S_IMODE(plain.stat("d").st_mode) == 0o755
    assert stat.S_IMODE(plain.stat("d/f").st_mode) == 0o644
    assert (plain.stat("d/f").st_uid, plain.stat("d/f").st_gid) == (os.getuid(), os.getgid())
    chosen = vfs_of(store, uid=7, gid=8, umask="027", dir_perms="770", file_perms="666")
    assert stat.S_IMODE(chosen.stat("d").st_mode) == 0o750
    assert stat.S_IMODE(chosen.stat("d/f").st_mode) == 0o640
    assert (chosen.stat("d").st_uid, chosen.stat("d").st_gid) == (7, 8)


def test_space_is_the_stores_or_the_users_or_plenty(store: Store, vfs_of: Callable[..., VFS]) -> None:
    space = vfs_of(store).statvfs()
    assert space.f_blocks * space.f_frsize > 2**20
    assert space.f_bavail <= space.f_blocks
    if store.kind == "local":
        assert space.f_blocks * space.f_frsize == pytest.approx(
            os.statvfs(store.root).f_blocks * os.statvfs(store.root).f_frsize, abs=4096
        )
    limited = vfs_of(store, disk_space_total_size="10G").statvfs("")
    assert limited.f_blocks * limited.f_frsize == 10 * 2**30


def test_stats_and_queue_tell_what_goes_on(store: Store, vfs: VFS) -> None:
    put(vfs, "a")
    get(vfs, "a")
    vfs.listdir()
    stats = vfs.stats()
    assert stats["opened"] == {"reads": 1, "writes": 1}
    assert stats["directories"]["entries"] == 1
    assert stats["buffer_memory"] == 0
    assert stats["cache_mode"] == "off"
    assert vfs.queue() == []
    vfs.sync()


def test_a_closed_vfs_opens_again_when_it_is_used(store: Store, vfs: VFS) -> None:
    put(vfs, "a", b"1")
    vfs.close()
    vfs.close()
    assert get(vfs, "a") == b"1"
    with vfs as same:
        assert same.listdir() == ["a"]


def test_options_come_as_keywords_or_ready_made(memory_store: Store, tmp_path: Path) -> None:
    options = vfs_options(cache_dir=str(tmp_path / "cache"), read_only=True, poll_interval=None)
    with VFS(memory_store.url, options=options) as vfs:
        fails(errno.EROFS, "d", vfs.mkdir, "d")
    with pytest.raises(TypeError):
        VFS(memory_store.url, options=options, read_only=False)
    with pytest.raises(ValueError, match="dir_cache_time"):
        VFS(memory_store.url, dir_cash_time="5m")
    assert repr(vfs) == f"<VFS {memory_store.url}>"


# --- opening


def test_opening_what_cannot_be_opened(store: Store, vfs: VFS) -> None:
    store.write("a.txt", b"x")
    store.write("d/b.txt", b"x")
    for mode in ("rb", "wb", "ab", "xb", "r+b"):
        fails(errno.EISDIR, "d", vfs.open, "d", mode)
        fails(errno.EISDIR, "", vfs.open, "", mode)
        fails(errno.ENOTDIR, "a.txt/x", vfs.open, "a.txt/x", mode)
        fails(errno.ENOTDIR, "a.txt/x/y", vfs.open, "a.txt/x/y", mode)
        fails(errno.ENOENT, "no/x", vfs.open, "no/x", mode)
        fails(errno.EINVAL, "a\nb", vfs.open, "a\nb", mode)
        fails(errno.ENAMETOOLONG, "x" * 256, vfs.open, "x" * 256, mode)
    fails(errno.ENOENT, "no", vfs.open, "no")
    fails(errno.ENOENT, "no", vfs.open, "no", "r+b")
    fails(errno.EEXIST, "a.txt", vfs.open, "a.txt", "xb")
    fails(errno.EPERM, "a.txt", vfs.open, "a.txt", "ab")
    fails(errno.EPERM, "a.txt", vfs.open, "a.txt", "r+b")
    fails(errno.EINVAL, "a.txt", vfs.open, "a.txt", os.O_RDONLY | os.O_TRUNC)
    with pytest.raises(ValueError, match="mode"):
        vfs.open("a.txt", "rw")
    assert store.read("a.txt") == b"x"
    assert store.list() == {"a.txt", "d/b.txt"}


def test_a_slash_at_the_end_means_a_folder(store: Store, vfs: VFS) -> None:
    store.write("a", b"x")
    store.write("d/b", b"x")
    for name in ("a/", "a/."):
        assert not vfs.exists(name)
        assert not vfs.isfile(name)
        for call in (vfs.stat, vfs.lookup, vfs.open, vfs.remove, vfs.utime, vfs.listdir):
            with pytest.raises(NotADirectoryError):
                call(name)
        with pytest.raises(NotADirectoryError):
            vfs.truncate(name, 0)
        with pytest.raises(NotADirectoryError):
            vfs.rename(name, "b")
        with pytest.raises(NotADirectoryError):
            vfs.rename("a", "b/")
    for mode in ("wb", "ab", "xb", os.O_WRONLY | os.O_CREAT):
        with pytest.raises(IsADirectoryError):
            vfs.open("new/", mode)
    with pytest.raises(FileNotFoundError):
        vfs.open("new/")
    with pytest.raises(IsADirectoryError):
        vfs.remove("d/")
    assert vfs.isdir("d/")
    assert vfs.listdir("d/") == ["b"]
    vfs.mkdir("e/")
    vfs.rename("e/", "f/")
    vfs.rmdir("f/")
    assert store.list() == {"a", "d/b"}


def test_a_new_file_may_be_opened_in_every_writing_mode(store: Store, vfs: VFS) -> None:
    for number, mode in enumerate(["wb", "ab", "xb", "w+b", os.O_WRONLY | os.O_CREAT]):
        with vfs.open(f"new {number}", mode) as handle:
            assert not vfs.exists(f"new {number}"), "there before it was published"
            handle.write(b"content")
        assert store.read(f"new {number}") == b"content"


def test_an_overwrite_shows_the_old_file_until_the_new_one_is_whole(store: Store, vfs: VFS) -> None:
    put(vfs, "a", b"old")
    with vfs.open("a", "wb") as handle:
        handle.write(b"newer")
        assert get(vfs, "a") == b"old"
        assert vfs.stat("a").st_size == 3
    assert get(vfs, "a") == b"newer"
    assert vfs.stat("a").st_size == 5


def test_two_writers_of_one_file_leave_one_of_the_two(store: Store, vfs: VFS) -> None:
    first, second = vfs.open("a", "wb"), vfs.open("a", "wb")
    first.write(b"1" * 100_000)
    second.write(b"2" * 50_000)
    first.close()
    second.close()
    assert store.read("a") == b"2" * 50_000
    assert vfs.stat("a").st_size == 50_000


# --- changing


def test_making_and_removing_folders(store: Store, vfs: VFS) -> None:
    vfs.mkdir("d")
    vfs.mkdir("d/sub")
    assert vfs.listdir() == ["d"]
    assert vfs.listdir("d") == ["sub"]
    fails(errno.ENOTEMPTY, "d", vfs.rmdir, "d")
    vfs.rmdir("d/sub")
    assert vfs.listdir("d") == []
    vfs.rmdir("d")
    assert vfs.listdir() == []
    vfs.forget()
    assert not vfs.exists("d")
    assert store.list() == set()


def test_folders_that_cannot_be_made_or_removed(store: Store, vfs: VFS) -> None:
    store.write("a.txt")
    store.write("d/f")
    fails(errno.EEXIST, "d", vfs.mkdir, "d")
    fails(errno.EEXIST, "a.txt", vfs.mkdir, "a.txt")
    fails(errno.EEXIST, "", vfs.mkdir, "")
    fails(errno.ENOENT, "no/d", vfs.mkdir, "no/d")
    fails(errno.ENOTDIR, "a.txt/d", vfs.mkdir, "a.txt/d")
    fails(errno.ENOTEMPTY, "d", vfs.rmdir, "d")
    fails(errno.ENOTDIR, "a.txt", vfs.rmdir, "a.txt")
    fails(errno.ENOENT, "no", vfs.rmdir, "no")
    fails(errno.ENOTDIR, "a.txt/d", vfs.rmdir, "a.txt/d")
    fails(errno.EBUSY, "", vfs.rmdir, "/")
    assert store.list() == {"a.txt", "d/f"}


def test_a_folder_with_a_file_of_somebody_else_is_not_removed(store: Store, vfs: VFS) -> None:
    vfs.mkdir("d")
    assert vfs.listdir("d") == []
    store.write("d/theirs", b"x")
    fails(errno.ENOTEMPTY, "d", vfs.rmdir, "d")
    assert store.read("d/theirs") == b"x"


def test_makedirs_makes_what_is_missing(store: Store, vfs: VFS) -> None:
    vfs.makedirs("a/b/c")
    vfs.makedirs("a/b/c")
    vfs.makedirs("")
    assert vfs.isdir("a/b/c")
    put(vfs, "a/f")
    fails(errno.EEXIST, "a/f", vfs.makedirs, "a/f")
    fails(errno.ENOTDIR, "a/f/g/h", vfs.makedirs, "a/f/g/h")


def test_listing_what_cannot_be_listed(store: Store, vfs: VFS) -> None:
    store.write("a.txt", b"x")
    for call in (vfs.listdir, vfs.scandir, vfs.timed_listing):
        fails(errno.ENOENT, "no", call, "no")
        fails(errno.ENOENT, "no/more", call, "no/more")
        fails(errno.ENOTDIR, "a.txt", call, "a.txt")
        fails(errno.ENOTDIR, "a.txt/x", call, "a.txt/x")
    for path, code in (("no", errno.ENOENT), ("a.txt/x", errno.ENOTDIR), ("a\0b", errno.EINVAL)):
        fails(code, path, vfs.stat, path)
        fails(code, path, vfs.utime, path)
        fails(code, path, vfs.remove, path)
        fails(code, path, vfs.truncate, path, 0)
        fails(code, path, vfs.rename, path, "b")


def test_removing_files(store: Store, vfs: VFS) -> None:
    store.write("d/a", b"x")
    store.write("d/b", b"x")
    vfs.listdir("d")
    vfs.remove("d/a")
    assert vfs.listdir("d") == ["b"]
    assert store.list() == {"d/b"}
    fails(errno.EISDIR, "d", vfs.remove, "d")
    fails(errno.ENOENT, "d/a", vfs.remove, "d/a")
    fails(errno.EISDIR, "", vfs.remove, "")


def test_truncating(store: Store, vfs: VFS) -> None:
    store.write("d/a", b"12345")
    vfs.truncate("d/a", 5)
    fails(errno.EPERM, "d/a", vfs.truncate, "d/a", 3)
    fails(errno.EPERM, "d/a", vfs.truncate, "d/a", 9)
    fails(errno.EINVAL, "d/a", vfs.truncate, "d/a", -1)
    fails(errno.EISDIR, "d", vfs.truncate, "d", 0)
    assert store.read("d/a") == b"12345"
    vfs.truncate("d/a", 0)
    assert store.read("d/a") == b""
    assert vfs.stat("d/a").st_size == 0


def test_renaming_files(store: Store, vfs: VFS) -> None:
    put(vfs, "a", b"content")
    vfs.mkdir("d")
    vfs.rename("a", "b")
    vfs.rename("b", "d/c")
    assert (vfs.exists("a"), vfs.exists("b"), get(vfs, "d/c")) == (False, False, b"content")
    put(vfs, "other", b"other content")
    vfs.rename("other", "d/c")
    assert get(vfs, "d/c") == b"other content"
    vfs.rename("d/c", "d/c")
    assert store.list() == {"d/c"}
    assert vfs.listdir("d") == ["c"]
    assert vfs.stat("d/c").st_size == 13


def test_what_cannot_be_renamed(store: Store, vfs: VFS) -> None:
    for name in ("file", "d/f", "full/f"):
        store.write(name, name.encode())
    vfs.mkdir("empty")
    before = store.list()
    fails(errno.ENOENT, "no", vfs.rename, "no", "x")
    fails(errno.ENOENT, "no/x", vfs.rename, "file", "no/x")
    fails(errno.ENOTDIR, "file/x", vfs.rename, "d", "file/x")
    fails(errno.EISDIR, "empty", vfs.rename, "file", "empty")
    fails(errno.ENOTDIR, "file", vfs.rename, "d", "file")
    fails(errno.ENOTEMPTY, "full", vfs.rename, "d", "full")
    fails(errno.EINVAL, "d", vfs.rename, "d", "d/below")
    fails(errno.EBUSY, "", vfs.rename, "", "x")
    fails(errno.EBUSY, "d", vfs.rename, "d", "")
    vfs.rename("d", "d")
    assert store.list() == before


def test_a_read_only_vfs_changes_nothing(store: Store, vfs_of: Callable[..., VFS]) -> None:
    store.write("a", b"x")
    store.write("d/b", b"x")
    vfs = vfs_of(store, read_only=True)
    assert get(vfs, "a") == b"x"
    for call, *arguments in (
        (vfs.open, "new", "wb"),
        (vfs.open, "a", "wb"),
        (vfs.open, "a", "ab"),
        (vfs.mkdir, "new"),
        (vfs.makedirs, "new/d"),
        (vfs.rmdir, "d"),
        (vfs.remove, "a"),
        (vfs.rename, "a", "b"),
        (vfs.utime, "a", (0, 0)),
        (vfs.truncate, "a", 0),
    ):
        path = "new" if call == vfs.makedirs else arguments[0]
        fails(errno.EROFS, path, call, *arguments)
    assert store.list() == {"a", "d/b"}


def test_a_store_that_only_reads_is_erofs(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("d/f.txt", "content")
    with VFS(f"zip://::{tmp_path / 'a.zip'}", cache_dir=str(tmp_path / "cache"), poll_interval=None) as vfs:
        assert vfs.listdir("d") == ["f.txt"]
        assert get(vfs, "d/f.txt") == b"content"
        for call, *arguments in ((vfs.open, "n", "wb"), (vfs.mkdir, "n"), (vfs.remove, "d/f.txt"), (vfs.rmdir, "d")):
            fails(errno.EROFS, arguments[0], call, *arguments)
    assert not list((tmp_path / "cache").rglob("cache.db")), "an index for a store that knows all by itself"


# --- folders where the store has none


@pytest.mark.parametrize("store", OBJECT_STORES, indirect=True)
def test_a_made_folder_is_there_after_a_restart_and_leaves_no_object(
    store: Store, vfs_of: Callable[..., VFS]
) -> None:
    first = vfs_of(store)
    first.makedirs("made/sub")
    assert store.list() == set()
    first.close()
    again = vfs_of(store)
    assert again.listdir() == ["made"]
    assert again.listdir("made") == ["sub"]
    put(again, "made/sub/f")
    again.remove("made/sub/f")
    again.rmdir("made/sub")
    again.rmdir("made")
    again.close()
    assert vfs_of(store).listdir() == []


@pytest.mark.parametrize("store", OBJECT_STORES, indirect=True)
def test_a_made_folder_is_seen_by_another_process_at_once(
    store: Store, vfs_of: Callable[..., VFS], tmp_path: Path
) -> None:
    vfs = vfs_of(store)
    assert vfs.listdir() == []
    code = (
        "import json, sys; from ftpvfs import VFS\n"
        "vfs = VFS(sys.argv[1], storage_options=json.loads(sys.argv[2]), cache_dir=sys.argv[3])\n"
        "vfs.mkdir('theirs'); vfs.close()"
    )
    import json

    arguments = [store.url, json.dumps(store.storage_options), str(tmp_path / "cache")]
    subprocess.run([sys.executable, "-c", code, *arguments], env=program_environment(), check=True, timeout=60)
    assert vfs.listdir() == ["theirs"]
    assert vfs.isdir("theirs")


def test_a_folder_outlives_its_last_file(store: Store, vfs_of: Callable[..., VFS]) -> None:
    vfs = vfs_of(store)
    if store.kind == "memory":  # its folders last where they were made, and not where a file's name implies them
        vfs.makedirs("d/sub")
    store.write("d/sub/f", b"x")
    vfs.remove("d/sub/f")
    assert vfs.listdir("d/sub") == []
    vfs.close()
    again = vfs_of(store)
    assert again.listdir("d") == ["sub"]
    assert again.listdir("d/sub") == []
    put(again, "d/sub/f")
    again.rename("d/sub/f", "f")
    assert again.listdir("d/sub") == []
    again.rmdir("d/sub")
    assert again.listdir("d") == []


@pytest.mark.parametrize("store", OBJECT_STORES, indirect=True)
def test_with_dir_markers_folders_are_objects_that_others_see(store: Store, vfs_of: Callable[..., VFS]) -> None:
    vfs = vfs_of(store, dir_markers=True)
    vfs.mkdir("d")
    assert store.list() == {"d/"}
    assert vfs.listdir() == ["d"]
    assert vfs.listdir("d") == []
    put(vfs, "d/f")
    vfs.remove("d/f")
    assert store.list() == {"d/"}
    vfs.rename("d", "e")
    assert store.list() == {"e/"}
    vfs.rmdir("e")
    assert store.list() == set()
    store.write("implicit/f")
    vfs.forget()
    vfs.remove("implicit/f")
    assert store.list() == {"implicit/"}
    assert vfs.listdir("implicit") == []
    vfs.close()
    assert vfs_of(store, dir_markers=True, name="elsewhere").listdir() == ["implicit"]


def test_deleting_a_whole_folder_with_dir_markers_lists_it_not_for_every_file(
    s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: MakeProxy
) -> None:
    for number in range(30):
        s3_store.write(f"d/{number}")
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy), dir_markers=True)
    for name in vfs.listdir("d"):
        vfs.remove(f"d/{name}")
    assert proxy.requests["GET"] <= 5


@pytest.mark.parametrize("store", OBJECT_STORES, indirect=True)
def test_somebody_elses_marker_is_a_folder_and_no_file(store: Store, vfs: VFS) -> None:
    store.write("d/", b"")
    assert vfs.listdir() == ["d"]
    assert vfs.listdir("d") == []
    vfs.rmdir("d")
    assert store.list() == set()


# --- modification times


def test_a_time_that_was_set_is_there_at_once_and_after_a_restart(store: Store, vfs_of: Callable[..., VFS]) -> None:
    vfs = vfs_of(store)
    put(vfs, "d.txt", b"x")
    vfs.utime("d.txt", (0, WHEN + 0.25))
    assert vfs.stat("d.txt").st_mtime == pytest.approx(WHEN + 0.25, abs=1e-3)
    assert next(vfs.scandir()).stat().st_mtime == pytest.approx(WHEN + 0.25, abs=1e-3)
    vfs.forget()
    assert vfs.stat("d.txt").st_mtime == pytest.approx(WHEN + 0.25, abs=1e-3)
    vfs.close()
    again = vfs_of(store)
    assert next(again.scandir()).stat().st_mtime == pytest.approx(WHEN + 0.25, abs=1e-3)
    assert store.read("d.txt") == b"x"
    if store.kind != "memory":
        assert store.mtime("d.txt") == pytest.approx(WHEN + 0.25, abs=1e-3)


def test_now_is_the_clocks_and_a_new_file_has_it(
    store: Store, make_vfs: Callable[..., VFS], tmp_path: Path, clock: MovedClock
) -> None:
    if store.kind == "memory":
        pytest.skip("the store's own time is all there is")
    vfs = make_vfs(store, cache_dir=str(tmp_path / "cache"), poll_interval=None, clock=clock)
    put(vfs, "a")
    assert vfs.stat("a").st_mtime == clock.now
    clock.advance(100)
    vfs.utime("a")
    assert vfs.stat("a").st_mtime == clock.now
    vfs.forget()
    assert vfs.stat("a").st_mtime == pytest.approx(clock.now, abs=1e-3)


def test_setting_the_time_of_a_folder_is_no_error(vfs: VFS) -> None:
    vfs.mkdir("d")
    vfs.utime("d", (WHEN, WHEN))


def test_without_modtimes_setting_one_is_refused(store: Store, vfs_of: Callable[..., VFS]) -> None:
    store.write("a")
    fails(errno.EOPNOTSUPP, "a", vfs_of(store, no_modtime=True).utime, "a", (WHEN, WHEN))


@pytest.mark.parametrize("store", ["local", "s3", "gs"], indirect=True)
def test_the_time_that_another_program_set_is_shown(store: Store, vfs: VFS) -> None:
    store.write("a", b"same bytes", mtime=WHEN)
    assert next(vfs.scandir()).stat().st_mtime == WHEN
    store.write("a", b"same bytes", mtime=WHEN + 5000)
    if store.kind == "s3":  # its own stamps are whole seconds; this one must differ
        while (second := store.filesystem.info(store.path("a"), refresh=True)["LastModified"]) == _first_stamp(vfs):
            store.write("a", b"same bytes", mtime=WHEN + 5000)
        assert second
    vfs.refresh()
    assert next(vfs.scandir()).stat().st_mtime == WHEN + 5000


def _first_stamp(vfs: VFS) -> Any:
    from datetime import datetime, timezone

    return datetime.fromtimestamp(vfs.lookup("a").stamp or 0, timezone.utc)


def heads(proxy: FaultProxy) -> int:
    return proxy.requests["HEAD"]


def test_a_true_time_is_asked_for_once_for_each_version(
    s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: MakeProxy
) -> None:
    for number in range(20):
        s3_store.write(f"d/{number}", b"x", mtime=WHEN + number)
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy))
    vfs.listdir("d")
    assert heads(proxy) == 0, "names and sizes cost no request for each"
    assert {entry.stat().st_mtime for entry in vfs.scandir("d")} == {WHEN + number for number in range(20)}
    assert heads(proxy) == 20
    vfs.refresh("d")
    list(vfs.scandir("d"))
    vfs.stat("d/5")
    vfs.forget()
    list(vfs.scandir("d"))
    vfs.close()
    again = vfs_of(s3_store.proxied(proxy))
    assert {entry.stat().st_mtime for entry in again.scandir("d")} == {WHEN + number for number in range(20)}
    assert heads(proxy) == 20
    s3_store.write("d/7", b"new version", mtime=WHEN + 700)
    again.refresh("d")
    assert {entry.name: entry.stat().st_mtime for entry in again.scandir("d")}["7"] == WHEN + 700
    assert heads(proxy) == 21


def test_single_questions_ask_once_too(s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: MakeProxy) -> None:
    for number in range(40):
        s3_store.write(f"d/{number}", b"x", mtime=WHEN)
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy))
    for _ in range(2):
        for number in range(40):
            assert vfs.stat(f"d/{number}").st_mtime == WHEN
    assert heads(proxy) <= 40 + 16, "16 questions were for names, before the folder was listed"


def test_eight_sessions_that_list_one_folder_ask_once(
    s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: MakeProxy
) -> None:
    for number in range(20):
        s3_store.write(f"{number}", b"x", mtime=WHEN)
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy))
    start = threading.Barrier(8)
    seen: list[set[float]] = []

    def session() -> None:
        start.wait()
        seen.append({entry.stat().st_mtime for entry in vfs.scandir()})

    threads = [threading.Thread(target=session) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [{WHEN}] * 8
    assert heads(proxy) == 20
    assert proxy.requests["GET"] == 1


@pytest.mark.parametrize("option", ["use_server_modtime", "no_modtime"])
def test_with_the_servers_times_nothing_is_asked(
    s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: MakeProxy, option: str
) -> None:
    for number in range(5):
        s3_store.write(f"{number}", b"x", mtime=WHEN)
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy), **{option: True})
    assert all(entry.stat().st_mtime > WHEN + 10**7 for entry in vfs.scandir())
    assert heads(proxy) == 0


def test_times_survive_every_kind_of_rename(store: Store, vfs_of: Callable[..., VFS]) -> None:
    vfs = vfs_of(store)
    vfs.makedirs("d/sub")
    for number, path in enumerate(["f", "d/g", "d/sub/h"]):
        put(vfs, path, path.encode())
        vfs.utime(path, (0, WHEN + number))
    vfs.forget()
    vfs.rename("f", "d/f")
    vfs.rename("d", "e")
    vfs.rename("e/sub/h", "e/h")
    expected = {"e/f": WHEN, "e/g": WHEN + 1, "e/h": WHEN + 2}
    for _ in range(2):
        assert {path: vfs.stat(path).st_mtime for path in expected} == expected
        assert {entry.path: entry.stat().st_mtime for entry in vfs.scandir("e") if entry.is_file()} == expected
        vfs.close()
        vfs = vfs_of(store)


def test_a_renamed_folder_on_s3_need_not_be_asked_for_its_times(
    s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: MakeProxy
) -> None:
    for number in range(10):
        s3_store.write(f"d/{number}", b"x", mtime=WHEN)
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy))
    vfs.rename("d", "e")
    proxy.reset_counters()
    assert {entry.stat().st_mtime for entry in vfs.scandir("e")} == {WHEN}
    assert heads(proxy) == 0


def test_an_overwritten_file_has_a_new_time(store: Store, vfs_of: Callable[..., VFS]) -> None:
    vfs = vfs_of(store)
    put(vfs, "a", b"1")
    vfs.utime("a", (0, WHEN))
    put(vfs, "a", b"2")
    vfs.forget()
    assert vfs.stat("a").st_mtime > WHEN + 10**7


# --- requests


@pytest.mark.parametrize("kind", OBJECT_STORES)
def test_what_calls_cost(
    kind: str, make_store: Callable[[str], Store], vfs_of: Callable[..., VFS], make_proxy: MakeProxy
) -> None:
    """The requests of the commonest calls, so that a change which makes them dearer is noticed."""
    store = make_store(kind)
    store.write("d/small", b"x" * 10_240)
    proxy = make_proxy(store)
    options = store.proxied(proxy)

    def cost(call: Callable[[VFS], Any], warm: Callable[[VFS], Any] = lambda vfs: None) -> int:
        vfs = vfs_of(options)
        vfs.core.backend.check()
        warm(vfs)
        proxy.reset_counters()
        call(vfs)
        count = sum(proxy.requests.values())
        vfs.close()
        return count

    assert cost(lambda vfs: vfs.listdir("d")) == 1
    assert cost(lambda vfs: get(vfs, "d/small")) == 2, "one look, one read"
    assert cost(lambda vfs: get(vfs, "d/small"), lambda vfs: vfs.listdir("d")) == 1
    assert cost(lambda vfs: put(vfs, "d/small"), lambda vfs: vfs.listdir("d")) == 1
    assert cost(lambda vfs: vfs.stat("d/small")) == 1
    assert cost(lambda vfs: [vfs.exists(f"d/{n}") for n in range(500)], lambda vfs: vfs.listdir("d")) == 0
    assert cost(lambda vfs: vfs.mkdir(f"d/{os.urandom(3).hex()}"), lambda vfs: vfs.listdir("d")) == 0
    assert cost(lambda vfs: vfs.remove("d/small"), lambda vfs: vfs.listdir("d")) == 1


def test_names_that_are_no_ascii_cost_a_listing_of_each_folder_once(
    s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: MakeProxy
) -> None:
    for number in range(10):
        s3_store.write(f"ä/ö/ü/ß{number}", b"x")
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy), use_server_modtime=True)
    for number in range(10):
        assert vfs.stat(f"ä/ö/ü/ß{number}").st_size == 1
        assert get(vfs, f"ä/ö/ü/ß{number}") == b"x"
    assert sum(proxy.requests.values()) == 4 + 10


# --- spellings


def test_names_in_another_unicode_form_are_found_and_kept(store: Store, vfs_of: Callable[..., VFS]) -> None:
    import unicodedata

    nfc, nfd = (unicodedata.normalize(form, "Ünï/cödé") for form in ("NFC", "NFD"))
    store.write(nfd, b"x")
    vfs = vfs_of(store)
    assert get(vfs, nfc) == b"x"
    assert vfs.exists(nfc)
    assert vfs.isfile(nfc)
    assert vfs.stat(nfc).st_size == 1
    assert vfs.listdir(nfc.split("/")[0]) == [nfd.split("/")[1]]
    put(vfs, nfc, b"new")
    assert store.list() == {nfd}
    vfs.remove(nfc)
    assert store.list() == set()
    plain = vfs_of(store, no_unicode_normalization=True, name="plain")
    store.write(nfd, b"x")
    assert not plain.exists(nfc)


def test_case_insensitive_names_are_found_and_kept(store: Store, vfs_of: Callable[..., VFS]) -> None:
    store.write("Docs/Read.TXT", b"x")
    vfs = vfs_of(store, case_insensitive=True)
    assert get(vfs, "docs/read.txt") == b"x"
    put(vfs, "DOCS/READ.txt", b"new")
    put(vfs, "docs/Other.txt", b"other")
    assert store.list() == {"Docs/Read.TXT", "Docs/Other.txt"}
    fails(errno.EEXIST, "Docs", vfs.mkdir, "docs")
    vfs.rename("docs/other.TXT", "docs/other.txt")
    assert store.list() == {"Docs/Read.TXT", "Docs/other.txt"}
    vfs.rename("docs", "docs")
    assert store.list() == {"docs/Read.TXT", "docs/other.txt"}
    assert vfs.listdir() == ["docs"]


HOSTILE = [
    *("-rf", " ", "a b", "'quote\"", "back\\slash", "*?[x]", "%41", "+", "#?&=;", "~", "🙂", ".hidden", "..."),
    "x" * 255,
]


def test_hostile_names_are_names_like_any_other(store: Store, vfs_of: Callable[..., VFS]) -> None:
    hostile = [name for name in HOSTILE if store.kind != "s3" or "\\" not in name]  # SeaweedFS makes a slash of it
    vfs = vfs_of(store)
    for name in hostile:
        vfs.mkdir(name)
        put(vfs, f"{name}/{name}", name.encode())
        vfs.utime(f"{name}/{name}", (0, WHEN))
    vfs.forget()
    assert vfs.listdir() == sorted(hostile)
    for number, name in enumerate(hostile):
        assert vfs.listdir(name) == [name]
        assert get(vfs, f"{name}/{name}") == name.encode()
        vfs.rename(f"{name}/{name}", f"{name}/other")
        vfs.rename(name, f"folder {number}")
        assert vfs.stat(f"folder {number}/other").st_mtime == WHEN
    assert store.list() == {f"folder {number}/other" for number in range(len(hostile))}


# --- the directory cache from outside


def test_changes_of_others_are_seen_after_forget_refresh_or_time(
    store: Store, make_vfs: Callable[..., VFS], tmp_path: Path, clock: MovedClock
) -> None:
    vfs = make_vfs(store, cache_dir=str(tmp_path / "cache"), poll_interval=None, clock=clock)
    store.write("d/a", b"1")
    assert vfs.listdir("d") == ["a"]
    store.write("d/b", b"1")
    assert vfs.listdir("d") == ["a"]
    vfs.forget("d")
    assert vfs.listdir("d") == ["a", "b"]
    store.write("d/c", b"1")
    vfs.refresh("d")
    assert vfs.listdir("d") == ["a", "b", "c"]
    store.write("d/new/f", b"1")
    clock.advance(299)
    assert not vfs.exists("d/new")
    clock.advance(2)
    assert vfs.listdir("d") == ["a", "b", "c", "new"]


def test_a_folder_that_somebody_made_can_be_refreshed_by_name(store: Store, vfs: VFS) -> None:
    assert vfs.listdir() == []
    store.write("theirs/f", b"1")
    vfs.refresh("theirs")
    assert vfs.listdir("theirs") == ["f"]
    assert vfs.listdir() == ["theirs"]


@pytest.mark.parametrize("store", ["memory", "gs"], indirect=True)  # where it goes with its last file
def test_a_folder_that_is_gone_is_gone_after_its_refresh(store: Store, vfs: VFS) -> None:
    store.write("d/f", b"1")
    vfs.listdir("d")
    store.delete("d/f")
    with pytest.raises(FileNotFoundError):
        vfs.refresh("d")
    with pytest.raises(FileNotFoundError):
        vfs.core.dirs.listing("d")


def test_refresh_recursive_reads_the_whole_tree_at_once(
    s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: MakeProxy
) -> None:
    for path in ("a", "d/a", "d/e/a", "f/g/h/a"):
        s3_store.write(path)
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy))
    vfs.refresh(recursive=True)
    asked = proxy.requests["GET"]
    for path in ("", "d", "d/e", "f", "f/g", "f/g/h"):
        assert vfs.listdir(path)
    assert proxy.requests["GET"] == asked == 6


def test_the_start_may_read_the_tree(s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: MakeProxy) -> None:
    s3_store.write("d/e/a")
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy), refresh=True)
    vfs.start()
    for thread in threading.enumerate():
        if thread.name == "ftpvfs-refresh":
            thread.join(20)
    asked = proxy.requests["GET"]
    assert vfs.listdir("d/e") == ["a"]
    assert proxy.requests["GET"] == asked


def test_polling_sees_changes_in_folders_that_are_in_use_only(
    s3_store: Store, make_vfs: Callable[..., VFS], tmp_path: Path, make_proxy: MakeProxy, clock: MovedClock
) -> None:
    s3_store.write("used/a")
    s3_store.write("idle/a")
    proxy = make_proxy(s3_store)
    vfs = make_vfs(s3_store.proxied(proxy), cache_dir=str(tmp_path / "cache"), use_server_modtime=True, clock=clock)
    vfs.listdir("idle")
    assert clock.waits.acquire(timeout=10)
    clock.advance(59)
    vfs.listdir("used")
    s3_store.write("used/b")
    proxy.reset_counters()

    def turn() -> list[str]:
        proxy.reset_counters()
        clock.advance(30)
        clock.turns.release()
        assert clock.waits.acquire(timeout=20)
        return [request.target for request in proxy.seen]

    polled = turn()
    assert len(polled) == 1
    assert "used" in polled[0]
    assert vfs.listdir("used") == ["a", "b"]
    assert len(turn()) == 1
    assert len(turn()) == 1
    assert turn() == [], "polling kept the folder in use"


def test_a_store_that_is_away_while_polling_leaves_what_is_cached(
    s3_store: Store, make_vfs: Callable[..., VFS], tmp_path: Path, make_proxy: MakeProxy, clock: MovedClock
) -> None:
    s3_store.write("d/a")
    proxy = make_proxy(s3_store)
    options = {"use_server_modtime": True, "clock": clock, "low_level_retries": 1}
    vfs = make_vfs(s3_store.proxied(proxy), cache_dir=str(tmp_path / "cache"), **options)
    vfs.listdir("d")
    assert clock.waits.acquire(timeout=10)
    proxy.refuse = True
    clock.turns.release()
    assert clock.waits.acquire(timeout=20)
    assert vfs.listdir("d") == ["a"]
    proxy.refuse = False
    s3_store.write("d/b")
    clock.turns.release()
    assert clock.waits.acquire(timeout=20)
    assert vfs.listdir("d") == ["a", "b"]


def test_after_a_failed_change_the_store_is_asked_what_it_has(
    s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: MakeProxy
) -> None:
    """A request whose answer is lost may have been carried out all the same."""
    s3_store.write("a", b"1")
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy), low_level_retries=1)
    assert vfs.listdir() == ["a"]
    proxy.fail_next(method="DELETE", status=500, code="InternalError")
    with pytest.raises(OSError, match="a"):
        vfs.remove("a")
    s3_store.delete("a")  # as if it had been
    assert vfs.listdir() == []
    proxy.fail_next(method="PUT", status=500, code="InternalError")
    with pytest.raises(OSError, match="b"):
        put(vfs, "b")
    s3_store.write("b", b"1")
    assert vfs.listdir() == ["b"]


# --- the index


def test_a_local_store_needs_no_index(local_store: Store, vfs_of: Callable[..., VFS], tmp_path: Path) -> None:
    vfs = vfs_of(local_store)
    vfs.start()
    vfs.mkdir("d")
    put(vfs, "d/f")
    vfs.utime("d/f", (0, 0))
    vfs.rename("d", "e")
    vfs.remove("e/f")
    list(vfs.scandir("e"))
    assert not list((tmp_path / "cache").rglob("cache.db"))


@pytest.mark.parametrize("store", ["memory", "s3", "gs"], indirect=True)
def test_a_cache_folder_that_cannot_be_used_is_told_at_the_start(
    store: Store, make_vfs: Callable[..., VFS], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    vfs = make_vfs(store, cache_dir=str(tmp_path / "file"))
    with pytest.raises(OSError, match="cache folder") as caught:
        vfs.start()
    assert str(tmp_path / "file") in str(caught.value.filename)


@pytest.mark.parametrize("store", OBJECT_STORES, indirect=True)
def test_a_damaged_index_is_no_reason_not_to_start(store: Store, vfs_of: Callable[..., VFS], tmp_path: Path) -> None:
    store.write("d/f", b"x")
    vfs = vfs_of(store)
    vfs.mkdir("made")
    vfs.close()
    (database,) = (tmp_path / "cache").glob("*/cache.db")
    database.write_bytes(b"damaged" * 1000)
    again = vfs_of(store)
    again.start()
    assert again.listdir() == ["d"]
    again.mkdir("made")
    assert again.listdir() == ["d", "made"]


def test_names_that_are_no_utf8_are_refused_and_stop_nothing(store: Store, vfs_of: Callable[..., VFS]) -> None:
    """What a client sends in Latin-1. A local disk has it; an object store cannot, and says so with an errno."""
    vfs = vfs_of(store)
    name = "caf\udce9"
    if store.kind in {"s3", "gs"}:
        fails(errno.EINVAL, name, put, vfs, name, b"x")
        assert vfs.listdir() == []
        return
    put(vfs, name, b"x")
    assert get(vfs, name) == b"x"
    vfs.mkdir(f"{name} folder")
    assert vfs.listdir() == [name, f"{name} folder"]
