"""226 after a download means that many bytes, and those: seen to for every download of every test.

Two look at each. The clients here, which all tests use that speak FTP by Python's `ftplib`, count and hash what comes
over a data connection; a download that is read to its end and answered 226 must have brought

- as many bytes as the version that the server opened has behind the offset of REST: of a server in this process that
  version is known (`Watch`), a launched one is asked with SIZE;
- those bytes: where a server of this process serves a `Store` that a test looks into, the object is read there, past
  the server and its proxies, and compared, unless it is another version by now, or the file waits in the cache.

And for whoever else downloads from a server of this process (curl, lftp, rclone, sockets of a test's own) the bytes
that the server says to have sent are compared with the version's size less the offset. ASCII type, which changes the
number of bytes, and listings are left out. What is wrong is raised in the client, and fails the test in any case.
"""

from __future__ import annotations

import ftplib
import hashlib
import re
import socket
import ssl
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

# What ends a transfer (RFC 959, section 5.4: RETR). A command that is refused while one runs ends nothing.
ENDS = {"226", "250", "425", "426", "450", "451", "522", "550", "551", "552", "554"}
# Larger objects are not read a second time.
MOST_COMPARED = 64 * 2**20


class WrongDownload(AssertionError):
    """A download was answered 226 that is not the file."""


# -- the server's side


@dataclass
class Opened:
    """A file that a session of a server in this process has opened for reading."""

    vfs: Any
    handle: Any
    offset: int = 0
    is_text: bool = False

    @property
    def length(self) -> int:
        """How many bytes the client is to get of the version that is sent."""
        return max(0, int(self.handle.size) - self.offset)


