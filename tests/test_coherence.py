"""What one process changed, another sees at once, though both have cached the folder for ever."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from ftpvfs import VFS
from ftpvfs.backend.backend import Entry
from ftpvfs.coordination.feed import ChangeFeed
from ftpvfs.vfs.dircache import DirCache
from tests.conftest import Store
from tests.processes import Child
from tests.test_dircache import Tree

SHARED = pytest.mark.parametrize("store", ["local", "s3"], indirect=True)


def put(vfs: VFS, path: str, data: bytes = b"x") -> None:
    with vfs.open(path, "wb") as handle:
        handle.write(data)


CALLS: dict[str, Callable[..., Any]] = {
    "put": put,
    "get": lambda vfs, path: bytes(vfs.open(path).read()),
    "size": lambda vfs, path: vfs.stat(path).st_size,
    "mtime": lambda vfs, path: vfs.stat(path).st_mtime,
    "hold": lambda vfs, path: HELD.enter_context(vfs.core.writer(path)),
}
HELD = contextlib.ExitStack()  # for as long as the process lives


def serve(pipe: Connection, store: Store, options: dict[str, Any]) -> None:
    """Run calls on a VFS of this process, until told to end."""
    with VFS(store.url, storage_options=store.storage_options, **options) as vfs:
        while (word := pipe.recv()) is not None:
            name, *arguments = word
            try:
                pipe.send(CALLS[name](vfs, *arguments) if name in CALLS else getattr(vfs, name)(*arguments))
            except OSError as error:
                pipe.send(error.errno)


class Other:
    """A VFS in another process; its methods run there."""

    def __init__(self, child: Child) -> None:
        self.child = child

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.child.say((name, *arguments))
            return self.child.hear()

        return call


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Nothing is ever asked of the store twice, unless somebody says so."""
    return {"cache_dir": str(tmp_path / "cache"), "dir_cache_time": None, "poll_interval": None}


@pytest.fixture
def two(store: Store, options: dict[str, Any], child: Callable[..., Child]) -> tuple[Other, Other]:
    return Other(child(serve, store, options)), Other(child(serve, store, options))


@SHARED
def test_every_change_of_one_process_is_seen_by_another_at_once(two: tuple[Other, Other], store: Store) -> None:
    one, other = two
    for path in ("d/a", "d/b", "d/sub/c"):
        store.write(path, b"old")
    for each in two:
        assert each.listdir("") == ["d"]
        assert each.listdir("d") == ["a", "b", "sub"]
        assert each.listdir("d/sub") == ["c"]
    for first, second in ((one, other), (other, one)):
        first.put("d/new", b"12345")
        assert second.listdir("d") == ["a", "b", "new", "sub"]
        assert second.size("d/new") == 5
        first.put("d/new", b"1234567")
        assert second.size("d/new") == 7
        assert second.get("d/new") == b"1234567"
        first.utime("d/new", (0, 1000))
        assert second.mtime("d/new") == 1000
        first.rename("d/new", "d/renamed")
        assert second.listdir("d") == ["a", "b", "renamed", "sub"]
        first.remove("d/renamed")
        assert second.listdir("d") == ["a", "b", "sub"]
        assert second.exists("d/renamed") is False
        first.mkdir("d/made")
        assert second.listdir("d") == ["a", "b", "made", "sub"]
        assert second.listdir("d/made") == []
        first.rmdir("d/made")
        assert second.listdir("d") == ["a", "b", "sub"]
        first.rename("d/sub", "moved")
        assert second.listdir("") == ["d", "moved"]
        assert second.listdir("moved") == ["c"]
        assert second.listdir("d/sub") in (errno.ENOENT, errno.ENOTDIR)
        first.rename("moved", "d/sub")
        assert second.listdir("d/sub") == ["c"]


@SHARED
def test_a_name_that_was_missing_is_seen_once_another_process_makes_it(two: tuple[Other, Other], store: Store) -> None:
    one, other = two
    assert other.exists("a") is False
    assert other.listdir("folder") == errno.ENOENT
    one.put("a")
    one.mkdir("folder")
    assert other.exists("a") is True
    assert other.listdir("folder") == []


@SHARED
def test_to_forget_and_to_refresh_hold_for_all_processes(two: tuple[Other, Other], store: Store) -> None:
    one, other = two
    store.write("d/a")
    for each in two:
        assert each.listdir("d") == ["a"]
    store.write("d/b")
    assert other.listdir("d") == ["a"]  # written by another program: nobody knows yet
    one.forget("d")
    assert other.listdir("d") == ["a", "b"]
    store.write("d/c")
    assert other.listdir("d") == ["a", "b"]
    one.refresh("d")
    assert other.listdir("d") == ["a", "b", "c"]


