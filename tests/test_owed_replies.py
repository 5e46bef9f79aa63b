"""Whatever fails between a command and the end of its transfer: one final reply, and a true one."""

from __future__ import annotations

import contextlib
import errno
import ftplib
import functools
import inspect
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ftpvfs import VFSHandler
from ftpvfs.cache.downloader import Reader
from ftpvfs.server.commands import Commands
from ftpvfs.server.dispatch import VFSPassiveDTP
from ftpvfs.server.limits import Limited
from ftpvfs.server.source import FileSource, ViewSource
from ftpvfs.server.transfer import VFSDTPHandler
from ftpvfs.vfs.cached import CachedReadHandle, CachedWriteHandle
from ftpvfs.vfs.handle import FileHandle, Handle, ReadHandle, ReadingHandle, VersionedHandle, WriteHandle, WritingHandle
from ftpvfs.vfs.readahead import ReadAhead
from tests.conftest import Store, connect, last_reply
from tests.servers import HOST

DATA = bytes(range(256)) * 40
# Longer than anything takes on a busy machine, so that nothing but silence is taken for silence.
TIMEOUT = 15
MOST_CALLS = 3
STEPS_OF = [
    VFSHandler, Limited, Commands, VFSDTPHandler, VFSPassiveDTP, FileSource, ViewSource,
    Handle, ReadingHandle, VersionedHandle, ReadHandle, FileHandle, CachedReadHandle,
    WritingHandle, WriteHandle, CachedWriteHandle, ReadAhead, Reader,
]  # fmt: skip
# The two that see to it that whatever fails inside of them is answered.
GUARDS = {"VFSDTPHandler._wake", "VFSDTPHandler.close"}
# What says a reply, or runs what does: where these fail nobody can be told, and the end of the session says so.
SPEAKERS = {
    "Commands.push", "Commands.say", "Commands.initiate_send", "Commands._run_commands", "Commands._run_some",
    "Commands._run_line", "Commands._run_command", "Commands._next_line", "Commands._end_of_line",
    "Commands._continue", "Commands._is_over",
    "Commands.handle_read", "Commands._read_on", "Commands._may_read", "Commands._abort_if_asked", "Commands.decode",
    "Commands._listen_for", "VFSHandler.answer_transfer", "VFSHandler.respond", "VFSHandler.log", "VFSHandler.logline",
    "VFSHandler.pre_process_command", "Limited.pre_process_command",
    "VFSHandler._expects_data", "VFSHandler._on_dtp_close",
}  # fmt: skip


