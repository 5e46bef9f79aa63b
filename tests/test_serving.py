"""The program with several workers: how it starts, spreads its clients, loses a worker, and ends."""

from __future__ import annotations

import contextlib
import ftplib
import io
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftpvfs.config import Address, load
from ftpvfs.launch import unreachable
from tests.certificates import write_certificate
from tests.conftest import (
    Launched,
    Store,
    connect,
    download,
    last_reply,
    names,
    open_transfer,
    reply,
    run_program,
    upload,
    wait_until,
)

HOST = "127.0.0.1"
DATA = os.urandom(100_000)
SHARED = pytest.mark.parametrize("store", ["local", "s3"], indirect=True)


@pytest.fixture
def start(launched: Callable[..., Launched], store: Store) -> Callable[..., Launched]:
    """start(*flags) -> the program over the store, whose listings are kept for ever."""

    def launch(*flags: str, **keywords: Any) -> Launched:
        options = (f"--option={key}={value}" for key, value in store.storage_options.items() if isinstance(value, str))
        caching = ("--dir-cache-time", "off", "--poll-interval", "off")
        return launched(store.url, *options, *caching, *flags, **keywords)

    return launch


@pytest.fixture
def store(request: pytest.FixtureRequest, make_store: Callable[..., Store]) -> Store:
    return make_store(getattr(request, "param", "local"))


def workers(server: Launched) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()


def clients_of(server: Launched) -> Counter[int]:
    """Process -> how many clients it serves."""
    found: Counter[int] = Counter()
    for worker in workers(server):
        with contextlib.suppress(psutil.Error):
            for connection in worker.net_connections("tcp"):
                if connection.status == "ESTABLISHED" and connection.laddr.port == server.address[1]:
                    found[worker.pid] += 1
    return found


def worker_of(server: Launched, ftp: ftplib.FTP) -> psutil.Process:
    """The process that serves this client, which has not left."""
    assert ftp.sock is not None
    port = ftp.sock.getsockname()[1]
    for worker in workers(server):
        if any(each.raddr and each.raddr.port == port for each in worker.net_connections("tcp")):
            return worker
    raise AssertionError("nobody serves it")


@contextlib.contextmanager
def one_with_each(server: Launched, count: int) -> Iterator[list[ftplib.FTP]]:
    """A session with each of `count` workers."""
    with contextlib.ExitStack() as inside:
        found: dict[int, ftplib.FTP] = {}

        def look() -> bool:
            ftp = inside.enter_context(contextlib.closing(connect(server.address)))
            found.setdefault(worker_of(server, ftp).pid, ftp)
            return len(found) == count

        wait_until(look, timeout=30)
        yield list(found.values())


# --- the start


def test_the_line_says_how_many_workers_there_are(start: Callable[..., Launched]) -> None:
    server = start("--workers", "3")
    assert server.line.endswith(f"at ftp://{HOST}:{server.address[1]} (cache mode off, TLS off, 3 workers)")
    assert len(workers(server)) == 3
    assert server.stop() == 0


def test_one_worker_is_one_process(start: Callable[..., Launched]) -> None:
    server = start("--workers", "1")
    assert server.line.endswith("1 worker)")
    assert workers(server) == []


def test_a_memory_store_has_one_worker(launched: Callable[..., Launched]) -> None:
    server = launched("memory://a", "--workers", "2")
    assert server.line.endswith("1 worker)")
    with contextlib.closing(connect(server.address)) as ftp:
        upload(ftp, "a", b"x")
        assert download(ftp, "a") == b"x"


def refused(*arguments: str) -> str:
    ended = run_program(*arguments, "--addr", f"{HOST}:0")
    assert (ended.returncode, ended.stdout) == (1, "")
    [line] = ended.stderr.splitlines()
    return line


@pytest.mark.parametrize("count", ["1", "3"])
def test_what_is_wrong_and_known_at_once_stops_the_start(tmp_path: Path, count: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "nowhere" in refused(str(tmp_path / "nowhere"), "--workers", count)
    assert "s4" in refused("s4://bucket", "--workers", count)
    line = refused("s3://bucket", "--cache-dir", str(tmp_path / "file" / "below"), "--workers", count)
    assert "The cache folder cannot be used" in line


def test_workers_that_could_not_see_each_others_changes_do_not_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "served").mkdir()
    line = refused(str(tmp_path / "served"), "--cache-dir", str(tmp_path / "file"), "--workers", "2")
    assert line.startswith("ftpvfs: The cache folder cannot be used")
    assert "--workers 1" in line


