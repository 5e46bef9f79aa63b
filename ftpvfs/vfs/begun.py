"""What a file was when somebody began to write to it: whether it is that still when they are through."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ftpvfs.backend.backend import ABSENT, ANY, Condition, Entry
from ftpvfs.cache.item import Item
from ftpvfs.cache.records import DirtyRecord
from ftpvfs.vfs.pending import LOCAL, is_local


def is_exclusive(flags: int) -> bool:
    """Tell whether a file is to be new; O_EXCL alone means nothing."""
    return flags & (os.O_CREAT | os.O_EXCL) == os.O_CREAT | os.O_EXCL


@dataclass(frozen=True)
class Begun:
    """The version that a draft begins with; `entry` and `item` None: nothing was there. `size` is how long it is.

    A dirty item that gets stored while it is open learns its fingerprint.
    """

    flags: int
    entry: Entry | None
    item: Item | None
    size: int
    # Whether all that was written since stands behind `size`.
    only_appended: bool

    @property
    def is_exclusive(self) -> bool:
        """Whether the file was to be new."""
        return is_exclusive(self.flags)

    @property
    def condition(self) -> Condition:
        """Which of the store's versions the file may replace, where it is sent straight there."""
        if self.entry is None:
            return ABSENT if self.is_exclusive or self.only_appended else ANY
        return ANY if is_local(self.entry) else self.entry.fingerprint or ANY

    def is_still(self, now: Entry | None) -> bool:
        """Tell whether what is there now is what the draft begins with; what was deleted leaves it as it is."""
        if now is None or now.is_dir:
            return True
        if self.item is None:
            return False
        if is_local(now):
            return str(now.fingerprint).startswith(f"{LOCAL}{self.item.id}-")
        return self.item.fingerprint is not None and self.item.fingerprint == now.fingerprint

    def may_replace(self, record: DirtyRecord | None) -> bool:
        """Tell whether the draft may become the path's file in the place of a record."""
        if record is None or record.is_tombstone:
            return True
        if self.only_appended:
            return self.item is not None and record.id == self.item.id
        return not self.is_exclusive
