"""Locks between processes: one writer of a path; one who renames a folder, or many who write in it.

All are the system's: what holds one is a process, not a record of it that must be cleared away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import sys
import threading
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from ftpvfs.coordination.lockfile import LockFile
from ftpvfs.paths import ancestors, encoded
from ftpvfs.waiting import Wait, about_to_wait

# Whether the system has locks of parts of a file that belong to who has opened it, and we know how it writes them.
HAS_RANGES = sys.platform == "linux" and sys.maxsize > 2**32


class ThreadLocks:
    """One holder of each path among the threads of this process; of a folder one, or many who write in it."""

    def close(self) -> None:
        """Nothing is open."""

    def __init__(self) -> None:
        self._folders = _FolderLocks()
        self._lock = threading.Lock()
        # path -> (its lock, how many hold it or wait for it). Protected by _lock.
        self._paths: dict[str, tuple[threading.Lock, int]] = {}

    @contextlib.contextmanager
    def hold(self, *paths: str, blocking: bool = True) -> Iterator[None]:
        """Hold all of the paths; wait for each that somebody else holds. Not to be nested.

        Not `blocking`: raises BlockingIOError instead of waiting.
        """
        with contextlib.ExitStack() as held:
            for path in sorted(set(paths)):
                held.enter_context(self._one(path, blocking=blocking))
            yield

    def hold_folders(self, *folders: str) -> contextlib.AbstractContextManager[None]:
        """Be the only one at work in the folders; see `PathLocks.hold_folders`."""
        return self._folders.hold(alone=folders, together=_above(folders))

    @contextlib.contextmanager
    def _one(self, path: str, *, blocking: bool) -> Iterator[None]:
        with self._lock:
            lock, users = self._paths.get(path, (threading.Lock(), 0))
            self._paths[path] = (lock, users + 1)
        try:
            if blocking:
                about_to_wait(Wait.STORE)  # for whoever changes the store at the path
            if not lock.acquire(blocking=blocking):
                raise BlockingIOError(errno.EAGAIN, "Somebody else holds the path", path)
            try:
                yield
            finally:
                lock.release()
        finally:
            with self._lock:
                lock, users = self._paths[path]
                if users == 1:
                    del self._paths[path]
                else:
                    self._paths[path] = (lock, users - 1)


class PathLocks:
    """One holder of each path among all threads of all processes that share a folder. Any thread.

    Locks of folders stand before those of paths: who holds a folder may take paths, and never the other way round.
    """

    def __init__(self, folder: Path) -> None:
        self._threads = ThreadLocks()
        self._processes: _RangeLocks | _FileLocks = _RangeLocks(folder) if HAS_RANGES else _FileLocks(folder)
        self._folders = _FolderLocks(self._processes)

    @contextlib.contextmanager
    def hold(self, *paths: str, blocking: bool = True) -> Iterator[None]:
        """Hold all of the paths; wait for each that somebody else holds. Not to be nested.

        Not `blocking`: raises BlockingIOError instead of waiting.
        """
        digests = sorted({_digest(path) for path in paths})
        with self._threads.hold(*paths, blocking=blocking), contextlib.ExitStack() as held:
            for digest in digests:
                self._processes.hold(digest, held, blocking=blocking)
            yield

    @contextlib.contextmanager
    def hold_in_folders(self, path: str) -> Iterator[None]:
        """Hold the path while nobody holds a folder above it; wait for all. Not to be nested."""
        with self._folders.hold(together=_above([path])), self.hold(path):
            yield

    def hold_folders(self, *folders: str) -> contextlib.AbstractContextManager[None]:
        """Hold folders alone: nobody else holds them, one above or below them, or a path below them in its folders.

        Waits for those who do. Who comes meanwhile waits behind, so that many who take turns in a folder do not keep
        one who wants it alone waiting for ever. Not to be nested.
        """
        return self._folders.hold(alone=folders, together=_above(folders))

    def close(self) -> None:
        """Release what is open. Who holds a path goes on to hold it until they are through."""
        self._processes.close()


def _digest(name: str) -> bytes:
    return blake2b(encoded(name), digest_size=16).digest()


def _above(paths: Iterable[str]) -> set[str]:
    """Return the folders above the paths but for the root, which nobody renames."""
    return {folder for path in paths for folder in ancestors(path) if folder}


class _Gate:
    """One folder as this process holds it, by one thread alone or by any number together."""

    def __init__(self) -> None:
        # Threads that hold it or wait; protected by the lock of all gates.
        self.users = 0
        # Held by the one who is next.
        self.line = threading.Lock()
        self.state = threading.Condition()
        # Protected by state: how many hold it, -1 for one alone; what releases it for other processes.
        self.holders = 0
        self.processes = contextlib.ExitStack()


class _FolderLocks:
    """Locks of folders, each held alone or together, in the order of asking among threads and among processes.

    The first thread of a process that holds a folder takes it for the process, the last one gives it back. A second
    lock of each folder, its turnstile, is passed by all and kept by one who waits to be alone.
    """

    def __init__(self, processes: _RangeLocks | _FileLocks | None = None) -> None:
        self._processes = processes
        self._lock = threading.Lock()
        # Protected by _lock.
        self._gates: dict[str, _Gate] = {}

    @contextlib.contextmanager
    def hold(self, *, alone: Iterable[str] = (), together: Iterable[str] = ()) -> Iterator[None]:
        """Hold folders, one by one in the order of their names, which is the same for everybody."""
        single = set(alone)
        with contextlib.ExitStack() as held:
            for folder in sorted(single | set(together)):
                held.enter_context(self._one(folder, alone=folder in single))
            yield

    @contextlib.contextmanager
    def _one(self, folder: str, *, alone: bool) -> Iterator[None]:
        with self._lock:
            gate = self._gates.setdefault(folder, _Gate())
            gate.users += 1
        try:
            self._enter(gate, folder, alone=alone)
            try:
                yield
            finally:
                self._leave(gate)
        finally:
            with self._lock:
                gate.users -= 1
                if not gate.users:
                    del self._gates[folder]

    def _enter(self, gate: _Gate, folder: str, *, alone: bool) -> None:
        about_to_wait(Wait.STORE)
        with gate.line, contextlib.ExitStack() as turnstile:
            # Before this thread counts as a holder: it may wait for somebody here who waits for all holders to go.
            self._hold_for_process(f"{folder}//", turnstile)  # no path has such a name
            with gate.state:
                gate.state.wait_for(lambda: gate.holders == 0 or (gate.holders > 0 and not alone))
                is_first = gate.holders == 0
                gate.holders = -1 if alone else gate.holders + 1
            try:
                if is_first:
                    self._hold_for_process(f"{folder}/", gate.processes, together=not alone)
            except BaseException:
                self._leave(gate)
                raise

    def _hold_for_process(self, name: str, held: contextlib.ExitStack, *, together: bool = False) -> None:
        if self._processes is not None:
            self._processes.hold(_digest(name), held, together=together)

    def _leave(self, gate: _Gate) -> None:
        with gate.state:
            if gate.holders in (1, -1):
                gate.processes.close()
            gate.holders = max(0, gate.holders - 1)
            gate.state.notify_all()


class _RangeLocks:
    """A byte of one file for each path, at the place that its digest says. Nothing is made or removed for a lock.

    Linux's locks of open files (F_OFD_SETLK) belong to the file as this object has opened it: several objects in one
    process exclude each other as processes do, and closing one's file lets go of no other's locks, as it would with
    POSIX's. The threads that share an object exclude each other before.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "paths.lock"
        self._lock = threading.Lock()
        # Protected by _lock: the file, None while nobody needs it; who hold a place of it, or wait for one.
        self._file: LockFile | None = self._opened()
        self._users = 0
        self._is_closing = False

    def hold(
        self, digest: bytes, held: contextlib.ExitStack, *, together: bool = False, blocking: bool = True
    ) -> None:
        """Lock what has the digest, until `held` is left; `together`: with all others who do so, too.

        Not `blocking`: raises BlockingIOError instead of waiting.
        """
        file = self._use()
        held.callback(self._leave, file)
        place = int.from_bytes(digest[:8], "little") >> 2
        kind = fcntl.F_RDLCK if together else fcntl.F_WRLCK
        fcntl.fcntl(file.descriptor, fcntl.F_OFD_SETLKW if blocking else fcntl.F_OFD_SETLK, _flock(kind, place))
        held.callback(self._let_go, file, place)

    def _let_go(self, file: LockFile, place: int) -> None:
        if not file.is_closed:  # by a fork: this is a child, and the lock its parent's
            fcntl.fcntl(file.descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, place))

    def _use(self) -> LockFile:
        with self._lock:
            file = self._file
            if file is None or file.is_closed or not file.is_in_place():
                # Somebody has emptied the cache folder; the old file is its holders' until they are through.
                file = self._file = self._opened()
            self._users += 1
            return file

    def _leave(self, file: LockFile) -> None:
        if file.is_closed:  # this is a child
            return
        with self._lock:
            self._users -= 1
            self._close_unused_locked()

    def close(self) -> None:
        """Release the file as soon as nobody uses it."""
        with self._lock:
            self._is_closing = True
            self._close_unused_locked()

    def _close_unused_locked(self) -> None:
        if self._is_closing and not self._users and self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> LockFile:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return LockFile(str(self._path))


