"""What every store must do for the VFS, and how one is made from a URL.

A backend speaks in VFS paths (`a/b`, the root is `""`) and bytes ranges `[start, stop)`. Every method may be called
from any thread and may block for as long as the store takes; every failure is an OSError with an errno and the path. A
backend is made after any fork and never carried across one.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import importlib
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import fsspec
from fsspec.core import split_protocol

from ftpvfs.backend.capability import GENERIC, OBJECT_STORE, Capability
from ftpvfs.backend.checksum import Checksum
from ftpvfs.backend.errors import oserror, secrets_in, secrets_in_url, translate, without_secrets
from ftpvfs.backend.retry import Retry
from ftpvfs.errors import AWAY, ECHANGED, EUNSUPPORTED, failure
from ftpvfs.memory import MemoryBudget
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)

# fsspec's own caches are switched off: the VFS owns caching, and an instance must not be shared across a fork.
UNCACHED = {"use_listings_cache": False, "skip_instance_cache": True}


# The bytes of one range, in order.
Pieces = list[bytes]
# Takes one of them; returns what to await before there may be more.
Deliver = Callable[[bytes], "Future[None] | None"]

# What a file of this machine is read in, where a store has no larger parts.
FILE_BLOCK = 2**20


class Replaces(enum.Enum):
    """What an upload may replace, where that is not one known version."""

    ANY = "any"
    ABSENT = "absent"


# A fingerprint: only that version may be replaced.
Condition = Replaces | str
ANY, ABSENT = Replaces.ANY, Replaces.ABSENT


@dataclass(slots=True)
class Entry:
    """One name in a folder, as the store has it.

    `mtime` is seconds since the epoch, or None where the true one costs a request (`Backend.true_mtime`).
    `fingerprint` names the bytes of the object (ETag, generation, ...), or is None where the store has no such thing.
    `stamp` is when the store last wrote the object, where neither of the others tells: S3's ETag stays the same when
    another program gives the object another modification time.
    `digest` is the hash of the bytes where a listing has one beside the fingerprint, as the store writes it.
    """

    name: str
    is_dir: bool
    size: int = 0
    mtime: float | None = None
    fingerprint: str | None = None
    stamp: int | None = None
    digest: str | None = None

    @property
    def version(self) -> str | None:
        """What changes whenever the bytes or the modification time do; None where the store cannot tell."""
        return self.fingerprint if self.stamp is None else f"{self.fingerprint}@{self.stamp}"


@dataclass(frozen=True)
class Usage:
    """Space at the store, in bytes."""

    total: int
    free: int


@dataclass(frozen=True)
class Tuning:
    """What a backend takes from the options."""

    low_level_retries: int = 10
    connect_timeout: float = 60.0
    read_timeout: float = 300.0
    # Parallel requests for metadata and server-side copies.
    checkers: int = 8
    verify: bool = True
    server_mtime: bool = False
    follow_links: bool = False
    # A folder of this machine that no client may reach; "" is none.
    hidden: str = ""
    memory: MemoryBudget = field(default_factory=lambda: MemoryBudget(128 * 2**20))
    # Called, in whichever thread, each time the store has answered a request, be it with a refusal. Must not wait.
    answered: Callable[[], None] = lambda: None


class Upload(Protocol):
    """A new object on its way into the store. Nothing of it is visible, nor is the old object touched, before `commit`.

    One thread at a time. After an error only `abort` may follow.
    """

    def write(self, data: bytes | memoryview) -> None:
        """Take over `data`; blocks while as much as the upload may hold is still on its way."""
        self.accept(data)
        while (busy := self.pressure()) is not None:
            wait([busy])
            del busy  # an error holds the frames that it came through: this one must not hold the error, by its future

    def accept(self, data: bytes | memoryview) -> None:
        """Take over `data` without waiting for the store."""

    def pressure(self) -> Future[Any] | None:
        """Return what to await before more is accepted, None when more may come; raises what failed meanwhile."""
        return None

    def prepare(self) -> None:
        """Do beforehand what `commit` takes and nobody sees, so that little is left of that. May wait for the store."""
        return

    def commit(self) -> Entry:
        """Publish the object whole and verified; return when the store has it."""

    def abort(self) -> None:
        """Give up and leave nothing behind at the store. May be called again, and after a failed commit."""


class FileUpload(Protocol):
    """A file of this machine on its way into the store: its bytes are read when they are sent, and never pile up."""

    @property
    def sent(self) -> int:
        """Bytes that are on their way or at the store, for people to look at."""

    def send(self) -> Entry:
        """Send the file and publish the object, whole and verified; once, in one thread.

        After an error or `cancel` (ECANCELED) nothing of it is on its way any more, and nothing is left at the store.
        """

    def cancel(self) -> None:
        """Let `send` give up, unless it is publishing already. Any thread; returns at once."""


class BlockwiseFile(FileUpload):
    """A file sent block by block through a store's ordinary upload."""

    def __init__(self, upload: Upload, path: str, descriptor: int, size: int) -> None:
        self._upload = upload
        self._path = path
        self._descriptor = descriptor
        self._size = size
        self._position = 0
        self._cancelled = threading.Event()

    @property
    def sent(self) -> int:
        return self._position

    def send(self) -> Entry:
        try:
            while self._position < self._size:
                self._raise_if_cancelled()
                self._position += self.pass_on(self._position, min(FILE_BLOCK, self._size - self._position))
            self._raise_if_cancelled()
            return self._upload.commit()
        except BaseException:
            self._upload.abort()
            raise

    def pass_on(self, offset: int, count: int) -> int:
        """Hand up to `count` bytes at `offset` to the upload; return how many."""
        data = read_exactly(self._descriptor, offset, count, self._path, code=errno.EIO)
        self._upload.write(data)
        return len(data)

    def cancel(self) -> None:
        self._cancelled.set()

    def _raise_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise failure(errno.ECANCELED, self._path, "The upload was called off")


