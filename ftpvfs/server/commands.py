"""Reading commands and running them one after the other, also when one has to wait.

On the event loop of a `VFSServer` each command is a task: it parks while a thread asks the store, and what the client
has pipelined behind it waits in order. Elsewhere (pyftpdlib's own servers) a command just runs.
"""

from __future__ import annotations

import enum
import os
import re
import select
import socket
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

from OpenSSL import SSL
from pyftpdlib.exceptions import _RetryError
from pyftpdlib.handlers import FTPHandler

from ftpvfs.server.offload import Abandoned, Offload, Task, current_task
from ftpvfs.waiting import Wait

T = TypeVar("T")

# A path of Linux has 4095 bytes at most, an S3 or GCS key 1024; the rest is for the verb, and a time before the name.
LONGEST_COMMAND = 4096 + 64
# Telnet's signals and options (RFC 854), which old clients send before ABOR and some as soon as they connect. Behind
# the verb they are left alone: a name that is not UTF-8 may have such bytes in it.
TELNET = re.compile(rb"(?:\xff(?:[\xfb-\xfe][^\r\n]|[\xf0-\xfa\xff])?)+")
# Commands that one client may have run before others get their turn.
COMMANDS_A_TURN = 16
# Replies that a client has not taken, before no more of its commands are run.
MOST_REPLIES = 16
# Seconds that a client gets to take the last reply.
LAST_WORDS = 5.0
# Seconds that a command which waits, or a transfer that stands still, gets once its client has ended its side of the
# connection, since it cannot be seen whether anybody still waits for the reply.
LINGER = 3.0
# How much of what a client has said is looked at before it is read.
PEEK = 4096
# What a client may say in the middle of an upload, so that it tells nothing about the upload's end.
IN_TRANSFER = {b"NOOP", b"STAT"}


