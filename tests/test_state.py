"""The table of a path's states: what it has, and what it refuses."""

from __future__ import annotations

import pytest

from ftpvfs.cache.state import TRANSITIONS, Event, ImpossibleEvent, State, after, is_dirty

EVERYWHERE = {Event.PUBLISH, Event.STORED, Event.RENAME_HERE, Event.DELETE}
# Who ends dirty data: nobody but the user's own new file or deletion, and write-back when the store has it.
ENDS_DIRTY = {Event.STORED, Event.DISCARD, Event.UPLOAD_ENDS, Event.DELETE_ENDS}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_what_is_in_the_table_happens_and_all_else_raises(state: State, event: Event) -> None:
    if event in TRANSITIONS[state]:
        assert after(state, event) is TRANSITIONS[state][event]
    else:
        with pytest.raises(ImpossibleEvent, match=event.name):
            after(state, event)


@pytest.mark.parametrize("state", State)
def test_a_user_may_write_and_delete_whatever_state_a_path_is_in(state: State) -> None:
    assert set(TRANSITIONS[state]) >= EVERYWHERE


@pytest.mark.parametrize("state", [state for state in State if is_dirty(state)])
def test_what_is_dirty_is_never_evicted_nor_refreshed(state: State) -> None:
    for event in (Event.EVICT, Event.CHANGED_AT_STORE, Event.READ):
        assert event not in TRANSITIONS[state]


@pytest.mark.parametrize("state", [state for state in State if is_dirty(state)])
def test_dirty_data_ends_by_upload_or_by_the_user_alone(state: State) -> None:
    ending = {event for event, to in TRANSITIONS[state].items() if not is_dirty(to)}
    assert ending <= ENDS_DIRTY


def test_every_state_can_be_reached_and_left() -> None:
    reached, front = {State.ABSENT}, [State.ABSENT]
    while front:
        for to in TRANSITIONS[front.pop()].values():
            if to not in reached:
                reached.add(to)
                front.append(to)
    assert reached == set(State)
    assert all(set(TRANSITIONS[state].values()) - {state} for state in State)


def test_an_upload_that_may_have_landed_is_never_just_forgotten() -> None:
    assert Event.DISCARD not in TRANSITIONS[State.UPLOADING]
    assert Event.DISCARD not in TRANSITIONS[State.GONE]
