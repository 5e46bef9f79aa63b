"""Names that want to be something else: they come back as they were sent, or are refused; nobody leaves his home."""

from __future__ import annotations

import contextlib
import ftplib
import io
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Store, connect, download, names, reply, upload

Serve = Callable[..., tuple[str, int]]

NAMES = {
    "spaces": "  two before, two after  ",
    "leading space": " a",
    "quotes": "\"double\" 'single' `back`",
    "leading dash": "-la",
    "dashes": "--help",
    "backslash": "back\\slash\\",
    "dots": "...",
    "trailing dots": "name..",
    "only punctuation": "~!@#$%^&(){}[]+=,;:",
    "pattern": "*?[a-z]",
    "percent": "100%25 %2f..%2f",
    "emoji": "\N{PILE OF POO}\N{ZERO WIDTH JOINER}\N{SNOWMAN}",
    "nfc": unicodedata.normalize("NFC", "ümläut"),
    "255 bytes": "n" * 251 + "\N{PILE OF POO}",
    "tab and escape": "tab\there\x1b[31m",
    "line separators": "a\x85b\u2028c\x0bd",
    "semicolon facts": "size=1;type=dir; forged",
    "arrow": "a -> b",
    "plus": "a+b c",
    "xml": "<a>&amp;'\"",
}
CONTENT = b"what is in it"


@pytest.fixture
def ftp(store: Store, ftp_server: Serve) -> Iterator[ftplib.FTP]:
    with connect(ftp_server(store)) as client:
        yield client


# What the stores of these tests make something else of, by themselves: SeaweedFS takes a backslash for a slash.
NOT_AT = {"s3": {"backslash"}}


def test_names_come_back_as_they_were(store: Store, ftp: ftplib.FTP) -> None:
    wanted = {what: name for what, name in NAMES.items() if what not in NOT_AT.get(store.kind, set())}
    for name in wanted.values():
        assert upload(ftp, f"/{name}", CONTENT).startswith("226 "), name
    assert store.list() == set(wanted.values())
    assert names(ftp) == set(wanted.values())
    for name in wanted.values():
        assert download(ftp, f"/{name}") == CONTENT
        assert ftp.size(f"/{name}") == len(CONTENT)
        assert reply(ftp, f"MLST /{name}").split("\n")[1].endswith(f"; /{name}")
    ftp.encoding = "utf-8"
    for name in wanted.values():
        assert reply(ftp, f"RNFR /{name}").startswith("350 ")
        assert reply(ftp, f"RNTO /{name[:100]}2").startswith("250 ")
        assert reply(ftp, f"DELE /{name[:100]}2").startswith("250 ")
    assert store.list() == set()


def test_folders_with_odd_names(store: Store, ftp: ftplib.FTP) -> None:
    for name in (NAMES["quotes"], NAMES["leading dash"], NAMES["emoji"], NAMES["pattern"], NAMES["leading space"]):
        assert ftp.mkd(f"/{name}") == f"/{name}"
        assert reply(ftp, f"CWD /{name}").startswith("250 ")
        assert ftp.pwd() == f"/{name}"
        assert upload(ftp, "inside", CONTENT).startswith("226 ")
        assert store.read(f"{name}/inside") == CONTENT
        assert names(ftp, f"/{name}") == {"inside"}
        assert ftp.nlst(f"/{name}") == [f"/{name}/inside"]
        assert reply(ftp, "DELE inside").startswith("250 ")
        assert reply(ftp, "CWD /").startswith("250 ")
        assert reply(ftp, f"RMD /{name}").startswith("250 ")


REFUSED = {
    "256 bytes": "n" * 252 + "\N{PILE OF POO}",
    "line feed": "a\nb",
    "carriage return": "a\rb",
    "null": "a\0b",
    "forged reply": "a\n226 Transfer complete.",
}


@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
@pytest.mark.parametrize("name", REFUSED.values(), ids=REFUSED.keys())
def test_names_that_cannot_be_are_refused_in_one_line(store: Store, ftp: ftplib.FTP, name: str) -> None:
    store.write("a", CONTENT)
    before = store.list()
    commands = "STOR APPE MKD RETR SIZE MDTM CWD LIST MLSD MLST DELE STAT STOU"
    for command in commands.split():
        reply(ftp, "EPSV")
        answer = reply(ftp, f"{command} {name}")
        assert answer[0] == "5", (command, answer)
        assert "\n" not in answer
    assert reply(ftp, "RNFR a").startswith("350 ")
    assert reply(ftp, f"RNTO {name}")[0] == "5"
    assert reply(ftp, "NOOP").startswith("200 ")
    assert store.list() == before


