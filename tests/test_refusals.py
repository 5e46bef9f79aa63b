"""What is refused leaves a line in the log at the default level, which no client can forge."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import write_certificate
from tests.conftest import HOST, connect, last_reply, open_transfer, reply, upload, wait_until
from tests.servers import free_ports, reset

LOGIN = re.compile(r"^\S+ \S+ WARNING: login refused: address=(\S+) user=(.+) reply=(.+)$", re.M)
TRANSFER = re.compile(
    r"^\S+ \S+ WARNING: transfer refused: address=(\S+) user=(.+) command=(\S+) path=(.+) reply=(.+)$", re.M
)


@pytest.fixture
def served(tmp_path: Path) -> Path:
    served = tmp_path / "served"
    served.mkdir()
    return served


def told(server: Any, form: re.Pattern[str]) -> Any:
    """The one entry of that form, once it is written."""
    [entry] = wait_until(lambda: form.findall(server.log()))
    return entry


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_wrong_password_is_a_warning_with_the_address(launched: Any, served: Path, workers: str) -> None:
    server = launched(str(served), "--user", "alice", "--pass", "hunter2", "--workers", workers)
    with pytest.raises(Exception, match="530"):
        connect(server.address, "alice", "hunter1")
    address, user, said = told(server, LOGIN)
    assert (address, user) == (HOST, "'alice'")
    assert said.startswith("'530 ")
    assert "hunter" not in server.log()
    assert server.log().count("\n") == 1  # and this is all that is said of it


def test_every_way_to_be_refused_a_login_is_a_warning(launched: Any, served: Path, tmp_path: Path) -> None:
    ini = tmp_path / "ftpvfs.ini"
    ini.write_text("[user:alice]\npassword = a\nmax_cons = 1\n")
    server = launched(str(served), "--config", str(ini), "--workers", "1", "--ban-after", "2")
    with connect(server.address, "alice", "a"):
        with pytest.raises(Exception, match="530 Too many sessions of this user"):
            connect(server.address, "alice", "a")
        assert told(server, LOGIN) == (HOST, "'alice'", "'530 Too many sessions of this user.'")
        for _ in range(2):
            with pytest.raises(Exception, match=r"530|421"):
                connect(server.address, "mallory", "x")
    wait_until(lambda: len(LOGIN.findall(server.log())) >= 3)
    assert {user for _, user, _ in LOGIN.findall(server.log())} == {"'alice'", "'mallory'"}


def test_a_login_without_the_tls_that_is_required_is_a_warning(launched: Any, served: Path, tmp_path: Path) -> None:
    cert = write_certificate(tmp_path / "cert.pem")
    server = launched(str(served), "--cert", str(cert), "--tls-mode", "required", "--workers", "1")
    with pytest.raises(Exception, match="530"):
        connect(server.address, "alice")
    assert told(server, LOGIN)[1] == "'alice'"


@pytest.mark.parametrize(
    ("command", "path", "said"),
    [
        ("STOR new", "/new", "Not enough privileges"),
        ("STOR a/new", "/a/new", "Not enough privileges"),
        ("APPE old", "/old", "Not enough privileges"),
        ("RETR none", "/none", "No such file or directory"),
        ("RETR \u2603 none", "/\u2603 none", "No such file or directory"),
    ],
)
def test_a_refused_transfer_says_who_what_and_why(
    launched: Any, served: Path, command: str, path: str, said: str
) -> None:
    server = launched(str(served), "--read-only", "--user", "alice", "--pass", "x", "--workers", "1")
    with connect(server.address, "alice", "x") as ftp:
        ftp.makepasv()
        assert reply(ftp, command).startswith("550")
    address, user, verb, where, why = told(server, TRANSFER)
    assert (address, user, verb, where) == (HOST, "'alice'", command.split()[0], repr(path))
    assert said in why


def test_a_transfer_without_a_data_connection_or_a_login_is_told(launched: Any, served: Path) -> None:
    server = launched(str(served), "--workers", "1")
    with connect(server.address) as ftp:
        assert reply(ftp, "STOR a").startswith("425")
    assert told(server, TRANSFER)[2:4] == ("STOR", "'/a'")
    with socket.create_connection(server.address, timeout=30) as client:
        client.sendall(b"STOR b\r\nQUIT\r\n")
        while client.recv(10_000):
            pass
    wait_until(lambda: "command=STOR path='b' reply='530" in server.log())


def test_an_upload_that_its_store_cannot_take_says_why(launched: Any, tmp_path: Path) -> None:
    [nobody] = free_ports(1)
    options = [f"--option=endpoint_url=http://{HOST}:{nobody}", "--option=key=k", "--option=secret=s"]
    server = launched("s3://bucket", *options, "--low-level-retries", "1", "--workers", "1")
    with connect(server.address) as ftp, contextlib.suppress(Exception):
        upload(ftp, "a", b"x")
    address, user, verb, path, why = told(server, TRANSFER)
    assert (address, user, verb, path) == (HOST, "'anonymous'", "STOR", "'/a'")
    assert re.match(r"'45\d .+", why)


def test_an_upload_that_breaks_off_is_told_whether_or_not_its_client_is_there(launched: Any, served: Path) -> None:
    server = launched(str(served), "--workers", "1")
    with connect(server.address) as ftp:
        data = open_transfer(ftp, "STOR a")
        data.sendall(b"x" * 1000)
        reset(data)
        assert last_reply(ftp).startswith("426")
    assert told(server, TRANSFER)[2:4] == ("STOR", "'/a'")
    ftp = connect(server.address)
    data = open_transfer(ftp, "STOR b")
    data.sendall(b"x" * 1000)
    reset(ftp.sock)
    data.close()
    ftp.file.close()
    wait_until(lambda: re.search(r"command=STOR path='/b' reply='426 The client is gone", server.log()))


def test_what_the_client_calls_off_itself_and_what_succeeds_is_no_refusal(launched: Any, served: Path) -> None:
    server = launched(str(served), "--workers", "1")
    with connect(server.address) as ftp:
        upload(ftp, "a", b"x")
        data = open_transfer(ftp, "STOR b")
        data.sendall(b"x")
        assert reply(ftp, "ABOR").startswith("426")
        assert last_reply(ftp).startswith("226")
        data.close()
        assert reply(ftp, "SIZE none").startswith("550")
    assert server.stop() == 0
    assert server.log() == ""


EVIL = "x\x1b[2J\x9b\u202e' reply='226 ok' address=203.0.113.9"


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_name_forges_an_entry(launched: Any, served: Path, form: str) -> None:
    server = launched(str(served), "--log-format", form, "--user", "alice", "--pass", "x", "--workers", "1")
    with connect(server.address, "alice", "x") as ftp:
        ftp.makepasv()
        assert reply(ftp, f"RETR {EVIL}").startswith("550")
        ftp.makepasv()
        assert reply(ftp, "RETR \udcff").startswith("550")
    with pytest.raises(Exception, match="530"):
        connect(server.address, EVIL, "x")
    wait_until(lambda: server.log().count(" refused: ") == 3)
    lines = server.log().splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.isprintable()
        assert re.search(rf"refused: address={HOST} user=", line)
        assert line.index("refused: address=") < line.index("203.0.113.9") if "203" in line else True
