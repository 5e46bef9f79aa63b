"""`python -m ftpvfs` as a process: what it serves, how it ends, and the one line with which it refuses."""

from __future__ import annotations

import contextlib
import ftplib
import json
import re
import signal
import socket
from pathlib import Path

import pytest

from ftpvfs.config import Address, load
from ftpvfs.launch import open_to_all
from tests.conftest import (
    Launched,
    connect,
    download,
    free_ports,
    names,
    reply,
    run_program,
    upload,
    wait_until,
)

HOST = "127.0.0.1"
DATA = bytes(range(256)) * 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


def refused(*arguments: str, status: int, **keywords) -> str:
    """The one line on stderr with which the program ends."""
    ended = run_program(*arguments, **keywords)
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    assert re.fullmatch(r"ftpvfs: .+\n", ended.stderr)
    return ended.stderr


def is_listening(server: Launched) -> bool:
    with socket.socket() as client:
        return client.connect_ex(server.address) == 0


# --- serving


def test_the_current_folder_is_served_without_any_option(launched, folder):
    server = launched(cwd=folder)
    with connect(server.address) as ftp:
        upload(ftp, "a.bin", DATA)
        assert (folder / "a.bin").read_bytes() == DATA
        assert download(ftp, "a.bin") == DATA
        assert names(ftp) == {"a.bin"}


def test_the_line_says_what_is_served_where(launched, folder):
    server = launched(str(folder), "--addr", "localhost:0", "--workers", "1")
    assert server.address[0] == HOST  # a name prefers IPv4, which clients that know PASV alone need
    assert server.line.endswith(f"at ftp://{HOST}:{server.address[1]} (cache mode off, TLS off, 1 worker)")
    assert folder.name in server.line


def test_it_listens_on_ipv6(launched, folder):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
    server = launched("serve", str(folder), "--addr", "[::1]:0")
    with connect(server.address) as ftp:
        upload(ftp, "a", b"6")
        assert download(ftp, "a") == b"6"


def test_an_ini_file_configures_it(launched, folder, tmp_path):
    ini = tmp_path / "ftpvfs.ini"
    ini.write_text(
        f"[server]\naddr = {HOST}:1  ; the flag wins\nuser = alice\npass = a#b\n"
        f"[backend]\nurl = {folder}\n[vfs]\nread_only = true\n"
    )
    (folder / "a").write_bytes(b"ini")
    server = launched("--config", str(ini), "--addr", f"{HOST}:0")
    with connect(server.address, "alice", "a#b") as ftp:
        assert download(ftp, "a") == b"ini"


def test_variables_configure_it(launched, folder):
    server = launched(env={"FTPVFS_URL": str(folder), "FTPVFS_USER": "alice", "FTPVFS_PASS": "secret"})
    with connect(server.address, "alice", "secret") as ftp:
        upload(ftp, "a", b"env")
    assert (folder / "a").read_bytes() == b"env"


@pytest.mark.parametrize(
    ("user", "password"), [("alice", "wrong"), ("alice", ""), ("anonymous", "secret"), ("bob", "secret")]
)
def test_only_the_user_with_the_password_comes_in(launched, folder, user, password):
    server = launched(str(folder), "--user", "alice", "--pass", "secret")
    with pytest.raises(ftplib.error_perm, match=r"^530"):
        connect(server.address, user, password)


def test_a_password_holds_for_the_user_called_anonymous_too(launched, folder):
    server = launched(str(folder), "--pass", "secret")
    connect(server.address, "anonymous", "secret").close()
    with pytest.raises(ftplib.error_perm, match=r"^530"):
        connect(server.address, "anonymous", "guest")


def test_without_a_password_any_is_right(launched, folder):
    server = launched(str(folder), "--user", "alice")
    connect(server.address, "alice", "whatever").close()
    with pytest.raises(ftplib.error_perm, match=r"^530"):
        connect(server.address, "bob", "whatever")


def test_read_only_refuses_every_change(launched, folder):
    (folder / "a").write_bytes(b"old")
    server = launched(str(folder), "--read-only")
    with connect(server.address) as ftp:
        for change in ("DELE a", "MKD b", "RNFR a", "MFMT 20200101000000 a"):
            with pytest.raises(ftplib.error_perm, match=r"^55"):
                ftp.voidcmd(change)
        with pytest.raises(ftplib.error_perm, match=r"^55"):
            upload(ftp, "a", b"new")
        assert download(ftp, "a") == b"old"


