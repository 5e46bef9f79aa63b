"""Renaming a folder where the store has none: copy every object, look at every copy, and only then delete.

A failure before the deletes leaves the old folder whole and takes the copies away again; a failure among them leaves both
names, and says so. Nothing is lost in between (users.md rows 19 and 20).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from ftpvfs import paths
from ftpvfs.backend.backend import Backend, Entry
from ftpvfs.errors import failure, reason_of


def move_tree(backend: Backend, source: str, target: str, *, limit: int, workers: int) -> int:
    """Move all objects below `source` to `target`; return how many.

    Raises EFBIG, with nothing touched, for more than `limit` objects; else the OSError of the store with the state left.
    """
    found = list(_bounded(backend, source, limit))
    copied: list[str] = []
    try:
        _copy_all(backend, found, source, target, copied, workers)
    except OSError as error:
        left = _take_back(backend, copied)
        state = f"nothing was renamed; {left} copies are left in {target!r}" if left else "nothing was renamed"
        raise failure(error.errno or errno.EIO, source, f"{reason_of(error)} ({state})") from error
    try:
        backend.remove_many(path for path, _ in found)
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
    backend: Backend, found: list[tuple[str, Entry]], source: str, target: str, copied: list[str], workers: int
) -> None:
    def copy(path: str, entry: Entry) -> None:
        new = paths.rebase(path, source, target)
        size = backend.copy(path, new).size
        copied.append(new)
        if size != entry.size:
            raise failure(errno.EIO, path, f"The copy has {size} bytes instead of {entry.size}")

    with ThreadPoolExecutor(workers, thread_name_prefix="ftpvfs-rename") as threads:
        copies = [threads.submit(copy, path, entry) for path, entry in found]
        done, _ = wait(copies, return_when=FIRST_EXCEPTION)
        if any(item.exception() for item in done):
            threads.shutdown(wait=True, cancel_futures=True)
    for item in copies:
        if not item.cancelled():
            item.result()


def _take_back(backend: Backend, copied: list[str]) -> int:
    """Delete the copies that were made; return how many could not be."""
    left = 0
    for path in copied:
        try:
            backend.remove(path)
        except OSError:
            left += 1
    return left
