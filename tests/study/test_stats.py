from __future__ import annotations

import math

import numpy as np
import pytest

from loopwise.study import stats


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [
        (0.975, 1, 12.706204736),  # tan(pi (p - 1/2))
        (0.975, 2, 4.302652730),
        (0.975, 4, 2.776445105),
        (0.95, 9, 1.833112933),
        (0.995, 30, 2.749995654),
        (0.975, 1e6, 1.959966),
    ],
)
def test_t_quantiles_are_those_of_the_tables(probability: float, freedom: float, expected: float) -> None:
    assert stats.t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-6)
    assert stats.t_quantile(1 - probability, freedom) == pytest.approx(-expected, rel=1e-6)


def test_t_has_closed_forms_for_one_and_two_degrees_of_freedom() -> None:
    for value in (-7.0, -0.3, 0.0, 0.1, 2.0, 40.0):
        assert stats.t_cdf(value, 1) == pytest.approx(0.5 + math.atan(value) / math.pi, abs=1e-13)
        assert stats.t_cdf(value, 2) == pytest.approx(0.5 + value / (2 * math.sqrt(2 + value**2)), abs=1e-13)


def test_t_agrees_with_numerical_integration_of_its_density() -> None:
    grid = np.linspace(0, 1.7, 200_001)
    for freedom in (3.5, 11.0):
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        density = scale * (1 + grid**2 / freedom) ** (-(freedom + 1) / 2)
        assert stats.t_cdf(1.7, freedom) == pytest.approx(0.5 + np.trapezoid(density, grid), abs=1e-9)


def test_a_mean_interval_by_hand() -> None:
    found = stats.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.estimate == 3.0
    assert found.high - 3.0 == pytest.approx(2.776445105 * math.sqrt(2.5 / 5), rel=1e-8)
    assert 3.0 - found.low == pytest.approx(found.high - 3.0)
    alone = stats.mean_interval([2.0])
    assert (alone.low, alone.high) == (-math.inf, math.inf)


def coverage(draw, interval, truth: float, num: int = 1500) -> float:
    rng = np.random.default_rng(0)
    return float(np.mean([truth in interval(*draw(rng)) for _ in range(num)]))


def test_intervals_cover_what_they_say() -> None:
    one = lambda rng: (rng.normal(2, 3, size=4),)  # noqa: E731
    assert coverage(one, stats.mean_interval, 2.0) == pytest.approx(0.95, abs=0.02)
    two = lambda rng: (rng.normal(2, 3, size=4), rng.normal(1, 0.5, size=6))  # noqa: E731
    assert coverage(two, stats.difference_interval, 1.0) == pytest.approx(0.95, abs=0.02)
    assert coverage(two, stats.ratio_interval, 2.0) == pytest.approx(0.95, abs=0.025)
    pair = lambda rng: tuple(rng.normal(0, 5, size=5) + rng.normal(size=(2, 5)))  # noqa: E731
    assert coverage(pair, stats.paired_interval, 0.0) == pytest.approx(0.9, abs=0.025)


def test_each_limit_of_a_paired_interval_is_a_one_sided_95_percent_bound() -> None:
    rng = np.random.default_rng(1)
    found = [stats.paired_interval(rng.normal(1, 1, size=4), rng.normal(0, 1, size=4)) for _ in range(1500)]
    assert np.mean([item.low <= 1 for item in found]) == pytest.approx(0.95, abs=0.02)
    assert np.mean([item.high >= 1 for item in found]) == pytest.approx(0.95, abs=0.02)


def test_fieller_is_the_set_of_ratios_that_a_t_test_does_not_refuse() -> None:
    a, b = np.array([2.1, 2.4, 1.9, 2.2]), np.array([1.0, 1.2, 0.9, 1.1])
    found = stats.ratio_interval(a, b)
    freedom_parts = a.var(ddof=1) / 4, found.estimate**2 * b.var(ddof=1) / 4
    freedom = sum(freedom_parts) ** 2 / sum(part**2 / 3 for part in freedom_parts)
    limit = stats.t_quantile(0.975, freedom)
    ratios = np.linspace(1.0, 4.0, 30_001)
    t = (a.mean() - ratios * b.mean()) / np.sqrt(a.var(ddof=1) / 4 + ratios**2 * b.var(ddof=1) / 4)
    kept = ratios[np.abs(t) <= limit]
    assert found.low == pytest.approx(kept.min(), abs=2e-4)
    assert found.high == pytest.approx(kept.max(), abs=2e-4)


