"""The one table of options: each field of these classes is a row of it."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import platformdirs

from ftpvfs.config.values import (
    ACK,
    ADDRESS,
    BANDWIDTH,
    BOOL,
    CACHE_MODE,
    CALLBACK,
    CLASS,
    CONFLICT,
    COUNT,
    DURATION,
    HOME,
    ID,
    KEEP_PARTIAL,
    LOG_FORMAT,
    LOG_LEVEL,
    MODE,
    NAME,
    NETWORKS,
    PASSWORD_HASH,
    PATH,
    PERMISSIONS,
    PERMS,
    PORTS,
    POSITIVE,
    PUBLIC_IP,
    SIZE,
    SWITCH,
    TEXT,
    TLS_MODE,
    TLS_VERSION,
    USER_NAME,
    WORKERS,
    Address,
    Bandwidth,
    ConfigError,
    Kind,
    Network,
    PublicIP,
)

PREFIX = "FTPVFS_"


@dataclass(frozen=True)
class Option:
    """One row of the table: a field's metadata, completed with the names that follow from the field's."""

    kind: Kind
    group: str
    meaning: str
    default: str | None  # as written; None where the default has no notation, then `shown` tells
    shown: str
    flag: str
    short: str
    secret: bool
    hidden: bool = False  # for debugging: not in help and reference
    never_empty: bool = False  # an empty value would open a door, as a template does that is filled in with nothing
    section: str = ""
    field: str = ""
    key: str = ""

    @property
    def variable(self) -> str:
        return self.flag and PREFIX + self.flag.upper().replace("-", "_")

    def read(self, text: str, source: str) -> Any:
        """The value that the text stands for; ConfigError names the source."""
        if self.never_empty and not text:
            raise ConfigError(f"{source}: the value is empty; write one, or leave {self.key} out")
        try:
            return self.kind.parse(text)
        except ValueError as error:
            raise ConfigError(f"{source}: {'the value' if self.secret else repr(text)} {error}") from None

    def take(self, value: Any, source: str) -> Any:
        """The value of a keyword, either as text or in its own type."""
        if isinstance(value, str):
            return self.read(value, source)
        if isinstance(value, self.kind.objects):
            return value
        if not isinstance(value, self.kind.natives) or (isinstance(value, bool) and bool not in self.kind.natives):
            raise ConfigError(f"{source}: {value!r} ({type(value).__name__}) is no {self.kind.name}")
        if value is None:
            return None
        return self.read(self.kind.format(value), source)


def option(
    default: str | None,
    kind: Kind,
    group: str,
    meaning: str,
    *,
    flag: str = "",
    key: str = "",
    short: str = "",
    shown: str = "",
    secret: bool = False,
    hidden: bool = False,
    never_empty: bool = False,
    factory: Callable[[], Any] | None = None,
) -> Any:
    """A dataclass field that is a row of the table; flag and ini key follow from its name unless given.

    `shown` describes a default found out at run time, by `factory` or where it is used (then it is None).
    Whoever adds or changes one runs `python -m ftpvfs.config README.md`.
    """
    row = Option(kind, group, meaning, default, shown, flag, short, secret, hidden, never_empty, key=key)
    if factory:
        return field(default_factory=factory, metadata={"option": row})
    value = None if default is None else kind.parse(default)
    return field(default=value, repr=not secret, metadata={"option": row})


def _workers() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, 4)


def _cache_dir() -> str:
    """The folder for the user's caches; "" where the user has none, which `check_cache_dir` refuses."""
    try:
        folder = platformdirs.user_cache_dir("ftpvfs", appauthor=False)
    except RuntimeError:  # a user id that no account has, without HOME
        return ""
    return folder if os.path.isabs(folder) else ""  # older releases leave the ~ in it


def check_cache_dir(options: VFSOptions) -> None:
    """Raise ConfigError where there is no folder for the cache."""
    if not options.cache_dir:
        raise ConfigError(f"--cache-dir: user {os.getuid()} has no home folder for the cache; write --cache-dir FOLDER")


