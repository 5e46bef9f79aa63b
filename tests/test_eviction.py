"""Which files go: every promise of the order, on cases by hand and on random caches."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from ftpvfs.cache.eviction import Candidate, Kind, Limits, Queue

NOW = 10_000.0


def clean(name: str, age: float, size: int = 10) -> Candidate:
    return Candidate(Kind.CLEAN, NOW - age, name, size)


def partial(name: str, age: float, size: int = 10) -> Candidate:
    return Candidate(Kind.PARTIAL, NOW - age, name, size)


def victims(candidates: list[Candidate], limits: Limits, *, taken: int, free: int) -> list[Candidate]:
    """Who goes, in this order."""
    queue, excess = Queue(candidates), limits.excess(taken, free)
    going = []
    while (each := queue.take(limits, now=NOW, excess=excess)) is not None:
        going.append(each)
        excess -= each.size
    assert len(queue) == len(candidates) - len(going)
    return going


def who(candidates: list[Candidate], limits: Limits, taken: int | None = None, free: int = 10**9) -> str:
    total = sum(each.size for each in candidates) if taken is None else taken
    return "".join(each.id for each in victims(candidates, limits, taken=total, free=free))


def test_without_limits_all_stay() -> None:
    assert who([clean("a", 1e9), partial("b", 1e9)], Limits()) == ""


def test_what_nobody_has_used_for_too_long_goes_whatever_it_is() -> None:
    candidates = [clean("a", 59), clean("b", 60), clean("c", 61), partial("d", 61), partial("e", 1)]
    assert who(candidates, Limits(max_age=60)) == "cd"


def test_the_least_recently_used_go_until_the_rest_fits() -> None:
    candidates = [clean("a", 1), clean("b", 3), clean("c", 2)]
    assert who(candidates, Limits(max_size=30)) == ""
    assert who(candidates, Limits(max_size=29)) == "b"
    assert who(candidates, Limits(max_size=20)) == "b"
    assert who(candidates, Limits(max_size=19)) == "bc"
    assert who(candidates, Limits(max_size=0)) == "bca"


def test_partials_make_room_after_all_clean_ones() -> None:
    candidates = [partial("a", 99), clean("b", 1), clean("c", 2)]
    assert who(candidates, Limits(max_size=10)) == "cb"
    assert who(candidates, Limits(max_size=9)) == "cba"


def test_what_is_dirty_counts_but_does_not_go() -> None:
    assert who([clean("a", 1), clean("b", 2)], Limits(max_size=100), taken=115) == "ba"
    assert who([clean("a", 1)], Limits(max_size=100), taken=500) == "a"


def test_the_disk_is_kept_free() -> None:
    candidates = [clean("a", 1), clean("b", 2)]
    assert who(candidates, Limits(min_free=100), free=100) == ""
    assert who(candidates, Limits(min_free=100), free=95) == "b"
    assert who(candidates, Limits(min_free=100, max_size=5), free=200) == "ba"


def test_what_age_frees_counts_towards_the_space() -> None:
    candidates = [clean("a", 100, 50), clean("b", 2), clean("c", 1)]
    assert who(candidates, Limits(max_age=60, max_size=20)) == "a"


candidates = st.lists(
    st.builds(
        Candidate,
        st.sampled_from(Kind),
        st.floats(NOW - 100, NOW + 10),  # a clock that was set back
        st.uuids().map(lambda each: each.hex),
        st.integers(0, 50),
    ),
    max_size=30,
    unique_by=lambda each: each.id,
)
limit = st.none() | st.integers(0, 1000)


@given(candidates, st.none() | st.floats(0, 100), limit, limit, st.integers(0, 500), st.integers(0, 1000))
def test_as_few_as_possible_go_and_in_order(
    known: list[Candidate], age: float | None, size: int | None, least: int | None, dirty: int, free: int
) -> None:
    limits = Limits(age, size, least)
    taken = sum(each.size for each in known) + dirty
    going = victims(known, limits, taken=taken, free=free)
    assert len(set(going)) == len(going)
    assert set(going) <= set(known)
    old = [each for each in known if age is not None and NOW - each.used > age]
    assert going[: len(old)] == sorted(old)
    rest = going[len(old) :]
    assert rest == sorted(set(known) - set(old))[: len(rest)]
    freed = sum(each.size for each in going)
    if len(going) < len(known):
        assert limits.excess(taken - freed, free + freed) == 0
    if rest:  # without the last one it would not have been enough
        freed -= rest[-1].size
        assert limits.excess(taken - freed, free + freed) > 0
