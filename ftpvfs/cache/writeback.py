"""The queue of what the store does not have yet: delay, order, retries, drain.

One process of all that share a cache folder leads it and works on the queue; the others ring its bell, and one of them
takes over when it is gone. The queue itself is nowhere but in the cache's dirty records: what was acknowledged is in
it, after any crash. `Storing` does the work on one path, in up to `--transfers` threads.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftpvfs import paths
from ftpvfs.backend.backend import Backend, Entry
from ftpvfs.cache.events import Events
from ftpvfs.cache.records import DirtyRecord
from ftpvfs.cache.schedule import Schedule
from ftpvfs.cache.storing import SETTLED_AFTER, DirtyFiles, Outcome, Storing, Turn
from ftpvfs.cache.uploadlog import UploadLog
from ftpvfs.clock import SYSTEM_CLOCK, Clock
from ftpvfs.config import VFSOptions
from ftpvfs.coordination.bell import Bell
from ftpvfs.coordination.locks import Leader, PathLocks
from ftpvfs.errors import failure, reason_of
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)

# Seconds between two tries of the same file, jittered; rclone's upper bound.
FIRST_RETRY, LONGEST_RETRY = 1.0, 300.0
# Seconds after which another process notices that the leader is gone.
TAKE_OVER = 0.3
# Seconds between two looks at what has changed: at the most (a ring may be lost with the process that heard it), with
# transfers under way that may have to be called off, and at the least, so that a thousand rings cost few looks.
LONGEST_REST, SHORT_REST, SHORTEST_REST = 5.0, 0.5, 0.02
# Seconds by which the clock may be set back without the whole queue being timed anew.
CLOCK_STEP = 1.0
# Seconds for which a process that stops waits whether the one that leads stops, too, and leaves it the rest.
HAND_OVER = 2.0
# Seconds that transfers get to end after they were called off as the process stops.
LAST_PATIENCE = 5.0


class WriteBack:
    """The write-back of one store, in one process. Any thread; made after a fork.

    `changed(path, entry)` is called, with no lock held but the path's, when it is known what the store has by now;
    before that `timed(path, entry, mtime)`, where the store keeps no modification times, remembers a file's.
    """

    def __init__(
        self,
        cache: DirtyFiles,
        backend: Backend,
        *,
        folder: Path,
        locks: PathLocks,
        options: VFSOptions,
        changed: Callable[[str, Entry | None], None],
        timed: Callable[[str, Entry, float], Entry] = lambda path, entry, mtime: entry,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._cache = cache
        self._leader = Leader(folder, "writeback")
        self._bell = Bell(folder, "writeback")
        self._request = folder / "flush"
        self._options = options
        self._clock = clock
        self._rest = options.write_back or 0.0
        self._log_folder = folder / "uploads"
        self._log_lock = threading.Lock()
        self._log: UploadLog | None = None
        self.events = Events(self._opened_log, options, clock)
        self._storing = Storing(
            cache, backend, locks=locks, log=self._opened_log, policy=options.conflict, clock=clock,
            changed=changed, stored=self._is_stored, timed=timed,
        )  # fmt: skip
        self._thread: threading.Thread | None = None
        self._is_ending = threading.Event()
        # Held by who times paths, so that what was read first does not count last; before _lock.
        self._timing = threading.Lock()
        # Held for moments only.
        self._lock = threading.Condition()
        # Protected by _lock.
        self._turns: dict[str, Turn] = {}
        # Paths that wait, but for those that have a turn.
        self._schedule = Schedule()
        self._workers = 0
        # When each path was last tried here; and when all was asked for at once, by whom ever.
        self._tried: dict[str, float] = {}
        self._asked = 0.0
        self._is_draining = False
        # Whether files are stored without the rest after their last change: they take room that is wanted.
        self._is_hurried = False
        # Wall times before which paths are left alone although their records do not say so: deleted objects that are
        # looked at once more, and failures that could not be written down.
        self._held: dict[str, float] = {}

    def _opened_log(self) -> UploadLog:
        with self._log_lock:
            if self._log is None:
                self._log = UploadLog(self._log_folder)
            return self._log

    # --- life

    def start(self) -> None:
        """Begin to work on the queue, in a thread, when no other process does."""
        self._thread = threading.Thread(target=self._run, name="ftpvfs-writeback", daemon=True)
        self._thread.start()

    def stop(self, drain_timeout: float | None = 0.0) -> int:
        """Store what can be within `drain_timeout` seconds (None: however long it takes), where no other process does;
        return how many files are left for the next start: none as long as another process goes on. A transfer that is
        under way then is called off.
        """
        if self._thread is not None and not self._is_ending.is_set():
            self._drain(drain_timeout)
            self._end_transfers()
        left = len(self._cache.all_dirty()) if self._leader.try_acquire() else 0
        self._leader.release()
        with self._log_lock:
            if self._log is not None:
                self._log.close()
                self._log = None
        self._bell.close()
        return left

    def _drain(self, timeout: float | None) -> None:
        self._is_draining = True
        self._bell.ring()
        patience = HAND_OVER if timeout is None else min(timeout, HAND_OVER)
        if self._wait_for(lambda: self._leader.try_acquire() or not self._cache.is_any_dirty, patience):
            self._wait_for(lambda: not self._cache.is_any_dirty, timeout)

    def _end_transfers(self) -> None:
        self._is_ending.set()
        with self._lock:
            for turn in self._turns.values():
                turn.cancel()
        self._bell.ring()
        self._wait_for(lambda: not self._workers, LAST_PATIENCE)
        if self._thread is not None:
            self._thread.join(LAST_PATIENCE)

    def _wait_for(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Wait for what other threads or processes bring about; real time, since the store's is real."""
        end = None if timeout is None else time.monotonic() + timeout
        while not condition():
            left = SHORT_REST if end is None else min(SHORT_REST, end - time.monotonic())
            if left <= 0:
                return False
            with self._lock:
                self._lock.wait(left)
        return True

    # --- what others ask

    def notify(self) -> None:
        """Tell the leader that there is something new; never waits."""
        self._bell.ring()

    def queue(self) -> list[dict[str, Any]]:
        """Return what waits or is under way, in the order of its turn; in every process."""
        with self._lock:
            turns = dict(self._turns)
        rows = [self._row(record, turns.get(record.path)) for record in self._cache.all_dirty()]
        return sorted(rows, key=lambda row: (row["due"], row["path"]))

    def _row(self, record: DirtyRecord, turn: Turn | None) -> dict[str, Any]:
        return {
            "path": record.path,
            "action": "delete" if record.is_tombstone else "upload",
            "state": "uploading" if turn is not None else "failed" if record.error else "waiting",
            "size": record.size,
            "sent": turn.sent if turn is not None else 0,
            "user": record.user,
            "since": record.since,
            "tries": record.tries,
            "error": record.error,
            "due": self._due(record, self._clock.time()),
        }

    def sync(self, timeout: float | None = None) -> None:
        """Return when the store has all that is waiting now.

        Raises the first failure where something is left: after `timeout` seconds; without one as soon as all that is
        left has been tried again in vain.
        """
        waiting = self._cache.all_dirty()
        if not waiting:
            return
        asked = self._ask_for_all()
        unsettled = list(waiting)

        def is_over() -> bool:
            # One that is settled stays so: all looks together cost as much as one at the whole queue.
            while unsettled:
                left = self._left_of(unsettled[-1], asked)
                if left is not None and (timeout is not None or left.tries <= unsettled[-1].tries):
                    return False
                unsettled.pop()
            return True

        self._wait_for(is_over, timeout)
        left = [record for each in waiting if (record := self._left_of(each, asked)) is not None]
        for record in sorted(left, key=lambda each: not each.error):
            raise _not_stored(record, len(left))

    def _left_of(self, waiting: DirtyRecord, asked: float) -> DirtyRecord | None:
        """Return what still waits of what did; a file that was written since in its place is a new matter."""
        record = self._cache.dirty(waiting.path)
        is_same = record is not None and (record.generation == waiting.generation or record.since <= asked)
        return record if is_same else None

    def _ask_for_all(self) -> float:
        """Let the leader, whichever process that is, store everything that waits now; return the time of asking."""
        now = self._clock.time()
        temporary = self._request.with_name(f"flush-{os.getpid()}-{threading.get_ident()}")
        try:
            temporary.write_text(repr(now))
            temporary.replace(self._request)
        except OSError as error:  # the disk is full, and who leads may be somebody else
            logger.warning("%s: %s; what fails is tried at its own time", self._request, reason_of(error))
            self._asked = now
            with contextlib.suppress(OSError):
                temporary.unlink()
        self._bell.ring()
        return now

    def upload_now(self, path: str) -> None:
        """Bring the store to what is wanted at a path, in this thread; raise what the store says.

        The path must not be held (`PathLocks`) by the caller.
        """
        while (record := self._cache.dirty(path)) is not None:
            about_to_wait(Wait.STORE)
            self._take_turn(Turn(path))
            now = self._cache.dirty(path)
            if now is not None and now.generation == record.generation and now.tries > record.tries:
                raise _not_stored(now, 1)
            if path in self._held:
                self._clock.wait(self._is_ending, SETTLED_AFTER)
            if self._is_ending.is_set():
                raise failure(errno.ECANCELED, path, "The VFS was closed")
        with self._lock:
            self._tried.pop(path, None)

    # --- the leader

    def _run(self) -> None:
        while not self._is_ending.is_set():
            try:
                if self._leader.try_acquire():
                    self._lead()
                else:
                    self._is_ending.wait(TAKE_OVER)
            except Exception:  # whatever it is, what was acknowledged must still get to the store
                logger.exception("write-back goes on after a failure")
                self._is_ending.wait(FIRST_RETRY)

    def _lead(self) -> None:
        self._cache.ignore_dirty_changes()  # those of before: the first look is at all
        for record in self._cache.all_dirty():
            if record.attempted:  # by a process that may have been killed in the middle of it
                self._storing.doubt(record.path, is_conditional=record.base_known)
        timed: _Timed | None = None
        try:
            while not self._is_ending.is_set() and self._leader.try_acquire():
                timed = self._look(timed)
                self._bell.wait(self._pause())
                self._is_ending.wait(SHORTEST_REST)
        finally:
            self._cache.ignore_dirty_changes()

    def _look(self, timed: _Timed | None) -> _Timed:
        """See what has changed since the queue was `timed`, begin what is due, and call off what nobody wants now."""
        self._note_request()
        self._is_hurried = self._cache.wants_stored()
        now = _Timed(self._clock.time(), self._asked, self._is_draining, self._is_hurried)
        changes = self._cache.dirty_changes()
        if changes is None or timed is None or not now.follows(timed):
            self._time_all(now.at)
        else:
            for path in changes:
                self._time(path)
        with self._lock:
            self._begin_locked()
            self._lock.notify_all()
        return now

    def _time_all(self, now: float) -> None:
        """Time the whole queue anew: the clock was set, all is asked for, or nobody can say what has changed."""
        with self._timing:
            dirty = {record.path: record for record in self._cache.all_dirty()}
            schedule = Schedule({path: self._due(record, now) for path, record in dirty.items()})
            with self._lock:
                turns = list(self._turns.values())
                for turn in turns:
                    schedule.set(turn.path, None)
                self._schedule = schedule
                self._tried = {path: tried for path, tried in self._tried.items() if path in dirty}
                self._held = {path: until for path, until in self._held.items() if path in dirty}
        for turn in turns:
            _call_off(turn, dirty.get(turn.path))

    def _time(self, path: str) -> None:
        """Note when a path is due by now; call off what is under way for it, where that is not wanted any more."""
        with self._timing:
            record = self._cache.dirty(path)
            with self._lock:
                turn = self._turns.get(path)
                if turn is None:
                    self._schedule.set(path, None if record is None else self._due(record, self._clock.time()))
                if turn is None and record is None:
                    self._tried.pop(path, None)
                    self._held.pop(path, None)
        if turn is not None:
            _call_off(turn, record)

    def _pause(self) -> float:
        """Return how long to rest unless something changes."""
        news = self.events.tell()
        with self._lock:
            # Who works takes what is due next without being told.
            due = self._schedule.next_due() if self._workers < self._options.transfers else None
            is_busy = bool(self._turns)
        rests = [] if news is None else [news]
        if due is not None:
            rests.append(due - self._clock.time())
        return min([SHORT_REST if is_busy else LONGEST_REST, *(max(rest, SHORTEST_REST) for rest in rests)])

    def _note_request(self) -> None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._asked = float(self._request.read_text())

    def _due(self, record: DirtyRecord, now: float) -> float:
        """Return the wall time from which on a record may be worked on.

        Times that have not come yet are of before the clock was set back; nothing waits until it has caught up.
        """

        def past(moment: float) -> float:
            return moment if moment <= now else 0.0

        held = self._held.get(record.path)
        if held is not None:
            return held if held <= now + LONGEST_RETRY else now
        since, tried, asked = past(record.since), past(self._tried.get(record.path, 0.0)), past(self._asked)
        if tried < since and self._is_draining:
            return since
        if since <= asked and tried < asked:
            return asked
        rest = 0.0 if self._is_draining or self._is_hurried else self._rest
        due = max(record.due, since + rest)
        return due if due <= now + max(rest, LONGEST_RETRY) else now

    def _begin_locked(self) -> None:
        """Begin to work on what is due in one thread more, which does the same once it has its turn."""
        due = self._schedule.next_due()
        if due is not None and due <= self._clock.time() and self._workers < self._options.transfers:
            self._workers += 1
            threading.Thread(target=self._work, name="ftpvfs-upload", daemon=True).start()

    def _work(self) -> None:
        """Take one turn after the other while there are any."""
        try:
            while (turn := self._next_turn()) is not None:
                try:
                    self._take_turn(turn)
                finally:
                    self._end_turn(turn.path)
        finally:
            with self._lock:
                self._workers -= 1
                self._lock.notify_all()
            with contextlib.suppress(OSError):  # closed: the store has kept this thread for longer than anybody waits
                self._bell.ring()

    def _next_turn(self) -> Turn | None:
        while True:
            with self._lock:
                path = None if self._is_ending.is_set() else self._schedule.take(self._clock.time())
                if path is None:
                    return None
                turn = self._turns[path] = Turn(path)
                self._begin_locked()
            record = self._cache.dirty(path)
            now = self._clock.time()
            if record is not None and self._due(record, now) <= now:
                return turn
            self._end_turn(path)  # replaced by a newer one, or gone, since the last look

    def _end_turn(self, path: str) -> None:
        with self._lock:
            self._turns.pop(path, None)
        self._time(path)

    # --- one turn

    def _take_turn(self, turn: Turn) -> None:
        with self._lock:
            self._tried[turn.path] = self._clock.time()
            self._held.pop(turn.path, None)
        try:
            outcome = self._storing.bring(turn)
        except OSError as error:
            self._fail(turn, error)
        except Exception as error:  # a mistake of ours must not end the queue
            logger.exception("%r", turn.path)
            self._fail(turn, failure(errno.EIO, turn.path, f"{type(error).__name__}: {error}"))
        else:
            logger.info("%r: %s", turn.path, outcome.value)
            if outcome is Outcome.SETTLING:
                self._hold(turn.path, SETTLED_AFTER)
        with self._lock:
            self._lock.notify_all()

    def _hold(self, path: str, seconds: float) -> None:
        with self._lock:
            self._held[path] = self._clock.time() + seconds

    def _fail(self, turn: Turn, error: OSError) -> None:
        record = turn.record
        if record is None:
            logger.warning("%r: %s", turn.path, reason_of(error))
            return
        tries = record.tries + 1
        delay = _delay(tries, self._rest)
        logger.warning("%r is not stored (try %d, again in %.0f s): %s", turn.path, tries, delay, reason_of(error))
        if tries == self._options.failed_after:
            self._tell("failed", record, turn.path, None, error=reason_of(error), tries=tries)
        try:
            self._cache.failed(record, error, self._clock.time() + delay)
        except OSError as failed:
            logger.warning("%r: the failure could not be written down: %s", turn.path, reason_of(failed))
            self._hold(turn.path, delay)

    def _is_stored(self, record: DirtyRecord, path: str, entry: Entry) -> None:
        self._tell("stored", record, path, entry.fingerprint)

    def _tell(self, kind: str, record: DirtyRecord, path: str, fingerprint: str | None, **facts: Any) -> None:
        self.events.add(
            kind, path, size=record.size, user=record.user, fingerprint=fingerprint, mtime=record.mtime, **facts
        )

    def stored(self, user: str, path: str, entry: Entry) -> None:
        """Tell that the store has a file that no record was made of, since its writer waited for the store."""
        for kind in ("received", "stored"):
            self.events.add(
                kind, path, size=entry.size, user=user, fingerprint=entry.fingerprint, mtime=entry.mtime
            )
        if self.events.is_any_wanted:
            self._bell.ring()

    def received(self, record: DirtyRecord) -> None:
        """Tell that a file was acknowledged, and wake the leader; to be called once it is published."""
        self._tell("received", record, record.path, None)
        self._bell.ring()


