"""FTP sessions that work on the same few files, and note what they did and saw in a `History`.

Every file is made of records, each with its number, its length and a hash before a body that only it has: so a reader
knows of any bytes whose they are, and whether they are whole, one version's, and of an upload that was acknowledged.
"""

from __future__ import annotations

import contextlib
import ftplib
import hashlib
import itertools
import random
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.downloads import Client
from tests.history import MODULUS, Content, Delete, Event, History, Look, Record, Rename, Upload

HEAD = re.compile(rb"record (\d{8}) (\d{10}) ([0-9a-f]{32})\n")
HEAD_SIZE = len(b"record 00000000 0000000000 ") + 32 + 1


class Wrong(Exception):
    """The server has said or sent what it must not; the session can go on."""


class Lost(Exception):
    """The server says nothing, or more than it was asked: no reply can be matched to its command any more."""


class Records:
    """The records that have been made. Any thread.

    >>> records = Records(random.Random(1), 100_000)
    >>> record, data = records.make()
    >>> records.read(data + data) == (record, record)
    True
    """

    def __init__(self, luck: random.Random, largest: int = 300_000) -> None:
        self._random = luck
        self._largest = largest
        self._numbers = itertools.count(HEAD_SIZE)  # the smallest is all head
        self._lock = threading.Lock()

    def make(self, *, appends: bool = False) -> tuple[Record, bytes]:
        """Return a new record, and its bytes, whose number tells with what the file begins that it is in."""
        with self._lock:
            number = next(self._numbers)
            size = MODULUS * self._random.choice([0, 0, 1, self._random.randrange(self._largest // MODULUS)])
            size += MODULUS if appends else number
            body = self._random.randbytes(size - HEAD_SIZE)
        data = f"record {number:08} {len(body):010} {hashlib.md5(body).hexdigest()}\n".encode() + body
        return Record(number, len(data)), data

    def read(self, data: bytes) -> Content:
        """Return the records in a file; raises Wrong where it is not made of whole ones."""
        found, position = [], 0
        while position < len(data):
            head = HEAD.match(data, position)
            if head is None:
                raise Wrong(f"no record at byte {position} of {len(data)}, after {found}")
            number, size, digest = int(head[1]), int(head[2]), head[3].decode()
            body = data[head.end() : head.end() + size]
            if hashlib.md5(body).hexdigest() != digest:
                raise Wrong(f"record {number} at byte {position} of {len(data)} is cut or mixed, after {found}")
            found.append(Record(number, len(head[0]) + size))
            position = head.end() + size
        return tuple(found)


@dataclass
class Rules:
    """What the clients know of the server: its files, and the replies with which it may refuse."""

    names: tuple[str, ...] = ("a", "b", "c")
    # Whether APPE to a file that is there is refused (mode off).
    appends: bool = True
    # Seconds in which each command has its reply.
    deadline: float = 30.0


@dataclass
class Session:
    """One client. `run` works on until all is done; what is wrong is in `wrong` then. Lost ends it at once."""

    address: tuple[str, int]
    seed: str
    records: Records
    history: History
    rules: Rules
    said: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def run(self, commands: int, is_over: threading.Event) -> None:
        """Log in, do so many commands, and say goodbye."""
        self._random = random.Random(self.seed)
        actions = [self._store, self._retrieve, self._retrieve, self._delete, self._rename, self._append, self._size,
                   self._list]  # fmt: skip
        with contextlib.closing(Client(timeout=self.rules.deadline, encoding="utf-8")) as self._ftp:
            self._ftp.connect(*self.address)
            self._ftp.login()
            self._ftp.voidcmd("TYPE I")
            for _ in range(commands):
                if is_over.is_set():
                    return
                try:
                    self._random.choice(actions)()
                except Wrong as error:
                    self.wrong.append(f"{error} after {self.said[-5:-1]}")
            self._expect(self._send("QUIT")[0], "221")
            if self._ftp.file is not None and (more := self._ftp.file.readline()):
                raise Lost(f"said after goodbye: {more!r}")

    # -- the wire

    def _send(self, command: str) -> tuple[str, float]:
        """Send a command; return its reply, whatever it is, and when it was sent. Nothing else must have been said."""
        assert self._ftp.sock is not None
        if select.select([self._ftp.sock], [], [], 0)[0]:
            raise Lost(f"said without having been asked: {self._reply()}")
        start = time.monotonic()
        self.said.append(command)
        self._ftp.putcmd(command)
        return self._reply(), start

    def _reply(self) -> str:
        try:
            reply = self._ftp.getresp()
        except ftplib.Error as error:
            reply = str(error)
        except (OSError, EOFError) as error:
            raise Lost(f"no reply: {error!r}") from error
        self.said.append(f"    {reply}")
        return reply

    def _expect(self, reply: str, *codes: str) -> None:
        if reply[:3] not in codes:
            raise Wrong(f"{reply!r} instead of {' or '.join(codes)}")

    def _data(self) -> socket.socket:
        reply, _ = self._send("EPSV")
        self._expect(reply, "229")
        return socket.create_connection(ftplib.parse229(reply, self.address), timeout=self.rules.deadline)

    # -- what was seen

    def _note(self, event: Callable[..., Event], start: float, name: str, **more: object) -> None:
        command = next(each for each in reversed(self.said) if not each.startswith(" "))
        told = " ".join(f"{key}={value}" for key, value in more.items())
        text = f"{command}: {self.said[-1].strip()} ({name} {told})"
        self.history.add(event(start, time.monotonic(), text, name, **more))

    def _missing(self, name: str, start: float) -> None:
        self._note(Look, start, name, is_there=False)

    # -- commands

    def _name(self) -> str:
        return self._random.choice(self.rules.names)

    def _store(self) -> None:
        self._upload("STOR")

    def _append(self) -> None:
        self._upload("APPE")

    def _upload(self, verb: str) -> None:
        name = self._name()
        record, data = self.records.make(appends=verb == "APPE")
        with self._data() as sock:
            reply, start = self._send(f"{verb} {name}")
            if verb == "APPE" and not self.rules.appends and reply.startswith("550"):
                self._note(Look, start, name)
                return
            self._expect(reply, "125", "150")
            sock.sendall(data)
        reply = self._reply()
        if verb == "APPE" and "Others have made the file meanwhile" in reply:
            return  # modes off and minimal append to nothing what cannot be appended to something
        if verb == "APPE" and "no such interrupted upload" in reply:
            return  # another session of the same user has gone on with it
        self._expect(reply, "226")
        self._note(Upload, start, name, record=record, appends=verb == "APPE")

    def _retrieve(self) -> None:
        name = self._name()
        with self._data() as sock:
            reply, start = self._send(f"RETR {name}")
            if reply.startswith("550"):
                self._missing(name, start)
                return
            self._expect(reply, "125", "150")
            data = _all_of(sock)
        reply = self._reply()
        if reply.startswith("550") and not data:  # it went between the command and the first byte
            self._missing(name, start)
            return
        if reply.startswith("451") and "changed at the store" in reply and data:
            return  # a version of which the client has a part, and the store nothing any more
        if not reply.startswith("226"):
            raise Wrong(f"RETR {name}: {reply!r} after {len(data)} bytes")
        try:
            found = self.records.read(data)
        except Wrong as error:
            raise Wrong(f"RETR {name}: {reply!r}, but {error}") from None
        self._note(Look, start, name, content=found)

    def _delete(self) -> None:
        name = self._name()
        reply, start = self._send(f"DELE {name}")
        self._expect(reply, "250", "550")
        if reply.startswith("250"):
            self._note(Delete, start, name)
        else:
            self._missing(name, start)

    def _rename(self) -> None:
        source, target = self._random.sample(self.rules.names, 2)
        reply, start = self._send(f"RNFR {source}")
        self._expect(reply, "350", "550")
        if reply.startswith("550"):
            self._missing(source, start)
            return
        self._note(Look, start, source)
        reply, start = self._send(f"RNTO {target}")
        self._expect(reply, "250", "550")
        if reply.startswith("250"):
            self._note(Rename, start, source, target=target)
        else:
            self._missing(source, start)

    def _size(self) -> None:
        name = self._name()
        reply, start = self._send(f"SIZE {name}")
        self._expect(reply, "213", "550")
        if reply.startswith("213"):
            self._note(Look, start, name, size=int(reply[4:]))
        else:
            self._missing(name, start)

    def _list(self) -> None:
        with self._data() as sock:
            reply, start = self._send("MLSD")
            self._expect(reply, "125", "150")
            listing = _all_of(sock).decode()
        self._expect(self._reply(), "226")
        sizes = {line.partition("; ")[2]: re.search(r"size=(\d+)", line) for line in listing.splitlines()}
        for name in self.rules.names:
            size = sizes.get(name)
            if size is not None:
                self._note(Look, start, name, size=int(size[1]))
            else:
                self._missing(name, start)


def _all_of(sock: socket.socket) -> bytes:
    with contextlib.suppress(ConnectionResetError), sock.makefile("rb") as data:
        return data.read()
    return b""


def run_sessions(sessions: Iterable[Session], commands: int) -> list[str]:
    """Run all at once, each in a thread, until one is lost; return what went wrong, with what was said before."""
    is_over = threading.Event()
    wrong: list[str] = []

    def work(number: int, session: Session) -> None:
        try:
            session.run(commands, is_over)
        except Exception as error:  # noqa: BLE001 - reported by the test
            is_over.set()
            wrong.append(f"session {number}: {error!r}\n    " + "\n    ".join(session.said[-12:]))
        wrong.extend(f"session {number}: {each}" for each in session.wrong)

    threads = [threading.Thread(target=work, args=each, name=f"session-{each[0]}") for each in enumerate(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong
