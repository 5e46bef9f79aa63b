"""What a download sends: a file's bytes as they become ready, by the cheapest way that the connection has for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from ftpvfs.errors import ECHANGED, failure
from ftpvfs.readiness import Bytes, Readiness

# What one call sends at the most: a turn of the loop costs as much as a send.
SEND = 2**20
# What one call hands to TLS, or receives: pyftpdlib moves 64 KiB, four times that is faster, more is not (measured).
STEP = 256 * 1024


class FileSource:
    """Bytes that stand in a file of this machine: the kernel sends them, as far as they are there."""

    # Whether other bytes are sent than the file's own.
    converts = False

    def __init__(self, file: Any, channel: Any) -> None:
        self._file = file
        self._channel = channel
        self._count = 0

    def fill(self) -> Readiness:
        """Return whether there are bytes to send now, what to await before there are, or that all are sent."""
        found: Readiness = self._file.poll()
        self._count = min(found.count, SEND) if isinstance(found, Bytes) else 0
        return found

    def send(self, most: int = SEND) -> bool:
        """Send; tell whether the connection may take more. Raises BlockingIOError where it takes nothing."""
        count = min(self._count, most)
        sent = os.sendfile(self._channel._fileno, self._file.descriptor(), self._file.tell(), count)
        if not sent:
            self._file.verify()
            raise failure(ECHANGED, self._file.path, "The file became shorter while it was sent")
        self._channel.tot_bytes_sent += sent
        self._file.advance(sent)
        return sent == count


class ViewSource:
    """Bytes in memory, in the pieces in which they came; `convert` makes other bytes of each."""

    def __init__(self, file: Any, channel: Any, convert: Callable[[bytes], bytes] | None = None) -> None:
        self._file = file
        self._channel = channel
        self._convert = convert
        self._views: list[memoryview] = []

    @property
    def converts(self) -> bool:
        """Whether other bytes are sent than the file's own."""
        return self._convert is not None

    def fill(self) -> Readiness:
        """Return whether there are bytes to send now, what to await before there are, or that all are sent."""
        while not self._views:
            found: Readiness = self._file.poll()
            if not isinstance(found, Bytes):
                return found
            views = self._file.take_views(SEND)
            if not views:
                raise failure(ECHANGED, self._file.path, "The file became shorter while it was sent")
            if self._convert is not None:
                converted = (memoryview(self._convert(bytes(view))) for view in views)
                views = [view for view in converted if view]
            self._views = views
        return Bytes(sum(map(len, self._views)))

    def send(self, most: int = SEND) -> bool:
        """Send; tell whether the connection may take more. Raises BlockingIOError where it takes nothing."""
        views = self._views if most >= SEND else first(self._views, most)
        sent: int = self._channel.socket.sendmsg(views)
        self._channel.tot_bytes_sent += sent
        self._views = unsent(self._views, sent)
        return sent == sum(map(len, views))


class TLSSource(ViewSource):
    """The same over TLS, which takes one piece at a time."""

    def send(self, most: int = SEND) -> bool:
        """Send; tell whether the connection may take more."""
        piece = self._views[0][: min(most, STEP)]
        sent: int = self._channel.send(piece)  # counts, and knows what TLS wants next
        self._views = unsent(self._views, sent)
        return sent == len(piece)


def first(views: Sequence[memoryview], most: int) -> Sequence[memoryview]:
    """Return the views as far as their first bytes, so many at the most."""
    found: list[memoryview] = []
    for view in views:
        if len(view) >= most:
            return [*found, view[:most]]
        found.append(view)
        most -= len(view)
    return found


def unsent(views: Sequence[memoryview], sent: int) -> list[memoryview]:
    """Return what is left of the views once `sent` bytes of them are gone."""
    for number, view in enumerate(views):
        if sent < len(view):
            return [view[sent:], *views[number + 1 :]]
        sent -= len(view)
    return []


class NetworkText:
    """Makes each line end CR LF, those that are so already included (RFC 959, section 3.1.1.1), piece by piece.

    pyftpdlib's own looks at a piece's last byte to learn what came before its first.
    """

    def __init__(self) -> None:
        self._ends_with_cr = False

    def __call__(self, piece: bytes) -> bytes:
        """Return the next piece's text."""
        begins_in_line_end = self._ends_with_cr and piece.startswith(b"\n")
        self._ends_with_cr = piece.endswith(b"\r")
        text = piece.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        return text[1:] if begins_in_line_end else text
