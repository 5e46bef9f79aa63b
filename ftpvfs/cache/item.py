"""Open cached files: `Item`, one version of a file that is read, and `Draft`, a file that is being written.

Lock order: Cache, then Downloader or WriteBack, then Item, then an index transaction. Methods ending in `_locked` are
called with `_lock` held; futures are completed with no lock held. Offsets are in bytes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING

from ftpvfs.backend.backend import Entry
from ftpvfs.cache.files import DataFile
from ftpvfs.cache.ranges import Range, RangeSet
from ftpvfs.cache.records import DirtyRecord, ItemRecord, version_of
from ftpvfs.errors import failure

if TYPE_CHECKING:
    from ftpvfs.cache.cache import Cache

logger = logging.getLogger(__name__)

# An upload of so many bytes is written down as resumable while it runs, in case the process is killed.
WORTH_RESUMING = 256 * 1024


class Item:
    """One version of a file, shared by all who read it in this process. Any thread; not carried across a fork.

    Invariants whenever `_lock` is free:
    - `present` lies within [0, size), and a byte is in the data file before it is in `present`;
    - the bytes of a present range never change;
    - while the item is open its file is leased: no process evicts it.
    """

    def __init__(self, cache: Cache, record: ItemRecord | DirtyRecord, file: DataFile) -> None:
        # Read only.
        self._cache = cache
        self._file = file
        self.size = record.size
        self.mtime = record.mtime
        # Held by the one who saves, before _lock: what was to be saved is saved when the next one gets it.
        self._saving = threading.Lock()
        self._lock = threading.Lock()
        # Protected by _lock; path, id and is_dirty change when the file is renamed or uploaded.
        self.path = record.path
        self.id = record.id or ""
        self._users = 1
        self._waiters: list[tuple[int, Future[None]]] = []
        self._is_saved = True
        # Bytes that were counted as taken: what the file took as it was opened, and what was added.
        self._counted = cache.files.taken(file.descriptor)
        if isinstance(record, DirtyRecord):
            self.version: str = ""
            self.fingerprint: str | None = None
            self.is_dirty = self.is_verified = True
            self._present = RangeSet([(0, self.size)])
        else:
            self.version, self.fingerprint = record.version, record.fingerprint
            self.is_dirty, self.is_verified = False, record.verified
            self._present = RangeSet(record.present)

    def __repr__(self) -> str:
        with self._lock:
            return f"<Item {self.path!r} {self._present.total}/{self.size}>"

    # --- who uses it

    def acquire(self) -> bool:
        """Count one user more; False where the file is closed, and all that was fetched recorded."""
        with self._lock:
            if self._file.is_closed:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """Count one user less. Once the last one has left, what is present is saved, and the file closed."""
        with self._lock:
            is_unsaved = self._users == 1 and not self.is_saved
            if not is_unsaved:  # else the one who saves takes over
                self._users -= 1
            if self._users > is_unsaved:
                return
            waiters, self._waiters = self._waiters, []
        for _, future in waiters:
            future.cancel()
        if is_unsaved:
            self._cache.save_later(self)
        else:
            self._cache.let_go(self)

    def give_up_saving(self) -> None:
        """What is not recorded by now never will be."""
        with self._lock:
            self._is_saved = True

    def close(self) -> bool:
        """Close the file, unless somebody uses it again; called by the cache once all is saved."""
        with self._lock:
            if self._users:
                return False
            self._cache.space.correct(self._cache.files.taken(self.descriptor) - self._counted)
            self._file.close()
            return True

    def discard(self) -> None:
        """Close the file of an item that nobody has seen."""
        self._file.close()

    @property
    def descriptor(self) -> int:
        """The data file, in which the present bytes stand at their offsets; -1 once the last user has left."""
        return self._file.descriptor

    # --- what is there

    @property
    def complete(self) -> bool:
        """Whether all bytes are present."""
        with self._lock:
            return self._present.covers(0, self.size)

    @property
    def present(self) -> tuple[Range, ...]:
        """What is present."""
        with self._lock:
            return tuple(self._present)

    def ready(self, offset: int) -> int:
        """Return how many bytes are present from `offset` on, without a gap."""
        with self._lock:
            return self._present.contiguous(offset)

    def missing(self, start: int, stop: int) -> list[Range]:
        """Return the ranges of [start, stop) that are not present; none lies behind the end."""
        with self._lock:
            return self._present.missing(start, min(stop, self.size))

    # --- filling

    def add(self, start: int, pieces: Sequence[bytes | memoryview]) -> None:
        """Write bytes that came from the store; present on return. ENOSPC where even eviction makes no room."""
        size = sum(map(len, pieces))
        stop = start + size
        if start < 0 or stop > self.size:
            raise failure(errno.EINVAL, self.path, "The store sent bytes behind the end of the file")
        self._cache.space.write(self._file, pieces, start)
        self._cache.space.grow(size)
        with self._lock:
            self._counted += size
            self._present.add(start, stop)
            self._is_saved = False
            woken = self._take_waiters_locked(lambda offset: self._present.contiguous(offset) > 0)
        for future in woken:
            _finish(future, None)

    def drop(self, start: int, stop: int) -> None:
        """Say that bytes are not what they should be: they count as missing again, also on disk."""
        with self._lock:
            self._present.remove(start, stop)
            self.is_verified = False
        self._cache.drop_present(self, start, stop)

    def mark_verified(self) -> None:
        """Note that the whole was compared with the store's hash."""
        with self._lock:
            self.is_verified = True
            self._is_saved = False

    def wait(self, offset: int) -> Future[None]:
        """Return what is done once the byte at `offset` is present, or fails when filling has failed meanwhile."""
        future: Future[None] = Future()
        with self._lock:
            if self._present.contiguous(offset) == 0 and offset < self.size:
                self._waiters.append((offset, future))
                return future
        future.set_result(None)
        return future

    def fail(self, error: BaseException) -> None:
        """Let all who wait hear that filling has failed."""
        with self._lock:
            woken = self._take_waiters_locked(lambda offset: True)
        for future in woken:
            _finish(future, error)

    def _take_waiters_locked(self, is_due: Callable[[int], bool]) -> list[Future[None]]:
        due = [future for offset, future in self._waiters if is_due(offset)]
        self._waiters = [each for each in self._waiters if each[1] not in due and not each[1].cancelled()]
        return due

    @property
    def is_saved(self) -> bool:
        """Whether all that is present is recorded."""
        return self._is_saved or self.is_dirty

    def save(self) -> None:
        """Record what is present, once it is on the disk. Nothing happens where nothing has changed."""
        with self._saving:
            with self._lock:
                if self._is_saved or self.is_dirty:
                    return
                self._is_saved = True
                present, verified = tuple(self._present), self.is_verified
            try:
                self._cache.save_present(self, present, verified=verified)
            except BaseException:
                with self._lock:
                    self._is_saved = False
                raise

    # --- what becomes of it; called by the cache

    def moved(self, path: str, id: str) -> None:  # noqa: A002 - what it is
        """The file has another name now."""
        with self._lock:
            self.path, self.id = path, id

    def is_now(self, entry: Entry) -> None:
        """The store has the file, too, as `entry`."""
        with self._lock:
            self.is_dirty, self.version, self.fingerprint = False, version_of(entry), entry.fingerprint


