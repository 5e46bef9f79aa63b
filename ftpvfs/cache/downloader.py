"""Fills the missing ranges of cached items while they are read: growing, parallel ranges that all readers share.

Nothing in here waits for the store: a range that came is written and hashed by a small pool of threads, and each reader
is woken when the bytes that it wants are in the data file. What was asked for ahead of a reader grows as it goes on,
and requests end with the last reader that could use them.

Lock order: Downloads, Downloader, then Item. Methods ending in `_locked` are called with the lock of their object held.
Requests are made, bytes written and futures completed with no lock held.
"""

from __future__ import annotations

import enum
import errno
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from typing import Protocol

from ftpvfs.backend.backend import Backend, Entry, Pieces
from ftpvfs.backend.chunks import ChunkPolicy, Pace, take_memory
from ftpvfs.cache.verifier import Readable, Verifier
from ftpvfs.cache.workers import Workers
from ftpvfs.clock import SYSTEM_CLOCK, Clock
from ftpvfs.errors import GONE, failure, reason_of
from ftpvfs.memory import MemoryBudget
from ftpvfs.readiness import END, Awaited, Bytes, Readiness
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)

# Written at once, and shown to the readers.
WRITE_SIZE = 2**20
# What of one range may be in memory: it is written while it arrives, and the store waits while the disk is slower.
WINDOW = 2**22
# How often a small object is asked for whose bytes are not what the store's hash says.
TRIES = 3
CLOSED = "The VFS was closed"


class Fillable(Readable, Protocol):
    """What a downloader needs of a cached item; all of it any thread."""

    is_dirty: bool
    is_verified: bool

    def mark_verified(self) -> None:
        """Note that the whole was compared with the store's hash."""

    @property
    def complete(self) -> bool:
        """Whether every byte is present."""

    def missing(self, start: int, stop: int) -> Iterable[tuple[int, int]]:
        """Return the ranges between the two that are not present, in order."""

    def add(self, start: int, pieces: Sequence[bytes]) -> None:
        """Write the pieces at `start`, and then count them as present."""

    def drop(self, start: int, stop: int) -> None:
        """Count a range as missing again."""

    def acquire(self) -> bool:
        """Keep the item open until one more `release`; False where nobody has it open any more."""

    def release(self) -> None:
        """Let go of it; the last one saves what is present."""


