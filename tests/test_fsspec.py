"""A VFS as a filesystem of fsspec: fsspec's own tests of what every one does, and what ours promises beyond."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.tests.abstract import (
    AbstractCopyTests,
    AbstractFixtures,
    AbstractGetTests,
    AbstractOpenTests,
    AbstractPipeTests,
    AbstractPutTests,
)

from ftpvfs import ConfigError, FTPVFSFileSystem
from tests.conftest import Store, program_environment

WHEN = 1_600_000_000.0
MakeFS = Callable[..., FTPVFSFileSystem]


@pytest.fixture
def fs_of(tmp_path: Path) -> Iterator[MakeFS]:
    """fs_of(store, **keywords) -> the filesystem that fsspec gives for it, closed when the test ends."""
    made: list[FTPVFSFileSystem] = []

    def make(store: Store, **keywords: Any) -> FTPVFSFileSystem:
        keywords = {"cache_dir": str(tmp_path / "cache"), "poll_interval": "off", **keywords}
        made.append(fsspec.filesystem("ftpvfs", url=store.url, storage_options=store.storage_options, **keywords))
        return made[-1]

    yield make
    for each in made:
        each.close()
    FTPVFSFileSystem.clear_instance_cache()


@pytest.fixture(params=["local-off", "local-full", "s3-off", "s3-writes"])
def place(request: pytest.FixtureRequest, make_store: Any) -> tuple[Store, str]:
    """A store, and the cache mode that it is used in."""
    kind, _, mode = request.param.partition("-")
    return make_store(kind), mode


@pytest.fixture
def store(place: tuple[Store, str]) -> Store:
    return place[0]


@pytest.fixture
def fs(place: tuple[Store, str], fs_of: MakeFS) -> FTPVFSFileSystem:
    return fs_of(place[0], cache_mode=place[1])


# --- what fsspec asks of all


class OurFixtures(AbstractFixtures):
    """fsspec's tests over a VFS. They are many and about names: a store at hand will do."""

    @pytest.fixture
    def fs(self, memory_store: Store, fs_of: MakeFS) -> FTPVFSFileSystem:
        return fs_of(memory_store)

    @pytest.fixture
    def fs_path(self) -> str:
        return "path"

    @pytest.fixture
    def fs_join(self) -> Callable[..., str]:
        return lambda *parts: "/".join(parts)


class TestCopy(OurFixtures, AbstractCopyTests):
    pass


class TestGet(OurFixtures, AbstractGetTests):
    pass


class TestPut(OurFixtures, AbstractPutTests):
    pass


class TestOpen(OurFixtures, AbstractOpenTests):
    pass


class TestPipe(OurFixtures, AbstractPipeTests):
    pass


# --- looking


def test_paths_are_those_of_the_vfs(fs: FTPVFSFileSystem) -> None:
    fs.pipe_file("a/b", b"data")
    for path in ("a/b", "/a/b", "ftpvfs://a/b", "ftpvfs:///a/b", "a//b/", Path("/a/b")):
        assert fs.cat_file(path) == b"data"
        assert fs.info(path)["name"] == "a/b"
    assert fs.unstrip_protocol("a/b") == "ftpvfs://a/b"
    for root in ("", "/", "ftpvfs://"):
        assert fs.ls(root, detail=False) == ["a"]


