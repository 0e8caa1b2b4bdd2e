"""The benchmark of one scheduler's limits runs, and tells of what it cannot measure."""

from dataclasses import replace

from benchmark.ceiling import Case, Outcome, apart, run

SMALL = Case(ranks=3, models=2, requests=2, step_s=0.002, seconds=1.0, limit_bytes=8 << 30)


def test_ranks_are_given_steps_until_the_time_is_over():
    """Requests that end otherwise than by their length raise an error in it."""
    outcome = run(SMALL)
    assert outcome.wall_s >= SMALL.seconds
    assert 0 < outcome.steps <= outcome.most_steps + 2 * SMALL.ranks
    assert sum(outcome.turns_s) <= outcome.wall_s and outcome.core_per_step_s > 0


def test_a_case_without_the_memory_is_told():
    assert isinstance(apart(replace(SMALL, seconds=0.1)), Outcome)
    assert apart(replace(SMALL, limit_bytes=1 << 20)) == "more than 0 GiB"
