"""A VFS used as Python's `os`, `open` and `pathlib` are: the same calls on it and on a folder give the same."""

from __future__ import annotations

import errno
import gc
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from ftpvfs import VFS
from ftpvfs.vfs.handle import Handle
from tests.conftest import Store, program_environment

STORES = ["local", "s3"]
TEXT = "erste Zeile\nzweite, mit \N{LATIN SMALL LETTER U WITH DIAERESIS} und \N{EURO SIGN}\ndritte"
WHEN = 1_600_000_000


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, make_store: Any) -> Store:
    made: Store = make_store(request.param)
    return made


@pytest.fixture
def vfs_of(make_vfs: Callable[..., VFS], tmp_path: Path) -> Callable[..., VFS]:
    """vfs_of(store, **options) -> VFS that polls nothing."""

    def make(store: Store, **options: Any) -> VFS:
        return make_vfs(store, **{"cache_dir": tmp_path / "cache", "poll_interval": None, **options})

    return make


@pytest.fixture
def vfs(store: Store, vfs_of: Callable[..., VFS]) -> VFS:
    return vfs_of(store)


class Named:
    """An os.PathLike that is no path of pathlib's."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return self._path


# --- paths


@pytest.mark.parametrize("path_of", [PurePosixPath, Named], ids=["pathlib", "any"])
def test_a_path_may_be_any_path_like(vfs: VFS, path_of: Callable[[str], Any]) -> None:
    vfs.mkdir(path_of("/d"))
    vfs.makedirs(path_of("d/e/f"))
    with vfs.open(path_of("d/a"), "wb") as file:
        file.write(b"data")
    assert vfs.stat(path_of("d/a")).st_size == vfs.lstat(path_of("d/a")).st_size == 4
    assert vfs.lookup(path_of("d/a")).size == 4
    assert vfs.exists(path_of("d/a"))
    assert vfs.isfile(path_of("d/a"))
    assert vfs.isdir(path_of("d"))
    assert vfs.listdir(path_of("d")) == list(vfs.listing(path_of("d")).names) == ["a", "e"]
    assert [entry.path for entry in vfs.scandir(path_of("d"))] == ["d/a", "d/e"]
    assert [folder for folder, _, _ in vfs.walk(path_of("d"))] == ["d", "d/e", "d/e/f"]
    assert vfs.statvfs(path_of("d")).f_bsize
    vfs.utime(path_of("d/a"), (WHEN, WHEN))
    assert vfs.stat("d/a").st_mtime == WHEN
    vfs.truncate(path_of("d/a"), 0)
    vfs.rename(path_of("d/a"), path_of("d/b"))
    vfs.replace(path_of("d/b"), path_of("d/c"))
    assert vfs.read_bytes(path_of("d/c")) == b""
    vfs.forget(path_of("d"))
    vfs.refresh(path_of("d"))
    assert vfs.partial(path_of("d/x")) is None
    assert not vfs.drop_partial(path_of("d/x"))
    vfs.remove(path_of("d/c"))
    vfs.rmdir(path_of("d/e/f"))
    assert vfs.inode(path_of("d")) == vfs.inode("d")


def test_an_entry_of_a_folder_is_a_path_itself(vfs: VFS) -> None:
    vfs.write_bytes("a", b"data")
    (entry,) = vfs.scandir()
    assert vfs.read_bytes(entry) == b"data"


def test_the_store_may_be_named_by_a_path(local_store: Store) -> None:
    local_store.write("a", b"data")
    with VFS(Path(local_store.url)) as vfs:
        assert vfs.read_bytes("a") == b"data"


# --- calls of os


def test_makedirs_may_refuse_what_exists(vfs: VFS) -> None:
    vfs.makedirs("a/b", exist_ok=False)
    vfs.makedirs("a/b")
    vfs.makedirs("a/b", exist_ok=True)
    for path in ("a/b", "a", ""):
        with pytest.raises(FileExistsError) as caught:
            vfs.makedirs(path, exist_ok=False)
        assert caught.value.filename == path
    vfs.write_bytes("file", b"")
    with pytest.raises(FileExistsError):
        vfs.makedirs("file", exist_ok=True)


def test_utime_takes_nanoseconds(vfs: VFS) -> None:
    vfs.write_bytes("a", b"")
    vfs.utime("a", ns=(1, WHEN * 10**9 + 500_000_000))
    assert vfs.stat("a").st_mtime == WHEN + 0.5
    assert vfs.stat("a").st_mtime_ns == WHEN * 10**9 + 500_000_000
    with pytest.raises(ValueError, match="times and ns"):
        vfs.utime("a", (1, 1), ns=(1, 1))
    assert vfs.stat("a").st_mtime == WHEN + 0.5


def test_scandir_is_a_context_manager(vfs: VFS) -> None:
    for name in "abc":
        vfs.write_bytes(name, b"")
    with vfs.scandir() as entries:
        assert next(entries).name == "a"
        assert [entry.name for entry in entries] == ["b", "c"]
    with vfs.scandir() as entries:
        next(entries)
    assert list(entries) == []  # closed


def test_replace_replaces_a_file_and_an_empty_folder(vfs: VFS) -> None:
    vfs.write_bytes("a", b"new")
    vfs.write_bytes("b", b"old")
    vfs.replace("a", "b")
    assert (vfs.listdir(), vfs.read_bytes("b")) == (["b"], b"new")
    vfs.makedirs("d")
    vfs.makedirs("e")
    vfs.replace("d", "e")
    assert vfs.listdir() == ["b", "e"]


TREE = ("a/b/one", "a/b/two", "a/c/three", "a/four", "five")


@pytest.mark.parametrize("topdown", [True, False])
@pytest.mark.parametrize("top", ["", "a", "a/b"])
def test_walk_is_that_of_os(store: Store, vfs: VFS, tmp_path: Path, top: str, topdown: bool) -> None:
    for path in TREE:
        vfs.makedirs(path.rpartition("/")[0])
        vfs.write_bytes(path, b"")
        (tmp_path / "same" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "same" / path).touch()
    same = tmp_path / "same"
    theirs = {
        os.path.relpath(folder, same).removeprefix("."): (sorted(folders), sorted(files))
        for folder, folders, files in os.walk(same / top)
    }
    ours = list(vfs.walk(top, topdown=topdown))
    assert {folder: (folders, files) for folder, folders, files in ours} == theirs
    assert len(ours) == len(theirs)
    order = [folder for folder, _, _ in ours]
    for index, folder in enumerate(order):
        parents = [order.index(other) for other in order if other != folder and (folder + "/").startswith(other)]
        assert all((parent < index) is topdown for parent in parents)


def test_walk_leaves_out_the_folders_that_the_caller_takes_out(vfs: VFS) -> None:
    for path in ("a/b/c", "a/d"):
        vfs.makedirs(path)
    seen = []
    for folder, folders, _ in vfs.walk():
        seen.append(folder)
        if "b" in folders:
            folders.remove("b")
    assert seen == ["", "a", "a/d"]


def test_walk_raises_what_it_cannot_list_unless_told_whom_to_tell(vfs: VFS) -> None:
    with pytest.raises(FileNotFoundError):
        list(vfs.walk("missing"))
    told: list[OSError] = []
    assert list(vfs.walk("missing", onerror=told.append)) == []
    assert [(type(error), error.filename) for error in told] == [(FileNotFoundError, "missing")]


# --- whole files


def test_whole_files_are_read_and_written(store: Store, vfs: VFS) -> None:
    assert vfs.write_bytes("a", b"data") == 4
    assert store.read("a") == b"data"
    assert vfs.read_bytes("a") == b"data"
    assert vfs.write_bytes("a", memoryview(b"newer data")[6:]) == 4
    assert store.read("a") == b"data"
    vfs.open("empty", "w", encoding="utf-16").close()
    assert store.read("empty") == b""
    assert vfs.write_text("t", TEXT, encoding="utf-16", newline="\r\n") == len(TEXT)
    assert store.read("t") == TEXT.replace("\n", "\r\n").encode("utf-16")
    assert vfs.read_text("t", encoding="utf-16") == TEXT
    with pytest.raises(FileNotFoundError):
        vfs.read_bytes("missing")
    with pytest.raises(UnicodeEncodeError):
        vfs.write_text("t", TEXT, encoding="ascii")
    assert vfs.read_text("t", encoding="utf-16") == TEXT


# --- text and buffers, as `open` has them


@pytest.mark.parametrize("mode", ["writes", "full"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", [None, "", "\r\n"])
def test_text_is_written_and_read_as_with_open(
    local_store: Store, vfs_of: Callable[..., VFS], tmp_path: Path, mode: str, encoding: str, newline: str | None
) -> None:
    vfs = vfs_of(local_store, cache_mode=mode, write_back=3600)
    text: dict[str, Any] = {"encoding": encoding, "newline": newline}

    def play(opened: Callable[..., Any]) -> list[Any]:
        found: list[Any] = []
        with opened("w", **text) as file:
            found += [file.mode, file.encoding, file.write(TEXT), file.writelines(["\n", "more\n"])]
        with opened("a", **text) as file:
            found += [file.tell() > 0, file.write("appended\n")]
        with opened("r+", **text) as file:
            found += [file.readline(), file.seek(0, os.SEEK_END) > 0, file.write("end"), file.seek(0), file.read(7)]
        with opened("a+", **text) as file:
            found += [file.read(), file.seek(0), file.readlines()]
        with opened("w+", **text) as file:
            found += [file.write("replaced"), file.seek(0), file.read()]
        with pytest.raises(FileExistsError):
            opened("x", **text)
        with opened("r", **text) as file:
            found += [file.name.rpartition("/")[2], file.errors, list(file), file.readable(), file.writable()]
        return found

    here = tmp_path / "a"
    ours = play(lambda mode, **keywords: vfs.open("a", mode, **keywords))
    assert ours == play(lambda mode, **keywords: open(here, mode, **keywords))  # noqa: SIM115
    assert vfs.read_bytes("a") == here.read_bytes()


@pytest.mark.parametrize("mode", ["", "rr", "rw", "bt", "rbt", "b", "t", "+", "r++", "U", "rU", "r "])
def test_a_mode_that_is_none_is_refused_with_those_that_are(vfs: VFS, mode: str) -> None:
    with pytest.raises(ValueError, match="write one of"):
        vfs.open("a", mode)


@pytest.mark.parametrize(
    ("mode", "keywords"),
    [
        ("rb", {"encoding": "utf-8"}),
        ("rb", {"errors": "ignore"}),
        ("wb", {"newline": ""}),
        (os.O_RDONLY, {"encoding": "utf-8"}),
        ("r", {"buffering": 0}),
        ("rb", {"buffering": -2}),
        ("r", {"encoding": "no such"}),
        ("w", {"encoding": "no such"}),
        ("w", {"newline": "x"}),
    ],
)
def test_what_open_refuses_is_refused_and_leaves_nothing(vfs: VFS, mode: Any, keywords: dict[str, Any]) -> None:
    vfs.write_bytes("a", b"old")
    with pytest.raises((ValueError, LookupError)):
        vfs.open("a", mode, **keywords)
    assert vfs.read_bytes("a") == b"old"


def test_undecodable_bytes_are_handled_as_errors_says(store: Store, vfs: VFS) -> None:
    store.write("a", b"a\xffb")
    with vfs.open("a", "r", encoding="utf-8") as file, pytest.raises(UnicodeDecodeError):
        file.read()
    with vfs.open("a", "r", encoding="utf-8", errors="replace") as file:
        assert file.read() == "a\N{REPLACEMENT CHARACTER}b"


def test_bytes_are_buffered_where_that_is_asked_for(vfs: VFS) -> None:
    for buffering in (-1, 0):
        with vfs.open("a", "wb", buffering) as file:
            assert isinstance(file, Handle)
            file.write(b"one\ntwo\n")
    with vfs.open("a", "wb", buffering=100_000) as buffered:
        assert isinstance(buffered, io.BufferedWriter)
        buffered.write(b"one\ntwo\n")
    with vfs.open("a", "rb", buffering=100_000) as buffered:
        assert isinstance(buffered, io.BufferedReader)
        assert (buffered.peek(1)[:1], buffered.readline(), buffered.tell()) == (b"o", b"one\n", 4)
        assert (buffered.path, buffered.size) == ("a", 8)


WRITING = [("w", {}), ("wb", {"buffering": 64}), ("x", {}), ("a", {})]


@pytest.mark.parametrize(("mode", "keywords"), WRITING)
@pytest.mark.parametrize("cache", ["off", "writes"])
def test_a_block_that_fails_publishes_nothing(
    store: Store, vfs_of: Callable[..., VFS], cache: str, mode: str, keywords: dict[str, Any]
) -> None:
    vfs = vfs_of(store, cache_mode=cache)
    file = vfs.open("a", mode, **keywords)

    def fail() -> None:
        with file:
            file.write(b"half" if "b" in mode else "half")
            file.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert file.closed
    assert not vfs.exists("a")


@pytest.mark.parametrize(("mode", "keywords"), WRITING)
@pytest.mark.parametrize("cache", ["off", "writes"])
@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_forgotten_file_is_not_published(
    store: Store,
    vfs_of: Callable[..., VFS],
    cache: str,
    mode: str,
    keywords: dict[str, Any],
    in_a_cycle: bool,
) -> None:
    vfs = vfs_of(store, cache_mode=cache)
    file = vfs.open("a", mode, **keywords)
    file.write(b"half" if "b" in mode else "half")
    if in_a_cycle:
        file.itself = file
    del file
    gc.collect()
    assert not vfs.exists("a")
    vfs.write_bytes("b", b"")  # what was given up in another thread is through by now
    assert store.list() <= {"b"}


def test_text_that_only_commit_publishes(vfs: VFS) -> None:
    with vfs.open("a", "w", encoding="utf-8", autocommit=False) as file:
        file.write("given up")
    assert not vfs.exists("a")
    file = vfs.open("a", "w", encoding="utf-8", autocommit=False)
    file.write("published")
    file.commit()
    assert (file.closed, vfs.read_text("a", encoding="utf-8")) == (True, "published")
    file = vfs.open("a", "w", encoding="utf-8")
    file.write("given up")
    file.abandon()
    assert (file.closed, vfs.read_text("a", encoding="utf-8")) == (True, "published")


def test_a_file_that_cannot_be_read_and_written_through_a_buffer_says_which_mode_can(
    store: Store, vfs_of: Callable[..., VFS]
) -> None:
    vfs = vfs_of(store)
    with pytest.raises(OSError, match="--vfs-cache-mode") as caught:
        vfs.open("a", "w+")
    assert (caught.value.errno, caught.value.filename) == (errno.ESPIPE, "a")
    assert not vfs.exists("a")


FORGETTING = """
import sys
from ftpvfs import VFS
vfs = VFS(sys.argv[1])
file = vfs.open("a", "w", encoding="utf-8")
file.write("half")
"""


def test_a_file_that_is_open_when_the_program_ends_is_not_published(local_store: Store) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORGETTING, local_store.url],
        env=program_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert local_store.list() == set()
