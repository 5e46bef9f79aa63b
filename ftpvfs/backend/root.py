"""Whether the folder that a local store serves is still the one that it began with: a disk may be unmounted under it.

A mount point without its disk looks like an empty store: every file would be taken for deleted, and what is uploaded
would lie hidden below the disk once that is back. So a root that was seen is remembered by its device and inode. It is
away while nothing is at its name; while it was a mount point and is none; and while another folder is there that is
empty although the root was not. Every other folder in its place (a copy that was renamed there, a disk that was mounted
again) is taken for the root. A new start takes whatever it finds.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from dataclasses import dataclass

from ftpvfs.errors import ENOSTORE, failure

logger = logging.getLogger(__name__)

MISSING = {errno.ENOENT, errno.ENOTDIR}


@dataclass(frozen=True)
class _Seen:
    """A root as it was seen."""

    device: int
    inode: int
    is_mount: bool


class Root:
    """The folder of one local store. Any thread; a forked process goes on with what its parent knew.

    There is no lock, which might be held at a fork: two threads that look at the same time find the same.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._seen: _Seen | None = None
        # Whether files or folders were in it, so that an empty folder in its place tells of a disk that is gone.
        self._had_content = False
        self._is_away = False

    def require(self, path: str) -> None:
        """Raise for `path` where the root is not there: ENOSTORE where it never was, EHOSTUNREACH where it has gone."""
        try:
            info = os.stat(self.name)
        except OSError as error:
            if error.errno not in MISSING:
                raise
            if self._seen is None:
                raise failure(ENOSTORE, path, "The store's folder does not exist") from error
            raise self._away(path, "is not there") from error
        seen = self._seen
        if seen is None or (info.st_dev, info.st_ino) != (seen.device, seen.inode):
            self._take(info, path)
        if self._is_away:
            self._is_away = False
            logger.warning("the served folder %s is back", self.name)

    def has_content(self) -> None:
        """Note that something is in the root."""
        self._had_content = True

    def _take(self, info: os.stat_result, path: str) -> None:
        """Take another folder than before for the root, unless it is what remains of one whose disk is gone."""
        found = _Seen(info.st_dev, info.st_ino, os.path.ismount(self.name))
        is_empty = _is_empty(self.name)
        if self._seen is not None:
            if self._seen.is_mount and not found.is_mount:
                raise self._away(path, "is no mount point any more")
            if is_empty and self._had_content:
                raise self._away(path, "has an empty folder in its place")
            logger.warning("another folder is at %s than before; it is served from now on", self.name)
        self._seen = found
        self._had_content = self._had_content or not is_empty

    def _away(self, path: str, state: str) -> OSError:
        if not self._is_away:
            self._is_away = True
            logger.warning(
                "the served folder %s %s: the store is away until it is back (is its disk mounted?);"
                " a new start takes what is there", self.name, state,
            )  # fmt: skip
        return failure(errno.EHOSTUNREACH, path, "The store's folder is not there: its disk may not be mounted")


# What is known of roots in this process, and in those that it forks: a worker that is started anew while the disk is
# gone must not take the empty mount point for the store.
_roots: dict[str, Root] = {}


def served(name: str) -> Root:
    """Return what is known of a root, looked at now where it was not yet."""
    root = _roots.setdefault(name, Root(name))
    with contextlib.suppress(OSError):  # told to whoever uses it
        root.require("")
    return root


def forget(root: Root) -> None:
    """Let the next store of that root begin with what it finds."""
    if _roots.get(root.name) is root:
        del _roots[root.name]


def _is_empty(name: str) -> bool:
    with os.scandir(name) as found:
        return next(found, None) is None
