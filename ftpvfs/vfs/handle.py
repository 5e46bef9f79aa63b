"""Open files: one class for each kind. Binary file objects that belong to one thread at a time.

Who must not wait, as a data channel on an event loop, asks first: `poll` tells whether there are bytes, what to await
before there are some, or that the end is reached; `accept` takes over bytes, `pressure` tells what to await before it
takes more.

A file that is written is published whole by `commit`, or not at all. `close` commits too where the handle was opened
so (a Python program's `with open(...)`), and gives the new bytes up where an FTP data channel decides
(`autocommit=False`). Nothing is ever published because a handle was forgotten: the garbage collector gives it up.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from ftpvfs.backend.backend import Entry, OpenFile, Upload
from ftpvfs.errors import GONE, failure
from ftpvfs.readiness import END, Bytes, Readiness
from ftpvfs.vfs.readahead import ReadAhead
from ftpvfs.waiting import Wait, WouldWait, about_to_wait

if TYPE_CHECKING:
    from concurrent.futures import Future

    from _typeshed import ReadableBuffer, WriteableBuffer

# Called before a file becomes visible; raises to have it given up.
Confirm: TypeAlias = Callable[[], None]
# What the system takes in one sendmsg (IOV_MAX).
MOST_VIEWS = 1024
# What one `read()` of a whole file takes at a time.
BLOCK = 2**20
# How often a newer version is looked for before the first byte: a file that is replaced between each question and the
# request that follows it is given up in the end.
MOST_REFRESHES = 20


def _always() -> None:
    """Confirm: nobody has anything to say against it."""


class Handle(io.RawIOBase):
    """What all open files have in common.

    As with Python's own `open`, `read(n)` and `readinto` come back short at the end of the file alone. Reading line
    by line goes fastest through an `io.BufferedReader` or `io.TextIOWrapper` around the handle.
    """

    # What gzip and others look at.
    mode = "rb"
    # What the last step of a transfer (`commit`, `verify`) waits for at the least, and what `abandon` waits for.
    last_step_waits_for = Wait.STORE
    abandon_waits_for = Wait.STORE
    # Whether the bytes stand in a file of this machine, whose `descriptor` is known once some are ready.
    is_in_file = False

    def __init__(self, path: str, name: str) -> None:
        super().__init__()
        self.path = path
        # What pyftpdlib logs and hands to its callbacks.
        self.name = name
        self._pid = os.getpid()

    # --- reading

    def descriptor(self) -> int | None:
        """Return a descriptor in which the file's bytes stand at their own offsets; None where there is none."""
        return None

    def poll(self) -> Readiness:
        """Return what can be had from the position on without waiting: bytes, a future to await first, or the end.

        Raises why there will be no bytes: once, since the next call asks for them again. Has to wait (`WouldWait`)
        where the store must be asked which version it has.
        """
        raise self._unsupported("The file is open for writing alone")

    def take(self, limit: int) -> memoryview:
        """Return up to `limit` bytes without copying them, none at the end of the file; waits for the first."""
        raise self._unsupported("The file is open for writing alone")

    def take_views(self, limit: int) -> list[memoryview]:
        """Return up to about `limit` bytes in the pieces in which they came, none at the end; waits for the first."""
        view = self.take(limit)
        return [view] if view else []

    def advance(self, count: int) -> None:
        """Go past bytes that were ready and have been sent from the descriptor."""
        raise self._unsupported("The file has no descriptor")

    def verify(self) -> None:
        """Raise what makes the bytes that were given worthless: called at the end of a download, may wait."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.readall()
        self._check_open()
        return self._join(size)

    def readall(self) -> bytes:
        self._check_open()
        return self._join(None)

    def _join(self, size: int | None) -> bytes:
        pieces = []
        while (size is None or size > 0) and (view := self.take(BLOCK if size is None else size)):
            pieces.append(view)
            size = None if size is None else size - len(view)
        return b"".join(pieces)

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._check_open()
        target = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(target) and (view := self.take(len(target) - filled)):
            target[filled : filled + len(view)] = view
            filled += len(view)
        return filled

    # --- writing

    def write(self, data: ReadableBuffer) -> int:
        raise self._unsupported("The file is open for reading alone")

    def accept(self, data: ReadableBuffer) -> None:
        """Take over all of `data` without waiting for the store. After an error nothing can be published any more."""
        raise self._unsupported("The file is open for reading alone")

    def pressure(self) -> Future[Any] | None:
        """Return what to await before more is accepted; None when more may come. Raises what failed meanwhile."""
        return None

    def admit(self) -> Future[Any] | None:
        """See, before the first byte, whether what is written can be stored; raise why not, as far as that is known.

        Return a future to await before this is asked again; None where bytes may come. May have to wait (`WouldWait`).
        """
        return None

    def reserve(self, size: int) -> None:
        """Take note that the file will have `size` bytes; raise EFBIG, ENOSPC or EFULL where that is too many.

        May have to wait (`WouldWait`).
        """

    def abandon(self) -> None:
        """Close without publishing anything."""
        super().close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def _unsupported(self, reason: str) -> io.UnsupportedOperation:
        """Return the error that Python's files raise, which is an OSError; ours has an errno."""
        return io.UnsupportedOperation(errno.EBADF, reason, self.path)

    def _sought(self, offset: int, whence: int, position: int, size: int) -> int:
        """Return the position that `seek` asks for; ESPIPE with `--no-seek`, unless that is where it stands."""
        self._check_open()
        if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            raise failure(errno.EINVAL, self.path, f"whence is {whence}, not 0, 1 or 2")
        target = {os.SEEK_SET: 0, os.SEEK_CUR: position, os.SEEK_END: size}[whence] + offset
        if target < 0:
            raise failure(errno.EINVAL, self.path, "A position before the file's start")
        if target != position and not self.seekable():
            raise failure(errno.ESPIPE, self.path, "Seeking is switched off (--no-seek)")
        return target

    def __del__(self) -> None:
        if self._pid == os.getpid():  # after a fork the file goes on in the process that opened it
            self.abandon()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path!r}{' closed' if self.closed else ''}>"


