"""The ban list: who is refused, for how long, and that all processes agree."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.cache.bans import Bans
from ftpvfs.clock import Clock
from tests.processes import Child


class MovedClock(Clock):
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock() -> MovedClock:
    return MovedClock()


@pytest.fixture
def make_bans(tmp_path: Path, clock: MovedClock) -> Iterator[Callable[..., Bans]]:
    with contextlib.ExitStack() as cleanup:

        def make(**options: Any) -> Bans:
            bans = Bans(tmp_path, **{"after": 3, "window": 60.0, "time": 600.0, "clock": clock, **options})
            cleanup.callback(bans.close)
            return bans

        yield make


def test_too_many_failures_in_the_window_have_an_address_refused_for_a_while(
    make_bans: Callable[..., Bans], clock: MovedClock
) -> None:
    bans = make_bans()
    assert [bans.failed("192.0.2.1") for _ in range(2)] == [False, False]
    assert not bans.is_banned("192.0.2.1")
    assert bans.failed("192.0.2.1") is True
    assert bans.is_banned("192.0.2.1")
    assert not bans.is_banned("192.0.2.2")
    clock.now += 599
    assert bans.is_banned("192.0.2.1")
    clock.now += 1
    assert not bans.is_banned("192.0.2.1")
    assert bans.failed("192.0.2.1") is False  # it begins anew


def test_failures_before_the_window_do_not_count(make_bans: Callable[..., Bans], clock: MovedClock) -> None:
    bans = make_bans()
    for _ in range(10):
        assert bans.failed("192.0.2.1") is False
        clock.now += 31
    assert not bans.is_banned("192.0.2.1")


def test_without_a_time_it_is_for_ever(make_bans: Callable[..., Bans], clock: MovedClock) -> None:
    bans = make_bans(window=None, time=None, after=2)
    bans.failed("192.0.2.1")
    clock.now += 1e9
    assert bans.failed("192.0.2.1") is True
    clock.now += 1e9
    assert bans.is_banned("192.0.2.1")


def test_an_address_can_be_forgiven(make_bans: Callable[..., Bans]) -> None:
    bans = make_bans(after=1)
    bans.failed("192.0.2.1")
    bans.forgive("192.0.2.1")
    assert not bans.is_banned("192.0.2.1")


def test_one_who_has_many_ipv6_addresses_is_one(make_bans: Callable[..., Bans]) -> None:
    bans = make_bans()
    for number in range(3):
        bans.failed(f"2001:db8::{number}")
    assert bans.is_banned("2001:db8::ffff")
    assert not bans.is_banned("2001:db8:0:1::1")


def test_a_restart_forgets_nothing(make_bans: Callable[..., Bans]) -> None:
    first = make_bans(after=1)
    first.failed("192.0.2.1")
    first.close()
    assert make_bans().is_banned("192.0.2.1")


def test_processes_count_together(child: Callable[..., Child], tmp_path: Path, make_bans: Callable[..., Bans]) -> None:
    def work(pipe: Connection) -> None:
        with contextlib.closing(Bans(tmp_path, after=90, window=600.0, time=600.0)) as bans:
            pipe.send(sum(bans.failed("192.0.2.1") for _ in range(30)))

    children = [child(work) for _ in range(3)]
    assert sum(each.hear() for each in children) == 1  # the last one, to the count
    assert make_bans(clock=Clock()).is_banned("192.0.2.1")
