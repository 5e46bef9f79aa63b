"""Who is connected, over all workers of a server: exact counts, in all and for each address."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import functools
import ipaddress
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator
from hashlib import blake2b

# Addresses that may be connected at once; beyond them everybody is refused.
ADDRESSES = 65536
KEY = 16  # bytes
WORD = 4
# IPv6 gives every customer so many bits, and with them as many addresses as he likes.
IPV6_PREFIX = 64


class Admission(enum.Enum):
    """What became of a connection."""

    ADMITTED = enum.auto()
    FULL = enum.auto()
    TOO_MANY_FROM_ADDRESS = enum.auto()


@functools.lru_cache(maxsize=4096)
def network_of(ip: str) -> bytes:
    """Return whom limits take an address for: an IPv4 address, or the IPv6 network that one customer has.

    >>> network_of("::ffff:192.0.2.1") == network_of("192.0.2.1")
    True
    >>> network_of("2001:db8::1") == network_of("2001:db8::2:3%eth0")
    True
    """
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.is_link_local:
            return b"l" + address.packed[-(KEY - 1) :]
        if address.ipv4_mapped is None:
            host_bits = 128 - IPV6_PREFIX
            return b"6" + (int(address) >> host_bits << host_bits).to_bytes(16, "big")[: KEY - 1]
        address = address.ipv4_mapped
    return b"4" + address.packed.ljust(KEY - 1, b"\0")


def _key_of_user(name: str) -> bytes:
    return b"u" + blake2b(name.encode("utf-8", "surrogateescape"), digest_size=KEY - 1).digest()


class SessionTable:
    """Counts of connections that processes share. Made before they are forked; any thread.

    Each process has a slot, so that what a dead one had counted can be given up. The lock is a POSIX one, which
    children do not share and which a dead process does not hold.

    All is words of four bytes: a total and a state for each slot, the number of rows in use, the rows. A row is an
    address's or a user's key and a count for each slot; the rows in use stand in front.
    """

    def __init__(self, slots: int = 1, addresses: int = ADDRESSES) -> None:
        self._slots = slots
        self._slot = 0
        self._thread = threading.Lock()
        self._file, path = tempfile.mkstemp()  # for its lock alone
        os.unlink(path)
        self._close = weakref.finalize(self, os.close, self._file)
        self._used = 2 * slots
        self._rows = 2 * slots + 1
        self._row = KEY // WORD + slots
        self._addresses = addresses
        size = WORD * (self._rows + addresses * self._row)
        self._map = mmap.mmap(-1, size)  # of no file: a full disk would end who writes to it
        self._words = memoryview(self._map).cast("I")

    @property
    def slots(self) -> int:
        """How many processes may take part."""
        return self._slots

    def work_as(self, slot: int) -> None:
        """Be the process of this slot, in a child: nothing is counted in it yet."""
        self._slot = slot
        self._thread = threading.Lock()
        self.give_up(slot)

    def admit(self, ip: str, most: int = 0, most_per_ip: int = 0) -> Admission:
        """Count a connection, unless there are `most` in all or `most_per_ip` of its address already; 0: no limit."""
        key = network_of(ip)
        with self._locked():
            if most and self.total() >= most:
                return Admission.FULL
            row = self._find(key)
            if most_per_ip and row is not None and self._sum(row) >= most_per_ip:
                return Admission.TOO_MANY_FROM_ADDRESS
            if row is None:
                if self._words[self._used] == self._addresses:
                    return Admission.FULL
                row = self._append(key)
            self._words[self._count_in(row)] += 1
            self._words[self._slot] += 1
        return Admission.ADMITTED

    def leave(self, ip: str) -> None:
        """Count one connection less, which was admitted in this process."""
        with self._locked():
            row = self._find(network_of(ip))
            if row is None or not self._words[self._count_in(row)]:
                return
            self._words[self._count_in(row)] -= 1
            self._words[self._slot] -= 1
            if not self._sum(row):
                self._remove(row)

    def admit_user(self, name: str, most: int) -> bool:
        """Count a session of a user's, unless there are `most` already; tell whether it was. No total has it."""
        key = _key_of_user(name)
        with self._locked():
            row = self._find(key)
            if row is not None and self._sum(row) >= most:
                return False
            if row is None:
                if self._words[self._used] == self._addresses:
                    return False
                row = self._append(key)
            self._words[self._count_in(row)] += 1
        return True

    def leave_user(self, name: str) -> None:
        """Count one session of a user's less, which was admitted in this process."""
        with self._locked():
            row = self._find(_key_of_user(name))
            if row is None or not self._words[self._count_in(row)]:
                return
            self._words[self._count_in(row)] -= 1
            if not self._sum(row):
                self._remove(row)

    def give_up(self, slot: int) -> None:
        """Forget what the process of a slot had counted: it is dead, or begins."""
        with self._locked():
            self._words[slot] = self._words[self._slots + slot] = 0
            rows = [self._row_at(number) for number in range(self._words[self._used])]
            for row in rows:
                self._words[row + KEY // WORD + slot] = 0
            for row in reversed(rows):
                # Twice: a process was killed while it moved the row to the front; that one is the true one.
                if not self._sum(row) or self._find(self._key(row)) != row:
                    self._remove(row)

    def set_accepting(self, is_accepting: bool) -> None:
        """Tell the others whether this process takes connections."""
        self._words[self._slots + self._slot] = int(is_accepting)

    def total(self) -> int:
        """Return how many are connected."""
        return sum(self._words[: self._slots])

    def connected(self, ip: str) -> int:
        """Return how many are connected from the address."""
        with self._locked():
            row = self._find(network_of(ip))
            return 0 if row is None else self._sum(row)

    def lead(self) -> int:
        """Return by how many connections this process is ahead of the one that has the fewest and accepts, too.

        No lock is taken: the loop asks before each connection.
        """
        words, slots = self._words, self._slots
        own = words[self._slot]
        return own - min((words[each] for each in range(slots) if words[slots + each]), default=own)

    def close(self) -> None:
        """Release the table in this process."""
        self._words.release()
        self._map.close()
        self._close()

    # --- in the map

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._thread:
            if self._slots == 1:
                yield
                return
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _find(self, key: bytes) -> int | None:
        """Return the row of a key; None where there is none."""
        start, length = WORD * self._rows, WORD * self._row
        stop = start + self._words[self._used] * length
        at = self._map.find(key, start, stop)
        while at >= 0 and (at - start) % length:
            at = self._map.find(key, at + 1, stop)
        return None if at < 0 else at // WORD

    def _append(self, key: bytes) -> int:
        row = self._row_at(self._words[self._used])
        self._map[WORD * row : WORD * (row + self._row)] = key.ljust(WORD * self._row, b"\0")
        self._words[self._used] += 1
        return row

    def _remove(self, row: int) -> None:
        """Let the last row take the place of this one."""
        last = self._row_at(self._words[self._used] - 1)
        self._words[row : row + self._row] = self._words[last : last + self._row]
        self._words[self._used] -= 1

    def _row_at(self, number: int) -> int:
        return self._rows + number * self._row

    def _key(self, row: int) -> bytes:
        return self._map[WORD * row : WORD * row + KEY]

    def _count_in(self, row: int) -> int:
        return row + KEY // WORD + self._slot

    def _sum(self, row: int) -> int:
        return sum(self._words[row + KEY // WORD : row + self._row])
