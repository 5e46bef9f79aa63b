"""One VFS before and after a fork, and one VFS for many threads at once."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import random
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftpvfs import VFS
from tests.conftest import Store

DEADLINE = 60.0  # seconds for a child; one that hangs says where on stderr


@pytest.fixture
def vfs(store: Store, make_vfs: Callable[..., VFS], tmp_path: Path) -> VFS:
    return make_vfs(store, cache_dir=str(tmp_path / "cache"), poll_interval="1s")  # type: ignore[no-any-return]


def put(vfs: VFS, path: str, data: bytes = b"x") -> None:
    with vfs.open(path, "wb") as handle:
        handle.write(data)


def get(vfs: VFS, path: str) -> bytes:
    with vfs.open(path) as handle:
        return bytes(handle.read())


def in_child(work: Callable[[], Any], *, leave: Callable[[], None] = lambda: None) -> None:
    """Fork, run `work` in the child, and fail when it fails or does not end."""
    pid = os.fork()
    if pid == 0:  # pragma: no cover - another process
        status = 1
        try:
            faulthandler.dump_traceback_later(DEADLINE, exit=True)
            work()
            leave()
            status = 0
        except BaseException:  # noqa: BLE001 - nothing of the test may go on in the child
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child failed; see its stderr"


FORKABLE = pytest.mark.parametrize("store", ["local", "s3", "gs"], indirect=True)


@FORKABLE
def test_a_used_vfs_goes_on_in_the_child_and_in_the_parent(store: Store, vfs: VFS) -> None:
    put(vfs, "parent", b"from the parent")
    vfs.mkdir("made")
    assert vfs.listdir() == ["made", "parent"]

    def child() -> None:
        assert get(vfs, "parent") == b"from the parent"
        assert vfs.listdir() == ["made", "parent"]
        put(vfs, "child", b"from the child")
        vfs.mkdir("made/by the child")
        vfs.utime("child", (0, 1000))
        vfs.close()

    in_child(child)
    put(vfs, "parent again", b"x")
    vfs.forget()
    assert vfs.listdir() == ["child", "made", "parent", "parent again"]
    assert vfs.listdir("made") == ["by the child"]
    assert get(vfs, "child") == b"from the child"
    assert vfs.stat("child").st_mtime == 1000


@FORKABLE
def test_a_vfs_that_was_never_used_before_the_fork_works_in_several_children(store: Store, vfs: VFS) -> None:
    for number in range(3):
        in_child(lambda number=number: put(vfs, str(number)))
    assert vfs.listdir() == ["0", "1", "2"]


@FORKABLE
def test_a_file_open_in_the_parent_is_not_touched_by_the_child(store: Store, vfs: VFS) -> None:
    """A child that ends collects its copies of the parent's handles; the upload is the parent's alone."""
    store.write("big", os.urandom(3 * 2**20))
    written = vfs.open("new", "wb")
    written.write(b"1" * 20 * 2**20)  # more than one part is on its way already
    read = vfs.open("big")
    first = read.read(1000)
    held = {"written": written, "read": read}

    def leave() -> None:
        held.clear()
        gc.collect()

    del written, read
    in_child(lambda: None, leave=leave)
    written, read = held["written"], held["read"]
    written.write(b"2")
    written.close()
    assert store.read("new") == b"1" * 20 * 2**20 + b"2"
    assert first + read.read() == store.read("big")
    read.close()


@FORKABLE
def test_a_fork_while_other_threads_hold_every_lock_hangs_nobody(store: Store, vfs: VFS) -> None:
    for number in range(4):
        put(vfs, f"d/{number}" if vfs.exists("d") else _made(vfs, f"d/{number}"))
    stop = threading.Event()

    def busy(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            vfs.forget(chance.choice(["", "d"]))
            vfs.listdir("d")
            put(vfs, f"d/busy-{seed}")

    threads = [threading.Thread(target=busy, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(6):

            def child(number: int = number) -> None:
                put(vfs, f"d/child-{number}")
                assert f"child-{number}" in vfs.listdir("d")
                vfs.close()

            in_child(child)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    vfs.forget()
    assert {f"child-{number}" for number in range(6)} <= set(vfs.listdir("d"))


def _made(vfs: VFS, path: str) -> str:
    vfs.mkdir("d")
    return path


def _work(vfs: VFS, number: int) -> None:
    put(vfs, f"process-{number}", b"x" * number)
    assert vfs.stat(f"process-{number}").st_size == number


@FORKABLE
def test_multiprocessing_by_fork_works_too(store: Store, vfs: VFS) -> None:
    vfs.listdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_work, args=(vfs, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE)
        assert process.exitcode == 0
        process.close()
    vfs.forget()
    assert [entry.stat().st_size for entry in vfs.scandir()] == [0, 1, 2]


@FORKABLE
def test_closing_in_the_child_leaves_the_parents_alone(store: Store, vfs: VFS) -> None:
    put(vfs, "a", b"1")
    in_child(vfs.close)
    assert get(vfs, "a") == b"1"
    put(vfs, "b")
    assert vfs.listdir() == ["a", "b"]


# --- threads

SECONDS = 2.0
THREADS = 32


def test_thirty_two_threads_end_as_the_store_is(store: Store, vfs: VFS, tmp_path: Path) -> None:
    """Each thread has files of its own, which must always be as it left them, amid shared ones and forgets."""
    for folder in ("own", "shared", "shared/sub"):
        vfs.mkdir(folder)
    end = time.monotonic() + SECONDS
    problems: list[str] = []
    expected: dict[str, bytes] = {}
    lock = threading.Lock()

    def session(number: int) -> None:
        chance = random.Random(number)
        mine: dict[str, bytes] = {}
        try:
            while time.monotonic() < end:
                step(chance, number, mine)
        except Exception:  # noqa: BLE001 - told below, with all others
            problems.append(f"thread {number}: {traceback.format_exc()}")
        with lock:
            expected.update(mine)

    def step(chance: random.Random, number: int, mine: dict[str, bytes]) -> None:
        path = f"own/{number}-{chance.randrange(3)}"
        action = chance.randrange(8)
        if action <= 1:
            data = os.urandom(chance.randrange(2000))
            put(vfs, path, data)
            mine[path] = data
        elif action == 2 and path in mine:
            assert get(vfs, path) == mine[path]
            assert vfs.stat(path).st_size == len(mine[path])
        elif action == 3 and path in mine:
            vfs.remove(path)
            del mine[path]
        elif action == 4 and path in mine:
            new = f"own/{number}-renamed"
            vfs.rename(path, new)
            mine[new] = mine.pop(path)
        elif action == 5:
            names = vfs.listdir("own")
            assert {name for name in names if name.startswith(f"{number}-")} == {name[4:] for name in mine}
        elif action == 6:
            chance.choice([vfs.forget, lambda: vfs.refresh("own"), lambda: vfs.utime("shared", None)])()
        else:
            disturb(chance)

    def disturb(chance: random.Random) -> None:
        """What others do to the same names: any outcome but another kind of error will do."""
        path = f"shared/{chance.choice(['a', 'b', 'sub/a'])}"
        try:
            chance.choice([
                lambda: put(vfs, path),
                lambda: vfs.remove(path),
                lambda: get(vfs, path),
                lambda: vfs.rename(path, "shared/c"),
                lambda: vfs.listdir("shared/sub"),
            ])()
        except (FileNotFoundError, IsADirectoryError):
            pass
        except OSError as error:
            if error.errno != 116:  # ESTALE: replaced while it was read
                raise

    threads = [threading.Thread(target=session, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    for _ in range(2):
        assert {f"own/{name}" for name in vfs.listdir("own")} == set(expected)
        assert {path: get(vfs, path) for path in expected} == expected
        shared = {key for key in store.list() if key.startswith("shared/")}
        assert {f"shared/{entry.name}" for entry in vfs.scandir("shared") if entry.is_file()} == {
            key for key in shared if key.count("/") == 1
        }
        vfs.forget()
    assert {key: store.read(key) for key in store.list() if key.startswith("own/")} == expected
    assert vfs.core.memory.used == 0