def test_the_tail_of_a_command_that_is_too_long_is_no_command(store: Store, ftp: ftplib.FTP) -> None:
    store.write("a", CONTENT)
    for length in (5000, 70_000):
        for tail in ("DELE a", "\nDELE a"):
            assert reply(ftp, f"STOR {'x' * length}{tail}").startswith("500 ")
    assert ftp.sock is not None
    ftp.sock.sendall(b"STOR " + b"x" * 4000)
    ftp.sock.sendall(b"x" * 4000)
    assert reply(ftp, "DELE a").startswith("500 ")
    assert reply(ftp, "NOOP").startswith("200 ")
    assert store.read("a") == CONTENT


@pytest.mark.parametrize("store", ["local", "memory", "s3"], indirect=True)
def test_a_file_stored_decomposed_is_found_by_its_composed_name(store: Store, ftp: ftplib.FTP) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Schlüssel/ümläut") for form in ("NFC", "NFD"))
    store.write(decomposed, CONTENT)
    assert download(ftp, composed) == CONTENT
    assert ftp.size(composed) == len(CONTENT)
    assert upload(ftp, composed, b"new").startswith("226 ")
    assert store.list() == {decomposed}  # replaced, not a twin
    assert store.read(decomposed) == b"new"


# --- homes


ESCAPES = ["..", "/..", "../..", "/../..", "folder/../../bob", "/../bob", "./../bob", "//../bob", "folder/./../../bob"]


@pytest.fixture
def homes(store: Store, ftp_server: Serve) -> Iterator[ftplib.FTP]:
    """A client at home in /alice, beside bob, whose name begins hers, and with his secret above her."""
    for key in ("alice/mine", "alice/folder/mine", "bob/secret", "alicebob/secret", "secret"):
        store.write(key, key.encode())
    with connect(ftp_server(store, home="/alice")) as client:
        yield client


@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
@pytest.mark.parametrize("path", ESCAPES)
def test_nobody_leaves_home(store: Store, homes: ftplib.FTP, path: str) -> None:
    before = store.list()
    assert names(homes) == {"mine", "folder"}
    reply(homes, f"CWD {path}")
    assert homes.pwd() == "/"
    for command in ("RETR", "SIZE", "DELE", "MLST", "STAT"):
        reply(homes, "EPSV")
        assert reply(homes, f"{command} {path}/secret").startswith("550 "), command
    if path.endswith(".."):
        assert names(homes, path) == {"mine", "folder"}
    assert reply(homes, "RNFR mine").startswith("350 ")
    assert reply(homes, f"RNTO {path}/stolen")[0] in "25"
    outside = {key for key in store.list() if not key.startswith("alice/")}
    assert outside == {key for key in before if not key.startswith("alice/")}


@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_a_home_whose_name_begins_another_is_another(homes: ftplib.FTP) -> None:
    for path in ("/../alicebob/secret", "../alicebob/secret"):
        assert reply(homes, f"SIZE {path}").startswith("550 ")


