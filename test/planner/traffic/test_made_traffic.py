"""Popularity, lengths, service times, dealing a trace to models, and made traces."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from crosspool.config.errors import ConfigError
from crosspool.planner.traffic.lengths import (
    PUBLISHED,
    Lengths,
    LogNormal,
    fixed,
    lognormal,
    read_length,
)
from crosspool.planner.traffic.popularity import openrouter, read_popularity, zipf
from crosspool.planner.traffic.service_time import DecodeSpeed, service_times
from crosspool.planner.traffic.spread import at_rates, by_lengths, by_model, spread
from crosspool.planner.traffic.trace import Trace
from crosspool.planner.traffic.trace_files import read_trace
from scipy import stats
from scipy.special import zeta

from benchmark.made_trace import Load, generate

DATA = Path(__file__).parents[4] / "shared" / "data"
SPEED = DecodeSpeed(tbt_s=0.03, prefill_tokens_per_s=4000, ttft_s=0.5)
CHAT = Lengths(prompt=lognormal(mean=200, sigma=1.0), output=lognormal(p50=100, sigma=0.5))


def _trace(requests: int = 1000, model: list[str] | None = None) -> Trace:
    numbers = np.arange(1, requests + 1)
    return Trace(
        prompt=numbers, output=numbers * 2, arrival=(numbers - 1) * 0.1, model=model
    )  # fmt: skip


def test_zipf_is_the_power_of_the_rank() -> None:
    shares = zipf(1000, 2.0)
    assert shares.sum() == pytest.approx(1)
    tail = zeta(2.0) - zeta(2.0, 1001)
    np.testing.assert_allclose(shares[[0, 9]], [1 / tail, 0.01 / tail])
    np.testing.assert_allclose(zipf(4, 0.0), 0.25)


def test_openrouter_leaves_a_sixth_to_nine_tenths_of_the_models() -> None:
    assert openrouter(330)[33:].sum() == pytest.approx(0.165, abs=0.005)


def test_popularity_by_its_name() -> None:
    np.testing.assert_array_equal(read_popularity("openrouter", 7), openrouter(7))
    np.testing.assert_array_equal(read_popularity("zipf:0.7", 7), zipf(7, 0.7))
    np.testing.assert_allclose(read_popularity("uniform", 5), 0.2)
    np.testing.assert_allclose(read_popularity("3,1,0", 3), [0.75, 0.25, 0])


@pytest.mark.parametrize(
    ("text", "models", "message"),
    [
        ("pareto", 2, "must be openrouter, uniform, zipf:ALPHA, or weights"),
        ("zipf:x", 2, "zipf:ALPHA"),
        ("zipf:-1", 2, "alpha -1.0: must be between 0 and 100"),
        ("zipf:nan", 2, "alpha nan"),
        ("1,2", 3, "2 weights for 3 models"),
        ("1,-2", 2, "at least 0"),
        ("1,nan", 2, "finite"),
        ("0,0", 2, "all weights are 0"),
        ("openrouter", 0, "0 models"),
    ],
)
def test_popularity_that_is_none(text: str, models: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_popularity(text, models)


def test_lognormal_by_two_of_its_statistics() -> None:
    by_mean, by_median = lognormal(mean=1155, sigma=0.985), lognormal(mean=1155, p50=711)
    assert by_mean.mean == by_median.mean == pytest.approx(1155)
    law = stats.lognorm(s=by_mean.sigma, scale=math.exp(by_mean.mu))
    assert law.mean() == pytest.approx(1155)
    assert by_median.sigma == pytest.approx(0.985, abs=1e-3)
    assert read_length("mean=1155, sigma=0.985") == by_mean
    assert read_length("512") == fixed(512)
    assert read_length("p50=100,sigma=1,longest=300").longest == 300


def test_drawn_lengths_follow_their_law() -> None:
    rng = np.random.default_rng(3)
    law = LogNormal(mu=6.0, sigma=0.8)
    prompt, output = Lengths(prompt=law, output=fixed(7), correlation=0.5).draw(20_000, rng)
    assert stats.kstest(np.log(prompt), stats.norm(6.0, 0.8).cdf).pvalue > 0.01
    assert set(output.tolist()) == {7}
    short = LogNormal(mu=6.0, sigma=0.8, longest=500).at(rng.standard_normal(1000))
    assert short.max() == 500
    assert LogNormal(mu=0.0, sigma=2.0).at(rng.standard_normal(1000)).min() == 1
    assert LogNormal(mu=10.0, sigma=10.0).at(np.array([1e6])).tolist() == [10_000_000]


@pytest.mark.parametrize("correlation", [-1.0, -0.6, 0.0, 0.4, 1.0])
def test_logarithms_of_the_lengths_are_correlated_as_told(correlation: float) -> None:
    law = LogNormal(mu=8.0, sigma=1.0)
    lengths = Lengths(prompt=law, output=law, correlation=correlation)
    logs = np.log(lengths.draw(20_000, np.random.default_rng(0)))
    assert np.corrcoef(logs)[0, 1] == pytest.approx(correlation, abs=0.02)


@pytest.mark.parametrize(
    "text",
    ["", "many", "0", "-5", "1e9", "99999999999", "mean=10", "mean=10,p50=20", "mean=x,p50=2",
     "mean=10,sigma=-1", "mean=1,p50=1,sigma=1", "mean=10,sigma=nan", "length=5,sigma=1",
     "mean=nan,sigma=1", "p50=5,sigma=1,longest=0", "mean=10,sigma=9"],
)  # fmt: skip
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="length"):
        read_length(text)


def test_service_time_of_speed_and_of_trace() -> None:
    seconds = SPEED.seconds(np.array([4000, 8000]), np.array([1, 100]))
    np.testing.assert_allclose(seconds, [1.53, 5.5])
    decode_only = DecodeSpeed(tbt_s=0.1)
    np.testing.assert_allclose(decode_only.seconds(np.array([10**6]), np.array([5])), [0.5])
    recorded = Trace(prompt=np.array([1]), output=np.array([1]), service=np.array([9.0]))
    assert service_times(recorded, None).tolist() == [9.0]
    assert service_times(recorded, decode_only).tolist() == [0.1]
    with pytest.raises(ConfigError, match="does not say how long"):
        service_times(_trace(), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tbt_s": -1.0}, "tbt_s"),
        ({"tbt_s": math.nan}, "tbt_s"),
        ({"tbt_s": 0.0}, "no time at all"),
        ({"tbt_s": 0.1, "ttft_s": math.inf}, "ttft_s"),
        ({"tbt_s": 0.1, "prefill_tokens_per_s": 0.0}, "prefill_tokens_per_s"),
        ({"tbt_s": 0.1, "prefill_tokens_per_s": math.nan}, "prefill_tokens_per_s"),
    ],
)
def test_speeds_that_are_none(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecodeSpeed(**fields)


def test_spread_deals_every_request_once_by_popularity() -> None:
    trace, shares = _trace(20_000), zipf(5, 1.0)
    traffic = spread(trace, shares, "abcde", seed=4, speed=SPEED)
    assert [model.model for model in traffic.models] == list("abcde")
    assert traffic.seconds == trace.seconds == pytest.approx(1999.9)
    counts = [len(model.samples) for model in traffic.models]
    assert stats.chisquare(counts, shares * len(trace)).pvalue > 0.001
    dealt = np.concatenate([model.samples.prompt for model in traffic.models])
    assert sorted(dealt.tolist()) == trace.prompt.tolist()
    assert trace.arrival is not None
    for model in traffic.models:
        samples = model.samples
        assert model.rate == pytest.approx(len(samples) / trace.seconds)
        assert model.arrivals is not None
        np.testing.assert_array_equal(model.arrivals, trace.arrival[samples.prompt - 1])
        np.testing.assert_array_equal(samples.output, samples.prompt * 2)
        np.testing.assert_array_equal(
            samples.service, SPEED.seconds(samples.prompt, samples.output)
        )


def test_spread_depends_on_its_seed_only() -> None:
    first, same, other = (
        spread(_trace(), zipf(3, 1.0), "abc", seed=seed, speed=SPEED).models[1].samples.prompt
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert first.tolist() != other.tolist()


def test_models_without_requests() -> None:
    traffic = spread(_trace(), np.array([1.0, 0.0]), "ab", seed=0, speed=SPEED)
    empty = traffic.models[1]
    assert (empty.rate, len(empty.samples)) == (0.0, 0)
    slow = DecodeSpeed(tbt_s=1.0)
    all_slow = spread(_trace(), np.array([0.0, 1.0]), "ab", seed=0, speed=slow)
    np.testing.assert_array_equal(all_slow.models[1].samples.service, _trace().output)


def test_requests_go_to_the_models_that_the_trace_names() -> None:
    trace = _trace(4, model=["Big", "small", "big", "BIG"])
    traffic = by_model(trace, ["small", "big", "idle"], speed=SPEED)
    assert [m.samples.prompt.tolist() for m in traffic.models] == [[2], [1, 3, 4], []]
    with pytest.raises(ConfigError, match=r"requests for 'small'.* deployed are big"):
        by_model(trace, ["big"], speed=SPEED)
    with pytest.raises(ConfigError, match="closest name is smaller"):
        by_model(trace, ["big", "smaller"], speed=SPEED)
    with pytest.raises(ConfigError, match="does not say which model"):
        by_model(_trace(), ["big"], speed=SPEED)


def test_rates_beside_a_trace_give_every_model_all_its_requests() -> None:
    lengths_only = Trace(prompt=np.array([1, 2]), output=np.array([3, 4]))
    slow = DecodeSpeed(tbt_s=1.0)
    traffic = at_rates(lengths_only, [0.5, 2.0], "ab", speed=slow)
    assert [model.rate for model in traffic.models] == [0.5, 2.0]
    assert all(model.arrivals is None for model in traffic.models)
    assert math.isinf(traffic.seconds)
    assert traffic.models[1].samples.service.tolist() == [3.0, 4.0]
    assert traffic.models[0].samples is traffic.models[1].samples


def test_lengths_and_rates_make_traffic() -> None:
    traffic = by_lengths(CHAT, [1.0, 0.0], "ab", 500, seed=1, speed=SPEED)
    again = by_lengths(CHAT, [1.0, 0.0], "ab", 500, seed=1, speed=SPEED)
    for model, same in zip(traffic.models, again.models, strict=True):
        assert len(model.samples) == 500
        np.testing.assert_array_equal(model.samples.prompt, same.samples.prompt)
    a, b = (model.samples.prompt for model in traffic.models)
    assert a.tolist() != b.tolist()


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([1.0], "1 request rates for 2 models"),
        ([1.0, -1.0], "rate of b -1.0"),
        ([1.0, math.nan], "rate of b nan"),
        ([0.0, 0.0], "all request rates are 0"),
    ],
)
def test_rates_that_are_none(rates: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        at_rates(_trace(), rates, "ab", speed=SPEED)
    with pytest.raises(ConfigError, match=message):
        by_lengths(CHAT, rates, "ab", 10, seed=0, speed=SPEED)


def test_numbers_that_do_not_match_the_models() -> None:
    with pytest.raises(ConfigError, match="3 shares for 2 models"):
        spread(_trace(), zipf(3, 1.0), "ab", seed=0, speed=SPEED)
    with pytest.raises(ConfigError, match="samples 0"):
        by_lengths(CHAT, [1.0, 1.0], "ab", 0, seed=0, speed=SPEED)


def test_a_made_trace_has_poisson_arrivals_and_the_asked_lengths() -> None:
    loads = [Load(model=name, rate=rate, lengths=CHAT) for name, rate in (("a", 20.0), ("b", 5.0))]
    trace = generate(loads, seconds=1000, seed=5)
    assert trace.arrival is not None and trace.model is not None
    assert (np.diff(trace.arrival) >= 0).all()
    assert trace.arrival[0] >= 0 and trace.arrival[-1] < 1000
    assert trace.service is None
    for load in loads:
        own = trace.take(np.array([name == load.model for name in trace.model]))
        expected = load.rate * 1000
        assert abs(len(own) - expected) < 4 * math.sqrt(expected)
        assert own.arrival is not None
        gaps = stats.kstest(np.diff(own.arrival), stats.expon(scale=1 / load.rate).cdf)
        assert gaps.pvalue > 0.001
        logs = stats.kstest(np.log(own.output), stats.norm(math.log(100), 0.5).cdf)
        assert logs.pvalue > 1e-4


@pytest.mark.parametrize("cv", [0.2, 1.0, 4.0])
def test_gaps_have_the_asked_variation_and_the_count_its_mean(cv: float) -> None:
    load = Load(model="a", rate=10.0, lengths=CHAT, gap_cv=cv)
    arrival = generate([load], seconds=5000, seed=0).arrival
    assert arrival is not None
    gaps = np.diff(arrival)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    # From time 0 on, too: without a stationary start the count would be (cv² - 1) / 2 too high.
    beat = Load(model="b", rate=10.0, lengths=CHAT, gap_cv=0.01)
    counts = []
    for seed in range(600):
        names = generate([load, beat], seconds=3, seed=seed).model
        assert names is not None
        counts.append(names.count("a"))
    assert np.mean(counts) == pytest.approx(30, abs=4 * max(cv, 0.3) * math.sqrt(30 / 600))


def test_a_model_s_requests_depend_on_the_seed_and_its_place_only() -> None:
    def own(rate_of_b: float, seed: int) -> list[float]:
        loads = [
            Load(model="a", rate=1.0, lengths=CHAT),
            Load(model="b", rate=rate_of_b, lengths=CHAT),
        ]
        trace = generate(loads, seconds=50, seed=seed)
        assert trace.arrival is not None and trace.model is not None
        return trace.arrival[[name == "a" for name in trace.model]].tolist()

    assert own(1.0, 7) == own(9.0, 7) == own(0.0, 7)
    assert own(1.0, 7) != own(1.0, 8)


def test_service_times_of_a_made_trace() -> None:
    trace = generate([Load(model="a", rate=5.0, lengths=CHAT, speed=SPEED)], seconds=20, seed=0)
    np.testing.assert_array_equal(trace.service, SPEED.seconds(trace.prompt, trace.output))


@pytest.mark.parametrize(
    ("fields", "seconds", "message"),
    [
        ({"rate": -1.0}, 10, "rate of a -1.0"),
        ({"rate": math.inf}, 10, "rate of a inf"),
        ({"rate": 1.0, "gap_cv": 0.0}, 10, "gap_cv of a 0.0"),
        ({"rate": 1.0}, 0, "seconds 0"),
        ({"rate": 1.0}, math.nan, "seconds nan"),
        ({"rate": 0.0}, 10, "no request arrives"),
        ({"rate": 1e9}, 1e9, "more than 100000000 requests"),
    ],
)
def test_loads_that_are_none(fields: dict[str, float], seconds: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate([Load(model="a", lengths=CHAT, **fields)], seconds=seconds, seed=0)


def test_either_all_or_none_have_a_speed() -> None:
    loads = [
        Load(model="a", rate=1.0, lengths=CHAT),
        Load(model="b", rate=1.0, lengths=CHAT, speed=SPEED),
    ]
    with pytest.raises(ConfigError, match="all models or none"):
        generate(loads, seconds=1, seed=0)
    with pytest.raises(ConfigError, match="no load"):
        generate([], seconds=1, seed=0)


@pytest.mark.skipif(not DATA.exists(), reason="no traces beside the repository")
def test_azure_over_thirty_models() -> None:
    trace = read_trace(DATA / "azure_llm_2023_conv.csv")
    names = [f"model-{number}" for number in range(30)]
    traffic = spread(trace, openrouter(30), names, seed=0, speed=SPEED)
    assert sum(len(model.samples) for model in traffic.models) == 19366
    assert sum(model.rate for model in traffic.models) == pytest.approx(trace.rate)
    assert traffic.models[0].rate / trace.rate == pytest.approx(openrouter(30)[0], abs=0.01)


def test_published_laws_name_real_traces() -> None:
    assert PUBLISHED["azure-conversation"].prompt.mean == pytest.approx(1155, rel=0.08)
    assert PUBLISHED["azure-conversation"].output.mean == pytest.approx(211, rel=0.08)


def test_reading_a_trace_imports_no_heavy_library() -> None:
    code = (
        "import sys, crosspool.planner.traffic.trace_files, "
        "crosspool.planner.traffic.spread, crosspool.planner.shapes.catalogue;"
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
