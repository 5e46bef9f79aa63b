"""Times that processes share: a few numbers in memory that a parent makes and its children inherit."""

from __future__ import annotations

import mmap
import struct

SECONDS = struct.Struct("d")


class Moments:
    """A row of `time.monotonic` values, at first 0.0. Made before the processes are forked; any thread.

    There is no lock: a value is written in one piece, and of two who write one at the same instant the last one wins.
    """

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, max(count, 1) * SECONDS.size)

    def __getitem__(self, number: int) -> float:
        moment: float = SECONDS.unpack_from(self._memory, number * SECONDS.size)[0]
        return moment

    def __setitem__(self, number: int, moment: float) -> None:
        SECONDS.pack_into(self._memory, number * SECONDS.size, moment)
