"""From options to objects: the stores, who may use them, and a handler class for each listener.

An `Assembly` is made before any fork and used in each process. Nothing in it contacts a store before it is used.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftpvfs.authorizer import ALL, READ, VFSAuthorizer
from ftpvfs.backend.backend import display_url
from ftpvfs.backend.options import read_options
from ftpvfs.cache.identity import folder_name
from ftpvfs.config import Config, ConfigError, Listener, User
from ftpvfs.filesystem import VFSFilesystem
from ftpvfs.server import auth_proxy
from ftpvfs.server.auth_proxy import ProxyAuthorizer
from ftpvfs.server.handler import TLS_VFSHandler, VFSHandler
from ftpvfs.server.throttle import Rates
from ftpvfs.server.tls import Certificates
from ftpvfs.server.transfer import TLS_VFSDTPHandler, VFSDTPHandler
from ftpvfs.vfs.vfs import VFS

logger = logging.getLogger(__name__)

# What to do where the cache folder cannot be used.
WORKERS_NEED_ONE = "several workers need one (--cache-dir), --workers 1 does not"


class Assembly:
    """What the options describe. Raises ConfigError for what is wrong with certificates, users and their stores.

    `vfs` is the store of all who have none of their own, None where everybody has.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        # What is wrong with users' own stores, which keeps nobody else from being served.
        self.warnings: list[str] = []
        self._certificates = {
            listener: Certificates(listener.tls) for listener in config.listeners if listener.tls.mode != "off"
        }
        self._stores = _Stores(config)
        is_common = bool(config.server.authorizer) or any(not user.url for user in config.users)
        self.vfs = self._common_store() if is_common else None
        self._own = {user.name: self._own_store(user) for user in config.users}
        _authorizer_class(config)
        if config.server.auth_proxy:
            auth_proxy.split(config.server.auth_proxy)
        self._authorizer: Any = None
        self._rates = Rates(config.server.bwlimit, {user.name: user.bwlimit for user in config.users})

    def _common_store(self) -> VFS:
        config = self.config
        return self._stores.store(config.url, config.storage_options, config.vfs.name)

    def examine(self) -> None:
        """Find out what is wrong with the stores as far as it can be seen here; nothing is contacted, opened or made.

        Raises OSError for the common one, ImportError and ValueError for any.
        """
        for vfs in self._stores.all:
            try:
                vfs.examine()
                if self.config.server.workers > 1:
                    _examine_shared(vfs)
            except OSError as error:
                if vfs is self.vfs:
                    raise
                where = f": {error.filename}" if error.filename else ""
                self.warnings.append(f"{vfs.name}: {error.strerror}{where}")
            except (ImportError, ValueError) as error:
                raise self._named(vfs, error) from error

    def _named(self, vfs: VFS, error: Exception) -> Exception:
        """Return the error with the name of the user whose store it is about, or as it is."""
        user = next((name for name, own in self._own.items() if own is vfs), None)
        return error if user is None else ConfigError(f"[user:{user}]: {error}")

    def _own_store(self, user: User) -> VFS | None:
        if not user.url:
            return None
        try:
            return self._stores.store(user.url, user.storage_options, user.cache_name)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"[user:{user.name}]: {error}") from None

    @property
    def vfses(self) -> tuple[VFS, ...]:
        """All stores that the options name, the common one first, and those that a program has named since."""
        return (*self._stores.all, *getattr(self._authorizer, "vfses", ()))

    @property
    def authorizer(self) -> Any:
        """Who may log in; made where it is first used, so that it need not survive a fork."""
        if self._authorizer is None:
            self._authorizer = self._make_authorizer()
        return self._authorizer

    def _make_authorizer(self) -> Any:
        own, program = _authorizer_class(self.config), self.config.server.auth_proxy
        if own is not None:
            return self._make_own(own)
        if program:
            return ProxyAuthorizer(program, self.config.vfs, allowed(self.config, ALL))
        authorizer = VFSAuthorizer()
        for user in self.config.users:
            authorizer.add_user(
                user.name,
                user.password,
                user.home,
                perm=allowed(self.config, user.perm),
                password_hash=user.password_hash,
                vfs=self._own[user.name],
            )
        return authorizer

    def _make_own(self, cls: Any) -> Any:
        try:
            return cls()
        except Exception as error:
            named = self.config.server.authorizer
            raise ConfigError(f"--authorizer: {named} cannot be made: {type(error).__name__}: {error}") from error

    def handler(self, listener: Listener) -> type[VFSHandler]:
        """Return the handler class for the sessions of a listener; to be called in the process that serves them."""
        server, tls = self.config.server, listener.tls
        attributes: dict[str, Any] = {
            "abstracted_fs": type("Filesystem", (VFSFilesystem,), {"vfs": self.vfs}),
            "authorizer": self.authorizer,
            "rates": self._rates,
            "most_sessions": {user.name: user.max_cons for user in self.config.users},
            "passive_ports": server.passive_port,
            "public_ip": server.public_ip,
            "timeout": server.idle_timeout,
            "max_login_attempts": server.max_login_attempts,
        }
        if listener not in self._certificates:
            data = type("DTPHandler", (VFSDTPHandler,), {"timeout": server.transfer_timeout})
            return type("Handler", (VFSHandler,), {"dtp_handler": data, **attributes})
        attributes |= {
            "dtp_handler": type("TLSDTPHandler", (TLS_VFSDTPHandler,), {"timeout": server.transfer_timeout}),
            "certificates": self._certificates[listener],
            "tls_mode": tls.mode,
            "tls_require_reuse": tls.require_reuse,
            "tls_strict_eof": tls.strict_eof,
        }
        return type("TLSHandler", (TLS_VFSHandler,), attributes)

    def reload(self) -> bool:
        """Read the certificates again; sessions go on with those that they have. In each process.

        Returns whether all could be used; of the others those stay that were in use.
        """
        could_be_read = [certificates.reload() for certificates in self._certificates.values()]
        return all(could_be_read)

    def forget(self) -> None:
        """Drop all cached listings. In each process."""
        for vfs in self.vfses:
            vfs.forget()

    def close(self) -> None:
        """Release what this process has open."""
        for vfs in self.vfses:
            vfs.close()


