"""The command line: builds the object graph from the options, runs it, and ends it cleanly.

The address is taken first and the store asked second, so that an unreachable store delays nothing but what
needs it. Exit status: 0 after SIGTERM or SIGINT, 1 where the store or the address refuses, 2 for a mistake in
the configuration. Runs in the main thread, because signals arrive there.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import logging
import logging.handlers
import os
import signal
import socket
import sys
import threading
import types
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial

from ftpvfs import __version__, cachecmd
from ftpvfs.assembly import Assembly, check, let_in_with_any_password, warnings
from ftpvfs.authorizer import hash_password
from ftpvfs.config import (
    Address,
    Config,
    ConfigError,
    Listener,
    LogOptions,
    check_file,
    format_address,
    help_text,
    load,
)
from ftpvfs.server.loop import Loop
from ftpvfs.server.server import VFSServer
from ftpvfs.vfs.vfs import VFS

STORE_WAIT = 5.0  # seconds; how long the start waits for the store's first answer
BACKLOG = 100  # pyftpdlib's
LEVELS = {"DEBUG": logging.DEBUG, "INFO": logging.INFO, "NOTICE": logging.WARNING, "ERROR": logging.ERROR}
# What time does not mend. Every other errno may be the network's; the store is asked again when it is needed.
FATAL = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EINVAL}

logger = logging.getLogger("ftpvfs")


class StartError(Exception):
    """Why serving cannot start, in one line."""


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
        raise StartError(_reason(error)) from error


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
    assembly = _assemble(config)
    for warning in [*config.warnings, *warnings(config)]:
        logger.warning("%s", warning)
    try:
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
        with contextlib.ExitStack() as open_ones:
            listeners = [(each, open_ones.enter_context(_listen(each.addr))) for each in config.listeners]
            open_ones.callback(assembly.close)
            signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=_read_again, args=(assembly,)).start())
            _contact_stores(assembly)
            _run(assembly, listeners)
    except KeyboardInterrupt:
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


# --- signals and the log --------------------------------------------------------------------------


def _stop(number: int, frame: types.FrameType | None) -> None:
    """End the main loop; a second signal ends the process at once, should the first way out be blocked."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def _read_again(assembly: Assembly) -> None:
    assembly.reload()
    assembly.forget()
    logger.info("all cached listings forgotten")


class _LogFormatter(logging.Formatter):
    """Entries that no file name can forge: control characters are escaped, further lines indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        lines = record.message.split("\n")
        clean = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)
        record.message = "\n    ".join(clean)
        return super().formatMessage(record)


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
    handler.setFormatter(_LogFormatter("%(asctime)s %(levelname)s: %(message)s"))
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    for name in ("ftpvfs", "pyftpdlib"):
        logging.getLogger(name).setLevel(level)


# --- the server -----------------------------------------------------------------------------------


def _listen(address: Address) -> socket.socket:
    """A listening socket. No host means every interface, both IPv4 and IPv6; a name prefers its IPv4 address,
    because clients that know PASV alone need one.
    """
    host, port = address
    try:
        if not host and socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, where = min(found, key=lambda each: each[0] != socket.AF_INET)
        return socket.create_server(where, family=family, backlog=BACKLOG)
    except OSError as error:
        number = error.errno or 0  # negative: getaddrinfo's
        reason = os.strerror(number) if number > 0 else error.strerror
        raise StartError(f"cannot listen on {format_address(address)}: {reason}") from error


def _assemble(config: Config) -> Assembly:
    try:
        return Assembly(config)
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise StartError(_reason(error)) from error


def _contact_stores(assembly: Assembly) -> None:
    """Ask the stores whether they are there and let us in, and wait a little for the answers.

    StartError where the common one says no. An answer of a user's own store, or one that does not come or comes too
    late, is only logged.
    """
    answers = {vfs: _ask(vfs) for vfs in assembly.vfses}
    wait(answers.values(), STORE_WAIT)
    for vfs, answer in answers.items():
        if not answer.done():
            logger.warning("%s: no answer for %g s yet; serving all the same", vfs.name, STORE_WAIT)
            answer.add_done_callback(partial(_log_late_refusal, vfs))
            continue
        error = answer.exception()
        if error and vfs is assembly.vfs and (not isinstance(error, OSError) or error.errno in FATAL):
            raise StartError(_reason(error)) from error
        _log_refusal(vfs, error)


def _ask(vfs: VFS) -> Future[None]:
    answer: Future[None] = Future()

    def ask() -> None:
        try:
            vfs.start()
        except Exception as error:  # noqa: BLE001 - raised or logged by whoever takes the answer
            answer.set_exception(error)
        else:
            answer.set_result(None)

    threading.Thread(target=ask, name="start", daemon=True).start()
    return answer


def _log_late_refusal(vfs: VFS, answer: Future[None]) -> None:
    _log_refusal(vfs, answer.exception())


def _log_refusal(vfs: VFS, error: BaseException | None) -> None:
    if error:
        logger.warning("%s: %s; it is asked again when it is needed", vfs.name, _reason(error))


def _reason(error: BaseException) -> str:
    """What the error says, without Python's notation."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, (OSError, ValueError, ImportError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _run(assembly: Assembly, listeners: Sequence[tuple[Listener, socket.socket]]) -> None:
    """Serve until a signal ends it."""
    loop = Loop()
    servers = [VFSServer(sock, assembly.handler(listener), ioloop=loop) for listener, sock in listeners]
    for listener, sock in listeners:
        address = Address(*sock.getsockname()[:2])
        warning = open_to_all(assembly.config, address)
        if warning:
            logger.warning("%s", warning)
        print(_greeting(assembly, listener, address), flush=True)
    try:
        servers[0].serve_forever(handle_exit=False)
    finally:
        servers[0].close_all()


def _greeting(assembly: Assembly, listener: Listener, address: Address) -> str:
    stores = ", ".join(vfs.name for vfs in assembly.vfses) or "the users' own stores"
    scheme = "ftps" if listener.tls.mode == "implicit" else "ftp"
    tls = "" if listener.tls.mode == "off" else f", TLS {listener.tls.mode}"
    mode = assembly.config.vfs.cache_mode
    return f"ftpvfs: serving {stores} at {scheme}://{format_address(address)} (cache mode {mode}{tls})"


def open_to_all(config: Config, address: Address) -> str:
    """The warning where any password is right and others than this machine can reach the server, else ""."""
    users = let_in_with_any_password(config)
    if not users or address.is_loopback:
        return ""
    may = "read" if config.vfs.read_only else "read, change and delete"
    who = f"whoever reaches {format_address(address)} as {' or '.join(users)}"
    return f"{who} may {may} everything: any password is right; --pass sets one"