@dataclass(frozen=True)
class ServerOptions:
    """The FTP server's own options: ini section [server]."""

    addr: Address = option(
        "localhost:2121",
        ADDRESS,
        "Server",
        "IP:port or :port (all interfaces) to listen on; port 0 is any free one",
    )
    user: str = option("anonymous", USER_NAME, "Server", "User name for authentication")
    password: str = option(
        "",
        TEXT,
        "Server",
        "Password for authentication; empty allows every password",
        flag="pass",
        key="pass",
        secret=True,
    )
    passive_port: range = option("30000-32000", PORTS, "Server", "Passive port range to use")
    public_ip: PublicIP = option(
        "",
        PUBLIC_IP,
        "Server",
        "Public IP address or host name to advertise for passive connections;"
        " `,NETWORK=ADDRESS` behind it is for clients from there",
    )
    workers: int = option(
        None,
        WORKERS,
        "Server",
        "Processes that serve; 1 is a single one",
        shown="the CPUs, at most 4",
        factory=_workers,
    )
    drain_timeout: float | None = option(
        "30s", DURATION, "Server", "Time that transfers get to finish when the server is stopped"
    )
    loop_slow_turn: float | None = option(
        "off", DURATION, "Server", "Log what keeps the event loop for longer than this", hidden=True
    )
    authorizer: str = option(
        "",
        CLASS,
        "Users",
        "A class of your own, derived from any of pyftpdlib's authorizers, decides who may log in",
        never_empty=True,
    )
    auth_proxy: str = option(
        "",
        TEXT,
        "Users",
        "A program to use to find the user's backend from name and password",
        never_empty=True,
    )
    max_cons: int = option("512", COUNT, "Limits", "Most sessions at once; 0 is no limit")
    max_cons_per_ip: int = option("0", COUNT, "Limits", "Most sessions at once from one address; 0 is no limit")
    max_login_attempts: int = option("3", POSITIVE, "Limits", "Wrong passwords after which a session is closed")
    ban_after: int = option(
        "20", COUNT, "Limits", "Wrong passwords from one address after which it is refused; 0 is never"
    )
    ban_window: float | None = option("10m", DURATION, "Limits", "Time in which they have to come for that")
    ban_time: float | None = option("10m", DURATION, "Limits", "Time for which an address is refused")
    login_timeout: float | None = option("1m", DURATION, "Limits", "Time to log in, after which a session is closed")
    idle_timeout: float | None = option(
        "5m", DURATION, "Limits", "Time without a command, after which a session is closed"
    )
    transfer_timeout: float | None = option(
        "5m", DURATION, "Limits", "Time for which nothing moves, after which a transfer is ended"
    )
    bwlimit: Bandwidth = option(
        "off",
        BANDWIDTH,
        "Limits",
        "Bytes a second of each file transfer, as RATE or UP:DOWN (from clients, to clients)",
    )
    proxy_protocol_from: tuple[Network, ...] = option(
        "",
        NETWORKS,
        "Server",
        "Addresses and networks of load balancers that tell the client's own by PROXY protocol",
    )


@dataclass(frozen=True)
class TLSOptions:
    """FTPS: ini section [tls], and what a [listener:NAME] may say otherwise (under the flags' names)."""

    mode: str | None = option(
        None,
        TLS_MODE,
        "TLS",
        "off, explicit (AUTH TLS may be used), required (it must be) or implicit (TLS from the first byte)",
        shown="`implicit` with a certificate, else `off`",
        flag="tls-mode",
    )
    cert: str = option(
        "",
        PATH,
        "TLS",
        "TLS PEM certificate, followed by those of its CAs; the key may be in it, too",
        never_empty=True,
    )
    key: str = option("", PATH, "TLS", "TLS PEM private key", never_empty=True)
    client_ca: str = option(
        "",
        PATH,
        "TLS",
        "PEM certificates of CAs; clients must show a certificate of one of them",
        never_empty=True,
    )
    min_version: str = option(
        "tls1.2", TLS_VERSION, "TLS", "Minimum TLS version: tls1.2 or tls1.3", flag="min-tls-version"
    )
    strict_eof: bool = option(
        "on",
        SWITCH,
        "TLS",
        "Refuse uploads that end without close_notify: they may have been cut; off is for old clients",
        flag="tls-strict-eof",
    )
    require_reuse: bool = option(
        "false",
        BOOL,
        "TLS",
        "Refuse data connections that do not resume the control connection's TLS session",
        flag="require-tls-reuse",
    )