def _flock(kind: int, place: int) -> bytes:
    """Return C's struct flock for one byte: type, whence, start, length, process."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, place, 1, 0)


class _FileLocks:
    """A file for each path, named by its digest, made when it is wanted and removed by its holder.

    Files that killed holders have left are removed when locks are opened on the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "locks"
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep()

    def hold(
        self, digest: bytes, held: contextlib.ExitStack, *, together: bool = False, blocking: bool = True
    ) -> None:
        """Lock what has the digest, until `held` is left. `together` is alone here: a file that goes with its holder
        cannot have several. Not `blocking`: raises BlockingIOError instead of waiting.
        """
        held.callback(_remove, self._acquire(str(self._folder / digest.hex()), blocking=blocking))

    def close(self) -> None:
        """Nothing is open but what is held."""

    def _acquire(self, path: str, *, blocking: bool) -> LockFile:
        """Lock the file; when its former holder has removed it meanwhile, the one that stands there now."""
        while True:
            try:
                file = LockFile(path)
            except FileNotFoundError:  # somebody has emptied the cache folder
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                continue
            try:
                if not blocking and not file.try_lock():
                    raise BlockingIOError(errno.EAGAIN, "Somebody else holds the lock", path)
                if blocking:
                    file.lock()
                if file.is_in_place():
                    return file
            except BaseException:
                file.close()
                raise
            file.close()

    def _sweep(self) -> None:
        for name in os.listdir(self._folder):
            with contextlib.suppress(OSError), contextlib.closing(LockFile(str(self._folder / name))) as file:
                if file.try_lock():
                    _unlink(file)


