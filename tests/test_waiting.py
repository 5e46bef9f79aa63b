"""What may not wait does not; who leaves cancels what nobody else waits for."""

from __future__ import annotations

import ast
import contextlib
import errno
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import ftpvfs
from ftpvfs import VFSHandler, VFSServer
from ftpvfs.backend.backend import Entry
from ftpvfs.cache.files import Files, Place
from ftpvfs.cache.index import Index
from ftpvfs.coordination.lockfile import LockFile
from ftpvfs.server.loop import Loop
from ftpvfs.vfs.dircache import DirCache
from ftpvfs.waiting import (
    Job,
    Wait,
    WouldWait,
    about_to_wait,
    current_job,
    limited_to,
    result_of,
    shared_result_of,
    working_for,
)
from tests.conftest import StoreFactory
from tests.servers import HOST, wait_until

ROOT = Path(ftpvfs.__file__).parent


def test_a_thread_may_wait_for_all_unless_it_says_otherwise() -> None:
    about_to_wait(Wait.STORE)
    with limited_to(Wait.DISK):
        about_to_wait(Wait.DISK)
        with pytest.raises(WouldWait) as caught:
            about_to_wait(Wait.STORE)
        assert caught.value.need is Wait.STORE
        elsewhere = run(lambda: about_to_wait(Wait.STORE))
        elsewhere.join()
    about_to_wait(Wait.STORE)


