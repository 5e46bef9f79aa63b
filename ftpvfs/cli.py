"""The command line: what each command does, its last line, and its exit status.

Exit status: 0 where all is done that was asked for; 1 where the store, the cache or the address refuses, or something
is not as it should be; 2 for a mistake in the configuration; 3 where the server was stopped while files still waited to
be stored; 130 after Ctrl-C, but for a server that serves already; 141 where nobody reads the output.
"""

from __future__ import annotations

import getpass
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ftpvfs import __version__, cachecmd
from ftpvfs.authorizer import hash_password
from ftpvfs.cache.left import LeftCache
from ftpvfs.config import Config, ConfigError, check_file, format_size, help_text, load
from ftpvfs.launch import StartError, check, reason, serve
from ftpvfs.logs import log_to

logger = logging.getLogger("ftpvfs")

REFUSED, MISTAKE, WAITING = 1, 2, 3
INTERRUPTED, UNREAD = 130, 141  # as a shell says of a program that SIGINT or SIGPIPE has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # at the end of the process a failure would have no status of its own
    except KeyboardInterrupt:
        return _complain("interrupted", status=INTERRUPTED)
    except BrokenPipeError:
        _drop_output()
        return UNREAD
    except OSError as error:  # such as a full disk on which the output is to be kept
        logger.debug("%s", error, exc_info=True)
        _drop_output()
        return _complain(reason(error), status=REFUSED)
    return status


def _run(argv: Sequence[str]) -> int:
    try:
        config = load(argv, os.environ)
        return COMMANDS[config.command](config)
    except ConfigError as error:
        return _complain(error, status=MISTAKE)
    except StartError as error:
        return _complain(error, status=REFUSED)


def _drop_output() -> None:
    """Let the interpreter's last flush of what could not be written go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _complain(error: object, *, status: int) -> int:
    print("ftpvfs:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    return status


def _help(config: Config) -> int:
    print(help_text(config.topic), end="")
    return 0


def _version(config: Config) -> int:
    print("ftpvfs", __version__)
    return 0


def _check_config(config: Config) -> int:
    problems: list[object] = [*check_file(config.file)]
    warnings: list[str] = []
    if not problems:
        found, warnings = check(load(["--config", config.file], {}))
        problems += found
    for warning in warnings:
        _complain(f"warning: {warning}", status=0)
    for problem in problems:
        _complain(problem, status=MISTAKE)
    if problems:
        return MISTAKE
    print("ok")
    return 0


def _hash_password(config: Config) -> int:
    print(hash_password(_new_password()))
    return 0


def _cache(config: Config) -> int:
    log_to(config.log)
    try:
        return cachecmd.run(config)
    except (BrokenPipeError, ConfigError):
        raise
    except (OSError, ValueError, ImportError) as error:
        raise StartError(reason(error)) from error


def _new_password() -> str:
    """The password from a terminal, typed twice without being seen, or a line of standard input."""
    if sys.stdin.isatty():
        try:
            password = getpass.getpass("Password: ")
            again = getpass.getpass("Again: ")
        except EOFError:
            raise StartError("no password was given") from None
        if again != password:
            raise StartError("the passwords differ")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise StartError("an empty password")
    return password


def _serve(config: Config) -> int:
    log_to(config.log)
    left = serve(config)
    logger.info("stopped by a signal")
    for each in left:
        text = _waits(each, Path(config.vfs.cache_dir))
        logger.warning("%s", text)
        if config.log.file:
            _complain(text, status=WAITING)
    return WAITING if left else 0


def _waits(left: LeftCache, cache_dir: Path) -> str:
    """Return the last line of a server that leaves something behind."""
    what = f"{left.files} files ({format_size(left.size)})"
    if left.deletions:
        what += f" and {left.deletions} deletions"
    return f"stopped while {what} wait in {cache_dir / left.name}; the next start goes on to store them"


COMMANDS: dict[str, Callable[[Config], int]] = {
    "serve": _serve,
    "check-config": _check_config,
    "hash-password": _hash_password,
    "cache ls": _cache,
    "cache verify": _cache,
    "cache flush": _cache,
    "help": _help,
    "version": _version,
}
