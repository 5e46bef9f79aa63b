"""Control connections: active and passive mode, what breaks the order of commands, and who may do what."""

from __future__ import annotations

import contextlib
import ftplib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ftpvfs import VFSAuthorizer, VFSDTPHandler
from tests.conftest import (
    Store,
    connect,
    download,
    free_ports,
    last_reply,
    names,
    open_transfer,
    reply,
    upload,
)
from tests.servers import HOST

Serve = Callable[..., tuple[str, int]]
DATA = b"0123456789" * 1000


@pytest.fixture
def store(memory_store: Store) -> Store:
    return memory_store


@pytest.fixture
def ftp(store: Store, ftp_server: Serve) -> Iterator[ftplib.FTP]:
    with connect(ftp_server(store)) as client:
        yield client


# --- data connections


def test_active_mode_works_and_is_over_with_its_transfer(store: Store, ftp: ftplib.FTP) -> None:
    ftp.set_pasv(False)
    for name in ("a", "b"):
        assert upload(ftp, name, DATA).startswith("226 ")
        assert store.read(name) == DATA
        assert download(ftp, name) == DATA
        assert reply(ftp, "STOR c").startswith("425 ")
    assert names(ftp) == {"a", "b"}
    with open_transfer(ftp, "STOR c") as with_data:
        with_data.sendall(DATA)
        assert reply(ftp, "ABOR").startswith("426 ")
        assert last_reply(ftp).startswith("226 ")
    assert store.list() == {"a", "b"}


def test_an_address_where_nobody_listens_is_answered_with_425(ftp: ftplib.FTP) -> None:
    (port,) = free_ports(1)
    assert reply(ftp, f"PORT 127,0,0,1,{port // 256},{port % 256}").startswith("425 ")
    assert reply(ftp, "STOR a").startswith("425 ")
    for nonsense in ("PORT 1", "PORT 1,2,3,4,5,6,7", "PORT 127,0,0,1,999,1", "EPRT |1|127.0.0.1|x|", "EPRT |9|x|1|"):
        assert reply(ftp, nonsense)[0] == "5", nonsense
    assert reply(ftp, "PORT 127,0,0,1,0,22").startswith("501 ")  # a privileged port
    assert reply(ftp, "PORT 127,0,0,2,100,1").startswith("501 ")  # of somebody else
    assert upload(ftp, "a", DATA).startswith("226 ")


def test_used_up_passive_ports_are_answered_with_425(store: Store, ftp_server: Serve) -> None:
    (port,) = free_ports(1)
    address = ftp_server(store, attributes={"passive_ports": range(port, port + 1)})
    with connect(address) as first, connect(address) as second:
        host, given = ftplib.parse227(reply(first, "PASV"))
        assert (host, given) == (HOST, port)
        assert reply(second, "PASV").startswith("425 ")
        assert reply(second, "EPSV").startswith("425 ")
        assert reply(second, "STOR a").startswith("425 ")
        assert reply(first, "ABOR").startswith("225 ")  # gives the port back
        assert upload(second, "a", DATA).startswith("226 ")


def test_a_stranger_on_the_passive_port_is_shown_out_silently(store: Store, ftp: ftplib.FTP) -> None:
    address = ftplib.parse229(reply(ftp, "EPSV"), (HOST, 0))
    assert reply(ftp, "STOR a").startswith("150 ")
    stranger = socket.socket()
    try:
        stranger.bind(("127.0.0.2", 0))
    except OSError:
        stranger.close()
        pytest.skip("this system has one loopback address")
    with stranger:
        stranger.connect(address)
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    with socket.create_connection(address) as with_data:
        with_data.sendall(DATA)
    assert last_reply(ftp).startswith("226 ")
    assert store.read("a") == DATA


def test_a_passive_address_from_outside_is_told(store: Store, ftp_server: Serve) -> None:
    with connect(ftp_server(store, attributes={"masquerade_address": "203.0.113.7"})) as ftp:
        assert re.match(r"227 .*\(203,0,113,7,\d+,\d+\)", reply(ftp, "PASV"))


# --- commands


def test_commands_sent_in_one_piece_are_answered_in_their_order(ftp: ftplib.FTP) -> None:
    assert ftp.sock is not None
    ftp.sock.sendall(b"NOOP\r\nPWD\r\nSYST\r\nMKD a\r\nCWD a\r\nPWD\r\n")
    assert [last_reply(ftp)[:3] for _ in range(6)] == ["200", "257", "215", "257", "250", "257"]


