"""A download is one version of a file under a 226, or it ends with an error reply; it never is a mix."""

from __future__ import annotations

import ftplib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftpvfs import VFSDTPHandler
from tests.conftest import Store, connect, download, last_reply, open_transfer, reply, reset
from tests.servers import HOST, FaultProxy, wait_until
from tests.test_ftp_uploads import Events

MIB = 2**20
Serve = Callable[..., tuple[str, int]]
MakeProxy = Callable[[Any], FaultProxy]

# More than the sockets and the read-ahead hold, so that the end is asked of the store while the client waits.
OLD = os.urandom(MIB) * 48
NEW = os.urandom(MIB) * 48

object_stores = pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def address(store: Store, ftp_server: Serve, events: Events) -> tuple[str, int]:
    store.write("a", OLD)
    # Little is read ahead, so that most of the file is still at the store when its beginning has arrived.
    return ftp_server(store, attributes=events.attributes(), buffer_size="1Mi")


@pytest.fixture
def ftp(address: tuple[str, int]) -> Iterator[ftplib.FTP]:
    with connect(address) as client:
        yield client


def rest_of(with_data: socket.socket) -> bytes:
    with with_data.makefile("rb") as data:
        return data.read()


def replace(store: Store, data: bytes) -> None:
    if store.kind == "local":  # as programs do that care about readers
        new = Path(store.path("new"))
        new.write_bytes(data)
        new.rename(store.path("a"))
    else:
        store.write("a", data)


def test_a_file_replaced_in_the_middle_is_never_a_mix(store: Store, ftp: ftplib.FTP, events: Events) -> None:
    with open_transfer(ftp, "RETR a") as with_data:
        got = with_data.recv(1000)
        replace(store, NEW)
        got += rest_of(with_data)
    answer = last_reply(ftp)
    if answer.startswith("226 "):  # the old file is still there for who opened it
        assert got == OLD
        events.wait_for("file_sent /a")
    else:
        assert answer[:3] in {"426", "451"}
        assert OLD.startswith(got)
        events.wait_for("incomplete_file_sent /a")
    assert reply(ftp, "NOOP").startswith("200 ")
    if store.kind in {"s3", "gs"}:
        assert not answer.startswith("226 ")


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_file_overwritten_in_place_is_told(store: Store, ftp: ftplib.FTP) -> None:
    with open_transfer(ftp, "RETR a") as with_data:
        with_data.recv(1000)
        Path(store.path("a")).write_bytes(NEW)
        rest_of(with_data)
    assert last_reply(ftp).startswith("451 ")
    assert download(ftp, "a") == NEW


def test_a_file_replaced_since_it_was_listed_is_sent_as_it_is_now(store: Store, ftp: ftplib.FTP) -> None:
    assert ftp.size("a") == len(OLD)
    replace(store, b"shorter")
    assert download(ftp, "a") == b"shorter"
    replace(store, b"")
    assert download(ftp, "a") == b""


@object_stores
@pytest.mark.parametrize("fault", ["refused", "silent", "503", "cut"])
def test_a_store_that_dies_in_the_middle_ends_with_an_error_reply(
    store: Store, make_proxy: MakeProxy, ftp_server: Serve, events: Events, fault: str
) -> None:
    store.write("a", OLD)
    proxy = make_proxy(store)
    options = {"low_level_retries": 2, "timeout": 1, "contimeout": 1}
    with connect(ftp_server(store.proxied(proxy), attributes=events.attributes(), **options)) as ftp:
        with open_transfer(ftp, "RETR a") as with_data:
            got = with_data.recv(1000)
            if fault == "refused":
                proxy.refuse = True
            elif fault == "silent":
                proxy.black_hole = True
            elif fault == "503":
                proxy.fail_next(10**6, method="GET")
            else:
                proxy.reset_after(to_client=100_000, times=10**6)
            got += rest_of(with_data)
        answer = last_reply(ftp)
        assert answer.startswith("451 ")
        assert "None" not in answer
        assert len(got) < len(OLD)
        assert OLD.startswith(got)
        events.wait_for("incomplete_file_sent /a")
        assert "file_sent /a" not in events.seen
        proxy.heal()
        assert reply(ftp, "NOOP").startswith("200 ")
        assert download(ftp, "a") == OLD


