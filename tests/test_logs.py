"""The log: whoever serves waits for nobody who reads it, and nothing is lost that there is room for."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.logs import MOST_WAITING, written_by_a_thread
from tests.certificates import write_certificate
from tests.conftest import LISTENING, connect, program_environment, reply, wait_until

PIPE = 2**16
logger = logging.getLogger("ftpvfs.test")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_log_that_nobody_reads_keeps_no_client_waiting_and_is_complete_at_the_end(
    tmp_path: Path, workers: str
) -> None:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "ftpvfs", str(tmp_path), "--addr", "127.0.0.1:0", "-vv", "--workers", workers]
    with subprocess.Popen(
        command, env=program_environment(), stdout=subprocess.PIPE, stderr=writer, text=True, cwd=tmp_path
    ) as process:
        os.close(writer)
        assert process.stdout is not None
        listening = LISTENING.fullmatch(process.stdout.readline().rstrip("\n"))
        assert listening is not None
        last = 2 * PIPE // 1000
        for number in range(last + 1):
            with connect(("127.0.0.1", int(listening["port"]))) as ftp:
                assert reply(ftp, f"SIZE {'x' * 1000}-{number}").startswith("5")
        process.send_signal(signal.SIGTERM)
        with open(reader, errors="replace") as log:
            said = log.read()
        assert process.wait(60) == 0
    assert all(f"SIZE {'x' * 1000}-{number}\n" in said for number in range(last + 1))


class Blocked(logging.Handler):
    """A log that takes nothing until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self.written: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert self.may_go_on.wait(60)
        self.written.append(record.getMessage())


@pytest.fixture
def blocked() -> Iterator[Blocked]:
    root, handler = logging.getLogger(), Blocked()
    before = root.handlers[:]
    root.handlers[:] = [handler]
    yield handler
    handler.may_go_on.set()
    root.handlers[:] = before


def test_what_there_is_no_room_for_is_dropped_and_counted(blocked: Blocked) -> None:
    with written_by_a_thread():
        for number in range(MOST_WAITING + 100):
            logger.warning("entry %d", number)
        blocked.may_go_on.set()
        wait_until(lambda: any("entries are missing here" in text for text in blocked.written))
        logger.warning("goes on")
    [missing] = [text for text in blocked.written if "are missing" in text]
    kept = [text for text in blocked.written if text.startswith("entry")]
    assert int(missing.split()[0]) == MOST_WAITING + 100 - len(kept)
    assert blocked.written[-1] == "goes on"


def test_an_entry_says_what_was_so_when_it_was_made(blocked: Blocked) -> None:
    changing = ["before"]
    with written_by_a_thread():
        logger.warning("%s", changing)
        changing[0] = "after"
        blocked.may_go_on.set()
    assert blocked.written == ["['before']"]


def test_a_log_file_that_is_moved_away_is_begun_anew(launched: Any, tmp_path: Path) -> None:
    log, moved = tmp_path / "log", tmp_path / "log.1"
    server = launched(str(tmp_path), "--log-file", str(log), "--log-format", "json", "-vv", "--workers", "1")
    connect(server.address).close()
    wait_until(lambda: "PASS" in log.read_text())
    log.rename(moved)
    with connect(server.address) as ftp:
        reply(ftp, "SIZE of-something")
    assert server.stop() == 0
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("of-something" in entry["msg"] for entry in entries)
    assert entries[-1]["msg"] == "stopped by a signal"


def test_no_password_is_logged_whatever_stands_before_it(launched: Any, tmp_path: Path) -> None:
    server = launched(str(tmp_path), "-vv", "--workers", "1")
    lines = (b"PASS hunter2", b" PASS hunter2", b"\xff\xf4PASS hunter2", b"pass\thunter2", b"x  xPass hunter2 hunter2")
    with socket.create_connection(server.address, timeout=30) as client:
        client.sendall(b"".join(line + b"\r\n" for line in lines) + b"NOOP the-end\r\nQUIT\r\n")
        while client.recv(10_000):
            pass
    assert server.stop() == 0
    assert "the-end" in server.log()
    assert server.log().count("******") == len(lines)
    assert "hunter2" not in server.log()


def test_the_log_does_not_say_that_a_broken_certificate_was_read(launched: Any, tmp_path: Path) -> None:
    cert = write_certificate(tmp_path / "cert.pem")
    server = launched(str(tmp_path), "--cert", str(cert), "-v", "--workers", "1")
    cert.write_text("no certificate")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "all cached listings forgotten" in server.log())
    assert "the certificate in use stays" in server.log()
    assert "certificates read again" not in server.log()
