"""Low level retries: another try for what a moment later may work, at growing and jittered distances.

The stores' own retry loops are switched off where they can be, so that `--low-level-retries` means what it says.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import tenacity

from ftpvfs.backend.errors import is_transient

logger = logging.getLogger(__name__)
T = TypeVar("T")

# rclone's pacer: from 10 ms to 2 s. Ours starts higher, since each try here costs a few milliseconds of CPU.
FIRST_DELAY = 0.05
LONGEST_DELAY = 5.0


class Retry:
    """Runs an operation up to `tries` times while it fails transiently. Any thread.

    The last error is raised as it came: translating it is the caller's.
    """

    def __init__(self, tries: int) -> None:
        options = {
            "stop": tenacity.stop_after_attempt(max(1, tries)),
            "wait": tenacity.wait_random_exponential(multiplier=FIRST_DELAY, max=LONGEST_DELAY),
            "retry": tenacity.retry_if_exception(is_transient),
            "before_sleep": _log,
            "reraise": True,
        }
        self._sync = tenacity.Retrying(**options)  # type: ignore[arg-type]
        self._async = tenacity.AsyncRetrying(**options)  # type: ignore[arg-type]

    def call(self, operation: Callable[[], T]) -> T:
        """Run a blocking operation, in this thread."""
        return self._sync.copy()(operation)

    async def acall(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Run an operation on the event loop it belongs to."""

        async def attempt() -> T:  # tenacity awaits only what it can tell to be a coroutine function
            return await operation()

        return await self._async.copy()(attempt)


def _log(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.info("try %d failed, trying again: %s", state.attempt_number, type(error).__name__)
