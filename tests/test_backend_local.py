"""What a folder of this machine promises beyond every store: links, temporary files, access rights, crashes."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.backend.backend import Backend, open_backend
from tests.conftest import Store, program_environment
from tests.test_backend import failing, get, listed, put

MakeBackend = Callable[..., Backend]


@pytest.fixture
def root(local_store: Store) -> Path:
    return Path(local_store.root)


@pytest.fixture
def backend(local_store: Store, make_backend: MakeBackend) -> Backend:
    return make_backend(local_store)


def everything(folder: Path) -> set[str]:
    """All names below the folder, temporary ones included."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# -- links


@pytest.fixture
def linked(root: Path, tmp_path: Path) -> Path:
    """A folder with links into it, out of it, to nowhere, to themselves and through the middle of a path."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_bytes(b"secret")
    (root / "real").mkdir()
    (root / "real" / "file.txt").write_bytes(b"inside")
    (root / "to-file").symlink_to(outside / "secret.txt")
    (root / "to-folder").symlink_to(outside)
    (root / "to-inside").symlink_to(root / "real")
    (root / "to-nowhere").symlink_to(root / "nowhere")
    (root / "to-itself").symlink_to(root / "to-itself")
    (root / "real" / "up").symlink_to(root)
    return root


def test_links_are_left_out(linked: Path, backend: Backend) -> None:
    assert set(listed(backend)) == {"real"}
    assert [path for path, _ in backend.walk("")] == ["real/file.txt"]


@pytest.mark.parametrize("path", ["to-file", "to-folder", "to-inside", "to-nowhere", "to-itself"])
def test_links_are_not_followed(linked: Path, backend: Backend, path: str) -> None:
    with failing(errno.ENOENT):
        backend.stat(path)
    with pytest.raises(OSError):  # noqa: PT011
        backend.list(path)
    with pytest.raises(OSError):  # noqa: PT011
        backend.open_file(path)
    with pytest.raises(OSError):  # noqa: PT011
        backend.fetch(path, 0, 1, None).result()


@pytest.mark.parametrize("path", ["to-folder/secret.txt", "to-inside/file.txt", "real/up/real/file.txt"])
def test_links_are_not_followed_in_the_middle_of_a_path(linked: Path, backend: Backend, path: str) -> None:
    actions: list[Callable[[], Any]] = [
        lambda: backend.stat(path),
        lambda: backend.open_file(path),
        lambda: backend.fetch(path, 0, 1, None).result(),
        lambda: put(backend, path, b"overwritten"),
        lambda: backend.remove(path),
        lambda: backend.mkdir(path + "x"),
        lambda: backend.rename("real/file.txt", path + "x"),
        lambda: backend.rename(path, "stolen"),
        lambda: backend.set_mtime(path, 1.0),
    ]
    for action in actions:
        with failing(errno.ELOOP) as failed:
            action()
        assert "--copy-links" in str(failed.value)
    assert (linked / "real" / "file.txt").read_bytes() == b"inside"


def test_links_are_followed_where_the_user_wants_it(
    linked: Path, local_store: Store, make_backend: MakeBackend
) -> None:
    backend = make_backend(local_store, follow_links=True)

    assert set(listed(backend)) == {"real", "to-file", "to-folder", "to-inside"}
    assert get(backend, "to-file") == b"secret"
    assert get(backend, "to-folder/secret.txt") == b"secret"
    assert backend.stat("to-inside").is_dir


def test_a_link_that_is_not_shown_is_not_replaced(linked: Path, tmp_path: Path, backend: Backend) -> None:
    put(backend, "new", b"new")
    upload = backend.upload("to-file")
    upload.write(b"new")
    with failing(errno.EEXIST):
        upload.commit()
    upload.abort()
    with failing(errno.EEXIST):
        backend.rename("new", "to-file")

    assert (tmp_path / "outside" / "secret.txt").read_bytes() == b"secret"
    assert (linked / "to-file").is_symlink()


def test_an_upload_to_a_followed_link_replaces_what_it_leads_to(
    linked: Path, local_store: Store, tmp_path: Path, make_backend: MakeBackend
) -> None:
    put(make_backend(local_store, follow_links=True), "to-file", b"new")

    assert (linked / "to-file").is_symlink()
    assert (tmp_path / "outside" / "secret.txt").read_bytes() == b"new"


def test_what_is_neither_file_nor_folder_is_left_out(root: Path, backend: Backend) -> None:
    os.mkfifo(root / "pipe")

    assert listed(backend) == {}
    with failing(errno.ENOENT):
        backend.stat("pipe")
    with failing(errno.ENOENT):
        backend.open_file("pipe")  # and does not wait for a writer


def test_a_root_that_is_a_link_is_served(root: Path, tmp_path: Path, make_backend: MakeBackend) -> None:
    (root / "a").write_bytes(b"1")
    (tmp_path / "link").symlink_to(root)

    assert set(listed(make_backend(str(tmp_path / "link")))) == {"a"}


# -- uploads


def test_an_upload_has_no_name_before_commit(root: Path, backend: Backend) -> None:
    upload = backend.upload("a")
    upload.write(b"bytes")

    assert everything(root) == set()
    upload.commit()
    assert everything(root) == {"a"}


def without_nameless_files(patch: pytest.MonkeyPatch) -> None:
    """As on macOS, and on file systems that have no nameless files."""
    patch.delattr(os, "O_TMPFILE")


def test_systems_without_nameless_files_use_hidden_ones(
    root: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_nameless_files(monkeypatch)
    (root / "a").write_bytes(b"old")
    upload = backend.upload("a")
    upload.write(b"new")

    assert len(everything(root)) == 2
    assert set(listed(backend)) == {"a"}
    assert get(backend, "a") == b"old"
    upload.commit()
    assert everything(root) == {"a"}
    assert get(backend, "a") == b"new"


@pytest.mark.parametrize("nameless", [True, False])
def test_nothing_stays_after_an_abort(
    root: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch, nameless: bool
) -> None:
    if not nameless:
        without_nameless_files(monkeypatch)
    upload = backend.upload("a")
    upload.write(b"bytes")
    upload.abort()
    upload.abort()

    assert everything(root) == set()


@pytest.mark.parametrize("nameless", [True, False])
def test_a_folder_in_the_way_is_not_replaced_and_nothing_stays(
    root: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch, nameless: bool
) -> None:
    if not nameless:
        without_nameless_files(monkeypatch)
    (root / "a").mkdir()
    upload = backend.upload("a")
    upload.write(b"bytes")
    with failing(errno.EISDIR):
        upload.commit()
    upload.abort()

    assert everything(root) == {"a"}


def test_an_upload_into_a_missing_folder_fails_with_its_path(root: Path, backend: Backend) -> None:
    with failing(errno.ENOENT) as failed:
        put(backend, "missing/a", b"1")
    assert failed.value.filename == "missing/a"


@pytest.fixture
def no_space() -> Iterator[None]:
    """No file of this process can grow beyond 100 kB, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("no_space")
