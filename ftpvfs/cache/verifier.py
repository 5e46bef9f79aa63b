"""Whether the bytes that came are the store's: a hash that follows them in order while they arrive."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from typing import Protocol

from ftpvfs.backend.backend import Backend, Entry
from ftpvfs.backend.checksum import Checksum, Hasher
from ftpvfs.errors import failure
from ftpvfs.waiting import Wait, about_to_wait

logger = logging.getLogger(__name__)

# Read back from the data file at once, where bytes did not come in their order.
STEP = 2**20
# Hashed in one go, before others have their turn in the same thread.
TURN = 2**25


class Readable(Protocol):
    """What the verifier needs of a cached item."""

    @property
    def size(self) -> int:
        """Bytes in the whole object."""

    @property
    def descriptor(self) -> int:
        """The data file."""

    def ready(self, offset: int) -> int:
        """Return how many bytes are present from the offset on."""


class Verifier:
    """Compares one version's bytes with the store's hash of the whole object. Any thread.

    Where the store has no hash (or does not answer when it is asked), every byte is taken for right.
    """

    def __init__(self, backend: Backend, path: str, entry: Entry, item: Readable) -> None:
        self._backend = backend
        self._path = path
        self._entry = entry
        self._item = item
        self._lock = threading.Lock()  # one thread hashes at a time
        # Protected by _lock.
        self._hasher: Hasher | None = None
        self._hashed = 0
        # What the bytes should hash to, as far as is known without a question; the store's own answer once it came.
        self._checksum = backend.checksum(entry)
        self._answer: Future[Checksum | None] | None = None
        self._asking = threading.Lock()  # for the two above

    def begin(self, call: Callable[[], object]) -> None:
        """Make `call` once `follow` can hash; the store is asked for the hash where nothing is known of it."""
        if self._checksum is not None or not self._entry.size:
            call()
        else:
            self._ask().add_done_callback(lambda _: call())

    def cancel(self) -> None:
        """Stop waiting for the store's answer."""
        if self._answer is not None:
            self._answer.cancel()

    def accepts(self, pieces: list[bytes]) -> bool:
        """Tell whether `pieces` are the whole object. May wait for the store."""
        checksum = self._expected()
        if checksum is None or checksum.matches(pieces):
            return True
        checksum = self._confirmed()
        return checksum is None or checksum.matches(pieces)

    def feed(self, start: int, pieces: Iterable[bytes]) -> None:
        """Hash pieces that have just been written at `start`, if they are next; `follow` reads others from the disk."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if start != self._hashed or not self._is_hashing_locked():
                return
            for piece in pieces:
                self._update_locked(piece)
        finally:
            self._lock.release()

    def follow(self) -> bool:
        """Hash some of what is present in order; tell whether there is more. Never waits for the store.

        Returns at once when another thread is at it, which sees to the rest.
        """
        stop = self._hashed + TURN
        while self._item.ready(self._hashed) and self._lock.acquire(blocking=False):
            try:
                if not self._is_hashing_locked():
                    return False
                if self._hashed >= stop:
                    return True
                self._hash_next_locked()
            finally:
                self._lock.release()
        return False

    def finish(self) -> bool:
        """Tell whether the bytes of the complete item are right. May wait for the store and hashes what is left."""
        checksum = self._expected()
        if checksum is None or self._digest(checksum) == checksum.digest:
            return True
        confirmed = self._confirmed()
        if confirmed is None or confirmed == checksum:
            return confirmed is None
        self.restart()
        return self._digest(confirmed) == confirmed.digest

    @property
    def is_finished(self) -> bool:
        """Whether all bytes are hashed."""
        return self._hashed == self._item.size

    def restart(self) -> None:
        """Forget what was hashed."""
        with self._lock:
            self._hasher, self._hashed = None, 0

    def _digest(self, checksum: Checksum) -> bytes:
        with self._lock:
            if self._hasher is None:
                self._hasher = checksum.hasher()
            while self._hash_next_locked():
                pass
            return self._hasher.digest()

    def _is_hashing_locked(self) -> bool:
        if self._hasher is None and self._checksum is None and self._answer is not None and self._answer.done():
            self._checksum = self._answered(self._answer)
        if self._hasher is None and self._checksum is not None:
            self._hasher = self._checksum.hasher()
        return self._hasher is not None

    def _hash_next_locked(self) -> bool:
        ready = self._item.ready(self._hashed)
        data = os.pread(self._item.descriptor, min(ready, STEP), self._hashed) if ready else b""
        if not data and ready:
            raise failure(errno.EIO, self._path, "The data file in the cache is shorter than it should be")
        self._update_locked(data)
        return bool(data)

    def _update_locked(self, data: bytes) -> None:
        assert self._hasher is not None
        self._hasher.update(data)
        self._hashed += len(data)

    # --- what the store says

    def _ask(self) -> Future[Checksum | None]:
        with self._asking:
            if self._answer is None:
                self._answer = self._backend.ask_checksum(self._path, self._entry)
            return self._answer

    def _expected(self) -> Checksum | None:
        """Return what is known without a question, or else the store's answer."""
        if self._checksum is None and self._entry.size:
            self._checksum = self._answered(self._ask())
        return self._checksum

    def _confirmed(self) -> Checksum | None:
        """Return the store's own answer: an ETag may be another thing than the MD5 that it looks like."""
        self._checksum = self._answered(self._ask())
        return self._checksum

    def _answered(self, answer: Future[Checksum | None]) -> Checksum | None:
        if not answer.done():
            about_to_wait(Wait.STORE)
        try:
            return answer.result()
        except (OSError, CancelledError) as error:
            logger.warning("%r could not be checked against the store's hash: %s", self._path, error)
            return None