@SHARED
def test_a_process_that_missed_more_than_the_feed_holds_asks_the_store_again(
    store: Store, options: dict[str, Any], child: Callable[..., Child], make_vfs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChangeFeed.__init__, "__kwdefaults__", {"ring": 8192})
    other = Other(child(serve, store, options))
    vfs = make_vfs(store, **options)
    assert other.listdir("") == vfs.listdir() == []
    put(vfs, "kept")
    for number in range(200):
        vfs.core.dirs.changed("passing", Entry("passing", is_dir=False, size=number))
    vfs.core.dirs.changed("passing", None)
    assert other.listdir("") == ["kept"]


@SHARED
def test_two_processes_write_one_path_in_turn(two: tuple[Other, Other], store: Store) -> None:
    one, other = two
    one.hold("a")
    other.child.say(("put", "a", b"other"))
    one.put("b", b"one")
    assert other.child.is_silent()
    assert not any(key.endswith("a") for key in store.list() if not key.startswith("."))
    assert one.child.process.pid is not None
    os.kill(one.child.process.pid, signal.SIGKILL)  # whoever dies holds nothing
    other.child.hear()
    assert store.read("a") == b"other"


def test_a_memory_store_belongs_to_its_process_alone(
    memory_store: Store, options: dict[str, Any], make_vfs: Any
) -> None:
    vfs = make_vfs(memory_store, **options)
    assert vfs.core.feed is None
    assert vfs.core.alone is None


def test_a_cache_folder_that_cannot_be_used_leaves_the_process_alone(
    local_store: Store, tmp_path: Path, make_vfs: Any
) -> None:
    (tmp_path / "file").write_bytes(b"")
    vfs = make_vfs(local_store, cache_dir=str(tmp_path / "file"))
    put(vfs, "a")
    assert vfs.listdir() == ["a"]
    with pytest.raises(OSError, match="The cache folder cannot be used"):
        vfs.check_shared()


# --- requests that are on their way when another process changes something


@pytest.fixture
def caches(tmp_path: Path) -> Any:
    """Two caches, as in two processes, over one tree."""
    tree = Tree("d/a")
    feeds = [ChangeFeed(tmp_path) for _ in range(2)]
    yield tree, *(DirCache(tree.read, tree.stat, max_age=None, feed=feed) for feed in feeds)
    for feed in feeds:
        feed.close()


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize(("kind", "path"), [("list", "d"), ("stat", "d/new")])
def test_an_answer_that_left_before_anothers_change_does_not_hide_it(caches: Any, kind: str, path: str) -> None:
    tree, mine, theirs = caches
    arrived, release = tree.hold(kind, path)
    ask = {"list": lambda: mine.listing("d").names, "stat": lambda: mine.lookup("d/new").size}[kind]
    answers: list[Any] = []

    def question() -> None:
        try:
            answers.append(ask())
        except FileNotFoundError:
            answers.append(None)

    asking = in_thread(question)
    assert arrived.wait(20)
    tree.files["d/new"] = 1
    theirs.changed("d/new", Entry("new", is_dir=False, size=5))
    release.set()
    asking.join()
    assert answers == [{"list": ["a", "new"], "stat": 5}[kind]]
    assert mine.lookup("d/new").size == 5
    assert tree.asked[kind, path] == 1


def test_who_asks_after_anothers_forget_waits_for_no_answer_that_left_before(caches: Any) -> None:
    tree, mine, theirs = caches
    arrived, release = tree.hold("list", "d")
    asking = in_thread(lambda: mine.listing("d"))
    assert arrived.wait(20)
    tree.files["d/new"] = 1
    theirs.forget("d")
    assert mine.listing("d").names == ["a", "new"]
    release.set()
    asking.join()
    assert mine.listing("d").names == ["a", "new"]


def test_what_was_asked_again_hides_no_later_change_of_anybody(caches: Any) -> None:
    """The answer was true when it left the store; it must not undo what was written since."""
    tree, mine, theirs = caches
    for cache in (mine, theirs):
        assert cache.lookup("d/a").size != 5
    arrived, release = tree.hold("stat", "d/a")
    asking = in_thread(lambda: mine.look_again("d/a", tree.stat, believe=lambda: True))
    assert arrived.wait(20)
    theirs.changed("d/a", Entry("a", is_dir=False, size=5))
    release.set()
    asking.join()
    assert mine.lookup("d/a").size == theirs.lookup("d/a").size == 5


def test_what_was_asked_again_is_believed_here_and_told_to_nobody(caches: Any) -> None:
    tree, mine, theirs = caches
    for cache in (mine, theirs):
        assert cache.listing("d").names == ["a"]
    del tree.files["d/a"]
    tree.folders.add("d")
    with pytest.raises(FileNotFoundError):
        mine.look_again("d/a", tree.stat, believe=lambda: False)
    assert mine.listing("d").names == ["a"]
    with pytest.raises(FileNotFoundError):
        mine.look_again("d/a", tree.stat, believe=lambda: True)
    assert mine.listing("d").names == []
    assert theirs.listing("d").names == ["a"]


