"""What tests ask of files that are read without waiting."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from ftpvfs.readiness import Awaited


def awaited(readable: Any) -> Future[Any] | None:
    """Return what is to be awaited before there are bytes, None where there are some or the end is reached."""
    found = readable.poll()
    return found.future if isinstance(found, Awaited) else None