@object_stores
def test_connections_to_the_store_that_break_are_made_again(
    store: Store, make_proxy: MakeProxy, ftp_server: Serve
) -> None:
    store.write("a", OLD)
    proxy = make_proxy(store)
    with connect(ftp_server(store.proxied(proxy))) as ftp:
        proxy.reset_after(to_client=500_000, times=3)
        assert download(ftp, "a") == OLD


def test_a_client_that_resets_is_answered_once(store: Store, ftp: ftplib.FTP, events: Events) -> None:
    with_data = open_transfer(ftp, "RETR a")
    assert with_data.recv(1000)
    reset(with_data)
    assert last_reply(ftp).startswith("426 ")
    assert reply(ftp, "NOOP").startswith("200 ")  # and by then pyftpdlib's callbacks have been called
    assert events.seen == ["incomplete_file_sent /a"]
    assert download(ftp, "a", rest=len(OLD) - 1000) == OLD[-1000:]


def test_a_connection_reset_at_once_is_no_sent_file(store: Store, ftp: ftplib.FTP, events: Events) -> None:
    for command in ("RETR a", "LIST", "NLST", "MLSD"):
        for _ in range(5):
            address = ftplib.parse229(reply(ftp, "EPSV"), (HOST, 0))
            assert reply(ftp, command).startswith("150 ")
            reset(socket.create_connection(address))
            answer = last_reply(ftp)
            assert answer[:4] in {"425 ", "426 "} or command != "RETR a", answer
    assert "file_sent /a" not in events.seen
    assert reply(ftp, "NOOP").startswith("200 ")


def test_a_connection_reset_before_the_command_is_no_sent_file(ftp: ftplib.FTP, events: Events) -> None:
    for _ in range(5):
        with_data = socket.create_connection(ftplib.parse229(reply(ftp, "EPSV"), (HOST, 0)))
        assert reply(ftp, "NOOP").startswith("200 ")  # by then the server has accepted it
        reset(with_data)
        assert reply(ftp, "NOOP").startswith("200 ")
        if not reply(ftp, "RETR a").startswith("425 "):
            assert last_reply(ftp).startswith("426 ")
    assert "file_sent /a" not in events.seen
    assert reply(ftp, "NOOP").startswith("200 ")


def test_a_client_that_stops_reading_is_told(store: Store, ftp_server: Serve) -> None:
    store.write("a", OLD)
    impatient = type("Impatient", (VFSDTPHandler,), {"timeout": 0.4})
    with connect(ftp_server(store, attributes={"dtp_handler": impatient})) as ftp:
        with open_transfer(ftp, "RETR a"):
            assert last_reply(ftp).startswith("426 ")
        assert reply(ftp, "NOOP").startswith("200 ")
        assert download(ftp, "a", rest=len(OLD) - 10) == OLD[-10:]


def test_bits_read_with_rest_and_abor_are_right(store: Store, ftp: ftplib.FTP) -> None:
    for offset in (0, 5 * MIB, 20 * MIB, 7, 10 * MIB + 1):
        with open_transfer(ftp, "RETR a", rest=offset) as with_data, with_data.makefile("rb") as data:
            assert data.read(10_000) == OLD[offset : offset + 10_000]
            assert reply(ftp, "ABOR").startswith("426 ")
            assert last_reply(ftp).startswith("226 ")


def test_the_end_of_the_session_ends_the_download(store: Store, address: tuple[str, int], events: Events) -> None:
    ftp = connect(address)
    with open_transfer(ftp, "RETR a") as with_data:
        assert with_data.recv(1000)
        ftp.close()
        events.wait_for("disconnect")
    wait_until(lambda: "incomplete_file_sent /a" in events.seen)
