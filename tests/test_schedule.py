"""When each path is due: what a dictionary and a search would say, for less."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from ftpvfs.cache.schedule import SPARE, Schedule

paths = st.sampled_from("abcdef")
times = st.integers(0, 20).map(float)
steps = st.lists(st.one_of(st.tuples(st.just("set"), paths, st.none() | times), st.tuples(st.just("take"), times)))


@given(st.dictionaries(paths, times), steps)
def test_the_earliest_is_next_whatever_was_moved(known: dict[str, float], steps: list[tuple[str, ...]]) -> None:
    schedule = Schedule(known)
    for kind, *arguments in steps:
        if kind == "set":
            path, due = arguments
            schedule.set(path, due)  # type: ignore[arg-type]
            known.pop(path, None)
            if due is not None:
                known[path] = due  # type: ignore[assignment]
        else:
            (now,) = arguments
            first = min(((due, path) for path, due in known.items() if due <= now), default=None)  # type: ignore[operator]
            assert schedule.take(now) == (None if first is None else first[1])  # type: ignore[arg-type]
            if first is not None:
                del known[first[1]]
        assert schedule.next_due() == min(known.values(), default=None)
        assert len(schedule) == len(known)


def test_what_is_moved_for_ever_takes_no_more_memory() -> None:
    schedule = Schedule({"a": 1.0})
    for number in range(10_000):
        schedule.set("b", float(number))
    assert len(schedule._heap) <= 2 * len(schedule) + SPARE  # noqa: SLF001 - no other way to see it
