"""The queue: everything acknowledged gets to the store once, in its newest form, whatever goes wrong on the way."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.backend import retry, s3
from ftpvfs.backend.backend import Entry
from ftpvfs.cache.cache import Cache
from ftpvfs.cache.index import Index
from ftpvfs.cache.records import DirtyRecord
from ftpvfs.cache.storing import SETTLED_AFTER, conflict_name
from ftpvfs.cache.uploadlog import UploadLog
from ftpvfs.cache.writeback import WriteBack
from ftpvfs.clock import Clock
from ftpvfs.config import VFSOptions
from ftpvfs.coordination.feed import ChangeFeed
from ftpvfs.coordination.locks import PathLocks
from tests.conftest import Store, wait_until
from tests.servers import FaultProxy
from tests.test_backend_faults import content, lose_answer

MIB = 2**20
REST = 5.0  # --vfs-write-back
START = 1_700_000_000.0


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.005)


class MovedClock(Clock):
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = START

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.now += seconds
        return event.is_set()


class Rig:
    """A cache with its write-back before a store, as one process has it; several on one folder are several."""

    def __init__(
        self, backend: Any, folder: Path, clock: MovedClock, options: VFSOptions
    ) -> None:
        self.backend = backend
        self.folder = folder
        self.clock = clock
        self.index = Index(folder)
        self.feed = ChangeFeed(folder)
        self.cache = Cache(folder, self.index, options, clock=clock, feed=self.feed)
        self.changes: list[tuple[str, Entry | None]] = []
        self.locks = PathLocks(folder)
        self.writeback = WriteBack(
            self.cache, backend, folder=folder, locks=self.locks, options=options,
            changed=lambda path, entry: self.changes.append((path, entry)), clock=clock,
        )  # fmt: skip
        self.is_open = True

    def publish(
        self, path: str, data: bytes, *, mtime: float = 1.5, base: str | None = None, base_known: bool = True
    ) -> DirtyRecord:
        draft = self.cache.draft(path, user="alice")
        draft.write(0, data)
        record = self.cache.publish(draft, mtime=mtime, base=base, base_known=base_known)
        self.writeback.received(record)
        return record

    def stored(self, path: str, data: bytes, mtime: float = 0.5) -> Entry:
        """Put an object into the store past the cache."""
        upload = self.backend.upload(path, mtime=mtime)
        upload.write(data)
        return upload.commit()

    def advance(self, seconds: float = REST) -> None:
        self.clock.now += seconds
        self.writeback.notify()

    def is_clean(self) -> bool:
        return not self.cache.all_dirty()

    def settle(self, seconds: float = REST) -> None:
        """Let the time pass and wait until all is stored."""
        self.advance(seconds)
        wait_until(self.is_clean, what="the queue is empty")

    def row(self, path: str) -> dict[str, Any]:
        (found,) = [row for row in self.writeback.queue() if row["path"] == path]
        return found

    def close(self, drain_timeout: float = 0.0) -> int:
        if not self.is_open:
            return 0
        self.is_open = False
        left = self.writeback.stop(drain_timeout)
        problems = self.cache.check()
        self.cache.close()
        self.feed.close()
        self.locks.close()
        self.index.close()
        assert problems == []
        return left


@pytest.fixture
def clock() -> MovedClock:
    return MovedClock()


@pytest.fixture
def make_rig(tmp_path: Path, make_backend: Callable[..., Any], clock: MovedClock) -> Iterator[Callable[..., Rig]]:
    """make_rig(store, **options) -> Rig, started and stopped when the test ends; all on one folder."""
    with contextlib.ExitStack() as cleanup:

        def make(store: Store, *, tuning: dict[str, Any] | None = None, start: bool = True, **options: Any) -> Rig:
            backend = make_backend(store, **(tuning or {}))
            rig = Rig(backend, tmp_path / "cache", clock, replace(VFSOptions(), **options))
            cleanup.callback(rig.close)
            if start:
                rig.writeback.start()
            return rig

        yield make


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, make_store: Any) -> Store:
    made: Store = make_store(request.param)
    return made


@pytest.fixture
def proxy(s3_store: Store, make_proxy: Any) -> FaultProxy:
    made: FaultProxy = make_proxy(s3_store)
    return made


@pytest.fixture
def far(make_rig: Callable[..., Rig], s3_store: Store, proxy: FaultProxy) -> Callable[..., Rig]:
    """far(**options) -> Rig behind the fault proxy."""
    return lambda **options: make_rig(
        s3_store.proxied(proxy), tuning={"low_level_retries": 1, **options.pop("tuning", {})}, **options
    )


def puts(proxy: FaultProxy) -> int:
    return sum(request.method == "PUT" for request in proxy.seen)


# -- delay and order


def test_a_file_is_stored_after_its_rest_with_its_time(store: Store, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(store)
    record = rig.publish("a.bin", b"bytes", mtime=1_234_567_890.5)
    assert rig.row("a.bin")["due"] == record.since + REST
    rig.advance(REST - 0.1)
    assert store.list() == set()

    rig.settle(0.1)
    assert store.read("a.bin") == b"bytes"
    assert store.mtime("a.bin") == 1_234_567_890.5
    assert rig.writeback.queue() == []
    wait_until(lambda: len(rig.changes) == 2)  # before the record goes, and after it
    path, entry = rig.changes[-1]
    assert entry is not None
    assert (path, entry.fingerprint) == ("a.bin", rig.backend.stat("a.bin").fingerprint)


def test_what_changes_is_looked_at_and_not_the_whole_queue(
    local_store: Store, make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def counted(cache: Cache) -> list[DirtyRecord]:
        looks.append(threading.current_thread().name)
        return all_dirty(cache)

    all_dirty = Cache.all_dirty
    monkeypatch.setattr(Cache, "all_dirty", counted)
    rig = make_rig(local_store)
    for number in range(50):
        rig.publish(f"{number}", b"bytes")
        rig.advance(1)
        wait_until(lambda number=number: len(local_store.list()) >= number - REST, what="what is due is stored")
    rig.settle()
    assert sum(name.startswith("ftpvfs-") for name in looks) < 10
    looks.clear()
    for number in range(50):
        rig.publish(f"{number}", b"newer", base_known=False)
    rig.writeback.sync()
    assert {local_store.read(name) for name in local_store.list()} == {b"newer"}
    assert len(looks) < 10


def test_only_the_newest_of_several_versions_is_sent(
    far: Callable[..., Rig], s3_store: Store, proxy: FaultProxy
) -> None:
    rig = far()
    for number in range(5):
        rig.publish("a", b"version %d" % number)
        rig.advance(1)
    rig.settle()
    assert s3_store.read("a") == b"version 4"
    assert puts(proxy) == 1


@pytest.mark.parametrize("is_asked", [False, True], ids=["waiting", "after a sync"])
def test_a_clock_that_is_set_back_keeps_nothing_from_the_store(
    make_rig: Callable[..., Rig], local_store: Store, clock: MovedClock, is_asked: bool
) -> None:
    rig = make_rig(local_store)
    if is_asked:
        rig.publish("before", b"x")
        rig.writeback.sync()
    else:
        rig.publish("waits", b"x")
    clock.now -= 3600
    rig.publish("a", b"x")
    assert rig.row("a")["due"] == clock.now + REST
    rig.settle()
    assert "a" in local_store.list()


def test_a_clock_that_was_set_back_makes_no_failure_be_tried_again_at_once(
    far: Callable[..., Rig], proxy: FaultProxy, clock: MovedClock
) -> None:
    rig = far()
    proxy.refuse = True
    rig.publish("a", b"x")
    clock.now -= 3600
    rig.writeback.notify()
    wait_until(lambda: rig.row("a")["tries"] == 1)
    assert clock.now < rig.row("a")["due"] <= clock.now + 300
    proxy.refuse = False
    rig.settle()


def test_an_empty_file_is_stored(store: Store, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(store, write_back=0.0)
    rig.publish("empty", b"")
    rig.settle(0)
    assert store.read("empty") == b""


def test_at_most_so_many_transfers_run_at_once(far: Callable[..., Rig], s3_store: Store, proxy: FaultProxy) -> None:
    rig = far(transfers=2, write_back=0.0)
    proxy.black_hole = True
    for number in range(6):
        rig.publish(f"f{number}", b"x")
    states = lambda: [row["state"] for row in rig.writeback.queue()]  # noqa: E731
    wait_until(lambda: states().count("uploading") == 2)
    assert states().count("waiting") == 4
    proxy.black_hole = False
    rig.settle()
    assert s3_store.list() == {f"f{number}" for number in range(6)}


# -- failures


def test_a_failure_is_shown_and_retried_later_and_later(
    far: Callable[..., Rig], s3_store: Store, proxy: FaultProxy, clock: MovedClock
) -> None:
    rig = far()
    rig.publish("a", b"x")
    proxy.fail_next(12, method="PUT")
    rig.advance()
    delays = []
    for tries in range(1, 13):
        wait_until(lambda tries=tries: rig.row("a")["tries"] == tries)  # type: ignore[misc]
        row = rig.row("a")
        assert row["state"] in ("failed", "uploading")
        assert "busy" in row["error"]
        delays.append(row["due"] - clock.now)
        rig.advance(row["due"] - clock.now)
    wait_until(rig.is_clean)

    assert s3_store.read("a") == b"x"
    for tries, delay in enumerate(delays):
        longest = min(300.0, 5.0 * 2**tries)
        assert longest * 0.75 <= delay <= longest


def test_a_store_that_is_away_loses_nothing(far: Callable[..., Rig], s3_store: Store, proxy: FaultProxy) -> None:
    rig = far()
    proxy.refuse = True
    files = {f"f{number}": b"%d" % number for number in range(20)}
    for path, data in files.items():
        rig.publish(path, data)
    rig.advance()
    wait_until(lambda: all(row["tries"] for row in rig.writeback.queue()), timeout=30)
    proxy.refuse = False
    rig.settle(10)
    assert {path: s3_store.read(path) for path in s3_store.list()} == files


def test_what_nobody_foresaw_does_not_end_the_queue(
    make_rig: Callable[..., Rig], local_store: Store, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    rig = make_rig(local_store)

    def broken(*arguments: Any, **keywords: Any) -> Any:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(rig.backend, "upload_file", broken)
        rig.publish("a", b"x")
        rig.advance()
        wait_until(lambda: rig.row("a")["tries"])
    assert "ZeroDivisionError" in rig.row("a")["error"]
    rig.settle(REST)
    assert local_store.read("a") == b"x"
    caplog.clear()  # the traceback holds all that was open


def test_a_folder_that_was_removed_is_made_again(make_rig: Callable[..., Rig], local_store: Store) -> None:
    rig = make_rig(local_store)
    rig.publish("a/b/c/file", b"x")
    rig.settle()
    assert local_store.read("a/b/c/file") == b"x"


# -- changes of what waits


def test_a_file_deleted_before_its_upload_is_never_sent(
    far: Callable[..., Rig], s3_store: Store, proxy: FaultProxy
) -> None:
    rig = far()
    rig.publish("a", b"x")
    rig.cache.delete("a", at_store=False)
    rig.publish("b", b"x")
    rig.settle()
    assert s3_store.list() == {"b"}
    assert puts(proxy) == 1


def test_a_delete_reaches_the_store(store: Store, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(store)
    rig.publish("a", b"x")
    rig.settle()
    rig.cache.delete("a", at_store=True)
    rig.settle()
    assert store.list() == set()
    wait_until(lambda: rig.changes[-1] == ("a", None))


def test_a_file_deleted_while_it_is_sent_is_gone_in_the_end(
    far: Callable[..., Rig], s3_store: Store, proxy: FaultProxy
) -> None:
    rig = far()
    proxy.bandwidth = 4 * MIB
    rig.publish("a", content(24 * MIB))
    rig.advance()
    wait_until(lambda: proxy.sent > MIB)
    rig.cache.delete("a", at_store=False)
    rig.writeback.notify()
    proxy.bandwidth = None
    rig.settle()
    assert s3_store.list() == set()
    assert s3_store.uploads() == set()


def test_a_new_version_ends_the_upload_of_the_old_one(
    far: Callable[..., Rig], s3_store: Store, proxy: FaultProxy
) -> None:
    rig = far()
    proxy.bandwidth = 4 * MIB
    rig.publish("a", content(200 * MIB))
    rig.advance()
    wait_until(lambda: proxy.sent > MIB)
    rig.publish("a", b"new")
    proxy.bandwidth = None
    rig.settle()
    assert s3_store.read("a") == b"new"
    assert proxy.sent < 150 * MIB
    assert s3_store.uploads() == set()


def test_a_renamed_file_is_stored_under_its_new_name_alone(
    far: Callable[..., Rig], s3_store: Store, proxy: FaultProxy
) -> None:
    rig = far()
    rig.publish("a.part", b"x")
    rig.cache.rename("a.part", "a", source_at_store=False, target_base=None)
    rig.settle()
    assert s3_store.list() == {"a"}
    assert puts(proxy) == 1


def test_a_file_renamed_while_it_is_sent_leaves_nothing_under_its_old_name(
    far: Callable[..., Rig], s3_store: Store, proxy: FaultProxy
) -> None:
    rig = far()
    data = content(24 * MIB)
    proxy.bandwidth = 4 * MIB
    rig.publish("a", data)
    rig.advance()
    wait_until(lambda: proxy.sent > MIB)
    rig.cache.rename("a", "b", source_at_store=False, target_base=None)
    rig.writeback.notify()
    proxy.bandwidth = None
    rig.settle()
    assert s3_store.list() == {"b"}
    assert s3_store.read("b") == data


# -- lost answers


def test_a_lost_answer_is_no_conflict_and_no_second_version(
    make_rig: Callable[..., Rig], s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(s3_store, conflict="keep-both", tuning={"low_level_retries": 1})
    lose_answer(monkeypatch, s3.S3Backend, "put_object")
    rig.publish("a", b"first")
    rig.advance()
    wait_until(lambda: rig.row("a")["tries"] == 1)
    rig.settle(REST)
    assert s3_store.list() == {"a"}


def test_a_newer_version_after_a_lost_answer_is_no_conflict(
    make_rig: Callable[..., Rig], s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(s3_store, conflict="fail", tuning={"low_level_retries": 1})
    lose_answer(monkeypatch, s3.S3Backend, "put_object")
    rig.publish("a", b"first")
    rig.advance()
    wait_until(lambda: rig.row("a")["tries"] == 1)
    rig.publish("a", b"second", mtime=2.5)
    rig.settle()
    assert s3_store.read("a") == b"second"


def test_it_is_no_conflict_either_when_the_process_died_in_between(
    make_rig: Callable[..., Rig], s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(s3_store, conflict="keep-both")
    with monkeypatch.context() as patch:
        patch.setattr(rig.cache, "uploaded", _dying)
        rig.publish("a", b"first")
        rig.advance()
        wait_until(lambda: rig.row("a")["tries"] == 1)
    assert s3_store.list() == {"a"}
    rig.close()

    again = make_rig(s3_store, conflict="keep-both")
    again.publish("a", b"second", mtime=2.5)
    again.settle()
    assert s3_store.read("a") == b"second"
    assert s3_store.list() == {"a"}


def _dying(record: DirtyRecord, entry: Entry) -> bool:
    raise OSError(errno.EIO, "the test ends the process here")


def test_a_delete_after_a_lost_answer_is_looked_at_once_more(
    make_rig: Callable[..., Rig], s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload may still be carried out behind the deletion's back."""
    rig = make_rig(s3_store, write_back=1.0, tuning={"low_level_retries": 1})
    lose_answer(monkeypatch, s3.S3Backend, "put_object")
    rig.publish("a", b"x")
    rig.advance(1)
    wait_until(lambda: rig.row("a")["tries"] == 1)
    rig.cache.delete("a", at_store=False)
    rig.advance(1)
    wait_until(lambda: s3_store.list() == set())
    rig.stored("a", b"x", mtime=1.5)  # the late one

    rig.settle(SETTLED_AFTER + REST)
    assert s3_store.list() == set()