@dataclass(frozen=True)
class VFSOptions:
    """The options of a VFS: ini section [vfs], and the keywords of `VFS`. Seconds, bytes; None means off."""

    cache_mode: str = option(
        "off", CACHE_MODE, "VFS", "What goes through the disk cache: off, minimal, writes, full", flag="vfs-cache-mode"
    )
    cache_dir: str = option(
        None,
        PATH,
        "VFS",
        "Folder for the index and what else is kept on disk",
        shown="`ftpvfs` in the user's cache folder",
        never_empty=True,
        factory=_cache_dir,
    )
    name: str | None = option(
        None,
        NAME,
        "VFS",
        "Name of this VFS in the cache folder; keeps its state when the URL is written differently",
        shown="from the URL",
    )
    dir_cache_time: float | None = option("5m", DURATION, "VFS", "Time to cache directory entries for; off is for ever")
    poll_interval: float | None = option(
        "1m", DURATION, "VFS", "Time between re-reading the directories in use; 0 or off disables it"
    )
    refresh: bool = option("false", BOOL, "VFS", "Read all directories in the background on start", flag="vfs-refresh")
    case_insensitive: bool = option(
        "false",
        BOOL,
        "VFS",
        "If a name is not found, find one that differs in case alone",
        flag="vfs-case-insensitive",
    )
    no_unicode_normalization: bool = option(
        "false", BOOL, "VFS", "Don't match names that differ in their Unicode form alone"
    )
    uid: int | None = option(None, ID, "VFS", "Owner that all files show", shown="the process's")
    gid: int | None = option(None, ID, "VFS", "Group that all files show", shown="the process's")
    umask: int = option("022", MODE, "VFS", "Permission bits taken from all files and directories")
    dir_perms: int = option("777", MODE, "VFS", "Directory permissions, before the umask")
    file_perms: int = option("666", MODE, "VFS", "File permissions, before the umask")
    no_modtime: bool = option("false", BOOL, "VFS", "Don't read or write the modification time (can speed things up)")
    use_server_modtime: bool = option(
        "false", BOOL, "VFS", "Use the store's upload time instead of the modification time in metadata"
    )
    read_only: bool = option("false", BOOL, "VFS", "Only allow read-only access")
    no_seek: bool = option("false", BOOL, "VFS", "Don't allow seeking in files")
    no_checksum: bool = option(
        "false", BOOL, "VFS", "Don't compare hashes and sizes after an upload, nor hashes at a download"
    )
    disk_space_total_size: int | None = option(
        "off", SIZE, "VFS", "The total space of the disk to show", flag="vfs-disk-space-total-size"
    )
    dir_markers: bool = option(
        "false", BOOL, "VFS", "Keep made folders as empty objects `name/`, which other programs see too"
    )
    copy_links: bool = option(
        "false", BOOL, "VFS", "Follow symbolic links of a local store, else they are left out", short="L"
    )
    cache_max_age: float | None = option(
        "1h",
        DURATION,
        "VFS",
        "Max time since last access of objects in the cache",
        flag="vfs-cache-max-age",
    )
    cache_max_size: int | None = option(
        "off", SIZE, "VFS", "Max total size of objects in the cache", flag="vfs-cache-max-size"
    )
    cache_min_free_space: int | None = option(
        "off",
        SIZE,
        "VFS",
        "Target minimum free space on the disk containing the cache",
        flag="vfs-cache-min-free-space",
    )
    cache_poll_interval: float | None = option(
        "1m",
        DURATION,
        "VFS",
        "Interval to look for what goes from the cache",
        flag="vfs-cache-poll-interval",
    )
    cache_sync: bool = option(
        "on",
        SWITCH,
        "VFS",
        "What is acknowledged survives a power cut, not only the end of the process",
        flag="vfs-cache-sync",
    )
    write_back: float | None = option(
        "5s",
        DURATION,
        "VFS",
        "Time after its last use in which a file waits to be uploaded",
        flag="vfs-write-back",
    )
    ack: str = option("cache", ACK, "VFS", "Where an upload is safe when it is acknowledged, in modes writes and full")
    conflict: str = option(
        "overwrite",
        CONFLICT,
        "VFS",
        "When an object was changed at the store while its new version waited to be uploaded",
        flag="vfs-conflict",
    )
    keep_partial: str = option(
        "cache", KEEP_PARTIAL, "VFS", "What becomes of an interrupted upload, which a client may resume"
    )
    max_rename_objects: int = option(
        "10000", COUNT, "VFS", "Refuse to rename a folder of more objects, where that means copying each"
    )
    buffer_size: int | None = option(
        "16Mi", SIZE, "Performance", "Memory for reading ahead, each transfer; 0 or off reads none"
    )
    max_buffer_memory: int | None = option(
        "128Mi", SIZE, "Performance", "Memory for the buffers of all transfers together; off is no limit"
    )
    read_chunk_size: int | None = option(
        "128Mi",
        SIZE,
        "Performance",
        "Largest range to ask the store for at first; 0 or off asks for all the rest",
        flag="vfs-read-chunk-size",
    )
    read_chunk_size_limit: int | None = option(
        "off",
        SIZE,
        "Performance",
        "Chunks double after each one read up to this size; off is no limit",
        flag="vfs-read-chunk-size-limit",
    )
    read_chunk_streams: int = option(
        "0",
        COUNT,
        "Performance",
        "Parallel streams for reading one file; 0 grows up to 4 as the transfer goes on",
        flag="vfs-read-chunk-streams",
    )
    checkers: int = option("8", POSITIVE, "Performance", "Metadata requests and server-side copies to run in parallel")
    read_ahead: int | None = option(
        "0",
        SIZE,
        "Performance",
        "Extra read ahead over --buffer-size, on disk, in mode full",
        flag="vfs-read-ahead",
    )
    transfers: int = option("4", POSITIVE, "Performance", "Uploads from the cache to run in parallel")
    on_received: str | Callable[..., Any] = option(
        "", CALLBACK, "Events", "Command to run, or URL to post to, when an upload has arrived"
    )
    on_stored: str | Callable[..., Any] = option(
        "", CALLBACK, "Events", "Command to run, or URL to post to, when a file is in the store"
    )
    on_failed: str | Callable[..., Any] = option(
        "", CALLBACK, "Events", "Command to run, or URL to post to, when a file cannot be stored"
    )
    failed_after: int = option(
        "10", POSITIVE, "Events", "Tries after which --on-failed runs; a file is tried again all the same"
    )
    low_level_retries: int = option("10", COUNT, "Networking", "Tries of a request that the store may answer next time")
    contimeout: float | None = option("1m", DURATION, "Networking", "Time to wait for a connection")
    timeout: float | None = option("5m", DURATION, "Networking", "Time to wait for an answer of the store")


