"""Every verb on every kind of store, over real FTP, with what came of it looked up in the store itself."""

from __future__ import annotations

import ftplib
import re
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import Store, connect, download, last_reply, names, open_transfer, reply, upload

MIB = 2**20
Serve = Callable[..., tuple[str, int]]

DATA = bytes(range(256)) * 4096  # 1 MiB, no two places alike within a chunk
LARGE = b"0123456789abcdef" * (MIB // 16 * 20) + b"the odd end"  # several parts of an upload, several ranges


@pytest.fixture
def ftp(store: Store, ftp_server: Serve) -> Iterator[ftplib.FTP]:
    with connect(ftp_server(store)) as client:
        yield client


def code(ftp: ftplib.FTP, command: str) -> str:
    return reply(ftp, command)[:3]


def pasv(ftp: ftplib.FTP) -> None:
    assert code(ftp, "EPSV") == "229"


def listed(ftp: ftplib.FTP, command: str) -> list[str]:
    lines: list[str] = []
    ftp.retrlines(command, lines.append)
    ftp.voidcmd("TYPE I")
    return lines


# --- files


@pytest.mark.parametrize("data", [b"", b"x", DATA, LARGE], ids=["empty", "byte", "1MiB", "20MiB"])
def test_stor_puts_the_bytes_into_the_store_and_retr_gets_them(store: Store, ftp: ftplib.FTP, data: bytes) -> None:
    assert upload(ftp, "a.bin", data).startswith("226 ")
    assert store.read("a.bin") == data
    assert store.list() == {"a.bin"}
    assert store.uploads() == set()
    assert ftp.size("a.bin") == len(data)
    assert download(ftp, "a.bin") == data


def test_stor_replaces_a_file(store: Store, ftp: ftplib.FTP) -> None:
    store.write("a", b"old and longer than the new one")
    assert upload(ftp, "a", b"new").startswith("226 ")
    assert store.read("a") == b"new"
    assert download(ftp, "a") == b"new"
    assert ftp.size("a") == 3


def test_rest_and_retr_resume_a_download(store: Store, ftp: ftplib.FTP) -> None:
    store.write("a", LARGE)
    for offset in (1, 65_536, 5 * MIB + 3, len(LARGE) - 1, len(LARGE)):
        assert download(ftp, "a", rest=offset) == LARGE[offset:]
    assert download(ftp, "a") == LARGE  # REST is for one transfer


def test_rest_beyond_the_end_is_refused(store: Store, ftp: ftplib.FTP) -> None:
    store.write("a", b"12345")
    with pytest.raises(ftplib.error_perm, match=r"^554 "):
        download(ftp, "a", rest=6)
    assert download(ftp, "a") == b"12345"


def test_rest_does_not_outlive_a_refused_transfer(store: Store, ftp: ftplib.FTP) -> None:
    store.write("a", b"12345")
    assert code(ftp, "REST 3") == "350"
    assert code(ftp, "RETR a") == "425"  # no PASV before it
    assert download(ftp, "a") == b"12345"


def test_files_that_are_missing_or_folders_are_refused(store: Store, ftp: ftplib.FTP) -> None:
    store.write("folder/inside", b"x")
    for command in (
        "RETR missing",
        "RETR folder",
        "STOR folder",
        "APPE folder",
        "STOR missing/a",
        "STOR folder/inside/a",
    ):
        pasv(ftp)
        assert code(ftp, command) in {"550", "553"}, command
    assert code(ftp, "SIZE missing") == "550"
    assert code(ftp, "SIZE folder") == "550"
    assert store.list() == {"folder/inside"}


def test_appe_makes_a_missing_file(store: Store, ftp: ftplib.FTP) -> None:
    assert upload(ftp, "a", b"first", verb="APPE").startswith("226 ")
    assert store.read("a") == b"first"


@pytest.mark.parametrize("verb", ["APPE", "REST and STOR"])
def test_changing_part_of_a_file_is_refused_naming_the_flag(store: Store, ftp: ftplib.FTP, verb: str) -> None:
    store.write("a", b"content")
    pasv(ftp)
    if verb == "APPE":
        answer = reply(ftp, "APPE a")
    else:
        assert code(ftp, "REST 3") == "350"
        answer = reply(ftp, "STOR a")
    assert answer.startswith("550 ")
    assert "--vfs-cache-mode" in answer
    assert store.read("a") == b"content"
    assert upload(ftp, "b", b"the session goes on").startswith("226 ")


def test_stou_makes_a_new_name_each_time(store: Store, ftp: ftplib.FTP) -> None:
    for argument in ("", "", " wanted"):
        pasv(ftp)
        with_data = ftp.transfercmd(f"STOU{argument}")
        with_data.sendall(b"unique")
        with_data.close()
        assert last_reply(ftp).startswith("226 ")
    keys = store.list()
    assert len(keys) == 3
    assert {store.read(key) for key in keys} == {b"unique"}
    assert len([key for key in keys if key.startswith("wanted.")]) == 1


def test_dele(store: Store, ftp: ftplib.FTP) -> None:
    if store.kind == "memory":  # it has folders of its own; one that a file alone implied would go with it
        assert ftp.mkd("folder") == "/folder"
    store.write("folder/a", b"x")
    assert code(ftp, "DELE folder") in {"550", "553"}
    assert code(ftp, "DELE folder/a") == "250"
    assert "folder/a" not in store.list()
    assert code(ftp, "DELE folder/a") == "550"
    assert names(ftp) == {"folder"}  # it does not go with its last file


# --- folders


def test_folders_are_made_entered_listed_and_removed(store: Store, ftp: ftplib.FTP) -> None:
    assert ftp.mkd("one") == "/one"
    assert code(ftp, "MKD one") == "550"
    assert code(ftp, "MKD missing/sub") == "550"
    assert ftp.mkd('one/with "quotes"') == '/one/with "quotes"'
    assert reply(ftp, 'CWD one/with "quotes"') == '250 "/one/with ""quotes""" is the current directory.'
    assert ftp.pwd() == '/one/with "quotes"'
    assert code(ftp, "CDUP") == "250"
    assert ftp.pwd() == "/one"
    assert names(ftp) == {'with "quotes"'}
    assert upload(ftp, "file", b"x").startswith("226 ")
    assert store.read("one/file") == b"x"
    assert code(ftp, "RMD /one") == "550"  # not empty
    assert code(ftp, "RMD file") == "550"
    assert code(ftp, 'RMD with "quotes"') == "250"
    assert code(ftp, 'RMD with "quotes"') == "550"
    assert names(ftp) == {"file"}
    assert code(ftp, "CWD file") == "550"
    assert code(ftp, "CWD missing") == "550"
    assert ftp.pwd() == "/one"
    assert code(ftp, "DELE file") == "250"
    assert code(ftp, "CWD /") == "250"
    assert code(ftp, "RMD one") == "250"
    assert names(ftp) == set()
    assert code(ftp, "RMD /") == "550"


# --- renaming


def rename(ftp: ftplib.FTP, source: str, target: str) -> str:
    assert code(ftp, f"RNFR {source}") == "350"
    return code(ftp, f"RNTO {target}")


def test_a_file_is_renamed_also_over_another(store: Store, ftp: ftplib.FTP) -> None:
    store.write("a", b"a's")
    store.write("b", b"b's")
    assert rename(ftp, "a", "b") == "250"
    assert store.list() == {"b"}
    assert store.read("b") == b"a's"
    assert names(ftp) == {"b"}
    assert download(ftp, "b") == b"a's"
    assert rename(ftp, "b", "b") == "250"
    assert store.read("b") == b"a's"


def test_a_folder_is_renamed_with_all_that_is_in_it(store: Store, ftp: ftplib.FTP) -> None:
    for key in ("old/a", "old/sub/b", "older/c"):
        store.write(key, key.encode())
    assert ftp.mkd("old/empty") == "/old/empty"
    assert rename(ftp, "old", "new") == "250"
    assert {key for key in store.list() if not key.endswith("/")} == {"new/a", "new/sub/b", "older/c"}
    assert store.read("new/sub/b") == b"old/sub/b"
    assert names(ftp) == {"new", "older"}
    assert names(ftp, "new") == {"a", "sub", "empty"}


def test_renames_that_cannot_be_are_refused_and_change_nothing(store: Store, ftp: ftplib.FTP) -> None:
    for key in ("folder/a", "full/b", "file"):
        store.write(key, key.encode())
    before = store.list()
    for source, target in (
        ("folder", "folder/inside"),
        ("folder", "full"),
        ("folder", "file"),
        ("file", "folder"),
        ("file", "missing/file"),
        ("file", "/"),
    ):
        assert rename(ftp, source, target) in {"550", "553"}, (source, target)
    assert code(ftp, "RNFR missing") == "550"
    assert code(ftp, "RNFR /") == "550"
    assert code(ftp, "RNTO nothing-before") == "503"
    assert store.list() == before


# --- times


def test_mfmt_sets_the_time_that_mdtm_mlst_and_list_tell(store: Store, ftp: ftplib.FTP) -> None:
    store.write("a", b"content")
    assert code(ftp, "MFMT 20200102030405 a") == "213"
    assert reply(ftp, "MDTM a") == "213 20200102030405"
    assert "modify=20200102030405;" in reply(ftp, "MLST a").lower()
    assert re.search(r" Jan 02  2020 a$", listed(ftp, "LIST")[0])
    assert store.read("a") == b"content"
    if store.kind != "memory":
        assert store.mtime("a") == 1577934245
    assert code(ftp, "MFMT 20210102030405.123 a") == "213"
    assert reply(ftp, "MDTM a") == "213 20210102030405"
    assert code(ftp, "MDTM 20220102030405 a") == "213"
    assert reply(ftp, "MDTM a") == "213 20220102030405"
    assert code(ftp, "MFMT 2022 a") == "550"
    assert code(ftp, "MFMT 20200102030405 missing") == "550"
    assert code(ftp, "MDTM missing") == "550"


# --- looking


@pytest.fixture
def tree(store: Store) -> None:
    for key in ("a.txt", "b.txt", "c.csv", "folder/inside", "folder/b[1]"):
        store.write(key, key.encode())


@pytest.mark.usefixtures("tree")
def test_listings_agree(ftp: ftplib.FTP) -> None:
    top = ["a.txt", "b.txt", "c.csv", "folder"]
    for options in ("", " -la", " -a", " -la -R", " -la /", " -l .", " /"):
        lines = listed(ftp, f"LIST{options}")
        assert [line.split()[-1] for line in lines] == top, options
    assert lines[0].startswith("-rw")
    assert lines[3].startswith("drwx")
    assert lines[0].split()[4] == "5"
    assert ftp.nlst() == top
    assert ftp.nlst("-l") == top
    assert ftp.nlst("folder") == ["b[1]", "inside"]
    assert [line.split()[-1] for line in listed(ftp, "LIST -la folder")] == ["b[1]", "inside"]
    assert [line.split()[-1] for line in listed(ftp, "LIST a.txt")] == ["a.txt"]
    facts = dict(ftp.mlsd("/"))
    assert list(facts) == top
    assert facts["a.txt"]["type"] == "file"
    assert facts["a.txt"]["size"] == "5"
    assert facts["folder"]["type"] == "dir"
    for command in ("LIST missing", "NLST missing", "MLSD missing", "MLST missing", "STAT missing"):
        pasv(ftp)
        assert code(ftp, command) == "550", command
    pasv(ftp)
    assert code(ftp, "MLSD a.txt") == "501"


@pytest.mark.usefixtures("tree")
def test_patterns_choose_in_the_last_part_of_a_path(ftp: ftplib.FTP) -> None:
    assert ftp.nlst("*.txt") == ["a.txt", "b.txt"]
    assert ftp.nlst("folder/i*") == ["inside"]
    assert ftp.nlst("folder/b[1]") == ["b[1]"]  # a name that is there is no pattern
    assert ftp.nlst("*.none") == []
    assert [line.split()[-1] for line in listed(ftp, "LIST *.csv")] == ["c.csv"]


@pytest.mark.usefixtures("tree")
def test_mlst_and_stat_answer_on_the_control_connection(ftp: ftplib.FTP) -> None:
    answer = reply(ftp, "MLST a.txt").splitlines()
    assert answer[0].startswith("250-")
    assert answer[1].endswith("; /a.txt")
    assert "size=5;" in answer[1]
    assert reply(ftp, "MLST").splitlines()[1].lower().startswith(" ")
    assert "type=dir;" in reply(ftp, "MLST")
    answer = reply(ftp, "STAT folder").splitlines()
    assert answer[0].startswith("213-")
    assert answer[-1].startswith("213 ")
    assert answer[1].endswith(" b[1]")
    assert len(reply(ftp, "STAT -la folder").splitlines()) == 4
    assert "b[1]" in reply(ftp, "STAT folder/b[1]")
    assert reply(ftp, "STAT").startswith("211-")


# --- types

two_stores = pytest.mark.parametrize("store", ["local", "s3"], indirect=True)  # one for each way of sending files


@two_stores
@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        (b"a\r\nb\r\n", b"a\nb\n"),
        (b"a\nb\n", b"a\nb\n"),
        (b"ends in cr\r", b"ends in cr\r"),
        (b"\r", b"\r"),
        (b"a\r\r\nb", b"a\r\nb"),
        (b"\r\n" * 300_000, b"\n" * 300_000),
        (b"", b""),
    ],
    ids=["crlf", "lf", "cr at the end", "only cr", "cr crlf", "long", "empty"],
)
def test_ascii_uploads_turn_crlf_into_lf(store: Store, ftp: ftplib.FTP, sent: bytes, stored: bytes) -> None:
    ftp.voidcmd("TYPE A")
    with_data = open_transfer(ftp, "STOR a")
    with_data.sendall(sent)
    with_data.close()
    assert last_reply(ftp).startswith("226 ")
    assert store.read("a") == stored


