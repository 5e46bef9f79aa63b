"""Open files that go through the disk cache: one class for reading, one for writing with or without reading.

Both are lazy: nothing is asked of the store before the first byte is wanted. Neither waits where it says that it does
not (`poll`, `accept`, `pressure`), so an event loop may call those. What becomes of a written file is decided by who
gave the callbacks.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ftpvfs.backend.backend import Entry
from ftpvfs.cache.downloader import TRIES, Reader
from ftpvfs.errors import failure
from ftpvfs.readiness import Awaited, Bytes, Readiness
from ftpvfs.vfs.handle import Confirm, VersionedHandle, WritingHandle
from ftpvfs.waiting import (
    Wait,
    WouldWait,
    about_to_wait,
    current_job,
    limited_to,
    result_of,
    shared_result_of,
    without_waiting,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Read from the data file at once.
MOST_READ = 2**20


class CachedReadHandle(VersionedHandle):
    """A file read through the cache, one version from the first byte to the last.

    `open_at(entry)` opens the cached item of a version.
    """

    is_in_file = True

    def __init__(
        self,
        path: str,
        name: str,
        entry: Entry,
        open_at: Callable[[Entry], Reader],
        refresh: Callable[[], Entry] | None = None,
        *,
        seekable: bool = True,
    ) -> None:
        super().__init__(path, name, entry, refresh, seekable=seekable)
        self._open_at = open_at
        self._reader: Reader | None = None
        self._is_outdated = False

    def hold_version(self) -> None:
        """Open the cached item where that needs no waiting: it can then be read whoever replaces or deletes the file.

        What cannot be opened, or not at once, is opened when the first byte is wanted.
        """
        with suppress(WouldWait, OSError):
            without_waiting(self._opened)

    # --- for an event loop

    def descriptor(self) -> int:
        """Return the data file, in which the file's bytes stand at their own offsets; only what `poll` found is there.
        """
        return self._current().item.descriptor

    def poll(self) -> Readiness:
        return self._poll_at(self._position)

    def advance(self, count: int) -> None:
        """Go past bytes that were ready and have been sent from the descriptor; what comes next is asked for."""
        self._position += count
        self._opened().advance(self._position)

    def verify(self) -> None:
        """Raise EIO when the bytes are not the store's, where the whole file is here and the store has a hash.

        Takes as long as hashing takes what is not hashed yet.
        """
        if self._reader is not None:
            self._reader.verify()

    # --- for everybody

    def fileno(self) -> int:
        """Return the data file once the whole file is in it; before, its holes would be taken for zeros."""
        self._check_open()
        if not self._current().item.complete or (self.size and not isinstance(self._poll_at(0), Bytes)):
            raise self._unsupported("The file is not yet whole in the cache")
        return self._opened().item.descriptor

    def take(self, limit: int) -> memoryview:
        """Return up to `limit` bytes, none at the end; waits for the first of them.

        Raises ECHANGED when the file is another version by now and part of this one has been handed out.
        """
        view = self.take_at(self._position, limit)
        self._position += len(view)
        return view

    def take_at(self, offset: int, limit: int) -> memoryview:
        """The same from any offset on, wherever the position is."""
        count = self._awaited(offset) if limit > 0 else 0
        if not count:
            return memoryview(b"")
        reader = self._current()
        data = os.pread(reader.item.descriptor, min(limit, count, MOST_READ), offset)
        if not data:
            raise failure(errno.EIO, self.path, "The data file in the cache is shorter than it should be")
        reader.advance(offset + len(data))
        return memoryview(data)

    def fill(self) -> Future[None]:
        """Have all of the file fetched. The future fails with what went wrong."""
        done: Future[None] = Future()
        self._fill_on(done)
        return done

    def _fill_on(self, done: Future[None]) -> None:
        try:
            while (offset := self._first_missing()) is not None:
                if isinstance(found := self._look_at(offset), Awaited):
                    # Not in the thread that completes it, which may be the store's: there may be a question to ask.
                    go_on = partial(self._current().run, partial(self._fill_on, done))
                    found.future.add_done_callback(lambda _, go_on=go_on: go_on())  # type: ignore[misc]
                    return
        except BaseException as error:  # noqa: BLE001 - it belongs to who waits
            _finish(done, error)
        else:
            _finish(done)

    def _first_missing(self) -> int | None:
        missing = next(iter(self._current().item.missing(0, self.size)), None)
        return None if missing is None else missing[0]

    @property
    def reader(self) -> Reader:
        """The way through the cached item."""
        return self._current()

    # --- which version

    def _opened(self) -> Reader:
        if self._reader is None:
            self._reader = self._open_at(self.entry)
            if self._reader.item.size != self.entry.size:  # it was written here since the entry was looked up
                self.entry = replace(self.entry, size=self._reader.item.size)
        return self._reader

    def _current(self) -> Reader:
        """Return the way through the item of a version that is there, a newer one where the one looked up is gone."""
        self._check_open()
        while True:
            try:
                if self._is_outdated:
                    self._take_newer()
                return self._opened()
            except OSError as error:
                self._outdate(error)

    def _poll_at(self, offset: int) -> Readiness:
        found = self._look_at(offset)
        self._pinned = self._pinned or isinstance(found, Bytes)
        return found

    def _look_at(self, offset: int) -> Readiness:
        """Return what `poll` does to one who hands out none of it, so that a newer version may still be taken."""
        while True:
            reader = self._current()
            try:
                return reader.poll(offset)
            except OSError as error:
                self._outdate(error)

    def _outdate(self, error: OSError) -> None:
        """Note that the version is gone of which nobody has seen a byte; raise any other error."""
        if self._is_outdated or not self._may_take_newer(error):
            raise error
        self._is_outdated = True

    def _take_newer(self) -> None:
        entry = self._newer_version()
        self._is_outdated = False
        self._drop_reader()
        self.entry = entry

    def _awaited(self, offset: int) -> int:
        """Return how many bytes are here once there are any, 0 at the end."""
        while isinstance(found := self._poll_at(offset), Awaited):
            about_to_wait(Wait.STORE)
            try:
                result_of(found.future, self.path)
            except OSError:  # which `poll` knows what to do about, unless it is that nobody wants to wait any more
                if not found.future.done() or _is_unwanted():
                    raise
            self._check_open()
        return found.count if isinstance(found, Bytes) else 0

    def _drop_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def close(self) -> None:
        if not self.closed:
            self._drop_reader()
        super().close()

    def __del__(self) -> None:
        # Not here: the collector may run inside of any call of the cache, with locks held.
        if self._reader is not None and self._pid == os.getpid():
            self._reader.close_later()


def _finish(future: Future[None], error: BaseException | None = None) -> None:
    """Complete a future that who waits may have cancelled."""
    with suppress(InvalidStateError):
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _is_unwanted() -> bool:
    job = current_job()
    return job is not None and job.is_cancelled


class Draft(Protocol):
    """What is written before it is published: a file of its own in the cache."""

    @property
    def size(self) -> int:
        """Bytes in it."""

    def write(self, offset: int, data: memoryview) -> object:
        """Write at the offset; what lies between the end and it reads as zeros."""

    def read(self, offset: int, size: int) -> bytes:
        """Return up to so many bytes, none at the end."""

    def truncate(self, size: int) -> None:
        """Make it so long."""

    def reserve(self, size: int) -> None:
        """Make sure of the space for so many bytes; raise ENOSPC."""

    def pressure(self) -> Future[None] | None:
        """Return a future to await before more is written, None when more may come."""


D = TypeVar("D", bound=Draft)


class Preparing(Generic[D]):
    """The making of a draft that takes a while, as where its base has to be fetched first. Any thread."""

    def __init__(
        self,
        base: CachedReadHandle | None,
        begin: Callable[[CachedReadHandle | None], D],
        run: Callable[[Callable[[], object]], None],
        give_up: Callable[[D], None],
        *,
        may_begin_anew: bool,
    ) -> None:
        """`may_begin_anew`: a base that is gone by now is no failure; what is written makes a new file."""
        # Done, or failed, when there is something to say.
        self.done: Future[None] = Future()
        self._may_begin_anew = may_begin_anew
        self._base = base
        self._begin = begin
        self._run = run
        self._abandon_draft = give_up
        self._tries = 0
        self._filling: Future[None] | None = None
        self._lock = threading.Lock()
        # Protected by _lock.
        self._draft: D | None = None
        self._is_over = False

    def start(self) -> None:
        """Fetch what is missing; then make the draft."""
        self._tries += 1
        self._run(self._make if self._base is None else self._fill)  # to open the base waits for the disk, too

    def _fill(self) -> None:
        assert self._base is not None
        self._filling = self._base.fill()
        self._filling.add_done_callback(self._filled)

    @property
    def waits_for(self) -> Wait:
        """What it waits for: the store, as long as the base is not here in full."""
        return Wait.STORE if self._filling is not None and not self._filling.done() else Wait.DISK

    def draft(self) -> D:
        """Return the draft, once; raises why there is none."""
        self.done.result()
        with self._lock:
            draft, self._draft = self._draft, None
        assert draft is not None
        return draft

    def give_up(self) -> None:
        """Nobody wants the draft any more, whether it is made or not."""
        with self._lock:
            self._is_over = True
            draft, self._draft = self._draft, None
        if draft is not None:
            self._abandon_draft(draft)

    def _filled(self, filled: Future[None]) -> None:
        error = filled.exception()
        if isinstance(error, FileNotFoundError) and self._may_begin_anew:
            self._base = None  # whoever deleted it came first
        elif error is not None:
            _finish(self.done, error)
            return
        self._run(self._make)

    def _make(self) -> None:
        try:
            if self._base is not None:
                self._base.verify()
                if not self._base.reader.item.complete and self._tries < TRIES:
                    self.start()  # what came was damaged, and nobody has seen it
                    return
            draft = self._begin(self._base)
        except BaseException as error:  # noqa: BLE001 - it belongs to who waits
            _finish(self.done, error)
            return
        with self._lock:
            is_over = self._is_over
            self._draft = None if is_over else draft
        if is_over:
            self._abandon_draft(draft)
        _finish(self.done)


class CachedWriteHandle(WritingHandle, Generic[D]):
    """A file written through the cache, at any offset; read, too, where `flags` say so.

    `base` reads the version that is changed; None where the file begins empty, or where `begin` knows what it goes on
    from (then `size` is how long that is). `begin` makes the draft out of the complete base, in any thread, and
    `publish` makes it the file; `give_up` gets a draft that will not be. Where nothing is written to a file that was
    there, nothing is published. `admit(more)` raises why there is no room for so many bytes more (0: nobody knows how
    many), or returns a future to await before it is asked again.
    """

    last_step_waits_for = Wait.DISK
    abandon_waits_for = Wait.DISK

    def __init__(
        self,
        path: str,
        name: str,
        flags: int,
        *,
        begin: Callable[[CachedReadHandle | None], D],
        publish: Callable[[D, Confirm], None],
        give_up: Callable[[D], None],
        run: Callable[[Callable[[], object]], None],
        admit: Callable[[int], Future[None] | None] = lambda more: None,
        base: CachedReadHandle | None = None,
        size: int = 0,
        creates: bool = True,
        autocommit: bool = True,
        seekable: bool = True,
    ) -> None:
        super().__init__(path, name, autocommit=autocommit)
        access = flags & os.O_ACCMODE
        self.mode = {os.O_RDONLY: "rb", os.O_WRONLY: "wb"}.get(access, "rb+")
        self._reads = access != os.O_WRONLY
        self._writes = access != os.O_RDONLY
        self._appends = bool(flags & os.O_APPEND)
        # Whether what is appended makes a new file where there is none.
        self._appends_or_creates = flags & (os.O_APPEND | os.O_CREAT) == os.O_APPEND | os.O_CREAT
        self._begin = begin
        self._publish = publish
        self._abandon_draft = give_up
        self._run = run
        self._admit = admit
        self._base = base
        self._size = base.size if base is not None else size
        self._creates = creates
        self._seekable = seekable
        self._position = 0
        self._reserved = 0
        self._draft: D | None = None
        # Written before the base was here; `None` is the end of the file.
        self._early: list[tuple[int | None, bytes]] = []
        self._preparing: Preparing[D] | None = None
        # Bytes that another thread is writing, since room must be made for them.
        self._late: Future[None] | None = None

    @property
    def size(self) -> int:
        """Bytes in the file as it would be published."""
        return self._size

    def readable(self) -> bool:
        return self._reads

    def writable(self) -> bool:
        return self._writes

    def seekable(self) -> bool:
        return self._seekable

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, also behind the end: what is written there leaves a hole that reads as zeros."""
        self._position = self._sought(offset, whence, self._position, self._size)
        return self._position

    def resume(self, offset: int) -> None:
        """Go on writing at the offset, as REST asks; EINVAL behind the end, where there would be a hole."""
        if offset > self._size:
            raise failure(errno.EINVAL, self.path, f"There are {self._size} bytes; nothing can go on at {offset}")
        self._position = offset

    # --- writing

    def accept(self, data: ReadableBuffer) -> None:
        """Take all of `data` without waiting for the store; while there is `pressure`, no more should come.

        Raises ENOSPC and the like. After an error nothing can be published any more.
        """
        if not self._writes:
            raise self._unsupported("The file is open for reading alone")
        with self._failing_for_good():
            view = memoryview(data).cast("B")
            offset = None if self._appends else self._position
            if view and self._is_ready():
                self._put(offset, view)
            elif view:
                self._early.append((offset, bytes(view)))
                self._moved(self._size if offset is None else offset, len(view))

    def write(self, data: ReadableBuffer) -> int:
        """Take all of `data`; waits for the base to be fetched before the first write, and for space."""
        self.accept(data)
        with self._failing_for_good():
            while (busy := self.pressure()) is not None:
                shared_result_of(busy, self.path)
        return memoryview(data).nbytes

    def pressure(self) -> Future[Any] | None:
        """Return a future to await before more is written; None when more may come."""
        if self._preparing is not None and not self._preparing.done.done():
            return self._preparing.done
        if self._early or self._late is not None:
            with self._failing_for_good():
                self._is_ready()
        if self._late is not None:
            return self._late
        return self._draft.pressure() if self._draft is not None else None

    def admit(self) -> Future[None] | None:
        return self._admit(0)

    def reserve(self, size: int) -> None:
        """Say how long the file will be, as ALLO does; raises EFBIG, ENOSPC or EFULL where it cannot be."""
        self._admit(size if self._base is not None else max(0, size - self._size))
        self._reserved = size
        if self._draft is not None:
            self._draft.reserve(size)

    def truncate(self, size: int | None = None) -> int:
        """Make the file `size` bytes long, None: as long as the position says; zeros are added where it was shorter."""
        if not self._writes:
            raise self._unsupported("The file is open for reading alone")
        with self._failing_for_good():
            size = self._position if size is None else size
            if size < 0:
                raise failure(errno.EINVAL, self.path, f"A length of {size} bytes")
            if size == 0:
                self._drop_base()
            self._prepared().truncate(size)
            self._size = size
        return size

    def _is_ready(self) -> bool:
        """Tell whether the draft takes bytes now: it is here, and has all that came before."""
        if self._late is not None and self._late.done():
            late, self._late = self._late, None
            late.result()
        if self._late is None and self._is_prepared() and self._early:
            self._put_early()
        return self._draft is not None and self._late is None and not self._early

    def _put(self, offset: int | None, view: memoryview) -> None:
        draft = self._draft
        assert draft is not None
        start = draft.size if offset is None else offset
        try:
            with limited_to(Wait.NOTHING):
                draft.write(start, view)
        except WouldWait:
            self._put_late(draft, start, bytes(view))
        self._moved(start, len(view))

    def _put_late(self, draft: D, start: int, data: bytes) -> None:
        """Write in another thread what has to wait until there is room on the disk."""
        self._late = late = Future[None]()

        def write() -> None:
            try:
                draft.write(start, memoryview(data))
            except BaseException as error:  # noqa: BLE001 - it belongs to who waits
                _finish(late, error)
            else:
                _finish(late)

        self._run(write)

    def _put_early(self) -> None:
        assert self._draft is not None
        self._size = self._draft.size  # what was thought to be the end may not have been
        while self._early and self._late is None:
            offset, data = self._early.pop(0)
            self._put(offset, memoryview(data))
        for offset, data in self._early:
            self._moved(self._size if offset is None else offset, len(data))

    def _moved(self, start: int, count: int) -> None:
        self._position = start + count
        self._size = max(self._size, self._position)

    # --- the draft

    def _is_prepared(self) -> bool:
        """Tell whether the draft is here; else begin to make it, where that takes a while."""
        if self._draft is None and self._preparing is None:
            if self._base is None and not self._size and not self._reserved:
                self._take_up(self._begin(None))
            else:
                self._prepare(self._base)
        if self._draft is None and self._preparing is not None and self._preparing.done.done():
            self._take_up(self._preparing.draft())
        return self._draft is not None

    def _prepared(self) -> D:
        """Return the draft; waits for the base."""
        while not self._is_prepared():
            assert self._preparing is not None
            about_to_wait(self._preparing.waits_for)
            shared_result_of(self._preparing.done, self.path)
        while not self._is_ready():
            assert self._late is not None
            about_to_wait(Wait.DISK)
            shared_result_of(self._late, self.path)
        assert self._draft is not None
        return self._draft

    def _take_up(self, draft: D) -> None:
        self._draft = draft
        if not self._early:
            self._size = draft.size
        if self._reserved:
            draft.reserve(self._reserved)

    def _prepare(self, base: CachedReadHandle | None) -> None:
        """Have the draft made in threads that nobody here waits for: the whole base is fetched and cloned first."""
        self._preparing = prepared = Preparing(
            base, self._begin_with_room, self._run, self._abandon_draft, may_begin_anew=self._appends_or_creates
        )
        prepared.start()

    def _begin_with_room(self, base: CachedReadHandle | None) -> D:
        draft = self._begin(base)
        if self._reserved:
            try:
                draft.reserve(self._reserved)
            except BaseException:
                self._abandon_draft(draft)
                raise
        return draft

    def _drop_base(self) -> None:
        """Let go of what was there: nothing of it will be left."""
        if self._draft is None and self._preparing is None and self._base is not None:
            self._base.close()
            self._base = None

    # --- reading

    def take(self, limit: int) -> memoryview:
        """Return up to `limit` bytes of what is there and was written, none at the end."""
        if not self._reads:
            raise self._unsupported("The file is open for writing alone")
        self._check_open()
        if self._base is not None and self._draft is None and self._preparing is None:
            view = self._base.take_at(self._position, limit)
        elif self._position >= self._size or limit <= 0:
            return memoryview(b"")
        else:
            view = memoryview(self._prepared().read(self._position, min(limit, MOST_READ)))
        self._position += len(view)
        return view

    # --- the end

    def _publish_all(self, confirm: Confirm) -> None:
        if self._creates or self._draft is not None or self._preparing is not None:
            self._publish(self._prepared(), confirm)
        else:
            confirm()
        self._close_base()

    def _give_up(self) -> None:
        draft, self._draft = self._draft, None
        self._close_base()
        late, self._late = self._late, None
        if draft is not None and late is not None and not late.done():
            # Its file must not be closed while it is written.
            late.add_done_callback(lambda _: self._run(lambda: self._abandon_draft(draft)))
        elif draft is not None:
            self._abandon_draft(draft)
        elif self._preparing is not None:
            self._preparing.give_up()

    def __del__(self) -> None:
        # Not here: the collector may run inside of any call of the cache, with locks held.
        if not self.closed and self._pid == os.getpid():
            self._run(self.abandon)

    def _close_base(self) -> None:
        if self._base is not None:
            self._base.close()
