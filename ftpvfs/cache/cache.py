"""The disk cache of one store: what is dirty, what is clean, what is being written, and the space for it all.

A path has at most one dirty record, which says what the store is to have and does not have yet, and at most one item
record, which says what is here of an object that the store has. A data file, once published, never changes its bytes:
missing ranges are filled, that is all. So a reader sees one version, and a crash leaves old or new.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ftpvfs import paths
from ftpvfs.backend.backend import Entry
from ftpvfs.cache.beside import records_beside
from ftpvfs.cache.census import Usage
from ftpvfs.cache.check import Check
from ftpvfs.cache.clean import CleanItems, OpenItems
from ftpvfs.cache.dirty import DirtyFiles, MayReplace
from ftpvfs.cache.eviction import Kind, Limits
from ftpvfs.cache.files import BESIDE, DataFile, Files, Number, Place
from ftpvfs.cache.index import Index
from ftpvfs.cache.item import Draft, Item, new_suffix
from ftpvfs.cache.items import Items
from ftpvfs.cache.journal import Changes, Journal
from ftpvfs.cache.mirror import Mirror
from ftpvfs.cache.ranges import Range
from ftpvfs.cache.records import DirtyRecord, ItemRecord, PartialRecord, id_prefix
from ftpvfs.cache.recovery import Recovered, Recovery
from ftpvfs.cache.space import Evicted, Space
from ftpvfs.clock import SYSTEM_CLOCK, Clock
from ftpvfs.config import VFSOptions
from ftpvfs.coordination.feed import ChangeFeed
from ftpvfs.errors import failure
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)
T = TypeVar("T")

# How often a file is looked for again that another process has just uploaded, renamed or deleted.
MOST_LOOKS = 100
# What publishing a file takes on the disk beside its bytes, generously: a record and some pages of the index.
FOR_RECORDS = 2**20


class Cache:
    """The cache of one store in one process. Any thread; made after a fork, any number of processes at once.

    Made, it has recovered what a crash has left; `recovered` says what that was. `start` begins the polls.
    """

    def __init__(
        self,
        folder: Path,
        index: Index,
        options: VFSOptions,
        *,
        clock: Clock = SYSTEM_CLOCK,
        feed: ChangeFeed | None = None,
        files: Files | None = None,
    ) -> None:
        self.folder = folder
        self.files = files or Files(folder, syncs=options.cache_sync)
        self.count: Counter[str] = Counter()
        self._index = index
        self._options = options
        self._clock = clock
        self._keeps_clean = options.cache_mode == "full"
        self._keeps_partials = options.keep_partial == "cache"
        self._generations = Number(folder / "generation")
        self._closing = threading.Event()
        self._poller: threading.Thread | None = None
        self.files.prepare()
        self._journal = Journal(index, self.files, self._changed, self._lost)
        self._mirror: Mirror | None = None
        self.recovered = self.recover()
        self._mirror = Mirror(self._journal.dirty, self._journal.all_dirty, feed, lambda: index.replaced)
        self._items = Items(folder / "items", durable=False)
        if self.files.may_be_torn():
            self._items.begin_anew("the machine has stopped while nothing was synced")
        self._open = OpenItems()
        self._clean = CleanItems(self.files, self._items, self._open, clock)
        self.space = Space(
            self.files,
            Limits(options.cache_max_age, options.cache_max_size, options.cache_min_free_space),
            clock,
            dirty=lambda: self._dirty_mirror.size,
            forget=self._items.remove_ids,
            forget_partial=self._forget_partial,
        )
        self._clean.space = self.space
        self._dirty = DirtyFiles(self.files, self._journal, self._generations, clock, self.space.freed)
        self._tell_what_was_found()

    def start(self, hurry: Callable[[], object] = lambda: None) -> None:
        """Begin to save what is fetched and to evict, every poll interval.

        `hurry` is called when what waits for the store is to be stored at once (`wants_stored`).
        """
        self.space.hurry = hurry
        interval = self._options.cache_poll_interval
        if interval and self._poller is None:
            self._poller = threading.Thread(target=self._poll, args=(interval,), name="ftpvfs-cache", daemon=True)
            self._poller.start()

    def close(self) -> None:
        """Save what is fetched, and release everything. Open drafts are abandoned by their handles before."""
        self._closing.set()
        if self._poller is not None and self._poller is not threading.current_thread():
            self._poller.join(timeout=10)
        self.space.close()
        self._clean.close()
        self._items.close()

    def recover(self) -> Recovered:
        """Bring files and records together after a crash; the constructor does so. Other processes may be at work."""
        return Recovery(self.files, self._journal, self._generations, keeps_partials=self._keeps_partials).run()

    def _tell_what_was_found(self) -> None:
        found = self.recovered
        logger.debug("The cache is in %s", self.folder)
        if found.dirty:
            logger.info("%s: %d files are not in the store yet", self.folder, found.dirty)
        if found.adopted or found.partials or found.removed:
            logger.info(
                "%s: after a crash %d whole uploads were taken up, %d interrupted ones kept, %d others removed",
                self.folder, found.adopted, found.partials, found.removed,
            )  # fmt: skip
        if found.quarantined or found.lost:
            logger.error(
                "%s: %d files are in quarantine, %d dirty ones are lost", self.folder, found.quarantined, found.lost
            )

    def _poll(self, interval: float) -> None:
        self._in_peace(self.sweep)
        self._in_peace(self.evict)  # also to count what is there: the limits may be new
        while not self._clock.wait(self._closing, interval):
            self._in_peace(self._clean.save_all)
            self._in_peace(self.evict)
            self._in_peace(self._index.keep_ballast)

    def _in_peace(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:  # the next poll tries again
            logger.warning("The cache in %s: %s", self.folder, error)
        except Exception:  # a mistake of ours must not end eviction
            logger.exception("The cache in %s", self.folder)

    # --- looking

    @property
    def _dirty_mirror(self) -> Mirror:
        if self._mirror is None:
            raise RuntimeError("the cache has not recovered yet")
        return self._mirror

    def dirty(self, path: str) -> DirtyRecord | None:
        """Return what the store is to have at the path and does not have yet. From memory."""
        return self._dirty_mirror.get(path)

    def doubt(self, path: str) -> None:
        """Look at the path's record again: another process has changed it a moment ago."""
        self._dirty_mirror.doubt(path)

    def dirty_in(self, folder: str) -> list[DirtyRecord]:
        """Return the dirty records of all that lies directly in the folder. From memory."""
        return self._dirty_mirror.inside(folder)

    def dirty_folders_in(self, folder: str) -> list[str]:
        """Return the names of the folders directly in the folder that hold dirty files, however deep. From memory."""
        return self._dirty_mirror.folders_in(folder)

    def is_dirty_below(self, folder: str) -> bool:
        """Tell whether dirty files lie in the folder, however deep. From memory."""
        return self._dirty_mirror.has_file_below(folder)

    def dirty_below(self, path: str) -> list[DirtyRecord]:
        """Return the dirty records at the path and below it. From memory."""
        own = self._dirty_mirror.get(path) if path else None
        return ([own] if own else []) + self._dirty_mirror.below(path)

    def all_dirty(self) -> list[DirtyRecord]:
        """Return all dirty records. From memory."""
        return self._dirty_mirror.below("")

    @property
    def is_any_dirty(self) -> bool:
        """Whether there is any dirty record."""
        return not self._dirty_mirror.is_empty

    def dirty_changes(self) -> set[str] | None:
        """Return the paths whose dirty records may have changed since the last call; None: any of them.

        For the one who works on the queue; they are kept until `ignore_dirty_changes`.
        """
        return self._dirty_mirror.changes()

    def ignore_dirty_changes(self) -> None:
        """Keep no list of changes any more."""
        self._dirty_mirror.ignore_changes()

    def record(self, path: str) -> ItemRecord | None:
        """Return what is cached of the store's object. One look into the database, some 20 us."""
        return self._clean.record(path)

    def all_records(self) -> list[ItemRecord]:
        """Return what is cached of all objects. Reads every record."""
        return list(self._items.all())

    def all_partials(self) -> list[PartialRecord]:
        """Return what came of all interrupted uploads. Reads every record."""
        return self._journal.all_partials()

    def partial(self, path: str, user: str) -> PartialRecord | None:
        """Return what came of the user's interrupted upload to the path. One look into the database."""
        record = self._journal.partial(path)
        return record if record is not None and record.user == user else None

    # --- reading

    def open_item(self, path: str, entry: Entry) -> Item:
        """Open the path's dirty file, or else what is cached of the object `entry`: maybe nothing yet.

        ENOENT where the path is deleted and the store does not know yet. The caller releases the item.
        """
        for _ in range(MOST_LOOKS):
            record = self.dirty(path)
            if record is None:
                found, opened = self._clean.find(path, entry)
                return self._item(found, opened)
            if record.is_tombstone:
                raise failure(errno.ENOENT, path)
            with contextlib.suppress(FileNotFoundError):
                return self.open_dirty(record)
            self._dirty_mirror.doubt(path)
        raise failure(errno.EBUSY, path, "The file is changed by others all the time")

    def open_dirty(self, record: DirtyRecord) -> Item:
        """Open the file of a dirty record; ENOENT where it is not that path's dirty file any more."""
        if record.id is None:
            raise failure(errno.ENOENT, record.path)
        return self._item(record, self._open.acquire(record.id) or self.files.open(Place.DATA, record.id))

    def _item(self, record: ItemRecord | DirtyRecord, opened: DataFile | Item) -> Item:
        return opened if isinstance(opened, Item) else self._open.add(Item(self, record, opened))

    def let_go(self, item: Item) -> None:
        """Close an item that nobody uses any more; for `Item.release`."""
        self._clean.let_go(item)

    def save_later(self, item: Item) -> None:
        """Save an item that nobody uses any more, then let it go; for `Item.release`."""
        self._clean.save_later(item)

    def save_present(self, item: Item, present: tuple[Range, ...], *, verified: bool) -> None:
        """Record what was fetched; for `Item.save`."""
        self._clean.save_present(item, present, verified=verified)

    def drop_present(self, item: Item, start: int, stop: int) -> None:
        """Record that bytes are missing again; for `Item.drop`."""
        self._clean.drop_present(item, start, stop)

    def forget_item(self, path: str) -> None:
        """Drop what is cached of the path's object: it was deleted at the store."""
        self._clean.forget(path)

    def rename_item(self, source: str, target: str, entry: Entry) -> None:
        """Let what is cached of `source` be that of `target`, to which the store has renamed it, as `entry`."""
        self._clean.rename(source, target, entry)

    # --- writing

    def draft(self, path: str, *, user: str = "", base: Item | None = None) -> Draft:
        """Begin a file that may become the path's; `base`, which is complete, is its beginning."""
        if base is not None:
            about_to_wait(Wait.DISK)
        name = id_prefix(path) + new_suffix()
        file = self.files.create(Place.INCOMING, name)
        size = 0
        try:
            if base is not None:
                if not base.complete:
                    raise failure(errno.EINVAL, path, "The file to begin with is not here in full")
                size = base.size
                self.files.clone(base.descriptor, file.descriptor, size)
                self.space.grow(size)
        except BaseException:
            self.files.unlink(Place.INCOMING, name)
            file.close()
            raise
        return Draft(self, path, name, user, file, size=size, is_resumable=self._keeps_partials and base is None)

    def resume(self, partial: PartialRecord) -> Draft:
        """Go on with an interrupted upload; ENOENT where somebody else does so, or it is gone."""
        gone = failure(errno.ENOENT, partial.path, "There is no such interrupted upload any more")
        try:
            file = self.files.open(Place.INCOMING, partial.id, writable=True)
        except FileNotFoundError:
            raise gone from None

        def take(changes: Changes) -> None:
            if changes.partial(partial.path) != partial:
                raise gone
            changes.drop_partial(partial.path)

        try:
            self._journal.change(take)
            self.files.truncate(file.descriptor, partial.size)
        except BaseException:
            file.close()
            raise
        draft = Draft(self, partial.path, partial.id, partial.user, file, size=partial.size, is_resumable=True)
        draft.announce()
        return draft

    def publish(
        self,
        draft: Draft,
        *,
        mtime: float,
        base: str | None,
        base_known: bool = True,
        may_replace: MayReplace = lambda record: True,
    ) -> DirtyRecord:
        """Make the draft the path's dirty file. Durable on return, unless `--vfs-cache-sync off`.

        `base` is the fingerprint of the object that the store has, None where it has none; `base_known` False: nobody
        knows. Where the path is dirty already, what was known when it became so stays. `may_replace` is asked of the
        record that is replaced, and ECHANGED raised where it says no. After an error the draft is as before.
        """
        about_to_wait(Wait.DISK)
        draft.finish()
        replaced = self._with_room(
            lambda: self._dirty.publish(
                draft, mtime=mtime, base=base, base_known=base_known, may_replace=may_replace
            )
        )
        draft.close()
        self._outdate(draft.path)
        self.count["published"] += 1
        if replaced.record is None:
            raise RuntimeError("a published file has a record")
        return replaced.record

    def publish_clean(self, draft: Draft, entry: Entry) -> None:
        """The draft's bytes are in the store already, as `entry`: keep them as an item, in mode full."""
        about_to_wait(Wait.DISK)
        self._dirty.supersede(draft.path)  # first: what was on its way there must not come after it
        draft.finish()
        if self._keeps_clean and draft.size == entry.size:
            self._clean.keep(draft, entry)
        else:
            self.space.freed(self.files.unlink(Place.INCOMING, draft.id))
            self._clean.forget(draft.path)
        self.files.unlink(Place.INCOMING, draft.id + BESIDE)
        draft.close()

    def supersede(self, path: str) -> None:
        """End what is dirty at the path: the store has something newer, which did not come through the cache."""
        about_to_wait(Wait.DISK)
        self._dirty.supersede(path)

    def abandon(self, draft: Draft) -> None:
        """Give the draft up; where partials are kept its bytes become the path's partial. May be called again."""
        if draft.closed:
            return
        about_to_wait(Wait.DISK)
        try:
            if not draft.is_partial or not self._keep_partial(draft):
                self.space.freed(self.files.unlink(Place.INCOMING, draft.id))
                self.files.unlink(Place.INCOMING, draft.id + BESIDE)
        finally:
            draft.close()

    def _keep_partial(self, draft: Draft) -> bool:
        record = PartialRecord(
            draft.path, draft.id, draft.size, draft.user, since=self._clock.time(), boot=self.files.boot()
        )
        try:
            draft.finish()
            draft.sync()
            self.files.use(draft.descriptor, self._clock.time())
            self.files.write_beside(Place.INCOMING, draft.id, record.to_json(), syncs=False).close()

            def put(changes: Changes) -> PartialRecord | None:
                old = changes.partial(draft.path)
                changes.put(record)
                return old

            old = self._journal.change(put)
        except OSError as error:  # it would have been a courtesy
            logger.info("The interrupted upload of %r is not kept: %s", draft.path, error)
            return False
        self.space.made(Kind.PARTIAL, draft.id)
        if old is not None:
            self._remove_partial(old)
        return True

    def announce(self, draft: Draft, size: int) -> None:
        """Note whose upload this is, in case the process is killed; its first `size` bytes are on the disk."""
        record = PartialRecord(
            draft.path, draft.id, size, draft.user, since=self._clock.time(), boot=self.files.boot()
        )
        self.files.write_beside(Place.INCOMING, draft.id, record.to_json(), syncs=False).close()

    def withdraw(self, draft: Draft) -> None:
        """Nobody could go on with the draft any more."""
        self.files.unlink(Place.INCOMING, draft.id + BESIDE)

    def drop_partial(self, path: str) -> None:
        """Remove what came of an interrupted upload to the path, if there is something."""
        record = self._journal.partial(path)
        if record is not None and self._forget_partial_record(record):
            self._remove_partial(record)

    def drop_partials_below(self, folder: str) -> None:
        """Remove what came of interrupted uploads at and below a folder. Reads the records of all of them."""
        about_to_wait(Wait.DISK)
        for record in self._journal.all_partials():
            if paths.is_within(record.path, folder):
                self.drop_partial(record.path)

    def _forget_partial(self, id: str) -> bool:  # noqa: A002 - what it is
        """Remove the record to which a partial's file belongs; the file may go then."""
        data = self.files.read_beside(Place.INCOMING, id)
        if data is not None:
            with contextlib.suppress(ValueError):
                record = self._journal.partial(PartialRecord.from_json(data).path)
                if record is not None and record.id == id:
                    return self._forget_partial_record(record)
        return True

    def _forget_partial_record(self, record: PartialRecord) -> bool:
        def drop(changes: Changes) -> bool:
            if changes.partial(record.path) != record:
                return False
            changes.drop_partial(record.path)
            return True

        return self._journal.change(drop)

    def _remove_partial(self, record: PartialRecord) -> None:
        self.space.freed(self.files.unlink(Place.INCOMING, record.id))
        self.files.unlink(Place.INCOMING, record.id + BESIDE)

    # --- changes of what is dirty

    def delete(self, path: str, *, at_store: bool) -> bool:
        """Delete the path's dirty file, durably; write-back deletes the object where there may be one.

        `at_store`: there is one. False where nothing was dirty and nothing was said to be at the store: nothing has
        happened then, and the caller looks again, for an upload may just have ended.
        """
        about_to_wait(Wait.DISK)
        is_done = self._at_any_rate(lambda: self._dirty.delete(path, at_store=at_store))
        self._outdate(path)
        return is_done

    def rename(
        self,
        source: str,
        target: str,
        *,
        source_at_store: bool,
        target_base: str | None,
        base_known: bool = True,
    ) -> DirtyRecord:
        """Rename a dirty file, durably; write-back uploads it there, and deletes here what may be at the store.

        `target_base` is the fingerprint of what the store has at `target`, None: nothing; `base_known` False: nobody
        knows. ENOENT where `source` is not a dirty file.
        """
        about_to_wait(Wait.DISK)
        old, new = self._with_room(
            lambda: self._dirty.rename(
                source, target, at_store=source_at_store, base=target_base, base_known=base_known
            )
        )
        self._has_moved(old, new)
        return new

    def rename_below(self, source: str, target: str) -> dict[str, DirtyRecord]:
        """Rename all that is dirty at and below a folder in one step, durably; return it by its new paths.

        A file that waits under a new path keeps its place, and the other its name. The store's objects are the
        caller's.
        """
        return self._rename_all(source, target, self.dirty_below(source), {})

    def rename_rest_below(self, source: str, target: str, over: dict[str, DirtyRecord]) -> None:
        """Rename the files that were published below a folder since it was renamed; `over` is what that returned."""
        files = [record for record in self.dirty_below(source) if not record.is_tombstone]
        self._rename_all(source, target, files, over)

    def rename_back(self, source: str, target: str, moved: dict[str, DirtyRecord]) -> None:
        """Undo `rename_below(source, target)`, which returned `moved`, but for what was changed since."""
        same = [record for path, record in moved.items() if self._journal.dirty(path) == record]
        self._rename_all(target, source, same, {})

    def _rename_all(
        self, source: str, target: str, records: list[DirtyRecord], over: dict[str, DirtyRecord]
    ) -> dict[str, DirtyRecord]:
        if not records:
            return {}
        about_to_wait(Wait.DISK)
        done = self._with_room(lambda: self._dirty.rename_below(source, target, records, over))
        for old, new in done:
            if not new.is_tombstone:
                self._has_moved(old, new)
        return {new.path: new for _, new in done}

    def _has_moved(self, old: DirtyRecord, new: DirtyRecord) -> None:
        if old.id is not None and new.id is not None:
            self._open.moved(old.id, new.path, new.id)
        self._outdate(old.path)
        self._outdate(new.path)

    def _outdate(self, path: str) -> None:
        """Drop what is cached of an object that is about to be another one; what matters is done already."""
        try:
            self._clean.forget(path)
        except OSError as error:  # it is of no use, and will be found so when somebody compares
            logger.warning("What is cached of %r stays for a while: %s", path, error)

    def touch(self, path: str, mtime: float) -> DirtyRecord:
        """Give a dirty file another modification time, durably. ENOENT where the path is not a dirty file."""
        about_to_wait(Wait.DISK)
        return self._with_room(lambda: self._dirty.touch(path, mtime))

    # --- write-back's side

    def begin(self, record: DirtyRecord) -> bool:
        """Note durably, before the store is asked, that something may be there from now on; False: superseded."""
        return self._at_any_rate(lambda: self._dirty.begin(record))

    def uploaded(self, record: DirtyRecord, entry: Entry) -> bool:
        """The store has the file, as `entry`: it is clean now. False where a newer record has taken its place."""
        is_known = entry.fingerprint is not None
        if not self._at_any_rate(lambda: self._dirty.end(record, entry.fingerprint, base_known=is_known)):
            return False
        if self._keeps_clean:
            try:
                self._clean.keep_uploaded(record, entry)
            except OSError as error:
                logger.warning("%r is uploaded and does not stay in the cache: %s", record.path, error)
        if record.id is not None:
            self._open.moved(record.id, record.path, record.id, entry)
        self._dirty.remove_files(record)
        self.space.look_again()
        return True

    def deleted(self, record: DirtyRecord) -> None:
        """The store has nothing at the path any more."""
        if self._at_any_rate(lambda: self._dirty.end(record, None)):
            self._dirty.remove_files(record)

    def failed(self, record: DirtyRecord, error: OSError, due: float) -> None:
        """The store could not be brought to it; it is tried again at `due` (wall time)."""
        self._at_any_rate(lambda: self._dirty.failed(record, error, due))

    # --- space

    def wants_stored(self) -> bool:
        """Tell whether what waits for the store takes room that is wanted. Looks at the disk."""
        return self.space.wants_stored

    def _with_room(self, call: Callable[[], T]) -> T:
        return self.space.with_room(FOR_RECORDS, call)

    def _at_any_rate(self, call: Callable[[], T]) -> T:
        """Make a change that leads to more room, with the last of the disk where need be."""
        try:
            return self._with_room(call)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._index.drop_ballast():
                raise
        return call()

    def evict(self) -> Evicted:
        """Remove clean files and partials that are too old or too many; nothing open in any process, nothing dirty."""
        return self.space.evict()

    def sweep(self) -> None:
        """Remove what a crash has left of clean files: data without a record, records without data."""
        self.space.freed(self._clean.sweep())

    def usage(self) -> Usage:
        """Return what the cache takes on the disk. Looks at every file."""
        return self.space.usage()

    # --- health

    def _changed(self, changed: list[str]) -> None:
        if self._mirror is not None:
            self._mirror.changed(changed)

    def _lost(self, path: str) -> DirtyRecord | None:
        """Find a dirty record beside its data, because that in the index cannot be read."""
        about_to_wait(Wait.DISK)  # for all of them
        return next((each for each in records_beside(self.folder) if each.path == path), None)

    def check(self, store: Callable[[str], Entry | None] | None = None) -> list[str]:
        """Return every broken invariant in words; true whenever nobody is at work in the folder.

        `store` returns the store's entry of a path, None where there is none. Looks at every file.
        """
        found = Check(self.files, self._journal, self._items, store).run()
        known = {record.path: record for record in self._journal.all_dirty()}
        if known != {record.path: record for record in self.all_dirty()}:
            found.append("what this process remembers as dirty is not what the index says")
        return found

    def stats(self) -> dict[str, int]:
        """Return counts for those who watch."""
        return {**self.count, "dirty": self._dirty_mirror.count, "dirty_bytes": self._dirty_mirror.size}
