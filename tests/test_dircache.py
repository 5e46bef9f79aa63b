"""The directory cache: few requests, and no local change is ever lost, whatever is on its way meanwhile."""

from __future__ import annotations

import errno
import random
import threading
import tracemalloc
import unicodedata
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from ftpvfs import paths
from ftpvfs.backend.backend import Entry
from ftpvfs.clock import Clock
from ftpvfs.errors import failure
from ftpvfs.vfs.dircache import SINGLES_BEFORE_LISTING, SINGLES_KEPT, DirCache

MAX_AGE = 300.0


class MovedClock(Clock):
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Tree:
    """A store of names in memory. It counts requests, and holds their answers back where a test says so."""

    def __init__(self, *files: str) -> None:
        self.files = dict.fromkeys(files, 1)
        self.folders: set[str] = {""}
        self.asked: Counter[tuple[str, str]] = Counter()
        self._gates: dict[tuple[str, str], tuple[threading.Event, threading.Event]] = {}

    def hold(self, kind: str, path: str) -> tuple[threading.Event, threading.Event]:
        """Return (arrived, release): the next such request looks, tells that it did, and waits before it answers."""
        gate = self._gates[kind, path] = (threading.Event(), threading.Event())
        return gate

    def _answer(self, kind: str, path: str, look: Callable[[], Any]) -> Any:
        self.asked[kind, path] += 1
        gate = self._gates.pop((kind, path), None)
        try:
            answer = look()
        except OSError as error:
            answer = error
        if gate is not None:
            gate[0].set()
            assert gate[1].wait(20)
        if isinstance(answer, OSError):
            raise answer
        return answer

    def read(self, path: str) -> list[Entry]:
        return self._answer("list", path, lambda: self._list(path))  # type: ignore[no-any-return]

    def stat(self, path: str) -> Entry:
        return self._answer("stat", path, lambda: self._stat(path))  # type: ignore[no-any-return]

    def _list(self, path: str) -> list[Entry]:
        inside = path + "/" if path else ""
        below = [name[len(inside) :] for name in self.files if name.startswith(inside)]
        if not below and path not in self.folders:
            raise failure(errno.ENOENT, path)
        found = {name.split("/")[0]: "/" in name for name in below}
        return [
            Entry(name, is_dir, 0 if is_dir else self.files[inside + name], 1.0, "v")
            for name, is_dir in found.items()
        ]

    def _stat(self, path: str) -> Entry:
        name = paths.split(path)[1]
        if path in self.files:
            return Entry(name, False, self.files[path], 1.0, "v")
        if any(file.startswith(path + "/") for file in self.files):
            return Entry(name, True)
        raise failure(errno.ENOENT, path)

    @property
    def requests(self) -> int:
        return sum(self.asked.values())


@pytest.fixture
def clock() -> MovedClock:
    return MovedClock()


def cache_of(tree: Tree, clock: Clock, **options: Any) -> DirCache:
    return DirCache(tree.read, tree.stat, **{"max_age": MAX_AGE, "clock": clock, **options})


def exists(cache: DirCache, path: str) -> bool:
    try:
        cache.lookup(path)
    except FileNotFoundError:
        return False
    return True


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


# --- few requests


def test_one_listing_answers_for_all_children_and_for_missing_names(clock: MovedClock) -> None:
    tree = Tree(*(f"d/{number}" for number in range(100)), "d/sub/x")
    cache = cache_of(tree, clock)
    assert len(cache.listing("d")) == 101
    assert all(cache.lookup(f"d/{number}").size == 1 for number in range(100))
    assert cache.lookup("d/sub").is_dir
    assert not exists(cache, "d/missing")
    assert tree.requests == 1


def test_a_missing_name_is_asked_for_once(clock: MovedClock) -> None:
    tree = Tree("a")
    cache = cache_of(tree, clock)
    assert [exists(cache, "nothing") for _ in range(5)] == [False] * 5
    assert tree.requests == 1


def test_a_missing_folder_is_listed_once_whatever_names_are_looked_for(clock: MovedClock) -> None:
    tree = Tree()
    cache = cache_of(tree, clock)
    for name in ("ä", "ö", "ü", "ä"):
        assert not exists(cache, f"missing/{name}")
    with pytest.raises(FileNotFoundError):
        cache.listing("missing")
    assert tree.requests == 1


