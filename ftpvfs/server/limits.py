"""Who is let in, how many at once, and for how long without saying or doing anything.

A `Door` is one process's: it counts in a table that all workers share and asks a ban list that all servers share.
"""

from __future__ import annotations

import enum
import ipaddress
import logging
import socket
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyftpdlib.handlers import FTPHandler
from pyftpdlib.log import logger as session_logger

from ftpvfs.coordination.sessions import Admission, SessionTable, network_of
from ftpvfs.metrics import Count, Metrics
from ftpvfs.server.banned import BanList, Banned
from ftpvfs.server.offload import current_task
from ftpvfs.server.proxy_protocol import ProxyHeader, is_within
from ftpvfs.server.server import VFSServer

logger = logging.getLogger(__name__)

# A worker that has so many connections more than another one lets that take the next, for a moment: milliseconds for
# each of them, so that many who come at once are not kept waiting by one who is slow.
LEAD = 2
MOMENT = 0.001
LONGEST_MOMENT = 0.01
BACKLOG = 1024  # connections that wait to be accepted; the system has a limit of its own
# Bytes of commands that may wait before a client has logged in; more than one command's, or it could never end.
MOST_PIPELINED = 5120
# Commands that a client may send before it has logged in: FEAT, AUTH, and some tries.
MOST_COMMANDS = 100


class Refusal(enum.Enum):
    """Why a client is not let in, as it is told."""

    FULL = "421 Too many connections. Service temporarily unavailable."
    ADDRESS = "421 Too many connections from the same IP address."
    BANNED = "421 Too many wrong passwords from this address. Try again later."
    CLOSING = "421 The server is shutting down."


COUNTS = {
    Refusal.FULL: Count.REFUSED_FULL,
    Refusal.ADDRESS: Count.REFUSED_ADDRESS,
    Refusal.BANNED: Count.REFUSED_BANNED,
}
ADMISSIONS = {Admission.FULL: Refusal.FULL, Admission.TOO_MANY_FROM_ADDRESS: Refusal.ADDRESS}


@dataclass(frozen=True)
class Limits:
    """Numbers: 0 is no limit. Seconds: None is no limit."""

    max_cons: int = 0
    max_cons_per_ip: int = 0
    login_timeout: float | None = None
    # Who speaks the PROXY protocol.
    proxies: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()


