"""The cache dies before every operation that changes the disk, and the disk has any part of what was not synced.

A model knows what was acknowledged. After recovery each path is what it was before the operation that died or what it
would have been after it, never a part or a mixture, and the store ends with exactly that.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ftpvfs.backend.backend import Entry
from ftpvfs.cache.cache import Cache
from ftpvfs.cache.index import Index
from ftpvfs.cache.item import Draft
from ftpvfs.config import VFSOptions
from tests.crash.disk import CrashingFiles, CrashingIndex, Death, Died, always, never, sometimes

OPTIONS = VFSOptions(cache_mode="full")
Files = dict[str, bytes]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: what counts as synced is our own affair here."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


@dataclass
class Store:
    """What the store has, by path."""

    objects: Files = field(default_factory=dict)
    count: int = 0

    def put(self, path: str, data: bytes) -> Entry:
        self.objects[path] = data
        self.count += 1
        return Entry(path.rpartition("/")[2], False, len(data), 1.0, f"v{self.count}")


def bytes_of(cache: Cache, path: str) -> bytes:
    record = cache.dirty(path)
    assert record is not None
    item = cache.open_dirty(record)
    try:
        return cache.files.pread(item.descriptor, item.size, 0)
    finally:
        item.release()


def visible(cache: Cache, store: Store) -> Files:
    """What a user sees: the store's objects, with what is dirty over them."""
    seen = dict(store.objects)
    for record in cache.all_dirty():
        if record.is_tombstone:
            seen.pop(record.path, None)
        else:
            seen[record.path] = bytes_of(cache, record.path)
    return seen


class Story:
    """A user and write-back at work. Each step names what the user sees once it is acknowledged."""

    def __init__(self, cache: Cache, store: Store) -> None:
        self.cache = cache
        self.store = store
        # What the user was told, and what he would be told by the step that is under way.
        self.told: Files = {}
        self.next: Files = {}
        self.drafts: list[Draft] = []

    def step(self, seen: Files) -> None:
        self.next = seen

    def acknowledged(self) -> None:
        self.told = self.next

    def write(self, path: str, data: bytes) -> None:
        self.step({**self.told, path: data})
        draft = self.cache.draft(path, user="alice")
        half = len(data) // 2
        draft.write(0, data[:half])
        draft.write(half, data[half:])
        base = "known" if path in self.store.objects else None
        self.cache.publish(draft, mtime=1.0, base=base)
        self.acknowledged()

    def append(self, path: str, data: bytes) -> None:
        record = self.cache.dirty(path)
        if record is None or record.is_tombstone:
            return
        self.step({**self.told, path: self.told[path] + data})
        base = self.cache.open_dirty(record)
        draft = self.cache.draft(path, base=base)
        base.release()
        draft.write(draft.size, data)
        self.cache.publish(draft, mtime=1.0, base=None)
        self.acknowledged()

    def interrupt(self, path: str, data: bytes) -> None:
        self.step(self.told)
        draft = self.cache.draft(path, user="alice")
        draft.write(0, data)
        self.cache.abandon(draft)
        self.acknowledged()

    def resume(self, path: str, data: bytes) -> None:
        partial = self.cache.partial(path, "alice")
        if partial is None:
            return
        beginning = partial.size
        draft = self.cache.resume(partial)
        whole = draft.read(0, beginning) + data
        self.step({**self.told, path: whole})
        draft.write(beginning, data)
        self.cache.publish(draft, mtime=1.0, base=None)
        self.acknowledged()

    def delete(self, path: str) -> None:
        self.step({name: data for name, data in self.told.items() if name != path})
        self.cache.delete(path, at_store=path in self.store.objects)
        self.acknowledged()

    def rename(self, source: str, target: str) -> None:
        record = self.cache.dirty(source)
        if record is None or record.is_tombstone or source == target:
            return
        rest = {name: data for name, data in self.told.items() if name != source}
        self.step({**rest, target: self.told[source]})
        self.cache.rename(
            source,
            target,
            source_at_store=source in self.store.objects,
            target_base="known" if target in self.store.objects else None,
        )
        self.acknowledged()

    def rename_folder(self, source: str, target: str) -> None:
        """Only of what is dirty; the store has nothing there."""
        if any(name.startswith((source + "/", target + "/")) for name in self.store.objects):
            return
        moved = {
            target + name[len(source) :] if name.startswith(source + "/") else name: data
            for name, data in self.told.items()
            if not name.startswith(target + "/")
        }
        if len(moved) != len(self.told):
            return
        self.step(moved)
        self.cache.rename_below(source, target)
        self.acknowledged()

    def touch(self, path: str) -> None:
        record = self.cache.dirty(path)
        if record is None or record.is_tombstone:
            return
        self.step(self.told)
        self.cache.touch(path, 77.0)
        self.acknowledged()

    def write_back(self, path: str) -> None:
        """Bring one path to the store."""
        self.step(self.told)
        record = self.cache.dirty(path)
        if record is None or not self.cache.begin(record):
            return
        if record.is_tombstone:
            self.store.objects.pop(path, None)
            self.cache.deleted(record)
        else:
            self.cache.uploaded(record, self.store.put(path, bytes_of(self.cache, path)))

    def overtake(self, path: str, data: bytes) -> None:
        """A write during an upload."""
        record = self.cache.dirty(path)
        if record is None or record.is_tombstone or not self.cache.begin(record):
            return
        sent = bytes_of(self.cache, path)
        self.write(path, data)
        self.step(self.told)
        self.cache.uploaded(record, self.store.put(path, sent))

    def drain(self) -> None:
        for record in self.cache.all_dirty():
            self.write_back(record.path)