def test_single_names_cost_a_request_each_and_then_one_listing(clock: MovedClock) -> None:
    tree = Tree(*(f"d/{number}" for number in range(100)))
    cache = cache_of(tree, clock)
    for number in range(100):
        assert exists(cache, f"d/{number}")
    assert tree.asked["list", "d"] == 1
    assert tree.requests == SINGLES_BEFORE_LISTING + 1


def test_single_questions_that_are_far_apart_never_list_a_folder(clock: MovedClock) -> None:
    tree = Tree("d/a")
    cache = cache_of(tree, clock)
    for _ in range(3 * SINGLES_BEFORE_LISTING):
        assert exists(cache, "d/a")
        clock.advance(MAX_AGE)
    assert tree.asked["list", "d"] == 0


def test_sixteen_threads_make_one_request(clock: MovedClock) -> None:
    tree = Tree("d/a")
    cache = cache_of(tree, clock)
    arrived, release = tree.hold("list", "d")
    with ThreadPoolExecutor(16) as pool:
        listings = [pool.submit(cache.listing, "d") for _ in range(16)]
        assert arrived.wait(10)
        release.set()
        assert all(listing.result().names == ["a"] for listing in listings)
    assert tree.requests == 1


def test_sixteen_threads_share_one_error_and_the_next_one_asks_again(clock: MovedClock) -> None:
    tree = Tree("d/a")
    failures = [failure(errno.EIO, "d")]

    def read(path: str) -> list[Entry]:
        entries = tree.read(path)
        if failures:
            raise failures.pop()
        return entries

    cache = DirCache(read, tree.stat, max_age=MAX_AGE, clock=clock)
    arrived, release = tree.hold("list", "d")
    started = threading.Barrier(16)

    def ask() -> int | None:
        started.wait(10)
        try:
            cache.listing("d")
        except OSError as error:
            return error.errno
        return None

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(ask) for _ in range(16)]
        assert arrived.wait(10)
        release.set()
        outcomes = {answer.result() for answer in answers}
    assert errno.EIO in outcomes
    assert cache.listing("d").names == ["a"]


def test_an_answer_is_good_for_dir_cache_time(clock: MovedClock) -> None:
    tree = Tree("d/a")
    cache = cache_of(tree, clock)
    cache.listing("d")
    tree.files["d/b"] = 1
    clock.advance(MAX_AGE - 1)
    assert cache.listing("d").names == ["a"]
    assert not exists(cache, "d/b")
    clock.advance(1)
    assert exists(cache, "d/b")
    assert cache.listing("d").names == ["a", "b"]


def test_the_age_counts_from_the_question_not_from_a_late_answer(clock: MovedClock) -> None:
    tree = Tree("d/a")
    cache = cache_of(tree, clock)
    arrived, release = tree.hold("list", "d")
    listing = in_thread(lambda: cache.listing("d"))
    assert arrived.wait(10)
    clock.advance(MAX_AGE)
    release.set()
    listing.result(10)
    cache.listing("d")
    assert tree.asked["list", "d"] == 2


@pytest.mark.parametrize("name", ["plain", "ümlaut"])
def test_without_cache_time_everything_is_asked_and_found(clock: MovedClock, name: str) -> None:
    tree = Tree(f"d/{name}")
    cache = cache_of(tree, clock, max_age=0.0)
    for _ in range(2 * SINGLES_BEFORE_LISTING):
        assert exists(cache, f"d/{name}")
    tree.files.clear()
    assert not exists(cache, f"d/{name}")


def test_off_keeps_answers_for_ever(clock: MovedClock) -> None:
    tree = Tree("d/a")
    cache = cache_of(tree, clock, max_age=None)
    cache.listing("d")
    clock.advance(10**9)
    cache.sweep()
    cache.listing("d")
    assert tree.requests == 1


# --- local changes


