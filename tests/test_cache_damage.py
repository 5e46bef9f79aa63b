"""A cache folder that somebody or something has damaged: the start is never stopped, and no dirty file is lost."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftpvfs.cache.cache import Cache
from ftpvfs.cache.index import Index
from ftpvfs.config import VFSOptions
from tests.test_cache import MovingClock, entry, memory, publish, read  # noqa: F401 - a fixture

OPTIONS = VFSOptions(cache_mode="full")
DIRTY = {f"d{number % 3}/file-{number}": f"content of {number}".encode() * 20 for number in range(12)}


@pytest.fixture
def folder(memory: Path) -> Path:  # noqa: F811
    """A folder with dirty files, a deleted and a renamed one, an interrupted upload, and clean ones."""
    folder = memory / "cache" / "store"
    index = Index(folder)
    cache = Cache(folder, index, OPTIONS, clock=MovingClock())
    for path, data in DIRTY.items():
        publish(cache, path, b"older")
        publish(cache, path, data)
    publish(cache, "old name", b"renamed")
    cache.rename("old name", "new name", source_at_store=True, target_base=None)
    cache.delete("deleted", at_store=True)
    draft = cache.draft("partial", user="alice")
    draft.write(0, b"x" * 100)
    cache.abandon(draft)
    for number in range(5):
        item = cache.open_item(f"clean-{number}", entry(f"clean-{number}", b"12345"))
        item.add(0, [b"123"])
        item.release()
    index.add_folder("made/by/hand")
    cache.close()
    index.close()
    return folder


@pytest.fixture
def intact() -> dict[str, bytes | None]:
    """What is dirty in the folder, None for what is deleted."""
    return {**DIRTY, "new name": b"renamed", "old name": None, "deleted": None}


def dirty(cache: Cache) -> dict[str, bytes | None]:
    return {each.path: None if each.is_tombstone else read(cache, each.path) for each in cache.all_dirty()}


def start(folder: Path) -> Iterator[Cache]:
    index = Index(folder)
    cache = Cache(folder, index, OPTIONS, clock=MovingClock())
    try:
        yield cache
    finally:
        cache.close()
        index.close()


def flip(path: Path, chance: random.Random, count: int) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(count):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def remove_database(folder: Path) -> None:
    for file in folder.glob("cache.db*"):
        file.unlink()


def checkpointed(folder: Path) -> Path:
    """The database file with all that is in the log beside it."""
    index = Index(folder)
    index.close()
    assert (folder / "cache.db").stat().st_size > 4096
    return folder / "cache.db"


def test_the_folder_is_sound(folder: Path, intact: dict[str, bytes | None]) -> None:
    for cache in start(folder):
        assert dirty(cache) == intact
        assert cache.check() == []
        assert cache.partial("partial", "alice") is not None


def test_an_index_that_is_gone_is_made_again_from_what_stands_beside_the_data(
    folder: Path, intact: dict[str, bytes | None]
) -> None:
    remove_database(folder)
    shutil.rmtree(folder / "items")
    for cache in start(folder):
        assert dirty(cache) == intact
        assert cache.check() == []
        assert all(record.attempted for record in cache.all_dirty()), "nobody knows whether an upload was tried"
        partial = cache.partial("partial", "alice")
        assert partial is not None
        assert partial.size == 100
        publish(cache, "d0/file-0", b"newest")
    for cache in start(folder):
        assert dirty(cache) == {**intact, "d0/file-0": b"newest"}


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_an_index_that_is_cut_short_loses_nothing(folder: Path, intact: dict[str, bytes | None], part: float) -> None:
    database = checkpointed(folder)
    os.truncate(database, int(database.stat().st_size * part))
    for cache in start(folder):
        assert dirty(cache) == intact
        assert cache.check() == []


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bits_anywhere_in_the_index_lose_nothing(
    folder: Path, intact: dict[str, bytes | None], seed: int
) -> None:
    chance = random.Random(seed)
    flip(checkpointed(folder), chance, count=chance.choice([1, 5, 50, 500]))
    flip(folder / "items" / "cache.db", chance, count=chance.choice([1, 50]))
    for cache in start(folder):
        assert dirty(cache) == intact
        assert cache.check() == []
        item = cache.open_item("clean-1", entry("clean-1", b"12345"))
        assert item.missing(0, 5) in ([(3, 5)], [(0, 5)])
        item.release()


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(100, 400))
def test_many_flipped_bits_lose_nothing(folder: Path, intact: dict[str, bytes | None], seed: int) -> None:
    test_flipped_bits_anywhere_in_the_index_lose_nothing(folder, intact, seed)


def test_records_in_the_index_that_are_exchanged_for_others_are_noticed(
    folder: Path, intact: dict[str, bytes | None], caplog: pytest.LogCaptureFixture
) -> None:
    index = Index(folder)
    index.put("dirty:d0/file-0", index.get("dirty:d0/file-3") or b"")
    index.delete("dirty:d1/file-1")
    index.put("dirty:stranger", b"{}")
    index.close()
    with caplog.at_level(logging.ERROR):
        for cache in start(folder):
            assert dirty(cache) == intact
            assert cache.recovered.rebuilt
            assert cache.check() == []
    assert "damaged" in caplog.text


def test_a_record_that_got_lost_without_a_trace_is_noticed(folder: Path, intact: dict[str, bytes | None]) -> None:
    index = Index(folder)
    index.delete("dirty:d1/file-1")
    index.close()
    for cache in start(folder):
        assert dirty(cache) == intact


def test_records_beside_the_data_that_are_damaged_do_not_matter_while_the_index_is_sound(
    folder: Path, intact: dict[str, bytes | None]
) -> None:
    chance = random.Random(1)
    for number, file in enumerate(sorted((folder / "data").glob("*.json"))):
        if number % 3 == 0:
            file.unlink()
        else:
            flip(file, chance, 3)
    for cache in start(folder):
        assert dirty(cache) == intact
        assert cache.check() == []
    remove_database(folder)
    for cache in start(folder):
        assert dirty(cache) == intact, "they were not written again"


def test_data_whose_records_are_both_gone_is_kept_in_quarantine(
    folder: Path, intact: dict[str, bytes | None], caplog: pytest.LogCaptureFixture
) -> None:
    for file in (folder / "data").glob("*.json"):
        file.unlink()
    remove_database(folder)
    with caplog.at_level(logging.ERROR):
        for cache in start(folder):
            assert cache.all_dirty() == []
            assert cache.check() == []
    kept = {file.read_bytes() for file in (folder / "quarantine").iterdir()}
    assert kept == {data for data in intact.values() if data is not None}
    assert "nothing tells whose data it is" in caplog.text


def test_data_with_an_unreadable_record_and_no_index_is_kept_in_quarantine(folder: Path) -> None:
    remove_database(folder)
    (broken, *_) = sorted((folder / "data").glob("*.json"))
    broken.write_bytes(b"{]")
    for cache in start(folder):
        assert len(cache.all_dirty()) == len(DIRTY) + 2
        assert cache.check() == []
    assert (folder / "quarantine" / broken.name).exists()


def test_a_dirty_record_without_its_data_is_dropped_loudly(
    folder: Path, intact: dict[str, bytes | None], caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {file.stat().st_size: file for file in (folder / "data").iterdir() if not file.suffix}
    sizes[7].unlink()  # "renamed"
    for cache in start(folder):
        del intact["new name"]
        assert dirty(cache) == intact
        assert cache.recovered.lost == 1
        assert cache.check() == []
    assert "LOST: 'new name'" in caplog.text


def test_dirty_data_that_is_too_short_is_kept_in_quarantine_and_said_loudly(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {file.stat().st_size: file for file in (folder / "data").iterdir() if not file.suffix}
    os.truncate(sizes[7], 3)
    for cache in start(folder):
        assert cache.dirty("new name") is None
        assert cache.check() == []
    assert "LOST: 'new name'" in caplog.text
    assert (folder / "quarantine" / sizes[7].name).read_bytes() == b"ren"


@pytest.mark.parametrize("place", ["data", "incoming"])
def test_what_is_none_of_ours_is_moved_away(folder: Path, intact: dict[str, bytes | None], place: str) -> None:
    (folder / place / "README").write_text("hello")
    (folder / place / ("f" * 32 + ".txt")).write_text("hello")
    (folder / place / "folder").mkdir()
    for cache in start(folder):
        assert dirty(cache) == intact
        assert cache.check() == []
    assert (folder / "quarantine" / "README").read_text() == "hello"


def test_damage_that_comes_while_the_cache_is_in_use_loses_nothing(
    folder: Path, intact: dict[str, bytes | None]
) -> None:
    for cache in start(folder):
        remove_database(folder)
        publish(cache, "new", b"fresh")
        assert dirty(cache) == {**intact, "new": b"fresh"}
        assert cache.check() == []


def test_the_index_and_all_clean_files_may_be_deleted_while_nobody_looks(folder: Path) -> None:
    shutil.rmtree(folder / "clean")
    shutil.rmtree(folder / "items")
    for cache in start(folder):
        item = cache.open_item("clean-1", entry("clean-1", b"12345"))
        assert item.missing(0, 5) == [(0, 5)]
        item.release()
