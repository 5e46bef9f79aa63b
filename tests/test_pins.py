"""What ftpvfs uses of its libraries beyond their documented names: it is there, and a version without it is pinned out.

pyftpdlib's private names change without notice. Whoever raises its upper bound in pyproject.toml runs this first.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import diskcache
import pyftpdlib
import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

# pyftpdlib's class or module -> the private names of it that ftpvfs reads, sets or overrides.
PRIVATE = {
    "pyftpdlib.exceptions": ["_FileReadWriteError", "_RetryError"],
    "pyftpdlib.ioloop": ["_ERRNOS_DISCONNECTED", "_ERRNOS_RETRY"],
    "pyftpdlib.ioloop:_BasePollEpoll": ["_poller"],
    "pyftpdlib.ioloop:Epoll": ["_ERROR"],
    "pyftpdlib.ioloop:AsyncChat": [
        "_closed", "_closing", "_current_io_events", "_fileno", "_wanted_io_events",
    ],
    "pyftpdlib.handlers:FTPHandler": [
        "_available_facts", "_current_type", "_dtp_acceptor", "_dtp_connector", "_idler", "_in_dtp_queue",
        "_last_response", "_log_debug",
        "_make_epasv", "_make_eport", "_on_dtp_close", "_on_dtp_connection", "_out_dtp_queue", "_quit_pending",
        "_restart_position", "_shutdown_connecting_dtp",
    ],
    "pyftpdlib.handlers:DTPHandler": [
        "_data_wrapper", "_had_cr", "_idler", "_initialized", "_lastdata", "_resp",
    ],
    "pyftpdlib.handlers:TLS_FTPHandler": ["_pbsz", "_prot"],
    "pyftpdlib.handlers.ftps.ssl:SSLConnectionMixin": [
        "_do_ssl_shutdown", "_error", "_handle_ssl_want_rw", "_ssl_accepting", "_ssl_closing", "_ssl_want_read",
        "_ssl_want_write",
    ],
    "pyftpdlib.handlers.ftp.dispatchers:PassiveDTP": ["_closed"],
    "pyftpdlib.handlers.ftp.dispatchers:ActiveDTP": ["_closed", "_cmd", "_idler", "_normalized_addr"],
    "pyftpdlib.authorizers:UnixAuthorizer": ["_dummy_authorizer"],
    "pyftpdlib.servers:FTPServer": ["_map_len"],
    "pyftpdlib.servers:ThreadedFTPServer": ["_start_task"],
}  # fmt: skip


@pytest.mark.parametrize("place", PRIVATE)
def test_the_private_names_that_are_used_of_pyftpdlib_are_there(place: str) -> None:
    missing = sorted(set(PRIVATE[place]) - set(_defined_in(place)))
    assert not missing, (
        f"pyftpdlib {version('pyftpdlib')} has no {', '.join(missing)} in {place} any more, which ftpvfs uses: follow"
        " what has become of them, or keep that version out by the upper bound in pyproject.toml"
    )


def test_every_private_name_that_is_used_of_pyftpdlib_is_in_the_table_above() -> None:
    known = {name for names in PRIVATE.values() for name in names}
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "ftpvfs").rglob("*.py"))}
    own = {name for tree in trees.values() for name in _definitions(tree)}
    theirs = {name for path in Path(pyftpdlib.__path__[0]).rglob("*.py") for name in _definitions(_parsed(path))}
    used = {
        (str(path.relative_to(ROOT)), name)
        for path, tree in trees.items()
        for name in _uses(tree)
        if name in theirs - own - known
    }
    assert not used, "names that pyftpdlib has and ftpvfs uses, which are to stand in PRIVATE"


@pytest.mark.parametrize("name", ["pyftpdlib", "diskcache"])
def test_a_library_whose_internals_are_used_has_an_upper_bound(name: str) -> None:
    (line,) = re.findall(rf'^    "({name}\b[^"]*)",', (ROOT / "pyproject.toml").read_text(), re.M)
    allowed = Requirement(line).specifier
    major, minor = map(int, version(name).split(".")[:2])
    assert allowed.contains(version(name))
    newer = f"{major}.{minor + 1}"
    assert not allowed.contains(newer), f"{name} {newer} may have changed what ftpvfs overrides or reads"


def test_what_the_index_overrides_of_diskcache_is_called_as_it_expects() -> None:
    expected = {"put": ["key"], "get": ["key", "raw"], "store": ["value", "read", "key"],
                "fetch": ["mode", "filename", "value", "read"]}  # fmt: skip
    for method, names in expected.items():
        found = list(inspect.signature(getattr(diskcache.Disk, method)).parameters)[1:]
        assert found == names, f"diskcache {version('diskcache')}: Disk.{method} takes {found}"
    assert isinstance(diskcache.core.MODE_PICKLE, int)


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _defined_in(place: str) -> Iterator[str]:
    """Yield the names that a module, or a class and its bases of pyftpdlib, define."""
    module_name, _, class_name = place.partition(":")
    module = importlib.import_module(module_name)
    if not class_name:
        yield from vars(module)
        return
    for base in getattr(module, class_name).__mro__:
        if base.__module__.startswith("pyftpdlib"):
            yield from _definitions(ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))))


def _definitions(tree: ast.AST) -> Iterator[str]:
    """Yield the private names of functions, classes, and all that is assigned to, but for mere declarations."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found = node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found = node.id if isinstance(node, ast.Name) else node.attr
        else:
            continue
        if _is_private(found) and id(node) not in _declared(tree):
            yield found


def _declared(tree: ast.AST) -> set[int]:
    """Return the nodes of `_name: type` without a value: how ftpvfs tells mypy of a name that is pyftpdlib's."""
    key = "_declared_nodes"
    if not hasattr(tree, key):
        found = {id(n.target) for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and n.value is None}
        setattr(tree, key, found)
    return getattr(tree, key)  # type: ignore[no-any-return]


def _uses(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that are read of something, declared, or imported."""
    declared = _declared(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in {"os", "sys"}):
                yield node.attr
        elif isinstance(node, ast.Name) and id(node) in declared and _is_private(node.id):
            yield node.id
        elif isinstance(node, ast.ImportFrom):
            yield from (each.name for each in node.names if _is_private(each.name))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
