"""What a crash has left in a cache folder, and what becomes of it. Other processes may be at work: leases tell.

Nothing that was acknowledged is lost, nothing that nobody understands is deleted: that goes to `quarantine/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ftpvfs.cache.beside import records_beside, settle_beside
from ftpvfs.cache.files import BESIDE, UNFINISHED, DataFile, Files, Number, Place
from ftpvfs.cache.journal import Changes, Journal
from ftpvfs.cache.records import DirtyRecord, PartialRecord, is_id

logger = logging.getLogger(__name__)


@dataclass
class Recovered:
    """What was found after a crash, in numbers of files."""

    dirty: int = 0
    adopted: int = 0
    lost: int = 0
    partials: int = 0
    removed: int = 0
    quarantined: int = 0
    rebuilt: bool = False


class Recovery:
    """Brings files and journal together again. One thread; any number of processes."""

    def __init__(self, files: Files, journal: Journal, generations: Number, *, keeps_partials: bool) -> None:
        self._files = files
        self._journal = journal
        self._generations = generations
        self._keeps_partials = keeps_partials
        self._found = Recovered()

    def run(self) -> Recovered:
        """Look at all that is not clean; return what was done."""
        self._files.prepare()
        self._rebuild_if_damaged()
        known = {record.beside: record for record in self._journal.all_dirty()}
        newest = max((record.generation for record in known.values()), default=0)
        self._generations.raise_to(max(newest, self._journal.generation))
        self._look_at_data(known)
        for record in known.values():
            self._look_at_record(record)
        self._look_at_incoming()
        self._found.dirty = len(self._journal.all_dirty())
        return self._found

    def _rebuild_if_damaged(self) -> None:
        damage = self._journal.damage()
        if damage is None:
            return
        logger.error(
            "%s: the dirty records in the index are damaged (%s); those beside the data count now",
            self._files.folder, damage,
        )  # fmt: skip
        self._found.rebuilt = True
        try:
            self._journal.replace_all(records_beside(self._files.folder))
        except OSError as error:
            self._journal.begin_anew(f"{damage}; {error}")

    # --- data/

    def _look_at_data(self, known: dict[str, DirtyRecord]) -> None:
        names = sorted(entry.name for entry in self._files.names(Place.DATA))
        for name in names:
            stem, end = _parts(name)
            if not is_id(stem) or not _is_end(end):
                self._quarantine(Place.DATA, name, "it is none of ours")
            elif end not in ("", BESIDE):
                self._when_unused(Place.DATA, name, lambda name: self._files.unlink(Place.DATA, name))
        # The oldest first: each is to be newer than all that the journal has had.
        unknown = [name for name in names if name.endswith(BESIDE) and _is_unknown(name, known)]
        for name in sorted(unknown, key=self._generation_beside):
            self._when_unused(Place.DATA, name, self._unknown_record)
        for name in names:
            if is_id(name) and name not in known and not self._files.has(Place.DATA, name + BESIDE):
                self._when_unused(Place.DATA, name, self._unknown_data)

    def _when_unused(self, place: Place, name: str, look: Callable[[str], object]) -> None:
        """Look at a file that nobody is at work with, unless somebody removes it meanwhile."""
        file = self._files.claim(place, name)
        if file is not None:
            with contextlib.closing(file), contextlib.suppress(FileNotFoundError):
                look(name)

    def _generation_beside(self, name: str) -> int:
        """Return the generation of a record beside its data; 0 where it cannot be read."""
        try:
            data = self._files.read_beside(Place.DATA, _parts(name)[0])
            return 0 if data is None else DirtyRecord.from_json(data).generation
        except ValueError:
            return 0

    def _unknown_record(self, beside: str) -> None:
        """A record that the index did not have when we looked: of a change never acknowledged, or of one that ended."""
        name = _parts(beside)[0]
        data = self._files.read_beside(Place.DATA, name)
        if data is None:
            return
        try:
            record = DirtyRecord.from_json(data)
        except ValueError as error:
            self._unreadable_record(name, error)
            return
        superseded = self._journal.change(lambda changes: self._adopt(changes, record))
        if superseded is not None:
            self._files.unlink(Place.DATA, superseded.beside)
            self._files.unlink(Place.DATA, superseded.beside + BESIDE)

    def _adopt(self, changes: Changes, record: DirtyRecord) -> DirtyRecord | None:
        """Take up a file that arrived whole just before the crash; return whose files are to be removed."""
        old = changes.dirty(record.path)
        if old is not None and old.beside == record.beside:
            return None  # by a change that came while we looked
        is_newer = record.generation > max(self._journal.generation, old.generation if old else 0)
        if not is_newer or record.is_tombstone or not self._is_whole(record):
            self._found.removed += 1
            return record
        if old is not None:
            record = dataclasses.replace(record, base=old.base, base_known=old.base_known, attempted=old.attempted)
        changes.put(record)
        self._found.adopted += 1
        return old

    def _is_whole(self, record: DirtyRecord) -> bool:
        """Tell whether a file is there in full, and under one name: with two it was being renamed."""
        try:
            with self._opened(Place.DATA, record.beside) as file:
                return self._files.size(file.descriptor) == record.size and self._files.links(file.descriptor) == 1
        except FileNotFoundError:
            return False

    def _unreadable_record(self, name: str, error: ValueError) -> None:
        if not self._files.has(Place.DATA, name):  # of a tombstone, or torn before its data was there
            self._quarantine(Place.DATA, name + BESIDE, f"it cannot be read: {error}")
            return
        self._quarantine(Place.DATA, name, f"its record cannot be read: {error}")
        self._quarantine(Place.DATA, name + BESIDE, f"it cannot be read: {error}")

    def _unknown_data(self, name: str) -> None:
        """Data without any record."""
        if not any(record.beside == name for record in self._journal.all_dirty()):
            self._quarantine(Place.DATA, name, "nothing tells whose data it is")

    def _look_at_record(self, record: DirtyRecord) -> None:
        """See that a dirty record has its data, and that the one beside is the same."""
        reason = None if record.is_tombstone else self._what_is_wrong(record)
        if reason is not None:
            self._lose(record, reason)
            return
        settle_beside(self._files, self._journal, record)

    def _what_is_wrong(self, record: DirtyRecord) -> str | None:
        try:
            with self._opened(Place.DATA, record.beside) as file:
                size = self._files.size(file.descriptor)
        except FileNotFoundError:
            return "its data is gone"
        return None if size == record.size else f"it has {size} bytes instead of {record.size}"

    @contextlib.contextmanager
    def _opened(self, place: Place, name: str) -> Iterator[DataFile]:
        file = self._files.look_at(place, name)
        try:
            yield file
        finally:
            file.close()

    def _lose(self, record: DirtyRecord, reason: str) -> None:
        def drop(changes: Changes) -> bool:
            if changes.dirty(record.path) != record:
                return False
            changes.drop(record.path)
            return True

        if not self._journal.change(drop):
            return
        self._found.lost += 1
        logger.critical(
            "LOST: %r (%d bytes, written by %r) was acknowledged and is not in the store yet, and %s",
            record.path, record.size, record.user, reason,
        )  # fmt: skip
        for name in (record.beside, record.beside + BESIDE):
            if self._files.has(Place.DATA, name):
                self._quarantine(Place.DATA, name, reason)

    # --- incoming/

    def _look_at_incoming(self) -> None:
        names = sorted(entry.name for entry in self._files.names(Place.INCOMING))
        for name in names:
            stem, end = _parts(name)
            if not is_id(stem) or not _is_end(end):
                self._quarantine(Place.INCOMING, name, "it is none of ours")
            elif end not in ("", BESIDE):
                self._when_unused(Place.INCOMING, name, lambda name: self._files.unlink(Place.INCOMING, name))
            elif not end:
                self._when_unused(Place.INCOMING, name, self._look_at_draft)
            elif end == BESIDE + UNFINISHED:
                self._when_unused(Place.INCOMING, name, lambda name: self._files.unlink(Place.INCOMING, name))
            elif not self._files.has(Place.INCOMING, stem):
                self._files.unlink(Place.INCOMING, name)
        for record in self._journal.all_partials():
            if not self._files.has(Place.INCOMING, record.id):
                self._drop_partial(record)

    def _look_at_draft(self, name: str) -> None:
        """A partial, or an upload that its process did not end."""
        record = self._partial_beside(name)
        size = 0 if record is None else self._trusted_size(record)
        if record is None or not size or not self._keeps_partials or not self._put_partial(record, size):
            self._files.unlink(Place.INCOMING, name)
            self._files.unlink(Place.INCOMING, name + BESIDE)
            self._found.removed += 1
            return
        self._found.partials += 1

    def _partial_beside(self, name: str) -> PartialRecord | None:
        try:
            data = self._files.read_beside(Place.INCOMING, name)
            return None if data is None else PartialRecord.from_json(data)
        except ValueError:
            return None  # nobody was told that these bytes are safe

    def _trusted_size(self, record: PartialRecord) -> int:
        """Return how many bytes are surely there: all, unless the machine has stopped since."""
        with self._opened(Place.INCOMING, record.id) as file:
            size = self._files.size(file.descriptor)
        boot = self._files.boot()
        return size if boot and record.boot == boot else min(size, record.size)

    def _put_partial(self, record: PartialRecord, size: int) -> bool:
        """Let it be its path's partial, unless there is a newer one."""
        found = dataclasses.replace(record, size=size)

        def put(changes: Changes) -> bool:
            old = changes.partial(record.path)
            if old is not None and old.id != record.id and old.since >= record.since:
                return False
            if old != found:
                changes.put(found)
            return True

        known = self._journal.partial(record.path)
        return known == found or self._journal.change(put)

    def _drop_partial(self, record: PartialRecord) -> None:
        def drop(changes: Changes) -> None:
            if changes.partial(record.path) == record and not self._files.has(Place.INCOMING, record.id):
                changes.drop_partial(record.path)

        self._journal.change(drop)

    def _quarantine(self, place: Place, name: str, why: str) -> None:
        self._files.put_in_quarantine(place, name, why)
        self._found.quarantined += 1


def _is_unknown(name: str, known: dict[str, DirtyRecord]) -> bool:
    stem, end = _parts(name)
    return end == BESIDE and is_id(stem) and stem not in known


def _is_end(end: str) -> bool:
    """Tell whether our files' names end so behind the id."""
    return end in ("", BESIDE) or end.startswith(BESIDE + UNFINISHED)


def _parts(name: str) -> tuple[str, str]:
    """Return the id in a file's name, and what stands behind it."""
    stem, dot, end = name.partition(".")
    return stem, dot + end
