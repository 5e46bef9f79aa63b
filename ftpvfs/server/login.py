"""Logging in: who the client is, which store is his, and that nobody else waits while this is found out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from pyftpdlib.authorizers import AuthenticationFailed, AuthorizerError, DummyAuthorizer

from ftpvfs.coordination.sessions import network_of
from ftpvfs.server.commands import Commands
from ftpvfs.server.offload import PASSWORDS, Crowded, current_task
from ftpvfs.vfs.vfs import VFS

T = TypeVar("T")
# The lane in which an authorizer is asked that does not name one: it may ask others, over the network.
LOGINS = "logins"
# How many passwords from one address are looked at at once, so that others get theirs looked at, too.
AT_ONCE = {PASSWORDS: 1}
MOST_AT_ONCE = 8


class Account(NamedTuple):
    """What an authorizer says of a user whose password was right."""

    home: str
    message: str
    vfs: VFS | None  # a store of the user's own


class Login(Commands):
    """PASS for a `VFSHandler`: the authorizer is asked off the event loop and may name a store of the user's own.

    An authorizer is any of pyftpdlib's, and may have these besides:
    - `lane`: the name of the threads that are to ask it, None where it always answers at once;
    - `answers_at_once(username, password, handler)`: whether it does so this time;
    - `vfs_for(username, password, handler)`: the user's own `VFS`, or None.
    """

    # The user's own store, which the session's filesystem shows instead of its class's.
    vfs: VFS | None = None
    # How many sessions a user may have at once, in all processes behind one door; those who are not in it any number.
    most_sessions: Mapping[str, int] = {}
    # The user in whose count this session is.
    _counted_as = ""
    # Others'.
    door: Any
    username: str

    def ftp_PASS(self, line: str) -> None:
        """Check the password of the user that USER named."""
        if self.authenticated:
            self.respond("503 User already authenticated.")
            return
        if not self.username:
            self.respond("503 Login with USER first.")
            return
        try:
            account = self._aside(partial(self._account, line), line)
        except Crowded:
            self.respond_w_warning("421 Too many logins at once. Try again later.")
            self.close_when_done()
            return
        except (AuthenticationFailed, AuthorizerError) as error:
            self.handle_auth_failed(str(error), line)
            return
        if not self._has_room():
            self.respond("530 Too many sessions of this user.")
            self.username = ""
            return
        self.vfs = account.vfs
        self.handle_auth_success(account.home, line, account.message)

    def _has_room(self) -> bool:
        """Tell whether the user may have another session, which is counted."""
        most, door = self.most_sessions.get(self.username, 0), getattr(self, "door", None)
        if most and door is not None:
            if not door.table.admit_user(self.username, most):
                return False
            self._counted_as = self.username
        return True

    def _leave(self) -> None:
        name, self._counted_as = self._counted_as, ""
        if name:
            self.door.table.leave_user(name)

    def _account(self, password: str) -> Account:
        authorizer = self.authorizer
        authorizer.validate_authentication(self.username, password, self)
        find_vfs = getattr(authorizer, "vfs_for", None)
        return Account(
            authorizer.get_home_dir(self.username),
            authorizer.get_msg_login(self.username),
            find_vfs(self.username, password, self) if find_vfs else None,
        )

    def _aside(self, ask: Callable[[], T], password: str) -> T:
        """Ask the authorizer in a thread of its lane while the event loop goes on, unless it answers at once.

        What no thread has begun is dropped when the client leaves; a failure that is found out is counted all the same.
        """
        lane, task = self._lane(password), current_task()
        if lane is None or task is None:
            return ask()
        with task.turn((lane, network_of(self.remote_ip)), AT_ONCE.get(lane, MOST_AT_ONCE)):
            # Another session may have had the same password looked at meanwhile.
            return ask() if self._lane(password) is None else task.finish(lane, partial(self._counted, ask))

    def _lane(self, password: str) -> str | None:
        authorizer = self.authorizer
        if type(authorizer) is DummyAuthorizer:
            return None
        answers_at_once = getattr(authorizer, "answers_at_once", None)
        if answers_at_once is not None and answers_at_once(self.username, password, self):
            return None
        lane: str | None = getattr(authorizer, "lane", LOGINS)
        return lane

    def _counted(self, ask: Callable[[], T]) -> T:
        """Ask, and have a failure counted by whoever found it out: the client may have left."""
        try:
            return ask()
        except (AuthenticationFailed, AuthorizerError):
            self.count_failure()
            raise

    def count_failure(self) -> None:
        """Count a wrong password. Any thread."""

    def flush_account(self) -> None:
        """Forget who the client was."""
        super().flush_account()
        self._leave()
        self.vfs = None

    def close(self) -> None:
        """Disconnect the client."""
        self._leave()
        super().close()
