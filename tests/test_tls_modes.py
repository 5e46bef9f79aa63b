"""FTPS from the command line: modes, certificates, what a client has to show, and resumed sessions."""

from __future__ import annotations

import contextlib
import ftplib
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import write_certificate
from tests.conftest import Launched, connect, download, last_reply, names, reply, run_program, upload
from tests.downloads import Client, TLSClient
from tests.servers import HOST, wait_until

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
both_versions = pytest.mark.parametrize("version", list(VERSIONS))


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificate(tmp_path_factory.mktemp("ca") / "ca.pem", "the CA")


@pytest.fixture
def cert(tmp_path: Path, ca: Path) -> Path:
    return write_certificate(tmp_path / "cert.pem", signed_by=ca)


@pytest.fixture
def served(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


@pytest.fixture
def start(launched: Any, served: Path, cert: Path) -> Any:
    """start(mode, *arguments) -> the program that serves the folder with the certificate."""

    def launch(mode: str, *arguments: str) -> Launched:
        server: Launched = launched(str(served), "--cert", str(cert), "--tls-mode", mode, *arguments)
        return server

    return launch


class SessionClient(TLSClient):
    """Python's client, with the two things that it lacks: implicit TLS, and data connections that resume."""

    implicit = False
    resumes = True

    def connect(self, *arguments: Any, **keywords: Any) -> str:
        if not self.implicit:
            return super().connect(*arguments, **keywords)
        host, port = arguments
        self.host, self.port = host, port
        self.sock = self.context.wrap_socket(socket.create_connection((host, port), self.timeout), server_hostname=host)
        self.af = self.sock.family
        self.file = self.sock.makefile("r", encoding=self.encoding)
        self.welcome = self.getresp()
        return self.welcome

    def open_data(self, cmd: str, rest: Any = None) -> Any:
        conn, size = ftplib.FTP.ntransfercmd(self, cmd, rest)
        if self._prot_p:  # type: ignore[attr-defined]
            assert isinstance(self.sock, ssl.SSLSocket)
            session = self.sock.session if self.resumes else None
            conn = self.context.wrap_socket(conn, server_hostname=self.host, session=session)
        return conn, size


@pytest.fixture
def secure(ca: Path) -> Iterator[Any]:
    """secure(server, version="1.3", ...) -> a client that is logged in over TLS."""
    clients = []

    def login(
        server: Launched, version: str = "1.3", *, implicit: bool = False, certificate: Path | None = None
    ) -> SessionClient:
        context = ssl.create_default_context(cafile=ca)
        context.minimum_version = context.maximum_version = VERSIONS[version]
        if certificate is not None:
            context.load_cert_chain(certificate)
        ftp = SessionClient(timeout=30, context=context, encoding="utf-8")
        clients.append(ftp)
        ftp.implicit = implicit
        ftp.connect(*server.address)
        ftp.login()
        if not implicit:
            ftp.prot_p()
        ftp._prot_p = True  # type: ignore[attr-defined] # noqa: SLF001 - which ftplib sets for explicit TLS alone
        ftp.voidcmd("TYPE I")
        return ftp

    yield login
    for client in clients:
        client.close()


# --- modes


@both_versions
def test_explicit_tls_may_be_used(start: Any, secure: Any, version: str) -> None:
    server = start("explicit")
    assert "(cache mode off, TLS explicit, " in server.line
    with secure(server, version) as ftp:
        assert ftp.sock.version() == f"TLSv{version}"
        assert "AUTH TLS" in ftp.sendcmd("FEAT")
        upload(ftp, "a", b"in TLS")
        with connect(server.address) as plain:
            assert download(plain, "a") == b"in TLS"
        assert reply(ftp, "PROT C").startswith("200 ")


@both_versions
def test_required_tls_lets_nothing_pass_in_clear(start: Any, secure: Any, version: str) -> None:
    server = start("required")
    with Client(timeout=30) as plain:
        plain.connect(*server.address)
        for command in ("USER anonymous", "PASS guest"):
            assert reply(plain, command).startswith("530 ")
        for command in ("PASV", "LIST", "STOR a", "CWD /"):
            assert reply(plain, command)[:4] in {"530 ", "521 "}
        assert reply(plain, "NOOP").startswith("200 ")
    with secure(server, version) as ftp:
        assert reply(ftp, "PROT C").startswith("534 ")
        upload(ftp, "a", b"in TLS")
        assert download(ftp, "a") == b"in TLS"
        ftp.login()  # forgets what was said of protection, too
        assert reply(ftp, "PASV").startswith("521 ")


@both_versions
def test_implicit_tls_begins_with_the_first_byte(start: Any, secure: Any, version: str) -> None:
    server = start("implicit")
    assert f"at ftps://{HOST}" in server.line
    with secure(server, version, implicit=True) as ftp:  # which says neither PBSZ nor PROT
        upload(ftp, "a", b"in TLS")
        assert download(ftp, "a") == b"in TLS"
        assert reply(ftp, "AUTH TLS").startswith("503 ")
        assert reply(ftp, "PROT C").startswith("534 ")
        ftp.login()
        assert names(ftp) == {"a"}
        assert reply(ftp, "REIN").startswith("230 ")


def test_a_client_that_speaks_no_tls_gets_no_word_in_clear(start: Any) -> None:
    server = start("implicit")
    with socket.create_connection(server.address, timeout=30) as sock:
        sock.sendall(b"USER anonymous\r\n")
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = sock.recv(1000)
        assert b"220" not in answer
        assert b"331" not in answer


def test_a_client_that_never_begins_tls_is_left(start: Any) -> None:
    server = start("implicit", "--login-timeout", "1s")
    with socket.create_connection(server.address, timeout=30) as sock:
        assert sock.recv(1000) == b""


def test_several_listeners_serve_one_store_each_in_its_own_mode(
    launched: Any, secure: Any, served: Path, cert: Path, tmp_path: Path, ports: Any
) -> None:
    plain, implicit = ports(2)
    ini = tmp_path / "a.ini"
    ini.write_text(
        f"[backend]\nurl = {served}\n[tls]\ncert = {cert}\n"
        f"[listener:inside]\naddr = {HOST}:{plain}\ntls_mode = off\n"
        f"[listener:outside]\naddr = {HOST}:{implicit}\ntls_mode = implicit\n"
    )
    server = launched("--config", str(ini), f"--addr={HOST}:0", "--tls-mode=required")
    with connect((HOST, plain)) as ftp:
        upload(ftp, "a", b"x")
        assert reply(ftp, "AUTH TLS")[:3] in {"500", "502"}
    server.address = (HOST, implicit)
    with secure(server, implicit=True) as ftp:
        assert download(ftp, "a") == b"x"


@pytest.fixture
def ports() -> Any:
    """ports(n) -> so many ports that were free a moment ago."""

    def find(count: int) -> list[int]:
        probes = [socket.create_server((HOST, 0)) for _ in range(count)]
        found = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        return found

    return find


# --- sessions


def resumed(ftp: SessionClient, command: str = "NLST") -> bool:
    with ftp.transfercmd(command) as data:
        assert isinstance(data, ssl.SSLSocket)
        reused = data.session_reused
        while data.recv(1000):
            pass
        data.unwrap()
    assert last_reply(ftp).startswith("226 ")
    assert reused is not None
    return reused


@both_versions
@pytest.mark.parametrize("mode", ["explicit", "implicit"])
def test_data_connections_resume_the_session(start: Any, secure: Any, version: str, mode: str) -> None:
    ftp = secure(start(mode), version, implicit=mode == "implicit")
    assert [resumed(ftp) for _ in range(5)] == [True] * 5


@both_versions
def test_data_connections_that_do_not_resume_are_refused_where_asked_for(
    start: Any, secure: Any, served: Path, version: str
) -> None:
    server = start("required", "--require-tls-reuse")
    ftp, other = secure(server, version), secure(server, version)
    for _ in range(3):
        upload(ftp, "a", b"mine")
        assert resumed(ftp)
    ftp.resumes = False
    assert refusal(ftp, "STOR b").startswith("522 ")
    assert not (served / "b").exists()
    ftp.resumes = True
    own, ftp.context = ftp.context, other.context  # Python keeps a session to the context that it came from
    ftp.sock, stolen = other.sock, ftp.sock
    session = ftp.sock.session
    ftp.sock = stolen
    host, port = ftplib.parse229(reply(ftp, "EPSV"), ftp.sock.getpeername())
    with socket.create_connection((host, port)) as raw:
        assert reply(ftp, "STOR b").startswith(("125 ", "150 "))
        try:
            with other.context.wrap_socket(raw, server_hostname=HOST, session=session) as data:
                data.sendall(b"forged")
                data.unwrap()
        except OSError:
            pass  # the server had closed it already
        assert last_reply(ftp).startswith("522 ")
    assert not (served / "b").exists()
    ftp.context = own
    upload(ftp, "a", b"mine again")
    ftp.resumes = False
    host, port = ftplib.parse229(reply(ftp, "EPSV"), ftp.sock.getpeername())
    with socket.create_connection((host, port)) as raw, contextlib.suppress(OSError):
        data = ftp.context.wrap_socket(raw, server_hostname=HOST)
        while data.recv(1):  # until the server has closed it
            pass
        data.close()
    assert reply(ftp, "LIST").startswith("522 ")


def refusal(ftp: SessionClient, command: str) -> str:
    try:
        with ftp.transfercmd(command) as data:
            data.sendall(b"x")
            data.unwrap()  # type: ignore[attr-defined]
    except OSError:
        pass  # the server had closed it already
    return last_reply(ftp)


# --- certificates


def test_a_client_needs_a_certificate_of_the_cas_where_asked_for(
    start: Any, secure: Any, ca: Path, tmp_path: Path
) -> None:
    server = start("required", "--client-ca", str(ca))
    mine = write_certificate(tmp_path / "client.pem", "alice", signed_by=ca)
    foreign = write_certificate(tmp_path / "foreign.pem", "mallory")
    for version in VERSIONS:
        ftp = secure(server, version, certificate=mine)
        upload(ftp, "a", b"x")
        assert resumed(ftp)
        for certificate in (None, foreign):
            with pytest.raises((ssl.SSLError, OSError, EOFError)):
                secure(server, version, certificate=certificate)


def test_certificates_are_read_again_on_sighup_while_sessions_go_on(
    start: Any, secure: Any, cert: Path, ca: Path
) -> None:
    server = start("explicit")

    def common_name() -> str:
        with secure(server) as ftp:
            return str(dict(each[0] for each in ftp.sock.getpeercert()["subject"])["commonName"])

    running = secure(server)
    upload(running, "a", b"before")
    assert common_name() == "localhost"
    write_certificate(cert, "renewed", signed_by=ca)
    server.process.send_signal(1)
    wait_until(lambda: common_name() == "renewed")
    assert resumed(running)
    assert download(running, "a") == b"before"
    cert.write_text("damaged")
    server.process.send_signal(1)
    wait_until(lambda: "the certificate in use stays" in server.log())
    assert common_name() == "renewed"
    assert resumed(running)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cert", "none.pem"], "certificate 'none.pem': No such file or directory"),
        (["--cert", "."], "certificate '.': Is a directory"),
        (["--cert", "text.pem"], "certificate 'text.pem': no certificate in PEM form"),
        (["--cert", "cert.pem", "--key", "none.pem"], "key 'none.pem': No such file or directory"),
        (["--cert", "cert.pem", "--key", "text.pem"], "key 'text.pem': no private key"),
        (["--cert", "cert.pem", "--key", "other.pem"], "the key in 'other.pem' is not that of 'cert.pem'"),
        (["--cert", "cert.pem", "--key", "locked.pem"], "key 'locked.pem': a key with a passphrase"),
        (["--cert", "cert.pem", "--client-ca", "none.pem"], "client CA 'none.pem': No such file"),
    ],
)
def test_a_certificate_that_cannot_be_used_stops_the_start(
    tmp_path: Path, cert: Path, flags: list[str], words: str
) -> None:
    (tmp_path / "text.pem").write_text("no certificate")
    write_certificate(tmp_path / "other.pem")
    write_certificate(tmp_path / "locked.pem", passphrase=b"secret")
    ended = run_program(*flags, cwd=tmp_path)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_an_expired_certificate_is_said(launched: Any, tmp_path: Path) -> None:
    write_certificate(tmp_path / "old.pem", days=-1)
    assert "has expired" in launched("--cert", "old.pem", cwd=tmp_path).log()


