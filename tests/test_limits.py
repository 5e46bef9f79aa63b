"""Who is let in, how many at once, and for how long: over real connections to the server."""

from __future__ import annotations

import contextlib
import ftplib
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.cache.bans import Bans
from ftpvfs.config import PublicIP
from ftpvfs.config.values import parse_public_ip
from ftpvfs.coordination.sessions import SessionTable
from ftpvfs.metrics import Count
from ftpvfs.server.limits import MOST_COMMANDS, Door, LimitedServer, Limits
from ftpvfs.server.offload import MOST_STORE_THREADS, Lane
from ftpvfs.server.public_address import KEPT, Resolver
from ftpvfs.server.transfer import VFSDTPHandler
from ftpvfs.waiting import Wait
from tests.conftest import Store, connect, download, free_ports, last_reply, open_transfer, reply, upload, wait_until
from tests.downloads import Client
from tests.test_bans import MovedClock

HOST = "127.0.0.1"


@pytest.fixture
def serve(ftp_server: Any, local_store: Store) -> Callable[..., tuple[str, int]]:
    """serve(door, **attributes of the handler) -> address of a server with that door; alice's password is secret."""

    def start(door: Door, **attributes: Any) -> tuple[str, int]:
        class Server(LimitedServer):
            def __init__(self, address: Any, handler: type) -> None:
                super().__init__(address, handler, door)

        attributes = {"auth_failed_timeout": 0, **attributes}
        address: tuple[str, int] = ftp_server(
            local_store, server_class=Server, users={"alice": "secret"}, attributes=attributes
        )
        return address

    return start


def enter(address: tuple[str, int]) -> ftplib.FTP:
    return connect(address, "alice", "secret")


def refused(address: tuple[str, int]) -> str:
    """What a client is told that is not let in; the connection is closed then."""
    with socket.create_connection(address, timeout=30) as client:
        data = b""
        while piece := client.recv(1000):
            data += piece
    return data.decode()


# --- how many


def test_so_many_sessions_and_no_more_until_one_ends(serve: Any) -> None:
    door = Door(Limits(max_cons=2))
    address = serve(door)
    with contextlib.closing(enter(address)), contextlib.closing(enter(address)) as second:
        assert refused(address).startswith("421 Too many connections.")
        second.close()
        wait_until(lambda: door.table.total() == 1)
        enter(address).close()
    assert door.metrics.value(Count.REFUSED_FULL) == 1
    wait_until(lambda: door.table.total() == 0)
    assert not door.sessions


def test_so_many_sessions_of_one_address(serve: Any) -> None:
    door = Door(Limits(max_cons=10, max_cons_per_ip=1))
    address = serve(door)
    with contextlib.closing(enter(address)):
        assert refused(address).startswith("421 Too many connections from the same IP address.")
        with socket.socket() as other:  # another address of this machine's
            other.settimeout(30)
            other.bind(("127.0.0.2", 0))
            other.connect(address)
            assert other.recv(100).startswith(b"220 ")
    assert door.metrics.value(Count.REFUSED_ADDRESS) == 1


def test_transfers_do_not_count_as_sessions(serve: Any) -> None:
    address = serve(Door(Limits(max_cons=1)))
    with contextlib.closing(enter(address)) as ftp:
        upload(ftp, "a", b"x")
        assert download(ftp, "a") == b"x"


def test_those_who_leave_in_the_middle_of_anything_are_counted_out(serve: Any) -> None:
    door = Door(Limits(max_cons=100))
    address = serve(door)
    for number in range(30):
        client = socket.create_connection(address)
        if number % 3:
            client.sendall(b"USER alice\r\nPASS secret\r\n")
        if number % 2:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    wait_until(lambda: door.table.total() == 0)


# --- wrong passwords


def wrong(address: tuple[str, int]) -> None:
    with pytest.raises(ftplib.error_perm, match=r"^530"):
        connect(address, "alice", "wrong")


@pytest.fixture
def bans(tmp_path: Path) -> Iterator[Bans]:
    with contextlib.closing(Bans(tmp_path / "bans", after=3, window=600.0, time=600.0)) as made:
        yield made


