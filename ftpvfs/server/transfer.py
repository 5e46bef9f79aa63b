"""Data connections that tell a finished upload from a broken one, and answer the truth, once, about each transfer.

pyftpdlib closes a file alike after success, ABOR, a time-out and a reset, takes a TCP reset and a TLS connection
cut short for the end of an upload, and says nothing at all when closing the file fails. Here an upload is complete
only after a clean end: a FIN on a plain connection, close_notify on a TLS one, with the control connection still
there. Then the file is committed, and only then 226 is sent; everything else gives the file up and says why.
"""

from __future__ import annotations

import enum
import errno
import logging
import select
import socket
import sys
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from typing import Any

from OpenSSL import SSL
from pyftpdlib.exceptions import _FileReadWriteError, _RetryError
from pyftpdlib.handlers import DTPHandler, TLS_DTPHandler
from pyftpdlib.handlers.ftp.producers import FileProducer
from pyftpdlib.ioloop import _ERRNOS_DISCONNECTED, _ERRNOS_RETRY, AsyncChat
from pyftpdlib.utils import is_ssl_sock

from ftpvfs.errors import EFULL, ENOSTORE, failure, reason_of
from ftpvfs.readiness import Awaited, Bytes
from ftpvfs.server.commands import Announced, announced, is_ended
from ftpvfs.server.loop import is_watched, leave_loop
from ftpvfs.server.offload import Abandoned, Offload, Task, current_task
from ftpvfs.server.source import SEND, STEP, FileSource, NetworkText, TLSSource, ViewSource
from ftpvfs.server.throttle import Rate, Rates, Throttle
from ftpvfs.server.tls import TLSData
from ftpvfs.waiting import Wait, WouldWait, without_waiting

logger = logging.getLogger(__name__)

# Sends of up to 1 MiB in one turn of the loop.
SENDS = 4
# What the client hears when a transfer failed for a reason of the store's (RFC 959, section 5.4: STOR, RETR).
# Where space is short: 452 says that it will not be for long, 552 that the client can do nothing about it.
NO_SPACE = {EFULL: 452, errno.ENOSPC: 552, getattr(errno, "EDQUOT", errno.ENOSPC): 552, errno.EFBIG: 552}
# What no other try will change; 451 would have a client send all again.
FOR_GOOD = {ENOSTORE, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR,
            errno.EINVAL, errno.ENAMETOOLONG}  # fmt: skip
# Seconds for which a transfer may be kept waiting here, for room in the cache, a rate or the store, without being taken
# for one that stands still.
LONGEST_HOLD = 60.0
# Seconds between the ends of a killed client's two connections, which its system closes one after the other (measured
# on Linux: 0.03 ms; on a machine that is out of processors a turn of its scheduler).
EXIT_GAP = 0.002
# What the network adds to that: TCP itself takes an answer for late after its round-trip time and four times the
# variation of that (RFC 6298, section 2); here two packets travel the same way, so that the variation alone counts.
VARIATIONS = 4
MOST_PATIENCE = 0.25
# Seconds without a byte after which an upload is not taken for one whose last bytes are still on their way.
IDLE = 1.0
# Offset of tcpi_rttvar, microseconds, in Linux' struct tcp_info.
RTTVAR_OFFSET = 72

INTERNAL_ERROR = ("451 Internal error; transfer aborted.", logger.warning)


class BrokenOff(Exception):
    """An upload was given up whose end was no proper one. No OSError: the store has nothing to do with it."""


class Stage(enum.Enum):
    """How far a transfer is."""

    MOVING = "bytes come or go, or are still to"
    ENDED = "the client has ended its upload; it is seen whether it meant that, while the file is made ready"
    SETTLING = "the file is being published, or a download verified"
    SETTLED = "it is known what came of the transfer"