def test_abor_with_telnet_signals_is_understood(ftp: ftplib.FTP) -> None:
    with open_transfer(ftp, "STOR a") as with_data:
        with_data.sendall(DATA)
        assert ftp.sock is not None
        ftp.sock.sendall(b"\xff\xf4\xff\xf2ABOR\r\n")
        assert last_reply(ftp).startswith("426 ")
        assert last_reply(ftp).startswith("226 ")


def test_another_login_begins_afresh(store: Store, ftp_server: Serve) -> None:
    address = ftp_server(store, users={"alice": "wonder", "bob": "builder"})
    with connect(address, "alice", "wonder") as ftp:
        assert ftp.mkd("folder") == "/folder"
        assert reply(ftp, "CWD folder").startswith("250 ")
        reply(ftp, "EPSV")
        assert reply(ftp, "STOR a").startswith("150 ")
        assert reply(ftp, "USER bob").startswith("426 ")  # the upload that waited is answered first
        assert last_reply(ftp).startswith("331 ")
        assert reply(ftp, "PWD").startswith("530 ")
        assert reply(ftp, "PASS builder").startswith("230 ")
        assert ftp.pwd() == "/"
        assert reply(ftp, "REIN").startswith("230 ")
        assert reply(ftp, "STOR a").startswith("530 ")
    assert store.list() == set()


def test_nobody_gets_in_without_the_password(store: Store, ftp_server: Serve) -> None:
    address = ftp_server(store, users={"alice": "wonder"}, attributes={"auth_failed_timeout": 0.01})
    wrong = [("alice", "wrong"), ("alice", ""), ("bob", "wonder"), ("anonymous", "x"), ("alice", "w\xf6")]
    for user, password in wrong:
        with pytest.raises(ftplib.error_perm, match=r"^5\d\d "):
            connect(address, user, password)
    with connect(address, "alice", "wonder") as ftp:
        assert reply(ftp, "NOOP").startswith("200 ")


def test_a_reader_may_read_and_no_more(store: Store, ftp_server: Serve) -> None:
    store.write("a", DATA)
    with connect(ftp_server(store, perm="elr", home="/")) as ftp:
        assert download(ftp, "a") == DATA
        for command in ("STOR b", "APPE b", "STOU", "DELE a", "MKD b", "RMD b", "RNFR a", "MFMT 20200102030405 a"):
            reply(ftp, "EPSV")
            assert reply(ftp, command).startswith("550 "), command
        reply(ftp, "EPSV")
        assert reply(ftp, "MDTM 20200102030405 a").startswith("550 ")
    with connect(ftp_server(store, perm="elr", home="/new/home")) as ftp:
        reply(ftp, "EPSV")
        assert reply(ftp, "STOU").startswith("550 ")
    assert store.list() == {"a"}


def test_a_read_only_vfs_refuses_every_change(store: Store, ftp_server: Serve) -> None:
    store.write("a", DATA)
    store.write("folder/b", DATA)
    before = store.list()
    with connect(ftp_server(store, read_only=True)) as ftp:
        for command in ("STOR b", "STOR a", "APPE b", "STOU", "DELE a", "MKD b", "RMD folder", "MFMT 20200102030405 a"):
            reply(ftp, "EPSV")
            answer = reply(ftp, command)
            assert answer.startswith("550 "), answer
            assert "read-only" in answer
        assert reply(ftp, "RNFR a").startswith("350 ")
        assert reply(ftp, "RNTO c").startswith("550 ")
        assert download(ftp, "a") == DATA
    assert store.list() == before


def test_rights_differ_by_folder(store: Store, ftp_server: Serve) -> None:
    store.write("in/a", DATA)
    store.write("in/deep/a", DATA)
    authorizer = VFSAuthorizer()
    authorizer.add_user("alice", "wonder", perm="elr")
    authorizer.override_perm("alice", "/in", "elradfmwMT", recursive=True)
    with connect(ftp_server(store, authorizer=authorizer), "alice", "wonder") as ftp:
        assert upload(ftp, "in/b", DATA).startswith("226 ")
        assert upload(ftp, "in/deep/b", DATA).startswith("226 ")
        reply(ftp, "EPSV")
        assert reply(ftp, "STOR b").startswith("550 ")
        assert reply(ftp, "RNFR in/b").startswith("350 ")
        assert reply(ftp, "RNTO b").startswith("550 ")
        assert reply(ftp, "CWD in").startswith("250 ")
        reply(ftp, "EPSV")
        assert reply(ftp, "STOU")[:3] in {"125", "150"}
        assert reply(ftp, "ABOR").startswith("426 ")
        assert last_reply(ftp).startswith("226 ")


