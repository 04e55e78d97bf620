"""How often a loop runs in training, and how many of the iterations carry a gradient.

Shapes: B batch rows.

A draw is a pure function of (seed, step): a run that resumes, and every rank of a distributed one, sees the same
depths, and nothing is drawn from torch's global generator.
"""

# ruff: noqa: N802, N815 -- shape suffixes in the names of fields

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from loopwise.loop.config import Component
from loopwise.loop.count import LoopCount as LoopCount
from loopwise.loop.count import LoopCounts as LoopCounts


@dataclass(frozen=True, kw_only=True)
class DepthSampler(Component):
    """Base of the samplers of loop counts.

    Attributes:
        max_grad: the gradient window: at most so many of the last iterations carry a gradient; None for all.
        per: one depth for the batch, or one for each of its sequences.
    """

    max_grad: int | None = None
    per: Literal["batch", "sequence"] = "batch"

    def __post_init__(self) -> None:
        """Check the window."""
        super().__post_init__()
        self.require(self.max_grad is None or self.max_grad >= 1, "max_grad", "must be at least 1, or None for all")

    @property
    def expected(self) -> float:
        """The mean of the total that this sampler realises."""
        raise NotImplementedError

    def with_mean(self, mean: float) -> DepthSampler:
        """The same sampler with another mean, at most its own; curricula use it."""
        raise NotImplementedError

    def totals(self, step: int, generator: torch.Generator, batch: int) -> torch.Tensor:
        """Draw `batch` totals, int64 `[batch]`, each at least 1."""
        raise NotImplementedError

    def window(self, step: int) -> int | None:
        """The gradient window at an optimizer step."""
        return self.max_grad

    def sample(self, step: int, *, seed: int, batch: int | None = None) -> LoopCount | LoopCounts:
        """The loop count of an optimizer step, the same for the same (seed, step).

        Args:
            step: index of the optimizer step.
            seed: seed of the run.
            batch: number of sequences B; needed when depths are per sequence. On several ranks, draw for the whole
                batch and slice: a draw for B rows does not begin with a draw for fewer.

        Returns:
            A `LoopCount`, or `LoopCounts` with tensors `[B]` when depths are per sequence.

        Raises:
            ValueError: depths are per sequence and `batch` is None.
        """
        generator = step_generator(seed, step)
        if self.per == "batch":
            return LoopCount.split(int(self.totals(step, generator, 1)), self.window(step))
        if batch is None:
            raise ValueError(f"{self.kind}: per='sequence' needs the number of sequences; pass batch=")
        return LoopCounts.split(self.totals(step, generator, batch), self.window(step))


@dataclass(frozen=True, kw_only=True)
class FixedDepth(DepthSampler):
    """Always the same number of iterations.

    Attributes:
        total: iterations, at least 1.
    """

    kind: ClassVar[str | None] = "depth.fixed"
    total: int

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.total >= 1, "total", "must be at least 1")

    @property
    def expected(self) -> float:
        """`total`."""
        return float(self.total)

    def with_mean(self, mean: float) -> FixedDepth:
        """A fixed depth of `mean`, rounded up."""
        return replace(self, total=math.ceil(mean))

    def totals(self, step: int, generator: torch.Generator, batch: int) -> torch.Tensor:
        """`total`, B times."""
        return torch.full([batch], self.total)


@dataclass(frozen=True, kw_only=True)
class UniformDepth(DepthSampler):
    """Every depth from `low` to `high`, both included, equally often (LoopFormer's short schedules, 2602.11451).

    Attributes:
        low: smallest depth, at least 1.
        high: largest depth, at least `low`.
    """

    kind: ClassVar[str | None] = "depth.uniform"
    low: int = 1
    high: int

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.low >= 1, "low", "must be at least 1")
        self.require(self.high >= self.low, "high", f"must be at least low={self.low}")

    @property
    def expected(self) -> float:
        """`(low + high) / 2`."""
        return (self.low + self.high) / 2

    def with_mean(self, mean: float) -> UniformDepth:
        """The range with this (half-)integer mean and the same lower end, where that is not above the mean."""
        low = min(self.low, math.floor(mean))
        return replace(self, low=low, high=round(2 * mean) - low)

    def totals(self, step: int, generator: torch.Generator, batch: int) -> torch.Tensor:
        """B independent draws."""
        return torch.randint(self.low, self.high + 1, [batch], generator=generator)


@dataclass(frozen=True, kw_only=True)
class MeanDepth(DepthSampler):
    """Base of the samplers with a mean.

    Attributes:
        mean: mean number of iterations, at least 1.
        reference: draw as the published code does, whose realised mean is another; see the subclasses.
    """

    mean: float
    reference: bool = False

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.mean >= 1, "mean", "must be at least 1")

    def with_mean(self, mean: float) -> MeanDepth:
        """The same distribution with another mean."""
        return replace(self, mean=mean)


