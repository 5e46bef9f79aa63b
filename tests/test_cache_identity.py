"""A cache folder is one store's: no other gets its files, and one that was only moved is not orphaned."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from ftpvfs import VFS
from ftpvfs.cache.identity import IDENTITY, Identity, claim, is_in_use
from ftpvfs.config import ConfigError, vfs_options
from ftpvfs.coordination.lockfile import LockFile
from tests.conftest import Store

WAITS = 30.0
WORKERS = 4


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """make(url, ...) -> VFS with the cache `photos`, whose files wait; closed when the test ends."""
    made: list[VFS] = []

    def make(url: str, **options: Any) -> VFS:
        options = {"write_back": "1h", "cache_mode": "full", "name": "photos", **options}
        made.append(VFS(url, cache_dir=str(tmp_path / "cache"), **options))
        return made[-1]

    yield make
    for vfs in made:
        vfs.close()


@pytest.fixture
def stores(tmp_path: Path) -> list[str]:
    """Two folders to serve."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def put(vfs: VFS, path: str, data: bytes) -> None:
    with vfs.open(path, "wb") as file:
        file.write(data)


def get(vfs: VFS, path: str) -> bytes:
    with vfs.open(path) as file:
        return bytes(file.read())


@pytest.mark.parametrize("mode", ["off", "writes"])
def test_what_waits_for_one_store_never_gets_to_another(make: Any, stores: list[str], mode: str) -> None:
    one, two = stores
    with make(one) as vfs:
        put(vfs, "a", b"for one")
    with pytest.raises(OSError, match=r"1 changes .* wait for file://.*/one, and not for .*/two: .*--name") as caught:
        make(two, cache_mode=mode).prepare()
    assert caught.value.errno == errno.EBUSY
    with make(one) as vfs:
        vfs.sync(WAITS)
    assert (Path(one) / "a").read_bytes() == b"for one"
    assert list(Path(two).iterdir()) == []


def test_a_cache_in_which_nothing_waits_is_taken_over_without_what_was_in_it(
    make: Any, stores: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = stores
    with make(one) as vfs:
        put(vfs, "a", b"one's")
        vfs.sync(WAITS)
    (Path(two) / "a").write_bytes(b"two's")
    with caplog.at_level(logging.WARNING), make(two) as vfs:
        assert vfs.core.parts.cache.all_records() == []
        assert get(vfs, "a") == b"two's"
        put(vfs, "b", b"b")
        vfs.sync(WAITS)
    assert "nothing waits in this cache of file://" in caplog.text
    assert (Path(one) / "a").read_bytes() == b"one's"
    assert not (Path(one) / "b").exists()


def test_a_cache_that_another_process_uses_is_not_taken_over(make: Any, stores: list[str]) -> None:
    one, two = stores
    with make(one) as vfs:
        vfs.prepare()
        with pytest.raises(OSError, match=r"in use for file://.*/one"):
            make(two).prepare()
        with make(one) as second:
            put(second, "a", b"a")
        assert get(vfs, "a") == b"a"


def test_a_store_with_another_endpoint_gets_what_waits_and_a_warning_is_logged(
    s3_store: Store, make: Any, make_proxy: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    proxied = s3_store.proxied(make_proxy(s3_store))
    with make(proxied.url, storage_options=proxied.storage_options) as vfs:
        put(vfs, "a", b"waits")
    with caplog.at_level(logging.WARNING), make(s3_store.url, storage_options=s3_store.storage_options) as vfs:
        vfs.sync(WAITS)
    assert "1 changes made for s3://" in caplog.text
    assert s3_store.read("a") == b"waits"


def test_processes_that_start_together_do_not_take_each_other_for_strangers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As workers do at a start after the endpoint was edited: each finds the old one, and the others looking, too."""
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(WORKERS) as threads:
        for number in range(30):
            mine = Identity("s3", "bucket", f"host-{number}")
            together = Barrier(WORKERS)

            def start(mine: Identity = mine, together: Barrier = together) -> LockFile:
                together.wait(60)
                return claim(tmp_path, mine)

            claims = [each.result(60) for each in [threads.submit(start) for _ in range(WORKERS)]]
            assert json.loads((tmp_path / IDENTITY).read_text())["host"] == mine.host
            for each in claims:
                each.close()
    assert caplog.text == ""


def test_another_host_of_a_cache_in_use_is_warned_of_once_it_is_true(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Identity("s3", "bucket", "one"), Identity("s3", "bucket", "two")
    with caplog.at_level(logging.WARNING), closing(claim(tmp_path, first)), closing(claim(tmp_path, second)):
        assert "another process uses this cache for s3://bucket at one; this is for s3://bucket at two" in caplog.text
        assert is_in_use(tmp_path)
    assert not is_in_use(tmp_path)


def test_a_cache_of_before_is_its_first_store_s(make: Any, stores: list[str], tmp_path: Path) -> None:
    one, two = stores
    with make(one) as vfs:
        put(vfs, "a", b"waits")
    (tmp_path / "cache" / "photos" / IDENTITY).unlink()
    with make(one) as vfs:
        assert get(vfs, "a") == b"waits"
    with pytest.raises(OSError, match="wait for"):
        make(two).prepare()


@pytest.mark.parametrize(
    ("url", "options", "root", "shown"),
    [
        ("s3://b/p", {"endpoint_url": "http://me:secret@h:90/x", "secret": "secret"}, "b/p", "s3://b/p at h:90"),
        ("s3a://b", {"client_kwargs": {"endpoint_url": "https://h"}}, "b", "s3://b at h"),
        ("sftp://me:secret@h/x", {}, "/x", "sftp://x at h"),
        ("/srv/x", {}, "/srv/x", "file:///srv/x"),
    ],
)
def test_an_identity_has_no_secrets(url: str, options: dict[str, Any], root: str, shown: str) -> None:
    assert str(Identity.of(url, options, root)) == shown
    assert "secret" not in repr(Identity.of(url, options, root))


@pytest.mark.parametrize("name", ["@bans", "@"])
def test_names_that_are_ours_are_no_stores(name: str) -> None:
    with pytest.raises(ConfigError, match="no name for a cache"):
        vfs_options(name=name)
