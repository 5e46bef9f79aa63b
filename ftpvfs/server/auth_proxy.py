"""Users whom a program knows: given a name and a password it says what store is theirs, as with rclone.

The program gets a JSON object on its standard input, `{"user": ..., "pass": ..., "client_ip": ...}`, and prints one:

- `_root`: the folder in the store, and either `type`, which kind of store (rclone's name or fsspec's), or `url`, its
  start (`s3://bucket`), to which `_root` is added;
- `_perm`: pyftpdlib's letters, all without it; `_name`: the name of the store's cache;
- every other key is a storage option for fsspec; rclone's names of those for S3 and SFTP are understood, too.

Any exit status but 0 means that nobody of that name has that password.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import json
import logging
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from pyftpdlib.authorizers import AuthenticationFailed

from ftpvfs.authorizer import ALL, VFSAuthorizer
from ftpvfs.backend.options import read_options
from ftpvfs.cache.index import cache_name
from ftpvfs.config import ConfigError, VFSOptions
from ftpvfs.config.values import NAME
from ftpvfs.vfs.vfs import VFS

logger = logging.getLogger(__name__)

KEPT = 300.0  # seconds for which an answer holds, and a store that nobody uses stays open: rclone's
SURELY = 1.0  # seconds for which an answer has to hold yet, so that it does when it is asked for the next moment
PATIENCE = 60.0  # seconds that the program gets
MOST_SAID = 64 * 1024  # bytes that it may say on each of its streams
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
        # Those that are being opened, so that two logins do not open one twice.
        self._opening: dict[str, Future[_Store]] = {}

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
            status, answer, said = _run(self._command, question.encode())
        except OSError as error:
            raise self._failed(error.strerror or "cannot be run") from None
        except subprocess.TimeoutExpired:
            raise self._failed(f"no answer within {PATIENCE:g} s") from None
        except _TooLong:
            raise self._failed(f"it says more than {MOST_SAID // 1024} KiB") from None
        if status:
            logger.info("%s refuses %r (status %d)", self._command[0], username, status)
            logger.debug("%s: %s", self._command[0], _without(password, said.decode("utf-8", "replace")).strip())
            raise AuthenticationFailed("Authentication failed.")
        try:
            return answer_of(json.loads(answer))
        except (ValueError, RecursionError) as error:  # the text may hold secrets; json's message has none of it
            raise self._failed(f"its answer {error if isinstance(error, _BadAnswer) else 'is no JSON'}") from None

    def _failed(self, reason: str) -> AuthenticationFailed:
        logger.error("--auth-proxy %s: %s", self._command[0], reason)
        return AuthenticationFailed("Authentication failed.")

    # --- stores

    def _log_in(self, username: str, answer: Answer) -> _Login:
        permissions = "".join(letter for letter in answer.permissions if letter in self._allowed)
        self._close_idle()
        return _Login(self._store(username, answer), permissions, time.monotonic() + KEPT)

    def _close_idle(self) -> None:
        """Close the stores that nobody has used for a while."""
        with self._lock:
            stores = dict(self._stores)
        idle = {key: (store, store.last_used) for key, store in stores.items() if store.is_idle}
        with self._lock:
            for key, (store, last_used) in list(idle.items()):
                if self._stores.get(key) is store and store.last_used == last_used:
                    del self._stores[key]
                else:
                    del idle[key]
        for store, _ in idle.values():
            store.vfs.close()

    def _store(self, username: str, answer: Answer) -> _Store:
        """Return the store of an answer, opened once however many ask for it. Waits for it, but not with the lock."""
        backend = json.dumps([answer.url, answer.storage_options, answer.cache_name], sort_keys=True)
        with self._lock:
            store, opening = self._stores.get(backend), self._opening.get(backend)
            if store is not None:
                store.last_used = time.monotonic()
                return store
            is_first = opening is None
            if opening is None:
                opening = self._opening[backend] = Future()
                name = answer.cache_name or self._free_name_locked(answer.url, username)
        if is_first:
            self._open(backend, answer, name, opening)
        try:
            return opening.result()
        except ValueError as error:
            raise self._failed(f"the store of {username!r}{error}") from None

    def _open(self, backend: str, answer: Answer, name: str | None, opening: Future[_Store]) -> None:
        """Open a store and publish it, or what is wrong with it."""
        shown = ""
        try:
            options = dataclasses.replace(self._options, name=name)
            vfs = VFS(answer.url, storage_options=read_options(answer.url, answer.storage_options), options=options)
            shown = f", {vfs.name},"
            vfs.prepare()
        except Exception as error:  # noqa: BLE001 - whatever fsspec's filesystems make of options
            with self._lock:
                del self._opening[backend]
            opening.set_exception(ValueError(f"{shown} cannot be used: {error}"))
            return
        store = _Store(answer.url, vfs)
        with self._lock:
            del self._opening[backend]
            self._stores[backend] = store
        opening.set_result(store)

    def _free_name_locked(self, url: str, username: str) -> str | None:
        """Return None, the name that follows from the URL, unless somebody uses the same one with other options."""
        taken = {store.url for store in self._stores.values()} | {json.loads(key)[0] for key in self._opening}
        return cache_name([url.partition("://")[2], username]) if url in taken else None


class _TooLong(Exception):
    """A program says more than anybody should."""


def _run(command: Sequence[str], question: bytes) -> tuple[int, bytes, bytes]:
    """Run a program; return its status and what it has said on both of its streams.

    Raises TimeoutExpired and _TooLong, and has killed it then.
    """
    deadline = time.monotonic() + PATIENCE
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as program:
        try:
            said = _converse(program, question, deadline)
            return program.wait(max(deadline - time.monotonic(), 0.0)), *said
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)  # with what it has started, which may hold its streams open
            raise


def _converse(program: subprocess.Popen[bytes], question: bytes, deadline: float) -> tuple[bytes, bytes]:
    """Ask, and read what is answered; `communicate` would take whatever comes."""
    assert program.stdin is not None
    assert program.stdout is not None
    assert program.stderr is not None
    said = {program.stdout: bytearray(), program.stderr: bytearray()}
    os.set_blocking(program.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(program.stdin, selectors.EVENT_WRITE)
        for stream in said:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(program.args, PATIENCE)
            for key, _ in selector.select(left):
                if key.fileobj is program.stdin:
                    question = _tell(program.stdin.fileno(), question)
                    is_over = not question
                else:
                    is_over = _hear(key.fd, said[key.fileobj])  # type: ignore[index]
                if is_over:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
    return bytes(said[program.stdout]), bytes(said[program.stderr])


def _tell(descriptor: int, question: bytes) -> bytes:
    """Write to a program; return what it has not taken yet, nothing where it wants no more."""
    try:
        return question[os.write(descriptor, question) :]
    except BrokenPipeError:
        return b""


def _hear(descriptor: int, said: bytearray) -> bool:
    """Read what a program says; tell whether that was all. Raises _TooLong."""
    piece = os.read(descriptor, MOST_SAID)
    said += piece
    if len(said) > MOST_SAID:
        raise _TooLong
    return not piece


def _without(password: str, text: str) -> str:
    """Return a text without the password in it, also where that is written as JSON or as Python writes it.

    >>> _without('g"ä', 'wrong: {"pass": "g\\\\"\\\\u00e4"} g"ä')
    'wrong: {"pass": "***"} ***'
    """
    forms = {password, json.dumps(password)[1:-1], json.dumps(password, ensure_ascii=False)[1:-1], repr(password)[1:-1]}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form or "\0", "***")
    return text


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
        try:
            name = NAME.parse(str(name))
        except ValueError as error:
            raise _BadAnswer("has a _name that is none of a cache") from error
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
    renamed = {names.get(key, key): value for key, value in options.items() if names.get(key, key)}
    if protocol == "s3" and "region" in renamed:
        renamed["client_kwargs"] = {**renamed.get("client_kwargs", {}), "region_name": renamed.pop("region")}
    return renamed
