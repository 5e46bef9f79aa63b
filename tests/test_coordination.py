"""What processes tell each other and hold against each other: with real processes, killed at any moment."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.coordination.bell import Bell
from ftpvfs.coordination.feed import ChangeFeed
from ftpvfs.coordination.folders import (
    NETWORK,
    filesystem_type,
    is_network_filesystem,
    may_hang,
    network_filesystem,
    private_folder,
    type_in_mounts,
)
from ftpvfs.coordination.locks import HAS_RANGES, Leader, PathLocks, ThreadLocks
from ftpvfs.coordination.sessions import Admission, SessionTable, network_of
from tests.conftest import wait_until
from tests.processes import DEADLINE, Child


@pytest.fixture
def feed(tmp_path: Path) -> Iterator[Callable[..., ChangeFeed]]:
    """feed(...) -> ChangeFeed on the test's folder, closed when the test ends."""
    with contextlib.ExitStack() as cleanup:

        def make(**options: Any) -> ChangeFeed:
            made = ChangeFeed(tmp_path, **options)
            cleanup.callback(made.close)
            return made

        yield make


# --- the feed


def test_a_change_reaches_all_others_once_and_never_its_writer(feed):
    first, second, third = feed(), feed(), feed()
    first.publish({"path": "a/b", "entry": {"size": 1}})
    second.publish({"forget": "\udcff non-UTF-8 \n"})
    assert first.news() == [{"forget": "\udcff non-UTF-8 \n"}]
    assert second.news() == [{"path": "a/b", "entry": {"size": 1}}]
    assert third.news() == [{"path": "a/b", "entry": {"size": 1}}, {"forget": "\udcff non-UTF-8 \n"}]
    assert first.news() == second.news() == third.news() == []


def test_who_opens_the_feed_hears_what_comes_after(feed):
    first = feed()
    first.publish({"path": "old"})
    second = feed()
    assert second.news() == []
    first.publish({"path": "new"})
    assert second.news() == [{"path": "new"}]


def test_a_follower_has_a_place_of_its_own(feed):
    first, second = feed(), feed()
    follower = second.follow()
    first.publish({"item": "a"})
    second.publish({"item": "b"})
    assert second.news() == [{"item": "a"}]
    assert follower.news() == [{"item": "a"}]
    assert follower.news() == []


def test_another_process_sees_a_change_as_soon_as_publish_has_returned(feed, child, tmp_path):
    def other(pipe: Connection) -> None:
        mine = ChangeFeed(tmp_path)
        pipe.send("ready")
        while (word := pipe.recv()) is not None:
            heard = mine.news()
            mine.publish({"heard": word})
            pipe.send(heard)

    ours = feed()
    theirs = child(other)
    theirs.hear()
    for number in range(200):
        ours.publish({"path": str(number)})
        theirs.say(number)
        assert theirs.hear() == [{"path": str(number)}]
        assert ours.news() == [{"heard": number}]


def test_a_ring_that_was_overrun_says_that_too_much_was_missed_and_goes_on(feed):
    writer, reader = feed(ring=8192), feed(ring=8192)
    for number in range(1000):
        writer.publish({"path": f"{number}"})
    assert reader.news() is None
    assert reader.news() == []
    writer.publish({"path": "after"})
    assert reader.news() == [{"path": "after"}]


def test_records_of_every_length_come_whole_over_the_end_of_the_ring(feed):
    writer, reader = feed(ring=8192), feed(ring=8192)
    chance = random.Random(1)
    for _ in range(2000):
        changes = [{"path": "x" * chance.randrange(1500)} for _ in range(chance.randrange(5))]
        for change in changes:
            writer.publish(change)
        assert reader.news() == changes


def test_a_ring_filled_to_the_last_byte_is_still_known_whole(feed):
    writer, reader = feed(ring=4096), feed(ring=4096)
    record = 16 + len('{"p": ""}')
    change = {"p": "x" * (1024 - record)}
    for _ in range(3):
        for _ in range(4):
            writer.publish(change)
        assert reader.news() == [change] * 4


def test_a_change_that_is_too_large_tells_others_to_drop_everything(feed):
    writer, reader = feed(), feed()
    writer.publish({"path": "x" * 100_000})
    assert reader.news() is None
    assert reader.news() == []


