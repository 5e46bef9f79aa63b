"""The README's programs do what it says, word for word but for the names of stores, folders and ports."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Store, connect, download, free_ports, program_environment, upload, wait_until
from tests.servers import HOST

PROGRAMS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
SERVING = re.compile(r"^.*\.serve_forever\(\)$", re.M)


@pytest.fixture
def store(s3_store: Store) -> Store:
    return s3_store


class Reader:
    """Somebody who runs what the README says, and has a store of their own for it."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        (self.port,) = free_ports(1)
        # Where the README gives no options they come from the environment, as it says.
        self._environment = program_environment({"FSSPEC_S3": json.dumps(store.storage_options)})

    def program(self, *texts: str) -> list[str]:
        """The command that runs these texts one after another, of those that serve only the last to its end."""
        text = "\n".join([*(SERVING.sub("", each) for each in texts[:-1]), texts[-1]])
        options = self._store.storage_options
        for ours, theirs in {
            "s3://bucket/prefix": self._store.url,
            "http://127.0.0.1:9000": options["endpoint_url"],
            '"KEY"': repr(options["key"]),
            '"SECRET"': repr(options["secret"]),
            "/var/cache/ftpvfs": str(self._folder),
            "2121": str(self.port),
        }.items():
            text = text.replace(ours, theirs)
        return [sys.executable, "-c", text]

    def run(self, *texts: str) -> str:
        """Run the texts to their end; return what they print."""
        result = subprocess.run(
            self.program(*texts), env=self._environment, capture_output=True, text=True, check=False, timeout=100
        )
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    @contextlib.contextmanager
    def serving(self, *texts: str) -> Iterator[tuple[str, int]]:
        """Run the texts while the block runs; give the address at which they listen."""
        process = subprocess.Popen(self.program(*texts), env=self._environment, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: process.poll() is not None or listens((HOST, self.port)), timeout=60)
            assert process.poll() is None
            yield (HOST, self.port)
        finally:
            process.kill()
            process.wait()


def listens(address: tuple[str, int]) -> bool:
    """Tell whether anybody listens there."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=30):
        return True
    return False


@pytest.fixture
def reader(store: Store, tmp_path: Path) -> Reader:
    return Reader(store, tmp_path / "cache folder")


def named(word: str) -> str:
    """The one program in which the word is."""
    (found,) = [program for program in PROGRAMS if word in program]
    return found


EMBEDDED, OURS = named("ThreadedFTPServer"), named("VFSServer(")
KEYWORDS, HOMES, FILES, FSSPEC = named("cache_mode="), named("VFSHomes"), named("vfs.scandir"), named("import fsspec")


def test_all_programs_are_run_here() -> None:
    assert {EMBEDDED, OURS, KEYWORDS, HOMES, FILES, FSSPEC} == set(PROGRAMS)


@pytest.mark.parametrize("texts", [(EMBEDDED,), (EMBEDDED, OURS)], ids=["pyftpdlib's server", "our server"])
def test_its_servers_serve(store: Store, reader: Reader, texts: tuple[str, ...]) -> None:
    with reader.serving(*texts) as address, connect(address, "alice", "secret") as ftp:
        assert upload(ftp, "a", b"data").startswith("226 ")
        assert download(ftp, "a") == b"data"
        assert store.read("alice/a") == b"data"


def test_its_keywords_are_those_that_there_are(store: Store, reader: Reader) -> None:
    imports = "from ftpvfs import VFS\n"
    use = "with vfs: print(vfs.write_bytes('a', b'data'), vfs.listdir(), vfs.options.cache_mode); vfs.sync(30)"
    assert reader.run(imports, KEYWORDS, use) == "4 ['a'] full\n"
    assert store.read("a") == b"data"


def test_its_homes_are_in_the_vfs(reader: Reader) -> None:
    assert reader.run(HOMES, "print(users.get_home_dir('bob'))") == "/bob\n"


def test_its_files_are_written_and_listed(store: Store, reader: Reader) -> None:
    assert reader.run(FILES) == "notes.txt 22\ntoday.csv 3\n"
    assert store.list() == {"reports/notes.txt", "reports/today.csv"}


def test_its_files_of_fsspec_are_in_the_store(store: Store, reader: Reader) -> None:
    assert reader.run(FSSPEC) == "['reports/today.csv'] b'name,size\\n'\n"
    assert store.read("reports/today.csv") == b"name,size\n"
