"""What must be true of a cache folder whenever nobody is at work in it. Tests ask after each of their stories."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from ftpvfs.backend.backend import Entry
from ftpvfs.cache.files import BESIDE, Files, Place
from ftpvfs.cache.items import Items
from ftpvfs.cache.journal import Journal
from ftpvfs.cache.records import DirtyRecord, ItemRecord, PartialRecord, id_prefix


class Check:
    """Compares journal, item records and files; `store` asks the store for the entry of a path."""

    def __init__(
        self, files: Files, journal: Journal, items: Items, store: Callable[[str], Entry | None] | None = None
    ) -> None:
        self._files = files
        self._journal = journal
        self._items = items
        self._store = store

    def run(self) -> list[str]:
        """Return every invariant that does not hold, in words."""
        return [*self._of_journal(), *self._of_data(), *self._of_partials(), *self._of_items()]

    def _of_journal(self) -> Iterator[str]:
        damage = self._journal.damage()
        if damage is not None:
            yield f"the journal is damaged: {damage}"
        for record in self._journal.all_dirty():
            yield from self._of_dirty(record)

    def _of_dirty(self, record: DirtyRecord) -> Iterator[str]:
        if record.id is not None and self._size(Place.DATA, record.id) != record.size:
            yield f"dirty {record.path!r} has {self._size(Place.DATA, record.id)} bytes instead of {record.size}"
        data = self._files.read_beside(Place.DATA, record.beside)
        try:
            beside = None if data is None else DirtyRecord.from_json(data)
        except ValueError as error:
            yield f"the record beside dirty {record.path!r} cannot be read: {error}"
            return
        if beside is None or (beside.path, beside.generation) != (record.path, record.generation):
            yield f"beside dirty {record.path!r} stands {beside}"
        if record.generation > self._journal.generation:
            yield f"dirty {record.path!r} is newer than the journal: {record.generation}"

    def _of_data(self) -> Iterator[str]:
        known = {record.beside: record for record in self._journal.all_dirty()}
        for entry in self._files.names(Place.DATA):
            record = known.get(entry.name.removesuffix(BESIDE))
            if record is None or (record.is_tombstone and not entry.name.endswith(BESIDE)):
                yield f"data/{entry.name} belongs to nothing dirty"

    def _of_partials(self) -> Iterator[str]:
        known = {record.id: record for record in self._journal.all_partials()}
        for record in known.values():
            size = self._size(Place.INCOMING, record.id)
            if size is None or size < record.size:
                yield f"the partial of {record.path!r} has {size} bytes instead of {record.size}"
        for entry in self._files.names(Place.INCOMING):
            name = entry.name.removesuffix(BESIDE)
            if name in known:
                yield from self._beside_partial(known[name])
                continue
            file = self._files.claim(Place.INCOMING, name)
            if file is not None:  # else somebody is writing it
                file.close()
                yield f"incoming/{entry.name} belongs to nobody"

    def _beside_partial(self, record: PartialRecord) -> Iterator[str]:
        data = self._files.read_beside(Place.INCOMING, record.id)
        try:
            if data is None or PartialRecord.from_json(data).path != record.path:
                yield f"beside the partial of {record.path!r} stands {data!r}"
        except ValueError as error:
            yield f"the record beside the partial of {record.path!r} cannot be read: {error}"

    def _of_items(self) -> Iterator[str]:
        for record in self._items.all():
            size = self._size(Place.CLEAN, record.id)
            if size is None:
                continue  # removed by hand, or records that a power cut has brought back: it is fetched again
            if size != record.size:
                yield f"the item {record.path!r} has {size} bytes instead of {record.size}"
            if id_prefix(record.path) != record.id[:16]:
                yield f"the item {record.path!r} is called {record.id}, by which its record is not found"
            yield from self._compared_with_store(record)

    def _compared_with_store(self, record: ItemRecord) -> Iterator[str]:
        entry = self._store(record.path) if self._store is not None else None
        if entry is not None and entry.fingerprint == record.fingerprint and entry.size != record.size:
            yield f"the item {record.path!r} has {record.size} bytes and the store {entry.size} of the same version"

    def _size(self, place: Place, name: str) -> int | None:
        try:
            return os.stat(self._files.path(place, name)).st_size
        except FileNotFoundError:
            return None
