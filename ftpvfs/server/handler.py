"""Control connections: pyftpdlib's verbs, with the replies that clients of a store need."""

from __future__ import annotations

import errno
import logging
from typing import Any

from pyftpdlib.handlers import FTPHandler, TLS_FTPHandler
from pyftpdlib.log import logger as session_logger

from ftpvfs.server.transfer import NO_SPACE, TLS_VFSDTPHandler, VFSDTPHandler

logger = logging.getLogger(__name__)

# pyftpdlib answers 550 to every failure, which tells a client not to try again. RFC 959, section 4.2: 4xx may be tried.
TRY_AGAIN = {
    errno.EBUSY,
    errno.EAGAIN,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
}
BAD_NAME = {errno.EINVAL, errno.ENAMETOOLONG, errno.EISDIR}
TRANSFERS = {"RETR", "STOR", "STOU", "APPE", "LIST", "NLST", "MLSD"}


def reply_code(error: OSError) -> int:
    """Return the reply code for a command that failed."""
    if error.errno in NO_SPACE:
        return 552
    if error.errno in TRY_AGAIN:
        return 450
    return 553 if error.errno in BAD_NAME else 550


class VFSHandler(FTPHandler):  # type: ignore[misc]
    """A session over a `VFSFilesystem`; set `abstracted_fs` and `authorizer` on a subclass. Runs on its event loop."""

    dtp_handler = VFSDTPHandler
    banner = "ftpvfs ready."
    # Names that are not UTF-8 go out as they are and come back the same.
    unicode_errors = "surrogateescape"
    auth_failed_timeout = 1

    def __init__(self, conn: Any, server: Any, ioloop: Any = None) -> None:
        # What the filesystem said about the command that runs; it decides the code of a 550.
        self.failure: OSError | None = None
        super().__init__(conn, server, ioloop=ioloop)

    def respond(self, resp: str, logfun: Any = session_logger.debug) -> None:
        """Send a reply; a 550 gets the code that its reason deserves."""
        if self.failure is not None and resp.startswith("550 "):
            resp = f"{reply_code(self.failure)} {resp[4:]}"
        super().respond(resp, logfun)

    def push(self, data: str) -> None:
        """Send text; a reply must not fail for the name in it."""
        super(FTPHandler, self).push(data.encode(self.encoding, self.unicode_errors))

    def pre_process_command(self, line: str, cmd: str, arg: str) -> None:
        """Accept `LIST -la folder` as ls does, and see to it that a transfer has a data connection to come."""
        self.failure = None
        if cmd in {"LIST", "NLST", "STAT"} and arg.startswith("-"):
            arg = arg.partition(" ")[2].lstrip()
            line = f"{cmd} {arg}".rstrip()
        if cmd in TRANSFERS and self.authenticated and not self._expects_data():
            self.respond("425 Use PASV or PORT first.")
            return
        super().pre_process_command(line, cmd, arg)

    def _expects_data(self) -> bool:
        return any((self.data_channel, self._dtp_acceptor, self._dtp_connector))

    def _shutdown_connecting_dtp(self) -> None:
        """Forget, with a data connection that never came, the transfer that waited for it."""
        super()._shutdown_connecting_dtp()
        self._drop_queued()

    def _drop_queued(self) -> None:
        waiting = [self._in_dtp_queue and self._in_dtp_queue[0], self._out_dtp_queue and self._out_dtp_queue[2]]
        self._in_dtp_queue = self._out_dtp_queue = None
        for file in waiting:
            if file is not None:
                file.close()

    def ftp_MLSD(self, path: str) -> Any:
        """List a folder; a missing one is 550, as clients expect (RFC 3659 asks 501 for what is no folder)."""
        if not self.fs.isdir(path):
            self.respond("550 No such directory." if not self.fs.lexists(path) else "501 Not a directory.")
            return None
        return super().ftp_MLSD(path)


class TLS_VFSHandler(VFSHandler, TLS_FTPHandler):  # type: ignore[misc]
    """The same with FTPS; `certfile` and the other attributes are pyftpdlib's."""

    dtp_handler = TLS_VFSDTPHandler
