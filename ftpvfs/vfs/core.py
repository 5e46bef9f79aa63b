"""What one process has open for one store: its backend, directory cache, index, and background threads."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftpvfs import paths
from ftpvfs.backend.backend import Backend, Entry, Tuning, display_url, open_backend, protocol_of
from ftpvfs.backend.capability import Capability
from ftpvfs.backend.chunks import ChunkPolicy
from ftpvfs.cache.cache import Cache
from ftpvfs.cache.downloader import Downloads
from ftpvfs.cache.identity import Identity, claim
from ftpvfs.cache.index import Index, cache_name
from ftpvfs.cache.left import has_left
from ftpvfs.cache.writeback import WriteBack
from ftpvfs.clock import Clock
from ftpvfs.config import VFSOptions
from ftpvfs.coordination.feed import ChangeFeed
from ftpvfs.coordination.folders import private_folder, unusable
from ftpvfs.coordination.lockfile import LockFile
from ftpvfs.coordination.locks import PathLocks, ThreadLocks
from ftpvfs.errors import AWAY, failure
from ftpvfs.memory import MemoryBudget
from ftpvfs.vfs.breaker import CircuitBreaker
from ftpvfs.vfs.dircache import OUTDATED, DirCache, Outdated
from ftpvfs.vfs.pending import Pending, is_local, local_entry
from ftpvfs.vfs.questions import Questions
from ftpvfs.vfs.times import Times
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheParts:
    """The disk cache of one store in one process, and what works on it."""

    cache: Cache
    downloads: Downloads
    writeback: WriteBack
    pending: Pending


class Core:
    """What one process has open for one store. Any thread; never carried across a fork."""

    def __init__(
        self, url: str, storage_options: Mapping[str, Any], options: VFSOptions, clock: Clock
    ) -> None:
        self.options = options
        self.memory = MemoryBudget(options.max_buffer_memory)
        self.breaker = CircuitBreaker(display_url(url), clock)
        self.questions = Questions(self.breaker, clock)
        self.backend = self._open_backend(url, storage_options)
        self.policy = ChunkPolicy.from_options(
            buffer_size=options.buffer_size,
            chunk=options.read_chunk_size,
            limit=options.read_chunk_size_limit,
            streams=options.read_chunk_streams,
        )
        self.folder = Path(options.cache_dir) / (options.name or cache_name([protocol_of(url), self.backend.root]))
        try:
            self._meet_others(Identity.of(url, storage_options, self.backend.root))
        except OSError:
            self.backend.close()
            raise
        self.dirs = DirCache(
            self._list,
            self._stat,
            max_age=options.dir_cache_time,
            fold_case=options.case_insensitive,
            fold_unicode=not options.no_unicode_normalization,
            answers_at_once=self.backend.capability.answers_at_once,
            serves_old=options.cache_mode != "off",
            here=self._here,
            newest=self._newest,
            known_here=self._known_here,
            optional=self.questions.ask,
            clock=clock,
            feed=self.feed,
        )
        self.backend.when_gone = lambda: self.later(self.dirs.forget)
        self.count: Counter[str] = Counter()
        self.marks_folders = marks_folders(self.backend.capability, options)
        self.keeps_folders = not self.marks_folders
        self.times = Times(self.backend, lambda: self.index, shown=shows_times(options))
        self._clock = clock
        self._index_lock = threading.Lock()
        self._index: Index | None = None
        self._closing = threading.Event()
        self._keeping_lock = threading.Lock()
        # Folders that may have to be kept once the store says so: whether somebody has asked since. Protected by it.
        self._keeping: dict[str, bool] = {}
        self._threads: list[threading.Thread] = []
        self._hashing = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="ftpvfs-hash")
        self._cache_feed: ChangeFeed | None = None
        self.parts: CacheParts | None = None  # what write-back finds when it is faster than this constructor
        self.parts = self._open_cache() if options.cache_mode != "off" else self._open_left()
        if options.poll_interval:
            self.background("ftpvfs-poll", self._poll)

    def _open_backend(self, url: str, storage_options: Mapping[str, Any]) -> Backend:
        options = self.options
        tuning = Tuning(
            low_level_retries=options.low_level_retries,
            connect_timeout=options.contimeout or 0.0,
            read_timeout=options.timeout or 0.0,
            checkers=options.checkers,
            verify=not options.no_checksum,
            server_mtime=options.use_server_modtime or options.no_modtime,
            follow_links=options.copy_links,
            hidden=options.cache_dir,
            memory=self.memory,
            answered=self.breaker.answered,
        )
        return open_backend(url, storage_options, tuning)

    def _meet_others(self, identity: Identity) -> None:
        """Find the processes that have the same store open: a feed of changes, and locks of paths.

        Raises EBUSY where the cache folder is another store's.
        """
        self._claim: LockFile | None = None
        self.feed: ChangeFeed | None = None
        # Why this process cannot tell others of its changes; None where it can, or where nobody else sees the store.
        self.alone: OSError | None = None
        self._locks: ThreadLocks | PathLocks = ThreadLocks()
        if not self.backend.capability.is_shared:
            return
        try:
            private_folder(self.folder)
        except OSError as error:
            self._be_alone(error)
            return
        self._claim = claim(self.folder, identity)
        try:
            self._locks = PathLocks(self.folder)
            self.feed = ChangeFeed(self.folder)
        except OSError as error:
            self._be_alone(error)

    def _be_alone(self, error: OSError) -> None:
        self.alone = unusable(self.folder, error)
        logger.info("What other processes change is seen late: %s", self.alone)

    def _open_cache(self) -> CacheParts:
        """Open the disk cache: what is dirty is shown, and on its way to the store, from here on."""
        if self.alone is not None or not isinstance(self._locks, PathLocks):
            raise self.alone or not_cacheable(self.backend.display)
        options = self.options
        self._cache_feed = ChangeFeed(self.folder)
        cache = Cache(self.folder, self.index, options, clock=self._clock, feed=self._cache_feed)
        downloads = Downloads(
            self.backend,
            self.policy,
            self.memory,
            read_ahead=options.read_ahead or 0,
            verify=not options.no_checksum,
            timeout=options.timeout,
            clock=self._clock,
        )
        writeback = WriteBack(
            cache,
            self.backend,
            folder=self.folder,
            locks=self._locks,
            options=options,
            changed=self.changed,
            timed=self._timed,
            clock=self._clock,
        )
        cache.start(hurry=writeback.notify)
        writeback.start()
        return CacheParts(cache, downloads, writeback, Pending(cache, writeback, self.changed))

    def _open_left(self) -> CacheParts | None:
        """Open, in mode off, the cache that an earlier start has left with files which the store never got.

        They are shown and stored, or replaced by what is newer: an old one that came to light later would undo what
        was done since. None where there are none.
        """
        if self.alone is not None or not isinstance(self._locks, PathLocks) or not has_left(self.folder):
            return None
        try:
            parts = self._open_cache()
        except OSError as error:
            logger.error("What waits in the cache %s cannot be stored: %s", self.folder, error)  # noqa: TRY400
            return None
        logger.warning(
            "%s: %d files or deletions that an earlier start has left in the cache are on their way to the store",
            self.backend.display, len(parts.cache.all_dirty()),
        )  # fmt: skip
        return parts

    @property
    def is_open(self) -> bool:
        """Whether `close` has not been called."""
        return not self._closing.is_set()

    def stop(self, drain_timeout: float | None = 0.0) -> int:
        """Store what waits, for as long as `drain_timeout` seconds (None: until it is done); return how much is left.

        What is left is stored after the next start. Only `close` may follow.
        """
        return self.parts.writeback.stop(drain_timeout) if self.parts is not None else 0

    def close(self) -> None:
        """Stop the threads and release everything."""
        self.stop()
        self._closing.set()
        self.questions.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)
        if self.parts is not None:
            self.parts.downloads.close()
            self.parts.cache.close()
        if self._cache_feed is not None:
            self._cache_feed.close()
        self.backend.close()
        self._hashing.shutdown()
        with self._index_lock:
            if self._index is not None:
                self._index.close()
        if self.feed is not None:
            self.feed.close()
        self._locks.close()
        if self._claim is not None:
            self._claim.close()

    def background(self, name: str, work: Callable[[], object]) -> None:
        """Run `work` in a thread that ends by itself soon after `close`."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a background failure is told, and tried again when asked for
                logger.warning("%s: %s", name, error)

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        self._threads = [*(each for each in self._threads if each.is_alive()), thread]

    def later(self, work: Callable[[], object]) -> None:
        """Run in a thread of its own what is rare, waits for the store, and is waited for by nobody."""
        self.background("ftpvfs-later", work)

    def hash_apart(self, work: Callable[[], object]) -> None:
        """Run work that keeps a processor busy and waits for nobody, in a thread for such; here once those are gone."""
        try:
            self._hashing.submit(work)
        except RuntimeError:  # closed; whoever still reads is to hear why
            work()

    @property
    def index(self) -> Index:
        """The records on disk; a store that knows all by itself never needs them."""
        if self._index is None:
            about_to_wait(Wait.DISK)
        with self._index_lock:
            if self._index is None:
                self._index = Index(self.folder, durable=self.options.cache_sync)
            return self._index

    @contextlib.contextmanager
    def writer(self, *names: str, asks_store: bool = True) -> Iterator[None]:
        """Be the one writer of each path, in all processes: a commit, a delete and a rename of one object take turns.

        After a failure nobody knows what the store has there, so nothing cached is trusted any more. Who does not ask
        the store meanwhile does not wait for it either, unless somebody else holds a path, who may.
        """
        if asks_store:
            about_to_wait(Wait.STORE)
        with contextlib.ExitStack() as held:
            self._hold_until(held, names)
            try:
                yield
            except OSError:
                for path in names:
                    self.dirs.doubt(path)
                raise

    def _hold_until(self, held: contextlib.ExitStack, names: Collection[str]) -> None:
        """Hold paths until `held` is left; whoever holds one already may be waiting for the store."""
        try:
            held.enter_context(self._locks.hold(*names, blocking=False))
        except BlockingIOError:
            about_to_wait(Wait.STORE)
            held.enter_context(self._locks.hold(*names))

    # --- what is dirty

    def changed(self, path: str, entry: Entry | None) -> None:
        """Show at once, to all processes, what is at a path now; `entry` may be what only the store has."""
        self.dirs.changed(path, entry)

    def _newest(self, path: str, entry: Entry | None) -> Entry | Outdated | None:
        """Return what waits to be stored at a path, else what somebody says is there.

        A file that waited and does not any more is stored, replaced or deleted, which whoever did it tells.
        """
        if self.parts is None:
            return entry
        dirty = self.parts.cache.dirty(path)
        if dirty is None:
            return OUTDATED if is_local(entry) else entry
        return None if dirty.is_tombstone else local_entry(dirty)

    def published(self, path: str, entry: Entry | None) -> None:
        """As `changed`, for a new file; the folders above it that others have removed since it was begun are back."""
        self.changed(path, entry)
        for folder in paths.ancestors(path)[:-1]:
            if self.dirs.lacks(folder):
                self.dirs.changed(folder, Entry(paths.split(folder)[1], is_dir=True))

    def look_again(self, path: str) -> Entry:
        """Ask the store for what it has at a path now, and show that unless something waits to be stored there."""

        def is_clean() -> bool:
            return self.parts is None or self.parts.cache.dirty(path) is None

        return self.dirs.look_again(path, self.stat, believe=is_clean)

    def _timed(self, path: str, entry: Entry, mtime: float) -> Entry:
        """Return a file that was uploaded with the time that it was given here, also where the store keeps none."""
        return self.times.set(path, entry, mtime) if self.times.keeps else entry

    @property
    def pending(self) -> Pending | None:
        """What the store does not have yet; None in mode off, where there is no such thing (any more)."""
        return self.parts.pending if self.parts is not None else None

    def is_dirty(self, path: str) -> bool:
        """Tell whether a file is on its way to the path at the store."""
        return self.pending is not None and self.pending.is_file(path)

    @contextlib.contextmanager
    def renaming_below(self, source: str, target: str) -> Iterator[Collection[str]]:
        """Rename what is dirty below a folder while the store renames the folder; yields the new paths.

        Nobody else renames a folder above or below either, nor stores there what is dirty.
        """
        about_to_wait(Wait.STORE)
        with self._locks.hold_folders(source, target):
            if self.pending is None:
                yield ()
            else:
                with self.pending.renaming_below(source, target) as dirty:
                    yield dirty

    def hold(self, *names: str) -> contextlib.AbstractContextManager[None]:
        """Be the only one who changes the store at each path, for moments, while a folder is renamed."""
        return self._locks.hold(*names)

    def replaced(self, path: str) -> None:
        """The store has something at the path that is newer than whatever is cached of it."""
        if self.pending is not None:
            self.pending.replaced(path)

    def forget_item(self, path: str) -> None:
        """Nothing is at the path any more: drop what is cached of it."""
        if self.parts is not None:
            self.parts.cache.forget_item(path)

    def drop_partial(self, path: str) -> None:
        """Nobody shall go on with an upload to a name that now means another file, or none."""
        if self.parts is not None:
            self.parts.cache.drop_partial(path)

    def drop_partials_below(self, folder: str) -> None:
        """As `drop_partial`, for all that lies at and below a folder."""
        if self.parts is not None:
            self.parts.cache.drop_partials_below(folder)

    def renamed_item(self, source: str, target: str, entry: Entry) -> None:
        """The store has renamed a file: take what is cached of it along, and end what was on its way to `target`."""
        if self.parts is not None:
            self.parts.cache.supersede(target)
            self.parts.cache.rename_item(source, target, entry)

    def settle(self, path: str, *, below: bool = True) -> None:
        """Have the deletion at a path done, before a folder is made there; and those directly below it, before the
        store makes or removes one.
        """
        if self.pending is not None:
            self.pending.settle(path, below=below)

    # --- the store's answers, with what it cannot know

    def _list(self, path: str) -> list[Entry]:
        made = self.index.made_folders(path) if self.keeps_folders else set()
        try:
            entries = self.backend.list(path)
        except FileNotFoundError:
            if not (made or self._is_kept(path)):
                raise
            entries = []
        if self.pending is not None:
            entries = self.pending.overlay(path, entries)
        made -= {entry.name for entry in entries}
        return entries + [Entry(name, is_dir=True) for name in made]

    def _here(self, path: str) -> list[Entry]:
        """Return the files in a folder that wait here; nothing is asked of the store."""
        return self.pending.overlay(path, []) if self.pending is not None else []

    def _known_here(self, path: str) -> Entry | None:
        """Return what is at a path whatever the store says, None where only the store knows; ENOENT: it is deleted."""
        found = self.pending.find(path) if self.pending is not None else None
        if found is None and path and self._is_kept(path):
            return Entry(paths.split(path)[1], is_dir=True)
        return found

    def _stat(self, path: str) -> Entry:
        found = self.pending.find(path) if self.pending is not None else None
        return found or self.stat(path)

    def stat(self, path: str) -> Entry:
        """Return what the store has at a path, and what it cannot know: folders that are here alone.

        Where the store is away, what is cached of the path is as good as any answer.
        """
        try:
            return self.backend.stat(path)
        except FileNotFoundError:
            if self._is_kept(path) or (self.keeps_folders and self.index.made_folders(path)):
                return Entry(paths.split(path)[1], is_dir=True)
            raise
        except OSError as error:
            if self.parts is None or error.errno not in AWAY:
                raise
            if self.parts.pending.is_any_below(path):
                return Entry(paths.split(path)[1], is_dir=True)
            known = self.parts.cache.record(path)
            if known is None:
                raise
            return Entry(paths.split(path)[1], False, known.size, known.mtime, known.fingerprint)

    def _is_kept(self, path: str) -> bool:
        """Tell whether a folder exists although the store does not know it."""
        if self.keeps_folders and self.index.is_made(path):
            return True
        return self.pending is not None and self.pending.is_any_below(path)

    def keep_folder(self, path: str) -> None:
        """Let a folder outlive its last file where the store would let it go with it."""
        if not path or self.backend.capability.real_directories:
            return
        if self.keeps_folders:
            is_new = self.index.add_folder(path)
        else:
            is_new = self._is_empty(path, fresh=False) and self._is_empty(path, fresh=True)
            if is_new:
                self.backend.mkdir(path)
        if is_new:
            self.dirs.changed(path, Entry(paths.split(path)[1], is_dir=True))

    def keep_folder_of_waiting(self, path: str) -> None:
        """As `keep_folder`, for one whose last file the store never got; nobody waits for the store to be asked."""
        if self.keeps_folders or self.backend.capability.answers_at_once:
            self.keep_folder(path)
            return
        with self._keeping_lock:
            is_under_way = path in self._keeping
            self._keeping[path] = True
        if not is_under_way:
            self.later(lambda: self._keep_while_asked(path))

    def _keep_while_asked(self, path: str) -> None:
        try:
            while self._is_asked_to_keep(path):
                self.keep_folder(path)
        except BaseException:
            with self._keeping_lock:
                self._keeping.pop(path, None)
            raise

    def _is_asked_to_keep(self, path: str) -> bool:
        """Take note that all who have asked so far are served; False where nobody has asked since."""
        with self._keeping_lock:
            if self._keeping[path]:
                self._keeping[path] = False
                return True
            del self._keeping[path]
            return False

    def make_folder(self, path: str) -> None:
        """Make a folder where the store, or else the index, remembers it."""
        if self.marks_folders:
            self.backend.mkdir(path)
        else:
            self.index.add_folder(path)

    def _is_empty(self, path: str, *, fresh: bool) -> bool:
        try:
            return not self.dirs.listing(path, fresh=fresh)
        except FileNotFoundError:
            return True

    def is_there(self, path: str) -> bool:
        """Ask the store, whatever is cached, whether there is anything at the path."""
        try:
            self._stat(path)
        except FileNotFoundError:
            return False
        return True

    # --- polling

    def _poll(self) -> None:
        """Re-read the folders in use, for stores that do not tell of changes; let go of those that are not."""
        interval = self.options.poll_interval or 0.0
        while not self._clock.wait(self._closing, interval):
            self.dirs.sweep()
            for path in self.dirs.in_use(interval):
                if self._closing.is_set():
                    return
                try:
                    self.dirs.reread(path)
                except FileNotFoundError:
                    self.dirs.forget(path)
                except OSError as error:  # the store is away; what is cached stays until it is too old
                    logger.info("polling %r: %s", path, error)


def marks_folders(capability: Capability, options: VFSOptions) -> bool:
    """Tell whether the store keeps empty folders; else the index does."""
    return capability.real_directories or options.dir_markers


def shows_times(options: VFSOptions) -> bool:
    """Tell whether anybody wants to see true modification times."""
    return not (options.no_modtime or options.use_server_modtime)


def needs_index(capability: Capability, options: VFSOptions) -> bool:
    """Tell whether a store needs records on disk, be they of folders or of times, also without a disk cache."""
    times = Times.needed(capability, shown=shows_times(options))
    return not marks_folders(capability, options) or any(times)


def not_cacheable(store: str) -> OSError:
    """Return what to raise for a disk cache before a store that no other process sees."""
    return failure(errno.EINVAL, store, "Only this process sees the store: --vfs-cache-mode must be off")
