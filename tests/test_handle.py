"""Open files as Python programs use them, on every store, and what becomes of them when something fails."""

from __future__ import annotations

import csv
import errno
import gc
import gzip
import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

import pytest

from ftpvfs.backend.backend import Entry, Pieces
from ftpvfs.backend.chunks import ChunkPolicy
from ftpvfs.errors import ECHANGED, failure
from ftpvfs.memory import MemoryBudget
from ftpvfs.vfs.handle import Handle, ReadHandle, WriteHandle
from ftpvfs.vfs.readahead import ReadAhead
from tests.conftest import Store

LINES = b"".join(b"line %d\n" % number for number in range(5000))
MakeVFS = Callable[..., Any]


# --- reading, on real stores


@pytest.fixture
def handle(store: Store, make_vfs: MakeVFS, tmp_path: Any) -> Any:
    """LINES, open for reading in chunks so small that everything crosses their borders."""
    store.write("lines.txt", LINES)
    vfs = make_vfs(store, cache_dir=str(tmp_path / "cache"), read_chunk_size="256k", buffer_size="256k")
    with vfs.open("lines.txt") as handle:
        yield handle


def test_read_gives_what_was_asked_for_and_then_the_end(handle: Any) -> None:
    assert handle.readable()
    assert not handle.writable()
    assert handle.mode == "rb"
    assert handle.size == len(LINES)
    assert handle.read(7) == LINES[:7]
    assert handle.read(0) == b""
    assert handle.tell() == 7
    assert handle.read(30_000) == LINES[7:30_007]
    assert handle.read() == LINES[30_007:]
    assert handle.read() == handle.read(5) == b""
    assert handle.tell() == len(LINES)


def test_seek_knows_all_three_bases(handle: Any) -> None:
    assert handle.seekable()
    assert handle.seek(-5, io.SEEK_END) == len(LINES) - 5
    assert handle.read() == LINES[-5:]
    assert handle.seek(100) == 100
    assert handle.seek(20, io.SEEK_CUR) == 120
    assert handle.read(5) == LINES[120:125]
    assert handle.seek(len(LINES) + 100) == len(LINES) + 100
    assert handle.read(5) == b""
    assert handle.seek(0) == 0
    assert handle.read(3) == LINES[:3]


def test_a_position_that_does_not_exist_is_einval_and_changes_nothing(handle: Any) -> None:
    for offset, whence in [(-1, 0), (-1, 1), (-(10**9), 2), (0, 3), (0, -1)]:
        with pytest.raises(OSError, match="lines") as caught:
            handle.seek(offset, whence)
        assert caught.value.errno == errno.EINVAL
    assert handle.tell() == 0


def test_it_is_a_file_for_pythons_own_tools(handle: Any) -> None:
    assert handle.readline() == b"line 0\n"
    assert list(handle) == LINES.splitlines(keepends=True)[1:]
    handle.seek(0)
    buffer = bytearray(1000)
    assert handle.readinto(buffer) == 1000
    assert bytes(buffer) == LINES[:1000]
    handle.seek(0)
    copy = io.BytesIO()
    shutil.copyfileobj(handle, copy)
    assert copy.getvalue() == LINES
    handle.seek(0)
    assert io.BufferedReader(handle).readlines(20) == [b"line 0\n", b"line 1\n", b"line 2\n"]


def test_text_is_read_through_a_wrapper(handle: Any) -> None:
    with io.TextIOWrapper(handle, encoding="ascii", newline="") as text:
        rows = list(csv.reader(text, delimiter=" "))
    assert rows[4999] == ["line", "4999"]
    assert handle.closed


def test_take_gives_views_until_the_end(handle: Any) -> None:
    pieces = []
    while view := handle.take(999):
        assert isinstance(view, memoryview)
        assert len(view) <= 999
        pieces.append(bytes(view))
    assert b"".join(pieces) == LINES


def test_writing_to_it_is_refused(handle: Any) -> None:
    with pytest.raises(io.UnsupportedOperation, match="lines") as caught:
        handle.write(b"x")
    assert caught.value.errno == errno.EBADF


