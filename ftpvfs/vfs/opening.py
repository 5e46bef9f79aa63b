"""Makes open files: the handle that the table in `openmode` names, with what it reads from and where it publishes.

Nothing here asks the store; the handles do, when the first byte is wanted or comes. A version that is in the cache is
held from the opening on.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace

from ftpvfs.backend.backend import ABSENT, ANY, Condition, Entry, Pieces, Upload
from ftpvfs.backend.checksum import Expected
from ftpvfs.cache.downloader import Reader
from ftpvfs.cache.item import Draft, Item
from ftpvfs.cache.records import PartialRecord
from ftpvfs.cache.storing import MOST_NAMES, allowed_in_conflict, conflict_name, tell_of_beside
from ftpvfs.clock import Clock
from ftpvfs.errors import AWAY, ECHANGED, failure
from ftpvfs.vfs.begun import Begun, is_exclusive
from ftpvfs.vfs.cached import CachedReadHandle, CachedWriteHandle
from ftpvfs.vfs.checkedfetch import CheckedFetch, Fetch
from ftpvfs.vfs.core import CacheParts, Core
from ftpvfs.vfs.handle import Confirm, FileHandle, Handle, ReadHandle, WriteHandle
from ftpvfs.vfs.pending import base_of, is_local, local_entry
from ftpvfs.vfs.readahead import ReadAhead
from ftpvfs.vfs.tee import Tee
from ftpvfs.waiting import Wait, about_to_wait, result_of

logger = logging.getLogger(__name__)

# How often what was appended is appended again because others came first.
MOST_TRIES = 20
# Bytes of it that are copied at once.
APPENDED_AT_ONCE = 2**20


@dataclass(frozen=True)
class Request:
    """Who opens what. `entry` is what is there, None for nothing; `is_known` False: the store could not be asked."""

    path: str
    name: str
    flags: int
    entry: Entry | None
    is_known: bool = True
    user: str = ""
    autocommit: bool = True
    partial: PartialRecord | None = None


class Opening:
    """Opens files of one store in one process. Any thread."""

    def __init__(self, core: Core, clock: Clock) -> None:
        self._core = core
        self._clock = clock
        self._options = core.options
        # Whether a positive reply means that the store has the file, or that the cache's disk has it for good.
        self._stores_first = self._options.cache_mode == "minimal" or self._options.ack == "store"

    # --- streamed

    def streamed_read(self, request: Request) -> Handle:
        """Open a file of the store for reading without the cache."""
        core, path, entry = self._core, request.path, _there(request)
        seekable = not self._options.no_seek
        if core.backend.capability.opens_files:
            return FileHandle(path, request.name, core.backend.open_file(path), seekable=seekable)

        def open_at(version: Entry, offset: int) -> ReadAhead:
            return ReadAhead(self._fetch(path, version, offset), offset, version.size, core.policy, core.memory)

        # An empty file needs no request to be read, so nothing would notice that it is not empty any more.
        version = entry if entry.size else self._refreshed(path)
        return ReadHandle(path, request.name, version, open_at, lambda: self._refreshed(path), seekable=seekable)

    def _fetch(self, path: str, version: Entry, offset: int) -> Fetch:
        """Return what fetches ranges of a version: checked where they are all of it, unless `--no-checksum`."""
        backend = self._core.backend

        def fetch(start: int, stop: int) -> Future[Pieces]:
            return backend.fetch(path, start, stop, version.fingerprint)

        if offset or not version.size or self._options.no_checksum:
            return fetch
        return CheckedFetch(fetch, path, version.size, Expected(backend, path, version), self._core.hash_apart)

    def _refreshed(self, path: str) -> Entry:
        """Ask the store for the version that it has now."""
        version = self._core.look_again(path)
        if version.is_dir:
            raise failure(errno.EISDIR, path)
        return version

    def streamed_write(self, request: Request) -> Handle:
        """Open a new version of a file for writing straight to the store; it is there when `commit` returns."""
        core, path = self._core, request.path

        # What is appended to nothing is a new file; to something it could not be appended here.
        appends = request.entry is None and request.flags & (os.O_APPEND | os.O_TRUNC) == os.O_APPEND
        code = errno.EEXIST if is_exclusive(request.flags) else errno.EBUSY
        is_new = appends or is_exclusive(request.flags)

        def begin() -> Upload:
            return core.backend.upload(path, mtime=self._mtime(), replaces=ABSENT if is_new else ANY)

        def publish(upload: Upload, confirm: Confirm) -> None:
            upload.prepare()
            confirm()
            with core.writer(path), _being_new(path, code) if is_new else contextlib.nullcontext():
                entry = upload.commit()
                core.replaced(path)
                core.published(path, entry)
            if core.parts is not None:
                core.parts.writeback.stored(request.user, path, entry)

        def check_size(size: int) -> None:
            core.backend.admit(path, size)

        return WriteHandle(
            path, request.name, begin, publish, autocommit=request.autocommit, check_size=check_size
        )

    def _mtime(self) -> float | None:
        return None if self._options.no_modtime else self._clock.time()

    # --- through the cache

    def cached_read(self, request: Request) -> CachedReadHandle:
        """Open a file for reading through the cache: one that is dirty, or any in mode full."""
        parts = self._parts
        path = request.path

        def open_at(version: Entry) -> Reader:
            if is_local(version) and parts.cache.dirty(path) is None:
                raise failure(ECHANGED, path, "The file was stored or moved meanwhile")
            return parts.downloads.join(parts.cache.open_item(path, version), path, version)

        handle = CachedReadHandle(
            path,
            request.name,
            _there(request),
            open_at,
            lambda: parts.pending.find(path) or self._refreshed(path),
            seekable=not self._options.no_seek,
        )
        handle.hold_version()
        return handle

    def cached_write(self, request: Request) -> Handle:
        """Open a file for writing, or reading and writing, through the cache."""
        path = request.path
        keeps = request.entry is not None and not request.flags & os.O_TRUNC and request.partial is None
        base = self.cached_read(request) if keeps else None
        handle = CachedWriteHandle(
            path,
            request.name,
            request.flags,
            begin=lambda read: self._draft(request, read),
            publish=lambda draft, confirm: self._publish(request, draft, confirm),
            give_up=lambda draft: draft.abandon(),
            run=self._parts.downloads.run,
            admit=lambda more: self._admit(path, more),
            base=base,
            size=0 if request.partial is None else request.partial.size,
            # What is gone on with is the file from then on, also where not a byte was left to come.
            creates=request.entry is None or bool(request.flags & os.O_TRUNC) or request.partial is not None,
            autocommit=request.autocommit,
            seekable=not self._options.no_seek,
        )
        if self._stores_first:
            handle.last_step_waits_for = Wait.STORE
        return handle

    def _admit(self, path: str, more: int) -> Future[None] | None:
        """See whether `more` bytes fit into the cache, and later into an object at the store."""
        backend = self._core.backend
        backend.check_size(path, more, backend.capability.largest)
        return self._parts.cache.space.admit(more)

    def _draft(self, request: Request, base: CachedReadHandle | None) -> Tee:
        """Begin the file that is written, at the store at the same time where that is what a reply waits for."""
        core, cache, run = self._core, self._parts.cache, self._core.later
        if request.partial is not None:
            return Tee(cache, cache.resume(request.partial), None, run)
        begun, draft = self._begin(request, base)
        sends = self._stores_first and base is None
        replaces = begun.condition
        upload = core.backend.upload(request.path, mtime=self._mtime(), replaces=replaces) if sends else None
        return Tee(cache, draft, upload, run, begun=begun)

    def _begin(self, request: Request, base: CachedReadHandle | None) -> tuple[Begun, Draft]:
        item: Item | None = None if base is None else base.reader.item  # type: ignore[assignment]
        draft = self._parts.cache.draft(request.path, user=request.user, base=item)
        entry = None if base is None else base.entry
        appends = bool(request.flags & os.O_APPEND) and not request.flags & os.O_TRUNC
        return Begun(request.flags, entry, item, draft.size, only_appended=appends), draft

    def _publish(self, request: Request, tee: Tee, confirm: Confirm) -> None:
        tee.prepare(synced=not self._stores_first)
        confirm()
        if self._stores_first:
            self._store(request, tee)
        else:
            self._acknowledge(request, tee)

    def _store(self, request: Request, tee: Tee) -> None:
        """Bring the file to the store; on return it is there, whole and verified."""
        core, parts, path = self._core, self._parts, request.path
        with core.writer(path):
            entry = tee.sent()
            if entry is None:
                path, entry = self._send(request, tee)
            if path == request.path:
                parts.cache.publish_clean(tee.draft, entry)
            else:
                tee.abandon()
            core.published(path, entry)
        parts.writeback.stored(request.user, path, entry)

    def _send(self, request: Request, tee: Tee) -> tuple[str, Entry]:
        """Send a draft; return where it is now: beside the path, where others came first and --vfs-conflict says so."""
        path = request.path
        self._follow(request, tee)  # whoever else writes here waits for this path
        try:
            return path, self._send_to(path, tee, tee.replaces)
        except OSError as error:
            if error.errno != ECHANGED or tee.replaces is ANY:
                raise
        if tee.begun is not None and tee.begun.is_exclusive:
            raise failure(errno.EEXIST, path)
        found = None
        with contextlib.suppress(FileNotFoundError):
            found = self._core.backend.stat(path)
        replaces = allowed_in_conflict(self._options.conflict, path, found)
        if replaces is not None:
            return path, self._send_to(path, tee, replaces)
        assert found is not None
        self._core.changed(path, found)
        beside, entry = self._send_beside(path, tee)
        tell_of_beside(path, beside)
        return beside, entry

    def _send_beside(self, path: str, tee: Tee) -> tuple[str, Entry]:
        """Send a draft to the first name that is free."""
        now = self._clock.time()
        for number in range(1, MOST_NAMES):
            beside = conflict_name(path, now, number)
            try:
                return beside, self._send_to(beside, tee, ABSENT)
            except OSError as error:
                if error.errno != ECHANGED:
                    raise
        raise failure(errno.EEXIST, path, "There is no free name beside it for what conflicts with it")

    def _send_to(self, path: str, tee: Tee, replaces: Condition) -> Entry:
        draft, mtime = tee.draft, self._mtime()
        return self._core.backend.upload_file(
            path, draft.descriptor, draft.size, mtime=mtime, replaces=replaces
        ).send()

    def _acknowledge(self, request: Request, tee: Tee) -> None:
        """Make the file the one that the store is to have; on return it survives a kill and a power cut.

        What was appended to a file is appended to what is there by now. EEXIST for a file that was to be new.
        """
        for _ in range(MOST_TRIES):
            if _is_exclusive(tee) and self._now(request.path) is not None:
                break
            self._follow(request, tee)
            try:
                self._publish_draft(request, tee)
            except OSError as error:
                if error.errno != ECHANGED:
                    raise
                self._parts.cache.doubt(request.path)
            else:
                return
        if _is_exclusive(tee):
            raise failure(errno.EEXIST, request.path)
        raise failure(errno.EBUSY, request.path, "Others write to the file all the time")

    def _publish_draft(self, request: Request, tee: Tee) -> None:
        parts = self._parts
        entry, is_known = self._replaced(request, tee)
        base, is_known = base_of(entry, is_known=is_known)
        record = parts.cache.publish(
            tee.draft,
            mtime=self._clock.time(),
            base=base,
            base_known=is_known,
            may_replace=tee.begun.may_replace if tee.begun is not None else lambda record: True,
        )
        self._core.published(request.path, local_entry(record))
        parts.writeback.received(record)

    def _replaced(self, request: Request, tee: Tee) -> tuple[Entry | None, bool]:
        """Return what a file replaces, and whether that is known, maybe only by now: nothing is asked here."""
        if tee.is_append and tee.begun is not None and tee.begun.entry is not None:
            return tee.begun.entry, True
        if not request.is_known and self._core.dirs.knows(request.path):
            with contextlib.suppress(FileNotFoundError):
                return self._core.dirs.lookup(request.path), True
            return None, True
        return request.entry, request.is_known

    def _now(self, path: str) -> Entry | None:
        """Return what is at the path, None also where nobody can say: the journal has the last word."""
        dirs = self._core.dirs
        try:
            waiting = self._parts.pending.find(path)
            if waiting is not None or dirs.knows(path):
                return waiting or dirs.lookup(path)
            return self._core.questions.ask(lambda: dirs.lookup(path), path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno not in AWAY:
                raise
            return None

    def _follow(self, request: Request, tee: Tee) -> None:
        """Let what was appended follow what is known to be at the path by now."""
        if tee.is_append and tee.begun is not None and not tee.begun.is_still(now := self._now(request.path)):
            self._append_to(replace(request, entry=now), tee)

    def _append_to(self, request: Request, tee: Tee) -> None:
        """Make a new draft: the version that `request` names, and behind it what was appended to another one."""
        assert tee.begun is not None
        logger.info("%r has changed since an append to it began; it is appended to as it is now", request.path)
        try:
            begun, draft = self._begin_with_all(request)
        except FileNotFoundError:  # it was deleted again
            begun, draft = self._begin(replace(request, entry=None), None)
        try:
            offset = tee.begun.size
            while data := tee.draft.read(offset, APPENDED_AT_ONCE):
                draft.write(draft.size, data)
                offset += len(data)
        except BaseException:
            draft.truncate(0)  # nobody could go on with it
            self._parts.cache.abandon(draft)
            raise
        tee.begin_anew(draft, begun)

    def _begin_with_all(self, request: Request) -> tuple[Begun, Draft]:
        """Begin a draft with all of what `request` names; waits until it is fetched. ENOENT where it is gone."""
        with contextlib.closing(self.cached_read(request)) as base:
            filling = base.fill()
            if not filling.done():
                about_to_wait(Wait.STORE)
            result_of(filling, request.path)
            base.verify()
            return self._begin(request, base)

    @property
    def _parts(self) -> CacheParts:
        parts = self._core.parts
        if parts is None:
            raise failure(errno.EINVAL, self._core.backend.display, "There is no cache in mode off")
        return parts


def _is_exclusive(tee: Tee) -> bool:
    return tee.begun is not None and tee.begun.is_exclusive


@contextlib.contextmanager
def _being_new(path: str, code: int) -> Iterator[None]:
    """Say with `code` of what was stored meanwhile that it is there."""
    try:
        yield
    except OSError as error:
        if error.errno != ECHANGED:
            raise
        raise failure(code, path, "Others have made the file meanwhile") from error


def _there(request: Request) -> Entry:
    if request.entry is None:
        raise failure(errno.ENOENT, request.path)
    return request.entry
