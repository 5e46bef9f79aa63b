"""The table of open modes: cache mode x os.O_* flags x existing or not, against rclone's own table of results."""

from __future__ import annotations

import errno
import itertools
import os

import pytest

from ftpvfs.vfs.openmode import CacheMode, HandleKind, flags_of, handle_kind, writes

ACCESS = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)
EXTRAS = (os.O_APPEND, os.O_CREAT, os.O_EXCL, os.O_SYNC, os.O_TRUNC)
ALL_FLAGS = [
    access | sum(chosen)
    for access in ACCESS
    for count in range(len(EXTRAS) + 1)
    for chosen in itertools.combinations(EXTRAS, count)
]

# rclone's vfs/open_test.go: what its OpenFile says to each combination, for a missing file and for one that exists.
# Rows that differ in O_SYNC and O_APPEND alone say the same there, and so share a line here.
RCLONE = """
O_RDONLY                        ENOENT -
O_RDONLY|O_TRUNC                EINVAL EINVAL
O_RDONLY|O_EXCL                 ENOENT -
O_RDONLY|O_EXCL|O_TRUNC         EINVAL EINVAL
O_RDONLY|O_CREAT                -      -
O_RDONLY|O_CREAT|O_TRUNC        EINVAL EINVAL
O_RDONLY|O_CREAT|O_EXCL         -      EEXIST
O_RDONLY|O_CREAT|O_EXCL|O_TRUNC EINVAL EINVAL
O_WRONLY                        ENOENT -
O_WRONLY|O_TRUNC                ENOENT -
O_WRONLY|O_EXCL                 ENOENT -
O_WRONLY|O_EXCL|O_TRUNC         ENOENT -
O_WRONLY|O_CREAT                -      -
O_WRONLY|O_CREAT|O_TRUNC        -      -
O_WRONLY|O_CREAT|O_EXCL         -      EEXIST
O_WRONLY|O_CREAT|O_EXCL|O_TRUNC -      EEXIST
O_RDWR                          ENOENT -
O_RDWR|O_TRUNC                  ENOENT -
O_RDWR|O_EXCL                   ENOENT -
O_RDWR|O_EXCL|O_TRUNC           ENOENT -
O_RDWR|O_CREAT                  -      -
O_RDWR|O_CREAT|O_TRUNC          -      -
O_RDWR|O_CREAT|O_EXCL           -      EEXIST
O_RDWR|O_CREAT|O_EXCL|O_TRUNC   -      EEXIST
"""


def rclone_says() -> dict[tuple[int, bool], str | None]:
    table = {}
    for line in RCLONE.split("\n")[1:-1]:
        names, missing, existing = line.split()
        flags = sum(getattr(os, name) for name in names.split("|"))
        for extra in (0, os.O_SYNC, os.O_APPEND, os.O_SYNC | os.O_APPEND):
            for exists, answer in ((False, missing), (True, existing)):
                table[flags | extra, exists] = None if answer == "-" else answer
    return table


def outcome(mode: CacheMode, flags: int, exists: bool) -> HandleKind | str:
    try:
        return handle_kind(mode, flags, "a", exists=exists)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def test_the_table_is_complete() -> None:
    assert len(ALL_FLAGS) == 96
    assert set(rclone_says()) == set(itertools.product(ALL_FLAGS, (False, True)))


@pytest.mark.parametrize("mode", [CacheMode.WRITES, CacheMode.FULL])
def test_with_a_cache_opening_says_what_rclone_says(mode: CacheMode) -> None:
    for (flags, exists), expected in rclone_says().items():
        got = outcome(mode, flags, exists)
        assert (got if isinstance(got, str) else None) == expected, (oct(flags), exists)


@pytest.mark.parametrize("mode", CacheMode)
def test_every_combination_is_as_the_design_says(mode: CacheMode) -> None:
    for (flags, exists), says in rclone_says().items():
        assert outcome(mode, flags, exists) == (says or expected(mode, flags, exists)), (oct(flags), exists)


def expected(mode: CacheMode, flags: int, exists: bool) -> HandleKind | str:
    """The design's table (section 4) for what rclone does not refuse, said once more in another way."""
    access = flags & os.O_ACCMODE
    replaces = not exists or bool(flags & os.O_TRUNC)
    if access == os.O_RDONLY and exists:
        return HandleKind.CACHED if mode is CacheMode.FULL else HandleKind.READ
    if access == os.O_RDONLY:  # created, to be read
        return "ENOENT" if mode is CacheMode.OFF else HandleKind.CACHED
    if mode >= CacheMode.WRITES:
        return HandleKind.CACHED
    if mode is CacheMode.MINIMAL:
        return HandleKind.WRITE if access == os.O_WRONLY and replaces else HandleKind.CACHED
    return HandleKind.WRITE if replaces else "EPERM"


def test_a_refusal_of_the_mode_names_the_flag_that_would_allow_it() -> None:
    for flags in (os.O_WRONLY, os.O_WRONLY | os.O_APPEND, os.O_RDWR):
        with pytest.raises(PermissionError, match="--vfs-cache-mode"):
            handle_kind(CacheMode.OFF, flags, "a", exists=True)


@pytest.mark.parametrize("mode", CacheMode)
def test_neither_reading_nor_writing_is_refused(mode: CacheMode) -> None:
    assert outcome(mode, os.O_ACCMODE, True) == "EPERM"


@pytest.mark.parametrize("letters", ["r", "r+", "w", "w+", "a", "a+", "x", "x+"])
@pytest.mark.parametrize("place", ["end", "middle"])
def test_python_modes_are_those_of_the_system(letters: str, place: str) -> None:
    mode = letters + "b" if place == "end" else letters[0] + "b" + letters[1:]
    asked = []

    def opener(path: str, flags: int) -> int:
        asked.append(flags)
        return os.open(os.devnull, os.O_RDWR)

    with open("anything", mode, opener=opener, buffering=0):
        pass
    assert flags_of(mode) == asked[0] & ~os.O_CLOEXEC


@pytest.mark.parametrize("mode", ["", "r", "w", "b", "rt", "rbb", "wr", "rb ", "rwb", "U"])
def test_other_modes_are_refused_with_those_that_exist(mode: str) -> None:
    with pytest.raises(ValueError, match="write one of"):
        flags_of(mode)


def test_whatever_could_change_the_store_counts_as_writing() -> None:
    for flags in ALL_FLAGS:
        harmless = flags & os.O_ACCMODE == os.O_RDONLY and not flags & (os.O_CREAT | os.O_TRUNC)
        assert writes(flags) is not harmless, oct(flags)
