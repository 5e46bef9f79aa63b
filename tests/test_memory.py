"""The one budget of memory for all transfers."""

from __future__ import annotations

import threading

from ftpvfs.memory import MemoryBudget


def test_what_does_not_fit_is_refused_and_takes_nothing() -> None:
    budget = MemoryBudget(100)

    assert budget.take(60)
    assert not budget.take(41)
    assert budget.used == 60
    assert budget.take(40)
    budget.give(100)
    assert budget.used == 0


def test_who_has_nothing_under_way_may_exceed_the_limit() -> None:
    budget = MemoryBudget(10)

    assert budget.take(50, force=True)
    assert budget.used == 50
    assert not budget.take(1)
    budget.give(50)
    assert budget.take(10)


def test_without_a_limit_everything_fits() -> None:
    budget = MemoryBudget(None)

    assert budget.take(2**60)
    assert budget.used == 2**60


def test_threads_never_take_more_than_there_is() -> None:
    budget = MemoryBudget(1000)
    most: list[int] = []

    def work() -> None:
        for _ in range(2000):
            if budget.take(300):
                most.append(budget.used)
                budget.give(300)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert max(most) <= 1000
    assert budget.used == 0
