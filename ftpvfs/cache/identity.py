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

from ftpvfs.backend.backend import protocol_of, root_of
from ftpvfs.backend.options import SAME
from ftpvfs.cache.beside import peek
from ftpvfs.cache.database import DATABASE
from ftpvfs.cache.files import Place
from ftpvfs.cache.index import Index, cache_name
from ftpvfs.cache.summary import DIRTY
from ftpvfs.coordination.lockfile import LockFile
from ftpvfs.errors import failure

logger = logging.getLogger(__name__)

IDENTITY = "store.json"
# Locked by the process that compares the identity with its own, for as long as that takes.
CLAIMING = "store.lock"
# What is of one store alone: the index, the clean items, all data, what was told of uploads.
OF_THE_STORE = (*(place.value for place in Place if place is not Place.QUARANTINE), "items", "uploads")
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
    file = LockFile(str(folder / IDENTITY))
    try:
        # Processes that start together decide one after the other, so that whoever has locked the identity by now uses
        # the cache for what stands there, and is not only about to write the same as this one.
        with contextlib.closing(LockFile(str(folder / CLAIMING))) as turn:
            turn.lock()
            _agree(folder, file, mine)
            file.share()
    except BaseException:
        file.close()
        raise
    return file


def _agree(folder: Path, file: LockFile, mine: Identity) -> None:
    """Write the folder's new identity, unless it stands there already."""
    there = _read(file)
    if there == mine:
        return
    if file.try_lock():
        if there is not None:
            _take_over(folder, there, mine)
        _write(file, mine)
    elif there is not None and there.is_same_store(mine):
        logger.warning("%s: another process uses this cache for %s; this is for %s", folder, there, mine)
    else:
        store = there or "a store that it does not name"
        raise failure(errno.EBUSY, str(folder), f"This cache is in use for {store}; {mine} needs another --name")


def _take_over(folder: Path, there: Identity, mine: Identity) -> None:
    waiting = waits_in(folder)
    if there.is_same_store(mine):
        if waiting:
            logger.warning("%s: %d changes made for %s go to %s now", folder, waiting, there, mine)
        return
    if waiting:
        raise _waits_for(folder, waiting, there, mine)
    logger.warning("%s: nothing waits in this cache of %s; it is emptied for %s", folder, there, mine)
    for name in OF_THE_STORE:
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in folder.glob(f"{DATABASE}*"):
        path.unlink(missing_ok=True)


def examine_claim(folder: Path, mine: Identity) -> None:
    """Raise EBUSY where `claim` would because of what waits in the folder; nothing is changed."""
    try:
        there = _parsed((folder / IDENTITY).read_bytes())
    except OSError:  # there is no such folder, or none that can be used, which is told elsewhere where it matters
        return
    if there is not None and not there.is_same_store(mine) and (waiting := len(peek(folder))):
        raise _waits_for(folder, waiting, there, mine)


def folder_name(url: str, name: str | None) -> str:
    """Return the name of a store's cache folder. ImportError and ValueError where the URL's store cannot be had."""
    return name or cache_name([protocol_of(url), root_of(url)])


def is_in_use(folder: Path) -> bool:
    """Tell whether a process has the cache open."""
    with contextlib.closing(LockFile(str(folder / CLAIMING))) as turn:
        turn.lock()
        with contextlib.closing(LockFile(str(folder / IDENTITY))) as file:
            return not file.try_lock()


def waits_in(folder: Path) -> int:
    """Return how many files and deletions wait in a cache folder that no process uses."""
    beside = len(peek(folder))
    if beside or not (folder / DATABASE).exists():
        return beside
    with contextlib.closing(Index(folder)) as index:
        return len(index.keys(DIRTY))


def _read(file: LockFile) -> Identity | None:
    """Return what stands there; None for nothing, as in a cache of before, or for nonsense."""
    return _parsed(os.pread(file.descriptor, 2**16, 0))


def _waits_for(folder: Path, waiting: int, there: Identity, mine: Identity) -> OSError:
    return failure(
        errno.EBUSY,
        str(folder),
        f"{waiting} changes in this cache wait for {there}, and not for {mine}: serve that one, store them with"
        " `ftpvfs cache flush` and its URL, or take another --name",
    )


def _parsed(data: bytes) -> Identity | None:
    try:
        fields = json.loads(data)
        return Identity(**{name: str(value) for name, value in fields.items()})
    except (ValueError, TypeError, AttributeError):
        return None


def _write(file: LockFile, identity: Identity) -> None:
    os.ftruncate(file.descriptor, 0)
    os.pwrite(file.descriptor, json.dumps(asdict(identity), sort_keys=True).encode(), 0)
    os.fsync(file.descriptor)
