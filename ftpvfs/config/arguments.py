"""What the command line and the environment say."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ftpvfs.config.table import OPTIONS, PREFIX, URL_OPTION, nearest
from ftpvfs.config.values import BOOL, ConfigError

COMMANDS = ("serve", "check-config", "hash-password", "cache", "help", "version")
CACHE_COMMANDS = ("ls", "verify", "flush")
# What `help` knows something about.
TOPICS = (*COMMANDS, *(f"cache {each}" for each in CACHE_COMMANDS))
# Commands for which the ini file, the environment and the flags are not read: a flag there would be ignored.
WITHOUT_OPTIONS = ("check-config", "hash-password", "version")

FLAGS = {f"--{row.flag}": row for row in OPTIONS}
OTHER_FLAGS = ("--config", "--option", "--verbose", "--use-json-log", "--version", "--help", "--json")


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
    parser.add_argument("--json", dest="json", action="store_true", default=False)
    parser.add_argument("--use-json-log", dest="use_json_log", action="store_true", default=False)
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
class Arguments:
    flags: Mapping[str, Any]
    positionals: list[str]


def parse_arguments(argv: Sequence[str]) -> Arguments:
    end = argv.index("--") if "--" in argv else len(argv)
    known, rest = _parser().parse_known_args([_spell_out(argument) for argument in argv[:end]])
    for argument in rest:
        if argument.startswith("-"):
            name = re.split(r"[=\s]", argument)[0]  # what follows may be a secret
            near = nearest(name, [*FLAGS, *OTHER_FLAGS])
            raise ConfigError(f"unknown flag {name}; the nearest known one is {near}")
    return Arguments(vars(known), [*rest, *argv[end + 1 :]])


def command_of(positionals: Sequence[str]) -> tuple[str, list[str]]:
    """The command, serve where none is named, and what it is about."""
    command, rest = "serve", list(positionals)
    if rest and rest[0] in COMMANDS:
        command = rest.pop(0)
    elif len(rest) == 1:
        _check_no_slip(rest[0])
    if command == "cache":
        if not rest or rest[0] not in CACHE_COMMANDS:
            raise ConfigError(f"cache: say what to do, as in cache ls; it knows {', '.join(CACHE_COMMANDS)}")
        command = f"cache {rest.pop(0)}"
    if command == "check-config" and len(rest) != 1:
        raise ConfigError("check-config: name one ini file, as in check-config ftpvfs.ini")
    if command == "hash-password" and rest:
        raise ConfigError("hash-password: asks for the password, or reads it from standard input")
    if command == "version" and rest:
        raise ConfigError("version: takes nothing more")
    if len(rest) > 1:
        if rest == list(positionals):
            near = nearest(rest[0], COMMANDS)
            raise ConfigError(f"more than one URL, and no command before them; the nearest command is {near}")
        raise ConfigError("more than one URL; one is served at a time")
    return command, rest


def _check_no_slip(word: str) -> None:
    """Raise ConfigError for a word that can only be meant for a command: no URL, no path, and nothing of that name."""
    if "/" not in word and "::" not in word and word not in (".", "..") and not os.path.lexists(word):
        near = nearest(word, COMMANDS)
        raise ConfigError(f"{word!r} is no command, and no folder here; the nearest is {near}, ftpvfs help shows all")


def topic_of(positionals: Sequence[str]) -> str:
    """The command that help is asked for, "" for all of them. ConfigError for `help` of what is no command."""
    words = list(positionals)
    if asked := words[:1] == ["help"]:
        words.pop(0)
    topic = next((" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in TOPICS), "")
    if asked and topic != " ".join(words):
        raise ConfigError(f"help: {words[-1]!r} is no command; the nearest one is {nearest(' '.join(words), TOPICS)}")
    return topic


def check_no_flags(command: str, arguments: Arguments) -> None:
    """Raise ConfigError for a flag of a command that would ignore it."""
    given = [name for name, value in arguments.flags.items() if value and name not in ("help", "version")]
    if given and command in WITHOUT_OPTIONS:
        flag = next((flag for flag, row in FLAGS.items() if f"{row.section}.{row.field}" == given[0]), "")
        raise ConfigError(f"{flag or '--' + given[0].replace('_', '-')}: {command} takes no flags but --help")


def read_flags(arguments: Arguments) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for flag, row in FLAGS.items():
        text = arguments.flags.get(f"{row.section}.{row.field}")
        if text is not None:
            values.setdefault(row.section, {})[row.field] = row.read(text, flag)
    if arguments.flags["verbose"]:
        if "level" in values.get("log", {}):
            raise ConfigError("--log-level: -v says the same; give one of them")
        values.setdefault("log", {})["level"] = "INFO" if arguments.flags["verbose"] == 1 else "DEBUG"
    if arguments.flags["use_json_log"]:
        if values.get("log", {}).get("format", "json") != "json":
            raise ConfigError("--log-format: --use-json-log says otherwise; give one of them")
        values.setdefault("log", {})["format"] = "json"
    return values


def read_environment(environ: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
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


def read_options(pairs: Iterable[str]) -> dict[str, str]:
    """The storage options of the flags, as they were written."""
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ConfigError("--option: no KEY=VALUE; write for example --option anon=true")
        options[key] = text
    return options
