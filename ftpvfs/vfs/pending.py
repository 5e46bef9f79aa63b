"""What the store does not have yet, as the VFS shows and changes it: local files, deletions and renames on their way.

The cache's dirty records say what the store is to have; here they are laid over its answers. Changes of what is dirty
are made in the records, durably, and write-back follows; nothing in here waits for the store.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Collection, Iterable, Iterator

from ftpvfs import paths
from ftpvfs.backend.backend import Entry
from ftpvfs.cache.cache import Cache
from ftpvfs.cache.records import DirtyRecord
from ftpvfs.cache.writeback import WriteBack
from ftpvfs.errors import failure

# How fingerprints begin that are no store's.
LOCAL = "cache-"

Changed = Callable[[str, Entry | None], None]


def local_entry(record: DirtyRecord) -> Entry:
    """Return a dirty file as a folder's entry; its fingerprint is no store's."""
    name = paths.split(record.path)[1]
    return Entry(name, False, record.size, record.mtime, f"{LOCAL}{record.id}-{record.generation}")


def is_local(entry: Entry | None) -> bool:
    """Tell whether an entry is a dirty file's, and its fingerprint not the store's."""
    return entry is not None and entry.fingerprint is not None and entry.fingerprint.startswith(LOCAL)


def base_of(there: Entry | None, *, is_known: bool) -> tuple[str | None, bool]:
    """Return which version of the store's a new file replaces, None: none, and whether that is known at all.

    Of a file that was on its way when it was looked at nobody knows which version the store has by now.
    """
    if there is None:
        return None, is_known
    if not is_known or is_local(there) or there.fingerprint is None:
        return None, False
    return there.fingerprint, True


class Pending:
    """The dirty paths of one store. Any thread; `changed(path, entry)` tells the directory cache."""

    def __init__(self, cache: Cache, writeback: WriteBack, changed: Changed) -> None:
        self._cache = cache
        self._writeback = writeback
        self._changed = changed

    # --- laid over the store's answers

    def find(self, path: str) -> Entry | None:
        """Return the dirty file at the path, None where the store is to be asked; ENOENT for one that was deleted."""
        record = self._cache.dirty(path)
        if record is None:
            return None
        if record.is_tombstone:
            raise failure(errno.ENOENT, path)
        return local_entry(record)

    def overlay(self, folder: str, entries: Iterable[Entry]) -> list[Entry]:
        """Return the folder's entries as they will be: with local files and their folders, without what is deleted."""
        dirty = self._cache.dirty_in(folder)
        names = {paths.split(record.path)[1] for record in dirty}
        found = [entry for entry in entries if entry.is_dir or entry.name not in names]
        found += [local_entry(record) for record in dirty if not record.is_tombstone]
        names = {entry.name for entry in found}
        return found + [Entry(name, True) for name in self._cache.dirty_folders_in(folder) if name not in names]

    def is_any_below(self, folder: str) -> bool:
        """Tell whether local files lie in the folder, so that it exists whatever the store says."""
        return self._cache.is_dirty_below(folder)

    def is_file(self, path: str) -> bool:
        """Tell whether a file waits at the path."""
        return self._file(path) is not None

    # --- changes

    def delete(self, path: str) -> bool:
        """Delete a dirty file; return False where the path is not dirty (any more)."""
        if self._file(path) is None or not self._cache.delete(path, at_store=False):
            return False
        self._changed(path, None)
        self._writeback.notify()
        return True

    def touch(self, path: str, mtime: float) -> bool:
        """Give a dirty file another modification time; return False where the path is not dirty (any more)."""
        if self._file(path) is None:
            return False
        try:
            record = self._cache.touch(path, mtime)
        except FileNotFoundError:
            return False
        self._changed(path, local_entry(record))
        return True

    def rename(self, source: str, target: str, there: Entry | None, *, is_known: bool) -> bool:
        """Rename a dirty file over what is at `target`; return False where `source` is not dirty (any more).

        `is_known` False: the store could not be asked for what it has there.
        """
        if self._file(source) is None:
            return False
        base, is_known = base_of(there, is_known=is_known)  # of a dirty one the cache knows that
        try:
            record = self._cache.rename(
                source, target, source_at_store=False, target_base=base, base_known=is_known
            )
        except FileNotFoundError:
            return False
        self._changed(source, None)
        self._changed(target, local_entry(record))
        self._writeback.notify()
        return True

    @contextlib.contextmanager
    def renaming_below(self, source: str, target: str) -> Iterator[Collection[str]]:
        """Rename all dirty files below a folder, before the store renames it; back where that raises.

        Yields their new paths. The caller holds both folders (`PathLocks.hold_folders`): what write-back sent under
        either name could be overtaken by the store's own rename. What is published meanwhile follows at the end.
        """
        moved = self._cache.rename_below(source, target)
        try:
            yield moved
        except OSError:
            self._cache.rename_back(source, target, moved)
            raise
        self._cache.rename_rest_below(source, target, moved)
        self._writeback.notify()

    def replaced(self, path: str) -> None:
        """The store has something at the path that is newer than what was on its way there."""
        self._cache.supersede(path)
        self._cache.forget_item(path)

    def store(self, path: str) -> None:
        """Have what waits at a path done at the store."""
        if self._cache.dirty(path) is not None:
            self._writeback.upload_now(path)

    def settle(self, path: str, *, below: bool = True) -> None:
        """Have the deletion at a path done at the store, and those directly below it."""
        for record in [self._cache.dirty(path), *(self._cache.dirty_in(path) if below else ())]:
            if record is not None and record.is_tombstone:
                self._writeback.upload_now(record.path)

    def _file(self, path: str) -> DirtyRecord | None:
        record = self._cache.dirty(path)
        return None if record is None or record.is_tombstone else record
