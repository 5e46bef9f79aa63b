"""Every verb on every kind of store, over real FTP, with what came of it looked up in the store itself."""

from __future__ import annotations

import ftplib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import connect, download, last_reply, names, open_transfer, reply, reset, upload, wait_until
from tests.matrix.conftest import MODES, ModeStore

MIB = 2**20
Serve = Callable[..., tuple[str, int]]

DATA = bytes(range(256)) * 4096  # 1 MiB, no two places alike within a chunk
LARGE = b"0123456789abcdef" * (MIB // 16 * 20) + b"the odd end"  # several parts of an upload, several ranges


@pytest.fixture
def ftp(store: ModeStore, make_vfs: Callable[..., Any], ftp_server: Serve) -> Iterator[ftplib.FTP]:
    vfs = make_vfs(store, cache_mode=store.mode, write_back="1h")  # nothing gets to the store by itself
    store.vfses.append(vfs)
    with connect(ftp_server(vfs)) as client:
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
def test_stor_puts_the_bytes_into_the_store_and_retr_gets_them(store: ModeStore, ftp: ftplib.FTP, data: bytes) -> None:
    assert upload(ftp, "a.bin", data).startswith("226 ")
    assert store.read("a.bin") == data
    assert store.list() == {"a.bin"}
    assert store.uploads() == set()
    assert ftp.size("a.bin") == len(data)
    assert download(ftp, "a.bin") == data


def test_stor_replaces_a_file(store: ModeStore, ftp: ftplib.FTP) -> None:
    store.write("a", b"old and longer than the new one")
    assert upload(ftp, "a", b"new").startswith("226 ")
    assert store.read("a") == b"new"
    assert download(ftp, "a") == b"new"
    assert ftp.size("a") == 3


def test_rest_and_retr_resume_a_download(store: ModeStore, ftp: ftplib.FTP) -> None:
    store.write("a", LARGE)
    for offset in (1, 65_536, 5 * MIB + 3, len(LARGE) - 1, len(LARGE)):
        assert download(ftp, "a", rest=offset) == LARGE[offset:]
    assert download(ftp, "a") == LARGE  # REST is for one transfer


def test_rest_beyond_the_end_is_refused(store: ModeStore, ftp: ftplib.FTP) -> None:
    store.write("a", b"12345")
    with pytest.raises(ftplib.error_perm, match=r"^554 "):
        download(ftp, "a", rest=6)
    assert download(ftp, "a") == b"12345"


def test_rest_does_not_outlive_a_refused_transfer(store: ModeStore, ftp: ftplib.FTP) -> None:
    store.write("a", b"12345")
    assert code(ftp, "REST 3") == "350"
    assert code(ftp, "RETR a") == "425"  # no PASV before it
    assert download(ftp, "a") == b"12345"


def test_files_that_are_missing_or_folders_are_refused(store: ModeStore, ftp: ftplib.FTP) -> None:
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


def test_appe_makes_a_missing_file(store: ModeStore, ftp: ftplib.FTP) -> None:
    assert upload(ftp, "a", b"first", verb="APPE").startswith("226 ")
    assert store.read("a") == b"first"


def in_mode(*modes: str) -> Any:
    chosen = [each for each in MODES if each[1] in modes]
    return pytest.mark.parametrize("store", chosen, indirect=True, ids="-".join)


@in_mode("off")
@pytest.mark.parametrize("verb", ["APPE", "REST and STOR"])
def test_changing_part_of_a_file_is_refused_naming_the_flag(store: ModeStore, ftp: ftplib.FTP, verb: str) -> None:
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


@in_mode("minimal", "writes", "full")
def test_appe_and_rest_change_part_of_a_file(store: ModeStore, ftp: ftplib.FTP) -> None:
    store.write("a", LARGE)
    assert upload(ftp, "a", b"more", verb="APPE").startswith("226 ")
    assert download(ftp, "a") == LARGE + b"more"
    assert upload(ftp, "a", b"XY", rest=5).startswith("226 ")
    changed = LARGE[:5] + b"XY" + LARGE[7:] + b"more"
    assert download(ftp, "a") == changed
    assert ftp.size("a") == len(changed)
    with pytest.raises(ftplib.error_perm, match=r"^554 "):
        upload(ftp, "a", b"behind the end", rest=len(changed) + 1)
    assert store.read("a") == changed


def received(ftp: ftplib.FTP) -> int:
    """How many bytes of the upload that is under way the server has taken."""
    match = re.search(r"Total bytes received: (\d+)", reply(ftp, "STAT"))
    return int(match[1]) if match else 0


@in_mode("writes", "full")
@pytest.mark.parametrize("how", ["APPE", "REST"])
def test_an_interrupted_upload_goes_on_where_it_ended(store: ModeStore, ftp: ftplib.FTP, how: str) -> None:
    with open_transfer(ftp, "STOR a") as with_data:
        with_data.sendall(DATA)
        wait_until(lambda: received(ftp) == len(DATA))
        reset(with_data)
    assert last_reply(ftp).startswith("426 ")
    assert names(ftp) == set()
    assert store.list() == set()
    size = ftp.size("a")
    assert size is not None
    assert f"size={size};" in reply(ftp, "MLST a").lower()
    rest = {"rest": size} if how == "REST" else {"verb": "APPE"}
    assert upload(ftp, "a", DATA[size:] + b"end", **rest).startswith("226 ")  # type: ignore[arg-type]
    assert store.read("a") == DATA + b"end"
    assert names(ftp) == {"a"}


@in_mode("writes", "full")
def test_where_a_file_is_only_rest_at_its_length_goes_on_with_an_interrupted_upload(
    store: ModeStore, ftp: ftplib.FTP
) -> None:
    store.write("a", b"old")
    with open_transfer(ftp, "STOR a") as with_data:
        with_data.sendall(b"new beginning")
        wait_until(lambda: received(ftp) == 13)
        reply(ftp, "ABOR")
    assert last_reply(ftp).startswith("226 ")
    assert ftp.size("a") == 3
    assert download(ftp, "a") == b"old"
    assert upload(ftp, "a", b" and end", rest=13).startswith("226 ")
    assert store.read("a") == b"new beginning and end"


@in_mode("writes", "full")
def test_what_waits_is_renamed_dated_and_deleted_before_the_store_hears_of_it(
    store: ModeStore, ftp: ftplib.FTP
) -> None:
    plain = super(ModeStore, store)
    store.write("there", b"there")
    for name in ("a", "b", "there"):
        assert upload(ftp, name, f"new {name}".encode()).startswith("226 ")
    assert rename(ftp, "a", "moved") == "250"
    assert code(ftp, "MFMT 20200102030405 moved") == "213"
    assert code(ftp, "DELE b") == "250"
    assert rename(ftp, "there", "elsewhere") == "250"
    assert names(ftp) == {"moved", "elsewhere"}
    assert plain.list() == {"there"}
    assert store.list() == {"moved", "elsewhere"}
    assert store.read("moved") == b"new a"
    assert store.mtime("moved") == 1577934245
    assert store.read("elsewhere") == b"new there"


def test_stou_makes_a_new_name_each_time(store: ModeStore, ftp: ftplib.FTP) -> None:
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


def test_dele(store: ModeStore, ftp: ftplib.FTP) -> None:
    if store.kind == "memory":  # it has folders of its own; one that a file alone implied would go with it
        assert ftp.mkd("folder") == "/folder"
    store.write("folder/a", b"x")
    assert code(ftp, "DELE folder") in {"550", "553"}
    assert code(ftp, "DELE folder/a") == "250"
    assert "folder/a" not in store.list()
    assert code(ftp, "DELE folder/a") == "550"
    assert names(ftp) == {"folder"}  # it does not go with its last file


# --- folders


def test_folders_are_made_entered_listed_and_removed(store: ModeStore, ftp: ftplib.FTP) -> None:
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


def test_a_file_is_renamed_also_over_another(store: ModeStore, ftp: ftplib.FTP) -> None:
    store.write("a", b"a's")
    store.write("b", b"b's")
    assert rename(ftp, "a", "b") == "250"
    assert store.list() == {"b"}
    assert store.read("b") == b"a's"
    assert names(ftp) == {"b"}
    assert download(ftp, "b") == b"a's"
    assert rename(ftp, "b", "b") == "250"
    assert store.read("b") == b"a's"


def test_a_folder_is_renamed_with_all_that_is_in_it(store: ModeStore, ftp: ftplib.FTP) -> None:
    for key in ("old/a", "old/sub/b", "older/c"):
        store.write(key, key.encode())
    assert ftp.mkd("old/empty") == "/old/empty"
    assert rename(ftp, "old", "new") == "250"
    assert {key for key in store.list() if not key.endswith("/")} == {"new/a", "new/sub/b", "older/c"}
    assert store.read("new/sub/b") == b"old/sub/b"
    assert names(ftp) == {"new", "older"}
    assert names(ftp, "new") == {"a", "sub", "empty"}


def test_renames_that_cannot_be_are_refused_and_change_nothing(store: ModeStore, ftp: ftplib.FTP) -> None:
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


def test_mfmt_sets_the_time_that_mdtm_mlst_and_list_tell(store: ModeStore, ftp: ftplib.FTP) -> None:
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
    assert code(ftp, "MFMT 2022 a") == "501"
    assert code(ftp, "MFMT 20200102030405 missing") == "550"
    assert code(ftp, "MDTM missing") == "550"


# --- looking


@pytest.fixture
def tree(store: ModeStore) -> None:
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
    assert ftp.nlst("folder") == ["folder/b[1]", "folder/inside"]
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
    assert ftp.nlst("folder/i*") == ["folder/inside"]
    assert ftp.nlst("folder/b[1]") == ["folder/b[1]"]  # a name that is there is no pattern
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

two_stores = pytest.mark.parametrize(  # one for each way of sending files
    "store", [("local", "off"), ("s3", "off"), ("s3", "full")], indirect=True, ids="-".join
)


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
def test_ascii_uploads_turn_crlf_into_lf(store: ModeStore, ftp: ftplib.FTP, sent: bytes, stored: bytes) -> None:
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
def test_ascii_downloads_turn_lf_into_crlf(store: ModeStore, ftp: ftplib.FTP, stored: bytes, sent: bytes) -> None:
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
        "ALLO 1000": "200",
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
        "RETR": "501",
        "RETR a": "425",
        "MKD": "501",
    }.items():
        assert code(ftp, command) == expected, command
    assert code(ftp, "QUIT") == "221"


