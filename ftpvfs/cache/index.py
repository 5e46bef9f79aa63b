"""What must outlive a process and be the same for all of them: made folders, times, and the journal of dirty paths.

Made folders and times can be had again, at the price of asking or of making a folder once more. What is dirty stands
beside its data, too, and comes from there into a new index.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, TypeVar

from ftpvfs import paths
from ftpvfs.cache.beside import partials_beside, records_beside
from ftpvfs.cache.database import Database, ForeignRecord
from ftpvfs.cache.summary import refill

T = TypeVar("T")

Known = dict[str, tuple[str | None, float]]

# A remembered modification time costs one request again after this time; until then its record takes space.
MTIME_KEPT = 30 * 86400.0
# Times that were set are spread over so many records a folder, so that setting one does not write those of all files.
SLOTS = 16
# Letters of a store's folder name; beyond them a digest tells stores apart.
LONGEST_NAME = 150
PLAIN = frozenset(f"{string.ascii_letters}{string.digits}-.".encode())


class Index(Database):
    """The records of one store. Any thread, any process; made after a fork.

    What a method has written is in the index for all processes, and on the disk, when it returns.
    """

    what = "index"
    loss = (
        "folders that were made here and are still empty are forgotten, modification times are asked of the store"
        " again, and what is dirty is found from the records beside its data"
    )
    check = "integrity_check"

    def _refill(self) -> Mapping[str, bytes]:
        return refill(records_beside(self._folder), partials_beside(self._folder))

    # --- the journal: what is dirty, and partials. Its own format is none of the index's business.

    def get(self, key: str) -> bytes | None:
        """Return a record's bytes; None where there is none, ValueError where it is not one of ours."""
        try:
            return self._get(key)
        except ForeignRecord as error:
            raise ValueError(f"{error} stands there") from error

    def put(self, key: str, data: bytes) -> None:
        """Write a record."""
        self._put(key, data)

    def delete(self, key: str) -> None:
        """Remove a record, if it is there."""
        self._delete(key)

    def keys(self, prefix: str) -> list[str]:
        """Return the keys of all records that begin so."""
        return self._keys(prefix)

    def atomically(self, change: Callable[[], T]) -> T:
        """Make all writes of `change` visible at once, durable with one sync. Short: nobody else writes meanwhile."""
        return self._atomically(change)

    # --- made folders: what MKD made on a store that has no folders

    def made_folders(self, parent: str) -> set[str]:
        """Return the names of the folders made in `parent`."""
        return set(self._read(f"made:{parent}") or ())

    def is_made(self, path: str) -> bool:
        """Tell whether the folder was made here."""
        parent, name = paths.split(path)
        return name in self.made_folders(parent)

    def add_folder(self, path: str) -> bool:
        """Remember that the folder exists, and so do those above it; return whether it was unknown."""
        if not path or self.is_made(path):
            return False

        def add() -> None:
            for made in (path, *paths.ancestors(path)):
                parent, name = paths.split(made)
                if made:
                    self._change_made(parent, add={name}, drop=set())

        self._atomically(add)
        return True

    def drop_folder(self, path: str) -> None:
        """Forget the folder and all that was made below it."""
        parent, name = paths.split(path)

        def drop() -> None:
            for made in list(self._made_below(path)):
                self._delete(f"made:{made}")
            self._change_made(parent, add=set(), drop={name})

        self._atomically(drop)

    def move_folder(self, source: str, target: str) -> None:
        """Rename the folder and all that was made below it."""

        def move() -> None:
            below = {made: self.made_folders(made) for made in self._made_below(source)}
            self.drop_folder(source)
            self.add_folder(target)
            for made, names in below.items():
                self._change_made(paths.rebase(made, source, target), add=names, drop=set())

        self._atomically(move)

    def _made_below(self, path: str) -> Iterator[str]:
        """Yield the folders at or below `path` in which others were made."""
        if self._read(f"made:{path}") is None:
            return
        yield path
        for name in self.made_folders(path):
            yield from self._made_below(paths.join(path, name))

    def _change_made(self, parent: str, *, add: set[str], drop: set[str]) -> None:
        """Called in a transaction."""
        known = self.made_folders(parent)
        names = (known | add) - drop
        if names and names != known:
            self._write(f"made:{parent}", sorted(names))
        elif not names:
            self._delete(f"made:{parent}")

    # --- modification times that the store's listing does not tell

    def mtimes(self, folder: str) -> Known:
        """Return name -> (version, mtime) of what the store was asked for the files of a folder."""
        return _known(self._read(f"mtimes:{folder}"))

    def remember_mtimes(self, folder: str, known: Mapping[str, tuple[str | None, float]]) -> None:
        """Replace what is remembered of a folder."""
        self._write(f"mtimes:{folder}", known, expire=MTIME_KEPT)

    # --- modification times that the store cannot keep

    def set_times(self, folder: str, name: str | None = None) -> Known:
        """Return name -> (version, mtime) of what was set for the files of a folder, or for the one called `name`."""
        found: Known = {}
        for slot in range(SLOTS) if name is None else [_slot(name)]:
            found.update(_known(self._read(f"set:{slot}:{folder}")))
        return found

    def add_set_times(self, folder: str, times: Mapping[str, tuple[str | None, float]]) -> None:
        """Remember the times that files of a folder were given."""
        slots: dict[int, Known] = {}
        for name, known in times.items():
            slots.setdefault(_slot(name), {})[name] = known

        def add() -> None:
            for slot, added in slots.items():
                key = f"set:{slot}:{folder}"
                self._write(key, {**_known(self._read(key)), **added})

        self._atomically(add)

    def drop_set_time(self, path: str) -> None:
        """Forget the time that a file was given."""
        folder, name = paths.split(path)
        key = f"set:{_slot(name)}:{folder}"

        def drop() -> None:
            known = _known(self._read(key))
            if known.pop(name, None) is None:
                return
            if known:
                self._write(key, known)
            else:
                self._delete(key)

        self._atomically(drop)

    def move_set_times(self, source: str, target: str) -> None:
        """Take the times that were set below a folder along when it is renamed."""

        def move() -> None:
            for key in self._keys("set:"):
                kind, slot, folder = key.split(":", 2)
                if paths.is_within(folder, source):
                    self._write(f"{kind}:{slot}:{paths.rebase(folder, source, target)}", self._read(key))
                    self._delete(key)

        self._atomically(move)


def _slot(name: str) -> int:
    return zlib.crc32(paths.encoded(name)) % SLOTS


def _known(record: Any) -> Known:
    return {name: (known[0], known[1]) for name, known in (record or {}).items()}


def cache_name(identity: Iterable[str]) -> str:
    """Return the folder name for a store, from its protocol and path alone, so that changed options keep it.

    >>> cache_name(["s3", "bucket/prefix"])
    's3-bucket_prefix'
    """
    text = "-".join("_".join(map(_safe, part.strip("/").split("/"))) for part in identity)
    safe = text if len(text) <= LONGEST_NAME else f"{text[:80]}-{blake2b(paths.encoded(text)).hexdigest()[:32]}"
    return safe or "root"


def _safe(name: str) -> str:
    """Return the name for use in a file's name; different ones stay different."""
    return "".join(chr(byte) if byte in PLAIN else f"%{byte:02x}" for byte in paths.encoded(name))
