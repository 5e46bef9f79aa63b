"""How the options' values are written and read: sizes, durations, modes, addresses and the rest.

Parsers raise ValueError with what is wrong and what would be right; the value itself stays out of the message,
because it may be secret. Each formatter writes what its parser reads back as the same value. Pure.
"""

from __future__ import annotations

import base64
import ipaddress
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from ftpvfs import paths

LARGEST = 2**63 - 1  # rclone's sizes and durations (in nanoseconds) are 64 bit numbers


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


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
PERMISSIONS = "elradfmwMT"  # pyftpdlib's: change folder, list, read; append, delete, rename, mkdir, write, mode, time
# More processes than any machine has processors for; each takes tens of megabytes.
MOST_WORKERS = 256
# `$argon2id$v=19$m=65536,t=3,p=4$salt$hash`, the form that argon2's own programs write.
ARGON2 = re.compile(r"\$argon2(id|i|d)\$(v=\d+\$)?m=\d+,t=\d+,p=\d+\$[A-Za-z0-9+/]+\$[A-Za-z0-9+/]+", re.ASCII)
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


class PublicIP(NamedTuple):
    """What PASV tells clients to connect to: an IPv4 address or a host name that has one, or "" for the address that
    the client reached. `networks` tells clients from there something else; the first that fits counts.
    """

    host: str = ""
    networks: tuple[tuple[Network, str], ...] = ()

    def host_for(self, client: str) -> str:
        """The host to tell a client at this address, "" for the address that it reached."""
        address = ipaddress.ip_address(client.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return next((host for network, host in self.networks if address in network), self.host)


def parse_public_ip(text: str) -> PublicIP:
    """`203.0.113.7`, or with other answers for clients from some networks `203.0.113.7,10.0.0.0/8=10.0.0.5`.

    PASV, the only reply that carries it, has room for IPv4 alone. `10.0.0.0/8=` is the address that the client reached.
    """
    host, networks = "", []
    for part in _split(text):
        network, equals, answer = part.rpartition("=")
        if answer and not _is_public_host(answer):
            raise ValueError("is no IPv4 address or host name; write for example 203.0.113.7")
        if equals:
            networks.append((parse_networks(network)[0], answer))
        elif host:
            raise ValueError("has two addresses; write the others as NETWORK=ADDRESS, as in 10.0.0.0/8=10.0.0.5")
        else:
            host = answer
    return PublicIP(host, tuple(networks))


def _is_public_host(host: str) -> bool:
    if re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            return False
        return True
    return re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*\.?", host) is not None


def format_public_ip(public_ip: PublicIP) -> str:
    networks = [f"{network}={host}" for network, host in public_ip.networks]
    return ",".join([*filter(None, [public_ip.host]), *networks])


def parse_networks(text: str) -> tuple[Network, ...]:
    """Addresses and networks with commas between them: `10.0.0.5,192.168.0.0/16,fd00::/8`."""
    try:
        return tuple(ipaddress.ip_network(part) for part in _split(text))
    except ValueError:
        raise ValueError("is no list of networks; write for example 10.0.0.5,192.168.0.0/16,fd00::/8") from None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text.strip() else []


def format_networks(networks: Sequence[Network]) -> str:
    return ",".join(map(str, networks))


class Bandwidth(NamedTuple):
    """Bytes a second that clients may send (up) and get (down); None is no limit."""

    up: int | None = None
    down: int | None = None


def parse_bandwidth(text: str) -> Bandwidth:
    """rclone's `10M` (both ways) or `UP:DOWN` as in `10M:100k`; a bare number is KiB, off or 0 is no limit."""
    up, colon, down = text.partition(":")
    try:
        rates = [parse_size(each) or None for each in ([up, down] if colon else [up, up])]
    except ValueError:
        raise ValueError("is no rate; write for example 10M (bytes a second), 10M:100k (up:down) or off") from None
    return Bandwidth(*rates)


def format_bandwidth(rate: tuple[int | None, int | None]) -> str:
    up, down = rate
    return format_size(up) if up == down else f"{format_size(up)}:{format_size(down)}"


def parse_name(text: str) -> str:
    # What begins with @ in the cache folder is no store's.
    if not re.fullmatch(r"[^/@\x00-\x1f][^/\x00-\x1f]*", text) or text in (".", ".."):
        raise ValueError("is no name for a cache; write a word without a slash and no @ before it, such as photos")
    return text


def parse_user(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("is no user name; write for example anonymous")
    return text


def parse_text(text: str) -> str:
    return text


def parse_home(text: str) -> str:
    home = paths.normalize(text)
    if home == "/" and text.strip("/"):
        raise ValueError("is the whole root, written so that it need not be meant; write / for that")
    return home


def parse_permissions(text: str) -> str:
    """pyftpdlib's letters, each once."""
    unknown = set(text) - set(PERMISSIONS)
    if unknown or not text:
        raise ValueError(f"is no permissions; write some of the letters {PERMISSIONS}")
    return "".join(letter for letter in PERMISSIONS if letter in text)


def parse_password_hash(text: str) -> str:
    if not ARGON2.fullmatch(text) or not all(map(_is_base64, text.split("$")[-2:])):
        raise ValueError("is no argon2 hash; python -m ftpvfs hash-password makes one")
    return text


def _is_base64(text: str) -> bool:
    """Tell whether the text is base64 without its `=`, as argon2 writes and takes it: nothing is left over."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return False
    return base64.b64encode(data).decode().rstrip("=") == text


def parse_class(text: str) -> str:
    if text and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", text):
        raise ValueError("names no class; write module:Class, for example mycompany.ftp:LdapAuthorizer")
    return text


def parse_path(text: str) -> str:
    """A path on this machine, `~` expanded; empty stays empty."""
    try:
        return str(Path(text).expanduser()) if text else ""
    except RuntimeError:  # a user id that no account has, without HOME
        raise ValueError("begins with a home folder that is not known; write the whole path, from / on") from None


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """A parser of whole numbers between low and high, both included."""

    def parse_integer(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", text) or not low <= int(text) <= high:
            raise ValueError(f"is no whole number from {low} to {high}")
        return int(text)

    return parse_integer


def choice(*choices: str) -> Callable[[str], str]:
    """A parser of one of several words in any case."""

    def parse_choice(text: str) -> str:
        for known in choices:
            if text.lower() == known.lower():
                return known
        raise ValueError(f"is not known; write {' or '.join(choices)}")

    return parse_choice


@dataclass(frozen=True)
class Kind:
    """How values of one type are read and written; `natives` are the types a keyword may have besides str.

    A keyword of one of the types in `objects` is taken as it is: it has no notation.
    """

    name: str  # as in rclone's help
    parse: Callable[[str], Any]
    format: Callable[[Any], str] = str
    natives: tuple[type, ...] = ()
    objects: tuple[Any, ...] = ()


SIZE = Kind("SizeSuffix", parse_size, format_size, (int, type(None)))
DURATION = Kind("Duration", parse_duration, format_duration, (int, float, type(None)))
MODE = Kind("FileMode", parse_mode, lambda mode: f"{mode:03o}", (int,))
BOOL = Kind("bool", parse_bool, lambda value: str(value).lower(), (bool,))
SWITCH = Kind("on|off", parse_bool, lambda value: "on" if value else "off", (bool,))  # BOOL that wants its value
COUNT = Kind("int", integer(0), str, (int,))
POSITIVE = Kind("int", integer(1), str, (int,))
WORKERS = Kind("int", integer(1, MOST_WORKERS), str, (int,))
ID = Kind("uint32", integer(0, 2**32 - 1), str, (int, type(None)))
TEXT = Kind("string", parse_text)
PATH = Kind("string", parse_path, os.fspath, (os.PathLike,))
NAME = Kind("string", parse_name, str, (type(None),))
USER_NAME = Kind("string", parse_user)
ADDRESS = Kind("string", parse_address, format_address)
PORTS = Kind("string", parse_ports, format_ports)
PUBLIC_IP = Kind("string", parse_public_ip, format_public_ip)
NETWORKS = Kind("string", parse_networks, format_networks)
BANDWIDTH = Kind("BwPair", parse_bandwidth, format_bandwidth)
CLASS = Kind("module:Class", parse_class)
CALLBACK = Kind("string", parse_text, str, (), (Callable,))  # a command, a URL, or a callable
HOME = Kind("path", parse_home)
PERMS = Kind("letters", parse_permissions)
PASSWORD_HASH = Kind("string", parse_password_hash)
CACHE_MODE = Kind("CacheMode", choice("off", "minimal", "writes", "full"))
CONFLICT = Kind("overwrite|keep-both|fail", choice("overwrite", "keep-both", "fail"))
ACK = Kind("cache|store", choice("cache", "store"))
KEEP_PARTIAL = Kind("cache|discard", choice("cache", "discard"))
TLS_MODE = Kind("TLSMode", choice("off", "explicit", "required", "implicit"))
TLS_VERSION = Kind("string", choice("tls1.2", "tls1.3"))
LOG_LEVEL = Kind("LogLevel", choice("DEBUG", "INFO", "NOTICE", "ERROR"))
LOG_FORMAT = Kind("text|json", choice("text", "json"))
