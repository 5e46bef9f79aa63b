"""Control connections: pyftpdlib's verbs, with the replies that clients of a store need.

Each command gets its final reply, each transfer exactly one, whatever fails; and no name in a command or a reply
can make a second line of it.
"""

from __future__ import annotations

import errno
import logging
import posixpath
import re
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from pyftpdlib.exceptions import FilesystemError
from pyftpdlib.handlers.ftp.producers import BufferedIteratorProducer
from pyftpdlib.log import logger as session_logger

from ftpvfs import paths
from ftpvfs.errors import reason_of
from ftpvfs.pattern import is_pattern
from ftpvfs.server.dispatch import VFSActiveDTP, VFSPassiveDTP, plain_address
from ftpvfs.server.limits import Limited
from ftpvfs.server.login import Login
from ftpvfs.server.offload import Abandoned, current_task
from ftpvfs.server.parameters import Parameters
from ftpvfs.server.public_address import PublicAddress
from ftpvfs.server.refusals import is_refusal, log_failed_transfer, log_refused_command
from ftpvfs.server.throttle import Rates
from ftpvfs.server.tls import TLSControl
from ftpvfs.server.transfer import INTERNAL_ERROR, NO_SPACE, Stage, TLS_VFSDTPHandler, VFSDTPHandler

logger = logging.getLogger(__name__)
T = TypeVar("T")

# pyftpdlib answers 550 to every failure, which tells a client not to try again. RFC 959, section 4.2: 4xx may be.
TRY_AGAIN = {
    errno.EBUSY,
    errno.EAGAIN,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
}
BAD_NAME = {errno.EINVAL, errno.ENAMETOOLONG, errno.EISDIR}
# What gives something a name, which may be one that is not allowed (553).
NAMING = {"STOR", "STOU", "APPE", "RNTO", "MKD", "XMKD"}
TRANSFERS = {"RETR", "STOR", "STOU", "APPE", "LIST", "NLST", "MLSD"}
# `LIST -la folder`: what ls knows and clients send. A folder that is called so is listed as `./-la`.
LS_OPTIONS = re.compile(r"-[aAlLFRrStdhn1]+(?: |$)")
# `MDTM 20240102030405 name`, by which old clients set a time; some write fractions of seconds, in MFMT as well.
TIME_AND_NAME = re.compile(r"(\d{14})(?:\.\d+)? +(\S.*)")
# What follows a word that ends in PASS in a client's line: pyftpdlib masks an exact PASS alone, and not one behind a
# space or Telnet's signals.
PASSWORD = re.compile(r"(<- (?:.*?\s)??\S*PASS)\s.*", re.IGNORECASE | re.DOTALL)
# pyftpdlib makes a line for the log before it asks whether anybody wants to have it.
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# How often another passive port is looked for when a session was faster with the one that was found.
PORT_TRIES = 20
# What does not wait while the outcome of an upload that has ended is still being found out: it touches no file, and no
# data connection. So a file that is deleted behind its upload is gone.
BEFORE_THE_OUTCOME = {"NOOP", "STAT", "QUIT", "PWD", "XPWD", "FEAT", "SYST", "HELP"}
# What asks for a file waits until a broken upload is put away, so that a client learns where to go on with it.
# So does what gives the file's name to another one, or takes it away: what came of the upload goes with it.
AFTER_GIVING_UP = {"SIZE", "MLST", "STOR", "APPE", "DELE", "RNFR", "RNTO", "RMD"}


def reply_code(error: OSError, cmd: str) -> int:
    """Return the reply code for a command that failed."""
    if error.errno in NO_SPACE:
        return NO_SPACE[error.errno]
    if error.errno in TRY_AGAIN:
        return 450
    return 553 if error.errno in BAD_NAME and cmd in NAMING else 550


