"""The layers hold: every module imports downwards only, and each dependency stays in its home."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "ftpvfs"
ROOT = Path(__file__).parents[1] / PACKAGE

# From the bottom up. A module imports from lower rows and from its own package; leaves import only leaves.
LEAVES = {"errors", "clock", "paths", "metrics", "config", "memory", "waiting", "readiness", "coordination", "logs",
          "pattern"}
LAYERS = [
    {"backend"},
    {"cache"},
    {"vfs"},
    {"filesystem", "authorizer", "fsspec_filesystem"},
    {"server", "rc"},
    {"assembly", "cachecmd"},
    {"launch"},
    {"cli"},
    {"__main__"},
]
RANK = {layer: rank for rank, layers in enumerate([LEAVES, *LAYERS]) for layer in layers}
# Beyond the rows: who alone may know a layer. The package's __init__ names what is public, no programs.
KNOWN_TO = {
    "rc": {"cli"},
    "assembly": {"launch", "cli"},
    "cachecmd": {"cli"},
    "launch": {"cli"},
    "cli": {"__main__"},
    "__main__": set(),
}

# Where each third-party module may be imported, as prefixes of module names; what is not here is a stray.
HOMES: dict[str, set[str]] = {
    "pyftpdlib": {"server", "filesystem", "authorizer"},
    "OpenSSL": {"server"},
    "cryptography": {"server.tls"},
    "argon2": {"authorizer"},
    "greenlet": {"server.offload"},
    "diskcache": {"cache.database"},
    "fsspec": {"backend", "fsspec_filesystem"},
    "s3fs": {"backend"},
    "gcsfs": {"backend"},
    "aiobotocore": {"backend"},  # s3fs's own way to S3, and the home of its exceptions
    "botocore": {"backend"},
    "aiohttp": {"backend"},
    "google": {"backend"},
    "google_crc32c": {"backend.checksum"},  # comes with gcsfs
    "tenacity": {"backend", "cache"},
    "cachetools": {"backend", "cache", "vfs", "server", "filesystem"},
    "iniconfig": {"config"},
    "platformdirs": {"config"},
}

# Modules of tables and arithmetic: no lock, no clock, no disk, no network.
PURE = {"paths", "pattern", "vfs.openmode", "cache.state", "cache.ranges", "cache.eviction"}
IMPURE = {"threading", "time", "socket", "subprocess", "shutil", "tempfile", "asyncio"}


class Import(NamedTuple):
    line: int
    target: str  # a full module name, or module.name
    is_ours: bool


def module_name(path: Path, root: Path = ROOT) -> str:
    """`vfs.handle` for ftpvfs/vfs/handle.py, `vfs` for ftpvfs/vfs/__init__.py, "" for the package itself."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, name: str, is_package: bool) -> Iterator[Import]:
    """All imports of a module, those in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = f"{PACKAGE}.{name}".rstrip(".").split(".")
                up = node.level - is_package
                above = ".".join(package[: len(package) - up])
                base = f"{above}.{base}".rstrip(".")
            for alias in node.names:
                yield _import(node.lineno, f"{base}.{alias.name}")


def _import(line: int, target: str) -> Import:
    top, _, rest = target.partition(".")
    return Import(line, rest if top == PACKAGE else target, top == PACKAGE)


def strays(source: str, name: str, is_package: bool = False) -> list[str]:
    """What is wrong with a module's imports, one line each."""
    found = []
    for item in imports(source, name, is_package):
        complaint = _ours(item, name) if item.is_ours else _theirs(item, name)
        if complaint:
            found.append(f"{name or '__init__'}:{item.line}: {complaint}")
    return found


def _ours(item: Import, name: str) -> str | None:
    source, target = name.split(".")[0], item.target.split(".")[0]
    if target in ("", "__version__") or target == source:
        return None
    if target not in RANK:
        return f"imports {item.target} from the package itself, which is for its users"
    if name == "":
        return f"the package exports from {target}" if target in KNOWN_TO else None
    if source not in RANK:
        return f"{source} is in no layer"
    if target in KNOWN_TO and source not in KNOWN_TO[target]:
        return f"imports {item.target}, which only {sorted(KNOWN_TO[target])} may know"
    if RANK[target] >= RANK[source] > 0:
        return f"imports {item.target} upwards"
    if RANK[source] == 0 and RANK[target] > 0:
        return f"is a leaf and imports {item.target}"
    return None


def _theirs(item: Import, name: str) -> str | None:
    top = item.target.split(".")[0]
    if top in IMPURE and name in PURE:
        return f"is pure and imports {top}"
    if top in sys.stdlib_module_names or top == "_typeshed":  # types of the standard library
        return None
    if top not in HOMES:
        return f"imports {top}, which has no home"
    if not any(name == home or name.startswith(f"{home}.") for home in HOMES[top]):
        return f"imports {top}, whose home is {', '.join(sorted(HOMES[top]))}"
    return None


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: module_name(path) or "__init__")
def test_a_module_imports_downwards_and_dependencies_at_home(path: Path) -> None:
    found = strays(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_there_is_something_to_read() -> None:
    assert any(ROOT.rglob("*.py"))


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("vfs.vfs", "from ftpvfs.server.handler import VFSHandler", "upwards"),
        ("vfs.vfs", "from ..filesystem import VFSFilesystem", "upwards"),
        ("vfs.vfs", "from .. import filesystem", "upwards"),
        ("backend.s3", "def late():\n    from ftpvfs.vfs import vfs", "upwards"),
        ("server.handler", "import ftpvfs.rc.calls", "only ['cli']"),
        ("paths", "from ftpvfs.vfs import node", "leaf"),
        ("vfs.vfs", "from ftpvfs import VFS", "package itself"),
        ("vfs.vfs", "import fsspec", "home is backend"),
        ("cache.item", "import diskcache", "home is cache.database"),
        ("vfs.vfs", "import requests", "no home"),
        ("vfs.openmode", "import threading", "pure"),
        ("helpers", "from ftpvfs import errors", "no layer"),
    ],
)
def test_a_stray_import_is_named(name: str, source: str, complaint: str) -> None:
    (found,) = strays(source, name)
    assert complaint in found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("vfs.vfs", "from ftpvfs.backend.backend import Backend\nfrom ftpvfs import errors, paths"),
        ("vfs.vfs", "from .node import File\nfrom . import handle"),
        ("backend.s3", "import s3fs\nimport os"),
        ("server.offload", "import greenlet\nfrom pyftpdlib.ioloop import IOLoop"),
        ("cli", "from ftpvfs import __version__, config\nfrom ftpvfs.rc import calls"),
        ("", "from ftpvfs.vfs.vfs import VFS\nfrom .filesystem import VFSFilesystem"),
    ],
)
def test_a_downward_import_is_fine(name: str, source: str) -> None:
    assert strays(source, name, is_package=name == "") == []
