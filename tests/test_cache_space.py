"""The space that the cache takes: who goes, who never goes, and what an upload hears when there is no room."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.cache.cache import Cache
from ftpvfs.cache.census import GOOD_FOR
from ftpvfs.cache.files import Files, Place
from ftpvfs.cache.index import Index
from ftpvfs.cache.item import Draft
from ftpvfs.cache.space import PAUSE, STEP
from ftpvfs.config import VFSOptions
from ftpvfs.coordination.feed import ChangeFeed
from ftpvfs.errors import EFULL
from tests.conftest import wait_until
from tests.test_cache import MovingClock, clock, entry, folder, memory, opened, publish, read  # noqa: F401 - fixtures

KIB, MIB = 2**10, 2**20
Open = Callable[..., Cache]


def cached(cache: Cache, path: str, size: int) -> None:
    """Let the cache have all of an object of `size` bytes."""
    item = cache.open_item(path, entry(path, bytes(size)))
    item.add(0, [os.urandom(size)])
    item.save()
    item.release()


def is_cached(cache: Cache, path: str, size: int) -> bool:
    item = cache.open_item(path, entry(path, bytes(size)))
    try:
        return item.complete
    finally:
        item.release()


def test_what_nobody_has_used_for_too_long_goes(opened: Open, clock: MovingClock) -> None:  # noqa: F811
    cache = opened(cache_max_age=60.0)
    cached(cache, "old", KIB)
    cached(cache, "used", KIB)
    clock.now += 50
    assert is_cached(cache, "used", KIB)
    clock.now += 20
    found = cache.evict()
    assert (found.removed, found.in_use) == (1, 0)
    assert cache.record("old") is None
    assert is_cached(cache, "used", KIB)


def test_the_least_recently_used_make_room(opened: Open, clock: MovingClock) -> None:  # noqa: F811
    cache = opened(cache_max_size=MIB)
    for path in ("a", "b", "c", "d"):
        cached(cache, path, 300 * KIB)
        clock.now += 1
    assert is_cached(cache, "a", 300 * KIB)
    cache.evict()
    assert [is_cached(cache, path, 300 * KIB) for path in ("a", "c", "d")] == [True] * 3
    assert cache.record("b") is None


def test_size_is_what_is_really_used_on_the_disk(opened: Open) -> None:  # noqa: F811
    cache = opened(cache_max_size=MIB)
    item = cache.open_item("large", _large("large"))
    item.add(5 * 2**30, [b"x" * KIB])
    assert 0 < cache.usage().clean < 100 * KIB
    item.release()
    assert cache.evict().removed == 0


def _large(path: str) -> Any:
    found = entry(path, b"")
    found.size = 10 * 2**30
    return found


def test_what_is_open_in_any_process_stays(opened: Open, clock: MovingClock) -> None:  # noqa: F811
    cache, other = opened(cache_max_age=60.0), opened(cache_max_age=60.0)
    cached(cache, "a", KIB)
    item = other.open_item("a", entry("a", bytes(KIB)))
    clock.now += 100
    found = cache.evict()
    assert (found.removed, found.in_use) == (0, 1)
    assert item.complete
    item.release()
    clock.now += 100
    assert cache.evict().removed == 1


def test_what_is_dirty_stays_whatever_the_limits_say(opened: Open, clock: MovingClock) -> None:  # noqa: F811
    cache = opened(cache_max_age=1.0, cache_max_size=KIB)
    publish(cache, "a", b"x" * 100 * KIB)
    clock.now += 1000
    cache.evict()
    assert read(cache, "a") == b"x" * 100 * KIB


def test_partials_age_like_clean_files_and_make_room_after_them(opened: Open, clock: MovingClock) -> None:  # noqa: F811
    cache = opened(cache_max_age=60.0, cache_max_size=MIB)
    draft = cache.draft("p", user="alice")
    draft.write(0, os.urandom(700 * KIB))
    cache.abandon(draft)
    clock.now += 1
    cached(cache, "a", 700 * KIB)
    found = cache.evict()
    assert (found.removed, found.removed_partials) == (1, 0)
    assert cache.partial("p", "alice") is not None
    clock.now += 100
    assert cache.evict().removed_partials == 1
    assert cache.partial("p", "alice") is None


def test_space_can_be_reserved_and_what_was_not_used_is_given_back(opened: Open) -> None:  # noqa: F811
    cache = opened(cache_max_size=10 * MIB)
    draft = cache.draft("a")
    draft.reserve(4 * MIB)
    assert cache.usage().incoming >= 4 * MIB
    draft.write(0, b"hello")
    cache.publish(draft, mtime=0.0, base=None)
    assert cache.usage().taken < MIB
    assert read(cache, "a") == b"hello"
    larger = cache.draft("b")
    larger.reserve(11 * MIB)
    assert cache.usage().incoming >= 11 * MIB, "the limit is for what may be evicted"
    cache.abandon(larger)


def test_an_upload_that_needs_room_gets_that_of_clean_files(opened: Open) -> None:  # noqa: F811
    cache = opened(cache_max_size=20 * MIB)
    for number in range(4):
        cached(cache, f"c{number}", 4 * MIB)
    draft = cache.draft("a")
    for number in range(16):
        draft.write(number * MIB, bytes(MIB))
        pressure = draft.pressure()
        if pressure is not None:
            pressure.result(timeout=30)
    cache.publish(draft, mtime=0.0, base=None)
    assert cache.usage().taken <= 20 * MIB + STEP, "what was not counted yet may be too much"
    cache.evict()
    assert cache.usage().taken <= 20 * MIB


def test_an_upload_waits_while_write_back_makes_room(opened: Open, clock: MovingClock) -> None:  # noqa: F811
    cache = opened(cache_max_size=16 * MIB)
    record = publish(cache, "old", bytes(15 * MIB))
    draft = cache.draft("new")
    waiting = None
    for number in range(8):
        draft.write(number * MIB, bytes(MIB))
        waiting = waiting or draft.pressure()
    assert waiting is not None
    assert not waiting.done()
    assert cache.uploaded(record, entry("old", bytes(15 * MIB)))
    waiting.result(timeout=30)
    wait_until(lambda: draft.pressure() is None, timeout=30)
    draft.write(8 * MIB, bytes(MIB))
    cache.publish(draft, mtime=0.0, base=None)
    wait_until(lambda: cache.record("old") is None, timeout=30, what="clean now, it makes room")


def write_all(draft: Draft, size: int, *, pieces: int = MIB) -> float:
    """Write as an upload does: not before there is room for more. Return how many seconds that was waited for."""
    waited = 0.0
    for offset in range(0, size, pieces):
        draft.write(offset, bytes(min(pieces, size - offset)))
        pressure = draft.pressure()
        if pressure is not None:
            begin = time.monotonic()
            pressure.result(timeout=60)
            waited += time.monotonic() - begin
    return waited


def test_one_upload_may_be_larger_than_the_limit_of_the_cache(opened: Open) -> None:  # noqa: F811
    cache = opened(cache_max_size=MIB)
    drafts = [cache.draft(name) for name in ("a", "b")]
    for draft in drafts:
        waited = write_all(draft, 40 * MIB)
        assert waited < 0.9 * PAUSE * 40 * MIB / STEP, "nothing waits for the store, so there is nothing to wait for"
    for draft in drafts:
        cache.publish(draft, mtime=0.0, base=None)
    assert [record.size for record in cache.all_dirty()] == [40 * MIB] * 2


def test_uploads_go_on_slowly_while_the_store_takes_nothing(
    opened: Open, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    monkeypatch.setattr("ftpvfs.cache.space.PAUSE", 0.2)
    cache = opened(cache_max_size=MIB)
    hurried = threading.Event()
    cache.start(hurry=hurried.set)
    publish(cache, "old", bytes(3 * MIB))
    draft = cache.draft("new")
    assert write_all(draft, 5 * STEP) >= 4 * 0.2, "one pause for each step"
    assert hurried.is_set(), "write-back is to look"
    assert cache.wants_stored()
    cache.publish(draft, mtime=0.0, base=None)
    assert len(cache.all_dirty()) == 2


def test_what_another_process_has_stored_is_not_waited_for(opened: Open) -> None:  # noqa: F811
    cache, other = opened(cache_max_size=MIB), opened(cache_max_size=MIB)
    record = publish(other, "old", bytes(3 * MIB))
    cache.evict()
    assert cache.wants_stored()
    assert other.uploaded(record, entry("old", bytes(3 * MIB)))
    other.evict()
    assert not cache.wants_stored()


def test_a_publish_goes_on_while_the_cache_is_emptied(opened: Open, clock: MovingClock) -> None:  # noqa: F811
    cache = opened(cache_max_age=60.0)
    for number in range(2000):
        cached(cache, f"d/{number}", 10)
    clock.now += 100
    emptied = threading.Thread(target=cache.evict)
    emptied.start()
    published = 0
    while emptied.is_alive() or not published:
        publish(cache, f"n/{published}", b"x")
        published += 1
    emptied.join()
    assert cache.usage().clean == 0
    assert len(cache.all_dirty()) == published


class CountingFiles(Files):
    """Files that count how often somebody looks at all of them."""

    looks = 0

    def names(self, place: Place) -> Iterator[os.DirEntry[str]]:
        self.looks += 1
        return super().names(place)


def test_a_poll_looks_at_no_file_that_does_not_go(folder: Path, clock: MovingClock) -> None:  # noqa: F811
    files = CountingFiles(folder)
    with contextlib.closing(Index(folder)) as index:
        options = VFSOptions(cache_mode="full", cache_max_age=3600.0, cache_max_size=MIB)
        with contextlib.closing(Cache(folder, index, options, clock=clock, files=files)) as cache:
            cached(cache, "first", KIB)
            cache.evict()
            files.looks = 0
            for number in range(30):
                cached(cache, f"{number}", 100 * KIB)
                clock.now += 1
                cache.evict()
            assert files.looks == 0
            assert cache.usage().taken <= MIB
            assert is_cached(cache, "29", 100 * KIB)
            assert cache.record("first") is cache.record("0") is None


def test_many_small_files_count_for_what_they_take(opened: Open, clock: MovingClock) -> None:  # noqa: F811
    cache = opened(cache_max_size=MIB)
    cache.evict()
    for number in range(500):
        cached(cache, f"{number}", 10)
    cache.evict()
    assert cache.usage().taken <= MIB


def test_files_of_other_processes_are_found_by_the_next_look(opened: Open, clock: MovingClock) -> None:  # noqa: F811
    cache, other = opened(cache_max_age=60.0), opened(cache_max_age=60.0)
    cache.evict()
    cached(other, "a", KIB)
    clock.now += GOOD_FOR
    assert cache.evict().removed == 1


# --- a disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_loses_nothing_acknowledged_and_makes_room_from_clean_files(small_disk: Path) -> None:
    folder = small_disk / "cache"  # noqa: F811
    index, feed = Index(folder), ChangeFeed(folder)
    cache = Cache(folder, index, VFSOptions(cache_mode="full"), clock=MovingClock(), feed=feed)
    cached(cache, "clean", 8 * MIB)
    acknowledged = []
    with pytest.raises(OSError, match=r"space|full") as caught:  # noqa: PT012 - the one that does not fit any more
        for number in range(100):
            draft = cache.draft(f"{number}", user="alice")
            try:
                draft.write(0, bytes(512 * KIB))
                cache.publish(draft, mtime=0.0, base=None)
            except OSError:
                cache.abandon(draft)
                raise
            acknowledged.append(f"{number}")
    assert caught.value.errno == errno.ENOSPC
    assert len(acknowledged) > 16, "the clean file made room"
    assert [record.path for record in sorted(cache.all_dirty(), key=lambda each: each.generation)] == acknowledged
    assert cache.check() == []
    record = cache.dirty("0")
    assert record is not None
    cache.delete("0", at_store=False)
    publish(cache, "again", bytes(256 * KIB))
    assert cache.check() == []
    for each in (cache, index, feed):
        each.close()


def test_a_disk_that_is_full_to_the_last_byte_stops_neither_start_nor_write_back_nor_deletion(
    small_disk: Path, clock: MovingClock  # noqa: F811
) -> None:
    folder = small_disk / "cache"  # noqa: F811
    for _ in range(2):
        index = Index(folder)
        cache = Cache(folder, index, VFSOptions(cache_mode="writes"), clock=clock)
        records = [record for record in cache.all_dirty() if not record.is_tombstone]
        if records:
            first, second, *_ = records
            assert cache.begin(first)
            cache.failed(first, OSError(errno.EIO, "not yet"), due=0.0)
            assert cache.begin(first)
            assert cache.delete(second.path, at_store=True)
            assert cache.uploaded(first, entry(first.path, bytes(first.size)))
            assert cache.check() == []
        else:
            for number in range(20):
                publish(cache, f"{number}", bytes(512 * KIB))
        cache.close()
        index.close()
        with contextlib.suppress(OSError), open(small_disk / "fill", "ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    assert os.statvfs(small_disk).f_bavail == 0


@pytest.fixture
def short_disk(small_disk: Path, clock: MovingClock) -> Iterator[Cache]:  # noqa: F811
    """A cache that is to keep 6 MiB of those 16 free."""
    index = Index(small_disk / "cache")
    cache = Cache(small_disk / "cache", index, VFSOptions(cache_mode="full", cache_min_free_space=6 * MIB), clock=clock)
    yield cache
    cache.close()
    index.close()


def test_an_upload_is_refused_where_the_disk_is_really_short(short_disk: Cache) -> None:
    draft = short_disk.draft("a")
    with pytest.raises(OSError, match="short of space") as caught:
        write_all(draft, 100 * MIB)
    assert caught.value.errno == EFULL
    assert draft.size <= 12 * MIB
    for size in (0, 1):
        with pytest.raises(OSError, match="short of space") as caught:
            short_disk.space.admit(size)
        assert caught.value.errno == EFULL, "said before the first byte"
    short_disk.abandon(draft)
    short_disk.drop_partial("a")
    assert short_disk.space.admit(0) is None
    publish(short_disk, "b", b"x" * MIB)


def test_an_upload_is_let_in_once_write_back_has_made_room(short_disk: Cache) -> None:
    short_disk.start()
    record = publish(short_disk, "old", bytes(11 * MIB))
    assert short_disk.wants_stored()
    waiting = short_disk.space.admit(0)
    assert waiting is not None
    assert not waiting.done()
    assert short_disk.uploaded(record, entry("old", bytes(11 * MIB)))
    waiting.result(timeout=60)
    assert short_disk.space.admit(0) is None
    with pytest.raises(OSError, match="short of space") as caught:
        short_disk.space.admit(15 * MIB)
    assert caught.value.errno == errno.ENOSPC, "more than all that could be evicted"


def test_the_disk_is_kept_free(small_disk: Path, clock: MovingClock) -> None:  # noqa: F811
    folder = small_disk / "cache"  # noqa: F811
    index = Index(folder)
    cache = Cache(folder, index, VFSOptions(cache_mode="full", cache_min_free_space=6 * MIB), clock=clock)
    for number in range(3):
        cached(cache, f"c{number}", 4 * MIB)
        clock.now += 1
    cache.evict()
    assert cache.usage().free >= 6 * MIB
    assert is_cached(cache, "c2", 4 * MIB)
    cache.close()
    index.close()


# --- what a crash has left


def test_eviction_goes_on_after_a_mistake(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:
    cache = opened(cache_max_size=64 * KIB, cache_poll_interval=0.01)
    cached(cache, "a", 200 * KIB)
    evict = cache.space.evict
    mistakes = [ZeroDivisionError(), ZeroDivisionError(), ZeroDivisionError()]

    def mistaken() -> Any:
        if mistakes:
            raise mistakes.pop()
        return evict()

    monkeypatch.setattr(cache.space, "evict", mistaken)
    cache.start()
    wait_until(lambda: cache.record("a") is None)
    assert "ZeroDivisionError" in caplog.text
    caplog.clear()  # the traceback holds all that was open


def test_what_a_crash_has_left_of_clean_files_is_swept_away(
    opened: Open, folder: Path, clock: MovingClock  # noqa: F811
) -> None:
    cache = opened()
    for path in ("a", "b", "c"):
        cached(cache, path, KIB)
    (lost, kept, _) = (cache.record(path) for path in ("a", "b", "c"))
    assert lost is not None
    assert kept is not None
    (folder / "clean" / lost.id).unlink()
    (folder / "clean" / (16 * "e" + 16 * "f")).write_bytes(b"orphan")
    (folder / "clean" / "README").write_text("hello")
    clock.now = 1e12  # the orphan is old
    cache.sweep()
    assert cache.record("a") is None
    assert is_cached(cache, "b", KIB)
    assert len(list((folder / "clean").iterdir())) == 2
    assert (folder / "quarantine" / "README").exists()


def test_clean_files_that_were_not_synced_are_not_trusted_once_the_machine_has_stopped(
    folder: Path, clock: MovingClock, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    def is_cached_after(boot: str) -> bool:
        monkeypatch.setattr(Files, "boot", lambda self: boot)
        index = Index(folder)
        cache = Cache(folder, index, VFSOptions(cache_mode="full", cache_sync=False), clock=clock)
        try:
            found = is_cached(cache, "a", KIB)
            cached(cache, "a", KIB)
            return found
        finally:
            cache.close()
            index.close()

    assert [is_cached_after(boot) for boot in ("1", "1", "2", "2")] == [False, True, False, True]


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_a_publish_goes_on_while_100_000_files_are_removed(opened: Open, clock: MovingClock) -> None:  # noqa: F811
    cache = opened(cache_max_age=60.0)
    for number in range(100_000):
        cache.open_item(f"d/{number}", entry(f"d/{number}", b"12345")).release()
    clock.now += 100
    emptied = threading.Thread(target=cache.evict)
    emptied.start()
    waited = []
    while emptied.is_alive() or not waited:
        begin = time.monotonic()
        publish(cache, f"n/{len(waited)}", b"x")
        waited.append(time.monotonic() - begin)
    emptied.join()
    assert cache.usage().clean == 0
    assert len(cache.all_dirty()) == len(waited)
    waited.sort()
    print(f"{len(waited)} publishes: {waited[len(waited) // 2]:.4f} s at the median, {waited[-1]:.3f} s at most")
