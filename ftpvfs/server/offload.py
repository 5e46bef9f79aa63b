"""The one bridge between the event loop and calls that wait: a task parks while a thread does the waiting.

A task is work on the event loop that reads as if it could wait: a command, or the end of a transfer. It runs in a
greenlet, of which a few are kept, since a new one takes memory of the system. What it has to wait for is first tried at
once, since the caches mostly know; else it is handed to a thread of a *lane*, the loop goes on with others, and the
task is resumed with the outcome. Outside a task everything just runs.

What a call waits for decides its lane. All that needs this machine's disk alone shares one, which no store can fill.
Each store has two of its own, so that those who wait for a dead one do not use up the threads of another: one for what
waits as long as it takes, one for what waits for a few seconds at the most.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from greenlet import getcurrent, greenlet

from ftpvfs.waiting import Job, Wait, WouldWait, limited_to, without_waiting, working_for

if TYPE_CHECKING:
    from ftpvfs.server.loop import Loop

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Owners of lanes beside the stores.
DISK = "disk"
PASSWORDS = "passwords"
BANS = "bans"
# Threads of one lane. Those of a store wait for its answers; two hashes of a password fill two processors.
MOST_THREADS = {DISK: 64, PASSWORDS: 2}
MOST_STORE_THREADS = 32
# As many as there may be questions that are waited for a few seconds.
MOST_ANSWER_THREADS = 64
# Calls that wait in a lane until they are begun, and tasks that wait for a turn of one key: beyond it nobody waits.
MOST_QUEUED = 512
MOST_IN_TURN = 64
# Greenlets without a task that are kept for the next.
KEPT_CARRIERS = 64
# Seconds after which a thread without work ends.
IDLE = 5.0
# Seconds that a closing loop waits for stores to forget what was not finished.
LAST_WORDS = 5.0


class Abandoned(Exception):
    """Raised in a parked task whose outcome nobody wants any more. No OSError: nobody is to answer it."""


class Crowded(Exception):
    """Raised where too many wait already. No OSError: it is no store's answer."""