def test_a_ratio_over_what_may_be_zero_has_no_limits() -> None:
    found = stats.ratio_interval([1.0, 1.1, 0.9], [0.5, -0.4, 0.1])
    assert (found.low, found.high) == (-math.inf, math.inf)
    exact = stats.ratio_interval([2.0, 2.0], [4.0, 4.0])
    assert (exact.low, exact.estimate, exact.high) == (0.5, 0.5, 0.5)


def test_the_bootstrap_is_that_of_a_loop_and_of_its_seed() -> None:
    values = np.array([0.1, 0.5, 0.4, 0.9, 0.2])
    found = stats.bootstrap(values, seed=3, draws=500)
    rng = np.random.default_rng(3)
    means = sorted(float(np.mean([values[i] for i in rng.integers(5, size=5)])) for _ in range(500))
    assert found.low == pytest.approx(np.quantile(means, 0.025))
    assert found.high == pytest.approx(np.quantile(means, 0.975))
    assert found == stats.bootstrap(values, seed=3, draws=500)
    many = np.random.default_rng(0).normal(size=50)
    assert stats.bootstrap(many, seed=3, draws=500) != stats.bootstrap(many, seed=4, draws=500)


def test_shared_items_narrow_the_difference() -> None:
    rng = np.random.default_rng(0)
    hard_I = rng.random(400)
    ours = (hard_I + 0.05 * rng.normal(size=(3, 400)) > 0.5).astype(float)
    theirs = (hard_I + 0.05 * rng.normal(size=(3, 400)) > 0.5).astype(float)
    paired = stats.paired_items_interval(ours, theirs, draws=500)
    mixed = stats.paired_items_interval(ours, theirs[:, rng.permutation(400)], draws=500)
    assert paired.estimate == pytest.approx(ours.mean() - theirs.mean())
    assert paired.high - paired.low < 0.6 * (mixed.high - mixed.low)
    assert abs(paired.estimate) < 0.05


def test_mcnemar_by_hand() -> None:
    found = stats.mcnemar([1] * 6 + [0] + [1] * 10, [0] * 6 + [1] + [1] * 10)
    assert (found.only_ours, found.only_theirs) == (6, 1)
    assert found.p == pytest.approx(2 * (1 + 7) / 2**7)
    assert stats.mcnemar([1, 0], [1, 0]).p == 1.0


def test_the_slope_is_that_of_least_squares() -> None:
    depths, scores = [2, 4, 8, 16, 16], [0.21, 0.33, 0.37, 0.55, 0.52]
    rise, base = np.polyfit(np.log(depths), scores, 1)
    assert stats.slope(np.log(depths), scores) == pytest.approx((rise, base))
    assert stats.log_slope(depths, scores) == pytest.approx(rise)


def test_within_a_margin_means_both_bounds_are() -> None:
    assert stats.is_within(stats.Interval(estimate=0.0, low=-0.04, high=0.05), 0.05)
    assert not stats.is_within(stats.Interval(estimate=0.0, low=-0.06, high=0.01), 0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.mean_interval([]), "finite values"),
        (lambda: stats.mean_interval([1.0, math.nan]), "finite values"),
        (lambda: stats.paired_interval([1.0], [1.0, 2.0]), "as many values"),
        (lambda: stats.difference_interval([1.0], [1.0, 2.0]), "two values on each side"),
        (lambda: stats.ratio_interval([1.0, 2.0], [0.0, 0.0]), "is 0"),
        (lambda: stats.slope([1.0, 1.0], [2.0, 3.0]), "two different x"),
        (lambda: stats.mcnemar([0.5], [1]), "0 or 1"),
        (lambda: stats.bootstrap([1.0]), "two entries"),
        (lambda: stats.t_quantile(1.0, 3), "probability"),
        (lambda: stats.paired_items_interval(np.ones((2, 3)), np.ones((2, 4))), "shape"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
