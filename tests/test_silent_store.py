"""A store that takes requests and answers none keeps nobody waiting who does not need it, and nobody twice."""

from __future__ import annotations

import contextlib
import ftplib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ftpvfs import VFS, VFSServer
from ftpvfs.waiting import Wait, WouldWait, limited_to
from tests.conftest import (
    Store,
    StoreFactory,
    connect,
    download,
    last_reply,
    names,
    open_transfer,
    reply,
    serving,
    upload,
)
from tests.servers import FaultProxy, reset, wait_until
from tests.test_dircache import MovedClock
from tests.test_ftp_loop import Hanging, handler_class, say

WAITERS = 40
HELD = "1h"
DATA = b"from the store" * 100
WAITS = 60.0


def any_ask_the_store() -> bool:
    """Whether threads beside those of the sessions wait for an answer."""
    return any(thread.name in {"ftpvfs-ask", "ftpvfs-later"} for thread in threading.enumerate())


class Silent(Hanging):
    """A server in a cache mode over an S3 store that answers until the test silences it; `waiting/` has what waits."""

    def __init__(self, server: VFSServer, store: Store, proxy: FaultProxy) -> None:
        super().__init__(server, store, proxy)
        self.clients: list[ftplib.FTP] = []
        self.waiters: list[ftplib.FTP] = []

    @property
    def vfs(self) -> VFS:
        vfs: VFS = self.server.handler.abstracted_fs.vfs
        return vfs

    def connect(self) -> ftplib.FTP:
        """A session that ends with the test, without a word."""
        self.clients.append(connect(self.address))
        return self.clients[-1]

    def silence(self) -> None:
        """Let the store answer no more, and have more clients wait for it than it has threads."""
        self.waiters = [self.connect() for _ in range(WAITERS)]
        self.hang()
        for number, ftp in enumerate(self.waiters):
            say(ftp, f"SIZE cold/{number}")
        wait_until(lambda: self.parked == WAITERS)

    def heal(self) -> None:
        self.proxy.heal()
        for ftp in self.waiters:
            assert last_reply(ftp).startswith("550 ")

    def close(self) -> None:
        """Let all go on, and end; whoever still asks the store gets an answer."""
        self.proxy.heal()
        for ftp in self.clients:
            ftp.close()
        wait_until(lambda: not self.busy and not any_ask_the_store(), timeout=WAITS)