def test_a_listing_that_leaves_after_a_question_knows_better(caches: Any) -> None:
    tree, mine, _ = caches
    arrived, release = tree.hold("stat", "d/a")
    asking = in_thread(lambda: mine.look_again("d/a", tree.stat, believe=lambda: True))
    assert arrived.wait(20)
    listed, go_on = tree.hold("list", "d")
    del tree.files["d/a"]
    tree.folders.add("d")
    listing = in_thread(lambda: mine.listing("d"))
    assert listed.wait(20)
    release.set()  # the older answer comes while the newer one is on its way
    asking.join()
    go_on.set()
    listing.join()
    assert mine.listing("d").names == []


def test_without_news_nothing_is_asked_again(caches: Any) -> None:
    tree, mine, theirs = caches
    for cache in (mine, theirs):
        for _ in range(3):
            assert cache.listing("d").names == ["a"]
    assert tree.asked["list", "d"] == 2
    theirs.changed("d/b", Entry("b", is_dir=False))
    theirs.changed("elsewhere/b", Entry("b", is_dir=False))
    assert mine.listing("d").names == ["a", "b"]
    assert tree.asked["list", "d"] == 2


def test_all_that_an_entry_says_reaches_the_others(caches: Any) -> None:
    _, mine, theirs = caches
    mine.listing("d")
    entry = Entry("\udcff", is_dir=False, size=2**40, mtime=1.25, fingerprint='"etag"', stamp=17)
    theirs.changed("d/\udcff", entry)
    assert mine.lookup("d/\udcff") == entry


# --- two changes of one path at once


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """held_back(object, method) -> (arrived, release): in the thread called "late" a call waits before it begins."""

    def hold(target: Any, name: str) -> tuple[threading.Event, threading.Event]:
        arrived, release = threading.Event(), threading.Event()
        call = getattr(target, name)

        def held(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread().name == "late" and not arrived.is_set():
                arrived.set()
                assert release.wait(20)
            return call(*arguments, **named)

        monkeypatch.setattr(target, name, held)
        return arrived, release

    return hold


def late(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, name="late")
    thread.start()
    return thread


def seen_by(vfs: VFS, path: str) -> tuple[int, int]:
    """The size that is listed, and the size that one name is said to have."""
    (listed,) = [each.stat().st_size for each in vfs.scandir("") if each.name == path]
    return listed, vfs.stat(path).st_size


@pytest.mark.parametrize("stored", [False, True], ids=["the newer one waits", "the newer one is stored"])
def test_of_two_uploads_at_once_the_newer_one_is_listed_by_everybody(
    local_store: Store,
    options: dict[str, Any],
    make_vfs: Callable[..., VFS],
    held_back: Callable[..., Any],
    stored: bool,
) -> None:
    rest = 0.0 if stored else 3600.0
    vfs, other = (make_vfs(local_store, cache_mode="writes", write_back=rest, **options) for _ in range(2))
    put(vfs, "a", b"12345")
    assert seen_by(vfs, "a") == seen_by(other, "a") == (5, 5)
    arrived, release = held_back(vfs.core.dirs, "changed")
    older = late(lambda: put(vfs, "a", b"1"))
    assert arrived.wait(20), "published, and about to be shown"
    put(vfs, "a", b"123")
    if stored:
        vfs.sync(30)
    release.set()
    older.join()
    assert seen_by(vfs, "a") == seen_by(other, "a") == (3, 3)


def test_what_another_process_changes_is_not_undone_by_what_is_told_late(
    local_store: Store, options: dict[str, Any], make_vfs: Callable[..., VFS], held_back: Callable[..., Any]
) -> None:
    vfs, other, third = (make_vfs(local_store, cache_mode="writes", write_back=3600.0, **options) for _ in range(3))
    put(vfs, "a", b"12345")
    for each in (vfs, other, third):
        assert seen_by(each, "a") == (5, 5)
    assert vfs.core.feed is not None
    arrived, release = held_back(vfs.core.feed, "publish")
    older = late(lambda: put(vfs, "a", b"1"))
    assert arrived.wait(20), "shown here, and about to be told"
    put(other, "a", b"123")
    release.set()
    older.join()
    for each in (vfs, other, third):
        assert seen_by(each, "a") == (3, 3)


def test_others_hear_of_changes_in_the_order_in_which_they_were_made(
    tmp_path: Path, held_back: Callable[..., Any]
) -> None:
    tree, feeds = Tree("b"), [ChangeFeed(tmp_path) for _ in range(2)]
    one, other = (DirCache(tree.read, tree.stat, max_age=None, feed=feed) for feed in feeds)
    assert one.listing("").names == other.listing("").names == ["b"]
    arrived, release = held_back(feeds[0], "publish")
    first = late(lambda: one.changed("a", Entry("a", is_dir=False, size=1)))
    assert arrived.wait(20)
    second = in_thread(lambda: one.changed("a", Entry("a", is_dir=False, size=2)))
    second.join(0.5)  # it would overtake the first one within that time, if it could
    assert one.lookup("a").size in {1, 2}, "who only asks waits for nobody"
    release.set()
    first.join()
    second.join()
    assert one.lookup("a").size == other.lookup("a").size == 2
    for feed in feeds:
        feed.close()
