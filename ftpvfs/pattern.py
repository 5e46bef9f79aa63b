"""Patterns of names as shells write them (`*.csv`), matched in time and memory bounded by their lengths. Pure.

fnmatch makes a regular expression of each pattern and keeps thousands of them; here it is the clients that choose them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class _Set:
    """`[a-z]`, `[!abc]`: one character of these, or none of them."""

    ranges: tuple[tuple[str, str], ...]
    is_negated: bool

    def matches(self, character: str) -> bool:
        return self.is_negated != any(first <= character <= last for first, last in self.ranges)


# One character of a name: that very one, any (None), or one of a set.
_Token = str | _Set | None


class _Run:
    """What stands between two stars: it matches as many characters as it has tokens."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self.length = len(tokens)
        # The text that it is, where it is one.
        self._text = "".join(token for token in tokens if isinstance(token, str))
        self._is_text = len(self._text) == len(tokens)

    def matches_at(self, name: str, start: int) -> bool:
        """Tell whether the run matches the name's characters from `start` on; there have to be enough."""
        if self._is_text:
            return name.startswith(self._text, start)
        return all(
            token is None or (token == name[place] if isinstance(token, str) else token.matches(name[place]))
            for place, token in enumerate(self._tokens, start)
        )

    def find(self, name: str, start: int, stop: int) -> int:
        """Return the first place at or after `start` where the run matches within name[:stop], -1 for none."""
        if self._is_text:
            return name.find(self._text, start, stop)
        places = range(start, stop - self.length + 1)
        return next((place for place in places if self.matches_at(name, place)), -1)


class Pattern:
    """`*` stands for any characters, `?` for one, `[abc]`, `[a-z]` and `[!abc]` for one of a set; case matters.

    >>> [name for name in ("a.csv", "b.txt", "a.CSV") if Pattern("[a-c].*v").matches(name)]
    ['a.csv']
    """

    def __init__(self, text: str) -> None:
        runs: list[list[_Token]] = [[]]
        for token in _tokens(text):
            if token == "**":
                runs.append([])
            else:
                runs[-1].append(token)
        self._first, *others = map(_Run, runs)
        self._last = others.pop() if others else None
        self._middle = others

    def matches(self, name: str) -> bool:
        """Tell whether the whole name matches.

        Each run is taken at its first place: what is left of the name for those behind it is then the most.
        """
        first, last = self._first, self._last
        if last is None:
            return len(name) == first.length and first.matches_at(name, 0)
        place, stop = first.length, len(name) - last.length
        if place > stop or not first.matches_at(name, 0) or not last.matches_at(name, stop):
            return False
        for run in self._middle:
            place = run.find(name, place, stop)
            if place < 0:
                return False
            place += run.length
        return True

    def filter(self, names: Iterable[str]) -> list[str]:
        """Return the names that match, in their order."""
        return [name for name in names if self.matches(name)]


def is_pattern(text: str) -> bool:
    """Tell whether a text has characters in it that mean something in a pattern."""
    return not MAGIC.isdisjoint(text)


def _tokens(text: str) -> Iterator[_Token]:
    """Yield a token for each character of a name; "**" stands for a star."""
    place = 0
    while place < len(text):
        character = text[place]
        place += 1
        if character == "*":
            yield "**"
        elif character == "?":
            yield None
        elif character == "[" and (end := _end_of_set(text, place)) >= 0:
            yield _set(text[place:end])
            place = end + 1
        else:
            yield character


def _end_of_set(text: str, start: int) -> int:
    """Return where the set's closing bracket is, -1 where there is none; one right at the start is in the set."""
    start += text.startswith("!", start)
    return text.find("]", start + 1)


def _set(text: str) -> _Set:
    is_negated = text.startswith("!")
    members = text[is_negated:]
    ranges = []
    place = 0
    while place < len(members):
        is_range = members[place + 1 : place + 2] == "-" and place + 2 < len(members)
        ranges.append((members[place], members[place + 2 if is_range else place]))
        place += 3 if is_range else 1
    return _Set(tuple(ranges), is_negated)
