"""The cache before a store that fails, on a disk that does: what is acknowledged arrives, what is served is whole."""

from __future__ import annotations

import contextlib
import errno
import ftplib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.backend import retry
from ftpvfs.cache import writeback
from tests.conftest import HOST, Store, connect, download, last_reply, names, open_transfer, upload, wait_until
from tests.crash.test_kill import Server
from tests.servers import FaultProxy
from tests.test_backend_faults import content

MIB = 2**20
Serve = Callable[..., tuple[str, int]]
MakeVFS = Callable[..., Any]


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.005)
    monkeypatch.setattr(writeback, "FIRST_RETRY", 0.2)
    monkeypatch.setattr(writeback, "LONGEST_RETRY", 1.0)


@pytest.fixture
def proxy(s3_store: Store, make_proxy: Any) -> FaultProxy:
    made: FaultProxy = make_proxy(s3_store)
    return made


@pytest.fixture
def make(s3_store: Store, proxy: FaultProxy, make_vfs: MakeVFS, tmp_path: Path) -> MakeVFS:
    """make(**options) -> VFS behind the proxy, always on the same cache folder."""
    folder = str(tmp_path / "cache")
    options = {"cache_dir": folder, "cache_mode": "full", "write_back": "100ms", "low_level_retries": 2}
    return lambda **more: make_vfs(s3_store.proxied(proxy), **{**options, **more})


FAULTS: dict[str, Callable[[FaultProxy], None]] = {
    "busy": lambda proxy: proxy.fail_next(15),
    "broken": lambda proxy: proxy.fail_next(15, status=500, code="InternalError"),
    "requests cut": lambda proxy: proxy.reset_after(to_server=40_000, times=8),
    "answers cut": lambda proxy: proxy.reset_after(to_client=20_000, times=8),
    "answers lost": lambda proxy: proxy.reset_after(to_client=1, times=8),
    "slow": lambda proxy: setattr(proxy, "delay", 0.05),
    "away": lambda proxy: setattr(proxy, "refuse", True),
    "silent": lambda proxy: setattr(proxy, "black_hole", True),
}


