"""What an ini file says, with the line of each mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import iniconfig

from ftpvfs.config.table import BACKEND, OPTIONS, SECTIONS, URL_OPTION, Option, nearest
from ftpvfs.config.values import ConfigError, storage_value

# A comment starts at a ; or # behind white space or at the line's start, so that `a;b` and `$argon2$x#y` are
# values. A JSON string may hold anything: the first half steps over it.
COMMENT = re.compile(r"""((?<=[\s=\[{,:])"(?:[^"\\]|\\.)*")|(?:^|\s)[;#].*""")


@dataclass
class Ini:
    """What an ini file says, read as far as it could be; `problems` in the order of lines."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    storage_options: dict[str, Any] = field(default_factory=dict)
    problems: list[ConfigError] = field(default_factory=list)
    backend: str = ""  # where [backend] starts, for errors


def read_ini(path: str) -> Ini:
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


def _read_key(found: Ini, section: str, key: str, text: str, source: str) -> None:
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
