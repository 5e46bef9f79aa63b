"""The PROXY protocol, versions 1 and 2: what a load balancer says of the client before the client's first byte.

https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt. Only from addresses that were named is it read, and from
those it is expected: anybody else could claim to be anybody.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pyftpdlib.ioloop import AsyncChat

logger = logging.getLogger(__name__)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # of version 2, 12 bytes; a header of version 1 has 15 at the least
LONGEST_V1 = 107
# Bytes of addresses and more that version 2 may carry; TLVs with certificates in them are about as long.
LONGEST_V2 = 4096
# Seconds in which the header has to come; it is what the balancer sends first.
TIMEOUT = 5.0


class BadHeader(ValueError):
    """What came was no PROXY header, in one line."""


class Ends(NamedTuple):
    """Both ends of the client's connection to the balancer: (address, port) of each."""

    source: tuple[str, int]
    destination: tuple[str, int]


class Header:
    """A header as it comes, piece by piece. Pure.

    Feed it as many bytes as it `wants`, until that is 0; no byte that follows the header may be taken. `ends` is None
    where the balancer speaks for itself (LOCAL, UNKNOWN), to see whether anybody is here.
    """

    def __init__(self) -> None:
        self.wants = len(SIGNATURE)
        self.ends: Ends | None = None
        self._data = b""

    def feed(self, data: bytes) -> None:
        """Take bytes. BadHeader where they are none of a header."""
        self._data += data
        self.wants -= len(data)
        if self.wants:
            return
        if self._data.startswith(SIGNATURE):
            self._read_v2()
        elif self._data.startswith(b"PROXY "):
            self._read_v1()
        else:
            raise BadHeader("no PROXY header")

    def _read_v1(self) -> None:
        if len(self._data) > LONGEST_V1:
            raise BadHeader("a header that does not end")
        if not self._data.endswith(b"\r\n"):
            self.wants = 1
            return
        words = self._data[:-2].decode("ascii", "replace").split(" ")
        if words[1] == "UNKNOWN":
            return
        if words[1] not in {"TCP4", "TCP6"} or len(words) != 6:
            raise BadHeader("a header of another form")
        kind = ipaddress.IPv4Address if words[1] == "TCP4" else ipaddress.IPv6Address
        source, destination = (str(_address(word, kind)) for word in words[2:4])
        self.ends = Ends((source, _port(words[4])), (destination, _port(words[5])))

    def _read_v2(self) -> None:
        if len(self._data) == len(SIGNATURE):
            self.wants = 4
            return
        version, family, length = struct.unpack_from("!BBH", self._data, len(SIGNATURE))
        if version >> 4 != 2 or version & 15 > 1 or length > LONGEST_V2:
            raise BadHeader("a header of another version")
        body = self._data[len(SIGNATURE) + 4 :]
        if len(body) < length:
            self.wants = length - len(body)
            return
        if version & 15 == 1 and family in FORMS:  # else LOCAL, or a family that says nothing to us
            self._read_addresses(body, FORMS[family])

    def _read_addresses(self, body: bytes, form: struct.Struct) -> None:
        if len(body) < form.size:
            raise BadHeader("a header that is too short")
        source, destination, from_port, to_port = form.unpack_from(body)
        self.ends = Ends(
            (str(ipaddress.ip_address(source)), from_port), (str(ipaddress.ip_address(destination)), to_port)
        )


# TCP over IPv4 and over IPv6.
FORMS = {0x11: struct.Struct("!4s4sHH"), 0x21: struct.Struct("!16s16sHH")}


def _address(text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise BadHeader("a header with an address that is none") from None


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise BadHeader("a header with a port that is none")
    return int(text)


def is_within(ip: str, networks: Sequence[Network]) -> bool:
    """Tell whether the address is in one of the networks; an IPv4 address as IPv6 shows it is an IPv4 address."""
    if not networks:
        return False
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return any(address in network for network in networks)


class ProxiedSocket(socket.socket):
    """The connection of a balancer, which says that its peer is the client behind that."""

    ends: Ends

    def getpeername(self) -> Any:
        """Return the client's address."""
        return self.ends.source


class ProxyHeader(AsyncChat):
    """Reads the header of a connection, then hands over the socket and the client's address. Event loop only.

    `refused` is called where no header comes; the connection is closed then.
    """

    socket: Any

    def __init__(
        self,
        sock: socket.socket,
        address: tuple[Any, ...],
        ioloop: Any,
        *,
        done: Callable[[socket.socket, tuple[Any, ...]], None],
        refused: Callable[[], None],
    ) -> None:
        super().__init__(sock, ioloop=ioloop)
        self._header = Header()
        self._address = address
        self._done = done
        self._refused = refused
        self.call_later(TIMEOUT, self._give_up, "it did not come in time")

    def readable(self) -> bool:
        """Tell the loop to read."""
        return True

    def writable(self) -> bool:
        """Tell the loop not to write."""
        return False

    def handle_read_event(self) -> None:
        """Read what is there of the header, and not a byte more."""
        try:
            while self._header.wants:
                data: bytes = self.socket.recv(self._header.wants)
                if not data:
                    raise BadHeader("it ended")
                self._header.feed(data)
        except BlockingIOError:
            return
        except (OSError, BadHeader) as error:
            self._give_up(str(error))
            return
        self._hand_over()

    def _hand_over(self) -> None:
        ends = self._header.ends
        self.del_channel()
        for task in self._tasks:
            task.cancel()
        self._closed = True  # and the socket lives on
        sock: socket.socket = self.socket
        if ends is not None:
            proxied = ProxiedSocket(fileno=sock.detach())
            proxied.setblocking(False)
            proxied.ends = ends
            self._done(proxied, ends.source)
        else:
            self._done(sock, self._address)

    def _give_up(self, reason: str) -> None:
        if self._closed:
            return
        logger.warning("%s: no PROXY header: %s", self._address[0], reason)
        self.close()
        self._refused()

    def handle_close(self) -> None:
        """Called when the connection broke."""
        self._give_up(f"[Errno {errno.ECONNRESET}] the connection broke")

    def handle_error(self) -> None:
        """Called for an exception of ours; the server goes on."""
        logger.exception("unhandled exception while a PROXY header was read")  # noqa: LOG004 - asyncore calls it in one
        self.close()
        self._refused()
