"""Compare transfers in mode off with rclone serve ftp, over S3: python benchmarks/bench_transfer.py

A big download from a near and from a far store, a big upload, many small files both ways, and idle memory.
The far store is the same one behind a proxy with a round trip of 20 ms and 40 MB/s a connection. Each peer's
first download of a file is checked by hash and not timed; every upload is checked at the store. `--size` is
the size of the near download; the upload has half of it, the far download a quarter.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from far_store import FarStore
from harness import MIB, Benchmark, Sample, Subject, parser, size
from load import Download, Upload
from peers import Peer, Server

DEFAULT_SIZE = 1 << 30
SMALL_SIZE = 10 << 10
SMALL_FILES = {1: 300, 16: 1600}
"""Operations of one run, by connections."""

UploadNames = Callable[[], str]


def main() -> None:
    options = _options()
    with Benchmark("transfer", options) as bench:
        bench.store.put_many(["uploads/first"], b"so that the folder exists")
        chosen = options.only or SUBJECTS
        for name in chosen:
            SUBJECTS[name](bench, options.size)


def _options() -> argparse.Namespace:
    arguments = parser(__doc__, list(SUBJECTS))
    arguments.add_argument("--size", type=size, default=DEFAULT_SIZE, help="of the download (default: 1G)")
    options = arguments.parse_args()
    options.scaled = options.size != DEFAULT_SIZE
    return options


def download(bench: Benchmark, bytes_wanted: int) -> None:
    with ExitStack() as stack:
        servers = bench.start_all(stack)
        _compare_download(bench, servers, bytes_wanted, "near store", "1.5 x rclone, peak at most 250 MiB")


def far(bench: Benchmark, bytes_wanted: int) -> None:
    with ExitStack() as stack:
        proxy = stack.enter_context(FarStore(bench.store.port, round_trip=0.02, bytes_per_second=40e6))
        servers = bench.start_all(stack, endpoint_port=proxy.port)
        _compare_download(bench, servers, bytes_wanted // 4, "far store", "2 x rclone")


def _compare_download(
    bench: Benchmark, servers: Sequence[Server], bytes_wanted: int, where: str, goal: str
) -> None:
    name = f"download-{bytes_wanted}"
    source = random_file(bench.folder / name, bytes_wanted)
    bench.store.put_file(f"files/{name}", source)
    expected = (bytes_wanted, sha256_of(source))
    source.unlink()
    command = f"RETR /files/{name}"
    for server in servers:
        if bench.digest(server, command) != expected:
            raise RuntimeError(f"{server.peer.name} sent other bytes than the store has")

    def measure(server: Server) -> Sample:
        cost = bench.load(server, [[Download(command, bytes_wanted)]])
        return Sample(bytes_wanted / cost.seconds / 1e6, 1, cost.cpu, cost.peak)

    subject = Subject(f"download of {bytes_wanted // MIB} MiB, mode off, {where}", "MB/s", goal)
    bench.compare(subject, {server.peer.name: partial(measure, server) for server in servers})


def upload(bench: Benchmark, bytes_wanted: int) -> None:
    bytes_wanted //= 2
    source = random_file(bench.folder / "upload", bytes_wanted)
    expected = sha256_of(source)
    keys = (f"uploads/big-{number}" for number in itertools.count())

    def measure(server: Server) -> Sample:
        key = next(keys)
        cost = bench.load(server, [[Upload(f"STOR /{key}", str(source))]])
        if bench.store.digest(key) != expected:
            raise RuntimeError(f"{server.peer.name} stored other bytes than it was sent")
        bench.store.delete([key])
        return Sample(bytes_wanted / cost.seconds / 1e6, 1, cost.cpu, cost.peak)

    title = f"upload of {bytes_wanted // MIB} MiB, mode off, to 226"
    subject = Subject(title, "MB/s", "1 x rclone, peak at most 250 MiB")
    with ExitStack() as stack:
        servers = bench.start_all(stack)
        bench.compare(subject, {server.peer.name: partial(measure, server) for server in servers})
    source.unlink()


def small(bench: Benchmark, _bytes_wanted: int) -> None:
    source = random_file(bench.folder / "small", SMALL_SIZE)
    names = [f"small/file-{number:05}" for number in range(max(SMALL_FILES.values()))]
    bench.store.put_many(names, source.read_bytes())
    with ExitStack() as stack:
        servers = bench.start_all(stack)
        for server in servers:
            if bench.digest(server, f"RETR /{names[0]}") != (SMALL_SIZE, sha256_of(source)):
                raise RuntimeError(f"{server.peer.name} sent other bytes than the store has")
        for connections, files in SMALL_FILES.items():
            _compare_small_downloads(bench, servers, names[:files], connections)
        for connections, files in SMALL_FILES.items():
            _compare_small_uploads(bench, servers, source, files, connections)


def _compare_small_downloads(
    bench: Benchmark, servers: Sequence[Server], names: Sequence[str], connections: int
) -> None:
    steps = [Download(f"RETR /{name}", SMALL_SIZE) for name in names]
    scripts = [steps[start::connections] for start in range(connections)]

    def measure(server: Server) -> Sample:
        cost = bench.load(server, scripts)
        return Sample(len(steps) / cost.seconds, len(steps), cost.cpu, cost.peak)

    subject = Subject(f"downloads of 10 KiB, mode off, connections: {connections}", "files/s", "none")
    bench.compare(subject, {server.peer.name: partial(measure, server) for server in servers})


def _compare_small_uploads(
    bench: Benchmark, servers: Sequence[Server], source: Path, files: int, connections: int
) -> None:
    digest = sha256_of(source)
    batches = itertools.count()

    def measure(server: Server) -> Sample:
        prefix = f"uploads/small-{connections}-{next(batches)}-"
        keys = [f"{prefix}{number:05}" for number in range(files)]
        steps = [Upload(f"STOR /{key}", str(source)) for key in keys]
        cost = bench.load(server, [steps[start::connections] for start in range(connections)])
        complete = bench.store.sizes(prefix) == dict.fromkeys(keys, SMALL_SIZE)
        if not complete or bench.store.digest(keys[-1]) != digest:
            raise RuntimeError(f"{server.peer.name} stored other bytes than it was sent")
        bench.store.delete(keys)
        return Sample(files / cost.seconds, files, cost.cpu, cost.peak)

    subject = Subject(f"uploads of 10 KiB, mode off, connections: {connections}", "files/s", "none")
    bench.compare(subject, {server.peer.name: partial(measure, server) for server in servers})


def idle(bench: Benchmark, _bytes_wanted: int) -> None:
    def measure(peer: Peer) -> Sample:
        with bench.start(peer) as server:
            memory = bench.idle_memory(server)
            return Sample(memory / MIB, 1, server.meter.cpu_seconds(), server.meter.peak_memory())

    subject = Subject("idle server; CPU is that of the start", "MiB", "none", more_is_better=False)
    bench.compare(subject, {peer.name: partial(measure, peer) for peer in bench.peers})


def random_file(path: Path, bytes_wanted: int) -> Path:
    with path.open("wb") as target:
        for start in range(0, bytes_wanted, MIB):
            target.write(os.urandom(min(MIB, bytes_wanted - start)))
    return path


def sha256_of(path: Path) -> str:
    seen = hashlib.sha256()
    with path.open("rb") as source:
        while data := source.read(MIB):
            seen.update(data)
    return seen.hexdigest()


SUBJECTS: dict[str, Callable[[Benchmark, int], None]] = {
    "download": download,
    "far": far,
    "upload": upload,
    "small": small,
    "idle": idle,
}

if __name__ == "__main__":
    main()
