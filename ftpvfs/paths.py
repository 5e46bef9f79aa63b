"""The only conversions between an ftp path, a VFS path and an object's key. Pure.

An *ftp path* is what the client says, relative to its home and current folder: `/a/b`. A *path* names the same thing in
the VFS, without a leading slash: `a/b`, the root being `""`. A *key* is the object's name in the store: `prefix/a/b`.
"""

from __future__ import annotations

import errno
import os
import posixpath
import unicodedata

from ftpvfs.errors import failure

# A path as a Python caller may give it.
AnyPath = str | os.PathLike[str]
# What Linux file systems and most object stores bear in one name; S3 and GCS allow 1024 bytes in a whole key. No longer
# name is made; one that a store has all the same is a name like any other.
MAX_NAME_BYTES = 255
# A line break would forge lines in listings and replies, a NUL ends a C string half way (users.md, pyftpdlib's wire).
FORBIDDEN = frozenset("\r\n\0")


def normalize(ftp_path: str, cwd: str = "/") -> str:
    """Return `ftp_path` made absolute against `cwd`, without `.`, `..`, doubled or trailing slashes.

    >>> normalize("../x//y/", "/a/b")
    '/a/x/y'
    >>> normalize("/../../etc")
    '/etc'
    """
    joined = ftp_path if ftp_path.startswith("/") else f"{cwd}/{ftp_path}"
    is_normal = "//" not in joined and "/." not in joined and joined[0] == "/" and joined[-1] != "/"
    if is_normal or joined == "/":  # nearly always
        return joined
    return "/" + posixpath.normpath("/" + joined).lstrip("/")


def means_folder(path: AnyPath) -> bool:
    """Tell whether a path as a user writes it can only be a folder's: it ends in a slash, in `.` or in `..`.

    >>> [means_folder(path) for path in ("a/", "a/.", "", "a", "a/b.")]
    [True, True, True, False, False]
    """
    return os.fspath(path).rpartition("/")[2] in {"", ".", ".."}


def from_ftp(ftp_path: str) -> str:
    """Return the VFS path of an absolute, normalized ftp path.

    >>> from_ftp("/a/b"), from_ftp("/")
    ('a/b', '')
    """
    return ftp_path.strip("/")


def to_ftp(path: str) -> str:
    """Return the absolute ftp path of a VFS path."""
    return "/" + path


def clean(path: AnyPath) -> str:
    """Return `path`, as a Python caller may write it (`/a//b/`), in the VFS's form; EINVAL for line breaks and NULs.

    How long a name is matters to who makes one alone (`is_too_long`).
    """
    path = from_ftp(normalize(os.fspath(path)))
    if not FORBIDDEN.isdisjoint(path):
        raise failure(errno.EINVAL, path, "The name has a line break or NUL in it")
    return path


def is_too_long(name: str) -> bool:
    """Tell whether a name has more bytes than one that is made may have."""
    return len(name) * 4 > MAX_NAME_BYTES and len(encoded(name)) > MAX_NAME_BYTES  # short ones need no encoding


def encoded(name: str) -> bytes:
    """Return the bytes of `name` as they go over the wire; undecodable ones survive both ways."""
    return name.encode("utf-8", "surrogateescape")


def is_listable(name: str) -> bool:
    """Tell whether a name found in a store can be shown: not empty, `.` or `..`, no slash, line break or NUL."""
    return name not in {"", ".", ".."} and "/" not in name and FORBIDDEN.isdisjoint(name)


def split(path: str) -> tuple[str, str]:
    """Return (parent, name): `a/b/c` gives `("a/b", "c")`, the root gives `("", "")`."""
    parent, _, name = path.rpartition("/")
    return parent, name


def join(parent: str, name: str) -> str:
    """Return the path of `name` inside `parent`."""
    return f"{parent}/{name}" if parent else name


def ancestors(path: str) -> list[str]:
    """Return the folders above `path`, nearest first, the root last.

    >>> ancestors("a/b/c")
    ['a/b', 'a', '']
    """
    found = []
    while path:
        path = split(path)[0]
        found.append(path)
    return found


def is_within(path: str, folder: str) -> bool:
    """Tell whether `path` is `folder` or lies below it."""
    return not folder or path == folder or path.startswith(folder + "/")


def rebase(path: str, old: str, new: str) -> str:
    """Return `path`, which lies in `old`, as it is called once `old` is called `new`.

    >>> rebase("a/b/c", "a", "x/y")
    'x/y/b/c'
    """
    return new + path[len(old) :]


def key(root: str, path: str) -> str:
    """Return the store's name of `path` under `root` (bucket, prefix, folder).

    >>> key("bucket/prefix", "a/b"), key("bucket", ""), key("", "a")
    ('bucket/prefix/a/b', 'bucket', 'a')
    """
    if not path:
        return root
    return f"{root.rstrip('/')}/{path}" if root else path


def folded(name: str, *, case: bool, unicode: bool) -> str:
    """Return the form in which two names count as the same: NFC where `unicode`, case folded where `case`."""
    if unicode:
        name = unicodedata.normalize("NFC", name)
    return name.casefold() if case else name
