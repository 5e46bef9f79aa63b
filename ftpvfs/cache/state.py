"""What may happen to a path in the cache, and what it is then: one table. Pure.

What the table does not have raises, and changes nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class State(enum.Enum):
    """What the cache has of a path."""

    ABSENT = "nothing"
    CLEAN = "some or all bytes of the store's object"
    DIRTY = "a file that the store does not have yet"
    UPLOADING = "a dirty file that is on its way to the store"
    GONE = "a tombstone: the store's object is to be deleted"
    DELETING = "a tombstone whose deletion is under way"


class Event(enum.Enum):
    """What happens to a path."""

    READ = "a reader wants the store's object"
    PUBLISH = "a writer has finished a file"
    STORED = "a writer has finished a file that is in the store already"
    TOUCH = "a dirty file gets another modification time"
    DELETE = "the file is deleted, and something may be at the store"
    DISCARD = "the file is deleted, and nothing is at the store"
    RENAME_HERE = "a dirty file of another path is renamed to this one"
    UPLOAD_BEGINS = "write-back is about to send the file"
    UPLOAD_ENDS = "the store has the file"
    UPLOAD_FAILS = "the store does not have the file, as far as anybody knows"
    DELETE_BEGINS = "write-back is about to delete the object"
    DELETE_ENDS = "the store has no object any more"
    DELETE_FAILS = "the store still has the object, as far as anybody knows"
    CHANGED_AT_STORE = "the store has another object than the one that is cached"
    EVICT = "the space is needed"


class ImpossibleEvent(RuntimeError):
    """Something happened to a path that cannot happen to it: a mistake of ours."""


_S, _E = State, Event

# Whatever becomes of a path, a new file may take its place, and the store's object may be deleted.
_ALWAYS: Mapping[Event, State] = {
    _E.PUBLISH: _S.DIRTY,
    _E.STORED: _S.CLEAN,
    _E.RENAME_HERE: _S.DIRTY,
    _E.DELETE: _S.GONE,
}

TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    _S.ABSENT: {
        **_ALWAYS,
        _E.READ: _S.CLEAN,
        _E.DISCARD: _S.ABSENT,
    },
    _S.CLEAN: {
        **_ALWAYS,
        _E.READ: _S.CLEAN,
        _E.CHANGED_AT_STORE: _S.CLEAN,
        _E.DISCARD: _S.ABSENT,
        _E.EVICT: _S.ABSENT,
    },
    _S.DIRTY: {
        **_ALWAYS,
        _E.TOUCH: _S.DIRTY,
        _E.DISCARD: _S.ABSENT,
        _E.UPLOAD_BEGINS: _S.UPLOADING,
    },
    # A deleted or renamed file whose upload is under way always leaves a tombstone: the object may be there.
    _S.UPLOADING: {
        **_ALWAYS,
        _E.TOUCH: _S.DIRTY,
        _E.UPLOAD_BEGINS: _S.UPLOADING,  # by a process that took over from a dead one
        _E.UPLOAD_ENDS: _S.CLEAN,
        _E.UPLOAD_FAILS: _S.DIRTY,
    },
    _S.GONE: {
        **_ALWAYS,
        _E.DELETE_BEGINS: _S.DELETING,
    },
    _S.DELETING: {
        **_ALWAYS,
        _E.DELETE_BEGINS: _S.DELETING,
        _E.DELETE_ENDS: _S.ABSENT,
        _E.DELETE_FAILS: _S.GONE,
    },
}


def after(state: State, event: Event) -> State:
    """Return the state that follows; ImpossibleEvent where none does."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise ImpossibleEvent(f"{event.name} cannot happen to what is {state.name}") from None


def is_dirty(state: State) -> bool:
    """Tell whether the store is yet to be changed: such a path is never evicted, refreshed or forgotten."""
    return state not in (State.ABSENT, State.CLEAN)
