"""The check of all downloads finds what it is for; and no test downloads without it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyftpdlib.handlers import FTPHandler

from tests.conftest import ROOT, Store, connect, download, last_reply, open_transfer
from tests.downloads import WATCH, WrongDownload
from tests.servers import HOST

DATA = os.urandom(300_000)
Serve = Callable[..., tuple[str, int]]


@pytest.fixture
def wrong() -> Iterator[list[str]]:
    """What is reported, which does not fail this test."""
    yield WATCH.wrong
    WATCH.wrong.clear()


def cutting(change: Callable[[bytes], bytes]) -> type[FTPHandler]:
    """A server that answers 226 after other bytes than the file's."""

    class Handler(FTPHandler):  # type: ignore[misc]
        def ftp_RETR(self, file: str) -> str:
            with contextlib.closing(self.fs.open(file, "rb")) as opened:
                self.push_dtp_data(change(opened.read(len(DATA))), cmd="RETR")
            return file

    return Handler


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-1], "brought 299999 bytes; the file has 300000"),
        (lambda data: b"", "brought 0 bytes; the file has 300000"),
        (lambda data: data + b"x", "brought 300001 bytes"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "other bytes than the store has"),
    ],
)
@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_other_bytes_than_the_files_are_found(
    store: Store, ftp_server: Serve, wrong: list[str], change: Any, reason: str
) -> None:
    store.write("a", DATA)
    with connect(ftp_server(store, handler=cutting(change))) as ftp:
        with pytest.raises(WrongDownload, match=reason):
            download(ftp, "a")
        assert len(wrong) == 1
        with open_transfer(ftp, "RETR a") as data, data.makefile("rb") as down:
            down.read()
        with pytest.raises(WrongDownload, match=reason):
            last_reply(ftp)


@pytest.mark.parametrize("mode", ["off", "full"])
@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_the_files_own_bytes_are_counted_and_compared(store: Store, ftp_server: Serve, mode: str) -> None:
    store.write("a", DATA)
    counted, compared = WATCH.counted, WATCH.compared
    with connect(ftp_server(store, cache_mode=mode)) as ftp:
        assert download(ftp, "a") == DATA
        assert download(ftp, "a", rest=100_000) == DATA[100_000:]
    assert WATCH.counted - counted == 4  # by the client and by the server
    assert WATCH.compared - compared == 2


def test_a_file_that_is_replaced_after_it_was_opened_is_not_compared(local_store: Store, ftp_server: Serve) -> None:
    local_store.write("a", DATA)
    with connect(ftp_server(local_store)) as ftp:
        with open_transfer(ftp, "RETR a") as data, data.makefile("rb") as down:
            assert down.read() == DATA
            local_store.write("b", b"x" * len(DATA))
            os.rename(local_store.path("b"), local_store.path("a"))
        assert last_reply(ftp).startswith("226")


def test_the_servers_own_count_is_compared(local_store: Store, ftp_server: Serve, wrong: list[str]) -> None:
    """As for whoever downloads without a client that counts."""

    class Handler(cutting(lambda data: data)):  # type: ignore[misc]
        def ftp_RETR(self, file: str) -> Any:
            super().ftp_RETR(file)
            self.log_transfer(
                cmd="RETR", filename=file, receive=False, completed=True, elapsed=0.0, bytes=len(DATA) - 1
            )
            return file

    local_store.write("a", DATA)
    with connect(ftp_server(local_store, handler=Handler)) as ftp:
        download(ftp, "a")
    assert wrong == ["RETR /a was answered 226 after 299999 bytes; the version has 300000 behind offset 0"]


@pytest.fixture
def lying() -> Iterator[tuple[str, int]]:
    """A server that is none of this process's, and sends half of what it says that the file has."""
    answers = {
        "USER": "331 word?", "PASS": "230 in", "TYPE": "200 so", "RETR": "150 here", "SIZE": "213 10",
        "QUIT": "221 bye",
    }  # fmt: skip

    def serve() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as control, socket.create_server((HOST, 0)) as data:
            control.sendall(b"220 ready\r\n")
            for line in control.makefile():
                verb = line.split()[0]
                answer = answers.get(verb, f"229 (|||{data.getsockname()[1]}|)")
                control.sendall(f"{answer}\r\n".encode())
                if verb == "RETR":
                    with data.accept()[0] as connection:
                        connection.sendall(b"01234")
                    control.sendall(b"226 done\r\n")

    with socket.create_server((HOST, 0)) as listener:
        listener.settimeout(30)
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()
        thread.join()


def test_a_launched_server_is_asked_for_the_size(lying: tuple[str, int], wrong: list[str]) -> None:
    with connect(lying) as ftp:
        ftp.af = socket.AF_INET6  # EPSV
        with pytest.raises(WrongDownload, match="brought 5 bytes; the file has 10"):
            download(ftp, "a")


def test_all_clients_of_tests_check_their_downloads() -> None:
    """A client of ftplib's own would be left out. One in a program that a test starts is none of the tests'."""
    home = Path(__file__).with_name("downloads.py")
    made = re.compile(r"^(?!ftp = )(?!.*isinstance).*\bftplib\.FTP(_TLS)?[(,)]", re.MULTILINE)
    found = [
        f"{path.relative_to(ROOT)}: {match[0].strip()}"
        for path in sorted(Path(__file__).parent.rglob("*.py"))
        if path != home
        for match in made.finditer(path.read_text())
        if re.search(r"FTP(_TLS)?\(|class .*FTP(_TLS)?\)", match[0])
    ]
    assert found == []
