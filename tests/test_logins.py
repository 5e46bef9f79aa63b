"""Many logins at once: nobody's password waits for those of others, and no guess goes uncounted."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import argon2
import pytest

from ftpvfs import VFSAuthorizer
from ftpvfs.server.limits import Door, LimitedServer
from ftpvfs.server.offload import MOST_IN_TURN
from tests.conftest import Store, connect, wait_until

CHEAP = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
SOMEBODY_ELSE = "127.0.0.2"


class Tally:
    """A ban list that bans nobody."""

    def __init__(self) -> None:
        self.failures = 0

    def is_banned(self, ip: str) -> bool:
        return False

    def failed(self, ip: str) -> bool:
        self.failures += 1
        return False


class Gate:
    """Where hashes of wrong passwords wait until they may be made."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.made: list[str] = []


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    verify = argon2.PasswordHasher.verify

    def slowly(self: Any, known: Any, secret: Any) -> bool:
        gate.made.append(secret.decode())
        if secret != b"right":
            assert gate.may_go_on.wait(60)
        return verify(self, known, secret)

    monkeypatch.setattr(argon2.PasswordHasher, "verify", slowly)
    yield gate
    gate.may_go_on.set()


@pytest.fixture
def serve(ftp_server: Any, memory_store: Store) -> Callable[[Door], tuple[str, int]]:
    """serve(door) -> address of a server with that door, where alice's password is `right`, as a hash."""

    def start(door: Door) -> tuple[str, int]:
        class Server(LimitedServer):
            def __init__(self, address: Any, handler: type) -> None:
                super().__init__(address, handler, door)

        authorizer = VFSAuthorizer()
        authorizer.add_user("alice", None, password_hash=CHEAP.hash("right"))
        address: tuple[str, int] = ftp_server(
            memory_store, server_class=Server, authorizer=authorizer, attributes={"auth_failed_timeout": 0}
        )
        return address

    return start


def guess(address: tuple[str, int], password: str, ip: str = "127.0.0.1") -> socket.socket:
    """A connection on which a password has been sent."""
    client = socket.create_connection(address, timeout=60, source_address=(ip, 0))
    client.sendall(b"USER alice\r\n")
    wait_for(client, b"331 ")
    client.sendall(f"PASS {password}\r\n".encode())
    return client


def wait_for(client: socket.socket, code: bytes) -> None:
    said = b""
    while code not in said:
        piece = client.recv(1000)
        assert piece, said
        said += piece


def test_passwords_of_those_who_have_left_are_not_looked_at_and_no_guess_goes_uncounted(
    serve: Any, gate: Gate
) -> None:
    tally = Tally()
    door = Door(bans=tally)
    address = serve(door)
    guessers = [guess(address, f"wrong-{number}") for number in range(10)]
    wait_until(lambda: gate.made == ["wrong-0"])
    for each in guessers:
        each.close()
    wait_until(lambda: door.table.total() == 0)
    gate.may_go_on.set()
    connect(address, "alice", "right").close()
    assert gate.made == ["wrong-0", "right"]
    wait_until(lambda: tally.failures == 1)


def test_a_password_that_was_right_lately_waits_for_no_other(serve: Any, gate: Gate) -> None:
    address = serve(Door())
    connect(address, "alice", "right").close()
    with contextlib.ExitStack() as guessing:
        for ip in ("127.0.0.1", SOMEBODY_ELSE, "127.0.0.3"):
            for number in range(3):
                guessing.enter_context(guess(address, f"wrong-{number}", ip))
        wait_until(lambda: len(gate.made) == 3)
        connect(address, "alice", "right").close()


def test_one_address_has_one_password_looked_at_at_once_and_not_too_many_waiting(serve: Any, gate: Gate) -> None:
    address = serve(Door())
    with contextlib.ExitStack() as guessing:
        for number in range(MOST_IN_TURN + 1):
            guessing.enter_context(guess(address, f"wrong-{number}"))
        with guess(address, "one too many") as refused:
            wait_for(refused, b"421 Too many logins at once.")
        with guess(address, "right", SOMEBODY_ELSE) as other:
            wait_for(other, b"230 ")
        assert gate.made == ["wrong-0", "right"]
