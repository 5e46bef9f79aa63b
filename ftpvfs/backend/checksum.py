"""What a store says the bytes of a whole object hash to, and the hashing of what came of it."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ftpvfs.waiting import Wait, about_to_wait

if TYPE_CHECKING:
    from ftpvfs.backend.backend import Backend, Entry

logger = logging.getLogger(__name__)


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


class Expected:
    """What one version of an object should hash to. Any thread.

    Where the store has no hash, or does not answer when it is asked, every byte is taken for right.
    """

    def __init__(self, backend: Backend, path: str, entry: Entry) -> None:
        self._backend = backend
        self._path = path
        self._entry = entry
        self._lock = threading.Lock()
        # What is known without a question, or the store's own answer once it was taken: every thread finds the same.
        self._known = backend.checksum(entry)
        # Protected by _lock: the store is asked once.
        self._answer: Future[Checksum | None] | None = None

    def begin(self, call: Callable[[], object]) -> None:
        """Make `call` once `known` says all that can be known; the store is asked where it is not known yet."""
        if self._known is not None or not self._entry.size:
            call()
        else:
            self._ask().add_done_callback(lambda _: call())

    def cancel(self) -> None:
        """Stop waiting for the store's answer."""
        if self._answer is not None:
            self._answer.cancel()

    @property
    def known(self) -> Checksum | None:
        """The hash, as far as it is known by now; nothing is waited for."""
        answer = self._answer
        if self._known is None and answer is not None and answer.done():
            self._known = self._answered(answer)
        return self._known

    def settled(self) -> Checksum | None:
        """Return the hash, None where there is none. May wait for the store."""
        if self._known is None and self._entry.size:
            self._known = self._answered(self._ask())
        return self._known

    def confirmed(self) -> Checksum | None:
        """Return the store's own answer: an ETag may be another thing than the MD5 that it looks like. May wait."""
        self._known = self._answered(self._ask())
        return self._known

    def _ask(self) -> Future[Checksum | None]:
        with self._lock:
            if self._answer is None:
                self._answer = self._backend.ask_checksum(self._path, self._entry)
            return self._answer

    def _answered(self, answer: Future[Checksum | None]) -> Checksum | None:
        if not answer.done():
            about_to_wait(Wait.STORE)
        try:
            return answer.result()
        except CancelledError:  # nobody wants to know any more
            return None
        except OSError as error:
            logger.warning("%r could not be checked against the store's hash: %s", self._path, error)
            return None


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
