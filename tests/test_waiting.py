"""What may not wait does not; who leaves cancels what nobody else waits for."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from ftpvfs.backend.backend import Entry
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
from tests.servers import wait_until


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