@two_stores
@pytest.mark.parametrize(
    ("stored", "sent"),
    [
        (b"a\nb\n", b"a\r\nb\r\n"),
        (b"a\r\nb\r\n", b"a\r\nb\r\n"),
        (b"\nbegins with lf, ends with cr\r", b"\r\nbegins with lf, ends with cr\r"),
        (b"x" * (256 * 1024 - 1) + b"\r\nend", b"x" * (256 * 1024 - 1) + b"\r\nend"),
        (b"\n" * 300_000, b"\r\n" * 300_000),
    ],
    ids=["lf", "crlf", "lf first, cr last", "crlf across pieces", "long"],
)
def test_ascii_downloads_turn_lf_into_crlf(store: Store, ftp: ftplib.FTP, stored: bytes, sent: bytes) -> None:
    store.write("a", stored)
    ftp.voidcmd("TYPE A")
    with open_transfer(ftp, "RETR a") as with_data, with_data.makefile("rb") as data:
        assert data.read() == sent
    assert last_reply(ftp).startswith("226 ")


# --- the rest


def test_the_small_verbs_answer(ftp: ftplib.FTP) -> None:
    features = reply(ftp, "FEAT").splitlines()
    for feature in ("MDTM", "MFMT", "SIZE", "REST STREAM", "TVFS", "UTF8", "EPSV"):
        assert f" {feature}" in features
    assert any(line.startswith(" MLST type*;perm*;size*;modify*;") for line in features)
    assert reply(ftp, "OPTS MLST size;modify;") == "200 MLST OPTS size;modify;"
    assert reply(ftp, "MLST /").splitlines()[1].startswith(" modify=")
    for command, expected in {
        "OPTS UTF8 ON": "200",
        "ALLO 1000": "202",
        "NOOP": "200",
        "SYST": "215",
        "HELP": "214",
        "HELP STOR": "214",
        "SITE HELP": "214",
        "SITE CHMOD 644 a": "550",
        "SITE UTIME a": "500",
        "TYPE E": "504",
        "MODE S": "200",
        "STRU F": "200",
        "ABOR": "225",
        "NONSENSE": "500",
        "RETR": "425",
        "MKD": "501",
    }.items():
        assert code(ftp, command) == expected, command
    assert code(ftp, "QUIT") == "221"


