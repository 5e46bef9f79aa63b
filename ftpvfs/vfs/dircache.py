"""Listings with an age, single names with an age, and the changes made here that an older answer cannot know.

One store listing answers for all children. A name in a folder that was never listed costs one request of its own, and
the folder is listed once several names were asked for. However many ask for the same, one request flies.

A local change is applied to what is cached at once, and told to the requests that are on their way: their answers may
not know it. So nothing has to be remembered of a change once the requests that flew meanwhile have landed. The changes
that other processes make come by a feed, which is looked at before each answer, and are applied alike.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ftpvfs import paths
from ftpvfs.backend.backend import Entry
from ftpvfs.clock import SYSTEM_CLOCK, Clock
from ftpvfs.coordination.feed import Change, ChangeFeed
from ftpvfs.errors import AWAY, failure
from ftpvfs.vfs.known import FolderMap, Spellings
from ftpvfs.waiting import Job, Wait, about_to_wait, current_job, shared_result_of, working_for

logger = logging.getLogger(__name__)

# Single requests for names of one folder before it is listed instead; a guess between a client that wants one file of a
# huge folder and one that asks for the size of every file without listing.
SINGLES_BEFORE_LISTING = 16
# Single names kept of a folder that is not listed, so that one which is only written to does not grow for ever.
SINGLES_KEPT = 1024
# Folders known before those that nobody asks about are looked for: until then also what is old may be of use, while the
# store is away. From then on so many are looked at with each new one; and in one go of a sweep.
FOLDERS_BEFORE_SWEEP = 1024
LOOKED_AT_WITH_NEW = 2
SWEPT_AT_ONCE = 256
# What is known of folders that were never listed is dropped after this time, also where answers are good for ever.
UNLISTED_KEPT = 300.0


class Outdated(enum.Enum):
    """What is said of a path that has changed again."""

    OUTDATED = "it is not so any more"


OUTDATED = Outdated.OUTDATED


class Ask(Protocol):
    """Asks what a caller can do without."""

    def __call__(self, question: Callable[[], Any], path: str, *, while_it_answers: bool) -> Any:
        """Return the answer; ETIMEDOUT where the store says nothing."""


class Listing:
    """A folder's entries at one moment, sorted by name. Immutable; shared by all who ask until something changes.

    `rendered` is for the layer above: what it made of this listing.
    """

    __slots__ = ("_names", "entries", "rendered", "timed")

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries = entries
        self.rendered: dict[Any, bytes] = {}
        # Set once the entries' true modification times are filled in.
        self.timed = False
        # Made when first wanted, and not under the cache's lock: a large folder takes a while.
        self._names: list[str] | None = None

    @property
    def names(self) -> list[str]:
        """The names in their order."""
        if self._names is None:
            self._names = sorted(self.entries)
        return self._names

    def find(self, name: str, fold: Callable[[str], str]) -> Entry | None:
        """Return the entry called so, else the first one that is after `fold`. Looks at all names."""
        if name not in self.entries:
            folded = fold(name)
            name = min((known for known in self.entries if fold(known) == folded), default=name)
        return self.entries.get(name)

    def only(self, names: Iterable[str]) -> Listing:
        """Return the listing of some of the entries."""
        part = Listing({name: self.entries[name] for name in names})
        part.timed = self.timed
        return part

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return (self.entries[name] for name in self.names)


@dataclass(slots=True)
class _Folder:
    """What is known of one folder. Protected by the cache's lock."""

    # None: never listed, or `missing`.
    entries: dict[str, Entry] | None = None
    # Of the entries' names; None where only one spelling counts.
    spellings: Spellings | None = None
    missing: bool = False
    read_at: float = float("-inf")
    # When nothing was there, for a folder that was made here and never listed; `singles` has all that came since.
    empty_at: float = float("-inf")
    # The flight that brought the entries; what left before it knows less.
    flight: int = 0
    used_at: float = 0.0
    # name -> (entry or None, when it was asked for)
    singles: dict[str, tuple[Entry | None, float]] = field(default_factory=dict)
    # When single names were asked of the store, as long as those answers are good.
    asked: list[float] = field(default_factory=list)
    listing: Listing | None = None


