"""Any other fsspec filesystem (memory, SFTP, SMB, Azure, http, zip, ...), through its plain synchronous methods.

What such a filesystem promises differs; here is only what all do. A new object is collected in a temporary file of this
machine and then sent: under a temporary name and renamed where the store renames files, else in one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import io
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from typing import IO, Any

from fsspec.asyn import sync

from ftpvfs import paths
from ftpvfs.backend.backend import (
    ANY,
    Backend,
    Condition,
    Deliver,
    Entry,
    FileUpload,
    Pieces,
    Tuning,
    Upload,
    filesystem,
    filesystem_class,
    protocol_of,
    read_exactly,
)
from ftpvfs.backend.capability import GENERIC, OBJECT_STORE
from ftpvfs.backend.hidden import Hidden
from ftpvfs.backend.options import check_needed, check_options
from ftpvfs.errors import ECHANGED, ENOSTORE, failure

logger = logging.getLogger(__name__)

# Smaller uploads stay in memory until they are sent.
SPOOL_BYTES = 2**20
# Whose `cat_file` gives the whole file whatever is asked for (sshfs 2026.8).
IGNORE_RANGES = frozenset({"sftp", "ssh"})
# Whose filesystem is one connection, and is of no use any more once that is lost.
ONE_CONNECTION = frozenset({"sftp", "ssh", "ftp", "smb"})
# What aiohttp fetches.
WEB = frozenset({"http", "https"})
TIME_KEYS = ("mtime", "last_modified", "LastModified", "modified", "updated", "created", "date_time")
VERSION_KEYS = ("ETag", "etag", "content_md5", "generation", "version_id", "created", "CRC")


class GenericBackend(Backend):
    """One fsspec filesystem below one root. Any thread; not carried across a fork."""

    @classmethod
    def from_url(cls, url: str, storage_options: dict[str, Any], tuning: Tuning) -> Backend:
        """Make the backend; what is known without another machine's answer is told here."""
        _check_url(url, storage_options, tuning)
        return cls(url, storage_options, tuning)

    @classmethod
    def examine(cls, url: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
        _check_url(url, storage_options, tuning)
        place = _local_place(url)
        if place is not None:
            os.stat(place)

    def __init__(self, url: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
        super().__init__(url, "", storage_options, tuning)
        self._protocol = protocol_of(url)
        options = _as_stored(url, {**_time_limits(self._protocol, tuning), **storage_options})
        self._make = functools.partial(filesystem, url, options)
        self._reconnecting = threading.Lock()
        # None until it is used where making it means to connect. Protected by _reconnecting, as is the last failure of
        # that and when it was.
        self._fs: Any = None
        self._failure: tuple[float, Exception] | None = None
        self._class = filesystem_class(self._protocol)
        if self._protocol in ONE_CONNECTION:
            root = self._class._strip_protocol(url)
        else:
            self._fs, root = self._made_now()
        self.root = root.rstrip("/")
        self.capability = GENERIC.get(self._protocol, OBJECT_STORE)
        # Whether the root is known to be there, so that a missing name is taken for just that.
        self._is_root_seen = False
        self._ignores_ranges = self._protocol in IGNORE_RANGES
        self._threads = ThreadPoolExecutor(tuning.checkers, thread_name_prefix="ftpvfs-store")

    def _made_now(self) -> tuple[Any, str]:
        try:
            return self._make()
        except (ImportError, ValueError):
            raise
        except Exception as error:
            raise self.translated(error, self.display) from error

    @property
    def fs(self) -> Any:
        """The filesystem, for which one of them connects when it is first used: not on an event loop."""
        return self._fs if self._fs is not None else self._connected()

    def _connected(self) -> Any:
        """Connect, once for all threads that need it now; all of them fail with one."""
        began = time.monotonic()
        with self._reconnecting:
            if self._fs is None:
                if self._failure is not None and self._failure[0] > began:
                    raise self._failure[1]
                try:
                    self._fs, _ = self._make()
                except Exception as error:
                    self._failure = time.monotonic(), error
                    raise
            return self._fs

    def run(self, path: str, operation: Callable[[], Any], *, changes: bool = False) -> Any:
        """Run a blocking request with retries, over a new connection where the one that there was is lost.

        What is missing is looked at once more: ENOSTORE, or EHOSTUNREACH, where that is the root. After a request that
        `changes` the store always, else while the root was not seen.
        """

        def attempt() -> Any:
            used = self.fs
            try:
                return operation()
            except Exception as error:
                if self._protocol in ONE_CONNECTION and self.translated(error, path).errno == errno.ECONNRESET:
                    self._reconnect(used)
                raise

        try:
            outcome = super().run(path, attempt)
        except FileNotFoundError:
            if changes or not path or not self._is_root_seen:
                self._require_root(path)
            raise
        self._is_root_seen = True
        return outcome

    def _require_root(self, path: str) -> None:
        """Raise where what the URL names is not there: ENOSTORE where it never was, EHOSTUNREACH where it has gone.

        Where folders are mere prefixes of keys that is the container alone, the first name in the root. What is only
        read need not show its root (a web server without a list of its files), unless that is what is asked for. What
        belongs to this process alone (the memory) nobody else could have made a root in: the first file makes it.
        """
        if not self.capability.is_shared:
            return
        is_folder = self.capability.real_directories
        anchor = self.root if is_folder else "/".join(self.root.split("/")[: 2 if self.root.startswith("/") else 1])
        if not anchor.strip("/") or (path and not self.capability.writes):
            return
        try:
            super().run(path, lambda: self.fs.info(anchor))
        except FileNotFoundError as error:
            if is_folder and self._is_root_seen:
                raise failure(errno.EHOSTUNREACH, path, "The store's folder is not there any more") from error
            what = "The store's folder does not exist" if is_folder else "No such container"
            raise failure(ENOSTORE, path, what) from error
        self._is_root_seen = True

    def _reconnect(self, lost: Any) -> None:
        """Make the filesystem anew, once for all threads that lost the same connection."""
        with self._reconnecting:
            if self._fs is lost:
                self._fs, _ = self._make()

    def _change(self, path: str, operation: Callable[[], Any]) -> Any:
        """Run a request that changes the store, where the store has such: fsspec's own default is to do nothing."""
        if not self.capability.writes:
            raise self.unsupported(path, "changes")
        return self.run(path, operation, changes=True)

    def key(self, path: str) -> str:
        """Return the filesystem's name of the path; its root keeps whatever form it has there."""
        if not path:
            return self.root or str(self._class.root_marker)
        # Names in an archive have no leading slash, and one asked for with it lists something else.
        return f"{self.root}/{path}" if self.root or self._class.root_marker else path

    def check(self) -> None:
        try:
            self.run("", self._look_at_root)
        except OSError as error:
            # Folders that are prefixes: nothing has the one that the URL names, in a container that is there.
            if error.errno != errno.ENOENT or self.capability.real_directories:
                raise failure(error.errno or errno.EIO, self.display, error.strerror) from error

    def _look_at_root(self) -> None:
        if self.fs.ls(self.key(""), detail=False) is None:  # as some say that there is nothing
            raise failure(errno.ENOENT, "")

    def list(self, path: str) -> list[Entry]:
        key = self.key(path)
        try:
            found = self.run(path, lambda: self.fs.ls(key, detail=True))
        except FileNotFoundError:
            if path or self.capability.real_directories:
                raise
            return []  # a container in which nothing has the prefix that the URL names
        if any(info["type"] != "directory" and info["name"] == key for info in found):
            raise failure(errno.ENOTDIR, path)
        inside = [info for info in found if info["name"].rstrip("/") != key.rstrip("/")]
        return [entry for info in inside if (entry := self._listed(path, info)) is not None]

    def _listed(self, folder: str, info: Mapping[str, Any]) -> Entry | None:
        """Return the entry of a listed name; None for what is not shown: links, devices, names no path can have."""
        entry = self._entry(info)
        if not paths.is_listable(entry.name) or _is_temporary(entry.name):
            return None
        if info["type"] in {"file", "directory"}:
            return entry
        if info["type"] == "link" and self.tuning.follow_links:
            with contextlib.suppress(OSError):  # a link to nowhere
                return self.stat(paths.join(folder, entry.name))
        return None

    def stat(self, path: str) -> Entry:
        if not path:
            return Entry("", is_dir=True)
        info = self.run(path, lambda: self.fs.info(self.key(path)))
        if self._protocol in WEB and info.get("size") is None:
            info = {**info, "size": self.run(path, lambda: sync(self.fs.loop, self._length, self.key(path)))}
        return self._entry(info)

    async def _length(self, url: str) -> int | None:
        """Return the bytes that a web server will send of a file; fsspec knows none where the file is stored packed."""
        session = await self.fs.set_session()
        async with session.head(url, allow_redirects=True, **self.fs.kwargs) as answer:
            answer.raise_for_status()
            return answer.content_length  # type: ignore[no-any-return]

    def _entry(self, info: Mapping[str, Any]) -> Entry:
        name = paths.split(info["name"].rstrip("/"))[1]
        if info["type"] == "directory":
            return Entry(name, is_dir=True, mtime=_time(info))
        size = int(info.get("size") or 0)
        mtime = _time(info)
        versions = [_version(info[key]) for key in VERSION_KEYS if info.get(key)]
        known = versions or ([str(mtime)] if mtime is not None else [])
        return Entry(name, False, size, mtime, "-".join([str(size), *known]) if known else None)

    def fetch(
        self, path: str, start: int, stop: int, fingerprint: str | None, deliver: Deliver | None = None
    ) -> Future[Pieces]:
        return self._threads.submit(self._fetch, path, start, stop, fingerprint, deliver)

    def _fetch(
        self, path: str, start: int, stop: int, fingerprint: str | None, deliver: Deliver | None
    ) -> Pieces:
        pieces: Pieces = self.run(path, lambda: self._read(path, start, stop, fingerprint))
        if deliver is None:
            return pieces
        for piece in pieces:
            deliver(piece)
        return []

    def _read(self, path: str, start: int, stop: int, fingerprint: str | None) -> Pieces:
        if self._ignores_ranges:
            with self.fs.open(self.key(path), "rb") as file:
                file.seek(start)
                data: bytes = file.read(stop - start)
        else:
            data = self.fs.cat_file(self.key(path), start=start, end=stop)
        # Asked after reading: what is still the version now was it when the file was opened.
        if fingerprint is not None and self.stat(path).fingerprint != fingerprint:
            raise failure(ECHANGED, path, "The file changed at the store meanwhile")
        if len(data) != stop - start:
            raise failure(ECHANGED, path, f"{len(data)} of {stop - start} bytes are there")
        return [data]

    def upload(
        self, path: str, *, mtime: float | None = None, size: int | None = None, replaces: Condition = ANY
    ) -> Upload:
        if not self.capability.writes:
            raise self.unsupported(path, "writing")
        return SpooledUpload(self, path, replaces)

    def upload_file(
        self, path: str, descriptor: int, size: int, *, mtime: float | None = None, replaces: Condition = ANY
    ) -> FileUpload:
        if not self.capability.writes:
            raise self.unsupported(path, "writing")
        return GenericFileUpload(self, path, descriptor, size, replaces)

    def send(self, path: str, file: IO[bytes], size: int, replaces: Condition = ANY) -> Entry:
        """Put the file's content at `path`, whole; ECHANGED where something else stands there than `replaces`."""
        try:
            self.require(path, replaces)
        except OSError as error:
            if error.errno != ECHANGED or not self._has(path, file, size):
                raise
            return self.stat(path)
        file.seek(0)
        if not self.capability.renames_files:
            data = file.read()
            self.run(path, lambda: self.fs.pipe_file(self.key(path), data), changes=True)
        else:
            temporary = paths.join(paths.split(path)[0], f".ftpvfs-{secrets.token_hex(8)}.tmp")
            self.run(path, lambda: self._send_and_rename(path, temporary, file), changes=True)
        entry = self.stat(path)
        if self.tuning.verify and entry.size != size:
            raise failure(errno.EIO, path, f"The store has {entry.size} bytes of {size} that were sent")
        return entry

    def _has(self, path: str, file: IO[bytes], size: int) -> bool:
        """Tell whether the store has the file's bytes at the path: these stores tell by nothing else what they have."""
        try:
            entry = self.stat(path)
        except FileNotFoundError:
            return False
        if entry.is_dir or entry.size != size:
            return False
        file.seek(0)
        return all(
            b"".join(self._read(path, start, min(start + SPOOL_BYTES, size), None)) == file.read(SPOOL_BYTES)
            for start in range(0, size, SPOOL_BYTES)
        )

    def _send_and_rename(self, path: str, temporary: str, file: IO[bytes]) -> None:
        file.seek(0)
        try:
            with self.fs.open(self.key(temporary), "wb") as remote:
                while block := file.read(SPOOL_BYTES):
                    remote.write(block)
            self.fs.mv(self.key(temporary), self.key(path))
        except BaseException:
            with contextlib.suppress(Exception):
                self.fs.rm_file(self.key(temporary))
            raise

    def mkdir(self, path: str) -> None:
        self._change(path, lambda: self.fs.mkdir(self.key(path), create_parents=False))

    def check_name(self, path: str) -> None:
        """Raise EINVAL for a name that is not UTF-8, which none of these stores but the memory takes."""
        try:
            path.encode()
        except UnicodeEncodeError as error:
            if self._protocol != "memory":
                raise failure(errno.EINVAL, path, "The store's names are UTF-8, and this is not") from error

    def require_empty(self, path: str) -> None:
        key = self.key(path)
        try:
            found = self.run(path, lambda: self.fs.ls(key, detail=True))
        except FileNotFoundError:
            return
        for info in found:
            if info["name"].rstrip("/") != key.rstrip("/"):
                raise self.not_empty(path, paths.split(info["name"].rstrip("/"))[1])

    def rmdir(self, path: str) -> None:
        if not self.capability.writes:
            raise self.unsupported(path, "changes")
        self.require_empty(path)
        # sshfs has the coroutine alone, and fsspec's own `rmdir` then does nothing, silently.
        if hasattr(self._class, "_rmdir"):
            self._change(path, lambda: sync(self.fs.loop, self.fs._rmdir, self.key(path)))
        else:
            self._change(path, lambda: self.fs.rmdir(self.key(path)))

    def remove(self, path: str, *, only: str | None = None) -> None:
        if only is None or self.is_still(path, only):
            self._change(path, lambda: self.fs.rm_file(self.key(path)))

    def copy(self, source: str, target: str) -> Entry:
        if not self.capability.copies:
            raise self.unsupported(source, "copying")
        self.run(source, lambda: self.fs.cp_file(self.key(source), self.key(target)))
        return self.stat(target)

    def rename(self, source: str, target: str) -> None:
        if not self.capability.renames_files:
            raise self.unsupported(source, "renaming")
        self.run(source, lambda: self.fs.mv(self.key(source), self.key(target)))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._fs is not None:
            _release(self._fs)


class SpooledUpload(Upload):
    """Bytes collected on this machine and sent at the end."""

    def __init__(self, backend: GenericBackend, path: str, replaces: Condition) -> None:
        self._backend = backend
        self._path = path
        self._replaces = replaces
        self._spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - closed by commit or abort
        self._size = 0

    def accept(self, data: bytes | memoryview) -> None:
        self._raise_if_over()
        self._spool.write(data)
        self._size += len(data)

    def commit(self) -> Entry:
        self._raise_if_over()
        entry = self._backend.send(self._path, self._spool, self._size, self._replaces)
        self._spool.close()
        return entry

    def abort(self) -> None:
        self._spool.close()

    def _raise_if_over(self) -> None:
        if self._spool.closed:
            raise failure(errno.EIO, self._path, "The upload is over")


class GenericFileUpload(FileUpload):
    """A file of this machine that is sent as it is."""

    def __init__(
        self, backend: GenericBackend, path: str, descriptor: int, size: int, replaces: Condition
    ) -> None:
        self._backend = backend
        self._path = path
        self._descriptor = descriptor
        self._size = size
        self._replaces = replaces
        self._file: PartOfFile | None = None
        self._cancelled = False

    @property
    def sent(self) -> int:
        return self._file.tell() if self._file is not None else 0

    def send(self) -> Entry:
        self._file = PartOfFile(self._descriptor, self._size, self._path)
        if self._cancelled:
            self.cancel()
        return self._backend.send(self._path, io.BufferedReader(self._file), self._size, self._replaces)

    def cancel(self) -> None:
        self._cancelled = True
        if self._file is not None:
            self._file.is_cancelled = True


class PartOfFile(io.RawIOBase):
    """The first `size` bytes of an open file, with a position of their own; ECANCELED once they are called off."""

    def __init__(self, descriptor: int, size: int, path: str) -> None:
        super().__init__()
        self.is_cancelled = False
        self._descriptor = descriptor
        self._size = size
        self._path = path
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self.is_cancelled:
            raise failure(errno.ECANCELED, self._path, "The upload was called off")
        count = min(len(buffer), max(0, self._size - self._position))
        buffer[:count] = read_exactly(self._descriptor, self._position, count, self._path, code=errno.EIO)
        self._position += count
        return count


def _release(fs: Any) -> None:
    """Close what fsspec's filesystems leave to the garbage collector: an archive's file, an HTTP session."""
    if hasattr(fs, "close"):
        fs.close()
    if hasattr(fs, "fo"):
        fs.fo.close()
    if getattr(fs, "_session", None) is not None:
        asyncio.run_coroutine_threadsafe(fs._session.close(), fs.loop)


def _time_limits(protocol: str, tuning: Tuning) -> dict[str, Any]:
    """Return the storage options that end a connection which hangs; fsspec itself would wait for ever."""
    if protocol not in {"sftp", "ssh"}:
        return {}
    limits: dict[str, Any] = {}
    if tuning.connect_timeout:
        limits |= {"connect_timeout": tuning.connect_timeout, "login_timeout": tuning.connect_timeout}
    if tuning.read_timeout:  # asyncssh gives up after three questions without an answer
        limits |= {"keepalive_interval": tuning.read_timeout / 3, "keepalive_count_max": 3}
    return limits


def _as_stored(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the storage options with which a web server's files come as they are stored, byte by byte.

    Else the HTTP client asks for them packed and unpacks them, and neither sizes nor ranges are those of the file.
    """
    as_stored = dict(options)
    if "::" not in url:
        return _http_options(as_stored) if protocol_of(url) in WEB else as_stored
    for part in url.split("::"):
        protocol = protocol_of(part)
        if protocol in WEB:
            as_stored[protocol] = _http_options(as_stored.get(protocol, {}))
    return as_stored


def _http_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **options,
        "headers": {"Accept-Encoding": "identity", **options.get("headers", {})},
        "client_kwargs": {"auto_decompress": False, **options.get("client_kwargs", {})},
    }


def _version(value: Any) -> str:
    """One text for one version: fsspec's memory gives a time as datetime here and as a number there."""
    return str(_timestamp(value) if isinstance(value, datetime) else value)


def _timestamp(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def _time(info: Mapping[str, Any]) -> float | None:
    for key in TIME_KEYS:
        value = info.get(key)
        if isinstance(value, datetime):
            return _timestamp(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, tuple) and len(value) >= 6:  # zip's date_time
            year, month, day, hour, minute, second = value[:6]
            return datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc).timestamp()
    return None


def _is_temporary(name: str) -> bool:
    return name.startswith(".ftpvfs-") and name.endswith(".tmp")


def _check_url(url: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
    """Raise ValueError for options that the store would swallow, or lacks, and for a way to the server's own cache."""
    check_options(url, storage_options)
    check_needed(url, storage_options)
    place = _local_place(url)
    if place is not None and tuning.hidden and Hidden.below(place, tuning.hidden, follow_links=False) is not None:
        raise ValueError(f"the cache folder {tuning.hidden} lies in {place}, which is served; write --cache-dir")


def _local_place(url: str) -> str | None:
    """Return the file or folder of this machine that is served by way of others (`zip::/a.zip`); None for no such."""
    *others, last = url.split("::")
    if not others or protocol_of(last) not in {"file", "local"}:
        return None
    return str(filesystem_class("file")._strip_protocol(last))
