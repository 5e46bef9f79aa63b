"""What a listing leaves out is there all the same: no folder counts as empty, and none goes, while it holds some."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Store, connect, names, reply

Serve = Callable[..., tuple[str, int]]
MakeVFS = Callable[..., Any]
MakeBackend = Callable[..., Any]

# Keys in the folder `d` that no FTP client can be shown. SeaweedFS takes two slashes for one.
HIDDEN = {"gs": ["d//hidden.txt", "d/line\nbreak", "d/cr\rname", "d//"], "s3": ["d/line\nbreak", "d/cr\rname"]}
CASES = [(kind, key) for kind, keys in HIDDEN.items() for key in keys]
MODES = [{"cache_mode": "off"}, {"cache_mode": "full"}, {"cache_mode": "off", "dir_markers": True}]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]!r}")
def store(request: pytest.FixtureRequest, make_store: Callable[..., Store]) -> Store:
    """A store whose folder `d` has one key that listings leave out."""
    kind, key = request.param
    store = make_store(kind)
    put(store, key)
    return store


def put(store: Store, key: str) -> None:
    store.filesystem.pipe_file(f"{store.root}/{key}", b"1")


def keys(store: Store) -> set[str]:
    """Every key below the store's root, as the server says it, without the folders that SeaweedFS keeps."""
    bucket, _, prefix = store.root.partition("/")
    if store.kind == "gs":
        answer = store.filesystem.call("GET", "b/{}/o", bucket, prefix=f"{prefix}/", json_out=True)
        found = [item["name"] for item in answer.get("items", ())]
    else:
        answer = store.filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/")
        found = [item["Key"] for item in answer.get("Contents", ())]
    return {key.removeprefix(f"{prefix}/") for key in found if not (store.kind == "s3" and key.endswith("/"))}


def code_of(call: Callable[..., Any], *arguments: Any) -> int | None:
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return None


@pytest.mark.parametrize("options", MODES, ids=str)
def test_a_folder_with_what_is_not_listed_is_not_removed(
    store: Store, ftp_server: Serve, options: dict[str, Any]
) -> None:
    before = keys(store)
    with connect(ftp_server(store, **options)) as ftp:
        assert names(ftp, "d") == set()
        answer = reply(ftp, "RMD d")
        assert answer.startswith("550 The folder is not empty"), answer
        assert names(ftp) == {"d"}
    assert keys(store) == before


@pytest.mark.parametrize("options", MODES, ids=str)
def test_no_folder_is_renamed_onto_one_with_what_is_not_listed(
    store: Store, make_vfs: MakeVFS, options: dict[str, Any]
) -> None:
    store.write("from/a", b"1")
    before = keys(store)
    vfs = make_vfs(store, **options)
    assert code_of(vfs.rename, "from", "d") == errno.ENOTEMPTY
    assert keys(store) == before


def test_what_is_not_listed_is_renamed_with_its_folder(store: Store, make_vfs: MakeVFS) -> None:
    before = keys(store)
    make_vfs(store).rename("d", "e")
    assert keys(store) == {f"e{key[1:]}" for key in before}


def test_a_folder_is_kept_when_only_what_is_not_listed_is_left(store: Store, make_vfs: MakeVFS) -> None:
    hidden = keys(store)
    store.write("d/a", b"1")
    vfs = make_vfs(store, cache_mode="full", write_back="1h")
    vfs.remove("d/a")
    assert code_of(vfs.rmdir, "d") == errno.ENOTEMPTY
    assert vfs.isdir("d")
    assert hidden <= keys(store) <= {*hidden, "d/"}


def test_a_link_in_a_local_folder_keeps_it(local_store: Store, ftp_server: Serve) -> None:
    folder = Path(local_store.path("d"))
    folder.mkdir()
    os.symlink("/nowhere", folder / "link")
    with connect(ftp_server(local_store)) as ftp:
        assert names(ftp, "d") == set()
        answer = reply(ftp, "RMD d")
        assert answer.startswith("550 The folder is not empty: 'link' is in it"), answer


@pytest.mark.parametrize("name", ["line\nbreak", ".ftpvfs-0.tmp"])
def test_what_other_stores_list_and_we_do_not_show_keeps_a_folder(
    memory_store: Store, make_backend: MakeBackend, name: str
) -> None:
    memory_store.write(f"d/{name}", b"1")
    backend = make_backend(memory_store)
    assert backend.list("d") == []
    assert code_of(backend.require_empty, "d") == errno.ENOTEMPTY
    assert code_of(backend.rmdir, "d") == errno.ENOTEMPTY
    memory_store.delete(f"d/{name}")
    backend.require_empty("d")
    backend.require_empty("not there")
