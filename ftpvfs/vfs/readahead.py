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
from ftpvfs.clock import SYSTEM_CLOCK, Clock
from ftpvfs.memory import MemoryBudget

MIB = 2**20
FIRST_CHUNK = MIB
# What a transfer may always have under way, however scarce memory is.
LEAST_CHUNK = 256 * 1024
# A far store needs several connections to fill the line; a near one is limited by what each request costs, and gives
# more in fewer, larger ranges (measured on two cores: 2 of 32 MiB a fifth faster than 4 of 16). Where one ends and the
# other begins is a guess between what was measured: 25 to 40 MB/s a connection far, 100 to 250 near.
AUTO_STREAMS = 4
FAST_STREAMS = 2
FAST_RATE = 64 * MIB


@dataclass(frozen=True)
class ChunkPolicy:
    """How ranges grow: sizes in bytes, `streams` at once (0: as the store's speed suggests)."""

    first: int
    largest: int
    streams: int = 0

    @classmethod
    def from_options(
        cls, *, buffer_size: int | None, chunk: int | None, limit: int | None, streams: int
    ) -> ChunkPolicy:
        """Return the policy for rclone's four flags.

        A range is read whole into memory, so `--buffer-size` bounds it as well as the chunk size does: four buffers are
        under way at the most, in four ranges or in two.
        """
        buffer = max(buffer_size or 0, LEAST_CHUNK)
        ceiling = max(chunk or buffer, limit or buffer)
        largest = max(LEAST_CHUNK, min(ceiling, buffer))
        return cls(first=min(FIRST_CHUNK, largest), largest=largest, streams=streams)


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
        self._fetch = fetch
        self._asked = start
        self._stop = stop
        self._policy = policy
        self._memory = memory
        self._clock = clock
        self._size = policy.first
        self._largest = policy.largest
        self._streams = policy.streams or 1
        self._chunks: deque[_Chunk] = deque()
        self._pieces: deque[bytes] = deque()
        self._view = memoryview(b"")
        self._held = 0

    def pending(self) -> Future[Pieces] | None:
        """Return the future to await before `take` gives bytes; None when it gives some, or the end, at once."""
        if self._view or self._pieces:
            return None
        self._ask()
        if self._chunks and not self._chunks[0].future.done():
            return self._chunks[0].future
        return None

    def take(self, limit: int) -> memoryview:
        """Return up to `limit` bytes, at least one except at the end; waits for the store, raises what it did."""
        if not self._view:
            self._next_piece()
        taken, self._view = self._view[:limit], self._view[limit:]
        return taken

    @property
    def is_ready(self) -> bool:
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
        if not self._policy.streams:
            self._adapt(chunk.rate())
        self._ask()

    def _adapt(self, rate: float) -> None:
        """Choose between many ranges and large ones; the memory of both is the same."""
        if rate >= FAST_RATE:
            self._streams, self._largest = FAST_STREAMS, self._policy.largest * AUTO_STREAMS // FAST_STREAMS
        else:
            self._streams, self._largest = min(self._streams + 1, AUTO_STREAMS), self._policy.largest

    def _ask(self) -> None:
        """Start as many ranges as streams and memory allow."""
        while self._asked < self._stop and len(self._chunks) < self._streams:
            size = self._take_memory(self._next_size())
            if not size:
                return
            self._chunks.append(_Chunk(size, self._fetch(self._asked, self._asked + size), self._clock))
            self._asked += size
            self._size = min(self._size * 2, self._largest)

    def _take_memory(self, size: int) -> int:
        """Return how long a range there is memory for; 0 while others of ours are under way."""
        if self._memory.take(size):
            return size
        if self._chunks:
            return 0
        while size > LEAST_CHUNK:
            size = max(size // 2, LEAST_CHUNK)
            if self._memory.take(size):
                return size
        self._memory.take(size, force=True)
        return size

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
            chunk = self._chunks.popleft()
            chunk.future.cancel()
            self._memory.give(chunk.size)
        self._asked = self._stop
