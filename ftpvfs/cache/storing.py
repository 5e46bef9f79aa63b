"""What is done at the store for one dirty path: upload or delete, and what follows when somebody else was there.

One writer of a path at a time in all processes: the path is held from the first request to the last answer. A request
whose answer did not come may still be carried out later. Where it is known which version an upload replaces it is
conditional, so that a late one does not replace what came after it. Where it is not, and for deletions, that is no
help: what is done while such a request may still be carried out is looked at once more before it counts. (On an object
store that knows no conditions the backend looks before it sends: there a late upload may still win.)
"""

from __future__ import annotations

import enum
import errno
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Protocol

from ftpvfs import paths
from ftpvfs.backend.backend import ABSENT, ANY, Backend, Condition, Entry, FileUpload
from ftpvfs.cache.records import DirtyRecord
from ftpvfs.cache.uploadlog import UploadLog, Version
from ftpvfs.clock import Clock
from ftpvfs.coordination.locks import PathLocks
from ftpvfs.errors import ECHANGED, ENOSTORE, failure

logger = logging.getLogger(__name__)

# Seconds for which a request whose answer is lost may still be carried out. A guess: stores work on what they have
# received for moments, proxies in between for seconds.
SETTLED_AFTER = 5.0
# Paths of which the version that the store last got from here is remembered.
VERSIONS_KEPT = 10_000
# Larger files are compared with the store before they are sent, and not only as they are published.
LOOK_FIRST = 16 * 2**20
# Names beside a path that are tried for a file that conflicts with it.
MOST_NAMES = 1000
# Bytes of UTF-8 in a name and in a path that all stores take.
LONGEST_NAME, LONGEST_PATH = 255, 1024
BLOCK = 2**20
# What no store calls a version.
NO_VERSION = ""
# After these nobody needs to wonder whether the store did what it was asked for.
REFUSALS = {ECHANGED, ENOSTORE, errno.ECANCELED, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EINVAL, errno.EROFS,
            errno.EFBIG, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ENOSPC, errno.ELOOP}  # fmt: skip


class Outcome(enum.Enum):
    """What became of a path's turn."""

    NOTHING = "nothing was to be done"
    STORED = "the store has the file"
    DELETED = "the store has nothing any more"
    LEFT = "the store keeps what somebody else has put there"
    BESIDE = "the file is stored beside what somebody else has put there"
    SUPERSEDED = "there is something newer to be done"
    SETTLING = "it is done, and looked at once more when a late request cannot undo it any more"


class File(Protocol):
    """What an upload needs of an open item."""

    @property
    def descriptor(self) -> int:
        """The data file."""

    def release(self) -> None:
        """Give the item back."""


class DirtyFiles(Protocol):
    """What write-back needs of the cache."""

    def all_dirty(self) -> list[DirtyRecord]:
        """Return what is to be done."""

    @property
    def is_any_dirty(self) -> bool:
        """Whether anything is to be done."""

    def dirty_changes(self) -> set[str] | None:
        """Return the paths at which something else may be to be done since the last call; None: at any of them."""

    def ignore_dirty_changes(self) -> None:
        """Forget who asked for changes."""

    def dirty(self, path: str) -> DirtyRecord | None:
        """Return what is to be done at a path."""

    def open_dirty(self, record: DirtyRecord) -> File:
        """Open a record's data file; ENOENT where it is not the newest."""

    def begin(self, record: DirtyRecord) -> bool:
        """Note durably that the store is about to be changed; False where the record is not the newest."""

    def uploaded(self, record: DirtyRecord, entry: Entry) -> bool:
        """Note that the store has the file; False where there is a newer record."""

    def deleted(self, record: DirtyRecord) -> None:
        """Note that the store has nothing at the path."""

    def failed(self, record: DirtyRecord, error: OSError, due: float) -> None:
        """Note that it did not work, and when it is tried again."""

    def forget_item(self, path: str) -> None:
        """Drop what is cached of a clean path."""

    def wants_stored(self) -> bool:
        """Tell whether all that is to be done should be done at once, to make room."""