@dataclass(frozen=True, kw_only=True)
class PoissonDepth(MeanDepth):
    """`1 + Poisson(mean - 1)`: mean exactly as configured, never 0.

    `reference` draws Parcae's `max(1, Poisson(mean))` (2604.12946, "poisson-truncated-full"), whose mean is
    `mean + exp(-mean)`.
    """

    kind: ClassVar[str | None] = "depth.poisson"

    @property
    def expected(self) -> float:
        """The realised mean."""
        return self.mean + math.exp(-self.mean) if self.reference else self.mean

    def totals(self, step: int, generator: torch.Generator, batch: int) -> torch.Tensor:
        """B independent draws."""
        offset = 0 if self.reference else 1
        rate_B = torch.full([batch], self.mean - offset, dtype=torch.float64)
        return (offset + torch.poisson(rate_B, generator=generator)).clamp(min=1).long()


@dataclass(frozen=True, kw_only=True)
class PoissonLogNormalDepth(MeanDepth):
    """`1 + Poisson(rate)`, `rate ~ LogNormal(ln(mean - 1) - sigma^2 / 2, sigma)`: a long tail of deep steps.

    The sampler of Huginn (2502.05171). Its code takes `ln(mean)`, so that the realised mean is `mean + 1`;
    `reference` does the same. Here the mean is the configured one.

    Attributes:
        sigma: deviation of the logarithm of the rate, at least 0.
    """

    kind: ClassVar[str | None] = "depth.poisson_lognormal"
    sigma: float = 0.5

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.sigma >= 0, "sigma", "must be at least 0")

    @property
    def expected(self) -> float:
        """The realised mean."""
        return self.mean + 1 if self.reference else self.mean

    def totals(self, step: int, generator: torch.Generator, batch: int) -> torch.Tensor:
        """B independent draws."""
        mean_rate = self.mean if self.reference else self.mean - 1
        normal_B = torch.randn([batch], generator=generator, dtype=torch.float64)
        # the mean of exp(sigma z - sigma^2 / 2) is 1; a mean rate of 0 needs no logarithm this way
        rate_B = mean_rate * torch.exp(self.sigma * normal_B - self.sigma**2 / 2)
        return 1 + torch.poisson(rate_B, generator=generator).long()


@dataclass(frozen=True, kw_only=True)
class CurriculumDepth(DepthSampler):
    """Another sampler whose mean grows from `start` to its own over the first `steps` optimizer steps.

    `mean(step) = max(start, ceil(f(step / steps) * mean))`, f(x) = x or `1 - sqrt(1 - x)`, whole means as in Parcae
    (2604.12946) and the retrofitted models (2511.07384). The gradient window and `per` are those of the other sampler.

    Attributes:
        sampler: the sampler after the ramp.
        steps: length of the ramp in optimizer steps, at least 1.
        start: mean at the beginning, at least 1.
        shape: f.
    """

    kind: ClassVar[str | None] = "depth.curriculum"
    sampler: DepthSampler
    steps: int
    start: int = 1
    shape: Literal["linear", "one_minus_sqrt"] = "linear"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.steps >= 1, "steps", "must be at least 1")
        self.require(1 <= self.start <= self.sampler.expected, "start", "must be from 1 to the mean of the sampler")
        self.require(not isinstance(self.sampler, CurriculumDepth), "sampler", "must not be a curriculum itself")
        self.require(self.max_grad is None, "max_grad", "must be set on the sampler inside")
        self.require(self.per == "batch", "per", "must be set on the sampler inside")

    @property
    def expected(self) -> float:
        """The realised mean after the ramp."""
        return self.sampler.expected

    def mean_at(self, step: int) -> float:
        """The configured mean at an optimizer step."""
        mean = self.sampler.mean if isinstance(self.sampler, MeanDepth) else self.sampler.expected
        if step >= self.steps:
            return mean
        progress = step / self.steps
        if self.shape == "one_minus_sqrt":
            progress = 1 - math.sqrt(1 - progress)
        return min(mean, max(self.start, math.ceil(progress * mean)))

    def sample(self, step: int, *, seed: int, batch: int | None = None) -> LoopCount | LoopCounts:
        """The loop count of an optimizer step; see `DepthSampler.sample`."""
        sampler = self.sampler if step >= self.steps else self.sampler.with_mean(self.mean_at(step))
        return sampler.sample(step, seed=seed, batch=batch)


def step_generator(seed: int, step: int, purpose: str = "") -> torch.Generator:
    """A CPU generator whose state is a hash of (seed, step, purpose): neighbours are unrelated."""
    text = f"{seed}:{step}:{purpose}" if purpose else f"{seed}:{step}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # manual_seed takes a signed 64-bit number
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
