"""Serving, from the addresses that are taken to the last session that has ended: processes, signals, readiness.

The address is taken first, and the stores are asked once it is served: one that does not answer delays nobody but who
needs it. What is wrong and known at once stops the start. Runs in the main thread, because signals arrive there.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ftpvfs.assembly import WORKERS_NEED_ONE, Assembly, assemble, let_in_with_any_password, warnings
from ftpvfs.cache.bans import Bans
from ftpvfs.cache.identity import is_in_use
from ftpvfs.cache.left import LeftCache, left_caches
from ftpvfs.config import Address, Config, ConfigError, Listener, format_address, format_size
from ftpvfs.coordination.sessions import SessionTable
from ftpvfs.errors import AWAY, ENOSTORE
from ftpvfs.logs import check_log, written_by_a_thread
from ftpvfs.metrics import Metrics
from ftpvfs.server.limits import BACKLOG, Door, Limits
from ftpvfs.server.serving import Service
from ftpvfs.server.workers import Refused, Reporter, Workers
from ftpvfs.vfs.vfs import VFS

logger = logging.getLogger("ftpvfs")

# Seconds after which the log says that a store has not answered yet.
STORE_PATIENCE = 5.0
# What time does not mend. Every other errno may be the network's; the store is asked again when it is needed.
FATAL = {ENOSTORE, errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EINVAL}
# An address of no network, to which nothing is sent: the system says which of its own it would send from.
ELSEWHERE = ("192.0.2.1", 9)


class StartError(Exception):
    """Why serving cannot start, in one line."""


class Place(NamedTuple):
    """A listener and its listening socket."""

    listener: Listener
    socket: socket.socket

    @property
    def address(self) -> Address:
        """Where it listens, with the port that it has got."""
        return Address(*self.socket.getsockname()[:2])


def serve(config: Config) -> list[LeftCache]:
    """Serve until a signal ends it; return the caches in which something still waits that nobody else stores.

    Raises StartError, or ConfigError for what is wrong with the options.
    """
    assembly = assembled(config)
    with contextlib.ExitStack() as taken:
        places = [Place(each, taken.enter_context(listen(each.addr))) for each in config.listeners]
        for warning in [*config.warnings, *warnings(config), *_address_warnings(config, places)]:
            logger.warning("%s", warning)
        _Server(assembly, places).run()
    return _still_waiting(assembly)


def assembled(config: Config) -> Assembly:
    """Return what the options describe. Raises StartError, or ConfigError for what is wrong with the options."""
    try:
        return assemble(config)
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise StartError(reason(error)) from error


def check(config: Config) -> tuple[list[str], list[str]]:
    """Return what would keep `serve` from starting (but for addresses that are taken), and what it would warn of."""
    try:
        check_log(config.log)
        assembly = assembled(config)
        _ = assembly.authorizer
    except (ConfigError, StartError) as error:
        return [str(error)], []
    return [], assembly.warnings


def _still_waiting(assembly: Assembly) -> list[LeftCache]:
    """Return the caches that were served and have something left; another process that serves one goes on with it."""
    config = assembly.config
    cache_dir = Path(config.vfs.cache_dir)
    # Programs name stores that this process has never heard of.
    is_told = config.server.auth_proxy or config.server.authorizer
    served = {vfs.cache_place for vfs in assembly.vfses}
    return [
        left
        for left in left_caches(cache_dir)
        if (is_told or cache_dir / left.name in served) and not is_in_use(cache_dir / left.name)
    ]


def listen(address: Address) -> socket.socket:
    """Return a listening socket. No host means every interface, both IPv4 and IPv6; a name prefers its IPv4 address,
    because clients that know PASV alone need one. StartError where the address is not to be had.
    """
    host, port = address
    try:
        if not host and socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, where = min(found, key=lambda each: each[0] != socket.AF_INET)
        return socket.create_server(where, family=family, backlog=BACKLOG)
    except OSError as error:
        number = error.errno or 0  # negative: getaddrinfo's
        why = os.strerror(number) if number > 0 else error.strerror
        raise StartError(f"cannot listen on {format_address(address)}: {why}") from error


def reason(error: BaseException) -> str:
    """Return what the error says, without Python's notation."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, (OSError, ValueError, ImportError, StartError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


# --- processes


