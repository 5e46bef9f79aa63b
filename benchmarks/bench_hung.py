"""How long cached reads take while others wait for a store that hangs, beside rclone: python benchmarks/bench_hung.py

One session downloads files of 10 KiB that are in the cache (mode full), over S3; the 99th percentile of one download.
Then ten clients ask for files that are not, of a store that takes their requests and never answers, and it is measured
again. The store hangs behind the fault proxy of the tests.
"""

from __future__ import annotations

import contextlib
import ftplib
import itertools
import os
import socket
import statistics
import sys
from collections.abc import Iterator
from functools import partial

from harness import Benchmark, Sample, Subject, parser
from load import Download
from peers import HOST, REPOSITORY, Server

sys.path.insert(0, str(REPOSITORY))
from tests.servers import FaultProxy

FILES = 50
SIZE = 10 * 1024
READS = 500
WAITERS = 10
WARMING = 16
"""Sessions, so that each worker of ftpvfs has some: what it knows of a folder it has to ask once."""
cold = itertools.count()
"""The files that nobody has read yet."""
FLAGS = ("--vfs-cache-mode", "full", "--use-server-modtime")


def main() -> None:
    options = parser(__doc__, ["reads"]).parse_args()
    options.scaled = False
    with Benchmark("hung", options) as bench:
        body = os.urandom(SIZE)
        bench.store.put_many([f"cached/{number}" for number in range(FILES)], body)
        bench.store.put_many([f"cold/{number}" for number in range(2 * WAITERS * bench.runs)], body)
        with contextlib.ExitStack() as stack:
            # One proxy for each: what hangs for one must not be the other's requests.
            proxies = [stack.enter_context(FaultProxy(bench.store.port)) for _ in bench.peers]
            servers = [
                stack.enter_context(bench.start(peer, *FLAGS, endpoint_port=proxy.port))
                for peer, proxy in zip(bench.peers, proxies, strict=True)
            ]
            reads(bench, servers, proxies)


def reads(bench: Benchmark, servers: list[Server], proxies: list[FaultProxy]) -> None:
    """The same reads, alone and while others wait."""
    steps = [Download(f"RETR /cached/{number % FILES}", SIZE) for number in range(READS)]

    def alone(server: Server) -> Sample:
        found, cost = bench.latencies(server, steps)
        return Sample(statistics.quantiles(found, n=100)[98] * 1000, READS, cost.cpu, cost.peak)

    def beside(server: Server, proxy: FaultProxy) -> Sample:
        with waiters(server, proxy):
            return alone(server)

    for server in servers:
        bench.load(server, [steps] * WARMING)  # fills the cache, and tells each worker of it
    goal = "at most 3 times as long with as without"
    subject = Subject("Cached reads of 10 KiB alone, 99th percentile", "ms", goal, more_is_better=False)
    bench.compare(subject, {server.peer.name: partial(alone, server) for server in servers})
    title = f"The same while {WAITERS} clients wait for a store that hangs"
    subject = Subject(title, "ms", goal, more_is_better=False)
    measures = {s.peer.name: partial(beside, s, proxy) for s, proxy in zip(servers, proxies, strict=True)}
    bench.compare(subject, measures)


@contextlib.contextmanager
def waiters(server: Server, proxy: FaultProxy) -> Iterator[None]:
    """Clients that have asked for what only the store has, which takes their requests and does not answer."""
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(contextlib.closing(_session(server))) for _ in range(WAITERS)]
        proxy.black_hole = True
        try:
            for session in sessions:
                address = ftplib.parse229(session.sendcmd("EPSV"), (HOST, 0))
                stack.enter_context(contextlib.closing(socket.create_connection(address)))
                assert session.sock is not None
                session.sock.sendall(f"RETR /cold/{next(cold)}\r\n".encode())
            yield
        finally:
            proxy.heal()


def _session(server: Server) -> ftplib.FTP:
    session = ftplib.FTP(timeout=60)
    session.connect(*server.address)
    session.login()
    session.voidcmd("TYPE I")
    return session


if __name__ == "__main__":
    main()