class ReadingHandle(Handle):
    """What all files have in common that are read: one version, and a position in it."""

    last_step_waits_for = Wait.DISK
    abandon_waits_for = Wait.NOTHING
    entry: Entry

    def __init__(self, path: str, name: str, *, seekable: bool = True) -> None:
        super().__init__(path, name)
        self._seekable = seekable
        self._position = 0

    @property
    def size(self) -> int:
        """Bytes in this version of the file."""
        return self.entry.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position, also behind the end; ESPIPE with `--no-seek`, unless it stays where it is."""
        self._position = self._sought(offset, whence, self._position, self.size)
        return self._position

    def _join(self, size: int | None) -> bytes:
        data = super()._join(size)
        if self._position >= self.size:
            self.verify()
        return data

    def abandon(self) -> None:
        self.close()


class VersionedHandle(ReadingHandle):
    """A file of which the store may have another version by the time that its first byte is wanted.

    Until a byte has been handed out the newer version is taken, however often others replace the file; from the first
    byte on the handle reads that one version or fails. `refresh()` asks for the version that is there now, None: there
    is no other.
    """

    def __init__(
        self, path: str, name: str, entry: Entry, refresh: Callable[[], Entry] | None, *, seekable: bool = True
    ) -> None:
        super().__init__(path, name, seekable=seekable)
        self.entry = entry
        self._refresh = refresh
        self._pinned = False
        self._refreshes = 0

    def _may_take_newer(self, error: OSError) -> bool:
        """Tell whether an error means that the version is gone, and another one may be read in its place."""
        is_gone = error.errno in GONE and not self._pinned
        return is_gone and self._refresh is not None and self._refreshes < MOST_REFRESHES

    def _newer_version(self) -> Entry:
        """Return the version that is there now. ENOENT where there is none."""
        assert self._refresh is not None
        about_to_wait(Wait.STORE)
        self._refreshes += 1
        return self._refresh()


class ReadHandle(VersionedHandle):
    """A file streamed from the store, one version from the first byte to the last.

    `open_at(entry, offset)` starts reading a version.
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
        super().__init__(path, name, entry, refresh, seekable=seekable)
        self._open_at = open_at
        self._stream: ReadAhead | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        before = self._position
        if super().seek(offset, whence) != before:
            self._drop_stream()
        return self._position

    def poll(self) -> Readiness:
        self._check_open()
        while self._position < self.size:
            try:
                return self._ready_stream().poll()
            except (OSError, CancelledError) as error:
                self._recover(error)
        return END

    def take(self, limit: int) -> memoryview:
        """Return up to `limit` bytes without copying them, none at the end of the file.

        Raises ECHANGED when the file is another version by now and part of this one has been handed out. After any
        error the next call asks the store again, from where the bytes ended.
        """
        self._check_open()
        while limit > 0 and self._position < self.size:
            try:
                view = self._ready_stream().take(limit)
            except (OSError, CancelledError) as error:
                self._recover(error)
                continue
            self._pinned = True
            self._position += len(view)
            return view
        return memoryview(b"")

    def _recover(self, error: OSError | CancelledError) -> None:
        """Begin again with another version where nobody has seen a byte of this one; else raise what is wrong."""
        if isinstance(error, CancelledError):
            self._drop_stream()
            raise failure(errno.ECANCELED, self.path, "The VFS was closed") from error
        if not self._may_take_newer(error):
            self._drop_stream()
            raise error
        entry = self._newer_version()
        self._drop_stream()
        self.entry = entry

    def _ready_stream(self) -> ReadAhead:
        if self._stream is None:
            self._stream = self._open_at(self.entry, self._position)
        return self._stream

    def _drop_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        if not self.closed:
            self._drop_stream()
        super().close()

    def take_views(self, limit: int) -> list[memoryview]:
        views: list[memoryview] = []
        while limit > 0 and len(views) < MOST_VIEWS and (not views or self._has_more()):
            view = self.take(limit)
            if not view:
                break
            views.append(view)
            limit -= len(view)
        return views

    def _has_more(self) -> bool:
        return self._stream is not None and self._stream.has_more

    def verify(self) -> None:
        """Raise EIO where the whole file was read in one go and is not what the store's hash tells. May ask the store.
        """
        if self._stream is not None and self._position >= self.size:
            self._stream.verify()