def test_a_local_change_is_visible_at_once_without_a_request(clock: MovedClock) -> None:
    tree = Tree("d/a", "d/b")
    cache = cache_of(tree, clock)
    before = cache.listing("d")
    cache.changed("d/new", Entry("new", False, 5))
    cache.changed("d/a", None)
    assert cache.listing("d").names == ["b", "new"]
    assert before.names == ["a", "b"], "a listing in somebody's hands changed"
    assert cache.lookup("d/new").size == 5
    assert not exists(cache, "d/a")
    assert tree.requests == 1


def test_a_local_change_in_a_folder_that_was_never_listed_is_known(clock: MovedClock) -> None:
    tree = Tree("d/a")
    cache = cache_of(tree, clock)
    cache.changed("d/new", Entry("new", False, 5))
    cache.changed("d/a", None)
    assert cache.lookup("d/new").size == 5
    assert not exists(cache, "d/a")
    assert tree.requests == 0


@pytest.mark.parametrize("max_age", [0.0, MAX_AGE, None])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("was_listed", [False, True])
def test_a_listing_under_way_undoes_no_local_change(
    clock: MovedClock, max_age: float | None, fresh: bool, was_listed: bool
) -> None:
    tree = Tree("d/old", "d/gone")
    cache = cache_of(tree, clock, max_age=max_age)
    if was_listed:
        cache.listing("d")
        clock.advance(MAX_AGE)
    arrived, release = tree.hold("list", "d")
    listing = in_thread(lambda: cache.listing("d", fresh=fresh or max_age is None))
    assert arrived.wait(10)
    tree.files["d/new"] = 7
    cache.changed("d/new", Entry("new", False, 7))
    del tree.files["d/gone"]
    cache.changed("d/gone", None)
    release.set()
    assert listing.result(10).names == ["new", "old"]
    assert cache.listing("d").names == ["new", "old"]
    assert cache.lookup("d/new").size == 7
    assert not exists(cache, "d/gone")


def test_a_single_question_under_way_undoes_no_local_change(clock: MovedClock) -> None:
    tree = Tree("d/gone")
    cache = cache_of(tree, clock)
    for path, change in (("d/new", Entry("new", False, 7)), ("d/gone", None)):
        arrived, release = tree.hold("stat", path)
        question = in_thread(lambda path=path: exists(cache, path))
        assert arrived.wait(10)
        cache.changed(path, change)
        release.set()
        assert question.result(10) is (change is not None)
        assert exists(cache, path) is (change is not None)


def test_a_change_survives_a_sweep_and_a_forget_during_a_listing(clock: MovedClock) -> None:
    for disturb in (lambda cache: cache.sweep(), lambda cache: cache.forget("d"), lambda cache: cache.forget("")):
        tree = Tree("d/old")
        cache = cache_of(tree, clock)
        arrived, release = tree.hold("list", "d")
        listing = in_thread(lambda cache=cache: cache.listing("d"))
        assert arrived.wait(10)
        cache.changed("d/new", Entry("new", False, 7))
        tree.files["d/new"] = 7
        clock.advance(2 * MAX_AGE)
        disturb(cache)
        release.set()
        assert listing.result(10).names == ["new", "old"]
        assert exists(cache, "d/new")
        assert cache.listing("d").names == ["new", "old"]


def test_of_two_listings_the_later_question_counts(clock: MovedClock) -> None:
    tree = Tree("d/a")
    cache = cache_of(tree, clock)
    arrived, release = tree.hold("list", "d")
    old = in_thread(lambda: cache.listing("d"))
    assert arrived.wait(10)
    tree.files["d/b"] = 1
    assert cache.listing("d", fresh=True).names == ["a", "b"], "a fresh listing took an answer from before"
    release.set()
    old.result(10)
    assert cache.listing("d").names == ["a", "b"], "an older answer replaced a newer one"


def test_who_asks_after_forget_gets_no_answer_from_before(clock: MovedClock) -> None:
    tree = Tree("d/a")
    cache = cache_of(tree, clock)
    arrived, release = tree.hold("list", "d")
    before = in_thread(lambda: cache.listing("d"))
    assert arrived.wait(10)
    tree.files["d/b"] = 1
    cache.forget("d")
    assert cache.listing("d").names == ["a", "b"]
    release.set()
    assert before.result(10).names == ["a"]
    assert cache.listing("d").names == ["a", "b"]
    assert tree.asked["list", "d"] == 2


