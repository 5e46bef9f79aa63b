"""One budget of memory for the buffers of all transfers, so that many or large files do not grow the process."""

from __future__ import annotations

import threading


class MemoryBudget:
    """Counts bytes against a limit. Any thread.

    Nobody waits here: who is refused waits for a request of its own to end, and who has none under way may exceed the
    limit by one small piece (`force`), so that every transfer goes on however many there are.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        # Reentrant: the garbage collector may close a forgotten file, and so give, in the middle of a `take`.
        self._lock = threading.RLock()
        # Protected by _lock.
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes taken at the moment."""
        return self._used

    def take(self, size: int, *, force: bool = False) -> bool:
        """Take `size` bytes; return False, with nothing taken, when they do not fit and `force` is not set."""
        with self._lock:
            if self._limit is not None and not force and self._used + size > self._limit:
                return False
            self._used += size
            return True

    def give(self, size: int) -> None:
        """Return bytes that were taken."""
        with self._lock:
            self._used -= size
