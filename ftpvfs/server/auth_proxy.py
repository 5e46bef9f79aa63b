"""Users whom a program knows: given a name and a password it says what store is theirs, as with rclone.

The program gets a JSON object on its standard input, `{"user": ..., "pass": ..., "client_ip": ...}`, and prints one:

- `_root`: the folder in the store, and either `type`, which kind of store (rclone's name or fsspec's), or `url`, its
  start (`s3://bucket`), to which `_root` is added;
- `_perm`: pyftpdlib's letters, all without it; `_name`: the name of the store's cache;
- every other key is a storage option for fsspec; rclone's names of those for S3 and SFTP are understood, too.

Any exit status but 0 means that nobody of that name has that password.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import logging
import shlex
import shutil
import subprocess
import time
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

from pyftpdlib.authorizers import AuthenticationFailed

from ftpvfs.authorizer import ALL, VFSAuthorizer
from ftpvfs.cache.index import cache_name
from ftpvfs.config import ConfigError, VFSOptions
from ftpvfs.config.values import NAME
from ftpvfs.vfs.vfs import VFS

logger = logging.getLogger(__name__)

KEPT = 300.0  # seconds for which an answer holds, and a store that nobody uses stays open: rclone's
SURELY = 1.0  # seconds for which an answer has to hold yet, so that it does when it is asked for the next moment
PATIENCE = 60.0  # seconds that the program gets
# rclone's kinds of stores under fsspec's names, where they differ.
PROTOCOLS = {"local": "file", "google cloud storage": "gs", "azureblob": "abfs"}
# rclone's parameters under fsspec's names; "" where they mean nothing here.
PARAMETERS: dict[str, dict[str, str]] = {
    "s3": {
        "access_key_id": "key",
        "secret_access_key": "secret",
        "session_token": "token",
        "endpoint": "endpoint_url",
        "provider": "",
        "env_auth": "",
        "force_path_style": "",
    },
    "sftp": {"user": "username", "pass": "password", "host": "", "port": ""},
}

# What of an answer is no storage option; rclone's _obscure has no meaning here, since nothing is obscured.
KNOWN = {"_root", "_perm", "_name", "_obscure"}


class Answer(NamedTuple):
    """What the program said."""

    url: str
    storage_options: dict[str, Any]
    permissions: str
    cache_name: str | None


class _Store:
    """A store that the program has named, and who uses it."""

    def __init__(self, url: str, vfs: VFS) -> None:
        self.url = url
        self.vfs = vfs
        self.last_used = time.monotonic()
        self.sessions: weakref.WeakSet[Any] = weakref.WeakSet()

    def use(self, session: Any) -> None:
        self.last_used = time.monotonic()
        self.sessions.add(session)

    @property
    def is_idle(self) -> bool:
        """Whether nobody has used it for a while, and nothing waits there to be stored."""
        if any(session.vfs is self.vfs and not session._closed for session in self.sessions):
            self.last_used = time.monotonic()
            return False
        return self.last_used < time.monotonic() - KEPT and not self.vfs.queue()


class _Login(NamedTuple):
    store: _Store
    permissions: str
    expires: float


class ProxyAuthorizer(VFSAuthorizer):
    """Asks a program who may log in. Any thread; made in the process that serves.

    All sessions of one name have the permissions of its last login.
    """

    def __init__(self, command: str, options: VFSOptions, allowed: str = ALL) -> None:
        super().__init__()
        self._command = split(command)
        self._options = options
        self._allowed = allowed
        # Protected by _lock.
        self._logins: dict[bytes, _Login] = {}
        self._stores: dict[str, _Store] = {}

    @property
    def lane(self) -> str:
        """Whose threads are to ask the program."""
        return "logins"

    @property
    def vfses(self) -> tuple[VFS, ...]:
        """The stores that are open."""
        with self._lock:
            return tuple(store.vfs for store in self._stores.values())

    def answers_at_once(self, username: str, password: str, handler: Any) -> bool:
        """Tell whether the program need not be asked."""
        login = self._login_of(self._key(username, password, handler))
        return login is not None and login.expires > time.monotonic() + SURELY

    def validate_authentication(self, username: str, password: str, handler: Any) -> None:
        """Raise AuthenticationFailed unless the program knows user and password."""
        key = self._key(username, password, handler)
        login = self._login_of(key)
        if login is None:
            login = self._log_in(username, self._ask(username, password, handler.remote_ip))
        with self._lock:
            self._logins[key] = login
            login.store.use(handler)
            self.set_user(username, None, perm=login.permissions)

    def vfs_for(self, username: str, password: str, handler: Any) -> VFS:
        """Return the store that the program named."""
        with self._lock:
            return self._logins[self._key(username, password, handler)].store.vfs

    def _key(self, username: str, password: str, handler: Any) -> bytes:
        text = json.dumps([username, password, handler.remote_ip])
        return hmac.digest(self._proof, text.encode(), "sha256")

    def _login_of(self, key: bytes) -> _Login | None:
        now = time.monotonic()
        with self._lock:
            self._logins = {each: login for each, login in self._logins.items() if login.expires > now}
            return self._logins.get(key)

    # --- the program

    def _ask(self, username: str, password: str, ip: str) -> Answer:
        question = json.dumps({"user": username, "pass": password, "client_ip": ip})
        try:
            ended = subprocess.run(
                self._command, input=question.encode(), capture_output=True, timeout=PATIENCE, check=False
            )
        except OSError as error:
            raise self._failed(error.strerror or "cannot be run") from None
        except subprocess.TimeoutExpired:
            raise self._failed(f"no answer within {PATIENCE:g} s") from None
        if ended.returncode:
            said = ended.stderr.decode("utf-8", "replace").replace(password or "\0", "***").strip()
            logger.info("%s refuses %r (status %d)", self._command[0], username, ended.returncode)
            logger.debug("%s: %s", self._command[0], said)
            raise AuthenticationFailed("Authentication failed.")
        try:
            return answer_of(json.loads(ended.stdout))
        except ValueError as error:  # the text may hold secrets; json's message has none of it
            raise self._failed(f"its answer {error if isinstance(error, _BadAnswer) else 'is no JSON'}") from None

    def _failed(self, reason: str) -> AuthenticationFailed:
        logger.error("--auth-proxy %s: %s", self._command[0], reason)
        return AuthenticationFailed("Authentication failed.")

    # --- stores

    def _log_in(self, username: str, answer: Answer) -> _Login:
        permissions = "".join(letter for letter in answer.permissions if letter in self._allowed)
        with self._lock:
            idle = {key: store for key, store in self._stores.items() if store.is_idle}
            for key in idle:
                del self._stores[key]
            store = self._store(username, answer)
        for each in idle.values():
            each.vfs.close()
        return _Login(store, permissions, time.monotonic() + KEPT)

    def _store(self, username: str, answer: Answer) -> _Store:
        backend = json.dumps([answer.url, answer.storage_options, answer.cache_name], sort_keys=True)
        store = self._stores.get(backend)
        if store is None:
            name = answer.cache_name or self._free_name(answer.url, username)
            options = dataclasses.replace(self._options, name=name)
            vfs = VFS(answer.url, storage_options=answer.storage_options, options=options)
            try:
                vfs.prepare()
            except (OSError, ValueError, ImportError) as error:
                raise self._failed(f"the store of {username!r}, {vfs.name}, cannot be used: {error}") from None
            store = self._stores[backend] = _Store(answer.url, vfs)
        store.last_used = time.monotonic()
        return store

    def _free_name(self, url: str, username: str) -> str | None:
        """Return None, the name that follows from the URL, unless somebody uses the same one with other options."""
        taken = any(store.url == url for store in self._stores.values())
        return cache_name([url.partition("://")[2], username]) if taken else None


class _BadAnswer(ValueError):
    """Says what is wrong with an answer, without anything of it that may be secret."""


def split(command: str) -> list[str]:
    """Return a command's words. Raises ConfigError where there is no such program."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--auth-proxy: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(f"--auth-proxy: there is no program {words[0] if words else ''!r} that can be run")
    return words


