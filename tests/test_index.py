"""The index: what processes share on disk, and what happens when the disk has something else."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diskcache
import pytest

from ftpvfs.cache.index import Index, cache_name
from tests.conftest import program_environment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "s3-bucket"


@pytest.fixture
def index(folder: Path) -> Iterator[Index]:
    index = Index(folder)
    yield index
    index.close()


def reopened(folder: Path) -> Index:
    return Index(folder)


# --- made folders


def test_a_made_folder_is_there_for_all_processes_and_after_a_restart(folder: Path, index: Index) -> None:
    assert index.add_folder("a/b/c")
    assert not index.add_folder("a/b/c"), "it is no news"
    other = reopened(folder)
    assert other.is_made("a/b/c")
    assert other.made_folders("a/b") == {"c"}
    other.drop_folder("a/b/c")
    other.close()
    assert not index.is_made("a/b/c")


def test_the_folders_above_a_made_one_exist_too(index: Index) -> None:
    index.add_folder("a/b/c")
    assert index.made_folders("") == {"a"}
    assert index.is_made("a/b")
    assert not index.is_made("")
    assert not index.add_folder("")


def test_dropping_a_folder_forgets_all_below_and_nothing_beside_it(index: Index) -> None:
    for path in ("a/b/c", "a/b2", "ab"):
        index.add_folder(path)
    index.drop_folder("a/b")
    assert not index.is_made("a/b")
    assert not index.is_made("a/b/c")
    assert index.made_folders("a/b") == set()
    assert index.made_folders("a") == {"b2"}
    assert index.made_folders("") == {"a", "ab"}


@pytest.mark.parametrize("target", ["x", "other/place", "a/bb"])
def test_a_renamed_folder_takes_along_what_was_made_in_it(index: Index, target: str) -> None:
    for path in ("a/b/c/d", "a/b/e", "a/other"):
        index.add_folder(path)
    index.move_folder("a/b", target)
    assert index.is_made(target)
    assert index.made_folders(target) == {"c", "e"}
    assert index.made_folders(f"{target}/c") == {"d"}
    assert not index.is_made("a/b")
    assert index.made_folders("a/b") == set()
    assert "other" in index.made_folders("a")


@pytest.mark.parametrize("name", ["ümläut", "🙂", "caf\udce9", "'; DROP TABLE Cache; --", "%", "a:b", " ", "x" * 255])
def test_any_name_can_be_remembered(index: Index, name: str) -> None:
    index.add_folder(f"{name}/{name}")
    assert index.made_folders("") == {name}
    assert index.is_made(f"{name}/{name}")
    index.add_set_times(name, {name: ("v", 1.5)})
    index.move_set_times(name, "moved")
    assert index.set_times("moved") == {name: ("v", 1.5)}
    index.remember_mtimes(name, {name: (None, 1.5)})
    assert index.mtimes(name) == {name: (None, 1.5)}


# --- times


def test_asked_times_are_replaced_as_a_whole(index: Index) -> None:
    index.remember_mtimes("d", {"a": ("1", 1.0), "b": ("1", 2.0)})
    index.remember_mtimes("d", {"b": ("2", 3.0)})
    assert index.mtimes("d") == {"b": ("2", 3.0)}
    assert index.mtimes("elsewhere") == {}


def test_set_times_are_added_and_dropped_one_by_one(index: Index) -> None:
    for number in range(50):
        index.add_set_times("d", {f"f{number}": ("v", float(number))})
    index.add_set_times("d", {"f7": ("w", 70.0)})
    index.drop_set_time("d/f8")
    index.drop_set_time("d/never")
    times = index.set_times("d")
    assert len(times) == 49
    assert times["f7"] == ("w", 70.0)
    assert index.set_times("d", "f9")["f9"] == ("v", 9.0)
    assert "f8" not in index.set_times("d", "f8")


def test_set_times_follow_a_renamed_folder(index: Index) -> None:
    index.add_set_times("a", {"f": ("v", 1.0)})
    index.add_set_times("a/b", {"g": ("v", 2.0)})
    index.add_set_times("ab", {"h": ("v", 3.0)})
    index.move_set_times("a", "x/y")
    assert index.set_times("x/y") == {"f": ("v", 1.0)}
    assert index.set_times("x/y/b") == {"g": ("v", 2.0)}
    assert index.set_times("ab") == {"h": ("v", 3.0)}
    assert index.set_times("a") == index.set_times("a/b") == {}


def test_a_large_record_stays_in_the_one_database(folder: Path, index: Index) -> None:
    index.remember_mtimes("d", {f"file-{number}": ("v", 1.0) for number in range(20_000)})
    assert len(index.mtimes("d")) == 20_000
    assert {path.name for path in folder.iterdir()} <= {"cache.db", "cache.db-wal", "cache.db-shm", "lock", "ballast"}


# --- what others may put there


class Bomb:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.mark,))


def test_a_pickled_value_is_never_unpickled_and_its_record_is_dropped(
    folder: Path, index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mark = tmp_path / "the bomb went off"
    with diskcache.Cache(str(folder)) as plain:
        plain["made:a"] = Bomb(str(mark))
    with caplog.at_level(logging.ERROR):
        assert index.made_folders("a") == set()
    assert "pickled" in caplog.text
    assert not mark.exists()
    index.add_folder("a/b")
    assert index.made_folders("a") == {"b"}


def test_a_pickled_key_is_never_unpickled(folder: Path, index: Index, tmp_path: Path) -> None:
    mark = tmp_path / "the bomb went off"
    with diskcache.Cache(str(folder)) as plain:
        plain[Bomb(str(mark))] = b"{}"
    with pytest.raises(OSError, match="pickled key"):
        index.move_set_times("a", "b")
    assert not mark.exists()
    index.add_folder("a")
    assert index.is_made("a")


@pytest.mark.parametrize("value", [b"", b"{", b"\xff\xfe", b"[1", "text"])
def test_a_record_that_is_no_json_is_dropped_loudly(
    folder: Path, index: Index, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with diskcache.Cache(str(folder)) as plain:
        plain["made:a"] = value
    with caplog.at_level(logging.ERROR):
        assert index.made_folders("a") == set()
    assert "dropped" in caplog.text


def test_nothing_but_text_and_bytes_is_written(folder: Path) -> None:
    from ftpvfs.cache.database import RecordDisk

    with diskcache.Cache(str(folder), disk=RecordDisk) as cache:
        with pytest.raises(TypeError):
            cache["a"] = {"not": "bytes"}
        with pytest.raises(TypeError):
            cache[1, 2] = b"x"


# --- damage


def spoil(folder: Path, how: str) -> None:
    database = folder / "cache.db"
    for beside in ("cache.db-wal", "cache.db-shm"):
        (folder / beside).unlink(missing_ok=True)
    data = bytearray(database.read_bytes())
    if how == "no database":
        data = bytearray(b"this is no database at all" * 1000)
    elif how == "pages":
        data[4096:] = os.urandom(len(data) - 4096)
    elif how == "cut short":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    database.write_bytes(data)


def filled(folder: Path) -> None:
    index = Index(folder)
    for number in range(200):
        index.add_folder(f"folder-{number}/{'x' * 200}")
    index.close()


@pytest.mark.parametrize("how", ["no database", "pages", "cut short"])
def test_a_damaged_database_is_moved_aside_and_a_new_one_begun(
    folder: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    filled(folder)
    spoil(folder, how)
    spoilt = (folder / "cache.db").read_bytes()
    with caplog.at_level(logging.ERROR):
        index = Index(folder)
    assert "damaged" in caplog.text
    assert str(folder) in caplog.text
    assert index.made_folders("") == set()
    index.add_folder("a")
    assert index.is_made("a")
    index.close()
    (aside,) = folder.glob("damaged-*")
    assert (aside / "cache.db").read_bytes() == spoilt, "it was not kept for whoever wants to look"
    again = Index(folder)
    assert again.is_made("a")
    again.close()


def test_an_empty_database_file_is_a_new_index(folder: Path) -> None:
    filled(folder)
    spoil(folder, "empty")
    index = Index(folder)
    assert index.add_folder("a")
    index.close()


def test_damage_that_comes_while_it_is_open_stops_nobody(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(folder)
    index = Index(folder)
    spoil(folder, "pages")
    seen = []
    with caplog.at_level(logging.ERROR):
        thread = threading.Thread(target=lambda: seen.append(index.add_folder("new")))  # a connection of its own
        thread.start()
        thread.join()
        assert seen == [True]
        assert index.is_made("new")
    assert caplog.text.count("damaged (") == 1
    index.close()


def test_two_users_of_a_damaged_index_end_with_one_new_one(folder: Path) -> None:
    filled(folder)
    first, second = Index(folder), Index(folder)
    spoil(folder, "no database")
    third = Index(folder)
    third.add_folder("third")
    assert first.is_made("third")
    second.add_folder("second")
    assert first.made_folders("") == third.made_folders("") == {"third", "second"}
    assert len(list(folder.glob("damaged-*"))) == 1
    for index in (first, second, third):
        index.close()


def test_a_cache_folder_that_was_emptied_meanwhile_is_made_again(folder: Path, index: Index) -> None:
    index.add_folder("before")
    shutil.rmtree(folder.parent)
    assert index.made_folders("") == set()
    index.add_folder("after")
    other = reopened(folder)
    assert other.is_made("after")
    other.close()


# --- the folder


def test_nobody_else_may_look_into_the_folder(folder: Path, index: Index) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o770])
def test_an_empty_folder_that_is_open_to_others_is_closed_to_them(folder: Path, mode: int) -> None:
    folder.mkdir(parents=True)
    folder.chmod(mode)
    Index(folder).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_others_may_read_is_closed_to_them(folder: Path) -> None:
    filled(folder)
    folder.chmod(0o755)
    Index(folder).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_into_which_others_may_have_put_something_is_refused(folder: Path, mode: int) -> None:
    filled(folder)
    folder.chmod(mode)
    with pytest.raises(PermissionError, match="others may have put there"):
        Index(folder)


def test_a_folder_that_everybody_may_exchange_for_another_is_refused(folder: Path) -> None:
    filled(folder)
    folder.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="another in its place"):
        Index(folder)
    folder.parent.chmod(0o1777)
    Index(folder).close()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_used_is_one_error_that_names_it(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cache folder cannot be used") as caught:
        Index(tmp_path / place)
    assert caught.value.filename == str(tmp_path / place)
    assert caught.value.errno


def test_somebody_elses_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="another user"):
        Index(folder)


# --- several at once


WORK = """
import pathlib, sys
from ftpvfs.cache.index import Index
folder, name, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
index = Index(folder)
for number in range(count):
    index.add_folder(f"shared/{name}-{number}")
    index.add_set_times("shared", {f"{name}-{number}": ("v", float(number))})
