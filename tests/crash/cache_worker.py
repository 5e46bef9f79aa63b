"""One process of several that work on one cache: users who write, read, rename and delete, write-back, and eviction.

Run as `python -m tests.crash.cache_worker FOLDER SEED SECONDS`. Each thread notes what it is about to do and what it
was told, so that another one finds out what became of it when the process is killed meanwhile. Whatever a thread sees
that nobody was told ends the process with exit status 1.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from ftpvfs.backend.backend import Entry
from ftpvfs.cache.cache import Cache
from ftpvfs.cache.index import Index
from ftpvfs.config import VFSOptions
from ftpvfs.coordination.feed import ChangeFeed
from ftpvfs.coordination.locks import PathLocks

THREADS = 8
PATHS = [f"{folder}file-{number}" for folder in ("", "a/", "a/b/") for number in range(6)]
OPTIONS = VFSOptions(cache_mode="full", cache_max_age=0.5, cache_max_size=200_000)
# What the store gives out as a fingerprint stands in front of the bytes there.
LENGTH = 16


def check(condition: object, *what: object) -> None:
    if not condition:
        raise AssertionError(*what)


class Files:
    """A value for each path, in a folder; replaced whole, also by a process that is killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def _name(self, path: str) -> Path:
        return self._folder / hashlib.md5(path.encode()).hexdigest()

    def get(self, path: str) -> bytes | None:
        try:
            return self._name(path).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, path: str, data: bytes | None) -> None:
        name = self._name(path)
        if data is None:
            name.unlink(missing_ok=True)
            return
        temporary = name.with_name(f"{name.name}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_bytes(data)
        temporary.replace(name)


class Store:
    """The objects, with a fingerprint that no other version has."""

    def __init__(self, folder: Path) -> None:
        self._files = Files(folder / "store")

    def entry(self, path: str) -> Entry | None:
        data = self._files.get(path)
        if data is None:
            return None
        return Entry(path.rpartition("/")[2], False, len(data) - LENGTH, 1.0, data[:LENGTH].decode())

    def read(self, path: str, entry: Entry) -> bytes:
        """The bytes of that version; ESTALE where it is another one by now."""
        data = self._files.get(path)
        if data is None or data[:LENGTH].decode() != entry.fingerprint:
            raise OSError(errno.ESTALE, "changed")
        return data[LENGTH:]

    def put(self, path: str, data: bytes) -> Entry:
        self._files.put(path, os.urandom(LENGTH // 2).hex().encode() + data)
        found = self.entry(path)
        assert found is not None
        return found

    def delete(self, path: str) -> None:
        self._files.put(path, None)


class Truth:
    """What users were told of each path, and what was under way when its process was killed."""

    def __init__(self, folder: Path) -> None:
        self._files = Files(folder / "truth")

    def get(self, path: str) -> dict[str, list[str | None]]:
        """Return path -> [before, after] of an operation whose end nobody has heard of, or path -> [value]."""
        data = self._files.get(path)
        return {path: [None]} if data is None else json.loads(data)  # type: ignore[no-any-return]

    def begin(self, changes: dict[str, list[str | None]]) -> None:
        for path in changes:
            self._files.put(path, json.dumps(changes).encode())

    def end(self, path: str, value: str | None) -> None:
        self._files.put(path, json.dumps({path: [value]}).encode())


class Worker:
    """One thread of users."""

    def __init__(self, folder: Path, cache: Cache, locks: PathLocks, seed: int) -> None:
        self.cache = cache
        self.locks = locks
        self.store = Store(folder)
        self.truth = Truth(folder)
        self.chance = random.Random(seed)
        self.name = f"{seed}"
        self.count = 0

    # --- what a user sees

    def visible(self, path: str) -> str | None:
        for _ in range(1000):
            record = self.cache.dirty(path)
            entry = self.store.entry(path)
            if record is not None and record.is_tombstone:
                return None
            if record is None and entry is None:
                if self.cache.dirty(path) is None and self.store.entry(path) is None:
                    return None
                continue
            with contextlib.suppress(FileNotFoundError, _Changed):
                return self._read(path, entry or Entry("x", False, 0, None, "none"), is_dirty=record is not None)
        raise AssertionError(f"{path} cannot be read")

    def _read(self, path: str, entry: Entry, *, is_dirty: bool) -> str:
        item = self.cache.open_item(path, entry)
        try:
            if is_dirty and not item.is_dirty:
                raise _Changed  # uploaded meanwhile; this is an item of whatever we thought was there
            try:
                for start, stop in item.missing(0, item.size):
                    item.add(start, [self.store.read(path, entry)[start:stop]])
            except OSError as error:
                if error.errno == errno.ESTALE:
                    raise _Changed from error
                raise
            return os.pread(item.descriptor, item.size, 0).decode()
        finally:
            item.release()

    @contextlib.contextmanager
    def alone(self, *paths: str) -> Iterator[dict[str, str | None]]:
        """Be the only user of the paths, and know what they are."""
        wanted = set(paths)
        while True:
            with self.locks.hold(*sorted(f"user {path}" for path in wanted)):
                known = {path: self.truth.get(path) for path in wanted}
                partners = {partner for each in known.values() for partner in each}
                if partners <= wanted:
                    yield {path: self._settle(path, known[path]) for path in wanted}
                    return
            wanted |= partners

    def _settle(self, path: str, known: dict[str, list[str | None]]) -> str | None:
        """Look what became of an operation that was under way: all of it or nothing."""
        seen = self.visible(path)
        check(seen in known[path], path, "is", seen, "and should be", known[path])
        if len(known[path]) > 1:
            outcomes = {each: self.visible(each) for each in known}
            before = all(outcomes[each] == values[0] for each, values in known.items())
            after = all(outcomes[each] == values[1] for each, values in known.items())
            check(before or after, "half of an operation has happened:", known, outcomes)
            for each, value in outcomes.items():
                self.truth.end(each, value)
        return seen

    def change(self, changes: dict[str, list[str | None]], do: Callable[[], object]) -> None:
        self.truth.begin(changes)
        do()
        for path, values in changes.items():
            self.truth.end(path, values[1])

    # --- what users do

    def value(self) -> str:
        self.count += 1
        return f"{self.name}-{self.count};" * self.chance.choice([1, 10, 1000])

    def write(self, path: str) -> None:
        with self.alone(path) as known:
            value = self.value()
            draft = self.cache.draft(path, user=self.name)
            draft.write(0, value.encode())
            base = self.store.entry(path)
            self.change(
                {path: [known[path], value]},
                lambda: self.cache.publish(draft, mtime=1.0, base=base and base.fingerprint),
            )

    def append(self, path: str) -> None:
        with self.alone(path) as known:
            record = self.cache.dirty(path)
            if record is None or record.is_tombstone:
                return
            try:
                base = self.cache.open_dirty(record)
            except FileNotFoundError:  # it was uploaded just now
                return
            draft = self.cache.draft(path, user=self.name, base=base)
            base.release()
            more = self.value()
            draft.write(draft.size, more.encode())
            value = (known[path] or "") + more
            self.change({path: [known[path], value]}, lambda: self.cache.publish(draft, mtime=1.0, base=None))

    def read(self, path: str) -> None:
        with self.alone(path):
            pass

    def delete(self, path: str) -> None:
        def delete() -> None:
            # An upload may end between the question to the store and the deletion.
            while not self.cache.delete(path, at_store=self.store.entry(path) is not None):
                if self.store.entry(path) is None:
                    break

        with self.alone(path) as known:
            self.change({path: [known[path], None]}, delete)

    def rename(self, path: str) -> None:
        target = self.chance.choice(PATHS)
        if target == path:
            return
        with self.alone(path, target) as known:
            record = self.cache.dirty(path)
            if record is None or record.is_tombstone:
                return
            base = self.store.entry(target)
            try:
                self.change(
                    {path: [known[path], None], target: [known[target], known[path]]},
                    lambda: self.cache.rename(
                        path,
                        target,
                        source_at_store=self.store.entry(path) is not None,
                        target_base=base and base.fingerprint,
                    ),
                )
            except FileNotFoundError:  # it was uploaded just now
                for each in (path, target):
                    self.truth.end(each, known[each])

    def touch(self, path: str) -> None:
        with self.alone(path), contextlib.suppress(FileNotFoundError):
            self.cache.touch(path, self.chance.random())

    def interrupt(self, path: str) -> None:
        draft = self.cache.draft(path, user=self.name)
        draft.write(0, self.value().encode())
        self.cache.abandon(draft)

    # --- write-back, and the rest

    def write_back(self, path: str) -> None:
        with self.locks.hold(f"store {path}"):
            record = self.cache.dirty(path)
            if record is None or not self.cache.begin(record):
                return
            if record.is_tombstone:
                self.store.delete(path)
                self.cache.deleted(record)
                return
            try:
                item = self.cache.open_dirty(record)
            except FileNotFoundError:
                return
            try:
                data = os.pread(item.descriptor, item.size, 0)
            finally:
                item.release()
            check(len(data) == record.size, path, "has", len(data), "bytes instead of", record.size)
            if self.chance.random() < 0.1:
                self.cache.failed(record, OSError(errno.EIO, "by chance"), due=0.0)
                return
            self.cache.uploaded(record, self.store.put(path, data))

    def evict(self, _: str) -> None:
        if self.chance.random() < 0.1:
            self.cache.evict()

    def run(self, until: float) -> None:
        actions = [self.write] * 4 + [self.read] * 4 + [self.append, self.rename, self.delete, self.touch]
        actions += [self.interrupt, self.evict] + [self.write_back] * 4
        while time.monotonic() < until:
            self.chance.choice(actions)(self.chance.choice(PATHS))


class _Changed(Exception):
    """The path is another version by now."""


def main(folder: Path, seed: int, seconds: float) -> int:
    cache_folder = folder / "cache"
    index, feed = Index(cache_folder), ChangeFeed(cache_folder)
    cache = Cache(cache_folder, index, OPTIONS, feed=feed)
    locks = PathLocks(cache_folder)
    failures: list[str] = []
    until = time.monotonic() + seconds

    def work(number: int) -> None:
        try:
            Worker(folder, cache, locks, seed * 100 + number).run(until)
        except BaseException:  # noqa: BLE001 - told by the exit status
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("\n".join(failures), file=sys.stderr, flush=True)
    cache.close()
    feed.close()
    index.close()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
