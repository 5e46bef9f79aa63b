"""Times that processes share: a few numbers in memory that a parent makes and its children inherit."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import tempfile
import threading
import weakref
from collections.abc import Callable

SECONDS = struct.Struct("d")


class Moments:
    """A row of `time.monotonic` values, at first 0.0. Made before the processes are forked; any thread.

    Reading takes no lock: a value is written in one piece. Changing one does, a POSIX lock, which children do not share
    and which a dead process does not hold.
    """

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, max(count, 1) * SECONDS.size)
        self._thread = threading.Lock()
        self._file, path = tempfile.mkstemp()  # for its locks alone, a byte for each value
        os.unlink(path)
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, number: int) -> float:
        moment: float = SECONDS.unpack_from(self._memory, number * SECONDS.size)[0]
        return moment

    def change(self, number: int, new: Callable[[float], float]) -> None:
        """Put `new(value)` in a value's place; of two who change it at once neither is lost."""
        with self._thread:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, number)
            try:
                SECONDS.pack_into(self._memory, number * SECONDS.size, new(self[number]))
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)