def overwrite(story: Story) -> None:
    story.write("a", b"one")
    story.write("a", b"second")
    story.append("a", b" and more")
    story.write_back("a")
    story.write("a", b"third")
    story.touch("a")


def rename(story: Story) -> None:
    story.write("a", b"hello")
    story.write("d/b", b"old")
    story.write_back("d/b")
    story.rename("a", "d/b")
    story.write("a", b"again")
    story.rename("d/b", "c")
    story.write_back("d/b")


def rename_folder(story: Story) -> None:
    story.write("d/a", b"one")
    story.write("d/e/b", b"two")
    story.rename_folder("d", "x/y")
    story.write_back("x/y/a")


def delete(story: Story) -> None:
    story.write("a", b"hello")
    story.delete("a")
    story.write("a", b"again")
    story.write_back("a")
    story.delete("a")
    story.write("a", b"and again")
    story.delete("a")
    story.write_back("a")


def race(story: Story) -> None:
    story.write("a", b"one")
    story.overtake("a", b"two")
    story.delete("a")
    story.write_back("a")


def interruption(story: Story) -> None:
    story.interrupt("a", b"hello")
    story.resume("a", b" world")
    story.interrupt("a", b"x" * 300_000)
    story.interrupt("a", b"y" * 300_000)
    story.write("a", b"done")


def random_steps(seed: int) -> Callable[[Story], None]:
    def tell(story: Story) -> None:
        chance = random.Random(seed)
        paths = ["a", "b", "d/a", "d/b", "d/e/c"]
        for number in range(10):
            path, other = chance.choice(paths), chance.choice(paths)
            data = f"{number}:{seed}".encode() * chance.randint(1, 5)
            chance.choice(
                [
                    lambda: story.write(path, data),  # noqa: B023 - called at once
                    lambda: story.write(path, data),  # noqa: B023
                    lambda: story.append(path, data),  # noqa: B023
                    lambda: story.delete(path),  # noqa: B023
                    lambda: story.rename(path, other),  # noqa: B023
                    lambda: story.rename_folder("d", "x") if number % 2 else story.rename_folder("x", "d"),  # noqa: B023
                    lambda: story.touch(path),  # noqa: B023
                    lambda: story.interrupt(path, data),  # noqa: B023
                    lambda: story.resume(path, data),  # noqa: B023
                    lambda: story.write_back(path),  # noqa: B023
                    lambda: story.overtake(path, data),  # noqa: B023
                ]
            )()

    return tell


@dataclass
class Survives:
    """What of that which was not synced is on the disk after the crash."""

    chance: Callable[[], bool]
    bytes_chance: Callable[[], bool] | None = None
    index: bool = True


def crash(place: Path, tell: Callable[[Story], None], at: int, survives: list[Survives]) -> bool:
    """Tell the story until operation `at`; recover each image of the disk. Return whether the story came to its end."""
    folder = place / f"at-{at}"
    death = Death()
    index = CrashingIndex(folder, death)
    files = CrashingFiles(folder, death)
    cache = Cache(folder, index, OPTIONS, files=files)
    store = Store()
    story = Story(cache, store)
    death.count, death.at = 0, at
    is_over = True
    try:
        tell(story)
    except Died:
        is_over = False
    for number, each in enumerate(survives):
        image = place / f"image-{at}-{number}"
        files.image(image, each.chance, bytes_chance=each.bytes_chance, index=each.index)
        recover(image, story)
        shutil.rmtree(image)
    death.at = None
    files.close()
    cache.close()
    index.close()
    shutil.rmtree(folder)
    return is_over


def recover(image: Path, story: Story) -> None:
    """Start on what the disk has, and look whether the user would agree."""
    index = Index(image)
    cache = Cache(image, index, OPTIONS)
    store = Store(dict(story.store.objects), story.store.count)
    try:
        assert cache.check() == []
        assert cache.recovered.lost == 0
        seen = visible(cache, store)
        assert seen in (story.told, story.next)
        after = Story(cache, store)
        after.told = after.next = seen
        after.drain()
        assert store.objects == seen
        assert cache.all_dirty() == []
        assert cache.check() == []
    finally:
        cache.close()
        index.close()


NOTHING, ALL = Survives(never), Survives(always)
SCRIPTS = [overwrite, rename, rename_folder, delete, race, interruption]


@pytest.mark.parametrize("tell", SCRIPTS, ids=lambda each: each.__name__)
def test_a_crash_at_any_operation_leaves_old_or_new(place: Path, tell: Callable[[Story], None]) -> None:
    at = 1
    while not crash(place, tell, at, [NOTHING, ALL, Survives(sometimes(at)), Survives(sometimes(-at))]):
        at += 1
    assert at > 20


@pytest.mark.parametrize("tell", [overwrite, delete, race], ids=lambda each: each.__name__)
def test_a_crash_that_takes_the_index_along_loses_no_dirty_file(place: Path, tell: Callable[[Story], None]) -> None:
    at = 1
    while not crash(place, tell, at, [Survives(always, never, index=False), Survives(always, index=False)]):
        at += 1


@pytest.mark.parametrize("seed", range(3))
def test_a_crash_at_any_operation_of_any_story_leaves_old_or_new(place: Path, seed: int) -> None:
    at = 1 + seed
    while not crash(place, random_steps(seed), at, [NOTHING, Survives(sometimes(at))]):
        at += 3


@pytest.mark.stress
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 160))
def test_a_crash_at_every_operation_of_many_stories_leaves_old_or_new(place: Path, seed: int) -> None:
    at = 1
    while not crash(place, random_steps(seed), at, [NOTHING, ALL, *(Survives(sometimes(at * n)) for n in (3, 5, 7))]):
        at += 1