def test_forget_of_one_folder_leaves_the_flights_of_others_alone(clock: MovedClock) -> None:
    tree = Tree("d/a", "e/a")
    cache = cache_of(tree, clock)
    arrived, release = tree.hold("list", "d")
    listing = in_thread(lambda: cache.listing("d"))
    assert arrived.wait(10)
    cache.forget("e")
    release.set()
    listing.result(10)
    cache.listing("d")
    assert tree.asked["list", "d"] == 1


def test_a_folder_made_while_it_was_found_missing_is_there(clock: MovedClock) -> None:
    tree = Tree()
    cache = cache_of(tree, clock)
    arrived, release = tree.hold("list", "d")
    question = in_thread(lambda: exists(cache, "d/ü"))
    assert arrived.wait(10)
    tree.folders.add("d")
    cache.changed("d", Entry("d", True))
    release.set()
    assert question.result(10) is False
    assert cache.listing("d").names == []
    assert cache.lookup("d").is_dir


def test_a_file_written_while_its_folder_was_found_missing_is_there(clock: MovedClock) -> None:
    tree = Tree()
    cache = cache_of(tree, clock)
    arrived, release = tree.hold("list", "d")
    listing = in_thread(lambda: cache.listing("d"))
    assert arrived.wait(10)
    tree.files["d/x"] = 1
    cache.changed("d/x", Entry("x", False, 1))
    release.set()
    assert listing.result(10).names == ["x"]
    assert cache.listing("d").names == ["x"]


def test_a_removed_folder_takes_all_below_with_it_also_what_was_on_its_way(clock: MovedClock) -> None:
    tree = Tree("d/sub/x")
    cache = cache_of(tree, clock)
    cache.listing("d/sub")
    arrived, release = tree.hold("list", "d")
    listing = in_thread(lambda: cache.listing("d"))
    assert arrived.wait(10)
    tree.files.clear()
    cache.changed("d", None)
    release.set()
    listing.result(10)
    tree.files["d/y"] = 1
    cache.changed("d", Entry("d", True))
    assert cache.listing("d").names == ["y"]
    assert not exists(cache, "d/sub/x")


def test_a_doubtful_path_is_asked_for_again_and_so_is_the_folder_it_is_in(clock: MovedClock) -> None:
    tree = Tree("d/sub/x", "d/y")
    cache = cache_of(tree, clock)
    cache.listing("d")
    cache.listing("d/sub")
    tree.files = {"d/y": 1, "d/z": 1}
    cache.doubt("d/sub")
    assert not exists(cache, "d/sub")
    assert cache.listing("d").names == ["y", "z"]


def test_random_changes_and_answers_in_any_order_end_as_the_store_is(clock: MovedClock) -> None:
    """Seeded interleavings: requests that hang while changes, forgets and sweeps go on lose nothing."""
    for seed in range(150):
        chance = random.Random(seed)
        tree = Tree("d/0", "d/1")
        cache = cache_of(tree, clock)
        flying: dict[str, tuple[threading.Event, Future[Any]]] = {}
        for _ in range(15):
            step = chance.randrange(6)
            name = f"d/{chance.randrange(4)}"
            if step <= 1:
                kind, path = chance.choice([("list", "d"), ("stat", name)])
                if kind == "stat" and (path in flying or cache.knows(path)):
                    continue
                arrived, release = tree.hold(kind, path)
                ask = partial(cache.listing, "d", fresh=True) if kind == "list" else partial(exists, cache, path)
                future = in_thread(ask)
                assert arrived.wait(10)
                flying[path if kind == "stat" else f"listing {tree.asked[kind, path]}"] = (release, future)
            elif step == 2 and flying:
                release, future = flying.pop(chance.choice(list(flying)))
                release.set()
                future.exception(10)
            elif step == 3:
                tree.files[name] = chance.randrange(100)
                cache.changed(name, Entry(paths.split(name)[1], False, tree.files[name], 1.0, "v"))
            elif step == 4:
                tree.files.pop(name, None)
                cache.changed(name, None)
            else:
                chance.choice([cache.sweep, partial(cache.forget, "d"), partial(clock.advance, MAX_AGE)])()
        for release, _ in flying.values():
            release.set()
        for _, future in flying.values():
            future.exception(10)
        seen = {name for name in "0123" if exists(cache, f"d/{name}")}
        assert seen == {name[2:] for name in tree.files}, f"seed {seed}"
        if tree.files:
            assert {f"d/{entry.name}": entry.size for entry in cache.listing("d")} == tree.files, f"seed {seed}"


