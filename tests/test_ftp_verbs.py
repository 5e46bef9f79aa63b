"""Every verb, with arguments that are right, wrong and missing, in each state of a session: its code, and what it did.

A 2xx reply says that something was done; here it is looked at whether it was.
"""

from __future__ import annotations

import ftplib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer

from tests.conftest import Store, connect, download, last_reply, open_transfer, reply, upload
from tests.downloads import Client
from tests.servers import HOST

Serve = Callable[..., tuple[str, int]]
Address = tuple[str, int]
DATA = b"0123456789\r\n" * 10


@pytest.fixture
def store(local_store: Store) -> Store:
    local_store.write("a", DATA)
    local_store.write("in/a.csv", b"1")
    local_store.write("in/b.csv", b"2")
    local_store.write("in/c.txt", b"3")
    os.mkdir(local_store.path("empty"))
    return local_store


@pytest.fixture
def address(store: Store, ftp_server: Serve) -> Address:
    return ftp_server(store, attributes={"auth_failed_timeout": 0.001})


@pytest.fixture
def ftp(address: Address) -> Iterator[ftplib.FTP]:
    with connect(address) as client:
        yield client


# line: its code before the login, after it, and while a file is being sent (to `new`)
VERBS: dict[str, tuple[int, int, int]] = {
    # RFC 959, access control
    "USER": (501, 501, 501),
    "USER anonymous": (331, 331, 331),
    "PASS": (503, 503, 503),
    "PASS x": (503, 503, 503),
    "ACCT": (500, 500, 500),
    "ACCT x": (500, 500, 500),
    "CWD": (530, 250, 250),
    "CWD in": (530, 250, 250),
    "CWD in/": (530, 250, 250),
    "CWD a": (530, 550, 550),
    "CWD a/": (530, 550, 550),
    "CWD missing": (530, 550, 550),
    "XCWD in": (530, 250, 250),
    "CDUP": (530, 250, 250),
    "CDUP x": (501, 501, 501),
    "XCUP": (530, 250, 250),
    "SMNT /": (500, 500, 500),
    "REIN": (530, 230, 230),
    "REIN x": (501, 501, 501),
    "QUIT": (221, 221, 221),
    "QUIT x": (501, 501, 501),
    # data connections
    "PORT": (501, 501, 501),
    "PORT 1,2,3": (530, 501, 501),
    "PORT 127,0,0,1,0,22": (530, 501, 501),
    "PORT 256,0,0,1,4,4": (530, 501, 501),
    "EPRT": (501, 501, 501),
    "EPRT x": (530, 501, 501),
    "EPRT |2|::1|5000|": (530, 522, 522),
    "EPRT |3|x|5000|": (530, 501, 501),
    "PASV x": (501, 501, 501),
    "EPSV 2": (530, 522, 522),
    "EPSV 3": (530, 501, 501),
    "EPSV ALL": (530, 200, 200),
    # parameters
    "TYPE": (501, 501, 501),
    "TYPE A": (530, 200, 200),
    "TYPE A N": (530, 200, 200),
    "TYPE a n": (530, 200, 200),
    "TYPE A T": (530, 504, 504),
    "TYPE A C": (530, 504, 504),
    "TYPE E": (530, 504, 504),
    "TYPE I": (530, 200, 200),
    "TYPE I N": (530, 504, 504),
    "TYPE L 8": (530, 200, 200),
    "TYPE L 7": (530, 504, 504),
    "TYPE L7": (530, 504, 504),
    "TYPE L": (530, 504, 504),
    "TYPE X": (530, 501, 501),
    "STRU": (501, 501, 501),
    "STRU F": (530, 200, 200),
    "STRU R": (530, 504, 504),
    "STRU P": (530, 504, 504),
    "STRU X": (530, 501, 501),
    "MODE": (501, 501, 501),
    "MODE S": (530, 200, 200),
    "MODE B": (530, 504, 504),
    "MODE C": (530, 504, 504),
    "MODE Z": (530, 501, 501),
    "REST": (501, 501, 501),
    "REST 5": (530, 350, 350),
    "REST 0": (530, 350, 350),
    "REST -1": (530, 501, 501),
    "REST x": (530, 501, 501),
    "REST 1_0": (530, 501, 501),
    "REST  5": (530, 501, 501),
    "REST \N{ARABIC-INDIC DIGIT FIVE}": (530, 501, 501),
    "REST 9223372036854775808": (530, 501, 501),
    "ALLO": (501, 501, 501),
    "ALLO 100": (530, 200, 200),
    "ALLO 100 R 10": (530, 200, 200),
    "ALLO 100 x": (530, 501, 501),
    "ALLO x": (530, 501, 501),
    "ALLO -1": (530, 501, 501),
    "ALLO 99999999999999999999": (530, 501, 501),
    "OPTS": (501, 501, 501),
    "OPTS UTF8": (530, 200, 200),
    "OPTS UTF8 ON": (530, 200, 200),
    "OPTS utf-8 on": (530, 200, 200),
    "OPTS UTF8 OFF": (530, 501, 501),
    "OPTS UTF8 NLST": (530, 501, 501),
    "OPTS MLST": (530, 200, 200),
    "OPTS MLST size;type;": (530, 200, 200),
    "OPTS MLST size": (530, 501, 501),
    "OPTS MLST a b": (530, 501, 501),
    "OPTS LIST": (530, 501, 501),
    # transfers, without a data connection
    "RETR": (501, 501, 501),
    "RETR a": (530, 425, 503),
    "STOR": (501, 501, 501),
    "STOR b": (530, 425, 503),
    "APPE": (501, 501, 501),
    "APPE a": (530, 425, 503),
    "STOU": (530, 425, 503),
    "STOU x": (530, 425, 503),
    "LIST": (530, 425, 503),
    "NLST": (530, 425, 503),
    "MLSD": (530, 425, 503),
    "ABOR x": (501, 501, 501),
    # files and folders
    "RNFR": (501, 501, 501),
    "RNFR a": (530, 350, 350),
    "RNFR in/": (530, 350, 350),
    "RNFR a/": (530, 550, 550),
    "RNFR missing": (530, 550, 550),
    "RNFR /": (530, 550, 550),
    "RNTO": (501, 501, 501),
    "RNTO b": (530, 503, 503),
    "DELE": (501, 501, 501),
    "DELE a": (530, 250, 250),
    "DELE a/": (530, 550, 550),
    "DELE a/.": (530, 550, 550),
    "DELE in": (530, 550, 550),
    "DELE in/": (530, 550, 550),
    "DELE missing": (530, 550, 550),
    "DELE /": (530, 550, 550),
    "MKD": (501, 501, 501),
    "MKD b": (530, 257, 257),
    "MKD b/": (530, 257, 257),
    "MKD in": (530, 550, 550),
    "MKD a": (530, 550, 550),
    "MKD a/b": (530, 550, 550),
    "MKD missing/b": (530, 550, 550),
    "XMKD b": (530, 257, 257),
    "RMD": (501, 501, 501),
    "RMD empty": (530, 250, 250),
    "RMD empty/": (530, 250, 250),
    "XRMD empty": (530, 250, 250),
    "RMD in": (530, 550, 550),
    "RMD a": (530, 550, 550),
    "RMD /": (530, 550, 550),
    "PWD": (530, 257, 257),
    "PWD x": (501, 501, 501),
    "XPWD": (530, 257, 257),
    "SIZE": (501, 501, 501),
    "SIZE a": (530, 213, 213),
    "SIZE a/": (530, 550, 550),
    "SIZE in": (530, 550, 550),
    "SIZE missing": (530, 550, 550),
    "MDTM": (501, 501, 501),
    "MDTM a": (530, 213, 213),
    "MDTM a/": (530, 550, 550),
    "MDTM in": (530, 550, 550),
    "MDTM 20200102030405 a": (530, 213, 213),
    "MFMT": (501, 501, 501),
    "MFMT a": (530, 501, 501),
    "MFMT 20200102030405": (530, 501, 501),
    "MFMT 20200102030405 a": (530, 213, 213),
    "MFMT 20200102030405 a/": (530, 550, 550),
    "MFMT 20200102030405 missing": (530, 550, 550),
    "MFMT 20201302030405 a": (530, 501, 501),
    "MFMT yesterday a": (530, 501, 501),
    "MLST": (530, 250, 250),
    "MLST a": (530, 250, 250),
    "MLST in/": (530, 250, 250),
    "MLST a/": (530, 550, 550),
    "MLST missing": (530, 550, 550),
    # site
    "SITE": (501, 501, 501),
    "SITE x": (500, 500, 500),
    "SITE HELP": (214, 214, 214),
    "SITE HELP CHMOD": (214, 214, 214),
    "SITE HELP x": (501, 501, 501),
    "SITE CHMOD": (501, 501, 501),
    "SITE CHMOD 600": (530, 501, 501),
    "SITE CHMOD 600 a": (530, 200, 200),
    "SITE CHMOD 0700 in": (530, 200, 200),
    "SITE CHMOD 600 a/": (530, 550, 550),
    "SITE CHMOD 4755 a": (530, 550, 550),
    "SITE CHMOD 888 a": (530, 501, 501),
    "SITE CHMOD u+x a": (530, 501, 501),
    "SITE CHMOD 600 missing": (530, 550, 550),
    "SITE CHMOD 000 /": (530, 550, 550),
    # the rest
    "SYST": (215, 215, 215),
    "SYST x": (501, 501, 501),
    "STAT": (211, 211, 211),
    "STAT a": (530, 213, 213),
    "STAT in/": (530, 213, 213),
    "STAT in/*.csv": (530, 213, 213),
    "STAT a/": (530, 550, 550),
    "STAT missing": (530, 550, 550),
    "HELP": (214, 214, 214),
    "HELP STOR": (214, 214, 214),
    "HELP x": (501, 501, 501),
    "FEAT": (211, 211, 211),
    "FEAT x": (501, 501, 501),
    "NOOP": (200, 200, 200),
    "NOOP x": (501, 501, 501),
    "AUTH TLS": (500, 500, 500),
    "": (500, 500, 500),
    " ": (500, 500, 500),
    "XYZZY": (500, 500, 500),
}
# What ends the session, or logs out.
ENDS_SESSIONS = {"REIN", "USER anonymous", "QUIT"}


