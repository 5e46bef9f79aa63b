"""How a store is read in order: ranges that grow, and more of them at once, while the reader goes on.

The first range is small, so that a small file costs one request and a client that leaves at once wastes little; each
one after it is twice as long. What reads into memory and what reads into the cache share this.
"""

from __future__ import annotations

from dataclasses import dataclass

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


class Pace:
    """How long the next range of one sequential read is, and how many run at once. One thread at a time."""

    def __init__(self, policy: ChunkPolicy) -> None:
        self._policy = policy
        self._size = policy.first
        self._largest = policy.largest
        self.streams = policy.streams or 1

    @property
    def size(self) -> int:
        """Bytes that the next range has where nothing bounds it."""
        return self._size

    @property
    def most_ahead(self) -> int:
        """How far to ask ahead of a reader: one range more than run at once, so that none waits for the reader."""
        return (self.streams + 1) * self._largest

    def length(self, left: int) -> int:
        """Return how long the next range is where `left` bytes are left to ask for."""
        return left if left <= self._size + self._size // 2 else self._size  # no crumb at the end

    def asked(self) -> None:
        """Note that a range was asked for: the next one is longer."""
        self._size = min(self._size * 2, self._largest)

    def arrived(self, rate: float) -> None:
        """Choose between many ranges and large ones by the bytes a second of one that came; both need the same memory.
        """
        if self._policy.streams:
            return
        if rate >= FAST_RATE:
            self.streams, self._largest = FAST_STREAMS, self._policy.largest * AUTO_STREAMS // FAST_STREAMS
        else:
            self.streams, self._largest = min(self.streams + 1, AUTO_STREAMS), self._policy.largest


def take_memory(memory: MemoryBudget, size: int, *, is_only: bool) -> int:
    """Return how long a range there is memory for, which is taken; 0 where others of the same reader are under way.

    The only range of a reader gets a little whatever the budget says, so that every reader goes on.
    """
    if memory.take(size):
        return size
    if not is_only:
        return 0
    while size > LEAST_CHUNK:
        size = max(size // 2, LEAST_CHUNK)
        if memory.take(size):
            return size
    memory.take(size, force=True)
    return size
