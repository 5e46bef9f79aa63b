"""What the store does not have yet: dirty files and tombstones, and all that may happen to them.

Order, so that a crash leaves old or new: a file's bytes are synced, then the record beside it, then both get their
names in `data/`, then one transaction of the index makes the change. What ends goes by the transaction,
then the bytes, then the record beside. So what stands in `data/` and not in the index was never acknowledged, or has
ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ftpvfs import paths
from ftpvfs.cache.beside import settle_beside
from ftpvfs.cache.files import BESIDE, DataFile, Files, Number, Place
from ftpvfs.cache.item import Draft, new_suffix
from ftpvfs.cache.journal import Changes, Journal
from ftpvfs.cache.records import DirtyRecord, PartialRecord, id_prefix
from ftpvfs.cache.state import Event, State, after
from ftpvfs.clock import Clock
from ftpvfs.errors import ECHANGED, failure, reason_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Tells of a path's record whether a new file may take its place.
MayReplace = Callable[["DirtyRecord | None"], bool]

# How often a change is prepared anew because another one of the same path came first.
MOST_TRIES = 1000


@dataclass(frozen=True)
class Replaced:
    """What a change has put in the place of what: files of `ended` are to be removed."""

    record: DirtyRecord | None = None
    ended: tuple[DirtyRecord, ...] = ()
    partial: PartialRecord | None = None


class _Overtaken(Exception):
    """Another change came first; the prepared one does not fit any more."""


@dataclass(frozen=True)
class _Renaming:
    """One dirty file on its way to another path, prepared on the disk."""

    source: DirtyRecord
    moved: DirtyRecord
    tombstone: DirtyRecord | None
    target: DirtyRecord | None


def state_of(record: DirtyRecord | None) -> State:
    """Return the state of a path as its dirty record tells it; what is attempted may be under way."""
    if record is None:
        return State.ABSENT
    if record.is_tombstone:
        return State.DELETING if record.attempted else State.GONE
    return State.UPLOADING if record.attempted else State.DIRTY


class DirtyFiles:
    """The dirty files and tombstones of a store. Any thread, any process; all changes are durable on return."""

    def __init__(
        self, files: Files, journal: Journal, generations: Number, clock: Clock, freed: Callable[[int], None]
    ) -> None:
        self._files = files
        self._journal = journal
        self._generations = generations
        self._clock = clock
        self._freed = freed

    # --- a new file

    def publish(
        self, draft: Draft, *, mtime: float, base: str | None, base_known: bool, may_replace: MayReplace
    ) -> Replaced:
        """Make the draft's file its path's dirty file; what it replaces has ended. ECHANGED where it may not."""
        record = DirtyRecord(
            path=draft.path,
            id=draft.id,
            size=draft.size,
            mtime=mtime,
            generation=self._generations.add(1),
            base=base,
            base_known=base_known,
            user=draft.user,
            since=self._clock.time(),
            beside=draft.id,
        )
        draft.sync()
        with self._beside([record]):
            self._files.move(draft.id, Place.INCOMING, Place.DATA)
            try:
                replaced = self._journal.change(lambda changes: _publish(changes, record, may_replace), Place.DATA)
            except BaseException:
                self._files.move(draft.id, Place.DATA, Place.INCOMING)
                raise
        self._remove_ended(replaced)
        return replaced

    def supersede(self, path: str) -> Replaced:
        """End what is dirty at the path: the store has something newer already."""
        if self._journal.dirty(path) is None and self._journal.partial(path) is None:
            return Replaced()

        def drop(changes: Changes) -> Replaced:
            old, partial = changes.dirty(path), changes.partial(path)
            after(state_of(old), Event.STORED)
            changes.drop(path)
            changes.drop_partial(path)
            return Replaced(None, (old,) if old else (), partial)

        replaced = self._journal.change(drop)
        self._remove_ended(replaced)
        return replaced

    # --- changes of what is dirty

    def delete(self, path: str, *, at_store: bool) -> bool:
        """End the path's dirty file, and leave a tombstone where the store is to delete something; False: neither."""

        def once() -> Replaced:
            old = self._journal.dirty(path)
            if old is None and not at_store:
                return Replaced()
            is_needed = at_store or (old is not None and (old.is_tombstone or old.may_be_at_store))
            tombstone = self._tombstone(path, old) if is_needed else None

            def decide(changes: Changes) -> Replaced:
                _expect(changes, path, old)
                after(state_of(old), Event.DELETE if tombstone else Event.DISCARD)
                _replace(changes, path, tombstone)
                return Replaced(tombstone, (old,) if old else ())

            with self._beside([tombstone] if tombstone else []):
                return self._journal.change(decide, *([Place.DATA] if tombstone else []))

        replaced = _until_it_fits(path, once)
        self._remove_ended(replaced)
        return replaced != Replaced()

    def touch(self, path: str, mtime: float) -> DirtyRecord:
        """Give the path's dirty file another modification time. ENOENT where it is not dirty."""

        def once() -> DirtyRecord:
            old = self._file(path)
            record = dataclasses.replace(old, mtime=mtime, generation=self._generations.add(1), due=0.0)

            def decide(changes: Changes) -> DirtyRecord:
                _expect(changes, path, old)
                after(state_of(old), Event.TOUCH)
                changes.put(record)
                return record

            with self._beside([record], replaces=old):
                return self._journal.change(decide, Place.DATA)

        return _until_it_fits(path, once)

    def rename(
        self, source: str, target: str, *, at_store: bool, base: str | None, base_known: bool
    ) -> tuple[DirtyRecord, DirtyRecord]:
        """Move the dirty file; return its records under the old and the new path. ENOENT where it is not dirty."""

        def once() -> tuple[_Renaming, ...]:
            renaming = self._renaming(self._file(source), target, at_store, base, base_known=base_known)
            return self._rename_all([renaming])

        (done,) = _until_it_fits(source, once)
        return done.source, done.moved

    def rename_below(
        self, source: str, target: str, records: list[DirtyRecord], over: Mapping[str, DirtyRecord]
    ) -> list[tuple[DirtyRecord, DirtyRecord]]:
        """Move all dirty files at and below a folder, in one step; `records` are those known to be there.

        A file that waits under the new name keeps its place, and the other its own name, unless it is one of `over`.
        The store's own objects go by the folder's rename. What is to be deleted there is to be deleted in both places.
        """

        def once() -> tuple[_Renaming, ...]:
            known = [(each, self._journal.dirty(each.path)) for each in records]
            renamings = [
                self._renaming(now, paths.rebase(now.path, source, target), False, None, base_known=False)
                for each, now in known
                if now is not None and now.is_tombstone == each.is_tombstone
            ]
            return self._rename_all([each for each in renamings if _may_go(each, over)])

        return [(each.source, each.moved) for each in _until_it_fits(source, once)]

    def _renaming(
        self, source: DirtyRecord, target: str, at_store: bool, base: str | None, *, base_known: bool
    ) -> _Renaming:
        """Return the records of a rename; nothing is on the disk yet."""
        there = self._journal.dirty(target)
        name = id_prefix(target) + new_suffix()
        moved = dataclasses.replace(
            source,
            path=target,
            id=None if source.is_tombstone else name,
            beside=name,
            generation=self._generations.add(1),
            base=base if there is None else there.base,
            base_known=base_known if there is None else there.base_known,
            attempted=there is not None and there.attempted,
            tries=0,
            error="",
            due=0.0,
        )
        is_needed = at_store or source.may_be_at_store
        tombstone = self._tombstone(source.path, source) if is_needed and not source.is_tombstone else None
        return _Renaming(source, moved, tombstone, there)

    def _rename_all(self, renamings: list[_Renaming]) -> tuple[_Renaming, ...]:
        """Make prepared renames happen at once."""

        def decide(changes: Changes) -> tuple[_Renaming, ...]:
            for each in renamings:
                _expect(changes, each.source.path, each.source)
                _expect(changes, each.moved.path, each.target)
            for each in renamings:
                after(state_of(each.target), Event.DELETE if each.moved.is_tombstone else Event.RENAME_HERE)
                if each.tombstone is not None:
                    after(state_of(each.source), Event.DELETE)
                if not each.source.is_tombstone:
                    _replace(changes, each.source.path, each.tombstone)
                changes.put(each.moved)
            return tuple(renamings)

        records = [record for each in renamings for record in (each.moved, each.tombstone) if record is not None]
        with self._beside(records), self._linked(renamings):
            done = self._journal.change(decide, Place.DATA)
        for each in done:
            if not each.source.is_tombstone:
                self.remove_files(each.source)
            if each.target is not None:
                self.remove_files(each.target)
        return done

    @contextlib.contextmanager
    def _linked(self, renamings: list[_Renaming]) -> Iterator[None]:
        """Give the files their new names beside the old ones; only those, where the change fails."""
        made: list[str] = []
        try:
            for each in renamings:
                if each.source.id is not None and each.moved.id is not None:
                    try:
                        self._files.link(Place.DATA, each.source.id, each.moved.id)
                    except FileNotFoundError:
                        raise _Overtaken from None
                    made.append(each.moved.id)
            yield
        except Exception:
            for name in made:
                self._files.unlink(Place.DATA, name)
            raise

    def _tombstone(self, path: str, old: DirtyRecord | None) -> DirtyRecord:
        return DirtyRecord(
            path=path,
            id=None,
            size=0,
            mtime=self._clock.time(),
            generation=self._generations.add(1),
            base=old.base if old else None,
            base_known=old.base_known if old else False,
            attempted=old.attempted if old else False,
            user=old.user if old else "",
            since=self._clock.time(),
            beside=id_prefix(path) + new_suffix(),
        )

    def _file(self, path: str) -> DirtyRecord:
        record = self._journal.dirty(path)
        if record is None or record.is_tombstone:
            raise failure(errno.ENOENT, path)
        return record

    # --- write-back's side

    def begin(self, record: DirtyRecord) -> bool:
        """Note, before the store is asked for the first time, that it will be; False where there is a newer record."""
        known = self._journal.dirty(record.path)
        if known is not None and known.generation == record.generation and known.attempted:
            return True

        def decide(changes: Changes) -> bool:
            old = changes.dirty(record.path)
            if old is None or old.generation != record.generation:
                return False
            after(state_of(old), Event.DELETE_BEGINS if old.is_tombstone else Event.UPLOAD_BEGINS)
            changes.put(dataclasses.replace(old, attempted=True))
            return True

        return self._journal.change(decide)

    def end(self, record: DirtyRecord, base: str | None, *, base_known: bool = True) -> bool:
        """Note that the store has what the record wants, as `base`; False where a newer record wants something else.

        `base_known` False: nobody can tell which version that is.
        The files of the record are left to the caller.
        """

        def decide(changes: Changes) -> bool:
            old = changes.dirty(record.path)
            if old is not None and old.generation == record.generation:
                if old.attempted:
                    after(state_of(old), Event.DELETE_ENDS if old.is_tombstone else Event.UPLOAD_ENDS)
                changes.drop(record.path)
                return True
            if old is not None:
                changes.put(dataclasses.replace(old, base=base, base_known=base_known))
            return False

        return self._journal.change(decide)

    def failed(self, record: DirtyRecord, error: OSError, due: float) -> None:
        """Note why the store does not have it yet, and when to try again."""

        def decide(changes: Changes) -> None:
            old = changes.dirty(record.path)
            if old is not None and old.generation == record.generation:
                changes.put(dataclasses.replace(old, tries=old.tries + 1, error=reason_of(error), due=due))

        self._journal.change(decide)

    # --- files

    @contextlib.contextmanager
    def _beside(self, records: list[DirtyRecord], *, replaces: DirtyRecord | None = None) -> Iterator[None]:
        """Write records beside their data, leased until their change is made; taken back where it is not."""
        written: list[tuple[DirtyRecord, DataFile]] = []
        try:
            for record in records:
                file = self._files.write_beside(Place.DATA, record.beside, record.to_json())
                written.append((record, file))
                if replaces is not None:
                    file.close()  # it stands in the place of one that counts
            yield
        except Exception:
            for record, _ in written:
                if replaces is None:
                    self._files.unlink(Place.DATA, record.beside + BESIDE)
            raise
        finally:
            for _, file in written:
                file.close()
            if replaces is not None and written:
                self._settle(replaces)

    def _settle(self, record: DirtyRecord) -> None:
        """See that what stands beside a file is right although several have written it at once."""
        try:
            settle_beside(self._files, self._journal, record)
        except OSError as error:  # the index counts, and the next start sets it right
            logger.warning("The record beside the data of %r is not the newest: %s", record.path, error)

    def _remove_ended(self, replaced: Replaced) -> None:
        for record in replaced.ended:
            self.remove_files(record)
        if replaced.partial is not None:
            self._freed(self._files.unlink(Place.INCOMING, replaced.partial.id))
            self._files.unlink(Place.INCOMING, replaced.partial.id + BESIDE)

    def remove_files(self, record: DirtyRecord) -> None:
        """Remove the files of a record that has ended."""
        # The record beside goes last: data without one is a riddle to recovery.
        if record.id is not None:
            self._freed(self._files.unlink(Place.DATA, record.id))
        self._files.unlink(Place.DATA, record.beside + BESIDE)