@dataclass(frozen=True)
class LogOptions:
    """What is logged and where: ini section [log]."""

    level: str = option("NOTICE", LOG_LEVEL, "Logging", "Log level DEBUG, INFO, NOTICE or ERROR", flag="log-level")
    file: str = option("", PATH, "Logging", "Log to this file instead of standard error", flag="log-file")
    format: str = option(
        "text", LOG_FORMAT, "Logging", "One line of text or one JSON object an entry", flag="log-format"
    )


@dataclass(frozen=True)
class User:
    """Who may log in: ini section [user:NAME]. Without a password and a hash every password is right.

    `url` and `storage_options` (as they were written) are a backend of the user's own; empty means that of all.
    """

    name: str = ""
    password: str | None = option(
        None, TEXT, "Users", "The password in clear; better keep a hash of it", secret=True, never_empty=True
    )
    password_hash: str | None = option(
        None, PASSWORD_HASH, "Users", "The password's argon2 hash, which `ftpvfs hash-password` makes", secret=True
    )
    home: str = option(
        "/", HOME, "Users", "Folder in which the user is kept; made when it is first written to", never_empty=True
    )
    perm: str = option(
        PERMISSIONS,
        PERMS,
        "Users",
        "pyftpdlib's letters: enter, list, read; append, delete, rename (f), make folders, write, mode (M), time (T)",
    )
    url: str = option(
        "",
        TEXT,
        "Users",
        "A backend of the user's own; `option.KEY` is a storage option for it",
        secret=True,
        never_empty=True,
    )
    cache_name: str | None = option(
        None, NAME, "Users", "What --name is for the common backend, for the user's own", shown="from the URL"
    )
    max_cons: int = option("0", COUNT, "Users", "Most sessions of the user at once, in all workers; 0 is no limit")
    bwlimit: Bandwidth = option(
        "off", BANDWIDTH, "Users", "Bytes a second of all the user's file transfers together, in all workers"
    )
    storage_options: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Listener:
    """Where to listen, and with what TLS, whose mode is never None here: ini section [listener:NAME]."""

    addr: Address
    tls: TLSOptions
    name: str = ""