@pytest.mark.parametrize("policy", ["overwrite", "keep-both"])
@pytest.mark.parametrize("comes", [True, False], ids=["late", "never"])
def test_an_upload_whose_answer_was_lost_does_not_replace_in_the_end_what_came_after_it(
    make_rig: Callable[..., Rig], s3_store: Store, monkeypatch: pytest.MonkeyPatch, policy: str, comes: bool
) -> None:
    """Not even where nobody knew what it was to replace, so that it was sent without a condition."""
    rig = make_rig(s3_store, write_back=1.0, conflict=policy, tuning={"low_level_retries": 1})
    lose_answer(monkeypatch, s3.S3Backend, "put_object")
    rig.publish("a", b"first", base_known=False)
    rig.advance(1)
    wait_until(lambda: rig.row("a")["tries"] == 1)
    rig.publish("a", b"second", mtime=2.5)
    rig.advance(1)
    wait_until(lambda: s3_store.read("a") == b"second")
    wait_until(lambda: rig.row("a")["due"] > rig.clock.now)
    if comes:
        rig.stored("a", b"first", mtime=1.5)
    rig.settle(SETTLED_AFTER)
    assert s3_store.read("a") == b"second"
    assert s3_store.list() == {"a"}


# -- conflicts


@pytest.mark.parametrize("size", [10, 17 * MIB])
@pytest.mark.parametrize("policy", ["overwrite", "keep-both", "fail"])
def test_a_change_by_others_is_dealt_with_as_the_user_said(
    make_rig: Callable[..., Rig], store: Store, policy: str, size: int
) -> None:
    rig = make_rig(store, conflict=policy)
    ours = content(size)
    before = rig.stored("a", b"before")
    record = rig.publish("a", ours, mtime=2.5, base=before.fingerprint)
    rig.stored("a", b"others", mtime=3.5)
    rig.advance()

    if policy == "fail":
        wait_until(lambda: rig.row("a")["tries"] == 1)
        row = rig.row("a")
        assert (row["state"], "--vfs-conflict is fail" in row["error"]) == ("failed", True)
        assert {path: store.read(path) for path in store.list()} == {"a": b"others"}
        return
    wait_until(rig.is_clean)
    if policy == "overwrite":
        expected = {"a": ours}
    else:
        expected = {"a": b"others", conflict_name("a", record.since): ours}
    assert {path: store.read(path) for path in store.list()} == expected


