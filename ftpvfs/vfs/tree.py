"""Renaming a folder where the store has none: copy every object, look at every copy, and only then delete.

A failure before the deletes leaves the old folder whole and takes the copies away again; a failure among them leaves
both names, and says so. Nothing is lost in between (users.md rows 19 and 20): a copy replaces nothing, and only the
version that was copied is deleted. What is stored in the folder meanwhile is copied again, or keeps its old name.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

from ftpvfs import paths
from ftpvfs.backend.backend import ABSENT, Backend, Entry
from ftpvfs.errors import ECHANGED, failure, reason_of
from ftpvfs.vfs.times import Move

logger = logging.getLogger(__name__)

# How often an object is copied again because another version of it was stored meanwhile.
MOST_COPIES = 5


@dataclass(frozen=True)
class Surroundings:
    """What a moving folder asks of those around it.

    `hold(paths)` keeps other writers of the paths away; `stays(path, new)` tells that neither is to be touched;
    `copied` is told of copies before their sources are deleted.
    """

    hold: Callable[..., contextlib.AbstractContextManager[None]]
    stays: Callable[[str, str], bool] = lambda path, new: False
    copied: Callable[[list[Move]], None] = lambda moves: None


class TreeMove:
    """One folder on its way: `copy`, then `remove`. One thread, which has `workers` others do the work.

    Objects whose new paths are in `leave_out` are deleted without being copied.
    """

    def __init__(
        self,
        backend: Backend,
        source: str,
        target: str,
        *,
        around: Surroundings,
        workers: int,
        leave_out: Collection[str] = (),
    ) -> None:
        self._backend = backend
        self._source = source
        self._target = target
        self._around = around
        self._workers = workers
        self._leave_out = leave_out
        # Objects to be deleted, as they were when they were listed, and then as they were copied.
        self._found: dict[str, Entry] = {}
        # Written by many threads, each at its own key: copies by their new paths, None while nobody knows whether one
        # is there; and why objects keep their old names.
        self._copies: dict[str, Move | None] = {}
        self._kept: dict[str, str] = {}

    # --- copying

    def copy(self, limit: int) -> None:
        """Copy all that is in the folder.

        Raises EFBIG, with nothing touched, for more than `limit` objects; else the OSError of the store with the state
        left.
        """
        self._found = dict(_bounded(self._backend, self._source, limit))
        try:
            for path in self._found:  # a name below may become too long
                self._backend.check_name(self._new(path).rstrip("/"))
            if self._backend.capability.real_directories:
                self._copy_folders(self._source, self._target)
            self._copy_all([path for path in self._found if self._new(path) not in self._leave_out])
            self._around.copied([move for move in self._copies.values() if move is not None])
        except OSError as error:
            state = "nothing was renamed" + self._take_back()
            raise failure(error.errno or errno.EIO, self._source, f"{reason_of(error)} ({state})") from error

    def _copy_all(self, names: list[str]) -> None:
        with self._threads() as threads:
            running = [threads.submit(self._copy, name) for name in names]
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            if any(item.exception() for item in done):
                threads.shutdown(wait=True, cancel_futures=True)
        for item in running:
            if not item.cancelled():
                item.result()

    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._workers, thread_name_prefix="ftpvfs-rename")

    def _new(self, path: str) -> str:
        return paths.rebase(path, self._source, self._target)

    def _copy(self, path: str) -> None:
        new = self._new(path)
        if path.endswith("/"):  # the marker of a folder: it has no bytes, and some stores (SeaweedFS) do not copy it
            self._copies[new] = None
            self._backend.mkdir(new[:-1])
            return
        with self._around.hold(path, new):
            if self._around.stays(path, new):
                del self._found[path]
            elif not self._is_free(new):
                self._keep(path, f"there is a {new!r} by now")
            else:
                self._copy_held(path, new)

    def _is_free(self, new: str) -> bool:
        try:
            self._backend.require(new, ABSENT)
        except OSError as error:
            if error.errno != ECHANGED:
                raise
            return False
        return True

    def _keep(self, path: str, reason: str) -> None:
        """Let an object keep its old name."""
        logger.warning("%r keeps its name while its folder is renamed: %s", path, reason)
        self._kept[path] = reason
        del self._found[path]

    def _copy_held(self, path: str, new: str) -> None:
        """Copy the version that is there now, and note which that is. What is gone has nothing to be copied."""
        for _ in range(MOST_COPIES):
            entry = self._found[path]
            self._copies.setdefault(new, None)  # a copy whose answer is lost may be there all the same
            try:
                there = self._backend.copy(path, new)
            except FileNotFoundError:
                if self._look(path) is not None or self._copies[new] is not None:
                    raise
                del self._found[path], self._copies[new]
                return
            # walk names it from `source` on
            self._copies[new] = Move(path, replace(entry, name=paths.split(path)[1]), new, there)
            if there.size == entry.size:
                return
            now = self._look(path)
            if now is None or now.fingerprint == entry.fingerprint:
                break
            self._found[path] = now
        raise failure(errno.EIO, path, f"The copy has {there.size} bytes instead of {entry.size}")

    def _look(self, path: str) -> Entry | None:
        try:
            return self._backend.stat(path)
        except FileNotFoundError:
            return None

    def _copy_folders(self, source: str, target: str) -> None:
        try:
            self._backend.stat(target)
        except FileNotFoundError:
            self._backend.mkdir(target)
        for entry in self._backend.list(source):
            if entry.is_dir:
                self._copy_folders(paths.join(source, entry.name), paths.join(target, entry.name))

    def _take_back(self) -> str:
        """Delete the copies that were made; return words for what could not be, if anything."""
        try:
            self._each(self._take_back_one, list(self._copies))
            _remove_empty_folders(self._backend, self._target)
        except OSError:
            return f"; copies are left in {self._target!r}"
        return ""

    def _take_back_one(self, new: str) -> None:
        move = self._copies[new]
        with contextlib.suppress(FileNotFoundError), self._around.hold(new):
            if move is not None:
                self._backend.remove(new, only=move.new.fingerprint)
            elif new.endswith("/"):
                self._backend.remove(new)
            else:
                self._take_back_unknown(new)

    def _take_back_unknown(self, new: str) -> None:
        """Delete a copy of which no answer came, where something is there and it is that."""
        old = self._found[paths.rebase(new, self._target, self._source)]
        entry = self._backend.stat(new)
        if entry.size != old.size or (entry.digest or entry.fingerprint) != (old.digest or old.fingerprint):
            raise failure(ECHANGED, new)
        self._backend.remove(new, only=entry.fingerprint)

    # --- deleting

    def remove(self) -> None:
        """Delete what was copied, each as it was copied; raise OSError, with the state left, where something stays."""
        try:
            self._each(self._remove, list(self._found))
            _remove_empty_folders(self._backend, self._source)
        except OSError as error:
            state = f"all files are in {self._target!r} now, and some still in {self._source!r} too"
            raise failure(error.errno or errno.EIO, self._source, f"{reason_of(error)} ({state})") from error
        if self._kept:
            path, reason = next(iter(self._kept.items()))
            state = f"{len(self._kept)} of its files keep their names, the others are in {self._target!r} now"
            raise failure(errno.EBUSY, self._source, f"{paths.split(path)[1]}: {reason} ({state})")

    def _remove(self, path: str) -> None:
        if path.endswith("/"):
            self._backend.remove(path)
            return
        new = self._new(path)
        with self._around.hold(path, new):
            for _ in range(MOST_COPIES):
                if self._around.stays(path, new) or self._is_removed(path):
                    return
                if not self._is_copied_again(path, new):
                    return
            self._keep(path, "it changes all the time")

    def _is_removed(self, path: str) -> bool:
        try:
            self._backend.remove(path, only=self._found[path].fingerprint)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != ECHANGED:
                raise
            return False
        return True

    def _is_copied_again(self, path: str, new: str) -> bool:
        """Copy an object that was stored anew since, over its first copy; False where it is gone, or keeps its name."""
        first, now, there = self._copies.get(new), self._look(path), self._look(new)
        if now is None:
            return False
        if first is None or there is None or there.fingerprint != first.new.fingerprint:
            self._keep(path, "it was stored meanwhile")
            return False
        logger.info("%r was stored while its folder was renamed, and is copied again", path)
        self._found[path] = now
        self._copy_held(path, new)
        self._around.copied([move for move in [self._copies[new]] if move is not None])
        return True

    def _each(self, work: Callable[[str], None], names: list[str]) -> None:
        """Do the work for all names, several at a time; raise the first failure after all were tried."""
        with self._threads() as threads:
            running = [threads.submit(work, name) for name in names]
        for item in running:
            item.result()


def _bounded(backend: Backend, source: str, limit: int) -> Iterator[tuple[str, Entry]]:
    for count, item in enumerate(backend.walk(source), 1):
        if count > limit:
            raise failure(errno.EFBIG, source, f"The folder has more than {limit} files (--max-rename-objects)")
        yield item


def _remove_empty_folders(backend: Backend, path: str) -> bool:
    """Remove the folder and those below it as far as no file is in them; return whether it is gone.

    On an object store folders go with their last object, and this is one request; but some (SeaweedFS) keep them.
    """
    try:
        entries = backend.list(path)
    except FileNotFoundError:
        return True
    gone = [entry.is_dir and _remove_empty_folders(backend, paths.join(path, entry.name)) for entry in entries]
    if not all(gone):
        return False
    with contextlib.suppress(FileNotFoundError):  # in memory it may have gone with those in it
        backend.rmdir(path)
    return True
