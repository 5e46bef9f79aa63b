"""No turn of the event loop waits for anybody, or takes the longer the more is cached: under all that could make it.

That nobody waits is shown without a clock: another process has something locked, and a second session is answered while
it still has. That a turn does not grow is shown by the processor's time that the loop takes for the same work with
little and with much around it: a machine that is busy with something else makes that no longer.
"""

from __future__ import annotations

import contextlib
import fcntl
import ftplib
import gc
import os
import signal
import socket
import sqlite3
import time
import unicodedata
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftpvfs import VFS, VFSServer
from ftpvfs.cache.cache import Cache
from ftpvfs.cache.files import BESIDE, Place
from ftpvfs.cache.index import Index
from ftpvfs.cache.item import new_suffix
from ftpvfs.cache.records import DirtyRecord, id_prefix
from ftpvfs.config import VFSOptions
from tests.conftest import (
    Launched,
    Store,
    StoreFactory,
    connect,
    download,
    last_reply,
    names,
    open_transfer,
    reply,
    serving,
    upload,
    wait_until,
)
from tests.processes import Child
from tests.servers import HOST, FaultProxy
from tests.test_ftp_loop import handler_class, passive, say

DATA = os.urandom(100_000)
FEW, MANY = 200, 20_000

Address = tuple[str, int]
Serve = Callable[[VFS], VFSServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with contextlib.ExitStack() as cleanup:
        yield lambda vfs: cleanup.enter_context(serving(None, handler_class(vfs)))


def address_of(server: VFSServer) -> Address:
    return (HOST, server.address[1])


# --- what another process has locked


def hold_files(pipe: Connection, files: list[Path]) -> None:
    """Have files locked until told otherwise."""
    opened = [os.open(file, os.O_RDWR | os.O_CREAT, 0o600) for file in files]
    for descriptor in opened:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    pipe.send("held")
    pipe.recv()


def hold_databases(pipe: Connection, files: list[Path]) -> None:
    """Be in the middle of a transaction of each database until told otherwise."""
    opened = [sqlite3.connect(file, timeout=60, isolation_level=None) for file in files]
    for connection in opened:
        connection.execute("BEGIN EXCLUSIVE")
    pipe.send("held")
    pipe.recv()
    for connection in opened:
        connection.execute("ROLLBACK")


HELD: dict[str, tuple[Callable[..., None], Callable[[Path], list[Path]]]] = {
    "index": (hold_databases, lambda folder: [folder / "cache.db"]),
    "index of clean files": (hold_databases, lambda folder: [folder / "items" / "cache.db"]),
    "leases": (hold_files, lambda folder: list((folder / "clean").iterdir())),
    "numbers": (hold_files, lambda folder: [folder / "taken", folder / "generation"]),
    "feed of changes": (hold_files, lambda folder: [folder / "changes"]),
    "opening of databases": (hold_files, lambda folder: [folder / "lock", folder / "items" / "lock"]),
}


@pytest.fixture
def held(child: Callable[..., Child]) -> Callable[[str, Path], contextlib.AbstractContextManager[None]]:
    """held(what, cache folder): have it locked by a process that was stopped in the middle of what it does."""

    @contextlib.contextmanager
    def hold(what: str, folder: Path) -> Iterator[None]:
        work, files = HELD[what]
        holder = child(work, files(folder))
        assert holder.hear() == "held"
        assert holder.process.pid is not None
        os.kill(holder.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(holder.process.pid, signal.SIGCONT)
            holder.say()

    return hold


class Asked:
    """A session that has asked for something and may have to wait for it."""

    def __init__(self, ftp: ftplib.FTP, command: str, data: bytes = b"") -> None:
        self.ftp = ftp
        self._is_upload = bool(data)
        self._data = socket.create_connection(passive(ftp), timeout=60)
        say(ftp, command)
        if data:
            self._data.sendall(data)
            self._data.shutdown(socket.SHUT_WR)

    def outcome(self) -> bytes:
        """What was downloaded, once the server has said that all is well."""
        with self._data, self._data.makefile("rb") as down:
            assert last_reply(self.ftp)[:3] in {"125", "150"}
            got = b"" if self._is_upload else down.read()
        assert last_reply(self.ftp).startswith("226 ")
        return got


@pytest.mark.parametrize("what", HELD)
def test_who_waits_for_another_process_waits_alone(
    local_store: Store, make_vfs: Any, serve: Serve, held: Any, what: str
) -> None:
    for name in ("kept", "half", "fresh"):
        local_store.write(name, DATA)
    vfs = make_vfs(local_store, cache_mode="full", cache_max_size="1G", write_back="1h")
    with contextlib.ExitStack() as cleanup:
        server = serve(vfs)
        first, *sessions, other = (cleanup.enter_context(connect(address_of(server))) for _ in range(8))
        assert names(first) == {"kept", "half", "fresh"}
        assert download(first, "kept") == DATA
        upload(first, "waits", DATA)
        with held(what, vfs.core.folder):
            asked = [
                Asked(ftp, *command)
                for ftp, command in zip(
                    sessions,
                    [("RETR fresh",), ("RETR kept",), ("RETR waits",), ("STOR new", DATA), ("STOR large", DATA * 60),
                     ("APPE half", DATA)],
                    strict=True,
                )
            ]  # fmt: skip
            for command, answer in [("NOOP", "200 "), ("SIZE kept", "213 "), ("MLST waits", "250"), ("NOOP", "200 ")]:
                assert reply(other, command).startswith(answer)
        assert [each.outcome() for each in asked] == [DATA, DATA, DATA, b"", b"", b""]
        assert download(other, "half") == DATA + DATA
        assert download(other, "large") == DATA * 60


# --- a store that says nothing, and a worker that does nothing


def test_forty_calls_that_hang_keep_nobody_waiting(
    make_store: StoreFactory, make_proxy: Any, make_vfs: Any, serve: Serve
) -> None:
    store = make_store("s3")
    store.write("warm/a", DATA)
    proxy: FaultProxy = make_proxy(store)
    vfs = make_vfs(store.proxied(proxy), cache_mode="full", low_level_retries=2)
    with contextlib.ExitStack() as cleanup:
        server = serve(vfs)
        *waiters, other = (cleanup.enter_context(connect(address_of(server))) for _ in range(41))
        assert names(other, "warm") == {"a"}
        assert download(other, "warm/a") == DATA
        proxy.black_hole = True
        cleanup.callback(proxy.heal)
        for number, ftp in enumerate(waiters):
            say(ftp, f"SIZE cold/{number}")
        wait_until(lambda: server.ioloop.offload.parked == len(waiters))
        assert reply(other, "NOOP").startswith("200 ")
        assert download(other, "warm/a") == DATA
        assert reply(other, "SIZE warm/a") == f"213 {len(DATA)}"
        proxy.heal()
        for ftp in waiters:
            assert last_reply(ftp).startswith("550 ")


def test_a_worker_that_is_stopped_keeps_the_others_clients_waiting_for_nothing(
    local_store: Store, launched: Callable[..., Launched], tmp_path: Path
) -> None:
    local_store.write("a", DATA)
    server = launched(
        local_store.url, "--vfs-cache-mode", "full", "--cache-dir", str(tmp_path / "cache"), "--workers", "2"
    )
    with contextlib.ExitStack() as cleanup:
        sessions: dict[int, list[ftplib.FTP]] = {}
        while len(sessions) < 2 or min(map(len, sessions.values())) < 2:
            ftp = cleanup.enter_context(connect(server.address))
            sessions.setdefault(_worker_of(ftp, server), []).append(ftp)
        stopped, alive = sessions
        upload(sessions[stopped][0], "b", DATA)  # what it leads it may lead for ever
        os.kill(stopped, signal.SIGSTOP)
        cleanup.callback(os.kill, stopped, signal.SIGCONT)
        ftp, other = sessions[alive][:2]
        for name in ("a", "b"):
            assert download(ftp, name) == DATA
        with open_transfer(ftp, "STOR c") as data:
            data.sendall(DATA)
            assert reply(other, "NOOP").startswith("200 ")
        assert last_reply(ftp).startswith("226 ")
        assert names(other) == {"a", "b", "c"}
        with connect(server.address) as late:
            assert download(late, "c") == DATA


def _worker_of(ftp: ftplib.FTP, server: Launched) -> int:
    """The process that serves a session."""
    assert ftp.sock is not None
    here = ftp.sock.getsockname()[1]
    for process in psutil.Process(server.process.pid).children(recursive=True):
        for each in process.net_connections("tcp"):
            if each.raddr and each.raddr[1] == here:
                return process.pid
    raise AssertionError("no worker has the connection")


# --- how much is cached


def taken(server: VFSServer, work: Callable[[], object]) -> float:
    """Seconds of a processor that the server's loop takes for a work, without those of Python's collector."""
    gc.collect()
    gc.disable()
    try:
        before = server.ioloop.debug_cpu_time
        work()
        return server.ioloop.debug_cpu_time - before
    finally:
        gc.enable()


def busy_work(ftp: ftplib.FTP, folder: str, stem: str) -> None:
    """Upload, look at, rename and delete some files."""
    for number in range(25):
        name = f"{folder}/{stem}{number}"
        upload(ftp, name, b"bytes")
        assert reply(ftp, f"SIZE {name}") == "213 5"
        ftp.rename(name, f"{name}-renamed")
        ftp.delete(f"{name}-renamed")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_folder_of_many_names_beyond_ascii_costs_a_turn_no_more(
    local_store: Store, make_vfs: Any, serve: Serve, form: Any
) -> None:
    for count in (FEW, MANY):
        for number in range(count):
            local_store.write(f"{count}/{unicodedata.normalize(form, 'Grün')}-{number:05}")
    server = serve(make_vfs(local_store, cache_mode="writes", write_back="1h"))
    with connect(address_of(server)) as ftp:
        for folder in (FEW, MANY):
            assert len(names(ftp, str(folder))) == folder
        busy_work(ftp, str(FEW), "Übung")  # once for what is made when it is first needed
        few, many = (taken(server, lambda n=n: busy_work(ftp, str(n), "Öl")) for n in (FEW, MANY))
        assert reply(ftp, f"SIZE {MANY}/{unicodedata.normalize('NFC', 'Grün')}-00007") == "213 0"
    assert many < 2.5 * few


def waiting_files(folder: Path, count: int) -> None:
    """Let dirty files wait in a cache folder, as a process that was killed has left them."""
    options = VFSOptions(cache_mode="writes")
    with contextlib.closing(Index(folder)) as index, contextlib.closing(Cache(folder, index, options)) as cache:
        for number in range(count):
            path = f"waiting/{number % 100}/{number}"
            name = id_prefix(path) + new_suffix()
            record = DirtyRecord(path, name, 1, 1.5, number + 1, None, since=time.time(), beside=name)
            Path(cache.files.path(Place.DATA, name)).write_bytes(b"x")
            Path(cache.files.path(Place.DATA, name + BESIDE)).write_bytes(record.to_json())
    for file in folder.glob("cache.db*"):
        file.unlink()


def test_many_files_that_wait_cost_a_turn_no_more(
    make_store: StoreFactory, make_vfs: Any, serve: Serve, tmp_path: Path
) -> None:
    found = []
    for count in (FEW, MANY):
        store = make_store("local")
        store.write("folder/a", DATA)
        waiting_files(tmp_path / "caches" / f"{count}", count)
        server = serve(
            make_vfs(store, cache_mode="writes", write_back="1h", cache_dir=str(tmp_path / "caches"), name=f"{count}")
        )
        vfs = server.handler.abstracted_fs.vfs
        with connect(address_of(server)) as ftp:
            assert names(ftp, "folder") == {"a"}
            assert len(vfs.queue()) == count
            busy_work(ftp, "folder", "first")
            found.append(taken(server, lambda ftp=ftp: busy_work(ftp, "folder", "then")))
    few, many = found
    assert many < 2.5 * few
