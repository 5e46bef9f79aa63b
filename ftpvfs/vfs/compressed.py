"""A compressor, fsspec's own, around an open file of a VFS."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from types import TracebackType
from typing import Any


class CompressedFile(io.BufferedIOBase):
    """The bytes of `file` as `codec(file, mode=...)` reads or writes them.

    A codec by itself leaves the file below it open. Closing this one closes both, which publishes what was written; a
    `with` block that fails, and a file that is forgotten, publish nothing.
    """

    def __init__(self, file: Any, codec: Callable[..., Any], mode: str) -> None:
        self._file = file
        self.mode = mode
        self._codec = codec(file, mode=mode[0])

    @property
    def path(self) -> str:
        """The path in the VFS."""
        return str(self._file.path)

    def readable(self) -> bool:
        return self.mode[0] == "r"

    def writable(self) -> bool:
        return not self.readable()

    def seekable(self) -> bool:
        return self.readable() and bool(self._codec.seekable())

    def read(self, size: int | None = -1) -> bytes:
        return bytes(self._codec.read(-1 if size is None else size))

    def read1(self, size: int = -1) -> bytes:
        return self.read(io.DEFAULT_BUFFER_SIZE if size < 0 else size)

    def write(self, data: Any) -> int:
        return int(self._codec.write(data))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._codec.seek(offset, whence))

    def tell(self) -> int:
        return int(self._codec.tell())

    def close(self) -> None:
        """Write what the codec has kept back, and close the file. Raises what went wrong; nothing is published then."""
        if self.closed:
            return
        try:
            self._codec.close()
            self._file.close()
        except BaseException:
            self._file.abandon()
            raise
        finally:
            super().close()

    def abandon(self) -> None:
        """Close without publishing anything."""
        if self.closed:
            return
        self._file.abandon()
        with contextlib.suppress(OSError, ValueError):  # it cannot write its last bytes any more
            self._codec.close()
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
        else:
            self.close()

    def __del__(self) -> None:
        self.abandon()
