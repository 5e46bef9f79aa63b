"""A lean FTP client that loads a server: many sessions in one thread, one reused buffer, uploads by sendfile.

It shares the cores with the server it measures, so what it does per reply and per block is kept small. A
session is a generator which tries its sockets and yields when they have nothing for it; the sockets are
watched edge-triggered, so waiting costs no system call beside epoll's own. The functions without an
underscore run in a process of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

BUFFER_SIZE = 1 << 18
REPLY_TIMEOUT = 300.0

Address = tuple[str, int]
T = TypeVar("T")
Waiting = Generator[None, None, T]
Sink = Callable[[memoryview], object]


@dataclass(frozen=True)
class Download:
    """A command that sends data to the client (RETR, LIST, MLSD), and how many bytes it must bring."""

    command: str
    size: int


@dataclass(frozen=True)
class Upload:
    """A STOR command and the local file that it sends."""

    command: str
    source: str


def run(address: Address, scripts: Sequence[Sequence[Download | Upload]]) -> float:
    """Run one script for each connection, all at once: seconds from the first command to the last reply.

    The connections are logged in before the clock starts. Any reply but success, and any wrong size, raises.
    """
    with _Loop() as loop:
        sessions = [_Session(address, loop) for _ in scripts]
        loop.drive({session: session.login() for session in sessions})
        start = time.perf_counter()
        pairs = zip(sessions, scripts, strict=True)
        loop.drive({session: session.perform(script) for session, script in pairs})
        seconds = time.perf_counter() - start
        for session in sessions:
            session.close()
    return seconds


def log_in(address: Address, count: int, at_once: int) -> float:
    """Log in so many times, `at_once` sessions at a time, and close each connection: seconds."""
    start = time.perf_counter()
    for _ in range(0, count, at_once):
        with held(address, at_once):
            pass
    return time.perf_counter() - start


@contextlib.contextmanager
def held(address: Address, count: int) -> Iterator[None]:
    """So many sessions, logged in, that then say nothing."""
    with _Loop() as loop:
        sessions = [_Session(address, loop) for _ in range(count)]
        try:
            loop.drive({session: session.login() for session in sessions})
            yield
        finally:
            for session in sessions:
                session.close()


def latencies(address: Address, steps: Sequence[Download]) -> list[float]:
    """Run the steps one after the other in one session: the seconds of each, from EPSV to the last reply."""
    with _Loop() as loop:
        session = _Session(address, loop)
        loop.drive({session: session.login()})
        found = []
        for step in steps:
            start = time.perf_counter()
            loop.drive({session: session.perform([step])})
            found.append(time.perf_counter() - start)
        session.close()
    return found


def digest(address: Address, command: str) -> tuple[int, str]:
    """The size and the SHA-256 of what a command sends."""
    seen = hashlib.sha256()
    return _receive(address, command, seen.update), seen.hexdigest()


def content(address: Address, command: str) -> bytes:
    """All that a command sends."""
    received = bytearray()
    _receive(address, command, received.extend)
    return bytes(received)


def _receive(address: Address, command: str, sink: Sink) -> int:
    sizes: list[int] = []

    def dialogue(session: _Session) -> Waiting[None]:
        yield from session.login()
        sizes.append((yield from session.download(command, sink)))

    with _Loop() as loop:
        session = _Session(address, loop)
        loop.drive({session: dialogue(session)})
        session.close()
    return sizes[0]


class _Loop:
    """Resumes a session's generator when one of its sockets has news."""

    def __init__(self) -> None:
        self._poller = select.epoll()
        # A closed descriptor stays in here until its number is used again: it has no events.
        self._owners: dict[int, _Session] = {}

    def __enter__(self) -> _Loop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._poller.close()

    def watch(self, watched: socket.socket, owner: _Session) -> None:
        self._owners[watched.fileno()] = owner
        self._poller.register(watched, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def drive(self, work: dict[_Session, Waiting[None]]) -> None:
        """Run all generators to their ends."""
        ready = set(work)
        while work:
            for session in ready & work.keys():
                try:
                    next(work[session])
                except StopIteration:
                    del work[session]
            if work:
                events = self._poller.poll(REPLY_TIMEOUT)
                if not events:
                    raise TimeoutError("the server was silent")
                ready = {self._owners[descriptor] for descriptor, _ in events}


class _Session:
    """One control connection, and its data connection while there is one."""

    _buffer = bytearray(BUFFER_SIZE)
    _view = memoryview(_buffer)

    def __init__(self, address: Address, loop: _Loop) -> None:
        self._host = address[0]
        self._loop = loop
        self._received = b""
        self._control = self._connect(address[1])

    def _connect(self, port: int) -> socket.socket:
        connected = socket.socket()
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Over loopback this succeeds or fails at once, so it need not be asynchronous.
        connected.settimeout(REPLY_TIMEOUT)
        connected.connect((self._host, port))
        connected.setblocking(False)
        self._loop.watch(connected, self)
        return connected

    def close(self) -> None:
        self._control.close()

    def login(self) -> Waiting[None]:
        yield from self._reply("220")
        yield from self._command("USER anonymous", "331")
        yield from self._command("PASS benchmark", "230")
        yield from self._command("TYPE I", "200")

    def perform(self, script: Sequence[Download | Upload]) -> Waiting[None]:
        for step in script:
            if isinstance(step, Upload):
                yield from self._upload(step)
                continue
            size = yield from self.download(step.command, None)
            if size != step.size:
                raise RuntimeError(f"{step.command}: {size} bytes instead of {step.size}")

    def download(self, command: str, sink: Sink | None) -> Waiting[int]:
        data = yield from self._open_data(command)
        total = 0
        while True:
            try:
                count = data.recv_into(self._buffer)
            except BlockingIOError:
                yield
                continue
            if not count:
                break
            total += count
            if sink:
                sink(self._view[:count])
        data.close()
        yield from self._reply("226")
        return total

    def _upload(self, step: Upload) -> Waiting[None]:
        data = yield from self._open_data(step.command)
        with open(step.source, "rb") as source:
            offset, size = 0, os.fstat(source.fileno()).st_size
            while offset < size:
                try:
                    offset += os.sendfile(data.fileno(), source.fileno(), offset, size - offset)
                except BlockingIOError:
                    yield
        data.close()
        yield from self._reply("226")

    def _open_data(self, command: str) -> Waiting[socket.socket]:
        reply = yield from self._command("EPSV", "229")
        data = self._connect(int(reply.rsplit("|", 2)[1]))
        yield from self._command(command, "1")
        return data

    def _command(self, text: str, expected: str) -> Waiting[str]:
        self._control.sendall(text.encode() + b"\r\n")
        return (yield from self._reply(expected))

    def _reply(self, expected: str) -> Waiting[str]:
        while True:
            line, end, rest = self._received.partition(b"\r\n")
            if end:
                self._received = rest
                if line[:3].isdigit() and line[3:4] == b" ":
                    return _checked(line.decode(errors="replace"), expected)
                continue
            try:
                data = self._control.recv(4096)
            except BlockingIOError:
                yield
                continue
            if not data:
                raise ConnectionError("the server closed the control connection")
            self._received += data


def _checked(reply: str, expected: str) -> str:
    if not reply.startswith(expected):
        raise RuntimeError(f"expected {expected}, the server answered: {reply}")
    return reply