class VFSDTPHandler(DTPHandler):
    """A data connection for files of a `VFSFilesystem`. Runs on the session's event loop.

    On a `VFSServer`'s loop it never waits: it sleeps while a file has no bytes yet or cannot take more, and what may
    take long at the end of a transfer is a task. On pyftpdlib's own servers the calls just block.
    """

    # pyftpdlib's own.
    cmd: str | None
    _lastdata: int
    _had_cr: bool
    _resp: Any
    file_obj: Any
    _current_io_events: int
    # Tells the filesystem that `commit` is called, so that closing alone need not publish.
    commits = True
    # Seconds from the end of an upload within which the control connection may end, too, and show that the client was
    # killed; None: as the control connection's own round trips suggest. Meanwhile the file is made ready, so that a
    # short patience costs no time; a longer one is safer where packets get lost.
    patience: float | None = None
    ac_in_buffer_size = STEP
    ac_out_buffer_size = STEP
    # Bytes a second from and to the client, as in pyftpdlib's `ThrottledDTPHandler`; 0 is no limit. Listings go as fast
    # as they can.
    read_limit = 0
    write_limit = 0

    # pyftpdlib's, for a TLS handshake that is under way; on a plain connection there is none.
    _ssl_accepting = False
    stage = Stage.MOVING
    # Done when the transfer has got its answer; None before its end has begun.
    outcome: Future[None] | None = None
    # Where the bytes of a file come from that is sent.
    _source: FileSource | ViewSource | None = None
    # What a thread does for the transfer before it can go on.
    _errand: Task | None = None
    # What keeps the transfer to a rate.
    _throttle: Throttle | None = None
    # Where the bytes that are sent begin.
    _first = 0
    # Why an upload that has ended is given up, "" where it is to be published; None before its end.
    _verdict: Future[str] | None = None
    # What a command waits for that came before all bytes of the upload were here.
    _end_or_idleness: Future[None] | None = None
    # Why the transfer was broken off.
    _reason = ""
    # Whether the client has shown, by what it says on its control connection, that it means the end of its upload.
    _is_meant = False
    # Since when it is this side that keeps an upload from going on, monotonic time; None while it does not.
    _held_since: float | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a command has said what the connection is for; from then on it owes the client one reply."""
        return bool(self._initialized)

    def transfer_in_progress(self) -> bool:
        """Tell pyftpdlib whether REIN and USER are to let a transfer finish (RFC 959), also before its first byte."""
        return self.is_busy

    @property
    def _offload(self) -> Offload | None:
        """What keeps this loop from waiting; None on a loop that may."""
        return getattr(self.ioloop, "offload", None)

    @property
    def _store(self) -> Hashable:
        """Whose threads do what has to wait."""
        return getattr(self.cmd_channel.fs, "vfs", None)

    def add_channel(self, map: Any = None, events: int | None = None) -> None:  # noqa: A002 - asyncore's name
        """Be watched by the loop. Bytes, or an end, that come before the command wait in the kernel for it."""
        if events is not None:
            super().add_channel(map, events)

    def del_channel(self, map: Any = None) -> None:  # noqa: A002 - asyncore's name
        """Be watched no more."""
        if is_watched(self):
            super().del_channel(map)

    def modify_ioloop_events(self, events: int, logdebug: bool = False) -> None:
        """Be watched for these events."""
        if self._closed:
            return
        if not is_watched(self):
            self.add_channel(events=events)
        elif events != self._current_io_events:
            self.ioloop.modify(self._fileno, events)
        self._current_io_events = events

    def readable(self) -> bool:
        """Tell the loop whether to read."""
        return bool(self.receive)

    # --- sleeping

    def _sleep(self, future: Future[Any]) -> None:
        """Neither read nor write until the future is done. The end of a broken connection is heard all the same."""
        self._want(0)
        if self.receive:
            self._held_since = time.monotonic()
        loop = self.ioloop
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._wake))

    def _wake(self) -> None:
        self._held_since = None
        if self._closed or self.stage is not Stage.MOVING:
            return
        try:
            if self.receive:
                self._read_on()
            else:
                self._want(self.ioloop.WRITE)
                self.handle_write_event()
        except Exception:  # noqa: BLE001 - answered there
            self.handle_error()

    def _begin_throttled(self) -> None:
        limit = self.read_limit if self.receive else self.write_limit
        rates: Rates | None = getattr(self.cmd_channel, "rates", None)
        if rates is not None:
            self._throttle = rates.throttle(self.cmd_channel.username, up=self.receive, limit=limit)
        elif limit:
            self._throttle = Throttle([Rate(limit)])

    def _allowed(self, most: int) -> int:
        """Return how many bytes to move now; where it is none the connection sleeps until some may be."""
        if self._throttle is None:
            return most
        allowed = min(most, self._throttle.allowed())
        if not allowed:
            self._want(0)
            self._held_since = time.monotonic()
            self.call_later(self._throttle.delay(), self._wake)
        return allowed

    def _moved(self, count: int) -> None:
        if self._throttle is not None:
            self._throttle.moved(count)

    def _want(self, events: int) -> None:
        self._wanted_io_events = events
        self.modify_ioloop_events(events)

    # --- uploads

    def enable_receiving(self, type: str, cmd: str) -> None:  # noqa: A002 - pyftpdlib's name
        """Begin an upload."""
        super().enable_receiving(type, cmd)
        self._begin_throttled()

    def handle_read(self) -> None:
        """Take what has arrived; an empty read is the clean end."""
        allowed = self._allowed(self.ac_in_buffer_size)
        if not allowed:
            return
        try:
            chunk = self.recv(allowed)
        except _RetryError:
            return
        except OSError as error:
            self.break_off(f"Connection lost ({reason_of(error)})")
            return
        if not self.receive:  # TLS reads during a download, too; what a client says there means nothing
            if not chunk:
                self.handle_close()
        elif chunk:
            self._take(chunk)
        else:
            self._end_upload()

    handle_read_event = handle_read

    def recv(self, buffer_size: int) -> bytes:
        """Return what has arrived, empty at a clean end. Raises OSError where the connection broke."""
        try:
            return self.socket.recv(buffer_size)  # type: ignore[no-any-return]
        except OSError as error:
            if error.errno in _ERRNOS_RETRY:
                raise _RetryError from error
            raise

    def _take(self, chunk: bytes) -> None:
        self.tot_bytes_received += len(chunk)
        self._moved(len(chunk))
        if self._data_wrapper is not None:
            chunk = self._data_wrapper(chunk)
        if self._offload is None or not hasattr(self.file_obj, "accept"):
            self.file_obj.write(chunk)
            return
        self.file_obj.accept(chunk)
        busy = self.file_obj.pressure()
        if busy is not None:
            self._sleep(busy)

    def _read_on(self) -> None:
        """Read again, unless the file still cannot take more."""
        busy = None if self._offload is None else self.file_obj.pressure()
        if busy is not None:
            self._sleep(busy)
        else:
            self._want(self.ioloop.READ)

    def foresee_outcome(self) -> Future[None] | None:
        """Return what is done when the transfer has got its answer; None while the client may still send more.

        A client ends its upload before it says more, but the loop may hear of the two in either order.
        """
        if self.outcome is None and self.receive and hasattr(select, "POLLRDHUP"):
            poll = select.poll()
            poll.register(self._fileno, select.POLLRDHUP)
            if poll.poll(0):
                self.outcome = Future()
        return self.outcome

    def end_or_idleness(self) -> Future[None]:
        """Return what is done when an upload has ended, or when for a while nothing of it has come.

        What a client says behind the bytes of an upload may be here before all of them are.
        """
        self._end_or_idleness = either = Future[None]()

        def look(received: int) -> None:
            if self.tot_bytes_received == received:
                _finish(either)
            elif not either.done():
                self.call_later(IDLE, look, self.tot_bytes_received)

        self.call_later(IDLE, look, self.tot_bytes_received)
        return either

    def _end_upload(self) -> None:
        """The data connection has ended cleanly: make the file ready, and see whether the control connection goes on.
        """
        self.stage = Stage.ENDED
        self.outcome = self.outcome or Future()
        self._verdict = Future()
        _finish(self._end_or_idleness)
        try:
            self.del_channel()
            self._judge()
            if not self._verdict.done():
                self._judge_again()
            self._settle(self._publish, Stage.ENDED)
        except BaseException:
            self.stage = Stage.SETTLED  # no thread has the file
            raise

    def _judge_again(self) -> None:
        """Judge for the last time once the client's control connection has had time to end."""
        if self._offload is not None:
            self.call_later(self._patience(), self._judge, is_last=True)
        else:
            is_ended(self.cmd_channel, self._patience())  # waits; what it finds is looked at next
            self._judge(is_last=True)

    def _patience(self) -> float:
        return patience_for(self.cmd_channel.socket) if self.patience is None else self.patience

    def confirm_end(self) -> None:
        """The client goes on with other commands, so that it means the end of its upload."""
        self._is_meant = True
        if self.stage is Stage.ENDED:
            self._judge()

    def doubt_end(self) -> None:
        """An upload that goes on has not ended: what was said in its midst tells nothing about an end to come."""
        if self.stage is Stage.MOVING:
            self._is_meant = False

    def _judge(self, is_last: bool = False) -> None:
        """Decide whether the client means the end of its upload, where what it says tells, or is not waited for."""
        if self._verdict is None or self._verdict.done():
            return
        session = self.cmd_channel
        said = announced(session)
        if said is Announced.ABORT:
            self._decide("Aborted by the client")
        elif self._is_meant or said is Announced.COMMAND or self._tells_its_end():
            self._decide("")
        elif is_ended(session):
            self._decide("The control connection is gone")
        elif is_last:
            self._decide("")

    def _tells_its_end(self) -> bool:
        """Tell whether only a client that means it ends the data connection so."""
        return False

    def _decide(self, reason: str) -> None:
        if self._verdict is not None and not self._verdict.done():
            self.stage = Stage.SETTLING
            self._verdict.set_result(reason)

    def _publish(self) -> None:
        if self._had_cr:  # pyftpdlib keeps a CR back to see whether an LF follows, and forgets the last one
            getattr(self.file_obj, "accept", self.file_obj.write)(b"\r")
            self._had_cr = False  # this may be called again, where committing has to wait
        if hasattr(self.file_obj, "commit"):
            self.file_obj.commit(self._confirm)
        else:
            self._confirm()
            self.file_obj.close()

    def _confirm(self) -> None:
        """Wait until it is decided that the upload is to be published; raise `BrokenOff` where it is not."""
        assert self._verdict is not None
        reason = self._verdict.result()
        if reason:
            raise BrokenOff(reason)

    def _settle(self, last_step: Callable[[], object], stage: Stage = Stage.SETTLING) -> None:
        """Do what may take a while and decides about the transfer; then answer it."""
        offload = self._offload
        if offload is None:
            self.stage = stage
            self._settled(last_step)
            return
        store, need = self._store, getattr(self.file_obj, "last_step_waits_for", Wait.STORE)
        task = offload.task(lambda: self._settled(lambda: task.call(store, last_step, changes=True, at_least=need)))
        if self.stage is not Stage.SETTLING:  # it may be decided already
            self.stage = stage
        task.start()

    def _settled(self, last_step: Callable[[], object]) -> None:
        try:
            last_step()
            self._succeed()
        except BrokenOff as broken:
            self._resp = (f"426 {broken}; transfer aborted.", logger.info)
        except OSError as error:
            self._resp = (failure_reply(error), logger.warning)
        except Abandoned:  # the server ends; a thread still has the file
            self._decide("The server ends")
            self.file_obj = None
        except Exception:  # noqa: BLE001 - logged with its traceback; the client hears that it failed
            self._resp = INTERNAL_ERROR
            self.log_exception(self)
        finally:
            self.stage = Stage.SETTLED
            self.close()

    # --- downloads

    def push_with_producer(self, producer: Any) -> None:
        """Send a file without copying its bytes, unless ASCII type rewrites them."""
        self._initialized = True  # first of all: whatever fails from here on is answered
        if isinstance(producer, FileProducer):
            self.cmd = self.cmd or "RETR"  # pyftpdlib's own handler says so after this call, which may end the transfer
            if hasattr(producer.file, "take_views"):
                self._send_from(self._source_of(producer.file, producer.type))
                return
            if producer.type == "a":
                producer = TextProducer(producer.file, self.ac_out_buffer_size)
        super().push_with_producer(producer)

    def _source_of(self, file: Any, kind: str) -> FileSource | ViewSource:
        is_text = kind == "a"
        is_tls = is_ssl_sock(self.socket)
        if not is_text and not is_tls and self.cmd_channel.use_sendfile and file.is_in_file:
            return FileSource(file, self)
        source = TLSSource if is_tls else ViewSource
        return source(file, self, NetworkText() if is_text else None)

    def use_sendfile(self) -> bool:
        """Tell pyftpdlib that it may not: its own takes a connection that is gone at once for the file's end."""
        return False

    def _send_from(self, source: FileSource | ViewSource) -> None:
        self._source = source
        self._first = self.file_obj.tell()
        self._begin_throttled()
        if self._ssl_accepting or self._flow():
            self._want(self.ioloop.WRITE)

    def initiate_send(self) -> None:
        """Send what can be sent now."""
        if self._source is None:
            super().initiate_send()
        else:
            self._flow()

    def close_when_done(self) -> None:
        """Called when all that is to be sent is queued; what is sent already needs no further turn of the loop."""
        super().close_when_done()
        if self._source is None and len(self.producer_fifo) == 1 and not self._ssl_accepting:
            self.initiate_send()

    def _flow(self) -> bool:
        """Send some of the file; tell whether to go on when the connection takes more."""
        assert self._source is not None
        for _ in range(SENDS):
            if not self._has_bytes(self._source):
                return False
            allowed = self._allowed(SEND)
            if not allowed:
                return False
            before = self.tot_bytes_sent
            try:
                takes_more = self._source.send(allowed)
            except OSError as error:
                if error.errno in _ERRNOS_DISCONNECTED:
                    self._lost()
                    return False
                if error.errno not in _ERRNOS_RETRY and error.errno != errno.EBUSY:
                    raise
                break
            self._moved(self.tot_bytes_sent - before)
            if not takes_more:
                break
        return not self._closed

    def _has_bytes(self, source: FileSource | ViewSource) -> bool:
        """Tell whether there are bytes to send; where not, they are awaited, or the transfer ends here."""
        while True:
            try:
                found = source.fill() if self._offload is None else without_waiting(source.fill)
            except WouldWait:
                self._catch_up()
                return False
            if isinstance(found, Bytes):
                return True
            if not isinstance(found, Awaited):
                self._end_download()
                return False
            if self._offload is not None:
                self._sleep(found.future)
                return False
            wait([found.future])

    def _catch_up(self) -> None:
        """Let a thread settle what keeps the file from being ready; then go on."""
        offload, store = self._offload, self._store
        assert offload is not None

        def ask() -> None:
            try:
                task.call(store, self.file_obj.poll)
            except Abandoned:
                return
            except Exception:  # noqa: BLE001 - answered there
                self.handle_error()
            self._wake()

        self._want(0)
        task = self._errand = offload.task(ask)
        task.start()

    def _end_download(self) -> None:
        self.discard_buffers()
        if self._source is not None:
            self._require_all(self._source)
        if not hasattr(self.file_obj, "verify"):
            self._settled(lambda: None)
        elif self._offload is None:
            self._settled(self.file_obj.verify)
        else:
            try:
                without_waiting(self.file_obj.verify)
            except WouldWait:
                self._want(0)  # a connection that takes more would wake the loop all the time
                self._settle(self.file_obj.verify)
            except OSError as error:
                self._fail(error)
            else:
                self._settled(lambda: None)

    def _require_all(self, source: FileSource | ViewSource) -> None:
        """Raise EIO unless all of the version was sent, from where the transfer began to its last byte.

        What ASCII type makes of a file has another length than the file, so that there its own bytes are counted.
        """
        file = self.file_obj
        sent = file.tell() - self._first if source.converts else self.tot_bytes_sent
        if sent != file.size - self._first:
            raise failure(errno.EIO, file.path, f"{sent} of {file.size - self._first} bytes were sent")

    def handle_close(self) -> None:
        """Called when all of a listing is sent, or when the connection broke; never the end of an upload."""
        if self._closed or self.stage is not Stage.MOVING:
            return
        if self.receive or self.producer_fifo or self._source is not None or not self.is_busy:
            self._lost()
        else:
            self._end_download()

    # --- ends

    def _succeed(self) -> None:
        self.transfer_finished = True
        self._resp = ("226 Transfer complete.", logger.debug)

    def _fail(self, error: OSError) -> None:
        self._resp = (failure_reply(error), logger.warning)
        self.close()

    def _lost(self) -> None:
        self.break_off(f"Connection lost after {self.get_transmitted_bytes()} bytes")

    def break_off(self, reason: str) -> None:
        """End the transfer at once and unfinished; one whose outcome stands already keeps it."""
        self._reason = self._reason or reason
        if not self._resp and self.stage is not Stage.ENDED:
            self._resp = (f"426 {reason}; transfer aborted.", logger.info)
        self.close()

    def handle_timeout(self) -> None:
        """Called every `timeout` seconds. A transfer that stands still ends; the session goes on."""
        if not self.is_busy or self._is_held:
            self._lastdata = -1  # its time begins with the command, and again when it may go on
        elif self.get_transmitted_bytes() > self._lastdata:
            self._lastdata = self.get_transmitted_bytes()
        elif self.stage is Stage.MOVING:
            self.break_off(f"Nothing moved for {self.timeout} seconds")

    @property
    def _is_held(self) -> bool:
        """Whether it is this side that lets nothing move, and not for longer than what it waits for may take."""
        held = self._held_since
        return held is not None and time.monotonic() - held < max(LONGEST_HOLD, self.timeout or 0)

    def handle_error(self) -> None:
        """Answer the exception that is being handled with its reason."""
        error = sys.exc_info()[1]
        if self.transfer_finished:  # and only the connection was still to be closed
            self.break_off("")
            return
        if isinstance(error, _FileReadWriteError) and isinstance(error.__cause__, OSError):
            error = error.__cause__
        if isinstance(error, SSL.Error):
            self._lost()
        elif isinstance(error, OSError):
            self._fail(error)
        else:
            self._resp = INTERNAL_ERROR
            self.log_exception(self)
            self.close()

    def close(self) -> None:
        """Answer, then give up what was not committed: that may take a while where the store is the reason.

        Whoever closes a transfer without a word (PASV or PORT in its middle, a stopping server) has broken it off. One
        that is being settled closes itself once it is known what came of it.
        """
        if self._closed or self.stage is Stage.SETTLING:
            return
        if self.stage is Stage.ENDED:  # a thread has the file, and is through with it soon
            self._decide(self._reason or "The transfer was broken off")
            return
        try:
            for step in (self._disconnect, self._answer, self._release_file, self._tell):
                self._attempt(step)
        finally:
            if getattr(self.cmd_channel, "data_channel", self) in (self, None):
                self._attempt(self.cmd_channel._on_dtp_close)
            _finish(self.outcome)
            _finish(self._end_or_idleness)

    def _attempt(self, step: Callable[[], object]) -> None:
        """Do one of the steps of the end; the others are done all the same when it fails."""
        try:
            step()
        except Exception:  # noqa: BLE001 - a callback of the embedding program's, or a mistake, must not keep the answer
            self.log_exception(self)

    def _disconnect(self) -> None:
        """Close the connection, which RFC 959 wants before the reply."""
        try:
            leave_loop(self)
        finally:
            AsyncChat.close(self)
        if self._idler is not None and not self._idler.cancelled:
            self._idler.cancel()
        if self._errand is not None and self._errand is not current_task():
            self._errand.abandon()

    def _answer(self) -> None:
        session = self.cmd_channel
        if session._closed:
            return
        if getattr(session, "leaves_answers", False):
            session.answer_transfer(*(self._resp or ("426 Transfer aborted.", logger.info)))
        elif self._resp and self.is_busy:  # pyftpdlib's own handler speaks for itself where nothing is said here
            session.respond(self._resp[0], logfun=self._resp[1])

    def _release_file(self) -> None:
        file = self.file_obj
        if file is None or file.closed:
            return
        need = getattr(file, "abandon_waits_for", Wait.STORE)
        if self._offload is not None and need is not Wait.NOTHING:
            self.cmd_channel.given_up = self._offload.later(self._store, getattr(file, "abandon", file.close), need)
            return
        try:
            file.close()
        except OSError as error:
            logger.warning("closing %r: %s", file.name, error)

    def _tell(self) -> None:
        """Log the transfer and call the embedding program back, now that the truth is known."""
        if self.file_obj is None:
            return
        name, session = self.file_obj.name, self.cmd_channel
        session.log_transfer(
            cmd=self.cmd,
            filename=name,
            receive=self.receive,
            completed=self.transfer_finished,
            elapsed=round(self.get_elapsed_time(), 3),
            bytes=self.get_transmitted_bytes(),
        )
        if self.transfer_finished:
            callback = session.on_file_received if self.receive else session.on_file_sent
        else:
            callback = session.on_incomplete_file_received if self.receive else session.on_incomplete_file_sent
        callback(name)


