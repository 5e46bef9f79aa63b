"""What stands beside the dirty data, from which the journal is made anew when the index is damaged or gone."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ftpvfs.cache.files import BESIDE, Place
from ftpvfs.cache.records import DirtyRecord, is_id

logger = logging.getLogger(__name__)


def records_beside(folder: Path) -> list[DirtyRecord]:
    """Return what was dirty according to the records beside the data, the newest of each path.

    They count as if an upload had been tried, because nobody knows any more.
    """
    newest: dict[str, DirtyRecord] = {}
    for record in _readable(folder / Place.DATA.value):
        known = newest.get(record.path)
        if known is None or known.generation < record.generation:
            newest[record.path] = record
    if newest:
        logger.warning("%s: %d dirty files found by the records beside their data", folder, len(newest))
    return [dataclasses.replace(each, attempted=True, tries=0, error="", due=0.0) for each in newest.values()]


def _readable(folder: Path) -> Iterator[DirtyRecord]:
    """Yield the records whose data is there."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            name, dot, end = entry.name.partition(".")
            if not is_id(name) or dot + end != BESIDE:
                continue
            try:
                record = DirtyRecord.from_json(Path(entry.path).read_bytes())
                if record.is_tombstone or os.stat(folder / name).st_size == record.size:
                    yield record
            except (OSError, ValueError) as error:
                logger.warning("%s is no record of dirty data that is there: %s", entry.path, error)