def test_passive_connections_use_the_range_and_the_public_address(launched, folder):
    [port] = free_ports(1)
    server = launched(str(folder), "--passive-port", str(port), "--public-ip", "203.0.113.7")
    with connect(server.address) as ftp:
        assert f"203,0,113,7,{port // 256},{port % 256}" in ftp.sendcmd("PASV")


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0_and_frees_the_port(launched, folder, number):
    server = launched(str(folder))
    with contextlib.closing(connect(server.address)) as ftp:
        upload(ftp, "a", DATA)
        assert server.stop(number) == 0
    assert not is_listening(server)
    assert "Traceback" not in server.log()


def test_a_second_server_may_take_the_port_at_once(launched, folder):
    first = launched(str(folder))
    with contextlib.closing(connect(first.address)):
        first.stop()
    second = launched(str(folder), "--addr", f"{HOST}:{first.address[1]}")
    assert second.address == first.address


def test_hangup_makes_it_see_what_others_changed(launched, folder):
    server = launched(str(folder), "--dir-cache-time", "off", "--poll-interval", "off")
    with connect(server.address) as ftp:
        assert names(ftp) == set()
        (folder / "new").write_bytes(b"")
        assert names(ftp) == set()  # the listing is cached for ever
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: names(ftp) == {"new"})
    assert server.stop() == 0


# --- refusals


def test_an_address_in_use_is_refused(folder):
    with socket.create_server((HOST, 0)) as taken:
        address = f"{HOST}:{taken.getsockname()[1]}"
        assert f"cannot listen on {address}: Address already in use" in refused(
            str(folder), "--addr", address, status=1
        )


def test_an_address_of_another_machine_is_refused(folder):
    assert "cannot listen on 203.0.113.7:2121" in refused(str(folder), "--addr", "203.0.113.7:2121", status=1)


def test_a_missing_folder_is_refused(tmp_path):
    assert "nowhere" in refused(str(tmp_path / "nowhere"), "--addr", f"{HOST}:0", status=1)


def test_an_unknown_protocol_is_refused():
    assert "s4" in refused("s4://bucket", "--addr", f"{HOST}:0", status=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vfs-cache-mod", "full"], "--vfs-cache-mode"),
        (["--addr", "nowhere"], "--addr: 'nowhere' has no port"),
        (["--config", "/does/not/exist.ini"], "/does/not/exist.ini: No such file"),
        (["--log-file", "/does/not/exist/log"], "/does/not/exist/log"),
        (["one", "two"], "more than one URL"),
    ],
)
def test_bad_options_are_refused_with_status_2(arguments, words):
    assert words in refused(*arguments, status=2)


def test_a_bad_variable_is_refused_with_status_2():
    assert "FTPVFS_UMASK: 'rwx'" in refused(status=2, env={"FTPVFS_UMASK": "rwx"})


def test_secrets_of_a_refused_start_are_not_shown():
    words = refused(
        "s4://me:hunter2@bucket",
        "--pass",
        "hunter2",
        "--option",
        "secret=hunter2",
        "--addr",
        f"{HOST}:0",
        status=1,
    )
    assert "hunter2" not in words


# --- a store that does not answer


def store_options(port: int) -> list[str]:
    options = {"endpoint_url": f"http://{HOST}:{port}", "key": "k", "secret": "hunter2"}
    return ["s3://bucket", *(f"--option={key}={value}" for key, value in options.items())]


def test_an_unreachable_store_is_a_warning_only(launched):
    [port] = free_ports(1)
    server = launched(*store_options(port), "--low-level-retries", "1")
    connect(server.address).close()
    wait_until(lambda: "WARNING: s3://bucket" in server.log(), timeout=20)
    assert "hunter2" not in server.log()
    assert server.stop() == 0


def test_a_store_that_hangs_delays_neither_start_nor_end_for_long(launched):
    with socket.create_server((HOST, 0)) as silent:
        server = launched(*store_options(silent.getsockname()[1]), "-vv")
        connect(server.address).close()
        assert "no answer" not in server.log()
        wait_until(lambda: "no answer for 5 s" in server.log(), timeout=30)
        assert server.stop(timeout=15) == 0
    assert "hunter2" not in server.log()


def test_an_sftp_server_that_is_silent_or_not_there_delays_neither_the_start_nor_the_stop(launched):
    with socket.create_server((HOST, 0)) as silent:
        [nobody] = free_ports(1)
        for port in (silent.getsockname()[1], nobody):
            server = launched(f"sftp://user@{HOST}:{port}/folder", "--workers", "2")
            assert "sftp://" in server.line
            assert server.stop() == 0


