"""Authorizers whose homes are paths inside a VFS: `VFSHomes` for any of pyftpdlib's, and `VFSAuthorizer`."""

from __future__ import annotations

import hmac
import os
import secrets
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import argon2
from pyftpdlib.authorizers import AuthenticationFailed, DummyAuthorizer

from ftpvfs import paths
from ftpvfs.vfs.vfs import VFS

READ = "elr"
ALL = "elradfmwMT"
# What a hash takes on purpose is 64 MiB and several processors at once, so no more than this many are made at a time.
_hashing = threading.BoundedSemaphore(2)
# Passwords that were right lately and need no hash for the next connection: clients open many.
REMEMBERED = 1000


# What `VFSHomes` is mixed into: `UnixAuthorizer` and others are none of these, but have its methods.
_Authorizer: Any = DummyAuthorizer if TYPE_CHECKING else object


class VFSHomes(_Authorizer):
    """Mixed into one of pyftpdlib's authorizers: its users' homes are paths in a VFS, and need not exist anywhere.

    Write it first: `class Users(VFSHomes, UnixAuthorizer)`. Without it pyftpdlib takes no home that is not a folder of
    this machine, and its `UnixAuthorizer` calls the VFS as the user who has logged in. A VFS works as one user, the
    server: the store has the server's credentials, the cache is a private folder, and threads serve all sessions.
    """

    # The folder whose place the VFS's root takes: with "/home" the home /home/alice is /alice in the VFS. Homes that
    # are not below it stay as they are.
    home_root = "/"
    # For a `VFSFilesystem`: the process's user stays the same.
    impersonates = False
    _is_made = False

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        # Of system users: the homes that they were given instead of their own.
        self._homes: dict[str, str] = {}
        super().__init__(*arguments, **keywords)
        self._is_made = True

    def add_user(self, username: str, password: str, homedir: str = "/", *arguments: Any, **keywords: Any) -> None:
        """Add a user with a home in the VFS; otherwise pyftpdlib's own (`DummyAuthorizer` and what is made of it)."""
        super().add_user(username, password, os.sep, *arguments, **keywords)
        self.user_table[username]["home"] = paths.normalize(homedir)

    def add_anonymous(self, homedir: str = "/", **keywords: Any) -> None:
        """Add the user `anonymous`, who may log in with any password."""
        super().add_anonymous(os.sep, **keywords)
        self.user_table["anonymous"]["home"] = paths.normalize(homedir)

    def override_user(
        self,
        username: str,
        password: str | None = None,
        homedir: str | None = None,
        *arguments: Any,
        **keywords: Any,
    ) -> None:
        """Give a system user another home in the VFS, and what else pyftpdlib's own takes (`UnixAuthorizer`)."""
        super().override_user(username, password, os.sep if homedir else None, *arguments, **keywords)
        self._homes.pop(username, None)
        if homedir:
            self._homes[username] = homedir

    def get_home_dir(self, username: str) -> str:
        """Return the user's home in the VFS."""
        if not self._is_made:  # pyftpdlib looks whether it is a folder of this machine
            return os.sep
        home = self._homes.get(username) or str(super().get_home_dir(username))
        home, root = paths.normalize(home), paths.normalize(self.home_root)
        if root == "/" or not paths.is_within(paths.from_ftp(home), paths.from_ftp(root)):
            return home
        return paths.rebase(home, root, "") or "/"

    def impersonate_user(self, username: str, password: str) -> None:
        """Stay who the server is: the store and the cache are its own."""

    def terminate_impersonation(self, username: str) -> None:
        """Stay who the server is."""

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
        others = getattr(self, "user_table", {}).get(username, {}).get("operms")
        if not others or path is None:
            return bool(super().has_perm(username, perm, path))
        nearest = -1
        letters = self.user_table[username]["perm"]
        for directory, (allowed, recursive) in others.items():
            applies = (
                paths.is_within(paths.from_ftp(path), paths.from_ftp(directory))
                if recursive
                else path == directory or paths.split(path)[0] == directory
            )
            if applies and len(directory) > nearest:
                nearest, letters = len(directory), allowed
        return perm in letters