def test_a_closed_handle_does_nothing_any_more(handle: Any) -> None:
    handle.close()
    handle.close()
    for use in (handle.read, handle.tell, lambda: handle.seek(0), lambda: handle.take(1), lambda: handle.read(0)):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_without_seeking_it_can_only_be_read_on(store: Store, make_vfs: MakeVFS, tmp_path: Any) -> None:
    store.write("a", b"0123456789")
    with make_vfs(store, cache_dir=str(tmp_path / "cache"), no_seek=True).open("a") as handle:
        assert not handle.seekable()
        assert handle.read(3) == b"012"
        assert handle.seek(3) == handle.seek(0, io.SEEK_CUR) == 3
        with pytest.raises(OSError, match="no-seek") as caught:
            handle.seek(1)
        assert caught.value.errno == errno.ESPIPE
        assert handle.read() == b"3456789"


@pytest.mark.parametrize("content", [b"", b"x", os.urandom(3_000_000)])
def test_what_was_written_is_read(store: Store, make_vfs: MakeVFS, tmp_path: Any, content: bytes) -> None:
    vfs = make_vfs(store, cache_dir=str(tmp_path / "cache"))
    with vfs.open("f", "wb") as handle:
        assert handle.write(content) == len(content)
    assert store.read("f") == content
    with vfs.open("f") as handle:
        assert handle.read() == content
    assert vfs.core.memory.used == 0


# --- versions


def test_a_file_replaced_before_its_first_byte_was_read_is_read_as_it_is_now(
    store: Store, make_vfs: MakeVFS, tmp_path: Any
) -> None:
    store.write("a", b"old" * 1000)
    vfs = make_vfs(store, cache_dir=str(tmp_path / "cache"))
    vfs.listdir()
    store.write("a", b"newer" * 1000)
    with vfs.open("a") as handle:
        assert handle.read() == b"newer" * 1000
    assert vfs.stat("a").st_size in {3000, 5000}


def test_a_file_that_was_empty_is_read_as_it_is_now(store: Store, make_vfs: MakeVFS, tmp_path: Any) -> None:
    store.write("a", b"")
    vfs = make_vfs(store, cache_dir=str(tmp_path / "cache"))
    vfs.listdir()
    store.write("a", b"no more")
    with vfs.open("a") as handle:
        assert handle.read() == b"no more"


@pytest.mark.parametrize("store", ["memory", "s3", "gs"], indirect=True)
def test_a_file_replaced_after_the_first_byte_is_an_error_and_no_mix(
    store: Store, make_vfs: MakeVFS, tmp_path: Any
) -> None:
    size = 4 * 2**20
    store.write("a", b"o" * size)
    chunks = {"read_chunk_size": "256k", "buffer_size": "256k", "read_chunk_streams": 1}
    vfs = make_vfs(store, cache_dir=str(tmp_path / "cache"), **chunks)
    with vfs.open("a") as handle:
        assert handle.read(1000) == b"o" * 1000
        store.write("a", b"n" * size)
        with pytest.raises(OSError, match="a") as caught:
            handle.read()
        assert caught.value.errno == ECHANGED
    assert vfs.core.memory.used == 0


def test_a_local_file_written_in_place_while_it_is_read_is_an_error(
    local_store: Store, make_vfs: MakeVFS, tmp_path: Any
) -> None:
    local_store.write("a", b"o" * 1000)
    with make_vfs(local_store, cache_dir=str(tmp_path / "cache")).open("a") as handle:
        assert handle.read(10) == b"o" * 10
        local_store.write("a", b"nn")
        with pytest.raises(OSError, match="a") as caught:
            handle.read()
        assert caught.value.errno == ECHANGED


def test_a_file_that_is_gone_is_enoent_and_gone_from_the_listing(
    s3_store: Store, make_vfs: MakeVFS, tmp_path: Any
) -> None:
    s3_store.write("a", b"x")
    vfs = make_vfs(s3_store, cache_dir=str(tmp_path / "cache"))
    assert vfs.listdir() == ["a"]
    s3_store.delete("a")
    with vfs.open("a") as handle, pytest.raises(FileNotFoundError):
        handle.read()
    assert vfs.listdir() == []


# --- reading, with failures