def run(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def waiting_for(future: Future[Any], wait: Any, job: Job, outcome: list[Any]) -> threading.Thread:
    def work() -> None:
        with working_for(job):
            try:
                outcome.append(wait(future, "a"))
            except OSError as error:
                outcome.append(error.errno)
        assert current_job() is None

    return run(work)


def test_cancelling_a_job_cancels_what_its_thread_waits_for() -> None:
    future: Future[int] = Future()
    job, outcome = Job(), []  # type: ignore[var-annotated]
    thread = waiting_for(future, result_of, job, outcome)
    job.cancel()
    thread.join()
    assert future.cancelled()
    assert outcome == [errno.ECANCELED]
    with working_for(job), pytest.raises(OSError, match="canceled"):  # and what it would wait for from then on
        result_of(Future())


def test_cancelling_a_job_leaves_what_others_wait_for() -> None:
    future: Future[int] = Future()
    jobs = [Job(), Job()]
    outcomes: list[list[Any]] = [[], []]
    threads = [waiting_for(future, shared_result_of, *each) for each in zip(jobs, outcomes, strict=True)]
    jobs[0].cancel()
    threads[0].join()
    future.set_result(5)
    threads[1].join()
    assert outcomes == [[errno.ECANCELED], [5]]


class Folder:
    """A store with one folder, whose listing comes when the test says so."""

    def __init__(self) -> None:
        self.requests: list[Future[list[Entry]]] = []

    def read(self, path: str) -> list[Entry]:
        self.requests.append(Future())
        return result_of(self.requests[-1], path)

    def stat(self, path: str) -> Entry:
        return Entry(path, is_dir=False)


def asking(dirs: DirCache, job: Job, outcome: list[Any]) -> threading.Thread:
    return waiting_for(Future(), lambda _, path: dirs.listing(path).names, job, outcome)


def test_a_request_is_cancelled_when_the_last_who_waits_for_it_leaves() -> None:
    folder = Folder()
    dirs = DirCache(folder.read, folder.stat, max_age=None)
    jobs = [Job(), Job(), Job()]
    outcomes: list[list[Any]] = [[], [], []]
    leader = asking(dirs, jobs[0], outcomes[0])
    wait_until(lambda: folder.requests)
    followers = [asking(dirs, *each) for each in zip(jobs[1:], outcomes[1:], strict=True)]
    wait_until(lambda: dirs.waiting("list", "a") == 3)
    jobs[0].cancel()
    jobs[1].cancel()
    followers[0].join()
    assert not folder.requests[0].cancelled()
    jobs[2].cancel()
    for thread in (leader, *followers):
        thread.join()
    assert folder.requests[0].cancelled()
    assert outcomes == [[errno.ECANCELED]] * 3


def test_a_request_goes_on_for_others_when_the_one_who_made_it_leaves() -> None:
    folder = Folder()
    dirs = DirCache(folder.read, folder.stat, max_age=None)
    jobs = [Job(), Job()]
    outcomes: list[list[Any]] = [[], []]
    threads = [asking(dirs, jobs[0], outcomes[0])]
    wait_until(lambda: folder.requests)
    threads.append(asking(dirs, jobs[1], outcomes[1]))
    wait_until(lambda: dirs.waiting("list", "a") == 2)
    jobs[0].cancel()
    folder.requests[0].set_result([Entry("x", is_dir=False)])
    for thread in threads:
        thread.join()
    assert outcomes[1] == [["x"]]
    assert len(folder.requests) == 1


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_what_is_cached_is_answered_without_waiting_and_the_rest_is_not_begun(
    make_store: StoreFactory, make_vfs: Any, kind: str
) -> None:
    store = make_store(kind)
    store.write("folder/a", b"12345")
    vfs = make_vfs(store)
    vfs.start()
    with limited_to(Wait.DISK):
        for ask in (lambda: vfs.lookup("folder/a"), lambda: vfs.open("folder/a"), lambda: vfs.listdir("folder")):
            with pytest.raises(WouldWait) as caught:
                ask()
            assert caught.value.need is Wait.STORE
        with pytest.raises(WouldWait):
            vfs.mkdir("other")
    assert vfs.listdir("folder") == ["a"]
    with limited_to(Wait.NOTHING):
        assert vfs.listdir("folder") == ["a"]
        assert vfs.lookup("folder/a").size == 5
        vfs.open("folder/a").close()
        assert not vfs.exists("folder/b")


def test_a_local_file_is_looked_up_and_opened_without_waiting(make_store: StoreFactory, make_vfs: Any) -> None:
    store = make_store("local")
    store.write("a", b"12345")
    vfs = make_vfs(store)
    vfs.start()
    with limited_to(Wait.NOTHING):
        with vfs.open("a") as handle:
            assert handle.read() == b"12345"
        with pytest.raises(WouldWait) as caught:
            vfs.listdir()
        assert caught.value.need is Wait.DISK


# --- what waits says so before

# Who calls what may keep a thread waiting for a disk or another process; each says `about_to_wait` before.
WAITERS = {
    ("coordination/lockfile.py", "lock"),
    ("coordination/locks.py", "_RangeLocks.hold"),  # behind ThreadLocks and _FolderLocks
    ("coordination/sessions.py", "SessionTable._locked"),  # held for microseconds, never while anybody waits
    ("coordination/moments.py", "Moments.change"),  # the same
    ("cache/files.py", "Files.sync"),
    ("cache/files.py", "Files.sync_folder"),
    ("cache/files.py", "_sync"),
    ("cache/identity.py", "_write"),  # at the start
    ("backend/local.py", "LocalBackend._sync"),
    ("backend/local.py", "LocalBackend.chmod"),
    ("backend/local.py", "LocalUpload.prepare"),
}
WAITING_CALLS = {"flock", "lockf", "fsync", "fdatasync"}


def waiters(path: Path) -> Iterator[tuple[str, str]]:
    """The functions of a module that lock or sync."""

    def look(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                yield from look(child, f"{name}.{child.name}".lstrip("."))
                continue
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and _waits(child):
                yield str(path.relative_to(ROOT)), name
            yield from look(child, name)

    yield from look(ast.parse(path.read_text()), "")


def _waits(call: ast.Call) -> bool:
    words = {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)}
    is_waiting = bool(words & WAITING_CALLS) or "F_OFD_SETLKW" in words or "F_FULLFSYNC" in words
    return is_waiting and not words & {"LOCK_NB", "LOCK_UN"}


def test_who_locks_and_syncs_is_known() -> None:
    assert {each for path in ROOT.rglob("*.py") for each in waiters(path)} <= WAITERS


def test_a_lock_that_somebody_else_has_is_not_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    with contextlib.closing(LockFile(path)) as mine, contextlib.closing(LockFile(path)) as other:
        with limited_to(Wait.NOTHING):
            mine.lock()  # nobody has it
            for wait in (other.lock, other.share):
                with pytest.raises(WouldWait):
                    wait()
        mine.unlock()
        with limited_to(Wait.NOTHING):
            other.share()


def test_nothing_is_synced_or_written_by_who_may_not_wait(tmp_path: Path) -> None:
    index, files = Index(tmp_path / "cache"), Files(tmp_path / "cache")
    files.prepare()
    with contextlib.closing(index), contextlib.closing(files.create(Place.CLEAN, "a")) as file:
        index.put("a", b"bytes")
        with limited_to(Wait.NOTHING):
            assert index.get("a") == b"bytes"
            for wait in (
                lambda: index.put("a", b"other"),
                lambda: index.delete("a"),
                lambda: index.atomically(lambda: None),
                lambda: files.sync(file.descriptor),
                lambda: files.sync_folder(Place.CLEAN),
            ):
                with pytest.raises(WouldWait):
                    wait()
        assert index.get("a") == b"bytes"


def test_a_loop_may_not_wait_whatever_it_runs() -> None:
    found: list[Wait] = []

    def ask() -> None:
        try:
            about_to_wait(Wait.DISK)
        except WouldWait as would:
            found.append(would.need)

    with contextlib.closing(Loop()) as loop, socket.create_server((HOST, 0)) as listener:
        server = VFSServer(listener, VFSHandler, ioloop=loop)
        loop.call_soon(ask)
        loop.loop(0, blocking=False)
        server.close()
    assert found == [Wait.DISK]
    about_to_wait(Wait.STORE)
