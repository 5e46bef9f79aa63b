"""Filling cached files: shared and growing requests, bytes as they arrive, and what becomes of failures."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftpvfs.backend.backend import Deliver, Entry, Pieces
from ftpvfs.backend.capability import Capability
from ftpvfs.backend.checksum import Checksum
from ftpvfs.backend.chunks import ChunkPolicy
from ftpvfs.cache.downloader import Downloads, Reader
from ftpvfs.cache.ranges import RangeSet
from ftpvfs.errors import ECHANGED
from ftpvfs.memory import MemoryBudget
from ftpvfs.readiness import END, Awaited
from ftpvfs.vfs.cached import CachedReadHandle
from tests.conftest import Store
from tests.polling import awaited
from tests.servers import FaultProxy, wait_until

KIB, MIB = 2**10, 2**20
POLICY = ChunkPolicy(MIB, 4 * MIB)
SMALL = ChunkPolicy(64 * KIB, 256 * KIB)
MakeBackend = Callable[..., Any]
MakeProxy = Callable[[Any], FaultProxy]


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]  # no power of two, so that shifted bytes show


class Item:
    """A data file and what is present in it, as the cache keeps them, without records and leases."""

    def __init__(self, folder: Path, size: int, present: Sequence[tuple[int, int]] = (), data: bytes = b"") -> None:
        self.descriptor = os.open(folder / os.urandom(8).hex(), os.O_RDWR | os.O_CREAT)
        self.size = size
        self.is_dirty = self.is_verified = False
        self.present = RangeSet(present)
        self.users = 0
        self._lock = threading.Lock()
        os.truncate(self.descriptor, size)
        for start, stop in present:
            os.pwrite(self.descriptor, data[start:stop], start)

    @property
    def complete(self) -> bool:
        return self.present.covers(0, self.size)

    def ready(self, offset: int) -> int:
        with self._lock:
            return self.present.contiguous(offset)

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        with self._lock:
            return self.present.missing(start, min(stop, self.size))

    def add(self, start: int, pieces: Sequence[bytes]) -> None:
        stop = start + os.pwritev(self.descriptor, pieces, start)
        assert 0 <= start <= stop <= self.size
        with self._lock:
            self.present.add(start, stop)

    def drop(self, start: int, stop: int) -> None:
        with self._lock:
            self.present.remove(start, stop)
            self.is_verified = False

    def mark_verified(self) -> None:
        self.is_verified = True

    def acquire(self) -> bool:
        with self._lock:
            assert self.users > 0, "somebody uses an item that is closed"
            self.users += 1
            return True

    def release(self) -> None:
        with self._lock:
            self.users -= 1
            assert self.users >= 0

    def close(self) -> None:
        assert self.users == 0, f"{self.users} users are left"
        os.close(self.descriptor)


class Cached:
    """Files of one store, read through data files."""

    def __init__(self, backend: Any, folder: Path, policy: ChunkPolicy, limit: int | None, **options: Any) -> None:
        self.backend = backend
        self.folder = folder
        self.memory = MemoryBudget(limit)
        self.downloads = Downloads(backend, policy, self.memory, **options)
        self.items: dict[tuple[str, str | None], Item] = {}
        self.opened: list[Item] = []
        self._lock = threading.Lock()

    def item(self, path: str, entry: Entry) -> Item:
        key = path, entry.version
        with self._lock:
            if key not in self.items:
                self.keep(path, entry, Item(self.folder, entry.size))
            self.items[key].users += 1
            return self.items[key]

    def keep(self, path: str, entry: Entry, item: Item) -> None:
        self.items[path, entry.version] = item
        self.opened.append(item)

    def open(self, path: str, entry: Entry | None = None) -> CachedReadHandle:
        def open_at(version: Entry) -> Reader:
            return self.downloads.join(self.item(path, version), path, version)

        return CachedReadHandle(path, path, entry or self.backend.stat(path), open_at, lambda: self.backend.stat(path))

    def close(self) -> None:
        self.downloads.close()
        assert self.memory.used == 0
        for item in self.opened:
            item.close()


@pytest.fixture
def make(make_backend: MakeBackend, tmp_path: Path) -> Iterator[Callable[..., Cached]]:
    """make(store, policy=..., limit=..., **options of Downloads or of the backend) -> Cached."""
    made: list[Cached] = []

    def build(
        place: Any, policy: ChunkPolicy = POLICY, limit: int | None = None, *, verify: bool = True, **tuning: Any
    ) -> Cached:
        cached = Cached(make_backend(place, **tuning), tmp_path, policy, limit, verify=verify)
        made.append(cached)
        return cached

    yield build
    for cached in made:
        cached.close()


@pytest.fixture
def proxy(s3_store: Store, make_proxy: MakeProxy) -> FaultProxy:
    return make_proxy(s3_store)


def ranges_asked(proxy: FaultProxy) -> list[tuple[int, int]]:
    asked = []
    for request in proxy.seen:
        if request.method == "GET" and "range" in request.headers:
            start, stop = request.headers["range"].removeprefix("bytes=").split("-")
            asked.append((int(start), int(stop) + 1))
    return sorted(asked)


# --- on every store


def test_every_byte_is_right_wherever_it_is_read(store: Store, make: Callable[..., Cached]) -> None:
    data = pattern(3 * MIB + 12_345)
    store.write("a", data)
    cached = make(store, SMALL)
    random_ = random.Random(7)
    with cached.open("a") as handle:
        for _ in range(30):
            offset, size = random_.randrange(len(data)), random_.randrange(1, 300_000)
            handle.seek(offset)
            assert handle.read(size) == data[offset : offset + size], (offset, size)
        handle.seek(0)
        assert handle.read() == data
        assert handle.read(1) == b""
        assert handle.fileno() >= 0
    with cached.open("a") as handle:
        before = cached.downloads.stats()["requests"]
        assert handle.read() == data
        assert cached.downloads.stats()["requests"] == before


def test_an_empty_file_is_read(store: Store, make: Callable[..., Cached]) -> None:
    store.write("a", b"")
    with make(store).open("a") as handle:
        assert handle.read() == b""
        assert handle.poll() == END


def test_files_are_filled_while_the_store_is_silent_about_the_hashes_of_others(
    s3_store: Store, make: Callable[..., Cached]
) -> None:
    names = ["silent-1", "silent-2", "silent-3", "told"]
    for name in names:
        s3_store.write(name, pattern(10 * KIB))
    cached = make(s3_store)
    backend, hashes = cached.backend, dict[str, Future[Any]]()
    entries = {name: backend.stat(name) for name in names}
    backend.checksum = lambda entry: None  # as of an object in parts: the store must be asked

    def ask_checksum(path: str, entry: Entry) -> Future[Any]:
        hashes[path] = Future()
        if path == "told":
            hashes[path].set_result(None)
        return hashes[path]

    backend.ask_checksum = ask_checksum
    with contextlib.ExitStack() as opened:
        waiting = [opened.enter_context(cached.open(name, entries[name])) for name in names[:3]]
        answers = [handle.poll() for handle in waiting]
        wait_until(lambda: cached.downloads.stats()["requests"] == 3)
        with cached.open("told", entries["told"]) as handle:
            assert handle.read() == pattern(10 * KIB)
        assert all(isinstance(answer, Awaited) and not answer.future.done() for answer in answers)
        for name in names[:3]:
            hashes[name].set_result(None)
        assert all(handle.read() == pattern(10 * KIB) for handle in waiting)


# --- requests


@pytest.mark.parametrize("size", [1, 10 * KIB, MIB, MIB + MIB // 2])
def test_a_small_file_is_one_request_and_nothing_else(
    size: int, s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    s3_store.write("a", pattern(size))
    cached = make(s3_store.proxied(proxy))
    entry = cached.backend.stat("a")
    proxy.reset_counters()
    with cached.open("a", entry) as handle:
        assert handle.read() == pattern(size)
    assert dict(proxy.requests) == {"GET": 1}
    assert cached.items["a", entry.version].is_verified


def test_readers_of_one_file_share_its_requests(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    data = pattern(20 * MIB)
    s3_store.write("a", data)
    cached = make(s3_store.proxied(proxy), SMALL)
    entry = cached.backend.stat("a")
    proxy.reset_counters()

    def read(number: int) -> bool:
        with cached.open("a", entry) as handle:
            handle.seek(number % 2 * 10 * MIB)
            first = handle.read()
            handle.seek(0)
            return first == data[number % 2 * 10 * MIB :] and handle.read() == data

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(6)))
    asked = ranges_asked(proxy)
    assert sum(stop - start for start, stop in asked) == len(data)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(asked)), asked


def test_a_seek_far_ahead_does_not_fetch_the_middle(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    data = pattern(30 * MIB)
    s3_store.write("a", data)
    cached = make(s3_store.proxied(proxy))
    with cached.open("a") as handle:
        assert handle.read(1000) == data[:1000]
        handle.seek(25 * MIB)
        assert handle.read(1000) == data[25 * MIB : 25 * MIB + 1000]
        handle.seek(12 * MIB)
        assert handle.read(1000) == data[12 * MIB : 12 * MIB + 1000]
    places = {start // MIB for start, _ in ranges_asked(proxy)}
    assert places <= {0, 1, 12, 13, 25, 26}


def test_a_seek_does_not_wait_for_what_was_asked_before(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    data = pattern(30 * MIB)
    s3_store.write("a", data)
    cached = make(s3_store.proxied(proxy), ChunkPolicy(8 * MIB, 8 * MIB))
    with cached.open("a") as handle:
        proxy.bandwidth = 64 * KIB
        assert awaited(handle) is not None  # two minutes' worth
        wait_until(lambda: proxy.requests["GET"], what="the first range is on its way")
        handle.seek(29 * MIB + 900 * KIB)
        assert awaited(handle) is not None
        wait_until(lambda: proxy.requests["GET"] == 2, what="the other is, too")
        proxy.bandwidth = None
        assert handle.read() == data[29 * MIB + 900 * KIB :]
        assert handle.reader.item.ready(0) == 0, "what nobody wants any more was fetched"


def test_reading_a_little_of_a_large_file_stores_a_little(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    s3_store.write("a", pattern(40 * MIB))
    cached = make(s3_store.proxied(proxy), read_timeout=20.0)
    entry = cached.backend.stat("a")
    with cached.open("a", entry) as handle:
        assert handle.read(MIB) == pattern(MIB)
        wait_until(lambda: not cached.memory.used, what="what was asked ahead is here")
        asked = ranges_asked(proxy)
        assert handle.reader.item.present.total <= 4 * MIB
        assert handle.read(KIB)
    assert asked[0] == (0, MIB)


def test_bytes_are_read_while_the_rest_is_on_its_way(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    data = pattern(4 * MIB)
    s3_store.write("a", data)
    cached = make(s3_store.proxied(proxy), SMALL)
    with cached.open("a") as handle:
        proxy.bandwidth = MIB
        got = b""
        while len(got) < MIB:
            got += handle.read(100 * KIB)
        assert not handle.reader.item.complete
        with pytest.raises(OSError, match="whole"):
            handle.fileno()
        proxy.bandwidth = None
        assert got + handle.read() == data


def test_what_is_present_is_not_fetched_again(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached], tmp_path: Path
) -> None:
    data = pattern(6 * MIB)
    s3_store.write("a", data)
    cached = make(s3_store.proxied(proxy))
    entry = cached.backend.stat("a")
    item = Item(tmp_path, len(data), [(0, MIB), (2 * MIB, 5 * MIB), (6 * MIB - 10, 6 * MIB)], data)
    cached.keep("a", entry, item)
    with cached.open("a", entry) as handle:
        assert handle.read() == data
    assert sum(stop - start for start, stop in ranges_asked(proxy)) == 2 * MIB - 10


# --- memory and threads


def test_all_transfers_keep_to_one_budget_and_go_on(s3_store: Store, make: Callable[..., Cached]) -> None:
    data = pattern(6 * MIB)
    for number in range(8):
        s3_store.write(f"{number}", data)
    cached = make(s3_store, limit=2 * MIB)
    most = []

    def read(number: int) -> bool:
        with cached.open(f"{number}") as handle:
            got = []
            while piece := handle.read(256 * KIB):
                got.append(piece)
                most.append(cached.memory.used)
            return b"".join(got) == data

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert max(most) <= 2 * MIB + 8 * 256 * KIB


class Answers:
    """A store that answers when a test says so, in any order."""

    capability = Capability()

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.waiting: list[tuple[int, int, Deliver | None, Future[Pieces]]] = []
        self.lock = threading.Lock()

    def fetch(
        self, path: str, start: int, stop: int, fingerprint: str | None, deliver: Deliver | None = None
    ) -> Future[Pieces]:
        future: Future[Pieces] = Future()
        with self.lock:
            self.waiting.append((start, stop, deliver, future))
        return future

    def checksum(self, entry: Entry) -> None:
        return None

    def ask_checksum(self, path: str, entry: Entry) -> Future[None]:
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def end(self) -> None:
        """Nobody reads any more: what was asked for is cancelled, and its callbacks have run."""
        for *_, future in self.waiting:
            wait_until(future.cancelled, what="the requests end with the readers")

    def answer(self, number: int, error: OSError | None) -> None:
        with self.lock:
            start, stop, deliver, future = self.waiting.pop(number % len(self.waiting))
        if not future.set_running_or_notify_cancel():
            return
        middle = (start + stop) // 2
        pieces = [self.data[start:middle], self.data[middle:stop]]
        if deliver is not None:
            for piece in pieces[: 2 if error is None else 1]:
                deliver(piece)
        if error is None:
            future.set_result([] if deliver else pieces)
        else:
            future.set_exception(error)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_readers_that_jump_about_get_their_bytes_in_whatever_order_answers_come(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 400_000))
    answers = Answers(pattern(size))
    policy = ChunkPolicy(4 * KIB, 64 * KIB, data.draw(st.integers(0, 4)))
    limit = data.draw(st.one_of(st.none(), st.integers(0, 300_000)))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cleanup:
        cached = Cached(answers, Path(folder), policy, limit, read_ahead=data.draw(st.sampled_from([0, 50_000])))
        cleanup.callback(cached.close)
        cleanup.callback(answers.end)
        entry = Entry("a", is_dir=False, size=size)
        count = data.draw(st.integers(1, 3))
        handles = [cleanup.enter_context(cached.open("a", entry)) for _ in range(count)]
        for _ in range(data.draw(st.integers(1, 12))):
            handle = data.draw(st.sampled_from(handles))
            handle.seek(data.draw(st.integers(0, size)))
            position, wanted = handle.tell(), data.draw(st.integers(1, 100_000))
            got = b""
            failures = 0
            while len(got) < min(wanted, size - position):
                try:
                    waiter = awaited(handle)
                    if waiter is None:
                        got += handle.take(wanted - len(got))
                        continue
                except ConnectionResetError:
                    failures += 1
                    continue
                while not waiter.done() and answers.waiting:
                    is_cut = failures < 3 and data.draw(st.booleans())
                    error = ConnectionResetError(errno.ECONNRESET, "cut") if is_cut else None
                    answers.answer(data.draw(st.integers(0, 9)), error)
                wait_until(lambda waiter=waiter: waiter.done() or answers.waiting, what="an answer or a question")
            assert got == answers.data[position : position + len(got)]


def test_a_store_whose_client_waits_for_ever_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    answers = Answers(pattern(100 * KIB))
    cached = Cached(answers, tmp_path, SMALL, None, timeout=0.1)
    with cached.open("a", Entry("a", is_dir=False, size=100 * KIB)) as handle:
        with pytest.raises(OSError, match="answer") as caught:
            handle.read()
        assert caught.value.errno == errno.ETIMEDOUT
        waiter = awaited(handle)
        assert waiter is not None
        assert answers.waiting[0][-1].cancelled()
        answers.answer(-1, None)
        answers.answer(-1, None)
        waiter.result(timeout=10)
        assert handle.take(10) == answers.data[:10]
    cached.close()


# --- faults


def test_a_line_that_is_cut_once_is_not_noticed(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    data = pattern(3 * MIB)
    s3_store.write("a", data)
    cached = make(s3_store.proxied(proxy))
    proxy.reset_after(to_client=MIB // 2)
    with cached.open("a") as handle:
        assert handle.read() == data


def test_a_failure_is_an_error_and_the_next_read_asks_again(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    data = pattern(3 * MIB)
    s3_store.write("a", data)
    cached = make(s3_store.proxied(proxy), SMALL, low_level_retries=1)
    with cached.open("a") as handle:
        assert handle.read(100) == data[:100]
        wait_until(lambda: not cached.memory.used, what="what was asked ahead is here")
        present = handle.reader.item.ready(0)
        proxy.refuse = True
        assert handle.read(present - 100) == data[100:present], "what is present is served"
        with pytest.raises(OSError, match="a") as caught:
            handle.read(100)
        assert caught.value.errno
        proxy.refuse = False
        assert handle.read() == data[present:]


def test_a_store_that_is_down_serves_nothing_new_but_all_that_is_here(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    s3_store.write("a", pattern(MIB))
    cached = make(s3_store.proxied(proxy), low_level_retries=1)
    entry = cached.backend.stat("a")
    with cached.open("a", entry) as handle:
        handle.read()
    proxy.refuse = True
    with cached.open("a", entry) as handle:
        assert handle.read() == pattern(MIB)


def test_a_store_that_hangs_is_an_error_after_the_timeout(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    s3_store.write("a", pattern(MIB))
    cached = make(s3_store.proxied(proxy), read_timeout=1.0)
    entry = cached.backend.stat("a")
    proxy.black_hole = True
    with cached.open("a", entry) as handle:
        with pytest.raises(OSError, match="a") as caught:
            handle.read()
        assert caught.value.errno == errno.ETIMEDOUT
        proxy.black_hole = False
        assert handle.read() == pattern(MIB)


def test_fetching_ends_with_the_last_reader(s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]) -> None:
    s3_store.write("a", pattern(8 * MIB))
    cached = make(s3_store.proxied(proxy), ChunkPolicy(4 * MIB, 4 * MIB, 2))
    entry = cached.backend.stat("a")
    first, second = cached.open("a", entry), cached.open("a", entry)
    proxy.black_hole = True
    waiters = [awaited(handle) for handle in (first, second)]
    assert waiters[0] is not None
    first.close()
    assert isinstance(waiters[0].exception(timeout=10), OSError)
    assert cached.memory.used
    second.close()
    wait_until(lambda: not cached.memory.used, what="nothing is under way")
    assert cached.downloads.stats()["files"] == 0


def test_another_version_before_the_first_byte_is_read_instead(s3_store: Store, make: Callable[..., Cached]) -> None:
    s3_store.write("a", pattern(MIB))
    cached = make(s3_store)
    entry = cached.backend.stat("a")
    s3_store.write("a", b"newer and shorter")
    with cached.open("a", entry) as handle:
        assert handle.read() == b"newer and shorter"
        assert handle.size == len(b"newer and shorter")


@pytest.mark.parametrize("newer", [b"short", b"longer" * MIB])
def test_a_reader_never_gets_a_mix_of_versions(newer: bytes, s3_store: Store, make: Callable[..., Cached]) -> None:
    data = pattern(4 * MIB)
    s3_store.write("a", data)
    cached = make(s3_store, SMALL)
    entry = cached.backend.stat("a")
    handles = [cached.open("a", entry) for _ in range(3)]
    assert [handle.read(10) for handle in handles] == [data[:10]] * 3
    s3_store.write("a", newer)
    for handle in handles:
        got: list[bytes] = []
        with pytest.raises(OSError, match="a") as caught:
            got.extend(iter(partial(handle.read, 10 * KIB), b""))
        assert caught.value.errno == ECHANGED
        assert b"".join(got) == data[10 : handle.tell()][: sum(map(len, got))]
        handle.close()


def test_a_file_that_was_deleted_is_an_error_for_who_waits(s3_store: Store, make: Callable[..., Cached]) -> None:
    s3_store.write("a", pattern(4 * MIB))
    cached = make(s3_store, SMALL)
    entry = cached.backend.stat("a")
    s3_store.filesystem.rm_file(f"{s3_store.root}/a")
    with cached.open("a", entry) as handle, pytest.raises(FileNotFoundError):
        handle.read()


# --- damaged bytes


def test_a_byte_damaged_in_a_small_file_is_fetched_again_and_never_served(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    data = pattern(MIB)
    s3_store.write("a", data)
    cached = make(s3_store.proxied(proxy))
    proxy.flip_byte(500_000)
    with cached.open("a") as handle:
        handle.seek(400_000)
        assert handle.read(200_000) == data[400_000:600_000]
        handle.seek(0)
        assert handle.read() == data
    assert cached.downloads.stats()["damaged"] == 1


def test_a_small_file_that_is_damaged_each_time_is_an_error(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    s3_store.write("a", pattern(MIB))
    cached = make(s3_store.proxied(proxy))
    proxy.flip_byte(0, times=100)
    with cached.open("a") as handle:
        with pytest.raises(OSError, match="store has") as caught:
            handle.read()
        assert caught.value.errno == errno.EIO
        assert handle.reader.item.present.total == 0
        proxy.heal()
        assert handle.read() == pattern(MIB)


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_byte_damaged_in_a_large_file_fails_its_readers_and_nothing_of_it_stays(
    in_parts: bool, s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    data = pattern(17 * MIB)
    cached = make(s3_store.proxied(proxy), SMALL)
    if in_parts:
        upload = cached.backend.upload("a")
        upload.write(data)
        upload.commit()
    else:
        s3_store.write("a", data)
    entry = cached.backend.stat("a")
    assert ("-" in (entry.fingerprint or "")) is in_parts
    proxy.flip_byte(1000, target="a")
    first, second = cached.open("a", entry), cached.open("a", entry)
    second.take(10)
    with pytest.raises(OSError, match="store has") as caught:
        first.read()
    assert caught.value.errno == errno.EIO
    assert first.reader.item.present.total == 0
    with pytest.raises(OSError, match="store has"):
        second.verify()
    first.close()
    second.close()
    with cached.open("a", entry) as handle:
        assert handle.read() == data
        assert handle.reader.item.is_verified


def test_bytes_kept_from_before_are_checked_before_the_end(
    s3_store: Store, make: Callable[..., Cached], tmp_path: Path
) -> None:
    data = pattern(5 * MIB)
    s3_store.write("a", data)
    cached = make(s3_store)
    entry = cached.backend.stat("a")
    rotten = data[:100] + b"\0" + data[101:]
    cached.keep("a", entry, Item(tmp_path, len(data), [(0, len(data))], rotten))
    with cached.open("a", entry) as handle, pytest.raises(OSError, match="store has"):
        handle.read()
    with cached.open("a", entry) as handle:
        assert handle.read() == data


def test_nothing_is_checked_where_nothing_is_verified(
    s3_store: Store, proxy: FaultProxy, make: Callable[..., Cached]
) -> None:
    data = pattern(MIB)
    s3_store.write("a", data)
    cached = make(s3_store.proxied(proxy), verify=False)
    proxy.flip_byte(5)
    with cached.open("a") as handle:
        got = handle.read()
    assert [index for index, pair in enumerate(zip(got, data, strict=True)) if pair[0] != pair[1]] == [5]


def test_an_object_whose_etag_is_no_md5_is_served(s3_store: Store, make: Callable[..., Cached]) -> None:
    """As an object that the store encrypts: it looks like an MD5, and the store has to be asked what it is."""
    data = pattern(MIB)
    s3_store.write("a", data)
    cached = make(s3_store)
    entry = cached.backend.stat("a")
    cached.backend.checksum = lambda _: Checksum("md5", bytes(16))
    with cached.open("a", entry) as handle:
        assert handle.read() == data


@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_gcs_is_checked_too(store: Store, make_proxy: MakeProxy, make: Callable[..., Cached]) -> None:
    data = pattern(3 * MIB)
    store.write("small", data[:MIB])
    store.write("large", data)
    proxy = make_proxy(store)
    cached = make(store.proxied(proxy), SMALL)
    large = cached.open("large")
    proxy.flip_byte(5, target="large")
    with large as handle, pytest.raises(OSError, match="store has"):
        handle.read()
    with cached.open("large") as handle:
        assert handle.read() == data
    small = make(store.proxied(proxy))
    handle = small.open("small")
    proxy.flip_byte(5, target="small")
    with handle:
        assert handle.read() == data[:MIB]
    assert small.downloads.stats()["damaged"] == 1


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_who_asks_once_all_is_closed_hears_so(store: Store, make: Callable[..., Cached]) -> None:
    for path in ("a", "b", "c"):
        store.write(path, pattern(MIB))
    cached = make(store, POLICY)
    early, late = cached.open("a"), cached.open("b")
    assert early.reader.item.ready(0) == 0
    cached.downloads.close()
    with early, late:
        for handle in (early, late):  # joined before, and after
            for _ in range(2):
                with pytest.raises(OSError, match="closed") as caught:
                    handle.fill().result(timeout=20)
                assert caught.value.errno == errno.ECANCELED
