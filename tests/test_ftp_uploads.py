"""226 means that the object is in the store; all else leaves what was there, and is answered once."""

from __future__ import annotations

import contextlib
import errno
import ftplib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftpvfs import VFSDTPHandler
from ftpvfs.server.dispatch import VFSPassiveDTP
from ftpvfs.server.transfer import failure_reply
from tests.conftest import (
    Launched,
    Store,
    StoreFactory,
    connect,
    download,
    last_reply,
    names,
    open_transfer,
    reply,
    reset,
    upload,
)
from tests.servers import HOST, FaultProxy, SeaweedFS, wait_until

MIB = 2**20
Serve = Callable[..., tuple[str, int]]
MakeProxy = Callable[[Any], FaultProxy]

OLD = b"the version that was there"
SMALL = b"some bytes of a new one"
LARGE = os.urandom(MIB) * 20  # more than one part of an upload to S3 (8 MiB) or GCS (16 MiB)

object_stores = pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)
s3_only = pytest.mark.parametrize("store", ["s3"], indirect=True)


class Events:
    """What pyftpdlib's callbacks were told, and by which sessions."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def attributes(self) -> dict[str, Any]:
        """Handler attributes that record every callback."""
        calls = ("file_received", "incomplete_file_received", "file_sent", "incomplete_file_sent", "disconnect")
        return {f"on_{name}": self._recorder(name) for name in calls}

    def _recorder(self, name: str) -> Callable[..., None]:
        return lambda session, *file: self.seen.append(" ".join((name, *file)))

    def wait_for(self, event: str, count: int = 1) -> None:
        wait_until(lambda: self.seen.count(event) >= count, what=f"{event} in {self.seen}")


def assert_untouched(store: Store) -> None:
    """The old object is whole, and nothing of the new one is left, nor comes later."""
    assert store.read("a") == OLD
    assert store.list() == {"a"}
    wait_until(lambda: not store.uploads(), what="parts of the upload are gone")  # the reply does not wait for that


def assert_in_step(ftp: ftplib.FTP, store: Store) -> None:
    """There was one reply, and the session is as good as new."""
    assert reply(ftp, "NOOP").startswith("200 ")
    assert upload(ftp, "b", b"another").startswith("226 ")
    assert store.read("b") == b"another"
    store.delete("b")


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def address(store: Store, ftp_server: Serve, events: Events) -> tuple[str, int]:
    store.write("a", OLD)
    return ftp_server(store, attributes=events.attributes())


@pytest.fixture
def ftp(address: tuple[str, int]) -> Iterator[ftplib.FTP]:
    with connect(address) as client:
        yield client


def data_address(ftp: ftplib.FTP) -> tuple[str, int]:
    return ftplib.parse229(reply(ftp, "EPSV"), (HOST, 0))


def send(sock: socket.socket, data: bytes) -> None:
    """Send what the server takes; it may break the transfer off meanwhile."""
    with contextlib.suppress(OSError):
        sock.sendall(data)


# --- the client's end


@pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=["nothing", "small", "large"])
def test_a_reset_is_no_end_of_an_upload(store: Store, ftp: ftplib.FTP, events: Events, data: bytes) -> None:
    with_data = open_transfer(ftp, "STOR a")
    with_data.sendall(data)
    reset(with_data)
    answer = last_reply(ftp)
    assert_untouched(store)
    assert_in_step(ftp, store)
    events.wait_for("file_received /b")
    if answer.startswith("425 ") and data != LARGE:  # it was over before the server had accepted it
        assert events.seen == ["file_received /b"]
    else:
        assert answer.startswith("426 ")
        assert events.seen == ["incomplete_file_received /a", "file_received /b"]


def test_a_data_connection_that_never_comes_touches_nothing(store: Store, ftp_server: Serve) -> None:
    store.write("a", OLD)
    passive = type("Passive", (VFSPassiveDTP,), {"timeout": 0.2})
    with connect(ftp_server(store, attributes={"passive_dtp": passive})) as ftp:
        data_address(ftp)
        assert reply(ftp, "STOR a").startswith("150 ")
        assert last_reply(ftp).startswith("425 ")
        assert_untouched(store)
        assert reply(ftp, "STOR a").startswith("425 ")  # the port is closed, too
        assert_in_step(ftp, store)


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_a_port_that_nobody_uses_closes_without_a_word(store: Store, ftp_server: Serve) -> None:
    passive = type("Passive", (VFSPassiveDTP,), {"timeout": 0.1})
    with connect(ftp_server(store, attributes={"passive_dtp": passive})) as ftp:
        address = data_address(ftp)

        def is_closed() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(address) != 0

        wait_until(is_closed)
        assert_in_step(ftp, store)


def test_another_pasv_answers_the_transfer_that_waited(store: Store, ftp: ftplib.FTP) -> None:
    data_address(ftp)
    assert reply(ftp, "STOR a").startswith("150 ")
    assert reply(ftp, "EPSV").startswith("426 ")
    assert last_reply(ftp).startswith("229 ")
    assert_untouched(store)
    assert_in_step(ftp, store)


def test_another_pasv_breaks_off_the_transfer_that_runs(store: Store, ftp: ftplib.FTP) -> None:
    with open_transfer(ftp, "STOR a") as with_data:
        with_data.sendall(SMALL)
        assert reply(ftp, "EPSV").startswith("426 ")
        assert last_reply(ftp).startswith("229 ")
    assert_untouched(store)
    assert_in_step(ftp, store)


def test_a_data_connection_reset_at_once_is_answered(store: Store, ftp: ftplib.FTP) -> None:
    for _ in range(10):
        address = data_address(ftp)
        assert reply(ftp, "STOR a").startswith("150 ")
        reset(socket.create_connection(address))
        assert last_reply(ftp)[:4] in {"425 ", "426 "}
    assert_untouched(store)
    assert_in_step(ftp, store)


def test_a_second_transfer_is_refused_and_does_not_disturb_the_first(store: Store, ftp: ftplib.FTP) -> None:
    with_data = open_transfer(ftp, "STOR a")
    with_data.sendall(SMALL)
    for command in ("STOR b", "RETR a", "APPE b", "LIST", "STOU"):
        assert reply(ftp, command).startswith("503 ")
    with_data.sendall(SMALL)
    with_data.close()
    assert last_reply(ftp).startswith("226 ")
    assert store.read("a") == SMALL + SMALL
    assert store.list() == {"a"}


def test_bytes_and_an_end_that_come_before_the_command_are_stored(store: Store, ftp: ftplib.FTP) -> None:
    with socket.create_connection(data_address(ftp)) as with_data:
        with_data.sendall(SMALL)
        assert reply(ftp, "NOOP").startswith("200 ")  # by then the server has seen them
    assert reply(ftp, "NOOP").startswith("200 ")
    assert reply(ftp, "STOR a")[:4] in {"125 ", "150 "}
    assert last_reply(ftp).startswith("226 ")
    assert store.read("a") == SMALL


def test_abor_and_the_end_of_the_data_in_one_breath_store_nothing(store: Store, ftp: ftplib.FTP) -> None:
    assert ftp.sock is not None
    for _ in range(20):
        with open_transfer(ftp, "STOR a") as with_data:
            with_data.sendall(SMALL * 1000)
            ftp.sock.sendall(b"ABOR\r\n")
        assert last_reply(ftp).startswith("426 ")
        assert last_reply(ftp)[:3] in {"225", "226"}
        assert store.read("a") == OLD
    assert_untouched(store)
    assert_in_step(ftp, store)


def test_an_end_and_abor_that_wait_together_store_nothing(
    local_store: Store, launched: Callable[..., Launched]
) -> None:
    local_store.write("a", OLD)
    server = launched(local_store.url)
    for _ in range(5):  # in which order the two are seen is chance
        with connect(server.address) as ftp, open_transfer(ftp, "STOR a") as with_data:
            with_data.sendall(SMALL)
            wait_until(lambda: f"received: {len(SMALL)}\n" in reply(ftp, "STAT"))
            server.process.send_signal(signal.SIGSTOP)
            with_data.shutdown(socket.SHUT_WR)
            assert ftp.sock is not None
            ftp.sock.sendall(b"ABOR\r\n")
            server.process.send_signal(signal.SIGCONT)
            assert last_reply(ftp).startswith("426 ")
            assert last_reply(ftp)[:3] in {"225", "226"}
        assert_untouched(local_store)


def test_abor_before_the_data_connection_answers_the_transfer_as_well(store: Store, ftp: ftplib.FTP) -> None:
    data_address(ftp)
    assert reply(ftp, "STOR a").startswith("150 ")
    assert reply(ftp, "ABOR").startswith("426 ")
    assert last_reply(ftp).startswith("226 ")
    data_address(ftp)
    assert reply(ftp, "ABOR").startswith("225 ")
    assert_untouched(store)
    assert_in_step(ftp, store)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_client_that_stalls_is_told_and_may_go_on(store: Store, ftp_server: Serve, data: bytes) -> None:
    store.write("a", OLD)
    stalled = type("Stalled", (VFSDTPHandler,), {"timeout": 0.4})
    with connect(ftp_server(store, attributes={"dtp_handler": stalled})) as ftp:
        with open_transfer(ftp, "STOR a") as with_data:
            send(with_data, data)
            assert last_reply(ftp).startswith("426 ")
        assert_untouched(store)
        assert_in_step(ftp, store)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_the_end_of_the_control_connection_is_no_end_of_an_upload(
    store: Store, address: tuple[str, int], events: Events, data: bytes
) -> None:
    ftp = connect(address)
    with open_transfer(ftp, "STOR a") as with_data:
        with_data.sendall(data)
        ftp.close()
    events.wait_for("disconnect")
    assert "incomplete_file_received /a" in events.seen
    assert_untouched(store)


CLIENT = """
import ftplib, socket, sys
spare = [socket.socket() for _ in range(2)]
if sys.argv[3] == "data first":
    spare[0].close()  # so that the number of the data connection is below that of the control connection
    holder = socket.socket()
