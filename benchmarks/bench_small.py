"""Compare small operations over a local folder with rclone and plain pyftpdlib: python benchmarks/bench_small.py

Downloads of 10 KiB over 1, 16 and 64 sessions, logins, and what sessions cost that only stand there. All serve the
same folder. ftpvfs runs with two workers, as it is meant to, and with one (`one loop`), for the CPU of an operation.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import load
from harness import HEADER, LEGEND, Sample, Subject, machine, parser
from peers import HOST, Address, Meter, Program, first_line, free_ports, program

FILES = 100
SIZE = 10 * 1024
DOWNLOADS = 3200
SESSIONS = (1, 16, 64)
LOGINS = 3200
LOGINS_AT_ONCE = 16
IDLE_SESSIONS = 500
IDLE_SECONDS = 5.0
WARMING = 8
"""Sessions that are there before, so that what is only loaded once is not counted."""
PYFTPDLIB = """
import logging, sys, warnings
warnings.simplefilter("ignore")
logging.basicConfig(level=logging.WARNING)
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer
folder, port, first, last = sys.argv[1:]
FTPHandler.authorizer = DummyAuthorizer()
FTPHandler.authorizer.add_anonymous(folder)
FTPHandler.passive_ports = range(int(first), int(last))
FTPServer.max_cons = 2000
FTPServer(("127.0.0.1", int(port)), FTPHandler).serve_forever()
"""
OURS, ONE_LOOP = "ftpvfs", "one loop"


def _rclone(served: Path, folder: Path, port: int, first: int) -> list[str]:
    flags = ["--addr", f"{HOST}:{port}", "--passive-port", f"{first}-{first + 1999}", "--config", ""]
    return [program("rclone"), "serve", "ftp", str(served), *flags]


def _pyftpdlib(served: Path, folder: Path, port: int, first: int) -> list[str]:
    return [sys.executable, "-c", PYFTPDLIB, str(served), str(port), str(first), str(first + 1999)]


def _ftpvfs(workers: int, served: Path, folder: Path, port: int, first: int) -> list[str]:
    flags = ["--addr", f"{HOST}:{port}", "--passive-port", f"{first}-{first + 1999}", "--workers", str(workers)]
    return [sys.executable, "-m", "ftpvfs", str(served), *flags, "--cache-dir", str(folder / f"cache-{workers}")]


COMMANDS: dict[str, Callable[[Path, Path, int, int], list[str]]] = {
    "rclone": _rclone,
    "pyftpdlib": _pyftpdlib,
    OURS: partial(_ftpvfs, 2),
    ONE_LOOP: partial(_ftpvfs, 1),
}


class Server(Program):
    """One of the servers, with the ports of its own."""

    def __init__(self, name: str, served: Path, folder: Path, first_port: int) -> None:
        self.name = name
        self._place = (served, folder, first_port)
        port = free_ports(1)[0]
        self.address: Address = (HOST, port)
        super().__init__(COMMANDS[name](served, folder, port, first_port), folder / f"{name}.log")
        self.wait_until(self._greets)
        self.meter = Meter(self.pid)

    def another(self) -> Server:
        """A new one of the same kind, which has not yet taken memory for anything."""
        return Server(self.name, *self._place)

    def _greets(self) -> bool:
        try:
            with socket.create_connection(self.address, timeout=5) as connection:
                return connection.recv(512).startswith(b"220")
        except OSError:
            return False


class Bench:
    """The servers and the process that loads them."""

    def __init__(self, servers: Sequence[Server], loader: ProcessPoolExecutor, runs: int) -> None:
        self._servers = servers
        self._loader = loader
        self._runs = runs

    def compare(self, title: str, unit: str, goal: str, measure: Callable[[Server], Sample], **what: bool) -> str:
        """The block of one subject; the servers are measured in turn."""
        samples: dict[str, list[Sample]] = {server.name: [] for server in self._servers}
        for _ in range(self._runs):
            for server in self._servers:
                samples[server.name].append(measure(server))
        return Subject(title, unit, goal, beside=("rclone", "pyftpdlib"), **what).block(samples)

    def cost(self, server: Server, count: int, function: Callable[..., float], *work: object) -> Sample:
        """Operations a second, and what they cost."""
        server.meter.reset_peak()
        before = server.meter.cpu_seconds()
        seconds = self._loader.submit(function, server.address, *work).result()
        cpu = server.meter.cpu_seconds() - before
        return Sample(count / seconds, count, cpu, server.meter.peak_memory())


def downloads(bench: Bench) -> Iterator[str]:
    for sessions in SESSIONS:
        script = [load.Download(f"RETR /f{number % FILES}", SIZE) for number in range(DOWNLOADS // sessions)]

        def measure(server: Server, scripts: object = [script] * sessions) -> Sample:
            return bench.cost(server, DOWNLOADS, load.run, scripts)

        goal = "1.3 x pyftpdlib; one loop: 0.7 x its CPU"
        yield bench.compare(f"10 KiB downloads, sessions: {sessions}", "downloads/s", goal, measure)


def logins(bench: Bench) -> Iterator[str]:
    def measure(server: Server) -> Sample:
        return bench.cost(server, LOGINS, load.log_in, LOGINS, LOGINS_AT_ONCE)

    yield bench.compare(f"Logins, {LOGINS_AT_ONCE} at once", "logins/s", "4,000/s", measure)


def idle(bench: Bench) -> Iterator[str]:
    def measure(of: Server) -> Sample:
        with of.another() as server, load.held(server.address, WARMING):
            return cost(server)

    def cost(server: Server) -> Sample:
        before = server.meter.memory()
        with load.held(server.address, IDLE_SESSIONS):
            memory = server.meter.memory() - before
            cpu = server.meter.cpu_seconds()
            time.sleep(IDLE_SECONDS)
            cpu = server.meter.cpu_seconds() - cpu
        return Sample(memory / IDLE_SESSIONS / 1024, IDLE_SESSIONS, cpu, server.meter.peak_memory())

    title = f"{IDLE_SESSIONS} idle sessions: memory of each; CPU in {IDLE_SECONDS:.0f} s"
    yield bench.compare(title, "KiB", "at most 20 KiB, no CPU", measure, more_is_better=False)


SUBJECTS: dict[str, Callable[[Bench], Iterator[str]]] = {"downloads": downloads, "logins": logins, "idle": idle}


def main() -> None:
    options = parser(__doc__, list(SUBJECTS)).parse_args()
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="small-") as name:
        for line in run(Path(name), options):
            print(line, flush=True)
            lines.append(line)
    if not options.only and not options.peer_only:
        Path(__file__).with_name("results_small.txt").write_text("\n".join(lines) + "\n")


def run(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    served = folder / "served"
    served.mkdir()
    for number in range(FILES):
        (served / f"f{number}").write_bytes(os.urandom(SIZE))
    names = ["rclone", "pyftpdlib"] if options.peer_only else list(COMMANDS)
    yield machine()
    rclone = first_line([program("rclone"), "version"]).split()[1]
    pyftpdlib = importlib.metadata.version("pyftpdlib")
    yield f"rclone {rclone}, pyftpdlib {pyftpdlib}, Python {platform.python_version()}"
    yield HEADER
    with ExitStack() as stack:
        loader = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        servers = [
            stack.enter_context(Server(name, served, folder, 20000 + 2000 * number))
            for number, name in enumerate(names)
        ]
        bench = Bench(servers, loader, options.runs)
        for subject in options.only or SUBJECTS:
            for block in SUBJECTS[subject](bench):
                yield "\n" + block
    yield f"\n{options.runs} runs, interleaved. {LEGEND}"


if __name__ == "__main__":
    main()
