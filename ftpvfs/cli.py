"""The command line: what each command does, and the one line of what is wrong.

Exit status: 0 after SIGTERM or SIGINT, 1 where the store or the address refuses, 2 for a mistake in the configuration.
"""

from __future__ import annotations

import getpass
import logging
import os
import sys
from collections.abc import Sequence

from ftpvfs import __version__, cachecmd
from ftpvfs.assembly import check
from ftpvfs.authorizer import hash_password
from ftpvfs.config import Config, ConfigError, check_file, help_text, load
from ftpvfs.launch import StartError, reason, serve
from ftpvfs.logs import log_to

logger = logging.getLogger("ftpvfs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    try:
        config = load(sys.argv[1:] if argv is None else argv, os.environ)
        return COMMANDS[config.command](config)
    except ConfigError as error:
        return _complain(error, status=2)
    except StartError as error:
        return _complain(error, status=1)


def _complain(error: object, *, status: int) -> int:
    print("ftpvfs:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    return status


def _help(config: Config) -> int:
    print(help_text(), end="")
    return 0


def _version(config: Config) -> int:
    print("ftpvfs", __version__)
    return 0


def _check_config(config: Config) -> int:
    problems = check_file(config.file) or check(load(["--config", config.file], {}))
    for problem in problems:
        _complain(problem, status=2)
    if problems:
        return 2
    print("ok")
    return 0


def _hash_password(config: Config) -> int:
    print(hash_password(_new_password()))
    return 0


def _cache(config: Config) -> int:
    log_to(config.log)
    try:
        return cachecmd.run(config)
    except (OSError, ValueError, ImportError) as error:
        raise StartError(reason(error)) from error


def _new_password() -> str:
    """The password from a terminal, typed twice without being seen, or a line of standard input."""
    if sys.stdin.isatty():
        password = getpass.getpass("Password: ")
        if getpass.getpass("Again: ") != password:
            raise StartError("the passwords differ")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise StartError("an empty password")
    return password


def _serve(config: Config) -> int:
    log_to(config.log)
    serve(config)
    logger.info("stopped by a signal")
    return 0


COMMANDS = {
    "serve": _serve,
    "check-config": _check_config,
    "hash-password": _hash_password,
    "cache ls": _cache,
    "cache verify": _cache,
    "cache flush": _cache,
    "help": _help,
    "version": _version,
}
