"""A draft that is sent to the store while it is written, so that little is left to wait for at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from ftpvfs.backend.backend import ANY, Condition, Entry, Upload
from ftpvfs.cache.cache import Cache
from ftpvfs.cache.item import Draft
from ftpvfs.vfs.begun import Begun

logger = logging.getLogger(__name__)


class Tee:
    """A draft and, as long as it is written from its beginning to its end, the upload of the same bytes.

    When the upload fails, or the writer goes back, the draft alone goes on. One thread at a time; `run` does in another
    thread what waits for the store. `begun` is what the draft was made of; None where nobody needs to know.
    """

    def __init__(
        self,
        cache: Cache,
        draft: Draft,
        upload: Upload | None,
        run: Callable[[Callable[[], object]], None],
        *,
        begun: Begun | None = None,
    ) -> None:
        self._cache = cache
        self.draft = draft
        self.begun = begun
        self._upload = upload
        self._run = run

    @property
    def replaces(self) -> Condition:
        """Which version may be replaced at the store."""
        return ANY if self.begun is None else self.begun.condition

    @property
    def is_append(self) -> bool:
        """Whether nothing was done but to write at the end of what was there."""
        return self.begun is not None and self.begun.only_appended

    def begin_anew(self, draft: Draft, begun: Begun) -> None:
        """Go on with another draft, which has what was appended behind another version."""
        old, self.draft, self.begun = self.draft, draft, begun
        self._give_up_sending()
        self._cache.abandon(old)

    @property
    def size(self) -> int:
        """Bytes in the draft."""
        return self.draft.size

    def write(self, offset: int, data: memoryview) -> None:
        """Write at the offset, as `Draft.write`."""
        is_next = offset == self.draft.size
        self.draft.write(offset, data)
        if self._upload is not None:
            if is_next:
                self._send(self._upload, data)
            else:
                self._give_up_sending()

    def _send(self, upload: Upload, data: memoryview) -> None:
        try:
            upload.accept(data)
        except OSError as error:  # the draft is sent once more at the end
            logger.info("%r is not sent while it comes: %s", self.draft.path, error)
            self._give_up_sending()

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the draft."""
        return self.draft.read(offset, size)

    def truncate(self, size: int) -> None:
        """Make the draft so long."""
        self._give_up_sending()
        if self.begun is not None:
            self.begun = replace(self.begun, only_appended=False)
        self.draft.truncate(size)

    def reserve(self, size: int) -> None:
        """Take the space for so many bytes; ENOSPC."""
        self.draft.reserve(size)

    def pressure(self) -> Future[Any] | None:
        """Return what to await before more is written: space, or parts on their way to the store."""
        busy: Future[Any] | None = self.draft.pressure()
        if busy is None and self._upload is not None:
            try:
                busy = self._upload.pressure()
            except OSError as error:
                logger.info("%r is not sent while it comes: %s", self.draft.path, error)
                self._give_up_sending()
        return busy

    def prepare(self, *, synced: bool) -> None:
        """Do beforehand what publishing takes and nobody sees; `synced`: have the draft's bytes on the disk for good.
        """
        if synced:
            self.draft.sync()
        if self._upload is not None:
            try:
                self._upload.prepare()
            except OSError as error:
                logger.info("%r is sent once more: %s", self.draft.path, error)
                self._give_up_sending()

    def sent(self) -> Entry | None:
        """Publish what was sent; None where the draft is still to be sent. Waits for the store."""
        upload = self._upload
        if upload is None:
            return None
        try:
            entry = upload.commit()
        except OSError as error:
            logger.info("%r is sent once more: %s", self.draft.path, error)
            self._give_up_sending()
            return None
        self._upload = None
        return entry

    def abandon(self) -> None:
        """Give both up; what came stays as a partial where those are kept."""
        self._give_up_sending()
        self._cache.abandon(self.draft)

    def _give_up_sending(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            self._run(upload.abort)
