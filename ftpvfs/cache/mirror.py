"""What is dirty, in memory, for those who may not wait for the disk: listings, lookups, the event loop.

The index is the truth. What this process changes is read again from there as soon as it is committed; what others
change is marked stale by the feed, and read when somebody asks for it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator

from ftpvfs import paths
from ftpvfs.cache.records import DirtyRecord
from ftpvfs.coordination.feed import ChangeFeed

logger = logging.getLogger(__name__)

CHANGED = "item"


class _Folder:
    """The dirty files of one folder, and the folders in it that have some."""

    __slots__ = ("folders", "records", "stale")

    def __init__(self) -> None:
        self.records: dict[str, DirtyRecord] = {}
        # Names whose records are to be read again.
        self.stale: set[str] = set()
        self.folders: dict[str, _Folder] = {}

    @property
    def is_empty(self) -> bool:
        return not (self.records or self.stale or self.folders)


class Mirror:
    """All dirty records of a store. Any thread; made after a fork.

    `read` returns one path's record from the index, `read_all` all of them; `replaced` counts how often a damaged index
    was replaced. Lock order: the mirror's, then the index.
    """

    def __init__(
        self,
        read: Callable[[str], DirtyRecord | None],
        read_all: Callable[[], list[DirtyRecord]],
        feed: ChangeFeed | None,
        replaced: Callable[[], int] = lambda: 0,
    ) -> None:
        self._read = read
        self._read_all = read_all
        self._replaced = replaced
        self._feed = feed
        self._news = feed.follow() if feed is not None else None
        self._lock = threading.Lock()
        # Protected by _lock.
        self._root = _Folder()
        self._stale: set[str] = set()  # all paths whose records are to be read again
        self._size = 0
        self._count = 0
        self._loaded = 0
        with self._lock:
            self._load_locked()

    def changed(self, changed: Iterable[str]) -> None:
        """Take over what this process has just committed, and tell the others."""
        for path in changed:
            self._take_over(path)
            if self._feed is not None:
                try:
                    self._feed.publish({CHANGED: path})
                except OSError as error:  # it is done, and on the disk; the others see it late
                    logger.error("Other processes were not told of a change: %s", error)  # noqa: TRY400

    def _take_over(self, path: str) -> None:
        with self._lock:
            try:
                self._set_locked(path, self._read(path))
            except OSError as error:  # read again by the next who asks
                logger.error("What is dirty at %r cannot be read at the moment: %s", path, error)  # noqa: TRY400
                self._mark_locked(path)

    def doubt(self, path: str) -> None:
        """Read the path's record again: what is known of it turned out not to be true."""
        with self._lock:
            self._set_locked(path, self._read(path))

    # --- asking

    def get(self, path: str) -> DirtyRecord | None:
        """Return the record of a path."""
        parent, name = paths.split(path)
        with self._lock:
            self._follow_locked()
            folder = self._find_locked(parent)
            if folder is None:
                return None
            if name in folder.stale:
                self._set_locked(path, self._read(path))
            return folder.records.get(name)

    def inside(self, path: str) -> list[DirtyRecord]:
        """Return the records of all that lies directly in a folder."""
        with self._lock:
            self._follow_locked()
            folder = self._find_locked(path)
            if folder is None:
                return []
            self._refresh_locked(path, folder)
            return list(folder.records.values())

    def below(self, path: str) -> list[DirtyRecord]:
        """Return the records of all that lies in a folder, however deep."""
        with self._lock:
            self._follow_locked()
            folder = self._find_locked(path)
            return [] if folder is None else list(self._walk_locked(path, folder))

    def folders_in(self, path: str) -> list[str]:
        """Return the names of the folders directly in a folder in which a dirty file lies, however deep."""
        with self._lock:
            self._follow_locked()
            folder = self._find_locked(path)
            inside = [] if folder is None else list(folder.folders.items())
            return [name for name, child in inside if self._has_file_locked(paths.join(path, name), child)]

    def has_file_below(self, path: str) -> bool:
        """Tell whether a dirty file lies in a folder, however deep."""
        with self._lock:
            self._follow_locked()
            folder = self._find_locked(path)
            return folder is not None and self._has_file_locked(path, folder)

    @property
    def size(self) -> int:
        """Bytes of all dirty files. Reads from the index what other processes have changed."""
        with self._lock:
            self._follow_locked()
            for path in list(self._stale):
                self._set_locked(path, self._read(path))
            return self._size

    @property
    def count(self) -> int:
        """How many records there are."""
        with self._lock:
            self._follow_locked()
            return self._count

    # --- the tree

    def _follow_locked(self) -> None:
        news = self._news.news() if self._news is not None else []
        if news is None or self._loaded != self._replaced():
            self._load_locked()
            return
        for change in news:
            path = change.get(CHANGED)
            if isinstance(path, str):
                self._mark_locked(path)

    def _mark_locked(self, path: str) -> None:
        parent, name = paths.split(path)
        self._make_locked(parent).stale.add(name)
        self._stale.add(path)

    def _load_locked(self) -> None:
        self._loaded = self._replaced()
        self._root, self._size, self._count = _Folder(), 0, 0
        self._stale.clear()
        for record in self._read_all():
            self._set_locked(record.path, record)

    def _find_locked(self, path: str) -> _Folder | None:
        folder: _Folder | None = self._root
        for name in path.split("/") if path else ():
            folder = folder.folders.get(name) if folder is not None else None
        return folder

    def _make_locked(self, path: str) -> _Folder:
        folder = self._root
        for name in path.split("/") if path else ():
            folder = folder.folders.setdefault(name, _Folder())
        return folder

    def _set_locked(self, path: str, record: DirtyRecord | None) -> None:
        parent, name = paths.split(path)
        folder = self._make_locked(parent)
        folder.stale.discard(name)
        self._stale.discard(path)
        old = folder.records.pop(name, None)
        if old is not None:
            self._size -= old.size
            self._count -= 1
        if record is not None:
            folder.records[name] = record
            self._size += record.size
            self._count += 1
        elif folder.is_empty:
            self._prune_locked(parent)

    def _prune_locked(self, path: str) -> None:
        """Let go of a folder that has nothing dirty any more, and of those above it."""
        while path:
            parent, name = paths.split(path)
            above = self._find_locked(parent)
            if above is None or name not in above.folders or not above.folders[name].is_empty:
                return
            del above.folders[name]
            path = parent

    def _refresh_locked(self, path: str, folder: _Folder) -> None:
        for name in list(folder.stale):
            child = paths.join(path, name)
            self._set_locked(child, self._read(child))

    def _has_file_locked(self, path: str, folder: _Folder) -> bool:
        return any(not record.is_tombstone for record in self._walk_locked(path, folder))

    def _walk_locked(self, path: str, folder: _Folder) -> Iterator[DirtyRecord]:
        self._refresh_locked(path, folder)
        yield from list(folder.records.values())
        for name, child in list(folder.folders.items()):
            yield from self._walk_locked(paths.join(path, name), child)
