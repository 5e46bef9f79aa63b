"""A folder of this machine, through the system's own calls: fsspec's local filesystem gives only the URL's path.

Promises of its own: a file is replaced by one rename, never written in place; what an upload wrote before it was cut
off has no name and goes with the process (O_TMPFILE); nothing is reached through a symbolic link unless the user asked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, ClassVar

from fsspec.implementations.local import LocalFileSystem

from ftpvfs import paths
from ftpvfs.backend import root as roots
from ftpvfs.backend.backend import (
    ABSENT,
    ANY,
    Backend,
    BlockwiseFile,
    Condition,
    Deliver,
    Entry,
    FileUpload,
    OpenFile,
    Pieces,
    Tuning,
    Upload,
    Usage,
    not_replaceable,
    read_exactly,
)
from ftpvfs.backend.capability import Capability
from ftpvfs.backend.hidden import Hidden
from ftpvfs.backend.options import check_options
from ftpvfs.coordination.folders import may_hang
from ftpvfs.errors import ECHANGED, failure
from ftpvfs.waiting import Wait, about_to_wait

# Read, and handed over, at once.
PIECE = 2**20
# The name of a file on its way, where the system has no O_TMPFILE. Not listed.
TEMPORARY_PREFIX = ".ftpvfs-"
TEMPORARY_SUFFIX = ".tmp"
# What a mount says whose server or FUSE program is gone.
DEAD = {errno.ENOTCONN, errno.ENODEV, errno.ESHUTDOWN, getattr(errno, "EHOSTDOWN", errno.ENOTCONN)}
# Why copy_file_range refuses a pair of files that can be copied by hand.
NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


class LocalBackend(Backend):
    """A folder on this machine's disk. Any thread, any process."""

    protocols: ClassVar[tuple[str, ...]] = ("file", "local")
    capability = Capability(
        renames_files=True, renames_directories=True, sets_mtime=True, opens_files=True, answers_at_once=True,
        sets_mode=True,
    )

    @classmethod
    def from_url(cls, url: str, storage_options: dict[str, Any], tuning: Tuning) -> Backend:
        """Make the backend; the one storage option is `sync` (default true): a file is on the disk when it is there."""
        root = _root(url)
        check_options(url, storage_options)
        sync = storage_options.get("sync", True)
        if not isinstance(sync, bool):
            raise ValueError(f"storage option sync: {sync!r} is neither true nor false")
        return cls(root, root, tuning, sync=sync)

    @classmethod
    def before_fork(cls, url: str) -> None:
        roots.served(_root(url))

    def __init__(self, url: str, root: str, tuning: Tuning, *, sync: bool) -> None:
        super().__init__(url, root, {}, tuning)
        self.sync = sync
        self._hidden = _hidden(root, tuning)
        self._served = roots.served(root)
        if may_hang(root):
            self.capability = replace(self.capability, answers_at_once=False)

    @classmethod
    def examine(cls, url: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
        check_options(url, storage_options)
        root = _root(url)
        _hidden(root, tuning)
        if not may_hang(root):
            os.scandir(root).close()

    def locate(self, path: str) -> str:
        """Return the file's name on the disk; ELOOP where a folder on the way is a symbolic link not to be followed."""
        name = paths.key(self.root, path)
        if path and not self.tuning.follow_links:
            # The root is no link's name, and most files lie directly in a folder or two: `realpath` would look at more.
            parent = paths.split(path)[0]
            for folder in [*reversed(paths.ancestors(parent)), parent] if parent else ():
                if folder and stat.S_ISLNK(_mode(paths.key(self.root, folder))):
                    raise failure(errno.ELOOP, path, "Symbolic links are not followed (--copy-links follows them)")
        if self._hidden is not None:
            self._hidden.refuse(name, path)
        return name

    def _folder(self, path: str) -> str:
        """Return the folder's name on the disk; ELOOP where it is a symbolic link itself, or one is on the way."""
        return os.path.dirname(self.locate(paths.join(path, "any name")))

    def _stat(self, name: str, path: str) -> os.stat_result:
        found = os.stat(name, follow_symlinks=self.tuning.follow_links)
        if stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode):
            return found
        raise failure(errno.ENOENT, path, "Neither a file nor a folder")

    def check(self) -> None:
        try:
            self._served.require(self.root)
            os.scandir(self.root).close()
        except OSError as error:
            raise failure(error.errno or errno.EIO, self.root, error.strerror) from error

    def close(self) -> None:
        roots.forget(self._served)

    def list(self, path: str) -> list[Entry]:
        follow = self.tuning.follow_links
        entries = []
        is_empty = True
        with self._renamed(path), os.scandir(self._folder(path)) as found:
            for item in found:
                is_empty = False
                if not paths.is_listable(item.name) or _is_temporary(item.name):
                    continue
                if self._hidden is not None and self._hidden.covers(item.path):
                    continue
                try:
                    info = item.stat(follow_symlinks=follow)
                except OSError:
                    continue  # removed meanwhile, or a link to nowhere, to itself or to where we may not look
                if stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode):
                    entries.append(_entry(item.name, info))
        if not path:
            self._look_at_root(is_empty=is_empty)
        return entries

    def _look_at_root(self, *, is_empty: bool) -> None:
        """Raise where an empty root may be another folder than the served one."""
        if is_empty:
            self._served.require("")
        else:
            self._served.has_content()

    def stat(self, path: str) -> Entry:
        with self._renamed(path):
            return _entry(paths.split(path)[1], self._stat(self.locate(path), path))

    def fetch(
        self, path: str, start: int, stop: int, fingerprint: str | None, deliver: Deliver | None = None
    ) -> Future[Pieces]:
        future: Future[Pieces] = Future()
        try:
            opened = self.open_file(path)
            try:
                if fingerprint is not None and opened.entry.fingerprint != fingerprint:
                    raise failure(ECHANGED, path)
                future.set_result(self._pieces(opened, start, stop, path, deliver))
            finally:
                opened.close()
        except OSError as error:
            future.set_exception(error)
        return future

    def _pieces(self, opened: OpenFile, start: int, stop: int, path: str, deliver: Deliver | None) -> Pieces:
        if deliver is None:
            return [read_exactly(opened.fileno(), start, stop - start, path)]
        for offset in range(start, stop, PIECE):
            piece = read_exactly(opened.fileno(), offset, min(PIECE, stop - offset), path)
            opened.verify()  # somebody may be writing into the file itself
            deliver(piece)
        return []

    def open_file(self, path: str) -> OpenFile:
        with self._renamed(path):
            flags = os.O_RDONLY | os.O_CLOEXEC | (0 if self.tuning.follow_links else os.O_NOFOLLOW) | os.O_NONBLOCK
            return LocalFile(os.open(self.locate(path), flags), path)

    def admit(self, path: str, size: int = 0) -> None:
        super().admit(path, size)
        if not self.capability.answers_at_once:
            about_to_wait(Wait.STORE)
        with self._renamed(path):
            disk = os.statvfs(os.path.dirname(self.locate(path)))
        if disk.f_flag & os.ST_RDONLY:
            raise failure(errno.EROFS, path, "The disk of the folder is mounted read-only")
        # Some systems of files (FUSE) do not say; and root may take what is kept for root.
        free = disk.f_bavail if os.geteuid() else disk.f_bfree
        if disk.f_blocks and free * disk.f_frsize < max(size, 1):
            raise failure(errno.ENOSPC, path, "There is no space on the disk of the folder")

    def upload(
        self, path: str, *, mtime: float | None = None, size: int | None = None, replaces: Condition = ANY
    ) -> Upload:
        return LocalUpload(self, path, mtime, replaces)

    def upload_file(
        self, path: str, descriptor: int, size: int, *, mtime: float | None = None, replaces: Condition = ANY
    ) -> FileUpload:
        return LocalFileUpload(LocalUpload(self, path, mtime, replaces), path, descriptor, size)

    def mkdir(self, path: str) -> None:
        with self._renamed(path):
            self._served.require(path)
            os.mkdir(self.locate(path))
            self._served.has_content()
            self._sync_folder(os.path.dirname(self.locate(path)))

    def rmdir(self, path: str) -> None:
        with self._renamed(path):
            name = self.locate(path)
            try:
                os.rmdir(name)
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                    raise
                self.require_empty(path)
                self._clear(name)
            self._sync_folder(os.path.dirname(name))

    def require_empty(self, path: str) -> None:
        with self._renamed(path), contextlib.suppress(FileNotFoundError), os.scandir(self._folder(path)) as found:
            for item in found:
                if not _is_temporary(item.name):
                    raise self.not_empty(path, item.name)

    def _clear(self, name: str) -> None:
        """Remove a folder that shows nothing: what a kill between giving a file its name and its place left behind."""
        for left in os.listdir(name):
            os.unlink(os.path.join(name, left))
        os.rmdir(name)

    def remove(self, path: str, *, only: str | None = None) -> None:
        with self._renamed(path):
            if only is None or self.is_still(path, only):
                name = self.locate(path)
                os.remove(name)
                self._sync_folder(os.path.dirname(name))

    def rename(self, source: str, target: str) -> None:
        with self._renamed(source):
            self.refuse_hidden(target)
            old, new = self.locate(source), self.locate(target)
            if self._hidden is not None:
                self._hidden.refuse_above(old, source)
            os.rename(old, new)
            # The new name first: after a power cut the file has both names rather than none.
            for folder in dict.fromkeys((os.path.dirname(new), os.path.dirname(old))):
                self._sync_folder(folder)

    def check_name(self, path: str) -> None:
        if not self.capability.answers_at_once:
            about_to_wait(Wait.STORE)
        with self._renamed(path):
            self.refuse_hidden(path)

    def refuse_hidden(self, path: str) -> None:
        """Raise EEXIST where something stands that listings leave out: who cannot see it must not replace it."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self.locate(path), follow_symlinks=self.tuning.follow_links)
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                raise failure(errno.EEXIST, path, "A link or special file stands there, which is not shown")

    def set_mtime(self, path: str, mtime: float) -> Entry:
        with self._renamed(path):
            name = self.locate(path)
            self._stat(name, path)
            os.utime(name, (mtime, mtime), follow_symlinks=self.tuning.follow_links)
            with contextlib.suppress(PermissionError):  # the owner may set the time of a file that he may not read
                self._sync(name, os.O_NONBLOCK | (0 if self.tuning.follow_links else os.O_NOFOLLOW))
        return self.stat(path)

    def chmod(self, path: str, mode: int) -> None:
        """Set the nine bits of a file or folder. A folder keeps its setgid and sticky bits, as with chmod(1)."""
        about_to_wait(Wait.DISK)
        with self._renamed(path):
            if self._hidden is not None:
                self._hidden.refuse_above(self.locate(path), path)
            descriptor = self._opened(self.locate(path))
            try:
                info = os.fstat(descriptor)
                if not (stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode)):
                    raise failure(errno.ENOENT, path, "Neither a file nor a folder")
                kept = info.st_mode & (stat.S_ISGID | stat.S_ISVTX) if stat.S_ISDIR(info.st_mode) else 0
                os.fchmod(descriptor, mode | kept)
                if self.sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _opened(self, name: str) -> int:
        """Return a descriptor for a file or folder, also for what this process owns and may not read."""
        flags = os.O_CLOEXEC | (0 if self.tuning.follow_links else os.O_NOFOLLOW)
        try:
            return os.open(name, flags | os.O_RDONLY | os.O_NONBLOCK)
        except PermissionError:
            if not hasattr(os, "O_PATH"):  # macOS
                raise
        unread = os.open(name, flags | os.O_PATH)
        try:
            itself = f"/proc/self/fd/{unread}"
            os.chmod(itself, stat.S_IMODE(os.fstat(unread).st_mode) | stat.S_IRUSR)
            return os.open(itself, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(unread)

    def usage(self) -> Usage:
        with self._renamed(""):
            info = os.statvfs(self.root)
        return Usage(total=info.f_blocks * info.f_frsize, free=info.f_bavail * info.f_frsize)

    @contextlib.contextmanager
    def _renamed(self, path: str) -> Iterator[None]:
        """Name the path in errors as the user knows it, not the place on this machine's disk."""
        try:
            yield
        except OSError as error:
            if error.errno in DEAD:
                reason = f"The disk of the store's folder does not answer: {error.strerror}"
                raise failure(errno.EHOSTUNREACH, path, reason) from error
            if error.errno in roots.MISSING:
                self._served.require(path)
            raise failure(error.errno or errno.EIO, path, error.strerror) from error
        except ValueError as error:  # a name that the disk's encoding cannot hold
            raise failure(errno.EINVAL, path, str(error)) from error

    def _sync_folder(self, name: str) -> None:
        self._sync(name, os.O_DIRECTORY)

    def _sync(self, name: str, flags: int) -> None:
        """Return once a file or folder, with its metadata, is on the disk, unless that is left to the system."""
        if self.sync:
            about_to_wait(Wait.DISK)
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | flags)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class LocalFile(OpenFile):
    """An open file of the disk: one version, since we replace files by renames; what others do in place is noticed."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self._path = path
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            os.close(descriptor)
            code = errno.EISDIR if stat.S_ISDIR(info.st_mode) else errno.ENOENT
            raise failure(code, path)
        self.entry = _entry(paths.split(path)[1], info)

    def fileno(self) -> int:
        return self._descriptor

    def verify(self) -> None:
        if _fingerprint(os.fstat(self._descriptor)) != self.entry.fingerprint:
            raise failure(ECHANGED, self._path, "The file was changed while it was read")

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class LocalUpload(Upload):
    """A file without a name in the target's folder, or with a temporary one, renamed over the target at the end."""

    def __init__(
        self, backend: LocalBackend, path: str, mtime: float | None, replaces: Condition
    ) -> None:
        self._backend = backend
        self._path = path
        self._mtime = mtime
        self._replaces = replaces
        self._size = 0
        self._descriptor = -1
        self._temporary: str | None = None
        self._is_prepared = False  # all but its name is there for good
        self._is_over = False  # committed, failed or given up

    def accept(self, data: bytes | memoryview) -> None:
        with self._unless_over():
            self._open()
            self._is_prepared = False
            view = memoryview(data)
            while view:
                taken = os.write(self._descriptor, view)
                self._size += taken
                view = view[taken:]

    def copy(self, descriptor: int, offset: int, count: int) -> int:
        """Take over up to `count` bytes of a file without passing them through this process; return how many.

        0: that cannot be done with this file.
        """
        with self._unless_over():
            self._open()
            self._is_prepared = False
            try:
                taken = os.copy_file_range(descriptor, self._descriptor, count, offset)
            except (AttributeError, OSError) as error:  # not on macOS, nor between all file systems
                if isinstance(error, OSError) and error.errno not in NO_KERNEL_COPY:
                    raise
                return 0
            self._size += taken
            return taken

    @contextlib.contextmanager
    def _unless_over(self) -> Iterator[None]:
        """Name the path in errors; after one (a disk that was full for a moment) nothing can be published any more."""
        if self._is_over:
            raise failure(errno.EIO, self._path, "The upload is over")
        try:
            with self._backend._renamed(self._path):
                yield
        except BaseException:
            self._is_over = True
            raise

    def _target(self) -> str:
        """Return the file to replace: what a link leads to where links are followed, else the link itself."""
        name = self._backend.locate(self._path)
        return os.path.realpath(name) if self._backend.tuning.follow_links else name

    def _open(self) -> None:
        if self._descriptor >= 0:
            return
        self._backend._served.require(self._path)
        folder = os.path.dirname(self._target())
        try:
            self._descriptor = os.open(folder, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o666)
        except (AttributeError, OSError) as error:  # not on macOS, nor on every file system
            if isinstance(error, OSError) and error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:
                raise
            self._temporary = _temporary_name(folder)
            self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def prepare(self) -> None:
        """Give the file its rights and its time, and have its bytes on the disk for good."""
        about_to_wait(Wait.DISK)
        with self._unless_over():
            self._open()
            self._keep_access_rights(self._target())
            if self._mtime is not None:
                os.utime(self._descriptor, (self._mtime, self._mtime))
            if self._backend.sync:
                os.fsync(self._descriptor)
            self._is_prepared = True

    def commit(self) -> Entry:
        if not self._is_prepared:
            self.prepare()
        with self._unless_over():
            target = self._target()
            info = os.fstat(self._descriptor)
            if info.st_size != self._size:
                raise failure(errno.EIO, self._path, f"The disk has {info.st_size} bytes of {self._size}")
            if os.path.isdir(target):
                raise failure(errno.EISDIR, self._path)
            self._backend.refuse_hidden(self._path)
            found = self._in_the_way(target)
            if found is None:
                self._publish(target)
            elif (found.st_size, found.st_mtime_ns) != (info.st_size, info.st_mtime_ns) or self._mtime is None:
                raise not_replaceable(self._path, self._replaces)
            self._backend._served.has_content()
            self._backend._sync_folder(os.path.dirname(target))
            info = found or os.fstat(self._descriptor)
        self.abort()  # only the descriptor is left to release
        return _entry(paths.split(self._path)[1], info)

    def _in_the_way(self, target: str) -> os.stat_result | None:
        """Return what stands at the target and is not to be replaced; None where all is well."""
        if self._replaces is ANY:
            return None
        try:
            found = os.stat(target)
        except FileNotFoundError:
            if self._replaces is ABSENT:
                return None
            raise not_replaceable(self._path, self._replaces) from None
        return None if _fingerprint(found) == self._replaces else found

    def _keep_access_rights(self, target: str) -> None:
        """Give the new file the rights of the one that it replaces; those of a symbolic link (777) mean nothing."""
        with contextlib.suppress(OSError):
            replaced = os.stat(target, follow_symlinks=False)
            if stat.S_ISREG(replaced.st_mode):
                os.fchmod(self._descriptor, stat.S_IMODE(replaced.st_mode))

    def _publish(self, target: str) -> None:
        if self._temporary is None:
            self._temporary = self._link(_temporary_name(os.path.dirname(target)))
        os.rename(self._temporary, target)
        self._temporary = None

    def _link(self, temporary: str) -> str:
        """Give the nameless file a name; return it.

        linkat is to follow the link in /proc to it, which os.link does with a folder's descriptor alone.
        """
        folder = os.open(os.path.dirname(temporary), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(f"/proc/self/fd/{self._descriptor}", os.path.basename(temporary), dst_dir_fd=folder)
        finally:
            os.close(folder)
        return temporary

    def abort(self) -> None:
        self._is_over = True
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)
            self._temporary = None


class LocalFileUpload(BlockwiseFile):
    """A file copied by the kernel, which shares the blocks where the file system can (reflinks)."""

    _upload: LocalUpload

    def pass_on(self, offset: int, count: int) -> int:
        return self._upload.copy(self._descriptor, offset, count) or super().pass_on(offset, count)


def _root(url: str) -> str:
    return str(os.path.realpath(LocalFileSystem._strip_protocol(url)))


def _mode(name: str) -> int:
    try:
        return os.lstat(name).st_mode
    except OSError:  # the call that follows will say so
        return 0


def _entry(name: str, info: os.stat_result) -> Entry:
    is_dir = stat.S_ISDIR(info.st_mode)
    return Entry(name, is_dir, 0 if is_dir else info.st_size, info.st_mtime, None if is_dir else _fingerprint(info))


def _fingerprint(info: os.stat_result) -> str:
    return f"{info.st_ino:x}-{info.st_size:x}-{info.st_mtime_ns:x}"


def _temporary_name(folder: str) -> str:
    return str(PurePosixPath(folder) / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")


def _hidden(root: str, tuning: Tuning) -> Hidden | None:
    return Hidden.below(root, tuning.hidden, follow_links=tuning.follow_links) if tuning.hidden else None


def _is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX)
