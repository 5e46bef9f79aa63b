"""Users of the ini file and of an authorizer: who comes in, to what, and that who fails learns nothing."""

from __future__ import annotations

import contextlib
import ftplib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import argon2
import pytest

from ftpvfs import VFS, VFSAuthorizer, VFSServer
from ftpvfs.assembly import Assembly
from ftpvfs.authorizer import hash_password
from ftpvfs.config import ConfigError, load, vfs_options
from ftpvfs.server import auth_proxy
from ftpvfs.server.auth_proxy import ProxyAuthorizer, answer_of
from tests.conftest import connect, download, names, program_environment, run_program, upload
from tests.downloads import Client
from tests.servers import wait_until

CHEAP = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


def refused(address: tuple[str, int], user: str, password: str) -> str:
    with pytest.raises(ftplib.error_perm) as caught:
        connect(address, user, password)
    return str(caught.value)


@pytest.fixture
def served(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


@pytest.fixture
def start(launched: Any, tmp_path: Path, served: Path) -> Any:
    """start(text) -> the program with an ini file that serves the folder and has this text besides."""

    def launch(text: str, *arguments: str, **keywords: Any) -> Any:
        ini = tmp_path / "users.ini"
        ini.write_text(f"[backend]\nurl = {served}\n{text}")
        return launched("--config", str(ini), *arguments, **keywords)

    return launch


def test_users_of_the_ini_file_are_kept_in_their_homes(start: Any, served: Path) -> None:
    server = start(
        f"[user:alice]\npassword_hash = {CHEAP.hash('wonder;land #1')}\nhome = /alice\n"
        f"[user:bob]\npassword_hash = {CHEAP.hash('builder')}\nperm = elr\n"
    )
    with connect(server.address, "alice", "wonder;land #1") as ftp:
        upload(ftp, "a", b"alice's")
        assert (served / "alice" / "a").read_bytes() == b"alice's"
        assert ftp.cwd("/../..").startswith("250 ")
        assert names(ftp) == {"a"}
    with connect(server.address, "bob", "builder") as ftp:
        assert download(ftp, "alice/a") == b"alice's"
        with pytest.raises(ftplib.error_perm, match="550"):
            upload(ftp, "b", b"")
    unknown = refused(server.address, "nobody", "x")
    assert refused(server.address, "alice", "builder") == unknown
    assert refused(server.address, "anonymous", "guest") == unknown
    assert "wonder" not in server.log()


def test_anonymous_comes_in_where_the_file_says_so(start: Any) -> None:
    server = start("[user:alice]\npassword = wonder\n[user:anonymous]\nperm = elr\nhome = /pub\n")
    with connect(server.address) as ftp:
        assert names(ftp) == set()
    connect(server.address, "alice", "wonder").close()
    assert "the password of [user:alice] is in clear" in server.log()
    assert "wonder" not in server.log()


def test_a_user_may_have_a_store_of_his_own(start: Any, tmp_path: Path, served: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    server = start(
        "[user:alice]\npassword = a\n"
        f"[user:bob]\npassword = b\nurl = {own}\noption.sync = false\n"
        f"[user:carol]\npassword = c\nurl = {own}\noption.sync = false\nperm = elr\n"
    )
    assert str(served) in server.line
    assert server.line.count("own") == 1
    with connect(server.address, "bob", "b") as bob, connect(server.address, "alice", "a") as alice:
        upload(bob, "mine", b"bob's")
        upload(alice, "mine", b"alice's")
        with connect(server.address, "carol", "c") as carol:
            assert download(carol, "mine") == b"bob's"
        bob.sendcmd("USER alice")
        bob.sendcmd("PASS a")
        assert download(bob, "mine") == b"alice's"
    assert (own / "mine").read_bytes() == b"bob's"
    assert (served / "mine").read_bytes() == b"alice's"


def test_a_user_has_no_more_sessions_than_he_may(start: Any) -> None:
    server = start(
        "[user:alice]\npassword = a\nmax_cons = 2\n[user:bob]\npassword = b\n", "--workers", "2"
    )
    first, second = (connect(server.address, "alice", "a") for _ in range(2))
    assert "530 Too many sessions" in refused(server.address, "alice", "a")
    assert "530 Authentication" in refused(server.address, "alice", "wrong")
    connect(server.address, "bob", "b").close()
    first.quit()
    third = connect_again(server.address, "alice", "a")
    second.sendcmd("USER bob")  # is not alice's any more
    second.sendcmd("PASS b")
    connect_again(server.address, "alice", "a").close()
    for ftp in (second, third):
        ftp.close()


def connect_again(address: tuple[str, int], user: str, password: str) -> ftplib.FTP:
    """Log in as soon as the server has noticed that others have left."""
    clients = []

    def comes_in() -> bool:
        with contextlib.suppress(ftplib.error_perm):
            clients.append(connect(address, user, password))
        return bool(clients)

    wait_until(comes_in)
    return clients[0]


def test_read_only_holds_for_all_users(start: Any) -> None:
    server = start("[user:alice]\npassword = a\n", "--read-only")
    with connect(server.address, "alice", "a") as ftp, pytest.raises(ftplib.error_perm, match="550"):
        upload(ftp, "a", b"")


AUTHORIZER = '''
from pyftpdlib.authorizers import AuthenticationFailed, DummyAuthorizer

class Mine(DummyAuthorizer):
    def validate_authentication(self, username, password, handler):
        if password != username[::-1]:
            raise AuthenticationFailed("Not the other way round.")
    def get_home_dir(self, username): return "/" + username
    def has_user(self, username): return True
    def has_perm(self, username, perm, path=None): return True
    def get_perms(self, username): return "elradfmwMT"
    def get_msg_login(self, username): return "Hello " + username
    def get_msg_quit(self, username): return "Bye."
'''


def test_an_authorizer_of_ones_own_decides(launched: Any, tmp_path: Path, served: Path) -> None:
    (tmp_path / "mine.py").write_text(AUTHORIZER)
    server = launched(str(served), "--authorizer", "mine:Mine", cwd=tmp_path)
    with connect(server.address, "eve", "eve"[::-1]) as ftp:
        upload(ftp, "a", b"x")
    assert (served / "eve" / "a").read_bytes() == b"x"
    assert "other way round" in refused(server.address, "eve", "x")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no.such.module:X", "No module named"),
        ("mine:Other", "AttributeError"),
        ("mine:AuthenticationFailed", "is no class like"),
        ("broken:X", "ZeroDivisionError"),
    ],
)
def test_an_authorizer_that_cannot_be_had_stops_the_start(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(AUTHORIZER)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    ended = run_program("--authorizer", name, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"ftpvfs: --authorizer: {name}")
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1


# --- stores


def assemble(tmp_path: Path, text: str) -> Assembly:
    ini = tmp_path / "a.ini"
    ini.write_text(text)
    return Assembly(load(["--config", str(ini)], {}))


def test_there_is_one_store_for_each_distinct_backend(tmp_path: Path) -> None:
    users = "".join(
        f"[user:{name}]\npassword = x\nurl = memory://{url}\noption.a = 1\n" for name, url in ["ab", "cb", "dd"]
    )
    assembly = assemble(tmp_path, users)
    assert assembly.vfs is None
    assert [vfs.name for vfs in assembly.vfses] == ["memory://b", "memory://d"]
    ask = assembly.authorizer.vfs_for
    assert ask("a", "x", None) is ask("c", "x", None) is not ask("d", "x", None)
    with contextlib.ExitStack() as stack:
        stack.callback(assembly.close)


def test_two_backends_never_share_a_cache(tmp_path: Path) -> None:
    section = "[user:{0}]\npassword = x\nurl = s3://b\noption.key = {0}\n"
    text = section.format("a") + section.format("b")
    with pytest.raises(ConfigError, match=r"\[user:b\]: s3://b has the cache folder s3-b of .* cache_name"):
        assemble(tmp_path, text)
    for other in ("url = s3://b/\noption.key = c", "url = s3://other\ncache_name = s3-b"):
        with pytest.raises(ConfigError, match=r"\[user:c\]: .* cache folder s3-b of another user's s3://b"):
            assemble(tmp_path, section.format("a") + f"[user:c]\npassword = x\n{other}\n")
    same = "[user:a]\npassword = x\nurl = /srv/a\n[user:b]\npassword = x\nurl = /srv/a/\n"
    assert len(assemble(tmp_path, same).vfses) == 2, "one store, however it is written"
    assert len(assemble(tmp_path, text + "cache_name = second\n").vfses) == 2


def test_check_config_looks_at_users_and_certificates(tmp_path: Path) -> None:
    ini = tmp_path / "a.ini"
    ini.write_text("[tls]\ncert = /none.pem\n[user:alice]\npassword_hash = x\n")
    ended = run_program("check-config", str(ini))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "argon2" in ended.stderr
    ini.write_text(f"[tls]\ncert = /none.pem\n[user:alice]\npassword_hash = {CHEAP.hash('x')}\n")
    assert "certificate '/none.pem': No such file" in run_program("check-config", str(ini)).stderr


# --- passwords


def test_a_password_is_hashed_from_standard_input_or_typed_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ftpvfs", "hash-password"]
    piped = subprocess.run(
        command, env=program_environment(), input="wonder land\n", capture_output=True, text=True, check=True
    )
    assert argon2.PasswordHasher().verify(piped.stdout.strip(), "wonder land")
    for second, status in ("wonder", 0), ("wander", 1):
        shown, found = typed(command, ["wonder", second])
        assert found == status
        assert "wonder" not in shown
        assert ("$argon2id$" in shown) == (status == 0)


def typed(command: list[str], lines: list[str]) -> tuple[str, int]:
    """What a program shows on a terminal on which these lines are typed, one to each question, and how it ends."""
    parent, child = os.openpty()
    process = subprocess.Popen(
        command, env=program_environment(), stdin=child, stdout=child, stderr=child, start_new_session=True
    )
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # the program has ended
        for number, line in enumerate(lines, 1):
            while shown.count(b": ") < number:  # what is typed before a question is thrown away
                shown += os.read(parent, 1000)
            os.write(parent, line.encode() + b"\n")
        while piece := os.read(parent, 1000):
            shown += piece
    os.close(parent)
    return shown.decode(), process.wait(30)


def test_hashes_of_every_cost_are_understood() -> None:
    authorizer = VFSAuthorizer()
    authorizer.add_user("cheap", None, password_hash=CHEAP.hash("a"))
    authorizer.add_user("dear", None, password_hash=hash_password("b"))
    authorizer.validate_authentication("cheap", "a", None)
    authorizer.validate_authentication("dear", "b", None)
    for user, password in [("cheap", "b"), ("dear", "a"), ("dear", ""), ("none", ""), ("none", "a")]:
        with pytest.raises(Exception, match="Authentication failed"):
            authorizer.validate_authentication(user, password, None)
    with pytest.raises(ValueError, match="argon2"):
        authorizer.add_user("wrong", None, password_hash="$1$abc")


def test_a_name_that_does_not_exist_costs_as_many_hashes_as_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    verify = argon2.PasswordHasher.verify

    def counting(self: Any, known: Any, secret: Any) -> bool:
        made.append(argon2.extract_parameters(known))
        return verify(self, known, secret)

    monkeypatch.setattr(argon2.PasswordHasher, "verify", counting)
    authorizer = VFSAuthorizer()
    authorizer.add_user("hashed", None, password_hash=CHEAP.hash("a"))
    authorizer.add_user("clear", "b")
    for user in ("hashed", "clear", "none"):
        with pytest.raises(Exception, match="Authentication failed"):
            authorizer.validate_authentication(user, "x", None)
    assert len(made) == 3
    assert len(set(map(str, made))) == 1
    authorizer.validate_authentication("hashed", "a", None)
    authorizer.validate_authentication("hashed", "a", None)  # remembered: clients open many connections
    assert len(made) == 4


def test_who_fails_costs_the_same_where_hashes_differ_in_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    verify = argon2.PasswordHasher.verify

    def counting(self: Any, known: Any, secret: Any) -> bool:
        made.append(str(argon2.extract_parameters(known)))
        return verify(self, known, secret)

    monkeypatch.setattr(argon2.PasswordHasher, "verify", counting)
    authorizer = VFSAuthorizer()
    dearer = argon2.PasswordHasher(time_cost=2, memory_cost=8, parallelism=1)
    authorizer.add_user("dear", None, password_hash=dearer.hash("a"))
    authorizer.add_user("cheap", None, password_hash=CHEAP.hash("a"))
    authorizer.add_user("clear", "b")
    costs = set()
    for user in ("dear", "cheap", "clear", "none"):
        made.clear()
        with pytest.raises(Exception, match="Authentication failed"):
            authorizer.validate_authentication(user, "x", None)
        costs.add(tuple(sorted(made)))
    assert len(costs) == 1
    assert len(costs.pop()) == 2


def test_a_session_of_an_embedding_program_may_have_its_own_vfs(
    make_vfs: Any, make_store: Any, ftp_server: Any
) -> None:
    common, own = make_store("memory"), make_store("local")
    vfs: VFS = make_vfs(own)
    authorizer = VFSAuthorizer()
    authorizer.add_user("alice", "a", perm="elradfmwMT", vfs=vfs)
    authorizer.add_user("bob", "b", perm="elradfmwMT")
    address = ftp_server(common, authorizer=authorizer)
    with connect(address, "alice", "a") as ftp:
        upload(ftp, "x", b"alice's")
    with connect(address, "bob", "b") as ftp:
        assert names(ftp) == set()
    assert own.read("x") == b"alice's"


def test_nobody_waits_while_a_password_is_checked(make_store: Any, ftp_server: Any) -> None:
    may_go_on = threading.Event()

    class Slow(VFSAuthorizer):
        lane = "logins"  # type: ignore[assignment]

        def validate_authentication(self, username: str, password: str, handler: Any) -> None:
            if username == "slow":
                assert may_go_on.wait(30)
            super().validate_authentication(username, password, handler)

    authorizer = Slow()
    authorizer.add_user("slow", "s", perm="elradfmwMT")
    authorizer.add_user("quick", "q", perm="elradfmwMT")
    address = ftp_server(make_store("memory"), authorizer=authorizer, server_class=VFSServer)
    with Client(timeout=30) as slow, Client(timeout=30) as gone:
        for ftp in (slow, gone):
            ftp.connect(*address)
            assert ftp.sendcmd("USER slow").startswith("331 ")
            ftp.putcmd("PASS s")
            ftp.putcmd("PWD")  # waits in order
        gone.close()
        with connect(address, "quick", "q") as quick:
            upload(quick, "a", b"x")
            assert names(quick) == {"a"}
        may_go_on.set()
        assert slow.getresp().startswith("230 ")
        assert slow.getresp().startswith("257 ")


# --- a program that knows the users

PROGRAM = """
import json, sys, pathlib
asked = json.load(sys.stdin)
with open("asked", "a") as log:
    log.write(asked["user"] + "\\n")
if asked["pass"] != "pass-" + asked["user"]:
    sys.exit("wrong password " + asked["pass"])
if asked["user"] == "broken":
    print("{'secret': 1")
elif asked["user"] == "nowhere":
    print(json.dumps({"type": "nosuch", "_root": ""}))
elif asked["user"] == "odd":
    print(json.dumps({"type": "local", "_root": 5, "secret": asked["pass"]}))
else:
    perm = "elr" if asked["user"] == "reader" else "elradfmwMT"
    root = pathlib.Path("shared" if asked["user"] in ("reader", "writer") else asked["user"]).resolve()
    root.mkdir(exist_ok=True)
    print(json.dumps({"type": "local", "_root": str(root), "_perm": perm, "sync": False}))
"""


@pytest.fixture
def proxied(launched: Any, tmp_path: Path) -> Any:
    (tmp_path / "users.py").write_text(PROGRAM)
    # Each worker asks for itself.
    return launched("--auth-proxy", f"{sys.executable} users.py", "-vv", "--workers", "1", cwd=tmp_path)


def test_a_program_says_who_has_which_store(proxied: Any, tmp_path: Path) -> None:
    for user in ("alice", "bob"):
        with connect(proxied.address, user, f"pass-{user}") as ftp:
            upload(ftp, "a", user.encode())
            assert names(ftp) == {"a"}
        assert (tmp_path / user / "a").read_bytes() == user.encode()
    with connect(proxied.address, "writer", "pass-writer") as writer:
        upload(writer, "shared", b"x")
        with connect(proxied.address, "reader", "pass-reader") as reader:
            assert download(reader, "shared") == b"x"
            with pytest.raises(ftplib.error_perm, match="550"):
                upload(reader, "a", b"")


def test_a_program_is_asked_once_in_a_while_and_each_time_for_what_it_refuses(proxied: Any, tmp_path: Path) -> None:
    for _ in range(3):
        connect(proxied.address, "alice", "pass-alice").close()
    for _ in range(2):
        refused(proxied.address, "alice", "secret-guess")
    connect(proxied.address, "alice", "pass-alice").close()
    assert (tmp_path / "asked").read_text().split() == ["alice"] * 3
    assert "secret-guess" not in proxied.log()
    assert "pass-alice" not in proxied.log()


@pytest.mark.parametrize(
    ("user", "reason"), [("broken", "its answer is no JSON"), ("odd", "has no _root"), ("nowhere", "nosuch")]
)
def test_a_program_that_fails_lets_nobody_in_and_tells_no_secret(proxied: Any, user: str, reason: str) -> None:
    unknown = refused(proxied.address, "nobody", "x")
    assert refused(proxied.address, user, f"pass-{user}") == unknown
    assert reason in proxied.log()
    assert "secret" not in proxied.log()
    assert f"pass-{user}" not in proxied.log()


class Session:
    """What an authorizer sees of a session."""

    remote_ip = "192.0.2.1"
    vfs: Any = None
    _closed = False

    def leave(self) -> None:
        self._closed = True

    def log_in(self, authorizer: ProxyAuthorizer, user: str) -> None:
        authorizer.validate_authentication(user, f"pass-{user}", self)
        self.vfs = authorizer.vfs_for(user, f"pass-{user}", self)


def test_stores_that_nobody_uses_any_more_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users.py").write_text(PROGRAM)
    options = vfs_options(cache_dir=str(tmp_path / "cache"))
    authorizer = ProxyAuthorizer(f"{sys.executable} users.py", options)
    first, second, third = Session(), Session(), Session()
    first.log_in(authorizer, "alice")
    second.log_in(authorizer, "bob")
    monkeypatch.setattr(auth_proxy, "KEPT", -1.0)  # all that nobody uses has been idle for long enough
    third.log_in(authorizer, "writer")
    assert {vfs.name for vfs in authorizer.vfses} == {first.vfs.name, second.vfs.name, third.vfs.name}
    first.leave()
    third.log_in(authorizer, "reader")
    assert first.vfs.name not in {vfs.name for vfs in authorizer.vfses}
    assert second.vfs in authorizer.vfses
    for vfs in authorizer.vfses:
        vfs.close()


def test_a_program_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    ended = run_program("--auth-proxy", "/no/such program", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "ftpvfs: --auth-proxy: there is no program '/no/such' that can be run\n"
    ended = run_program("--auth-proxy", "true", str(tmp_path))
    assert "--auth-proxy: leaves no room for a URL" in ended.stderr


@pytest.mark.parametrize(
    ("said", "url", "options"),
    [
        ({"type": "local", "_root": "/srv/a"}, "file:///srv/a", {}),
        ({"type": "s3", "_root": "bucket/a", "endpoint_url": "x"}, "s3://bucket/a", {"endpoint_url": "x"}),
        (
            {"type": "s3", "_root": "b", "provider": "AWS", "access_key_id": "k", "secret_access_key": "s"},
            "s3://b",
            {"key": "k", "secret": "s"},
        ),
        ({"type": "google cloud storage", "_root": "b"}, "gs://b", {}),
        (
            {"type": "sftp", "_root": "home", "_obscure": "pass", "user": "me", "pass": "p", "host": "h", "port": "2"},
            "sftp://h:2/home",
            {"username": "me", "password": "p"},
        ),
        ({"url": "s3://bucket/", "_root": "/a"}, "s3://bucket/a", {}),
        ({"url": "memory://", "_root": ""}, "memory://", {}),
    ],
)
def test_what_a_program_says_becomes_a_url_and_storage_options(said: Any, url: str, options: Any) -> None:
    answer = answer_of(said)
    assert (answer.url, answer.storage_options, answer.permissions) == (url, options, "elradfmwMT")


@pytest.mark.parametrize(
    "said",
    [[], {}, {"type": "s3"}, {"_root": "a"}, {"type": "s3", "_root": "a", "_user": "x"},
     {"type": "s3", "_root": "a", "_perm": "xyz"}, {"type": "s3", "_root": "a", "_name": "a/b"}],
)  # fmt: skip
def test_what_a_program_must_not_say_is_refused(said: Any) -> None:
    with pytest.raises(ValueError, match=r"has|is no"):
        answer_of(said)


def test_a_store_that_hangs_keeps_nobody_elses_login_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on, prepared = threading.Event(), []

    class Hanging(VFS):
        def prepare(self) -> None:
            prepared.append(self.name)
            assert "alice" not in self.name or may_go_on.wait(60)
            super().prepare()

    monkeypatch.setattr(auth_proxy, "VFS", Hanging)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users.py").write_text(PROGRAM)
    authorizer = ProxyAuthorizer(f"{sys.executable} users.py", vfs_options(cache_dir=str(tmp_path / "cache")))
    waiting = [Session(), Session()]
    threads = [threading.Thread(target=session.log_in, args=(authorizer, "alice")) for session in waiting]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(prepared) == 1)
    other = Session()
    other.log_in(authorizer, "bob")
    assert authorizer.vfses == (other.vfs,)
    may_go_on.set()
    for thread in threads:
        thread.join()
    assert len(prepared) == 2
    assert waiting[0].vfs is waiting[1].vfs is not None
    for vfs in authorizer.vfses:
        vfs.close()


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("while True: print('y' * 1000)", "more than 64 KiB"),
        ("while True: print('y' * 1000, file=sys.stderr)", "more than 64 KiB"),
        # the program under test is one that hangs: it sleeps, the test does not
        ("time.sleep(600)", "no answer within"),
        ("os.close(1); os.close(2); time.sleep(600)", "no answer within"),
        ("print('[' * 60_000)", "is no JSON"),
        ("print(json.dumps({'url': 'file://', '_root': '/', '_name': '../a'}))", "has a _name"),
    ],
)
def test_a_program_that_goes_wrong_is_ended_and_lets_nobody_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, does: str, reason: str
) -> None:
    monkeypatch.setattr(auth_proxy, "PATIENCE", 5.0 if "sleep" in does else 60.0)
    program = tmp_path / "wrong.py"
    pid = tmp_path / "pid"
    program.write_text(f"import json, os, sys, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n{does}\n")
    authorizer = ProxyAuthorizer(f"{sys.executable} {program}", vfs_options(cache_dir=str(tmp_path / "cache")))
    with pytest.raises(Exception, match="Authentication failed"):
        authorizer.validate_authentication("alice", "x", Session())
    assert reason in caplog.text
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_password_that_a_program_repeats_in_any_form_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "echo.py"
    program.write_text("import json, sys\nasked = sys.stdin.read()\nsys.exit(asked + repr(json.loads(asked)))\n")
    authorizer = ProxyAuthorizer(f"{sys.executable} {program}", vfs_options(cache_dir=str(tmp_path / "cache")))
    caplog.set_level("DEBUG")
    with pytest.raises(Exception, match="Authentication failed"):
        authorizer.validate_authentication("alice", 'sésame"ouvre', Session())
    assert "alice" in caplog.text
    assert "ouvre" not in caplog.text