@pytest.fixture
def silent(
    make_store: StoreFactory, make_proxy: Any, make_vfs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> Iterator[Callable[..., Silent]]:
    """silent(mode, **options of the VFS) -> Silent, with `warm` listed and read, and files waiting in `waiting`."""
    monkeypatch.setattr("ftpvfs.vfs.questions.ANSWER_TIMEOUT", 0.3)
    with contextlib.ExitStack() as cleanup:

        def make(mode: str, **options: Any) -> Silent:
            store = make_store("s3")
            for name in ("warm/a", "warm/b", "cold/a"):
                store.write(name, DATA)
            proxy = make_proxy(store)
            options = {"write_back": HELD, "low_level_retries": 2, "cache_dir": str(tmp_path / "cache")} | options
            vfs = make_vfs(store.proxied(proxy), cache_mode=mode, **options)
            server = cleanup.enter_context(serving(None, handler_class(vfs)))
            served = Silent(server, store, proxy)
            with connect(served.address) as ftp:
                assert names(ftp, "warm") == {"a", "b"}
                assert download(ftp, "warm/a") == DATA
                ftp.mkd("waiting")
                for name in ("deleted", "renamed", "timed", "appended"):
                    upload(ftp, f"waiting/{name}", b"waits")
            cleanup.callback(served.close)
            return served

        yield make


both_modes = pytest.mark.parametrize("mode", ["writes", "full"])


# --- who does not need the store does not wait in its lane


@both_modes
def test_files_are_taken_while_more_wait_for_a_silent_store_than_it_has_threads(
    silent: Callable[..., Silent], mode: str
) -> None:
    served = silent(mode)
    ftp = served.connect()
    served.silence()
    assert upload(ftp, "waiting/new", b"new").startswith("226 ")
    assert upload(ftp, "warm/a", b"over what is there").startswith("226 ")
    assert upload(ftp, "elsewhere/unknown", b"nobody can say").startswith("226 ")
    assert upload(ftp, "waiting/caf\u00e9", b"beyond ASCII").startswith("226 ")
    assert reply(ftp, "ALLO 1000").startswith("2")
    assert upload(ftp, "waiting/announced", b"a" * 1000).startswith("226 ")
    served.heal()
    served.vfs.sync(WAITS)
    assert served.store.read("warm/a") == b"over what is there"
    assert served.store.read("elsewhere/unknown") == b"nobody can say"
    assert served.store.list() >= {"waiting/new", "waiting/caf\u00e9", "waiting/announced"}


@both_modes
def test_what_waits_is_changed_while_more_wait_for_a_silent_store_than_it_has_threads(
    silent: Callable[..., Silent], mode: str
) -> None:
    served = silent(mode)
    ftp = served.connect()
    served.silence()
    assert reply(ftp, "DELE waiting/deleted").startswith("250 ")
    assert reply(ftp, "RNFR waiting/renamed").startswith("350 ")
    assert reply(ftp, "RNTO elsewhere/renamed").startswith("250 ")
    assert reply(ftp, "MFMT 20200102030405 waiting/timed").startswith("213 ")
    assert upload(ftp, "waiting/appended", b", and more", verb="APPE").startswith("226 ")
    assert reply(ftp, "MKD waiting/made").startswith("257 ")
    assert upload(ftp, "waiting/made/new", b"new").startswith("226 ")
    assert reply(ftp, "MKD unknown").startswith("257 ")
    assert download(ftp, "waiting/appended") == b"waits, and more"
    served.heal()
    served.vfs.sync(WAITS)
    assert served.store.read("elsewhere/renamed") == b"waits"
    assert served.store.read("waiting/appended") == b"waits, and more"
    assert served.store.read("waiting/made/new") == b"new"
    assert served.store.mtime("waiting/timed") == 1_577_934_245
    assert served.store.list().isdisjoint({"waiting/deleted", "waiting/renamed"})


def test_what_waits_is_known_though_the_directory_cache_has_forgotten_it(
    silent: Callable[..., Silent],
) -> None:
    served = silent("writes")
    ftp = served.connect()
    served.vfs.forget()
    served.silence()
    assert reply(ftp, "SIZE waiting/timed") == "213 5"
    assert reply(ftp, "CWD waiting").startswith("250 ")
    assert reply(ftp, "DELE deleted").startswith("250 ")
    assert reply(ftp, "SIZE deleted").startswith("550 ")
    assert reply(ftp, "RNFR renamed").startswith("350 ")
    assert reply(ftp, "RNTO timed").startswith("250 ")
    assert upload(ftp, "appended", b", and more", verb="APPE").startswith("226 ")


def test_what_is_cached_is_read_appended_to_and_listed_while_more_wait_than_the_store_has_threads(
    silent: Callable[..., Silent],
) -> None:
    served = silent("full")
    ftp = served.connect()
    served.silence()
    assert download(ftp, "warm/a") == DATA
    assert upload(ftp, "warm/a", b", and more", verb="APPE").startswith("226 ")
    assert download(ftp, "warm/a") == DATA + b", and more"
    assert upload(ftp, "warm/c", b"new").startswith("226 ")
    assert names(ftp, "warm") == {"a", "b", "c"}  # another listing than the one that was complete
    assert names(ftp, "waiting") == {"deleted", "renamed", "timed", "appended"}  # it was made here
    served.heal()
    served.vfs.sync(WAITS)
    assert served.store.read("warm/a") == DATA + b", and more"


def test_a_broken_upload_is_put_away_while_more_wait_than_the_store_has_threads(
    silent: Callable[..., Silent],
) -> None:
    served = silent("writes")
    ftp = served.connect()
    served.silence()
    data = open_transfer(ftp, "STOR warm/broken")
    data.sendall(b"a part")
    wait_until(lambda: "Total bytes received: 6" in reply(ftp, "STAT"))
    reset(data)
    assert last_reply(ftp).startswith("426 ")
    assert reply(ftp, "SIZE warm/broken") == "213 6"  # which waits until it is put away
    assert upload(ftp, "warm/broken", b"ial", verb="APPE").startswith("226 ")
    assert download(ftp, "warm/broken") == b"a partial"


def test_with_folder_markers_a_waiting_file_is_deleted_though_its_folder_must_be_kept(
    silent: Callable[..., Silent],
) -> None:
    served = silent("writes", dir_markers=True)
    served.store.write("implied/only", DATA)
    ftp = served.connect()
    assert names(ftp, "implied") == {"only"}
    upload(ftp, "implied/only", b"waits")
    served.silence()
    assert reply(ftp, "DELE implied/only").startswith("250 ")
    served.heal()
    wait_until(lambda: "implied/" in served.store.list(), timeout=WAITS)
    served.vfs.sync(WAITS)
    assert "implied/only" not in served.store.list()


# --- a call that changes something and may not wait for the store has changed nothing


CHANGES: dict[str, Callable[[VFS], object]] = {
    "remove": lambda vfs: vfs.remove("warm/a"),
    "rename": lambda vfs: vfs.rename("warm/a", "warm/c"),
    "rename a folder": lambda vfs: vfs.rename("warm", "other"),
    "rename over what waits": lambda vfs: vfs.rename("warm/a", "warm/waits"),
    "make where something waits to be deleted": lambda vfs: vfs.mkdir("warm/gone"),
    "make an unknown folder": lambda vfs: vfs.makedirs("x/y"),
    "remove a folder": lambda vfs: vfs.rmdir("empty"),
    "set a time": lambda vfs: vfs.utime("warm/a", (0, 1_500_000_000)),
    "write": lambda vfs: write(vfs, "warm/waits", "wb"),
    "append": lambda vfs: write(vfs, "warm/waits", "ab"),
    "write what is to be new": lambda vfs: write(vfs, "new", "xb"),
}


def write(vfs: VFS, path: str, mode: str) -> None:
    with vfs.open(path, mode) as file:
        file.write(b"written")
        vfs.forget()  # so that who commits must look again


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [{}, {"dir_markers": True}, {"cache_mode": "minimal"}], ids=str)
def test_a_change_that_would_wait_for_the_store_is_not_begun(
    make_store: StoreFactory, make_vfs: Any, change: str, options: dict[str, Any], tmp_path: Any
) -> None:
    store = make_store("s3")
    for name in ("warm/a", "warm/b", "warm/gone"):
        store.write(name, DATA)
    vfs = make_vfs(store, **({"cache_mode": "writes", "write_back": HELD, "cache_dir": str(tmp_path)} | options))
    assert vfs.listdir("warm") == ["a", "b", "gone"]
    vfs.mkdir("empty")
    if "cache_mode" not in options:
        for name in ("warm/waits", "warm/gone"):
            write(vfs, name, "wb")
    vfs.remove("warm/gone")
    vfs.listdir("warm")

    def state() -> Any:
        waiting = [(row["path"], row["action"], row["size"]) for row in vfs.queue()]
        return store.list(), waiting, [vfs.isdir(name) for name in ("empty", "warm/gone", "x", "x/y")]

    before = state()
    try:
        with limited_to(Wait.DISK):
            CHANGES[change](vfs)
    except WouldWait:
        assert state() == before
        CHANGES[change](vfs)
    assert state() != before or change == "set a time"  # which is not in there


