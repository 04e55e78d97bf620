"""Thresholds of halting rules from a text: what a shallower exit costs, token by token.

`trace.record` runs the text once at full depth and notes, for every token and rung, what each rule looks at and how
well the read-out at that rung predicts the next token. What a rule does at *any* threshold follows from these numbers
without running the model again.

The setting is teacher forced with the cache policy catch_up: the tokens before have the keys and values of every rung.
For plain models, and for loops with no layers behind them, this is exactly what `follow_adaptive` computes. Where a
loop has a coda, a token that leaves after r rungs is read out as if those before it had left after r too, while in
decoding each leaves the coda keys of its own depth.

The text a threshold is chosen on is a sample: a threshold holds a target when the one-sided 95 % bound of the mean loss
increase does. Thresholds are tried from the most careful one on until one fails, which keeps the level for the one that
is chosen (fixed sequence testing, as CALM does it, 2207.07061; 2110.01052). Neighbouring tokens are no independent
sample, so the bound is over blocks of tokens.

Shapes: R rungs, N tokens that are predicted, K blocks, G settings of a rule.
"""

# ruff: noqa: N802, N803, N806, N815 -- shape suffixes in names

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from loopwise.decode.halting import FixedDepth, QHalting, halting_text, parse_halting
from loopwise.decode.trace import Trace, knob, looks_at
from loopwise.loop.config import Component
from loopwise.loop.criteria import ArgmaxHalting, ConfidenceHalting, Criterion
from loopwise.loop.halting import HazardHalting