def read_exactly(descriptor: int, offset: int, count: int, path: str, *, code: int = ECHANGED) -> bytes:
    """Return `count` bytes of a file; `code` where it ends before. Linux reads 2 GiB at once at most."""
    pieces = []
    while count:
        piece = os.pread(descriptor, count, offset)
        if not piece:
            raise failure(code, path, f"The file ends {count} bytes before the range that was asked for")
        pieces.append(piece)
        offset, count = offset + len(piece), count - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def not_replaceable(path: str, replaces: Condition) -> OSError:
    """Return the error for an object that is not what was to be replaced."""
    found = "There is a file by now" if replaces is ABSENT else "It is another version by now, or gone"
    return failure(ECHANGED, path, f"{found} at the store")


class OpenFile(Protocol):
    """A file of a store that lies on this machine's own disk."""

    entry: Entry

    def fileno(self) -> int:
        """Return the descriptor to read or send from."""

    def verify(self) -> None:
        """Raise ECHANGED when the file has changed since it was opened."""

    def close(self) -> None:
        """Release the descriptor."""


class Backend(ABC):
    """One store below one root. Any thread; not carried across a fork."""

    capability: Capability
    protocols: ClassVar[tuple[str, ...]] = ()

    def __init__(self, url: str, root: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
        self.root = root
        self.tuning = tuning
        self.retry = Retry(tuning.low_level_retries, tuning.read_timeout)
        self.display = display_url(url)
        # Called when a bucket that was there has gone, so that what is cached of it is doubtful. In any thread; it must
        # not wait.
        self.when_gone: Callable[[], object] = lambda: None
        self._secrets = sorted(set(secrets_in(storage_options)) | set(secrets_in_url(url)), key=len, reverse=True)

    @classmethod
    def before_fork(cls, url: str) -> None:
        """Note what processes that are forked later should know of the store; no other machine is asked."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.display}>"

    @classmethod
    def examine(cls, url: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
        """Raise what is wrong with a URL and its options as far as can be known without contacting anybody.

        Nothing is made. ValueError for what can never be right, OSError for what this machine's disk says.
        """

    # --- what a store does

    @abstractmethod
    def check(self) -> None:
        """Ask the store whether the root is there and may be listed; raise what it says, in words for the user."""

    @abstractmethod
    def list(self, path: str) -> list[Entry]:
        """Return all that lies directly in the folder; ENOENT where there is none."""

    @abstractmethod
    def stat(self, path: str) -> Entry:
        """Return the entry of one path; ENOENT where there is none."""

    @abstractmethod
    def fetch(
        self, path: str, start: int, stop: int, fingerprint: str | None, deliver: Deliver | None = None
    ) -> Future[Pieces]:
        """Start reading exactly [start, stop) of the version `fingerprint`; cancelling the future ends the request.

        The bytes come in the pieces in which they arrived: joining them would cost as much as receiving them.

        `deliver` gets the pieces while they arrive, in order and each byte once, in whatever thread that is; then the
        future gives none, and what `deliver` returns is awaited before more is read, where the store's client can.

        The future fails with ECHANGED when the object is no longer that version.
        """

    def checksum(self, entry: Entry) -> Checksum | None:
        """Return what the version's bytes should hash to as far as `entry` tells; nothing is asked of the store.

        It may mean something else (the ETag of an encrypted object is no MD5): before bytes are called damaged,
        `ask_checksum` has the last word.
        """
        return None

    def ask_checksum(self, path: str, entry: Entry) -> Future[Checksum | None]:
        """Ask the store for the hash of this version; the future gives None where it has none.

        The future fails with ECHANGED when the object is no longer that version.
        """
        future: Future[Checksum | None] = Future()
        future.set_result(None)
        return future

    def open_file(self, path: str) -> OpenFile:
        """Open the file itself, where `capability.opens_files`."""
        raise self.unsupported(path, "opening files of the store directly")

    def check_name(self, path: str) -> None:
        """Raise why no file or folder of this name can ever be made, as far as a quick look tells.

        EINVAL and ENAMETOOLONG for a name that the store does not take; EEXIST where something stands that listings
        leave out. No store over a network is asked.
        """

    def admit(self, path: str, size: int = 0) -> None:
        """Raise what an upload of `size` bytes (0: nobody knows how many) that begins now would fail with at its end.

        EFBIG above the store's limit; of a folder of this machine ENOSPC and EROFS, too. No other machine is asked.
        """
        self.check_size(path, size, self.capability.largest_streamed)

    def check_size(self, path: str, size: int, largest: int | None) -> None:
        """Raise EFBIG where a file is larger than the largest that the store takes."""
        if largest is not None and size > largest:
            raise failure(errno.EFBIG, path, f"The store takes {largest} bytes in one object at the most")

    def upload(
        self, path: str, *, mtime: float | None = None, size: int | None = None, replaces: Condition = ANY
    ) -> Upload:
        """Return a new upload to `path`. The store hears nothing yet.

        `mtime` is the modification time to give it, None for the store's own; `size` is its length where it is known.

        `replaces`: the upload publishes only where the store has that version at the path, or nothing (ABSENT); else
        `commit` fails with ECHANGED, which no upload fails with for another reason. Where what is found there is what
        was sent (an earlier try got through, and its answer was lost), `commit` succeeds. Stores that know no such
        condition are asked right before.
        """
        raise self.unsupported(path, "writing")

    def upload_file(
        self, path: str, descriptor: int, size: int, *, mtime: float | None = None, replaces: Condition = ANY
    ) -> FileUpload:
        """Return the upload of the first `size` bytes of an open file, which must not change before it is done.

        `mtime` and `replaces` are those of `upload`. The descriptor stays the caller's.
        """
        return BlockwiseFile(
            self.upload(path, mtime=mtime, size=size, replaces=replaces), path, descriptor, size
        )

    def mkdir(self, path: str) -> None:
        """Make a folder (where there are none, an object that marks one)."""
        raise self.unsupported(path, "making folders")

    def rmdir(self, path: str) -> None:
        """Remove an empty folder, or the object that marks one; nothing to remove is no error.

        ENOTEMPTY where anything lies in it (see `require_empty`).
        """
        raise self.unsupported(path, "removing folders")

    @abstractmethod
    def require_empty(self, path: str) -> None:
        """Raise ENOTEMPTY where anything lies in the folder, also what listings leave out; a missing one is empty."""

    def remove(self, path: str, *, only: str | None = None) -> None:
        """Remove one object; ENOENT where the store can tell.

        With `only` (a fingerprint) no other version is removed: ECHANGED where there is one. What is gone is no error
        then.
        """
        raise self.unsupported(path, "removing files")

    def remove_many(self, paths: Iterable[str]) -> None:
        """Remove objects, as few requests as the store allows; the first failure is raised after all were tried."""
        failures = []
        for path in paths:
            try:
                self.remove(path)
            except OSError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def copy(self, source: str, target: str) -> Entry:
        """Copy one object inside the store with its modification time, whole or not at all."""
        raise self.unsupported(source, "copying")

    def rename(self, source: str, target: str) -> None:
        """Rename a file (`capability.renames_files`) or folder (`renames_directories`) in one step."""
        raise self.unsupported(source, "renaming")

    def set_mtime(self, path: str, mtime: float) -> Entry:
        """Set the modification time; return the entry as it is now, its fingerprint included."""
        raise self.unsupported(path, "setting modification times")

    def chmod(self, path: str, mode: int) -> None:
        """Set who may read, write and execute (`mode`, nine bits), for good on return; where `capability.sets_mode`."""
        raise self.unsupported(path, "changing access rights")

    def true_mtimes(self, folder: str, entries: Iterable[Entry]) -> None:
        """Fill in the `mtime` of entries of `folder` that lack it, several requests at a time."""

    def walk(self, path: str) -> Iterator[tuple[str, Entry]]:
        """Yield (path, entry) of every object below the folder, markers of folders included as `name/`."""
        for entry in self.list(path):
            below = f"{path}/{entry.name}" if path else entry.name
            if entry.is_dir:
                yield from self.walk(below)
            else:
                yield below, entry

    def usage(self) -> Usage | None:
        """Return the space at the store, or None where it has no such notion."""
        return None

    def close(self) -> None:
        """Release connections and threads."""

    # --- for the stores' own use

    def require(self, path: str, replaces: Condition) -> None:
        """Ask the store what is at the path; raise ECHANGED where it is not what may be replaced."""
        if replaces is not ANY and self._now(path) != (None if replaces is ABSENT else replaces):
            raise not_replaceable(path, replaces)

    def is_still(self, path: str, only: str | None) -> bool:
        """Tell whether the version `only` is there, False where nothing is; ECHANGED where it is another one."""
        found = self._now(path) if only is not None else None
        if found is not None and found != only:
            raise not_replaceable(path, only or ANY)
        return found is not None

    def _now(self, path: str) -> str | None:
        """Return the fingerprint of what is at the path; "" for a folder, and None for nothing."""
        try:
            entry = self.stat(path)
        except FileNotFoundError:
            return None
        return None if entry.is_dir and not self.capability.real_directories else entry.fingerprint or ""

    def not_empty(self, path: str, name: str) -> OSError:
        """Return the error for a folder in which `name` lies, which listings may leave out."""
        reason = f"The folder is not empty: {name!r} is in it, which listings may leave out"
        return failure(errno.ENOTEMPTY, path, reason)

    def unsupported(self, path: str, what: str) -> OSError:
        """Return the error for what this store cannot do."""
        if not self.capability.writes:
            return failure(errno.EROFS, path, "The store is read-only")
        return failure(EUNSUPPORTED, path, f"The store does not support {what}")

    @contextlib.contextmanager
    def errors(self, path: str) -> Iterator[None]:
        """Turn whatever the store raises inside into an OSError for `path`, without any secret in it."""
        try:
            yield
        except Exception as error:
            raise self.failed(error, path) from error

    def failed(self, error: BaseException, path: str) -> OSError:
        """Return the OSError for what a request has ended with; one that the store itself has said is an answer."""
        known = self.translated(error, path)
        if known.errno not in AWAY:
            self.tuning.answered()
        return known

    def translated(self, error: BaseException, path: str) -> OSError:
        """Return the OSError for `error`, without any secret in it."""
        known = translate(error, path)
        for secret in self._secrets:
            if secret in str(known):
                path, reason = path.replace(secret, "***"), str(known.strerror).replace(secret, "***")
                known = oserror(known.errno or errno.EIO, path, reason)
        return known

    def run(self, path: str, operation: Callable[[], Any]) -> Any:
        """Run a blocking request with retries and translated errors."""
        about_to_wait(Wait.STORE)
        with self.errors(path):
            outcome = self.retry.call(operation)
        self.tuning.answered()
        return outcome


def open_backend(url: str, storage_options: Mapping[str, Any] | None = None, tuning: Tuning | None = None) -> Backend:
    """Return the backend for any fsspec URL; a plain path is a local folder. The store is not contacted yet.

    Raises ValueError for an unknown protocol and ImportError naming the package that a protocol needs.
    """
    protocol = protocol_of(url)
    cls = _backend_class(protocol)
    return cls.from_url(url, dict(storage_options or {}), tuning or Tuning())  # type: ignore[attr-defined, no-any-return]


def examine(url: str, storage_options: Mapping[str, Any], tuning: Tuning | None = None) -> None:
    """Raise what is wrong with a URL and its options. Nothing is made or contacted: it may be done before a fork.

    ValueError and ImportError as of `open_backend`, OSError for a folder of this machine that cannot be listed.
    """
    _backend_class(protocol_of(url)).examine(url, storage_options, tuning or Tuning())


def root_of(url: str) -> str:
    """Return the root that the URL's backend will have; of an archive in another store it is the URL itself.

    Nothing is opened. ImportError naming the package that the protocol needs, ValueError for an unknown protocol.
    """
    protocol = protocol_of(url)
    if "::" in url:
        return url
    try:
        root: str = fsspec.get_filesystem_class(protocol)._strip_protocol(url)
    except ImportError as error:
        raise _missing_package(protocol, error) from error
    return os.path.realpath(root) if protocol in {"file", "local"} else root.rstrip("/")


def preload(url: str) -> None:
    """Import what a URL's backend needs, for processes that are forked later; ImportError naming a missing package."""
    _backend_class(protocol_of(url)).before_fork(url)


def is_shared(url: str) -> bool:
    """Tell whether all processes see the same store under the URL."""
    return GENERIC.get(protocol_of(url), OBJECT_STORE).is_shared


def capability_of(url: str) -> Capability:
    """Return what a URL's store can do, as far as the protocol tells. ImportError for a missing package."""
    protocol = protocol_of(url)
    return getattr(_backend_class(protocol), "capability", None) or GENERIC.get(protocol, OBJECT_STORE)


def protocol_of(url: str) -> str:
    """Return the URL's protocol; `zip::s3://...` is a zip."""
    first = url.split("::", 1)[0]
    return split_protocol(first)[0] or (first if "::" in url else "file")


def _backend_class(protocol: str) -> type[Backend]:
    module, name = _CLASSES.get(protocol, ("generic", "GenericBackend"))
    try:
        return getattr(importlib.import_module(f"ftpvfs.backend.{module}"), name)  # type: ignore[no-any-return]
    except ImportError as error:
        raise _missing_package(protocol, error) from error


def _missing_package(protocol: str, error: ImportError) -> ImportError:
    package = PACKAGES.get(protocol)
    hint = f"pip install {package}" if package else str(error).splitlines()[0]
    return ImportError(f"{protocol}:// needs a package that is not installed: {hint}")


# What to install for a protocol; of those that know sftp, sshfs is the one that is tested.
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "sftp": "sshfs", "ssh": "sshfs",
    "smb": "smbprotocol", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs", "http": "aiohttp", "https": "aiohttp",
}  # fmt: skip