def test_old_versions_of_tls_are_refused(start: Any, secure: Any) -> None:
    server = start("explicit", "--min-tls-version", "tls1.3")
    secure(server, "1.3")
    with pytest.raises(ssl.SSLError):
        secure(server, "1.2")


# --- how uploads end


@both_versions
def test_an_upload_without_close_notify_counts_only_where_asked_for(
    start: Any, secure: Any, served: Path, version: str
) -> None:
    (served / "a").write_bytes(b"old")
    for strict in ("on", "off"):
        server = start("explicit", f"--tls-strict-eof={strict}")
        ftp = secure(server, version)
        data = ftp.transfercmd("STOR a")
        data.sendall(b"new")
        data.shutdown(socket.SHUT_RDWR)  # a FIN alone
        data.close()
        answer = last_reply(ftp)
        if strict == "on":
            assert answer.startswith("426 ")
            assert (served / "a").read_bytes() == b"old"
        else:
            assert answer.startswith("226 ")
            assert (served / "a").read_bytes() == b"new"
            assert "close_notify" in server.log()
            assert "--tls-strict-eof off" in server.log()


@both_versions
def test_what_comes_behind_close_notify_neither_counts_nor_cuts(
    start: Any, secure: Any, served: Path, version: str
) -> None:
    server = start("explicit")
    for size in (100, 16384, 3 * 16384 + 5):
        ftp = secure(server, version)
        ftp.voidcmd("TYPE I")
        inside = ssl.MemoryBIO(), ssl.MemoryBIO()
        host, port = ftplib.parse229(reply(ftp, "EPSV"), ftp.sock.getpeername())
        with socket.create_connection((host, port), timeout=30) as raw:
            assert reply(ftp, "STOR a")[:4] in {"125 ", "150 "}
            tls = ftp.context.wrap_bio(*inside, server_hostname=HOST)
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    raw.sendall(inside[1].read())
                    inside[0].write(raw.recv(65536))
            tls.write(bytes(size))
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.unwrap()
            raw.sendall(inside[1].read() + bytes(40_000))  # all of it in one piece
            assert last_reply(ftp).startswith("226 ")
        assert (served / "a").read_bytes() == bytes(size)


