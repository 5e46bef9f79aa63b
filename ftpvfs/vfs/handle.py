"""Open files: one class for each kind. Binary file objects that belong to one thread at a time.

A file that is written is published whole by `commit`, or not at all. `close` commits too where the handle was opened so
(a Python program's `with open(...)`), and gives the new bytes up where an FTP data channel decides (`autocommit=False`).
Nothing is ever published because a handle was forgotten: the garbage collector gives it up.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ftpvfs.backend.backend import Entry, OpenFile, Upload
from ftpvfs.errors import ECHANGED, failure
from ftpvfs.vfs.readahead import ReadAhead

if TYPE_CHECKING:
    from concurrent.futures import Future

    from _typeshed import ReadableBuffer, WriteableBuffer

# What one `read()` of a whole file takes at a time.
BLOCK = 2**20


class Handle(io.RawIOBase):
    """What all open files have in common."""

    def __init__(self, path: str, name: str) -> None:
        super().__init__()
        self.path = path
        # What pyftpdlib logs and hands to its callbacks.
        self.name = name

    def abandon(self) -> None:
        """Close without publishing anything."""
        super().close()

    def __del__(self) -> None:
        self.abandon()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path!r}{' closed' if self.closed else ''}>"


class ReadHandle(Handle):
    """A file streamed from the store, one version from the first byte to the last.

    `open_at(entry, offset)` starts reading a version; `refresh()` asks the store for the version it has now, which is used
    while nothing has been handed out yet.
    """

    def __init__(
        self,
        path: str,
        name: str,
        entry: Entry,
        open_at: Callable[[Entry, int], ReadAhead],
        refresh: Callable[[], Entry],
        *,
        seekable: bool = True,
    ) -> None:
        super().__init__(path, name)
        self.entry = entry
        self._open_at = open_at
        self._refresh = refresh
        self._seekable = seekable
        self._position = 0
        self._stream: ReadAhead | None = None
        self._pinned = False

    @property
    def size(self) -> int:
        """Bytes in this version of the file."""
        return self.entry.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise failure(errno.EINVAL, self.path, "A position before the file's start")
        if base + offset != self._position:
            if not self._seekable:
                raise failure(errno.ESPIPE, self.path, "Seeking is switched off (--no-seek)")
            self._drop_stream()
            self._position = base + offset
        return self._position

    def pending(self) -> Future[bytes] | None:
        """Return the future to await before `take` gives bytes without blocking; None when it does so now."""
        return self._ready_stream().pending() if self._position < self.size else None

    def take(self, limit: int) -> memoryview:
        """Return up to `limit` bytes without copying them, none at the end of the file.

        Raises ECHANGED when the file is another version by now and part of this one has been handed out.
        """
        if self.closed:
            raise ValueError("I/O operation on closed file")
        while self._position < self.size:
            try:
                view = self._ready_stream().take(limit)
            except OSError as error:
                if self._pinned or error.errno not in {ECHANGED, errno.ENOENT, errno.EINVAL}:
                    raise
                self._repin()
                continue
            self._pinned = True
            self._position += len(view)
            return view
        return memoryview(b"")

    def _repin(self) -> None:
        """Take the store's present version: the listing was old, and nobody has seen a byte of it. Once only."""
        self._drop_stream()
        self.entry = self._refresh()
        self._pinned = True

    def _ready_stream(self) -> ReadAhead:
        if self._stream is None:
            self._stream = self._open_at(self.entry, self._position)
        return self._stream

    def _drop_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        view = self.take(len(target))
        target[: len(view)] = view
        return len(view)

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size >= 0:
            return bytes(self.take(size))
        return self.readall()

    def readall(self) -> bytes:
        pieces = []
        while view := self.take(BLOCK):
            pieces.append(bytes(view))
        return b"".join(pieces)

    def close(self) -> None:
        if not self.closed:
            self._drop_stream()
        super().close()

    def abandon(self) -> None:
        self.close()