index.drop_folder(f"shared/{name}-0")
index.close()
"""


def test_two_processes_lose_nothing_of_each_other(folder: Path) -> None:
    count = 60
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(folder), name, str(count)], env=program_environment()
        )
        for name in ("a", "b")
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    index = Index(folder)
    assert index.made_folders("shared") == {f"{name}-{number}" for name in "ab" for number in range(1, count)}
    assert len(index.set_times("shared")) == 2 * count
    index.close()


def test_threads_lose_nothing_of_each_other(folder: Path, index: Index) -> None:
    threads = [
        threading.Thread(target=lambda n=n: [index.add_folder(f"d/{n}-{i}") for i in range(30)]) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(index.made_folders("d")) == 240


def test_a_database_that_is_locked_is_ebusy_and_no_wait_for_ever(
    folder: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftpvfs.cache.database.LOCK_TIMEOUT", 0.05)
    impatient = Index(folder)
    with sqlite3.connect(folder / "cache.db") as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match="locked") as caught:
            impatient.add_folder("a")
        assert caught.value.errno == 16
        assert not impatient.is_made("a"), "reading waits for nobody"
        other.rollback()
    other.close()
    assert impatient.add_folder("a")
    impatient.close()


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        (["s3", "bucket"], "s3-bucket"),
        (["s3", "bucket/a/b"], "s3-bucket_a_b"),
        (["file", "/"], "file-"),
        (["sftp", "../x"], "sftp-.._x"),
        (["s3", "a b:c_d"], "s3-a%20b%3ac%5fd"),
    ],
)
def test_the_folder_is_named_by_protocol_and_path(identity: list[str], name: str) -> None:
    assert cache_name(identity) == name


def test_two_stores_never_share_a_folder() -> None:
    stores = ["a/b", "a_b", "a%2fb", "A/b", "ä" * 1000, "ä" * 1001, "x" * 500 + "/1", "y" * 500 + "/1"]
    names = {cache_name(["s3", store]) for store in stores}
    assert len(names) == len(stores)
    assert all(len(os.fsencode(name)) <= 200 for name in names)