ftp = ftplib.FTP(timeout=30)
ftp.connect(sys.argv[1], int(sys.argv[2]))
ftp.login()
ftp.voidcmd("TYPE I")
if sys.argv[3] == "data first":
    holder.close()
data = ftp.transfercmd("STOR a")
assert (data.fileno() < ftp.sock.fileno()) == (sys.argv[3] == "data first")
data.sendall(b"x" * int(sys.argv[4]))
print("sent", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
@pytest.mark.parametrize("order", ["control first", "data first"])
@pytest.mark.parametrize("size", [1000, 20 * MIB])
def test_a_killed_client_has_not_finished_its_upload(
    store: Store, ftp_server: Serve, events: Events, order: str, size: int
) -> None:
    store.write("a", OLD)
    patient = type("Patient", (VFSDTPHandler,), {"patience": 0.2})  # the machine that runs the tests may be busy
    address = ftp_server(store, attributes={"dtp_handler": patient, **events.attributes()})
    for turn in (1, 2):
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, *map(str, address), order, str(size)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        with client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"sent\n"
            client.send_signal(signal.SIGKILL)
        events.wait_for("disconnect", turn)
        assert store.read("a") == OLD
    assert "file_received /a" not in events.seen
    assert_untouched(store)


@s3_only
def test_a_stopping_server_breaks_off_and_leaves_no_parts(
    store: Store, launched: Callable[..., Launched], tmp_path: Any
) -> None:
    store.write("a", OLD)
    options = [f"--option={key}={value}" for key, value in store.storage_options.items()]
    server = launched(store.url, *options, "--drain-timeout=500ms")
    ftp = connect(server.address)
    with open_transfer(ftp, "STOR a") as with_data:
        with_data.sendall(LARGE)
        wait_until(store.uploads)
        assert server.stop() == 0
    ftp.close()
    assert_untouched(store)


# --- the store's end


def failing_server(store: Store, make_proxy: MakeProxy, ftp_server: Serve, events: Events) -> tuple[FaultProxy, Any]:
    """An FTP server whose store is behind a proxy that makes faults, and the proxy."""
    store.write("a", OLD)
    proxy = make_proxy(store)
    address = ftp_server(
        store.proxied(proxy), low_level_retries=2, timeout=1, contimeout=1, attributes=events.attributes()
    )
    return proxy, address


def break_store(proxy: FaultProxy, fault: str) -> None:
    if fault == "503":
        for method in ("PUT", "POST"):
            proxy.fail_next(10**6, method=method)
    elif fault == "refused":
        proxy.refuse = True
    else:
        proxy.black_hole = True


@object_stores
@pytest.mark.parametrize("fault", ["503", "refused", "silent"])
@pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=["empty", "at the commit", "while it arrives"])
def test_a_store_that_fails_is_answered_with_451(
    store: Store, make_proxy: MakeProxy, ftp_server: Serve, events: Events, fault: str, data: bytes
) -> None:
    proxy, address = failing_server(store, make_proxy, ftp_server, events)
    with connect(address) as ftp:
        with open_transfer(ftp, "STOR a") as with_data:
            break_store(proxy, fault)
            send(with_data, data)
        answer = last_reply(ftp)
        assert answer.startswith("451 ")
        assert "None" not in answer
        proxy.cut()  # a request that waits in the silence must not reach the store after it: its outcome is chance
        assert "Internal" not in answer
        proxy.heal()
        events.wait_for("incomplete_file_received /a")  # comes when the rest is tidied away, or cannot be
        assert "file_received /a" not in events.seen
        assert store.read("a") == OLD
        assert store.list() == {"a"}
        if fault == "503":  # it can be told to forget the parts; a store that is away cannot
            assert_untouched(store)
        assert_in_step(ftp, store)


