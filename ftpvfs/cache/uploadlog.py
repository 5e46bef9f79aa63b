"""What write-back must remember over a restart beside the dirty records: news to be told, and versions it has sent."""

from __future__ import annotations

import secrets
from typing import Any, ClassVar

from ftpvfs.cache.database import Database

EVENT = "event:"
SENT = "sent:"
# News that nobody takes must not fill the disk.
MOST_EVENTS = 10_000

# Length, modification time and hash of a version that may have got to the store; no hash where the others tell.
Version = tuple[int, float, str]


class UploadLog(Database):
    """News and versions of one store. Any thread, any process; what a method has written is on the disk on return."""

    what: ClassVar[str] = "log of the uploads"
    loss: ClassVar[str] = "news of uploads that were not delivered yet are lost"

    def add_event(self, time: float, event: dict[str, Any]) -> str:
        """Keep news until `drop_event`; return the name by which it is known."""
        key = f"{EVENT}{max(time, 0.0):020.6f}-{secrets.token_hex(8)}"
        self._write(key, event)
        return key

    def events(self) -> list[str]:
        """Return the names of all news that are kept, the oldest first; what is beyond MOST_EVENTS of them is dropped.
        """
        keys = sorted(self._keys(EVENT))
        for key in keys[:-MOST_EVENTS]:
            self._delete(key)
        return keys[-MOST_EVENTS:]

    def event(self, key: str) -> dict[str, Any]:
        """Return news that are kept; nothing is in them where somebody else has taken them."""
        event = self._read(key)
        return event if isinstance(event, dict) else {}

    def drop_event(self, key: str) -> None:
        """Forget news that were delivered."""
        self._delete(key)

    def add_sent(self, path: str, version: Version) -> None:
        """Remember, before it is sent, that a version may get to the store."""
        known = self.sent(path)
        if version not in known:
            self._write(SENT + path, [*known, version])

    def sent(self, path: str) -> list[Version]:
        """Return the versions that may have got to the store since `forget_sent`."""
        return [(int(size), float(mtime), "".join(digest)) for size, mtime, *digest in self._read(SENT + path) or ()]

    def forget_sent(self, path: str) -> None:
        """Forget them: it is known what the store has."""
        self._delete(SENT + path)