def test_what_is_told_of_files_and_folders(store: Store, fs: FTPVFSFileSystem) -> None:
    store.write("d/a", b"12345")
    store.write("d/sub/b", b"1")
    info = fs.info("d/a")
    assert (info["name"], info["type"], info["size"]) == ("d/a", "file", 5)
    assert (fs.info("d")["type"], fs.info("")["type"]) == ("directory", "directory")
    assert {each["name"]: (each["type"], each["size"]) for each in fs.ls("d", detail=True)} == {
        "d/a": ("file", 5),
        "d/sub": ("directory", fs.info("d/sub")["size"]),
    }
    assert fs.ls("d", detail=False) == ["d/a", "d/sub"]
    assert [each["name"] for each in fs.ls("d/a")] == ["d/a"]
    assert fs.find("") == fs.glob("**/[ab]") == ["d/a", "d/sub/b"]
    assert fs.find("d", maxdepth=1, withdirs=True) == ["d", "d/a", "d/sub"]
    assert fs.glob("d/*") == ["d/a", "d/sub"]
    assert [(folder, sorted(folders), sorted(files)) for folder, folders, files in fs.walk("d")] == [
        ("d", ["sub"], ["a"]),
        ("d/sub", [], ["b"]),
    ]
    assert (fs.size("d/a"), fs.du("d"), fs.exists("d/a"), fs.isfile("d/a"), fs.isdir("d")) == (5, 6, True, True, True)
    assert (fs.exists("d/x"), fs.isfile("d"), fs.isdir("d/a")) == (False, False, False)
    before = fs.ukey("d/a")
    fs.pipe_file("d/a", b"54321")
    assert fs.ukey("d/a") != before


def test_times(store: Store, fs: FTPVFSFileSystem) -> None:
    store.write("a", b"x", mtime=WHEN)
    assert fs.modified("a") == datetime.fromtimestamp(WHEN, timezone.utc)
    assert fs.info("a")["mtime"] == WHEN
    fs.touch("a", truncate=False)
    assert fs.modified("a").timestamp() > WHEN
    assert fs.cat_file("a") == b"x"
    fs.touch("a")
    assert fs.cat_file("a") == b""
    with pytest.raises(NotImplementedError):
        fs.created("a")


@pytest.mark.parametrize(
    ("call", "error", "path"),
    [
        (lambda fs: fs.info("no"), FileNotFoundError, "no"),
        (lambda fs: fs.ls("no/x"), FileNotFoundError, "no/x"),
        (lambda fs: fs.open("no"), FileNotFoundError, "no"),
        (lambda fs: fs.open("no", "r"), FileNotFoundError, "no"),
        (lambda fs: fs.modified("no"), FileNotFoundError, "no"),
        (lambda fs: fs.rm_file("no"), FileNotFoundError, "no"),
        (lambda fs: fs.rm("no"), FileNotFoundError, "no"),
        (lambda fs: fs.rmdir("d"), OSError, "d"),
        (lambda fs: fs.rm("d"), IsADirectoryError, "d"),
        (lambda fs: fs.open("d"), IsADirectoryError, "d"),
        (lambda fs: fs.mkdir("d"), FileExistsError, "d"),
        (lambda fs: fs.makedirs("d"), FileExistsError, "d"),
        (lambda fs: fs.mkdir("no/x", create_parents=False), FileNotFoundError, "no/x"),
        (lambda fs: fs.mv("no", "x"), FileNotFoundError, "no"),
        (lambda fs: fs.cp_file("no", "x"), FileNotFoundError, "no"),
        (lambda fs: fs.open("d/a/x", "wb"), OSError, "d/a"),
        (lambda fs: fs.open("d/a", "xb"), FileExistsError, "d/a"),
        (lambda fs: fs.pipe_file("d/a", b"", mode="create"), FileExistsError, "d/a"),
    ],
)
def test_failures_are_those_of_the_system(
    local_store: Store, fs_of: MakeFS, call: Callable[[Any], Any], error: type[OSError], path: str
) -> None:
    local_store.write("d/a", b"old")
    fs = fs_of(local_store)
    with pytest.raises(error) as caught:
        call(fs)
    assert caught.value.errno
    assert caught.value.filename == path
    assert local_store.read("d/a") == b"old"


def test_a_store_that_is_away_is_no_store_without_files(s3_store: Store, fs_of: MakeFS, make_proxy: Any) -> None:
    s3_store.write("a", b"x")
    proxy = make_proxy(s3_store)
    fs = fs_of(s3_store.proxied(proxy), low_level_retries=1)
    proxy.fail_next(10**6)
    for question in (fs.exists, fs.isfile, fs.isdir, fs.ls):
        with pytest.raises(OSError):  # noqa: PT011 - whatever the store says
            question("a")


