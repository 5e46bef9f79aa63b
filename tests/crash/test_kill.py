"""The whole server is killed at random moments while clients work: what was acknowledged is at the store in the end.

Clients have files of their own and a model of them. A reply makes the model certain; a kill during a command leaves
what was before and what would be, and the client looks which it is once the server is back. The seed is in the test's
name: the same seed gives the same commands, and kills at about the same moments.
"""

from __future__ import annotations

import calendar
import contextlib
import ftplib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import downloads
from tests.conftest import HOST, Store, program_environment, run_program
from tests.servers import free_ports, is_listening, wait_until

CLIENTS = 3
NAMES = 5  # files of each client
START_DEADLINE = 60.0
DRAIN_DEADLINE = 120.0


@dataclass(frozen=True)
class File:
    """What a client knows of a file; `mtime` None: whatever the server gave it."""

    data: bytes
    mtime: int | None = None

    def __repr__(self) -> str:
        return f"{len(self.data)} bytes {self.data[:6]!r}... {self.mtime}"


State = File | None
States = dict[str, State]


class Killed(Exception):
    """The connection is gone, and nobody knows what became of the last command."""


class Server:
    """`python -m ftpvfs` on one port and one cache folder, killed and started again."""

    def __init__(self, store: Store, folder: Path, mode: str, workers: int = 1, write_back: str = "200ms") -> None:
        (self.port,) = free_ports(1)
        options = [f"--option={name}={json.dumps(value)}" for name, value in store.storage_options.items()]
        self._cache = ["--cache-dir", str(folder / "cache"), "--vfs-cache-mode", mode]
        self._arguments = [store.url, *self._cache, *options]
        self._serve = [
            "--addr", f"{HOST}:{self.port}", "-v", "--vfs-write-back", write_back,
            "--drain-timeout", f"{DRAIN_DEADLINE:.0f}s", "--workers", str(workers),
        ]  # fmt: skip
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ftpvfs", *self._arguments, *self._serve],
                env=program_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_until(self._is_up, START_DEADLINE, "the server listens")

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        return is_listening(self.port)

    def kill(self) -> None:
        """End all its processes at this very instruction."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            wait_until(lambda: not is_listening(self.port), what="the workers are gone, too")

    def stop(self) -> int:
        """End it in good order; return its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(DRAIN_DEADLINE + 30)
        self._process = None
        return status

    def cache(self, command: str) -> Any:
        return run_program("cache", command, *self._arguments)

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]


