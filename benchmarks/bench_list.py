"""Compare directory listings with rclone serve ftp, over S3: python benchmarks/bench_list.py

LIST and MLSD of a folder of 10,000 objects, cold (a new process each time) and warm; the cold memory of a
folder of 100,000; and the cold default mode, where each true modification time costs a request, with 2,000.
Every listing is checked by its byte count, the first one by the names in it. `--scale` makes all folders
smaller. The memory of cold listings is the peak over that of the idle server before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from harness import Benchmark, Sample, Subject, parser
from load import Download
from peers import Peer, Server

ENTRIES = 10_000
MANY_ENTRIES = 100_000
TRUE_TIMES_ENTRIES = 2_000
WARM_LISTINGS = {1: 10, 8: 40}
"""Listings of one run, by connections."""
VERBS = ("LIST", "MLSD")
SERVER_TIMES = "--use-server-modtime"


def main() -> None:
    options = _options()
    with Benchmark("list", options) as bench:
        for name in options.only or SUBJECTS:
            SUBJECTS[name](bench, options.scale)


def _options() -> argparse.Namespace:
    arguments = parser(__doc__, list(SUBJECTS))
    arguments.add_argument("--scale", type=float, default=1.0, help="factor on all entry counts (default: 1)")
    options = arguments.parse_args()
    options.scaled = options.scale != 1.0
    return options


def cold(bench: Benchmark, scale: float) -> None:
    count = int(ENTRIES * scale)
    folder = _make_folder(bench, count)
    for verb in VERBS:
        title = f"{verb} of {count:,}, cold, {SERVER_TIMES}"
        _compare_cold(bench, title, f"{verb} /{folder}", "1 x rclone", SERVER_TIMES)


def warm(bench: Benchmark, scale: float) -> None:
    count = int(ENTRIES * scale)
    folder = _make_folder(bench, count)
    with ExitStack() as stack:
        servers = bench.start_all(stack, SERVER_TIMES)
        for verb in VERBS:
            command = f"{verb} /{folder}"
            sizes = {server.peer.name: _checked_size(bench, server, command) for server in servers}
            listings = {name: Download(command, size) for name, size in sizes.items()}
            for connections in WARM_LISTINGS:
                title = f"{verb} of {count:,}, warm, connections: {connections}"
                _compare_warm(bench, title, servers, listings, connections)


def many(bench: Benchmark, scale: float) -> None:
    count = int(MANY_ENTRIES * scale)
    folder = _make_folder(bench, count)
    title = f"LIST of {count:,}, cold, {SERVER_TIMES}"
    _compare_cold(bench, title, f"LIST /{folder}", "at most 100 MiB over idle", SERVER_TIMES)


def true_times(bench: Benchmark, scale: float) -> None:
    count = int(TRUE_TIMES_ENTRIES * scale)
    folder = _make_folder(bench, count)
    _compare_cold(bench, f"LIST of {count:,}, cold, true times", f"LIST /{folder}", "none")


def _make_folder(bench: Benchmark, count: int) -> str:
    folder = f"folder-{count}"
    if not bench.store.sizes(f"{folder}/"):
        bench.store.put_many([f"{folder}/{name}" for name in _names(count)], b"content of one object\n")
    return folder


def _names(count: int) -> list[str]:
    return [f"report-{number:06}-final.csv.gz" for number in range(count)]


def _compare_cold(bench: Benchmark, title: str, command: str, goal: str, *flags: str) -> None:
    sizes: dict[str, int] = {}

    def measure(peer: Peer) -> Sample:
        if peer.name not in sizes:
            with bench.start(peer, *flags) as server:
                sizes[peer.name] = _checked_size(bench, server, command)
        with bench.start(peer, *flags) as server:
            idle = bench.idle_memory(server)
            cost = bench.load(server, [[Download(command, sizes[peer.name])]])
            return Sample(cost.seconds, 1, cost.cpu, cost.peak - idle)

    subject = Subject(f"{title}, peak over idle", "s", goal, more_is_better=False)
    bench.compare(subject, {peer.name: partial(measure, peer) for peer in bench.peers})


def _compare_warm(
    bench: Benchmark,
    title: str,
    servers: Sequence[Server],
    listings: Mapping[str, Download],
    connections: int,
) -> None:
    count = WARM_LISTINGS[connections]

    def measure(server: Server) -> Sample:
        script = [listings[server.peer.name]] * (count // connections)
        cost = bench.load(server, [script] * connections)
        return Sample(count / cost.seconds, count, cost.cpu, cost.peak)

    subject = Subject(title, "listings/s", "1 x rclone")
    bench.compare(subject, {server.peer.name: partial(measure, server) for server in servers})


def _checked_size(bench: Benchmark, server: Server, command: str) -> int:
    """The bytes of a listing, once its names are found to be those of the folder."""
    listing = bench.content(server, command)
    listed = sorted(line.rpartition(" ")[2] for line in listing.decode().splitlines())
    expected = _names(int(command.rpartition("-")[2]))
    if [name for name in listed if name not in (".", "..")] != expected:
        raise RuntimeError(f"{server.peer.name} listed other names than the store has: {len(listed)} entries")
    return len(listing)


SUBJECTS: dict[str, Callable[[Benchmark, float], None]] = {
    "cold": cold,
    "warm": warm,
    "many": many,
    "true-times": true_times,
}

if __name__ == "__main__":
    main()
