"""What is dirty as memory knows it: always what the index says, and never in the way of who may not wait."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ftpvfs import paths
from ftpvfs.cache.mirror import CHANGED, READ_AT_ONCE, Mirror
from ftpvfs.cache.records import DirtyRecord
from ftpvfs.coordination.feed import ChangeFeed
from ftpvfs.waiting import Wait, WouldWait, limited_to, without_waiting
from tests.conftest import wait_until


def record(path: str, size: int = 1, *, is_tombstone: bool = False) -> DirtyRecord:
    beside = "0" * 32
    return DirtyRecord(path, None if is_tombstone else beside, size, 1.5, 1, None, beside=beside)


class Records(dict[str, DirtyRecord]):
    """The index's records, and how they are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir(exist_ok=True)
        self.feed, self.others = ChangeFeed(folder, ring=64 * 1024), ChangeFeed(folder, ring=64 * 1024)
        self.reads = 0
        # Set: reading all goes on.
        self.gate = threading.Event()
        self.gate.set()
        self.is_waiting = False

    def read(self, path: str) -> DirtyRecord | None:
        self.reads += 1
        return self.get(path)

    def read_all(self) -> list[DirtyRecord]:
        found = list(self.values())
        self.is_waiting = not self.gate.is_set()
        self.gate.wait(60)
        return found

    def mirror(self) -> Mirror:
        return Mirror(self.read, self.read_all, self.feed)

    def change(self, path: str, new: DirtyRecord | None) -> None:
        """Change a record as another process does."""
        self.pop(path, None)
        if new is not None:
            self[path] = new
        self.others.publish({CHANGED: path})

    def overflow(self) -> None:
        """Let other processes change more than can be told."""
        for number in range(2000):
            self.others.publish({CHANGED: f"elsewhere/{number}"})


@pytest.fixture
def records(tmp_path: Path) -> Records:
    made = Records(tmp_path / "cache")
    yield made  # type: ignore[misc]
    made.feed.close()
    made.others.close()


def asked(call: Callable[[], object]) -> Wait:
    """What a call would wait for."""
    with pytest.raises(WouldWait) as caught:
        without_waiting(call)
    return caught.value.need


@pytest.mark.parametrize("seed", range(20))
def test_it_says_what_the_index_says_whoever_changes_it(records: Records, seed: int) -> None:
    chance = random.Random(seed)
    mirror = records.mirror()
    names = ["a", "b", "d/a", "d/b", "d/e/a", "d/e/f/a", "x/y/z", "x/y/w"]
    for _ in range(200):
        path = chance.choice(names)
        new = chance.choice([None, record(path, chance.randrange(9)), record(path, is_tombstone=True)])
        if chance.random() < 0.5:
            records.change(path, new)
        else:
            records.pop(path, None)
            if new is not None:
                records[path] = new
            mirror.changed([path])
        if chance.random() < 0.3:
            check(mirror, records, chance.choice(["", "d", "d/e", "x", "nothing"]))
    check(mirror, records, "")
    assert (mirror.size, mirror.count) == (sum(each.size for each in records.values()), len(records))


def check(mirror: Mirror, records: Records, folder: str) -> None:
    files = [path for path, each in records.items() if not each.is_tombstone]
    below = [path for path in files if paths.is_within(path, folder) and path != folder]
    assert mirror.has_file_below(folder) == bool(below)
    cut = len(folder) + 1 if folder else 0
    assert set(mirror.folders_in(folder)) == {path[cut:].split("/")[0] for path in below if "/" in path[cut:]}
    assert {each.path for each in mirror.inside(folder)} == {
        path for path in records if paths.split(path)[0] == folder
    }
    assert {each.path for each in mirror.below(folder)} == {path for path in records if paths.is_within(path, folder)}
    assert mirror.is_empty == (not records)
    for path in records:
        assert mirror.get(path) == records[path]


def test_while_all_is_read_again_nobody_waits_who_may_not(records: Records) -> None:
    records["a"] = record("a")
    mirror = records.mirror()
    records.overflow()
    records["a"] = record("a", 7)
    assert asked(lambda: mirror.get("a")) is Wait.DISK
    records.gate.clear()
    found: list[DirtyRecord | None] = []
    reader = threading.Thread(target=lambda: found.append(mirror.get("a")))
    reader.start()
    wait_until(lambda: records.is_waiting)
    assert asked(lambda: mirror.get("a")) is Wait.DISK
    assert asked(lambda: mirror.has_file_below("")) is Wait.DISK
    records["a"] = record("a", 8)  # after it was read
    records.others.publish({CHANGED: "a"})
    records.gate.set()
    reader.join()
    assert found == [record("a", 8)]
    assert without_waiting(lambda: mirror.get("a")) == record("a", 8)


def test_who_may_not_wait_reads_a_few_records_and_no_more(records: Records) -> None:
    mirror = records.mirror()
    for number in range(1000):
        records.change(f"d/{number}", record(f"d/{number}"))
    records.reads = 0
    assert without_waiting(lambda: mirror.get("d/7")) == record("d/7")
    assert without_waiting(lambda: mirror.get("d/none")) is None
    assert without_waiting(lambda: mirror.get("e/none")) is None
    assert records.reads == 1
    for ask in (lambda: mirror.inside("d"), lambda: mirror.below(""), lambda: mirror.folders_in("")):
        assert asked(ask) is Wait.DISK
    assert records.reads <= READ_AT_ONCE
    with limited_to(Wait.DISK):
        assert len(mirror.inside("d")) == 1000
    assert records.reads == 1000


def test_changes_are_told_once_to_who_asks_for_them(records: Records) -> None:
    mirror = records.mirror()
    assert mirror.changes() is None
    records.change("a", record("a"))
    mirror.changed(["b"])
    assert mirror.changes() == {"a", "b"}
    assert mirror.changes() == set()
    records.overflow()
    assert mirror.changes() is None
    mirror.ignore_changes()
    assert mirror.changes() is None