class Commands(FTPHandler):
    """The control connection of a `VFSHandler`, as far as it is a row of commands. Runs on its event loop."""

    # pyftpdlib's own.
    ac_in_buffer: bytes
    _quit_pending: bool
    _idler: Any

    ac_in_buffer_size = 8192
    # Bytes of commands that wait here behind one that is not through; more wait with the client.
    most_pipelined = 8192

    # The command that runs, on a loop on which it may park.
    _task: Task | None = None
    # Replies that are sent together, once no more follow at once: a send costs as much as the rest of a command.
    _replies: list[bytes] | None = None
    # Ends the session of a client that does not take its last reply.
    _goodbye: Any = None
    # Whether commands wait for the client to take its replies.
    _is_clogged = False
    # The present command is longer than any may be, and dropped to its end: its tail must not run as another.
    _is_overlong = False
    # Whether the client ends its lines with LF alone, as its first one tells; None before that.
    _ends_with_lf: bool | None = None
    # The client has ended its side of the connection: what it has said in full is run, and more will not come.
    _has_ended = False
    # Bytes of commands that were left to be run when that was last looked at.
    _left = 0
    # ... and takes no replies any more.
    _is_deaf = False
    # The last reply is said: the connection is closed from here, whatever the client has said behind.
    _is_leaving = False

    @property
    def _offload(self) -> Offload | None:
        return getattr(self.ioloop, "offload", None)

    @property
    def offloads(self) -> bool:
        """Whether a command that waits leaves the loop to others."""
        return self._offload is not None

    def offload(
        self, owner: Hashable, call: Callable[[], T], *, changes: bool = False, at_least: Wait = Wait.STORE
    ) -> T:
        """Make a call that may have to wait: `owner` is the store that it waits for (a VFS), or the name of a lane.

        A call that `changes` something is made in full whatever becomes of the session, and waits for `at_least`; any
        other is tried at once and given up when the client leaves. Where the session has a thread or process of its
        own, it is just made.
        """
        task = current_task()
        if task is None:
            return call()
        if self._closed:
            raise Abandoned
        return task.call(owner, call, changes=changes, at_least=at_least)

    # --- reading

    def handle_read(self) -> None:
        """Take what has arrived, and run what is complete."""
        if len(self.ac_in_buffer) >= self.most_pipelined:
            self._listen_for(0)
            return
        try:
            data = self.recv(self.ac_in_buffer_size)
        except _RetryError:
            return
        if data:
            self.ac_in_buffer += data
            if self._task is None:
                self._run_commands()
            else:
                self._abort_if_asked()
        self._read_on()

    def _read_on(self) -> None:
        """Read what TLS has decrypted and not given yet: no event of the connection tells of it."""
        if not self._closed and has_decrypted(self.socket):
            self._soon(self._read_decrypted)

    def _read_decrypted(self) -> None:
        if not self._is_over() and self._wanted_io_events & self.ioloop.READ:
            self.handle_read()

    def initiate_send(self) -> None:
        """Send replies; go on with the commands that waited for that."""
        super().initiate_send()
        if self._is_clogged and len(self.producer_fifo) < MOST_REPLIES and not self._closed:
            self._is_clogged = False
            self._soon(self._run_commands)

    def push(self, data: str) -> None:
        """Send a reply, or several that follow each other at once together; it must not fail for the name in it."""
        if self._is_deaf:
            return
        reply = data.encode(self.encoding, self.unicode_errors)
        if self._replies is None:
            super(FTPHandler, self).push(reply)
        else:
            self._replies.append(reply)

    def push_with_producer(self, producer: Any) -> None:
        """Send more than one reply's worth, behind what was said before."""
        self.say()
        super().push_with_producer(producer)

    def close_when_done(self) -> None:
        """Disconnect the client once it has been told all, or has not listened for a while."""
        self.say()
        self._is_leaving = True
        super().close_when_done()
        if not self._closed and self._goodbye is None:
            self._goodbye = self.call_later(LAST_WORDS, self.close)

    def say(self) -> None:
        """Send the replies that are held back."""
        if self._replies:
            said, self._replies = b"".join(self._replies), []
            super(FTPHandler, self).push(said)

    def _listen_for(self, events: int) -> None:
        self._wanted_io_events = events | (self.ioloop.WRITE if self.producer_fifo else 0)
        self.modify_ioloop_events(self._wanted_io_events)

    def _soon(self, call: Callable[[], None]) -> None:
        call_soon = getattr(self.ioloop, "call_soon", None)
        if call_soon is not None:
            call_soon(call)
        else:
            self.ioloop.call_later(0, call, _errback=self.handle_error)

    def _run_commands(self) -> None:
        """Run what is complete, until one command waits."""
        self._replies = []
        try:
            self._run_some()
        finally:
            self.say()
            self._replies = None
        if self._has_ended:
            self._close_if_done()
        elif not self._wanted_io_events & self.ioloop.READ and not self._is_over() and self._may_read():
            self._listen_for(self.ioloop.READ)
            self._read_on()

    def _may_read(self) -> bool:
        return not self._is_clogged and len(self.ac_in_buffer) < self.most_pipelined

    def _run_some(self) -> None:
        for _ in range(COMMANDS_A_TURN):
            if self._task is not None or self._is_over():
                return
            self._is_clogged = len(self.producer_fifo) >= MOST_REPLIES
            line = None if self._is_clogged else self._next_line()
            if line is None:
                return
            self._run_line(line)
        self._soon(self._run_commands)

    def _is_over(self) -> bool:
        return self._closed or self._closing or self._quit_pending

    def _next_line(self) -> bytes | None:
        """Return the next command, None when none is complete; one that is too long is answered here."""
        end = self._end_of_line()
        if end < 0:
            if len(self.ac_in_buffer) > LONGEST_COMMAND:
                self._is_overlong = True
                self.ac_in_buffer = b"\r" if self.ac_in_buffer.endswith(b"\r") else b""
            return None
        line, self.ac_in_buffer = self.ac_in_buffer[:end].removesuffix(b"\r"), self.ac_in_buffer[end + 1 :]
        if self._is_overlong or len(line) > LONGEST_COMMAND:
            self._is_overlong = False
            self.respond_w_warning("500 Command too long.")
            return self._next_line()
        return line

    def _end_of_line(self) -> int:
        """Return where the LF is that ends the next line, -1 where none has come.

        A client that ends its lines with CR LF (RFC 959, section 5.3) may have an LF of its own before that, in a name:
        the line is refused as a whole, and what is behind the LF is no other command.
        """
        lf = self.ac_in_buffer.find(b"\n")
        if lf < 0:
            return lf
        is_bare = self.ac_in_buffer[max(lf - 1, 0) : lf] != b"\r"
        if self._ends_with_lf is None:
            self._ends_with_lf = is_bare
        crlf = self.ac_in_buffer.find(b"\r\n", lf) if is_bare and not self._ends_with_lf else -1
        return lf if crlf < 0 else crlf + 1

    # --- running

    def _run_line(self, line: bytes) -> None:
        if self._idler is not None and not self._idler.cancelled:
            self._idler.reset()
        if line.startswith(b"\xff"):
            line = TELNET.sub(b"", line, count=1)
        text = self.decode(line)
        offload = self._offload
        if offload is None:
            self._run_command(text)
            return
        task = self._task = offload.task(partial(self._run_command, text))
        task.start()
        self._abort_if_asked()
        if task.is_over:
            self._task = None
        else:
            task.ended = self._continue

    def _run_command(self, line: str) -> None:
        command = line.split(" ", 1)[0].upper()
        self.pre_process_command(line, command, line[len(command) + 1 :])

    def _continue(self) -> None:
        """Go on with what was pipelined behind the command that has just ended, having waited."""
        self._task = None
        self._run_commands()

    def _abort_if_asked(self) -> None:
        """Give up a command that waits when an ABOR stands behind it, unless it has begun to change something."""
        task = self._task
        if task is not None and task.may_be_aborted and self.ac_in_buffer and asks_to_abort(self.ac_in_buffer):
            task.abandon()

    # --- the end

    def handle_close(self) -> None:
        """Called when the client has ended its side of the connection, or all of it.

        A client that has ended its side alone still reads: what it had said in full is run and answered. So is, without
        an answer, what changes something when the client is gone altogether, unless it was cut off by a reset.
        """
        if self._closed or self._is_leaving:
            self.close()
            return
        is_gone = self._is_deaf or not takes_replies(self._fileno)
        was_cut_off = is_gone and not self._has_ended and not asks_to_quit(self.ac_in_buffer)
        if was_cut_off or not self._has_work():
            self.close()
            return
        if is_gone:
            self._be_deaf()
        else:
            self._listen_for(0)
        if not self._has_ended:
            self._has_ended = True
            if self._awaits_reply():
                self._has_moved()  # from now on
            self._left = len(self.ac_in_buffer)
            self.call_later(LINGER, self._stop_waiting)
            if self._task is None:
                self._soon(self._run_commands)

    def _be_deaf(self) -> None:
        """Say no more; a command that nobody needs the answer of is given up."""
        self._is_deaf = True
        self.discard_buffers()
        self.del_channel()
        if self._task is not None and self._task.may_be_aborted:
            self._task.abandon()

    def _has_work(self) -> bool:
        """Tell whether something is left to be done for a client that will say no more."""
        return self._task is not None or b"\n" in self.ac_in_buffer or self._awaits_reply()

    def _awaits_reply(self) -> bool:
        """Tell whether a transfer goes on although the client has ended its side of the control connection."""
        return False

    def _has_moved(self) -> bool:
        """Tell whether the transfer that goes on has moved anything since the last time."""
        return False

    def _close_if_done(self) -> None:
        """Disconnect a client that will say no more, once all that it had said is answered."""
        if not self._closed and not self._is_over() and not self._has_work():
            self.close_when_done()

    def _stop_waiting(self) -> None:
        """Disconnect a client that will say no more, and whose command still waits.

        A transfer that moves may go on, and so may a row of commands one of which has been run meanwhile.
        """
        before, self._left = self._left, len(self.ac_in_buffer)
        if self._left != before or (self._awaits_reply() and self._has_moved()):
            self.call_later(LINGER, self._stop_waiting)
        else:
            self.close()

    def handle_timeout(self) -> None:
        """Called when the client has said nothing for `timeout` seconds; one who waits for an answer need not."""
        if self._task is None:
            super().handle_timeout()
        else:
            self._idler = self.ioloop.call_later(self.timeout, self.handle_timeout, _errback=self.handle_error)

    def handle_error(self) -> None:
        """Log the exception that is being handled, and close."""
        self._error = True  # pyftpdlib's mark that TLS is not shut down any more
        FTPHandler.handle_error(self)

    def close(self) -> None:
        """Disconnect the client; a command that waits is given up."""
        if self._closed:
            return
        self.say()
        super().close()
        task, self._task = self._task, None
        if task is not None and task is not current_task():
            task.abandon()


