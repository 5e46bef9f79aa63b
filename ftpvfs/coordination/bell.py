"""A bell that wakes whoever waits for it in another process."""

from __future__ import annotations

import contextlib
import os
import select
import stat
from pathlib import Path


class Bell:
    """Rung by any process that shares a folder, heard by one of those that wait. Any thread, also after a fork.

    A ring that nobody waits for is kept for the next who does, as long as some process has the bell open. Several
    rings may be heard as one, and a process that is killed takes what it has heard with it: look for work first.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = str(folder / f"{name}.bell")
        with contextlib.suppress(FileExistsError):
            os.mkfifo(self._path, 0o600)
        # Reading and writing, so that opening waits for nobody and the other ends may come and go.
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISFIFO(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise FileExistsError(f"{self._path} is no FIFO")

    def fileno(self) -> int:
        """Return what an event loop watches for reading; `hear` then."""
        return self._descriptor

    def ring(self) -> None:
        """Wake the one who waits; never blocks."""
        with contextlib.suppress(BlockingIOError):  # full: it was rung often enough
            os.write(self._descriptor, b"!")

    def hear(self) -> bool:
        """Take all rings so far; return whether there was one."""
        try:
            return bool(os.read(self._descriptor, 65536))
        except BlockingIOError:
            return False

    def wait(self, timeout: float | None) -> bool:
        """Wait until the bell is rung, `timeout` seconds at most (None: for ever); return whether it was."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        poll.poll(None if timeout is None else max(0.0, timeout) * 1000)
        return self.hear()

    def close(self) -> None:
        """Release the bell. Who may be waiting in another thread must be woken and have left before."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
