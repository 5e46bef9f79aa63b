"""Any other fsspec filesystem (memory, SFTP, SMB, Azure, http, zip, ...), through its plain synchronous methods.

What such a filesystem promises differs; here is only what all do. A new object is collected in a temporary file of this
machine and then sent: under a temporary name and renamed where the store renames files, else in one call.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from typing import IO, Any

from ftpvfs import paths
from ftpvfs.backend.backend import Backend, Entry, Tuning, Upload, filesystem, protocol_of
from ftpvfs.backend.capability import GENERIC, OBJECT_STORE
from ftpvfs.errors import ECHANGED, failure

logger = logging.getLogger(__name__)

# Smaller uploads stay in memory until they are sent.
SPOOL_BYTES = 2**20
TIME_KEYS = ("mtime", "last_modified", "LastModified", "modified", "updated", "created", "date_time")
VERSION_KEYS = ("ETag", "etag", "content_md5", "generation", "version_id", "created", "CRC")


class GenericBackend(Backend):
    """One fsspec filesystem below one root. Any thread; not carried across a fork."""

    @classmethod
    def from_url(cls, url: str, storage_options: dict[str, Any], tuning: Tuning) -> Backend:
        """Make the filesystem; some connect to their store already here, and say what is wrong."""
        return cls(url, storage_options, tuning)

    def __init__(self, url: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
        super().__init__(url, "", storage_options, tuning)
        try:
            self.fs, root = filesystem(url, storage_options)
        except (ImportError, ValueError):
            raise
        except Exception as error:
            raise self.translated(error, self.display) from error
        self.root = root.rstrip("/")
        self.capability = GENERIC.get(protocol_of(url), OBJECT_STORE)
        self._threads = ThreadPoolExecutor(tuning.checkers, thread_name_prefix="ftpvfs-store")

    def key(self, path: str) -> str:
        """Return the filesystem's name of the path; its root keeps whatever form it has there."""
        return f"{self.root}/{path}" if path else self.root or self.fs.root_marker

    def check(self) -> None:
        try:
            found = self.run("", lambda: self.fs.ls(self.key(""), detail=False))
        except OSError as error:
            raise failure(error.errno or errno.EIO, self.display, error.strerror) from error
        if found is None:
            raise failure(errno.ENOENT, self.display)

    def list(self, path: str) -> list[Entry]:
        key = self.key(path)
        found = self.run(path, lambda: self.fs.ls(key, detail=True))
        entries = [self._entry(info) for info in found if info["name"].rstrip("/") != key.rstrip("/")]
        return [entry for entry in entries if paths.is_listable(entry.name) and not _is_temporary(entry.name)]

    def stat(self, path: str) -> Entry:
        if not path:
            return Entry("", is_dir=True)
        return self._entry(self.run(path, lambda: self.fs.info(self.key(path))))

    def _entry(self, info: Mapping[str, Any]) -> Entry:
        name = paths.split(info["name"].rstrip("/"))[1]
        if info["type"] == "directory":
            return Entry(name, is_dir=True, mtime=_time(info))
        size = int(info.get("size") or 0)
        mtime = _time(info)
        versions = [str(info[key]) for key in VERSION_KEYS if info.get(key)]
        known = versions or ([str(mtime)] if mtime is not None else [])
        return Entry(name, False, size, mtime, "-".join([str(size), *known]) if known else None)

    def fetch(self, path: str, start: int, stop: int, fingerprint: str | None) -> Future[bytes]:
        return self._threads.submit(self.run, path, lambda: self._read(path, start, stop, fingerprint))

    def _read(self, path: str, start: int, stop: int, fingerprint: str | None) -> bytes:
        if fingerprint is not None and self.stat(path).fingerprint != fingerprint:
            raise failure(ECHANGED, path)
        data: bytes = self.fs.cat_file(self.key(path), start=start, end=stop)
        if len(data) != stop - start:
            raise failure(ECHANGED, path, f"{len(data)} of {stop - start} bytes are there")
        return data

    def upload(self, path: str, *, mtime: float | None = None, size: int | None = None) -> Upload:
        if not self.capability.writes:
            raise self.unsupported(path, "writing")
        return SpooledUpload(self, path)

    def send(self, path: str, file: IO[bytes], size: int) -> Entry:
        """Put the file's content at `path`, whole."""
        file.seek(0)
        if not self.capability.renames_files:
            data = file.read()
            self.run(path, lambda: self.fs.pipe_file(self.key(path), data))
        else:
            self._send_and_rename(path, file)
        entry = self.stat(path)
        if self.tuning.verify and entry.size != size:
            raise failure(errno.EIO, path, f"The store has {entry.size} bytes of {size} that were sent")
        return entry

    def _send_and_rename(self, path: str, file: IO[bytes]) -> None:
        temporary = paths.join(paths.split(path)[0], f".ftpvfs-{secrets.token_hex(8)}.tmp")
        with self.errors(path):
            try:
                with self.fs.open(self.key(temporary), "wb") as remote:
                    while block := file.read(SPOOL_BYTES):
                        remote.write(block)
                self.rename(temporary, path)
            except BaseException:
                with contextlib.suppress(Exception):
                    self.fs.rm_file(self.key(temporary))
                raise

    def mkdir(self, path: str) -> None:
        self.run(path, lambda: self.fs.mkdir(self.key(path), create_parents=False))

    def rmdir(self, path: str) -> None:
        self.run(path, lambda: self.fs.rmdir(self.key(path)))

    def remove(self, path: str) -> None:
        self.run(path, lambda: self.fs.rm_file(self.key(path)))

    def copy(self, source: str, target: str) -> Entry:
        self.run(source, lambda: self.fs.cp_file(self.key(source), self.key(target)))
        return self.stat(target)

    def rename(self, source: str, target: str) -> None:
        with self.errors(source):
            self.fs.mv(self.key(source), self.key(target))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class SpooledUpload(Upload):
    """Bytes collected on this machine and sent at the end."""

    def __init__(self, backend: GenericBackend, path: str) -> None:
        self._backend = backend
        self._path = path
        self._spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - closed by commit or abort
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._spool.write(data)
        self._size += len(data)

    def commit(self) -> Entry:
        entry = self._backend.send(self._path, self._spool, self._size)  # type: ignore[arg-type]
        self._spool.close()
        return entry

    def abort(self) -> None:
        self._spool.close()


def _time(info: Mapping[str, Any]) -> float | None:
    for key in TIME_KEYS:
        value = info.get(key)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, tuple) and len(value) >= 6:  # zip's date_time
            return datetime(*value[:6], tzinfo=timezone.utc).timestamp()
    return None


def _is_temporary(name: str) -> bool:
    return name.startswith(".ftpvfs-") and name.endswith(".tmp")