# --- other programs


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("mode", ["explicit", "implicit", "required"])
@pytest.mark.parametrize("program", ["curl", "lftp"])
def test_other_programs_work_in_every_mode_and_resume(
    start: Any, ca: Path, tmp_path: Path, served: Path, mode: str, program: str
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    data = os.urandom(100_000)
    (tmp_path / "sent").write_bytes(data)
    host, port = start(mode, "--require-tls-reuse").address
    url = f"{'ftps' if mode == 'implicit' else 'ftp'}://{host}:{port}"
    if program == "curl":
        # With TLS 1.3 curl uses a ticket once, and after an upload may have no other one.
        secured = ["-sS", "--ssl-reqd", "--cacert", str(ca), "--tls-max", "1.2"]
        put, get = ["-T", str(tmp_path / "sent"), f"{url}/a"], ["-o", str(tmp_path / "got"), f"{url}/a"]
        done = run("curl", *secured, *put, "--next", *secured, *get)
    else:
        script = (
            f"set net:max-retries 1; set ftp:ssl-force yes; set ftp:ssl-allow-anonymous yes;"
            f" set ftp:ssl-protect-data yes; set ssl:ca-file {ca};"
            f" open {url}; put {tmp_path}/sent -o a; get a -o {tmp_path}/got; cls -1"
        )
        done = run("lftp", "-c", script)
    assert done.returncode == 0, done.stderr
    assert (served / "a").read_bytes() == data
    assert (tmp_path / "got").read_bytes() == data
