"""Storage options: which ones a store knows, and what is meant by one that was written as text.

The store's class is asked, since fsspec's filesystems swallow what they do not know: a misspelt `endpoint_url` would
send the secret to another provider. Text stays text, digits and all, unless the option is known to be something else.
Nothing is contacted here, and nothing is made.
"""

from __future__ import annotations

import enum
import functools
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ftpvfs.backend.backend import filesystem_class, protocol_of
from ftpvfs.config import ConfigError, parse_bool
from ftpvfs.config.table import nearest


class Kind(enum.Enum):
    """What a storage option is; the value says how it is to be written."""

    TEXT = "text"
    FLAG = "true or false"
    NUMBER = "a number"
    JSON = 'JSON, such as {"name": "value"}'
    # Text that may also be a JSON object or list, true, false or null; never a number.
    EITHER = "text or JSON"


# What every fsspec filesystem takes, in its metaclass and for its cache of listings.
COMMON = {
    "use_listings_cache": Kind.FLAG,
    "listings_expiry_time": Kind.NUMBER,
    "max_paths": Kind.NUMBER,
    "skip_instance_cache": Kind.FLAG,
}
# The stores whose class takes any option, and passes on no other than these. (s3fs makes its session of the rest,
# which is made here.)
COMPLETE: dict[str, dict[str, Kind]] = {
    "s3": {"profile": Kind.TEXT},
    **{protocol: {} for protocol in ("gs", "memory", "zip", "tar", "libarchive", "ftp")},
}
# Protocols that are other names of one.
SAME = {"s3a": "s3", "gcs": "gs", "local": "file", "ssh": "sftp", "abfss": "abfs"}
# Types that no signature tells, most of them of libraries behind fsspec's class.
KNOWN: dict[str, dict[str, Kind]] = {
    "gs": {"token": Kind.EITHER, "check_connection": Kind.FLAG, "requester_pays": Kind.EITHER},
    "sftp": {
        **dict.fromkeys(("known_hosts", "client_keys", "client_certs", "agent_path", "config"), Kind.EITHER),
        **dict.fromkeys(("agent_forwarding", "preferred_auth", "kex_algs", "encryption_algs"), Kind.EITHER),
        **dict.fromkeys(("mac_algs", "compression_algs", "server_host_key_algs", "signature_algs"), Kind.EITHER),
        **dict.fromkeys(("password_auth", "public_key_auth", "kbdint_auth", "gss_auth", "gss_kex"), Kind.FLAG),
        "max_sessions": Kind.NUMBER,
    },
    "smb": {"encrypt": Kind.FLAG},
    "abfs": {"anon": Kind.FLAG},
    "az": {"anon": Kind.FLAG},
}
# The last word of a name whose type neither of them tells, as of a parameter that is None by default.
BY_NAME = (
    (re.compile(r"(.*_)?(kwargs|options|headers)"), Kind.JSON),
    (re.compile(r"(.*_)?(port|timeout|size|retries)|max_.*"), Kind.NUMBER),
)
BY_TYPE = ((bool, Kind.FLAG), ((int, float), Kind.NUMBER), ((Mapping, list, tuple, set), Kind.JSON), (str, Kind.TEXT))
BY_ANNOTATION = (
    ("dict", Kind.JSON), ("list", Kind.JSON), ("bool", Kind.FLAG), ("int", Kind.NUMBER), ("float", Kind.NUMBER),
)  # fmt: skip


@dataclass(frozen=True)
class Known:
    """The options of one store. `takes_others`: its class passes others on, to whatever that may be."""

    kinds: Mapping[str, Kind]
    takes_others: bool


def read_options(url: str, written: Mapping[str, Any]) -> dict[str, Any]:
    """Return storage options as the URL's store wants them, from what was written in an ini file or on a command line.

    Values that are no text, as in an auth proxy's JSON, stay as they are, unless they are numbers where text is wanted.
    Raises ConfigError, which never holds the value, for what cannot be meant; ImportError for a missing package, and
    ValueError for an unknown protocol.
    """
    kinds = known_options(url).kinds
    return {name: _read(name, kinds.get(name) or _kind_by_name(name), value) for name, value in written.items()}


