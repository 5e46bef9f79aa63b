"""Which kind of handle an open gives: cache mode x flags -> kind or errno. Pure; the only place that compares modes.

The rules are rclone's (`vfs/file.go`, `vfs/open_test.go`, and the documentation's section on each mode). Where ours
differ:

- A refusal comes when the file is opened; rclone's streamed writers refuse with the first write or at close (EPERM),
  which FTP would learn after the bytes have been sent.
- O_EXCL refuses a file that exists in every mode, and once more when the new one is published; rclone's streamed
  writers ignore it.
- O_RDONLY with O_CREAT reads a file that exists as any other reader does; rclone opens it for writing in mode off
  (where reading then fails) and through the cache in the others. A missing file is made from mode minimal on, as in
  rclone; in mode off it is ENOENT, since no handle could both read it and leave it behind.
- Mode minimal streams what is written to a new or truncated file with O_APPEND, too (rclone: through the cache), and
  takes a write to an existing file without O_TRUNC through the cache, whole (rclone: EPERM): APPE and STOR after REST
  need it.
- What is dirty is read through the cache in every mode, since the store does not have it yet. What is merely cached is
  read from there in mode full alone (rclone: whatever the mode).

From mode minimal on, all that a read, a write and the close do is then what Linux does for the same flags, but for
O_RDONLY with O_TRUNC, which POSIX leaves undefined: rclone and we refuse it. `tests/test_openmode.py` opens every
combination beside a real file and has the differences in one table.
"""

from __future__ import annotations

import enum
import errno
import os
from typing import Literal

from ftpvfs.errors import failure


class CacheMode(enum.IntEnum):
    """How much goes through the disk; each does all that the one before it does."""

    OFF = 0
    MINIMAL = 1
    WRITES = 2
    FULL = 3


class HandleKind(enum.Enum):
    """The kinds of open file."""

    READ = "streamed from the store"
    WRITE = "streamed to the store, published whole"
    CACHED = "read and written through the cache"


# Python's mode letters as the flags of open(2).
MODES = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "w+": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "a+": os.O_RDWR | os.O_CREAT | os.O_APPEND,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "x+": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}


# The same for who reads types: what opens bytes, and what opens text.
BinaryMode = Literal[
    "rb", "wb", "ab", "xb", "r+b", "w+b", "a+b", "x+b", "rb+", "wb+", "ab+", "xb+"
]  # fmt: skip
TextMode = Literal[
    "r", "w", "a", "x", "r+", "w+", "a+", "x+", "rt", "wt", "at", "xt", "r+t", "w+t", "a+t", "x+t", "rt+", "wt+", "at+",
    "xt+",
]  # fmt: skip


def flags_of(mode: str | int) -> int:
    """Return the `os.O_*` flags of a Python mode string, or the flags themselves. Raises ValueError.

    >>> flags_of("rb") == flags_of("rt") == flags_of("r") == os.O_RDONLY
    True
    """
    if isinstance(mode, int):
        return mode
    letters = mode.replace("b", "", 1) if "b" in mode else mode.replace("t", "", 1)
    if letters not in MODES:
        raise ValueError(f"mode {mode!r}: write one of {', '.join(sorted(MODES))}, with a b behind it for bytes")
    return MODES[letters]


def is_text(mode: str | int) -> bool:
    """Tell whether the mode is for text: a mode string without a b."""
    return isinstance(mode, str) and "b" not in mode


def writes(flags: int) -> bool:
    """Tell whether the flags ask for writing, truncating or creating."""
    return flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & (os.O_TRUNC | os.O_CREAT))


def handle_kind(mode: CacheMode, flags: int, path: str, *, exists: bool, is_dirty: bool = False) -> HandleKind:
    """Return the kind of handle for a file that exists or not; raise what the system would, or the mode's refusal.

    `is_dirty`: the store does not have the file yet, so that it is in the cache whatever the mode.
    """
    access = flags & os.O_ACCMODE
    if access not in {os.O_RDONLY, os.O_WRONLY, os.O_RDWR}:
        raise failure(errno.EPERM, path, "Neither for reading nor for writing")
    if access == os.O_RDONLY and flags & os.O_TRUNC:
        raise failure(errno.EINVAL, path, "Truncating needs write access")
    if not exists and not flags & os.O_CREAT:
        raise failure(errno.ENOENT, path)
    if exists and flags & os.O_CREAT and flags & os.O_EXCL:
        raise failure(errno.EEXIST, path)
    if access == os.O_RDONLY:
        if not exists and mode < CacheMode.MINIMAL:
            raise failure(errno.ENOENT, path)
        return HandleKind.CACHED if mode >= CacheMode.FULL or not exists or is_dirty else HandleKind.READ
    empty = not exists or bool(flags & os.O_TRUNC)
    if access == os.O_WRONLY:
        return _write_only(mode, path, empty=empty)
    return _read_write(mode, path, empty=empty)


def _write_only(mode: CacheMode, path: str, *, empty: bool) -> HandleKind:
    if mode >= CacheMode.WRITES:
        return HandleKind.CACHED
    if empty:
        return HandleKind.WRITE
    if mode >= CacheMode.MINIMAL:
        return HandleKind.CACHED  # the whole file is fetched first, and uploaded at close
    raise failure(errno.EPERM, path, "Changing part of a file needs --vfs-cache-mode minimal or more")


def _read_write(mode: CacheMode, path: str, *, empty: bool) -> HandleKind:
    if mode >= CacheMode.MINIMAL:
        return HandleKind.CACHED
    if empty:
        return HandleKind.WRITE  # as rclone: there is nothing to read yet
    raise failure(errno.EPERM, path, "Reading and writing one file needs --vfs-cache-mode minimal or more")