def _publish_many(pipe: Connection, folder: Path, name: int, count: int | None) -> None:
    mine = ChangeFeed(folder, ring=65536)
    pipe.send("ready")
    number = 0
    while count is None or number < count:
        mine.publish({"from": name, "number": number, "fill": "f" * (number * 7 % 300)})
        number += 1
    pipe.send("done")


def test_changes_of_several_processes_come_whole_and_each_ones_in_order(feed, child, tmp_path):
    reader = feed(ring=65536)
    writers = [child(_publish_many, tmp_path, name, 3000) for name in range(3)]
    seen: Counter[int] = Counter()
    missed = 0

    def look() -> bool:
        nonlocal missed
        is_over = all(not writer.process.is_alive() for writer in writers)
        news = reader.news()
        if news is None:
            missed += 1
            seen.clear()
        for change in news or ():
            name, number = change["from"], change["number"]
            assert change["fill"] == "f" * (number * 7 % 300)
            assert number == seen[name] or (missed and name not in seen)
            seen[name] = number + 1
        return is_over and news == []

    wait_until(look, timeout=DEADLINE)
    assert all(seen[name] in (0, 3000) for name in range(3))
    assert missed or all(seen[name] == 3000 for name in range(3))


def test_writers_killed_at_any_moment_leave_whole_records_and_hold_nobody_up(feed, child, tmp_path):
    reader = feed(ring=65536)
    chance = random.Random(2)
    survivor = child(_publish_many, tmp_path, 99, None)
    survivor.hear()
    for name in range(15):
        victim = child(_publish_many, tmp_path, name, None)
        victim.hear()
        for _ in range(chance.randrange(200)):
            for change in reader.news() or ():
                assert change["fill"] == "f" * (change["number"] * 7 % 300)
        victim.kill()
    survivor.kill()
    ours = feed(ring=65536)
    reader.news()
    ours.publish({"path": "after"})
    assert reader.news() == [{"path": "after"}]


def test_an_emptied_folder_is_noticed_by_writers_and_readers(feed, tmp_path, monkeypatch):
    monkeypatch.setattr("ftpvfs.coordination.feed.LOOK_AGAIN", 0)
    first, second = feed(), feed()
    (tmp_path / "changes").unlink()
    first.publish({"path": "a"})
    assert second.news() is None
    first.publish({"path": "b"})
    assert second.news() == [{"path": "b"}]


@pytest.mark.parametrize("damage", [b"", b"nonsense", bytes(10_000)])
def test_a_damaged_file_is_begun_anew(tmp_path, feed, damage):
    (tmp_path / "changes").write_bytes(damage)
    first, second = feed(), feed()
    first.publish({"path": "a"})
    assert second.news() == [{"path": "a"}]


