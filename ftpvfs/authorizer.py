"""An authorizer whose homes are paths inside a VFS; otherwise pyftpdlib's `DummyAuthorizer`."""

from __future__ import annotations

import hmac
from typing import Any

from pyftpdlib.authorizers import AuthenticationFailed, DummyAuthorizer

from ftpvfs import paths

READ = "elr"
ALL = "elradfmwMT"


class VFSAuthorizer(DummyAuthorizer):
    """Users with homes in a VFS (`/`, `/alice`). Nothing is looked up on the server's own disk."""

    def add_user(
        self,
        username: str,
        password: str | None,
        homedir: str = "/",
        perm: str = READ,
        msg_login: str = "Login successful.",
        msg_quit: str = "Goodbye.",
    ) -> None:
        """Add a user; `perm` are pyftpdlib's letters, a password of None accepts every password.

        The home need not exist: it is an empty folder until something is written into it. Raises ValueError for a user
        that exists and for unknown letters.
        """
        if self.has_user(username):
            raise ValueError(f"user {username!r} already exists")
        _check_letters(perm)
        self.user_table[username] = {
            "pwd": password,
            "home": paths.normalize(homedir),
            "perm": perm,
            "operms": {},
            "msg_login": msg_login,
            "msg_quit": msg_quit,
        }

    def add_anonymous(self, homedir: str = "/", **kwargs: Any) -> None:
        """Add the user `anonymous`, who may log in with any password."""
        self.add_user("anonymous", None, homedir, **kwargs)

    def override_perm(self, username: str, directory: str, perm: str, recursive: bool = False) -> None:
        """Give a user other permissions in a folder below the home, and below that folder where `recursive`."""
        _check_letters(perm)
        directory = paths.normalize(directory)
        home = self.get_home_dir(username)
        if directory == home:
            raise ValueError("can't override home directory permissions")
        if not paths.is_within(paths.from_ftp(directory), paths.from_ftp(home)):
            raise ValueError("path escapes user home directory")
        self.user_table[username]["operms"][directory] = perm, recursive

    def has_perm(self, username: str, perm: str, path: str | None = None) -> bool:
        """Tell whether the user may do what the letter stands for, at the path."""
        user = self.user_table[username]
        nearest = -1
        letters = user["perm"]
        for directory, (allowed, recursive) in user["operms"].items():
            applies = path is not None and (
                paths.is_within(paths.from_ftp(path), paths.from_ftp(directory))
                if recursive
                else path == directory or paths.split(path)[0] == directory
            )
            if applies and len(directory) > nearest:
                nearest, letters = len(directory), allowed
        return perm in letters

    def validate_authentication(self, username: str, password: str, handler: Any) -> None:
        """Raise AuthenticationFailed unless user and password belong together; takes the same time for all who fail."""
        user = self.user_table.get(username)
        expected = "" if user is None else user["pwd"]
        if user is not None and expected is None:
            return
        same = hmac.compare_digest(password.encode("utf-8", "surrogateescape"), expected.encode())
        if user is None or not same:
            raise AuthenticationFailed("Authentication failed.")


def _check_letters(perm: str) -> None:
    unknown = set(perm) - set(ALL)
    if unknown:
        raise ValueError(f"no such permission {min(unknown)!r}; the letters are {ALL}")
