"""Read-ahead: every byte in order, few requests for small files, and memory that is bounded and given back."""

from __future__ import annotations

import errno
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftpvfs.backend.backend import Pieces
from ftpvfs.backend.chunks import AUTO_STREAMS, FAST_STREAMS, FIRST_CHUNK, LEAST_CHUNK, ChunkPolicy
from ftpvfs.clock import Clock
from ftpvfs.memory import MemoryBudget
from ftpvfs.readiness import END
from ftpvfs.vfs.readahead import ReadAhead
from tests.polling import awaited

KIB, MIB = 2**10, 2**20
PATTERN = bytes(range(251)) * 263  # no power of two, so that shifted bytes show
POLICY = ChunkPolicy(first=MIB, largest=8 * MIB)


class Source:
    """Bytes that come when a test says so, or at once; a shift of them shows."""

    def __init__(self, size: int, *, at_once: bool = True) -> None:
        self.size = size
        self.at_once = at_once
        self.asked: list[tuple[int, int]] = []
        self.waiting: list[tuple[int, int, Future[Pieces]]] = []

    def bytes(self, start: int = 0, stop: int | None = None) -> bytes:
        stop = self.size if stop is None else stop
        return (PATTERN * ((stop - start) // len(PATTERN) + 2))[start % len(PATTERN) :][: stop - start]

    def fetch(self, start: int, stop: int) -> Future[Pieces]:
        assert 0 <= start < stop <= self.size
        self.asked.append((start, stop))
        future: Future[Pieces] = Future()
        self.waiting.append((start, stop, future))
        if self.at_once:
            self.answer()
        return future

    def answer(self, number: int = 0) -> None:
        start, stop, future = self.waiting.pop(number)
        if future.set_running_or_notify_cancel():
            future.set_result(pieces_of(self.bytes(start, stop)))

    @property
    def under_way(self) -> int:
        return sum(stop - start for start, stop, future in self.waiting if not future.cancelled())


def pieces_of(data: bytes) -> Pieces:
    """The bytes as a network may deliver them."""
    cuts = (0, len(data) // 3, len(data) // 3, len(data))
    return [data[start:stop] for start, stop in pairwise(cuts)]


def read_all(stream: ReadAhead, step: Callable[[], int] = lambda: 2**30) -> bytes:
    pieces = []
    while view := stream.take(step()):
        pieces.append(bytes(view))
    return b"".join(pieces)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_all_bytes_come_in_order_whatever_the_sizes(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 600_000))
    start = data.draw(st.integers(0, size))
    first = data.draw(st.integers(1, 100_000))
    policy = ChunkPolicy(first, data.draw(st.integers(first, 400_000)), data.draw(st.integers(0, 6)))
    memory = MemoryBudget(data.draw(st.one_of(st.none(), st.integers(0, 500_000))))
    source = Source(size)
    stream = ReadAhead(source.fetch, start, size, policy, memory)
    assert read_all(stream, lambda: data.draw(st.integers(1, 200_000))) == source.bytes(start)
    assert bytes(stream.take(1)) == b""
    assert sorted(source.asked) == source.asked
    assert sum(stop - begin for begin, stop in source.asked) == size - start, "a byte was asked for twice"
    stream.close()
    assert memory.used == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_answers_may_come_in_any_order(data: st.DataObject) -> None:
    source = Source(data.draw(st.integers(1, 500_000)), at_once=False)
    memory = MemoryBudget(None)
    policy = ChunkPolicy(4 * KIB, 64 * KIB, data.draw(st.integers(0, 5)))
    # Its pace is not to follow the machine's: the same draws have to make the same requests.
    stream = ReadAhead(source.fetch, 0, source.size, policy, memory, Stopwatch(NEAR))
    got = b""
    while len(got) < source.size:
        while (future := awaited(stream)) is not None:
            assert not future.done()
            source.answer(data.draw(st.integers(0, len(source.waiting) - 1)))
        got += stream.take(30_000)
    assert got == source.bytes()
    assert stream.poll() == END
    stream.close()
    assert memory.used == 0


@pytest.mark.parametrize("size", [1, 10 * KIB, FIRST_CHUNK, FIRST_CHUNK + FIRST_CHUNK // 2])
def test_a_small_file_is_one_request(size: int) -> None:
    source = Source(size)
    policy = ChunkPolicy.from_options(buffer_size=16 * MIB, chunk=128 * MIB, limit=None, streams=0)
    stream = ReadAhead(source.fetch, 0, size, policy, MemoryBudget(None))
    assert read_all(stream) == source.bytes()
    assert source.asked == [(0, size)]


def test_nothing_is_asked_for_an_empty_range() -> None:
    source = Source(10)
    stream = ReadAhead(source.fetch, 10, 10, POLICY, MemoryBudget(None))
    assert stream.poll() == END
    assert bytes(stream.take(1)) == b""
    assert source.asked == []


class Stopwatch(Clock):
    """A clock that shows one second more each time it is asked, times `slowness`."""

    def __init__(self, slowness: float) -> None:
        self.slowness = slowness
        self.shown = 0.0

    def monotonic(self) -> float:
        self.shown += self.slowness
        return self.shown


FAR, NEAR = 1.0, 1e-3  # a MiB in a second; in a millisecond


@pytest.mark.parametrize(("slowness", "largest"), [(FAR, 4 * MIB), (NEAR, 8 * MIB)])
def test_requests_double_up_to_the_largest_and_no_crumb_is_left_for_the_end(slowness: float, largest: int) -> None:
    source = Source(40 * MIB + 5)
    policy = ChunkPolicy(MIB, 4 * MIB)
    stream = ReadAhead(source.fetch, 0, source.size, policy, MemoryBudget(None), Stopwatch(slowness))
    read_all(stream)
    sizes = [stop - start for start, stop in source.asked]
    assert sizes[:3] == [MIB, 2 * MIB, 4 * MIB]
    assert largest <= max(sizes) <= largest + largest // 2
    assert min(sizes[2:]) >= 2 * MIB


@pytest.mark.parametrize(("slowness", "streams"), [(FAR, AUTO_STREAMS), (NEAR, FAST_STREAMS)])
def test_a_far_store_is_read_in_many_streams_and_a_near_one_in_few(slowness: float, streams: int) -> None:
    source = Source(400 * MIB, at_once=False)
    stream = ReadAhead(source.fetch, 0, source.size, POLICY, MemoryBudget(None), Stopwatch(slowness))
    seen = []
    while len(seen) < 8:
        assert awaited(stream) is not None
        seen.append(len(source.waiting))
        source.answer()
        while awaited(stream) is None:
            assert stream.take(2**30)
    assert seen[0] == 1
    assert max(seen) == streams
    stream.close()


def test_what_was_read_is_let_go_of_at_once() -> None:
    gc.disable()
    try:
        futures: list[weakref.ref[Future[Pieces]]] = []
        source = Source(8 * MIB)

        def fetch(start: int, stop: int) -> Future[Pieces]:
            future = source.fetch(start, stop)
            futures.append(weakref.ref(future))
            return future

        stream = ReadAhead(fetch, 0, source.size, ChunkPolicy(MIB, MIB), MemoryBudget(None))
        read_all(stream)
        assert len(futures) > 2
        assert [future for future in futures if future() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("streams", [1, 3, 16])
def test_a_number_of_streams_is_kept_from_the_start(streams: int) -> None:
    source = Source(200 * MIB, at_once=False)
    policy = ChunkPolicy(MIB, MIB, streams)
    stream = ReadAhead(source.fetch, 0, source.size, policy, MemoryBudget(None))
    stream.poll()
    assert len(source.waiting) == streams
    stream.close()


def test_transfers_share_one_budget_and_each_goes_on_with_a_small_piece() -> None:
    limit = 8 * MIB
    memory = MemoryBudget(limit)
    sources = [Source(50 * MIB, at_once=False) for _ in range(40)]
    streams = [ReadAhead(source.fetch, 0, 50 * MIB, POLICY, memory) for source in sources]
    for stream in streams:
        assert awaited(stream) is not None
    assert all(source.waiting for source in sources), "a transfer waits for the others"
    assert memory.used <= limit + len(streams) * LEAST_CHUNK
    for _ in range(3):
        for source, stream in zip(sources, streams, strict=True):
            while awaited(stream) is not None:
                source.answer()
            while awaited(stream) is None:
                assert stream.take(MIB)
    assert memory.used <= limit + 2 * len(streams) * LEAST_CHUNK
    for stream in streams:
        stream.close()
    assert memory.used == 0


def test_what_is_under_way_is_counted() -> None:
    memory = MemoryBudget(100 * MIB)
    source = Source(90 * MIB, at_once=False)
    stream = ReadAhead(source.fetch, 0, 90 * MIB, POLICY, memory)
    for _ in range(5):
        while awaited(stream) is not None:
            # The piece that was handed out last may still be in somebody's hands.
            assert source.under_way <= memory.used <= source.under_way + 12 * MIB
            source.answer()
        stream.take(2**30)
    stream.close()


def test_close_cancels_what_is_under_way_and_gives_its_memory_back() -> None:
    memory = MemoryBudget(None)
    source = Source(50 * MIB, at_once=False)
    stream = ReadAhead(source.fetch, 0, 50 * MIB, ChunkPolicy(MIB, MIB, 4), memory)
    stream.poll()
    source.answer()
    assert bytes(stream.take(10)) == source.bytes(0, 10)
    stream.close()
    stream.close()
    assert all(future.cancelled() for _, _, future in source.waiting)
    assert memory.used == 0


def test_a_failed_request_raises_where_its_bytes_would_be() -> None:
    memory = MemoryBudget(None)
    source = Source(4 * KIB, at_once=False)
    stream = ReadAhead(source.fetch, 0, 4 * KIB, ChunkPolicy(KIB, KIB, 4), memory)
    stream.poll()
    source.waiting[1][2].set_exception(ConnectionResetError(errno.ECONNRESET, "cut"))
    source.answer(0)
    assert b"".join(bytes(stream.take(KIB)) for _ in range(2)) == source.bytes(0, KIB)
    with pytest.raises(ConnectionResetError):
        stream.take(KIB)
    stream.close()
    assert memory.used == 0


@pytest.mark.parametrize("wrong", [b"", b"x" * 1023, b"x" * 1025])
def test_an_answer_of_another_length_is_an_error_and_no_shifted_file(wrong: bytes) -> None:
    future: Future[Pieces] = Future()
    future.set_result([wrong])
    memory = MemoryBudget(None)
    stream = ReadAhead(lambda start, stop: future, 0, 1024, POLICY, memory)
    with pytest.raises(OSError, match="1024"):
        stream.take(1024)
    stream.close()
    assert memory.used == 0


@pytest.mark.parametrize(
    ("options", "first", "largest"),
    [
        ({"buffer_size": 16 * MIB, "chunk": 128 * MIB, "limit": None, "streams": 0}, MIB, 16 * MIB),
        ({"buffer_size": 16 * MIB, "chunk": 4 * MIB, "limit": 4 * MIB, "streams": 2}, MIB, 4 * MIB),
        ({"buffer_size": 0, "chunk": None, "limit": None, "streams": 0}, LEAST_CHUNK, LEAST_CHUNK),
        ({"buffer_size": None, "chunk": 128 * MIB, "limit": None, "streams": 4}, LEAST_CHUNK, LEAST_CHUNK),
    ],
)
def test_the_flags_give_sizes(options: dict[str, int], first: int, largest: int) -> None:
    policy = ChunkPolicy.from_options(**options)  # type: ignore[arg-type]
    assert (policy.first, policy.largest) == (first, largest)