class Faults:
    """All steps, watched: how often each is called, and an error in one call of one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.happened = 0
        self._is_armed = False
        self._step, self._number, self._error = "", 0, RuntimeError()
        for owner in STEPS_OF:
            for name, member in list(vars(owner).items()):
                if inspect.isfunction(member) and not name.startswith("__"):
                    monkeypatch.setattr(owner, name, self._watched(f"{owner.__name__}.{name}", member))

    def _watched(self, step: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def watched(*arguments: Any, **options: Any) -> Any:
            if self._is_armed:
                self.calls[step] += 1
                if step == self._step and self.calls[step] == self._number:
                    self.happened += 1
                    raise self._error
            return original(*arguments, **options)

        return watched

    def plan(self, step: str = "", number: int = 0, error: Exception | None = None) -> None:
        """Let the so-manieth call of a step fail, none without one."""
        self._step, self._number, self._error = step, number, error or RuntimeError()

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        self.calls.clear()
        self._is_armed = True
        try:
            yield
        finally:
            self._is_armed = False


def error_of(kind: str) -> Exception:
    return RuntimeError("a mistake") if kind == "mistake" else OSError(errno.EIO, "the disk failed")


def transfer(ftp: ftplib.FTP, command: str, faults: Faults, *, connects_first: bool) -> tuple[list[str], bytes]:
    """Do one transfer, with the fault in it; return its replies ("" for the end of the session), and what came."""
    where = ftplib.parse229(ftp.sendcmd("EPSV"), (HOST, 0))
    came = b""
    with contextlib.ExitStack() as cleanup:
        data = cleanup.enter_context(socket.create_connection(where, timeout=TIMEOUT)) if connects_first else None
        with faults.armed():
            say(ftp, command)
            replies = [reply_or_end(ftp)]
            if replies[0].startswith("1"):
                with contextlib.suppress(OSError):  # the fault was the listener's
                    data = data or cleanup.enter_context(socket.create_connection(where, timeout=TIMEOUT))
                    if command.startswith("STOR"):
                        data.sendall(DATA)
                        data.shutdown(socket.SHUT_WR)
                replies.append(reply_or_end(ftp))
        with contextlib.suppress(OSError):
            while data and replies[-1].startswith("2") and (piece := data.recv(2**16)):
                came += piece
        if replies[-1]:
            say(ftp, "NOOP")
            while not (said := reply_or_end(ftp)).startswith("200 "):
                replies.append(said)
                if not said:
                    break
    return replies, came


def say(ftp: ftplib.FTP, command: str) -> None:
    assert ftp.sock is not None
    with contextlib.suppress(ConnectionError):
        ftp.sock.sendall(f"{command}\r\n".encode())


def content(vfs: Any, path: str) -> bytes:
    with vfs.open(path, "rb") as file:
        return bytes(file.read())


def reply_or_end(ftp: ftplib.FTP) -> str:
    try:
        return last_reply(ftp)
    except (EOFError, ConnectionError):
        return ""


@pytest.mark.parametrize(("kind", "connects_first"), [("mistake", True), ("disk", False)])
@pytest.mark.parametrize(
    ("mode", "command"), [("off", "RETR a"), ("off", "STOR b"), ("off", "NLST"), ("full", "RETR a"), ("full", "STOR b")]
)
# A socket whose very closing was made to fail is closed by the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_each_step_may_fail_and_there_is_one_reply(
    s3_store: Store,
    make_vfs: Callable[..., Any],
    ftp_server: Callable[..., tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    command: str,
    connects_first: bool,
    kind: str,
) -> None:
    s3_store.write("a", DATA)
    vfs = make_vfs(s3_store, cache_mode=mode)
    faults = Faults(monkeypatch)
    caplog.set_level(logging.CRITICAL)  # a traceback for each
    wrong = []
    with contextlib.ExitStack() as sessions:
        address = ftp_server(vfs)

        def session() -> ftplib.FTP:
            return sessions.enter_context(connect(address, timeout=TIMEOUT))

        ftp = session()
        called: Counter[str] = Counter()
        for _ in range(2):  # what a first transfer finds in no cache, and what a second one finds there
            replies, _ = transfer(ftp, command, faults, connects_first=connects_first)
            assert replies[-1].startswith("226 ")
            called |= faults.calls
        for step, count in sorted(called.items()):
            if step in GUARDS:
                continue
            for number in range(1, min(count, MOST_CALLS) + 1):
                faults.plan(step, number, error_of(kind))
                try:
                    replies, came = transfer(ftp, command, faults, connects_first=connects_first)
                except TimeoutError:
                    replies, came = ["no reply"], b""
                faults.plan()
                codes = [reply[:1] for reply in replies if reply]
                has_ended = codes != [reply[:1] for reply in replies] or codes == ["n"]
                if has_ended:
                    ftp = session()
                is_answered = codes in (["1", "2"], ["1", "4"], ["1", "5"], ["4"], ["5"])
                if not is_answered and not (has_ended and step in SPEAKERS):
                    wrong.append((step, number, replies))
                elif codes[-1:] == ["2"] and not is_true(vfs, command, came):
                    wrong.append((step, number, "226 is not true"))
    assert not wrong
    assert faults.happened > 20


def is_true(vfs: Any, command: str, came: bytes) -> bool:
    """Tell whether the file went over whole."""
    if command.startswith("RETR"):
        return came == DATA
    return not command.startswith("STOR") or content(vfs, "b") == DATA
