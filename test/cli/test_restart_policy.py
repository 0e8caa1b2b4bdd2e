"""When a process that has died is started again."""

from crosspool.cli.restarts import WINDOW_SECONDS, Restarts


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_process_that_was_ready_is_started_at_once_up_to_the_limit() -> None:
    clock = Clock()
    restarts = Restarts(3, clock)
    assert [restarts.wait("a", was_ready=True) for _ in range(4)] == [0.0, 0.0, 0.0, None]
    assert restarts.wait("b", was_ready=True) == 0.0
    clock.now += WINDOW_SECONDS
    assert restarts.wait("a", was_ready=True) == 0.0


def test_starts_that_fail_wait_longer_and_longer() -> None:
    restarts = Restarts(8, Clock())
    waits = [restarts.wait("a", was_ready=ready) for ready in [True] + 6 * [False]]
    assert waits == [0.0, 0.25, 0.5, 1.0, 2.0, 2.0, 2.0]


def test_starts_that_fail_count_however_long_they_take() -> None:
    """A process that loads for minutes, and dies then, would never reach a limit per minute."""
    clock = Clock()
    restarts = Restarts(2, clock)
    waits = []
    for was_ready in (True, False, False):
        waits.append(restarts.wait("a", was_ready=was_ready))
        clock.now += 2 * WINDOW_SECONDS
    assert waits == [0.0, 0.25, None]


def test_a_start_that_succeeds_ends_the_count_of_those_that_failed() -> None:
    clock = Clock()
    restarts = Restarts(2, clock)
    for _ in range(5):
        assert restarts.wait("a", was_ready=True) == 0.0
        clock.now += WINDOW_SECONDS
        assert restarts.wait("a", was_ready=False) == 0.25
        clock.now += WINDOW_SECONDS


def test_no_process_is_started_again_with_a_limit_of_0() -> None:
    assert Restarts(0, Clock()).wait("a", was_ready=True) is None
