"""A circuit breaker: whether a store answers, so that nobody waits for one that has just failed to.

Of the libraries (pybreaker, purgatory, aiobreaker) none fits: they judge calls by how these end, and what opens this
one is a call that does not end; pybreaker makes one call at a time, under its lock, and none is closed by the answer to
a call that it was not asked about, or sends a probe that nobody waits for.
"""

from __future__ import annotations

import enum
import logging
import threading

from ftpvfs.clock import Clock

logger = logging.getLogger(__name__)

# Seconds between two probes of a store that does not answer: at first, and at the most. Guesses: a store that was
# started anew is found within a second, one that is down for a day costs two requests a minute.
FIRST_PROBE, LONGEST_PROBE = 1.0, 30.0


class State(enum.Enum):
    """What is known of a store."""

    CLOSED = "it answers, as far as anybody knows"
    OPEN = "it has not answered, and nobody waits for it"
    HALF_OPEN = "the same, and a probe is on its way"


class Permit(enum.Enum):
    """What may be done with a question."""

    WAIT = "ask it and wait for the answer"
    PROBE = "ask it and wait for nothing: an answer closes the breaker"
    NONE = "do without an answer"


class CircuitBreaker:
    """Whether one store answers this process. Any thread; each process has its own, made after a fork.

    Closed until a question is not answered (`failed`); open until the store answers anything (`answered`), be it a
    question or any other request. While it is open one question at a time is let through as a probe.
    """

    def __init__(self, store: str, clock: Clock) -> None:
        """`store` is what the log calls it, without secrets."""
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        # Protected by _lock; read without it. When the breaker opened, None: it is closed.
        self._opened_at: float | None = None
        self._answered_at = float("-inf")
        self._next_probe = 0.0
        self._interval = FIRST_PROBE
        self._has_probed = False

    @property
    def state(self) -> State:
        """Whether questions are waited for."""
        with self._lock:
            if self._opened_at is None:
                return State.CLOSED
            return State.HALF_OPEN if self._has_probed else State.OPEN

    @property
    def is_open(self) -> bool:
        """Whether nobody waits for the store. Takes no lock."""
        return self._opened_at is not None

    @property
    def answered_at(self) -> float:
        """When the store last answered anything, by the monotonic clock."""
        return self._answered_at

    def permit(self) -> Permit:
        """Return what may be done with a question. Who gets PROBE sends it."""
        now = self._clock.monotonic()
        with self._lock:
            if not self.is_open:
                return Permit.WAIT
            if now < self._next_probe:
                return Permit.NONE
            self._next_probe = now + self._interval
            self._interval = min(2 * self._interval, LONGEST_PROBE)
            self._has_probed = True
            return Permit.PROBE

    def failed(self, asked_at: float) -> None:
        """A question of that time has got no answer: open, unless the store has answered anything since."""
        now = self._clock.monotonic()
        with self._lock:
            if self._opened_at is not None or self._answered_at > asked_at:
                return
            self._opened_at = now
            self._interval = FIRST_PROBE
            self._next_probe = now + self._interval
            self._has_probed = False
        logger.warning(
            "%s does not answer (for %.1f s); what can do without its answer does not wait for it",
            self._store, now - asked_at,
        )  # fmt: skip

    def answered(self) -> None:
        """The store has answered a request, whichever: close."""
        self._answered_at = now = self._clock.monotonic()
        if self._opened_at is None:
            return
        with self._lock:
            opened_at, self._opened_at = self._opened_at, None
        if opened_at is not None:
            logger.warning("%s answers again, after %.1f s", self._store, now - opened_at)
