"""A cache folder inside a served folder: nobody sees it, reads it, or changes it, by whatever way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftpvfs import VFS
from ftpvfs.assembly import Assembly
from ftpvfs.config import load
from tests.conftest import connect, download, names, reply, run_program, upload, wait_until

HIDDEN = {errno.EACCES, errno.ENOENT, errno.EPERM, errno.EEXIST, errno.ELOOP, errno.ENOTEMPTY}


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A folder with another in it, in which the cache is to be."""
    served = tmp_path / "served"
    (served / "apps" / "other").mkdir(parents=True)
    return served


@pytest.fixture
def make(served: Path) -> Any:
    """make(root, **options) -> VFS whose files wait in the cache `served/apps/caches`; closed when the test ends."""
    made: list[VFS] = []

    def make(root: Path = served, **options: Any) -> VFS:
        options = {"cache_mode": "writes", "write_back": "1h", "cache_dir": served / "apps" / "caches", **options}
        made.append(VFS(str(root), **options))
        return made[-1]

    yield make
    for vfs in made:
        vfs.close()


def put(vfs: VFS, path: str) -> None:
    with vfs.open(path, "wb") as file:
        file.write(b"precious")


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError as error:
        if error.errno not in HIDDEN:
            raise
        return True
    return False


def attacks(vfs: VFS, cache: str) -> dict[str, Callable[[], object]]:
    """What somebody may try with the cache folder, as it is called in the VFS, and with what is in it."""
    inside = f"{cache}/{Path(vfs.cache_folder).name}"

    def write(path: str) -> None:
        with vfs.open(path, "wb") as file:
            file.write(b"x")

    return {
        "stat": lambda: vfs.stat(cache),
        "stat inside": lambda: vfs.stat(inside),
        "list": lambda: vfs.listdir(cache),
        "list inside": lambda: vfs.listdir(f"{inside}/data"),
        "read": lambda: vfs.open(f"{inside}/store.json").read(),
        "write": lambda: write(f"{inside}/store.json"),
        "write anew": lambda: write(f"{inside}/data/new"),
        "write in its place": lambda: write(cache),
        "remove": lambda: vfs.remove(f"{inside}/store.json"),
        "make": lambda: vfs.mkdir(cache),
        "make inside": lambda: vfs.mkdir(f"{inside}/new"),
        "rmdir": lambda: vfs.rmdir(cache),
        "rename": lambda: vfs.rename(cache, "elsewhere"),
        "rename from inside": lambda: vfs.rename(f"{inside}/store.json", "elsewhere"),
        "rename above": lambda: vfs.rename(os.path.dirname(cache), "elsewhere"),
        "rename over": lambda: vfs.rename(f"{os.path.dirname(cache)}/other", cache),
        "rename into": lambda: vfs.rename(f"{os.path.dirname(cache)}/other", f"{inside}/other"),
        "time": lambda: vfs.utime(inside, (1, 1)),
    }


@pytest.mark.parametrize("mode", ["off", "writes"])
def test_nobody_reaches_a_cache_in_the_served_folder(make: Any, served: Path, mode: str) -> None:
    vfs = make(cache_mode=mode)
    if mode == "writes":
        put(vfs, "waits")
    before = {path for path in (served / "apps" / "caches").rglob("*") if path.parent.name == "data"}
    vfs.prepare()
    assert vfs.listdir("apps") == ["other"]
    for name, attack in attacks(vfs, "apps/caches").items():
        assert refused(attack), name
    assert {path for path in (served / "apps" / "caches").rglob("*") if path.parent.name == "data"} == before
    assert sorted(path.name for path in (served / "apps").iterdir()) == ["caches", "other"]
    vfs.sync(30)
    if mode == "writes":
        assert (served / "waits").read_bytes() == b"precious"


