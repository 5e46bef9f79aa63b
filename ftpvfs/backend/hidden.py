"""The server's own cache, which no client may reach where it lies in a folder of this machine that is served."""

from __future__ import annotations

import errno
import os

from ftpvfs.errors import failure


class Hidden:
    """A folder below a served one that is neither shown nor changed, by whatever links it is reached. Any thread."""

    def __init__(self, folder: str, *, follow_links: bool) -> None:
        self._folder = os.path.realpath(folder)
        self._follow_links = follow_links

    @classmethod
    def below(cls, root: str, folder: str, *, follow_links: bool) -> Hidden | None:
        """Return what `folder` is to those who are served `root`: None where they cannot get there.

        Raises ValueError where the served folder lies in it: all that is served would be the server's own.
        """
        root, folder = os.path.realpath(root), os.path.realpath(folder)
        if _is_within(root, folder):
            raise ValueError(f"{root} lies in the cache folder {folder}; serve another folder, or write --cache-dir")
        return cls(folder, follow_links=follow_links) if follow_links or _is_within(folder, root) else None

    def covers(self, name: str) -> bool:
        """Tell whether a file or folder of the disk belongs to the hidden folder."""
        return _is_within(self._real(name), self._folder)

    def refuse(self, name: str, path: str) -> None:
        """Raise EACCES for `path`, which is `name` on the disk, where that belongs to the hidden folder."""
        if self.covers(name):
            raise failure(errno.EACCES, path, "The server's own cache is there")

    def refuse_above(self, name: str, path: str) -> None:
        """Raise EPERM for a folder that holds the hidden one, and so can get no other name or rights."""
        if _is_within(self._folder, self._real(name)):
            raise failure(errno.EPERM, path, "The server's own cache is below that folder")

    def _real(self, name: str) -> str:
        # Where links are not followed, no name that gets here leads through one.
        return os.path.realpath(name) if self._follow_links else name


def _is_within(name: str, folder: str) -> bool:
    return name == folder or name.startswith(folder.rstrip("/") + "/")
