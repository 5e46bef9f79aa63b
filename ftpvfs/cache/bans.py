"""Addresses from which too many wrong passwords came, for all workers and servers with one cache folder."""

from __future__ import annotations

import logging
from pathlib import Path

from ftpvfs.cache.database import Database
from ftpvfs.clock import SYSTEM_CLOCK, Clock
from ftpvfs.coordination.sessions import network_of

logger = logging.getLogger(__name__)


class Bans(Database):
    """Counts failures of each address and says who is refused. Any thread, any process; made after a fork.

    `after` failures in `window` seconds have an address refused for `time` seconds from the last of them. IPv6
    addresses count as the network that one customer has. None is for ever. What is counted survives a restart, but not
    a power cut to the last one.
    """

    what = "ban list"
    loss = "nobody is banned any more"

    def __init__(
        self, folder: Path, *, after: int, window: float | None, time: float | None, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        super().__init__(folder, durable=False)
        self._after = after
        self._window = window
        self._time = time
        self._clock = clock

    def is_banned(self, ip: str) -> bool:
        """Tell whether the address is refused now."""
        until = self._read(f"ban:{_key(ip)}")
        return until is not None and self._clock.time() < until

    def failed(self, ip: str) -> bool:
        """Count a failure; return whether the address is refused from now on, having not been before."""
        key = _key(ip)

        def count() -> bool:
            now = self._clock.time()
            begin = float("-inf") if self._window is None else now - self._window
            times = [at for at in self._read(f"failed:{key}") or () if begin < at <= now]
            times.append(now)
            if len(times) < self._after:
                self._write(f"failed:{key}", times, expire=self._window)
                return False
            self._delete(f"failed:{key}")
            self._write(f"ban:{key}", float("inf") if self._time is None else now + self._time, expire=self._time)
            return True

        is_banned = self._atomically(count)
        if is_banned:
            logger.warning("%s is refused from now on: %d wrong passwords", ip, self._after)
        return is_banned

    def forgive(self, ip: str) -> None:
        """Let the address in again, and forget its failures."""
        for kind in ("ban", "failed"):
            self._delete(f"{kind}:{_key(ip)}")


def _key(ip: str) -> str:
    return network_of(ip).hex()
