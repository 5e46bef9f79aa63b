"""Renaming a folder where the store has none: copy every object, look at every copy, and only then delete.

A failure before the deletes leaves the old folder whole and takes the copies away again; a failure among them leaves
both names, and says so. Nothing is lost in between (users.md rows 19 and 20).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace

from ftpvfs import paths
from ftpvfs.backend.backend import Backend, Entry
from ftpvfs.errors import failure, reason_of
from ftpvfs.vfs.times import Move


def move_tree(
    backend: Backend,
    source: str,
    target: str,
    *,
    limit: int,
    workers: int,
    copied: Callable[[list[Move]], None] = lambda _: None,
    leave_out: Collection[str] = (),
) -> int:
    """Move all objects below `source` to `target`; return how many. `copied` is told of the copies before any delete.

    Those whose new paths are in `leave_out` are deleted without being copied.

    Raises EFBIG, with nothing touched, for more than `limit` objects; else the OSError of the store with the state
    left.
    """
    found = list(_bounded(backend, source, limit))
    begun: list[str] = []
    copies: list[Move] = []
    try:
        if backend.capability.real_directories:
            _copy_folders(backend, source, target)
        wanted = [each for each in found if paths.rebase(each[0], source, target) not in leave_out]
        _copy_all(backend, wanted, source, target, begun, copies, workers)
        copied(copies)
    except OSError as error:
        state = "nothing was renamed" + _take_back(backend, begun, target)
        raise failure(error.errno or errno.EIO, source, f"{reason_of(error)} ({state})") from error
    try:
        backend.remove_many(path for path, _ in found)
        _remove_empty_folders(backend, source)
    except OSError as error:
        state = f"all files are in {target!r} now, and some still in {source!r} too"
        raise failure(error.errno or errno.EIO, source, f"{reason_of(error)} ({state})") from error
    return len(found)


def _bounded(backend: Backend, source: str, limit: int) -> Iterator[tuple[str, Entry]]:
    for count, item in enumerate(backend.walk(source), 1):
        if count > limit:
            raise failure(errno.EFBIG, source, f"The folder has more than {limit} files (--max-rename-objects)")
        yield item


def _copy_all(
    backend: Backend,
    found: list[tuple[str, Entry]],
    source: str,
    target: str,
    begun: list[str],
    copies: list[Move],
    workers: int,
) -> None:
    """Copy what was found; `begun` and `copies` tell the caller how far it came, also when this fails."""

    def copy(path: str, entry: Entry) -> None:
        new = paths.rebase(path, source, target)
        entry = replace(entry, name=paths.split(path)[1])  # walk names it from `source` on
        begun.append(new)  # a copy whose answer is lost may be there all the same
        if path.endswith("/"):  # the marker of a folder: it has no bytes, and some stores (SeaweedFS) do not copy it
            backend.mkdir(new[:-1])
            return
        there = backend.copy(path, new)
        copies.append(Move(path, entry, new, there))
        if there.size != entry.size:
            raise failure(errno.EIO, path, f"The copy has {there.size} bytes instead of {entry.size}")

    with ThreadPoolExecutor(workers, thread_name_prefix="ftpvfs-rename") as threads:
        running = [threads.submit(copy, path, entry) for path, entry in found]
        done, _ = wait(running, return_when=FIRST_EXCEPTION)
        if any(item.exception() for item in done):
            threads.shutdown(wait=True, cancel_futures=True)
    for item in running:
        if not item.cancelled():
            item.result()


def _take_back(backend: Backend, begun: list[str], target: str) -> str:
    """Delete the copies that were made; return words for what could not be, if anything."""
    try:
        with contextlib.suppress(FileNotFoundError):
            backend.remove_many(begun)
        _remove_empty_folders(backend, target)
    except OSError:
        return f"; copies are left in {target!r}"
    return ""


def _copy_folders(backend: Backend, source: str, target: str) -> None:
    try:
        backend.stat(target)
    except FileNotFoundError:
        backend.mkdir(target)
    for entry in backend.list(source):
        if entry.is_dir:
            _copy_folders(backend, paths.join(source, entry.name), paths.join(target, entry.name))


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