def has_decrypted(connection: Any) -> bool:
    """Tell whether TLS holds bytes of the client's that are decrypted already; always no without TLS."""
    pending = getattr(connection, "pending", None)
    return pending is not None and bool(pending())


def takes_replies(descriptor: int) -> bool:
    """Tell whether a connection still takes what is sent: at the most the client's own side has ended."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return not poll.poll(0)


def is_ended(session: Any, patience: float = 0.0) -> bool:
    """Tell whether the client has ended its side of the control connection, or does within `patience` seconds."""
    if session._closed or not session.connected:
        return True
    poll = select.poll()
    if hasattr(select, "POLLRDHUP"):
        poll.register(session._fileno, select.POLLRDHUP)
        return bool(poll.poll(patience * 1000))
    poll.register(session._fileno, select.POLLIN)  # macOS
    return bool(poll.poll(patience * 1000)) and not _has_bytes(session._fileno)


def _has_bytes(descriptor: int) -> bool:
    """Tell whether what a readable connection has to say is more than that it ended."""
    with socket.socket(fileno=os.dup(descriptor)) as probe:
        try:
            return bool(probe.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False


class Announced(enum.Enum):
    """What a client has said behind the command that is being done, before the loop has read it."""

    NOTHING = "nothing that tells how the client means the end of its data connection"
    COMMAND = "a command that comes after an upload, so that the upload is complete"
    ABORT = "that the upload is to be aborted"


def announced(session: Any) -> Announced:
    """Return what the client of an upload that has ended has said since.

    The loop may hear of the ends of the two connections in either order, and of what was said before them after them:
    many devices hang up as soon as they have said QUIT.
    """
    if session._closed:
        return Announced.NOTHING
    if session._quit_pending:
        return Announced.COMMAND
    *lines, _ = (session.ac_in_buffer + _unread(session)).split(b"\n")
    for line in lines[1:] if getattr(session, "_is_overlong", False) else lines:
        if asks_to_abort(line + b"\n"):
            return Announced.ABORT
        if line.strip() and line.split()[0].upper() not in IN_TRANSFER:
            return Announced.COMMAND
    return Announced.NOTHING


def _unread(session: Any) -> bytes:
    """Return what has arrived on a control connection and is not read yet."""
    try:
        waiting: bytes = session.socket.recv(PEEK, socket.MSG_PEEK)
    except (OSError, SSL.Error):  # nothing waits
        return b""
    if has_decrypted(session.socket):  # by having been looked at, so that no event tells of it any more
        session.ioloop.call_later(0, session.handle_read_event, _errback=session.handle_error)
    return waiting


def asks_to_quit(waiting: bytes) -> bool:
    """Tell whether a QUIT is among the commands."""
    return any(line.strip().upper() == b"QUIT" for line in waiting.split(b"\n")[:-1])


def asks_to_abort(waiting: bytes) -> bool:
    """Tell whether an ABOR is among the commands; Telnet's signals may stand before it, as pyftpdlib knows."""
    return b"ABOR" in waiting.upper() and any(
        line.endswith(b"ABOR") and b" " not in line for line in waiting.upper().splitlines()
    )
