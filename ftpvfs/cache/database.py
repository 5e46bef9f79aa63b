"""A database of small records on diskcache, one SQLite file that processes share, and what happens when it is damaged.

Records are bytes. diskcache would pickle what it does not know and unpickle what it finds, so whoever can write to the
file could run code (CVE-2025-69872); the `Disk` used here refuses both. Nothing here is ever evicted.

A damaged database is moved aside, with an error in the log, and a new one is begun; a damaged record is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import diskcache
from diskcache.core import MODE_PICKLE

from ftpvfs import paths
from ftpvfs.coordination.folders import private_folder, unusable
from ftpvfs.coordination.lockfile import lock
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Longer than any transaction of ours under load; after it a caller hears EBUSY instead of waiting for ever.
LOCK_TIMEOUT = 60.0
# diskcache would keep larger values in files beside the database, which no transaction covers.
ALWAYS_IN_DATABASE = 2**31
DATABASE = "cache.db"
# What a database needs at most for some changes when the disk is full: a log of its own, and a few pages.
BALLAST, BALLAST_SIZE = "ballast", 512 * 1024
ROOM_FOR_SHARED_MEMORY = 64 * 1024
# Seconds that a fork waits for a thread inside SQLite: longer than a transaction, shorter than anybody's patience.
FORK_PATIENCE = 5.0
# SQLite's words for when a commit is on the disk: FULL, when it returns; NORMAL, at the next checkpoint.
FULL, NORMAL = 2, 1
# SQLite's words; its number for it is known from Python 3.11 on.
FULL_DISK = "disk is full"
# And for what is no damage but a disk, a lock or a right; all else comes of flipped bits in what describes a table.
NO_DAMAGE = ("lock", "busy", FULL_DISK, "unable to open", "readonly", "I/O error", "interrupted", "memory")
# What comes of such bits in SQLite's messages, and in diskcache's own settings.
ODD = (UnicodeDecodeError, TypeError, AttributeError, LookupError)


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
            if self._is_forking:
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


class Database:
    """The records of one folder. Any thread, any process; made after a fork.

    What a method has written is there for all processes when it returns; where `durable`, it is on the disk, too, and
    survives a power cut.
    """

    # For the log: what this is, and what it means to lose it.
    what: ClassVar[str] = "database"
    loss: ClassVar[str] = "what was in it is lost"
    # The check of the file as it is opened; the thorough one compares SQLite's own indexes with the table, too.
    check: ClassVar[str] = "quick_check"

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder
        self._durable = durable
        self._database = folder / DATABASE
        self._lock = threading.Lock()
        # Held by who writes: waiting here is fairer and shorter than SQLite's own sleep and try again.
        self._turn = threading.RLock()
        self._thread = threading.local()
        self._inode = 0
        # How often another database has taken the place of the one that was open.
        self.replaced = 0
        try:
            with _gate:
                self._cache, self._inode = self._open()
        except OSError as error:
            raise unusable(folder, error) from error

    def _open(self, damage: str | None = None) -> tuple[Any, int]:
        """Return the database and its file's number, by which a new one in its place is noticed.

        `damage` is what was wrong with the one that was open.
        """
        try:
            opened = self._open_once(damage)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self.drop_ballast():
                raise
            return self._open_once(damage)
        self.keep_ballast()
        return opened

    def keep_ballast(self) -> None:
        """Keep some space for the time when the disk is full, and dirty files must still be stored or deleted."""
        ballast = self._folder / BALLAST
        with contextlib.suppress(OSError):  # where there is no room for it now, there may be later
            if not ballast.exists() and shutil.disk_usage(self._folder).free > 4 * BALLAST_SIZE:
                ballast.write_bytes(bytes(BALLAST_SIZE))

    def drop_ballast(self) -> bool:
        """Give the space that was kept; tell whether there was some."""
        try:
            (self._folder / BALLAST).unlink()
        except FileNotFoundError:
            return False
        logger.warning("The disk of %s is full; the last of it is used to store and delete files", self._folder)
        return True

    def _open_once(self, damage: str | None) -> tuple[Any, int]:
        private_folder(self._folder)
        with _exclusive(self._folder), _errors(self._folder):
            damage = self._damage() or (damage if self._is_in_place() else None)
            if damage is not None:
                self._set_aside(damage)
            is_new = not self._database.exists()
            try:
                cache = self._connect()
            except (sqlite3.DatabaseError, *ODD) as error:
                if not _is_damage(error):
                    raise
                self._set_aside(str(error))
                is_new, cache = True, self._connect()
            if is_new:
                self._be_durable(cache)
                with cache.transact():
                    for key, value in self._refill().items():
                        cache.set(_stored(key), value)
            return cache, self._database.stat().st_ino

    def _refill(self) -> Mapping[str, bytes]:
        """Return what a new database begins with: what can be had again from elsewhere. No other process is in."""
        return {}

    def _damage(self) -> str | None:
        """Return what is wrong with the database file; None where it is sound, or not there."""
        if not self._database.exists():
            return None
        connection = sqlite3.connect(self._database, timeout=LOCK_TIMEOUT)
        connection.text_factory = bytes  # what is damaged is no text
        try:
            found = connection.execute(f"PRAGMA {self.check}(1)").fetchone()[0].decode(errors="replace")
            return None if found == "ok" else str(found)
        except (sqlite3.DatabaseError, *ODD) as error:
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
            # For its own settings, which are written one by one and hurt nobody when lost; ours: `_be_durable`.
            sqlite_synchronous=NORMAL,
            sqlite_mmap_size=0,  # a mapped file that somebody cuts short would end the process
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
            "The %s in %s is damaged (%s). It is in %s now and a new one is begun: %s",
            self.what, self._folder, damage, aside, self.loss,
        )  # fmt: skip

    def close(self) -> None:
        """Release the database."""
        with _gate:
            self._cache.close()

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
        self._put(key, json.dumps(value, ensure_ascii=True).encode(), expire)

    def _get(self, key: str) -> bytes | None:
        """Return the bytes of a record; None where there is none, ForeignRecord where somebody else has put it."""
        value = self._run(lambda: self._cache.get(_stored(key)))
        if value is None or isinstance(value, bytes):
            return value
        raise ForeignRecord("text or a number")

    def _put(self, key: str, data: bytes, expire: float | None = None) -> None:
        about_to_wait(Wait.DISK)
        with self._turn:
            self._run(lambda: self._cache.set(_stored(key), data, expire=expire))

    def _delete(self, key: str) -> None:
        about_to_wait(Wait.DISK)
        with self._turn:
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

        with self._turn:
            return self._run(transaction)

    def _run(self, operation: Callable[[], T]) -> T:
        """Run an operation on the database; once more, on a new one, where it turns out to be damaged."""
        if getattr(self._thread, "is_running", False):
            return operation()  # the outermost sees to it
        self._thread.is_running = True
        try:
            with _gate, _errors(self._folder):
                self._reopen_if_replaced()
                cache = self._cache
                try:
                    self._be_durable(cache)
                    return operation()
                except (sqlite3.DatabaseError, *ODD) as error:
                    if not _is_damage(error):
                        raise
                    self._reopen(cache, str(error))
                self._be_durable(self._cache)
                return operation()
        finally:
            self._thread.is_running = False

    def _be_durable(self, cache: Any) -> None:
        """Make this thread's connection as durable as it is to be; diskcache's own settings are for all processes."""
        if getattr(self._thread, "connected_to", None) is not cache:
            cache.reset("sqlite_synchronous", FULL if self._durable else NORMAL, update=False)
            self._thread.connected_to = cache

    def begin_anew(self, damage: str) -> None:
        """Set the database aside: what is in it turned out to be damaged."""
        with _gate, _errors(self._folder):
            self._reopen(self._cache, damage)

    def _reopen_if_replaced(self) -> None:
        """Follow another process that has set a damaged database aside, or a user who has emptied the cache folder."""
        cache = self._cache
        if not self._is_in_place():
            self._reopen(cache)

    def _is_in_place(self) -> bool:
        """Tell whether the database that is open is the one in the folder."""
        try:
            return os.stat(self._database).st_ino == self._inode
        except FileNotFoundError:
            return False

    def _reopen(self, old: Any, damage: str | None = None) -> None:
        about_to_wait(Wait.DISK)  # the new one is looked through, or made
        with self._lock:
            if self._cache is old:  # else another thread has done so
                old.close()
                self._cache, self._inode = self._open(damage)
                self.replaced += 1


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Be the only one, of all processes, who opens or replaces the database."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_damage(error: Exception) -> bool:
    """Tell damage from a full disk, a lock and the like, for which sqlite3 has classes of their own.

    What SQLite says about damage may not even be text.
    """
    if isinstance(error, sqlite3.OperationalError):
        return not any(words in str(error) for words in NO_DAMAGE)
    return type(error) is sqlite3.DatabaseError or isinstance(error, ODD)


def _stored(key: str) -> str:
    """Return the key as SQLite can have it: it refuses the names that are no UTF-8, which a client may send."""
    return paths.encoded(key).decode("latin-1")


def _original(stored: str) -> str:
    return stored.encode("latin-1").decode("utf-8", "surrogateescape")


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    """SQLite's and diskcache's failures as OSErrors."""
    try:
        yield
    except diskcache.Timeout as error:
        raise OSError(errno.EBUSY, "The index is locked by another process") from error
    except sqlite3.Error as error:
        code = errno.ENOSPC if _is_full(error, folder) else errno.EIO
        raise OSError(code, f"The index cannot be used: {error}") from error


def _is_full(error: sqlite3.Error, folder: Path) -> bool:
    """Tell whether the disk is full; that it cannot make its shared memory there SQLite calls an I/O error."""
    if FULL_DISK in str(error):
        return True
    return "I/O error" in str(error) and shutil.disk_usage(folder).free < ROOM_FOR_SHARED_MEMORY