def _may_go(renaming: _Renaming, over: Mapping[str, DirtyRecord]) -> bool:
    there = renaming.target
    return there is None or there.is_tombstone or over.get(there.path) == there


def _publish(changes: Changes, record: DirtyRecord, may_replace: MayReplace) -> Replaced:
    old, partial = changes.dirty(record.path), changes.partial(record.path)
    if not may_replace(old):
        raise failure(ECHANGED, record.path, "There is another file by now")
    after(state_of(old), Event.PUBLISH)
    if old is not None and old.generation > record.generation:
        return Replaced(old, (record,))  # another writer came later, and was quicker
    if old is not None:
        # What is at the store is what it was when the path became dirty.
        record = dataclasses.replace(record, base=old.base, base_known=old.base_known, attempted=old.attempted)
    changes.put(record)
    changes.drop_partial(record.path)
    return Replaced(record, (old,) if old is not None and old.beside != record.beside else (), partial)


def _expect(changes: Changes, path: str, record: DirtyRecord | None) -> None:
    if changes.dirty(path) != record:
        raise _Overtaken


def _replace(changes: Changes, path: str, record: DirtyRecord | None) -> None:
    if record is None:
        changes.drop(path)
    else:
        changes.put(record)


def _until_it_fits(path: str, once: Callable[[], T]) -> T:
    """Prepare and make a change until no other one of the same path comes in between."""
    for _ in range(MOST_TRIES):
        with contextlib.suppress(_Overtaken):
            return once()
    raise failure(errno.EBUSY, path, "The file is changed by others all the time")