def test_the_table_has_every_verb(address: Address) -> None:
    from ftpvfs import VFSHandler

    verbs = {line.split(" ")[0] for line in VERBS} | {"PASV", "EPSV", "ABOR"}
    assert {command.split(" ")[0] for command in VFSHandler.proto_cmds} <= verbs


@pytest.mark.parametrize(("line", "codes"), VERBS.items(), ids=lambda value: str(value))
def test_each_verb_in_each_state(address: Address, line: str, codes: tuple[int, int, int]) -> None:
    before, after, _ = codes
    with Client(timeout=30, encoding="utf-8") as ftp:
        ftp.connect(*address)
        assert reply(ftp, line)[:3] == str(before)
    with connect(address) as ftp:
        assert reply(ftp, line)[:3] == str(after)
        if line not in ENDS_SESSIONS:
            assert reply(ftp, "NOOP").startswith("200 ")


@pytest.mark.parametrize("line", sorted(VERBS.keys() - {"QUIT"}))
def test_each_verb_while_a_file_is_sent(store: Store, address: Address, line: str) -> None:
    with connect(address) as ftp:
        with open_transfer(ftp, "STOR new") as data:
            data.sendall(DATA)
            assert reply(ftp, line)[:3] == str(VERBS[line][2])
            data.sendall(DATA)
        assert last_reply(ftp).startswith("226 ")
    assert store.read("new") == DATA * 2
    assert store.list() <= {"a", "in/a.csv", "in/b.csv", "in/c.txt", "new"}


