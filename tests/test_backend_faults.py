"""Object stores that fail, hang, lie and die in the middle, seen through a proxy that makes the faults."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from ftpvfs.backend import gcs, objectstore, retry, s3
from ftpvfs.backend.backend import Backend
from ftpvfs.memory import MemoryBudget
from tests.conftest import Store, wait_until
from tests.servers import FaultProxy
from tests.test_backend import failing, get, listed, put

MIB = 2**20
PART = {"s3": 8 * MIB, "gs": 16 * MIB}  # the first part of an upload

MakeBackend = Callable[..., Backend]


@pytest.fixture(params=["s3", "gs"])
def store(request: pytest.FixtureRequest, make_store: Any) -> Store:
    made: Store = make_store(request.param)
    return made


@pytest.fixture
def proxy(store: Store, make_proxy: Any) -> FaultProxy:
    made: FaultProxy = make_proxy(store)
    return made


@pytest.fixture
def make(store: Store, proxy: FaultProxy, make_backend: MakeBackend) -> MakeBackend:
    """make(**tuning) -> a backend on the far side of the proxy."""
    return lambda **tuning: make_backend(store.proxied(proxy), **tuning)


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries at short distances: how many there are is what is tested here."""
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.005)


def content(size: int) -> bytes:
    """Bytes that differ from part to part, made fast."""
    block = os.urandom(MIB)
    return b"".join(bytes([number % 256]) + block[1:] for number in range(size // MIB)) + block[: size % MIB]


only_s3 = pytest.mark.parametrize("store", ["s3"], indirect=True)
only_gs = pytest.mark.parametrize("store", ["gs"], indirect=True)


# -- uploads in parts


@pytest.mark.parametrize("extra", [-1, 0, 1, 24 * MIB + 5])
def test_an_upload_of_about_a_part_and_more_is_whole(
    store: Store, make_backend: MakeBackend, extra: int
) -> None:
    backend = make_backend(store)
    data = content(PART[store.kind] + extra)

    entry = put(backend, "a.bin", data, mtime=1_234_567_890.5, step=3 * MIB)

    assert store.filesystem.size(store.path("a.bin")) == len(data)
    assert read_all(store, "a.bin") == data
    assert (entry.size, entry.mtime) == (len(data), 1_234_567_890.5)
    assert entry.fingerprint == backend.stat("a.bin").fingerprint == listed(backend)["a.bin"].fingerprint
    assert store.mtime("a.bin") == 1_234_567_890.5
    assert store.uploads() == set()
    assert backend.tuning.memory.used == 0


def read_all(store: Store, key: str) -> bytes:
    return store.read(key)


def test_parts_leave_while_the_file_arrives(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    upload = make().upload("a.bin")
    try:
        upload.write(content(PART[store.kind]))
        wait_until(lambda: proxy.requests["PUT"] == 1, what="the first part is on its way")
        assert store.list() == set()
    finally:
        upload.abort()
    assert store.uploads() == set()


def test_an_upload_keeps_to_the_memory_budget_and_gives_it_back(
    store: Store, make_backend: MakeBackend
) -> None:
    memory = MemoryBudget(20 * MIB)
    upload = make_backend(store, memory=memory).upload("a.bin")
    for _ in range(12):
        upload.write(bytes(4 * MIB))
        assert memory.used <= 20 * MIB
    upload.commit()

    assert memory.used == 0
    assert store.filesystem.size(store.path("a.bin")) == 48 * MIB


def test_two_uploads_go_on_when_there_is_memory_for_less_than_one(
    store: Store, make_backend: MakeBackend
) -> None:
    backend = make_backend(store, memory=MemoryBudget(MIB))
    uploads = [backend.upload(name) for name in "ab"]
    for upload in uploads:
        upload.write(bytes(2 * PART[store.kind] + 1))
    for upload in uploads:
        upload.commit()

    assert store.list() == {"a", "b"}
    assert backend.tuning.memory.used == 0


def test_an_abort_after_some_parts_leaves_nothing(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    store.write("a.bin", b"old")
    backend = make()
    upload = backend.upload("a.bin")
    upload.write(content(2 * PART[store.kind]))
    wait_until(lambda: proxy.requests["PUT"] >= 1)
    upload.abort()

    assert store.uploads() == set()
    assert store.read("a.bin") == b"old"
    assert backend.tuning.memory.used == 0


@pytest.mark.parametrize("fault", ["denied", "broken", "away", "stuck"])
def test_uploads_that_failed_leave_no_bytes_in_memory_without_a_collection(
    store: Store, proxy: FaultProxy, make: MakeBackend, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def upload(name: str) -> None:
        if fault in {"denied", "broken"}:
            status, code = {"denied": (403, "AccessDenied"), "broken": (500, "InternalError")}[fault]
            proxy.fail_next(100, method="PUT", status=status, code=code)
        proxy.refuse = fault == "away"
        proxy.bandwidth = 4 * MIB if fault == "stuck" else None
        upload = backend.upload(name)
        with contextlib.suppress(OSError):
            upload.write(content(3 * PART[store.kind]))
            upload.commit()
        proxy.heal()
        with contextlib.suppress(OSError):
            upload.abort()

    backend = make()
    upload("first")
    gc.collect()
    monkeypatch.setattr(gc, "collect", lambda: pytest.fail("a collection stops all threads"))
    gc.disable()
    tracemalloc.start()
    try:
        for number in range(3):
            upload(f"{number}")
        # Of the proxy, too, which is in this process.
        wait_until(lambda: tracemalloc.get_traced_memory()[0] < 2 * PART[store.kind], what="the bytes are let go of")
    finally:
        tracemalloc.stop()
        gc.enable()


def test_an_abort_while_parts_are_stuck_on_the_line_leaves_nothing(
    store: Store, proxy: FaultProxy, make: MakeBackend
) -> None:
    upload = make().upload("a.bin")
    proxy.bandwidth = 2 * MIB
    upload.write(content(PART[store.kind]))
    wait_until(lambda: proxy.sent > MIB, what="a part is half there")
    proxy.bandwidth = None
    upload.abort()

    assert store.uploads() == set()
    assert store.list() == set()


def test_a_part_that_fails_for_good_fails_the_upload(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    store.write("a.bin", b"old")
    backend = make()
    upload = backend.upload("a.bin")
    proxy.fail_next(100, method="PUT", status=403, code="AccessDenied")
    with failing(errno.EACCES) as failed:
        for _ in range(8):
            upload.write(content(PART[store.kind]))
        upload.commit()
    assert failed.value.filename == "a.bin"
    with failing(errno.EACCES):
        upload.commit()
    upload.abort()

    assert store.read("a.bin") == b"old"
    assert store.uploads() == set()
    assert backend.tuning.memory.used == 0


def test_an_upload_that_cannot_begin_fails_and_is_given_up_at_once(
    store: Store, proxy: FaultProxy, make: MakeBackend
) -> None:
    upload = make(low_level_retries=3).upload("a.bin")
    proxy.fail_next(100, method="POST")
    with failing(errno.EBUSY):
        upload.write(content(PART[store.kind]))
        upload.commit()
    asked = sum(proxy.requests.values())
    upload.abort()

    assert sum(proxy.requests.values()) == asked  # there is nothing to give up
    assert store.list() == set()


def test_a_store_that_is_away_for_a_moment_does_not_end_an_upload(
    store: Store, proxy: FaultProxy, make: MakeBackend
) -> None:
    data = content(PART[store.kind] + 5)
    upload = make(low_level_retries=20).upload("a.bin")
    proxy.refuse = True
    upload.write(data)
    wait_until(lambda: proxy.connections >= 3)
    proxy.refuse = False
    upload.commit()

    assert read_all(store, "a.bin") == data


def test_a_store_that_goes_away_in_the_middle_fails_the_upload(
    store: Store, proxy: FaultProxy, make: MakeBackend
) -> None:
    store.write("a.bin", b"old")
    upload = make().upload("a.bin")
    upload.write(content(PART[store.kind]))
    wait_until(lambda: proxy.requests["PUT"] == 1)
    proxy.refuse = True
    with pytest.raises(OSError, check=lambda error: error.errno in {errno.EHOSTUNREACH, errno.ECONNRESET}):
        upload.commit()
    upload.abort()  # logs that parts may be left

    proxy.refuse = False
    assert store.read("a.bin") == b"old"
    if store.kind == "s3":
        for upload_id in _upload_ids(store):
            store.filesystem.call_s3("abort_multipart_upload", Bucket=store.bucket, **upload_id)


def _upload_ids(store: Store) -> list[dict[str, str]]:
    prefix = f"{store.root}/".partition("/")[2]
    answer = store.filesystem.call_s3("list_multipart_uploads", Bucket=store.bucket)
    found = [item for item in answer.get("Uploads") or [] if item["Key"].startswith(prefix)]
    return [{"Key": item["Key"], "UploadId": item["UploadId"]} for item in found]


# -- verification


class Damage:
    """Flips a byte of what goes to the store, at the last place before the HTTP client."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, times: int) -> None:
        self.left = times
        original = owner.call

        async def call(backend: Any, *arguments: Any, **keywords: Any) -> Any:
            name = next((name for name in ("Body", "data") if len(keywords.get(name) or b"") > 1000), None)
            if name is not None and self.left > 0:
                self.left -= 1
                data = bytearray(keywords[name])
                data[-500] ^= 1
                keywords[name] = bytes(data)
            return await original(backend, *arguments, **keywords)

        patch.setattr(owner, "call", call)


@pytest.fixture
def damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Damage]:
    owner = s3.S3Backend if store.kind == "s3" else gcs.GCSBackend
    return lambda times: Damage(monkeypatch, owner, times)


@only_s3
@pytest.mark.parametrize("size", [100_000, 20 * MIB])
def test_damaged_bytes_are_refused_and_the_old_object_stays(
    store: Store, make_backend: MakeBackend, damage: Callable[[int], Damage], size: int
) -> None:
    store.write("a.bin", b"old")
    damage(1000)
    upload = make_backend(store).upload("a.bin")
    with failing(errno.EIO) as failed:
        upload.write(content(size))
        upload.commit()
    upload.abort()

    assert "damaged" in str(failed.value)
    assert store.read("a.bin") == b"old"
    assert store.uploads() == set()


@only_gs
@pytest.mark.parametrize("size", [100_000, 20 * MIB])
def test_damaged_bytes_are_noticed_after_the_upload(
    store: Store, make_backend: MakeBackend, damage: Callable[[int], Damage], size: int
) -> None:
    """GCS itself refuses what does not have the hash that comes with it; fake-gcs-server does not look."""
    damage(1)
    upload = make_backend(store).upload("a.bin")
    upload.write(content(size))
    with failing(errno.EIO):
        upload.commit()
    upload.abort()


@only_s3
@pytest.mark.parametrize("size", [100_000, 20 * MIB])
def test_bytes_damaged_once_are_sent_again(
    store: Store, make_backend: MakeBackend, damage: Callable[[int], Damage], size: int
) -> None:
    data = content(size)
    damage(1)
    put(make_backend(store), "a.bin", data)

    assert read_all(store, "a.bin") == data


@pytest.mark.parametrize("size", [100_000, 20 * MIB])
def test_nothing_is_hashed_where_nothing_is_verified(
    store: Store, make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def unexpected(data: bytes) -> bytes:
        raise AssertionError("hashed")

    for module in (objectstore, s3, gcs):
        monkeypatch.setattr(module, "md5", unexpected)
    data = content(size)
    put(make_backend(store, verify=False), "a.bin", data)

    assert read_all(store, "a.bin") == data


# -- lost answers


@only_s3
@pytest.mark.parametrize("verify", [True, False])
def test_a_lost_answer_to_the_last_step_is_still_a_success(
    store: Store, make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    backend = make_backend(store, low_level_retries=5, verify=verify)
    data = content(20 * MIB)
    upload = backend.upload("a.bin", mtime=1.5)
    upload.write(data)
    lose_answer(monkeypatch, s3.S3Backend, "complete_multipart_upload")
    entry = upload.commit()

    assert read_all(store, "a.bin") == data
    assert entry.fingerprint == backend.stat("a.bin").fingerprint
    assert store.mtime("a.bin") == 1.5
    assert store.uploads() == set()


@only_s3
def test_an_upload_that_vanished_is_no_success_though_an_older_object_stands(
    store: Store, proxy: FaultProxy, make: MakeBackend
) -> None:
    """As long as the new one, and not checked: still not mistaken for it."""
    store.write("a.bin", bytes(16 * MIB))
    backend = make(low_level_retries=5, verify=False)
    upload = backend.upload("a.bin")
    upload.write(content(16 * MIB))
    wait_until(lambda: backend.tuning.memory.used == 0, what="all parts are there")
    for upload_id in _upload_ids(store):
        store.filesystem.call_s3("abort_multipart_upload", Bucket=store.bucket, **upload_id)
    proxy.fail_next(1, method="POST", target="uploadId=")
    with failing(errno.EIO) as failed:
        upload.commit()
    assert "forgotten the upload" in str(failed.value)
    upload.abort()

    assert store.read("a.bin") == bytes(16 * MIB)
    assert store.uploads() == set()


@only_gs
def test_a_lost_answer_to_the_last_chunk_is_still_a_success(
    store: Store, make: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make(low_level_retries=5)
    data = content(20 * MIB)
    upload = backend.upload("a.bin", mtime=1.5)
    upload.write(data)
    wait_until(lambda: backend.tuning.memory.used <= 4 * MIB, what="the first chunk is there")
    lose_answer(monkeypatch, gcs.GCSBackend, "PUT")
    entry = upload.commit()

    assert read_all(store, "a.bin") == data
    assert entry.fingerprint == backend.stat("a.bin").fingerprint


def lose_answer(patch: pytest.MonkeyPatch, owner: type, operation: str) -> None:
    """The store does the next such operation, and its answer is lost on the way."""
    original = owner.call
    left = [1]

    async def call(backend: Any, name: str, *arguments: Any, **keywords: Any) -> Any:
        answer = await original(backend, name, *arguments, **keywords)
        if name == operation and left:
            left.clear()
            raise ConnectionResetError(errno.ECONNRESET, "the test lost the answer")
        return answer

    patch.setattr(owner, "call", call)


def test_a_small_upload_whose_answer_is_lost_is_sent_again(
    store: Store, make: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, operation = (s3.S3Backend, "put_object") if store.kind == "s3" else (gcs.GCSBackend, "POST")
    backend = make()
    lose_answer(monkeypatch, owner, operation)
    put(backend, "a", b"bytes")

    assert store.read("a") == b"bytes"


# -- reading


def test_an_answer_cut_short_is_asked_for_again(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    data = content(2 * MIB)
    put(make(), "a.bin", data)
    backend = make(low_level_retries=4)
    entry = backend.stat("a.bin")
    proxy.reset_counters()
    proxy.reset_after(to_client=300_000, times=2)

    assert b"".join(backend.fetch("a.bin", 0, len(data), entry.fingerprint).result(timeout=30)) == data
    assert proxy.requests["GET"] == 3


def test_a_line_that_is_always_cut_is_an_error_after_so_many_tries(
    store: Store, proxy: FaultProxy, make: MakeBackend
) -> None:
    data = content(2 * MIB)
    put(make(), "a.bin", data)
    backend = make(low_level_retries=3)
    entry = backend.stat("a.bin")
    proxy.reset_counters()
    proxy.reset_after(to_client=300_000, times=100)

    with failing(errno.ECONNRESET) as failed:
        backend.fetch("a.bin", 0, len(data), entry.fingerprint).result(timeout=30)
    assert failed.value.filename == "a.bin"
    assert proxy.requests["GET"] == 3


def test_cancelling_a_fetch_ends_its_request(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    data = content(8 * MIB)
    put(make(), "a.bin", data)
    backend = make()
    entry = backend.stat("a.bin")
    proxy.reset_counters()
    proxy.bandwidth = MIB
    standing = proxy.standing
    future = backend.fetch("a.bin", 0, len(data), entry.fingerprint)
    wait_until(lambda: proxy.received > 300_000)
    assert future.cancel()

    wait_until(lambda: proxy.standing < standing, timeout=5)  # it went over one that stood idle
    assert proxy.received < len(data)
    proxy.heal()
    assert get(backend, "a.bin") == data


# -- retries


def operations(backend: Backend) -> dict[str, Callable[[], Any]]:
    return {
        "list": lambda: backend.list(""),
        "stat": lambda: backend.stat("a"),
        "fetch": lambda: backend.fetch("a", 0, 3, None).result(timeout=30),
        "put": lambda: put(backend, "b", b"123"),
        "remove": lambda: backend.remove("a"),
        "walk": lambda: list(backend.walk("")),
        "mkdir": lambda: backend.mkdir("d"),
        "check": lambda: backend.check(),
        "set_mtime": lambda: backend.set_mtime("a", 5.0),
        "copy": lambda: backend.copy("a", "c"),
        "true_mtimes": lambda: backend.true_mtimes("", backend.list("")),
    }


def test_a_store_that_goes_on_saying_slow_down_is_asked_so_many_times_and_no_more(
    store: Store, proxy: FaultProxy, make: MakeBackend
) -> None:
    store.write("a", b"123")
    tries = {}
    proxy.fail_next(1000)
    for name, operation in operations(make(low_level_retries=3)).items():
        proxy.reset_counters()
        with failing(errno.EBUSY) as failed:
            operation()
        assert "slow down" in str(failed.value)
        tries[name] = sum(proxy.requests.values())

    assert set(tries.values()) == {3}, tries


@pytest.mark.parametrize("status", [503, 500, 429])
def test_a_store_that_recovers_in_time_is_no_error(
    store: Store, proxy: FaultProxy, make: MakeBackend, status: int
) -> None:
    backend = make(low_level_retries=3)
    for operation in operations(backend).values():
        store.write("a", b"123")
        proxy.fail_next(2, status=status, code="InternalError" if status == 500 else "Whatever")
        operation()


def test_a_reset_is_tried_again(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    backend = make(low_level_retries=4)
    for operation in operations(backend).values():
        store.write("a", b"123")
        proxy.reset_after(to_server=10, times=2)
        operation()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", errno.EACCES),
        (404, "NoSuchKey", errno.ENOENT),
        (412, "PreconditionFailed", errno.ESTALE),
        (416, "InvalidRange", errno.EINVAL),
        (401, "InvalidAccessKeyId", errno.EACCES),
        (507, "InsufficientStorage", errno.ENOSPC),
        (400, "BadThing", errno.EINVAL),
    ],
)
def test_what_another_try_cannot_help_is_asked_once(
    store: Store, proxy: FaultProxy, make: MakeBackend, status: int, code: str, expected: int
) -> None:
    store.write("a", b"123")
    backend = make(low_level_retries=5)
    proxy.fail_next(1000, status=status, code=code)

    with failing(expected) as failed:
        backend.fetch("a", 0, 3, None).result(timeout=30)
    assert failed.value.filename == "a"
    assert sum(proxy.requests.values()) == 1


def test_one_retry_means_one_request(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    proxy.fail_next(1000)

    with failing(errno.EBUSY):
        make(low_level_retries=1).list("")
    assert sum(proxy.requests.values()) == 1


def test_an_endpoint_that_nobody_listens_at_is_unreachable(
    store: Store, proxy: FaultProxy, make_backend: MakeBackend
) -> None:
    proxied = store.proxied(proxy)
    proxy.close()
    backend = make_backend(proxied)

    for action in (backend.check, lambda: backend.list("x"), lambda: put(backend, "a", b"1")):
        with failing(errno.EHOSTUNREACH) as failed:
            action()
        assert "cannot be reached" in str(failed.value)


# -- time-outs


def test_a_store_that_hangs_is_an_error_in_time(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    backend = make(low_level_retries=1, read_timeout=0.3)
    proxy.black_hole = True
    began = time.monotonic()

    for action in (backend.check, lambda: backend.stat("a"), lambda: put(backend, "a", b"1")):
        with failing(errno.ETIMEDOUT) as failed:
            action()
        assert "in time" in str(failed.value)
    assert time.monotonic() - began < 5


def test_a_store_that_hangs_in_the_middle_of_a_download_is_an_error_in_time(
    store: Store, proxy: FaultProxy, make: MakeBackend
) -> None:
    data = content(4 * MIB)
    put(make(), "a.bin", data)
    backend = make(low_level_retries=1, read_timeout=0.3)
    entry = backend.stat("a.bin")
    proxy.reset_counters()
    proxy.bandwidth = 4 * MIB
    future = backend.fetch("a.bin", 0, len(data), entry.fingerprint)
    wait_until(lambda: proxy.received > 100_000)
    proxy.black_hole = True

    with failing(errno.ETIMEDOUT):
        future.result(timeout=20)


def test_a_store_that_takes_no_more_bytes_of_an_upload_is_an_error_in_time(
    store: Store, proxy: FaultProxy, make: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectstore, "SLOWEST_UPLOAD", 50 * MIB)
    upload = make(low_level_retries=2, read_timeout=0.5).upload("a.bin")
    proxy.bandwidth = 4 * MIB
    upload.write(content(PART[store.kind]))
    wait_until(lambda: proxy.sent > MIB, what="a part is on its way")
    proxy.black_hole = True
    with failing(errno.ETIMEDOUT):
        upload.commit()
    proxy.heal()
    upload.abort()

    assert store.uploads() == set()


def test_a_slow_download_is_no_hang(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    """What gets on goes on, however long it takes as a whole."""
    data = content(3 * MIB)
    backend = make(low_level_retries=1, read_timeout=0.4)
    put(backend, "a.bin", data)
    proxy.bandwidth = 3 * MIB

    assert get(backend, "a.bin") == data


# -- other


def test_remove_many_tries_all_and_reports_the_first_failure(
    store: Store, proxy: FaultProxy, make: MakeBackend
) -> None:
    names = [f"file-{number}" for number in range(20)]
    for name in names:
        store.write(name, b"1")
    proxy.fail_next(1000, method="DELETE", target="file-1[34]", status=403, code="AccessDenied")

    with failing(errno.EACCES) as failed:
        make().remove_many(iter(names))
    assert failed.value.filename == "file-13"
    assert store.list() == {"file-13", "file-14"}


def test_true_mtimes_report_a_failure(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    if store.kind == "gs":
        pytest.skip("its listings have them")
    for number in range(4):
        store.write(str(number), b"1")
    backend = make(low_level_retries=2)
    entries = backend.list("")
    proxy.fail_next(1000, method="HEAD", target="/2$", status=500, code="InternalError")

    with failing(errno.EIO) as failed:
        backend.true_mtimes("", entries)
    assert failed.value.filename == "2"


def test_closing_a_backend_closes_its_connections(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    backend = make()
    backend.check()
    assert proxy.standing
    backend.close()

    wait_until(lambda: not proxy.standing)


def test_one_object_that_may_not_be_read_does_not_hide_its_folder(
    store: Store, proxy: FaultProxy, make: MakeBackend
) -> None:
    if store.kind != "s3":
        pytest.skip("its listings have the times")
    backend = make()
    for name in ("a", "b"):
        put(backend, name, b"1")
    entries = backend.list("")
    proxy.fail_next(1, method="HEAD", status=403, code="AccessDenied")

    backend.true_mtimes("", entries)

    assert all(entry.mtime is not None for entry in entries)


@pytest.mark.parametrize("ends_by", ["commit", "abort", "failed commit"])
def test_the_bytes_of_an_upload_are_counted_from_the_first_and_given_back(
    ends_by: str, store: Store, proxy: FaultProxy, make: MakeBackend
) -> None:
    backend = make(low_level_retries=1)
    upload = backend.upload("a.bin")
    upload.write(content(3 * MIB))
    assert backend.tuning.memory.used >= 3 * MIB

    if ends_by == "commit":
        upload.commit()
    elif ends_by == "failed commit":
        proxy.fail_next(1000, status=403, code="AccessDenied")
        with failing(errno.EACCES):
            upload.commit()
    upload.abort()
    assert backend.tuning.memory.used == 0


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_range_that_breaks_off_goes_on_where_it_was(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    data = bytes(range(256)) * 16384
    store.write("a", data)
    backend = make()
    proxy.bandwidth = 4 * 2**20  # so that the end is still on its way when the line is cut
    pieces: list[bytes] = []

    def take(piece: bytes) -> None:
        pieces.append(piece)
        if sum(map(len, pieces)) >= 2**20 and proxy.bandwidth is not None:
            proxy.bandwidth = None
            proxy.cut()

    backend.fetch("a", 0, len(data), None, take).result(timeout=30)
    assert b"".join(pieces) == data
    first, second = (int(re.findall(r"\d+", request.headers["range"])[0]) for request in proxy.seen)
    assert first == 0
    assert second >= 2**20


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_range_waits_for_who_takes_it(store: Store, proxy: FaultProxy, make: MakeBackend) -> None:
    data = bytes(range(256)) * 32768
    store.write("a", data)
    backend = make()
    pieces: list[bytes] = []
    gate: Future[None] = Future()

    def take(piece: bytes) -> Future[None]:
        pieces.append(piece)
        return gate

    future = backend.fetch("a", 0, len(data), None, take)
    wait_until(lambda: pieces, what="the first piece")
    assert not future.done()
    gate.set_result(None)
    future.result(timeout=30)
    assert b"".join(pieces) == data
