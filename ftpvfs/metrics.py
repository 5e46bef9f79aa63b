"""What has happened how often, over all workers of a server."""

from __future__ import annotations

import enum
import mmap
import threading


class Count(enum.Enum):
    """What is counted; the value is the name under which it is shown."""

    SESSIONS = "sessions"
    REFUSED_FULL = "refused_full"
    REFUSED_ADDRESS = "refused_too_many_from_address"
    REFUSED_BANNED = "refused_banned"
    BANS = "bans"
    LOGINS = "logins"
    LOGINS_FAILED = "logins_failed"
    LOGIN_TIMEOUTS = "login_timeouts"
    IDLE_TIMEOUTS = "idle_timeouts"
    PASSIVE_PORTS_EXHAUSTED = "passive_ports_exhausted"
    FOREIGN_DATA_CONNECTIONS = "foreign_data_connections"
    BAD_PROXY_HEADERS = "bad_proxy_headers"


PLACES = {count: place for place, count in enumerate(Count)}
WORD = 8


class Metrics:
    """Counters that processes share. Made before they are forked; any thread. A dead process's counts stay.

    Each process adds in a slot of its own, so that no lock between them is needed.
    """

    def __init__(self, slots: int = 1) -> None:
        self._slots = slots
        self._slot = 0
        self._lock = threading.Lock()
        self._words = memoryview(mmap.mmap(-1, WORD * slots * len(PLACES))).cast("Q")

    def work_as(self, slot: int) -> None:
        """Be the process of this slot, in a child."""
        self._slot = slot
        self._lock = threading.Lock()

    def add(self, count: Count, number: int = 1) -> None:
        """Count something that has happened."""
        with self._lock:
            self._words[self._slot * len(PLACES) + PLACES[count]] += number

    def value(self, count: Count) -> int:
        """Return how often it has happened, in all processes."""
        return sum(self._words[slot * len(PLACES) + PLACES[count]] for slot in range(self._slots))

    def values(self) -> dict[str, int]:
        """Return all counters by name."""
        return {count.value: self.value(count) for count in Count}
