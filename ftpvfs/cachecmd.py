"""`python -m ftpvfs cache ls|verify|flush`: look at the disk cache, compare it with the store, store what waits.

Works beside a running server and without one. `ls` asks the store nothing. Exit status 1 where `verify` finds something
wrong, something is not stored after `flush`, or there is no cache, as where URL, name or folder are not the server's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftpvfs.backend.backend import Backend, Entry, Tuning, open_backend, protocol_of
from ftpvfs.backend.checksum import Checksum
from ftpvfs.backend.options import read_options
from ftpvfs.cache.cache import Cache
from ftpvfs.cache.database import DATABASE
from ftpvfs.cache.identity import Identity, claim
from ftpvfs.cache.index import Index, cache_name
from ftpvfs.cache.left import has_left, left_caches
from ftpvfs.cache.records import DirtyRecord, ItemRecord, PartialRecord
from ftpvfs.cache.view import View
from ftpvfs.cache.writeback import WriteBack
from ftpvfs.clock import SYSTEM_CLOCK
from ftpvfs.config import Config, VFSOptions
from ftpvfs.coordination.feed import ChangeFeed
from ftpvfs.coordination.locks import PathLocks
from ftpvfs.errors import failure, reason_of
from ftpvfs.memory import MemoryBudget
from ftpvfs.vfs.times import Times

logger = logging.getLogger(__name__)

BLOCK = 2**20
# Seconds between two looks at the progress: on a terminal, and in a log.
TICK, LOG_TICK = 0.2, 5.0


@dataclass(frozen=True)
class Place:
    """One store and the cache before it."""

    url: str
    storage_options: Mapping[str, Any]
    name: str | None
    options: VFSOptions

    @contextlib.contextmanager
    def looked_at(self) -> Iterator[tuple[Backend, View, Path] | None]:
        """Open the records of the cache and change nothing; None where there is none."""
        with self._found() as (backend, folder):
            if folder is None:
                yield None
                return
            with contextlib.closing(View(folder)) as view:
                yield backend, view, folder

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[Backend, Cache, Index, Path] | None]:
        """Open the cache, as at a start; None where there is none.

        What is in it stays in it, whichever mode the server that it belongs to has: that makes use of it, or evicts it.
        """
        with self._found() as (backend, folder), contextlib.ExitStack() as cleanup:
            if folder is None:
                yield None
                return
            identity = Identity.of(self.url, self.storage_options, backend.root)
            cleanup.callback(claim(folder, identity).close)
            index = Index(folder)
            cleanup.callback(index.close)
            feed = ChangeFeed(folder)
            cleanup.callback(feed.close)
            cache = Cache(folder, index, replace(self.options, cache_mode="full"), feed=feed)
            cleanup.callback(cache.close)
            yield backend, cache, index, folder

    @contextlib.contextmanager
    def _found(self) -> Iterator[tuple[Backend, Path | None]]:
        backend = open_backend(self.url, self.storage_options, _tuning(self.options))
        name = self.name or cache_name([protocol_of(self.url), backend.root])
        folder = Path(self.options.cache_dir) / name
        with contextlib.closing(backend):
            if (folder / DATABASE).exists() or has_left(folder):
                yield backend, folder
            else:
                print(f"{backend.display}: there is no cache {folder}", file=sys.stderr)
                yield backend, None


def run(config: Config) -> int:
    """Run the command that `config.command` names, as `cache ls`; return the exit status."""
    return COMMANDS[config.command.partition(" ")[2]](_places(config), config)


def _places(config: Config) -> list[Place]:
    """Return the distinct stores of the options: the common one, and those of users."""
    found: dict[str, Place] = {}
    for url, options, name in [
        (config.url, config.storage_options, config.vfs.name),
        *((user.url, user.storage_options, user.cache_name) for user in config.users if user.url),
    ]:
        key = json.dumps([url, options], sort_keys=True)
        if key not in found:
            found[key] = Place(url, read_options(url, options), name, config.vfs)
    return list(found.values())


def _tuning(options: VFSOptions) -> Tuning:
    return Tuning(
        low_level_retries=options.low_level_retries,
        connect_timeout=options.contimeout or 0.0,
        read_timeout=options.timeout or 0.0,
        checkers=options.checkers,
        verify=not options.no_checksum,
        follow_links=options.copy_links,
        hidden=options.cache_dir,
        memory=MemoryBudget(options.max_buffer_memory),
    )


# --- ls


def _ls(places: list[Place], config: Config) -> int:
    rows, served = [], []
    for place in places:
        with place.looked_at() as opened:
            if opened is not None:
                backend, view, folder = opened
                served.append(folder)
                rows += [{"store": backend.display, **row} for row in listed(view, SYSTEM_CLOCK.time())]
    if config.json:
        print(json.dumps(rows, indent=1))
    else:
        for line in _table(rows, with_store=len(places) > 1):
            print(line)
    for left in left_caches(Path(config.vfs.cache_dir), served):
        print(
            f"Not listed: {left.name} in {config.vfs.cache_dir} has {left.files} files ({left.size} bytes) and"
            f" {left.deletions} deletions that its store never got",
            file=sys.stderr,
        )
    return 0 if served else 1


def listed(cache: View, now: float) -> list[dict[str, Any]]:
    """Return what is in a cache, by path; ages in seconds, sizes in bytes."""
    rows = [*map(_dirty_row, cache.all_dirty()), *map(_clean_row, cache.all_records())]
    rows += map(_partial_row, cache.all_partials())
    for row in rows:
        row["age"] = max(0.0, round(now - row["age"], 3))
    return sorted(rows, key=lambda row: (row["path"], row["state"]))


def _dirty_row(record: DirtyRecord) -> dict[str, Any]:
    state = "deleted" if record.is_tombstone else "failed" if record.error else "waiting"
    return {
        "path": record.path, "state": state, "dirty": True, "size": record.size, "present": 100.0, "age": record.since,
        "tries": record.tries, "error": record.error, "user": record.user,
    }  # fmt: skip


def _clean_row(record: ItemRecord) -> dict[str, Any]:
    present = sum(stop - start for start, stop in record.present)
    share = round(100 * present / record.size, 1) if record.size else 100.0
    return {
        "path": record.path, "state": "clean", "dirty": False, "size": record.size, "present": share,
        "age": record.used, "tries": 0, "error": "", "user": "",
    }  # fmt: skip


def _partial_row(record: PartialRecord) -> dict[str, Any]:
    return {
        "path": record.path, "state": "partial", "dirty": False, "size": record.size, "present": 100.0,
        "age": record.since, "tries": 0, "error": "", "user": record.user,
    }  # fmt: skip


def _table(rows: list[dict[str, Any]], *, with_store: bool) -> Iterator[str]:
    yield f"{'SIZE':>14}  {'PRESENT':>7}  {'STATE':<8}  {'AGE':>8}  PATH"
    for row in rows:
        path = "".join(each if each.isprintable() else repr(each)[1:-1] for each in row["path"])
        where = f"{row['store']}: " if with_store else ""
        error = f"  ({row['error']}; {row['tries']} tries)" if row["error"] else ""
        share = f"{row['present']:.0f}%"
        yield f"{row['size']:>14}  {share:>7}  {row['state']:<8}  {_age(row['age']):>8}  {where}{path}{error}"


def _age(seconds: float) -> str:
    """Return an age in its largest unit.

    >>> [_age(5), _age(150), _age(7300), _age(200000)]
    ['5s', '2m', '2h', '2d']
    """
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:.0f}s"


# --- verify


def _verify(places: list[Place], config: Config) -> int:
    status, is_any = 0, False
    for place in places:
        with place.opened() as opened:
            if opened is None:
                continue
            is_any = True
            backend, cache, _, _ = opened
            problems, count = [], 0
            for problem in _problems(backend, cache, hashes=not config.vfs.no_checksum):
                problems.append(problem)
                print(f"{backend.display}: {problem}")
            count = len(cache.all_records()) + len(cache.all_dirty())
            print(f"{backend.display}: {count} files, {len(problems)} problems")
            status = 1 if problems else status
    return status if is_any else 1


def _problems(backend: Backend, cache: Cache, *, hashes: bool) -> Iterator[str]:
    """Yield what is wrong with the cache itself, then what is not as the store has it."""
    yield from cache.check()
    try:
        backend.check()
    except OSError as error:
        yield f"nothing can be compared with the store: {reason_of(error)}"
        return
    for record in cache.all_records():
        if cache.dirty(record.path) is not None:
            continue
        try:
            yield from _compared(backend, cache, record, hashes=hashes)
        except OSError as error:
            yield f"{record.path!r} cannot be compared with the store: {reason_of(error)}"


def _compared(backend: Backend, cache: Cache, record: ItemRecord, *, hashes: bool) -> Iterator[str]:
    """Another version at the store, or none, is no problem: it is noticed when the file is read."""
    try:
        entry = backend.stat(record.path)
    except FileNotFoundError:
        return
    if entry.fingerprint is None or entry.fingerprint != record.fingerprint:
        return
    if entry.size != record.size:
        yield f"{record.path!r} has {record.size} bytes here and {entry.size} at the store"
    elif hashes and record.is_complete:
        checksum = backend.ask_checksum(record.path, entry).result()
        if checksum is not None and not _has(cache, record, entry, checksum):
            yield f"{record.path!r} has other bytes here than at the store"


def _has(cache: Cache, record: ItemRecord, entry: Entry, checksum: Checksum) -> bool:
    hasher = checksum.hasher()
    item = cache.open_item(record.path, entry)
    try:
        if item.id != record.id:  # replaced meanwhile
            return True
        for start in range(0, record.size, BLOCK):
            hasher.update(os.pread(item.descriptor, min(BLOCK, record.size - start), start))
    finally:
        item.release()
    return hasher.digest() == checksum.digest


# --- flush


def flush(places: list[Place]) -> int:
    """Store what waits in the caches of some places; return 1 where something is left or there is no cache, else 0."""
    left: list[int] = []
    for place in places:
        with place.opened() as opened:
            if opened is not None:
                left.append(_flush_one(place, *opened))
    return 0 if left and not any(left) else 1


def _flush_one(place: Place, backend: Backend, cache: Cache, index: Index, folder: Path) -> int:
    """Store what waits in one cache; return how much is left."""
    if not cache.all_dirty():
        print(f"{backend.display}: nothing waits")
        return 0
    locks = PathLocks(folder)
    shown = not (place.options.no_modtime or place.options.use_server_modtime)
    times = Times(backend, lambda: index, shown=shown)

    def timed(path: str, entry: Entry, mtime: float) -> Entry:
        return times.set(path, entry, mtime) if times.keeps else entry

    writeback = WriteBack(
        cache, backend, folder=folder, locks=locks, options=place.options, changed=_told_by_feed, timed=timed
    )
    writeback.start()
    try:
        _sync_with_progress(writeback, backend.display)
    finally:
        writeback.stop()
        locks.close()
    left = cache.all_dirty()
    for record in left:
        print(f"{record.path!r} is not stored: {record.error or 'it was written meanwhile'}", file=sys.stderr)
    print(f"{backend.display}: {f'{len(left)} files are left' if left else 'all is stored'}")
    return len(left)


def _told_by_feed(path: str, entry: Entry | None) -> None:
    """Nothing is shown here; servers hear of it through the cache."""


def _sync_with_progress(writeback: WriteBack, store: str) -> None:
    all_rows = writeback.queue()
    count, size = len(all_rows), sum(row["size"] for row in all_rows)
    outcome: list[OSError] = []
    waiting = threading.Thread(target=_sync, args=(writeback, outcome), daemon=True)
    waiting.start()
    is_terminal = sys.stderr.isatty()
    told = time.monotonic()
    while waiting.is_alive():
        waiting.join(TICK)
        if is_terminal or time.monotonic() - told > LOG_TICK:
            told = time.monotonic()
            print(_progress(writeback, store, count, size), end="\r" if is_terminal else "\n", file=sys.stderr)
    if is_terminal:
        print(file=sys.stderr)
    if outcome:
        logger.info("%s", outcome[0])


def _sync(writeback: WriteBack, outcome: list[OSError]) -> None:
    try:
        writeback.sync()
    except OSError as error:
        outcome.append(error)
    except Exception as error:  # noqa: BLE001 - shown as what is left
        outcome.append(failure(errno.EIO, "", str(error)))


def _progress(writeback: WriteBack, store: str, count: int, size: int) -> str:
    """Return one line: a bar, files and bytes that are stored, and how many fail."""
    rows = writeback.queue()
    left = sum(row["size"] - min(row["sent"], row["size"]) for row in rows)
    share = 1.0 if not rows else (size - min(left, size)) / size if size else (count - min(len(rows), count)) / count
    bar = "#" * int(20 * share)
    failing = sum(1 for row in rows if row["error"])
    return (
        f"{store}: [{bar:<20}] {max(count - len(rows), 0)}/{count} files,"
        f" {(size - min(left, size)) >> 20}/{size >> 20} MiB{f', {failing} failing' if failing else ''}"
    )


COMMANDS: dict[str, Callable[[list[Place], Config], int]] = {
    "ls": _ls,
    "verify": _verify,
    "flush": lambda places, config: flush(places),
}
