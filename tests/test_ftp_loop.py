"""One event loop serves all: who waits for a store waits alone, and leaves nothing behind when he goes."""

from __future__ import annotations

import contextlib
import ftplib
import gc
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import greenlet
import psutil
import pytest

from ftpvfs import VFS, VFSAuthorizer, VFSFilesystem, VFSHandler, VFSServer
from ftpvfs.server.loop import Loop
from ftpvfs.server.offload import Lane, Offload
from ftpvfs.waiting import Wait
from tests.conftest import Store, StoreFactory, connect, download, last_reply, names, open_transfer, reply, serving
from tests.load import hammer
from tests.servers import HOST, FaultProxy, reset, wait_until

MIB = 2**20
WAITERS = 50
DATA = os.urandom(MIB)

Address = tuple[str, int]


def handler_class(vfs: VFS, **attributes: Any) -> type[VFSHandler]:
    authorizer = VFSAuthorizer()
    authorizer.add_anonymous("/", perm="elradfmwMT")
    filesystem = type("Filesystem", (VFSFilesystem,), {"vfs": vfs})
    return type("Handler", (VFSHandler,), {"abstracted_fs": filesystem, "authorizer": authorizer, **attributes})


@pytest.fixture
def serve() -> Iterator[Callable[..., VFSServer]]:
    """serve(vfs, **attributes of the handler) -> VFSServer in a thread of its own."""
    with contextlib.ExitStack() as cleanup:

        def start(vfs: VFS, **attributes: Any) -> VFSServer:
            server: VFSServer = cleanup.enter_context(serving(None, handler_class(vfs, **attributes)))
            return server

        yield start


def address_of(server: VFSServer) -> Address:
    return (HOST, server.address[1])


class Hanging:
    """A server over an S3 store that answers until the test makes it hang, with `warm/a` cached and `cold` not."""

    def __init__(self, server: VFSServer, store: Store, proxy: FaultProxy) -> None:
        self.server = server
        self.store = store
        self.proxy = proxy
        self.address = address_of(server)

    @property
    def parked(self) -> int:
        return self.server.ioloop.offload.parked

    @property
    def busy(self) -> int:
        """Threads that wait for the store."""
        vfs = self.server.handler.abstracted_fs.vfs
        return self.server.ioloop.offload.lane(vfs).busy

    def hang(self) -> None:
        self.proxy.black_hole = True

    def session(self, number: int = 0) -> Any:
        """The server's end of one of its sessions."""
        sessions = [each for each in self.server.ioloop.socket_map.values() if isinstance(each, VFSHandler)]
        return sessions[number]


@pytest.fixture
def hanging(
    make_store: StoreFactory, make_proxy: Any, make_vfs: Any, serve: Callable[..., VFSServer]
) -> Iterator[Callable[..., Hanging]]:
    """hanging(**attributes of the handler) -> Hanging. The store answers again when the test ends."""
    made = []

    def make(**attributes: Any) -> Hanging:
        store = make_store("s3")
        for name in ("warm/a", "warm/b", "cold/a"):
            store.write(name, DATA)
        proxy = make_proxy(store)
        vfs = make_vfs(store.proxied(proxy), low_level_retries=2)
        served = Hanging(serve(vfs, **attributes), store, proxy)
        made.append(served)
        with connect(served.address) as ftp:
            assert names(ftp, "warm") == {"a", "b"}
        return served

    yield make
    for served in made:
        served.proxy.heal()
        wait_until(lambda served=served: not served.busy, what="threads are through with the store")


def say(ftp: ftplib.FTP, *commands: str) -> None:
    assert ftp.sock is not None
    ftp.sock.sendall("".join(f"{command}\r\n" for command in commands).encode())


def has_answer(ftp: ftplib.FTP) -> bool:
    assert ftp.sock is not None
    return bool(select.select([ftp.sock], [], [], 0)[0])


def passive(ftp: ftplib.FTP) -> Address:
    return ftplib.parse229(reply(ftp, "EPSV"), (HOST, 0))


# --- one client's store is no other client's matter


