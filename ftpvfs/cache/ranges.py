"""Sets of byte ranges: which bytes of a file are present. Pure.

A range is `(start, stop)`, stop excluded, and never empty.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]


class RangeSet:
    """A set of offsets, kept as few ranges as possible: sorted, disjoint, with a gap between each and the next.

    >>> present = RangeSet([(0, 10), (20, 30)])
    >>> present.add(10, 20)
    >>> list(present), present.missing(5, 40)
    ([(0, 30)], [(30, 40)])
    """

    __slots__ = ("_starts", "_stops")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Put [start, stop) in; an empty range changes nothing."""
        if start >= stop:
            return
        first = bisect_left(self._stops, start)  # the first range that reaches `start`, if only with its end
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def remove(self, start: int, stop: int) -> None:
        """Take [start, stop) out; what is not in does not matter."""
        if start >= stop:
            return
        first = bisect_right(self._stops, start)  # the first range with a byte at `start` or behind it
        last = bisect_left(self._starts, stop)
        if first >= last:
            return
        left, right = self._starts[first], self._stops[last - 1]
        kept = [each for each in ((left, start), (stop, right)) if each[0] < each[1]]
        self._starts[first:last] = [each[0] for each in kept]
        self._stops[first:last] = [each[1] for each in kept]

    def missing(self, start: int, stop: int) -> list[Range]:
        """Return the ranges of [start, stop) that are not in."""
        found = []
        for number in range(bisect_right(self._stops, start), len(self._starts)):
            if self._starts[number] >= stop:
                break
            if start < self._starts[number]:
                found.append((start, self._starts[number]))
            start = self._stops[number]
        if start < stop:
            found.append((start, stop))
        return found

    def contiguous(self, start: int) -> int:
        """Return how many bytes are in from `start` on, without a gap; 0 where `start` itself is not in."""
        number = bisect_right(self._stops, start)
        if number == len(self._starts) or self._starts[number] > start:
            return 0
        return self._stops[number] - start

    def covers(self, start: int, stop: int) -> bool:
        """Tell whether all of [start, stop) is in; nothing is always in."""
        return start >= stop or self.contiguous(start) >= stop - start

    @property
    def total(self) -> int:
        """How many bytes are in."""
        return sum(self._stops) - sum(self._starts)

    def copy(self) -> RangeSet:
        """Return a set of its own with the same bytes."""
        copy = RangeSet()
        copy._starts, copy._stops = self._starts[:], self._stops[:]
        return copy

    def __iter__(self) -> Iterator[Range]:
        return iter(list(zip(self._starts, self._stops, strict=True)))

    def __len__(self) -> int:
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RangeSet({list(self)})"
