"""PROXY headers: all that the specification allows, and nothing else."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyftpdlib.ioloop import IOLoop

from ftpvfs.server.proxy_protocol import SIGNATURE, BadHeader, Ends, Header, ProxyHeader, is_within

V1 = b"PROXY TCP4 203.0.113.9 192.0.2.1 56324 21\r\n"
ENDS = Ends(("203.0.113.9", 56324), ("192.0.2.1", 21))


def v2(command: int = 0x21, family: int = 0x11, body: bytes | None = None, length: int | None = None) -> bytes:
    if body is None:
        body = socket.inet_aton("203.0.113.9") + socket.inet_aton("192.0.2.1") + struct.pack("!HH", 56324, 21)
    return SIGNATURE + struct.pack("!BBH", command, family, len(body) if length is None else length) + body


IPV6 = b"".join(ipaddress.ip_address(ip).packed for ip in ("2001:db8::9", "2001:db8::1")) + struct.pack("!HH", 5, 21)


def read(data: bytes, step: int = 1000) -> tuple[Ends | None, bytes]:
    """What the header says, and what stands behind it."""
    header = Header()
    while header.wants:
        piece, data = data[: min(step, header.wants)], data[min(step, header.wants) :]
        assert piece, "it wants more than there is"
        header.feed(piece)
    return header.ends, data


@pytest.mark.parametrize(
    ("data", "ends"),
    [
        (V1, ENDS),
        (b"PROXY TCP6 2001:db8::9 2001:db8::1 5 21\r\n", Ends(("2001:db8::9", 5), ("2001:db8::1", 21))),
        (b"PROXY UNKNOWN\r\n", None),
        (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", None),
        (v2(), ENDS),
        (v2(family=0x21, body=IPV6), Ends(("2001:db8::9", 5), ("2001:db8::1", 21))),
        (v2(body=v2()[16:] + b"\x04\x00\x03abc"), ENDS),  # with a TLV
        (v2(command=0x20), None),  # LOCAL
        (v2(command=0x20, family=0, body=b""), None),
        (v2(family=0x31, body=bytes(216)), None),  # a UNIX socket
        (v2(family=0x00, body=b""), None),
    ],
)
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_header_is_read_to_its_last_byte_and_not_beyond(data: bytes, ends: Ends | None, step: int) -> None:
    assert read(data + b"USER me\r\n", step) == (ends, b"USER me\r\n")


@pytest.mark.parametrize(
    "data",
    [
        b"USER anonymous\r\nPASS x\r\n",
        b"PROXY TCP4 203.0.113.9 192.0.2.1 56324\r\n",
        b"PROXY TCP4 203.0.113.9 192.0.2.1 56324 21 more\r\n",
        b"PROXY TCP4 203.0.113.999 192.0.2.1 56324 21\r\n",
        b"PROXY TCP4 2001:db8::9 192.0.2.1 56324 21\r\n",
        b"PROXY TCP4 203.0.113.9 192.0.2.1 -1 21\r\n",
        b"PROXY TCP4 203.0.113.9 192.0.2.1 65536 21\r\n",
        "PROXY TCP4 203.0.113.9 192.0.2.1 ٣ 21\r\n".encode(),
        b"PROXY UDP4 203.0.113.9 192.0.2.1 56324 21\r\n",
        b"PROXY TCP4 " + b"1" * 200 + b"\r\n",
        b"PROXY  TCP4\r\n",
        v2(command=0x11),
        v2(command=0x22),
        v2(body=b"short"),
        v2(length=60_000),
        SIGNATURE[:-1] + b"x" * 10,
        bytes(100),
    ],
)
def test_what_is_no_header_is_refused(data: bytes) -> None:
    with pytest.raises(BadHeader):
        read(data + bytes(70_000))


@given(st.binary(min_size=12, max_size=60), st.booleans())
def test_no_bytes_do_anything_else_than_be_refused(data: bytes, is_v2: bool) -> None:
    header = Header()
    data = (SIGNATURE if is_v2 else b"PROXY ") + data + bytes(200)
    with contextlib.suppress(BadHeader):
        while header.wants and data:
            piece, data = data[: header.wants], data[header.wants :]
            header.feed(piece)


@pytest.mark.parametrize(
    ("ip", "expected"),
    [("10.1.2.3", True), ("::ffff:10.1.2.3", True), ("11.0.0.1", False), ("fd00::1%eth0", True), ("fe80::1", False)],
)
def test_an_address_is_within_a_network(ip: str, expected: bool) -> None:
    networks = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))
    assert is_within(ip, networks) is expected


# --- on an event loop


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, list[Any], IOLoop, list[str]]]:
    """The balancer's end, what is handed over, the loop, and refusals."""
    with IOLoop() as loop, socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, address = listener.accept()
        ours.setblocking(False)
        handed: list[Any] = []
        refusals: list[str] = []
        ProxyHeader(
            ours,
            address,
            loop,
            done=lambda sock, source: handed.append((sock, source)),
            refused=lambda: refusals.append("refused"),
        )
        with theirs:
            yield theirs, handed, loop, refusals
        for sock, _ in handed:
            sock.close()


def turn(loop: IOLoop) -> None:
    for _ in range(3):
        loop.loop(timeout=0.05, blocking=False)


def test_the_socket_is_handed_over_with_the_clients_address(connection: Any) -> None:
    theirs, handed, loop, _ = connection
    theirs.sendall(V1[:10])
    turn(loop)
    assert handed == []
    theirs.sendall(V1[10:] + b"USER me\r\n")
    turn(loop)
    [(sock, source)] = handed
    assert source == sock.getpeername() == ("203.0.113.9", 56324)
    assert sock.recv(100) == b"USER me\r\n"
    assert loop.socket_map == {}
    theirs.sendall(b"more")
    turn(loop)
    assert sock.recv(100) == b"more"


def test_a_balancer_that_speaks_for_itself_is_who_it_is(connection: Any) -> None:
    theirs, handed, loop, _ = connection
    theirs.sendall(v2(command=0x20))
    turn(loop)
    [(sock, source)] = handed
    assert source[:2] == sock.getpeername() == theirs.getsockname()


@pytest.mark.parametrize("data", [b"USER anonymous\r\n", b"PROXY TCP4 x\r\n", b""])
def test_without_a_header_the_connection_is_closed(connection: Any, data: bytes) -> None:
    theirs, handed, loop, refusals = connection
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    turn(loop)
    assert handed == []
    assert refusals == ["refused"]
    theirs.settimeout(10)
    with contextlib.suppress(ConnectionResetError):
        assert theirs.recv(1) == b""


def test_a_header_that_does_not_come_is_not_waited_for(connection: Any) -> None:
    _, handed, loop, refusals = connection
    [task] = loop.sched._tasks  # noqa: SLF001 - time is not to be waited for
    task.timeout = 0
    turn(loop)
    turn(loop)
    assert (handed, refusals) == ([], ["refused"])