SECTIONS: dict[str, type[Any]] = {
    "server": ServerOptions,
    "tls": TLSOptions,
    "vfs": VFSOptions,
    "log": LogOptions,
}
BACKEND = "backend"  # the one section with free keys: url, and a storage option for each other key


def _rows(section: str, options: type[Any]) -> Iterator[Option]:
    for each in dataclasses.fields(options):
        row: Option | None = each.metadata.get("option")
        if row is not None:
            yield dataclasses.replace(
                row,
                section=section,
                field=each.name,
                key=row.key or each.name,
                flag=row.flag or each.name.replace("_", "-"),
            )


OPTIONS = tuple(row for section, options in SECTIONS.items() for row in _rows(section, options))
# Rows of sections that may be there several times, and so are neither flags nor variables.
USER, LISTENER = "user", "listener"
USER_OPTIONS = tuple(dataclasses.replace(row, flag="") for row in _rows(f"{USER}:NAME", User))
LISTENER_OPTIONS = tuple(
    dataclasses.replace(row, section=f"{LISTENER}:NAME", key=row.flag.replace("-", "_"), flag="", group="Listeners")
    for row in OPTIONS
    if row.section == "tls" or row.field == "addr"
)
URL_OPTION = Option(
    kind=TEXT,
    group="Backend",
    meaning="What to serve: a folder, or any fsspec URL such as `s3://bucket/prefix`",
    default=".",
    shown="",
    flag="url",
    short="",
    secret=True,  # it may hold a password
    never_empty=True,
    section=BACKEND,
    field="url",
    key="url",
)


@dataclass(frozen=True)
class Config:
    """Everything the command line, the environment and the ini file say. `warnings` are for the log.

    Storage options are as they were written: what type each has is known to its store alone.
    """

    command: str = "serve"
    topic: str = ""  # the command that `help` is about; "" for all
    url: str = field(default=".", repr=False)
    storage_options: dict[str, str] = field(default_factory=dict, repr=False)
    vfs: VFSOptions = field(default_factory=VFSOptions)
    server: ServerOptions = field(default_factory=ServerOptions, repr=False)
    tls: TLSOptions = field(default_factory=TLSOptions)
    log: LogOptions = field(default_factory=LogOptions)
    users: tuple[User, ...] = ()  # all who may log in; none where a program or a class decides
    listeners: tuple[Listener, ...] = ()
    file: str = ""
    json: bool = False  # for `cache ls`
    warnings: tuple[str, ...] = ()


def vfs_options(**keywords: Any) -> VFSOptions:
    """The options of a VFS from keywords, as text (`"5m"`, `"10G"`) or as numbers (seconds, bytes).

    A keyword is a flag with `_` for `-`, with its `vfs_` or without. Raises TypeError where one is given in both forms,
    ConfigError for one that is unknown or has a value that cannot be right.
    """
    rows = [row for row in OPTIONS if row.section == "vfs"]
    known = {name: row for row in rows for name in (row.field, row.flag.replace("-", "_"))}
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, value in keywords.items():
        if name not in known:
            hint = f"the nearest known one is {nearest(name, known)}; the store's own options go into storage_options"
            raise ConfigError(f"unknown keyword {name}; {hint}")
        row = known[name]
        if row.field in values:
            raise TypeError(f"{' and '.join(sorted([names[row.field], name]))} are the same option; give one of them")
        names[row.field], values[row.field] = name, row.take(value, f"keyword {name}")
    options = VFSOptions(**values)
    check_cache_dir(options)
    return options


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like the unknown one."""
    return max(known, key=lambda each: difflib.SequenceMatcher(None, word.lower(), each.lower()).ratio())