class _Server:
    """The processes that serve: this one, or workers of it."""

    def __init__(self, assembly: Assembly, places: Sequence[Place]) -> None:
        self._assembly = assembly
        self._config = assembly.config
        self._places = places
        self._count = self._workers()
        self._table = SessionTable(self._count)
        self._metrics = Metrics(self._count)
        self._notify = Notify(os.environ.get("NOTIFY_SOCKET", ""))

    def _workers(self) -> int:
        alone = [vfs for vfs in self._assembly.vfses if not vfs.is_shared]
        if alone and self._config.server.workers > 1:
            logger.info("%s is another one in each process: one worker", alone[0].name)
            return 1
        return self._config.server.workers

    def run(self) -> None:
        if self._count == 1:
            with written_by_a_thread():
                self._serve_alone()
            return
        workers = Workers(
            self._work,
            self._table,
            drain_timeout=self._config.server.drain_timeout,
            on_ready=self._announce,
            on_reload=self._notify.reloading,
            on_stop=self._close,
        )
        gc.collect()
        gc.freeze()  # what is there now is never looked at again, so that the workers share its memory
        try:
            workers.run()
        except Refused as refusal:
            raise StartError(str(refusal)) from None

    def _close(self) -> None:
        """Take no connections any more; those that wait go unanswered, which their clients notice at once."""
        self._notify.stopping()
        for place in self._places:
            place.socket.close()

    def _announce(self) -> None:
        for place in self._places:
            print(greeting(self._assembly, place, self._count), flush=True)
        self._notify.ready()

    def _serve_alone(self) -> None:
        service = self._service(first=True)

        def stop(number: int, frame: Any) -> None:
            """Drain; a second signal ends the process at once, should draining be blocked."""
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, signal.SIG_DFL)
            self._notify.stopping()
            service.drain()

        def reload(number: int, frame: Any) -> None:
            self._notify.reloading()
            self._reload()

        with _handling({signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reload}):
            self._announce()
            self._live(service)

    def _work(self, reporter: Reporter) -> int:
        """Be a worker; return its exit status."""
        with written_by_a_thread():
            return self._serve_as(reporter)

    def _serve_as(self, reporter: Reporter) -> int:
        self._metrics.work_as(reporter.slot)
        try:
            service = self._service(first=reporter.slot == 0)
        except (StartError, ConfigError) as error:
            reporter.refuse(str(error))
            return 1
        reporter.heed(service.drain, self._reload)
        service.watch_parent(reporter.parent)
        reporter.ready()
        self._live(service)
        return 0

    def _live(self, service: Service) -> None:
        try:
            service.serve()
        finally:
            for vfs in self._assembly.vfses:
                vfs.stop(service.time_left())
            self._assembly.close()

    # --- in the process that serves

    def _service(self, *, first: bool) -> Service:
        """Return what serves in this process. Of several, the `first` one tells what comes of asking the stores."""
        tell = logger.warning if first else logger.debug
        handlers = [(place.socket, self._assembly.handler(place.listener)) for place in self._places]
        for vfs in self._assembly.vfses:
            self._prepare(vfs, tell)
        door = Door(limits_of(self._config), self._table, self._metrics, self._bans())
        service = Service(handlers, door, drain_timeout=self._config.server.drain_timeout)
        service.loop.debug_slow_turn = self._config.server.loop_slow_turn
        stores = self._assembly.vfses if first else self._assembly.vfses[:1]

        def ask() -> None:
            if first:
                _tell_of_left(self._config, stores)
            _ask(stores, tell)

        threading.Thread(target=ask, name="ftpvfs-start", daemon=True).start()
        return service

    def _prepare(self, vfs: VFS, tell: Callable[..., None]) -> None:
        """Find out what can be known of a store at once. StartError where it says no, unless it is one user's own."""
        try:
            vfs.prepare()
            if self._count > 1:
                _check_shared(vfs)
        except Exception as error:
            is_away = isinstance(error, OSError) and error.errno in AWAY  # as for a worker that is started anew
            if vfs is self._assembly.vfs and not is_away:
                raise StartError(reason(error)) from error
            tell("%s: %s", vfs.name, reason(error))

    def _bans(self) -> Bans | None:
        server = self._config.server
        if not server.ban_after:
            return None
        folder = Path(self._config.vfs.cache_dir) / "@bans"
        try:
            return Bans(folder, after=server.ban_after, window=server.ban_window, time=server.ban_time)
        except OSError as error:
            logger.warning("nobody is banned, whatever passwords are tried: %s", reason(error))
            return None

    def _reload(self) -> None:
        """Read certificates and listings again, beside the event loop. A signal handler."""
        threading.Thread(target=_read_again, args=(self._assembly,), name="ftpvfs-reload", daemon=True).start()


def _check_shared(vfs: VFS) -> None:
    try:
        vfs.check_shared()
    except OSError as error:
        raise StartError(f"{reason(error)}; {WORKERS_NEED_ONE}") from error


