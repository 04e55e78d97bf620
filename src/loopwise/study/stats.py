"""Statistics of comparisons: intervals over seeds, paired bounds, slopes and their ratio.

All intervals are for 95 % unless a level is given. A bootstrap is a function of its seed.

Shapes: S seeds, I items, P points.
"""

# ruff: noqa: N803, N806 -- shape suffixes

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
TWO_BOUNDS = 0.90
"""Level of an interval whose limits are one-sided 95 % bounds."""
_DRAWS = 4000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate between two limits, which may be infinite.

    Attributes:
        estimate: the value.
        low, high: the limits.
        level: how often such limits hold what they are for.
    """

    estimate: float
    low: float
    high: float
    level: float = LEVEL

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """The mean and its two-sided t interval.

    Args:
        values: independent ones, such as one score per seed; a single value has infinite limits.
        level: of the interval; 0.9 gives two one-sided bounds of 95 % each.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    values_S = _finite(values)
    mean = float(values_S.mean())
    if len(values_S) == 1:
        return Interval(estimate=mean, low=-math.inf, high=math.inf, level=level)
    error = float(values_S.std(ddof=1)) / math.sqrt(len(values_S))
    half = t_quantile((1 + level) / 2, len(values_S) - 1) * error
    return Interval(estimate=mean, low=mean - half, high=mean + half, level=level)


def difference_interval(
    ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray, level: float = LEVEL
) -> Interval:
    """Difference of two means of independent values by Welch (1947): the seeds of two arms that share nothing.

    Raises:
        ValueError: fewer than two values on a side.
    """
    one, other = _finite(ours), _finite(theirs)
    if min(len(one), len(other)) < 2:
        raise ValueError(f"a difference of means needs two values on each side, got {len(one)} and {len(other)}")
    parts = one.var(ddof=1) / len(one), other.var(ddof=1) / len(other)
    estimate, variance = float(one.mean() - other.mean()), float(sum(parts))
    if variance == 0:
        return Interval(estimate=estimate, low=estimate, high=estimate, level=level)
    freedom = variance**2 / (parts[0] ** 2 / (len(one) - 1) + parts[1] ** 2 / (len(other) - 1))
    half = t_quantile((1 + level) / 2, float(freedom)) * math.sqrt(variance)
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half, level=level)


def paired_interval(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> Interval:
    """Mean of the differences of pairs between its two one-sided 95 % bounds (t): pairs are seeds, or shared items.

    Raises:
        ValueError: the sides differ in length.
    """
    one, other = _finite(ours), _finite(theirs)
    if len(one) != len(other):
        raise ValueError(f"pairs need as many values on both sides, got {len(one)} and {len(other)}")
    return mean_interval(one - other, level=TWO_BOUNDS)


def bootstrap(
    values: Sequence[Any] | np.ndarray,
    statistic: Callable[[np.ndarray], float] = lambda values: float(np.mean(values)),
    *,
    seed: int = 0,
    draws: int = _DRAWS,
    level: float = LEVEL,
) -> Interval:
    """Percentile interval of a statistic under drawing the entries of the first axis with replacement.

    Args:
        values: `[S, ...]`, at least two entries.
        statistic: a number from an array of that shape.
        seed: of the draws.
        draws: how many.
        level: of the interval.
    """
    values = np.asarray(values)
    if len(values) < 2:
        raise ValueError(f"a bootstrap needs at least two entries, got {len(values)}")
    rng = np.random.default_rng(seed)
    found = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(draws)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate=statistic(values), low=float(low), high=float(high), level=level)


def paired_items_interval(
    ours_SI: np.ndarray, theirs_SI: np.ndarray, *, seed: int = 0, draws: int = _DRAWS
) -> Interval:
    """Mean difference on shared items between two one-sided 95 % bounds, for these items and seeds as samples of more.

    A bootstrap that draws seeds and items: items pair up across arms, and seeds are drawn for each arm by itself, since
    seed s of one arm has nothing in common with seed s of another but the order of its data. With fewer than about ten
    seeds it is too narrow for what seeds do: then take `difference_interval` of the scores of the seeds.

    Args:
        ours_SI: score of every item under every seed, `[S, I]`.
        theirs_SI: of the other arm, `[S', I]`, the same items in the same order.
        seed: of the draws.
        draws: how many.
    """
    ours_SI, theirs_SI = np.asarray(ours_SI, float), np.asarray(theirs_SI, float)
    if ours_SI.ndim != 2 or theirs_SI.ndim != 2 or ours_SI.shape[1] != theirs_SI.shape[1]:
        raise ValueError(f"scores of shared items have the shape [S, I]: got {ours_SI.shape} and {theirs_SI.shape}")
    rng = np.random.default_rng(seed)
    (num_ours, num_items), num_theirs = ours_SI.shape, len(theirs_SI)
    found = np.empty(draws)
    for draw in range(draws):
        weight_I = rng.multinomial(num_items, np.full(num_items, 1 / num_items)) / num_items
        ours = (ours_SI[rng.integers(num_ours, size=num_ours)] @ weight_I).mean()
        theirs = (theirs_SI[rng.integers(num_theirs, size=num_theirs)] @ weight_I).mean()
        found[draw] = ours - theirs
    low, high = np.quantile(found, [1 - LEVEL, LEVEL])
    estimate = float(ours_SI.mean() - theirs_SI.mean())
    return Interval(estimate=estimate, low=float(low), high=float(high), level=TWO_BOUNDS)


