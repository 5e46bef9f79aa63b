"""What object stores keep beside the bytes: times that rclone agrees on, content types, copies in parts."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from ftpvfs.backend import s3
from ftpvfs.backend.backend import Backend
from tests.conftest import Store
from tests.servers import rclone
from tests.test_backend import failing, get, listed, put

MIB = 2**20
MakeBackend = Callable[..., Backend]


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest, make_store: Any) -> Store:
    made: Store = make_store(request.param)
    return made


@pytest.fixture
def backend(store: Store, make_backend: MakeBackend) -> Backend:
    return make_backend(store)


only_s3 = pytest.mark.parametrize("store", ["s3"], indirect=True)
only_gs = pytest.mark.parametrize("store", ["gs"], indirect=True)


def write_described(store: Store, key: str, data: bytes) -> None:
    """An object as another program wrote it: with a content type, a cache rule and metadata of its own."""
    if store.kind == "s3":
        store.filesystem.pipe_file(
            store.path(key), data, ContentType="text/x-test", CacheControl="max-age=5", Metadata={"owner": "ann"}
        )
        return
    store.filesystem.pipe_file(
        store.path(key),
        data,
        content_type="text/x-test",
        metadata={"owner": "ann"},
        fixed_key_metadata={"cache_control": "max-age=5"},
    )


def description(store: Store, key: str) -> tuple[str, str | None]:
    """(content type, owner) of an object."""
    if store.kind == "s3":
        prefix = f"{store.root}/".partition("/")[2]
        head = store.filesystem.call_s3("head_object", Bucket=store.bucket, Key=prefix + key)
        return head["ContentType"], head["Metadata"].get("owner")
    info = store.filesystem.info(store.path(key))
    return info["contentType"], (info.get("metadata") or {}).get("owner")


def test_setting_the_mtime_keeps_everything_else(store: Store, backend: Backend) -> None:
    write_described(store, "a", b"bytes")

    backend.set_mtime("a", 1_234_567_890.0)

    assert description(store, "a") == ("text/x-test", "ann")
    assert store.read("a") == b"bytes"
    assert store.mtime("a") == 1_234_567_890.0


def test_a_copy_keeps_everything_else(store: Store, backend: Backend) -> None:
    write_described(store, "a", b"bytes")
    backend.set_mtime("a", 1_234_567_890.0)

    backend.copy("a", "folder/b")

    assert description(store, "folder/b") == ("text/x-test", "ann")
    assert store.mtime("folder/b") == 1_234_567_890.0


def test_a_copy_of_what_has_no_time_of_its_own_gets_the_time_it_was_written(store: Store, backend: Backend) -> None:
    store.write("a", b"bytes")
    written = backend.stat("a").mtime

    copied = backend.copy("a", "b")

    assert copied.mtime == pytest.approx(written, abs=1e-3)
    assert store.mtime("b") == pytest.approx(written, abs=1e-3)


def test_a_copy_keeps_its_time_though_the_stores_times_are_shown(store: Store, make_backend: MakeBackend) -> None:
    """--use-server-modtime says what is shown, not what is kept."""
    store.write("a", b"bytes", mtime=1_000_000_000.0)

    make_backend(store, server_mtime=True).copy("a", "b")

    assert store.mtime("b") == 1_000_000_000.0


def test_the_stores_own_times_are_shown_where_wanted(store: Store, make_backend: MakeBackend) -> None:
    store.write("a", b"bytes", mtime=1_000_000_000.0)
    backend = make_backend(store, server_mtime=True)

    for entry in (backend.stat("a"), listed(backend)["a"]):
        assert entry.mtime is not None
        assert entry.mtime > 1_600_000_000


def test_an_overwritten_copy_target_is_whole(store: Store, backend: Backend) -> None:
    store.write("a", b"new bytes")
    store.write("b", b"old")

    assert backend.copy("a", "b").fingerprint == backend.stat("b").fingerprint
    assert get(backend, "b") == b"new bytes"


@only_s3
@pytest.mark.parametrize("size", [12 * MIB + 3, 15 * MIB])
def test_large_objects_are_copied_in_parts(store: Store, backend: Backend, size: int) -> None:
    assert isinstance(backend, s3.S3Backend)
    backend.copy_limit, backend.copy_part = 10 * MIB, 5 * MIB
    data = os.urandom(size)
    put(backend, "a", data, mtime=1.5)

    entry = backend.copy("a", "b")

    assert entry.size == size
    assert store.read("b") == data
    assert store.mtime("b") == 1.5
    assert store.uploads() == set()


@only_s3
def test_the_mtime_of_a_large_object_is_set_by_a_copy_in_parts(store: Store, backend: Backend) -> None:
    assert isinstance(backend, s3.S3Backend)
    backend.copy_limit, backend.copy_part = 10 * MIB, 5 * MIB
    data = os.urandom(12 * MIB)
    put(backend, "a", data)

    changed = backend.set_mtime("a", 7.0)

    assert store.read("a") == data
    assert store.mtime("a") == 7.0
    assert changed.fingerprint == backend.stat("a").fingerprint


@only_s3
def test_a_copy_in_parts_that_fails_leaves_nothing(
    store: Store, make_proxy: Any, make_backend: MakeBackend
) -> None:
    proxy = make_proxy(store)
    backend = make_backend(store.proxied(proxy))
    assert isinstance(backend, s3.S3Backend)
    backend.copy_limit, backend.copy_part = 10 * MIB, 5 * MIB
    put(backend, "a", os.urandom(12 * MIB))
    proxy.fail_next(1000, method="PUT", target="partNumber=2", status=403, code="AccessDenied")

    with failing(13):
        backend.copy("a", "b")
    assert store.list() == {"a"}
    assert store.uploads() == set()


@only_s3
def test_a_known_size_gives_parts_that_fit_into_ten_thousand(backend: Backend) -> None:
    for size in (None, MIB, 100 * 2**30, 5 * 2**40):
        upload = backend.upload("a", size=size)
        whole = sum(upload.part_size(number) for number in range(10_000))  # type: ignore[attr-defined]
        assert whole >= (size or 5 * 2**40)
        upload.abort()


@only_gs
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2001-09-09T01:46:40Z", 1_000_000_000.0),
        ("2001-09-09T01:46:40.5Z", 1_000_000_000.5),
        ("2001-09-09T01:46:40.123456789Z", 1_000_000_000.123456789),
        ("2001-09-09T03:46:40.250000000+02:00", 1_000_000_000.25),
        ("2001-09-08T20:46:40-05:00", 1_000_000_000.0),
    ],
)
def test_times_are_read_in_every_form_that_rclone_writes(
    store: Store, backend: Backend, text: str, seconds: float
) -> None:
    store.filesystem.pipe_file(store.path("a"), b"1", metadata={"mtime": text})

    assert backend.stat("a").mtime == pytest.approx(seconds, abs=1e-6)
    assert listed(backend)["a"].mtime == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize("nonsense", ["", "yesterday", "12:00", "NaN"])
def test_a_time_that_is_nonsense_counts_for_nothing(store: Store, backend: Backend, nonsense: str) -> None:
    key = "Metadata" if store.kind == "s3" else "metadata"
    store.filesystem.pipe_file(store.path("a"), b"1", **{key: {"mtime": nonsense}})

    mtime = backend.stat("a").mtime
    assert mtime is not None
    assert mtime > 1_600_000_000


# -- rclone


def run_rclone(store: Store, *arguments: str) -> str:
    """Run rclone with `remote:` as the store's place."""
    options = store.storage_options
    if store.kind == "s3":
        remote = (
            f":s3,provider=Other,access_key_id={options['key']},secret_access_key={options['secret']},"
            f"endpoint='{options['endpoint_url']}':{store.root}"
        )
    else:
        endpoint = f"{options['endpoint_url']}/storage/v1/"
        remote = f":gcs,anonymous=true,bucket_policy_only=true,endpoint='{endpoint}':{store.root}"
    command = [argument.replace("remote:", remote + "/") for argument in arguments]
    done = subprocess.run(
        [str(rclone()), "--config", "", "--retries", "1", "--low-level-retries", "1", *command],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def seconds_of(text: str) -> float:
    """Of rclone's times, whose nine digits `fromisoformat` before Python 3.11 refuses."""
    whole, _, rest = text.replace("Z", "+00:00").partition(".")
    if not rest:
        return datetime.fromisoformat(whole).timestamp()
    fraction, sign, zone = rest.partition("+") if "+" in rest else rest.partition("-")
    return datetime.fromisoformat(whole + sign + zone).timestamp() + float(f"0.{fraction}")


def test_rclone_sees_our_times(store: Store, backend: Backend) -> None:
    put(backend, "a", b"12345", mtime=1_234_567_890.123456)
    put(backend, "folder/b", b"1", mtime=1_000_000_000.0)
    backend.set_mtime("folder/b", 1_100_000_000.5)

    found = {entry["Path"]: entry for entry in json.loads(run_rclone(store, "lsjson", "-R", "remote:"))}

    assert seconds_of(found["a"]["ModTime"]) == pytest.approx(1_234_567_890.123456, abs=1e-6)
    assert seconds_of(found["folder/b"]["ModTime"]) == pytest.approx(1_100_000_000.5, abs=1e-6)
    assert found["a"]["Size"] == 5


def test_we_see_rclones_times(store: Store, backend: Backend) -> None:
    store.write("old", b"1")
    run_rclone(store, "touch", "--timestamp", "2009-02-13T23:31:30.123456789", "remote:new")
    run_rclone(store, "touch", "--timestamp", "2001-09-09T01:46:40", "remote:old")

    assert backend.stat("new").mtime == pytest.approx(1_234_567_890.123456789, abs=1e-6)
    assert backend.stat("old").mtime == pytest.approx(1_000_000_000.0, abs=1e-6)
    entries = listed(backend)
    backend.true_mtimes("", [entry for entry in entries.values() if entry.mtime is None])
    assert entries["new"].mtime == pytest.approx(1_234_567_890.123456789, abs=1e-6)


def test_rclone_finds_nothing_to_do_for_what_we_uploaded(store: Store, backend: Backend, tmp_path: Any) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, size in (("small", 100), ("large", 20 * MIB)):
        (source / name).write_bytes(os.urandom(size))
        os.utime(source / name, (1_234_567_890.5, 1_234_567_890.5))
        put(backend, name, (source / name).read_bytes(), mtime=1_234_567_890.5, step=MIB)

    report = run_rclone(store, "sync", "--dry-run", "--combined", "-", str(source), "remote:")
    assert sorted(report.splitlines()) == ["= large", "= small"]
    run_rclone(store, "check", "--download", str(source), "remote:")
