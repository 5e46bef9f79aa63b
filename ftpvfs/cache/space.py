"""The space that the cache takes: counted as it is taken, kept within the limits, and waited for.

Processes add what they write to one number that they share; every poll counts the files themselves and sets it right.

There are two limits. The size of the cache is for what may be evicted: what is not stored yet may exceed it, and then
write-back stores without delay and uploads are slowed down to its pace, but never refused. The free space of the disk
is a limit for all: where it is short uploads wait for write-back, and are refused when that has been in vain.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TypeVar

from ftpvfs.cache.eviction import Candidate, Kind, Limits, victims
from ftpvfs.cache.files import BESIDE, DataFile, Files, Number, Place
from ftpvfs.cache.records import is_id
from ftpvfs.clock import Clock
from ftpvfs.coordination.lockfile import LockFile
from ftpvfs.errors import EFULL, failure
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A process tells the others of so many bytes at once: what it has not told yet, the limit may be exceeded by.
STEP = 4 * 2**20
# Files that are removed between two looks at who else wants the database: a transaction of some milliseconds.
BATCH = 64
# A file that no record knows may be one that is just being made.
GRACE = 60.0
# Seconds for which uploads wait for write-back where the disk is short. Clients give up after 20 to 60.
PATIENCE = 15.0
MOMENT = 1.0
# Seconds after which uploads go on for another STEP though the cache is over its size: the store is slow, or away, and
# a client that moves nothing for 20 seconds gives up.
PAUSE = 5.0
# How often who waits looks whether another process has made room.
LOOK_AGAIN = 0.1
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
FULL = "The disk of the cache is full of files that are not in the store yet"
SHORT = "The disk of the cache is short of space"
# Of the disk, kept from data: without room for its records nothing could be stored, and no space ever become free.
KEPT = 2 * 2**20


@dataclass(frozen=True)
class Usage:
    """What the cache takes on the disk, in bytes, and in how many files."""

    clean: int = 0
    dirty: int = 0
    partial: int = 0
    incoming: int = 0
    files: int = 0
    free: int = 0

    @property
    def taken(self) -> int:
        """All together."""
        return self.clean + self.dirty + self.partial + self.incoming


@dataclass
class Evicted:
    """What an eviction did, in numbers of files, and the bytes that it freed."""

    removed: int = 0
    removed_partials: int = 0
    in_use: int = 0
    size: int = 0


@dataclass
class _Census:
    """What is on the disk at one time."""

    usage: Usage = field(default_factory=Usage)
    candidates: list[Candidate] = field(default_factory=list)


class Space:
    """The space of one cache folder. Any thread; one for each process.

    `forget` removes the records of files that are about to go, `dirty` tells how many bytes write-back may free.
    """

    def __init__(
        self,
        files: Files,
        limits: Limits,
        clock: Clock,
        *,
        dirty: Callable[[], int],
        forget: Callable[[list[str]], None],
        forget_partial: Callable[[str], bool],
    ) -> None:
        self.limits = limits
        self._files = files
        self._clock = clock
        self._dirty = dirty
        self._forget = forget
        self._forget_partial = forget_partial
        self._taken = Number(files.folder / "taken")
        self._is_limited = limits.max_size is not None or limits.min_free is not None
        # Has write-back look at once whether it is to hurry.
        self.hurry: Callable[[], object] = lambda: None
        # Held by the one thread of this process that evicts.
        self._evicting = threading.Lock()
        self._lock = threading.Lock()
        # Protected by _lock.
        self._untold = 0
        self._unpaced = 0
        self._waiting: Future[None] | None = None
        self._refused: str | None = None
        self._closing = threading.Event()
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """End what waits."""
        self._closing.set()
        self._woken.set()
        thread = self._thread
        if thread is not None:
            thread.join(timeout=10)

    # --- as bytes come

    def write(self, file: DataFile, pieces: Sequence[bytes | memoryview], offset: int) -> None:
        """Write; where the disk is full evict and try again, then raise ENOSPC."""
        size = sum(map(len, pieces)) + KEPT
        try:
            self._put(file, pieces, offset, size)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            self.with_room(size, lambda: self._put(file, pieces, offset, size))

    def _put(self, file: DataFile, pieces: Sequence[bytes | memoryview], offset: int, need: int) -> None:
        if self._files.free() < need:
            raise failure(errno.ENOSPC, str(self._files.folder))
        self._files.pwritev(file.descriptor, pieces, offset)

    def reserve(self, file: DataFile, size: int, more: int) -> None:
        """Take the space for a file of `size` bytes, `more` than it had; ENOSPC or EFULL where there is no such room.
        """
        self._find_room(more)
        self._files.reserve(file.descriptor, size)
        self._tell(more)
        if self._is_limited and self._excess() > 0:
            self._start_waiting()

    def admit(self, size: int) -> Future[None] | None:
        """See whether an upload of `size` bytes (0: nobody knows) has room, before its first byte.

        Return what is to be awaited before the next look, None where there is room. EFULL where write-back may make
        some, but has not in time; ENOSPC where nothing will. Evicts where need be, which waits for the disk.
        """
        least = KEPT + (self.limits.min_free or 0)
        if self._files.free() >= max(size, 0) + least:
            return None
        about_to_wait(Wait.DISK)
        try:
            self._find_room(max(size, KEPT))
        except OSError as error:
            if error.errno != EFULL or size or self._refused is not None or not self._dirty():
                raise
        else:
            return None
        self._start_waiting()
        return self.pressure()

    def _find_room(self, size: int) -> None:
        """Evict until `size` bytes fit; EFULL where what waits for the store takes their room, else ENOSPC."""
        need = size + (self.limits.min_free or 0)
        if self._files.free() >= need:
            return
        self.make_room(size)
        free = self._files.free()
        if free >= need:
            return
        if free + self._dirty() >= need:
            raise failure(EFULL, str(self._files.folder), FULL)
        raise failure(EFULL if free >= size else errno.ENOSPC, str(self._files.folder), SHORT)

    def grow(self, new: int, size: int | None = None) -> None:
        """Count `size` bytes that are written, or are about to be, `new` of which were not counted before.

        Quick; where they are too many, room is made elsewhere.
        """
        size = new if size is None else size
        with self._lock:
            told, paced = self._untold + new, self._unpaced + size
            self._untold, self._unpaced = (told, paced) if paced < STEP else (0, 0)
        if paced < STEP:
            return
        try:
            self._tell(told)
        except BaseException:
            with self._lock:  # nothing was counted
                self._untold, self._unpaced = self._untold + told - new, self._unpaced + paced - size
            raise
        if self._is_limited and self._excess() > 0:
            self._start_waiting()

    def freed(self, size: int) -> None:
        """Count bytes that are gone from the disk, and wake who waits for room."""
        if size:
            self._tell(-size)
            self._woken.set()

    def look_again(self) -> None:
        """Wake who waits for room: there is more that may be evicted."""
        self._woken.set()

    def check(self) -> None:
        """Raise EFULL once the disk is short and waiting for room has been in vain."""
        refused = self._refused
        if refused is None:
            return
        if self._shortage() > 0:
            raise failure(EFULL, str(self._files.folder), refused)
        with self._lock:
            if self._refused is refused:
                self._refused = None

    @property
    def is_behind(self) -> bool:
        """Whether more waits for the store than the size of the cache has room for, though all else has gone.

        Half of that size at least is for what waits, however much is being written or read at the moment.
        """
        most = self.limits.max_size
        return most is not None and self._taken.value > most and self._dirty() > most // 2

    @property
    def wants_stored(self) -> bool:
        """Whether what waits for the store is to be stored at once, since it takes room that is wanted."""
        is_short = self._shortage() > 0 or self._files.free() < KEPT
        return self.is_behind or (is_short and self._dirty() > 0)

    def pressure(self) -> Future[None] | None:
        """Return what is done when there is room again, or when there will not be; None where there is."""
        with self._lock:
            waiting = self._waiting
            if waiting is None:
                return None
            # One each: who is cancelled does not cancel the others.
            mine: Future[None] = Future()
        waiting.add_done_callback(lambda _: _done(mine))
        return mine

    def _excess(self) -> int:
        if not self._is_limited:
            return 0
        return self.limits.excess(self._taken.value, self._files.free())

    def _shortage(self) -> int:
        """Return how many bytes the disk lacks of what is to be free on it."""
        return self.limits.shortage(self._files.free()) if self.limits.min_free is not None else 0

    def _tell(self, size: int) -> None:
        if self._is_limited:
            self._taken.add(size)

    def with_room(self, size: int, call: Callable[[], T]) -> T:
        """Call; where the disk is full make room for `size` bytes and call again. A call that fails changes nothing."""
        try:
            return call()
        except OSError as error:
            if error.errno not in NO_SPACE or not self.make_room(size):
                raise
        return call()

    # --- waiting for room

    def _start_waiting(self) -> None:
        with self._lock:
            if self._waiting is not None or self._refused is not None or self._closing.is_set():
                return
            self._waiting = Future()
            self._thread = threading.Thread(target=self._wait_for_room, name="ftpvfs-room", daemon=True)
            self._thread.start()

    def _wait_for_room(self) -> None:
        """Make room, or wait until write-back has made some; then let all who wait go on."""
        refused = None
        try:
            began = progress = time.monotonic()
            behind = began if self.is_behind else began - MOMENT
            self.make_room(0)
            self.hurry()
            while not self._closing.is_set():
                now = time.monotonic()
                behind = now if self.is_behind else behind
                is_short = self._shortage() > 0
                if not is_short and (now - began >= PAUSE or not self._is_late(now - behind)):
                    break
                refused = self._refusal(now - progress) if is_short else None
                if refused is not None:
                    break
                if self._woken.wait(LOOK_AGAIN):
                    progress = time.monotonic()
                self._woken.clear()
                self.evict()
        except OSError as error:
            logger.error("No room could be made in the cache: %s", error)  # noqa: TRY400
        finally:
            with self._lock:
                waiting, self._waiting, self._refused = self._waiting, None, refused
            if waiting is not None:
                _done(waiting)

    def _is_late(self, ago: float) -> bool:
        """Tell whether write-back is behind, or was so many seconds ago: what it has stored can be evicted soon."""
        return ago <= 0 or (ago < MOMENT and self._excess() > 0)

    def _refusal(self, waited: float) -> str | None:
        """Return why waiting is in vain: nobody has made room on the disk for so many seconds."""
        if waited >= PATIENCE:
            return FULL
        # What write-back has just stored is not dirty any more, and cannot be evicted for another moment.
        return SHORT if waited >= MOMENT and not self._dirty() else None

    # --- eviction

    def usage(self) -> Usage:
        """Count what is on the disk. Looks at every file."""
        return self._census().usage

    def evict(self, need: int = 0) -> Evicted:
        """Remove what is too old, and as much as the limits and `need` bytes demand. Nothing open, nothing dirty."""
        found = Evicted()
        with self._alone(must=need > 0) as alone:
            if not alone:
                return found
            census = self._census()
            if self._is_limited:
                self._taken.set(census.usage.taken)
            left = census.candidates
            gone = 0
            while going := self._next(left, need, census.usage, gone):
                for first in range(0, len(going), BATCH):
                    gone += self._remove(going[first : first + BATCH], found)
                tried = set(going)
                left = [each for each in left if each not in tried]
        found.size = gone
        self.freed(gone)
        if found.removed or found.removed_partials:
            logger.info(
                "evicted %d clean files and %d partials, %d bytes", found.removed, found.removed_partials, gone
            )
        return found

    @contextlib.contextmanager
    def _alone(self, *, must: bool) -> Iterator[bool]:
        """Be the only one who evicts, of all processes where that can be had; who `must` does not wait for others."""
        with self._evicting:
            lock = LockFile(str(self._files.folder / "evict.lock"))
            try:
                yield lock.try_lock() or must
            finally:
                lock.close()

    def _next(self, left: list[Candidate], need: int, usage: Usage, gone: int) -> list[Candidate]:
        taken, free = usage.taken - gone + need, self._files.free() - need
        return victims(left, self.limits, now=self._clock.time(), taken=taken, free=free)

    def make_room(self, need: int) -> bool:
        """Evict so that `need` bytes more fit; whatever can go where the disk is full. Tell whether any went."""
        about_to_wait(Wait.DISK)
        found = self.evict(need)
        if not found.size and need and self._files.free() < need:
            found = self._evict_for_disk(need)
        return found.size > 0

    def _evict_for_disk(self, need: int) -> Evicted:
        """Evict though no limit demands it, because the disk has no space."""
        found = Evicted()
        with self._alone(must=True):
            limits = Limits(min_free=need)
            left = self._census().candidates
            going = victims(left, limits, now=self._clock.time(), taken=0, free=self._files.free())
            for first in range(0, len(going), BATCH):
                found.size += self._remove(going[first : first + BATCH], found)
        self.freed(found.size)
        return found

    def _remove(self, batch: list[Candidate], found: Evicted) -> int:
        """Remove some files that nobody has open, records first; return the bytes that are free now."""
        held: list[tuple[Candidate, DataFile]] = []
        try:
            for each in batch:
                place = Place.CLEAN if each.kind is Kind.CLEAN else Place.INCOMING
                file = self._files.claim(place, each.id)
                if file is None:
                    found.in_use += 1
                else:
                    held.append((each, file))
            clean = [each.id for each, _ in held if each.kind is Kind.CLEAN]
            is_forgotten = self._forgotten(clean)
            freed = sum(self._remove_one(each, found) for each, _ in held)
            if not is_forgotten:
                self._forgotten(clean)
            return freed
        finally:
            for _, file in held:
                file.close()

    def _forgotten(self, ids: list[str]) -> bool:
        """Remove records; False where even that needs space: a record without its file does no harm meanwhile."""
        try:
            self._forget(ids)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            return False
        return True

    def _remove_one(self, victim: Candidate, found: Evicted) -> int:
        if victim.kind is Kind.CLEAN:
            found.removed += 1
            return self._files.unlink(Place.CLEAN, victim.id)
        try:
            if not self._forget_partial(victim.id):
                return 0
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            return 0  # next time, when something else has gone
        found.removed_partials += 1
        size = self._files.unlink(Place.INCOMING, victim.id)
        self._files.unlink(Place.INCOMING, victim.id + BESIDE)
        return size

    def _census(self) -> _Census:
        clean, candidates = self._look(Place.CLEAN, Kind.CLEAN)
        incoming, partials = self._look(Place.INCOMING, Kind.PARTIAL)
        dirty, others = self._look(Place.DATA, None)
        resumable = {each for each in partials if self._files.has(Place.INCOMING, each.id + BESIDE)}
        partial = sum(each.size for each in resumable)
        usage = Usage(
            clean=clean,
            dirty=dirty,
            partial=partial,
            incoming=incoming - partial,
            files=len(candidates) + len(partials) + len(others),
            free=self._files.free(),
        )
        return _Census(usage, [*candidates, *resumable])

    def _look(self, place: Place, kind: Kind | None) -> tuple[int, list[Candidate]]:
        """Return the bytes of all files in a place, and the files."""
        size, found = 0, []
        for entry in self._files.names(place):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                size += status.st_blocks * 512
                if is_id(entry.name):
                    found.append(Candidate(kind or Kind.CLEAN, status.st_mtime, entry.name, status.st_blocks * 512))
        return size, found


def _done(future: Future[None]) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_result(None)
