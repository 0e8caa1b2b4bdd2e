"""Compares demand at a random time with closed forms: M/G/infinity, Campbell, changing rates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from crosspool.config.errors import ConfigError
from crosspool.planner.demand.compound import exact_demand, request_law
from crosspool.planner.demand.kv_model import Charge, KVModel, kv_loads
from crosspool.planner.demand.monte_carlo import monte_carlo
from crosspool.planner.demand.quantile import ranks
from crosspool.planner.demand.replay import replay
from crosspool.planner.traffic.samples import ModelTraffic, Samples, Traffic
from scipy.stats import binom, poisson

FEW, BUSY = 1.5, 4.0
"""Rates at which requests of 4 s are drawn one by one, and from the law of their sum."""


def samples(*rows: tuple[int, int, float]) -> Samples:
    prompt, output, service = zip(*rows, strict=True)
    return Samples(np.array(prompt), np.array(output), np.array(service, dtype=float))


def traffic(*models: tuple[float, Samples]) -> Traffic:
    return Traffic(
        tuple(ModelTraffic(f"m{i}", rate, rows) for i, (rate, rows) in enumerate(models)), math.inf
    )


def kv(index: int = 0, page_size: int = 16, **more: int) -> KVModel:
    return KVModel(f"m{index}", 1, page_size, context=10**7, **more)


FIXED = samples((161, 14, 4.0))
"""11 pages of 16 tokens from beginning to end."""


@pytest.mark.parametrize("rate", [FEW, BUSY])
@pytest.mark.parametrize("charge", ["active", "promised"])
def test_fixed_lengths_and_times_are_poisson(rate: float, charge: Charge) -> None:
    number = poisson(rate * 4.0)
    page = 11 * 16
    exact = exact_demand(traffic((rate, FIXED)), [kv()], charge, chunk_bytes=page)
    assert exact.pool == pytest.approx(number.pmf(np.arange(len(exact.pool))), abs=1e-12)

    many = 200_000
    drawn = monte_carlo(traffic((rate, FIXED)), [kv()], many, 0, charge, chunk_bytes=page)
    error = number.std() / math.sqrt(many)
    assert drawn.mean / page == pytest.approx(number.mean(), abs=4 * error)
    assert drawn.chunks.var() == pytest.approx(
        number.var(), abs=4 * math.sqrt((2 * number.var() ** 2 + number.var()) / many)
    )
    for quantile in (0.05, 0.5, 0.9, 0.99):
        truth = number.ppf(quantile) * page
        assert exact.quantile(quantile).value == truth
        found = drawn.quantile(quantile, 0.9999)
        assert found.low <= truth <= found.high
        assert drawn.model_quantile(0, quantile, 0.9999) == found
    assert exact.exceeds(9 * page) == pytest.approx(number.sf(9))
    assert drawn.exceeds(9 * page) == pytest.approx(number.sf(9), abs=0.01)


@pytest.mark.parametrize("rate", [FEW, BUSY])
def test_growth_has_the_mean_of_little_and_the_variance_of_campbell(rate: float) -> None:
    prompt, output, active = 10_000, 30_000, rate * 4.0
    grown = traffic((rate, samples((prompt, output, 4.0))))
    mean = active * (prompt + output / 2)
    variance = active * (prompt**2 + prompt * output + output**2 / 3)

    exact = exact_demand(grown, [kv(page_size=1)], chunk_bytes=1)
    values = np.arange(len(exact.pool))
    assert exact.mean == pytest.approx(mean, rel=1e-4)  # half a token up, rounded
    assert exact.pool @ (values - exact.mean) ** 2 == pytest.approx(variance, rel=1e-4)

    many = 100_000
    drawn = monte_carlo(grown, [kv(page_size=1)], many, 0, chunk_bytes=1)
    assert drawn.mean == pytest.approx(mean, abs=4 * math.sqrt(variance / many))
    assert drawn.chunks.var() == pytest.approx(variance, rel=0.03)
    truth = exact.quantile(0.99).value
    found = drawn.quantile(0.99, 0.9999)
    assert found.low <= truth <= found.high


@pytest.mark.parametrize("rate", [FEW / 10, BUSY])
def test_rows_are_kept_together_and_long_ones_are_seen_more(rate: float) -> None:
    """Long prompts take long here: the mean is E[T * (O_p + O_d / 2)], not a product with E[T]."""
    rng = np.random.default_rng(5)
    prompt = rng.integers(100, 10_000, 500)
    output = prompt // 3
    service = prompt / 100.0
    together = traffic((rate, Samples(prompt, output, service)))
    apart = traffic((rate, Samples(prompt, rng.permutation(output), rng.permutation(service))))
    truth = rate * float(np.mean(service * (prompt + output / 2)))
    shuffled = rate * float(service.mean() * np.mean(prompt + output / 2))
    assert truth > 1.2 * shuffled
    for drawn in (
        monte_carlo(together, [kv(page_size=1)], 100_000, 0, chunk_bytes=1),
        exact_demand(together, [kv(page_size=1)], chunk_bytes=1),
    ):
        assert drawn.mean == pytest.approx(truth, rel=0.02)
    wrong = monte_carlo(apart, [kv(page_size=1)], 100_000, 0, chunk_bytes=1)
    assert wrong.mean == pytest.approx(shuffled, rel=0.05)


def test_the_law_of_a_request_against_its_definition() -> None:
    rng = np.random.default_rng(3)
    rows = Samples(rng.integers(1, 500, 40), rng.integers(1, 300, 40), rng.uniform(0.1, 9, 40))
    [load] = kv_loads(traffic((1.0, rows)), [kv()], 1)
    share = (np.arange(20_000) + 0.5) / 20_000
    pages = np.ceil((rows.prompt[:, None] + rows.output[:, None] * share) / 16).astype(int)
    weight = np.repeat(rows.service / rows.service.sum() / len(share), len(share))
    expected = np.bincount(pages.ravel(), weights=weight)
    assert request_law(load, "active") == pytest.approx(expected, abs=2e-4)


def test_each_model_is_rounded_to_chunks_before_the_sum() -> None:
    """Two Poisson models, 11 and 5 pages a request, chunks of 100 bytes, all cases counted."""
    both = traffic((FEW, FIXED), (0.5, samples((65, 14, 2.0))))
    exact = exact_demand(both, [kv(0), kv(1)], chunk_bytes=100)
    law: dict[int, float] = {}
    for a, b in itertools.product(range(60), range(40)):
        chunks = -(-a * 176 // 100) + -(-b * 80 // 100)
        chance = poisson.pmf(a, FEW * 4) * poisson.pmf(b, 1.0)
        law[chunks] = law.get(chunks, 0.0) + chance
    assert exact.pool == pytest.approx([law.get(k, 0.0) for k in range(len(exact.pool))], abs=1e-11)
    drawn = monte_carlo(both, [kv(0), kv(1)], 100_000, 1, chunk_bytes=100)
    assert drawn.mean == pytest.approx(exact.mean, rel=0.01)
    assert drawn.quantile(0.99).value == exact.quantile(0.99).value


def test_promised_is_the_worst_case_for_the_whole_time_within_the_context() -> None:
    rows = samples((100, 20, 4.0))
    for context, pages in ((1000, 8), (110, 7)):
        model = KVModel("m0", 1, 16, context)
        exact = exact_demand(traffic((FEW, rows)), [model], "promised", chunk_bytes=1)
        assert exact.mean == pytest.approx(FEW * 4 * pages * 16)


def test_requests_are_cut_to_the_context() -> None:
    rows = samples((100, 20, 4.0), (150, 300, 4.0), (500, 5, 4.0))
    [load] = kv_loads(traffic((1.0, rows)), [KVModel("m0", 1, 16, context=200)], 1)
    assert load.cut == 2
    assert load.samples.prompt.tolist() == [100, 150, 199]
    assert load.samples.output.tolist() == [20, 50, 1]


def test_the_interval_covers_the_truth_at_its_nominal_rate() -> None:
    """Demand comes in whole chunks, so the interval covers more than its level says; how much
    more follows from the distribution below and at the quantile."""
    seeds, many, quantile, level = 200, 1000, 0.99, 0.9
    arrivals = traffic((FEW, FIXED))
    number = poisson(FEW * 4)
    truth = number.ppf(quantile)
    covered = 0
    for seed in range(seeds):
        drawn = monte_carlo(arrivals, [kv()], many, seed, chunk_bytes=176)
        found = drawn.quantile(quantile, level)
        covered += found.low <= truth * 176 <= found.high
    low, _, high = ranks(many, quantile, level)
    nominal = 1 - (
        binom.cdf(low - 1, many, number.cdf(truth))
        + binom.sf(high - 1, many, number.cdf(truth - 1))
    )
    assert nominal > level
    least, most = binom.interval(0.999, seeds, nominal)
    assert least <= covered <= most


def test_the_interval_covers_a_nearly_continuous_truth() -> None:
    seeds, many, quantile, level = 200, 2000, 0.95, 0.9
    grown = traffic((FEW, samples((2_000, 30_000, 4.0))), (2.0, samples((10_000, 9_000, 2.0))))
    models = [kv(0, page_size=1), kv(1, page_size=1)]
    truth = exact_demand(grown, models, chunk_bytes=1).quantile(quantile).value
    covered = 0
    for seed in range(seeds):
        found = monte_carlo(grown, models, many, seed, chunk_bytes=1).quantile(quantile, level)
        covered += found.low <= truth <= found.high
    low, _, high = ranks(many, quantile, level)
    nominal = binom.cdf(high - 1, many, quantile) - binom.cdf(low - 1, many, quantile)
    least, most = binom.interval(0.999, seeds, nominal)
    assert least <= covered <= most


def test_a_seed_gives_the_same_demand_whatever_the_threads() -> None:
    both = traffic((FEW, FIXED), (BUSY, samples((65, 400, 4.0))))

    def draw(seed: int, threads: int | None) -> list[int]:
        models = [kv(0), kv(1)]
        drawn = monte_carlo(both, models, 150_000, seed, chunk_bytes=7, threads=threads)
        return drawn.chunks.tolist()

    first = draw(1, 1)
    assert first == draw(1, 3) == draw(1, None)
    assert first != draw(2, 1)


ARRIVALS = np.concatenate((np.linspace(0, 99, 100), np.linspace(100, 199.9, 900)))
"""One per second for 100 s, then nine per second for 100 s."""


def changing(service: float, arrivals: np.ndarray = ARRIVALS) -> ModelTraffic:
    ones = np.ones(len(arrivals), dtype=np.int64)
    rows = Samples(ones * 161, ones * 14, ones * service)
    return ModelTraffic("m0", len(arrivals) / 200, rows, arrivals)


def test_windows_follow_the_rate() -> None:
    """M_t/G/infinity: at time t there are Poisson(integral of the rate over (t - T, t])."""
    service = 30.0
    drawn = monte_carlo(
        Traffic((changing(service),), 200.0), [kv()], 80_000, 0, chunk_bytes=176, window=100
    )
    t = (np.arange(4000) + 0.5) / 20

    def arrived(t: np.ndarray) -> np.ndarray:
        return np.where(t < 0, 0, np.where(t < 100, t, 100 + 9 * (t - 100)))

    number = poisson(arrived(t) - arrived(t - service))
    for k in (0, 5, 30, 60, 200, 270, 300):
        truth = float(np.mean(number.cdf(k)))
        assert np.mean(drawn.chunks <= k) == pytest.approx(truth, abs=0.0075)


@pytest.mark.parametrize("window", [1.0, 7.3, 40.0])
def test_windows_of_any_length_know_samples_of_any_time(window: float) -> None:
    """Requests that outlive many windows and a burst of short requests each keep to their own
    windows."""
    rng = np.random.default_rng(2)
    arrivals = np.sort(np.concatenate((rng.uniform(0, 200, 100), rng.uniform(60, 64, 300))))
    model = changing(1.0, arrivals)
    model.samples.service[arrivals < 50] = 50.0
    drawn = monte_carlo(Traffic((model,), 200.0), [kv()], 80_000, 0, chunk_bytes=176, window=window)
    t = (np.arange(40_000) + 0.5) / 200
    active = np.zeros(len(t))
    for service in (1.0, 50.0):
        own = arrivals[model.samples.service == service]
        counts, edges = np.histogram(own, round(200 / window), (0, 200))
        total = np.concatenate(([0], np.cumsum(counts)))
        active += np.interp(t, edges, total) - np.interp(t - service, edges, total)
    number = poisson(active)
    assert np.mean(drawn.chunks) == pytest.approx(active.mean(), rel=0.03)
    for k in (0, 5, 20, 100, 150):
        truth = float(np.mean(number.cdf(k)))
        assert np.mean(drawn.chunks <= k) == pytest.approx(truth, abs=0.0075)


@pytest.mark.parametrize("window", [0.5, 10.0, 2000.0])
def test_windows_know_ages_and_lengths_together(window: float) -> None:
    """Windows are shorter than any request, longer than any, and as long as the trace, which gives
    the stationary law except at the trace's ends."""
    rng = np.random.default_rng(4)
    prompt = rng.integers(10, 3000, 2000)
    rows = Samples(prompt, rng.integers(10, 3000, 2000), 1.0 + prompt / 500)
    model = ModelTraffic("m0", 1.0, rows, np.sort(rng.uniform(0, 2000, 2000)))
    trace = Traffic((model,), 2000.0)
    drawn = monte_carlo(trace, [kv()], 60_000, 0, chunk_bytes=16, window=window)
    assert drawn.mean == pytest.approx(replay(trace, [kv()], chunk_bytes=16).mean, rel=0.02)
    if window == 2000:
        exact = exact_demand(trace, [kv()], chunk_bytes=16)
        for quantile in (0.1, 0.5, 0.9, 0.99):
            truth = exact.quantile(quantile).value
            assert drawn.quantile(quantile).value == pytest.approx(truth, rel=0.03)
    again = monte_carlo(trace, [kv()], 60_000, 0, chunk_bytes=16, window=window, threads=1)
    assert np.array_equal(drawn.chunks, again.chunks)