@contextlib.contextmanager
def _handling(handlers: dict[int, Callable[[int, Any], None]]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def limits_of(config: Config) -> Limits:
    """Return the limits that the options set."""
    server = config.server
    return Limits(server.max_cons, server.max_cons_per_ip, server.login_timeout, server.proxy_protocol_from)


def _read_again(assembly: Assembly) -> None:
    could_be_read = assembly.reload()
    assembly.forget()
    if could_be_read:
        logger.info("certificates read again, all cached listings forgotten")
    else:
        logger.info("all cached listings forgotten; not all certificates could be read again")


def _tell_of_left(config: Config, stores: Sequence[VFS]) -> None:
    """Warn of files in caches that nobody serves: of stores that are not served any more."""
    served = [vfs.cache_folder for vfs in stores]
    for left in left_caches(Path(config.vfs.cache_dir), served):
        logger.warning(
            "%d files (%s) and %d deletions wait in the cache %s for a store that is not served; serve it"
            " (--name %s, if its URL has changed), or store them with: ftpvfs cache flush",
            left.files, format_size(left.size), left.deletions, Path(config.vfs.cache_dir) / left.name, left.name,
        )  # fmt: skip


def _ask(stores: Sequence[VFS], tell: Callable[..., None]) -> None:
    """Ask the stores, one after the other, whether they are there and let us in."""
    for vfs in stores:
        late = threading.Timer(
            STORE_PATIENCE, tell, ("%s: no answer for %g s yet; serving all the same", vfs.name, STORE_PATIENCE)
        )
        late.daemon = True
        late.start()
        try:
            vfs.start()
        except Exception as error:  # noqa: BLE001 - told, and again to whoever needs the store
            if isinstance(error, OSError) and error.errno not in FATAL:
                tell("%s: %s; it is asked again when it is needed", vfs.name, reason(error))
            else:
                tell("%s: %s; nobody can use it until that is mended", vfs.name, reason(error))
        finally:
            late.cancel()


# --- words


def greeting(assembly: Assembly, place: Place, workers: int) -> str:
    """Return the line that says what is served where, and how."""
    config, mode = assembly.config, assembly.config.vfs.cache_mode
    stores = ", ".join(vfs.name for vfs in assembly.vfses) or "the users' own stores"
    scheme = "ftps" if place.listener.tls.mode == "implicit" else "ftp"
    cache = f"cache mode {mode}" if mode == "off" else f"cache mode {mode} in {config.vfs.cache_dir}"
    crew = "1 worker" if workers == 1 else f"{workers} workers"
    where = f"{scheme}://{format_address(place.address)}"
    return f"ftpvfs: serving {stores} at {where} ({cache}, TLS {place.listener.tls.mode}, {crew})"


def _address_warnings(config: Config, places: Sequence[Place]) -> Iterator[str]:
    for place in places:
        yield from filter(None, (open_to_all(config, place.address), unreachable(config, place.address)))


def open_to_all(config: Config, address: Address) -> str:
    """Return the warning where any password is right and others than this machine can reach the server, else ""."""
    users = let_in_with_any_password(config)
    if not users or address.is_loopback:
        return ""
    may = "read" if config.vfs.read_only else "read, change and delete"
    who = f"whoever reaches {format_address(address)} as {' or '.join(users)}"
    return f"{who} may {may} everything: any password is right; --pass sets one"


def unreachable(config: Config, address: Address, elsewhere: Callable[[], str] | None = None) -> str:
    """Return the warning where PASV tells clients an address that means nothing outside of a private network, else "".

    `elsewhere` finds the address that this machine has for the rest of the world.
    """
    if config.server.public_ip.host or config.server.proxy_protocol_from or address.is_loopback:
        return ""
    own = address.host
    if ipaddress.ip_address(own.partition("%")[0]).is_unspecified:
        own = (elsewhere or _own_address)()
    if not own or ":" in own or ipaddress.ip_address(own).is_global:  # IPv6 clients use EPSV, which tells no address
        return ""
    return f"clients are told to open data connections to {own}, which only its own network reaches; --public-ip"


def _own_address() -> str:
    """Return the IPv4 address from which this machine reaches others; "" where it has none. Nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(ELSEWHERE)
        return str(probe.getsockname()[0])
    return ""


class Notify:
    """Tells systemd, or whoever else has set NOTIFY_SOCKET, what this process is at (sd_notify(3))."""

    def __init__(self, path: str) -> None:
        self._address = "\0" + path[1:] if path.startswith("@") else path

    def ready(self) -> None:
        """All serve."""
        self._send("READY=1")

    def stopping(self) -> None:
        """It ends."""
        self._send("STOPPING=1")

    def reloading(self) -> None:
        """Certificates and listings are read again, which keeps nobody waiting."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        self._send("READY=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(text.encode(), self._address)
        except OSError as error:
            logger.warning("NOTIFY_SOCKET: %s", error)