class Downloads:
    """All downloads into the cache of one process and store. Any thread; not carried across a fork."""

    def __init__(
        self,
        backend: Backend,
        policy: ChunkPolicy,
        memory: MemoryBudget,
        *,
        read_ahead: int = 0,
        verify: bool = True,
        timeout: float | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.backend = backend
        self.policy = policy
        self.memory = memory
        self.read_ahead = read_ahead
        self.verify = verify
        self.clock = clock
        self.count: Counter[str] = Counter()
        self._workers = Workers("ftpvfs-fill")
        self._closing = threading.Event()
        if timeout:
            watch = partial(self._watch, timeout)
            threading.Thread(target=watch, name="ftpvfs-fill-watch", daemon=True).start()
        self._lock = threading.Lock()
        # Protected by _lock: while there are readers.
        self._downloaders: dict[Fillable, Downloader] = {}

    def join(self, item: Fillable, path: str, entry: Entry) -> Reader:
        """Return a new reader of an item, which the caller has acquired; closing the reader releases it.

        `entry` is the version at the store that the item is of. A dirty item is all here, and nothing of it is asked.
        """
        if item.is_dirty or (item.complete and (item.is_verified or not self.verify)):
            return Reader(self, item, path, None)
        with self._lock:
            downloader = self._downloaders.get(item)
            if downloader is None:
                downloader = self._downloaders[item] = Downloader(self, item, path, entry)
            reader = Reader(self, item, path, downloader)
            downloader.enter(reader)
            is_closed = self._closing.is_set()  # then `close`, which comes for the lock, may have been here already
        if is_closed:
            downloader.close()
        else:
            downloader.begin_verifying()
        return reader

    def leave(self, reader: Reader, downloader: Downloader) -> None:
        """Forget a reader; what nobody else wants is not fetched any more."""
        with self._lock:
            unwanted = downloader.leave(reader)
            if downloader.is_idle:
                self._downloaders.pop(reader.item, None)
        downloader.give_up(unwanted, failure(errno.ECANCELED, reader.path))
        reader.wake(failure(errno.ECANCELED, reader.path, "The file was closed"))

    def run(self, job: Callable[[], object]) -> None:
        """Have a thread do what waits for the disk. Takes no lock."""
        self._workers.run(job)

    def stats(self) -> dict[str, int]:
        """Return counters, and what is under way."""
        with self._lock:
            return {**self.count, "files": len(self._downloaders)}

    def _watch(self, timeout: float) -> None:
        """End requests of which nothing comes any more, for stores whose own client waits for ever."""
        patience = 1.0 + timeout * 1.1  # who has a clock of its own is to say first what is wrong
        while not self.clock.wait(self._closing, patience / 10):
            with self._lock:
                downloaders = list(self._downloaders.values())
            for downloader in downloaders:
                downloader.give_up_silent(self.clock.monotonic() - patience)

    def close(self) -> None:
        """End all requests, and wait for what is being written."""
        self._closing.set()
        with self._lock:
            downloaders = list(self._downloaders.values())
        for downloader in downloaders:
            downloader.close()
        self._workers.close()


class Stage(enum.Enum):
    """Where the bytes of a flight are."""

    ASKED = "on their way"
    CANCELLED = "not wanted any more"
    HERE = "all here, some of them not written yet"


class Flight:
    """One range [start, stop) under way from the store into the data file. Its Downloader's lock protects it."""

    __slots__ = (
        "arrived", "asked", "error", "future", "gate", "heard", "held", "is_landed", "jobs", "owner", "pieces",
        "stage", "start", "stop", "tries", "unwritten",
    )  # fmt: skip

    def __init__(self, owner: Reader, start: int, stop: int, held: int) -> None:
        self.owner = owner
        self.start = start
        self.stop = stop
        self.held = held  # of the memory budget
        self.stage = Stage.ASKED
        self.future: Future[Pieces] | None = None
        self.asked = 0.0
        self.heard = 0.0  # when something came of it
        self.tries = 0
        # What the disk has to do: pieces that are collected, jobs that are handed over, and the bytes of both.
        self.arrived = start
        self.pieces: Pieces = []
        self.jobs = 0
        self.unwritten = 0
        self.gate: Future[None] | None = None
        self.error: OSError | None = None
        self.is_landed = False  # no more will come


class Reader:
    """One open file's way through an item. One thread at a time, but for the waking of those who wait."""

    def __init__(self, downloads: Downloads, item: Fillable, path: str, downloader: Downloader | None) -> None:
        self.item = item
        self.path = path
        # Has a thread do what must not be done in the one that completes a future.
        self.run = downloads.run
        self._downloads = downloads
        self._downloader = downloader
        self._generation: int | None = None  # of the bytes that were handed out
        self._is_closed = False
        # Protected by the downloader's lock.
        self.position = 0
        self.origin = 0  # where it began to read in order
        self.pace = Pace(downloads.policy)
        self.waiter: Future[None] | None = None
        self.error: OSError | None = None

    def poll(self, offset: int) -> Readiness:
        """Return the bytes that are here from the offset on, a future to await while they are fetched, or the end.

        Raises what went wrong with them since they were asked for, once: whoever asks again has them fetched again.
        Raises EIO when bytes that were handed out turned out to be damaged. The future may be cancelled by who waits.
        """
        if offset >= self.item.size:
            self._check_generation()
            return END
        while True:
            self._check_generation()
            generation = self._current_generation()  # before the bytes, so that dropped ones never pass for newer ones
            count = self.item.ready(offset)
            if count:
                self._generation = generation
                return Bytes(count)
            if self.error is not None:
                error, self.error = self.error, None
                raise failure(error.errno or errno.EIO, self.path, reason_of(error)) from error
            if self._downloader is None:
                raise failure(errno.EIO, self.path, "The data file in the cache is shorter than it should be")
            waiter = self._downloader.want(self, offset)
            if waiter is not None:
                return Awaited(waiter)

    def advance(self, offset: int) -> None:
        """Note where the reader is, so that what comes next is asked for in time."""
        if self._downloader is not None and not self.item.complete:
            self._downloader.moved(self, offset)

    def verify(self) -> None:
        """Raise EIO when the bytes are not the store's; as far as the whole object is here, and the store has a hash.

        May take as long as reading the file takes.
        """
        self._check_generation()
        if self._downloader is not None and self.item.complete:
            self._downloader.verify()
            self._check_generation()

    def close_later(self) -> None:
        """Close in another thread. Takes no lock, so that the garbage collector may call it inside of any other call.
        """
        self._downloads.run(self.close)

    def close(self) -> None:
        """Stop fetching what nobody else wants, and let go of the item. Does not wait for the disk."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._downloader is not None:
            self._downloads.leave(self, self._downloader)
        self.item.release()

    def wake(self, error: OSError) -> None:
        """Let who waits hear an error."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            _finish(waiter, error)

    def _current_generation(self) -> int:
        return 0 if self._downloader is None else self._downloader.generation

    def _check_generation(self) -> None:
        if self._generation is not None and self._generation != self._current_generation():
            raise failure(errno.EIO, self.path, "The bytes that came were not those that the store has")


def _finish(future: Future[None], error: BaseException | None = None) -> None:
    """Complete a future that its owner may have cancelled."""
    with suppress(InvalidStateError):
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


class Downloader:
    """Fetches what the readers of one item want. Any thread.

    Invariants whenever the lock is free:
    - a byte is in the data file before it is present, and that of a small object is checked before;
    - a reader with a waiter has a flight that covers its position, or one of its own that ends earlier;
    - what flights hold of the memory budget is given back when they end.
    """

    def __init__(self, downloads: Downloads, item: Fillable, path: str, entry: Entry) -> None:
        self._downloads = downloads
        self._backend = downloads.backend
        self._memory = downloads.memory
        self._item = item
        self._path = path
        self._entry = entry
        self._verifier = Verifier(downloads.backend, path, entry, item) if downloads.verify else None
        self._verifying = threading.Lock()  # one verdict at a time
        self._lock = threading.Lock()
        # Protected by _lock.
        self._readers: list[Reader] = []
        self._flights: list[Flight] = []
        self._is_closed = False
        # Counts how often all bytes were dropped because they were damaged. Written under _verifying alone.
        self.generation = 0

    # --- readers

    def enter(self, reader: Reader) -> None:
        """Add a reader."""
        with self._lock:
            self._readers.append(reader)

    def leave(self, reader: Reader) -> list[Flight]:
        """Remove a reader; return the flights that nobody else wants, to be given up."""
        with self._lock:
            self._readers.remove(reader)
            return self._unwanted_locked(reader)

    @property
    def is_idle(self) -> bool:
        """Whether it has no readers."""
        return not self._readers

    def want(self, reader: Reader, offset: int) -> Future[None] | None:
        """Have the bytes at the offset fetched next; None when they, or an error to be raised, are here by now.

        Once all is closed the future has failed already: nothing will come any more.
        """
        with self._lock:
            if reader.error is not None:
                return None
            if self._is_closed:
                return self._refused_locked(reader)
            waiter = reader.waiter
            if waiter is None or waiter.done() or reader.position != offset:
                waiter = Future()
            unwanted = self._move_locked(reader, offset)
            reader.waiter = waiter
            begun = self._plan_locked(reader)
            is_here = bool(self._item.ready(offset))
            if is_here:
                reader.waiter = None
        self._start(begun, unwanted)
        return None if is_here else waiter

    def _refused_locked(self, reader: Reader) -> Future[None]:
        reader.error = failure(errno.ECANCELED, self._path, CLOSED)
        refused: Future[None] = Future()
        refused.set_exception(reader.error)
        return refused

    def moved(self, reader: Reader, offset: int) -> None:
        """Note where a reader is, and fetch ahead of it."""
        with self._lock:
            unwanted = self._move_locked(reader, offset)
            begun = self._plan_locked(reader)
        self._start(begun, unwanted)

    def close(self) -> None:
        """End all requests; whoever waits hears ECANCELED."""
        with self._lock:
            self._is_closed = True
            flights = [flight for flight in self._flights if flight.stage is Stage.ASKED]
        closed = failure(errno.ECANCELED, self._path, CLOSED)
        self.give_up(flights, closed)
        if self._verifier is not None:
            self._verifier.cancel()
        self._fail(self._readers, closed)

    def give_up(self, flights: Iterable[Flight], error: OSError) -> None:
        """End requests, whether their store hears of it or not."""
        for flight in flights:
            future = flight.future
            self._broken(flight, error)
            if future is not None:
                future.cancel()

    def give_up_silent(self, since: float) -> None:
        """End the requests of which nothing has come since then."""
        with self._lock:
            silent = [each for each in self._flights if each.stage is Stage.ASKED and 0 < each.heard < since]
        self.give_up(silent, failure(errno.ETIMEDOUT, self._path, "The store does not answer"))

    def _move_locked(self, reader: Reader, offset: int) -> list[Flight]:
        """Note a position; return the flights of before that a jump has made useless."""
        if reader.position <= offset <= max(self._reach(reader), reader.position + self._item.ready(reader.position)):
            reader.position = offset
            return []
        reader.position = reader.origin = offset
        reader.pace = Pace(self._downloads.policy)
        return self._unwanted_locked(reader)

    def _unwanted_locked(self, reader: Reader) -> list[Flight]:
        """Return the reader's flights, but for those that it, or else another, will come to."""
        unwanted = []
        for flight in self._flights:
            if flight.owner is reader and flight.stage is Stage.ASKED:
                heir = next((other for other in self._readers if self._comes_to(other, flight)), None)
                if heir is None:
                    flight.stage = Stage.CANCELLED
                    unwanted.append(flight)
                else:
                    flight.owner = heir
        return unwanted

    def _comes_to(self, reader: Reader, flight: Flight) -> bool:
        return reader.position < flight.stop and flight.start < self._reach(reader)

    # --- what to fetch

    def _reach(self, reader: Reader) -> int:
        """Return up to where to ask ahead of a reader: twice as far as it has come, within what the options allow."""
        most = reader.pace.most_ahead + self._downloads.read_ahead
        ahead = min(max(self._downloads.policy.first, 2 * (reader.position - reader.origin)), most)
        return min(self._item.size, reader.position + ahead)

    def _plan_locked(self, reader: Reader) -> list[Flight]:
        """Return new flights for what the reader wants now and next, as many as streams and memory allow."""
        begun: list[Flight] = []
        if self._is_closed or reader not in self._readers:
            return begun
        for start, stop in self._wanted_locked(reader):
            while start < min(stop, self._reach(reader)):
                own = [flight for flight in self._flights if flight.owner is reader]
                asked = sum(flight.stage is Stage.ASKED for flight in own)
                # What it waits for does not wait for what lies further ahead.
                if asked >= reader.pace.streams and start > reader.position:
                    return begun
                size = reader.pace.length(stop - start)
                held = take_memory(self._memory, min(size, WINDOW), is_only=not own)
                if not held:
                    return begun
                if held < min(size, WINDOW):
                    size = held  # memory is scarce
                flight = Flight(reader, start, start + size, held)
                self._item.acquire()  # which the reader has, too, since it has not left
                self._flights.append(flight)
                begun.append(flight)
                reader.pace.asked()
                start += size
        return begun

    def _wanted_locked(self, reader: Reader) -> Iterator[tuple[int, int]]:
        """Yield the ranges ahead of a reader that are neither present nor under way, in order."""
        size = self._item.size
        start, stop = reader.position, min(size, self._reach(reader) + 2 * reader.pace.size)
        if self._is_small and self._verifier is not None and list(self._item.missing(0, size)) == [(0, size)]:
            start, stop = 0, size  # only as a whole can it be checked
        flights = sorted((flight.start, flight.stop) for flight in self._flights)
        for begin, end in list(self._item.missing(start, stop)):
            for taken, free in flights:
                if begin < free and taken < end:
                    if begin < taken:
                        yield begin, taken
                    begin = free
            if begin < end:
                yield begin, end

    @property
    def _is_small(self) -> bool:
        first = self._downloads.policy.first
        return 0 < self._item.size <= first + first // 2

    # --- requests

    def _start(self, begun: list[Flight], unwanted: Sequence[Flight] = ()) -> None:
        self.give_up(unwanted, failure(errno.ECANCELED, self._path))
        for flight in begun:
            self._request(flight)

    def _request(self, flight: Flight) -> None:
        flight.asked = flight.heard = self._downloads.clock.monotonic()
        self._downloads.count["requests"] += 1
        if self._backend.capability.opens_files:
            self._downloads.run(partial(self._fetch, flight, is_here=True))
        else:
            self._fetch(flight, is_here=False)

    def _fetch(self, flight: Flight, *, is_here: bool) -> None:
        """Ask for a range; `is_here`: of this machine, which gives it in this thread, one of the pool's."""
        deliver = None if self._is_whole(flight) else partial(self._take, flight, is_here)
        try:
            future = self._backend.fetch(
                self._path, flight.start, flight.stop, self._entry.fingerprint, deliver
            )
        except OSError as error:
            self._broken(flight, error)
            return
        with self._lock:
            flight.future = future
            is_over = flight.is_landed
        if is_over:
            future.cancel()
        future.add_done_callback(partial(self._arrived, flight))

    def _is_whole(self, flight: Flight) -> bool:
        """Tell whether a flight has all of a small object, whose bytes are checked before anybody sees them."""
        return self._verifier is not None and self._is_small and (flight.start, flight.stop) == (0, self._item.size)

    def _take(self, flight: Flight, is_here: bool, piece: bytes) -> Future[None] | None:
        """Take a piece that has arrived; return what to await before the next one. In the store's thread."""
        with self._lock:
            if flight.is_landed:  # it was cancelled, and the store has not heard of it yet
                return None
            flight.heard = self._downloads.clock.monotonic()
            flight.pieces.append(piece)
            flight.unwritten += len(piece)
            if sum(map(len, flight.pieces)) < WRITE_SIZE:
                return None
            job = self._collected_locked(flight)
            if flight.unwritten >= WINDOW and not is_here:
                flight.gate = Future()
            gate = flight.gate
        if is_here:
            job()
        else:
            self._downloads.run(job)
        return gate

    def _collected_locked(self, flight: Flight) -> Callable[[], None]:
        """Return the job of writing what was collected."""
        pieces, flight.pieces = flight.pieces, []
        start = flight.arrived
        flight.arrived += sum(map(len, pieces))
        flight.jobs += 1
        return partial(self._write, flight, start, pieces)

    def _arrived(self, flight: Flight, future: Future[Pieces]) -> None:
        """Have what is left written, and ask for more. In the thread of the backend's event loop."""
        flight.future = None  # the future keeps this callback, the flight and, in a circle, all the bytes
        error = failure(errno.ECANCELED, self._path) if future.cancelled() else future.exception()
        if error is not None:
            self._broken(flight, error)
            return
        job: Callable[[], None] = partial(self._check, flight, future.result())
        rate = (flight.stop - flight.start) / max(self._downloads.clock.monotonic() - flight.asked, 1e-6)
        with self._lock:
            if flight.is_landed:
                return
            if not self._is_whole(flight):
                job = self._collected_locked(flight)
            flight.is_landed = True
            flight.stage = Stage.HERE
            flight.owner.pace.arrived(rate)
            begun = self._plan_locked(flight.owner)
        self._start(begun)
        if self._verifier is not None and self._is_whole(flight):
            # Checked before anybody sees it: no thread of the pool, which all files share, waits for the store's hash.
            self._verifier.begin(lambda: self._downloads.run(job))
        else:
            self._downloads.run(job)

    def _broken(self, flight: Flight, error: BaseException) -> None:
        """Note that no more will come; what came is written first. What comes later is not looked at."""
        known = error if isinstance(error, OSError) else failure(errno.EIO, self._path, str(error))
        with self._lock:
            if flight.is_landed:
                return
            flight.error = flight.error or known
            flight.pieces = []
            flight.is_landed = True
            is_last = flight.jobs == 0
        if is_last:
            self._end(flight, flight.error)

    # --- what came; in threads of the pool

    def _write(self, flight: Flight, start: int, pieces: Pieces) -> None:
        size = sum(map(len, pieces))
        try:
            if pieces:
                self._item.add(start, pieces)
                self._downloads.count["bytes"] += size
                self._wake()
                self._hash(start, pieces)
        except Exception as error:  # noqa: BLE001 - it belongs to the readers
            known = error if isinstance(error, OSError) else failure(errno.EIO, self._path, str(error))
            with self._lock:
                flight.error = flight.error or known
        self._written(flight, size)

    def _written(self, flight: Flight, size: int) -> None:
        with self._lock:
            flight.jobs -= 1
            flight.unwritten -= size
            gate, flight.gate = flight.gate, None
            is_last = flight.jobs == 0 and flight.is_landed
            error = flight.error
            future = flight.future if error is not None else None
            if error is None and is_last and flight.arrived != flight.stop:  # later bytes would be at the wrong place
                error = failure(errno.EIO, self._path, f"The store gave {flight.arrived - flight.start} bytes")
        if gate is not None:
            _finish(gate)
        if future is not None:
            future.cancel()  # the disk takes no more of it
        if is_last:
            self._end(flight, error)

    def _check(self, flight: Flight, pieces: Pieces) -> None:
        """Write all of a small object, if it is what the store has."""
        assert self._verifier is not None
        try:
            given = sum(map(len, pieces))
            if given != self._item.size:
                raise failure(errno.EIO, self._path, f"The store gave {given} of {self._item.size} bytes")
            if not self._verifier.accepts(pieces):
                self._again(flight)
                return
            for start, group in _groups(pieces):
                self._item.add(start, group)
                self._wake()
            self._item.mark_verified()
            self._downloads.count["bytes"] += self._item.size
        except Exception as error:  # noqa: BLE001 - it belongs to the readers
            known = error if isinstance(error, OSError) else failure(errno.EIO, self._path, str(error))
            self._end(flight, known)
        else:
            self._end(flight, None)

    def _again(self, flight: Flight) -> None:
        """Ask once more for a small object whose bytes were damaged on the way; nobody has seen them."""
        flight.tries += 1
        self._downloads.count["damaged"] += 1
        reason = "The bytes that came are not those that the store has"
        if flight.tries >= TRIES:
            self._end(flight, failure(errno.EIO, self._path, reason))
            return
        logger.warning("%r: %s; asking again", self._path, reason)
        with self._lock:
            flight.is_landed = False
            flight.stage = Stage.ASKED
            is_wanted = any(self._comes_to(reader, flight) for reader in self._readers)
        if is_wanted:
            self._request(flight)
        else:
            self._broken(flight, failure(errno.ECANCELED, self._path))

    def _end(self, flight: Flight, error: OSError | None) -> None:
        """Forget a flight; wake those who waited for it in vain, and let the others go on."""
        begun: list[Flight] = []
        failed: list[Reader] = []
        with self._lock:
            was_cancelled = flight.stage is Stage.CANCELLED
            self._flights.remove(flight)
            if error is not None and not was_cancelled:
                is_gone = error.errno in GONE  # then nobody gets any more of this version
                failed = [r for r in self._readers if is_gone or flight.start <= r.position < flight.stop]
                failed = [r for r in failed if not self._item.ready(r.position)]
            self._memory.give(flight.held)
            for reader in self._readers:
                if reader not in failed and self._goes_on_locked(reader, flight, error):
                    begun += self._plan_locked(reader)
        if error is not None and failed:
            self._fail(failed, error)
        self._start(begun)
        self._wake()
        self._downloads.run(self._item.release) if error is not None else self._item.release()

    def _goes_on_locked(self, reader: Reader, ended: Flight, error: OSError | None) -> bool:
        """Tell whether to ask for more now. What was asked ahead and failed is asked again once somebody waits for it.
        """
        if error is None:
            return reader.waiter is not None or reader is ended.owner
        is_served = any(flight.start <= reader.position < flight.stop for flight in self._flights)
        return reader.waiter is not None and not is_served

    def _wake(self) -> None:
        """Complete the waiters whose bytes are present."""
        woken = []
        with self._lock:
            for reader in self._readers:
                if reader.waiter is not None and self._item.ready(reader.position):
                    woken.append(reader.waiter)
                    reader.waiter = None
        for waiter in woken:
            _finish(waiter)

    def _fail(self, readers: Iterable[Reader], error: OSError) -> None:
        with self._lock:
            waiters = []
            for reader in readers:
                if reader.waiter is not None:
                    reader.error = error
                    waiters.append(reader.waiter)
                    reader.waiter = None
        for waiter in waiters:
            _finish(waiter, error)

    # --- verification of what is too large to be checked before it counts as present

    def begin_verifying(self) -> None:
        """Hash what is already here, so that little is left to do at the end."""
        if self._verifier is not None and not self._item.is_verified:
            if self._item.ready(0):
                self._verifier.begin(lambda: self._downloads.run(self._follow))
            else:
                self._verifier.begin(lambda: None)

    def _follow(self) -> None:
        if self._verifier is not None and not self._item.is_verified:
            if self._verifier.follow():
                self._downloads.run(self._follow)  # behind what others have to do
            elif self._verifier.is_finished:
                self.verify()

    def _hash(self, start: int, pieces: Pieces) -> None:
        if self._verifier is not None:
            self._verifier.feed(start, pieces)
            self._follow()

    def verify(self) -> None:
        """Compare the complete item with the store's hash; drop all of it, in a new generation, when it is damaged."""
        if self._verifier is None or self._item.is_verified:
            return
        about_to_wait(Wait.DISK)
        with self._verifying:
            if self._item.is_verified or not self._item.complete:
                return
            if self._verifier.finish():
                self._item.mark_verified()
                return
            logger.warning("%r: the bytes that came are not those that the store has; they are dropped", self._path)
            self._downloads.count["damaged"] += 1
            self._item.drop(0, self._item.size)
            self._verifier.restart()
            self.generation += 1


def _groups(pieces: Pieces) -> Iterator[tuple[int, Pieces]]:
    """Yield the pieces, which begin at 0, in groups of about WRITE_SIZE."""
    group: Pieces = []
    start = size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= WRITE_SIZE:
            yield start, group
            group, start, size = [], start + size, 0
    if group:
        yield start, group
