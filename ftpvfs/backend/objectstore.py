"""What S3 and GCS have in common: no folders, whole immutable objects, and an fsspec filesystem that runs on asyncio.

fsspec runs all its requests on one event loop in a thread of its own; a request is started from any thread and waited
for there, so that parallel requests cost no threads of ours.
"""

from __future__ import annotations

import asyncio
import builtins
import errno
import hashlib
import logging
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from ftpvfs import paths
from ftpvfs.backend.backend import (
    ANY,
    Backend,
    Condition,
    Deliver,
    Entry,
    FileUpload,
    Pieces,
    Replaces,
    Tuning,
    Upload,
    not_replaceable,
    read_exactly,
)
from ftpvfs.backend.checksum import Checksum
from ftpvfs.backend.retry import without_frames
from ftpvfs.errors import ECHANGED, ENOSTORE, EUNSUPPORTED, failure
from ftpvfs.waiting import Wait, about_to_wait, result_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Parts of one upload on their way at once. Measured against SeaweedFS on two cores: 2 is slower, 8 no faster.
UPLOAD_CONCURRENCY = 4
# What an upload takes of the memory budget at a time, as its bytes come.
RESERVATION = 2**20
# Bytes a second, for each of them. A guess: below it a time-out is likelier than a line that slow.
SLOWEST_UPLOAD = 16 * 1024
# True modification times asked for at once, for each of the `checkers`.
MTIME_BATCH = 1000
# Bytes of UTF-8 in a key, at S3 and at GCS:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
# https://cloud.google.com/storage/docs/objects#naming
LONGEST_KEY = 1024