def test_a_home_is_made_by_the_first_upload(store: Store, ftp_server: Serve) -> None:
    with connect(ftp_server(store, home="/new/home")) as ftp:
        assert names(ftp) == set()
        assert reply(ftp, "CWD /").startswith("250 ")
        assert reply(ftp, "MLST").startswith("250-")
        assert upload(ftp, "a", CONTENT).startswith("226 ")
        assert names(ftp) == {"a"}
    assert store.read("new/home/a") == CONTENT


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_symbolic_links_lead_nowhere(store: Store, ftp: ftplib.FTP, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    os.symlink(outside, store.path("folder"))
    os.symlink(outside / "secret", store.path("file"))
    assert names(ftp) == set()
    for command in (
        "CWD folder",
        "RETR folder/secret",
        "RETR file",
        "SIZE file",
        "DELE folder/secret",
        "STOR folder/new",
    ):
        reply(ftp, "EPSV")
        assert reply(ftp, command)[0] in "45", command
    reply(ftp, "EPSV")
    assert {path.name for path in outside.iterdir()} == {"secret"}


# --- bytes that are no UTF-8


RAW = b"caf\xe9 \xff\xfe"


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_names_that_are_not_utf_8_survive_on_a_local_store(store: Store, ftp: ftplib.FTP) -> None:
    speak_bytes(ftp)
    name = RAW.decode("latin-1")
    assert upload(ftp, name, CONTENT).startswith("226 ")
    assert os.listdir(os.fsencode(store.root)) == [RAW]
    assert names(ftp) == {name}
    assert ftp.nlst() == [name]
    assert download(ftp, name) == CONTENT
    assert reply_bytes(ftp, b"MLST " + RAW).count(RAW) == 2
    assert ftp.mkd(f"{name} folder") == f"/{name} folder"
    assert reply_bytes(ftp, b"CWD " + RAW + b" folder").startswith(b"250 ")
    assert RAW in reply_bytes(ftp, b"PWD")
    assert reply_bytes(ftp, b"RNFR /" + RAW).startswith(b"350 ")
    assert reply_bytes(ftp, b"RNTO /" + RAW + b"2").startswith(b"250 ")
    assert RAW in reply_bytes(ftp, b"SIZE missing" + RAW)
    assert reply_bytes(ftp, b"DELE /" + RAW + b"2").startswith(b"250 ")


def speak_bytes(ftp: ftplib.FTP) -> None:
    """Let bytes go through ftplib as they are."""
    assert ftp.sock is not None
    ftp.encoding = "latin-1"
    ftp.file = ftp.sock.makefile("r", encoding="latin-1")


def reply_bytes(ftp: ftplib.FTP, command: bytes) -> bytes:
    return reply(ftp, command.decode("latin-1")).encode("latin-1")


@pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)
def test_names_that_are_not_utf_8_are_refused_by_stores_that_know_only_it(store: Store, ftp: ftplib.FTP) -> None:
    speak_bytes(ftp)
    for command in ("SIZE ", "CWD ", "DELE ", "MLST ", "LIST "):
        reply(ftp, "EPSV")
        answer = reply_bytes(ftp, command.encode() + RAW)
        assert answer[:1] == b"5", (command, answer)
    with pytest.raises((ftplib.error_perm, ftplib.error_temp)):
        upload(ftp, RAW.decode("latin-1"), CONTENT)
    assert reply(ftp, "NOOP").startswith("200 ")
    assert store.list() == set()


# --- what others have put into the store


HOSTILE_KEYS = [
    "a\r\nb",
    "line\nbreak",
    "forged\r\n-rw-r--r--   1 ftp      ftp            13 Jan 01 00:00 forged",
    "a//b",
    "a/./b",
    "a/../good2",
    "empty//",
    "folder/../x",
    "folder/a\nb",
    "nul\0",
    " ",
    "-",
    ".",
]
LIST_LINE = re.compile(r"[-d][-rwx]{9} +\d+ ftp +ftp +\d+ [A-Z][a-z]{2} \d\d \d\d:\d\d (.+)")
MLSD_LINE = re.compile(r"(?:[a-z.]+=[^; ]+;)+ (.+)")


@pytest.mark.parametrize("store", ["memory", "s3", "gs"], indirect=True)
def test_hostile_keys_do_not_break_or_forge_a_listing(store: Store, ftp: ftplib.FTP) -> None:
    store.write("good", CONTENT)
    store.write("folder/good", CONTENT)
    for key in HOSTILE_KEYS:
        with contextlib.suppress(Exception):  # some a store, or its own client, does not take either
            store.write(key, CONTENT)
    for folder in ("/", "/folder"):
        shown = [name.removeprefix(folder).removeprefix("/") for name in ftp.nlst(folder)]
        assert "good" in shown
        assert set(shown) <= {"good", "folder", "a", "x", " ", "-", "line", "nul", "empty"}, shown
        for command, form in (("LIST", LIST_LINE), ("MLSD", MLSD_LINE)):
            lines: list[str] = []
            ftp.retrlines(f"{command} {folder}", lines.append)
            matches = [form.fullmatch(line) for line in lines]
            assert [match and match[1] for match in matches] == shown, lines
    ftp.voidcmd("TYPE I")
    assert download(ftp, "good") == CONTENT
    assert reply(ftp, "NOOP").startswith("200 ")


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_times_out_of_this_world_do_not_break_a_listing(store: Store, ftp: ftplib.FTP) -> None:
    times = ["nan", "inf", "-inf", "1e300", "-1e300", "-1e18", "1e11", "", "yesterday"]
    expected = [f"a{number}" for number in range(len(times))]
    for name, mtime in zip(expected, times, strict=True):
        store.filesystem.pipe_file(store.path(name), CONTENT, Metadata={"mtime": mtime})
    assert names(ftp) == set(expected)
    lines: list[str] = []
    ftp.retrlines("LIST", lines.append)
    ftp.voidcmd("TYPE I")
    assert [line.split()[-1] for line in lines] == expected
    for name in expected:
        assert reply(ftp, f"MDTM {name}")[:4] in {"213 ", "550 "}
        assert reply(ftp, f"MLST {name}").startswith("250-")
        assert download(ftp, name) == CONTENT


