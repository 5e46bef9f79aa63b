"""One process's servers on one event loop, and how they end: nobody new, the idle sent away, transfers let finish."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence

from ftpvfs.server.limits import Door, LimitedServer, Refusal
from ftpvfs.server.loop import Loop

logger = logging.getLogger(__name__)

# Seconds between two looks at who has become idle while the server drains.
TICK = 0.1
# Seconds for the answers of what is cut off to get out.
FAREWELL = 0.2


class Service:
    """Serves on listening sockets until it has drained. Made in the process, and used in the thread, that serves."""

    def __init__(
        self, listeners: Sequence[tuple[socket.socket, type]], door: Door, *, drain_timeout: float | None
    ) -> None:
        self.loop = Loop()
        self.door = door
        self._drain_timeout = drain_timeout
        # When the time to drain is over; None: it has not begun, or there is no end to it.
        self._deadline: float | None = None
        self._servers = [LimitedServer(sock, handler, door, self.loop) for sock, handler in listeners]

    def serve(self) -> None:
        """Serve until drained."""
        self.door.table.set_accepting(True)
        try:
            self.loop.loop()
        finally:
            self.close()

    def drain(self) -> None:
        """Stop accepting, and have `serve` return once all have left or their time is over. Any thread, any signal."""
        self.loop.call_soon_threadsafe(self._drain)

    def time_left(self) -> float | None:
        """Return the seconds that are left of the time to drain; None where there is no limit."""
        if self._drain_timeout is None:
            return None
        return 0.0 if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def close(self) -> None:
        """End all sessions at once."""
        self.door.is_closing = True
        self.door.table.set_accepting(False)
        self.loop.close()

    def watch_parent(self, descriptor: int) -> None:
        """Drain when the other end of a pipe, which is the parent's, is closed."""
        _End(descriptor, self.loop, self._drain)

    def _drain(self) -> None:
        if self.door.is_closing:
            return
        logger.info("stopping: nobody is let in any more, %d sessions are there", len(self.door.sessions))
        self.door.is_closing = True
        self.door.table.set_accepting(False)
        for server in self._servers:
            server.close()
        if self._drain_timeout is not None:
            self._deadline = time.monotonic() + self._drain_timeout
            self.loop.call_later(self._drain_timeout, self._give_up)
        self.loop.call_every(TICK, self._dismiss)
        self._dismiss()

    def _dismiss(self) -> None:
        """Send away whoever has nothing under way; end when nobody is left."""
        for session in list(self.door.sessions):
            if session.is_idle and not session.is_dismissed:
                session.dismiss(Refusal.CLOSING)
        if not self.door.sessions:
            self.loop.close()

    def _give_up(self) -> None:
        logger.warning("%d sessions did not end in time and are cut off", len(self.door.sessions))
        for session in list(self.door.sessions):
            session.cut_off("The server is shutting down")
        self.loop.call_later(FAREWELL, self.loop.close)


class _End:
    """Watches for the end of a pipe."""

    def __init__(self, descriptor: int, loop: Loop, ended: Callable[[], None]) -> None:
        self._fileno = descriptor
        self._loop = loop
        self._ended = ended
        loop.register(descriptor, self, loop.READ)

    # What the loop asks of those that it serves.

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def handle_read_event(self) -> None:
        self.handle_close()

    def handle_close(self) -> None:
        if self._fileno in self._loop.socket_map:
            self._loop.unregister(self._fileno)
            self._ended()

    def handle_error(self) -> None:
        logger.exception("the parent process cannot be watched")  # noqa: LOG004 - asyncore calls it in one

    def close(self) -> None:
        """The pipe is the process's."""
