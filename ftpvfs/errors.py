"""Failures as the operating system names them: each that leaves the VFS is an OSError with an errno and a path.

`OSError` itself picks the subclass (`FileNotFoundError` for ENOENT, ...), so callers may catch either.
"""

from __future__ import annotations

import errno
import os

# macOS has no ENOTSUP/EOPNOTSUPP distinction and some systems lack EREMOTEIO: one name each for what we mean.
EUNSUPPORTED = errno.EOPNOTSUPP
ECHANGED = errno.ESTALE
# The cache has all that it may hold, and write-back makes room: that passes, unlike a disk's ENOSPC or EDQUOT, and no
# disk says it of a file.
EFULL = errno.ENOBUFS
# The store itself is not there: no such bucket, container or root folder. ENOENT says that of a path inside it.
ENOSTORE = errno.ENXIO
# What keeps a store from answering; what is cached is as good as an answer then.
AWAY = frozenset({
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EBUSY,
    errno.EIO,
})  # fmt: skip
# What a store says of a version which it does not have any more; EINVAL: a range behind the end of a shorter one.
GONE = frozenset({ECHANGED, errno.ENOENT, errno.EINVAL})


def failure(code: int, path: str, reason: str | None = None) -> OSError:
    """Return (not raise) the OSError for `code` at `path`; `reason` replaces the system's text for the code."""
    return OSError(code, reason or os.strerror(code), path)


def reason_of(error: OSError) -> str:
    """Return what went wrong, without the errno and the path that `str(error)` carries."""
    if error.strerror:
        return error.strerror
    if error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
