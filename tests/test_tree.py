"""Renaming folders where the store cannot: nothing is lost wherever it fails, and the error says what is left."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftpvfs import VFS
from tests.conftest import Store
from tests.servers import FaultProxy, Request

OBJECT_STORES = ["s3", "gs"]
COPYING = ["memory", "s3", "gs"]
CONDITIONAL = ["memory", "s3"]  # fake-gcs-server deletes whatever version is there
COUNT = 16
WHEN = 1_600_000_000.0
Content = dict[str, bytes]


@pytest.fixture
def vfs_of(make_vfs: Callable[..., VFS], tmp_path: Path) -> Callable[..., VFS]:
    def make(store: Store, **options: Any) -> VFS:
        return make_vfs(store, **{"cache_dir": str(tmp_path / "cache"), "poll_interval": None, **options})

    return make


def fill(store: Store, count: int = COUNT, folder: str = "d") -> Content:
    """Write a tree of `count` files, some of them deep; return what is in it, relative to the folder."""
    files = {f"{'sub/' * (number % 4)}{number}": os.urandom(20) for number in range(count)}
    for name, data in files.items():
        store.write(f"{folder}/{name}", data)
    return files


def contents(store: Store, folder: str) -> Content:
    inside = folder + "/"
    keys = [key for key in store.list() if key.startswith(inside) and not key.endswith("/")]
    return {key[len(inside) :]: store.read(key) for key in keys}


def seen(vfs: VFS, folder: str) -> set[str]:
    """All files below the folder, as the VFS lists them."""
    found = set()
    for entry in vfs.scandir(folder):
        if entry.is_dir():
            found |= {f"{entry.name}/{name}" for name in seen(vfs, entry.path)}
        else:
            found.add(entry.name)
    return found


def is_copy(request: Request) -> bool:
    return "x-amz-copy-source" in request.headers or "rewriteTo" in request.target


def test_a_folder_moves_with_all_that_is_in_it(store: Store, vfs_of: Callable[..., VFS]) -> None:
    files = fill(store)
    vfs = vfs_of(store)
    vfs.listdir("d/sub")
    vfs.rename("d", "new")
    assert contents(store, "new") == files
    assert contents(store, "d") == {}
    assert vfs.listdir() == ["new"]
    assert seen(vfs, "new") == set(files)
    assert not vfs.exists("d/sub")
    vfs.forget()
    assert vfs.listdir() == ["new"]
    assert seen(vfs, "new") == set(files)


def test_a_folder_moves_down_and_up_again(store: Store, vfs_of: Callable[..., VFS]) -> None:
    files = fill(store, 6)
    vfs = vfs_of(store)
    vfs.makedirs("x/y")
    vfs.rename("d", "x/y/z")
    assert contents(store, "x/y/z") == files
    vfs.rename("x/y", "y")
    assert contents(store, "y/z") == files
    assert vfs.listdir("x") == []
    assert vfs.listdir() == ["x", "y"]


def test_a_folder_whose_name_begins_like_another_moves_alone(store: Store, vfs_of: Callable[..., VFS]) -> None:
    files, other = fill(store, 5), fill(store, 5, "d2")
    vfs_of(store).rename("d", "e")
    assert contents(store, "e") == files
    assert contents(store, "d2") == other


def test_a_folder_replaces_an_empty_one(store: Store, vfs_of: Callable[..., VFS]) -> None:
    files = fill(store, 6)
    vfs = vfs_of(store)
    vfs.mkdir("empty")
    vfs.rename("d", "empty")
    assert contents(store, "empty") == files
    assert vfs.listdir() == ["empty"]


def test_a_folder_is_not_moved_into_itself_and_nothing_is_touched(store: Store, vfs_of: Callable[..., VFS]) -> None:
    files = fill(store, 6)
    vfs = vfs_of(store)
    for target in ("d/new", "d/sub/new", "d/sub"):
        with pytest.raises(OSError, match="d") as caught:
            vfs.rename("d", target)
        assert caught.value.errno in {errno.EINVAL}
    assert contents(store, "d") == files


def test_empty_folders_move_along(store: Store, vfs_of: Callable[..., VFS]) -> None:
    vfs = vfs_of(store)
    for path in ("d/empty", "d/sub/deep/empty", "only/empty"):
        vfs.makedirs(path)
    store.write("d/f", b"x")
    vfs.rename("d", "new")
    vfs.rename("only", "other")
    vfs.close()
    again = vfs_of(store)
    assert again.listdir() == ["new", "other"]
    assert again.listdir("new") == ["empty", "f", "sub"]
    assert again.listdir("new/sub/deep") == ["empty"]
    assert again.listdir("other") == ["empty"]


@pytest.mark.parametrize("store", OBJECT_STORES, indirect=True)
@pytest.mark.parametrize("dir_markers", [False, True])
def test_markers_of_others_move_along(store: Store, vfs_of: Callable[..., VFS], dir_markers: bool) -> None:
    for key in ("d/", "d/empty/", "d/sub/", "d/sub/f"):
        store.write(key, b"")
    vfs = vfs_of(store, dir_markers=dir_markers)
    vfs.rename("d", "new")
    # SeaweedFS lists no marker that came after an object in the folder, and they are written side by side.
    assert {"new/empty/", "new/sub/f"} <= store.list() <= {"new/", "new/empty/", "new/sub/", "new/sub/f"}
    assert vfs.listdir("new") == ["empty", "sub"]
    assert vfs.listdir() == ["new"]


@pytest.mark.parametrize("store", OBJECT_STORES, indirect=True)
def test_a_file_and_a_folder_of_one_name_are_told_apart(store: Store, vfs_of: Callable[..., VFS]) -> None:
    """An object store may have both `a` and `a/b`."""
    store.write("a/b", b"in the folder")
    store.write("d/x", b"x")
    vfs = vfs_of(store)
    vfs.rename("d", "e")
    assert store.list() == {"a/b", "e/x"}


@pytest.mark.parametrize("store", OBJECT_STORES, indirect=True)
def test_every_copy_stands_before_anything_is_deleted(
    store: Store, vfs_of: Callable[..., VFS], make_proxy: Callable[[Any], FaultProxy]
) -> None:
    fill(store)
    proxy = make_proxy(store)
    vfs_of(store.proxied(proxy)).rename("d", "new")
    order = ["copy" if is_copy(r) else r.method for r in proxy.seen if is_copy(r) or r.method == "DELETE"]
    assert order.count("copy") == COUNT
    assert order.index("DELETE") == COUNT


@pytest.mark.parametrize("number", [0, COUNT - 1])
@pytest.mark.parametrize("store", OBJECT_STORES, indirect=True)
def test_a_copy_that_fails_leaves_all_as_it_was(
    store: Store, vfs_of: Callable[..., VFS], make_proxy: Callable[[Any], FaultProxy], number: int
) -> None:
    files = fill(store)
    proxy = make_proxy(store)
    vfs = vfs_of(store.proxied(proxy), low_level_retries=1)
    name = sorted(files)[number].replace("/", "(/|%2F)")
    method, target = ("PUT", f"/new/{name}$") if store.kind == "s3" else ("POST", f"d(/|%2F){name}/rewriteTo")
    proxy.fail_next(method=method, target=target, status=500, code="InternalError")
    with pytest.raises(OSError, match="nothing was renamed") as caught:
        vfs.rename("d", "new")
    assert caught.value.filename == "d"
    assert "left" not in str(caught.value)
    assert contents(store, "d") == files
    assert contents(store, "new") == {}
    assert vfs.listdir() == ["d"]
    assert seen(vfs, "d") == set(files)
    vfs.rename("d", "new")
    assert contents(store, "new") == files
    assert contents(store, "d") == {}


@pytest.mark.parametrize("number", [0, COUNT - 1])
@pytest.mark.parametrize("store", OBJECT_STORES, indirect=True)
def test_a_delete_that_fails_loses_nothing_and_says_where_all_is(
    store: Store, vfs_of: Callable[..., VFS], make_proxy: Callable[[Any], FaultProxy], number: int
) -> None:
    files = fill(store)
    proxy = make_proxy(store)
    vfs = vfs_of(store.proxied(proxy), low_level_retries=1)
    vfs.listdir()
    name = sorted(files)[number].replace("/", "(/|%2F)")
    proxy.fail_next(method="DELETE", target=rf"d(/|%2F){name}($|\?)", status=500, code="InternalError")
    with pytest.raises(OSError, match="all files are in 'new' now, and some still in 'd' too"):
        vfs.rename("d", "new")
    assert contents(store, "new") == files
    left = contents(store, "d")
    assert sorted(files)[number] in left
    assert left.items() <= files.items()
    assert vfs.listdir() == ["d", "new"], "the listing hides what is there"
    assert seen(vfs, "new") == set(files)
    assert seen(vfs, "d") == set(left)


def test_copies_that_cannot_be_taken_back_are_told_of(
    s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: Callable[[Any], FaultProxy]
) -> None:
    files = fill(s3_store)
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy), low_level_retries=1)
    proxy.fail_next(method="PUT", target=f"/new/{sorted(files)[-1]}$", status=500, code="InternalError")
    proxy.fail_next(1000, method="DELETE", status=500, code="InternalError")
    with pytest.raises(OSError, match="nothing was renamed; copies are left in 'new'"):
        vfs.rename("d", "new")
    assert contents(s3_store, "d") == files
    assert vfs.listdir() == ["d", "new"]


def test_a_failed_rename_onto_an_empty_folder_leaves_that_too(
    s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: Callable[[Any], FaultProxy]
) -> None:
    files = fill(s3_store, 5)
    s3_store.write("d/", b"")
    s3_store.write("empty/", b"")
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy), low_level_retries=1)
    proxy.fail_next(method="PUT", target="/empty/0$", status=500, code="InternalError")
    with pytest.raises(OSError, match="nothing was renamed"):
        vfs.rename("d", "empty")
    assert contents(s3_store, "d") == files
    vfs.forget()
    assert vfs.listdir() == ["d", "empty"]
    assert vfs.listdir("empty") == []


@pytest.mark.parametrize("store", COPYING, indirect=True)
def test_a_folder_of_too_many_files_is_refused_untouched(store: Store, vfs_of: Callable[..., VFS]) -> None:
    files = fill(store, 12)
    before = store.list()
    vfs = vfs_of(store, max_rename_objects=11)
    with pytest.raises(OSError, match=r"more than 11 files .*max-rename-objects") as caught:
        vfs.rename("d", "new")
    assert caught.value.errno == errno.EFBIG
    assert store.list() == before
    assert vfs.listdir() == ["d"]
    assert not vfs.exists("new")
    again = vfs_of(store, max_rename_objects=12)
    again.rename("d", "new")
    assert contents(store, "new") == files


@pytest.mark.parametrize("store", OBJECT_STORES, indirect=True)
def test_what_is_written_into_the_folder_meanwhile_stays_visible(
    store: Store, vfs_of: Callable[..., VFS], make_proxy: Callable[[Any], FaultProxy]
) -> None:
    files = fill(store, 10)
    vfs = vfs_of(store)
    before_each(vfs, "remove", lambda path: store.write("d/late", b"came after the copies"))
    vfs.rename("d", "new")
    assert contents(store, "new") == files
    assert store.read("d/late") == b"came after the copies"
    assert vfs.listdir() == ["d", "new"]
    assert vfs.listdir("d") == ["late"]


def before_each(vfs: VFS, request: str, do: Callable[[str], object], path: str | None = None) -> None:
    """Do something right before the store is asked for something (of one path) for the first time."""
    asked = getattr(vfs.core.backend, request)
    done: list[str] = []

    def first(name: str, *arguments: Any, **keywords: Any) -> Any:
        if not done and path in (None, name):
            done.append(name)
            do(name)
        return asked(name, *arguments, **keywords)

    setattr(vfs.core.backend, request, first)


def put(vfs: VFS, path: str, data: bytes) -> None:
    with vfs.open(path, "wb") as file:
        file.write(data)


@pytest.mark.parametrize("store", CONDITIONAL, indirect=True)
@pytest.mark.parametrize("moment", ["copy", "remove"])
def test_a_file_that_is_stored_while_its_folder_is_renamed_is_not_lost(
    store: Store, vfs_of: Callable[..., VFS], moment: str
) -> None:
    files = fill(store, 6)
    vfs = vfs_of(store, low_level_retries=2)
    # Another one than that which the request is about: that is held.
    before_each(vfs, moment, lambda path: put(vfs, "d/sub/1" if path != "d/sub/1" else "d/0", b"NEW"))
    vfs.rename("d", "e")
    found = {**contents(store, "e"), **{f"old {name}": data for name, data in contents(store, "d").items()}}
    assert b"NEW" in found.values()
    kept = {name: data for name, data in files.items() if name not in ("sub/1", "0")}
    assert kept.items() <= found.items()
    assert len(contents(store, "e")) == len(files)
    assert moment == "remove" or contents(store, "d") == {}, "only what is deleted by then is a new file"


@pytest.mark.parametrize("store", CONDITIONAL, indirect=True)
def test_a_file_that_is_stored_all_the_time_keeps_its_old_name_and_the_error_says_so(
    store: Store, vfs_of: Callable[..., VFS]
) -> None:
    files = fill(store, 6)
    vfs = vfs_of(store)
    copy, versions = vfs.core.backend.copy, iter(range(100))

    def outdated(source: str, target: str) -> Any:
        there = copy(source, target)
        if source == "d/0":
            store.write("d/0", b"version %02d of others" % next(versions))
        return there

    vfs.core.backend.copy = outdated  # type: ignore[method-assign]
    with pytest.raises(OSError, match=r"0: it changes all the time \(1 of its files keep their names"):
        vfs.rename("d", "e")
    left = contents(store, "d")
    assert list(left) == ["0"]
    assert store.read("d/0") == b"version %02d of others" % (next(versions) - 1)
    assert {name: data for name, data in files.items() if name != "0"}.items() <= contents(store, "e").items()


@pytest.mark.parametrize("store", COPYING, indirect=True)
def test_a_copy_replaces_nothing_that_was_stored_at_the_new_name_meanwhile(
    store: Store, vfs_of: Callable[..., VFS]
) -> None:
    files = fill(store, 6)
    vfs = vfs_of(store)
    before_each(vfs, "walk", lambda path: store.write("e/0", b"of others"))
    with pytest.raises(OSError, match="0: there is a 'e/0' by now") as caught:
        vfs.rename("d", "e")
    assert caught.value.errno == errno.EBUSY
    assert store.read("e/0") == b"of others"
    assert contents(store, "d") == {"0": files["0"]}
    assert contents(store, "e") == {**files, "0": b"of others"}
    assert vfs.listdir() == ["d", "e"]


@pytest.mark.parametrize("store", OBJECT_STORES, indirect=True)
def test_copies_that_are_taken_back_are_copies_and_nothing_else(
    store: Store, vfs_of: Callable[..., VFS], make_proxy: Callable[[Any], FaultProxy]
) -> None:
    files = fill(store, 6)
    proxy = make_proxy(store)
    vfs = vfs_of(store.proxied(proxy), low_level_retries=1)
    method, target = ("PUT", "/new/0$") if store.kind == "s3" else ("POST", "d(/|%2F)0/rewriteTo")
    proxy.fail_next(method=method, target=target, status=500, code="InternalError")
    before_each(vfs, "remove", lambda path: store.write("new/0", b"of others"))
    with pytest.raises(OSError, match="nothing was renamed"):
        vfs.rename("d", "new")
    assert contents(store, "d") == files
    assert contents(store, "new") == {"0": b"of others"}


def test_five_hundred_objects_are_renamed_in_reasonable_time(s3_store: Store, vfs_of: Callable[..., VFS]) -> None:
    count = 500
    for number in range(count):
        s3_store.write(f"d/{number}", b"x", mtime=WHEN)
    vfs = vfs_of(s3_store)
    started = time.monotonic()
    vfs.rename("d", "new")
    took = time.monotonic() - started
    assert len(contents_keys(s3_store, "new")) == count
    assert contents_keys(s3_store, "d") == set()
    assert {entry.stat().st_mtime for entry in vfs.scandir("new")} == {WHEN}
    assert took < 40, "four requests for each object, eight at a time"


def contents_keys(store: Store, folder: str) -> set[str]:
    return {key for key in store.list() if key.startswith(folder + "/")}


def test_a_renamed_file_that_cannot_be_removed_stands_at_both_names_and_the_error_says_so(
    s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: Callable[[Any], FaultProxy]
) -> None:
    s3_store.write("a", b"content")
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy), low_level_retries=1)
    proxy.fail_next(method="DELETE", status=500, code="InternalError")
    with pytest.raises(OSError, match="It is at 'b' now, but the old name could not be removed") as caught:
        vfs.rename("a", "b")
    assert caught.value.filename == "a"
    assert (s3_store.read("a"), s3_store.read("b")) == (b"content", b"content")
    assert vfs.listdir() == ["a", "b"]


def test_a_file_whose_copy_fails_stays_as_it_was(
    s3_store: Store, vfs_of: Callable[..., VFS], make_proxy: Callable[[Any], FaultProxy]
) -> None:
    s3_store.write("a", b"content")
    s3_store.write("b", b"other")
    proxy = make_proxy(s3_store)
    vfs = vfs_of(s3_store.proxied(proxy), low_level_retries=1)
    proxy.fail_next(method="PUT", status=500, code="InternalError")
    with pytest.raises(OSError, match="a"):
        vfs.rename("a", "b")
    assert (s3_store.read("a"), s3_store.read("b")) == (b"content", b"other")
