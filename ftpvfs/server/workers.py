"""Worker processes: forked, watched, replaced when they die, and stopped in good order.

The parent has no threads and serves nobody. It waits for signals, for the end of a child, and for the moment to try
again; its children see by the end of a pipe that it is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ftpvfs.coordination.sessions import SessionTable

logger = logging.getLogger(__name__)

STOP = (signal.SIGTERM, signal.SIGINT)
PASSED_ON = {signal.SIGTERM, signal.SIGHUP}
# A worker that has lived so long (seconds) is replaced at once when it dies; one that dies sooner, later and later.
ESTABLISHED = 10.0
FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
# Seconds beyond its time to drain after which a worker that has not ended is killed.
GRACE = 10.0


class Refused(Exception):
    """Why a worker cannot serve, in one line: what no other try would change."""


class Reporter:
    """What a worker tells its parent. In the worker."""

    def __init__(self, slot: int, status: int, parent: int) -> None:
        self.slot = slot
        # Readable once the parent is gone.
        self.parent = parent
        self._status = status

    def heed(self, on_stop: Callable[[], object], on_reload: Callable[[], object]) -> None:
        """Have the parent's signals make these calls; one that came before waits until now."""
        signal.signal(signal.SIGTERM, lambda *_: on_stop())
        signal.signal(signal.SIGHUP, lambda *_: on_reload())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)

    def ready(self) -> None:
        """Say that this worker serves."""
        self._say({"ready": True})

    def refuse(self, reason: str) -> None:
        """Say why it never will."""
        self._say({"refused": reason})

    def _say(self, word: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(self._status, json.dumps(word).encode() + b"\n")


@dataclass
class Backoff:
    """How long a worker that has died waits to be replaced. Pure.

    >>> backoff = Backoff()
    >>> [backoff.after(lived) for lived in (1, 1, 1, 60, 1)]
    [0.0, 0.5, 1.0, 0.0, 0.5]
    """

    _next: float = 0.0

    def after(self, lived: float) -> float:
        """Return the seconds to wait after one that `lived` so long."""
        delay = 0.0 if lived >= ESTABLISHED else self._next
        self._next = min(max(2 * delay, FIRST_DELAY), LONGEST_DELAY)
        return delay


@dataclass
class _Slot:
    """One worker's place. `pid` is None while nobody is in it, and then `due` is when there will be."""

    number: int
    pid: int | None = None
    status: int = -1
    began: float = 0.0
    due: float = 0.0
    is_ready: bool = False
    is_new: bool = True
    said: bytes = b""
    backoff: Backoff = field(default_factory=Backoff)


class Workers:
    """Runs `work(reporter)` in several processes until told to stop. Main thread of a process without others.

    `work` returns the exit status. In it SIGTERM and SIGHUP wait until it says what to do (`Reporter.heed`), and
    SIGINT is ignored: a terminal sends it to all, and the parent passes SIGTERM on. `on_ready` is called once, when all
    workers serve; `on_reload` at each SIGHUP, before it is passed on; `on_stop` as stopping begins.
    """

    def __init__(
        self,
        work: Callable[[Reporter], int],
        table: SessionTable,
        *,
        drain_timeout: float | None,
        on_ready: Callable[[], None] = lambda: None,
        on_reload: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._work = work
        self._table = table
        self._patience = None if drain_timeout is None else drain_timeout + GRACE
        self._on_ready, self._on_reload, self._on_stop = on_ready, on_reload, on_stop
        self._slots = [_Slot(number) for number in range(table.slots)]
        self._is_announced = False
        # When those who have not stopped are killed; None: nobody was told to stop.
        self._deadline: float | None = None
        self._is_stopping = False
        self._refusal: str | None = None

    def run(self) -> None:
        """Run the workers until SIGTERM or SIGINT; Refused where one says that it cannot serve."""
        parent_reader, parent_writer = os.pipe()
        self._parent = (parent_reader, parent_writer)
        with _signals_as_bytes() as wakeup:
            try:
                while not self._is_over():
                    self._fill_slots()
                    self._wait(wakeup)
            finally:
                self._kill()
                os.close(parent_reader)
                os.close(parent_writer)
        if self._refusal is not None:
            raise Refused(self._refusal)

    def _is_over(self) -> bool:
        return self._is_stopping and all(slot.pid is None for slot in self._slots)

    # --- waiting

    def _wait(self, wakeup: int) -> None:
        """Wait for a signal, a word of a worker's, or the time to do something."""
        readable, _, _ = select.select([wakeup, *self._pipes()], [], [], self._time_left())
        for descriptor in readable:
            if descriptor != wakeup:
                self._hear(self._pipes()[descriptor])
        if wakeup in readable:
            for number in os.read(wakeup, 4096):
                self._signalled(number)
        self._bury()
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._kill()

    def _pipes(self) -> dict[int, _Slot]:
        return {slot.status: slot for slot in self._slots if slot.status >= 0}

    def _time_left(self) -> float | None:
        moments = [] if self._is_stopping else [slot.due for slot in self._slots if slot.pid is None]
        if self._deadline is not None:
            moments.append(self._deadline)
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _signalled(self, number: int) -> None:
        if number in STOP:
            if self._is_stopping:
                self._end_at_once(number)
            logger.info("stopping: signal %d", number)
            self._stop()
        elif number == signal.SIGHUP:
            self._on_reload()
            self._tell(signal.SIGHUP)

    def _stop(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._on_stop()
            self._deadline = None if self._patience is None else time.monotonic() + self._patience
            self._tell(signal.SIGTERM)

    def _end_at_once(self, number: int) -> None:
        self._kill()
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)

    def _hear(self, slot: _Slot) -> None:
        """Read what a worker says; an end of it is seen by `_bury`."""
        try:
            said = os.read(slot.status, 4096)
        except BlockingIOError:
            return
        if not said:
            os.close(slot.status)
            slot.status = -1
            return
        *lines, slot.said = (slot.said + said).split(b"\n")
        for line in lines:
            word = json.loads(line)
            if word.get("ready"):
                slot.is_ready, slot.is_new = True, False
                self._announce()
            elif slot.is_new:
                self._refusal = str(word["refused"])
                self._stop()
            else:
                logger.error("worker %d: %s", slot.number, word["refused"])

    def _announce(self) -> None:
        if not self._is_announced and all(slot.is_ready for slot in self._slots):
            self._is_announced = True
            self._on_ready()

    # --- processes

    def _fill_slots(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.pid is None and not self._is_stopping and slot.due <= now:
                self._start(slot)

    def _start(self, slot: _Slot) -> None:
        if slot.status >= 0:
            os.close(slot.status)
            slot.status = -1
        slot.said, slot.is_ready = b"", False
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            self._fork(slot)
        except OSError as error:  # no processes, memory or descriptors to be had: the others go on
            if slot.is_new:
                raise
            delay = slot.backoff.after(0.0)
            slot.due = time.monotonic() + delay
            logger.error("worker %d cannot be started (%s); tried again in %g s", slot.number, error, delay)  # noqa: TRY400

    def _fork(self, slot: _Slot) -> None:
        ours, theirs = os.pipe()
        # A signal that comes before the child knows what to do with it waits until it does.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        try:
            os.set_blocking(ours, False)
            slot.status = ours
            pid = os.fork()
            if pid == 0:
                self._live(slot, theirs)
            slot.pid, slot.began = pid, time.monotonic()
        finally:
            os.close(theirs)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _live(self, slot: _Slot, status: int) -> None:
        """Be a worker. Does not return, whatever happens: what is above is the parent's to do."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.close(self._parent[1])
            for other in self._pipes():
                os.close(other)
            self._table.work_as(slot.number)
            code = self._work(Reporter(slot.number, status, self._parent[0]))
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:  # noqa: BLE001 - told here, as nobody above may
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
                logging.shutdown()
            os._exit(code)

    def _bury(self) -> None:
        """See to those who have died: others take their places, and nobody is counted as theirs any more."""
        for slot in self._slots:
            if slot.pid is None:
                continue
            pid, status = os.waitpid(slot.pid, os.WNOHANG)
            if pid:
                slot.pid = None
                self._table.give_up(slot.number)
                if slot.status >= 0:
                    self._hear(slot)
                if not self._is_stopping:
                    self._replace(slot, pid, os.waitstatus_to_exitcode(status))

    def _replace(self, slot: _Slot, pid: int, code: int) -> None:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        if slot.is_new:
            self._refusal = f"a worker process {how} before it served anybody"
            self._stop()
            return
        delay = slot.backoff.after(time.monotonic() - slot.began)
        slot.due = time.monotonic() + delay
        again = f"in {delay:g} s" if delay else "now"
        logger.error("worker %d (process %d) %s; another takes its place %s", slot.number, pid, how, again)

    def _tell(self, number: int) -> None:
        for slot in self._slots:
            if slot.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(slot.pid, number)

    def _kill(self) -> None:
        self._tell(signal.SIGKILL)
        for slot in self._slots:
            if slot.pid is not None:
                os.waitpid(slot.pid, 0)
                slot.pid = None
                self._table.give_up(slot.number)


@contextlib.contextmanager
def _signals_as_bytes() -> Iterator[int]:
    """Yield a descriptor from which the numbers of the signals come that mean something to the parent."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    numbers = (*STOP, signal.SIGHUP, signal.SIGCHLD)
    handlers = {number: signal.signal(number, _hear_of) for number in numbers}
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _hear_of(number: int, frame: types.FrameType | None) -> None:
    """Let Python write the signal's number where `_signals_as_bytes` reads it."""
