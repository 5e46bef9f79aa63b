"""Sessions that store, read, delete and rename the same few files at once: each is told the truth, and in time.

The seed is in what a failure says; `FTPVFS_TEST_SEED` sets it. It gives the same commands, not the same moments.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Store
from tests.history import History, Look
from tests.shared import Records, Rules, Session, run_sessions

SESSIONS = 8
COMMANDS = 40  # of each session
DEADLINE = 20.0  # seconds for a reply, on a machine that others load
WAITS = 60.0
SEED = os.environ.get("FTPVFS_TEST_SEED", "shared")


@pytest.mark.parametrize("mode", ["off", "minimal", "writes", "full"])
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_sessions_on_shared_names_are_told_what_can_have_happened(
    make_store: Callable[..., Store],
    make_proxy: Callable[..., Any],
    make_vfs: Callable[..., Any],
    ftp_server: Callable[..., tuple[str, int]],
    tmp_path: Path,
    kind: str,
    mode: str,
) -> None:
    store = served = make_store(kind)
    if kind == "s3":
        proxy = make_proxy(store)
        proxy.jitter = 0.01
        served = store.proxied(proxy)
    seed = f"{SEED}-{kind}-{mode}"
    vfs = make_vfs(served, cache_mode=mode, cache_dir=str(tmp_path / "cache"), write_back="100ms")
    records, history = Records(random.Random(seed)), History()
    rules = Rules(appends=mode != "off", deadline=DEADLINE)
    address = ftp_server(vfs)
    sessions = [Session(address, f"{seed}-{number}", records, history, rules) for number in range(SESSIONS)]
    wrong = run_sessions(sessions, COMMANDS)
    assert not wrong, f"seed {seed}\n" + "\n".join(wrong)
    vfs.sync(WAITS)
    look_into(store, records, history, rules)
    wrong = history.wrong()
    assert not wrong, f"{len(wrong)} wrong answers, seed {seed}; the first: {wrong[0]}"
    assert vfs.core.parts is None or vfs.core.parts.cache.check() == []


def look_into(store: Store, records: Records, history: History, rules: Rules) -> None:
    """Note what the store itself has when all is over."""
    now = time.monotonic()
    there = store.list()
    for name in rules.names:
        content = records.read(store.read(name)) if name in there else None
        text = f"at the store {name}: {content}"
        history.add(Look(now, now, text, name, is_there=content is not None, content=content))
