"""Clean items: open versions of files that the store has, too, and their records."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from ftpvfs.backend.backend import Entry
from ftpvfs.cache.eviction import Kind
from ftpvfs.cache.files import DataFile, Files, Place
from ftpvfs.cache.item import Draft, Item, new_suffix
from ftpvfs.cache.items import Items
from ftpvfs.cache.ranges import Range, RangeSet
from ftpvfs.cache.records import DirtyRecord, ItemRecord, id_prefix, is_id, version_of
from ftpvfs.cache.space import BATCH, GRACE, Space
from ftpvfs.clock import Clock
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)


class OpenItems:
    """The items that are open in this process, one for each data file. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Protected by _lock.
        self._items: dict[str, Item] = {}

    def acquire(self, id: str) -> Item | None:  # noqa: A002 - what it is
        """Return the item of a data file, with one user more; None where it is not open."""
        with self._lock:
            item = self._items.get(id)
        return item if item is not None and item.acquire() else None

    def add(self, item: Item) -> Item:
        """Let others find the item; return the one that they find: another thread may have been quicker."""
        with self._lock:
            known = self._items.get(item.id)
            if known is None or not known.acquire():
                self._items[item.id] = item
                return item
        item.discard()
        return known

    def remove(self, item: Item) -> None:
        """Let nobody find the item any more."""
        with self._lock:
            if self._items.get(item.id) is item:
                del self._items[item.id]

    def moved(self, id: str, path: str, new: str, entry: Entry | None = None) -> None:  # noqa: A002
        """A data file has another name now; the store has it as `entry`, unless that is None."""
        with self._lock:
            item = self._items.pop(id, None)
            if item is None:
                return
            item.moved(path, new)
            if entry is not None:
                item.is_now(entry)
            self._items[new] = item

    def all(self) -> list[Item]:
        """Return all that are open."""
        with self._lock:
            return list(self._items.values())


