"""News of uploads for programs: a Python callable, a command, or a URL.

Three kinds: `received` (acknowledged to the client), `stored` (the store has it), `failed` (it was tried often in vain
and goes on being tried). Each is told at least once, also over restarts: it is on the disk before it happens for the
cache, and goes when it was taken. Who takes it twice knows it by its `id`.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shlex
import signal
import subprocess
import threading
import urllib.request
from collections import deque
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from ftpvfs.cache.uploadlog import MOST_EVENTS, UploadLog
from ftpvfs.clock import Clock
from ftpvfs.config import VFSOptions

logger = logging.getLogger(__name__)

Event = dict[str, Any]

# News told at the same time; the rest waits in the log.
MOST_AT_ONCE = 4
# Seconds that a command or a URL may take.
PATIENCE = 60.0
FIRST_DELAY, LONGEST_DELAY = 1.0, 300.0
# Nobody wants to hear of what nobody could be told for so long.
KEPT = 7 * 86400.0
LONGEST_COMPLAINT = 500
# Seconds after which to look whether one of those who are told is through.
SOON = 0.05


class Events:
    """News on their way to those who asked for them. Any thread; the leader tells, every process may add.

    A callable is called in a thread of the process that leads the folder's write-back.
    """

    def __init__(self, log: Callable[[], UploadLog], options: VFSOptions, clock: Clock) -> None:
        hooks = {"received": options.on_received, "stored": options.on_stored, "failed": options.on_failed}
        self._hooks = {kind: _teller(hook) for kind, hook in hooks.items() if hook}
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        # Protected by _lock. News that are told at the moment.
        self._telling: set[str] = set()
        # News that were not taken: how often, and when they are told again.
        self._failed: dict[str, tuple[int, float]] = {}
        # News that could not be written down yet.
        self._unwritten: deque[Event] = deque(maxlen=MOST_EVENTS)

    @property
    def is_any_wanted(self) -> bool:
        """Whether somebody asked for any news."""
        return bool(self._hooks)

    def wants(self, kind: str) -> bool:
        """Tell whether somebody asked for this kind."""
        return kind in self._hooks

    def add(self, kind: str, path: str, **facts: Any) -> None:
        """Keep news to be told by the leader, who is to be woken; on the disk on return. Nothing where nobody asked.

        Raises nothing: what they tell of has happened. Where the disk does not take them they are kept in memory until
        it does.
        """
        if kind not in self._hooks:
            return
        now = self._clock.time()
        moment = datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="milliseconds")
        event = {"event": kind, "path": path, "time": moment, "at": now, **facts}
        try:
            self._log().add_event(now, event)
        except OSError as error:
            logger.error(  # noqa: TRY400 - the disk is full, or the like
                "news that %r is %s cannot be written down, and are lost if the process ends first: %s",
                path, kind, error,
            )  # fmt: skip
            with self._lock:
                self._unwritten.append(event)
        else:
            self._write_down()

    def _write_down(self) -> None:
        """Write down what could not be; what still cannot be stays."""
        while self._unwritten:
            event = self._unwritten[0]
            try:
                self._log().add_event(event["at"], event)
            except OSError:
                return
            with self._lock:
                if self._unwritten and self._unwritten[0] is event:
                    self._unwritten.popleft()

    def tell(self) -> float | None:
        """Begin to tell what waits; return in how many seconds to call again, None where nothing waits for a time."""
        if not self._hooks:
            return None
        self._write_down()
        waiting = self._log().events()
        now = self._clock.time()
        with self._lock:
            if self._failed:
                self._failed = {key: self._failed[key] for key in waiting if key in self._failed}
            free = MOST_AT_ONCE - len(self._telling)
            ready = [key for key in waiting if key not in self._telling and self._due_locked(key) <= now]
            self._telling.update(ready[:free])
            later = [due for key, (_, due) in self._failed.items() if key not in self._telling]
        for key in ready[:free]:
            threading.Thread(target=self._tell, args=(key,), name="ftpvfs-event", daemon=True).start()
        if len(ready) > free:
            return SOON
        return max(SOON, min(later) - now) if later else None

    def _due_locked(self, key: str) -> float:
        return self._failed[key][1] if key in self._failed else 0.0

    def _tell(self, key: str) -> None:
        event: Event = {}
        try:
            event = self._log().event(key)
            self._tell_once(key, event)
            self._log().drop_event(key)
        except Exception as error:  # noqa: BLE001 - somebody's own code: told, and tried again
            self._not_taken(key, event, error)
        finally:
            with self._lock:
                self._telling.discard(key)

    def _tell_once(self, key: str, event: Event) -> None:
        teller = self._hooks.get(event.get("event", ""))
        if teller is None:
            return  # nobody wants it any more
        if self._clock.time() - event.get("at", 0.0) > KEPT:
            logger.error("news of %r are given up after %d days: %s", event.get("path"), KEPT // 86400, event)
            return
        teller({"id": key.removeprefix("event:"), **{name: each for name, each in event.items() if name != "at"}})

    def _not_taken(self, key: str, event: Event, error: Exception) -> None:
        with self._lock:
            tries = self._failed.get(key, (0, 0.0))[0] + 1
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(tries - 1, 20)) * random.uniform(0.75, 1)
            self._failed[key] = (tries, self._clock.time() + delay)
        logger.warning(
            "--on-%s for %r failed (try %d, again in %.0f s): %s",
            event.get("event"), event.get("path"), tries, delay, str(error),
        )  # fmt: skip


def _teller(hook: str | Callable[..., Any]) -> Callable[[Event], Any]:
    """Return what tells one event, and raises where it is not taken."""
    if callable(hook):
        return hook
    if hook.startswith(("http://", "https://")):
        return lambda event: _post(hook, event)
    command = shlex.split(hook)
    return lambda event: _run(command, event)


def _post(url: str, event: Event) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": "ftpvfs"}
    request = urllib.request.Request(url, data=_json(event), headers=headers, method="POST")
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        answer.read(65536)


def _run(command: list[str], event: Event) -> None:
    """Run the command with the event as JSON on its stdin and as FTP_EVENT_... in its environment."""
    facts = {f"FTP_EVENT_{name.upper()}": _text(value) for name, value in event.items() if name != "event"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **facts, "FTP_EVENT": event["event"]},
        start_new_session=True,  # ended as a whole; and a ^C on the server's terminal is not for it
    )
    try:
        _, complaint = process.communicate(_json(event), timeout=PATIENCE)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if process.returncode:
        said = complaint.decode(errors="replace").strip()[-LONGEST_COMPLAINT:]
        raise RuntimeError(f"{command[0]} ended with status {process.returncode}: {said}")


def _json(event: Event) -> bytes:
    return json.dumps(event, ensure_ascii=True).encode()


def _text(value: Any) -> str:
    """Return a fact as an environment variable may have it."""
    return "" if value is None else str(value).replace("\0", "")
