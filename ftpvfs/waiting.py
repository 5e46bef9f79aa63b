"""Where code would have to wait, and for what; so that an event loop can try a call before it hands it to a thread.

Code that is about to wait says so (`about_to_wait`). A thread that may not wait for that gets `WouldWait` instead, with
nothing changed yet, and has the call made elsewhere. Every thread may wait for all unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import TypeVar

from ftpvfs.errors import failure

T = TypeVar("T")


class Wait(enum.IntEnum):
    """What a call may have to wait for; each includes those before it.

    ANSWER is a store's answer that is waited for a few seconds at the most, STORE whatever takes as long as it takes.
    """

    NOTHING = 0
    DISK = 1
    ANSWER = 2
    STORE = 3


class WouldWait(Exception):
    """A call would wait for `need`, which its thread may not. No OSError: nobody is to take it for a failure."""

    def __init__(self, need: Wait) -> None:
        super().__init__(f"would wait for the {need.name.lower()}")
        self.need = need


class _Thread(threading.local):
    most = Wait.STORE
    job: Job | None = None


_thread = _Thread()


def about_to_wait(need: Wait) -> None:
    """Raise WouldWait where this thread may not wait for that. Called before anything is changed."""
    if need > _thread.most:
        raise WouldWait(need)


@contextlib.contextmanager
def limited_to(most: Wait) -> Iterator[None]:
    """Let this thread wait for `most` at the most."""
    before, _thread.most = _thread.most, most
    try:
        yield
    finally:
        _thread.most = before


def without_waiting(call: Callable[[], T]) -> T:
    """Make a call in which this thread may not wait at all; raises WouldWait where it would."""
    before, _thread.most = _thread.most, Wait.NOTHING
    try:
        return call()
    finally:
        _thread.most = before


class Job:
    """Work that a thread does for somebody who may stop wanting it. Any thread.

    Cancelling it cancels what its thread waits for in `result_of`; the thread goes on with ECANCELED.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Protected by _lock.
        self._is_cancelled = False
        self._on_cancel: list[Callable[[], object]] = []

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the outcome any more."""
        return self._is_cancelled

    def cancel(self) -> None:
        """Stop wanting the outcome; returns at once."""
        with self._lock:
            self._is_cancelled = True
            calls, self._on_cancel = self._on_cancel, []
        for call in reversed(calls):
            call()

    @contextlib.contextmanager
    def cancelling(self, call: Callable[[], object]) -> Iterator[None]:
        """Make `call` as soon as the job is cancelled, unless the block has ended by then."""
        with self._lock:
            is_late = self._is_cancelled
            if not is_late:
                self._on_cancel.append(call)
        if is_late:
            call()
        try:
            yield
        finally:
            with self._lock, contextlib.suppress(ValueError):  # cancelled meanwhile
                self._on_cancel.remove(call)


@contextlib.contextmanager
def working_for(job: Job | None) -> Iterator[None]:
    """Let what this thread does be part of `job`; None: of none, so that it goes on whoever leaves."""
    before, _thread.job = _thread.job, job
    try:
        yield
    finally:
        _thread.job = before


def current_job() -> Job | None:
    """Return what this thread works for, None where nobody can cancel it."""
    return _thread.job


def result_of(future: Future[T], path: str = "") -> T:
    """Wait for a future of this thread's own and return its outcome; cancelling the job cancels it, too.

    Raises ECANCELED for `path` where the job was cancelled.
    """
    job = _thread.job
    if job is None:
        return future.result()
    try:
        with job.cancelling(future.cancel):
            return future.result()
    except CancelledError as error:
        if job.is_cancelled:
            raise failure(errno.ECANCELED, path) from error
        raise


def shared_result_of(future: Future[T], path: str = "", *, timeout: float | None = None) -> T:
    """The same for a future that others wait for as well: cancelling the job ends the waiting alone.

    Raises ETIMEDOUT for `path` after `timeout` seconds.
    """
    job = _thread.job
    if job is None and timeout is None:
        return future.result()
    woken = threading.Event()
    future.add_done_callback(lambda _: woken.set())
    with contextlib.nullcontext() if job is None else job.cancelling(woken.set):
        in_time = woken.wait(timeout)
    if not future.done():
        raise failure(errno.ECANCELED, path) if in_time else failure(errno.ETIMEDOUT, path)
    return future.result()