# --- the log


def test_by_default_the_log_holds_warnings_alone(launched, folder):
    server = launched(str(folder), env={"FTPVFS_SERVICE_HOST": "10.0.0.1"})
    with connect(server.address) as ftp:
        upload(ftp, "a", b"")
    assert server.stop() == 0
    [line] = server.log().splitlines()
    assert "WARNING: the variable FTPVFS_SERVICE_HOST" in line


def test_the_log_goes_to_a_file_and_shows_commands_but_no_password(launched, folder, tmp_path):
    log = tmp_path / "log"
    server = launched(str(folder), "--log-file", str(log), "-vv", "--user", "alice", "--pass", "hunter2")
    with connect(server.address, "alice", "hunter2") as ftp:
        upload(ftp, "a", b"")
        reply(ftp, "SIZE \x1b[2Jb")
    assert server.stop() == 0
    assert server.log() == ""
    assert "STOR" in log.read_text()
    assert "\x1b" not in log.read_text()  # a client cannot play tricks on whoever reads the log
    assert "hunter2" not in log.read_text()


@pytest.mark.parametrize(
    ("argv", "host", "words"),
    [
        ([], "127.0.0.1", ""),
        ([], "::1", ""),
        (["--pass", "x"], "0.0.0.0", ""),
        ([], "0.0.0.0", "0.0.0.0:21 as anonymous may read, change and delete everything"),
        (["--user", "me", "--read-only"], "::", "[::]:21 as me may read everything"),
    ],
)
def test_it_warns_where_others_come_in_without_a_password(argv, host, words):
    warning = open_to_all(load(argv, {}), Address(host, 21))
    assert words in warning
    assert bool(warning) is bool(words)


# --- the small commands


def test_version_and_help():
    version = run_program("--version")
    assert (version.returncode, version.stderr) == (0, "")
    assert re.fullmatch(r"ftpvfs \d+\.\d+.*\n", version.stdout)
    usage = run_program("-h")
    assert (usage.returncode, usage.stderr) == (0, "")
    assert "--vfs-read-chunk-size SizeSuffix" in usage.stdout


def test_check_config_says_ok_or_all_that_is_wrong(tmp_path):
    ini = tmp_path / "ftpvfs.ini"
    ini.write_text("[server]\naddr = :2121\n")
    good = run_program("check-config", str(ini))
    assert (good.returncode, good.stdout, good.stderr) == (0, "ok\n", "")

    ini.write_text("[server]\naddr = 2121\nusr = me\npass = hunter2\n")
    bad = run_program("check-config", str(ini))
    assert (bad.returncode, bad.stdout) == (2, "")
    first, second = bad.stderr.splitlines()
    assert first.startswith(f"ftpvfs: {ini}:2: addr in [server]: '2121' has no port")
    assert second.startswith(f"ftpvfs: {ini}:3: usr in [server]: unknown key; the nearest known one is user")


def test_files_that_wait_in_a_cache_which_nobody_serves_are_told_of(launched, tmp_path, make_vfs, local_store):
    vfs = make_vfs(local_store, cache_mode="writes", cache_dir=tmp_path / "cache", write_back="1h", name="before")
    with vfs.open("a", "wb") as file:
        file.write(b"12345")
    vfs.close()
    for mode in ("off", "full"):
        flags = ["--cache-dir", str(tmp_path / "cache"), "--vfs-cache-mode", mode, "--workers", "1"]
        server = launched(local_store.root, *flags)
        wait_until(lambda server=server: "1 files (5B)" in server.log())
        assert "--name before" in server.log()
        server.stop()
    server = launched(local_store.root, *flags, "--name", "before", "--vfs-write-back", "0s")
    wait_until(lambda: local_store.list() == {"a"})
    assert "wait in the cache" not in server.log()


def test_the_log_is_json_where_asked_for(launched, folder):
    server = launched(str(folder), "--log-format", "json", "-v", "--workers", "1")
    with connect(server.address) as ftp:
        upload(ftp, 'a "name" \u2603', b"x")
    assert server.stop() == 0
    entries = [json.loads(line) for line in server.log().splitlines()]
    assert all(set(entry) == {"time", "level", "msg", "source"} for entry in entries)
    assert any('STOR /a "name" \u2603' in entry["msg"] and entry["level"] == "info" for entry in entries)
