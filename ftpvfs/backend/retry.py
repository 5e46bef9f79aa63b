"""Low level retries: another try for what a moment later may work, at growing and jittered distances.

The stores' own retry loops are switched off where they can be, so that `--low-level-retries` means what it says.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import tenacity

from ftpvfs.backend.errors import is_transient

logger = logging.getLogger(__name__)
T = TypeVar("T")

# rclone's pacer: from 10 ms to 2 s. Ours starts higher, since each try here costs a few milliseconds of CPU.
FIRST_DELAY = 0.05
LONGEST_DELAY = 5.0
# Set on an error once all tries are used up. An operation made of others that retry for themselves (the pages of a
# listing, the parts of a copy) is not tried again as a whole: ten tries of ten would be a hundred.
SPENT = "ftpvfs_spent"


class Retry:
    """Runs an operation up to `tries` times while it fails transiently. Any thread.

    No try begins once `patience` seconds have passed (0: no end): a store that hangs is waited for once, not ten times.
    The last error is raised as it came: translating it is the caller's.
    """

    def __init__(self, tries: int, patience: float = 0.0) -> None:
        stop: Any = tenacity.stop_after_attempt(max(1, tries))
        if patience:
            stop |= tenacity.stop_after_delay(patience)
        options = {
            "stop": stop,
            "wait": tenacity.wait_random_exponential(multiplier=FIRST_DELAY, max=LONGEST_DELAY),
            "retry": tenacity.retry_if_exception(_is_worth_another),
            "before_sleep": _log,
            "reraise": True,
        }
        self._sync = tenacity.Retrying(**options)
        self._async = tenacity.AsyncRetrying(**options)

    def call(self, operation: Callable[[], T]) -> T:
        """Run a blocking operation, in this thread."""
        try:
            return self._sync.copy()(operation)
        except Exception as error:
            setattr(error, SPENT, True)
            raise

    async def acall(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Run an operation on the event loop it belongs to."""

        async def attempt() -> T:  # tenacity awaits only what it can tell to be a coroutine function
            try:
                return await operation()
            except BaseException as error:  # noqa: BLE001 - raised again
                raise without_frames(error)  # noqa: B904 - it is the same error

        try:
            return await self._async.copy()(attempt)
        except BaseException as error:  # noqa: BLE001 - raised again; who cancels a request leaves as much as a failure
            setattr(error, SPENT, True)
            raise without_frames(error)  # noqa: B904 - without tenacity's own frames, too


def without_frames(error: BaseException) -> BaseException:
    """Return an error that holds nothing of what failed, neither do those that it came of.

    Stores' libraries leave errors in cycles with the frames that they came through, and with those the bytes that were
    sent: some 90 MiB an upload (measured), until Python happens to collect. What was wrong is in the errors' words.
    """
    seen: dict[int, BaseException] = {}
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is not None and id(found) not in seen:
            seen[id(found)] = found.with_traceback(None)
            left += [found.__cause__, found.__context__]
    return error


def _is_worth_another(error: BaseException) -> bool:
    return not getattr(error, SPENT, False) and is_transient(error)


def _log(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.info("try %d failed, trying again: %s", state.attempt_number, type(error).__name__)