class Lane:
    """Daemon threads for calls of one kind, started when needed and ended when idle. Any thread.

    concurrent.futures' threads would keep the process from ending as long as a dead store does not answer.
    """

    def __init__(self, name: str, most: int, may_wait_for: Wait, idle: float | None = IDLE) -> None:
        """`idle` are the seconds after which a thread without work ends, None: with the lane."""
        self.may_wait_for = may_wait_for
        self._idle_time = idle
        self._name = name
        self._most = most
        self._changed = threading.Condition()
        # Protected by _changed.
        self._works: deque[Callable[[], None]] = deque()
        self._threads = 0
        self._idle = 0
        self._is_closed = False

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work`, which raises nothing, done by a thread."""
        with self._changed:
            self._works.append(work)
            if len(self._works) <= self._idle:
                self._changed.notify()
            elif self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def drop(self, work: Callable[[], None]) -> bool:
        """Forget a work, unless a thread has begun it; tell whether that was so in time."""
        with self._changed:
            if work not in self._works:
                return False
            self._works.remove(work)
            return True

    @property
    def queued(self) -> int:
        """How many works no thread has begun."""
        with self._changed:
            return len(self._works)

    @property
    def busy(self) -> int:
        """How many threads are at work."""
        with self._changed:
            return self._threads - self._idle

    def close(self) -> None:
        """Drop what nobody has begun, and let the threads end as soon as they are through with what they do."""
        with self._changed:
            self._works.clear()
        self.retire()

    def retire(self) -> None:
        """Let threads end as soon as there is no work; what still comes is done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            with limited_to(self.may_wait_for):
                work()
            del work

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._works or self._is_closed, self._idle_time)
            self._idle -= 1
            if self._works:
                return self._works.popleft()
            self._threads -= 1
            return None


# What a call waits for -> the lane in which it does so.
Lanes = dict[Wait, Lane]


class Offload:
    """Where the tasks of one event loop wait. The loop's own thread, but for `Lane`."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._disk = Lane("ftpvfs-disk", MOST_THREADS[DISK], Wait.DISK)
        self._lanes: weakref.WeakKeyDictionary[Any, Lanes] = weakref.WeakKeyDictionary()
        self._named: dict[str, Lanes] = {}
        self._parked: set[Task] = set()
        self._turns: dict[Hashable, _Turns] = {}
        self._idle: list[_Carrier] = []
        self.is_closed = False
        self._later: set[Future[None]] = set()

    @property
    def parked(self) -> int:
        """How many tasks wait at the moment."""
        return len(self._parked)

    def lanes(self, owner: Hashable) -> Lanes:
        """Return the lanes of a store (its VFS), or those of `PASSWORDS` or any other name, by what they wait for."""
        known: Any = self._named if isinstance(owner, str) or owner is None else self._lanes
        owner = owner or "store"
        lanes: Lanes | None = known.get(owner)
        if lanes is None:
            lanes = known[owner] = self._new_lanes(owner if isinstance(owner, str) else "store")
        return lanes

    def _new_lanes(self, name: str) -> Lanes:
        """Make the lanes of one owner; their threads are started when they are needed."""
        if name == DISK:
            return dict.fromkeys(Wait, self._disk)
        return {
            Wait.NOTHING: self._disk,
            Wait.DISK: self._disk,
            Wait.ANSWER: Lane(f"ftpvfs-{name}-answers", MOST_ANSWER_THREADS, Wait.ANSWER),
            Wait.STORE: Lane(f"ftpvfs-{name}", MOST_THREADS.get(name, MOST_STORE_THREADS), Wait.STORE),
        }

    def lane(self, owner: Hashable, need: Wait = Wait.STORE) -> Lane:
        """Return the lane for calls of an owner that wait for `need`."""
        return self.lanes(owner)[need]

    def tidy_turns(self, key: Hashable) -> None:
        """Forget the turns of a key that nobody has any more."""
        turns = self._turns.get(key)
        if turns is not None and turns.is_unused:
            del self._turns[key]

    def task(self, work: Callable[[], object]) -> Task:
        """Return a new task, to be started; `work` deals with its own exceptions, `Abandoned` among them."""
        return Task(self, work)

    def later(self, owner: Hashable, call: Callable[[], object], need: Wait = Wait.STORE) -> Future[None]:
        """Have a call that waits for `need` at the most made by a thread; its failure is logged.

        Returns what is done when it is.
        """
        done: Future[None] = Future()
        self._later.add(done)
        done.add_done_callback(self._later.discard)

        def work() -> None:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - told, and of no consequence to anybody
                logger.warning("%s", error)
            finally:
                done.set_result(None)

        self.lane(owner, need).submit(work)
        return done

    def close(self) -> None:
        """Abandon all tasks that are parked; wait a little for what was to be given up at the stores."""
        self.is_closed = True
        for task in list(self._parked):
            task.abandon()
        while self._idle:
            self._idle.pop().throw()
        wait(list(self._later), LAST_WORDS)
        for lanes in [*self._lanes.values(), *self._named.values()]:
            for lane in lanes.values():
                lane.close()
        self._disk.close()


class _Carrier(greenlet):
    """Runs one task after the other. Its parent is whoever resumed it last: there it comes back when the task parks."""

    def __init__(self, offload: Offload) -> None:
        super().__init__()
        self._offload = offload
        self.task: Task | None = None

    def run(self) -> None:
        """Carry tasks as long as there is room for this carrier among those that are kept."""
        idle = self._offload._idle
        while (task := self.task) is not None:
            task._work()
            task._work = _nothing  # who still has the task need not keep the session
            task.is_over = True
            self.task = None
            if len(idle) < KEPT_CARRIERS and not self._offload.is_closed:
                idle.append(self)
                del task
                assert self.parent is not None
                self.parent.switch()


def _nothing() -> None:
    """What a task does that is over."""


class Task:
    """Work on the event loop that may park. The loop's own thread."""

    __slots__ = ("_carrier", "_drop", "_errand", "_job", "_offload", "_ticket", "_work", "ended", "is_over")

    def __init__(self, offload: Offload, work: Callable[[], object]) -> None:
        self._offload = offload
        self._work = work
        self._carrier: _Carrier | None = None
        self.is_over = False
        # Called, outside of the task, once it has ended.
        self.ended: Callable[[], object] | None = None
        # What it waits for: a late answer to an earlier question finds another one here.
        self._ticket: object = None
        self._job: Job | None = None
        self._drop: Callable[[], object] | None = None
        # The last call that it had to finish.
        self._errand: _Errand | None = None

    def start(self) -> None:
        """Run until it parks or ends."""
        idle = self._offload._idle
        carrier = self._carrier = idle.pop() if idle else _Carrier(self._offload)
        carrier.task = self
        self._switch(carrier, carrier.switch)

    def _switch(self, carrier: _Carrier, switch: Callable[..., Any], *value: Any) -> None:
        carrier.parent = getcurrent()
        switch(*value)
        if self.is_over and self.ended is not None:
            ended, self.ended = self.ended, None
            ended()

    def _resume(self, *value: Any) -> None:
        self._leave_parking(self.carrier.switch, *value)

    def _leave_parking(self, switch: Callable[..., Any], *value: Any) -> None:
        self._ticket = None
        self._offload._parked.discard(self)
        self._switch(self.carrier, switch, *value)

    @property
    def carrier(self) -> _Carrier:
        """What runs it, once it has been started."""
        assert self._carrier is not None
        return self._carrier

    def _park(self, job: Job | None, drop: Callable[[], object] | None = None) -> Any:
        """Let others run until `_deliver` comes with the present ticket, or `abandon`, which calls `drop`."""
        self._job, self._drop = job, drop
        self._offload._parked.add(self)
        try:
            parent = self.carrier.parent
            assert parent is not None
            return parent.switch()
        finally:
            self._job = self._drop = None

    def _deliver(self, ticket: object, *value: Any) -> None:
        if ticket is self._ticket:
            self._resume(*value)

    @property
    def is_parked(self) -> bool:
        """Whether it waits for something."""
        return self in self._offload._parked

    @property
    def may_be_aborted(self) -> bool:
        """Whether what it waits for has changed nothing, so that it may be given up."""
        return self._job is not None

    def abandon(self) -> None:
        """Stop waiting: `Abandoned` is raised in the task. What a thread does for it is cancelled, or dropped."""
        if not self.is_parked:
            return
        if self._job is not None:
            self._job.cancel()
        if self._drop is not None:
            self._drop()
        self._leave_parking(self.carrier.throw, Abandoned())

    # --- within the task

    def call(
        self, owner: Hashable, call: Callable[[], T], *, changes: bool = False, at_least: Wait = Wait.STORE
    ) -> T:
        """Return the outcome of a call; at once where it need not wait, else parked meanwhile.

        A call that `changes` something goes to a thread and to its end, whoever leaves: only then is known what came
        of it. It begins where one waits for `at_least`, and has changed nothing yet when it turns out to wait for more.
        """
        need = at_least
        if not changes:
            try:
                return without_waiting(call)
            except WouldWait as would:
                need = would.need
        errand = _Errand(call, self, None if changes else Job())
        errand.go(self._offload.lanes(owner), need)
        outcome: Future[T] = self._park(errand.job)
        return outcome.result()

    def finish(self, owner: Hashable, call: Callable[[], T]) -> T:
        """Return the outcome of a call by a thread: made to its end once begun, and never if the client leaves before.

        Raises Crowded where too many wait for the owner's threads.
        """
        lanes = self._offload.lanes(owner)
        lane = lanes[Wait.STORE]
        if lane.queued >= MOST_QUEUED:
            raise Crowded
        errand = self._errand = _Errand(call, self, None)
        work = partial(errand._run, lanes)

        def drop() -> None:
            errand.is_over = lane.drop(work)

        lane.submit(work)
        outcome: Future[T] = self._park(None, drop)
        return outcome.result()

    @contextlib.contextmanager
    def turn(self, key: Hashable, most: int) -> Iterator[None]:
        """Be one of `most` tasks with this key that are in the block at once; the others park, in their order.

        One whose client leaves while a thread does what it has to `finish` is in it until that is done. Raises Crowded
        where too many wait.
        """
        turns = self._offload._turns.setdefault(key, _Turns(most))
        try:
            turns.enter(self)
        except BaseException:
            self._offload.tidy_turns(key)
            raise

        def leave() -> None:
            turns.leave()
            self._offload.tidy_turns(key)

        try:
            yield
        finally:
            errand, self._errand = self._errand, None
            if errand is None or errand.is_over:
                leave()
            else:
                errand.ended = leave

    def wait(self, future: Future[Any]) -> None:
        """Park until a future is done, however it ends."""
        ticket = self._ticket = object()
        deliver = partial(self._offload._loop.call_soon_threadsafe, self._deliver, ticket)
        future.add_done_callback(lambda _: deliver())
        self._park(None)

    def sleep(self, seconds: float) -> None:
        """Park for a while."""
        ticket = self._ticket = object()
        timer = self._offload._loop.call_later(seconds, self._deliver, ticket)
        try:
            self._park(None)
        finally:
            if not timer.cancelled:
                timer.cancel()


class _Turns:
    """Whose turn it is, of the tasks with one key. The loop's own thread."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._most = most
        self._waiting: deque[Future[None]] = deque()

    def enter(self, task: Task) -> None:
        """Take a turn; park until there is one."""
        if self._free:
            self._free -= 1
            return
        if len(self._waiting) >= MOST_IN_TURN:
            raise Crowded
        mine: Future[None] = Future()
        self._waiting.append(mine)
        try:
            task.wait(mine)
        except Abandoned:
            if mine.done():
                self.leave()
            else:
                self._waiting.remove(mine)
            raise

    @property
    def is_unused(self) -> bool:
        """Whether nobody has a turn."""
        return self._free == self._most

    def leave(self) -> None:
        """Give a turn to whoever has waited longest."""
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self._free += 1


class _Errand:
    """One call that a thread makes for a parked task."""

    def __init__(self, call: Callable[[], Any], task: Task, job: Job | None) -> None:
        self.job = job
        self._call = call
        self._task = task
        self._offload = task._offload
        self._ticket = task._ticket = object()
        self.is_over = False
        # Called on the loop once a thread is through with it.
        self.ended: Callable[[], object] | None = None

    def go(self, lanes: Lanes, need: Wait) -> None:
        """Have it made where one waits for `need`; one that turns out to wait for more is made again in that lane."""
        lanes[need].submit(partial(self._run, lanes))

    def _run(self, lanes: Lanes) -> None:
        outcome: Future[Any] = Future()
        try:
            if self.job is not None and self.job.is_cancelled:
                return
            with working_for(self.job):
                outcome.set_result(self._call())
        except WouldWait as would:
            self.go(lanes, would.need)
            return
        except BaseException as error:  # noqa: BLE001 - raised in the task
            outcome.set_exception(error)
        self._offload._loop.call_soon_threadsafe(self._deliver, outcome)

    def _deliver(self, outcome: Future[Any]) -> None:
        self.is_over = True
        if self.ended is not None:
            self.ended()
        if self._task._ticket is self._ticket:
            self._task._resume(outcome)
        elif outcome.exception() is None:
            _discard(outcome.result())


def _discard(result: Any) -> None:
    """Close what was opened for somebody who has left; a new handle has touched nothing yet."""
    if hasattr(result, "abandon"):
        result.abandon()


def current_task() -> Task | None:
    """Return the task that runs, None outside of one."""
    current = getcurrent()
    return current.task if isinstance(current, _Carrier) else None
