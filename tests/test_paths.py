"""Names on their way between the client, the VFS and the store. Pure, so tables and properties are enough."""

from __future__ import annotations

import doctest
import errno
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftpvfs import paths

names = st.text(st.characters(blacklist_characters="/\0\r\n"), min_size=1, max_size=20).filter(
    lambda name: name not in {".", ".."}
)
vfs_paths = st.lists(names, max_size=5).map("/".join)


def test_the_examples_in_the_text_are_true() -> None:
    assert doctest.testmod(paths).failed == 0


@pytest.mark.parametrize(
    ("ftp_path", "cwd", "expected"),
    [
        ("", "/", "/"),
        ("", "/a", "/a"),
        (".", "/a", "/a"),
        ("..", "/a/b", "/a"),
        ("../../../..", "/a/b", "/"),
        ("/../../etc/passwd", "/a", "/etc/passwd"),
        ("a/../../b", "/x", "/b"),
        ("//a///b//", "/x", "/a/b"),
        ("//", "/x", "/"),
        ("a b", "/", "/a b"),
        ("..a", "/", "/..a"),
        ("...", "/", "/..."),
        ("a\\..\\b", "/", "/a\\..\\b"),
        ("-la", "/", "/-la"),
        ("~", "/home", "/home/~"),
    ],
)
def test_a_clients_path_is_made_absolute_and_never_leaves_the_root(ftp_path: str, cwd: str, expected: str) -> None:
    assert paths.normalize(ftp_path, cwd) == expected


@given(st.text(max_size=40), vfs_paths)
def test_whatever_a_client_says_stays_below_the_root(said: str, cwd: str) -> None:
    found = paths.normalize(said, "/" + cwd)

    assert found.startswith("/")
    assert not found.startswith("//")
    assert ".." not in found.split("/")
    assert paths.normalize(found) == found


@given(vfs_paths)
def test_a_path_goes_to_the_client_and_back(path: str) -> None:
    assert paths.from_ftp(paths.to_ftp(path)) == path
    assert paths.clean(path) == path


@given(vfs_paths, names)
def test_split_undoes_join(parent: str, name: str) -> None:
    path = paths.join(parent, name)

    assert paths.split(path) == (parent, name)
    assert paths.is_within(path, parent)
    assert paths.ancestors(path)[0] == parent
    assert paths.ancestors(path)[-1] == ""


@given(vfs_paths, names, names)
def test_rebase_there_and_back_changes_nothing(folder: str, name: str, new: str) -> None:
    path = paths.join(paths.join(folder, name), "below")
    old = paths.join(folder, name)

    moved = paths.rebase(path, old, new)
    assert moved == f"{new}/below"
    assert paths.rebase(moved, new, old) == path


@pytest.mark.parametrize(
    ("path", "folder", "within"),
    [
        ("a", "", True),
        ("a", "a", True),
        ("a/b", "a", True),
        ("ab", "a", False),
        ("a", "a/b", False),
        ("", "", True),
        ("", "a", False),
    ],
)
def test_is_within(path: str, folder: str, within: bool) -> None:
    assert paths.is_within(path, folder) is within


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b", "x/y\n"])
def test_names_that_would_forge_a_line_are_refused(bad: str) -> None:
    with pytest.raises(OSError, check=lambda error: error.errno == errno.EINVAL):
        paths.clean(bad)


@pytest.mark.parametrize(
    ("name", "is_good"),
    [
        ("x" * 255, True), ("x" * 256, False), ("ü" * 127, True), ("ü" * 128, False), ("🙂" * 63, True),
        ("🙂" * 64, False),
    ],
)
def test_no_name_of_more_than_255_bytes_is_made(name: str, is_good: bool) -> None:
    assert paths.clean(f"a/{name}") == f"a/{name}"  # what a store has is found all the same
    assert paths.is_too_long(name) != is_good


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/", True), ("a//", True), ("a/.", True), ("a/..", True), (".", True),
        ("a", False), ("a.", False), ("a/.b", False),
    ],
)
def test_what_can_only_be_a_folder(path: str, expected: bool) -> None:
    assert paths.means_folder(path) == expected


def test_long_paths_of_short_names_are_good() -> None:
    path = "/".join(["name"] * 200)
    assert paths.clean(path) == path


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "a\rb", "a\0b"])
def test_names_that_cannot_be_shown(name: str) -> None:
    assert not paths.is_listable(name)


@pytest.mark.parametrize("name", ["a", "...", ".a", "a b", "-x", "a\\b", "a\tb", "ü", "🙂", "caf\udce9", "x" * 255])
def test_names_that_can_be_shown(name: str) -> None:
    assert paths.is_listable(name)


def test_bytes_that_are_no_text_survive() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")

    assert paths.encoded(name) == b"caf\xe9"
    assert paths.clean(name) == name


@pytest.mark.parametrize(
    ("root", "path", "key"),
    [
        ("bucket/prefix", "a/b", "bucket/prefix/a/b"),
        ("bucket", "", "bucket"),
        ("", "a", "a"),
        ("", "", ""),
        ("/", "a", "/a"),
        ("/folder/", "a", "/folder/a"),
    ],
)
def test_keys(root: str, path: str, key: str) -> None:
    assert paths.key(root, path) == key


def test_names_that_count_as_the_same() -> None:
    nfd = unicodedata.normalize("NFD", "É")

    assert paths.folded(nfd, case=False, unicode=True) == paths.folded("É", case=False, unicode=True)
    assert paths.folded(nfd, case=False, unicode=False) != "É"
    assert paths.folded("ÉA", case=True, unicode=True) == paths.folded("éa", case=True, unicode=True)
    assert paths.folded("A", case=False, unicode=True) != paths.folded("a", case=False, unicode=True)
