"""What a stage says of a model and of the learning rate: its plan, what is trained, and the factor of every step.

Edits of the model are in `growth`. A stage change is a pure function of the config and of the model before it, so that
a run that resumes inside a later stage first walks through the changes of the earlier ones and then loads its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

from torch import nn

from loopwise.models.attach import plan_of
from loopwise.models.playing import looping_of
from loopwise.plan import Plan
from loopwise.train.config import RunConfig
from loopwise.train.optim.schedule import length


def set_plan(model: nn.Module, plan: Plan) -> None:
    """Let a model with a plan visit its layers in another order.

    Raises:
        ValueError: a layer that the model lacks, or a loop of our own decoder that the plan lacks.
    """
    checked = _checked(model, plan)
    looping = looping_of(model)
    assert looping is not None, "models of a run have a plan"
    looping.plan = checked


def _checked(model: nn.Module, plan: Plan) -> Plan:
    """The plan, which fits the model."""
    looping = looping_of(model)
    assert looping is not None, "models of a run have a plan"
    owner = next(module for module in model.modules() if module.__dict__.get("loopwise") is looping)
    missing = sorted(set(getattr(owner, "loops", {})) - set(plan.loops))
    if missing:
        raise ValueError(
            f"the model has components for the loop {missing[0]!r}, the plan {plan} has no such loop: name one so, "
            f"x1 if need be"
        )
    return plan.validate(len(looping.returns))


def set_trainable(parameters: Mapping[str, nn.Parameter], patterns: Sequence[str]) -> None:
    """Train the parameters whose names match one of the patterns, all if there are none.

    Args:
        parameters: those that the run trains in some stage, by name.
        patterns: as for `fnmatch`.

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    check_patterns(parameters, patterns)
    for name, parameter in parameters.items():
        parameter.requires_grad_(not patterns or any(fnmatch(name, pattern) for pattern in patterns))


def check_patterns(parameters: Mapping[str, nn.Parameter], patterns: Sequence[str]) -> None:
    """Raise `ValueError` for a pattern that matches no parameter."""
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in parameters):
            raise ValueError(f"trainable={pattern!r} matches no parameter, such as {next(iter(parameters))}")


def plan_text(model: nn.Module) -> str:
    """The plan of a model of a run."""
    plan = plan_of(model)
    assert plan is not None
    return str(plan)


def lr_factor(config: RunConfig, step: int) -> float:
    """Factor on the learning rate of a 0-based step.

    The schedule of the run covers all its steps. After a stage that rewinds, at step f of N with a warm-up of w, step s
    has the factor that step w + s - f has in a run of w + N - f steps: warmed up at f, and at the end value at N.
    """
    index, first = config.stage_at(step)
    stage = config.all_stages[index]
    if stage.schedule is not None:
        factor = stage.schedule.factor(step - first, stage.steps)
    else:
        start = _rewound(config, index)
        if start is None:
            factor = config.schedule.factor(step, config.num_steps)
        else:
            warmup = length(config.schedule.warmup, config.num_steps)
            factor = config.schedule.factor(warmup + step - start, warmup + config.num_steps - start)
    return factor * min(1.0, (step - first + 1) / stage.warmup) if stage.lr == "rewarm" else factor


def _rewound(config: RunConfig, index: int) -> int | None:
    """First step of the last stage up to this one that rewinds the schedule of the run."""
    first, found = 0, None
    for stage in config.all_stages[: index + 1]:
        found = first if stage.lr == "rewind" else found
        first += stage.steps
    return found
