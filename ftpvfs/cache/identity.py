"""Whose a cache folder is: the store's protocol, root and host stand in a small file in it, and never a secret.

A cache is named by protocol and path or by `--name`, never by options, so that an edited endpoint or key does not
orphan it. So a folder may be opened for another store than it was made for, which would get the other one's files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ftpvfs.backend.backend import protocol_of
from ftpvfs.cache.beside import peek
from ftpvfs.cache.database import DATABASE
from ftpvfs.cache.files import Place
from ftpvfs.cache.index import Index
from ftpvfs.cache.summary import DIRTY
from ftpvfs.coordination.lockfile import LockFile
from ftpvfs.errors import failure

logger = logging.getLogger(__name__)

IDENTITY = "store.json"
# What is of one store alone: the index, the clean items, all data, what was told of uploads.
OF_THE_STORE = (*(place.value for place in Place if place is not Place.QUARANTINE), "items", "uploads")
SAME = {"s3a": "s3", "gcs": "gs", "local": "file", "ssh": "sftp", "abfss": "abfs"}
# Protocols whose URLs name a bucket or a path where others name a host.
HOSTLESS = {"s3", "gs", "file", "abfs", "az", "memory"}
# Storage options in which the host may stand, as `endpoint_url` or `client_kwargs.endpoint_url`.
ENDPOINTS = ("endpoint_url", "host", "account_name")


@dataclass(frozen=True)
class Identity:
    """Which store it is, as far as may be written down."""

    protocol: str
    root: str
    host: str = ""

    @classmethod
    def of(cls, url: str, storage_options: Mapping[str, Any], root: str) -> Identity:
        """Return the identity of a URL; `root` is the backend's."""
        protocol = SAME.get(protocol_of(url), protocol_of(url))
        return cls(protocol, root.strip("/"), _endpoint(storage_options) or _host(protocol, url))

    def is_same_store(self, other: Identity) -> bool:
        """Tell whether only the host differs, which may have got another name."""
        return (self.protocol, self.root) == (other.protocol, other.root)

    def __str__(self) -> str:
        root = f"/{self.root}" if self.protocol == "file" else self.root
        return f"{self.protocol}://{root}" + (f" at {self.host}" if self.host else "")


def _endpoint(options: Mapping[str, Any]) -> str:
    inside = options.get("client_kwargs")
    for each in (options, inside if isinstance(inside, Mapping) else {}):
        for name in ENDPOINTS:
            if isinstance(each.get(name), str):
                return _without_user(each[name])
    return ""


def _host(protocol: str, url: str) -> str:
    return "" if protocol in HOSTLESS or "::" in url else _without_user(url)


def _without_user(url: str) -> str:
    with contextlib.suppress(ValueError):
        return urlsplit(url if "://" in url else f"//{url}").netloc.rpartition("@")[2]
    return ""


def claim(folder: Path, mine: Identity) -> LockFile:
    """Make the folder this store's, for as long as what is returned is open; it exists already.

    One of another store is taken over, and what was cached is dropped, where nothing waits in it and no process uses
    it. Raises EBUSY otherwise. Another host of the same store is warned of where something waits.
    """
    while True:
        file = LockFile(str(folder / IDENTITY))
        try:
            file.share()
            there = _read(file)
            if there == mine:
                return file
            if _is_agreed(folder, file, there, mine):
                file.share()
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_agreed(folder: Path, file: LockFile, there: Identity | None, mine: Identity) -> bool:
    """Write the folder's new identity; False where another process came first, so that it is to be read again."""
    file.unlock()
    if not file.try_lock():
        if there is None:
            return False  # somebody writes it just now
        if there.is_same_store(mine):
            logger.warning("%s: another process uses this cache for %s; this is for %s", folder, there, mine)
            return True
        raise failure(errno.EBUSY, str(folder), f"This cache is in use for {there}; {mine} needs another --name")
    if _read(file) != there:
        return False
    if there is not None:
        _take_over(folder, there, mine)
    _write(file, mine)
    return True


def _take_over(folder: Path, there: Identity, mine: Identity) -> None:
    waiting = waits_in(folder)
    if there.is_same_store(mine):
        if waiting:
            logger.warning("%s: %d changes made for %s go to %s now", folder, waiting, there, mine)
        return
    if waiting:
        raise failure(
            errno.EBUSY,
            str(folder),
            f"{waiting} changes in this cache wait for {there}, and not for {mine}: serve that one, store them with"
            " `ftpvfs cache flush` and its URL, or take another --name",
        )
    logger.warning("%s: nothing waits in this cache of %s; it is emptied for %s", folder, there, mine)
    for name in OF_THE_STORE:
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in folder.glob(f"{DATABASE}*"):
        path.unlink(missing_ok=True)


def waits_in(folder: Path) -> int:
    """Return how many files and deletions wait in a cache folder that no process uses."""
    beside = len(peek(folder))
    if beside or not (folder / DATABASE).exists():
        return beside
    with contextlib.closing(Index(folder)) as index:
        return len(index.keys(DIRTY))


def _read(file: LockFile) -> Identity | None:
    """Return what stands there; None for nothing, as in a cache of before, or for nonsense."""
    try:
        fields = json.loads(os.pread(file.descriptor, 2**16, 0))
        return Identity(**{name: str(value) for name, value in fields.items()})
    except (ValueError, TypeError, AttributeError):
        return None


def _write(file: LockFile, identity: Identity) -> None:
    os.ftruncate(file.descriptor, 0)
    os.pwrite(file.descriptor, json.dumps(asdict(identity), sort_keys=True).encode(), 0)
    os.fsync(file.descriptor)
