"""Several processes of several threads on one cache, some of them killed: nobody ever sees what nobody was told."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftpvfs.cache.cache import Cache
from ftpvfs.cache.index import Index
from ftpvfs.coordination.locks import PathLocks
from tests.conftest import ROOT, program_environment
from tests.crash.cache_worker import OPTIONS, PATHS, Worker
from tests.test_cache import memory  # noqa: F401 - a fixture

PROCESSES = 4


class Crowd:
    """The processes; a killed one is replaced by another."""

    def __init__(self, folder: Path, seed: int, seconds: float) -> None:
        self.folder = folder
        self.until = time.monotonic() + seconds
        self.chance = random.Random(seed)
        self.seed = seed * 1000
        self.processes = [self.start() for _ in range(PROCESSES)]
        self.killed = 0

    def start(self) -> subprocess.Popen[bytes]:
        self.seed += 1
        seconds = max(0.5, self.until - time.monotonic())
        return subprocess.Popen(
            [sys.executable, "-m", "tests.crash.cache_worker", str(self.folder), str(self.seed), str(seconds)],
            cwd=ROOT,
            env=program_environment(),
            stderr=subprocess.PIPE,
        )

    def kill_one(self) -> None:
        number = self.chance.randrange(PROCESSES)
        process = self.processes[number]
        process.send_signal(signal.SIGKILL)
        _, words = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), words.decode()
        self.killed += 1
        self.processes[number] = self.start()

    def finish(self) -> None:
        for process in self.processes:
            _, words = process.communicate(timeout=100)
            assert process.returncode == 0, words.decode()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


def work(folder: Path, seed: int, seconds: float, *, pause: tuple[float, float] | None) -> None:
    crowd = Crowd(folder, seed, seconds)
    try:
        while pause is not None and time.monotonic() < crowd.until:
            time.sleep(crowd.chance.uniform(*pause))  # the moment of death is what is random here
            crowd.kill_one()
        crowd.finish()
    finally:
        crowd.stop()
    look(folder)


def look(folder: Path) -> None:
    """Bring all to the store, and compare with what users were told."""
    cache_folder = folder / "cache"
    index = Index(cache_folder)
    cache = Cache(cache_folder, index, OPTIONS)
    try:
        worker = Worker(folder, cache, PathLocks(cache_folder), seed=0)
        assert cache.recovered.lost == 0
        assert cache.check() == []
        told = {}
        for path in PATHS:
            with worker.alone(path) as known:
                told[path] = known[path]
        worker.chance = random.Random(1)
        while cache.all_dirty():
            for record in cache.all_dirty():
                worker.write_back(record.path)
        stored = {path: worker.store.entry(path) for path in PATHS}
        for path, entry in stored.items():
            assert (None if entry is None else worker.store.read(path, entry).decode()) == told[path], path
        assert cache.check(worker.store.entry) == []
        assert list((cache_folder / "data").iterdir()) == []
    finally:
        cache.close()
        index.close()


@pytest.fixture
def folder(memory: Path) -> Path:  # noqa: F811
    return memory


def test_processes_that_share_a_cache_see_what_each_other_were_told(folder: Path) -> None:
    work(folder, 1, 4.0, pause=None)


def test_processes_that_are_killed_take_nothing_along_that_was_told(folder: Path) -> None:
    work(folder, 2, 6.0, pause=(0.6, 1.2))


@pytest.mark.stress
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10, 16))
def test_minutes_of_work_and_kills(folder: Path, seed: int) -> None:
    work(folder, seed, 60.0, pause=(0.5, 2.0) if seed % 2 else None)
