"""The circuit breaker of a store: when it opens, what it lets through meanwhile, and what closes it."""

from __future__ import annotations

import pytest

from ftpvfs.vfs.breaker import LONGEST_PROBE, CircuitBreaker, Permit, State
from tests.test_dircache import MovedClock


@pytest.fixture
def clock() -> MovedClock:
    return MovedClock()


@pytest.fixture
def breaker(clock: MovedClock) -> CircuitBreaker:
    return CircuitBreaker("s3://bucket", clock)


def opened(breaker: CircuitBreaker, clock: MovedClock) -> None:
    asked_at = clock.monotonic()
    clock.advance(5)
    breaker.failed(asked_at)
    assert breaker.state is State.OPEN


def test_a_question_without_an_answer_opens_it(breaker: CircuitBreaker, clock: MovedClock) -> None:
    assert (breaker.state, breaker.permit()) == (State.CLOSED, Permit.WAIT)
    opened(breaker, clock)
    assert breaker.permit() is Permit.NONE


def test_a_slow_question_of_a_store_that_answers_others_does_not_open_it(
    breaker: CircuitBreaker, clock: MovedClock
) -> None:
    asked_at = clock.monotonic()
    clock.advance(3)
    breaker.answered()
    clock.advance(2)
    breaker.failed(asked_at)
    assert breaker.state is State.CLOSED


def test_one_question_at_a_time_is_a_probe_at_growing_distances(breaker: CircuitBreaker, clock: MovedClock) -> None:
    opened(breaker, clock)
    distances = []
    for _ in range(8):
        distance = 0
        while breaker.permit() is Permit.NONE:
            clock.advance(1)
            distance += 1
        distances.append(distance)
        assert breaker.state is State.HALF_OPEN
    assert distances == [1, 1, 2, 4, 8, 16, LONGEST_PROBE, LONGEST_PROBE]


def test_any_answer_closes_it_and_the_next_time_probes_begin_anew(
    breaker: CircuitBreaker, clock: MovedClock, caplog: pytest.LogCaptureFixture
) -> None:
    opened(breaker, clock)
    for _ in range(3):
        clock.advance(LONGEST_PROBE)
        assert breaker.permit() is Permit.PROBE
    breaker.answered()
    breaker.answered()
    assert (breaker.state, breaker.permit()) == (State.CLOSED, Permit.WAIT)
    clock.advance(1)
    opened(breaker, clock)
    clock.advance(1)
    assert breaker.permit() is Permit.PROBE
    assert [record.message for record in caplog.records] == [
        "s3://bucket does not answer (for 5.0 s); what can do without its answer does not wait for it",
        "s3://bucket answers again, after 90.0 s",
        "s3://bucket does not answer (for 5.0 s); what can do without its answer does not wait for it",
    ]
