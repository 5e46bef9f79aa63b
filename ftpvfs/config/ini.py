"""What an ini file says, with the line of each mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import iniconfig

from ftpvfs.config.table import (
    BACKEND,
    LISTENER,
    LISTENER_OPTIONS,
    OPTIONS,
    SECTIONS,
    URL_OPTION,
    USER,
    USER_OPTIONS,
    Option,
    nearest,
)
from ftpvfs.config.values import USER_NAME, ConfigError

# A comment starts at a ; or # behind white space or at the line's start, so that `a;b` and `$argon2$x#y` are
# values. A JSON string may hold anything: the first half steps over it.
COMMENT = re.compile(r"""((?<=[\s=\[{,:])"(?:[^"\\]|\\.)*")|(?:^|\s)[;#].*""")

KINDS = {USER: "alice", LISTENER: "outside"}  # sections with names, and an example
STORAGE_OPTION = "option."  # before a storage option's name; in [backend] only where that is `url`


@dataclass
class Section:
    """One of several sections of a kind, as [user:alice]; `where` it starts, for errors."""

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    storage_options: dict[str, str] = field(default_factory=dict)


@dataclass
class Ini:
    """What an ini file says, read as far as it could be; `problems` in the order of lines."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    storage_options: dict[str, str] = field(default_factory=dict)
    users: dict[str, Section] = field(default_factory=dict)
    listeners: dict[str, Section] = field(default_factory=dict)
    problems: list[ConfigError] = field(default_factory=list)
    backend: str = ""  # where [backend] starts, for errors


def read_ini(path: str) -> Ini:
    """Read an ini file; what is wrong with it is in the answer's `problems`."""
    found = Ini()
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
        try:
            read_key = _reader(found, section.name, where)
        except ConfigError as error:
            found.problems.append(error)
            continue
        problems = len(found.problems)
        for key, text in section.items():
            line = section.lineof(key) or 0
            try:
                _check_line(lines[line - 1], key, text, f"{path}:{line}")
                read_key(key, text, f"{path}:{line}: {key} in [{section.name}]")
            except ConfigError as error:
                found.problems.append(error)
        if len(found.problems) == problems:
            found.problems += _incomplete(found, section.name)
    return found


def _reader(found: Ini, section: str, where: str) -> Callable[[str, str, str], None]:
    """What reads a line of the section: (key, text, source)."""
    kind, colon, name = section.partition(":")
    if section == BACKEND:
        found.backend = where
        return partial(_read_backend_key, found)
    if section in SECTIONS:
        values = found.values.setdefault(section, {})
        return partial(_read_key, values, [row for row in OPTIONS if row.section == section])
    if kind in KINDS and not name.strip():
        raise ConfigError(f"{where}: [{section}] has no name; write for example [{kind}:{KINDS[kind]}]")
    if kind == USER:
        check_user(name, where)
        user = found.users[name] = Section(where)
        return partial(_read_user_key, user)
    if kind == LISTENER:
        listener = found.listeners[name] = Section(where)
        return partial(_read_key, listener.values, LISTENER_OPTIONS)
    near = nearest(kind if colon else section, [*SECTIONS, BACKEND, *(f"{kind}:NAME" for kind in KINDS)])
    raise ConfigError(f"{where}: unknown section [{section}]; the nearest known one is [{near}]")


def check_user(name: str, where: str) -> None:
    """Raise ConfigError for a name that no client can say."""
    try:
        USER_NAME.parse(name)
    except ValueError as error:
        raise ConfigError(f"{where}: {name!r} {error}") from None


def _read_backend_key(found: Ini, key: str, text: str, source: str) -> None:
    if key == URL_OPTION.key:
        _read_key(found.values.setdefault(BACKEND, {}), [URL_OPTION], key, text, source)
    else:
        found.storage_options[key.removeprefix(STORAGE_OPTION)] = text


def _read_user_key(user: Section, key: str, text: str, source: str) -> None:
    # Unlike [backend] a user's section takes no other key for a storage option: a slip in `perm` would be one.
    if key.startswith(STORAGE_OPTION):
        user.storage_options[key.removeprefix(STORAGE_OPTION)] = text
    elif key not in {row.key for row in USER_OPTIONS}:
        near = nearest(key, [row.key for row in USER_OPTIONS])
        hint = f"{STORAGE_OPTION}{key} would be a storage option of the user's own url"
        raise ConfigError(f"{source}: unknown key; the nearest known one is {near}, and {hint}")
    else:
        _read_key(user.values, USER_OPTIONS, key, text, source)


def _incomplete(found: Ini, section: str) -> Iterator[ConfigError]:
    kind, _, name = section.partition(":")
    if kind == USER:
        user = found.users[name]
        secrets = {"password", "password_hash"} & user.values.keys()
        if len(secrets) > 1:
            yield ConfigError(f"{user.where}: [{section}] has a password and a password_hash; give one of them")
        elif not secrets and name != "anonymous":
            hint = "python -m ftpvfs hash-password makes one"
            yield ConfigError(f"{user.where}: [{section}] has no password_hash; {hint}")
        if not user.values.get("url") and (user.storage_options or "cache_name" in user.values):
            yield ConfigError(f"{user.where}: [{section}] has no url for its storage options")
    if kind == LISTENER and "addr" not in found.listeners[name].values:
        where = found.listeners[name].where
        yield ConfigError(f"{where}: [{section}] has no addr; write for example addr = :990")


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
            raise ConfigError(f"{path}:{number}: {key} has a comment for a value; write {key} =#1 if # belongs to it")
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


def _read_key(values: dict[str, Any], known: Iterable[Option], key: str, text: str, source: str) -> None:
    rows = {row.key: row for row in known}
    if key not in rows:
        raise ConfigError(f"{source}: unknown key; {_where_known(key, rows)}")
    values[rows[key].field] = rows[key].read(text, source)


def _where_known(key: str, rows: Mapping[str, Option]) -> str:
    for row in rows.values():
        if key == row.field:
            return f"it is called {row.key} here"
    for row in (*OPTIONS, URL_OPTION):
        if key in (row.key, row.flag.replace("-", "_")) and row.key not in rows:
            return f"{row.key} belongs in [{row.section}]"
    return f"the nearest known one is {nearest(key, rows)}"
