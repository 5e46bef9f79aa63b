"""Two who write to one file at once: what is appended stays, and a file that is to be new is new."""

from __future__ import annotations

import ftplib
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Store
from tests.downloads import Client

WAITS = 30.0
CHOICES = {
    "minimal": {"cache_mode": "minimal"},
    "writes": {"cache_mode": "writes"},
    "full": {"cache_mode": "full"},
    "ack-store": {"cache_mode": "full", "ack": "store"},
}
MODES = pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
CACHED = pytest.mark.parametrize("options", list(CHOICES.values())[1:], ids=list(CHOICES)[1:])
ONE_S3 = pytest.mark.parametrize("store", ["s3"], indirect=True)
TWO_STORES = pytest.mark.parametrize("store", ["local", "s3"], indirect=True)


@pytest.fixture
def make(make_vfs: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def made(store: Store, **options: Any) -> Any:
        return make_vfs(store, cache_dir=str(tmp_path / "cache"), **{"write_back": "1h", **options})

    return made


@pytest.fixture
def log_in(ftp_server: Callable[..., tuple[str, int]]) -> Callable[[Any], ftplib.FTP]:
    """log_in(vfs) -> a new session of a server of its own."""

    def connect(vfs: Any) -> ftplib.FTP:
        client = Client(timeout=WAITS)
        client.connect(*ftp_server(vfs, perm="elradfmwMT"))
        client.login()
        return client

    return connect


def begin(vfs: Any, path: str, mode: str, data: bytes) -> Any:
    handle = vfs.open(path, mode, autocommit=False)
    handle.write(data)
    return handle


def get(vfs: Any, path: str) -> bytes:
    with vfs.open(path) as file:
        return bytes(file.read())


@TWO_STORES
@MODES
def test_two_sessions_that_append_at_once_both_find_their_lines(
    store: Store, make: Callable[..., Any], log_in: Callable[[Any], ftplib.FTP], options: dict[str, str]
) -> None:
    store.write("log", b"0\n")
    vfs = make(store, **options)
    first, second = log_in(vfs), log_in(vfs)
    one, two = first.transfercmd("APPE log"), second.transfercmd("APPE log")
    one.sendall(b"first\n")
    two.sendall(b"second\n")
    for connection, client in ((one, first), (two, second)):
        connection.close()
        assert client.voidresp().startswith("226")
    assert get(vfs, "log") == b"0\nfirst\nsecond\n"
    vfs.sync(WAITS)
    assert store.read("log") == b"0\nfirst\nsecond\n"
    for client in (first, second):
        client.close()


@TWO_STORES
@pytest.mark.parametrize("mode", ["off", "minimal"])
def test_an_append_to_nothing_that_cannot_follow_what_came_meanwhile_fails_and_replaces_nothing(
    store: Store, make: Callable[..., Any], mode: str
) -> None:
    vfs = make(store, cache_mode=mode)
    first, second = begin(vfs, "log", "ab", b"first\n"), begin(vfs, "log", "ab", b"second\n")
    first.commit()
    with pytest.raises(OSError, match="Others have made the file meanwhile"):
        second.commit()
    second.abandon()
    assert store.read("log") == b"first\n"


@TWO_STORES
@CACHED
@pytest.mark.parametrize("between", ["nothing", "sync"])
def test_appends_to_a_file_that_was_not_there_are_all_in_it(
    store: Store, make: Callable[..., Any], options: dict[str, str], between: str
) -> None:
    vfs = make(store, **options)
    handles = [begin(vfs, "log", "ab", b"%d\n" % number) for number in range(3)]
    for handle in handles:
        handle.commit()
        if between == "sync":
            vfs.sync(WAITS)
    assert get(vfs, "log") == b"0\n1\n2\n"
    vfs.sync(WAITS)
    assert store.read("log") == b"0\n1\n2\n"


@TWO_STORES
def test_an_append_follows_a_file_that_was_stored_anew_meanwhile(store: Store, make: Callable[..., Any]) -> None:
    store.write("log", b"old\n")
    vfs = make(store, cache_mode="writes", conflict="fail")
    for name in ("waits", "stored"):
        handle = begin(vfs, "log", "ab", name.encode() + b"\n")
        with vfs.open("log", "wb") as file:
            file.write(b"new\n")
        if name == "stored":
            vfs.sync(WAITS)
        handle.commit()
        assert get(vfs, "log") == b"new\n" + name.encode() + b"\n"
    vfs.sync(WAITS)
    assert store.read("log") == b"new\nstored\n"


@ONE_S3
def test_a_file_that_is_shortened_and_written_is_no_append(store: Store, make: Callable[..., Any]) -> None:
    store.write("log", b"0123456789")
    vfs = make(store, cache_mode="writes")
    handle = begin(vfs, "log", "ab", b"end")
    handle.truncate(5)
    begin(vfs, "log", "ab", b"other").commit()
    handle.commit()
    assert get(vfs, "log") == b"01234"


@ONE_S3
def test_a_file_that_was_deleted_meanwhile_is_there_as_it_was_appended_to(
    store: Store, make: Callable[..., Any]
) -> None:
    store.write("log", b"old\n")
    vfs = make(store, cache_mode="writes")
    handle = begin(vfs, "log", "ab", b"line\n")
    vfs.remove("log")
    handle.commit()
    assert get(vfs, "log") == b"old\nline\n"


@TWO_STORES
@pytest.mark.parametrize("mode", ["off", "minimal", "writes", "full"])
def test_of_two_who_make_a_new_file_one_makes_it(store: Store, make: Callable[..., Any], mode: str) -> None:
    vfs = make(store, cache_mode=mode)
    first, second = begin(vfs, "new", "xb", b"first"), begin(vfs, "new", "xb", b"second")
    first.commit()
    with pytest.raises(FileExistsError) as caught:
        second.commit()
    assert caught.value.filename == "new"
    second.abandon()
    assert get(vfs, "new") == b"first"
    vfs.sync(WAITS)
    assert store.read("new") == b"first"
    late = begin(vfs, "late", "xb", b"late")
    with vfs.open("late", "wb") as file:
        file.write(b"stored")
    vfs.sync(WAITS)
    with pytest.raises(FileExistsError):
        late.commit()
    late.abandon()
    assert store.read("late") == b"stored"


@ONE_S3
def test_an_append_of_another_process_is_seen(
    store: Store, make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Two VFS of one process stand for two: they share nothing but the cache folder."""
    store.write("log", b"0\n")
    here, there = make(store, cache_mode="writes"), make(store, cache_mode="writes")
    with caplog.at_level(logging.INFO):
        one, two = begin(here, "log", "ab", b"here\n"), begin(there, "log", "ab", b"there\n")
        one.commit()
        two.commit()
    assert get(here, "log") == get(there, "log") == b"0\nhere\nthere\n"
    assert io.BytesIO(get(here, "log")).readlines() == [b"0\n", b"here\n", b"there\n"]