def test_a_full_disk_ends_the_upload_and_keeps_the_old_file(root: Path, backend: Backend) -> None:
    """After bytes were lost nothing is published, though there may be space again."""
    put(backend, "a", b"old")
    upload = backend.upload("a")
    with failing(errno.EFBIG) as failed:
        upload.write(bytes(200_000))
    assert failed.value.filename == "a"
    with failing(errno.EIO):
        upload.write(b"more")
    with failing(errno.EIO):
        upload.commit()
    upload.abort()

    assert get(backend, "a") == b"old"
    assert everything(root) == {"a"}


KILLED = """
import os, signal, sys
from ftpvfs.backend.backend import Tuning, open_backend
if sys.argv[2] == "hidden":
    del os.O_TMPFILE
upload = open_backend(sys.argv[1]).upload("a")
upload.write(b"new" * 100_000)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("way", ["nameless", "hidden"])
def test_a_process_killed_in_the_middle_of_an_upload_leaves_the_old_file(
    root: Path, backend: Backend, way: str
) -> None:
    (root / "a").write_bytes(b"old")
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(root), way], env=program_environment(), check=False, timeout=60
    )
    assert process.returncode == -signal.SIGKILL

    assert get(backend, "a") == b"old"
    assert set(listed(backend)) == {"a"}
    if way == "nameless":
        assert everything(root) == {"a"}


def test_a_new_file_has_the_rights_of_the_process_and_a_replaced_one_keeps_its_own(
    root: Path, backend: Backend
) -> None:
    mask = os.umask(0o027)
    try:
        put(backend, "new", b"1")
        (root / "old").write_bytes(b"1")
        (root / "old").chmod(0o604)
        put(backend, "old", b"2")
    finally:
        os.umask(mask)

    assert (root / "new").stat().st_mode & 0o777 == 0o640
    assert (root / "old").stat().st_mode & 0o777 == 0o604


def test_a_reader_of_the_old_file_keeps_it(root: Path, backend: Backend) -> None:
    put(backend, "a", b"old bytes")
    opened = backend.open_file("a")
    try:
        put(backend, "a", b"new")
        assert os.pread(opened.fileno(), 100, 0) == b"old bytes"
        opened.verify()
    finally:
        opened.close()
        opened.close()


def test_a_change_in_place_is_noticed(root: Path, backend: Backend) -> None:
    (root / "a").write_bytes(b"old bytes")
    os.utime(root / "a", (1, 1))
    opened = backend.open_file("a")
    try:
        opened.verify()
        with open(root / "a", "r+b") as file:
            file.write(b"NEW")
        with failing(errno.ESTALE):
            opened.verify()
    finally:
        opened.close()


def test_a_folder_cannot_be_opened(root: Path, backend: Backend) -> None:
    (root / "a").mkdir()
    with failing(errno.EISDIR):
        backend.open_file("a")


@pytest.mark.parametrize(("options", "synced"), [({}, True), ({"sync": True}, True), ({"sync": False}, False)])
def test_sync_says_whether_commit_waits_for_the_disk(
    local_store: Store,
    make_backend: MakeBackend,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    synced: bool,
) -> None:
    calls: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    put(make_backend(local_store, options), "a", b"1")

    assert calls == (["file", "folder"] if synced else [])


def test_rights_that_were_changed_are_on_the_disk(
    root: Path, make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a").write_bytes(b"x")
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_mode & 0o777), fsync(number)))
    make_backend(str(root)).chmod("a", 0o640)
    assert synced == [0o640]
    make_backend(str(root), {"sync": False}).chmod("a", 0o600)
    assert synced == [0o640]
    assert (root / "a").stat().st_mode & 0o7777 == 0o600


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="this system cannot refer to a file without opening it")
def test_rights_of_what_its_owner_may_not_read_are_changed(make_backend: MakeBackend) -> None:
    """Root may read everything, so as root the test is somebody else."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, nobodys(folder):
        path = Path(folder) / "a"
        path.write_bytes(b"x")
        backend = make_backend(folder)
        for mode in (0o000, 0o200, 0o000, 0o400, 0o000, 0o644):
            backend.chmod("a", mode)
            assert path.stat().st_mode & 0o777 == mode
        assert path.read_bytes() == b"x"


