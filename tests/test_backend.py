"""What every store does for the VFS: one suite over local, memory, S3, GCS and SFTP, each a real one."""

from __future__ import annotations

import errno
import os
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.backend.backend import Backend, Entry
from ftpvfs.errors import ENOSTORE
from tests.conftest import STORES, Store
from tests.servers import SFTPServer

MIB = 2**20
KINDS = (*STORES, "sftp")
WRITERS_WITH_COPIES = ("memory", "s3", "gs")
OBJECT_STORES = ("s3", "gs")

NAMES = [
    "plain.txt",
    "two words.txt",
    " leading and trailing ",
    "plus+sign",
    "100%",
    "%41%2F",
    "a&b=c?d#e",
    "it's \"quoted\"",
    "semi;colon,comma:colon",
    "<angle>",
    "back\\slash",
    "-leading-dash",
    "~tilde",
    "*glob[a]?",
    "{brace}$dollar",
    "ümläut",
    unicodedata.normalize("NFD", "é in two code points"),
    "日本語",
    "🙂",
    ".hidden",
    "...",
    "x" * 255,
    "ü" * 127,
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The kinds of stores that files can be written to, in turn."""
    return str(request.param)


@pytest.fixture
def place(kind: str, request: pytest.FixtureRequest) -> Store:
    """An empty place at a store of that kind."""
    if kind != "sftp":
        store: Store = request.getfixturevalue("make_store")(kind)
        return store
    server: SFTPServer = request.getfixturevalue("sftp_server")
    folder = server.root / f"sftp-{os.urandom(5).hex()}"
    folder.mkdir()
    return Store("local", f"sftp://127.0.0.1{folder}", server.storage_options, str(folder), None)


@pytest.fixture
def backend(place: Store, make_backend: Callable[..., Backend]) -> Backend:
    return make_backend(place)


def put(backend: Backend, path: str, data: bytes = b"", *, mtime: float | None = None, step: int = 0) -> Entry:
    """Upload `data`, in writes of `step` bytes."""
    upload = backend.upload(path, mtime=mtime)
    for start in range(0, len(data), step or len(data) or 1):
        upload.write(data[start : start + (step or len(data))])
    return upload.commit()


def get(backend: Backend, path: str) -> bytes:
    entry = backend.stat(path)
    return b"".join(backend.fetch(path, 0, entry.size, entry.fingerprint).result(timeout=30))


def listed(backend: Backend, path: str = "") -> dict[str, Entry]:
    return {entry.name: entry for entry in backend.list(path)}


def failing(code: int) -> Any:
    """An OSError with this errno, and with a path and one line of text."""
    return pytest.raises(OSError, check=lambda error: error.errno == code and is_clear(error))


def is_clear(error: OSError) -> bool:
    return isinstance(error.filename, str) and bool(error.strerror) and len(str(error).splitlines()) == 1


# -- looking


def test_check_is_content_with_an_empty_place(backend: Backend) -> None:
    backend.check()


@pytest.mark.parametrize("kind", ["local", "memory", "sftp"], indirect=True)
def test_check_names_a_folder_that_is_missing(place: Store, make_backend: Callable[..., Backend]) -> None:
    backend = make_backend(f"{place.url}/nowhere", place.storage_options)

    with failing(ENOSTORE if backend.capability.is_shared else errno.ENOENT) as failed:
        backend.check()
    assert "nowhere" in failed.value.filename


@pytest.mark.parametrize("kind", OBJECT_STORES, indirect=True)
def test_check_names_a_bucket_that_is_missing(place: Store, make_backend: Callable[..., Backend]) -> None:
    backend = make_backend(f"{place.kind}://no-such-bucket-here/prefix", place.storage_options)

    with failing(ENOSTORE) as failed:
        backend.check()
    assert "No such bucket" in str(failed.value)
    assert "no-such-bucket-here" in failed.value.filename


def names_of(place: Store) -> list[str]:
    """The names that a store of this kind takes as they are."""
    # SeaweedFS reads a backslash as a slash; S3 itself does not.
    return [name for name in NAMES if place.kind != "s3" or "\\" not in name]


def test_names_survive_upload_list_stat_fetch_walk_and_removal(backend: Backend, place: Store) -> None:
    contents = {name: name.encode()[:20] for name in names_of(place)}
    if backend.capability.real_directories:
        backend.mkdir("some folder")
    for name, data in contents.items():
        entry = put(backend, f"some folder/{name}", data)
        assert (entry.name, entry.size, entry.is_dir) == (name, len(data), False)

    assert set(listed(backend, "some folder")) == set(contents)
    assert {path for path, _ in backend.walk("some folder")} == {f"some folder/{name}" for name in contents}
    for name, data in contents.items():
        path = f"some folder/{name}"
        assert (backend.stat(path).name, backend.stat(path).size) == (name, len(data))
        assert get(backend, path) == data
        assert place.read(path) == data
    backend.remove_many([f"some folder/{name}" for name in contents])
    assert place.list() == set()


def test_names_written_by_others_are_listed(backend: Backend, place: Store) -> None:
    names = names_of(place)
    for name in names:
        place.write(f"d/{name}", b"12345")

    found = listed(backend, "d")

    assert set(found) == set(names)
    assert {entry.size for entry in found.values()} == {5}


@pytest.mark.parametrize("kind", OBJECT_STORES, indirect=True)
def test_keys_that_no_path_can_name_are_left_out(backend: Backend, place: Store) -> None:
    place.write("good", b"1")
    for key in ("line\nbreak", "carriage\rreturn"):
        place.write(key, b"2")

    assert set(listed(backend)) == {"good"}
    if place.kind == "gs":  # SeaweedFS makes one slash of two; S3 itself does not
        place.write("double//slash", b"2")
        assert listed(backend, "double") == {}


def test_a_name_with_a_line_break_is_left_out(make_store: Any, make_backend: Any) -> None:
    store = make_store("local")
    Path(store.root, "a\nb").write_bytes(b"")
    Path(store.root, "good").write_bytes(b"")

    assert set(listed(make_backend(store))) == {"good"}


def test_folders_and_files_are_told_apart(backend: Backend, place: Store) -> None:
    place.write("a/b/c.txt", b"123")

    assert listed(backend)["a"].is_dir
    assert listed(backend, "a")["b"].is_dir
    assert backend.stat("a").is_dir
    assert backend.stat("").is_dir
    assert not backend.stat("a/b/c.txt").is_dir
    assert [path for path, entry in backend.walk("") if not entry.is_dir and not path.endswith("/")] == ["a/b/c.txt"]


@pytest.mark.parametrize("path", ["missing", "a/missing", "missing/deep", "a/file.txt/below"])
def test_what_is_missing_is_enoent(backend: Backend, place: Store, path: str) -> None:
    place.write("a/file.txt", b"1")

    missing = {errno.ENOENT, errno.ENOTDIR}  # below a file, a disk says the latter
    for action in (backend.stat, backend.list):
        with pytest.raises(OSError) as failed:  # noqa: PT011
            action(path)
        assert failed.value.errno in missing
        assert (failed.value.filename, is_clear(failed.value)) == (path, True)
    with pytest.raises(OSError) as failed:  # noqa: PT011
        backend.fetch(path, 0, 1, None).result(timeout=30)
    assert failed.value.errno in missing
    assert failed.value.filename == path


def test_a_file_is_no_folder(backend: Backend, place: Store) -> None:
    place.write("file.txt", b"1")

    with pytest.raises(OSError) as failed:  # noqa: PT011
        backend.list("file.txt")
    assert failed.value.errno in {errno.ENOTDIR, errno.ENOENT}


@pytest.mark.parametrize("kind", ["s3", "gs", "local"], indirect=True)
def test_a_listing_of_more_than_one_page_is_whole(backend: Backend, place: Store) -> None:
    names = {f"file-{number:04}" for number in range(1050)}
    write_many(place, [f"many/{name}" for name in names])
    place.write("many/folder/x", b"1")

    assert set(listed(backend, "many")) == {*names, "folder"}
    walked = [path for path, _ in backend.walk("many")]
    assert len(walked) == 1051
    assert set(walked) == {f"many/{name}" for name in names} | {"many/folder/x"}
    assert backend.stat("many").is_dir


def write_many(place: Store, keys: list[str]) -> None:
    if place.kind == "local":
        for key in keys:
            place.write(key, b"")
    else:
        place.filesystem.pipe({place.path(key): b"" for key in keys}, batch_size=32)


def test_a_version_has_a_fingerprint_and_a_new_one_has_another(backend: Backend, place: Store) -> None:
    first = put(backend, "a", b"one")
    second = put(backend, "a", b"two and more")

    assert first.fingerprint
    assert second.fingerprint
    assert first.fingerprint != second.fingerprint
    assert backend.stat("a").fingerprint == second.fingerprint == listed(backend)["a"].fingerprint
    assert backend.stat("a").size == 12


# -- reading


def test_ranges_are_exact(backend: Backend, place: Store) -> None:
    data = os.urandom(300_000)
    place.write("a", data)
    entry = backend.stat("a")

    for start, stop in ((0, 1), (0, 300_000), (1, 2), (299_999, 300_000), (65_536, 131_072), (7, 299_993)):
        pieces = backend.fetch("a", start, stop, entry.fingerprint).result(timeout=30)
        assert b"".join(pieces) == data[start:stop]


def test_ranges_may_be_read_in_parallel(backend: Backend, place: Store) -> None:
    size = 900_000
    data = os.urandom(size)
    place.write("a", data)
    entry = backend.stat("a")

    step = 50_000
    bounds = [(start, min(start + step, size)) for start in range(0, size, step)]
    futures = [backend.fetch("a", start, stop, entry.fingerprint) for start, stop in bounds]

    assert b"".join(piece for future in futures for piece in future.result(timeout=30)) == data


def test_a_range_behind_the_end_fails_and_is_never_shorter(backend: Backend, place: Store) -> None:
    place.write("a", b"123")

    with pytest.raises(OSError) as failed:  # noqa: PT011
        backend.fetch("a", 0, 10, None).result(timeout=30)
    assert failed.value.filename == "a"
    with pytest.raises(OSError):  # noqa: PT011
        backend.fetch("a", 5, 10, None).result(timeout=30)


def test_a_changed_object_is_never_read_as_the_old_version(backend: Backend, place: Store) -> None:
    put(backend, "a", b"old bytes")
    old = backend.stat("a")
    put(backend, "a", b"new bytes here")

    with failing(errno.ESTALE) as failed:
        backend.fetch("a", 0, 4, old.fingerprint).result(timeout=30)
    assert failed.value.filename == "a"


# -- writing


@pytest.mark.parametrize("size", [0, 1, 1000, 3 * MIB])
def test_an_upload_is_in_the_store_when_commit_returns(backend: Backend, place: Store, size: int) -> None:
    data = os.urandom(size)

    entry = put(backend, "a.bin", data, step=65_536)

    assert place.read("a.bin") == data
    assert place.list() == {"a.bin"}
    assert (entry.name, entry.size, entry.is_dir) == ("a.bin", size, False)
    assert backend.stat("a.bin").fingerprint == entry.fingerprint


def test_bytes_may_come_as_a_view_that_is_used_again(backend: Backend, place: Store) -> None:
    buffer = bytearray(b"first")
    upload = backend.upload("a")
    upload.write(memoryview(buffer))
    buffer[:] = b"AGAIN"
    upload.write(memoryview(buffer))
    upload.commit()

    assert place.read("a") == b"firstAGAIN"


def test_nothing_is_visible_before_commit(backend: Backend, place: Store) -> None:
    upload = backend.upload("a")
    upload.write(b"x" * 100_000)
    try:
        assert listed(backend) == {}
        with failing(errno.ENOENT):
            backend.stat("a")
    finally:
        upload.abort()


def test_an_aborted_upload_leaves_nothing_and_the_old_version(backend: Backend, place: Store) -> None:
    place.write("a", b"old")
    upload = backend.upload("a")
    upload.write(b"new" * 10_000)
    upload.abort()
    upload.abort()

    assert place.read("a") == b"old"
    assert place.list() == {"a"}
    assert place.uploads() == set()


def test_an_upload_that_was_given_up_publishes_nothing_any_more(backend: Backend, place: Store) -> None:
    upload = backend.upload("a")
    upload.write(b"new")
    upload.abort()

    with pytest.raises(OSError):  # noqa: PT011
        upload.commit()
    with pytest.raises(OSError):  # noqa: PT011
        upload.write(b"more")
    assert place.list() == set()


def test_an_upload_that_was_never_begun_may_be_aborted(backend: Backend, place: Store) -> None:
    backend.upload("a").abort()

    assert place.list() == set()


def test_an_object_is_replaced_whole(backend: Backend, place: Store) -> None:
    """A reader beside a writer sees one version or is told that it changed; it never sees a mix or nothing."""
    versions = [bytes([number]) * (200_000 + number) for number in range(1, 9)]
    put(backend, "a", versions[0])
    seen: set[bytes] = set()
    problems: list[object] = []
    done = threading.Event()

    def read_on() -> None:
        while not done.is_set():
            try:
                data = get(backend, "a")
            except OSError as error:
                if error.errno != errno.ESTALE:
                    problems.append(error)
                continue
            seen.add(data)

    reader = threading.Thread(target=read_on)
    reader.start()
    try:
        for version in versions[1:]:
            put(backend, "a", version, step=65_536)
    finally:
        done.set()
        reader.join()

    assert problems == []
    assert seen <= set(versions)
    assert get(backend, "a") == versions[-1]


def test_many_threads_may_use_one_backend(backend: Backend, place: Store) -> None:
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            put(backend, f"file-{number}", bytes([number]) * 1000)
            assert get(backend, f"file-{number}") == bytes([number]) * 1000
            backend.list("")
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert problems == []
    assert place.list() == {f"file-{number}" for number in range(8)}


# -- changing


def test_remove_ends_one_object(backend: Backend, place: Store) -> None:
    place.write("a", b"1")
    place.write("ab", b"2")

    backend.remove("a")

    assert place.list() == {"ab"}


@pytest.mark.parametrize("kind", ["local", "memory", "sftp"], indirect=True)
def test_removing_what_is_missing_is_enoent(backend: Backend) -> None:
    with failing(errno.ENOENT) as failed:
        backend.remove("missing")
    assert failed.value.filename == "missing"


@pytest.mark.parametrize("kind", ["local", "memory", "sftp"], indirect=True)
def test_remove_many_tries_all_and_then_reports(backend: Backend, place: Store) -> None:
    for name in "acd":
        place.write(name, b"1")

    with failing(errno.ENOENT) as failed:
        backend.remove_many(iter("abcd"))
    assert failed.value.filename == "b"
    assert place.list() == set()


def test_folders_are_made_and_removed(backend: Backend, place: Store) -> None:
    backend.mkdir("folder")

    assert listed(backend)["folder"].is_dir
    assert backend.stat("folder").is_dir
    assert listed(backend, "folder") == {}
    backend.rmdir("folder")
    assert place.list() == set()
    if backend.capability.real_directories:
        assert listed(backend) == {}


@pytest.mark.parametrize("kind", OBJECT_STORES, indirect=True)
def test_a_folders_marker_is_no_entry_in_it(backend: Backend, place: Store) -> None:
    backend.mkdir("folder")
    put(backend, "folder/file", b"1")

    assert place.list() == {"folder/", "folder/file"}
    assert set(listed(backend, "folder")) == {"file"}
    assert {path for path, _ in backend.walk("folder")} == {"folder/", "folder/file"}


@pytest.mark.parametrize("kind", ["local", "memory", "sftp"], indirect=True)
def test_a_folder_with_files_is_not_removed(backend: Backend, place: Store) -> None:
    place.write("folder/file", b"1")

    with pytest.raises(OSError) as failed:  # noqa: PT011
        backend.rmdir("folder")
    assert (failed.value.filename, is_clear(failed.value)) == ("folder", True)
    assert place.list() == {"folder/file"}


def test_copy_keeps_bytes_and_leaves_the_source(backend: Backend, place: Store) -> None:
    if not backend.capability.copies:
        pytest.skip("the store does not copy")
    data = os.urandom(100_000)
    put(backend, "a b", data, mtime=1_500_000_000.25)
    if backend.capability.real_directories:
        backend.mkdir("dir")

    entry = backend.copy("a b", "dir/ü+%")

    assert place.read("dir/ü+%") == place.read("a b") == data
    assert (entry.name, entry.size) == ("ü+%", len(data))
    if backend.capability.sets_mtime:
        assert place.mtime("dir/ü+%") == pytest.approx(1_500_000_000.25)


def test_copying_what_is_missing_is_enoent(backend: Backend) -> None:
    if not backend.capability.copies:
        pytest.skip("the store does not copy")
    with failing(errno.ENOENT) as failed:
        backend.copy("missing", "target")
    assert failed.value.filename == "missing"


@pytest.mark.parametrize("kind", ["local", "sftp"], indirect=True)
def test_rename_moves_files_over_others_and_folders(backend: Backend, place: Store) -> None:
    place.write("a", b"new")
    place.write("b", b"old")
    place.write("folder/x", b"1")

    backend.rename("a", "b")
    backend.rename("folder", "moved")

    assert place.list() == {"b", "moved/x"}
    assert place.read("b") == b"new"
    with failing(errno.ENOENT) as failed:
        backend.rename("missing", "c")
    assert failed.value.filename == "missing"


@pytest.mark.parametrize("kind", ["local", "s3", "gs"], indirect=True)
@pytest.mark.parametrize("mtime", [1_000_000_000.0, 1_234_567_890.123456, 1.5, 4_102_444_800.75])
def test_mtimes_go_there_and_back(backend: Backend, place: Store, mtime: float) -> None:
    entry = put(backend, "a", b"1", mtime=mtime)
    assert entry.mtime == pytest.approx(mtime, abs=1e-6)
    assert backend.stat("a").mtime == pytest.approx(mtime, abs=1e-6)
    assert place.mtime("a") == pytest.approx(mtime, abs=1e-6)

    changed = backend.set_mtime("a", mtime + 100)
    assert changed.mtime == pytest.approx(mtime + 100, abs=1e-6)
    assert place.mtime("a") == pytest.approx(mtime + 100, abs=1e-6)
    assert place.read("a") == b"1"
    assert changed.fingerprint == backend.stat("a").fingerprint


def test_setting_the_mtime_of_what_is_missing_is_enoent(backend: Backend) -> None:
    if not backend.capability.sets_mtime:
        pytest.skip("the store has no such times")
    with failing(errno.ENOENT) as failed:
        backend.set_mtime("missing", 1.0)
    assert failed.value.filename == "missing"


@pytest.mark.parametrize("kind", ["local", "s3", "gs"], indirect=True)
def test_true_mtimes_are_filled_in_for_a_whole_listing(backend: Backend, place: Store) -> None:
    for number in range(12):
        place.write(f"d/{number}", b"x", mtime=1_000_000_000.0 + number)
    entries = backend.list("d")
    gone = Entry("gone meanwhile", is_dir=False)

    backend.true_mtimes("d", [*(entry for entry in entries if entry.mtime is None), gone])

    assert {entry.name: entry.mtime for entry in entries} == {str(n): 1_000_000_000.0 + n for n in range(12)}
    assert gone.mtime is None


def test_usage_is_sensible_where_there_is_one(backend: Backend) -> None:
    usage = backend.usage()

    assert usage is None or 0 < usage.free <= usage.total


def test_a_backend_shows_where_it_is(backend: Backend, place: Store) -> None:
    assert repr(backend).startswith(f"<{type(backend).__name__} ")


@pytest.fixture(autouse=True)
def _nothing_stays(place: Store) -> Iterator[None]:
    yield
    assert place.uploads() == set()


def test_a_range_is_handed_over_while_it_arrives(store: Store, make_backend: Callable[..., Any]) -> None:
    data = bytes(range(256)) * 8192
    store.write("a", data)
    backend = make_backend(store)
    pieces: list[bytes] = []
    assert backend.fetch("a", 5, len(data) - 5, None, pieces.append).result(timeout=30) == []
    assert b"".join(pieces) == data[5:-5]