def test_flipped_bytes_are_noticed(tmp_path, feed):
    first, second = feed(), feed()
    first.publish({"path": "aaaaaaaa"})
    with open(tmp_path / "changes", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        at = mapped.find(b"aaaaaaaa")
        mapped[at] = 0
    assert second.news() is None
    first.publish({"path": "b"})
    assert second.news() == [{"path": "b"}]


def test_a_closed_feed_has_no_news(feed):
    first, second = feed(), feed()
    first.publish({"path": "a"})
    second.close()
    assert second.news() == []
    second.close()


# --- locks of paths


def _hold(pipe: Connection, folder: Path, *paths: str) -> None:
    with PathLocks(folder).hold(*paths):
        pipe.send("held")
        pipe.recv()
    pipe.send("released")


def lock_files(folder: Path) -> list[str]:
    return os.listdir(folder / "locks") if (folder / "locks").exists() else []


@pytest.fixture(params=["ranges", "files"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Locks of paths as Linux has them, and as other systems do."""
    monkeypatch.setattr("ftpvfs.coordination.locks.HAS_RANGES", request.param == "ranges")
    if request.param == "ranges" and not HAS_RANGES:
        pytest.skip("another system")
    return request.param


FILES = pytest.mark.parametrize("kind", ["files"], indirect=True)
BOTH = pytest.mark.usefixtures("kind")


@BOTH
def test_a_path_held_by_one_process_keeps_another_waiting_and_no_other_path(child, tmp_path):
    first = child(_hold, tmp_path, "a")
    assert first.hear() == "held"
    second, third = child(_hold, tmp_path, "a"), child(_hold, tmp_path, "b")
    assert third.hear() == "held"
    assert second.is_silent()
    first.say()
    assert second.hear() == "held"
    for each in (second, third):
        each.say()
        assert each.hear() == "released"
    assert lock_files(tmp_path) == []


@BOTH
def test_who_may_not_wait_for_a_path_is_told_that_somebody_holds_it(child, tmp_path):
    locks = PathLocks(tmp_path)
    other = child(_hold, tmp_path, "a")
    assert other.hear() == "held"
    with pytest.raises(BlockingIOError), locks.hold("b", "a", blocking=False):
        pass
    other.say()
    assert other.hear() == "released"
    with locks.hold("a", "b", blocking=False), pytest.raises(BlockingIOError):  # noqa: SIM117
        with locks.hold("b", blocking=False):
            pass
    with locks.hold("b", blocking=False):
        pass
    assert lock_files(tmp_path) == []


@BOTH
def test_a_killed_holder_holds_nothing(child, tmp_path):
    first = child(_hold, tmp_path, "a", "b", "c")
    assert first.hear() == "held"
    second = child(_hold, tmp_path, "b")
    assert second.is_silent()
    first.kill()
    assert second.hear() == "held"
    second.say()
    assert second.hear() == "released"


@BOTH
def test_the_child_of_a_killed_holder_holds_nothing_either(child, tmp_path):
    def parent(pipe: Connection) -> None:
        with PathLocks(tmp_path).hold("a"):
            if os.fork() == 0:
                pipe.send(os.getpid())
                signal.pause()
            signal.pause()

    holder = child(parent)
    orphan = holder.hear()
    try:
        holder.kill()
        with PathLocks(tmp_path).hold("a"):
            os.kill(orphan, 0)  # it lives on
    finally:
        os.kill(orphan, signal.SIGKILL)


@FILES
def test_files_that_killed_holders_left_are_removed_and_those_in_use_stay(kind, child, tmp_path):
    first, second = child(_hold, tmp_path, "left"), child(_hold, tmp_path, "used")
    first.hear(), second.hear()
    first.kill()
    assert len(lock_files(tmp_path)) == 2
    PathLocks(tmp_path)
    assert len(lock_files(tmp_path)) == 1
    third = child(_hold, tmp_path, "used")
    assert third.is_silent()
    second.say()
    assert third.hear() == "held"


@FILES
def test_an_emptied_folder_is_made_again(kind, tmp_path):
    locks = PathLocks(tmp_path)
    (tmp_path / "locks").rmdir()
    with locks.hold("a"):
        assert len(lock_files(tmp_path)) == 1


def _count_up(pipe: Connection, folder: Path, seed: int, rounds: int) -> None:
    """Add one to the numbers in files, unprotected but for the locks; several threads."""
    locks = PathLocks(folder)

    def work(number: int) -> None:
        chance = random.Random(seed * 100 + number)
        for _ in range(rounds):
            names = chance.sample(["x", "y", "z"], chance.randrange(1, 4))
            with locks.hold(*names):
                for name in names:
                    file = folder / name
                    file.write_text(str(int(file.read_text()) + 1))
                    with open(folder / f"{name}.log", "a") as log:
                        log.write("1")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send("done")


@BOTH
def test_locks_hold_again_once_somebody_has_emptied_the_folder(child, tmp_path):
    locks = PathLocks(tmp_path)
    for name in os.listdir(tmp_path):
        shutil.rmtree(tmp_path / name) if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
    with locks.hold("a"):
        other = child(_hold, tmp_path, "a")
        assert other.is_silent()
    assert other.hear() == "held"


@BOTH
def test_two_objects_of_one_process_exclude_each_other(tmp_path):
    first, second = PathLocks(tmp_path), PathLocks(tmp_path)
    held: list[str] = []

    def work() -> None:
        with second.hold("a"):
            held.append("second")

    with first.hold("a"):
        thread = threading.Thread(target=work)
        thread.start()
        with second.hold("b"), first.hold("c"):
            assert held == []
        PathLocks(tmp_path)  # opening and closing another one lets go of nothing
        assert held == []
    thread.join()
    assert held == ["second"]


@BOTH
def test_no_two_hold_a_path_at_once_and_holding_several_ends_in_no_deadlock(child, tmp_path):
    for name in "xyz":
        (tmp_path / name).write_text("0")
    children = [child(_count_up, tmp_path, seed, 60) for seed in range(3)]
    for each in children:
        assert each.hear() == "done"
    for name in "xyz":
        assert int((tmp_path / name).read_text()) == len((tmp_path / f"{name}.log").read_text())
    assert lock_files(tmp_path) == []


@BOTH
def test_many_paths_leave_no_files(tmp_path):
    locks = PathLocks(tmp_path)
    for number in range(500):
        with locks.hold(f"path {number}", "\udcff"):
            pass
    assert lock_files(tmp_path) == []


def _hold_in_folders(pipe: Connection, folder: Path, path: str) -> None:
    with PathLocks(folder).hold_in_folders(path):
        pipe.send("held")
        pipe.recv()
    pipe.send("released")


def _hold_folders(pipe: Connection, folder: Path, *folders: str) -> None:
    with PathLocks(folder).hold_folders(*folders):
        pipe.send("held")
        pipe.recv()
    pipe.send("released")


@BOTH
def test_a_folder_is_held_alone_against_all_that_is_below_it_and_against_no_other(child, tmp_path):
    first = child(_hold_folders, tmp_path, "a/b", "x")
    assert first.hear() == "held"
    below = child(_hold_in_folders, tmp_path, "a/b/c/d")
    above, inside = child(_hold_folders, tmp_path, "a", "new"), child(_hold_folders, tmp_path, "x/y", "x/z")
    # Beside the folder, and those whose names begin like it.
    for free in (child(_hold_in_folders, tmp_path, "ab"), child(_hold, tmp_path, "a/b/c/d")):
        assert free.hear() == "held"
        free.say()
    assert below.is_silent()
    assert above.is_silent()
    assert inside.is_silent()
    first.say()
    assert first.hear() == "released"
    for each in (below, inside, above):
        assert each.hear() == "held"
        each.say()
        assert each.hear() == "released"


@pytest.mark.skipif(not HAS_RANGES, reason="elsewhere one process at a time works in a folder")
def test_many_work_in_a_folder_at_once_and_who_wants_it_alone_is_not_kept_waiting_by_later_ones(child, tmp_path):
    first, second = child(_hold_in_folders, tmp_path, "d/1"), child(_hold_in_folders, tmp_path, "d/2")
    assert (first.hear(), second.hear()) == ("held", "held")
    alone = child(_hold_folders, tmp_path, "d")
    assert alone.is_silent()
    late = child(_hold_in_folders, tmp_path, "d/3")
    assert late.is_silent()
    first.say()
    assert alone.is_silent()
    second.say()
    assert alone.hear() == "held"
    assert late.is_silent()
    alone.say()
    assert late.hear() == "held"


@BOTH
@pytest.mark.parametrize("victim", [_hold_folders, _hold_in_folders])
def test_a_killed_holder_of_a_folder_holds_nothing(victim, child, tmp_path):
    first = child(victim, tmp_path, "d/e")
    assert first.hear() == "held"
    waiting, behind = child(_hold_folders, tmp_path, "d"), None
    assert waiting.is_silent()
    behind = child(_hold_in_folders, tmp_path, "d/x")
    waiting.kill()
    first.kill()
    assert behind.hear() == "held"


def _move_about(pipe: Connection, folder: Path, seed: int, rounds: int) -> None:
    """Hold folders and paths in them at random, and see in a file that nobody else does; several threads."""
    locks = PathLocks(folder)

    def work(number: int) -> None:
        chance = random.Random(seed * 100 + number)
        for _ in range(rounds):
            if chance.random() < 0.3:
                source, target = chance.sample(["a", "a/b", "c", "c/d"], 2)
                with locks.hold_folders(source, target), locks.hold(f"{source}/x"):
                    _alone(folder, [source, target])
            else:
                name = chance.choice(["a/x", "a/b/x", "c/d/y", "c/z"])
                with locks.hold_in_folders(name):
                    _together(folder, name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send("done")


def _alone(folder: Path, held: list[str]) -> None:
    for name in held:
        busy = folder / f"{name.replace('/', '-')}.busy"
        os.close(os.open(busy, os.O_CREAT | os.O_EXCL))
        assert not [each for each in os.listdir(folder) if each.startswith(f"in-{name.replace('/', '-')}-")]
    for name in held:
        (folder / f"{name.replace('/', '-')}.busy").unlink()


def _together(folder: Path, path: str) -> None:
    mine = folder / f"in-{path.replace('/', '-')}-"
    mine.touch()
    above = path.rpartition("/")[0]
    while above:
        assert not (folder / f"{above.replace('/', '-')}.busy").exists()
        above = above.rpartition("/")[0]
    mine.unlink()


@BOTH
def test_nobody_works_in_a_folder_that_is_held_alone_and_nothing_ends_in_a_deadlock(child, tmp_path):
    children = [child(_move_about, tmp_path, seed, 60) for seed in range(3)]
    for each in children:
        assert each.hear() == "done"
    assert lock_files(tmp_path) == []
    assert not [name for name in os.listdir(tmp_path) if name.endswith("busy") or name.startswith("in-")]


@pytest.mark.parametrize("make", [lambda folder: ThreadLocks(), PathLocks], ids=["threads", "processes"])
def test_threads_take_turns_too(make, tmp_path):
    locks = make(tmp_path)
    inside: list[int] = []

    def work() -> None:
        for _ in range(100):
            with locks.hold("b", "a", "b"):
                inside.append(1)
                assert len(inside) == 1
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []


# --- the bell


def test_a_bell_wakes_the_one_who_waits_in_another_process(child, tmp_path):
    def wait(pipe: Connection) -> None:
        bell = Bell(tmp_path, "work")
        pipe.send("ready")
        pipe.send(bell.wait(DEADLINE))

    waiter = child(wait)
    waiter.hear()
    with contextlib.closing(Bell(tmp_path, "work")) as bell:
        bell.ring()
        assert waiter.hear() is True


def test_a_bell_that_nobody_hears_never_blocks_and_is_heard_once(tmp_path):
    with contextlib.closing(Bell(tmp_path, "work")) as bell, contextlib.closing(Bell(tmp_path, "work")) as other:
        for _ in range(100_000):
            other.ring()
        assert select.select([bell], [], [], 0)[0]
        while bell.wait(0):
            pass
        assert bell.wait(0) is False
        other.ring()
        assert bell.wait(0) is True
        assert bell.hear() is False


# --- the leader


def _lead(pipe: Connection, folder: Path) -> None:
    leader = Leader(folder, "upload")
    while (word := pipe.recv()) is not None:
        if word == "try":
            pipe.send(leader.try_acquire())
        else:
            leader.release()
            pipe.send(leader.is_held)


def test_there_is_one_leader_until_it_gives_up_or_dies(child, tmp_path):
    first, second = child(_lead, tmp_path), child(_lead, tmp_path)

    def ask(who: Child, word: str) -> bool:
        who.say(word)
        return who.hear()  # type: ignore[no-any-return]

    assert ask(first, "try") is True
    assert ask(first, "try") is True
    assert ask(second, "try") is False
    ask(first, "release")
    assert ask(second, "try") is True
    assert ask(first, "try") is False
    second.kill()
    assert ask(first, "try") is True


def test_two_leaders_in_one_process_are_told_apart_and_roles_too(tmp_path):
    first, second, other = (Leader(tmp_path, role) for role in ("a", "a", "b"))
    assert first.try_acquire()
    assert not second.try_acquire()
    assert other.try_acquire()
    for each in (first, other):
        each.release()
    assert second.try_acquire()
    second.release()
    second.release()


def test_a_child_does_not_lead_in_its_parents_place(child, tmp_path):
    leader = Leader(tmp_path, "a")
    assert leader.try_acquire()

    def look(pipe: Connection) -> None:
        pipe.send((leader.is_held, leader.try_acquire()))
        leader.release()

    assert child(look).hear() == (False, False)
    assert leader.is_held
    leader.release()


# --- who is connected


@pytest.fixture
def table() -> Iterator[SessionTable]:
    with contextlib.closing(SessionTable(3)) as made:
        yield made


def test_connections_are_counted_in_all_and_for_each_address(table):
    assert table.admit("192.0.2.1", 3, 2) is Admission.ADMITTED
    assert table.admit("192.0.2.1", 3, 2) is Admission.ADMITTED
    assert table.admit("192.0.2.1", 3, 2) is Admission.TOO_MANY_FROM_ADDRESS
    assert table.admit("::1", 3, 2) is Admission.ADMITTED
    assert table.admit("192.0.2.3", 3, 2) is Admission.FULL
    table.leave("192.0.2.1")
    assert table.admit("192.0.2.3", 3, 2) is Admission.ADMITTED
    assert (table.total(), table.connected("192.0.2.1"), table.connected("::1")) == (3, 1, 1)


def test_no_limit_is_none(table):
    for number in range(300):
        assert table.admit(f"10.0.{number % 7}.{number % 11}") is Admission.ADMITTED
    assert table.total() == 300
    for number in range(300):
        table.leave(f"10.0.{number % 7}.{number % 11}")
    assert table.total() == 0
    assert table.connected("10.0.0.0") == 0


def test_who_was_never_admitted_cannot_leave(table):
    table.admit("10.0.0.1")
    table.leave("10.0.0.2")
    assert table.total() == 1


def test_a_table_that_is_full_of_addresses_refuses():
    with contextlib.closing(SessionTable(1, addresses=2)) as table:
        assert [table.admit(f"10.0.0.{number}") for number in range(3)] == [
            Admission.ADMITTED,
            Admission.ADMITTED,
            Admission.FULL,
        ]


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::1", True),
        ("fe80::1", "fe80::2", False),
        ("::1", "0.0.0.1", False),
    ],
)
def test_an_ipv6_customer_counts_as_one(one, other, are_same):
    assert (network_of(one) == network_of(other)) is are_same


def _connect_many(pipe: Connection, table: SessionTable, slot: int, rounds: int) -> None:
    """Come and go; say the most that were ever seen, and how many are left."""
    table.work_as(slot)
    chance = random.Random(slot)
    mine: list[str] = []
    most = 0
    for _ in range(rounds):
        ip = f"10.0.0.{chance.randrange(4)}"
        if table.admit(ip, 10, 4) is Admission.ADMITTED:
            mine.append(ip)
        most = max(most, table.total(), 6 + table.connected(ip))
        if mine and chance.random() < 0.6:
            table.leave(mine.pop(chance.randrange(len(mine))))
    pipe.send((most, len(mine)))
    pipe.recv()


def test_limits_hold_over_processes_to_the_last_connection(child, table):
    children = [child(_connect_many, table, slot, 2000) for slot in range(3)]
    told = [each.hear() for each in children]
    assert max(most for most, _ in told) == 10  # in all and, with the 6 added, for an address
    assert table.total() == sum(left for _, left in told)


def test_what_a_killed_process_had_counted_is_given_up(child, table):
    def work(pipe: Connection, slot: int) -> None:
        table.work_as(slot)
        for number in range(5):
            table.admit(f"10.0.0.{number}")
        pipe.send("ready")
        pipe.recv()

    first, second = child(work, 1), child(work, 2)
    first.hear(), second.hear()
    assert (table.total(), table.connected("10.0.0.1")) == (10, 2)
    first.kill()
    table.give_up(1)
    assert (table.total(), table.connected("10.0.0.1")) == (5, 1)
    second.kill()
    table.give_up(2)
    assert (table.total(), table.connected("10.0.0.1")) == (0, 0)


def test_processes_killed_at_any_moment_block_nobody_and_leave_no_counts(child, table):
    chance = random.Random(3)
    for _ in range(15):
        victim = child(_connect_many, table, 1, 10**9)
        for _ in range(chance.randrange(300)):
            table.admit("10.0.0.1", 10, 4) is Admission.ADMITTED and table.leave("10.0.0.1")
        victim.kill()
        table.give_up(1)
        assert table.total() == 0
        assert [table.connected(f"10.0.0.{number}") for number in range(4)] == [0] * 4


def test_a_process_knows_how_far_it_is_ahead_of_those_that_accept(child, table):
    def work(pipe: Connection, slot: int, count: int) -> None:
        table.work_as(slot)
        for _ in range(count):
            table.admit("10.0.0.1")
        while pipe.recv() == "accept":
            table.set_accepting(True)
            pipe.send("accepting")

    others = [child(work, 1, 1), child(work, 2, 3)]
    for _ in range(4):
        table.admit("10.0.0.2")
    wait_until(lambda: table.total() == 8)
    assert table.lead() == 0  # nobody else accepts
    for other, lead in zip(reversed(others), [1, 3], strict=True):
        other.say("accept")
        other.hear()
        assert table.lead() == lead
    table.give_up(1)
    assert table.lead() == 1


# --- folders


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /proc rw - proc proc rw
30 22 0:30 / /mnt/nfs rw shared:2 - nfs4 host:/x rw
31 30 8:2 / /mnt/nfs/local rw - xfs /dev/sdb rw
32 22 0:31 / /mnt/with\\040space rw - fuse.sshfs me@host:/ rw
33 22 0:32 / /mnt/usb rw - fuseblk /dev/sdc rw
34 22 0:33 / /mnt/enc rw - fuse.gocryptfs /x rw
35 22 0:34 / /mnt/over rw - tmpfs tmpfs rw
36 35 0:35 / /mnt/over rw - cifs //host/x rw
37 22 0:36 / /mnt/s3 rw - fuse.s3fs s3fs rw
38 22 0:37 / /mnt/rclone rw - fuse.rclone remote: rw
"""


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("/", "ext4"),
        ("/mnt/nfsx", "ext4"),
        ("/mnt/nfs", "nfs4"),
        ("/mnt/nfs/a", "nfs4"),
        ("/mnt/nfs/local/a", "xfs"),
        ("/mnt/with space/a", "fuse.sshfs"),
        ("/mnt/usb", "fuseblk"),
        ("/mnt/over/a", "cifs"),
    ],
)
def test_the_file_system_is_the_one_mounted_nearest_above(place, kind):
    assert type_in_mounts(MOUNTS, place, 0) == kind


@pytest.mark.parametrize(
    ("kind", "is_network"),
    [
        *((kind, True) for kind in ("nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "lustre", "glusterfs")),
        *((f"fuse.{program}", True) for program in ("sshfs", "s3fs", "rclone", "glusterfs")),
        *((kind, False) for kind in ("ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "apfs", "fuseblk", "fuse")),
        ("fuse.gocryptfs", False),
        ("fuse.mergerfs", False),
    ],
)
def test_network_file_systems_are_known_by_name(kind, is_network, monkeypatch, tmp_path):
    monkeypatch.setattr("ftpvfs.coordination.folders.filesystem_type", lambda path: kind)
    assert is_network_filesystem(tmp_path) is is_network
    assert may_hang(tmp_path) is (is_network or kind.startswith("fuse."))
    if is_network:
        with pytest.raises(OSError, match=rf"on a network file system \({kind}\)"):
            private_folder(tmp_path / "cache")
    else:
        private_folder(tmp_path / "cache")


def test_this_machines_own_folders_are_not_on_the_network(tmp_path):
    assert not is_network_filesystem(tmp_path)
    assert not is_network_filesystem(tmp_path / "not" / "there" / "yet")
    if sys.platform == "linux":
        assert filesystem_type("/proc/self") == "proc"
        assert network_filesystem("/proc") is None
        named = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True).stdout.strip()
        assert (filesystem_type(tmp_path) in NETWORK) == (named in NETWORK)


def test_a_private_folder_is_this_users_alone(tmp_path):
    folder = tmp_path / "a" / "b"
    private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        private_folder(tmp_path / "file" / "below")


def test_sessions_of_users_are_counted_beside_those_of_addresses():
    table = SessionTable(slots=2, addresses=4)
    assert table.admit("192.0.2.1") is Admission.ADMITTED
    assert [table.admit_user("alice", 2) for _ in range(3)] == [True, True, False]
    assert table.admit_user("bob", 1)
    assert (table.total(), table.connected("192.0.2.1")) == (1, 1)
    table.leave_user("alice")
    table.leave_user("nobody")
    assert table.admit_user("alice", 2)
    table.give_up(0)  # what a dead process had counted
    assert table.admit_user("bob", 1)
    table.close()