class ObjectStoreBackend(Backend):
    """A bucket, or a prefix in one. Any thread; not carried across a fork."""

    fs: Any

    def __init__(self, url: str, root: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
        super().__init__(url, root, storage_options, tuning)
        self.bucket, _, self.prefix = root.strip("/").partition("/")
        self._knows_conditions = True  # until the store says that it does not
        # Whether the bucket is known to be there: since an answer that proves it, until the store says that it is not.
        # Touched on fsspec's event loop alone.
        self._is_bucket_seen = False

    # --- the bridge to fsspec's event loop

    def spawn(self, path: str, request: Callable[[], Awaitable[T]]) -> Future[T]:
        """Start a request, with retries and translated errors; cancelling the future cancels the request."""
        return asyncio.run_coroutine_threadsafe(self._guarded(path, request), self.fs.loop)

    def ask(self, path: str, request: Callable[[], Awaitable[T]]) -> T:
        """Make a request and wait for its outcome."""
        about_to_wait(Wait.STORE)
        return result_of(self.spawn(path, request), path)

    async def _guarded(self, path: str, request: Callable[[], Awaitable[T]]) -> T:
        try:
            outcome = await self.retry.acall(request)
        except Exception as error:  # noqa: BLE001 - translated
            del request  # may have bytes with it, which nobody needs any more
            raise self._known(error, path) from without_frames(error)
        self.tuning.answered()
        return outcome

    def _known(self, error: Exception, path: str) -> OSError:
        """Return a failure as an OSError, and note what it says of the whole store."""
        known = self.failed(error, path)
        if known.errno == ENOSTORE:
            self._bucket_is_missing()
        return known

    def _bucket_is_missing(self) -> None:
        if self._is_bucket_seen:
            self._is_bucket_seen = False
            self.when_gone()

    async def require_bucket(self) -> None:
        """Raise ENOSTORE where there is no bucket; the store is asked only while that is not known.

        To be called before anything is stored: some stores make a bucket that is missing for its first object.
        """
        if self._is_bucket_seen:
            return
        try:
            await self._check()
        except Exception as error:
            if self.translated(error, "").errno != errno.EACCES:
                raise
            self._is_bucket_seen = True  # it may be written to and not listed

    async def within_time(self, size: int, request: Awaitable[T]) -> T:
        """Make a request that sends `size` bytes, unless it takes longer than on the slowest line that is of any use.

        aiohttp's own clock starts when the body is out: a store that takes no more of it, or never says 100-continue
        (which botocore waits for), would hang the upload for ever.
        """
        limit = self.tuning.read_timeout + size / SLOWEST_UPLOAD if self.tuning.read_timeout else None  # 0 is off
        return await asyncio.wait_for(request, limit)

    async def gather(self, requests: Iterable[Callable[[], Awaitable[Any]]]) -> list[Any]:
        """Make many requests, `checkers` at a time; return outcomes and exceptions in their order."""
        gate = asyncio.Semaphore(self.tuning.checkers)

        async def gated(request: Callable[[], Awaitable[Any]]) -> Any:
            async with gate:
                return await self.retry.acall(request)

        return await asyncio.gather(*(gated(request) for request in requests), return_exceptions=True)

    # --- what each store answers for itself

    @abstractmethod
    def pages(self, prefix: str, *, delimiter: str, limit: int | None = None) -> AsyncIterator[ListedPage]:
        """Yield what the store lists under a prefix of keys, page by page; at most `limit` entries where given."""

    @abstractmethod
    async def head(self, path: str) -> Entry:
        """Return the entry of one object, its true modification time included."""

    @abstractmethod
    async def read(self, path: str, start: int, stop: int, fingerprint: str | None) -> Pieces:
        """Return the bytes [start, stop) of one version."""

    @abstractmethod
    async def hash_of(self, path: str, entry: Entry) -> Checksum | None:
        """Return the store's hash of one version, None where it has none."""

    @abstractmethod
    async def delete(self, path: str, only: str | None = None) -> None:
        """Delete one object, of the version `only` where that is given; no error where there is none."""

    @abstractmethod
    async def put(self, path: str, data: bytes, mtime: float | None, replaces: Condition = ANY) -> Entry:
        """Store a whole object in one request, verified, where `replaces` (see `upload`) allows it."""

    @abstractmethod
    async def duplicate(self, source: str, target: str, mtime: float | None) -> Entry:
        """Copy one object inside the store; `mtime` None keeps the source's."""

    # --- conditions

    async def conditional(
        self, path: str, replaces: Condition, request: Callable[[Condition], Awaitable[T]]
    ) -> T:
        """Make a request under a condition; a store that knows none is asked right before what it has."""
        if self._knows_conditions or replaces is ANY:
            try:
                return await request(replaces)
            except Exception as error:
                if replaces is ANY or self.translated(error, path).errno != EUNSUPPORTED:
                    raise
                logger.warning("%s knows no conditional requests; it is asked before each change instead", self.display)
                self._knows_conditions = False
        await self.require_now(path, replaces)
        return await request(ANY)

    async def require_now(self, path: str, replaces: Condition) -> None:
        """Raise ECHANGED where the object is not what may be replaced; `require` for the event loop."""
        if replaces is ANY:
            return
        try:
            found = (await self.head(path)).fingerprint
        except Exception as error:
            if self.translated(error, path).errno != errno.ENOENT:
                raise
            found = None
        if found != (None if replaces is Replaces.ABSENT else replaces):
            raise not_replaceable(path, replaces)

    def is_refusal(self, error: BaseException, path: str, replaces: Condition) -> bool:
        """Tell whether a conditional request failed for its condition."""
        return replaces is not ANY and self.translated(error, path).errno == ECHANGED

    # --- the backend's contract

    def check(self) -> None:
        try:
            self.ask("", self._check)
        except OSError as error:
            raise failure(error.errno or errno.EIO, self.display, error.strerror) from error

    async def _check(self) -> None:
        await anext(self.pages(self.folder_key(""), delimiter="/", limit=1))
        self._is_bucket_seen = True

    def key(self, path: str) -> str:
        """Return the object's name in the bucket; EINVAL for one that is not UTF-8.

        gcsfs would write such a name with other characters, and two names could become one object.
        """
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise failure(errno.EINVAL, path, "The store's names are UTF-8, and this is not") from error
        return paths.key(self.prefix, path)

    def check_name(self, path: str) -> None:
        """Raise EINVAL or ENAMETOOLONG for a key that the store does not take, as a file's or a folder marker's."""
        length = len(self.folder_key(path).encode())
        if length > LONGEST_KEY:
            what = f"its key, with the slash of a folder, has {length} bytes of UTF-8 and the store takes {LONGEST_KEY}"
            raise failure(errno.ENAMETOOLONG, path, f"The name is too long: {what}")

    def folder_key(self, path: str) -> str:
        """Return the prefix that all keys in the folder have."""
        key = self.key(path)
        return key + "/" if key else ""

    def list(self, path: str) -> list[Entry]:
        """List one folder, a page at a time, so that the store's own bulky answers never pile up."""
        return self.ask(path, lambda: self._list(path))

    async def _list(self, path: str) -> builtins.list[Entry]:
        entries: dict[str, Entry] = {}
        found = not path
        async for page in self.pages(self.folder_key(path), delimiter="/"):
            self._is_bucket_seen = True
            self.tuning.answered()  # a long listing is no silence
            found = found or page.found
            for entry in page.entries:
                self._add(entries, entry, path)
        if not found:
            raise failure(errno.ENOENT, path)
        return list(entries.values())

    def _add(self, entries: dict[str, Entry], entry: Entry, folder: str) -> None:
        if not paths.is_listable(entry.name):
            logger.warning("%r in %r cannot be shown over FTP and is left out", entry.name, folder)
        elif entry.name not in entries or entries[entry.name].is_dir:
            entries[entry.name] = entry

    def stat(self, path: str) -> Entry:
        if not path:
            return Entry("", is_dir=True)
        return self.ask(path, lambda: self._stat(path))

    async def _stat(self, path: str) -> Entry:
        try:
            entry = await self.head(path)
        except Exception as error:
            if self.translated(error, path).errno != errno.ENOENT:
                raise
        else:
            self._is_bucket_seen = True
            return entry
        async for page in self.pages(self.folder_key(path), delimiter="/", limit=1):
            self._is_bucket_seen = True
            if page.found:
                return Entry(paths.split(path)[1], is_dir=True)
        raise failure(errno.ENOENT, path)

    def fetch(
        self, path: str, start: int, stop: int, fingerprint: str | None, deliver: Deliver | None = None
    ) -> Future[Pieces]:
        if deliver is None:
            return self.spawn(path, lambda: self.read(path, start, stop, fingerprint))
        arrived = start  # where another try goes on after one that broke

        async def take(piece: bytes) -> None:
            nonlocal arrived
            arrived += len(piece)
            busy = deliver(piece)
            if busy is not None:
                await asyncio.wrap_future(busy)

        async def request() -> Pieces:
            if arrived < stop:
                await self.stream(path, arrived, stop, fingerprint, take)
            return []

        return self.spawn(path, request)

    async def stream(
        self, path: str, start: int, stop: int, fingerprint: str | None, take: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Hand over the bytes [start, stop) of one version while they arrive."""
        for piece in await self.read(path, start, stop, fingerprint):
            await take(piece)

    def ask_checksum(self, path: str, entry: Entry) -> Future[Checksum | None]:
        return self.spawn(path, lambda: self.hash_of(path, entry))

    def walk(self, path: str) -> Iterator[tuple[str, Entry]]:
        prefix = self.folder_key(path)
        pages = self.pages(prefix, delimiter="")
        while True:
            page = self.ask(path, lambda: anext(pages, None))  # one page in memory at a time
            if page is None:
                return
            for entry in page.entries:
                yield paths.join(path, entry.name), entry
            if page.has_marker:
                yield path + "/", Entry("", is_dir=False)

    def require(self, path: str, replaces: Condition) -> None:
        if replaces is not ANY:
            self.ask(path, lambda: self.require_now(path, replaces))

    def remove(self, path: str, *, only: str | None = None) -> None:
        self.ask(path, lambda: self.delete(path, only))

    def remove_many(self, paths: Iterable[str]) -> None:
        failures = []
        remaining = iter(paths)
        while batch := list(islice(remaining, MTIME_BATCH)):
            outcomes = self.ask(batch[0], lambda names=batch: self.gather(  # type: ignore[misc]
                [lambda name=name: self.delete(name) for name in names]))  # type: ignore[misc]
            for name, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    failures.append((name, outcome))
        for name, outcome in failures[:1]:
            raise self.translated(outcome, name) from outcome

    async def store(self, path: str, data: bytes, mtime: float | None, replaces: Condition = ANY) -> Entry:
        """As `put`, where there is a bucket."""
        await self.require_bucket()
        return await self.put(path, data, mtime, replaces)

    def mkdir(self, path: str) -> None:
        self.ask(path, lambda: self.store(path + "/", b"", None))

    def rmdir(self, path: str) -> None:
        self.require_empty(path)
        self.ask(path, lambda: self.delete(path + "/"))

    def require_empty(self, path: str) -> None:
        self.ask(path, lambda: self._require_empty(path))

    async def _require_empty(self, path: str) -> None:
        async for page in self.pages(self.folder_key(path), delimiter="/", limit=1):
            for entry in page.entries:
                raise self.not_empty(path, entry.name)

    def copy(self, source: str, target: str) -> Entry:
        return self.ask(source, lambda: self.duplicate(source, target, None))

    def set_mtime(self, path: str, mtime: float) -> Entry:
        return self.ask(path, lambda: self.duplicate(path, path, mtime))

    def true_mtimes(self, folder: str, entries: Iterable[Entry]) -> None:
        remaining = iter(entries)
        while batch := list(islice(remaining, MTIME_BATCH)):
            heads = self.ask(folder, lambda names=batch: self.gather(  # type: ignore[misc]
                [lambda name=entry.name: self.head(paths.join(folder, name)) for entry in names]))  # type: ignore[misc]
            for entry, head in zip(batch, heads, strict=True):
                if isinstance(head, Entry):
                    entry.mtime = head.mtime
                else:
                    entry.mtime = self._time_otherwise(entry, folder, head)

    def _time_otherwise(self, entry: Entry, folder: str, error: BaseException) -> float | None:
        """Return a time for an object that could not be asked; one that may not be read must not hide its folder."""
        known = self.translated(error, paths.join(folder, entry.name))
        if known.errno not in {errno.ENOENT, errno.EACCES, errno.EINVAL}:
            raise known from error
        return None if entry.stamp is None else float(entry.stamp)


class ListedPage:
    """One page of a listing: entries named relative to the prefix, and whether anything at all was there."""

    __slots__ = ("entries", "has_marker")

    def __init__(self, entries: list[Entry], *, has_marker: bool) -> None:
        self.entries = entries
        self.has_marker = has_marker

    @property
    def found(self) -> bool:
        """Whether the prefix exists as a folder."""
        return self.has_marker or bool(self.entries)


class PartsUpload(Upload):
    """An object that is sent in parts while it arrives. One thread at a time.

    What is smaller than one part goes in one request at `commit`. Else parts of `part_size(number)` bytes leave as soon
    as they are full, up to `concurrency` at once; more is to wait while no more may leave. All bytes that are held, on
    their way or not, are taken from the memory budget, which may be exceeded by the one part that is collected.
    """

    concurrency = UPLOAD_CONCURRENCY
    # What is left of a file after the full parts goes as a part like the others, beside them.
    ends_with_part = True

    def __init__(
        self, backend: ObjectStoreBackend, path: str, mtime: float | None, replaces: Condition
    ) -> None:
        self.backend = backend
        self.path = path
        self.mtime = mtime
        self.replaces = replaces
        self.size = 0
        self._memory = backend.tuning.memory
        self._is_over = False  # committed or given up
        self._pieces: list[bytes | memoryview] = []
        self._pending = 0
        self._reserved = 0  # of the memory budget, for the pieces
        self._parts: list[Future[Any]] = []
        self._in_flight: deque[Future[Any]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()  # touched on the event loop alone

    # --- what each store answers for itself

    def part_size(self, number: int) -> int:
        """Return the size at which part `number`, counted from 0, is full."""
        raise NotImplementedError

    async def send(self, number: int, offset: int, data: bytes | Slice) -> Any:
        """Send one full part; return what `finish` needs to know of it."""
        raise NotImplementedError

    async def finish(self, parts: list[Any], rest: bytes) -> Entry:
        """Send what is left after the last full part and publish the object, verified."""
        raise NotImplementedError

    async def discard(self) -> None:
        """Forget the parts at the store."""
        raise NotImplementedError

    # --- the upload's contract

    def accept(self, data: bytes | memoryview) -> None:
        self._raise_if_over()
        self._pieces.append(bytes(data))
        self._pending += len(data)

    def pressure(self) -> Future[Any] | None:
        """Send what can be sent; return the future to await before more is written, or None when more may come."""
        while True:
            self._reap()
            size = self.part_size(len(self._parts))
            if self._reserved < self._pending:
                if not self._memory.take(RESERVATION, force=not self._in_flight):
                    return self._in_flight[0]
                self._reserved += RESERVATION
            elif self._pending < size:
                return None
            elif len(self._in_flight) >= self.concurrency:
                return self._in_flight[0]
            else:
                self._send(self._cut(size))

    def _reap(self) -> None:
        """Drop finished parts from the front; a failed one fails the upload here and now."""
        while self._in_flight and self._in_flight[0].done():
            self._in_flight.popleft().result()

    def _cut(self, size: int) -> bytes:
        """Take exactly `size` bytes out of the pieces, copying each once."""
        last = self._pieces.pop()
        beyond = self._pending - size
        kept = memoryview(last)[: len(last) - beyond]
        part = b"".join([*self._pieces, kept])
        self._pieces, self._pending = ([bytes(memoryview(last)[len(kept) :])], beyond) if beyond else ([], 0)
        return part

    def send_slice(self, part: Slice) -> None:
        """Send a part of a file as soon as there is room for it; blocks until then."""
        self._raise_if_over()
        while True:
            self._reap()
            if len(self._in_flight) < self.concurrency and self._memory.take(len(part), force=not self._in_flight):
                break
            self._in_flight[0].result()
        self._reserved = len(part)
        self._send(part)

    def take_last(self, part: Slice) -> None:
        """Take over what `commit` sends, beside the parts or alone."""
        self._memory.take(len(part), force=True)
        self._reserved = len(part)
        self._pieces.append(part.read())
        self._pending = len(part)

    def _send(self, part: bytes | Slice) -> None:
        number, offset, reserved = len(self._parts), self.size, self._reserved
        self.size += len(part)
        self._reserved = 0
        memory = self._memory
        future = self.backend.spawn(self.path, lambda: self._tracked(number, offset, part))
        future.add_done_callback(lambda _: memory.give(reserved))
        self._parts.append(future)
        self._in_flight.append(future)

    async def _tracked(self, number: int, offset: int, part: bytes | Slice) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await self.backend.require_bucket()
        return await self.send(number, offset, part)

    def prepare(self) -> None:
        """Await the parts that are on their way; what is sent with the publishing request itself is not sent yet."""
        self._raise_if_over()
        for part in self._parts:
            part.result()

    def commit(self) -> Entry:
        self._raise_if_over()
        rest = b"".join(self._pieces)
        if not self._parts:
            entry = self.backend.ask(
                self.path, lambda: self.backend.store(self.path, rest, self.mtime, self.replaces)
            )
        else:
            parts = list(map(Future.result, self._parts))  # no frame of ours that an error could hold, and it a part
            entry = self.backend.ask(self.path, lambda: self.finish(parts, rest))
        self._is_over = True
        self._let_go()
        return entry

    def _let_go(self) -> None:
        """Forget the pieces and give their memory back."""
        self._memory.give(self._reserved)
        self._parts, self._pieces, self._pending, self._reserved = [], [], 0, 0

    def _raise_if_over(self) -> None:
        if self._is_over:
            raise failure(errno.EIO, self.path, "The upload is over")

    def abort(self) -> None:
        self._is_over = True
        was_begun = bool(self._parts)
        self._let_go()
        if not was_begun:
            return
        for part in self._in_flight:
            part.cancel()
        self._in_flight = deque()
        try:
            self.backend.ask(self.path, self._discard_settled)
        except OSError as error:
            if error.errno != errno.ENOENT:  # never begun, or forgotten by the store itself
                logger.warning("parts of a broken upload of %r may be left at the store: %s", self.path, error)

    async def _discard_settled(self) -> None:
        """Discard once no part is on its way any more: one that lands after the discard would stay at the store."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.discard()


@dataclass(frozen=True)
class Slice:
    """A range of an open file, read when it is sent."""

    descriptor: int
    start: int
    stop: int
    path: str

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self) -> bytes:
        """Return the bytes."""
        return read_exactly(self.descriptor, self.start, len(self), self.path, code=errno.EIO)


def bytes_of(data: bytes | Slice) -> bytes:
    """Return the bytes of a part; reads the disk where they are a file's."""
    return data.read() if isinstance(data, Slice) else data


class PartsFile(FileUpload):
    """A file sent in parts, each read from the disk when its turn comes."""

    def __init__(self, upload: PartsUpload, descriptor: int, size: int) -> None:
        self._upload = upload
        self._descriptor = descriptor
        self._size = size
        self._position = 0
        self._cancelled = threading.Event()

    @property
    def sent(self) -> int:
        return self._position

    def send(self) -> Entry:
        try:
            self._send_parts()
            self._raise_if_cancelled()
            return self._upload.commit()
        except BaseException:
            self._upload.abort()
            raise

    def _send_parts(self) -> None:
        number = 0
        while left := self._size - self._position:
            self._raise_if_cancelled()
            size = min(left, self._upload.part_size(number))
            part = Slice(self._descriptor, self._position, self._position + size, self._upload.path)
            if left <= size and not (number and self._upload.ends_with_part):
                self._upload.take_last(part)
            else:
                self._upload.send_slice(part)
            self._position += size
            number += 1

    def cancel(self) -> None:
        self._cancelled.set()

    def _raise_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise failure(errno.ECANCELED, self._upload.path, "The upload was called off")


def md5(data: bytes) -> bytes:
    """Return the MD5 digest that stores use as a checksum, not for security."""
    return hashlib.md5(data, usedforsecurity=False).digest()