def test_a_refusal_of_the_store_is_an_entry_in_the_log(launched: Callable[..., Launched], seaweedfs: Any) -> None:
    options = (f"--option={key}={value}" for key, value in seaweedfs.storage_options.items() if isinstance(value, str))
    server = launched("s3://no-such-bucket", *options, "--workers", "2")
    wait_until(lambda: "nobody can use it until that is mended" in server.log(), timeout=30)
    assert len(server.log().splitlines()) == 1  # of two workers
    with contextlib.closing(connect(server.address)) as ftp, pytest.raises(ftplib.Error, match=r"^[45]"):
        upload(ftp, "a", b"")


def test_systemd_is_told_of_each_step(start: Callable[..., Launched], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        for count in ("1", "2"):
            server = start("--workers", count, env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
            assert systemd.recv(1000) == b"READY=1"
            server.process.send_signal(signal.SIGHUP)
            assert systemd.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert systemd.recv(1000) == b"READY=1"
            server.process.send_signal(signal.SIGTERM)
            assert systemd.recv(1000) == b"STOPPING=1"
            assert server.process.wait(20) == 0


@pytest.mark.parametrize(
    ("argv", "host", "elsewhere", "told"),
    [
        ([], "127.0.0.1", "", ""),
        ([], "10.0.0.5", "", "10.0.0.5"),
        ([], "0.0.0.0", "192.168.1.2", "192.168.1.2"),
        ([], "::", "192.168.1.2", "192.168.1.2"),
        ([], "0.0.0.0", "100.64.0.1", "100.64.0.1"),  # a provider's NAT
        ([], "0.0.0.0", "9.9.9.9", ""),
        ([], "0.0.0.0", "", ""),
        ([], "2001:db8::1", "", ""),
        (["--public-ip", "9.9.9.9"], "10.0.0.5", "", ""),
        (["--proxy-protocol-from", "10.0.0.1"], "10.0.0.5", "", ""),
    ],
)
def test_it_warns_of_addresses_that_clients_elsewhere_cannot_reach(
    argv: list[str], host: str, elsewhere: str, told: str
) -> None:
    warning = unreachable(load(argv, {}), Address(host, 21), lambda: elsewhere)
    assert bool(warning) is bool(told)
    assert told in warning


# --- many clients


def test_connections_spread_evenly_over_the_workers(start: Callable[..., Launched]) -> None:
    server = start("--workers", "3")
    with contextlib.ExitStack() as inside:
        for _ in range(30):
            inside.enter_context(contextlib.closing(connect(server.address)))
        counts = clients_of(server)
        assert sum(counts.values()) == 30
        assert len(counts) == 3
        assert max(counts.values()) - min(counts.values()) <= 10  # a busy machine lets one be slow for a while


def test_a_worker_whose_clients_have_left_gets_the_next(start: Callable[..., Launched]) -> None:
    server = start("--workers", "2")
    with contextlib.ExitStack() as inside:
        sessions = [inside.enter_context(contextlib.closing(connect(server.address))) for _ in range(20)]
        left = worker_of(server, sessions[0]).pid
        for ftp in sessions:
            if worker_of(server, ftp).pid == left:
                ftp.close()
        wait_until(lambda: clients_of(server)[left] == 0)
        before = clients_of(server)
        for _ in range(6):
            inside.enter_context(contextlib.closing(connect(server.address)))
        gained = clients_of(server) - before
        assert gained[left] > 3  # a busy machine lets it be slow once


def test_limits_hold_over_the_workers_to_the_last_session(start: Callable[..., Launched]) -> None:
    server = start("--workers", "3", "--max-cons-per-ip", "7")
    outcomes: list[str] = []
    done = threading.Barrier(21)

    def session() -> None:
        try:
            ftp = connect(server.address)
        except ftplib.error_temp as error:
            outcomes.append(str(error))
            done.wait(60)
        else:
            outcomes.append("in")
            done.wait(60)
            ftp.close()

    threads = [threading.Thread(target=session) for _ in range(20)]
    for thread in threads:
        thread.start()
    done.wait(60)
    for thread in threads:
        thread.join()
    assert Counter(outcomes) == {"in": 7, "421 Too many connections from the same IP address.": 13}


def test_wrong_passwords_count_over_the_workers_and_over_a_restart(start: Callable[..., Launched]) -> None:
    flags = ("--pass", "secret", "--workers", "2", "--ban-after", "4", "--max-login-attempts", "1")
    server = start(*flags)
    guesses = [threading.Thread(target=_guess, args=(server.address,)) for _ in range(4)]
    for guess in guesses:
        guess.start()
    for guess in guesses:
        guess.join()
    for _ in range(4):
        with pytest.raises(ftplib.error_temp, match="421 Too many wrong passwords"):
            connect(server.address, "anonymous", "secret")
    server.stop()
    with pytest.raises(ftplib.error_temp, match="421 Too many wrong passwords"):
        connect(start(*flags).address, "anonymous", "secret")


def _guess(address: tuple[str, int]) -> None:
    with contextlib.suppress(ftplib.Error):
        connect(address, "anonymous", "guess")


@SHARED
@pytest.mark.parametrize("mode", ["off", "writes", "full"])
def test_what_one_worker_changed_another_shows_at_once(start: Callable[..., Launched], mode: str) -> None:
    server = start("--workers", "2", "--vfs-cache-mode", mode)
    with one_with_each(server, 2) as (one, other):
        assert names(other) == names(one) == set()
        for first, second in ((one, other), (other, one)):
            upload(first, "a", DATA)
            assert names(second) == {"a"}
            assert second.size("a") == len(DATA)
            assert download(second, "a") == DATA
            upload(first, "a", DATA[:1000])
            assert second.size("a") == 1000
            assert download(second, "a") == DATA[:1000]
            first.rename("a", "b")
            assert names(second) == {"b"}
            first.mkd("d")
            assert names(second) == {"b", "d"}
            first.delete("b")
            first.rmd("d")
            assert names(second) == set()


def test_a_hangup_reaches_all_workers(start: Callable[..., Launched], store: Store) -> None:
    server = start("--workers", "2")
    with one_with_each(server, 2) as sessions:
        for ftp in sessions:
            assert names(ftp) == set()
        store.write("new", b"")
        server.process.send_signal(signal.SIGHUP)
        for ftp in sessions:
            wait_until(lambda ftp=ftp: names(ftp) == {"new"})


# --- the end of one worker


@SHARED
@pytest.mark.parametrize("mode", ["off", "writes"])
def test_a_worker_killed_under_load_is_replaced_and_no_acknowledged_upload_is_lost(
    start: Callable[..., Launched], store: Store, mode: str
) -> None:
    server = start("--workers", "2", "--vfs-cache-mode", mode, "--vfs-write-back", "100ms")
    kept: dict[str, bytes] = {}
    stop = threading.Event()
    problems: list[BaseException] = []
    lost_sessions = Counter[str]()

    def client(number: int) -> None:
        done = 0
        try:
            while not stop.is_set():
                try:
                    with contextlib.closing(connect(server.address)) as ftp:
                        while not stop.is_set():
                            name, data = f"{number}-{done}", os.urandom(20_000 + 1000 * number)
                            done += 1
                            upload(ftp, name, data)
                            kept[name] = data
                except (EOFError, OSError, ftplib.error_temp):  # its worker was killed
                    lost_sessions[f"client {number}"] += 1
        except BaseException as error:  # noqa: BLE001 - told below
            problems.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            before = len(kept)
            wait_until(lambda before=before: len(kept) >= before + 8, timeout=60)
            pids = {worker.pid for worker in workers(server)}
            victim = workers(server)[0]
            victim.send_signal(signal.SIGKILL)
            wait_until(lambda pids=pids: {worker.pid for worker in workers(server)} - pids, timeout=60)
        before = len(kept)
        wait_until(lambda: len(kept) >= before + 8, timeout=60)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not problems, problems[0]
    assert lost_sessions
    with contextlib.closing(connect(server.address)) as ftp:
        assert names(ftp) >= set(kept)
    assert server.stop(timeout=60) == 0  # stores what waits
    assert {name: store.read(name) for name in kept} == kept


def test_the_end_of_the_parent_is_the_end_of_its_workers(start: Callable[..., Launched]) -> None:
    server = start("--workers", "2")
    left = workers(server)
    server.process.kill()
    server.process.wait()
    gone, alive = psutil.wait_procs(left, timeout=30)
    assert len(gone) == 2, alive
    with socket.socket() as client:
        assert client.connect_ex(server.address) != 0


# --- the end of all


@pytest.mark.parametrize("count", ["1", "2"])
def test_when_it_stops_the_idle_are_told_and_transfers_finish(start: Callable[..., Launched], count: str) -> None:
    server = start("--workers", count, "--drain-timeout", "60s")
    with contextlib.closing(connect(server.address)) as idle, contextlib.closing(connect(server.address)) as busy:
        data = open_transfer(busy, "STOR a")
        data.sendall(DATA[:1000])
        server.process.send_signal(signal.SIGTERM)
        assert last_reply(idle).startswith("421 ")
        with pytest.raises(EOFError):
            idle.getline()
        wait_until(lambda: _refuses(server.address))
        data.sendall(DATA[1000:])
        data.close()
        assert last_reply(busy).startswith("226")
        assert last_reply(busy).startswith("421 ")
        assert server.process.wait(20) == 0


def _refuses(address: tuple[str, int]) -> bool:
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(address) != 0


@pytest.mark.parametrize("count", ["1", "2"])
def test_transfers_that_do_not_finish_in_time_are_cut_off_and_leave_the_old_file(
    start: Callable[..., Launched], store: Store, count: str
) -> None:
    store.write("a", b"old")
    server = start("--workers", count, "--drain-timeout", "300ms")
    with contextlib.closing(connect(server.address)) as ftp:
        data = open_transfer(ftp, "STOR a")
        with data:
            data.sendall(DATA)
            assert server.stop() == 0
        assert last_reply(ftp).startswith("426 ")
        assert last_reply(ftp).startswith("421 ")
    assert "cut off" in server.log()
    assert store.read("a") == b"old"
    assert store.list() == {"a"}


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_second_signal_ends_it_at_once(start: Callable[..., Launched], count: str) -> None:
    server = start("--workers", count, "--drain-timeout", "off")
    left = workers(server)
    with (
        contextlib.closing(connect(server.address)) as idle,
        contextlib.closing(connect(server.address)) as busy,
        open_transfer(busy, "STOR a"),
    ):
        server.process.send_signal(signal.SIGTERM)
        assert last_reply(idle).startswith("421 ")
        assert server.stop() == -signal.SIGTERM
    assert len(psutil.wait_procs(left, timeout=30)[0]) == len(left)


def test_who_waits_in_a_transfer_that_never_begins_is_told_too(start: Callable[..., Launched]) -> None:
    server = start("--workers", "2")
    with contextlib.closing(connect(server.address)) as ftp:
        ftp.makepasv()
        server.process.send_signal(signal.SIGTERM)
        assert last_reply(ftp).startswith("421 ")
    assert server.process.wait(20) == 0


def test_a_session_that_is_not_logged_in_does_not_keep_it(start: Callable[..., Launched]) -> None:
    server = start("--workers", "2")
    with socket.create_connection(server.address, timeout=30) as client, client.makefile("r") as lines:
        assert lines.readline().startswith("220 ")
        server.process.send_signal(signal.SIGTERM)
        assert lines.readline().startswith("421 ")
    assert server.process.wait(20) == 0


def test_a_transfer_keeps_its_worker_and_the_rest_of_the_program_goes_on(
    start: Callable[..., Launched], store: Store
) -> None:
    """A reload in the middle changes nothing."""
    server = start("--workers", "2")
    with one_with_each(server, 2) as (one, other):
        one.voidcmd("TYPE I")
        data = open_transfer(one, "STOR a")
        data.sendall(DATA[:5000])
        server.process.send_signal(signal.SIGHUP)
        other.storbinary("STOR b", io.BytesIO(DATA))
        data.sendall(DATA[5000:])
        data.close()
        assert last_reply(one).startswith("226")
        assert reply(one, "SIZE b") == reply(other, "SIZE a") == f"213 {len(DATA)}"
    assert store.read("a") == store.read("b") == DATA


def test_no_other_transfer_begins_while_it_stops(start: Callable[..., Launched], store: Store) -> None:
    server = start("--workers", "1", "--drain-timeout", "60s")
    with contextlib.closing(connect(server.address)) as ftp:
        data = open_transfer(ftp, "STOR a")
        data.sendall(DATA[:10])
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: _refuses(server.address))
        assert reply(ftp, "NOOP").startswith("200")
        assert ftp.sock is not None
        data.close()
        ftp.sock.sendall(b"MKD b\r\nMKD c\r\n")
        answers = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := ftp.sock.recv(1000):
                answers += piece
    codes = [line[:3] for line in answers.split(b"\r\n") if line]
    assert codes[-1] == b"421"
    assert b"226" in codes
    assert server.process.wait(20) == 0


def test_who_never_shakes_hands_does_not_keep_it(launched: Callable[..., Launched], tmp_path: Path) -> None:
    flags = ("--cert", str(write_certificate(tmp_path / "cert.pem")), "--tls-mode", "implicit")
    server = launched(str(tmp_path), *flags, "--drain-timeout", "off", "--workers", "1")
    with socket.create_connection(server.address) as silent:
        wait_until(lambda: any(each.status == "ESTABLISHED" for each in _sockets(server)))
        assert server.stop() == 0
        silent.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(100) == b""


def _sockets(server: Launched) -> list[Any]:
    connections: list[Any] = psutil.Process(server.process.pid).net_connections("tcp")
    return [each for each in connections if each.laddr.port == server.address[1]]
