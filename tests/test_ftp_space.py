"""Room for uploads: a cache over its size slows them down, and what is known to fail is said before the first byte."""

from __future__ import annotations

import errno
import ftplib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyftpdlib.handlers import FTPHandler

from ftpvfs import VFSDTPHandler
from ftpvfs.backend import s3
from tests.conftest import Store, connect, last_reply, names, open_transfer, reply, upload
from tests.servers import FaultProxy, wait_until

MIB, TIB = 2**20, 2**40
Serve = Callable[..., tuple[str, int]]
DATA = os.urandom(3 * MIB)

any_mode = pytest.mark.parametrize("mode", ["off", "writes"])


@pytest.fixture
def cached(tmp_path: Path) -> dict[str, Any]:
    """The options of a cache whose size is 1 MiB and which would store nothing for an hour."""
    return {"cache_mode": "writes", "cache_dir": str(tmp_path / "cache"), "cache_max_size": "1M", "write_back": "1h"}


# --- a cache over its size


@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_uploads_beyond_the_size_of_the_cache_are_taken_and_stored_without_delay(
    store: Store, ftp_server: Serve, cached: dict[str, Any]
) -> None:
    with connect(ftp_server(store, **cached)) as ftp:
        for number in range(4):
            assert upload(ftp, f"{number}", DATA).startswith("226 ")
    wait_until(lambda: len(store.list()) >= 3, timeout=60)
    assert all(store.read(key) == DATA for key in store.list())


def test_one_upload_that_is_larger_than_the_size_of_the_cache_is_taken(
    local_store: Store, ftp_server: Serve, cached: dict[str, Any]
) -> None:
    large = DATA * 10
    with connect(ftp_server(local_store, **cached)) as ftp:
        for _ in range(2):
            ftp.voidcmd(f"ALLO {len(large)}")
            assert upload(ftp, "a", large).startswith("226 ")
    wait_until(lambda: local_store.list() == {"a"}, timeout=60)
    assert local_store.read("a") == large


