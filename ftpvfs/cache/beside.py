"""What stands beside the dirty data, from which the journal is made anew when the index is damaged or gone."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ftpvfs.cache.files import BESIDE, Files, Place
from ftpvfs.cache.records import DirtyRecord, PartialRecord, is_id

if TYPE_CHECKING:
    from ftpvfs.cache.journal import Journal

logger = logging.getLogger(__name__)


def partials_beside(folder: Path) -> list[PartialRecord]:
    """Return what came of interrupted uploads, the newest of each path."""
    newest: dict[str, PartialRecord] = {}
    for path, name in _records(folder / Place.INCOMING.value):
        with contextlib.suppress(OSError, ValueError):
            record = PartialRecord.from_json(_settled(path))
            with open(path.removesuffix(BESIDE), "rb") as data:
                fcntl.flock(data, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it is being written
            known = newest.get(record.path)
            if record.size and record.id == name and (known is None or known.since < record.since):
                newest[record.path] = record
    return list(newest.values())


def records_beside(folder: Path) -> list[DirtyRecord]:
    """Return what was dirty according to the records beside the data, the newest of each path.

    They count as if an upload had been tried, because nobody knows any more.
    """
    found = peek(folder)
    if found:
        logger.warning("%s: %d dirty files found by the records beside their data", folder, len(found))
    return [dataclasses.replace(each, attempted=True, tries=0, error="", due=0.0) for each in found]


def peek(folder: Path) -> list[DirtyRecord]:
    """Return the records beside the data of a cache folder, the newest of each path, as they stand there."""
    newest: dict[str, DirtyRecord] = {}
    for record in _readable(folder / Place.DATA.value):
        known = newest.get(record.path)
        if known is None or known.generation < record.generation:
            newest[record.path] = record
    return list(newest.values())


def settle_beside(files: Files, journal: Journal, record: DirtyRecord) -> None:
    """Let the record that counts stand beside a file, or none where it has ended, whoever else wrote one meanwhile.

    Who has written one calls this after the change that it was written for, made or not: so the last one sets it right.
    """
    while True:
        known = journal.dirty(record.path)
        if known is None or known.beside != record.beside:
            files.unlink(Place.DATA, record.beside + BESIDE)
            return
        data = files.read_beside(Place.DATA, record.beside)
        if data is not None and _is_same(data, known):
            return
        files.write_beside(Place.DATA, record.beside, known.to_json()).close()


def _is_same(data: bytes, record: DirtyRecord) -> bool:
    try:
        beside = DirtyRecord.from_json(data)
    except ValueError:
        return False
    return (beside.path, beside.generation) == (record.path, record.generation)


def _settled(path: str) -> bytes:
    """Return a record that nobody is just making: whose change is under way will see to the index itself."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("its change is under way") from None
        return file.read()


def _readable(folder: Path) -> Iterator[DirtyRecord]:
    """Yield the records whose data is there."""
    for path, name in _records(folder):
        try:
            record = DirtyRecord.from_json(_settled(path))
            if record.beside == name and (record.is_tombstone or os.stat(folder / name).st_size == record.size):
                yield record
        except (OSError, ValueError) as error:
            logger.info("%s is no record of dirty data that is there: %s", path, error)


def _records(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the path of each record in a place, and the name of the file that it belongs to."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            name, dot, end = entry.name.partition(".")
            if is_id(name) and dot + end == BESIDE:
                yield entry.path, name
