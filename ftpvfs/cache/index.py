"""What must outlive a process and be the same for all of them: small records on diskcache, one SQLite file.

Records are JSON. diskcache would pickle what it does not know and unpickle what it finds, so whoever can write to the
file could run code (CVE-2025-69872); the `Disk` used here refuses both. Nothing here is ever evicted.

All that is in here can be had again, at the price of asking or of making a folder once more. So a damaged database is
moved aside, with an error in the log, and a new one is begun; a damaged record is dropped.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import sqlite3
import string
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import diskcache
from diskcache.core import MODE_PICKLE

from ftpvfs import paths
from ftpvfs.errors import failure
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)
T = TypeVar("T")
Known = dict[str, tuple[str | None, float]]

# Longer than any transaction of ours under load; after it a caller hears EBUSY instead of waiting for ever.
LOCK_TIMEOUT = 60.0
# A remembered modification time costs one request again after this time; until then its record takes space.
MTIME_KEPT = 30 * 86400.0
# Times that were set are spread over so many records a folder, so that setting one does not write those of all files.
SLOTS = 16
# diskcache would keep larger values in files beside the database, which no transaction covers.
ALWAYS_IN_DATABASE = 2**31
DATABASE = "cache.db"
# Seconds that a fork waits for a thread inside SQLite: longer than a transaction, shorter than anybody's patience.
FORK_PATIENCE = 5.0
# Letters of a store's folder name; beyond them a digest tells stores apart.
LONGEST_NAME = 150
PLAIN = frozenset(f"{string.ascii_letters}{string.digits}-.".encode())


class _ForkGate:
    """Lets no fork happen while a thread is inside SQLite.

    SQLite has locks of its own for the whole process. A child that is forked while another thread holds one would wait
    for it for ever, in its own first use of the index. Made at import because it must know every index of the process.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew, in a child."""
        self._changed = threading.Condition()
        self._inside = 0
        self._is_forking = False

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_forking)
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until nobody is inside; a fork is late rather than never where somebody waits for another process."""
        with self._changed:
            self._is_forking = True
            self._changed.wait_for(lambda: not self._inside, timeout=FORK_PATIENCE)

    def open(self) -> None:
        """Let everybody in again, in the parent."""
        with self._changed:
            self._is_forking = False
            self._changed.notify_all()


_gate = _ForkGate()
os.register_at_fork(before=_gate.close, after_in_parent=_gate.open, after_in_child=_gate.reset)


class ForeignRecord(Exception):
    """Something that we did not write stands in the database."""


class RecordDisk(diskcache.Disk):
    """Keys are text, values bytes; whatever else is written or found is refused."""

    def put(self, key: Any) -> Any:
        if not isinstance(key, str):
            raise TypeError(f"{key!r} is no text")
        return super().put(key)

    def get(self, key: Any, raw: bool) -> Any:
        if not raw:
            raise ForeignRecord("a pickled key")
        return super().get(key, raw)

    def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> Any:
        if not isinstance(value, bytes) or read:
            raise TypeError("the index holds bytes alone")
        return super().store(value, read, key)

    def fetch(self, mode: int, filename: str, value: Any, read: bool) -> Any:
        if mode == MODE_PICKLE:
            raise ForeignRecord("a pickled value")
        return super().fetch(mode, filename, value, read)


