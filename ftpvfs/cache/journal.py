"""The journal: the dirty and partial records in the index, and how they are changed, many at once.

A change is durable when `change` returns. What that costs, a sync of folders and one of the index, is shared by all who
wait at the time: the first becomes the leader and does it for those that have come meanwhile.

Beside the records stands a summary of them, from which is seen that one has silently got lost.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from ftpvfs.cache.files import Files, Place
from ftpvfs.cache.index import Index
from ftpvfs.cache.records import DirtyRecord, PartialRecord, Record
from ftpvfs.cache.summary import DIRTY, PARTIAL, SUMMARY, Summary, refill
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R", bound=Record)

class Changes:
    """What one change sees and does, inside a transaction. It is written when the change has returned, not before."""

    def __init__(self, index: Index, lost: Callable[[str], DirtyRecord | None]) -> None:
        self._index = index
        self._lost = lost
        self._old: dict[str, bytes | None] = {}
        self._new: dict[str, bytes | None] = {}
        self._generation = 0

    @property
    def paths(self) -> list[str]:
        """The paths whose dirty records change."""
        return [key[len(DIRTY) :] for key in self._new if key.startswith(DIRTY)]

    def dirty(self, path: str) -> DirtyRecord | None:
        """Return the path's record as it is now, in all processes."""
        data = self._read(DIRTY + path)
        try:
            return None if data is None else _checked(DirtyRecord, data, path)
        except ValueError as error:
            logger.error("The dirty record of %r is damaged: %s", path, error)  # noqa: TRY400
            return self._lost(path)

    def partial(self, path: str) -> PartialRecord | None:
        """Return the path's partial as it is now."""
        data = self._read(PARTIAL + path)
        try:
            return None if data is None else _checked(PartialRecord, data, path)
        except ValueError as error:
            logger.error("The record of the partial of %r is damaged: %s", path, error)  # noqa: TRY400
            return None

    def put(self, record: DirtyRecord | PartialRecord) -> None:
        """Write a record in place of the path's old one."""
        if isinstance(record, DirtyRecord):
            self._generation = max(self._generation, record.generation)
            self._write(DIRTY + record.path, record.to_json())
        else:
            self._write(PARTIAL + record.path, record.to_json())

    def drop(self, path: str) -> None:
        """Remove the path's dirty record, if there is one."""
        self._write(DIRTY + path, None)

    def drop_partial(self, path: str) -> None:
        """Remove the record of the path's partial, if there is one."""
        if self._read(PARTIAL + path) is not None:
            self._write(PARTIAL + path, None)

    def _read(self, key: str) -> bytes | None:
        if key in self._new:
            return self._new[key]
        if key not in self._old:
            try:
                self._old[key] = self._index.get(key)
            except ValueError:
                self._old[key] = b""  # not ours; what counts is that it will be damaged
        return self._old[key]

    def _write(self, key: str, data: bytes | None) -> None:
        self._read(key)
        self._new[key] = data

    def flush(self, summary: Summary) -> None:
        """Write what the change has left, and count it."""
        for key, data in self._new.items():
            old = self._old[key]
            if data is not None:
                self._index.put(key, data)
            elif old is not None:
                self._index.delete(key)
            if key.startswith(DIRTY):
                summary.change(old, data)
        summary.generation = max(summary.generation, self._generation)


class _Waiting(Generic[T]):
    """One change and what became of it."""

    def __init__(self, decide: Callable[[Changes], T], places: Iterable[Place]) -> None:
        self.decide = decide
        self.places = places
        self.is_done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def decided(self, changes: Changes, summary: Summary) -> None:
        """Run the change; where it refuses, nothing of it is written."""
        try:
            self.result = self.decide(changes)
        except Exception as error:  # noqa: BLE001 - raised by whoever asked for the change
            self.error = error
        else:
            changes.flush(summary)

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.is_done = True


