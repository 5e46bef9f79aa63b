"""What is on the cache's disk: counted in the background now and then, and kept up to date in between.

To look at every file takes a while where there are many. So one look serves for long: the files that this process makes
are added as it makes them, those that others make are found by the next look, and whatever is about to go is looked at
once more by itself.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ftpvfs.cache.eviction import Candidate, Kind, Limits, Queue
from ftpvfs.cache.files import BESIDE, Files, Place
from ftpvfs.cache.records import is_id
from ftpvfs.clock import Clock

# Seconds for which a look is good.
GOOD_FOR = 600.0
# Of all time so much may be spent on looks while more room is wanted than there are files to evict, as its inverse.
LOOKS_SHARE = 20
# Files that are looked at before others may run again.
SLICE = 256
PLACES = {Kind.CLEAN: Place.CLEAN, Kind.PARTIAL: Place.INCOMING}


@dataclass(frozen=True)
class Usage:
    """What the cache takes on the disk, in bytes and in files; the records beside them do not count."""

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


@dataclass(frozen=True)
class Look:
    """Every file at one time."""

    usage: Usage
    candidates: list[Candidate]


def look(files: Files) -> Look:
    """Look at every file of a cache; others run meanwhile."""
    clean = _files_in(files, Place.CLEAN, Kind.CLEAN)
    incoming = _files_in(files, Place.INCOMING, Kind.PARTIAL)
    dirty = _files_in(files, Place.DATA, Kind.CLEAN)
    resumable = [each for each in incoming if files.has(Place.INCOMING, each.id + BESIDE)]
    partial = _size(resumable)
    usage = Usage(
        clean=_size(clean),
        dirty=_size(dirty),
        partial=partial,
        incoming=_size(incoming) - partial,
        files=len(clean) + len(incoming) + len(dirty),
        free=files.free(),
    )
    return Look(usage, clean + resumable)


def _files_in(files: Files, place: Place, kind: Kind) -> list[Candidate]:
    found = []
    for number, entry in enumerate(files.names(place)):
        if not number % SLICE:
            time.sleep(0)
        if is_id(entry.name):
            with contextlib.suppress(FileNotFoundError):
                found.append(_candidate(kind, entry.name, entry.stat(follow_symlinks=False)))
    return found


def _candidate(kind: Kind, name: str, status: os.stat_result) -> Candidate:
    return Candidate(kind, status.st_mtime, name, status.st_blocks * 512)


def _size(candidates: list[Candidate]) -> int:
    return sum(each.size for each in candidates)


class Census:
    """The candidates for eviction, as this process knows them. Any thread; `counted` is told what each look found."""

    def __init__(self, files: Files, clock: Clock, counted: Callable[[Usage], None]) -> None:
        self._files = files
        self._clock = clock
        self._counted = counted
        # Real seconds: when the last look ended, and how long it took.
        self._ended = self._cost = 0.0
        self._lock = threading.Lock()
        # Protected by _lock, which is held for moments. None: nobody has looked yet.
        self._queue: Queue | None = None
        self._looked_at = 0.0
        # Made while somebody looks, who may have missed them; None while nobody does.
        self._made: list[Candidate] | None = None

    def made(self, kind: Kind, name: str) -> None:
        """Note a file that is there from now on, and in use."""
        candidate = Candidate(kind, self._clock.time(), name, 0)
        with self._lock:
            if self._made is not None:
                self._made.append(candidate)
            if self._queue is not None:
                self._queue.add(candidate)

    def look_if_due(self) -> None:
        """Look at all files, where nobody has or that was long ago. One thread at a time."""
        if self._queue is None or self._clock.monotonic() - self._looked_at >= GOOD_FOR:
            self._look()

    def look_for_more(self) -> bool:
        """Look for files that other processes have made since the last look, unless it was a moment ago."""
        if time.monotonic() - self._ended < LOOKS_SHARE * self._cost:
            return False
        self._look()
        return True

    def _look(self) -> None:
        began = time.monotonic()
        with self._lock:
            self._made = []
        found = look(self._files)
        known = {each.id for each in found.candidates}
        queue = Queue(found.candidates)
        with self._lock:
            made, self._made = self._made, None
            for each in made:
                if each.id not in known:
                    queue.add(each)
            self._queue, self._looked_at = queue, self._clock.monotonic()
        self._ended = time.monotonic()
        self._cost = self._ended - began
        self._counted(found.usage)

    def take(self, limits: Limits, *, now: float, excess: int) -> Candidate | None:
        """Remove and return who goes next, as it is at the moment (see `Queue.take`)."""
        while True:
            with self._lock:
                known = None if self._queue is None else self._queue.take(limits, now=now, excess=excess)
            if known is None:
                return None
            found = self._now(known)
            if found is None:
                continue
            if found.used <= known.used:
                return found
            self.put_back(found)  # it has been used since, and has its turn later

    def put_back(self, candidate: Candidate) -> None:
        """Let a candidate that could not go be one again."""
        with self._lock:
            if self._queue is not None:
                self._queue.add(candidate)

    def _now(self, known: Candidate) -> Candidate | None:
        """Return a candidate as it is now; None where it is gone, or none any more."""
        place = PLACES[known.kind]
        if known.kind is Kind.PARTIAL and not self._files.has(place, known.id + BESIDE):
            return None
        try:
            return _candidate(known.kind, known.id, os.lstat(self._files.path(place, known.id)))
        except FileNotFoundError:
            return None
