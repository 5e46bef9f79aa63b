"""What is in a cache folder, for those who only look: nothing is recovered, moved or removed."""

from __future__ import annotations

from pathlib import Path

from ftpvfs.cache.beside import peek
from ftpvfs.cache.database import DATABASE
from ftpvfs.cache.files import Files
from ftpvfs.cache.index import Index
from ftpvfs.cache.items import Items
from ftpvfs.cache.journal import Journal
from ftpvfs.cache.records import DirtyRecord, ItemRecord, PartialRecord


class View:
    """The records of a cache folder as they stand there; others may be at work in it. One thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = Index(folder)
        self._journal = Journal(self._index, Files(folder), lambda paths: None, lambda path: None)
        items = folder / "items"
        self._items = Items(items, durable=False) if (items / DATABASE).exists() else None

    def all_dirty(self) -> list[DirtyRecord]:
        """Return all dirty records; those beside their data where the index is damaged."""
        return self._journal.all_dirty() if self._journal.damage() is None else peek(self._folder)

    def all_records(self) -> list[ItemRecord]:
        """Return what is cached of all objects."""
        return [] if self._items is None else list(self._items.all())

    def all_partials(self) -> list[PartialRecord]:
        """Return what came of all interrupted uploads."""
        return self._journal.all_partials()

    def close(self) -> None:
        """Release everything."""
        if self._items is not None:
            self._items.close()
        self._index.close()