# --- reading and writing


def test_ranges_of_files(fs: FTPVFSFileSystem) -> None:
    fs.pipe({"a": b"0123456789", "b": b"abc"})
    for start, stop in [(None, None), (2, 5), (-3, None), (0, -2), (-5, -2), (8, 20), (3, 3)]:
        assert fs.cat_file("a", start, stop) == b"0123456789"[slice(start, stop)]
    assert fs.cat(["a", "b"]) == {"a": b"0123456789", "b": b"abc"}
    assert fs.cat_ranges(["a", "b"], [1, 0], [3, 1]) == [b"12", b"a"]
    assert (fs.head("a", 2), fs.tail("a", 2)) == (b"01", b"89")
    assert fs.read_block("a", 3, 2) == b"34"


def test_a_file_that_is_read_is_like_any_of_pythons(fs: FTPVFSFileSystem) -> None:
    fs.pipe_file("a", b"one\ntwo\nthree")
    with fs.open("a") as file:
        assert isinstance(file, io.BufferedReader)
        assert (file.size, file.path, file.readline(), file.tell(), file.read(3)) == (13, "a", b"one\n", 4, b"two")
        assert (file.seek(-5, os.SEEK_END), file.read()) == (8, b"three")
    with fs.open("a", "r", encoding="ascii", newline="") as file:
        assert list(file) == ["one\n", "two\n", "three"]
    assert (fs.read_text("a"), fs.read_bytes("a")) == ("one\ntwo\nthree", b"one\ntwo\nthree")


def test_modes_are_what_the_cache_mode_allows(place: tuple[Store, str], fs: FTPVFSFileSystem) -> None:
    store, mode = place
    with fs.open("a", "wb") as file:
        file.write(b"12345")
    with fs.open("new", "ab") as file:
        file.write(b"new")
    if mode == "off":
        for changing in ("ab", "r+b"):
            with pytest.raises(PermissionError, match="--vfs-cache-mode"):
                fs.open("a", changing)
    else:
        with fs.open("a", "ab") as file:
            file.write(b"678")
        with fs.open("a", "r+b") as file:
            assert (file.seek(2), file.write(b"X"), file.seek(0), file.read()) == (2, 1, 0, b"12X45678")
        with fs.open("a", "r+", encoding="ascii") as file:
            file.write("Y")
    fs.sync(30)
    assert store.read("a") == (b"12345" if mode == "off" else b"Y2X45678")
    assert store.read("new") == b"new"


