"""When each path of a queue is due. Pure: what it costs to change one does not grow with how many there are."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

# Entries of the heap beyond twice the number of paths: those that were moved stay in it until their old time has come.
SPARE = 64


class Schedule:
    """Paths by the time from which on they are to be worked on, the earliest first. One thread at a time."""

    def __init__(self, due: Mapping[str, float] | None = None) -> None:
        self._due = dict(due or {})
        self._heap = _heap_of(self._due)

    def __len__(self) -> int:
        return len(self._due)

    def set(self, path: str, due: float | None) -> None:
        """Let a path be due at a time; None: never."""
        if due is None:
            self._due.pop(path, None)
        elif self._due.get(path) != due:
            self._due[path] = due
            heapq.heappush(self._heap, (due, path))
            if len(self._heap) > 2 * len(self._due) + SPARE:
                self._heap = _heap_of(self._due)

    def next_due(self) -> float | None:
        """Return when the first path is due; None where there is none."""
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now: float) -> str | None:
        """Remove the first path that is due by now and return it; None where none is."""
        due = self.next_due()
        if due is None or due > now:
            return None
        path = heapq.heappop(self._heap)[1]
        del self._due[path]
        return path


def _heap_of(due: Mapping[str, float]) -> list[tuple[float, str]]:
    heap = [(at, path) for path, at in due.items()]
    heapq.heapify(heap)
    return heap