# --- what a positive reply has done


def test_a_transfer_has_the_type_of_the_moment_at_which_it_was_asked_for(store: Store, ftp: ftplib.FTP) -> None:
    text = b"a\r\nb\r\n"
    where = ftplib.parse229(reply(ftp, "EPSV"), (HOST, 0))
    assert reply(ftp, "STOR b").startswith("150 ")
    assert reply(ftp, "TYPE A").startswith("200 ")  # for the next one
    with socket.create_connection(where, timeout=30) as data:
        data.sendall(text)
    assert last_reply(ftp).startswith("226 ")
    assert store.read("b") == text
    assert upload(ftp, "c", text).startswith("226 ")
    assert reply(ftp, "TYPE A").startswith("200 ")
    with open_transfer(ftp, "STOR c") as data:
        assert reply(ftp, "TYPE L 8").startswith("200 ")
        data.sendall(text)
    assert last_reply(ftp).startswith("226 ")
    assert store.read("c") == text.replace(b"\r\n", os.linesep.encode())
    assert upload(ftp, "c", text).startswith("226 ")


def test_a_restart_marker_is_not_lost_nor_used_for_text(store: Store, ftp: ftplib.FTP) -> None:
    assert download(ftp, "a", rest=100) == DATA[100:]
    assert reply(ftp, "REST 100").startswith("350 ")
    assert reply(ftp, "TYPE A").startswith("200 ")
    reply(ftp, "EPSV")
    assert reply(ftp, "RETR a").startswith("554 ")
    assert reply(ftp, "TYPE I").startswith("200 ")
    assert download(ftp, "a") == DATA
    reply(ftp, "REST 5")
    assert reply(ftp, "STOU").startswith("425 ")
    reply(ftp, "EPSV")
    assert reply(ftp, "REST 5").startswith("350 ")
    assert reply(ftp, "STOU").startswith("503 ")


