"""--bwlimit: rates of a connection and of a user, which cost nobody else anything."""

from __future__ import annotations

import ftplib
import io
import os
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.coordination.moments import Moments
from ftpvfs.server.source import first
from ftpvfs.server.throttle import CREDIT, LEAST, Rate, Rates, Throttle
from tests.certificates import write_certificate
from tests.conftest import connect, download, reply, upload
from tests.downloads import TLSClient

KIB = 1024


def test_what_was_moved_has_to_be_paid_for() -> None:
    rate = Rate(1000)
    assert rate.delay(100.0) == 0.0
    rate.moved(2000, 100.0)
    assert rate.delay(100.0) == pytest.approx(2.0 - CREDIT)
    assert rate.delay(101.0) == pytest.approx(1.0 - CREDIT)
    assert rate.delay(102.0) == 0.0
    rate.moved(2000, 1000.0)  # idleness is made up for no longer than a moment
    assert rate.delay(1000.0) == pytest.approx(2.0 - CREDIT)


def test_slices_are_parts_of_a_second_but_never_tiny() -> None:
    assert Rate(1_000_000).slice == 100_000
    assert Rate(1).slice == LEAST


def test_a_throttle_keeps_to_the_slowest_of_its_rates() -> None:
    slow, fast = Rate(20_000), Rate(1_000_000)
    throttle = Throttle([fast, slow])
    assert throttle.allowed() == slow.slice
    throttle.moved(100_000_000)
    assert throttle.allowed() == 0
    assert throttle.delay() > 1000


def test_users_share_what_is_theirs_and_connections_do_not() -> None:
    rates = Rates((1000, None), {"alice": (None, 2000), "bob": (None, None)})  # type: ignore[arg-type]
    assert rates.throttle("bob", up=False) is None
    one, other = rates.throttle("bob", up=True), rates.throttle("bob", up=True)
    assert one is not None
    assert other is not None
    one.moved(10**6)
    assert other.allowed()
    one, other = rates.throttle("alice", up=False), rates.throttle("alice", up=False)
    assert one is not None
    assert other is not None
    one.moved(10**6)
    assert not other.allowed()


def test_what_processes_add_to_a_moment_at_once_is_all_counted() -> None:
    moments, children = Moments(3), []
    for _ in range(3):
        child = os.fork()
        if not child:
            for _ in range(20_000):
                moments.change(1, lambda moment: moment + 1.0)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert (moments[0], moments[1], moments[2]) == (0.0, 60_000.0, 0.0)


def test_views_are_cut_where_they_have_to_be() -> None:
    views = [memoryview(b"abc"), memoryview(b"def")]
    assert [b"".join(first(views, most)) for most in (1, 3, 4, 6, 9)] == [b"a", b"abc", b"abcd", b"abcdef", b"abcdef"]


@pytest.fixture
def served(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


def least_time(size: int, rate: int) -> float:
    """Seconds that a transfer must take: what may be made up for, and what is moved before it is counted, aside."""
    return (size - rate * CREDIT - 64 * KIB) / rate


@pytest.mark.parametrize("tls", [False, True])
def test_transfers_take_as_long_as_their_rates_say(launched: Any, served: Path, tmp_path: Path, tls: bool) -> None:
    arguments = ["--bwlimit", "256k:512k"]
    if tls:
        cert = write_certificate(tmp_path / "cert.pem")
        arguments += ["--cert", str(cert), "--tls-mode", "required"]
    server = launched(str(served), *arguments)
    if tls:
        context = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        secure = TLSClient(timeout=30, context=context)
        secure.connect(*server.address)
        secure.login()
        secure.prot_p()
        ftp: ftplib.FTP = secure
    else:
        ftp = connect(server.address)
    data = os.urandom(512 * KIB)
    with ftp:
        began = time.monotonic()
        assert upload(ftp, "a", data).startswith("226 ")
        up = time.monotonic()
        assert download(ftp, "a") == data
        down = time.monotonic()
    assert up - began >= least_time(len(data), 256 * KIB)
    assert down - up >= least_time(len(data), 512 * KIB)


def test_all_connections_of_a_user_share_his_rate(launched: Any, served: Path, tmp_path: Path) -> None:
    ini = tmp_path / "a.ini"
    ini.write_text(
        f"[backend]\nurl = {served}\n[user:alice]\npassword = a\nbwlimit = 512k\n[user:bob]\npassword = b\n"
    )
    server = launched("--config", str(ini))
    data = os.urandom(512 * KIB)

    def put(name: str) -> None:
        with connect(server.address, "alice", "a") as ftp:
            ftp.storbinary(f"STOR {name}", io.BytesIO(data))

    threads = [threading.Thread(target=put, args=(name,)) for name in ("a", "b")]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    with connect(server.address, "bob", "b") as ftp:  # whom it does not concern
        upload(ftp, "c", data)
        assert reply(ftp, "NOOP").startswith("200 ")
    for thread in threads:
        thread.join()
    assert time.monotonic() - began >= least_time(2 * len(data), 512 * KIB)
    assert {(served / name).read_bytes() for name in "abc"} == {data}
