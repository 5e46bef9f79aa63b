"""A few threads that do what the cache has to do on the disk, for all files together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger(__name__)

# One writes while one hashes. Writers of one file wait for each other inside the kernel, spinning: four of them took
# 1.6 s of CPU to fetch a GiB that two fetch with 1.0 s (measured, two cores).
COUNT = 2


class Workers:
    """Does jobs in the order in which they come, several at a time. Any thread; not carried across a fork.

    `run` takes no lock, so that the garbage collector, which may run inside any other call, can hand over a job. (A
    ThreadPoolExecutor's `submit` deadlocks there: it did, when a forgotten file was collected in the middle of it.)
    """

    def __init__(self, name: str, count: int = COUNT) -> None:
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, job: Callable[[], object]) -> None:
        """Have a thread do the job, soon; after `close` it is done here and now. What it raises is logged."""
        if self._is_closed:
            _do(job)
        else:
            self._jobs.put(job)

    def close(self) -> None:
        """Return when all jobs are done and the threads have ended."""
        self._is_closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                _do(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            _do(job)
            del job  # it may hold the bytes of a range


def _do(job: Callable[[], object]) -> None:
    try:
        job()
    except Exception:  # nobody looks at what a job raises
        logger.exception("the cache's work on the disk")