class Journal:
    """The dirty and partial records of one store. Any thread, any process.

    `changed` hears, with no lock held but the turn of changes, which paths' dirty records were changed here; `lost`
    returns a record from beside its data where that in the index cannot be read.
    """

    def __init__(
        self,
        index: Index,
        files: Files,
        changed: Callable[[list[str]], None],
        lost: Callable[[str], DirtyRecord | None],
    ) -> None:
        self._index = index
        self._files = files
        self._changed = changed
        self._lost = lost
        # Held by the one who commits.
        self._leading = threading.Lock()
        self._lock = threading.Lock()
        # Protected by _lock.
        self._waiting: list[_Waiting[Any]] = []

    def change(self, decide: Callable[[Changes], T], *places: Place) -> T:
        """Let `decide` change records, after the names in `places` are on the disk; durable on return.

        `decide` is short and asks nobody else. What it raises is raised here, with nothing changed.
        """
        about_to_wait(Wait.DISK)
        mine: _Waiting[T] = _Waiting(decide, places)
        with self._lock:
            self._waiting.append(mine)
        with self._leading:
            if not mine.is_done:
                self._commit_waiting()
        if mine.error is not None:
            raise mine.error
        result: T = mine.result
        return result

    def _commit_waiting(self) -> None:
        with self._lock:
            batch, self._waiting = self._waiting, []
        try:
            for place in {place for each in batch for place in each.places}:
                self._files.sync_folder(place)
            paths = self._index.atomically(lambda: self._decide_all(batch))
        except BaseException as error:
            reason = error if isinstance(error, Exception) else OSError(errno.EIO, "The change was given up")
            for each in batch:
                each.fail(reason)
            if not isinstance(error, Exception):
                raise
            return
        for each in batch:
            each.is_done = True
        self._tell(paths)

    def _tell(self, paths: list[str]) -> None:
        """Say what has changed. It is done and durable: that nobody hears of it makes nobody's change fail."""
        try:
            self._changed(paths)
        except OSError as error:
            logger.error("Changes were made and are seen late: %s", error)  # noqa: TRY400

    def _decide_all(self, batch: list[_Waiting[Any]]) -> list[str]:
        """Run all changes of a batch in one transaction; return which paths they changed."""
        summary = self._summary()
        before = summary.to_json()
        paths: list[str] = []
        for each in batch:
            each.error = None
            changes = Changes(self._index, self._lost)
            each.decided(changes, summary)
            if each.error is None:
                paths += changes.paths
        if summary.to_json() != before:
            self._index.put(SUMMARY, summary.to_json())
        return list(dict.fromkeys(paths))

    def _summary(self) -> Summary:
        try:
            return Summary.from_json(self._index.get(SUMMARY))
        except ValueError:
            return Summary()  # does not fit from now on; `all_dirty` finds out

    # --- reading

    def dirty(self, path: str) -> DirtyRecord | None:
        """Return the path's record as it is now."""
        return Changes(self._index, self._lost).dirty(path)

    def partial(self, path: str) -> PartialRecord | None:
        """Return the path's partial as it is now."""
        return Changes(self._index, self._lost).partial(path)

    def all_partials(self) -> list[PartialRecord]:
        """Return all partials."""
        paths = [key[len(PARTIAL) :] for key in self._index.keys(PARTIAL)]
        return [record for record in map(self.partial, paths) if record is not None]

    def all_dirty(self) -> list[DirtyRecord]:
        """Return all dirty records."""
        paths = [key[len(DIRTY) :] for key in self._index.keys(DIRTY)]
        return [record for record in map(self.dirty, paths) if record is not None]

    @property
    def generation(self) -> int:
        """The highest generation that any record had."""
        return self._summary().generation

    def damage(self) -> str | None:
        """Return why the dirty records cannot all be trusted; None where they can."""

        def look() -> str | None:
            found = Summary()
            for key in self._index.keys(DIRTY):
                data = self._index.get(key)
                if data is not None:
                    _checked(DirtyRecord, data, key[len(DIRTY) :])
                    found.change(None, data)
            known = Summary.from_json(self._index.get(SUMMARY))
            return None if known == found else f"{known.count} dirty records were written, {found.count} are there"

        try:
            return self._index.atomically(look)
        except ValueError as error:
            return str(error)
        except OSError as error:
            if error.errno != errno.EIO:  # not damage, but a disk that is full or a process that holds it
                raise
            return str(error)

    def replace_all(self, records: Iterable[DirtyRecord]) -> None:
        """Put what was found beside the data in the place of all dirty records."""
        contents = refill(records)

        def replace() -> list[str]:
            old = [key for key in self._index.keys(DIRTY) if key not in contents]
            for key in old:
                self._index.delete(key)
            for key, data in contents.items():
                self._index.put(key, data)
            return [key[len(DIRTY) :] for key in (*old, *contents) if key.startswith(DIRTY)]

        with self._leading:
            self._tell(self._index.atomically(replace))

    def begin_anew(self, damage: str) -> None:
        """Set the whole index aside; the new one begins with what was found beside the data."""
        self._index.begin_anew(damage)


def _checked(kind: type[R], data: bytes, path: str) -> R:
    """Return the record; ValueError where it is damaged, or stands under another path's key."""
    record = kind.from_json(data)
    if getattr(record, "path", path) != path:
        raise ValueError("it is another path's")
    return record
