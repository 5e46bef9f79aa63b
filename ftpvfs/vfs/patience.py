"""Questions to a store that may take them and never answer: asked in threads of their own, waited for with patience."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from ftpvfs.errors import failure
from ftpvfs.waiting import Wait, about_to_wait, shared_result_of

T = TypeVar("T")

# Seconds. Stores tell what is at a path within half a second, after a retry within a few; who uploads gives up after 20
# to 60 without a reply, and --timeout, which is for transfers, is longer than that.
PATIENCE = 5.0
# Questions without an answer at a time, of all sessions. A store that has so many open answers no further one.
MOST_ASKED = 64


class Patience:
    """Asks what a caller can do without, should the answer take too long. Any thread; made after a fork."""

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(MOST_ASKED)

    def ask(self, question: Callable[[], T], path: str) -> T:
        """Return the answer, or raise what the store says; ETIMEDOUT where it takes too long.

        The question goes on then, for all who ask the same; its answer is remembered where answers are.
        """
        about_to_wait(Wait.STORE)
        end = time.monotonic() + PATIENCE
        if not self._free.acquire(timeout=PATIENCE):
            raise failure(errno.ETIMEDOUT, path)
        answer: Future[T] = Future()
        threading.Thread(target=self._answer, args=(answer, question), name="ftpvfs-ask", daemon=True).start()
        return shared_result_of(answer, path, timeout=max(0.0, end - time.monotonic()))

    def _answer(self, answer: Future[T], question: Callable[[], T]) -> None:
        try:
            answer.set_result(question())
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits
            answer.set_exception(error)
        finally:
            self._free.release()

