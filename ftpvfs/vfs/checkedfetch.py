"""Ranges of one object, hashed in order as they arrive: whether all of a streamed download is what the store has."""

from __future__ import annotations

import errno
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from ftpvfs.backend.backend import Pieces
from ftpvfs.backend.checksum import Expected, Hasher
from ftpvfs.errors import failure

logger = logging.getLogger(__name__)

# Hashed in the thread in which a range arrived: 0.2 ms, about what another thread costs.
HASHED_INLINE = 2**17

Fetch = Callable[[int, int], "Future[Pieces]"]


@dataclass(eq=False, slots=True)
class _Range:
    """One range on its way: `source` is done when it has arrived, `hashed` when it and all before it are hashed."""

    size: int
    source: Future[Pieces]
    hashed: Future[Pieces] = field(default_factory=Future)


class CheckedFetch:
    """Fetches consecutive ranges of an object from its first byte on, and hashes each before it is handed over.

    Any thread. Ranges arrive in any order and are hashed in theirs, in the threads of `run`, beside the requests for
    what follows: nothing is kept for longer than the reader's own memory budget allows for ranges on their way.
    """

    def __init__(
        self, fetch: Fetch, path: str, size: int, expected: Expected, run: Callable[[Callable[[], object]], object]
    ) -> None:
        self._fetch = fetch
        self._path = path
        self._size = size
        self._expected = expected
        self._run = run
        self._lock = threading.Lock()
        # Protected by _lock.
        self._ranges: deque[_Range] = deque()
        self._is_hashing = False
        self._may_hash = False  # once the store has said what its hash is, or that it has none
        # Touched by the one thread that hashes, and by `verify` after the last range.
        self._hasher: Hasher | None = None
        self._hashed = 0
        expected.begin(self._begin)

    def __call__(self, start: int, stop: int) -> Future[Pieces]:
        """Start reading [start, stop), which follows what was asked for before; cancelling ends the request."""
        source = self._fetch(start, stop)
        item = _Range(stop - start, source)
        hashed = item.hashed
        with self._lock:
            self._ranges.append(item)
        # The callbacks must not refer to the range: its futures keep them, and with it, in a circle, all the bytes.
        hashed.add_done_callback(lambda done: source.cancel() if done.cancelled() else None)
        source.add_done_callback(lambda _: self._go_on())
        return hashed

    def verify(self) -> None:
        """Raise EIO where all of the object was read and does not hash to what the store says. May ask the store."""
        checksum = self._expected.known
        if self._hasher is None or checksum is None or self._hashed != self._size:
            return
        digest = self._hasher.digest()
        if digest == checksum.digest:
            return
        confirmed = self._expected.confirmed()
        if confirmed is None:
            return
        if (confirmed.algorithm, confirmed.part) != (checksum.algorithm, checksum.part):
            logger.warning("%r could not be checked: the store has another kind of hash than it seemed", self._path)
        elif digest != confirmed.digest:
            reason = f"The bytes that came are not those that the store has ({confirmed.algorithm} {digest.hex()}"
            raise failure(errno.EIO, self._path, f"{reason} instead of {confirmed.digest.hex()})")

    def close(self) -> None:
        """Stop waiting for the store's hash."""
        self._expected.cancel()

    def _begin(self) -> None:
        known = self._expected.known
        self._hasher = known.hasher() if known is not None else None
        with self._lock:
            self._may_hash = True
        self._go_on()

    def _go_on(self) -> None:
        """Have hashed what has arrived and is next, unless a thread is at it already."""
        with self._lock:
            if self._is_hashing or not self._has_next_locked():
                return
            self._is_hashing = True
            is_short = self._hasher is None or self._ranges[0].size <= HASHED_INLINE
        if is_short:
            self._hash_arrived()
        else:
            self._run(self._hash_arrived)

    def _has_next_locked(self) -> bool:
        return self._may_hash and bool(self._ranges) and self._ranges[0].source.done()

    def _hash_arrived(self) -> None:
        while True:
            with self._lock:
                if not self._has_next_locked():
                    self._is_hashing = False
                    return
                item = self._ranges.popleft()
            self._hand_over(item)

    def _hand_over(self, item: _Range) -> None:
        try:
            pieces = item.source.result()
            if self._hasher is not None:
                for piece in pieces:
                    self._hasher.update(piece)
                    self._hashed += len(piece)
        except BaseException as error:  # noqa: BLE001 - it belongs to the reader, who may have gone
            self._hasher = None  # what follows is hashed in vain
            with suppress(InvalidStateError):
                item.hashed.set_exception(error)
        else:
            with suppress(InvalidStateError):
                item.hashed.set_result(pieces)
