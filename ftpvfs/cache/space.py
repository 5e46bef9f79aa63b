"""The space that the cache takes: counted as it is taken, kept within the limits, and waited for.

Processes add what they write to one number that they share; a census of the files sets it right now and then.

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
from dataclasses import dataclass
from typing import TypeVar

from ftpvfs.cache.census import PLACES, Census, Usage, look
from ftpvfs.cache.eviction import Candidate, Kind, Limits
from ftpvfs.cache.files import BESIDE, DataFile, Files, Number, Place
from ftpvfs.clock import Clock
from ftpvfs.coordination.lockfile import LockFile
from ftpvfs.errors import EFULL, failure
from ftpvfs.waiting import Wait, WouldWait, about_to_wait

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


@dataclass
class Evicted:
    """What an eviction did, in numbers of files, and the bytes that it freed."""

    removed: int = 0
    removed_partials: int = 0
    in_use: int = 0
    size: int = 0


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
        self._census = Census(files, clock, self._counted)
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
        except WouldWait:  # for another process: it is told with what comes next
            with self._lock:
                self._untold, self._unpaced = self._untold + told, self._unpaced + paced
            return
        except BaseException:
            with self._lock:  # nothing was counted
                self._untold, self._unpaced = self._untold + told - new, self._unpaced + paced - size
            raise
        if self._is_limited and self._excess() > 0:
            self._start_waiting()

    def correct(self, size: int) -> None:
        """Count what a file takes on the disk beyond what was counted of it; less than nothing where it has holes."""
        with self._lock:
            self._untold += size

    def made(self, kind: Kind, name: str) -> None:
        """Note a file that may be evicted from now on."""
        self._census.made(kind, name)

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
        return look(self._files).usage

    def _counted(self, usage: Usage) -> None:
        if self._is_limited:
            self._taken.set(usage.taken)

    def evict(self, need: int = 0) -> Evicted:
        """Remove what is too old, and as much as the limits and `need` bytes demand. Nothing open, nothing dirty."""
        found = Evicted()
        with self._alone(must=need > 0) as alone:
            if alone:
                self._tell_all()
                self._evict_to(self.limits, need, found)
        if found.removed or found.removed_partials:
            logger.info(
                "evicted %d clean files and %d partials, %d bytes", found.removed, found.removed_partials, found.size
            )
        return found

    def _tell_all(self) -> None:
        with self._lock:
            told, self._untold = self._untold, 0
        self._tell(told)

    def _evict_to(self, limits: Limits, need: int, found: Evicted) -> None:
        """Remove candidates until none is too old and `need` bytes more are within the limits."""
        self._census.look_if_due()
        kept: list[Candidate] = []
        try:
            while going := self._next(limits, need):
                freed = self._remove(going, found, kept)
                found.size += freed
                self.freed(freed)
        finally:
            for each in kept:
                self._census.put_back(each)

    @contextlib.contextmanager
    def _alone(self, *, must: bool) -> Iterator[bool]:
        """Be the only one who evicts, of all processes where that can be had; who `must` does not wait for others."""
        with self._evicting:
            lock = LockFile(str(self._files.folder / "evict.lock"))
            try:
                yield lock.try_lock() or must
            finally:
                lock.close()

    def _next(self, limits: Limits, need: int) -> list[Candidate]:
        """Return some of those that go, as many as are removed at once."""
        going: list[Candidate] = []
        now, excess = self._clock.time(), limits.excess(self._taken.value + need, self._files.free() - need)
        while len(going) < BATCH:
            each = self._census.take(limits, now=now, excess=excess)
            if each is not None:
                going.append(each)
                excess -= each.size
            elif excess <= 0 or not self._census.look_for_more():
                break
        return going

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
            self._evict_to(Limits(min_free=need), 0, found)
        return found

    def _remove(self, batch: list[Candidate], found: Evicted, kept: list[Candidate]) -> int:
        """Remove some files that nobody has open, records first; return the bytes that are free now.

        Those that stay are added to `kept`.
        """
        held: list[tuple[Candidate, DataFile]] = []
        try:
            for each in batch:
                file = self._files.claim(PLACES[each.kind], each.id)
                if file is None:
                    found.in_use += 1
                    kept.append(each)
                else:
                    held.append((each, file))
            clean = [each.id for each, _ in held if each.kind is Kind.CLEAN]
            is_forgotten = self._forgotten(clean)
            freed = sum(self._remove_one(each, found, kept) for each, _ in held)
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

    def _remove_one(self, victim: Candidate, found: Evicted, kept: list[Candidate]) -> int:
        if victim.kind is Kind.CLEAN:
            found.removed += 1
            return self._files.unlink(Place.CLEAN, victim.id)
        try:
            if not self._forget_partial(victim.id):
                return 0
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            kept.append(victim)  # for the next time, when something else has gone
            return 0
        found.removed_partials += 1
        size = self._files.unlink(Place.INCOMING, victim.id)
        self._files.unlink(Place.INCOMING, victim.id + BESIDE)
        return size


def _done(future: Future[None]) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_result(None)