# --- use, polling, memory


def test_polling_rereads_what_is_used_and_does_not_count_as_a_use(clock: MovedClock) -> None:
    tree = Tree("used/a", "idle/a")
    cache = cache_of(tree, clock)
    cache.listing("idle")
    clock.advance(100)
    cache.listing("used")
    for _ in range(3):
        clock.advance(20)
        for path in cache.in_use(60):
            cache.reread(path)
    assert tree.asked["list", "used"] == 4
    assert tree.asked["list", "idle"] == 1
    clock.advance(20)
    assert cache.in_use(60) == []


def test_a_listing_that_did_not_change_is_the_same_object_after_a_reread(clock: MovedClock) -> None:
    tree = Tree("d/a")
    cache = cache_of(tree, clock)
    before = cache.listing("d")
    cache.reread("d")
    assert cache.listing("d") is before
    tree.files["d/b"] = 1
    cache.reread("d")
    assert cache.listing("d").names == ["a", "b"]


def test_a_time_that_cost_a_request_stays_with_its_version(clock: MovedClock) -> None:
    versions = {"same": "1", "changed": "1"}
    cache = DirCache(
        lambda path: [Entry(name, False, 1, None, version) for name, version in versions.items()],
        lambda path: Entry("x", False),
        max_age=MAX_AGE,
        clock=clock,
    )
    for entry in cache.listing("d"):
        entry.mtime = 5.0
    versions["changed"] = "2"
    times = {entry.name: entry.mtime for entry in cache.listing("d", fresh=True)}
    assert times == {"same": 5.0, "changed": None}


def test_the_sweep_lets_go_of_folders_that_nobody_asks_about(clock: MovedClock) -> None:
    tree = Tree("d/a", "e/a")
    cache = cache_of(tree, clock)
    cache.listing("d")
    cache.listing("e")
    exists(cache, "never-listed/x")
    clock.advance(MAX_AGE / 2)
    cache.listing("e")
    clock.advance(MAX_AGE / 2)
    cache.sweep()
    assert cache.counts() == {"folders": 1, "entries": 1}


@pytest.mark.parametrize("max_age", [0.0, MAX_AGE, None])
def test_weeks_of_writing_to_folders_that_nobody_lists_take_no_memory(
    clock: MovedClock, max_age: float | None
) -> None:
    cache = cache_of(Tree(), clock, max_age=max_age)
    name = Entry("x", False)
    for number in range(20_000):
        clock.advance(1)
        cache.changed(f"one/{number}", name)
        cache.changed(f"{number}/x", name)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(20_000):
        clock.advance(1)
        cache.changed(f"one/{number}", name)
        cache.changed(f"{number}/x", name)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 2**20 + SINGLES_KEPT * 300
    assert cache.counts()["folders"] < 5000


def test_an_entry_takes_well_under_a_kibibyte(clock: MovedClock) -> None:
    count = 100_000

    def read(path: str) -> list[Entry]:
        return [
            Entry(f"IMG_2024_{number:08}.jpg", False, number, float(number), f'"{number:032x}"', number)
            for number in range(count)
        ]

    cache = DirCache(read, lambda path: Entry("x", False), max_age=MAX_AGE, clock=clock)
    tracemalloc.start()
    assert cache.listing("d").names[0] == "IMG_2024_00000000.jpg"
    cache.listing("d", fresh=True)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used / count < 700