class Versions:
    """An object with versions in memory, for handles on their own. `failures` are raised by the next requests."""

    def __init__(self, *contents: bytes) -> None:
        self.contents = list(contents)
        self.now = 0
        self.failures: list[BaseException] = []
        self.memory = MemoryBudget(None)
        self.requests = 0

    def entry(self) -> Entry:
        return Entry("a", False, len(self.contents[self.now]), 1.0, str(self.now))

    def fetch(self, version: Entry, start: int, stop: int) -> Future[Pieces]:
        self.requests += 1
        future: Future[Pieces] = Future()
        if self.failures:
            future.set_exception(self.failures.pop(0))
        elif version.fingerprint != str(self.now):
            future.set_exception(failure(ECHANGED, "a"))
        else:
            future.set_result([self.contents[self.now][start:stop]])
        return future

    def open(self) -> ReadHandle:
        def open_at(version: Entry, offset: int) -> ReadAhead:
            fetch = partial(self.fetch, version)
            return ReadAhead(fetch, offset, version.size, ChunkPolicy(4, 4), self.memory)

        return ReadHandle("a", "a", self.entry(), open_at, self.entry)


def test_after_an_error_its_memory_is_back_and_reading_goes_on_where_it_stopped() -> None:
    versions = Versions(b"0123456789abcdef")
    handle = versions.open()
    assert handle.read(4) == b"0123"
    versions.failures = [ConnectionResetError(errno.ECONNRESET, "cut")] * 4
    with pytest.raises(ConnectionResetError):
        handle.read()
    assert versions.memory.used == 0
    versions.failures = []
    position = handle.tell()
    assert handle.read() == b"0123456789abcdef"[position:]
    handle.close()
    assert versions.memory.used == 0


def test_an_error_is_never_the_end_of_the_file() -> None:
    versions = Versions(b"0123456789abcdef")
    versions.failures = [OSError(errno.EIO, "broken")] * 3
    handle = versions.open()
    got = b""
    for _ in range(20):
        try:
            piece = handle.take(100)
        except OSError:
            continue
        got += piece
        if not piece:
            break
    assert got == b"0123456789abcdef"


def test_the_version_is_taken_anew_once_and_only_before_the_first_byte() -> None:
    versions = Versions(b"first", b"second one" * 10, b"third")
    handle = versions.open()
    versions.now = 1
    assert handle.read(3) == b"sec"
    assert handle.size == 100
    versions.now = 2
    with pytest.raises(OSError, match="a") as caught:
        handle.read()
    assert caught.value.errno == ECHANGED


def test_a_new_version_that_is_shorter_than_the_offset_ends_there() -> None:
    versions = Versions(b"0123456789", b"012")
    handle = versions.open()
    handle.seek(5)
    versions.now = 1
    assert handle.read() == b""


def test_reading_that_is_cancelled_from_below_is_an_oserror() -> None:
    versions = Versions(b"0123456789")
    handle = versions.open()
    versions.failures = [CancelledError()]
    with pytest.raises(OSError, match="closed") as caught:
        handle.read()
    assert caught.value.errno == errno.ECANCELED
    assert versions.memory.used == 0


def test_seeking_to_where_it_is_keeps_what_was_read_ahead() -> None:
    versions = Versions(b"0123456789")
    handle = versions.open()
    assert handle.read(4) == b"0123"
    asked = versions.requests
    handle.seek(4)
    handle.seek(0, io.SEEK_CUR)
    assert versions.requests == asked
    handle.seek(1)
    assert handle.read() == b"123456789"


# --- writing, on real stores


def test_leaving_a_with_block_publishes_and_an_exception_in_it_does_not(
    store: Store, make_vfs: MakeVFS, tmp_path: Any
) -> None:
    vfs = make_vfs(store, cache_dir=str(tmp_path / "cache"))
    with vfs.open("a", "wb") as handle:
        handle.write(b"whole")
    with pytest.raises(RuntimeError), vfs.open("a", "wb") as handle:  # noqa: PT012
        handle.write(b"half")
        raise RuntimeError
    assert handle.closed
    assert store.read("a") == b"whole"
    assert store.list() == {"a"}


