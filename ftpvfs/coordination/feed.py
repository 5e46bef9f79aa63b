"""A feed of changes: what one process changed, all others that share a folder learn when they next look.

A ring in a file that every process maps. Writers take turns under a flock; readers take no lock. A change is there for
all when `publish` returns, and a writer that is killed has published a change wholly or not at all.

The file: MAGIC, `reserved`, `head`, then the ring. Both count bytes since the beginning of time; what lies between
`head` and `reserved` is being written. Each record: its length, a checksum, its writer, JSON.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftpvfs.coordination.lockfile import LockFile

MAGIC = b"ftpvfs-1"
RING = 2**20  # bytes; some thousands of changes, which a process sees through within milliseconds of its next question
HEADER = 4096
RECORD = struct.Struct("<IIQ")  # length of all, checksum of the rest, writer
COUNTERS = struct.Struct("=QQ")
RESERVED, HEAD = 1, 2  # as eight-byte words of the file
WORDS = 24
# A change that is larger tells the others to drop everything instead.
LARGEST = 64 * 1024
EVERYTHING = b"null"
# Seconds after which a reader looks whether the file is still the one in the folder.
LOOK_AGAIN = 1.0

Change = dict[str, Any]


class ChangeFeed:
    """The changes of all processes that share a folder. Any thread; made after a fork.

    `news` of this object leaves out what this object published. `follow` gives further readers of the same.
    """

    def __init__(self, folder: Path, *, ring: int = RING) -> None:
        self._path = str(folder / "changes")
        self._ring = ring
        self._lock = threading.Lock()
        self.writer = int.from_bytes(os.urandom(8), "little")
        # Replaced under _lock; who reads takes whichever it finds.
        self._file = _RingFile(self._path, ring)
        self._follower = Follower(self)

    def publish(self, change: Change) -> None:
        """Tell all others. OSError where the disk does not take it: then nobody was told."""
        data = json.dumps(change, ensure_ascii=True).encode()
        if len(data) > min(LARGEST, self._ring // 4):
            data = EVERYTHING
        with self._lock:
            self._reopen_if_replaced()
            self._file.append(_record(self.writer, data))

    def news(self) -> list[Change] | None:
        """Return what others published since the last call, in order; None when too much was missed to tell.

        Without news this costs one look into memory.
        """
        return self._follower.news()

    def follow(self) -> Follower:
        """Return another reader, who begins now."""
        return Follower(self)

    def close(self) -> None:
        """Release the file."""
        with self._lock:
            self._file.close()

    def current(self) -> _RingFile:
        """Return the file to read from; looked for anew when the folder was emptied."""
        # Who holds the lock has looked just now, and may wait for a process that has the file locked.
        if time.monotonic() - self._file.looked_at > LOOK_AGAIN and self._lock.acquire(blocking=False):
            try:
                self._reopen_if_replaced()
            finally:
                self._lock.release()
        return self._file

    def _reopen_if_replaced(self) -> None:
        if self._file.is_closed or self._file.is_in_place():
            return
        fresh = _RingFile(self._path, self._ring)
        old, self._file = self._file, fresh
        old.close()


class Follower:
    """One reader's place in a feed. One thread at a time."""

    def __init__(self, feed: ChangeFeed) -> None:
        self._feed = feed
        self._file = feed.current()
        self._position = self._file.head

    def news(self) -> list[Change] | None:
        """Return what others published since the last call, in order; None when too much was missed to tell."""
        file = self._feed.current()
        if file is not self._file:
            self._file, self._position = file, file.head
            return None
        if file.head == self._position or file.is_closed:
            return []
        found = file.read_from(self._position)
        if found is None:
            self._position = file.head
            return None
        data, self._position = found
        return self._decoded(data)

    def _decoded(self, data: bytes) -> list[Change] | None:
        changes: list[Change] = []
        for writer, payload in _records(data):
            if writer == self._feed.writer:
                continue
            change = json.loads(payload)
            if change is None:
                return None
            changes.append(change)
        return changes