# --- what goes wrong inside


def test_a_bug_is_answered_and_does_not_end_the_session(
    store: Store, ftp_server: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftpvfs import VFS

    def fail(self: Any, path: str) -> Any:
        raise RuntimeError("a bug")

    with connect(ftp_server(store)) as ftp:
        monkeypatch.setattr(VFS, "mkdir", fail)
        monkeypatch.setattr(VFS, "timed_listing", fail)
        assert reply(ftp, "MKD a") == "451 Internal error."
        reply(ftp, "EPSV")
        assert reply(ftp, "LIST") == "451 Internal error."
        assert reply(ftp, "NOOP").startswith("200 ")


def test_a_throttled_handler_keeps_the_truth(store: Store, ftp_server: Serve) -> None:
    """pyftpdlib's own mixture: limits of speed around a data connection of ours."""
    from pyftpdlib.handlers import ThrottledDTPHandler

    class Throttled(ThrottledDTPHandler, VFSDTPHandler):
        read_limit = write_limit = 100_000_000

    store.write("a", b"old")
    with connect(ftp_server(store, attributes={"dtp_handler": Throttled})) as ftp:
        with open_transfer(ftp, "STOR a") as with_data:
            with_data.sendall(DATA)
            assert reply(ftp, "ABOR").startswith("426 ")
            assert last_reply(ftp).startswith("226 ")
        assert store.read("a") == b"old"
        assert upload(ftp, "a", DATA).startswith("226 ")
        assert download(ftp, "a") == DATA


def test_sessions_that_want_passive_ports_at_once_all_get_one(local_store: Store, ftp_server: Serve) -> None:
    """Two may bind the same port before either listens: the slower one must look for another."""
    ports = free_ports(1)[0]
    span = list(range(ports, ports + 40))
    address = ftp_server(local_store, attributes={"passive_ports": span})
    start = threading.Barrier(8)

    def ask() -> list[str]:
        with connect(address) as client:
            start.wait(10)
            return [client.sendcmd("EPSV")[:3] for _ in range(40)]

    with ThreadPoolExecutor(8) as threads:
        answers = [each.result() for each in [threads.submit(ask) for _ in range(8)]]
    assert {code for codes in answers for code in codes} == {"229"}


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_pasv_is_refused_where_its_answer_has_no_room_for_the_address(
    local_store: Store, launched: Callable[..., Any]
) -> None:
    server = launched(local_store.root, "--addr=[::1]:0", "--workers=1")
    with contextlib.closing(connect(server.address)) as ftp:
        assert reply(ftp, "PASV") == "425 Can't open a data connection: PASV knows IPv4 alone, use EPSV."
        assert reply(ftp, "EPSV").startswith("229 ")
        port = socket.create_server(("::1", 0), family=socket.AF_INET6)
        with port:
            assert reply(ftp, f"EPRT |2|0:0:0:0:0:0:0:1|{port.getsockname()[1]}|").startswith("200 ")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_a_balancers_client_may_open_data_connections_itself(local_store: Store, launched: Callable[..., Any]) -> None:
    local_store.write("a", DATA)
    server = launched(local_store.root, "--addr=:0", "--workers=1", "--proxy-protocol-from=127.0.0.1/32")
    port = server.address[1]
    with socket.create_connection((HOST, port), timeout=30) as control, control.makefile("rb") as replies:
        control.sendall(b"PROXY TCP4 127.0.0.9 127.0.0.1 4444 21\r\nUSER anonymous\r\nPASS x\r\nTYPE I\r\nEPSV\r\n")
        lines = [replies.readline() for _ in range(5)]
        data_port = int(lines[-1].split(b"|")[3])
        with socket.create_connection((HOST, data_port), timeout=30, source_address=("127.0.0.9", 0)) as data:
            control.sendall(b"RETR a\r\n")
            assert replies.readline()[:1] == b"1"
            with data.makefile("rb") as file:
                assert file.read() == DATA
        assert replies.readline().startswith(b"226 ")