def check_options(url: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option that the URL's store would swallow, with the nearest one that it knows."""
    known = known_options(url)
    _check_names(f"{protocol_of(url)}://", options, known)
    for protocol, inside in options.items():
        if protocol in _chain(url) and isinstance(inside, Mapping):
            check_options(f"{protocol}://", inside)
    if _plain_name(protocol_of(url)) == "s3":
        _check_botocore(options)


def check_needed(url: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError where neither the URL nor the options have what the store's class must be given."""
    protocol = protocol_of(url)
    cls = filesystem_class(protocol)
    given = {*options, *cls._get_kwargs_from_urls(url), *(("fo",) if "::" in url else ())}
    for name, parameter in _parameters(cls)[0].items():
        is_needed = parameter.default is parameter.empty or name == "fo"  # an archive's file
        if is_needed and name not in given:
            write = f"{protocol}::/folder/file" if name == "fo" else f"--option {name}=..."
            raise ConfigError(f"{protocol}:// does not say which {name}; write for example {write}")


def known_options(url: str) -> Known:
    """Return what is known of the options of the URL's store. ImportError, and ValueError for an unknown protocol."""
    found = _known(protocol_of(url))
    chained = dict.fromkeys(_chain(url), Kind.JSON)
    return Known({**found.kinds, **chained}, found.takes_others)


def _plain_name(protocol: str) -> str:
    return SAME.get(protocol, protocol)


def _chain(url: str) -> list[str]:
    """Return the protocols of the stores in an URL of several, as `zip::s3://bucket/file.zip`; each has its options."""
    return [link.partition("://")[0] for link in url.split("::")] if "::" in url else []


@functools.cache
def _known(protocol: str) -> Known:
    plain = _plain_name(protocol)
    if plain == "file":  # ours, and not fsspec's
        return Known({"sync": Kind.FLAG}, takes_others=False)
    parameters, is_open = _parameters(filesystem_class(protocol))
    kinds = {name: _kind_of(parameter) for name, parameter in parameters.items()}
    further = COMPLETE.get(plain)
    kinds = {**COMMON, **kinds, **(further or {}), **KNOWN.get(plain, {})}
    return Known(kinds, takes_others=is_open and further is None)


def _parameters(cls: type) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return what the constructors of a class and its bases name, and whether one of its own takes more than that.

    Nobody looks at what arrives at fsspec's own base classes.
    """
    found: dict[str, inspect.Parameter] = {}
    is_open = False
    for each in cls.__mro__:
        if "__init__" not in vars(each) or each is object:
            continue
        own = list(inspect.signature(vars(each)["__init__"]).parameters.values())[1:]
        named = [one for one in own if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        found = {**{one.name: one for one in named}, **found}
        takes_any = any(one.kind is one.VAR_KEYWORD for one in own)
        is_open |= takes_any and not each.__module__.startswith(("fsspec.spec", "fsspec.asyn", "fsspec.archive"))
        if not takes_any:
            break
    return found, is_open


def _kind_of(parameter: inspect.Parameter) -> Kind:
    if parameter.default not in (None, parameter.empty):
        return next((kind for type_, kind in BY_TYPE if isinstance(parameter.default, type_)), Kind.TEXT)
    annotation = "" if parameter.annotation is parameter.empty else str(parameter.annotation).lower()
    for word, kind in BY_ANNOTATION:
        if re.search(rf"\b{word}\b", annotation):
            return kind
    return _kind_by_name(parameter.name)


def _kind_by_name(name: str) -> Kind:
    return next((kind for pattern, kind in BY_NAME if pattern.fullmatch(name)), Kind.TEXT)


def _check_names(where: str, options: Iterable[str], known: Known) -> None:
    unknown = [] if known.takes_others else sorted(set(options) - set(known.kinds))
    if unknown:
        near = nearest(unknown[0], known.kinds)
        raise ConfigError(f"{unknown[0]} is no storage option of {where}; the nearest known one is {near}")


def _check_botocore(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a slip in what s3fs passes on to botocore, which would say so at the first request only."""
    session = importlib.import_module("botocore.session").Session
    config = importlib.import_module("botocore.config").Config
    names = {
        "client_kwargs": set(inspect.signature(session.create_client).parameters) - {"self", "service_name"},
        "config_kwargs": {*config.OPTION_DEFAULTS, *config.NON_LEGACY_OPTION_DEFAULTS},
    }
    for option, known in names.items():
        inside = options.get(option) or {}
        if not isinstance(inside, Mapping):
            raise ConfigError(f"storage option {option} is no {Kind.JSON.value}")
        _check_names(option, inside, Known(dict.fromkeys(known, Kind.TEXT), takes_others=False))


def _read(name: str, kind: Kind, value: Any) -> Any:
    if not isinstance(value, str):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return json.dumps(value) if kind is Kind.TEXT and is_number else value
    try:
        return _parse(kind, value)
    except ValueError:
        raise ConfigError(f"storage option {name}: the value is not {kind.value}") from None


def _parse(kind: Kind, text: str) -> Any:
    """Return what a text means. In double quotes it is itself, as where it begins with a space."""
    if kind is Kind.FLAG:
        return parse_bool(text)
    if kind is Kind.JSON:
        return json.loads(text)
    meant = _json(text)
    if kind is Kind.NUMBER:
        if isinstance(meant, bool) or not isinstance(meant, (int, float, type(None))):
            raise ValueError("no number")
        return meant
    if isinstance(meant, str) or (kind is Kind.EITHER and isinstance(meant, (dict, list, bool, type(None)))):
        return meant
    return text


def _json(text: str) -> Any:
    """Return what JSON the text is; a number that stands for no JSON where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text
