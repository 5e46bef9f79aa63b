"""A file to lock. The lock is a flock, which ends with the process that holds it, whatever ends that."""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref

from ftpvfs.waiting import Wait, about_to_wait

_open: weakref.WeakSet[LockFile] = weakref.WeakSet()


def lock(descriptor: int, kind: int) -> None:
    """Lock an open file with a flock of `kind` (LOCK_EX, LOCK_SH).

    Raises WouldWait, with nothing locked, where somebody else has to unlock it first and this thread may not wait for
    that: nobody can say when a process that was stopped goes on.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        about_to_wait(Wait.DISK)
        fcntl.flock(descriptor, kind)


class LockFile:
    """One open file that this process locks. One thread at a time; a child of the process finds it closed.

    A child has copies of its parent's descriptors, and its copy would hold a lock for as long as the child lives,
    should the parent be killed. So copies are closed as soon as it is there.
    """

    descriptor = -1

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _open.add(self)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or came here by a fork."""
        return self.descriptor < 0

    def lock(self) -> None:
        """Lock the file; wait, or raise WouldWait, while somebody else has locked it."""
        lock(self.descriptor, fcntl.LOCK_EX)

    def try_lock(self) -> bool:
        """Lock the file where nobody else has; return whether it is locked by this object."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def share(self) -> None:
        """Lock the file together with others who share it; wait, or raise WouldWait, while somebody has it alone."""
        lock(self.descriptor, fcntl.LOCK_SH)

    def unlock(self) -> None:
        """Unlock, for all copies of the descriptor, those in a child that is just being forked among them."""
        if self.descriptor >= 0:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def is_in_place(self) -> bool:
        """Tell whether the open file is the one at the path, where others find it; OSError where nobody can say."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        here = os.fstat(self.descriptor)
        return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)

    def close(self) -> None:
        """Unlock and close."""
        self.unlock()
        _open.discard(self)
        self.abandon()

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def abandon(self) -> None:
        """Close without unlocking what other processes may hold by copies of it."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _abandon_in_child() -> None:
    for file in _open:
        file.abandon()
    _open.clear()


os.register_at_fork(after_in_child=_abandon_in_child)
