"""Every command, and every way in which it ends: its exit status, and that its last line is true."""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ftpvfs.cli import main
from tests.certificates import write_certificate
from tests.conftest import ROOT, connect, names, program_environment, upload, wait_until
from tests.servers import HOST, free_ports

OUT, ERR = "stdout", "stderr"
ANY = ("--addr", f"{HOST}:0")


class Ended(NamedTuple):
    """How the program has ended, with the names that a finished process has."""

    returncode: int
    stdout: str
    stderr: str


class End(NamedTuple):
    """A command line, its exit status, and a pattern for its last line, which is on one of the two streams."""

    line: str
    status: int
    stream: str
    last: str


# {folder} is served, {none} is not there, {good} and {bad} are ini files.
ENDS = [
    End("version", 0, OUT, r"ftpvfs \d+\.\d+"),
    End("--version", 0, OUT, r"ftpvfs \d+\.\d+"),
    End("version more", 2, ERR, "version: takes nothing more"),
    End("help", 0, OUT, "--help"),
    End("--help", 0, OUT, "--help"),
    End("help cache", 0, OUT, "help cache ls"),
    End("help statsu", 2, ERR, "'statsu' is no command"),
    End("help cache lst", 2, ERR, "'lst' is no command; the nearest one is cache ls"),
    End("status", 2, ERR, "'status' is no command, and no folder here"),
    End("sevre", 2, ERR, "'sevre' is no command, and no folder here; the nearest is serve"),
    End("serve status", 1, ERR, "No such file or directory: .*/status"),
    End("{none}", 1, ERR, "No such file or directory: {none}"),
    End("{good}", 1, ERR, "Not a directory: {good}"),
    End("s3://", 1, ERR, "names no bucket"),
    End("gs://", 1, ERR, "names no bucket"),
    End("foo://x", 1, ERR, "foo:// is no protocol"),
    End("zip://x.zip", 2, ERR, "zip:// does not say which fo"),
    End("zip::{none}", 1, ERR, "No such file or directory: {none}"),
    End("one two", 2, ERR, "more than one URL"),
    End("{folder} --read-onyl", 2, ERR, "the nearest known one is --read-only"),
    End("check-config", 2, ERR, "name one ini file"),
    End("check-config {none}", 2, ERR, "{none}: No such file"),
    End("check-config {good}", 0, OUT, "ok"),
    End("check-config {bad}", 2, ERR, "{bad}:2: usr in .server."),
    End("check-config {good} --read-only", 2, ERR, "--read-only: check-config takes no flags"),
    End("check-config {good} --config {good}", 2, ERR, "--config: check-config takes no flags"),
    End("hash-password", 1, ERR, "an empty password"),
    End("hash-password -v", 2, ERR, "--verbose: hash-password takes no flags"),
    End("hash-password hunter2", 2, ERR, "asks for the password"),
    End("cache", 2, ERR, "say what to do"),
    End("cache lst", 2, ERR, "say what to do"),
    End("cache ls foo://x", 1, ERR, "foo:// is no protocol"),
    End("cache flush s3://", 1, ERR, "names no bucket"),
    End("cache ls {folder}", 1, ERR, "{folder}: there is no cache .*/caches/"),
    End("cache ls {folder} --json", 1, ERR, "{folder}: there is no cache .*/caches/"),
    End("cache verify {folder}", 1, ERR, "{folder}: there is no cache .*/caches/"),
    End("cache flush {folder}", 1, ERR, "{folder}: there is no cache .*/caches/"),
    End("cache flush {folder} --name phtos", 1, ERR, "{folder}: there is no cache .*/caches/phtos"),
    End("cache flush {folder} --option snyc=true", 2, ERR, "the nearest known one is sync"),
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    """run(*arguments, cwd=...) -> Ended: the program in this process, which starts in no time."""
    loggers = [logging.getLogger(name) for name in (None, "ftpvfs", "pyftpdlib")]
    before = [(each, each.level, each.handlers[:]) for each in loggers]

    def run(*arguments: str, cwd: Path) -> Ended:
        monkeypatch.chdir(cwd)
        status = main(arguments)
        said = capsys.readouterr()
        return Ended(status, said.out, said.err)

    yield run
    for each, level, handlers in before:
        each.setLevel(level)
        each.handlers[:] = handlers


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """What the command lines name; the folder for caches is `FTPVFS_CACHE_DIR`."""
    for name in ("folder", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "good.ini").write_text("[server]\naddr = :2121\n")
    (tmp_path / "bad.ini").write_text("[server]\nusr = me\n")
    names = {"folder": "folder", "none": "none", "good": "good.ini", "bad": "bad.ini"}
    return {name: str(tmp_path / place) for name, place in names.items()}


@pytest.mark.parametrize("end", ENDS, ids=[end.line for end in ENDS])
def test_a_command_ends_with_its_status_and_one_true_line(
    end: End, places: dict[str, str], tmp_path: Path, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTPVFS_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    words = end.line.format(**places).split()
    addr = ANY if "serve" in words or "://" in end.line or end.line.startswith("{") or "zip::" in end.line else ()
    is_served = words[0] not in ("cache", "check-config", "hash-password", "help", "version")
    ended = run(*words, *(addr if is_served else ()), cwd=tmp_path / "work")
    assert ended.returncode == end.status, ended.stderr
    last = getattr(ended, end.stream).splitlines()[-1]
    pattern = end.last.format(**{name: re.escape(place) for name, place in places.items()})
    assert re.search(pattern, last), last
    assert end.stream == ERR or ended.stderr == ""
    assert not (tmp_path / "caches").exists()  # whoever only looks makes none


WITH_HELP = ["check-config", "cache", "cache ls", "cache verify", "cache flush", "hash-password"]


@pytest.mark.parametrize("command", WITH_HELP)
@pytest.mark.parametrize("form", ["{} --help", "help {}", "-h {}"])
def test_each_command_has_a_help_of_its_own(
    command: str, form: str, run: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = run(*form.format(command).split(), cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"  ftpvfs {command}" in ended.stdout.splitlines()[1]
    assert "--addr" not in ended.stdout
    assert ("--cache-dir" in ended.stdout) == (command.startswith("cache "))
    assert ("--json" in ended.stdout) == (command == "cache ls")


# --- what check-config says, and what serve does


def ini_bodies(tmp_path: Path) -> dict[str, str]:
    """Configurations that cannot be served, by what is wrong with them."""
    cert = write_certificate(tmp_path / "cert.pem")
    (tmp_path / "file").write_text("")
    (tmp_path / "caches" / "inside").mkdir(parents=True)
    module = tmp_path / "mine.py"
    module.write_text(
        "from pyftpdlib.authorizers import DummyAuthorizer\n"
        "class Broken(DummyAuthorizer):\n    def __init__(self):\n        raise OSError('no directory service')\n"
    )
    backend = "[backend]\nurl = "
    return {
        "no bucket": f"{backend}s3://\n",
        "unknown protocol": f"{backend}foo://x\n",
        "missing folder": f"{backend}{tmp_path}/none\n",
        "a file": f"{backend}{tmp_path}/file\n",
        "misspelt option": f"{backend}s3://b\nendpiont_url = http://127.0.0.1:1\n",
        "misspelt option inside": f'{backend}s3://b\nclient_kwargs = {{"endpiont_url": "x"}}\n',
        "option of no such type": f"{backend}s3://b\nanon = maybe\n",
        "missing archive": f"{backend}zip::{tmp_path}/none.zip\n",
        "missing certificate": f"[tls]\ncert = {tmp_path}/none.pem\n",
        "broken certificate": f"[tls]\ncert = {tmp_path}/file\n",
        "another's key": f"[tls]\ncert = {cert}\nkey = {tmp_path}/file\n",
        "cache of a store that is not shared": f"{backend}memory://\n[vfs]\ncache_mode = full\n",
        "cache folder that is a file": f"[vfs]\ncache_mode = full\ncache_dir = {tmp_path}/file\n",
        "served cache": f"{backend}{tmp_path}/caches/inside\n[vfs]\ncache_dir = {tmp_path}/caches\n",
        "log in no folder": f"[log]\nfile = {tmp_path}/none/log\n",
        "authorizer that cannot be made": "[server]\nauthorizer = mine:Broken\n",
        "authorizer that is none": "[server]\nauthorizer = json:dumps\n",
        "no such program": "[server]\nauth_proxy = /no/such/program\n",
        "user's store without a bucket": "[user:a]\npassword = x\nurl = s3://\n",
        "user's misspelt option": "[user:a]\npassword = x\nurl = s3://b\noption.endpiont_url = x\n",
        "events without a cache": "[vfs]\non_stored = true\n",
        "empty home": "[user:a]\npassword = x\nhome =\n",
    }


BODIES = [
    "no bucket", "unknown protocol", "missing folder", "a file", "misspelt option", "misspelt option inside",
    "option of no such type", "missing archive", "missing certificate", "broken certificate", "another's key",
    "cache of a store that is not shared", "cache folder that is a file", "served cache", "log in no folder",
    "authorizer that cannot be made", "authorizer that is none", "no such program", "user's store without a bucket",
    "user's misspelt option", "events without a cache", "empty home",
]  # fmt: skip


@pytest.mark.parametrize("wrong", BODIES)
def test_check_config_refuses_what_serve_refuses_in_the_same_words(
    wrong: str, tmp_path: Path, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    bodies = ini_bodies(tmp_path)
    assert list(bodies) == BODIES
    ini = tmp_path / "work.ini"
    ini.write_text(bodies[wrong])
    before = sorted(tmp_path.rglob("*"))
    checked = run("check-config", str(ini), cwd=tmp_path)
    assert (checked.returncode, checked.stdout) == (2, ""), checked.stderr
    assert sorted(tmp_path.rglob("*")) == before  # looking makes nothing
    served = run("--config", str(ini), *ANY, "--workers", "1", cwd=tmp_path)
    assert served.returncode in (1, 2)
    assert served.stdout == ""
    assert served.stderr.splitlines()[-1] == checked.stderr.splitlines()[-1]


def test_check_config_warns_of_a_users_store_that_is_not_there(tmp_path: Path, run: Callable[..., Ended]) -> None:
    ini = tmp_path / "work.ini"
    ini.write_text(f"[user:a]\npassword = x\n[user:b]\npassword = x\nurl = {tmp_path}/none\n")
    checked = run("check-config", str(ini), cwd=tmp_path)
    assert (checked.returncode, checked.stdout) == (0, "ok\n")
    assert re.fullmatch(r"ftpvfs: warning: .*No such file or directory: .*/none\n", checked.stderr)


def test_check_config_says_ok_to_a_cache_folder_that_nobody_needs(tmp_path: Path, run: Callable[..., Ended]) -> None:
    (tmp_path / "file").write_text("")
    ini = tmp_path / "work.ini"
    ini.write_text(f"[server]\nworkers = 1\n[vfs]\ncache_dir = {tmp_path}/file\n")
    assert run("check-config", str(ini), cwd=tmp_path) == (0, "ok\n", "")
    ini.write_text(ini.read_text().replace("= 1", "= 2"))
    refused = run("check-config", str(ini), cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.endswith("several workers need one (--cache-dir), --workers 1 does not\n")


def test_check_config_sees_that_a_cache_waits_for_another_store(
    tmp_path: Path, make_vfs: Callable[..., Any], make_store: Callable[..., Any], run: Callable[..., Ended]
) -> None:
    first, second = make_store("local"), make_store("local")
    options = {"cache_mode": "writes", "cache_dir": tmp_path / "caches", "write_back": "1h", "name": "photos"}
    vfs = make_vfs(first, **options)
    with vfs.open("a", "wb") as file:
        file.write(b"x")
    vfs.close()
    ini = tmp_path / "work.ini"
    ini.write_text(f"[backend]\nurl = {second.url}\n[vfs]\nname = photos\ncache_dir = {tmp_path}/caches\n")
    checked = run("check-config", str(ini), cwd=tmp_path)
    served = run("--config", str(ini), *ANY, "--workers", "1", cwd=tmp_path)
    assert (checked.returncode, served.returncode) == (2, 1)
    assert "1 changes in this cache wait for file://" in checked.stderr
    assert served.stderr.splitlines()[-1] == checked.stderr.splitlines()[-1]


# --- a server that is stopped


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_that_stops_while_files_wait_says_so_by_its_status_and_last_line(
    workers: str, launched: Any, tmp_path: Path
) -> None:
    [nobody] = free_ports(1)
    log = tmp_path / "log"
    options = [
        "s3://bucket", f"--option=endpoint_url=http://{HOST}:{nobody}", "--option=key=k", "--option=secret=s",
        "--vfs-cache-mode", "writes", "--cache-dir", str(tmp_path / "caches"), "--name", "photos",
        "--drain-timeout", "100ms", "--low-level-retries", "1", "--workers", workers,
    ]  # fmt: skip
    server = launched(*options)
    with connect(server.address) as ftp:
        upload(ftp, "a", b"12345")
    assert server.stop() == 3
    said = f"stopped while 1 files (5B) wait in {tmp_path}/caches/photos; the next start goes on to store them"
    assert server.log().splitlines()[-1].endswith(f"WARNING: {said}")

    again = launched(*options, "--log-file", str(log))
    assert again.stop() == 3
    assert again.log() == f"ftpvfs: {said}\n"
    assert log.read_text().splitlines()[-1].endswith(f"WARNING: {said}")


def test_a_server_whose_files_another_one_stores_has_left_nothing(launched: Any, tmp_path: Path) -> None:
    [nobody] = free_ports(1)
    options = [
        "s3://bucket", f"--option=endpoint_url=http://{HOST}:{nobody}", "--option=key=k", "--option=secret=s",
        "--vfs-cache-mode", "writes", "--cache-dir", str(tmp_path / "caches"), "--drain-timeout", "100ms",
        "--low-level-retries", "1", "--workers", "1",
    ]  # fmt: skip
    first, second = launched(*options), launched(*options)
    with connect(first.address) as ftp:
        upload(ftp, "a", b"12345")
    assert first.stop() == 0
    assert "wait in" not in first.log()
    assert second.stop() == 3


def test_a_server_that_has_stored_all_ends_with_0(launched: Any, tmp_path: Path, places: dict[str, str]) -> None:
    flags = ["--vfs-cache-mode", "writes", "--cache-dir", str(tmp_path / "caches"), "--vfs-write-back", "1h"]
    server = launched(places["folder"], *flags)
    with connect(server.address) as ftp:
        upload(ftp, "a", b"12345")
    assert server.stop() == 0
    assert Path(places["folder"], "a").read_bytes() == b"12345"


# --- interrupted, and unread


def hear_interrupts() -> None:
    """A program that is started in the background, as the tests may be, ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_password_that_is_not_typed_is_none() -> None:
    for typed, status, words in ((b"\x04", 1, b"ftpvfs: no password was given"), (None, 130, b"ftpvfs: interrupted")):
        parent, child = os.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "ftpvfs", "hash-password"],
            env=program_environment(), stdin=child, stdout=child, stderr=child, start_new_session=True,
            preexec_fn=hear_interrupts,
        )  # fmt: skip
        os.close(child)
        shown = b""
        while b"Password: " not in shown:
            shown += os.read(parent, 1000)
        if typed is None:
            process.send_signal(signal.SIGINT)
        else:
            os.write(parent, typed)
        assert process.wait(60) == status
        while words not in shown:
            shown += os.read(parent, 1000)
        os.close(parent)
        assert b"Traceback" not in shown


def test_a_command_that_waits_for_a_store_can_be_interrupted(
    tmp_path: Path, make_vfs: Callable[..., Any], make_store: Callable[..., Any]
) -> None:
    with socket.create_server((HOST, 0)) as silent:
        port = silent.getsockname()[1]
        options = {"endpoint_url": f"http://{HOST}:{port}", "key": "k", "secret": "s"}
        folder = tmp_path / "caches"
        place = make_store("s3")
        vfs = make_vfs(place, cache_mode="writes", cache_dir=folder, name="photos", write_back="1h")
        with vfs.open("a", "wb") as file:
            file.write(b"x")
        vfs.close()
        process = subprocess.Popen(
            [sys.executable, "-m", "ftpvfs", "cache", "flush", place.url, "--cache-dir", str(folder),
             "--name", "photos", *(f"--option={name}={value}" for name, value in options.items())],
            env=program_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=hear_interrupts,
        )  # fmt: skip
        silent.settimeout(60)
        with silent.accept()[0]:  # the store has been asked, and says nothing
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "ftpvfs: interrupted"
    assert "Traceback" not in said


def test_output_that_nobody_reads_or_that_has_no_room_is_no_success(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    unread = _piped("help", writer)
    os.close(writer)
    assert (unread.returncode, unread.stderr) == (141, "")
    with open("/dev/full", "wb") as full:
        no_room = _piped("hash-password", full.fileno())
    assert (no_room.returncode, no_room.stderr) == (1, "ftpvfs: No space left on device\n")


def _piped(command: str, stdout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ftpvfs", command],
        env=program_environment(), input="secret\n", stdout=stdout, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip


# --- a user id without a name, as in a container


NAMELESS = 54321


@pytest.fixture
def nameless() -> Callable[..., subprocess.Popen[str]]:
    """nameless(*arguments) -> the program, run by a user who has neither a name nor a home folder."""
    environment = program_environment()
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        environment.pop(name, None)
    wrap, options = _how_to_be_nameless()

    def run(*arguments: str, **keywords: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*wrap, sys.executable, "-m", "ftpvfs", *arguments],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd="/", **options, **keywords,
        )  # fmt: skip

    return run


@functools.cache
def _how_to_be_nameless() -> tuple[list[str], dict[str, Any]]:
    """Return what stands before the command, and arguments of Popen; skip where neither way is open."""
    probe = [sys.executable, "-c", "import ftpvfs.cli"]
    drop = {"user": NAMELESS, "group": NAMELESS, "extra_groups": []}
    environment = program_environment()
    for wrap, options in (([], drop), (["unshare", "--user", f"--map-user={NAMELESS}"], {})):
        try:
            subprocess.run([*wrap, *probe], check=True, capture_output=True, env=environment, cwd="/", **options)
        except (OSError, subprocess.CalledProcessError):
            continue
        return wrap, options
    pytest.skip("needs root and an interpreter that others may run, or user namespaces")


@pytest.mark.parametrize(
    ("line", "status", "last"),
    [
        ("version", 0, r"ftpvfs \d"),
        ("help", 0, "--help"),
        ("hash-password", 1, "an empty password"),
        ("status", 2, "is no command"),
        ("/", 2, r"--cache-dir: user \d+ has no home folder for the cache; write --cache-dir FOLDER"),
        ("cache ls /", 2, "write --cache-dir FOLDER"),
        ("check-config {ini}", 2, "write --cache-dir FOLDER"),
        ("/ --cache-dir ~/x", 2, "--cache-dir: '~/x' begins with a home folder that is not known"),
        ("cache ls / --cache-dir {none}", 1, "there is no cache {none}"),
    ],
)
def test_a_user_without_a_name_and_a_home_is_told_what_to_write(
    line: str, status: int, last: str, nameless: Any, tmp_path: Path
) -> None:
    ini = ROOT / "setup.cfg"  # whose sections are unknown; it can be read by everybody who can read the program
    with nameless(*line.format(ini=ini, none=tmp_path / "none").split(), *(ANY if line[0] == "/" else ())) as process:
        out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert process.returncode == status, err
    if "{ini}" not in line:
        assert re.search(last.format(none=re.escape(str(tmp_path / "none"))), (out + err).splitlines()[-1])


def test_a_user_without_a_name_and_a_home_can_serve(nameless: Any) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # others cannot look into pytest's own
        os.chmod(folder, 0o777)
        served = Path(folder, "served")
        served.mkdir()
        os.chmod(served, 0o777)
        process = nameless(str(served), *ANY, "--cache-dir", f"{folder}/caches", "--workers", "1")
        try:
            port = int(re.search(r":(\d+) \(", process.stdout.readline())[1])  # type: ignore[index]
            with connect((HOST, port)) as ftp:
                upload(ftp, "a", b"x")
                lines: list[str] = []
                ftp.retrlines("LIST", lines.append)
                assert names(ftp) == {"a"}
            assert len(lines) == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.communicate()
    wait_until(lambda: process.returncode is not None)