@object_stores
def test_a_store_that_stumbles_is_tried_again(
    store: Store, make_proxy: MakeProxy, ftp_server: Serve, events: Events
) -> None:
    proxy, address = failing_server(store, make_proxy, ftp_server, events)
    with connect(address) as ftp:
        for data in (SMALL, LARGE):
            proxy.fail_next(1)
            assert upload(ftp, "a", data).startswith("226 ")
            assert store.read("a") == data


def test_a_store_that_dies_and_comes_back(make_store: StoreFactory, ftp_server: Serve) -> None:
    with SeaweedFS() as server:
        bucket = server.create_bucket()
        store = Store("s3", f"s3://{bucket}", server.storage_options, bucket, server.filesystem, server)
        store.write("a", OLD)
        store.write("large", LARGE)
        with connect(ftp_server(store, low_level_retries=2, timeout=2, contimeout=1)) as ftp:
            with open_transfer(ftp, "STOR a") as with_data:
                with_data.sendall(LARGE)
                server.stop()
                send(with_data, LARGE)
            assert last_reply(ftp).startswith("451 ")
            assert reply(ftp, "NOOP").startswith("200 ")
            assert reply(ftp, "SIZE other")[:3] in {"450", "550"}  # answered, whatever is cached of it
            server.start()
            assert store.read("a") == OLD
            assert store.list() == {"a", "large"}
            with open_transfer(ftp, "RETR large") as with_data:
                got = with_data.recv(1000)
                server.stop()
                while piece := with_data.recv(MIB):
                    got += piece
            assert last_reply(ftp).startswith("451 ")
            assert len(got) < len(LARGE)
            assert LARGE.startswith(got)
            assert reply(ftp, "NOOP").startswith("200 ")


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_FSIZE"), reason="this system cannot limit another process's files")
def test_no_space_is_answered_with_552(local_store: Store, launched: Callable[..., Launched]) -> None:
    local_store.write("a", OLD)
    server = launched(local_store.url, "--workers=1")
    psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_FSIZE, (MIB, MIB))
    with connect(server.address) as ftp:
        with open_transfer(ftp, "STOR a") as with_data:
            send(with_data, LARGE)
            assert last_reply(ftp).startswith("552 ")
        assert_untouched(local_store)
        assert_in_step(ftp, local_store)