def test_uploads_at_once_that_are_larger_than_the_cache_together_do_not_wait_for_each_other(
    local_store: Store, ftp_server: Serve, cached: dict[str, Any]
) -> None:
    address = ftp_server(local_store, **cached)
    replies: list[str] = []

    def send(name: str) -> None:
        with connect(address) as ftp:
            replies.append(upload(ftp, name, DATA * 3))

    senders = [threading.Thread(target=send, args=(f"{number}",)) for number in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert [each[:4] for each in replies] == ["226 "] * 4
    wait_until(lambda: len(local_store.list()) == 4, timeout=60)


class Impatient(VFSDTPHandler):
    """A data channel that ends what does not move for a second."""

    timeout = 1


def test_while_the_store_is_away_uploads_are_slow_and_neither_end_nor_keep_others_waiting(
    s3_store: Store,
    make_proxy: Callable[[Any], FaultProxy],
    ftp_server: Serve,
    make_vfs: Callable[..., Any],
    cached: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ftpvfs.cache.space.PAUSE", 3.0)
    proxy = make_proxy(s3_store)
    vfs = make_vfs(s3_store.proxied(proxy), low_level_retries=1, **cached)
    address = ftp_server(vfs, attributes={"dtp_handler": Impatient})
    with connect(address) as ftp, connect(address) as other:
        assert names(ftp) == set()
        proxy.refuse = True
        assert upload(ftp, "a", DATA).startswith("226 ")
        with open_transfer(ftp, "STOR b") as connection:
            sending = threading.Thread(target=connection.sendall, args=(DATA * 3,))
            sending.start()
            wait_until(lambda: vfs.core.parts.cache.space.pressure() is not None, timeout=30)
            assert reply(other, "NOOP").startswith("200 "), "nobody else waits"
            sending.join()
        assert last_reply(ftp).startswith("226 ")
        assert s3_store.list() == set()
        proxy.heal()
    vfs.sync(60)
    assert s3_store.read("b") == DATA * 3


def test_an_upload_kept_to_a_rate_is_not_taken_for_one_that_stands_still(
    local_store: Store, ftp_server: Serve
) -> None:
    from ftpvfs.server.throttle import Throttle

    class Once(Throttle):
        """Lets nothing through for longer than the data channel is patient."""

        def __init__(self) -> None:
            self.is_held = True

        def allowed(self) -> int:
            return 0 if self.is_held else MIB

        def delay(self) -> float:
            self.is_held = False
            return 2.5

        def moved(self, count: int) -> None:
            pass

    class Held(Impatient):
        def _begin_throttled(self) -> None:
            self._throttle = Once()

    with connect(ftp_server(local_store, attributes={"dtp_handler": Held})) as ftp:
        assert upload(ftp, "a", DATA).startswith("226 ")
    assert local_store.read("a") == DATA


# --- before the first byte


def refused(ftp: ftplib.FTP, command: str) -> str:
    """The reply to a transfer that is refused: no 1xx comes, and the data connection is not used."""
    host, port = ftp.makepasv()
    with socket.create_connection((host, port), timeout=30):
        return reply(ftp, command)


def announced(ftp: ftplib.FTP, size: int) -> None:
    assert reply(ftp, f"ALLO {size}").startswith("2")


@any_mode
@pytest.mark.parametrize(
    ("store", "size"), [("local", 2**60), ("s3", 49 * TIB), ("gs", 5 * TIB + 1)], indirect=["store"]
)
def test_a_file_that_is_announced_as_larger_than_there_is_room_for_is_refused(
    store: Store, size: int, mode: str, ftp_server: Serve, tmp_path: Path
) -> None:
    with connect(ftp_server(store, cache_mode=mode, cache_dir=str(tmp_path / "cache"))) as ftp:
        announced(ftp, size)
        assert refused(ftp, "STOR a").startswith("552 ")
        announced(ftp, len(DATA))
        assert upload(ftp, "a", DATA).startswith("226 ")
        assert upload(ftp, "b", DATA).startswith("226 ")


def test_a_file_of_unknown_size_that_fills_all_parts_of_s3_is_refused_there_and_then(
    s3_store: Store, ftp_server: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MAX_PARTS", 2)
    whole = b"x" * (2 * s3.LEAST_PART)
    with connect(ftp_server(s3_store)) as ftp:
        assert upload(ftp, "fits", whole).startswith("226 ")
        with open_transfer(ftp, "STOR a") as connection:
            connection.sendall(whole + b"x")
            assert last_reply(ftp).startswith("552 "), "though the client has not said that this is the end"
    assert s3_store.list() == {"fits"}
    wait_until(lambda: s3_store.uploads() == set(), timeout=30)


@pytest.mark.parametrize(("share", "code"), [(2**60, "452"), (None, None)])
def test_a_disk_that_is_short_is_told_before_the_first_byte(
    local_store: Store, ftp_server: Serve, cached: dict[str, Any], share: int | None, code: str | None
) -> None:
    options = {**cached, "cache_max_size": None, "cache_min_free_space": share}
    with connect(ftp_server(local_store, **options)) as ftp:
        for verb in ("STOR a", "APPE a", "STOU"):
            if code is None:
                assert upload(ftp, verb[5:] or "b", DATA, verb=verb[:4]).startswith("226 ")
            else:
                assert refused(ftp, verb).startswith(f"{code} ")
        assert reply(ftp, "NOOP").startswith("200 ")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """mounted(options) -> a disk in memory."""
    disks: list[Path] = []

    def mount(options: str) -> Path:
        disk = tmp_path / f"disk{len(disks)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        disks.append(disk)
        return disk

    yield mount
    for disk in disks:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take all space of a disk."""
    with pytest.raises(OSError) as caught, open(disk / "fill", "wb", buffering=0) as file:  # noqa: PT011, PT012
        while True:
            file.write(bytes(MIB))
    assert caught.value.errno == errno.ENOSPC
    return disk / "fill"


@pytest.mark.parametrize("handler", [None, FTPHandler], ids=["ours", "pyftpdlib's"])
def test_a_full_disk_of_the_store_is_told_before_the_first_byte(
    mounted: Callable[[str], Path], ftp_server: Serve, handler: type | None
) -> None:
    disk = mounted("size=8m,mode=700")
    store = Store("local", str(disk), {}, str(disk), None)
    with connect(ftp_server(store, handler=handler)) as ftp:
        filling = fill(disk)
        assert refused(ftp, "STOR a").startswith("550 " if handler else "552 ")
        filling.unlink()
        assert upload(ftp, "a", DATA).startswith("226 ")


def test_a_full_disk_of_the_cache_is_told_before_the_first_byte(
    mounted: Callable[[str], Path], local_store: Store, ftp_server: Serve
) -> None:
    disk = mounted("size=32m,mode=700")
    with connect(ftp_server(local_store, cache_mode="writes", cache_dir=str(disk / "cache"), write_back=0)) as ftp:
        assert upload(ftp, "a", b"x").startswith("226 ")
        wait_until(lambda: local_store.list() == {"a"}, timeout=60)
        filling = fill(disk)
        assert refused(ftp, "STOR a").startswith("552 ")
        filling.unlink()
        assert upload(ftp, "a", DATA).startswith("226 ")


def test_a_disk_that_is_mounted_read_only_is_told_before_the_first_byte(
    mounted: Callable[[str], Path], ftp_server: Serve
) -> None:
    disk = mounted("ro,size=8m,mode=700")
    store = Store("local", str(disk), {}, str(disk), None)
    with connect(ftp_server(store)) as ftp:
        assert refused(ftp, "STOR a").startswith("550 The disk of the folder is mounted read-only")
