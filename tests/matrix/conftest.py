"""Each kind of store in mode off, and some of each in the cache modes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from tests.conftest import STORES, Store

WAITS = 30.0  # seconds for what is dirty to get to the store
MODES = [
    *((kind, "off") for kind in STORES),
    ("local", "writes"),
    ("s3", "minimal"),
    ("s3", "writes"),
    ("s3", "full"),
    ("gs", "full"),
]


@dataclass(frozen=True)
class ModeStore(Store):
    """A store that a VFS writes to in a cache mode; looked into, it has first got what was acknowledged."""

    mode: str = "off"
    vfses: list[Any] = field(default_factory=list)

    def settle(self) -> None:
        """Have everything uploaded that waits."""
        for vfs in self.vfses:
            vfs.sync(WAITS)

    def read(self, key: str) -> bytes:
        self.settle()
        return super().read(key)

    def list(self) -> set[str]:
        self.settle()
        return super().list()

    def mtime(self, key: str) -> float:
        self.settle()
        return super().mtime(key)

    def uploads(self) -> set[str]:
        self.settle()
        return super().uploads()


@pytest.fixture(params=MODES, ids="-".join)
def store(request: pytest.FixtureRequest, make_store: Any) -> ModeStore:
    """An empty place at each kind of store in turn; of `--vfs-cache-mode` see its `mode`."""
    kind, mode = request.param if isinstance(request.param, tuple) else (request.param, "off")
    plain = make_store(kind)
    return ModeStore(**{each.name: getattr(plain, each.name) for each in fields(plain)}, mode=mode)
