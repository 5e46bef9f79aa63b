"""The judge of shared names: it lets pass what can have happened, and nothing else."""

from __future__ import annotations

import random
import re

import pytest

from tests.history import Content, Delete, Event, History, Look, Record, Rename, Upload
from tests.shared import Records, Wrong

OLD, NEW, MORE = Record(101, 101), Record(102, 102), Record(103, 10_000)


def stored(start: float, end: float, record: Record, name: str = "a", *, appends: bool = False) -> Upload:
    return Upload(start, end, f"stored {record.number}", name, record, appends=appends)


def read(start: float, end: float, *records: Record, name: str = "a") -> Look:
    content: Content | None = records or None
    return Look(start, end, "read", name, is_there=content is not None, content=content)


def sized(start: float, end: float, size: int) -> Look:
    return Look(start, end, "size", "a", size=size)


def wrong(*events: Event) -> list[str]:
    return [line.splitlines()[0] for line in History(list(events)).wrong()]


@pytest.mark.parametrize(
    "events",
    [
        [stored(0, 1, OLD), read(2, 3, OLD)],
        [stored(0, 1, OLD), stored(2, 5, NEW), read(3, 4, OLD), read(3, 4, NEW), read(3.5, 4.5, OLD)],
        [stored(0, 3, OLD), stored(1, 2, NEW), read(4, 5, OLD), sized(4, 5, 101)],
        [read(0, 1), stored(0.5, 2, OLD), read(1.5, 1.7)],
        [stored(0, 1, OLD), Delete(2, 5, "deleted", "a"), read(3, 4), read(6, 7), sized(3, 4, 101)],
        [stored(0, 1, OLD, "b"), Rename(2, 3, "renamed", "b", "a"), read(4, 5, OLD), read(4, 5, name="b")],
        [stored(0, 1, OLD), stored(2, 3, MORE, appends=True), read(4, 5, OLD, MORE), sized(4, 5, 10_101)],
        [stored(0, 1, OLD), stored(2, 5, MORE, appends=True), Delete(3, 4, "deleted", "a"), read(6, 7, OLD, MORE)],
    ],
)
def test_what_can_have_happened_is_right(events: list[Event]) -> None:
    assert wrong(*events) == []


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([read(0, 1, OLD)], "read: record 101 was not acknowledged"),
        ([stored(2, 3, OLD), read(0, 1, OLD)], "read: nobody has stored that here"),
        ([stored(0, 1, OLD, "b"), read(2, 3, OLD)], "read: nobody has stored that here"),
        ([stored(0, 1, OLD), stored(2, 3, NEW), read(4, 5, OLD)], "read: outdated since stored 102"),
        ([stored(0, 1, OLD), stored(2, 3, NEW), sized(4, 5, 101)], "size: outdated since stored 102"),
        ([stored(0, 1, OLD), Delete(2, 3, "deleted", "a"), read(4, 5, OLD)], "read: outdated since deleted"),
        ([stored(0, 1, OLD), Rename(2, 3, "renamed", "a", "b"), read(4, 5, OLD)], "read: outdated since renamed"),
        ([stored(0, 1, OLD), read(2, 3)], "read: it is there since stored 101"),
        ([stored(0, 1, OLD), Rename(2, 3, "moved", "a", "b"), read(4, 5, name="b")], "read: it is there since moved"),
        (
            [stored(0, 1, OLD), stored(0, 1, NEW), read(2, 3, OLD, NEW)],
            "read: record 102 was not appended to anything",
        ),
        ([stored(0, 1, OLD), stored(2, 3, MORE, appends=True), read(4, 5, OLD)], "read: outdated since stored 103"),
        (
            [
                stored(0, 1, OLD),
                stored(2, 3, MORE, appends=True),
                stored(4, 5, Record(104, 10_000), appends=True),
                read(6, 7, OLD, Record(104, 10_000)),
            ],
            "read: it lacks stored 103",
        ),
    ],
)
def test_what_cannot_have_happened_is_wrong(events: list[Event], reason: str) -> None:
    assert wrong(*events) == [reason]


def test_records_know_what_is_cut_or_mixed_or_whole() -> None:
    records = Records(random.Random(1), 100_000)
    (first, one), (more, two) = records.make(), records.make(appends=True)
    assert (len(one) % 10_000, len(two) % 10_000) == (first.number, 0)
    assert records.read(b"") == ()
    assert records.read(one + two) == (first, more)
    for data in (two[:-1], one + two[:100], two[:5000] + bytes(1) + two[5001:], two[1:], two + b"x"):
        with pytest.raises(Wrong, match=re.compile("no record at byte|cut or mixed")):
            records.read(data)