def test_a_forgotten_or_abandoned_handle_publishes_nothing(store: Store, make_vfs: MakeVFS, tmp_path: Any) -> None:
    vfs = make_vfs(store, cache_dir=str(tmp_path / "cache"))
    handle = vfs.open("forgotten", "wb")
    handle.write(b"x" * 100)
    del handle
    gc.collect()
    handle = vfs.open("abandoned", "wb")
    handle.write(b"x" * 100)
    handle.abandon()
    handle.abandon()
    handle.close()
    with pytest.raises(ValueError, match="closed"):
        handle.commit()
    assert store.list() == set()
    assert vfs.listdir() == []


def test_without_autocommit_only_commit_publishes(store: Store, make_vfs: MakeVFS, tmp_path: Any) -> None:
    vfs = make_vfs(store, cache_dir=str(tmp_path / "cache"))
    handle = vfs.open("a", "wb", autocommit=False, name="/as/the/client/says")
    assert handle.name == "/as/the/client/says"
    handle.write(b"one")
    handle.close()
    assert not vfs.exists("a")
    handle = vfs.open("a", "wb", autocommit=False)
    handle.write(b"two")
    assert not vfs.exists("a"), "visible before it was committed"
    handle.commit()
    handle.commit()
    handle.close()
    assert handle.committed
    assert handle.closed
    assert vfs.stat("a").st_size == 3
    assert store.read("a") == b"two"


def test_a_written_file_is_a_file_for_pythons_own_tools(store: Store, make_vfs: MakeVFS, tmp_path: Any) -> None:
    vfs = make_vfs(store, cache_dir=str(tmp_path / "cache"))
    with vfs.open("copy", "wb") as handle:
        assert handle.writable()
        assert not handle.readable()
        assert not handle.seekable()
        assert handle.mode == "wb"
        shutil.copyfileobj(io.BytesIO(LINES), handle, 1000)
        assert handle.tell() == handle.size == len(LINES)
        handle.writelines([b"a\n", b"b\n"])
    assert store.read("copy") == LINES + b"a\nb\n"
    with io.TextIOWrapper(io.BufferedWriter(vfs.open("text", "wb")), encoding="utf-8") as text:
        text.write("ümläut\n")
    assert store.read("text") == "ümläut\n".encode()
    with vfs.open("gz", "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb") as packed:
        packed.write(LINES)
    with gzip.open(vfs.open("gz")) as unpacked:
        assert unpacked.read() == LINES
    with vfs.open("zip", "wb") as raw, zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("lines", LINES)
    with vfs.open("zip") as raw, zipfile.ZipFile(raw) as archive:
        assert archive.read("lines") == LINES
    with vfs.open("tar", "wb") as raw, tarfile.open(fileobj=raw, mode="w|") as tar:
        tar.add(__file__, "test.py")
    with vfs.open("tar") as raw, tarfile.open(fileobj=raw) as tar:
        assert tar.getnames() == ["test.py"]


def test_bytes_like_objects_of_any_kind_are_written(memory_store: Store, make_vfs: MakeVFS, tmp_path: Any) -> None:
    import array

    with make_vfs(memory_store, cache_dir=str(tmp_path / "cache")).open("a", "wb") as handle:
        assert handle.write(bytearray(b"ab")) == 2
        assert handle.write(memoryview(b"cdef")[1:3]) == 2
        assert handle.write(array.array("H", [0x4141, 0x4242])) == 4
        assert handle.write(b"") == 0
    assert memory_store.read("a") == b"abdeAABB"


def test_what_the_caller_does_with_its_buffer_afterwards_does_not_matter(
    store: Store, make_vfs: MakeVFS, tmp_path: Any
) -> None:
    buffer = bytearray(b"first")
    with make_vfs(store, cache_dir=str(tmp_path / "cache")).open("a", "wb") as handle:
        handle.write(buffer)
        buffer[:] = b"XXXXX"
        handle.write(memoryview(buffer))
    assert store.read("a") == b"firstXXXXX"


