"""A disk that forgets what was not synced, and a process that dies at an operation of our choice.

`CrashingFiles` and `CrashingIndex` work on real files and a real SQLite database, and count every operation that a
crash could come before. After the crash `image` makes the folder as the disk may have it: what was synced is there; of
the rest, names and bytes, any part is.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ftpvfs.cache.files import DataFile, Files, Place
from ftpvfs.cache.index import Index

T = TypeVar("T")


class Died(BaseException):
    """The process is gone; nobody catches this."""


class Death:
    """Counts operations, and ends the process at the one that was chosen; from then on every operation fails."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.count = 0

    def may_come(self) -> None:
        self.count += 1
        if self.at is not None and self.count >= self.at:
            raise Died


class CrashingFiles(Files):
    """Files that know what of them is surely on the disk."""

    def __init__(self, folder: Path, death: Death) -> None:
        super().__init__(folder)
        self.death = death
        # By inode. A descriptor of each removed file is kept, so that its number is not given to another.
        self.synced: dict[int, bytes] = {}
        self.removed: dict[int, int] = {}
        # What the kernel closes when a process dies.
        self.opened: list[DataFile] = []
        self.names_synced: dict[Place, dict[str, int]] = {place: {} for place in Place}

    def create(self, place: Place, name: str) -> DataFile:
        self.death.may_come()
        return self._kept(super().create(place, name))

    def open(self, place: Place, name: str, *, writable: bool = False) -> DataFile:
        return self._kept(super().open(place, name, writable=writable))

    def _kept(self, file: DataFile) -> DataFile:
        self.opened.append(file)
        return file

    def pwrite(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self.death.may_come()
        super().pwrite(descriptor, data, offset)

    def pwritev(self, descriptor: int, pieces: Sequence[bytes | memoryview], offset: int) -> None:
        self.death.may_come()
        super().pwritev(descriptor, pieces, offset)

    def truncate(self, descriptor: int, size: int) -> None:
        self.death.may_come()
        super().truncate(descriptor, size)

    def clone(self, source: int, target: int, size: int) -> None:
        self.death.may_come()
        super().clone(source, target, size)

    def _rename(self, source: str, target: str) -> None:
        self.death.may_come()
        self._bury(target)
        super()._rename(source, target)

    def link(self, place: Place, name: str, new: str) -> None:
        self.death.may_come()
        super().link(place, name, new)

    def unlink(self, place: Place, name: str) -> int:
        self.death.may_come()
        self._bury(self.path(place, name))
        return super().unlink(place, name)

    def _bury(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            inode = os.fstat(descriptor).st_ino
            if inode in self.removed:
                os.close(descriptor)
            else:
                self.removed[inode] = descriptor

    def sync(self, descriptor: int) -> None:
        self.death.may_come()
        status = os.fstat(descriptor)
        self.synced[status.st_ino] = os.pread(descriptor, status.st_size, 0)

    def sync_folder(self, place: Place) -> None:
        self.death.may_come()
        self.names_synced[place] = self._names_now(place)

    def boot(self) -> str:
        return "the first"

    def _names_now(self, place: Place) -> dict[str, int]:
        return {entry.name: entry.inode() for entry in self.names(place)}

    def close(self) -> None:
        for file in self.opened:
            file.close()
        for descriptor in self.removed.values():
            os.close(descriptor)

    # --- after the crash

    def image(
        self,
        target: Path,
        chance: Callable[[], bool],
        *,
        bytes_chance: Callable[[], bool] | None = None,
        index: bool = True,
    ) -> None:
        """Make `target` what the disk has; `chance` tells for each thing that was not synced whether it is there.

        `bytes_chance` is that of files' bytes, where it is another one; without `index` that is lost, too.
        """
        target.mkdir(mode=0o700)
        for name in ("cache.db", "cache.db-wal", "generation"):
            if (self.folder / name).exists() and (index if name != "generation" else chance()):
                shutil.copy(self.folder / name, target / name)
        if chance():
            shutil.copytree(self.folder / "items", target / "items")
        made: dict[int, Path] = {}
        for place in Place:
            (target / place.value).mkdir(mode=0o700)
            synced, now = self.names_synced[place], self._names_now(place)
            for name in sorted(synced.keys() | now.keys()):
                inode = now.get(name) if synced.get(name) == now.get(name) or chance() else synced.get(name)
                if inode is not None:
                    self._put(inode, target / place.value / name, made, bytes_chance or chance)

    def _put(self, inode: int, path: Path, made: dict[int, Path], chance: Callable[[], bool]) -> None:
        if inode in made:
            os.link(made[inode], path)
            return
        made[inode] = path
        written, synced = self._bytes_now(inode), self.synced.get(inode, b"")
        if written != synced and chance():
            synced = written[: len(written) // 2] if chance() else written
        path.write_bytes(synced)

    def _bytes_now(self, inode: int) -> bytes:
        if inode in self.removed:
            return os.pread(self.removed[inode], 2**30, 0)
        for place in Place:
            for entry in self.names(place):
                if entry.inode() == inode:
                    return Path(entry.path).read_bytes()
        return b""


class CrashingIndex(Index):
    """An index whose transactions a crash can come before and behind; what SQLite has committed is on the disk."""

    def __init__(self, folder: Path, death: Death) -> None:
        super().__init__(folder)
        self.death = death

    def atomically(self, change: Callable[[], T]) -> T:
        self.death.may_come()
        result = super().atomically(change)
        self.death.may_come()
        return result


def never() -> bool:
    """Nothing that was not synced is there: a power cut at its worst."""
    return False


def always() -> bool:
    """All is there: the process alone was killed."""
    return True


def sometimes(seed: int) -> Callable[[], bool]:
    """Anything may be there."""
    chance = random.Random(seed)
    return lambda: chance.random() < 0.5