_QUANTILES = (0.0, 0.001, 0.003, 0.01, 0.02, *(step / 32 for step in range(1, 32)), 0.98, 0.99, 0.997, 0.999, 1.0)
_FEWEST_BLOCKS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One rule at several settings, from the most careful one on.

    Attributes:
        name: of the rule.
        rules: the rule at each setting.
        depth_G: mean rungs per token.
        visits_G: mean visits per token, those of read-outs that only judge included.
        loss_G: mean loss in nats.
        increase_G: how much more than at full depth.
        bound_G: one-sided upper 95 % bound of the increase over blocks; infinite with fewer than four blocks.
        agreement_G: share of tokens whose most likely next token is that of full depth.
    """

    name: str
    rules: list[Component]
    depth_G: np.ndarray
    visits_G: np.ndarray
    loss_G: np.ndarray
    increase_G: np.ndarray
    bound_G: np.ndarray
    agreement_G: np.ndarray


def depths(trace: Trace, rule: Component | str) -> np.ndarray:
    """After how many rungs each token stops under a rule, int64 `[N]`.

    Raises:
        ValueError: the trace was recorded without this rule.
    """
    rule = parse_halting(rule) if isinstance(rule, str) else rule
    num_rungs = trace.num_rungs
    if isinstance(rule, FixedDepth):
        return np.full(trace.num_tokens, min(rule.rungs or num_rungs, num_rungs))
    knob(rule)
    if looks_at(rule) not in trace.values:
        raise ValueError(f"halting rule {halting_text(rule)} was not recorded")
    holds_RN = _holds(rule, trace.values[looks_at(rule)])
    patience = rule.patience if isinstance(rule, Criterion) else 1
    depth_N = np.full(trace.num_tokens, num_rungs)
    for rung in reversed(range(patience - 1, num_rungs)):
        depth_N[holds_RN[rung - patience + 1 : rung + 1].all(0)] = rung + 1
    return depth_N


def sweep(trace: Trace, rule: Component | str, settings: Sequence[float] | None = None) -> Curve:
    """Quality against depth for a rule at several values of its knob.

    Args:
        trace: what was recorded.
        rule: the rule; its other fields, such as patience, stay.
        settings: values of the knob (see `knob`); None takes quantiles of what was recorded, and the rule's own.

    Raises:
        ValueError: see `depths`.
    """
    rule = parse_halting(rule) if isinstance(rule, str) else rule
    name = knob(rule)
    if settings is None:
        settings = _settings(trace, rule)
    careful_first = sorted(set(settings), reverse=name != "threshold" or _stops_above(rule))
    rules = [replace(cast(Any, rule), **{name: setting}) for setting in careful_first]
    tokens_N, full_N = np.arange(trace.num_tokens), trace.loss_RN[-1]
    columns: list[tuple[float, ...]] = []
    for one in rules:
        depth_N = depths(trace, one)
        loss_N, best_N = (values[depth_N - 1, tokens_N] for values in (trace.loss_RN, trace.best_RN))
        visits_N = trace.visits_R[depth_N - 1]
        if isinstance(one, Criterion) and one.reads == "logits":
            visits_N = visits_N + (depth_N - 1) * trace.num_tail
        more_N = loss_N.astype(np.float64) - full_N
        columns.append(
            (
                depth_N.mean(),
                visits_N.mean(),
                loss_N.mean(dtype=np.float64),
                more_N.mean(),
                upper_bound(more_N, trace.block_N),
                (best_N == trace.best_RN[-1]).mean(),
            )
        )
    depth_G, visits_G, loss_G, increase_G, bound_G, agreement_G = np.array(columns).T
    return Curve(
        name=halting_text(rule).partition("(")[0],
        rules=rules,
        depth_G=depth_G,
        visits_G=visits_G,
        loss_G=loss_G,
        increase_G=increase_G,
        bound_G=bound_G,
        agreement_G=agreement_G,
    )


def choose(curve: Curve, target: float) -> int | None:
    """The least careful setting before the first whose bound is above the target; None where not even one holds it.

    Args:
        curve: of a rule.
        target: the largest loss increase in nats per token.
    """
    chosen = None
    for place, bound in enumerate(curve.bound_G):
        if bound > target:
            break
        chosen = place
    return chosen


def setting_text(rule: Component) -> str:
    """The text of a rule in which the knob is always told, as `parse_halting` reads it: `kl(threshold=0.0005)`."""
    name = knob(rule)
    rest = halting_text(rule).partition("(")[2].rstrip(")")
    told = [part.strip() for part in rest.split(",") if part.strip() and "=" in part]
    value = f"{name}={getattr(rule, name)}"
    return f"{halting_text(rule).partition('(')[0]}({', '.join([value, *(part for part in told if part != value)])})"


def upper_bound(more_N: np.ndarray, block_N: np.ndarray) -> float:
    """One-sided upper 95 % bound of the mean of paired differences, with blocks of neighbours as the sample (t)."""
    num_blocks = int(block_N.max()) + 1
    if num_blocks < _FEWEST_BLOCKS:
        return math.inf
    # Blocks weigh by their tokens: the mean of these is the mean over tokens.
    sums_K = np.bincount(block_N, weights=more_N, minlength=num_blocks) * num_blocks / len(more_N)
    error = sums_K.std(ddof=1) / math.sqrt(num_blocks)
    return float(sums_K.mean() + _t95(num_blocks - 1) * error)


def _stops_above(rule: Component) -> bool:
    return isinstance(rule, (ConfidenceHalting, QHalting, HazardHalting))


def _holds(rule: Any, values_RN: np.ndarray) -> np.ndarray:
    if isinstance(rule, HazardHalting):  # its values are survivals; 1 never stops, see there
        return values_RN <= 1 - rule.threshold if rule.threshold < 1 else np.zeros_like(values_RN, dtype=bool)
    if isinstance(rule, QHalting):
        return values_RN > rule.threshold
    return values_RN >= rule.threshold if isinstance(rule, ConfidenceHalting) else values_RN < rule.threshold


def _settings(trace: Trace, rule: Any) -> list[float]:
    """Values of the knob that spread mean depths over what is possible, and the rule's own."""
    if isinstance(rule, FixedDepth):
        return list(range(1, trace.num_rungs + 1))
    if isinstance(rule, ArgmaxHalting):
        return sorted({*range(1, trace.num_rungs), rule.patience})
    values_RN = trace.values[looks_at(rule)][:-1].astype(np.float64)
    # Half of the thresholds spread over all values, half over the share of tokens that stop early at all.
    is_low = isinstance(rule, HazardHalting) or not _stops_above(rule)
    known_RN = np.isfinite(values_RN)
    extreme_N = np.where(known_RN, values_RN, math.inf if is_low else -math.inf)
    extreme_N = extreme_N.min(0, initial=math.inf) if is_low else extreme_N.max(0, initial=-math.inf)
    parts = (values_RN[known_RN], extreme_N[np.isfinite(extreme_N)])
    found = np.concatenate([np.quantile(part, _QUANTILES) for part in parts if len(part)] or [np.empty(0)])
    if isinstance(rule, HazardHalting):
        found = 1 - found
    if isinstance(rule, (HazardHalting, ConfidenceHalting)):  # most differences are near 1
        found = 1 - _rounded(1 - np.clip(found, 0, 1))
        return sorted({*(round(float(value), 12) for value in found), rule.threshold})
    if not isinstance(rule, QHalting):
        found = np.maximum(found, 0)
    return sorted({*(float(value) for value in _rounded(found)), rule.threshold})


def _rounded(values: np.ndarray) -> np.ndarray:
    """To three digits."""
    return np.array([float(f"{value:.3g}") for value in values])


def _t95(freedom: int) -> float:
    """The 95 % quantile of Student's t by the expansion of Cornish and Fisher: within 0.3 % from 3 degrees on."""
    z = 1.6448536269514722
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
