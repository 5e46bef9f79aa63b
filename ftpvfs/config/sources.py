"""Flags, environment, ini file and the table's defaults together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ftpvfs.config.arguments import command_of, parse_arguments, read_environment, read_flags, read_options
from ftpvfs.config.ini import Ini, read_ini
from ftpvfs.config.table import BACKEND, PREFIX, SECTIONS, Config
from ftpvfs.config.values import ConfigError


def load(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """What the flags say, else the environment, else the ini file, else the table. Raises ConfigError.

    Commands are serve, check-config (its file in `Config.file`, unread), help and version.
    """
    arguments = parse_arguments(argv)
    for command in ("help", "version"):
        if arguments.flags[command]:
            return Config(command)
    command, positionals = command_of(arguments.positionals)
    if command == "check-config":
        return Config(command, file=positionals[0])

    flags = read_flags(arguments)
    variables, warnings = read_environment(environ)
    file = arguments.flags.get("config") or environ.get(f"{PREFIX}CONFIG", "")
    ini = read_ini(file) if file else Ini()
    if ini.problems:
        raise ini.problems[0]
    layers = [ini.values, variables, flags]
    values = {
        section: {name: value for layer in layers for name, value in layer.get(section, {}).items()}
        for section in (*SECTIONS, BACKEND)
    }
    storage_options = {**ini.storage_options, **read_options(arguments.flags["option"])}
    url = positionals[0] if positionals else values[BACKEND].get("url", "")
    if storage_options and not url:
        source = "--option" if arguments.flags["option"] else f"{ini.backend}: [backend]"
        raise ConfigError(f"{source}: storage options but no URL; write for example url = s3://bucket/prefix")
    sections = {section: options(**values[section]) for section, options in SECTIONS.items()}
    return Config(command, url or ".", storage_options, **sections, file=file, warnings=tuple(warnings))


def check_file(path: str) -> list[ConfigError]:
    """All that is wrong with an ini file."""
    return read_ini(path).problems