def _remove(file: LockFile) -> None:
    """Remove the file, then unlock: who waits for it finds that it is gone and makes a new one."""
    try:
        _unlink(file)
    finally:
        file.close()


def _unlink(file: LockFile) -> None:
    if not file.is_closed and file.is_in_place():
        os.unlink(file.path)


class Leader:
    """A role of which there is at most one holder among all processes that share a folder. Any thread."""

    def __init__(self, folder: Path, role: str) -> None:
        self._path = str(folder / f"{role}.leader")
        self._lock = threading.Lock()
        # Protected by _lock. None: not held.
        self._held: LockFile | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the role; in a child that was forked meanwhile it does not."""
        held = self._held
        return held is not None and not held.is_closed

    def try_acquire(self) -> bool:
        """Take the role where nobody holds it, without waiting; return whether it is held now, by this object."""
        with self._lock:
            if self.is_held and self._held is not None and self._held.is_in_place():
                return True
            self._give_up_locked()  # where somebody has emptied the folder it is anybody's again
            file = LockFile(self._path)
            try:
                if file.try_lock():
                    self._held = file
            finally:
                if self._held is not file:
                    file.close()
            return self._held is file

    def release(self) -> None:
        """Give the role up; nothing happens where it is not held."""
        with self._lock:
            self._give_up_locked()

    def _give_up_locked(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