@dataclass(slots=True, eq=False)
class _Flight:
    """One request on its way to the store and back. All but `answer` is protected by the cache's lock."""

    kind: str
    path: str
    number: int
    answer: Future[Any] = field(default_factory=Future)
    # Names that were changed here since it left: its answer may not know.
    changes: dict[str, Entry | None] = field(default_factory=dict)
    # False: good for those who wait for it, not for those who come later.
    kept: bool = True
    # How many wait for it. When the last of them has lost interest, the request is cancelled.
    interested: int = 0
    job: Job = field(default_factory=Job)


class DirCache:
    """The folders of one VFS. Any thread; requests to the store are made with no lock held.

    `read(path)` lists a folder and `stat(path)` asks for one name; both raise ENOENT. `feed` tells other processes of
    what is changed here, and this one of theirs; None: nobody else changes anything that must be seen at once.
    `here(path)` returns what is known of a folder without the store, for one that was never listed while it is away,
    and `known_here(path)` what is at one path whatever the store says (None: only the store knows; ENOENT: nothing).
    `newest(path, entry)` returns what is at a path now, where somebody says that it is `entry`, and OUTDATED where that
    is not true any more and what came after it was told, or will be. It is called with the cache's lock held.
    `optional(question, path)` asks what there is an old answer to, and raises ETIMEDOUT before anybody is kept waiting.
    """

    def __init__(
        self,
        read: Callable[[str], list[Entry]],
        stat: Callable[[str], Entry],
        *,
        max_age: float | None,
        fold_case: bool = False,
        fold_unicode: bool = True,
        answers_at_once: bool = False,
        serves_old: bool = False,
        here: Callable[[str], list[Entry]] = lambda _: [],
        newest: Callable[[str, Entry | None], Entry | Outdated | None] = lambda _, entry: entry,
        known_here: Callable[[str], Entry | None] = lambda _: None,
        optional: Ask | None = None,
        clock: Clock = SYSTEM_CLOCK,
        feed: ChangeFeed | None = None,
    ) -> None:
        self._read = read
        self._stat = stat
        self._max_age = max_age
        self._fold_case = fold_case
        self._fold_unicode = fold_unicode
        self._answers_at_once = answers_at_once
        self._serves_old = serves_old
        self._here = here
        self._newest = newest
        self._known_here = known_here
        self._optional = optional
        self._clock = clock
        self._feed = feed
        # Held, before _lock, while a change is made here and then told: others hear of changes in the order in which
        # they were made. Who only asks never takes it, since telling may wait for the disk.
        self._telling = threading.Lock()
        self._lock = threading.Lock()
        # Protected by _lock, and so is the place in the feed: a change is either still to come, or applied.
        self._folders: FolderMap[_Folder] = FolderMap()
        # The flights that those who ask now may wait for, and all that are in the air.
        self._flights: dict[tuple[str, str], _Flight] = {}
        self._airborne: set[_Flight] = set()
        self._number = itertools.count(1)

    # --- questions

    def listing(self, path: str, *, fresh: bool = False) -> Listing:
        """Return the folder's entries; `fresh` asks the store whatever is cached or on its way. Raises ENOENT."""
        with self._lock:
            self._catch_up_locked()
            folder = self._folder(path)
            folder.used_at = self._clock.monotonic()
            if not fresh and self._is_current(folder):
                if folder.missing:
                    raise failure(errno.ENOENT, path)
                return self._listing_locked(folder)
        is_old = not fresh and self._listed_once(path) is not None
        try:
            return self._asked("list", path, self._read_folder, fresh=fresh, optional=is_old)  # type: ignore[no-any-return]
        except OSError as error:
            old = None if fresh or error.errno not in AWAY else self._old_listing(path)
            if old is None:
                raise
            logger.info("%r is shown as it was: %s", path, error)
            return old

    def _asked(
        self, kind: str, path: str, request: Callable[[_Flight], Any], *, fresh: bool = False, optional: bool
    ) -> Any:
        """As `_once`; nobody waits long for a store that may be silent where the answer is `optional`."""

        def question() -> Any:
            return self._once(kind, path, request, fresh=fresh)

        if self._optional is None or self._answers_at_once or not optional:
            return question()
        return self._optional(question, path, while_it_answers=True)

    def _listed_once(self, path: str) -> Listing | None:
        """Return the listing of a folder that was listed or made here at some time, if an old one is better than none.
        """
        with self._lock:
            folder = self._folders.get(path)
            if not self._serves_old or folder is None:
                return None
            if self._was_empty(folder):
                return Listing({name: entry for name, (entry, _) in folder.singles.items() if entry is not None})
            return None if folder.entries is None else self._listing_locked(folder)

    def _old_listing(self, path: str) -> Listing | None:
        """Return what was last known of a folder, where that is better than nothing."""
        old = self._listed_once(path)
        if old is not None:
            return old
        here = {entry.name: entry for entry in self._here(path)}
        return Listing(here) if here else None

    def reread(self, path: str) -> None:
        """Ask the store for the folder again; unlike `listing` this does not count as a use of it. Raises ENOENT."""
        self._once("list", path, self._read_folder, fresh=True)

    def lookup(self, path: str) -> Entry:
        """Return the entry of one path. Raises ENOENT."""
        parent, name = paths.split(path)
        if not path:
            return Entry("", is_dir=True)
        known, entry = self._known(parent, name)
        if not known:
            entry = self._ask_or_remember(parent, name)
        if entry is None:
            raise failure(errno.ENOENT, path)
        return entry

    def real_name(self, path: str) -> str:
        """Return the path as the store spells it, for a path that differs in Unicode form or case alone."""
        if not path or not self._folds(path):
            return path
        parent, name = paths.split(path)
        parent = self.real_name(parent)
        path = paths.join(parent, name)
        if not self._folds(name) or self.is_free(path):
            return path
        try:
            return paths.join(parent, self.lookup(path).name)
        except (FileNotFoundError, NotADirectoryError):
            return path

    def cached(self, path: str) -> Listing | None:
        """Return the folder's listing where it is cached and current, without asking the store."""
        with self._lock:
            self._catch_up_locked()
            return self._listing_locked(self._folder(path)) if self._is_listed(path) else None

    def knows(self, path: str) -> bool:
        """Tell whether `lookup` answers without asking the store."""
        parent, name = paths.split(path)
        return not path or self._known(parent, name)[0]

    def lacks(self, path: str) -> bool:
        """Tell whether it is known, without asking the store, that nothing is at the path."""
        return bool(path) and self._cached(*paths.split(path)) == (True, None)

    def _known(self, parent: str, name: str) -> tuple[bool, Entry | None]:
        """Return whether the store need not be asked for the name, and what is there."""
        known, entry = self._cached(parent, name)
        if known:
            return known, entry
        try:
            entry = self._known_here(paths.join(parent, name))
        except FileNotFoundError:
            return True, None
        return entry is not None, entry

    def _cached(self, parent: str, name: str) -> tuple[bool, Entry | None]:
        """Return whether the cache can answer for the name, and its answer."""
        with self._lock:
            self._catch_up_locked()
            folder = self._folder(parent)
            now = folder.used_at = self._clock.monotonic()
            if not self._is_current(folder):
                entry, asked_at = folder.singles.get(name, (None, float("-inf")))
                if not self._is_young(asked_at, now) and self._is_listed(paths.join(parent, name)):
                    return True, Entry(name, is_dir=True)
                return self._is_young(asked_at, now), entry
            entry = None if folder.entries is None else folder.entries.get(name)
            if entry is None and folder.spellings is not None and folder.entries is not None and self._folds(name):
                entry = folder.entries.get(folder.spellings.find(name, folder.entries) or "")
            return True, entry

    def _ask_or_remember(self, parent: str, name: str) -> Entry | None:
        """Ask the store for a name; where it is away return the entry that the name had at last."""
        old = self._listed_once(parent)
        is_optional = old is not None and name in old.entries
        try:
            return self._ask(parent, name, optional=is_optional)
        except OSError as error:
            old = self._old_listing(parent) if error.errno in AWAY else None
            entry = None if old is None else old.entries.get(name)
            if entry is None:
                raise
            return entry

    def _ask(self, parent: str, name: str, *, optional: bool) -> Entry | None:
        if self._folds(name) or self._listing_pays(parent):
            try:
                listing = self.listing(parent)
            except FileNotFoundError:
                return None
            known, entry = self._known(parent, name)
            return entry if known else listing.find(name, self._fold)
        path = paths.join(parent, name)
        return self._asked("stat", path, self._read_single, optional=optional)  # type: ignore[no-any-return]

    def _listing_pays(self, parent: str) -> bool:
        """Count a question for a single name; tell whether so many came that one listing is cheaper."""
        with self._lock:
            folder = self._folder(parent)
            now = self._clock.monotonic()
            folder.asked = [at for at in folder.asked if self._is_young(at, now)]
            if len(folder.asked) < SINGLES_BEFORE_LISTING:
                folder.asked.append(now)
                return False
            return True

    def _folds(self, name: str) -> bool:
        """Tell whether another spelling of the name could count as the same."""
        return self._fold_case or (self._fold_unicode and not name.isascii())

    # --- answers of the store

    def once(self, kind: str, path: str, request: Callable[[], Any]) -> Any:
        """Make a request about a path, or wait for the same one that somebody else is making."""
        return self._once(kind, path, lambda _: request())

    def _once(self, kind: str, path: str, request: Callable[[_Flight], Any], *, fresh: bool = False) -> Any:
        """As `once`; `fresh` waits for no request that left earlier."""
        about_to_wait(self._need(kind))
        with self._lock:
            self._catch_up_locked()  # what has changed before the question, a flight that left earlier may not know
            flight = None if fresh else self._flights.get((kind, path))
            leading = flight is None
            if flight is None:
                flight = self._flights[kind, path] = _Flight(kind, path, next(self._number))
                self._airborne.add(flight)
            flight.interested += 1
        with self._interest_in(flight):
            if leading:
                self._fly(flight, request)
            return shared_result_of(flight.answer, path)

    def _need(self, kind: str) -> Wait:
        """What a request waits for. On this machine's disk only a whole folder takes long."""
        if not self._answers_at_once:
            return Wait.STORE
        return Wait.NOTHING if kind in {"stat", "again"} else Wait.DISK

    @contextlib.contextmanager
    def _interest_in(self, flight: _Flight) -> Iterator[None]:
        """Whoever's job is cancelled lets go of the flight; it goes on while anybody else waits for it."""
        job = current_job()
        if job is None:
            yield
            return
        with job.cancelling(lambda: self._lose_interest(flight)):
            yield

    def _lose_interest(self, flight: _Flight) -> None:
        with self._lock:
            flight.interested -= 1
            if flight.interested:
                return
            if self._flights.get((flight.kind, flight.path)) is flight:
                del self._flights[flight.kind, flight.path]
        flight.job.cancel()

    def _fly(self, flight: _Flight, request: Callable[[_Flight], Any]) -> None:
        try:
            with working_for(flight.job):
                flight.answer.set_result(request(flight))
        except BaseException as error:  # noqa: BLE001 - raised in all who wait
            flight.answer.set_exception(error)
        finally:
            with self._lock:
                self._land_locked(flight)

    def _land_locked(self, flight: _Flight) -> None:
        """Let nobody join the flight any more; in one step with using its answer, or a change could fall between."""
        if flight in self._airborne:
            self._catch_up_locked()
        self._airborne.discard(flight)
        if self._flights.get((flight.kind, flight.path)) is flight:
            del self._flights[flight.kind, flight.path]

    def _read_folder(self, flight: _Flight) -> Listing:
        now = self._clock.monotonic()
        try:
            entries = {entry.name: entry for entry in self._read(flight.path)}
        except FileNotFoundError:
            return self._missing_folder(flight, now)
        with self._lock:
            folder = self._folder(flight.path)
            old = None if folder.entries is None else self._listing_locked(folder)
        is_same = old is not None and _take_over(old.entries, entries)
        spellings = self._spellings(entries)
        with self._lock:
            self._land_locked(flight)
            _apply(flight.changes.items(), entries, spellings)
            folder = self._folder(flight.path)
            if not flight.kept:
                return Listing(entries)
            if folder.flight > flight.number:  # somebody asked later and was answered earlier
                return Listing(entries) if folder.entries is None else self._listing_locked(folder)
            if not (is_same and folder.listing is old):  # else what was made of the old listing is good for this one
                folder.entries, folder.spellings, folder.listing = entries, spellings, None
            self._answered_locked(folder, flight, now, missing=False)
            return self._listing_locked(folder)

    def _missing_folder(self, flight: _Flight, now: float) -> Listing:
        """The store has no such folder: remember that, unless something was made in it meanwhile."""
        with self._lock:
            self._land_locked(flight)
            made = {name: entry for name, entry in flight.changes.items() if entry is not None}
            if made:
                return Listing(made)
            folder = self._folder(flight.path)
            if flight.kept and folder.flight < flight.number:
                folder.entries = folder.spellings = folder.listing = None
                self._answered_locked(folder, flight, now, missing=True)
        raise failure(errno.ENOENT, flight.path)

    def _answered_locked(self, folder: _Folder, flight: _Flight, now: float, *, missing: bool) -> None:
        folder.missing = missing
        folder.read_at = now
        folder.empty_at = float("-inf")
        folder.flight = flight.number
        folder.singles.clear()
        folder.asked.clear()

    def _read_single(self, flight: _Flight) -> Entry | None:
        parent, name = paths.split(flight.path)
        now = self._clock.monotonic()
        try:
            entry: Entry | None = self._stat(flight.path)
        except FileNotFoundError:
            entry = None
        with self._lock:
            self._land_locked(flight)
            if name in flight.changes:
                return flight.changes[name]
            if flight.kept:
                self._keep_single_locked(self._folder(parent), name, entry, now)
        return entry

    def look_again(self, path: str, stat: Callable[[str], Entry], *, believe: Callable[[], bool]) -> Entry:
        """Ask the store for one path by `stat`, whatever is cached. Raises ENOENT.

        Where `believe` says so its answer stands here from now on, unless something was changed or listed meanwhile. It
        is nothing that was changed here: other processes, which may know better, are told nothing.
        """

        def look(flight: _Flight) -> Entry | None:
            try:
                entry: Entry | None = stat(path)
            except FileNotFoundError:
                entry = None
            if believe():
                self._learn(flight, entry)
            return entry

        found: Entry | None = self._once("again", path, look, fresh=True)
        if found is None:
            raise failure(errno.ENOENT, path)
        return found

    def _learn(self, flight: _Flight, entry: Entry | None) -> None:
        parent, name = paths.split(flight.path)
        with self._lock:
            self._land_locked(flight)
            is_newest = name not in flight.changes and self._folder(parent).flight < flight.number
            if flight.kept and is_newest:
                self._changed_locked(flight.path, entry, asked=flight.number)

    # --- changes made here, and by others

    def changed(self, path: str, entry: Entry | None) -> None:
        """Make a local change visible at once, to all processes: the path is `entry` now, or gone.

        Where it has changed again since the caller learned of `entry`, what is there now (`newest`) is shown.
        """
        self._change(path, entry)

    def made(self, path: str, entry: Entry) -> None:
        """As `changed`, for a folder that was made here: where it is known that nothing was there, nothing is in it."""
        self._change(path, entry, is_made=True)

    def _change(self, path: str, entry: Entry | None, *, is_made: bool = False) -> None:
        with self._telling:
            with self._lock:
                self._catch_up_locked()
                now = self._newest(path, entry)
                if now is OUTDATED:
                    return
                self._show_locked(path, now, is_made=is_made)
            change = {"path": path, "entry": None if now is None else asdict(now)}
            self._publish({**change, "is_made": True} if is_made else change)

    def _show_locked(self, path: str, now: Entry | None, *, is_made: bool) -> None:
        if is_made and now is not None and now.is_dir:
            self._made_locked(path, now)
        else:
            self._changed_locked(path, now)

    def _made_locked(self, path: str, entry: Entry) -> None:
        since = self._absent_since_locked(path)
        self._changed_locked(path, entry)
        folder = self._folder(path)
        if folder.entries is None:
            folder.empty_at = since
            folder.singles.clear()

    def _absent_since_locked(self, path: str) -> float:
        """Return when it was found that nothing is at the path; before all times where that is not known."""
        parent, name = paths.split(path)
        folder = self._folder(parent)
        if self._is_current(folder):
            return folder.read_at if folder.missing or name not in (folder.entries or {}) else float("-inf")
        entry, asked_at = folder.singles.get(name, (None, folder.empty_at))
        return asked_at if entry is None else float("-inf")

    def is_free(self, path: str) -> bool:
        """Tell whether nothing is at the path, since its folder was made here where nothing was.

        Good for those who bring a file; who looks at the folder asks the store what others have put there meanwhile.
        """
        parent, name = paths.split(path)
        with self._lock:
            self._catch_up_locked()
            folder = self._folders.get(parent)
            if folder is None or not self._was_empty(folder):
                return False
            known = [each for each, (entry, _) in folder.singles.items() if entry is not None]
        return name not in known and not (self._folds(name) and self._fold(name) in map(self._fold, known))

    def _was_empty(self, folder: _Folder) -> bool:
        """Tell whether the folder was made here a while ago, so that all that is in it is known by its single names."""
        return folder.entries is None and self._is_young(folder.empty_at, self._clock.monotonic())

    def _changed_locked(self, path: str, entry: Entry | None, *, asked: int | None = None) -> None:
        """The path is `entry` now; or was, when a flight of the number `asked` left, and later ones know better."""
        parent, name = paths.split(path)
        folder = self._folder(parent)
        old = self._entry_locked(folder, name)
        for flight in self._airborne:
            is_older = asked is None or flight.number < asked
            if is_older and flight.path == (parent if flight.kind == "list" else path):
                flight.changes[name] = entry
        if folder.entries is not None:
            if folder.listing is not None:  # somebody holds it
                folder.entries, folder.listing = dict(folder.entries), None
            _apply([(name, entry)], folder.entries, folder.spellings)
        if entry is not None:
            folder.missing = False
        if self._is_current(folder):
            folder.singles.pop(name, None)
        else:
            self._keep_single_locked(folder, name, entry, self._clock.monotonic())
        if old is None or old.is_dir or (entry is not None and entry.is_dir):
            self._folder_changed_locked(path, entry)

    def _folder_changed_locked(self, path: str, entry: Entry | None) -> None:
        """The folder came or went: what is known of it, and what is on its way, was asked of another one."""
        if entry is None:
            self._forget_locked(path)
        elif entry.is_dir:
            self._unkeep_locked(lambda flight: flight.kind == "list" and flight.path == path)
            known = self._folders.get(path)
            if known is not None:
                known.missing = False

    def forget(self, path: str = "") -> None:
        """Drop all that is cached at and below the folder; the store is asked again when somebody wants it."""
        with self._telling:
            with self._lock:
                self._drop_locked(path)
            self._publish({"forget": path})

    def doubt(self, path: str) -> None:
        """Drop all that is cached of the path, also by the folder that it is in: a change failed half way."""
        with self._telling:
            with self._lock:
                self._doubt_locked(path)
            self._publish({"doubt": path})

    def refreshed(self, path: str) -> None:
        """Have other processes read the folder again, too, when they next want it."""
        with self._telling:
            self._publish({"relist": path})

    def _drop_locked(self, path: str) -> None:
        parent, name = paths.split(path)
        self._forget_locked(path)
        folder = self._folders.get(parent)
        if folder is not None:
            folder.singles.pop(name, None)

    def _doubt_locked(self, path: str) -> None:
        self._forget_locked(path)
        self._relist_locked(paths.split(path)[0])

    def _relist_locked(self, path: str) -> None:
        self._folders.drop(path)
        self._unkeep_locked(lambda flight: flight.kind == "list" and flight.path == path)

    def _publish(self, change: Change) -> None:
        if self._feed is None:
            return
        try:
            self._feed.publish(change)
        except OSError as error:  # a full disk; what was changed is changed all the same
            logger.warning("other processes were not told of %s: %s", change, error)

    def _catch_up_locked(self) -> None:
        """Apply what other processes have changed. Without news this costs one look into memory."""
        news = self._feed.news() if self._feed is not None else ()
        if news is None:
            self._forget_locked("")
        for change in news or ():
            self._apply_locked(change)

    def _apply_locked(self, change: Change) -> None:
        if "path" in change:
            path, known = change["path"], change["entry"]
            # The other process may have told of it late, behind what somebody else has changed since.
            now = self._newest(path, None if known is None else Entry(**known))
            if now is not OUTDATED:
                self._show_locked(path, now, is_made=change.get("is_made", False))
        elif "forget" in change:
            self._drop_locked(change["forget"])
        elif "doubt" in change:
            self._doubt_locked(change["doubt"])
        elif "relist" in change:
            self._relist_locked(change["relist"])

    def in_use(self, seconds: float) -> list[str]:
        """Return the listed folders that somebody asked about in the last `seconds`."""
        now = self._clock.monotonic()
        with self._lock:
            folders = self._folders.items()
        return [
            path for path, folder in folders if folder.entries is not None and now - folder.used_at <= seconds
        ]

    def sweep(self) -> None:
        """Release the memory of folders that nobody asked about for longer than an answer is good."""
        with self._lock:
            left = len(self._folders)
        while left > 0:
            with self._lock:
                self._folders.release(SWEPT_AT_ONCE)
                self._sweep_some_locked(SWEPT_AT_ONCE)
            left -= SWEPT_AT_ONCE

    def counts(self) -> dict[str, int]:
        """Return how much is cached: folders and entries."""
        with self._lock:
            folders = self._folders.items()
        return {"folders": len(folders), "entries": sum(len(folder.entries or ()) for _, folder in folders)}

    def waiting(self, kind: str, path: str) -> int:
        """Return how many wait for a request about the path."""
        with self._lock:
            flight = self._flights.get((kind, path))
            return 0 if flight is None else flight.interested

    # --- with the lock held

    def _folder(self, path: str) -> _Folder:
        folder = self._folders.get(path)
        if folder is None:
            if len(self._folders) >= FOLDERS_BEFORE_SWEEP:
                self._sweep_some_locked(LOOKED_AT_WITH_NEW)
            folder = _Folder(used_at=self._clock.monotonic())
            self._folders.add(path, folder)
        return folder

    def _sweep_some_locked(self, count: int) -> None:
        now = self._clock.monotonic()
        listed = float("inf") if self._max_age is None else self._max_age
        for path, folder in self._folders.oldest(count):
            if now - folder.used_at >= (listed if folder.entries is not None else min(listed, UNLISTED_KEPT)):
                self._folders.drop(path)

    def _is_young(self, at: float, now: float) -> bool:
        return at > float("-inf") and (self._max_age is None or now - at < self._max_age)

    def _is_current(self, folder: _Folder) -> bool:
        is_read = folder.missing or folder.entries is not None
        return is_read and self._is_young(folder.read_at, self._clock.monotonic())

    def _is_listed(self, path: str) -> bool:
        folder = self._folders.get(path)
        return folder is not None and folder.entries is not None and self._is_current(folder)

    def _listing_locked(self, folder: _Folder) -> Listing:
        assert folder.entries is not None
        if folder.listing is None:
            folder.listing = Listing(folder.entries)
        return folder.listing

    def _entry_locked(self, folder: _Folder, name: str) -> Entry | None:
        if folder.entries is not None and name in folder.entries:
            return folder.entries[name]
        return folder.singles.get(name, (None, 0.0))[0]

    def _keep_single_locked(self, folder: _Folder, name: str, entry: Entry | None, now: float) -> None:
        folder.singles.pop(name, None)
        folder.singles[name] = (entry, now)
        if len(folder.singles) > SINGLES_KEPT:
            del folder.singles[next(iter(folder.singles))]  # the oldest
            folder.empty_at = float("-inf")

    def _fold(self, name: str) -> str:
        return paths.folded(name, case=self._fold_case, unicode=self._fold_unicode)

    def _spellings(self, names: Iterable[str]) -> Spellings | None:
        """Return the other spellings of a folder's names; takes a while where there are many."""
        if not (self._fold_case or self._fold_unicode):
            return None
        return Spellings(self._fold, names)

    def _forget_locked(self, path: str) -> None:
        self._folders.drop_below(path)
        self._unkeep_locked(lambda flight: paths.is_within(flight.path, path))

    def _unkeep_locked(self, matches: Callable[[_Flight], bool]) -> None:
        """Let the answers that are on their way serve those who wait for them, and nobody else."""
        for flight in [flight for flight in self._airborne if matches(flight)]:
            flight.kept = False
            if self._flights.get((flight.kind, flight.path)) is flight:
                del self._flights[flight.kind, flight.path]


def _apply(
    changes: Iterable[tuple[str, Entry | None]], entries: dict[str, Entry], spellings: Spellings | None
) -> None:
    """Bring entries, and their spellings, up to date."""
    for name, entry in changes:
        if entry is None:
            entries.pop(name, None)
        else:
            entries[name] = entry
        if spellings is not None:
            (spellings.discard if entry is None else spellings.add)(name)


def _take_over(old: dict[str, Entry], new: dict[str, Entry]) -> bool:
    """Copy the modification times that cost a request from the same versions in `old`; tell whether all is the same."""
    for name, entry in new.items():
        known = old.get(name)
        if known is not None and entry.mtime is None and entry.version is not None and entry.version == known.version:
            entry.mtime = known.mtime
    return old == new