@pytest.fixture
def timeless(make_rig: Callable[..., Rig], local_store: Store) -> Callable[..., Rig]:
    """timeless(**options) -> Rig before a store that keeps no modification times."""

    def make(**options: Any) -> Rig:
        rig = make_rig(local_store, **options)
        rig.backend.capability = replace(rig.backend.capability, sets_mtime=False)
        return rig

    return make


def test_where_no_times_are_kept_a_version_of_equal_length_is_not_taken_for_ones_own(
    timeless: Callable[..., Rig], local_store: Store
) -> None:
    rig = timeless(conflict="keep-both")
    before = rig.stored("a", b"before")
    record = rig.publish("a", b"ours", base=before.fingerprint)
    local_store.write("a", b"them")
    rig.settle()
    assert local_store.read("a") == b"them"
    assert local_store.read(conflict_name("a", record.since)) == b"ours"


def test_where_no_times_are_kept_ones_own_version_is_known_by_its_bytes(
    timeless: Callable[..., Rig], local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = timeless(conflict="keep-both")
    with monkeypatch.context() as patch:
        patch.setattr(rig.cache, "uploaded", _dying)
        rig.publish("a", b"first")
        rig.advance()
        wait_until(lambda: rig.row("a")["tries"] == 1)
    rig.close()
    again = timeless(conflict="keep-both")
    again.publish("a", b"second", mtime=2.5)
    again.settle(2 * REST)
    assert local_store.list() == {"a"}
    assert local_store.read("a") == b"second"


@pytest.mark.parametrize("name", ["a", "n" * 250 + ".txt", "\u00e4" * 120 + ".txt"], ids=["short", "long", "umlauts"])
def test_both_are_kept_whatever_the_names_are(make_rig: Callable[..., Rig], local_store: Store, name: str) -> None:
    rig = make_rig(local_store, conflict="keep-both")
    before = rig.stored(name, b"before")
    record = rig.publish(name, b"ours", base=before.fingerprint)
    taken, free = (conflict_name(name, record.since, number) for number in (1, 2))
    rig.stored(name, b"theirs")
    rig.stored(taken, b"somebody's")
    rig.settle()
    found = {path: local_store.read(path) for path in local_store.list()}
    assert found == {name: b"theirs", taken: b"somebody's", free: b"ours"}


def test_a_copy_beside_whose_answer_was_lost_is_not_made_twice(
    make_rig: Callable[..., Rig], s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(s3_store, conflict="keep-both")
    before = rig.stored("a", b"before")
    record = rig.publish("a", b"ours", base=before.fingerprint)
    rig.stored("a", b"theirs", mtime=3.5)
    with monkeypatch.context() as patch:
        patch.setattr(rig.cache, "uploaded", _dying)
        rig.advance()
        wait_until(lambda: rig.row("a")["tries"] == 1)
    rig.settle(2 * REST)
    assert s3_store.list() == {"a", conflict_name("a", record.since)}


@pytest.mark.parametrize("policy", ["overwrite", "keep-both", "fail"])
def test_a_file_that_others_changed_is_deleted_as_the_user_said(
    make_rig: Callable[..., Rig], store: Store, policy: str
) -> None:
    rig = make_rig(store, conflict=policy)
    before = rig.stored("a", b"before")
    rig.publish("a", b"ours", base=before.fingerprint)
    rig.cache.delete("a", at_store=False)
    rig.stored("a", b"others", mtime=3.5)
    rig.advance()
    if policy == "fail":
        wait_until(lambda: rig.row("a")["tries"] == 1)
    else:
        wait_until(rig.is_clean)
    assert store.list() == (set() if policy == "overwrite" else {"a"})


def test_a_new_file_does_not_silently_replace_one_that_came_first(
    make_rig: Callable[..., Rig], store: Store
) -> None:
    rig = make_rig(store, conflict="keep-both")
    record = rig.publish("a", b"ours", base=None)
    rig.stored("a", b"others", mtime=3.5)
    rig.settle()
    assert store.read("a") == b"others"
    assert store.read(conflict_name("a", record.since)) == b"ours"


# -- several processes, start and stop


def test_another_process_takes_over(make_rig: Callable[..., Rig], store: Store) -> None:
    first, second = make_rig(store), make_rig(store)
    first.publish("a", b"x")
    first.settle()
    wait_until(lambda: first.changes)
    assert not second.changes
    first.close()
    second.publish("b", b"y")
    second.settle()
    assert store.list() == {"a", "b"}


def test_two_processes_do_not_send_the_same_file(
    far: Callable[..., Rig], s3_store: Store, proxy: FaultProxy, pool: ThreadPoolExecutor
) -> None:
    rigs = [far(), far()]
    proxy.delay = 0.05
    rigs[0].publish("a", b"x")
    calls = [pool.submit(rig.writeback.upload_now, "a") for rig in rigs for _ in range(2)]
    for call in calls:
        call.result(timeout=30)
    assert puts(proxy) == 1
    assert s3_store.read("a") == b"x"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def test_what_is_left_is_stored_at_the_next_start(make_rig: Callable[..., Rig], store: Store) -> None:
    rig = make_rig(store)
    rig.publish("a", b"x")
    assert rig.close() == 1
    assert store.list() == set()

    again = make_rig(store)
    again.settle()
    assert store.read("a") == b"x"


def test_stopping_drains_what_waits(make_rig: Callable[..., Rig], store: Store) -> None:
    rig = make_rig(store)
    for number in range(20):
        rig.publish(f"f{number}", b"x")
    assert rig.close(drain_timeout=30) == 0
    assert len(store.list()) == 20


def test_stopping_does_not_wait_for_a_dead_store_longer_than_it_is_told(
    far: Callable[..., Rig], proxy: FaultProxy
) -> None:
    rig = far(write_back=0.0)
    proxy.refuse = True
    rig.publish("a", b"x")
    assert rig.close(drain_timeout=0.3) == 1


def test_sync_stores_all_at_once_from_any_process(make_rig: Callable[..., Rig], store: Store) -> None:
    leader, other = make_rig(store, write_back=3600.0), make_rig(store, write_back=3600.0)
    leader.publish("a", b"x")
    other.publish("b", b"y")
    other.writeback.sync(30)
    assert store.list() == {"a", "b"}
    leader.writeback.sync(0)


def test_sync_raises_what_still_fails(far: Callable[..., Rig], proxy: FaultProxy) -> None:
    rig = far(write_back=3600.0)
    rig.publish("a", b"x")
    proxy.fail_next(100, method="PUT", status=403, code="AccessDenied")
    with pytest.raises(OSError, match="denies access") as failed:
        rig.writeback.sync()
    assert failed.value.filename == "a"
    with pytest.raises(OSError, match="denies access"):
        rig.writeback.upload_now("a")


# -- news


def test_programs_hear_of_what_was_received_and_stored(make_rig: Callable[..., Rig], store: Store) -> None:
    heard: list[dict[str, Any]] = []
    rig = make_rig(store, on_received=heard.append, on_stored=heard.append)
    rig.publish("a", b"bytes")
    wait_until(lambda: heard)
    rig.settle()
    wait_until(lambda: len(heard) == 2)

    received, stored = heard
    assert (received["event"], received["path"], received["size"], received["user"]) == ("received", "a", 5, "alice")
    assert (stored["event"], stored["fingerprint"]) == ("stored", rig.backend.stat("a").fingerprint)


def test_programs_hear_of_a_failure_after_so_many_tries(
    far: Callable[..., Rig], proxy: FaultProxy, clock: MovedClock
) -> None:
    heard: list[dict[str, Any]] = []
    rig = far(on_failed=heard.append, failed_after=3)
    proxy.fail_next(100, method="PUT", status=403, code="AccessDenied")
    rig.publish("a", b"x")
    rig.advance()
    for tries in range(1, 5):
        wait_until(lambda tries=tries: rig.row("a")["tries"] == tries)  # type: ignore[misc]
        rig.advance(300)
    wait_until(lambda: heard)
    (event,) = heard
    assert (event["event"], event["tries"], "denies" in event["error"]) == ("failed", 3, True)


def test_news_that_were_not_taken_are_told_again_also_after_a_restart(
    make_rig: Callable[..., Rig], local_store: Store
) -> None:
    heard: list[dict[str, Any]] = []
    refusals = 2

    def listener(event: dict[str, Any]) -> None:
        nonlocal refusals
        heard.append(event)
        if refusals:
            refusals -= 1
            raise RuntimeError("not now")

    rig = make_rig(local_store, on_stored=listener)
    rig.publish("a", b"x")
    rig.settle()
    wait_until(lambda: len(heard) == 1)
    rig.close()
    again = make_rig(local_store, on_stored=listener)
    wait_until(lambda: len(heard) == 2)
    again.advance(2)
    wait_until(lambda: len(heard) == 3)
    assert len({event["id"] for event in heard}) == 1


def test_news_that_cannot_be_written_down_change_nothing_and_are_told_later(
    far: Callable[..., Rig], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[dict[str, Any]] = []
    rig = far(on_received=heard.append, on_failed=heard.append, failed_after=1)

    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    proxy.refuse = True
    with monkeypatch.context() as patch:
        patch.setattr(UploadLog, "add_event", full)
        rig.publish("a", b"x")
        rig.advance()
        wait_until(lambda: rig.row("a")["tries"])
        assert rig.row("a")["due"] > rig.clock.now
    assert "cannot be written down" in caplog.text
    proxy.refuse = False
    rig.settle(300)
    wait_until(lambda: len(heard) == 2)
    assert {event["event"] for event in heard} == {"received", "failed"}


def test_a_command_gets_the_news_as_json_and_as_variables(
    make_rig: Callable[..., Rig], local_store: Store, tmp_path: Path
) -> None:
    script = tmp_path / "hook"
    script.write_text(f'#!/bin/sh\ncat > {tmp_path}/got.tmp\necho "$FTP_EVENT $FTP_EVENT_PATH" >> {tmp_path}/got.tmp\n'
                      f"mv {tmp_path}/got.tmp {tmp_path}/got\n")  # fmt: skip
    script.chmod(0o755)
    rig = make_rig(local_store, on_stored=str(script))
    rig.publish("a b", b"x")
    rig.settle()
    wait_until((tmp_path / "got").exists)
    assert (tmp_path / "got").read_text().startswith("{")
    assert (tmp_path / "got").read_text().endswith("stored a b\n")


def test_a_url_gets_the_news(make_rig: Callable[..., Rig], local_store: Store, make_hook: Any) -> None:
    url, posts = make_hook()
    rig = make_rig(local_store, on_stored=url)
    rig.publish("a", b"x")
    rig.settle()
    wait_until(lambda: posts)
    assert posts[0]["path"] == "a"


@pytest.fixture
def make_hook() -> Iterator[Callable[[], tuple[str, list[dict[str, Any]]]]]:
    """make_hook() -> (URL, what was posted there)."""
    import json
    from http.server import BaseHTTPRequestHandler, HTTPServer

    with contextlib.ExitStack() as cleanup:

        def make() -> tuple[str, list[dict[str, Any]]]:
            posts: list[dict[str, Any]] = []

            class Hook(BaseHTTPRequestHandler):
                def do_POST(self) -> None:
                    posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                    self.send_response(204)
                    self.end_headers()

                def log_message(self, *arguments: object) -> None:
                    pass

            server = HTTPServer(("127.0.0.1", 0), Hook)
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            cleanup.callback(server.server_close)
            cleanup.callback(thread.join)
            cleanup.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}/hook", posts

        yield make


def test_many_small_files_of_one_moment_are_all_stored(make_rig: Callable[..., Rig], local_store: Store) -> None:
    rig = make_rig(local_store, write_back=0.0)
    for number in range(300):
        rig.publish(f"f{number}", b"%d" % number)
    deadline = time.monotonic() + 60
    rig.writeback.sync(deadline - time.monotonic())
    assert len(local_store.list()) == 300
