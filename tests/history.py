"""Whether what sessions were told of the files that they share can be true.

A `History` is what clients did and were told, each command with the moments before it was sent and after its last
reply. It must be regular (Lamport, "On interprocess communication", 1986): once a change is acknowledged everybody who
asks is told of it, or of a later one; while a file is being changed, its listing and its open files may tell of it as
it was and as it will be. So an answer is wrong where the times alone show it: what is told was replaced before the
question by a change that began after all that can have made it; or a file is missing that nobody can have removed.

A file's content is the tuple of the records in it: STOR makes it one record, APPE adds one. Pure, but for the lock.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

# How many commands before one that cannot be explained are told.
SHOWN = 25
# By what a file's size tells the record that it begins with: that of one stored by STOR is its number modulo this, that
# of one added by APPE is 0.
MODULUS = 10_000


class Record(NamedTuple):
    """What one upload has stored: its number, and how many bytes it is."""

    number: int
    size: int


Content = tuple[Record, ...]


@dataclass(eq=False)
class Event:
    """One command; `start` and `end` are seconds of one clock. `text` tells people what it was and what it was told."""

    start: float
    end: float
    text: str


@dataclass(eq=False)
class Look(Event):
    """The client was told that there is a file, or none, and of one all or nothing of its content or its size."""

    name: str
    is_there: bool = True
    content: Content | None = None
    size: int | None = None


@dataclass(eq=False)
class Upload(Event):
    """The file was replaced by one new record, or with `appends` a record was added to it."""

    name: str
    record: Record
    appends: bool = False


@dataclass(eq=False)
class Delete(Event):
    """The file is gone; where two delete it both may be told so."""

    name: str


@dataclass(eq=False)
class Rename(Event):
    """The file has another name, in the place of what had that."""

    name: str
    target: str


@dataclass
class History:
    """The events of all sessions, in any order. Any thread may add."""

    events: list[Event] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, event: Event) -> None:
        with self._lock:
            self.events.append(event)

    def wrong(self) -> list[str]:
        """Return what cannot be true, each with the commands that went before."""
        uploads = {event.record.number: event for event in self.events if isinstance(event, Upload)}
        found = []
        for look in self.events:
            if isinstance(look, Look):
                reason = self._why_not(look, uploads)
                if reason:
                    found.append(f"{look.text}: {reason}\n{self._timeline(look)}")
        return found

    def _why_not(self, look: Look, uploads: dict[int, Upload]) -> str:
        changes = [event for event in self.events if look.name in _changed(event) and event.start < look.end]
        if not look.is_there:
            return _not_missing(look, changes)
        if look.content is not None:
            last = uploads[look.content[-1].number] if not _not_made(look.content, uploads) else None
            makers = [event for event in changes if event is last or _renames(event, target=look.name)]
            return (
                _not_made(look.content, uploads)
                or _lost_append(look, uploads, changes)
                or _outdated(look, makers, changes)
            )
        if look.size is not None and look.size % MODULUS:
            # An append that began before the file was deleted brings it back.
            first = uploads.get(look.size % MODULUS)
            makers = [
                event for event in changes
                if event is first or _appends(event) or _renames(event, target=look.name)
            ]  # fmt: skip
            return _outdated(look, makers, changes)
        return ""

    def _timeline(self, look: Look) -> str:
        before = sorted((each for each in self.events if each.start <= look.end), key=lambda each: each.end)
        lines = ["the last commands until then:"]
        for each in before[-SHOWN:]:
            start, end = ((moment - look.start) * 1000 for moment in (each.start, each.end))
            lines.append(f"{start:10.1f} to {end:8.1f} ms: {each.text}")
        return "\n".join(lines)


def _changed(event: Event) -> tuple[str, ...]:
    """Return the names that the command changed."""
    if isinstance(event, Rename):
        return event.name, event.target
    return (event.name,) if isinstance(event, Upload | Delete) else ()


def _appends(event: Event) -> bool:
    return isinstance(event, Upload) and event.appends


def _not_missing(look: Look, changes: list[Event]) -> str:
    removed = [event for event in changes if isinstance(event, Delete) or _renames(event, source=look.name)]
    for maker in changes:
        is_made = isinstance(maker, Upload) or _renames(maker, target=look.name)
        if is_made and maker.end < look.start and not any(event.end > maker.start for event in removed):
            return f"it is there since {maker.text}"
    return ""


def _renames(event: Event, *, source: str | None = None, target: str | None = None) -> bool:
    return isinstance(event, Rename) and source in (None, event.name) and target in (None, event.target)


def _not_made(content: Content, uploads: dict[int, Upload]) -> str:
    """Return what of the content nobody can have made so."""
    for position, record in enumerate(content):
        upload = uploads.get(record.number)
        if upload is None:
            return f"record {record.number} was not acknowledged"
        if position and not upload.appends:
            return f"record {record.number} was not appended to anything"
    numbers = [record.number for record in content]
    return "a record is in it twice" if len({*numbers}) < len(numbers) else ""


def _lost_append(look: Look, uploads: dict[int, Upload], changes: list[Event]) -> str:
    """Return which append is not in the content though one before it and one after it are, all to the same file."""
    made = [uploads[record.number] for record in look.content or ()]
    if any(upload.name != look.name for upload in made):
        return ""
    for first, last in itertools.pairwise(made):
        for event in changes:
            if _appends(event) and event not in made and first.end < event.start and event.end < last.start:
                between = [each for each in changes if not _appends(each) and each is not first]
                if not any(each.start < last.end and each.end > first.start for each in between):
                    return f"it lacks {event.text}"
    return ""


def _outdated(look: Look, makers: list[Event], changes: Iterable[Event]) -> str:
    """Return which change of the file came after all that can have made it what was seen, and before it was seen."""
    if not makers:
        return "nobody has stored that here"
    newest = max(event.end for event in makers)
    later = [event for event in changes if event.start > newest and event.end < look.start]
    return f"outdated since {later[0].text}" if later else ""
