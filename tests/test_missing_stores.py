"""A store that is not there is no empty one: that is said, nothing is believed of it, and it may come back."""

from __future__ import annotations

import errno
import ftplib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Store, connect, download, free_ports, names, reply, run_program, upload
from tests.servers import FaultProxy, SFTPServer, wait_until
from tests.test_hidden import code_of

Serve = Callable[..., tuple[str, int]]
MakeVFS = Callable[..., Any]
MakeBackend = Callable[..., Any]
MakeProxy = Callable[[Any], FaultProxy]

CACHED = [{"cache_mode": mode} for mode in ("off", "writes", "full")]
buckets = pytest.mark.parametrize("kind", ["s3", "gs"])


class Missing:
    """A bucket that is not there, and may be made."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.server: Any = store.server
        self.kind = store.kind
        self.bucket = f"missing-{os.urandom(5).hex()}"
        self.url = f"{store.kind}://{self.bucket}{prefix}"
        self.storage_options = store.storage_options

    def make(self) -> None:
        self.server.create_bucket(self.bucket)

    def exists(self) -> bool:
        return bool(self.server.filesystem.exists(self.bucket))

    def remove(self) -> None:
        if self.exists():
            self.server.delete_bucket(self.bucket)


@pytest.fixture(params=[(kind, prefix) for kind in ("s3", "gs") for prefix in ("", "/in/it")], ids=str)
def missing(request: pytest.FixtureRequest, make_store: Callable[..., Store]) -> Iterator[Missing]:
    kind, prefix = request.param
    place = Missing(make_store(kind), prefix)
    yield place
    place.remove()


def listing(ftp: ftplib.FTP) -> str:
    """The last reply to LIST."""
    try:
        return str(ftp.retrlines("LIST", lambda _: None))
    except ftplib.all_errors as error:
        return str(error)


def stored(ftp: ftplib.FTP, name: str, data: bytes = b"1") -> str:
    """The last reply to STOR."""
    try:
        return upload(ftp, name, data)
    except ftplib.all_errors as error:
        return str(error)


@pytest.mark.parametrize("options", CACHED, ids=str)
def test_a_bucket_that_is_not_there_is_no_empty_one(
    missing: Missing, make_vfs: MakeVFS, ftp_server: Serve, options: dict[str, Any]
) -> None:
    vfs = make_vfs(missing, **options)
    with connect(ftp_server(vfs)) as ftp:
        for answer in (
            listing(ftp), stored(ftp, "a"), reply(ftp, "MKD d"), reply(ftp, "DELE a"), reply(ftp, "MLST a"),
            stored(ftp, "large", bytes(9 * 2**20)), listing(ftp),
        ):  # fmt: skip
            assert answer.startswith("550 No such bucket"), answer
        assert not missing.exists()
        assert not vfs.queue()

        missing.make()
        assert listing(ftp).startswith("226 ")
        assert stored(ftp, "a").startswith("226 ")
        assert download(ftp, "a") == b"1"
        assert reply(ftp, "MKD d").startswith("257 ")
        assert names(ftp) == {"a", "d"}
        vfs.sync(timeout=30)


@pytest.mark.parametrize("options", [{"cache_mode": "writes"}, {"cache_mode": "full"}], ids=str)
def test_what_waits_for_a_bucket_that_has_gone_is_kept_and_no_more_is_taken(
    missing: Missing, make_vfs: MakeVFS, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    missing.make()
    vfs = make_vfs(missing, **options, write_back=0)
    vfs.listdir()
    with vfs.open("before", "wb") as file:
        file.write(b"1")
    vfs.sync(timeout=30)
    vfs.remove("before")
    vfs.sync(timeout=30)
    missing.remove()

    with vfs.open("a", "wb") as file:  # nobody knows yet
        file.write(b"waits")
    with caplog.at_level(logging.WARNING, "ftpvfs.cache.writeback"):
        wait_until(lambda: "No such bucket" in caplog.text, timeout=30)
    wait_until(lambda: code_of_open(vfs) == errno.ENXIO, timeout=30)
    assert code_of(vfs.listdir) == errno.ENXIO

    missing.make()
    vfs.sync(timeout=30)
    assert vfs.listdir() == ["a"]
    assert missing.server.filesystem.cat_file(f"{missing.url.partition('://')[2]}/a") == b"waits"


def code_of_open(vfs: Any) -> int | None:
    try:
        with vfs.open("b", "wb"):
            raise RuntimeError  # nothing is published
    except RuntimeError:
        return None
    except OSError as error:
        return error.errno


@buckets
def test_deletions_wait_for_a_bucket_that_is_missing(
    kind: str, make_store: Callable[..., Store], make_backend: MakeBackend
) -> None:
    place = Missing(make_store(kind), "")
    backend = make_backend(place.url, place.storage_options)
    assert code_of(backend.remove, "a") == errno.ENXIO
    assert code_of(backend.rmdir, "a") == errno.ENXIO


def send(upload: Any, size: int) -> None:
    try:
        upload.write(bytes(size))
        upload.commit()
    finally:
        upload.abort()


@buckets
def test_a_store_that_makes_buckets_is_not_asked_to(
    kind: str, make_store: Callable[..., Store], make_backend: MakeBackend, make_proxy: MakeProxy
) -> None:
    place = Missing(make_store(kind), "")
    proxy = make_proxy(place)
    backend = make_backend(place.url, {**place.storage_options, "endpoint_url": proxy.url})
    for size in (1, 40 * 2**20):
        assert code_of(send, backend.upload("a"), size) == errno.ENXIO
    assert code_of(backend.mkdir, "d") == errno.ENXIO
    assert set(proxy.requests) == {"GET"}


@buckets
def test_a_bucket_is_not_asked_for_again(
    kind: str, make_store: Callable[..., Store], make_vfs: MakeVFS, make_proxy: MakeProxy
) -> None:
    store = make_store(kind)
    proxy = make_proxy(store)
    vfs = make_vfs(store.proxied(proxy), cache_mode="off")
    vfs.listdir()
    proxy.reset_counters()
    with vfs.open("a", "wb") as file:
        file.write(b"1")
    assert sum(proxy.requests.values()) == 1, proxy.seen  # the upload
    proxy.reset_counters()
    assert vfs.open("a").read() == b"1"
    vfs.remove("a")
    assert sum(proxy.requests.values()) == 2, proxy.seen


# -- folders of this machine


@pytest.fixture
def root(local_store: Store) -> Path:
    return Path(local_store.root)


def test_a_local_folder_that_never_was_is_missing(tmp_path: Path, ftp_server: Serve, make_vfs: MakeVFS) -> None:
    folder = tmp_path / "later"
    store = Store("local", str(folder), {}, str(folder), None)
    with connect(ftp_server(make_vfs(store))) as ftp:
        for answer in (listing(ftp), stored(ftp, "a"), reply(ftp, "MKD d")):
            assert answer.startswith("550 The store's folder does not exist"), answer
        folder.mkdir()
        assert stored(ftp, "a").startswith("226 ")
        assert names(ftp) == {"a"}


@pytest.fixture(params=["gone", "empty mount point"])
def unmount(request: pytest.FixtureRequest, root: Path) -> Callable[[], Callable[[], None]]:
    """What an unmounted disk leaves of a root: nothing, or another folder that is empty. Returns how it comes back."""

    def take_away() -> Callable[[], None]:
        aside = root.with_name("unmounted")
        root.rename(aside)
        if request.param != "gone":
            root.mkdir()

        def bring_back() -> None:
            if root.exists():
                root.rmdir()
            aside.rename(root)

        return bring_back

    return take_away


Unmount = Callable[[], Callable[[], None]]


def test_a_local_folder_that_disappears_is_away(
    local_store: Store, root: Path, unmount: Unmount, ftp_server: Serve
) -> None:
    local_store.write("d/a", b"1")
    with connect(ftp_server(local_store, cache_mode="off", dir_cache_time=0)) as ftp:
        assert names(ftp) == {"d"}
        bring_back = unmount()
        for answer in (
            reply(ftp, "MKD e"), reply(ftp, "DELE d/a"), reply(ftp, "RMD d"), reply(ftp, "SIZE d/a"), stored(ftp, "b"),
            listing(ftp),
        ):  # fmt: skip
            assert re.match("45[01] The store's folder is not there: its disk may not be mounted", answer), answer
        assert not root.exists() or not list(root.iterdir())  # nothing hides below the disk
        bring_back()
        assert names(ftp) == {"d"}
        assert download(ftp, "d/a") == b"1"
        assert stored(ftp, "b").startswith("226 ")


@pytest.mark.parametrize("mode", ["writes", "full"])
def test_uploads_are_taken_while_a_local_folder_is_away_and_no_deletion_is_believed(
    local_store: Store, unmount: Unmount, make_vfs: MakeVFS, mode: str
) -> None:
    local_store.write("a", b"old")
    local_store.write("d/b", b"kept")
    vfs = make_vfs(local_store, cache_mode=mode, write_back=0, dir_cache_time=0)
    assert vfs.listdir() == ["a", "d"]
    assert vfs.open("a").read() == b"old"
    assert vfs.open("d/b").read() == b"kept"
    bring_back = unmount()
    with vfs.open("a", "wb") as file:
        file.write(b"new")
    with vfs.open("n", "wb") as file:
        file.write(b"new too")
    assert set(vfs.listdir()) == {"a", "d", "n"}
    if mode == "full":
        assert vfs.open("d/b").read() == b"kept"
    assert len(vfs.queue()) == 2
    bring_back()
    vfs.sync(timeout=30)
    assert {key: local_store.read(key) for key in ("a", "n", "d/b")} == {"a": b"new", "n": b"new too", "d/b": b"kept"}


def test_another_folder_with_files_is_served(local_store: Store, root: Path, make_vfs: MakeVFS) -> None:
    local_store.write("a", b"1")
    vfs = make_vfs(local_store, dir_cache_time=0)
    assert vfs.listdir() == ["a"]
    copy = root.with_name("copy")
    shutil.copytree(root, copy)
    (copy / "b").write_bytes(b"2")
    shutil.rmtree(root)
    copy.rename(root)
    assert vfs.listdir() == ["a", "b"]
    with vfs.open("c", "wb") as file:
        file.write(b"3")
    assert (root / "c").read_bytes() == b"3"


def test_an_empty_folder_may_be_made_anew(local_store: Store, root: Path, make_vfs: MakeVFS) -> None:
    vfs = make_vfs(local_store, dir_cache_time=0)
    assert vfs.listdir() == []
    root.rename(root.with_name("old"))
    root.mkdir()
    assert vfs.listdir() == []
    with vfs.open("a", "wb") as file:
        file.write(b"1")
    assert (root / "a").exists()


def test_a_new_start_takes_the_folder_that_it_finds(local_store: Store, unmount: Unmount, make_vfs: MakeVFS) -> None:
    local_store.write("a", b"1")
    first = make_vfs(local_store)
    first.listdir()
    bring_back = unmount()
    first.close()
    second = make_vfs(local_store)
    assert code_of(second.listdir) == errno.ENXIO if not Path(local_store.root).exists() else second.listdir() == []
    bring_back()


def test_a_worker_that_is_started_anew_knows_what_the_first_one_saw(
    local_store: Store, root: Path, launched: Callable[..., Any]
) -> None:
    import psutil

    local_store.write("a", b"1")
    server = launched(local_store.url, "--workers", "2", "--dir-cache-time", "0")
    workers = psutil.Process(server.process.pid).children()
    root.rename(root.with_name("unmounted"))
    root.mkdir()
    for worker in workers:
        worker.kill()

    def answers() -> str:
        with connect(server.address) as ftp:
            return listing(ftp)

    def is_new() -> bool:
        now = psutil.Process(server.process.pid).children()
        return len(now) >= 2 and not {worker.pid for worker in now} & {worker.pid for worker in workers}

    wait_until(is_new, timeout=60)
    assert re.match("45[01] .* may not be mounted", answers())


def test_a_missing_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    done = run_program(str(tmp_path / "not there"), "--addr", f"127.0.0.1:{free_ports(1)[0]}")
    assert done.returncode == 1
    assert "not there" in done.stderr


# -- any other store


def test_an_sftp_folder_that_is_missing_and_one_that_disappears(
    sftp_server: SFTPServer, make_vfs: MakeVFS, ftp_server: Serve
) -> None:
    folder = sftp_server.root / f"later-{os.urandom(4).hex()}"
    store = Store("sftp", f"sftp://127.0.0.1{folder}", sftp_server.storage_options, str(folder), None)
    vfs = make_vfs(store, cache_mode="writes", dir_cache_time=0, write_back=0)
    with connect(ftp_server(vfs)) as ftp:
        for answer in (listing(ftp), stored(ftp, "a"), reply(ftp, "MKD d")):
            assert answer.startswith("550 The store's folder does not exist"), answer
        folder.mkdir()
        assert stored(ftp, "a").startswith("226 ")
        vfs.sync(timeout=30)
        assert (folder / "a").read_bytes() == b"1"

        shutil.rmtree(folder)
        assert reply(ftp, "MKD d").startswith("450 ")
        assert stored(ftp, "b", b"2").startswith("226 ")
        folder.mkdir()
        vfs.sync(timeout=30)
        assert (folder / "b").read_bytes() == b"2"
    shutil.rmtree(folder)


