"""What makes a comparison fair: methods brought to equal steps, equal FLOPs or equal parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from loopwise.loop.config import to_dict
from loopwise.measure.cost import cost_of
from loopwise.train.config import RunConfig
from loopwise.train.estimate import estimate_run
from loopwise.train.models import DecoderSizes

Equal = Literal["steps", "flops", "parameters"]
EQUALS = ("steps", "flops", "parameters")
_POINTS = 12  # evaluations of a run whose config has none, so that it has a curve
_WIDEST = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method that takes part in a comparison."""

    name: str
    config: RunConfig


def equalise(methods: Sequence[Method], equal: Equal) -> list[Method]:
    """The methods as they are compared; the first stays as it is, the others are brought to what it spends.

    * "steps": its number of steps.
    * "flops": as many steps as its training FLOPs pay for.
    * "parameters": the width (a multiple of the number of heads) whose unique parameters come nearest to its own.

    Every method is evaluated some times in its run, so that it has a curve.

    Raises:
        ValueError: no methods, methods that read different data, a width that cannot be changed.
    """
    if not methods:
        raise ValueError("there is no method to compare")
    if equal not in EQUALS:
        raise ValueError(f"equal={equal!r} must be one of {', '.join(EQUALS)}")
    first, *others = methods
    for other in others:
        if to_dict(other.config.data) != to_dict(first.config.data):
            raise ValueError(
                f"{first.name} and {other.name} read different data, so their scores do not compare: "
                f"give them one with data=... or data.FIELD=..."
            )
    if equal == "steps":
        found = [first, *(with_steps(other, first.config.num_steps) for other in others)]
    elif equal == "flops":
        spent = estimate_run(first.config, flops_per_second=1.0).flops if others else 0.0
        found = [first, *(with_flops(other, spent) for other in others)]
    else:
        target = estimate_run(first.config, flops_per_second=1.0).parameters_unique if others else 0
        found = [first, *(with_parameters(other, target) for other in others)]
    return [_with_curve(method) for method in found]


def with_steps(method: Method, steps: int) -> Method:
    """The method with another number of steps; stages keep their shares."""
    config = method.config
    if not config.stages:
        return replace(method, config=replace(config, steps=steps))
    if steps < len(config.stages):
        raise ValueError(f"{method.name} has {len(config.stages)} stages and cannot run in {steps} steps")
    share = steps / config.num_steps
    stages = [replace(stage, steps=max(1, round(stage.steps * share))) for stage in config.stages]
    # What rounding leaves goes to the longest stage.
    longest = max(range(len(stages)), key=lambda index: stages[index].steps)
    rest = steps - sum(stage.steps for stage in stages)
    stages[longest] = replace(stages[longest], steps=stages[longest].steps + rest)
    return replace(method, config=replace(config, stages=tuple(stages)))


def with_flops(method: Method, flops: float) -> Method:
    """The method with as many steps as bring its training nearest to these FLOPs."""

    def spends(steps: int) -> float:
        return estimate_run(with_steps(method, steps).config, flops_per_second=1.0).flops

    least = len(method.config.all_stages)
    low = high = max(least, round(flops / estimate_run(method.config, flops_per_second=1.0).flops_per_step))
    # Where all steps cost the same this is it; they do not where loop counts change over the run.
    stride = 1
    while spends(high) < flops:
        low, high, stride = high, high + stride, 2 * stride
    while low > least and spends(low) > flops:
        low, high, stride = max(least, low - stride), low, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spends(middle) < flops else (low, middle)
    return with_steps(method, min((low, high), key=lambda steps: abs(spends(steps) - flops)))


def with_parameters(method: Method, target: int) -> Method:
    """The method with the width whose parameters come nearest to a number; heads and depth stay."""
    model = method.config.model
    if not isinstance(model, DecoderSizes):
        raise ValueError(
            f"{method.name}: the width of {model.kind} cannot be changed, compare it at equal steps or flops"
        )
    # Rotations turn pairs of dimensions of a head.
    unit = model.heads * (2 if model.positions == "rope" else 1)

    def at(units: int) -> RunConfig:
        return replace(method.config, model=replace(model, width=unit * units))

    low, high = 1, 1
    while count_parameters(at(high)) < target:
        low, high = high, 2 * high
        if unit * high > _WIDEST:
            raise ValueError(f"{method.name}: no width up to {_WIDEST} has {target} parameters")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_parameters(at(middle)) < target else (low, middle)
    best = min((low, high), key=lambda units: abs(count_parameters(at(units)) - target))
    return replace(method, config=at(best))


def count_parameters(config: RunConfig) -> int:
    """Elements of all distinct parameters under the plan of a run's first stage; the model is built without memory."""
    source = config.data.open(seed=config.seed)
    with torch.device("meta"):
        model, _ = config.model.build(source.vocab_size, seed=config.seed, parametrisation=config.parametrisation)
    return cost_of(model, context=1).parameters_unique


def _with_curve(method: Method) -> Method:
    config = method.config
    if config.evaluation.every:
        return method
    every = max(1, config.num_steps // _POINTS)
    return replace(method, config=replace(config, evaluation=replace(config.evaluation, every=every)))
