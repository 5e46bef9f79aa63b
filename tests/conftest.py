"""What tests are made of: stores to look into, FTP servers in this process or launched, and FTP clients.

The stores are read and written here without ftpvfs, so that a test compares what it did with what came of it.
"""

from __future__ import annotations

import contextlib
import ftplib
import gc
import io
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.downloads import WATCH, Client, TLSClient
from tests.processes import child
from tests.servers import (
    HOST,
    FakeGCS,
    FaultProxy,
    SeaweedFS,
    SFTPServer,
    free_ports,
    reset,
    server_pids,
    store_ports,
    wait_until,
)

__all__ = [
    "Store",
    "child",
    "connect",
    "download",
    "free_ports",
    "last_reply",
    "names",
    "open_transfer",
    "reply",
    "reset",
    "run_program",
    "upload",
    "wait_until",
]

ROOT = Path(__file__).parents[1]
STORES = ("local", "memory", "s3", "gs")
CLIENT_TIMEOUT = 30.0  # seconds of silence after which a test's FTP client gives up
START_TIMEOUT = 30.0  # seconds for `python -m ftpvfs` to print its line; botocore and gcsfs take 2 to import


# -- the fast part of the suite

# `-m fast`, which `.ci/run` runs on the oldest and the newest Python of the machine as well: the pure modules, the VFS,
# the cache and FTP sessions over a local folder or memory, and nothing that starts a store's server or a program.
FAST_MODULES = {
    "test_authorizer", "test_backend_local", "test_bans", "test_cache", "test_checksum", "test_config",
    "test_dircache", "test_downloads", "test_eviction", "test_filesystem", "test_ftp_downloads",
    "test_ftp_embedded", "test_ftp_sessions", "test_handle", "test_history", "test_index", "test_logs",
    "test_memory", "test_openmode", "test_paths", "test_proxy_protocol", "test_ranges", "test_readahead",
    "test_records", "test_shared_names", "test_state", "test_verbs", "test_vfs", "test_vfs_cache",
    "test_waiting",
}  # fmt: skip
SLOW_FIXTURES = {"child", "fake_gcs", "gs_store", "launched", "make_proxy", "s3_store", "seaweedfs", "sftp_server"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = item.path.stem
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        parts = (each for value in values for each in (value if isinstance(value, tuple) else (value,)))
        kinds = {each for each in parts if isinstance(each, str)}
        is_slow = kinds & {"s3", "gs"} or SLOW_FIXTURES & {*item.fixturenames} or "stress" in item.keywords
        if module in FAST_MODULES and not is_slow:
            item.add_marker("fast")


# -- the machine, as far as a test may see it

THEIRS = re.compile(
    r"AWS_|GOOGLE_|GCS|STORAGE_EMULATOR|FSSPEC_|FTPVFS_(?!TEST_)|RCLONE_|(HTTPS?|ALL|NO|FTP)_PROXY$", re.I
)


@pytest.fixture(scope="session", autouse=True)
def _no_accounts_of_the_user() -> Iterator[None]:
    """No credentials, configuration or proxy of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(THEIRS.match, list(os.environ)):
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("NO_GCE_CHECK", "true")
        yield


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, for it and the programs that it starts."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for variable, folder in (("CACHE", ".cache"), ("CONFIG", ".config"), ("DATA", ".local/share")):
        monkeypatch.setenv(f"XDG_{variable}_HOME", str(home / folder))
    return home


# -- what a test leaves behind


# What lives as long as the process by right: fsspec's loop and its resolver, and the closer of gcsfs's files.
LASTING_THREADS = ("fsspecIO", "asyncio_", "gcsfs-deferred-close")


@pytest.fixture(scope="session")
def _lasting_parts() -> None:
    """Start what lives as long as the process before anybody counts."""
    import fsspec.asyn

    fsspec.asyn.get_loop()


@pytest.fixture(autouse=True)
def _nothing_left_behind(_lasting_parts: None) -> Iterator[None]:
    """Fail a test after which there are threads, descriptors or processes that were not there before it."""
    before = belongings()
    yield
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not new_belongings(before), timeout=0.05)
        return
    gc.collect()  # what only a cycle of garbage holds is no leak
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not new_belongings(before), timeout=3)
    left = new_belongings(before)
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(sorted(left.values())), pytrace=False)


@pytest.fixture(scope="session")
def _watched_downloads() -> Iterator[None]:
    with WATCH.installed():
        yield


@pytest.fixture(autouse=True)
def _true_downloads(_watched_downloads: None) -> Iterator[None]:
    """Fail a test in which a download was answered 226 that is not the file."""
    yield
    wrong = [*WATCH.wrong]
    WATCH.wrong.clear()
    WATCH.opened.clear()
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def new_belongings(before: dict[object, str]) -> dict[object, str]:
    return {key: text for key, text in belongings().items() if key not in before}


def belongings() -> dict[object, str]:
    """Threads, descriptors and child processes of this process, with a word for each, but those that last."""
    found: dict[object, str] = {}
    for thread in threading.enumerate():
        if not thread.name.startswith(LASTING_THREADS):
            found["thread", thread.ident] = f"thread {thread.name}"
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if process.pid not in server_pids:
                found["process", process.pid] = f"process {' '.join(process.cmdline())[:200]} ({process.status()})"
    found.update(_descriptors())
    return found


def _descriptors() -> dict[object, str]:
    process = psutil.Process()
    connections = {connection.fd: connection for connection in process.net_connections("all")}
    found: dict[object, str] = {}
    for descriptor, target in _open_descriptors(process):
        connection = connections.get(descriptor)
        if connection is not None and connection.raddr and connection.type == socket.SOCK_STREAM:
            if isinstance(connection.raddr, tuple) and connection.raddr[1] in store_ports:
                continue
            target = f"{target} {connection.laddr} -> {connection.raddr} {connection.status}"
        elif connection is not None:
            target = f"{target} {connection.laddr} {connection.status}"
        found["descriptor", descriptor, target] = f"descriptor {descriptor}: {target}"
    return found


def _open_descriptors(process: psutil.Process) -> Iterable[tuple[int, str]]:
    """(number, what it is), from /proc where there is one; else files and connections as psutil sees them."""
    folder = Path("/proc/self/fd")
    if not folder.exists():
        yield from ((file.fd, file.path) for file in process.open_files())
        yield from ((connection.fd, "socket") for connection in process.net_connections("all"))
        return
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(folder / name)
            if not target.startswith(f"/proc/{os.getpid()}/"):  # the descriptor of this very listing
                yield int(name), target


# -- stores


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[SeaweedFS]:
    """A running S3 store, one for each test process."""
    with SeaweedFS() as server:
        yield server


@pytest.fixture(scope="session")
def fake_gcs() -> Iterator[FakeGCS]:
    """A running GCS store, one for each test process."""
    with FakeGCS() as server:
        yield server


@pytest.fixture(scope="session")
def sftp_server() -> Iterator[SFTPServer]:
    """A running sshd; tests that ask for it are skipped where there is none."""
    reason = SFTPServer.why_not()
    if reason is not None:
        pytest.skip(reason)
    with SFTPServer() as server:
        yield server


@dataclass(frozen=True)
class Store:
    """A place at a real store that one test has for itself, seen without ftpvfs. Keys are relative to it."""

    kind: str  # local, memory, s3 or gs
    url: str
    storage_options: dict[str, Any]
    root: str  # folder, or bucket with prefix, as `filesystem` names it
    filesystem: Any  # fsspec's; None for a local folder
    server: Any = None  # SeaweedFS or FakeGCS

    @property
    def bucket(self) -> str:
        return self.root.partition("/")[0]

    def path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def read(self, key: str) -> bytes:
        """All bytes of an object; FileNotFoundError when there is none."""
        return self.bytes_of(key)

    def bytes_of(self, key: str) -> bytes:
        """The same, where a subclass does more to `read`."""
        if self.kind == "local":
            return Path(self.path(key)).read_bytes()
        data: bytes = self.filesystem.cat_file(self.path(key))
        return data

    def write(self, key: str, data: bytes = b"", *, mtime: float | None = None) -> None:
        """Write an object, and folders above it; `mtime` in seconds, where rclone keeps it."""
        options: dict[str, Any] = {}
        if self.kind == "local":
            Path(self.path(key)).parent.mkdir(parents=True, exist_ok=True)
            Path(self.path(key)).write_bytes(data)
            if mtime is not None:
                os.utime(self.path(key), (mtime, mtime))
            return
        if mtime is not None and self.kind == "s3":
            options["Metadata"] = {"mtime": str(mtime)}
        elif mtime is not None and self.kind == "gs":
            options["metadata"] = {"mtime": _rfc3339(mtime)}
        elif mtime is not None:
            raise ValueError(f"a {self.kind} store keeps no time of its own")
        with warnings.catch_warnings():  # gcsfs sends all in one piece, which aiohttp finds too long for its loop
            warnings.simplefilter("ignore", ResourceWarning)
            self.filesystem.pipe_file(self.path(key), data, **options)

    def delete(self, key: str) -> None:
        if self.kind == "local":
            os.remove(self.path(key))
        else:
            self.filesystem.rm_file(self.path(key))

    def list(self) -> set[str]:
        """The keys of all objects, hidden files, temporary ones and folder markers (`a/`) among them."""
        return {name.removeprefix(f"{self.root}/") for name in self._names()} - {self.root}

    def _names(self) -> Iterable[str]:
        if self.kind == "local":
            return (str(path) for path in Path(self.root).rglob("*") if not path.is_dir())
        if self.kind == "memory":
            return (name for name in self.filesystem.store if name.startswith(f"{self.root}/"))
        prefix = f"{self.root}/".partition("/")[2]
        return (f"{self.bucket}/{key}" for key in self._listed(prefix))

    def _listed(self, prefix: str) -> Iterator[str]:
        """The store's own listing, page by page: fsspec's leaves out the markers of folders."""
        if self.kind == "s3":
            more: dict[str, str] = {}
            while True:
                page = self.filesystem.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=prefix, **more)
                yield from (entry["Key"] for entry in page.get("Contents", ()))
                if not page.get("IsTruncated"):
                    return
                more = {"ContinuationToken": page["NextContinuationToken"]}
        token: str | None = None
        while True:
            page = self.filesystem.call(
                "GET", "b/{}/o", self.bucket, prefix=prefix, pageToken=token, json_out=True
            )
            yield from (entry["name"] for entry in page.get("items", ()))
            token = page.get("nextPageToken")
            if not token:
                return

    def mtime(self, key: str) -> float:
        """Seconds; what a client set, where the store's kind keeps that, else when the object was written."""
        if self.kind == "local":
            return os.stat(self.path(key)).st_mtime
        value = self.metadata(key).get("mtime")
        if value is None:
            written: datetime = self.filesystem.modified(self.path(key))
            return written.timestamp()
        return float(value) if self.kind == "s3" else _from_rfc3339(value)

    def metadata(self, key: str) -> dict[str, str]:
        """The object's user metadata."""
        if self.kind == "s3":
            metadata = self.filesystem.metadata(self.path(key))
        elif self.kind == "gs":
            metadata = self.filesystem.info(self.path(key)).get("metadata") or {}
        else:
            metadata = {}
        return dict(metadata)

    def uploads(self) -> set[str]:
        """Keys of uploads begun and neither completed nor aborted, if the store can tell (S3); else none."""
        if self.kind != "s3":
            return set()
        prefix = f"{self.root}/".partition("/")[2]
        keys = (key for key in self.server.uploads(self.bucket) if key.startswith(prefix))
        return {key.removeprefix(prefix) for key in keys}

    def proxied(self, proxy: FaultProxy) -> Store:
        """The same place, its `storage_options` through `proxy`; `read` and the others still go past it."""
        if "endpoint_url" not in self.storage_options:
            raise ValueError(f"a {self.kind} store is behind no port")
        return replace(self, storage_options={**self.storage_options, "endpoint_url": proxy.url})


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def _from_rfc3339(text: str) -> float:
    """Also with nine digits after the point, which rclone writes and `fromisoformat` before 3.11 refuses."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


StoreFactory = Callable[..., Store]


@pytest.fixture
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreFactory]:
    """make_store(kind, *, whole_bucket=False) -> Store: an empty place at a store of that kind.

    On object stores it is a prefix in a bucket that all tests share, or with `whole_bucket` one of its own.
    """
    with contextlib.ExitStack() as cleanup:

        def make(kind: str, *, whole_bucket: bool = False) -> Store:
            name = f"{kind}-{os.urandom(5).hex()}"
            if kind == "local":
                folder = tmp_path / name
                folder.mkdir()
                return Store(kind, str(folder), {}, str(folder), None)
            if kind == "memory":
                return _memory_store(name, cleanup)
            server = request.getfixturevalue({"s3": "seaweedfs", "gs": "fake_gcs"}[kind])
            return _bucket_store(kind, server, name, whole_bucket, cleanup)

        yield make


def _memory_store(name: str, cleanup: contextlib.ExitStack) -> Store:
    """fsspec's memory is one for the whole process, so each test has a folder of it."""
    import fsspec

    filesystem = fsspec.filesystem("memory")
    filesystem.mkdir(f"/{name}")
    cleanup.callback(filesystem.rm, f"/{name}", recursive=True)
    return Store("memory", f"memory://{name}", {}, f"/{name}", filesystem)


def _bucket_store(
    kind: str, server: SeaweedFS | FakeGCS, name: str, whole_bucket: bool, cleanup: contextlib.ExitStack
) -> Store:
    if whole_bucket:
        root = server.create_bucket(name)
        cleanup.callback(server.delete_bucket, root)
    else:
        root = f"{server.shared_bucket}/{name}"
        cleanup.callback(_delete_tree, server.filesystem, root)
    return Store(kind, f"{kind}://{root}", server.storage_options, root, server.filesystem, server)


def _delete_tree(filesystem: Any, root: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm(root, recursive=True)


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, make_store: StoreFactory) -> Store:
    """An empty place at each kind of store in turn.

    To choose some: `@pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)`.
    """
    return make_store(request.param)


@pytest.fixture
def local_store(make_store: StoreFactory) -> Store:
    return make_store("local")


@pytest.fixture
def memory_store(make_store: StoreFactory) -> Store:
    return make_store("memory")


@pytest.fixture
def s3_store(make_store: StoreFactory) -> Store:
    return make_store("s3")


@pytest.fixture
def gs_store(make_store: StoreFactory) -> Store:
    return make_store("gs")


@pytest.fixture
def make_proxy() -> Iterator[Callable[[Any], FaultProxy]]:
    """make_proxy(server or store or port) -> FaultProxy before it, until the test ends."""
    with contextlib.ExitStack() as cleanup:

        def make(target: Any) -> FaultProxy:
            server = getattr(target, "server", target)
            proxy = cleanup.enter_context(FaultProxy(getattr(server, "port", server)))
            if isinstance(server, FakeGCS):
                cleanup.enter_context(server.known_as(proxy.url))
            return proxy

        yield make


# -- backends


@pytest.fixture
def make_backend() -> Iterator[Callable[..., Any]]:
    """make_backend(store or URL, options=None, **tuning) -> Backend, closed when the test ends.

    One retry at most unless `low_level_retries` says otherwise: a test of a failure need not wait for ten.
    """
    with contextlib.ExitStack() as cleanup:

        def make(place: Any, options: dict[str, Any] | None = None, **tuning: Any) -> Any:
            from ftpvfs.backend.backend import Tuning, open_backend

            if isinstance(place, Store):
                place, options = place.url, {**place.storage_options, **(options or {})}
            backend = open_backend(place, options, Tuning(**{"low_level_retries": 2, **tuning}))
            cleanup.callback(backend.close)
            return backend

        yield make


# -- FTP servers


@pytest.fixture
def make_vfs() -> Iterator[Callable[..., Any]]:
    """make_vfs(store, **options) -> ftpvfs.VFS over it, closed when the test ends."""
    with contextlib.ExitStack() as cleanup:

        def make(store: Store, **options: Any) -> Any:
            from ftpvfs import VFS

            vfs = VFS(store.url, storage_options=store.storage_options, **options)
            if isinstance(store, Store):  # others cannot be looked into
                WATCH.stores[vfs] = store
            cleanup.callback(vfs.close)
            return vfs

        yield make


@pytest.fixture
def ftp_server(make_vfs: Callable[..., Any]) -> Iterator[Callable[..., tuple[str, int]]]:
    """serve(vfs or store, ...) -> address of an FTP server in a thread of this process.

    Keywords: `server_class` (VFSServer), `handler` (VFSHandler; any FTPHandler class), `users`
    ({name: password}; anonymous without), `home`, `perm`, `authorizer` instead of these three, `attributes`
    (of the handler class), and for a store the options of its VFS.
    """
    with contextlib.ExitStack() as cleanup:

        def serve(
            served: Any,
            *,
            server_class: type | None = None,
            handler: type | None = None,
            users: dict[str, str] | None = None,
            home: str = "/",
            perm: str = "elradfmwMT",
            authorizer: Any = None,
            attributes: dict[str, Any] | None = None,
            **options: Any,
        ) -> tuple[str, int]:
            vfs = make_vfs(served, **options) if isinstance(served, Store) else served
            authorizer = authorizer or _authorizer(users, home, perm)
            handler_class = _handler_class(vfs, handler, authorizer, attributes or {})
            server = cleanup.enter_context(serving(server_class, handler_class))
            return (HOST, server.address[1])

        yield serve


def _authorizer(users: dict[str, str] | None, home: str, perm: str) -> Any:
    from ftpvfs import VFSAuthorizer

    authorizer = VFSAuthorizer()
    for name, password in (users or {}).items():
        authorizer.add_user(name, password, home, perm=perm)
    if users is None:
        authorizer.add_anonymous(home, perm=perm)
    return authorizer


def _handler_class(vfs: Any, handler: type | None, authorizer: Any, attributes: dict[str, Any]) -> type:
    """A subclass for one server: pyftpdlib is configured by class attributes, and two must not share them."""
    from ftpvfs import VFSFilesystem, VFSHandler

    filesystem = type("TestFilesystem", (VFSFilesystem,), {"vfs": vfs})
    base = handler or VFSHandler
    return type(base.__name__, (base,), {"abstracted_fs": filesystem, "authorizer": authorizer, **attributes})


# Seconds for which one turn of our event loop may keep the other sessions waiting; a busy machine takes some of them.
LONGEST_TURN = 2.0


@contextlib.contextmanager
def serving(server_class: type | None, handler_class: type) -> Iterator[Any]:
    """A server with a loop and a thread of its own; of ours, no turn of the loop may have taken long."""
    from ftpvfs import VFSServer

    if server_class is not None and not issubclass(server_class, VFSServer):
        with serving_pyftpdlibs(server_class, handler_class) as server:
            yield server
        return
    server = (server_class or VFSServer)((HOST, 0), handler_class)
    server.ioloop.debug_slow_turn = LONGEST_TURN
    thread = threading.Thread(target=lambda: server.serve_forever(handle_exit=False), name="ftp-server")
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
    assert not server.ioloop.slow_turns, server.ioloop.slow_turns[0]
    assert not server.ioloop.offload.parked


@contextlib.contextmanager
def serving_pyftpdlibs(server_class: type, handler_class: type) -> Iterator[Any]:
    """A server of pyftpdlib's own classes."""
    from pyftpdlib.ioloop import IOLoop

    server = _own_class(server_class)((HOST, 0), handler_class, ioloop=IOLoop())
    is_stopped = threading.Event()

    def loop() -> None:
        while not is_stopped.is_set():
            server.serve_forever(timeout=0.05, blocking=False, handle_exit=False)
        server.close_all()

    thread = threading.Thread(target=loop, name="ftp-server")
    thread.start()
    try:
        yield server
    finally:
        is_stopped.set()
        thread.join()


def _own_class(server_class: type) -> type:
    """A subclass for one server: pyftpdlib keeps `_exit` in the class, so that closing one would end all."""
    import multiprocessing

    from pyftpdlib.servers import FTPServer, MultiprocessFTPServer, ThreadedFTPServer

    own: dict[str, Any] = {}
    if issubclass(server_class, MultiprocessFTPServer):
        own = {"_lock": multiprocessing.Lock(), "_exit": multiprocessing.Event()}
    elif issubclass(server_class, ThreadedFTPServer):
        own = {"_lock": threading.Lock(), "_exit": threading.Event(), "poll_timeout": 0.1}
    assert issubclass(server_class, FTPServer)
    return type(server_class.__name__, (server_class,), own)


# -- the program


@dataclass
class Launched:
    """A running `python -m ftpvfs`."""

    process: subprocess.Popen[str]
    line: str  # what it said when it listened
    address: tuple[str, int]
    errors: Path  # its stderr

    def log(self) -> str:
        return self.errors.read_text()

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20.0) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout)


