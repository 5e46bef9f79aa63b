"""A VFS over the disk cache: what is dirty is there for everybody, the store follows, and what is here outlives it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.config import ConfigError
from ftpvfs.coordination.locks import PathLocks
from tests.conftest import Store, wait_until

WAITS = 30.0
HELD = "1h"  # as --vfs-write-back: nothing gets to the store unless it is asked for


@pytest.fixture
def cache_dir(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def make(make_vfs: Callable[..., Any], cache_dir: str) -> Callable[..., Any]:
    def made(store: Store, mode: str = "writes", **options: Any) -> Any:
        options = {"write_back": HELD, "low_level_retries": 2, **options}
        return make_vfs(store, cache_mode=mode, cache_dir=cache_dir, **options)

    return made


def put(vfs: Any, path: str, data: bytes, **arguments: Any) -> None:
    with vfs.open(path, "wb", **arguments) as file:
        file.write(data)


def get(vfs: Any, path: str) -> bytes:
    with vfs.open(path) as file:
        data: bytes = file.read()
    return data


two_stores = pytest.mark.parametrize("store", ["local", "s3"], indirect=True)


# --- what is dirty is there


@two_stores
@pytest.mark.parametrize("mode", ["writes", "full"])
def test_what_is_dirty_is_shown_read_and_changed_before_the_store_has_it(
    store: Store, make: Callable[..., Any], mode: str
) -> None:
    store.write("both", b"old")
    vfs = make(store, mode)
    put(vfs, "both", b"new and longer")
    put(vfs, "here", b"0123456789")
    with vfs.open("here", "r+b") as file:
        file.seek(4)
        file.write(b"XY")
    with vfs.open("here", "ab") as file:
        file.write(b"end")
    vfs.truncate("here", 12)
    vfs.utime("here", (0, 1_600_000_000))
    assert vfs.listdir() == ["both", "here"]
    assert [entry.stat().st_size for entry in vfs.scandir()] == [14, 12]
    assert vfs.stat("here").st_mtime == 1_600_000_000
    assert get(vfs, "here") == b"0123XY6789en"
    assert store.list() == {"both"}
    assert store.read("both") == b"old"
    assert {row["path"] for row in vfs.queue()} == {"both", "here"}
    vfs.sync(WAITS)
    assert vfs.queue() == []
    assert store.list() == {"both", "here"}
    assert store.read("here") == b"0123XY6789en"
    assert store.mtime("here") == 1_600_000_000
    assert get(vfs, "both") == b"new and longer"


@two_stores
def test_a_reader_of_a_dirty_file_keeps_its_version(store: Store, make: Callable[..., Any]) -> None:
    vfs = make(store)
    put(vfs, "a", b"first")
    with vfs.open("a") as reader:
        assert reader.read(2) == b"fi"
        put(vfs, "a", b"SECOND")
        vfs.sync(WAITS)
        assert reader.read() == b"rst"
    assert get(vfs, "a") == b"SECOND"


@two_stores
def test_a_file_deleted_before_it_is_stored_never_gets_there(store: Store, make: Callable[..., Any]) -> None:
    store.write("old", b"old")
    vfs = make(store)
    put(vfs, "old", b"new")
    put(vfs, "never", b"x")
    vfs.remove("old")
    vfs.remove("never")
    assert vfs.listdir() == []
    with pytest.raises(FileNotFoundError):
        vfs.remove("never")
    with pytest.raises(FileNotFoundError):
        vfs.open("old")
    vfs.sync(WAITS)
    assert store.list() == set()


@two_stores
def test_a_folder_is_renamed_with_what_is_dirty_stored_and_deleted_in_it(
    store: Store, make: Callable[..., Any]
) -> None:
    for key in ("old/stored", "old/changed", "old/deleted", "old/sub/deep"):
        store.write(key, b"at the store")
    vfs = make(store)
    put(vfs, "old/changed", b"changed here")
    put(vfs, "old/deleted", b"x")
    vfs.remove("old/deleted")
    put(vfs, "old/sub/new", b"new here")
    vfs.rename("old", "new")
    assert vfs.listdir() == ["new"]
    assert vfs.listdir("new") == ["changed", "stored", "sub"]
    assert vfs.listdir("new/sub") == ["deep", "new"]
    assert get(vfs, "new/changed") == b"changed here"
    vfs.sync(WAITS)
    files = {key for key in store.list() if not key.endswith("/")}
    assert files == {"new/changed", "new/stored", "new/sub/deep", "new/sub/new"}
    assert store.read("new/changed") == b"changed here"
    assert not vfs.exists("old")


@pytest.mark.parametrize("store", ["s3"], indirect=True)
@pytest.mark.parametrize("request_", ["walk", "copy", "remove"])
def test_a_file_acknowledged_while_its_folder_is_renamed_is_stored_whole_and_nothing_older_over_it(
    store: Store, make: Callable[..., Any], request_: str
) -> None:
    for key in ("d/a", "d/b", "d/c"):
        store.write(key, b"at the store")
    vfs = make(store)
    vfs.mkdir("e")
    put(vfs, "d/b", b"b dirty before")
    asked, done = getattr(vfs.core.backend, request_), []

    def late(*arguments: Any, **keywords: Any) -> Any:
        if not done:
            done.append(True)
            put(vfs, "d/a", b"a acknowledged meanwhile")
            put(vfs, "d/b", b"b acknowledged meanwhile")
            put(vfs, "d/new", b"new")
            put(vfs, "e/of others", b"theirs")
            vfs.core.parts.writeback.notify()
        return asked(*arguments, **keywords)

    setattr(vfs.core.backend, request_, late)
    vfs.rename("d", "e")
    vfs.sync(WAITS)
    vfs.forget()
    assert {key: store.read(key) for key in store.list() if not key.endswith("/")} == {
        "e/a": b"a acknowledged meanwhile",
        "e/b": b"b acknowledged meanwhile",
        "e/c": b"at the store",
        "e/new": b"new",
        "e/of others": b"theirs",
    }
    assert vfs.listdir("e") == ["a", "b", "c", "new", "of others"]


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_file_acknowledged_at_a_new_name_while_a_folder_is_renamed_there_is_not_replaced(
    store: Store, make: Callable[..., Any]
) -> None:
    for key in ("d/a", "d/b"):
        store.write(key, b"at the store")
    vfs = make(store)
    vfs.mkdir("e")
    put(vfs, "d/b", b"b dirty before")
    walk = vfs.core.backend.walk

    def late(path: str) -> Any:
        put(vfs, "e/a", b"theirs")
        put(vfs, "e/b", b"theirs, too")
        put(vfs, "d/b", b"b acknowledged meanwhile")
        return walk(path)

    vfs.core.backend.walk = late
    vfs.rename("d", "e")
    vfs.sync(WAITS)
    found = {key: store.read(key) for key in store.list() if not key.endswith("/")}
    assert found["e/a"] == b"theirs"
    assert found["e/b"] == b"theirs, too"
    assert found["d/a"] == b"at the store"
    assert found["d/b"] == b"b acknowledged meanwhile"


@two_stores
def test_a_folder_of_many_dirty_files_is_renamed_without_storing_one_of_them(
    store: Store, make: Callable[..., Any]
) -> None:
    store.write("d/stored", b"x")
    vfs = make(store)
    names = [f"{number:03}" for number in range(250)]
    for name in names:
        put(vfs, f"d/{name}", name.encode())
    vfs.rename("d", "e")
    assert [row["path"] for row in vfs.queue() if row["action"] == "upload"] == [f"e/{name}" for name in names]
    assert store.list() - {"e/"} == {"e/stored"}
    assert vfs.listdir("e") == [*names, "stored"]
    assert get(vfs, "e/249") == b"249"


@two_stores
def test_nothing_is_stored_below_a_folder_that_is_being_renamed(store: Store, make: Callable[..., Any]) -> None:
    store.write("d/stored", b"x")
    vfs = make(store, write_back="0s")
    backend, seen = vfs.core.backend, []
    upload_file = backend.upload_file

    def sent(path: str, *arguments: Any, **keywords: Any) -> Any:
        seen.append(path)
        return upload_file(path, *arguments, **keywords)

    backend.upload_file = sent
    vfs.mkdir("e")
    with PathLocks(vfs.cache_folder).hold_folders("d", "e"):
        put(vfs, "d/a", b"x")
        put(vfs, "e/a", b"x")
        put(vfs, "free", b"x")
        wait_until(lambda: store.list() >= {"free"}, timeout=WAITS)
        assert seen == ["free"]
    vfs.sync(WAITS)
    assert sorted(seen) == ["d/a", "e/a", "free"]


@two_stores
@pytest.mark.parametrize("is_renamed", [True, False], ids=["renamed", "removed"])
def test_a_file_is_shown_in_the_folder_that_others_took_away_while_it_was_written(
    store: Store, make: Callable[..., Any], is_renamed: bool
) -> None:
    vfs = make(store)
    vfs.makedirs("d/e")
    assert vfs.listdir() == ["d"]
    assert vfs.listdir("d/e") == []
    with vfs.open("d/e/a", "wb") as file:
        file.write(b"a")
        if is_renamed:
            vfs.rename("d", "other")
        else:
            vfs.rmdir("d/e")
            vfs.rmdir("d")
        assert not vfs.exists("d")
    for _ in range(2):
        assert "d" in vfs.listdir()
        assert vfs.listdir("d") == ["e"]
        assert vfs.listdir("d/e") == ["a"]
        vfs.forget()
        assert vfs.isdir("d")
    with pytest.raises(OSError, match="empty"):
        vfs.rmdir("d")
    vfs.sync(WAITS)
    vfs.forget()
    assert get(vfs, "d/e/a") == store.read("d/e/a") == b"a"


@two_stores
def test_a_stored_file_renamed_over_one_that_waits_replaces_it(store: Store, make: Callable[..., Any]) -> None:
    store.write("stored", b"stored")
    vfs = make(store)
    put(vfs, "waits", b"waits")
    vfs.rename("stored", "waits")
    assert get(vfs, "waits") == b"stored"
    vfs.sync(WAITS)
    assert store.list() == {"waits"}
    assert store.read("waits") == b"stored"


@two_stores
def test_a_folder_takes_the_name_of_a_file_that_was_just_deleted(store: Store, make: Callable[..., Any]) -> None:
    store.write("name", b"file")
    vfs = make(store)
    put(vfs, "name", b"again")
    vfs.remove("name")
    vfs.mkdir("name")
    put(vfs, "name/inside", b"x")
    vfs.sync(WAITS)
    assert "name/inside" in store.list()
    vfs.remove("name/inside")
    vfs.rmdir("name")
    assert vfs.listdir() == []


@pytest.mark.parametrize("mode", ["minimal", "full"])
def test_a_read_only_vfs_makes_no_file_for_who_wants_to_read_it(
    local_store: Store, make: Callable[..., Any], mode: str
) -> None:
    local_store.write("there", b"there")
    vfs = make(local_store, mode, read_only=True)
    with pytest.raises(OSError, match="read-only") as caught:
        vfs.open("missing", os.O_RDONLY | os.O_CREAT)
    assert caught.value.errno == errno.EROFS
    with vfs.open("there", os.O_RDONLY | os.O_CREAT) as file:
        assert file.read() == b"there"
    assert vfs.queue() == []
    assert local_store.list() == {"there"}


@pytest.mark.parametrize(
    ("kind", "name", "code"), [("local", "link", errno.EEXIST), ("s3", "caf\udce9", errno.EINVAL)]
)
@pytest.mark.parametrize("mode", ["minimal", "full"])
def test_a_name_that_the_store_can_never_take_is_refused_at_once(
    make_store: Callable[..., Store], make: Callable[..., Any], kind: str, name: str, code: int, mode: str
) -> None:
    store = make_store(kind)
    if kind == "local":
        Path(store.url, "link").symlink_to("/nowhere")
    vfs = make(store, mode)
    put(vfs, "a", b"x")
    for change in (lambda: put(vfs, name, b"x"), lambda: vfs.rename("a", name), lambda: vfs.mkdir(name)):
        with pytest.raises(OSError, match=r"link|UTF-8") as caught:
            change()
        assert caught.value.errno == code
    assert vfs.listdir() == ["a"]


# --- what a positive reply means


@two_stores
@pytest.mark.parametrize(("mode", "ack"), [("minimal", "cache"), ("writes", "store"), ("full", "store")])
def test_where_a_reply_waits_for_the_store_it_has_the_file(
    store: Store, make: Callable[..., Any], mode: str, ack: str
) -> None:
    vfs = make(store, mode, ack=ack)
    put(vfs, "a", b"x" * 20_000_000)
    assert store.read("a") == b"x" * 20_000_000
    with vfs.open("a", "r+b") as file:
        file.write(b"changed")
    assert store.read("a")[:9] == b"changedxx"
    assert vfs.queue() == []
    assert store.uploads() == set()
    assert get(vfs, "a")[:9] == b"changedxx"


@two_stores
@pytest.mark.parametrize(("mode", "ack"), [("minimal", "cache"), ("full", "store")])
def test_who_appends_to_what_others_change_meanwhile_is_dealt_with_as_the_conflict_policy_says(
    store: Store, make: Callable[..., Any], mode: str, ack: str, caplog: pytest.LogCaptureFixture
) -> None:
    def append(conflict: str) -> Any:
        store.write("a", b"base ")
        vfs = make(store, mode, ack=ack, conflict=conflict)
        with vfs.open("a", "ab") as file:
            file.write(b"and more")
            wait_until(lambda: file.pressure() is None)  # the base is here
            store.write("a", b"by somebody else")
        return vfs

    append("overwrite")
    assert store.read("a") == b"base and more"
    assert "is overwritten" in caplog.text

    with pytest.raises(OSError, match="--vfs-conflict is fail"):
        append("fail")
    assert store.read("a") == b"by somebody else"

    append("keep-both")
    vfs = append("keep-both")  # most often within the same second
    assert get(vfs, "a") == b"by somebody else"
    besides = store.list() - {"a"}
    assert len(besides) == 2
    for beside in besides:
        assert beside.startswith("a (conflict ")
        assert store.read(beside) == b"base and more"
    assert set(vfs.listdir()) == {"a", *besides}


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_an_upload_that_fails_while_it_is_sent_is_sent_again_from_the_cache(
    store: Store, make: Callable[..., Any], make_proxy: Callable[..., Any]
) -> None:
    proxy = make_proxy(store)
    vfs = make(store.proxied(proxy), "writes", ack="store", low_level_retries=1)
    proxy.fail_next(method="PUT")
    put(vfs, "a", b"x" * 20_000_000)
    assert store.read("a") == b"x" * 20_000_000


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_store_that_refuses_is_told_to_who_waits_for_it_and_the_old_file_stays(
    store: Store, make: Callable[..., Any], make_proxy: Callable[..., Any]
) -> None:
    store.write("a", b"old")
    proxy = make_proxy(store)
    vfs = make(store.proxied(proxy), "writes", ack="store", low_level_retries=1)
    assert vfs.stat("a").st_size == 3
    file = vfs.open("a", "wb", autocommit=False, user="alice")
    file.write(b"new bytes")
    proxy.refuse = True
    with pytest.raises(OSError, match="store") as caught:
        file.commit()
    file.close()
    assert caught.value.errno not in {None, errno.ENOENT}
    proxy.heal()
    assert store.read("a") == b"old"
    assert vfs.queue() == []
    kept = vfs.partial("a", "alice")
    assert kept is not None
    assert kept.size == 9
    assert vfs.partial("a", "mallory") is None


# --- interrupted uploads


def interrupt(vfs: Any, path: str, data: bytes) -> Any:
    """Break an upload off, and return what came of it."""
    with vfs.open(path, "wb", autocommit=False, user="alice") as file:
        file.write(data)
    partial = vfs.partial(path, "alice")
    assert partial is not None
    return partial


def test_an_upload_of_which_nothing_was_left_to_send_replaces_the_old_file(
    local_store: Store, make: Callable[..., Any]
) -> None:
    local_store.write("a", b"old")
    vfs = make(local_store)
    with vfs.open("a", "r+b", user="alice", partial=interrupt(vfs, "a", b"all of it")) as file:
        file.resume(9)
    assert get(vfs, "a") == b"all of it"
    assert vfs.partial("a", "alice") is None
    vfs.sync(WAITS)
    assert local_store.read("a") == b"all of it"


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda vfs: vfs.remove("d/old"), ["d/old"]),
        (lambda vfs: vfs.remove("d/dirty"), ["d/dirty"]),
        (lambda vfs: vfs.rename("d/old", "d/new"), ["d/old"]),
        (lambda vfs: vfs.rename("d/dirty", "d/old"), ["d/dirty", "d/old"]),
        (lambda vfs: vfs.rename("d", "e"), ["d/dirty", "d/old", "e/dirty", "e/old"]),
    ],
    ids=["remove", "remove what waits", "rename", "rename over it", "rename the folder"],
)
def test_nobody_goes_on_with_an_upload_to_a_name_that_means_another_file(
    local_store: Store, make: Callable[..., Any], change: Callable[[Any], None], changed: list[str]
) -> None:
    local_store.write("d/old", b"old")
    vfs = make(local_store)
    put(vfs, "d/dirty", b"waits")
    for name in ("d/old", "d/dirty"):
        interrupt(vfs, name, b"half of")
    change(vfs)
    assert {path for path in changed if vfs.partial(path, "alice")} == set()


def test_an_upload_that_broke_off_in_a_folder_goes_with_the_folder(
    local_store: Store, make: Callable[..., Any]
) -> None:
    vfs = make(local_store)
    vfs.mkdir("d")
    interrupt(vfs, "d/a", b"half of")
    vfs.rmdir("d")
    assert vfs.partial("d/a", "alice") is None


# --- a store that is away


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_store_that_is_away_keeps_nobody_from_handing_in_files_or_reading_what_is_here(
    store: Store, make: Callable[..., Any], make_proxy: Callable[..., Any]
) -> None:
    store.write("folder/stored", b"stored")
    proxy = make_proxy(store)
    vfs = make(store.proxied(proxy), "full", low_level_retries=1, dir_cache_time="0s")
    assert get(vfs, "folder/stored") == b"stored"
    assert vfs.listdir("folder") == ["stored"]
    proxy.refuse = True
    put(vfs, "folder/new", b"new")
    put(vfs, "other", b"other")
    assert get(vfs, "folder/stored") == b"stored"
    assert get(vfs, "folder/new") == b"new"
    assert vfs.listdir("folder") == ["new", "stored"]
    assert store.list() == {"folder/stored"}
    proxy.heal()
    vfs.sync(WAITS)
    assert store.list() == {"folder/stored", "folder/new", "other"}


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_what_waits_is_renamed_and_listed_while_the_store_is_away(
    store: Store, make: Callable[..., Any], make_proxy: Callable[..., Any]
) -> None:
    store.write("folder/stored", b"stored")
    proxy = make_proxy(store)
    vfs = make(store.proxied(proxy), "writes", low_level_retries=1)
    proxy.refuse = True
    put(vfs, "folder/new.part", b"new")
    assert vfs.listdir("folder") == ["new.part"]
    assert vfs.isdir("folder")
    vfs.rename("folder/new.part", "folder/stored")
    assert vfs.listdir("folder") == ["stored"]
    with pytest.raises(OSError, match="store"):
        vfs.listdir("other")
    proxy.heal()
    put(vfs, "folder/second", b"second")
    assert vfs.listdir("folder") == ["second", "stored"]
    vfs.sync(WAITS)
    assert store.list() == {"folder/stored", "folder/second"}
    assert store.read("folder/stored") == b"new"


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_store_that_never_answers_keeps_nobody_from_handing_in_files(
    store: Store, make: Callable[..., Any], make_proxy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftpvfs.vfs.questions.ANSWER_TIMEOUT", 0.2)
    proxy = make_proxy(store)
    vfs = make(store.proxied(proxy), "writes", timeout="1h")
    assert vfs.listdir() == []
    vfs.forget()
    proxy.black_hole = True
    for name in ("a", "folder/b", "caf\u00e9"):
        put(vfs, name, b"handed in")
    assert get(vfs, "a") == b"handed in"
    assert len(vfs.queue()) == 3
    proxy.heal()
    vfs.sync(WAITS)
    assert store.list() == {"a", "folder/b", "caf\u00e9"}


def test_what_waits_is_renamed_to_another_case_of_its_name(
    local_store: Store, make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    vfs = make(local_store, case_insensitive=True, conflict="fail")
    put(vfs, "a", b"waits")
    vfs.rename("a", "A")
    assert vfs.listdir() == ["A"]
    assert get(vfs, "a") == b"waits"
    vfs.sync(WAITS)
    assert local_store.list() == {"A"}
    local_store.write("b", b"at the store")
    vfs.forget()
    put(vfs, "b", b"waits")
    vfs.rename("b", "B")
    vfs.sync(WAITS)
    assert local_store.list() == {"A", "B"}
    assert local_store.read("B") == b"waits"
    assert "by others" not in caplog.text


# --- other processes, and the next start


@two_stores
def test_two_on_one_cache_see_what_is_dirty_at_once(store: Store, make: Callable[..., Any]) -> None:
    one, other = make(store), make(store)
    assert other.listdir() == []
    put(one, "a", b"one's")
    assert other.listdir() == ["a"]
    assert get(other, "a") == b"one's"
    other.rename("a", "b")
    assert one.listdir() == ["b"]
    put(other, "b", b"other's")
    assert get(one, "b") == b"other's"
    one.remove("b")
    assert not other.exists("b")
    put(one, "c", b"c")
    other.sync(WAITS)
    assert store.list() == {"c"}
    assert one.queue() == []


@two_stores
def test_what_waits_when_a_vfs_is_closed_is_there_at_the_next_start_and_gets_to_the_store(
    store: Store, make: Callable[..., Any]
) -> None:
    store.write("deleted", b"x")
    vfs = make(store)
    put(vfs, "a", b"waits")
    vfs.utime("a", (0, 1_500_000_000))
    put(vfs, "deleted", b"y")
    vfs.remove("deleted")
    assert vfs.stop() == 2
    vfs.close()
    assert store.list() == {"deleted"}

    vfs = make(store)
    assert vfs.listdir() == ["a"]
    assert vfs.stat("a").st_size == 5
    assert vfs.stat("a").st_mtime == 1_500_000_000
    assert get(vfs, "a") == b"waits"
    assert vfs.stop(WAITS) == 0
    assert store.list() == {"a"}
    assert store.mtime("a") == 1_500_000_000


def test_what_a_cache_has_left_is_shown_stored_and_replaced_when_the_mode_is_off(
    local_store: Store, make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    local_store.write("deleted", b"at the store")
    vfs = make(local_store)
    for name in ("kept", "replaced", "deleted", "renamed"):
        put(vfs, name, b"left in the cache")
    vfs.close()

    vfs = make(local_store, "off")
    assert vfs.listdir() == ["deleted", "kept", "renamed", "replaced"]
    assert "4 files or deletions" in caplog.text
    assert get(vfs, "kept") == b"left in the cache"
    put(vfs, "replaced", b"newer")
    assert local_store.read("replaced") == b"newer"
    vfs.remove("deleted")
    vfs.rename("renamed", "new name")
    with pytest.raises(OSError, match="--vfs-cache-mode"):
        vfs.open("kept", "ab")
    vfs.sync(WAITS)
    assert local_store.list() == {"kept", "new name", "replaced"}
    assert local_store.read("kept") == b"left in the cache"
    vfs.close()

    vfs = make(local_store)
    vfs.sync(WAITS)
    assert get(vfs, "replaced") == b"newer"
    assert vfs.listdir() == ["kept", "new name", "replaced"]


def test_in_mode_off_nothing_is_opened_where_no_cache_has_left_anything(
    local_store: Store, make: Callable[..., Any], cache_dir: str
) -> None:
    vfs = make(local_store, "off")
    put(vfs, "a", b"x")
    assert list(Path(cache_dir).rglob("data")) == []
    assert "cache" not in vfs.stats()


@two_stores
def test_write_back_stores_after_the_rest_that_is_asked_for(store: Store, make: Callable[..., Any]) -> None:
    vfs = make(store, write_back="0s")
    put(vfs, "a", b"soon")
    wait_until(lambda: store.list() == {"a"})
    wait_until(lambda: vfs.queue() == [])


# --- in full


@two_stores
def test_in_full_a_file_is_fetched_once_and_changes_at_the_store_are_seen(
    store: Store, make: Callable[..., Any]
) -> None:
    data = os.urandom(3_000_000)
    store.write("a", data)
    vfs = make(store, "full", dir_cache_time="0s")
    assert get(vfs, "a") == data
    fetched = vfs.stats()["downloads"]["bytes"]
    assert fetched == len(data)
    assert get(vfs, "a") == data
    assert vfs.stats()["downloads"]["bytes"] == fetched
    store.write("a", b"changed by others")
    assert get(vfs, "a") == b"changed by others"


@two_stores
def test_in_full_what_was_uploaded_is_read_without_asking_for_its_bytes(
    store: Store, make: Callable[..., Any]
) -> None:
    vfs = make(store, "full")
    put(vfs, "a", b"x" * 1_000_000)
    vfs.sync(WAITS)
    wait_until(lambda: vfs.core.parts.cache.record("a"))  # kept a moment after the store has it
    assert get(vfs, "a") == b"x" * 1_000_000
    assert vfs.stats()["downloads"].get("bytes", 0) == 0


def test_a_store_of_the_process_alone_has_no_cache(memory_store: Store, make: Callable[..., Any]) -> None:
    with pytest.raises(OSError, match="--vfs-cache-mode must be off"):
        make(memory_store).start()


@pytest.mark.parametrize("store", ["local"], indirect=True)
@pytest.mark.parametrize(("mode", "ack"), [("minimal", "cache"), ("writes", "cache"), ("full", "store")])
def test_a_program_hears_of_what_has_arrived_and_of_what_is_stored(
    store: Store, make: Callable[..., Any], mode: str, ack: str
) -> None:
    received: list[dict[str, Any]] = []
    stored: list[dict[str, Any]] = []
    vfs = make(store, mode, ack=ack, on_received=received.append, on_stored=stored.append)
    put(vfs, "a", b"12345", user="alice")
    vfs.sync(WAITS)
    wait_until(lambda: stored and received, timeout=WAITS)
    for event in (received[0], stored[0]):
        assert (event["path"], event["size"], event["user"]) == ("a", 5, "alice")
    assert stored[0]["fingerprint"] is not None


def test_events_of_a_cache_that_is_off_are_refused(local_store: Store, make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="--vfs-cache-mode"):
        make(local_store, "off", on_stored=print)


def test_a_store_that_keeps_no_times_shows_those_that_files_were_given(
    sftp_server: Any, make_vfs: Callable[..., Any], cache_dir: str
) -> None:
    def opened() -> Any:
        url = f"sftp://127.0.0.1{sftp_server.root}"
        return make_vfs(
            Store("sftp", url, sftp_server.storage_options, "", None),
            cache_mode="writes", cache_dir=cache_dir, write_back=HELD,
        )  # fmt: skip

    vfs = opened()
    put(vfs, "a", b"x")
    vfs.utime("a", (0, 1_400_000_000))
    vfs.sync(WAITS)
    assert vfs.stat("a").st_mtime == 1_400_000_000
    vfs.close()
    assert opened().stat("a").st_mtime == 1_400_000_000


@two_stores
@pytest.mark.parametrize("conflict", ["overwrite", "keep-both"])
def test_writing_one_file_again_and_again_is_no_conflict_with_oneself(
    store: Store, make: Callable[..., Any], conflict: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = (make(store, "full", write_back="0s", conflict=conflict) for _ in range(2))
    for number in range(25):
        with (one, other)[number % 2].open("a", "wb") as file:
            file.write(b"%d" % number)
            (one, other)[number % 3 % 2].queue()
    one.sync(WAITS)
    assert store.list() == {"a"}
    assert store.read("a") == b"24"
    assert "by others" not in caplog.text
