"""Questions to a store that a caller can do without: asked in threads of their own, and waited for a few seconds.

Once the store has not answered one, none is waited for until it has answered anything (`CircuitBreaker`).
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from ftpvfs.clock import Clock
from ftpvfs.errors import AWAY, failure
from ftpvfs.vfs.breaker import CircuitBreaker, Permit
from ftpvfs.waiting import Job, Wait, about_to_wait, current_job, shared_result_of, working_for

T = TypeVar("T")

# Seconds. Stores tell what is at a path within half a second, after a retry within a few; who uploads gives up after 20
# to 60 without a reply, and --timeout, which is for transfers, is longer than that.
ANSWER_TIMEOUT = 5.0
# Questions without an answer at a time, of all sessions. A store that has so many open answers no further one.
MOST_ASKED = 64
# Probes that cannot be cancelled and are not answered, before no more are sent.
MOST_PROBES = 4


class Questions:
    """Asks what a caller can do without, should the answer take too long. Any thread; made after a fork."""

    def __init__(self, breaker: CircuitBreaker, clock: Clock) -> None:
        self._breaker = breaker
        self._clock = clock
        self._free = threading.BoundedSemaphore(MOST_ASKED)
        self._free_probes = threading.BoundedSemaphore(MOST_PROBES)
        self._lock = threading.Lock()
        # The probe that is on its way. Protected by _lock.
        self._probe = Job()

    def ask(self, question: Callable[[], T], path: str, *, while_it_answers: bool = False) -> T:
        """Return the answer, or raise what the store says; ETIMEDOUT where it takes too long.

        The question goes on then, for all who ask the same; its answer is remembered where answers are. ETIMEDOUT at
        once where the store has not answered the last one, and nothing else since. `while_it_answers`: wait for longer
        as long as the store answers others.
        """
        permit = self._breaker.permit()
        if permit is Permit.PROBE:
            self._send_probe(question)
        if permit is not Permit.WAIT:
            raise failure(errno.ETIMEDOUT, path, "The store does not answer")
        about_to_wait(Wait.ANSWER)
        asked_at = self._clock.monotonic()
        try:
            return self._answer_to(question, path, while_it_answers=while_it_answers)
        except OSError as error:
            if error.errno in AWAY:
                self._breaker.failed(asked_at)
            raise

    def close(self) -> None:
        """Stop waiting for the probe."""
        with self._lock:
            self._probe.cancel()

    def _answer_to(self, question: Callable[[], T], path: str, *, while_it_answers: bool) -> T:
        end = time.monotonic() + ANSWER_TIMEOUT
        if not self._free.acquire(timeout=ANSWER_TIMEOUT):
            raise failure(errno.ETIMEDOUT, path)
        answer: Future[T] = Future()
        job = current_job()  # who leaves cancels the request, unless others wait for it, too
        _in_thread(lambda: self._find(question, answer, job))
        while True:
            since = self._clock.monotonic()
            try:
                return shared_result_of(answer, path, timeout=max(0.0, end - time.monotonic()))
            except TimeoutError:
                if answer.done() or not while_it_answers or self._breaker.answered_at <= since:
                    raise
            end = time.monotonic() + ANSWER_TIMEOUT

    def _find(self, question: Callable[[], T], answer: Future[T], job: Job | None) -> None:
        try:
            with working_for(job):
                answer.set_result(question())
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits
            answer.set_exception(error)
        finally:
            self._free.release()

    def _send_probe(self, question: Callable[[], object]) -> None:
        """Ask without waiting. Whether an answer comes is seen by the breaker; an older probe is not waited for."""
        if not self._free_probes.acquire(blocking=False):
            return
        with self._lock:
            self._probe.cancel()
            job = self._probe = Job()
        _in_thread(lambda: self._find_out(question, job))

    def _find_out(self, question: Callable[[], object], job: Job) -> None:
        try:
            with working_for(job), contextlib.suppress(OSError):  # which is an answer, or none
                question()
        finally:
            self._free_probes.release()


def _in_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="ftpvfs-ask", daemon=True).start()