@pytest.mark.parametrize("mode", ["writes", "full"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_acknowledged_arrives_and_what_is_served_is_whole(
    make: MakeVFS, ftp_server: Serve, s3_store: Store, proxy: FaultProxy, fault: str, mode: str
) -> None:
    old = {f"old{number}": content(300_000 + number) for number in range(3)}
    for name, data in old.items():
        s3_store.write(name, data)
    vfs = make(cache_mode=mode, timeout="1s", contimeout="1s")
    model = dict(old)
    with connect(ftp_server(vfs)) as ftp:
        assert set(names(ftp)) == set(old)
        FAULTS[fault](proxy)
        for number in range(4):
            _acknowledged(ftp, model, f"new{number}", content(50_000 + number))
        _acknowledged(ftp, model, "new0", b"newer")
        _acknowledged(ftp, model, "new1", b"appended", verb="APPE")
        ftp.rename("new2", "new2-renamed")
        model["new2-renamed"] = model.pop("new2")
        ftp.delete("new3")
        del model["new3"]
        for name, data in old.items():
            with contextlib.suppress(ftplib.Error, OSError, EOFError):  # no 226
                assert download(ftp, name) == data
        assert names(ftp) == set(model)
        proxy.heal()
        for name, data in model.items():
            assert download(ftp, name) == data
    vfs.sync(60)

    assert {name: s3_store.read(name) for name in s3_store.list()} == model
    assert vfs.queue() == []
    assert vfs.core.parts.cache.check() == []


def _acknowledged(ftp: ftplib.FTP, model: dict[str, bytes], name: str, data: bytes, verb: str = "STOR") -> None:
    """Upload a file; the cache takes it whatever the store is like."""
    assert upload(ftp, name, data, verb=verb).startswith("226")
    model[name] = model.get(name, b"") + data if verb == "APPE" else data


def test_large_files_arrive_whole_over_a_line_that_is_cut_again_and_again(
    make: MakeVFS, ftp_server: Serve, s3_store: Store, proxy: FaultProxy
) -> None:
    vfs = make()
    data = content(40 * MIB + 7)
    with connect(ftp_server(vfs)) as ftp:
        proxy.reset_after(to_server=10 * MIB, times=6)
        upload(ftp, "large", data)
        vfs.sync(60)
        assert s3_store.read("large") == data

        vfs.core.parts.cache.forget_item("large")
        proxy.reset_after(to_client=3 * MIB, times=4)
        for _ in range(10):
            with contextlib.suppress(ftplib.Error, OSError, EOFError):
                assert download(ftp, "large") == data
                break
        else:
            raise AssertionError("never read")
    assert s3_store.uploads() == set()


def test_a_deleted_file_stays_deleted_though_its_upload_had_no_answer(
    make: MakeVFS, ftp_server: Serve, s3_store: Store, proxy: FaultProxy
) -> None:
    vfs = make(timeout="1s")
    with connect(ftp_server(vfs)) as ftp:
        proxy.reset_after(to_client=1, times=4)
        for number in range(4):
            upload(ftp, f"f{number}", content(30_000))
        wait_until(lambda: proxy.requests["PUT"] >= 4)
        for number in range(4):
            ftp.delete(f"f{number}")
        proxy.heal()
        vfs.sync(60)
    assert s3_store.list() == set()


def test_what_waits_for_a_name_does_not_replace_what_was_renamed_to_it_before_a_crash(
    make: MakeVFS, s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    vfs = make()
    with vfs.open("source", "wb") as handle:
        handle.write(b"renamed")
    vfs.sync(60)
    vfs.close()
    vfs = make(write_back="1h")
    with vfs.open("target", "wb") as handle:
        handle.write(b"waits")

    def dying(path: str, **keywords: Any) -> None:
        raise OSError(errno.EIO, "the test ends the process here", path)

    monkeypatch.setattr(vfs.core.backend, "remove", dying)
    with pytest.raises(OSError, match="could not be removed"):
        vfs.rename("source", "target")
    vfs.close()

    again = make()
    again.sync(60)
    assert s3_store.read("target") == b"renamed"


# -- the store is away at the start


def test_a_store_that_is_away_at_the_start_delays_nobody(
    make: MakeVFS, ftp_server: Serve, s3_store: Store, proxy: FaultProxy
) -> None:
    first = make(write_back="1h")
    with connect(ftp_server(first)) as ftp:
        upload(ftp, "waits", b"from before")
    first.close()
    proxy.refuse = True

    vfs = make()
    with connect(ftp_server(vfs)) as ftp:
        assert download(ftp, "waits") == b"from before"
        assert upload(ftp, "new", b"new").startswith("226")
        assert ftp.size("new") == 3
    proxy.refuse = False
    vfs.sync(60)
    assert {name: s3_store.read(name) for name in s3_store.list()} == {"waits": b"from before", "new": b"new"}


# -- the disk is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 12 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_refuses_and_loses_nothing(
    small_disk: Path, make: MakeVFS, ftp_server: Serve, s3_store: Store, proxy: FaultProxy
) -> None:
    vfs = make(cache_dir=str(small_disk), contimeout="1s")
    model: dict[str, bytes] = {}
    with connect(ftp_server(vfs)) as ftp:
        upload(ftp, "old", b"old")
        vfs.sync(60)
        model["old"] = b"old"
        proxy.refuse = True
        refused = []
        for number in range(20):
            data = content(MIB)
            answer = _sent(ftp, f"f{number}", data)
            if answer.startswith("226"):
                model[f"f{number}"] = data
            else:
                refused.append(answer[:3])
        assert len(refused) >= 8
        assert set(refused) <= {"452", "552"}
        assert _sent(ftp, "old", content(11 * MIB))[:3] in {"452", "552"}
        for name in model:
            if name != "old":
                assert download(ftp, name) == model[name]
        proxy.refuse = False
        vfs.sync(60)
        _acknowledged(ftp, model, "again", content(5 * MIB))  # what is stored made room
        vfs.sync(60)
    assert {name: s3_store.read(name) for name in s3_store.list()} == model


def _sent(ftp: ftplib.FTP, name: str, data: bytes) -> str:
    """The reply to an upload which the server may end at any byte."""
    with open_transfer(ftp, f"STOR {name}") as connection, contextlib.suppress(OSError):
        connection.sendall(data)
    return last_reply(ftp)


# -- the index is damaged


def _flip(database: Path) -> None:
    data = bytearray(database.read_bytes())
    for place in range(0, len(data), 97):
        data[place] ^= 0xFF
    database.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": _flip,
    "cut": lambda database: os.truncate(database, 5000),
    "empty": lambda database: os.truncate(database, 0),
    "gone": lambda database: database.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_loses_no_file_that_waits(
    make: MakeVFS, ftp_server: Serve, s3_store: Store, damage: str, tmp_path: Path
) -> None:
    first = Server(s3_store, tmp_path, "full", write_back="1h")
    files = {f"f{number}": content(1000 + number) for number in range(5)}
    try:
        first.start()
        with connect((HOST, first.port)) as ftp:
            for name, data in files.items():
                upload(ftp, name, data)
    finally:
        first.kill()
    (folder,) = (tmp_path / "cache").glob("*/data")
    DAMAGES[damage](folder.parent / "cache.db")

    vfs = make()
    with connect(ftp_server(vfs)) as ftp:
        assert {name: download(ftp, name) for name in names(ftp)} == files
    vfs.sync(60)
    assert {name: s3_store.read(name) for name in s3_store.list()} == files
    assert vfs.core.parts.cache.check() == []
