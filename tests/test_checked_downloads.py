"""226 means those bytes: what streams from a store is compared with its hash, and comes as it is stored."""

from __future__ import annotations

import errno
import ftplib
import gc
import gzip
import hashlib
import http.server
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from ftpvfs.backend.backend import Entry
from ftpvfs.backend.checksum import Checksum, Expected
from ftpvfs.vfs.checkedfetch import CheckedFetch
from tests.conftest import Store, connect, download, upload
from tests.downloads import WATCH
from tests.servers import HOST, FaultProxy

MIB = 2**20
Serve = Callable[..., tuple[str, int]]
MakeVFS = Callable[..., Any]
MakeBackend = Callable[..., Any]
MakeProxy = Callable[[Any], FaultProxy]

object_stores = pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)
SIZES = {"small": 1000, "one range": MIB, "many ranges": 9 * MIB + 1}


def retrieved(ftp: ftplib.FTP, path: str, *, rest: int | None = None) -> str:
    """The last reply to RETR."""
    try:
        return str(ftp.retrbinary(f"RETR {path}", lambda _: None, rest=rest))
    except ftplib.all_errors as error:
        return str(error)


@object_stores
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_flipped_byte_is_no_226(store: Store, ftp_server: Serve, make_proxy: MakeProxy, size: int) -> None:
    data = os.urandom(size)
    store.write("a", data)
    proxy = make_proxy(store)
    with connect(ftp_server(store.proxied(proxy), cache_mode="off")) as ftp:
        assert download(ftp, "a") == data
        proxy.flip_byte(min(size, MIB) - 1, target="a")
        answer = retrieved(ftp, "a")
        assert answer.startswith("451 The bytes that came are not those that the store has"), answer
        assert download(ftp, "a") == data


def test_a_flipped_byte_of_an_object_in_parts_is_no_226(
    s3_store: Store, ftp_server: Serve, make_proxy: MakeProxy
) -> None:
    data = os.urandom(9 * MIB)
    proxy = make_proxy(s3_store)
    with connect(ftp_server(s3_store.proxied(proxy), cache_mode="off")) as ftp:
        upload(ftp, "a", data)
        assert "-" in s3_store.filesystem.info(s3_store.path("a"))["ETag"]
        assert download(ftp, "a") == data
        proxy.flip_byte(5, target="a")
        assert retrieved(ftp, "a").startswith("451 ")


@object_stores
def test_no_hash_is_asked_for_where_the_listing_has_it_or_nobody_wants_it(
    store: Store, ftp_server: Serve, make_proxy: MakeProxy
) -> None:
    store.write("a", b"12345")
    proxy = make_proxy(store)
    with connect(ftp_server(store.proxied(proxy), cache_mode="off")) as ftp:
        ftp.nlst()
        proxy.reset_counters()
        assert download(ftp, "a") == b"12345"
        assert len(proxy.seen) == 1
    with connect(ftp_server(store.proxied(proxy), cache_mode="off", no_checksum=True)) as ftp:
        WATCH.stores.clear()  # the damage is not to be noticed
        proxy.flip_byte(0, target="a")
        assert retrieved(ftp, "a").startswith("226 ")


@object_stores
def test_a_part_of_a_file_is_not_compared(store: Store, ftp_server: Serve) -> None:
    data = os.urandom(3 * MIB)
    store.write("a", data)
    with connect(ftp_server(store, cache_mode="off")) as ftp:
        assert download(ftp, "a", rest=2 * MIB) == data[2 * MIB :]


@object_stores
def test_reading_a_whole_file_from_python_compares_it(
    store: Store, make_vfs: MakeVFS, make_proxy: MakeProxy
) -> None:
    data = os.urandom(3 * MIB)
    store.write("a", data)
    proxy = make_proxy(store)
    vfs = make_vfs(store.proxied(proxy), cache_mode="off")
    vfs.listdir()
    proxy.flip_byte(0, target="a")
    with vfs.open("a") as file, pytest.raises(OSError, match="not those that the store has") as failed:
        file.read()
    assert failed.value.errno == errno.EIO
    with vfs.open("a") as file:
        file.seek(MIB)
        file.seek(0)
        assert file.read() == data


