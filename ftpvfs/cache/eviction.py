"""Which cached files go, and in which order: decides, never deletes. Pure.

Candidates are clean items and partials alone; who is dirty is never asked about.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Kind(enum.IntEnum):
    """What a file is, in the order in which they make room."""

    CLEAN = 0
    PARTIAL = 1


class Candidate(NamedTuple):
    """One file that may go. `size` is what it takes on the disk, in bytes; `used` is when it last was, wall time."""

    kind: Kind
    used: float
    id: str
    size: int


@dataclass(frozen=True)
class Limits:
    """How much may stay: seconds since the last use, bytes of all files, bytes free on the disk. None: no limit."""

    max_age: float | None = None
    max_size: int | None = None
    min_free: int | None = None

    def excess(self, taken: int, free: int) -> int:
        """Return how many bytes must go, where `taken` are in the cache and `free` are on the disk."""
        over = 0 if self.max_size is None else taken - self.max_size
        return max(over, self.shortage(free), 0)

    def shortage(self, free: int) -> int:
        """Return how many bytes the disk, which has `free`, lacks."""
        return 0 if self.min_free is None else max(self.min_free - free, 0)


class Queue:
    """Candidates in the order in which they go. One thread at a time; none costs the more, the more there are."""

    def __init__(self, candidates: Iterable[Candidate] = ()) -> None:
        self._heaps: dict[Kind, list[Candidate]] = {kind: [] for kind in Kind}
        for each in candidates:
            self._heaps[each.kind].append(each)
        for heap in self._heaps.values():
            heapq.heapify(heap)

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values()))

    def add(self, candidate: Candidate) -> None:
        """Add one."""
        heapq.heappush(self._heaps[candidate.kind], candidate)

    def take(self, limits: Limits, *, now: float, excess: int) -> Candidate | None:
        """Remove and return who goes next: first all that are too old, then others while `excess` bytes must go.

        Clean ones make room before partials, the least recently used first.
        """
        for kind, heap in self._heaps.items():  # in the order of the kinds
            if heap and limits.max_age is not None and now - heap[0].used > limits.max_age:
                return self._pop(kind)
        if excess > 0:
            return next((self._pop(kind) for kind, heap in self._heaps.items() if heap), None)
        return None

    def _pop(self, kind: Kind) -> Candidate:
        return heapq.heappop(self._heaps[kind])
