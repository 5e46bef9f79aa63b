"""A sequential read in growing, parallel ranges: the bytes are asked for before they are wanted.

The first range is small, so that a small file costs one request and a client that leaves at once wastes little; each
one after it is twice as long, and more run in parallel, while the reader keeps asking.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from ftpvfs.backend.backend import Pieces
from ftpvfs.memory import MemoryBudget

MIB = 2**20
FIRST_CHUNK = MIB
# What a transfer may always have under way, however scarce memory is.
LEAST_CHUNK = 256 * 1024
AUTO_STREAMS = 4


@dataclass(frozen=True)
class ChunkPolicy:
    """How ranges grow: sizes in bytes, `streams` at once (0: up to four, one more with each chunk that was read)."""

    first: int
    largest: int
    streams: int = 0

    @classmethod
    def from_options(
        cls, *, buffer_size: int | None, chunk: int | None, limit: int | None, streams: int
    ) -> ChunkPolicy:
        """Return the policy for rclone's four flags.

        A range is read whole into memory, so `--buffer-size` bounds it as well as the chunk size does. Measured with
        four at once: ranges of 16 MiB cost a third less CPU than ranges of 8, since each request has its price.
        """
        buffer = max(buffer_size or 0, LEAST_CHUNK)
        ceiling = max(chunk or buffer, limit or buffer)
        largest = max(LEAST_CHUNK, min(ceiling, buffer))
        return cls(first=min(FIRST_CHUNK, largest), largest=largest, streams=streams)


class ReadAhead:
    """Bytes [start, stop) of one version of one object, in order. One thread at a time."""

    def __init__(
        self,
        fetch: Callable[[int, int], Future[Pieces]],
        start: int,
        stop: int,
        policy: ChunkPolicy,
        memory: MemoryBudget,
    ) -> None:
        self._fetch = fetch
        self._asked = start
        self._stop = stop
        self._policy = policy
        self._memory = memory
        self._size = policy.first
        self._streams = policy.streams or 1
        self._chunks: deque[tuple[int, Future[Pieces]]] = deque()
        self._pieces: deque[bytes] = deque()
        self._view = memoryview(b"")
        self._held = 0

    def pending(self) -> Future[Pieces] | None:
        """Return the future to await before `take` gives bytes; None when it gives some, or the end, at once."""
        if self._view or self._pieces:
            return None
        self._ask()
        if self._chunks and not self._chunks[0][1].done():
            return self._chunks[0][1]
        return None

    def take(self, limit: int) -> memoryview:
        """Return up to `limit` bytes, at least one except at the end; waits for the store, raises what it did."""
        if not self._view:
            self._next_piece()
        taken, self._view = self._view[:limit], self._view[limit:]
        return taken

    def _next_piece(self) -> None:
        if not self._pieces:
            self._next_chunk()
        if self._pieces:
            self._view = memoryview(self._pieces.popleft())

    def _next_chunk(self) -> None:
        self._release()
        self._ask()
        if not self._chunks:
            return
        size, future = self._chunks[0]
        pieces = future.result()
        given = sum(map(len, pieces))
        if given != size:  # every later byte would stand at the wrong place
            raise OSError(errno.EIO, f"The store gave {given} of {size} bytes")
        self._chunks.popleft()
        self._pieces.extend(piece for piece in pieces if piece)
        self._held = size
        if not self._policy.streams:
            self._streams = min(self._streams + 1, AUTO_STREAMS)
        self._ask()

    def _ask(self) -> None:
        """Start as many ranges as streams and memory allow."""
        while self._asked < self._stop and len(self._chunks) < self._streams:
            size = self._next_size()
            if not self._memory.take(size):
                if self._chunks:
                    return
                size = min(size, LEAST_CHUNK)
                self._memory.take(size, force=True)
            self._chunks.append((size, self._fetch(self._asked, self._asked + size)))
            self._asked += size
            self._size = min(self._size * 2, self._policy.largest)

    def _next_size(self) -> int:
        left = self._stop - self._asked
        return left if left <= self._size + self._size // 2 else self._size  # no crumb at the end

    def _release(self) -> None:
        self._memory.give(self._held)
        self._held = 0

    def close(self) -> None:
        """Cancel what is under way and give its memory back."""
        self._pieces.clear()
        self._view = memoryview(b"")
        self._release()
        while self._chunks:
            size, future = self._chunks.popleft()
            future.cancel()
            self._memory.give(size)
        self._asked = self._stop
