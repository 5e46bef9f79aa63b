"""What a directory cache keeps: the folders that are known, and the other spellings of the names in each.

Neither has a lock of its own. No operation takes longer the more is known, but in proportion to what it drops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Generic, TypeVar

from ftpvfs import paths

T = TypeVar("T")

# Folders of a map dropped as a whole whose memory is given back at once; the others follow with the next calls.
RELEASED_AT_ONCE = 16


class Spellings:
    """The names of one folder that another spelling may mean. Kept in step with the folder's entries, name by name.

    Only names are kept that `fold` changes; the others are found in the entries themselves.
    """

    def __init__(self, fold: Callable[[str], str], names: Iterable[str]) -> None:
        self._fold = fold
        self._names: dict[str, set[str]] = {}
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """Note a name that is in the folder now."""
        folded = self._fold(name)
        if folded != name:
            self._names.setdefault(folded, set()).add(name)

    def discard(self, name: str) -> None:
        """Note that a name is in the folder no more."""
        folded = self._fold(name)
        names = self._names.get(folded)
        if names is not None:
            names.discard(name)
            if not names:
                del self._names[folded]

    def find(self, name: str, entries: Collection[str]) -> str | None:
        """Return the first of the folder's `entries` that counts as the same name; None where none does."""
        folded = self._fold(name)
        names = set(self._names.get(folded, ()))
        if folded in entries and self._fold(folded) == folded:
            names.add(folded)
        return min(names, default=None)


class FolderMap(Generic[T]):
    """Something for each of many folders, by path; what is at and below one is dropped without a look at the others."""

    def __init__(self) -> None:
        self._known: dict[str, T] = {}
        # Folders in which others lie that are known, or lead to such, and those folders.
        self._inside: dict[str, set[str]] = {}
        # What was dropped as a whole and is still to be released.
        self._dropped: deque[dict[str, Any]] = deque()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, path: str) -> bool:
        return path in self._known

    def get(self, path: str) -> T | None:
        """Return what is kept for a folder."""
        return self._known.get(path)

    def items(self) -> list[tuple[str, T]]:
        """Return all at this moment."""
        return list(self._known.items())

    def add(self, path: str, kept: T) -> None:
        """Keep something for a folder."""
        self.release(RELEASED_AT_ONCE)
        self._known[path] = kept
        while path:
            parent = paths.split(path)[0]
            inside = self._inside.setdefault(parent, set())
            if path in inside:
                return
            inside.add(path)
            path = parent

    def drop(self, path: str) -> None:
        """Keep nothing for a folder any more."""
        self._known.pop(path, None)
        self._prune(path)

    def drop_below(self, path: str) -> None:
        """Keep nothing for a folder and those in it any more, however deep."""
        if not path:
            self._drop_all()
            return
        folders = [path]
        while folders:
            folder = folders.pop()
            self._known.pop(folder, None)
            folders.extend(self._inside.pop(folder, ()))
        self._prune(path)

    def _drop_all(self) -> None:
        """Drop a whole cache, which takes a while, little by little."""
        self._dropped.extend((self._known, self._inside))
        self._known, self._inside = {}, {}
        self.release(RELEASED_AT_ONCE)

    def release(self, count: int) -> None:
        """Give back the memory of some folders that were dropped."""
        while self._dropped and count > 0:
            if not self._dropped[0]:
                self._dropped.popleft()
                continue
            self._dropped[0].popitem()
            count -= 1

    def oldest(self, count: int) -> Iterator[tuple[str, T]]:
        """Yield some, each time others, until all had their turn."""
        for _ in range(min(count, len(self._known))):
            path = next(iter(self._known))
            kept = self._known[path] = self._known.pop(path)
            yield path, kept

    def _prune(self, path: str) -> None:
        """Forget a folder that leads to no known one, and those above it."""
        while path and path not in self._known and path not in self._inside:
            parent = paths.split(path)[0]
            inside = self._inside.get(parent)
            if inside is None:
                return
            inside.discard(path)
            if inside:
                return
            del self._inside[parent]
            path = parent