def test_allo_counts_for_the_next_upload(store: Store, ftp_server: Serve) -> None:
    with connect(ftp_server(store, cache_mode="writes")) as ftp:
        assert reply(ftp, f"ALLO {2**62}").startswith("200 ")
        with pytest.raises(ftplib.error_perm, match=r"^552 "):
            upload(ftp, "b", DATA)
        assert upload(ftp, "b", DATA).startswith("226 ")
        assert reply(ftp, f"ALLO {len(DATA)}").startswith("200 ")
        assert upload(ftp, "b", DATA).startswith("226 ")


def test_opts_mlst_chooses_the_facts_that_feat_and_mlst_tell(ftp: ftplib.FTP) -> None:
    assert reply(ftp, "OPTS MLST Size;nonsense;Type;") == "200 MLST OPTS size;type;"
    assert "MLST type*;perm;size*;modify;" in reply(ftp, "FEAT")
    assert reply(ftp, "MLST a").split("\n")[1] == f" size={len(DATA)};type=file; /a"
    assert reply(ftp, "REIN").startswith("230 ")
    assert "MLST type*;perm*;size*;modify*;" in reply(ftp, "FEAT")


def test_epsv_all_holds_until_the_client_logs_out(ftp: ftplib.FTP) -> None:
    assert reply(ftp, "EPSV ALL").startswith("200 ")
    for line in ("PASV", "PORT 127,0,0,1,200,1", "EPRT |1|127.0.0.1|51201|"):
        assert reply(ftp, line).startswith("501 ")
    assert reply(ftp, "EPSV").startswith("229 ")
    assert reply(ftp, "REIN").startswith("230 ")
    assert ftp.login()[:3] == "230"
    assert reply(ftp, "PASV").startswith("227 ")


@pytest.mark.parametrize("line", ["REIN", "USER anonymous"])
@pytest.mark.parametrize("sent", [b"", DATA])
def test_a_transfer_is_finished_though_its_user_logs_out(
    store: Store, ftp: ftplib.FTP, line: str, sent: bytes
) -> None:
    with open_transfer(ftp, "STOR new") as data:
        data.sendall(sent)
        assert reply(ftp, line)[:3] in {"230", "331"}
        data.sendall(DATA)
    assert last_reply(ftp).startswith("226 ")
    assert store.read("new") == sent + DATA


def test_help_knows_what_it_lists(ftp: ftplib.FTP) -> None:
    for line, prefix in (("HELP", "HELP "), ("SITE HELP", "SITE HELP ")):
        listed = " ".join(reply(ftp, line).split("\n")[1:-1]).split()
        assert listed
        for name in listed:
            assert reply(ftp, f"{prefix}{name}").startswith("214 "), name


def test_a_name_of_stou_is_one_that_the_client_can_use(store: Store, ftp: ftplib.FTP) -> None:
    for argument, begin in (("", "ftpd."), ("x", "x."), ("in/x", "in/x."), ("/in/x", "/in/x.")):
        data, answer = _begin(ftp, f"STOU {argument}".rstrip())
        with data:
            data.sendall(DATA)
        assert last_reply(ftp).startswith("226 ")
        code, _, name = answer.partition(" FILE: ")
        assert code in {"125", "150"}
        assert name.startswith(begin)
        assert download(ftp, name) == DATA
    reply(ftp, "EPSV")
    assert reply(ftp, "STOU in/").startswith("553 ")


def _begin(ftp: ftplib.FTP, command: str) -> tuple[socket.socket, str]:
    where = ftplib.parse229(reply(ftp, "EPSV"), (HOST, 0))
    data = socket.create_connection(where, timeout=30)
    return data, reply(ftp, command)


# --- access rights


def mode(store: Store, key: str) -> int:
    return stat.S_IMODE(os.stat(store.path(key)).st_mode)


