"""What a file that is being read answers to a reader that must not wait: bytes, a future to await, or the end.

Three outcomes, three types: "no bytes at the moment" can never be taken for "no more bytes".
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Bytes:
    """`count` bytes, at least one, can be had from the position on without waiting."""

    count: int


@dataclass(frozen=True, slots=True)
class Awaited:
    """Nothing can be had before `future` is done; then the question is to be asked again."""

    future: Future[Any]


@dataclass(frozen=True, slots=True)
class End:
    """The position is at or behind the last byte of the version that is being read."""


END = End()
Readiness: TypeAlias = Bytes | Awaited | End
