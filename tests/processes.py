"""Other processes for tests of what processes share: forked, talked to by a pipe, and killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

DEADLINE = 60.0  # seconds for another process to say something
CONTEXT = multiprocessing.get_context("fork")


class Child:
    """A forked process that runs `work(pipe)`, and the pipe to it."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=work, args=(theirs, *arguments))
        self.process.start()
        theirs.close()

    def hear(self) -> Any:
        """What the child says next."""
        assert self.pipe.poll(DEADLINE), "the child says nothing"
        return self.pipe.recv()

    def is_silent(self) -> bool:
        return not self.pipe.poll(0)

    def say(self, word: Any = None) -> None:
        self.pipe.send(word)

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.say(None)
        self.process.join(DEADLINE)
        if self.process.exitcode is None:
            self.kill()
        self.process.close()
        self.pipe.close()


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    """child(work, ...) -> Child, ended when the test ends."""
    with contextlib.ExitStack() as cleanup:

        def make(work: Callable[..., Any], *arguments: Any) -> Child:
            made = Child(work, *arguments)
            cleanup.callback(made.end)
            return made

        yield make