def test_an_address_with_too_many_wrong_passwords_is_refused_for_a_while(serve: Any, bans: Bans) -> None:
    door = Door(bans=bans)
    address = serve(door)
    with contextlib.closing(enter(address)) as before:
        for _ in range(3):
            wrong(address)
        assert refused(address).startswith("421 Too many wrong passwords from this address.")
        assert before.voidcmd("NOOP").startswith("200")  # who is in stays
    refusals = door.metrics.value(Count.REFUSED_BANNED)
    bans.forgive(HOST)
    wait_until(lambda: is_let_in(address))  # it is asked again each second
    assert door.metrics.value(Count.BANS) == 1
    assert refusals == 1
    assert door.metrics.value(Count.LOGINS_FAILED) == 3


def is_let_in(address: tuple[str, int]) -> bool:
    try:
        enter(address).close()
    except ftplib.error_temp:
        return False
    return True


def test_a_ban_ends_what_has_not_logged_in(serve: Any, bans: Bans) -> None:
    address = serve(Door(bans=bans))
    with contextlib.closing(enter(address)) as inside, contextlib.ExitStack() as opened:
        before = [opened.enter_context(contextlib.closing(Client(timeout=30))) for _ in range(3)]
        for each in before:
            each.connect(*address)
        before[0].sendcmd("USER alice")
        guesses = b"USER alice\r\nPASS wrong\r\n" * 10
        with socket.create_connection(address, timeout=30) as guesser:
            guesser.sendall(guesses)
            said = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := guesser.recv(1000):
                    said += piece
        assert said.count(b"530 ") == 3
        assert b"530 Authentication failed. Disconnecting." in said
        for each in before:
            assert last_reply(each).startswith("421 Too many wrong passwords")
        assert inside.voidcmd("NOOP").startswith("200")
        inside.sendcmd("USER alice")
        assert reply(inside, "PASS secret").startswith("421 Too many wrong passwords")


def test_a_ban_by_another_server_holds_for_sessions_that_are_open(serve: Any) -> None:
    class Others:
        banned = False

        def is_banned(self, ip: str) -> bool:
            return self.banned

        def failed(self, ip: str) -> bool:
            return False

    others = Others()
    address = serve(Door(bans=others), max_login_attempts=10**9)
    with contextlib.closing(Client(timeout=30)) as ftp:
        ftp.connect(*address)
        others.banned = True

        def is_refused() -> bool:
            ftp.sendcmd("USER alice")
            return reply(ftp, "PASS wrong").startswith("421 Too many wrong passwords")

        wait_until(is_refused)


def test_the_ban_list_is_never_read_on_the_event_loop(serve: Any) -> None:
    threads = set()

    class Watched:
        def is_banned(self, ip: str) -> bool:
            threads.add(threading.current_thread().name)
            return False

        def failed(self, ip: str) -> bool:
            threads.add(threading.current_thread().name)
            return False

    address = serve(Door(bans=Watched()))
    enter(address).close()
    wrong(address)
    assert threads == {"ftpvfs-bans"}


def test_the_thread_of_the_ban_list_does_not_end_and_begin_again() -> None:
    """Each new one would open the database anew, whose descriptors SQLite keeps."""
    desk = Lane("ftpvfs-test", 1, Wait.STORE, idle=None)
    ended = Lane("ftpvfs-test", 1, Wait.STORE, idle=0.0)
    threads: dict[Lane, set[threading.Thread]] = {desk: set(), ended: set()}

    def work(lane: Lane) -> None:
        threads[lane].add(threading.current_thread())

    for _ in range(2):
        for lane, seen in threads.items():
            lane.submit(partial(work, lane))
            wait_until(lambda seen=seen: seen)
        wait_until(lambda: not any(thread.is_alive() for thread in threads[ended]))
    assert all(thread.is_alive() for thread in threads[desk])
    assert len(threads[desk]) == 1
    desk.retire()


def test_a_session_ends_after_so_many_wrong_passwords(serve: Any) -> None:
    address = serve(Door(), max_login_attempts=2)
    with contextlib.closing(Client(timeout=30)) as ftp:
        ftp.connect(*address)
        for answer in ("530 Authentication failed.", "530 Authentication failed. Disconnecting."):
            assert reply(ftp, "USER alice").startswith("331")
            assert reply(ftp, "PASS wrong") == answer
        with pytest.raises(EOFError):
            ftp.getresp()


