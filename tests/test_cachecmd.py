"""`python -m ftpvfs cache ls|verify|flush`, beside a running write-back and without one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftpvfs import cachecmd
from ftpvfs.backend.backend import protocol_of
from ftpvfs.backend.local import LocalBackend
from ftpvfs.cache.database import DATABASE
from ftpvfs.cache.index import cache_name
from ftpvfs.clock import SYSTEM_CLOCK
from ftpvfs.config import VFSOptions
from tests.conftest import Store, run_program, wait_until
from tests.servers import FaultProxy
from tests.test_writeback import Rig

Run = Callable[..., Any]


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "caches"


@pytest.fixture
def make_rig(cache_dir: Path, make_backend: Callable[..., Any]) -> Iterator[Callable[..., Rig]]:
    """make_rig(store, **options) -> Rig on the folder that the program uses; not started."""
    rigs: list[Rig] = []

    def make(store: Store, **options: Any) -> Rig:
        backend = make_backend(store)
        folder = cache_dir / cache_name([protocol_of(store.url), backend.root])
        options = {"cache_mode": "full", "write_back": 0.0, **options}
        rigs.append(Rig(backend, folder, SYSTEM_CLOCK, replace(VFSOptions(), **options)))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def run(cache_dir: Path) -> Run:
    """run(store, "ls", ...) -> the finished program."""

    def run(store: Store, *arguments: str) -> Any:
        options = [f"--option={name}={json.dumps(value)}" for name, value in store.storage_options.items()]
        return run_program("cache", *arguments, store.url, "--cache-dir", str(cache_dir), *options)

    return run


def test_ls_shows_what_waits_and_what_is_cached(make_rig: Callable[..., Rig], local_store: Store, run: Run) -> None:
    rig = make_rig(local_store)
    rig.publish("stored.bin", b"x" * 100)
    rig.writeback.start()
    wait_until(rig.is_clean)
    rig.writeback.stop()
    draft = rig.cache.draft("waits.bin", user="bob")
    draft.write(0, b"12345")
    rig.cache.publish(draft, mtime=1.5, base=None)

    plain = run(local_store, "ls")
    assert plain.returncode == 0
    assert [line.split()[-1] for line in plain.stdout.splitlines()] == ["PATH", "stored.bin", "waits.bin"]
    stored, waits = json.loads(run(local_store, "ls", "--json").stdout)
    assert (stored["path"], stored["dirty"], stored["present"], stored["size"]) == ("stored.bin", False, 100.0, 100)
    assert (waits["path"], waits["state"], waits["size"], waits["user"]) == ("waits.bin", "waiting", 5, "bob")
    assert waits["age"] >= 0
    assert local_store.list() == {"stored.bin"}  # looking stores nothing


def test_ls_changes_nothing(make_rig: Callable[..., Rig], local_store: Store, run: Run, cache_dir: Path) -> None:
    rig = make_rig(local_store)
    rig.publish("waits", b"12345")
    rig.close()
    (folder,) = cache_dir.iterdir()
    (folder / "data" / "unknown").write_bytes(b"?")
    (folder / "incoming" / f"{'0' * 32}").write_bytes(b"?")
    before = {path for path in folder.rglob("*") if path.parent.name in ("data", "incoming", "quarantine")}
    (row,) = json.loads(run(local_store, "ls", "--json").stdout)
    assert (row["path"], row["size"]) == ("waits", 5)
    assert {path for path in folder.rglob("*") if path.parent.name in ("data", "incoming", "quarantine")} == before
    (folder / "data" / "unknown").unlink()
    (folder / "incoming" / f"{'0' * 32}").unlink()


def test_flush_keeps_what_it_stores_for_the_server(
    make_rig: Callable[..., Rig], local_store: Store, run: Run
) -> None:
    rig = make_rig(local_store)
    rig.publish("a", b"x")
    rig.close()
    assert run(local_store, "flush").returncode == 0
    (row,) = json.loads(run(local_store, "ls", "--json").stdout)
    assert (row["path"], row["state"], row["present"]) == ("a", "clean", 100.0)


def test_flush_remembers_the_times_of_files_where_the_store_does_not(
    make_rig: Callable[..., Rig], local_store: Store, run: Run, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    rig = make_rig(local_store)
    rig.publish("a", b"x", mtime=1_234_567_890.0)
    rig.close()
    timeless = replace(LocalBackend.capability, sets_mtime=False)
    monkeypatch.setattr(LocalBackend, "capability", timeless)
    options = replace(VFSOptions(), cache_dir=str(cache_dir))
    assert cachecmd.flush([cachecmd.Place(local_store.url, {}, None, options)]) == 0
    again = make_rig(local_store)
    version = again.backend.stat("a").version
    assert again.index.set_times("", None) == {"a": (version, 1_234_567_890.0)}


def test_ls_tells_of_caches_of_other_stores_that_hold_what_they_never_got(
    make_rig: Callable[..., Rig], local_store: Store, run: Run, cache_dir: Path
) -> None:
    rig = make_rig(local_store)
    rig.publish("waits", b"12345")
    rig.close()
    (folder,) = cache_dir.iterdir()
    folder.rename(cache_dir / "renamed")
    done = run(local_store, "ls", "--json")
    assert (done.returncode, done.stdout) == (1, "[]\n")
    assert "renamed" in done.stderr
    assert "1 files (5 bytes)" in done.stderr


def test_a_cache_whose_index_is_gone_is_one_all_the_same(
    make_rig: Callable[..., Rig], local_store: Store, run: Run, cache_dir: Path
) -> None:
    rig = make_rig(local_store)
    rig.publish("waits", b"12345")
    rig.close()
    for file in cache_dir.glob(f"*/{DATABASE}*"):
        file.unlink()
    assert run(local_store, "flush").returncode == 0
    assert local_store.read("waits") == b"12345"


def test_flush_of_some_stores_without_a_cache_says_which(
    make_rig: Callable[..., Rig], local_store: Store, run: Run, tmp_path: Path, cache_dir: Path
) -> None:
    rig = make_rig(local_store)
    rig.publish("a", b"x")
    rig.close()
    ini = tmp_path / "ftpvfs.ini"
    ini.write_text(f"[user:bob]\npassword = x\nurl = {tmp_path}\n[user:common]\npassword = x\n")
    done = run(local_store, "flush", "--config", str(ini))
    assert (done.returncode, done.stdout.strip().endswith("all is stored")) == (0, True), done.stderr
    assert done.stderr.startswith(f"{tmp_path}: there is no cache {cache_dir}/")


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_flush_stores_what_waits_without_a_server(
    make_rig: Callable[..., Rig], make_store: Callable[[str], Store], run: Run, kind: str
) -> None:
    store = make_store(kind)
    rig = make_rig(store)
    for number in range(5):
        rig.publish(f"f{number}", b"%d" % number)
    rig.close()

    done = run(store, "flush")
    assert (done.returncode, done.stdout.strip().endswith("all is stored")) == (0, True), done.stderr
    assert {path: store.read(path) for path in store.list()} == {f"f{number}": b"%d" % number for number in range(5)}
    assert not any(row["dirty"] for row in json.loads(run(store, "ls", "--json").stdout))


def test_flush_beside_a_server_lets_that_store_what_waits(
    make_rig: Callable[..., Rig], local_store: Store, run: Run
) -> None:
    rig = make_rig(local_store, write_back=3600.0)
    rig.writeback.start()
    rig.publish("a", b"x")
    assert run(local_store, "flush").returncode == 0
    assert local_store.read("a") == b"x"
    wait_until(lambda: rig.changes)  # it was this process that stored it


def test_flush_says_what_it_could_not_store(
    make_rig: Callable[..., Rig], s3_store: Store, run: Run, make_proxy: Callable[[Any], FaultProxy]
) -> None:
    rig = make_rig(s3_store)
    rig.publish("a", b"x")
    rig.close()
    proxy = make_proxy(s3_store)
    proxy.fail_next(100, method="PUT", status=403, code="AccessDenied")

    failed = run(s3_store.proxied(proxy), "flush")
    assert failed.returncode == 1
    assert "'a' is not stored: The store denies access" in failed.stderr
    (row,) = json.loads(run(s3_store, "ls", "--json").stdout)
    assert (row["state"], row["error"]) == ("failed", "The store denies access")


def test_verify_finds_bytes_that_are_not_the_stores(
    make_rig: Callable[..., Rig], s3_store: Store, run: Run
) -> None:
    rig = make_rig(s3_store)
    rig.publish("a", b"x" * 1000)
    rig.publish("b", b"y" * 1000)
    rig.writeback.start()
    wait_until(rig.is_clean)
    rig.close()
    sound = run(s3_store, "verify")
    assert (sound.returncode, "2 files, 0 problems" in sound.stdout) == (0, True), sound.stdout + sound.stderr

    (data,) = [file for file in (rig.folder / "clean").iterdir() if file.read_bytes() == b"x" * 1000]
    os.truncate(data, 999)
    with open(data, "ab") as file:
        file.write(b"!")
    broken = run(s3_store, "verify")
    assert broken.returncode == 1
    assert "'a' has other bytes here than at the store" in broken.stdout


def test_verify_says_that_the_store_cannot_be_asked(
    make_rig: Callable[..., Rig], s3_store: Store, run: Run
) -> None:
    make_rig(s3_store).publish("a", b"x")
    away = replace(s3_store, storage_options={**s3_store.storage_options, "endpoint_url": "http://127.0.0.1:1"})
    found = run(away, "verify")
    assert found.returncode == 1
    assert "nothing can be compared with the store" in found.stdout
    assert "1 problems" in found.stdout.splitlines()[-1]


@pytest.mark.parametrize("arguments", [("cache",), ("cache", "lst"), ("cache", "flush", "--json")])
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...]) -> None:
    refused = run_program(*arguments)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
