"""Folders by path, and other spellings of names: what looking at all of them would say, without that."""

from __future__ import annotations

import random
import unicodedata

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ftpvfs import paths
from ftpvfs.vfs.known import FolderMap, Spellings

LETTERS = ("é", "É", "ß", "ss", "K", "\u212a", "a", "A")  # among them the sign for Kelvin, whose NFC is the letter
NAMES = [unicodedata.normalize(form, name) for name in LETTERS for form in ("NFC", "NFD")]


@pytest.mark.parametrize("case", [False, True])
@given(steps=st.lists(st.tuples(st.booleans(), st.sampled_from(NAMES))), asked=st.sampled_from(NAMES))
def test_another_spelling_finds_the_first_name_that_counts_as_the_same(
    case: bool, steps: list[tuple[bool, str]], asked: str
) -> None:
    def fold(name: str) -> str:
        return paths.folded(name, case=case, unicode=True)

    entries = {"a", "é"}
    spellings = Spellings(fold, entries)
    for is_added, name in steps:
        (entries.add if is_added else entries.discard)(name)
        (spellings.add if is_added else spellings.discard)(name)
    expected = min((name for name in entries if fold(name) == fold(asked)), default=None)
    assert spellings.find(asked, entries) == expected


@pytest.mark.parametrize("seed", range(20))
def test_a_folder_goes_with_all_below_it_and_nothing_else(seed: int) -> None:
    chance = random.Random(seed)
    folders = ["", "a", "ab", "a/b", "a/b/c", "a/bc", "a/b/c/d", "x/y/z"]
    kept: FolderMap[int] = FolderMap()
    known: dict[str, int] = {}
    for number in range(300):
        path = chance.choice(folders)
        step = chance.choice(["add", "add", "drop", "drop below", "drop all"])
        if step == "add":
            kept.add(path, number)
            known[path] = number
        elif step == "drop":
            kept.drop(path)
            known.pop(path, None)
        else:
            path = path if step == "drop below" else ""
            kept.drop_below(path)
            known = {each: value for each, value in known.items() if not paths.is_within(each, path)}
        assert dict(kept.items()) == known
        assert len(kept) == len(known)
    kept.drop_below("")
    for path in folders:
        assert path not in kept


def test_all_have_their_turn_to_be_looked_at() -> None:
    kept: FolderMap[int] = FolderMap()
    for number in range(10):
        kept.add(f"{number}", number)
    assert {path for _ in range(5) for path, _ in kept.oldest(2)} == {f"{number}" for number in range(10)}
