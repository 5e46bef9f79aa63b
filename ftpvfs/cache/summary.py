"""How the dirty records stand in the index, and the summary from which is seen that one has silently got lost."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable

from ftpvfs.cache.records import DirtyRecord, PartialRecord

DIRTY = "dirty:"
PARTIAL = "partial:"
SUMMARY = "journal"


class Summary:
    """How many dirty records there are, and the sum of their checksums in any order."""

    def __init__(self, count: int = 0, mix: int = 0, generation: int = 0) -> None:
        self.count = count
        self.mix = mix
        # The highest of any record that there was.
        self.generation = generation

    def change(self, old: bytes | None, new: bytes | None) -> None:
        """Count one record that has changed."""
        self.count += (new is not None) - (old is not None)
        for data in (old, new):
            if data is not None:
                self.mix ^= zlib.crc32(data)

    def to_json(self) -> bytes:
        """Return the summary as it is written."""
        return json.dumps([self.count, self.mix, self.generation]).encode()

    @classmethod
    def from_json(cls, data: bytes | None) -> Summary:
        """Return the summary that was written so; ValueError for anything else."""
        if data is None:
            return cls()
        numbers = json.loads(data)
        if not isinstance(numbers, list) or [type(each) for each in numbers] != [int] * 3:
            raise ValueError("no summary of the journal")
        return cls(*numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Summary) and (self.count, self.mix) == (other.count, other.mix)

    __hash__ = None  # type: ignore[assignment]


def refill(records: Iterable[DirtyRecord], partials: Iterable[PartialRecord] = ()) -> dict[str, bytes]:
    """Return what a new index holds of these records."""
    contents, summary = {}, Summary()
    for record in records:
        data = record.to_json()
        contents[DIRTY + record.path] = data
        summary.change(None, data)
        summary.generation = max(summary.generation, record.generation)
    if contents:
        contents[SUMMARY] = summary.to_json()
    return {**contents, **{PARTIAL + each.path: each.to_json() for each in partials}}
