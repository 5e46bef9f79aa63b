"""In a pyftpdlib deployment as it stands: its servers, its handler, its authorizer, its data channels."""

from __future__ import annotations

import contextlib
import ftplib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyftpdlib.authorizers
import pytest
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import DTPHandler, FTPHandler
from pyftpdlib.servers import FTPServer, MultiprocessFTPServer, ThreadedFTPServer

from ftpvfs import VFSAuthorizer, VFSDTPHandler, VFSFilesystem, VFSHandler, VFSHomes, VFSServer
from tests.conftest import Store, connect, download, last_reply, names, open_transfer, reply, reset, upload
from tests.servers import wait_until

MIB = 2**20
Serve = Callable[..., tuple[str, int]]

OLD = b"the version that was there"
DATA = os.urandom(MIB) * 10

SERVERS = [FTPServer, ThreadedFTPServer, MultiprocessFTPServer]
# A class per test: pyftpdlib's attributes are set on the class, and the warnings are given once for each.
CHANNELS = {"stock": DTPHandler, "ours": VFSDTPHandler}


def dummy_authorizer() -> DummyAuthorizer:
    authorizer = DummyAuthorizer()
    authorizer.add_user("user", "12345", "/", perm="elradfmwMT")
    return authorizer


def vfs_authorizer() -> VFSAuthorizer:
    authorizer = VFSAuthorizer()
    authorizer.add_user("user", "12345", "/home/of/user", perm="elradfmwMT")
    return authorizer


@pytest.fixture
def ftp_server(ftp_server: Serve) -> Serve:
    """As everywhere, but with a server of pyftpdlib's own where the test names none."""

    def serve(served: Any, *, server_class: type = ThreadedFTPServer, **keywords: Any) -> tuple[str, int]:
        return ftp_server(served, server_class=server_class, **keywords)

    return serve


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, make_store: Any) -> Store:
    made: Store = make_store(request.param)
    return made


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS.keys())
@pytest.mark.parametrize("authorizer", [dummy_authorizer, vfs_authorizer])
def test_files_go_up_and_down(
    store: Store, make_vfs: Any, ftp_server: Serve, server: type, channel: type, authorizer: Callable[[], Any]
) -> None:
    vfs = make_vfs(store)
    vfs.start()  # used in the parent: what it has open must not be used in a child
    assert vfs.listdir() == []
    address = ftp_server(
        vfs, server_class=server, handler=FTPHandler, authorizer=authorizer(), attributes={"dtp_handler": channel}
    )
    home = "home/of/user/" if authorizer is vfs_authorizer else ""
    with connect(address, "user", "12345") as ftp:
        assert upload(ftp, "a", DATA).startswith("226 ")
        assert store.read(f"{home}a") == DATA
        assert download(ftp, "a") == DATA
        assert download(ftp, "a", rest=len(DATA) - 5) == DATA[-5:]
        assert upload(ftp, "empty", b"").startswith("226 ")
        assert store.read(f"{home}empty") == b""
        assert ftp.mkd("folder") == "/folder"
        assert reply(ftp, "CWD folder").startswith("250 ")
        assert ftp.pwd() == "/folder"
        assert names(ftp, "/") == {"a", "empty", "folder"}
        assert sorted(ftp.nlst("/")) == ["a", "empty", "folder"]
        assert reply(ftp, "RNFR /a").startswith("350 ")
        assert reply(ftp, "RNTO b").startswith("250 ")
        assert store.list() == {f"{home}folder/b", f"{home}empty"}
        assert reply(ftp, "MFMT 20200102030405 b").startswith("213 ")
        assert reply(ftp, "MDTM b") == "213 20200102030405"
        assert reply(ftp, "DELE b").startswith("250 ")
        assert reply(ftp, "CWD ..").startswith("250 ")
        assert reply(ftp, "RMD folder").startswith("250 ")
        assert reply(ftp, "SIZE missing").startswith("550 ")


class Users(VFSHomes, DummyAuthorizer):
    """pyftpdlib's authorizer with homes in a VFS."""


