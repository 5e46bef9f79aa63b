"""What the benchmarks share: the interleaved runs, the samples with their cost, the table and its file."""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import load
from peers import FTPVFS, RCLONE, Address, Peer, SeaweedFS, Server, first_line, program

Work = TypeVar("Work")
Answer = TypeVar("Answer")

MIB = 1 << 20
HEADER = f"{'':10}{'median':>10}{'min':>10}{'max':>10} {'':12}{'CPU s':>9}{'CPU ms/op':>11}{'peak MiB':>10}"

SETTLE_SECONDS = 2.0
"""From the start of a server until it counts as idle: some of the start goes on in the background."""
LEGEND = """CPU and peak are the server's, over all its processes: CPU the median, peak the highest.
ratio: the median is how many times as good ftpvfs is as the peer (above 1 is better, also for seconds and MiB);
CPU and peak are ftpvfs / peer (below 1 is better)."""


@dataclass(frozen=True)
class Cost:
    """What one load took: seconds on the clock, the server's CPU seconds and its peak memory in bytes."""

    seconds: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Sample:
    """One run's value in the subject's unit, and what it cost."""

    value: float
    operations: int
    cpu: float
    memory: int
    """In bytes."""


@dataclass(frozen=True)
class Subject:
    """One thing that is measured for all peers."""

    title: str
    unit: str
    goal: str
    more_is_better: bool = True
    beside: tuple[str, ...] = (RCLONE.name,)
    """Whom ftpvfs is compared with."""

    def block(self, samples: Mapping[str, Sequence[Sample]]) -> str:
        """The rows of the table: one for each peer, and ftpvfs beside rclone."""
        lines = [f"{self.title}   [goal: {self.goal}]"]
        lines.extend(self._row(name, of) for name, of in samples.items())
        if FTPVFS.name in samples:
            peers = [name for name in self.beside if name in samples]
            lines.extend(self._ratio_row(samples[FTPVFS.name], samples[name]) for name in peers)
        return "\n".join(lines)

    def _row(self, name: str, samples: Sequence[Sample]) -> str:
        values = [sample.value for sample in samples]
        numbers = (statistics.median(values), min(values), max(values))
        shown = "".join(f"{number:>10.{_decimals(number)}f}" for number in numbers)
        cpu, per_operation, memory = _costs(samples)
        costs = f"{cpu:>9.2f}{per_operation:>11.2f}{memory / MIB:>10.1f}"
        return f"  {name:8}{shown} {self.unit:12}{costs}"

    def _ratio_row(self, ours: Sequence[Sample], theirs: Sequence[Sample]) -> str:
        value = _ratio(_median_value(ours), _median_value(theirs))
        if not self.more_is_better:
            value = _ratio(1, value)
        costs = zip(_costs(ours), _costs(theirs), strict=True)
        cpu, per_operation, memory = (_ratio(our_cost, their_cost) for our_cost, their_cost in costs)
        return f"  {'ratio':8}{value:>10.2f}{'':33}{cpu:>9.2f}{per_operation:>11.2f}{memory:>10.2f}"


def _median_value(samples: Sequence[Sample]) -> float:
    return statistics.median(sample.value for sample in samples)