def test_a_file_whose_commit_would_wait_for_the_store_is_committed_by_who_may(
    make_store: StoreFactory, make_vfs: Any
) -> None:
    store = make_store("s3")
    vfs = make_vfs(store)
    file = vfs.open("a", "wb", autocommit=False)
    file.write(DATA)
    with limited_to(Wait.DISK), pytest.raises(WouldWait):
        file.commit()
    assert not file.closed
    assert store.list() == set()
    file.commit()
    assert store.read("a") == DATA


# --- what the store has not said once is not waited for again


class Watched:
    """A VFS over an S3 store behind a proxy, and how often the store was asked what is at a path."""

    def __init__(self, vfs: VFS, store: Store, proxy: FaultProxy, clock: MovedClock) -> None:
        self.vfs, self.store, self.proxy, self.clock = vfs, store, proxy, clock
        self.asked: list[str] = []
        backend = vfs.core.backend
        for kind in ("stat", "list"):
            setattr(backend, kind, self._counted(getattr(backend, kind)))

    def _counted(self, request: Callable[[str], Any]) -> Callable[[str], Any]:
        def counted(path: str) -> Any:
            self.asked.append(path)
            return request(path)

        return counted

    def put(self, path: str, data: bytes = b"handed in") -> None:
        with self.vfs.open(path, "wb") as file:
            file.write(data)

    @property
    def state(self) -> str:
        return str(self.vfs.stats()["breaker"])