@pytest.mark.parametrize("cache_mode", ["off", "writes"])
def test_site_chmod_changes_the_rights_of_a_file_and_of_a_folder(
    store: Store, ftp_server: Serve, cache_mode: str
) -> None:
    os.chmod(store.path("in"), 0o2755)
    with connect(ftp_server(store, cache_mode=cache_mode, write_back=3600)) as ftp:
        for rights in ("600", "000", "0444", "755"):
            assert reply(ftp, f"SITE CHMOD {rights} a").startswith("200 ")
            assert mode(store, "a") == int(rights, 8)
        assert reply(ftp, "SITE CHMOD 700 in/").startswith("200 ")
        assert mode(store, "in") == 0o2700  # new files still get the folder's group
        assert upload(ftp, "with spaces", DATA).startswith("226 ")
        assert reply(ftp, "SITE CHMOD 640 with spaces").startswith("200 ")  # stored first, where it waits
        assert mode(store, "with spaces") == 0o640
        assert store.read("with spaces") == DATA
        assert upload(ftp, "with spaces", b"new").startswith("226 ")
        assert download(ftp, "with spaces") == b"new"
    assert mode(store, "with spaces") == 0o640


def test_site_chmod_changes_nothing_else(store: Store, ftp_server: Serve, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"")
    secret.chmod(0o600)
    os.symlink(secret, store.path("link"))
    os.mkfifo(store.path("pipe"), 0o600)
    os.chmod(store.path("a"), 0o644)
    with connect(ftp_server(store)) as ftp:
        for line in ("777 link", "777 ../secret", "4755 a", "1755 a", "777 pipe", "000 /", "755 .", "7777777 a"):
            assert reply(ftp, f"SITE CHMOD {line}")[0] == "5", line
    with connect(ftp_server(store, read_only=True)) as ftp:
        assert "read-only" in reply(ftp, "SITE CHMOD 777 a")
    with connect(ftp_server(store, perm="elradfmwT")) as ftp:
        assert reply(ftp, "SITE CHMOD 777 a") == "550 Not enough privileges."
    assert mode(store, "a") == 0o644
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert mode(store, "pipe") == 0o600


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_site_chmod_says_why_not(kind: str, make_store: Callable[[str], Store], ftp_server: Serve) -> None:
    store = make_store(kind)
    store.write("a", DATA)
    with connect(ftp_server(store)) as ftp:
        assert reply(ftp, "SITE CHMOD 600 a") == "550 Access rights can be changed in a local folder alone."
        assert reply(ftp, "SITE CHMOD 600 missing") == "550 No such file or directory."


# --- names with a slash at the end


@pytest.mark.parametrize("cache_mode", ["off", "full"])
def test_a_file_is_not_called_as_only_a_folder_can_be(store: Store, ftp_server: Serve, cache_mode: str) -> None:
    before = store.list()
    with connect(ftp_server(store, cache_mode=cache_mode)) as ftp:
        for line in ("STOR new/", "STOR new/.", "STOR a/", "STOR in/", "APPE a/", "APPE new/"):
            reply(ftp, "EPSV")
            assert reply(ftp, line)[:3] in {"550", "553"}, line
        for line in ("RETR a/", "RETR in/", "LIST a/", "NLST a/", "MLSD a/"):
            reply(ftp, "EPSV")
            assert reply(ftp, line)[:3] in {"550", "501"}, line
        reply(ftp, "EPSV")
        assert reply(ftp, "ABOR").startswith("225 ")
        assert reply(ftp, "RNFR a").startswith("350 ")
        assert reply(ftp, "RNTO b/")[:3] in {"550", "553"}
        assert store.list() == before
        assert reply(ftp, "RNFR in/").startswith("350 ")
        assert reply(ftp, "RNTO moved/").startswith("250 ")
        assert reply(ftp, "SIZE moved/a.csv").startswith("213 ")


def test_stock_handlers_refuse_them_too(store: Store, ftp_server: Serve) -> None:
    with connect(ftp_server(store, server_class=FTPServer, handler=FTPHandler)) as ftp:
        reply(ftp, "EPSV")
        assert reply(ftp, "STOR new/").startswith("550 ")
        assert reply(ftp, "DELE a/").startswith("550 ")
        assert reply(ftp, "SIZE a/").startswith("550 ")
        assert reply(ftp, "MKD new/").startswith("257 ")
    assert store.read("a") == DATA


# --- names that a listing tells