# Imported when first used: s3fs and gcsfs cost a second and 60 MiB together.
_CLASSES = {
    "file": ("local", "LocalBackend"),
    "local": ("local", "LocalBackend"),
    "s3": ("s3", "S3Backend"),
    "s3a": ("s3", "S3Backend"),
    "gs": ("gcs", "GCSBackend"),
    "gcs": ("gcs", "GCSBackend"),
}


def filesystem_class(protocol: str) -> Any:
    """Return fsspec's class for a protocol. Raises ImportError naming the missing package, or ValueError."""
    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise _missing_package(protocol, error) from error
    except ValueError as error:
        raise ValueError(f"{protocol}:// is no protocol that fsspec knows: {error}") from error


def filesystem(url: str, storage_options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return a fresh, uncached fsspec filesystem for the URL and the URL's path inside it."""
    cls = filesystem_class(protocol_of(url))
    if "::" in url:
        fs, path = fsspec.core.url_to_fs(url, **storage_options)
    else:
        options = {**cls._get_kwargs_from_urls(url), "skip_instance_cache": True, **storage_options}
        fs, path = cls(**options), cls._strip_protocol(url)
    # Not as an argument: some filesystems (sshfs) hand what they do not know to a library that refuses it.
    fs.dircache.use_listings_cache = False
    return fs, path


def display_url(url: str) -> str:
    """Return the URL as it may be shown: without user and password, and without an HTTP query."""
    return without_secrets(url)