class TLS_VFSDTPHandler(TLSData, VFSDTPHandler):
    """The same over TLS, where only close_notify ends an upload: a connection that merely stops may have been cut."""

    def recv(self, buffer_size: int) -> bytes:
        """Return what has arrived, empty at a clean end. Raises OSError where the connection broke."""
        return (TLSData if is_ssl_sock(self.socket) else VFSDTPHandler).recv(self, buffer_size)

    def _tells_its_end(self) -> bool:
        """A client that is killed says no close_notify; without it only `--tls-strict-eof off` takes an end for one."""
        return is_ssl_sock(self.socket) and getattr(self.cmd_channel, "tls_strict_eof", True)

    def secure_connection(self, ssl_context: Any) -> None:
        """Begin TLS; the client's part of the handshake comes before the command, or after it."""
        super().secure_connection(ssl_context)
        if self._ssl_accepting and not self._closed:
            self.modify_ioloop_events(self.ioloop.READ)

    def handle_close(self) -> None:
        VFSDTPHandler.handle_close(self)

    def handle_error(self) -> None:
        VFSDTPHandler.handle_error(self)

    def handle_failed_ssl_handshake(self) -> None:
        """Answer the command that wants the connection, if one does (RFC 4217, section 10.2)."""
        self._resp = ("522 TLS handshake failed.", logger.info)
        self.close()

    def close(self) -> None:
        """Say goodbye in TLS, too, unless a download has failed, which is to look cut off.

        After an upload that failed as well: some clients wait for it, and take its absence for the failure.
        """
        if self.stage in {Stage.ENDED, Stage.SETTLING}:
            VFSDTPHandler.close(self)
            return
        if self.cmd_channel._closed or not (self.transfer_finished or self.receive):
            self._error = True  # pyftpdlib's mark that TLS is not shut down any more
        TLS_DTPHandler.close(self)

    def break_off(self, reason: str) -> None:
        """End the transfer at once, without waiting for a client to take the goodbye."""
        self._error = True
        VFSDTPHandler.break_off(self, reason)

    def _do_ssl_shutdown(self) -> None:
        """Shut TLS down. What pyftpdlib neither completes nor waits for would leave the transfer without its answer."""
        super()._do_ssl_shutdown()
        if self._closed:
            return
        if self._ssl_want_read or self._ssl_want_write:  # a task comes here without an event that would see to it
            self._want(self.ioloop.READ if self._ssl_want_read else self.ioloop.WRITE)
        else:
            self._error = True
            self.close()


class TextProducer:
    """A file of another filesystem than ours as network text."""

    def __init__(self, file: Any, step: int) -> None:
        self.file = file
        self._step = step
        self._convert = NetworkText()

    def more(self) -> bytes:
        """Return the next bytes, none at the end."""
        return self._convert(self.file.read(self._step))


def _finish(future: Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)


def failure_reply(error: OSError) -> str:
    """Return the reply for a transfer that failed."""
    code = NO_SPACE.get(error.errno or 0) or (550 if error.errno in FOR_GOOD else 451)
    return f"{code} {reason_of(error)}; transfer aborted."


def patience_for(connection: Any) -> float:
    """Return for how many seconds, after a data connection's end, the end of this control connection may come.

    The gap between a killed client's two ends, and what the network adds to it by the kernel's own measurements.
    """
    if not hasattr(socket, "TCP_INFO"):  # macOS
        return EXIT_GAP
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, RTTVAR_OFFSET + 4)
        variation = int.from_bytes(info[RTTVAR_OFFSET:], sys.byteorder) / 1e6
    except OSError:  # it is gone
        return EXIT_GAP
    return min(EXIT_GAP + VARIATIONS * variation, MOST_PATIENCE)
