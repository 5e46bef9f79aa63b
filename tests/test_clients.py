"""Clients that people have (lftp, curl, ncftp, tnftp, inetutils' ftp, rclone) against `python -m ftpvfs`.

Bytes are compared at the store.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launched, Store
from tests.servers import rclone

MIB = 2**20
TIME = 1577934245  # 2020-01-02 03:04:05 UTC

# Sizes around those of a part of an upload, and names that are awkward on a command line.
TREE = {
    "empty": b"",
    "one": b"1",
    "folder/text.txt": b"line\r\nline\n" * 1000,
    "folder/deeper/large.bin": os.urandom(MIB) * 9,
    "folder/with spaces/ü 'quoted' \N{SNOWMAN}.bin": os.urandom(70_000),
}

needs = {
    name: pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")
    for name in ("lftp", "curl", "ncftpput", "ncftpget", "tnftp", "inetutils-ftp")
}


@pytest.fixture(params=["local", "s3", "gs"])
def store(request: pytest.FixtureRequest, make_store: Any) -> Store:
    made: Store = make_store(request.param)
    return made


@pytest.fixture
def server(store: Store, launched: Callable[..., Launched]) -> Launched:
    return launched(store.url, *(f"--option={key}={value}" for key, value in store.storage_options.items()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The tree on the client's disk, every file of a known age."""
    for name, data in TREE.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (TIME, TIME))
    return tmp_path / "source"


