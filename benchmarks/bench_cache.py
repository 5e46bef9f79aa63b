"""Compare the disk cache with rclone serve ftp's, mode full: python benchmarks/bench_cache.py

A big download through an empty cache and from a warm one, and many small files from a warm one, over S3 and over
a local folder. An empty cache is a new server's; each peer's bytes are checked by hash before they are timed.
`--size` is the size of the big download.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from bench_transfer import SMALL_SIZE, random_file, sha256_of
from harness import MIB, Benchmark, Sample, Subject, parser, size
from load import Download
from peers import Peer, Server, program

DEFAULT_SIZE = 1 << 30
SMALL_FILES = {16: 3200, 64: 3200}
"""Operations of one run, by connections."""
FIRST = "files/first"
"""Downloaded before the clock runs: a server may contact the store when it is first asked for something."""
FULL = ("--vfs-cache-mode", "full")
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


SUBJECTS: dict[str, Callable[[Benchmark, int], None]] = {
    "cold": cold,
    "warm": warm,
    "small": small,
    "cold-local": partial(cold, place_name="a local folder"),
    "warm-local": partial(warm, place_name="a local folder"),
    "small-local": partial(small, place_name="a local folder"),
}

if __name__ == "__main__":
    main()
