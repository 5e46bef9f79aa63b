"""What is dirty, in memory, for those who may not wait for the disk: listings, lookups, the event loop.

The index is the truth. What this process changes is read again from there as soon as it is committed; what others
change is marked stale by the feed, and read when somebody asks for it. The lock is held for moments only, never while
the index is read: the event loop takes it, too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from ftpvfs import paths
from ftpvfs.cache.records import DirtyRecord
from ftpvfs.coordination.feed import ChangeFeed
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)
T = TypeVar("T")

CHANGED = "item"
# Records that may be read from the index by who may not wait for the disk: some 20 us each.
READ_AT_ONCE = 16
# Stale paths that are looked up with the lock held.
LISTED_AT_ONCE = 256


class _Folder:
    """The dirty files of one folder, the folders in it that have some, and how many lie in it, however deep."""

    __slots__ = ("files", "folders", "records", "stale", "unread", "unread_folders")

    def __init__(self) -> None:
        self.records: dict[str, DirtyRecord] = {}
        # Names whose records are to be read again, each with the number of the news that said so.
        self.stale: dict[str, int] = {}
        self.folders: dict[str, _Folder] = {}
        # At and below it: records of files, as far as known, and stale names; and which folders in it have stale ones.
        self.files = 0
        self.unread = 0
        self.unread_folders: set[str] = set()

    @property
    def is_empty(self) -> bool:
        return not (self.records or self.stale or self.folders)


class _Tree:
    """Dirty records by folder, with counts. One thread at a time; what it does takes moments, however much is in it."""

    def __init__(self) -> None:
        self.root = _Folder()
        self.size = 0
        self.count = 0

    def find(self, path: str) -> _Folder | None:
        """Return a folder in which something is dirty."""
        folder: _Folder | None = self.root
        for name in path.split("/") if path else ():
            folder = folder.folders.get(name) if folder is not None else None
        return folder

    def get(self, path: str) -> DirtyRecord | None:
        """Return the record of a path as it was last read."""
        parent, name = paths.split(path)
        folder = self.find(parent)
        return folder.records.get(name) if folder is not None else None

    def stale(self, path: str) -> int | None:
        """Return the number of the news after which a path is to be read again; None where it is not."""
        parent, name = paths.split(path)
        folder = self.find(parent)
        return folder.stale.get(name) if folder is not None else None

    def stale_in(self, path: str) -> list[str]:
        """Return some of the stale paths directly in a folder."""
        folder = self.find(path)
        return [] if folder is None else [paths.join(path, name) for name in islice(folder.stale, LISTED_AT_ONCE)]

    def stale_below(self, path: str) -> list[str]:
        """Return some of the stale paths in a folder, however deep."""
        folder = self.find(path)
        while folder is not None and not folder.stale and folder.unread_folders:
            name = next(iter(folder.unread_folders))
            path, folder = paths.join(path, name), folder.folders[name]
        return self.stale_in(path)

    def mark(self, path: str, number: int) -> None:
        """Note that a path is to be read again."""
        parent, name = paths.split(path)
        line = self._line(parent)
        if name not in line[-1].stale:
            self._count_unread(parent, line, 1)
        line[-1].stale[name] = number

    def set(self, path: str, record: DirtyRecord | None) -> None:
        """Note a path's record, None for none; it is not stale then."""
        parent, name = paths.split(path)
        line = self._line(parent)
        folder = line[-1]
        if folder.stale.pop(name, None) is not None:
            self._count_unread(parent, line, -1)
        old = folder.records.pop(name, None)
        if record is not None:
            folder.records[name] = record
        self.size += (record.size if record else 0) - (old.size if old else 0)
        self.count += (record is not None) - (old is not None)
        files = _is_file(record) - _is_file(old)
        for each in line:
            each.files += files
        self._prune(parent, line)

    def _count_unread(self, path: str, line: list[_Folder], change: int) -> None:
        for above, folder, name in zip(line, line[1:], path.split("/"), strict=False):
            folder.unread += change
            (above.unread_folders.add if folder.unread else above.unread_folders.discard)(name)
        self.root.unread += change

    def _line(self, path: str) -> list[_Folder]:
        """Return the folders from the root down to that of the path, made where they are missing."""
        line = [self.root]
        for name in path.split("/") if path else ():
            folder = line[-1].folders.get(name)
            if folder is None:
                folder = line[-1].folders[name] = _Folder()
            line.append(folder)
        return line

    def _prune(self, path: str, line: list[_Folder]) -> None:
        """Let go of a folder that has nothing dirty any more, and of those above it."""
        while len(line) > 1 and line.pop().is_empty:
            path, name = paths.split(path)
            del line[-1].folders[name]