def test_the_answers_to_wrong_passwords_keep_nobody_else_waiting(serve: Any) -> None:
    address = serve(Door(), auth_failed_timeout=60)
    with contextlib.ExitStack() as guessing:
        guessers = [
            guessing.enter_context(socket.create_connection(address, timeout=30)) for _ in range(2 * MOST_STORE_THREADS)
        ]
        for guesser in guessers:
            guesser.sendall(b"USER alice\r\nPASS wrong\r\nUSER alice\r\nPASS wrong again\r\nNOOP\r\n")
        for guesser in guessers:
            answers = b""
            while answers.count(b"\r\n") < 2:
                answers += guesser.recv(100)
            assert answers.splitlines()[1].startswith(b"331 ")
        with contextlib.closing(enter(address)) as ftp:
            upload(ftp, "a", b"x")
        for guesser in guessers:
            guesser.setblocking(False)
            with pytest.raises(BlockingIOError):
                guesser.recv(100)  # what stands behind the wrong password waits for its answer


def test_commands_behind_a_wrong_password_are_answered_in_their_order(serve: Any) -> None:
    address = serve(Door(), auth_failed_timeout=0.05)
    with socket.create_connection(address, timeout=30) as client:
        client.sendall(b"USER alice\r\nPASS wrong\r\nNOOP\r\nUSER alice\r\nPASS secret\r\nPWD\r\nQUIT\r\n")
        answers = b""
        while piece := client.recv(1000):
            answers += piece
    codes = [line[:3] for line in answers.decode().splitlines()]
    assert codes == ["220", "331", "530", "200", "331", "230", "257", "221"]


# --- time and commands


def test_who_does_not_log_in_is_sent_away(serve: Any) -> None:
    door = Door(Limits(login_timeout=0.2))
    address = serve(door)
    with contextlib.closing(enter(address)) as inside:
        assert refused(address).splitlines()[-1] == "421 Login timed out."
        assert inside.voidcmd("NOOP").startswith("200")
    assert door.metrics.value(Count.LOGIN_TIMEOUTS) == 1


def test_who_is_silent_is_sent_away(serve: Any) -> None:
    door = Door()
    address = serve(door, timeout=0.2)
    with contextlib.closing(enter(address)) as ftp:
        assert last_reply(ftp) == "421 Control connection timed out."
    assert door.metrics.value(Count.IDLE_TIMEOUTS) == 1


def test_a_transfer_that_stands_still_is_ended_and_one_that_moves_is_not(serve: Any) -> None:
    channel = type("Impatient", (VFSDTPHandler,), {"timeout": 0.3})
    address = serve(Door(), timeout=600, dtp_handler=channel)
    with contextlib.closing(enter(address)) as ftp:
        data = open_transfer(ftp, "STOR a")
        with data:
            assert last_reply(ftp).startswith("426 Nothing moved")
        assert ftp.voidcmd("NOOP").startswith("200")


def test_commands_without_a_login_are_bounded(serve: Any) -> None:
    address = serve(Door())
    with socket.create_connection(address, timeout=30) as client:
        client.sendall(b"NOOP\r\n" * (MOST_COMMANDS + 20))
        answers = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(10_000):
                answers += piece
    lines = answers.decode().splitlines()
    assert sum(line.startswith("200") for line in lines) == MOST_COMMANDS
    assert lines[-1] == "421 Too many commands without a login."


@pytest.mark.parametrize("logs_in", [False, True])
def test_a_line_that_does_not_end_is_not_gathered(serve: Any, logs_in: bool) -> None:
    address = serve(Door())
    with contextlib.closing(enter(address) if logs_in else Client(timeout=30)) as ftp:
        if not logs_in:
            ftp.connect(*address)
        assert ftp.sock is not None
        ftp.sock.sendall(b"USER " + b"x" * 200_000 + b"\r\n")
        assert last_reply(ftp).startswith("500 Command too long")
        assert reply(ftp, "NOOP").startswith("200")


# --- data connections


def test_passive_ports_that_are_used_up_are_answered_and_counted(serve: Any) -> None:
    [port] = free_ports(1)
    door = Door()
    address = serve(door, passive_ports=range(port, port + 1))
    with contextlib.closing(enter(address)) as first, contextlib.closing(enter(address)) as second:
        assert first.sendcmd("PASV").startswith("227")
        assert reply(second, "PASV").startswith("425 ")
        assert door.metrics.value(Count.PASSIVE_PORTS_EXHAUSTED) == 1