class VFSAuthorizer(VFSHomes, DummyAuthorizer):
    """Users with homes in a VFS (`/`, `/alice`). Nothing is looked up on the server's own disk. Any thread.

    Passwords are kept in clear or as argon2 hashes. Who fails learns nothing of whether the name exists, neither from
    the reply nor from the time it takes.
    """

    def __init__(self) -> None:
        super().__init__()
        # A hash that no password fits for each cost that the users' hashes have.
        self._dummies: dict[str, str] = {}
        self._proof = secrets.token_bytes(32)
        self._lock = threading.Lock()
        # Protected by it.
        self._known: OrderedDict[bytes, None] = OrderedDict()

    @property
    def lane(self) -> str | None:
        """Whose threads are to check passwords; None where that is a comparison, done at once."""
        return "passwords" if self._dummies else None

    def add_user(
        self,
        username: str,
        password: str | None,
        homedir: str = "/",
        perm: str = READ,
        msg_login: str = "Login successful.",
        msg_quit: str = "Goodbye.",
        *,
        password_hash: str | None = None,
        vfs: VFS | None = None,
    ) -> None:
        """Add a user; `perm` are pyftpdlib's letters, a password of None accepts every password unless there is a hash.

        The home need not exist: it is an empty folder until something is written into it. `vfs` is a store of the
        user's own, None that of all. Raises ValueError for a user that exists, for unknown letters, for an empty home,
        and for a hash that is none of argon2's.
        """
        if self.has_user(username):
            raise ValueError(f"user {username!r} already exists")
        self.set_user(
            username, password, homedir, perm, msg_login, msg_quit, password_hash=password_hash, vfs=vfs
        )

    def set_user(
        self,
        username: str,
        password: str | None,
        homedir: str = "/",
        perm: str = READ,
        msg_login: str = "Login successful.",
        msg_quit: str = "Goodbye.",
        *,
        password_hash: str | None = None,
        vfs: VFS | None = None,
    ) -> None:
        """Add a user or change one; of running sessions that concerns the permissions alone."""
        _check_letters(perm)
        if not homedir:
            raise ValueError("the home is empty; write / for the root")
        if password_hash is not None:
            self._dummies.setdefault(_cost_of(password_hash), _dummy_like(password_hash))
        self.user_table[username] = {
            "pwd": password,
            "hash": password_hash,
            "vfs": vfs,
            "home": paths.normalize(homedir),
            "perm": perm,
            "operms": {},
            "msg_login": msg_login,
            "msg_quit": msg_quit,
        }

    def add_anonymous(self, homedir: str = "/", **kwargs: Any) -> None:
        """Add the user `anonymous`, who may log in with any password."""
        self.add_user("anonymous", None, homedir, **kwargs)

    def vfs_for(self, username: str, password: str, handler: Any) -> VFS | None:
        """Return the store of the user's own, None for that of all. Called once a login has succeeded."""
        vfs: VFS | None = self.user_table[username]["vfs"]
        return vfs

    def answers_at_once(self, username: str, password: str, handler: Any) -> bool:
        """Tell whether `validate_authentication` need not make a hash: it was right lately, or is in clear."""
        user = self.user_table.get(username)
        if user is None or type(self).validate_authentication is not VFSAuthorizer.validate_authentication:
            return False
        secret = password.encode("utf-8", "surrogateescape")
        if user["hash"] is not None:
            return self._remembers(self._proof_of(user["hash"], secret))
        return user["pwd"] is None or hmac.compare_digest(secret, user["pwd"].encode())

    def validate_authentication(self, username: str, password: str, handler: Any) -> None:
        """Raise AuthenticationFailed unless user and password belong together; takes the same time for all who fail.

        Where users have hashes it takes as long as they were made to.
        """
        user = self.user_table.get(username)
        secret = password.encode("utf-8", "surrogateescape")
        if user is None:
            right = self._is_hash_of("", secret)
        elif user["hash"] is not None:
            right = self._is_hash_of(user["hash"], secret)
        elif user["pwd"] is None:
            right = True
        else:
            right = hmac.compare_digest(secret, user["pwd"].encode()) or self._is_hash_of("", secret)
        if not right:
            raise AuthenticationFailed("Authentication failed.")

    def _is_hash_of(self, known_hash: str, secret: bytes) -> bool:
        """Tell whether the hash is the secret's, "" being nobody's.

        Who fails has had one hash made of each cost that there is, whether one of them was a user's or not.
        """
        if not self._dummies:
            return False
        proof = self._proof_of(known_hash, secret)
        if self._remembers(proof):
            return True
        with _hashing:
            if known_hash and _fits(known_hash, secret):
                self._remember(proof)
                return True
            own = _cost_of(known_hash) if known_hash else None
            for cost, dummy in list(self._dummies.items()):
                if cost != own:
                    _fits(dummy, secret)
        return False

    def _proof_of(self, known_hash: str, secret: bytes) -> bytes:
        return hmac.digest(self._proof, known_hash.encode() + b"\0" + secret, "sha256")

    def _remembers(self, proof: bytes) -> bool:
        with self._lock:
            return proof in self._known

    def _remember(self, proof: bytes) -> None:
        with self._lock:
            self._known[proof] = None
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)


def hash_password(password: str) -> str:
    """Return the argon2 hash to keep instead of a password."""
    return argon2.PasswordHasher().hash(password)


def _fits(known_hash: str, secret: bytes) -> bool:
    try:
        return argon2.PasswordHasher().verify(known_hash, secret)
    except argon2.exceptions.VerificationError:
        return False


def _cost_of(password_hash: str) -> str:
    """Return the same text for all hashes that take as long to check. Raises ValueError."""
    try:
        return str(argon2.extract_parameters(password_hash))
    except argon2.exceptions.InvalidHash as error:
        raise ValueError("not an argon2 hash") from error


def _dummy_like(password_hash: str) -> str:
    """Return a hash that takes as long to check as this one and that no password fits."""
    hasher = argon2.PasswordHasher.from_parameters(argon2.extract_parameters(password_hash))
    return hasher.hash(secrets.token_bytes(32))


def _check_letters(perm: str) -> None:
    unknown = set(perm) - set(ALL)
    if unknown:
        raise ValueError(f"no such permission {min(unknown)!r}; the letters are {ALL}")
