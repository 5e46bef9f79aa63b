"""Which cached files go, and in which order: decides, never deletes. Pure.

Candidates are clean items and partials alone; who is dirty is never asked about.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable, Iterator
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


def expired(candidates: Iterable[Candidate], limits: Limits, now: float) -> Iterator[Candidate]:
    """Yield those that nobody has used for too long."""
    if limits.max_age is not None:
        yield from (each for each in candidates if now - each.used > limits.max_age)


def in_order(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Yield them as they make room: clean ones before partials, least recently used first.

    From a heap: sorting 100,000 would keep all other threads from running for a tenth of a second.
    """
    heap = list(candidates)
    heapq.heapify(heap)
    while heap:
        yield heapq.heappop(heap)


def victims(candidates: Iterable[Candidate], limits: Limits, *, now: float, taken: int, free: int) -> list[Candidate]:
    """Return who goes: all that are too old, then as many others as the limits of space demand.

    `taken` counts the bytes of all files in the cache, also of those that cannot go.
    """
    known = list(candidates)
    going = list(expired(known, limits, now))
    gone = set(going)
    excess = limits.excess(taken, free) - sum(each.size for each in going)
    for each in in_order(known):
        if excess <= 0:
            break
        if each not in gone:
            going.append(each)
            excess -= each.size
    return going