@dataclass
class Client:
    """One client with its files, its model and its luck."""

    number: int
    seed: str
    port: int
    known: States = field(default_factory=dict)
    # After a kill: what all files may be now.
    possible: list[States] = field(default_factory=list)
    # Files that may have left a partial: APPE and REST would go on with it.
    interrupted: set[str] = field(default_factory=set)
    history: list[str] = field(default_factory=list)
    done: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.seed}-{self.number}")
        folder = f"c{self.number}"
        self.paths = [*(f"{folder}-{each}" for each in range(NAMES - 2)), *(f"{folder}/{each}" for each in "xy")]
        self.known = dict.fromkeys(self.paths)

    def run(self, is_over: threading.Event) -> None:
        """Work until the end, through any number of kills."""
        while not is_over.is_set():
            try:
                with self.connected() as ftp:
                    self.resolve(ftp)
                    while not is_over.is_set():
                        self._step(ftp)
            except Killed:
                is_over.wait(0.02)

    @contextlib.contextmanager
    def connected(self) -> Iterator[ftplib.FTP]:
        """Log in; Killed where the server is away."""
        ftp = downloads.Client(timeout=60)
        try:
            with _killed_if_lost():
                ftp.connect(HOST, self.port)
                ftp.login()
                ftp.voidcmd("TYPE I")
                with contextlib.suppress(ftplib.error_perm):
                    ftp.mkd(f"c{self.number}")
            yield ftp
        finally:
            ftp.close()

    # -- after a kill

    def look(self, server: Server) -> None:
        """See what the files are, from a server that nobody kills any more."""
        try:
            with self.connected() as ftp:
                self.resolve(ftp)
        except Killed as error:
            raise AssertionError(server.log()) from error

    def resolve(self, ftp: ftplib.FTP) -> None:
        """See which of the possible states it is."""
        if not self.possible:
            return
        unsure = [path for path in self.paths if len({each[path] for each in self.possible}) > 1]
        with _killed_if_lost():
            found = {path: _read(ftp, path) for path in unsure}
        fitting = [each for each in self.possible if all(_fits(each[path], found[path]) for path in unsure)]
        assert fitting, f"client {self.number}: {found} is none of {self.possible}; {self.history[-6:]}"
        self.known, self.possible = fitting[-1], []

    # -- commands

    def _step(self, ftp: ftplib.FTP) -> None:
        path = self.random.choice(self.paths)
        there = self.known[path]
        if there is None:
            choices = ["store"]
        elif path in self.interrupted:
            choices = ["store", "delete", "rename", "touch"]
        else:
            choices = ["store", "append", "append", "resume", "rename", "delete", "touch"]
        command = self.random.choice(choices)
        after, run = getattr(self, f"_{command}")(path, there)
        self.history.append(f"{command} {path}")
        before = self.known
        self.possible = [before, *after]
        try:
            with _killed_if_lost():
                run(ftp)
        except Killed:
            self.interrupted.add(path)
            raise
        self.known, self.possible = after[-1], []
        if command == "store":
            self.interrupted.discard(path)
        self.done += 1

    def _data(self) -> bytes:
        self.number_of_data = getattr(self, "number_of_data", 0) + 1
        mark = f"<{self.number}.{self.number_of_data}>".encode()
        size = self.random.choice([0, 1, 100, 5_000, 70_000, 300_000])
        return (mark * (size // len(mark) + 1))[: max(size, len(mark))]

    Command = tuple[list[States], Callable[[ftplib.FTP], Any]]

    def _store(self, path: str, there: State) -> Command:
        data = self._data()
        return [{**self.known, path: File(data)}], lambda ftp: ftp.storbinary(f"STOR {path}", io.BytesIO(data))

    def _append(self, path: str, there: File) -> Command:
        data = self._data()
        after = [{**self.known, path: File(there.data + data)}]
        return after, lambda ftp: ftp.storbinary(f"APPE {path}", io.BytesIO(data))

    def _resume(self, path: str, there: File) -> Command:
        offset = self.random.randint(0, len(there.data))
        data = self._data() + b"." * (len(there.data) - offset)
        after = [{**self.known, path: File(there.data[:offset] + data)}]
        return after, lambda ftp: ftp.storbinary(f"STOR {path}", io.BytesIO(data), rest=offset or None)

    def _delete(self, path: str, there: File) -> Command:
        return [{**self.known, path: None}], lambda ftp: ftp.delete(path)

    def _rename(self, path: str, there: File) -> Command:
        target = self.random.choice([each for each in self.paths if each != path])
        # On a store that cannot rename, an object is copied and then deleted.
        between = {**self.known, target: there}
        return [between, {**between, path: None}], lambda ftp: ftp.rename(path, target)

    def _touch(self, path: str, there: File) -> Command:
        mtime = self.random.randrange(1_000_000_000, 1_600_000_000)
        stamp = time.strftime("%Y%m%d%H%M%S", time.gmtime(mtime))
        after = [{**self.known, path: File(there.data, mtime)}]
        return after, lambda ftp: ftp.voidcmd(f"MFMT {stamp} {path}")


@contextlib.contextmanager
def _killed_if_lost() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise Killed from error
    except ftplib.error_temp as error:
        if str(error).startswith("421"):
            raise Killed from error
        raise


def _read(ftp: ftplib.FTP, path: str) -> State:
    parts: list[bytes] = []
    try:
        ftp.retrbinary(f"RETR {path}", parts.append)
        stamp = ftp.voidcmd(f"MDTM {path}").split()[1]
    except ftplib.error_perm:
        return None
    return File(b"".join(parts), calendar.timegm(time.strptime(stamp[:14], "%Y%m%d%H%M%S")))


def _fits(expected: State, found: State) -> bool:
    if expected is None or found is None:
        return expected is found
    return expected.data == found.data and expected.mtime in (None, found.mtime)


def _compare(store: Store, clients: list[Client]) -> list[str]:
    """What is not at the store as the model says."""
    wrong = []
    expected = {path: state for client in clients for path, state in client.known.items() if state is not None}
    found = {path for path in store.list() if not path.endswith("/")}
    wrong += [f"{path} is not there, but {expected[path]}" for path in sorted(expected.keys() - found)]
    wrong += [f"{path} is there: {store.read(path)[:30]!r}" for path in sorted(found - expected.keys())]
    for path in sorted(expected.keys() & found):
        state = expected[path]
        assert state is not None
        if store.read(path) != state.data:
            wrong.append(f"{path} has {store.read(path)[:30]!r}..., not {state}")
        elif state.mtime is not None and store.mtime(path) != state.mtime:
            wrong.append(f"{path} has the time {store.mtime(path)}, not {state.mtime}")
    return wrong


def torture(store: Store, folder: Path, mode: str, seed: str, kills: int, workers: int = 1) -> None:
    """Kill the server so often while clients work, then end it in good order and look into the store."""
    server = Server(store, folder, mode, workers)
    clients = [Client(number, seed, server.port) for number in range(CLIENTS)]
    is_over = threading.Event()
    failures: list[BaseException] = []

    def work(client: Client) -> None:
        try:
            client.run(is_over)
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            failures.append(AssertionError(f"client {client.number} after {client.history[-6:]}: {error!r}"))

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    moments = random.Random(seed)
    try:
        for thread in threads:
            thread.start()
        for _ in range(kills):
            server.start()
            is_over.wait(moments.uniform(0.2, 1.2))
            server.kill()
            assert not failures, (failures, server.log())
        server.start()
        is_over.set()
        for thread in threads:
            thread.join(60)
        assert not failures, (failures, server.log())
        for client in clients:
            client.look(server)
        server.stop()
        flushed = server.cache("flush")
        assert flushed.returncode == 0, flushed.stdout + flushed.stderr + server.log()
    finally:
        is_over.set()
        server.kill()
        for thread in threads:
            thread.join(60)
    wrong = _compare(store, clients)
    assert wrong == [], [client.history[-10:] for client in clients]
    assert all(client.done for client in clients)
    checked = server.cache("verify")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("mode", ["writes", "full"])
def test_what_is_acknowledged_survives_kills(s3_store: Store, tmp_path: Path, mode: str) -> None:
    torture(s3_store, tmp_path, mode, seed="2026", kills=10)


@pytest.mark.stress
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["writes", "full"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_acknowledged_survives_hundreds_of_kills(
    s3_store: Store, tmp_path: Path, mode: str, seed: int, workers: int
) -> None:
    torture(s3_store, tmp_path, mode, seed=f"stress-{seed}", kills=50, workers=workers)
