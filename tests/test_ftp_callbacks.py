"""What pyftpdlib's own handlers log, and call an embedding program with, for each transfer of our data channels."""

from __future__ import annotations

import contextlib
import ftplib
import json
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyftpdlib.handlers import FTPHandler, ThrottledDTPHandler, TLS_FTPHandler
from pyftpdlib.servers import FTPServer, MultiprocessFTPServer, ThreadedFTPServer

from ftpvfs import TLS_VFSDTPHandler, VFSDTPHandler, VFSHandler
from tests.certificates import write_certificate
from tests.conftest import Store, connect, download, last_reply, open_transfer, reset, upload
from tests.downloads import TLSClient
from tests.servers import wait_until

KIB = 2**10
MIB = 2**20
Serve = Callable[..., tuple[str, int]]

SMALL = b"small"
LARGE = os.urandom(MIB) * 24  # more than the buffers of both ends
SERVERS = [FTPServer, ThreadedFTPServer, MultiprocessFTPServer]


class Told:
    """What a handler was told, in a file, since a session may be served by another process."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._path = path

    def attributes(self) -> dict[str, Any]:
        """The callbacks of a handler class."""

        def callback(name: str) -> Callable[[Any, str], None]:
            return lambda handler, file: self._write([name, file])

        def log_transfer(handler: Any, **transfer: Any) -> None:
            self._write(["log", transfer])

        names = ("on_file_sent", "on_file_received", "on_incomplete_file_sent", "on_incomplete_file_received")
        return {"log_transfer": log_transfer, **{name: callback(name) for name in names}}

    def _write(self, entry: list[Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def wait_for(self, count: int) -> list[Any]:
        """Return the first `count` entries."""
        wait_until(lambda: len(self._entries()) >= count, timeout=30)
        return self._entries()

    def _entries(self) -> list[Any]:
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path / "told")


def a_log(cmd: str, name: str, size: int, *, completed: bool = True) -> Any:
    """What equals the log entry of a transfer, whatever time it took."""
    receive = cmd != "RETR"
    entry = {"cmd": cmd, "filename": name, "receive": receive, "completed": completed, "bytes": size}
    return ["log", _Timed(entry)]


class _Timed:
    def __init__(self, entry: dict[str, Any]) -> None:
        self._entry = entry

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, dict):
            return NotImplemented
        return other.get("elapsed", -1) >= 0 and {**self._entry, "elapsed": other["elapsed"]} == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._entry)


def download_late(ftp: ftplib.FTP, command: str) -> bytes:
    """Download where the data connection comes after the command."""
    host, port = ftp.makepasv()
    assert ftp.sock is not None
    ftp.sock.sendall(f"{command}\r\n".encode())
    assert ftp.getresp().startswith("150 ")
    with socket.create_connection((host, port)) as data:
        received = b"".join(iter(lambda: data.recv(65536), b""))
    assert ftp.getresp().startswith("226 ")
    return received


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_each_transfer_is_told_with_its_command(
    make_store: Any, ftp_server: Serve, told: Told, server: type, kind: str
) -> None:
    store = make_store(kind)
    address = ftp_server(
        store,
        server_class=server,
        handler=FTPHandler,
        attributes={"dtp_handler": VFSDTPHandler, **told.attributes()},
    )
    with connect(address) as ftp:
        upload(ftp, "a", SMALL)
        assert told.wait_for(2) == [a_log("STOR", "/a", 5), ["on_file_received", "/a"]]
        assert download(ftp, "a") == SMALL
        assert told.wait_for(4)[2:] == [a_log("RETR", "/a", 5), ["on_file_sent", "/a"]]
        assert download(ftp, "a", rest=5) == b""
        assert told.wait_for(6)[4:] == [a_log("RETR", "/a", 0), ["on_file_sent", "/a"]]
        assert download_late(ftp, "RETR a") == SMALL
        assert told.wait_for(8)[6:] == [a_log("RETR", "/a", 5), ["on_file_sent", "/a"]]
        upload(ftp, "large", LARGE)
        assert told.wait_for(10)[8:] == [a_log("STOR", "/large", len(LARGE)), ["on_file_received", "/large"]]
        assert download(ftp, "large") == LARGE
        assert told.wait_for(12)[10:] == [a_log("RETR", "/large", len(LARGE)), ["on_file_sent", "/large"]]
        ftp.voidcmd("TYPE A")
        lines: list[str] = []
        ftp.retrlines("RETR a", lines.append)
        assert told.wait_for(14)[12:] == [a_log("RETR", "/a", 5), ["on_file_sent", "/a"]]
        ftp.voidcmd("TYPE I")


def test_a_transfer_that_breaks_off_is_told_with_its_command(
    make_store: Any, ftp_server: Serve, told: Told
) -> None:
    store = make_store("local")
    store.write("large", LARGE)
    attributes = {"dtp_handler": VFSDTPHandler, **told.attributes()}
    with connect(ftp_server(store, server_class=ThreadedFTPServer, handler=FTPHandler, attributes=attributes)) as ftp:
        data = open_transfer(ftp, "RETR large")
        received = data.recv(1)
        assert received
        reset(data)
        assert last_reply(ftp).startswith("426 ")
        log, callback = told.wait_for(2)
        assert (log[1]["cmd"], log[1]["completed"], log[1]["receive"]) == ("RETR", False, False)
        assert callback == ["on_incomplete_file_sent", "/large"]
        with open_transfer(ftp, "STOR up"):
            ftp.putcmd("ABOR")
            assert last_reply(ftp)[:3] in {"225", "426"}
        log, callback = told.wait_for(4)[2:]
        assert (log[1]["cmd"], log[1]["completed"], log[1]["receive"]) == ("STOR", False, True)
        assert callback == ["on_incomplete_file_received", "/up"]


def test_a_download_whose_first_byte_fails_is_told_with_its_command(
    make_store: Any, make_proxy: Any, ftp_server: Serve, told: Told
) -> None:
    store = make_store("s3")
    store.write("a", SMALL)
    proxy = make_proxy(store)
    attributes = {"dtp_handler": VFSDTPHandler, **told.attributes()}
    address = ftp_server(
        store.proxied(proxy),
        server_class=ThreadedFTPServer,
        handler=FTPHandler,
        attributes=attributes,
        low_level_retries=1,
    )
    with connect(address) as ftp:
        proxy.fail_next(10**6, method="GET", target="/a")
        with open_transfer(ftp, "RETR a") as data:
            assert data.recv(1) == b""
        assert last_reply(ftp).startswith("451 ")
        log, callback = told.wait_for(2)
        assert (log[1]["cmd"], log[1]["completed"], log[1]["bytes"]) == ("RETR", False, 0)
        assert callback == ["on_incomplete_file_sent", "/a"]


def test_the_same_over_tls(
    make_store: Any, ftp_server: Serve, tmp_path: Path, told: Told
) -> None:
    certificate = str(write_certificate(tmp_path / "certificate.pem"))
    attributes = {"dtp_handler": TLS_VFSDTPHandler, "certfile": certificate, "ssl_context": None, **told.attributes()}
    address = ftp_server(
        make_store("local"), server_class=ThreadedFTPServer, handler=TLS_FTPHandler, attributes=attributes
    )
    with TLSClient(context=ssl.create_default_context(cafile=certificate)) as ftp:
        ftp.connect(*address, timeout=30)
        ftp.login()
        ftp.prot_p()
        upload(ftp, "a", SMALL)
        assert download(ftp, "a") == SMALL
        assert told.wait_for(4) == [
            a_log("STOR", "/a", 5),
            ["on_file_received", "/a"],
            a_log("RETR", "/a", 5),
            ["on_file_sent", "/a"],
        ]


# --- rates


@contextlib.contextmanager
def at_least(seconds: float) -> Iterator[None]:
    """The block takes so long."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin >= seconds


@pytest.mark.parametrize("bases", [(VFSDTPHandler,), (VFSDTPHandler, ThrottledDTPHandler)], ids=["ours", "both"])
@pytest.mark.parametrize("server", [None, FTPServer, ThreadedFTPServer])
def test_our_data_channel_keeps_to_the_limits_of_pyftpdlibs_throttled_one(
    local_store: Store, ftp_server: Serve, server: type | None, bases: tuple[type, ...]
) -> None:
    throttled = type("Throttled", bases, {"read_limit": 200 * KIB, "write_limit": 200 * KIB})
    handler = VFSHandler if server is None else FTPHandler
    address = ftp_server(
        local_store, server_class=server, handler=handler, attributes={"dtp_handler": throttled}
    )
    data = LARGE[: 300 * KIB]
    with connect(address) as ftp:
        with at_least(0.7):  # a second and a half, but for what a connection has in credit
            upload(ftp, "a", data)
        with at_least(0.7):
            assert download(ftp, "a") == data