# -- names that a store can never hold


def refused_at_once(ftp: ftplib.FTP, command: str) -> str:
    """The reply to a command that is to be refused before a byte is asked for."""
    answer = reply(ftp, command)
    assert answer.startswith("553 "), (command, answer)
    return answer


@pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)
@pytest.mark.parametrize("mode", ["off", "minimal", "writes", "full"])
def test_a_key_that_is_too_long_is_refused_before_the_first_byte(
    store: Store, make_vfs: Callable[..., Any], ftp_server: Serve, mode: str
) -> None:
    vfs = make_vfs(store, cache_mode=mode, dir_markers=True)
    above = f"{'n' * 200}/" * 4
    room = 1023 - len(store.root.partition("/")[2]) - 1 - len(above)  # the key of a folder's marker ends with a slash
    longest = above + "n" * room
    with connect(ftp_server(vfs)) as ftp:
        folder = ""
        for name in longest.split("/")[:-1]:
            folder = f"{folder}/{name}"
            ftp.mkd(folder)
        ftp.storbinary(f"STOR {longest}", io.BytesIO(CONTENT))
        ftp.storbinary("STOR short", io.BytesIO(CONTENT))
        ftp.makepasv()
        for verb in ("STOR", "APPE", "MKD"):
            assert "1025 bytes of UTF-8 and the store takes 1024" in refused_at_once(ftp, f"{verb} {longest}x")
        assert reply(ftp, "RNFR short").startswith("350 ")
        refused_at_once(ftp, f"RNTO {longest}x")
    vfs.sync(timeout=30)
    assert {longest, "short"} <= store.list()
    assert f"{longest}x" not in store.list()


def test_gcs_refuses_the_names_that_it_keeps_for_itself(make_store: Callable[..., Store], ftp_server: Serve) -> None:
    store = make_store("gs", whole_bucket=True)
    with connect(ftp_server(store)) as ftp:
        ftp.mkd("/.well-known")
        refused_at_once(ftp, "MKD /.well-known/acme-challenge")
        assert upload(ftp, "/.well-known/other", CONTENT).startswith("226 ")


@pytest.mark.parametrize("mode", ["off", "writes"])
def test_a_local_path_that_is_too_long_is_refused_before_the_first_byte(
    local_store: Store, ftp_server: Serve, mode: str
) -> None:
    with connect(ftp_server(local_store, cache_mode=mode)) as ftp:
        while len(local_store.root) + len(ftp.pwd()) < 3890:
            ftp.mkd("n" * 200)
            ftp.cwd("n" * 200)
        ftp.makepasv()
        for verb in ("STOR", "APPE", "MKD"):
            refused_at_once(ftp, f"{verb} {'n' * 250}")
            refused_at_once(ftp, f"{verb} {'n' * 256}")


@pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)
def test_a_folder_is_not_renamed_where_a_key_below_it_becomes_too_long(store: Store, ftp_server: Serve) -> None:
    inside = "/".join(["i" * 250] * 3)
    store.write(f"d/{inside}/a", CONTENT)
    store.write("d/b", CONTENT)
    before = store.list()
    with connect(ftp_server(store)) as ftp:
        assert reply(ftp, "RNFR d").startswith("350 ")
        answer = refused_at_once(ftp, f"RNTO {'t' * 255}")
        assert "nothing was renamed" in answer
    assert store.list() == before
