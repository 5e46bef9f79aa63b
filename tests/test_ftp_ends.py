"""How a client ends: what it had said in full is done and answered; only an end without a word is a client killed."""

from __future__ import annotations

import contextlib
import ftplib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ftpvfs.readiness import END
from ftpvfs.server.source import FileSource, ViewSource
from ftpvfs.server.transfer import EXIT_GAP, MOST_PATIENCE, VFSDTPHandler, patience_for
from tests.conftest import Launched, Store, connect, last_reply, open_transfer, reply
from tests.servers import HOST, FaultProxy, wait_until

OLD, NEW = b"the version that was there", b"the one that a device has sent"
DATA = bytes(range(256)) * 4096


class Raw:
    """A client that says what it likes, and reads when it likes."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.control = socket.create_connection(address, timeout=30)
        self._lines = self.control.makefile("rb")
        self.expect("220")
        for command in ("USER anonymous", "PASS guest", "TYPE I"):
            self.say(command)
        for code in ("331", "230", "200"):
            self.expect(code)

    def say(self, *commands: str) -> None:
        self.control.sendall("".join(f"{command}\r\n" for command in commands).encode())

    def expect(self, *codes: str) -> str:
        line = self._lines.readline().decode()
        assert line.startswith(codes), line
        return line

    def store(self, name: str, data: bytes) -> socket.socket:
        """Begin an upload, and send all of it but its end."""
        self.say("EPSV")
        where = ftplib.parse229(self.expect("229"), (HOST, 0))
        connection = socket.create_connection(where, timeout=30)
        self.say(f"STOR {name}")
        self.expect("125", "150")
        connection.sendall(data)
        return connection

    def rest(self) -> list[str]:
        """The codes of all replies to the end of the connection."""
        return [line[:3].decode() for line in self._lines]

    def close(self) -> None:
        self._lines.close()
        self.control.close()


@pytest.fixture
def stopped(local_store: Store, launched: Callable[..., Launched]) -> Callable[..., Any]:
    """Within it the server sees nothing of what its clients do; it then finds all at once, in whatever order."""
    server = launched(local_store.url)

    @contextlib.contextmanager
    def stop() -> Iterator[None]:
        server.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            server.process.send_signal(signal.SIGCONT)

    stop.address = server.address  # type: ignore[attr-defined]
    return stop


# --- the end of an upload


@pytest.mark.parametrize("last", ["QUIT", "NOOP\r\nQUIT", "SIZE a", "quit", "DELE b"])
@pytest.mark.parametrize("whole", [True, False])
def test_an_upload_is_meant_when_the_client_says_more(
    local_store: Store, stopped: Callable[..., Any], last: str, whole: bool
) -> None:
    local_store.write("a", OLD)
    local_store.write("b", OLD)
    for number in range(3):
        client = Raw(stopped.address)  # type: ignore[attr-defined]
        data = client.store("a", NEW + bytes([number]))
        with stopped():
            data.close()
            client.say(last)
            if whole:
                client.close()
            else:
                client.control.shutdown(socket.SHUT_WR)
        wait_until(lambda number=number: local_store.read("a") == NEW + bytes([number]), what="the upload is stored")
        if last == "DELE b":
            wait_until(lambda: "b" not in local_store.list(), what="what was said behind the upload is done")
        if not whole:
            assert "226" in client.rest()
            client.close()


def test_devices_hang_up_as_soon_as_they_have_said_quit(
    local_store: Store, ftp_server: Callable[..., tuple[str, int]]
) -> None:
    address = ftp_server(local_store)
    for number in range(30):
        client = Raw(address)
        data = client.store(f"scan{number}", NEW)
        data.close()
        client.say("QUIT")
        client.close()
    wanted = {f"scan{number}" for number in range(30)}
    wait_until(lambda: local_store.list() == wanted, what="all that devices have sent is stored")
    assert {local_store.read(name) for name in wanted} == {NEW}


@pytest.mark.parametrize("last", ["", "NOOP\r\n", "STAT\r\nNOOP\r\n", "QUI", "ABOR\r\nQUIT\r\n"])
def test_an_end_with_nothing_said_is_a_client_that_was_killed(
    local_store: Store, stopped: Callable[..., Any], last: str
) -> None:
    local_store.write("a", OLD)
    for _ in range(3):
        client = Raw(stopped.address)  # type: ignore[attr-defined]
        data = client.store("a", NEW)
        with stopped():
            data.close()
            client.control.sendall(last.encode())
            client.control.shutdown(socket.SHUT_WR)
        assert "226" not in client.rest() or last.startswith("ABOR")
        client.close()
        assert local_store.read("a") == OLD


def test_an_upload_in_the_midst_of_its_bytes_is_given_up_with_the_session(
    local_store: Store, ftp_server: Callable[..., tuple[str, int]]
) -> None:
    local_store.write("a", OLD)
    client = Raw(ftp_server(local_store))
    data = client.store("a", NEW)
    client.control.shutdown(socket.SHUT_WR)
    assert client.rest() in ([], ["426"])
    data.close()
    client.close()
    assert local_store.read("a") == OLD


@pytest.mark.parametrize("last", ["SIZE a", "EPSV", "RNFR a\r\nRNTO b"])
def test_what_is_said_behind_a_large_upload_waits_for_its_last_bytes(
    local_store: Store, ftp_server: Callable[..., tuple[str, int]], last: str
) -> None:
    client = Raw(ftp_server(local_store))
    for number in range(5):
        data = client.store("a", DATA[number:])
        data.close()
        client.say(last)
        client.expect("226")
        for code in {"SIZE a": ["213"], "EPSV": ["229"]}.get(last, ["350", "250"]):
            client.expect(code)
        assert local_store.read("b" if "RNTO" in last else "a") == DATA[number:]
    client.close()


# --- half-closed control connections


@pytest.mark.parametrize("last", [[], ["QUIT"]])
def test_what_was_said_before_the_end_is_answered(
    local_store: Store, ftp_server: Callable[..., tuple[str, int]], last: list[str]
) -> None:
    local_store.write("a", OLD)
    client = Raw(ftp_server(local_store))
    client.say("SIZE a", "MKD new", "RNFR a", "RNTO b", "NOOP", *last)
    client.control.sendall(b"DELE b")  # no line: it may have been about to say more
    client.control.shutdown(socket.SHUT_WR)
    assert client.rest() == ["213", "257", "350", "250", "200", *(["221"] if last else [])]
    assert local_store.list() == {"b", "new/"} or local_store.read("b") == OLD
    client.close()


def test_a_command_that_waits_for_the_store_is_answered_after_the_end(
    s3_store: Store, make_proxy: Callable[[Any], FaultProxy], ftp_server: Callable[..., tuple[str, int]]
) -> None:
    s3_store.write("a", OLD)
    proxy = make_proxy(s3_store)
    client = Raw(ftp_server(s3_store.proxied(proxy)))
    proxy.black_hole = True
    client.say("SIZE a", "DELE a", "NOOP")
    client.control.shutdown(socket.SHUT_WR)
    proxy.black_hole = False
    assert client.rest() == ["213", "250", "200"]
    assert s3_store.list() == set()
    client.close()


@pytest.mark.parametrize("last", ["", "PWD", "QUIT"])
def test_a_download_goes_on_after_the_end(
    local_store: Store, ftp_server: Callable[..., tuple[str, int]], last: str
) -> None:
    local_store.write("a", DATA * 8)
    client = Raw(ftp_server(local_store))
    client.say("EPSV")
    where = ftplib.parse229(client.expect("229"), (HOST, 0))
    with socket.create_connection(where, timeout=30) as data:
        client.say("RETR a", *([last] if last else []))
        client.control.shutdown(socket.SHUT_WR)
        with data.makefile("rb") as file:
            assert file.read() == DATA * 8
    assert sorted(client.rest()) == sorted(["125", "226", *({"PWD": ["257"], "QUIT": ["221"]}.get(last, []))])
    client.close()


# --- 226 after a download


@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_a_download_that_ends_early_is_no_226(
    store: Store, ftp_server: Callable[..., tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("a", DATA)
    with connect(ftp_server(store)) as ftp:
        for source in (FileSource, ViewSource):
            monkeypatch.setattr(source, "fill", lambda self: END)
        with open_transfer(ftp, "RETR a") as data:
            assert data.recv(10) == b""
        assert last_reply(ftp).startswith("451 0 of 1048576 bytes were sent")
        assert reply(ftp, "NOOP").startswith("200")


# --- how long the end of the control connection is waited for


def test_the_wait_follows_the_connection() -> None:
    with socket.create_server((HOST, 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        assert EXIT_GAP <= patience_for(near) < MOST_PATIENCE
    no_tcp, other = socket.socketpair()
    with no_tcp, other:
        assert patience_for(no_tcp) == EXIT_GAP


def test_a_next_command_ends_the_wait(local_store: Store, ftp_server: Callable[..., tuple[str, int]]) -> None:
    endless = type("Endless", (VFSDTPHandler,), {"patience": 3600.0})
    client = Raw(ftp_server(local_store, attributes={"dtp_handler": endless}))
    client.store("a", NEW).close()
    client.say("SIZE a")
    client.expect("226")
    assert client.expect("213") == f"213 {len(NEW)}\r\n"
    client.close()
    assert local_store.read("a") == NEW
