"""When a model grows: how many optimizer steps each stage of a run has. Loads no torch.

Boundaries are rounded from the cumulative sum. Rounding every stage on its own loses steps, and lets two stages
coincide in a short run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, kw_only=True)
class GrowthSchedule:
    """How long the stages of a growing run are.

    Attributes:
        steps: optimizer steps of every stage, each at least 1; the model grows between two of them.
    """

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that no stage is empty."""
        for index, count in enumerate(self.steps):
            if count < 1:
                raise ValueError(
                    f"stage {index} of {len(self.steps)} has {count} of the {self.total} steps: use more steps, or "
                    "fewer stages"
                )
        if not self.steps:
            raise ValueError("a growth schedule needs at least one stage")

    @property
    def total(self) -> int:
        """Steps of the run."""
        return sum(self.steps)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Steps that are done when the model grows."""
        return tuple(accumulate(self.steps))[:-1]


def prop_alpha(total_steps: int, stages: int, alpha: float) -> GrowthSchedule:
    """PROP-alpha (2409.19044): stage i of k has a share of `i^alpha / sum_j j^alpha` of the steps, i from 1.

    With alpha 0 all stages are equally long; a larger alpha spends more on the deeper ones.

    Raises:
        ValueError: no stage, a negative alpha, or a stage without a step.
    """
    if stages < 1 or alpha < 0:
        raise ValueError(f"prop_alpha: stages={stages}, alpha={alpha} must be at least 1 and at least 0")
    return _by_shares(total_steps, [stage**alpha for stage in range(1, stages + 1)])


def at_steps(total_steps: int, boundaries: Sequence[int]) -> GrowthSchedule:
    """Grow after these numbers of steps, ascending, above 0 and below `total_steps`.

    Raises:
        ValueError: a boundary outside of the run, or not above the one before.
    """
    edges = [0, *boundaries, total_steps]
    for before, after in pairwise(edges):
        if after <= before:
            raise ValueError(f"growth at steps {list(boundaries)} of {total_steps}: use ascending steps inside the run")
    return GrowthSchedule(steps=tuple(after - before for before, after in pairwise(edges)))


def at_fractions(total_steps: int, fractions: Sequence[float]) -> GrowthSchedule:
    """Grow at these parts of the run, ascending, above 0 and below 1.

    Raises:
        ValueError: as `at_steps`.
    """
    return at_steps(total_steps, [round(part * total_steps) for part in fractions])


def at_tokens(total_tokens: float, boundaries: Sequence[float], tokens_per_step: int) -> GrowthSchedule:
    """Grow when about these numbers of tokens have been read.

    Args:
        total_tokens: of the whole run.
        boundaries: ascending, below `total_tokens`.
        tokens_per_step: rows of a step times tokens of a row.

    Raises:
        ValueError: as `at_steps`.
    """
    if tokens_per_step < 1:
        raise ValueError(f"tokens_per_step={tokens_per_step} must be at least 1")
    total, *edges = (round(count / tokens_per_step) for count in (total_tokens, *boundaries))
    return at_steps(total, edges)


def gstack_tokens(parameters: float, flops: float) -> float:
    """Tokens after which G_stack stacks (2405.15319): `log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74`.

    The small model reads d tokens; then its layers are stacked, four times by that work's other rule.

    Args:
        parameters: N, of the large model.
        flops: C that training is to take, 6 N D for D tokens.

    Raises:
        ValueError: numbers that are no sizes of a run.
    """
    if parameters < 1 or flops <= 1:
        raise ValueError(f"gstack_tokens: parameters={parameters}, flops={flops} must be those of a run")
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)


def gstack(parameters: float, total_tokens: float, tokens_per_step: int) -> GrowthSchedule:
    """Two stages: the small model until `gstack_tokens`, then the stacked one until the end.

    Args:
        parameters: N, of the large model.
        total_tokens: D that the large model would read if it was trained alone; C is 6 N D.
        tokens_per_step: rows of a step times tokens of a row.

    Raises:
        ValueError: a run that ends before the rule stacks.
    """
    small = gstack_tokens(parameters, 6 * parameters * total_tokens)
    return at_tokens(total_tokens, [small], tokens_per_step)


def _by_shares(total_steps: int, weights: Sequence[float]) -> GrowthSchedule:
    whole = math.fsum(weights)
    edges = [0, *(round(total_steps * part / whole) for part in accumulate(weights))]
    return GrowthSchedule(steps=tuple(after - before for before, after in pairwise(edges)))
