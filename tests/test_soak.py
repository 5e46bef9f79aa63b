"""An hour's worth of sessions on a loaded machine, with clients that know every byte and every reply.

`python -m pytest -m stress tests/test_soak.py`: `python -m ftpvfs` with two workers, in every cache mode over a local
folder and over S3, while as many processes as the machine has cores do nothing but count. Sessions come and go, in
clear and in TLS; they store, append, resume, read, rename and delete files from 0 bytes to 8 MiB, abort and cut off
transfers in their middle, and compare every download and every listing with what they have stored. Beside them others
share three names (`tests.shared`). In the end the server stops in good order, and the store has exactly the files.

`FTPVFS_TEST_SOAK` is the number of sessions in all; 3600 by default, one for each second of an hour, which take about
a quarter of an hour. `FTPVFS_TEST_SEED` sets the seed, which is in what a failure says.
"""

from __future__ import annotations

import contextlib
import ftplib
import io
import itertools
import json
import os
import queue
import random
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.certificates import write_certificate
from tests.conftest import Launched, Store, last_reply, names, open_transfer, reset
from tests.downloads import Client, TLSClient
from tests.history import History
from tests.shared import Records, Rules, Session, run_sessions

MIB = 2**20
MODES = ("off", "minimal", "writes", "full")
STORES = ("local", "s3")
SESSIONS = int(os.environ.get("FTPVFS_TEST_SOAK", "3600")) // (len(MODES) * len(STORES))  # of each stage
SEED = os.environ.get("FTPVFS_TEST_SEED", "soak")
USERS = 6  # who work at the same time, each in a folder of his own
SHARING = 4  # sessions at the same time on shared names
COMMANDS = 12  # of each session
FILES = 4  # of each user
DEADLINE = 60.0  # seconds for a reply, on a machine with several times the load that it bears
SIZES = (0, 1, 1000, 65_536, 300_000, MIB, 8 * MIB)


@dataclass(frozen=True)
class File:
    """A file's bytes, which are made again whenever they are wanted: pieces of (seed, size)."""

    pieces: tuple[tuple[int, int], ...]

    @property
    def data(self) -> bytes:
        return b"".join(random.Random(seed).randbytes(size) for seed, size in self.pieces)

    @property
    def size(self) -> int:
        return sum(size for _, size in self.pieces)


@dataclass
class User:
    """One who has a folder for himself, and so knows what every reply must be."""

    number: int
    seed: str
    connect: Callable[[bool], ftplib.FTP]
    appends: bool
    files: dict[str, File] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.seed}-{self.number}")
        self._seeds = itertools.count(self.number * 10**9)
        self.folder = f"user-{self.number}"

    def session(self) -> None:
        """Log in, in clear or in TLS, do some commands, and leave, half of the time without a word."""
        actions = [self._store, self._store, self._read, self._read, self._read, self._resume, self._append,
                   self._rename, self._delete, self._look, self._abort_reading, self._abort_storing,
                   self._cut_off]  # fmt: skip
        is_tls = self._random.random() < 0.5
        self.said = [f"{self.folder} in {'TLS' if is_tls else 'clear'}"]
        with contextlib.closing(self.connect(is_tls)) as self._ftp:
            with contextlib.suppress(ftplib.error_perm):
                self._ftp.mkd(self.folder)
            for _ in range(self._random.randrange(1, 2 * COMMANDS)):
                self._random.choice(actions)()
            if self._random.random() < 0.5:
                self._ftp.quit()

    def _name(self) -> str:
        return f"{self.folder}/{self._random.randrange(FILES)}"

    def _new(self) -> tuple[int, int]:
        return next(self._seeds), self._random.choice(SIZES)

    def _known(self) -> str | None:
        return self._random.choice([*self.files]) if self.files else None

    def _upload(self, command: str, data: bytes, rest: int | None = None) -> None:
        self.said.append(f"{command}, {len(data)} bytes, from {rest}")
        reply = self._ftp.storbinary(command, io.BytesIO(data), rest=rest)
        assert reply.startswith("226"), reply

    def _store(self) -> None:
        name, file = self._name(), File((self._new(),))
        self._upload(f"STOR {name}", file.data)
        self.files[name] = file

    def _append(self) -> None:
        name = self._known()
        if name is not None and self.appends:
            more = self._new()
            self._upload(f"APPE {name}", File((more,)).data)
            self.files[name] = File((*self.files[name].pieces, more))

    def _resume(self) -> None:
        """Replace the end of a file, from where one piece of it begins."""
        name = self._known()
        if name is None or not self.appends or not self.files[name].pieces:
            return
        kept = self.files[name].pieces[: self._random.randrange(len(self.files[name].pieces)) + 1]
        offset = File(kept).size
        more = (next(self._seeds), self.files[name].size - offset + self._random.choice(SIZES))
        if offset:
            self._upload(f"STOR {name}", File((more,)).data, rest=offset)
            self.files[name] = File((*kept, more))

    def _read(self) -> None:
        name = self._name()
        offset = self._random.randrange(self.files[name].size + 1) if name in self.files else 0
        offset = self._random.choice([0, offset])
        self.said.append(f"RETR {name} from {offset}")
        parts: list[bytes] = []
        try:
            reply = self._ftp.retrbinary(f"RETR {name}", parts.append, blocksize=MIB, rest=offset or None)
        except ftplib.error_perm:
            if name in self.files:
                raise
            return
        assert reply.startswith("226"), reply
        assert b"".join(parts) == self.files[name].data[offset:], f"{name} from {offset} has other bytes"

    def _rename(self) -> None:
        source, target = self._known(), self._name()
        if source is not None and source != target:
            self.said.append(f"rename {source} to {target}")
            self._ftp.rename(source, target)
            self.files[target] = self.files.pop(source)

    def _delete(self) -> None:
        name = self._known()
        if name is not None:
            self.said.append(f"DELE {name}")
            self._ftp.delete(name)
            del self.files[name]

    def _look(self) -> None:
        self.said.append("MLSD and SIZE")
        assert names(self._ftp, self.folder) == {name.partition("/")[2] for name in self.files}
        for name, file in self.files.items():
            assert self._ftp.size(name) == file.size, name

    def _abort_reading(self) -> None:
        name = self._known()
        if name is None or self.files[name].size < MIB:
            return
        self.said.append(f"RETR {name} and ABOR")
        with open_transfer(self._ftp, f"RETR {name}") as data, data.makefile("rb") as down:
            assert down.read(1000) == self.files[name].data[:1000]
            self._ftp.putcmd("ABOR")
        replies = [last_reply(self._ftp), last_reply(self._ftp)]
        # The server may have heard of the end of the data connection first, or have sent all.
        assert replies[0][:3] in {"226", "426"}, replies
        assert replies[1][:3] in {"225", "226"}, replies

    def _abort_storing(self) -> None:
        self.said.append("STOR and ABOR")
        name, stops = self._name(), self._random.choice([0, 1000, MIB])
        with open_transfer(self._ftp, f"STOR {name}") as data:
            data.sendall(bytes(stops))
            self._ftp.putcmd("ABOR")
            replies = [last_reply(self._ftp), last_reply(self._ftp)]
        assert [reply[:3] for reply in replies] == ["426", "226"], replies
        self._forget_partial(name)

    def _cut_off(self) -> None:
        self.said.append("STOR and a reset")
        name, stops = self._name(), self._random.choice([0, 1000, MIB])
        data = open_transfer(self._ftp, f"STOR {name}")
        data.sendall(bytes(stops))
        reset(data)
        reply = last_reply(self._ftp)
        assert reply[:3] in {"425", "426"}, reply
        self._forget_partial(name)

    def _forget_partial(self, name: str) -> None:
        """Store what was interrupted: until then SIZE tells how much of it there is where there is no file."""
        file = self.files.get(name, File(()))
        self._upload(f"STOR {name}", file.data)
        self.files[name] = file


