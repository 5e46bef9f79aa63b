"""pyftpdlib's event loop with a way in for other threads, and an eye on turns that take too long."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyftpdlib import ioloop
from pyftpdlib.ioloop import IOLoop

from ftpvfs.server.offload import Offload
from ftpvfs.waiting import Wait, limited_to

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlowTurn:
    """One turn of the loop in which nobody else was served, and what it was doing when that was noticed."""

    seconds: float  # so far
    stack: str

    def __str__(self) -> str:
        return f"a turn of the event loop takes {self.seconds:.2f} s:\n{self.stack}"


class Loop(IOLoop):  # type: ignore[misc,valid-type,unused-ignore]
    """The event loop of a `VFSServer`. One thread; `call_soon_threadsafe` is for all others.

    Whatever would wait for a disk or a store in this thread raises WouldWait instead; a task has it done by a lane.
    So it is unless `may_wait_for` says otherwise.

    `offload` is where commands of this loop's sessions wait for what takes long. With `debug_slow_turn` (seconds) each
    turn that takes longer is logged with its stack and kept in `slow_turns`; `debug_cpu_time` sums up the seconds of a
    processor that all turns took.
    """

    debug_slow_turn: float | None = None
    # What its thread may wait for: pyftpdlib's own handlers leave it to nobody else, and have the loop wait.
    may_wait_for = Wait.NOTHING

    def __init__(self) -> None:
        super().__init__()
        self.slow_turns: list[SlowTurn] = []
        self.debug_cpu_time = 0.0
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._waker = _Waker()
        self._watchdog: _Watchdog | None = None
        self._is_closed = False
        self.register(self._waker._fileno, self._waker, self.READ)
        self.offload = Offload(self)

    # --- from other threads

    def call_soon_threadsafe(self, call: Callable[..., object], *arguments: Any) -> None:
        """Make a call on the loop's own thread, soon; none once it is closed. Any thread; a signal handler, too."""
        if not self._is_closed:
            self._calls.append((call, arguments))
            self._waker.wake()

    def call_soon(self, call: Callable[..., object], *arguments: Any) -> None:
        """Make a call in the next turn. The loop's own thread."""
        self._calls.append((call, arguments))

    # --- what is watched

    def forget(self, channel: Any) -> None:
        """Watch a channel no more whose socket is closed next: the system then sees to its part by itself."""
        if isinstance(self, _SYSTEM_FORGETS):
            self.socket_map.pop(channel._fileno, None)
        else:
            channel.del_channel()

    # --- turns

    def poll(self, timeout: float | None) -> None:
        """Serve all for whom something has come. What fails for one of them is that one's end, and nobody else's.

        pyftpdlib's own guards reading and writing alone: what fails as a connection ends would end the whole loop.
        """
        if not isinstance(self, _POLLS):
            super().poll(timeout)
            return
        for descriptor, event in self._poller.poll(-1 if timeout is None else timeout):
            channel = self.socket_map.get(descriptor)
            if channel is not None:
                try:
                    self._serve(channel, event)
                except Exception:  # noqa: BLE001 - logged by the channel
                    self._give_up(channel)

    def _serve(self, channel: Any, event: int) -> None:
        if event & self._ERROR and not event & self.READ:
            channel.handle_close()
            return
        if event & self.READ and channel.readable():
            channel.handle_read_event()
        if event & self.WRITE and channel.writable():
            channel.handle_write_event()

    def _give_up(self, channel: Any) -> None:
        """Let a channel deal with the exception that is being handled; close one that cannot."""
        try:
            channel.handle_error()
        except Exception:
            logger.exception("unhandled exception in %r", channel)
            self.forget(channel)
            with contextlib.suppress(OSError):
                channel.socket.close()

    def loop(self, timeout: float | None = None, blocking: bool = True) -> float | None:
        """Serve until nobody is left to serve, or with `blocking` false for one turn; then return when the next is due.

        `timeout` bounds how long one turn may wait for something to happen.
        """
        soonest: float | None = None
        with limited_to(self.may_wait_for):
            while not self._is_closed and len(self.socket_map) > 1:  # beside the waker
                waits = [each for each in (timeout, soonest) if each is not None]
                soonest = self._turn(0 if self._calls else min(waits, default=None))
                if not blocking:
                    break
        return soonest

    def _turn(self, timeout: float | None) -> float | None:
        if self.debug_slow_turn is None:
            return self._served(timeout)
        if self._watchdog is None:
            self._watchdog = _Watchdog(self.debug_slow_turn, self.slow_turns)
        select.select([self.fileno()], [], [], timeout)  # so that waiting is not taken for work
        began = time.thread_time()
        try:
            with self._watchdog:
                return self._served(0)
        finally:
            self.debug_cpu_time += time.thread_time() - began

    def _served(self, timeout: float | None) -> float | None:
        self.poll(timeout)
        for _ in range(len(self._calls)):  # what they ask for in their turn is for the next one
            if not self._calls:  # the loop was closed by one of them
                break
            call, arguments = self._calls.popleft()
            try:
                call(*arguments)
            except Exception:
                logger.exception("unhandled exception in %r", call)
        return self.sched.poll()  # type: ignore[no-any-return]

    # --- the end

    def close(self) -> None:
        """Close all connections; what waits for a store is let go of, and no thread of ours is waited for."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._watchdog is not None:
            self._watchdog.close()
        super().close()
        self.offload.close()
        self._calls.clear()


class _Waker:
    """What makes the loop look up: bytes in a socket that nobody else reads. A signal handler may wake it, too."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._fileno = self._reader.fileno()
        self._is_awake = False

    def wake(self) -> None:
        if self._is_awake:  # and will look at all calls that there are
            return
        self._is_awake = True
        with contextlib.suppress(OSError):  # it is closed
            self._writer.send(b"\0")

    # What the loop asks of those that it serves.

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def handle_read_event(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(64)
        # Now and not before: whose call comes from here on wakes the loop again, all others are made in this turn.
        self._is_awake = False

    def handle_close(self) -> None:
        """Nobody closes it but the loop."""

    def handle_error(self) -> None:
        logger.error("the event loop cannot be woken up: %s", sys.exc_info()[1])

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


class _Watchdog:
    """A thread that looks at what the loop does when a turn of it takes longer than `limit` seconds."""

    def __init__(self, limit: float, found: list[SlowTurn]) -> None:
        self._limit = limit
        self._found = found
        self._loop_thread = threading.get_ident()
        self._began: float | None = None
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, name="ftpvfs-watchdog", daemon=True).start()

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._began = None

    def _watch(self) -> None:
        told: float | None = None
        while not self._is_over.wait(self._limit / 4):
            began = self._began
            if began is None or began == told or time.monotonic() - began < self._limit:
                continue
            told = began
            frame = sys._current_frames().get(self._loop_thread)
            stack = "".join(traceback.format_stack(frame)) if frame is not None else "(it is gone)"
            self._found.append(SlowTurn(time.monotonic() - began, stack))
            logger.warning("%s", self._found[-1])

    def close(self) -> None:
        self._is_over.set()


_POLLS: tuple[type, ...] = tuple(getattr(ioloop, name) for name in ("Poll", "Epoll") if hasattr(ioloop, name))
_SYSTEM_FORGETS: tuple[type, ...] = (ioloop.Epoll,) if hasattr(ioloop, "Epoll") else ()


def is_watched(channel: Any) -> bool:
    """Tell whether a channel's loop watches it; its descriptor may be another's by now."""
    return channel.ioloop.socket_map.get(channel._fileno) is channel


def leave_loop(channel: Any) -> None:
    """Have a channel's loop watch it no more, right before its socket is closed."""
    if is_watched(channel):
        forget = getattr(channel.ioloop, "forget", None)
        if forget is not None:
            forget(channel)
        else:
            channel.del_channel()
