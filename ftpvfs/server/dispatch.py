"""Data connections that are still to come: a port to listen on (PASV), or a client to connect to (PORT).

pyftpdlib's own leave a transfer that waits for its connection without an answer when none comes, speak up with a
time-out that nobody asked about, and open any port at all when the configured ones are used up, which a firewall then
blocks.
"""

from __future__ import annotations

import errno
import ipaddress
import random
import socket
from concurrent.futures import Future
from functools import lru_cache, partial
from typing import Any

from pyftpdlib.handlers.ftp.dispatchers import ActiveDTP, PassiveDTP
from pyftpdlib.ioloop import Acceptor
from pyftpdlib.log import logger as session_logger

from ftpvfs.metrics import Count
from ftpvfs.server.loop import is_watched, leave_loop
from ftpvfs.server.proxy_protocol import ProxyHeader


class VFSPassiveDTP(PassiveDTP):
    """Listens for one data connection of a `VFSHandler`'s. Runs on the session's event loop."""

    def __init__(self, cmd_channel: Any, extmode: bool = False) -> None:
        """Listen and tell the client where. EADDRNOTAVAIL where no port of the range is free.

        EADDRINUSE means that another session has just begun to listen there: two may bind one port, one may listen.
        pyftpdlib's own does the same with twice the system calls.
        """
        self.cmd_channel = cmd_channel
        self.log = cmd_channel.log
        self.log_exception = cmd_channel.log_exception
        Acceptor.__init__(self, ioloop=cmd_channel.ioloop)
        host, _, *rest = cmd_channel.local_address
        told = None if extmode else self._told(host)
        self.set_socket(_new_socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
        try:
            port = self._bind(host, *rest)
            self.listen(self.backlog or cmd_channel.server.backlog)
        except OSError:
            self.close()
            raise
        self._announce(told, port)
        if self.timeout:
            self.call_later(self.timeout, self.handle_timeout)

    def _bind(self, host: str, *rest: int) -> int:
        """Bind a port of the configured range, or any; return it."""
        ports = self.cmd_channel.passive_ports
        if ports is None:
            self.socket.bind((host, 0, *rest))
            return int(self.socket.getsockname()[1])
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first = random.randrange(len(ports))
        for number in range(len(ports)):
            port: int = ports[(first + number) % len(ports)]
            try:
                self.socket.bind((host, port, *rest))
            except OSError as error:
                if error.errno not in {errno.EADDRINUSE, errno.EACCES, errno.EPERM}:
                    raise
            else:
                return port
        self.cmd_channel.count(Count.PASSIVE_PORTS_EXHAUSTED)
        raise OSError(errno.EADDRNOTAVAIL, "No passive port is free")

    def _told(self, host: str) -> str:
        """Return the address that PASV tells; EAFNOSUPPORT for one of IPv6, for which its reply has no room."""
        session = self.cmd_channel
        told = plain_address(session.masquerade_address_map.get(host) or session.masquerade_address or host)
        if ":" in told:
            raise OSError(errno.EAFNOSUPPORT, "PASV knows IPv4 alone, use EPSV")
        return told

    def _announce(self, told: str | None, port: int) -> None:
        if told is None:
            self.cmd_channel.respond(f"229 Entering extended passive mode (|||{port}|).")
            return
        numbers = told.replace(".", ",")
        self.cmd_channel.respond(f"227 Entering passive mode ({numbers},{port // 256},{port % 256}).")

    def close(self) -> None:
        """Listen no more."""
        if not self._closed:
            leave_loop(self)
            Acceptor.close(self)

    def del_channel(self, map: Any = None) -> None:  # noqa: A002 - asyncore's name
        if is_watched(self):
            super().del_channel(map)

    def take_waiting(self) -> None:
        """Take the connection where it has come already, before the loop tells of it."""
        try:
            sock, address = self.socket.accept()
        except OSError:  # none has, or the loop will find the same
            return
        try:
            self.handle_accepted(sock, address)
        except Exception:  # noqa: BLE001 - logged and answered, as the loop does
            self.handle_error()

    def handle_accepted(self, sock: socket.socket, addr: tuple[Any, ...]) -> None:
        """Take the connection. One from a load balancer says first who the client is."""
        session = self.cmd_channel
        if session.comes_from_proxy(addr[0]):
            refused = partial(session.count, Count.BAD_PROXY_HEADERS)
            ProxyHeader(sock, addr, self.ioloop, done=self._take, refused=refused)
        else:
            self._take(sock, addr)

    def _take(self, sock: socket.socket, addr: tuple[Any, ...]) -> None:
        """Take the connection. One from elsewhere gets no word on the client's own control connection."""
        session = self.cmd_channel
        if self._closed:  # there is another one by now
            sock.close()
            return
        is_foreign = plain_address(addr[0]) != plain_address(session.remote_ip)
        if is_foreign and not session.permit_foreign_addresses:
            sock.close()
            session.count(Count.FOREIGN_DATA_CONNECTIONS)
            session.log(f"Rejected data connection from {addr[0]}:{addr[1]}.", logfun=session_logger.warning)
            return
        # pyftpdlib compares once more, as text.
        super().handle_accepted(sock, addr if is_foreign else (session.remote_ip, *addr[1:]))
        if session.connected and session.data_channel is None:
            session.no_data_connection("The data connection was closed at once")

    def handle_timeout(self) -> None:
        self.close()
        if self.cmd_channel.connected:
            self.cmd_channel.no_data_connection(f"No data connection came within {self.timeout} seconds")

    def handle_error(self) -> None:
        super().handle_error()
        if self.cmd_channel.connected:
            self.cmd_channel.no_data_connection("The data connection could not be accepted")


class VFSActiveDTP(ActiveDTP):
    """Connects to a client of a `VFSHandler`. Runs on the session's event loop."""

    def __init__(self, ip: str, port: int, cmd_channel: Any) -> None:
        # Done when PORT has its reply.
        self.answered: Future[None] = Future()
        super().__init__(ip, port, cmd_channel)

    def initiate_send(self) -> None:
        """Send nothing; asyncore asks, once the connection stands, for what is no longer this object's."""

    def handle_connect(self) -> None:
        """Answer PORT and hand the connection over, so that what becomes of it is no matter of this object's."""
        self.del_channel()
        self._stop_waiting()
        session = self.cmd_channel
        number = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, "connecting failed")
        if not session.connected:
            self.close()
            return
        self._answer(200, "Active data connection established.")
        session._dtp_connector = None
        handler = session.dtp_handler(self.socket, session)
        if handler.connected:
            session.data_channel = handler
            session._on_dtp_connection()
        else:
            session.no_data_connection("The data connection was closed at once")

    def handle_timeout(self) -> None:
        self.handle_close()

    def handle_close(self) -> None:
        """Answer PORT, and the transfer that waits behind it, that there is no connection."""
        if self._closed:
            return
        if self.cmd_channel.connected:
            self._answer(425, "Can't connect to specified address.")
        self.close()
        if self.cmd_channel.connected:
            self.cmd_channel.no_data_connection("There is no data connection")

    def close(self) -> None:
        """Connect no more; PORT is owed a reply, also where another PORT or PASV is the reason."""
        if self._closed:
            return
        super().close()
        if not self.answered.done() and self.cmd_channel.connected:
            self._answer(425, "The data connection was given up.")

    def _stop_waiting(self) -> None:
        if self._idler is not None and not self._idler.cancelled:
            self._idler.cancel()

    def _answer(self, code: int, text: str) -> None:
        self.cmd_channel.respond(f"{code} {text}")
        self.cmd_channel.log_cmd(self._cmd, self._normalized_addr, code, text)
        self.answered.set_result(None)


@lru_cache(maxsize=4096)
def plain_address(address: str) -> str:
    """Return an address in the one form in which it can be compared; what is none comes back as it is.

    >>> plain_address("::ffff:192.0.2.1"), plain_address("0:0:0:0:0:0:0:1")
    ('192.0.2.1', '::1')
    """
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(getattr(known, "ipv4_mapped", None) or known)


def _new_socket(family: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0))
    if made.gettimeout() != 0:
        made.setblocking(False)
    return made