def run(*command: str | Path, status: int = 0, **options: Any) -> str:
    """Run a client; AssertionError with what it said when it fails."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=100, check=False, **options
    )
    assert done.returncode == status, f"{command}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tree_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tree_at(store: Store) -> dict[str, bytes]:
    return {key: store.read(key) for key in store.list()}


# --- lftp


def lftp(server: Launched, script: str) -> str:
    host, port = server.address
    settings = "set net:max-retries 2; set net:timeout 20; set ftp:charset utf-8; set cmd:fail-exit yes"
    return run("lftp", "-c", f"{settings}; open ftp://{host}:{port}; {script}", env={**os.environ, "LC_ALL": "C.UTF-8"})


@needs["lftp"]
def test_lftp_mirrors_both_ways_and_keeps_times(store: Store, server: Launched, source: Path, tmp_path: Path) -> None:
    lftp(server, f"mirror -R --no-perms {source} up")
    assert tree_at(store) == {f"up/{name}": data for name, data in TREE.items()}
    assert {round(store.mtime(key)) for key in store.list()} == {TIME}
    lftp(server, f"mirror --no-perms --parallel=3 up {tmp_path}/down")
    assert tree_in(tmp_path / "down") == TREE
    assert {path.stat().st_mtime for path in (tmp_path / "down").rglob("*") if path.is_file()} == {TIME}
    left_to_do = lftp(server, f"mirror -R --no-perms --verbose=3 --dry-run {source} up")
    assert not re.search("^(get|put|Transferring|Removing)", left_to_do, re.M), left_to_do


@needs["lftp"]
def test_lftp_renames_deletes_and_gets_several(store: Store, server: Launched, tmp_path: Path) -> None:
    for number in range(5):
        store.write(f"a{number}.csv", str(number).encode())
    store.write("b.txt", b"b")
    lftp(server, f"mget -O {tmp_path} *.csv; mv a0.csv c.csv; rm a1.csv; mkdir d; mv a2.csv d/; rm -r d; mrm a*.csv")
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == [f"a{number}.csv" for number in range(5)]
    assert tree_at(store) == {"b.txt": b"b", "c.csv": b"0"}


@needs["lftp"]
def test_lftp_mirrors_access_rights_to_a_local_folder(
    local_store: Store, launched: Callable[..., Launched], source: Path
) -> None:
    for number, mode in enumerate((0o600, 0o755, 0o440)):
        (source / f"file {number}").touch(mode)
        (source / f"file {number}").chmod(mode)
    (source / "folder").chmod(0o750)
    lftp(launched(local_store.url), f"mirror -R {source} up")
    for number, mode in enumerate((0o600, 0o755, 0o440)):
        assert os.stat(local_store.path(f"up/file {number}")).st_mode & 0o777 == mode
    assert os.stat(local_store.path("up/folder")).st_mode & 0o777 == 0o750


@needs["lftp"]
def test_lftp_resumes_a_download(store: Store, server: Launched, tmp_path: Path) -> None:
    data = TREE["folder/deeper/large.bin"]
    store.write("large", data)
    (tmp_path / "large").write_bytes(data[: 5 * MIB])
    lftp(server, f"lcd {tmp_path}; get -c large")
    assert (tmp_path / "large").read_bytes() == data


# --- curl


def curl(*arguments: str | Path, status: int = 0) -> str:
    return run("curl", "-sS", "--max-time", "60", *arguments, status=status)


@needs["curl"]
def test_curl_uploads_lists_downloads_and_resumes(
    store: Store, server: Launched, source: Path, tmp_path: Path
) -> None:
    url = "ftp://{}:{}".format(*server.address)
    for name in ("empty", "one", "folder/deeper/large.bin"):
        curl("-T", source / name, "--ftp-create-dirs", f"{url}/new/{name}")
        assert store.read(f"new/{name}") == TREE[name]
    assert store.list() == {"new/empty", "new/one", "new/folder/deeper/large.bin"}
    lines = curl(f"{url}/new/").splitlines()
    assert [line.split()[-1] for line in lines] == ["empty", "folder", "one"]
    assert curl("--list-only", f"{url}/new/").split() == ["empty", "folder", "one"]
    got = tmp_path / "got"
    got.write_bytes(TREE["folder/deeper/large.bin"][: 3 * MIB])
    curl("-C", "-", "-o", got, f"{url}/new/folder/deeper/large.bin")
    assert got.read_bytes() == TREE["folder/deeper/large.bin"]
    assert curl("-r", "0-0", f"{url}/new/one") == "1"
    curl(f"{url}/new/missing", status=78)  # "the resource does not exist"
    curl("-Q", "RNFR new/one", "-Q", "RNTO new/two", f"{url}/new/")
    assert store.read("new/two") == b"1"


@needs["curl"]
def test_curl_is_told_that_it_cannot_append(store: Store, server: Launched, source: Path) -> None:
    store.write("one", b"content")
    url = "ftp://{}:{}".format(*server.address)
    curl("--append", "-T", source / "one", f"{url}/one", status=25)
    assert store.read("one") == b"content"


# --- ncftp


@needs["ncftpput"]
@needs["ncftpget"]
def test_ncftp_puts_and_gets_trees(store: Store, server: Launched, source: Path, tmp_path: Path) -> None:
    host, port = server.address
    run("ncftpput", "-R", "-m", "-P", str(port), host, "/up", source)
    assert tree_at(store) == {f"up/source/{name}": data for name, data in TREE.items()}
    (tmp_path / "down").mkdir()
    run("ncftpget", "-R", "-T", "-P", str(port), host, tmp_path / "down", "/up/source")
    assert tree_in(tmp_path / "down" / "source") == TREE


# --- the classic ftp


def classic(program: str, server: Launched, folder: Path, *commands: str) -> str:
    """Run a script of the classic client, with `folder` as its own."""
    host, port = server.address
    script = "\n".join([f"open {host} {port}", "user anonymous guest", "binary", *commands, "bye", ""])
    quiet = ["-n", "-i", "-v"]  # no automatic login, no questions
    return run(program, *quiet, input=script, cwd=folder)


@pytest.mark.parametrize("program", [pytest.param(name, marks=needs[name]) for name in ("tnftp", "inetutils-ftp")])
def test_the_classic_ftp_gets_and_deletes_what_a_pattern_matches(
    store: Store, server: Launched, tmp_path: Path, program: str
) -> None:
    contents = {"in/a.csv": b"1", "in/b c.csv": b"22", "in/d.txt": b"3", "top.csv": b"4"}
    for name, data in contents.items():
        store.write(name, data)
    got = tmp_path / "got"
    (got / "in").mkdir(parents=True)
    classic(program, server, got, "mget in/*.csv", "mget *.csv")
    assert tree_in(got) == {name: data for name, data in contents.items() if name.endswith(".csv")}
    said = classic(program, server, got, "nlist in", "nlist in/*.txt")
    assert "in/d.txt" in said.splitlines()
    classic(program, server, got, "mdelete in/*.csv")
    assert store.list() == {"in/d.txt", "top.csv"}


# --- rclone


@pytest.fixture
def remote(server: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """remote(command, *arguments) -> what rclone says; `:ftp:` is the server."""
    host, port = server.address
    monkeypatch.setenv("TZ", "UTC")  # in which it shows times
    try:
        program = rclone()
    except Exception as error:  # noqa: BLE001 - whatever keeps the wheel from being found
        pytest.skip(f"rclone is not installed: {error}")
    configuration = tmp_path / "rclone.conf"
    configuration.touch()
    password = run(program, "obscure", "guest").strip()
    flags = [
        "--config", configuration, "--ftp-host", host, "--ftp-port", str(port), "--ftp-user", "anonymous",
        "--ftp-pass", password, "--retries", "1", "--low-level-retries", "1",
    ]  # fmt: skip
    return lambda command, *arguments: run(program, command, *arguments, *flags)


def test_rclone_syncs_checks_and_sees_times(
    store: Store, remote: Callable[..., str], source: Path, tmp_path: Path
) -> None:
    remote("sync", source, ":ftp:up")
    assert tree_at(store) == {f"up/{name}": data for name, data in TREE.items()}
    remote("check", "--download", source, ":ftp:up")
    listed = remote("lsl", ":ftp:up")
    assert len(re.findall(r" 2020-01-02 03:04:05\.0+ ", listed)) == len(TREE)
    assert {round(store.mtime(key)) for key in store.list()} == {TIME}
    (source / "one").unlink()
    (source / "two").write_bytes(b"2")
    remote("sync", source, ":ftp:up")
    assert "up/one" not in store.list()
    assert store.read("up/two") == b"2"
    remote("sync", ":ftp:up", tmp_path / "down")
    assert tree_in(tmp_path / "down") == tree_in(source)
    remote("moveto", ":ftp:up/folder", ":ftp:moved")
    assert store.read("moved/deeper/large.bin") == TREE["folder/deeper/large.bin"]
    remote("purge", ":ftp:moved")
    assert {key for key in store.list() if key.startswith("moved/")} == set()
