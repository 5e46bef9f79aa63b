"""The table of open modes: cache mode x os.O_* flags x existing or not, against rclone's own table of results."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ftpvfs.vfs.openmode import CacheMode, HandleKind, flags_of, handle_kind, is_text, writes
from tests.conftest import Store

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
@pytest.mark.parametrize("kind", ["b", "t", ""])
def test_python_modes_are_those_of_the_system(letters: str, place: str, kind: str) -> None:
    mode = letters + kind if place == "end" else letters[0] + kind + letters[1:]
    assert is_text(mode) is (kind != "b")
    asked = []

    def opener(path: str, flags: int) -> int:
        asked.append(flags)
        return os.open(os.devnull, os.O_RDWR)

    with open("anything", mode, opener=opener, buffering=0 if kind == "b" else -1, encoding=None):
        pass
    assert flags_of(mode) == asked[0] & ~os.O_CLOEXEC


@pytest.mark.parametrize("mode", ["", "b", "t", "rbb", "rtt", "rbt", "wr", "rb ", "rwb", "U"])
def test_other_modes_are_refused_with_those_that_exist(mode: str) -> None:
    with pytest.raises(ValueError, match="write one of"):
        flags_of(mode)


def test_whatever_could_change_the_store_counts_as_writing() -> None:
    for flags in ALL_FLAGS:
        harmless = flags & os.O_ACCMODE == os.O_RDONLY and not flags & (os.O_CREAT | os.O_TRUNC)
        assert writes(flags) is not harmless, oct(flags)


# --- through `VFS.open`, beside the same on a file of Linux: what open says, then what a read, a write and the close
# leave behind.

OLD = b"potato"
NEW = b"hello"


class Outcome(NamedTuple):
    """What became of one open: errno names, or what was read, how much was written, and what is there afterwards."""

    opened: str
    read: bytes | str = ""
    written: int | str = ""
    contents: bytes | None = OLD


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def on_linux(path: Path, flags: int) -> Outcome:
    descriptor = attempt(lambda: os.open(path, flags, 0o600))
    if isinstance(descriptor, str):
        return Outcome(descriptor, contents=path.read_bytes() if path.exists() else None)
    read, written = attempt(lambda: os.read(descriptor, 1)), attempt(lambda: os.write(descriptor, NEW))
    os.close(descriptor)
    return Outcome("", read, written, path.read_bytes())


def on_vfs(vfs: Any, path: str, flags: int) -> Outcome:
    handle = attempt(lambda: vfs.open(path, flags))
    if isinstance(handle, str):
        return Outcome(handle, contents=contents(vfs, path))
    read, written = attempt(lambda: handle.read(1)), attempt(lambda: handle.write(NEW))
    handle.close()
    return Outcome("", read, written, contents(vfs, path))


def contents(vfs: Any, path: str) -> bytes | None:
    try:
        with vfs.open(path, "rb") as handle:
            return bytes(handle.read())
    except FileNotFoundError:
        return None


def difference(mode: CacheMode, flags: int, exists: bool) -> tuple[str, Outcome] | None:
    """Where we differ from Linux on purpose: why, and what is to happen instead."""
    access = flags & os.O_ACCMODE
    untouched = OLD if exists else None
    if access == os.O_RDONLY and flags & os.O_TRUNC:
        return "POSIX leaves it undefined, Linux truncates; rclone and we refuse", Outcome("EINVAL", contents=untouched)
    if mode > CacheMode.OFF:
        return None
    is_made = not exists and bool(flags & os.O_CREAT)
    if access == os.O_RDONLY and is_made:
        return "a streamed file cannot be made by who reads it", Outcome("ENOENT", contents=None)
    is_open = is_made or (exists and not (flags & os.O_CREAT and flags & os.O_EXCL))
    if access == os.O_RDONLY or not is_open:
        return None
    if exists and not flags & os.O_TRUNC:
        return "an object is replaced whole", Outcome("EPERM", contents=OLD)
    if access == os.O_RDWR:
        return "what is on its way to the store cannot be read", Outcome("", "EBADF", len(NEW), NEW)
    return None


@pytest.mark.parametrize("mode", CacheMode)
@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_every_open_does_what_linux_does_but_for_what_the_table_names(
    mode: CacheMode, store: Store, make_vfs: Callable[..., Any], tmp_path: Path
) -> None:
    both = itertools.product(enumerate(ALL_FLAGS), (True, False))
    cases = [(f"{number}-{exists}", flags, exists) for (number, flags), exists in both]
    real = tmp_path / "real"
    real.mkdir()
    for name, _, exists in cases:
        if exists:
            (real / name).write_bytes(OLD)
            store.write(name, OLD)
    options = {} if mode is CacheMode.OFF else {"cache_sync": "off", "write_back": 3600}
    vfs = make_vfs(store, cache_mode=mode.name.lower(), cache_dir=str(tmp_path / "cache"), **options)
    wrong = []
    for name, flags, exists in cases:
        expected = on_linux(real / name, flags)
        known = difference(mode, flags, exists)
        if known is not None:
            assert known[1] != expected, f"no difference any more: {known[0]}"
            expected = known[1]
        got = on_vfs(vfs, name, flags)
        if got != expected:
            wrong.append((oct(flags), exists, got, expected))
    assert not wrong


@pytest.mark.parametrize("mode", [CacheMode.WRITES, CacheMode.FULL])
def test_what_an_open_left_behind_reaches_the_store(
    mode: CacheMode, s3_store: Store, make_vfs: Callable[..., Any], tmp_path: Path
) -> None:
    flags = [os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_WRONLY | os.O_TRUNC, os.O_RDONLY | os.O_CREAT]
    vfs = make_vfs(s3_store, cache_mode=mode.name.lower(), cache_dir=str(tmp_path / "cache"), write_back=3600)
    for number, each in enumerate(flags):
        for name in (f"old-{number}", f"new-{number}"):
            if name.startswith("old"):
                s3_store.write(name, OLD)
            on_vfs(vfs, name, each | os.O_CREAT)
    vfs.sync()
    stored = {name: s3_store.read(name) for name in s3_store.list()}
    assert stored == {
        "new-0": NEW, "new-1": NEW, "new-2": NEW, "new-3": b"",
        "old-0": NEW + OLD[len(NEW) :], "old-1": OLD + NEW, "old-2": NEW, "old-3": OLD,
    }  # fmt: skip