@dataclass
class Watch:
    """What is known of the servers in this process, and what was wrong. Any thread."""

    # By the client's port.
    opened: dict[int, Opened] = field(default_factory=dict)
    # The `Store` that a VFS serves.
    stores: weakref.WeakKeyDictionary[Any, Any] = field(default_factory=weakref.WeakKeyDictionary)
    wrong: list[str] = field(default_factory=list)
    # How many downloads were looked at, and of how many the bytes.
    counted: int = 0
    compared: int = 0

    def report(self, text: str) -> WrongDownload:
        self.wrong.append(text)
        return WrongDownload(text)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch all servers in this process."""
        from pyftpdlib.handlers import FTPHandler

        from ftpvfs import VFSFilesystem

        process, log_transfer, open_file = FTPHandler.process_command, FTPHandler.log_transfer, VFSFilesystem.open

        def watched_command(session: Any, cmd: str, *arguments: Any, **keywords: Any) -> Any:
            if cmd == "RETR":
                self.opened.pop(session.remote_port, None)
                session.watched_offset = session._restart_position  # noqa: SLF001 - pyftpdlib tells it nobody
            return process(session, cmd, *arguments, **keywords)

        def watched_open(filesystem: Any, filename: str, mode: str, *more: Any, **keywords: Any) -> Any:
            handle = open_file(filesystem, filename, mode, *more, **keywords)
            session = filesystem.cmd_channel
            if mode == "rb" and hasattr(session, "watched_offset"):
                is_text = session._current_type == "a"  # noqa: SLF001
                self.opened[session.remote_port] = Opened(filesystem.vfs, handle, session.watched_offset, is_text)
            return handle

        def watched_log(
            session: Any, cmd: str, filename: str, receive: bool, completed: bool, elapsed: float, bytes: int  # noqa: A002
        ) -> None:
            opened = self.opened.get(session.remote_port)
            if opened is not None and completed and not receive and not opened.is_text:
                self.counted += 1
                if bytes != opened.length:
                    self.report(
                        f"RETR {filename} was answered 226 after {bytes} bytes; the version has {opened.length} behind"
                        f" offset {opened.offset}"
                    )
            log_transfer(session, cmd, filename, receive, completed, elapsed, bytes)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FTPHandler, "process_command", watched_command)
            patch.setattr(FTPHandler, "log_transfer", watched_log)
            patch.setattr(VFSFilesystem, "open", watched_open)
            yield


WATCH = Watch()


# -- the client's side


class _Counting:
    """A socket that counts and hashes what it receives."""

    received = 0
    has_ended = False
    _hash: Any = None

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        data: bytes = super().recv(size, flags)  # type: ignore[misc]
        self._came(data, size, flags)
        return data

    def recv_into(self, buffer: Any, size: int | None = None, flags: int = 0) -> int:
        count: int = super().recv_into(buffer, size or 0, flags)  # type: ignore[misc]
        self._came(memoryview(buffer)[:count], len(buffer), flags)
        return count

    def digest(self) -> bytes:
        return b"" if self._hash is None else bytes(self._hash.digest())

    def _came(self, data: bytes | memoryview, size: int, flags: int) -> None:
        if flags & socket.MSG_PEEK or not size:
            return
        if self._hash is None:
            self._hash = hashlib.blake2b()
        self._hash.update(data)
        self.received += len(data)
        self.has_ended = self.has_ended or not len(data)


class _CountingSocket(_Counting, socket.socket):
    pass


class _CountingTLS(_Counting, ssl.SSLSocket):
    pass


@dataclass
class _Download:
    path: str
    offset: int
    is_text: bool
    data: _Counting


class _Checked:
    """What makes an `ftplib.FTP` check its downloads."""

    # Whether a launched server is asked for the size of what has come; not where others change the file meanwhile.
    asks_size = True

    _is_text = True  # RFC 959, section 5.1: ASCII is the default
    _download: _Download | None = None

    def note(self, line: str) -> None:
        """Take note of a command that is sent past `putcmd`."""
        match = re.match(r"TYPE ([AI])", line, re.IGNORECASE)
        if match is not None:
            self._is_text = match[1].upper() == "A"

    def putcmd(self, line: str) -> None:
        self.note(line)
        super().putcmd(line)  # type: ignore[misc]

    def open_data(self, cmd: str, rest: Any = None) -> Any:
        """Begin a transfer as ftplib's `ntransfercmd` does: for who needs to do it otherwise."""
        return super().ntransfercmd(cmd, rest)  # type: ignore[misc]

    def ntransfercmd(self, cmd: str, rest: Any = None) -> Any:
        conn, size = self.open_data(cmd, rest)
        if not isinstance(conn, _Counting):
            timeout = conn.gettimeout()
            conn = _CountingSocket(conn.family, conn.type, conn.proto, fileno=conn.detach())
            conn.settimeout(timeout)
        verb, _, path = cmd.partition(" ")
        if verb == "RETR":
            self._download = _Download(path, int(rest or 0), self._is_text, conn)
        return conn, size

    def getresp(self) -> str:
        try:
            reply: str = super().getresp()  # type: ignore[misc]
        except ftplib.Error as error:
            self._heard(str(error)[:3])
            raise
        self._heard(reply[:3])
        return reply

    def _heard(self, code: str) -> None:
        download = self._download
        if download is not None and code in ENDS:
            self._download = None
            if code == "226" and download.data.has_ended and not download.is_text:
                self._check(download)

    def _check(self, download: _Download) -> None:
        opened = WATCH.opened.get(self.sock.getsockname()[1])  # type: ignore[attr-defined]
        length = opened.length if opened is not None else self._length(download)
        if length is None:
            return
        WATCH.counted += 1
        if download.data.received != length:
            raise WATCH.report(
                f"RETR {download.path} was answered 226 and brought {download.data.received} bytes; the file has"
                f" {length} behind offset {download.offset}"
            )
        expected = None if opened is None else _at_store(opened)
        if expected is not None:
            WATCH.compared += 1
            if download.data.digest() != hashlib.blake2b(expected).digest() and _is_that_version(opened):
                raise WATCH.report(f"RETR {download.path} was answered 226 and brought other bytes than the store has")

    def _length(self, download: _Download) -> int | None:
        """Ask a launched server how much there is; None where it does not say."""
        if not self.asks_size:
            return None
        with suppress(ftplib.Error):
            answer: str = self.sendcmd(f"SIZE {download.path}")  # type: ignore[attr-defined]
            return max(0, int(answer[4:]) - download.offset)
        return None


class Client(_Checked, ftplib.FTP):
    """Python's client, which checks its downloads."""


class TLSClient(_Checked, ftplib.FTP_TLS):
    """The same over TLS."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.context.sslsocket_class = _CountingTLS


def _at_store(opened: Opened) -> bytes | None:
    """Return what a download should have brought, read at the store; None where that cannot tell."""
    store = WATCH.stores.get(opened.vfs)
    if store is None or opened.length > MOST_COMPARED or getattr(store.server, "is_silent", False):
        return None
    with suppress(OSError):
        return bytes(store.bytes_of(opened.handle.path)[opened.offset :])
    return None


def _is_that_version(opened: Opened) -> bool:
    """Tell whether the store has the version still that was opened."""
    from ftpvfs.backend.backend import Tuning, open_backend
    from ftpvfs.vfs.pending import is_local

    if is_local(opened.handle.entry):  # it waits in the cache; the store, which may be silent, need not be asked
        return False
    store = WATCH.stores[opened.vfs]
    backend = open_backend(store.url, store.storage_options, Tuning())
    try:
        return bool(backend.stat(opened.handle.path).fingerprint == opened.handle.entry.fingerprint)
    except FileNotFoundError:
        return False
    finally:
        backend.close()