LISTENING = re.compile(
    r"ftpvfs: serving (?P<url>.+) at ftps?://(?P<host>\[[^]]+\]|[^:]+):(?P<port>\d+) \(.+\)"
)


def program_environment(environment: dict[str, str] | None = None) -> dict[str, str]:
    """The test's environment with the tree under test first, whether it is installed or not."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FTPVFS_TEST_")}
    return {**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environment or {})}


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """launched(*arguments, env=None, cwd=None) -> Launched: `python -m ftpvfs` once it said that it listens.

    With `--addr 127.0.0.1:0` where the arguments give none. Killed when the test ends, if it did not stop it.
    """
    with contextlib.ExitStack() as cleanup:

        def launch(*arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Launched:
            if not any(argument.startswith("--addr") for argument in arguments):
                arguments += ("--addr", f"{HOST}:0")
            errors = tmp_path / f"stderr-{os.urandom(3).hex()}"
            with open(errors, "w") as stderr:
                process = subprocess.Popen(
                    [sys.executable, "-m", "ftpvfs", *arguments],
                    env=program_environment(env), cwd=cwd or tmp_path, text=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
                )  # fmt: skip
            cleanup.callback(_end, process)
            line = _first_line(process, START_TIMEOUT)
            match = LISTENING.fullmatch(line)
            if match is None:
                raise AssertionError(f"no line that it listens, but {line!r}; stderr:\n{errors.read_text()}")
            return Launched(process, line, (match["host"].strip("[]"), int(match["port"])), errors)

        yield launch


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _first_line(process: subprocess.Popen[str], timeout: float) -> str:
    """The first line of its stdout, "" when it ended without; AssertionError after `timeout` seconds."""
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True)  # type: ignore[union-attr]
    reader.start()
    try:
        return lines.get(timeout=timeout).rstrip("\n")
    except queue.Empty:
        process.kill()
        raise AssertionError(f"no line within {timeout} s") from None
    finally:
        reader.join()


def run_program(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ftpvfs` to its end, for what refuses to start and for the small commands."""
    return subprocess.run(
        [sys.executable, "-m", "ftpvfs", *arguments],
        env=program_environment(env), cwd=cwd, timeout=timeout, text=True, capture_output=True, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


# -- FTP clients


def connect(
    address: tuple[str, int],
    user: str = "anonymous",
    password: str = "guest",
    *,
    timeout: float = CLIENT_TIMEOUT,
) -> Client:
    """Log in, in binary mode and UTF-8; use it in a `with`."""
    ftp = Client(timeout=timeout, encoding="utf-8")
    try:
        ftp.connect(*address)
        ftp.login(user, password)
        ftp.voidcmd("TYPE I")
    except BaseException:
        ftp.close()
        raise
    return ftp


def upload(ftp: ftplib.FTP, path: str, data: bytes, *, rest: int | None = None, verb: str = "STOR") -> str:
    """Send all of `data` and return the last reply; with `rest`, at that offset."""
    return ftp.storbinary(f"{verb} {path}", io.BytesIO(data), rest=rest)


def download(ftp: ftplib.FTP, path: str, *, rest: int | None = None) -> bytes:
    """The bytes of a file, from `rest` on."""
    parts: list[bytes] = []
    ftp.retrbinary(f"RETR {path}", parts.append, blocksize=256 * 1024, rest=rest)
    return b"".join(parts)


def open_transfer(ftp: ftplib.FTP, command: str, *, rest: int | None = None) -> socket.socket:
    """The data connection of a transfer that has begun (its 150 was read).

    To end it: `close()` for a proper end, `reset(sock)` for a cut line; then `last_reply(ftp)`.
    """
    return ftp.transfercmd(command, rest)


def last_reply(ftp: ftplib.FTP) -> str:
    """The next reply, whatever its code: the one that ends a transfer."""
    try:
        return ftp.getresp()
    except (ftplib.error_temp, ftplib.error_perm) as error:
        return str(error)


def reply(ftp: ftplib.FTP, command: str) -> str:
    """The reply to a command, whatever its code, and whatever the command holds: ftplib refuses line ends."""
    assert ftp.sock is not None
    if isinstance(ftp, Client | TLSClient):
        ftp.note(command)
    ftp.sock.sendall(f"{command}\r\n".encode(ftp.encoding, "surrogateescape"))
    return last_reply(ftp)


def names(ftp: ftplib.FTP, path: str = "") -> set[str]:
    """The names in a folder, by MLSD, without the folder itself and the one above."""
    found = {name for name, facts in ftp.mlsd(path) if facts.get("type", "").lower() not in ("cdir", "pdir")}
    ftp.voidcmd("TYPE I")  # ftplib lists in ASCII mode and stays there, where SIZE is refused
    return found
