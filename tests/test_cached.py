"""Files written through the cache: as a file of Linux while they are open, and afterwards whole or not there."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftpvfs.backend.backend import open_backend
from ftpvfs.backend.chunks import ChunkPolicy
from ftpvfs.cache.cache import Cache
from ftpvfs.cache.downloader import Downloads
from ftpvfs.cache.index import Index
from ftpvfs.cache.item import Draft
from ftpvfs.config import VFSOptions
from ftpvfs.coordination.feed import ChangeFeed
from ftpvfs.errors import failure
from ftpvfs.memory import MemoryBudget
from ftpvfs.vfs.cached import CachedReadHandle, CachedWriteHandle
from ftpvfs.waiting import Wait, about_to_wait
from tests.conftest import Store
from tests.servers import FaultProxy, wait_until

KIB, MIB = 2**10, 2**20
OLD = bytes(range(251)) * 400
READ_WRITE = os.O_RDWR
APPEND = os.O_WRONLY | os.O_APPEND


class Files:
    """Files of a store, opened through a cache; what is published is kept here."""

    def __init__(self, backend: Any, folder: Path) -> None:
        self.backend = backend
        self.memory = MemoryBudget(None)
        self.index, self.feed = Index(folder), ChangeFeed(folder)
        self.cache = Cache(folder, self.index, VFSOptions(cache_mode="full"), feed=self.feed)
        self.downloads = Downloads(backend, ChunkPolicy(64 * KIB, 256 * KIB), self.memory)
        self.published: dict[str, bytes] = {}
        self.abandoned: list[str] = []

    def read(self, path: str) -> CachedReadHandle:
        def refresh() -> Any:
            return self.backend.stat(path)

        return CachedReadHandle(
            path, path, refresh(), lambda entry: self.downloads.join(self.cache.open_item(path, entry), path, entry),
            refresh,
        )  # fmt: skip

    def open(self, path: str, flags: int, **options: Any) -> CachedWriteHandle[Draft]:
        exists = True
        try:
            self.backend.stat(path)
        except FileNotFoundError:
            exists = False
        keeps = exists and not flags & os.O_TRUNC

        def begin(base: CachedReadHandle | None) -> Draft:
            return self.cache.draft(path, user="alice", base=None if base is None else base.reader.item)  # type: ignore[arg-type]

        def publish(draft: Draft, confirm: Callable[[], None]) -> None:
            confirm()
            data = draft.read(0, draft.size)
            self.cache.publish(draft, mtime=1.0, base=None)
            self.published[path] = data

        def give_up(draft: Draft) -> None:
            self.cache.abandon(draft)
            self.abandoned.append(path)

        arguments = {
            "begin": begin, "publish": publish, "give_up": give_up, "run": self.downloads.run,
            "base": self.read(path) if keeps else None, "creates": not keeps,
        }  # fmt: skip
        return CachedWriteHandle(path, path, flags, **{**arguments, **options})

    def close(self) -> None:
        self.downloads.close()
        assert self.memory.used == 0
        broken = self.cache.check()
        self.cache.close()
        self.feed.close()
        self.index.close()
        assert not broken

    @property
    def drafts(self) -> list[str]:
        return os.listdir(self.cache.folder / "incoming")


@pytest.fixture
def make(make_backend: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Files]]:
    made: list[Files] = []

    def build(store: Any, **tuning: Any) -> Files:
        files = Files(make_backend(store, **tuning), tmp_path / "cache" / f"{len(made)}")
        made.append(files)
        return files

    yield build
    for files in made:
        files.close()


@pytest.fixture
def files(local_store: Store, make: Callable[..., Files]) -> Files:
    local_store.write("old", OLD)
    return make(local_store)


# --- as Linux does it

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.binary(max_size=2000)),
        st.tuples(st.just("seek"), st.integers(0, 150_000)),
        st.tuples(st.just("read"), st.integers(1, 50_000)),
        st.tuples(st.just("truncate"), st.integers(0, 150_000)),
    ),
    max_size=12,
)


@settings(max_examples=30, deadline=None)
@given(
    operations=OPERATIONS,
    extra=st.sampled_from([0, os.O_APPEND, os.O_TRUNC, os.O_APPEND | os.O_TRUNC]),
    name=st.sampled_from(["old", "new"]),
)
def test_whatever_is_done_to_it_is_what_becomes_of_a_file(
    operations: list[tuple[str, Any]], extra: int, name: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        root.mkdir()
        (root / "old").write_bytes(OLD)
        (Path(folder) / "old").write_bytes(OLD)
        backend = open_backend(str(root))
        files = Files(backend, Path(folder) / "cache")
        flags = os.O_RDWR | os.O_CREAT | extra
        descriptor = os.open(Path(folder) / name, flags)
        handle = files.open(name, flags)
        try:
            with os.fdopen(descriptor, "rb+", buffering=0) as real:
                for what, argument in operations:
                    got, expected = getattr(handle, what)(argument), getattr(real, what)(argument)
                    assert got == expected, (what, argument)
                    assert (handle.tell(), handle.size) == (real.tell(), os.fstat(descriptor).st_size), what
            handle.commit()
            changed = name == "new" or extra & os.O_TRUNC or any(
                what == "truncate" or (what == "write" and argument) for what, argument in operations
            )
            assert (name in files.published) is bool(changed)
            assert files.published.get(name, OLD) == (Path(folder) / name).read_bytes()
        finally:
            handle.abandon()
            files.close()
            backend.close()


def test_pythons_own_tools_write_into_it(files: Files) -> None:
    with files.open("new.zip", READ_WRITE) as raw, zipfile.ZipFile(raw, "w") as archive:  # type: ignore[arg-type]
        archive.writestr("a", b"first")
        archive.writestr("b", b"second" * 1000)
    with zipfile.ZipFile(io.BytesIO(files.published["new.zip"])) as archive:
        assert archive.read("b") == b"second" * 1000
    with files.open("text", os.O_WRONLY) as handle, io.TextIOWrapper(handle, encoding="utf-8") as text:
        text.write("ä\n")
    assert files.published["text"] == "ä\n".encode()


# --- what is published, and what is not


def test_nothing_is_on_the_disk_before_the_first_byte(files: Files) -> None:
    for path, flags in (("new", os.O_WRONLY), ("old", APPEND), ("old", READ_WRITE)):
        handle = files.open(path, flags)
        assert handle.size == (len(OLD) if path == "old" else 0)
        assert files.drafts == []
        assert files.downloads.stats()["files"] == 0
        handle.abandon()
    assert files.abandoned == []


def test_an_empty_file_is_published_and_an_untouched_one_is_not(files: Files) -> None:
    files.open("new", os.O_WRONLY).close()
    files.open("old", READ_WRITE).close()
    files.open("old", APPEND).close()
    assert files.published == {"new": b""}
    files.open("old", os.O_WRONLY | os.O_TRUNC).close()
    assert files.published == {"new": b"", "old": b""}


def test_a_block_that_fails_publishes_nothing(files: Files) -> None:
    with pytest.raises(RuntimeError), files.open("old", READ_WRITE) as handle:  # noqa: PT012
        handle.write(b"half")
        raise RuntimeError
    assert files.published == {}
    assert files.abandoned == ["old"]
    assert handle.closed


def test_only_commit_publishes_where_close_does_not(files: Files) -> None:
    handle = files.open("new", os.O_WRONLY, autocommit=False)
    handle.write(b"bytes")
    handle.close()
    assert files.published == {}
    handle = files.open("new", os.O_WRONLY, autocommit=False)
    handle.write(b"bytes")
    handle.commit()
    handle.commit()
    assert handle.committed
    assert files.published == {"new": b"bytes"}


def test_a_handle_that_is_forgotten_publishes_nothing_and_leaves_its_partial(files: Files) -> None:
    handle = files.open("new", os.O_WRONLY)
    handle.write(b"bytes")
    del handle
    wait_until(lambda: files.abandoned, what="it is given up")
    assert files.published == {}


def test_after_an_error_nothing_can_be_published(files: Files) -> None:
    def begin(base: Any) -> Draft:
        raise failure(errno.ENOSPC, "new")

    handle = files.open("new", os.O_WRONLY, begin=begin)
    with pytest.raises(OSError, match="new") as caught:
        handle.write(b"bytes")
    assert caught.value.errno == errno.ENOSPC
    for use in (lambda: handle.write(b"more"), handle.commit):
        with pytest.raises(OSError, match="earlier") as caught:
            use()
        assert caught.value.errno == errno.ENOSPC
    assert handle.closed
    assert files.published == {}


@pytest.mark.parametrize("flags", [os.O_RDONLY | os.O_CREAT, os.O_WRONLY])
def test_what_the_flags_do_not_allow_is_ebadf(files: Files, flags: int) -> None:
    handle = files.open("new", flags)
    changes = (lambda: handle.write(b"a"), lambda: handle.truncate(0))
    for use in (lambda: handle.read(1),) if handle.writable() else changes:
        with pytest.raises(io.UnsupportedOperation) as caught:
            use()
        assert caught.value.errno == errno.EBADF
    handle.close()
    assert files.published == {"new": b""}


def test_a_file_that_is_made_and_read_is_empty(files: Files) -> None:
    with files.open("new", os.O_RDONLY | os.O_CREAT) as handle:
        assert handle.read() == b""


# --- resuming


def test_a_resume_goes_on_at_the_end_or_before_and_never_behind(files: Files) -> None:
    handle = files.open("old", os.O_WRONLY)
    with pytest.raises(OSError, match=str(len(OLD))) as caught:
        handle.resume(len(OLD) + 1)
    assert caught.value.errno == errno.EINVAL
    handle.resume(len(OLD))
    handle.write(b"the rest")
    handle.commit()
    assert files.published["old"] == OLD + b"the rest"
    handle = files.open("old", os.O_WRONLY)
    handle.resume(3)
    handle.write(b"xyz")
    handle.commit()
    assert files.published["old"] == OLD[:3] + b"xyz" + OLD[6:] + b"the rest"


def test_a_partial_is_gone_on_with(files: Files) -> None:
    handle = files.open("new", os.O_WRONLY, autocommit=False)
    handle.write(b"begun")
    handle.close()
    partial = files.cache.partial("new", "alice")
    assert partial is not None
    assert partial.size == 5
    handle = files.open("new", APPEND, begin=lambda _: files.cache.resume(partial), size=partial.size)
    assert handle.size == 5
    handle.write(b" and finished")
    handle.commit()
    assert files.published == {"new": b"begun and finished"}


# --- without waiting


def test_bytes_that_come_before_the_old_file_is_here_wait_for_it(
    s3_store: Store, make_proxy: Callable[[Any], FaultProxy], make: Callable[..., Files]
) -> None:
    s3_store.write("old", OLD * 5)
    proxy = make_proxy(s3_store)
    files = make(s3_store.proxied(proxy))
    handle = files.open("old", APPEND, autocommit=False)
    proxy.black_hole = True
    handle.accept(b"first")
    busy = handle.pressure()
    assert isinstance(busy, Future)
    assert not busy.done()
    assert files.drafts == []
    proxy.black_hole = False
    busy.result(timeout=20)
    assert handle.pressure() is None
    handle.accept(b", second")
    handle.commit()
    assert files.published["old"] == OLD * 5 + b"first, second"


def test_who_hands_in_bytes_does_not_wait_for_a_draft_that_takes_a_while(files: Files) -> None:
    threads: list[threading.Thread] = []
    handle = files.open("new", os.O_WRONLY, autocommit=False)
    handle.write(b"begun")
    handle.close()
    partial = files.cache.partial("new", "alice")
    assert partial is not None

    def resume(_: object) -> Draft:
        threads.append(threading.current_thread())
        return files.cache.resume(partial)

    def reserved(_: object) -> Draft:
        draft = files.cache.draft("other", user="alice")
        monkeypatch.setattr(draft, "reserve", lambda size: threads.append(threading.current_thread()))
        return draft

    handle = files.open("new", APPEND, begin=resume, size=partial.size)
    handle.accept(b" and finished")
    handle.commit()
    with pytest.MonkeyPatch.context() as monkeypatch:
        other = files.open("other", os.O_WRONLY, begin=reserved)
        other.reserve(10)
        other.accept(b"0123456789")
        other.commit()
    assert files.published == {"new": b"begun and finished", "other": b"0123456789"}
    assert len(threads) >= 2
    assert threading.current_thread() not in threads[:2]


@pytest.mark.parametrize("is_hopeless", [False, True])
def test_who_hands_in_bytes_does_not_make_room_for_them(
    files: Files, monkeypatch: pytest.MonkeyPatch, is_hopeless: bool
) -> None:
    threads: list[threading.Thread] = []
    is_full = True

    def make_room(need: int) -> bool:
        nonlocal is_full
        about_to_wait(Wait.DISK)
        threads.append(threading.current_thread())
        is_full = is_hopeless
        return True

    monkeypatch.setattr(files.cache.space, "make_room", make_room)
    monkeypatch.setattr(files.cache.files, "free", lambda: 0 if is_full else 2**40)
    handle = files.open("new", APPEND, autocommit=False)
    chunks = [b"%d " % number for number in range(100)]
    with pytest.raises(OSError, match="No space") if is_hopeless else contextlib.nullcontext():
        for chunk in chunks:
            handle.accept(chunk)
        handle.commit()
    handle.close()
    assert files.published == ({} if is_hopeless else {"new": b"".join(chunks)})
    assert threads
    assert threading.current_thread() not in threads


def test_giving_up_while_the_old_file_is_fetched_ends_the_fetching(
    s3_store: Store, make_proxy: Callable[[Any], FaultProxy], make: Callable[..., Files]
) -> None:
    s3_store.write("old", OLD * 5)
    proxy = make_proxy(s3_store)
    files = make(s3_store.proxied(proxy))
    handle = files.open("old", APPEND, autocommit=False)
    proxy.black_hole = True
    handle.accept(b"bytes")
    assert handle.pressure() is not None
    handle.abandon()
    wait_until(lambda: not files.memory.used, what="nothing is under way")
    assert files.published == {}
    assert files.drafts == []


def test_a_store_that_fails_fails_the_write(
    s3_store: Store, make_proxy: Callable[[Any], FaultProxy], make: Callable[..., Files]
) -> None:
    s3_store.write("old", OLD * 5)
    proxy = make_proxy(s3_store)
    files = make(s3_store.proxied(proxy), low_level_retries=1)
    handle = files.open("old", READ_WRITE)
    proxy.refuse = True
    with pytest.raises(OSError, match="old"):
        handle.write(b"bytes")
    proxy.refuse = False
    with pytest.raises(OSError, match="earlier"):
        handle.close()
    assert files.published == {}


def test_damaged_bytes_of_the_old_file_never_get_into_the_new_one(
    s3_store: Store, make_proxy: Callable[[Any], FaultProxy], make: Callable[..., Files]
) -> None:
    s3_store.write("old", OLD * 5)
    proxy = make_proxy(s3_store)
    files = make(s3_store.proxied(proxy))
    with files.open("old", READ_WRITE) as handle:
        proxy.flip_byte(1000)
        handle.write(b"bytes")
    assert files.downloads.stats()["damaged"] == 1
    assert files.published["old"] == b"bytes" + (OLD * 5)[5:]


def test_an_old_listing_does_not_append_at_the_wrong_place(s3_store: Store, make: Callable[..., Files]) -> None:
    s3_store.write("old", OLD)
    files = make(s3_store)
    handle = files.open("old", APPEND)
    s3_store.write("old", b"newer")
    handle.write(b" and more")
    handle.commit()
    assert files.published["old"] == b"newer and more"


def test_two_writers_of_one_file_never_mix(files: Files) -> None:
    first, second = files.open("old", READ_WRITE), files.open("old", READ_WRITE)
    barrier = threading.Barrier(2)

    def write(handle: Any, letter: bytes) -> None:
        for _ in range(20):
            barrier.wait(10)
            handle.write(letter * 1000)

    threads = [threading.Thread(target=write, args=pair) for pair in ((first, b"a"), (second, b"b"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first.close()
    assert files.published["old"] == b"a" * 20_000 + OLD[20_000:]
    second.close()
    assert files.published["old"] == b"b" * 20_000 + OLD[20_000:]