def _finish(future: Future[None], error: BaseException | None) -> None:
    """Complete a future that may have been cancelled meanwhile."""
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


class Draft:
    """A file that is being written; nobody else sees it. One thread at a time; not carried across a fork.

    It ends by `Cache.publish`, `publish_clean` or `abandon`. A process that is killed leaves it to recovery.
    """

    def __init__(
        self, cache: Cache, path: str, id: str, user: str, file: DataFile, *, size: int = 0, is_resumable: bool  # noqa: A002
    ) -> None:
        # Read only.
        self._cache = cache
        self._file = file
        self.path = path
        self.id = id
        self.user = user
        self.size = size
        # Whether what is there is the beginning of the file as the client has it: written in one go from the start.
        self._is_resumable = is_resumable
        self._is_announced = False
        # Bytes that were counted as taken before they came.
        self._reserved = size
        # Bytes that were on the disk when it was opened, and what they took there beyond that: it is counted already.
        self._synced = size if is_resumable else 0
        # Whether all that was written is on the disk for good.
        self._is_synced = False
        self._beyond = cache.files.taken(file.descriptor) - size if is_resumable else 0

    def __repr__(self) -> str:
        return f"<Draft {self.path!r} {self.size}>"

    @property
    def closed(self) -> bool:
        """Whether it was published or abandoned."""
        return self._file.is_closed

    @property
    def descriptor(self) -> int:
        """The file; -1 once it is closed."""
        return self._file.descriptor

    @property
    def is_partial(self) -> bool:
        """Whether a client could go on with it."""
        return self._is_resumable and self.size > 0

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write into the file; a gap before `offset` reads as zeros. ENOSPC where even eviction makes no room."""
        self._check_open()
        size = len(data) if isinstance(data, bytes) else data.nbytes
        stop = offset + size
        if offset != self.size:
            self._give_up_resuming()
        self._grow_to(stop, size)
        self._is_synced = False
        self._cache.space.write(self._file, [data], offset)
        self.size = max(self.size, stop)
        if self._is_resumable and self.size >= WORTH_RESUMING and not self._is_announced:
            self.announce()

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes."""
        self._check_open()
        return self._cache.files.pread(self.descriptor, min(size, max(0, self.size - offset)), offset)

    def truncate(self, size: int) -> None:
        """Cut the file, or let it grow by zeros."""
        self._check_open()
        if size != self.size:
            self._give_up_resuming()
        self._is_synced = False
        self._cache.files.truncate(self.descriptor, size)
        self.size = size

    def sync(self) -> None:
        """Return once all bytes, and the length, are on the disk for good."""
        if not self._is_synced:
            self.finish()
            self._cache.files.sync(self.descriptor)
            self._is_synced = True

    def reserve(self, size: int) -> None:
        """Take the space for a file of `size` bytes now. ENOSPC where there is not so much, after eviction."""
        self._check_open()
        if size > self._reserved:
            self._is_synced = False
            self._cache.space.reserve(self._file, size, size - self._reserved)
            self._reserved = size

    def pressure(self) -> Future[None] | None:
        """Return what is done when there is room for more; None where there is."""
        return self._cache.space.pressure()

    def announce(self) -> None:
        """Note whose upload this is, so that it can be resumed when the process is killed."""
        self._is_announced = True
        try:
            self._cache.announce(self, self._synced)
        except OSError as error:  # it would have been a courtesy
            logger.info("The upload of %r could not be resumed if the process was killed: %s", self.path, error)

    def finish(self) -> None:
        """Give back what was reserved and not used; called by the cache."""
        if self._reserved > self.size:
            self._is_synced = False
            self._cache.files.truncate(self.descriptor, self.size)
            self._cache.space.freed(self._reserved - self.size)
            self._reserved = self.size

    def close(self) -> None:
        """Close the file; called by the cache."""
        self._cache.space.correct(self._cache.files.taken(self.descriptor) - self._reserved - self._beyond)
        self._file.close()

    def _grow_to(self, stop: int, size: int) -> None:
        new = max(0, stop - self._reserved)
        if new:
            self._cache.space.check()
        self._cache.space.grow(new, size)
        self._reserved += new

    def _give_up_resuming(self) -> None:
        if self._is_announced:
            self._cache.withdraw(self)
        self._is_resumable = self._is_announced = False

    def _check_open(self) -> None:
        if self.closed:
            raise failure(errno.EBADF, self.path, "The file is closed")


def new_suffix() -> str:
    """Return the second half of an id that was never used."""
    return os.urandom(8).hex()
