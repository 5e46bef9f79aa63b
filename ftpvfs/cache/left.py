"""Caches that nobody serves any more, and what in them the store never got."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ftpvfs.cache.beside import peek
from ftpvfs.cache.files import BESIDE, Place


@dataclass(frozen=True)
class LeftCache:
    """A cache folder with files that are not in their store yet. `size` is in bytes."""

    name: str
    files: int
    deletions: int
    size: int


def left_caches(cache_dir: Path, served: Collection[Path] = ()) -> list[LeftCache]:
    """Return the caches in `cache_dir`, but for those `served`, that hold what their store never got.

    A look beside the data of each: no index is opened, nothing is changed, and nothing unreadable stops it.
    """
    ours = {os.path.realpath(each) for each in served}
    try:
        folders = [each for each in sorted(cache_dir.iterdir()) if (each / Place.DATA.value).is_dir()]
    except OSError:
        return []
    found = [_look(folder) for folder in folders if os.path.realpath(folder) not in ours]
    return [each for each in found if each.files or each.deletions]


def has_left(folder: Path) -> bool:
    """Tell, by one look into its data, whether a cache folder may hold what its store never got."""
    try:
        with os.scandir(folder / Place.DATA.value) as entries:
            return any(entry.name.endswith(BESIDE) for entry in entries)
    except OSError:
        return False


def _look(folder: Path) -> LeftCache:
    records = peek(folder)
    files = [record for record in records if not record.is_tombstone]
    return LeftCache(folder.name, len(files), len(records) - len(files), sum(record.size for record in files))
