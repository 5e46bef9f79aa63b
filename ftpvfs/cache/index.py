"""What must outlive a process and be the same for all of them: small records on diskcache, one SQLite file.

Records are JSON. diskcache would pickle what it does not know and unpickle what it finds, so whoever can write to the file
could run code (CVE-2025-69872); the `Disk` used here refuses both. Nothing here is ever evicted.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import MODE_PICKLE

from ftpvfs import paths
from ftpvfs.errors import failure

# Longer than any transaction of ours under load; after it a caller hears EBUSY instead of waiting for ever.
LOCK_TIMEOUT = 60.0
# A remembered modification time that nobody asked for in this time costs one request again.
MTIME_KEPT = 30 * 86400.0


class RecordDisk(diskcache.Disk):  # type: ignore[misc]
    """Keys are text, values bytes; whatever else is written or found is refused."""

    def put(self, key: Any) -> Any:
        if not isinstance(key, str):
            raise TypeError(f"{key!r} is no text")
        return super().put(key)

    def get(self, key: Any, raw: bool) -> Any:
        if not raw:
            raise sqlite3.DataError("a pickled key stands in the index")
        return super().get(key, raw)

    def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> Any:
        if not isinstance(value, bytes) or read:
            raise TypeError("the index holds bytes alone")
        return super().store(value, read, key)

    def fetch(self, mode: int, filename: str, value: Any, read: bool) -> Any:
        if mode == MODE_PICKLE:
            raise sqlite3.DataError("a pickled value stands in the index")
        return super().fetch(mode, filename, value, read)


class Index:
    """The records of one store. Any thread, any process; made after a fork.

    What a method has written is in the index for all processes, and on the disk, when it returns.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _errors():
                self._cache = diskcache.Cache(
                    str(folder),
                    disk=RecordDisk,
                    timeout=LOCK_TIMEOUT,
                    eviction_policy="none",
                    cull_limit=0,
                    sqlite_synchronous=2,  # FULL: what was acknowledged survives a power cut
                )
        except OSError as error:
            raise failure(
                error.errno or errno.EIO, str(folder), f"The cache folder cannot be used: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Release the database."""
        self._cache.close()

    # --- made folders: what MKD made on a store that has no folders

    def made_folders(self, parent: str) -> set[str]:
        """Return the names of the folders made in `parent`."""
        return set(self._read(f"made:{parent}") or ())

    def is_made(self, path: str) -> bool:
        """Tell whether the folder was made here."""
        parent, name = paths.split(path)
        return name in self.made_folders(parent)

    def add_folder(self, path: str) -> None:
        """Remember that the folder exists."""
        parent, name = paths.split(path)
        if name not in self.made_folders(parent):
            self._change_made(parent, add={name}, drop=set())

    def drop_folder(self, path: str) -> None:
        """Forget the folder and all that was made below it."""
        with self._transaction():
            for made in list(self._made_below(path)):
                self._delete(f"made:{made}")
            parent, name = paths.split(path)
            self._change_made(parent, add=set(), drop={name})

    def move_folder(self, source: str, target: str) -> None:
        """Rename the folder and all that was made below it."""
        with self._transaction():
            moved = [(paths.rebase(below, source, target), self.made_folders(below)) for below in self._made_below(source)]
            self.drop_folder(source)
            for path, names in moved:
                self._change_made(path, add=names, drop=set())
            self.add_folder(target)

    def _made_below(self, path: str) -> Iterator[str]:
        """Yield the folders at or below `path` in which others were made."""
        if self._read(f"made:{path}") is None:
            return
        yield path
        for name in self.made_folders(path):
            yield from self._made_below(paths.join(path, name))

    def _change_made(self, parent: str, *, add: set[str], drop: set[str]) -> None:
        with self._transaction():
            names = (self.made_folders(parent) | add) - drop
            if names:
                self._write(f"made:{parent}", sorted(names))
            else:
                self._delete(f"made:{parent}")

    # --- modification times that the store's listing does not tell

    def mtimes(self, folder: str) -> dict[str, tuple[str | None, float]]:
        """Return name -> (fingerprint, mtime) of what is remembered of a folder."""
        return {name: (known[0], known[1]) for name, known in (self._read(f"mtimes:{folder}") or {}).items()}

    def remember_mtimes(self, folder: str, known: Mapping[str, tuple[str | None, float]]) -> None:
        """Replace what is remembered of a folder."""
        self._write(f"mtimes:{folder}", known, expire=MTIME_KEPT)

    def remember_mtime(self, path: str, fingerprint: str | None, mtime: float) -> None:
        """Add one file's time to what is remembered of its folder."""
        folder, name = paths.split(path)
        with self._transaction():
            self.remember_mtimes(folder, {**self.mtimes(folder), name: (fingerprint, mtime)})

    def expire(self) -> None:
        """Drop the records whose time is over."""
        with _errors():
            self._cache.expire(retry=True)

    # --- records

    def _read(self, key: str) -> Any:
        with _errors():
            value = self._cache.get(key, retry=True)
        return None if value is None else json.loads(value)

    def _write(self, key: str, value: Any, expire: float | None = None) -> None:
        data = json.dumps(value, ensure_ascii=True).encode()
        with _errors():
            self._cache.set(key, data, expire=expire, retry=True)

    def _delete(self, key: str) -> None:
        with _errors():
            self._cache.delete(key, retry=True)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Make all writes inside visible at once. Short: no other process can write meanwhile."""
        with _errors(), self._cache.transact(retry=True):
            yield


@contextmanager
def _errors() -> Iterator[None]:
    """SQLite's and diskcache's failures as OSErrors."""
    try:
        yield
    except diskcache.Timeout as error:
        raise OSError(errno.EBUSY, "The index is locked by another process") from error
    except sqlite3.Error as error:
        raise OSError(errno.EIO, f"The index cannot be used: {error}") from error


def cache_name(identity: Iterable[str]) -> str:
    """Return the folder name for a store, from its protocol and path alone, so that changed options keep it.

    >>> cache_name(["s3", "bucket/prefix"])
    's3-bucket_prefix'
    """
    text = "-".join(part.strip("/").replace("/", "_") for part in identity)
    safe = "".join(letter if letter.isalnum() or letter in "-_." else f"%{ord(letter):x}" for letter in text)
    return os.fsdecode(os.fsencode(safe)[-200:]) or "root"
