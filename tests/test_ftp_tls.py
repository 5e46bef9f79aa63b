"""FTPS: the same truths over TLS 1.2 and 1.3, where only close_notify ends an upload."""

from __future__ import annotations

import contextlib
import ftplib
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyftpdlib.handlers import TLS_FTPHandler
from pyftpdlib.servers import ThreadedFTPServer

from ftpvfs import TLS_VFSDTPHandler, TLS_VFSHandler
from tests.certificates import write_certificate
from tests.conftest import Store, StoreFactory, download, last_reply, reply, reset, upload
from tests.downloads import TLSClient
from tests.servers import HOST, wait_until
from tests.test_ftp_uploads import Events, assert_untouched

MIB = 2**20
RECORD = 16 * 1024
Serve = Callable[..., tuple[str, int]]

OLD = b"the version that was there"
VERSIONS = {"TLS 1.2": ssl.TLSVersion.TLSv1_2, "TLS 1.3": ssl.TLSVersion.TLSv1_3}


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for this machine, with its key, in one file."""
    return write_certificate(tmp_path_factory.mktemp("tls") / "certificate.pem")


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def serve(ftp_server: Serve, certificate: Path, events: Events) -> Serve:
    """serve(store, **attributes) -> address of an FTPS server over it."""

    def start(store: Store, **attributes: Any) -> tuple[str, int]:
        attributes = {"certfile": str(certificate), "ssl_context": None, **events.attributes(), **attributes}
        return ftp_server(store, handler=TLS_VFSHandler, attributes=attributes)

    return start


@pytest.fixture
def secure(certificate: Path) -> Any:
    """secure(address, version="TLS 1.3") -> a client logged in over TLS, with a protected data connection."""
    clients = []

    def login(address: tuple[str, int], version: str = "TLS 1.3") -> ftplib.FTP_TLS:
        context = ssl.create_default_context(cafile=certificate)
        context.minimum_version = context.maximum_version = VERSIONS[version]
        ftp = TLSClient(timeout=30, context=context, encoding="utf-8")
        clients.append(ftp)
        ftp.connect(*address)
        ftp.login()
        ftp.prot_p()
        ftp.voidcmd("TYPE I")
        return ftp

    yield login
    for client in clients:
        client.close()


@pytest.fixture(params=list(VERSIONS))
def ftp(request: pytest.FixtureRequest, secure: Any, serve: Serve, store: Store) -> ftplib.FTP_TLS:
    store.write("a", OLD)
    client: ftplib.FTP_TLS = secure(serve(store), request.param)
    return client


local_and_s3 = pytest.mark.parametrize("store", ["local", "s3"], indirect=True)


@local_and_s3
def test_what_goes_up_comes_down(store: Store, ftp: ftplib.FTP_TLS) -> None:
    for size in (0, 1, RECORD - 1, RECORD, RECORD + 1, 3 * RECORD, 20 * MIB + 7):
        data = os.urandom(size)
        assert upload(ftp, "a", data).startswith("226 ")
        assert store.read("a") == data
        assert download(ftp, "a") == data
        assert download(ftp, "a", rest=size // 2) == data[size // 2 :]


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_listings_come_whole(store: Store, ftp: ftplib.FTP_TLS) -> None:
    expected = {"a", *(f"file-{number:05}" for number in range(2000))}
    for name in expected - {"a"}:
        store.write(name, b"x")
    assert set(ftp.nlst()) == expected
    assert {name for name, _ in ftp.mlsd()} == expected
    assert reply(ftp, "NOOP").startswith("200 ")


@local_and_s3
@pytest.mark.parametrize("end", ["FIN", "RST"])
@pytest.mark.parametrize("size", [0, 1000, 10 * MIB])
def test_an_upload_without_close_notify_is_not_stored(
    store: Store, ftp: ftplib.FTP_TLS, events: Events, size: int, end: str
) -> None:
    with_data = ftp.transfercmd("STOR a")
    with_data.sendall(bytes(size))
    if end == "FIN":
        with_data.close()  # Python's says nothing in TLS
    else:
        reset(with_data)
    assert last_reply(ftp).startswith("426 ")
    assert_untouched(store)
    assert reply(ftp, "NOOP").startswith("200 ")
    assert events.seen == ["incomplete_file_received /a"]
    assert upload(ftp, "a", b"new").startswith("226 ")
    assert store.read("a") == b"new"


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_abor_ends_transfers(store: Store, ftp: ftplib.FTP_TLS) -> None:
    store.write("large", bytes(40 * MIB))
    for command in ("STOR a", "RETR large"):
        with ftp.transfercmd(command) as with_data:
            if command.startswith("STOR"):
                with_data.sendall(bytes(MIB))
            else:
                assert with_data.recv(1000)
            assert reply(ftp, "ABOR").startswith("426 ")
            assert last_reply(ftp).startswith("226 ")
    assert store.read("a") == OLD
    for _ in range(10):  # ABOR and close_notify in one breath
        with_data = ftp.transfercmd("STOR a")
        with_data.sendall(bytes(MIB))
        assert ftp.sock is not None
        ftp.sock.sendall(b"ABOR\r\n")
        with contextlib.suppress(OSError, ValueError):  # the server may have closed the line already
            with_data.unwrap()
        with_data.close()
        assert last_reply(ftp).startswith("426 ")
        assert last_reply(ftp)[:3] in {"225", "226"}
    assert store.read("a") == OLD


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_handshake_that_fails_is_answered_with_522(store: Store, ftp: ftplib.FTP_TLS) -> None:
    address = ftplib.parse229(reply(ftp, "EPSV"), (HOST, 0))
    with socket.create_connection(address) as with_data:
        assert reply(ftp, "STOR a")[:4] in {"125 ", "150 "}
        with_data.sendall(b"this is no TLS, but the bytes of a file" * 10)
        assert last_reply(ftp).startswith("522 ")
    assert_untouched(store)
    address = ftplib.parse229(reply(ftp, "EPSV"), (HOST, 0))
    assert reply(ftp, "STOR a").startswith("150 ")
    socket.create_connection(address).close()
    assert last_reply(ftp)[:3] in {"425", "426", "522"}
    assert reply(ftp, "NOOP").startswith("200 ")
    assert_untouched(store)


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_handshake_that_stands_still_keeps_nobody_busy(store: Store, secure: Any, serve: Serve) -> None:
    store.write("a", OLD)
    tries = []

    class Counting(TLS_VFSDTPHandler):
        def _do_ssl_handshake(self) -> None:
            tries.append(self)
            super()._do_ssl_handshake()

    ftp = secure(serve(store, dtp_handler=Counting))
    for command in ("RETR a", "STOR a"):
        tries.clear()
        address = ftplib.parse229(reply(ftp, "EPSV"), (HOST, 0))
        with socket.create_connection(address):
            assert reply(ftp, command)[:4] in {"125 ", "150 "}
            for _ in range(50):  # turns of the loop
                assert reply(ftp, "NOOP").startswith("200 ")
            assert len(tries) < 10
        assert last_reply(ftp)[:4] in {"426 ", "522 "}
    assert_untouched(store)


@pytest.mark.parametrize("store", ["local"], indirect=True)
@pytest.mark.parametrize("version", list(VERSIONS))
def test_clients_that_stand_still_are_told(store: Store, secure: Any, serve: Serve, version: str) -> None:
    store.write("a", OLD)
    store.write("large", bytes(40 * MIB))
    impatient = type("Impatient", (TLS_VFSDTPHandler,), {"timeout": 0.4})
    ftp = secure(serve(store, dtp_handler=impatient), version)
    for command in ("STOR a", "RETR large"):
        with ftp.transfercmd(command):
            assert last_reply(ftp).startswith("426 ")
        assert reply(ftp, "NOOP").startswith("200 ")
    assert_untouched_but_large(store)


def assert_untouched_but_large(store: Store) -> None:
    assert store.read("a") == OLD
    assert store.list() == {"a", "large"}


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_the_end_of_the_session_ends_its_transfers(store: Store, ftp: ftplib.FTP_TLS, events: Events) -> None:
    with ftp.transfercmd("STOR a") as with_data:
        with_data.sendall(bytes(MIB))
        ftp.close()
        events.wait_for("disconnect")
    assert_untouched(store)


@pytest.mark.parametrize("store", ["local"], indirect=True)
@pytest.mark.parametrize("data", [b"", b"x"], ids=["at the commit", "at the first byte"])
def test_an_upload_that_fails_is_answered_with_its_reason(store: Store, ftp: ftplib.FTP_TLS, data: bytes) -> None:
    Path(store.path("folder")).mkdir()
    with ftp.transfercmd("STOR folder/new") as with_data:
        with_data.sendall(data)
        Path(store.path("folder")).rmdir()
        with_data.unwrap()  # the server says goodbye: the client would take a cut line for the failure
    assert last_reply(ftp).startswith("550 ")
    assert reply(ftp, "NOOP").startswith("200 ")


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_command_in_clear_behind_auth_is_dropped(store: Store, serve: Serve, certificate: Path) -> None:
    with socket.create_connection(serve(store)) as sock:
        assert sock.recv(1000).startswith(b"220 ")
        sock.sendall(b"AUTH TLS\r\nFEAT\r\n")
        answer = sock.recv(1000)
        assert answer.startswith(b"234 ")
        assert b"211" not in answer
        with ssl.create_default_context(cafile=certificate).wrap_socket(sock, server_hostname=HOST) as secured:
            secured.sendall(b"NOOP\r\n")
            assert secured.recv(1000).startswith(b"200 ")


# --- other programs


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


@local_and_s3
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_curl(store: Store, serve: Serve, certificate: Path, tmp_path: Path, version: str) -> None:
    host, port = serve(store)
    for size in (0, 1, RECORD - 1, RECORD, RECORD + 1, 3 * MIB + 1):
        data = os.urandom(size)
        (tmp_path / "sent").write_bytes(data)
        common = ["curl", "-sS", "--ssl-reqd", "--cacert", str(certificate), f"--tlsv{version}", "--tls-max", version]
        up = run(*common, "-T", str(tmp_path / "sent"), f"ftp://{host}:{port}/a")
        assert up.returncode == 0, up.stderr
        assert store.read("a") == data
        down = run(*common, "-o", str(tmp_path / "got"), f"ftp://{host}:{port}/a")
        assert down.returncode == 0, down.stderr
        assert (tmp_path / "got").read_bytes() == data


@local_and_s3
@pytest.mark.skipif(shutil.which("lftp") is None, reason="lftp is not installed")
def test_lftp(store: Store, serve: Serve, certificate: Path, tmp_path: Path) -> None:
    host, port = serve(store)
    for size in (0, 1, RECORD - 1, RECORD, RECORD + 1, 3 * MIB + 1):
        data = os.urandom(size)
        (tmp_path / "sent").write_bytes(data)
        script = (
            f"set net:max-retries 1; set ftp:ssl-force yes; set ftp:ssl-protect-data yes;"
            f" set ssl:ca-file {certificate}; open ftp://{host}:{port};"
            f" put {tmp_path}/sent -o a; get a -o {tmp_path}/got-{size}; cls -1"
        )
        done = run("lftp", "-c", script)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["a"]
        assert store.read("a") == data
        assert (tmp_path / f"got-{size}").read_bytes() == data


def test_an_upload_that_a_store_refuses_is_told_over_tls(
    make_store: StoreFactory, make_proxy: Any, secure: Any, ftp_server: Serve, certificate: Path
) -> None:
    store = make_store("s3")
    store.write("a", OLD)
    proxy = make_proxy(store)
    attributes = {"certfile": str(certificate), "ssl_context": None}
    ftp = secure(ftp_server(store.proxied(proxy), handler=TLS_VFSHandler, attributes=attributes, low_level_retries=1))
    proxy.fail_next(10**6, method="PUT")
    with pytest.raises(ftplib.error_temp, match=r"^451 "):
        upload(ftp, "a", b"x")
    wait_until(lambda: reply(ftp, "NOOP").startswith("200 "))
    assert_untouched(store)


@pytest.mark.parametrize("version", VERSIONS)
def test_commands_in_one_long_record_are_all_answered(
    local_store: Store, serve: Serve, secure: Any, version: str
) -> None:
    ftp = secure(serve(local_store), version)
    ftp.sock.sendall(b"NOOP\r\n" * 2000)  # 12,000 bytes: more than the server takes out of TLS at once
    assert {last_reply(ftp)[:4] for _ in range(2000)} == {"200 "}


@pytest.mark.parametrize("handler", [TLS_VFSHandler, TLS_FTPHandler])
def test_a_command_right_behind_an_upload_is_answered(
    local_store: Store, ftp_server: Serve, certificate: Path, secure: Any, handler: type
) -> None:
    attributes = {"certfile": str(certificate), "ssl_context": None, "dtp_handler": TLS_VFSDTPHandler}
    server_class = None if handler is TLS_VFSHandler else ThreadedFTPServer
    ftp = secure(ftp_server(local_store, handler=handler, server_class=server_class, attributes=attributes))
    for number in range(5):
        data = ftp.transfercmd("STOR a")
        data.sendall(b"x" * number)
        data.unwrap()
        data.close()
        ftp.sock.sendall(b"SIZE a\r\n")
        answers = {last_reply(ftp)[:3], last_reply(ftp)[:3]}
        assert answers >= {"226"}
        assert len(answers) == 2


def test_an_upload_that_has_told_its_end_is_not_waited_for(store: Store, serve: Serve, secure: Any) -> None:
    endless = type("Endless", (TLS_VFSDTPHandler,), {"patience": 3600.0})
    with secure(serve(store, dtp_handler=endless)) as ftp:
        with contextlib.closing(ftp.transfercmd("STOR a")) as data:
            data.sendall(b"all of it")
            data.unwrap()
        assert last_reply(ftp).startswith("226 ")
    assert store.read("a") == b"all of it"
