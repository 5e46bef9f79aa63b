"""Worker processes: how they begin, are replaced, and end, with real processes and real signals."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest

from ftpvfs.coordination.sessions import SessionTable
from ftpvfs.metrics import Count, Metrics
from ftpvfs.server.workers import LONGEST_DELAY, Backoff, Refused, Reporter, Workers
from tests.conftest import wait_until
from tests.processes import DEADLINE, Child


def parent(pipe: Connection, work: Callable[..., int], count: int, options: dict[str, Any]) -> None:
    """Be a parent of `count` workers, which tell the test by `pipe` what they do."""
    table = SessionTable(count)
    workers = Workers(
        lambda reporter: work(pipe, reporter, table),
        table,
        on_ready=lambda: pipe.send("all ready"),
        on_reload=lambda: pipe.send("reload"),
        on_stop=lambda: pipe.send("stopping"),
        **{"drain_timeout": 30.0, **options},
    )
    try:
        workers.run()
    except Refused as error:
        pipe.send(("refused", str(error)))
    pipe.send(("over", table.total()))


def serve(pipe: Connection, reporter: Reporter, table: SessionTable) -> int:
    """A worker that has two connections, tells of its signals, and ends when it is told to, or alone."""
    signals: list[int] = []
    reporter.heed(lambda: signals.append(signal.SIGTERM), lambda: signals.append(signal.SIGHUP))
    table.admit("10.0.0.1")
    table.admit("10.0.0.1")
    reporter.ready()
    pipe.send(("working", reporter.slot, os.getpid()))
    while not signals or signals[-1] != signal.SIGTERM:
        if _has_ended(reporter.parent):
            return 0
        if signals and signals[-1] == signal.SIGHUP:
            pipe.send(("hangup", reporter.slot))
            signals.clear()
    pipe.send(("terminated", reporter.slot))
    return 0


def _has_ended(parent: int) -> bool:
    import select

    return bool(select.select([parent], [], [], 0.02)[0])


@pytest.fixture
def start(child: Callable[..., Child]) -> Iterator[Callable[..., Child]]:
    """start(work, count, ...) -> the parent of so many workers; what is left of it is killed when the test ends."""
    families: list[Child] = []

    def make(work: Callable[..., int] = serve, count: int = 3, **options: Any) -> Child:
        families.append(child(parent, work, count, options))
        return families[-1]

    yield make
    for family in families:
        family.kill()


def hear(who: Child, count: int) -> list[Any]:
    """The next words, in no particular order."""
    return sorted((who.hear() for _ in range(count)), key=repr)


def pids(words: list[Any]) -> dict[int, int]:
    """slot -> process of those who say that they work."""
    return {word[1]: word[2] for word in words if word[0] == "working"}


def stop(who: Child, number: int = signal.SIGTERM) -> None:
    assert who.process.pid is not None
    os.kill(who.process.pid, number)


def test_all_begin_and_a_signal_ends_them_in_good_order(start: Callable[..., Child]) -> None:
    family = start()
    words = hear(family, 4)
    assert set(pids(words)) == {0, 1, 2}
    assert "all ready" in words
    assert len(set(pids(words).values()) | {family.process.pid}) == 4
    stop(family)
    assert family.hear() == "stopping"
    assert hear(family, 3) == [("terminated", 0), ("terminated", 1), ("terminated", 2)]
    assert family.hear() == ("over", 0)


def test_a_hangup_is_passed_on(start: Callable[..., Child]) -> None:
    family = start()
    hear(family, 4)
    stop(family, signal.SIGHUP)
    assert family.hear() == "reload"
    assert hear(family, 3) == [("hangup", 0), ("hangup", 1), ("hangup", 2)]


def test_an_interrupt_from_the_terminal_reaches_all_and_stops_them_in_good_order(start: Callable[..., Child]) -> None:
    family = start()
    words = hear(family, 4)
    for pid in [*pids(words).values(), family.process.pid]:
        os.kill(pid, signal.SIGINT)
    assert family.hear() == "stopping"
    assert hear(family, 3) == [("terminated", 0), ("terminated", 1), ("terminated", 2)]


def test_a_killed_worker_is_replaced_and_its_connections_are_given_up(start: Callable[..., Child]) -> None:
    def work(pipe: Connection, reporter: Reporter, table: SessionTable) -> int:
        result = serve(pipe, reporter, table)
        pipe.send(("seen", reporter.slot, table.total()))
        return result

    family = start(work)
    before = pids(hear(family, 4))
    os.kill(before[1], signal.SIGKILL)
    said, slot, pid = family.hear()
    assert (said, slot) == ("working", 1)
    assert pid != before[1]
    stop(family)
    seen = [word for word in hear(family, 7) if word[0] == "seen"]
    assert max(total for _, _, total in seen) <= 6  # two each, and none of the dead


def test_the_death_of_the_parent_ends_all_workers(start: Callable[..., Child]) -> None:
    family = start()
    workers = pids(hear(family, 4)).values()
    family.kill()
    for pid in workers:
        wait_until(lambda pid=pid: not psutil.pid_exists(pid), timeout=DEADLINE)


def test_a_worker_that_refuses_stops_the_start_with_its_reason(start: Callable[..., Child]) -> None:
    def work(pipe: Connection, reporter: Reporter, table: SessionTable) -> int:
        if reporter.slot == 1:
            reporter.refuse("no such folder")
            return 1
        return serve(pipe, reporter, table)

    family = start(work)
    words = []
    while not words or words[-1] != ("over", 0):
        words.append(family.hear())
    assert ("refused", "no such folder") in words
    assert "all ready" not in words


def test_a_worker_that_dies_before_it_serves_stops_the_start(start: Callable[..., Child]) -> None:
    def work(pipe: Connection, reporter: Reporter, table: SessionTable) -> int:
        raise SystemExit(7)

    family = start(work, count=1)
    assert family.hear() == "stopping"
    assert family.hear() == ("refused", "a worker process ended with status 7 before it served anybody")
    assert family.hear() == ("over", 0)


def test_a_worker_that_dies_again_and_again_is_replaced_later_and_later() -> None:
    backoff = Backoff()
    delays = [backoff.after(0.1) for _ in range(12)]
    assert delays[0] == 0  # one that was killed once
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST_DELAY
    assert backoff.after(3600.0) == 0
    assert backoff.after(0.1) > 0


def test_it_goes_on_while_a_worker_waits_for_its_turn_again(start: Callable[..., Child]) -> None:
    def work(pipe: Connection, reporter: Reporter, table: SessionTable) -> int:
        if reporter.slot == 1:
            reporter.ready()
            return 3
        return serve(pipe, reporter, table)

    family = start(work, count=2)
    hear(family, 2)
    stop(family)
    assert family.hear() == "stopping"
    assert family.hear() == ("terminated", 0)
    assert family.hear() == ("over", 0)


def test_a_worker_that_does_not_end_in_time_is_killed(
    start: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(pipe: Connection, reporter: Reporter, table: SessionTable) -> int:
        reporter.ready()
        while True:
            signal.pause()

    monkeypatch.setattr("ftpvfs.server.workers.GRACE", 0.0)
    family = start(work, drain_timeout=0.1)
    assert family.hear() == "all ready"
    stop(family)
    assert family.hear() == "stopping"
    assert family.hear() == ("over", 0)


def test_a_second_signal_ends_all_at_once(start: Callable[..., Child]) -> None:
    def work(pipe: Connection, reporter: Reporter, table: SessionTable) -> int:
        reporter.heed(lambda: pipe.send(("asked", os.getpid())), lambda: None)
        reporter.ready()
        while True:
            signal.pause()

    family = start(work, drain_timeout=None)
    assert family.hear() == "all ready"
    stop(family)
    assert family.hear() == "stopping"
    workers = [family.hear()[1] for _ in range(3)]
    stop(family)
    family.process.join(DEADLINE)
    assert family.process.exitcode == -signal.SIGTERM
    for pid in workers:
        wait_until(lambda pid=pid: not psutil.pid_exists(pid), timeout=DEADLINE)


def test_a_signal_at_any_moment_of_the_start_is_heeded(start: Callable[..., Child]) -> None:
    for delay in (0.0, 0.001, 0.003, 0.01):
        family = start()
        assert family.process.pid is not None
        wait_until(lambda family=family: _handles_signals(family.process.pid), timeout=DEADLINE)
        end = time.monotonic() + delay
        while time.monotonic() < end:
            pass
        stop(family)
        words = []
        while not words or words[-1] != ("over", 0):
            words.append(family.hear())


def _handles_signals(pid: int | None) -> bool:
    """Whether the process has a handler for SIGTERM; before that it is none of ours."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
        caught = next(line for line in status if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def test_counts_of_several_processes_add_up_and_stay(child: Callable[..., Child]) -> None:
    metrics = Metrics(3)

    def count(pipe: Connection, slot: int) -> None:
        metrics.work_as(slot)
        for _ in range(1000):
            metrics.add(Count.LOGINS)
        pipe.send("done")

    children = [child(count, slot) for slot in range(3)]
    for each in children:
        each.hear()
        each.kill()
    assert metrics.value(Count.LOGINS) == 3000
    assert metrics.values()["logins"] == 3000
    assert metrics.values()["bans"] == 0


def short_of_processes(pipe: Connection, work: Callable[..., int], count: int, options: dict[str, Any]) -> None:
    """A parent that cannot fork once, when it is to replace a worker."""
    fork, refusals = os.fork, [True]
    began = 0

    def reluctant() -> int:
        nonlocal began
        began += 1
        if began > count and refusals:
            refusals.pop()
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    os.fork = reluctant
    parent(pipe, work, count, options)


def test_a_worker_that_cannot_be_replaced_at_once_is_replaced_later_and_the_others_go_on(
    child: Callable[..., Child]
) -> None:
    family = child(short_of_processes, serve, 2, {})
    try:
        working = pids(hear(family, 3))
        os.kill(working[0], signal.SIGKILL)
        word = family.hear()
        assert word[:2] == ("working", 0)
        assert psutil.pid_exists(working[1])
        stop(family)
        assert {family.hear() for _ in range(4)} == {"stopping", ("terminated", 0), ("terminated", 1), ("over", 0)}
    finally:
        family.kill()
