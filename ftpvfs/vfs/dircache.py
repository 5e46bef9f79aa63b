"""Listings with an age, single names with an age, and the changes made here that an older answer cannot know.

One store listing answers for all children. A name in a folder that was never listed costs one request of its own, and the
folder is listed once several names were asked for. However many ask for the same, one request flies.

A local change is applied to what is cached at once. An answer of the store may have been on its way meanwhile, so each
change is also kept, with its place in time, until an answer arrives that was asked for after it.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ftpvfs import paths
from ftpvfs.backend.backend import Entry
from ftpvfs.clock import SYSTEM_CLOCK, Clock
from ftpvfs.errors import failure

# Single requests for names of one folder before it is listed instead; a guess between a client that wants one file of a
# huge folder and one that asks for the size of every file without listing.
SINGLES_BEFORE_LISTING = 16


class Listing:
    """A folder's entries at one moment, sorted by name. Immutable; shared by all who ask until something changes.

    `rendered` is for the layer above: what it made of this listing.
    """

    __slots__ = ("entries", "names", "rendered", "timed")

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries = entries
        self.names = sorted(entries)
        self.rendered: dict[Any, bytes] = {}
        # Set once the entries' true modification times are filled in.
        self.timed = False

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Entry]:
        return (self.entries[name] for name in self.names)


@dataclass(slots=True)
class _Folder:
    """What is known of one folder. Protected by the cache's lock."""

    entries: dict[str, Entry] | None = None
    read_at: float = 0.0
    used_at: float = 0.0
    # name -> (entry or None, when it was asked for)
    singles: dict[str, tuple[Entry | None, float]] = field(default_factory=dict)
    # name -> (entry or None, the change's place in time)
    changes: dict[str, tuple[Entry | None, int]] = field(default_factory=dict)
    asked: int = 0
    listing: Listing | None = None
    folded: dict[str, str] | None = None

    def touch(self) -> None:
        """Drop what was derived from the entries."""
        self.listing = None
        self.folded = None


