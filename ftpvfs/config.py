"""The one table of options: flags, variables, ini keys, `VFS` keywords and the README's reference.

The fields of `ServerOptions`, `VFSOptions` and `LogOptions` are the table. Sizes, durations, modes and
addresses are written as rclone writes them and exist as text only here: everybody else gets bytes, seconds
and numbers. What does not parse, and what is not known, raises `ConfigError`, whose one line names the source
(flag, variable or file.ini:line), the key, the value unless it is secret, and what would be right.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import ipaddress
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import iniconfig
import platformdirs

PREFIX = "FTPVFS_"
COMMANDS = ("serve", "check-config")
LARGEST = 2**63 - 1  # rclone's sizes and durations (in nanoseconds) are 64 bit numbers


class ConfigError(ValueError):
    """An option that is unknown or has a value that cannot be right; the message is one line."""


class Address(NamedTuple):
    """Where to listen; an empty host means every interface, port 0 means any free port."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; a host name other than localhost counts as reachable."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


# --- values ---------------------------------------------------------------------------------------
# Parsers raise ValueError with what is wrong and what would be right; the value itself stays out of the
# message, because it may be secret. Each formatter writes what its parser reads back as the same value.

NUMBER = r"\d+\.?\d*|\.\d+"
SIZE_UNITS = {unit: 1024**power for power, unit in enumerate(["B", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"])}
SIZE_FORM = re.compile(rf"({NUMBER})(?:b|([kmgtpe])(?:ib?)?)?", re.IGNORECASE)
SECOND = 10**9
DURATION_UNITS = {
    "ns": 1,
    "us": 10**3,
    "\N{MICRO SIGN}s": 10**3,
    "\N{GREEK SMALL LETTER MU}s": 10**3,
    "ms": 10**6,
    "s": SECOND,
    "m": 60 * SECOND,
    "h": 3600 * SECOND,
    "d": 24 * 3600 * SECOND,
    "w": 7 * 24 * 3600 * SECOND,
    "M": 30 * 24 * 3600 * SECOND,
    "y": 365 * 24 * 3600 * SECOND,
}
LONGEST_FIRST = sorted(DURATION_UNITS, key=len, reverse=True)
DURATION_PART = re.compile(rf"({NUMBER})({'|'.join(LONGEST_FIRST)})", re.ASCII)
TRUE = {"1", "t", "true", "yes", "on"}
FALSE = {"0", "f", "false", "no", "off"}


def parse_size(text: str) -> int | None:
    """Bytes of a size such as `10G` (all units are powers of 1024, a bare number is KiB); None for `off`."""
    if text.lower() == "off":
        return None
    match = SIZE_FORM.fullmatch(text)
    if not match or not text.isascii():
        raise ValueError("is no size; write for example 10G, 128Mi, 1.5M, 100B, 64 (KiB) or off")
    unit = (match[2] or "").upper()
    if unit:
        factor = SIZE_UNITS[f"{unit.capitalize()}i"]
    else:
        factor = 1 if text[-1] in "bB" else 1024
    size = int(Fraction(match[1]) * factor)
    if size > LARGEST:
        raise ValueError("is too large a size; write off for no limit")
    return size


def format_size(size: int | None) -> str:
    """The size in the largest unit that shows it exactly."""
    if size is None:
        return "off"
    for unit, factor in reversed(SIZE_UNITS.items()):
        if size >= factor and size * 1000 % factor == 0:
            return _decimal(Fraction(size, factor)) + unit
    return str(size)


def parse_duration(text: str) -> float | None:
    """Seconds of a duration such as `1h30m` or `5d` (a bare number is seconds); None for `off`."""
    if text.lower() == "off":
        return None
    if text.isascii() and re.fullmatch(NUMBER, text):
        nanoseconds = int(Fraction(text) * SECOND)
    else:
        parts = DURATION_PART.findall(text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            raise ValueError("is no duration; write for example 1h30m, 5m, 500ms, 5d, 90 (seconds) or off")
        nanoseconds = int(sum(Fraction(number) * DURATION_UNITS[unit] for number, unit in parts))
    if nanoseconds > LARGEST:
        raise ValueError("is too long a duration; write off for no limit")
    return nanoseconds / SECOND


def format_duration(seconds: float | None) -> str:
    """The duration as rclone prints it: `5m0s`, `1h30m0s`, `1.5d`, `off`."""
    if seconds is None:
        return "off"
    if not math.isfinite(seconds) or seconds < 0:
        return str(seconds)
    nanoseconds = round(Fraction(seconds) * SECOND)
    for unit in ("y", "M", "w", "d"):
        factor = DURATION_UNITS[unit]
        if nanoseconds >= factor and nanoseconds * 1000 % factor == 0:
            return _decimal(Fraction(nanoseconds, factor)) + unit
    if 0 < nanoseconds < SECOND:
        unit = next(unit for unit in ("ms", "us", "ns") if nanoseconds >= DURATION_UNITS[unit])
        return _decimal(Fraction(nanoseconds, DURATION_UNITS[unit])) + unit
    minutes, rest = divmod(nanoseconds, 60 * SECOND)
    hours, minutes = divmod(minutes, 60)
    text = _decimal(Fraction(rest, SECOND)) + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def _decimal(number: Fraction) -> str:
    """The number in decimals, without an exponent or idle zeros; at most nine places are needed here."""
    whole, rest = divmod(round(number * 10**9), 10**9)
    return f"{whole}.{rest:09d}".rstrip("0").rstrip(".")


def parse_mode(text: str) -> int:
    """Permission bits from octal digits."""
    if not re.fullmatch(r"[0-7]{1,5}", text) or int(text, 8) > 0o7777:
        raise ValueError("is no octal mode; write for example 022 or 777")
    return int(text, 8)


def parse_bool(text: str) -> bool:
    """A boolean as Go reads it, and yes/no/on/off."""
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise ValueError("is neither true nor false; write true or false")


def parse_address(text: str) -> Address:
    """The host and port of `:2121` (all interfaces), `localhost:2121` or `[::1]:2121`."""
    match = re.fullmatch(r"(?:\[([^][/]+)\]|([^][:/\s]*))(?::(\d{1,5}))?", text, re.ASCII)
    if match and match[3] is None:
        raise ValueError("has no port; write for example :2121, localhost:2121 or [::1]:2121")
    if not match or int(match[3]) > 65535 or (match[1] and not _is_ipv6(match[1])):
        raise ValueError("is no address; write for example :2121, localhost:2121 or [::1]:2121")
    return Address(match[1] or match[2], int(match[3]))


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def format_address(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_ports(text: str) -> range:
    """The ports of `30000-32000`, both ends included, or of a single port."""
    match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", text, re.ASCII)
    if not match:
        raise ValueError("is no port range; write for example 30000-32000 or a single port")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last <= 65535:
        raise ValueError("is no port range; ports go from 1 to 65535, the lower one first, as in 30000-32000")
    return range(first, last + 1)


def format_ports(ports: range) -> str:
    return str(ports[0]) if len(ports) == 1 else f"{ports[0]}-{ports[-1]}"


def parse_public_ip(text: str) -> str:
    """An IPv4 address: PASV, the only reply that carries it, has room for nothing else."""
    try:
        return str(ipaddress.IPv4Address(text)) if text else ""
    except ValueError:
        raise ValueError("is no IPv4 address; write for example 203.0.113.7") from None


def parse_name(text: str) -> str:
    if not re.fullmatch(r"[^/\x00-\x1f]+", text) or text in (".", ".."):
        raise ValueError("is no name for a cache; write a word without a slash, such as photos")
    return text


def parse_user(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("is no user name; write for example anonymous")
    return text


def parse_text(text: str) -> str:
    return text


def parse_path(text: str) -> str:
    """A path on this machine, `~` expanded; empty stays empty."""
    return str(Path(text).expanduser()) if text else ""


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """A parser of whole numbers between low and high, both included."""

    def parse_integer(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", text) or not low <= int(text) <= high:
            raise ValueError(f"is no whole number from {low} to {high}")
        return int(text)

    return parse_integer


def choice(*choices: str, later: Sequence[str] = ()) -> Callable[[str], str]:
    """A parser of one of several words in any case; those named `later` are promised, but do not work yet."""

    def parse_choice(text: str) -> str:
        for known in choices:
            if text.lower() == known.lower():
                return known
        if text.lower() in later:
            raise ValueError(f"is not available yet; write {' or '.join(choices)}")
        raise ValueError(f"is not known; write {' or '.join(choices)}")

    return parse_choice


@dataclass(frozen=True)
class Kind:
    """How values of one type are read and written; `natives` are the types a keyword may have besides str."""

    name: str  # as in rclone's help
    parse: Callable[[str], Any]
    format: Callable[[Any], str] = str
    natives: tuple[type, ...] = ()


SIZE = Kind("SizeSuffix", parse_size, format_size, (int, type(None)))
DURATION = Kind("Duration", parse_duration, format_duration, (int, float, type(None)))
MODE = Kind("FileMode", parse_mode, lambda mode: f"{mode:03o}", (int,))
BOOL = Kind("bool", parse_bool, lambda value: str(value).lower(), (bool,))
COUNT = Kind("int", integer(0), str, (int,))
POSITIVE = Kind("int", integer(1), str, (int,))
ID = Kind("uint32", integer(0, 2**32 - 1), str, (int, type(None)))
TEXT = Kind("string", parse_text)
PATH = Kind("string", parse_path, str, (Path,))
NAME = Kind("string", parse_name, str, (type(None),))
USER = Kind("string", parse_user)
ADDRESS = Kind("string", parse_address, format_address)
PORTS = Kind("string", parse_ports, format_ports)
PUBLIC_IP = Kind("string", parse_public_ip)
CACHE_MODE = Kind("CacheMode", choice("off", later=("minimal", "writes", "full")))
LOG_LEVEL = Kind("LogLevel", choice("DEBUG", "INFO", "NOTICE", "ERROR"))


# --- the table ------------------------------------------------------------------------------------


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
    section: str = ""
    field: str = ""
    key: str = ""

    @property
    def variable(self) -> str:
        return PREFIX + self.flag.upper().replace("-", "_")

    def read(self, text: str, source: str) -> Any:
        """The value that the text stands for; ConfigError names the source."""
        try:
            return self.kind.parse(text)
        except ValueError as error:
            raise ConfigError(f"{source}: {'the value' if self.secret else repr(text)} {error}") from None

    def take(self, value: Any, source: str) -> Any:
        """The value of a keyword, either as text or in its own type."""
        if isinstance(value, str):
            return self.read(value, source)
        if not isinstance(value, self.kind.natives) or (isinstance(value, bool) and self.kind is not BOOL):
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
    factory: Callable[[], Any] | None = None,
) -> Any:
    """A dataclass field that is a row of the table; flag and ini key follow from its name unless given.

    `shown` describes a default found out at run time, by `factory` or where it is used (then it is None).
    """
    row = Option(kind, group, meaning, default, shown, flag, short, secret, key=key)
    if factory:
        return field(default_factory=factory, metadata={"option": row})
    value = None if default is None else kind.parse(default)
    return field(default=value, repr=not secret, metadata={"option": row})


def _cache_dir() -> str:
    return platformdirs.user_cache_dir("ftpvfs", appauthor=False)


@dataclass(frozen=True)
class ServerOptions:
    """The FTP server's own options: ini section [server]."""

    addr: Address = option(  # noqa: RUF009 - a field like the others
        "localhost:2121",
        ADDRESS,
        "Server",
        "IP:port or :port (all interfaces) to listen on; port 0 is any free one",
    )
    user: str = option("anonymous", USER, "Server", "User name for authentication")
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
    public_ip: str = option("", PUBLIC_IP, "Server", "Public IP address to advertise for passive connections")


@dataclass(frozen=True)
class VFSOptions:
    """The options of a VFS: ini section [vfs], and the keywords of `VFS`. Seconds, bytes; None means off."""

    cache_mode: str = option(
        "off", CACHE_MODE, "VFS", "What goes through the disk cache; only off so far", flag="vfs-cache-mode"
    )
    cache_dir: str = option(
        None,
        PATH,
        "VFS",
        "Folder for the index and what else is kept on disk",
        shown="`ftpvfs` in the user's cache folder",
        factory=_cache_dir,
    )
    name: str | None = option(
        None,
        NAME,
        "VFS",
        "Name of this VFS in the cache folder; keeps its state when the URL is written differently",
        shown="from the URL",
    )
    dir_cache_time: float | None = option(
        "5m", DURATION, "VFS", "Time to cache directory entries for; off is for ever"
    )
    poll_interval: float | None = option(
        "1m", DURATION, "VFS", "Time between re-reading the directories in use; 0 or off disables it"
    )
    refresh: bool = option(
        "false", BOOL, "VFS", "Read all directories in the background on start", flag="vfs-refresh"
    )
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
    no_modtime: bool = option(
        "false", BOOL, "VFS", "Don't read or write the modification time (can speed things up)"
    )
    use_server_modtime: bool = option(
        "false", BOOL, "VFS", "Use the store's upload time instead of the modification time in metadata"
    )
    read_only: bool = option("false", BOOL, "VFS", "Only allow read-only access")
    no_seek: bool = option("false", BOOL, "VFS", "Don't allow seeking in files")
    no_checksum: bool = option("false", BOOL, "VFS", "Don't check hash or size after an upload")
    disk_space_total_size: int | None = option(
        "off", SIZE, "VFS", "The total space of the disk to show", flag="vfs-disk-space-total-size"
    )
    dir_markers: bool = option(
        "false", BOOL, "VFS", "Keep made folders as empty objects `name/`, which other programs see too"
    )
    copy_links: bool = option(
        "false", BOOL, "VFS", "Follow symbolic links of a local store, else they are left out", short="L"
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
    checkers: int = option(
        "8", POSITIVE, "Performance", "Metadata requests and server-side copies to run in parallel"
    )
    low_level_retries: int = option(
        "10", COUNT, "Networking", "Tries of a request that the store may answer next time"
    )
    contimeout: float | None = option("1m", DURATION, "Networking", "Time to wait for a connection")
    timeout: float | None = option("5m", DURATION, "Networking", "Time to wait for an answer of the store")


@dataclass(frozen=True)
class LogOptions:
    """What is logged and where: ini section [log]."""

    level: str = option(
        "NOTICE", LOG_LEVEL, "Logging", "Log level DEBUG, INFO, NOTICE or ERROR", flag="log-level"
    )
    file: str = option("", PATH, "Logging", "Log to this file instead of standard error", flag="log-file")


SECTIONS: dict[str, type[Any]] = {"server": ServerOptions, "vfs": VFSOptions, "log": LogOptions}
BACKEND = "backend"  # the one section with free keys: url, and a storage option for each other key


def _rows(section: str, options: type[Any]) -> Iterator[Option]:
    for each in dataclasses.fields(options):
        row: Option = each.metadata["option"]
        yield dataclasses.replace(
            row,
            section=section,
            field=each.name,
            key=row.key or each.name,
            flag=row.flag or each.name.replace("_", "-"),
        )


OPTIONS = tuple(row for section, options in SECTIONS.items() for row in _rows(section, options))
URL_OPTION = Option(
    kind=TEXT,
    group="Backend",
    meaning="What to serve: a folder, or any fsspec URL such as `s3://bucket/prefix`",
    default=".",
    shown="",
    flag="url",
    short="",
    secret=True,  # it may hold a password
    section=BACKEND,
    field="url",
    key="url",
)


@dataclass(frozen=True)
class Config:
    """Everything the command line, the environment and the ini file say. `warnings` are for the log."""

    command: str = "serve"
    url: str = field(default=".", repr=False)
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    vfs: VFSOptions = field(default_factory=VFSOptions)
    server: ServerOptions = field(default_factory=ServerOptions, repr=False)
    log: LogOptions = field(default_factory=LogOptions)
    file: str = ""
    warnings: tuple[str, ...] = ()


# --- keywords -------------------------------------------------------------------------------------


def vfs_options(**keywords: Any) -> VFSOptions:
    """The options of a VFS from keywords, as text (`"5m"`, `"10G"`) or as numbers (seconds, bytes)."""
    known = {row.field: row for row in OPTIONS if row.section == "vfs"}
    values = {}
    for name, value in keywords.items():
        if name not in known:
            raise ConfigError(f"unknown keyword {name}; the nearest known one is {nearest(name, known)}")
        values[name] = known[name].take(value, f"keyword {name}")
    return VFSOptions(**values)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like the unknown one."""
    return max(known, key=lambda each: difflib.SequenceMatcher(None, word.lower(), each.lower()).ratio())


# --- the command line -----------------------------------------------------------------------------

FLAGS = {f"--{row.flag}": row for row in OPTIONS}
OTHER_FLAGS = ("--config", "--option", "--verbose", "--version", "--help")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flag = re.match(r"argument (?:-\w/)?([\w-]+): ", message)
        if flag and message.endswith("expected one argument"):
            raise ConfigError(f"{flag[1]}: the value is missing; write {flag[1]}=VALUE")
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    # Positionals are what argparse leaves over: only so may they stand between the flags.
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for row in OPTIONS:
        parser.add_argument(f"--{row.flag}", dest=f"{row.section}.{row.field}")
    parser.add_argument("--config", dest="config")
    parser.add_argument("--option", dest="option", action="append", default=[])
    parser.add_argument("-v", "--verbose", dest="verbose", action="count", default=0)
    parser.add_argument("--version", dest="version", action="store_true", default=False)
    parser.add_argument("-h", "--help", dest="help", action="store_true", default=False)
    return parser


def _spell_out(argument: str) -> str:
    """A boolean flag with its value, so that it never takes the next argument for one."""
    for flag, row in FLAGS.items():
        if row.kind is BOOL and argument in (flag, f"-{row.short}"):
            return f"{flag}=true"
    return argument


@dataclass(frozen=True)
class _Arguments:
    flags: Mapping[str, Any]
    positionals: list[str]


def _parse_arguments(argv: Sequence[str]) -> _Arguments:
    end = argv.index("--") if "--" in argv else len(argv)
    known, rest = _parser().parse_known_args([_spell_out(argument) for argument in argv[:end]])
    for argument in rest:
        if argument.startswith("-"):
            name = re.split(r"[=\s]", argument)[0]  # what follows may be a secret
            near = nearest(name, [*FLAGS, *OTHER_FLAGS])
            raise ConfigError(f"unknown flag {name}; the nearest known one is {near}")
    return _Arguments(vars(known), [*rest, *argv[end + 1 :]])


def _command(positionals: Sequence[str]) -> tuple[str, list[str]]:
    command, rest = "serve", list(positionals)
    if rest and rest[0] in COMMANDS:
        command = rest.pop(0)
    if command == "check-config" and len(rest) != 1:
        raise ConfigError("check-config: name one ini file, as in check-config ftpvfs.ini")
    if len(rest) > 1:
        if rest == list(positionals):
            near = nearest(rest[0], COMMANDS)
            raise ConfigError(f"more than one URL, and no command before them; the nearest command is {near}")
        raise ConfigError("more than one URL; one is served at a time")
    return command, rest


# --- the ini file ---------------------------------------------------------------------------------

# A comment starts at a ; or # behind white space or at the line's start, so that `a;b` and `$argon2$x#y` are
# values. A JSON string may hold anything: the first half steps over it.
COMMENT = re.compile(r"""((?<=[\s=\[{,:])"(?:[^"\\]|\\.)*")|(?:^|\s)[;#].*""")


@dataclass
class _Ini:
    """What an ini file says, read as far as it could be; `problems` in the order of lines."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    storage_options: dict[str, Any] = field(default_factory=dict)
    problems: list[ConfigError] = field(default_factory=list)
    backend: str = ""  # where [backend] starts, for errors


def _read_ini(path: str) -> _Ini:
    found = _Ini()
    try:
        lines = _ini_lines(path)
        parsed = iniconfig.IniConfig.parse(path, data="\n".join(lines), strip_inline_comments=False)
    except iniconfig.ParseError as error:
        found.problems.append(ConfigError(f"{path}:{error.lineno + 1}: {_syntax(error.msg)}"))
        return found
    except ConfigError as error:
        found.problems.append(error)
        return found
    for section in parsed:
        where = f"{path}:{parsed.lineof(section.name)}"
        if section.name not in {*SECTIONS, BACKEND}:
            near = nearest(section.name, [*SECTIONS, BACKEND])
            found.problems.append(
                ConfigError(f"{where}: unknown section [{section.name}]; the nearest known one is [{near}]")
            )
            continue
        if section.name == BACKEND:
            found.backend = where
        for key, text in section.items():
            line = section.lineof(key) or 0
            try:
                _check_line(lines[line - 1], key, text, f"{path}:{line}")
                _read_key(found, section.name, key, text, f"{path}:{line}: {key} in [{section.name}]")
            except ConfigError as error:
                found.problems.append(error)
    return found


def _ini_lines(path: str) -> list[str]:
    """The file's lines without their comments; refuses what iniconfig would take for part of a value."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    written = [line.rstrip() for line in text.splitlines()]
    lines = [COMMENT.sub(lambda match: match[1] or "", line).rstrip() for line in written]
    for number, line in enumerate(lines, 1):
        if line.startswith("[") and not line.endswith("]"):
            raise ConfigError(f"{path}:{number}: a section has no end; write for example [server]")
        if line.endswith("=") and line.count("=") == 1 and line != written[number - 1]:
            # `pass = #1` must not become an empty password, which lets everybody in.
            key = line[:-1].strip()
            raise ConfigError(
                f"{path}:{number}: {key} has a comment for a value; write {key} =#1 if # belongs to it"
            )
    return lines


def _syntax(message: str) -> str:
    """iniconfig's complaint, without the line itself, which may hold a secret."""
    if message.startswith("duplicate name"):
        return f"{message.removeprefix('duplicate name ')} is repeated in its section; give it once"
    if message.startswith("duplicate section"):
        return f"section {message.removeprefix('duplicate section ')} is repeated; write it once"
    if message.startswith("no section"):
        return "a key before the first section; write for example [server] above it"
    if message.startswith("unexpected value"):
        return "an indented line; write key = value, not indented"
    return "no 'key = value' and no [section]; '=' is missing"


def _check_line(line: str, key: str, text: str, source: str) -> None:
    if not line.removeprefix(key).lstrip().startswith("="):
        raise ConfigError(f"{source}: {key} is not followed by '='; write key = value")
    if "\n" in text and not _is_json(text):
        raise ConfigError(f"{source}: {key} goes on in an indented line; write key = value, not indented")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _read_key(found: _Ini, section: str, key: str, text: str, source: str) -> None:
    if section == BACKEND and key != URL_OPTION.key:
        found.storage_options[key] = storage_value(text)
        return
    rows = {row.key: row for row in (*OPTIONS, URL_OPTION) if row.section == section}
    if key not in rows:
        raise ConfigError(f"{source}: unknown key; {_where_known(key, rows)}")
    found.values.setdefault(section, {})[rows[key].field] = rows[key].read(text, source)


def _where_known(key: str, rows: Mapping[str, Option]) -> str:
    for row in (*OPTIONS, URL_OPTION):
        if key in (row.key, row.flag.replace("-", "_")) and row.key not in rows:
            return f"{row.key} belongs in [{row.section}]"
    return f"the nearest known one is {nearest(key, rows)}"


def storage_value(text: str) -> Any:
    """A storage option's value: JSON where it parses as JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_file(path: str) -> list[ConfigError]:
    """All that is wrong with an ini file."""
    return _read_ini(path).problems


# --- all sources together -------------------------------------------------------------------------


def load(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """What the flags say, else the environment, else the ini file, else the table. Raises ConfigError.

    Commands are serve, check-config (its file in `Config.file`, unread), help and version.
    """
    arguments = _parse_arguments(argv)
    for command in ("help", "version"):
        if arguments.flags[command]:
            return Config(command)
    command, positionals = _command(arguments.positionals)
    if command == "check-config":
        return Config(command, file=positionals[0])

    flags = _read_flags(arguments)
    variables, warnings = _read_environment(environ)
    file = arguments.flags.get("config") or environ.get(f"{PREFIX}CONFIG", "")
    ini = _read_ini(file) if file else _Ini()
    if ini.problems:
        raise ini.problems[0]
    layers = [ini.values, variables, flags]
    values = {
        section: {name: value for layer in layers for name, value in layer.get(section, {}).items()}
        for section in (*SECTIONS, BACKEND)
    }
    storage_options = {**ini.storage_options, **_read_options(arguments.flags["option"])}
    url = positionals[0] if positionals else values[BACKEND].get("url", "")
    if storage_options and not url:
        source = "--option" if arguments.flags["option"] else f"{ini.backend}: [backend]"
        raise ConfigError(f"{source}: storage options but no URL; write for example url = s3://bucket/prefix")
    sections = {section: options(**values[section]) for section, options in SECTIONS.items()}
    return Config(command, url or ".", storage_options, **sections, file=file, warnings=tuple(warnings))


def _read_flags(arguments: _Arguments) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for flag, row in FLAGS.items():
        text = arguments.flags.get(f"{row.section}.{row.field}")
        if text is not None:
            values.setdefault(row.section, {})[row.field] = row.read(text, flag)
    if arguments.flags["verbose"]:
        if "level" in values.get("log", {}):
            raise ConfigError("--log-level: -v says the same; give one of them")
        values.setdefault("log", {})["level"] = "INFO" if arguments.flags["verbose"] == 1 else "DEBUG"
    return values


def _read_environment(environ: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The options' variables, and a warning for each other one. An empty variable counts as not set.

    A variable that looks like a slip is refused, but not every unknown one: Kubernetes sets
    FTPVFS_SERVICE_HOST, FTPVFS_PORT_2121_TCP and more beside a service of that name.
    """
    known = {row.variable: row for row in (*OPTIONS, URL_OPTION)}
    values: dict[str, dict[str, Any]] = {}
    warnings = []
    for name, text in environ.items():
        if not text or not name.startswith(PREFIX) or name == f"{PREFIX}CONFIG":
            continue
        if name in known:
            row = known[name]
            values.setdefault(row.section, {})[row.field] = row.read(text, name)
            continue
        near = nearest(name, [*known, f"{PREFIX}CONFIG"])
        likeness = difflib.SequenceMatcher(None, name.removeprefix(PREFIX), near.removeprefix(PREFIX)).ratio()
        if likeness > 0.8:
            raise ConfigError(f"unknown variable {name}; the nearest known one is {near}")
        warnings.append(f"the variable {name} is not known and has no effect")
    return values, warnings


def _read_options(pairs: Iterable[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ConfigError("--option: no KEY=VALUE; write for example --option anon=true")
        options[key] = storage_value(text)
    return options


# --- help and reference ---------------------------------------------------------------------------


class _Entry(NamedTuple):
    """What help and reference say about one option."""

    group: str
    flag: str
    short: str
    kind: str
    key: str
    variable: str
    default: str
    meaning: str


def _entry(row: Option) -> _Entry:
    default = row.shown
    if row.default:
        default = f"`{row.kind.format(row.kind.parse(row.default))}`"
    kind = "" if row.kind is BOOL else row.kind.name
    key = f"[{row.section}] {row.key}"
    return _Entry(row.group, row.flag, row.short, kind, key, row.variable, default, row.meaning)


def _entries() -> list[_Entry]:
    config = f"{PREFIX}CONFIG"
    return [
        *(_entry(row) for row in OPTIONS),
        _Entry("Logging", "verbose", "v", "", "", "", "", "Log level INFO; -vv is DEBUG"),
        _entry(URL_OPTION)._replace(flag=""),
        _Entry(
            "Backend",
            "option",
            "",
            "KEY=VALUE",
            "[backend] KEY",
            "",
            "",
            "A storage option for fsspec, JSON where it parses as JSON; repeatable",
        ),
        _Entry("Configuration", "config", "", "FILE", "", config, "", "Read options from this ini file"),
        _Entry("Configuration", "version", "", "", "", "", "", "Print the version"),
        _Entry("Configuration", "help", "h", "", "", "", "", "Print this help"),
    ]


def help_text() -> str:
    """What --help prints: each group's flags with their types, meanings and defaults."""
    entries = [entry for entry in _entries() if entry.flag]
    heads = {
        entry: f"{f'-{entry.short},' if entry.short else '':>5} --{entry.flag} {entry.kind}"
        for entry in entries
    }
    width = max(map(len, heads.values())) + 2
    out = [
        "Serve a folder, a bucket or any other fsspec store over FTP.",
        "",
        "Usage:",
        "  ftpvfs [serve] [URL] [flags]     URL is a folder (default: the current one) or e.g. s3://bucket/prefix",
        "  ftpvfs check-config FILE",
        "",
        f"Each flag is also a variable, --read-only is {PREFIX}READ_ONLY, and a key in the ini file.",
    ]
    for group in dict.fromkeys(entry.group for entry in entries):
        out += ["", f"{group} flags:"]
        for entry in entries:
            if entry.group == group:
                default = "" if entry.default in ("", "`false`", "`0`") else f" (default {entry.default})"
                text = (entry.meaning + default).replace("`", "")
                head, indent = heads[entry].ljust(width), " " * width
                out += textwrap.wrap(text, 110, initial_indent=head, subsequent_indent=indent)
    return "\n".join(out) + "\n"


def reference() -> str:
    """The README's tables of options, one a group, in Markdown."""
    entries = _entries()
    out = []
    for group in dict.fromkeys(entry.group for entry in entries):
        out += [f"**{group}**", "", "| Flag | Ini | Variable | Default | Meaning |", "|---|---|---|---|---|"]
        for entry in entries:
            if entry.group == group:
                out.append("| " + " | ".join(_cells(entry)) + " |")
        out.append("")
    return "\n".join(out)


def _cells(entry: _Entry) -> Iterator[str]:
    short = f"`-{entry.short}`, " if entry.short else ""
    yield f"{short}`--{entry.flag}{' ' + entry.kind if entry.kind else ''}`" if entry.flag else "`URL`"
    yield f"`{entry.key}`" if entry.key else ""
    yield f"`{entry.variable}`" if entry.variable else ""
    yield entry.default
    yield entry.meaning.replace("|", "\\|")


BEGIN, END = "<!-- options -->", "<!-- /options -->"


def with_reference(readme: str) -> str:
    """The README's text with the current reference between its two markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"no {BEGIN} followed by {END}")
    return f"{before}{begin}\n{reference()}\n{end}{after}"


def main(argv: Sequence[str]) -> int:
    """`python -m ftpvfs.config README.md` writes the reference into the README."""
    for name in argv:
        path = Path(name)
        path.write_text(with_reference(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