def _examine_shared(vfs: VFS) -> None:
    try:
        vfs.examine_shared()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {error.filename}; {WORKERS_NEED_ONE}") from error


class _Stores:
    """One VFS for each distinct backend, whoever uses it."""

    def __init__(self, config: Config) -> None:
        self._options = config.vfs
        self._found: dict[str, VFS] = {}
        self._places: list[_Place] = []

    @property
    def all(self) -> list[VFS]:
        return list(self._found.values())

    def store(self, url: str, written: Mapping[str, str], name: str | None) -> VFS:
        """Return the VFS of a backend; its options are as they were written.

        Raises ConfigError for options that cannot be meant, and for a second backend whose cache would be that of
        another; ImportError and ValueError where the URL's store cannot be had.
        """
        storage_options = read_options(url, written)
        backend = json.dumps([url, storage_options], sort_keys=True)
        vfs = self._found.get(backend)
        if vfs is None:
            vfs = self._found[backend] = self._new(url, storage_options, name)
        return vfs

    def _new(self, url: str, storage_options: Mapping[str, Any], name: str | None) -> VFS:
        mine = _Place(url, storage_options, name)
        for other in self._places:
            if other.folder == mine.folder and not other.is_same_store(mine):
                raise ConfigError(
                    f"{display_url(url)} has the cache folder {mine.folder} of another user's {display_url(other.url)}"
                    " with other options; give it a cache_name"
                )
        self._places.append(mine)
        return VFS(url, storage_options=storage_options, options=self._named(name))

    def _named(self, name: str | None) -> Any:
        return dataclasses.replace(self._options, name=name)


@dataclass(frozen=True)
class _Place:
    """A store and its cache folder."""

    url: str
    storage_options: Mapping[str, Any]
    name: str | None

    @property
    def folder(self) -> str:
        """The folder's name. ImportError and ValueError where the URL's store cannot be had here."""
        return folder_name(self.url, self.name)

    def is_same_store(self, other: _Place) -> bool:
        """Tell whether the URLs differ in how they are written, at most."""
        return (self.url.rstrip("/"), self.storage_options) == (other.url.rstrip("/"), other.storage_options)


def allowed(config: Config, permissions: str) -> str:
    """Return the letters that are left of a user's permissions."""
    return "".join(letter for letter in permissions if letter in READ or not config.vfs.read_only)


def let_in_with_any_password(config: Config) -> list[str]:
    """Return the users for whom any password is right."""
    return [user.name for user in config.users if user.password is None and user.password_hash is None]


def warnings(config: Config) -> list[str]:
    """Return what the log should say about the users."""
    return [
        f"the password of [user:{user.name}] is in clear; python -m ftpvfs hash-password makes a hash of it"
        for user in config.users
        if user.password is not None and user.name != config.server.user
    ]


def assemble(config: Config) -> Assembly:
    """Return what the options describe, examined as far as that is possible before the first address is taken.

    Raises ConfigError, OSError, ValueError and ImportError.
    """
    assembly = Assembly(config)
    for vfs in assembly.vfses:
        vfs.preload()
    assembly.examine()
    return assembly


def _authorizer_class(config: Config) -> Any:
    """Return the class that --authorizer names, None where it names none. Raises ConfigError in one line."""
    module, colon, name = config.server.authorizer.partition(":")
    if not colon:
        return None
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001 - whatever somebody's module does when it is imported
        raise ConfigError(f"--authorizer: {config.server.authorizer}: {type(error).__name__}: {error}") from None
    needed = [each for each in ("validate_authentication", "get_home_dir", "has_perm") if not hasattr(found, each)]
    if not inspect.isclass(found) or needed:
        raise ConfigError(f"--authorizer: {config.server.authorizer} is no class like pyftpdlib's DummyAuthorizer")
    return found
