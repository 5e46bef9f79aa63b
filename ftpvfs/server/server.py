"""The server for stores that take their time: one event loop, on which nobody waits for another's store."""

from __future__ import annotations

import logging
import socket

from pyftpdlib.servers import FTPServer

from ftpvfs.server.commands import Commands
from ftpvfs.server.loop import Loop
from ftpvfs.waiting import Wait

logger = logging.getLogger(__name__)

# Connections that one turn of the loop takes, so that many who come at once do not keep those who are there waiting.
ACCEPTS_A_TURN = 16
# Seconds for which no connections are taken once that has failed.
REST = 0.5


class VFSServer(FTPServer):
    """Listens on one address and serves a `VFSHandler` class on an event loop of its own.

    As pyftpdlib's `FTPServer`, but a command that has to wait for its store leaves the loop to the others. Several
    servers may share a loop (`ioloop`). It is made in the process and used in the thread that serves.
    """

    ioloop: Loop

    def __init__(
        self,
        address_or_socket: tuple[str | None, int] | socket.socket,
        handler: type,
        ioloop: Loop | None = None,
        backlog: int = 100,
    ) -> None:
        super().__init__(address_or_socket, handler, ioloop or Loop(), backlog)
        if not issubclass(handler, Commands):
            self.ioloop.may_wait_for = Wait.STORE

    def handle_accept(self) -> None:
        """Take the connections that wait."""
        for _ in range(ACCEPTS_A_TURN):
            if not self.takes_next():
                return
            try:
                sock, address = self.socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self._rest(error)
                return
            self.handle_accepted(sock, address)

    def takes_next(self) -> bool:
        """Tell whether the next connection is for this server; a subclass may leave it to another process."""
        return True

    def _rest(self, error: OSError) -> None:
        """Take no connections for a while: there are no descriptors left, and pyftpdlib's own would end the server."""
        logger.warning("no connections are taken for %g s: %s", REST, error)
        self.pause(REST)

    def pause(self, seconds: float) -> None:
        """Take no connections for a while; they wait with the system, or are taken by another process."""
        self.modify_ioloop_events(0)
        self.ioloop.call_later(seconds, self.resume)

    def resume(self) -> None:
        """Take connections again."""
        self.modify_ioloop_events(self.ioloop.READ)

    def stop(self) -> None:
        """Close all connections and have `serve_forever` return. Any thread; a signal handler, too."""
        self.ioloop.call_soon_threadsafe(self.close_all)

    def _map_len(self) -> int:
        return len(self.ioloop.socket_map) - 1  # without the loop's own
