"""The stores, their fixtures and the proxy do what they say, since the other tests trust them."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import (
    Store,
    StoreFactory,
    belongings,
    connect,
    download,
    last_reply,
    names,
    new_belongings,
    open_transfer,
    reply,
    serving,
    upload,
)
from tests.servers import (
    HOST,
    FakeGCS,
    FaultProxy,
    Request,
    RequestSplitter,
    SeaweedFS,
    SFTPServer,
    is_listening,
    rclone,
    reset,
    wait_until,
)

MakeProxy = Callable[[Any], FaultProxy]


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets, and closes when its client does."""
    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                while data := self.request.recv(65536):
                    self.request.sendall(data)

    with socketserver.ThreadingTCPServer((HOST, 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def dial(proxy: FaultProxy, timeout: float = 10) -> socket.socket:
    return socket.create_connection(proxy.address, timeout=timeout)


def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            break
        data += part
    return data


# -- what a test leaves behind


def test_threads_descriptors_and_processes_left_behind_are_named() -> None:
    before = belongings()
    is_over = threading.Event()
    thread = threading.Thread(target=is_over.wait, name="forgotten")
    thread.start()
    with (
        socket.create_server((HOST, 0)) as listener,
        open(__file__) as file,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process,
    ):
        left = " ".join(new_belongings(before).values())
        is_over.set()
    thread.join()

    assert "thread forgotten" in left
    assert file.name in left
    assert "LISTEN" in left, listener
    assert "process" in left
    assert process.returncode is not None
    assert not new_belongings(before)


def test_idle_connections_to_a_store_are_not_left_behind(fake_gcs: FakeGCS) -> None:
    before = belongings()
    with socket.create_connection((HOST, fake_gcs.port)):
        assert not new_belongings(before)


# -- stores


def test_what_a_store_was_given_is_listed_and_read_back(store: Store) -> None:
    store.write("a.txt", b"one")
    store.write("folder/b c é.txt", b"two")

    assert store.list() == {"a.txt", "folder/b c é.txt"}
    assert store.read("folder/b c é.txt") == b"two"
    assert abs(store.mtime("a.txt") - time.time()) < 60
    assert store.uploads() == set()

    store.delete("a.txt")
    assert store.list() == {"folder/b c é.txt"}
    with pytest.raises(FileNotFoundError):
        store.read("a.txt")


@pytest.mark.parametrize("store", ["local", "s3", "gs"], indirect=True)
def test_a_store_keeps_the_time_that_a_client_set(store: Store) -> None:
    store.write("old", b"x", mtime=1_000_000_000.5)
    assert store.mtime("old") == 1_000_000_000.5


def test_stores_of_one_test_are_apart(make_store: StoreFactory) -> None:
    for kind in ("memory", "s3"):
        first, second = make_store(kind), make_store(kind)
        first.write("only here", b"1")
        assert second.list() == set()


def test_a_bucket_of_its_own_has_no_prefix(make_store: StoreFactory) -> None:
    for kind in ("s3", "gs"):
        store = make_store(kind, whole_bucket=True)
        store.write("top", b"1")
        assert store.root == store.bucket
        assert store.list() == {"top"}


def test_a_listing_shows_folder_markers(s3_store: Store) -> None:
    s3_store.filesystem.call_s3(
        "put_object", Bucket=s3_store.bucket, Key=f"{s3_store.path('made/')}".partition("/")[2]
    )
    assert s3_store.list() == {"made/"}


def test_an_unfinished_multipart_upload_is_seen(s3_store: Store) -> None:
    where = {"Bucket": s3_store.bucket, "Key": s3_store.path("big").partition("/")[2]}
    upload = s3_store.filesystem.call_s3("create_multipart_upload", **where)
    assert s3_store.uploads() == {"big"}
    s3_store.filesystem.call_s3("abort_multipart_upload", **where, UploadId=upload["UploadId"])
    assert s3_store.uploads() == set()


def test_s3_refuses_a_wrong_secret_and_an_unknown_bucket(seaweedfs: SeaweedFS) -> None:
    import s3fs

    wrong = s3fs.S3FileSystem(**{**seaweedfs.storage_options, "secret": "wrong"}, skip_instance_cache=True)
    with pytest.raises(PermissionError):
        wrong.pipe_file(f"{seaweedfs.shared_bucket}/x", b"1")
    with pytest.raises(FileNotFoundError):
        seaweedfs.filesystem.pipe_file("no-such-bucket/x", b"1")


def test_s3_stopped_and_started_again_has_kept_its_objects(s3_store: Store, seaweedfs: SeaweedFS) -> None:
    s3_store.write("kept", b"kept")
    seaweedfs.stop()
    try:
        assert not is_listening(seaweedfs.port)
    finally:
        seaweedfs.start()
    assert s3_store.read("kept") == b"kept"


def test_a_paused_store_accepts_and_is_silent_until_it_is_resumed(fake_gcs: FakeGCS) -> None:
    fake_gcs.pause()
    try:
        with socket.create_connection((HOST, fake_gcs.port), timeout=0.2) as sock:
            sock.sendall(b"GET /storage/v1/b?project=test HTTP/1.0\r\n\r\n")
            with pytest.raises(TimeoutError):
                sock.recv(1)
            fake_gcs.resume()
            sock.settimeout(10)
            assert sock.recv(8) == b"HTTP/1.0"
    finally:
        fake_gcs.resume()


def test_files_come_and_go_over_sftp(sftp_server: SFTPServer) -> None:
    from sshfs import SSHFileSystem

    filesystem = SSHFileSystem(**sftp_server.storage_options, skip_instance_cache=True)
    (sftp_server.root / "there").write_bytes(b"on disk")
    assert filesystem.cat_file(f"{sftp_server.root}/there") == b"on disk"
    filesystem.pipe_file(f"{sftp_server.root}/new", b"sent")
    assert (sftp_server.root / "new").read_bytes() == b"sent"


def test_the_programs_out_of_wheels_are_there() -> None:
    assert rclone().is_file()


# -- FTP servers and clients


@pytest.fixture(params=["FTPServer", "ThreadedFTPServer", "MultiprocessFTPServer"])
def stock_ftp(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[tuple[str, int], Path]]:
    """The address of pyftpdlib as it comes, and the folder it serves."""
    from pyftpdlib import servers
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler

    folder = tmp_path / "served"
    folder.mkdir()
    authorizer = DummyAuthorizer()
    authorizer.add_user("alice", "secret", str(folder), perm="elradfmwMT")
    handler = type("StockHandler", (FTPHandler,), {"authorizer": authorizer})
    with serving(getattr(servers, request.param), handler) as server:
        yield server.address, folder


def test_the_client_uploads_resumes_and_downloads(stock_ftp: tuple[tuple[str, int], Path]) -> None:
    address, folder = stock_ftp
    with connect(address, "alice", "secret") as ftp:
        assert upload(ftp, "é", b"hello").startswith("226")
        assert upload(ftp, "é", b" world", verb="APPE").startswith("226")
        assert (folder / "é").read_bytes() == b"hello world"
        assert download(ftp, "é", rest=6) == b"world"
        assert names(ftp) == {"é"}
        assert reply(ftp, "SIZE é") == "213 11"
        assert reply(ftp, "SIZE none").startswith("550")


def test_the_client_cuts_an_upload_off(stock_ftp: tuple[tuple[str, int], Path]) -> None:
    address, folder = stock_ftp
    with connect(address, "alice", "secret") as ftp:
        data = open_transfer(ftp, "STOR cut")
        data.sendall(b"x" * 100_000)
        # pyftpdlib as it comes says nothing to a reset before it accepted, and makes the file before that.
        wait_until(lambda: (folder / "cut").exists() and (folder / "cut").stat().st_size > 0)
        reset(data)
        assert last_reply(ftp)[:3] in ("226", "426"), "pyftpdlib as it comes takes a reset for an end"


# -- the proxy before stores


def test_s3_through_the_proxy_counts_its_requests(s3_store: Store, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(s3_store)
    client = s3_client(s3_store.proxied(proxy))
    part = bytes(range(256)) * 4096 * 5

    with client.open(s3_store.path("big"), "wb", block_size=len(part)) as handle:
        for _ in range(3):
            handle.write(part)
    assert s3_store.read("big") == part * 3
    assert proxy.requests["POST"] == 2, "multipart upload: begun and completed"
    assert proxy.requests["PUT"] == 3

    proxy.reset_counters()
    assert client.cat_file(s3_store.path("big"), start=0, end=1000) == part[:1000]
    assert proxy.requests == {"GET": 1}
    assert proxy.seen[0].target.startswith(f"/{s3_store.root}/big")
    assert proxy.received >= 1000


def test_gcs_through_the_proxy_sends_resumable_uploads_through_it_too(
    gs_store: Store, make_proxy: MakeProxy
) -> None:
    from gcsfs.core import GCSFileSystem

    proxy = make_proxy(gs_store)
    client = GCSFileSystem(**gs_store.proxied(proxy).storage_options, skip_instance_cache=True)
    with client.open(gs_store.path("big"), "wb", block_size=2**18) as handle:
        handle.write(b"x" * 700_000)
    assert gs_store.read("big") == b"x" * 700_000
    assert proxy.sent > 700_000


def test_one_503_is_retried_by_the_client_and_not_seen_by_the_store(
    s3_store: Store, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy(s3_store)
    client = s3_client(s3_store.proxied(proxy))
    proxy.fail_next(method="PUT")
    client.pipe_file(s3_store.path("a"), b"x" * 100_000)
    assert proxy.requests == {"PUT": 2}
    assert s3_store.read("a") == b"x" * 100_000


def test_an_injected_error_names_its_s3_code(s3_store: Store, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(s3_store)
    client = s3_client(s3_store.proxied(proxy))
    proxy.fail_next(method="GET", target="/secret", status=403, code="AccessDenied")
    s3_store.write("open", b"1")
    s3_store.write("secret", b"1")
    assert client.cat_file(s3_store.path("open")) == b"1"
    with pytest.raises(PermissionError):
        client.cat_file(s3_store.path("secret"))
    assert client.cat_file(s3_store.path("secret")) == b"1"


@pytest.mark.parametrize("offset", [0, 99_999, 150_000])
def test_one_byte_of_the_next_answer_is_flipped(
    s3_store: Store, make_proxy: MakeProxy, make_backend: Callable[..., Any], offset: int
) -> None:
    data = bytes(200_000)
    s3_store.write("a", data)
    proxy = make_proxy(s3_store)
    backend = make_backend(s3_store.proxied(proxy))  # s3fs would compare the CRC that it sent

    def read() -> bytes:
        return b"".join(backend.fetch("a", 0, len(data), None).result(timeout=20))

    proxy.flip_byte(offset)
    assert [index for index, byte in enumerate(read()) if byte] == [offset]
    assert read() == data
    proxy.flip_byte(5, target="another")
    assert read() == data


def s3_client(store: Store) -> Any:
    import s3fs

    return s3fs.S3FileSystem(**store.storage_options, use_listings_cache=False, skip_instance_cache=True)


def test_an_injected_error_reaches_a_plain_http_client(fake_gcs: FakeGCS, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(fake_gcs)
    proxy.fail_next(status=429, code="TooManyRequests")
    with pytest.raises(urllib.error.HTTPError) as failure:
        urllib.request.urlopen(f"{proxy.url}/storage/v1/b?project=test", timeout=10)
    with failure.value as answer:
        assert answer.code == 429
        assert b"<Code>TooManyRequests</Code>" in answer.read()


# -- the proxy and its faults


def test_bytes_pass_both_ways_and_ends_too(echo: int, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(echo)
    with dial(proxy) as sock:
        sock.sendall(b"hello")
        assert receive(sock, 5) == b"hello"
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    assert (proxy.connections, proxy.sent, proxy.received) == (1, 5, 5)
    assert not proxy.requests, "this was no HTTP"


def test_delay_is_paid_once_each_way_however_much_is_sent(echo: int, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(echo)
    proxy.delay = 0.1
    with dial(proxy) as sock:
        started = time.monotonic()
        sock.sendall(b"x" * 1_000_000)
        assert len(receive(sock, 1_000_000)) == 1_000_000
        assert 0.2 <= time.monotonic() - started < 1.5, "16 chunks one after the other would take 3.2 s"


def test_bandwidth_holds_for_each_connection(echo: int, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(echo)
    proxy.bandwidth = 500_000
    with dial(proxy) as sock:
        started = time.monotonic()
        sock.sendall(b"x" * 150_000)
        assert len(receive(sock, 150_000)) == 150_000
        assert time.monotonic() - started >= 0.25


@pytest.mark.parametrize("side", ["to_client", "to_server"])
def test_a_connection_is_reset_after_so_many_bytes_and_the_next_is_not(
    echo: int, make_proxy: MakeProxy, side: str
) -> None:
    proxy = make_proxy(echo)
    proxy.reset_after(**{side: 1000})
    with dial(proxy) as sock:
        sock.sendall(b"x" * 4000)
        with pytest.raises(ConnectionResetError):
            receive(sock, 4000)
    assert (proxy.received if side == "to_client" else proxy.sent) == 1000

    with dial(proxy) as sock:
        sock.sendall(b"x" * 4000)
        assert len(receive(sock, 4000)) == 4000


def test_a_black_hole_accepts_and_is_silent_and_what_waits_goes_on_after_it(
    echo: int, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy(echo)
    proxy.black_hole = True
    with dial(proxy, timeout=0.2) as sock:
        sock.sendall(b"anybody?")
        with pytest.raises(TimeoutError):
            sock.recv(1)
        assert proxy.sent == 0
        proxy.black_hole = False
        sock.settimeout(10)
        assert receive(sock, 8) == b"anybody?"


def test_what_a_client_gave_up_in_a_black_hole_never_arrives(echo: int, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(echo)
    proxy.black_hole = True
    with dial(proxy) as sock:
        sock.sendall(b"given up")
        wait_until(lambda: proxy.connections == 1)
    with dial(proxy) as other:
        other.sendall(b"kept up")
        wait_until(lambda: proxy.connections == 2)
        proxy.black_hole = False
        assert receive(other, 7) == b"kept up"
    assert proxy.sent == 7


def test_a_proxy_that_refuses_resets_those_who_come_and_those_who_are_there(
    echo: int, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy(echo)
    with dial(proxy) as before:
        before.sendall(b"x")
        assert receive(before, 1) == b"x"
        proxy.refuse = True
        with pytest.raises(ConnectionResetError):
            before.recv(1)
    with pytest.raises(ConnectionResetError), dial(proxy) as after:
        after.recv(1)

    proxy.heal()
    with dial(proxy) as sock:
        sock.sendall(b"x")
        assert receive(sock, 1) == b"x"


def test_a_reset_by_the_client_reaches_the_server(make_proxy: MakeProxy) -> None:
    with socket.create_server((HOST, 0)) as listener:
        proxy = make_proxy(listener.getsockname()[1])
        client = dial(proxy)
        server, _ = listener.accept()
        with server:
            server.settimeout(10)
            client.sendall(b"x")
            assert server.recv(1) == b"x"
            reset(client)
            with pytest.raises(ConnectionResetError):
                server.recv(1)


def test_no_upstream_is_a_reset(make_proxy: MakeProxy) -> None:
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionResetError), dial(make_proxy(port)) as sock:
        sock.recv(1)


# -- reading HTTP

PUT = b"PUT /a?b=c HTTP/1.1\r\nHost: h\r\nContent-Length: 12\r\n\r\n"
PUT_BODY = b"GET / HTTP\r\n"  # a body that looks like a request
CHUNKED = b"POST /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED_BODY = b"5;x=y\r\nGET /\r\nb\r\nDELETE /e f\r\n0\r\nTrailer: t\r\n\r\n"
GET = b"GET /last HTTP/1.1\r\n\r\n"
CONVERSATION = PUT + PUT_BODY + CHUNKED + CHUNKED_BODY + GET


@pytest.mark.parametrize("step", [1, 2, 3, 7, 40, len(CONVERSATION)])
def test_requests_are_found_at_their_boundaries_however_the_bytes_are_cut(step: int) -> None:
    splitter = RequestSplitter()
    pieces = [
        piece
        for start in range(0, len(CONVERSATION), step)
        for piece in splitter.feed(CONVERSATION[start : start + step])
    ]
    assert b"".join(data for _, data in pieces) == CONVERSATION
    assert [(request.method, request.target) for request, _ in pieces if request is not None] == [
        ("PUT", "/a?b=c"),
        ("POST", "/c"),
        ("GET", "/last"),
    ]
    assert pieces[0][1] == PUT if step >= len(PUT) else True


@pytest.mark.parametrize("data", [b"USER anonymous\r\n", b"SSH-2.0-x\r\n", b"\x16\x03\x01", b"x" * 100_000])
def test_other_protocols_pass_as_they_are(data: bytes) -> None:
    splitter = RequestSplitter()
    pieces = [*splitter.feed(data), *splitter.feed(GET)]
    assert b"".join(part for _, part in pieces) == data + GET
    assert all(request is None for request, _ in pieces)


def test_headers_are_named_in_lower_case() -> None:
    ((request, _),) = RequestSplitter().feed(b"GET / HTTP/1.1\r\nX-Amz-Date:  now \r\n\r\n")
    assert request == Request("GET", "/", {"x-amz-date": "now"})
