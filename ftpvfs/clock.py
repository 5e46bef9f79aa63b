"""Time as the rest of the package sees it, so that tests can move it instead of waiting."""

from __future__ import annotations

import threading
import time


class Clock:
    """The system's clocks. Any thread."""

    def monotonic(self) -> float:
        """Return seconds that never run backwards, for ages and delays."""
        return time.monotonic()

    def time(self) -> float:
        """Return seconds since the epoch, for what is stored or shown."""
        return time.time()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait until `event` is set or `seconds` have passed; return whether it is set."""
        return event.wait(seconds)


SYSTEM_CLOCK = Clock()