def answer_of(said: Any) -> Answer:
    """Return what a program's JSON object means. Raises ValueError."""
    if not isinstance(said, Mapping):
        raise _BadAnswer("is no JSON object")
    root, url, kind = said.get("_root"), said.get("url"), said.get("type")
    if not isinstance(root, str) or not isinstance(url or kind, str):
        raise _BadAnswer("has no _root, or neither type nor url")
    unknown = {key for key in said if key.startswith("_")} - KNOWN
    if unknown:
        raise _BadAnswer(f"has an unknown {min(unknown)}")
    permissions, name = said.get("_perm", ALL), said.get("_name")
    if not isinstance(permissions, str) or set(permissions) - set(ALL):
        raise _BadAnswer(f"has a _perm with other letters than {ALL}")
    if name is not None:
        name = NAME.parse(str(name))
    options = {key: value for key, value in said.items() if not key.startswith("_") and key not in ("type", "url")}
    if isinstance(url, str):
        return Answer(_joined(url, root), options, permissions, name)
    protocol = PROTOCOLS.get(str(kind), str(kind))
    return Answer(_joined(_start(protocol, options), root), _renamed(protocol, options), permissions, name)


def _start(protocol: str, options: Mapping[str, Any]) -> str:
    if protocol == "sftp" and "host" in options:
        port = f":{options['port']}" if "port" in options else ""
        return f"sftp://{options['host']}{port}/"
    return f"{protocol}://"


def _joined(url: str, root: str) -> str:
    """Return the URL of a folder below another.

    >>> _joined("s3://bucket", "a"), _joined("s3://", "bucket/a"), _joined("file://", "/srv"), _joined("memory://", "")
    ('s3://bucket/a', 's3://bucket/a', 'file:///srv', 'memory://')
    """
    if not root or url.endswith("://"):
        return url + root
    return f"{url.rstrip('/')}/{root.lstrip('/')}"


def _renamed(protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    names = PARAMETERS.get(protocol, {})
    return {names.get(key, key): value for key, value in options.items() if names.get(key, key)}
