"""True modification times where a store's listing does not tell them: asked once for each version, and remembered.

There are two such kinds of stores. S3 has them in metadata that only a request for each object shows, so what a
folder's listing needed is remembered in the index. Others (memory, SFTP) keep no time that is set: the index has it
instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ftpvfs import paths
from ftpvfs.backend.backend import Backend, Entry
from ftpvfs.backend.capability import Capability
from ftpvfs.cache.index import Index


@dataclass(frozen=True)
class Move:
    """An object that was copied to another path, as it was and as it is there."""

    source: str
    old: Entry
    target: str
    new: Entry


class Times:
    """The modification times of one store. Any thread. `shown` is whether anybody wants to see true ones."""

    def __init__(self, backend: Backend, index: Callable[[], Index], *, shown: bool) -> None:
        self._backend = backend
        self._index = index
        self.asks, self.keeps = self.needed(backend.capability, shown=shown)

    @staticmethod
    def needed(capability: Capability, *, shown: bool) -> tuple[bool, bool]:
        """Return whether the store is to be asked for each time, and whether the index keeps those that were set."""
        return shown and not capability.lists_mtime, shown and capability.writes and not capability.sets_mtime

    def fill_listing(self, folder: str, entries: Iterable[Entry]) -> None:
        """Fill in the times of a whole folder, in place."""
        files = [entry for entry in entries if not entry.is_dir]
        if self._fill(folder, files):
            self._index().remember_mtimes(folder, {e.name: (e.version, e.mtime) for e in files if e.mtime is not None})

    def must_ask(self, folder: str, entries: Iterable[Entry]) -> bool:
        """Fill in what is known here of the times of a whole folder; tell whether the store knows more."""
        return bool(self._fill_known(folder, [entry for entry in entries if not entry.is_dir]))

    def fill(self, folder: str, entry: Entry) -> None:
        """Fill in the time of one entry of a folder, in place.

        An answer is kept where the entry is kept, and on disk once the folder is listed: a record of the whole folder
        is not written anew for each of its files.
        """
        if not entry.is_dir:
            self._fill(folder, [entry])

    def _fill(self, folder: str, files: list[Entry]) -> bool:
        """Fill in; return whether the store was asked."""
        missing = self._fill_known(folder, files)
        if missing:
            self._backend.true_mtimes(folder, missing)
        return bool(missing)

    def _fill_known(self, folder: str, files: list[Entry]) -> list[Entry]:
        """Fill in what the index has; return the entries of which only the store knows the time."""
        if self.keeps and files:
            self._take(files, self._index().set_times(folder, files[0].name if len(files) == 1 else None))
        missing = [entry for entry in files if entry.mtime is None] if self.asks else []
        if missing:
            self._take(missing, self._index().mtimes(folder))
            missing = [entry for entry in missing if entry.mtime is None]
        return missing

    def _take(self, files: Iterable[Entry], known: dict[str, tuple[str | None, float]]) -> None:
        for entry in files:
            version, mtime = known.get(entry.name, (None, 0.0))
            if version is not None and version == entry.version:
                entry.mtime = mtime

    def set(self, path: str, entry: Entry, mtime: float) -> Entry:
        """Give a file a modification time, at the store or else in the index; return it as it is then."""
        if self._backend.capability.sets_mtime:
            return self._backend.set_mtime(path, mtime)
        self._index().add_set_times(paths.split(path)[0], {entry.name: (entry.version, mtime)})
        return replace(entry, mtime=mtime)

    def removed(self, path: str) -> None:
        """Forget what was set for a file."""
        if self.keeps:
            self._index().drop_set_time(path)

    def moved(self, moves: Iterable[Move]) -> None:
        """Take the times of copied objects along; on S3 they are known from copying and need not be asked for again."""
        if not (self.keeps or self.asks):
            return
        folders: dict[str, list[Move]] = defaultdict(list)
        for move in moves:
            folders[paths.split(move.target)[0]].append(move)
        for folder, moved in folders.items():
            if self.keeps:
                self._fill(paths.split(moved[0].source)[0], [move.old for move in moved])
                times = {m.new.name: (m.new.version, m.old.mtime) for m in moved if m.old.mtime is not None}
                self._index().add_set_times(folder, times)
            else:
                times = {m.new.name: (m.new.version, m.new.mtime) for m in moved if m.new.mtime is not None}
                self._index().remember_mtimes(folder, {**self._index().mtimes(folder), **times})

    def folder_renamed(self, source: str, target: str) -> None:
        """Take along what was set for files below a folder that the store renamed itself."""
        if self.keeps:
            self._index().move_set_times(source, target)
