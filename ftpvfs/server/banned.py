"""What a process knows of a ban list, so that its event loop never waits for the disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from ftpvfs.coordination.sessions import network_of
from ftpvfs.metrics import Count, Metrics
from ftpvfs.server.offload import BANS, Lane
from ftpvfs.waiting import Wait

logger = logging.getLogger(__name__)

# Seconds after which the bans of other servers with the same list are known here; those of one server's at once.
OTHERS_BANS = 1.0
# Addresses that are known at once.
MOST_KNOWN = 10_000


class BanList(Protocol):
    """What is asked of `Bans`. One thread asks."""

    def is_banned(self, ip: str) -> bool:
        """Tell whether the address is refused now."""

    def failed(self, ip: str) -> bool:
        """Count a failure; return whether the address is refused from now on."""


class _Answer(NamedTuple):
    is_banned: bool
    bans: int  # how many there were, of this server's
    until: float


class Banned:
    """Which addresses are refused. Any thread.

    One thread does all that reads or writes the list, and for ever: each new one would open the database anew.
    """

    def __init__(self, bans: BanList | None, metrics: Metrics) -> None:
        self._bans = bans
        self._metrics = metrics
        self._desk = Lane(f"ftpvfs-{BANS}", 1, Wait.STORE, idle=None)
        # By network. Written by that thread alone.
        self._known: dict[bytes, _Answer] = {}

    def answer(self, ip: str) -> bool | None:
        """Tell whether the address is refused, at once; None where that has to be asked."""
        if self._bans is None:
            return False
        known = self._known.get(network_of(ip))
        if known is None or known.bans != self._metrics.value(Count.BANS) or time.monotonic() >= known.until:
            return None
        return known.is_banned

    def ask(self, ip: str) -> Future[bool]:
        """Find out whether the address is refused; where the list cannot be read it is not."""
        return self._at_desk(lambda bans: self._ask(bans, ip))

    def failed(self, ip: str) -> Future[bool]:
        """Have a wrong password counted; the outcome is whether the address is refused from now on."""
        return self._at_desk(lambda bans: self._count(bans, ip))

    def close(self) -> None:
        """Keep no thread; what still comes is done."""
        self._desk.retire()

    def _at_desk(self, work: Callable[[BanList], bool]) -> Future[bool]:
        outcome: Future[bool] = Future()
        bans = self._bans
        if bans is None:
            outcome.set_result(False)
            return outcome

        def do() -> None:
            try:
                outcome.set_result(work(bans))
            except Exception as error:  # noqa: BLE001 - somebody waits for an outcome
                logger.warning("the ban list cannot be used: %s", error)
                outcome.set_result(False)

        self._desk.submit(do)
        return outcome

    def _ask(self, bans: BanList, ip: str) -> bool:
        known = self.answer(ip)  # many may have asked at once
        if known is None:
            count, until = self._metrics.value(Count.BANS), time.monotonic() + OTHERS_BANS
            try:
                known = bans.is_banned(ip)
            except OSError as error:
                logger.warning("the ban list cannot be read: %s", error)
                known = False
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[network_of(ip)] = _Answer(known, count, until)
        return known

    def _count(self, bans: BanList, ip: str) -> bool:
        is_new = bans.failed(ip)
        if is_new:
            self._metrics.add(Count.BANS)
            self._ask(bans, ip)
        return is_new