def test_quit_lets_the_transfer_finish(store: Store, ftp: ftplib.FTP) -> None:
    with_data = open_transfer(ftp, "STOR a")
    with_data.sendall(DATA)
    assert code(ftp, "QUIT") == "221"
    with_data.sendall(DATA)
    with_data.close()
    assert last_reply(ftp).startswith("226 ")
    assert store.read("a") == DATA + DATA


def test_abor_ends_a_download_with_426_and_226(store: Store, ftp: ftplib.FTP) -> None:
    store.write("a", LARGE)
    with open_transfer(ftp, "RETR a") as with_data:
        assert with_data.recv(1000)
        assert reply(ftp, "ABOR").startswith("426 ")
        assert last_reply(ftp).startswith("226 ")
    assert download(ftp, "a", rest=100) == LARGE[100:]


@pytest.mark.parametrize("sent", [b"", b"part"], ids=["before the first byte", "in the middle"])
def test_abor_ends_an_upload_with_426_and_226(store: Store, ftp: ftplib.FTP, sent: bytes) -> None:
    store.write("a", b"old")
    with open_transfer(ftp, "STOR a") as with_data:
        with_data.sendall(sent)
        assert reply(ftp, "ABOR").startswith("426 ")
        assert last_reply(ftp).startswith("226 ")
    assert store.read("a") == b"old"
    assert store.list() == {"a"}
    assert upload(ftp, "a", b"new").startswith("226 ")
    assert store.read("a") == b"new"
