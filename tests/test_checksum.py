"""What stores say of their objects' bytes: the same as hashing them, for every kind of upload."""

from __future__ import annotations

import base64
import errno
import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from ftpvfs.backend.checksum import Checksum
from tests.conftest import Store

MIB = 2**20
MakeBackend = Callable[..., Any]


def stored(backend: Any, path: str, data: bytes) -> Any:
    upload = backend.upload(path)
    upload.write(data)
    return upload.commit()


@pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)
def test_a_listing_says_what_a_small_object_hashes_to(store: Store, make_backend: MakeBackend) -> None:
    backend = make_backend(store)
    stored(backend, "a", b"some bytes")
    for entry in (backend.stat("a"), backend.list("")[0]):
        checksum = backend.checksum(entry)
        assert checksum.matches([b"some", b"", b" bytes"])
        assert not checksum.matches([b"some", b" bites"])
        assert backend.ask_checksum("a", entry).result(timeout=20) == checksum


@pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)
def test_an_object_in_parts_is_hashed_as_the_store_does(store: Store, make_backend: MakeBackend) -> None:
    backend = make_backend(store)
    data = bytes(range(256)) * (17 * MIB // 256) + b"the rest"
    entry = stored(backend, "a", data)
    checksum = backend.ask_checksum("a", entry).result(timeout=20)
    hasher = checksum.hasher()
    for start in range(0, len(data), 999_999):
        hasher.update(memoryview(data)[start : start + 999_999])
    assert hasher.digest() == checksum.digest
    assert not checksum.matches([data[:-1] + b"\0"])


def test_the_hash_that_rclone_leaves_beside_large_objects_is_used(s3_store: Store, make_backend: MakeBackend) -> None:
    backend = make_backend(s3_store)
    digest = hashlib.md5(b"whole", usedforsecurity=False).digest()
    s3_store.filesystem.pipe_file(
        f"{s3_store.root}/a", b"whole", Metadata={"md5chksum": base64.b64encode(digest).decode()}
    )
    entry = backend.stat("a")
    assert backend.ask_checksum("a", entry).result(timeout=20) == Checksum("md5", digest)


@pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)
def test_the_hash_of_a_version_that_is_gone_is_not_told(store: Store, make_backend: MakeBackend) -> None:
    backend = make_backend(store)
    entry = stored(backend, "a", b"old")
    stored(backend, "a", b"new")
    with pytest.raises(OSError, match="a") as caught:
        backend.ask_checksum("a", entry).result(timeout=20)
    assert caught.value.errno in {errno.ESTALE, errno.ENOENT}


@pytest.mark.parametrize("store", ["local", "memory"], indirect=True)
def test_a_store_without_hashes_has_none(store: Store, make_backend: MakeBackend) -> None:
    backend = make_backend(store)
    store.write("a", b"bytes")
    entry = backend.stat("a")
    assert backend.checksum(entry) is None
    assert backend.ask_checksum("a", entry).result(timeout=20) is None


@pytest.mark.parametrize("checksum", [Checksum("md5", b""), Checksum("crc32c", b""), Checksum("md5", b"", 10)])
def test_how_bytes_are_cut_does_not_matter(checksum: Checksum) -> None:
    whole, cut = checksum.hasher(), checksum.hasher()
    data = bytes(range(256)) * 3
    whole.update(data)
    for start in range(0, len(data), 7):
        cut.update(data[start : start + 7])
    assert whole.digest() == cut.digest()


def test_the_hash_of_parts_is_the_one_that_s3_computes() -> None:
    parts = [b"a" * 10, b"b" * 10, b"c"]
    expected = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).digest()
    assert Checksum("md5", expected, 10).matches([b"".join(parts)])