class Turn:
    """One path's turn: what is sent at the moment, and whether it still should be. Any thread."""

    def __init__(self, path: str) -> None:
        self.path = path
        # What this turn works on; set by the one thread that does.
        self.record: DirtyRecord | None = None
        self._lock = threading.Lock()
        # Protected by _lock.
        self._upload: FileUpload | None = None
        self._is_cancelled = False

    def is_cancelled(self) -> bool:
        """Tell whether `cancel` was called."""
        return self._is_cancelled

    @property
    def sent(self) -> int:
        """Bytes that are on their way or at the store."""
        upload = self._upload
        return upload.sent if upload is not None else 0

    def send(self, upload: FileUpload) -> Entry:
        """Send a file, unless the turn is called off."""
        with self._lock:
            self._upload = upload
            if self._is_cancelled:
                upload.cancel()
        return upload.send()

    def cancel(self) -> None:
        """Call the turn off; what is under way ends at the next part, or as it would."""
        with self._lock:
            self._is_cancelled = True
            if self._upload is not None:
                self._upload.cancel()


class Storing:
    """Brings the store to what the cache wants of it, one path at a time. Any thread.

    `changed(path, entry)` says what the store has by now, before the record goes and after it; `stored(record, path,
    entry)` says that a file has got there.
    `timed` returns the entry with the modification time that the file was given, where the store cannot keep one.
    """

    def __init__(
        self,
        cache: DirtyFiles,
        backend: Backend,
        *,
        locks: PathLocks,
        log: Callable[[], UploadLog],
        policy: str,
        clock: Clock,
        changed: Callable[[str, Entry | None], None],
        stored: Callable[[DirtyRecord, str, Entry], None],
        timed: Callable[[str, Entry, float], Entry],
    ) -> None:
        self._cache = cache
        self._backend = backend
        self._locks = locks
        self._log = log
        self._policy = policy
        self._clock = clock
        self._changed = changed
        self._timed = timed
        self._stored = stored
        self._lock = threading.Lock()
        # Protected by _lock. When a request last ended without an answer, by path.
        self._doubtful: dict[str, float] = {}
        # Paths of which an upload was sent that replaces whatever is there.
        self._unconditional: set[str] = set()
        # What was stored while such a request may still come: the generation of the record, and what the store has.
        self._unsettled: dict[str, tuple[int, Entry]] = {}
        # Versions that may have got to the store although nobody said so, by path.
        self._sent: dict[str, list[Version]] = {}
        # Fingerprints of what the store last got from here, by path; None where that was a deletion.
        self._left: dict[str, str | None] = {}

    def doubt(self, path: str, *, is_conditional: bool = True) -> None:
        """Reckon with a request that is under way still: of a process that was killed, or whose answer is lost."""
        with self._lock:
            self._doubtful[path] = self._clock.monotonic()
            if not is_conditional:
                self._unconditional.add(path)

    def bring(self, turn: Turn) -> Outcome:
        """Do what is to be done at the path. Raises what the store says; nothing is under way any more on return."""
        with self._locks.hold_in_folders(turn.path):
            record = self._cache.dirty(turn.path)
            if record is None:
                return Outcome.NOTHING
            turn.record = record
            if turn.is_cancelled() or not self._cache.begin(record):
                return Outcome.SUPERSEDED
            try:
                return self._delete(record) if record.is_tombstone else self._upload(record, turn)
            except OSError as error:
                if error.errno == errno.ECANCELED and turn.is_cancelled():
                    return Outcome.SUPERSEDED
                if error.errno not in REFUSALS:
                    self.doubt(record.path)
                raise

    # --- uploads

    def _upload(self, record: DirtyRecord, turn: Turn) -> Outcome:
        try:
            item = self._cache.open_dirty(record)
        except FileNotFoundError as error:
            now = self._cache.dirty(record.path)
            if now is not None and now.generation == record.generation:
                raise failure(errno.EIO, record.path, "Its bytes are gone from the cache folder") from error
            return Outcome.SUPERSEDED
        try:
            return self._settled(record) or self._send(record, item.descriptor, turn)
        finally:
            item.release()

    def _settled(self, record: DirtyRecord) -> Outcome | None:
        """Look at what was stored once more; None where it was replaced by a late request, and is to be sent again."""
        with self._lock:
            generation, entry = self._unsettled.pop(record.path, (None, None))
        if entry is None or generation != record.generation:
            return None
        found = self._found(record.path)
        is_there = found is not None and (found.size, found.fingerprint) == (entry.size, entry.fingerprint)
        if not is_there and (self._policy == "overwrite" or self._is_ours(record.path, found)):
            logger.warning("%r was replaced by an upload whose answer was lost, and is stored again", record.path)
            return None
        return self._is_stored(record, entry)

    def _send(self, record: DirtyRecord, descriptor: int, turn: Turn) -> Outcome:
        replaces = _condition(record)
        try:
            if record.size > LOOK_FIRST:
                self._backend.require(record.path, replaces)
            entry = self._put(record, descriptor, turn, replaces)
        except OSError as error:
            if error.errno != ECHANGED or replaces is ANY:
                raise
            return self._send_in_conflict(record, descriptor, turn)
        return self._is_stored(record, entry)

    def _put(self, record: DirtyRecord, descriptor: int, turn: Turn, replaces: Condition) -> Entry:
        self._note_sent(record, descriptor)
        if replaces is ANY:
            with self._lock:
                self._unconditional.add(record.path)
        try:
            return self._put_at(record.path, record, descriptor, turn, replaces)
        except FileNotFoundError:
            if not self._backend.capability.real_directories or "/" not in record.path:
                raise
            self._make_folder(paths.split(record.path)[0])
            return self._put_at(record.path, record, descriptor, turn, replaces)

    def _put_at(
        self, path: str, record: DirtyRecord, descriptor: int, turn: Turn, replaces: Condition
    ) -> Entry:
        upload = self._backend.upload_file(path, descriptor, record.size, mtime=record.mtime, replaces=replaces)
        return turn.send(upload)

    def _make_folder(self, path: str) -> None:
        """Make a folder that somebody has removed under a file that waits, and those above it."""
        for folder in reversed([path, *paths.ancestors(path)]):
            if folder:
                try:
                    self._backend.mkdir(folder)
                except OSError as error:
                    if error.errno != errno.EEXIST and not self._is_folder(folder):
                        raise

    def _is_folder(self, path: str) -> bool:
        found = self._found(path)
        return found is not None and found.is_dir

    def _is_stored(self, record: DirtyRecord, entry: Entry) -> Outcome:
        if record.path in self._unconditional and self._may_come_back(record.path):
            with self._lock:
                self._unsettled[record.path] = (record.generation, entry)
            return Outcome.SETTLING
        entry = self._timed(record.path, entry, record.mtime)
        self._stored(record, record.path, entry)
        self._changed(record.path, entry)  # so that nobody who is just listing sees neither the record nor the object
        is_newest = self._cache.uploaded(record, entry)
        self._has_got(record.path, entry)
        self._changed(record.path, entry)
        return Outcome.STORED if is_newest else Outcome.SUPERSEDED

    # --- conflicts

    def _send_in_conflict(self, record: DirtyRecord, descriptor: int, turn: Turn) -> Outcome:
        found = self._found(record.path)
        replaces: Condition | None
        if self._is_ours(record.path, found):
            replaces = ABSENT if found is None else found.fingerprint or ANY
        else:
            replaces = allowed_in_conflict(self._policy, record.path, found)
        if replaces is None:
            assert found is not None
            return self._send_beside(record, descriptor, turn, found)
        return self._is_stored(record, self._put(record, descriptor, turn, replaces))

    def _send_beside(self, record: DirtyRecord, descriptor: int, turn: Turn, found: Entry) -> Outcome:
        """Store the file under another name; the name is the same after a crash."""
        beside, entry = self._put_beside(record, descriptor, turn)
        tell_of_beside(record.path, beside)
        self._stored(record, beside, entry)
        # The entry is another path's, so that nobody takes the bytes for what the store has at this one.
        is_newest = self._cache.uploaded(record, entry)
        if is_newest:
            self._cache.forget_item(record.path)
        self._forget_sent(record.path)
        self._changed(beside, entry)
        self._changed(record.path, found)
        return Outcome.BESIDE if is_newest else Outcome.SUPERSEDED

    def _put_beside(self, record: DirtyRecord, descriptor: int, turn: Turn) -> tuple[str, Entry]:
        """Store the file under the first name that is free, or where an earlier try has put it."""
        version = self._version(record, descriptor)
        for number in range(1, MOST_NAMES):
            beside = conflict_name(record.path, record.since, number)
            try:
                return beside, self._put_at(beside, record, descriptor, turn, ABSENT)
            except OSError as error:
                if error.errno != ECHANGED:
                    raise
            found = self._found(beside)
            if found is not None and not found.is_dir and self._is_any_of(found, beside, [version]):
                return beside, found
        raise failure(errno.EEXIST, record.path, "There is no free name beside it for what conflicts with it")

    def _found(self, path: str) -> Entry | None:
        try:
            return self._backend.stat(path)
        except FileNotFoundError:
            return None

    def _is_ours(self, path: str, found: Entry | None) -> bool:
        """Tell whether the store has what it last got from here, or a version that was sent and whose answer was lost.

        A file may have been opened for writing when the store had yet another version, before an earlier upload.
        """
        if found is not None and found.is_dir:
            return False
        with self._lock:
            if path in self._left and self._left[path] == (None if found is None else found.fingerprint or NO_VERSION):
                return True
            known = list(self._sent.get(path, ()))
        if found is None:
            return False
        if self._policy != "overwrite":
            known += self._log().sent(path)
        return self._is_any_of(found, path, known)

    def _is_any_of(self, found: Entry, path: str, versions: list[Version]) -> bool:
        """Tell an object by its length and time; where the store keeps no times, by its bytes."""
        alike = [version for version in versions if version[0] == found.size]
        if self._backend.capability.sets_mtime:
            return found.mtime is not None and any(abs(found.mtime - mtime) < 1e-6 for _, mtime, _ in alike)
        digests = {digest for _, _, digest in alike if digest}
        return bool(digests) and self._digest_at_store(path, found) in digests

    def _digest_at_store(self, path: str, found: Entry) -> str:
        hasher = hashlib.blake2b()
        for start in range(0, found.size, BLOCK):
            stop = min(start + BLOCK, found.size)
            for piece in self._backend.fetch(path, start, stop, found.fingerprint).result():
                hasher.update(piece)
        return hasher.hexdigest()

    def _version(self, record: DirtyRecord, descriptor: int) -> Version:
        """Return by what a file can be told at the store; hashing it is left out where nothing depends on it."""
        if self._backend.capability.sets_mtime or self._policy == "overwrite":
            return record.size, record.mtime, ""
        hasher = hashlib.blake2b()
        for start in range(0, record.size, BLOCK):
            hasher.update(os.pread(descriptor, BLOCK, start))
        return record.size, record.mtime, hasher.hexdigest()

    def _note_sent(self, record: DirtyRecord, descriptor: int) -> None:
        """Remember what is about to be sent; on the disk where a mistake would be more than a line in the log."""
        version = self._version(record, descriptor)
        with self._lock:
            known = self._sent.setdefault(record.path, [])
            if version not in known:
                known.append(version)
        if self._policy != "overwrite":
            try:
                self._log().add_sent(record.path, version)
            except OSError as error:  # the disk is full: what is stored makes room
                logger.warning("%r may be taken for another's after a crash: %s", record.path, error)

    def _has_got(self, path: str, entry: Entry | None) -> None:
        """Remember what the store has got from here, or that it was told to delete what it had."""
        with self._lock:
            self._left.pop(path, None)
            if entry is None or entry.fingerprint is not None:
                self._left[path] = None if entry is None else entry.fingerprint
            if len(self._left) > VERSIONS_KEPT:
                del self._left[next(iter(self._left))]
        self._forget_sent(path)

    def _forget_sent(self, path: str) -> None:
        with self._lock:
            self._sent.pop(path, None)
            self._doubtful.pop(path, None)
            self._unsettled.pop(path, None)
            self._unconditional.discard(path)
        if self._policy != "overwrite":
            self._log().forget_sent(path)

    # --- deletions

    def _delete(self, record: DirtyRecord) -> Outcome:
        path = record.path
        try:
            self._remove(record)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != ECHANGED:
                raise
            found = self._found(path)
            if found is not None and not found.is_dir and not self._remove_in_conflict(record, found):
                return self._is_left(record, found)
        if self._may_come_back(path):
            return Outcome.SETTLING
        self._changed(path, None)
        self._cache.deleted(record)
        self._has_got(path, None)
        self._changed(path, None)
        return Outcome.DELETED

    def _remove(self, record: DirtyRecord) -> None:
        replaces = _condition(record)
        if isinstance(replaces, str):
            self._backend.remove(record.path, only=replaces)
        elif replaces is ABSENT:
            self._backend.require(record.path, ABSENT)
        else:
            self._backend.remove(record.path)

    def _remove_in_conflict(self, record: DirtyRecord, found: Entry) -> bool:
        """Remove another version than the one that was deleted here, or return False where it is to stay."""
        if self._is_ours(record.path, found):
            self._backend.remove(record.path, only=found.fingerprint)
            return True
        if self._policy == "fail":
            raise _refused(record.path, found)
        if self._policy == "keep-both":
            return False
        if not record.attempted:
            logger.warning("%r was changed at the store by others, and is deleted (--vfs-conflict)", record.path)
        self._backend.remove(record.path)
        return True

    def _is_left(self, record: DirtyRecord, found: Entry) -> Outcome:
        logger.warning("%r was changed at the store by others; it stays, though it was deleted here", record.path)
        self._cache.deleted(record)
        self._forget_sent(record.path)
        self._changed(record.path, found)
        return Outcome.LEFT

    def _may_come_back(self, path: str) -> bool:
        """Tell whether a request that was sent before may still bring back what it was to bring."""
        with self._lock:
            since = self._doubtful.get(path)
        return since is not None and self._clock.monotonic() - since < SETTLED_AFTER