class FileHandle(Handle):
    """A file of a store on this machine's own disk, read directly. `fileno` is real, so sendfile works."""

    def __init__(self, path: str, name: str, opened: OpenFile, *, seekable: bool = True) -> None:
        super().__init__(path, name)
        self._opened = opened
        self._seekable = seekable
        self._position = 0

    @property
    def entry(self) -> Entry:
        """The version that is read."""
        return self._opened.entry

    @property
    def size(self) -> int:
        """Bytes in this version of the file."""
        return self._opened.entry.size

    def fileno(self) -> int:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        return self._opened.fileno()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise failure(errno.EINVAL, self.path, "A position before the file's start")
        if base + offset != self._position and not self._seekable:
            raise failure(errno.ESPIPE, self.path, "Seeking is switched off (--no-seek)")
        self._position = base + offset
        return self._position

    def take(self, limit: int) -> memoryview:
        """Return up to `limit` bytes, none at the end; at the end the version is verified."""
        data = os.pread(self.fileno(), min(limit, max(0, self.size - self._position)), self._position)
        self._position += len(data)
        if not data:
            self.verify()
        return memoryview(data)

    def verify(self) -> None:
        """Raise ECHANGED when somebody has written into the file since it was opened."""
        self._opened.verify()

    def pending(self) -> None:
        """Local bytes are always ready."""

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        view = self.take(len(target))
        target[: len(view)] = view
        return len(view)

    def read(self, size: int | None = -1) -> bytes:
        return bytes(self.take(self.size if size is None or size < 0 else size))

    def close(self) -> None:
        if not self.closed:
            self._opened.close()
        super().close()

    def abandon(self) -> None:
        self.close()


class WriteHandle(Handle):
    """A file streamed to the store. The store hears of it with the first full part, or at `commit`."""

    def __init__(
        self,
        path: str,
        name: str,
        begin: Callable[[], Upload],
        publish: Callable[[Upload], None],
        *,
        autocommit: bool,
    ) -> None:
        super().__init__(path, name)
        self._begin = begin
        self._publish = publish
        self._autocommit = autocommit
        self._upload: Upload | None = None
        self._failure: BaseException | None = None
        self._position = 0
        self.committed = False

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._position

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET and offset == self._position or whence != os.SEEK_SET and offset == 0:
            return self._position
        raise failure(errno.ESPIPE, self.path, "Seeking in a file that is written needs --vfs-cache-mode writes or full")

    def write(self, data: ReadableBuffer) -> int:
        """Take all of `data`; blocks while the store is slower. After an error nothing can be published any more."""
        if self.closed:
            raise ValueError("I/O operation on closed file")
        self._raise_failure()
        view = memoryview(data).cast("B")
        try:
            self._started().write(view)
        except BaseException as error:
            self._failure = error
            raise
        self._position += len(view)
        return len(view)

    def _started(self) -> Upload:
        if self._upload is None:
            self._upload = self._begin()
        return self._upload

    def commit(self) -> None:
        """Publish what was written; when it returns the store has the file, whole and verified, and the handle is closed.

        Raises what the store said; the file that was there before then still is.
        """
        if self.committed:
            return
        if self.closed:
            raise ValueError("I/O operation on closed file")
        try:
            self._raise_failure()
            self._publish(self._started())
            self.committed = True
        finally:
            if not self.committed:
                self._give_up()
            super().close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise failure(errno.EIO, self.path, f"An earlier write failed: {self._failure}") from self._failure

    def _give_up(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.abort()

    def close(self) -> None:
        if self.closed:
            return
        if self._autocommit and self._failure is None:
            self.commit()
        else:
            self.abandon()

    def abandon(self) -> None:
        if not self.closed:
            self._give_up()
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        """Publish on a clean exit; a block that failed has not finished its file."""
        if kind is not None:
            self.abandon()
        else:
            self.close()