@dataclass(frozen=True)
class _Timed:
    """What the times of the queue were made of."""

    at: float
    asked: float
    is_draining: bool
    is_hurried: bool

    def follows(self, earlier: _Timed) -> bool:
        """Tell whether times that were made earlier still hold."""
        is_same = (self.asked, self.is_draining, self.is_hurried) == (
            earlier.asked, earlier.is_draining, earlier.is_hurried
        )  # fmt: skip
        return is_same and self.at > earlier.at - CLOCK_STEP


def _call_off(turn: Turn, record: DirtyRecord | None) -> None:
    """Cancel a turn whose work is not wanted any more, since the path's record is another one by now."""
    wanted = turn.record
    if wanted is not None and (record is None or record.generation != wanted.generation):
        turn.cancel()


def _delay(tries: int, rest: float) -> float:
    """Return how many seconds to wait after so many tries in vain."""
    first = min(max(rest, FIRST_RETRY), LONGEST_RETRY)
    longest: float = min(first * 2 ** min(tries - 1, 20), LONGEST_RETRY)
    return longest * random.uniform(0.75, 1)


def _not_stored(record: DirtyRecord, count: int) -> OSError:
    name = paths.split(record.path)[1]
    others = f" ({count - 1} more are waiting, too)" if count > 1 else ""
    reason = record.error or f"{name} is not stored yet"
    return failure(errno.EAGAIN if not record.error else errno.EIO, record.path, reason + others)
