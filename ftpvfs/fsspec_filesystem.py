"""A VFS as one of fsspec's filesystems, so that pandas, pyarrow, dask and others read and write through its cache.

`fsspec.filesystem("ftpvfs", url="s3://bucket/prefix", cache_mode="full")` is a VFS over the bucket, and
`fsspec.open("ftpvfs://reports/today.csv", url=...)` a file in it. It shares its cache with every server and program
that has the same store and the same cache folder.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import posixpath
import shutil
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from glob import has_magic
from typing import Any

import fsspec
from fsspec.compression import compr
from fsspec.core import get_compression
from fsspec.spec import AbstractFileSystem
from fsspec.utils import stringify_path, tokenize

from ftpvfs import paths
from ftpvfs.backend.backend import Entry
from ftpvfs.clock import SYSTEM_CLOCK
from ftpvfs.config import VFSOptions, vfs_options
from ftpvfs.paths import AnyPath
from ftpvfs.vfs.buffered import BUFFER, FileUpdater, FileWriter, TextFile, check_layers
from ftpvfs.vfs.compressed import CompressedFile
from ftpvfs.vfs.openmode import is_text
from ftpvfs.vfs.vfs import VFS

logger = logging.getLogger(__name__)

PROTOCOL = "ftpvfs"
# Seconds that what waits in a cache gets to be stored when the program ends: what `--drain-timeout` is by default.
DRAIN_TIMEOUT = 30.0


class FTPVFSFileSystem(AbstractFileSystem):
    """The files of a VFS, by fsspec's names.

    `url` is the store (any fsspec URL or a local folder), `storage_options` are fsspec's for it, and the keywords are
    those of `VFS`. `store` is another name for `url`, for functions that have an argument of that name themselves, such
    as `fsspec.core.url_to_fs` and pandas's `read_parquet`. A path is one in the VFS: `reports/today.csv`, with or
    without `ftpvfs://`. With `auto_mkdir` the folders above a new file are made.

    All instances for the same store with the same options have one VFS in a process, `vfs`; it may be used before and
    after a fork. `close` closes it, until it is used again. Failures are those of the VFS: FileNotFoundError and other
    OSErrors with an errno and the path.
    """

    protocol = PROTOCOL
    root_marker = ""

    def __init__(
        self,
        url: AnyPath | None = None,
        storage_options: Mapping[str, Any] | None = None,
        *,
        store: AnyPath | None = None,
        auto_mkdir: bool = True,
        **keywords: Any,
    ) -> None:
        super().__init__()
        if url is not None and store is not None:
            raise TypeError("url and store name the same; give one of them")
        where = os.fspath(url or store or ".")
        self.vfs = vfs_of(where, storage_options or {}, vfs_options(**keywords))
        self.auto_mkdir = auto_mkdir

    def close(self) -> None:
        """Release what this process has open for the store; it is opened again when it is used again."""
        self.vfs.close()

    def sync(self, timeout: float | None = None) -> None:
        """Return when the store has every byte that is written by now, as `VFS.sync` does."""
        self.vfs.sync(timeout)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        path = stringify_path(path).removeprefix(f"{PROTOCOL}://")
        return paths.from_ftp(paths.normalize(path))

    # --- looking

    def info(self, path: Any, **_: Any) -> dict[str, Any]:
        """Return what is known of a file or folder, its true modification time included."""
        path = self._strip_protocol(path)
        entry = self.vfs.lookup(path)
        return {**_info(path, entry), "mtime": self.vfs.stat(path).st_mtime}

    def ls(self, path: Any, detail: bool = True, **_: Any) -> list[Any]:
        """Return the names in a folder, or what `info` tells of each; of a file, the file.

        `mtime` is None where the true one costs a request, as on S3: `info` and `modified` ask for it.
        """
        path = self._strip_protocol(path)
        entry = self.vfs.lookup(path)
        if entry.is_dir:
            found = [_info(paths.join(path, each.name), each) for each in self.vfs.listing(path)]
        else:
            found = [_info(path, entry)]
        return found if detail else [each["name"] for each in found]

    # fsspec's own take every failure, also that of a store that is away, for a file that is not there.

    def exists(self, path: Any, **_: Any) -> bool:
        """Tell whether there is anything at the path; raises where the store cannot say."""
        return self.vfs.exists(self._strip_protocol(path))

    def isdir(self, path: Any) -> bool:
        """Tell whether the path is a folder; raises where the store cannot say."""
        return self.vfs.isdir(self._strip_protocol(path))

    def isfile(self, path: Any) -> bool:
        """Tell whether the path is a file; raises where the store cannot say."""
        return self.vfs.isfile(self._strip_protocol(path))

    def modified(self, path: Any) -> datetime:
        """Return the modification time. (No store tells when a file was made: `created` is not implemented.)"""
        return datetime.fromtimestamp(self.vfs.stat(self._strip_protocol(path)).st_mtime, timezone.utc)

    def invalidate_cache(self, path: Any = None) -> None:
        """Drop what is cached of listings at and below the folder, None of all."""
        self.vfs.forget("" if path is None else self._strip_protocol(path))
        super().invalidate_cache(path)

    # --- opening

    def open(
        self,
        path: Any,
        mode: str = "rb",
        block_size: int | None = None,
        cache_options: Mapping[str, Any] | None = None,
        compression: str | None = None,
        **keywords: Any,
    ) -> Any:
        """Open a file, in every mode that the VFS's cache mode allows; `block_size` is that of the buffer.

        A file that is written appears whole when it is closed, in a transaction when that ends, and not at all when its
        `with` block fails.
        """
        if is_text(mode) and compression is None and not self._intrans:
            text = {name: keywords.pop(name) for name in ("encoding", "errors", "newline") if name in keywords}
            with self._making_parent(path, mode):
                return self.vfs.open(self._strip_protocol(path), mode, block_size or BUFFER, **text, **keywords)
        codec = None if compression is None else compr[get_compression(stringify_path(path), compression)]
        if codec in {None, compr[None]}:
            return super().open(path, mode, block_size, cache_options, None, **keywords)
        text = {name: keywords.pop(name, None) for name in ("encoding", "errors", "newline")}
        binary = mode.replace("t", "").replace("b", "") + "b"
        file = super().open(path, binary, block_size, cache_options, None, **keywords)
        compressed = CompressedFile(file, codec, binary)
        return TextFile(compressed, compressed, mode, False, **text) if is_text(mode) else compressed

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Any = None,
        cache_type: Any = None,
    ) -> Any:
        size = block_size or BUFFER
        with self._making_parent(path, mode):
            if autocommit or "r" in mode:  # what is opened to be changed is none of a transaction's files
                return self.vfs.open(path, mode, size)
            check_layers(size, None, None, None, is_text=False)
            handle = self.vfs.open(path, mode, autocommit=False)
        try:
            return DeferredUpdater(handle, size) if "+" in mode else DeferredWriter(handle, size)
        except BaseException:
            handle.abandon()
            raise

    @contextlib.contextmanager
    def _making_parent(self, path: Any, mode: str) -> Iterator[None]:
        """Make the folders above a file that may be a new one."""
        if self.auto_mkdir and "r" not in mode:
            self.vfs.makedirs(paths.split(self._strip_protocol(path))[0])
        yield

    # --- changing

    def mkdir(self, path: Any, create_parents: bool = True, **_: Any) -> None:
        """Make a folder; FileExistsError where there is anything."""
        path = self._strip_protocol(path)
        if create_parents:
            self.vfs.makedirs(path, exist_ok=False)
        else:
            self.vfs.mkdir(path)

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        """Make a folder and those above it."""
        self.vfs.makedirs(self._strip_protocol(path), exist_ok=exist_ok)

    def rmdir(self, path: Any) -> None:
        """Remove an empty folder."""
        self.vfs.rmdir(self._strip_protocol(path))

    def rm_file(self, path: Any) -> None:
        """Delete a file."""
        self.vfs.remove(self._strip_protocol(path))

    _rm = rm_file

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Delete files, and folders with all that is in them where `recursive`; IsADirectoryError where not."""
        for each in reversed(self.expand_path(path, recursive=recursive, maxdepth=maxdepth)):
            if recursive and self.vfs.isdir(each):
                self.vfs.rmdir(each)
            else:
                self.vfs.remove(each)

    def mv(self, path1: Any, path2: Any, recursive: bool = False, maxdepth: int | None = None, **keywords: Any) -> None:
        """Rename a file or folder, as `VFS.rename` does; into the target where that is a folder.

        Several at once (lists, patterns) are copied and deleted.
        """
        if isinstance(path1, list) or isinstance(path2, list) or has_magic(stringify_path(path1)):
            super().mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **keywords)
            return
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        if source == target:
            return
        if stringify_path(path2).endswith("/") or self.vfs.isdir(target):
            target = paths.join(target, posixpath.basename(source))
        if self.auto_mkdir:
            self.vfs.makedirs(paths.split(target)[0])
        self.vfs.rename(source, target)

    def cp_file(self, path1: Any, path2: Any, **_: Any) -> None:
        """Copy a file, whole or not at all; of a folder make an empty one."""
        if self.isdir(path1):
            self.makedirs(path2, exist_ok=True)
            return
        with self.open(path1) as source, self.open(path2, "wb") as target:
            shutil.copyfileobj(source, target, BUFFER)

    def pipe_file(self, path: Any, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Write a whole file; with mode="create" FileExistsError where there is one, also where others make it now."""
        with self.open(path, "xb" if mode == "create" else "wb") as file:
            file.write(value)

    def touch(self, path: Any, truncate: bool = True, **_: Any) -> None:
        """Make an empty file; unless `truncate`, only give one that is there the present time."""
        if truncate or not self.exists(path):
            self.open(path, "wb").close()
        else:
            self.vfs.utime(self._strip_protocol(path))


def _info(path: str, entry: Entry) -> dict[str, Any]:
    """What fsspec wants to know of a file or folder, as far as a listing tells."""
    return {
        "name": path,
        "size": entry.size,
        "type": "directory" if entry.is_dir else "file",
        "mtime": entry.mtime,
        "version": entry.version,
    }


# --- files of a transaction


class _Deferred:
    """A file of a transaction: when it is closed its writing ends, and the transaction's end publishes it or not."""

    handle: Any
    _is_ended = False

    @property
    def closed(self) -> bool:
        return self._is_ended or bool(self.handle.closed)

    def close(self) -> None:
        """End the writing; nothing is published."""
        if not self.closed:
            self.flush()  # type: ignore[attr-defined]
            self._is_ended = True

    def commit(self) -> None:
        """Publish the file, unless its own block failed. Called by the transaction."""
        if not self.handle.closed:
            super().commit()  # type: ignore[misc]

    def discard(self) -> None:
        """Give the file up. Called by the transaction."""
        self.handle.abandon()


class DeferredWriter(_Deferred, FileWriter):
    """A file of a transaction that is written."""


class DeferredUpdater(_Deferred, FileUpdater):
    """A file of a transaction that is read and written."""


# --- one VFS for each store with its options


# By (URL, storage options, options). Shared by threads, whose filesystems are different ones in fsspec; a VFS is made
# for any process, and has nothing open before it is used.
_shared: dict[tuple[str, str, VFSOptions], VFS] = {}


def vfs_of(url: str, storage_options: Mapping[str, Any], options: VFSOptions) -> VFS:
    """Return the VFS that all filesystems of this process have for a store with these options."""
    key = (url, tokenize(dict(storage_options)), options)
    found = _shared.get(key)
    if found is None:
        found = _shared.setdefault(key, VFS(url, storage_options=storage_options, options=options))
    return found


def _close_all() -> None:
    """Store what waits in the caches, and release everything, as the program ends."""
    deadline = SYSTEM_CLOCK.monotonic() + DRAIN_TIMEOUT
    for vfs in list(_shared.values()):
        try:
            left = vfs.stop(max(0.0, deadline - SYSTEM_CLOCK.monotonic()))
            if left:
                logger.warning("%s: %d files wait in the cache; the next start stores them", vfs.name, left)
            vfs.close()
        except OSError as error:
            logger.warning("%s: %s", vfs.name, error)


# Python's own hook for what must come before the thread pools, which the stores' clients use, take no more work.
getattr(threading, "_register_atexit", atexit.register)(_close_all)
fsspec.register_implementation(PROTOCOL, FTPVFSFileSystem, clobber=True)