class VFSHandler(Limited, PublicAddress, Parameters, Login):
    """A session over a `VFSFilesystem`; set `abstracted_fs` and `authorizer` on a subclass. Runs on its event loop."""

    # pyftpdlib's own.
    _last_response: str
    data_channel: Any
    _dtp_acceptor: Any
    _dtp_connector: Any
    _in_dtp_queue: Any
    _out_dtp_queue: Any

    # Tells the data connection that it is to answer for every transfer, also for one that is closed from here.
    leaves_answers = True
    dtp_handler = VFSDTPHandler
    passive_dtp = VFSPassiveDTP
    active_dtp = VFSActiveDTP
    banner = "ftpvfs ready."
    # Names that are not UTF-8 go out as they are and come back the same.
    unicode_errors = "surrogateescape"
    auth_failed_timeout = 1

    # What rates the session's data connections keep to.
    rates: Rates | None = None
    # What the filesystem said about the command that runs; it decides the code of a 550.
    failure: OSError | None = None
    # The command that runs, and what the client has written behind it, options of ls aside.
    _verb = _argument = ""
    # The type of the last transfer that was asked for, which may still wait for its data connection.
    _asked_type = ""
    # Bytes that the present transfer had moved when that was last asked.
    _moved_before = -1
    # Whether a 1xx was sent whose transfer has not had its final reply: exactly one is due, whatever fails.
    _owes_reply = False
    # Done when the last broken upload is put away, which may take longer than its answer.
    given_up: Future[None] | None = None
    # The command that runs, its argument, and whom the client had named before: whose the next reply is.
    _running = ("", "", "")
    _local_address: tuple[Any, ...] | None = None

    def run_as_current_user(self, function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        """Call the filesystem as the server's own user, whatever the authorizer would change to (`impersonate_user`).

        A call may park while the loop serves others, who would be served as this session's user then.
        """
        return function(*arguments, **keywords)

    # --- replies and the log

    def respond(self, resp: str, logfun: Any = session_logger.debug) -> None:
        """Send a reply; a 550 gets the code that its reason deserves. After a 1xx a transfer's final reply is owed."""
        if resp.startswith("1"):
            self._owes_reply = True
        if self.failure is not None and resp[:4] in {"550 ", "450 "}:
            resp = f"{reply_code(self.failure, self._verb)} {resp[4:]}"
        if is_refusal(resp) and log_refused_command(self, *self._running, resp):
            logfun = session_logger.debug  # it is logged
        super().respond(resp, logfun)

    def answer_transfer(self, resp: str, logfun: Any = session_logger.debug) -> None:
        """Send the reply that ends a transfer, unless it was sent; it is no reply to a command that runs meanwhile."""
        if not self._owes_reply:
            return
        self._owes_reply = False
        last, file = self._last_response, getattr(self.data_channel, "file_obj", None)
        try:
            if file is not None and is_refusal(resp):
                log_failed_transfer(self, self.data_channel.cmd or "RETR", file.name, resp)
                logfun = session_logger.debug  # it is logged
            super().respond(resp, logfun)
        except Exception:  # noqa: BLE001 - nobody knows what of it was sent: the end of the session says that it failed
            self.log_exception(self)
            self.close()
        self._last_response = last

    def _fail_transfer(self) -> None:
        """End the transfer that the exception which is being handled has left undone, with its one reply."""
        if self._closed or not self._owes_reply:
            return
        reply, log = INTERNAL_ERROR
        channel = self.data_channel
        try:
            if isinstance(channel, VFSDTPHandler):
                channel.handle_error()
                if not channel._closed:  # it is answered once it is published, or TLS has said goodbye
                    return
            self._drop_queued(reply)
        except Exception:  # noqa: BLE001 - the reply is still owed
            self.log_exception(self)
        self.answer_transfer(reply, log)

    def log_transfer(
        self, cmd: str, filename: str, receive: bool, completed: bool, elapsed: float, bytes: int  # noqa: A002
    ) -> None:
        """Log the end of a transfer; of one whose client is gone this is all that there is to read."""
        if not completed and self._closed:
            verb = cmd or ("STOR" if receive else "RETR")
            log_failed_transfer(self, verb, filename, f"426 The client is gone after {bytes} bytes.")
        super().log_transfer(cmd, filename, receive, completed, elapsed, bytes)

    def log(self, msg: str, logfun: Any = session_logger.info) -> None:
        """Log for the session; a name that is not UTF-8, of a file or of the user, is written with escapes."""
        if session_logger.isEnabledFor(LEVELS.get(logfun.__name__, logging.CRITICAL)):
            super().log(msg, lambda line: logfun(_loggable(line)))

    def logline(self, msg: str, logfun: Any = session_logger.debug) -> None:
        """Log a command or reply; no password, be it in a command that is none."""
        if self._log_debug:
            super().logline(PASSWORD.sub(r"\1 ******", msg), lambda line: logfun(_loggable(line)))

    # --- commands

    def pre_process_command(self, line: str, cmd: str, arg: str) -> None:
        """Run one command; whatever fails, it gets a reply and the session goes on."""
        self.failure = None
        self._last_response = ""
        self._running = (cmd, arg, self.username)
        try:
            self._run(line, cmd, arg)
        except Abandoned:
            if not self._closed:
                self.respond("426 Aborted by the client.")
        except UnicodeEncodeError:
            self.respond("553 The store cannot hold a name that is not UTF-8.")
        except Exception:  # noqa: BLE001 - logged with its traceback; a bug must not end the session
            if self._closed:  # by the client, in the middle of it
                return
            self.log_exception(self)
            if not self._last_response:
                self.respond("451 Internal error.")
            elif self._last_response.startswith("1"):
                self._fail_transfer()
        finally:
            if cmd in TRANSFERS and not self._closed:
                self._restart_position = 0  # REST is for the one command after it, also when that is refused
                if self.data_channel is None and not self._expects_data():
                    self._drop_queued("425 There is no data connection any more.")
            if cmd != "PASS":  # pyftpdlib's own servers answer a wrong password later
                self._running = ("", "", "")

    def _run(self, line: str, cmd: str, arg: str) -> None:
        if not paths.FORBIDDEN.isdisjoint(line):
            self.respond("501 A command has no line break or NUL in it.")
            return
        if cmd not in BEFORE_THE_OUTCOME or (cmd == "STAT" and arg):
            self._await_outcome(cmd)
        if cmd in AFTER_GIVING_UP:
            self._await_giving_up()
        lacks_argument = not arg and cmd in TRANSFERS and self.proto_cmds[cmd]["arg"]
        if cmd in TRANSFERS and self.authenticated and not lacks_argument and not self._may_begin(cmd):
            return
        if cmd in {"LIST", "NLST", "STAT"}:
            while match := LS_OPTIONS.match(arg):
                arg = arg[match.end() :].lstrip(" ")
        elif self._sets_time(cmd, arg):
            cmd, arg = "MFMT", TIME_AND_NAME.sub(r"\1 \2", arg)
        self._verb, self._argument = cmd, arg
        if cmd == "STAT" and self.authenticated and is_pattern(arg):
            self._stat_pattern(arg)
            return
        super().pre_process_command(f"{cmd} {arg}" if arg else cmd, cmd, arg)

    def _await_outcome(self, cmd: str) -> None:
        """Let the transfer that has ended get its answer first; once it is being published it cannot be aborted."""
        task, channel = current_task(), self.data_channel
        if task is None or not isinstance(channel, VFSDTPHandler):
            return
        if cmd != "ABOR" and channel.receive and channel.stage is Stage.MOVING and channel.is_busy:
            channel.confirm_end()  # nobody says that in the midst of an upload
            task.wait(channel.end_or_idleness())
            channel.doubt_end()
        outcome = channel.foresee_outcome()
        if outcome is not None and (cmd != "ABOR" or channel.stage is Stage.SETTLING):
            channel.confirm_end()
            task.wait(outcome)

    def _await_answer(self, channel: VFSDTPHandler) -> None:
        """Let the reply to a transfer that was just broken off come first; a thread may still have its file."""
        task = current_task()
        if task is not None and channel.outcome is not None and not channel.outcome.done():
            task.wait(channel.outcome)

    def _await_giving_up(self) -> None:
        task, given_up = current_task(), self.given_up
        if given_up is not None:
            if task is not None and not given_up.done():
                task.wait(given_up)
            self.given_up = None

    def _sets_time(self, cmd: str, arg: str) -> bool:
        if cmd not in {"MDTM", "MFMT"} or not TIME_AND_NAME.fullmatch(arg):
            return False
        return cmd == "MFMT" or (self.authenticated and not self.fs.lexists(self.fs.ftp2fs(arg)))

    def _make_eport(self, ip: str, port: int) -> None:
        """Connect to the client, whose address may be written in any form; what was pipelined waits for the reply."""
        super()._make_eport(plain_address(ip), port)
        task, connector = current_task(), self._dtp_connector
        if task is not None and isinstance(connector, VFSActiveDTP) and not connector.answered.done():
            task.wait(connector.answered)

    def _may_begin(self, cmd: str) -> bool:
        """Tell whether a transfer may begin; one that does has the type of this moment, whatever TYPE says later."""
        if not self._may_transfer():
            return False
        if self._restart_position and self._current_type == "a" and cmd in {"RETR", "STOR"}:
            self.respond("554 REST counts the bytes of a binary transfer (TYPE I).")
            return False
        self._asked_type = self._current_type
        return True

    def _may_transfer(self) -> bool:
        """Tell whether a transfer may begin, after a word to the client where not."""
        if self._dtp_acceptor is not None and self.data_channel is None:
            self._dtp_acceptor.take_waiting()  # most clients connect first
        if self._is_transferring():
            self.respond("503 Another transfer is under way.")
        elif not self._expects_data():
            self.respond("425 Use PASV or PORT first.")
        else:
            return True
        return False

    def _is_transferring(self) -> bool:
        queued = self._in_dtp_queue is not None or self._out_dtp_queue is not None
        return queued or (self.data_channel is not None and self.data_channel._initialized)

    def _expects_data(self) -> bool:
        coming = (self._dtp_acceptor, self._dtp_connector)
        return self.data_channel is not None or any(each is not None and not each._closed for each in coming)

    # --- data connections

    @property
    def local_address(self) -> tuple[Any, ...]:
        """The address that the client has reached."""
        if self._local_address is None:
            self._local_address = self.socket.getsockname()
        return self._local_address

    def _make_epasv(self, extmode: bool = False) -> None:
        for tries in range(PORT_TRIES, 0, -1):
            try:
                super()._make_epasv(extmode)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and tries > 1:
                    continue
                self.respond_w_warning(f"425 Can't open a data connection: {error.strerror}.")
            return

    def push_dtp_data(
        self, data: Any, isproducer: bool = False, file: Any = None, cmd: str | None = None
    ) -> None:
        """Send data; the channel knows the command before it can be through with it."""
        if self.data_channel is not None:
            self.data_channel.cmd = cmd
        super().push_dtp_data(data, isproducer, file, cmd)

    def no_data_connection(self, reason: str) -> None:
        """Answer the transfer that waits, if one does, for a data connection which will not come."""
        self._dtp_acceptor = self._dtp_connector = None
        self._drop_queued(f"425 {reason}.")

    def _shutdown_connecting_dtp(self) -> None:
        """Forget, with a data connection that never came, the transfer that waited for it."""
        super()._shutdown_connecting_dtp()
        self._drop_queued("426 No data connection came; transfer aborted.")

    def _drop_queued(self, reply: str) -> None:
        if self._in_dtp_queue is None and self._out_dtp_queue is None:
            return
        file, cmd = self._in_dtp_queue or self._out_dtp_queue[2:]
        self._in_dtp_queue = self._out_dtp_queue = None
        if file is not None:
            log_failed_transfer(self, cmd or "RETR", file.name, reply)
        if not self._closed:
            self.answer_transfer(reply)
        if file is not None:
            file.close()

    def ftp_ABOR(self, line: str) -> None:
        """Abort the transfer: 426 for it and 226 for the ABOR (RFC 959, section 4.1.3), also before its first byte."""
        channel = self.data_channel
        if channel is not None and not isinstance(channel, VFSDTPHandler):
            super().ftp_ABOR(line)
            return
        if not self._expects_data():
            self.respond("225 No transfer to abort.")
            return
        was_transferring = self._is_transferring()
        self._shutdown_connecting_dtp()
        if channel is not None:
            channel.break_off("Aborted by the client")
            self._await_answer(channel)
        if was_transferring:
            self.respond("226 ABOR command successful.")
        else:
            self.respond("225 ABOR command successful; data channel closed.")

    def _on_dtp_connection(self) -> None:
        now, self._current_type = self._current_type, self._asked_type or self._current_type
        try:
            super()._on_dtp_connection()
        except Exception:  # noqa: BLE001 - logged with its traceback; the transfer that waited is answered
            self.log_exception(self)
            self._fail_transfer()
        finally:
            self._current_type = now

    def _on_dtp_close(self) -> None:
        if self._closed:  # pyftpdlib would begin to time a session that is no more
            return
        self.answer_transfer(*INTERNAL_ERROR)  # where the connection could not say itself what came of the transfer
        super()._on_dtp_close()
        if self._has_ended:
            self._close_if_done()

    def _awaits_reply(self) -> bool:
        """Tell whether a transfer goes on although the client has ended its side of the control connection.

        An upload in the midst of its bytes does not, unless more was said before that end: so a killed client looks.
        """
        channel = self.data_channel
        if not isinstance(channel, VFSDTPHandler) or not channel.is_busy:
            return False
        return self._has_ended or not channel.receive or channel.stage is not Stage.MOVING

    def _has_moved(self) -> bool:
        """Tell whether the transfer that goes on has moved anything since the last time."""
        before, self._moved_before = self._moved_before, self.data_channel.get_transmitted_bytes()
        return self._moved_before != before or self.data_channel.stage is not Stage.MOVING

    def ftp_QUIT(self, line: str) -> None:
        """Say goodbye, after the word on a transfer whose data connection has not come; one that runs is let finish."""
        self._drop_queued("426 No data connection came; transfer aborted.")
        if isinstance(self.data_channel, VFSDTPHandler) and not self.data_channel.is_busy:
            self.data_channel.close()  # no transfer will come; pyftpdlib would wait for its end for ever
        super().ftp_QUIT(line)

    # --- folders

    def ftp_CWD(self, path: str) -> str | None:
        """Change the folder. pyftpdlib's own asks for this process's folder, and fails where that is gone."""
        try:
            self.run_as_current_user(self.fs.chdir, path)
        except FilesystemError as error:
            self.respond(f"550 {error}.")
            return None
        cwd = self.fs.cwd.replace('"', '""')
        self.respond(f'250 "{cwd}" is the current directory.')
        return path

    def ftp_MLST(self, path: str) -> Any:
        """Tell of one file or folder; pyftpdlib does not see what the slash behind a name means."""
        try:
            if paths.means_folder(self._argument):
                self.fs.lstat(path)
        except FilesystemError as error:
            self.respond(f"550 {error}.")
            return None
        return super().ftp_MLST(path)

    def ftp_MLSD(self, path: str) -> Any:
        """List a folder; a missing one is 550, as clients expect (RFC 3659 asks 501 for what is no folder)."""
        if not self.fs.isdir(path):
            self.respond("550 No such directory." if not self.fs.lexists(path) else "501 Not a directory.")
            return None
        return super().ftp_MLSD(path)

    def ftp_LIST(self, path: str) -> Any:
        """List a folder, a file, or what a pattern matches."""
        lines = self._matching_lines(path)
        if lines is None:
            return super().ftp_LIST(path)
        self.push_dtp_data(lines, isproducer=True, cmd="LIST")
        return path

    def ftp_NLST(self, path: str) -> Any:
        """List names as a client can use them in its next command (RFC 1123, section 4.1.2.7).

        Behind the folder that it has asked for, as vsftpd does: `mget in/*.csv` fetches what this tells.
        """
        argument, names = self._argument, self._matches(path)
        folder = argument[: argument.rfind("/") + 1]
        try:
            if names is None and self.fs.isdir(path):
                names = sorted(self.run_as_current_user(self.fs.listdir, path))
                folder = "" if argument in {"", "."} else f"{argument.removesuffix('/')}/"
            elif names is None:
                self.fs.lstat(path)
                names = [argument[len(folder) :]]
        except FilesystemError as error:
            self.respond(f"550 {error}.")
            return None
        text = "".join(f"{folder}{name}\r\n" for name in names)
        self.push_dtp_data(text.encode(self.encoding, self.unicode_errors), cmd="NLST")
        return path

    def _matches(self, path: str) -> list[str] | None:
        """Return the names that a pattern in the path's last part matches; None where it is to be taken literally.

        So is what exists under that very name, and the pattern in a folder that cannot be listed: pyftpdlib says why.
        """
        folder, pattern = posixpath.split(path)
        if not is_pattern(pattern) or self.fs.lexists(path):
            return None
        try:
            names: list[str] = self.run_as_current_user(self.fs.matching, folder, pattern)
        except FilesystemError:
            return None
        return names

    def _matching_lines(self, path: str) -> Any:
        """Return the lines of LIST for the names that a pattern matches, None where it is to be taken literally."""
        names = self._matches(path)
        if names is None:
            return None
        return BufferedIteratorProducer(self.fs.format_list(posixpath.dirname(path), names))

    def ftp_STAT(self, path: str) -> Any:
        """Tell of the session, or of a folder, a file or what a pattern matches."""
        lines = self._matching_lines(path)
        if lines is None:
            return super().ftp_STAT(path)
        self.push(f'213-Status of "{self.fs.fs2ftp(path)}":\r\n')
        self.push_with_producer(lines)
        self.respond("213 End of status.")
        return path

    def _stat_pattern(self, arg: str) -> None:
        """Answer STAT for a pattern or a name that looks like one, which pyftpdlib refuses."""
        self.logline(f"<- STAT {arg}")
        path = self.fs.ftp2fs(arg)
        if self.authorizer.has_perm(self.username, "l", path):
            self.process_command("STAT", path)
        else:
            self.respond("550 Not enough privileges.")

    # --- uploads

    def ftp_STOR(self, file: str, mode: str = "w") -> str | None:
        """Store a file; after REST go on with the file that is there, or with what a broken upload has left."""
        cmd = "APPE" if mode == "a" else "STOR"
        rest, self._restart_position = self._restart_position, 0
        size, self._allocated = self._allocated, 0
        try:
            opened = self.run_as_current_user(self.fs.open, file, "r+b" if rest else f"{mode}b", rest or None)
        except FilesystemError as error:
            self.respond(f"550 {error}.")
            return None
        try:
            if rest:
                opened.resume(rest)
            if size:
                self.offload(getattr(self.fs, "vfs", None), partial(opened.reserve, size))
        except Abandoned:
            opened.close()
            raise
        except OSError as error:
            opened.close()
            self.respond(f"{554 if error.errno == errno.EINVAL else reply_code(error, cmd)} {reason_of(error)}.")
            return None
        self._receive(opened, cmd)
        return file

    def _receive(self, opened: Any, cmd: str, told: str = "") -> None:
        """Take the data connection's bytes for a file, once there is one."""
        if self.data_channel is None:
            self.respond(f"150 {told or 'File status okay. About to open data connection.'}")
            self._in_dtp_queue = (opened, cmd)
        else:
            self.respond(f"125 {told or 'Data connection already open. Transfer starting.'}")
            self.data_channel.file_obj = opened
            self.data_channel.enable_receiving(self._current_type, cmd)

    def ftp_STOU(self, line: str) -> str | None:
        """Store under a new name, which the reply tells as the client can use it (RFC 1123, section 4.1.2.9)."""
        target = self.fs.ftp2fs(line) if line else posixpath.join(self.fs.ftp2fs(self.fs.cwd), "ftpd")
        if self._restart_position:
            self.respond("503 REST goes with RETR and STOR alone.")
        elif not self.authorizer.has_perm(self.username, "w", target):
            self.respond("550 Not enough privileges.")
        elif paths.means_folder(line) and line:
            self.respond("553 A name that ends in a slash is a folder's.")
        else:
            return self._store_uniquely(target, line[: line.rfind("/") + 1])
        return None

    def _store_uniquely(self, target: str, folder: str) -> str | None:
        """Store under a name that begins as the target's; `folder` is how the client writes the folder of it."""
        self._allocated = 0
        parent, prefix = posixpath.split(target)
        try:
            opened = self.run_as_current_user(self.fs.mkstemp, prefix=f"{prefix}.", dir=parent)
        except FilesystemError as error:
            self.respond(f"450 {error}.")
            return None
        name: str = posixpath.basename(opened.name)
        self._receive(opened, "STOU", f"FILE: {folder}{name}")
        return name


class TLS_VFSHandler(VFSHandler, TLSControl):
    """The same with FTPS; `certfile` and the other attributes are pyftpdlib's, `tls_mode` and more `TLSControl`'s."""

    dtp_handler = TLS_VFSDTPHandler

    def _may_transfer(self) -> bool:
        reason, self.refused_data = self.refused_data, ""
        if reason and not self._expects_data():
            self.respond(reason)
            return False
        return super()._may_transfer()


def _loggable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