class Index:
    """The records of one store. Any thread, any process; made after a fork.

    What a method has written is in the index for all processes, and on the disk, when it returns.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database = folder / DATABASE
        self._lock = threading.Lock()
        self._thread = threading.local()
        try:
            with _gate:
                self._cache, self._inode = self._open()
        except OSError as error:
            reason = f"The cache folder cannot be used: {error.strerror}"
            raise failure(error.errno or errno.EIO, str(folder), reason) from error

    def _open(self) -> tuple[Any, int]:
        """Return the database and its file's number, by which a new one in its place is noticed."""
        _make_private(self._folder)
        with _exclusive(self._folder), _errors():
            damage = self._damage()
            if damage is not None:
                self._set_aside(damage)
            return self._connect(), self._database.stat().st_ino

    def _damage(self) -> str | None:
        """Return what is wrong with the database file; None where it is sound, or not there."""
        if not self._database.exists():
            return None
        connection = sqlite3.connect(self._database, timeout=LOCK_TIMEOUT)
        try:
            found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
            return None if found == "ok" else found
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            return str(error)
        finally:
            connection.close()

    def _connect(self) -> Any:
        cache = diskcache.Cache(
            str(self._folder),
            disk=RecordDisk,
            disk_min_file_size=ALWAYS_IN_DATABASE,
            timeout=LOCK_TIMEOUT,
            eviction_policy="none",
            cull_limit=0,
            sqlite_synchronous=2,  # FULL: what was acknowledged survives a power cut
        )
        cache.expire()
        return cache

    def _set_aside(self, damage: str) -> None:
        """Move the damaged database out of the way; nothing is deleted."""
        now = datetime.now(timezone.utc)
        aside = self._folder / f"damaged-{now:%Y%m%d-%H%M%S-%f}"
        aside.mkdir(mode=0o700)
        for file in self._folder.glob(DATABASE + "*"):
            file.rename(aside / file.name)
        logger.error(
            "The index in %s is damaged (%s). It is in %s now and a new one is begun: folders that were made here and"
            " are still empty are forgotten, modification times are asked of the store again",
            self._folder, damage, aside,
        )  # fmt: skip

    def close(self) -> None:
        """Release the database."""
        with _gate:
            self._cache.close()

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

    # --- records

    def _read(self, key: str) -> Any:
        try:
            value = self._run(lambda: self._cache.get(_stored(key)))
            return None if value is None else json.loads(value)
        except (ForeignRecord, ValueError) as error:
            logger.error("The record %r of the index in %s is dropped: %s", key, self._folder, error)  # noqa: TRY400
            self._delete(key)
            return None

    def _write(self, key: str, value: Any, expire: float | None = None) -> None:
        about_to_wait(Wait.DISK)
        data = json.dumps(value, ensure_ascii=True).encode()
        self._run(lambda: self._cache.set(_stored(key), data, expire=expire))

    def _delete(self, key: str) -> None:
        about_to_wait(Wait.DISK)
        self._run(lambda: self._cache.delete(_stored(key)))

    def _keys(self, prefix: str) -> list[str]:
        try:
            return self._run(lambda: [_original(key) for key in self._cache if key.startswith(prefix)])
        except ForeignRecord as error:
            raise OSError(errno.EIO, f"The index in {self._folder} has {error} in it") from error

    def _atomically(self, change: Callable[[], T]) -> T:
        """Make all writes of `change` visible at once. Short: no other process can write meanwhile."""
        about_to_wait(Wait.DISK)

        def transaction() -> T:
            with self._cache.transact():
                return change()

        return self._run(transaction)

    def _run(self, operation: Callable[[], T]) -> T:
        """Run an operation on the database; once more, on a new one, where it turns out to be damaged."""
        if getattr(self._thread, "is_running", False):
            return operation()  # the outermost sees to it
        self._thread.is_running = True
        try:
            with _gate, _errors():
                self._reopen_if_replaced()
                cache = self._cache
                try:
                    return operation()
                except sqlite3.DatabaseError as error:
                    if not _is_damage(error):
                        raise
                    self._reopen(cache)
                return operation()
        finally:
            self._thread.is_running = False

    def _reopen_if_replaced(self) -> None:
        """Follow another process that has set a damaged database aside, or a user who has emptied the cache folder."""
        cache = self._cache
        try:
            if os.stat(self._database).st_ino == self._inode:
                return
        except FileNotFoundError:
            pass
        self._reopen(cache)

    def _reopen(self, old: Any) -> None:
        with self._lock:
            if self._cache is old:  # else another thread has done so
                old.close()
                self._cache, self._inode = self._open()


def _make_private(folder: Path) -> None:
    """Make the folder; nobody else may look into it, nor put there what we would believe."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if os.geteuid() not in (0, status.st_uid):
        raise PermissionError(errno.EPERM, "it belongs to another user")
    if status.st_mode & 0o077:
        folder.chmod(0o700)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Be the only one, of all processes, who opens or replaces the database."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_damage(error: sqlite3.Error) -> bool:
    """Tell damage from a full disk, a lock and the like, for which sqlite3 has classes of their own."""
    return type(error) is sqlite3.DatabaseError


def _stored(key: str) -> str:
    """Return the key as SQLite can have it: it refuses the names that are no UTF-8, which a client may send."""
    return paths.encoded(key).decode("latin-1")


def _original(stored: str) -> str:
    return stored.encode("latin-1").decode("utf-8", "surrogateescape")


def _slot(name: str) -> int:
    return zlib.crc32(paths.encoded(name)) % SLOTS


def _known(record: Any) -> Known:
    return {name: (known[0], known[1]) for name, known in (record or {}).items()}


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
    text = "-".join("_".join(map(_safe, part.strip("/").split("/"))) for part in identity)
    safe = text if len(text) <= LONGEST_NAME else f"{text[:80]}-{blake2b(paths.encoded(text)).hexdigest()[:32]}"
    return safe or "root"


def _safe(name: str) -> str:
    """Return the name for use in a file's name; different ones stay different."""
    return "".join(chr(byte) if byte in PLAIN else f"%{byte:02x}" for byte in paths.encoded(name))