@dataclass(frozen=True, kw_only=True)
class Discordance:
    """McNemar's test (1947) in its exact form on items that two models both answered.

    Attributes:
        only_ours, only_theirs: items that one of the two has right.
        p: two-sided probability of a split at least as uneven if both were equally good.
    """

    only_ours: int
    only_theirs: int
    p: float


def mcnemar(ours_I: Sequence[float] | np.ndarray, theirs_I: Sequence[float] | np.ndarray) -> Discordance:
    """Compare two lists of right (1) and wrong (0) on the same items."""
    one, other = _finite(ours_I), _finite(theirs_I)
    if len(one) != len(other) or not np.isin(np.concatenate([one, other]), (0, 1)).all():
        raise ValueError("mcnemar needs 0 or 1 for the same items on both sides")
    ours, theirs = int(((one == 1) & (other == 0)).sum()), int(((one == 0) & (other == 1)).sum())
    total, least = ours + theirs, min(ours, theirs)
    tail = sum(math.comb(total, k) for k in range(least + 1)) / 2**total
    return Discordance(only_ours=ours, only_theirs=theirs, p=min(1.0, 2 * tail))


def slope(x_P: Sequence[float] | np.ndarray, y_P: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(slope, intercept) of the least-squares line; for accuracy = a log(depth) + b, x is the logarithm.

    Raises:
        ValueError: fewer than two different x.
    """
    x, y = _finite(x_P), _finite(y_P)
    if len(x) != len(y) or len(np.unique(x)) < 2:
        raise ValueError("a line needs two different x, and a y for each")
    centred = x - x.mean()
    rise = float(centred @ y / (centred @ centred))
    return rise, float(y.mean() - rise * x.mean())


def log_slope(depths: Sequence[float], scores: Sequence[float]) -> float:
    """A in score = a ln(depth) + b."""
    return slope(np.log(np.asarray(depths, float)), scores)[0]


def ratio_interval(
    above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray, level: float = LEVEL
) -> Interval:
    """Ratio of two means by Fieller (1954), for independent samples such as one slope per seed of each of two arms.

    The limits are the ratios r for which mean(above) - r mean(below) is within t standard errors of 0, with Welch's
    degrees of freedom at the estimate. Where the mean below is not clearly different from 0, no finite limits exist
    and they are infinite.

    Raises:
        ValueError: fewer than two values on a side, or a mean below of 0.
    """
    one, other = _finite(above), _finite(below)
    if min(len(one), len(other)) < 2:
        raise ValueError(f"a ratio of means needs two values on each side, got {len(one)} and {len(other)}")
    a, b = float(one.mean()), float(other.mean())
    if b == 0:
        raise ValueError("the mean that is divided by is 0")
    var_a, var_b = float(one.var(ddof=1)) / len(one), float(other.var(ddof=1)) / len(other)
    ratio = a / b
    parts = var_a, ratio**2 * var_b
    if sum(parts) == 0:
        return Interval(estimate=ratio, low=ratio, high=ratio, level=level)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(one) - 1) + parts[1] ** 2 / (len(other) - 1))
    square = t_quantile((1 + level) / 2, freedom) ** 2
    # (a - r b)^2 <= t^2 (var_a + r^2 var_b), a quadratic in r
    leading = b * b - square * var_b
    root = (a * b) ** 2 - leading * (a * a - square * var_a)
    if leading <= 0 or root < 0:
        return Interval(estimate=ratio, low=-math.inf, high=math.inf, level=level)
    half = math.sqrt(root) / leading
    return Interval(estimate=ratio, low=a * b / leading - half, high=a * b / leading + half, level=level)


def is_within(interval: Interval, margin: float) -> bool:
    """Whether an effect is inside a margin: both limits are; those of a 90 % interval are one-sided 95 % bounds."""
    return -margin <= interval.low and interval.high <= margin


@functools.lru_cache(256)
def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t distribution, by bisection of its distribution function.

    Args:
        probability: between 0 and 1, both excluded.
        freedom: degrees of freedom, above 0, not necessarily whole.
    """
    if not 0 < probability < 1 or not freedom > 0:
        raise ValueError(f"t_quantile({probability}, {freedom}): need 0 < probability < 1 and freedom > 0")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(value: float, freedom: float) -> float:
    """Distribution function of Student's t."""
    tail = 0.5 * _beta(freedom / (freedom + value * value), freedom / 2, 0.5)
    return 1 - tail if value > 0 else tail


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # where the continued fraction converges slowly
        return 1 - _beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    # Lentz's method on the continued fraction
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    product = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = product
        for factor in (even, odd):
            d = 1 / ((1 + factor * d) or tiny)
            c = (1 + factor / c) or tiny
            product *= c * d
        if abs(product - before) < 1e-15 * abs(product):
            break
    return front * product / a


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64).ravel()
    if not len(found) or not np.isfinite(found).all():
        raise ValueError(f"statistics need finite values, got {found.tolist()[:8]}")
    return found