def test_windows_let_bursts_of_two_models_meet() -> None:
    one = changing(3.0)
    two = ModelTraffic("m1", one.rate, one.samples, one.arrivals)
    models = [kv(0), kv(1)]
    drawn = monte_carlo(Traffic((one, two), 200.0), models, 50_000, 0, chunk_bytes=176, window=50)
    # Poisson given the time, with mean 6 in one half and 54 in the other
    assert drawn.chunks.var() == pytest.approx(30 + 24**2, rel=0.05)
    flat = monte_carlo(Traffic((one, two), 200.0), models, 50_000, 0, chunk_bytes=176)
    assert flat.chunks.var() == pytest.approx(30, rel=0.05)


def test_a_model_without_requests_needs_nothing() -> None:
    none = Samples(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    both = traffic((FEW, FIXED), (0.0, none))
    drawn = monte_carlo(both, [kv(0), kv(1)], 1000, 0, chunk_bytes=176)
    assert drawn.model_quantile(1, 0.99).value == 0
    assert exact_demand(both, [kv(0), kv(1)], chunk_bytes=176).model_quantile(1, 0.5).value == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelTraffic("other", 1.0, FIXED), "other"),
        (ModelTraffic("m0", -1.0, FIXED), "rate of m0"),
        (ModelTraffic("m0", math.nan, FIXED), "rate of m0"),
        (ModelTraffic("m0", 1.0, samples((0, 5, 1.0))), "prompt of m0, sample 0"),
        (ModelTraffic("m0", 1.0, samples((5, 5, 1.0), (5, 5, 0.0))), "service of m0, sample 1"),
        (ModelTraffic("m0", 1.0, samples((5, 5, math.inf))), "service of m0"),
        (ModelTraffic("m0", 1.0, FIXED, np.arange(2.0)), "arrivals of m0"),
    ],
)
def test_impossible_traffic_is_refused(model: ModelTraffic, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        monte_carlo(Traffic((model,), math.inf), [kv()], 10, 0, chunk_bytes=1)


def test_windows_need_times() -> None:
    with pytest.raises(ConfigError, match="window"):
        monte_carlo(traffic((1.0, FIXED)), [kv()], 10, 0, chunk_bytes=1, window=10)
    with pytest.raises(ConfigError, match="window"):
        monte_carlo(Traffic((changing(1.0),), 200.0), [kv()], 10, 0, chunk_bytes=1, window=-1)
