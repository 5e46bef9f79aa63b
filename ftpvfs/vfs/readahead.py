"""A sequential read in growing, parallel ranges: the bytes are asked for before they are wanted."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from ftpvfs.backend.backend import Pieces
from ftpvfs.backend.chunks import ChunkPolicy, Pace, take_memory
from ftpvfs.clock import SYSTEM_CLOCK, Clock
from ftpvfs.memory import MemoryBudget
from ftpvfs.readiness import END, Awaited, Bytes, Readiness
from ftpvfs.vfs.checkedfetch import CheckedFetch


class _Chunk:
    """One range under way, and how long it took."""

    __slots__ = ("_arrived", "_asked", "_clock", "future", "size")

    def __init__(self, size: int, future: Future[Pieces], clock: Clock) -> None:
        self.size = size
        self.future = future
        self._clock = clock
        self._asked = clock.monotonic()
        # The callback must not refer to the chunk: the future keeps it, and with it, in a circle, all the bytes.
        self._arrived: list[float] = []
        arrived = self._arrived
        future.add_done_callback(lambda _: arrived.append(clock.monotonic()))

    def rate(self) -> float:
        """Return bytes a second, from the request to the last byte."""
        arrived = self._arrived[0] if self._arrived else self._clock.monotonic()
        return self.size / max(arrived - self._asked, 1e-6)


class ReadAhead:
    """Bytes [start, stop) of one version of one object, in order. One thread at a time."""

    def __init__(
        self,
        fetch: Callable[[int, int], Future[Pieces]],
        start: int,
        stop: int,
        policy: ChunkPolicy,
        memory: MemoryBudget,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        # A `CheckedFetch` where the bytes are to be compared with the store's hash.
        self._fetch = fetch
        self._asked = start
        self._stop = stop
        self._pace = Pace(policy)
        self._memory = memory
        self._clock = clock
        self._chunks: deque[_Chunk] = deque()
        self._pieces: deque[bytes] = deque()
        self._view = memoryview(b"")
        self._held = 0

    def poll(self) -> Readiness:
        """Return what `take` gives without waiting: bytes, nothing before a future is done, or the end.

        Raises what the store did instead of giving the next range.
        """
        while not self.has_more:
            self._ask()
            if not self._chunks:
                if self._asked < self._stop:  # a range that is the only one always gets some memory
                    raise OSError(errno.ENOBUFS, f"No memory for the range from {self._asked} on")
                return END
            if not self._chunks[0].future.done():
                return Awaited(self._chunks[0].future)
            self._next_chunk()
        return Bytes(len(self._view) + sum(map(len, self._pieces)))

    def take(self, limit: int) -> memoryview:
        """Return up to `limit` bytes, at least one except at the end; waits for the store, raises what it did."""
        if not self._view:
            self._next_piece()
        taken, self._view = self._view[:limit], self._view[limit:]
        return taken

    @property
    def has_more(self) -> bool:
        """Whether `take` gives bytes of a range that has arrived already."""
        return bool(self._view or self._pieces)

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
        chunk = self._chunks[0]
        pieces = chunk.future.result()
        given = sum(map(len, pieces))
        if given != chunk.size:  # every later byte would stand at the wrong place
            raise OSError(errno.EIO, f"The store gave {given} of {chunk.size} bytes")
        self._chunks.popleft()
        self._pieces.extend(piece for piece in pieces if piece)
        self._held = chunk.size
        self._pace.arrived(chunk.rate())
        self._ask()

    def _ask(self) -> None:
        """Start as many ranges as streams and memory allow."""
        while self._asked < self._stop and len(self._chunks) < self._pace.streams:
            wanted = self._pace.length(self._stop - self._asked)
            size = take_memory(self._memory, wanted, is_only=not self._chunks)
            if not size:
                return
            self._chunks.append(_Chunk(size, self._fetch(self._asked, self._asked + size), self._clock))
            self._asked += size
            self._pace.asked()

    def _release(self) -> None:
        self._memory.give(self._held)
        self._held = 0

    def verify(self) -> None:
        """Raise EIO where all of the object was read, and it is not what the store has. May ask the store."""
        if isinstance(self._fetch, CheckedFetch):
            self._fetch.verify()

    def close(self) -> None:
        """Cancel what is under way and give its memory back."""
        self._pieces.clear()
        self._view = memoryview(b"")
        self._release()
        while self._chunks:
            chunk = self._chunks.popleft()
            chunk.future.cancel()
            self._memory.give(chunk.size)
        self._asked = self._stop
        if isinstance(self._fetch, CheckedFetch):
            self._fetch.close()