@pytest.mark.parametrize("mode", ["w", "wb", "xb"])
def test_a_block_that_fails_publishes_nothing(fs: FTPVFSFileSystem, mode: str) -> None:
    def write() -> None:
        with fs.open("a", mode) as file:
            file.write(b"half" if "b" in mode else "half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert not fs.exists("a")


def test_folders_above_a_new_file_are_made_unless_they_must_not_be(local_store: Store, fs_of: MakeFS) -> None:
    fs = fs_of(local_store)
    fs.pipe_file("a/b/c", b"")
    fs.touch("d/e")
    fs.write_text("f/g", "text")
    fs.mv("a/b/c", "h/i/j")
    assert fs.find("") == ["d/e", "f/g", "h/i/j"]
    strict = fs_of(local_store, auto_mkdir=False)
    for path in ("x/a", "x"):
        if "/" in path:
            with pytest.raises(FileNotFoundError):
                strict.pipe_file(path, b"")
        else:
            strict.pipe_file(path, b"")
    assert strict.vfs is fs.vfs


def test_compressed_files(store: Store, fs: FTPVFSFileSystem) -> None:
    with fs.open("a.gz", "wb", compression="gzip") as file:
        file.write(b"data" * 100)
    with fsspec.open("ftpvfs://b.gz", "wt", compression="infer", **fs.storage_options) as file:
        file.write("data" * 100)
    assert fs.open("b.gz", "r", compression="infer").read() == "data" * 100
    fs.sync(30)
    assert gzip.decompress(store.read("b.gz")) == b"data" * 100


# --- changing


def test_removing(store: Store, fs: FTPVFSFileSystem) -> None:
    for path in ("a", "b", "d/a", "d/e/f/g", "keep"):
        fs.pipe_file(path, b"x")
    fs.rm("a")
    fs.rm(["b"])
    fs.rm("d", recursive=True)
    assert fs.find("", withdirs=True) == ["keep"]
    fs.sync(30)
    assert store.list() == {"keep"}


def test_moving_is_the_rename_of_the_vfs(store: Store, fs: FTPVFSFileSystem) -> None:
    store.write("a", b"data", mtime=WHEN)
    fs.mkdir("folder")
    fs.mv("a", "b")
    assert fs.modified("b").timestamp() == WHEN
    fs.mv("b", "folder")
    fs.mv("folder/b", "new/")
    assert fs.find("") == ["new/b"]
    fs.pipe_file("folder/c", b"c")
    fs.mv("folder", "moved", recursive=True)
    assert fs.find("") == ["moved/c", "new/b"]
    fs.mv("moved", "new", recursive=True)
    assert fs.find("") == ["new/b", "new/moved/c"]
    fs.mv("new/b", "new/b")
    fs.mv("new/*", "flat/", recursive=True)
    assert fs.find("") == ["flat/b", "flat/moved/c"]


def test_a_copy_that_fails_leaves_what_was_there(s3_store: Store, fs_of: MakeFS, make_proxy: Any) -> None:
    s3_store.write("a", b"a" * 2**20)
    s3_store.write("b", b"old")
    proxy = make_proxy(s3_store)
    fs = fs_of(s3_store.proxied(proxy), low_level_retries=1)
    assert fs.exists("a")
    assert fs.exists("b")
    proxy.fail_next(10**6, method="GET", target="/a")
    with pytest.raises(OSError):  # noqa: PT011 - whatever the store says
        fs.cp_file("a", "b")
    assert s3_store.read("b") == b"old"


# --- transactions


def test_a_transaction_publishes_all_its_files_at_its_end(store: Store, fs: FTPVFSFileSystem) -> None:
    with fs.transaction:
        with fs.open("a", "wb") as file:
            file.write(b"a")
        assert file.closed
        with fs.open("d/t", "w", encoding="utf-8") as file:
            file.write("text")
        fs.pipe_file("c", b"c")
        assert not any(fs.exists(path) for path in ("a", "d/t", "c"))
    assert {path: fs.cat_file(path) for path in ("a", "d/t", "c")} == {"a": b"a", "d/t": b"text", "c": b"c"}
    fs.sync(30)
    assert store.list() == {"a", "d/t", "c"}


def test_a_transaction_that_fails_publishes_nothing(store: Store, fs: FTPVFSFileSystem) -> None:
    fs.pipe_file("a", b"old")

    def write() -> None:
        with fs.transaction:
            fs.pipe_file("a", b"new")
            fs.pipe_file("b", b"b")
            unfinished = fs.open("c", "wb")
            unfinished.write(b"c")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert (fs.cat_file("a"), fs.exists("b"), fs.exists("c")) == (b"old", False, False)
    fs.pipe_file("b", b"after")  # outside of it
    fs.sync(30)
    assert (store.list(), store.uploads()) == ({"a", "b"}, set())


def test_a_block_that_fails_in_a_transaction_publishes_nothing_of_its_own(fs: FTPVFSFileSystem) -> None:
    def write() -> None:
        with fs.open("a", "wb") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with fs.transaction:
        with pytest.raises(ZeroDivisionError):
            write()
        fs.pipe_file("b", b"b")
    assert (fs.exists("a"), fs.cat_file("b")) == (False, b"b")


def test_a_file_that_is_changed_in_a_transaction_is_none_of_its_files(local_store: Store, fs_of: MakeFS) -> None:
    fs = fs_of(local_store, cache_mode="writes")
    fs.pipe_file("a", b"12345")
    with fs.transaction:
        with fs.open("a", "r+b") as file:
            file.write(b"X")
        assert fs.cat_file("a") == b"X2345"
        with fs.open("b", "w+b") as file:
            file.write(b"12345")
            file.seek(0)
            assert file.read() == b"12345"
        assert not fs.exists("b")
    assert fs.cat_file("b") == b"12345"


# --- instances


def test_fsspec_open_names_the_store_by_its_options(store: Store, fs: FTPVFSFileSystem) -> None:
    options = fs.storage_options
    with fsspec.open("ftpvfs://folder/a.txt", "w", **options) as file:
        file.write("text")
    with fsspec.open("ftpvfs://folder/a.txt", "r", **options) as file:
        assert file.read() == "text"
    assert [file.path for file in fsspec.open_files("ftpvfs://folder/*.txt", **options)] == ["folder/a.txt"]
    fs.sync(30)
    assert store.read("folder/a.txt") == b"text"
    renamed = {"store" if name == "url" else name: value for name, value in options.items()}
    found, path = fsspec.core.url_to_fs("ftpvfs://folder/a.txt", **renamed)  # which has an argument `url` itself
    assert (found.vfs, path) == (fs.vfs, "folder/a.txt")


def test_all_threads_have_one_vfs_for_a_store_with_its_options(local_store: Store, fs_of: MakeFS) -> None:
    fs = fs_of(local_store, vfs_cache_mode="writes", dir_cache_time=300)
    found: list[FTPVFSFileSystem] = []
    thread = threading.Thread(target=lambda: found.append(fs_of(local_store, cache_mode="writes", dir_cache_time="5m")))
    thread.start()
    thread.join()
    assert found[0] is not fs
    assert found[0].vfs is fs.vfs
    assert fs_of(local_store, cache_mode="full").vfs is not fs.vfs
    assert fs_of(local_store, cache_mode="full", use_server_modtime=True).vfs is not fs.vfs


def test_an_instance_goes_to_other_processes(local_store: Store, fs_of: MakeFS) -> None:
    fs = fs_of(local_store, cache_mode="writes")
    fs.pipe_file("a", b"data")
    copy = pickle.loads(pickle.dumps(fs))
    assert copy.vfs is fs.vfs
    again = fsspec.AbstractFileSystem.from_json(fs.to_json())
    assert isinstance(again, FTPVFSFileSystem)
    assert again.cat_file("a") == b"data"


def test_it_is_used_before_and_after_a_fork(store: Store, fs: FTPVFSFileSystem) -> None:
    fs.pipe_file("a", b"parent's")
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            same = fsspec.filesystem("ftpvfs", **fs.storage_options)
            seen = same.cat_file("a")
            same.pipe_file("b", b"child's")
            os.write(write, seen)
            same.close()
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    assert os.waitpid(pid, 0)[1] == 0
    with open(read, "rb") as file:
        assert file.read() == b"parent's"
    assert fs.cat_file("b") == b"child's"
    fs.sync(30)
    assert store.list() == {"a", "b"}


def test_it_shares_a_cache_with_a_server(local_store: Store, fs_of: MakeFS, make_vfs: Any, tmp_path: Path) -> None:
    served = make_vfs(local_store, cache_mode="writes", cache_dir=tmp_path / "cache", write_back=3600)
    fs = fs_of(local_store, cache_mode="writes", write_back=3600)
    assert (served.listdir(), fs.ls("", detail=False)) == ([], [])
    served.write_bytes("a", b"served")
    fs.pipe_file("b", b"piped")
    assert fs.cat_file("a") == b"served"
    assert served.read_bytes("b") == b"piped"
    assert served.listdir() == fs.ls("", detail=False) == ["a", "b"]
    assert local_store.list() == set()
    fs.sync(30)
    assert local_store.list() == {"a", "b"}


def test_an_unknown_keyword_is_refused_with_the_nearest(local_store: Store, fs_of: MakeFS) -> None:
    with pytest.raises(ConfigError, match=r"cache_mod.*cache_mode"):
        fs_of(local_store, cache_mod="full")
    with pytest.raises(TypeError, match="url and store"):
        fsspec.filesystem("ftpvfs", url=local_store.url, store=local_store.url)
    with pytest.raises(TypeError, match="cache_mode and vfs_cache_mode"):
        fs_of(local_store, cache_mode="full", vfs_cache_mode="full")


def test_closing_it_releases_the_vfs_until_it_is_used_again(local_store: Store, fs_of: MakeFS) -> None:
    fs = fs_of(local_store, cache_mode="full")
    fs.pipe_file("a", b"data")
    fs.close()
    assert fs.cat_file("a") == b"data"
    fs.invalidate_cache()
    fs.invalidate_cache("a")
    assert fs.exists("a")


WITHOUT_IMPORTING_US = """
import fsspec, json, sys
options = json.loads(sys.argv[1])
with fsspec.open("ftpvfs://a.txt", "w", **options) as file:
    file.write("text")
print(sorted(fsspec.filesystem("ftpvfs", **options).ls("", detail=False)))
"""


@pytest.mark.parametrize("kind", ["local", "s3"])
@pytest.mark.parametrize("mode", ["off", "writes"])
def test_a_program_that_names_it_only_to_fsspec_stores_what_it_wrote_before_it_ends(
    make_store: Any, tmp_path: Path, kind: str, mode: str
) -> None:
    store = make_store(kind)
    options = {
        "url": store.url,
        "storage_options": store.storage_options,
        "cache_dir": str(tmp_path / "cache"),
        "cache_mode": mode,
    }
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_IMPORTING_US, json.dumps(options)],
        env=program_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "['a.txt']\n", "")
    assert store.read("a.txt") == b"text"


