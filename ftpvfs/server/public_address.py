"""The address that PASV tells a client to connect to, where the server's own would be of no use to it."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from pyftpdlib.handlers import FTPHandler

from ftpvfs.clock import SYSTEM_CLOCK, Clock

logger = logging.getLogger(__name__)

# Seconds for which a name's address is taken to be the same: what DNS services for changing addresses use.
KEPT = 60.0
NAMES = "names"  # the lane in which names are looked up


class PublicHosts(Protocol):
    """What the option says."""

    def host_for(self, client: str) -> str:
        """Return the host to tell a client, "" for the address that it reached."""


def look_up(host: str) -> str:
    """Ask the system for the IPv4 address of a host. OSError where it has none."""
    found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    return str(found[0][4][0])


class Resolver:
    """Addresses of names, asked again after a while. Any thread; a name that cannot be asked for keeps its last."""

    def __init__(self, look_up: Callable[[str], str] = look_up, clock: Clock = SYSTEM_CLOCK) -> None:
        self._look_up = look_up
        self._clock = clock
        self._lock = threading.Lock()
        # host -> (address, when it was asked for). Protected by _lock.
        self._known: dict[str, tuple[str, float]] = {}

    def known(self, host: str) -> str | None:
        """Return the address where it need not be asked for."""
        if is_address(host):
            return host
        with self._lock:
            address, asked_at = self._known.get(host, (None, float("-inf")))
        return address if self._clock.monotonic() - asked_at < KEPT else None

    def address(self, host: str) -> str:
        """Return the address; waits for the system to find it out. OSError where nobody ever knew it."""
        known = self.known(host)
        if known is not None:
            return known
        try:
            address = self._look_up(host)
        except OSError as error:
            with self._lock:
                old, _ = self._known.get(host, (None, 0.0))
            if old is None:
                raise
            logger.warning("%s: %s; it was %s", host, error, old)
            address = old
        with self._lock:
            self._known[host] = (address, self._clock.monotonic())
        return address


def is_address(host: str) -> bool:
    """Tell an address from a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class PublicAddress(FTPHandler):
    """PASV with the address that the client can reach. Runs on the session's event loop."""

    public_ip: PublicHosts | None = None
    resolver = Resolver()
    masquerade_address: str | None = None

    def ftp_PASV(self, line: str) -> None:
        """Open a passive data connection (RFC 959)."""
        try:
            self.masquerade_address = self._public_address() or type(self).masquerade_address
        except OSError as error:
            self.respond_w_warning(f"425 The server's public address is not known: {error.strerror}.")
            return
        super().ftp_PASV(line)

    def _public_address(self) -> str | None:
        host = self.public_ip.host_for(self.remote_ip) if self.public_ip is not None else ""
        if host:
            return self.resolver.known(host) or self._looked_up(host)
        ends = getattr(self._plain_socket(), "ends", None)
        if ends is not None and ":" not in ends.destination[0]:  # the client reached a load balancer
            return str(ends.destination[0])
        return None

    def _plain_socket(self) -> Any:
        """The connection's own socket, below TLS."""
        return getattr(self.socket, "_socket", self.socket)

    def _looked_up(self, host: str) -> str:
        ask = partial(self.resolver.address, host)
        offload: Any = getattr(self, "offload", None)
        return str(ask() if offload is None else offload(NAMES, ask, changes=True))