def test_a_port_elsewhere_is_refused(serve: Any) -> None:
    address = serve(Door())
    with contextlib.closing(enter(address)) as ftp:
        assert reply(ftp, "PORT 127,0,0,2,100,100").startswith("501 ")
        assert reply(ftp, "PORT 127,0,0,1,0,80").startswith("501 ")  # a privileged port
        assert reply(ftp, "EPRT |1|127.0.0.2|20000|").startswith("501 ")


def test_a_data_connection_from_elsewhere_is_refused_and_the_clients_own_still_comes(serve: Any) -> None:
    door = Door()
    address = serve(door)
    with contextlib.closing(enter(address)) as ftp:
        upload(ftp, "a", b"content")
        host, port = ftp.makepasv()
        with socket.socket() as thief:
            thief.settimeout(30)
            thief.bind(("127.0.0.2", 0))
            thief.connect((host, port))
            assert thief.recv(100) == b""
        with socket.create_connection((host, port), timeout=30) as mine:
            assert reply(ftp, "RETR a").startswith(("125", "150"))
            assert mine.recv(100) == b"content"
        assert last_reply(ftp).startswith("226")
    assert door.metrics.value(Count.FOREIGN_DATA_CONNECTIONS) == 1


# --- the address that PASV tells


def told(address: tuple[str, int]) -> str:
    with contextlib.closing(enter(address)) as ftp:
        return ".".join(ftp.sendcmd("PASV").split("(")[1].split(",")[:4])


@pytest.mark.parametrize(
    ("public_ip", "expected"),
    [
        ("", HOST),
        ("203.0.113.7", "203.0.113.7"),
        ("203.0.113.7,10.0.0.0/8=10.0.0.5", "203.0.113.7"),
        ("203.0.113.7,127.0.0.0/8=10.0.0.5", "10.0.0.5"),
        ("203.0.113.7,127.0.0.0/8=", HOST),
    ],
)
def test_pasv_tells_each_network_its_address(serve: Any, public_ip: str, expected: str) -> None:
    assert told(serve(Door(), public_ip=parse_public_ip(public_ip))) == expected


def test_pasv_looks_a_name_up_off_the_loop_and_again_after_a_while(serve: Any) -> None:
    clock = MovedClock()
    clock.monotonic = lambda: clock.now  # type: ignore[method-assign]
    asked: list[str] = []
    addresses = ["192.0.2.1", "192.0.2.2"]

    def look_up(host: str) -> str:
        asked.append(threading.current_thread().name)
        if not addresses:
            raise OSError(-3, "Temporary failure in name resolution")
        return addresses.pop(0)

    address = serve(Door(), public_ip=PublicIP("ftp.example.com"), resolver=Resolver(look_up, clock))
    assert [told(address), told(address)] == ["192.0.2.1", "192.0.2.1"]
    assert asked == ["ftpvfs-names"]
    clock.now += KEPT
    assert told(address) == "192.0.2.2"
    clock.now += KEPT
    assert told(address) == "192.0.2.2"  # nobody knows better


def test_pasv_is_refused_while_nobody_knows_the_address(serve: Any) -> None:
    def look_up(host: str) -> str:
        raise OSError(-2, "Name or service not known")

    address = serve(Door(), public_ip=PublicIP("nowhere.invalid"), resolver=Resolver(look_up))
    with contextlib.closing(enter(address)) as ftp:
        assert reply(ftp, "PASV") == "425 The server's public address is not known: Name or service not known."
        assert reply(ftp, "EPSV").startswith("229 ")


def test_a_name_of_this_machine_is_found() -> None:
    assert Resolver().address("localhost") == HOST


# --- behind a load balancer

BEHIND = Limits(proxies=(ipaddress.ip_network("127.0.0.1/32"),), max_cons_per_ip=1)
V1 = "PROXY TCP4 {} 192.0.2.1 56324 21\r\n"


