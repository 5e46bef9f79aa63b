"""Buffers and text around an open file, as Python's `open` puts them there.

Python's own classes close the file below them, which would publish it, also when their `with` block has failed and when
they are merely forgotten. These give it up then, as the file itself does.
"""

from __future__ import annotations

import errno
import io
import os
from types import TracebackType
from typing import Any

from ftpvfs.errors import failure
from ftpvfs.vfs.handle import Handle

# What a buffer holds where its size is not given: Python 3.14's own default.
BUFFER = 128 * 1024


class _OverHandle:
    """What the classes below have in common: a handle that decides whether anything is published."""

    handle: Any

    @property
    def path(self) -> str:
        """The path in the VFS."""
        return str(self.handle.path)

    @property
    def size(self) -> int:
        """Bytes in the file, but for those that are written and still in the buffer."""
        return int(self.handle.size)

    def commit(self) -> None:
        """Publish what was written, whole, and close the file, as `Handle.commit` does. Raises what went wrong."""
        self.flush()
        self.handle.commit()

    def abandon(self) -> None:
        """Close without publishing anything."""
        self.handle.abandon()

    def flush(self) -> None:
        super().flush()  # type: ignore[misc]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish on a clean exit; a block that failed has not finished its file."""
        if kind is not None:
            self.abandon()
        else:
            self.close()

    def close(self) -> None:
        super().close()  # type: ignore[misc]

    def __del__(self) -> None:
        """Do nothing, where Python's own would publish: the handle gives up by itself what was forgotten."""


class FileReader(_OverHandle, io.BufferedReader):
    """A buffer over a file that is read."""

    def __init__(self, handle: Handle, buffer_size: int) -> None:
        super().__init__(handle, buffer_size)
        self.handle = handle


class FileWriter(_OverHandle, io.BufferedWriter):
    """A buffer over a file that is written."""

    # While text is put around an empty file: Python's text begins with its byte order mark only where it can seek.
    is_beginning = False

    def __init__(self, handle: Handle, buffer_size: int) -> None:
        super().__init__(handle, buffer_size)
        self.handle = handle

    def seekable(self) -> bool:
        return self.is_beginning or super().seekable()


class FileUpdater(_OverHandle, io.BufferedRandom):
    """A buffer over a file that is read and written."""

    def __init__(self, handle: Handle, buffer_size: int) -> None:
        super().__init__(handle, buffer_size)
        self.handle = handle


class TextFile(_OverHandle, io.TextIOWrapper):
    """A file of text."""

    def __init__(self, handle: Any, buffer: Any, mode: str, line_buffering: bool, **text: str | None) -> None:
        super().__init__(buffer, line_buffering=line_buffering, **text)  # type: ignore[arg-type]
        self.handle = handle
        self.mode = mode  # type: ignore[misc]


def check_layers(
    buffering: int, encoding: str | None, errors: str | None, newline: str | None, *, is_text: bool
) -> None:
    """Raise ValueError for what cannot be around a file, as `open` does."""
    if buffering < -1:
        raise ValueError(f"buffering is {buffering}; write a size in bytes, 0 for none or -1 for the default")
    if is_text and buffering == 0:
        raise ValueError("text is always buffered; buffering=0 is for modes with a b")
    if not is_text:
        for name, value in (("encoding", encoding), ("errors", errors), ("newline", newline)):
            if value is not None:
                raise ValueError(f"a binary mode takes no {name}; leave out the b for text")


def with_buffer(handle: Handle, flags: int, buffering: int) -> FileReader | FileWriter | FileUpdater:
    """Return the handle with a buffer around it."""
    size = buffering if buffering > 1 else BUFFER
    access = flags & os.O_ACCMODE
    if access == os.O_RDONLY:
        return FileReader(handle, size)
    if access == os.O_WRONLY:
        return FileWriter(handle, size)
    if not handle.readable():
        reason = "Reading and writing one file through a buffer needs --vfs-cache-mode minimal or more"
        raise failure(errno.ESPIPE, handle.path, reason)
    if not handle.seekable():
        raise failure(errno.ESPIPE, handle.path, "Reading and writing through a buffer needs seeking (--no-seek)")
    return FileUpdater(handle, size)


def as_text(
    handle: Handle, flags: int, mode: str, buffering: int, encoding: str | None, errors: str | None, newline: str | None
) -> TextFile:
    """Return the handle as a file of text."""
    text = {"encoding": encoding, "errors": errors, "newline": newline}
    buffer = with_buffer(handle, flags, buffering)
    if not isinstance(buffer, FileWriter):
        return TextFile(handle, buffer, mode, buffering == 1, **text)
    buffer.is_beginning = not buffer.size
    file = TextFile(handle, buffer, mode, buffering == 1, **text)
    buffer.is_beginning = False
    return file