def test_quit_lets_the_transfer_finish(store: ModeStore, ftp: ftplib.FTP) -> None:
    with_data = open_transfer(ftp, "STOR a")
    with_data.sendall(DATA)
    assert code(ftp, "QUIT") == "221"
    with_data.sendall(DATA)
    with_data.close()
    assert last_reply(ftp).startswith("226 ")
    assert store.read("a") == DATA + DATA


def test_abor_ends_a_download_with_426_and_226(store: ModeStore, ftp: ftplib.FTP) -> None:
    store.write("a", LARGE)
    with open_transfer(ftp, "RETR a") as with_data:
        assert with_data.recv(1000)
        assert reply(ftp, "ABOR").startswith("426 ")
        assert last_reply(ftp).startswith("226 ")
    assert download(ftp, "a", rest=100) == LARGE[100:]


@pytest.mark.parametrize("sent", [b"", b"part"], ids=["before the first byte", "in the middle"])
def test_abor_ends_an_upload_with_426_and_226(store: ModeStore, ftp: ftplib.FTP, sent: bytes) -> None:
    store.write("a", b"old")
    with open_transfer(ftp, "STOR a") as with_data:
        with_data.sendall(sent)
        assert reply(ftp, "ABOR").startswith("426 ")
        assert last_reply(ftp).startswith("226 ")
    assert store.read("a") == b"old"
    assert store.list() == {"a"}
    assert upload(ftp, "a", b"new").startswith("226 ")
    assert store.read("a") == b"new"
