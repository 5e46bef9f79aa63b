"""The cache of one store, in one process: what is published, read, renamed, deleted, uploaded and kept."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.backend.backend import Entry
from ftpvfs.cache.cache import Cache
from ftpvfs.cache.index import Index
from ftpvfs.cache.item import WORTH_RESUMING, Draft, Item
from ftpvfs.cache.left import LeftCache, left_caches
from ftpvfs.cache.ranges import RangeSet
from ftpvfs.clock import Clock
from ftpvfs.config import VFSOptions
from ftpvfs.coordination.feed import ChangeFeed


class MovingClock(Clock):
    """A clock that stands until it is moved."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


OPTIONS = VFSOptions(cache_mode="full")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk that syncs in no time, where there is one: these tests are about order, not about disks."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


@pytest.fixture
def folder(memory: Path) -> Path:
    return memory / "cache" / "s3-bucket"


@pytest.fixture
def clock() -> MovingClock:
    return MovingClock()


@pytest.fixture
def opened(folder: Path, clock: MovingClock) -> Iterator[Callable[..., Cache]]:
    """Open the cache, as often as a test likes; the options are keywords."""
    closing: list[Any] = []

    def open_cache(**options: Any) -> Cache:
        index, feed = Index(folder), ChangeFeed(folder)
        cache = Cache(folder, index, dataclasses.replace(OPTIONS, **options), clock=clock, feed=feed)
        closing.extend((cache, index, feed))
        return cache

    yield open_cache
    broken = [each.check() for each in closing if isinstance(each, Cache)]
    for each in closing:
        each.close()
    assert not any(broken), broken


@pytest.fixture
def cache(opened: Callable[..., Cache]) -> Cache:
    return opened()


def publish(cache: Cache, path: str, data: bytes, **known: Any) -> Any:
    draft = cache.draft(path, user="alice")
    draft.write(0, data)
    return cache.publish(draft, mtime=7.5, **{"base": None, **known})


def entry(path: str, data: bytes, fingerprint: str | None = "v1") -> Entry:
    return Entry(path.rpartition("/")[2], False, len(data), 7.5, fingerprint)


def contents(item: Item) -> bytes:
    """All bytes of a complete item, which is released."""
    try:
        assert item.complete
        return item._cache.files.pread(item.descriptor, item.size, 0)  # noqa: SLF001
    finally:
        item.release()


def read(cache: Cache, path: str) -> bytes:
    return contents(cache.open_item(path, entry(path, b"")))


# --- dirty files


def test_a_file_may_be_given_times_by_many_at_once(cache: Cache) -> None:
    publish(cache, "a", b"bytes")

    def touch(number: int) -> None:
        for _ in range(20):
            cache.touch("a", float(number))

    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(touch, number) for number in range(8)]:
            each.result()
    assert cache.check() == []


