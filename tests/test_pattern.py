"""Patterns of names: what fnmatch says, in bounded time."""

from __future__ import annotations

import doctest
import fnmatch
import random
import time

import pytest

from ftpvfs import pattern
from ftpvfs.pattern import Pattern, is_pattern


def test_the_examples_in_the_text_are_true() -> None:
    assert doctest.testmod(pattern).failed == 0


@pytest.mark.parametrize(
    ("text", "matching", "others"),
    [
        ("*.csv", ["a.csv", ".csv", "a.csv.csv"], ["a.csv2", "csv", "a.CSV"]),
        ("", [""], ["a"]),
        ("*", ["", "a"], []),
        ("?", ["a", "\N{SNOWMAN}"], ["", "ab"]),
        ("a*b*c", ["abc", "aabbcc", "abcbc"], ["ab", "acb", "abcd"]),
        ("*ab*ab*", ["abab", "xabxabx"], ["ab", "aba", "abba"]),
        ("aa*aa", ["aaaa", "aa aa"], ["aaa", "aa"]),
        ("[!a-c]x", ["dx", "-x"], ["ax", "bx", "x"]),
        ("[]]", ["]"], ["[", "[]]"]),
        ("[a-]", ["a", "-"], ["b"]),
        ("[ab", ["[ab"], ["a"]),
        ("[z-a]", [], ["a", "m", "z", ""]),
        ("*[0-9]?.*", ["a1b.x", "11."], ["a1.x"]),
    ],
)
def test_what_matches(text: str, matching: list[str], others: list[str]) -> None:
    assert Pattern(text).filter([*matching, *others]) == matching


@pytest.mark.parametrize("seed", range(5))
def test_the_same_matches_as_with_fnmatch(seed: int) -> None:
    random_ = random.Random(seed)
    for _ in range(2000):
        text = "".join(random_.choices("aab*?c[!]", k=random_.randrange(9)))
        name = "".join(random_.choices("aabc!", k=random_.randrange(8)))
        assert Pattern(text).matches(name) == fnmatch.fnmatchcase(name, text), (text, name)


def test_the_worst_pattern_for_a_name_takes_no_time_worth_telling() -> None:
    begun = time.process_time()
    for text in ("*a" * 2000 + "b", "*a?" * 1300 + "b", "[a-b]*" * 800 + "b", "*" * 4000 + "b", "?" * 4000, "[" * 4000):
        for name in ("a" * 255, "a" * 1024, "ab" * 500):
            Pattern(text).matches(name)
    assert time.process_time() - begun < 10  # the time of this process; seconds are what a backtracking one would need


def test_what_is_a_pattern() -> None:
    assert list(filter(is_pattern, ["a.csv", "*", "a?", "[a", "a]", ""])) == ["*", "a?", "[a"]
