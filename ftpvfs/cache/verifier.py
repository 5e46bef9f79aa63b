"""Whether the bytes that came are the store's: a hash that follows them in order while they arrive."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from ftpvfs.backend.backend import Backend, Entry
from ftpvfs.backend.checksum import Checksum, Expected, Hasher
from ftpvfs.errors import failure

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
    """Compares one version's bytes in the cache with the store's hash of the whole object. Any thread."""

    def __init__(self, backend: Backend, path: str, entry: Entry, item: Readable) -> None:
        self._expected = Expected(backend, path, entry)
        self._path = path
        self._item = item
        self._lock = threading.Lock()  # one thread hashes at a time
        # Protected by _lock.
        self._hasher: Hasher | None = None
        self._hashed = 0

    def begin(self, call: Callable[[], object]) -> None:
        """Make `call` once `follow` can hash; the store is asked for the hash where nothing is known of it."""
        self._expected.begin(call)

    def cancel(self) -> None:
        """Stop waiting for the store's answer."""
        self._expected.cancel()

    def accepts(self, pieces: list[bytes]) -> bool:
        """Tell whether `pieces` are the whole object. May wait for the store."""
        checksum = self._expected.settled()
        if checksum is None or checksum.matches(pieces):
            return True
        checksum = self._expected.confirmed()
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
        checksum = self._expected.settled()
        if checksum is None or self._digest(checksum) == checksum.digest:
            return True
        confirmed = self._expected.confirmed()
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
        if self._hasher is None and (known := self._expected.known) is not None:
            self._hasher = known.hasher()
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
