"""The sdist: whoever unpacks it has all that the tests import and read, and can run them there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Of the tree only what is not made by tools while one works in it.
MADE = shutil.ignore_patterns(".git", "__pycache__", "*.pyc", "*.egg-info", ".*_cache", ".hypothesis", "build", "dist")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of this tree, built without network by the build backend itself."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=MADE)
    build = "import setuptools.build_meta as backend; backend.build_sdist('../dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "tree", check=True, capture_output=True, timeout=100)
    [archive] = (folder / "dist").iterdir()
    (folder / "unpacked").mkdir()
    subprocess.run(["tar", "xzf", str(archive), "-C", str(folder / "unpacked")], check=True, timeout=100)
    [unpacked] = (folder / "unpacked").iterdir()
    return unpacked


def files(root: Path, folder: str) -> set[str]:
    found = (path for path in (root / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(root)) for path in found if path.suffix != ".pyc"}


@pytest.mark.parametrize("folder", ["ftpvfs", "tests", "benchmarks"])
def test_the_sdist_has_every_file_of_a_folder(sdist: Path, folder: str) -> None:
    assert files(sdist, folder) == files(ROOT, folder)


def test_the_sdist_has_what_is_beside_the_folders(sdist: Path) -> None:
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.cfg", "tox.ini"):
        assert (sdist / name).is_file(), name  # setuptools writes setup.cfg anew


def test_the_tests_of_the_unpacked_sdist_find_all_that_they_import(sdist: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"], cwd=sdist,
        env={**os.environ, "PYTHONPATH": str(sdist), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