# -- hashing beside a transfer


class HalfSure:
    """A backend whose hash is asked for, and answered when the test says so."""

    def __init__(self, seeming: Checksum | None) -> None:
        self.seeming = seeming
        self.answer: Future[Checksum | None] = Future()

    def checksum(self, entry: Entry) -> Checksum | None:
        return self.seeming

    def ask_checksum(self, path: str, entry: Entry) -> Future[Checksum | None]:
        return self.answer


def md5_of(data: bytes) -> Checksum:
    return Checksum("md5", hashlib.md5(data, usedforsecurity=False).digest())


DATA = os.urandom(4 * 2**18)


def checked(backend: Any) -> tuple[CheckedFetch, list[Future[list[bytes]]], list[Future[list[bytes]]]]:
    """Four ranges of DATA: what checks them, what they arrive by, and what they are handed over by."""
    arriving: list[Future[list[bytes]]] = []

    def fetch(start: int, stop: int) -> Future[list[bytes]]:
        arriving.append(Future())
        return arriving[-1]

    expected = Expected(backend, "a", Entry("a", False, len(DATA)))
    fetching = CheckedFetch(fetch, "a", len(DATA), expected, lambda work: work())
    step = len(DATA) // 4
    handed = [fetching(start, start + step) for start in range(0, len(DATA), step)]
    return fetching, arriving, handed


def arrive(arriving: list[Future[list[bytes]]], number: int, data: bytes = DATA) -> None:
    step = len(data) // 4
    arriving[number].set_result([data[number * step : (number + 1) * step]])


def test_ranges_are_handed_over_in_order_once_they_are_hashed() -> None:
    fetching, arriving, handed = checked(HalfSure(md5_of(DATA)))
    for number in (3, 1, 0):
        arrive(arriving, number)
    assert [each.done() for each in handed] == [True, True, False, False]
    fetching.verify()  # not all was read
    arrive(arriving, 2)
    assert b"".join(piece for each in handed for piece in each.result()) == DATA
    fetching.verify()


def test_bytes_wait_for_the_hash_that_the_store_is_asked_for() -> None:
    backend = HalfSure(None)
    fetching, arriving, handed = checked(backend)
    for number in range(4):
        arrive(arriving, number)
    assert not any(each.done() for each in handed)
    backend.answer.set_result(md5_of(b"others"))
    assert all(each.done() for each in handed)
    with pytest.raises(OSError, match="not those"):
        fetching.verify()


@pytest.mark.parametrize("answer", [None, TimeoutError(errno.ETIMEDOUT, "silent")], ids=str)
def test_a_store_without_a_hash_is_believed(answer: Any) -> None:
    backend = HalfSure(None)
    fetching, arriving, handed = checked(backend)
    if answer is None:
        backend.answer.set_result(None)
    else:
        backend.answer.set_exception(answer)
    for number in range(4):
        arrive(arriving, number)
    assert all(each.done() for each in handed)
    fetching.verify()


def test_the_store_has_the_last_word_on_what_looked_like_its_hash() -> None:
    for last_word, is_right in ((None, True), (md5_of(DATA), True), (md5_of(b"others"), False)):
        backend = HalfSure(md5_of(b"an etag that is no md5"))
        fetching, arriving, _ = checked(backend)
        for number in range(4):
            arrive(arriving, number)
        backend.answer.set_result(last_word)
        if is_right:
            fetching.verify()
        else:
            with pytest.raises(OSError, match="not those"):
                fetching.verify()


def test_a_reader_that_leaves_ends_the_requests() -> None:
    _, arriving, handed = checked(HalfSure(md5_of(DATA)))
    for each in handed:
        each.cancel()
    assert all(each.cancelled() for each in arriving)