class Door:
    """Lets clients in. One process's; its event loop."""

    def __init__(
        self,
        limits: Limits | None = None,
        table: SessionTable | None = None,
        metrics: Metrics | None = None,
        bans: BanList | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.table = table or SessionTable()
        self.metrics = metrics or Metrics()
        # Nobody is let in any more.
        self.is_closing = False
        self.sessions: set[Limited] = set()
        self.banned = Banned(bans, self.metrics)

    def admit(self, session: Limited) -> Refusal | None:
        """Count a session in; return why not where it is not let in."""
        refusal = self._refusal(session.remote_ip)
        if refusal is None:
            self.sessions.add(session)
            self.metrics.add(Count.SESSIONS)
        elif refusal in COUNTS:
            self.metrics.add(COUNTS[refusal])
        return refusal

    def _refusal(self, ip: str) -> Refusal | None:
        if self.is_closing:
            return Refusal.CLOSING
        if self.banned.answer(ip):
            return Refusal.BANNED
        return ADMISSIONS.get(self.table.admit(ip, self.limits.max_cons, self.limits.max_cons_per_ip))

    def leave(self, session: Limited) -> None:
        """Count a session out that was let in."""
        self.sessions.discard(session)
        self.table.leave(session.remote_ip)

    def expel(self, ip: str) -> None:
        """Send away who has come from an address that is banned now, but for those who have logged in."""
        network = network_of(ip)
        for session in list(self.sessions):
            if not session.authenticated and network_of(session.remote_ip) == network:
                session.expel()


class LimitedServer(VFSServer):
    """A `VFSServer` with a door, whose connections are spread over all workers that wait on the same socket."""

    # pyftpdlib's own limits, which count one process's connections.
    max_cons = 0
    max_cons_per_ip = 0

    def __init__(self, address_or_socket: Any, handler: type, door: Door, ioloop: Any = None) -> None:
        self.door = door
        self._was_left = False
        # Connections of which it is being asked whether their address is banned.
        self._asked_about: set[socket.socket] = set()
        super().__init__(address_or_socket, handler, ioloop, BACKLOG)

    def close(self) -> None:
        """Take no connections any more."""
        super().close()
        while self._asked_about:
            self._asked_about.pop().close()
        self.door.banned.close()

    def takes_next(self) -> bool:
        """Tell whether the next connection is for this process; else leave it to the others for a moment.

        Nobody waits longer than that: what the others have not taken by then is taken here.
        """
        lead = self.door.table.lead()
        if lead < LEAD or self._was_left:
            self._was_left = False
            return True
        self.pause(min(lead * MOMENT, LONGEST_MOMENT))
        return False

    def resume(self) -> None:
        """Take the connection that was left to the others, if it is still there."""
        super().resume()
        if not self._closed:
            self._was_left = True
            self.handle_accept()
            self._was_left = False

    def handle_accepted(self, sock: socket.socket, addr: tuple[Any, ...]) -> Any:
        """Take a connection; where it comes from a load balancer, its client's address comes first."""
        if not is_within(addr[0], self.door.limits.proxies):
            return self._take(sock, addr)
        return ProxyHeader(sock, addr, self.ioloop, done=self._take, refused=self._count_bad_header)

    def _take(self, sock: socket.socket, addr: tuple[Any, ...]) -> Any:
        """Take a connection once it is known whether its address is banned."""
        if self.door.banned.answer(addr[0]) is not None:
            return super().handle_accepted(sock, addr)
        self._asked_about.add(sock)
        told = partial(self.ioloop.call_soon_threadsafe, self._take_asked, sock, addr)
        self.door.banned.ask(addr[0]).add_done_callback(lambda _: told())
        return None

    def _take_asked(self, sock: socket.socket, addr: tuple[Any, ...]) -> None:
        if sock in self._asked_about:
            self._asked_about.discard(sock)
            super().handle_accepted(sock, addr)

    def _count_bad_header(self) -> None:
        self.door.metrics.add(Count.BAD_PROXY_HEADERS)


class Limited(FTPHandler):
    """A session that has come in by a door, as far as that is its concern. Runs on its event loop.

    On a server without a door nothing is limited but what pyftpdlib limits.
    """

    # pyftpdlib's own.
    remote_ip: str
    authenticated: bool
    attempted_logins: int
    username: str
    data_channel: Any
    _in_dtp_queue: Any
    _out_dtp_queue: Any

    # Whether it has been told to go.
    is_dismissed = False
    # Whether the door has counted it in.
    _is_admitted = False
    _commands_before_login = 0
    _login_timer: Any = None
    # The counting of the last wrong password, and whether the client has yet to be told of it.
    _counting: Future[bool] | None = None
    _is_refused = False
    # Whether the client's address is banned.
    _is_expelled = False

    @property
    def door(self) -> Door | None:
        """The door of the server, None where it has none."""
        return getattr(self.server, "door", None)

    def handle(self) -> None:
        """Greet the client, if it is let in."""
        door = self.door
        if door is None:
            super().handle()
            return
        refusal = door.admit(self)
        if refusal is not None:
            self.turn_away(refusal)
            return
        self._is_admitted = True
        if door.limits.login_timeout is not None:
            self._login_timer = self.call_later(door.limits.login_timeout, self._end_without_login)
        self.most_pipelined = MOST_PIPELINED
        super().handle()

    def turn_away(self, refusal: Refusal) -> None:
        """Close the session with a word; TLS from the first byte would cost a handshake for it."""
        self.log(refusal.value[4:], logfun=session_logger.warning)
        if getattr(self, "tls_mode", None) == "implicit":
            self.close()
        else:
            self.dismiss(refusal)

    def dismiss(self, refusal: Refusal) -> None:
        """Close the session once the client has been told why, or has not listened for a while."""
        self.is_dismissed = True
        if getattr(self, "_ssl_accepting", False):  # there is no way to tell it yet
            self.close()
            return
        self.respond(refusal.value)
        self.close_when_done()

    def cut_off(self, reason: str) -> None:
        """End the transfer that is under way with an answer, unless it is being published; then the session."""
        if self.data_channel is not None and self.data_channel.is_busy:
            self.data_channel.break_off(reason)
        if not self._closed and not self.is_dismissed:
            self._shutdown_connecting_dtp()
            self.dismiss(Refusal.CLOSING)

    @property
    def is_idle(self) -> bool:
        """Whether no command runs, and no transfer."""
        return getattr(self, "_task", None) is None and not self._is_in_transfer

    @property
    def _is_in_transfer(self) -> bool:
        channel = self.data_channel
        queued = self._in_dtp_queue is not None or self._out_dtp_queue is not None
        return queued or (channel is not None and channel.is_busy)

    def close(self) -> None:
        """Disconnect the client."""
        if self._is_admitted and self.door is not None:
            self._is_admitted = False
            self.door.leave(self)
        super().close()

    # --- before the login

    def pre_process_command(self, line: str, cmd: str, arg: str) -> None:
        """Run a command; one who does not log in may not have many, and none is begun while the server stops."""
        if self.door is not None and self.door.is_closing and not self._is_in_transfer:
            self.dismiss(Refusal.CLOSING)
            return
        if not self.authenticated:
            self._commands_before_login += 1
            if self._commands_before_login > MOST_COMMANDS:
                self.respond_w_warning("421 Too many commands without a login.")
                self.close_when_done()
                return
        super().pre_process_command(line, cmd, arg)

    def _end_without_login(self) -> None:
        self._login_timer = None
        if self.authenticated:
            return
        self.count(Count.LOGIN_TIMEOUTS)
        self.respond("421 Login timed out.", logfun=session_logger.info)
        self.close_when_done()

    def handle_auth_success(self, home: str, password: str, msg_login: str) -> None:
        """Let a user in whose password was right."""
        if self._login_timer is not None and not self._login_timer.cancelled:
            self._login_timer.cancel()
        self._commands_before_login = 0
        self.__dict__.pop("most_pipelined", None)
        self.count(Count.LOGINS)
        super().handle_auth_success(home, password, msg_login)

    def ftp_PASS(self, line: str) -> None:
        """Check a password, unless the client's address is banned by now."""
        if self._is_banned():
            self.count(Count.REFUSED_BANNED)
            self.log(Refusal.BANNED.value[4:], logfun=session_logger.warning)
            self.dismiss(Refusal.BANNED)
        else:
            super().ftp_PASS(line)

    def _is_banned(self) -> bool:
        if self.door is None:
            return False
        banned, task = self.door.banned, current_task()
        known = banned.answer(self.remote_ip)
        if known is not None:
            return known
        asked = banned.ask(self.remote_ip)
        if task is not None:
            task.wait(asked)
        return asked.result()

    def expel(self) -> None:
        """Send the client away, whose address is banned; one who is being told of a wrong password hears that first."""
        self._is_expelled = True
        if not self._is_refused and not self.is_dismissed:
            self.dismiss(Refusal.BANNED)

    def count_failure(self) -> None:
        """Count a wrong password, once; send away its address's sessions where it was one too many. Any thread."""
        door = self.door
        if door is None or self._is_refused:
            return
        self._is_refused = True
        ip, soon = self.remote_ip, getattr(self.ioloop, "call_soon_threadsafe", None)
        counting = self._counting = door.banned.failed(ip)
        if soon is not None:
            counting.add_done_callback(lambda done: soon(door.expel, ip) if done.result() else None)

    def handle_auth_failed(self, msg: str, password: str) -> None:
        """Answer a wrong password, after a while; meanwhile the client's other commands wait, and nobody else."""
        self.count(Count.LOGINS_FAILED)
        self.count_failure()
        task = current_task()
        if task is None:
            self._is_refused = False
            super().handle_auth_failed(msg, password)
            return
        user, self.username = self.username, ""
        if self._counting is not None and not self._counting.done():
            task.wait(self._counting)
        task.sleep(self.auth_failed_timeout)
        self._answer_wrong_password(user, password, msg or "Authentication failed.")

    def _answer_wrong_password(self, user: str, password: str, reason: str) -> None:
        self.attempted_logins += 1
        self._is_refused = False
        is_last = self._is_expelled or self.attempted_logins >= self.max_login_attempts
        self.respond(f"530 {reason.capitalize()}{' Disconnecting.' if is_last else ''}")
        self.log(f"USER '{user}' failed login.")
        if is_last:
            self.close_when_done()
        self.on_login_failed(user, password)

    def handle_timeout(self) -> None:
        """Called when the client has said nothing for `timeout` seconds."""
        if getattr(self, "_task", None) is None:  # else it waits for an answer
            self.count(Count.IDLE_TIMEOUTS)
        super().handle_timeout()

    def count(self, count: Count) -> None:
        """Count something that has happened."""
        if self.door is not None:
            self.door.metrics.add(count)

    def comes_from_proxy(self, ip: str) -> bool:
        """Tell whether a connection from the address has to say, by PROXY protocol, who its client is."""
        return self.door is not None and is_within(ip, self.door.limits.proxies)
