"""What pyftpdlib asks of a filesystem, answered by a VFS: ftp paths become VFS calls, no more is decided here.

pyftpdlib calls "real path" what the authorizer's home and `ftp2fs` give: here an absolute path inside the VFS
(`/alice/a`). Nothing touches the server's own disk, and no path leaves the home: all conversions are textual, since
the VFS has no links.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import posixpath
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import lru_cache, partial, wraps
from typing import Any, ClassVar, TypeVar

from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.exceptions import FilesystemError
from pyftpdlib.filesystems import AbstractedFS
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import MultiprocessFTPServer

from ftpvfs import paths
from ftpvfs.backend.backend import Entry
from ftpvfs.cache.records import PartialRecord
from ftpvfs.errors import failure, reason_of
from ftpvfs.pattern import Pattern
from ftpvfs.vfs.dircache import Listing
from ftpvfs.vfs.handle import Handle, WritingHandle
from ftpvfs.vfs.vfs import VFS
from ftpvfs.waiting import Wait, about_to_wait, shared_result_of

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

# The facts of MLSx lines (RFC 3659, section 7.5), and how each is written.
MLSX_FACTS = {
    "type": "{type}",
    "perm": "{perm}",
    "size": "{size}",
    "modify": "{modify}",
    "unix.mode": "0{mode:o}",
    "unix.uid": "{uid}",
    "unix.gid": "{gid}",
    "unique": "{device:x}g{inode:x}",
}
MONTHS = ("", "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# Files that are older, or of the future, show their year instead of the hour, as in ls and proftpd.
DAY = 86400
SIX_MONTHS = 180 * DAY
# A listing that does not change is rendered once, unless keeping its text costs more than making it.
KEPT_RENDERING = 4 * 2**20
PIECE = 16 * 1024
# Whose threads wait until there is room for an upload.
ROOM = "room"
# Entries that are rendered while others wait for the event loop: 3 microseconds each.
RENDERED_AT_ONCE = 1000


# (name, what files and folders have in common, size, modification time, inode) -> the line of a listing
Line = Callable[[str, Any, int, float, Callable[[], int]], str]


class ClientError(FilesystemError):
    """A failed call in words for the client. `errno` is the failure's own, for who picks the reply's code."""

    def __init__(self, error: OSError) -> None:
        super().__init__(reason_of(error))
        self.errno = error.errno


def answered(method: F) -> F:
    """Turn an OSError of the VFS into what pyftpdlib sends to the client, and tell the session's handler of it."""

    @wraps(method)
    def wrapper(self: VFSFilesystem, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except OSError as error:
            told = ClientError(error)
            self.failed(error)
            raise told from error

    return wrapper  # type: ignore[return-value]


class Names(list[str]):
    """A folder's names, as pyftpdlib passes them from `listdir` to `format_list`, with the listing they came from."""

    def __init__(self, listing: Listing) -> None:
        super().__init__(listing.names)
        self.listing = listing


class FolderPath(str):
    """A "real path" that the client wrote as only a folder's can be written (`a/`, `a/.`): a file is not called so."""

    __slots__ = ()


class VFSFilesystem(AbstractedFS):
    """A pyftpdlib filesystem over a VFS. Subclass it and set `vfs`; one instance serves one session.

    A session whose handler has a `vfs` of its own shows that one.
    """

    vfs: VFS
    _warned: ClassVar[set[str]] = set()
    _warning = threading.Lock()

    def __init__(self, root: str, cmd_channel: Any) -> None:
        super().__init__(paths.normalize(root), cmd_channel)
        own = getattr(cmd_channel, "vfs", None)
        if own is not None:
            self.vfs = own
        self._home_is_there = self.root == "/"
        self._warn_about(cmd_channel)

    def _warn_about(self, cmd_channel: Any) -> None:
        """Say once what the surrounding server cannot promise."""
        if not self._commits():
            self._warn_once(
                f"{cmd_channel.dtp_handler.__name__} takes a broken upload for a complete one;"
                " set dtp_handler to ftpvfs.VFSDTPHandler or TLS_VFSDTPHandler"
            )
        if _impersonates(cmd_channel):
            self._warn_once(
                f"{type(cmd_channel.authorizer).__name__} changes the process's user for each call, who may not use the"
                " cache folder or the store; write class Users(ftpvfs.VFSHomes, ...) to stay the server's own user"
            )
        single = not hasattr(cmd_channel.server, "_start_task")
        if single and not getattr(cmd_channel, "offloads", False) and not self.vfs.core.backend.capability.opens_files:
            self._warn_once("with a plain FTPServer a slow store stops every session; use VFSServer")
        if isinstance(cmd_channel.server, MultiprocessFTPServer) and not self.vfs.is_served_by_parent:
            self._warn_once(
                "with MultiprocessFTPServer call vfs.start() before serving: what waits in the cache when a session"
                " ends is uploaded by a process that stays"
            )

    def _warn_once(self, text: str) -> None:
        with self._warning:
            if text not in self._warned:
                self._warned.add(text)
                logger.warning("%s", text)

    def _commits(self) -> bool:
        return getattr(self.cmd_channel.dtp_handler, "commits", False)

    def failed(self, error: OSError) -> None:
        """Tell the session's handler what the last failure was, so that it can choose the reply's code."""
        if hasattr(self.cmd_channel, "failure"):
            self.cmd_channel.failure = error
        logger.debug("%s", error)

    def _call(self, call: Callable[..., T], *arguments: Any, changes: bool = False) -> T:
        """Make a call that may have to wait for the store; on a `VFSServer` others are served meanwhile."""
        offload = getattr(self.cmd_channel, "offload", None)
        if offload is None:
            return call(*arguments)
        call = partial(call, *arguments)
        return offload(self.vfs, call, changes=changes, at_least=self.vfs.least_wait)  # type: ignore[no-any-return]

    # --- paths

    def ftpnorm(self, ftppath: str) -> str:
        return paths.normalize(ftppath, self.cwd)

    def ftp2fs(self, ftppath: str) -> str:
        path = paths.normalize(self.root + self.ftpnorm(ftppath))
        return FolderPath(path) if paths.means_folder(ftppath) else path

    def fs2ftp(self, fspath: str) -> str:
        path = paths.normalize(fspath, self.root)
        if not self.validpath(path):
            return "/"
        return "/" + path[len(self.root) :].lstrip("/")

    def validpath(self, path: str) -> bool:
        return paths.is_within(paths.from_ftp(path), paths.from_ftp(self.root))

    def realpath(self, path: str) -> str:
        return path

    def _path(self, fspath: str) -> str:
        path = paths.from_ftp(fspath)
        return f"{path}/" if path and isinstance(fspath, FolderPath) else path

    # --- opening

    @answered
    def open(self, filename: str, mode: str, rest: int | None = None) -> Any:
        """Open a file. `rest` is the offset at which a client goes on with an upload; None where it says none."""
        if "r" not in mode or "+" in mode:
            self._make_home()
        return self._opened(filename, mode, rest)

    def _opened(self, filename: str, mode: str, rest: int | None = None) -> Any:
        """Open a file; one that is to be written once it is known that there is room, before its first byte comes."""
        handle, busy = self._call(self._open, filename, mode, rest)
        if busy is not None:
            try:
                self._wait_for_room(busy)
                self._call(handle.admit)
            except BaseException:
                handle.abandon()
                raise
        return self._for_channel(handle)

    def _open(self, filename: str, mode: str, rest: int | None = None) -> tuple[Handle, Future[Any] | None]:
        path = self._path(filename)
        partial = self._resumed(path, mode, rest)
        handle: Handle = self.vfs.open(
            path, mode, name=filename, autocommit=False, user=self._user, partial=partial
        )
        try:
            return handle, handle.admit()
        except BaseException:
            handle.abandon()
            raise

    def _wait_for_room(self, busy: Future[Any]) -> None:
        """Wait in threads that nobody else needs: write-back makes room within a while, or not at all."""

        def wait() -> None:
            about_to_wait(Wait.STORE)
            shared_result_of(busy)

        offload = getattr(self.cmd_channel, "offload", None)
        if offload is None:
            wait()
        else:
            offload(ROOM, wait)

    def _resumed(self, path: str, mode: str, rest: int | None) -> PartialRecord | None:
        """Return the interrupted upload that a client goes on with.

        Where there is a file, only REST at exactly the upload's length means the upload; everything else the file.
        """
        if mode not in {"ab", "r+b"}:
            return None
        partial = self.vfs.partial(path, self._user)
        if partial is None or rest == partial.size:
            return partial
        return partial if mode == "ab" and not self.vfs.exists(path) else None

    @property
    def _user(self) -> str:
        return str(getattr(self.cmd_channel, "username", ""))

    def _partial_entry(self, path: str, missing: FileNotFoundError) -> Entry:
        """Return what came of the user's interrupted upload as if it was a file; raise `missing` where nothing did.

        So clients learn where to go on: they ask for the size of the file that they have sent.
        """
        partial = self._call(self.vfs.partial, path, self._user)
        if partial is None:
            raise missing
        return Entry(paths.split(path)[1], False, partial.size, partial.since)

    def _for_channel(self, handle: Handle) -> Any:
        return handle if self._commits() else StockFile(handle, self.cmd_channel)

    @answered
    def mkstemp(self, suffix: str = "", prefix: str = "", dir: str | None = None, mode: str = "wb") -> Any:  # noqa: A002
        self._make_home()
        folder = self.root if dir is None else dir
        for _ in range(50):
            name = posixpath.join(folder, f"{prefix}{secrets.token_hex(8)}{suffix}")
            with contextlib.suppress(FileExistsError):
                return self._opened(name, "xb")
        raise failure(errno.EEXIST, folder, "No usable unique file name found")

    def _make_home(self) -> None:
        """Make the user's home before something is first written below it; a bucket's homes need no set-up."""
        if not self._home_is_there:
            self._home_is_there = self._call(self.vfs.ready_folder, self._path(self.root), changes=True)

    # --- folders and files

    @answered
    def chdir(self, path: str) -> None:
        if path != self.root and not self._call(self.vfs.lookup, self._path(path)).is_dir:
            raise failure(errno.ENOTDIR, path)
        self.cwd = self.fs2ftp(path)

    @answered
    def mkdir(self, path: str) -> None:
        self._make_home()
        self._call(self.vfs.mkdir, self._path(path), changes=True)

    @answered
    def listdir(self, path: str) -> Names:
        try:
            return self._call(self._names, self._path(path))
        except FileNotFoundError:
            if path != self.root:
                raise
            return Names(Listing({}))

    listdirinfo = listdir

    def _names(self, path: str) -> Names:
        return Names(self.vfs.timed_listing(path))

    def matching(self, path: str, pattern: str) -> list[str]:
        """Return what `listdir` gives, as far as it matches a pattern (`*.csv`)."""
        return self._call(_matching, self.listdir(path), Pattern(pattern))

    @answered
    def rmdir(self, path: str) -> None:
        self._call(self.vfs.rmdir, self._path(path), changes=True)

    @answered
    def remove(self, path: str) -> None:
        self._call(self._remove, self._path(path), changes=True)

    def _remove(self, path: str) -> None:
        try:
            self.vfs.remove(path)
        except FileNotFoundError:
            if not self.vfs.drop_partial(path, self._user):
                raise

    @answered
    def rename(self, src: str, dst: str) -> None:
        if dst == self.root:
            raise failure(errno.EINVAL, dst, "The home folder cannot be replaced")
        self._call(self.vfs.rename, self._path(src), self._path(dst), changes=True)

    @answered
    def chmod(self, path: str, mode: int) -> None:
        if path == self.root:
            raise failure(errno.EPERM, path, "The home folder's rights are not changed")
        self._call(self.vfs.chmod, self._path(path), mode, changes=True)

    @answered
    def utime(self, path: str, timeval: float) -> None:
        self._call(self.vfs.utime, self._path(path), (timeval, timeval), changes=True)

    # --- looking

    @answered
    def stat(self, path: str) -> Any:
        try:
            return self._call(self.vfs.stat, self._path(path))
        except FileNotFoundError as error:
            if path == self.root:
                return self.vfs.stat_entry("", Entry("", is_dir=True))
            return self.vfs.stat_entry(self._path(path), self._partial_entry(self._path(path), error))

    lstat = stat

    @answered
    def getsize(self, path: str) -> int:
        try:
            return self._call(self.vfs.lookup, self._path(path)).size
        except FileNotFoundError as error:
            return self._partial_entry(self._path(path), error).size

    @answered
    def getmtime(self, path: str) -> float:
        return float(self._call(self.vfs.stat, self._path(path)).st_mtime)

    # pyftpdlib asks these outside its own error handling, where an exception ends the session. When the store cannot be
    # asked they say yes, and the call that follows, which is guarded, tells the client why.

    def isfile(self, path: str) -> bool:
        return self._asked(self._is_file, path)

    def _is_file(self, path: str) -> bool:
        """Tell whether there is a file, or what came of the user's interrupted upload."""
        try:
            return not self.vfs.lookup(path).is_dir
        except (FileNotFoundError, NotADirectoryError):
            return self.vfs.partial(path, self._user) is not None

    def isdir(self, path: str) -> bool:
        return path == self.root or self._asked(self.vfs.isdir, path)

    def lexists(self, path: str) -> bool:
        return path == self.root or self._asked(self.vfs.exists, path)

    def _asked(self, question: Callable[[str], bool], path: str) -> bool:
        try:
            return self._call(question, self._path(path))
        except OSError as error:
            logger.debug("%s", error)
            return error.errno not in {errno.EINVAL, errno.ENAMETOOLONG}

    def islink(self, path: str) -> bool:
        return False

    @answered
    def readlink(self, path: str) -> str:
        raise failure(errno.EINVAL, path, "Not a symbolic link")

    def get_user_by_uid(self, uid: int) -> str:
        return "ftp" if self.vfs.options.uid is None else str(uid)

    def get_group_by_gid(self, gid: int) -> str:
        return "ftp" if self.vfs.options.gid is None else str(gid)

    # --- listings

    def format_list(self, basedir: str, listing: Iterable[str], ignore_err: bool = True) -> Iterator[bytes]:
        """Yield `ls -lA` lines, several at a time. What `listdir` gave is not asked for again."""
        now = time.time()
        key = ("LIST", self._gmt, self._encoding, int(now // 86400))
        return self._rendered(basedir, listing, key, self._list_line(now), ignore_err)

    def format_mlsx(
        self, basedir: str, listing: Iterable[str], perms: str, facts: Iterable[str], ignore_err: bool = True
    ) -> Iterator[bytes]:
        """Yield MLSx lines (RFC 3659, section 7), several at a time. What `listdir` gave is not asked for again."""
        key = ("MLSX", self._gmt, self._encoding, perms, frozenset(facts))
        return self._rendered(basedir, listing, key, self._mlsx_line(perms, set(facts)), ignore_err)

    @property
    def _gmt(self) -> bool:
        return bool(self.cmd_channel.use_gmt_times)

    @property
    def _encoding(self) -> tuple[str, str]:
        return (self.cmd_channel.encoding, self.cmd_channel.unicode_errors)

    def _rendered(
        self,
        basedir: str,
        listing: Iterable[str],
        key: Any,
        line: Line,
        ignore_err: bool,
    ) -> Iterator[bytes]:
        # A subclass may have taken names out of what `listdir` gave.
        if isinstance(listing, Names) and listing == listing.listing.names:
            text = listing.listing.rendered.get(key)
            if text is None:
                text = self._call(self._render, basedir, listing.listing, line, self._encoding)
                if len(text) <= KEPT_RENDERING:
                    listing.listing.rendered[key] = text
            return iter([text[start : start + PIECE] for start in range(0, len(text), PIECE)])
        # Evaluated now, not when the data connection asks: pyftpdlib handles errors here and nowhere later.
        return iter([self._encode(self._one_line(basedir, name, line, ignore_err)) for name in listing])

    def _render(self, basedir: str, listing: Listing, line: Line, encoding: tuple[str, str]) -> bytes:
        if len(listing) > RENDERED_AT_ONCE:
            about_to_wait(Wait.DISK)  # not quite, but it takes as long
        # All files of a listing share what is not in their entries; a stat_result for each would double the time.
        prefix, vfs = paths.join(paths.from_ftp(basedir), ""), self.vfs
        file, folder = (vfs.stat_entry("", Entry("", is_dir)) for is_dir in (False, True))
        lines = [
            line(
                entry.name,
                folder if entry.is_dir else file,
                entry.size,
                vfs.mtime_of(entry),
                lambda name=entry.name: vfs.inode(prefix + name),  # type: ignore[misc]
            )
            for entry in listing
        ]
        return "".join(lines).encode(*encoding)

    def _one_line(self, basedir: str, name: str, line: Line, ignore_err: bool) -> str:
        try:
            info = self.lstat(posixpath.join(basedir, name))
            return line(name, info, info.st_size, info.st_mtime, lambda: info.st_ino)
        except FilesystemError:
            if not ignore_err:
                raise
            return ""

    def _encode(self, text: str) -> bytes:
        return text.encode(*self._encoding)

    def _broken_down(self, seconds: float) -> time.struct_time:
        convert = time.gmtime if self._gmt else time.localtime
        try:
            return convert(seconds)
        except (OverflowError, ValueError, OSError):  # a time out of this world, as anybody can write into metadata
            return convert(0)

    def _list_line(self, now: float) -> Line:
        @lru_cache(maxsize=16)
        def head(mode: int, nlink: int, uid: int, gid: int) -> str:
            user, group = self.get_user_by_uid(uid), self.get_group_by_gid(gid)
            return f"{stat.filemode(mode)} {nlink:>3} {user:<8} {group:<8}"

        @lru_cache(maxsize=1024)
        def date(minute: float) -> str:
            when = self._broken_down(minute * 60)
            old = not -DAY < now - minute * 60 < SIX_MONTHS  # a clock may be a little wrong
            hour = f" {when.tm_year}" if old else f"{when.tm_hour:02}:{when.tm_min:02}"
            return f"{MONTHS[when.tm_mon]} {when.tm_mday:02} {hour}"

        def line(name: str, info: Any, size: int, mtime: float, inode: Callable[[], int]) -> str:
            shown = head(info.st_mode, info.st_nlink, info.st_uid, info.st_gid)
            return f"{shown} {size:>8} {date(mtime // 60)} {name}\r\n"

        return line

    def _mlsx_line(self, perms: str, facts: set[str]) -> Line:
        wanted = sorted(facts & MLSX_FACTS.keys())
        form = "".join(f"{fact}={MLSX_FACTS[fact]};" for fact in wanted) + " {name}\r\n"
        unique = "unique" in wanted
        folder_perms = "".join(letter for letter in perms if letter not in "arw")
        folder_perms += ("c" if set("waf") & set(perms) else "") + ("p" if "d" in perms else "")
        file_perms = "".join(letter for letter in perms if letter not in "celmp")

        @lru_cache(maxsize=1024)
        def modified(second: float) -> str:
            return "%04d%02d%02d%02d%02d%02d" % self._broken_down(second)[:6]  # noqa: UP031 - twice as fast

        def line(name: str, info: Any, size: int, mtime: float, inode: Callable[[], int]) -> str:
            is_dir = stat.S_ISDIR(info.st_mode)
            return form.format(
                name=name,
                type="dir" if is_dir else "file",
                perm=folder_perms if is_dir else file_perms,
                size=size,
                modify=modified(mtime // 1),
                mode=info.st_mode & 0o777,
                uid=info.st_uid,
                gid=info.st_gid,
                device=info.st_dev,
                inode=inode() if unique else 0,
            )

        return line


def _matching(found: list[str], pattern: Pattern) -> list[str]:
    if len(found) > RENDERED_AT_ONCE:
        about_to_wait(Wait.DISK)  # not quite, but it takes as long
    names = pattern.filter(found)
    if not isinstance(found, Names) or found != found.listing.names:
        return names
    return Names(found.listing.only(names))


def _impersonates(cmd_channel: Any) -> bool:
    """Tell whether the session's handler calls the filesystem as the user who has logged in."""
    if getattr(type(cmd_channel), "run_as_current_user", None) is not FTPHandler.run_as_current_user:
        return False
    authorizer = cmd_channel.authorizer
    keeps_user = type(authorizer).impersonate_user is DummyAuthorizer.impersonate_user
    return not keeps_user and getattr(authorizer, "impersonates", True)


class StockFile:
    """An open file for a data channel that knows no `commit`: `close` publishes what pyftpdlib calls finished.

    Weaker than `VFSDTPHandler`: pyftpdlib calls an upload finished, too, when the connection was reset. A failure is
    answered here, with its reason: pyftpdlib's own channels would answer "426 None", or nothing at all.
    """

    def __init__(self, handle: Handle, cmd_channel: Any) -> None:
        self._handle = handle
        self._cmd_channel = cmd_channel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def read(self, size: int) -> bytes:
        """Return the next bytes; none, and the end of the transfer, where the store fails."""
        try:
            return self._handle.read(size) or b""
        except OSError as error:
            self._end_transfer(error)
            return b""

    def write(self, data: bytes) -> int:
        """Take bytes; where the store fails, the end of the transfer."""
        try:
            return self._handle.write(data) or 0
        except OSError as error:
            self._end_transfer(error)
            return 0

    def _end_transfer(self, error: OSError) -> None:
        self._handle.abandon()
        channel = self._cmd_channel.data_channel
        if channel is None:
            raise error
        self._say(channel, error)
        channel.close()

    def close(self) -> None:
        """Publish what was written, or give it up where the transfer did not end by itself."""
        if self._handle.closed:
            return
        handle, channel = self._handle, self._cmd_channel.data_channel
        is_whole = channel is not None and channel.transfer_finished
        if not is_whole or not isinstance(handle, WritingHandle) or not handle.writable():
            handle.abandon()
            return
        try:
            handle.commit()
        except OSError as error:
            self._say(channel, error)

    def _say(self, channel: Any, error: OSError) -> None:
        """Give the channel the reply that it sends once it is closed."""
        channel.transfer_finished = False
        channel._resp = (f"451 {reason_of(error)}; transfer aborted.", logger.warning)
