"""The command line: what each command does, the log, and the one line of what is wrong.

Exit status: 0 after SIGTERM or SIGINT, 1 where the store or the address refuses, 2 for a mistake in the configuration.
"""

from __future__ import annotations

import getpass
import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Sequence
from datetime import datetime

from ftpvfs import __version__, cachecmd
from ftpvfs.assembly import check
from ftpvfs.authorizer import hash_password
from ftpvfs.config import Config, ConfigError, LogOptions, check_file, help_text, load
from ftpvfs.launch import StartError, reason, serve

LEVELS = {"DEBUG": logging.DEBUG, "INFO": logging.INFO, "NOTICE": logging.WARNING, "ERROR": logging.ERROR}

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
    _log_to(config.log)
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
    _log_to(config.log)
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


# --- the log


class _LogFormatter(logging.Formatter):
    """Entries that no file name can forge: control characters are escaped, further lines indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        lines = record.message.split("\n")
        clean = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)
        record.message = "\n    ".join(clean)
        return super().formatMessage(record)


class _JSONFormatter(logging.Formatter):
    """One JSON object an entry, with rclone's keys."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": "notice" if record.levelno == logging.WARNING else record.levelname.lower(),
            "msg": record.getMessage(),
            "source": record.name,
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _log_to(options: LogOptions) -> None:
    """Log this package and pyftpdlib at the level asked for; the stores' libraries only from warnings on,
    because their debug output shows credentials.
    """
    level = LEVELS[options.level]
    handler: logging.Handler = logging.StreamHandler()
    if options.file:
        try:
            handler = logging.handlers.WatchedFileHandler(options.file)
        except OSError as error:
            raise ConfigError(f"log file {options.file!r} cannot be written: {error.strerror}") from None
    as_text = _LogFormatter("%(asctime)s %(levelname)s: %(message)s")
    handler.setFormatter(_JSONFormatter() if options.format == "json" else as_text)
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    for name in ("ftpvfs", "pyftpdlib"):
        logging.getLogger(name).setLevel(level)
