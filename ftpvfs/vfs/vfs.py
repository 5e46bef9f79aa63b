"""VFS: one store as a filesystem. All that the FTP side, the remote control and embedding programs see.

A VFS may be made before a fork and used after it: whatever cannot cross one (the store's connections, the index,
caches, threads) is made when it is first needed in each process.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from ftpvfs import paths
from ftpvfs.backend.backend import Entry, Tuning, capability_of, display_url, examine, is_shared, preload, root_of
from ftpvfs.cache.identity import Identity, examine_claim, folder_name
from ftpvfs.cache.records import PartialRecord
from ftpvfs.clock import SYSTEM_CLOCK, Clock
from ftpvfs.config import ConfigError, VFSOptions, vfs_options
from ftpvfs.coordination.folders import examine_private_folder, unusable
from ftpvfs.errors import AWAY, EUNSUPPORTED, failure
from ftpvfs.paths import AnyPath
from ftpvfs.vfs.buffered import TextFile, as_text, check_layers, with_buffer
from ftpvfs.vfs.core import Core, needs_index, not_cacheable
from ftpvfs.vfs.dircache import Listing
from ftpvfs.vfs.handle import Handle
from ftpvfs.vfs.opening import Opening, Request
from ftpvfs.vfs.openmode import (
    BinaryMode,
    CacheMode,
    HandleKind,
    TextMode,
    flags_of,
    handle_kind,
    is_text,
    writes,
)
from ftpvfs.vfs.pending import is_local
from ftpvfs.vfs.tree import Surroundings, TreeMove
from ftpvfs.waiting import Wait, WouldWait, about_to_wait, without_waiting

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

logger = logging.getLogger(__name__)

# What statvfs shows where neither the store nor the user says: rclone's 1 PiB.
UNKNOWN_SPACE = 2**50
BLOCK = 4096
END_OF_TIME = 253402300800.0  # the year 10000


class VFS:
    """A filesystem over one store. Any thread, any process; every failure is an OSError with an errno and the path.

    `url` is any fsspec URL or a local folder, `storage_options` are fsspec's for it. The keywords are the flags
    without `vfs-` and with `_` for `-` (`dir_cache_time="5m"`); numbers count seconds or bytes. `options` takes them
    ready made. The store is not contacted before the first use; `start` does so and says what is wrong.
    """

    def __init__(
        self,
        url: AnyPath = ".",
        *,
        storage_options: Mapping[str, Any] | None = None,
        options: VFSOptions | None = None,
        clock: Clock = SYSTEM_CLOCK,
        **keywords: Any,
    ) -> None:
        if options is not None and keywords:
            raise TypeError("pass either options or keywords")
        self.options = options or vfs_options(**keywords)
        self._url = os.fspath(url)
        self.name = display_url(self._url)
        self._storage_options = dict(storage_options or {})
        self._clock = clock
        self._mode = CacheMode[self.options.cache_mode.upper()]
        events = (self.options.on_received, self.options.on_stored, self.options.on_failed)
        if self._mode is CacheMode.OFF and any(events):
            raise ConfigError("--on-received, --on-stored and --on-failed need --vfs-cache-mode minimal or more")
        self._started = clock.time()
        # By process id. What a child finds here of its parent's is never used nor let go of: connections, threads and
        # locks mean nothing after a fork, and closing them could hurt the parent.
        self._processes: dict[int, _Process] = {}
        self._uid = os.getuid() if self.options.uid is None else self.options.uid
        self._gid = os.getgid() if self.options.gid is None else self.options.gid
        self._dir_mode = stat.S_IFDIR | (self.options.dir_perms & ~self.options.umask)
        self._file_mode = stat.S_IFREG | (self.options.file_perms & ~self.options.umask)

    def __repr__(self) -> str:
        return f"<VFS {self.name}>"

    # --- life

    @property
    def core(self) -> Core:
        """What this process has open for the store; made now where it is not there yet."""
        process = self._process()
        core = process.core
        if core is None:
            about_to_wait(Wait.DISK)  # a store's library may take seconds to import
            with process.lock:
                core = process.core
                if core is None:
                    core = process.core = Core(self._url, self._storage_options, self.options, self._clock)
        return core

    @property
    def cache_folder(self) -> Path:
        """The folder for all that is kept of this store on this machine's disk."""
        return self.core.folder

    @property
    def is_served_by_parent(self) -> bool:
        """Whether nothing waits in a cache, or the process that this one was forked from sees to it."""
        others = [process.core for pid, process in self._processes.items() if pid != os.getpid()]
        if any(core is not None for core in others):
            return True
        return self._mode is CacheMode.OFF and self.core.parts is None

    def _process(self) -> _Process:
        pid = os.getpid()
        return self._processes.get(pid) or self._processes.setdefault(pid, _Process())

    @property
    def is_shared(self) -> bool:
        """Whether other processes see the same store under this URL."""
        return is_shared(self._url)

    def preload(self) -> None:
        """Import what the store needs, so that processes which are forked later share it. ImportError, ValueError."""
        preload(self._url)

    @property
    def cache_place(self) -> Path:
        """Where `cache_folder` is or will be; nothing is opened. ImportError and ValueError as of `preload`."""
        return Path(self.options.cache_dir) / folder_name(self._url, self.options.name)

    def examine(self) -> None:
        """Raise what `prepare` would, as far as it can be seen without contacting, opening or making anything.

        May be called before a fork. ImportError, ValueError, OSError.
        """
        options = self.options
        examine(self._url, self._storage_options, Tuning(follow_links=options.copy_links, hidden=options.cache_dir))
        if not self.is_shared:
            if self._mode is not CacheMode.OFF:
                raise not_cacheable(self.name)
            return
        if self._mode is not CacheMode.OFF or needs_index(capability_of(self._url), options):
            self.examine_shared()
        examine_claim(self.cache_place, Identity.of(self._url, self._storage_options, root_of(self._url)))

    def examine_shared(self) -> None:
        """Raise OSError where `check_shared` would because of the cache folder; as `examine`, nothing is made."""
        try:
            if self.is_shared:
                examine_private_folder(self.cache_place)
        except OSError as error:
            raise unusable(self.cache_place, error) from error

    def prepare(self) -> None:
        """Find out what is wrong as far as it can be known at once: no other machine is asked.

        ValueError for a protocol nobody knows, ImportError for one whose package is missing, else OSError.
        """
        core = self.core
        if needs_index(core.backend.capability, self.options):
            _ = core.index  # a cache folder that cannot be used is told now and not to the first client
        if core.backend.capability.answers_at_once:
            core.backend.check()

    def start(self) -> None:
        """Contact the store; raise what is wrong with the bucket, the credentials, the folder or the protocol.

        As `prepare` does, and waits for the store's answer.
        """
        core = self.core
        core.backend.check()
        self.prepare()
        if self.options.refresh:
            core.background("ftpvfs-refresh", lambda: self.refresh(recursive=True))

    def stop(self, drain_timeout: float | None = 0.0) -> int:
        """Store what waits in the cache, for at most `drain_timeout` seconds (None: no limit); return how much is left.

        Another process that has the same cache open goes on instead. Only `close` may follow.
        """
        process = self._process()
        return process.core.stop(drain_timeout) if process.core is not None else 0

    def check_shared(self) -> None:
        """Raise OSError where other processes with the same store would not see at once what this one changes."""
        if self.core.alone is not None:
            raise self.core.alone

    def close(self) -> None:
        """Release connections, threads and files. The VFS opens them again when it is used again."""
        process = self._process()
        with process.lock:
            core, process.core = process.core, None
        if core is not None:
            core.close()

    def __enter__(self) -> VFS:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- looking

    def lookup(self, path: AnyPath) -> Entry:
        """Return what is at the path. Raises ENOENT; ENOTDIR below a file, and for a file with a slash behind it."""
        return self._as_named(path, self._lookup(self._real(path)))

    def _as_named(self, path: AnyPath, entry: Entry) -> Entry:
        """Return the entry; ENOTDIR for a file whose `path`, as the caller wrote it, can only be a folder's."""
        if not entry.is_dir and paths.means_folder(path):
            raise failure(errno.ENOTDIR, os.fspath(path))
        return entry

    def _lookup(self, path: str) -> Entry:
        try:
            return self.core.dirs.lookup(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._missing(path) from error

    def _missing(self, path: str, *, listed: bool = False) -> OSError:
        """Return why nothing was found: ENOTDIR where a file stands in the way, which few stores tell by themselves.

        `listed`: the path itself was to be listed, so that a file there is in the way, too.
        """
        for above in [path, *paths.ancestors(path)] if listed else paths.ancestors(path):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if not self.core.dirs.lookup(above).is_dir:
                    return failure(errno.ENOTDIR, path)
                break
        return self._too_long(path) or failure(errno.ENOENT, path)

    def stat(self, path: AnyPath) -> os.stat_result:
        """Return the status of a file or folder, its true modification time included."""
        named, path = path, self._real(path)
        entry = self._as_named(named, self._lookup(path))
        self.core.times.fill(paths.split(path)[0], entry)
        return self.stat_entry(path, entry)

    lstat = stat

    def stat_entry(self, path: str, entry: Entry) -> os.stat_result:
        """Return an entry of `path` as a stat_result."""
        mtime = self.mtime_of(entry)
        whole = int(mtime // 1)
        return os.stat_result(
            (
                self._dir_mode if entry.is_dir else self._file_mode,
                self.inode(path),
                1,
                2 if entry.is_dir else 1,
                self._uid,
                self._gid,
                entry.size,
                whole,
                whole,
                whole,
            ),
            {"st_atime": mtime, "st_mtime": mtime, "st_ctime": mtime, "st_mtime_ns": int(mtime * 1e9)},
        )

    def mtime_of(self, entry: Entry) -> float:
        """Return the modification time to show; the VFS's own start where there is none."""
        mtime = entry.mtime
        if mtime is None or not 0 <= abs(mtime) < END_OF_TIME:  # metadata is anybody's to write, a NaN is no number
            return self._started
        return mtime

    def inode(self, path: AnyPath) -> int:
        """Return a number that stands for the path, the same in all processes."""
        name = os.fspath(path).encode("utf-8", "surrogateescape")
        return int.from_bytes(blake2b(name, digest_size=8).digest(), "big") >> 1

    def exists(self, path: AnyPath) -> bool:
        """Tell whether there is anything at the path."""
        try:
            self.lookup(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def isdir(self, path: AnyPath) -> bool:
        """Tell whether the path is a folder."""
        try:
            return self.lookup(path).is_dir
        except (FileNotFoundError, NotADirectoryError):
            return False

    def isfile(self, path: AnyPath) -> bool:
        """Tell whether the path is a file."""
        try:
            return not self.lookup(path).is_dir
        except (FileNotFoundError, NotADirectoryError):
            return False

    def listdir(self, path: AnyPath = "") -> list[str]:
        """Return the sorted names in a folder. Raises ENOENT and ENOTDIR."""
        return list(self.listing(path).names)

    def scandir(self, path: AnyPath = "") -> Entries:
        """Return the folder's entries with their status; no request for each. Raises ENOENT and ENOTDIR."""
        path = self._real(path)
        return Entries(DirEntry(self, path, entry) for entry in self.timed_listing(path))

    def walk(
        self, top: AnyPath = "", topdown: bool = True, onerror: Callable[[OSError], object] | None = None
    ) -> Iterator[tuple[str, list[str], list[str]]]:
        """Yield (folder, names of folders, names of files) of a folder and of all below it, as `os.walk` does.

        Unlike that, a folder that cannot be listed raises why, unless there is `onerror`, which is called with it then:
        who takes a store that is away for an empty one deletes what it mirrors.
        """
        # Folders to list, and with topdown=False what was found in those whose own folders are still to be.
        pending: list[str | tuple[str, list[str], list[str]]] = [paths.clean(top)]
        while pending:
            folder = pending.pop()
            if isinstance(folder, tuple):
                yield folder
                continue
            try:
                listing = self.listing(folder)
            except OSError as error:
                if onerror is None:
                    raise
                onerror(error)
                continue
            folders = [entry.name for entry in listing if entry.is_dir]
            found = (folder, folders, [entry.name for entry in listing if not entry.is_dir])
            if topdown:
                yield found
            else:
                pending.append(found)
            pending += [paths.join(folder, name) for name in reversed(folders)]

    def listing(self, path: AnyPath = "") -> Listing:
        """Return the folder's listing, shared and immutable. Raises ENOENT and ENOTDIR."""
        path = self._real(path)
        return self._listing(path)

    def _listing(self, path: str, *, fresh: bool = False) -> Listing:
        core = self.core
        # Where folders are mere prefixes of keys a listing tells by itself whether there is one.
        looks_first = core.backend.capability.real_directories or core.dirs.knows(path)
        if looks_first and not fresh and not self._lookup(path).is_dir:
            raise failure(errno.ENOTDIR, path)
        try:
            return core.dirs.listing(path, fresh=fresh)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._missing(path, listed=True) from error

    def timed_listing(self, path: AnyPath = "") -> Listing:
        """Return the folder's listing with every true modification time filled in."""
        path = self._real(path)
        listing = self._listing(path)

        def fill() -> None:
            self.core.times.fill_listing(path, listing)
            listing.timed = True

        listing.timed = listing.timed or not self.core.times.must_ask(path, listing)
        while not listing.timed:  # after waiting for somebody who fills an older listing, little is left to do
            self.core.dirs.once("times", path, fill)
        return listing

    def statvfs(self, path: AnyPath = "") -> os.statvfs_result:
        """Return the space at the store, as far as it or the user says."""
        usage = None if self.options.disk_space_total_size else self.core.backend.usage()
        total = usage.total if usage else self.options.disk_space_total_size or UNKNOWN_SPACE
        free = usage.free if usage else total
        blocks, left = total // BLOCK, free // BLOCK
        return os.statvfs_result((BLOCK, BLOCK, blocks, left, left, 10**9, 10**9, 10**9, 0, paths.MAX_NAME_BYTES))

    # --- opening

    @overload
    def open(
        self,
        path: AnyPath,
        mode: BinaryMode | int = "rb",
        buffering: Literal[-1, 0] = -1,
        *,
        name: str | None = None,
        autocommit: bool = True,
        user: str = "",
        partial: PartialRecord | None = None,
    ) -> Handle: ...

    @overload
    def open(
        self,
        path: AnyPath,
        mode: TextMode,
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *,
        name: str | None = None,
        autocommit: bool = True,
        user: str = "",
        partial: PartialRecord | None = None,
    ) -> TextFile: ...

    @overload
    def open(
        self,
        path: AnyPath,
        mode: str | int = "rb",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *,
        name: str | None = None,
        autocommit: bool = True,
        user: str = "",
        partial: PartialRecord | None = None,
    ) -> Any: ...

    def open(
        self,
        path: AnyPath,
        mode: str | int = "rb",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *,
        name: str | None = None,
        autocommit: bool = True,
        user: str = "",
        partial: PartialRecord | None = None,
    ) -> Any:
        """Open a file; return a file object for one thread.

        `mode` is a Python mode string or `os.O_*` flags. A string without a `b` opens text: `encoding`, `errors` and
        `newline` are those of Python's `open`, and so is `buffering` for both kinds, but for bytes there is no buffer
        unless a size is given.

        A file that is written appears whole when it is closed, and not at all when a `with` block fails or the file is
        forgotten; with `autocommit=False` only `commit()` publishes. When that returns the file is in the store, or
        with `--vfs-cache-mode` writes and full and `--ack cache` on the cache's disk for good and on its way. `name` is
        the file's `name`, for who logs it. Neither the store nor the disk is asked to write before the first byte.
        `user` is whose upload this is, should it be interrupted; `partial` goes on with such a one.
        """
        flags = flags_of(mode)
        check_layers(buffering, encoding, errors, newline, is_text=is_text(mode))
        handle = self._open(path, flags, name, autocommit, user, partial)
        try:
            if isinstance(mode, str) and flags & os.O_APPEND and handle.seekable():
                handle.seek(0, os.SEEK_END)  # as Python does; for the system itself an append begins at 0
            if isinstance(mode, str) and is_text(mode):
                return as_text(handle, flags, mode, buffering, encoding, errors, newline)
            return with_buffer(handle, flags, buffering) if buffering > 0 else handle
        except BaseException:
            handle.abandon()
            raise

    def _open(
        self,
        path: AnyPath,
        flags: int,
        name: str | None,
        autocommit: bool,
        user: str,
        partial: PartialRecord | None,
    ) -> Handle:
        named = path
        path, entry, is_known = self._before_open(path, flags, partial)
        is_made = entry is None and bool(flags & os.O_CREAT)
        is_written = is_made or (writes(flags) and flags & os.O_ACCMODE != os.O_RDONLY)
        if entry is not None and self._as_named(named, entry).is_dir:
            raise failure(errno.EISDIR, path)
        if is_made and paths.means_folder(named):
            raise failure(errno.EISDIR, path, "A name that ends in a slash is a folder's")
        if is_written:
            self._check_writable(path)
        is_dirty = self._is_dirty(path, may_be_gone=is_written)
        kind = handle_kind(
            self._mode, flags, path, exists=entry is not None or partial is not None, is_dirty=is_dirty
        )
        if entry is None:
            self._check_new(path, is_known=is_known)
        self.core.count["writes" if is_written else "reads"] += 1
        request = Request(path, name or path, flags, entry, is_known, user, autocommit, partial)
        return self._opened(kind, request)

    def read_bytes(self, path: AnyPath) -> bytes:
        """Return all bytes of a file."""
        with self.open(path, "rb") as file:
            return file.read()

    def write_bytes(self, path: AnyPath, data: ReadableBuffer) -> int:
        """Write a file, whole or not at all; return how many bytes. On return it is as safe as `open` says."""
        with self.open(path, "wb") as file:
            return file.write(data)

    def read_text(
        self,
        path: AnyPath,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> str:
        """Return all of a text file; the arguments are those of `open`."""
        with self.open(path, "r", encoding=encoding, errors=errors, newline=newline) as file:
            return file.read()

    def write_text(
        self,
        path: AnyPath,
        text: str,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> int:
        """Write a text file, whole or not at all; return how many characters. The arguments are those of `open`."""
        with self.open(path, "w", encoding=encoding, errors=errors, newline=newline) as file:
            return file.write(text)

    def _opened(self, kind: HandleKind, request: Request) -> Handle:
        opening = Opening(self.core, self._clock)
        if kind is HandleKind.READ:
            return opening.streamed_read(request)
        if kind is HandleKind.WRITE:
            return opening.streamed_write(request)
        if request.flags & os.O_ACCMODE == os.O_RDONLY and request.entry is not None:
            return opening.cached_read(request)
        return opening.cached_write(request)

    def _before_open(
        self, path: AnyPath, flags: int, partial: PartialRecord | None
    ) -> tuple[str, Entry | None, bool]:
        """Return the path as it is spelled, what is there, and whether that is known."""
        is_whole = bool(flags & os.O_CREAT and flags & os.O_TRUNC) and partial is None
        if not is_whole or not self._goes_without_store:
            path = self._real(path)
            return path, self._existing(path), True
        return self._before_replacing(paths.clean(path))

    @property
    def _goes_without_store(self) -> bool:
        """Whether a whole new file is taken though the store is away."""
        return self._mode >= CacheMode.WRITES and self.options.ack == "cache"

    def _before_replacing(self, path: str) -> tuple[str, Entry | None, bool]:
        """The same for who hands in a whole new file: nobody needs the store for that, nor should wait long for it."""
        core = self.core
        try:
            try:
                path = without_waiting(lambda: core.dirs.real_name(path))
            except WouldWait:
                path = core.questions.ask(lambda: core.dirs.real_name(path), path)
        except OSError as error:
            if error.errno not in AWAY:
                raise
            logger.info("how %r is spelled at the store is not known: %s", path, error)
            return path, None, False
        return path, *self._found_soon(path)

    def _found_soon(self, path: str) -> tuple[Entry | None, bool]:
        """Return what is at a path, and whether that is known: a store that does not answer is not waited for long."""
        core = self.core
        try:
            if core.dirs.knows(path) or core.backend.capability.answers_at_once:
                return self._existing(path), True
            if core.dirs.is_free(path):
                return None, True
            return core.questions.ask(lambda: self._existing(path), path), True
        except OSError as error:
            if error.errno not in AWAY:
                raise
            logger.info("what is at %r by now is not known: %s", path, error)
            return None, False

    def _is_dirty(self, path: str, *, may_be_gone: bool) -> bool:
        """Tell whether a file waits at the path. Where it was deleted since it was looked up, and `may_be_gone` is
        false, raise ENOENT: what the store still has there is older than what was acknowledged since.
        """
        pending = self.core.pending
        try:
            return pending is not None and pending.find(path) is not None
        except FileNotFoundError:
            if not may_be_gone:
                raise
            return False

    def _existing(self, path: str) -> Entry | None:
        try:
            return self._lookup(path)
        except FileNotFoundError:
            return None

    def partial(self, path: AnyPath, user: str = "") -> PartialRecord | None:
        """Return what came of an interrupted upload of the user's to the path, to go on with (`open(partial=...)`)."""
        parts = self.core.parts
        if parts is None or self._mode is CacheMode.OFF or paths.means_folder(path):
            return None
        return parts.cache.partial(self._real(path), user)

    def drop_partial(self, path: AnyPath, user: str = "") -> bool:
        """Remove what came of the user's interrupted upload; return whether there was anything."""
        parts = self.core.parts
        if parts is None or self.partial(path, user) is None:
            return False
        parts.cache.drop_partial(self._real(path))
        return True

    # --- changing

    def mkdir(self, path: AnyPath) -> None:
        """Make one folder. It exists for everybody and survives a restart, also where the store has no folders.

        Where the store is away and has none, in modes writes and full, one that it has already may be made once more.
        """
        path = self._real(path)
        self._check_writable(path)
        core = self.core
        is_here = core.keeps_folders and self._goes_without_store
        if (self._found_soon(path)[0] if is_here else self._existing(path)) is not None:
            raise failure(errno.EEXIST, path)
        self._check_parent(path, must_know=not is_here)
        self._check_name(path)
        core.settle(path, below=not is_here)
        with core.writer(path, asks_store=not is_here):  # who is told that it exists already must see it, too
            core.make_folder(path)
            core.dirs.made(path, Entry(paths.split(path)[1], is_dir=True, mtime=self._clock.time()))

    def makedirs(self, path: AnyPath, *, exist_ok: bool = True) -> None:
        """Make a folder and those above it that are missing.

        Raises EEXIST for a file, and unless `exist_ok` for a folder that is there; ENOTDIR below a file.
        """
        path = self._real(path)
        entry = self._existing(path)
        if entry is not None and not (entry.is_dir and exist_ok):
            raise failure(errno.EEXIST, path)
        if entry is None:
            self.makedirs(paths.split(path)[0])
            try:
                self.mkdir(path)
            except FileExistsError:  # made by somebody else, meanwhile
                if not exist_ok or not self.isdir(path):
                    raise

    @property
    def least_wait(self) -> Wait:
        """What changes wait for at the least: this machine's disk alone, where a cache takes them."""
        core = self._process().core
        return Wait.STORE if core is not None and core.parts is None else Wait.DISK

    def ready_folder(self, path: AnyPath) -> bool:
        """Make a folder as `makedirs` does, for files that come next; return whether it is there.

        Who hands in files does not need the store for it, in modes writes and full: they bring their folders along.
        """
        core = self.core
        path = paths.clean(path)
        is_quick = core.backend.capability.answers_at_once or core.dirs.knows(path)
        if is_quick or not self._goes_without_store:
            self.makedirs(path)
            return True
        try:
            core.questions.ask(lambda: self.makedirs(path), path)
        except OSError as error:
            if error.errno not in AWAY:
                raise
            logger.info("%r may not be there yet: %s", path, error)
            return False
        return True

    def rmdir(self, path: AnyPath) -> None:
        """Remove an empty folder. Raises ENOTEMPTY, ENOTDIR, ENOENT; EBUSY for the root."""
        path = self._real(path)
        self._check_writable(path)
        if not path:
            raise failure(errno.EBUSY, path, "The root cannot be removed")
        core = self.core
        if not self._lookup(path).is_dir:
            raise failure(errno.ENOTDIR, path)
        if self._listing(path, fresh=True):
            raise failure(errno.ENOTEMPTY, path)
        core.drop_partials_below(path)
        core.settle(path)
        with core.writer(path):
            core.backend.rmdir(path)
            if core.keeps_folders:
                core.index.drop_folder(path)
            core.dirs.changed(path, None)
        core.keep_folder(paths.split(path)[0])

    def remove(self, path: AnyPath) -> None:
        """Delete a file. Raises EISDIR for a folder, ENOENT. One that is on its way to the store never gets there."""
        named, path = path, self._real(path)
        self._check_writable(path)
        core = self.core
        if self._as_named(named, self._lookup(path)).is_dir:
            raise failure(errno.EISDIR, path)
        core.drop_partial(path)
        has_waited = core.pending is not None and core.pending.delete(path)
        if not has_waited:
            with core.writer(path):
                core.backend.remove(path)
                core.forget_item(path)
                core.changed(path, None)
        core.times.removed(path)
        self._keep_folder_of(path, has_waited=has_waited)

    def _keep_folder_of(self, path: str, *, has_waited: bool) -> None:
        """Let the folder of what is gone stay; `has_waited`: it was on its way to the store, which nobody waits for."""
        folder = paths.split(path)[0]
        if has_waited:
            self.core.keep_folder_of_waiting(folder)
        else:
            self.core.keep_folder(folder)

    def rename(self, source: AnyPath, target: AnyPath) -> None:
        """Rename a file or folder; a file that stands at the target is replaced, an empty folder too by a folder.

        On a store that cannot rename, objects are copied, the copies looked at, and only then the old ones deleted.
        """
        name = paths.split(paths.clean(target))[1]
        means_folder = paths.means_folder(source) or paths.means_folder(target)
        source, target = self._real(source), self._real(target)
        if source == target:  # but for the spelling
            target = paths.join(paths.split(target)[0], name)
        self._check_writable(source)
        entry = self._lookup(source)
        if means_folder and not entry.is_dir:
            raise failure(errno.ENOTDIR, source)
        there, is_known = self._before_rename(target, entry)
        self._check_rename(source, target, entry, there)
        if source == target:
            return
        if there is None:
            self._check_name(target)
        for path in (source, target):
            (self.core.drop_partials_below if entry.is_dir else self.core.drop_partial)(path)
        pending = None if entry.is_dir else self.core.pending
        has_waited = pending is not None and pending.rename(source, target, there, is_known=is_known)
        if entry.is_dir:
            self._rename_folder(source, target, replaces=there is not None)
        elif not has_waited:
            self._rename_file(source, target, entry)
        self._keep_folder_of(source, has_waited=has_waited)

    def replace(self, source: AnyPath, target: AnyPath) -> None:
        """Rename a file or folder, as `rename` does, which replaces what stands at the target as `os.replace` would."""
        self.rename(source, target)

    def _before_rename(self, target: str, entry: Entry) -> tuple[Entry | None, bool]:
        """Return what the rename of `entry` replaces, and whether that is known: what waits can go without the store.

        What has another name is the entry itself, which is to be spelled otherwise.
        """
        there, is_known = self._found_soon(target) if is_local(entry) else (self._existing(target), True)
        return (there if there is not None and there.name == paths.split(target)[1] else None), is_known

    def _check_rename(self, source: str, target: str, entry: Entry, there: Entry | None) -> None:
        if not source or not target:
            raise failure(errno.EBUSY, source, "The root cannot be renamed or replaced")
        if entry.is_dir and target != source and paths.is_within(target, source):
            raise failure(errno.EINVAL, source, "A folder cannot be moved into itself")
        self._check_parent(target, must_know=not is_local(entry))
        if there is None or source == target:
            return
        if there.is_dir and not entry.is_dir:
            raise failure(errno.EISDIR, target)
        if entry.is_dir and not there.is_dir:
            raise failure(errno.ENOTDIR, target)
        if there.is_dir and self._listing(target, fresh=True):
            raise failure(errno.ENOTEMPTY, target)

    def _rename_file(self, source: str, target: str, entry: Entry) -> None:
        core = self.core
        name = paths.split(target)[1]
        if core.times.keeps:
            core.times.fill(paths.split(source)[0], entry)
        if core.backend.capability.renames_files and core.pending is not None:
            core.pending.store(target)  # else, after a crash, what waits for the target would replace what was renamed
        with core.writer(*sorted((source, target))):
            if core.backend.capability.renames_files:
                core.backend.rename(source, target)
                renamed = core.backend.stat(target)
            else:
                renamed = core.backend.copy(source, target)
                core.replaced(target)  # before the source goes, for the same reason
                try:
                    core.backend.remove(source)
                except OSError as error:
                    reason = f"It is at {target!r} now, but the old name could not be removed: {error.strerror}"
                    raise failure(error.errno or errno.EIO, source, reason) from error
            core.renamed_item(source, target, renamed)
            core.changed(source, None)
            renamed = replace(renamed, name=name)
            if core.times.keeps and entry.mtime is not None:
                core.times.removed(source)
                renamed = core.times.set(target, renamed, entry.mtime)
            core.changed(target, renamed)

    def _rename_folder(self, source: str, target: str, *, replaces: bool) -> None:
        core = self.core
        core.settle(target)
        if replaces:
            core.backend.require_empty(target)
        left = None
        try:
            with core.renaming_below(source, target) as dirty:
                if core.backend.capability.renames_directories:
                    core.backend.rename(source, target)
                    core.times.folder_renamed(source, target)
                else:
                    left = self._move_tree(source, target, dirty)
            if left is not None:
                raise left
        except OSError:
            for path in (source, target):
                core.dirs.doubt(path)
            if replaces and not core.is_there(target):  # its marker went with the copies that were taken back
                core.make_folder(target)
            raise
        core.dirs.forget(target)
        core.dirs.changed(target, Entry(paths.split(target)[1], is_dir=True, mtime=self._clock.time()))
        core.dirs.forget(source)
        if core.backend.capability.renames_directories or not core.is_there(source):
            core.dirs.changed(source, None)

    def _move_tree(self, source: str, target: str, dirty: Collection[str]) -> OSError | None:
        """Copy and delete all objects; those that are `dirty` under their new names are only deleted.

        Returns why not all could be deleted: what is dirty has moved by then, and is not to be moved back.
        """
        core = self.core

        def stays(path: str, new: str) -> bool:  # newer files wait there, whose records know what the store has
            return core.is_dirty(path) or (new not in dirty and core.is_dirty(new))

        around = Surroundings(core.hold, stays, core.times.moved)
        move = TreeMove(
            core.backend, source, target, around=around, leave_out=dirty, workers=self.options.checkers
        )
        move.copy(self.options.max_rename_objects)
        try:
            move.remove()
        except OSError as error:
            return error
        if core.keeps_folders:
            core.index.move_folder(source, target)
        return None

    def utime(
        self, path: AnyPath, times: tuple[float, float] | None = None, *, ns: tuple[int, int] | None = None
    ) -> None:
        """Set the modification time (`times` is (access, modification), None is now). It is there when this returns.

        `ns` is the same in nanoseconds, kept as exactly as seconds in a float are. ValueError for both. The time of a
        file which is on its way to the store goes with it.
        """
        if ns is not None:
            if times is not None:
                raise ValueError("times and ns say the same; give one of them")
            times = (ns[0] / 1e9, ns[1] / 1e9)
        if paths.means_folder(path):
            self.lookup(path)
        path = self._real(path)
        self._check_writable(path)
        if self.options.no_modtime:
            raise failure(EUNSUPPORTED, path, "Modification times are switched off (--no-modtime)")
        core = self.core
        mtime = self._clock.time() if times is None else float(times[1])
        if core.pending is not None and core.pending.touch(path, mtime):
            return
        with core.writer(path):
            entry = self._lookup(path)
            if not entry.is_dir:
                core.changed(path, core.times.set(path, entry, mtime))

    def chmod(self, path: AnyPath, mode: int) -> None:
        """Set who may read, write and execute a file or folder of a local folder, for good when this returns.

        What waits for the store there is stored first. Raises EINVAL for more than the nine bits of `rwxrwxrwx`,
        EOPNOTSUPP for every other store, EPERM for the root. What listings show is --file-perms and --dir-perms.
        """
        named, path = path, self._real(path)
        self._check_writable(path)
        if mode & ~0o777:
            raise failure(errno.EINVAL, path, "Only the rights to read, write and execute can be changed")
        if not path:
            raise failure(errno.EPERM, path, "The root's rights are not changed")
        self._as_named(named, self._lookup(path))
        core = self.core
        if not core.backend.capability.sets_mode:
            raise failure(EUNSUPPORTED, path, "Access rights can be changed in a local folder alone")
        if core.pending is not None:
            core.pending.store(path)
        with core.writer(path):
            core.backend.chmod(path, mode)

    def truncate(self, path: AnyPath, size: int) -> None:
        """Make a file `size` bytes long. Without a cache only 0 and the length it has."""
        named, path = path, self._real(path)
        self._check_writable(path)
        entry = self._as_named(named, self._lookup(path))
        if entry.is_dir:
            raise failure(errno.EISDIR, path)
        if size < 0:
            raise failure(errno.EINVAL, path, f"A length of {size} bytes")
        if size == entry.size:
            return
        if not size:
            self.open(path, "wb").close()
            return
        with self.open(path, "r+b") as file:
            file.truncate(size)

    # --- the directory cache

    def forget(self, path: AnyPath = "") -> None:
        """Drop what is cached at and below the folder; the store is asked when somebody wants it."""
        self.core.dirs.forget(paths.clean(path))

    def refresh(self, path: AnyPath = "", *, recursive: bool = False) -> None:
        """Read the folder again now, and those below it where `recursive`."""
        path = self._real(path)
        listing = self._listing(path, fresh=True)
        self.core.dirs.refreshed(path)
        if self.core.dirs.knows(path) and not self.exists(path):  # made by others since the folder above was listed
            self.core.dirs.changed(path, Entry(paths.split(path)[1], is_dir=True))
        if recursive:
            for entry in listing:
                if entry.is_dir and self.core.is_open:
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        self.refresh(paths.join(path, entry.name), recursive=True)

    # --- what is going on

    def stats(self) -> dict[str, Any]:
        """Return counters and sizes for people and monitors."""
        core = self.core
        stats = {
            "store": self.name,
            "cache_mode": self.options.cache_mode,
            "directories": core.dirs.counts(),
            "buffer_memory": core.memory.used,
            "opened": dict(core.count),
            "breaker": core.breaker.state.name.lower(),
        }
        if core.parts is not None:
            stats |= {"cache": core.parts.cache.stats(), "downloads": core.parts.downloads.stats()}
        return stats

    def queue(self) -> list[dict[str, Any]]:
        """Return what waits for the store or is on its way, next first. Without a cache nothing ever waits."""
        parts = self.core.parts
        return parts.writeback.queue() if parts is not None else []

    def sync(self, timeout: float | None = None) -> None:
        """Return when the store has every byte that is acknowledged by now. Without a cache it has already.

        Raises the first failure where something is left: after `timeout` seconds, or without one once all was tried.
        """
        parts = self.core.parts
        if parts is not None:
            parts.writeback.sync(timeout)

    # --- checks

    def _real(self, path: AnyPath) -> str:
        return self.core.dirs.real_name(paths.clean(path))

    def _check_writable(self, path: str) -> None:
        if self.options.read_only:
            raise failure(errno.EROFS, path, "This server is read-only (--read-only)")
        if not self.core.backend.capability.writes:
            raise failure(errno.EROFS, path, "The store is read-only")

    def _check_name(self, path: str) -> None:
        """Raise what is wrong with a new name before a byte is taken for it."""
        self._check_length(path)
        try:
            self.core.backend.check_name(path)
        except OSError as error:
            if error.errno not in AWAY:
                raise

    def _too_long(self, path: str) -> OSError | None:
        """Return why nothing new can be called so, where it is too long. The folders above it are there already."""
        if not paths.is_too_long(paths.split(path)[1]):
            return None
        return failure(errno.ENAMETOOLONG, path, f"A name of more than {paths.MAX_NAME_BYTES} bytes")

    def _check_length(self, path: str) -> None:
        too_long = self._too_long(path)
        if too_long is not None:
            raise too_long

    def _check_new(self, path: str, *, is_known: bool) -> None:
        """Raise why no file can be made at the path, as far as that can be told without a store that is away."""
        self._check_length(path)
        if is_known or self.core.dirs.knows(paths.split(path)[0]):
            self._check_parent(path, must_know=not self._goes_without_store)
        if is_known or not self.core.backend.capability.opens_files:  # a disk is looked at for that, and may hang
            self._check_name(path)

    def _check_parent(self, path: str, *, must_know: bool = True) -> None:
        """Raise what is wrong with the folder that is to hold the path; not `must_know`: unless the store is away."""
        parent = paths.split(path)[0]
        if not must_know and not self._found_soon(parent)[1]:
            return
        try:
            if not self._lookup(parent).is_dir:
                raise failure(errno.ENOTDIR, path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise failure(error.errno or errno.ENOENT, path) from error


class Entries:
    """A folder's entries, as `os.scandir` gives them: an iterator that may be closed."""

    def __init__(self, entries: Iterator[DirEntry]) -> None:
        self._entries = entries

    def __iter__(self) -> Entries:
        return self

    def __next__(self) -> DirEntry:
        return next(self._entries)

    def close(self) -> None:
        """End it; nothing is open at the store."""
        self._entries = iter(())

    def __enter__(self) -> Entries:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class DirEntry:
    """One entry of a folder, like `os.DirEntry`."""

    __slots__ = ("_entry", "_folder", "_vfs")

    def __init__(self, vfs: VFS, folder: str, entry: Entry) -> None:
        self._vfs = vfs
        self._folder = folder
        self._entry = entry

    @property
    def name(self) -> str:
        """The name in its folder."""
        return self._entry.name

    @property
    def path(self) -> str:
        """The whole path in the VFS."""
        return paths.join(self._folder, self._entry.name)

    # No store's links reach the VFS, so that following them or not makes no difference.

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Tell whether it is a folder."""
        return self._entry.is_dir

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Tell whether it is a file."""
        return not self._entry.is_dir

    def is_symlink(self) -> bool:
        """Tell that it is none."""
        return False

    def inode(self) -> int:
        """Return the number that stands for the path."""
        return self._vfs.inode(self.path)

    def __fspath__(self) -> str:
        return self.path

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return the status; nothing is asked of the store."""
        return self._vfs.stat_entry(self.path, self._entry)

    def __repr__(self) -> str:
        return f"<DirEntry {self.name!r}>"


class _Process:
    """One process's share of a VFS."""

    __slots__ = ("core", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.core: Core | None = None
