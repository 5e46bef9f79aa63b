"""Data connections that tell a finished upload from a broken one, and answer the truth, once, about each transfer.

pyftpdlib closes a file alike after success, ABOR, a time-out and a reset, takes a TCP reset and a TLS connection cut short
for the end of an upload, and says nothing at all when closing the file fails. Here an upload is complete only after a clean
end: a FIN on a plain connection, close_notify on a TLS one, with the control connection still there. Then the file is
committed, and only then 226 is sent; everything else gives the file up and says why.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from typing import Any

from OpenSSL import SSL
from pyftpdlib.exceptions import _FileReadWriteError, _RetryError
from pyftpdlib.handlers import DTPHandler, TLS_DTPHandler
from pyftpdlib.handlers.ftp.producers import FileProducer
from pyftpdlib.ioloop import _ERRNOS_RETRY
from pyftpdlib.utils import is_ssl_sock

from ftpvfs.errors import reason_of

logger = logging.getLogger(__name__)

# pyftpdlib moves 64 KiB a step; four times that is measurably faster, more is not.
STEP = 256 * 1024
# What the client hears when a transfer failed for a reason of the store's (RFC 959, section 5.4: STOR, RETR).
NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}


class VFSDTPHandler(DTPHandler):  # type: ignore[misc]
    """A data connection for files of a `VFSFilesystem`. Runs on the session's event loop."""

    # Tells the filesystem that `commit` is called, so that closing alone need not publish.
    commits = True
    ac_in_buffer_size = STEP
    ac_out_buffer_size = STEP

    # --- uploads

    def handle_read(self) -> None:
        """Take what has arrived; an empty read is the clean end."""
        try:
            chunk = self.recv(self.ac_in_buffer_size)
        except _RetryError:
            return
        except OSError as error:
            self._break_off(f"Connection lost ({reason_of(error)})")
            return
        if not chunk:
            self._end_upload()
            return
        self.tot_bytes_received += len(chunk)
        if self._data_wrapper is not None:
            chunk = self._data_wrapper(chunk)
        self.file_obj.write(chunk)

    handle_read_event = handle_read

    def recv(self, buffer_size: int) -> bytes:
        """Return what has arrived, empty at a clean end. Raises OSError where the connection broke."""
        try:
            return self.socket.recv(buffer_size)  # type: ignore[no-any-return]
        except OSError as error:
            if error.errno in _ERRNOS_RETRY:
                raise _RetryError from error
            raise

    def _end_upload(self) -> None:
        if not self.receive:  # the client closed the connection of a download or listing
            self.handle_close()
        elif not is_alive(self.cmd_channel):
            self._break_off("The control connection is gone")
        else:
            self._commit()

    def _commit(self) -> None:
        """Publish the file; the reply says what came of it."""
        try:
            if self._had_cr:  # pyftpdlib keeps a CR back to see whether an LF follows, and forgets the last one
                self.file_obj.write(b"\r")
            commit = getattr(self.file_obj, "commit", self.file_obj.close)
            commit()
        except OSError as error:
            self._resp = (failure_reply(error), logger.warning)
        else:
            self.transfer_finished = True
            self._resp = ("226 Transfer complete.", logger.debug)
        self.close()

    def _break_off(self, reason: str) -> None:
        self._resp = (f"426 {reason}; transfer aborted.", logger.info)
        self.close()

    # --- downloads

    def push_with_producer(self, producer: Any) -> None:
        """Send a file without copying its bytes, unless ASCII type rewrites them."""
        if isinstance(producer, FileProducer) and producer.type == "i" and hasattr(producer.file, "take"):
            if not self.use_sendfile():
                producer = ViewProducer(producer.file, self.ac_out_buffer_size)
        super().push_with_producer(producer)

    def handle_close(self) -> None:
        """Called when all is sent, or when the connection broke; never the end of an upload."""
        if self._closed:
            return
        if self.receive or self.producer_fifo:
            self._break_off(f"Connection lost after {self.get_transmitted_bytes()} bytes")
            return
        try:
            if hasattr(self.file_obj, "verify"):
                self.file_obj.verify()
        except OSError as error:
            self._resp = (failure_reply(error), logger.warning)
        else:
            self.transfer_finished = True
            self._resp = ("226 Transfer complete.", logger.debug)
        self.close()

    # --- ends

    def handle_error(self) -> None:
        """Answer an exception of the transfer with its reason."""
        try:
            raise  # noqa: PLE0704 - pyftpdlib calls this from inside an except block
        except _FileReadWriteError as error:
            cause = error.__cause__
            known = cause if isinstance(cause, OSError) else error
            self._resp = (failure_reply(known), logger.warning)
        except OSError as error:
            self._resp = (failure_reply(error), logger.warning)
        except Exception:
            self.log_exception(self)
            self._resp = ("451 Internal error; transfer aborted.", logger.warning)
        self.close()

    def close(self) -> None:
        """Give up what was not committed, then answer."""
        if not self._closed and self.file_obj is not None and not self.file_obj.closed:
            try:
                self.file_obj.close()
            except OSError as error:
                logger.warning("closing %r: %s", self.file_obj.name, error)
        super().close()


class TLS_VFSDTPHandler(TLS_DTPHandler, VFSDTPHandler):  # type: ignore[misc]
    """The same over TLS, where only close_notify ends an upload: a connection that merely stops may have been cut."""

    def recv(self, buffer_size: int) -> bytes:
        """Return what has arrived, empty after close_notify. Raises OSError where the connection broke."""
        if not is_ssl_sock(self.socket):
            return VFSDTPHandler.recv(self, buffer_size)
        try:
            return self.socket.recv(buffer_size)  # type: ignore[no-any-return]
        except SSL.WantReadError as error:
            self._ssl_want_read = True
            raise _RetryError from error
        except SSL.WantWriteError as error:
            self._ssl_want_write = True
            raise _RetryError from error
        except SSL.ZeroReturnError:
            return b""
        except SSL.Error as error:
            self._error = True  # nothing more can be said on this connection
            raise ConnectionResetError(errno.ECONNRESET, "TLS ended without close_notify") from error

    def handle_close(self) -> None:
        VFSDTPHandler.handle_close(self)

    def handle_error(self) -> None:
        self._error = True
        VFSDTPHandler.handle_error(self)


class ViewProducer:
    """A file's bytes for pyftpdlib's asynchat, as views into the read-ahead's buffers."""

    def __init__(self, file: Any, step: int) -> None:
        self._file = file
        self._step = step

    def more(self) -> memoryview:
        """Return the next bytes, none at the end."""
        return self._file.take(self._step)  # type: ignore[no-any-return]


def failure_reply(error: OSError) -> str:
    """Return the reply for a transfer that failed."""
    code = 552 if error.errno in NO_SPACE else 451
    return f"{code} {reason_of(error)}; transfer aborted."


def is_alive(cmd_channel: Any) -> bool:
    """Tell whether the client still holds its control connection open.

    A client that is killed closes both connections with a FIN, which on the data connection alone looks like the end of
    the file (users.md, row 1).
    """
    if cmd_channel._closed or not cmd_channel.connected:
        return False
    descriptor = cmd_channel._fileno
    if hasattr(select, "POLLRDHUP"):
        poll = select.poll()
        poll.register(descriptor, select.POLLRDHUP)
        return not poll.poll(0)
    probe = socket.socket(fileno=os.dup(descriptor))  # macOS
    try:
        return bool(probe.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        probe.close()