def _costs(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """Median CPU seconds, median CPU milliseconds an operation, and the highest memory."""
    return (
        statistics.median(sample.cpu for sample in samples),
        statistics.median(sample.cpu / sample.operations * 1000 for sample in samples),
        max(sample.memory for sample in samples),
    )


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else float("nan")


def _decimals(number: float) -> int:
    return 1 if number >= 10 else 3


class Benchmark:
    """One run of a script: its store, its load process, its temporary folder, and the table as it grows."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.runs: int = options.runs
        self.peers: list[Peer] = [RCLONE] if options.peer_only else [RCLONE, FTPVFS]
        self._complete = not options.peer_only and not options.only and not options.scaled
        self._lines: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> Benchmark:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{self.name}-")))
            self.store = stack.enter_context(SeaweedFS(self.folder))
            # Spawned, so that the load client starts with nothing but its own module.
            self._loader = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            stack.callback(self._loader.shutdown)
            self._stack = stack.pop_all()
        self._say(machine())
        self._say(", ".join(self._versions()))
        self._say(HEADER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._say(f"\n{self.runs} runs, interleaved. {LEGEND}")
        if self._complete and error is None:
            results = Path(__file__).with_name(f"results_{self.name}.txt")
            results.write_text("\n".join(self._lines) + "\n")

    def _versions(self) -> list[str]:
        weed = first_line([program("weed"), "version"])
        libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("pyftpdlib", "fsspec", "s3fs")]
        peers = [f"{peer.name} {peer.version()}" for peer in self.peers]
        return [*peers, f"Python {platform.python_version()}", *libraries, f"SeaweedFS {weed.split()[2]}"]

    def _say(self, text: str) -> None:
        print(text, flush=True)
        self._lines.append(text)

    def start(self, peer: Peer, *flags: str, endpoint_port: int | None = None) -> Server:
        """A new server process over the store, or over what stands before it."""
        return Server(peer, endpoint_port or self.store.port, self.folder, *flags)

    def start_all(self, stack: ExitStack, *flags: str, endpoint_port: int | None = None) -> list[Server]:
        """One server of each peer, ended with the stack."""
        return [
            stack.enter_context(self.start(peer, *flags, endpoint_port=endpoint_port)) for peer in self.peers
        ]

    def idle_memory(self, server: Server) -> int:
        """The memory of a server that was just started, once it has settled."""
        time.sleep(SETTLE_SECONDS)
        return server.meter.memory()

    def load(self, server: Server, scripts: Sequence[Sequence[load.Download | load.Upload]]) -> Cost:
        """Run the scripts from the load process, one connection each."""
        server.meter.reset_peak()
        before = server.meter.cpu_seconds()
        seconds = self._client(server, load.run, scripts)
        return Cost(seconds, server.meter.cpu_seconds() - before, server.meter.peak_memory())

    def latencies(self, server: Server, steps: Sequence[load.Download]) -> tuple[list[float], Cost]:
        """Run the steps one after the other in one session; return the seconds of each, and what they cost."""
        server.meter.reset_peak()
        before = server.meter.cpu_seconds()
        found: list[float] = self._client(server, load.latencies, steps)
        return found, Cost(sum(found), server.meter.cpu_seconds() - before, server.meter.peak_memory())

    def digest(self, server: Server, command: str) -> tuple[int, str]:
        return self._client(server, load.digest, command)

    def content(self, server: Server, command: str) -> bytes:
        return self._client(server, load.content, command)

    def _client(self, server: Server, function: Callable[[Address, Work], Answer], work: Work) -> Answer:
        """Call a function of the load client in its process; a failure shows what the server said."""
        try:
            return self._loader.submit(function, server.address, work).result()
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"{server.log.stem}: {error}\n{server.last_words()}") from error

    def compare(self, subject: Subject, measures: Mapping[str, Callable[[], Sample]]) -> None:
        """Measure the peers in turn, run by run, and add the subject to the table."""
        samples: dict[str, list[Sample]] = {name: [] for name in measures}
        for _ in range(self.runs):
            for name, measure in measures.items():
                samples[name].append(measure())
        self._say("\n" + subject.block(samples))


def machine() -> str:
    """The line that says when and where."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    kernel = ".".join(platform.release().split(".")[:2])
    model = models[0] if models else platform.machine()
    today = dt.datetime.now(dt.timezone.utc).date()
    return f"{today}, {len(models)} x {model}, {memory:.0f} GiB, {platform.system()} {kernel}"


def parser(description: str | None, subjects: Sequence[str]) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--runs", type=int, default=5, help="runs of each subject (default: 5)")
    made.add_argument("--only", choices=subjects, action="append", help="this subject only; repeatable")
    made.add_argument("--peer-only", action="store_true", help="rclone alone, to check the benchmark")
    return made


def size(text: str) -> int:
    """Bytes from `1G`, `256M` or a plain number."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    return int(text if factor == 1 else text[:-1]) * factor
