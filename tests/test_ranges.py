"""Range sets against sets of integers: every operation on every small set, and long runs of random ones."""

from __future__ import annotations

import doctest
import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ftpvfs.cache import ranges
from ftpvfs.cache.ranges import RangeSet

# All subsets of so many offsets are tried: 2 ** 7 sets times 36 ranges.
OFFSETS = 7
RANGES = [(start, stop) for start in range(OFFSETS + 1) for stop in range(start, OFFSETS + 1)]
SUBSETS = [set(itertools.compress(range(OFFSETS), bits)) for bits in itertools.product((0, 1), repeat=OFFSETS)]


def of(offsets: set[int]) -> RangeSet:
    found = RangeSet((offset, offset + 1) for offset in offsets)
    check(found, offsets)
    return found


def check(found: RangeSet, offsets: set[int]) -> None:
    """Compare with the offsets, and look that the ranges are as few as possible and in order."""
    known = list(found)
    assert {offset for start, stop in known for offset in range(start, stop)} == offsets
    assert all(start < stop for start, stop in known)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(known))
    assert found.total == len(offsets)
    assert len(found) == len(known)


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_every_range_in_every_small_set(start: int, stop: int) -> None:
    wanted = set(range(start, stop))
    for offsets in SUBSETS:
        found = of(offsets)
        missing = {offset for piece in found.missing(start, stop) for offset in range(*piece)}
        assert missing == wanted - offsets
        assert found.covers(start, stop) == (wanted <= offsets)
        assert found.contiguous(start) == len(list(itertools.takewhile(offsets.__contains__, itertools.count(start))))
        grown, shrunk = found.copy(), found.copy()
        grown.add(start, stop)
        check(grown, offsets | wanted)
        shrunk.remove(start, stop)
        check(shrunk, offsets - wanted)
        check(found, offsets)
        assert (grown == found) == (wanted <= offsets)
        assert (shrunk == found) == (not wanted & offsets)


changes = st.lists(st.tuples(st.booleans(), st.integers(0, 300), st.integers(0, 60)), max_size=60)


@settings(deadline=None)
@given(changes)
def test_any_sequence_of_changes_gives_the_same_as_on_a_set_of_offsets(steps: list[tuple[bool, int, int]]) -> None:
    found, offsets = RangeSet(), set[int]()
    for is_added, start, length in steps:
        touched = set(range(start, start + length))
        if is_added:
            found.add(start, start + length)
            offsets |= touched
        else:
            found.remove(start, start + length)
            offsets -= touched
        check(found, offsets)
        missing = [offset for piece in found.missing(start, 400) for offset in range(*piece)]
        assert missing == [offset for offset in range(start, 400) if offset not in offsets]
    assert RangeSet(found) == found


def test_large_numbers_cost_nothing() -> None:
    found = RangeSet([(0, 2**62)])
    found.remove(2**40, 2**40 + 1)
    assert found.missing(0, 2**62) == [(2**40, 2**40 + 1)]


def test_a_set_is_only_equal_to_a_set() -> None:
    assert RangeSet([(0, 1)]) != [(0, 1)]
    assert repr(RangeSet([(0, 1)])) == "RangeSet([(0, 1)])"
    with pytest.raises(TypeError):
        hash(RangeSet())


def test_the_examples() -> None:
    assert doctest.testmod(ranges).failed == 0
