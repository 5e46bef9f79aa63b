"""The log: where its entries go, what they look like, and that nobody who serves waits for who reads them."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import logging
import logging.handlers
import os
import queue
import select
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from ftpvfs.config import ConfigError, LogOptions

LEVELS = {"DEBUG": logging.DEBUG, "INFO": logging.INFO, "NOTICE": logging.WARNING, "ERROR": logging.ERROR}
# Entries that may wait to be written; more are dropped, and counted.
MOST_WAITING = 10_000
# Seconds that a process which ends waits for what is still to be written.
LAST_WORDS = 5.0
STDERR = 2


def log_to(options: LogOptions) -> None:
    """Log this package and pyftpdlib at the level asked for; the stores' libraries only from warnings on,
    because their debug output shows credentials. Raises ConfigError for a file that cannot be written.
    """
    level = LEVELS[options.level]
    handler: logging.Handler = _StandardError()
    if options.file:
        try:
            handler = logging.handlers.WatchedFileHandler(options.file)
        except OSError as error:
            raise _unwritable(options.file, error.strerror) from None
    as_text = _LogFormatter("%(asctime)s %(levelname)s: %(message)s")
    handler.setFormatter(_JSONFormatter() if options.format == "json" else as_text)
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    for name in ("ftpvfs", "pyftpdlib"):
        logging.getLogger(name).setLevel(level)


def check_log(options: LogOptions) -> None:
    """Raise what `log_to` would for a file that cannot be written; none is made."""
    file = Path(options.file)
    if not options.file:
        return
    if file.is_dir():
        raise _unwritable(options.file, os.strerror(errno.EISDIR))
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise _unwritable(options.file, os.strerror(errno.EACCES if file.parent.is_dir() else errno.ENOENT))


def _unwritable(file: str, why: str | None) -> ConfigError:
    return ConfigError(f"log file {file!r} cannot be written: {why}")


@contextlib.contextmanager
def written_by_a_thread() -> Iterator[None]:
    """Have a thread write the log, so that nobody else waits where a pipe is not read or a disk hangs.

    To be entered after a fork. Entries beyond those that may wait are dropped, which the log tells once it goes on; as
    the block ends all others are written, unless that takes too long.
    """
    root = logging.getLogger()
    handlers = root.handlers[:]
    entries: queue.Queue[Any] = queue.Queue(MOST_WAITING)
    waiting = _Waiting(entries)
    writer = _Writer(entries, waiting, handlers)
    writer.start()
    root.handlers[:] = [waiting]
    try:
        yield
    finally:
        root.handlers[:] = handlers
        writer.stop()


class _Waiting(logging.handlers.QueueHandler):
    """Puts entries into a queue, and drops those for which there is no room."""

    def __init__(self, entries: queue.Queue[Any]) -> None:
        super().__init__(entries)
        self.dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Return the entry with its text as it is now; the standard library's own adds the traceback to it."""
        entry = copy.copy(record)
        entry.msg, entry.args = record.getMessage(), None
        return entry

    def enqueue(self, record: logging.LogRecord) -> None:
        """Never wait. Called with the handler's lock held."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class _Writer(logging.handlers.QueueListener):
    """The thread that writes what waits."""

    def __init__(self, entries: queue.Queue[Any], waiting: _Waiting, handlers: list[logging.Handler]) -> None:
        super().__init__(entries, *handlers)
        self._waiting = waiting

    def handle(self, record: logging.LogRecord) -> None:
        """Write an entry; and how many are missing, as soon as some could be written again."""
        super().handle(record)
        if self._waiting.dropped:
            self._tell_dropped()

    def _tell_dropped(self) -> None:
        with self._waiting.lock or contextlib.nullcontext():
            dropped, self._waiting.dropped = self._waiting.dropped, 0
        text = f"{dropped} entries are missing here: the log could not be written as fast as they came"
        super().handle(logging.LogRecord("ftpvfs", logging.WARNING, __file__, 0, text, None, None))

    def stop(self) -> None:
        """Write what waits and end; give up on a log that takes too long."""
        thread = self._thread
        if thread is None:
            return
        with contextlib.suppress(queue.Full):
            self.queue.put(self._sentinel, timeout=LAST_WORDS)  # type: ignore[attr-defined]
            thread.join(LAST_WORDS)
        if thread.is_alive():
            for handler in self.handlers:
                handler.lock = None  # that thread has it, and the end of the process would wait for it
        self._thread = None


class _StandardError(logging.Handler):
    """Writes to the descriptor: a stream's buffer has a lock for which the end of the process would wait."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write an entry; nobody can be told where that fails."""
        try:
            entry = f"{self.format(record)}\n".encode(sys.stderr.encoding or "utf-8", "backslashreplace")
        except Exception:  # noqa: BLE001 - logging's own way to tell of a wrong format
            self.handleError(record)
            return
        with contextlib.suppress(OSError):
            while entry:
                entry = entry[_write(entry) :]


def _write(entry: bytes) -> int:
    try:
        return os.write(STDERR, entry)
    except BlockingIOError:  # whoever has the other end has made it so
        select.select([], [STDERR], [])
        return 0


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