class Impersonating(DummyAuthorizer):
    """One that would change the process's user for each call, as pyftpdlib's UnixAuthorizer does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def impersonate_user(self, username: str, password: str) -> None:
        self.calls.append(username)


@pytest.mark.parametrize("server", [VFSServer, *SERVERS])
def test_users_of_pyftpdlibs_authorizers_are_at_home_in_the_vfs(
    local_store: Store, ftp_server: Serve, server: type
) -> None:
    authorizer = Users()
    authorizer.add_user("alice", "wonder", "/nowhere/alice", perm="elradfmwMT")
    authorizer.override_perm("alice", "/nowhere/alice/in", "elrm")
    handler = VFSHandler if server is VFSServer else FTPHandler
    address = ftp_server(local_store, server_class=server, handler=handler, authorizer=authorizer)
    with connect(address, "alice", "wonder") as ftp:
        assert upload(ftp, "a", b"data").startswith("226 ")
        assert ftp.mkd("in") == "/in"
        assert reply(ftp, "DELE in/a") == "550 Not enough privileges."
        assert (names(ftp), ftp.pwd()) == ({"a", "in"}, "/")
    assert local_store.read("nowhere/alice/a") == b"data"


def test_system_users_of_pyftpdlibs_authorizer_are_at_home_in_the_vfs(
    local_store: Store, ftp_server: Serve, tmp_path: Path
) -> None:
    unix = getattr(pyftpdlib.authorizers, "UnixAuthorizer", None)
    if unix is None or os.geteuid():
        pytest.skip("needs shadow passwords: the superuser, and a Python before 3.13")
    authorizer = type("SystemUsers", (VFSHomes, unix), {})(require_valid_shell=False)
    authorizer.override_user("daemon", password="x", homedir="/nowhere/daemon")
    address = ftp_server(
        local_store,
        handler=FTPHandler,
        authorizer=authorizer,
        attributes={"dtp_handler": VFSDTPHandler},
        cache_mode="writes",
        cache_dir=tmp_path / "cache",
        write_back="0s",
    )
    with connect(address, "daemon", "x") as ftp:
        assert upload(ftp, "a", b"data").startswith("226 ")
        assert download(ftp, "a") == b"data"
    wait_until(lambda: local_store.list() == {"nowhere/daemon/a"}, timeout=30)


def test_an_authorizer_that_changes_the_processs_user_is_told_of_what_keeps_it(
    local_store: Store, ftp_server: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    authorizer = Impersonating()
    authorizer.add_user("user", "12345", "/", perm="elradfmwMT")
    address = ftp_server(local_store, handler=FTPHandler, authorizer=authorizer)
    with caplog.at_level(logging.WARNING, "ftpvfs"), connect(address, "user", "12345") as ftp:
        assert names(ftp) == set()
        wait_until(lambda: any("VFSHomes" in record.message for record in caplog.records))
    assert authorizer.calls


@pytest.mark.parametrize("server", [VFSServer, ThreadedFTPServer])
def test_our_handler_never_changes_the_processs_user(local_store: Store, ftp_server: Serve, server: type) -> None:
    authorizer = Impersonating()
    authorizer.add_user("user", "12345", "/", perm="elradfmwMT")
    with connect(ftp_server(local_store, server_class=server, authorizer=authorizer), "user", "12345") as ftp:
        assert upload(ftp, "a", b"data").startswith("226 ")
        assert names(ftp) == {"a"}
    assert authorizer.calls == []


@pytest.mark.parametrize("server", SERVERS)
def test_our_handler_serves_there_as_well(store: Store, ftp_server: Serve, server: type) -> None:
    store.write("a", OLD)
    with connect(ftp_server(store, server_class=server)) as ftp:
        assert upload(ftp, "b", DATA).startswith("226 ")
        assert store.read("b") == DATA
        assert download(ftp, "b") == DATA
        assert names(ftp) == {"a", "b"}
        lines: list[str] = []
        ftp.retrlines("RETR a", lines.append)
        assert lines == [OLD.decode()]
        ftp.voidcmd("TYPE I")
        with open_transfer(ftp, "STOR a") as with_data:
            with_data.sendall(DATA)
            assert reply(ftp, "ABOR").startswith("426 ")
            assert last_reply(ftp).startswith("226 ")
        reset_one = open_transfer(ftp, "STOR a")
        reset_one.sendall(DATA)
        reset(reset_one)
        assert last_reply(ftp).startswith("426 ")
        assert store.read("a") == OLD
        assert reply(ftp, "DELE b").startswith("250 ")


@pytest.mark.parametrize("server", SERVERS)
def test_several_sessions_at_once(store: Store, ftp_server: Serve, server: type) -> None:
    address = ftp_server(store, server_class=server, handler=FTPHandler, authorizer=dummy_authorizer())
    with contextlib.ExitStack() as sessions:
        clients = [sessions.enter_context(connect(address, "user", "12345")) for _ in range(4)]
        for number, ftp in enumerate(clients):
            assert upload(ftp, f"a{number}", DATA[: MIB + number]).startswith("226 ")
        for number, ftp in enumerate(reversed(clients)):
            assert download(ftp, f"a{number}") == DATA[: MIB + number]


@pytest.fixture(params=["stock", "ours"])
def session(request: pytest.FixtureRequest, store: Store, ftp_server: Serve) -> Iterator[ftplib.FTP]:
    store.write("a", OLD)
    handler = type("Handler", (FTPHandler,), {"dtp_handler": CHANNELS[request.param]})
    with connect(ftp_server(store, handler=handler, authorizer=dummy_authorizer()), "user", "12345") as ftp:
        yield ftp


@pytest.mark.parametrize("data", [b"small", DATA], ids=["small", "large"])
def test_abor_publishes_nothing(store: Store, session: ftplib.FTP, data: bytes) -> None:
    with open_transfer(session, "STOR a") as with_data:
        with_data.sendall(data)
        if reply(session, "ABOR").startswith("426 "):
            assert last_reply(session).startswith("226 ")
        else:  # pyftpdlib says no more than 225 where it has not seen a byte yet
            assert data == b"small"
    assert store.read("a") == OLD
    wait_until(lambda: not store.uploads())
    assert reply(session, "NOOP").startswith("200 ")


@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS.keys())
@pytest.mark.parametrize("data", [b"small", DATA], ids=["small", "large"])
def test_a_time_out_publishes_nothing(store: Store, ftp_server: Serve, channel: type, data: bytes) -> None:
    store.write("a", OLD)
    attributes = {"dtp_handler": type("Impatient", (channel,), {"timeout": 0.4})}
    address = ftp_server(store, handler=FTPHandler, authorizer=dummy_authorizer(), attributes=attributes)
    session = connect(address, "user", "12345")
    with open_transfer(session, "STOR a") as with_data:
        with contextlib.suppress(ConnectionError):  # on a busy machine the store alone may take so long
            with_data.sendall(data)
        assert last_reply(session)[:3] in {"421", "426"}
    session.close()  # pyftpdlib's own ends the session, too
    assert store.read("a") == OLD
    wait_until(lambda: not store.uploads())


def test_the_end_of_the_session_publishes_nothing(store: Store, session: ftplib.FTP) -> None:
    with open_transfer(session, "STOR a") as with_data:
        with_data.sendall(DATA)
        wait_until(lambda: store.kind != "s3" or store.uploads())
        session.close()
        wait_until(lambda: not store.uploads())
    assert store.read("a") == OLD


def test_a_reset_publishes_nothing_with_our_data_channel(store: Store, ftp_server: Serve) -> None:
    store.write("a", OLD)
    handler = type("Handler", (FTPHandler,), {"dtp_handler": VFSDTPHandler})
    with connect(ftp_server(store, handler=handler, authorizer=dummy_authorizer()), "user", "12345") as ftp:
        with_data = open_transfer(ftp, "STOR a")
        with_data.sendall(DATA)
        reset(with_data)
        assert last_reply(ftp).startswith("426 ")
    assert store.read("a") == OLD


@pytest.mark.parametrize("data", [b"", b"small", DATA], ids=["empty", "at the commit", "while it arrives"])
@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS.keys())
def test_a_failing_store_is_answered_with_451(
    make_store: Any, make_proxy: Any, ftp_server: Serve, channel: type, data: bytes
) -> None:
    store = make_store("s3")
    store.write("a", OLD)
    store.write("large", DATA)
    proxy = make_proxy(store)
    handler = type("Handler", (FTPHandler,), {"dtp_handler": channel})
    address = ftp_server(store.proxied(proxy), handler=handler, authorizer=dummy_authorizer(), low_level_retries=1)
    with connect(address, "user", "12345") as ftp:
        for method in ("PUT", "POST"):
            proxy.fail_next(10**6, method=method)
        with open_transfer(ftp, "STOR a") as with_data, contextlib.suppress(ConnectionError):
            with_data.sendall(data)
        answer = last_reply(ftp)
        assert answer.startswith("451 The store is busy")
        assert reply(ftp, "NOOP").startswith("200 ")
        proxy.fail_next(10**6, method="GET", target="large")
        with open_transfer(ftp, "RETR large") as with_data, with_data.makefile("rb") as down:
            assert down.read() == b""
        assert last_reply(ftp).startswith("451 The store is busy")
        assert reply(ftp, "NOOP").startswith("200 ")
        proxy.heal()
        assert upload(ftp, "a", b"new").startswith("226 ")
    assert store.read("a") == b"new"


def test_a_listing_that_a_subclass_shortens_stays_short(store: Store, make_vfs: Any, ftp_server: Serve) -> None:
    for name in ("a", "b", "hidden"):
        store.write(name, b"x")

    class Shortened(VFSFilesystem):
        vfs = make_vfs(store)

        def listdir(self, path: str) -> Any:
            found = super().listdir(path)
            found.remove("hidden")
            return found

    address = ftp_server(Shortened.vfs, attributes={"abstracted_fs": Shortened})
    with connect(address) as ftp:
        assert names(ftp) == {"a", "b"}
        lines: list[str] = []
        ftp.retrlines("LIST", lines.append)
        assert [line.split()[-1] for line in lines] == ["a", "b"]


def test_what_an_unmodified_handler_cannot_promise_is_said_once(
    make_store: Any, ftp_server: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    class ADTPHandlerOfTheirs(DTPHandler):
        pass

    attributes = {"dtp_handler": ADTPHandlerOfTheirs}
    address = ftp_server(make_store("memory"), handler=FTPHandler, attributes=attributes)
    with caplog.at_level(logging.WARNING, "ftpvfs"):
        for _ in range(3):
            connect(address).close()
        said = [record for record in caplog.records if "ADTPHandlerOfTheirs" in record.message]
        wait_until(lambda: said)
    assert len(said) == 1


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("mode", ["writes", "full"])
def test_the_cache_modes_work_in_every_server(
    store: Store, make_vfs: Callable[..., Any], ftp_server: Serve, server: type, mode: str
) -> None:
    vfs = make_vfs(store, cache_mode=mode, write_back="1s")
    vfs.start()
    address = ftp_server(vfs, server_class=server)
    with connect(address) as ftp:
        assert upload(ftp, "a", b"begin ").startswith("226 ")
        assert upload(ftp, "a", b"and end", verb="APPE").startswith("226 ")
    with connect(address) as ftp:
        assert names(ftp) == {"a"}
        assert download(ftp, "a") == b"begin and end"
    wait_until(lambda: "a" in store.list(), timeout=30)
    assert store.read("a") == b"begin and end"


@pytest.mark.parametrize("mode", ["minimal", "writes", "full"])
def test_pyftpdlibs_own_data_channel_publishes_through_the_cache(
    local_store: Store, make_vfs: Callable[..., Any], ftp_server: Serve, mode: str
) -> None:
    vfs = make_vfs(local_store, cache_mode=mode, write_back="1h")
    with connect(ftp_server(vfs, handler=FTPHandler, authorizer=dummy_authorizer()), "user", "12345") as ftp:
        assert upload(ftp, "a", b"begin ").startswith("226 ")
        assert upload(ftp, "a", b"and end", verb="APPE").startswith("226 ")
        assert upload(ftp, "a", b"AND", rest=6).startswith("226 ")
        assert upload(ftp, "", b"unique", verb="STOU").startswith("226 ")
        (unique,) = names(ftp) - {"a"}
        assert download(ftp, "a") == b"begin AND end"
        assert download(ftp, unique) == b"unique"
    vfs.sync(30)
    assert local_store.read("a") == b"begin AND end"
    assert local_store.read(unique) == b"unique"


def test_who_asks_in_a_forked_process_learns_whether_its_parent_sees_to_what_waits(
    local_store: Store, make_vfs: Callable[..., Any]
) -> None:
    started, other = (make_vfs(local_store, cache_mode="writes") for _ in range(2))
    started.start()
    assert answer_in_child(lambda: started.is_served_by_parent)
    assert not answer_in_child(lambda: other.is_served_by_parent)


def answer_in_child(question: Callable[[], bool]) -> bool:
    """Return what a forked process answers."""
    pid = os.fork()
    if not pid:
        os._exit(0 if question() else 1)
    return os.waitpid(pid, 0)[1] == 0