class _RingFile:
    """The mapped file. Readers on any thread; `append` by one thread at a time of each process."""

    def __init__(self, path: str, ring: int) -> None:
        self._ring = ring
        self._file = LockFile(path)
        self.looked_at = time.monotonic()
        try:
            with self._turn():
                self._prepare()
            self._map: mmap.mmap | None = mmap.mmap(self._file.descriptor, HEADER + ring, prot=mmap.PROT_READ)
        except BaseException:
            self._file.close()
            raise
        # Once closed, a copy of what was there; a thread that is just reading keeps the mapping until it is through.
        self._words = memoryview(self._map)[:WORDS].cast("Q")

    def _prepare(self) -> None:
        """Make the file what it should be, in this process's turn. All its blocks are taken now: a disk that is full
        later must not end who writes to it.
        """
        descriptor, size = self._file.descriptor, HEADER + self._ring
        if os.fstat(descriptor).st_size != size or os.pread(descriptor, len(MAGIC), 0) != MAGIC:
            _write_all(descriptor, bytes(size), 0)
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, MAGIC, 0)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        self._file.lock()
        try:
            yield
        finally:
            self._file.unlock()

    @property
    def head(self) -> int:
        """How many bytes were ever published."""
        return self._words[HEAD]

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._map is None

    def is_in_place(self) -> bool:
        """Tell whether the file is still the one that others find in the folder."""
        self.looked_at = time.monotonic()
        return self._file.is_in_place()

    def append(self, record: bytes) -> None:
        """Publish one record."""
        descriptor = self._file.descriptor
        with self._turn():
            head = self._words[HEAD]
            reserved = head + len(record)
            # Readers must see that the oldest bytes go before they go, and the new ones only once they are there.
            os.pwrite(descriptor, COUNTERS.pack(reserved, head), 8 * RESERVED)
            at = head % self._ring
            first = record[: self._ring - at]
            _write_all(descriptor, first, HEADER + at)
            _write_all(descriptor, record[len(first) :], HEADER)
            os.pwrite(descriptor, COUNTERS.pack(reserved, reserved), 8 * RESERVED)

    def read_from(self, position: int) -> tuple[bytes, int] | None:
        """Return the bytes from `position` on, and where they end; None where they are partly gone."""
        head = self._words[HEAD]
        data = self._copy(position, head)
        if data is not None and not _is_whole(data):
            # Torn, by a machine that shows another processor's writes in another order: look in our own turn.
            with contextlib.suppress(OSError), self._turn():
                head = self._words[HEAD]
                data = self._copy(position, head)
        return (data, head) if data is not None and _is_whole(data) else None

    def _copy(self, position: int, head: int) -> bytes | None:
        mapped = self._map
        if mapped is None or not 0 <= head - position <= self._ring:
            return None
        start, stop = position % self._ring, head % self._ring
        if start < stop:
            data = mapped[HEADER + start : HEADER + stop]
        else:
            data = mapped[HEADER + start : HEADER + self._ring] + mapped[HEADER : HEADER + stop]
        return data if self._words[RESERVED] - position <= self._ring else None

    def close(self) -> None:
        """Release the file."""
        if self._map is not None:
            self._words = memoryview(bytes(self._words)).cast("Q")
            self._map = None
            self._file.close()


def _record(writer: int, data: bytes) -> bytes:
    rest = struct.pack("<Q", writer) + data
    return struct.pack("<II", 8 + len(rest), zlib.crc32(rest)) + rest


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        length, _, writer = RECORD.unpack_from(data, at)
        yield writer, data[at + RECORD.size : at + length]
        at += length


def _is_whole(data: bytes) -> bool:
    """Tell whether the bytes are records, from the first to the last."""
    at = 0
    while at + RECORD.size <= len(data):
        length, checksum, _ = RECORD.unpack_from(data, at)
        if length < RECORD.size or zlib.crc32(data[at + 8 : at + length]) != checksum:
            return False
        at += length
    return at == len(data)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write all; a disk that is full may take a part before it says so."""
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done
