"""Flags, environment, ini file and the table's defaults together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftpvfs.config.arguments import (
    check_no_flags,
    command_of,
    parse_arguments,
    read_environment,
    read_flags,
    read_options,
    topic_of,
)
from ftpvfs.config.ini import Ini, read_ini
from ftpvfs.config.table import (
    BACKEND,
    LISTENER,
    PREFIX,
    SECTIONS,
    USER,
    Config,
    Listener,
    TLSOptions,
    User,
    check_cache_dir,
)
from ftpvfs.config.values import Address, ConfigError, format_address

Values = Mapping[str, Mapping[str, Any]]  # section -> field -> value, of those that were given


def load(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """What the flags say, else the environment, else the ini file, else the table. Raises ConfigError.

    Commands are serve, check-config (its file in `Config.file`, unread), hash-password, `cache ls` and its like, help
    and version.
    """
    arguments = parse_arguments(argv)
    if arguments.flags["help"] or arguments.positionals[:1] == ["help"]:
        return Config("help", topic=topic_of(arguments.positionals))
    if arguments.flags["version"]:
        return Config("version")
    command, positionals = command_of(arguments.positionals)
    check_no_flags(command, arguments)
    if arguments.flags["json"] and command != "cache ls":
        raise ConfigError(f"--json: {command} does not print JSON; cache ls does")
    if command == "check-config":
        return Config(command, file=positionals[0])
    if command in ("hash-password", "version"):
        return Config(command)
    flags = read_flags(arguments)
    variables, warnings = read_environment(environ)
    file = arguments.flags.get("config") or environ.get(f"{PREFIX}CONFIG", "")
    ini = read_ini(file) if file else Ini()
    if ini.problems:
        raise ini.problems[0]
    if positionals:
        flags.setdefault(BACKEND, {})["url"] = positionals[0]
    options = read_options(arguments.flags["option"])
    return dataclasses.replace(
        _combine(ini, [variables, flags], options),
        command=command,
        json=arguments.flags["json"],
        file=file,
        warnings=tuple(warnings),
    )


def check_file(path: str) -> list[ConfigError]:
    """All that is wrong with an ini file."""
    ini = read_ini(path)
    if not ini.problems:
        try:
            _combine(ini, [], {})
        except ConfigError as error:
            return [error]
    return ini.problems


def _combine(ini: Ini, above: Sequence[Values], options: Mapping[str, str]) -> Config:
    """An ini file and what comes before it, the most important last; `options` are the flags' storage options."""
    values = {
        section: {name: value for layer in [ini.values, *above] for name, value in layer.get(section, {}).items()}
        for section in (*SECTIONS, BACKEND)
    }
    url = values[BACKEND].get("url", "")
    if (ini.storage_options or options) and not url:
        source = "--option" if options else f"{ini.backend}: [backend]"
        raise ConfigError(f"{source}: storage options but no URL; write for example url = s3://bucket/prefix")
    _check_who_decides(ini, values)
    config = Config(
        url=url or ".",
        storage_options={**ini.storage_options, **options},
        users=tuple(_users(ini, values["server"])),
        listeners=tuple(_listeners(ini, values)),
        **{section: row(**values[section]) for section, row in SECTIONS.items()},
    )
    check_cache_dir(config.vfs)
    return config


def _check_who_decides(ini: Ini, values: Values) -> None:
    """Refuse more than one answer to who may log in: one of them would be ignored."""
    server = values["server"]
    deciders = [f"--{name.replace('_', '-')}" for name in ("authorizer", "auth_proxy") if server.get(name)]
    if not deciders:
        return
    others = [f"[{USER}:{name}]" for name in ini.users]
    others += ["--user" for name in ("user", "password") if name in server]
    if "--auth-proxy" in deciders and values[BACKEND].get("url"):
        others.append("a URL")
    for other in [*deciders[1:], *others]:
        raise ConfigError(f"{deciders[0]}: leaves no room for {other}; give one of them")


def _users(ini: Ini, server: Mapping[str, Any]) -> Iterator[User]:
    """The users of the file, and the one of --user and --pass, which nobody need have given where the file has none."""
    if server.get("authorizer") or server.get("auth_proxy"):
        return
    single = User(name=server.get("user", "anonymous"), password=server.get("password") or None)
    if not ini.users or "user" in server or "password" in server:
        if single.name in ini.users:
            raise ConfigError(f"--user: {single.name} is [{USER}:{single.name}] already; give one of them")
        if ini.users and single.password is None:
            why = f"without --pass any password lets {single.name} in beside the users of the ini file"
            raise ConfigError(f"--user: {why}; write --pass, or [{USER}:{single.name}] with a password_hash")
        yield single
    for name, section in ini.users.items():
        yield User(name=name, storage_options=section.storage_options, **section.values)


def _listeners(ini: Ini, values: Values) -> Iterator[Listener]:
    common = TLSOptions(**values["tls"])
    taken: dict[str, Address] = {}
    if not ini.listeners or "addr" in values["server"]:
        yield _listener("--tls-mode", "", SECTIONS["server"](**values["server"]).addr, common)
        taken["[server] or --addr"] = SECTIONS["server"](**values["server"]).addr
    for name, section in ini.listeners.items():
        given, title = dict(section.values), f"[{LISTENER}:{name}]"
        addr = given.pop("addr")
        for other, its_addr in taken.items():
            if _is_taken(addr, its_addr):
                where = f"{format_address(addr)}, which {other} has with {format_address(its_addr)}"
                raise ConfigError(f"{section.where}: {title} listens at {where}; give it another addr")
        taken[title] = addr
        yield _listener(f"{section.where}: {title}", name, addr, dataclasses.replace(common, **given))


def _is_taken(addr: Address, other: Address) -> bool:
    """Tell whether both cannot be had, as far as that is seen; no host is all of them, port 0 any free one."""
    if addr.port != other.port or not addr.port:
        return False
    return addr.host == other.host or not addr.host or not other.host


def _listener(source: str, name: str, addr: Address, tls: TLSOptions) -> Listener:
    mode = tls.mode or ("implicit" if tls.cert else "off")
    if not tls.cert and (mode != "off" or tls.key or tls.client_ca):
        what = f"TLS mode {mode}" if mode != "off" else "a key or a client CA"
        raise ConfigError(f"{source}: {what} without a certificate; write --cert FILE, or cert in [tls]")
    if tls.client_ca and mode == "explicit":
        why = "in mode explicit nobody needs TLS to log in, nor a certificate"
        raise ConfigError(f"{source}: a client CA, but {why}; write --tls-mode required or implicit")
    return Listener(addr, dataclasses.replace(tls, mode=mode), name)