def test_what_was_read_is_let_go_of_at_once() -> None:
    class Pieces(list[bytes]):
        """What can be referred to weakly."""

    fetching, arriving, handed = checked(HalfSure(md5_of(DATA)))
    pieces = Pieces([DATA[: len(DATA) // 4]])
    seen = weakref.ref(pieces)
    gc.collect()
    gc.disable()
    try:
        arriving[0].set_result(pieces)
        assert handed[0].result() is pieces
        del pieces, arriving[0], handed[0]
        assert seen() is None
    finally:
        gc.enable()
    fetching.close()


def test_a_failed_range_fails_alone_and_nothing_is_compared() -> None:
    fetching, arriving, handed = checked(HalfSure(md5_of(DATA)))
    arriving[0].set_exception(OSError(errno.EIO, "broken"))
    for number in (1, 2, 3):
        arrive(arriving, number)
    assert isinstance(handed[0].exception(), OSError)
    assert all(each.result() for each in handed[1:])
    fetching.verify()


# -- as it is stored


def gzipped(store: Store) -> bytes:
    """Store an object that says that its content is packed; return its bytes."""
    data = gzip.compress(os.urandom(5000) + bytes(100_000))
    if store.kind == "s3":
        store.filesystem.pipe_file(store.path("a"), data, ContentEncoding="gzip", ContentType="text/plain")
        return data
    bucket, _, key = store.path("a").partition("/")
    store.filesystem.call(
        "POST", f"{store.storage_options['endpoint_url']}/upload/storage/v1/b/{bucket}/o", uploadType="media", name=key,
        contentEncoding="gzip", headers={"Content-Type": "text/plain"}, data=data,
    )  # fmt: skip
    assert store.filesystem.call("GET", "b/{}/o/{}", bucket, key, json_out=True)["contentEncoding"] == "gzip"
    return data


@object_stores
@pytest.mark.parametrize("mode", ["off", "full"])
def test_what_is_stored_as_gzip_is_read_as_it_is_stored(store: Store, ftp_server: Serve, mode: str) -> None:
    data = gzipped(store)
    with connect(ftp_server(store, cache_mode=mode)) as ftp:
        WATCH.stores.clear()  # the client that looks into the store unpacks what it reads
        assert ftp.size("a") == len(data)
        assert download(ftp, "a") == data
        assert download(ftp, "a", rest=100) == data[100:]
        ftp.rename("a", "b")
        assert download(ftp, "b") == data


class Packing(http.server.BaseHTTPRequestHandler):
    """A web server that packs what a client lets it pack, and has one file that is stored packed."""

    plain = os.urandom(1000) + bytes(20_000)
    packed = gzip.compress(plain)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        is_stored_packed = self.path.endswith("packed")
        body = self.packed if is_stored_packed else self.plain
        headers = {"Content-Encoding": "gzip"} if is_stored_packed else {}
        if not is_stored_packed and "gzip" in self.headers.get("Accept-Encoding", ""):
            body, headers = gzip.compress(body), {"Content-Encoding": "gzip"}
        status, whole = 200, len(body)
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else whole
            body, status = body[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{whole}"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer((HOST, 0), Packing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://{HOST}:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("name", "content"), [("plain", Packing.plain), ("packed", Packing.packed)])
def test_what_a_web_server_packs_is_read_as_it_is_stored(
    web: str, make_backend: MakeBackend, name: str, content: bytes
) -> None:
    pytest.importorskip("aiohttp")
    backend = make_backend(web)
    entry = backend.stat(name)
    assert entry.size == len(content)
    assert b"".join(backend.fetch(name, 0, entry.size, entry.fingerprint).result(timeout=20)) == content
    assert b"".join(backend.fetch(name, 10, 20, entry.fingerprint).result(timeout=20)) == content[10:20]