def through(address: tuple[str, int], client: str) -> ftplib.FTP:
    """A session of a client behind the balancer, which speaks the PROXY protocol."""
    ftp = Client(timeout=30)
    ftp.sock = socket.create_connection(address, timeout=30)
    ftp.sock.sendall(V1.format(client).encode())
    ftp.af = ftp.sock.family
    ftp.file = ftp.sock.makefile("r", encoding=ftp.encoding)
    try:
        ftp.welcome = ftp.getresp()
    except ftplib.Error:
        ftp.close()
        raise
    return ftp


def test_limits_see_the_client_behind_a_balancer(serve: Any) -> None:
    door = Door(BEHIND)
    address = serve(door)
    with contextlib.closing(through(address, "203.0.113.9")), contextlib.closing(through(address, "203.0.113.10")):
        assert (door.table.connected("203.0.113.9"), door.table.connected(HOST)) == (1, 0)
        with pytest.raises(ftplib.error_temp, match="421 Too many connections from the same IP"):
            through(address, "203.0.113.9")
    wait_until(lambda: door.table.total() == 0)


def test_wrong_passwords_are_the_clients_and_not_the_balancers(serve: Any, bans: Bans) -> None:
    address = serve(Door(BEHIND, bans=bans))
    for _ in range(3):
        with contextlib.closing(through(address, "203.0.113.9")) as ftp, pytest.raises(ftplib.error_perm):
            ftp.login("alice", "wrong")
    with pytest.raises(ftplib.error_temp, match="421 Too many wrong passwords"):
        through(address, "203.0.113.9")
    through(address, "203.0.113.10").close()


def test_pasv_tells_the_address_at_which_the_balancer_was_reached(serve: Any) -> None:
    address = serve(Door(BEHIND))
    with contextlib.closing(through(address, "203.0.113.9")) as ftp:
        ftp.login("alice", "secret")
        assert "(192,0,2,1," in ftp.sendcmd("PASV")


def test_data_connections_by_the_balancer_are_the_clients(serve: Any) -> None:
    door = Door(BEHIND)
    address = serve(door)
    with contextlib.closing(through(address, "203.0.113.9")) as ftp:
        ftp.login("alice", "secret")
        ftp.voidcmd("TYPE I")
        for client, comes in (("203.0.113.66", False), ("203.0.113.9", True)):
            port = ftplib.parse229(ftp.sendcmd("EPSV"), (HOST, 1))[1]
            with socket.create_connection((HOST, port), timeout=30) as data:
                data.sendall(V1.format(client).encode())
                if not comes:
                    assert data.recv(100) == b""  # another client's, behind the same balancer
                    continue
                assert reply(ftp, "STOR a").startswith(("125", "150"))
                data.sendall(b"content")
            assert last_reply(ftp).startswith("226")
    assert door.metrics.value(Count.FOREIGN_DATA_CONNECTIONS) == 1


def test_others_than_the_balancer_cannot_say_who_they_are(serve: Any) -> None:
    door = Door(BEHIND)
    address = serve(door)
    with socket.socket() as client:
        client.settimeout(30)
        client.bind(("127.0.0.2", 0))
        client.connect(address)
        assert client.recv(100).startswith(b"220 ")
        client.sendall(V1.format("203.0.113.9").encode())
        assert client.recv(100).startswith(b"500 ")
        assert door.table.connected("127.0.0.2") == 1


def test_a_balancer_that_says_nothing_right_is_not_served(serve: Any) -> None:
    door = Door(BEHIND)
    address = serve(door)
    with socket.create_connection(address, timeout=30) as client:
        client.sendall(b"USER alice\r\nPASS secret\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(100) == b""
    wait_until(lambda: door.metrics.value(Count.BAD_PROXY_HEADERS) == 1)
    assert door.table.total() == 0


# --- several workers


def test_a_worker_that_is_ahead_leaves_connections_to_others_for_a_moment_only(serve: Any) -> None:
    """The others accept, says the table, but do not come: then it takes them all the same."""
    table = SessionTable(2)
    table.work_as(1)
    table.set_accepting(True)
    table.work_as(0)
    address = serve(Door(table=table))
    table.set_accepting(True)
    with contextlib.ExitStack() as inside:
        for _ in range(10):
            inside.enter_context(contextlib.closing(enter(address)))
        assert table.lead() == 10
    wait_until(lambda: table.total() == 0)
    table.close()