def test_deleting_many_files_costs_no_look_at_every_folder(clock: MovedClock) -> None:
    """A change is applied in one step, however many folders are known (it would be 10^8 comparisons otherwise)."""
    cache = cache_of(Tree(*(f"d/{number}" for number in range(10_000))), clock)
    cache.listing("d")
    for number in range(10_000):
        cache.changed(f"folder-{number}/x", Entry("x", False))
    for number in range(10_000):
        cache.changed(f"d/{number}", None)
    assert len(cache.listing("d")) == 0


# --- spellings

NFC, NFD = (unicodedata.normalize(form, "Ä ö") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("stored", "asked"), [(NFC, NFD), (NFD, NFC)])
def test_both_unicode_forms_name_one_file_at_every_level(clock: MovedClock, stored: str, asked: str) -> None:
    tree = Tree(f"{stored}/{stored}/{stored}.txt")
    cache = cache_of(tree, clock)
    real = f"{stored}/{stored}/{stored}.txt"
    assert cache.real_name(f"{asked}/{asked}/{asked}.txt") == real
    assert cache.lookup(real).size == 1
    assert tree.requests == 3


def test_without_normalization_they_name_two(clock: MovedClock) -> None:
    cache = cache_of(Tree(NFC), clock, fold_unicode=False)
    assert exists(cache, NFC)
    assert not exists(cache, NFD)
    assert cache.real_name(NFD) == NFD


def test_of_two_spellings_in_the_store_each_is_found_by_its_own(clock: MovedClock) -> None:
    tree = Tree(NFC, NFD)
    tree.files[NFD] = 2
    cache = cache_of(tree, clock)
    assert (cache.lookup(NFC).size, cache.lookup(NFD).size) == (1, 2)


def test_case_insensitive_names_keep_the_stores_spelling_at_every_level(clock: MovedClock) -> None:
    tree = Tree("Docs/Read Me.TXT")
    cache = cache_of(tree, clock, fold_case=True)
    assert cache.real_name("dOCS/read me.txt") == "Docs/Read Me.TXT"
    assert cache.real_name("docs/new.txt") == "Docs/new.txt"
    assert cache.real_name("") == ""
    assert cache.lookup("Docs/read me.txt").name == "Read Me.TXT"


def test_an_exact_spelling_wins_and_the_choice_among_others_is_always_the_same(clock: MovedClock) -> None:
    cache = cache_of(Tree("README", "ReadMe"), clock, fold_case=True)
    assert cache.real_name("ReadMe") == "ReadMe"
    assert cache.real_name("readme") == "README"


def test_a_non_ascii_path_lists_each_folder_above_once(clock: MovedClock) -> None:
    tree = Tree("ä/b/ö/c/ü.txt")
    cache = cache_of(tree, clock)
    for _ in range(50):
        assert cache.real_name("ä/b/ö/c/ü.txt") == "ä/b/ö/c/ü.txt"
        assert cache.real_name("ä/b/ö/missing/ü.txt") == "ä/b/ö/missing/ü.txt"
    listed = {path: count for (kind, path), count in tree.asked.items() if kind == "list"}
    assert listed == {"": 1, "ä/b": 1, "ä/b/ö/c": 1, "ä/b/ö/missing": 1}
    assert tree.requests == 4


def test_an_ascii_path_needs_no_listing(clock: MovedClock) -> None:
    tree = Tree("a/b/c.txt")
    cache = cache_of(tree, clock)
    assert cache.real_name("A/B/c.txt") == "A/B/c.txt"
    assert tree.requests == 0


def test_a_changed_name_is_found_in_its_other_form(clock: MovedClock) -> None:
    cache = cache_of(Tree("d/a"), clock)
    cache.listing("d")
    assert not exists(cache, f"d/{NFD}")
    cache.changed(f"d/{NFC}", Entry(NFC, False))
    assert cache.lookup(f"d/{NFD}").name == NFC


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ETIMEDOUT])
def test_a_failure_is_no_missing_name(clock: MovedClock, code: int) -> None:
    def fail(path: str) -> Any:
        raise failure(code, path)

    cache = DirCache(fail, fail, max_age=MAX_AGE, clock=clock)
    for ask in (cache.listing, cache.lookup):
        with pytest.raises(OSError, match="d") as caught:
            ask("d")
        assert caught.value.errno == code