def test_the_store_of_all_may_stand_in_fsspecs_configuration(
    local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"url": local_store.url, "cache_dir": str(tmp_path / "cache")}
    monkeypatch.setitem(fsspec.config.conf, "ftpvfs", options)
    local_store.write("a", b"data")
    with fsspec.open("ftpvfs://a") as file:
        assert file.read() == b"data"
    fsspec.filesystem("ftpvfs").close()


def test_pandas_reads_and_writes_through_it(local_store: Store, fs_of: MakeFS) -> None:
    pandas = pytest.importorskip("pandas")
    fs = fs_of(local_store, cache_mode="full")
    frame = pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    frame.to_csv("ftpvfs://folder/frame.csv", index=False, storage_options=fs.storage_options)
    again = pandas.read_csv("ftpvfs://folder/frame.csv", storage_options=fs.storage_options)
    assert again.equals(frame)


# --- compression


@pytest.mark.parametrize("codec", ["gzip", "bz2", "xz", "zip"])
@pytest.mark.parametrize("text", [True, False])
def test_what_is_compressed_is_published_as_its_file_is_closed(fs: FTPVFSFileSystem, codec: str, text: bool) -> None:
    content: Any = "some text\n" * 1000 if text else b"bytes" * 1000
    kind = "t" if text else "b"
    with fs.open("a", f"w{kind}", compression=codec) as file:
        file.write(content)
    with fs.open("a", f"r{kind}", compression=codec) as file:
        assert file.read() == content
    assert codec == "zip" or fs.size("a") < len(content)  # fsspec packs a zip without squeezing it
    file = fs.open("b", f"w{kind}", compression=codec)
    file.write(content)
    file.close()
    assert fs.exists("b")


def test_a_compressed_file_whose_block_fails_is_not_published(fs: FTPVFSFileSystem) -> None:
    for mode in ("wb", "wt"):
        with pytest.raises(RuntimeError), fs.open("a", mode, compression="gzip"):
            raise RuntimeError
        assert not fs.exists("a")
