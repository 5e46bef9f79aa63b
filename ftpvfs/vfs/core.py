"""What one process has open for one store: its backend, directory cache, index, and background threads."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ftpvfs import paths
from ftpvfs.backend.backend import Backend, Entry, Tuning, open_backend, protocol_of
from ftpvfs.backend.chunks import ChunkPolicy
from ftpvfs.cache.index import Index, cache_name
from ftpvfs.clock import Clock
from ftpvfs.config import VFSOptions
from ftpvfs.coordination.feed import ChangeFeed
from ftpvfs.coordination.folders import private_folder, unusable
from ftpvfs.coordination.locks import PathLocks, ThreadLocks
from ftpvfs.memory import MemoryBudget
from ftpvfs.vfs.dircache import DirCache
from ftpvfs.vfs.times import Times
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)


class Core:
    """What one process has open for one store. Any thread; never carried across a fork."""

    def __init__(
        self, url: str, storage_options: Mapping[str, Any], options: VFSOptions, clock: Clock
    ) -> None:
        self.options = options
        self.memory = MemoryBudget(options.max_buffer_memory)
        self.backend = self._open_backend(url, storage_options)
        self.policy = ChunkPolicy.from_options(
            buffer_size=options.buffer_size,
            chunk=options.read_chunk_size,
            limit=options.read_chunk_size_limit,
            streams=options.read_chunk_streams,
        )
        self._folder = Path(options.cache_dir) / (options.name or cache_name([protocol_of(url), self.backend.root]))
        self._meet_others()
        self.dirs = DirCache(
            self._list,
            self._stat,
            max_age=options.dir_cache_time,
            fold_case=options.case_insensitive,
            fold_unicode=not options.no_unicode_normalization,
            answers_at_once=self.backend.capability.answers_at_once,
            clock=clock,
            feed=self.feed,
        )
        self.count: Counter[str] = Counter()
        self.marks_folders = self.backend.capability.real_directories or options.dir_markers
        self.keeps_folders = not self.marks_folders
        shown = not (options.no_modtime or options.use_server_modtime)
        self.times = Times(self.backend, lambda: self.index, shown=shown)
        self._clock = clock
        self._index_lock = threading.Lock()
        self._index: Index | None = None
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
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
            memory=self.memory,
        )
        return open_backend(url, storage_options, tuning)

    def _meet_others(self) -> None:
        """Find the processes that have the same store open: a feed of changes, and locks of paths."""
        self.feed: ChangeFeed | None = None
        # Why this process cannot tell others of its changes; None where it can, or where nobody else sees the store.
        self.alone: OSError | None = None
        self._locks: ThreadLocks | PathLocks = ThreadLocks()
        if not self.backend.capability.is_shared:
            return
        try:
            private_folder(self._folder)
            self._locks = PathLocks(self._folder)
            self.feed = ChangeFeed(self._folder)
        except OSError as error:
            self.alone = unusable(self._folder, error)
            logger.info("What other processes change is seen late: %s", self.alone)

    @property
    def is_open(self) -> bool:
        """Whether `close` has not been called."""
        return not self._closing.is_set()

    def close(self) -> None:
        """Stop the threads and release everything."""
        self._closing.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)
        self.backend.close()
        with self._index_lock:
            if self._index is not None:
                self._index.close()
        if self.feed is not None:
            self.feed.close()

    def background(self, name: str, work: Callable[[], None]) -> None:
        """Run `work` in a thread that ends by itself soon after `close`."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - a background failure is told, and tried again when asked for
                logger.warning("%s: %s", name, error)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    @property
    def index(self) -> Index:
        """The records on disk; a store that knows all by itself never needs them."""
        if self._index is None:
            about_to_wait(Wait.DISK)
        with self._index_lock:
            if self._index is None:
                self._index = Index(self._folder)
            return self._index

    @contextlib.contextmanager
    def writer(self, *names: str) -> Iterator[None]:
        """Be the one writer of each path, in all processes: a commit, a delete and a rename of one object take turns.

        After a failure nobody knows what the store has there, so nothing cached is trusted any more.
        """
        about_to_wait(Wait.STORE)
        with self._locks.hold(*names):
            try:
                yield
            except OSError:
                for path in names:
                    self.dirs.doubt(path)
                raise

    # --- the store's answers, with what it cannot know

    def _list(self, path: str) -> list[Entry]:
        made = self.index.made_folders(path) if self.keeps_folders else set()
        try:
            entries = self.backend.list(path)
        except FileNotFoundError:
            if not self.keeps_folders or not (made or self.index.is_made(path)):
                raise
            entries = []
        made -= {entry.name for entry in entries}
        return entries + [Entry(name, is_dir=True) for name in made]

    def _stat(self, path: str) -> Entry:
        try:
            return self.backend.stat(path)
        except FileNotFoundError:
            if self.keeps_folders and (self.index.is_made(path) or self.index.made_folders(path)):
                return Entry(paths.split(path)[1], is_dir=True)
            raise

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