def test_nlst_tells_names_that_can_be_used_as_they_stand(ftp: ftplib.FTP) -> None:
    assert ftp.nlst() == ["a", "empty", "in"]
    assert ftp.nlst("in") == ["in/a.csv", "in/b.csv", "in/c.txt"]
    assert ftp.nlst("in/") == ["in/a.csv", "in/b.csv", "in/c.txt"]
    assert ftp.nlst("-l in") == ["in/a.csv", "in/b.csv", "in/c.txt"]
    assert ftp.nlst("in/*.csv") == ["in/a.csv", "in/b.csv"]
    assert ftp.nlst("/in/[!a].*") == ["/in/b.csv", "/in/c.txt"]
    assert ftp.nlst("./in/*.t?t") == ["./in/c.txt"]
    assert ftp.nlst("/") == ["/a", "/empty", "/in"]
    assert ftp.nlst(".") == ["a", "empty", "in"]
    assert ftp.nlst("in/a.csv") == ["in/a.csv"]
    assert ftp.nlst("empty") == []
    assert ftp.cwd("in").startswith("250 ")
    assert ftp.nlst("..") == ["../a", "../empty", "../in"]
    assert ftp.nlst("*.csv") == ["a.csv", "b.csv"]
    for name in ftp.nlst("../in"):
        assert len(download(ftp, name)) == 1
    reply(ftp, "EPSV")
    assert reply(ftp, "NLST missing").startswith("550 ")


def test_list_and_stat_know_the_same_patterns(ftp: ftplib.FTP) -> None:
    lines: list[str] = []
    ftp.retrlines("LIST in/*.csv", lines.append)
    assert [line.split()[-1] for line in lines] == ["a.csv", "b.csv"]
    told = reply(ftp, "STAT in/*.csv").split("\n")
    assert told[1:-1] == lines
    assert reply(ftp, "STAT in/*.none").split("\n")[1:] == ["213 End of status."]


def test_a_pattern_in_a_large_folder_keeps_the_loop_free(memory_store: Store, ftp_server: Serve) -> None:
    """The loop's own watch (`serving`) fails the test where it did not."""
    for number in range(3000):
        memory_store.write(f"{number:04}{'a' * 100}")
    with connect(ftp_server(memory_store)) as ftp:
        assert ftp.nlst("*" + "a*" * 90 + "b") == []
        assert len(ftp.nlst("2*a")) == 1000
        lines: list[str] = []
        ftp.retrlines("LIST 2*a", lines.append)
        assert len(lines) == 1000


# --- long names


@pytest.mark.parametrize(("kind", "cache_mode"), [("gs", "off"), ("gs", "full"), ("memory", "off")])
def test_long_names_of_the_store_can_be_used(
    kind: str, cache_mode: str, make_store: Callable[[str], Store], ftp_server: Serve
) -> None:
    store = make_store(kind)
    longest = 1024 - len(f"{store.root}/".partition("/")[2])
    name = "\N{SNOWMAN}" * ((longest - 10) // 3)
    folder = "n" * (longest - 20)
    store.write(name, DATA)
    store.write(f"{folder}/a", DATA)
    with connect(ftp_server(store, cache_mode=cache_mode)) as ftp:
        assert set(ftp.nlst()) == {name, folder}
        assert download(ftp, name) == DATA
        assert ftp.size(name) == len(DATA)
        assert upload(ftp, name, b"new").startswith("226 ")
        assert download(ftp, name) == b"new"
        assert reply(ftp, f"RNFR {name}").startswith("350 ")
        assert reply(ftp, "RNTO short").startswith("250 ")
        assert reply(ftp, f"CWD {folder}").startswith("250 ")
        assert download(ftp, "a") == DATA
        assert upload(ftp, "b", b"b").startswith("226 ")
        assert ftp.nlst(f"/{folder}/*") == [f"/{folder}/a", f"/{folder}/b"]
        assert reply(ftp, f"DELE /{folder}/b").startswith("250 ")
        reply(ftp, "EPSV")
        assert reply(ftp, f"STOR {'y' * 256}").startswith("553 ")


def test_the_longest_path_of_a_local_folder_can_be_used(local_store: Store, ftp_server: Serve) -> None:
    room = 4095 - len(os.fsencode(local_store.root)) - 1
    parts = ["d" * 200] * (room // 201 - 1)
    key = "/".join([*parts, "f" * min(255, room - 201 * len(parts))])
    local_store.write(key, DATA)
    assert len(key) > 3500
    with connect(ftp_server(local_store)) as ftp:
        assert ftp.nlst("/".join(parts)) == [key]
        assert download(ftp, key) == DATA
        assert reply(ftp, f"MFMT 20200102030405 {key}").startswith("213 ")
        assert reply(ftp, f"SITE CHMOD 600 {key}").startswith("200 ")
        assert reply(ftp, f"DELE {key}").startswith("250 ")
