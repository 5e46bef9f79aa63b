"""The records of clean data. They may be lost, for the store has the data; so they are not synced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache

from ftpvfs.cache.database import Database, ForeignRecord
from ftpvfs.cache.records import ItemRecord, id_prefix

logger = logging.getLogger(__name__)

ITEM = "item:"


@lru_cache(maxsize=4096)
def _parsed(data: bytes) -> ItemRecord:
    """Return a record; taking it apart and checking it costs more than finding it (measured: 35 and 20 us)."""
    return ItemRecord.from_json(data)


class Items(Database):
    """The item record of each path. Any thread, any process; made after a fork.

    Keys are made of the path's digest, which is the first half of a data file's name, too.
    """

    what = "index of clean files"
    loss = "what the store has, too, is fetched again"

    def get(self, path: str) -> ItemRecord | None:
        """Return the record of a path."""
        record = self._record(ITEM + id_prefix(path))
        return record if record is not None and record.path == path else None

    def get_by_id(self, id: str) -> ItemRecord | None:  # noqa: A002 - what it is
        """Return the record to which a data file belongs."""
        record = self._record(ITEM + id[:16])
        return record if record is not None and record.id == id else None

    def change(self, path: str, decide: Callable[[ItemRecord | None], ItemRecord | None]) -> ItemRecord | None:
        """Put what `decide` returns in the place of the record that it gets; return the old one. Atomic."""
        key = ITEM + id_prefix(path)

        def change() -> ItemRecord | None:
            old = self._record(key)
            new = decide(old if old is not None and old.path == path else None)
            if new is None and old is not None:
                self._delete(key)
            elif new is not None and new != old:
                self._put(key, new.to_json())
            return old

        return self._atomically(change)

    def remove_ids(self, ids: list[str]) -> None:
        """Remove the records that belong to these data files, in one short transaction."""

        def remove() -> None:
            for each in ids:
                if self.get_by_id(each) is not None:
                    self._delete(ITEM + each[:16])

        self._atomically(remove)

    def all(self) -> Iterator[ItemRecord]:
        """Yield all records; those that are changed meanwhile may be missed."""
        for key in self._keys(ITEM):
            record = self._record(key)
            if record is not None:
                yield record

    def _record(self, key: str) -> ItemRecord | None:
        try:
            data = self._get(key)
            return None if data is None else _parsed(data)
        except (ForeignRecord, ValueError) as error:
            logger.warning("A record of clean data in %s is dropped: %s", self._folder, error)
            self._delete(key)
            return None
