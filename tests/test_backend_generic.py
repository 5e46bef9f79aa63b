"""Stores that only fsspec's plain interface reaches: read-only ones (zip, http) and SFTP."""

from __future__ import annotations

import errno
import functools
import http.server
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.backend.backend import Backend, open_backend
from tests.conftest import Store, free_ports
from tests.servers import FaultProxy, SFTPServer, store_ports
from tests.test_backend import failing, get, is_clear, listed, put

MakeBackend = Callable[..., Backend]

FILES = {"a.txt": b"first", "folder/b c.txt": b"second" * 1000, "folder/deep/ü.txt": b""}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "files.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name, data in FILES.items():
            file.writestr(name, data)
    return path


class Ranged(http.server.SimpleHTTPRequestHandler):
    """The standard library's file server, taught the ranges that every real one knows."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def send_head(self) -> Any:
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not wanted or not path.is_file():
            return super().send_head()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        size = path.stat().st_size
        start, stop = int(first), min(int(last or size - 1) + 1, size)
        if start >= size:
            self.send_error(416)
            return None
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(path.read_bytes()[start:stop])
        return None


@pytest.fixture
def website(tmp_path: Path) -> Iterator[str]:
    """The URL of a real HTTP server over the files."""
    folder = tmp_path / "website"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Ranged, directory=str(folder))
    )
    server.daemon_threads = True
    store_ports.add(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(params=["zip", "http"])
def read_only(request: pytest.FixtureRequest, make_backend: MakeBackend) -> Backend:
    if request.param == "zip":
        return make_backend(f"zip::{request.getfixturevalue('archive')}")
    return make_backend(request.getfixturevalue("website"))


def test_a_read_only_store_is_listed_and_read(read_only: Backend) -> None:
    read_only.check()

    assert set(listed(read_only)) == {"a.txt", "folder"}
    assert listed(read_only)["folder"].is_dir
    for path, data in FILES.items():
        if (read_only.display.startswith("http") and not path.isascii()) or " " in path:
            continue  # fsspec's http leaves names as they stand in the page's links
        assert get(read_only, path) == data
        assert read_only.stat(path).size == len(data)
    assert read_only.fetch("a.txt", 1, 3, None).result() == [b"ir"]


def test_a_read_only_store_refuses_to_change(read_only: Backend) -> None:
    assert not read_only.capability.writes
    actions: list[Callable[[], Any]] = [
        lambda: read_only.upload("x"),
        lambda: read_only.mkdir("x"),
        lambda: read_only.rmdir("folder"),
        lambda: read_only.remove("a.txt"),
        lambda: read_only.rename("a.txt", "b"),
        lambda: read_only.copy("a.txt", "b"),
        lambda: read_only.set_mtime("a.txt", 1.0),
    ]
    for action in actions:
        with failing(errno.EROFS) as failed:
            action()
        assert "read-only" in str(failed.value)


@pytest.mark.parametrize("path", ["missing", "folder/missing"])
def test_what_a_read_only_store_lacks_is_enoent(read_only: Backend, path: str) -> None:
    with failing(errno.ENOENT) as failed:
        read_only.stat(path)
    assert failed.value.filename == path


def test_a_zip_has_the_times_of_its_files(archive: Path, make_backend: MakeBackend) -> None:
    with zipfile.ZipFile(archive) as file:
        year = file.getinfo("a.txt").date_time[0]
    mtime = make_backend(f"zip::{archive}").stat("a.txt").mtime

    assert mtime is not None
    assert time.gmtime(mtime).tm_year == year


def test_a_zip_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError) as failed:  # noqa: PT011
        open_backend(f"zip::{tmp_path}/nowhere.zip").check()
    assert failed.value.errno == errno.ENOENT
    assert is_clear(failed.value)


def test_a_website_that_is_not_there_is_unreachable(make_backend: MakeBackend) -> None:
    with failing(errno.EHOSTUNREACH):
        make_backend(f"http://127.0.0.1:{free_ports(1)[0]}").check()


# -- SFTP


@pytest.fixture
def sftp(sftp_server: SFTPServer) -> Store:
    folder = sftp_server.root / f"sftp-{os.urandom(5).hex()}"
    folder.mkdir()
    return Store("local", f"sftp://127.0.0.1{folder}", sftp_server.storage_options, str(folder), None)


def test_large_files_go_there_and_back_and_leave_nothing_else(sftp: Store, make_backend: MakeBackend) -> None:
    backend = make_backend(sftp)
    data = os.urandom(20 * 2**20 + 7)
    put(backend, "big", data, step=2**20)

    assert sftp.list() == {"big"}
    assert sftp.read("big") == data
    assert backend.fetch("big", 2**20, 2**20 + 10, None).result(timeout=30) == [data[2**20 : 2**20 + 10]]


def test_links_at_the_far_end_are_left_out_unless_they_are_wanted(sftp: Store, make_backend: MakeBackend) -> None:
    Path(sftp.root, "file").write_bytes(b"123")
    Path(sftp.root, "link").symlink_to("file")
    Path(sftp.root, "nowhere").symlink_to("missing")

    assert set(listed(make_backend(sftp))) == {"file"}
    followed = listed(make_backend(sftp, follow_links=True))
    assert set(followed) == {"file", "link"}
    assert (followed["link"].size, followed["link"].name) == (3, "link")


def test_a_server_that_was_started_again_is_used_again(
    sftp: Store, sftp_server: SFTPServer, make_backend: MakeBackend
) -> None:
    sftp.write("a", b"1")
    backend = make_backend(sftp, low_level_retries=3)
    assert set(listed(backend)) == {"a"}
    sftp_server.stop()
    sftp_server.start()

    assert set(listed(backend)) == {"a"}
    assert get(backend, "a") == b"1"


def test_a_line_that_was_cut_is_made_again(sftp: Store, make_proxy: Any, make_backend: MakeBackend) -> None:
    sftp.write("a", b"1")
    proxy: FaultProxy = make_proxy(sftp.storage_options["port"])
    backend = make_backend(sftp, {"port": proxy.port}, low_level_retries=3)
    for _ in range(2):
        assert set(listed(backend)) == {"a"}
        proxy.cut()
    assert get(backend, "a") == b"1"
    put(backend, "b", b"2")
    proxy.cut()
    put(backend, "c", b"3")

    assert sftp.list() == {"a", "b", "c"}


def test_a_server_that_is_away_is_an_error_and_later_none(
    sftp: Store, make_proxy: Any, make_backend: MakeBackend
) -> None:
    proxy: FaultProxy = make_proxy(sftp.storage_options["port"])
    backend = make_backend(sftp, {"port": proxy.port})
    backend.check()
    proxy.refuse = True
    with pytest.raises(OSError) as failed:  # noqa: PT011
        backend.list("")
    assert failed.value.errno in {errno.ECONNRESET, errno.EHOSTUNREACH}
    assert is_clear(failed.value)
    proxy.refuse = False

    assert backend.list("") == []


def test_a_server_that_hangs_is_an_error_in_time(sftp: Store, make_proxy: Any, make_backend: MakeBackend) -> None:
    proxy: FaultProxy = make_proxy(sftp.storage_options["port"])
    backend = make_backend(sftp, {"port": proxy.port}, read_timeout=0.9, connect_timeout=0.9, low_level_retries=1)
    backend.check()
    proxy.black_hole = True
    began = time.monotonic()
    with pytest.raises(OSError) as failed:  # noqa: PT011
        backend.list("")
    assert failed.value.errno in {errno.ECONNRESET, errno.ETIMEDOUT}
    assert time.monotonic() - began < 10


def test_wrong_keys_are_told_at_the_start(sftp: Store, make_backend: MakeBackend) -> None:
    options = {**sftp.storage_options, "client_keys": [], "password": "wrong-secret", "agent_path": None}
    with failing(errno.EACCES) as failed:
        make_backend(sftp.url, options).check()
    assert "wrong-secret" not in str(failed.value)