class DirCache:
    """The folders of one VFS. Any thread; requests to the store are made with no lock held.

    `read(path)` lists a folder and `stat(path)` asks for one name; both raise ENOENT.
    """

    def __init__(
        self,
        read: Callable[[str], list[Entry]],
        stat: Callable[[str], Entry],
        *,
        max_age: float | None,
        fold_case: bool = False,
        fold_unicode: bool = True,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._read = read
        self._stat = stat
        self._max_age = max_age
        self._fold_case = fold_case
        self._fold_unicode = fold_unicode
        self._clock = clock
        self._lock = threading.Lock()
        # Protected by _lock.
        self._folders: dict[str, _Folder] = {}
        self._flights: dict[tuple[str, str], Future[Any]] = {}
        self._moment = itertools.count(1)
        self._forgotten_at = 0

    # --- questions

    def listing(self, path: str, *, fresh: bool = False) -> Listing:
        """Return the folder's entries; `fresh` asks the store whatever is cached. Raises ENOENT."""
        with self._lock:
            folder = self._folder(path)
            folder.used_at = self._clock.monotonic()
            if not fresh and self._is_current(folder):
                return self._listing_locked(folder)
        return self._once("list", path, lambda: self._read_folder(path))  # type: ignore[no-any-return]

    def lookup(self, path: str) -> Entry:
        """Return the entry of one path. Raises ENOENT."""
        parent, name = paths.split(path)
        if not path:
            return Entry("", is_dir=True)
        known, entry = self._known(parent, name)
        if not known:
            entry = self._ask(parent, name)
        if entry is None:
            raise failure(errno.ENOENT, path)
        return entry

    def real_name(self, path: str) -> str:
        """Return the path as the store spells it, for a path that differs in Unicode form or case alone."""
        parent, name = paths.split(path)
        if not path:
            return path
        return paths.join(self.real_name(parent) if self._folds(parent) else parent, self._real_name(parent, name))

    def _real_name(self, parent: str, name: str) -> str:
        if not self._folds(name):
            return name
        try:
            return self.lookup(paths.join(parent, name)).name or name
        except FileNotFoundError:
            return name

    def cached(self, path: str) -> Listing | None:
        """Return the folder's listing where it is cached and current, without asking the store."""
        with self._lock:
            folder = self._folders.get(path)
            return self._listing_locked(folder) if folder is not None and self._is_current(folder) else None

    def _known(self, parent: str, name: str) -> tuple[bool, Entry | None]:
        """Return whether the cache can answer for the name, and its answer."""
        with self._lock:
            folder = self._folder(parent)
            now = folder.used_at = self._clock.monotonic()
            if self._is_current(folder):
                return True, self._find_locked(folder, name)
            found, asked_at = folder.singles.get(name, (None, float("-inf")))
            if self._is_young(asked_at, now):
                return True, found
            folder.asked += 1
            return False, None

    def _ask(self, parent: str, name: str) -> Entry | None:
        with self._lock:
            listing_pays = self._folder(parent).asked > SINGLES_BEFORE_LISTING
        if listing_pays or self._folds(name):
            try:
                self.listing(parent)
            except FileNotFoundError:
                return None
            return self._known(parent, name)[1]
        path = paths.join(parent, name)
        return self._once("stat", path, lambda: self._read_single(parent, name))  # type: ignore[no-any-return]

    def _folds(self, name: str) -> bool:
        """Tell whether another spelling of the name could count as the same."""
        return self._fold_case or (self._fold_unicode and not name.isascii())

    # --- answers of the store

    def _once(self, kind: str, path: str, request: Callable[[], Any]) -> Any:
        """Make a request, or wait for the same one that somebody else is making."""
        with self._lock:
            flight = self._flights.get((kind, path))
            leading = flight is None
            if flight is None:
                flight = self._flights[kind, path] = Future()
        if not leading:
            return flight.result()
        try:
            flight.set_result(request())
        except BaseException as error:
            flight.set_exception(error)
        finally:
            with self._lock:
                del self._flights[kind, path]
        return flight.result()

    def _read_folder(self, path: str) -> Listing:
        started = next(self._moment)
        now = self._clock.monotonic()
        entries = {entry.name: entry for entry in self._read(path)}
        with self._lock:
            folder = self._folder(path)
            _apply(folder, entries, since=started)
            if started < self._forgotten_at:  # `forget` came meanwhile: good for those who waited, not for later
                return Listing(entries)
            folder.entries = entries
            folder.read_at = now
            folder.singles.clear()
            folder.asked = 0
            folder.touch()
            return self._listing_locked(folder)

    def _read_single(self, parent: str, name: str) -> Entry | None:
        started = next(self._moment)
        now = self._clock.monotonic()
        try:
            entry: Entry | None = self._stat(paths.join(parent, name))
        except FileNotFoundError:
            entry = None
        with self._lock:
            folder = self._folder(parent)
            changed, at = folder.changes.get(name, (None, 0))
            if at > started:
                return changed
            if started >= self._forgotten_at:
                folder.singles[name] = (entry, now)
        return entry

    # --- changes made here

    def changed(self, path: str, entry: Entry | None) -> None:
        """Make a local change visible at once: the path is `entry` now, or gone."""
        parent, name = paths.split(path)
        with self._lock:
            folder = self._folder(parent)
            folder.changes[name] = (entry, next(self._moment))
            folder.singles[name] = (entry, self._clock.monotonic())
            if folder.entries is not None:
                folder.entries = dict(folder.entries) if folder.listing is not None else folder.entries
                _set(folder.entries, name, entry)
            folder.touch()
            if entry is None:
                self._drop_below_locked(path)

    def forget(self, path: str = "") -> None:
        """Drop all that is cached at and below the folder; the store is asked again when somebody wants it."""
        with self._lock:
            self._forgotten_at = next(self._moment)
            for known in [known for known in self._folders if paths.is_within(known, path)]:
                del self._folders[known]
            if path:
                parent, name = paths.split(path)
                self._folder(parent).singles.pop(name, None)

    def in_use(self, seconds: float) -> list[str]:
        """Return the listed folders that somebody asked about in the last `seconds`."""
        now = self._clock.monotonic()
        with self._lock:
            return [
                path
                for path, folder in self._folders.items()
                if folder.entries is not None and now - folder.used_at <= seconds
            ]

    def sweep(self) -> None:
        """Release the memory of folders that nobody asked about for longer than an answer is good."""
        now = self._clock.monotonic()
        with self._lock:
            for path in [p for p, f in self._folders.items() if not self._is_young(f.used_at, now)]:
                del self._folders[path]

    def counts(self) -> dict[str, int]:
        """Return how much is cached: folders and entries."""
        with self._lock:
            entries = sum(len(folder.entries or ()) for folder in self._folders.values())
            return {"folders": len(self._folders), "entries": entries}

    # --- with the lock held

    def _folder(self, path: str) -> _Folder:
        folder = self._folders.get(path)
        if folder is None:
            folder = self._folders[path] = _Folder(used_at=self._clock.monotonic())
        return folder

    def _is_young(self, at: float, now: float) -> bool:
        return self._max_age is None or now - at < self._max_age

    def _is_current(self, folder: _Folder) -> bool:
        return folder.entries is not None and self._is_young(folder.read_at, self._clock.monotonic())

    def _listing_locked(self, folder: _Folder) -> Listing:
        assert folder.entries is not None
        if folder.listing is None:
            folder.listing = Listing(folder.entries)
        return folder.listing

    def _find_locked(self, folder: _Folder, name: str) -> Entry | None:
        assert folder.entries is not None
        entry = folder.entries.get(name)
        if entry is not None or not self._folds(name):
            return entry
        if folder.folded is None:
            folder.folded = {self._fold(known): known for known in folder.entries}
        real = folder.folded.get(self._fold(name))
        return None if real is None else folder.entries[real]

    def _fold(self, name: str) -> str:
        return paths.folded(name, case=self._fold_case, unicode=self._fold_unicode)

    def _drop_below_locked(self, path: str) -> None:
        for known in [known for known in self._folders if paths.is_within(known, path)]:
            del self._folders[known]


def _apply(folder: _Folder, entries: dict[str, Entry], *, since: int) -> None:
    """Lay the changes made after `since` over an answer; it knows the older ones itself."""
    folder.changes = {name: change for name, change in folder.changes.items() if change[1] > since}
    for name, (entry, _) in folder.changes.items():
        _set(entries, name, entry)


def _set(entries: dict[str, Entry], name: str, entry: Entry | None) -> None:
    if entry is None:
        entries.pop(name, None)
    else:
        entries[name] = entry
