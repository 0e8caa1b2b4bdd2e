"""When the HTTP process can serve, by what it is told and by whom it is not answered."""

from __future__ import annotations

import pytest
from crosspool.server.liveness import SILENCE_SECONDS, STOPPED_SECONDS, UNHEALTHY_SECONDS, Liveness
from crosspool.transport.inspection import Status
from crosspool.transport.notices import Continued, Lost, SchedulerGone, Stopped


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def status(*, ready: bool, message: str = "") -> Status:
    failure = message or None
    return Status(models=[], ranks=[], failure=failure, ready=ready, message=message, devices=[])


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def liveness(clock: Clock) -> Liveness:
    return Liveness(60.0, clock)


def test_all_is_well_until_something_is_told(liveness: Liveness) -> None:
    liveness.answered(status(ready=True), 0.5)
    assert liveness.problem is None and liveness.lost is None and not liveness.is_long


def test_a_loss_is_for_good(liveness: Liveness) -> None:
    liveness.told(Lost(cause="scheduler was killed by SIGKILL"))
    liveness.told(Lost(cause="detokenizer exited with status 1"))
    liveness.answered(status(ready=True), 0.5)
    assert liveness.problem == liveness.lost == "scheduler was killed by SIGKILL"
    assert liveness.is_long and liveness.launcher_knows


def test_a_failure_that_only_the_scheduler_knows_is_for_good(liveness: Liveness) -> None:
    liveness.answered(status(ready=False, message="attention rank 0 has not finished step 3"), 0.5)
    liveness.answered(status(ready=True), 0.5)
    assert liveness.lost == "attention rank 0 has not finished step 3"
    assert not liveness.launcher_knows


def test_a_stopped_process_is_a_problem_that_passes(liveness: Liveness, clock: Clock) -> None:
    liveness.told(Stopped(process="scheduler"))
    assert "scheduler" in (liveness.problem or "") and not liveness.is_long
    clock.now += STOPPED_SECONDS
    assert liveness.is_long and liveness.lost is None
    liveness.told(Continued(process="scheduler"))
    assert liveness.problem is None and not liveness.is_long


def test_silence_is_a_problem_then_ends_requests_then_is_for_good(liveness: Liveness) -> None:
    seconds = 0.0
    while seconds < 60.0:
        assert (liveness.problem is not None) == (seconds >= UNHEALTHY_SECONDS)
        assert liveness.is_long == (seconds >= SILENCE_SECONDS)
        assert liveness.lost is None
        liveness.silent(1.0)
        seconds += 1.0
    assert liveness.lost == "the scheduler has not answered for 60 s"


def test_a_scheduler_that_starts_again_is_waited_for(liveness: Liveness) -> None:
    """Requests in flight wait as long as for nobody else, but not for ever, and new ones as long as
    those in flight would wait for a scheduler that is silent."""
    liveness.told(SchedulerGone())
    for second in range(40):
        assert (liveness.problem is not None) == (second >= SILENCE_SECONDS)
        assert liveness.lost is None and not liveness.is_long
        liveness.answered(status(ready=False), 1.0)
    liveness.answered(status(ready=True), 1.0)
    assert liveness.problem is None
    for _ in range(40):  # a later silence is not that of another scheduler
        liveness.silent(1.0)
    assert liveness.is_long and liveness.lost is None
    liveness.told(SchedulerGone())
    for _ in range(20):
        liveness.answered(status(ready=False), 1.0)
    assert liveness.lost == "the scheduler has not answered for 60 s"


def test_an_answer_ends_silence(liveness: Liveness) -> None:
    for _ in range(20):
        liveness.silent(1.0)
    assert liveness.problem is not None
    liveness.answered(status(ready=True), 0.5)
    assert liveness.problem is None and not liveness.is_long