def test_a_user_with_a_home_hands_in_files_while_the_store_is_away(
    make_store: Any, make_proxy: Any, make_vfs: Any, ftp_server: Serve, tmp_path: Path
) -> None:
    store = make_store("s3")
    proxy = make_proxy(store)
    vfs = make_vfs(
        store.proxied(proxy), cache_mode="writes", cache_dir=str(tmp_path / "cache"), low_level_retries=1
    )
    proxy.refuse = True
    with connect(ftp_server(vfs, home="/home/of/user")) as ftp:
        assert upload(ftp, "a", OLD).startswith("226 ")
        assert names(ftp) == {"a"}
        proxy.heal()
        assert upload(ftp, "b", OLD).startswith("226 ")
    vfs.sync(30)
    assert store.list() == {"home/of/user/a", "home/of/user/b"}


def test_what_came_of_a_broken_upload_goes_with_the_file_that_is_renamed_at_once(
    local_store: Store, make_vfs: Any, ftp_server: Serve, tmp_path: Path
) -> None:
    local_store.write("log", b"old lines")
    vfs = make_vfs(local_store, cache_mode="writes", cache_dir=str(tmp_path / "cache"))
    with connect(ftp_server(vfs)) as ftp:
        broken = open_transfer(ftp, "STOR log")
        broken.sendall(b"half of")
        reset(broken)
        assert last_reply(ftp).startswith("426 ")
        ftp.rename("log", "log.1")
        assert upload(ftp, "log", b"fresh", verb="APPE").startswith("226 ")
        assert download(ftp, "log") == b"fresh"