def test_a_time_that_comes_as_the_upload_ends_leaves_nothing_behind(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = publish(cache, "a", b"bytes")
    write_beside = cache.files.write_beside

    def as_the_upload_ends(*arguments: Any) -> Any:
        cache.uploaded(record, entry("a", b"bytes"))
        return write_beside(*arguments)

    monkeypatch.setattr(cache.files, "write_beside", as_the_upload_ends)
    with pytest.raises(FileNotFoundError):
        cache.touch("a", 1.0)
    assert cache.check() == []


def test_several_processes_may_restore_what_stands_beside_the_data_at_once(
    opened: Callable[..., Cache], folder: Path
) -> None:
    cache = opened()
    for number in range(100):
        publish(cache, str(number), b"bytes")
    for path in (folder / "data").glob("*.json"):
        path.unlink()
    with ThreadPoolExecutor(3) as pool:
        for each in [pool.submit(opened) for _ in range(3)]:
            each.result()
    assert cache.check() == []


def test_what_a_killed_process_was_writing_beside_a_file_is_removed(
    opened: Callable[..., Cache], folder: Path
) -> None:
    record = publish(opened(), "a", b"bytes")
    (folder / "data" / f"{record.beside}.json.new-0123456789abcdef").write_bytes(b"{")
    (folder / "incoming" / f"{record.beside}.json.new").write_bytes(b"{")
    cache = opened()
    assert cache.check() == []
    assert cache.recovered.quarantined == 0


def test_a_published_file_is_dirty_and_can_be_read(cache: Cache) -> None:
    record = publish(cache, "a/b", b"hello", base="old")
    assert cache.dirty("a/b") == record
    assert (record.size, record.mtime, record.base, record.user) == (5, 7.5, "old", "alice")
    assert read(cache, "a/b") == b"hello"
    assert [each.path for each in cache.dirty_in("a")] == ["a/b"]
    assert cache.dirty_in("") == []
    assert [each.path for each in cache.dirty_below("")] == ["a/b"]


def test_what_was_published_is_there_after_a_restart(opened: Callable[..., Cache]) -> None:
    record = publish(opened(), "a", b"hello")
    again = opened()
    assert again.all_dirty() == [record]
    assert read(again, "a") == b"hello"
    assert again.recovered.dirty == 1


def test_the_last_publish_wins_and_readers_keep_their_version(cache: Cache) -> None:
    publish(cache, "a", b"one", base="old")
    item = cache.open_item("a", entry("a", b""))
    record = publish(cache, "a", b"second", base="not asked again")
    assert record.base == "old", "the store still has what it had when the path became dirty"
    assert read(cache, "a") == b"second"
    assert contents(item) == b"one"


def test_a_draft_is_seen_by_nobody_until_it_is_published(cache: Cache) -> None:
    draft = cache.draft("a")
    draft.write(0, b"hello")
    assert cache.dirty("a") is None
    cache.abandon(draft)
    assert draft.closed
    assert cache.dirty("a") is None


def test_a_draft_is_written_anywhere_and_its_holes_are_zeros(cache: Cache) -> None:
    draft = cache.draft("a")
    draft.write(4, b"world")
    draft.write(0, b"he")
    draft.truncate(8)
    assert draft.read(0, 100) == b"he\0\0worl"
    cache.publish(draft, mtime=0.0, base=None)
    assert read(cache, "a") == b"he\0\0worl"


def test_a_draft_begins_with_what_it_is_based_on(cache: Cache) -> None:
    publish(cache, "a", b"hello")
    base = cache.open_item("a", entry("a", b""))
    draft = cache.draft("a", base=base)
    base.release()
    draft.write(draft.size, b" world")
    cache.publish(draft, mtime=0.0, base=None)
    assert read(cache, "a") == b"hello world"


def test_a_deleted_dirty_file_leaves_a_tombstone_where_something_may_be_at_the_store(cache: Cache) -> None:
    publish(cache, "new", b"x")
    cache.delete("new", at_store=False)
    assert cache.dirty("new") is None
    publish(cache, "old", b"x", base="v1")
    cache.delete("old", at_store=False)
    tried = publish(cache, "tried", b"x")
    assert cache.begin(tried)
    cache.delete("tried", at_store=False)
    cache.delete("clean", at_store=True)
    assert {each.path for each in cache.all_dirty()} == {"old", "tried", "clean"}
    assert all(each.is_tombstone for each in cache.all_dirty())
    with pytest.raises(FileNotFoundError):
        cache.open_item("old", entry("old", b""))


def test_a_renamed_dirty_file_moves_at_once(cache: Cache) -> None:
    publish(cache, "a", b"hello", base="v1")
    item = cache.open_item("a", entry("a", b""))
    moved = cache.rename("a", "d/b", source_at_store=True, target_base="w1")
    assert (moved.path, moved.base) == ("d/b", "w1")
    assert read(cache, "d/b") == b"hello"
    gone = cache.dirty("a")
    assert gone is not None
    assert gone.is_tombstone
    assert contents(item) == b"hello"
    with pytest.raises(FileNotFoundError):
        cache.rename("a", "c", source_at_store=False, target_base=None)


def test_all_below_a_folder_moves_in_one_step(cache: Cache, opened: Callable[..., Cache]) -> None:
    for path in ("d/a", "d/e/b", "other"):
        publish(cache, path, path.encode())
    cache.rename_below("d", "x/y")
    for each in (cache, opened()):
        assert {record.path for record in each.all_dirty()} == {"x/y/a", "x/y/e/b", "other"}
        assert read(each, "x/y/e/b") == b"d/e/b"


def test_a_touched_file_keeps_its_bytes(cache: Cache, opened: Callable[..., Cache]) -> None:
    before = publish(cache, "a", b"hello")
    assert cache.touch("a", 99.5).generation > before.generation
    again = opened()
    assert [each.mtime for each in again.all_dirty()] == [99.5]
    assert read(again, "a") == b"hello"
    with pytest.raises(FileNotFoundError):
        cache.touch("b", 1.0)


# --- write-back's side


def test_an_uploaded_file_is_clean_and_stays_in_mode_full(cache: Cache) -> None:
    record = publish(cache, "a", b"hello")
    assert cache.begin(record)
    assert cache.uploaded(record, entry("a", b"hello"))
    assert cache.dirty("a") is None
    found = cache.record("a")
    assert found is not None
    assert found.is_complete
    assert contents(cache.open_item("a", entry("a", b"hello"))) == b"hello"


def test_an_uploaded_file_goes_in_mode_writes(opened: Callable[..., Cache], folder: Path) -> None:
    cache = opened(cache_mode="writes")
    record = publish(cache, "a", b"hello")
    item = cache.open_item("a", entry("a", b""))
    assert cache.uploaded(record, entry("a", b"hello"))
    assert cache.record("a") is None
    assert list((folder / "data").iterdir()) == []
    assert contents(item) == b"hello"


def test_an_upload_that_was_overtaken_is_the_base_of_what_overtook_it(cache: Cache) -> None:
    first = publish(cache, "a", b"one")
    assert cache.begin(first)
    publish(cache, "a", b"two")
    assert not cache.begin(first)
    assert not cache.uploaded(first, entry("a", b"one", "v7"))
    second = cache.dirty("a")
    assert second is not None
    assert (second.base, second.base_known, second.attempted) == ("v7", True, True)


def test_where_versions_have_no_names_what_overtook_an_upload_knows_nothing_of_its_base(cache: Cache) -> None:
    first = publish(cache, "a", b"first")
    assert cache.begin(first)
    publish(cache, "a", b"second")
    assert not cache.uploaded(first, entry("a", b"first", None))
    record = cache.dirty("a")
    assert record is not None
    assert (record.base, record.base_known) == (None, False)


def test_a_delete_during_an_upload_deletes_what_the_upload_makes(cache: Cache) -> None:
    record = publish(cache, "a", b"one")
    assert cache.begin(record)
    cache.delete("a", at_store=False)
    assert not cache.uploaded(record, entry("a", b"one", "v7"))
    gone = cache.dirty("a")
    assert gone is not None
    assert gone.is_tombstone
    assert cache.begin(gone)
    cache.deleted(gone)
    assert cache.dirty("a") is None


def test_a_failure_is_told_and_kept(cache: Cache, opened: Callable[..., Cache]) -> None:
    record = publish(cache, "a", b"one")
    cache.failed(record, OSError(errno.ETIMEDOUT, "The store sleeps"), due=123.0)
    for each in (cache, opened()):
        found = each.dirty("a")
        assert found is not None
        assert (found.tries, found.error, found.due) == (1, "The store sleeps", 123.0)


def test_what_the_store_has_already_replaces_what_was_dirty(cache: Cache) -> None:
    publish(cache, "a", b"old")
    draft = cache.draft("a")
    draft.write(0, b"newer")
    cache.publish_clean(draft, entry("a", b"newer"))
    assert cache.dirty("a") is None
    assert contents(cache.open_item("a", entry("a", b"newer"))) == b"newer"


# --- clean items


def test_an_item_is_filled_and_remembered(cache: Cache, opened: Callable[..., Cache]) -> None:
    data = b"0123456789"
    item = cache.open_item("a", entry("a", data))
    assert item.missing(0, 100) == [(0, 10)]
    item.add(2, [data[2:4], data[4:6]])
    assert (item.ready(2), item.ready(0), item.complete) == (4, 0, False)
    assert item.missing(0, 10) == [(0, 2), (6, 10)]
    again = cache.open_item("a", entry("a", data))
    assert again is item
    again.release()
    item.release()
    cache.close()
    later = opened().open_item("a", entry("a", data))
    assert later.missing(0, 10) == [(0, 2), (6, 10)]
    later.release()


def test_another_version_is_another_file(cache: Cache) -> None:
    old = cache.open_item("a", entry("a", b"one", "v1"))
    old.add(0, [b"one"])
    new = cache.open_item("a", entry("a", b"twos", "v2"))
    assert new.missing(0, 4) == [(0, 4)]
    new.add(0, [b"twos"])
    assert contents(old) == b"one"
    assert contents(new) == b"twos"
    assert contents(cache.open_item("a", entry("a", b"twos", "v2"))) == b"twos"


def test_an_object_that_the_store_cannot_tell_from_another_is_never_taken_from_the_cache(cache: Cache) -> None:
    first = cache.open_item("a", entry("a", b"one", None))
    first.add(0, [b"one"])
    first.release()
    second = cache.open_item("a", entry("a", b"two", None))
    assert second.missing(0, 3) == [(0, 3)]
    second.release()


def test_who_waits_for_bytes_hears_when_they_are_there_or_will_not_come(cache: Cache) -> None:
    item = cache.open_item("a", entry("a", b"0123456789"))
    here, there, behind = item.wait(3), item.wait(8), item.wait(10)
    assert behind.done()
    item.add(0, [b"01234"])
    assert here.done()
    assert not there.done()
    item.fail(OSError(errno.EIO, "gone"))
    with pytest.raises(OSError, match="gone"):
        there.result(timeout=1)
    item.release()


def test_bytes_that_turn_out_wrong_are_missing_again(cache: Cache, opened: Callable[..., Cache]) -> None:
    item = cache.open_item("a", entry("a", b"0123456789"))
    item.add(0, [b"0123456789"])
    item.save()
    item.drop(0, 5)
    assert item.missing(0, 10) == [(0, 5)]
    item.release()
    cache.close()
    later = opened().open_item("a", entry("a", b"0123456789"))
    assert later.missing(0, 10) == [(0, 5)]
    later.release()


def test_a_renamed_object_keeps_what_is_cached_of_it(cache: Cache) -> None:
    item = cache.open_item("a", entry("a", b"hello"))
    item.add(0, [b"hello"])
    item.release()
    cache.rename_item("a", "b", entry("b", b"hello", "w1"))
    assert cache.record("a") is None
    assert contents(cache.open_item("b", entry("b", b"hello", "w1"))) == b"hello"


def test_a_forgotten_item_is_fetched_again(cache: Cache) -> None:
    item = cache.open_item("a", entry("a", b"hello"))
    item.add(0, [b"hello"])
    cache.forget_item("a")
    assert contents(item) == b"hello"
    again = cache.open_item("a", entry("a", b"hello"))
    assert again.missing(0, 5) == [(0, 5)]
    again.release()


# --- interrupted uploads


def interrupted(cache: Cache, data: bytes) -> Draft:
    draft = cache.draft("a", user="alice")
    draft.write(0, data)
    cache.abandon(draft)
    return draft


def test_what_came_of_an_interrupted_upload_can_be_gone_on_with(opened: Callable[..., Cache]) -> None:
    interrupted(opened(), b"hello")
    cache = opened()
    assert cache.partial("a", "bob") is None
    partial = cache.partial("a", "alice")
    assert partial is not None
    assert partial.size == 5
    draft = cache.resume(partial)
    assert cache.partial("a", "alice") is None
    with pytest.raises(FileNotFoundError):
        cache.resume(partial)
    draft.write(5, b" world")
    cache.publish(draft, mtime=0.0, base=None)
    assert read(cache, "a") == b"hello world"
    assert cache.partial("a", "alice") is None


def test_a_finished_upload_replaces_the_partial(cache: Cache, folder: Path) -> None:
    interrupted(cache, b"hello")
    publish(cache, "a", b"other")
    assert cache.partial("a", "alice") is None
    assert list((folder / "incoming").iterdir()) == []


def test_a_newer_partial_replaces_the_older(cache: Cache, folder: Path) -> None:
    interrupted(cache, b"hello")
    interrupted(cache, b"hi")
    partial = cache.partial("a", "alice")
    assert partial is not None
    assert partial.size == 2
    assert len(list((folder / "incoming").iterdir())) == 2
    cache.drop_partial("a")
    assert cache.partial("a", "alice") is None
    assert list((folder / "incoming").iterdir()) == []


def test_partials_are_not_kept_where_nobody_wants_them(opened: Callable[..., Cache], folder: Path) -> None:
    cache = opened(keep_partial="discard")
    interrupted(cache, b"hello")
    assert cache.partial("a", "alice") is None
    assert list((folder / "incoming").iterdir()) == []


def test_an_upload_that_cannot_be_noted_as_resumable_goes_on(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    data = bytes(WORTH_RESUMING + 1)
    draft = cache.draft("a", user="alice")
    with monkeypatch.context() as patch:
        patch.setattr(cache.files, "write_beside", full)
        draft.write(0, data)
    cache.publish(draft, mtime=1.0, base=None)
    assert read(cache, "a") == data


def test_what_was_not_written_in_one_go_cannot_be_gone_on_with(cache: Cache) -> None:
    draft = cache.draft("a", user="alice")
    draft.write(0, b"hello")
    draft.write(2, b"x")
    cache.abandon(draft)
    assert cache.partial("a", "alice") is None


# --- many at once


def test_threads_publish_at_once_and_lose_nothing(cache: Cache, opened: Callable[..., Cache]) -> None:
    def work(name: int) -> None:
        for number in range(20):
            publish(cache, f"d{name}/{number}", f"{name}-{number}".encode())

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = opened()
    assert len(again.all_dirty()) == 160
    assert read(again, "d3/7") == b"3-7"


def test_a_change_that_others_could_not_be_told_of_is_made_all_the_same(
    cache: Cache, opened: Callable[..., Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(feed: ChangeFeed, change: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ChangeFeed, "publish", refuse)
        publish(cache, "a", b"hello")
    assert read(cache, "a") == b"hello"
    assert read(opened(), "a") == b"hello"


def test_a_refused_change_does_not_hurt_those_beside_it(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    record = publish(cache, "a", b"x")
    cache.deleted(dataclasses.replace(record, generation=record.generation - 1))
    assert cache.dirty("a") is not None


# --- other processes, and other caches


def test_what_one_process_does_the_others_see_at_once(opened: Callable[..., Cache]) -> None:
    here, there = opened(), opened()
    record = publish(here, "d/a", b"hello")
    assert there.dirty("d/a") == record
    assert there.dirty_in("d") == there.dirty_below("") == [record]
    there.rename("d/a", "e/b", source_at_store=False, target_base=None)
    assert here.dirty("d/a") is None
    assert here.dirty_below("d") == []
    assert read(here, "e/b") == b"hello"
    moved = here.dirty("e/b")
    assert moved is not None
    assert here.uploaded(moved, entry("b", b"hello"))
    assert there.all_dirty() == []
    assert contents(there.open_item("e/b", entry("b", b"hello"))) == b"hello"


def test_a_file_that_another_process_has_just_replaced_is_still_read(opened: Callable[..., Cache]) -> None:
    here, there = opened(), opened()
    publish(here, "a", b"one")
    item = there.open_item("a", entry("a", b""))
    publish(here, "a", b"two")
    assert contents(item) == b"one"
    assert read(there, "a") == b"two"


def test_recovery_leaves_alone_what_another_process_is_writing(opened: Callable[..., Cache]) -> None:
    here = opened()
    draft = here.draft("a", user="alice")
    draft.write(0, b"x" * 300_000)
    there = opened()
    assert there.recovered.removed == there.recovered.partials == 0
    here.publish(draft, mtime=0.0, base=None)
    assert read(there, "a") == b"x" * 300_000


def test_what_a_killed_upload_has_brought_can_be_gone_on_with(opened: Callable[..., Cache]) -> None:
    here = opened()
    draft = here.draft("a", user="alice")
    for number in range(3):
        draft.write(number * 200_000, b"x" * 200_000)
    draft.close()  # as the kernel does when a process is killed
    there = opened()
    assert there.recovered.partials == 1
    partial = there.partial("a", "alice")
    assert partial is not None
    assert partial.size == 600_000


def test_two_processes_fill_one_item_together(opened: Callable[..., Cache]) -> None:
    here, there = opened(), opened()
    ours, theirs = here.open_item("a", entry("a", b"0123456789")), there.open_item("a", entry("a", b"0123456789"))
    assert ours.id == theirs.id
    ours.add(0, [b"01234"])
    theirs.add(5, [b"56789"])
    ours.save()
    theirs.save()
    ours.release()
    theirs.release()
    assert contents(opened().open_item("a", entry("a", b"0123456789"))) == b"0123456789"


def test_caches_that_hold_what_their_store_never_got_are_found(
    memory: Path, folder: Path, opened: Callable[..., Cache]
) -> None:
    cache = opened()
    publish(cache, "a", b"hello")
    publish(cache, "b", b"world")
    cache.delete("c", at_store=True)
    (folder.parent / "other").mkdir()
    assert left_caches(folder.parent) == [LeftCache("s3-bucket", files=2, deletions=1, size=10)]
    assert left_caches(folder.parent, served=[folder]) == []
    assert left_caches(memory / "nothing here") == []


READS: dict[str, tuple[Callable[[Item], Any], Any]] = {
    "complete": (lambda item: item.complete, True),
    "present": (lambda item: item.present, ((0, 100),)),
    "ready": (lambda item: item.ready(0), 100),
    "missing": (lambda item: item.missing(0, 100), []),
    "repr": (repr, "<Item 'a' 100/100>"),
}


@pytest.mark.parametrize("read", READS)
def test_nobody_reads_what_is_present_in_the_middle_of_a_change(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    """A change of a set of ranges is more than one step: of two lists, one after the other."""
    is_between, goes_on = threading.Event(), threading.Event()

    class Torn(RangeSet):
        __slots__ = ()

        def remove(self, start: int, stop: int) -> None:
            starts, self._starts = self._starts, []
            is_between.set()
            assert goes_on.wait(20)
            self._starts = starts
            super().remove(start, stop)

    monkeypatch.setattr("ftpvfs.cache.item.RangeSet", Torn)
    item = cache.open_item("a", entry("a", bytes(100)))
    item.add(0, [bytes(100)])
    look, expected = READS[read]
    found: list[Any] = []
    changing = threading.Thread(target=lambda: item.drop(0, 0))
    changing.start()
    assert is_between.wait(20)
    reading = threading.Thread(target=lambda: found.append(look(item)))
    reading.start()
    reading.join(0.5)  # it would look within that time, if it could
    goes_on.set()
    for each in (changing, reading):
        each.join()
    assert found == [expected]
    item.release()