def test_no_link_leads_into_the_cache(make: Any, served: Path, tmp_path: Path) -> None:
    (served / "in").symlink_to(served / "apps" / "caches")
    (served / "above").symlink_to(served / "apps")
    (tmp_path / "further").symlink_to(served / "in")
    (served / "round").symlink_to(tmp_path / "further")
    for copy_links in (False, True):
        vfs = make(copy_links=copy_links, name=f"links-{copy_links}")
        put(vfs, "waits")
        vfs.prepare()
        assert vfs.listdir("") == (["above", "apps", "waits"] if copy_links else ["apps", "waits"])
        for link in ("in", "round", "above/caches"):
            for name, attack in attacks(vfs, link).items():
                if name != "rename above":
                    assert refused(attack), (link, name)
        assert (served / "apps" / "caches" / f"links-{copy_links}" / "store.json").exists()
        vfs.sync(30)


def test_a_link_out_of_another_folder_does_not_lead_into_the_cache(make: Any, served: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "link").symlink_to(served)
    vfs = make(shared, copy_links=True)
    put(vfs, "waits")
    assert vfs.listdir("link/apps") == ["other"]
    for name, attack in attacks(vfs, "link/apps/caches").items():
        assert refused(attack), name


@pytest.mark.parametrize("below", ["", "photos", "photos/data"])
def test_a_folder_inside_the_cache_is_not_served(served: Path, tmp_path: Path, below: str) -> None:
    caches = served / "apps" / "caches"
    (caches / below).mkdir(parents=True, exist_ok=True)
    (tmp_path / "link").symlink_to(caches / below)
    for place in (str(caches / below), str(tmp_path / "link"), f"file://{caches / below}"):
        refused_start = run_program(place, "--cache-dir", str(caches), "--addr", "127.0.0.1:0")
        assert refused_start.returncode == 1
        assert "lies in the cache folder" in refused_start.stderr
        with pytest.raises(ValueError, match="lies in the cache folder"):
            VFS(place, cache_dir=caches).prepare()


def test_a_way_through_other_stores_to_the_cache_is_refused(served: Path, tmp_path: Path) -> None:
    vfs = VFS(f"dir::file://{served}", cache_dir=served / "apps" / "caches")
    with pytest.raises(ValueError, match=r"lies in .*served, which is served"):
        vfs.examine()


def test_users_own_stores_do_not_reach_it_either(served: Path, tmp_path: Path, launched: Any) -> None:
    ini = tmp_path / "ftpvfs.ini"
    caches = served / "apps" / "caches"
    (tmp_path / "common").mkdir()
    ini.write_text(
        f"[backend]\nurl = {tmp_path / 'common'}\n[vfs]\ncache_dir = {caches}\ncache_mode = writes\nwrite_back = 1h\n"
        f"[user:all]\npassword = x\n[user:own]\npassword = x\nurl = {served}\n"
    )
    server = launched("--config", str(ini), "--workers", "1")
    with connect(server.address, "all", "x") as ftp:
        upload(ftp, "waits", b"precious")
    with connect(server.address, "own", "x") as ftp:
        assert names(ftp, "apps") == {"other"}
        assert reply(ftp, "CWD apps/caches").startswith("550")
        assert reply(ftp, "RNFR apps").startswith("350")
        assert reply(ftp, "RNTO elsewhere")[:3] in {"450", "550"}
    assert server.stop() == 0
    assert (tmp_path / "common" / "waits").read_bytes() == b"precious"
    ini.write_text(ini.read_text().replace(f"url = {served}\n", f"url = {caches}\n"))
    with pytest.raises(ValueError, match=r"\[user:own\]: .* lies in the cache folder"):
        Assembly(load(["--config", str(ini)], {})).examine()


def test_the_home_folder_is_served_without_its_cache(launched: Any, home: Path) -> None:
    server = launched(cwd=home, env={"XDG_CACHE_HOME": ""})
    with connect(server.address) as ftp:
        upload(ftp, "a", b"mine")
        wait_until(lambda: (home / ".cache" / "ftpvfs").is_dir())
        assert names(ftp) == {"a", ".cache"}
        assert names(ftp, ".cache") == set()
        assert reply(ftp, "RMD .cache").startswith("550")
        assert download(ftp, "a") == b"mine"
    assert server.stop() == 0