class FileHandle(ReadingHandle):
    """A file of a store on this machine's own disk, read directly. `fileno` is real, so sendfile works."""

    is_in_file = True

    def __init__(self, path: str, name: str, opened: OpenFile, *, seekable: bool = True) -> None:
        super().__init__(path, name, seekable=seekable)
        self._opened = opened
        self.entry = opened.entry

    def fileno(self) -> int:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        return self._opened.fileno()

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

    def descriptor(self) -> int:
        return self.fileno()

    def poll(self) -> Readiness:
        left = self.size - self._position
        return Bytes(left) if left > 0 else END

    def advance(self, count: int) -> None:
        self._position += count

    def close(self) -> None:
        if not self.closed:
            self._opened.close()
        super().close()


class WritingHandle(Handle):
    """A file that is written: published whole by `commit`, or given up. What the kinds of them share."""

    mode = "wb"

    def __init__(self, path: str, name: str, *, autocommit: bool) -> None:
        super().__init__(path, name)
        self._autocommit = autocommit
        self._failure: BaseException | None = None
        self.committed = False

    def _publish_all(self, confirm: Confirm) -> None:
        """Publish what was written; on return it is where the open mode promises."""
        raise NotImplementedError

    def _give_up(self) -> None:
        """Let go of everything, published or not. May be called again."""
        raise NotImplementedError

    def commit(self, confirm: Confirm = _always) -> None:
        """Publish what was written, whole; on return it is where the open mode promises, and the handle is closed.

        Raises what went wrong, also with an earlier write; the file that was there before then still is. `confirm` is
        called when all is ready and nobody sees the file yet; it may wait, and what it raises gives the file up. Where
        this thread may not wait (WouldWait) nothing has happened, and one that may calls again.
        """
        if self.committed:
            return
        self._check_open()
        try:
            self._raise_failure()
            self._publish_all(confirm)
        except WouldWait:
            raise
        except BaseException:
            self._give_up()
            super().close()
            raise
        self.committed = True
        super().close()

    @contextlib.contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        """After an error inside nothing can be published any more: nobody knows which bytes were taken."""
        self._check_open()
        self._raise_failure()
        try:
            yield
        except WouldWait:  # nothing was taken
            raise
        except BaseException as error:
            self._failure = error
            raise

    def _raise_failure(self) -> None:
        if self._failure is not None:
            code = getattr(self._failure, "errno", None) or errno.EIO
            raise failure(code, self.path, f"An earlier write failed: {self._failure}") from self._failure

    def close(self) -> None:
        """Publish the file where it was opened so, raising what failed, also earlier; else give it up."""
        if self.closed:
            return
        if self._autocommit:
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


class WriteHandle(WritingHandle):
    """A file streamed to the store. The store hears of it with the first full part, or at `commit`.

    `check_size` raises why no file of so many bytes can be stored; 0 where nobody knows how many come.
    """

    def __init__(
        self,
        path: str,
        name: str,
        begin: Callable[[], Upload],
        publish: Callable[[Upload, Confirm], None],
        *,
        autocommit: bool,
        check_size: Callable[[int], object] = lambda size: None,
    ) -> None:
        super().__init__(path, name, autocommit=autocommit)
        self._begin = begin
        self._publish = publish
        self._check_size = check_size
        self._upload: Upload | None = None
        self._position = 0

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._position

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # Also to where it is: zipfile and others try that to see whether they may go back later.
        self._check_open()
        reason = "Seeking in a file that is written needs --vfs-cache-mode writes or full"
        raise failure(errno.ESPIPE, self.path, reason)

    def admit(self) -> None:
        self._check_size(0)

    def reserve(self, size: int) -> None:
        self._check_size(size)

    def write(self, data: ReadableBuffer) -> int:
        """Take all of `data`; blocks while the store is slower. After an error nothing can be published any more."""
        before = self._position
        self.accept(data)
        while (busy := self.pressure()) is not None:
            wait([busy])
            del busy  # see `Upload.write`
        return self._position - before

    def accept(self, data: ReadableBuffer) -> None:
        with self._failing_for_good():
            view = memoryview(data).cast("B")
            self._started().accept(view)
        self._position += len(view)

    def pressure(self) -> Future[Any] | None:
        with self._failing_for_good():
            return None if self._upload is None else self._upload.pressure()

    def _started(self) -> Upload:
        if self._upload is None:
            self._upload = self._begin()
        return self._upload

    def _publish_all(self, confirm: Confirm) -> None:
        self._publish(self._started(), confirm)

    def _give_up(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.abort()
