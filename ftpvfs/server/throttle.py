"""Rates that data connections keep to (`--bwlimit`), without a thread and without looking again and again.

A `Rate` is a debt of time: what was moved has to be paid for before more may be. A connection asks its `Throttle` how
much it may move now, and where that is nothing for how long to sleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ftpvfs.config import Bandwidth
from ftpvfs.coordination.moments import Moments

# Seconds' worth of bytes that are moved at once: less makes more turns of the loop, more makes a rate jerky.
SLICE = 0.1
# Bytes that are moved at once at the least.
LEAST = 1024
# Seconds that a connection may have been idle and make up for.
CREDIT = 0.5


class Moment(Protocol):
    """Numbers by index that change one at a time: this process's own, or a row that processes share."""

    def __getitem__(self, number: int, /) -> float: ...
    def change(self, number: int, new: Callable[[float], float], /) -> None: ...


class _Own:
    """One number, of one connection."""

    def __init__(self) -> None:
        self._value = 0.0

    def __getitem__(self, number: int) -> float:
        return self._value

    def change(self, number: int, new: Callable[[float], float]) -> None:
        self._value = new(self._value)


class Rate:
    """So many bytes a second, for all who use it together; in several processes where `paid` is shared by them.

    `paid[number]` is when everything that was moved will have been paid for.
    """

    def __init__(self, rate: int, paid: Moment | None = None, number: int = 0) -> None:
        self._rate = rate
        self._paid: Moment = _Own() if paid is None else paid
        self._number = number

    def delay(self, now: float) -> float:
        """Return for how many seconds nothing may be moved, 0.0 where something may be now."""
        return max(self._paid[self._number] - now, 0.0)

    @property
    def slice(self) -> int:
        """How many bytes may be moved at once where any may."""
        return max(int(self._rate * SLICE), LEAST)

    def moved(self, count: int, now: float) -> None:
        """Count bytes that were moved, be it more than a slice."""
        self._paid.change(self._number, lambda paid: max(paid, now - CREDIT) + count / self._rate)


class Rates:
    """Who keeps to what rates, of those that one server knows. Made before the processes are forked."""

    def __init__(self, connection: Bandwidth, users: Mapping[str, Bandwidth]) -> None:
        self._connection = connection
        limited = [(name, limit) for name, limit in users.items() if limit != Bandwidth()]
        paid = Moments(2 * len(limited))
        self._users = {
            name: [Rate(rate, paid, 2 * number + way) if rate else None for way, rate in enumerate(limit)]
            for number, (name, limit) in enumerate(limited)
        }

    def throttle(self, user: str, *, up: bool, limit: int = 0) -> Throttle | None:
        """Return what a new data connection of a user's is to keep to in one direction; None for nothing.

        `limit` is one of the connection's own, in bytes a second; 0 is none.
        """
        way = 0 if up else 1
        rates = [Rate(rate) for rate in (self._connection[way], limit) if rate]
        shared = self._users[user][way] if user in self._users else None
        if shared is not None:
            rates.append(shared)
        return Throttle(rates) if rates else None


class Throttle:
    """The rates that one direction of a data connection keeps to."""

    def __init__(self, rates: Sequence[Rate]) -> None:
        self._rates = rates

    def allowed(self) -> int:
        """Return how many bytes may be moved now; 0: ask again in `delay()` seconds."""
        return 0 if self.delay() else min(rate.slice for rate in self._rates)

    def delay(self) -> float:
        """Return for how many seconds nothing may be moved."""
        now = time.monotonic()
        return max(rate.delay(now) for rate in self._rates)

    def moved(self, count: int) -> None:
        """Count bytes that were moved."""
        now = time.monotonic()
        for rate in self._rates:
            rate.moved(count, now)