@contextlib.contextmanager
def loaded_machine() -> Iterator[None]:
    """Keep every core busy with a process that only counts."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


@pytest.mark.stress
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", STORES)
def test_an_hour_of_sessions_on_a_loaded_machine(
    make_store: Callable[[str], Store],
    launched: Callable[..., Launched],
    tmp_path: Path,
    kind: str,
    mode: str,
) -> None:
    store = make_store(kind)
    certificate = write_certificate(tmp_path / "cert.pem")
    server = launched(
        store.url, "--vfs-cache-mode", mode, "--cache-dir", str(tmp_path / "cache"), "--workers", "2",
        "--cert", str(certificate), "--tls-mode", "explicit", "--vfs-write-back", "500ms", "--drain-timeout", "300s",
        *(f"--option={name}={json.dumps(value)}" for name, value in store.storage_options.items()),
    )  # fmt: skip
    seed = f"{SEED}-{kind}-{mode}"

    def connect(is_tls: bool) -> ftplib.FTP:
        ftp: Client | TLSClient = Client(timeout=DEADLINE, encoding="utf-8")
        if is_tls:
            context = ssl.create_default_context(cafile=certificate)
            ftp = TLSClient(timeout=DEADLINE, context=context, encoding="utf-8")
        ftp.connect(*server.address)
        ftp.login()
        if isinstance(ftp, TLSClient):
            ftp.prot_p()
        ftp.voidcmd("TYPE I")
        return ftp

    users = [User(number, seed, connect, appends=mode != "off") for number in range(USERS)]
    with loaded_machine():
        wrong = work(users, server.address, seed, appends=mode != "off")
    assert not wrong, f"seed {seed}\n" + "\n".join(wrong) + server.log()[-3000:]
    assert server.stop(timeout=400) == 0, server.log()[-3000:]
    expected = {name: file for user in users for name, file in user.files.items()}
    found = {name for name in store.list() if name.startswith("user-") and not name.endswith("/")}
    assert found == set(expected)
    for name, file in expected.items():
        assert store.read(name) == file.data, name


def work(users: list[User], address: tuple[str, int], seed: str, *, appends: bool) -> list[str]:
    """Run all sessions; return what was wrong."""
    turns: queue.SimpleQueue[int] = queue.SimpleQueue()
    wrong: list[str] = []
    for number in range(SESSIONS):
        turns.put(number)

    def work_off(user: User) -> None:
        with contextlib.suppress(queue.Empty):
            while not wrong:
                turns.get_nowait()
                try:
                    user.session()
                except Exception as error:  # noqa: BLE001 - reported by the test
                    wrong.append(f"{user.folder}: {error!r} after\n    " + "\n    ".join(user.said[-12:]))

    def share() -> None:
        for turn in itertools.count():
            if wrong or turns.empty():
                return
            records, history = Records(random.Random(f"{seed}-{turn}")), History()
            rules = Rules((f"a{turn}", f"b{turn}", f"c{turn}"), appends=appends, deadline=DEADLINE)
            sessions = [Session(address, f"{seed}-{turn}-{each}", records, history, rules) for each in range(SHARING)]
            wrong.extend(run_sessions(sessions, COMMANDS))
            wrong.extend(history.wrong())

    threads = [threading.Thread(target=work_off, args=(user,)) for user in users]
    threads.append(threading.Thread(target=share))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong
