"""Data connections that tell a finished upload from a broken one, and answer the truth, once, about each transfer.

pyftpdlib closes a file alike after success, ABOR, a time-out and a reset, takes a TCP reset and a TLS connection
cut short for the end of an upload, and says nothing at all when closing the file fails. Here an upload is complete
only after a clean end: a FIN on a plain connection, close_notify on a TLS one, with the control connection still
there. Then the file is committed, and only then 226 is sent; everything else gives the file up and says why.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import sys
from typing import Any

from OpenSSL import SSL
from pyftpdlib.exceptions import _FileReadWriteError, _GiveUpOnSendfile, _RetryError
from pyftpdlib.handlers import DTPHandler, TLS_DTPHandler
from pyftpdlib.handlers.ftp.producers import FileProducer
from pyftpdlib.ioloop import _ERRNOS_DISCONNECTED, _ERRNOS_RETRY, AsyncChat
from pyftpdlib.utils import is_ssl_sock

from ftpvfs.errors import reason_of

logger = logging.getLogger(__name__)

# pyftpdlib moves 64 KiB a step; four times that is measurably faster, more is not.
STEP = 256 * 1024
# What is streamed goes out in larger steps, a few of them in one turn of the loop.
SEND = 2**20
SENDS = 4
# What the client hears when a transfer failed for a reason of the store's (RFC 959, section 5.4: STOR, RETR).
NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}
# What no other try will change; 451 would have a client send all again.
FOR_GOOD = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR}
# How much of what a client has said on its control connection is searched for an ABOR.
PEEK = 4096


class VFSDTPHandler(DTPHandler):
    """A data connection for files of a `VFSFilesystem`. Runs on the session's event loop."""

    # pyftpdlib's own.
    _lastdata: int
    _resp: Any
    # Tells the filesystem that `commit` is called, so that closing alone need not publish.
    commits = True
    # Seconds for which an upload that has ended waits for the end of the control connection. A client that is killed
    # ends both as an upload ends, the data connection first (measured on Linux: 0.03 ms before the other, up to 8 ms on
    # a machine with twice the load that it bears). Longer is safer where packets get lost; every upload takes so much
    # longer, and with a plain FTPServer everything else waits, too.
    patience = 0.01
    ac_in_buffer_size = STEP
    ac_out_buffer_size = STEP

    @property
    def is_busy(self) -> bool:
        """Whether a command has said what the connection is for; from then on it owes the client one reply."""
        return bool(self._initialized)

    def readable(self) -> bool:
        """Tell the loop whether to read. Bytes, or an end, that come before the command wait in the kernel for it."""
        if not self._initialized:
            self.del_channel()
        return bool(self.receive)

    # --- uploads

    def handle_read(self) -> None:
        """Take what has arrived; an empty read is the clean end."""
        try:
            chunk = self.recv(self.ac_in_buffer_size)
        except _RetryError:
            return
        except OSError as error:
            self.break_off(f"Connection lost ({reason_of(error)})")
            return
        if not self.receive:  # TLS reads during a download, too; what a client says there means nothing
            if not chunk:
                self.handle_close()
        elif chunk:
            self._take(chunk)
        else:
            self._end_upload()

    handle_read_event = handle_read

    def recv(self, buffer_size: int) -> bytes:
        """Return what has arrived, empty at a clean end. Raises OSError where the connection broke."""
        try:
            return self.socket.recv(buffer_size)  # type: ignore[no-any-return]
        except OSError as error:
            if error.errno in _ERRNOS_RETRY:
                raise _RetryError from error
            raise

    def _take(self, chunk: bytes) -> None:
        self.tot_bytes_received += len(chunk)
        if self._data_wrapper is not None:
            chunk = self._data_wrapper(chunk)
        self.file_obj.write(chunk)

    def _end_upload(self) -> None:
        if not is_alive(self.cmd_channel, self.patience):
            self.break_off("The control connection is gone")
        elif wants_to_abort(self.cmd_channel):
            self.break_off("Aborted by the client")
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
            self._succeed()
        self.close()

    # --- downloads

    def push_with_producer(self, producer: Any) -> None:
        """Send a file without copying its bytes, unless ASCII type rewrites them."""
        if isinstance(producer, FileProducer):
            if producer.type == "a":
                producer = ASCIIProducer(producer.file, self.ac_out_buffer_size)
            elif hasattr(producer.file, "take_views") and not is_ssl_sock(self.socket):
                self._begin_views(producer.file)
                return
            elif hasattr(producer.file, "take") and not self.use_sendfile():
                producer = ViewProducer(producer.file, self.ac_out_buffer_size)
        super().push_with_producer(producer)

    def _begin_views(self, file: Any) -> None:
        self._initialized = True
        self.modify_ioloop_events(self.ioloop.WRITE)
        self._wanted_io_events = self.ioloop.WRITE
        self._file = file
        self._views: list[memoryview] = []
        self.initiate_send = self.initiate_views
        self.initiate_views()

    def initiate_views(self) -> None:
        """Send what the read-ahead has, many pieces with each call: a turn of the loop costs as much as a send."""
        for _ in range(SENDS):
            if not self._views:
                self._views = self._file.take_views(SEND)
            if not self._views:
                self.discard_buffers()
                self.handle_close()
                return
            try:
                sent = self.socket.sendmsg(self._views)
            except OSError as error:
                if error.errno in _ERRNOS_DISCONNECTED:
                    self._lost()
                elif error.errno not in _ERRNOS_RETRY:
                    raise
                return
            self.tot_bytes_sent += sent
            self._views = unsent(self._views, sent)
            if self._views:
                return

    def initiate_sendfile(self) -> None:
        """Send the next piece. pyftpdlib's own takes a connection that is gone at once for the file's end."""
        try:
            sent = os.sendfile(self._fileno, self._filefd, self._offset, self.ac_out_buffer_size)
        except OSError as error:
            if error.errno in _ERRNOS_DISCONNECTED:
                self._lost()
            elif error.errno not in _ERRNOS_RETRY and error.errno != errno.EBUSY:
                if self.tot_bytes_sent:
                    raise
                raise _GiveUpOnSendfile from error
            return
        self._offset += sent
        self.tot_bytes_sent += sent
        if not sent:
            self.discard_buffers()
            self.handle_close()

    def handle_close(self) -> None:
        """Called when all is sent, or when the connection broke; never the end of an upload."""
        if self._closed:
            return
        if self.receive or self.producer_fifo or not self.is_busy:
            self._lost()
            return
        try:
            if hasattr(self.file_obj, "verify"):
                self.file_obj.verify()
        except OSError as error:
            self._resp = (failure_reply(error), logger.warning)
        else:
            self._succeed()
        self.close()

    # --- ends

    def _succeed(self) -> None:
        self.transfer_finished = True
        self._resp = ("226 Transfer complete.", logger.debug)

    def _lost(self) -> None:
        self.break_off(f"Connection lost after {self.get_transmitted_bytes()} bytes")

    def break_off(self, reason: str) -> None:
        """End the transfer at once and unfinished; one whose outcome stands already keeps it."""
        if not self._resp:
            self._resp = (f"426 {reason}; transfer aborted.", logger.info)
        self.close()

    def handle_timeout(self) -> None:
        """Called every `timeout` seconds. A transfer that stands still ends; the session goes on."""
        if self.get_transmitted_bytes() > self._lastdata:
            self._lastdata = self.get_transmitted_bytes()
        else:
            self.break_off(f"Nothing moved for {self.timeout} seconds")

    def handle_error(self) -> None:
        """Answer the exception that is being handled with its reason."""
        error = sys.exc_info()[1]
        if self.transfer_finished:  # and only the connection was still to be closed
            self.break_off("")
            return
        if isinstance(error, _FileReadWriteError) and isinstance(error.__cause__, OSError):
            error = error.__cause__
        if isinstance(error, SSL.Error):
            self._lost()
            return
        if isinstance(error, OSError):
            self._resp = (failure_reply(error), logger.warning)
        else:
            self.log_exception(self)
            self._resp = ("451 Internal error; transfer aborted.", logger.warning)
        self.close()

    def close(self) -> None:
        """Answer, then give up what was not committed: that may take a while where the store is the reason.

        Whoever closes a transfer without a word (PASV or PORT in its middle, a stopping server) has broken it off.
        """
        if self._closed:
            return
        AsyncChat.close(self)  # RFC 959 wants it before the reply
        if self._idler is not None and not self._idler.cancelled:
            self._idler.cancel()
        try:
            self._answer()
            self._release_file()
            self._tell()
        except Exception:  # noqa: BLE001 - a callback of the embedding program's must not end the session
            self.log_exception(self)
        finally:
            self.cmd_channel._on_dtp_close()

    def _answer(self) -> None:
        session = self.cmd_channel
        if not self._resp and getattr(session, "leaves_answers", False):  # pyftpdlib's own handler speaks for itself
            self._resp = ("426 Transfer aborted.", logger.info)
        if self._resp and self.is_busy and not session._closed:
            session.respond(self._resp[0], logfun=self._resp[1])

    def _release_file(self) -> None:
        if self.file_obj is None or self.file_obj.closed:
            return
        try:
            self.file_obj.close()
        except OSError as error:
            logger.warning("closing %r: %s", self.file_obj.name, error)

    def _tell(self) -> None:
        """Log the transfer and call the embedding program back, now that the truth is known."""
        if self.file_obj is None:
            return
        name, session = self.file_obj.name, self.cmd_channel
        session.log_transfer(
            cmd=self.cmd,
            filename=name,
            receive=self.receive,
            completed=self.transfer_finished,
            elapsed=round(self.get_elapsed_time(), 3),
            bytes=self.get_transmitted_bytes(),
        )
        if self.transfer_finished:
            callback = session.on_file_received if self.receive else session.on_file_sent
        else:
            callback = session.on_incomplete_file_received if self.receive else session.on_incomplete_file_sent
        callback(name)


class TLS_VFSDTPHandler(TLS_DTPHandler, VFSDTPHandler):
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
            raise ConnectionResetError(errno.ECONNRESET, "TLS ended without close_notify") from error

    def handle_close(self) -> None:
        VFSDTPHandler.handle_close(self)

    def handle_error(self) -> None:
        VFSDTPHandler.handle_error(self)

    def handle_failed_ssl_handshake(self) -> None:
        """Answer the command that wants the connection, if one does (RFC 4217, section 10.2)."""
        self._resp = ("522 TLS handshake failed.", logger.info)
        self.close()

    def close(self) -> None:
        """Say goodbye in TLS, too, unless a download has failed, which is to look cut off.

        After an upload that failed as well: some clients wait for it, and take its absence for the failure.
        """
        if self.cmd_channel._closed or not (self.transfer_finished or self.receive):
            self._error = True  # pyftpdlib's mark that TLS is not shut down any more
        TLS_DTPHandler.close(self)

    def break_off(self, reason: str) -> None:
        """End the transfer at once, without waiting for a client to take the goodbye."""
        self._error = True
        VFSDTPHandler.break_off(self, reason)

    def _do_ssl_shutdown(self) -> None:
        """Shut TLS down. What pyftpdlib neither completes nor waits for would leave the transfer without its answer."""
        super()._do_ssl_shutdown()
        if not (self._closed or self._ssl_want_read or self._ssl_want_write):
            self._error = True
            self.close()


def unsent(views: list[memoryview], sent: int) -> list[memoryview]:
    """Return what is left of the views once `sent` bytes of them are gone."""
    for number, view in enumerate(views):
        if sent < len(view):
            return [view[sent:], *views[number + 1 :]]
        sent -= len(view)
    return []


class ViewProducer:
    """A file's bytes for pyftpdlib's asynchat, as views into the read-ahead's buffers."""

    def __init__(self, file: Any, step: int) -> None:
        self._file = file
        self._step = step

    def more(self) -> memoryview:
        """Return the next bytes, none at the end."""
        return self._file.take(self._step)  # type: ignore[no-any-return]


class ASCIIProducer:
    """A file's bytes with each line end as CR LF, those that are so already included (RFC 959, section 3.1.1.1).

    pyftpdlib's own looks at a piece's last byte to learn what came before its first.
    """

    def __init__(self, file: Any, step: int) -> None:
        self.file = file
        self._step = step
        self._ends_with_cr = False

    def more(self) -> bytes:
        """Return the next bytes, none at the end."""
        piece: bytes = self.file.read(self._step)
        begins_in_line_end = self._ends_with_cr and piece.startswith(b"\n")
        self._ends_with_cr = piece.endswith(b"\r")
        text = piece.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        return text[1:] if begins_in_line_end else text


def failure_reply(error: OSError) -> str:
    """Return the reply for a transfer that failed."""
    code = 552 if error.errno in NO_SPACE else 550 if error.errno in FOR_GOOD else 451
    return f"{code} {reason_of(error)}; transfer aborted."


def is_alive(cmd_channel: Any, patience: float = 0.0) -> bool:
    """Tell whether the client still holds its control connection open, `patience` seconds from now."""
    if cmd_channel._closed or not cmd_channel.connected:
        return False
    poll = select.poll()
    if hasattr(select, "POLLRDHUP"):
        poll.register(cmd_channel._fileno, select.POLLRDHUP)
        return not poll.poll(patience * 1000)
    poll.register(cmd_channel._fileno, select.POLLIN)  # macOS
    return not poll.poll(patience * 1000) or _has_bytes(cmd_channel._fileno)


def _has_bytes(descriptor: int) -> bool:
    """Tell whether what a readable connection has to say is more than that it ended."""
    with socket.socket(fileno=os.dup(descriptor)) as probe:
        try:
            return bool(probe.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False


def wants_to_abort(cmd_channel: Any) -> bool:
    """Tell whether an ABOR waits to be read.

    A client that aborts an upload says ABOR and closes the data connection; the loop may see the two in either order,
    and what was to be aborted must not be taken for complete.
    """
    try:
        waiting: bytes = cmd_channel.socket.recv(PEEK, socket.MSG_PEEK)
    except (OSError, SSL.Error):  # nothing waits
        return False
    lines = waiting.upper().split(b"\r\n")
    # Telnet's signals may stand before it, as pyftpdlib knows.
    return any(line.endswith(b"ABOR") and b" " not in line for line in lines)
