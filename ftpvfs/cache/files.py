"""The files of a cache folder: all that is done with the disk, but for the databases, is done here.

`data/` holds what is dirty, with a record beside each file; `clean/` what the store has, too; `incoming/` uploads that
are not finished and what came of those that never were; `quarantine/` what nobody understands. Names are ids, so a name
is never used twice for other bytes.

Everything that a crash could tear is one call of `Files`, so tests put another one in its place: one that forgets what
was not synced and dies at a call of their choice.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import fcntl
import logging
import os
import secrets
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from ftpvfs.coordination.lockfile import LockFile, lock
from ftpvfs.errors import failure
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)

BESIDE = ".json"
UNFINISHED = ".new"
# What the system takes in one pwritev (IOV_MAX).
MOST_PIECES = 1024
COPY_STEP = 2**26
BOOT_ID = "/proc/sys/kernel/random/boot_id"
FICLONE = 0x40049409  # ioctl of Linux: let both files have the same blocks until one of them is written
FALLOC_FL_KEEP_SIZE = 1
# What a file system says that cannot do one of these.
CANNOT = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTTY, errno.EBADF, errno.EPERM}


class Place(enum.Enum):
    """A folder of files."""

    DATA = "data"
    CLEAN = "clean"
    INCOMING = "incoming"
    QUARANTINE = "quarantine"


class DataFile:
    """An open file with a lease: while it is open, in whichever process, nobody removes it for its space.

    Any thread. A child of this process finds it closed: its copy would keep the lease when the parent is gone.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        _open.add(self)

    def close(self) -> None:
        """Give up the lease; may be called again."""
        descriptor, self.descriptor = self.descriptor, -1
        _open.discard(self)
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close  # who is forgotten holds nothing

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or came here by a fork."""
        return self.descriptor < 0


_open: weakref.WeakSet[DataFile] = weakref.WeakSet()


def _close_in_child() -> None:
    for file in list(_open):
        file.close()


os.register_at_fork(after_in_child=_close_in_child)


class Files:
    """The files below one folder. Any thread, any process. Every failure is an OSError with an errno.

    With `syncs` off nothing is ever synced: what was acknowledged survives the end of a process, but no power cut.
    """

    def __init__(self, folder: Path, *, syncs: bool = True) -> None:
        self.folder = folder
        self._syncs = syncs
        self._folders = {place: str(folder / place.value) for place in Place}

    def prepare(self) -> None:
        """Make the folders."""
        for path in self._folders.values():
            os.makedirs(path, mode=0o700, exist_ok=True)

    def path(self, place: Place, name: str) -> str:
        """Return where a file is."""
        return f"{self._folders[place]}/{name}"

    # --- opening

    def create(self, place: Place, name: str) -> DataFile:
        """Make a new, empty file and lease it."""
        path = self.path(place, name)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_EXCL, 0o600)
            try:
                lock(descriptor, fcntl.LOCK_SH)
                if os.fstat(descriptor).st_nlink:
                    return DataFile(descriptor)
            except BaseException:
                self.unlink(place, name)
                os.close(descriptor)
                raise
            # Another process has found it before it was leased, took it for left behind, and removed it.
            os.close(descriptor)

    def open(self, place: Place, name: str, *, writable: bool = False) -> DataFile:
        """Open and lease a file; ENOENT where it is gone, or goes just now."""
        path = self.path(place, name)
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            lock(descriptor, fcntl.LOCK_SH)
            if not os.fstat(descriptor).st_nlink:
                raise failure(errno.ENOENT, path)
        except BaseException:
            os.close(descriptor)
            raise
        return DataFile(descriptor)

    def look_at(self, place: Place, name: str) -> DataFile:
        """Open a file without leasing it; ENOENT where it is gone."""
        return DataFile(os.open(self.path(place, name), os.O_RDONLY | os.O_CLOEXEC))

    def claim(self, place: Place, name: str) -> DataFile | None:
        """Open a file that nobody has leased, and keep others from leasing it; None where that cannot be."""
        try:
            descriptor = os.open(self.path(place, name), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return DataFile(descriptor)
        except BlockingIOError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    # --- bytes

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        while view:
            done = os.pwrite(descriptor, view, offset)
            view, offset = view[done:], offset + done

    def pwritev(self, descriptor: int, pieces: Sequence[bytes | memoryview], offset: int) -> None:
        """Write all pieces, one behind the other."""
        if len(pieces) == 1 or not hasattr(os, "pwritev"):
            for piece in pieces:
                self.pwrite(descriptor, piece, offset)
                offset += len(piece)
            return
        for first in range(0, len(pieces), MOST_PIECES):
            some = pieces[first : first + MOST_PIECES]
            size = sum(map(len, some))
            done = os.pwritev(descriptor, some, offset)
            if done < size:  # a disk that is full takes a part before it says so
                self.pwrite(descriptor, b"".join(some)[done:], offset + done)
            offset += size

    def pread(self, descriptor: int, size: int, offset: int) -> bytes:
        """Read up to `size` bytes."""
        return os.pread(descriptor, size, offset)

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut the file, or let it grow by a hole."""
        os.ftruncate(descriptor, size)

    def size(self, descriptor: int) -> int:
        """Return the file's length."""
        return os.fstat(descriptor).st_size

    def links(self, descriptor: int) -> int:
        """Return how many names the file has."""
        return os.fstat(descriptor).st_nlink

    def taken(self, descriptor: int) -> int:
        """Return what the file takes on the disk."""
        return os.fstat(descriptor).st_blocks * 512

    def use(self, descriptor: int, time: float) -> None:
        """Note that the file is in use: eviction goes by its modification time, which reading does not change."""
        os.utime(descriptor, (time, time))

    def reserve(self, descriptor: int, size: int) -> bool:
        """Take the space for `size` bytes now, without changing the file's length; False where that cannot be."""
        if _fallocate is None:
            return False
        while _fallocate(descriptor, FALLOC_FL_KEEP_SIZE, 0, size):
            code = ctypes.get_errno()
            if code in CANNOT:
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        return True

    def clone(self, source: int, target: int, size: int) -> None:
        """Let the first `size` bytes of `target` be those of `source`; without copying where the file system can."""
        try:
            fcntl.ioctl(target, FICLONE, source)
        except OSError as error:
            if error.errno not in CANNOT:
                raise
            self._copy(source, target, size)

    def _copy(self, source: int, target: int, size: int) -> None:
        at = 0
        while at < size:
            try:
                done = os.copy_file_range(source, target, min(size - at, COPY_STEP), at, at)
            except (OSError, AttributeError) as error:
                if isinstance(error, OSError) and error.errno not in CANNOT:
                    raise
                data = os.pread(source, min(size - at, 2**20), at)
                done = len(data)
                self.pwrite(target, data, at)
            if not done:
                raise OSError(errno.EIO, "A cached file is shorter than it was")
            at += done

    # --- names

    def move(self, name: str, source: Place, target: Place, new: str | None = None) -> None:
        """Rename a file from one place to another."""
        self._rename(self.path(source, name), self.path(target, new or name))

    def _rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def link(self, place: Place, name: str, new: str) -> None:
        """Give a file a second name."""
        os.link(self.path(place, name), self.path(place, new))

    def unlink(self, place: Place, name: str) -> int:
        """Remove a file's name; return what that freed on the disk, 0 where it was gone or has another name."""
        path = self.path(place, name)
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            os.unlink(path)
            return status.st_blocks * 512 if status.st_nlink == 1 else 0
        return 0

    def names(self, place: Place) -> Iterator[os.DirEntry[str]]:
        """Yield all that is in a place."""
        with os.scandir(self._folders[place]) as entries:
            yield from entries

    def has(self, place: Place, name: str) -> bool:
        """Tell whether a file is there."""
        return os.path.lexists(self.path(place, name))

    def put_in_quarantine(self, place: Place, name: str, why: str) -> None:
        """Move away what nobody understands; nothing is deleted."""
        number, target = 0, name
        while self.has(Place.QUARANTINE, target):
            number += 1
            target = f"{name}.{number}"
        with contextlib.suppress(FileNotFoundError):
            self.move(name, place, Place.QUARANTINE, target)
            logger.error("%s is in %s now: %s", self.path(place, name), self.path(Place.QUARANTINE, target), why)

    # --- records beside files

    def write_beside(self, place: Place, name: str, data: bytes, *, syncs: bool = True) -> DataFile:
        """Write the record of a file beside it, or replace it whole; on the disk on return, but for its name.

        While the result is open, recovery takes it for a change that is under way.
        """
        unfinished = f"{name}{BESIDE}{UNFINISHED}-{secrets.token_hex(8)}"  # others may be writing it, too
        file = self.create(place, unfinished)
        try:
            self.pwrite(file.descriptor, data, 0)
            if syncs:
                self.sync(file.descriptor)
            self._rename(self.path(place, unfinished), self.path(place, name + BESIDE))
        except BaseException as error:
            if isinstance(error, Exception):
                self.unlink(place, unfinished)
            file.close()
            raise
        return file

    def read_beside(self, place: Place, name: str) -> bytes | None:
        """Return the record beside a file; None where there is none."""
        try:
            with open(self.path(place, name + BESIDE), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    # --- the disk

    def sync(self, descriptor: int) -> None:
        """Return once the file's bytes and length are on the disk."""
        if self._syncs:
            about_to_wait(Wait.DISK)
            _sync(descriptor)

    def sync_folder(self, place: Place) -> None:
        """Return once the names in a place are on the disk."""
        if self._syncs:
            about_to_wait(Wait.DISK)
            descriptor = os.open(self._folders[place], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def free(self) -> int:
        """Return how many bytes the disk has left for us."""
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def may_be_torn(self) -> bool:
        """Note how this process syncs; tell whether the machine has stopped since somebody wrote without syncing."""
        marker = self.folder / "unsynced"
        boot = self.boot()
        written = ""
        with contextlib.suppress(FileNotFoundError):
            written = marker.read_text(encoding="ascii", errors="replace")
            if written != boot:
                marker.unlink(missing_ok=True)
        if not self._syncs:
            marker.write_text(boot, encoding="ascii")
        return written not in ("", boot)

    def boot(self) -> str:
        """Return what names this run of the machine: bytes written in it are there, synced or not; "" where unknown."""
        try:
            with open(BOOT_ID, encoding="ascii") as file:
                return file.read().strip()
        except OSError:
            return ""


if sys.platform == "darwin":

    def _sync(descriptor: int) -> None:
        # fsync leaves the bytes in the disk's own cache there.
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)

else:
    _sync = os.fdatasync


def _find_fallocate() -> ctypes._NamedFuncPointer | None:
    """Return Linux's fallocate: Python has posix_fallocate alone, which changes the length."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).fallocate64
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function


_fallocate = _find_fallocate()


class Number:
    """A number that processes share, in a file of its own. Not synced: who needs it after a crash sets it anew.

    Changing it raises WouldWait, with nothing changed, where another process has to be waited for and may not be.
    """

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def add(self, amount: int) -> int:
        """Change the number; return what it is now. Atomic."""
        with self._locked() as descriptor:
            number = self._read(descriptor) + amount
            os.pwrite(descriptor, number.to_bytes(8, "little", signed=True), 0)
            return number

    def raise_to(self, least: int) -> None:
        """Let the number be at least so much."""
        with self._locked() as descriptor:
            if self._read(descriptor) < least:
                os.pwrite(descriptor, least.to_bytes(8, "little", signed=True), 0)

    def set(self, number: int) -> None:
        """Replace the number."""
        with self._locked() as descriptor:
            os.pwrite(descriptor, number.to_bytes(8, "little", signed=True), 0)

    @property
    def value(self) -> int:
        """The number as it is now. Waits for nobody: eight bytes are written at once."""
        with contextlib.closing(LockFile(self._path)) as file:
            return self._read(file.descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        # Opened each time: threads need descriptors of their own for flock, and a folder that was emptied is followed.
        file = LockFile(self._path)
        try:
            file.lock()
            yield file.descriptor
        finally:
            file.close()

    @staticmethod
    def _read(descriptor: int) -> int:
        return int.from_bytes(os.pread(descriptor, 8, 0), "little", signed=True)