def test_while_fifty_wait_for_a_store_that_hangs_others_are_served(
    hanging: Callable[..., Hanging], local_store: Store, make_vfs: Any
) -> None:
    served = hanging()
    local_store.write("a", DATA)
    listener = socket.create_server((HOST, 0))  # listens before the loop, which runs already, looks at it
    beside = VFSServer(listener, handler_class(make_vfs(local_store)), ioloop=served.server.ioloop)
    with contextlib.ExitStack() as cleanup:
        waiters = [cleanup.enter_context(connect(served.address)) for _ in range(WAITERS)]
        cached = cleanup.enter_context(connect(served.address))
        local = cleanup.enter_context(connect(address_of(beside)))
        served.hang()
        for number, ftp in enumerate(waiters):
            say(ftp, f"SIZE cold/{number}")
        wait_until(lambda: served.parked == WAITERS)

        assert names(cached, "warm") == {"a", "b"}
        assert reply(cached, "SIZE warm/a") == f"213 {len(DATA)}"
        assert download(local, "a") == DATA
        assert names(local) == {"a"}
        assert not any(map(has_answer, waiters))

        served.proxy.heal()
        for ftp in waiters:
            assert last_reply(ftp).startswith("550 ")
        assert download(cached, "warm/a") == DATA


def test_a_download_that_waits_for_its_store_goes_on_where_it_was(hanging: Callable[..., Hanging]) -> None:
    served = hanging()
    big = os.urandom(40 * MIB)
    served.store.write("large/big", big)
    with connect(served.address) as ftp, connect(served.address) as other:
        with open_transfer(ftp, "RETR large/big") as data, data.makefile("rb") as down:
            begun = down.read(MIB)
            served.hang()
            assert names(other, "warm") >= {"a", "b"}
            for command, answer in [("NOOP", "200 "), ("STAT", "211"), ("PWD", "257 ")]:
                assert reply(ftp, command).startswith(answer)
            served.proxy.heal()
            assert begun + down.read() == big
        assert last_reply(ftp).startswith("226 ")


def test_an_upload_to_a_store_that_hangs_takes_a_bounded_amount_of_memory(
    make_store: StoreFactory, make_proxy: Any, make_vfs: Any, serve: Callable[..., VFSServer]
) -> None:
    store = make_store("s3")
    proxy = make_proxy(store)
    vfs = make_vfs(store.proxied(proxy), max_buffer_memory="32M", low_level_retries=2)
    big = os.urandom(MIB) * 150
    with connect(address_of(serve(vfs))) as ftp, open_transfer(ftp, "STOR big") as data:
        proxy.black_hole = True
        sender = threading.Thread(target=data.sendall, args=(big,))
        sender.start()
        try:
            stands_still(lambda: transferred(ftp))
            assert transferred(ftp) < 100 * MIB
            assert vfs.stats()["buffer_memory"] <= 48 * MIB  # what is collected may exceed the limit by one part
        finally:
            proxy.heal()
            sender.join()
        data.close()
        assert last_reply(ftp).startswith("226 ")
    assert store.read("big") == big


def transferred(ftp: ftplib.FTP) -> int:
    """Bytes of the transfer under way, as STAT tells."""
    say(ftp, "STAT")
    lines = ftp.getmultiline().splitlines()
    return sum(int(line.split(":")[1]) for line in lines if "Total bytes" in line)


def stands_still(count: Callable[[], int]) -> None:
    """Return once nothing has changed for a while."""
    last, since = -1, time.monotonic()
    deadline = since + 30
    while time.monotonic() < deadline:
        now = count()
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > 0.5 and now:
            return
    raise AssertionError(f"{last} bytes, and still more come")


# --- who leaves while a command waits


def test_abor_ends_a_command_that_waits(hanging: Callable[..., Hanging]) -> None:
    served = hanging()
    with connect(served.address) as ftp:
        where = passive(ftp)
        served.hang()
        with socket.create_connection(where):
            say(ftp, "RETR cold/a")
            wait_until(lambda: served.parked == 1)
            assert reply(ftp, "ABOR").startswith("426 ")
            assert last_reply(ftp)[:3] in {"225", "226"}
        assert served.parked == 0
        assert reply(ftp, "SIZE warm/a").startswith("213 ")
        say(ftp, "SIZE cold/a", "NOOP", "ABOR")
        assert last_reply(ftp).startswith("426 ")
        assert last_reply(ftp).startswith("200 ")
        assert last_reply(ftp).startswith("225 ")
        served.proxy.heal()
        assert download(ftp, "cold/a") == DATA