@pytest.fixture
def watched(
    make_store: StoreFactory, make_proxy: Any, make_vfs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> Iterator[Callable[..., Watched]]:
    monkeypatch.setattr("ftpvfs.vfs.questions.ANSWER_TIMEOUT", 0.3)
    made: list[Watched] = []

    def make(**options: Any) -> Watched:
        store, clock = make_store("s3"), MovedClock()
        proxy = make_proxy(store)
        options = {"cache_mode": "writes", "write_back": HELD, "timeout": "1h", "cache_dir": str(tmp_path)} | options
        vfs = make_vfs(store.proxied(proxy), clock=clock, **options)
        made.append(Watched(vfs, store, proxy, clock))
        return made[-1]

    yield make
    for each in made:
        each.proxy.heal()
        wait_until(lambda: not any_ask_the_store(), timeout=WAITS)


def test_only_the_first_upload_into_a_silent_store_waits_until_the_store_has_answered(
    watched: Callable[..., Watched], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "ftpvfs.vfs.breaker")
    on = watched()
    on.proxy.black_hole = True
    on.put("a")
    assert (on.asked, on.state) == (["a"], "open")
    for name in ("b", "c", "folder/d"):
        on.put(name)
    on.vfs.mkdir("made")
    assert on.asked == ["a"]

    on.clock.advance(2)
    on.put("e")  # its question is the probe, which it does not wait for
    on.put("f")
    wait_until(lambda: on.asked == ["a", "e"])
    assert on.state == "half_open"

    on.proxy.heal()
    wait_until(lambda: on.state == "closed", timeout=WAITS)
    on.put("g")
    assert on.asked == ["a", "e", "g"]
    assert [record.message.partition(" (")[0].partition(", after")[0] for record in caplog.records] == [
        f"{on.vfs.name} does not answer", f"{on.vfs.name} answers again",
    ]  # fmt: skip
    on.vfs.sync(WAITS)
    assert on.store.list() >= {"a", "b", "c", "folder/d", "e", "f", "g"}


def test_any_answer_of_the_store_is_one(watched: Callable[..., Watched]) -> None:
    on = watched()
    on.store.write("there", DATA)
    on.proxy.black_hole = True
    on.put("a")
    assert on.state == "open"
    on.proxy.heal()
    assert on.vfs.stat("there").st_size == len(DATA)
    assert on.state == "closed"


def test_who_needs_the_store_waits_for_it_as_before(watched: Callable[..., Watched]) -> None:
    on = watched()
    on.store.write("there", DATA)
    on.proxy.black_hole = True
    on.put("a")
    sizes: list[int] = []
    asking = threading.Thread(target=lambda: sizes.append(on.vfs.stat("there").st_size))
    asking.start()
    wait_until(lambda: "there" in on.asked)
    on.put("b")
    assert sizes == []
    on.proxy.heal()
    asking.join(WAITS)
    assert sizes == [len(DATA)]


def test_in_a_folder_that_was_made_or_listed_here_nothing_is_asked(watched: Callable[..., Watched]) -> None:
    on = watched()
    on.store.write("listed/there", DATA)
    assert on.vfs.listdir("listed") == ["there"]
    on.vfs.mkdir("made")
    on.asked.clear()
    on.proxy.black_hole = True
    on.put("listed/new")
    on.put("listed/there", b"over it")
    on.put("made/new")
    on.put("made/caf\u00e9")
    on.vfs.mkdir("made/below")
    on.put("made/below/new")
    on.vfs.forget()
    on.put("made/new", b"once more")
    assert (on.asked, on.state) == ([], "closed")
    assert on.vfs.stat("made/new").st_size == len(b"once more")


def test_what_others_have_put_into_a_folder_made_here_is_seen(watched: Callable[..., Watched]) -> None:
    on = watched()
    on.vfs.mkdir("made")
    on.store.write("made/theirs", DATA)
    on.put("made/ours")
    assert on.vfs.stat("made/theirs").st_size == len(DATA)
    assert on.vfs.listdir("made") == ["ours", "theirs"]


def test_what_was_listed_is_shown_as_it_was_and_asked_for_once(watched: Callable[..., Watched]) -> None:
    on = watched(dir_cache_time="1m")
    on.store.write("listed/there", DATA)
    assert on.vfs.listdir("listed") == ["there"]
    on.clock.advance(120)
    on.asked.clear()
    on.proxy.black_hole = True
    for _ in range(3):
        assert on.vfs.listdir("listed") == ["there"]
        assert on.vfs.lookup("listed/there").size == len(DATA)
    assert (on.asked, on.state) == (["listed"], "open")


def test_what_the_store_says_before_the_file_is_whole_is_what_the_file_replaces(
    watched: Callable[..., Watched], tmp_path: Any
) -> None:
    on = watched(conflict="keep-both")
    on.store.write("a", b"there")
    on.proxy.black_hole = True
    with on.vfs.open("a", "wb") as file:
        file.write(b"ours")
        assert on.state == "open"
        on.proxy.heal()
        wait_until(lambda: on.vfs.core.dirs.knows("a"), timeout=WAITS)
    on.store.write("a", b"theirs")
    on.vfs.sync(WAITS)
    assert on.store.read("a") == b"theirs"
    assert len(on.store.list()) == 2
