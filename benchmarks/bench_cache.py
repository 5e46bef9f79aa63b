"""Compare the disk cache with rclone serve ftp's, modes full and writes: python benchmarks/bench_cache.py

A big download through an empty cache and from a warm one, and many small files from a warm one, over S3 and over
a local folder. An empty cache is a new server's; each peer's bytes are checked by hash before they are timed.
A big upload and many small ones in mode writes: to the reply 226, and until the store has them.
`--size` is the size of the big download; the upload has half of it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from bench_transfer import SMALL_SIZE, random_file, sha256_of
from harness import MIB, Benchmark, Sample, Subject, parser, size
from load import Download, Upload
from peers import Peer, Server, program

DEFAULT_SIZE = 1 << 30
SMALL_FILES = {16: 3200, 64: 3200}
"""Operations of one run, by connections."""
FIRST = "files/first"
"""Downloaded before the clock runs: a server may contact the store when it is first asked for something."""
FULL = ("--vfs-cache-mode", "full")
WRITES = ("--vfs-cache-mode", "writes")
SMALL_UPLOADS = 1000
UPLOAD_CONNECTIONS = 16
STORED_WITHIN = 300.0
"""Seconds in which an upload must get to the store."""
WORKERS = {"ftpvfs": ("--workers", "2")}
"""rclone is one process with threads on all cores."""


def main() -> None:
    options = _options()
    with Benchmark("cache", options) as bench:
        for name in options.only or SUBJECTS:
            SUBJECTS[name](bench, options.size)


def _options() -> argparse.Namespace:
    arguments = parser(__doc__, list(SUBJECTS))
    arguments.add_argument("--size", type=size, default=DEFAULT_SIZE, help="of the download (default: 1G)")
    options = arguments.parse_args()
    options.scaled = options.size != DEFAULT_SIZE
    return options


class Place:
    """Where the files lie, and the peers that serve them from there."""

    def __init__(self, bench: Benchmark, name: str) -> None:
        self.bench = bench
        self.name = name
        self._folder = bench.folder / "served"
        self.peers = bench.peers if name == "S3" else [self._local(peer) for peer in bench.peers]

    def _local(self, peer: Peer) -> Peer:
        self._folder.mkdir(exist_ok=True)
        commands = {
            "rclone": [program("rclone"), "serve", "ftp", str(self._folder), "--config", ""],
            "ftpvfs": [*peer.command(0)[0][:3], str(self._folder)],
        }
        return replace(peer, command=lambda _: (commands[peer.name], {}))

    def put(self, names: Sequence[str], source: Path) -> None:
        """Store the same bytes under all names."""
        if self.name == "S3":
            if len(names) == 1:
                self.bench.store.put_file(names[0], source)
            else:
                self.bench.store.put_many(names, source.read_bytes())
            return
        for name in names:
            target = self._folder / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())

    def start(self, peer: Peer, *flags: str) -> Server:
        """A new server with an empty cache."""
        return self.bench.start(peer, *FULL, *flags)


def cold(bench: Benchmark, bytes_wanted: int, place_name: str = "S3") -> None:
    place, command, expected = _big_file(bench, bytes_wanted, place_name)

    def measure(peer: Peer) -> Sample:
        with place.start(peer) as server:
            bench.digest(server, f"RETR /{FIRST}")
            cost = bench.load(server, [[Download(command, bytes_wanted)]])
            return Sample(bytes_wanted / cost.seconds / 1e6, 1, cost.cpu, cost.peak)

    for peer in place.peers:
        with place.start(peer) as server:
            if bench.digest(server, command) != expected:
                raise RuntimeError(f"{peer.name} sent other bytes than the store has")
    title = f"download of {bytes_wanted // MIB} MiB through an empty cache, {place.name}"
    subject = Subject(title, "MB/s", "1.4 x rclone")
    bench.compare(subject, {peer.name: partial(measure, peer) for peer in place.peers})


def warm(bench: Benchmark, bytes_wanted: int, place_name: str = "S3") -> None:
    place, command, expected = _big_file(bench, bytes_wanted, place_name)

    def measure(server: Server) -> Sample:
        cost = bench.load(server, [[Download(command, bytes_wanted)]])
        return Sample(bytes_wanted / cost.seconds / 1e6, 1, cost.cpu, cost.peak)

    with ExitStack() as stack:
        servers = [stack.enter_context(place.start(peer)) for peer in place.peers]
        for server in servers:
            if bench.digest(server, command) != expected:
                raise RuntimeError(f"{server.peer.name} sent other bytes than the store has")
        title = f"download of {bytes_wanted // MIB} MiB from a warm cache, {place.name}"
        subject = Subject(title, "MB/s", "1.5 x rclone")
        bench.compare(subject, {server.peer.name: partial(measure, server) for server in servers})


def _big_file(bench: Benchmark, bytes_wanted: int, place_name: str) -> tuple[Place, str, tuple[int, str]]:
    place = Place(bench, place_name)
    source = random_file(bench.folder / "big", bytes_wanted)
    name = f"files/big-{bytes_wanted}"
    place.put([name], source)
    first = bench.folder / "first"
    first.write_bytes(b"a few bytes")
    place.put([FIRST], first)
    expected = (bytes_wanted, sha256_of(source))
    source.unlink()
    return place, f"RETR /{name}", expected


def small(bench: Benchmark, _bytes_wanted: int, place_name: str = "S3") -> None:
    place = Place(bench, place_name)
    names = [f"small/file-{number:05}" for number in range(400)]
    data = os.urandom(SMALL_SIZE)
    source = bench.folder / "small-source"
    source.write_bytes(data)
    place.put(names, source)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(place.start(peer, *WORKERS.get(peer.name, ()))) for peer in place.peers
        ]
        for server in servers:
            for name in names:
                if bench.digest(server, f"RETR /{name}") != (SMALL_SIZE, sha256(data).hexdigest()):
                    raise RuntimeError(f"{server.peer.name} sent other bytes than the store has")
        for connections, count in SMALL_FILES.items():
            steps = [Download(f"RETR /{names[number % len(names)]}", SMALL_SIZE) for number in range(count)]
            scripts = [steps[start::connections] for start in range(connections)]

            def measure(server: Server, scripts: Sequence[Sequence[Download]] = scripts, count: int = count) -> Sample:
                cost = bench.load(server, scripts)
                return Sample(count / cost.seconds, count, cost.cpu, cost.peak)

            title = f"downloads of 10 KiB from a warm cache, 2 workers, {place.name}, connections: {connections}"
            subject = Subject(title, "files/s", "1 x rclone")
            bench.compare(subject, {server.peer.name: partial(measure, server) for server in servers})


def upload(bench: Benchmark, bytes_wanted: int) -> None:
    """To 226 and to the store in one run each, since one follows the other."""
    bench.store.put_many(["uploads/first"], b"so that the folder exists")
    bytes_wanted //= 2
    source = random_file(bench.folder / "upload", bytes_wanted)
    expected = sha256_of(source)
    keys = (f"uploads/big-{number}" for number in itertools.count())
    stored: dict[str, list[Sample]] = {peer.name: [] for peer in bench.peers}

    def measure(server: Server) -> Sample:
        key = next(keys)
        began = time.monotonic()
        before = server.meter.cpu_seconds()
        cost = bench.load(server, [[Upload(f"STOR /{key}", str(source))]])
        _wait_for(bench, {key: bytes_wanted})
        seconds = time.monotonic() - began
        cpu, peak = server.meter.cpu_seconds() - before, server.meter.peak_memory()
        stored[server.peer.name].append(Sample(bytes_wanted / seconds / 1e6, 1, cpu, peak))
        if bench.store.digest(key) != expected:
            raise RuntimeError(f"{server.peer.name} stored other bytes than it was sent")
        bench.store.delete([key])
        return Sample(bytes_wanted / cost.seconds / 1e6, 1, cost.cpu, peak)

    with ExitStack() as stack:
        servers = bench.start_all(stack, *WRITES, "--vfs-write-back", "100ms")
        subject = Subject(f"upload of {bytes_wanted // MIB} MiB, mode writes, to 226", "MB/s", "1 x rclone")
        bench.compare(subject, {server.peer.name: partial(measure, server) for server in servers})
    runs = {name: iter(samples) for name, samples in stored.items()}
    subject = Subject(f"the same until the store has it, {WRITES[1]}, write-back after 0.1 s", "MB/s", "1 x rclone")
    bench.compare(subject, {name: partial(next, samples) for name, samples in runs.items()})
    source.unlink()


def small_uploads(bench: Benchmark, _bytes_wanted: int) -> None:
    """To 226: synced to the disk by ftpvfs, and not by rclone. What follows is waited for and not timed."""
    bench.store.put_many(["uploads/first"], b"so that the folder exists")
    source = random_file(bench.folder / "small-upload", SMALL_SIZE)
    digest = sha256_of(source)
    batches = itertools.count()

    def measure(server: Server) -> Sample:
        prefix = f"uploads/small-{next(batches)}-"
        keys = [f"{prefix}{number:05}" for number in range(SMALL_UPLOADS)]
        steps = [Upload(f"STOR /{key}", str(source)) for key in keys]
        scripts = [steps[start::UPLOAD_CONNECTIONS] for start in range(UPLOAD_CONNECTIONS)]
        cost = bench.load(server, scripts)
        _wait_for(bench, dict.fromkeys(keys, SMALL_SIZE))
        if bench.store.digest(keys[-1]) != digest:
            raise RuntimeError(f"{server.peer.name} stored other bytes than it was sent")
        bench.store.delete(keys)
        return Sample(len(keys) / cost.seconds, len(keys), cost.cpu, cost.peak)

    with ExitStack() as stack:
        servers = [
            stack.enter_context(bench.start(peer, *WRITES, *WORKERS.get(peer.name, ()))) for peer in bench.peers
        ]
        title = f"uploads of 10 KiB, mode writes, 2 workers, to 226, connections: {UPLOAD_CONNECTIONS}"
        subject = Subject(title, "files/s", "1 x rclone")
        bench.compare(subject, {server.peer.name: partial(measure, server) for server in servers})


def _wait_for(bench: Benchmark, objects: dict[str, int]) -> None:
    """Wait until the store has the objects, all under one prefix."""
    first = next(iter(objects))
    prefix = first if len(objects) == 1 else first.rpartition("-")[0]
    deadline = time.monotonic() + STORED_WITHIN
    while bench.store.sizes(prefix) != objects:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{prefix} is not stored after {STORED_WITHIN:.0f} s")
        time.sleep(0.05)


SUBJECTS: dict[str, Callable[[Benchmark, int], None]] = {
    "cold": cold,
    "warm": warm,
    "small": small,
    "upload": upload,
    "small-uploads": small_uploads,
    "cold-local": partial(cold, place_name="a local folder"),
    "warm-local": partial(warm, place_name="a local folder"),
    "small-local": partial(small, place_name="a local folder"),
}

if __name__ == "__main__":
    main()