@pytest.mark.parametrize("end", ["FIN", "RST"])
@pytest.mark.parametrize("command", ["SIZE cold/a", "RETR cold/a", "LIST cold", "STOR cold/new", "CWD cold/new"])
def test_a_client_that_vanishes_while_it_waits_leaves_nothing(
    hanging: Callable[..., Hanging], command: str, end: str
) -> None:
    served = hanging()
    ftp = connect(served.address)
    with socket.create_connection(passive(ftp)):
        served.hang()
        say(ftp, command)
        wait_until(lambda: served.parked == 1)
        assert ftp.sock is not None
        if end == "RST":
            reset(ftp.sock)
        ftp.close()
        wait_until(lambda: served.parked == 0)
        wait_until(lambda: len(served.server.ioloop.socket_map) == 2)  # the listener and the loop's own
    wait_until(lambda: not served.busy, what="no thread waits any more")


def test_quit_is_answered_after_the_command_before_it(hanging: Callable[..., Hanging]) -> None:
    served = hanging()
    with connect(served.address) as ftp:
        served.hang()
        say(ftp, "SIZE cold/a", "QUIT", "NOOP")
        wait_until(lambda: served.parked == 1)
        served.proxy.heal()
        assert last_reply(ftp) == f"213 {len(DATA)}"
        assert last_reply(ftp).startswith("221 ")
        with pytest.raises(EOFError):
            ftp.getresp()


def test_what_changes_the_store_goes_on_to_its_end_when_the_client_leaves(hanging: Callable[..., Hanging]) -> None:
    served = hanging()
    ftp = connect(served.address)
    served.hang()
    say(ftp, "DELE warm/a")
    wait_until(lambda: served.parked == 1)
    ftp.close()
    wait_until(lambda: served.parked == 0)
    served.proxy.heal()
    wait_until(lambda: "warm/a" not in served.store.list())
    with connect(served.address) as other:
        wait_until(lambda: names(other, "warm") == {"b"})


# --- while an upload is being published


