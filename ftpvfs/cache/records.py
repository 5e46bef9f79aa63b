"""What is recorded of a cached file, and how it is written down.

Whatever is read from the disk may be damaged, or written by another program: `from_json` takes it apart and raises
ValueError for anything odd. Each record carries a checksum of itself, because a flipped byte often leaves JSON behind.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar, TypeVar

from ftpvfs import paths
from ftpvfs.backend.backend import Entry
from ftpvfs.cache.ranges import RangeSet

R = TypeVar("R", bound="Record")

ID = re.compile(r"[0-9a-f]{32}")
SUM = "sum"
KIND = "kind"


def id_prefix(path: str) -> str:
    """Return the first half of the ids of a path's files: who has a file can look for its record without a search."""
    return blake2b(paths.encoded(path), digest_size=8).hexdigest()


def is_id(text: str) -> bool:
    """Tell whether a file of this name may be one of ours."""
    return ID.fullmatch(text) is not None


def version_of(entry: Entry) -> str:
    """Return the version of an object as a record keeps it; "" where the store cannot tell one from another."""
    return entry.version or ""


@dataclass(frozen=True)
class Record:
    """What all records have in common."""

    kind: ClassVar[str]

    def to_json(self) -> bytes:
        """Return the record as it is written."""
        fields = {KIND: self.kind, **{each.name: getattr(self, each.name) for each in dataclasses.fields(self)}}
        return _dumped({**fields, SUM: _checksum(fields)})

    @classmethod
    def from_json(cls: type[R], data: bytes) -> R:
        """Return the record that was written so; ValueError for whatever else it may be."""
        try:
            fields = json.loads(data)
        except RecursionError as error:
            raise ValueError("JSON in JSON in JSON") from error
        if not isinstance(fields, dict) or fields.pop(KIND, None) != cls.kind:
            raise ValueError(f"no {cls.kind} record")
        if fields.pop(SUM, None) != _checksum({KIND: cls.kind, **fields}):
            raise ValueError("its checksum is wrong")
        names = {each.name for each in dataclasses.fields(cls)}
        if fields.keys() != names:
            raise ValueError(f"fields {sorted(names ^ fields.keys())} are missing or not known")
        return cls._from_fields(fields)

    @classmethod
    def _from_fields(cls: type[R], fields: dict[str, Any]) -> R:
        for name, value in fields.items():
            if not CHECKS[name](value):
                raise ValueError(f"{name} cannot be {value!r}")
        return cls(**fields)


@dataclass(frozen=True)
class ItemRecord(Record):
    """What is cached of one version of an object. Clean: the store has it, too."""

    kind: ClassVar[str] = "item"

    path: str
    id: str
    size: int
    mtime: float | None
    # Entry.version; "" where the store cannot tell.
    version: str
    fingerprint: str | None
    # Ranges that are in the data file.
    present: tuple[tuple[int, int], ...] = ()
    # Wall time; the data file's own modification time is what eviction goes by.
    used: float = 0.0
    # Whether the whole was compared with the store's hash.
    verified: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are here."""
        return self.present == (((0, self.size),) if self.size else ())

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> ItemRecord:
        ranges = fields["present"]
        if not isinstance(ranges, list) or not all(_is_range(each) for each in ranges):
            raise ValueError(f"present cannot be {ranges!r}")
        present = tuple((start, stop) for start, stop in ranges)
        record = super()._from_fields({**fields, "present": present})
        if tuple(RangeSet(present)) != present or (present and present[-1][1] > record.size):
            raise ValueError(f"present cannot be {present!r}")
        return record

    def is_of(self, entry: Entry) -> bool:
        """Tell whether these are bytes of that object.

        A fingerprint names the bytes; a store may give them another modification time, which changes the version only.
        """
        return entry.fingerprint is not None and (self.fingerprint, self.size) == (entry.fingerprint, entry.size)


@dataclass(frozen=True)
class DirtyRecord(Record):
    """What the store is to have at a path, and does not have yet: a file, or nothing (`id` None, a tombstone)."""

    kind: ClassVar[str] = "dirty"

    path: str
    id: str | None
    size: int
    mtime: float
    # Higher than that of any record of the path before.
    generation: int
    # Fingerprint of the object that was at the store when the path became dirty; None: nothing was there.
    base: str | None
    # False: nobody knew what was at the store.
    base_known: bool = True
    # Whether a PUT of this path may have been made: then a delete or rename must reckon with an object.
    attempted: bool = False
    user: str = ""
    # Wall time at which the path became so.
    since: float = 0.0
    tries: int = 0
    error: str = ""
    # Wall time before which write-back does not try again.
    due: float = 0.0
    # Name of the record's own file beside the data; for a file that is its id.
    beside: str = ""

    @property
    def is_tombstone(self) -> bool:
        """Whether the store is to have nothing."""
        return self.id is None

    @property
    def may_be_at_store(self) -> bool:
        """Whether an object may be at the store under this path."""
        return self.attempted or self.base is not None or not self.base_known

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> DirtyRecord:
        beside = fields["beside"]
        if fields["mtime"] is None:
            raise ValueError("mtime is missing")
        if not isinstance(beside, str) or not is_id(beside) or fields["id"] not in (None, beside):
            raise ValueError(f"beside cannot be {beside!r}")
        tombstone = {"id": beside} if fields["id"] is None else {}
        record = super()._from_fields({**fields, **tombstone})
        return dataclasses.replace(record, id=fields["id"])


@dataclass(frozen=True)
class PartialRecord(Record):
    """What came of an interrupted upload: the first `size` bytes, which a client may go on with."""

    kind: ClassVar[str] = "partial"

    path: str
    id: str
    size: int
    user: str
    since: float
    # The run of the machine in which it was written; in a later one only `size` bytes are known to be on the disk.
    boot: str = ""


def _dumped(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=True, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def _checksum(fields: dict[str, Any]) -> int:
    try:
        return zlib.crc32(_dumped(fields))
    except (TypeError, ValueError):  # a number that is none
        return -1


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_range(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)) and value[0] < value[1]


def _is_path(value: object) -> bool:
    try:
        return isinstance(value, str) and value != "" and paths.clean(value) == value
    except OSError:
        return False


def _or_none(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


CHECKS: dict[str, Callable[[object], bool]] = {
    "path": _is_path,
    "id": lambda value: isinstance(value, str) and is_id(value),
    "size": _is_count,
    "mtime": _or_none(_is_time),
    "version": _is_text,
    "fingerprint": _or_none(_is_text),
    "present": lambda value: True,  # by ItemRecord
    "used": _is_time,
    "verified": _is_flag,
    "generation": _is_count,
    "base": _or_none(_is_text),
    "base_known": _is_flag,
    "attempted": _is_flag,
    "user": _is_text,
    "since": _is_time,
    "tries": _is_count,
    "error": _is_text,
    "due": _is_time,
    "beside": _is_text,
    "boot": _is_text,
}