def test_a_file_that_is_written_cannot_be_read_nor_sought(store: Store, make_vfs: MakeVFS, tmp_path: Any) -> None:
    with make_vfs(store, cache_dir=str(tmp_path / "cache")).open("a", "wb") as handle:
        handle.write(b"12345")
        assert handle.tell() == 5
        for offset, whence in ((0, 0), (5, 0), (6, 0), (-1, 1), (0, 2)):
            with pytest.raises(OSError, match="cache-mode") as caught:
                handle.seek(offset, whence)
            assert caught.value.errno == errno.ESPIPE
        for read in (handle.read, handle.readline, lambda: handle.read(1), lambda: handle.readinto(bytearray(1))):
            with pytest.raises(io.UnsupportedOperation):
                read()
    assert (handle.closed, handle.committed) == (True, True)


# --- writing, with failures


class FailingUpload:
    """An upload that fails where it is told to, and counts what became of it."""

    def __init__(self, *, write: OSError | None = None, commit: OSError | None = None) -> None:
        self.write_error, self.commit_error = write, commit
        self.taken = b""
        self.aborted = 0

    def accept(self, data: bytes | memoryview) -> None:
        if self.write_error is not None:
            raise self.write_error
        self.taken += data

    def pressure(self) -> None:
        return None

    def commit(self) -> Entry:
        if self.commit_error is not None:
            raise self.commit_error
        return Entry("a", False, len(self.taken))

    def abort(self) -> None:
        self.aborted += 1


def writer(upload: FailingUpload, *, autocommit: bool = True) -> WriteHandle:
    def publish(begun: Any, confirm: Callable[[], None]) -> None:
        begun.commit()

    return WriteHandle("a", "a", lambda: upload, publish, autocommit=autocommit)


FULL = OSError(errno.ENOSPC, "No space left", "a")


@pytest.mark.parametrize("end", ["close", "commit"])
@pytest.mark.parametrize("stage", ["write", "commit"])
def test_a_failure_is_told_with_its_errno_and_nothing_is_published(stage: str, end: str) -> None:
    upload = FailingUpload(**{stage: FULL})
    handle = writer(upload)
    if stage == "write":
        with pytest.raises(OSError, match="space"):
            handle.write(b"x")
        with pytest.raises(OSError, match="earlier write"):
            handle.write(b"y")
    else:
        handle.write(b"x")
    with pytest.raises(OSError, match="space") as caught:
        getattr(handle, end)()
    assert caught.value.errno == errno.ENOSPC
    assert handle.closed
    assert not handle.committed
    assert upload.aborted == 1
    handle.close()
    handle.abandon()
    assert upload.aborted == 1


def test_a_failed_write_in_a_with_block_is_the_error_that_is_seen() -> None:
    upload = FailingUpload(write=FULL)
    with pytest.raises(OSError, match="space") as caught, writer(upload) as handle:
        handle.write(b"x")
    assert caught.value is FULL
    assert upload.aborted == 1


def test_abandoning_after_a_failed_write_says_nothing_more() -> None:
    upload = FailingUpload(write=FULL)
    handle = writer(upload, autocommit=False)
    with pytest.raises(OSError, match="space"):
        handle.write(b"x")
    handle.close()
    assert upload.aborted == 1


def test_the_store_is_not_asked_before_the_first_byte() -> None:
    begun: list[FailingUpload] = []

    def begin() -> FailingUpload:
        begun.append(FailingUpload())
        return begun[-1]

    handle = WriteHandle("a", "a", begin, lambda upload, confirm: None, autocommit=False)
    handle.close()
    assert begun == []
    handle = WriteHandle("a", "a", begin, lambda upload, confirm: None, autocommit=False)
    handle.commit()
    assert len(begun) == 1, "an empty upload must still make an empty object"


def test_every_kind_of_handle_says_what_it_is() -> None:
    handle = writer(FailingUpload())
    assert repr(handle) == "<WriteHandle 'a'>"
    handle.abandon()
    assert repr(handle) == "<WriteHandle 'a' closed>"
    assert isinstance(handle, Handle)
    assert isinstance(handle, io.RawIOBase)


def test_views_are_the_files_bytes_and_wait_for_the_first_alone() -> None:
    versions = Versions(b"0123456789abcdef")
    with versions.open() as handle:
        views = handle.take_views(6)
        assert 0 < sum(map(len, views)) <= 6
        rest = b"".join(bytes(view) for view in views)
        while views := handle.take_views(100):
            rest += b"".join(bytes(view) for view in views)
    assert rest == b"0123456789abcdef"
    assert versions.memory.used == 0
