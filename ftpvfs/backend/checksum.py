"""What a store says the bytes of a whole object hash to, and the hashing of what came of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol


class Hasher(Protocol):
    """Hashes bytes that come in order. One thread at a time."""

    def update(self, data: bytes | memoryview) -> None:
        """Hash more bytes, without the interpreter's lock where there are many."""

    def digest(self) -> bytes:
        """Return the hash of all bytes so far."""


@dataclass(frozen=True)
class Checksum:
    """The hash of a whole object: `md5` or `crc32c`; with `part`, the MD5 of the MD5s of its parts of so many bytes."""

    algorithm: str
    digest: bytes
    part: int | None = None

    def hasher(self) -> Hasher:
        """Return a new hasher whose digest, after all bytes, is to be `digest`."""
        if self.part is not None:
            return _PartsHasher(self.part)
        if self.algorithm == "crc32c":
            return _crc32c()
        return _md5()

    def matches(self, data: list[bytes]) -> bool:
        """Tell whether `data` is the whole object."""
        hasher = self.hasher()
        for piece in data:
            hasher.update(piece)
        return hasher.digest() == self.digest


class _PartsHasher:
    """S3's ETag of an object that was uploaded in parts, all of one length but the last."""

    def __init__(self, part: int) -> None:
        self._part = part
        self._digests: list[bytes] = []
        self._current: Hasher = _md5()
        self._filled = 0

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            taken = view[: self._part - self._filled]
            self._current.update(taken)
            self._filled += len(taken)
            if self._filled == self._part:
                self._digests.append(self._current.digest())
                self._current, self._filled = _md5(), 0
            view = view[len(taken) :]

    def digest(self) -> bytes:
        last = [self._current.digest()] if self._filled else []
        whole = _md5()
        whole.update(b"".join(self._digests + last))
        return whole.digest()


def _md5() -> Hasher:
    return hashlib.md5(usedforsecurity=False)


def _crc32c() -> Hasher:
    import google_crc32c  # GCS alone has it

    hasher: Any = google_crc32c.Checksum
    return hasher()  # type: ignore[no-any-return]