def _is_file(record: DirtyRecord | None) -> bool:
    return record is not None and not record.is_tombstone


class Mirror:
    """All dirty records of a store. Any thread; made after a fork.

    `read` returns one path's record from the index, `read_all` all of them; `replaced` counts how often a damaged index
    was replaced. Where more is to be read than takes moments, and the thread may not wait for the disk, WouldWait is
    raised. Lock order: `_loading`, then `_lock`; the index is read without `_lock`.
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
        # Held by the one who reads all records.
        self._loading = threading.Lock()
        self._lock = threading.Lock()
        # Protected by _lock.
        self._tree = _Tree()
        self._number = 0  # of the last news
        # How often too much was missed to tell, and how often that was when all was last read.
        self._overflows, self._covered = 1, 0
        self._index = replaced()
        # Paths that were marked while all is being read; None while nobody does.
        self._marked: set[str] | None = None
        # Paths that were marked since `changes` was last asked; None: too many to tell, or nobody asks.
        self._unseen: set[str] | None = None
        self._load()

    # --- changes

    def changed(self, changed: Iterable[str]) -> None:
        """Take over what this process has just committed, and tell the others."""
        for path in changed:
            try:
                self.doubt(path)
            except OSError as error:  # read again by the next who asks
                logger.error("What is dirty at %r cannot be read at the moment: %s", path, error)  # noqa: TRY400
            if self._feed is not None:
                try:
                    self._feed.publish({CHANGED: path})
                except OSError as error:  # it is done, and on the disk; the others see it late
                    logger.error("Other processes were not told of a change: %s", error)  # noqa: TRY400

    def doubt(self, path: str) -> None:
        """Read the path's record again: it was changed, or what is known of it turned out not to be true."""
        with self._lock:
            self._mark_locked(path)
        self._settle(path)

    def changes(self) -> set[str] | None:
        """Return the paths that may have changed since the last call, None where all may have. For one who asks.

        Until `ignore_changes` they are kept for that one.
        """
        with self._lock:
            self._follow_locked()
            unseen, self._unseen = self._unseen, set()
            return unseen

    def ignore_changes(self) -> None:
        """Keep changes for nobody any more."""
        with self._lock:
            self._unseen = None

    def _mark_locked(self, path: str) -> None:
        self._number += 1
        self._tree.mark(path, self._number)
        for listed in (self._marked, self._unseen):
            if listed is not None:
                listed.add(path)

    def _settle(self, path: str) -> None:
        """Read a path that is stale, until nothing has changed it meanwhile."""
        while True:
            with self._lock:
                number = self._tree.stale(path)
            if number is None:
                return
            record = self._read(path)
            with self._lock:
                if self._tree.stale(path) == number:
                    self._tree.set(path, record)

    def _follow_locked(self) -> None:
        """Mark what other processes have changed."""
        news = self._news.news() if self._news is not None else []
        index = self._replaced()
        if news is None or index != self._index:
            self._overflows += 1
            self._index, self._unseen = index, None
        for change in news or ():
            path = change.get(CHANGED)
            if isinstance(path, str):
                self._mark_locked(path)

    # --- reading all

    def _load(self) -> None:
        """Read all records, unless another thread has done so meanwhile."""
        about_to_wait(Wait.DISK)
        with self._loading:
            while (overflows := self._begin_loading()) is not None:
                tree = _Tree()
                for record in self._read_all():
                    tree.set(record.path, record)
                self._end_loading(tree, overflows)

    def _begin_loading(self) -> int | None:
        with self._lock:
            self._follow_locked()
            if self._covered == self._overflows:
                return None
            self._marked = set()
            return self._overflows

    def _end_loading(self, tree: _Tree, overflows: int) -> None:
        """Take the tree; what was changed while it was read is read again."""
        with self._lock:
            for path in self._marked or ():
                self._number += 1
                tree.mark(path, self._number)
            self._tree, self._covered, self._marked = tree, overflows, None

    # --- asking

    def get(self, path: str) -> DirtyRecord | None:
        """Return the record of a path."""
        return self._asked(lambda tree: tree.get(path), lambda tree: [path] if tree.stale(path) is not None else [])

    def inside(self, path: str) -> list[DirtyRecord]:
        """Return the records of all that lies directly in a folder."""

        def records(tree: _Tree) -> list[DirtyRecord]:
            folder = tree.find(path)
            return [] if folder is None else list(folder.records.values())

        return self._asked(records, lambda tree: tree.stale_in(path))

    def below(self, path: str) -> list[DirtyRecord]:
        """Return the records of all that lies in a folder, however deep."""
        folder = self._asked(lambda tree: tree.find(path), lambda tree: tree.stale_below(path))
        return [] if folder is None else list(self._walk(folder))

    def _walk(self, top: _Folder) -> Iterator[DirtyRecord]:
        """Yield the records of a folder and those below it, one after the other: nobody waits for the whole."""
        folders = [top]
        while folders:
            folder = folders.pop()
            with self._lock:
                records = list(folder.records.values())
                folders.extend(folder.folders.values())
            yield from records

    def folders_in(self, path: str) -> list[str]:
        """Return the names of the folders directly in a folder in which a dirty file lies, however deep."""

        def folders(tree: _Tree) -> list[tuple[str, _Folder]]:
            folder = tree.find(path)
            return [] if folder is None else list(folder.folders.items())

        inside = self._asked(folders, lambda tree: tree.stale_below(path))
        return [name for name, folder in inside if folder.files]

    def has_file_below(self, path: str) -> bool:
        """Tell whether a dirty file lies in a folder, however deep."""

        def has_file(tree: _Tree) -> bool:
            folder = tree.find(path)
            return folder is not None and folder.files > 0

        def doubtful(tree: _Tree) -> list[str]:
            folder = tree.find(path)
            is_sure = folder is None or folder.files > folder.unread
            return [] if is_sure else tree.stale_below(path)

        return self._asked(has_file, doubtful)

    @property
    def is_empty(self) -> bool:
        """Whether there is no record at all."""
        return self._asked(
            lambda tree: not tree.count, lambda tree: [] if tree.count > tree.root.unread else tree.stale_below("")
        )

    @property
    def size(self) -> int:
        """Bytes of all dirty files. Reads from the index what other processes have changed."""
        return self._asked(lambda tree: tree.size, lambda tree: tree.stale_below(""))

    @property
    def count(self) -> int:
        """How many records there are, as far as somebody has asked for those that other processes changed."""
        return self._asked(lambda tree: tree.count, lambda tree: [])

    def _asked(self, answer: Callable[[_Tree], T], stale: Callable[[_Tree], list[str]]) -> T:
        """Return what the tree says once no path that matters to the answer is stale."""
        while True:
            with self._lock:
                self._follow_locked()
                is_outdated = self._covered != self._overflows
                unread = [] if is_outdated else stale(self._tree)
                if not is_outdated and not unread:
                    return answer(self._tree)
            if is_outdated:
                self._load()
            if len(unread) > READ_AT_ONCE:
                about_to_wait(Wait.DISK)
            for path in unread:
                self._settle(path)