def _condition(record: DirtyRecord) -> Condition:
    if not record.base_known:
        return ANY
    return ABSENT if record.base is None else record.base


def allowed_in_conflict(policy: str, path: str, found: Entry | None) -> Condition | None:
    """Return what an upload may replace by `--vfs-conflict` where others came first and have left `found`.

    None where both are to be kept: the upload goes to `conflict_name`. Raises ECHANGED where it is to fail.
    """
    if policy == "overwrite":
        logger.warning("%r was changed at the store by others, and is overwritten (--vfs-conflict)", path)
        return ANY
    if policy == "fail":
        raise _refused(path, found)
    return ABSENT if found is None else None


def tell_of_beside(path: str, beside: str) -> None:
    """Say where an upload went because others came first."""
    logger.warning("%r was changed at the store by others; the file uploaded here is %r", path, beside)


def _refused(path: str, found: Entry | None) -> OSError:
    what = "is gone from the store" if found is None else "was changed at the store by others"
    return failure(ECHANGED, path, f"The file {what}, and --vfs-conflict is fail")


def conflict_name(path: str, moment: float, number: int = 1) -> str:
    """Return the path under which a file is stored when another one came first; `number` where that is taken, too.

    >>> conflict_name("a/b.txt", 0)
    'a/b.txt (conflict 1970-01-01 00-00-00)'
    >>> conflict_name("a/b.txt", 0, 2)
    'a/b.txt (conflict 1970-01-01 00-00-00 2)'
    """
    date = datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%d %H-%M-%S")
    end = f" (conflict {date}{f' {number}' if number > 1 else ''})"
    folder, name = paths.split(path)
    room = min(LONGEST_NAME, LONGEST_PATH - len(os.fsencode(folder)) - 1) - len(end)
    while name and len(os.fsencode(name)) > room:
        name = name[:-1]
    return paths.join(folder, name + end)