@contextlib.contextmanager
def nobodys(folder: str) -> Iterator[None]:
    """Give a folder to a user without rights and be that user, where this process may."""
    nobody = pwd.getpwnam("nobody").pw_uid
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, nobody, -1)
    os.seteuid(nobody)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_unknown_storage_option_is_refused(make_backend: MakeBackend, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="synch is no storage option of file://; the nearest known one is sync"):
        make_backend(str(tmp_path), {"synch": True})


# -- the rest


def test_a_root_that_is_a_file_is_told(root: Path, make_backend: MakeBackend) -> None:
    (root / "a").write_bytes(b"1")
    with failing(errno.ENOTDIR):
        make_backend(str(root / "a")).check()


def test_names_that_are_no_text_are_listed_and_read(root: Path, backend: Backend) -> None:
    name = b"caf\xe9"
    Path(os.fsdecode(bytes(root) + b"/" + name)).write_bytes(b"latin")
    (found,) = listed(backend)

    assert os.fsencode(found) == name
    assert get(backend, found) == b"latin"


def test_a_null_in_a_name_is_an_oserror(backend: Backend) -> None:
    with failing(errno.EINVAL):
        backend.stat("a\0b")


def test_a_folder_that_changes_while_it_is_listed_is_no_error(
    root: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        (root / str(number)).write_bytes(b"")
    real = os.scandir

    def scandir(name: Any) -> Any:
        found = real(name)
        for number in range(0, 50, 2):
            (root / str(number)).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(os, "scandir", scandir)

    assert set(listed(backend)) >= {str(number) for number in range(1, 50, 2)}


def test_errors_name_the_path_and_not_the_place_on_the_disk(root: Path, backend: Backend) -> None:
    for action in (backend.stat, backend.list, backend.remove, backend.rmdir, backend.open_file):
        with failing(errno.ENOENT) as failed:
            action("a/b")
        assert str(root) not in str(failed.value)


def test_a_folder_that_holds_only_what_a_kill_left_behind_can_be_removed(tmp_path: Path) -> None:
    backend = open_backend(str(tmp_path))
    backend.mkdir("a")
    (tmp_path / "a" / ".ftpvfs-0123456789abcdef.tmp").write_bytes(b"left")
    assert backend.list("a") == []

    backend.rmdir("a")

    assert not (tmp_path / "a").exists()


def test_a_folder_with_a_hidden_file_of_somebody_elses_is_not_removed(tmp_path: Path) -> None:
    backend = open_backend(str(tmp_path))
    backend.mkdir("a")
    (tmp_path / "a" / ".hidden").write_bytes(b"kept")

    with pytest.raises(OSError, match="not empty"):
        backend.rmdir("a")

    assert (tmp_path / "a" / ".hidden").read_bytes() == b"kept"


# --- what is on the disk when a call returns


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was synced, in that order."""
    names: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        names.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", noted)
    return names


CHANGES: dict[str, tuple[Callable[[Backend], object], list[str]]] = {
    "mkdir": (lambda backend: backend.mkdir("d/new"), ["d"]),
    "rmdir": (lambda backend: backend.rmdir("d/empty"), ["d"]),
    "rmdir of what only a kill left": (lambda backend: backend.rmdir("d/left"), ["d"]),
    "remove": (lambda backend: backend.remove("d/a"), ["d"]),
    "rename": (lambda backend: backend.rename("d/a", "d/b"), ["d"]),
    "rename into another folder": (lambda backend: backend.rename("d/a", "e/a"), ["e", "d"]),
    "rename of a folder": (lambda backend: backend.rename("d/empty", "e/moved"), ["e", "d"]),
    "time of a file": (lambda backend: backend.set_mtime("d/a", 1000.0), ["d/a"]),
    "time of a folder": (lambda backend: backend.set_mtime("d", 1000.0), ["d"]),
    "upload": (lambda backend: backend.upload("d/new").commit(), ["d"]),
}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to name what is synced")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("sync", [True, False])
def test_what_was_changed_is_on_the_disk_when_the_call_returns(
    root: Path, local_store: Store, make_backend: MakeBackend, synced: list[str], change: str, sync: bool
) -> None:
    for folder in ("d/empty", "d/left", "e"):
        (root / folder).mkdir(parents=True)
    (root / "d/left/.ftpvfs-0123456789abcdef.tmp").write_bytes(b"")
    (root / "d/a").write_bytes(b"x")
    call, names = CHANGES[change]
    call(make_backend(local_store, {"sync": sync}))
    folders = [os.path.relpath(name, root) for name in synced if " (deleted)" not in name and "#" not in name]
    assert folders == (names if sync else [])
