"""Uploads and deletes that touch one version alone, and uploads of files that are on the disk already."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.backend import gcs, objectstore, s3
from ftpvfs.backend.backend import ABSENT, ANY, Backend, Condition, Entry
from ftpvfs.errors import ECHANGED
from ftpvfs.memory import MemoryBudget
from tests.conftest import Store, wait_until
from tests.servers import FaultProxy
from tests.test_backend import failing, get
from tests.test_backend_faults import content, lose_answer

MIB = 2**20
MakeBackend = Callable[..., Backend]
LARGE = 20 * MIB + 7  # more than one part everywhere

objects_only = pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)


@pytest.fixture
def backend(store: Store, make_backend: MakeBackend) -> Backend:
    return make_backend(store)


@pytest.fixture
def send(tmp_path: Path) -> Callable[..., Entry]:
    """send(backend, path, data, replaces) -> Entry, from a file on the disk."""

    def send(backend: Backend, path: str, data: bytes, replaces: Condition = ANY, mtime: float | None = 1.5) -> Entry:
        with open(tmp_path / "source", "w+b") as file:
            file.write(data)
            file.flush()
            return backend.upload_file(path, file.fileno(), len(data), mtime=mtime, replaces=replaces).send()

    return send


def put(backend: Backend, path: str, data: bytes, replaces: Condition = ANY, mtime: float | None = 1.5) -> Entry:
    upload = backend.upload(path, mtime=mtime, replaces=replaces)
    try:
        upload.write(data)
        return upload.commit()
    except BaseException:
        upload.abort()
        raise


@pytest.fixture(params=["written", "file"])
def upload(request: pytest.FixtureRequest, send: Callable[..., Entry]) -> Callable[..., Entry]:
    return put if request.param == "written" else send


# -- conditions


@pytest.mark.parametrize("size", [10, LARGE])
def test_a_new_object_does_not_replace_one_that_came_meanwhile(
    backend: Backend, store: Store, upload: Callable[..., Entry], size: int
) -> None:
    upload(backend, "a", content(size), ABSENT)
    with failing(ECHANGED):
        upload(backend, "a", content(size), ABSENT, 2.5)

    assert store.mtime("a") == 1.5 or store.kind == "memory"
    if store.server is not None:
        assert store.uploads() == set()
    assert backend.tuning.memory.used == 0


@pytest.mark.parametrize("size", [10, LARGE])
def test_only_the_version_that_is_known_is_replaced(
    backend: Backend, store: Store, upload: Callable[..., Entry], size: int
) -> None:
    first = upload(backend, "a", b"first")
    second = upload(backend, "a", content(size), first.fingerprint)
    assert second.fingerprint == backend.stat("a").fingerprint
    with failing(ECHANGED):
        upload(backend, "a", content(size), first.fingerprint, 2.5)

    assert backend.stat("a").fingerprint == second.fingerprint


def test_what_is_gone_is_not_replaced(backend: Backend, store: Store, upload: Callable[..., Entry]) -> None:
    first = upload(backend, "a", b"first")
    backend.remove("a")
    with failing(ECHANGED):
        upload(backend, "a", b"second", first.fingerprint)

    assert store.list() == set()


def test_a_delete_names_its_version_to_google(
    gs_store: Store, make_backend: MakeBackend, make_proxy: Callable[[Any], FaultProxy]
) -> None:
    """Which heeds it; fake-gcs-server does not."""
    proxy = make_proxy(gs_store)
    backend = make_backend(gs_store.proxied(proxy))
    entry = put(backend, "a", b"first")
    backend.remove("a", only=entry.fingerprint)

    assert f"ifGenerationMatch={entry.fingerprint}" in proxy.seen[-1].target


@pytest.mark.parametrize("store", ["local", "memory", "s3"], indirect=True)
def test_only_the_version_that_is_known_is_removed(backend: Backend, store: Store) -> None:
    first = put(backend, "a", b"first")
    second = put(backend, "a", b"second")
    with failing(ECHANGED):
        backend.remove("a", only=first.fingerprint)
    assert store.read("a") == b"second"

    backend.remove("a", only=second.fingerprint)
    assert store.list() == set()
    backend.remove("a", only=second.fingerprint)  # an earlier try's answer may have been lost


@pytest.mark.parametrize("size", [10, LARGE])
def test_what_was_sent_before_is_no_conflict(
    backend: Backend, upload: Callable[..., Entry], size: int
) -> None:
    """An earlier try got through, perhaps of a process that is no more: the same bytes, the same time."""
    data = content(size)
    before = upload(backend, "a", b"before")
    first = upload(backend, "a", data, before.fingerprint)

    again = upload(backend, "a", data, before.fingerprint)

    assert (again.fingerprint, again.size) == (first.fingerprint, size)
    assert get(backend, "a") == data
    assert backend.tuning.memory.used == 0


@objects_only
@pytest.mark.parametrize("size", [10, LARGE])
@pytest.mark.parametrize("replaces", ["nothing", "a version"])
def test_a_lost_answer_is_no_conflict(
    store: Store, make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch, upload: Callable[..., Entry],
    size: int, replaces: str,
) -> None:  # fmt: skip
    backend = make_backend(store, low_level_retries=4)
    condition: Any = ABSENT if replaces == "nothing" else put(backend, "a", b"before").fingerprint
    owner: type = s3.S3Backend if store.kind == "s3" else gcs.GCSBackend
    last_step = {"s3": ("put_object", "complete_multipart_upload"), "gs": ("POST", "PUT")}[store.kind]
    data = content(size)
    if store.kind == "gs" and size > 100:
        pytest.skip("fake-gcs-server takes a chunk that is sent again for more bytes")
    lose_answer(monkeypatch, owner, last_step[size > 100])

    entry = upload(backend, "a", data, condition)

    assert entry.fingerprint == backend.stat("a").fingerprint
    assert get(backend, "a") == data
    if store.kind == "s3":
        assert store.uploads() == set()


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_store_without_conditions_is_asked_right_before(
    store: Store, make_backend: MakeBackend, make_proxy: Callable[[Any], FaultProxy]
) -> None:
    proxy = make_proxy(store)
    backend = make_backend(store.proxied(proxy), low_level_retries=1)
    first = put(backend, "a", b"first")
    proxy.fail_next(1, method="PUT", status=501, code="NotImplemented")

    second = put(backend, "a", b"second", first.fingerprint)
    assert store.read("a") == b"second"
    proxy.reset_counters()
    with failing(ECHANGED):
        put(backend, "a", b"third", first.fingerprint, 2.5)
    assert proxy.requests["PUT"] == 0
    put(backend, "a", b"third", second.fingerprint)
    assert store.read("a") == b"third"


# -- files


@pytest.mark.parametrize("size", [0, 1, 16 * MIB, 16 * MIB + 1, 40 * MIB])
def test_a_file_is_stored_whole(
    backend: Backend, store: Store, send: Callable[..., Entry], size: int
) -> None:
    data = content(size)
    entry = send(backend, "a.bin", data)

    assert store.read("a.bin") == data
    assert (entry.name, entry.size, entry.fingerprint) == ("a.bin", size, backend.stat("a.bin").fingerprint)
    if backend.capability.sets_mtime:
        assert store.mtime("a.bin") == 1.5
    assert backend.tuning.memory.used == 0


@objects_only
def test_a_file_is_read_as_it_is_sent_within_the_budget(
    store: Store, make_backend: MakeBackend, make_proxy: Callable[[Any], FaultProxy], tmp_path: Path
) -> None:
    proxy = make_proxy(store)
    memory = MemoryBudget(40 * MIB)
    backend = make_backend(store.proxied(proxy), memory=memory)
    (tmp_path / "source").write_bytes(content(100 * MIB))
    descriptor = os.open(tmp_path / "source", os.O_RDONLY)
    used: list[int] = []
    original = objectstore.Slice.read

    def watched(part: objectstore.Slice) -> bytes:
        used.append(memory.used)
        return original(part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectstore.Slice, "read", watched)
        backend.upload_file("a", descriptor, 100 * MIB).send()
    os.close(descriptor)

    assert 16 * MIB <= max(used) <= 40 * MIB
    assert memory.used == 0
    assert store.filesystem.size(store.path("a")) == 100 * MIB


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


@objects_only
def test_an_upload_of_a_file_that_is_called_off_leaves_nothing(
    store: Store, make_backend: MakeBackend, make_proxy: Callable[[Any], FaultProxy], tmp_path: Path,
    pool: ThreadPoolExecutor,
) -> None:  # fmt: skip
    store.write("a", b"old")
    proxy = make_proxy(store)
    proxy.bandwidth = 8 * MIB
    backend = make_backend(store.proxied(proxy), memory=MemoryBudget(8 * MIB))  # a part at a time
    (tmp_path / "source").write_bytes(content(100 * MIB))
    descriptor = os.open(tmp_path / "source", os.O_RDONLY)
    upload = backend.upload_file("a", descriptor, 100 * MIB)
    sending = pool.submit(upload.send)
    wait_until(lambda: proxy.sent > MIB)

    upload.cancel()
    proxy.bandwidth = None
    with failing(errno.ECANCELED):
        sending.result(timeout=30)
    os.close(descriptor)

    assert upload.sent < 100 * MIB
    assert store.read("a") == b"old"
    assert store.uploads() == set()
    assert backend.tuning.memory.used == 0


def test_what_is_called_off_before_it_began_changes_nothing(backend: Backend, store: Store, tmp_path: Path) -> None:
    store.write("a", b"old")
    (tmp_path / "source").write_bytes(b"new")
    with open(tmp_path / "source", "rb") as file:
        upload = backend.upload_file("a", file.fileno(), 3)
        upload.cancel()
        with failing(errno.ECANCELED):
            upload.send()
    assert store.read("a") == b"old"


def test_a_file_that_is_shorter_than_it_was_is_not_stored(backend: Backend, store: Store, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"short")
    with open(tmp_path / "source", "rb") as file, failing(errno.EIO):
        backend.upload_file("a", file.fileno(), 30).send()
    assert store.list() == set()


def test_files_of_many_threads_do_not_mix(
    backend: Backend, store: Store, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    gate = threading.Barrier(4)

    def one(name: str) -> None:
        (tmp_path / name).write_bytes(name.encode() * 1000)
        with open(tmp_path / name, "rb") as file:
            gate.wait()
            backend.upload_file(name, file.fileno(), 1000).send()

    for future in [pool.submit(one, name) for name in "abcd"]:
        future.result(timeout=30)
    assert {name: store.read(name) for name in "abcd"} == {name: name.encode() * 1000 for name in "abcd"}