class CleanItems:
    """The clean items of a store. Any thread, any process; made after a fork."""

    def __init__(self, files: Files, items: Items, open_items: OpenItems, clock: Clock) -> None:
        self._files = files
        self._items = items
        self._open = open_items
        self._clock = clock
        self.space: Space  # set by the cache: space asks for records, and items ask for space
        self._lock = threading.Lock()
        # Protected by _lock. Saves what was read while nobody waits for it.
        self._saver: ThreadPoolExecutor | None = None
        self._is_closed = False

    def record(self, path: str) -> ItemRecord | None:
        """Return what is cached of a path."""
        return self._items.get(path)

    def find(self, path: str, entry: Entry) -> tuple[ItemRecord, DataFile | Item]:
        """Return the record of that version, and its open item or else its file; empty where there was none."""
        record = self._items.get(path)
        if record is not None and record.is_of(entry):
            opened = self._open_file(record)
            if opened is not None:
                return record, opened
        return self._new_version(path, entry)

    def _open_file(self, record: ItemRecord) -> DataFile | Item | None:
        item = self._open.acquire(record.id)
        if item is not None:
            return item
        try:
            file = self._files.open(Place.CLEAN, record.id, writable=True)
        except FileNotFoundError:
            return None
        if self._files.size(file.descriptor) != record.size:
            file.close()
            return None
        self._files.use(file.descriptor, self._clock.time())
        return file

    def _new_version(self, path: str, entry: Entry) -> tuple[ItemRecord, DataFile | Item]:
        about_to_wait(Wait.DISK)
        made = _record(path, id_prefix(path) + new_suffix(), entry, self._clock.time())
        file = self._files.create(Place.CLEAN, made.id)
        try:
            self._files.truncate(file.descriptor, entry.size)
            self._files.use(file.descriptor, self._clock.time())
            other: list[ItemRecord] = []  # made by somebody else just now

            def decide(old: ItemRecord | None) -> ItemRecord:
                other.clear()
                if old is not None and old.is_of(entry) and self._files.has(Place.CLEAN, old.id):
                    other.append(old)
                    return old
                return made

            replaced = self._items.change(path, decide)
        except BaseException:
            file.close()
            self._files.unlink(Place.CLEAN, made.id)
            raise
        if other:
            opened = self._open_file(other[0])
            if opened is not None:
                file.close()
                self._files.unlink(Place.CLEAN, made.id)
                return other[0], opened
            replaced = self._items.change(path, lambda old: made)
        self.space.made(Kind.CLEAN, made.id)
        if replaced is not None and replaced.id != made.id:
            self._remove_file(replaced)
        return made, file

    def _remove_file(self, record: ItemRecord) -> None:
        """Remove a data file whose record is gone; its readers finish on their inode."""
        self.space.freed(self._files.unlink(Place.CLEAN, record.id))

    # --- saving

    def let_go(self, item: Item) -> None:
        """Close an item whose last user has left, and all of which is saved."""
        if not item.is_dirty:
            with contextlib.suppress(OSError):  # somebody else has used it, too, and closed it
                self._files.use(item.descriptor, self._clock.time())
        if item.close():
            self._open.remove(item)

    def save_later(self, item: Item) -> None:
        """Save an item in another thread, and release it then."""
        with self._lock:
            if not self._is_closed:
                if self._saver is None:
                    self._saver = ThreadPoolExecutor(1, thread_name_prefix="ftpvfs-save")
                self._saver.submit(self._save_and_release, item)
                return
        self._save_and_release(item)

    def _save_and_release(self, item: Item) -> None:
        try:
            item.save()
        except OSError as error:
            item.give_up_saving()
            logger.warning("What was fetched of %r will be fetched again: %s", item.path, error)
        finally:
            item.release()

    def save_present(self, item: Item, present: tuple[Range, ...], *, verified: bool) -> None:
        """Record what is present, beside what other processes have fetched."""
        self._files.sync(item.descriptor)

        def merge(old: ItemRecord | None) -> ItemRecord | None:
            if old is None or old.id != item.id:
                return old  # another version has taken its place
            merged = RangeSet((*old.present, *present))
            now = self._clock.time()
            return dataclasses.replace(old, present=tuple(merged), used=now, verified=old.verified or verified)

        self._items.change(item.path, merge)

    def drop_present(self, item: Item, start: int, stop: int) -> None:
        """Record that bytes are missing again."""

        def drop(old: ItemRecord | None) -> ItemRecord | None:
            if old is None or old.id != item.id:
                return old
            left = RangeSet(old.present)
            left.remove(start, stop)
            return dataclasses.replace(old, present=tuple(left), verified=False)

        self._items.change(item.path, drop)

    def save_all(self) -> None:
        """Save all open items."""
        for item in self._open.all():
            if item.acquire():  # it must not be closed meanwhile
                try:
                    item.save()
                except OSError as error:
                    logger.warning("What was fetched of %r may be fetched again: %s", item.path, error)
                finally:
                    item.release()

    # --- what was written

    def keep(self, draft: Draft, entry: Entry) -> None:
        """Make an item of a file whose bytes are in the store as `entry`."""
        draft.sync()  # before a record says that they are here
        self._files.use(draft.descriptor, self._clock.time())
        self._files.move(draft.id, Place.INCOMING, Place.CLEAN)
        self._put_whole(draft.path, draft.id, entry)

    def keep_uploaded(self, record: DirtyRecord, entry: Entry) -> None:
        """Make an item of a dirty file that was uploaded as `entry`."""
        if record.id is None or record.size != entry.size:
            return
        with contextlib.suppress(FileNotFoundError):
            self._files.move(record.id, Place.DATA, Place.CLEAN)
            self._put_whole(record.path, record.id, entry)

    def _put_whole(self, path: str, id: str, entry: Entry) -> None:  # noqa: A002
        now = self._clock.time()
        present = ((0, entry.size),) if entry.size else ()
        record = dataclasses.replace(_record(path, id, entry, now), present=present, verified=True)
        replaced = self._items.change(path, lambda old: record)
        self.space.made(Kind.CLEAN, id)
        if replaced is not None and replaced.id != id:
            self._remove_file(replaced)

    # --- what goes

    def sweep(self) -> int:
        """Remove records without a file, and files without a record, which a crash has left; return the bytes freed."""
        gone = [record.id for record in self._items.all() if not self._files.has(Place.CLEAN, record.id)]
        for first in range(0, len(gone), BATCH):
            self._items.remove_ids(gone[first : first + BATCH])
        return sum(self._remove_orphan(entry) for entry in self._files.names(Place.CLEAN))

    def _remove_orphan(self, entry: os.DirEntry[str]) -> int:
        if is_id(entry.name) and self._items.get_by_id(entry.name) is not None:
            return 0
        with contextlib.suppress(FileNotFoundError):
            if not is_id(entry.name):
                self._files.put_in_quarantine(Place.CLEAN, entry.name, "it is none of ours")
            elif self._clock.time() - entry.stat().st_mtime > GRACE:
                file = self._files.claim(Place.CLEAN, entry.name)
                if file is not None:
                    with contextlib.closing(file):
                        return self._files.unlink(Place.CLEAN, entry.name)
        return 0

    def forget(self, path: str) -> None:
        """Drop what is cached of a path."""
        if self._items.get(path) is None:
            return
        dropped = self._items.change(path, lambda old: None)
        if dropped is not None:
            self._remove_file(dropped)

    def rename(self, source: str, target: str, entry: Entry) -> None:
        """Let what is cached of one path be that of another, to which the store has renamed the object."""
        self._save_open(source)
        moved = self._items.change(source, lambda old: None)
        if moved is None or moved.path != source:
            self.forget(target)
            return
        record = dataclasses.replace(_record(target, id_prefix(target) + new_suffix(), entry, moved.used),
                                     present=moved.present, verified=moved.verified)  # fmt: skip
        if moved.size != entry.size or not self._moved(moved.id, record.id):
            self._remove_file(moved)
            self.forget(target)
            return
        self._open.moved(moved.id, target, record.id, entry)
        replaced = self._items.change(target, lambda old: record)
        self.space.made(Kind.CLEAN, record.id)
        if replaced is not None:
            self._remove_file(replaced)

    def _save_open(self, path: str) -> None:
        """Save what is open here of a path, so that its record tells all."""
        record = self._items.get(path)
        item = self._open.acquire(record.id) if record is not None else None
        if item is not None:
            try:
                item.save()
            finally:
                item.release()

    def _moved(self, id: str, new: str) -> bool:  # noqa: A002
        try:
            self._files.move(id, Place.CLEAN, Place.CLEAN, new)
        except FileNotFoundError:
            return False
        return True

    def close(self) -> None:
        """Save what is open, and wait until it is."""
        self.save_all()
        with self._lock:
            saver, self._saver, self._is_closed = self._saver, None, True
        if saver is not None:
            saver.shutdown(wait=True)


def _record(path: str, id: str, entry: Entry, now: float) -> ItemRecord:  # noqa: A002
    return ItemRecord(path, id, entry.size, entry.mtime, version_of(entry), entry.fingerprint, used=now)