# --- overwriting


def test_a_reader_meanwhile_gets_old_or_new_bytes_and_no_mix(store: Store, ftp_server: Serve) -> None:
    versions = [bytes([letter]) * (3 * MIB) for letter in b"ABCDE"]
    store.write("a", versions[0])
    address = ftp_server(store)
    is_over = threading.Event()
    got: list[bytes] = []

    def read() -> None:
        with connect(address) as ftp:
            while not is_over.is_set():
                with contextlib.suppress(ftplib.error_temp):  # changed meanwhile, and said so
                    got.append(download(ftp, "a"))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        with connect(address) as ftp:
            for version in versions[1:] * 2:
                assert upload(ftp, "a", version).startswith("226 ")
    finally:
        is_over.set()
        for reader in readers:
            reader.join()
    assert got
    assert all(data in versions for data in got)
    assert store.read("a") == versions[-1]


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_callback_that_fails_does_not_end_the_session(store: Store, ftp_server: Serve) -> None:
    def fail(session: Any, file: str) -> None:
        raise RuntimeError(f"the embedding program's own trouble with {file}")

    with connect(ftp_server(store, attributes={"on_file_received": fail})) as ftp:
        for data in (b"one", b"two"):
            assert upload(ftp, "a", data).startswith("226 ")
            assert store.read("a") == data


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, "550"), (errno.EROFS, "550"), (errno.ENOSPC, "552"), (errno.EDQUOT, "552"), (errno.EIO, "451")],
)
def test_only_what_may_work_another_time_is_answered_as_such(number: int, code: str) -> None:
    assert failure_reply(OSError(number, "why", "a")).startswith(f"{code} why;")