class Told:
    """What the callbacks of a handler class were told."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def attributes(self) -> dict[str, Any]:
        calls = ("file_received", "incomplete_file_received")
        return {f"on_{name}": lambda _, file, name=name: self.events.append(f"{name} {file}") for name in calls}


def uploading(served: Hanging, ftp: ftplib.FTP, name: str = "warm/new") -> None:
    """Send a file whose commit then hangs."""
    with open_transfer(ftp, f"STOR {name}") as data:
        served.hang()
        data.sendall(b"new")
    wait_until(lambda: served.parked >= 1)


def test_commands_are_answered_while_an_upload_is_published(hanging: Callable[..., Hanging]) -> None:
    told = Told()
    served = hanging(**told.attributes())
    with connect(served.address) as ftp:
        uploading(served, ftp)
        for command, answer in [("NOOP", "200 "), ("STAT", "211"), ("PWD", "257 ")]:
            assert reply(ftp, command).startswith(answer)
        assert told.events == []
        say(ftp, "EPSV")  # waits: it would end the transfer
        wait_until(lambda: served.parked == 2)
        assert not has_answer(ftp)
        served.proxy.heal()
        assert last_reply(ftp).startswith("226 ")
        assert last_reply(ftp).startswith("229 ")
        assert told.events == ["file_received /warm/new"]
        assert served.store.read("warm/new") == b"new"


def test_it_is_too_late_to_abort_an_upload_that_is_being_published(hanging: Callable[..., Hanging]) -> None:
    served = hanging()
    with connect(served.address) as ftp:
        uploading(served, ftp)
        say(ftp, "ABOR")
        wait_until(lambda: served.parked == 2)
        served.proxy.heal()
        assert last_reply(ftp).startswith("226 ")
        assert last_reply(ftp).startswith("225 ")
        assert served.store.read("warm/new") == b"new"


def test_quit_lets_an_upload_be_published(hanging: Callable[..., Hanging]) -> None:
    served = hanging()
    with connect(served.address) as ftp:
        uploading(served, ftp)
        assert reply(ftp, "QUIT").startswith("221 ")
        served.proxy.heal()
        assert last_reply(ftp).startswith("226 ")
        with pytest.raises(EOFError):
            ftp.getresp()
    assert served.store.read("warm/new") == b"new"


def test_an_upload_that_ended_well_is_published_also_when_the_client_leaves(hanging: Callable[..., Hanging]) -> None:
    told = Told()
    served = hanging(**told.attributes())
    ftp = connect(served.address)
    uploading(served, ftp)
    ftp.close()
    served.proxy.heal()
    wait_until(lambda: told.events)
    assert told.events == ["file_received /warm/new"]
    assert served.store.read("warm/new") == b"new"


def test_a_server_that_stops_waits_for_no_store(hanging: Callable[..., Hanging]) -> None:
    served = hanging()
    with connect(served.address) as ftp, connect(served.address) as other:
        uploading(served, ftp)
        say(other, "SIZE cold/a")
        wait_until(lambda: served.parked == 2)
        served.server.stop()
        wait_until(lambda: not served.server.ioloop.socket_map)
        assert served.parked == 0
        for session in (ftp, other):
            with pytest.raises((EOFError, ConnectionError)):
                session.getresp()


# --- commands in a row


def test_pipelined_commands_are_answered_in_their_order(hanging: Callable[..., Hanging]) -> None:
    served = hanging()
    with connect(served.address) as ftp:
        served.hang()
        say(ftp, *["SIZE warm/a", "NOOP", "SIZE cold/a", "PWD", "CWD cold", "PWD", "SIZE a", "CDUP", "PWD"] * 50)
        wait_until(lambda: served.parked == 1)
        served.proxy.heal()
        size, root, cold = f"213 {len(DATA)}", '257 "/" is the current', '257 "/cold" is the current'
        answers = [size, "200 ", size, root, "250 ", cold, size, "250 ", root]
        for expected in answers * 50:
            assert last_reply(ftp).startswith(expected)


def test_what_is_pipelined_behind_a_command_that_waits_is_bounded(hanging: Callable[..., Hanging]) -> None:
    served = hanging()
    with connect(served.address) as ftp:
        served.hang()
        commands = 50_000
        say(ftp, "SIZE cold/a")
        wait_until(lambda: served.parked == 1)
        sender = threading.Thread(target=say, args=(ftp, *["NOOP"] * commands))
        sender.start()
        session = served.session()
        wait_until(lambda: len(session.ac_in_buffer) >= session.most_pipelined)
        assert len(session.ac_in_buffer) < 3 * session.most_pipelined
        served.proxy.heal()
        assert last_reply(ftp) == f"213 {len(DATA)}"
        for _ in range(commands):
            assert last_reply(ftp).startswith("200 ")
        sender.join()


def test_replies_that_nobody_takes_are_bounded(memory_store: Store, make_vfs: Any, serve: Any) -> None:
    server = serve(make_vfs(memory_store))
    with connect(address_of(server)) as ftp:
        commands = 25_000
        (session,) = [each for each in server.ioloop.socket_map.values() if isinstance(each, VFSHandler)]
        session.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sender = threading.Thread(target=say, args=(ftp, *["FEAT"] * commands))
        sender.start()
        wait_until(lambda: len(session.ac_in_buffer) >= session.most_pipelined)
        assert sum(map(len, session.producer_fifo)) < MIB
        for _ in range(commands):
            assert last_reply(ftp).startswith("211")
        sender.join()


# --- the loop and its threads


@pytest.fixture
def loop() -> Iterator[Loop]:
    with contextlib.closing(Loop()) as made:
        yield made


def test_another_thread_wakes_the_loop(loop: Loop, local_store: Store, make_vfs: Any) -> None:
    server = VFSServer((HOST, 0), handler_class(make_vfs(local_store)), ioloop=loop)
    calls: list[int] = []
    thread = threading.Thread(target=lambda: server.serve_forever(handle_exit=False))
    thread.start()
    for number in range(1000):
        loop.call_soon_threadsafe(calls.append, number)
    wait_until(lambda: len(calls) == 1000)
    assert calls == list(range(1000))
    server.stop()
    thread.join()


def test_a_turn_that_takes_long_is_kept_with_its_stack(local_store: Store, make_vfs: Any) -> None:
    server = VFSServer((HOST, 0), handler_class(make_vfs(local_store)))
    server.ioloop.debug_slow_turn = 0.1
    is_seen = threading.Event()

    def dawdle() -> None:
        is_seen.wait(10)

    thread = threading.Thread(target=lambda: server.serve_forever(handle_exit=False))
    thread.start()
    server.ioloop.call_soon_threadsafe(dawdle)
    wait_until(lambda: server.ioloop.slow_turns)
    is_seen.set()
    server.stop()
    thread.join()
    (turn,) = server.ioloop.slow_turns
    assert "dawdle" in str(turn)


def test_a_lane_has_no_more_threads_than_it_may_and_ends_them() -> None:
    lane = Lane("test-lane", 3, Wait.STORE)
    gate, counted = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        counted.release()
        gate.wait(10)

    for _ in range(10):
        lane.submit(work)
    for _ in range(3):
        assert counted.acquire(timeout=10)
    assert lane.busy == 3
    gate.set()
    for _ in range(7):
        assert counted.acquire(timeout=10)
    wait_until(lambda: lane.busy == 0)
    lane.close()


def test_a_task_gets_what_its_call_gives_or_raises(loop: Loop) -> None:
    offload: Offload = loop.offload
    found: list[Any] = []

    def fail() -> None:
        raise FileNotFoundError("gone")

    def work() -> None:
        found.append(task.call("lane", threading.get_ident, changes=True))
        with pytest.raises(FileNotFoundError):
            task.call("lane", fail, changes=True)
        future: Future[int] = Future()
        threading.Thread(target=future.set_result, args=(5,)).start()
        task.wait(future)
        found.append(future.result())
        task.sleep(0.01)
        found.append("slept")

    task = offload.task(work)
    task.start()
    # With nothing else to serve the loop would end at once.
    with socket.create_server((HOST, 0)) as listener:
        server = VFSServer(listener, VFSHandler, ioloop=loop)
        wait_until(lambda: (loop.loop(0.05, blocking=False), task.is_over)[1])
        server.close()
    assert found[1:] == [5, "slept"]
    assert found[0] != threading.get_ident()


# --- many at once


def test_hundreds_of_sessions_leave_nothing_behind(local_store: Store, make_vfs: Any) -> None:
    before = greenlets()
    with serving(None, handler_class(make_vfs(local_store, dir_cache_time="1s"))) as server:
        server.max_cons = 0
        errors = hammer(address_of(server), sessions=300, seed=7)
        wait_until(lambda: len(server.ioloop.socket_map) == 2)
    assert errors == []
    assert greenlets() == before


def greenlets() -> int:
    """How many greenlets there are, without those that each thread begins as."""
    gc.collect()
    return sum(isinstance(each, greenlet.greenlet) and each.parent is not None for each in gc.get_objects())


# --- in their order


@pytest.mark.parametrize("command", ["DELE a", "SIZE a", "MFMT 20200102030405 a", "RNFR a"])
def test_a_command_behind_an_upload_waits_for_the_file(
    local_store: Store, make_vfs: Any, serve: Any, command: str
) -> None:
    local_store.write("a", b"old")
    with connect(address_of(serve(make_vfs(local_store)))) as ftp:
        data = open_transfer(ftp, "STOR a")
        data.sendall(b"new and longer")
        data.close()
        assert ftp.sock is not None
        ftp.sock.sendall(command.encode() + b"\r\n")
        assert last_reply(ftp).startswith("226 ")
        answer = last_reply(ftp)
    if command == "DELE a":
        assert answer.startswith("250 ")
        assert local_store.list() == set()
    elif command == "SIZE a":
        assert answer == "213 14"
    else:
        assert answer[0] in "23"
        assert local_store.read("a") == b"new and longer"


def test_a_client_that_takes_no_goodbye_is_gone_all_the_same(local_store: Store, make_vfs: Any, serve: Any) -> None:
    address = address_of(serve(make_vfs(local_store), timeout=1))
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(30)
        sock.connect(address)
        sock.sendall(b"USER anonymous\r\nPASS x\r\n" + b"HELP\r\n" * 500)
        here = sock.getsockname()[1]
        wait_until(lambda: _has_connection(address[1], here))
        wait_until(lambda: not _has_connection(address[1], here), timeout=30)


def _has_connection(port: int, client: int) -> bool:
    """Whether this process has the server's end of a connection open."""
    return any(
        each.raddr and each.laddr[1] == port and each.raddr[1] == client and each.status == "ESTABLISHED"
        for each in psutil.Process().net_connections("tcp")
        if each.fd >= 0
    )
